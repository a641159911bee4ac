"""STUN messages (RFC 8489, RFC 5780; netcheck specification 4 and 10; DERP specification 13).

A message is a header of 20 bytes and attributes:

    0   2   type: 0001 Binding request, 0101 success, 0111 error
    2   2   length of the attributes in bytes, a multiple of 4
    4   4   magic cookie 2112a442
    8   12  transaction id
    20  ... attributes: 2 bytes type, 2 bytes length, the value, padding to a multiple of 4

RFC 3489, of 2003, has no cookie: its transaction id is the 16 bytes from offset 4. A transaction
id of 16 bytes therefore marks such a classic message in this module.

The Binding codec here is made for speed, since it is on the path of every datagram of a shared
socket and of a public server. Everything else that STUN and TURN have, such as authentication,
goes through `parse_message` and `encode_message`, which put aioice's attribute table behind this
module's checks and its one error type.

Only the functions named `parse_` and `is_` see bytes of a peer. They raise StunError and nothing
else, whatever the bytes. The functions named `encode_` take our own values and raise ValueError
for an address that is none.
"""

from __future__ import annotations

import binascii
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from ipaddress import IPv6Address
from types import MappingProxyType
from typing import Final, NewType

import msgspec

MAGIC_COOKIE: Final = 0x2112A442
HEADER_LENGTH: Final = 20
TRANSACTION_ID_LENGTH: Final = 12
CLASSIC_TRANSACTION_ID_LENGTH: Final = 16

BINDING_REQUEST: Final = 0x0001
BINDING_SUCCESS: Final = 0x0101
BINDING_ERROR: Final = 0x0111

UNKNOWN_ATTRIBUTE: Final = 420
"""The error code for a request with an attribute that it takes to understand, and we do not."""

_MAPPED_ADDRESS: Final = 0x0001
_CHANGE_REQUEST: Final = 0x0003
_SOURCE_ADDRESS: Final = 0x0004
_CHANGED_ADDRESS: Final = 0x0005
_ERROR_CODE: Final = 0x0009
_UNKNOWN_ATTRIBUTES: Final = 0x000A
_XOR_MAPPED_ADDRESS: Final = 0x0020
_PADDING: Final = 0x0026
_RESPONSE_PORT: Final = 0x0027
_XOR_MAPPED_ADDRESS_DRAFT: Final = 0x8020
_SOFTWARE: Final = 0x8022
_FINGERPRINT: Final = 0x8028
_RESPONSE_ORIGIN: Final = 0x802B
_OTHER_ADDRESS: Final = 0x802C

_CHANGE_IP: Final = 0x04
_CHANGE_PORT: Final = 0x02
_FINGERPRINT_XOR: Final = 0x5354554E

# Attributes of types below 8000 must be understood, or the request is refused (RFC 8489 14).
# Those of RFC 8489 itself are understood: without authentication they are ignored (6.3).
_UNDERSTOOD: Final = frozenset(
    {
        _MAPPED_ADDRESS,
        _CHANGE_REQUEST,
        0x0006,  # USERNAME
        0x0008,  # MESSAGE-INTEGRITY
        _ERROR_CODE,
        _UNKNOWN_ATTRIBUTES,
        0x0014,  # REALM
        0x0015,  # NONCE
        0x001C,  # MESSAGE-INTEGRITY-SHA256
        0x001D,  # PASSWORD-ALGORITHM
        0x001E,  # USERHASH
        _XOR_MAPPED_ADDRESS,
        _PADDING,
        _RESPONSE_PORT,
    }
)

_COOKIE_BYTES: Final = MAGIC_COOKIE.to_bytes(4, "big")
_TAILNODE_HEAD: Final = bytes.fromhex("000100142112a442")
# SOFTWARE "tailnode" and the first half of FINGERPRINT: offsets 20 to 36 of Tailscale's request.
_TAILNODE_MIDDLE: Final = bytes.fromhex("80220008") + b"tailnode" + bytes.fromhex("80280004")
_TAILNODE_LENGTH: Final = 40

_RESPONSE_4_HEAD: Final = bytes.fromhex("0101000c2112a442")
_RESPONSE_4_ATTRIBUTE: Final = bytes.fromhex("002000080001")
_RESPONSE_4_LENGTH: Final = 32

