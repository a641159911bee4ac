"""Certificates: what a client sees in the handshake, and what happens when files change."""

from __future__ import annotations

import hashlib
import ssl
from pathlib import Path

import pytest
import trio
import trustme
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from hypothesis import given
from hypothesis import strategies as st

from relay.acme_files import certificate_path, http_challenge_answer, tls_challenge_path
from relay.certificate_files import (
    CertificateError,
    certificate_paths,
    covers,
    load_pair,
    make_self_signed,
)
from relay.certificates import Certificates
from relay.config import AcmeConfig, TlsConfig
from traversal.io.tls import TlsEngine, TlsError
from traversal.keys import NodePublic

SERVER_KEY = NodePublic(b"k" * 32)
NAME = "derp.example"


def context_of(certificates: Certificates) -> ssl.SSLContext:
    context = certificates.context_for(b"")
    assert context is not None
    return context


def trusting_nobody_asked() -> ssl.SSLContext:
    client = ssl.create_default_context()
    client.check_hostname = False
    client.verify_mode = ssl.CERT_NONE
    return client


def handshake(
    server: ssl.SSLContext, client: ssl.SSLContext, name: str | None = NAME
) -> tuple[ssl.SSLObject, ssl.SSLObject]:
    """Run a TLS handshake in memory; the client's and the server's end. Raises SSLError."""
    to_client, to_server = ssl.MemoryBIO(), ssl.MemoryBIO()
    client_end = client.wrap_bio(to_client, to_server, server_hostname=name)
    server_end = server.wrap_bio(to_server, to_client, server_side=True)
    failure: ssl.SSLError | None = None
    for _ in range(5):
        for end in (client_end, server_end):
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                pass
            except ssl.SSLError as error:
                # The client tells what it saw; the server's own error is of no use to it.
                if end is client_end:
                    raise
                failure = failure or error
    if failure:
        raise failure
    return client_end, server_end


def chain_of(end: ssl.SSLObject) -> list[bytes]:
    """The DER certificates that were presented (public from Python 3.13 on)."""
    sslobj = end._sslobj  # type: ignore[attr-defined]
    return [cert.public_bytes(2) for cert in sslobj.get_unverified_chain()]


def files_config(directory: Path) -> TlsConfig:
    return TlsConfig(mode="files", directory=str(directory))


def write_pair(directory: Path, authority: trustme.CA, name: str = NAME) -> trustme.LeafCert:
    leaf = authority.issue_cert(name)
    cert_path, key_path = certificate_paths(str(directory), NAME)
    key_path.write_bytes(leaf.private_key_pem.bytes())
    cert_path.write_bytes(b"".join(blob.bytes() for blob in leaf.cert_chain_pems))
    return leaf


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


