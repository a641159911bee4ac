"""An edge in memory that turns hostile towards a connector of ours."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from types import SimpleNamespace
from unittest import mock
from uuid import UUID

import trio
from hpack import Encoder
from hyperframe.frame import DataFrame, HeadersFrame
from trio.testing import MockClock, memory_stream_pair

from relay.edge.control import ControlServer, RegistrationRequested
from traversal.io.http2_engine import Http2Engine, Http2Limits
from traversal.io.stream import StreamEndedError
from traversal.tunnel import http2
from traversal.tunnel.edge_connection import DialFailedError, DialOptions, EdgeConnection
from traversal.tunnel.exchange import ExchangeEndedError, Incoming
from traversal.wire.address import Address
from traversal.wire.tunnel.headers import CONTROL_STREAM, UPGRADE
from traversal.wire.tunnel.registration import (
    ConnectionDetails,
    ConnectionOptions,
    RegisterConnection,
)

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
REQUEST = [
    (b":method", b"POST"),
    (b":scheme", b"https"),
    (b":authority", b"app.example.com"),
    (b":path", b"/"),
]
REGISTRATION = RegisterConnection(
    "account", b"S" * 32, UUID(int=1), 0, ConnectionOptions(UUID(int=2), (), "1", "linux_amd64")
)


class EchoService:
    """Answers each exchange with its own body and trailers."""

    udp = None

    def __init__(self) -> None:
        self.served = 0
        self.active = 0
        self.hold = False
        """Whether exchanges are to be kept open."""

    async def serve(self, incoming: Incoming) -> None:
        self.served += 1
        self.active += 1
        try:
            if self.hold:
                await trio.sleep_forever()
            await incoming.respond(
                101 if incoming.head.kind == "websocket" else 200, [(b"x", b"y")]
            )
            while data := await incoming.receive():
                await incoming.send(data)
            await incoming.send_end(incoming.trailers)
        except ExchangeEndedError:
            pass
        finally:
            self.active -= 1

    def update_configuration(self, version: int, document: bytes) -> tuple[int, str]:
        return version, ""


class Pipe:
    """The connector's end of a byte stream in memory."""

    def __init__(self, stream: trio.StapledStream) -> None:
        self._stream = stream

    async def receive(self) -> bytes:
        try:
            return bytes(await self._stream.receive_some(65536))
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            raise StreamEndedError("broken") from None

    async def send_all(self, data: bytes) -> None:
        try:
            await self._stream.send_all(data)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            raise StreamEndedError("broken") from None

    def close(self) -> None:
        self._stream.send_stream.close()  # type: ignore[attr-defined]
        self._stream.receive_stream.close()  # type: ignore[attr-defined]


class HostileEdge:
    """The edge's end: an engine for good manners, and raw bytes."""

    def __init__(self, stream: trio.StapledStream) -> None:
        self.stream = stream
        self.engine = Http2Engine(Http2Limits(), client_side=True, now=0)
        self.control = ControlServer(now=0)
        self.registered: ConnectionDetails | None = None

    async def send(self, data: bytes) -> None:
        """Raw bytes; a connector that has closed does not mind."""
        try:
            await self.stream.send_all(data)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass

    async def drain(self) -> bytes:
        """What the connector sends, until it closes."""
        data = b""
        try:
            while more := await self.stream.receive_some(65536):
                data += more
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass
        return data

    async def begin(self) -> None:
        """As far as an open control stream, number 1."""
        self.engine.start()
        self.engine.send_headers(1, [*REQUEST, (UPGRADE, CONTROL_STREAM)])
        await self.send(self.engine.data_to_send())

    async def register(self) -> None:
        """Take the connector."""
        await self.begin()
        while self.registered is None:
            received = await self.stream.receive_some(65536)
            for event in self.engine.receive(bytes(received), 0):
                if data := getattr(event, "data", None):
                    for asked in self.control.receive(data):
                        if isinstance(asked, RegistrationRequested):
                            self.registered = ConnectionDetails(UUID(int=3), "lab01", False)
                            self.control.answer(self.registered)
            if answer := self.control.data_to_send():
                self.engine.send_data(1, answer)
            await self.send(self.engine.data_to_send())

    async def tell(self, data: bytes) -> None:
        """Bytes on the control stream."""
        await self.send(DataFrame(1, data=data).serialize())


def request_frame(
    stream_id: int, *extra: tuple[bytes, bytes], is_end: bool = False, method: bytes = b"POST"
) -> bytes:
    """A request, its headers without any table."""
    frame = HeadersFrame(stream_id)
    head = [(b":method", method), *REQUEST[1:], *extra]
    frame.data = Encoder().encode([(*pair, True) for pair in head], huffman=False)
    frame.flags.add("END_HEADERS")
    if is_end:
        frame.flags.add("END_STREAM")
    return frame.serialize()


@asynccontextmanager
async def connected(
    behave: Callable[[HostileEdge], Awaitable[None]], service: EchoService
) -> AsyncIterator[SimpleNamespace]:
    """A connector's HTTP/2 connection to an edge that behaves like this. `outcome` is the
    connection, or the DialFailedError; `over` is set when the connection has ended."""
    near, far = memory_stream_pair()
    result = SimpleNamespace(outcome=None, over=trio.Event())

    async def dial(*_: object, **__: object) -> tuple[Pipe, None]:
        return Pipe(near), None

    async def connect(*, task_status: trio.TaskStatus[EdgeConnection]) -> None:
        try:
            await http2.serve_http2(
                Address("192.0.2.1", 7844),
                DialOptions(),
                REGISTRATION,
                service,
                task_status=task_status,
            )
        finally:
            result.over.set()

    with mock.patch.object(http2, "connect", dial):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(behave, HostileEdge(far))
            try:
                result.outcome = await nursery.start(connect)
            except DialFailedError as error:
                result.outcome = error
            yield result
            nursery.cancel_scope.cancel()


def drive_connector(data: bytes) -> None:
    """The fuzz target: an edge that registers a connector and then sends these bytes. The connector
    ends the connection, and nothing else."""

    async def behave(edge: HostileEdge) -> None:
        await edge.register()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(edge.drain)
            for start in range(0, len(data), 211):
                await edge.send(data[start : start + 211])
            await edge.stream.send_eof()

    async def run() -> None:
        service = EchoService()
        async with connected(behave, service) as result:
            await result.over.wait()
            assert service.active == 0

    trio.run(run, clock=MockClock(autojump_threshold=0))
