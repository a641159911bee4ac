"""Probes of one attempt: paced, counted, and remembered until they are answered.

Everything that makes packets towards the peer or a STUN server in bulk goes through here, so the
budgets hold whatever a search does.
"""

from __future__ import annotations

import math
from collections import deque
from typing import Final, NamedTuple

from traversal.keys import Entropy
from traversal.paths.punch_effects import MeasureMapping, PunchEffect, SendProbe
from traversal.wire.address import Address
from traversal.wire.disco import TRANSACTION_ID_LENGTH

MAX_PROBES: Final = 2500
"""Packets of one attempt. With 256 sockets behind the other NAT 2500 guesses miss once in 20 000
times; home routers hold 4096 flows and more, so all of them fit at once (they die after 30 s)."""
PROBES_PER_SECOND: Final = 500.0
"""0.5 Mbit/s and 500 new flows a second, which small routers bear. The median search needs 175
guesses (0.35 s), one in twenty 750 (1.5 s), so more speed would gain little."""
BURST: Final = 32
"""What leaves at once: a prediction's sockets should not let foreign flows in between."""
BATCH: Final = 10
"""Packets per wake-up: 50 wake-ups a second instead of 500."""
_NEVER: Final = math.inf


class SentProbe(NamedTuple):
    """From where and to where a probe went, and when."""

    socket: int | None
    address: Address
    sent_at: float


class Pace:
    """The packets per second that all searches of a node share."""

    def __init__(self) -> None:
        self._tokens = float(BURST)
        self._filled_at = -_NEVER

    def take(self, now: float) -> bool:
        """Whether one packet may leave now; then it is counted."""
        self._tokens = min(BURST, self._tokens + (now - self._filled_at) * PROBES_PER_SECOND)
        self._filled_at = now
        # A hair below 1, since sums of small times do not come out even.
        if self._tokens < 0.999:
            return False
        self._tokens -= 1
        return True

    def ready_at(self, count: int) -> float:
        """When `count` packets may leave."""
        return self._filled_at + max(0.0, count - self._tokens) / PROBES_PER_SECOND


class Outbox:
    """See the module's text. Call `poll` when `next_deadline` has come."""

    def __init__(self, entropy: Entropy, max_probes: int, pace: Pace) -> None:
        self.sent = 0
        self._entropy = entropy
        self._max_probes = min(max_probes, MAX_PROBES)
        self._pace = pace
        self._queue: deque[tuple[int | None, Address | None]] = deque()
        self._outstanding: dict[bytes, SentProbe] = {}

    @property
    def is_empty(self) -> bool:
        """Whether nothing waits to be sent."""
        return not self._queue

    @property
    def room(self) -> int:
        """How many probes the budget still admits."""
        return self._max_probes - self.sent - len(self._queue)

    def enqueue_probe(self, socket: int | None, address: Address) -> None:
        """Send a probe when its turn comes, if the budget admits it."""
        if self.room > 0:
            self._queue.append((socket, address))

    def enqueue_measurement(self, socket: int) -> None:
        """Ask a STUN server from this socket when its turn comes."""
        if self.room > 0:
            self._queue.append((socket, None))

    def clear(self) -> None:
        """Send nothing of what waits."""
        self._queue.clear()

    def probe_now(self, socket: int | None, address: Address, now: float) -> SendProbe:
        """A probe that waits for nothing: to confirm a hit. It counts all the same."""
        self.sent += 1
        transaction_id = self._entropy(TRANSACTION_ID_LENGTH)
        self._outstanding[transaction_id] = SentProbe(socket, address, now)
        return SendProbe(socket, address, transaction_id)

    def take(self, transaction_id: bytes) -> SentProbe | None:
        """The probe that this Pong answers; None if it is not ours."""
        return self._outstanding.pop(transaction_id, None)

    def poll(self, now: float) -> list[PunchEffect]:
        """What may leave now."""
        effects: list[PunchEffect] = []
        while self._queue and self._pace.take(now):
            socket, address = self._queue.popleft()
            if address is not None:
                effects.append(self.probe_now(socket, address, now))
            elif socket is not None:
                self.sent += 1
                effects.append(MeasureMapping(socket))
        return effects

    def next_deadline(self) -> float:
        """When to poll again; infinity for never."""
        if not self._queue:
            return _NEVER
        return self._pace.ready_at(min(BATCH, len(self._queue)))
