"""Two nodes of which at least one is behind a hard NAT, in the simulated internet.

`UNDERPASS_HARD_NAT_SEEDS` says how many seeds each pair is tried with, 2 by default; the kernel's
real NATs are the business of `tests.bench.hard_nats`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

import pytest
import trio
from trio.testing import MockClock

from netlab.behavior import NatBehavior, PortAllocation, PortAssignment
from netlab.model import Host, Nat, Server, Topology, Uplink
from netlab.presets import class_behavior, nat_preset
from tests.system.checks import DIRECT, RELAY
from tests.system.world import (
    WIRE,
    Conversation,
    World,
    make_flows,
    set_udp_between_hosts,
    simulate,
    topology,
)
from traversal import Node, PathKind, PunchMemory, PunchPolicy
from traversal.io.punch_sockets import MAX_OPEN
from traversal.paths.punch_facts import PunchFacts, Strategy
from traversal.paths.punch_outbox import MAX_PROBES
from traversal.paths.verdict import Finding

SEEDS = range(1, 1 + int(os.environ.get("UNDERPASS_HARD_NAT_SEEDS", "2")))
DISCOVERY_SECONDS = 7.0
"""RFC 5780 tests of a NAT that filters take 5 s."""

EASY = nat_preset("home/linux").behavior
RANDOM = class_behavior("APDM+APDF")


def hard(**ports: object) -> NatBehavior:
    return replace(RANDOM, ports=PortAllocation(**ports))  # type: ignore[arg-type]  # as given


SEQUENTIAL = hard(assignment=PortAssignment.SEQUENTIAL)
STEPWISE = hard(assignment=PortAssignment.SEQUENTIAL, step=2)
PRESERVING = hard(assignment=PortAssignment.PRESERVE_ELSE_RANDOM)
BLOCK = hard(assignment=PortAssignment.RANDOM, block_size=512)


@dataclass(frozen=True)
class Pair:
    """Two NATs, new flows a second of a neighbor behind each, what a direct path may take."""

    name: str
    left: NatBehavior
    right: NatBehavior
    flows_per_second: float = 0.0
    limit_seconds: float = 6.0


PAIRS = [
    Pair("random-easy", RANDOM, EASY),
    Pair("easy-random", EASY, RANDOM),
    Pair("sequential-easy", SEQUENTIAL, EASY, 20.0, 3.0),
    Pair("easy-stepwise", EASY, STEPWISE, 20.0, 3.0),
    Pair("sequential-sequential", SEQUENTIAL, SEQUENTIAL, 20.0, 3.0),
    Pair("sequential-stepwise", SEQUENTIAL, STEPWISE, 50.0, 4.0),
    Pair("preserving-easy", PRESERVING, EASY),
    Pair("block-easy", BLOCK, EASY),
    Pair("easy-carrier", EASY, nat_preset("cgn/strict").behavior),
]


def searches(conversation: Conversation) -> list[PunchFacts]:
    """What the searches of both sides say; of a side that has none nothing."""
    found = [link._session.search for link in conversation.links]
    return [search.facts for search in found if search is not None]


def open_sockets(*nodes: Node) -> int:
    return sum(node._port_searches.sockets.open_count for node in nodes)


async def meet(world: World, flows_per_second: float = 0.0) -> Conversation:
    """Two nodes that know their NATs begin to talk."""
    nodes = await world.open_nodes("h0", "h1")
    await trio.sleep(DISCOVERY_SECONDS)
    if flows_per_second:
        server = world.lab.host("r0").addresses[0]
        for host in ("x0", "x1"):
            world.nursery.start_soon(
                make_flows, world.lab, host, server, flows_per_second, world.random
            )
    return await world.introduce(*nodes)


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair.name)
@pytest.mark.parametrize("seed", SEEDS)
async def test_ports_are_found(pair: Pair, seed: int, autojump_clock: MockClock) -> None:
    """Direct within the goal, nothing lost on the way there and after, within the budgets."""
    of = topology(
        pair.left,
        pair.right,
        relay_addresses=2,
        seed=seed,
        neighbors=bool(pair.flows_per_second),
    )
    async with simulate(of) as world:
        conversation = await meet(world, pair.flows_per_second)
        took = await conversation.until_direct(pair.limit_seconds)
        print(f"LAB {pair.name} seed {seed}: direct after {took:.2f}")
        await trio.sleep(20)
        assert conversation.kinds == DIRECT, conversation.describe()
        assert conversation.lost_seconds() == 0, conversation.describe()
        for facts in searches(conversation):
            assert facts.sockets <= MAX_OPEN
            assert facts.probes <= MAX_PROBES
            assert not facts.is_running
        for link in conversation.links:
            assert Finding.PORTS_FOUND in link.verdict().findings, link.verdict().text()


@pytest.mark.parametrize("right", [RANDOM, PRESERVING, SEQUENTIAL])
async def test_hopeless_pairs_stay_on_the_relay(
    right: NatBehavior, autojump_clock: MockClock
) -> None:
    """Two hard NATs of which one picks ports at random: decided within a second, and the search
    costs no socket and no packet to the peer."""
    of = topology(RANDOM, right, relay_addresses=2)
    async with simulate(of) as world:
        conversation = await meet(world)
        await trio.sleep(1)
        for facts in searches(conversation):
            assert facts.strategy is Strategy.RELAY
            assert "both NATs are hard" in facts.reason
        await trio.sleep(30)
        assert conversation.kinds == RELAY
        assert conversation.lost_seconds() == 0
        assert [(facts.attempts, facts.probes) for facts in searches(conversation)] == [(0, 0)] * 2
        assert Finding.NO_PORT_SEARCH in conversation.left.verdict().findings


async def test_easy_pairs_never_search(autojump_clock: MockClock) -> None:
    """Where plain punching works, the search opens nothing and sends nothing."""
    async with simulate(topology(EASY, EASY, relay_addresses=2)) as world:
        conversation = await meet(world)
        await conversation.until_direct(0.2)
        await trio.sleep(60)
        assert conversation.kinds == DIRECT
        assert searches(conversation) == []


@pytest.mark.parametrize("side", [0, 1])
async def test_switched_off(side: int, autojump_clock: MockClock) -> None:
    """The owner of either node can forbid the search; the verdict says whose remedy that is."""
    async with simulate(topology(RANDOM, EASY, relay_addresses=2)) as world:
        hosts = ("h0", "h1")
        off = PunchPolicy(is_enabled=False)
        nodes = [
            await world.open_node(host, port_search=off if number == side else PunchPolicy())
            for number, host in enumerate(hosts)
        ]
        await trio.sleep(DISCOVERY_SECONDS)
        conversation = await world.introduce(*nodes)
        await trio.sleep(30)
        assert conversation.kinds == RELAY
        assert open_sockets(*nodes) == 0
        assert conversation.lost_seconds() == 0
        assert "switched off" in conversation.links[side].verdict().text()


async def test_found_socket_outlives_silence(autojump_clock: MockClock) -> None:
    """Ten minutes after the last datagram the path is still there, kept alive at the pace that the
    NAT's timer asks for, and no second search is needed."""
    hard_for_long = replace(RANDOM, lifetimes=replace(RANDOM.lifetimes, udp_seconds=60.0))
    async with simulate(topology(hard_for_long, EASY, relay_addresses=2)) as world:
        async with trio.open_nursery() as talking:
            quiet = replace(world, nursery=talking)
            nodes = await world.open_nodes("h0", "h1")
            await trio.sleep(DISCOVERY_SECONDS)
            conversation = await quiet.introduce(*nodes)
            await conversation.until_direct(6)
            await trio.sleep(5)
            talking.cancel_scope.cancel()
        await trio.sleep(600)
        own = nodes[0]._port_searches.own_side()
        assert own.lifetime_seconds == 55.0
        link, other = conversation.links
        await link.send(b"again")
        began = trio.current_time()
        received = b""
        while received != b"again":
            received = await other.receive()
        await trio.sleep(1)
        assert link.path.kind is PathKind.DIRECT, link.verdict().text()
        assert trio.current_time() - began < 1.5
        assert link._session.search is not None
        assert link._session.search.facts.attempts == 1


