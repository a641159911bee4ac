"""Visitors that speak HTTP/1.1, through the proxy, to an origin."""

from __future__ import annotations

import h11
import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import MockClock

from relay.edge.limits import RequestLimits
from relay.edge.proxy import STREAM_WAIT_SECONDS, WEBSOCKET_LINGER_SECONDS
from relay.edge.visit_http1 import (
    BODY_SECONDS,
    HEAD_SECONDS,
    IDLE_SECONDS,
    BadHttpError,
    serve_http1,
)
from relay.edge.visitor_stages import VisitorStage
from tests.relay.edge.arena import (
    TUNNEL,
    Answer,
    Arena,
    Http1Client,
    OriginExchange,
    echo,
    open_arena,
)


async def quietly(*arguments: object) -> None:
    """The server, which says why it ends; the tests look at what the visitor sees."""
    try:
        await serve_http1(*arguments)  # type: ignore[arg-type]
    except BadHttpError:
        pass


def client_of(arena: Arena) -> Http1Client:
    return Http1Client(arena.visit(quietly))


async def rest(stream: trio.abc.ReceiveStream) -> bytes:
    """Everything until the connection ends."""
    data = b""
    with trio.fail_after(200):
        while chunk := await stream.receive_some(65536):
            data += chunk
    return data


async def test_leaving() -> None:
    """When the edge leaves, a visitor that waits on its connection is let go, and one whose request
    is under way gets its answer first."""
    async with open_arena() as arena:
        arena.connect()
        idle, busy, new = client_of(arena), client_of(arena), client_of(arena)
        await idle.ask()
        await busy.ask()
        await busy.start("POST", "/", [("Content-Length", "5")])
        await trio.testing.wait_all_tasks_blocked()
        arena.leaving.set()
        assert await rest(idle.stream) == b""
        await busy.send(h11.Data(data=b"hello"))
        await busy.send(h11.EndOfMessage())
        assert (await busy.answer()).body == b"hello"
        assert await rest(busy.stream) == b""
        # Somebody who was accepted just before may still ask once.
        answer = await new.ask()
        assert (answer.status, answer.header(b"connection")) == (200, b"close")


async def test_requests_one_after_another() -> None:
    """A connection carries any number of requests, with and without bodies."""
    async with open_arena() as arena:
        arena.connect()
        client = client_of(arena)
        for body in (None, b"", b"hello", bytes(300_000)):
            answer = await client.ask("POST", "/x?y", body=body)
            assert (answer.status, answer.body) == (200, body or b"")
            assert answer.header(b"x-origin") == b"echo"
            assert answer.header(b"cf-ray")
        head = arena.connections[0].exchanges[-1].head
        assert not isinstance(head, str)
        assert (head.method, head.authority, head.path) == ("POST", "app.example.com", "/x?y")
        await trio.testing.wait_all_tasks_blocked()
        assert arena.meter.active == 0
        assert arena.meter.tunnels[TUNNEL.id].bytes_in == 300_005


async def test_pipelined_requests_are_answered_in_order() -> None:
    """Three requests in one write, three responses in their order, none mixed with another."""

    async def path_back(exchange: OriginExchange) -> None:
        assert not isinstance(exchange.head, str)
        body = await exchange.origin_read_all()
        exchange.origin_respond(200)
        await exchange.origin_send(exchange.head.path.encode() + body)
        exchange.origin_end()

    async with open_arena() as arena:
        arena.connect(path_back)
        stream = arena.visit(quietly)
        await stream.send_all(
            b"GET /1 HTTP/1.1\r\nHost: app.example.com\r\n\r\n"
            b"POST /2 HTTP/1.1\r\nHost: app.example.com\r\nContent-Length: 2\r\n\r\nab"
            b"GET /3 HTTP/1.1\r\nHost: app.example.com\r\nConnection: close\r\n\r\n"
        )
        data = await rest(stream)
        assert data.count(b"HTTP/1.1 200") == 3
        assert data.index(b"/1") < data.index(b"/2ab") < data.index(b"/3")