_HEADER = struct.Struct("!HHI12s")
_TYPE_AND_LENGTH = struct.Struct("!HH")
_U16 = struct.Struct("!H")
_U32 = struct.Struct("!I")
_RESPONSE_4 = struct.Struct("!8s12s6sHBBBB")
_XOR_4 = struct.Struct("!HBBBB")
_IPV6_GROUPS = struct.Struct("!8H")

_V4_MAPPED_PREFIX: Final = bytes(10) + b"\xff\xff"

TransactionId = NewType("TransactionId", bytes)
"""Random bytes that tie a response to its request: 12, or 16 in a classic message."""

Address = tuple[str, int]
"""An IP address as text and a port, as sockets give them."""


class StunError(ValueError):
    """Bytes that are not the STUN message which they were taken for."""


class BindingRequest(msgspec.Struct, frozen=True, gc=False):
    """What a Binding request asks for.

    `unknown_attributes` are the types that it takes to understand and that we do not: the answer
    must then be error 420. `padding_bytes` is the length of PADDING, `None` without it.
    """

    transaction_id: TransactionId
    change_ip: bool = False
    change_port: bool = False
    response_port: int | None = None
    padding_bytes: int | None = None
    unknown_attributes: tuple[int, ...] = ()

    @property
    def is_classic(self) -> bool:
        """Whether the sender speaks RFC 3489, which knows no XOR-MAPPED-ADDRESS."""
        return len(self.transaction_id) == CLASSIC_TRANSACTION_ID_LENGTH


class BindingResponse(msgspec.Struct, frozen=True, gc=False):
    """A success response: how the server saw the request's source.

    `response_origin` is where the response was sent from; `other_address`, when present, says
    that the server does RFC 5780 and differs from its address in both IP address and port.
    """

    transaction_id: TransactionId
    mapped_address: Address
    response_origin: Address | None = None
    other_address: Address | None = None


class ErrorResponse(msgspec.Struct, frozen=True, gc=False):
    """An error response: `code` is 300 to 699 (RFC 8489 14.8), `reason` is the server's text."""

    transaction_id: TransactionId
    code: int
    reason: str
    unknown_attributes: tuple[int, ...] = ()


def is_stun(datagram: bytes) -> bool:
    """Whether a datagram on a shared socket is a STUN request or success response.

    The first step of disco specification 7; never true for disco or WireGuard.
    """
    return (
        len(datagram) >= HEADER_LENGTH
        and datagram[1] == 1
        and datagram[0] & 0xC0 == 0
        and datagram[4:8] == _COOKIE_BYTES
    )


# Requests.


def encode_binding_request(transaction_id: TransactionId) -> bytes:
    """The 40 bytes that Tailscale's clients send, the only request its servers answer.

    SOFTWARE "tailnode", then FINGERPRINT (DERP specification 13.1).
    """
    head = _TAILNODE_HEAD + _checked_id(transaction_id) + _TAILNODE_MIDDLE
    return head + _U32.pack(binascii.crc32(head[:32]) ^ _FINGERPRINT_XOR)


def encode_discovery_request(
    transaction_id: TransactionId,
    *,
    change_ip: bool = False,
    change_port: bool = False,
    response_port: int | None = None,
    padding_bytes: int | None = None,
) -> bytes:
    """A Binding request for NAT behavior discovery (RFC 5780; netcheck specification 10).

    The server is asked to answer from its other IP address or port, to `response_port` of the
    sender's IP address, or with padding. Without any of these it is the plain 20-byte request.
    """
    attributes = b""
    if change_ip or change_port:
        flags = _CHANGE_IP * change_ip | _CHANGE_PORT * change_port
        attributes += _attribute(_CHANGE_REQUEST, _U32.pack(flags))
    if response_port is not None:
        if not 0 < response_port <= 65535:
            raise ValueError(f"{response_port} is no port")
        attributes += _attribute(_RESPONSE_PORT, _U16.pack(response_port) + b"\0\0")
    if padding_bytes is not None:
        attributes += _attribute(_PADDING, bytes(padding_bytes))
    return _message(BINDING_REQUEST, transaction_id, attributes)


