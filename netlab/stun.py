"""The few STUN messages that the probe needs (RFC 8489, RFC 5780). Pure.

The lab judges other programs' STUN, so it does not share code with any of them.

    message   := type(2) length(2) 2112a442 transaction(12) attribute*
    attribute := type(2) length(2) value padded to 4 bytes
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from ipaddress import ip_address

BINDING_REQUEST = 0x0001
BINDING_RESPONSE = 0x0101
_COOKIE = b"\x21\x12\xa4\x42"
_HEADER = struct.Struct("!HH4s12s")

_CHANGE_REQUEST = 0x0003  # RFC 5780 section 7.2
_XOR_MAPPED_ADDRESS = 0x0020  # RFC 8489 section 14.2
_RESPONSE_PORT = 0x0027  # RFC 5780 section 7.5
_CHANGE_ADDRESS, _CHANGE_PORT = 4, 2


class StunError(ValueError):
    """Bytes that are no Binding message of the kind that the probe speaks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A Binding request; `response_port` asks for the answer at another port of the sender."""

    transaction: bytes
    change_address: bool = False
    change_port: bool = False
    response_port: int | None = None

    def encode(self) -> bytes:
        body = b""
        flags = _CHANGE_ADDRESS * self.change_address | _CHANGE_PORT * self.change_port
        if flags:
            body += struct.pack("!HHI", _CHANGE_REQUEST, 4, flags)
        if self.response_port is not None:
            body += struct.pack("!HHHxx", _RESPONSE_PORT, 2, self.response_port)
        return _HEADER.pack(BINDING_REQUEST, len(body), _COOKIE, self.transaction) + body


@dataclass(frozen=True, slots=True, kw_only=True)
class Response:
    """A Binding success response: the endpoint that the server saw."""

    transaction: bytes
    address: str
    port: int

    def encode(self) -> bytes:
        packed = ip_address(self.address).packed
        body = struct.pack(
            "!HHxBH",
            _XOR_MAPPED_ADDRESS,
            4 + len(packed),
            1 if len(packed) == 4 else 2,
            self.port ^ 0x2112,
        ) + _xor(packed, self.transaction)
        return _HEADER.pack(BINDING_RESPONSE, len(body), _COOKIE, self.transaction) + body


def _xor(address: bytes, transaction: bytes) -> bytes:
    return bytes(a ^ b for a, b in zip(address, _COOKIE + transaction, strict=False))


def parse(data: bytes) -> Request | Response:
    """Read a Binding request or success response; unknown attributes are skipped.

    Raises:
        StunError: anything else, whatever the bytes.
    """
    if len(data) < _HEADER.size:
        raise StunError("shorter than a STUN header")
    kind, length, cookie, transaction = _HEADER.unpack_from(data)
    if cookie != _COOKIE or length % 4 or len(data) < _HEADER.size + length:
        raise StunError("not a whole STUN message")
    attributes: dict[int, bytes] = {}
    offset, end = _HEADER.size, _HEADER.size + length
    while offset < end:
        if end - offset < 4:
            raise StunError("an attribute is cut off")
        attribute, size = struct.unpack_from("!HH", data, offset)
        if offset + 4 + size > end:
            raise StunError("an attribute is cut off")
        attributes.setdefault(attribute, data[offset + 4 : offset + 4 + size])
        offset += 4 + (size + 3) // 4 * 4
    if kind == BINDING_REQUEST:
        flags = int.from_bytes(attributes.get(_CHANGE_REQUEST, b""), "big")
        port = attributes.get(_RESPONSE_PORT)
        if port is not None and len(port) < 2:
            raise StunError("RESPONSE-PORT is too short")
        return Request(
            transaction=transaction,
            change_address=bool(flags & _CHANGE_ADDRESS),
            change_port=bool(flags & _CHANGE_PORT),
            response_port=int.from_bytes(port[:2], "big") if port is not None else None,
        )
    if kind == BINDING_RESPONSE:
        value = attributes.get(_XOR_MAPPED_ADDRESS, b"")
        size = {(8, 1): 4, (20, 2): 16}.get((len(value), value[1] if len(value) > 1 else 0))
        if size is None:
            raise StunError("no XOR-MAPPED-ADDRESS of a known family")
        address = _xor(value[4 : 4 + size], transaction)
        port_number = int.from_bytes(value[2:4], "big") ^ 0x2112
        return Response(transaction=transaction, address=str(ip_address(address)), port=port_number)
    raise StunError(f"message type {kind:#06x} is neither Binding request nor success response")
