"""Two nodes behind every pair of NATs: direct wherever simple punching can do it, and at once."""

from __future__ import annotations

import itertools

import pytest
import trio
from trio.testing import MockClock

from netlab.model import NatBehavior
from netlab.presets import class_behavior, nat_preset
from netlab.punch import CLASSES, Outcome, expected_outcome
from tests.system.world import ROUND_TRIP_SECONDS, simulate, topology
from traversal import PathKind

EASY: dict[str, NatBehavior | None] = {
    "open": None,
    "firewall": nat_preset("firewall").behavior,
    "one-to-one": nat_preset("cloud/one-to-one").behavior,
    **{name: class_behavior(name) for name in ("EIM+EIF", "EIM+ADF", "EIM+APDF")},
}


@pytest.mark.parametrize(("left", "right"), [*itertools.product(EASY, repeat=2)])
async def test_easy_pairs_are_direct_at_once(
    left: str, right: str, autojump_clock: MockClock
) -> None:
    """Within 3 round trips and 50 ms after both have introduced themselves, and nothing is lost
    on the way from the relay to the direct path."""
    async with simulate(topology(EASY[left], EASY[right])) as world:
        conversation = await world.converse()
        took = await conversation.until_direct()
        print(f"LAB {left} {right} {took}")
        assert took < 3 * ROUND_TRIP_SECONDS + 0.05, conversation.describe()
        await trio.sleep(1.5)
        assert conversation.lost_seconds() == 0
        assert conversation.kinds == (PathKind.DIRECT, PathKind.DIRECT)


@pytest.mark.parametrize(
    ("left", "right"),
    [*itertools.combinations_with_replacement(CLASSES, 2)],
)
async def test_every_pair_of_classes(left: str, right: str, autojump_clock: MockClock) -> None:
    """Direct where the matrix of simple punching says so; the relay carries the others, and
    neither loses a datagram."""
    behaviors = class_behavior(left), class_behavior(right)
    async with simulate(topology(*behaviors)) as world:
        conversation = await world.converse()
        if expected_outcome(left, right) is Outcome.DIRECT:
            took = await conversation.until_direct(10)
            print(f"LAB {left} {right} {took}")
        await trio.sleep(3)
        if expected_outcome(left, right) is Outcome.RELAY:
            assert conversation.kinds == (PathKind.RELAY, PathKind.RELAY)
        assert conversation.lost_seconds() == 0, conversation.describe()
