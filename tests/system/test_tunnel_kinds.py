"""Every kind of stream from a visitor through our edge and our connector to an origin, over both
transports."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
import wsproto
from wsproto.connection import Connection, ConnectionType
from wsproto.events import BytesMessage, Event, TextMessage

from tests.system.tunnel_origin import pattern
from tests.system.tunnel_site import Site, published_site
from tests.system.tunnel_visitors import TruncatedError, Visitor
from tests.system.tunnel_world import until
from traversal.tunnel.transport_choice import Transport

SECONDS = 60
BULK_BYTES = int(os.environ.get("UNDERPASS_TUNNEL_BYTES", "8000000"))
"""Of large bodies; more takes longer, in one process."""


@pytest.fixture(params=list(Transport), ids=lambda transport: transport.value)
def transport(request: pytest.FixtureRequest) -> Transport:
    """What the connector runs over."""
    assert isinstance(request.param, Transport)
    return request.param


@pytest.fixture
async def site(tmp_path: Path, transport: Transport) -> AsyncIterator[Site]:
    with trio.fail_after(SECONDS):
        async with published_site(tmp_path, transport) as made:
            yield made


@pytest.fixture(params=["1.1", "2"], ids=["from1", "from2"])
def visitor(request: pytest.FixtureRequest, site: Site) -> Visitor:
    """Visitors by both versions of HTTP."""
    return site.visitor(request.param)


async def test_small_things(visitor: Visitor, site: Site, transport: Transport) -> None:
    """Methods and statuses with and without a body, a hint before the answer, trailers."""
    answer = await visitor.ask("GET", "/page?x=1")
    assert (answer.status, answer.body) == (200, b"/page")
    answer = await visitor.ask("HEAD", "/page")
    assert (answer.status, answer.headers[b"content-length"], answer.body) == (200, b"5", b"")
    for status in (204, 304, 404, 500):
        answer = await visitor.ask("GET", f"/status?code={status}")
        assert (answer.status, answer.body, answer.headers[b"etag"]) == (status, b"", b'"1"')
    assert (await visitor.ask("GET", "/hints")).body == b"page"
    answer = await visitor.ask("POST", "/echo", body=b"hello", trailers=[(b"x-checksum", b"7")])
    assert (answer.status, answer.body) == (200, b"hello")
    if transport is Transport.HTTP2:
        assert answer.trailers == {b"x-checksum": b"7"}
        assert (await visitor.ask("GET", "/trailers")).trailers == {b"x-checksum": b"1"}
    # Nothing of this cost a connection.
    assert site.connector.registrations == 1


async def test_empty_post(visitor: Visitor, site: Site) -> None:
    """A POST with an empty body says so to the origin: some want to know its length."""
    await visitor.ask("POST", "/page", [(b"content-length", b"0")])
    assert dict(site.origin.requests[-1].headers)[b"content-length"] == b"0"


async def test_large_bodies(visitor: Visitor) -> None:
    """Tens of megabytes arrive unchanged, down, and up while they come back."""
    assert (await visitor.ask("GET", f"/bytes?n={BULK_BYTES}")).body == pattern(0, BULK_BYTES)
    answer = await visitor.ask("POST", "/echo", body=pattern(0, BULK_BYTES))
    assert answer.body == pattern(0, BULK_BYTES)


async def test_full_duplex(visitor: Visitor) -> None:
    """What was sent comes back before the rest is sent."""
    async with visitor.visit("POST", "/echo", has_body=True) as visit:
        for piece in (b"one", b"two", b"three"):
            await visit.send(piece)
            if piece == b"one":
                assert (await visit.response())[0] == 200
            assert await visit.receive() == piece
        await visit.send_end()
        assert await visit.receive() == b""


async def test_events_come_as_they_are_sent(visitor: Visitor, site: Site) -> None:
    """Server-sent events are not held back; when the visitor leaves, the origin gets to know though
    it has nothing to send."""
    async with visitor.visit("GET", "/events") as visit:
        status, headers = await visit.response()
        assert (status, headers[b"content-type"]) == (200, b"text/event-stream")
        assert await visit.receive() == b"data: 1\n\n"
        site.origin.go_on.set()
        assert await visit.receive() == b"data: 2\n\n"
        await visit.leave()
        with trio.fail_after(5):
            await site.origin.abandoned.wait()
    await until(lambda: site.service.statistics().active == 0)


@pytest.mark.parametrize("path", ["/never", "/drink"])
async def test_visitor_leaves(visitor: Visitor, site: Site, path: str) -> None:
    """Before there is an answer, and in the middle of an upload."""
    async with visitor.visit("POST", path, has_body=True) as visit:
        await visit.send(bytes(100_000))
        await until(lambda: bool(site.origin.requests))
        await visit.leave()
        with trio.fail_after(5):
            await site.origin.abandoned.wait()
    await until(lambda: site.service.statistics().active == 0)


@pytest.mark.parametrize("path", ["/reset", "/short", "/cut", "/cut-in-chunk"])
async def test_broken_off_answers(visitor: Visitor, site: Site, path: str) -> None:
    """Of an answer that the origin breaks off nobody may think that it is complete, and others on
    the same connections are not touched."""
    async with visitor.visit("GET", "/slow") as other:
        assert await other.receive() if visitor.version == "2" else (await other.response())[0]
        async with visitor.visit("GET", path) as visit:
            with pytest.raises(TruncatedError):
                await visit.answer()
        site.origin.go_on.set()
        while await other.receive():
            pass
    assert site.connector.registrations == 1


@pytest.mark.parametrize("host", ["down", "mute", "untrusted", "app"])
async def test_no_origin(visitor: Visitor, site: Site, host: str) -> None:
    """An origin that is not there, keeps silent in its TLS handshake, has a certificate that is not
    trusted, or speaks no HTTP, is a 502 and a line in the log."""
    answer = await visitor.ask("GET", "/nonsense", host=f"{host}.example.com")
    assert (answer.status, site.service.statistics().errors) == (502, 1)


async def test_services(visitor: Visitor) -> None:
    """A Unix socket, and an answer of the connector's own."""
    answer = await visitor.ask("POST", "/echo", host="unix.example.com", body=b"x")
    assert (answer.status, answer.body) == (200, b"x")
    assert (await visitor.ask("GET", "/", host="teapot.example.com")).status == 418
    assert (await visitor.ask("GET", "/", host="other.example.com")).status == 404


