"""Connectors over HTTP/2: requests, websockets, TCP, configuration, leaving, hostile ones."""

from __future__ import annotations

import json
import os
from pathlib import Path
from uuid import uuid4

import pytest
import trio
from trio.testing import MockClock, memory_stream_pair

from relay.edge.connection import (
    ConnectionFailedError,
    Exchange,
    RequestHead,
    ResponseHead,
)
from relay.edge.http2_session import PING_SECONDS, PING_TIMEOUT_SECONDS, serve_http2
from relay.edge.registration import EdgeStage
from relay.edge.registry import RemoteConfiguration, Tunnel
from tests.relay.edge.fake_connector import (
    CREDENTIALS,
    TUNNEL_ID,
    FakeConnector,
    Pipe,
    call,
    dialled,
    make_registrar,
    registered,
)
from traversal.io.http2_engine import Http2Error, Http2Limits
from traversal.io.http2_stream import Http2Stream, header
from traversal.wire.tunnel import rpc
from traversal.wire.tunnel.credentials import Credentials
from traversal.wire.tunnel.headers import (
    RESPONSE_HEADERS,
    RESPONSE_META,
    TCP_SOURCE,
    UPGRADE,
    ResponseMeta,
    serialize_headers,
)
from traversal.wire.tunnel.registration import (
    DUPLICATE_CONNECTION,
    ConnectionDetails,
    ConnectionRefusal,
    RegistrationMethod,
)

FROM_ORIGIN = ResponseMeta(is_from_origin=True).encode()
WEBSOCKET_HEADERS = serialize_headers([(b"Sec-Websocket-Accept", b"x"), (b"Upgrade", b"websocket")])
GET = RequestHead("GET", "https", "app.example.com", "/a?b", ((b"cookie", b"x=1"),))


async def read_all(source: Exchange | Http2Stream) -> bytes:
    body = b""
    while data := await source.receive():
        body += data
    return body


async def echo(stream: Http2Stream) -> None:
    """Answer with what came, and with what the request said of itself."""
    path = header(stream.request_headers, b":path") or b""
    kind = header(stream.request_headers, UPGRADE) or b""
    origin = [(b"X-Path", path), (b"X-Kind", kind), (b"Cf-Int-Secret", b"no")]
    if kind == b"websocket":
        origin.append((b"Sec-WebSocket-Accept", b"x"))
    await stream.respond(
        [
            (b":status", b"200"),
            (RESPONSE_META, FROM_ORIGIN),
            (RESPONSE_HEADERS, serialize_headers(origin)),
        ]
    )
    try:
        while data := await stream.receive():
            await stream.send(data)
        await stream.send_end([(b"x-checksum", b"1"), (b"cf-int-x", b"2")])
    except Http2Error:
        pass


async def ignore(stream: Http2Stream) -> None:
    """Take a request and never answer."""


async def test_get() -> None:
    """A request reaches the connector, and the origin's headers and trailers come back clean."""
    async with registered(make_registrar(), echo) as (_, connection):
        async with await connection.request(GET) as exchange:
            assert await exchange.response() == ResponseHead(
                200, ((b"x-path", b"/a?b"), (b"x-kind", b""))
            )
            assert await read_all(exchange) == b""
            assert exchange.trailers == ((b"x-checksum", b"1"),)
            assert connection.active == 1
        assert (connection.active, connection.requests) == (0, 1)


async def test_bodies_both_ways_at_once() -> None:
    """A response may come before and while the request is sent; large bodies arrive whole."""
    head = RequestHead("POST", "https", "app.example.com", "/", (), has_body=True)
    body = bytes(range(256)) * 40_000
    async with (
        registered(make_registrar(), echo) as (_, connection),
        await connection.request(head) as exchange,
        trio.open_nursery() as nursery,
    ):

        async def send() -> None:
            for start in range(0, len(body), 100_000):
                await exchange.send(body[start : start + 100_000])
            await exchange.send_end()
            await exchange.send_end()

        nursery.start_soon(send)
        assert (await exchange.response()).status == 200
        assert await read_all(exchange) == body


async def test_websocket() -> None:
    """An accepted websocket is a 101, with the raw bytes both ways."""
    head = RequestHead("GET", "https", "app.example.com", "/ws", (), kind="websocket")
    async with (
        registered(make_registrar(), echo) as (_, connection),
        await connection.request(head) as exchange,
    ):
        response = await exchange.response()
        assert response.status == 101
        assert (b"x-kind", b"websocket") in response.headers
        await exchange.send(b"\x81\x02hi")
        assert await exchange.receive() == b"\x81\x02hi"


