"""Loss of a path, measured by its heartbeats: when it is bad, and when it has healed.

The two thresholds are far apart so that a path at the edge does not flap: it is left at 6 lost of
the last 16 and taken back after 16 answers in a row (8 s at the pace at which a doubtful path is
probed). At 10 % loss of round trips, leaving happens once in about 300 windows and coming back
takes half a minute; at 50 % it is left within 8 s, and coming back by chance has a probability of
one in 65 000 per try. (10 in a row was tried: a path of 50 % loss came back every 20 minutes.)
"""

from __future__ import annotations

from typing import Final

WINDOW: Final = 16
BAD_LOSSES: Final = 6
SUSPICIOUS_LOSSES: Final = 2
HEALED_RUN: Final = 16


class LossWindow:
    """The outcomes of the last 16 heartbeats on one path, as bits (1 is lost), newest lowest."""

    __slots__ = ("_bits", "_count", "_run")

    def __init__(self) -> None:
        self._bits = self._count = self._run = 0

    def record(self, *, is_answered: bool) -> None:
        """Note one more outcome."""
        self._bits = (self._bits << 1 | (not is_answered)) & (1 << WINDOW) - 1
        self._count = min(self._count + 1, WINDOW)
        self._run = self._run + 1 if is_answered else 0

    def clear(self) -> None:
        """Forget everything: the path died and is another one now, or was moved away from."""
        self._bits = self._count = self._run = 0

    @property
    def lost(self) -> int:
        """How many of the remembered heartbeats were lost."""
        return self._bits.bit_count()

    @property
    def ratio(self) -> float:
        """Lost heartbeats, 0.0 to 1.0; 0.0 before the first."""
        return self.lost / self._count if self._count else 0.0

    @property
    def is_suspicious(self) -> bool:
        """Time to look closer, that is more often."""
        return self.lost >= SUSPICIOUS_LOSSES

    @property
    def is_bad(self) -> bool:
        """A relay is likely better."""
        return self.lost >= BAD_LOSSES

    @property
    def is_healed(self) -> bool:
        """Good again after having been bad."""
        return self._run >= HEALED_RUN
