"""What worked and what failed, per network and peer, so that the next attempt starts right."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

from traversal.paths.punch_facts import Strategy

MAX_RECORDS: Final = 256
"""Pairs of network and peer; the one that was used longest ago goes first."""
FIRST_PAUSE_SECONDS: Final = 60.0
MAX_PAUSE_SECONDS: Final = 3600.0
"""Between attempts that fail: a minute, doubled each time. A NAT seldom changes its habits, but a
person may change the network behind the same fingerprint."""
REPEAT_SECONDS: Final = 2.0
"""After a success, so that a path that comes and goes does not make a stream of searches."""
INDUCED_PAUSE_SECONDS: Final = 3600.0
"""A stock peer gets at most eight calls full of guesses an hour (path selection S2)."""


@dataclass(frozen=True, slots=True)
class Record:
    """One pair's past: the strategy that led to a path last, failures since, when the last attempt
    ended and when another may begin (both monotonic seconds)."""

    worked: Strategy | None = None
    failures: int = 0
    ended_at: float = -math.inf
    allowed_at: float = -math.inf


class PunchMemory:
    """Shared by all peers of a node."""

    def __init__(self) -> None:
        self._records: dict[tuple[str, bytes], Record] = {}

    def recall(self, fingerprint: str, peer: bytes) -> Record:
        """The past of a pair, empty if there is none."""
        return self._records.get((fingerprint, peer), Record())

    def note_success(self, fingerprint: str, peer: bytes, strategy: Strategy, now: float) -> None:
        """A path was found."""
        pause = INDUCED_PAUSE_SECONDS / 8 if strategy is Strategy.INDUCED else REPEAT_SECONDS
        self._put(fingerprint, peer, Record(strategy, 0, now, now + pause))

    def note_failure(self, fingerprint: str, peer: bytes, strategy: Strategy, now: float) -> None:
        """An attempt ended without a path."""
        record = self.recall(fingerprint, peer)
        pause = min(MAX_PAUSE_SECONDS, FIRST_PAUSE_SECONDS * 2 ** min(record.failures, 10))
        if strategy is Strategy.INDUCED:
            pause = INDUCED_PAUSE_SECONDS
        record = Record(record.worked, record.failures + 1, now, now + pause)
        self._put(fingerprint, peer, record)

    def _put(self, fingerprint: str, peer: bytes, record: Record) -> None:
        self._records.pop((fingerprint, peer), None)
        if len(self._records) >= MAX_RECORDS:
            del self._records[next(iter(self._records))]
        self._records[fingerprint, peer] = record