async def test_grpc(visitor: Visitor, site: Site, transport: Transport) -> None:
    """An HTTP/2 origin: messages both ways at once, and trailers where the transport has them."""
    headers = [(b"te", b"trailers"), (b"content-type", b"application/grpc")]
    host = "grpc.example.com"
    async with visitor.visit("POST", "/Call", headers, host=host, has_body=True) as visit:
        for piece in (b"one", b"two"):
            await visit.send(piece)
            if piece == b"one":
                assert (await visit.response())[0] == 200
            assert await visit.receive() == piece
        await visit.send_end([(b"x-checksum", b"9")])
        assert await visit.receive() == b""
        if transport is Transport.HTTP2:
            assert dict(visit.trailers) == {b"grpc-status": b"0", b"x-checksum": b"9"}
    async with visitor.visit("POST", "/reset", headers, host=host, has_body=True) as visit:
        await visit.send(b"one")
        with pytest.raises(TruncatedError):
            await visit.answer()
    assert (await visitor.ask("GET", "/not-modified", host=host)).status == 304
    async with visitor.visit("POST", "/Call", headers, host=host, has_body=True) as visit:
        await visit.send(b"one")
        await visit.response()
        await visit.leave()
        with trio.fail_after(5):
            await site.grpc.abandoned.wait()


# --- WebSockets ----------------------------------------------------------------------------------


class Websocket:
    """Messages over a visit."""

    def __init__(
        self, send: Callable[[bytes], object], receive: Callable[[], object], ahead: bytes = b""
    ) -> None:
        self._send = send
        self._receive = receive
        self._protocol = Connection(ConnectionType.CLIENT, trailing_data=ahead)
        self._events: list[Event] = []

    async def send(self, event: Event) -> None:
        await self._send(self._protocol.send(event))  # type: ignore[misc]

    async def receive(self) -> Event:
        while True:
            for event in self._protocol.events():
                return event
            data = await self._receive()  # type: ignore[misc]
            self._protocol.receive_data(data or None)

    async def whole(self, kind: type[BytesMessage]) -> bytes:
        data = b""
        while True:
            event = await self.receive()
            assert isinstance(event, kind), event
            data += event.data
            if event.message_finished:
                return data


async def talk(websocket: Websocket) -> None:
    for text in ("hello", "again"):
        await websocket.send(TextMessage(text))
        assert await websocket.receive() == TextMessage(text.upper())
    big = pattern(0, 3_000_000)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(websocket.send, BytesMessage(big))
        assert await websocket.whole(BytesMessage) == big


WEBSOCKET_HEADERS = [(b"sec-websocket-version", b"13"), (b"origin", b"https://app.example.com")]


