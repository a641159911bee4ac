"""ACME against a small authority of our own: RFC 8555's order from account to certificate."""

from __future__ import annotations

import base64
import hashlib
import ipaddress
import json
import ssl
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import trio
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature

from relay import acme as relay_acme
from relay.acme import AcmeRenewer, backoff_seconds, renewal_unix
from relay.acme_files import certificate_path, http_challenge_answer, tls_challenge_path
from relay.certificate_files import CertificateError, covers, load_pair, make_self_signed
from relay.certificates import Certificates
from relay.config import AcmeConfig, TlsConfig
from traversal.keys import NodePublic

pytest.importorskip("acme", reason="the extra 'acme' is not installed")

NAME = "derp.example"
TOKEN = base64.urlsafe_b64encode(b"t" * 16).rstrip(b"=").decode()
Proof = Callable[[str, str], bool]


def decode(text: str) -> bytes:
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))


class FakeAuthority:
    """Enough of RFC 8555 for one order at a time; signatures and nonces are checked.

    `proof(token, key authorization)` is how it looks whether the challenge is answered.
    """

    def __init__(self, proof: Proof, challenge: str) -> None:
        self.proof = proof
        self.challenge = challenge
        self.accounts: dict[str, dict[str, str]] = {}
        self.contacts: list[object] = []
        self.status = "pending"
        self.certificate = b""
        self.nonces: set[str] = set()
        self.issuer = make_self_signed("ca.example", 1_800_000_000)
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def _handler(authority) -> type[BaseHTTPRequestHandler]:  # noqa: N805  # closes over it
        class Handler(BaseHTTPRequestHandler):
            def reply(self, status: int, body: object, **headers: str) -> None:
                data = body if isinstance(body, bytes) else json.dumps(body).encode()
                nonce = base64.urlsafe_b64encode(
                    hashlib.sha256(str(time.time_ns()).encode()).digest()
                )
                authority.nonces.add(nonce.rstrip(b"=").decode())
                self.send_response(status)
                self.send_header("Replay-Nonce", nonce.rstrip(b"=").decode())
                self.send_header("Content-Length", str(len(data)))
                for name, value in {"Content-Type": "application/json", **headers}.items():
                    self.send_header(name.replace("_", "-"), value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(data)

            def do_HEAD(self) -> None:
                self.reply(200, b"")

            def do_GET(self) -> None:
                names = ("newNonce", "newAccount", "newOrder")
                self.reply(200, {name: f"{authority.url}/{name}" for name in names})

            def do_POST(self) -> None:
                length = int(self.headers["Content-Length"])
                account, payload = authority.open_jws(json.loads(self.rfile.read(length)))
                getattr(self, "on_" + self.path[1:])(account, payload)

            def on_newAccount(self, account: str, payload: Any) -> None:  # noqa: N802
                authority.contacts.append(payload.get("contact"))
                location = f"{authority.url}/account/{account}"
                known = account in authority.accounts
                authority.accounts.setdefault(account, {})
                self.reply(200 if known else 201, {"status": "valid"}, Location=location)

            def on_newOrder(self, account: str, payload: Any) -> None:  # noqa: N802
                authority.identifiers = payload["identifiers"]
                authority.status = "pending"
                authority.certificate = b""
                self.on_order(account, payload, 201)

            def on_order(self, account: str, payload: Any, status: int = 200) -> None:
                order = {
                    "status": "valid" if authority.certificate else authority.status,
                    "identifiers": authority.identifiers,
                    "authorizations": [f"{authority.url}/authorization"],
                    "finalize": f"{authority.url}/finalize",
                    "certificate": f"{authority.url}/certificate",
                }
                self.reply(status, order, Location=f"{authority.url}/order")

            def on_authorization(self, account: str, payload: Any) -> None:
                challenge = authority.challenge_object()
                status = {"ready": "valid"}.get(authority.status, authority.status)
                body = {"status": status, "identifier": authority.identifiers[0]}
                self.reply(200, {**body, "challenges": [challenge]})

            def on_challenge(self, account: str, payload: Any) -> None:
                assert payload == {}
                proven = authority.proof(TOKEN, f"{TOKEN}.{account}")
                authority.status = "ready" if proven else "invalid"
                link = f'<{authority.url}/authorization>;rel="up"'
                self.reply(200, authority.challenge_object(), Link=link)

            def on_finalize(self, account: str, payload: Any) -> None:
                assert authority.status == "ready"
                authority.issue(x509.load_der_x509_csr(decode(payload["csr"])))
                self.on_order(account, payload)

            def on_certificate(self, account: str, payload: Any) -> None:
                self.reply(
                    200, authority.certificate, Content_Type="application/pem-certificate-chain"
                )

            def log_message(self, *_: object) -> None:
                pass

        return Handler

    def challenge_object(self) -> dict[str, object]:
        challenge: dict[str, object] = {
            "type": self.challenge,
            "url": f"{self.url}/challenge",
            "token": TOKEN,
            "status": {"ready": "valid"}.get(self.status, self.status),
        }
        if self.status == "invalid":
            problem = "urn:ietf:params:acme:error:unauthorized"
            challenge["error"] = {"type": problem, "detail": "wrong answer at port 80"}
        return challenge

    def open_jws(self, jws: dict[str, str]) -> tuple[str, Any]:
        """The account's thumbprint and the payload, after signature and nonce were checked."""
        header = json.loads(decode(jws["protected"]))
        self.nonces.remove(header["nonce"])
        if "jwk" in header:
            jwk = header["jwk"]
            canonical = json.dumps(
                {name: jwk[name] for name in ("crv", "kty", "x", "y")}, separators=(",", ":")
            )
            account = base64.urlsafe_b64encode(hashlib.sha256(canonical.encode()).digest())
            name = account.rstrip(b"=").decode()
            self.accounts.setdefault("key " + name, jwk)
        else:
            name = header["kid"].rpartition("/")[2]
            assert name in self.accounts
        jwk = self.accounts["key " + name]
        numbers = ec.EllipticCurvePublicNumbers(
            int.from_bytes(decode(jwk["x"]), "big"),
            int.from_bytes(decode(jwk["y"]), "big"),
            ec.SECP256R1(),
        )
        signature = decode(jws["signature"])
        halves = (int.from_bytes(half, "big") for half in (signature[:32], signature[32:]))
        numbers.public_key().verify(
            encode_dss_signature(*halves),
            f"{jws['protected']}.{jws['payload']}".encode(),
            ec.ECDSA(hashes.SHA256()),
        )
        return name, json.loads(decode(jws["payload"]) or b"null")

    def issue(self, csr: x509.CertificateSigningRequest) -> None:
        signer = serialization.load_pem_private_key(self.issuer.key_pem, None)
        assert isinstance(signer, ec.EllipticCurvePrivateKey)
        now = datetime.now(UTC)
        names = csr.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        leaf = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([]))
            .issuer_name(self.issuer.leaf.subject)
            .public_key(csr.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now)
            .not_valid_after(now + timedelta(days=90))
            .add_extension(names, critical=True)
            .sign(signer, hashes.SHA256())
        )
        pem = leaf.public_bytes(serialization.Encoding.PEM)
        self.certificate = pem + self.issuer.chain_pem()


