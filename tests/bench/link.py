"""What a Link costs, beside bare UDP and WireGuard: `python -m tests.bench.link`.

Two network namespaces, made by this benchmark and joined by veth. The same numbered datagrams
travel, in one run, by

* a bare UDP socket drained by hand, one system call per datagram; the same in bursts of 64 with
  segmentation offload;
* a Link, `send` one by one, and `send_many` in bursts of 64; sender and receiver in one process;
* wireguard-go (Debian's), in bursts through its tunnel; its two processes use both cores;
* the same wireguard-go over two `underpass up` agents, which carry its encrypted packets by a Link.

At most 128 datagrams are on their way, as many as an ordinary socket buffer holds, so nothing is
lost and the load bounds itself. Rates are of datagrams that arrived. CPU per datagram is of all
processes that take part, both ends together, the generator included.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import trio

from netlab.kernel.jail import call_in_jail
from netlab.kernel.lab import KernelLab
from netlab.kernel.machines import KernelHost
from netlab.model import Host, Nat, Server, Topology, Uplink
from netlab.presets import class_behavior
from tests import wireguard
from tests.system.kernel_world import start_relay
from tests.wireguard import Key, Tunnel, open_tunnel
from traversal import Link, Node, NodePrivate, PathKind, RelayMap, open_node
from traversal.io.udp import Batch, UdpSockets

WINDOW = 128
BURST = 64
GIVE_UP_SECONDS = 0.2
"""A datagram that has not come by then never will."""
NUMBER_BYTES = 8
LIMIT_SECONDS = 300

# Both hosts are in one site, so that only bridge and veth are between them.
TOPOLOGY = Topology(
    hosts=tuple(Host(name=name, uplinks=(Uplink(network="site"),)) for name in ("a", "b")),
    nats=(Nat(name="site", behavior=class_behavior("EIM+APDF")),),
    servers=(Server(name="r0"),),
)


@dataclass(frozen=True)
class Row:
    """One way and size."""

    way: str
    datagram_bytes: int
    datagrams_per_second: float
    gbit_per_second: float
    cpu_us_per_datagram: float
    arrived_ratio: float


@dataclass(frozen=True)
class Way:
    """How datagrams travel; `programs` are processes whose work counts."""

    name: str
    send: Callable[[list[bytes]], Awaitable[None]]
    receive: Callable[[], Awaitable[Sequence[bytes]]]
    programs: tuple[trio.Process, ...] = ()


def _cpu_seconds(programs: Sequence[trio.Process]) -> float:
    ticks = 0
    for program in programs:
        fields = Path(f"/proc/{program.pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")


async def measure(way: Way, size: int, seconds: float) -> Row:
    """Bursts of numbered datagrams until the time is over."""
    filler = bytes(size - NUMBER_BYTES)
    count = arrived = 0
    wanted: set[bytes] = set()
    sent: deque[tuple[float, list[bytes]]] = deque()
    began, cpu = time.perf_counter(), _cpu_seconds(way.programs)
    while (now := time.perf_counter()) - began < seconds:
        while sent and now - sent[0][0] > GIVE_UP_SECONDS:
            wanted.difference_update(sent.popleft()[1])
        while len(wanted) <= WINDOW - BURST:
            numbers = range(count, count + BURST)
            burst = [bytes(4) + n.to_bytes(NUMBER_BYTES - 4, "big") + filler for n in numbers]
            count += BURST
            wanted.update(burst)
            sent.append((now, burst))
            await way.send(burst)
        with trio.move_on_after(GIVE_UP_SECONDS):
            before = len(wanted)
            wanted.difference_update(await way.receive())
            arrived += before - len(wanted)
    elapsed = time.perf_counter() - began
    cpu = _cpu_seconds(way.programs) - cpu
    return Row(
        way=way.name,
        datagram_bytes=size,
        datagrams_per_second=arrived / elapsed,
        gbit_per_second=arrived * size * 8 / elapsed / 1e9,
        cpu_us_per_datagram=cpu / max(arrived, 1) * 1e6,
        arrived_ratio=arrived / (count - len(wanted)),
    )


@asynccontextmanager
async def bare_sockets(a: KernelHost, b: KernelHost) -> AsyncIterator[Way]:
    """As fast as plain calls go."""
    sockets = []
    for host in (a, b):
        with host.namespace.entered():
            sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        sock.bind((host.addresses[0], 0))
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 7 << 20)
        sockets.append(sock)
    source, sink = sockets
    address = sink.getsockname()

    async def send(burst: list[bytes]) -> None:
        for datagram in burst:
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
        yield Way("bare UDP", send, receive)


@asynccontextmanager
async def bursts(
    name: str, a: KernelHost, b: KernelHost, addresses: tuple[str, str], *programs: trio.Process
) -> AsyncIterator[Way]:
    """Bursts with segmentation offload between two addresses; through a tunnel if they are its."""
    arrived: list[bytes] = []
    news = trio.Event()

    def handle(batch: Batch) -> None:
        arrived.extend(datagram for datagram, _ in batch)
        news.set()

    ends = []
    for host, address in zip((a, b), addresses, strict=True):
        async with host:
            end = UdpSockets({4: address})
            await end.open()
        ends.append(end)
    source, sink = ends
    target = (addresses[1], sink.port(4) or 0)

    async def send(burst: list[bytes]) -> None:
        source.send_many(burst, target)

    async def receive() -> list[bytes]:
        nonlocal news
        if not arrived:
            news = trio.Event()
            await news.wait()
        taken = arrived.copy()
        arrived.clear()
        return taken

    async with trio.open_nursery() as nursery:
        nursery.start_soon(sink.receive, handle)
        yield Way(name, send, receive, programs)
        nursery.cancel_scope.cancel()
    source.close()
    sink.close()


def link_ways(link: Link, other: Link) -> list[Way]:
    """Over a direct path."""

    async def one_by_one(burst: list[bytes]) -> None:
        for datagram in burst:
            await link.send(datagram)

    return [
        Way("link, one by one", one_by_one, other.receive_many),
        Way("link, bursts", link.send_many, other.receive_many),
    ]


async def open_on(
    host: KernelHost, relay_map: RelayMap, *, task_status: trio.TaskStatus[Node]
) -> None:
    """A node on a host until cancelled."""
    async with (
        host,
        open_node(
            NodePrivate.generate(os.urandom), relay_map, map_ports=False, admit=lambda _: True
        ) as node,
    ):
        task_status.started(node)
        await trio.sleep_forever()


async def join(a: Node, b: Node) -> tuple[Link, Link]:
    """Two links that are direct and know their path's MTU."""
    link = await a.connect(b.public_key, relay=b.home_region)
    await link.send(b"hello")
    other = await b.accept()
    while link.path.kind is not PathKind.DIRECT:  # noqa: ASYNC110
        await trio.sleep(0.01)
    await trio.sleep(2)
    return link, other


