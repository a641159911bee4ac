"""Paths that die, heal and move while traffic flows: what it costs, in datagrams."""

from __future__ import annotations

import dataclasses

import pytest
import trio
from trio.testing import MockClock

from netlab.model import PortAllocation, PortAssignment
from netlab.presets import class_behavior
from tests.system.checks import check_changed_nat, check_roaming, roaming_topology
from tests.system.world import FINE_TICK_SECONDS, WIRE, set_udp_between_hosts, simulate, topology
from traversal import PathKind

EASY = class_behavior("EIM+APDF")


@pytest.mark.parametrize("seed", range(3))
async def test_dead_and_healed_path(seed: int, autojump_clock: MockClock) -> None:
    """Less than a second of traffic is lost with the path, then none by the relay, and 3 s after
    it has healed the path is used again. The path dies at any point of the heartbeat's cycle."""
    async with simulate(topology(EASY, EASY, seed=seed), tick_seconds=FINE_TICK_SECONDS) as world:
        conversation = await world.converse()
        await conversation.until_direct()
        await trio.sleep(5 + 0.7 * seed)
        died = trio.current_time()
        set_udp_between_hosts(world, "n0", "n1", works=False)
        await conversation.until_relayed(1)
        relayed = trio.current_time()
        print(f"LAB dead {relayed - died:.3f}")
        await trio.sleep(10 + seed)
        set_udp_between_hosts(world, "n0", "n1", works=True)
        took = await conversation.until_direct(3)
        print(f"LAB healed {took:.3f}")
        await trio.sleep(2)
        lost = conversation.lost_seconds(died)
        print(f"LAB lost {lost:.3f}")
        assert lost < 1.0, conversation.describe()
        assert conversation.lost_seconds(relayed) == 0


@pytest.mark.parametrize("seed", range(2))
async def test_path_that_dies_one_way(seed: int, autojump_clock: MockClock) -> None:
    """The side whose datagrams get lost still hears the other, which is the one to notice; the
    call that it sends by relay makes the first side look, and less than a second is lost."""
    async with simulate(topology(EASY, EASY, seed=seed), tick_seconds=FINE_TICK_SECONDS) as world:
        conversation = await world.converse()
        await conversation.until_direct()
        await trio.sleep(6 + 0.7 * seed)
        died = trio.current_time()
        set_udp_between_hosts(world, "n0", works=False)
        await trio.sleep(8)
        print(f"LAB one way lost {conversation.lost_seconds(died):.2f}")
        assert conversation.lost_seconds(died) < 1.0, conversation.describe()
        set_udp_between_hosts(world, "n0", works=True)
        took = await conversation.until_direct(3)
        print(f"LAB one way healed {took:.2f}")


@pytest.mark.parametrize("outage_seconds", [10, 100])
async def test_outage(outage_seconds: int, autojump_clock: MockClock) -> None:
    """After a cable was out, relay and direct path alike, traffic flows again within 3 s."""
    async with simulate(topology(EASY, EASY)) as world:
        conversation = await world.converse()
        await conversation.until_direct()
        await trio.sleep(5)
        world.lab.host("h0").cut()
        await trio.sleep(outage_seconds)
        world.lab.host("h0").heal()
        healed = trio.current_time()
        await trio.sleep(15)
        first = min(min(t for t in f.arrived.values() if t > healed) for f in conversation.flows)
        last_lost = max(f.sent[max(f.lost(healed), default=0)] for f in conversation.flows)
        print(
            f"LAB outage {outage_seconds} first {first - healed:.2f} last {last_lost - healed:.2f}"
        )
        assert conversation.lost_seconds(healed + 3) == 0, conversation.describe()


async def test_given_up_connections_send_no_more(autojump_clock: MockClock) -> None:
    """What a relay connection had not delivered when it was given up is not delivered a minute
    later, when the network is back."""
    hard = class_behavior("APDM+APDF")
    async with simulate(topology(hard, hard)) as world:
        conversation = await world.converse()
        await trio.sleep(10)
        world.lab.host("h0").cut()
        await trio.sleep(20)
        world.lab.host("h0").heal()
        healed = trio.current_time()
        await trio.sleep(90)
        flows = conversation.flows
        ages = [
            at - flow.sent[n] for flow in flows for n, at in flow.arrived.items() if at > healed
        ]
        print(f"LAB oldest datagram {max(ages):.2f} s")
        assert max(ages) < 5


@pytest.mark.parametrize("seed", range(2))
async def test_roaming(seed: int, autojump_clock: MockClock) -> None:
    """As `check_roaming` says, at two points of the heartbeat's cycle."""
    of = roaming_topology(EASY, WIRE, seed)
    async with simulate(of, tick_seconds=FINE_TICK_SECONDS) as world:
        await check_roaming(world, after_seconds=5 + seed)


@pytest.mark.parametrize("what", ["reboot", "renumber"])
async def test_changing_nat(what: str, autojump_clock: MockClock) -> None:
    """As `check_changed_nat` says, with a NAT that gives other ports each time."""
    ports = PortAllocation(assignment=PortAssignment.RANDOM)
    behavior = dataclasses.replace(EASY, ports=ports)
    async with simulate(topology(behavior, EASY), tick_seconds=FINE_TICK_SECONDS) as world:
        await check_changed_nat(world, what, after_seconds=4.5)