async def test_refused_websocket() -> None:
    """A page instead of a websocket stays a page."""

    async def refuse(stream: Http2Stream) -> None:
        headers = [(b":status", b"200"), (RESPONSE_META, FROM_ORIGIN)]
        await stream.respond(headers, end_stream=True)

    head = RequestHead("GET", "https", "app.example.com", "/ws", (), kind="websocket")
    async with (
        registered(make_registrar(), refuse) as (_, connection),
        await connection.request(head) as exchange,
    ):
        assert (await exchange.response()).status == 200


async def test_tcp() -> None:
    """A TCP stream names destination and source, and carries raw bytes."""
    seen = []

    async def dial(stream: Http2Stream) -> None:
        seen.append(header(stream.request_headers, b":authority"))
        seen.append(header(stream.request_headers, TCP_SOURCE))
        await echo(stream)

    async with (
        registered(make_registrar(), dial) as (_, connection),
        await connection.connect_tcp("192.0.2.9:22", "203.0.113.5:1000") as exchange,
    ):
        assert (await exchange.response()).status == 200
        await exchange.send(b"SSH-2.0")
        assert await exchange.receive() == b"SSH-2.0"
    assert seen == [b"192.0.2.9:22", b"203.0.113.5:1000"]


async def test_errors_of_the_connector() -> None:
    """Its own 502 is told from one of the origin, and a limited flow from a broken one."""

    async def fail(stream: Http2Stream) -> None:
        meta = ResponseMeta(is_from_origin=False, is_rate_limited=True).encode()
        await stream.respond([(b":status", b"502"), (RESPONSE_META, meta)], end_stream=True)

    async with (
        registered(make_registrar(), fail) as (_, connection),
        await connection.request(GET) as exchange,
    ):
        assert await exchange.response() == ResponseHead(
            502, (), is_from_connector=True, is_flow_limited=True
        )


@pytest.mark.parametrize(
    "headers",
    [
        [(b":status", b"200"), (RESPONSE_HEADERS, b"no base64")],
        [(b":status", b"200"), (RESPONSE_META, b"[")],
        [(b":status", b"2000")],
        [(b":status", b"abc")],
    ],
)
async def test_malformed_responses(headers: list[tuple[bytes, bytes]]) -> None:
    """They fail the one exchange; the connection goes on."""
    answers = [headers, [(b":status", b"204")]]

    async def respond(stream: Http2Stream) -> None:
        await stream.respond(answers.pop(0), end_stream=True)

    async with registered(make_registrar(), respond) as (_, connection):
        async with await connection.request(GET) as exchange:
            with pytest.raises(ConnectionFailedError):
                await exchange.response()
        async with await connection.request(GET) as exchange:
            assert (await exchange.response()).status == 204
        assert connection.active == 0


async def test_what_may_be_repeated() -> None:
    """A refused stream promises that nothing was done; a reset or lost one does not."""
    codes = [7, 8]

    async def reset(stream: Http2Stream) -> None:
        stream.reset(codes.pop(0))

    async with registered(make_registrar(), reset) as (connector, connection):
        for is_unprocessed in (True, False):
            async with await connection.request(GET) as exchange:
                with pytest.raises(ConnectionFailedError) as caught:
                    await exchange.response()
                assert caught.value.is_unprocessed is is_unprocessed
        connector.connection.close()
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(ConnectionFailedError) as caught:
            await connection.request(GET)
        assert caught.value.is_unprocessed
        assert connection.active == 0


async def test_a_stalled_reader_holds_up_nobody() -> None:
    """While one response is not read, however large, another passes."""

    async def flood(stream: Http2Stream) -> None:
        if header(stream.request_headers, b":path") == b"/a?b":
            await echo(stream)
            return
        await stream.respond([(b":status", b"200")])
        try:
            while True:
                await stream.send(bytes(65536))
        except Http2Error:
            pass

    flooding = RequestHead("GET", "https", "app.example.com", "/flood", ())
    async with (
        registered(make_registrar(), flood) as (_, connection),
        await connection.request(flooding) as stalled,
    ):
        await stalled.response()
        await trio.testing.wait_all_tasks_blocked()
        for _ in range(20):
            with trio.fail_after(5):
                async with await connection.request(GET) as exchange:
                    assert await read_all(exchange) == b""


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


