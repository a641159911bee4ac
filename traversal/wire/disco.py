"""Disco: the messages by which two nodes find a path, and the envelope they travel in.

Envelope (disco specification 3):

* 0   6 bytes  magic `54 53 f0 9f 92 ac`
* 6   32       sender's disco public key, clear
* 38  24       nonce
* 62  16       tag
* 78  n >= 2   sealed message: type (1), version (1, always sent as 0), body

Bodies (disco specification 5; offsets from the start of the plaintext, integers big-endian,
`address` is 18 bytes, see `traversal.wire.address`):

* 1 Ping              2 transaction ID (12), 14 node key (32, optional), 46 padding
* 2 Pong              2 transaction ID (12), 14 source address
* 3 CallMeMaybe       2 addresses
* 4 Bind, 5 Challenge, 6 Answer
                      2 VNI (4), 6 generation (4), 10 remote disco key (32), 42 challenge (32)
* 7 CallMeMaybeVia    2 relay endpoint
* 8 AllocateRequest   2 two disco keys (64), 66 generation (4)
* 9 AllocateResponse  2 generation (4), 6 relay endpoint

Relay endpoint: 0 server's disco key (32), 32 two clients' disco keys (64), 96 Lamport ID (8),
104 VNI (4), 108 bind lifetime in ns (8), 116 steady-state lifetime in ns (8), 124 addresses (>= 1).

Trailing bytes are tolerated where the format has room for them (Pong, Bind, AllocateRequest and so
on), short ones never. All-zero keys are refused everywhere: some releases end when they meet one
(disco specification 9.4).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import ClassVar, Final

from traversal.keys import Box, BoxError, DiscoPublic, NodePublic
from traversal.wire.address import ADDRESS_LENGTH, Address, encode_address, parse_address

MAGIC: Final = b"TS\xf0\x9f\x92\xac"
TRANSACTION_ID_LENGTH: Final = 12
ENVELOPE_OVERHEAD: Final = 78
MIN_ENVELOPE_LENGTH: Final = 80
PING_LENGTH: Final = 124
"""UDP payload of an unpadded Ping with a node key; padding is added on top of it."""

RELAY_REGION_HOST: Final = "127.3.3.40"
"""The fictitious host that stands for "by relay"; its port is the region ID."""

MAX_RELAY_ADDRESSES: Final = 32
"""Addresses kept of one relay endpoint. A server has a few interfaces of two families and some
static addresses; every one of them costs us a Bind, so a longer list is cut, not refused."""

_MAX_VNI: Final = (1 << 24) - 1
_RELAY_ENDPOINT_FIXED: Final = struct.Struct(">32s32s32sQIQQ")
_BIND: Final = struct.Struct(">II32s32s")


class DiscoError(ValueError):
    """A datagram is not a disco message that this node can use. Drop it; count it."""


def _disco_key(raw: bytes) -> DiscoPublic:
    key = DiscoPublic(raw)
    if not key:
        raise DiscoError("a disco message names an all-zero key")
    return key


def _check_vni(vni: int) -> None:
    if not 0 < vni <= _MAX_VNI:
        raise DiscoError(f"VNI {vni} is not between 1 and {_MAX_VNI}")


def _check_generation(generation: int) -> None:
    if generation == 0:
        raise DiscoError("generation 0 means that no handshake is in progress")


@dataclass(frozen=True, slots=True)
class Ping:
    """Asks whether a path works. A padded one also asks how large a datagram fits."""

    transaction_id: bytes
    node_key: NodePublic | None
    padding_bytes: int = 0
    type: ClassVar[int] = 1

    def encode(self) -> bytes:
        """The plaintext. Raises DiscoError for a padded Ping without a node key, since its
        padding would be read as one."""
        if self.node_key is None:
            if self.padding_bytes:
                raise DiscoError("a Ping without a node key cannot be padded")
            return b"\x01\x00" + self.transaction_id
        return b"\x01\x00" + self.transaction_id + self.node_key.raw + bytes(self.padding_bytes)

    @classmethod
    def parse_body(cls, body: bytes) -> Ping:
        """Read the body. Raises DiscoError."""
        if len(body) < TRANSACTION_ID_LENGTH:
            raise DiscoError(f"a Ping has at least 12 bytes, this has {len(body)}")
        transaction_id, rest = body[:TRANSACTION_ID_LENGTH], body[TRANSACTION_ID_LENGTH:]
        if len(rest) < 32:
            return cls(transaction_id, None, len(rest))
        node_key = NodePublic(rest[:32])
        if not node_key:
            raise DiscoError("a Ping carries an all-zero node key")
        return cls(transaction_id, node_key, len(rest) - 32)


@dataclass(frozen=True, slots=True)
class Pong:
    """Answers a Ping and tells where it seemed to come from."""

    transaction_id: bytes
    source: Address
    type: ClassVar[int] = 2

    def encode(self) -> bytes:
        """The plaintext."""
        return b"\x02\x00" + self.transaction_id + encode_address(self.source)

    @classmethod
    def parse_body(cls, body: bytes) -> Pong:
        """Read the body; trailing bytes are tolerated. Raises DiscoError."""
        if len(body) < 30:
            raise DiscoError(f"a Pong has at least 30 bytes, this has {len(body)}")
        return cls(body[:12], parse_address(body[12:30]))


@dataclass(frozen=True, slots=True)
class CallMeMaybe:
    """The sender's own addresses, best first; by relay only. Asks the receiver to ping them all.

    Parsing takes a list of any length: the format has no cap and stock nodes accept any. How many
    of them are *pinged* is bounded where candidates are kept (`traversal.paths.candidates`).
    """

    addresses: tuple[Address, ...]
    type: ClassVar[int] = 3

    def encode(self) -> bytes:
        """The plaintext. Raises DiscoError for an empty list, which would erase what the
        receiver knows about us."""
        if not self.addresses:
            raise DiscoError("an empty CallMeMaybe must never be sent")
        return b"\x03\x00" + b"".join(map(encode_address, self.addresses))

    @classmethod
    def parse_body(cls, body: bytes, version: int = 0) -> CallMeMaybe:
        """Read the body. Never fails: what is empty, misaligned or of another version means an
        empty list, as it does to stock nodes."""
        if version != 0 or len(body) % ADDRESS_LENGTH:
            return cls(())
        return cls(_parse_addresses(body, None))


def _parse_addresses(data: bytes, cap: int | None) -> tuple[Address, ...]:
    end = len(data) if cap is None else min(len(data), cap * ADDRESS_LENGTH)
    return tuple(
        parse_address(data[start : start + ADDRESS_LENGTH])
        for start in range(0, end, ADDRESS_LENGTH)
    )


@dataclass(frozen=True, slots=True)
class _RelayHandshake:
    vni: int
    generation: int
    remote_key: DiscoPublic
    challenge: bytes
    type: ClassVar[int]

    def encode(self) -> bytes:
        """The plaintext."""
        head = bytes([self.type, 0])
        return head + _BIND.pack(self.vni, self.generation, self.remote_key.raw, self.challenge)

    @classmethod
    def parse_body(cls, body: bytes) -> _RelayHandshake:
        """Read the body; trailing bytes are tolerated. Raises DiscoError."""
        if len(body) < _BIND.size:
            raise DiscoError(f"a relay handshake has {_BIND.size} bytes, this has {len(body)}")
        vni, generation, remote_key, challenge = _BIND.unpack_from(body)
        _check_vni(vni)
        _check_generation(generation)
        return cls(vni, generation, _disco_key(remote_key), challenge)


class Bind(_RelayHandshake):
    """Client to relay server: bind my source address to this VNI. The challenge is all zero."""

    __slots__ = ()
    type = 4


class Challenge(_RelayHandshake):
    """Relay server to client: prove that you receive at that address."""

    __slots__ = ()
    type = 5


class Answer(_RelayHandshake):
    """Client to relay server: the challenge, echoed."""

    __slots__ = ()
    type = 6


def sorted_pair(one: DiscoPublic, other: DiscoPublic) -> tuple[DiscoPublic, DiscoPublic]:
    """The order in which an unordered pair of clients is written (disco specification 2.3)."""
    return (one, other) if one < other else (other, one)


@dataclass(frozen=True, slots=True)
class RelayEndpoint:
    """A place on a UDP peer relay where two clients may meet (disco specification 5.5)."""

    server_key: DiscoPublic
    clients: tuple[DiscoPublic, DiscoPublic]
    lamport_id: int
    vni: int
    bind_lifetime_nanoseconds: int
    steady_state_lifetime_nanoseconds: int
    addresses: tuple[Address, ...]

    def encode(self) -> bytes:
        """The bytes inside CallMeMaybeVia and AllocateResponse."""
        return _RELAY_ENDPOINT_FIXED.pack(
            self.server_key.raw,
            self.clients[0].raw,
            self.clients[1].raw,
            self.lamport_id,
            self.vni,
            self.bind_lifetime_nanoseconds,
            self.steady_state_lifetime_nanoseconds,
        ) + b"".join(map(encode_address, self.addresses))

    @classmethod
    def parse(cls, data: bytes) -> RelayEndpoint:
        """Read all of `data`. Raises DiscoError."""
        fixed = _RELAY_ENDPOINT_FIXED.size
        tail = data[fixed:]
        if not tail or len(tail) % ADDRESS_LENGTH:
            raise DiscoError(f"a relay endpoint has {fixed} bytes and then addresses of 18 each")
        server, one, other, lamport_id, vni, bind, steady = _RELAY_ENDPOINT_FIXED.unpack_from(data)
        _check_vni(vni)
        clients = sorted_pair(_disco_key(one), _disco_key(other))
        addresses = _parse_addresses(tail, MAX_RELAY_ADDRESSES)
        return cls(_disco_key(server), clients, lamport_id, vni, bind, steady, addresses)


@dataclass(frozen=True, slots=True)
class CallMeMaybeVia:
    """Invites the receiver to meet at a relay endpoint; by relay (DERP) only."""

    endpoint: RelayEndpoint
    type: ClassVar[int] = 7

    def encode(self) -> bytes:
        """The plaintext."""
        return b"\x07\x00" + self.endpoint.encode()

    @classmethod
    def parse_body(cls, body: bytes) -> CallMeMaybeVia:
        """Read the body. Raises DiscoError."""
        return cls(RelayEndpoint.parse(body))


@dataclass(frozen=True, slots=True)
class AllocateRequest:
    """Asks a relay node for an endpoint where the two clients may meet."""

    clients: tuple[DiscoPublic, DiscoPublic]
    generation: int
    type: ClassVar[int] = 8

    def encode(self) -> bytes:
        """The plaintext."""
        one, other = self.clients
        return b"\x08\x00" + one.raw + other.raw + self.generation.to_bytes(4, "big")

    @classmethod
    def parse_body(cls, body: bytes) -> AllocateRequest:
        """Read the body; trailing bytes are tolerated. Raises DiscoError."""
        if len(body) < 68:
            raise DiscoError(f"an AllocateRequest has 68 bytes, this has {len(body)}")
        generation = int.from_bytes(body[64:68], "big")
        _check_generation(generation)
        clients = sorted_pair(_disco_key(body[:32]), _disco_key(body[32:64]))
        return cls(clients, generation)


@dataclass(frozen=True, slots=True)
class AllocateResponse:
    """A relay node's answer to AllocateRequest."""

    generation: int
    endpoint: RelayEndpoint
    type: ClassVar[int] = 9

    def encode(self) -> bytes:
        """The plaintext."""
        return b"\x09\x00" + self.generation.to_bytes(4, "big") + self.endpoint.encode()

    @classmethod
    def parse_body(cls, body: bytes) -> AllocateResponse:
        """Read the body. Raises DiscoError."""
        generation = int.from_bytes(body[:4], "big")
        _check_generation(generation)
        return cls(generation, RelayEndpoint.parse(body[4:]))


