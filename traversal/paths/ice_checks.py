"""What an ICE agent remembers: an address of the peer, and a check under way."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum
from typing import Final

from traversal.wire.address import Address
from traversal.wire.ice_check import CheckRequest
from traversal.wire.ice_description import IceCandidate

MAX_SENDS: Final = 7
PATIENCE_FACTOR: Final = 79
"""RFC 8489 6.2.1: sent after 0, 1, 3, 7 ... 63 times the first wait, given up 16 times after."""


class PairState(Enum):
    """RFC 8445 6.1.2.6. No pair is Frozen: see `traversal.paths.ice`."""

    WAITING = "waiting"
    IN_PROGRESS = "in progress"
    SUCCEEDED = "succeeded"
    FAILED = "failed"


@dataclass(slots=True, eq=False)
class Pair:
    """Our socket and one address of the peer. Times are monotonic seconds.

    Attributes:
        local_priority: of our best candidate in the family of the address.
        check: the check under way, also one that nominates.
        is_nominated: the controlling peer wants this pair.
        heard_at: when a request or an answer last proved who is there.
        answered_at: when a check of ours was last answered: the peer's consent.
        mapped_address: where the peer sees our checks come from.
    """

    remote: IceCandidate
    local_priority: int
    state: PairState = PairState.WAITING
    check: Check | None = None
    is_nominated: bool = False
    heard_at: float = -math.inf
    answered_at: float = -math.inf
    latency_seconds: float | None = None
    mapped_address: Address | None = None

    @property
    def address(self) -> Address:
        """Where the peer is."""
        return self.remote.address

    def priority(self, *, is_controlling: bool) -> int:
        """RFC 8445 6.1.2.3; both agents come to the same number."""
        g, d = self.local_priority, self.remote.priority
        if not is_controlling:
            g, d = d, g
        return (min(g, d) << 32) + 2 * max(g, d) + (g > d)


@dataclass(slots=True, eq=False)
class Check:
    """A request that was sent to a pair's address, and its bytes, to be sent again."""

    request: CheckRequest
    datagram: bytes
    pair: Pair
    sent_at: float
    expires_at: float
    resend_at: float = math.inf
    repeats: int = 0
    _wait_seconds: float = 0.0

    def repeat(self, first_wait_seconds: float) -> None:
        """Send it again while no answer comes; a consent check is not."""
        self._wait_seconds = first_wait_seconds
        self.resend_at = self.sent_at + first_wait_seconds

    def note_repeated(self) -> None:
        """It was sent again; each wait is twice the one before."""
        self.repeats += 1
        self._wait_seconds *= 2
        if self.repeats < MAX_SENDS - 1:
            self.resend_at += self._wait_seconds
        else:
            self.resend_at = math.inf