async def test_rebooted_nat_is_searched_again(autojump_clock: MockClock) -> None:
    """When the hard NAT forgets the found mapping, the relay takes over within a second and the
    remembered way leads to a new socket."""
    async with simulate(topology(RANDOM, EASY, relay_addresses=2)) as world:
        conversation = await meet(world)
        await conversation.until_direct(6)
        await trio.sleep(10)
        old = conversation.right.path.address
        rebooted = trio.current_time()
        world.lab.nat("n0").reboot()
        await conversation.until(
            lambda: conversation.right.path.address not in (old, None), 20, "the new path"
        )
        await conversation.until_direct(20)
        print(f"LAB direct again {trio.current_time() - rebooted:.2f} s after the reboot")
        await trio.sleep(5)
        assert conversation.kinds == DIRECT
        assert conversation.lost_seconds(rebooted - 0.1) < 1.5, conversation.describe()


async def test_dead_found_path_falls_back_and_heals(autojump_clock: MockClock) -> None:
    """A found path that dies costs less than a second; healed, it is used again without a
    search."""
    async with simulate(topology(RANDOM, EASY, relay_addresses=2)) as world:
        conversation = await meet(world)
        await conversation.until_direct(6)
        await trio.sleep(10)
        died = trio.current_time()
        set_udp_between_hosts(world, "n0", "n1", works=False)
        await conversation.until_relayed(2)
        await trio.sleep(1)
        set_udp_between_hosts(world, "n0", "n1", works=True)
        took = await conversation.until_direct(10)
        print(f"LAB direct {took:.2f} s after the path healed")
        await trio.sleep(2)
        assert conversation.lost_seconds(died - 0.1) < 1.0, conversation.describe()