def is_tailnode_request(datagram: bytes) -> bool:
    """Whether a datagram is exactly the 40-byte request of Tailscale's clients."""
    return (
        len(datagram) == _TAILNODE_LENGTH
        and datagram[:8] == _TAILNODE_HEAD
        and datagram[20:36] == _TAILNODE_MIDDLE
        and _U32.unpack_from(datagram, 36)[0] == binascii.crc32(datagram[:32]) ^ _FINGERPRINT_XOR
    )


def parse_binding_request(datagram: bytes) -> BindingRequest:
    """Read the Binding request of any client. Raises StunError.

    Neither SOFTWARE nor FINGERPRINT is needed; a FINGERPRINT that is there must be last and
    right. A request whose length field does not match the datagram is refused.
    """
    if is_tailnode_request(datagram):
        return BindingRequest(TransactionId(datagram[8:20]))
    transaction_id, end = _parse_header(datagram, BINDING_REQUEST)
    if end != len(datagram):
        raise StunError(f"STUN request of {end} bytes in a datagram of {len(datagram)} bytes")
    change = 0
    response_port: int | None = None
    padding_bytes: int | None = None
    unknown: list[int] = []
    for kind, start, length in _attributes(datagram, end):
        if kind == _CHANGE_REQUEST:
            change = _parse_u32(datagram, start, length)
        elif kind == _RESPONSE_PORT:
            response_port = _parse_u32(datagram, start, length) >> 16
        elif kind == _PADDING:
            padding_bytes = length
        elif kind == _FINGERPRINT:
            _check_fingerprint(datagram, start, length, end)
        elif kind < 0x8000 and kind not in _UNDERSTOOD:
            unknown.append(kind)
    return BindingRequest(
        transaction_id=transaction_id,
        change_ip=bool(change & _CHANGE_IP),
        change_port=bool(change & _CHANGE_PORT),
        response_port=response_port,
        padding_bytes=padding_bytes,
        unknown_attributes=tuple(unknown),
    )


# Responses.


def encode_binding_response(
    transaction_id: TransactionId,
    mapped_address: Address,
    *,
    response_origin: Address | None = None,
    other_address: Address | None = None,
    padding_bytes: int | None = None,
) -> bytes:
    """A success response; without options the 32 or 44 bytes of Tailscale's servers.

    An IPv4-mapped IPv6 address is written as IPv4. A classic transaction id gets the attributes
    of RFC 3489 instead: MAPPED-ADDRESS, SOURCE-ADDRESS and CHANGED-ADDRESS. Raises ValueError.
    """
    host, port = mapped_address
    if host.startswith("::ffff:") and "." in host:
        # A dual-stack socket names its IPv4 senders so.
        host = host[7:]
        mapped_address = (host, port)
    classic = len(transaction_id) == CLASSIC_TRANSACTION_ID_LENGTH
    plain = response_origin is None and other_address is None and padding_bytes is None
    if plain and ":" not in host and not classic:
        a, b, c, d = host.split(".")
        try:
            return _RESPONSE_4.pack(
                _RESPONSE_4_HEAD,
                _checked_id(transaction_id),
                _RESPONSE_4_ATTRIBUTE,
                port ^ 0x2112,
                int(a) ^ 0x21,
                int(b) ^ 0x12,
                int(c) ^ 0xA4,
                int(d) ^ 0x42,
            )
        except struct.error:
            raise ValueError(f"{host!r}, {port} is no IPv4 address and port") from None
    if classic:
        attributes = _attribute(_MAPPED_ADDRESS, _encode_address(mapped_address))
    else:
        key = _COOKIE_BYTES + transaction_id
        attributes = _attribute(_XOR_MAPPED_ADDRESS, _encode_address(mapped_address, key))
    if response_origin is not None:
        kind = _SOURCE_ADDRESS if classic else _RESPONSE_ORIGIN
        attributes += _attribute(kind, _encode_address(response_origin))
    if other_address is not None:
        kind = _CHANGED_ADDRESS if classic else _OTHER_ADDRESS
        attributes += _attribute(kind, _encode_address(other_address))
    if padding_bytes is not None:
        attributes += _attribute(_PADDING, bytes(padding_bytes))
    return _message(BINDING_SUCCESS, transaction_id, attributes)


