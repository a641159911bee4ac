"""Packets that wait for a destination which reads too slowly.

Two queues, one for packets that look like disco and one for the rest, each bounded in packets
(DERP specification 7.4). A full queue drops the oldest packet **of the sender that holds most of
it**: with one sender that is derper's drop-oldest; with several, a sender of many packets can't
push out the few of another.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

from relay.counters import Kind


class Waiting(NamedTuple):
    """One frame, ready to be written, and where it came from."""

    frame: bytes
    source: bytes
    since: float


class Backlog:
    """What waits for one destination. `since` is in monotonic seconds."""

    __slots__ = ("_depth", "_queues", "size_bytes")

    def __init__(self, depth: int) -> None:
        """`depth` is the bound of each queue in packets, at least 1."""
        self._depth = depth
        self._queues: dict[Kind, deque[Waiting]] = {kind: deque() for kind in Kind}
        self.size_bytes = 0

    def __bool__(self) -> bool:
        return self.size_bytes > 0

    @property
    def packets(self) -> int:
        """How many wait, in both queues."""
        return sum(map(len, self._queues.values()))

    def push(self, kind: Kind, waiting: Waiting) -> Waiting | None:
        """Append; returns the packet that had to make room, if any."""
        queue = self._queues[kind]
        victim = None
        if len(queue) >= self._depth:
            victim = self._remove_oldest_of_heaviest(queue)
        queue.append(waiting)
        self.size_bytes += len(waiting.frame)
        return victim

    def pop(self, max_bytes: int) -> list[Waiting]:
        """Take packets worth about `max_bytes`, at least one while there are any.

        Disco first: it is small, and it is what finds the path that ends the relaying.
        """
        taken: list[Waiting] = []
        size = 0
        for queue in self._queues.values():
            while queue and size < max_bytes:
                waiting = queue.popleft()
                size += len(waiting.frame)
                taken.append(waiting)
        self.size_bytes -= size
        return taken

    def clear(self) -> Iterator[tuple[Kind, Waiting]]:
        """Take everything, for a destination that is gone."""
        for kind, queue in self._queues.items():
            while queue:
                waiting = queue.popleft()
                self.size_bytes -= len(waiting.frame)
                yield kind, waiting

    def _remove_oldest_of_heaviest(self, queue: deque[Waiting]) -> Waiting:
        # The queue is short (32 by default), so counting beats keeping counts up to date.
        held: dict[bytes, int] = {}
        for waiting in queue:
            held[waiting.source] = held.get(waiting.source, 0) + 1
        heaviest = max(held, key=held.__getitem__)  # the first of equals, which is the oldest
        for position, waiting in enumerate(queue):
            if waiting.source == heaviest:
                del queue[position]
                self.size_bytes -= len(waiting.frame)
                return waiting
        raise AssertionError("the heaviest sender has a packet in the queue")
