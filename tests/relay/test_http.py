"""HTTP on a listener: requests in any shape and speed, over memory and over loopback."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st

from relay.http import Request, Response, Upgrade, serve_http, wanted_protocol
from traversal.io.stream import StreamEndedError

if TYPE_CHECKING:
    from traversal.io.stream import HandshakeStream


class MemoryStream:
    """The part of HandshakeStream that HTTP uses; the client's pieces come from a list."""

    def __init__(self, pieces: list[bytes], *, then_hang: bool = False) -> None:
        self.pieces = [piece for piece in pieces if piece]
        self.sent = b""
        self.ahead = b""
        self._then_hang = then_hang

    async def receive(self) -> bytes:
        await trio.lowlevel.checkpoint()
        if not self.pieces and self._then_hang:
            await trio.sleep_forever()
        return self.pieces.pop(0) if self.pieces else b""

    async def send_all(self, data: bytes) -> None:
        await trio.lowlevel.checkpoint()
        self.sent += data

    def put_back(self, data: bytes) -> None:
        self.ahead = data + self.ahead

    @property
    def rest(self) -> bytes:
        """What was not taken for HTTP."""
        return self.ahead + b"".join(self.pieces)


def answer(request: Request) -> Response:
    if request.path == "/derp":
        return Response(426, body=b"DERP requires connection upgrade\n")
    return Response(
        200, [("Content-Type", "text/plain")], f"{request.path}?{request.query}".encode()
    )


async def serve(stream: MemoryStream) -> Upgrade | None:
    typed: Any = stream
    return await serve_http(typed, answer, source="192.0.2.1", over_tls=True)


def head(line: str, *headers: str) -> bytes:
    return "\r\n".join([f"{line} HTTP/1.1", "Host: h", *headers, "", ""]).encode()


UPGRADES: list[tuple[bytes, str]] = [
    (head("GET /derp", "Connection: Upgrade", "Upgrade: DERP"), "derp"),
    (head("GET /derp", "upgrade: dErP"), "derp"),  # Connection is not checked
    (head("GET /derp?x=1", "Upgrade: derp"), "derp"),
    (head("POST /derp", "Upgrade: DERP", "content-length: 0"), "derp"),
    (head("PUT /derp", "Upgrade: DERP"), "derp"),
    (head("HEAD /derp", "Upgrade: DERP"), "derp"),
    (head("GET /derp", "Upgrade: websocket"), "derp"),  # very old clients
    (head("GET /derp", "Upgrade: WebSocket", "Sec-WebSocket-Protocol: chat"), "derp"),
    (head("GET /derp", "Upgrade: websocket", "Sec-WebSocket-Protocol: derp"), "websocket"),
    (b"GET /derp HTTP/1.0\r\nUpgrade: DERP\r\n\r\n", "derp"),
]


@pytest.mark.parametrize(("request_head", "protocol"), UPGRADES)
async def test_upgrades_keep_what_follows(request_head: bytes, protocol: str) -> None:
    """Bytes behind the blank line belong to the next protocol, in any split and after a GET."""
    for before in (b"", head("GET /x")):
        stream = before + request_head + b"\x02\0\0\0\x68rest\r\n\r\n"
        for cut in (1, len(before) + 3, len(before + request_head), len(stream) - 2):
            memory = MemoryStream([stream[:cut], stream[cut:]])
            upgrade = await serve(memory)
            assert upgrade is not None
            assert wanted_protocol(upgrade.request) == protocol
            assert upgrade.request.source == "192.0.2.1"
            assert memory.rest == b"\x02\0\0\0\x68rest\r\n\r\n"
            assert memory.sent.count(b"HTTP/1.1") == bool(before)


NOT_UPGRADES = [
    (head("GET /derp"), b"426"),
    (head("GET /derp", "Connection: Upgrade", "Upgrade: h2c"), b"426"),
    (head("GET /derp/", "Upgrade: DERP"), b"200"),
    (head("GET /DERP", "Upgrade: DERP"), b"200"),
    (head("GET /", "Connection: Upgrade", "Upgrade: websocket"), b"200"),
]


@pytest.mark.parametrize(("request_head", "status"), NOT_UPGRADES)
async def test_other_requests_are_answered_and_the_connection_goes_on(
    request_head: bytes, status: bytes
) -> None:
    """Also those that ask for an upgrade that we don't have."""
    memory = MemoryStream([request_head + head("GET /next?a=b")])
    assert await serve(memory) is None
    assert memory.sent.startswith(b"HTTP/1.1 " + status)
    assert memory.sent.endswith(b"/next?a=b")


