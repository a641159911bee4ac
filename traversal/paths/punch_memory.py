"""What worked and what failed, per network and peer, so that the next attempt starts right."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final, TypeVar

from traversal.paths.punch_facts import Strategy

MAX_RECORDS: Final = 256
"""Pairs of network and peer, and networks; the one that was used longest ago goes first."""
FIRST_PAUSE_SECONDS: Final = 60.0
MAX_PAUSE_SECONDS: Final = 3600.0
"""Between attempts that fail: a minute, doubled each time. A NAT seldom changes its habits, but a
person may change the network behind the same fingerprint."""
REPEAT_SECONDS: Final = 2.0
"""After a success, so that a path that comes and goes does not make a stream of searches."""
INDUCED_PAUSE_SECONDS: Final = 3600.0
"""A stock peer gets at most eight calls full of guesses an hour (path selection S2)."""

_Key = TypeVar("_Key")
_Value = TypeVar("_Value")


@dataclass(frozen=True, slots=True)
class Record:
    """One pair's past: the strategy that led to a path last, failures since, when the last attempt
    ended and when another may begin (both monotonic seconds)."""

    worked: Strategy | None = None
    failures: int = 0
    ended_at: float = -math.inf
    allowed_at: float = -math.inf


class PunchMemory:
    """Shared by all peers of a node. `to_dict` and `from_dict` carry it over to its next life."""

    def __init__(self) -> None:
        self._records: dict[tuple[str, bytes], Record] = {}
        self._lifetimes: dict[str, float] = {}

    def lifetime(self, fingerprint: str) -> float | None:
        """How many seconds a network's NAT keeps an idle mapping, if that was measured."""
        return self._lifetimes.get(fingerprint)

    def note_lifetime(self, fingerprint: str, seconds: float) -> None:
        """It was measured."""
        _put(self._lifetimes, fingerprint, seconds)

    def to_dict(self) -> dict[str, object]:
        """What is worth keeping, for JSON: strategies that worked, and lifetimes of mappings.

        Pauses after failures end with the process: a person who starts it anew wants to see it try.
        """
        worked: dict[str, dict[str, str]] = {}
        for (fingerprint, peer), record in self._records.items():
            if record.worked is not None:
                worked.setdefault(fingerprint, {})[peer.hex()] = record.worked.value
        return {"worked": worked, "lifetimes": dict(self._lifetimes)}

    @classmethod
    def from_dict(cls, data: object) -> PunchMemory:
        """From what `to_dict` made; whatever can't be read is left out."""
        memory = cls()
        if not isinstance(data, dict):
            return memory
        worked, lifetimes = data.get("worked"), data.get("lifetimes")
        for fingerprint, peers in worked.items() if isinstance(worked, dict) else ():
            for peer, name in peers.items() if isinstance(peers, dict) else ():
                try:
                    record = Record(Strategy(name))
                    _put(memory._records, (fingerprint, bytes.fromhex(peer)), record)
                except ValueError:
                    continue
        for fingerprint, seconds in lifetimes.items() if isinstance(lifetimes, dict) else ():
            if isinstance(seconds, int | float) and seconds >= 0:
                memory.note_lifetime(fingerprint, float(seconds))
        return memory

    def recall(self, fingerprint: str, peer: bytes) -> Record:
        """The past of a pair, empty if there is none."""
        return self._records.get((fingerprint, peer), Record())

    def note_success(self, fingerprint: str, peer: bytes, strategy: Strategy, now: float) -> None:
        """A path was found."""
        pause = INDUCED_PAUSE_SECONDS / 8 if strategy is Strategy.INDUCED else REPEAT_SECONDS
        _put(self._records, (fingerprint, peer), Record(strategy, 0, now, now + pause))

    def note_failure(self, fingerprint: str, peer: bytes, strategy: Strategy, now: float) -> None:
        """An attempt ended without a path."""
        record = self.recall(fingerprint, peer)
        pause = min(MAX_PAUSE_SECONDS, FIRST_PAUSE_SECONDS * 2 ** min(record.failures, 10))
        if strategy is Strategy.INDUCED:
            pause = INDUCED_PAUSE_SECONDS
        record = Record(record.worked, record.failures + 1, now, now + pause)
        _put(self._records, (fingerprint, peer), record)


def _put(table: dict[_Key, _Value], key: _Key, value: _Value) -> None:
    """Note it as the last one; beyond the bound the first one goes."""
    table.pop(key, None)
    if len(table) >= MAX_RECORDS:
        del table[next(iter(table))]
    table[key] = value
