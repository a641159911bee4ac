"""A node on an IPv6-only network reaches a peer that has IPv4 only, through the NAT64."""

from __future__ import annotations

import random
from collections.abc import Callable
from ipaddress import IPv6Address
from typing import Any

import trio
from trio.testing import MockClock

from netlab.behavior import Ipv6, NatBehavior
from netlab.model import Host, Nat, Server, Topology, Uplink
from netlab.simulated import SimulatedInternet
from traversal import IceSession, NodePrivate, PathKind, RelayMap, RelayOptions, open_node
from traversal.relay_map import Dial, Region, RelayNode

TOPOLOGY = Topology(
    hosts=(
        Host(name="modern", uplinks=(Uplink(network="nat64"),)),
        Host(name="legacy", uplinks=(Uplink(),)),
    ),
    servers=(Server(name="r"),),
    nats=(Nat(name="nat64", behavior=NatBehavior(ipv6=Ipv6.ROUTED, nat64=True)),),
    seed=1,
)


async def test_direct_path_through_nat64(
    tiny_relay: Callable[..., Any], autojump_clock: MockClock
) -> None:
    """The path's address is the synthesized one, and the peer answers through it."""
    rng = random.Random(1)
    options: dict[str, Any] = {
        "entropy": rng.randbytes,
        "relay_options": RelayOptions(plain=True),
        "map_ports": False,
        "admit": lambda _: True,
    }
    async with SimulatedInternet(TOPOLOGY) as internet, trio.open_nursery() as nursery:
        relay = tiny_relay(port=443, stun_port=3478)
        server = internet.host("r")
        address = next(a for a in server.addresses if ":" in str(a))
        async with server:
            await nursery.start(relay.serve, address)
        node = RelayNode(
            name="900a",
            region_id=900,
            host_name="r",
            ipv4=Dial.NEVER,
            ipv6=IPv6Address(address),
            stun_port=3478,
            derp_port=443,
            insecure_for_tests=True,
        )
        relay_map = RelayMap({900: Region(900, "r", "Region", (node,))})

        async def serve(*, task_status: trio.TaskStatus[Any]) -> None:
            # Its IPv6 carries TCP to the relay only: peers know nothing but its IPv4 address.
            async with (
                internet.host("legacy"),
                open_node(
                    NodePrivate.generate(rng.randbytes),
                    relay_map,
                    hosts={4: "0.0.0.0"},
                    **options,
                ) as legacy,
            ):
                task_status.started(legacy)
                link = await legacy.accept()
                while True:
                    await link.send(await link.receive())

        legacy = await nursery.start(serve)
        key = NodePrivate.generate(rng.randbytes)
        async with internet.host("modern"), open_node(key, relay_map, **options) as modern:
            link = await modern.connect(legacy.public_key, relay=900)
            with trio.fail_after(10):
                while link.path.kind is not PathKind.DIRECT:
                    await link.send(b"echo")
                    assert await link.receive() == b"echo"
                    await trio.sleep(0.1)
            assert link.path.address is not None
            assert link.path.address.host.startswith("64:ff9b::")
            await link.send(b"direct")
            while await link.receive() != b"direct":
                pass
        nursery.cancel_scope.cancel()


async def test_relay_with_an_ipv4_address_only(
    tiny_relay: Callable[..., Any], autojump_clock: MockClock
) -> None:
    """A relay that the map knows by an IPv4 literal is found and dialed through the NAT64."""
    rng = random.Random(1)
    options: dict[str, Any] = {
        "entropy": rng.randbytes,
        "relay_options": RelayOptions(plain=True),
        "map_ports": False,
    }
    async with SimulatedInternet(TOPOLOGY) as internet, trio.open_nursery() as nursery:
        relay = tiny_relay(port=443, stun_port=3478)
        server = internet.host("r")
        async with server:
            await nursery.start(relay.serve, next(a for a in server.addresses if ":" not in a))
        relay_map = RelayMap({relay.region_id: relay.region})
        key = NodePrivate.generate(rng.randbytes)
        async with internet.host("modern"), open_node(key, relay_map, **options) as node:
            assert node.home_region == relay.region_id
            assert node.statistics().relays[0].is_connected
            assert set(node.report.latencies) == {relay.region_id}
            assert list(relay.clients) == [node.public_key.raw]
        nursery.cancel_scope.cancel()


async def test_ice_through_nat64(autojump_clock: MockClock) -> None:
    """An ICE peer's IPv4 candidates are checked through the NAT64, too."""
    rng = random.Random(1)
    options: dict[str, Any] = {"entropy": rng.randbytes, "map_ports": False}
    keys = [NodePrivate.generate(rng.randbytes) for _ in range(2)]
    async with SimulatedInternet(TOPOLOGY) as internet, trio.open_nursery() as nursery:

        async def serve(*, task_status: trio.TaskStatus[IceSession]) -> None:
            async with (
                internet.host("legacy"),
                open_node(keys[0], RelayMap({}), hosts={4: "0.0.0.0"}, **options) as legacy,
                legacy.open_ice(is_controlling=False) as session,
            ):
                task_status.started(session)
                await trio.sleep_forever()

        theirs = await nursery.start(serve)
        async with (
            internet.host("modern"),
            open_node(keys[1], RelayMap({}), **options) as modern,
            modern.open_ice(is_controlling=True) as ours,
        ):
            nursery.start_soon(theirs.connect, ours.local_description)
            await ours.connect(theirs.local_description)
            assert ours.selected is not None
            assert ours.selected.address.host.startswith("64:ff9b::")
            await ours.send(b"hello")
            assert await theirs.receive() == b"hello"
            await theirs.send(b"hello yourself")
            assert await ours.receive() == b"hello yourself"
        nursery.cancel_scope.cancel()