@asynccontextmanager
async def websocket1(site: Site, path: str, host: str) -> AsyncIterator[tuple[bytes, Websocket]]:
    """By HTTP/1.1 (RFC 6455): the response's head, and what comes after it."""
    stream = await site.visitor("1.1").connect(host)
    try:
        client = wsproto.WSConnection(ConnectionType.CLIENT)
        await stream.send_all(client.send(wsproto.events.Request(host, path)))
        head = b""
        while b"\r\n\r\n" not in head:
            data = await stream.receive()
            assert data, head
            head += data
        head, _, ahead = head.partition(b"\r\n\r\n")
        yield head, Websocket(stream.send_all, stream.receive, ahead)
    finally:
        stream.close()


async def test_websocket_by_http1(site: Site) -> None:
    """RFC 6455: messages both ways; a refusal is passed back."""
    async with websocket1(site, "/ws", "app.example.com") as (head, websocket):
        assert head.startswith(b"HTTP/1.1 101 ")
        await talk(websocket)
    async with websocket1(site, "/refused", "app.example.com") as (head, _):
        assert head.startswith(b"HTTP/1.1 403 ")
    await until(lambda: site.service.statistics().active == 0)


async def test_websocket_by_http2(site: Site) -> None:
    """RFC 8441: the same inside a stream of HTTP/2."""
    visitor = site.visitor("2")
    pseudo = [(b":protocol", b"websocket")]
    async with visitor.visit(
        "CONNECT", "/ws", WEBSOCKET_HEADERS, has_body=True, pseudo=pseudo
    ) as visit:
        assert (await visit.response())[0] == 200
        await talk(Websocket(visit.send, visit.receive))
    async with visitor.visit(
        "CONNECT", "/refused", WEBSOCKET_HEADERS, has_body=True, pseudo=pseudo
    ) as visit:
        assert (await visit.answer()).status == 403


async def test_tcp_in_a_websocket(site: Site) -> None:
    """A TCP service is reached by a WebSocket whose messages are its bytes."""
    async with websocket1(site, "/", "ssh.example.com") as (head, websocket):
        assert head.startswith(b"HTTP/1.1 101 ")
        await websocket.send(BytesMessage(b"SSH-2.0"))
        assert await websocket.receive() == BytesMessage(b"SSH-2.0")


# --- No HTTP at all ------------------------------------------------------------------------------


async def test_tcp(site: Site) -> None:
    """A port of the edge is one of the origin's; each side may end its direction first, and where
    nobody listens the visitor is let go."""
    stream = await trio.open_tcp_stream(*site.edge.edge.public.tcp[0])
    data = pattern(0, 5_000_000)
    received = bytearray()
    async with stream, trio.open_nursery() as nursery:

        async def send() -> None:
            await stream.send_all(data)
            await stream.send_eof()

        nursery.start_soon(send)
        async for piece in stream:
            received += piece
    assert received == data
    closed = await trio.open_tcp_stream(*site.edge.edge.public.tcp[1])
    async with closed:
        with trio.fail_after(5):
            try:
                assert await closed.receive_some(100) == b""
            except trio.BrokenResourceError:
                pass


async def test_tls_that_is_passed_through(site: Site) -> None:
    """By its server name, TLS goes to the origin's own certificate; the edge has no key for it."""
    context = site.context()
    stream = await trio.open_tcp_stream("127.0.0.1", site.edge.edge.public.https[0][1])
    tls = trio.SSLStream(stream, context, server_hostname="through.example.com")
    async with stream:
        await tls.do_handshake()  # its certificate for *.example.com would be a wrong one here
        await tls.send_all(b"hi")
        assert await tls.receive_some(100) == b"own: hi"


async def test_udp(site: Site, transport: Transport) -> None:
    """A UDP port of the edge is one of the origin's, over QUIC; each visitor is a flow."""
    if transport is not Transport.QUIC:
        pytest.skip("HTTP/2 carries no datagrams")
    place = site.edge.edge.public.udp[0]
    for number in range(2):
        with trio.socket.socket(type=trio.socket.SOCK_DGRAM) as sock:
            await sock.connect(place)
            for _ in range(3):
                await sock.send(b"question %d" % number)
                assert await sock.recv(100) == b"QUESTION %d" % number
    assert len(set(site.udp_senders)) == 2


async def test_a_reader_that_stalls(visitor: Visitor, site: Site) -> None:
    """A visitor that does not read its download holds up nobody else."""
    async with visitor.visit("GET", f"/bytes?n={BULK_BYTES}") as stalled:
        assert await stalled.response()
        answer = await visitor.ask("POST", "/echo", body=pattern(0, 2_000_000))
        assert answer.body == pattern(0, 2_000_000)
        body = bytearray()
        while data := await stalled.receive():
            body += data
        assert body == pattern(0, BULK_BYTES)
