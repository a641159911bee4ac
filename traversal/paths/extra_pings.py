"""Pings beside searches and heartbeats: in answer to a Ping, and to look again at a candidate."""

from __future__ import annotations

import math
from typing import Final

from traversal.paths.candidates import LATENCY_SAMPLES, Candidate

PING_BACK_SECONDS: Final = 5.0
"""Least time between two Pings in answer to Pings from one address (P7); while a direct path is in
use, between any two. Without that two NATs that map by destination and filter nothing would have
the peers answer each other's Pings for ever, each from a mapping that the other has not seen."""
PING_BACKS_PER_SECOND: Final = 4.0
PING_BACKS_BURST: Final = 32.0
"""To all addresses of a peer together. A recorded Ping can be replayed from any number of forged
sources, each of which would get nearly twice what was sent in its name: a Pong and a Ping."""
ANSWERED_SECONDS: Final = 45.0
"""An address that answered so lately needs no Ping back where a path is in use."""
LOOK_AGAIN_SECONDS: Final = 0.3


class PingBacks:
    """Which Pings of the peer are answered by a Ping of ours (P7)."""

    def __init__(self) -> None:
        self._last_at = -math.inf
        self._budget = PING_BACKS_BURST

    def take(
        self, candidate: Candidate, settled: Candidate | None, now: float, *, is_active: bool
    ) -> bool:
        """Whether to ping `candidate`, from which a Ping came; `settled` is the trusted path that
        all traffic takes, if there is one."""
        if settled is not None:
            # Another port of the host that we send to is not a better path.
            is_same_host = candidate.path.address.host == settled.path.address.host
            if is_same_host or now - self._last_at < PING_BACK_SECONDS:
                return False
        if now - candidate.pinged_back_at < PING_BACK_SECONDS:
            return False
        has_answered = now - candidate.answered_at < ANSWERED_SECONDS
        if has_answered and (settled is not None or not is_active):
            return False
        earned = min(now - self._last_at, PING_BACKS_BURST) * PING_BACKS_PER_SECOND
        budget = min(self._budget + earned, PING_BACKS_BURST)
        if budget < 1:
            return False
        self._budget = budget - 1
        candidate.pinged_back_at = self._last_at = now
        return True


class SecondLooks:
    """Candidates that answered but were not taken, or soon left for another that answered, are
    measured twice more within a second.

    The first Pong of an address is often late: the network looks the neighbour up, or the relay's
    handshake is under way. Without a second look that one sample would decide for a minute.
    """

    def __init__(self) -> None:
        self._due: dict[Candidate, float] = {}

    def note(self, candidate: Candidate, now: float) -> None:
        """It answered, and another path stays in use."""
        if len(candidate.latencies) < LATENCY_SAMPLES:
            self._due[candidate] = now + LOOK_AGAIN_SECONDS

    def poll(self, now: float) -> list[Candidate]:
        """The candidates to ping now, each told once."""
        due = [candidate for candidate, at in self._due.items() if now >= at]
        for candidate in due:
            del self._due[candidate]
        return due

    def forget(self) -> None:
        """Nothing is to be compared any more."""
        self._due.clear()

    def next_deadline(self) -> float:
        """When `poll` has something; infinity for never."""
        return min(self._due.values(), default=math.inf)
