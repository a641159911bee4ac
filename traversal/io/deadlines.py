"""One heap of deadlines for everything that has a `next_deadline`: no task and no timer per peer.

Entries are never removed: one that is out of date is recognized when it comes up, because each item
remembers for when it was armed last.
"""

from __future__ import annotations

import heapq
import math
from itertools import count
from typing import Final, Protocol

import trio

MAX_PER_ROUND: Final = 256
"""Due items handled before others may run: at 20 us each, 5 ms."""


class Timed(Protocol):
    """Something with a deadline. `armed_at` belongs to `Deadlines`; begin with infinity."""

    armed_at: float

    def next_deadline(self) -> float:
        """Monotonic seconds; infinity for never."""

    def on_time(self, now: float) -> None:
        """Do what is due; must not raise."""


class Deadlines:
    """The heap. Call `arm(item)` whenever the item's deadline may have come nearer."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Timed]] = []
        self._numbers = count()
        self._scope = trio.CancelScope()

    def arm(self, item: Timed) -> None:
        """Make sure that `item.on_time` is called no later than its deadline."""
        deadline = item.next_deadline()
        if deadline >= item.armed_at:
            return
        item.armed_at = deadline
        heapq.heappush(self._heap, (deadline, next(self._numbers), item))
        if deadline < self._scope.deadline:
            self._scope.deadline = deadline

    def disarm(self, item: Timed) -> None:
        """Never call the item again, even if it is armed later."""
        item.armed_at = -math.inf

    async def run(self) -> None:
        """Call items when they are due, until cancelled."""
        while True:
            self._run_due(trio.current_time())
            self._scope = trio.CancelScope()
            self._scope.deadline = self._heap[0][0] if self._heap else math.inf
            with self._scope:
                await trio.sleep_forever()

    def _run_due(self, now: float) -> None:
        heap = self._heap
        for _ in range(MAX_PER_ROUND):
            if not heap or heap[0][0] > now:
                return
            deadline, _, item = heapq.heappop(heap)
            if deadline != item.armed_at:
                continue
            item.armed_at = math.inf
            if item.next_deadline() <= now:
                item.on_time(now)
            self.arm(item)
