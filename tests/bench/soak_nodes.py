"""Hours of bad network for three nodes, in virtual time: `python -m tests.bench.soak_nodes`.

Three nodes behind easy NATs talk with each other in the simulated internet, four datagrams a second
each way, while one misfortune follows another, chosen by the seed: moves to another uplink, cables
that are out, UDP that dies between nodes or altogether, relays that die with and without notice,
NATs that reboot or get another address, lossy links, silence for minutes; sometimes two at a time.
Checked all the while:

* whenever some path exists for two nodes, by a relay or directly, then from a few seconds after the
  last change of the network on (`SETTLED_SECONDS`) not one datagram between them is lost, but
  where links lose them by themselves;
* where UDP works, both are direct by then;
* by then a path changes no more, but for a direct one that is found;
* what the nodes keep does not grow: tables, tasks, memory.

How long it takes until nothing is lost any more is told by misfortune. Exit status 1 if something
is not as it should be; the same seed gives the same run.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import random
import statistics
import sys
import time
from collections import deque
from dataclasses import asdict, dataclass, field, replace
from typing import Final

import trio
from trio.testing import MockClock

from netlab.gate import Gate
from netlab.model import Firewall, Host, Nat, Server, Topology, Uplink
from netlab.presets import class_behavior
from relay.simulated import OTHER_STUN_PORT, STUN_PORT
from tests.kept import count_kept
from tests.system.world import WIRE, World, simulate
from traversal import Link, Node, PathKind

HOSTS: Final = ("h0", "h1", "h2")
CLASSES: Final = ("EIM+EIF", "EIM+ADF", "EIM+APDF")
TICK_SECONDS: Final = 0.25
GRACE_SECONDS: Final = 1.0
"""A datagram that takes longer is lost."""
MIN_PHASE_SECONDS: Final = 25.0
MAX_PHASE_SECONDS: Final = 60.0
MAX_SILENCE_SECONDS: Final = 400.0
MAX_LATE_CHANGES: Final = 2
"""One of each side: a direct path is found late."""
SETTLED_SECONDS: Final = 4.0
SETTLED_WITHOUT_RELAY_SECONDS: Final = 20.0
"""With only a relay left between two nodes, and that relay gone: the other one is found by a net
check, and its region told."""
WARM_UP_EPISODES: Final = 10
MAX_PROBLEMS: Final = 10
MAX_GROWTH: Final = 0.2
"""Of what is kept, by count: at any moment some pings are out and some candidates are ageing."""


def topology(seed: int) -> Topology:
    """Each host has a home uplink and another, to a NAT each."""
    generator = random.Random(f"soak {seed}")
    names = [f"{kind}{number}" for number in range(len(HOSTS)) for kind in ("home", "cell")]
    return Topology(
        hosts=tuple(
            Host(
                name=name,
                uplinks=(
                    *(Uplink(network=f"{kind}{number}", link=WIRE) for kind in ("home", "cell")),
                ),
            )
            for number, name in enumerate(HOSTS)
        ),
        nats=tuple(
            Nat(name=name, behavior=class_behavior(generator.choice(CLASSES))) for name in names
        ),
        servers=(Server(name="r0"), Server(name="r1")),
        seed=seed,
    )


@dataclass(frozen=True)
class Kept:
    """What there is at one moment: entries of the nodes' tables, tasks of everything, and objects
    of classes of ours."""

    entries: int
    tasks: int
    objects: int


def count_objects() -> int:
    gc.collect()
    return sum(str(type(one).__module__).startswith("traversal") for one in gc.get_objects())


class Stream:
    """Datagrams one way: those that are lost in this phase."""

    def __init__(self, source: Link, sink: Link) -> None:
        self.source, self.sink = source, sink
        self.is_paused = False
        self.lost: list[float] = []
        self.count = 0
        self._pending: dict[int, float] = {}

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._receive)
            while True:
                if not self.is_paused:
                    self.count += 1
                    self._pending[self.count] = trio.current_time()
                    await self.source.send(bytes(4) + self.count.to_bytes(4, "big") + bytes(92))
                self._sweep()
                await trio.sleep(TICK_SECONDS)

    async def _receive(self) -> None:
        while True:
            for datagram in await self.sink.receive_many():
                self._pending.pop(int.from_bytes(datagram[4:8], "big"), None)

    def _sweep(self) -> None:
        now = trio.current_time()
        for number, at in list(self._pending.items()):
            if now - at < GRACE_SECONDS:
                return
            del self._pending[number]
            self.lost.append(at)


@dataclass
class Pair:
    """Two nodes and what flows between them."""

    names: tuple[str, str]
    links: tuple[Link, Link]
    streams: tuple[Stream, Stream]
    changes: deque[tuple[float, str, PathKind]] = field(default_factory=lambda: deque(maxlen=500))

    @property
    def is_direct(self) -> bool:
        return all(link.path.kind is PathKind.DIRECT for link in self.links)

    async def watch(self, link: Link) -> None:
        async for change in link.path_changes():
            self.changes.append((change.at, change.reason, change.new.kind))


@dataclass
class Network:
    """What is wrong with the network now; tells what should work nevertheless."""

    world: World
    uplinks: dict[str, str]
    cut: set[str] = field(default_factory=set)
    without_peers: set[str] = field(default_factory=set)
    without_udp: set[str] = field(default_factory=set)
    lossy: set[str] = field(default_factory=set)
    relays_down: set[int] = field(default_factory=set)
    idle: bool = False

    def gate(self, host: str) -> None:
        """Let through what is not forbidden now, on both uplinks."""
        firewall = Firewall()
        if host in self.without_udp:
            firewall = Firewall(udp_ports=())
        elif host in self.without_peers:
            firewall = Firewall(udp_ports=(STUN_PORT, OTHER_STUN_PORT))
        for kind in ("home", "cell"):
            self.world.lab.nat(f"{kind}{host[1:]}").gate = Gate(firewall)

    def can_reach(self, pair: Pair) -> bool:
        return not self.cut & set(pair.names) and len(self.relays_down) < len(self.world.relays)

    def can_be_direct(self, pair: Pair) -> bool:
        bad = self.cut | self.without_peers | self.without_udp | self.lossy
        return not bad & set(pair.names)

    async def start_relay(self, number: int) -> None:
        async with self.world.lab.host(f"r{number}"):
            await self.world.nursery.start(self.world.relays[number].serve)
        self.relays_down.discard(number)


MISFORTUNES: Final = (
    "move", "cut", "UDP dies between nodes", "UDP dies", "relay dies", "relay restarts",
    "both relays die", "NAT reboots", "NAT gets another address", "loss", "silence",
)  # fmt: skip
LASTING: Final = {"cut", "UDP dies between nodes", "UDP dies", "relay dies", "both relays die"} | {
    "loss",
    "silence",
}
ALONE: Final = {"both relays die", "silence"}


class Soak:
    """One run."""

    def __init__(self, world: World, seed: int) -> None:
        self._world = world
        self._rng = random.Random(f"misfortunes {seed}")
        self._network = Network(world, dict.fromkeys(HOSTS, "home"))
        self._nodes: dict[str, Node] = {}
        self._pairs: list[Pair] = []
        self._renumbered = 0
        self.recoveries: dict[str, list[float]] = {}
        self.problems: list[str] = []
        self.episodes = 0
        self.kept: list[Kept] = []
        """From the end of the warm-up on."""

    @property
    def sent(self) -> int:
        """How many datagrams."""
        return sum(stream.count for pair in self._pairs for stream in pair.streams)

    async def run(self, hours: float) -> None:
        nodes = await self._world.open_nodes(*HOSTS)
        self._nodes = dict(zip(HOSTS, nodes, strict=True))
        for names in itertools.combinations(HOSTS, 2):
            await self._introduce(names)
        await self._phase("the beginning")
        end = trio.current_time() + hours * 3600
        while trio.current_time() < end and len(self.problems) < MAX_PROBLEMS:
            await self._episode()
            self.episodes += 1
            if self.episodes >= WARM_UP_EPISODES:
                self.kept.append(self._count())
        self._check_growth()

    def _count(self) -> Kept:
        return Kept(
            entries=sum(count_kept(node) for node in self._nodes.values()),
            tasks=trio.lowlevel.current_statistics().tasks_living,
            objects=count_objects(),
        )

    def _check_growth(self) -> None:
        """Compare medians of the first and the last tenth."""
        size = len(self.kept) // 10
        if size < 3:
            return
        for name in ("entries", "tasks", "objects"):
            first, last = (
                statistics.median(getattr(one, name) for one in part)
                for part in (self.kept[:size], self.kept[-size:])
            )
            if last > first * (1 + MAX_GROWTH):
                self.problems.append(f"{name} grew from {first:.0f} to {last:.0f}")

    async def _introduce(self, names: tuple[str, str]) -> None:
        one, other = (self._nodes[name] for name in names)
        link = await one.connect(other.public_key, relay=other.home_region)
        back = await other.accept()
        pair = Pair(names, (link, back), (Stream(link, back), Stream(back, link)))
        for stream in pair.streams:
            self._world.nursery.start_soon(stream.run)
        for end in pair.links:
            self._world.nursery.start_soon(pair.watch, end)
        self._pairs.append(pair)

    # ---- misfortunes

    async def _episode(self) -> None:
        """Something happens, lasts, and ends."""
        chosen = [self._rng.choice(MISFORTUNES)]
        if chosen[0] not in ALONE and self._rng.random() < 0.3:
            second = self._rng.choice([one for one in MISFORTUNES if one not in {*ALONE, *chosen}])
            chosen.append(second)
        hosts = [self._rng.choice(HOSTS) for _ in chosen]
        for what, host in zip(chosen, hosts, strict=True):
            await self._begin(what, host)
        await self._phase(" and ".join(chosen))
        if lasting := [what for what in chosen if what in LASTING]:
            for what, host in zip(chosen, hosts, strict=True):
                await self._end(what, host)
            await self._phase("the end of: " + " and ".join(lasting))

    async def _begin(self, what: str, host: str) -> None:
        network, lab, rng = self._network, self._world.lab, self._rng
        uplink = f"{network.uplinks[host]}{host[1:]}"
        match what:
            case "move":
                network.uplinks[host] = "cell" if network.uplinks[host] == "home" else "home"
                lab.host(host).roam(f"{network.uplinks[host]}{host[1:]}")
            case "cut":
                lab.host(host).cut()
                network.cut.add(host)
            case "UDP dies between nodes":
                network.without_peers.add(host)
                network.gate(host)
            case "UDP dies":
                network.without_udp.add(host)
                network.gate(host)
            case "relay dies" | "both relays die":
                for number in (0, 1) if what == "both relays die" else (rng.randrange(2),):
                    self._world.relays[number].stop()
                    network.relays_down.add(number)
            case "relay restarts":
                number = rng.randrange(2)
                if number not in network.relays_down:
                    if rng.random() < 0.5:
                        self._world.relays[number].say_restarting(500)
                        await trio.sleep(0.2)
                    self._world.relays[number].stop()
                    await trio.sleep(0.3)
                    await network.start_relay(number)
            case "NAT reboots":
                lab.nat(uplink).reboot()
            case "NAT gets another address":
                self._renumbered += 1
                lab.nat(uplink).renumber((bytes((2, 9, *divmod(self._renumbered, 250))),))
            case "loss":
                network.lossy.add(host)
                self._set_loss(host, rng.choice((0.02, 0.2)))
            case "silence":
                for pair in self._pairs:
                    for stream in pair.streams:
                        stream.is_paused = True

    async def _end(self, what: str, host: str) -> None:
        network, lab = self._network, self._world.lab
        match what:
            case "cut":
                lab.host(host).heal()
                network.cut.discard(host)
            case "UDP dies between nodes" | "UDP dies":
                network.without_peers.discard(host)
                network.without_udp.discard(host)
                network.gate(host)
            case "relay dies" | "both relays die":
                for number in sorted(network.relays_down):
                    await network.start_relay(number)
            case "loss":
                network.lossy.discard(host)
                self._set_loss(host, 0.0)
            case "silence":
                for pair in self._pairs:
                    for stream in pair.streams:
                        stream.is_paused = False

    def _set_loss(self, host: str, loss: float) -> None:
        for interface in self._world.lab.host(host).interfaces:
            for direction in (interface.attachment.up, interface.attachment.down):
                direction.link = replace(WIRE, loss=loss)

    # ---- checks

    async def _phase(self, name: str) -> None:
        """Let time pass, and judge it."""
        began = trio.current_time()
        was_direct = [pair.is_direct for pair in self._pairs]
        for pair in self._pairs:
            pair.changes.clear()
            for stream in pair.streams:
                stream.lost.clear()
        longest = MAX_SILENCE_SECONDS if "silence" in name else MAX_PHASE_SECONDS
        await trio.sleep(self._rng.uniform(MIN_PHASE_SECONDS, longest))
        worst = 0.0
        for pair, had_direct in zip(self._pairs, was_direct, strict=True):
            if self._network.can_reach(pair) or (had_direct and self._network.can_be_direct(pair)):
                worst = max(worst, self._judge(pair, name, began))
        self.recoveries.setdefault(name, []).append(worst)

    def _judge(self, pair: Pair, name: str, began: float) -> float:
        """Returns how long after the beginning the last datagram was lost that was sent then."""
        network = self._network
        if network.lossy & set(pair.names):
            return 0.0
        settled = SETTLED_SECONDS
        if network.relays_down or "relay" in name:
            settled = SETTLED_WITHOUT_RELAY_SECONDS
        lost = [at for stream in pair.streams for at in stream.lost if at >= began]
        took = max(lost, default=began) - began
        if took > settled:
            self._complain(pair, name, f"a datagram is lost after {took:.1f} s")
        if "silence" in name:
            return took
        if network.can_be_direct(pair) and not pair.is_direct:
            self._complain(pair, name, "not direct")
        late = [kind for at, _, kind in pair.changes if at > began + settled]
        if len(late) > MAX_LATE_CHANGES:
            self._complain(pair, name, f"{len(late)} changes of path after {settled:.0f} s")
        return took

    def _complain(self, pair: Pair, name: str, what: str) -> None:
        now = trio.current_time()
        lines = [f"at {now:.1f}, {' and '.join(pair.names)}, {name}: {what}"]
        lines += [f"    {at:.2f} {kind.value}: {reason}" for at, reason, kind in pair.changes]
        lines += ["    " + link.verdict().text().replace("\n", "\n    ") for link in pair.links]
        self.problems.append("\n".join(lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--hours", type=float, default=2.0, help="of virtual time")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()

    async def run() -> Soak:
        async with simulate(topology(options.seed)) as world:
            soak = Soak(world, options.seed)
            await soak.run(options.hours)
            return soak

    began = time.process_time()
    soak = trio.run(run, clock=MockClock(autojump_threshold=0))
    took = time.process_time() - began
    if options.json:
        shown = {
            "episodes": soak.episodes,
            "datagrams": soak.sent,
            "recoveries": soak.recoveries,
            "kept": [asdict(one) for one in soak.kept],
            "problems": soak.problems,
        }
        print(json.dumps(shown, indent=2))
    else:
        print(f"{soak.episodes} misfortunes, {soak.sent} datagrams, {took:.0f} s of processor time")
        together = "two at a time"
        rows: dict[str, list[float]] = {}
        for name, times in soak.recoveries.items():
            rows.setdefault(together if " and " in name else name, []).extend(times)
        print(f"{'lost until, in seconds after':40} count  median   worst")
        for name, times in sorted(rows.items()):
            print(f"{name:40} {len(times):5} {statistics.median(times):7.2f} {max(times):7.2f}")
        if soak.kept:
            print(f"kept after the warm-up {soak.kept[0]}, at the end {soak.kept[-1]}")
        print("\n".join(soak.problems) or "Nothing is wrong.")
    sys.exit(bool(soak.problems))


if __name__ == "__main__":
    main()
