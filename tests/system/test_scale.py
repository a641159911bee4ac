"""Many peers, and many strangers: neither costs a node what it does not have."""

from __future__ import annotations

import random
import time
import tracemalloc
from unittest.mock import patch

import trio
from trio.testing import MockClock

from netlab.presets import class_behavior
from tests.kept import count_kept
from tests.system.world import simulate, topology
from traversal import Address, DiscoPrivate, NodePrivate
from traversal.io.udp import Batch
from traversal.paths.candidates import MAX_CANDIDATES
from traversal.reception import Reception

PEERS = 1000
ABSENT_PEERS = 200
HOSTILE_STARTS = (
    b"",
    b"TS\xf0\x9f\x92\xac",
    b"UP\xf0\x9f\x91\x8b",
    b"\0\1\0\0\x21\x12\xa4\x42",
    b"\1\1\0\0\x21\x12\xa4\x42",
    b"\0\0\x7a\x11\0\0\1\0TS\xf0\x9f\x92\xac",
    b"\0\0\x7a\x12\0\0\1\0",
)
"""Disco, introduction, STUN request and response, Geneve with disco and with data."""


async def test_a_thousand_idle_peers(autojump_clock: MockClock) -> None:
    """Peers that were spoken to once are silent after a minute: not one packet, no timer."""
    async with simulate(topology(class_behavior("EIM+APDF"))) as world:
        node = await world.open_node("h0")
        peers = [
            (
                NodePrivate.generate(world.random.randbytes).public(),
                DiscoPrivate.generate(world.random.randbytes).public(),
                Address(f"2.1.{number >> 8}.{number & 255}", 41641),
            )
            for number in range(PEERS)
        ]
        tracemalloc.start()
        before = tracemalloc.get_traced_memory()[0]
        for key, disco_key, address in peers:
            link = await node.connect(key, relay=900, disco_key=disco_key, candidates=[address])
            await link.send(b"hello")
        used = tracemalloc.get_traced_memory()[0] - before
        tracemalloc.stop()
        await trio.sleep(70)
        events, began = world.lab.world.events_run, time.process_time()
        await trio.sleep(120)
        cpu, events = (time.process_time() - began) / 120, world.lab.world.events_run - events
        print(f"LAB idle: {cpu:.3%} of a core, {used / PEERS:.0f} bytes a peer, {events} events")
        assert node.statistics().peers == PEERS
        # The relay's keep-alives and the sweep of its connections are all that goes on.
        assert events < 100
        assert used < 20_000_000


async def test_absent_peers(autojump_clock: MockClock) -> None:
    """Peers that never answer are asked twice a minute each, by the relay."""
    async with simulate(topology(class_behavior("EIM+APDF"))) as world:
        node = await world.open_node("h0")
        for _ in range(ABSENT_PEERS):
            key = NodePrivate.generate(world.random.randbytes).public()
            await node.connect(key, relay=900)
            await trio.sleep(0.02)
        await trio.sleep(60)
        sent, began = node.statistics().relays[0].packets_sent, time.process_time()
        await trio.sleep(60)
        cpu = (time.process_time() - began) / 60
        sent = node.statistics().relays[0].packets_sent - sent
        print(f"LAB absent: {cpu:.2%} of a core, {sent} introductions a minute")
        assert sent <= 2.1 * ABSENT_PEERS


async def test_hostile_datagrams(autojump_clock: MockClock) -> None:
    """Random and malformed datagrams change nothing but counters, and bring no answer."""
    async with simulate(topology(None, None)) as world:
        generator = random.Random(7)
        (node,) = await world.open_nodes("h0")
        statistics = node.statistics()
        target = (world.lab.host("h0").addresses[0], statistics.udp.ipv4_port)
        async with world.lab.host("h1"):
            sock = trio.socket.socket(type=trio.socket.SOCK_DGRAM)
            await sock.bind(("0.0.0.0", 0))
        packets = 0
        with sock:
            for _ in range(40):
                for start in HOSTILE_STARTS:
                    for size in (0, 1, 20, 40, 100, 1400):
                        await sock.sendto(start + generator.randbytes(size), target)
                        packets += 1
                await trio.sleep(0.01)
            await trio.sleep(1)
            with trio.move_on_after(1) as silence:
                await sock.recvfrom(2048)
            assert silence.cancelled_caught
        after = node.statistics()
        assert after.udp.datagrams_received - statistics.udp.datagrams_received >= packets
        assert after.peers == 0
        assert node.links == ()
        assert len(node._wiring.by_address) == len(node._wiring.by_disco) == 0


async def test_hostile_datagrams_to_a_busy_node(autojump_clock: MockClock) -> None:
    """A stranger who forges the peer's address can't break the path or grow what is kept."""
    async with simulate(topology(None, None, None)) as world:
        conversation = await world.converse()
        await conversation.until_direct()
        generator = random.Random(8)
        node_port = conversation.right.path.address.port
        target = (world.lab.host("h0").addresses[0], node_port)
        known = len(conversation.left.statistics().peer.candidates)
        disco = conversation.right._session._wiring.disco_public.raw
        async with world.lab.host("h2"):
            sock = trio.socket.socket(type=trio.socket.SOCK_DGRAM)
            await sock.bind(("0.0.0.0", 0))
        with sock:
            for _ in range(500):
                forged = b"TS\xf0\x9f\x92\xac" + disco + generator.randbytes(100)
                await sock.sendto(forged, target)
                await trio.sleep(0.005)
        await trio.sleep(1)
        assert conversation.lost_seconds(end=trio.current_time() - 0.5) == 0
        assert len(conversation.left.statistics().peer.candidates) == known


async def test_replayed_datagrams(autojump_clock: MockClock) -> None:
    """Everything that a node ever got from its peer, again from 120 addresses: what it
    keeps is bounded, the next search but one forgets it, and the link does not suffer."""
    async with simulate(topology(None, None, None)) as world:
        captured: list[bytes] = []
        handle = Reception.handle_batch

        def capture(reception: Reception, batch: Batch) -> None:
            captured.extend(datagram for datagram, _ in batch)
            handle(reception, batch)

        with patch.object(Reception, "handle_batch", capture):
            node, other = await world.open_nodes("h0", "h1")
            conversation = await world.introduce(node, other)
            await conversation.until_direct()
            await trio.sleep(6)
            recorded = [one for one in captured if not one.endswith(b"\xff")]
            assert 10 < len(recorded) < 1000
            before, tasks = count_kept(node), trio.lowlevel.current_statistics().tasks_living
            path = conversation.left.path
            conversation.changes.clear()
            began = trio.current_time()
            target = (world.lab.host("h0").addresses[0], conversation.right.path.address.port)
            most = 0
            for _ in range(120):
                async with world.lab.host("h2"):
                    with trio.socket.socket(type=trio.socket.SOCK_DGRAM) as sock:
                        await sock.bind(("0.0.0.0", 0))
                        for datagram in recorded:
                            await sock.sendto(datagram, target)
                await trio.sleep(0.02)
                most = max(most, count_kept(node))
            assert most <= before + 10 * MAX_CANDIDATES
            assert most > before + MAX_CANDIDATES
            await trio.sleep(45 + 60)
        assert conversation.lost_seconds(began) == 0, conversation.describe()
        assert [change.reason for change in conversation.changes] == []
        assert conversation.left.path.address == path.address
        assert count_kept(node) <= before + 20
        assert trio.lowlevel.current_statistics().tasks_living == tasks
