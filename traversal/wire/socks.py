"""The part of SOCKS 5 that a server without authentication needs (RFC 1928).

greeting  5, number of methods (1), methods
choice    5, method (0: none needed; 255: none acceptable)
request   5, command (1: connect), 0, address type, address, port (2)
reply     5, status, 0, address type, bound address, port
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

_VERSION: Final = 5
_NO_AUTHENTICATION: Final = 0
_CONNECT: Final = 1
_IPV4, _NAME, _IPV6 = 1, 3, 4


class SocksError(Exception):
    """The client does not speak SOCKS 5, or wants what we have not; `status` goes in the reply."""

    def __init__(self, text: str, status: SocksStatus) -> None:
        super().__init__(text)
        self.status = status


class SocksStatus(IntEnum):
    """RFC 1928 6."""

    SUCCEEDED = 0
    FAILED = 1
    NOT_ALLOWED = 2
    HOST_UNREACHABLE = 4
    COMMAND_UNSUPPORTED = 7
    ADDRESS_UNSUPPORTED = 8


@dataclass(frozen=True, slots=True)
class SocksRequest:
    """Where to connect to; `host` is a name or an IP address in canonical text."""

    host: str
    port: int


def parse_greeting(data: bytes) -> int | None:
    """The greeting's length, None while it is incomplete. Raises SocksError."""
    if data and data[0] != _VERSION:
        raise SocksError("the client does not speak SOCKS 5", SocksStatus.FAILED)
    if len(data) < 2 or len(data) < 2 + data[1]:
        return None
    if _NO_AUTHENTICATION not in data[2 : 2 + data[1]]:
        raise SocksError("the client insists on authentication", SocksStatus.FAILED)
    return 2 + data[1]


def encode_choice(*, is_acceptable: bool) -> bytes:
    """The answer to a greeting."""
    return bytes([_VERSION, _NO_AUTHENTICATION if is_acceptable else 255])


def parse_request(data: bytes) -> tuple[SocksRequest, int] | None:
    """A request and its length, None while it is incomplete. Raises SocksError."""
    if len(data) < 5:
        return None
    version, command, _, kind, first = data[:5]
    if version != _VERSION:
        raise SocksError("the client does not speak SOCKS 5", SocksStatus.FAILED)
    if command != _CONNECT:
        raise SocksError("only CONNECT is served", SocksStatus.COMMAND_UNSUPPORTED)
    if kind == _NAME:
        start, length = 5, first
    elif kind in (_IPV4, _IPV6):
        start, length = 4, 4 if kind == _IPV4 else 16
    else:
        raise SocksError(f"address type {kind} is unknown", SocksStatus.ADDRESS_UNSUPPORTED)
    end = start + length
    if len(data) < end + 2:
        return None
    raw = data[start:end]
    if kind == _NAME:
        try:
            host = raw.decode("ascii")
        except UnicodeDecodeError:
            raise SocksError("a host name is ASCII", SocksStatus.ADDRESS_UNSUPPORTED) from None
        if not host or "\0" in host:
            raise SocksError("the host name is empty", SocksStatus.ADDRESS_UNSUPPORTED)
    else:
        host = str(ipaddress.ip_address(raw))
    return SocksRequest(host, int.from_bytes(data[end : end + 2], "big")), end + 2


def encode_reply(status: SocksStatus) -> bytes:
    """A reply; where we are bound to is nobody's business, so it is all zero."""
    return bytes([_VERSION, status, 0, _IPV4, 0, 0, 0, 0, 0, 0])
