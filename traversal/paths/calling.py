"""When to send a CallMeMaybe: at most one per 5 s and peer, never empty, never from a stale list.

A list older than 27 s is refreshed first. The refresh may take as long as a net check (5 s, when
UDP is blocked), so after one second the stale list goes out rather than none.

After a rebind what was called before is void, so the first call with a fresh list does not wait for
the spacing, however recent the last call is: without it, moving would cost up to 5 s by the relay
towards a stock node, which pings nobody who did not call. Rebinds that follow each other within
5 s have that privilege once.
"""

from __future__ import annotations

import math
from enum import Enum
from typing import Final

from traversal.wire.address import Address

FRESH_SECONDS: Final = 27.0
MIN_INTERVAL_SECONDS: Final = 5.0
REFRESH_PATIENCE_SECONDS: Final = 1.0


class Call(Enum):
    """What is to be done now."""

    NOTHING = 0
    REFRESH = 1
    SEND = 2


class Caller:
    """The CallMeMaybe schedule towards one peer."""

    def __init__(self) -> None:
        self.own_addresses: tuple[Address, ...] = ()
        self._refreshed_at = -math.inf
        self._allowed_at = -math.inf
        self._wanted_at = math.inf
        self._patience_ends_at = math.inf
        self._is_free = False
        self._free_allowed_at = -math.inf

    def set_own_addresses(self, addresses: tuple[Address, ...], now: float) -> bool:
        """A completed refresh; returns whether the list changed as a set."""
        has_changed = set(addresses) != set(self.own_addresses)
        self.own_addresses = addresses
        self._refreshed_at = now
        if self._patience_ends_at != math.inf:
            self._patience_ends_at = now
        return has_changed

    def forget_freshness(self) -> None:
        """Our address may have changed: what we know of it counts as old."""
        self._refreshed_at = -math.inf

    def handle_rebind(self, now: float) -> None:
        """Our address changed: the list is old, and the next fresh one may leave at once."""
        self.forget_freshness()
        if now >= self._free_allowed_at:
            self._free_allowed_at = now + MIN_INTERVAL_SECONDS
            self._is_free = True

    def want(self, now: float) -> None:
        """Ask for a CallMeMaybe as soon as the spacing allows."""
        self._wanted_at = min(self._wanted_at, now if self._is_free else max(now, self._allowed_at))

    def repeat(self, now: float) -> None:
        """The relay connection is a new one: what was called by the old may be lost with it."""
        self._allowed_at = now
        self.want(now)

    def next_deadline(self) -> float:
        """When to poll; infinity for never."""
        return self._wanted_at if self._patience_ends_at == math.inf else self._patience_ends_at

    def poll(self, now: float) -> Call:
        """What to do now; SEND and REFRESH are said once."""
        if now >= self._patience_ends_at:
            is_fresh = now - self._refreshed_at <= FRESH_SECONDS
            if is_fresh or now >= self._allowed_at:
                return self._send(now)
            self._patience_ends_at = self._allowed_at
        if now < self._wanted_at or self._patience_ends_at != math.inf:
            return Call.NOTHING
        if now - self._refreshed_at <= FRESH_SECONDS:
            return self._send(now)
        self._wanted_at = math.inf
        self._patience_ends_at = now + REFRESH_PATIENCE_SECONDS
        return Call.REFRESH

    def _send(self, now: float) -> Call:
        self._wanted_at = self._patience_ends_at = math.inf
        if not self.own_addresses:
            return Call.NOTHING
        self._allowed_at = now + MIN_INTERVAL_SECONDS
        if now - self._refreshed_at <= FRESH_SECONDS:
            self._is_free = False
        return Call.SEND