Message = (
    Ping
    | Pong
    | CallMeMaybe
    | Bind
    | Challenge
    | Answer
    | CallMeMaybeVia
    | AllocateRequest
    | AllocateResponse
)

_IGNORES_VERSION: Final = {kind.type: kind for kind in (Ping, Pong, Bind, Challenge, Answer)}
_NEEDS_VERSION_0: Final = {
    kind.type: kind for kind in (CallMeMaybeVia, AllocateRequest, AllocateResponse)
}


def parse_message(plaintext: bytes) -> Message:
    """Read what an envelope held. Raises DiscoError.

    A version other than 0 is ignored for types 1, 2 and 4 to 6, means an empty list for type 3, and
    is refused for types 7 to 9, where stock nodes produce a message of zeros.
    """
    if len(plaintext) < 2:
        raise DiscoError("a disco message has at least a type and a version")
    number, version, body = plaintext[0], plaintext[1], plaintext[2:]
    if number == CallMeMaybe.type:
        return CallMeMaybe.parse_body(body, version)
    kind = _IGNORES_VERSION.get(number)
    if kind is not None:
        return kind.parse_body(body)  # type: ignore[return-value]  # each returns its own class
    later_kind = _NEEDS_VERSION_0.get(number)
    if later_kind is None:
        raise DiscoError(f"disco message type {number} is unknown")
    if version != 0:
        raise DiscoError(f"disco message type {number} has version {version}, only 0 is known")
    return later_kind.parse_body(body)


