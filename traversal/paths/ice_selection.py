"""The pair that datagrams take, and whether the peer still consents (RFC 7675)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from traversal.paths.ice_checks import Pair
from traversal.paths.ice_effects import SelectedPair

CONSENT_SECONDS: Final = 5.0
CONSENT_SPREAD: Final = (0.8, 1.2)
CONSENT_EXPIRY_SECONDS: Final = 30.0
"""RFC 7675 5.1: asked every 5 s, give or take a fifth, and gone after 30 s of silence."""
AGGRESSIVE_SECONDS: Final = 5.0
"""Agents of RFC 5245 nominate every pair that works and mean the best; later nominations than
this mean that the peer has moved."""
DOUBT_SECONDS: Final = 1.0
"""A pair that leaves a consent check unanswered for so long loses against a live one."""


@dataclass(slots=True)
class Selection:
    """Times are monotonic seconds.

    Attributes:
        ask_at: when to ask for consent next.
        unanswered_since: when the first question without an answer was asked.
        has_rechecked: the other pairs are being checked, because this one is in doubt.
    """

    pair: Pair
    selected_at: float
    ask_at: float
    unanswered_since: float | None = None
    has_rechecked: bool = False

    @classmethod
    def make(cls, pair: Pair, now: float) -> Selection:
        """`pair` is used from now on. A pair that was proven long ago is asked at once."""
        return cls(pair, now, max(now, pair.answered_at + CONSENT_SECONDS))

    @property
    def expires_at(self) -> float:
        """When nothing may be sent any more, unless an answer comes."""
        return max(self.pair.answered_at, self.selected_at) + CONSENT_EXPIRY_SECONDS

    def look(self) -> SelectedPair:
        """For the application."""
        pair = self.pair
        return SelectedPair(
            pair.address, pair.remote.type, pair.latency_seconds, pair.mapped_address
        )

    def note_asked(self, now: float, fraction: float) -> None:
        """A consent check is sent; `fraction`, from 0 to 1, spreads the next one."""
        low, high = CONSENT_SPREAD
        self.ask_at = now + CONSENT_SECONDS * (low + (high - low) * fraction)
        if self.unanswered_since is None:
            self.unanswered_since = now

    def note_answered(self) -> None:
        """The peer consents."""
        self.unanswered_since = None
        self.has_rechecked = False

    def is_settled(self, now: float) -> bool:
        """Whether another nomination than this one's means that the peer has moved."""
        return now - self.selected_at > AGGRESSIVE_SECONDS
