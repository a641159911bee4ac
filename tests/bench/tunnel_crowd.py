"""What a crowd of idle websockets, and a reader who stalls, cost others: on the public side of an
edge, through a connector: `python -m tests.bench.tunnel_crowd`.

In a network namespace with nothing but loopback, made by this benchmark: edge, connector and origin
are processes, the visitors are this one. The connector is ours, or the real cloudflared where
CLOUDFLARED_BIN names one. For each transport:

* alone: latency of a small request, one at a time.
* stalled: the same while a visitor has asked for a download and reads nothing of it.
* crowd: the same beside the websockets, of which every hundredth has to echo at the end; memory of
  edge and connector for each.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import trio

from netlab.kernel.jail import call_in_jail
from relay.edge.certificates import load_or_create_authority
from relay.edge.tunnel_files import create_tunnel
from tests.system.tunnel_lab import serve_origin

HOST = "app.example.com"
EDGE_PORT, VISITORS_PORT, ORIGIN_PORT = 7844, 8080, 8000
EDGES = ("127.0.0.1", "127.0.0.2", "127.0.0.3", "127.0.0.4")
PER_SOURCE = 1000
DOWNLOAD_BYTES = 200_000_000
LIMIT_SECONDS = 1800


@dataclass(frozen=True)
class Row:
    """Latency of a small request, and what there was beside it."""

    connector: str
    transport: str
    beside: str
    p50_ms: float
    p99_ms: float
    edge_kib_each: float = 0.0
    connector_kib_each: float = 0.0


async def serve_origin_forever() -> None:
    """The origin's process."""
    listeners = await trio.open_tcp_listeners(ORIGIN_PORT, host="127.0.0.1", backlog=4096)
    print("ready", flush=True)
    await trio.serve_listeners(serve_origin, listeners)


def edge_command(directory: Path) -> list[str]:
    settings = {
        "edge.listen": ",".join(f"{host}:{EDGE_PORT}" for host in EDGES),
        "edge.directory": str(directory),
        "edge.public.http": f"127.0.0.1:{VISITORS_PORT}",
        "edge.public.routes_file": str(directory / "routes.toml"),
        "edge.public.requests_per_tunnel": 20_000,
    }
    options = [word for k, v in settings.items() for word in ("--set", f"{k}={v}")]
    return [sys.executable, "-m", "relay.cli", "serve", "--dev", *options]


def connector_command(directory: Path, transport: str, tunnel: str) -> tuple[str, list[str]]:
    url = f"http://127.0.0.1:{ORIGIN_PORT}"
    program = os.environ.get("CLOUDFLARED_BIN")
    edges = [word for host in EDGES for word in ("--edge", f"{host}:{EDGE_PORT}")]
    if not program:
        run = [sys.executable, "-m", "traversal.cli", "tunnel", "run", "--protocol", transport]
        files = ["--ca", f"{directory}/ca.pem"]
        files += ["--credentials-file", f"{directory}/tunnels/web.json"]
        return "underpass", [*run, *edges, *files, "--url", url]
    start = [program, "tunnel", "--protocol", transport, "--no-prechecks", "--no-autoupdate"]
    start += ["--cacert", f"{directory}/ca.pem", "--metrics", "127.0.0.1:0", *edges, "run"]
    files = ["--credentials-file", f"{directory}/tunnels/web.json"]
    return "cloudflared", [*start, *files, "--url", url, tunnel]


@asynccontextmanager
async def program(command: Sequence[str], log: Path) -> AsyncIterator[trio.Process]:
    """A process, killed when the block is left."""
    with log.open("wb") as file:
        process = await trio.lowlevel.open_process(
            command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT
        )
    try:
        yield process
    finally:
        process.kill()
        with trio.CancelScope(shield=True):
            await process.wait()


async def connect(source: int) -> trio.SocketStream:
    """A visitor's connection; the edge bounds those of a source."""
    return await trio.open_tcp_stream(
        "127.0.0.1", VISITORS_PORT, local_address=f"127.0.1.{1 + source // PER_SOURCE}"
    )


async def open_websocket(number: int) -> trio.SocketStream:
    stream = await connect(number)
    await stream.send_all(
        f"GET /socket HTTP/1.1\r\nHost: {HOST}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n\r\n".encode()
    )
    head = b""
    while b"\r\n\r\n" not in head:
        data = await stream.receive_some(4096)
        assert data, "the edge closed a websocket"
        head += data
    assert head.startswith(b"HTTP/1.1 101"), head
    return stream


