"""A node with an open port carries what two others cannot send each other directly."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
from trio.testing import MockClock

from netlab.gate import Gate
from netlab.model import Firewall
from netlab.presets import class_behavior
from tests.system.checks import DIRECT, RELAY
from tests.system.world import Conversation, World, simulate, topology
from traversal import Node, PathKind, PeerRelayLimits, PeerRelayOptions
from traversal.paths.verdict import Finding

HARD = class_behavior("APDM+APDF")
EASY = class_behavior("EIM+APDF")
PEER_RELAYED = (PathKind.PEER_RELAY, PathKind.PEER_RELAY)


@asynccontextmanager
async def three(*behaviors: object, **options: object) -> AsyncIterator[tuple[World, list[Node]]]:
    """Nodes on h0 and h1, and one on h2 that is their peer relay; all know each other's keys."""
    async with simulate(topology(*behaviors)) as world:  # type: ignore[arg-type]
        relay = await world.open_node("h2", peer_relay=PeerRelayOptions(**options))  # type: ignore[arg-type]
        a, b = await world.open_nodes("h0", "h1")
        for node in (a, b):
            link = await node.connect(relay.public_key, relay=relay.home_region)
            await link._session.wait_for_keys()
            node.set_peer_relays([relay.public_key])
        yield world, [a, b, relay]


async def until_peer_relayed(conversation: Conversation, limit_seconds: float = 5.0) -> float:
    return await conversation.until(
        lambda: conversation.kinds == PEER_RELAYED, limit_seconds, "going by the peer relay"
    )


async def test_two_hard_nats(autojump_clock: MockClock) -> None:
    """Two nodes that cannot be direct talk by the third, nothing lost; when it dies, by DERP."""
    async with three(HARD, HARD, None) as (world, (a, b, relay)):
        conversation = await world.introduce(a, b)
        took = await until_peer_relayed(conversation)
        print(f"LAB peer relay after {took:.3f}")
        await trio.sleep(10)
        assert conversation.kinds == PEER_RELAYED
        assert conversation.lost_seconds() == 0
        path = conversation.left.path
        assert path.address.host == world.lab.host("h2").addresses[0]
        assert path.latency_seconds < 0.1
        verdict = conversation.left.verdict()
        assert "peer relay" in verdict.text()
        (attempt,) = (a for a in verdict.attempts if a.source == "peer-relay")
        assert relay.public_key.short() in attempt.address
        assert attempt.outcome == "leads to the peer"
        assert attempt.latency_seconds == pytest.approx(path.latency_seconds, rel=0.5)
        statistics = relay.statistics().peer_relay
        assert statistics.open_endpoints == 1
        assert statistics.forwarded_datagrams > 300

        died = trio.current_time()
        world.lab.host("h2").disconnect()
        await conversation.until_relayed(3)
        await trio.sleep(5)
        assert conversation.kinds == RELAY
        lost = conversation.lost_seconds(died - 0.1, trio.current_time() - 0.5)
        print(f"LAB peer relay died, lost {lost:.2f}")
        assert lost < 1.0


async def test_direct_is_preferred(autojump_clock: MockClock) -> None:
    """A pair that can be direct is, though a peer relay answers too."""
    async with three(EASY, EASY, None) as (world, (a, b, _)):
        conversation = await world.introduce(a, b)
        await conversation.until_direct(2)
        await trio.sleep(10)
        assert conversation.kinds == DIRECT
        assert conversation.lost_seconds() == 0


async def test_direct_path_appears_later(autojump_clock: MockClock) -> None:
    """While a peer relay carries the traffic a direct path is looked for, and taken."""
    async with three(EASY, EASY, None, port=4000) as (world, (a, b, _)):
        gate = Gate(Firewall(udp_ports=(3478, 3479, 4000)))
        for name in ("n0", "n1"):
            world.lab.nat(name).gate = gate
        conversation = await world.introduce(a, b)
        await until_peer_relayed(conversation)
        for name in ("n0", "n1"):
            world.lab.nat(name).gate = Gate(Firewall())
        took = await conversation.until_direct(10)
        print(f"LAB from peer relay to direct {took:.2f}")
        await trio.sleep(3)
        assert conversation.lost_seconds() == 0


