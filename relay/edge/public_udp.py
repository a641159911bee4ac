"""Published UDP ports: each visitor's address and port is a flow through the tunnel.

Nothing proves a datagram's sender. So flows are few, per source too, short-lived, and an origin's
answers are dropped beyond `AMPLIFICATION` times what the visitor sent until it has sent twice.
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


@dataclass(slots=True)
class _Visitor:
    address: Address
    queue: trio.MemorySendChannel[bytes]
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    """Its deadline is when the flow has been idle for too long."""
    datagrams: int = 0
    credit: int = 0


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

    async def run(self) -> None:
        """Serve until cancelled."""
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
                visitor.credit += AMPLIFICATION * len(data)
                try:
                    visitor.queue.send_nowait(data)
                except trio.WouldBlock:
                    self.drops += 1

    def _admit(self, address: Address, nursery: trio.Nursery) -> _Visitor | None:
        origin = source_of(address[0])
        if len(self._visitors) >= FLOWS or self._sources[origin] >= FLOWS_PER_SOURCE:
            if not self._sources[origin]:
                del self._sources[origin]
            return None
        self._sources[origin] += 1
        send, receive = trio.open_memory_channel[bytes](QUEUE)
        visitor = self._visitors[address] = _Visitor(address, send)
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
            traffic.bytes_out += len(data)