async def latencies(seconds: float) -> tuple[float, float]:
    """Of small requests on one connection: median and 99th percentile, in ms."""
    times = []
    async with await connect(0) as stream:
        end = time.perf_counter() + seconds
        while (began := time.perf_counter()) < end or len(times) < 100:
            await stream.send_all(f"GET /x HTTP/1.1\r\nHost: {HOST}\r\n\r\n".encode())
            answer = b""
            while not answer.endswith(b"\r\n\r\n/x"):
                answer += await stream.receive_some(4096)
            times.append(time.perf_counter() - began)
    cuts = statistics.quantiles(times, n=100)
    return cuts[49] * 1e3, cuts[98] * 1e3


def resident_kib(process: trio.Process) -> int:
    pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") // 1024


async def until_served() -> None:
    with trio.fail_after(60):
        while True:
            try:
                async with await connect(0) as stream:
                    await stream.send_all(f"GET /x HTTP/1.1\r\nHost: {HOST}\r\n\r\n".encode())
                    if b" 200 " in await stream.receive_some(4096):
                        return
            except OSError:
                pass
            await trio.sleep(0.2)


async def measure(options: argparse.Namespace, transport: str, directory: Path) -> list[Row]:
    tunnel = create_tunnel(str(directory), "web", os.urandom)
    load_or_create_authority(directory)
    (directory / "routes.toml").write_text(f'[[http]]\nhost = "{HOST}"\ntunnel = "web"\n')
    name, command = connector_command(directory, transport, str(tunnel.id))
    origin = [sys.executable, "-m", "tests.bench.tunnel_crowd", "--origin"]
    rows = []
    async with (
        program(origin, directory / "origin.log"),
        program(edge_command(directory), directory / "edge.log") as edge,
        program(command, directory / "connector.log") as connector,
    ):
        await until_served()
        await trio.sleep(3)  # the other connections
        rows.append(Row(name, transport, "nothing", *await latencies(options.seconds)))
        async with await connect(1) as stalled:
            request = f"GET /bytes/{DOWNLOAD_BYTES} HTTP/1.1\r\nHost: {HOST}\r\n\r\n"
            await stalled.send_all(request.encode())
            await trio.sleep(3)
            rows.append(Row(name, transport, "stalled", *await latencies(options.seconds)))
        await trio.sleep(1)
        before = resident_kib(edge), resident_kib(connector)
        websockets: list[trio.SocketStream] = []

        async def open_share(share: int) -> None:
            websockets.extend(
                [await open_websocket(n) for n in range(share, options.websockets, 16)]
            )

        async with trio.open_nursery() as nursery:
            for share in range(16):
                nursery.start_soon(open_share, share)
        await trio.sleep(1)
        each = [
            (resident_kib(process) - start) / options.websockets
            for process, start in zip((edge, connector), before, strict=True)
        ]
        beside = f"{options.websockets} websockets"
        rows.append(Row(name, transport, beside, *await latencies(options.seconds), *each))
        for websocket in websockets[::100]:
            await websocket.send_all(b"still here")
            assert await websocket.receive_some(100) == b"still here"
        for websocket in websockets:
            await websocket.aclose()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--websockets", type=int, default=10_000)
    parser.add_argument("--seconds", type=float, default=5.0, help="for each latency")
    parser.add_argument("--transports", nargs="+", default=["http2", "quic"])
    parser.add_argument("--json", action="store_true", help="print JSON lines")
    parser.add_argument("--origin", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    # Every process holds a socket for each websocket.
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if options.origin:
        trio.run(serve_origin_forever)

    def in_jail() -> bytes:
        rows: list[Row] = []
        for transport in options.transports:
            with tempfile.TemporaryDirectory() as directory:
                rows += trio.run(measure, options, transport, Path(directory))
        return json.dumps([asdict(row) for row in rows]).encode()

    for row in json.loads(call_in_jail(in_jail, timeout_seconds=LIMIT_SECONDS)):
        if options.json:
            print(json.dumps(row))
            continue
        cells = [f"{v:9.1f}" if isinstance(v, float) else f"{v!s:>16}" for v in row.values()]
        names = ", ".join(name for name, v in row.items() if isinstance(v, float))
        print(*cells, f"  ({names})")


if __name__ == "__main__":
    main()
