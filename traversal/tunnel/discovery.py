"""Where the edges are: listed addresses, or SRV records (edge tunnel specification 2)."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import trio

from traversal.tunnel.addresses import split_static
from traversal.tunnel.services import parse_place
from traversal.wire.address import Address
from traversal.wire.tunnel.errors import TunnelError

EDGE_PORT: Final = 7844
SRV_PREFIX: Final = "_v2-origintunneld._tcp."
LOOKUP_SECONDS: Final = 10.0


class DiscoveryError(Exception):
    """No address of an edge is known; the text says why."""


@dataclass(frozen=True, slots=True)
class EdgePlaces:
    """Where to look.

    Attributes:
        listed: `host:port`, by turns of the first and the second region.
        domain: whose SRV records name the regions, where nothing is listed.
    """

    listed: tuple[tuple[str, int], ...] = ()
    domain: str = ""


def parse_edge(text: str) -> tuple[str, int]:
    """`host`, `host:port`, `IPv4:port` or `[IPv6]:port`; the port is 7844 by default.

    Raises TunnelError.
    """
    try:
        host, port = parse_place(text)
    except TunnelError:
        raise TunnelError(f'edge: {text!r} is not "host" or "host:port"') from None
    return host, port or EDGE_PORT


async def discover(places: EdgePlaces) -> tuple[list[Address], list[Address]]:
    """The addresses of both regions, at least one in all. Raises DiscoveryError."""
    problems: list[str] = []
    with trio.move_on_after(LOOKUP_SECONDS) as scope:
        if places.listed:
            found = [await _resolve(host, port, problems) for host, port in places.listed]
            # One address of each name, as the reference does it, then the others.
            regions = split_static(
                [each[0] for each in found if each] + [a for each in found for a in each[1:]]
            )
        else:
            targets = await _look_up(places.domain)
            regions = ([], [])
            for number, (host, port) in enumerate(targets[:2]):
                regions[number].extend(await _resolve(host, port, problems))
    if scope.cancelled_caught:
        problems.append(f"no answer within {LOOKUP_SECONDS:.0f} s")
    elif any(regions):
        return regions
    raise DiscoveryError("no edge was found: " + "; ".join(problems or ["there are no addresses"]))


async def _resolve(host: str, port: int, problems: list[str]) -> list[Address]:
    try:
        found = await trio.socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        problems.append(f"{host}: {error.strerror or error}")
        return []
    addresses = dict.fromkeys(str(entry[4][0]) for entry in found)
    return [Address(text, port) for text in addresses if "%" not in text]


async def _look_up(domain: str) -> Sequence[tuple[str, int]]:
    # Imported late: dnspython costs a third of a second, and lists need none.
    import dns.asyncresolver
    import dns.exception

    name = SRV_PREFIX + domain
    try:
        answer = await dns.asyncresolver.resolve(name, "SRV")
    except (dns.exception.DNSException, OSError) as error:
        raise DiscoveryError(f"no edge was found: SRV records of {name}: {error}") from None
    # Lowest priority first, and within one the heaviest (RFC 2782).
    records = sorted(answer, key=lambda record: (record.priority, -record.weight))
    return [(record.target.to_text(omit_final_dot=True), record.port) for record in records]