class TestHandshake:
    def test_chain_is_leaf_intermediates_meta(self, tmp_path: Path) -> None:
        """The meta certificate is always last and holds the relay's key; the chain verifies."""
        root = trustme.CA()
        write_pair(tmp_path, root.create_child_ca())
        certificates = Certificates(files_config(tmp_path), NAME, SERVER_KEY)
        client = ssl.create_default_context()
        root.configure_trust(client)
        client_end, _ = handshake(context_of(certificates), client)
        leaf, intermediate, meta = chain_of(client_end)
        assert covers(x509.load_der_x509_certificate(leaf), NAME)
        assert x509.load_der_x509_certificate(intermediate).extensions
        assert f"derpkey{SERVER_KEY.raw.hex()}".encode() in meta
        assert client_end.version() == "TLSv1.3"

    def test_alpn_is_http_1_1_or_nothing(self) -> None:
        """DERP clients offer none (DERP specification 3.2); h2 is never chosen."""
        context = context_of(Certificates(TlsConfig(directory=""), NAME, SERVER_KEY))
        for offered, chosen in (
            (None, None),
            (["http/1.1"], "http/1.1"),
            (["h2", "http/1.1"], "http/1.1"),
            (["h2"], None),
        ):
            client = trusting_nobody_asked()
            if offered:
                client.set_alpn_protocols(offered)
            assert handshake(context, client)[0].selected_alpn_protocol() == chosen

    def test_tls_1_2_is_the_oldest(self) -> None:
        """And no ticket is sent for a resumption that never happens."""
        context = context_of(Certificates(TlsConfig(directory=""), NAME, SERVER_KEY))
        assert context.minimum_version is ssl.TLSVersion.TLSv1_2
        client = trusting_nobody_asked()
        client.maximum_version = ssl.TLSVersion.TLSv1_2
        assert handshake(context, client)[0].version() == "TLSv1.2"
        assert context.num_tickets == 0

    @pytest.mark.parametrize("asked", [None, "other.example", "derp.example.evil"])
    def test_a_dns_name_must_be_asked_for(self, asked: str | None) -> None:
        """Other names, and none, meet an internal_error alert."""
        context = context_of(Certificates(TlsConfig(directory=""), NAME, SERVER_KEY))
        with pytest.raises(ssl.SSLError, match=r"(?i)internal.error"):
            handshake(context, trusting_nobody_asked(), asked)

    def test_the_reason_says_that_the_name_was_wrong(self) -> None:
        """What an operator reads in the log."""
        context = context_of(Certificates(TlsConfig(directory=""), NAME, SERVER_KEY))
        server = TlsEngine(context, server_side=True)
        client = TlsEngine(trusting_nobody_asked(), server_side=False, server_hostname="b.example")
        assert not client.do_handshake()
        server.receive_data(client.data_to_send())
        with pytest.raises(TlsError, match="one that is not served here"):
            server.do_handshake()

    def test_names_are_compared_without_case(self) -> None:
        """As DNS does."""
        context = context_of(Certificates(TlsConfig(directory=""), "Derp.Example", SERVER_KEY))
        handshake(context, trusting_nobody_asked(), "dERP.example")

    @pytest.mark.parametrize("address", ["127.0.0.1", "2001:db8::1"])
    def test_an_ip_address_is_served_without_sni(self, address: str) -> None:
        """Clients never put an address into SNI."""
        certificates = Certificates(TlsConfig(directory=""), address, SERVER_KEY)
        client_end, _ = handshake(context_of(certificates), trusting_nobody_asked(), None)
        leaf, meta = chain_of(client_end)
        assert certificates.status().pin == f"sha256-raw:{hashlib.sha256(leaf).hexdigest()}"
        assert b"derpkey" in meta


class TestSelfSigned:
    def test_is_derpers_kind(self) -> None:
        """DERP specification 12."""
        leaf = make_self_signed("198.51.100.7", 1_800_000_000).leaf
        assert isinstance(leaf.public_key(), ec.EllipticCurvePublicKey)
        assert leaf.subject.rfc4514_string() == "CN=198.51.100.7"
        assert leaf.extensions.get_extension_for_class(x509.BasicConstraints).value.ca is False
        assert covers(leaf, "198.51.100.7")
        assert not covers(leaf, "198.51.100.8")
        assert leaf.not_valid_after_utc.timestamp() == 1_800_000_000 + 365 * 86400

    def test_is_made_once_and_private(self, tmp_path: Path) -> None:
        """The pin in the clients' maps survives a restart."""
        config = TlsConfig(directory=str(tmp_path / "new"))
        pins = {Certificates(config, "2001:db8::1", SERVER_KEY).status().pin for _ in range(2)}
        assert len(pins) == 1
        files = sorted((tmp_path / "new").iterdir())
        assert [path.name for path in files] == ["2001db81.crt", "2001db81.key"]
        assert all(path.stat().st_mode & 0o777 == 0o600 for path in files)

    def test_a_long_name_is_fine(self) -> None:
        """The common name is left out, the subjectAltName counts."""
        name = "a" * 40 + "." + "b" * 40 + ".example"
        assert covers(make_self_signed(name, 0).leaf, name)

    @pytest.mark.parametrize("name", ["", "two words", "a..b", "ümlaut.example"])
    def test_nonsense_is_refused(self, name: str) -> None:
        """With the one error."""
        with pytest.raises(CertificateError, match="neither"):
            make_self_signed(name, 0)