async def test_roaming_behind_a_peer_relay(autojump_clock: MockClock) -> None:
    """A NAT that forgets its mappings moves the node's leg; the pair is back within 3 s."""
    async with three(HARD, HARD, None) as (world, (a, b, _)):
        conversation = await world.introduce(a, b)
        await until_peer_relayed(conversation)
        await trio.sleep(40)
        since = trio.current_time()
        world.lab.nat("n0").reboot()
        await conversation.until(lambda: conversation.kinds != PEER_RELAYED, 3, "noticing")
        took = await until_peer_relayed(conversation, 3)
        await trio.sleep(2)
        lost = conversation.lost_seconds(since - 0.1, trio.current_time() - 0.5)
        print(f"LAB peer relay after reboot {took:.2f}, lost {lost:.2f}")
        assert lost < 1.0


async def test_the_relay_is_one_of_the_two(autojump_clock: MockClock) -> None:
    """A node whose only open port is that of its peer relay uses it for itself."""
    async with simulate(topology(HARD, None)) as world:
        relay = await world.open_node("h1", peer_relay=PeerRelayOptions(port=4000))
        a = await world.open_node("h0", port=41641)
        world.lab.nat("n0").gate = Gate(Firewall(udp_ports=(3478, 3479, 4000)))
        conversation = await world.introduce(a, relay)
        await until_peer_relayed(conversation)
        await trio.sleep(5)
        assert conversation.lost_seconds() == 0


async def test_not_admitted(autojump_clock: MockClock) -> None:
    """A relay that admits nobody, or has no room, is no harm: DERP carries the traffic."""
    for options in ({"admit": lambda _: False}, {"limits": PeerRelayLimits(endpoints=0)}):
        async with three(HARD, HARD, None, **options) as (world, (a, b, relay)):
            conversation = await world.introduce(a, b)
            await trio.sleep(12)
            assert conversation.kinds == RELAY
            assert conversation.lost_seconds() == 0
            verdict = conversation.left.verdict()
            assert Finding.PEER_RELAYS_FAILED in verdict.findings
            assert f"{relay.public_key.short()} did not answer our request" in verdict.text()
            assert relay.statistics().peer_relay.endpoints == 0


async def test_hostile_datagrams(autojump_clock: MockClock) -> None:
    """Strangers leave no trace at the relay or at its clients, and get no answer."""
    async with three(HARD, HARD, None, None, port=4000) as (world, (a, b, relay)):
        conversation = await world.introduce(a, b)
        await until_peer_relayed(conversation)
        generator = random.Random(9)
        before = relay.statistics().peer_relay
        disco = b._wiring.disco_public.raw
        async with world.lab.host("h3"):
            sock = trio.socket.socket(type=trio.socket.SOCK_DGRAM)
            await sock.bind(("0.0.0.0", 0))
        targets = [(world.lab.host("h2").addresses[0], 4000)]
        targets.append((targets[0][0], relay.statistics().udp.ipv4_port))
        with sock:
            for number in range(300):
                for flags in (b"\0\0", b"\0\x80"):
                    for protocol in (b"\x7a\x11", b"\x7a\x12", b"\0\0"):
                        vni = (number % 3).to_bytes(3, "big")
                        head = flags + protocol + vni + b"\0"
                        forged = b"TS\xf0\x9f\x92\xac" + disco + generator.randbytes(100)
                        for target in targets:
                            await sock.sendto(head + forged, target)
                            await sock.sendto(head + generator.randbytes(number % 50), target)
                await trio.sleep(0.005)
            await trio.sleep(1)
            with trio.move_on_after(1) as silence:
                await sock.recvfrom(2048)
            assert silence.cancelled_caught
        after = relay.statistics().peer_relay
        assert after.endpoints == before.endpoints == 1
        assert after.dropped_datagrams > 1000
        assert conversation.kinds == PEER_RELAYED
        assert conversation.lost_seconds(end=trio.current_time() - 0.5) == 0
        assert not a._peer_relays._servers
        assert not b._peer_relays._servers


async def test_links_that_close_leave_nothing(autojump_clock: MockClock) -> None:
    """Closing links during and after a handshake empties every table."""
    async with three(HARD, HARD, None) as (_, (a, b, _)):
        link = await a.connect(b.public_key, relay=b.home_region)
        for seconds in (0.15, 3.0):
            await link.send(b"hello")
            await trio.sleep(seconds)
            link.close()
            assert not a._peer_relays._servers
            assert not a._peer_relays._by_path
            link = await a.connect(b.public_key, relay=b.home_region)