async def test_thousands_of_idle_websockets() -> None:
    """They cost some KiB each, and whoever comes after them is served as if they weren't there."""
    count = 3000
    head = RequestHead("GET", "https", "app.example.com", "/ws", (), kind="websocket")
    limits = Http2Limits(streams=20_000)
    async with registered(make_registrar(), echo, limits=limits) as (_, connection):
        idle = []
        before = resident_bytes()
        for _ in range(count):
            exchange = await connection.request(head)
            assert (await exchange.response()).status == 101
            idle.append(exchange)
        assert resident_bytes() - before < count * 20_000  # both ends, in this process
        assert connection.active == count
        async with await connection.request(GET) as exchange:
            assert await read_all(exchange) == b""
        await idle[0].send(b"still here")
        assert await idle[0].receive() == b"still here"
        for exchange in idle:
            exchange.reset()
        assert connection.active == 0


async def test_probes_are_no_failures() -> None:
    """A connector that only looks whether it gets through is not counted as refused."""
    registrar = make_registrar()
    near, far = memory_stream_pair()
    await far.aclose()
    await serve_http2(Pipe(near), registrar, source="192.0.2.1")
    assert sum(registrar.refusals.counts.values()) == 0


async def test_configuration_push() -> None:
    """A remotely managed connector gets the configuration at once and each newer one once."""
    pushed: list[dict[str, object]] = []

    async def take(stream: Http2Stream) -> None:
        assert header(stream.request_headers, UPGRADE) == b"update-configuration"
        push = json.loads(await read_all(stream))
        pushed.append(push)
        await stream.respond([(b":status", b"200")])
        await stream.send(b'{"lastAppliedVersion":%d,"err":{}}' % push["version"])
        await stream.send_end()

    registrar = make_registrar(configuration=RemoteConfiguration(3, b'{"ingress":[]}'))
    async with registered(registrar, take) as (_, connection):
        assert connection.is_remotely_managed
        await trio.testing.wait_all_tasks_blocked()
        newer = RemoteConfiguration(4, b'{"ingress":[1]}')
        registrar.registry.add_tunnel(Tunnel("web", CREDENTIALS, newer))
        await trio.testing.wait_all_tasks_blocked()
        assert pushed == [
            {"version": 3, "config": {"ingress": []}},
            {"version": 4, "config": {"ingress": [1]}},
        ]


async def test_configuration_that_is_not_taken(autojump_clock: MockClock) -> None:
    """It is offered again later; the connection goes on meanwhile."""
    offers = 0

    async def refuse(stream: Http2Stream) -> None:
        nonlocal offers
        offers += 1
        await stream.respond([(b":status", b"502")], end_stream=True)

    registrar = make_registrar(configuration=RemoteConfiguration(3, b"{}"))
    async with registered(registrar, refuse) as (_, connection):
        await trio.sleep(100)
        assert connection.is_usable
        assert offers in (3, 4)
        assert registrar.refusals.counts[EdgeStage.PROTOCOL] == offers


async def test_reported_configuration() -> None:
    """A connector with a configuration of its own reports it."""
    async with registered(make_registrar(), ignore) as (connector, connection):
        assert not connection.is_remotely_managed
        await connector.report(b'{"ingress":[]}')
        assert connection.local_configuration == b'{"ingress":[]}'


async def test_unregistering_while_a_request_runs() -> None:
    """No new requests; the connection is closed by the edge as soon as the last one is done."""
    registrar = make_registrar()
    head = RequestHead("POST", "https", "app.example.com", "/", (), has_body=True)
    async with registered(registrar, echo) as (connector, connection):
        exchange = await connection.request(head)
        await connector.unregister()
        await trio.testing.wait_all_tasks_blocked()
        assert registrar.registry.pick(TUNNEL_ID) is None
        await exchange.send(b"late")
        await exchange.send_end()
        assert await read_all(exchange) == b"late"
        assert connector.connection.failure is None
        exchange.reset()
        await trio.testing.wait_all_tasks_blocked()
        assert connector.connection.failure is not None
        assert list(registrar.registry.connections()) == []


async def test_unregistering_when_idle_closes_at_once(autojump_clock: MockClock) -> None:
    """The user of a connector that stops does not wait for the grace period."""
    async with registered(make_registrar(drain_seconds=30), ignore) as (connector, _):
        await connector.unregister()
        await expect_closed(connector)
        assert trio.current_time() < 1


async def test_draining_is_bounded(autojump_clock: MockClock) -> None:
    """A request that does not end holds a leaving connection no longer than it may."""
    async with (
        registered(make_registrar(drain_seconds=7), ignore) as (connector, connection),
        await connection.request(GET),
    ):
        connection.drain("test")
        await trio.sleep(6.9)
        assert connector.connection.failure is None
        await trio.sleep(1)
        assert connector.connection.failure is not None


