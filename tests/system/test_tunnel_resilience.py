"""Edge and connector as processes on a bad network, and through deaths and restarts of edges.

Who visits sends idempotent requests; `UNDERPASS_TUNNEL_REQUESTS` says how many each test is to send
(10000 is the figure to be shown). What is promised:

* While an edge lives and the tunnel has a connector somewhere behind it, no request fails that this
  edge has taken, whatever becomes of connections between edge and connector and of other edges.
* An edge that stops on purpose answers every request that it has taken. From then on it refuses
  connections, so a visitor who knows another edge, too, goes there at once.
* What is under way at an edge that is killed is lost with it, as no process can answer for one that
  is dead; a visitor who knows another edge repeats an idempotent request there.
* Where the only edge is gone, nobody listens. Requests that come when it listens again wait for the
  connector and are answered.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Final

import h11
import pytest
import trio

from netlab.model import Link
from tests.system.tunnel_lab import (
    DRAIN_SECONDS,
    EDGES,
    HOST,
    VISITORS_PORT,
    Visitors,
    World,
    fetch,
    tunnel_world,
)

REQUESTS: Final = int(os.environ.get("UNDERPASS_TUNNEL_REQUESTS", "100"))
at_length = pytest.mark.skipif(
    "UNDERPASS_TUNNEL_REQUESTS" not in os.environ,
    reason="the other transport does in the suite; UNDERPASS_TUNNEL_REQUESTS=10000 runs both",
)
pytestmark = pytest.mark.jail(timeout_seconds=60 + REQUESTS / 10)

LOSSY: Final = Link(delay_seconds=0.01, loss=0.05)
NARROW: Final = Link(delay_seconds=0.005, mtu_bytes=1280)
BLACK_HOLE: Final = replace(NARROW, mtu_black_hole=True)
BLOCK_UDP: Final = (
    "add table inet blocked; add chain inet blocked out { type filter hook output priority 0; };"
    " add rule inet blocked out udp dport 7844 drop"
)
DEAF_TO_ROUTERS: Final = (
    "add table inet deaf; add chain inet deaf in { type filter hook input priority 0; };"
    " add rule inet deaf in icmp type destination-unreachable drop"
)


def report(name: str, visitors: Visitors) -> None:
    print(f"RESILIENCE {name}: {visitors}")


@pytest.mark.parametrize("protocol", ["quic", pytest.param("http2", marks=at_length)])
async def test_loss(tmp_path: Path, protocol: str) -> None:
    """With 5 % of the packets lost each way between connector and edge, no request fails."""
    async with tunnel_world(tmp_path, edges=EDGES[:1], alice_link=LOSSY) as world:
        await world.start_connector(protocol)
        await world.until_connections(4)
        visitors = Visitors([world.address("edge1")], body=os.urandom(5000))
        async with world.lab.host("bob"):
            await visitors.run(lambda: visitors.done + len(visitors.failed) >= REQUESTS)
        report(f"5 % loss, {protocol}", visitors)
        assert (visitors.failed, visitors.broken) == ([], [])


async def test_narrow_path_over_quic(tmp_path: Path) -> None:
    """Where only packets of up to 1280 bytes pass, and no end hears of it from the routers, which
    cut the edge's packets, larger requests and responses pass over QUIC."""
    async with tunnel_world(tmp_path, edges=EDGES[:1], alice_link=NARROW) as world:
        for host in ("edge1", "alice"):
            await world.lab.host(host).run_process(["nft", DEAF_TO_ROUTERS])
        await world.start_connector("quic")
        await visit_with_large_bodies(world, "MTU 1280 without a word, quic")


async def test_narrow_path_that_cuts_nothing(tmp_path: Path) -> None:
    """Where what is larger than 1280 bytes vanishes, the connector serves over HTTP/2."""
    async with tunnel_world(tmp_path, edges=EDGES[:1], alice_link=BLACK_HOLE) as world:
        await world.start_connector()
        await world.until_transport("http2")
        await visit_with_large_bodies(world, "MTU 1280, larger packets vanish, http2")


async def visit_with_large_bodies(world: World, name: str) -> None:
    await world.until_connections(4)
    visitors = Visitors([world.address("edge1")], body=os.urandom(20_000))
    async with world.lab.host("bob"):
        await visitors.run(lambda: visitors.done + len(visitors.failed) >= REQUESTS)
    report(name, visitors)
    assert (visitors.failed, visitors.broken) == ([], [])


async def test_udp_blocked_and_healed(tmp_path: Path) -> None:
    """Where UDP is blocked, a connector serves over HTTP/2 within seconds, and it is back on QUIC
    within 60 s of UDP's healing, without a failed request."""
    async with tunnel_world(tmp_path, edges=EDGES[:1]) as world:
        alice = world.lab.host("alice")
        await alice.run_process(["nft", BLOCK_UDP])
        await world.start_connector()
        await world.until_transport("http2")
        visitors = Visitors([world.address("edge1")])
        is_back = False
        async with world.lab.host("bob"), trio.open_nursery() as nursery:
            nursery.start_soon(visitors.run, lambda: is_back and visitors.done >= REQUESTS)
            await trio.sleep(0.3)
            await alice.run_process(["nft", "delete table inet blocked"])
            took = await world.until_transport("quic")
            is_back = True
        report(f"back on QUIC after {took:.1f} s", visitors)
        assert (visitors.failed, visitors.broken) == ([], [])


async def test_the_only_edge_is_killed(tmp_path: Path) -> None:
    """When it listens again, what comes waits until the connector is back, and is answered."""
    async with tunnel_world(tmp_path, edges=EDGES[:1]) as world:
        await world.start_connector()
        await world.until_connections(4)
        visitors = Visitors([world.address("edge1")])
        await world.kill_edge("edge1")
        await trio.sleep(1)
        await world.start_edge("edge1")
        async with world.lab.host("bob"):
            await visitors.run(lambda: visitors.done + len(visitors.failed) >= REQUESTS)
        report("only edge killed", visitors)
        assert (visitors.failed, visitors.broken) == ([], [])