async def test_both_directions_at_once() -> None:
    """An origin that answers while it is asked: neither waits for the other's end."""
    async with open_arena() as arena:
        arena.connect()
        client = client_of(arena)
        await client.start("POST", "/", [("Transfer-Encoding", "chunked")])
        for number in range(5):
            data = b"message %d" % number
            await client.send(h11.Data(data=data))
            if not number:
                assert isinstance(await client.event(), h11.Response)
            event = await client.event()
            assert isinstance(event, h11.Data)
            assert event.data == data
        await client.send(h11.EndOfMessage())
        assert isinstance(await client.event(), h11.EndOfMessage)


async def test_trailers_both_ways() -> None:
    """Trailers of a chunked body go on, those of a response come back."""

    async def origin(exchange: OriginExchange) -> None:
        await exchange.origin_read_all()
        exchange.origin_respond(200)
        await exchange.origin_send(b"x")
        exchange.origin_end((b"grpc-status", b"0"), (b"content-length", b"9"))

    async with open_arena() as arena:
        connection = arena.connect(origin)
        client = client_of(arena)
        await client.start("POST", "/", [("Transfer-Encoding", "chunked")])
        await client.send(h11.EndOfMessage(headers=[("x-check", "1"), ("cf-int-x", "1")]))
        answer = await client.answer()
        assert answer.trailers == ((b"grpc-status", b"0"),)
        assert connection.exchanges[0].request_trailers == ((b"x-check", b"1"),)


async def test_trailers_of_a_response_with_a_length_are_left_out() -> None:
    """HTTP/1.1 has no place for them; the response is complete all the same."""

    async def origin(exchange: OriginExchange) -> None:
        exchange.origin_respond(200, (b"content-length", b"1"))
        await exchange.origin_send(b"x")
        exchange.origin_end((b"x-check", b"1"))

    async with open_arena() as arena:
        arena.connect(origin)
        client = client_of(arena)
        assert (await client.ask()).body == b"x"
        assert (await client.ask()).body == b"x"


async def test_expect_continue_is_answered_when_the_body_is_wanted() -> None:
    """An origin that reads makes the visitor send; one that refuses at once spares it the body."""

    async with open_arena() as arena:
        arena.connect()
        client = client_of(arena)
        await client.start("POST", "/", [("Content-Length", "2"), ("Expect", "100-continue")])
        event = await client.event()
        assert isinstance(event, h11.InformationalResponse)
        assert event.status_code == 100
        await client.send(h11.Data(data=b"ab"))
        await client.send(h11.EndOfMessage())
        assert (await client.answer()).body == b"ab"
        assert not any(n == b"expect" for n, _ in arena.connections[0].exchanges[0].head.headers)  # type: ignore[union-attr]
    async with open_arena() as arena:
        stream = arena.visit(quietly)
        await stream.send_all(
            b"POST / HTTP/1.1\r\nHost: elsewhere\r\n"
            b"Content-Length: 9\r\nExpect: 100-continue\r\n\r\n"
        )
        data = await rest(stream)
        assert data.startswith(b"HTTP/1.1 404")


async def test_head_and_no_content() -> None:
    """Responses without bodies keep the announced length and the connection."""

    async def origin(exchange: OriginExchange) -> None:
        assert not isinstance(exchange.head, str)
        if exchange.head.method == "HEAD":
            exchange.origin_respond(200, (b"content-length", b"1234"))
        else:
            exchange.origin_respond(304 if exchange.head.path == "/304" else 204)
        exchange.origin_end()

    async with open_arena() as arena:
        arena.connect(origin)
        client = client_of(arena)
        answer = await client.ask("HEAD")
        assert (answer.header(b"content-length"), answer.body) == (b"1234", b"")
        assert (await client.ask("GET", "/204")).status == 204
        assert (await client.ask("GET", "/304")).status == 304


UPGRADE = [
    ("Connection", "Upgrade"),
    ("Upgrade", "websocket"),
    ("Sec-WebSocket-Version", "13"),
    ("Sec-WebSocket-Key", "dGhlIHNhbXBsZSBub25jZQ=="),
]