async def test_several_connections_and_failover() -> None:
    """Each connection of each connector serves; when one breaks, the others do."""
    registrar = make_registrar()
    connector_id = uuid4()
    async with (
        registered(registrar, echo, connector_id=connector_id) as (first, _),
        registered(registrar, echo, connector_id=connector_id, index=1) as (_, second),
        registered(registrar, echo) as (_, third),
    ):
        assert {registrar.registry.pick(TUNNEL_ID) for _ in range(3)} > {second, third}
        first.connection.close()
        await trio.testing.wait_all_tasks_blocked()
        assert {registrar.registry.pick(TUNNEL_ID) for _ in range(4)} == {second, third}


async def test_registering_the_same_connection_again() -> None:
    """The new one takes over, and the old one is closed when it is idle."""
    registrar = make_registrar()
    connector_id = uuid4()
    async with (
        registered(registrar, echo, connector_id=connector_id) as (old, _),
        registered(registrar, echo, connector_id=connector_id) as (_, connection),
    ):
        await trio.testing.wait_all_tasks_blocked()
        assert old.connection.failure is not None
        assert list(registrar.registry.connections()) == [connection]


async def expect_closed(connector: FakeConnector) -> None:
    with trio.fail_after(30), pytest.raises(Http2Error):
        await connector.connection.accept()


async def test_wrong_credentials(autojump_clock: MockClock) -> None:
    """They are answered, and then the edge closes: the connector would not notice otherwise."""
    registrar = make_registrar()
    wrong = Credentials(TUNNEL_ID, "account", b"T" * 32)
    async with dialled(registrar) as connector:
        answer = await connector.register(connector.registration(wrong))
        assert isinstance(answer, ConnectionRefusal)
        assert not answer.should_retry
        await expect_closed(connector)
    assert registrar.refusals.counts[EdgeStage.REGISTRATION] == 1
    assert list(registrar.registry.connections()) == []


async def test_registration_while_draining(autojump_clock: MockClock) -> None:
    """The answer is the one that makes the connector try again instead of giving up."""
    registrar = make_registrar()
    registrar.is_draining = True
    async with dialled(registrar) as connector:
        assert await connector.register() == ConnectionRefusal(
            DUPLICATE_CONNECTION, should_retry=True
        )
        await expect_closed(connector)


async def test_strangers_leave_room(autojump_clock: MockClock) -> None:
    """Connections that don't register are few per source; who registers counts no more."""
    registrar = make_registrar()
    registrar.unregistered.limit_per_source = 1
    async with dialled(registrar) as silent:
        with pytest.RaisesGroup(Http2Error):
            async with dialled(registrar):
                pass
        assert registrar.refusals.counts[EdgeStage.LIMITS] == 1
        assert isinstance(await silent.register(), ConnectionDetails)
        async with dialled(registrar) as other:
            assert isinstance(await other.register(), ConnectionDetails)
    assert registrar.unregistered.total == 0


async def test_slow_control_stream(autojump_clock: MockClock) -> None:
    """Byte by byte is fine as long as it comes in time; whoever takes longer is let go."""
    registrar = make_registrar()
    for seconds_per_byte, is_in_time in ((0.01, True), (0.05, False)):
        async with dialled(registrar) as connector:
            method = RegistrationMethod.REGISTER_CONNECTION
            register = call(1, method, connector.registration().to_struct(), 0)
            try:
                for byte in rpc.Bootstrap(0).encode() + register.encode():
                    await connector.send(bytes([byte]))
                    await trio.sleep(seconds_per_byte)
            except Http2Error:
                pass
            assert (connector.connection.failure is None) is is_in_time
    assert registrar.accepted == 1
    assert registrar.refusals.counts[EdgeStage.PROTOCOL] == 1


async def test_hostile_control_stream(autojump_clock: MockClock) -> None:
    """Noise and messages without end are refused, counted, and hold no memory."""
    registrar = make_registrar()
    for data in (b"\xff" * 100, bytes(100_000), b"\0\0\0\0\xff\xff\xff\xff" + bytes(1000)):
        async with dialled(registrar) as connector:
            await connector.control.send(data)
            await expect_closed(connector)
    assert registrar.refusals.counts[EdgeStage.PROTOCOL] == 3


async def test_dead_peer(autojump_clock: MockClock) -> None:
    """A connector that is silent to pings is given up; one that answers stays for ever."""
    registrar = make_registrar()
    async with registered(registrar, ignore) as (_, connection):
        await trio.sleep(1000)
        assert connection.is_usable
    async with registered(registrar, ignore) as (connector, connection):
        connector.connection._engine.receive = lambda data, now: []  # type: ignore[method-assign]
        await trio.sleep(PING_SECONDS + PING_TIMEOUT_SECONDS + 2)
        assert not connection.is_usable
        assert list(registrar.registry.connections()) == []
