"""Which region's relay is our home: netcheck specification 8, with pins and bans.

The home should not wander: peers have to learn where it went. So the best region of the last five
minutes must beat the present home clearly, by 10 ms and by a third.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

HISTORY_SECONDS: Final = 305.0
HISTORY_REPORTS: Final = 16
"""As many as that time holds at the usual pace; a network that flaps makes more."""
ABSOLUTE_LEAD_NANOSECONDS: Final = 10_000_000
HEARD_SECONDS: Final = 8.0
KEEP_WITHOUT_DATA_SECONDS: Final = 120.0
"""Twice the relay's keep-alive."""
AVOID_SECONDS: Final = 60.0
"""A relay that is about to restart still answers for a while; so long it is no home."""


@dataclass(frozen=True, slots=True)
class HomePolicy:
    """What the operator wants: one region, if it can be reached; and regions never to use."""

    pinned: int = 0
    banned: frozenset[int] = frozenset()


class HomeChooser:
    """Remembers reports and chooses. Region IDs are positive, 0 is "none"."""

    def __init__(
        self, policy: HomePolicy | None = None, scores: Mapping[int, float] | None = None
    ) -> None:
        self.home = 0
        self._policy = policy or HomePolicy()
        self._scores = scores or {}
        self._history: deque[tuple[float, Mapping[int, float]]] = deque(maxlen=HISTORY_REPORTS)
        self._avoided_until: dict[int, float] = {}

    def set_scores(self, scores: Mapping[int, float]) -> None:
        """The factors of another relay map, for latencies measured from now on and before."""
        self._scores = scores

    def handle_report(
        self,
        latencies: Mapping[int, float],
        heard_at: Mapping[int, float],
        started_at: float,
        now: float,
    ) -> int:
        """Choose after a report that began at `started_at` found these latencies (seconds).

        `heard_at` is when a frame last came from each region's relay. The caller leaves out
        regions that may not be a home. Returns the chosen region, 0 if there is none.
        """
        self._avoided_until = {r: at for r, at in self._avoided_until.items() if now < at}
        usable = {r: s for r, s in latencies.items() if r not in self._policy.banned}
        self._history.append((now, usable))
        while self._history[0][0] < now - HISTORY_SECONDS:
            self._history.popleft()
        # Where nothing else answers, one that restarts is better than none.
        stable = {r: s for r, s in usable.items() if r not in self._avoided_until}
        if stable and self.home in self._avoided_until:
            self.home = 0
        self.home = self._choose(stable or usable, heard_at, started_at, now)
        return self.home

    def leave(self, region: int, now: float) -> int:
        """A region's relay is about to restart: the best of the others for a minute, if any."""
        self._avoided_until[region] = now + AVOID_SECONDS
        others = {r for _, latencies in self._history for r in latencies} - {*self._avoided_until}
        if region == self.home and others:
            self.home = min(others, key=lambda other: (self._best_recent(other), other))
        return self.home

    def _choose(
        self,
        latencies: Mapping[int, float],
        heard_at: Mapping[int, float],
        started_at: float,
        now: float,
    ) -> int:
        previous = self.home if self.home not in self._policy.banned else 0

        def is_heard(region: int, within: float) -> bool:
            at = heard_at.get(region)
            return at is not None and (at >= started_at or now - at <= within)

        pinned = self._policy.pinned
        if pinned in self._avoided_until:
            pinned = 0
        if pinned and (pinned in latencies or is_heard(pinned, HEARD_SECONDS)):
            return pinned
        if not latencies:
            return previous if is_heard(previous, KEEP_WITHOUT_DATA_SECONDS) else 0
        best = {region: self._best_recent(region) for region in latencies}
        new = min(best, key=lambda region: (best[region], region))
        if not previous or new == previous:
            return new
        if previous not in latencies and not is_heard(previous, HEARD_SECONDS):
            return new
        old = self._score(previous, latencies.get(previous, 0.0))
        is_clear = old - best[new] >= ABSOLUTE_LEAD_NANOSECONDS and best[new] <= old // 3 * 2
        return new if is_clear else previous

    def _best_recent(self, region: int) -> int:
        return min(
            self._score(region, latencies[region])
            for _, latencies in self._history
            if region in latencies
        )

    def _score(self, region: int, latency_seconds: float) -> int:
        # Whole nanoseconds, because the thresholds are defined by integer division.
        factor = self._scores.get(region, 1.0)
        return int(round(latency_seconds * 1e9) * (factor if factor > 0 else 1.0))