class TestFiles:
    def test_wildcards_cover_one_label(self) -> None:
        """RFC 6125."""
        leaf = make_self_signed("*.example", 0).leaf
        assert covers(leaf, "derp.example")
        assert not covers(leaf, "a.derp.example")
        assert not covers(leaf, "example")

    def test_every_mistake_names_the_file(self, tmp_path: Path, authority: trustme.CA) -> None:
        """Absent, no PEM, wrong key, wrong name, encrypted key."""
        cert_path, key_path = certificate_paths(str(tmp_path), NAME)

        def problem() -> str:
            with pytest.raises(CertificateError) as caught:
                load_pair(cert_path, key_path, NAME)
            return str(caught.value)

        assert f"{cert_path}: the certificate file can't be read" in problem()
        write_pair(tmp_path, authority, "other.example")
        assert f"{cert_path}: the certificate is not valid for {NAME}" in problem()
        write_pair(tmp_path, authority)
        key_path.write_bytes(authority.issue_cert(NAME).private_key_pem.bytes())
        assert f"{key_path}: the key does not belong to" in problem()
        key = rsa.generate_private_key(65537, 2048)
        encrypted = key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"x"),
        )
        key_path.write_bytes(encrypted)
        assert "is encrypted; store it in the clear" in problem()
        key_path.write_text("nothing")
        assert f"{key_path}: no usable private key" in problem()
        cert_path.write_text("nothing")
        assert f"{cert_path}: no usable certificate" in problem()

    def test_a_good_change_counts_for_new_connections(
        self, tmp_path: Path, authority: trustme.CA
    ) -> None:
        """A connection under way keeps its certificate and goes on."""
        write_pair(tmp_path, authority)
        certificates = Certificates(files_config(tmp_path), NAME, SERVER_KEY)
        client_end, server_end = handshake(context_of(certificates), trusting_nobody_asked())
        before = chain_of(client_end)[0]
        write_pair(tmp_path, authority)
        certificates.reload()
        other_end, _ = handshake(context_of(certificates), trusting_nobody_asked())
        assert chain_of(other_end)[0] != before
        server_end.write(b"still here")
        assert client_end.getpeercert(binary_form=True) == before

    def test_a_bad_change_keeps_the_old(
        self, tmp_path: Path, authority: trustme.CA, caplog: pytest.LogCaptureFixture
    ) -> None:
        """It is logged and counted."""
        write_pair(tmp_path, authority)
        certificates = Certificates(files_config(tmp_path), NAME, SERVER_KEY)
        context = context_of(certificates)
        certificate_paths(str(tmp_path), NAME)[0].write_text("oops")
        certificates.reload()
        assert context_of(certificates) is context
        assert certificates.status().load_failures == 1
        assert "the old certificate stays in use" in caplog.text

    async def test_changes_are_noticed(
        self, tmp_path: Path, authority: trustme.CA, autojump_clock: trio.testing.MockClock
    ) -> None:
        """Within a second, without a signal."""
        write_pair(tmp_path, authority)
        certificates = Certificates(files_config(tmp_path), NAME, SERVER_KEY)
        before = context_of(certificates)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(certificates.run)
            write_pair(tmp_path, authority)
            await trio.sleep(1)
            assert context_of(certificates) is not before
            nursery.cancel_scope.cancel()

    async def test_the_meta_certificate_never_grows_old(
        self, autojump_clock: trio.testing.MockClock
    ) -> None:
        """After 100 days of uptime it is still far from its end."""
        now = 1_800_000_000.0
        certificates = Certificates(
            TlsConfig(directory=""), NAME, SERVER_KEY, unix_clock=lambda: now
        )
        async with trio.open_nursery() as nursery:
            nursery.start_soon(certificates.run)
            for _ in range(10):
                now += 10 * 86400
                await trio.sleep(1)
            client_end, _ = handshake(context_of(certificates), trusting_nobody_asked())
            nursery.cancel_scope.cancel()
        meta = x509.load_der_x509_certificate(chain_of(client_end)[-1])
        assert meta.not_valid_after_utc.timestamp() > now + 14 * 86400


