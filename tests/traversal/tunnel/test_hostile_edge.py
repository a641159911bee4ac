"""Edges that are broken or hostile, against our connector: over HTTP/2 in memory, with time that
jumps, and several of them on loopback."""

from __future__ import annotations

import functools
import logging
import os
import random
import re
import ssl
from collections.abc import Awaitable, Callable
from dataclasses import replace
from itertools import pairwise

import pytest
import trio
import trustme
from hyperframe.frame import (
    ContinuationFrame,
    DataFrame,
    GoAwayFrame,
    HeadersFrame,
    PingFrame,
    RstStreamFrame,
    SettingsFrame,
    WindowUpdateFrame,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from trio.testing import MockClock

from tests.fuzz.edge import (
    PREFACE,
    REGISTRATION,
    EchoService,
    HostileEdge,
    connected,
    drive_connector,
    request_frame,
)
from tests.system.tunnel_world import until
from traversal.tunnel import connector as connector_module
from traversal.tunnel import http2
from traversal.tunnel.connector import Connector, ConnectorOptions
from traversal.tunnel.discovery import EdgePlaces
from traversal.tunnel.edge_connection import DialFailedError, DialOptions, EdgeConnection
from traversal.tunnel.http2 import CONTROL_SECONDS, LIMITS
from traversal.tunnel.transport_choice import Transport
from traversal.wire.tunnel import rpc
from traversal.wire.tunnel.capnp import EMPTY, encode_message
from traversal.wire.tunnel.credentials import Credentials
from traversal.wire.tunnel.registration import ConnectionRefusal

Behaviour = Callable[[HostileEdge], Awaitable[None]]
SECONDS = 30


# --- Before the registration ---------------------------------------------------------------------


async def silence(edge: HostileEdge) -> None:
    await edge.drain()


async def gone(edge: HostileEdge) -> None:
    await edge.stream.aclose()


async def other_protocol(edge: HostileEdge) -> None:
    await edge.send(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n")
    await edge.drain()


async def preface_only(edge: HostileEdge) -> None:
    await edge.send(PREFACE + SettingsFrame(0).serialize())
    await edge.drain()


async def pings_only(edge: HostileEdge) -> None:
    await edge.send(PREFACE + SettingsFrame(0).serialize())
    while True:
        await edge.send(PingFrame(0, opaque_data=bytes(8)).serialize())
        await trio.sleep(1)


async def request_first(edge: HostileEdge) -> None:
    await edge.send(PREFACE + SettingsFrame(0).serialize() + request_frame(1, is_end=True))
    await edge.drain()


async def head_bomb(edge: HostileEdge) -> None:
    head = request_frame(1, *[(b"x-%d" % n, b"v" * 60_000) for n in range(20)])
    frames = [PREFACE, SettingsFrame(0).serialize()]
    # One block in frames of a size that the connector takes.
    block = head[9:]
    first = HeadersFrame(1, data=block[:500_000])
    frames.append(first.serialize())
    for start in range(500_000, len(block), 500_000):
        more = ContinuationFrame(1, data=block[start : start + 500_000])
        if start + 500_000 >= len(block):
            more.flags.add("END_HEADERS")
        frames.append(more.serialize())
    await edge.send(b"".join(frames))
    await edge.drain()


async def head_without_end(edge: HostileEdge) -> None:
    await edge.send(PREFACE + SettingsFrame(0).serialize() + HeadersFrame(1, data=b"").serialize())
    for _ in range(10_000):
        await edge.send(ContinuationFrame(1, data=b"\0" * 100_000).serialize())


async def no_answer(edge: HostileEdge) -> None:
    await edge.begin()
    await edge.drain()


def answering(*answers: bytes) -> Behaviour:
    async def behave(edge: HostileEdge) -> None:
        await edge.begin()
        for answer in answers:
            await edge.tell(answer)
        await edge.drain()

    return behave


async def reset_control(edge: HostileEdge) -> None:
    await edge.begin()
    await edge.send(RstStreamFrame(1, error_code=2).serialize())
    await edge.drain()


async def end_control(edge: HostileEdge) -> None:
    await edge.begin()
    frame = DataFrame(1, data=b"")
    frame.flags.add("END_STREAM")
    await edge.send(frame.serialize())
    await edge.drain()


async def goaway(edge: HostileEdge) -> None:
    await edge.begin()
    await edge.send(GoAwayFrame(0, last_stream_id=0, error_code=11).serialize())
    await edge.drain()


REFUSAL = ConnectionRefusal("no\nFeb 30 forged line\x1b[2J" + "x" * 5000, should_retry=True)
HOSTED = rpc.Return(0, rpc.Hosted(0)).encode()
BEFORE: dict[str, tuple[Behaviour, str]] = {
    "silence": (silence, "no control stream within"),
    "gone": (gone, "closed the connection"),
    "other-protocol": (other_protocol, "HTTP/2"),
    "preface-only": (preface_only, "no control stream within"),
    "pings-only": (pings_only, "no control stream within"),
    "request-first": (request_first, "is no control stream"),
    "head-bomb": (head_bomb, "Oversized header block"),
    "head-without-end": (head_without_end, "HTTP/2"),
    "no-answer": (no_answer, "did not answer to the registration"),
    "zeros": (answering(bytes(4000)), "Cap'n Proto|RPC|tunnel"),
    "huge-message": (answering(b"\0\0\0\0\xff\xff\xff\x7f"), "Cap'n Proto"),
    "many-segments": (answering(b"\xff\xff\xff\xff" + bytes(100)), "Cap'n Proto"),
    "no-rpc": (answering(encode_message(EMPTY)), "RPC|Cap'n Proto|not answer"),
    "other-question": (answering(rpc.Return(77, EMPTY).encode()), "question 77"),
    "no-object": (answering(rpc.Return(0, EMPTY).encode()), "has no object"),
    "twice": (answering(HOSTED, HOSTED), "question 0"),
    "empty-results": (answering(HOSTED, rpc.Return(1, EMPTY).encode()), "registration|results"),
    "abort": (answering(rpc.Abort("no\r\nforged").encode()), "no..forged"),
    "refusal": (
        answering(HOSTED, rpc.Return(1, REFUSAL.to_struct()).encode()),
        r"refused the registration: no\?Feb 30 forged line\?\[2Jx+\.\.\.$",
    ),
    "reset-control": (reset_control, "reset the stream|no control stream within"),
    "end-control": (end_control, "ended the control stream"),
    "goaway": (goaway, "code 11"),
}


@pytest.mark.parametrize("name", BEFORE)
async def test_before_the_registration(name: str, autojump_clock: MockClock) -> None:
    """Whatever an edge does instead of registering us is a failed attempt within seconds, with a
    reason of one short line."""
    behave, reason = BEFORE[name]
    started = trio.current_time()
    async with connected(behave, EchoService()) as result:
        assert isinstance(result.outcome, DialFailedError)
        text = str(result.outcome)
        assert re.search(reason, text), text
        assert len(text) < 400
        assert text.isprintable()
        with trio.fail_after(5):
            await result.over.wait()
    assert trio.current_time() - started < CONTROL_SECONDS + 10


# --- After it ------------------------------------------------------------------------------------


def after(*datas: bytes, is_open: bool = True) -> Behaviour:
    async def behave(edge: HostileEdge) -> None:
        await edge.register()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(edge.drain)
            for data in datas:
                await edge.send(data)
            if not is_open:
                await edge.stream.send_eof()

    return behave


async def never_read(edge: HostileEdge) -> None:
    """Makes us answer and does not read."""
    await edge.register()
    while True:
        await edge.send(PingFrame(0, opaque_data=bytes(8)).serialize() * 10)
        await trio.sleep(0.2)


ENDS: dict[str, tuple[Behaviour, str]] = {
    "garbage": (after(b"\xff" * 4000), "HTTP/2"),
    "closed": (after(is_open=False), "closed the connection"),
    "goaway": (after(GoAwayFrame(0, last_stream_id=0, error_code=2).serialize()), "code 2"),
    "silence": (after(), "we closed"),
    "never-read": (never_read, "we closed|more pings"),
    "pushes": (after(bytes.fromhex("00000405040000000100000002")), "HTTP/2"),
    "even-stream": (after(request_frame(2)), "HTTP/2"),
    "data-on-no-stream": (after(DataFrame(99, data=b"x").serialize()), "HTTP/2"),
    "window-overflow": (
        after(*[WindowUpdateFrame(0, window_increment=2**31 - 1).serialize()] * 2),
        "HTTP/2",
    ),
    "reset-flood": (
        after(
            *[
                request_frame(n) + RstStreamFrame(n, error_code=8).serialize()
                for n in range(3, 9003, 2)
            ]
        ),
        "more pings, resets",
    ),
    "bad-head": (after(request_frame(3, (b"Bad Name", b"x"))), "HTTP/2"),
}


@pytest.mark.parametrize("name", ENDS)
async def test_after_the_registration(name: str, autojump_clock: MockClock) -> None:
    """An edge that breaks the protocol or falls silent ends its connection, with a reason, and
    nothing is left over."""
    behave, reason = ENDS[name]
    service = EchoService()
    async with connected(behave, service) as result:
        connection = result.outcome
        assert isinstance(connection, EdgeConnection)
        with trio.fail_after(60):
            await result.over.wait()
        assert re.search(reason, connection.failure), connection.failure
        assert connection.leaving.is_set()
        assert (service.active, connection.active) == (0, 0)


@pytest.mark.parametrize(
    "data",
    [b"\xff" * 100, rpc.Return(5, EMPTY).encode(), rpc.Abort("bye").encode()],
    ids=["garbage", "answer", "abort"],
)
async def test_garbage_on_the_control_stream(data: bytes, autojump_clock: MockClock) -> None:
    """The connection is to be replaced, but what it serves goes on."""
    finish = trio.Event()

    async def behave(edge: HostileEdge) -> None:
        await edge.register()
        await edge.send(request_frame(3))
        await edge.tell(data)
        await finish.wait()
        frame = DataFrame(3, data=b"body")
        frame.flags.add("END_STREAM")
        await edge.send(frame.serialize())
        await edge.drain()

    service = EchoService()
    async with connected(behave, service) as result:
        with trio.fail_after(5):
            await result.outcome.leaving.wait()
        assert not result.over.is_set()
        await until(lambda: service.active == 1)
        finish.set()
        with trio.fail_after(5):
            await until(lambda: not service.active)


async def test_a_flood_of_streams_is_bounded(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many exchanges an edge opens, and however large their heads are, no more are held
    than a limit says; what an edge gives up costs nothing any more."""

    limits = replace(LIMITS, streams=300, buffered_bytes=5 << 20)
    monkeypatch.setattr(http2, "LIMITS", limits)

    async def small(edge: HostileEdge) -> None:
        await edge.register()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(edge.drain)
            for number in range(3, 2 * limits.streams + 200, 2):
                await edge.send(request_frame(number, is_end=True))

    service = EchoService()
    service.hold = True
    async with connected(small, service) as result:
        await result.over.wait()
        assert service.served <= limits.streams
        assert "streams" in result.outcome.failure
        assert service.active == 0

    large_head = (b"x", b"v" * 900_000)

    async def large(edge: HostileEdge) -> None:
        await edge.register()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(edge.drain)
            for number in range(3, 43, 2):
                await edge.send(request_frame(number, large_head, is_end=True))
            await trio.sleep(1)
            assert service.active <= limits.buffered_bytes // 900_000
            for number in range(3, 43, 2):
                await edge.send(RstStreamFrame(number, error_code=8).serialize())
            await trio.sleep(1)
            assert service.active == 0
            await edge.send(request_frame(51, large_head, is_end=True))
            await trio.sleep(1)
            assert service.active == 1
            nursery.cancel_scope.cancel()
        await edge.stream.aclose()

    service = EchoService()
    service.hold = True
    async with connected(large, service) as result:
        await result.over.wait()


HEADERS = st.lists(
    st.tuples(
        st.sampled_from(
            [
                b"content-length",
                b"cf-cloudflared-proxy-connection-upgrade",
                b"cf-cloudflared-proxy-src",
                b"transfer-encoding",
                b"te",
                b"host",
                b":path",
                b":status",
                b"x",
                b"\xff",
            ]
        ),
        st.sampled_from(
            [b"", b"0", b"3", b"-1", b"websocket", b"update-configuration", b"\0", b"x"]
        )
        | st.binary(max_size=20),
    ),
    max_size=4,
)
STREAMS = st.sampled_from([0, 1, 3, 5, 7, 2, 2**31 - 1])
BODIES = st.binary(max_size=60)


def _data_frame(stream_id: int, data: bytes, is_end: bool) -> bytes:
    return (
        bytes([*len(data).to_bytes(3, "big"), 0, int(is_end), *stream_id.to_bytes(4, "big")]) + data
    )


def _any_request(
    stream_id: int, headers: list[tuple[bytes, bytes]], is_end: bool, method: bytes
) -> bytes:
    whole = request_frame(3, *headers, is_end=is_end, method=method)
    return whole[:5] + stream_id.to_bytes(4, "big") + whole[9:]


ACTIONS = st.one_of(
    st.builds(
        _any_request,
        STREAMS,
        HEADERS,
        st.booleans(),
        st.sampled_from([b"GET", b"POST", b"HEAD", b"CONNECT", b"", b"\0"]),
    ),
    st.builds(_data_frame, STREAMS, BODIES, st.booleans()),
    st.builds(
        lambda kind, flags, stream_id, body: (
            bytes([*len(body).to_bytes(3, "big"), kind, flags, *stream_id.to_bytes(4, "big")])
            + body
        ),
        st.integers(0, 16),
        st.integers(0, 255),
        STREAMS,
        BODIES,
    ),
    BODIES,
)


@settings(max_examples=60, deadline=None)
@given(st.lists(ACTIONS, max_size=12))
def test_any_frames(frames: list[bytes]) -> None:
    """Whatever frames come from an edge, in whatever order, the connection ends with the edge's,
    nothing else does, and no exchange is left."""
    drive_connector(b"".join(frames))


# --- Among others --------------------------------------------------------------------------------


class BadEdges:
    """Edges on loopback, with the TLS that connectors want, that behave as they are told."""

    def __init__(self) -> None:
        authority = trustme.CA()
        self._server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        authority.issue_cert("h2.cftunnel.com").configure_cert(self._server)
        self._client = ssl.create_default_context()
        authority.configure_trust(self._client)
        self.dials: list[tuple[int, float]] = []

    def context(self) -> ssl.SSLContext:
        return self._client

    async def listen(self, nursery: trio.Nursery, behave: Behaviour) -> tuple[str, int]:
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        port = listener.socket.getsockname()[1]

        async def serve(stream: trio.SocketStream) -> None:
            self.dials.append((port, trio.current_time()))
            tls = trio.SSLStream(stream, self._server, server_side=True)
            try:
                await behave(HostileEdge(tls))  # type: ignore[arg-type]
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                pass
            finally:
                await trio.aclose_forcefully(tls)

        nursery.start_soon(functools.partial(trio.serve_listeners, serve, [listener]))
        return "127.0.0.1", port

    def connector(self, *places: tuple[str, int]) -> Connector:
        credentials = Credentials(REGISTRATION.tunnel_id, "account", b"S" * 32)
        return Connector(
            ConnectorOptions(
                credentials,
                EdgePlaces(places),
                DialOptions(make_context=self.context),
                (Transport.HTTP2,),
                connections=1,
                grace_seconds=0.1,
            ),
            EchoService(),
            entropy=os.urandom,
            rng=random.Random(3),
        )


async def good(edge: HostileEdge) -> None:
    await edge.register()
    await edge.drain()


@pytest.mark.parametrize(
    "bad",
    [gone, other_protocol, request_first, reset_control, BEFORE["refusal"][0], BEFORE["zeros"][0]],
    ids=["gone", "other-protocol", "request-first", "reset", "refusal", "zeros"],
)
async def test_the_next_address_is_tried(bad: Behaviour, caplog: pytest.LogCaptureFixture) -> None:
    """With a broken edge and a good one, a connector ends up at the good one, whichever it tried
    first; the log has a line for each failure."""
    edges = BadEdges()
    caplog.set_level(logging.WARNING, "underpass.tunnel")
    async with trio.open_nursery() as nursery:
        broken = await edges.listen(nursery, bad)
        sound = await edges.listen(nursery, good)
        for places in ((broken, sound), (sound, broken)):
            connector = edges.connector(*places)
            with trio.fail_after(SECONDS):
                await nursery.start(connector.run)
            assert connector.connections[0].address.port == sound[1]
            assert connector.failures <= 1
        nursery.cancel_scope.cancel()
    failures = [record for record in caplog.records if "again in" in record.getMessage()]
    assert len(failures) == len([port for port, _ in edges.dials if port == broken[1]])


async def test_an_edge_that_takes_and_drops(monkeypatch: pytest.MonkeyPatch) -> None:
    """An edge that registers and closes at once is dialed again after waits that grow, not in a
    loop."""
    edges = BadEdges()

    async def drop(edge: HostileEdge) -> None:
        await edge.register()

    async with trio.open_nursery() as nursery:
        place = await edges.listen(nursery, drop)
        connector = edges.connector(place)
        await nursery.start(connector.run)
        with trio.fail_after(SECONDS):
            await until(lambda: len(edges.dials) >= 6)
        nursery.cancel_scope.cancel()
    times = [time for _, time in edges.dials]
    waits = [later - earlier for earlier, later in pairwise(times)]
    # At least half of 0.1 s, doubled each time.
    assert all(wait >= 0.05 * 2**number for number, wait in enumerate(waits))


async def test_connections_that_never_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of connections that the edge wants replaced and never closes only so many are kept."""
    monkeypatch.setattr(connector_module, "MAX_LEAVING", 3)
    monkeypatch.setattr(connector_module, "YOUNG_CAP_SECONDS", 0.01)
    monkeypatch.setattr(connector_module, "YOUNG_BASE_SECONDS", 0.01)
    edges = BadEdges()
    open_now = 0
    most = 0

    async def linger(edge: HostileEdge) -> None:
        nonlocal open_now, most
        await edge.register()
        open_now += 1
        most = max(most, open_now)
        await edge.tell(b"\xff" * 100)
        await edge.drain()
        open_now -= 1

    async with trio.open_nursery() as nursery:
        connector = edges.connector(await edges.listen(nursery, linger))
        await nursery.start(connector.run)
        with trio.fail_after(SECONDS):
            await until(lambda: len(edges.dials) >= 12)
        nursery.cancel_scope.cancel()
    assert most <= 3 + 3  # those that leave, the current one, and what is being closed
