"""Certificates by ACME for published hosts: which ones, and from the order to the visitor."""

from __future__ import annotations

import hashlib
import socket
import ssl
from collections.abc import Callable
from pathlib import Path

import pytest
import trio
from cryptography import x509

from relay.acme import AcmeRenewer
from relay.acme_files import certificate_path, http_challenge_answer
from relay.config import AcmeConfig, Config, ConfigError
from tests.relay.edge.test_public import Site, site
from tests.relay.fake_authority import TOKEN, FakeAuthority, Proof

HOST = "shop.example.org"
ROUTES = """
[[http]]
host = "app.example.com"
tunnel = "app"
[[http]]
host = "shop.example.org"
tunnel = "app"
[[http]]
host = "shop.example.org"
path = "/api"
tunnel = "app"
[[http]]
host = "*.example.org"
tunnel = "app"
"""
ACME_IDENTIFIER = x509.ObjectIdentifier("1.3.6.1.5.5.7.1.31")


def look(place: tuple[str, int], name: str, *protocols: str) -> tuple[x509.Certificate, str | None]:
    """The certificate that a name gets, whoever signed it; blocks."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    if protocols:
        context.set_alpn_protocols(list(protocols))
    with (
        socket.create_connection(place, timeout=5) as sock,
        context.wrap_socket(sock, server_hostname=name) as tls,
    ):
        der = tls.getpeercert(binary_form=True)
        assert der is not None
        return x509.load_der_x509_certificate(der), tls.selected_alpn_protocol()


async def is_served(running: Site, name: str) -> bool:
    certificate, _ = await trio.to_thread.run_sync(look, running.public.https[0], name)
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return names.get_values_for_type(x509.DNSName) == [name]


async def test_names_to_order(tmp_path: Path) -> None:
    """Exact hosts, each once, that the operator gave no certificate for; none without the
    setting. Routes that change are followed."""
    async with site(tmp_path, ROUTES) as running:
        assert running.public.certificates.names_to_order() == []
    state = str(tmp_path / "state")
    settings = {"edge.public.acme": True, "tls.acme.state_directory": state}
    async with site(tmp_path, ROUTES, **settings) as running:
        assert running.public.certificates.names_to_order() == [HOST]
        (tmp_path / "routes.toml").write_text(ROUTES.replace("shop", "pub"))
        running.public.reload()
        assert running.public.certificates.names_to_order() == ["pub.example.org"]


@pytest.mark.parametrize("challenge", ["http-01", "tls-alpn-01"])
async def test_from_the_order_to_the_visitor(
    challenge: str,
    tmp_path: Path,
    authority: Callable[[Proof, str], FakeAuthority],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The challenge is answered where the authority looks, and the certificate is used at once."""
    state = str(tmp_path / "state")
    places: list[tuple[str, int]] = []

    def proof(token: str, expected: str) -> bool:
        if challenge == "http-01":
            target = f"/.well-known/acme-challenge/{TOKEN}"
            return http_challenge_answer(state, target) == expected.encode()
        certificate, protocol = look(places[0], HOST, "acme-tls/1")
        shown = certificate.extensions.get_extension_for_oid(ACME_IDENTIFIER).value
        digest = hashlib.sha256(expected.encode()).digest()
        return protocol == "acme-tls/1" and shown.public_bytes() == b"\x04\x20" + digest

    fake = authority(proof, challenge)
    monkeypatch.setattr("relay.acme._PUBLISHED_AFTER_SECONDS", 1.0)
    settings = {"edge.public.acme": True, "tls.acme.state_directory": state}
    async with site(tmp_path, ROUTES, **settings) as running:
        places += running.public.https
        assert not await is_served(running, HOST)
        config = AcmeConfig(
            directory_url=f"{fake.url}/directory",
            challenge=challenge,  # type: ignore[arg-type]
            state_directory=state,
        )
        renewer = AcmeRenewer(config, running.public.certificates.names_to_order)
        running.nursery.start_soon(renewer.run)
        with trio.fail_after(10):
            while not await is_served(running, HOST):  # noqa: ASYNC110  # a visitor can't know
                await trio.sleep(0.1)
        assert certificate_path(state, HOST).stat().st_mode & 0o777 == 0o600
        assert fake.identifiers == [{"type": "dns", "value": HOST}]
        # The operator's own certificate goes on serving its names.
        assert await is_served(running, "app.example.com") is False
        tls, _ = await running.visit("app.example.com")
        await trio.aclose_forcefully(tls)


async def test_a_broken_certificate_leaves_the_others(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It is ordered anew, and visitors of other names notice nothing."""
    state = tmp_path / "state"
    state.mkdir()
    certificate_path(str(state), HOST).write_text("oops")
    settings = {"edge.public.acme": True, "tls.acme.state_directory": str(state)}
    async with site(tmp_path, ROUTES, **settings) as running:
        assert f"the certificate for {HOST} will be ordered anew" in caplog.text
        tls, _ = await running.visit("app.example.com")
        await trio.aclose_forcefully(tls)


def test_without_https_there_is_nothing_to_certify(tmp_path: Path) -> None:
    """The mistake is named."""
    with pytest.raises(ConfigError, match=r"edge\.public\.acme"):
        Config.dev({"edge.listen": "127.0.0.1:0", "edge.public.acme": True})