async def test_pipelined_requests_are_answered_in_order() -> None:
    """HEAD without a body, POST with one, and `Connection: close` ends it."""
    memory = MemoryStream(
        [
            head("GET /1")
            + head("HEAD /2")
            + head("POST /3", "Content-Length: 3")
            + b"abc"
            + head("GET /4", "Connection: close")
            + head("GET /5")
        ]
    )
    assert await serve(memory) is None
    assert memory.sent.count(b"HTTP/1.1 200") == 4
    assert b"/2?" not in memory.sent
    assert memory.sent.endswith(b"/4?")


REFUSED = [
    (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", b"400"),
    (b"GARBAGE\r\n\r\n", b"400"),
    (b"GET / HTTP/1.1\r\n\r\n", b"400"),  # no Host
    (b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", b"400"),
    (head("GET /", "X: " + "y" * 20_000), b"431"),
    (b"A" * 20_000, b"431"),
    (head("POST /", "Content-Length: x"), b"400"),
    (head("POST /", "Transfer-Encoding: chunked") + b"zz\r\n", b"400"),
    (head("POST /", "Content-Length: 70000") + bytes(70_000), b"413"),
    (head("HEAD /", "Content-Length: 70000") + bytes(70_000), b"413"),
    (head("HEAD /", "Transfer-Encoding: chunked") + b"zz\r\n", b"400"),
    (head("CONNECT x:443"), b"403"),
    (head("CONNECT x:443", "Upgrade: DERP"), b"403"),
]


@pytest.mark.parametrize(("data", "status"), REFUSED, ids=lambda value: repr(value[:30]))
async def test_bad_requests_are_refused_and_the_connection_ends(data: bytes, status: bytes) -> None:
    """With an answer that says why, and never with an exception."""
    pieces = [data[position : position + 5000] for position in range(0, len(data), 5000)]
    memory = MemoryStream([*pieces, head("GET /after")])
    assert await serve(memory) is None
    assert memory.sent.startswith(b"HTTP/1.1 " + status)
    assert b"Connection: close" in memory.sent
    assert b"/after" not in memory.sent


async def test_a_slow_request_is_given_thirty_seconds(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """However its bytes trickle in; the time is per request, idle connections included."""
    for pieces in ([], [b"GET / HT"], [head("GET /1"), b"G"]):
        started = trio.current_time()
        with pytest.raises(StreamEndedError, match="in time"):
            await serve(MemoryStream(pieces, then_hang=True))
        assert trio.current_time() - started == pytest.approx(30)


async def test_trickling_bytes_do_not_extend_the_time(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """A slowloris ends like a silent client."""

    class Slow(MemoryStream):
        async def receive(self) -> bytes:
            await trio.sleep(5)
            return b"G"

    with trio.fail_after(31), pytest.raises(StreamEndedError):
        await serve(Slow([]))


async def test_a_response_that_nobody_reads_is_given_up(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """After 30 seconds."""

    class Deaf(MemoryStream):
        async def send_all(self, data: bytes) -> None:
            await trio.sleep_forever()

    with trio.fail_after(31), pytest.raises(StreamEndedError, match="did not read"):
        await serve(Deaf([head("GET /")]))


PARTS = st.sampled_from(
    [
        b"GET ", b"HEAD ", b"POST ", b"CONNECT ", b"/derp", b"/", b" HTTP/1.1\r\n", b"Host: h\r\n",
        b"Upgrade: DERP\r\n", b"Content-Length: 5\r\n", b"Transfer-Encoding: chunked\r\n", b"\r\n",
        b"5\r\nabcde\r\n", b"0\r\n", b"Connection: close\r\n", b"Expect: 100-continue\r\n", b"\xff",
    ]
)  # fmt: skip


@settings(max_examples=100, deadline=None)
@given(st.lists(PARTS | st.binary(max_size=8), max_size=14).map(b"".join), st.integers(0, 60))
def test_no_bytes_make_it_raise(data: bytes, cut: int) -> None:
    """Whatever a client sends, the outcome is None, an upgrade, or StreamEndedError."""

    async def run() -> None:
        await serve(MemoryStream([data[:cut], data[cut:]]))

    trio.run(run)


async def test_plain_and_tls_requests_over_sockets(
    run_relay: Callable[..., Any], contexts: Any
) -> None:
    """An orderly end of the client is no error for the relay, with and without TLS."""
    for tls in (None, contexts):
        async with run_relay(tls, respond=answer) as relay:
            stream: HandshakeStream = await relay.open_stream()
            await stream.send_all(head("GET /x"))
            assert (await stream.receive()).endswith(b"/x?")
            stream.close()
            await relay.until(lambda r=relay: not r.handlers)
            assert relay.refused == []
