"""Nodes in a simulated internet: NATs, dying and healing paths, roaming, relays that go away.

Times are virtual: minutes pass in milliseconds.
"""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from netlab.behavior import Hairpin, Mapping, NatBehavior, PortAllocation, PortAssignment
from netlab.behavior import Link as Wire
from netlab.model import Host, Nat, Server, Topology, Uplink
from netlab.simulated import SimulatedInternet
from netlab.simulated.udp import UdpSocket
from tests.system.checks import roaming_topology
from traversal import (
    Link,
    LinkClosedError,
    LinkError,
    Node,
    NodeError,
    NodePrivate,
    PathChange,
    PathKind,
    RelayMap,
    RelayOptions,
    open_node,
)
from traversal.agent.status import nat_status, report_status
from traversal.paths.report import PortAllocation as PortSeries
from traversal.paths.report import PortPattern
from traversal.paths.verdict import describe_nat

EASY = NatBehavior()
HARD = NatBehavior(mapping=Mapping.APDM, ports=PortAllocation(assignment=PortAssignment.RANDOM))
DELAY_SECONDS = 0.01
"""Of each link; a packet passes two, so that every round trip takes 40 ms."""


def topology(*nats: NatBehavior | None, relays: int = 1, seed: int = 1) -> Topology:
    """Hosts h0, h1, ... behind one NAT each (None: on the internet), servers r0, r1, ..."""
    wire = Wire(delay_seconds=DELAY_SECONDS)
    hosts, boxes = [], []
    for number, behavior in enumerate(nats):
        uplink = Uplink(link=wire)
        if behavior is not None:
            uplink = Uplink(network=f"n{number}", link=wire)
            boxes.append(Nat(name=f"n{number}", behavior=behavior))
        hosts.append(Host(name=f"h{number}", uplinks=(uplink,)))
    servers = [Server(name=f"r{number}", link=wire) for number in range(relays)]
    return Topology(hosts=tuple(hosts), servers=tuple(servers), nats=tuple(boxes), seed=seed)


@dataclass
class World:
    """A running internet with relays and nodes."""

    internet: SimulatedInternet
    nursery: trio.Nursery
    relays: list[Any]
    relay_map: RelayMap
    random: random.Random
    nodes: list[Node] = field(default_factory=list)

    @asynccontextmanager
    async def life(self, host: str, key: NodePrivate, **options: Any) -> AsyncIterator[Node]:
        """A node on a host, for the length of the block."""
        async with (
            self.internet.host(host),
            open_node(
                key,
                self.relay_map,
                entropy=self.random.randbytes,
                relay_options=RelayOptions(plain=True),
                map_ports=False,
                admit=lambda _: True,
                **options,
            ) as node,
        ):
            yield node

    async def open(self, host: str, **options: Any) -> Node:
        """A node on a host, open until the test ends."""

        async def run(*, task_status: trio.TaskStatus[Node]) -> None:
            key = NodePrivate.generate(self.random.randbytes)
            async with self.life(host, key, **options) as node:
                task_status.started(node)
                await trio.sleep_forever()

        node: Node = await self.nursery.start(run)
        return node

    async def pair(self, **options: Any) -> tuple[Link, Link]:
        """Nodes on h0 and h1, linked, with one datagram exchanged."""
        a, b = await self.open("h0", **options), await self.open("h1", **options)
        self.nodes += [a, b]
        link = await a.connect(b.public_key, relay=b.home_region)
        await link.send(b"first")
        other = await b.accept()
        assert await other.receive() == b"first"
        await other.send(b"second")
        assert await link.receive() == b"second"
        return link, other


async def until_direct(link: Link) -> None:
    """Send until the path is direct; at most 10 s."""
    with trio.fail_after(10):
        while link.path.kind is not PathKind.DIRECT:
            await link.send(b"look for me")
            await trio.sleep(0.1)