def parse_binding_response(datagram: bytes) -> BindingResponse:
    """Read a success response, tolerant as netcheck specification 4 has it. Raises StunError.

    The address is taken from XOR-MAPPED-ADDRESS (also under its old number 8020), else from
    MAPPED-ADDRESS; an IPv4-mapped IPv6 address becomes IPv4. Bytes after the declared length and
    unknown attributes are ignored, FINGERPRINT is not checked. The caller compares the
    transaction id. RESPONSE-ORIGIN and OTHER-ADDRESS count as absent when they make no sense:
    they must not cost us the address.
    """
    if (
        len(datagram) == _RESPONSE_4_LENGTH
        and datagram[:8] == _RESPONSE_4_HEAD
        and datagram[20:26] == _RESPONSE_4_ATTRIBUTE
    ):
        port, a, b, c, d = _XOR_4.unpack_from(datagram, 26)
        host = f"{a ^ 0x21}.{b ^ 0x12}.{c ^ 0xA4}.{d ^ 0x42}"
        return BindingResponse(TransactionId(datagram[8:20]), (host, port ^ 0x2112))
    transaction_id, end = _parse_header(datagram, BINDING_SUCCESS)
    mapped: Address | None = None
    xor_mapped: Address | None = None
    response_origin: Address | None = None
    other_address: Address | None = None
    for kind, start, length in _attributes(datagram, end):
        if kind in (_XOR_MAPPED_ADDRESS, _XOR_MAPPED_ADDRESS_DRAFT):
            if len(transaction_id) != TRANSACTION_ID_LENGTH:
                raise StunError("STUN response with XOR-MAPPED-ADDRESS but without magic cookie")
            xor_mapped = xor_mapped or _parse_address(datagram, start, length, datagram[4:20])
        elif kind == _MAPPED_ADDRESS:
            mapped = mapped or _parse_address(datagram, start, length)
        elif kind == _RESPONSE_ORIGIN:
            response_origin = _maybe_parse_address(datagram, start, length)
        elif kind == _OTHER_ADDRESS:
            other_address = _maybe_parse_address(datagram, start, length)
    address = xor_mapped or mapped
    if address is None:
        raise StunError("STUN response without a mapped address")
    return BindingResponse(transaction_id, address, response_origin, other_address)


