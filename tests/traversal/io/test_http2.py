"""HTTP/2 connections: two of ours joined, a hostile peer written with h2's frames, and curl."""

from __future__ import annotations

import os
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import trio
from h2.errors import ErrorCodes
from hyperframe.frame import (
    DataFrame,
    GoAwayFrame,
    HeadersFrame,
    PingFrame,
    RstStreamFrame,
    SettingsFrame,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from trio.testing import MockClock, memory_stream_pair

from traversal.io.http2 import Http2Connection
from traversal.io.http2_engine import Http2Engine, Http2Error, Http2Limits
from traversal.io.http2_stream import Headers, Http2StreamError
from traversal.io.stream import HandshakeStream, StreamEndedError

REQUEST: Headers = [
    (b":method", b"POST"),
    (b":scheme", b"https"),
    (b":authority", b"app.example.com"),
    (b":path", b"/"),
]
OK: Headers = [(b":status", b"200")]
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


class Pipe:
    """A byte stream in memory."""

    def __init__(self, stream: trio.StapledStream) -> None:
        self.stream = stream

    async def receive(self) -> bytes:
        try:
            return bytes(await self.stream.receive_some(65536))
        except trio.BrokenResourceError:
            raise StreamEndedError("broken") from None

    async def send_all(self, data: bytes) -> None:
        try:
            await self.stream.send_all(data)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            raise StreamEndedError("broken") from None

    def close(self) -> None:
        self.stream.send_stream.close()  # type: ignore[attr-defined]
        self.stream.receive_stream.close()  # type: ignore[attr-defined]


@asynccontextmanager
async def joined(
    limits: Http2Limits | None = None,
) -> AsyncIterator[tuple[Http2Connection, Http2Connection]]:
    """A client and a server, running."""
    left, right = memory_stream_pair()
    client = Http2Connection(Pipe(left), client_side=True, limits=limits)
    server = Http2Connection(Pipe(right), client_side=False, limits=limits)
    async with trio.open_nursery() as nursery:
        await nursery.start(client.run)
        await nursery.start(server.run)
        yield client, server
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def attacked(
    limits: Http2Limits | None = None,
) -> AsyncIterator[tuple[trio.StapledStream, Http2Connection]]:
    """A server, and a raw stream to it on which preface and settings were sent."""
    left, right = memory_stream_pair()
    server = Http2Connection(Pipe(right), client_side=False, limits=limits)
    async with trio.open_nursery() as nursery:
        await nursery.start(server.run)
        await left.send_all(PREFACE + SettingsFrame(0).serialize())
        yield left, server
        nursery.cancel_scope.cancel()


def request_frame(stream_id: int, *, is_end: bool = False) -> bytes:
    engine = Http2Engine(Http2Limits(), client_side=True, now=0)
    frame = HeadersFrame(stream_id)
    frame.data = engine.encoder.encode(REQUEST)
    frame.flags.add("END_HEADERS")
    if is_end:
        frame.flags.add("END_STREAM")
    return frame.serialize()


async def read_all(receive_from: object) -> bytes:
    body = bytearray()
    while chunk := await receive_from.receive():  # type: ignore[attr-defined]
        body += chunk
    return bytes(body)


async def test_request_and_response_with_trailers() -> None:
    """Headers, bodies and trailers arrive as they were sent, in both directions."""
    async with joined() as (client, server):
        async with await client.open(REQUEST) as asked:
            await asked.send(b"question")
            await asked.send_end([(b"digest", b"q")])
            async with await server.accept() as got:
                assert got.request_headers == REQUEST
                assert await read_all(got) == b"question"
                assert got.trailers == [(b"digest", b"q")]
                await got.respond([*OK, (b"x", b"y")])
                await got.send(b"answer")
                await got.send_end([(b"digest", b"a")])
            assert await asked.response() == [*OK, (b"x", b"y")]
            assert await read_all(asked) == b"answer"
            assert asked.trailers == [(b"digest", b"a")]
        assert client.stream_count == server.stream_count == 0


@pytest.mark.parametrize("status", [b"204", b"304"])
async def test_length_of_a_body_that_does_not_come(status: bytes) -> None:
    """A 304 may tell the length that a 200 would have had (RFC 9110 8.6)."""
    async with joined() as (client, server):
        async with (
            await client.open(REQUEST, end_stream=True) as asked,
            await server.accept() as got,
        ):
            await got.respond([(b":status", status), (b"content-length", b"1234")])
            await got.send_end()
            assert (await asked.response())[0] == (b":status", status)
            assert await asked.receive() == b""
        assert client.failure is None


def test_headers_are_written_as_they_are() -> None:
    """Without Huffman's code, for which hpack takes seconds where a header is large."""
    engine = Http2Engine(Http2Limits(), client_side=True, now=0)
    engine.start()
    engine.send_headers(1, [*REQUEST, (b"x", b"v" * 16_000)], end_stream=True)
    assert b"v" * 16_000 in engine.data_to_send()


async def test_headers_that_are_too_large_for_the_other_side() -> None:
    """They are not sent: they would end its connection, and all other streams with it."""
    async with joined(Http2Limits(header_bytes=4096)) as (client, server):
        await client.ping()
        with pytest.raises(Http2Error, match="4096"):
            await client.open([*REQUEST, (b"x", bytes(4096))])
        async with (
            await client.open(REQUEST, end_stream=True) as asked,
            await server.accept() as got,
        ):
            with pytest.raises(Http2Error, match="4096"):
                await got.respond([*OK, (b"x", b"v" * 4096)])
            with pytest.raises(Http2StreamError, match="reset"):
                await asked.response()
        assert (client.failure, server.failure) == (None, None)


@pytest.mark.parametrize("bad", [(b"te", b"gzip"), (b"", b"x")], ids=["te", "nameless"])
async def test_headers_that_are_refused_concern_their_stream_alone(
    bad: tuple[bytes, bytes],
) -> None:
    """Headers, responses and trailers that can't be sent leave the other streams' headers as they
    are, and take none of the streams that the other side allows."""
    limits = Http2Limits(streams=3)
    async with joined(limits) as (client, server):
        with trio.fail_after(5):
            for number in range(10):
                with pytest.raises(Http2Error, match=r"TE header|no name"):
                    await client.open([*REQUEST, (b"x-lost", b"%d" % number), bad])
                own = [*REQUEST, (b"x-own", b"%d" % number)]
                async with await client.open(own, end_stream=True) as asked:
                    async with await server.accept() as got:
                        assert got.request_headers == own
                        lost = [(b"x-lost", b"%d" % number), bad]
                        await got.respond([*OK, (b"x-own", b"%d" % number)])
                        with pytest.raises(Http2StreamError):
                            await got.send_end(lost)
                    assert await asked.response() == [*OK, (b"x-own", b"%d" % number)]
                    with pytest.raises(Http2StreamError):
                        await asked.receive()
            assert client.failure is server.failure is None
            assert client.stream_count == server.stream_count == 0


async def test_body_of_another_length() -> None:
    """A body that is not as long as announced ends its stream and no other (RFC 9113 8.1.1)."""
    async with joined(Http2Limits(connection_window=65536)) as (client, server):
        for body in (b"123", b"123456", bytes(40_000)):
            async with (
                await client.open([*REQUEST, (b"content-length", b"5")]) as asked,
                await server.accept() as got,
            ):
                await asked.send(body)
                await asked.send_end()
                with pytest.raises(Http2StreamError):
                    await read_all(got)
                with pytest.raises(Http2StreamError, match="reset"):
                    await asked.response()
        # The connection goes on, and its window was opened for what nobody read.
        async with await client.open(REQUEST) as asked, await server.accept() as got:
            await asked.send(bytes(60_000))
            await asked.send_end()
            assert await read_all(got) == bytes(60_000)


async def test_large_bodies_both_ways_at_once() -> None:
    """Bodies larger than every window pass in both directions of one stream at the same time."""
    size = 20 << 20
    async with joined() as (client, server), await client.open(REQUEST) as asked:
        got = await server.accept()
        await got.respond(OK)
        received = {"client": 0, "server": 0}

        async def send(stream: object) -> None:
            for _ in range(size // 65536):
                await stream.send(bytes(65536))  # type: ignore[attr-defined]
            await stream.send_end()  # type: ignore[attr-defined]

        async def receive(stream: object, name: str) -> None:
            while chunk := await stream.receive():  # type: ignore[attr-defined]
                received[name] += len(chunk)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(send, asked)
            nursery.start_soon(send, got)
            nursery.start_soon(receive, asked, "client")
            nursery.start_soon(receive, got, "server")
        assert received == {"client": size, "server": size}


async def test_stalled_readers_hold_up_nobody(autojump_clock: MockClock) -> None:
    """While more stalled readers than the connection's window could take hold unread bytes, another
    stream of the same connection moves as much as it wants."""
    limits = Http2Limits(stream_window=1 << 20, connection_window=2 << 20, buffered_bytes=100 << 20)
    async with joined(limits) as (client, server), trio.open_nursery() as nursery:

        async def serve(stream: object) -> None:
            await stream.respond(OK)  # type: ignore[attr-defined]
            for _ in range(64):
                await stream.send(bytes(65536))  # type: ignore[attr-defined]
            await stream.send_end()  # type: ignore[attr-defined]

        for _ in range(8):
            await client.open(REQUEST, end_stream=True)
            nursery.start_soon(serve, await server.accept())
        await trio.sleep(1)
        async with await client.open(REQUEST, end_stream=True) as live:
            nursery.start_soon(serve, await server.accept())
            with trio.fail_after(10):
                assert len(await read_all(live)) == 4 << 20
        nursery.cancel_scope.cancel()


async def test_memory_for_stalled_readers_is_bounded(autojump_clock: MockClock) -> None:
    """Beyond `buffered_bytes` the stream that is furthest behind is reset, and the others live."""
    limits = Http2Limits(stream_window=1 << 20, buffered_bytes=3 << 20)
    async with joined(limits) as (client, server), trio.open_nursery() as nursery:
        resets = []

        async def serve(stream: object) -> None:
            await stream.respond(OK)  # type: ignore[attr-defined]
            try:
                await stream.send(bytes(1 << 20))  # type: ignore[attr-defined]
                await stream.send_end()  # type: ignore[attr-defined]
            except Http2StreamError as error:
                resets.append(error.code)

        asked = []
        for _ in range(6):
            asked.append(await client.open(REQUEST, end_stream=True))
            nursery.start_soon(serve, await server.accept())
        await trio.sleep(1)
        whole = failed = 0
        codes = []
        for stream in asked:
            try:
                assert len(await read_all(stream)) == 1 << 20
                whole += 1
            except Http2StreamError as error:
                codes.append(error.code)
                failed += 1
        assert set(codes) == {ErrorCodes.ENHANCE_YOUR_CALM}
        assert whole >= 2
        assert failed == 6 - whole
        assert client._buffered == 0


async def test_leaving_lets_open_streams_finish() -> None:
    """After a graceful GOAWAY streams that are open finish in both directions, new ones are refused
    as unprocessed."""
    async with joined() as (client, server), await client.open(REQUEST) as asked:
        got = await server.accept()
        server.leave()
        await client.ping()
        assert not client.is_usable
        with pytest.raises(Http2StreamError) as caught:
            await client.open(REQUEST)
        assert caught.value.is_unprocessed
        await asked.send(b"late")
        await asked.send_end()
        assert await read_all(got) == b"late"
        await got.respond(OK)
        await got.send(b"answer")
        await got.send_end()
        assert await read_all(asked) == b"answer"


async def test_reset_reaches_the_other_side() -> None:
    """A reset fails reads and writes at the other end, with its code."""
    async with joined() as (client, server):
        async with await client.open(REQUEST) as asked:
            got = await server.accept()
            got.reset(ErrorCodes.REFUSED_STREAM)
            with pytest.raises(Http2StreamError) as caught:
                await asked.response()
            assert caught.value.code == ErrorCodes.REFUSED_STREAM
            assert caught.value.is_unprocessed
            with pytest.raises(Http2StreamError):
                await asked.send(b"x")
        assert (await client.ping()) >= 0


async def test_end_of_the_connection_fails_everything() -> None:
    """When one side closes, every call that waits at the other ends with an error, and so do later
    ones."""
    async with joined() as (client, server), trio.open_nursery() as nursery:
        asked = await client.open(REQUEST)
        await server.accept()
        failed = []

        async def expect_failure(call: object) -> None:
            with pytest.raises(Http2Error):
                await call()  # type: ignore[operator]
            failed.append(call)

        for call in (asked.response, asked.receive, client.accept):
            nursery.start_soon(expect_failure, call)
        await trio.testing.wait_all_tasks_blocked()
        server.close()
        with pytest.raises(Http2Error):
            await client.ping()
        await trio.testing.wait_all_tasks_blocked()
        assert len(failed) == 3
        with pytest.raises(Http2Error):
            await client.open(REQUEST)


async def test_concurrency_limit_is_waited_for() -> None:
    """A client opens its next stream when the server's limit allows it, not before."""
    limits = Http2Limits(streams=2)
    async with joined(limits) as (client, _), trio.open_nursery() as nursery:
        first = await client.open(REQUEST, end_stream=True)
        await client.ping()
        await client.open(REQUEST, end_stream=True)
        opened = []

        async def open_third() -> None:
            opened.append(await client.open(REQUEST, end_stream=True))

        nursery.start_soon(open_third)
        await trio.testing.wait_all_tasks_blocked()
        assert not opened
        first.reset()
        await trio.testing.wait_all_tasks_blocked()
        assert opened


@pytest.mark.parametrize("attack", ["reset", "ping", "settings", "empty"])
async def test_floods_end_the_connection(attack: str) -> None:
    """Rapid resets, pings, settings and empty frames beyond the budget end the connection with
    ENHANCE_YOUR_CALM, and it holds no more than a bounded number of streams."""
    async with attacked() as (raw, server):

        async def drain() -> None:
            try:
                while await raw.receive_some(65536):
                    pass
            except trio.BrokenResourceError:
                pass

        async with trio.open_nursery() as nursery:
            nursery.start_soon(drain)
            if attack == "empty":
                await raw.send_all(request_frame(1))
            try:
                for number in range(5000):
                    if attack == "reset":
                        frame = RstStreamFrame(2 * number + 1, error_code=8).serialize()
                        frame = request_frame(2 * number + 1) + frame
                    elif attack == "ping":
                        frame = PingFrame(0, opaque_data=bytes(8)).serialize()
                    elif attack == "settings":
                        frame = SettingsFrame(0).serialize()
                    else:
                        frame = DataFrame(1, data=b"").serialize()
                    await raw.send_all(frame)
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                pass
            while server.failure is None:
                await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        assert "more pings, resets and empty frames" in str(server.failure)


async def test_header_bomb() -> None:
    """A header block over the limit ends the connection."""
    async with attacked(Http2Limits(header_bytes=4096)) as (raw, server):
        engine = Http2Engine(Http2Limits(), client_side=True, now=0)
        frame = HeadersFrame(1)
        frame.data = engine.encoder.encode([*REQUEST, (b"x", b"y" * 8000)])
        frame.flags.add("END_HEADERS")
        await raw.send_all(frame.serialize())
        with pytest.raises(Http2Error):
            await server.accept()


async def test_goaway_with_an_error_ends_the_connection() -> None:
    """A GOAWAY with an error code ends all streams; one without lets them go on."""
    async with attacked() as (raw, server):
        await raw.send_all(request_frame(1))
        stream = await server.accept()
        await raw.send_all(GoAwayFrame(0, last_stream_id=0, error_code=0).serialize())
        await raw.send_all(DataFrame(1, data=b"still").serialize())
        assert await stream.receive() == b"still"
        await raw.send_all(GoAwayFrame(0, last_stream_id=0, error_code=2).serialize())
        with pytest.raises(Http2StreamError):
            await stream.receive()


@given(st.lists(st.binary(max_size=400), max_size=8), st.booleans())
@settings(max_examples=200, deadline=None)
def test_engine_survives_anything(chunks: list[bytes], with_preface: bool) -> None:
    """Whatever bytes come, the engine raises Http2Error or returns events."""
    engine = Http2Engine(Http2Limits(), client_side=False, now=0)
    engine.start()
    try:
        if with_preface:
            engine.receive(PREFACE + SettingsFrame(0).serialize(), 0)
        for chunk in chunks:
            engine.receive(chunk, 0)
    except Http2Error:
        pass


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_engine_survives_mutations(data: st.DataObject) -> None:
    """Frames of a real conversation with some bytes changed do not get past the one error."""
    whole = bytearray(
        PREFACE
        + SettingsFrame(0).serialize()
        + request_frame(1)
        + DataFrame(1, data=b"x" * 50).serialize()
        + request_frame(3, is_end=True)
        + RstStreamFrame(1, error_code=8).serialize()
        + PingFrame(0, opaque_data=bytes(8)).serialize()
    )
    for _ in range(data.draw(st.integers(1, 6))):
        position = data.draw(st.integers(len(PREFACE), len(whole) - 1))
        whole[position] = data.draw(st.integers(0, 255))
    engine = Http2Engine(replace(Http2Limits(), streams=10), client_side=False, now=0)
    engine.start()
    try:
        engine.receive(bytes(whole), 0)
    except Http2Error:
        pass


@pytest.mark.interop
async def test_curl_as_client(tmp_path: Path) -> None:
    """curl (nghttp2) uploads and downloads 5 MB over one of our connections."""
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    features = await trio.run_process(["curl", "--version"], capture_stdout=True)
    if b"HTTP2" not in features.stdout:
        pytest.skip("this curl has no HTTP/2")
    size = 5 << 20

    async def echo(connection: Http2Connection) -> None:
        async with await connection.accept() as stream:
            await stream.respond(OK)
            while chunk := await stream.receive():
                await stream.send(chunk)
            await stream.send_end()

    with trio.socket.socket() as listener:
        await listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]

        async def serve() -> None:
            sock, _ = await listener.accept()
            connection = Http2Connection(HandshakeStream(sock), client_side=False)
            async with trio.open_nursery() as inner:
                await inner.start(connection.run)
                await echo(connection)
                connection.close()

        upload = tmp_path / "upload"
        upload.write_bytes(os.urandom(size))
        command = ["curl", "-s", "--max-time", "30", "--http2-prior-knowledge", "-T", str(upload)]
        command.append(f"http://127.0.0.1:{port}/")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve)
            done = await trio.run_process(command, capture_stdout=True)
            nursery.cancel_scope.cancel()
        assert done.stdout == upload.read_bytes()
