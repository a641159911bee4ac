"""Requests per second and CPU per request of the STUN server: `python -m tests.bench.stun`.

Our server, which drains its socket by hand and has its own codec, runs against the obvious one:
`trio.socket` with aioice's codec, one await for each datagram. Both answer the same load in the
same run, each in a process of its own, on loopback. Every answer is compared, byte for byte, with
the one that aioice's codec makes. The load is closed-loop: WINDOW requests are in flight, so that
it cannot exceed what the server takes.

Requests per second is what this machine did, generator included; requests per second and core is
one second divided by the CPU time per request, what one core could do for clients elsewhere.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import aioice.stun
import trio

from relay.stun import StunServer
from traversal.wire.stun import TransactionId, encode_binding_request

WINDOW = 64
ROUNDS = 2
REQUESTS = 4096
"""Different transaction ids, used in turn: far more than are in flight."""


async def serve_drained(report: Callable[[int], None]) -> None:
    """The relay's server."""
    async with trio.open_nursery() as nursery:
        [(_, port)] = await nursery.start(StunServer([("127.0.0.1", 0)]).serve)
        report(port)


async def serve_naive(report: Callable[[int], None]) -> None:
    """What anybody would write first."""
    with trio.socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        await sock.bind(("127.0.0.1", 0))
        report(sock.getsockname()[1])
        while True:
            datagram, source = await sock.recvfrom(2048)
            request = aioice.stun.parse_message(datagram)
            await sock.sendto(aioice_answer(request.transaction_id, source), source)


SERVERS: dict[str, Callable[[Callable[[int], None]], Awaitable[None]]] = {
    "drained": serve_drained,
    "naive": serve_naive,
}


def aioice_answer(transaction_id: bytes, source: tuple[str, int]) -> bytes:
    """The answer as a codec makes it that is not ours."""
    return bytes(
        aioice.stun.Message(
            message_method=aioice.stun.Method.BINDING,
            message_class=aioice.stun.Class.RESPONSE,
            transaction_id=transaction_id,
            attributes={"XOR-MAPPED-ADDRESS": source},
        )
    )


@dataclass(frozen=True, slots=True)
class Result:
    """One server under load."""

    server: str
    requests: int
    lost: int
    requests_per_second: float
    cpu_microseconds_per_request: float
    requests_per_second_and_core: float
    server_load_percent: float
    generator_load_percent: float


def cpu_seconds(pid: int) -> float:
    """CPU time of a process so far, in steps of 10 ms."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Load:
    """A closed loop of requests whose every answer is checked."""

    def __init__(self, port: int) -> None:
        self._sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._sock.connect(("127.0.0.1", port))
        # A lost datagram must not end the loop; the kernel's own timeout costs no extra call.
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", 0, 200_000))
        ids = [TransactionId(number.to_bytes(12, "big")) for number in range(REQUESTS)]
        self._requests = [encode_binding_request(transaction_id) for transaction_id in ids]
        local = self._sock.getsockname()
        self._answers = [aioice_answer(transaction_id, local) for transaction_id in ids]

    def run(self, seconds: float) -> tuple[int, int]:
        """Load the server; returns how many requests were answered and how many were lost."""
        requests, answers, sock = self._requests, self._answers, self._sock
        answered = lost = 0
        sent = WINDOW
        for request in requests[:WINDOW]:
            sock.send(request)
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            for _ in range(100):
                try:
                    datagram = sock.recv(2048)
                except BlockingIOError:
                    lost += WINDOW
                    for request in requests[:WINDOW]:
                        sock.send(request)
                    continue
                if datagram != answers[int.from_bytes(datagram[8:20], "big") % REQUESTS]:
                    raise SystemExit(f"wrong answer: {datagram.hex()}")
                answered += 1
                sock.send(requests[sent % REQUESTS])
                sent += 1
        for _ in range(WINDOW):
            sock.recv(2048)
        return answered + WINDOW, lost

    def close(self) -> None:
        self._sock.close()


def measure(name: str, seconds: float) -> Result:
    """Start a server in a process of its own, warm it up, load it, end it."""
    command = [sys.executable, "-m", "tests.bench.stun", "--serve", name]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            load = Load(int(server.stdout.readline()))
            load.run(0.2)
            server_before, own_before = cpu_seconds(server.pid), time.process_time()
            started = time.perf_counter()
            answered, lost = load.run(seconds)
            elapsed = time.perf_counter() - started
            server_cpu = cpu_seconds(server.pid) - server_before
            own_cpu = time.process_time() - own_before
            load.close()
        finally:
            server.kill()
    return Result(
        server=name,
        requests=answered,
        lost=lost,
        requests_per_second=answered / elapsed,
        cpu_microseconds_per_request=1e6 * server_cpu / answered,
        requests_per_second_and_core=answered / server_cpu,
        server_load_percent=100 * server_cpu / elapsed,
        generator_load_percent=100 * own_cpu / elapsed,
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.stun", description=__doc__)
    parser.add_argument("--seconds", type=float, default=1.0, help="per server and round")
    parser.add_argument("--json", action="store_true", help="print the results as JSON")
    parser.add_argument("--serve", choices=SERVERS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if not 0.1 <= arguments.seconds <= 60:
        parser.error("--seconds must be 0.1 to 60")
    if arguments.serve is not None:
        trio.run(SERVERS[arguments.serve], lambda port: print(port, flush=True))
        return
    results = [measure(name, arguments.seconds) for _ in range(ROUNDS) for name in SERVERS]
    if arguments.json:
        print(json.dumps([asdict(result) for result in results], indent=2))
        return
    print(
        f"{'server':<8} {'requests/s':>11} {'CPU us/request':>15} {'requests/s/core':>16} "
        f"{'server busy':>12} {'generator busy':>15} {'lost':>5}"
    )
    for result in results:
        print(
            f"{result.server:<8} {result.requests_per_second:>11,.0f} "
            f"{result.cpu_microseconds_per_request:>15.2f} "
            f"{result.requests_per_second_and_core:>16,.0f} "
            f"{result.server_load_percent:>11.0f}% {result.generator_load_percent:>14.0f}% "
            f"{result.lost:>5}"
        )
    print("Every answer was compared with the one of aioice's codec.")


if __name__ == "__main__":
    main()