async def websocket_origin(exchange: OriginExchange) -> None:
    exchange.origin_respond(
        101, (b"sec-websocket-accept", b"s3pPLMBiTxaQ9kYGzzhZRbK+xOo="), (b"connection", b"Upgrade")
    )
    while data := await exchange.origin_receive():
        await exchange.origin_send(data)
    exchange.origin_end()


async def test_websockets_pass_raw_bytes() -> None:
    """After the handshake whatever comes goes through, also what came with the request."""
    async with open_arena() as arena:
        arena.connect(websocket_origin)
        stream = arena.visit(quietly)
        client = Http1Client(stream)
        request = h11.Request(
            method="GET", target="/ws", headers=[("Host", "a.example.com"), *UPGRADE]
        )
        head = client.protocol.send(request)
        assert head is not None
        await stream.send_all(
            head + (client.protocol.send(h11.EndOfMessage()) or b"") + b"\x81early"
        )
        event = await client.event()
        assert isinstance(event, h11.InformationalResponse)
        assert event.status_code == 101
        assert (b"upgrade", b"websocket") in list(event.headers)
        received = client.protocol.trailing_data[0]
        while len(received) < 6:
            received += await stream.receive_some(100)
        assert received == b"\x81early"
        await stream.send_all(bytes(100_000))
        received = b""
        while len(received) < 100_000:
            received += await stream.receive_some(65536)
        assert received == bytes(100_000)
        await stream.send_eof()
        assert await rest(stream) == b""
        await trio.testing.wait_all_tasks_blocked()
        assert arena.meter.active == 0


async def test_a_refused_websocket_is_an_ordinary_response() -> None:
    """The origin's own answer comes back, and the connection goes on."""

    async def refuse_at_once(exchange: OriginExchange) -> None:
        exchange.origin_respond(403, (b"content-length", b"2"))
        await exchange.origin_send(b"no")
        exchange.origin_end()

    async with open_arena() as arena:
        arena.connect(refuse_at_once)
        client = client_of(arena)
        for _ in range(2):
            answer = await client.ask("GET", "/", UPGRADE)
            assert (answer.status, answer.body) == (403, b"no")


async def test_a_closing_websocket_ends_in_time(autojump_clock: MockClock) -> None:
    """When the visitor has closed its direction, an origin that goes on is cut off."""

    async def deaf(exchange: OriginExchange) -> None:
        exchange.origin_respond(101)
        await trio.sleep_forever()

    async with open_arena() as arena:
        arena.connect(deaf)
        client = client_of(arena)
        await client.start("GET", "/", UPGRADE)
        await client.send(h11.EndOfMessage())
        await client.event()
        started = trio.current_time()
        stream = client.stream
        assert isinstance(stream, trio.SocketStream)
        await stream.send_eof()
        await rest(stream)
        assert trio.current_time() - started == pytest.approx(WEBSOCKET_LINGER_SECONDS)
        await trio.testing.wait_all_tasks_blocked()
        assert arena.meter.active == 0


async def test_idempotent_requests_go_to_another_connection() -> None:
    """A GET, and a PUT with its body, whose connection dies without a byte are answered by the
    next one."""

    async def die(exchange: OriginExchange) -> None:
        await exchange.origin_receive()
        exchange.fail()

    async with open_arena() as arena:
        first = arena.connect(die)
        arena.connect(die)
        arena.connect()
        client = client_of(arena)
        assert (await client.ask("GET")).status == 200
        assert (await client.ask("PUT", body=b"content")).body == b"content"
        traffic = arena.meter.tunnels[first.tunnel_id]
        assert traffic.retries >= 2
        assert traffic.errors == 0
        assert traffic.by_status == {200: 2}


