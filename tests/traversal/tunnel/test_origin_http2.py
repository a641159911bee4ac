"""Origins that speak HTTP/2, or were hoped to."""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

import pytest
import trio
import trustme

from tests.traversal.tunnel.test_origins import Visitor
from traversal.io.http2 import Http2Connection
from traversal.io.http2_engine import Http2Error
from traversal.io.http2_stream import Http2Stream, header
from traversal.io.stream import HandshakeStream
from traversal.tunnel.origin_http import OriginAddress, OriginError, OriginLimits, OriginRequest
from traversal.tunnel.origin_http2 import serve_http2

TIMES = OriginLimits(connect=5, tls=5)


@asynccontextmanager
async def origin(*protocols: str, resets: bool = False) -> AsyncIterator[OriginAddress]:
    """A TLS server that answers with the body in capitals and a trailer, over HTTP/2; or with a
    fixed answer over HTTP/1.1."""
    authority = trustme.CA()
    server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    server.set_alpn_protocols(list(protocols))
    authority.issue_cert("origin.example").configure_cert(server)

    def make_context() -> ssl.SSLContext:
        context = ssl.create_default_context()
        authority.configure_trust(context)
        context.set_alpn_protocols(["h2", "http/1.1"])
        return context

    async def answer(stream: Http2Stream) -> None:
        async with stream:
            if resets:
                return
            assert header(stream.request_headers, b":authority") == b"app.example.com"
            assert header(stream.request_headers, b"te") == b"trailers"
            assert header(stream.request_headers, b"connection") is None
            await stream.respond([(b":status", b"201"), (b"x-seen", b"yes")])
            while data := await stream.receive():
                await stream.send(data.upper())
            await stream.send_end([(b"grpc-status", b"0")])

    async def handle(tcp: trio.SocketStream) -> None:
        stream = HandshakeStream(tcp.socket)
        await stream.start_tls(server, server_side=True)
        if stream.selected_protocol != "h2":
            await stream.receive()
            await stream.send_all(b"HTTP/1.1 202 OK\r\nContent-Length: 3\r\n\r\nold")
            stream.close()
            return
        connection = Http2Connection(stream, client_side=False)
        async with trio.open_nursery() as nursery:
            await nursery.start(connection.run)
            try:
                while True:
                    nursery.start_soon(answer, await connection.accept())
            except Http2Error:
                nursery.cancel_scope.cancel()

    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(partial(trio.serve_tcp, handle, 0, host="127.0.0.1"))
        port = listeners[0].socket.getsockname()[1]
        yield OriginAddress("127.0.0.1", port, "", make_context, "origin.example")
        nursery.cancel_scope.cancel()


def request(visitor: Visitor) -> OriginRequest:
    head = visitor.head
    return OriginRequest(head.method, head.path, head.authority, head.headers)


async def test_body_and_trailers_pass() -> None:
    """Bodies stream both ways at once, and the trailers that gRPC needs come back."""
    headers = ((b"te", b"trailers"), (b"connection", b"keep-alive"))
    visitor = Visitor(method="POST", headers=headers, has_body=True)
    with trio.fail_after(10):
        async with origin("h2", "http/1.1") as address, trio.open_nursery() as nursery:
            nursery.start_soon(serve_http2, visitor, request(visitor), address, TIMES)
            await visitor.responded.wait()
            await visitor.feed.send(b"hello")
            await visitor.feed.send(b"x" * 1_000_000)
            visitor.feed.close()
    assert visitor.status == 201
    assert header(visitor.headers, b"x-seen") == b"yes"
    assert bytes(visitor.answer) == b"HELLO" + b"X" * 1_000_000
    assert visitor.answer_trailers == ((b"grpc-status", b"0"),)


async def test_old_origin_gets_http1() -> None:
    """An origin that does not choose HTTP/2 is served by HTTP/1.1 on the same connection."""
    visitor = Visitor()
    with trio.fail_after(10):
        async with origin("http/1.1") as address:
            await serve_http2(visitor, request(visitor), address, TIMES)
    assert (visitor.status, bytes(visitor.answer)) == (202, b"old")


async def test_reset_is_an_error() -> None:
    """An origin that resets the stream leaves the answer to the connector."""
    visitor = Visitor(headers=((b"te", b"trailers"),))
    with trio.fail_after(10):
        async with origin("h2", resets=True) as address:
            with pytest.raises(OriginError, match="HTTP/2"):
                await serve_http2(visitor, request(visitor), address, TIMES)
    assert not visitor.status
