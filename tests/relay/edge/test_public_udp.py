"""Published UDP ports, to flows in memory."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from relay.config import ListenAddress
from relay.edge import public_udp
from relay.edge.destinations import DestinationPolicy
from relay.edge.public_udp import FLOWS_PER_SOURCE, IDLE_SECONDS, UdpPort
from relay.edge.routes import PortRoute
from tests.relay.edge.arena import TUNNEL, Arena, EchoFlow, open_arena

DESTINATION = DestinationPolicy().authorize("10.0.0.7:53")


@asynccontextmanager
async def port(arena: Arena) -> AsyncIterator[tuple[UdpPort, tuple[str, int]]]:
    sock = trio.socket.socket(trio.socket.AF_INET, trio.socket.SOCK_DGRAM)
    with sock:
        await sock.bind(("127.0.0.1", 0))
        route = PortRoute(ListenAddress("127.0.0.1", 0), TUNNEL.id, DESTINATION)
        udp = UdpPort(sock, route, arena.registry, lambda: arena.meter.traffic(TUNNEL.id, 0))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(udp.run)
            yield udp, sock.getsockname()
            nursery.cancel_scope.cancel()


def visitor() -> trio.socket.SocketType:
    return trio.socket.socket(trio.socket.AF_INET, trio.socket.SOCK_DGRAM)


async def test_datagrams_go_and_come_back_by_sender() -> None:
    """Two visitors are two flows, and each gets its own answers."""
    async with open_arena() as arena, port(arena) as (_, address):
        connection = arena.connect()
        with visitor() as first, visitor() as second, trio.fail_after(5):
            for number, sock in enumerate((first, second, first)):
                await sock.sendto(b"%d" % number, address)
                assert (await sock.recvfrom(100))[0] == b"%d" % number
        assert [flow.destination for flow in connection.flows] == ["10.0.0.7:53"] * 2
        traffic = arena.meter.tunnels[TUNNEL.id]
        assert (traffic.udp_total, traffic.udp_active, traffic.bytes_in) == (2, 2, 3)


async def test_a_forged_sender_is_not_flooded(monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer much larger than the question waits until the sender has spoken again."""
    monkeypatch.setattr(EchoFlow, "copies", 100)
    async with open_arena() as arena, port(arena) as (udp, address):
        arena.connect()
        with visitor() as sock:
            await sock.sendto(b"question", address)
            await trio.testing.wait_all_tasks_blocked(0.05)
            assert udp.drops == 1
            await sock.sendto(b"question", address)
            with trio.fail_after(5):
                assert len((await sock.recvfrom(2000))[0]) == 800


async def test_one_source_has_so_many_flows() -> None:
    """Beyond its share a source's new ports are ignored; without a connector all are."""
    async with open_arena() as arena, port(arena) as (udp, address):
        arena.connect()
        socks = [visitor() for _ in range(FLOWS_PER_SOURCE + 3)]
        for sock in socks:
            await sock.sendto(b"x", address)
        await trio.testing.wait_all_tasks_blocked(0.05)
        assert arena.meter.tunnels[TUNNEL.id].udp_active == FLOWS_PER_SOURCE
        assert udp.drops == 3
        for sock in socks:
            sock.close()


async def test_forged_senders_displace_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """With all flows taken by senders that never speak again, a new visitor gets one, and a visitor
    in a conversation keeps its own."""
    monkeypatch.setattr(public_udp, "FLOWS", 8)
    async with open_arena() as arena, port(arena) as (_, address):
        arena.connect()
        with visitor() as old, visitor() as new, trio.fail_after(5):
            for _ in range(2):
                await old.sendto(b"talk", address)
                assert (await old.recvfrom(100))[0] == b"talk"
            forged = [visitor() for _ in range(30)]
            for sock in forged:
                await sock.sendto(b"x", address)
                await trio.testing.wait_all_tasks_blocked()
            traffic = arena.meter.tunnels[TUNNEL.id]
            assert traffic.udp_active <= 8
            await new.sendto(b"hello", address)
            assert (await new.recvfrom(100))[0] == b"hello"
            assert traffic.udp_total == 32
            await old.sendto(b"still here", address)
            assert (await old.recvfrom(100))[0] == b"still here"
            assert traffic.udp_total == 32
            for sock in forged:
                sock.close()


async def test_closing_ends_everything() -> None:
    """The port stops at once, with what is under way."""
    async with open_arena() as arena, port(arena) as (udp, address):
        connection = arena.connect()
        with visitor() as sock, trio.fail_after(5):
            await sock.sendto(b"x", address)
            await sock.recvfrom(100)
            udp.close()
            await trio.testing.wait_all_tasks_blocked(0.01)
        assert connection.flows[0].is_closed
        assert not udp._visitors


async def test_a_silent_flow_ends(autojump_clock: MockClock) -> None:
    """After the idle time its memory is given back and the connector's flow closed."""
    async with open_arena() as arena, port(arena) as (_, address):
        connection = arena.connect()
        with visitor() as sock:
            await sock.sendto(b"x", address)
            await trio.sleep(IDLE_SECONDS + 1)
        assert connection.flows[0].is_closed
        assert arena.meter.tunnels[TUNNEL.id].udp_active == 0


async def test_without_a_connector_that_takes_datagrams() -> None:
    """The datagram is lost, as datagrams are, and counted as an error."""
    async with open_arena() as arena, port(arena) as (_, address):
        with visitor() as sock:
            await sock.sendto(b"x", address)
            await trio.testing.wait_all_tasks_blocked(0.05)
        traffic = arena.meter.tunnels[TUNNEL.id]
        assert (traffic.errors, traffic.udp_active) == (1, 0)
        assert public_udp.MAX_PAYLOAD_BYTES == 1280
