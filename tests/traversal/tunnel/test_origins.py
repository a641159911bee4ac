"""Requests and connections that the connector carries to origins on loopback."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import pytest
import trio
from wsproto.connection import Connection, ConnectionType
from wsproto.events import BytesMessage, CloseConnection
from wsproto.utilities import generate_accept_token

from traversal.tunnel.exchange import ExchangeEndedError, Headers, Incoming, IncomingHead
from traversal.tunnel.origin_http import (
    OriginAddress,
    OriginError,
    OriginLimits,
    OriginPool,
    OriginRequest,
    connect_origin,
    serve_http,
    serve_websocket,
)
from traversal.tunnel.origin_tcp import serve_socks, serve_tcp

TIMES = OriginLimits(connect=2, tls=2, idle=10)
KEY = b"dGhlIHNhbXBsZSBub25jZQ=="
Handler = Callable[[trio.SocketStream], Awaitable[None]]


class Visitor(Incoming):
    """The edge's end of an exchange, in memory. `body` is fed; `answer` is what came back."""

    def __init__(
        self,
        kind: str = "http",
        method: str = "GET",
        path: str = "/",
        headers: Headers = (),
        *,
        has_body: bool = False,
    ) -> None:
        self.head = IncomingHead(
            kind,  # type: ignore[arg-type]
            method,
            "app.example.com",
            path,
            headers,
            has_body or kind != "http",
        )
        self.status = 0
        self.headers: list[tuple[bytes, bytes]] = []
        self.answer = bytearray()
        self.answer_trailers: Headers = ()
        self.is_ended = self.is_reset = False
        self.responded = trio.Event()
        self.changed = trio.Event()
        self.feed, self._body = trio.open_memory_channel[bytes](1000)

    def cancel_when_unwanted(self, scope: trio.CancelScope) -> None:
        pass

    async def receive(self) -> bytes:
        try:
            return await self._body.receive()
        except trio.EndOfChannel:
            return b""

    async def respond(
        self,
        status: int,
        headers: Iterable[tuple[bytes, bytes]] = (),
        *,
        is_from_connector: bool = False,
    ) -> None:
        assert not self.status
        self.status, self.headers = status, list(headers)
        self.responded.set()

    async def send(self, data: bytes) -> None:
        if self.is_reset:
            raise ExchangeEndedError("the visitor left")
        self.answer += data
        self._tell()

    async def send_end(self, trailers: Headers = ()) -> None:
        self.is_ended = True
        self.answer_trailers = trailers
        self._tell()

    def reset(self) -> None:
        self.is_reset = True

    def _tell(self) -> None:
        self.changed.set()
        self.changed = trio.Event()

    async def until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            await self.changed.wait()


@asynccontextmanager
async def origin(handler: Handler) -> AsyncIterator[OriginAddress]:
    """A server on loopback that hands each connection to `handler`."""
    async with trio.open_nursery() as nursery:
        serve = partial(trio.serve_tcp, handler, 0, host="127.0.0.1")
        listeners = await nursery.start(serve)
        yield OriginAddress("127.0.0.1", listeners[0].socket.getsockname()[1])
        nursery.cancel_scope.cancel()


async def read_head(stream: trio.SocketStream) -> bytes:
    data = bytearray()
    while b"\r\n\r\n" not in data:
        chunk = await stream.receive_some(1)
        if not chunk:
            return b""
        data += chunk
    return bytes(data)


def request(method: str = "GET", path: str = "/", headers: Headers = ()) -> OriginRequest:
    return OriginRequest(method, path, "app.example.com", headers)


