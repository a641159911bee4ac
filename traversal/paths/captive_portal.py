"""Is there a captive portal, a network that answers HTTP itself until somebody signs in?

Netcheck specification 9.2. Relays with plain HTTP are asked by IP address, so that a portal which
only forges DNS answers is not mistaken for one that intercepts, and each answer must repeat a
challenge that no portal knows of.
"""

from __future__ import annotations

import re
from ipaddress import IPv4Address
from typing import Final

from traversal.relay_map import RelayMap

MAX_CHECKS: Final = 4
"""Servers asked at once: one that is down must not hide the portal, more tell nothing new."""

_STATUS_LINE: Final = re.compile(rb"HTTP/\d(?:\.\d)? (\d{3})(?: .*)?")


def choose_servers(relay_map: RelayMap, preferred_region: int) -> list[IPv4Address]:
    """Whom to ask: nodes with plain HTTP and an IPv4 literal, the preferred region's first."""
    regions = sorted(
        relay_map.regions.values(), key=lambda r: (r.region_id != preferred_region, r.region_id)
    )
    chosen = [
        address
        for region in regions
        for node in region.nodes
        if node.can_port_80 and isinstance(address := node.dial_address(4), IPv4Address)
    ]
    return chosen[:MAX_CHECKS]


def encode_check(server: IPv4Address) -> bytes:
    """The request."""
    return (
        f"GET /generate_204 HTTP/1.1\r\nHost: {server}\r\n"
        f"X-Tailscale-Challenge: ts_{server}\r\nConnection: close\r\n\r\n"
    ).encode()


def is_portal(head: bytes, server: IPv4Address) -> bool | None:
    """Judge the head of an answer, up to the empty line: None when it is no HTTP at all."""
    status_line, *lines = head.split(b"\r\n")
    status = _STATUS_LINE.fullmatch(status_line)
    if status is None:
        return None
    headers = {}
    for line in lines:
        name, _, value = line.partition(b":")
        headers[name.strip().lower()] = value.strip()
    expected = f"response ts_{server}".encode()
    return status[1] != b"204" or headers.get(b"x-tailscale-response") != expected


def conclude(answers: list[bool | None]) -> bool | None:
    """One portal among the answers is one too many; without any answer nothing is known."""
    if True in answers:
        return True
    return False if False in answers else None
