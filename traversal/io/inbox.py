"""Received datagrams that wait for an application."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Final

import trio

MAX_WAITING_DATAGRAMS: Final = 4096
MAX_WAITING_BYTES: Final = 4 << 20
"""What may wait for an application that reads slowly; beyond either, the oldest is dropped."""


class Inbox:
    """A bounded queue of datagrams.

    Args:
        check_open: called when nothing waits; raises where nothing will come any more.

    Attributes:
        received: datagrams put in, since the beginning.
        dropped: of those, how many were dropped because nobody read them in time.
    """

    __slots__ = ("_check_open", "_queue", "_queued_bytes", "_readers", "dropped", "received")

    def __init__(self, check_open: Callable[[], None]) -> None:
        self._check_open = check_open
        self._queue: deque[bytes] = deque()
        self._queued_bytes = 0
        self._readers = trio.lowlevel.ParkingLot()
        self.received = 0
        self.dropped = 0

    def put(self, datagrams: Sequence[bytes]) -> None:
        """Add datagrams, oldest first, and wake as many readers."""
        queue = self._queue
        queue += datagrams
        self.received += len(datagrams)
        self._queued_bytes += sum(map(len, datagrams))
        while len(queue) > MAX_WAITING_DATAGRAMS or self._queued_bytes > MAX_WAITING_BYTES:
            self._queued_bytes -= len(queue.popleft())
            self.dropped += 1
        if self._readers:
            self._readers.unpark(count=len(datagrams))

    async def receive(self) -> bytes:
        """The oldest datagram. A checkpoint; cancelling loses nothing."""
        await self._wait()
        datagram = self._queue.popleft()
        self._queued_bytes -= len(datagram)
        return datagram

    async def receive_many(self) -> list[bytes]:
        """Everything that waits, at least one datagram. Otherwise like `receive`."""
        await self._wait()
        datagrams = list(self._queue)
        self._queue.clear()
        self._queued_bytes = 0
        return datagrams

    async def _wait(self) -> None:
        # A reader that never sleeps while there is something to read is harmless: what fills the
        # queue is another task, which runs only when this one sleeps.
        await trio.lowlevel.checkpoint_if_cancelled()
        while not self._queue:
            self._check_open()
            await self._readers.park()

    def wake_all(self) -> None:
        """Have all readers ask `check_open` again."""
        self._readers.unpark_all()
