"""Peers that have only IPv4, reached from a network that has only IPv6 (RFC 7050, RFC 6052).

A NAT64 maps all of IPv4 into an IPv6 prefix. Which one, nobody announces to applications, but the
name ipv4only.arpa has two well-known IPv4 addresses and no IPv6 address: a DNS64 makes some up, and
where the IPv4 address stands in them tells the prefix. With it, any IPv4 address becomes an IPv6
address that we can send to.

Where the four bytes of IPv4 stand, by length of the prefix (RFC 6052 2.2; u is a zero byte):

    bits    0   32  40  48  56  64  72  80  88  96  104 112 120
    /32     prefix  v4  v4  v4  v4  u
    /40     prefix      v4  v4  v4  u   v4
    /48     prefix          v4  v4  u   v4  v4
    /56     prefix              v4  u   v4  v4  v4
    /64     prefix                  u   v4  v4  v4  v4
    /96     prefix                                  v4  v4  v4  v4
"""

from __future__ import annotations

from collections.abc import Iterable
from ipaddress import IPv4Address, IPv6Address, IPv6Network
from typing import Final

from traversal.wire.address import Address, is_private, is_shared

DISCOVERY_NAME: Final = "ipv4only.arpa"
WELL_KNOWN_IPV4: Final = (IPv4Address("192.0.0.170"), IPv4Address("192.0.0.171"))
WELL_KNOWN_PREFIX: Final = IPv6Network("64:ff9b::/96")
PREFIX_LENGTHS: Final = (32, 40, 48, 56, 64, 96)

MAX_ANSWERS: Final = 64
"""AAAA records looked at: an honest DNS64 gives two per prefix, and a network has few."""
MAX_PREFIXES: Final = 4
"""Each prefix is one more address to try per IPv4 address of a peer."""

_U_BYTE: Final = 8


def find_prefixes(answers: Iterable[IPv6Address]) -> tuple[IPv6Network, ...]:
    """The NAT64 prefixes behind the AAAA records of ipv4only.arpa, in the order of the answers.

    Empty if the network has no DNS64, whatever else the answers hold. An answer in which a
    well-known address stands in several places counts only for those prefixes that the other
    well-known address confirms (RFC 7050 3).
    """
    places = [_places(answer) for answer in list(answers)[:MAX_ANSWERS]]
    seen: dict[IPv6Network, set[IPv4Address]] = {}
    for by_prefix in places:
        for prefix, embedded in by_prefix.items():
            seen.setdefault(prefix, set()).add(embedded)
    found: dict[IPv6Network, None] = {}
    for by_prefix in places:
        for prefix in by_prefix:
            if len(by_prefix) == 1 or len(seen[prefix]) == len(WELL_KNOWN_IPV4):
                found[prefix] = None
    return tuple(found)[:MAX_PREFIXES]


def synthesize(prefix: IPv6Network, ipv4: IPv4Address) -> IPv6Address:
    """The IPv6 address by which a NAT64 reaches `ipv4`. Raises ValueError for other lengths."""
    _check_length(prefix)
    packed = bytearray(prefix.network_address.packed)
    for place, byte in zip(_bytes_of(prefix.prefixlen), ipv4.packed, strict=True):
        packed[place] = byte
    return IPv6Address(bytes(packed))


def extract(prefix: IPv6Network, address: IPv6Address) -> IPv4Address:
    """The IPv4 address inside an address of `prefix`; what follows it is ignored (RFC 6052 2.2).

    Raises ValueError for an address outside the prefix, for one whose byte u is not zero, and for
    a prefix of another length.
    """
    _check_length(prefix)
    if address not in prefix:
        raise ValueError(f"{address} is not in {prefix}")
    if prefix.prefixlen < 96 and address.packed[_U_BYTE]:
        raise ValueError(f"bits 64 to 71 of {address} are not zero, so it holds no IPv4 address")
    return IPv4Address(bytes(address.packed[place] for place in _bytes_of(prefix.prefixlen)))


def translate(addresses: Iterable[Address], prefixes: Iterable[IPv6Network]) -> list[Address]:
    """A peer's addresses as an IPv6-only host can use them: IPv4 ones through each prefix.

    Without prefixes nothing changes. IPv4 addresses that mean something only at the peer's site
    are left out: our NAT64 can't know them, and the well-known prefix must not carry them (RFC
    6052 3.1).
    """
    prefixes = tuple(prefixes)
    if not prefixes:
        return list(addresses)
    translated: list[Address] = []
    for address in addresses:
        ip = address.ip
        if isinstance(ip, IPv6Address):
            translated.append(address)
        elif not (is_private(ip) or is_shared(ip) or ip.is_loopback or ip.is_link_local):
            translated += [Address(str(synthesize(p, ip)), address.port) for p in prefixes]
    return translated


def _places(answer: IPv6Address) -> dict[IPv6Network, IPv4Address]:
    """Every prefix under which `answer` holds a well-known address."""
    found: dict[IPv6Network, IPv4Address] = {}
    for length in PREFIX_LENGTHS:
        prefix = IPv6Network((answer, length), strict=False)
        try:
            embedded = extract(prefix, answer)
        except ValueError:
            continue
        if embedded in WELL_KNOWN_IPV4:
            found[prefix] = embedded
    return found


def _bytes_of(length: int) -> list[int]:
    """The offsets of the four bytes of IPv4 after a prefix of `length` bits."""
    start = length // 8
    skips = [place for place in range(start, start + 5) if place != _U_BYTE]
    return skips[:4] if length < 96 else list(range(12, 16))


def _check_length(prefix: IPv6Network) -> None:
    if prefix.prefixlen not in PREFIX_LENGTHS:
        raise ValueError(
            f"{prefix} is no NAT64 prefix: its length must be one of 32, 40, 48, 56, 64 and 96"
        )
