"""Which of two paths is better: the points table of path selection specification 8.

The table is the one that stock nodes use, on purpose: two ends that choose alike end up on the same
path in both directions. What differs is the latency that goes in (the least of the last three
samples, not the last one), so that one delayed Pong does not move a peer's traffic; and that all
latencies up to 5 ms count as the same, since below it a percentage is mostly noise, which would
move traffic to and fro between two addresses of a near peer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, NamedTuple

from traversal.wire.address import Address, IPAddress, is_private

LOOPBACK_POINTS: Final = 50
LINK_LOCAL_POINTS: Final = 30
PRIVATE_POINTS: Final = 20
IPV6_POINTS: Final = 10
MIN_LEAD_POINTS: Final = 2
"""A lead of 1 over 0 (1 % of latency) is noise."""
GOOD_ENOUGH_SECONDS: Final = 0.005
"""Path selection specification 2: nobody looks for anything faster than this."""

EDGE_HOST: Final = "127.3.3.41"
"""The fictitious host that stands for "by the edge", as 127.3.3.40 does for DERP."""
_EDGE_VNI: Final = -1


class Path(NamedTuple):
    """A way to a peer: by UDP straight to an address (VNI 0), by UDP through a peer relay there
    (VNI above 0), or by the edge tunnel (`EDGE_PATH`)."""

    address: Address
    vni: int = 0

    @property
    def is_edge(self) -> bool:
        """Whether it is the edge tunnel and no UDP address."""
        return self.vni == _EDGE_VNI

    @property
    def rank(self) -> int:
        """Of a kind: direct beats a peer relay, and that the edge, whatever their latencies."""
        if self.is_edge:
            return 0
        return 1 if self.vni else 2

    def __str__(self) -> str:
        if self.is_edge:
            return "the edge"
        return f"{self.address} VNI {self.vni}" if self.vni else str(self.address)


EDGE_PATH: Final = Path(Address(EDGE_HOST, 0), _EDGE_VNI)


@dataclass(frozen=True, slots=True)
class Measured:
    """A path with what was measured on it. Latency 0 means unknown, MTU in bytes on the wire."""

    path: Path
    latency_seconds: float = 0.0
    wire_mtu_bytes: int = 0


def address_points(ip: IPAddress) -> int:
    """Points that an address has whatever its latency."""
    points = IPV6_POINTS if ip.version == 6 else 0
    if ip.is_loopback:
        return points + LOOPBACK_POINTS
    if ip.is_link_local:
        return points + LINK_LOCAL_POINTS
    return points + (PRIVATE_POINTS if is_private(ip) else 0)


def latency_points(one_seconds: float, other_seconds: float) -> tuple[int, int]:
    """Points of two latencies: the faster side gets what it saves in percent, the other none."""
    # Whole nanoseconds, because the table is defined by integer division.
    one, other = round(one_seconds * 1e9), round(other_seconds * 1e9)
    if one <= 0 or other <= 0:
        return 0, 0
    near = round(GOOD_ENOUGH_SECONDS * 1e9)
    one, other = max(one, near), max(other, near)
    if one < other:
        return 100 - 100 * one // other, 0
    if other < one:
        return 0, 100 - 100 * other // one
    return 0, 0


def is_better(one: Measured | None, other: Measured | None) -> bool:
    """Whether traffic should move from `other`, which works, to `one`, which just answered.

    Not a total order: with three near-equal paths the outcome depends on arrival.
    """
    if one is not None and other is not None and one.path == other.path:
        return one.wire_mtu_bytes > other.wire_mtu_bytes
    if other is None:
        return True
    if one is None:
        return False
    if one.path.rank != other.path.rank:
        return one.path.rank > other.path.rank
    one_latency, other_latency = latency_points(one.latency_seconds, other.latency_seconds)
    one_points = one_latency + address_points(one.path.address.ip)
    other_points = other_latency + address_points(other.path.address.ip)
    if other_points == 0 and one_points < MIN_LEAD_POINTS:
        return False
    return one_points > other_points
