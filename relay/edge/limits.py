"""What visitors may take of the edge, and how much one tunnel may of it. Pure: `now` is handed in.

Three bounds on requests at one time: all together, of one tunnel, of one source. The last two are
parts of the first, so that neither a popular tunnel nor a hostile visitor takes the edge away from
the others. Rates are per tunnel: requests per second are refused above it, bytes are delayed.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Final
from uuid import UUID

from relay.limits import TokenBucket
from traversal.wire.address import source_of

RATE_BURST_SECONDS: Final = 2.0
"""A tunnel may take this many seconds' worth of its rates at once."""


class TooMuchError(Exception):
    """A request is one too many; `status` is what the visitor gets, the text is for the log."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


@dataclass(frozen=True, slots=True)
class RequestLimits:
    """At one time and per second; None is no limit.

    Attributes:
        requests: at one time; a WebSocket or TCP connection is one as long as it lasts.
    """

    requests: int = 20_000
    requests_per_tunnel: int = 10_000
    requests_per_source: int = 1_000
    tunnel_requests_per_second: float | None = None
    tunnel_bytes_per_second: float | None = None


@dataclass(slots=True)
class TunnelTraffic:
    """What went through one tunnel since it was first used."""

    active: int = 0
    most_active: int = 0
    requests: int = 0
    errors: int = 0
    """Requests that failed between edge and connector, or there."""
    retries: int = 0
    refused: int = 0
    by_status: Counter[int] = field(default_factory=Counter)
    bytes_in: int = 0
    """From visitors."""
    bytes_out: int = 0
    tcp_active: int = 0
    tcp_total: int = 0
    udp_active: int = 0
    udp_total: int = 0
    _requests_bucket: TokenBucket | None = None
    _bytes_bucket: TokenBucket | None = None


class Meter:
    """Counts and bounds. Every `enter` that returns is followed by one `leave`."""

    def __init__(self, limits: RequestLimits) -> None:
        self.limits = limits
        self.active = 0
        self.tunnels: dict[UUID, TunnelTraffic] = {}
        self._sources: Counter[str] = Counter()

    def enter(self, tunnel: UUID, source: str, now: float) -> TunnelTraffic:
        """One more request. Raises TooMuchError."""
        limits = self.limits
        traffic = self.traffic(tunnel, now)
        origin = source_of(source)
        problem = ""
        status = 503
        if self.active >= limits.requests:
            problem = f"{self.active} requests are under way, which is the edge's limit"
        elif traffic.active >= limits.requests_per_tunnel:
            problem = f"{traffic.active} requests are under way, which is the tunnel's limit"
        elif self._sources[origin] >= limits.requests_per_source:
            status = 429
            problem = f"{origin} has {self._sources[origin]} requests under way, which is its limit"
        elif (bucket := traffic._requests_bucket) is not None and not bucket.try_take(now, 1):
            status = 429
            problem = f"the tunnel has more than {bucket.rate:g} requests per second"
        if problem:
            if not self._sources[origin]:
                del self._sources[origin]
            traffic.refused += 1
            raise TooMuchError(status, problem)
        self.active += 1
        self._sources[origin] += 1
        traffic.requests += 1
        traffic.active += 1
        traffic.most_active = max(traffic.most_active, traffic.active)
        return traffic

    def traffic(self, tunnel: UUID, now: float) -> TunnelTraffic:
        """The counts of a tunnel."""
        traffic = self.tunnels.get(tunnel)
        if traffic is None:
            traffic = self.tunnels[tunnel] = self._new_traffic(now)
        return traffic

    def leave(self, traffic: TunnelTraffic, source: str) -> None:
        """The request is over."""
        origin = source_of(source)
        self.active -= 1
        traffic.active -= 1
        self._sources[origin] -= 1
        if not self._sources[origin]:
            del self._sources[origin]

    def forget(self, tunnel: UUID) -> None:
        """A tunnel that is no longer known; what is under way on it still counts elsewhere."""
        self.tunnels.pop(tunnel, None)

    def _new_traffic(self, now: float) -> TunnelTraffic:
        limits = self.limits
        traffic = TunnelTraffic()
        if (rate := limits.tunnel_requests_per_second) is not None:
            traffic._requests_bucket = TokenBucket(rate, max(1.0, rate * RATE_BURST_SECONDS), now)
        if (rate := limits.tunnel_bytes_per_second) is not None:
            traffic._bytes_bucket = TokenBucket(rate, rate * RATE_BURST_SECONDS, now)
        return traffic


def charge(traffic: TunnelTraffic, size: int, now: float, *, inward: bool) -> float:
    """Count bytes that have been moved; returns how many seconds to wait before the next ones."""
    if inward:
        traffic.bytes_in += size
    else:
        traffic.bytes_out += size
    bucket = traffic._bytes_bucket
    if bucket is None or bucket.take(now, size):
        return 0.0
    return bucket.ready_at(now) - now
