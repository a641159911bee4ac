"""PCP, RFC 6887: the ANNOUNCE and MAP operations, as a client speaks them.

Request header (24 bytes): version 2, opcode, reserved (2), lifetime in seconds (4), client IP (16).
Response header (24): version 2, opcode with bit 7 set, reserved, result, lifetime (4), epoch (4),
reserved (12).

MAP (36 bytes more): nonce (12), protocol (1), reserved (3), internal port (2), external port (2),
external IP (16). IPv4 addresses are written as IPv4-mapped IPv6. Options are skipped.
"""

from __future__ import annotations

import ipaddress
import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from traversal.wire.address import IPAddress

SERVER_PORT: Final = 5351
NONCE_LENGTH: Final = 12
PROTOCOL_UDP: Final = 17
MAX_DATAGRAM: Final = 1100
"""RFC 6887 section 7: no PCP message is longer."""

_OPCODE_ANNOUNCE: Final = 0
_OPCODE_MAP: Final = 1
_HEADER: Final = struct.Struct(">BBHI16s")
_RESPONSE: Final = struct.Struct(">BBBBII12x")
_MAP: Final = struct.Struct(">12sB3xHH16s")


class PcpError(ValueError):
    """A datagram from the gateway is not a PCP response."""


class Result(IntEnum):
    """Result codes, RFC 6887 section 7.4; codes unknown to us count as NETWORK_FAILURE."""

    SUCCESS = 0
    UNSUPP_VERSION = 1
    NOT_AUTHORIZED = 2
    MALFORMED_REQUEST = 3
    UNSUPP_OPCODE = 4
    UNSUPP_OPTION = 5
    MALFORMED_OPTION = 6
    NETWORK_FAILURE = 7
    NO_RESOURCES = 8
    UNSUPP_PROTOCOL = 9
    USER_EX_QUOTA = 10
    CANNOT_PROVIDE_EXTERNAL = 11
    ADDRESS_MISMATCH = 12
    EXCESSIVE_REMOTE_PEERS = 13


@dataclass(frozen=True, slots=True)
class AnnounceResponse:
    """The server lives. Also stands for "version not supported" from a NAT-PMP-only server."""

    result: Result
    epoch_seconds: int


@dataclass(frozen=True, slots=True)
class MapResponse:
    """The server's answer to MAP. With an error, `lifetime_seconds` says how long to expect it."""

    result: Result
    epoch_seconds: int
    lifetime_seconds: int
    nonce: bytes
    protocol: int
    internal_port: int
    external_port: int
    external_ip: IPAddress


def _pack_ip(ip: IPAddress) -> bytes:
    return ip.packed if len(ip.packed) == 16 else bytes(10) + b"\xff\xff" + ip.packed


def _unpack_ip(data: bytes) -> IPAddress:
    ip = ipaddress.IPv6Address(data)
    return ip.ipv4_mapped or ip


def encode_announce(client_ip: IPAddress) -> bytes:
    """Ask whether a PCP server is there."""
    return _HEADER.pack(2, _OPCODE_ANNOUNCE, 0, 0, _pack_ip(client_ip))


def encode_map_request(
    client_ip: IPAddress,
    nonce: bytes,
    internal_port: int,
    suggested_port: int,
    suggested_ip: IPAddress | None,
    lifetime_seconds: int,
) -> bytes:
    """Make, renew (same nonce) or, with lifetime 0, delete a UDP mapping."""
    if suggested_ip is None:
        any_address: IPAddress = (
            ipaddress.IPv4Address(0) if client_ip.version == 4 else ipaddress.IPv6Address(0)
        )
        suggested_ip = any_address
    return _HEADER.pack(2, _OPCODE_MAP, 0, lifetime_seconds, _pack_ip(client_ip)) + _MAP.pack(
        nonce, PROTOCOL_UDP, internal_port, suggested_port, _pack_ip(suggested_ip)
    )


def parse_response(datagram: bytes) -> AnnounceResponse | MapResponse:
    """Read a datagram from the server's port 5351. Raises PcpError.

    A NAT-PMP-only server answers with version 0 and result 1: that reads as UNSUPP_VERSION.
    """
    if len(datagram) > MAX_DATAGRAM:
        raise PcpError(f"a PCP message has at most {MAX_DATAGRAM} bytes, this has {len(datagram)}")
    if len(datagram) >= 4 and datagram[0] == 0 and datagram[1] & 0x80:
        if int.from_bytes(datagram[2:4], "big") == Result.UNSUPP_VERSION:
            return AnnounceResponse(Result.UNSUPP_VERSION, 0)
        raise PcpError("a NAT-PMP response, not a PCP one")
    if len(datagram) < _RESPONSE.size:
        raise PcpError(f"a PCP response has at least 24 bytes, this has {len(datagram)}")
    version, opcode, _reserved, code, lifetime, epoch = _RESPONSE.unpack_from(datagram)
    if version != 2 or opcode not in (0x80 | _OPCODE_ANNOUNCE, 0x80 | _OPCODE_MAP):
        raise PcpError(f"not a PCP response that we asked for: version {version}, opcode {opcode}")
    result = Result(code) if code <= Result.EXCESSIVE_REMOTE_PEERS else Result.NETWORK_FAILURE
    if opcode == 0x80 | _OPCODE_ANNOUNCE:
        return AnnounceResponse(result, epoch)
    if len(datagram) < _RESPONSE.size + _MAP.size:
        raise PcpError(f"a PCP MAP response has at least 60 bytes, this has {len(datagram)}")
    nonce, protocol, internal_port, external_port, external_ip = _MAP.unpack_from(datagram, 24)
    return MapResponse(
        result,
        epoch,
        lifetime,
        nonce,
        protocol,
        internal_port,
        external_port,
        _unpack_ip(external_ip),
    )
