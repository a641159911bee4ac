"""An ACME authority on loopback: enough of RFC 8555 for the tests."""

from __future__ import annotations

import base64
import hashlib
import json
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature

from relay.certificate_files import make_self_signed

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