async def test_get_and_reuse() -> None:
    """A response comes back with its headers, the hop's own left out; the connection is used for
    the next request, and a new one if it died while it lay idle."""
    heads = []

    async def handler(stream: trio.SocketStream) -> None:
        for _ in range(2):
            heads.append((await read_head(stream), id(stream)))
            await stream.send_all(
                b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nX-Y: 1\r\nX-Y: 2\r\n"
                b"Keep-Alive: timeout=5\r\n\r\nhello"
            )
        await stream.aclose()

    pool = OriginPool()
    async with origin(handler) as address:
        for number in range(3):
            visitor = Visitor(path=f"/{number}")
            asked = request(path=f"/{number}", headers=((b"accept", b"x"), (b"te", b"trailers")))
            await serve_http(visitor, asked, address, TIMES, pool)
            assert (visitor.status, bytes(visitor.answer), visitor.is_ended) == (
                200,
                b"hello",
                True,
            )
            assert visitor.headers == [(b"content-length", b"5"), (b"x-y", b"1"), (b"x-y", b"2")]
            await trio.testing.wait_all_tasks_blocked(0.01)
        pool.close()
    assert [head.split(b" ")[1] for head, _ in heads] == [b"/0", b"/1", b"/2"]
    assert heads[0][1] == heads[1][1] != heads[2][1]
    assert b"te:" not in heads[0][0].lower()
    assert heads[0][0].lower().count(b"host: app.example.com") == 1


async def test_connections_that_wait() -> None:
    """A connection that the origin has closed, or on which it says more than it was asked, is not
    used again, whatever the method; only so many wait, and only for so long."""
    connections = 0
    closed = trio.Event()

    async def handler(stream: trio.SocketStream) -> None:
        nonlocal connections
        connections += 1
        while head := await read_head(stream):
            answer = b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nx"
            if head.startswith(b"POST /more"):
                answer += b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nwrong"
            await stream.send_all(answer)
            if head.startswith(b"POST /last"):
                break
        await stream.aclose()
        closed.set()

    async with origin(handler) as address:
        pool = OriginPool()

        async def post(path: str, limits: OriginLimits = TIMES) -> None:
            visitor = Visitor(method="POST", path=path)
            await serve_http(visitor, request("POST", path), address, limits, pool)
            assert (visitor.status, bytes(visitor.answer)) == (200, b"x")

        for path in ("/last", "/more", "/", "/"):
            await post(path)
            if path == "/last":
                await closed.wait()
        assert (connections, len(pool)) == (3, 1)
        await post("/", OriginLimits(kept=0))
        assert (connections, len(pool)) == (3, 0)
        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(post, "/", OriginLimits(kept=2))
        assert len(pool) == 2
        await post("/", OriginLimits(idle=0))
        await post("/")  # does not take the one that may not wait at all
        assert len(pool) == 1
        pool.close()
        assert len(pool) == 0


async def test_keep_alive_of_tcp() -> None:
    """The kernel asks silent origins whether they are there, as often as it is told."""
    async with origin(read_head) as address:
        for seconds, expected in ((30.0, (1, 30)), (0.2, (1, 1)), (1e9, (1, 32767))):
            stream = await connect_origin(address, OriginLimits(tcp_keep_alive=seconds))
            sock, _ = stream.detach()
            with sock:
                assert expected == (
                    sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE),
                    sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE),
                )
        stream = await connect_origin(address, OriginLimits(tcp_keep_alive=0))
        sock, _ = stream.detach()
        with sock:
            assert not sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)


