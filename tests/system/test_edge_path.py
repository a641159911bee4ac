"""Nodes that reach each other only by the edge tunnel; the tunnel is a model of 30 ms here."""

from __future__ import annotations

from collections import deque

import pytest
import trio
from trio.testing import MockClock

from netlab.gate import Gate
from netlab.model import Firewall
from netlab.presets import class_behavior
from tests.system.checks import DIRECT, RELAY
from tests.system.world import Conversation, World, simulate, topology
from traversal import Node, PathKind

EASY = class_behavior("EIM+APDF")
HARD = class_behavior("APDM+APDF")
EDGE = (PathKind.EDGE, PathKind.EDGE)
NOTHING = Gate(Firewall(udp_ports=(), tcp_ports=()))
DELAY_SECONDS = 0.03


class ModelEdge:
    """Carries packets between the nodes that joined, by key."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery
        self.nodes: dict[bytes, Node] = {}
        self.carried = 0
        self._under_way: deque[tuple[bytes, bytes, bytes]] = deque()

    def join(self, node: Node) -> ModelTunnel:
        tunnel = ModelTunnel(self, node)
        self.nodes[node.public_key.raw] = node
        node._wiring.edge = tunnel
        node._reception.handle_edge_change(is_up=True)
        return tunnel

    def carry(self, source: bytes, destination: bytes, payload: bytes) -> None:
        self._under_way.append((source, destination, payload))
        self._nursery.start_soon(self._deliver)

    async def _deliver(self) -> None:
        await trio.sleep(DELAY_SECONDS)
        # Tasks that wake at the same time run in any order; a tunnel keeps its own.
        source, destination, payload = self._under_way.popleft()
        if destination in self.nodes and source in self.nodes:
            self.carried += 1
            self.nodes[destination]._reception.handle_edge_packet(source, payload)


class ModelTunnel:
    max_payload_bytes = 1200

    def __init__(self, edge: ModelEdge, node: Node) -> None:
        self._edge, self._node = edge, node

    @property
    def is_connected(self) -> bool:
        return self._node.public_key.raw in self._edge.nodes

    def send(self, destination: bytes, payload: bytes) -> bool:
        if not self.is_connected or len(payload) > self.max_payload_bytes:
            return False
        source = self._node.public_key.raw
        self._edge.carry(source, destination, payload)
        return True

    def cut(self) -> None:
        del self._edge.nodes[self._node.public_key.raw]
        self._node._reception.handle_edge_change(is_up=False)


def close_gates(world: World, *, are_open: bool = False) -> None:
    for name in ("n0", "n1"):
        world.lab.nat(name).gate = Gate(Firewall()) if are_open else NOTHING


async def until_edge(conversation: Conversation, limit_seconds: float) -> float:
    return await conversation.until(
        lambda: conversation.kinds == EDGE, limit_seconds, "going by the edge"
    )


async def test_neither_udp_nor_derp(autojump_clock: MockClock) -> None:
    """Firewalls that let nothing but the tunnel out: the nodes introduce themselves by the edge and
    talk by it; once the firewalls open, the path is direct and nothing was lost."""
    async with simulate(topology(EASY, EASY)) as world:
        close_gates(world)
        edge = ModelEdge(world.nursery)
        a, b = await world.open_nodes("h0", "h1")
        edge.join(a)
        edge.join(b)
        conversation = await world.introduce(a, b)
        took = await until_edge(conversation, 3)
        print(f"LAB edge after {took:.3f}")
        await trio.sleep(10)
        assert conversation.kinds == EDGE
        assert conversation.lost_seconds() == 0
        path = conversation.left.path
        assert (path.address, path.mtu_bytes) == (None, 1200)
        assert path.latency_seconds == pytest.approx(2 * DELAY_SECONDS, abs=0.01)
        assert "edge" in conversation.left.verdict().text()
        close_gates(world, are_open=True)
        took = await conversation.until_direct(12)
        print(f"LAB from edge to direct {took:.2f}")
        await trio.sleep(3)
        assert conversation.lost_seconds() == 0


async def test_derp_goes_and_comes(autojump_clock: MockClock) -> None:
    """Two hard NATs: when DERP dies the edge carries on, when it is back DERP does."""
    async with simulate(topology(HARD, HARD)) as world:
        edge = ModelEdge(world.nursery)
        a, b = await world.open_nodes("h0", "h1")
        edge.join(a)
        edge.join(b)
        conversation = await world.introduce(a, b)
        await trio.sleep(5)
        assert conversation.kinds == RELAY
        assert edge.carried == 0
        since = trio.current_time()
        relay = world.relays[0]
        relay.stop()
        await until_edge(conversation, 5)
        await trio.sleep(5)
        lost = conversation.lost_seconds(since - 0.1, trio.current_time() - 0.5)
        print(f"LAB DERP died, lost {lost:.2f}")
        assert lost < 1
        async with world.lab.host("r0"):
            await world.nursery.start(relay.serve)
        await conversation.until_relayed(20)
        await trio.sleep(5)
        assert conversation.kinds == RELAY


async def test_one_side_loses_derp(autojump_clock: MockClock) -> None:
    """Only one node's way to DERP is closed: both use the edge, the other being told that its peer
    is gone from the relay."""
    async with simulate(topology(HARD, HARD)) as world:
        edge = ModelEdge(world.nursery)
        a, b = await world.open_nodes("h0", "h1")
        edge.join(a)
        edge.join(b)
        conversation = await world.introduce(a, b)
        await trio.sleep(5)
        since = trio.current_time()
        world.lab.nat("n0").gate = NOTHING
        world.lab.nat("n0").reboot()
        await until_edge(conversation, 130)
        print(f"LAB one side by the edge after {trio.current_time() - since:.2f}")
        await trio.sleep(5)
        assert conversation.kinds == EDGE
        world.lab.nat("n0").gate = Gate(Firewall())
        await conversation.until_relayed(40)


async def test_the_tunnel_dies(autojump_clock: MockClock) -> None:
    """Without a tunnel the node is where it was: by DERP as soon as that works."""
    async with simulate(topology(EASY, EASY)) as world:
        edge = ModelEdge(world.nursery)
        a, b = await world.open_nodes("h0", "h1")
        tunnel = edge.join(a)
        edge.join(b)
        conversation = await world.introduce(a, b)
        await conversation.until_direct()
        tunnel.cut()
        await trio.sleep(3)
        assert conversation.kinds == DIRECT
        assert conversation.lost_seconds() == 0
