"""The eight-byte Geneve header in front of everything that passes a UDP peer relay.

* 0  version (2 bits, 0) and option length (6 bits, 0)
* 1  bit 7: control (ends at the relay server); the rest 0
* 2  protocol: `7a11` disco, `7a12` WireGuard
* 4  VNI (3 bytes)
* 7  reserved, 0

(Disco specification 6.2, peer relay specification 3.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

HEADER_LENGTH: Final = 8
PROTOCOL_DISCO: Final = 0x7A11
PROTOCOL_WIREGUARD: Final = 0x7A12
_MAX_VNI: Final = (1 << 24) - 1


class GeneveError(ValueError):
    """A datagram does not begin with a Geneve header that a peer relay uses."""


@dataclass(frozen=True, slots=True)
class Header:
    """A parsed header. `vni` is 0 to 2**24 - 1."""

    vni: int
    protocol: int
    control: bool = False

    def encode(self) -> bytes:
        """The eight bytes. Raises GeneveError when the VNI does not fit."""
        if not 0 <= self.vni <= _MAX_VNI:
            raise GeneveError(f"VNI {self.vni} does not fit in 24 bits")
        flags = 0x80 if self.control else 0
        return bytes([0, flags]) + self.protocol.to_bytes(2, "big") + (self.vni << 8).to_bytes(4)


def parse_header(datagram: bytes) -> Header:
    """Read the first eight bytes; the payload follows them. Raises GeneveError.

    The tolerated bits are those of stock nodes: the version and the reserved bits must be zero,
    the control bit and the never-used C bit may be set.
    """
    if len(datagram) < HEADER_LENGTH:
        raise GeneveError(f"a Geneve header has 8 bytes, this datagram has {len(datagram)}")
    if datagram[0] & 0xC0 or datagram[1] & 0x3F or datagram[7]:
        raise GeneveError("a Geneve header with reserved bits set")
    protocol = int.from_bytes(datagram[2:4], "big")
    if protocol not in (PROTOCOL_DISCO, PROTOCOL_WIREGUARD):
        raise GeneveError(f"Geneve protocol {protocol:#06x} is neither disco nor WireGuard")
    return Header(int.from_bytes(datagram[4:7], "big"), protocol, bool(datagram[1] & 0x80))
