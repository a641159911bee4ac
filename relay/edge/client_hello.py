"""What a TLS client asks for before anything is encrypted: enough to route by name. Pure.

record     0x16 | version (2) | length (2) | fragment         RFC 8446 5.1
handshake  0x01 | length (3) | body                           may span records
body       version (2) | random (32) | session id <1> | cipher suites <2> | compression <1> |
           extensions <2>                                     <n>: length of n bytes in front
extension  type (2) | data <2>
0          server_name_list <2> of: type 0 | host name <2>    RFC 6066 3
16         protocol_name_list <2> of: name <1>                RFC 7301 3.1
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

MAX_BYTES: Final = 20 << 10
"""Of all records up to the end of the ClientHello. With post-quantum keys it has 2 KiB; 16 KiB is
what OpenSSL takes."""

MAX_RECORDS: Final = 64
"""That it may span. One is usual, and clients that hide the name from censors cut it into a few.
Everything is read again when more comes, so thousands of tiny ones would cost seconds."""

_HANDSHAKE: Final = 0x16
_CLIENT_HELLO: Final = 0x01
_SERVER_NAME: Final = 0
_ALPN: Final = 16
_MAX_FRAGMENT: Final = 1 << 14
_NAME: Final = re.compile(rb"[A-Za-z0-9_-]{1,63}(\.[A-Za-z0-9_-]{1,63})*\.?")


class ClientHelloError(ValueError):
    """The bytes are no ClientHello; the text says why."""


@dataclass(frozen=True, slots=True)
class ClientHello:
    """The name in lower case without final dot, empty if none was sent; protocols in the client's
    order."""

    server_name: str = ""
    protocols: tuple[bytes, ...] = ()


def parse_client_hello(data: bytes) -> ClientHello | None:
    """Read it from the start of a connection; None if more bytes are needed, of which there are
    never more than `MAX_BYTES`. Raises ClientHelloError."""
    body = _handshake(data)
    if body is None:
        if len(data) >= MAX_BYTES:
            raise ClientHelloError(f"the ClientHello does not end within {MAX_BYTES} bytes")
        return None
    reader = _Reader(body)
    reader.take(2 + 32)
    reader.vector(1)
    reader.vector(2)
    reader.vector(1)
    if not reader.left:
        return ClientHello()  # TLS 1.2 allows a ClientHello without extensions
    name = ""
    protocols: tuple[bytes, ...] = ()
    seen: set[int] = set()
    extensions = _Reader(reader.vector(2))
    while extensions.left:
        kind = extensions.number(2)
        content = extensions.vector(2)
        if kind in seen:
            raise ClientHelloError("an extension is there twice")
        seen.add(kind)
        if kind == _SERVER_NAME:
            name = _parse_server_name(content)
        elif kind == _ALPN:
            protocols = _parse_protocols(content)
    return ClientHello(name, protocols)


def _handshake(data: bytes) -> bytes | None:
    """The handshake message's body, out of its records."""
    message = b""
    position = 0
    for _ in range(MAX_RECORDS):
        header = data[position : position + 5]
        if header and header[0] != _HANDSHAKE:
            raise ClientHelloError("it does not speak TLS")
        if len(header) > 1 and header[1] != 3:
            raise ClientHelloError("it speaks no version of TLS")
        if len(header) < 5:
            return None
        length = int.from_bytes(header[3:], "big")
        if not 0 < length <= _MAX_FRAGMENT:
            raise ClientHelloError("a TLS record is empty or too long")
        message += data[position + 5 : position + 5 + length]
        if message and message[0] != _CLIENT_HELLO:
            raise ClientHelloError("the first TLS message is no ClientHello")
        size = int.from_bytes(message[1:4], "big") if len(message) >= 4 else 0
        if size > MAX_BYTES:
            raise ClientHelloError("the ClientHello is too long")
        if len(message) >= 4 + size > 4:
            return message[4 : 4 + size]
        if len(message) >= 4 and not size:
            raise ClientHelloError("the ClientHello is empty")
        position += 5 + length
        if position > len(data):
            return None
    raise ClientHelloError(f"the ClientHello spans more than {MAX_RECORDS} TLS records")


def _parse_server_name(content: bytes) -> str:
    names = _Reader(_Reader(content).vector(2, last=True))
    found = b""
    while names.left:
        kind = names.number(1)
        name = names.vector(2)
        if kind == 0:
            if found or not _NAME.fullmatch(name) or len(name) > 254:
                raise ClientHelloError("the server name is malformed")
            found = name
    return found.decode("ascii").lower().removesuffix(".")


def _parse_protocols(content: bytes) -> tuple[bytes, ...]:
    names = _Reader(_Reader(content).vector(2, last=True))
    found = []
    while names.left:
        found.append(names.vector(1))
    return tuple(found)


class _Reader:
    """Takes fields off the front. Raises ClientHelloError where there is too little."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._position = 0

    @property
    def left(self) -> int:
        return len(self._data) - self._position

    def take(self, size: int) -> bytes:
        if size > self.left:
            raise ClientHelloError("the ClientHello is cut short")
        self._position += size
        return self._data[self._position - size : self._position]

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size), "big")

    def vector(self, size: int, *, last: bool = False) -> bytes:
        content = self.take(self.number(size))
        if last and self.left:
            raise ClientHelloError("something follows the end of an extension")
        return content
