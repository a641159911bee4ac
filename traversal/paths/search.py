"""When a search (a Ping to every candidate and a CallMeMaybe) is due, and how wide it is."""

from __future__ import annotations

import math
from typing import Final

SEARCH_SECONDS: Final = 5.0
UPGRADE_SECONDS: Final = 60.0
"""Both: path selection specification 2."""
WIDEN_SCOPE_SECONDS: Final = 5.0
"""Searching this long without success, addresses of foreign private networks are tried too."""
FORCED_SEARCH_SECONDS: Final = 2.0
"""Least time between two searches that doubt starts at once, without the usual spacing."""


class SearchSchedule:
    """The times of one peer's searches, monotonic seconds."""

    def __init__(self) -> None:
        self._searched_at = -math.inf
        self._allowed_at = -math.inf
        self._force_allowed_at = -math.inf
        self._failing_since = math.inf

    def next_deadline(self) -> float:
        """When the next ordinary search may begin."""
        return self._allowed_at

    def take(self, now: float, *, is_forced: bool) -> bool:
        """Whether a search may begin now; if so it counts as begun."""
        if is_forced:
            if now < self._force_allowed_at:
                return False
            self._force_allowed_at = now + FORCED_SEARCH_SECONDS
        elif now < self._allowed_at:
            return False
        self._searched_at = now
        self._allowed_at = now + SEARCH_SECONDS
        self.handle_failing(now)
        return True

    def handle_called(self, now: float) -> None:
        """A CallMeMaybe of the peer made us ping everything."""
        self._searched_at = now

    def handle_failing(self, now: float) -> None:
        """There is no trusted direct path, or none since `now`."""
        self._failing_since = min(self._failing_since, now)

    def handle_success(self) -> None:
        """There is a trusted direct path."""
        self._failing_since = math.inf

    def restart(self, now: float) -> None:
        """Begin anew: a search may start at once, with the narrow scope."""
        self._failing_since = now
        self._allowed_at = now

    def is_wide(self, now: float) -> bool:
        """Whether the search has failed for so long that unlikely addresses are worth a try."""
        return now - self._failing_since >= WIDEN_SCOPE_SECONDS

    def wants_upgrade(self, now: float) -> bool:
        """Whether a good path has been used for so long that a better one may have come up."""
        return now - self._searched_at >= UPGRADE_SECONDS
