"""Published UDP ports: each visitor's address and port is a flow through the tunnel.

Nothing proves a datagram's sender. So flows are few, per source too, short-lived, and an origin's
answers are dropped beyond `AMPLIFICATION` times what the visitor sent until it has sent twice. When
there are as many flows as there may be, a new one takes the place of the oldest whose visitor never
spoke again after an answer: forged senders displace each other, not those in a conversation.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Final

import trio

from relay.edge.connection import ConnectionFailedError, UdpFlow
from relay.edge.limits import TunnelTraffic
from relay.edge.registry import Registry
from relay.edge.routes import PortRoute
from traversal.wire.address import source_of

FLOWS: Final = 4096
FLOWS_PER_SOURCE: Final = 64
IDLE_SECONDS: Final = 60.0
MAX_PAYLOAD_BYTES: Final = 1280
QUEUE: Final = 32
"""Datagrams that wait while a flow is being opened; then the newest is dropped."""
AMPLIFICATION: Final = 3
"""QUIC's bound for addresses that are not validated (RFC 9000 8)."""

Address = tuple[str, int]


@dataclass(slots=True, eq=False)
class _Visitor:
    address: Address
    queue: trio.MemorySendChannel[bytes]
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    """Its deadline is when the flow has been idle for too long."""
    datagrams: int = 0
    credit: int = 0
    is_answered: bool = False


class UdpPort:
    """One published port. `drops` counts datagrams that were not passed on."""

    def __init__(
        self,
        sock: trio.socket.SocketType,
        route: PortRoute,
        registry: Registry,
        traffic: Callable[[], TunnelTraffic],
    ) -> None:
        self.drops = 0
        self._sock = sock
        self._route = route
        self._registry = registry
        self._traffic = traffic
        self._visitors: dict[Address, _Visitor] = {}
        self._sources: Counter[str] = Counter()
        self._silent: dict[_Visitor, None] = {}
        """Those who have not spoken again after an answer, the oldest first."""
        self._running = trio.CancelScope()

    def close(self) -> None:
        """End `run` and every flow, and close the socket."""
        self._running.cancel()
        self._sock.close()

    async def run(self) -> None:
        """Serve until cancelled or closed."""
        with self._running:
            try:
                await self._receive()
            except* trio.ClosedResourceError:
                pass  # by `close`

    async def _receive(self) -> None:
        async with trio.open_nursery() as nursery:
            while True:
                try:
                    data, address = await self._sock.recvfrom(65536)
                except OSError:  # of an earlier send: the port was unreachable
                    continue
                visitor = self._visitors.get(address[:2]) or self._admit(address[:2], nursery)
                if visitor is None or len(data) > MAX_PAYLOAD_BYTES:
                    self.drops += 1
                    continue
                visitor.scope.deadline = trio.current_time() + IDLE_SECONDS
                visitor.datagrams += 1
                if visitor.is_answered:
                    self._silent.pop(visitor, None)
                visitor.credit += AMPLIFICATION * len(data)
                try:
                    visitor.queue.send_nowait(data)
                except trio.WouldBlock:
                    self.drops += 1

    def _admit(self, address: Address, nursery: trio.Nursery) -> _Visitor | None:
        origin = source_of(address[0])
        is_full = len(self._visitors) >= FLOWS
        if (is_full and not self._silent) or self._sources.get(origin, 0) >= FLOWS_PER_SOURCE:
            return None
        if is_full:
            displaced = next(iter(self._silent))
            del self._silent[displaced]
            displaced.scope.cancel()
        self._sources[origin] += 1
        send, receive = trio.open_memory_channel[bytes](QUEUE)
        visitor = self._visitors[address] = _Visitor(address, send)
        self._silent[visitor] = None
        nursery.start_soon(self._serve, visitor, origin, receive)
        return visitor

    async def _serve(
        self, visitor: _Visitor, origin: str, queue: trio.MemoryReceiveChannel[bytes]
    ) -> None:
        traffic = self._traffic()
        traffic.udp_total += 1
        traffic.udp_active += 1
        try:
            with visitor.scope:
                await self._carry(visitor, queue, traffic)
        except ConnectionFailedError:
            traffic.errors += 1
        finally:
            traffic.udp_active -= 1
            del self._visitors[visitor.address]
            self._silent.pop(visitor, None)
            self._sources[origin] -= 1
            if not self._sources[origin]:
                del self._sources[origin]

    async def _carry(
        self, visitor: _Visitor, queue: trio.MemoryReceiveChannel[bytes], traffic: TunnelTraffic
    ) -> None:
        connection = self._registry.pick(self._route.tunnel, needs_udp=True)
        if connection is None:
            raise ConnectionFailedError("no connector takes datagrams", is_unprocessed=True)
        flow = await connection.open_udp(str(self._route.destination), IDLE_SECONDS)
        try:
            async with trio.open_nursery() as nursery:
                scope = nursery.cancel_scope

                def ending(
                    carry: Callable[[], Awaitable[None]],
                ) -> Callable[[], Awaitable[None]]:
                    async def run() -> None:
                        try:
                            await carry()
                        except (ConnectionFailedError, OSError):
                            pass
                        scope.cancel()

                    return run

                async def upload() -> None:
                    async for data in queue:
                        await flow.send(data)
                        traffic.bytes_in += len(data)

                async def download() -> None:
                    await self._send_back(visitor, flow, traffic)

                nursery.start_soon(ending(upload))
                nursery.start_soon(ending(download))
        finally:
            flow.close()

    async def _send_back(self, visitor: _Visitor, flow: UdpFlow, traffic: TunnelTraffic) -> None:
        while True:
            data = await flow.receive()
            if visitor.datagrams < 2 and len(data) > visitor.credit:
                self.drops += 1
                continue
            visitor.credit -= len(data)
            await self._sock.sendto(data, visitor.address)
            visitor.is_answered = True
            traffic.bytes_out += len(data)