async def test_bodies_stream_both_ways() -> None:
    """An origin that echoes as it reads gets each piece before the next is sent, chunked, with
    trailers in both directions."""

    async def handler(stream: trio.SocketStream) -> None:
        head = await read_head(stream)
        assert b"transfer-encoding: chunked" in head.lower()
        await stream.send_all(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        while True:
            chunk = await stream.receive_some(1000)
            await stream.send_all(chunk.replace(b"sum: in", b"sum: out"))
            if chunk.endswith(b"\r\n\r\n"):
                return

    visitor = Visitor(method="POST", has_body=True)
    visitor.trailers = ((b"sum", b"in"),)
    pool = OriginPool()
    async with origin(handler) as address, trio.open_nursery() as nursery:
        nursery.start_soon(serve_http, visitor, request("POST"), address, TIMES, pool)
        for number in range(5):
            piece = b"piece%d" % number
            visitor.feed.send_nowait(piece)
            await visitor.until(lambda piece=piece: visitor.answer.endswith(piece))  # type: ignore[misc]
        visitor.feed.close()
        await visitor.until(lambda: visitor.is_ended)
        assert visitor.answer_trailers == ((b"sum", b"out"),)
    pool.close()


async def test_early_answer() -> None:
    """An origin that refuses an upload before it has read it is heard, and not used again."""

    async def handler(stream: trio.SocketStream) -> None:
        await read_head(stream)
        await stream.send_all(b"HTTP/1.1 413 Too Large\r\nContent-Length: 0\r\n\r\n")
        await trio.sleep_forever()

    pool = OriginPool()
    visitor = Visitor(method="POST", headers=((b"content-length", b"1000000"),), has_body=True)
    visitor.feed.send_nowait(bytes(1000))
    async with origin(handler) as address:
        with trio.fail_after(5):
            asked = request("POST", headers=visitor.head.headers)
            await serve_http(visitor, asked, address, TIMES, pool)
    assert visitor.status == 413
    assert pool.take(address) is None


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (b"", "closed the connection|ended the connection|no HTTP/1.1"),
        (b"SSH-2.0-OpenSSH_9\r\n", "no HTTP/1.1"),
        (b"HTTP/1.1 200 OK\r\n" + b"x: " + b"y" * 200_000, "no HTTP/1.1"),
    ],
)
async def test_broken_origins(answer: bytes, message: str) -> None:
    """What is no HTTP is an error that says so, before anything was answered."""

    async def handler(stream: trio.SocketStream) -> None:
        await read_head(stream)
        try:
            await stream.send_all(answer)
        except trio.BrokenResourceError:
            pass

    visitor = Visitor()
    async with origin(handler) as address:
        with pytest.raises(OriginError, match=message):
            await serve_http(visitor, request(), address, TIMES, OriginPool())
    assert visitor.status == 0


@pytest.mark.parametrize("body", [b"123", b"123456"], ids=["short", "long"])
async def test_body_of_another_length(body: bytes) -> None:
    """A request whose body is not as long as its head says ends at once, instead of when the origin
    loses patience; the origin can tell."""
    received = bytearray()
    ended = trio.Event()

    async def handler(stream: trio.SocketStream) -> None:
        await read_head(stream)
        async for data in stream:
            received.extend(data)
        ended.set()

    async with origin(handler) as address:
        headers = ((b"content-length", b"5"),)
        visitor = Visitor("http", "POST", headers=headers, has_body=True)
        visitor.feed.send_nowait(body)
        visitor.feed.close()
        with pytest.raises(ExchangeEndedError, match="malformed"), trio.fail_after(5):
            await serve_http(visitor, request("POST", "/", headers), address, TIMES, OriginPool())
        with trio.fail_after(5):
            await ended.wait()
    assert len(received) < 5


async def test_nobody_listens(tmp_path: Path) -> None:
    """Refused connections and missing sockets are errors that name the origin."""
    with pytest.raises(OriginError, match=r"127.0.0.1:1: "):
        await serve_http(Visitor(), request(), OriginAddress("127.0.0.1", 1), TIMES, OriginPool())
    missing = str(tmp_path / "missing")
    with pytest.raises(OriginError, match="No such file"):
        await serve_tcp(Visitor("tcp"), OriginAddress("", 0, path=missing), TIMES)


