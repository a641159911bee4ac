"""How fast paths are found, left, found again and moved: `python -m tests.bench.paths`.

Two back ends, the same nodes: the simulated internet, many seeds in virtual time, and Linux
namespaces with `underpass-relay` as a process and real sockets, in real time. Every uplink delays
by `--delay` milliseconds each way and relays sit in the middle, so a round trip between two nodes
takes four times that, directly and by the relay. 50 numbered datagrams a second flow each way.

* `direct`: from the moment when both have introduced themselves until both send directly and only
  so, for every pair of easy NATs. Goal: 3 round trips and 50 ms.
* `dead`: what UDP carries between the nodes is dropped in silence, at any point of the heartbeat's
  cycle. Traffic lost of the worse direction, as time; from then on the relay loses nothing.
  Goal: 1 s.
* `healed`: from the end of that, 6 s and more later, until both are direct again. Goal: 3 s.
* `roamed, silence`: one node moves to another uplink, old address and relay connection gone. The
  longest silence that either reader sees. Goal: 1 s.
* `roamed, direct`: from the move until both are direct on the new address. Goal: 3 s.

The exit status is 1 when a goal is missed in the simulated internet, where time is exact.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import os
import random
import statistics
import sys
from collections.abc import Awaitable, Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Final

import trio
from trio.testing import MockClock

from netlab.kernel.jail import call_in_jail
from netlab.kernel.namespaces import raise_descriptor_limit
from netlab.model import Link as Wire
from netlab.presets import class_behavior
from tests.system.checks import EASY_NATS, roaming_topology
from tests.system.kernel_world import in_kernel
from tests.system.world import (
    FINE_TICK_SECONDS,
    World,
    set_udp_between_hosts,
    simulate,
    topology,
)
from traversal import Node
from traversal.paths.liveness import TICK_SECONDS
from traversal.paths.peer import HEARTBEAT_SECONDS

LIMIT_SECONDS: Final = 15.0
"""What takes longer counts as never."""
LINGER_SECONDS: Final = 1.5
STUN_PORT: Final = 3478
PAIRS: Final = [*itertools.combinations_with_replacement(EASY_NATS, 2)]
NAT: Final = class_behavior("EIM+APDF")

Measured = dict[str, float | None]
"""Seconds by what was measured; None for never."""


@dataclass(frozen=True)
class Row:
    """One measurement, over all tries; times in seconds."""

    where: str
    what: str
    pair: str
    goal_seconds: float
    tries: int
    never: int
    median: float
    p95: float
    worst: float

    @property
    def is_met(self) -> bool:
        return not self.never and self.worst < self.goal_seconds


# ---- what is measured


async def measure_direct(world: World, nodes: list[Node]) -> Measured:
    conversation = await world.introduce(*nodes)
    return {"direct": await _or_never(conversation.until_direct(LIMIT_SECONDS))}


async def measure_death(
    world: World,
    nodes: list[Node],
    set_udp: Callable[[bool], Awaitable[None]],
    phase: random.Random,
) -> Measured:
    conversation = await world.introduce(*nodes)
    await conversation.until_direct(LIMIT_SECONDS)
    await trio.sleep(2 + phase.uniform(0, HEARTBEAT_SECONDS))
    died = trio.current_time()
    await set_udp(False)
    await trio.sleep(6 + phase.uniform(0, HEARTBEAT_SECONDS))
    healed = trio.current_time()
    lost = conversation.lost_seconds(died - TICK_SECONDS, healed - LINGER_SECONDS)
    await set_udp(True)
    took = await _or_never(conversation.until_direct(LIMIT_SECONDS))
    return {"dead": lost, "healed": took}


async def measure_roaming(world: World, nodes: list[Node], phase: random.Random) -> Measured:
    conversation = await world.introduce(*nodes)
    await conversation.until_direct(LIMIT_SECONDS)
    await trio.sleep(2 + phase.uniform(0, HEARTBEAT_SECONDS))
    old = conversation.right.path.address
    moved = trio.current_time()
    world.lab.host("h0").roam("cell")

    async def until_there() -> float:
        await conversation.until(
            lambda: conversation.right.path.address not in (old, None), LIMIT_SECONDS, "the move"
        )
        await conversation.until_direct(LIMIT_SECONDS)
        return trio.current_time() - moved

    took = await _or_never(until_there())
    await trio.sleep(LINGER_SECONDS)
    silence = max(_longest_silence(flow.arrived.values(), moved) for flow in conversation.flows)
    return {"roamed, silence": silence, "roamed, direct": took}


async def _or_never(waiting: Awaitable[float]) -> float | None:
    try:
        return await waiting
    except AssertionError as error:
        print(error, file=sys.stderr)
        return None


def _longest_silence(arrivals: Iterable[float], since: float) -> float:
    times = sorted({since, trio.current_time(), *(at for at in arrivals if at > since)})
    return max(later - earlier for earlier, later in itertools.pairwise(times))


# ---- in the simulated internet


def run_simulated(of: str, seed: int, wire: Wire) -> Measured:
    """One try; `of` is a pair of NATs, `death` or `roaming`."""
    phase = random.Random(seed)

    async def run() -> Measured:
        if of == "roaming":
            lab = roaming_topology(NAT, wire, seed)
        elif of == "death":
            lab = topology(NAT, NAT, seed=seed, wire=wire)
        else:
            lab = topology(*(EASY_NATS[name] for name in of.split(" x ")), seed=seed, wire=wire)
        async with simulate(lab, tick_seconds=FINE_TICK_SECONDS) as world:
            nodes = await world.open_nodes("h0", "h1")
            if of == "roaming":
                return await measure_roaming(world, nodes, phase)
            if of == "death":

                async def set_udp(works: bool) -> None:
                    set_udp_between_hosts(world, "n0", "n1", works=works)

                return await measure_death(world, nodes, set_udp, phase)
            return await measure_direct(world, nodes)

    return trio.run(run, clock=MockClock(autojump_threshold=0))


# ---- in namespaces


async def set_udp_of_hosts(world: World, works: bool) -> None:
    """As `set_udp_between_hosts`, by rules of the hosts themselves."""
    rules = (
        "table inet cut {\nchain input {\ntype filter hook input priority 0;\n"
        f"udp sport != {STUN_PORT} drop\n}}\n}}\n"
    )
    if works:
        rules = "delete table inet cut\n"
    async with trio.open_nursery() as nursery:
        for name in ("h0", "h1"):
            host = world.lab.host(name)
            command = functools.partial(host.run_process, stdin=rules.encode())
            nursery.start_soon(command, ["nft", "-f", "-"])


async def run_in_kernel(of: str, rounds: int, wire: Wire) -> list[tuple[str, Measured]]:
    """All tries of a kind in one lab, with fresh nodes each, one after the other."""
    phase = random.Random(of)
    results: list[tuple[str, Measured]] = []
    names = [name for pair in PAIRS for name in pair]
    lab = topology(*(EASY_NATS[name] for name in names), wire=wire)
    if of == "roaming":
        lab = roaming_topology(NAT, wire)
    elif of == "death":
        lab = topology(NAT, NAT, wire=wire)
    async with in_kernel(lab, FINE_TICK_SECONDS) as world:

        async def attempt(
            left: str, right: str, measure: Callable[[World, list[Node]], Awaitable[Measured]]
        ) -> Measured:
            async with trio.open_nursery() as nursery:
                own = replace(world, nursery=nursery)
                measured = await measure(own, await own.open_nodes(left, right))
                nursery.cancel_scope.cancel()
            return measured

        for _ in range(rounds):
            if of == "roaming":
                measure = functools.partial(measure_roaming, phase=phase)
                results.append((of, await attempt("h0", "h1", measure)))
                world.lab.host("h0").roam("home")
                await trio.sleep(0.5)
            elif of == "death":
                measure = functools.partial(
                    measure_death, set_udp=functools.partial(set_udp_of_hosts, world), phase=phase
                )
                results.append((of, await attempt("h0", "h1", measure)))
            else:
                for number, pair in enumerate(PAIRS):
                    hosts = f"h{2 * number}", f"h{2 * number + 1}"
                    results.append((" x ".join(pair), await attempt(*hosts, measure_direct)))
    return results


def run_jailed(of: str, rounds: int, wire: Wire) -> list[tuple[str, Measured]]:
    def work() -> bytes:
        raise_descriptor_limit()
        return json.dumps(trio.run(run_in_kernel, of, rounds, wire)).encode()

    limit = 60 + rounds * (len(PAIRS) * (LIMIT_SECONDS + 5) if of == "direct" else 60)
    return [(name, one) for name, one in json.loads(call_in_jail(work, timeout_seconds=limit))]


# ---- the run


def summarize(
    where: str, results: Iterable[tuple[str, Measured]], round_trip_seconds: float
) -> Iterator[Row]:
    """A row for each kind of try and what it measured, and one for all pairs together."""
    goals = {
        "direct": 3 * round_trip_seconds + 0.05,
        "dead": 1.0,
        "healed": 3.0,
        "roamed, silence": 1.0,
        "roamed, direct": 3.0,
    }
    values: dict[tuple[str, str], list[float | None]] = {}
    for pair, measured in results:
        for what, value in measured.items():
            values.setdefault((what, pair if what == "direct" else ""), []).append(value)
    direct = [one for (what, _), tries in values.items() if what == "direct" for one in tries]
    if direct:
        values = {("direct", "all pairs"): direct, **values}
    for (what, pair), tries in values.items():
        times = sorted(one for one in tries if one is not None) or [float("nan")]
        yield Row(
            where=where,
            what=what,
            pair=pair,
            goal_seconds=goals[what],
            tries=len(tries),
            never=tries.count(None),
            median=statistics.median(times),
            p95=times[min(len(times) - 1, int(len(times) * 0.95))],
            worst=times[-1],
        )


def print_rows(rows: Iterable[Row], round_trip_seconds: float) -> None:
    print(f"{'':10} {'':17} {'':24} tries  median     95%   worst     goal")
    for row in rows:
        note = "" if row.is_met else f"  MISSED{f', {row.never} never' if row.never else ''}"
        if row.what == "direct":
            trips = row.median / round_trip_seconds, row.worst / round_trip_seconds
            note = f"  {trips[0]:.1f} round trips, worst {trips[1]:.1f}{note}"
        print(
            f"{row.where:10} {row.what:17} {row.pair:24} {row.tries:5} {row.median:7.3f} "
            f"{row.p95:7.3f} {row.worst:7.3f}  < {row.goal_seconds:5.2f} s{note}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument(
        "--seeds",
        type=int,
        default=10,
        help="of each pair in the simulated internet; 5 times that of what else is tried",
    )
    parser.add_argument("--rounds", type=int, default=3, help="in the kernel; 0 for not at all")
    parser.add_argument("--delay", type=float, default=10.0, help="of an uplink, in ms")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    wire = Wire(delay_seconds=options.delay / 1000)
    round_trip = 4 * wire.delay_seconds
    pairs = [" x ".join(pair) for pair in PAIRS]
    simulated = [
        (of, run_simulated(of, seed, wire))
        for of in (*pairs, "death", "roaming")
        for seed in range(options.seeds * (1 if of in pairs else 5))
    ]
    rows = [*summarize("simulated", simulated, round_trip)]
    if options.rounds:
        kernel = [
            one
            for of in ("direct", "death", "roaming")
            for one in run_jailed(of, options.rounds * (1 if of == "direct" else 3), wire)
        ]
        rows += summarize("kernel", kernel, round_trip)
    if options.json:
        print(json.dumps([asdict(row) | {"is_met": row.is_met} for row in rows], indent=2))
    else:
        print(f"{os.cpu_count()} processors, load average {os.getloadavg()[0]:.1f}")
        print_rows(rows, round_trip)
    sys.exit(not all(row.is_met for row in rows if row.where == "simulated"))


if __name__ == "__main__":
    main()
