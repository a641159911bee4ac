"""What a run has shown so far, as the functions that expectations are made of. Pure."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping

from netlab.behavior import ModelError
from netlab.expressions import ExpressionError, Function
from netlab.model import Topology
from netlab.prediction import predict_outcome, simple_path
from netlab.timeline import (
    Event,
    LatencyMeasured,
    MappingBorn,
    MappingDied,
    PacketDropped,
    PathChanged,
    ProgramEnded,
    ProgramOutput,
)

FUNCTIONS: Mapping[str, tuple[int, int]] = {
    "path": (2, 2),
    "expected_path": (2, 2),
    "latency_ms": (2, 2),
    "output": (1, 1),
    "ended": (1, 1),
    "status": (1, 1),
    "drops": (0, 2),
    "mappings": (1, 1),
}
"""The functions and how many arguments they take."""

NAME_ARGUMENTS: Mapping[str, tuple[str, ...]] = {
    "path": ("program", ""),
    "expected_path": ("place", "place"),
    "latency_ms": ("program", ""),
    "output": ("program",),
    "ended": ("program",),
    "status": ("program",),
    "drops": ("place", ""),
    "mappings": ("nat",),
}
"""What the arguments name, for checks before a run."""

# A program that prints without end must not fill the memory; expectations are about the last.
_MAX_LINES = 10_000


class Observations:
    """Feed every event of a timeline to `add`; `functions` then answer."""

    def __init__(self, topology: Topology) -> None:
        self._topology = topology
        self._paths: dict[tuple[str, str], str] = {}
        self._latencies: dict[tuple[str, str], float] = {}
        self._lines: dict[str, deque[str]] = {}
        self._statuses: dict[str, int] = {}
        self._drops: Counter[tuple[str, str]] = Counter()
        self._mappings: Counter[str] = Counter()
        self.functions: dict[str, Function] = {
            "path": self.path,
            "expected_path": self.expected_path,
            "latency_ms": self.latency_ms,
            "output": self.output,
            "ended": lambda program: program in self._statuses,
            "status": lambda program: self._statuses.get(program, "running"),
            "drops": self.drops,
            "mappings": lambda nat: self._mappings[nat],
        }

    def add(self, event: Event) -> None:
        """Take note of an event."""
        match event:
            case PathChanged():
                self._paths[event.host, event.peer] = event.path
            case LatencyMeasured():
                self._latencies[event.host, event.peer] = event.seconds
            case ProgramOutput():
                lines = self._lines.setdefault(event.program, deque(maxlen=_MAX_LINES))
                lines.append(event.line)
            case ProgramEnded():
                self._statuses[event.program] = event.status
            case PacketDropped():
                self._drops[event.where, event.reason] += 1
            case MappingBorn():
                self._mappings[event.nat] += 1
            case MappingDied():
                self._mappings[event.nat] -= 1

    def path(self, program: str, peer: str) -> str:
        """Return the kind of path that a program last reported, or ``none``."""
        words = self._paths.get((program, peer), "").split()
        return words[0].lower() if words else "none"

    def latency_ms(self, program: str, peer: str) -> float:
        """Return the last round trip that a program reported; infinite before the first."""
        return self._latencies.get((program, peer), float("inf")) * 1000

    def output(self, program: str) -> str:
        return "\n".join(self._lines.get(program, ()))

    def drops(self, where: str = "", reason: str = "") -> int:
        """Count the drops at a place (default: anywhere) for a reason (default: any)."""
        return sum(
            count
            for (place, cause), count in self._drops.items()
            if where in ("", place) and reason in ("", cause)
        )

    def expected_path(self, left: str, right: str) -> str:
        """Return what simple punching should come to between two hosts or NATs.

        Raises:
            ExpressionError: a name is unknown.
        """
        try:
            outcome = predict_outcome(self._topology, left, right)
        except ModelError as error:
            raise ExpressionError(f"expected_path(): {error}") from None
        return simple_path(outcome)
