"""A small node agent: it keeps a link to each peer, exchanges a line a second, and says how.

    underpass keygen -o desk.key                # prints the public key, for the others
    python agent.py desk.key relays.json attic=nodekey:...@900 cellar=nodekey:...@901

900 and 901 are the peers' home regions. Stop it with Ctrl-C.
"""

from __future__ import annotations

import sys
from pathlib import Path

import trio

from traversal import (
    KeyFormatError,
    Link,
    LinkClosedError,
    LinkError,
    NodeError,
    NodePrivate,
    NodePublic,
    RelayMap,
    RelayMapError,
    UdpError,
    open_node,
)

Peers = dict[str, tuple[NodePublic, int]]
"""Key and home region by name."""


async def run(key: NodePrivate, relay_map: RelayMap, peers: Peers) -> None:
    """Be a node until cancelled."""
    known = {public for public, _ in peers.values()}
    async with (
        open_node(key, relay_map, admit=known.__contains__) as node,
        trio.open_nursery() as nursery,
    ):
        print(f"{node.public_key}@{node.home_region}", flush=True)
        for name, (public, region) in peers.items():
            link = await node.connect(public, relay=region)
            nursery.start_soon(send, name, link)
            nursery.start_soon(receive, name, link)
            nursery.start_soon(watch, name, link)


async def send(name: str, link: Link) -> None:
    """Datagrams may get lost, so what matters is sent again."""
    for number in range(1_000_000):
        try:
            await link.send(f"hello {name}, {number}".encode())
        except LinkClosedError:
            return
        except LinkError as error:  # this datagram can't be sent at all
            print(f"{name}: {error}", flush=True)
        await trio.sleep(1)


async def receive(name: str, link: Link) -> None:
    """Nothing is encrypted or authenticated here; real agents run WireGuard or DTLS on top."""
    try:
        while True:
            datagram = await link.receive()
            print(f"{name} says {datagram!r}", flush=True)
    except LinkClosedError:
        return


async def watch(name: str, link: Link) -> None:
    """Each change of path with its reason, and at the end why it is the one."""
    async for change in link.path_changes():
        print(f"{name}: {change.new.kind.value} {change.new.address} ({change.reason})", flush=True)
        print(link.verdict(name).text(), flush=True)


def main(arguments: list[str]) -> str | None:
    """Returns what is wrong, if anything."""
    if len(arguments) < 3:
        return __doc__
    peers: Peers = {}
    try:
        key = NodePrivate.parse(Path(arguments[0]).read_text().strip())
        relay_map = RelayMap.parse(Path(arguments[1]).read_bytes())
        for argument in arguments[2:]:
            name, _, rest = argument.partition("=")
            public, _, region = rest.partition("@")
            peers[name] = NodePublic.parse(public), int(region or 0)
        trio.run(run, key, relay_map, peers)
    except (OSError, KeyFormatError, RelayMapError, UdpError, NodeError, ValueError) as error:
        return str(error)
    except KeyboardInterrupt:
        pass
    return None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
