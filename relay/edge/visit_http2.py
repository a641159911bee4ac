"""HTTP/2 on the public side: each stream is one request; WebSockets by extended CONNECT (RFC
8441)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final, NoReturn

import trio
from h2.errors import ErrorCodes

from relay.edge.connection import Headers
from relay.edge.hygiene import MAX_HEADER_BYTES, RawRequest, Visitor
from relay.edge.visit import Visit, VisitorGoneError
from relay.edge.visit_http1 import IDLE_SECONDS, Serve
from traversal.io.http2 import Http2Connection
from traversal.io.http2_engine import Http2Error, Http2Limits
from traversal.io.http2_stream import Http2Stream
from traversal.io.stream import HandshakeStream

VISITOR_LIMITS: Final = Http2Limits(
    streams=128,
    stream_window=1 << 20,
    connection_window=4 << 20,
    buffered_bytes=8 << 20,
    frame_bytes=1 << 16,
    header_bytes=MAX_HEADER_BYTES,
)
"""A visitor makes us hold `buffered_bytes` at most."""
RECEIVE_BYTES: Final = 256 << 10
LEAVING_POLL_SECONDS: Final = 0.1


async def serve_http2(
    stream: HandshakeStream, visitor: Visitor, serve: Serve, leaving: trio.Event
) -> None:
    """Serve a connection until it is over, or until it is idle once `leaving` is set."""
    connection = Http2Connection(
        stream, client_side=False, limits=VISITOR_LIMITS, connect_protocol=True
    )
    async with trio.open_nursery() as nursery:
        await nursery.start(connection.run)
        nursery.start_soon(_close_when_idle, connection)
        nursery.start_soon(_leave_when_told, connection, leaving)
        try:
            while True:
                nursery.start_soon(_serve_stream, await connection.accept(), visitor, serve)
        except Http2Error:
            nursery.cancel_scope.cancel()


async def _close_when_idle(connection: Http2Connection) -> NoReturn:
    idle_since = trio.current_time()
    while True:
        await trio.sleep(IDLE_SECONDS / 4)
        if connection.stream_count:
            idle_since = trio.current_time()
        elif trio.current_time() >= idle_since + IDLE_SECONDS:
            connection.close()


async def _leave_when_told(connection: Http2Connection, leaving: trio.Event) -> None:
    await leaving.wait()
    connection.leave()
    while connection.stream_count:  # noqa: ASYNC110 # once in the edge's life
        await trio.sleep(LEAVING_POLL_SECONDS)
    connection.close()


async def _serve_stream(stream: Http2Stream, visitor: Visitor, serve: Serve) -> None:
    async with stream:
        await serve(_Http2Visit(stream, visitor))


class _Http2Visit(Visit):
    def __init__(self, stream: Http2Stream, visitor: Visitor) -> None:
        pseudo = {name: value for name, value in stream.request_headers if name[:1] == b":"}
        raw = RawRequest(
            method=pseudo.get(b":method", b""),
            target=pseudo.get(b":path", b""),
            headers=tuple(
                (bytes(name), bytes(value))
                for name, value in stream.request_headers
                if name[:1] != b":"
            ),
            authority=pseudo.get(b":authority", b""),
            protocol=pseudo.get(b":protocol", b""),
            version="2",
        )
        super().__init__(raw, visitor, has_body=not stream.is_receive_ended)
        self._stream = stream

    async def receive(self) -> bytes:
        with _as_gone():
            data = await self._stream.receive(RECEIVE_BYTES)
        if not data:
            self.trailers = tuple(self._stream.trailers or ())
        return data

    async def respond(self, status: int, headers: Headers) -> None:
        self.has_responded = True
        with _as_gone():
            await self._stream.respond([(b":status", str(status).encode()), *headers])

    async def send(self, data: bytes) -> None:
        with _as_gone():
            await self._stream.send(data)

    async def send_end(self, trailers: Headers = ()) -> None:
        with _as_gone():
            await self._stream.send_end(list(trailers))

    async def gone(self) -> None:
        await self._stream.failed()

    def abort(self) -> None:
        self._stream.reset(ErrorCodes.INTERNAL_ERROR)


@contextmanager
def _as_gone() -> Iterator[None]:
    try:
        yield
    except Http2Error as error:
        raise VisitorGoneError(str(error)) from None
