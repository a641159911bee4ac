"""ACME against a small authority of our own: RFC 8555's order from account to certificate."""

from __future__ import annotations

import hashlib
import ipaddress
import ssl
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import trio
from cryptography import x509

from relay.acme import LOOK_SECONDS, AcmeRenewer, backoff_seconds, renewal_unix
from relay.acme_files import certificate_path, http_challenge_answer, tls_challenge_path
from relay.certificate_files import CertificateError, covers, load_pair, make_self_signed
from relay.certificates import Certificates
from relay.config import AcmeConfig, TlsConfig
from tests.relay.fake_authority import TOKEN, FakeAuthority, Proof
from traversal.keys import NodePublic

pytest.importorskip("acme", reason="the extra 'acme' is not installed")

NAME = "derp.example"


def names() -> list[str]:
    return [NAME]


def config(directory: Path, url: str, challenge: str = "http-01") -> AcmeConfig:
    return AcmeConfig(
        directory_url=f"{url}/directory",
        email="night@derp.example",
        challenge=challenge,  # type: ignore[arg-type]
        state_directory=str(directory / "acme"),
    )


async def test_http_01_from_nothing_to_a_certificate(
    tmp_path: Path, authority: Callable[[Proof, str], FakeAuthority]
) -> None:
    """The answer is where the plain HTTP listener looks, and gone afterwards."""
    state = str(tmp_path / "acme")
    target = f"/.well-known/acme-challenge/{TOKEN}"

    def proof(token: str, expected: str) -> bool:
        return http_challenge_answer(state, target) == expected.encode()

    fake = authority(proof, "http-01")
    renewer = AcmeRenewer(config(tmp_path, fake.url), names)
    assert renewer.is_due(NAME)
    await renewer.renew(NAME)
    assert not renewer.is_due(NAME)
    path = certificate_path(state, NAME)
    assert path.stat().st_mode & 0o777 == 0o600
    pair = load_pair(path, path, NAME)
    assert len(pair.chain) == 2
    assert http_challenge_answer(state, target) is None
    assert fake.contacts == [["mailto:night@derp.example"]]


async def test_the_account_is_found_again(
    tmp_path: Path, authority: Callable[[Proof, str], FakeAuthority]
) -> None:
    """A renewal uses the same account and a new key."""
    fake = authority(lambda token, expected: True, "http-01")
    renewer = AcmeRenewer(config(tmp_path, fake.url), names)
    await renewer.renew(NAME)
    path = certificate_path(str(tmp_path / "acme"), NAME)
    first = load_pair(path, path, NAME)
    await renewer.renew(NAME)
    assert load_pair(path, path, NAME).key_pem != first.key_pem
    assert len([name for name in fake.accounts if not name.startswith("key ")]) == 1


async def test_tls_alpn_01_for_an_ip_address(
    tmp_path: Path, authority: Callable[[Proof, str], FakeAuthority]
) -> None:
    """RFC 8737 and 8738: the listener's challenge context shows the digest."""
    address = "192.0.2.7"
    settings = TlsConfig(mode="acme", acme=config(tmp_path, "", "tls-alpn-01"))
    state = settings.acme.state_directory

    def proof(token: str, expected: str) -> bool:
        listener = Certificates(settings, address, NodePublic(b"k" * 32))
        client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        client.check_hostname = False
        client.verify_mode = ssl.CERT_NONE
        client.set_alpn_protocols(["acme-tls/1"])
        to_client, to_server = ssl.MemoryBIO(), ssl.MemoryBIO()
        ends = [client.wrap_bio(to_client, to_server, server_hostname="7.2.0.192.in-addr.arpa")]
        with pytest.raises(ssl.SSLWantReadError):
            ends[0].do_handshake()
        hello = to_server.read()
        to_server.write(hello)
        context = listener.context_for(hello)
        assert context is not None
        ends.append(context.wrap_bio(to_server, to_client, server_side=True))
        for end in (ends[1], ends[0], ends[1]):
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                pass
        der = ends[0].getpeercert(binary_form=True)
        assert der is not None
        certificate = x509.load_der_x509_certificate(der)
        oid = x509.ObjectIdentifier("1.3.6.1.5.5.7.1.31")
        extension = certificate.extensions.get_extension_for_oid(oid)
        digest = hashlib.sha256(expected.encode()).digest()
        return (
            ends[0].selected_alpn_protocol() == "acme-tls/1"
            and extension.critical
            and extension.value.public_bytes() == b"\x04\x20" + digest
            and covers(certificate, address)
        )

    fake = authority(proof, "tls-alpn-01")
    await AcmeRenewer(config(tmp_path, fake.url, "tls-alpn-01"), names).renew(address)
    assert fake.identifiers == [{"type": "ip", "value": str(ipaddress.ip_address(address))}]
    assert not tls_challenge_path(state).exists()
    assert Certificates(settings, address, NodePublic(b"k" * 32)).status().ready


