"""Scoped tokens: tickets that a relay's operator signs for one node key.

A client presents its token in the upgrade request: `Authorization: Bearer <token>`. Text form:

    upt1.<payload>.<signature>

`payload` is JSON in unpadded base64url, `signature` (Ed25519, base64url too) covers everything
in front of the second dot, version included. The payload's members:

    id       1 to 64 characters of A-Z a-z 0-9 . _ -; what a revocation names
    key      "nodekey:<64 hex>": the only key that may use the token
    expires  Unix time in seconds; from that second on the token is worthless
    rate     bytes per second, optional
    burst    bytes, optional
    peers    list of "nodekey:<64 hex>", 64 at most, optional: whom the client may exchange
             packets with; without it, everybody

Unknown members are an error: a restriction that an old relay doesn't know must not be ignored.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Final, Self

import msgspec
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from traversal.keys import Entropy, KeyFormatError, NodePublic

_VERSION: Final = "upt1"
_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")

MAX_PEERS: Final = 64
# 64 peers take 5 KiB, and the request's whole header block is bounded at 16 KiB.
MAX_TOKEN_LENGTH: Final = 8192
# Above any link; keeps sums of rates far from overflow in every consumer.
_MAX_RATE: Final = 1 << 50


class TokenError(ValueError):
    """A token, or a file about tokens, is no good. The text says why and holds no token."""


class _Payload(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    id: str
    key: str
    expires: int
    rate: int | None = None
    burst: int | None = None
    peers: list[str] | None = None


@dataclass(frozen=True, slots=True)
class Claims:
    """What a token grants. Rate in bytes per second, burst in bytes; None: the relay's default."""

    id: str
    key: NodePublic
    expires_unix: int
    rate_bytes_per_second: int | None = None
    burst_bytes: int | None = None
    peers: frozenset[NodePublic] | None = None

    def __post_init__(self) -> None:
        parse_token_id(self.id)
        if not self.key:
            raise TokenError("a token's key is all zero")
        for value in (self.rate_bytes_per_second, self.burst_bytes):
            if value is not None and not 1 <= value <= _MAX_RATE:
                raise TokenError("a token's rate and burst are above zero")
        if self.peers is not None and len(self.peers) > MAX_PEERS:
            raise TokenError(f"a token names at most {MAX_PEERS} peers")


@dataclass(frozen=True, slots=True)
class TokenKey:
    """The public half of an operator's signing key. Text form: `tokenkey:` + 64 hex."""

    raw: bytes

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read the text form. Raises TokenError."""
        return cls(_raw_key(text, "tokenkey:"))

    def __str__(self) -> str:
        return "tokenkey:" + self.raw.hex()


@dataclass(frozen=True, slots=True)
class TokenSigner:
    """An operator's signing key. Text form: `tokensecret:` + 64 hex; `reveal()` alone shows it."""

    raw: bytes = field(repr=False)

    @classmethod
    def generate(cls, entropy: Entropy) -> Self:
        """A new key from 32 bytes of `entropy`."""
        return cls(entropy(32))

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read the text form. Raises TokenError, whose text never holds the key."""
        return cls(_raw_key(text, "tokensecret:"))

    def reveal(self) -> str:
        """The text form, secret included."""
        return "tokensecret:" + self.raw.hex()

    def public(self) -> TokenKey:
        """What the relay needs to know."""
        private = Ed25519PrivateKey.from_private_bytes(self.raw)
        return TokenKey(private.public_key().public_bytes_raw())

    def issue(self, claims: Claims) -> str:
        """The token for some claims. The same claims give the same token."""
        peers = claims.peers
        payload = _Payload(
            claims.id,
            str(claims.key),
            claims.expires_unix,
            claims.rate_bytes_per_second,
            claims.burst_bytes,
            None if peers is None else sorted(map(str, peers)),
        )
        signed = f"{_VERSION}.{_encode(msgspec.json.encode(payload))}"
        signature = Ed25519PrivateKey.from_private_bytes(self.raw).sign(signed.encode())
        return f"{signed}.{_encode(signature)}"


@dataclass(frozen=True, slots=True)
class Token:
    """A genuine token, and who signed it."""

    claims: Claims
    signed_by: TokenKey

    def problem(
        self, keys: Collection[TokenKey], *, unix_time: float, revoked: Collection[str]
    ) -> str | None:
        """Why it does not count, or counts no longer, if so."""
        claims = self.claims
        if unix_time >= claims.expires_unix:
            return f"token {claims.id} has expired"
        if claims.id in revoked:
            return f"token {claims.id} was revoked"
        if self.signed_by not in keys:
            return f"token {claims.id} is signed by a key that no longer counts"
        return None


def parse_token_id(text: str) -> str:
    """A token's id, as a revocation file names it. Raises TokenError."""
    if not _ID.fullmatch(text):
        raise TokenError("a token's id is 1 to 64 characters of A-Z a-z 0-9 . _ -")
    return text


def open_token(text: str, keys: Collection[TokenKey]) -> Token:
    """A token that one of `keys` signed. Raises TokenError.

    The signature is all that was checked: ask `Token.problem` whether it counts now, and compare
    its bearer with `claims.key`.
    """
    if len(text) > MAX_TOKEN_LENGTH or not text.isascii():
        raise TokenError(f"a token is ASCII and at most {MAX_TOKEN_LENGTH} characters long")
    signed, _, signature = text.rpartition(".")
    version, _, payload = signed.partition(".")
    if version != _VERSION:
        raise TokenError('the token does not start with "upt1."')
    # Signature first: nothing of what a stranger wrote is read.
    raw_signature, raw_payload = _decode(signature), _decode(payload)
    signers = (key for key in keys if _is_signed(key, signed.encode(), raw_signature))
    signed_by = next(signers, None)
    if signed_by is None:
        raise TokenError("the token is not signed by any of this relay's token keys")
    try:
        content = msgspec.json.decode(raw_payload, type=_Payload)
        claims = Claims(
            content.id,
            NodePublic.parse(content.key),
            content.expires,
            content.rate,
            content.burst,
            None if content.peers is None else frozenset(map(NodePublic.parse, content.peers)),
        )
    except (msgspec.DecodeError, UnicodeDecodeError, KeyFormatError) as error:
        raise TokenError(f"the token is signed but malformed: {error}") from None
    return Token(claims, signed_by)


def _is_signed(key: TokenKey, data: bytes, signature: bytes) -> bool:
    try:
        Ed25519PublicKey.from_public_bytes(key.raw).verify(signature, data)
    except InvalidSignature:
        return False
    return True


def _encode(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def _decode(text: str) -> bytes:
    try:
        data = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
    except (binascii.Error, ValueError):
        data = b""
    # The decoder skips foreign characters; one token must have one text only.
    if not data or _encode(data) != text:
        raise TokenError("the token is not base64url")
    return data


def _raw_key(text: str, prefix: str) -> bytes:
    digits = text.strip().removeprefix(prefix)
    if not text.strip().startswith(prefix) or not re.fullmatch("[0-9a-fA-F]{64}", digits):
        raise TokenError(f"expected {prefix}<64 hex digits>")
    return bytes.fromhex(digits)
