"""The same checks in Linux namespaces, with the real relay as a process of its own."""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Final
from unittest.mock import patch

import pytest
import trio

from netlab.kernel.jail import JailError, call_in_jail
from netlab.model import Link as Wire
from netlab.model import Topology, Uplink
from netlab.presets import class_behavior, nat_preset
from tests.system.checks import (
    DIRECT,
    check_changed_nat,
    check_goes_direct,
    check_roaming,
    check_stays_on_the_relay,
    roaming_topology,
)
from tests.system.kernel_world import in_kernel
from tests.system.world import World, topology
from traversal.io import dial
from traversal.wire.introduction import MappingClass

SLACK_SECONDS: Final = 3.0
"""What a loaded machine may add to any time."""
LIMIT_SECONDS: Final = 60.0
DISCOVERY_SECONDS: Final = 8.0

EASY = class_behavior("EIM+APDF")
NARROW_BYTES: Final = 600
HARD = class_behavior("APDM+APDF")
PLAIN = Wire()


def run_in_jail(of: Topology, check: Callable[[World], Awaitable[object]]) -> None:
    """Run a check in a jail of its own; skips where the kernel allows none."""

    async def run() -> None:
        async with in_kernel(of) as world:
            await check(world)

    def work() -> bytes:
        trio.run(run)
        return b""

    try:
        call_in_jail(work, timeout_seconds=LIMIT_SECONDS)
    except JailError as error:
        pytest.skip(f"no jail here: {error}")


def test_easy_pair() -> None:
    """As `check_goes_direct` says."""
    check = functools.partial(
        check_goes_direct, round_trip_seconds=0.0, slack_seconds=SLACK_SECONDS
    )
    run_in_jail(topology(EASY, EASY, wire=PLAIN), check)


def test_hard_pair() -> None:
    """As `check_stays_on_the_relay` says."""
    check = functools.partial(check_stays_on_the_relay, seconds=2)
    run_in_jail(topology(HARD, HARD, wire=PLAIN), check)


def test_hard_nat() -> None:
    """netfilter's random ports are found: direct within six seconds, nothing is lost, and all
    sockets but one are closed."""

    async def check(world: World) -> None:
        nodes = await world.open_nodes("h0", "h1")
        with trio.move_on_after(DISCOVERY_SECONDS):
            while nodes[0].nat.mapping is MappingClass.UNKNOWN:  # noqa: ASYNC110  # no event tells
                await trio.sleep(0.05)
        conversation = await world.introduce(*nodes)
        took = await conversation.until_direct(6 + SLACK_SECONDS)
        print(f"LAB direct after {took:.2f}")
        await trio.sleep(1)
        assert conversation.lost_seconds(end=trio.current_time() - 0.5) == 0
        search = conversation.left._session.search
        assert search is not None
        assert search.facts.has_succeeded
        assert nodes[0]._port_searches.sockets.open_count == 0

    of = topology(nat_preset("office/pf").behavior, EASY, wire=PLAIN, relay_addresses=2)
    run_in_jail(of, check)


@pytest.mark.parametrize("black_hole", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_narrow_link(black_hole: bool) -> None:
    """Through a link of 600 bytes, whose router tells or swallows, both ends find what fits, and a
    datagram of just that size arrives. Where it swallows, the relay is reached at the second try,
    by short segments of TCP."""
    narrow = Uplink(link=Wire(mtu_bytes=NARROW_BYTES, mtu_black_hole=black_hole))
    of = topology(EASY, EASY, wire=PLAIN)
    of = replace(of, nats=tuple(replace(nat, uplink=narrow) for nat in of.nats))

    async def check(world: World) -> None:
        # Not the ten seconds after which a relay that fell silent is given up.
        with patch.object(dial, "DIAL_TIMEOUT_SECONDS", 1.0):
            conversation = await world.converse()
        await conversation.until_direct(5 + SLACK_SECONDS)
        fits = range(NARROW_BYTES - 28 - 8, NARROW_BYTES - 28 + 1)
        with trio.fail_after(10 + SLACK_SECONDS):
            for link in conversation.links:
                while link.path.mtu_bytes not in fits:  # noqa: ASYNC110  # no event tells
                    await trio.sleep(0.05)
        print(f"LAB mtu {[link.path.mtu_bytes for link in conversation.links]}")
        left, right = conversation.links
        assert left.path.mtu_bytes is not None
        received = right.statistics().received
        for _ in range(10):
            await left.send(bytes([255]) * left.path.mtu_bytes)
        await trio.sleep(0.5)
        assert right.statistics().received >= received + 10
        assert conversation.kinds == DIRECT

    run_in_jail(of, check)


@pytest.mark.slow
def test_roaming() -> None:
    """As `check_roaming` says."""
    check = functools.partial(check_roaming, after_seconds=1, slack_seconds=SLACK_SECONDS)
    run_in_jail(roaming_topology(EASY, PLAIN), check)


@pytest.mark.slow
def test_renumbered_nat() -> None:
    """As `check_changed_nat` says."""
    check = functools.partial(
        check_changed_nat, what="renumber", after_seconds=1, slack_seconds=SLACK_SECONDS
    )
    run_in_jail(topology(EASY, EASY, wire=PLAIN), check)