def encode_error_response(
    transaction_id: TransactionId,
    code: int,
    reason: str = "",
    *,
    unknown_attributes: tuple[int, ...] = (),
) -> bytes:
    """An error response to a Binding request. `code` is 300 to 699; raises ValueError."""
    if not 300 <= code <= 699:
        raise ValueError(f"a STUN error code is 300 to 699, not {code}")
    value = bytes((0, 0, code // 100, code % 100)) + reason.encode()
    attributes = _attribute(_ERROR_CODE, value)
    if unknown_attributes:
        listed = b"".join(_U16.pack(kind) for kind in unknown_attributes)
        attributes += _attribute(_UNKNOWN_ATTRIBUTES, listed)
    return _message(BINDING_ERROR, transaction_id, attributes)


def parse_error_response(datagram: bytes) -> ErrorResponse:
    """Read an error response to a Binding request. Raises StunError."""
    transaction_id, end = _parse_header(datagram, BINDING_ERROR)
    code = 0
    reason = ""
    unknown: tuple[int, ...] = ()
    for kind, start, length in _attributes(datagram, end):
        if kind == _ERROR_CODE:
            if length < 4:
                raise StunError("STUN ERROR-CODE is shorter than 4 bytes")
            code = (datagram[start + 2] & 7) * 100 + datagram[start + 3]
            reason = datagram[start + 4 : start + length].decode(errors="replace")
        elif kind == _UNKNOWN_ATTRIBUTES:
            last = start + length - 1
            unknown = tuple(_U16.unpack_from(datagram, at)[0] for at in range(start, last, 2))
    if not 300 <= code <= 699:
        raise StunError("STUN error response without a valid ERROR-CODE")
    return ErrorResponse(transaction_id, code, reason, unknown)


# Messages with rarer attributes, by way of aioice.


def _no_attributes() -> Mapping[str, object]:
    return MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Message:
    """Any STUN or TURN message.

    `method` and `message_class` are the numbers of RFC 8489 and RFC 8656 (Allocate is 3; a
    request is 000, an indication 010, a success 100, an error 110, in hex). `attributes` maps the
    RFC's names to text, bytes, numbers, (host, port), or (code, reason). Those that nobody here
    understands are left out, and `unknown_required` lists the types among them that it takes to
    understand: a receiver must then give up on the message (RFC 8489 6.3).
    """

    method: int
    message_class: int
    transaction_id: TransactionId
    attributes: Mapping[str, object] = field(default_factory=_no_attributes)
    unknown_required: tuple[int, ...] = ()


def parse_message(datagram: bytes, *, integrity_key: bytes | None = None) -> Message:
    """Read any STUN or TURN message. Raises StunError.

    With `integrity_key` the message must carry a MESSAGE-INTEGRITY made with that key. A
    FINGERPRINT that is there must be right.
    """
    from aioice import stun

    transaction_id, end = _parse_header(datagram, None)
    if end != len(datagram) or len(transaction_id) != TRANSACTION_ID_LENGTH:
        raise StunError("STUN message without magic cookie, or longer than it says")
    unknown = tuple(
        kind
        for kind, _, _ in _attributes(datagram, end)
        if kind < 0x8000 and kind not in stun.ATTRIBUTES_BY_TYPE
    )
    try:
        message = stun.parse_message(datagram)
        authentic = integrity_key is None or message.check_message_integrity(integrity_key)
    except Exception as error:
        # aioice raises struct.error, KeyError, UnicodeDecodeError and others on hostile bytes.
        raise StunError(f"STUN message with a malformed attribute: {error}") from error
    if not authentic:
        raise StunError("STUN message without a MESSAGE-INTEGRITY made with our key")
    return Message(
        method=int(message.message_method),
        message_class=int(message.message_class),
        transaction_id=transaction_id,
        attributes=MappingProxyType(message.attributes),
        unknown_required=unknown,
    )


def encode_message(message: Message, *, integrity_key: bytes | None = None) -> bytes:
    """Write any STUN or TURN message, with MESSAGE-INTEGRITY when a key is given.

    Raises ValueError for a method, a class or an attribute that has no such name or value.
    """
    from aioice import stun

    try:
        built = stun.Message(
            message_method=stun.Method(message.method),
            message_class=stun.Class(message.message_class),
            transaction_id=bytes(_checked_id(message.transaction_id)),
            attributes=dict(message.attributes),
        )
        if integrity_key is not None:
            built.add_message_integrity(integrity_key)
        return bytes(built)
    except Exception as error:
        raise ValueError(f"cannot write the STUN message: {error!r}") from error


# The parts of a message.


def _checked_id(transaction_id: TransactionId) -> TransactionId:
    if len(transaction_id) != TRANSACTION_ID_LENGTH:
        raise ValueError(f"a transaction id has 12 bytes, not {len(transaction_id)}")
    return transaction_id


def _message(kind: int, transaction_id: TransactionId, attributes: bytes) -> bytes:
    head = _TYPE_AND_LENGTH.pack(kind, len(attributes))
    if len(transaction_id) == CLASSIC_TRANSACTION_ID_LENGTH:
        return head + transaction_id + attributes
    return head + _COOKIE_BYTES + _checked_id(transaction_id) + attributes


def _attribute(kind: int, value: bytes) -> bytes:
    return _TYPE_AND_LENGTH.pack(kind, len(value)) + value + bytes(-len(value) % 4)


def _encode_address(address: Address, key: bytes = bytes(16)) -> bytes:
    """The value of an address attribute; `key` is cookie and transaction id if it is XORed."""
    host, port = address
    if not 0 <= port <= 65535:
        raise ValueError(f"{port} is no port")
    if ":" in host:
        raw = _packed_ipv6(host)
        if raw[:12] == _V4_MAPPED_PREFIX:
            raw = raw[12:]
    else:
        raw = bytes(map(int, host.split(".")))
        if len(raw) != 4:
            raise ValueError(f"{host!r} is no IP address")
    mask = int.from_bytes(key[: len(raw)], "big")
    masked = (int.from_bytes(raw, "big") ^ mask).to_bytes(len(raw), "big")
    masked_port = port ^ (key[0] << 8 | key[1])
    return bytes((0, 1 if len(raw) == 4 else 2)) + _U16.pack(masked_port) + masked


def _packed_ipv6(host: str) -> bytes:
    """The 16 bytes of an IPv6 address. Raises ValueError.

    Text as kernels write it is read here, in a third of the time that IPv6Address takes.
    """
    head, gap, tail = host.partition("::")
    try:
        left = [int(group, 16) for group in head.split(":")] if head else []
        right = [int(group, 16) for group in tail.split(":")] if tail else []
        middle = [0] * (8 - len(left) - len(right)) if gap else []
        return _IPV6_GROUPS.pack(*left, *middle, *right)
    except (ValueError, struct.error):
        return IPv6Address(host.partition("%")[0]).packed


def _parse_header(datagram: bytes, kind: int | None) -> tuple[TransactionId, int]:
    """The transaction id and the offset at which the message ends. Raises StunError."""
    if len(datagram) < HEADER_LENGTH:
        raise StunError(f"STUN message of {len(datagram)} bytes, shorter than its header")
    found, length, cookie, transaction_id = _HEADER.unpack_from(datagram)
    if found & 0xC000 or (kind is not None and found != kind):
        raise StunError(f"message of type {found:04x}" + (f", not {kind:04x}" if kind else ""))
    end = HEADER_LENGTH + length
    if length % 4 or end > len(datagram):
        raise StunError(f"STUN length field {length} does not fit {len(datagram)} bytes")
    if cookie != MAGIC_COOKIE:
        transaction_id = datagram[4:20]
    return TransactionId(transaction_id), end


def _attributes(datagram: bytes, end: int) -> Iterator[tuple[int, int, int]]:
    """Type, offset of the value and length of each attribute. Raises StunError."""
    position = HEADER_LENGTH
    while position < end:
        # Both ends are multiples of 4 here, so that at least a whole attribute header is left.
        kind, length = _TYPE_AND_LENGTH.unpack_from(datagram, position)
        start = position + 4
        position = start + length + (-length % 4)
        if position > end:
            raise StunError(f"STUN attribute {kind:04x} is longer than its message")
        yield kind, start, length


def _parse_u32(datagram: bytes, start: int, length: int) -> int:
    if length != 4:
        raise StunError(f"STUN attribute of {length} bytes where 4 belong")
    value: int = _U32.unpack_from(datagram, start)[0]
    return value


def _parse_address(datagram: bytes, start: int, length: int, key: bytes = bytes(16)) -> Address:
    if length < 8 or (datagram[start + 1] == 2 and length < 20):
        raise StunError(f"STUN address of {length} bytes is too short")
    port = _U16.unpack_from(datagram, start + 2)[0] ^ (key[0] << 8 | key[1])
    family = datagram[start + 1]
    if family == 1:
        a, b, c, d = datagram[start + 4 : start + 8]
        return f"{a ^ key[0]}.{b ^ key[1]}.{c ^ key[2]}.{d ^ key[3]}", port
    if family == 2:
        raw = int.from_bytes(datagram[start + 4 : start + 20], "big") ^ int.from_bytes(key, "big")
        ip = IPv6Address(raw)
        return str(ip if ip.ipv4_mapped is None else ip.ipv4_mapped), port
    raise StunError(f"STUN address of unknown family {family}")


def _maybe_parse_address(datagram: bytes, start: int, length: int) -> Address | None:
    try:
        return _parse_address(datagram, start, length)
    except StunError:
        return None


def _check_fingerprint(datagram: bytes, start: int, length: int, end: int) -> None:
    if length != 4 or start + 4 != end:
        raise StunError("STUN FINGERPRINT is not the last attribute, or not 4 bytes long")
    expected = binascii.crc32(datagram[: start - 4]) ^ _FINGERPRINT_XOR
    if _U32.unpack_from(datagram, start)[0] != expected:
        raise StunError("STUN FINGERPRINT is wrong")
