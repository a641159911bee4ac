"""Whole nodes, with links, that reach each other by a running edge; on loopback."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import trio

from tests.relay.edge.test_peers_live import BOTH, running
from traversal import InterfaceFilter, Node, NodePrivate, PathKind, RelayMap, open_node
from traversal.paths.edge import EdgePolicy
from traversal.tunnel.transport_choice import Transport

LOOPBACK = {
    "hosts": {4: "127.0.0.1"},
    "interfaces": InterfaceFilter(allowed_names=("lo",)),
    "map_ports": False,
    "admit": lambda _: True,
}


async def connected(*nodes: Node) -> None:
    """Until all have their edge."""
    while not all(node.statistics().edge.transport for node in nodes):  # noqa: ASYNC110
        await trio.sleep(0.01)


@pytest.mark.parametrize("transport", BOTH)
async def test_nodes_without_relays(tmp_path: Path, transport: Transport) -> None:
    """Two nodes that have no relay at all introduce themselves by the edge, talk by it, and then go
    direct, since they are on one host."""
    async with running(tmp_path) as place:
        options = {**LOOPBACK, "edge": place.edge_options(transport)}
        async with (
            open_node(NodePrivate.generate(os.urandom), RelayMap({}), **options) as a,
            open_node(NodePrivate.generate(os.urandom), RelayMap({}), **options) as b,
        ):
            with trio.fail_after(10):
                await connected(a, b)
                link = await a.connect(b.public_key)
                await link.send(b"hello")
                other = await b.accept()
                assert await other.receive() == b"hello"
                await other.send(b"welcome")
                assert await link.receive() == b"welcome"
                while link.path.kind is not PathKind.DIRECT:
                    await link.send(b"more")
                    await trio.sleep(0.02)


@pytest.mark.parametrize("transport", BOTH)
async def test_by_policy(tmp_path: Path, transport: Transport) -> None:
    """Nodes that shall use the edge first do so though a direct path works; datagrams of any size
    pass; and when the edge dies, the direct path takes over within two seconds."""
    async with running(tmp_path) as place:
        options = {
            **LOOPBACK,
            "edge": place.edge_options(transport),
            "edge_policy": EdgePolicy.FIRST,
        }
        async with (
            open_node(NodePrivate.generate(os.urandom), RelayMap({}), **options) as a,
            open_node(NodePrivate.generate(os.urandom), RelayMap({}), **options) as b,
        ):
            with trio.fail_after(10):
                await connected(a, b)
                link = await a.connect(b.public_key)
                await link.send(b"hello")
                other = await b.accept()
                while {link.path.kind, other.path.kind} != {PathKind.EDGE}:
                    await link.send(b"more")
                    await other.send(b"more")
                    await trio.sleep(0.02)
            path = link.path
            assert path.address is None
            assert path.latency_seconds is not None
            assert "edge" in link.verdict().text()
            for size in (8, 1200, 20_000, 60_000):
                datagram = os.urandom(4)[:1] + bytes(size)
                await link.send(datagram)
                with trio.fail_after(5):
                    while await other.receive() != datagram:
                        pass
            await trio.sleep(2)  # a search is forced once in so long, and there was one
            place.stop()
            with trio.fail_after(5):
                while link.path.kind is not PathKind.DIRECT:
                    await link.send(b"more")
                    await other.send(b"more")
                    await trio.sleep(0.02)
