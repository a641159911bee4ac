"""Punch messages: how two Underpass nodes arrange to guess the ports of a hard NAT together.

They travel as the payload of ordinary relay packets, like introductions, and only between nodes
that introduced themselves. Stock nodes take one for an unknown WireGuard message and drop it.

Outer form:

* 0   6 bytes  magic `55 50 f0 9f 91 8a`
* 6   1        version, 1
* 7   24       nonce
* 31  16       tag
* 47  n        sealed by the NaCl box between the two *node* keys

Sealed form (integers big-endian):

* 0   1   kind: 1 ask, 2 plan, 3 stop, see `PunchKind`
* 1   8   sender's session, as in its introduction
* 9   8   receiver's session, as in its introduction
* 17  8   serial: grows with every punch message of a session to this peer
* 25  4   attempt: drawn by the side that plans, repeated by the other; 0 in an ask
* 29  1   method: 0 none, 1 birthday, 2 predicted, 3 mutual, see `PunchMethod`
* 30  1   sender's NAT mapping class, 31 (1) NAT filtering class
* 32  1   how the sender's NAT picks ports: 0 unknown, 1 preserving, 2 sequential, 3 random
* 33  2   step of a sequential NAT, signed, else 0
* 35  2   sockets that the sender uses
* 37  18  ask: where to reach the sender; birthday and predicted plan: where the sender's sockets
          ping; mutual plan: the sender's public IP and the last port that its NAT gave out; stop of
          a search that found a path: where the receiver sees the sender on it
* 55  18  birthday and predicted plan: the sender's public IP, port 0; else zero
* 73  1   number of port ranges, at most 8
* 74  4n  ranges of ports to probe, likely ones first: first port (2), last port (2)

Trailing bytes are for later versions and ignored. Both sessions in every message make a recording
useless once either node has restarted, and the serial before; see `traversal.paths.punching`.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import Final, TypeVar

from traversal.keys import BOX_OVERHEAD, Box, BoxError
from traversal.wire.address import ADDRESS_LENGTH, Address, encode_address, parse_address
from traversal.wire.introduction import SESSION_LENGTH, FilteringClass, MappingClass

MAGIC: Final = b"UP\xf0\x9f\x91\x8a"
VERSION: Final = 1
MAX_RANGES: Final = 8
"""A plan names the measured window, its margins and the rest; eight leave room for scattered port
sets (MAP-E)."""

_HEADER_LENGTH: Final = 7
_FIXED: Final = struct.Struct(">B8s8sQIBBBBhH18s18sB")
_RANGE: Final = struct.Struct(">HH")
_NO_SESSION: Final = bytes(SESSION_LENGTH)
_NO_ADDRESS: Final = bytes(ADDRESS_LENGTH)

_Enum = TypeVar("_Enum", bound=IntEnum)
PortRange = tuple[int, int]
"""First and last port, both included."""


class PunchMessageError(ValueError):
    """A relay packet is not a punch message that this node can use. Drop it; count it."""


class PunchKind(IntEnum):
    """What the sender wants."""

    ASK = 1
    """Open sockets towards me, or tell me why not."""
    PLAN = 2
    """I have opened sockets: probe me as described."""
    STOP = 3
    """Stop: a path was found, or there is no use in going on."""


class PunchMethod(IntEnum):
    """What the receiver of a plan is to do."""

    NONE = 0
    BIRTHDAY = 1
    PREDICTED = 2
    MUTUAL = 3


class PortPatternCode(IntEnum):
    """How a NAT picks ports, as a number."""

    UNKNOWN = 0
    PRESERVING = 1
    SEQUENTIAL = 2
    RANDOM = 3


@dataclass(frozen=True, slots=True)
class PunchMessage:
    """What one node tells the other about a common search."""

    kind: PunchKind
    session: bytes
    echoed_session: bytes
    serial: int
    attempt: int = 0
    method: PunchMethod = PunchMethod.NONE
    mapping: MappingClass = MappingClass.UNKNOWN
    filtering: FilteringClass = FilteringClass.UNKNOWN
    pattern: PortPatternCode = PortPatternCode.UNKNOWN
    step: int = 0
    sockets: int = 0
    address: Address | None = None
    source: Address | None = None
    ranges: tuple[PortRange, ...] = ()

    def encode(self) -> bytes:
        """The plaintext. Raises PunchMessageError when there are more than 8 ranges."""
        if len(self.ranges) > MAX_RANGES:
            raise PunchMessageError(f"a punch message has at most {MAX_RANGES} port ranges")
        return _FIXED.pack(
            self.kind,
            self.session,
            self.echoed_session,
            self.serial,
            self.attempt,
            self.method,
            self.mapping,
            self.filtering,
            self.pattern,
            self.step,
            self.sockets,
            _encode_optional(self.address),
            _encode_optional(self.source),
            len(self.ranges),
        ) + b"".join(_RANGE.pack(*ports) for ports in self.ranges)


def parse_punch_message(plaintext: bytes) -> PunchMessage:
    """Read what was sealed. Raises PunchMessageError, also for a kind or method not known here.

    Classes and patterns that are unknown here read as UNKNOWN.
    """
    if len(plaintext) < _FIXED.size:
        raise PunchMessageError(f"a punch message has at least {_FIXED.size} bytes")
    (
        kind,
        session,
        echoed_session,
        serial,
        attempt,
        method,
        mapping,
        filtering,
        pattern,
        step,
        sockets,
        address,
        source,
        count,
    ) = _FIXED.unpack_from(plaintext)
    if _NO_SESSION in (session, echoed_session):
        raise PunchMessageError("a punch message without both sessions")
    if count > MAX_RANGES or len(plaintext) < _FIXED.size + count * _RANGE.size:
        raise PunchMessageError(f"a punch message promises {count} port ranges and has fewer")
    ranges = tuple(
        _RANGE.unpack_from(plaintext, _FIXED.size + place * _RANGE.size) for place in range(count)
    )
    if not all(0 < first <= last for first, last in ranges):
        raise PunchMessageError("a port range of a punch message is empty or begins at port 0")
    try:
        known_kind, known_method = PunchKind(kind), PunchMethod(method)
    except ValueError:
        raise PunchMessageError(f"a punch message of kind {kind}, method {method}") from None
    return PunchMessage(
        kind=known_kind,
        session=session,
        echoed_session=echoed_session,
        serial=serial,
        attempt=attempt,
        method=known_method,
        mapping=_known(MappingClass, mapping),
        filtering=_known(FilteringClass, filtering),
        pattern=_known(PortPatternCode, pattern),
        step=step,
        sockets=sockets,
        address=_parse_optional(address),
        source=_parse_optional(source),
        ranges=ranges,
    )


def is_punch_message(packet: bytes) -> bool:
    """Whether a relay packet is a punch message of any version."""
    return packet.startswith(MAGIC)


def open_punch_message(packet: bytes, box: Box) -> PunchMessage:
    """Open a relay packet with the box between our node key and that of its source.

    Raises PunchMessageError, also for another version. Never answer one that does not open.
    """
    if not is_punch_message(packet) or len(packet) < _HEADER_LENGTH + BOX_OVERHEAD:
        raise PunchMessageError("not a punch message")
    if packet[6] != VERSION:
        raise PunchMessageError(f"a punch message of version {packet[6]}, only 1 is known")
    try:
        return parse_punch_message(box.open(bytes(packet[_HEADER_LENGTH:])))
    except BoxError:
        raise PunchMessageError("a punch message does not open; it was not made for us") from None


def seal_punch_message(message: PunchMessage, box: Box, nonce: bytes) -> bytes:
    """A whole relay packet; `nonce` is 24 fresh random bytes."""
    return MAGIC + bytes([VERSION]) + box.seal(message.encode(), nonce)


def _encode_optional(address: Address | None) -> bytes:
    return _NO_ADDRESS if address is None else encode_address(address)


def _parse_optional(data: bytes) -> Address | None:
    return None if data == _NO_ADDRESS else parse_address(data)


def _known(kind: type[_Enum], number: int) -> _Enum:
    try:
        return kind(number)
    except ValueError:
        return kind(0)
