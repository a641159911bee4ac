"""Nodes, relays and traffic in a running lab, for tests that say what a person would see.

`World` works on either back end: what it needs of a lab is `host(name)`, which is an asynchronous
context manager that puts a task into a host. Tests print the lab times that they measured, on lines
that begin with LAB; a failure shows them, and the seed is in the name of the test or 1.
"""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import trio

from netlab.gate import Gate
from netlab.model import Firewall, Host, Nat, NatBehavior, Server, Topology, Uplink
from netlab.model import Link as Wire
from netlab.simulated import SimulatedInternet
from relay.simulated import OTHER_STUN_PORT, STUN_PORT, SimRelay
from traversal import Link, Node, NodePrivate, PathChange, PathKind, RelayMap, RelayOptions
from traversal import open_node as open_real_node

FIRST_REGION: Final = 900
TICK_SECONDS: Final = 0.05
"""Test traffic: a numbered datagram this often in each direction..."""
FINE_TICK_SECONDS: Final = 0.02
"""... and where lost time is counted."""
DELAY_SECONDS: Final = 0.01
"""Of each host's uplink; relays are in the middle, so that a round trip between two hosts takes
40 ms, directly or by a relay."""
ROUND_TRIP_SECONDS: Final = 4 * DELAY_SECONDS

WIRE: Final = Wire(delay_seconds=DELAY_SECONDS)


def topology(
    *behaviors: NatBehavior | None,
    relays: int = 1,
    relay_addresses: int = 1,
    seed: int = 1,
    wire: Wire = WIRE,
    neighbors: bool = False,
) -> Topology:
    """Hosts h0, h1, ... each behind a NAT n0, n1, ... (None: on the internet), servers r0, ...

    With `neighbors` there is a host x0, x1, ... behind each NAT besides.
    """
    hosts = []
    nats = []
    for number, behavior in enumerate(behaviors):
        uplink = Uplink(link=wire)
        if behavior is not None:
            uplink = Uplink(network=f"n{number}", link=wire)
            nats.append(Nat(name=f"n{number}", behavior=behavior))
        hosts.append(Host(name=f"h{number}", uplinks=(uplink,)))
        if neighbors and behavior is not None:
            hosts.append(Host(name=f"x{number}", uplinks=(uplink,)))
    servers = (Server(name=f"r{number}", addresses=relay_addresses) for number in range(relays))
    return Topology(hosts=tuple(hosts), servers=tuple(servers), nats=tuple(nats), seed=seed)


@dataclass
class World:
    """A running lab. `nursery` ends with the test."""

    lab: Any
    nursery: trio.Nursery
    relay_map: RelayMap
    random: random.Random
    options: dict[str, Any]
    """For every node."""
    tick_seconds: float = TICK_SECONDS
    """How often test traffic leaves."""
    relays: list[SimRelay] = field(default_factory=list)
    """Of the simulated back end; in the kernel the relay is a process."""

    async def open_node(self, host: str, **options: Any) -> Node:
        """A node on a host, open until the test ends."""

        async def run(*, task_status: trio.TaskStatus[Node]) -> None:
            async with (
                self.lab.host(host),
                open_real_node(
                    NodePrivate.generate(self.random.randbytes),
                    self.relay_map,
                    admit=lambda _: True,
                    **{
                        "entropy": self.random.randbytes,
                        "map_ports": False,
                        **self.options,
                        **options,
                    },
                ) as node,
            ):
                task_status.started(node)
                await trio.sleep_forever()

        node: Node = await self.nursery.start(run)
        return node

    async def open_nodes(self, *hosts: str, **options: Any) -> list[Node]:
        """One node on each host, opened side by side."""
        nodes: dict[str, Node] = {}

        async def open_one(host: str) -> None:
            nodes[host] = await self.open_node(host, **options)

        async with trio.open_nursery() as nursery:
            for host in hosts:
                nursery.start_soon(open_one, host)
        return [nodes[host] for host in hosts]

    async def introduce(self, a: Node, b: Node) -> Conversation:
        """Connect `a` to `b` and start traffic both ways.

        Returns when both have introduced themselves, at the very moment.
        """
        link = await a.connect(b.public_key, relay=b.home_region)
        conversation = Conversation(link, self.tick_seconds)
        self.nursery.start_soon(conversation.there.run)
        other = await b.accept()
        conversation.meet(other)
        self.nursery.start_soon(conversation.back.run)
        self.nursery.start_soon(conversation.watch)
        await link._session.wait_for_keys()
        await other._session.wait_for_keys()
        conversation.introduced_at = trio.current_time()
        return conversation

    async def converse(self, *hosts: str, **options: Any) -> Conversation:
        """Nodes on two hosts (h0 and h1 by default) that talk."""
        a, b = await self.open_nodes(*(hosts or ("h0", "h1")), **options)
        return await self.introduce(a, b)


async def make_flows(
    lab: Any, host: str, server: str, per_second: float, generator: random.Random
) -> None:
    """A packet from a fresh socket to a server, again and again, until cancelled."""
    async with lab.host(host):
        while True:
            await trio.sleep(generator.expovariate(per_second))
            with trio.socket.socket(type=trio.socket.SOCK_DGRAM) as sock:
                await sock.sendto(b"flow", (server, 9))


