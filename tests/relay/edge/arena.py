"""An edge's public side without connectors: origins are functions, visitors are sockets."""

from __future__ import annotations

import math
import os
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from uuid import UUID

import h11
import trio

from relay.edge.connection import (
    ConnectionFailedError,
    Exchange,
    Headers,
    RequestHead,
    ResponseHead,
    TunnelConnection,
    UdpFlow,
)
from relay.edge.hygiene import HygienePolicy, Visitor
from relay.edge.limits import Meter, RequestLimits
from relay.edge.proxy import Finder, Proxy
from relay.edge.quick import QuickTunnels
from relay.edge.registry import Registry, Tunnel
from relay.edge.routes import HttpRoute, RoutingTable
from relay.edge.visit import Visit
from relay.edge.visitor_stages import VisitorStage
from relay.refusals import Refusals
from traversal.io.stream import HandshakeStream
from traversal.wire.tunnel.credentials import Credentials
from traversal.wire.tunnel.registration import (
    ConnectionDetails,
    ConnectionOptions,
    RegisterConnection,
)

TUNNEL = Tunnel("app", Credentials(UUID(int=7), "account", b"s" * 32))
VISITOR = Visitor("192.0.2.7", "https")


class OriginExchange(Exchange):
    """Two pipes in memory, the origin's end of which is the `origin_` methods."""

    def __init__(self, connection: FakeConnection, head: RequestHead | str) -> None:
        self.head = head
        self.request_trailers: Headers = ()
        self._connection = connection
        self._to_origin, self._at_origin = trio.open_memory_channel[bytes](4)
        self._to_visitor, self._at_visitor = trio.open_memory_channel[bytes](4)
        self._response: ResponseHead | None = None
        self._changed = trio.Event()
        self.failure: ConnectionFailedError | None = None
        self.is_over = False
        self.is_answered = False
        if isinstance(head, RequestHead) and not head.has_body:
            self._to_origin.close()

    def _check(self) -> None:
        if self.failure is not None:
            raise ConnectionFailedError(
                str(self.failure), is_unprocessed=self.failure.is_unprocessed
            )

    def fail(self, text: str = "it died", *, is_unprocessed: bool = False) -> None:
        if self.is_answered:
            return
        if self.failure is None:
            self.failure = ConnectionFailedError(text, is_unprocessed=is_unprocessed)
        self._changed.set()
        for channel in (self._to_origin, self._to_visitor, self._at_origin, self._at_visitor):
            channel.close()

    # What the edge does.

    async def response(self) -> ResponseHead:
        while self._response is None:
            self._check()
            await self._changed.wait()
        return self._response

    async def receive(self) -> bytes:
        try:
            return await self._at_visitor.receive()
        except trio.EndOfChannel:
            self._check()
            return b""
        except trio.ClosedResourceError:
            self._check()
            raise

    async def send(self, data: bytes) -> None:
        self._check()
        try:
            await self._to_origin.send(bytes(data))
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            raise ConnectionFailedError("the origin does not read") from None

    async def send_end(self, trailers: Headers = ()) -> None:
        self._check()
        self.request_trailers = trailers
        self._to_origin.close()

    def reset(self) -> None:
        if not self.is_over:
            self.is_over = True
            self._connection._end_exchange()
            self.is_answered = False
            self.fail("we reset it")

    # What the origin does.

    async def origin_receive(self) -> bytes:
        try:
            return await self._at_origin.receive()
        except trio.EndOfChannel:
            return b""

    async def origin_read_all(self) -> bytes:
        data = b""
        while chunk := await self.origin_receive():
            data += chunk
        return data

    def origin_respond(self, status: int, *headers: tuple[bytes, bytes]) -> None:
        self._response = ResponseHead(status, headers)
        self._changed.set()

    async def origin_send(self, data: bytes) -> None:
        await self._to_visitor.send(data)

    def origin_answer_at_once(self, body: bytes) -> None:
        """A whole response, which no end of the connection takes back."""
        self.origin_respond(200, (b"content-length", str(len(body)).encode()))
        self._to_visitor.send_nowait(body)
        self.origin_end()

    def origin_end(self, *trailers: tuple[bytes, bytes]) -> None:
        self.trailers = trailers
        self.is_answered = True
        self._to_visitor.close()


