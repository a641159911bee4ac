"""Nodes that talk to each other on loopback, by a real relay and by a tiny one."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from ipaddress import ip_network
from typing import Any

import pytest
import trio
import trio.testing

from relay.config import Config
from relay.map_entry import build_map
from relay.server import serve
from traversal import (
    Address,
    DiscoPrivate,
    InterfaceFilter,
    KeyFormatError,
    Link,
    LinkClosedError,
    LinkError,
    Node,
    NodeError,
    NodePrivate,
    NodePublic,
    PathKind,
    RelayMap,
    RelayOptions,
    open_node,
)
from traversal.paths.verdict import Finding, Remedy
from traversal.wire.disco import Ping

ON_LOOPBACK: dict[str, Any] = {
    "hosts": {4: "127.0.0.1"},
    "interfaces": InterfaceFilter(allowed_names=("lo",)),
    "map_ports": False,
}
RELAY_ONLY: dict[str, Any] = {
    **ON_LOOPBACK,
    "interfaces": InterfaceFilter(
        allowed_names=("lo",), denied_networks=(ip_network("127.0.0.0/8"),)
    ),
}


HOSTILE_STARTS = (
    b"",
    b"TS\xf0\x9f\x92\xac",
    b"\0\1\0\0\x21\x12\xa4\x42",
    b"\1\1\0\0\x21\x12\xa4\x42",
    b"\0\0\x7a\x11\0\0\1\0TS\xf0\x9f\x92\xac",
    b"\0\0\x7a\x12\0\0\1\0",
)
"""Disco, STUN request and response, Geneve with disco and with data."""


async def until(condition: Callable[[], object]) -> None:
    with trio.fail_after(5):
        while not condition():  # noqa: ASYNC110  # nothing signals what is waited for
            await trio.sleep(0.005)


def everybody(_: NodePublic) -> bool:
    return True


def new_key() -> NodePrivate:
    return NodePrivate.generate(os.urandom)


@pytest.fixture
async def relay(nursery: trio.Nursery, tiny_relay: Callable[[], Any]) -> Any:
    """A tiny relay that serves."""
    relay = tiny_relay()
    await nursery.start(relay.serve)
    return relay


@pytest.fixture
def relay_map(relay: Any, map_of: Callable[..., RelayMap]) -> RelayMap:
    return map_of(relay)


@asynccontextmanager
async def node_on(relay_map: RelayMap, **options: Any) -> AsyncIterator[Node]:
    options = {**ON_LOOPBACK, "relay_options": RelayOptions(plain=True), **options}
    async with open_node(options.pop("key", None) or new_key(), relay_map, **options) as node:
        yield node


async def until_direct(*links: Link) -> None:
    with trio.fail_after(5):
        for link in links:
            changes = link.path_changes()
            while link.path.kind is not PathKind.DIRECT:
                await changes.__anext__()


class TestConversation:
    async def test_by_a_real_relay(self, nursery: trio.Nursery) -> None:
        """With our own relay: TLS with a pin, fast start, STUN, and then a direct path."""
        config = Config.dev()
        bound = await nursery.start(serve, config, lambda: config)
        relay_map = build_map(
            config,
            derp_port=bound.derp[0][1],
            stun_port=bound.stun[0][1],
            can_port_80=False,
            pin=bound.pin,
        )
        async with (
            open_node(new_key(), relay_map, **ON_LOOPBACK) as a,
            open_node(new_key(), relay_map, admit=everybody, **ON_LOOPBACK) as b,
        ):
            link = await a.connect(b.public_key, relay=b.home_region)
            await link.send(b"to b")
            with trio.fail_after(5):
                other = await b.accept()
                assert await other.receive() == b"to b"
                await other.send(b"to a")
                assert await link.receive() == b"to a"
            await until_direct(link, other)
            assert link.path.address in [address for _, address in b.own_addresses]

    async def test_introduces_itself_and_finds_a_direct_path(self, relay_map: RelayMap) -> None:
        """A node key and a region are enough, and no datagram is lost when the path changes."""
        async with node_on(relay_map) as a, node_on(relay_map, admit=everybody) as b:
            link = await a.connect(b.public_key, relay=900)
            received: list[bytes] = []
            await link.send(b"0")
            other = await b.accept()
            assert other.peer_key == a.public_key
            await other.send(b"hello")
            for number in range(1, 100):
                await link.send(b"%d" % number)
            await until_direct(link, other)
            await link.send(b"100")
            with trio.fail_after(5):
                while len(set(received)) < 101:
                    received += await other.receive_many()
            assert set(received) == {b"%d" % number for number in range(101)}

    async def test_with_keys_from_a_control_plane(self, relay: Any, relay_map: RelayMap) -> None:
        """Peers whose disco keys are known exchange no introductions."""
        a_key, b_key = new_key(), new_key()
        a_disco, b_disco = DiscoPrivate.generate(os.urandom), DiscoPrivate.generate(os.urandom)
        async with (
            node_on(relay_map, key=a_key, disco_key=a_disco) as a,
            node_on(relay_map, key=b_key, disco_key=b_disco) as b,
        ):
            link = await a.connect(b.public_key, relay=900, disco_key=b_disco.public())
            other = await b.connect(a.public_key, relay=900, disco_key=a_disco.public())
            await link.send(b"one")
            with trio.fail_after(5):
                assert await other.receive() == b"one"
            await other.send(b"two")
            await until_direct(link, other)
        assert not [p for _, _, p in relay.packets if p.startswith(b"UP\xf0\x9f")]

    async def test_relay_only(self, relay_map: RelayMap) -> None:
        """Where no address may be pinged, the relay carries everything."""
        async with (
            node_on(relay_map, **RELAY_ONLY) as a,
            node_on(relay_map, admit=everybody, **RELAY_ONLY) as b,
        ):
            link = await a.connect(b.public_key, relay=900)
            await link.send(b"x")
            other = await b.accept()
            for _ in range(20):
                await other.send(b"ping")
                assert await link.receive() == b"ping"
            assert link.path.kind is PathKind.RELAY
            assert link.path.region == 900
            assert "relay" in link.verdict().text()

    async def test_both_call_at_once(self, relay_map: RelayMap) -> None:
        """Two nodes that connect to each other share one link, and nothing waits in `accept`."""
        async with (
            node_on(relay_map, admit=everybody) as a,
            node_on(relay_map, admit=everybody) as b,
        ):
            link = await a.connect(b.public_key, relay=900)
            other = await b.connect(a.public_key, relay=900)
            await link.send(b"one")
            await other.send(b"two")
            with trio.fail_after(5):
                assert await other.receive() == b"one"
                assert await link.receive() == b"two"
            assert await b.connect(a.public_key, relay=900) is other
            assert a.links == (link,)

    async def test_many_datagrams_in_one_call(self, relay_map: RelayMap) -> None:
        """Bursts of several sizes arrive whole, whatever the kernel does to send them."""
        async with node_on(relay_map) as a, node_on(relay_map, admit=everybody) as b:
            link = await a.connect(b.public_key, relay=900)
            await link.send(b"first")
            other = await b.accept()
            assert await other.receive() == b"first"
            await other.send(b"back")
            await until_direct(link, other)
            burst = [bytes([n]) + bytes(1199) for n in range(100)] + [b"odd"] + [bytes(700)] * 5
            await link.send_many(burst)
            received: list[bytes] = []
            with trio.fail_after(5):
                while len(received) < len(burst):
                    received += await other.receive_many()
            assert received == burst

    async def test_ping(self, relay_map: RelayMap) -> None:
        """A ping needs no traffic before it and is answered by the fastest way."""
        async with node_on(relay_map) as a, node_on(relay_map, admit=everybody) as b:
            link = await a.connect(b.public_key, relay=900)
            answer = await link.ping()
            assert answer is not None
            assert answer.latency_seconds < 5
            stranger = await a.connect(new_key().public(), relay=900)
            assert await stranger.ping(timeout_seconds=0.05) is None


class TestNobodyAnswers:
    """The first thing that goes wrong for a person: the verdict says which of the reasons it is."""

    async def test_peer_is_not_at_its_relay(self, relay_map: RelayMap) -> None:
        """The relay knows; and it is no longer said once the peer came."""
        b_key = new_key()
        async with node_on(relay_map) as a:
            link = await a.connect(b_key.public(), relay=900)
            await until(lambda: Finding.NOT_AT_RELAY in link.verdict().findings)
            verdict = link.verdict("attic")
            assert verdict.sentences == (
                "The relay of region 900 says that attic is not connected to it.",
            )
            assert verdict.remedies == (Remedy.CHECK_PEER, Remedy.CHECK_REGION)
            async with node_on(relay_map, key=b_key, admit=everybody) as b:
                other = await b.connect(a.public_key, relay=900)
                await other.send(b"hello")
                with trio.fail_after(5):
                    assert await link.receive() == b"hello"
                assert Finding.NOT_AT_RELAY not in link.verdict().findings

    async def test_peer_does_not_know_us(self, relay_map: RelayMap) -> None:
        """It is connected, but does not admit our key."""
        async with node_on(relay_map) as a, node_on(relay_map) as b:
            link = await a.connect(b.public_key, relay=900)
            await until(lambda: b.statistics().rejected_introductions)
            verdict = link.verdict()
            assert verdict.findings == (Finding.NO_INTRODUCTION,)
            assert Remedy.CHECK_KEYS in verdict.remedies

    async def test_no_relay(self, relay: Any, relay_map: RelayMap) -> None:
        """The relay that should lead to the peer is down, or nobody said which it is."""
        async with node_on(relay_map) as a:
            link = await a.connect(new_key().public(), relay=900)
            other = await a.connect(new_key().public())
            relay.scope.cancel()
            relay.drop_clients()
            await until(lambda: Finding.RELAY_DOWN in link.verdict().findings)
            assert f"127.0.0.1:{relay.port}" in link.verdict().text()
            assert other.verdict().findings == (Finding.NO_REGION,)


class TestAdmission:
    async def test_strangers_cost_no_state(self, relay_map: RelayMap) -> None:
        """Without admission, an introduction leads to nothing and is counted."""
        async with (
            node_on(relay_map) as a,
            node_on(relay_map) as silent,
            node_on(relay_map, admit=lambda key: key != a.public_key) as picky,
        ):
            for target in (silent, picky):
                link = await a.connect(target.public_key, relay=900)
                await link.send(b"hello")
                await until(lambda: target.statistics().rejected_introductions)  # noqa: B023
                assert not target.links

    async def test_other_packets_of_strangers_reach_their_handler(
        self, relay_map: RelayMap
    ) -> None:
        """A control plane can speak over the relay."""
        heard: list[tuple[int, NodePublic, bytes]] = []
        async with (
            node_on(relay_map) as a,
            node_on(relay_map, handle_stranger=lambda *packet: heard.append(packet)) as b,
        ):
            link = await a.connect(
                b.public_key, relay=900, disco_key=DiscoPrivate.generate(os.urandom).public()
            )
            await link.send(b"meow")
            await until(lambda: heard)
            assert heard == [(900, a.public_key, b"meow")]

    async def test_peer_that_forges_anothers_address(self, relay_map: RelayMap) -> None:
        """A peer's Ping with the source of another peer's path does not take that one's datagrams
        away; nor is our own disco key taken from anybody as theirs."""
        async with (
            node_on(relay_map, admit=everybody) as node,
            node_on(relay_map) as friend,
            node_on(relay_map) as forger,
        ):
            link = await friend.connect(node.public_key, relay=900)
            await link.send(b"hello")
            from_friend = await node.accept()
            await from_friend.send(b"hello")
            await until_direct(link, from_friend)
            await (await forger.connect(node.public_key, relay=900)).send(b"hello")
            from_forger = await node.accept()
            assert await from_forger.receive() == b"hello"
            outlet = forger._sessions[node.public_key.raw].outlet
            await until(lambda: outlet.has_keys)
            forged = outlet.seal_disco(Ping(b"twelve bytes", forger.public_key))
            assert forged is not None
            assert await from_friend.receive() == b"hello"
            source = from_friend.path.address
            assert source is not None
            node._reception.handle_batch([(forged, source)])
            await link.send(b"direct")
            with trio.fail_after(2):
                assert await from_friend.receive() == b"direct"
            with pytest.raises(KeyFormatError, match="our own"):
                node._sessions[forger.public_key.raw].set_disco_key(node.disco_key, 0.0)

    async def test_hostile_datagrams(self, relay_map: RelayMap) -> None:
        """Random and malformed datagrams on the UDP port change nothing but counters."""
        async with node_on(relay_map) as node:
            port = node.statistics().udp.ipv4_port
            sock = trio.socket.socket(type=trio.socket.SOCK_DGRAM)
            with sock:
                count = 0
                for start in HOSTILE_STARTS:
                    for size in (0, 1, 20, 40, 100, 1400):
                        await sock.sendto(start + os.urandom(size), ("127.0.0.1", port))
                        count += 1
                await until(lambda: node.statistics().udp.datagrams_received >= count)
            statistics = node.statistics()
            assert statistics.peers == 0
            assert statistics.rejected_disco


class TestMisuse:
    async def test_impossible_peers(self, relay_map: RelayMap) -> None:
        """What can't be connected to is refused in words."""
        async with node_on(relay_map) as node:
            with pytest.raises(NodeError, match="our own key"):
                await node.connect(node.public_key, relay=900)
            with pytest.raises(NodeError, match="region 7 has no relay"):
                await node.connect(new_key().public(), relay=7)
            with pytest.raises(KeyFormatError):
                await node.connect(NodePublic(b"\1" + bytes(31)), relay=900)
            assert not node.links

    async def test_impossible_datagrams(self, relay_map: RelayMap) -> None:
        """What the peer would take for a control message is refused, and so is the oversized."""
        async with node_on(relay_map) as node:
            link = await node.connect(new_key().public(), relay=900)
            for start in (
                b"TS\xf0\x9f\x92\xac",
                b"\0\1\0\0\x21\x12\xa4\x42",
                b"UP\xf0\x9f\x91\x8b",
            ):
                with pytest.raises(LinkError, match="taken for one"):
                    await link.send(start + bytes(100))
            with pytest.raises(LinkError, match="at most 65507"):
                await link.send(bytes(65508))

    async def test_closed(self, relay_map: RelayMap) -> None:
        """A closed link refuses work, wakes its readers, and its peer is forgotten."""
        async with node_on(relay_map) as node:
            link = await node.connect(new_key().public(), relay=900)
            async with trio.open_nursery() as nursery:

                async def read() -> None:
                    with pytest.raises(LinkClosedError):
                        await link.receive()

                nursery.start_soon(read)
                await trio.testing.wait_all_tasks_blocked()
                link.close()
                link.close()
            with pytest.raises(LinkClosedError):
                await link.send(b"x")
            assert [change async for change in link.path_changes()] == []
            assert node.statistics().peers == 0

    async def test_leaving_the_block_closes_links(self, relay_map: RelayMap) -> None:
        """After the node is gone its links say so instead of hanging."""
        async with node_on(relay_map) as node:
            link = await node.connect(new_key().public(), relay=900)
        with pytest.raises(LinkClosedError):
            await link.receive()

    def test_addresses_read_as_written(self) -> None:
        """The public Address type parses what it prints."""
        assert Address.parse(str(Address("2001:db8::1", 5))) == ("2001:db8::1", 5)
