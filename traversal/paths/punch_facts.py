"""What the port search chose, spent and found: for the verdict and for status pages."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Strategy(Enum):
    """How to look for a direct path; the value is the code in verdicts."""

    PLAIN = "plain"
    PORT_MAPPING = "port-mapping"
    PREDICTED = "predicted"
    BIRTHDAY_HARD = "birthday-hard"
    BIRTHDAY_EASY = "birthday-easy"
    INDUCED = "induced"
    MUTUAL = "mutual"
    ASK = "ask"
    RELAY = "relay"


@dataclass(frozen=True, slots=True)
class PunchFacts:
    """The choice and the reason for it, and what the last or running attempt cost and led to.

    `attempts` counts all since the peer is known, `sockets`, `probes`, `calls` and `seconds` are of
    the last one. `failure` is a sentence, None unless the last attempt failed. `next_attempt_at` is
    monotonic seconds, None if none is due. `is_forbidden`: only the policy stands in the way.
    """

    strategy: Strategy = Strategy.PLAIN
    reason: str = "nothing was tried yet"
    attempts: int = 0
    is_running: bool = False
    has_succeeded: bool = False
    sockets: int = 0
    probes: int = 0
    calls: int = 0
    seconds: float = 0.0
    failure: str | None = None
    next_attempt_at: float | None = None
    is_forbidden: bool = False

    def cost(self) -> str:
        """What the last attempt cost, as a phrase."""
        parts = [f"{self.probes} probes in {self.seconds:.1f} s"]
        if self.sockets:
            parts.insert(0, f"{self.sockets} sockets")
        if self.calls:
            parts.append(f"{self.calls} calls by the relay")
        return ", ".join(parts)

    def to_dict(self) -> dict[str, object]:
        """Plain values for JSON."""
        return {
            "strategy": self.strategy.value,
            "reason": self.reason,
            "attempts": self.attempts,
            "is_running": self.is_running,
            "has_succeeded": self.has_succeeded,
            "sockets": self.sockets,
            "probes": self.probes,
            "calls": self.calls,
            "seconds": self.seconds,
            "failure": self.failure,
        }
