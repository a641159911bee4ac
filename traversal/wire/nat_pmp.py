"""NAT-PMP, RFC 6886: asking the gateway for its public address and for a UDP port.

External address: request `00 00`; response 12 bytes: version 0, opcode 128, result (2),
seconds since start of epoch (4), IPv4 (4).

Map UDP: request 12 bytes: version 0, opcode 1, reserved (2), internal port (2), suggested external
port (2), lifetime in seconds (4); response 16 bytes: version 0, opcode 129, result (2), epoch (4),
internal port (2), external port (2), lifetime (4).
"""

from __future__ import annotations

import ipaddress
import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

GATEWAY_PORT: Final = 5351
EXTERNAL_ADDRESS_REQUEST: Final = b"\0\0"

_RESPONSE: Final = struct.Struct(">BBHI")
_MAP_REQUEST: Final = struct.Struct(">BBHHHI")
_MAP_TAIL: Final = struct.Struct(">HHI")


class NatPmpError(ValueError):
    """A datagram from the gateway is not a NAT-PMP response."""


class Result(IntEnum):
    """Result codes, RFC 6886 section 3.5; codes unknown to us count as NETWORK_FAILURE."""

    OK = 0
    UNSUPPORTED_VERSION = 1
    NOT_AUTHORIZED = 2
    NETWORK_FAILURE = 3
    OUT_OF_RESOURCES = 4
    UNSUPPORTED_OPCODE = 5


@dataclass(frozen=True, slots=True)
class ExternalAddressResponse:
    """`address` is None when the gateway has none (0.0.0.0) or `result` is not OK."""

    result: Result
    epoch_seconds: int
    address: ipaddress.IPv4Address | None


@dataclass(frozen=True, slots=True)
class MapResponse:
    """The gateway's answer to a map request; the ports are 0 when `result` is not OK."""

    result: Result
    epoch_seconds: int
    internal_port: int
    external_port: int
    lifetime_seconds: int


def encode_map_request(internal_port: int, suggested_port: int, lifetime_seconds: int) -> bytes:
    """Map a UDP port; `suggested_port` 0 leaves the choice to the gateway."""
    return _MAP_REQUEST.pack(0, 1, 0, internal_port, suggested_port, lifetime_seconds)


def encode_delete(internal_port: int) -> bytes:
    """Delete the mapping of one internal UDP port."""
    return encode_map_request(internal_port, 0, 0)


def parse_response(datagram: bytes) -> ExternalAddressResponse | MapResponse:
    """Read a datagram from the gateway's port 5351. Raises NatPmpError.

    Version 2 with result 1 is a PCP-only server's answer; it reads as UNSUPPORTED_VERSION of the
    external address, so that the caller moves on. Error results may come without a body.
    """
    if len(datagram) < _RESPONSE.size:
        raise NatPmpError(f"a NAT-PMP response has at least 8 bytes, this has {len(datagram)}")
    version, opcode, code, epoch = _RESPONSE.unpack_from(datagram)
    if version == 2 and opcode & 0x80 and datagram[3] == Result.UNSUPPORTED_VERSION:
        return ExternalAddressResponse(Result.UNSUPPORTED_VERSION, 0, None)
    if version != 0 or opcode not in (128, 129):
        raise NatPmpError(f"not a NAT-PMP response: version {version}, opcode {opcode}")
    result = Result(code) if code <= Result.UNSUPPORTED_OPCODE else Result.NETWORK_FAILURE
    if opcode == 128:
        if result is not Result.OK:
            return ExternalAddressResponse(result, epoch, None)
        if len(datagram) < 12:
            raise NatPmpError(f"an address response has 12 bytes, this has {len(datagram)}")
        address = ipaddress.IPv4Address(bytes(datagram[8:12]))
        return ExternalAddressResponse(result, epoch, None if int(address) == 0 else address)
    if len(datagram) < 16:
        if result is Result.OK:
            raise NatPmpError(f"a map response has 16 bytes, this has {len(datagram)}")
        return MapResponse(result, epoch, 0, 0, 0)
    internal_port, external_port, lifetime = _MAP_TAIL.unpack_from(datagram, 8)
    return MapResponse(result, epoch, internal_port, external_port, lifetime)
