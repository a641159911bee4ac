"""From request to adopted client: order, bounds and deadlines (DERP specification 3 and 5)."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
import trio
import trio.testing

from relay.upgrade import RateLimit
from traversal.io.stream import StreamEndedError
from traversal.keys import Box, MeshKey, NodePrivate
from traversal.wire import derp
from traversal.wire.derp import ClientInfo, FrameSplitter, Pong, ServerInfo, encode_client_info
from traversal.wire.derp_upgrade import encode_upgrade_request, encode_upgrade_response

if TYPE_CHECKING:
    from tests.relay.conftest import Contexts, Relay

RunRelay = Callable[..., Any]
A = NodePrivate.generate(lambda size: random.Random(1).randbytes(size))
PING = derp.encode_ping(b"12345678")


def client_info(relay: Relay, info: ClientInfo | None = None) -> bytes:
    return encode_client_info(
        info or ClientInfo(version=2), A, relay.private.public(), os.urandom(24)
    )


async def receive_until(stream: Any, size: int) -> bytes:
    data = b""
    while len(data) < size:
        more = await stream.receive()
        assert more
        data += more
    return data


async def is_closed(stream: Any) -> bool:
    """Read to the end of the connection."""
    try:
        while await stream.receive():
            pass
    except StreamEndedError:
        pass
    return True


async def test_slow_start_byte_for_byte(run_relay: RunRelay) -> None:
    """101 and SERVER_KEY at once; then SERVER_INFO, and nothing before it."""
    async with run_relay() as relay:
        stream = await relay.open_stream()
        request = encode_upgrade_request("localhost").replace(b"GET", b"POST")
        await stream.send_all(request.replace(b"\r\n\r\n", b"\r\ncontent-length: 0\r\n\r\n"))
        greeting = encode_upgrade_response(relay.private.public()) + derp.encode_server_key(
            relay.private.public()
        )
        assert await receive_until(stream, len(greeting)) == greeting
        for byte in client_info(relay):
            await stream.send_all(bytes([byte]))
        await stream.send_all(PING)
        splitter = FrameSplitter()
        frames: list[tuple[int, bytes]] = []
        while len(frames) < 2:
            splitter.receive_data(await stream.receive())
            frames += splitter.frames()
        assert frames[0][0] == derp.FrameType.SERVER_INFO
        box = Box(A, relay.private.public())
        assert derp.parse_server_info(frames[0][1], box) == ServerInfo()
        assert frames[1] == (derp.FrameType.PONG, b"12345678")


@pytest.mark.parametrize("value", ["1", "0", "true"])
async def test_fast_start_leaves_the_101_out(run_relay: RunRelay, value: str) -> None:
    """Only for exactly `1`."""
    async with run_relay() as relay:
        stream = await relay.open_stream()
        request = encode_upgrade_request("h", fast_start=True)
        await stream.send_all(request.replace(b"Start: 1", b"Start: " + value.encode()))
        start = await receive_until(stream, 5)
        assert start.startswith(bytes.fromhex("0100000028") if value == "1" else b"HTTP/1.1 101")
        stream.close()


@pytest.mark.parametrize("size", [1, 7, 1 << 20])
@pytest.mark.parametrize("with_tls", [False, True], ids=["plain", "TLS"])
async def test_everything_in_one_flight(
    run_relay: RunRelay, contexts: Contexts, with_tls: bool, size: int
) -> None:
    """Request, CLIENT_INFO, frames and half a frame behind it, cut anyhow: nothing is lost."""
    async with run_relay(contexts if with_tls else None) as relay:
        stream = await relay.open_stream()
        payload = b"self" * (5000 if size > 100 else 10)
        packet = derp.encode_send_packet(A.public(), payload)
        flight = encode_upgrade_request("h", fast_start=True) + client_info(relay) + PING + packet
        for position in range(0, len(flight), size):
            await stream.send_all(flight[position : position + size])
        splitter = FrameSplitter()
        frames: list[tuple[int, bytes]] = []
        while len(frames) < 4:
            splitter.receive_data(await stream.receive())
            frames += splitter.frames()
        assert [kind for kind, _ in frames] == [0x01, 0x03, 0x13, 0x05]
        assert frames[3][1] == A.public().raw + payload


BAD_INFOS: list[Callable[[Relay], bytes]] = [
    lambda relay: derp.KEEP_ALIVE,
    lambda relay: derp.HEADER.pack(2, 262145),
    lambda relay: derp.HEADER.pack(2, 55),
    lambda relay: derp.HEADER.pack(2, 104) + bytes(104),  # the zero key
    lambda relay: derp.HEADER.pack(2, 104) + A.public().raw + bytes(72),
    lambda relay: encode_client_info(ClientInfo(), A, A.public(), bytes(24)),
    lambda relay: derp.encode_frame(
        derp.FrameType.CLIENT_INFO,
        A.public().raw + Box(A, relay.private.public()).seal(b"[]", bytes(24)),
    ),
]


@pytest.mark.parametrize("bad", BAD_INFOS)
async def test_bad_client_infos_close_at_once_and_silently(
    run_relay: RunRelay, bad: Callable[[Relay], bytes]
) -> None:
    """No frame tells why; the operator's log does."""
    async with run_relay() as relay:
        stream = await relay.open_stream()
        await stream.send_all(encode_upgrade_request("h", fast_start=True) + bad(relay))
        started = trio.current_time()
        assert await is_closed(stream)
        assert trio.current_time() - started < 5
        await relay.until(lambda: relay.refused)
        assert len(relay.refused) == 1
        assert not relay.pump.connections