def client_hello(alpn: str | None) -> bytes:
    client = trusting_nobody_asked()
    if alpn:
        client.set_alpn_protocols([alpn])
    out = ssl.MemoryBIO()
    with pytest.raises(ssl.SSLWantReadError):
        client.wrap_bio(ssl.MemoryBIO(), out, server_hostname=NAME).do_handshake()
    return out.read()


class TestAcme:
    def acme_config(self, directory: Path) -> TlsConfig:
        return TlsConfig(mode="acme", acme=AcmeConfig(state_directory=str(directory)))

    def test_waits_for_the_first_certificate(self, tmp_path: Path, authority: trustme.CA) -> None:
        """Until then not ready, but every listener can already be open."""
        certificates = Certificates(self.acme_config(tmp_path), NAME, SERVER_KEY)
        assert not certificates.status().ready
        handshake(context_of(certificates), trusting_nobody_asked())
        leaf = authority.issue_cert(NAME)
        certificate_path(str(tmp_path), NAME).write_bytes(
            leaf.private_key_and_cert_chain_pem.bytes()
        )
        certificates.reload()
        assert certificates.status().ready
        client_end, _ = handshake(context_of(certificates), trusting_nobody_asked())
        assert chain_of(client_end)[0] == ssl.PEM_cert_to_DER_cert(
            leaf.cert_chain_pems[0].bytes().decode()
        )

    def test_only_the_authority_sees_the_challenge(
        self, tmp_path: Path, authority: trustme.CA
    ) -> None:
        """Everybody else gets the ordinary certificate meanwhile (RFC 8737)."""
        tls_challenge_path(str(tmp_path)).write_bytes(
            authority.issue_cert(NAME).private_key_and_cert_chain_pem.bytes()
        )
        certificates = Certificates(self.acme_config(tmp_path), NAME, SERVER_KEY)
        ordinary = client_hello("http/1.1")
        validation = client_hello("acme-tls/1")
        for hello in (ordinary, validation):
            assert all(
                certificates.context_for(hello[:length]) is None for length in range(len(hello))
            )
        challenge = certificates.context_for(validation)
        assert challenge is not None
        assert certificates.context_for(ordinary) is certificates.context_for(b"GET / HTTP/1.1")
        assert certificates.context_for(ordinary) is not challenge
        client = trusting_nobody_asked()
        client.set_alpn_protocols(["acme-tls/1"])
        assert handshake(challenge, client)[0].selected_alpn_protocol() == "acme-tls/1"

    def test_a_broken_challenge_is_ignored(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        """The relay's own clients come first."""
        tls_challenge_path(str(tmp_path)).write_text("oops")
        certificates = Certificates(self.acme_config(tmp_path), NAME, SERVER_KEY)
        assert certificates.context_for(b"") is not None
        assert "not a usable challenge" in caplog.text

    @given(st.text() | st.text().map("/.well-known/acme-challenge/{}".format))
    def test_http_answers_only_for_tokens(
        self, tmp_path_factory: pytest.TempPathFactory, target: str
    ) -> None:
        """No target leads out of the directory."""
        assert http_challenge_answer(str(tmp_path_factory.getbasetemp()), target) is None

    def test_http_answer(self, tmp_path: Path) -> None:
        """What the file holds, and nothing for its neighbors."""
        (tmp_path / "http-01").mkdir()
        (tmp_path / "http-01" / ("t" * 22)).write_bytes(b"answer")
        prefix = "/.well-known/acme-challenge/"
        assert http_challenge_answer(str(tmp_path), prefix + "t" * 22) == b"answer"
        (tmp_path / "account.pem").write_text("secret")
        assert http_challenge_answer(str(tmp_path), prefix + "../account.pem") is None
