"""Nodes that reach each other through a running edge, over QUIC and over HTTP/2."""

from __future__ import annotations

import dataclasses
import os
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import trio

from relay.config import Config
from relay.edge.certificates import authority_path
from relay.edge.service import Edge
from relay.edge.tunnel_files import create_tunnel
from relay.listeners import open_listeners
from traversal.io.edge_client import EdgeClient, EdgeOptions
from traversal.io.edge_dial import EdgeAddress
from traversal.keys import NodePrivate
from traversal.tunnel.transport_choice import Transport

BOTH = (Transport.QUIC, Transport.HTTP2)


@dataclass
class Heard:
    """What a node was told."""

    packets: list[tuple[bytes, bytes]] = field(default_factory=list)
    gone: list[bytes] = field(default_factory=list)
    changes: list[bool] = field(default_factory=list)

    def handle_edge_packet(self, source: bytes, payload: bytes) -> None:
        self.packets.append((source, payload))

    def handle_edge_peer_gone(self, key: bytes) -> None:
        self.gone.append(key)

    def handle_edge_change(self, *, is_up: bool) -> None:
        self.changes.append(is_up)


class Node:
    def __init__(self, options: EdgeOptions) -> None:
        self.private_key = NodePrivate.generate(os.urandom)
        self.key = self.private_key.public().raw
        self.heard = Heard()
        self.scope = trio.CancelScope()
        self.client = EdgeClient(
            options, self.private_key, self.heard, entropy=os.urandom, rng=random.Random(1)
        )

    async def run(self) -> None:
        with self.scope:
            await self.client.run()

    async def connected(self, transport: Transport | None = None) -> None:
        await until(lambda: self.client.is_connected)
        if transport is not None:
            await until(lambda: self.client.statistics().transport is transport)


async def until(condition, seconds: float = 10.0) -> None:  # type: ignore[no-untyped-def]
    with trio.fail_after(seconds):
        while not condition():  # noqa: ASYNC110 # what is waited for has no event
            await trio.sleep(0.005)


@dataclass
class Place:
    edge: Edge
    options: EdgeOptions
    nursery: trio.Nursery
    scope: trio.CancelScope

    def edge_options(self, transport: Transport) -> EdgeOptions:
        return dataclasses.replace(self.options, transports=(transport,))

    def stop(self) -> None:
        """End the edge, and it alone."""
        self.scope.cancel()

    def node(self, **changes: object) -> Node:
        node = Node(dataclasses.replace(self.options, **changes))  # type: ignore[arg-type]
        self.nursery.start_soon(node.run)
        return node


@asynccontextmanager
async def running(directory: Path) -> AsyncIterator[Place]:
    config = Config.dev({"edge.listen": "127.0.0.1:0", "edge.directory": str(directory)})
    edge = Edge(config, open_listeners(config.edge.listen[0]))
    tunnel = create_tunnel(str(directory), "nodes", os.urandom)
    edge.reload_files()
    scope = trio.CancelScope()

    async def run_edge(*, task_status: trio.TaskStatus[None]) -> None:
        with scope:
            await edge.run(task_status=task_status)

    async with trio.open_nursery() as nursery:
        await nursery.start(run_edge)
        options = EdgeOptions(
            (EdgeAddress(*edge.addresses[0]),),
            tunnel.credentials,
            ca_file=str(authority_path(directory)),
        )
        yield Place(edge, options, nursery, scope)
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("transport", BOTH)
async def test_packets(tmp_path: Path, transport: Transport) -> None:
    """Small packets and the largest pass both ways, as the source's; a node that is not there, or
    leaves, is reported."""
    async with running(tmp_path) as place:
        one, two = (place.node(transports=(transport,)) for _ in range(2))
        await one.connected()
        await two.connected()
        for size in (0, 1, 1100, 1400, 65536):
            assert one.client.send(two.key, bytes(size))
            await until(lambda: two.heard.packets)
            assert two.heard.packets.pop() == (one.key, bytes(size))
        assert not one.client.send(two.key, bytes(65537))
        two.client.send(one.key, b"back")
        await until(lambda: one.heard.packets)
        assert one.heard.packets == [(two.key, b"back")]
        one.client.send(bytes(32), b"nobody")
        await until(lambda: one.heard.gone)
        two.scope.cancel()
        await until(lambda: len(one.heard.gone) == 2)
        assert one.heard.gone == [bytes(32), two.key]
        assert two.heard.changes == [True, False]
        assert place.edge.registry.pick(place.options.credentials.tunnel_id) is None


async def test_across_transports(tmp_path: Path) -> None:
    """A node over QUIC and one over HTTP/2 reach each other; none of a burst is lost."""
    async with running(tmp_path) as place:
        one, two = (place.node(transports=(transport,)) for transport in BOTH)
        await one.connected()
        await two.connected()
        for number in range(200):
            one.client.send(two.key, number.to_bytes(2, "big") + bytes(1000))
            two.client.send(one.key, number.to_bytes(2, "big") + bytes(1000))
        await until(lambda: len(one.heard.packets) == len(two.heard.packets) == 200)
        assert [int.from_bytes(p[:2], "big") for _, p in two.heard.packets] == list(range(200))


