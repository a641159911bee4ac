"""How fast the kernel back end of the lab is, and whether what was measured really worked.

    python tests/bench/lab.py [--json] [--quick]

Every row states its goal. A row is only printed when its packets arrived where they should; the
exit status is 1 when something failed to work, not when a goal was missed: a shared machine may
be slow.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import trio

from netlab.kernel.builder import Built
from netlab.kernel.fidelity import Engine
from netlab.kernel.jail import call_in_jail
from netlab.kernel.lab import KernelLab
from netlab.kernel.namespaces import NetworkNamespace, raise_descriptor_limit
from netlab.kernel.wiring import Wiring, plan_wiring
from netlab.model import (
    Host,
    Link,
    Mapping,
    Nat,
    NatBehavior,
    PortAllocation,
    PortAssignment,
    Server,
    Topology,
    Uplink,
)

PAYLOAD = b"x" * 72  # a 100-byte packet


@dataclass(frozen=True)
class Row:
    """One result."""

    name: str
    value: float
    unit: str
    goal: str
    note: str = ""


def homes(count: int, servers: int = 3) -> Topology:
    """Return a topology of NATs with one host each, every second one hard."""
    hard = NatBehavior(mapping=Mapping.APDM, ports=PortAllocation(assignment=PortAssignment.RANDOM))
    return Topology(
        nats=tuple(
            Nat(name=f"n{i}", behavior=hard if i % 2 else NatBehavior()) for i in range(count)
        ),
        hosts=tuple(Host(name=f"h{i}", uplinks=(Uplink(network=f"n{i}"),)) for i in range(count)),
        servers=tuple(Server(name=f"s{i}") for i in range(servers)),
    )


def bound(namespace: NetworkNamespace, address: str = "", port: int = 0) -> socket.socket:
    made = namespace.socket(socket.AF_INET, socket.SOCK_DGRAM)
    made.bind((address, port))
    made.settimeout(5)
    return made


def round_trip(built: Built, wiring: Wiring, host: str) -> None:
    """Send a packet from a host through its NAT to the first server and back."""
    address = str(wiring.addresses.servers["s0"].ipv4[0])
    with (
        bound(built.namespaces["s0"], address, 3478) as server,
        bound(built.namespaces[host]) as client,
    ):
        client.sendto(b"there", (address, 3478))
        data, seen = server.recvfrom(100)
        server.sendto(b"back", seen)
        nat = wiring.addresses.nats["n" + host[1:]]
        assert (data, seen[0]) == (b"there", str(nat.outside.ipv4[0]))
        assert client.recv(100) == b"back"


def bench_reference_lab(repeats: int) -> Iterator[Row]:
    ups, downs = [], []
    for _ in range(repeats):
        start = time.perf_counter()
        wiring = plan_wiring(homes(2))
        built = Built(wiring)
        built.build()
        round_trip(built, wiring, "h0")
        up = time.perf_counter()
        built.close()
        ups.append((up - start) * 1e3)
        downs.append((time.perf_counter() - up) * 1e3)
    ups.sort()
    note = f"p90 {ups[int(repeats * 0.9)]:.1f}, best {ups[0]:.1f}, {repeats} labs back to back"
    yield Row("reference lab up, first packet", statistics.median(ups), "ms", "<= 15", note)
    yield Row("reference lab down", statistics.median(downs), "ms", "<= 1")


def bench_many_nats(count: int) -> Iterator[Row]:
    start = time.perf_counter()
    wiring = plan_wiring(homes(count))
    built = Built(wiring)
    built.build()
    took = time.perf_counter() - start
    for number in range(0, count, max(1, count // 50)):
        round_trip(built, wiring, f"h{number}")
    built.close()
    yield Row(f"{count} NATs + {count} clients up", took, "s", "<= 5", "50 of them tried")


# Sends at a steady rate from a process of its own: rate, seconds, address, port, payload bytes.
SENDER = """
import socket, sys, time
rate, seconds, address, port, size = sys.argv[1:]
rate, seconds = float(rate), float(seconds)
client = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
client.connect((address, int(port)))
payload, sent, start = b"x" * int(size), 0, time.perf_counter()
while (now := time.perf_counter() - start) < seconds:
    due = int(now * rate)
    while sent < due:
        client.send(payload)
        sent += 1
    time.sleep(0.0002)