# ---- WireGuard


async def start_agents(
    hosts: tuple[KernelHost, KernelHost], relay_map: RelayMap, directory: Path
) -> list[trio.Process]:
    """`underpass up` on both, each a bridge for the WireGuard on port 51820 of its host."""
    keys = [NodePrivate.generate(os.urandom) for _ in hosts]
    (directory / "map.json").write_text(relay_map.to_json())
    agents = []
    for number, host in enumerate(hosts):
        home = directory / host.name
        home.mkdir()
        (home / "node.key").write_text(keys[number].reveal())
        (home / "underpass.toml").write_text(
            f'key = "node.key"\nrelay_map = "{directory}/map.json"\n'
            'wireguard = "127.0.0.1:51820"\n'
            f'[[peers]]\nname = "other"\nkey = "{keys[1 - number].public()}"\nrelay = 900\n'
            'endpoint = "127.0.0.1:51901"\n'
        )
        command = [sys.executable, "-m", "traversal.cli", "up", "-c", f"{home}/underpass.toml"]
        quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        agents.append(await host.open_process(command, **quiet))
    return agents


async def wait_for_echo(a: Tunnel, b: Tunnel) -> None:
    """Until a datagram gets through the tunnel."""
    async with a.host:
        source = trio.socket.socket(type=trio.socket.SOCK_DGRAM)
        await source.bind((a.address, 0))
    async with b.host:
        sink = trio.socket.socket(type=trio.socket.SOCK_DGRAM)
        await sink.bind((b.address, 0))
    with source, sink, trio.fail_after(30):
        while True:
            await source.sendto(b"hello", sink.getsockname())
            with trio.move_on_after(0.2):
                await sink.recvfrom(100)
                return


