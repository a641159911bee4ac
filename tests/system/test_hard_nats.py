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
from netlab.presets import class_behavior, nat_preset
from tests.system.world import Conversation, World, simulate, topology
from traversal import PathKind

SEEDS = range(1, 1 + int(os.environ.get("UNDERPASS_HARD_NAT_SEEDS", "2")))
DISCOVERY_SECONDS = 7.0
"""RFC 5780 tests of a NAT that filters take 5 s."""

EASY = nat_preset("home/linux").behavior
RANDOM = class_behavior("APDM+APDF")


def sequential(step: int = 1) -> NatBehavior:
    return replace(RANDOM, ports=PortAllocation(assignment=PortAssignment.SEQUENTIAL, step=step))


@dataclass(frozen=True)
class Pair:
    """Two NATs, and what a direct path between them may take."""

    name: str
    left: NatBehavior
    right: NatBehavior
    limit_seconds: float = 6.0


PAIRS = [
    Pair("random-easy", RANDOM, EASY),
    Pair("easy-random", EASY, RANDOM),
]


async def meet(world: World) -> Conversation:
    """Two nodes that know their NATs begin to talk."""
    nodes = await world.open_nodes("h0", "h1")
    await trio.sleep(DISCOVERY_SECONDS)
    return await world.introduce(*nodes)


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair.name)
@pytest.mark.parametrize("seed", SEEDS)
async def test_ports_are_found(pair: Pair, seed: int, autojump_clock: MockClock) -> None:
    """Direct within the goal, nothing lost on the way there, the extra sockets closed."""
    of = topology(pair.left, pair.right, relay_addresses=2, seed=seed)
    async with simulate(of) as world:
        conversation = await meet(world)
        took = await conversation.until_direct(pair.limit_seconds)
        print(f"LAB {pair.name} seed {seed}: direct after {took:.2f}")
        await trio.sleep(30)
        assert conversation.kinds == (PathKind.DIRECT, PathKind.DIRECT), conversation.describe()
        assert conversation.lost_seconds() == 0, conversation.describe()
