"""Ask the resolver whether the network has a NAT64, and by which prefixes (RFC 7050)."""

from __future__ import annotations

import socket
from ipaddress import IPv6Address, IPv6Network
from typing import Final

import trio

from traversal.io.marking import resolve
from traversal.paths.nat64 import DISCOVERY_NAME, find_prefixes

TIMEOUT_SECONDS: Final = 2.0


async def discover_prefixes() -> tuple[IPv6Network, ...]:
    """The NAT64 prefixes of this network; empty if there are none or the resolver is silent.

    At most 2 s. Ask where the host has a route for IPv6 and none for IPv4, and again after the
    network changed. The answer is no more trustworthy than the resolver; what is sent through it
    is what would be sent to the peer's IPv4 address, sealed alike.
    """
    with trio.move_on_after(TIMEOUT_SECONDS):
        try:
            answers = await resolve(DISCOVERY_NAME, None, socket.AF_INET6, socket.SOCK_DGRAM)
        except OSError:
            return ()
        return find_prefixes(IPv6Address(str(answer[4][0])) for answer in answers)
    return ()
