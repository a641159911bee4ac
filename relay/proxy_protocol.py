"""Where a client behind a reverse proxy really comes from.

Two ways: the PROXY protocol, versions 1 and 2 (HAProxy's public specification), a header in front
of the first byte; and the X-Forwarded-For request header. Both count only from proxies that the
configuration trusts.

    version 1    "PROXY" SP ("TCP4"|"TCP6") SP source SP destination SP port SP port CR LF
                 "PROXY UNKNOWN" ... CR LF; 107 bytes at most
    version 2    signature (12) | version 2 << 4 | command (1) | family << 4 | transport (1)
                 length (2) | addresses | TLVs
"""

from __future__ import annotations

import ipaddress
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

_V1_MAX_LENGTH: Final = 107
_V2_SIGNATURE: Final = bytes.fromhex("0d0a0d0a000d0a515549540a")
_V2_HEADER: Final = struct.Struct("!12sBBH")

# The addresses take 36 bytes at most (216 for Unix sockets); the rest are TLVs that nobody here
# reads. The format allows 65535, real proxies stay below 1 KiB even with TLS details.
_V2_MAX_BODY: Final = 4096
_V2_LOCAL, _V2_PROXY = 0, 1
_V2_INET, _V2_INET6 = 1, 2


class ProxyProtocolError(ValueError):
    """What a trusted proxy sent first is not a PROXY header."""


@dataclass(frozen=True, slots=True)
class ProxyHeader:
    """A PROXY header.

    `source` is the client's address and port; None if the proxy speaks for itself (health
    checks) or does not know. `length` is how many bytes the header took.
    """

    source: tuple[str, int] | None
    length: int


def parse_proxy_header(data: bytes | bytearray) -> ProxyHeader | None:
    """Read the header at the start of `data`; None if more bytes are needed.

    At most 4112 bytes are ever needed. Raises ProxyProtocolError.
    """
    start = bytes(data[: len(_V2_SIGNATURE)])
    if start == _V2_SIGNATURE:
        return _parse_v2(bytes(data[: _V2_HEADER.size + _V2_MAX_BODY]))
    if start.startswith(b"PROXY "):
        return _parse_v1(bytes(data[:_V1_MAX_LENGTH]))
    if _V2_SIGNATURE.startswith(start) or b"PROXY ".startswith(start):
        return None
    raise ProxyProtocolError("the connection of a trusted proxy starts without a PROXY header")


def _parse_v1(data: bytes) -> ProxyHeader | None:
    end = data.find(b"\r\n")
    if end < 0:
        if len(data) >= _V1_MAX_LENGTH:
            raise ProxyProtocolError("a PROXY header of version 1 has no end within 107 bytes")
        return None
    try:
        words = data[:end].decode("ascii").split(" ")
    except UnicodeDecodeError:
        raise ProxyProtocolError("a PROXY header of version 1 is not ASCII") from None
    if words[1] == "UNKNOWN":
        return ProxyHeader(None, end + 2)
    if words[1] not in ("TCP4", "TCP6") or len(words) != 6:
        raise ProxyProtocolError("a PROXY header of version 1 needs TCP4 or TCP6 and four fields")
    version = 4 if words[1] == "TCP4" else 6
    source, _ = (_v1_address(text, version) for text in words[2:4])
    port, _ = (_v1_port(text) for text in words[4:6])
    return ProxyHeader((source, port), end + 2)


def _v1_address(text: str, version: int) -> str:
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        address = None
    if address is None or address.version != version:
        raise ProxyProtocolError("a PROXY header of version 1 has a malformed address")
    return str(address)


def _v1_port(text: str) -> int:
    # The grammar has no leading zero, sign or space, all of which int() would take.
    if text.isdigit() and str(int(text)) == text and int(text) <= 65535:
        return int(text)
    raise ProxyProtocolError("a PROXY header of version 1 has a malformed port")


def _parse_v2(data: bytes) -> ProxyHeader | None:
    if len(data) < _V2_HEADER.size:
        return None
    _, version_command, family_transport, length = _V2_HEADER.unpack_from(data)
    version, command = version_command >> 4, version_command & 15
    if version != 2 or command not in (_V2_LOCAL, _V2_PROXY):
        raise ProxyProtocolError(
            f"a PROXY header has version {version} and command {command}; "
            "known are version 2, commands 0 and 1"
        )
    if length > _V2_MAX_BODY:
        raise ProxyProtocolError(f"a PROXY header of {length} bytes is over the limit of 4096")
    total = _V2_HEADER.size + length
    if len(data) < total:
        return None
    body = data[_V2_HEADER.size : total]
    # Datagram and Unix families, and unspecified ones, carry no address of a TCP client: the
    # specification has the receiver take the connection's own address then.
    family = family_transport >> 4
    if command == _V2_LOCAL or family not in (_V2_INET, _V2_INET6):
        return ProxyHeader(None, total)
    width = 4 if family == _V2_INET else 16
    if length < 2 * width + 4:
        raise ProxyProtocolError("a PROXY header of version 2 is too short for its addresses")
    source = ipaddress.ip_address(body[:width])
    (port,) = struct.unpack_from("!H", body, 2 * width)
    return ProxyHeader((str(source), port), total)


class TrustedProxies:
    """The addresses whose word about a client's origin counts."""

    def __init__(self, networks: Iterable[ipaddress.IPv4Network | ipaddress.IPv6Network]) -> None:
        self._networks = tuple(networks)

    def __contains__(self, host: str) -> bool:
        address = _maybe_address(host)
        return address is not None and any(address in network for network in self._networks)

    def client_of(self, peer: str, forwarded_for: Sequence[str]) -> str:
        """The client's IP address for a connection from `peer`.

        `forwarded_for` are the values of all X-Forwarded-For headers, in order. The chain is read
        from the right, and the first address that is no trusted proxy is the client: what stands
        left of it the client may have written itself. A malformed entry ends the chain.
        """
        client = peer
        for entry in reversed([part for value in forwarded_for for part in value.split(",")]):
            if client not in self:
                break
            address = _maybe_address(_without_port(entry.strip()))
            if address is None:
                break
            client = str(address)
        return client


def _maybe_address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return None
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        return address.ipv4_mapped
    return address


def _without_port(text: str) -> str:
    if text.startswith("["):
        return text[1:].partition("]")[0]
    return text.partition(":")[0] if text.count(":") == 1 else text