async def test_a_post_is_not_sent_twice() -> None:
    """Unless the connector promises that it was not looked at."""

    async def die_after_reading(exchange: OriginExchange) -> None:
        await exchange.origin_receive()
        exchange.fail()

    async def refuse_stream(exchange: OriginExchange) -> None:
        exchange.fail(is_unprocessed=True)

    async with open_arena() as arena:
        bad = arena.connect(die_after_reading)
        client = client_of(arena)
        assert (await client.ask("POST", body=b"x")).status == 502
        assert len(bad.exchanges) == 1
        bad.drain("")
        arena.connect(refuse_stream)
        arena.connect()
        client = client_of(arena)
        assert (await client.ask("POST", body=b"x")).body == b"x"


async def test_a_response_that_breaks_off_is_seen_to_break_off() -> None:
    """No second try once the visitor has bytes; the connection ends without the final chunk."""

    async def break_off(exchange: OriginExchange) -> None:
        exchange.origin_respond(200)
        await exchange.origin_send(b"half")
        await trio.testing.wait_all_tasks_blocked()
        exchange.fail()

    async with open_arena() as arena:
        connection = arena.connect(break_off)
        stream = arena.visit(quietly)
        await stream.send_all(b"GET / HTTP/1.1\r\nHost: app.example.com\r\n\r\n")
        data = await rest(stream)
        assert data.endswith(b"half\r\n")
        assert len(connection.exchanges) == 1
        assert arena.meter.tunnels[connection.tunnel_id].errors == 1


async def test_a_body_shorter_than_announced_is_seen_to_be_short() -> None:
    """The visitor must not take half a response for the whole, nor the next one for the rest."""

    async def short(exchange: OriginExchange) -> None:
        exchange.origin_respond(200, (b"content-length", b"9"))
        await exchange.origin_send(b"half")
        exchange.origin_end()

    async with open_arena() as arena:
        arena.connect(short)
        stream = arena.visit(quietly)
        await stream.send_all(2 * b"GET / HTTP/1.1\r\nHost: app.example.com\r\n\r\n")
        data = await rest(stream)
        assert data.count(b"HTTP/1.1") == 1
        assert data.endswith(b"half")


async def test_a_visitor_that_leaves_ends_the_exchange() -> None:
    """While the origin is still thinking, and in the middle of an upload."""

    async def think(exchange: OriginExchange) -> None:
        await trio.sleep_forever()

    for request in (
        b"GET / HTTP/1.1\r\nHost: app.example.com\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: app.example.com\r\nContent-Length: 9\r\n\r\nhalf",
    ):
        async with open_arena() as arena:
            connection = arena.connect(think)
            stream = arena.visit(quietly)
            await stream.send_all(request)
            await trio.testing.wait_all_tasks_blocked()
            await stream.aclose()
            await trio.testing.wait_all_tasks_blocked()
            assert connection.exchanges[0].is_over
            await trio.testing.wait_all_tasks_blocked()
            assert arena.meter.active == 0
            assert not arena.meter.tunnels[connection.tunnel_id].by_status


async def test_requests_wait_for_a_connector_after_an_outage(autojump_clock: MockClock) -> None:
    """A tunnel that had connections a moment ago is waited for; one that has had none is not."""
    async with open_arena() as arena:
        client = client_of(arena)
        async with trio.open_nursery() as nursery:

            async def connect_late() -> None:
                await trio.sleep(15)
                arena.connect()

            nursery.start_soon(connect_late)
            started = trio.current_time()
            assert (await client.ask()).status == 200
            assert trio.current_time() - started == pytest.approx(15)
        arena.connections[0].drain("gone")
        await trio.sleep(61)
        started = trio.current_time()
        answer = await client_of(arena).ask()
        assert answer.status == 503
        assert answer.header(b"retry-after")
        assert trio.current_time() == started