async def test_the_key_must_be_proven(tmp_path: Path) -> None:
    """Who claims another node's key gets no packets of that node's."""
    async with running(tmp_path) as place:
        one, two = place.node(), place.node()
        await one.connected()
        await two.connected()
        thief = Node(place.options)

        class Claim(NodePrivate):
            def public(self):  # type: ignore[no-untyped-def]
                return two.private_key.public()

        thief.client._private_key = Claim(thief.private_key.raw)
        place.nursery.start_soon(thief.run)
        await until(lambda: thief.client.statistics().last_error)
        assert not thief.client.is_connected
        one.client.send(two.key, b"for two")
        await until(lambda: two.heard.packets)
        assert thief.heard.packets == []


async def test_wrong_credentials(tmp_path: Path) -> None:
    """Without a tunnel's credentials nobody gets in, and the client says why."""
    async with running(tmp_path) as place:
        wrong = dataclasses.replace(place.options.credentials, secret=b"x" * 32)
        node = place.node(credentials=wrong)
        await until(lambda: "does not know this tunnel" in node.client.statistics().last_error)
        assert not node.client.is_connected


class Middle:
    """Forwards TCP to an edge, and UDP only while `is_open`."""

    def __init__(self, target: tuple[str, int]) -> None:
        self.is_open = False
        self._target = target
        self._udp: dict[tuple[str, int], trio.socket.SocketType] = {}

    async def run(self, *, task_status: trio.TaskStatus[tuple[str, int]]) -> None:
        async with trio.open_nursery() as nursery:
            (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
            address = listener.socket.getsockname()
            sock = trio.socket.socket(type=trio.socket.SOCK_DGRAM)
            await sock.bind(address)
            nursery.start_soon(self._udp_out, sock, nursery)
            task_status.started(address)
            try:
                await trio.serve_listeners(self._tcp, [listener])
            finally:
                for each in (sock, *self._udp.values()):
                    each.close()

    async def _tcp(self, near: trio.SocketStream) -> None:
        far = await trio.open_tcp_stream(*self._target)

        async def pump(source: trio.SocketStream, sink: trio.SocketStream) -> None:
            try:
                while data := await source.receive_some():
                    await sink.send_all(data)
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                pass
            await near.aclose()
            await far.aclose()

        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(pump, near, far)
                nursery.start_soon(pump, far, near)
        finally:
            near.socket.close()
            far.socket.close()

    async def _udp_out(self, near: trio.socket.SocketType, nursery: trio.Nursery) -> None:
        while True:
            data, source = await near.recvfrom(2000)
            if not self.is_open:
                continue
            if source not in self._udp:
                far = self._udp[source] = trio.socket.socket(type=trio.socket.SOCK_DGRAM)
                await far.connect(self._target)
                nursery.start_soon(self._udp_back, near, far, source)
            await self._udp[source].send(data)

    async def _udp_back(
        self, near: trio.socket.SocketType, far: trio.socket.SocketType, source: tuple[str, int]
    ) -> None:
        while True:
            data = await far.recv(2000)
            if self.is_open:
                await near.sendto(data, source)


async def test_udp_blocked_and_healed(tmp_path: Path) -> None:
    """Where UDP is blocked a node is connected over HTTP/2 within 3 s; when UDP heals it goes over
    to QUIC without being away, and when it is blocked again back."""
    async with running(tmp_path) as place:
        middle = Middle(place.edge.addresses[0])
        address = await place.nursery.start(middle.run)
        one = place.node(addresses=(EdgeAddress(*address),))
        two = place.node()
        began = trio.current_time()
        await one.connected(Transport.HTTP2)
        assert trio.current_time() - began < 3
        await two.connected(Transport.QUIC)
        one.client.send(two.key, b"by TCP")
        await until(lambda: two.heard.packets)
        middle.is_open = True
        await until(lambda: one.client.statistics().transport is Transport.QUIC, 60)
        assert one.heard.changes == [True]
        for sender, receiver in ((one, two), (two, one)):
            receiver.heard.packets.clear()
            # A datagram may get lost, most of all while the edge learns of the other way.
            with trio.fail_after(10):
                while not receiver.heard.packets:
                    sender.client.send(receiver.key, b"by UDP")
                    await trio.sleep(0.2)
        middle.is_open = False
        await until(lambda: one.client.statistics().transport is Transport.HTTP2, 60)
        assert one.heard.changes == [True, False, True]


async def test_one_of_two_addresses(tmp_path: Path) -> None:
    """Of two edges' addresses the one that is there is used."""
    async with running(tmp_path) as place:
        dead = EdgeAddress("127.0.0.1", 1)
        node = place.node(addresses=(dead, *place.options.addresses))
        await node.connected()
        assert node.client.statistics().server == str(place.options.addresses[0])
