"""Introduction: how two Underpass nodes that know only each other's node key exchange the rest.

It travels as the payload of an ordinary relay packet, so it needs nothing of the relay. A stock
node takes it for an unknown WireGuard message (its bytes 1 to 3 are not zero) and drops it.

Outer form:

* 0   6 bytes  magic `55 50 f0 9f 91 8b`
* 6   1        version, 1
* 7   24       nonce
* 31  16       tag
* 47  n        sealed by the NaCl box between the two *node* keys

The box authenticates both ends: whoever opens it with the key that the relay says the packet came
from knows that the holder of that key made it for him.

Sealed form (integers big-endian):

* 0   1   flags: bit 0, answer wanted; the others 0
* 1   8   sender's session: random, new at each start, never zero
* 9   8   receiver's session as the sender knows it; zero when it does not
* 17  8   serial: grows with every introduction of a session
* 25  32  disco public key
* 57  2   home region; 0 none
* 59  1   NAT mapping class, 60 (1) NAT filtering class (`MappingClass`, `FilteringClass`)
* 61  4   capability bits, see `Capability`
* 65  1   number of addresses, at most 64
* 66  19n addresses: type (1, see `AddressType`), address-port (18)

Trailing bytes are for later versions and ignored. When an introduction is believed, and when it is
answered, is decided in `traversal.paths.introduction`.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum, IntFlag
from typing import Final, TypeVar

from traversal.keys import BOX_OVERHEAD, Box, BoxError, DiscoPublic
from traversal.wire.address import ADDRESS_LENGTH, Address, encode_address, parse_address

MAGIC: Final = b"UP\xf0\x9f\x91\x8b"
VERSION: Final = 1
MAX_ADDRESSES: Final = 64
"""Equal to the number of addresses that a CallMeMaybe makes us ping: more would be useless."""

_HEADER_LENGTH: Final = 7
_FIXED: Final = struct.Struct(">B8s8sQ32sHBBIB")
_ENTRY_LENGTH: Final = 1 + ADDRESS_LENGTH
_NO_SESSION: Final = bytes(8)
SESSION_LENGTH: Final = 8


_Enum = TypeVar("_Enum", bound=IntEnum)


class IntroductionError(ValueError):
    """A relay packet is not an introduction that this node can use. Drop it; count it."""


class MappingClass(IntEnum):
    """How a NAT chooses the public port, RFC 4787 section 4.1."""

    UNKNOWN = 0
    NONE = 1
    ENDPOINT_INDEPENDENT = 2
    ADDRESS_DEPENDENT = 3
    ADDRESS_AND_PORT_DEPENDENT = 4


class FilteringClass(IntEnum):
    """Whom a NAT or firewall lets in, RFC 4787 section 5."""

    UNKNOWN = 0
    OPEN = 1
    ENDPOINT_INDEPENDENT = 2
    ADDRESS_DEPENDENT = 3
    ADDRESS_AND_PORT_DEPENDENT = 4


class AddressType(IntEnum):
    """Where an advertised address comes from, path selection specification 7."""

    UNKNOWN = 0
    LOCAL = 1
    STUN = 2
    PORT_MAPPED = 3
    STUN_LOCAL_PORT = 4
    EXPLICIT = 5


class Capability(IntFlag):
    """What a node can do beyond disco."""

    NONE = 0
    PORT_SEARCH = 1
    PEER_RELAY = 2


@dataclass(frozen=True, slots=True)
class Introduction:
    """What one node tells another about itself."""

    session: bytes
    echoed_session: bytes | None
    serial: int
    disco_key: DiscoPublic
    home_region: int
    addresses: tuple[tuple[AddressType, Address], ...]
    wants_answer: bool = False
    mapping: MappingClass = MappingClass.UNKNOWN
    filtering: FilteringClass = FilteringClass.UNKNOWN
    capabilities: Capability = Capability.NONE

    def encode(self) -> bytes:
        """The plaintext. Raises IntroductionError when there are more than 64 addresses."""
        if len(self.addresses) > MAX_ADDRESSES:
            raise IntroductionError(f"an introduction has at most {MAX_ADDRESSES} addresses")
        return _FIXED.pack(
            1 if self.wants_answer else 0,
            self.session,
            self.echoed_session or _NO_SESSION,
            self.serial,
            self.disco_key.raw,
            self.home_region,
            self.mapping,
            self.filtering,
            self.capabilities,
            len(self.addresses),
        ) + b"".join(bytes([kind]) + encode_address(address) for kind, address in self.addresses)


def parse_introduction(plaintext: bytes) -> Introduction:
    """Read what was sealed. Raises IntroductionError.

    Classes, types and capabilities that are unknown here read as UNKNOWN or are left out, so that
    a later version may add some.
    """
    if len(plaintext) < _FIXED.size:
        raise IntroductionError(f"an introduction has at least {_FIXED.size} bytes")
    (
        flags,
        session,
        echoed_session,
        serial,
        disco_key,
        home_region,
        mapping,
        filtering,
        capabilities,
        count,
    ) = _FIXED.unpack_from(plaintext)
    if session == _NO_SESSION or not any(disco_key):
        raise IntroductionError("an introduction without a session or without a disco key")
    if count > MAX_ADDRESSES or len(plaintext) < _FIXED.size + count * _ENTRY_LENGTH:
        raise IntroductionError(f"an introduction promises {count} addresses and has fewer")
    addresses = []
    for start in range(_FIXED.size, _FIXED.size + count * _ENTRY_LENGTH, _ENTRY_LENGTH):
        address = parse_address(plaintext[start + 1 : start + _ENTRY_LENGTH])
        addresses.append((_known(AddressType, plaintext[start]), address))
    return Introduction(
        session=session,
        echoed_session=None if echoed_session == _NO_SESSION else echoed_session,
        serial=serial,
        disco_key=DiscoPublic(disco_key),
        home_region=home_region,
        addresses=tuple(addresses),
        wants_answer=bool(flags & 1),
        mapping=_known(MappingClass, mapping),
        filtering=_known(FilteringClass, filtering),
        capabilities=Capability(capabilities & sum(Capability)),
    )


def _known(kind: type[_Enum], number: int) -> _Enum:
    try:
        return kind(number)
    except ValueError:
        return kind(0)


def is_introduction(packet: bytes) -> bool:
    """Whether a relay packet is an introduction of any version."""
    return packet.startswith(MAGIC)


def open_introduction(packet: bytes, box: Box) -> Introduction:
    """Open a relay packet with the box between our node key and that of its source.

    Raises IntroductionError, also for another version: tell nobody, since the sender learns what we
    speak from our own introduction.
    """
    if not is_introduction(packet) or len(packet) < _HEADER_LENGTH + BOX_OVERHEAD:
        raise IntroductionError("not an introduction")
    if packet[6] != VERSION:
        raise IntroductionError(f"an introduction of version {packet[6]}, only 1 is known")
    try:
        return parse_introduction(box.open(bytes(packet[_HEADER_LENGTH:])))
    except BoxError:
        raise IntroductionError("an introduction does not open; it was not made for us") from None


def seal_introduction(introduction: Introduction, box: Box, nonce: bytes) -> bytes:
    """A whole relay packet; `nonce` is 24 fresh random bytes."""
    return MAGIC + bytes([VERSION]) + box.seal(introduction.encode(), nonce)