async def test_requests_wait_for_a_stream_but_not_for_ever(autojump_clock: MockClock) -> None:
    """A connector that has all its streams in use gets the next request when one ends, or never:
    then the visitor is told."""
    async with open_arena() as arena:
        released = trio.Event()

        async def slow(exchange: OriginExchange) -> None:
            await released.wait()
            await echo(exchange)

        connection = arena.connect(slow)
        connection.streams = 1
        answers: list[Answer] = []

        async def ask() -> None:
            answers.append(await client_of(arena).ask())

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask)
            await trio.sleep(1)
            nursery.start_soon(ask)
            await trio.sleep(STREAM_WAIT_SECONDS + 1)
            assert [answer.status for answer in answers] == [503]
            assert b"as many requests under way" in answers[0].body
            nursery.start_soon(ask)
            await trio.sleep(1)
            released.set()
        assert [answer.status for answer in answers] == [503, 200, 200]
        await trio.testing.wait_all_tasks_blocked()
        assert arena.meter.active == 0


async def test_nothing_published_here() -> None:
    """An unknown host is 404, the management host is refused, and both are counted."""
    async with open_arena() as arena:
        arena.connect()
        client = client_of(arena)
        assert (await client.ask("GET", "http://other.org/")).status == 400
        stream = arena.visit(quietly)
        await stream.send_all(b"GET / HTTP/1.1\r\nHost: other.org\r\nConnection: close\r\n\r\n")
        assert (await rest(stream)).startswith(b"HTTP/1.1 404")
        assert arena.refusals.counts[VisitorStage.REQUEST] == 2
        assert not arena.connections[0].exchanges


ATTACKS = [
    (
        b"POST / HTTP/1.1\r\n@Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
        b"GET /admin HTTP/1.1\r\n@\r\n"
    ),
    b"POST / HTTP/1.1\r\n@Content-Length: 5\r\nContent-Length: 6\r\n\r\n0\r\n\r\nX",
    b"POST / HTTP/1.1\r\n@Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n",
    b"POST / HTTP/1.1\r\n@Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n",
    b"POST / HTTP/1.1\r\n@Transfer-Encoding: \x0bchunked\r\n\r\n0\r\n\r\n",
    b"POST / HTTP/1.0\r\n@Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    b"GET / HTTP/1.1\r\n@X: a\rSmuggled: 1\r\n\r\n",
    b"GET / HTTP/1.1\r\n@X: a\x00b\r\n\r\n",
    b"GET / HTTP/1.1\r\n@ folded: 1\r\n\r\n",
    b"GET / HTTP/1.1\r\n@Host: management.argotunnel.com\r\n\r\n",
    b"GET http://management.argotunnel.com/ HTTP/1.1\r\n@\r\n",
    b"GET / HTTP/1.1\r\nHost: Management.ArgoTunnel.com.:443\r\n\r\n",
    b"GET / HTTP/1.1\r\n\r\n",
    b"GET /\r\n\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"GET / HTTP/1.1\r\n@" + b"X: y\r\n" * 30000,
    b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\n@\r\n",
]
SMUGGLES = [attack.replace(b"@", b"Host: app.example.com\r\n") for attack in ATTACKS]
"""With "@" for the Host header."""


@pytest.mark.parametrize("attack", SMUGGLES)
async def test_smuggling_reaches_no_connector(attack: bytes) -> None:
    """Whatever two programs could read in two ways is answered with an error, and nothing after it
    is read as a request."""
    async with open_arena() as arena:
        connection = arena.connect()
        stream = arena.visit(quietly)
        await stream.send_all(attack)
        await stream.send_eof()
        data = await rest(stream)
        assert b"HTTP/1.1 2" not in data
        assert data.startswith((b"HTTP/1.1 4", b"HTTP/1.1 5"))
        for exchange in connection.exchanges:
            assert exchange.head.headers is None, "a request went through"  # type: ignore[union-attr]


async def test_bad_chunks_end_the_exchange() -> None:
    """A body that is malformed further in is not passed on as if it were complete."""
    async with open_arena() as arena:
        connection = arena.connect()
        stream = arena.visit(quietly)
        await stream.send_all(
            b"POST / HTTP/1.1\r\nHost: app.example.com\r\nTransfer-Encoding: chunked\r\n\r\n"
            b"2\r\nab\r\nzz\r\n\r\n"
        )
        data = await rest(stream)
        assert not data.endswith(b"0\r\n\r\n")
        assert connection.exchanges[0].is_over