class EchoFlow(UdpFlow):
    """Sends back `copies` of each datagram, joined."""

    copies = 1

    def __init__(self, destination: str) -> None:
        self.destination = destination
        self.is_closed = False
        self._to, self._back = trio.open_memory_channel[bytes](100)

    async def send(self, data: bytes) -> None:
        await self._to.send(data * self.copies)

    async def receive(self) -> bytes:
        try:
            return await self._back.receive()
        except (trio.EndOfChannel, trio.ClosedResourceError):
            raise ConnectionFailedError("the flow is over") from None

    def close(self) -> None:
        self.is_closed = True
        self._to.close()
        self._back.close()


Origin = Callable[[OriginExchange], Awaitable[None]]


class FakeConnection(TunnelConnection):
    """A connector's connection that hands requests to a function."""

    transport = "http2"
    supports_udp = True

    def __init__(self, nursery: trio.Nursery, origin: Origin, number: int = 0) -> None:
        options = ConnectionOptions(UUID(int=100 + number))
        request = RegisterConnection(
            account_tag="account",
            tunnel_secret=b"s" * 32,
            tunnel_id=TUNNEL.id,
            connection_index=0,
            options=options,
        )
        details = ConnectionDetails(UUID(int=number), "lab", is_remotely_managed=False)
        super().__init__(request, details, source="198.51.100.1", now=0)
        self.origin = origin
        self.exchanges: list[OriginExchange] = []
        self.flows: list[EchoFlow] = []
        self.streams = math.inf
        """How many it takes at a time; others wait."""
        self._nursery = nursery

    @property
    def is_usable(self) -> bool:
        return not self.is_leaving

    async def request(self, head: RequestHead) -> Exchange:
        while self.active >= self.streams:
            await self._idle.park()
        return self._open(head)

    async def connect_tcp(self, destination: str, source: str) -> Exchange:
        return self._open(destination)

    def _open(self, head: RequestHead | str) -> Exchange:
        if not self.is_usable:
            raise ConnectionFailedError("it is gone", is_unprocessed=True)
        exchange = OriginExchange(self, head)
        self.exchanges.append(exchange)
        self._begin_exchange()
        self.requests += 1
        self._nursery.start_soon(self._serve, exchange)
        return exchange

    async def _serve(self, exchange: OriginExchange) -> None:
        try:
            await self.origin(exchange)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass  # the edge reset it

    async def push_configuration(self, version: int, document: bytes) -> int:
        return version

    async def open_udp(self, destination: str, idle_seconds: float) -> UdpFlow:
        flow = EchoFlow(destination)
        self.flows.append(flow)
        return flow

    @property
    def is_connected(self) -> bool:
        return not self._is_closed

    def _close_transport(self, reason: str) -> None:
        for exchange in self.exchanges:
            exchange.fail(reason)


async def echo(exchange: OriginExchange) -> None:
    """Answers with the request's body as it comes."""
    exchange.origin_respond(200, (b"x-origin", b"echo"))
    while data := await exchange.origin_receive():
        await exchange.origin_send(data)
    exchange.origin_end()


@dataclass
class Arena:
    """A proxy, and connections under it."""

    nursery: trio.Nursery
    registry: Registry
    meter: Meter
    refusals: Refusals[VisitorStage]
    proxy: Proxy
    quick: QuickTunnels
    table: RoutingTable
    connections: list[FakeConnection] = field(default_factory=list)
    visitors: list[trio.SocketStream] = field(default_factory=list)
    leaving: trio.Event = field(default_factory=trio.Event)

    def connect(self, origin: Origin = echo) -> FakeConnection:
        """One more connection of the tunnel."""
        connection = FakeConnection(self.nursery, origin, len(self.connections))
        self.connections.append(connection)
        self.registry.add(connection)
        return connection

    def visit(
        self,
        serve: Callable[
            [HandshakeStream, Visitor, Callable[[Visit], Awaitable[None]], trio.Event],
            Awaitable[None],
        ],
    ) -> trio.SocketStream:
        """A visitor's end of a connection that `serve` serves."""
        theirs, ours = trio.socket.socketpair()
        stream = HandshakeStream(ours)

        async def run() -> None:
            try:
                await serve(stream, VISITOR, self.proxy.serve, self.leaving)
            finally:
                stream.close()

        self.nursery.start_soon(run)
        # A socket pair is a Unix socket, of which SocketStream wants to set no TCP options.
        visitor = trio.SocketStream(theirs)
        self.visitors.append(visitor)
        return visitor