print(sent, time.perf_counter() - start)
"""


def measure_rate(lab: KernelLab, rate: float, seconds: float) -> tuple[float, float, float]:
    """Return packets/s offered, the share that arrived, and the fabric's seconds per packet.

    The kernel counts what arrives, since a receiving Python process would be what is measured;
    what its socket could keep is compared with what was sent.
    """
    server_host = lab.host("s0")
    address = server_host.addresses[0]
    with bound(server_host.namespace, address, 3478) as server:
        server.setblocking(False)
        arrived, used = datagrams_in(server_host.namespace), cpu_seconds(lab.fabric.pid)
        arguments = [str(rate), str(seconds), address, "3478", str(len(PAYLOAD))]
        done = subprocess.run(
            lab.host("h0").command([sys.executable, "-c", SENDER, *arguments]),
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        time.sleep(0.2)  # what is still on its way
        used = cpu_seconds(lab.fabric.pid) - used
        kept = 0
        try:
            while True:
                assert server.recv(2000) == PAYLOAD
                kept += 1
        except BlockingIOError:
            assert kept
        # A datagram counts when it is read or when it finds the buffer full.
        arrived = datagrams_in(server_host.namespace) - arrived
    sent, took = done.stdout.split()
    return int(sent) / float(took), arrived / int(sent), used / max(1, arrived)


def datagrams_in(namespace: NetworkNamespace) -> int:
    """Return how many datagrams have reached a namespace's sockets, full ones included."""
    with namespace.entered(), open("/proc/thread-self/net/snmp") as file:
        names, values = (line.split() for line in file if line.startswith("Udp:"))
    counters = dict(zip(names[1:], map(int, values[1:]), strict=True))
    assert counters["InCsumErrors"] == 0
    return counters["InDatagrams"] + counters["RcvbufErrors"]


def cpu_seconds(pid: int) -> float:
    """Return the CPU time of a process, in nanoseconds' resolution, unlike that of its `stat`."""
    with open(f"/proc/{pid}/schedstat") as file:
        return int(file.read().split()[0]) / 1e9


def best_rate(lab: KernelLab, name: str, goal: float, quick: bool) -> Row:
    """Return the highest offered rate of which at most 1 % is lost."""
    best = (0.0, 0.0, 0.0)
    for rate in (10e3, 20e3, 40e3, 60e3, 80e3, 100e3, 120e3, 140e3, 170e3, 200e3):
        result = measure_rate(lab, rate, 0.5 if quick else 2.0)
        if result[1] >= 0.99 and result[0] > best[0]:
            best = result
        if result[1] < 0.9 or result[0] < rate * 0.9:
            break
    note = f"{best[1]:.2%} arrived, {best[2] * 1e6:.1f} us of CPU per packet"
    return Row(name, best[0], "packets/s", f">= {goal:.0f}", note)


async def bench_user_nat(quick: bool) -> list[Row]:
    async with KernelLab(homes(1), engines={"n0": Engine.USER}) as lab:
        return [best_rate(lab, "user-space NAT", 80e3, quick)]


def impaired(link: Link) -> Topology:
    return Topology(
        hosts=(Host(name="h0", uplinks=(Uplink(link=link),)),), servers=homes(0).servers
    )


async def bench_pump(quick: bool) -> list[Row]:
    rows = []
    async with KernelLab(impaired(Link(delay_seconds=0.025))) as lab:
        rows.append(best_rate(lab, "pump, 25 ms delay", 100e3, quick))
    async with KernelLab(impaired(Link(delay_seconds=0.025))) as lab:
        rows.append(measure_delay(lab, 50 if quick else 300))
    return rows


def measure_delay(lab: KernelLab, probes: int) -> Row:
    """Measure how late packets arrive that should take 25 ms each way."""
    server_host = lab.host("s0")
    address = server_host.addresses[0]
    errors = []
    with (
        bound(server_host.namespace, address, 3478) as server,
        bound(lab.host("h0").namespace) as client,
    ):
        for _ in range(probes):
            start = time.perf_counter()
            client.sendto(PAYLOAD, (address, 3478))
            _, seen = server.recvfrom(2000)
            one_way = time.perf_counter() - start
            server.sendto(PAYLOAD, seen)
            client.recv(2000)
            errors += [one_way - 0.025, time.perf_counter() - start - one_way - 0.025]
    assert min(errors) >= 0, "a packet arrived before its time"
    errors.sort()
    note = f"p95 {errors[int(len(errors) * 0.95)] * 1e3:.2f} ms, of 25 ms one way"
    return Row("pump, delay error", statistics.median(errors) * 1e3, "ms", "<= 0.3", note)


@contextmanager
def explained(name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        print(f"{name} did not work: {error!r}", file=sys.stderr)
        raise SystemExit(1) from error


def run(quick: bool) -> list[Row]:
    raise_descriptor_limit()
    rows: list[Row] = []
    with explained("reference lab"):
        rows += bench_reference_lab(20 if quick else 100)
    with explained("many NATs"):
        rows += bench_many_nats(100 if quick else 1000)
    with explained("user-space NAT"):
        rows += trio.run(bench_user_nat, quick)
    with explained("pump"):
        rows += trio.run(bench_pump, quick)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--quick", action="store_true", help="smaller and less precise")
    options = parser.parse_args()
    answer = call_in_jail(
        lambda: json.dumps([asdict(row) for row in run(options.quick)]).encode(),
        timeout_seconds=300,
    )
    rows = [Row(**row) for row in json.loads(answer)]
    if options.json:
        print(json.dumps([asdict(row) for row in rows], indent=2))
        return
    print(f"{os.cpu_count()} processors, load average {os.getloadavg()[0]:.1f}")
    for row in rows:
        value = f"{row.value:,.0f}" if row.value >= 1000 else f"{row.value:.2f}"
        print(f"{row.name:34} {value:>10} {row.unit:10} goal {row.goal:12} {row.note}")


if __name__ == "__main__":
    main()