async def test_slow_heads_slow_bodies_and_idlers_are_cut_off(autojump_clock: MockClock) -> None:
    """Slowloris: a head, a body or a pause that takes too long ends the connection."""

    async def drip(stream: trio.SocketStream, data: bytes) -> None:
        try:
            for position in range(len(data)):
                await stream.send_all(data[position : position + 1])
                await trio.sleep(3)
        except trio.BrokenResourceError:
            pass

    head = b"GET / HTTP/1.1\r\nHost: app.example.com\r\n\r\n"
    for data, seconds in ((head, HEAD_SECONDS), (b"", IDLE_SECONDS)):
        async with open_arena() as arena:
            arena.connect()
            stream = arena.visit(quietly)
            started = trio.current_time()
            arena.nursery.start_soon(drip, stream, data)
            await rest(stream)
            assert trio.current_time() - started == pytest.approx(seconds, abs=4)
    async with open_arena() as arena:
        connection = arena.connect()
        stream = arena.visit(quietly)
        await stream.send_all(
            b"POST / HTTP/1.1\r\nHost: app.example.com\r\nContent-Length: 9\r\n\r\nhal"
        )
        started = trio.current_time()
        await rest(stream)
        assert trio.current_time() - started == pytest.approx(BODY_SECONDS)
        assert connection.exchanges[0].is_over


async def test_one_source_can_not_have_all() -> None:
    """Requests above a source's share are answered with 429 and an hour to come back."""

    async def think(exchange: OriginExchange) -> None:
        await trio.sleep_forever()

    async with open_arena(limits=RequestLimits(requests_per_source=2)) as arena:
        arena.connect(think)
        for _ in range(2):
            stream = arena.visit(quietly)
            await stream.send_all(b"GET / HTTP/1.1\r\nHost: app.example.com\r\n\r\n")
        await trio.testing.wait_all_tasks_blocked()
        assert (await client_of(arena).ask()).status == 429


async def test_a_stalled_reader_is_cut_off_and_stalls_nobody(autojump_clock: MockClock) -> None:
    """While one visitor does not read, the next is served; in the end the first one is closed."""

    async def flood(exchange: OriginExchange) -> None:
        assert not isinstance(exchange.head, str)
        exchange.origin_respond(200)
        if exchange.head.path == "/flood":
            while True:
                await exchange.origin_send(bytes(65536))
        exchange.origin_end()

    async with open_arena() as arena:
        connection = arena.connect(flood)
        stalled = arena.visit(quietly)
        await stalled.send_all(b"GET /flood HTTP/1.1\r\nHost: app.example.com\r\n\r\n")
        assert (await client_of(arena).ask()).status == 200
        await trio.sleep(200)
        assert connection.exchanges[0].is_over
        await trio.testing.wait_all_tasks_blocked()
        assert arena.meter.active == 0
        await rest(stalled)


@given(st.binary(max_size=200), st.sampled_from(SMUGGLES[:12]), st.integers(0, 120))
async def test_no_bytes_do_harm(noise: bytes, start: bytes, position: int) -> None:
    """Whatever a visitor sends, the server ends in order and nothing is left behind."""
    async with open_arena() as arena:
        arena.connect()
        stream = arena.visit(quietly)
        await stream.send_all(start[:position] + noise)
        await stream.send_eof()
        await rest(stream)
        await trio.testing.wait_all_tasks_blocked()
        await trio.testing.wait_all_tasks_blocked()
        assert arena.meter.active == 0


async def test_a_refusal_before_the_body_was_read_says_that_the_connection_ends() -> None:
    """A visitor must not send its next request into a connection that closes."""
    async with open_arena() as arena:
        client = client_of(arena)
        await client.start("POST", "/", [("Host", "elsewhere.org"), ("Content-Length", "9")])
        answer = await client.answer()
        assert (answer.status, answer.header(b"connection")) == (404, b"close")