@pytest.fixture
def build(tiny_relay: Callable[..., Any], map_of: Callable[..., RelayMap]) -> Callable[..., Any]:
    """Makes a World of a topology."""

    @asynccontextmanager
    async def world(of: Topology) -> AsyncIterator[World]:
        async with SimulatedInternet(of) as internet, trio.open_nursery() as nursery:
            relays = []
            for server in of.servers:
                relay = tiny_relay(region_id=900 + len(relays), port=443, stun_port=3478)
                relays.append(relay)
                host = internet.host(server.name)
                async with host:
                    await nursery.start(relay.serve, host.addresses[0])
            yield World(internet, nursery, relays, map_of(*relays), random.Random(of.seed))
            nursery.cancel_scope.cancel()

    return world


@dataclass
class Traffic:
    """A datagram each 50 ms in one direction; remembers when each left and came."""

    source: Link
    sink: Link
    sent: dict[int, float] = field(default_factory=dict)
    arrived: dict[int, float] = field(default_factory=dict)
    changes: list[PathChange] = field(default_factory=list)

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._send)
            nursery.start_soon(self._receive)
            nursery.start_soon(self._watch)

    async def _send(self) -> None:
        for number in range(1 << 20):
            self.sent[number] = trio.current_time()
            await self.source.send(number.to_bytes(4, "big") + bytes(96))
            await trio.sleep(0.05)

    async def _receive(self) -> None:
        while True:
            for datagram in await self.sink.receive_many():
                if len(datagram) == 100:
                    number = int.from_bytes(datagram[:4], "big")
                    self.arrived.setdefault(number, trio.current_time())

    async def _watch(self) -> None:
        async for change in self.source.path_changes():
            self.changes.append(change)

    def longest_gap(self, since: float) -> float:
        """The longest time without an arrival after `since`."""
        times = [since, *sorted(t for t in self.arrived.values() if t >= since)]
        return max((b - a for a, b in itertools.pairwise(times)), default=0.0)

    def lost(self, begin: float, end: float) -> int:
        """Datagrams sent between two times that never arrived."""
        return sum(
            begin <= at < end and number not in self.arrived for number, at in self.sent.items()
        )


@asynccontextmanager
async def udp_blocked(
    monkeypatch: pytest.MonkeyPatch, hosts: Sequence[Any] = ()
) -> AsyncIterator[None]:
    """UDP of these hosts (of all, if none is named) vanishes, TCP goes on."""
    original = UdpSocket._send

    def drop(self: UdpSocket, data: Any, remote: Any) -> int:
        if hosts and self._host not in hosts:
            return original(self, data, remote)
        return len(data)

    with monkeypatch.context() as patch:
        patch.setattr(UdpSocket, "_send", drop)
        yield


