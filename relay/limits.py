"""Token buckets, connection counts and the accept limiter. Pure: `now` is handed in.

Times are monotonic seconds; amounts are bytes for clients (DERP specification 9) and connections
for the accept limiter.
"""

from __future__ import annotations

from dataclasses import dataclass

from traversal.wire.address import source_of


class TokenBucket:
    """A bucket that starts full, refills continuously, and may go into debt.

    Debt is what lets a relay charge after the fact: it takes what it has read already, and reads
    nothing more before `ready_at`. The long-term rate is exact, and one charge of any size
    passes.
    """

    __slots__ = ("_level", "_updated", "burst", "rate")

    def __init__(self, rate: float, burst: float, now: float) -> None:
        """`rate` per second and `burst`, both above zero."""
        if rate <= 0 or burst <= 0:
            raise ValueError("a token bucket needs a rate and a burst above zero")
        self.rate = rate
        self.burst = burst
        self._level = float(burst)
        self._updated = now

    def level(self, now: float) -> float:
        """What is in the bucket; negative is debt. A clock that steps back refills nothing."""
        if now > self._updated:
            self._level = min(self.burst, self._level + (now - self._updated) * self.rate)
            self._updated = now
        return self._level

    def take(self, now: float, amount: float) -> bool:
        """Charge `amount` whatever is there. True if no debt remains: go on reading."""
        self._level = self.level(now) - amount
        return self._level >= 0

    def try_take(self, now: float, amount: float) -> bool:
        """Charge `amount` only if all of it is there."""
        if self.level(now) < amount:
            return False
        self._level -= amount
        return True

    def ready_at(self, now: float) -> float:
        """When the debt is paid: `now` if there is none."""
        level = self.level(now)
        return now if level >= 0 else now - level / self.rate


@dataclass(frozen=True, slots=True)
class AcceptStatistics:
    """What the accept limiter let in and shed so far, in connections."""

    accepted: int
    rejected: int


class AcceptLimiter:
    """Bounds accepted connections per second. Over the limit a connection is to be closed at
    once, without a byte; serving goes on."""

    __slots__ = ("_accepted", "_bucket", "_rejected")

    def __init__(self, rate_per_second: float | None, burst: int, now: float) -> None:
        """No rate means no limit."""
        self._accepted = 0
        self._rejected = 0
        self.configure(rate_per_second, burst, now)

    def configure(self, rate_per_second: float | None, burst: int, now: float) -> None:
        """Change the limit; the bucket is full again."""
        self._bucket = None if rate_per_second is None else TokenBucket(rate_per_second, burst, now)

    def admit(self, now: float) -> bool:
        """Whether the connection that was just accepted may stay."""
        if self._bucket is None or self._bucket.try_take(now, 1):
            self._accepted += 1
            return True
        self._rejected += 1
        return False

    def statistics(self) -> AcceptStatistics:
        """Counts since the start."""
        return AcceptStatistics(self._accepted, self._rejected)


class ConnectionCounter:
    """Counts open connections, in all and per source.

    Memory is bounded by the connections that are open: a source is forgotten when its last
    connection closes. The limits may be changed at any time; they count for new connections.
    """

    def __init__(self, limit: int, limit_per_source: int | None) -> None:
        self.limit = limit
        self.limit_per_source = limit_per_source
        self.total = 0
        self._per_source: dict[str, int] = {}

    def refusal(self, host: str) -> str | None:
        """Count one more connection from an IP address, or say in plain words why not.

        Each None is to be followed by one `remove` of the same host.
        """
        if self.total >= self.limit:
            return f"the relay has {self.total} connections and limits.connections is {self.limit}"
        source = source_of(host)
        count = self._per_source.get(source, 0)
        if self.limit_per_source is not None and count >= self.limit_per_source:
            return (
                f"{source} has {count} connections and "
                f"limits.connections_per_ip is {self.limit_per_source}"
            )
        self._per_source[source] = count + 1
        self.total += 1
        return None

    def remove(self, host: str) -> None:
        """Forget one connection that was counted."""
        source = source_of(host)
        self.total -= 1
        self._per_source[source] -= 1
        if not self._per_source[source]:
            del self._per_source[source]

    def sources(self) -> int:
        """How many sources have connections."""
        return len(self._per_source)
