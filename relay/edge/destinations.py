"""Which addresses a connector may be asked to dial. Pure.

A connector dials whatever the edge names, loopback and cloud metadata included (edge tunnel
specification 5.6), so the edge decides. Never: unspecified, multicast, broadcast and reserved
addresses. Only where the operator allows the network: loopback, link-local, and the addresses
under which clouds hand out credentials. Everything else, private networks above all, is what
tunnels are for.

IPv6 has many spellings of an IPv4 address (mapped, compatible, translated, 6to4, Teredo, NAT64,
ISATAP): such an address must be allowed as itself and as the IPv4 address inside. IPv4 has as many
(decimal, octal, hexadecimal, fewer parts): only four decimal numbers are an address here, and a
name that another program could read as a number is refused. Other names are refused unless they
are allowed word for word, because only the connector knows what they lead to.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

_NAME: Final = re.compile(r"(?!-)[a-z0-9_-]{1,63}(?<!-)(\.(?!-)[a-z0-9_-]{1,63}(?<!-))*")
_NUMERIC_LABEL: Final = re.compile(r"[0-9]+|0x[0-9a-f]*")
"""As the last label it makes a URL's host an IPv4 address or an error (WHATWG URL 3.5)."""
_PORT: Final = re.compile(r"[0-9]{1,5}")

_NAT64_PREFIXES: Final = (
    ipaddress.IPv6Network("64:ff9b::/96"),
    ipaddress.IPv6Network("64:ff9b:1::/48"),
)
_TRANSLATED: Final = ipaddress.IPv6Network("::ffff:0:0:0/96")
_COMPATIBLE: Final = ipaddress.IPv6Network("::/96")

_NEVER: Final[tuple[tuple[Network, str], ...]] = (
    (ipaddress.IPv4Network("0.0.0.0/8"), "unspecified"),
    (ipaddress.IPv4Network("224.0.0.0/4"), "multicast"),
    (ipaddress.IPv4Network("240.0.0.0/4"), "reserved or broadcast"),
    (ipaddress.IPv6Network("::/128"), "unspecified"),
    (ipaddress.IPv6Network("ff00::/8"), "multicast"),
)
_UNLESS_ALLOWED: Final[tuple[tuple[Network, str], ...]] = (
    (ipaddress.IPv4Network("127.0.0.0/8"), "loopback"),
    (ipaddress.IPv6Network("::1/128"), "loopback"),
    (ipaddress.IPv4Network("169.254.0.0/16"), "link-local"),
    (ipaddress.IPv6Network("fe80::/10"), "link-local"),
    (ipaddress.IPv6Network("fec0::/10"), "site-local"),
    # Metadata services outside the link-local range: Amazon, Azure, Alibaba, Oracle.
    (ipaddress.IPv6Network("fd00:ec2::/32"), "a cloud's metadata service"),
    (ipaddress.IPv4Network("168.63.129.16/32"), "a cloud's metadata service"),
    (ipaddress.IPv4Network("100.100.100.200/32"), "a cloud's metadata service"),
    (ipaddress.IPv4Network("192.0.0.192/32"), "a cloud's metadata service"),
)


class DestinationError(ValueError):
    """A destination is malformed or not allowed; the text says which and why."""


@dataclass(frozen=True, slots=True)
class Destination:
    """An address or an (allowed) name, and a port from 1 to 65535."""

    host: Address | str
    port: int

    def __str__(self) -> str:
        if isinstance(self.host, ipaddress.IPv6Address):
            return f"[{self.host}]:{self.port}"
        return f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class DestinationPolicy:
    """What the operator allows beyond the ordinary.

    Attributes:
        networks: of loopback, link-local and metadata addresses that may be dialed.
        names: host names in lower case that may be dialed.
    """

    networks: Sequence[Network] = ()
    names: Collection[str] = ()

    def authorize(self, text: str) -> Destination:
        """Read `IPv4:port`, `[IPv6]:port` or `name:port`. Raises DestinationError."""
        host, port = _split(text)
        address = _maybe_address(host)
        if address is None:
            return Destination(self._authorize_name(host), port)
        for each in (address, *_embedded(address)):
            if problem := self._problem(each):
                raise DestinationError(f"{text!r} is not allowed as a destination: {problem}")
        return Destination(address, port)

    def _problem(self, address: Address) -> str:
        for network, what in _NEVER:
            if address in network:
                return f"{address} is {what}"
        for network, what in _UNLESS_ALLOWED:
            if address in network and not any(address in allowed for allowed in self.networks):
                return f"{address} is {what} (edge.allowed_destinations may allow it)"
        return ""

    def _authorize_name(self, host: str) -> str:
        name = host.lower().removesuffix(".")
        if len(name) > 253 or not _NAME.fullmatch(name):
            raise DestinationError(f"{host!r} is no IP address in the usual form, and no name")
        if _NUMERIC_LABEL.fullmatch(name.rpartition(".")[2]):
            raise DestinationError(f"{host!r} is an odd spelling of an IPv4 address")
        if name not in self.names:
            raise DestinationError(f"{host!r} is a name; give the IP address")
        return name


def _split(text: str) -> tuple[str, int]:
    host, colon, port = text.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
        if ":" not in host:
            raise DestinationError(f"{text!r} has brackets around what is no IPv6 address")
    elif ":" in host:
        raise DestinationError(f"{text!r} needs an IPv6 address in brackets, and a port")
    if not colon or not _PORT.fullmatch(port) or not 1 <= int(port) <= 65535:
        raise DestinationError(f"{text!r} has no port from 1 to 65535")
    return host, int(port)


def _maybe_address(host: str) -> Address | None:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return None
    if isinstance(address, ipaddress.IPv6Address) and address.scope_id is not None:
        raise DestinationError(f"{host!r} has a zone, which means something here only")
    return address


def _embedded(address: Address) -> Iterator[ipaddress.IPv4Address]:
    """The IPv4 addresses that an IPv6 address can be a spelling of."""
    if isinstance(address, ipaddress.IPv4Address):
        return
    low = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    if address.ipv4_mapped is not None:
        yield address.ipv4_mapped
    if address.sixtofour is not None:
        yield address.sixtofour
    if address.teredo is not None:
        yield from address.teredo
    # ::1 and :: are judged as themselves.
    if address in _COMPATIBLE and int(low) > 1:
        yield low
    if address in _TRANSLATED or any(address in prefix for prefix in _NAT64_PREFIXES):
        yield low
    if address in _NAT64_PREFIXES[1]:
        yield from _nat64_local_use(address)
    if int(address) >> 32 & 0xFDFFFFFF == 0x00005EFE:
        yield low  # ISATAP, RFC 5214 6.1


def _nat64_local_use(address: ipaddress.IPv6Address) -> Iterator[ipaddress.IPv4Address]:
    """Under 64:ff9b:1::/48 a prefix of /48, /56 or /64 may be in use (RFC 6052 2.2): the address
    is then cut in two around bits 64 to 71."""
    data = address.packed
    for start in (6, 7, 8):
        parts = bytes(data[i] for i in range(start, 16) if i != 8)[:4]
        yield ipaddress.IPv4Address(parts)