async def test_websocket_bytes_pass_unread() -> None:
    """After the origin's 101 the bytes of both sides pass as they are, also those that came with
    the handshake; another answer passes as a response."""

    async def handler(stream: trio.SocketStream) -> None:
        head = (await read_head(stream)).lower()
        assert b"upgrade: websocket" in head
        assert b"sec-websocket-version: 13" in head
        if b"get /no" in head:
            await stream.send_all(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 2\r\n\r\nno")
            return
        await stream.send_all(
            b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Accept: x\r\n\r\nfirst"
        )
        while data := await stream.receive_some(1000):
            await stream.send_all(data.upper())

    visitor = Visitor("websocket", headers=((b"sec-websocket-key", KEY),))
    async with origin(handler) as address:
        async with trio.open_nursery() as nursery:
            asked = request(headers=visitor.head.headers)
            nursery.start_soon(serve_websocket, visitor, asked, address, TIMES)
            await visitor.until(lambda: visitor.answer == b"first")
            assert visitor.status == 101
            assert (b"upgrade", b"websocket") in visitor.headers
            visitor.feed.send_nowait(b"\0raw")
            await visitor.until(lambda: visitor.answer == b"first\0RAW")
            visitor.feed.close()
            await visitor.until(lambda: visitor.is_ended)
        refused = Visitor("websocket", path="/no")
        await serve_websocket(refused, request(path="/no"), address, TIMES)
        assert (refused.status, bytes(refused.answer)) == (403, b"no")


async def shout(stream: trio.SocketStream) -> None:
    """Answer in capitals until the other side has said everything."""
    while data := await stream.receive_some(1000):
        await stream.send_all(data.upper())


async def test_tcp() -> None:
    """Bytes pass both ways; each direction ends by itself."""
    visitor = Visitor("tcp")
    async with origin(shout) as address, trio.open_nursery() as nursery:
        nursery.start_soon(serve_tcp, visitor, address, TIMES)
        visitor.feed.send_nowait(b"one")
        await visitor.until(lambda: visitor.answer == b"ONE")
        visitor.feed.send_nowait(b"two")
        visitor.feed.close()
        await visitor.until(lambda: visitor.is_ended)
    assert visitor.status == 200
    assert visitor.answer == b"ONETWO"


class Client:
    """A visitor's websocket client."""

    def __init__(self, visitor: Visitor) -> None:
        self.visitor = visitor
        self.websocket = Connection(ConnectionType.CLIENT)
        self.read = 0

    def say(self, data: bytes) -> None:
        self.visitor.feed.send_nowait(self.websocket.send(BytesMessage(data=data)))

    async def hear(self, size: int) -> bytes:
        heard = bytearray()
        while len(heard) < size:
            await self.visitor.until(lambda: len(self.visitor.answer) > self.read)
            self.websocket.receive_data(bytes(self.visitor.answer[self.read :]))
            self.read = len(self.visitor.answer)
            for event in self.websocket.events():
                if isinstance(event, BytesMessage):
                    heard += event.data
        return bytes(heard)


async def test_tcp_behind_a_websocket() -> None:
    """A visitor's messages are the bytes of a TCP connection, and closing one closes the other."""
    visitor = Visitor("websocket", headers=((b"sec-websocket-key", KEY),))
    client = Client(visitor)
    async with origin(shout) as address, trio.open_nursery() as nursery:
        nursery.start_soon(serve_tcp, visitor, address, TIMES)
        client.say(b"one")
        assert await client.hear(3) == b"ONE"
        visitor.feed.send_nowait(client.websocket.send(CloseConnection(code=1000)))
        await visitor.until(lambda: visitor.is_ended)
    assert visitor.status == 101
    assert (b"sec-websocket-accept", generate_accept_token(KEY)) in visitor.headers


async def test_tcp_needs_a_websocket() -> None:
    """A plain request for a TCP service is refused with a text that says what to use."""
    async with origin(shout) as address:
        with pytest.raises(OriginError, match="websocket client"):
            await serve_tcp(Visitor(), address, TIMES)


@pytest.mark.parametrize("is_open", [True, False])
async def test_socks(is_open: bool) -> None:
    """A SOCKS client reaches what the rules allow, by what it sent ahead too, and nothing else."""
    visitor = Visitor("websocket", headers=((b"sec-websocket-key", KEY),))
    client = Client(visitor)
    async with origin(shout) as address, trio.open_nursery() as nursery:
        nursery.start_soon(serve_socks, visitor, lambda *_: is_open, TIMES)
        client.say(b"\5\1\0")
        assert await client.hear(2) == b"\5\0"
        client.say(b"\5\1\0\1\x7f\0\0\1" + address.port.to_bytes(2, "big") + b"ahead")
        reply = await client.hear(10)
        assert reply[1] == (0 if is_open else 2)
        if is_open:
            assert await client.hear(5) == b"AHEAD"
        nursery.cancel_scope.cancel()