async def tunnel_pair(
    a: KernelHost, b: KernelHost, endpoints: tuple[str, str], subnet: str, ports: tuple[int, int]
) -> tuple[Tunnel, Tunnel]:
    """Two joined wireguard-go; `endpoints` is where each finds the other."""
    keys = Key(), Key()
    ends = [
        await open_tunnel(host, f"wg{host.name}{ports[0]}", key, f"{subnet}.{number}", port)
        for number, (host, key, port) in enumerate(zip((a, b), keys, ports, strict=True), 1)
    ]
    for end, other, key, endpoint in zip(ends, ends[::-1], keys[::-1], endpoints, strict=True):
        await end.add_peer(key, f"{other.address}/32", endpoint)
    return ends[0], ends[1]


async def measure_wireguard(
    lab: KernelLab, relay_map: RelayMap, sizes: Sequence[int], seconds: float
) -> list[Row]:
    """Plain, and over the agents."""
    a, b = lab.host("a"), lab.host("b")
    rows = []
    plain = await tunnel_pair(
        a, b, (f"{b.addresses[0]}:51830", f"{a.addresses[0]}:51830"), "10.88.1", (51830, 51830)
    )
    with tempfile.TemporaryDirectory() as directory:
        agents = await start_agents((a, b), relay_map, Path(directory))
        bridged = await tunnel_pair(
            a, b, ("127.0.0.1:51901", "127.0.0.1:51901"), "10.88.2", (51820, 51820)
        )
        for name, pair, programs in (
            ("wireguard-go", plain, ()),
            ("wireguard-go, bridge", bridged, agents),
        ):
            await wait_for_echo(*pair)
            await trio.sleep(2)
            addresses = pair[0].address, pair[1].address
            processes = [end.process for end in pair if end.process is not None]
            async with bursts(name, a, b, addresses, *processes, *programs) as way:
                rows += [await measure(way, size, seconds) for size in sizes]
    return rows


# ---- the run


async def run(seconds: float, sizes: Sequence[int]) -> dict[str, object]:
    """Everything, in one lab."""
    rows = []
    problem = wireguard.why_not()
    if not problem:
        wireguard.hide_run_directory()
    async with KernelLab(TOPOLOGY) as lab, start_relay(lab) as relay_map:
        a, b = lab.host("a"), lab.host("b")
        addresses = a.addresses[0], b.addresses[0]
        async with bare_sockets(a, b) as way:
            rows += [await measure(way, size, seconds) for size in sizes]
        async with bursts("bare UDP, bursts", a, b, addresses) as way:
            rows += [await measure(way, size, seconds) for size in sizes]
        async with trio.open_nursery() as nursery:
            nodes = [await nursery.start(open_on, host, relay_map) for host in (a, b)]
            link, other = await join(*nodes)
            for way in link_ways(link, other):
                rows += [await measure(way, size, seconds) for size in sizes]
            nursery.cancel_scope.cancel()
        if not problem:
            rows += await measure_wireguard(lab, relay_map, sizes, seconds)
    return {
        "rows": [asdict(row) for row in rows],
        "no_wireguard_because": problem or None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--seconds", type=float, default=1.0, help="for each row")
    parser.add_argument("--sizes", type=int, nargs="*", default=[100, 1300])
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()

    def work() -> bytes:
        return json.dumps(trio.run(run, options.seconds, options.sizes)).encode()

    result = json.loads(call_in_jail(work, timeout_seconds=LIMIT_SECONDS))
    if options.json:
        print(json.dumps(result, indent=2))
        return
    for row in result["rows"]:
        print(
            f"{row['way']:21} {row['datagram_bytes']:5} B "
            f"{row['datagrams_per_second']:10.0f}/s {row['gbit_per_second']:6.2f} Gbit/s "
            f"{row['cpu_us_per_datagram']:6.2f} us CPU  {row['arrived_ratio']:7.2%} arrived"
        )
    if result["no_wireguard_because"]:
        print(f"no wireguard-go: {result['no_wireguard_because']}")


if __name__ == "__main__":
    main()
