"""Waiting between attempts: random, longer each time, short again after a success. Pure."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

BASE_SECONDS: Final = 1.0
CAP_SECONDS: Final = 30.0


class Backoff:
    """The n-th wait is uniform in [w/2, w], where w is the base doubled n times, up to a cap.

    Never near zero, unlike the reference's, which lets a connector dial hundreds of times a second
    where it has nowhere else to go (edge tunnel specification 2.4); and at half the cap all
    connectors of an edge that restarts still spread over half a minute.

    `draw` returns random numbers in [0, 1).

    Attributes:
        failures: in a row.
    """

    def __init__(
        self,
        draw: Callable[[], float],
        *,
        base_seconds: float = BASE_SECONDS,
        cap_seconds: float = CAP_SECONDS,
    ) -> None:
        self.failures = 0
        self._draw = draw
        self._base_seconds = base_seconds
        self._cap_seconds = cap_seconds

    def next_wait(self) -> float:
        """How long to wait after a failure, in seconds."""
        # The exponent is bounded, or the power overflows after days without a network.
        longest = min(self._cap_seconds, self._base_seconds * 2.0 ** min(self.failures, 32))
        self.failures += 1
        return longest * (1 + self._draw()) / 2

    def reset(self) -> None:
        """It worked."""
        self.failures = 0
