"""The extra sockets of port searches: opened by the hundred, closed at once, one kept if it works.

All searches of a node share one budget of open sockets, so many peers behind a hard NAT are
searched for one after the other. Each socket has a task that sleeps until something arrives and
drains it then; nothing runs per packet. Tasks and sockets are made by `PunchSockets.run`, so they
belong to the node, whoever's call led to the search.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import Final

import trio

from traversal.io.udp import Batch, Source, UdpSocket, UdpSockets, bind_any_port_nowait

MAX_OPEN: Final = 256
"""Extra sockets of a node's searches at any time; found ones, at most one per peer, not counted."""

HandleBatch = Callable[[int, Batch], None]


class SocketSet:
    """The sockets of one attempt, numbered from 0 on; `PunchSockets.open` opens `count` of them."""

    def __init__(self, count: int) -> None:
        self.count = min(count, MAX_OPEN)
        self.is_ended = False
        self.note_closed: Callable[[int], None] = lambda _: None
        self._sockets: dict[int, UdpSocket] = {}

    @property
    def ports(self) -> tuple[int, ...]:
        """The local ports, in order of number."""
        return tuple(sock.port for sock in self._sockets.values())

    def get(self, number: int) -> UdpSocket | None:
        """A socket, None if it is closed."""
        return self._sockets.get(number)

    def add(self, number: int, sock: UdpSocket) -> None:
        """One more is open."""
        self._sockets[number] = sock

    def close(self, numbers: Iterable[int]) -> None:
        """Close these, as far as they are open."""
        for number in numbers:
            sock = self._sockets.pop(number, None)
            if sock is not None:
                sock.close()
                self.note_closed(number)

    def keep_only(self, number: int | None) -> None:
        """The attempt is over: close all but the socket that was found, which from now on does not
        count. What is still to be opened never will."""
        self.is_ended = True
        self.close([other for other in self._sockets if other != number])
        if number in self._sockets:
            self.note_closed(number)
        self.note_closed = lambda _: None


class PunchSockets:
    """All extra sockets of a node; `udp` is where its ordinary ones are bound."""

    def __init__(self, udp: UdpSockets) -> None:
        self._udp = udp
        self._open_count = 0
        self._freed = trio.Event()
        self._requests, self._wanted = trio.open_memory_channel[
            tuple[SocketSet, Callable[[], None], HandleBatch]
        ](math.inf)
        # What arrives is copied out at once, so all sockets can share it.
        self._buffer = bytearray(1 << 16)

    @property
    def open_count(self) -> int:
        """How many of the budget are in use."""
        return self._open_count

    def open(
        self, sockets: SocketSet, handle_opened: Callable[[], None], handle: HandleBatch
    ) -> None:
        """Open the sockets as soon as the budget has room for them, then call `handle_opened`;
        they are fewer if the system has no more. `handle` gets what arrives, with the socket's
        number. Neither may await or raise."""
        self._requests.send_nowait((sockets, handle_opened, handle))

    async def run(self) -> None:
        """Open and read sockets until cancelled."""
        async with trio.open_nursery() as nursery:
            async for sockets, handle_opened, handle in self._wanted:
                while not sockets.is_ended and self._open_count + sockets.count > MAX_OPEN:
                    self._freed = trio.Event()
                    await self._freed.wait()
                await trio.lowlevel.checkpoint()
                self._open_all(nursery, sockets, handle)
                if not sockets.is_ended:
                    handle_opened()

    def _open_all(self, nursery: trio.Nursery, sockets: SocketSet, handle: HandleBatch) -> None:
        # At once, which takes 10 ms: with a checkpoint for each it takes as many turns of whatever
        # else the program does, and a search is over in less.
        if sockets.is_ended:
            return
        sockets.note_closed = self._note_closed
        host = self._udp.bound_host(4) or "0.0.0.0"
        with suppress(OSError):
            for number in range(sockets.count):
                sock = bind_any_port_nowait(host, self._buffer)
                self._open_count += 1
                sockets.add(number, sock)
                nursery.start_soon(_receive, sock, number, handle)

    def _note_closed(self, number: int) -> None:
        self._open_count -= 1
        self._freed.set()


class FoundPath:
    """A node's sockets for one peer, with the extra one that leads to its address `remote`."""

    def __init__(self, udp: UdpSockets, sock: UdpSocket, remote: Source) -> None:
        self._udp = udp
        self._sock = sock
        self._remote = remote

    def _by(self, address: Source) -> UdpSocket | None:
        return self._sock if address == self._remote else None

    def send(self, data: bytes, address: Source) -> int:
        """See `UdpSockets.send`."""
        return self._udp.send(data, address, self._by(address))

    def send_many(self, datagrams: Sequence[bytes], address: Source) -> int:
        """See `UdpSockets.send_many`."""
        return self._udp.send_many(datagrams, address, self._by(address))

    def send_unfragmented(self, data: bytes, address: Source) -> int:
        """See `UdpSockets.send_unfragmented`."""
        return self._udp.send_unfragmented(data, address, self._by(address))


async def _receive(sock: UdpSocket, number: int, handle: HandleBatch) -> None:
    # A socket that broke is as good as closed: its search goes on with the others.
    try:
        with suppress(trio.ClosedResourceError, OSError):
            while True:
                handle(number, await sock.receive())
    finally:
        sock.close()