async def test_a_failed_challenge_says_what_the_authority_saw(
    tmp_path: Path, authority: Callable[[Proof, str], FakeAuthority]
) -> None:
    """And leaves nothing behind."""
    fake = authority(lambda token, expected: False, "http-01")
    renewer = AcmeRenewer(config(tmp_path, fake.url), names)
    with pytest.raises(CertificateError, match=r"derp\.example: wrong answer at port 80"):
        await renewer.renew(NAME)
    assert renewer.is_due(NAME)
    assert not list((tmp_path / "acme" / "http-01").iterdir())


async def test_a_challenge_that_is_not_offered(
    tmp_path: Path, authority: Callable[[Proof, str], FakeAuthority]
) -> None:
    """The operator is told which setting to change."""
    fake = authority(lambda token, expected: True, "dns-01")
    with pytest.raises(CertificateError, match=r"offers dns-01 and not http-01; change tls\.acme"):
        await AcmeRenewer(config(tmp_path, fake.url), names).renew(NAME)


async def test_an_unreachable_authority(tmp_path: Path) -> None:
    """One error type, with the address in it."""
    with pytest.raises(CertificateError, match=r"no certificate for derp\.example from http://127"):
        await AcmeRenewer(config(tmp_path, "http://127.0.0.1:1"), names).renew(NAME)


async def test_run_backs_off_and_recovers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    """1, 2, 4 ... minutes after failures; nothing to do while the certificate is young."""
    renewer = AcmeRenewer(config(tmp_path, "http://127.0.0.1:1"), names)
    attempts: list[float] = []
    start = trio.current_time()

    async def renew(name: str) -> None:
        assert name == NAME
        attempts.append(trio.current_time() - start)
        if len(attempts) < 4:
            raise CertificateError("not today")

    monkeypatch.setattr(renewer, "renew", renew)
    monkeypatch.setattr(renewer, "is_due", lambda name: len(attempts) < 4)
    with trio.move_on_after(86400):
        await renewer.run()
    for attempt, expected in zip(attempts, [0, 60, 180, 420], strict=True):
        assert expected - 0.1 <= attempt <= expected + 3 * LOOK_SECONDS
    assert [backoff_seconds(n) for n in (5, 6, 100)] == [960, 1800, 1800]


async def test_each_name_has_its_own_pauses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    """A name that fails holds up no other; a new one is noticed soon, one that is gone is left
    alone."""
    wanted = ["bad.example", "good.example"]
    renewer = AcmeRenewer(config(tmp_path, "http://127.0.0.1:1"), lambda: wanted)
    attempts: list[tuple[str, float]] = []
    start = trio.current_time()

    async def renew(name: str) -> None:
        attempts.append((name, trio.current_time() - start))
        if name == "bad.example":
            raise CertificateError("not today")

    monkeypatch.setattr(renewer, "renew", renew)
    monkeypatch.setattr(renewer, "is_due", lambda name: name not in dict(attempts[1:]))
    with trio.move_on_after(30):
        await renewer.run()
    assert [name for name, _ in attempts] == ["bad.example", "good.example"]
    wanted.append("new.example")
    wanted.remove("bad.example")
    with trio.move_on_after(600):
        await renewer.run()
    assert [name for name, _ in attempts] == ["bad.example", "good.example", "new.example"]


def test_renewal_is_due_at_two_thirds_of_the_lifetime(tmp_path: Path) -> None:
    """Whatever the lifetime: 90 days or 6."""
    leaf = make_self_signed(NAME, 1_800_000_000).leaf
    lifetime = 365 * 86400 + 3600
    assert renewal_unix(leaf) == pytest.approx(1_800_000_000 - 3600 + lifetime * 2 / 3)


def test_a_missing_library_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    """And how to install it."""
    monkeypatch.setitem(sys.modules, "acme.client", None)
    with pytest.raises(CertificateError, match=r"pip install 'underpass\[acme\]'"):
        AcmeRenewer(AcmeConfig(), names)