class Flow:
    """Numbered datagrams one way; remembers when each left and when it came first.

    `sink` may be set later than `source` starts.
    """

    def __init__(self, source: Link, tick_seconds: float) -> None:
        self.source = source
        self.sink: Link | None = None
        self.tick_seconds = tick_seconds
        self.sent: list[float] = []
        self.arrived: dict[int, float] = {}
        self.duplicates = 0
        self._has_sink = trio.Event()

    def set_sink(self, sink: Link) -> None:
        self.sink = sink
        self._has_sink.set()

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._receive)
            while True:
                number = len(self.sent)
                self.sent.append(trio.current_time())
                await self.source.send(number.to_bytes(4, "big").ljust(100, b"\xff"))
                await trio.sleep(self.tick_seconds)

    async def _receive(self) -> None:
        await self._has_sink.wait()
        assert self.sink is not None
        while True:
            for datagram in await self.sink.receive_many():
                number = int.from_bytes(datagram[:4], "big")
                if number in self.arrived:
                    self.duplicates += 1
                else:
                    self.arrived[number] = trio.current_time()

    def lost(self, start: float = 0.0, end: float | None = None) -> list[int]:
        """Numbers of those sent from `start` to `end` that have not come; by default those that
        are older than a second."""
        until = trio.current_time() - 1.0 if end is None else end
        return [
            number
            for number, at in enumerate(self.sent)
            if start <= at < until and number not in self.arrived
        ]

    def lost_seconds(self, start: float = 0.0, end: float | None = None) -> float:
        """How much traffic was lost, as time."""
        return len(self.lost(start, end)) * self.tick_seconds


class Conversation:
    """Two links and the traffic between them."""

    def __init__(self, left: Link, tick_seconds: float) -> None:
        self.left = left
        self.right: Link
        self.tick_seconds = tick_seconds
        self.there = Flow(left, tick_seconds)
        self.back: Flow
        self.introduced_at = 0.0
        self.changes: list[PathChange] = []
        self._changed = trio.Event()

    def meet(self, right: Link) -> None:
        """The other end's link is known."""
        self.right = right
        self.there.set_sink(right)
        self.back = Flow(right, self.tick_seconds)
        self.back.set_sink(self.left)

    @property
    def links(self) -> tuple[Link, Link]:
        return self.left, self.right

    @property
    def flows(self) -> tuple[Flow, Flow]:
        return self.there, self.back

    @property
    def kinds(self) -> tuple[PathKind, PathKind]:
        return self.left.path.kind, self.right.path.kind

    def lost_seconds(self, start: float = 0.0, end: float | None = None) -> float:
        """Of the worse direction."""
        return max(flow.lost_seconds(start, end) for flow in self.flows)

    async def watch(self) -> None:
        """Collect the path changes of both links."""
        async with trio.open_nursery() as nursery:
            for link in self.links:
                nursery.start_soon(self._watch, link)

    async def _watch(self, link: Link) -> None:
        async for change in link.path_changes():
            self.changes.append(change)
            self._changed.set()

    async def until(
        self, condition: Callable[[], object], limit_seconds: float, what: str
    ) -> float:
        """Wait for something that a path change brings about; returns how long it took.

        Fails with the verdicts of both sides when it takes more than `limit_seconds`.
        """
        began = trio.current_time()
        with trio.move_on_after(limit_seconds):
            while not condition():
                self._changed = trio.Event()
                await self._changed.wait()
        if not condition():
            raise AssertionError(f"{what} takes more than {limit_seconds} s\n{self.describe()}")
        return trio.current_time() - began

    def describe(self) -> str:
        """Both sides' verdicts and all path changes, for failures."""
        lines = [f"{change.at:.3f} {change.reason}" for change in self.changes]
        return "\n".join([*(link.verdict().text() for link in self.links), *lines])

    async def until_direct(self, limit_seconds: float = 10.0) -> float:
        """Wait until both sides send directly and only so; returns how long it took."""
        return await self.until(
            lambda: self.kinds == (PathKind.DIRECT, PathKind.DIRECT), limit_seconds, "going direct"
        )

    async def until_relayed(self, limit_seconds: float = 10.0) -> float:
        """Wait until both sides send by relay (perhaps by both ways)."""
        return await self.until(
            lambda: self.kinds == (PathKind.RELAY, PathKind.RELAY), limit_seconds, "falling back"
        )


def set_udp_between_hosts(world: World, *nats: str, works: bool) -> None:
    """Break or mend what hosts behind these NATs send by UDP, but for STUN: a direct path dies
    while relays and net checks go on."""
    firewall = Firewall() if works else Firewall(udp_ports=(STUN_PORT, OTHER_STUN_PORT))
    for name in nats:
        world.lab.nat(name).gate = Gate(firewall)


@asynccontextmanager
async def simulate(
    of: Topology,
    *,
    options: dict[str, Any] | None = None,
    record_packets: bool = False,
    tick_seconds: float = TICK_SECONDS,
    make_relay: Callable[..., SimRelay] = SimRelay,
) -> AsyncIterator[World]:
    """The topology in the simulated internet, with a relay on each server."""
    generator = random.Random(f"nodes {of.seed}")
    async with (
        SimulatedInternet(of, record_packets=record_packets) as internet,
        trio.open_nursery() as nursery,
    ):
        relays = []
        for number, name in enumerate(server.name for server in of.servers):
            host = internet.host(name)
            relay = make_relay(FIRST_REGION + number, name, host.addresses, generator)
            async with host:
                await nursery.start(relay.serve)
            relays.append(relay)
        yield World(
            lab=internet,
            nursery=nursery,
            relay_map=RelayMap({relay.region_id: relay.region for relay in relays}),
            random=generator,
            options={"relay_options": RelayOptions(plain=True), **(options or {})},
            relays=relays,
            tick_seconds=tick_seconds,
        )
        nursery.cancel_scope.cancel()
