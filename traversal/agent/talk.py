"""Nodes that talk to one another and say how: for demonstrations and scenarios of a lab.

A lab starts `talk` on every host with the same relay map and seed; names are all that the nodes
need to know of one another, since their keys follow from seed and name. That is for labs only:
whoever knows a seed has the keys.

Each node sends every other one a numbered datagram four times a second, which comes back. It
prints a line for each change of a path and for each round trip:

    ready nodekey:4f3c...
    path bob relay
    rtt bob 41.2 ms
    path bob direct 2.1.0.7:51820
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Final

import trio

from traversal.io.relay_client import RelayOptions
from traversal.keys import NodePrivate
from traversal.link import Link, LinkError, LinkPath, PathKind
from traversal.node import open_node
from traversal.relay_map import RelayMap, RelayMapError

INTERVAL_SECONDS: Final = 0.25
_MAP_SECONDS: Final = 20.0
_QUESTION, _ANSWER = b"\xffQ", b"\xffA"
"""First bytes that no protocol on a node's socket has."""

Say = Callable[[str], None]


def key_of(seed: str, name: str) -> NodePrivate:
    """The key of the node with a name in a lab with a seed."""
    return NodePrivate.generate(random.Random(f"key {seed} {name}").randbytes)


async def talk(say: Say, map_file: str, seed: str, name: str, *peers: str) -> None:
    """Be a node until cancelled.

    Args:
        say: prints a line.
        map_file: the map of one relay; waited for, so that relay and nodes can start together.
            Without a certificate's name in it, the relay is spoken to without TLS.
        seed: the lab's.
        name: the node's own.
        peers: the others' names.

    Raises TimeoutError when the map does not come, RelayMapError when it is none, and
    UdpError when no socket can be opened.
    """
    relay_map = await _read_map(map_file)
    ((region, relay),) = ((r.region_id, r.nodes[0]) for r in relay_map.regions.values())
    entropy = random.Random(f"entropy {seed} {name}").randbytes
    private = key_of(seed, name)
    # A relay inside a simulated internet has no certificate: TLS would make no two runs alike.
    options = RelayOptions(plain=not relay.certificate_name)
    async with open_node(
        private, relay_map, map_ports=False, relay_options=options, entropy=entropy
    ) as node:
        say(f"ready {node.public_key}")
        async with trio.open_nursery() as nursery:
            for peer in peers:
                link = await node.connect(key_of(seed, peer).public(), relay=region)
                conversation = _Conversation(say, peer, link)
                nursery.start_soon(conversation.watch)
                nursery.start_soon(conversation.ask)
                nursery.start_soon(conversation.hear)


async def _read_map(file: str) -> RelayMap:
    with trio.move_on_after(_MAP_SECONDS):
        while True:
            try:
                # Not in a thread, for which the virtual clock of a lab would not wait.
                return RelayMap.parse(Path(file).read_text())  # noqa: ASYNC240
            except (FileNotFoundError, RelayMapError):
                await trio.sleep(0.05)  # it is being written
    raise TimeoutError(f"no relay map came to {file} within {_MAP_SECONDS:g} s")


class _Conversation:
    """One peer: what goes there and back, and what is said about it."""

    def __init__(self, say: Say, peer: str, link: Link) -> None:
        self._say = say
        self._peer = peer
        self._link = link
        self._path = ""
        self._asked: dict[int, float] = {}

    async def watch(self) -> None:
        """Tell every change of the path once the peer was heard (see `hear`)."""
        async for change in self._link.path_changes():
            if self._path:
                self._tell_path(change.new)

    async def ask(self) -> None:
        """Send a numbered datagram again and again."""
        number = 0
        while True:
            number += 1
            self._asked[number] = trio.current_time()
            self._asked.pop(number - 100, None)
            await self._send(_QUESTION + number.to_bytes(4, "big"))
            await trio.sleep(INTERVAL_SECONDS)

    async def hear(self) -> None:
        """Return the peer's datagrams, and tell how long ours took there and back."""
        while True:
            datagram = await self._link.receive()
            if not self._path:
                self._tell_path(self._link.path)
            kind, number = datagram[:2], int.from_bytes(datagram[2:6], "big")
            if kind == _QUESTION:
                await self._send(_ANSWER + datagram[2:])
            elif kind == _ANSWER and (sent := self._asked.pop(number, None)) is not None:
                self._say(f"rtt {self._peer} {(trio.current_time() - sent) * 1000:.1f} ms")

    async def _send(self, datagram: bytes) -> None:
        try:
            await self._link.send(datagram)
        except LinkError:
            pass  # no way there at the moment; the next one may have one

    def _tell_path(self, path: LinkPath) -> None:
        text = path.kind.value
        if path.kind is PathKind.DIRECT and path.address is not None:
            text += f" {path.address}"
        if text != self._path:
            self._path = text
            self._say(f"path {self._peer} {text}")
