"""What 1000 peers cost one node that is not busy with them: `python -m tests.bench.peers`.

A namespace for the node, which is this process, and one for its peers: a process that answers the
disco Pings of each on a socket of its own. In this order:

* `unknown`: connected, never spoken to;
* `asleep`: a direct path was found and used, then nothing was sent for a minute. No packet leaves;
* `alive`: a datagram to each every 20 s, so that heartbeats go on, one each 3 s: 333 Pings and as
  many Pongs a second, on direct paths.

CPU is the node's share of a core; memory is what it has grown by since before the peers came.
Exit status 1 when peers that are not alive cost more than 1 % of a core or 20 MiB.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import select
import socket
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import trio

from netlab.kernel.jail import call_in_jail
from netlab.kernel.lab import KernelLab
from netlab.kernel.namespaces import raise_descriptor_limit
from netlab.model import Host, Nat, Server, Topology, Uplink
from netlab.presets import class_behavior
from tests.system.kernel_world import start_relay
from traversal import Address, DiscoPrivate, Link, NodePrivate, PathKind, open_node
from traversal.keys import Box
from traversal.wire.disco import Ping, Pong, is_disco, open_envelope, parse_sender, seal_envelope

FIRST_PORT: Final = 20000
ALIVE_SECONDS: Final = 20.0
ASLEEP_AFTER_SECONDS: Final = 60.0
"""45 s after the last datagram heartbeats end, 6.5 s later the trust in the path."""

TOPOLOGY: Final = Topology(
    hosts=tuple(Host(name=name, uplinks=(Uplink(network="site"),)) for name in "ab"),
    nats=(Nat(name="site", behavior=class_behavior("EIM+APDF")),),
    servers=(Server(name="r0"),),
)


@dataclass(frozen=True)
class Row:
    """The peers in one state."""

    state: str
    peers: int
    direct: int
    cpu_share: float
    grown_mebibytes: float
    datagrams_per_second: float

    @property
    def is_well(self) -> bool:
        return self.state == "alive" or (self.cpu_share < 0.01 and self.grown_mebibytes < 20)


def peer_keys(number: int) -> tuple[NodePrivate, DiscoPrivate]:
    """The same in both processes."""
    generator = random.Random(f"peer {number}")
    return (
        NodePrivate.generate(generator.randbytes),
        DiscoPrivate.generate(generator.randbytes),
    )


def answer_pings(host: str, count: int) -> None:
    """Be all the peers."""
    epoll = select.epoll()
    sockets: dict[int, tuple[socket.socket, DiscoPrivate]] = {}
    boxes: dict[int, Box] = {}
    for number in range(count):
        sock = socket.socket(type=socket.SOCK_DGRAM)
        sock.bind((host, FIRST_PORT + number))
        sockets[sock.fileno()] = sock, peer_keys(number)[1]
        epoll.register(sock, select.EPOLLIN)
    print("ready", flush=True)
    while True:
        for descriptor, _ in epoll.poll():
            sock, private = sockets[descriptor]
            datagram, source = sock.recvfrom(2048)
            if not is_disco(datagram):
                continue
            box = boxes.get(descriptor)
            if box is None:
                box = boxes[descriptor] = Box(private, parse_sender(datagram))
            message = open_envelope(datagram, box)
            if isinstance(message, Ping):
                pong = Pong(message.transaction_id, Address(*source))
                answer = seal_envelope(pong, private.public(), box, os.urandom(24))
                sock.sendto(answer, source)


def resident_mebibytes() -> float:
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGESIZE") / (1 << 20)


async def run(count: int, seconds: float) -> list[Row]:
    async with (
        KernelLab(TOPOLOGY, observe=False) as lab,
        start_relay(lab) as relay_map,
        lab.host("a"),
        open_node(NodePrivate.generate(os.urandom), relay_map, map_ports=False) as node,
        trio.open_nursery() as nursery,
    ):
        address = lab.host("b").addresses[0]
        command = [sys.executable, "-m", "tests.bench.peers", "--as-peers", address, str(count)]
        peers = await lab.host("b").open_process(command, stdout=subprocess.PIPE)
        assert peers.stdout is not None
        assert await peers.stdout.receive_some()
        before = resident_mebibytes()
        links: list[Link] = []

        async def measure(state: str) -> Row:
            received = node.statistics().udp.datagrams_received
            cpu, began = time.process_time(), trio.current_time()
            await trio.sleep(seconds)
            cpu, lasted = time.process_time() - cpu, trio.current_time() - began
            received = node.statistics().udp.datagrams_received - received
            return Row(
                state=state,
                peers=len(links),
                direct=sum(link.path.kind is PathKind.DIRECT for link in links),
                cpu_share=cpu / lasted,
                grown_mebibytes=resident_mebibytes() - before,
                datagrams_per_second=received / lasted,
            )

        async def talk(pause: float) -> None:
            for link in links:
                await link.send(bytes(32))
                await trio.sleep(pause / count)

        async def keep_talking() -> None:
            while True:
                await talk(ALIVE_SECONDS)

        try:
            for number in range(count):
                node_key, disco_key = peer_keys(number)
                links.append(
                    await node.connect(
                        node_key.public(),
                        relay=node.home_region,
                        disco_key=disco_key.public(),
                        candidates=[Address(address, FIRST_PORT + number)],
                    )
                )
            await trio.sleep(1)
            rows = [await measure("unknown")]
            await talk(5.0)
            await trio.sleep(2)
            found = sum(link.path.kind is PathKind.DIRECT for link in links)
            assert found == count, f"only {found} of {count} paths are direct"
            await trio.sleep(ASLEEP_AFTER_SECONDS)
            rows.append(await measure("asleep"))
            await talk(5.0)
            nursery.start_soon(keep_talking)
            await trio.sleep(ALIVE_SECONDS)
            rows.append(await measure("alive"))
        finally:
            peers.kill()
        nursery.cancel_scope.cancel()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--peers", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=20.0, help="for each state")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()

    def work() -> bytes:
        raise_descriptor_limit()
        rows = trio.run(run, options.peers, options.seconds)
        return json.dumps([asdict(row) for row in rows]).encode()

    answer = call_in_jail(work, timeout_seconds=200 + 3 * options.seconds)
    rows = [Row(**row) for row in json.loads(answer)]
    if options.json:
        print(json.dumps([asdict(row) for row in rows], indent=2))
    else:
        print(f"{os.cpu_count()} processors, load average {os.getloadavg()[0]:.1f}")
        for row in rows:
            print(
                f"{row.peers} peers {row.state:8} {row.direct:5} direct  {row.cpu_share:6.2%} of a "
                f"core  {row.grown_mebibytes:5.1f} MiB  {row.datagrams_per_second:5.0f} datagrams/s"
                f" came{'' if row.is_well else '  TOO MUCH'}"
            )
    sys.exit(not all(row.is_well for row in rows))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--as-peers"]:
        raise_descriptor_limit()
        answer_pings(sys.argv[2], int(sys.argv[3]))
    else:
        main()
