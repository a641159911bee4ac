"""Keeping a found socket's mapping alive, at a pace that its NAT's idle timer demands.

Ordinary heartbeats stop 45 s after the last datagram, but finding the mapping again would cost a
whole search. A Ping and its Pong refresh both NATs, whichever direction they count.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Final

from traversal.wire.address import Address

DEFAULT_INTERVAL_SECONDS: Final = 18.0
"""Where nothing was measured: Linux and some clouds forget quiet flows after 30 s, and one Ping may
be lost on the way."""
MIN_INTERVAL_SECONDS: Final = 4.0
MAX_INTERVAL_SECONDS: Final = 100.0
"""NATs that keep mappings longer than RFC 4787's 120 s exist, but the peer's is not measured."""
SHARE_OF_LIFETIME: Final = 0.55
CHECK_SECONDS: Final = 0.7
MAX_CHECKS: Final = 3
MAX_IDLE_SECONDS: Final = 1800.0
"""After half an hour without traffic the socket is given up: 100 small packets were spent on it,
and a search costs as much."""


class KeepAlive:
    """When to ping through the found socket, and when it counts as lost."""

    def __init__(self, lifetime_seconds: float | None, now: float) -> None:
        self.interval_seconds = DEFAULT_INTERVAL_SECONDS
        self.set_lifetime(lifetime_seconds)
        self.is_lost = False
        self._used_at = now
        self._unanswered = 0
        self._ping_at = now + self.interval_seconds

    def set_lifetime(self, lifetime_seconds: float | None) -> None:
        """How long the NAT keeps an idle mapping was measured; counts from the next Pong on."""
        if lifetime_seconds is not None:
            wanted = lifetime_seconds * SHARE_OF_LIFETIME
            self.interval_seconds = max(MIN_INTERVAL_SECONDS, min(MAX_INTERVAL_SECONDS, wanted))

    def next_deadline(self) -> float:
        """When to call `poll`."""
        return math.inf if self.is_lost else self._ping_at

    def note_use(self, now: float) -> None:
        """There is traffic, or somebody wants the path."""
        self._used_at = now

    def handle_pong(self, now: float) -> None:
        """A Ping was answered."""
        self._unanswered = 0
        self._ping_at = now + self.interval_seconds

    def check(self, now: float) -> None:
        """The path is in doubt: find out at once."""
        self._ping_at = min(self._ping_at, now)

    def poll(self, now: float) -> bool:
        """Whether to ping now; afterwards `is_lost` may have become true."""
        if self.is_lost or now < self._ping_at:
            return False
        if self._unanswered >= MAX_CHECKS or now - self._used_at > MAX_IDLE_SECONDS:
            self.is_lost = True
            return False
        self._unanswered += 1
        self._ping_at = now + CHECK_SECONDS
        return True


@dataclass(slots=True, eq=False)
class FoundSocket:
    """An extra socket that became the path: its number, the peer's address, how the peer sees it,
    and the transactions of Pings that keep it alive."""

    socket: int
    remote: Address
    own_address: Address
    keep_alive: KeepAlive
    pings: set[bytes] = field(default_factory=set)
