"""UDP flows and ICMP in QUIC DATAGRAM frames (edge tunnel specification 9.1, 9.2).

A connection uses one of two versions, by the features of its registration. Numbers are big-endian.

Version 2, the type at the end; flows are opened by RPC (`traversal.wire.tunnel.sessions`):

    payload, 16 flow id, 00     UDP
    IP packet, 01               ICMP
    IP packet, 25 identity, 02  ICMP, traced
    spans, 25 identity, 03      from the connector only

Version 3, the type at the start:

    0   1       00 register, from the edge only
    1   1       flags: 1 IPv6, 2 traced, 4 with a first payload
    2   2       destination port
    4   2       idle limit in seconds, 0 stands for 210
    6   16      flow id
    22  4 / 16  destination address
    ..  ..      first payload (connectors throw it away)

    01, 16 flow id, payload
    02, IP packet
    03, code, 16 flow id, 2 length of the text, text    answer to a registration
"""

from __future__ import annotations

import ipaddress
import struct
from dataclasses import dataclass
from enum import IntEnum, IntFlag
from typing import Final, TypeAlias
from uuid import UUID

from traversal.wire.tunnel.errors import TunnelError

MAX_PAYLOAD_BYTES: Final = 1280
"""Of a UDP flow's datagram and of an ICMP packet; longer ones are dropped."""
DEFAULT_IDLE_SECONDS: Final = 210
MAX_IDLE_SECONDS: Final = 0xFFFF

_ID_LENGTH: Final = 16
_IDENTITY_LENGTH: Final = 25
_REGISTER: Final = struct.Struct(">BBHH16s")
_ANSWER: Final = struct.Struct(">BB16sH")


class _Prefix(IntEnum):
    REGISTER = 0
    PAYLOAD = 1
    ICMP = 2
    ANSWER = 3


class _Flags(IntFlag):
    IPV6 = 1
    TRACED = 2
    BUNDLED = 4


class FlowCode(IntEnum):
    """A connector's answer to a registration; the reference sends the first, third and fourth."""

    OK = 0
    UNREACHABLE = 1
    CANNOT_BIND = 2
    TOO_MANY = 3
    ERROR = 0xFF


@dataclass(frozen=True, slots=True)
class FlowPayload:
    """A datagram of a flow."""

    flow_id: UUID
    data: bytes


@dataclass(frozen=True, slots=True)
class IcmpPacket:
    """A whole IP packet that carries ICMP."""

    data: bytes


@dataclass(frozen=True, slots=True)
class RegisterFlow:
    """Open a flow, or tell that it is wanted still: it is idempotent. Version 3.

    Attributes:
        idle_seconds: 0 to 65535; 0 stands for 210.
        payload: the reference throws it away: send it again when the flow is open.
    """

    flow_id: UUID
    host: str
    port: int
    idle_seconds: int = 0
    is_traced: bool = False
    payload: bytes = b""

    def encode(self) -> bytes:
        """The datagram. Raises TunnelError."""
        try:
            address = ipaddress.ip_address(self.host)
            flags = (
                (_Flags.IPV6 if address.version == 6 else 0)
                | (_Flags.TRACED if self.is_traced else 0)
                | (_Flags.BUNDLED if self.payload else 0)
            )
            head = _REGISTER.pack(
                _Prefix.REGISTER, flags, self.port, self.idle_seconds, self.flow_id.bytes
            )
        except (ValueError, struct.error) as error:
            raise TunnelError(f"datagram: {error}") from None
        return head + address.packed + self.payload


@dataclass(frozen=True, slots=True)
class FlowAnswer:
    """What became of a registration. Version 3; `text` goes with the code 0xff."""

    flow_id: UUID
    code: int
    text: str = ""

    def encode(self) -> bytes:
        """The datagram."""
        text = self.text.encode()
        return _ANSWER.pack(_Prefix.ANSWER, self.code, self.flow_id.bytes, len(text)) + text


Datagram2: TypeAlias = FlowPayload | IcmpPacket
Datagram3: TypeAlias = FlowPayload | IcmpPacket | RegisterFlow | FlowAnswer


def encode_payload2(flow_id: UUID, data: bytes) -> bytes:
    """A flow's datagram, version 2."""
    return data + flow_id.bytes + b"\x00"


def encode_payload3(flow_id: UUID, data: bytes) -> bytes:
    """A flow's datagram, version 3."""
    return b"\x01" + flow_id.bytes + data


def encode_icmp2(packet: bytes) -> bytes:
    """An ICMP packet, version 2."""
    return packet + b"\x01"


def encode_icmp3(packet: bytes) -> bytes:
    """An ICMP packet, version 3."""
    return b"\x02" + packet


def maybe_parse_datagram2(data: bytes) -> Datagram2 | None:
    """Read a datagram of version 2; None for trace spans. Raises TunnelError."""
    match data[-1:]:
        case b"\x00":
            if len(data) <= _ID_LENGTH:
                raise TunnelError("datagram: shorter than a flow's id")
            flow_id = UUID(bytes=data[-1 - _ID_LENGTH : -1])
            return FlowPayload(flow_id, _checked(data[: -1 - _ID_LENGTH]))
        case b"\x01":
            return IcmpPacket(_checked(data[:-1]))
        case b"\x02":
            if len(data) <= _IDENTITY_LENGTH:
                raise TunnelError("datagram: shorter than a trace's identity")
            return IcmpPacket(_checked(data[: -1 - _IDENTITY_LENGTH]))
        case b"\x03":
            return None
    raise TunnelError("datagram: of an unknown type")


def parse_datagram3(data: bytes) -> Datagram3:
    """Read a datagram of version 3. Raises TunnelError."""
    match data[:1]:
        case b"\x01":
            if len(data) <= _ID_LENGTH:
                raise TunnelError("datagram: shorter than a flow's id")
            return FlowPayload(
                UUID(bytes=data[1 : 1 + _ID_LENGTH]), _checked(data[1 + _ID_LENGTH :])
            )
        case b"\x02":
            return IcmpPacket(_checked(data[1:]))
        case b"\x03":
            return _parse_answer(data)
        case b"\x00":
            return _parse_register(data)
    raise TunnelError("datagram: of an unknown type")


def _parse_register(data: bytes) -> RegisterFlow:
    if len(data) < _REGISTER.size:
        raise TunnelError("datagram: a registration without its head")
    _, flags, port, idle, raw_id = _REGISTER.unpack_from(data)
    end = _REGISTER.size + (16 if flags & _Flags.IPV6 else 4)
    if len(data) < end:
        raise TunnelError("datagram: a registration without its destination")
    return RegisterFlow(
        flow_id=UUID(bytes=raw_id),
        host=str(ipaddress.ip_address(data[_REGISTER.size : end])),
        port=port,
        idle_seconds=idle,
        is_traced=bool(flags & _Flags.TRACED),
        payload=_checked(data[end:]) if flags & _Flags.BUNDLED else b"",
    )


def _parse_answer(data: bytes) -> FlowAnswer:
    if len(data) < _ANSWER.size:
        raise TunnelError("datagram: an answer without its head")
    _, code, raw_id, length = _ANSWER.unpack_from(data)
    text = data[_ANSWER.size : _ANSWER.size + length]
    if len(text) < length:
        raise TunnelError("datagram: an answer without all of its text")
    return FlowAnswer(UUID(bytes=raw_id), code, text.decode(errors="replace"))


def _checked(payload: bytes) -> bytes:
    if len(payload) > MAX_PAYLOAD_BYTES:
        raise TunnelError(f"datagram: more than {MAX_PAYLOAD_BYTES} bytes")
    return payload