class TestDirectPath:
    @pytest.mark.parametrize(
        ("here", "there"),
        [(None, None), (None, EASY), (EASY, None), (EASY, EASY), (HARD, None), (None, HARD)],
    )
    async def test_easy_pairs(
        self,
        autojump_clock: MockClock,
        build: Any,
        here: NatBehavior | None,
        there: NatBehavior | None,
    ) -> None:
        """Two nodes are direct in less than three round trips and 50 ms after the introduction."""
        async with build(topology(here, there)) as world:
            a, b = await world.open("h0"), await world.open("h1")
            began = trio.current_time()
            link = await a.connect(b.public_key, relay=b.home_region)
            changes = link.path_changes()
            await link.send(b"first")
            change = await changes.__anext__()
            assert change.new.kind is PathKind.DIRECT
            # The introduction's round trip by the relay passes eight links.
            assert change.at - began < (8 + 3 * 4) * DELAY_SECONDS + 0.05

    async def test_hard_pair_stays_on_the_relay(
        self, autojump_clock: MockClock, build: Any
    ) -> None:
        """Between two hard NATs the relay serves, and the verdict says why."""
        async with build(topology(HARD, HARD, relays=2)) as world:
            link, other = await world.pair()
            traffic = Traffic(link, other)
            world.nursery.start_soon(traffic.run)
            await trio.sleep(20)
            assert link.path.kind is PathKind.RELAY
            assert traffic.lost(0, trio.current_time() - 1) == 0
            assert "both-nats-hard" in [finding.value for finding in link.verdict().findings]

    async def test_classifies_its_nat(self, autojump_clock: MockClock, build: Any) -> None:
        """Two servers are enough to tell an easy NAT from a hard one."""
        async with build(topology(EASY, HARD, None, relays=2)) as world:
            nodes = [await world.open(f"h{number}") for number in range(3)]
            assert [node.nat.is_hard for node in nodes] == [False, True, False]
            assert nodes[2].nat.mapping.name == "NONE"

    async def test_samples_ports(self, autojump_clock: MockClock, build: Any) -> None:
        """How the NAT picks ports and whether it hairpins is known after a full check, outlives
        fresh sockets, and is forgotten on the next network."""
        counting = NatBehavior(
            ports=PortAllocation(assignment=PortAssignment.SEQUENTIAL, step=2),
            hairpin=Hairpin.EXTERNAL,
        )
        async with build(roaming_topology(counting, Wire())) as world:
            node = await world.open("h0")
            report = await node.refresh()
            assert node.nat.ports == report.ports == PortSeries(PortPattern.SEQUENTIAL, 2)
            assert node.nat.hairpins is True
            assert "steps of 2" in describe_nat(node.nat)
            status = nat_status(node.nat)
            assert status["port_pattern"] == "sequential"
            assert status["port_step"] == 2
            assert status["hairpins"] is True
            world.relays[0].mutes_stun = True
            async with world.internet.host("h0"):
                await node.rebind()
            report = await node.refresh()
            assert report.ports.pattern is PortPattern.SEQUENTIAL
            world.internet.host("h0").roam("cell")
            await trio.sleep(5)
            report = await node.refresh()
            assert report.ports.pattern is PortPattern.UNKNOWN
            assert node.nat.hairpins is None


