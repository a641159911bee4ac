"""What names resolve to on an IPv6-only network behind a NAT64 (RFC 6147, RFC 7050). Pure."""

from __future__ import annotations

from collections.abc import Sequence

from netlab.addresses import NAT64_PREFIX
from netlab.drops import Address

IPV4_ONLY_NAME = "ipv4only.arpa"
"""The name whose AAAA records reveal a NAT64's prefix (RFC 7050)."""
IPV4_ONLY: tuple[Address, ...] = (bytes((192, 0, 0, 170)), bytes((192, 0, 0, 171)))

_PREFIX = NAT64_PREFIX.network_address.packed[:12]


def synthesize(addresses: Sequence[Address]) -> tuple[Address, ...]:
    """Return a name's packed addresses for an IPv6-only host: as they are if there is an IPv6 one,
    else the IPv4 ones in 64:ff9b::/96."""
    if any(len(address) == 16 for address in addresses):
        return tuple(addresses)
    return tuple(_PREFIX + address for address in addresses)
