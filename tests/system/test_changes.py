"""Paths that die, heal and move while traffic flows: what it costs, in datagrams."""

from __future__ import annotations

import dataclasses

import pytest
import trio
from trio.testing import MockClock

from netlab.model import Host, Nat, PortAllocation, PortAssignment, Server, Topology, Uplink
from netlab.presets import class_behavior
from tests.system.world import WIRE, set_udp_between_hosts, simulate, topology
from traversal import PathKind

EASY = class_behavior("EIM+APDF")


@pytest.mark.parametrize("seed", range(4))
async def test_dead_and_healed_path(seed: int, autojump_clock: MockClock) -> None:
    """Less than a second of traffic is lost with the path, then none by the relay, and 3 s after
    it has healed the path is used again. The path dies at any point of the heartbeat's cycle."""
    async with simulate(topology(EASY, EASY, seed=seed)) as world:
        conversation = await world.converse()
        await conversation.until_direct()
        await trio.sleep(5 + 0.7 * seed)
        died = trio.current_time()
        set_udp_between_hosts(world, "n0", "n1", works=False)
        await conversation.until_relayed(1)
        relayed = trio.current_time()
        print(f"LAB dead {relayed - died:.3f}")
        await trio.sleep(10 + seed)
        healed = trio.current_time()
        set_udp_between_hosts(world, "n0", "n1", works=True)
        took = await conversation.until_direct(3)
        print(f"LAB healed {took:.3f}")
        await trio.sleep(2)
        lost = conversation.lost_seconds(died)
        print(f"LAB lost {lost:.3f}")
        assert lost < 1.0, conversation.describe()
        assert conversation.lost_seconds(relayed) == 0


@pytest.mark.parametrize("seed", range(2))
async def test_roaming(seed: int, autojump_clock: MockClock) -> None:
    """Moved to another uplink, traffic flows by relay within 1 s and directly within 3 s."""
    uplinks = (Uplink(network="home", link=WIRE), Uplink(network="cell", link=WIRE))
    of = Topology(
        hosts=(
            Host(name="h0", uplinks=uplinks),
            Host(name="h1", uplinks=(Uplink(network="n1", link=WIRE),)),
        ),
        servers=(Server(name="r0"),),
        nats=tuple(Nat(name=name, behavior=EASY) for name in ("home", "cell", "n1")),
        seed=seed,
    )
    async with simulate(of) as world:
        conversation = await world.converse()
        await conversation.until_direct()
        await trio.sleep(5 + seed)
        old = conversation.right.path.address
        world.lab.host("h0").roam("cell")
        moved = trio.current_time()
        await conversation.until(
            lambda: conversation.right.path.address not in (old, None), 3, "going direct again"
        )
        await conversation.until_direct(3)
        direct = trio.current_time()
        await trio.sleep(2)
        lost = conversation.lost_seconds(moved - 0.1)
        print(f"LAB roam direct {direct - moved:.3f} lost {lost:.3f}")
        assert direct - moved < 3
        assert lost < 1.0, conversation.describe()
        assert conversation.lost_seconds(moved + 1.0) == 0


@pytest.mark.parametrize("what", ["reboot", "renumber"])
async def test_changing_nat(what: str, autojump_clock: MockClock) -> None:
    """A NAT that forgets its mappings, or gets another address, costs less than a second of
    traffic, and the path is direct again within 3 s. The relay connection breaks too."""
    behavior = class_behavior("EIM+APDF")
    behavior = dataclasses.replace(behavior, ports=PortAllocation(assignment=PortAssignment.RANDOM))
    async with simulate(topology(behavior, EASY)) as world:
        conversation = await world.converse()
        await conversation.until_direct()
        await trio.sleep(4.5)
        changed = trio.current_time()
        nat = world.lab.nat("n0")
        if what == "reboot":
            nat.reboot()
        else:
            nat.renumber((bytes((2, 1, 9, 9)),))
        old = conversation.right.path.address
        await conversation.until(
            lambda: conversation.right.path.address not in (old, None), 3, "the new path"
        )
        await conversation.until_direct(3)
        direct = trio.current_time()
        await trio.sleep(2)
        lost = conversation.lost_seconds(changed - 0.1)
        print(f"LAB {what} direct {direct - changed:.3f} lost {lost:.3f}")
        assert direct - changed < 3
        assert lost < 1.0, conversation.describe()


@pytest.mark.parametrize("seed", range(3))
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
        assert conversation.kinds == (PathKind.DIRECT, PathKind.DIRECT)


async def test_relay_death_leaves_the_direct_path_alone(autojump_clock: MockClock) -> None:
    """When the home relay dies, direct traffic loses nothing, the home changes, and the peer
    learns the new one: when the direct path dies too, the new relay carries the traffic."""
    async with simulate(topology(EASY, EASY, relays=2)) as world:
        a, b = await world.open_nodes("h0", "h1")
        conversation = await world.introduce(a, b)
        await conversation.until_direct()
        await trio.sleep(2)
        home = a.home_region
        began = trio.current_time()
        world.relays[home - 900].stop()
        with trio.fail_after(30):
            while home in (a.home_region, b.home_region):
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
