"""What an ICE agent remembers: the peer's addresses, which to check next, and checks under way."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Final

from traversal.paths.ice_effects import CheckEnded, CheckStarted, IceEffect, SendStun
from traversal.wire.address import Address
from traversal.wire.ice_check import CheckRequest
from traversal.wire.ice_description import IceCandidate, IceCandidateType

MAX_PAIRS: Final = 100
"""RFC 8445 6.1.2.5."""
MAX_PEER_REFLEXIVE: Final = 16
"""A peer with more NATs than this in front of it replaces the oldest; so does one that moves."""
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
    """A request that was sent to a pair's address, and its bytes, to be sent again.

    `sends` counts all times that it was sent, in time or because the peer checked meanwhile.
    """

    request: CheckRequest
    datagram: bytes
    pair: Pair
    sent_at: float
    expires_at: float
    resend_at: float = math.inf
    sends: int = 1
    _wait_seconds: float = 0.0

    def repeat(self, first_wait_seconds: float) -> None:
        """Send it again while no answer comes; a consent check is not."""
        self._wait_seconds = first_wait_seconds
        self.resend_at = self.sent_at + first_wait_seconds

    def note_repeated(self) -> None:
        """It was sent again when that was due; each wait is twice the one before."""
        self.sends += 1
        self._wait_seconds *= 2
        if self.sends < MAX_SENDS:
            self.resend_at += self._wait_seconds
        else:
            self.resend_at = math.inf


class ChecksUnderWay:
    """The requests that await an answer; says so to the shell by effects."""

    def __init__(self, effects: list[IceEffect]) -> None:
        self._effects = effects
        self._checks: dict[bytes, Check] = {}

    def get(self, transaction_id: bytes) -> Check | None:
        """The check that an answer is for."""
        return self._checks.get(transaction_id)

    def start(self, check: Check) -> None:
        """Send it for the first time."""
        self._checks[check.request.transaction_id] = check
        self._effects.append(CheckStarted(check.request.transaction_id))
        self._effects.append(SendStun(check.datagram, check.pair.address))

    def send_again(self, check: Check) -> None:
        """Send it although that is not due."""
        check.sends += 1
        self._effects.append(SendStun(check.datagram, check.pair.address))

    def end(self, check: Check) -> None:
        """It was answered, or nobody waits for the answer any more."""
        del self._checks[check.request.transaction_id]
        if check.pair.check is check:
            check.pair.check = None
        self._effects.append(CheckEnded(check.request.transaction_id))

    def end_all(self, pair: Pair) -> None:
        """The pair is given up."""
        for check in [check for check in self._checks.values() if check.pair is pair]:
            self.end(check)

    def stop_repeating(self) -> None:
        """Answers still count, but no check is worth sending again."""
        for check in self._checks.values():
            check.resend_at = math.inf

    def next_deadline(self) -> float:
        """When to call `handle_time`."""
        return min(
            (min(check.resend_at, check.expires_at) for check in self._checks.values()),
            default=math.inf,
        )

    def handle_time(self, now: float) -> list[Pair]:
        """Repeat what is due; the pairs whose last check was not answered in time are returned.

        A consent check that stays unanswered says nothing here.
        """
        failed = []
        for check in list(self._checks.values()):
            if now >= check.expires_at:
                if check.pair.check is check:
                    failed.append(check.pair)
                self.end(check)
            elif now >= check.resend_at:
                check.note_repeated()
                self._effects.append(SendStun(check.datagram, check.pair.address))
        return failed


class CheckList:
    """The pairs of a session, and which of them to check next (RFC 8445 6.1.2, 6.1.4)."""

    def __init__(self) -> None:
        self.is_controlling = False
        self._pairs: dict[Address, Pair] = {}
        self._triggered: deque[Pair] = deque()

    def __iter__(self) -> Iterator[Pair]:
        return iter(list(self._pairs.values()))

    def __len__(self) -> int:
        return len(self._pairs)

    @property
    def is_full(self) -> bool:
        """Whether one has to go before another comes."""
        return len(self._pairs) >= MAX_PAIRS

    @property
    def has_triggered(self) -> bool:
        """Whether the peer's own checks call for one of ours."""
        return bool(self._triggered)

    def get(self, address: Address) -> Pair | None:
        """The pair with this address of the peer."""
        return self._pairs.get(address)

    def add(self, pair: Pair) -> None:
        """A pair with an address that no other has."""
        self._pairs[pair.address] = pair

    def remove(self, pair: Pair) -> None:
        """Forget a pair."""
        del self._pairs[pair.address]
        self.withdraw(pair)

    def trigger(self, pair: Pair, *, is_urgent: bool = False) -> None:
        """Check the pair before those that merely wait, and before all others if `is_urgent`."""
        if pair.state is PairState.FAILED:
            pair.state = PairState.WAITING
        if is_urgent:
            self.withdraw(pair)
            self._triggered.appendleft(pair)
        elif pair not in self._triggered:
            self._triggered.append(pair)

    def withdraw(self, pair: Pair) -> None:
        """A triggered check is not needed any more."""
        if pair in self._triggered:
            self._triggered.remove(pair)

    def maybe_next_triggered(self) -> Pair | None:
        """Take the triggered pair whose turn it is."""
        return self._triggered.popleft() if self._triggered else None

    def priority(self, pair: Pair) -> int:
        """What the pair is worth in our present role."""
        return pair.priority(is_controlling=self.is_controlling)

    def maybe_best(self, state: PairState, heard_since: float = -math.inf) -> Pair | None:
        """The best pair in a state, of those from which the peer was heard since a time."""
        found = [p for p in self if p.state is state and p.heard_at >= heard_since]
        return max(found, key=self.priority, default=None)

    def count_unfinished(self, above: Pair | None = None) -> int:
        """How many pairs may yet work, if wanted only those with a priority above another's."""
        least = -1 if above is None else self.priority(above)
        return sum(
            pair.state in (PairState.WAITING, PairState.IN_PROGRESS) and self.priority(pair) > least
            for pair in self
        )

    def maybe_oldest_reflexive(self, keep: tuple[Pair | None, ...]) -> Pair | None:
        """Of too many peer-reflexive pairs, or in a full list, the one to give up."""
        found = [
            pair
            for pair in self
            if pair.remote.type is IceCandidateType.PEER_REFLEXIVE and pair not in keep
        ]
        if len(found) < MAX_PEER_REFLEXIVE and not self.is_full:
            return None
        return min(found, key=lambda pair: pair.heard_at, default=None)