@asynccontextmanager
async def open_arena(
    *, limits: RequestLimits | None = None, table: RoutingTable | None = None
) -> AsyncIterator[Arena]:
    """Everything under `*.example.com` goes to one tunnel."""
    registry = Registry()
    registry.add_tunnel(TUNNEL)
    meter = Meter(limits or RequestLimits())
    refusals = Refusals(VisitorStage, trio.current_time())
    table = table or RoutingTable(http=(HttpRoute("*.example.com", TUNNEL.id),))
    quick = QuickTunnels(
        registry, os.urandom, domain="try.example.org", per_hour=3, limit=5, unused_seconds=600
    )
    proxy = Proxy(
        Finder(registry),
        meter,
        refusals,
        table=lambda: table,
        policy=HygienePolicy,
        quick=quick,
        randomness=random.Random(1),
    )
    async with trio.open_nursery() as nursery:
        arena = Arena(nursery, registry, meter, refusals, proxy, quick, table)
        yield arena
        for visitor in arena.visitors:
            visitor.socket.close()
        nursery.cancel_scope.cancel()


@dataclass(frozen=True)
class Answer:
    """A response as a visitor got it."""

    status: int
    headers: Headers
    body: bytes
    trailers: Headers

    def header(self, name: bytes) -> bytes | None:
        return next((value for key, value in self.headers if key == name), None)


class Http1Client:
    """An HTTP/1.1 visitor; h11 checks what it gets."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        self.stream = stream
        self.protocol = h11.Connection(h11.CLIENT)

    async def event(self) -> h11.Event | type[h11.PAUSED]:
        while True:
            event = self.protocol.next_event()
            if event is not h11.NEED_DATA:
                return event
            self.protocol.receive_data(await self.stream.receive_some(65536))

    async def send(self, event: h11.Event) -> None:
        data = self.protocol.send(event)
        if data:
            await self.stream.send_all(data)

    async def start(
        self, method: str, target: str, headers: list[tuple[str, str]] | None = None
    ) -> None:
        headers = headers or []
        if all(name != "Host" for name, _ in headers):
            headers = [("Host", "app.example.com"), *headers]
        await self.send(h11.Request(method=method, target=target, headers=headers))

    async def answer(self) -> Answer:
        event = await self.event()
        while isinstance(event, h11.InformationalResponse):
            event = await self.event()
        assert isinstance(event, h11.Response), event
        body = b""
        while not isinstance(more := await self.event(), h11.EndOfMessage):
            assert isinstance(more, h11.Data), more
            body += more.data
        trailers = tuple((bytes(n), bytes(v)) for n, v in more.headers)
        return Answer(
            event.status_code, tuple((bytes(n), bytes(v)) for n, v in event.headers), body, trailers
        )

    async def ask(
        self,
        method: str = "GET",
        target: str = "/",
        headers: list[tuple[str, str]] | None = None,
        body: bytes | None = None,
    ) -> Answer:
        if body is not None:
            headers = [*(headers or []), ("Content-Length", str(len(body)))]
        await self.start(method, target, headers)
        async with trio.open_nursery() as nursery:
            # While it reads: an origin may answer before it has everything.
            nursery.start_soon(self._send_body, body)
            answer = await self.answer()
        if self.protocol.our_state is h11.DONE and self.protocol.their_state is h11.DONE:
            self.protocol.start_next_cycle()
        return answer

    async def _send_body(self, body: bytes | None) -> None:
        if body:
            await self.send(h11.Data(data=body))
        await self.send(h11.EndOfMessage())