class TestBlockedUdp:
    async def test_works_by_relay_alone(
        self, autojump_clock: MockClock, build: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Without UDP the home is found by HTTPS, and the relay carries everything."""
        async with build(topology(EASY, EASY, relays=2)) as world, udp_blocked(monkeypatch):
            link, other = await world.pair()
            node = world.nodes[0]
            assert not node.report.is_udp_working
            assert set(node.report.latencies) == {900, 901}
            assert node.nat.is_udp_blocked
            traffic = Traffic(link, other)
            world.nursery.start_soon(traffic.run)
            await trio.sleep(10)
            assert link.path.kind is PathKind.RELAY
            assert traffic.lost(0, trio.current_time() - 1) == 0
            assert "udp-blocked-here" in [finding.value for finding in link.verdict().findings]

    async def test_firewall_that_opens(
        self, autojump_clock: MockClock, build: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A firewall lets UDP through at last: the path is direct within 10 s, not only after the
        next periodic check."""
        for blocked_seconds in (8, 11, 17):
            async with build(topology(EASY, EASY)) as world:
                async with udp_blocked(monkeypatch, [world.internet.host("h0")]):
                    link, other = await world.pair()
                    world.nursery.start_soon(Traffic(link, other).run)
                    await trio.sleep(blocked_seconds)
                    assert link.path.kind is PathKind.RELAY
                opened = trio.current_time()
                while link.path.kind is not PathKind.DIRECT:
                    await link.path_changes().__anext__()
                assert trio.current_time() - opened < 10

    @pytest.mark.parametrize("has_portal", [True, False])
    async def test_captive_portal(
        self, autojump_clock: MockClock, build: Any, has_portal: bool
    ) -> None:
        """Where UDP fails and somebody else answers for the relay by HTTP, the verdict tells."""

        async def serve(*, task_status: trio.TaskStatus[None]) -> None:
            with trio.socket.socket() as listener:
                await listener.bind((world.relays[0].host, 80))
                listener.listen(4)
                task_status.started()
                while True:
                    sock, _ = await listener.accept()
                    with sock:
                        request = await sock.recv(4096)
                        challenge = request.partition(b"Challenge: ")[2].split(b"\r\n")[0]
                        answer = b"HTTP/1.1 204 No Content\r\nX-Tailscale-Response: response "
                        answer += challenge
                        if has_portal:
                            answer = b"HTTP/1.1 302 Found\r\nLocation: http://login.example/"
                        await sock.send(answer + b"\r\n\r\n")

        async with build(topology(EASY, EASY)) as world:
            region = world.relay_map.regions[900]
            node = dataclasses.replace(region.nodes[0], can_port_80=True)
            region = dataclasses.replace(region, nodes=(node,))
            world.relay_map = RelayMap({900: region})
            async with world.internet.host("r0"):
                await world.nursery.start(serve)
            sight = await world.open("h0")
            assert sight.report.captive_portal is None, "not asked for while UDP works"
            world.relays[0].mutes_stun = True
            link, _ = await world.pair()
            report = world.nodes[0].report
            assert report.captive_portal is has_portal
            status = report_status(report, world.relay_map, 900)
            assert status["captive_portal"] is has_portal
            findings = [finding.value for finding in link.verdict().findings]
            assert ("captive-portal-here" in findings) is has_portal
            assert ("udp-blocked-here" in findings) is not has_portal

    async def test_no_relay_at_all(self, autojump_clock: MockClock, build: Any) -> None:
        """A node opens within seconds where nothing answers, and finds its home when it does."""
        async with build(topology(EASY)) as world:
            world.internet.host("h0").cut()
            began = trio.current_time()
            node = await world.open("h0")
            assert trio.current_time() - began <= 5.1
            assert not node.report.latencies
            await trio.sleep(15)
            world.internet.host("h0").heal()
            await trio.sleep(20)
            assert node.report.is_udp_working
            assert world.relays[0].homes


class TestSwitching:
    async def test_dead_and_healed_path(
        self, autojump_clock: MockClock, build: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Less than a second of traffic is lost with the path, and 3 s after healing it is used."""
        async with build(topology(EASY, EASY)) as world:
            link, other = await world.pair()
            there, back = Traffic(link, other), Traffic(other, link)
            world.nursery.start_soon(there.run)
            world.nursery.start_soon(back.run)
            await trio.sleep(10)
            assert link.path.kind is other.path.kind is PathKind.DIRECT
            died = trio.current_time()
            async with udp_blocked(monkeypatch):
                await trio.sleep(20)
                assert link.path.kind is PathKind.RELAY
            healed = trio.current_time()
            await trio.sleep(20)
            for traffic in (there, back):
                assert traffic.longest_gap(died) < 1.0
                assert traffic.lost(died + 1.0, healed + 19) == 0
                returns = [c for c in traffic.changes if c.new.kind is PathKind.DIRECT]
                assert returns[-1].at - healed < 3.0

    async def test_one_way_death(
        self, autojump_clock: MockClock, build: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A path that is dead in one direction only is left by both within a second, though the
        sender on the dead side hears the other."""
        async with build(topology(EASY, EASY)) as world:
            link, other = await world.pair()
            there, back = Traffic(link, other), Traffic(other, link)
            world.nursery.start_soon(there.run)
            world.nursery.start_soon(back.run)
            await trio.sleep(10)
            died = trio.current_time()
            async with udp_blocked(monkeypatch, [world.internet.host("h0")]):
                await trio.sleep(10)
                assert there.longest_gap(died) < 1.0
                assert back.lost(died, died + 9) == 0

    async def test_rebooting_nat(self, autojump_clock: MockClock, build: Any) -> None:
        """A NAT that forgets everything costs a second, TCP to the relay included."""
        async with build(topology(EASY, None)) as world:
            link, other = await world.pair()
            traffic = Traffic(link, other)
            world.nursery.start_soon(traffic.run)
            await trio.sleep(10)
            rebooted = trio.current_time()
            world.internet.nat("n0").reboot()
            await trio.sleep(20)
            assert traffic.longest_gap(rebooted) < 1.5
            assert link.path.kind is PathKind.DIRECT

    async def test_roaming(self, autojump_clock: MockClock, build: Any) -> None:
        """Moving to another uplink: traffic again within 1 s, a direct path within 3 s."""
        wire = Wire(delay_seconds=DELAY_SECONDS)
        uplinks = tuple(Uplink(network=f"n{n}", link=wire) for n in range(2))
        moving = Topology(
            hosts=(
                Host(name="h0", uplinks=uplinks),
                Host(name="h1", uplinks=(Uplink(link=wire),)),
            ),
            servers=(Server(name="r0", link=wire),),
            nats=(Nat(name="n0"), Nat(name="n1")),
            seed=1,
        )
        async with build(moving) as world:
            host = world.internet.host("h0")
            host.roam("n0")
            link, other = await world.pair()
            there, back = Traffic(link, other), Traffic(other, link)
            world.nursery.start_soon(there.run)
            world.nursery.start_soon(back.run)
            await trio.sleep(10)
            assert link.path.kind is PathKind.DIRECT
            before = link.path
            moved = trio.current_time()
            host.roam("n1")
            await trio.sleep(15)
            assert there.longest_gap(moved) < 1.0
            assert back.longest_gap(moved) < 1.0
            assert link.path.kind is other.path.kind is PathKind.DIRECT
            assert link.path.address == before.address
            returns = [c for c in back.changes if c.new.kind is PathKind.DIRECT]
            assert returns[-1].at - moved < 3.0


class TestRelays:
    async def test_relay_crash_leaves_a_direct_path_alone(
        self, autojump_clock: MockClock, build: Any
    ) -> None:
        """When the relay drops everybody, the direct path goes on and the relay is found again."""
        async with build(topology(EASY, EASY)) as world:
            link, other = await world.pair()
            traffic = Traffic(link, other)
            world.nursery.start_soon(traffic.run)
            await trio.sleep(10)
            crashed = trio.current_time()
            world.relays[0].drop_clients()
            await trio.sleep(10)
            assert traffic.lost(crashed, crashed + 9) == 0
            assert link.path.kind is PathKind.DIRECT
            assert len(world.relays[0].clients) == 2

    async def test_restarting_relay_loses_nothing(
        self, autojump_clock: MockClock, build: Any
    ) -> None:
        """Told that the relay restarts, nodes move to a new connection before the old one ends."""
        async with build(topology(HARD, HARD)) as world:
            link, other = await world.pair()
            traffic = Traffic(link, other)
            world.nursery.start_soon(traffic.run)
            await trio.sleep(5)
            told = trio.current_time()
            await world.relays[0].say_restarting()
            await trio.sleep(5)
            assert world.relays[0].connects == 4
            assert traffic.lost(told, told + 4) == 0

    async def test_other_regions_are_reached_and_left_when_idle(
        self, autojump_clock: MockClock, build: Any
    ) -> None:
        """A peer at home elsewhere is reached by its region; the connection ends when idle."""
        async with build(topology(HARD, HARD, relays=2)) as world:
            a, b = await world.open("h0"), await world.open("h1")
            away = next(r for r in (900, 901) if r != b.home_region)
            # The peer moved home after we learned where it is.
            b._relays.set_home(away)
            await trio.sleep(1)
            link = await a.connect(b.public_key, relay=away)
            await link.send(b"first")
            other = await b.accept()
            assert await other.receive() == b"first"
            await other.send(b"back")
            assert await link.receive() == b"back"
            link.close()
            other.close()
            await trio.sleep(100)
            connected = [r.region for r in a.statistics().relays if r.is_connected]
            assert connected == [a.home_region]

    async def test_home_is_told_to_the_relay(self, autojump_clock: MockClock, build: Any) -> None:
        """Relays know for whom they are the home."""
        async with build(topology(EASY)) as world:
            node = await world.open("h0")
            await trio.sleep(1)
            assert world.relays[0].homes == {node.public_key.raw: True}


def netmap(node: Node) -> dict[str, Any]:
    """What a control plane tells others of a node."""
    candidates = [address for _, address in node.own_addresses]
    return {"relay": 900, "disco_key": node.disco_key, "candidates": candidates}


class TestControlPlane:
    """What changes while nodes run: the relay map, and what is known of peers."""

    async def test_the_home_is_taken_off_the_map(
        self, autojump_clock: MockClock, build: Any
    ) -> None:
        """Nodes move to another region and tell each other; datagrams flow by it."""
        async with build(topology(HARD, HARD, relays=2)) as world:
            link, other = await world.pair()
            gone = world.nodes[0].home_region
            left = next(r for r in (900, 901) if r != gone)
            regions = {left: world.relay_map.regions[left]}
            for node in world.nodes:
                node.set_relay_map(RelayMap(regions))
            await trio.sleep(6)
            assert [node.home_region for node in world.nodes] == [left, left]
            traffic = Traffic(link, other)
            world.nursery.start_soon(traffic.run)
            await trio.sleep(3)
            assert traffic.lost(trio.current_time() - 2, trio.current_time() - 1) == 0
            assert link.path.region == left
            with pytest.raises(NodeError, match=f"region {gone}"):
                await world.nodes[0].connect(link.peer_key, relay=gone)

    async def test_a_map_may_change_during_a_check(
        self, autojump_clock: MockClock, build: Any
    ) -> None:
        """What was measured of a region that is gone does no harm."""
        async with build(topology(EASY, relays=2)) as world:
            node = await world.open("h0")
            both = world.relay_map
            async with trio.open_nursery() as nursery:
                nursery.start_soon(node.refresh)
                await trio.sleep(0.01)
                node.set_relay_map(RelayMap({900: both.regions[900]}))
            await trio.sleep(6)
            assert node.home_region == 900

    async def test_a_peer_that_started_anew(self, autojump_clock: MockClock, build: Any) -> None:
        """Its new disco key, home and addresses come from the control plane, on both sides."""
        async with build(topology(EASY, EASY)) as world:
            key = NodePrivate.generate(world.random.randbytes)
            a = await world.open("h0")
            scope = trio.CancelScope()

            async def first_life(*, task_status: trio.TaskStatus[Node]) -> None:
                with scope:
                    async with world.life("h1", key) as node:
                        await node.connect(a.public_key, **netmap(a))
                        task_status.started(node)
                        await trio.sleep_forever()

            b = await world.nursery.start(first_life)
            link = await a.connect(b.public_key, **netmap(b))
            await until_direct(link)
            scope.cancel()
            await trio.sleep(1)
            async with world.life("h1", key) as b:
                back = await b.connect(a.public_key, **netmap(a))
                # Whichever suits the agent: ask for the link once more, or update it.
                assert await a.connect(b.public_key, disco_key=b.disco_key) is link
                link.update(relay=900, candidates=netmap(b)["candidates"])
                # The old path counts as direct until traffic shows that nobody is there.
                with trio.fail_after(10):
                    while not back.statistics().received:
                        await link.send(b"look for me")
                        await trio.sleep(0.1)
                await until_direct(link)
                with pytest.raises(LinkError, match="region 77"):
                    link.update(relay=77)

    async def test_a_closed_link_is_not_updated(
        self, autojump_clock: MockClock, build: Any
    ) -> None:
        """It says so."""
        async with build(topology(EASY, EASY)) as world:
            link, _ = await world.pair()
            link.close()
            with pytest.raises(LinkClosedError):
                link.update(relay=900)


class TestIdle:
    async def test_idle_peers_are_silent(self, autojump_clock: MockClock, build: Any) -> None:
        """Some time after the last datagram nothing is sent any more but the relay's keepalives."""
        async with build(topology(EASY, EASY)) as world:
            link, _ = await world.pair()
            await trio.sleep(100)
            packets = len(world.relays[0].packets)
            received = [node.statistics().udp.datagrams_received for node in world.nodes]
            await trio.sleep(600)
            assert len(world.relays[0].packets) == packets
            assert [n.statistics().udp.datagrams_received for n in world.nodes] == received
            assert link.state.value == "idle"

    async def test_comes_back_from_idle(self, autojump_clock: MockClock, build: Any) -> None:
        """After ten minutes of silence, the first datagram arrives and the path is direct again."""
        async with build(topology(EASY, EASY)) as world:
            link, other = await world.pair()
            await trio.sleep(600)
            await link.send(b"again")
            with trio.fail_after(1):
                assert await other.receive() == b"again"
            await trio.sleep(7)
            assert link.path.kind is PathKind.DIRECT
