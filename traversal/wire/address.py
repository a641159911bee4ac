"""A UDP address as every layer passes it: canonical text and a port, equal to a plain tuple.

`Address` is what `sendto` takes and what `recvfrom` gives (its first two items), so the data path
looks peers up by source address without building an object. On the wire an address is 18 bytes:
16 of IPv6 (IPv4 as `::ffff:a.b.c.d`) and a big-endian port (disco specification 4).
"""

from __future__ import annotations

import ipaddress
from typing import Final, NamedTuple

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address

ADDRESS_LENGTH: Final = 18
_V4_MAPPED: Final = bytes(10) + b"\xff\xff"
# An attacker has a whole /64 as easily as one IPv4 address; RFC 6177 gives even homes as much.
_IPV6_SOURCE_PREFIX: Final = 64


class Address(NamedTuple):
    """An IP address in canonical text, without zone, and a port (0 to 65535)."""

    host: str
    port: int

    @property
    def ip(self) -> IPAddress:
        """The address as an object, for questions about ranges."""
        return ipaddress.ip_address(self.host)

    @property
    def is_ipv6(self) -> bool:
        """True for IPv6; IPv4-mapped IPv6 never occurs, it is un-mapped on the way in."""
        return ":" in self.host

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if self.is_ipv6 else f"{self.host}:{self.port}"

    @classmethod
    def parse(cls, text: str) -> Address:
        """Read `1.2.3.4:5` or `[2001:db8::1]:5`. Raises ValueError."""
        host, colon, port = text.rpartition(":")
        if not colon or not (port.isascii() and port.isdigit()) or int(port) > 65535:
            raise ValueError(f"{text!r} is no address: it must read IP:PORT, or [IP]:PORT for IPv6")
        if host.startswith("[") and host.endswith("]"):
            return cls(str(ipaddress.IPv6Address(host[1:-1])), int(port))
        return cls(str(ipaddress.IPv4Address(host)), int(port))

    @classmethod
    def from_packed(cls, ip: bytes, port: int) -> Address:
        """From 4 or 16 bytes of address; IPv4-mapped IPv6 becomes IPv4."""
        if len(ip) == 16 and ip.startswith(_V4_MAPPED):
            ip = ip[12:]
        return cls(str(ipaddress.ip_address(ip)), port)


def encode_address(address: Address) -> bytes:
    """The 18 bytes of disco's address-port."""
    packed = address.ip.packed
    if len(packed) == 4:
        packed = _V4_MAPPED + packed
    return packed + address.port.to_bytes(2, "big")


def parse_address(data: bytes) -> Address:
    """Read exactly 18 bytes; the caller has checked the length."""
    return Address.from_packed(data[:16], int.from_bytes(data[16:18], "big"))


def is_private(ip: IPAddress) -> bool:
    """10/8, 172.16/12, 192.168/16 and fc00::/7.

    Not 100.64/10, which path scoring counts as public; nor, unlike `ip.is_private`, documentation
    ranges, which labs use for public addresses.
    """
    if ip.version == 4:
        value = int(ip)
        return value >> 24 == 10 or value >> 20 == 0xAC1 or value >> 16 == 0xC0A8
    return ip.packed[0] & 0xFE == 0xFC


def is_shared(ip: IPAddress) -> bool:
    """100.64/10, the space between a carrier's NAT and its customers (RFC 6598)."""
    return ip.version == 4 and int(ip) >> 22 == 0x191


def source_of(host: str) -> str:
    """What counts as one source: an IPv4 address, or the /64 of an IPv6 address.

    An IPv4-mapped IPv6 address is its IPv4 address; what is no address is its own source.
    """
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host
    if isinstance(address, ipaddress.IPv4Address):
        return host
    if address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    shift = 128 - _IPV6_SOURCE_PREFIX
    network = ipaddress.IPv6Address(int(address) >> shift << shift)
    return f"{network}/{_IPV6_SOURCE_PREFIX}"
