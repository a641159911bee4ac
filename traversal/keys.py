"""Node, disco and mesh keys: generate, parse, print, compare, and the NaCl box between two of them.

Text forms (DERP specification 2.1, disco specification 2.1):

* `privkey:` + 64 hex   node private key (also a relay server's own key)
* `nodekey:` + 64 hex   node public key; untyped: 64 hex
* `discokey:` + 64 hex  disco public key; a disco private key has no text form on purpose
* 64 hex                mesh key

Readers accept both cases of hex; everything is written in lower case. No `repr` or `str` of a
private or mesh key shows the secret; `reveal()` is the one way to get it as text.

Randomness is an argument (`entropy`, a function like `os.urandom`), so that a simulated node can
have the same keys every time.
"""

from __future__ import annotations

import base64
import hmac
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, Final, Self

import nacl.bindings
import nacl.exceptions

KEY_LENGTH: Final = 32
NONCE_LENGTH: Final = 24
BOX_TAG_LENGTH: Final = 16
BOX_OVERHEAD: Final = NONCE_LENGTH + BOX_TAG_LENGTH

Entropy = Callable[[int], bytes]
"""A source of random bytes: `entropy(n)` returns n of them."""


class KeyFormatError(ValueError):
    """A key's text or bytes are not what its type demands. The text never holds the key."""


class BoxError(ValueError):
    """A sealed message does not open: it is too short, forged, or meant for other keys."""


def _raw_from_text(text: str, prefix: str, what: str) -> bytes:
    if not text.startswith(prefix):
        raise KeyFormatError(f"a {what} starts with {prefix!r}")
    digits = text[len(prefix) :]
    where = f" after {prefix!r}" if prefix else ""
    if len(digits) != 2 * KEY_LENGTH:
        raise KeyFormatError(f"a {what} has 64 hex digits{where}, this has {len(digits)}")
    try:
        return bytes.fromhex(digits)
    except ValueError:
        raise KeyFormatError(f"a {what} has only hex digits{where}") from None


def _check_raw(raw: bytes, what: str) -> None:
    if len(raw) != KEY_LENGTH:
        raise KeyFormatError(f"a {what} has 32 bytes, not {len(raw)}")


def _clamp(raw: bytes) -> bytes:
    return bytes([raw[0] & 248]) + raw[1:31] + bytes([(raw[31] & 127) | 64])


@dataclass(frozen=True, slots=True, order=True)
class _PublicKey:
    """Thirty-two public bytes. Ordered as bytes, hashable, falsy when all zero ("absent")."""

    raw: bytes
    prefix: ClassVar[str]

    def __post_init__(self) -> None:
        _check_raw(self.raw, type(self).__name__)

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read the text form. Raises KeyFormatError."""
        return cls(_raw_from_text(text, cls.prefix, cls.prefix.rstrip(":")))

    @classmethod
    def from_hex(cls, text: str) -> Self:
        """Read 64 hex digits without a prefix. Raises KeyFormatError."""
        return cls(_raw_from_text(text, "", cls.prefix.rstrip(":")))

    def __str__(self) -> str:
        return self.prefix + self.raw.hex()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.short()}>"

    def __bool__(self) -> bool:
        return any(self.raw)

    def short(self) -> str:
        """The conventional short form for logs: `[` + 5 characters of base64 + `]`."""
        return f"[{base64.b64encode(self.raw)[:5].decode()}]"


@dataclass(frozen=True, slots=True, order=True, repr=False)
class NodePublic(_PublicKey):
    """A node's public key: its address on a relay, and its WireGuard key."""

    prefix = "nodekey:"


@dataclass(frozen=True, slots=True, order=True, repr=False)
class DiscoPublic(_PublicKey):
    """A node's public key for disco messages only."""

    prefix = "discokey:"

    def short(self) -> str:
        """The conventional short form for logs: `d:` + 8 bytes in hex."""
        return "d:" + self.raw[:8].hex()


@dataclass(frozen=True, slots=True)
class _PrivateKey:
    raw: bytes = field(repr=False)

    def __post_init__(self) -> None:
        _check_raw(self.raw, type(self).__name__)

    @classmethod
    def generate(cls, entropy: Entropy) -> Self:
        """A new, clamped key from 32 bytes of `entropy` (`os.urandom` in production)."""
        return cls(_clamp(entropy(KEY_LENGTH)))

    def _public_raw(self) -> bytes:
        return nacl.bindings.crypto_scalarmult_base(self.raw)

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and hmac.compare_digest(self.raw, other.raw)

    def __hash__(self) -> int:
        return hash((type(self), self.raw))


@dataclass(frozen=True, slots=True, eq=False)
class NodePrivate(_PrivateKey):
    """A node's private key; a relay server's own key is one too."""

    prefix: ClassVar[str] = "privkey:"

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read `privkey:` + 64 hex. Raises KeyFormatError."""
        return cls(_raw_from_text(text, cls.prefix, "privkey"))

    def public(self) -> NodePublic:
        """The public half."""
        return NodePublic(self._public_raw())

    def reveal(self) -> str:
        """The text form, secret included."""
        return self.prefix + self.raw.hex()


@dataclass(frozen=True, slots=True, eq=False)
class DiscoPrivate(_PrivateKey):
    """A node's private key for disco messages; made anew at each start, never written down."""

    def public(self) -> DiscoPublic:
        """The public half."""
        return DiscoPublic(self._public_raw())


@dataclass(frozen=True, slots=True, eq=False)
class MeshKey(_PrivateKey):
    """The secret that relays of one region share. Compared in constant time."""

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read 64 hex digits, white space around them allowed. Raises KeyFormatError."""
        return cls(_raw_from_text(text.strip(), "", "mesh key"))

    def reveal(self) -> str:
        """The text form, secret included."""
        return self.raw.hex()


class Box:
    """NaCl `crypto_box` between one private and one public key, shared key computed once.

    A sealed message is `nonce (24) || tag (16) || ciphertext`.

    Raises KeyFormatError when made with a key that no honest peer has (zero or of low order).
    """

    __slots__ = ("_shared",)

    def __init__(self, private: NodePrivate | DiscoPrivate, public: _PublicKey) -> None:
        if not public:
            raise KeyFormatError("the all-zero public key means that there is no key")
        try:
            self._shared = nacl.bindings.crypto_box_beforenm(public.raw, private.raw)
        except (nacl.exceptions.CryptoError, RuntimeError):
            raise KeyFormatError("this public key is of low order; no honest peer has it") from None

    def seal(self, plaintext: bytes, nonce: bytes) -> bytes:
        """Seal under a nonce of 24 random bytes that was never used before."""
        return nonce + nacl.bindings.crypto_box_easy_afternm(plaintext, nonce, self._shared)

    def open(self, sealed: bytes) -> bytes:
        """The plaintext of what the other side sealed. Raises BoxError."""
        if len(sealed) < BOX_OVERHEAD:
            raise BoxError(f"a sealed message has at least 40 bytes, this has {len(sealed)}")
        try:
            return nacl.bindings.crypto_box_open_easy_afternm(
                sealed[NONCE_LENGTH:], sealed[:NONCE_LENGTH], self._shared
            )
        except nacl.exceptions.CryptoError:
            raise BoxError("the sealed message does not open with these keys") from None