def is_disco(datagram: bytes) -> bool:
    """Whether `datagram` carries the magic and is long enough to carry a message."""
    return len(datagram) >= MIN_ENVELOPE_LENGTH and datagram.startswith(MAGIC)


def parse_sender(datagram: bytes) -> DiscoPublic:
    """The disco key that a datagram claims to come from: look the peer up by it before any
    cryptography. Raises DiscoError."""
    if not is_disco(datagram):
        raise DiscoError("not a disco datagram")
    return _disco_key(bytes(datagram[6:38]))


def open_envelope(datagram: bytes, box: Box) -> Message:
    """The message in `datagram`, whose sender has been looked up. Raises DiscoError.

    `box` joins our disco private key and the sender's public one; keep it per peer.
    """
    if not is_disco(datagram):
        raise DiscoError("not a disco datagram")
    try:
        plaintext = box.open(bytes(datagram[38:]))
    except BoxError:
        raise DiscoError("a disco envelope does not open; its sender may have restarted") from None
    return parse_message(plaintext)


def seal_envelope(message: Message, sender: DiscoPublic, box: Box, nonce: bytes) -> bytes:
    """A whole datagram. `sender` is our own disco key, `nonce` 24 fresh random bytes."""
    return MAGIC + sender.raw + box.seal(message.encode(), nonce)
