"""ICE sessions of two nodes in a simulated internet, behind NATs of their own, in virtual time."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from netlab.behavior import Filtering, Link, NatBehavior
from netlab.model import Host, Nat, Server, Topology, Uplink
from netlab.simulated import SimulatedInternet
from traversal import IceError, IceSession, Node, NodePrivate, RelayMap, RelayOptions, open_node

DELAY_SECONDS = 0.01
STRICT = NatBehavior(filtering=Filtering.APDF)


def topology(*nats: NatBehavior | None) -> Topology:
    """Hosts h0, h1, ... behind one NAT each (None: on the internet), and a server."""
    wire = Link(delay_seconds=DELAY_SECONDS)
    hosts, boxes = [], []
    for number, behavior in enumerate(nats):
        uplink = Uplink(link=wire)
        if behavior is not None:
            uplink = Uplink(network=f"n{number}", link=wire)
            boxes.append(Nat(name=f"n{number}", behavior=behavior))
        hosts.append(Host(name=f"h{number}", uplinks=(uplink,)))
    return Topology(
        hosts=tuple(hosts), servers=(Server(name="r", link=wire),), nats=tuple(boxes), seed=1
    )


@pytest.fixture
def build(tiny_relay: Callable[..., Any], map_of: Callable[..., RelayMap]) -> Callable[..., Any]:
    """Nodes on the hosts of a topology, which share a server for STUN."""

    @asynccontextmanager
    async def nodes(of: Topology) -> AsyncIterator[list[Node]]:
        rng = random.Random(of.seed)

        async def run(host: str, *, task_status: trio.TaskStatus[Node]) -> None:
            async with (
                internet.host(host),
                open_node(
                    NodePrivate.generate(rng.randbytes),
                    relay_map,
                    entropy=rng.randbytes,
                    relay_options=RelayOptions(plain=True),
                    map_ports=False,
                ) as node,
            ):
                task_status.started(node)
                await trio.sleep_forever()

        async with SimulatedInternet(of) as internet, trio.open_nursery() as nursery:
            relay = tiny_relay(port=443, stun_port=3478)
            server = internet.host("r")
            async with server:
                await nursery.start(relay.serve, server.addresses[0])
            relay_map = map_of(relay)
            yield [await nursery.start(run, host.name) for host in of.hosts]
            nursery.cancel_scope.cancel()

    return nodes


async def connect(a: IceSession, b: IceSession) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(a.connect, b.local_description.encode())
        nursery.start_soon(b.connect, a.local_description.encode())


@pytest.mark.parametrize("seconds", [1.0, 600.0])
async def test_through_two_strict_nats(
    build: Callable[..., Any], autojump_clock: MockClock, seconds: float
) -> None:
    """Both sides' checks punch, and consent checks keep the mappings alive."""
    async with (
        build(topology(STRICT, STRICT)) as (first, second),
        first.open_ice(is_controlling=True) as a,
        second.open_ice(is_controlling=False) as b,
    ):
        began = trio.current_time()
        await connect(a, b)
        assert trio.current_time() - began < 0.5
        await trio.sleep(seconds)
        await a.send(b"question")
        assert await b.receive() == b"question"
        await b.send(b"answer")
        assert await a.receive() == b"answer"


async def test_one_side_without_nat(build: Callable[..., Any], autojump_clock: MockClock) -> None:
    """A public node sees its peer's NAT as peer-reflexive or server-reflexive, and talks to it."""
    async with (
        build(topology(STRICT, None)) as (first, second),
        first.open_ice(is_controlling=False) as a,
        second.open_ice(is_controlling=True) as b,
    ):
        await connect(a, b)
        await b.send(b"hello")
        assert await a.receive() == b"hello"
        assert b.selected is not None
        assert b.selected.address in [address for _, address in first.own_addresses]


async def test_a_peer_that_vanishes(build: Callable[..., Any], autojump_clock: MockClock) -> None:
    """When consent runs out, waiting readers learn why."""
    async with (
        build(topology(None, None)) as (first, second),
        first.open_ice(is_controlling=True) as a,
    ):
        async with second.open_ice(is_controlling=False) as b:
            await connect(a, b)
        began = trio.current_time()
        with pytest.raises(IceError, match="not answered for 30 s"):
            await a.receive()
        assert 24 < trio.current_time() - began < 31
        with pytest.raises(IceError, match="failed"):
            await a.send(b"too late")