@pytest.fixture
def jumping_clock() -> trio.testing.MockClock:
    """Time jumps when nothing has happened for 20 ms of real time: enough for loopback."""
    return trio.testing.MockClock(autojump_threshold=0.02)


@pytest.mark.parametrize("trickle", [False, True])
async def test_ten_seconds_for_client_info(
    run_relay: RunRelay, jumping_clock: trio.testing.MockClock, trickle: bool
) -> None:
    """For all of it, however slowly it comes."""
    async with run_relay() as relay:
        stream = await relay.open_stream()
        await stream.send_all(encode_upgrade_request("h", fast_start=True))
        await receive_until(stream, 45)
        started = trio.current_time()

        async def send_slowly() -> None:
            for byte in client_info(relay):
                await trio.sleep(0.5)
                await stream.send_all(bytes([byte]))

        async with trio.open_nursery() as nursery:
            if trickle:
                nursery.start_soon(send_slowly)
            assert await is_closed(stream)
            nursery.cancel_scope.cancel()
        assert trio.current_time() - started == pytest.approx(10, abs=0.1)
        assert relay.refused == ["it sent no CLIENT_INFO within 10 s"]


@pytest.mark.parametrize(
    ("server_key", "client_key", "is_mesh"),
    [
        (MeshKey(b"m" * 32), MeshKey(b"m" * 32), True),
        (MeshKey(b"m" * 32), MeshKey(b"x" * 32), False),
        (None, MeshKey(b"m" * 32), False),
        (MeshKey(b"m" * 32), None, False),
        (MeshKey(bytes(32)), MeshKey(bytes(32)), False),
        (None, None, False),
    ],
)
async def test_mesh_rights(
    run_relay: RunRelay, server_key: MeshKey | None, client_key: MeshKey | None, is_mesh: bool
) -> None:
    """Only the right key gives them; a wrong one makes a regular client, with a regular limit."""
    async with run_relay(mesh_key=server_key, rate_limit=RateLimit(1000, 70_000)) as relay:
        stream = await relay.open_stream()
        info = client_info(relay, ClientInfo(mesh_key=client_key, is_prober=True))
        request = encode_upgrade_request("h", fast_start=True, ideal_node="900a")
        await stream.send_all(request + info)
        await relay.until(lambda: relay.pump.connections)
        connection = relay.connection(A.public())
        assert connection.is_mesh is is_mesh
        assert (connection.bucket is None) is is_mesh
        assert connection.is_prober
        assert connection.not_ideal
        stream.close()


async def test_a_violation_right_behind_the_handshake_is_closed_once(run_relay: RunRelay) -> None:
    """The connection ends inside `adopt`; nothing of it stays."""
    async with run_relay() as relay:
        stream = await relay.open_stream()
        flight = encode_upgrade_request("h", fast_start=True) + client_info(relay)
        await stream.send_all(flight + derp.WATCH_CONNS)
        assert await is_closed(stream)
        await relay.until(lambda: not relay.handlers)
        assert [reason for _, reason in relay.closed] == [
            "protocol violation: WATCH_CONNS without the mesh key"
        ]
        assert not relay.pump.connections


@pytest.mark.parametrize("count", [0, 1, 40, 300])
async def test_garbage_instead_of_tls_or_http(
    run_relay: RunRelay, contexts: Contexts, count: int
) -> None:
    """A probe that connects, says something silly and goes away breaks nothing."""
    for tls in (contexts, None):
        async with run_relay(tls) as relay:
            for garbage in (b"\xff" * count, b"GET " * count, b"\r\n" * count):
                sock = await relay.open()
                with sock:
                    if garbage:
                        await sock.send(garbage)
                await relay.until(lambda r=relay: not r.handlers)
            client = await relay.connect(A)
            await client.send(PING)
            assert await client.receive_exactly(1) == [Pong(b"12345678")]