@pytest.fixture
def authority(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Proof, str], FakeAuthority]]:
    """A function that starts an authority; its client's pauses are cut short."""
    monkeypatch.setattr("acme.client.time", SimpleNamespace(sleep=lambda _: None))
    monkeypatch.setattr(relay_acme, "_PUBLISHED_AFTER_SECONDS", 0.0)
    started = []

    def start(proof: Proof, challenge: str) -> FakeAuthority:
        made = FakeAuthority(proof, challenge)
        started.append(made)
        threading.Thread(target=made.server.serve_forever, args=(0.01,), daemon=True).start()
        return made

    yield start
    for made in started:
        made.server.shutdown()
        made.server.server_close()


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
    renewer = AcmeRenewer(config(tmp_path, fake.url), NAME)
    assert renewer.is_due()
    await renewer.renew()
    assert not renewer.is_due()
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
    renewer = AcmeRenewer(config(tmp_path, fake.url), NAME)
    await renewer.renew()
    path = certificate_path(str(tmp_path / "acme"), NAME)
    first = load_pair(path, path, NAME)
    await renewer.renew()
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
    await AcmeRenewer(config(tmp_path, fake.url, "tls-alpn-01"), address).renew()
    assert fake.identifiers == [{"type": "ip", "value": str(ipaddress.ip_address(address))}]
    assert not tls_challenge_path(state).exists()
    assert Certificates(settings, address, NodePublic(b"k" * 32)).status().ready


async def test_a_failed_challenge_says_what_the_authority_saw(
    tmp_path: Path, authority: Callable[[Proof, str], FakeAuthority]
) -> None:
    """And leaves nothing behind."""
    fake = authority(lambda token, expected: False, "http-01")
    renewer = AcmeRenewer(config(tmp_path, fake.url), NAME)
    with pytest.raises(CertificateError, match=r"derp\.example: wrong answer at port 80"):
        await renewer.renew()
    assert renewer.is_due()
    assert not list((tmp_path / "acme" / "http-01").iterdir())


async def test_a_challenge_that_is_not_offered(
    tmp_path: Path, authority: Callable[[Proof, str], FakeAuthority]
) -> None:
    """The operator is told which setting to change."""
    fake = authority(lambda token, expected: True, "dns-01")
    with pytest.raises(CertificateError, match=r"offers dns-01 and not http-01; change tls\.acme"):
        await AcmeRenewer(config(tmp_path, fake.url), NAME).renew()


async def test_an_unreachable_authority(tmp_path: Path) -> None:
    """One error type, with the address in it."""
    with pytest.raises(CertificateError, match=r"no certificate for derp\.example from http://127"):
        await AcmeRenewer(config(tmp_path, "http://127.0.0.1:1"), NAME).renew()


async def test_run_backs_off_and_recovers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    """1, 2, 4 ... minutes after failures; nothing to do while the certificate is young."""
    renewer = AcmeRenewer(config(tmp_path, "http://127.0.0.1:1"), NAME)
    attempts: list[float] = []
    start = trio.current_time()

    async def renew() -> None:
        attempts.append(round(trio.current_time() - start))
        if len(attempts) < 4:
            raise CertificateError("not today")

    monkeypatch.setattr(renewer, "renew", renew)
    monkeypatch.setattr(renewer, "is_due", lambda: len(attempts) < 4)
    with trio.move_on_after(86400):
        await renewer.run()
    assert attempts == [0, 60, 180, 420]
    assert [backoff_seconds(n) for n in (5, 6, 100)] == [960, 1800, 1800]


def test_renewal_is_due_at_two_thirds_of_the_lifetime(tmp_path: Path) -> None:
    """Whatever the lifetime: 90 days or 6."""
    leaf = make_self_signed(NAME, 1_800_000_000).leaf
    lifetime = 365 * 86400 + 3600
    assert renewal_unix(leaf) == pytest.approx(1_800_000_000 - 3600 + lifetime * 2 / 3)


def test_a_missing_library_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    """And how to install it."""
    monkeypatch.setitem(sys.modules, "acme.client", None)
    with pytest.raises(CertificateError, match=r"pip install 'underpass\[acme\]'"):
        AcmeRenewer(AcmeConfig(), NAME)