async def test_moved_away_from_the_hard_nat(autojump_clock: MockClock) -> None:
    """A node that leaves the hard NAT for an easy network is direct there within three seconds, and
    its found socket is closed."""
    uplinks = tuple(Uplink(network=network, link=WIRE) for network in ("hard", "home"))
    of = Topology(
        hosts=(
            Host(name="h0", uplinks=uplinks),
            Host(name="h1", uplinks=(Uplink(network="n1", link=WIRE),)),
        ),
        servers=(Server(name="r0", addresses=2),),
        nats=(
            Nat(name="hard", behavior=RANDOM),
            Nat(name="home", behavior=EASY),
            Nat(name="n1", behavior=EASY),
        ),
        seed=3,
    )
    async with simulate(of) as world:
        conversation = await meet(world)
        await conversation.until_direct(6)
        await trio.sleep(5)
        old = conversation.right.path.address
        moved = trio.current_time()
        world.lab.host("h0").roam("home")
        await conversation.until(
            lambda: conversation.right.path.address not in (old, None), 4, "the new path"
        )
        await conversation.until_direct(4)
        print(f"LAB direct {trio.current_time() - moved:.2f} s after moving")
        assert trio.current_time() - moved < 4
        await trio.sleep(5)
        search = conversation.left._session.search
        assert search is not None
        assert search.own_extra == ()
        assert conversation.kinds == DIRECT


async def test_peers_take_turns(autojump_clock: MockClock) -> None:
    """Three easy peers at once: the budget of sockets holds for the node, and all are found."""
    of = topology(RANDOM, EASY, EASY, EASY, relay_addresses=2)
    async with simulate(of) as world:
        hub, *others = await world.open_nodes("h0", "h1", "h2", "h3")
        await trio.sleep(DISCOVERY_SECONDS)
        most = 0

        async def watch() -> None:
            nonlocal most
            while True:
                most = max(most, open_sockets(hub))
                await trio.sleep(0.01)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch)
            conversations = [await world.introduce(hub, other) for other in others]
            for conversation in conversations:
                await conversation.until_direct(15)
            nursery.cancel_scope.cancel()
        assert 0 < most <= MAX_OPEN
        await trio.sleep(5)
        assert open_sockets(hub) == 0
        assert all(conversation.lost_seconds() == 0 for conversation in conversations)


async def test_what_worked_begins_at_once(autojump_clock: MockClock) -> None:
    """A node with the memory of an earlier life searches without waiting for plain punching."""
    memory = PunchMemory()
    async with simulate(topology(RANDOM, EASY, relay_addresses=2)) as world:
        nodes = [await world.open_node("h0", punch_memory=memory), await world.open_node("h1")]
        await trio.sleep(DISCOVERY_SECONDS)
        conversation = await world.introduce(*nodes)
        await conversation.until_direct(6)
        await trio.sleep(1)
        fingerprint = nodes[0]._port_searches.own_side().fingerprint
        record = memory.recall(fingerprint, nodes[1].public_key.raw)
        assert record.worked is Strategy.BIRTHDAY_HARD
        kept = PunchMemory.from_dict(memory.to_dict())
        assert kept.recall(fingerprint, nodes[1].public_key.raw).worked is Strategy.BIRTHDAY_HARD


@pytest.mark.parametrize("talker", [0, 1])
async def test_nodes_that_just_started(talker: int, autojump_clock: MockClock) -> None:
    """Nodes that learn what their NATs are like only after they met tell each other, also when one
    has nothing to send: direct as soon as the tests of the NATs are over."""
    async with simulate(topology(RANDOM, EASY, relay_addresses=2)) as world:
        nodes = await world.open_nodes("h0", "h1")
        speaker, listener = nodes[talker], nodes[1 - talker]
        link = await speaker.connect(listener.public_key, relay=listener.home_region)
        began = trio.current_time()
        with trio.fail_after(12):
            while link.path.kind is not PathKind.DIRECT:
                await link.send(b"data")
                await trio.sleep(0.1)
        print(f"LAB direct {trio.current_time() - began:.2f} s after starting")


async def test_rebound_sockets(autojump_clock: MockClock) -> None:
    """When a node replaces its sockets the found one goes too, and another is found at once."""
    async with simulate(topology(RANDOM, EASY, relay_addresses=2)) as world:
        nodes = await world.open_nodes("h0", "h1")
        await trio.sleep(DISCOVERY_SECONDS)
        conversation = await world.introduce(*nodes)
        await conversation.until_direct(6)
        await trio.sleep(5)
        old = conversation.right.path.address
        began = trio.current_time()
        async with world.lab.host("h0"):
            await nodes[0].rebind()
        await conversation.until(
            lambda: conversation.right.path.address not in (old, None), 12, "the new path"
        )
        await conversation.until_direct(12)
        print(f"LAB direct again {trio.current_time() - began:.2f} s after the rebind")
        await trio.sleep(2)
        assert conversation.lost_seconds(began - 0.1) < 1.5
