"""What a QUIC stream of a tunnel begins with (edge tunnel specification 6.2 to 6.4).

A data stream carries, in each direction, `DATA_PREAMBLE` and one Cap'n Proto message, then payload:

* ConnectRequest 1/2 (edge to connector): type u16@0; p0 destination, p1 list of Metadata 0/2
  (key, value)
* ConnectResponse 0/2 (back): p0 error, p1 list of Metadata

An RPC stream begins with `RPC_SIGNATURE`; RPC messages follow.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum
from typing import Final, TypeAlias

from traversal.wire.tunnel.capnp import (
    Node,
    Struct,
    StructList,
    encode_message,
    message_length,
    parse_message,
    text_node,
)
from traversal.wire.tunnel.errors import TunnelError

DATA_SIGNATURE: Final = bytes.fromhex("0a36cd12a13e")
DATA_PREAMBLE: Final = DATA_SIGNATURE + b"01"
"""Signature and version; the version is read and not checked."""
RPC_SIGNATURE: Final = bytes.fromhex("52bb825cdb65")
SIGNATURE_LENGTH: Final = 6

MAX_HEAD_BYTES: Final = 256 << 10
"""Of a ConnectRequest or ConnectResponse: four times the headers that HTTP servers accept."""

METHOD_KEY: Final = "HttpMethod"
HOST_KEY: Final = "HttpHost"
HEADER_PREFIX: Final = "HttpHeader:"
STATUS_KEY: Final = "HttpStatus"
FLOW_ID_KEY: Final = "FlowID"
RATE_LIMITED_KEY: Final = "FlowConnectRateLimited"

Metadata: TypeAlias = tuple[tuple[str, str], ...]


class ConnectType(IntEnum):
    """What a stream carries."""

    HTTP = 0
    WEBSOCKET = 1
    TCP = 2


@dataclass(frozen=True, slots=True)
class ConnectRequest:
    """Open a flow: `destination` is an absolute URL, for TCP `IP:port`."""

    destination: str
    type: ConnectType
    metadata: Metadata = ()

    def encode(self) -> bytes:
        """Preamble and message."""
        root = Struct(
            struct.pack("<Q", self.type), (text_node(self.destination), _metadata(self.metadata))
        )
        return DATA_PREAMBLE + encode_message(root)

    @classmethod
    def from_struct(cls, root: Struct) -> ConnectRequest:
        """Raises TunnelError."""
        try:
            kind = ConnectType(root.u16(0))
        except ValueError as error:
            raise TunnelError(f"connect: {error}") from None
        return cls(root.text(0), kind, _read_metadata(root))


@dataclass(frozen=True, slots=True)
class ConnectResponse:
    """The answer; with an `error` nothing follows."""

    error: str = ""
    metadata: Metadata = ()

    def encode(self) -> bytes:
        """Preamble and message."""
        root = Struct(pointers=(text_node(self.error), _metadata(self.metadata)))
        return DATA_PREAMBLE + encode_message(root)

    @classmethod
    def from_struct(cls, root: Struct) -> ConnectResponse:
        """Raises TunnelError."""
        return cls(root.text(0), _read_metadata(root))


def data_head_length(data: bytes | bytearray | memoryview) -> int | None:
    """The length of preamble and message at the start of `data`; None while it is incomplete.

    Raises TunnelError for another signature and for more than `MAX_HEAD_BYTES`.
    """
    start = bytes(data[:SIGNATURE_LENGTH])
    if not DATA_SIGNATURE.startswith(start):
        raise TunnelError("connect: a stream that does not begin with the data signature")
    view = memoryview(data)[len(DATA_PREAMBLE) :]
    length = message_length(view, MAX_HEAD_BYTES)
    if length is None or length > len(view):
        return None
    return len(DATA_PREAMBLE) + length


def parse_data_head(head: bytes) -> Struct:
    """The message's root, from the bytes that `data_head_length` measured. Raises TunnelError."""
    return parse_message(head[len(DATA_PREAMBLE) :])


def header_metadata(headers: Iterable[tuple[bytes, bytes]]) -> Metadata:
    """HTTP headers as metadata. Raises TunnelError for a name that the other side would misread."""
    entries = []
    for name, value in headers:
        if b":" in name:
            raise TunnelError(f"connect: {name!r} is no header name")
        entries.append((HEADER_PREFIX + _decode(name), _decode(value)))
    return tuple(entries)


def metadata_headers(metadata: Metadata) -> tuple[tuple[bytes, bytes], ...]:
    """The HTTP headers among metadata, names in lower case."""
    return tuple(
        (key.removeprefix(HEADER_PREFIX).encode().lower(), value.encode(errors="surrogateescape"))
        for key, value in metadata
        if key.startswith(HEADER_PREFIX)
    )


def _decode(data: bytes) -> str:
    # Cap'n Proto's text is UTF-8, but the values of headers may be any bytes (RFC 9110 5.5), and
    # the reference puts them there as they are.
    return data.decode(errors="surrogateescape")


def _metadata(entries: Metadata) -> Node:
    return StructList(
        tuple(Struct(pointers=(text_node(key), text_node(value))) for key, value in entries),
        (0, 2),
    )


def _read_metadata(root: Struct) -> Metadata:
    return tuple(map(_read_entry, root.structs(1)))


def _read_entry(entry: Struct) -> tuple[str, str]:
    key = entry.text(0)
    is_header = key.startswith(HEADER_PREFIX)
    return key, _decode(entry.text_bytes(1)) if is_header else entry.text(1)