async def test_one_of_two_edges_is_killed(tmp_path: Path) -> None:
    """A visitor of either edge gets every answer, if need be from the other one; the edge that is
    back gets its share of the connections and answers again."""
    async with tunnel_world(tmp_path) as world:
        await world.start_connector()
        await world.until_connections(2, 2)
        addresses = [world.address(edge) for edge in EDGES]
        visitors = Visitors(addresses)
        done = trio.Event()
        async with world.lab.host("bob"), trio.open_nursery() as nursery:
            nursery.start_soon(
                visitors.run,
                lambda: done.is_set() and visitors.done + len(visitors.failed) >= REQUESTS,
            )
            await trio.sleep(0.3)
            await world.kill_edge("edge1")
            await world.until_connections(0, 4)
            await world.start_edge("edge1")
            took = await world.until_connections(2, 2)
            done.set()
        async with world.lab.host("bob"):
            assert (await fetch(addresses[0], "/again"))[0] == 200
        report(f"one of two killed, share even {took:.1f} s after its start", visitors)
        assert visitors.failed == []


async def test_planned_restarts_of_two_edges(tmp_path: Path) -> None:
    """Two edges that are restarted one after the other, again and again: every request is answered
    by the edge that has taken it."""
    async with tunnel_world(tmp_path) as world:
        await world.start_connector()
        await world.until_connections(2, 2)
        visitors = Visitors([world.address(edge) for edge in EDGES])
        restarts = 0

        def is_enough() -> bool:
            return visitors.done + len(visitors.failed) >= REQUESTS and restarts >= 2

        async with world.lab.host("bob"), trio.open_nursery() as nursery:
            nursery.start_soon(visitors.run, is_enough)
            while not is_enough():
                edge = EDGES[restarts % 2]
                await world.stop_edge(edge)
                await world.start_edge(edge)
                # As who restarts them waits for the one before the other.
                await world.until_connections(2, 2)
                restarts += 1
        report(f"{restarts} planned restarts of two", visitors)
        assert (visitors.failed, visitors.broken) == ([], [])


async def test_planned_restart_of_the_only_edge(tmp_path: Path) -> None:
    """A visitor who tries on where nobody listens gets every answer, and none of the requests that
    the edge has taken, before or after, is lost."""
    async with tunnel_world(tmp_path, edges=EDGES[:1]) as world:
        await world.start_connector()
        await world.until_connections(4)
        visitors = Visitors([world.address("edge1")], patience_seconds=30)
        is_back = False

        def is_enough() -> bool:
            return is_back and visitors.done + len(visitors.failed) >= REQUESTS

        async with world.lab.host("bob"), trio.open_nursery() as nursery:
            nursery.start_soon(visitors.run, is_enough)
            await trio.sleep(0.3)
            await world.stop_edge("edge1")
            await world.start_edge("edge1")
            is_back = True
        report("planned restart of the only one", visitors)
        assert (visitors.failed, visitors.broken) == ([], [])


async def test_streams_outlive_a_planned_restart(tmp_path: Path) -> None:
    """A websocket and a download at an edge that was told to stop go on to their ends, while new
    requests go to the other edge; the edge ends when they have."""
    async with tunnel_world(tmp_path) as world:
        await world.start_connector()
        await world.until_connections(2, 2)
        first, second = (world.address(edge) for edge in EDGES)
        size = 8_000_000
        stopped = trio.Event()

        async def stop() -> None:
            await world.stop_edge("edge1")
            stopped.set()

        async with world.lab.host("bob"), trio.open_nursery() as nursery:
            download = await trio.open_tcp_stream(first, VISITORS_PORT)
            async with download:
                request = f"GET /bytes/{size} HTTP/1.1\r\nHost: {HOST}\r\n\r\n"
                await download.send_all(request.encode())
                async with await open_websocket(first) as websocket:
                    assert await echo(websocket, b"before")
                    nursery.start_soon(stop)
                    await world.until_connections(0, 4)
                    assert (await fetch(second, "/new"))[0] == 200
                    assert await echo(websocket, b"while it drains")
                    body = await read_response(download)
                    assert len(body) == size
                    assert await echo(websocket, b"after the download")
                    assert not stopped.is_set()
                with trio.fail_after(DRAIN_SECONDS / 2):
                    await stopped.wait()


async def read_response(stream: trio.SocketStream) -> bytes:
    connection = h11.Connection(h11.CLIENT)
    connection.send(h11.Request(method="GET", target="/", headers=[("host", HOST)]))
    connection.send(h11.EndOfMessage())
    body = b""
    while not isinstance(event := connection.next_event(), h11.EndOfMessage):
        if event is h11.NEED_DATA:
            connection.receive_data(await stream.receive_some(1 << 20))
        elif isinstance(event, h11.Data):
            body += event.data
    return body


async def open_websocket(address: str) -> trio.SocketStream:
    stream = await trio.open_tcp_stream(address, VISITORS_PORT)
    await stream.send_all(
        f"GET /socket HTTP/1.1\r\nHost: {HOST}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n\r\n".encode()
    )
    head = b""
    while b"\r\n\r\n" not in head:
        head += await stream.receive_some(4096)
    assert head.startswith(b"HTTP/1.1 101"), head
    return stream


async def echo(stream: trio.SocketStream, data: bytes) -> bool:
    await stream.send_all(data)
    got = b""
    while len(got) < len(data):
        got += await stream.receive_some(len(data))
    return got == data
