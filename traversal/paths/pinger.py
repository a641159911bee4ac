"""Pings on their way: which are outstanding, when they time out, how fast new ones may leave.

Discovery Pings are paced to 100 a second with a burst of 32, more than any honest list of
candidates has, so that all of them leave at once, while a list that somebody inflated does not
make a flood. Heartbeats and answers to life-or-death questions do not wait in that queue.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Final

from traversal.keys import Entropy
from traversal.paths.candidates import Candidate
from traversal.wire.disco import TRANSACTION_ID_LENGTH

PING_TIMEOUT_SECONDS: Final = 5.0
DISCOVERY_RATE: Final = 100.0
DISCOVERY_BURST: Final = 32
MAX_QUEUED: Final = 256


class Purpose(Enum):
    """Why a Ping was sent."""

    DISCOVERY = "discovery"
    HEARTBEAT = "heartbeat"
    CONFIRM = "confirm"
    RECOVERY = "recovery"
    MTU = "MTU"
    USER = "user"


@dataclass(frozen=True, slots=True, eq=False)
class SentPing:
    """An outstanding Ping; `candidate` is None for one by the relay."""

    candidate: Candidate | None
    purpose: Purpose
    sent_at: float
    padding_bytes: int


class Pinger:
    """Transaction IDs, the table of outstanding Pings, the queue of those to come."""

    def __init__(self, entropy: Entropy) -> None:
        self._entropy = entropy
        self._outstanding: dict[bytes, SentPing] = {}
        self._judgements: deque[tuple[float, bytes]] = deque()
        self._queue: dict[Candidate, None] = {}
        self._tokens = float(DISCOVERY_BURST)
        self._tokens_at = -math.inf

    def register(
        self, candidate: Candidate | None, purpose: Purpose, now: float, padding_bytes: int = 0
    ) -> bytes:
        """Note a Ping that is being sent now; its transaction ID is returned."""
        transaction_id = self._entropy(TRANSACTION_ID_LENGTH)
        self._outstanding[transaction_id] = SentPing(candidate, purpose, now, padding_bytes)
        if candidate is not None and purpose is Purpose.HEARTBEAT:
            patience = max(0.3, 3 * candidate.patient_rtt_seconds)
            self._judgements.append((now + patience, transaction_id))
        return transaction_id

    def get(self, transaction_id: bytes) -> SentPing | None:
        """The outstanding Ping with this ID, left in the table."""
        return self._outstanding.get(transaction_id)

    def take(self, transaction_id: bytes) -> SentPing | None:
        """The outstanding Ping with this ID, which is now answered."""
        return self._outstanding.pop(transaction_id, None)

    def poll_expired(self, now: float) -> Iterator[SentPing]:
        """Pings that went unanswered for 5 s, oldest first."""
        while self._outstanding:
            transaction_id, ping = next(iter(self._outstanding.items()))
            if now < ping.sent_at + PING_TIMEOUT_SECONDS:
                return
            del self._outstanding[transaction_id]
            yield ping

    def poll_overdue_heartbeats(self, now: float) -> Iterator[Candidate]:
        """Candidates whose heartbeat is unanswered for longer than it should take."""
        while self._judgements and now >= self._judgements[0][0]:
            ping = self._outstanding.get(self._judgements.popleft()[1])
            if ping is not None and ping.candidate is not None:
                yield ping.candidate

    def enqueue(self, candidate: Candidate) -> None:
        """Queue a discovery Ping; a candidate waits in the queue once."""
        if len(self._queue) < MAX_QUEUED:
            self._queue[candidate] = None

    def poll_queue(self, now: float) -> Iterator[Candidate]:
        """Candidates whose discovery Ping may leave now."""
        if not self._queue:
            return
        elapsed = now - self._tokens_at
        self._tokens = min(DISCOVERY_BURST, self._tokens + elapsed * DISCOVERY_RATE)
        self._tokens_at = now
        while self._queue and self._tokens >= 1:
            candidate = next(iter(self._queue))
            del self._queue[candidate]
            self._tokens -= 1
            yield candidate

    def forget_all(self) -> None:
        """Drop everything: our address or the peer's key is another one now."""
        self._outstanding.clear()
        self._judgements.clear()
        self._queue.clear()

    def next_deadline(self) -> float:
        """When something above has news; infinity for never."""
        deadline = math.inf
        if self._outstanding:
            oldest = next(iter(self._outstanding.values()))
            deadline = oldest.sent_at + PING_TIMEOUT_SECONDS
        if self._judgements:
            deadline = min(deadline, self._judgements[0][0])
        if self._queue:
            wait = max(0.0, 1 - self._tokens) / DISCOVERY_RATE
            deadline = min(deadline, self._tokens_at + max(wait, 0.001))
        return deadline
