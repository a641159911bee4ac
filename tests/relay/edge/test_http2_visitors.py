"""Visitors that speak HTTP/2, through the proxy, to an origin."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing

from relay.edge.visit_http2 import VISITOR_LIMITS, serve_http2
from tests.relay.edge.arena import Arena, OriginExchange, open_arena
from traversal.io.http2 import Http2Connection
from traversal.io.http2_stream import Http2Stream, Http2StreamError, header
from traversal.io.stream import HandshakeStream


@asynccontextmanager
async def visitor(arena: Arena) -> AsyncIterator[Http2Connection]:
    stream = HandshakeStream(arena.visit(serve_http2).socket)
    connection = Http2Connection(stream, client_side=True)
    async with trio.open_nursery() as nursery:
        await nursery.start(connection.run)
        yield connection
        nursery.cancel_scope.cancel()


def request(
    method: bytes, path: bytes = b"/", *more: tuple[bytes, bytes]
) -> list[tuple[bytes, bytes]]:
    return [
        (b":method", method),
        (b":scheme", b"https"),
        (b":authority", b"app.example.com"),
        (b":path", path),
        *more,
    ]


async def read_all(stream: Http2Stream) -> bytes:
    data = b""
    while chunk := await stream.receive():
        data += chunk
    return data


async def test_requests_at_the_same_time() -> None:
    """Fifty streams with bodies of their own, and each gets its own back."""
    async with open_arena() as arena, visitor(arena) as connection:
        arena.connect()

        async def ask(number: int) -> None:
            body = b"%d," % number * 5000
            stream = await connection.open(request(b"POST"))

            async def send() -> None:
                await stream.send(body)
                await stream.send_end()

            async with stream, trio.open_nursery() as nursery:
                nursery.start_soon(send)
                assert header(await stream.response(), b":status") == b"200"
                assert await read_all(stream) == body

        with trio.fail_after(20):
            async with trio.open_nursery() as nursery:
                for number in range(50):
                    nursery.start_soon(ask, number)
        await trio.testing.wait_all_tasks_blocked()
        assert arena.meter.active == 0


async def test_a_body_that_came_with_its_head_goes_on() -> None:
    """A whole request in one packet still has its body."""
    async with open_arena() as arena, visitor(arena) as connection:
        arena.connect()
        stream = await connection.open(request(b"POST", b"/", (b"content-length", b"5")))
        await stream.send(b"hello")
        await stream.send_end()
        with trio.fail_after(5):
            assert await read_all(stream) == b"hello"


async def test_trailers_both_ways() -> None:
    """As gRPC needs them, with `te: trailers` to the origin."""

    async def origin(exchange: OriginExchange) -> None:
        await exchange.origin_read_all()
        exchange.origin_respond(200)
        await exchange.origin_send(b"x")
        exchange.origin_end((b"grpc-status", b"0"))

    async with open_arena() as arena, visitor(arena) as connection:
        link = arena.connect(origin)
        stream = await connection.open(request(b"POST", b"/", (b"te", b"trailers")))
        await stream.send(b"x")
        await stream.send_end([(b"x-check", b"1")])
        assert await read_all(stream) == b"x"
        assert stream.trailers == [(b"grpc-status", b"0")]
        (exchange,) = link.exchanges
        assert exchange.request_trailers == ((b"x-check", b"1"),)
        assert (b"te", b"trailers") in exchange.head.headers  # type: ignore[union-attr]


async def test_websocket_by_extended_connect() -> None:
    """RFC 8441: the origin sees an ordinary handshake, the visitor raw bytes after 200."""

    async def origin(exchange: OriginExchange) -> None:
        exchange.origin_respond(101, (b"sec-websocket-accept", b"x"))
        while data := await exchange.origin_receive():
            await exchange.origin_send(data)
        exchange.origin_end()

    async with open_arena() as arena, visitor(arena) as connection:
        link = arena.connect(origin)
        await connection.ping()  # the server's settings allow CONNECT for websockets
        stream = await connection.open(request(b"CONNECT", b"/ws", (b":protocol", b"websocket")))
        response = await stream.response()
        assert header(response, b":status") == b"200"
        assert header(response, b"sec-websocket-accept") is None
        await stream.send(b"\x81\x00")
        assert await stream.receive() == b"\x81\x00"
        await stream.send_end()
        assert await stream.receive() == b""
        head = link.exchanges[0].head
        assert not isinstance(head, str)
        assert (head.kind, head.method) == ("websocket", "GET")
        assert header(head.headers, b"sec-websocket-key")


async def test_a_stream_that_breaks_off_and_one_that_is_given_up() -> None:
    """The visitor sees a reset and not an end; the origin learns of a visitor that resets."""

    async def break_off(exchange: OriginExchange) -> None:
        exchange.origin_respond(200)
        await exchange.origin_send(b"half")
        await trio.testing.wait_all_tasks_blocked()
        exchange.fail()

    async def think(exchange: OriginExchange) -> None:
        await trio.sleep_forever()

    async with open_arena() as arena, visitor(arena) as connection:
        first = arena.connect(break_off)
        stream = await connection.open(request(b"GET"), end_stream=True)
        with pytest.raises(Http2StreamError):
            await read_all(stream)
        first.drain("")
        second = arena.connect(think)
        stream = await connection.open(request(b"GET"), end_stream=True)
        await trio.testing.wait_all_tasks_blocked()
        stream.reset()
        await trio.testing.wait_all_tasks_blocked()
        assert second.exchanges[0].is_over
        assert arena.meter.active == 0


async def test_a_stalled_stream_stalls_no_other() -> None:
    """One stream whose visitor does not read, and another on the same connection is served."""

    async def flood(exchange: OriginExchange) -> None:
        assert not isinstance(exchange.head, str)
        exchange.origin_respond(200)
        if exchange.head.path == "/flood":
            while True:
                await exchange.origin_send(bytes(65536))
        exchange.origin_end()

    async with open_arena() as arena, visitor(arena) as connection:
        arena.connect(flood)
        stalled = await connection.open(request(b"GET", b"/flood"), end_stream=True)
        await trio.testing.wait_all_tasks_blocked(0.2)
        with trio.fail_after(5):
            for _ in range(10):
                stream = await connection.open(request(b"GET"), end_stream=True)
                assert await read_all(stream) == b""
        stalled.reset()


async def test_the_management_host_is_refused_here_too() -> None:
    """As :authority, in any case and with a port."""
    async with open_arena() as arena, visitor(arena) as connection:
        link = arena.connect()
        headers = request(b"GET")
        headers[2] = (b":authority", b"Management.argotunnel.com:443")
        stream = await connection.open(headers, end_stream=True)
        assert header(await stream.response(), b":status") == b"403"
        assert not link.exchanges
        assert VISITOR_LIMITS.buffered_bytes <= 8 << 20
