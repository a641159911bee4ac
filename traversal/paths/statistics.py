"""Snapshots of a peer's paths, for status pages, metrics and the verdict."""

from __future__ import annotations

import math
from dataclasses import dataclass

from traversal.paths.candidates import Candidate
from traversal.paths.effects import PathState, Route
from traversal.paths.scoring import Path


def none_if_never(at: float) -> float | None:
    """A time as a snapshot tells it: None instead of minus infinity."""
    return None if at == -math.inf else at


@dataclass(frozen=True, slots=True)
class CandidateStatistics:
    """One candidate, for status pages and the verdict. Times are monotonic; None is never."""

    path: Path
    is_configured: bool
    is_called: bool
    is_seen: bool
    pinged_at: float | None
    answered_at: float | None
    latency_seconds: float
    loss_ratio: float
    is_shelved: bool

    @classmethod
    def of(cls, candidate: Candidate) -> CandidateStatistics:
        """A snapshot of one candidate."""
        return cls(
            path=candidate.path,
            is_configured=candidate.is_configured,
            is_called=candidate.called_at is not None,
            is_seen=candidate.seen_at != -math.inf,
            pinged_at=none_if_never(candidate.pinged_at),
            answered_at=none_if_never(candidate.answered_at),
            latency_seconds=candidate.latency_seconds,
            loss_ratio=candidate.loss.ratio,
            is_shelved=candidate.is_shelved,
        )


@dataclass(frozen=True, slots=True)
class PeerStatistics:
    """A snapshot of one peer's paths."""

    state: PathState
    route: Route
    best: CandidateStatistics | None
    max_payload_bytes: int | None
    last_sent_at: float | None
    calls_sent: int
    calls_received: int
    relay_pongs: int
    foreign_pongs: int
    candidates: tuple[CandidateStatistics, ...]
    edge: CandidateStatistics | None = None
    """The way by the edge, if it was ever tried."""
