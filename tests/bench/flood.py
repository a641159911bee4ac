"""What hostile datagrams cost a node, as fast as they can be sent: `python -m tests.bench.flood`.

A namespace each for a node, its peer and an attacker, on one bridge. The node sends its peer 500
numbered datagrams a second, which come back; meanwhile the attacker sends datagrams of one kind for
some seconds, as fast as one process can. The node is this process; peer and attacker are processes
of their own, so processor time is the node's alone.

* `random`: of all sizes, from one address;
* `disco`: as if sealed by the peer's disco key, which is public: each costs an attempt to open it;
* `stranger`: as if sealed by the disco key of nobody;
* `STUN`: answers with the right cookie and any transaction, and requests;
* `introduction`, `geneve`: those of our own nodes and of peer relays, with nonsense in them;
* `replay`: all that the node got while the path was found, again, from 200 addresses;
* `mixed`: all of these.

`taken` is what the node's sockets took of it, `CPU` the node's processor time per taken datagram
beyond what the same time costs in peace, `genuine` how much of the node's own traffic came back.
What the node keeps is counted before and after: entries of its tables, tasks, and memory.
The exit status is 1 if a table grew by more than its bound, or the link did not survive.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final
from unittest.mock import patch

import trio

from netlab.kernel.jail import call_in_jail
from netlab.kernel.lab import KernelLab
from netlab.model import Host, Nat, Server, Topology, Uplink
from netlab.presets import class_behavior
from tests.kept import count_kept
from tests.system.kernel_world import start_relay
from traversal import Link, Node, NodePrivate, NodePublic, PathKind, RelayMap, open_node
from traversal.io.udp import Batch
from traversal.paths.candidates import MAX_CANDIDATES
from traversal.reception import Reception
from traversal.wire.disco import MAGIC
from traversal.wire.introduction import MAGIC as INTRODUCTION

PER_SECOND: Final = 500
ATTACKERS: Final = 200
"""Source addresses of replayed datagrams: ports, and the same to a node."""
VARIETY: Final = 2000
"""Different datagrams of each kind."""
MAX_GROWTH_KIB: Final = 4096
MAX_ENTRIES: Final = 10 * MAX_CANDIDATES
"""A replayed Ping of the peer makes its source a candidate, one of 100 at most, for 45 s. Each has
an entry in a few tables."""
SETTLE_SECONDS: Final = 1.0

TOPOLOGY: Final = Topology(
    hosts=tuple(Host(name=name, uplinks=(Uplink(network="site"),)) for name in ("a", "b", "x")),
    nats=(Nat(name="site", behavior=class_behavior("EIM+APDF")),),
    servers=(Server(name="r0"),),
)

_COOKIE: Final = b"\x21\x12\xa4\x42"

Make = Callable[[random.Random, bytes], bytes]
KINDS: Final[dict[str, Make]] = {
    "random": lambda rng, _: rng.randbytes(rng.randrange(1, 1400)),
    "disco": lambda rng, key: MAGIC + key + rng.randbytes(24 + 62),
    "stranger": lambda rng, _: MAGIC + rng.randbytes(32 + 24 + 62),
    "STUN": lambda rng, _: (
        bytes([rng.randrange(2), 1, 0, 12]) + _COOKIE + rng.randbytes(12) + b"\0\x20\0\x08\0\1"
    ) + rng.randbytes(6),
    "introduction": lambda rng, _: INTRODUCTION + rng.randbytes(120),
    "geneve": lambda rng, _: b"\0\0\x7a" + bytes([rng.choice((0x11, 0x12))]) + rng.randbytes(3)
    + b"\0" + MAGIC + rng.randbytes(118),
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """What one kind did; growth is of everything that the node keeps."""

    kind: str
    sent_per_second: float
    taken_per_second: float
    cpu_us: float
    cpu_share: float
    genuine_ratio: float
    is_still_direct: bool
    grown_entries: int
    grown_tasks: int
    grown_kib: int

    @property
    def is_well(self) -> bool:
        return (
            self.grown_entries <= MAX_ENTRIES
            and self.grown_tasks <= 0
            and self.grown_kib <= MAX_GROWTH_KIB
            and self.genuine_ratio > 0
        )


# ---- the other processes


def attack(seconds: float, host: str, port: int, datagrams: Sequence[bytes], sources: int) -> int:
    """Send these over and over; returns how many left."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sockets = [socket.socket(family, socket.SOCK_DGRAM) for _ in range(sources)]
    for sock in sockets:
        sock.connect((host, port))
        sock.setblocking(False)
    sent = 0
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        sock = sockets[sent // 64 % sources]
        for _ in range(64):
            try:
                sock.send(datagrams[sent % len(datagrams)])
            except OSError:
                continue
            sent += 1
    return sent


async def echo(relay_map: RelayMap, key: NodePublic, region: int) -> None:
    """Be the peer: connect, and send back what comes."""
    private_key = NodePrivate.generate(os.urandom)
    async with open_node(private_key, relay_map, map_ports=False) as node:
        link = await node.connect(key, relay=region)
        await link.send(b"hello")
        while True:
            await link.send_many(await link.receive_many())


# ---- the node


class Traffic:
    """Numbered datagrams, and which of them came back since `begin`."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._sent = self._first = 0
        self._returned: set[int] = set()

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._receive)
            began = trio.current_time()
            while True:
                due = int((trio.current_time() - began) * PER_SECOND)
                while self._sent < due:
                    await self._link.send(bytes(4) + self._sent.to_bytes(4, "big") + bytes(92))
                    self._sent += 1
                await trio.sleep(0.01)

    async def _receive(self) -> None:
        while True:
            for datagram in await self._link.receive_many():
                if len(datagram) == 100:
                    number = int.from_bytes(datagram[4:8], "big")
                    if number >= self._first:
                        self._returned.add(number)

    def begin(self) -> None:
        self._first = self._sent
        self._returned = set()

    async def end(self) -> float:
        """The share of what was sent since `begin` that came back."""
        last = self._sent
        await trio.sleep(SETTLE_SECONDS)
        came = sum(number < last for number in self._returned)
        ratio = came / max(1, last - self._first)
        self.begin()
        return ratio


async def read_line(stream: trio.abc.ReceiveStream) -> str:
    line = b""
    while not line.endswith(b"\n"):
        line += await stream.receive_some() or b"\n"
    return line.decode().strip()


def resident_kib() -> int:
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGESIZE") // 1024


@contextmanager
def capturing(captured: list[bytes]) -> Iterator[None]:
    """For the block, nodes that open note what comes by UDP, up to `VARIETY` datagrams."""
    handle = Reception.handle_batch

    def note(reception: Reception, batch: Batch) -> None:
        if len(captured) < VARIETY:
            captured.extend(datagram for datagram, _ in batch)
        handle(reception, batch)

    with patch.object(Reception, "handle_batch", note):
        yield


async def run(seconds: float, kinds: Sequence[str]) -> list[Row]:
    """All kinds, one after the other, in one lab."""
    captured: list[bytes] = []
    with tempfile.TemporaryDirectory() as name, capturing(captured):
        directory = Path(name)
        async with (
            KernelLab(TOPOLOGY, observe=False) as lab,
            start_relay(lab) as relay_map,
            lab.host("a"),
            open_node(
                NodePrivate.generate(os.urandom),
                relay_map,
                map_ports=False,
                admit=lambda _: True,
            ) as node,
            trio.open_nursery() as nursery,
        ):
            (directory / "map.json").write_text(relay_map.to_json())
            peer = await lab.host("b").open_process(
                [
                    *(sys.executable, "-m", "tests.bench.flood", "--as", "peer"),
                    *(str(directory / "map.json"), str(node.public_key), str(node.home_region)),
                ]
            )
            try:
                link = await node.accept()
                with trio.fail_after(20):
                    while link.path.kind is not PathKind.DIRECT:  # noqa: ASYNC110
                        await trio.sleep(0.05)
                traffic = Traffic(link)
                nursery.start_soon(traffic.run)
                await trio.sleep(5)
                attacker = Attacker(lab, node, link, traffic, captured, directory)
                await attacker.measure_peace(seconds)
                rows = [await attacker.measure(kind, seconds) for kind in kinds]
            finally:
                peer.kill()
            nursery.cancel_scope.cancel()
    return rows


class Attacker:
    """Attacks `node` and looks at what becomes of it."""

    def __init__(
        self,
        lab: KernelLab,
        node: Node,
        link: Link,
        traffic: Traffic,
        captured: list[bytes],
        directory: Path,
    ) -> None:
        self._lab = lab
        self._node = node
        self._link = link
        self._traffic = traffic
        self._captured = captured
        self._directory = directory
        self._peace_cpu = 0.0

    def _make(self, kind: str) -> list[bytes]:
        rng = random.Random(kind)
        key = self._link._session.disco_key
        assert key is not None
        if kind == "replay":
            return self._captured
        if kind == "mixed":
            return [rng.choice(self._make(one)) for one in (*KINDS, "replay") for _ in range(300)]
        return [KINDS[kind](rng, key.raw) for _ in range(VARIETY)]

    async def measure_peace(self, seconds: float) -> None:
        """What the node's own traffic costs."""
        cpu = time.process_time()
        await trio.sleep(seconds)
        self._peace_cpu = (time.process_time() - cpu) / seconds

    async def measure(self, kind: str, seconds: float) -> Row:
        """One attack."""
        node, traffic = self._node, self._traffic
        datagrams = self._directory / "datagrams.json"
        datagrams.write_text(json.dumps([one.hex() for one in self._make(kind)]))
        udp = node.statistics().udp
        path = self._link.path
        # The family that the link does not use would be a softer target.
        address = self._lab.host("a").addresses[path.address is not None and path.address.is_ipv6]
        port = udp.ipv6_port if ":" in address else udp.ipv4_port
        command = [sys.executable, "-m", "tests.bench.flood", "--as", "attacker", str(datagrams)]
        sources = ATTACKERS if kind in ("replay", "mixed") else 1
        command += [address, str(port), str(seconds), str(sources)]
        kept, memory = count_kept(node), resident_kib()
        tasks = trio.lowlevel.current_statistics().tasks_living
        attacker = await self._lab.host("x").open_process(command, stdout=subprocess.PIPE)
        assert attacker.stdout is not None
        # It says when it begins and when it has ended.
        assert await read_line(attacker.stdout) == "begins"
        traffic.begin()
        taken = node.statistics().udp.datagrams_received
        cpu, began = time.process_time(), trio.current_time()
        sent = int(await read_line(attacker.stdout))
        lasted = trio.current_time() - began
        cpu = time.process_time() - cpu - self._peace_cpu * lasted
        taken = node.statistics().udp.datagrams_received - taken
        is_still_direct = self._link.path.kind is PathKind.DIRECT
        genuine = await traffic.end()
        await attacker.wait()
        hostile = max(1.0, taken - genuine * PER_SECOND * lasted)
        return Row(
            kind=kind,
            sent_per_second=sent / lasted,
            taken_per_second=hostile / lasted,
            cpu_us=cpu / hostile * 1e6,
            cpu_share=cpu / lasted,
            genuine_ratio=genuine,
            is_still_direct=is_still_direct,
            grown_entries=count_kept(node) - kept,
            grown_tasks=trio.lowlevel.current_statistics().tasks_living - tasks,
            grown_kib=resident_kib() - memory,
        )


# ---- the run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    every = [*KINDS, "replay", "mixed"]
    parser.add_argument("--seconds", type=float, default=10.0, help="for each kind")
    parser.add_argument("--kinds", nargs="*", choices=every, default=every)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()

    def work() -> bytes:
        return json.dumps(
            [asdict(row) for row in trio.run(run, options.seconds, options.kinds)]
        ).encode()

    limit = 60 + (options.seconds + 10) * (len(options.kinds) + 1)
    rows = [Row(**row) for row in json.loads(call_in_jail(work, timeout_seconds=limit))]
    if options.json:
        print(json.dumps([asdict(row) for row in rows], indent=2))
    else:
        print(f"{os.cpu_count()} processors, load average {os.getloadavg()[0]:.1f}")
        for row in rows:
            print(
                f"{row.kind:12} {row.sent_per_second:8.0f}/s sent {row.taken_per_second:8.0f}/s "
                f"taken {row.cpu_us:6.2f} us CPU {row.cpu_share:4.0%} of a core  "
                f"genuine {row.genuine_ratio:7.2%} {'direct' if row.is_still_direct else 'relay':6}"
                f"  {row.grown_entries:+d} entries {row.grown_tasks:+d} tasks "
                f"{row.grown_kib:+d} KiB{'' if row.is_well else '  NOT WELL'}"
            )
    sys.exit(not all(row.is_well for row in rows))


def be_another(role: str, arguments: Sequence[str]) -> None:
    """The processes that this benchmark starts."""
    if role == "peer":
        relay_map, key, region = arguments
        trio.run(
            echo, RelayMap.parse(Path(relay_map).read_text()), NodePublic.parse(key), int(region)
        )
        return
    datagrams, host, port, seconds, sources = arguments
    raw = [bytes.fromhex(one) for one in json.loads(Path(datagrams).read_text())]
    print("begins", flush=True)
    print(attack(float(seconds), host, int(port), raw, int(sources)), flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--as"]:
        be_another(sys.argv[2], sys.argv[3:])
    else:
        main()
