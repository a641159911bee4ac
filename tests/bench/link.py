"""What a Link costs over a direct path on loopback: `python -m tests.bench.link`.

Three ways to carry the same datagrams, in one run, each sender and receiver in one process on one
core, so that their costs add up: a bare UDP socket drained by hand (the floor), `Link.send` one by
one, `Link.send_many` in bursts of 64. Every datagram carries its number, and the receiver counts
the different ones that came: rates are of datagrams that arrived. The sender waits for the receiver
after each window, so nothing is lost in buffers and the load bounds itself.

CPU per datagram is of both ends together. `idle` is what 1000 peers cost that say nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import socket
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass

import trio

from relay.config import Config
from relay.map_entry import build_map
from relay.server import serve
from traversal import (
    DiscoPrivate,
    InterfaceFilter,
    Link,
    NodePrivate,
    PathKind,
    RelayMap,
    open_node,
)

WINDOW = 256
BURST = 64
IDLE_PEERS = 1000
NUMBER_BYTES = 8


@dataclass(frozen=True)
class Row:
    """One way and size."""

    way: str
    datagram_bytes: int
    datagrams_per_second: float
    gbit_per_second: float
    cpu_us_per_datagram: float


Sender = Callable[[list[bytes]], Awaitable[None]]
Receiver = Callable[[], Awaitable[list[bytes]]]


async def measure(way: str, size: int, seconds: float, send: Sender, receive: Receiver) -> Row:
    """Windows of numbered datagrams until the time is over."""
    filler = bytes(size - NUMBER_BYTES)
    count = arrived = 0
    began, cpu = time.perf_counter(), time.process_time()
    while time.perf_counter() - began < seconds:
        window = [
            bytes(4) + (count + i).to_bytes(NUMBER_BYTES - 4, "big") + filler for i in range(WINDOW)
        ]
        count += WINDOW
        await send(window)
        wanted = set(window)
        with trio.move_on_after(0.2):
            while wanted:
                wanted.difference_update(await receive())
        arrived += WINDOW - len(wanted)
    elapsed = time.perf_counter() - began
    cpu = time.process_time() - cpu
    return Row(
        way=way,
        datagram_bytes=size,
        datagrams_per_second=arrived / elapsed,
        gbit_per_second=arrived * size * 8 / elapsed / 1e9,
        cpu_us_per_datagram=cpu / arrived * 1e6,
    )


async def bare(size: int, seconds: float) -> Row:
    """Two sockets, as fast as plain calls go."""
    sockets = [socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(2)]
    for sock in sockets:
        sock.bind(("127.0.0.1", 0))
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 7 << 20)
    source, sink = sockets
    address = sink.getsockname()

    async def send(window: list[bytes]) -> None:
        for datagram in window:
            source.sendto(datagram, address)

    async def receive() -> list[bytes]:
        await trio.lowlevel.wait_readable(sink)
        datagrams = []
        while True:
            try:
                datagrams.append(sink.recvfrom(2048)[0])
            except BlockingIOError:
                return datagrams

    with source, sink:
        return await measure("bare UDP", size, seconds, send, receive)


async def over_link(way: str, size: int, seconds: float, link: Link, other: Link) -> Row:
    """Over a direct path."""

    async def one_by_one(window: list[bytes]) -> None:
        for datagram in window:
            await link.send(datagram)

    async def in_bursts(window: list[bytes]) -> None:
        for start in range(0, WINDOW, BURST):
            await link.send_many(window[start : start + BURST])

    send = in_bursts if way == "link, bursts" else one_by_one
    return await measure(way, size, seconds, send, other.receive_many)


async def idle_share(relay_map: RelayMap, seconds: float) -> tuple[float, float]:
    """CPU share and MiB of memory that 1000 silent peers cost."""
    async with open_node(
        NodePrivate.generate(os.urandom),
        relay_map,
        hosts={4: "127.0.0.1"},
        interfaces=InterfaceFilter(allowed_names=("lo",)),
        map_ports=False,
    ) as node:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for _ in range(IDLE_PEERS):
            await node.connect(
                NodePrivate.generate(os.urandom).public(),
                relay=node.home_region,
                disco_key=DiscoPrivate.generate(os.urandom).public(),
            )
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        cpu = time.process_time()
        await trio.sleep(seconds)
        return (time.process_time() - cpu) / seconds, grown / 1024


async def run(seconds: float) -> dict[str, object]:
    config = Config.dev()
    rows = []
    async with trio.open_nursery() as nursery:
        bound = await nursery.start(serve, config, lambda: config)
        relay_map = build_map(
            config,
            derp_port=bound.derp[0][1],
            stun_port=bound.stun[0][1],
            can_port_80=False,
            pin=bound.pin,
        )

        def node(**more: object):  # type: ignore[no-untyped-def]
            return open_node(
                NodePrivate.generate(os.urandom),
                relay_map,
                hosts={4: "127.0.0.1"},
                interfaces=InterfaceFilter(allowed_names=("lo",)),
                map_ports=False,
                **more,
            )

        async with node() as a, node(admit=lambda _: True) as b:
            link = await a.connect(b.public_key, relay=b.home_region)
            await link.send(b"hello")
            other = await b.accept()
            while link.path.kind is not PathKind.DIRECT:  # noqa: ASYNC110
                await trio.sleep(0.01)
            await trio.sleep(1)  # path MTU search
            for size in (100, 1300):
                rows.append(await bare(size, seconds))
                rows += [
                    await over_link(way, size, seconds, link, other)
                    for way in ("link, one by one", "link, bursts")
                ]
        share, mebibytes = await idle_share(relay_map, 5 * seconds)
        nursery.cancel_scope.cancel()
    return {
        "rows": [asdict(row) for row in rows],
        "idle_peers": IDLE_PEERS,
        "idle_cpu_share": share,
        "idle_mebibytes": mebibytes,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--seconds", type=float, default=1.0, help="for each row")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    result = trio.run(run, options.seconds)
    if options.json:
        print(json.dumps(result, indent=2))
        return
    for row in result["rows"]:  # type: ignore[attr-defined]
        print(
            f"{row['way']:18} {row['datagram_bytes']:5} B "
            f"{row['datagrams_per_second']:10.0f}/s {row['gbit_per_second']:6.2f} Gbit/s "
            f"{row['cpu_us_per_datagram']:6.2f} us CPU"
        )
    print(
        f"{IDLE_PEERS} idle peers: {result['idle_cpu_share']:.2%} of a core, "
        f"{result['idle_mebibytes']:.1f} MiB"
    )


if __name__ == "__main__":
    main()
