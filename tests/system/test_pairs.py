"""Two nodes behind every pair of NATs: direct wherever simple punching can do it, and at once."""

from __future__ import annotations

import itertools

import pytest
import trio
from trio.testing import MockClock

from netlab.presets import class_behavior
from netlab.punch import CLASSES, Outcome, expected_outcome
from netlab.timeline import Event
from tests.system.checks import EASY_NATS, check_goes_direct
from tests.system.world import ROUND_TRIP_SECONDS, simulate, topology
from traversal import PathKind


@pytest.mark.parametrize(
    ("left", "right"), [*itertools.combinations_with_replacement(EASY_NATS, 2)]
)
async def test_easy_pairs_are_direct_at_once(
    left: str, right: str, autojump_clock: MockClock
) -> None:
    """As `check_goes_direct` says."""
    async with simulate(topology(EASY_NATS[left], EASY_NATS[right])) as world:
        await check_goes_direct(world, ROUND_TRIP_SECONDS)


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
            await conversation.until_direct(1)
        await trio.sleep(2)
        if expected_outcome(left, right) is Outcome.RELAY:
            assert conversation.kinds == (PathKind.RELAY, PathKind.RELAY)
        assert conversation.lost_seconds() == 0, conversation.describe()


def test_the_same_seed_gives_the_same_packets() -> None:
    """Nodes, relay and traffic are as repeatable as the simulated internet is."""

    async def run() -> list[Event]:
        behaviors = class_behavior("APDM+EIF"), EASY_NATS["EIM+ADF"]
        async with simulate(topology(*behaviors), record_packets=True) as world:
            conversation = await world.converse()
            await conversation.until_direct()
            await trio.sleep(5)
            return list(world.lab.timeline)

    # Each run has a clock of its own, since sums of times round by where they begin.
    first, second = (trio.run(run, clock=MockClock(autojump_threshold=0)) for _ in range(2))
    assert len(first) > 400
    assert first == second