@pytest.mark.parametrize("seed", range(1, 3))
async def test_loss_does_not_flap(seed: int, autojump_clock: MockClock) -> None:
    """With 5 % loss each way the direct path stays in use, and the relay adds no traffic worth
    mentioning."""
    wire = dataclasses.replace(WIRE, loss=0.025)
    async with simulate(topology(EASY, EASY, wire=wire, seed=seed)) as world:
        conversation = await world.converse()
        await conversation.until_direct()
        conversation.changes.clear()
        await trio.sleep(60)
        left = [c for c in conversation.changes if c.new.kind is PathKind.RELAY]
        sent = len(conversation.there.sent)
        lost = len(conversation.there.lost())
        print(f"LAB loss {seed} changes {len(left)} lost {lost / sent:.3f}")
        assert len(left) <= 2, conversation.describe()
        await conversation.until_direct(3)  # it may be in doubt at this very moment


async def test_relay_death_leaves_the_direct_path_alone(autojump_clock: MockClock) -> None:
    """When the home relay dies, direct traffic loses nothing, the home changes, and the peer
    learns the new one: when the direct path dies too, the new relay carries the traffic."""
    async with simulate(topology(EASY, EASY, relays=2), tick_seconds=FINE_TICK_SECONDS) as world:
        a, b = await world.open_nodes("h0", "h1")
        conversation = await world.introduce(a, b)
        await conversation.until_direct()
        await trio.sleep(2)
        home = a.home_region
        began = trio.current_time()
        world.relays[home - 900].stop()
        with trio.fail_after(30):
            while home in (a.home_region, b.home_region):  # noqa: ASYNC110  # no event tells
                await trio.sleep(0.1)
        print(f"LAB home changes after {trio.current_time() - began:.1f}")
        await trio.sleep(3)
        assert conversation.lost_seconds(began) == 0
        assert conversation.kinds == (PathKind.DIRECT, PathKind.DIRECT)
        died = trio.current_time()
        set_udp_between_hosts(world, "n0", "n1", works=False)
        await conversation.until_relayed(1)
        await trio.sleep(3)
        assert conversation.lost_seconds(died) < 1.0, conversation.describe()
        assert conversation.left.path.region == b.home_region


@pytest.mark.parametrize("announced", [True, False])
async def test_relay_restart(announced: bool, autojump_clock: MockClock) -> None:
    """Relayed traffic survives the restart of the only relay."""
    hard = class_behavior("APDM+APDF")
    async with simulate(topology(hard, hard)) as world:
        conversation = await world.converse()
        await trio.sleep(3)
        relay = world.relays[0]
        began = trio.current_time()
        if announced:
            relay.say_restarting(500)
            await trio.sleep(0.2)
        relay.stop()
        await trio.sleep(0.3)
        async with world.lab.host("r0"):
            await world.nursery.start(relay.serve)
        back = trio.current_time()
        await trio.sleep(10)
        print(f"LAB restart lost {conversation.lost_seconds(began):.2f}")
        assert conversation.lost_seconds(back + 1.5) == 0, conversation.describe()
        assert relay.connected == 2


@pytest.mark.parametrize("wait_ms", [0, 1000])
async def test_announced_restart_with_another_region(
    wait_ms: int, autojump_clock: MockClock
) -> None:
    """Told that the home relay restarts, nodes are at home elsewhere, and their peers know, before
    it goes: no datagram is lost. A minute later the home may be there again."""
    hard = class_behavior("APDM+APDF")
    async with simulate(topology(hard, hard, relays=2)) as world:
        a, b = await world.open_nodes("h0", "h1")
        conversation = await world.introduce(a, b)
        await trio.sleep(3)
        old = a.home_region
        assert b.home_region == old
        relay = world.relays[old - 900]
        told = trio.current_time()
        relay.say_restarting(wait_ms)
        await trio.sleep(wait_ms / 1000 + 1)
        assert old not in (a.home_region, b.home_region)
        for link in conversation.links:
            assert link.path.region == a.home_region == b.home_region
        relay.stop()
        await trio.sleep(10)
        assert conversation.lost_seconds(told) == 0, conversation.describe()
        async with world.lab.host(f"r{old - 900}"):
            await world.nursery.start(relay.serve)
        await trio.sleep(90)
        assert conversation.lost_seconds(told) == 0, conversation.describe()


async def test_relay_death_without_a_direct_path(autojump_clock: MockClock) -> None:
    """Nodes that only a relay connects find each other at another one when it dies."""
    hard = class_behavior("APDM+APDF")
    async with simulate(topology(hard, hard, relays=2)) as world:
        a, b = await world.open_nodes("h0", "h1")
        conversation = await world.introduce(a, b)
        await trio.sleep(3)
        began = trio.current_time()
        world.relays[a.home_region - 900].stop()
        await trio.sleep(30)
        lost = conversation.lost_seconds(began)
        print(f"LAB relay death lost {lost:.1f}")
        assert lost < 15, conversation.describe()
        assert conversation.lost_seconds(began + 20) == 0
        assert conversation.left.path.region == b.home_region == a.home_region
