"""What must hold on either back end: the simulated tests and those in the kernel call the same.

`slack_seconds` is added to what a time may be: nothing in virtual time; in real time what a loaded
machine may hold a process back.
"""

from __future__ import annotations

from typing import Final

import trio

from netlab.model import Host, Nat, NatBehavior, Server, Topology, Uplink
from netlab.model import Link as Wire
from netlab.presets import class_behavior, nat_preset
from tests.system.world import Conversation, World
from traversal import PathKind

EASY_NATS: Final[dict[str, NatBehavior | None]] = {
    "open": None,
    "firewall": nat_preset("firewall").behavior,
    "one-to-one": nat_preset("cloud/one-to-one").behavior,
    **{name: class_behavior(name) for name in ("EIM+EIF", "EIM+ADF", "EIM+APDF")},
}
"""What simple punching gets through in any pair."""
DIRECT = (PathKind.DIRECT, PathKind.DIRECT)
RELAY = (PathKind.RELAY, PathKind.RELAY)


async def check_goes_direct(
    world: World, round_trip_seconds: float, slack_seconds: float = 0.0
) -> Conversation:
    """Direct within 3 round trips and 50 ms after both have introduced themselves, and nothing
    is lost on the way from the relay to the direct path."""
    conversation = await world.converse()
    took = await conversation.until_direct()
    print(f"LAB direct after {took:.3f}")
    assert took < 3 * round_trip_seconds + 0.05 + slack_seconds, conversation.describe()
    await trio.sleep(1)
    now = trio.current_time()
    assert conversation.lost_seconds(end=now - 0.3) == 0
    assert conversation.kinds == DIRECT
    return conversation


async def check_stays_on_the_relay(world: World, seconds: float) -> Conversation:
    """The relay carries everything, and loses nothing."""
    conversation = await world.converse()
    await trio.sleep(seconds)
    assert conversation.kinds == RELAY
    assert conversation.lost_seconds() == 0, conversation.describe()
    return conversation


def roaming_topology(behavior: NatBehavior, wire: Wire, seed: int = 1) -> Topology:
    """h0 with two uplinks, "home" and "cell"; h1 with one, "n1"."""
    uplinks = (Uplink(network="home", link=wire), Uplink(network="cell", link=wire))
    return Topology(
        hosts=(
            Host(name="h0", uplinks=uplinks),
            Host(name="h1", uplinks=(Uplink(network="n1", link=wire),)),
        ),
        servers=(Server(name="r0"),),
        nats=tuple(Nat(name=name, behavior=behavior) for name in ("home", "cell", "n1")),
        seed=seed,
    )


async def check_roaming(world: World, after_seconds: float, slack_seconds: float = 0.0) -> None:
    """Moved to another uplink, traffic flows by relay within 1 s and directly within 3 s."""
    conversation = await world.converse()
    await conversation.until_direct()
    await trio.sleep(after_seconds)
    moved = trio.current_time()
    old = conversation.right.path.address
    world.lab.host("h0").roam("cell")
    await _check_new_path(conversation, old, moved, slack_seconds)


async def check_changed_nat(
    world: World, what: str, after_seconds: float, slack_seconds: float = 0.0
) -> None:
    """A NAT that forgets its mappings, or gets another address, costs less than a second of
    traffic, and the path is direct again within 3 s. The relay connection breaks too."""
    conversation = await world.converse()
    await conversation.until_direct()
    await trio.sleep(after_seconds)
    changed = trio.current_time()
    old = conversation.right.path.address
    nat = world.lab.nat("n0")
    if what == "reboot":
        nat.reboot()
    else:
        nat.renumber((bytes((2, 1, 9, 9)),))
    await _check_new_path(conversation, old, changed, slack_seconds)


async def _check_new_path(
    conversation: Conversation, old: object, since: float, slack_seconds: float
) -> None:
    limit = 3 + slack_seconds
    await conversation.until(
        lambda: conversation.right.path.address not in (old, None), limit, "the new path"
    )
    await conversation.until_direct(limit)
    took = trio.current_time() - since
    await trio.sleep(1)
    lost = conversation.lost_seconds(since - 0.1, trio.current_time() - 0.5)
    print(f"LAB direct again after {took:.3f}, lost {lost:.2f}")
    assert took < limit
    assert lost < 1.0 + slack_seconds, conversation.describe()
