"""What the edge costs, with a connector behind it: `python -m tests.bench.tunnel`.

In a network namespace with nothing but loopback, made by this benchmark: an edge, in this process,
a connector and an origin, each a process of its own. The connectors are `underpass tunnel run` and,
where CLOUDFLARED_BIN names one, the real cloudflared. Each is visited in two ways: "inner" is the
edge's interface to its connections, used by this process, so that its part of the work is in the
edge's CPU; "public" is HTTP/1.1 over TLS, kept alive, from one more process.

* bulk: MB/s down and up on one stream and on four, and the edge's CPU for a MB. Every byte is
  compared.
* requests: of a 14-byte answer, at 1 and 32 in flight: rate, latency, the edge's CPU for a request.
* idle: memory of the edge for a connection that has registered and does nothing, measured with
  connectors of a few lines in another process.
* peers: packets of 1100 bytes from one node to another, both in one further process, with 128 in
  flight: how many arrive, and the edge's CPU for each.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import ssl
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any
from uuid import uuid4

import trio
import trustme

from netlab.kernel.jail import call_in_jail
from relay.config import Config
from relay.edge.certificates import HTTP2_NAME, authority_path, load_or_create_authority
from relay.edge.connection import Exchange, RequestHead, TunnelConnection
from relay.edge.registry import Tunnel
from relay.edge.service import Edge
from relay.edge.tunnel_files import create_tunnel, read_tunnel, tunnels_directory
from relay.listeners import open_listeners
from tests.bench.tunnel_ends import BLOCK, HELLO, HOST, is_right, serve_origin, visit
from tests.relay.edge.fake_connector import FakeConnector
from traversal.io.edge_client import EdgeClient, EdgeOptions
from traversal.io.edge_dial import EdgeAddress
from traversal.io.http2 import Http2Connection
from traversal.io.quic_endpoints import dial_quic
from traversal.io.quic_settings import connector_configuration
from traversal.io.stream import HandshakeStream
from traversal.keys import NodePrivate
from traversal.tunnel.edge_connection import EdgeConnection
from traversal.tunnel.transport_choice import Transport
from traversal.wire.address import Address
from traversal.wire.tunnel.registration import (
    FEATURE_DATAGRAM_V3,
    ConnectionOptions,
    RegisterConnection,
)

HOSTS = ["127.0.0.1", "127.0.0.2", "127.0.0.3", "127.0.0.4"]
PORT = 7844
CHUNK = 256 << 10
WARM_CONNECTIONS = 20
"""What the first ones cost once is not counted."""
IN_FLIGHT = 128
PACKET = bytes(range(220)) * 5
PUBLIC_PORT = 8443
LIMIT_SECONDS = 900


# ---- connectors


def cloudflared(directory: Path, tunnel: Tunnel, origin_port: int, transport: str) -> list[str]:
    """The command of the real one."""
    return [
        os.environ["CLOUDFLARED_BIN"], "tunnel", "--protocol", transport, "--no-prechecks",
        "--no-autoupdate", "--cacert", str(authority_path(directory)), "--metrics", "127.0.0.1:0",
        *(part for host in HOSTS for part in ("--edge", f"{host}:{PORT}")),
        "run", "--credentials-file", str(tunnels_directory(str(directory)) / f"{tunnel.name}.json"),
        "--url", f"http://127.0.0.1:{origin_port}", str(tunnel.id),
    ]  # fmt: skip


def underpass(directory: Path, tunnel: Tunnel, origin_port: int, transport: str) -> list[str]:
    """The command of ours."""
    return [
        sys.executable, "-m", "traversal.cli", "tunnel", "run", "--protocol", transport,
        *(part for host in HOSTS for part in ("--edge", f"{host}:{PORT}")),
        "--ca", str(authority_path(directory)),
        "--credentials-file", str(tunnels_directory(str(directory)) / f"{tunnel.name}.json"),
        "--url", f"http://127.0.0.1:{origin_port}",
    ]  # fmt: skip


async def hold_connections(directory: Path, transport: Transport, count: int) -> None:
    """Register connections as quickly as possible and keep them."""
    tunnel = read_tunnel(next(tunnels_directory(str(directory)).glob("*.json")))
    ca_file = str(authority_path(directory))
    context = ssl.create_default_context(cafile=ca_file)

    async def hold_quic(nursery: trio.Nursery, *, task_status: trio.TaskStatus[None]) -> None:
        quic = await dial_quic(nursery, (HOSTS[0], PORT), connector_configuration(ca_file))
        credentials = tunnel.credentials
        request = RegisterConnection(
            credentials.account_tag,
            credentials.secret,
            credentials.tunnel_id,
            0,
            ConnectionOptions(uuid4(), (FEATURE_DATAGRAM_V3,)),
        )
        connection = EdgeConnection(Transport.QUIC, Address(HOSTS[0], PORT), request, quic.close)
        await connection.register(await quic.open_stream())
        task_status.started()
        await quic.wait_over()

    async def hold_http2(nursery: trio.Nursery, *, task_status: trio.TaskStatus[None]) -> None:
        tcp = await trio.open_tcp_stream(HOSTS[0], PORT)
        stream = HandshakeStream(tcp.socket)
        await stream.start_tls(context, server_side=False, server_hostname=HTTP2_NAME)
        http2 = Http2Connection(stream, client_side=False)
        await nursery.start(http2.run)
        connector = FakeConnector(http2, uuid4(), 0)
        await connector.accept_control()
        await connector.register(connector.registration(tunnel.credentials))
        task_status.started()
        await trio.sleep_forever()

    async with trio.open_nursery() as nursery:
        for _ in range(count):
            await nursery.start(hold_quic if transport is Transport.QUIC else hold_http2, nursery)
        print("ready", flush=True)


# ---- nodes


class _Counting:
    """A node's handler."""

    received = 0

    def handle_edge_packet(self, source: bytes, payload: bytes) -> None:
        assert payload == PACKET
        self.received += 1

    def handle_edge_peer_gone(self, key: bytes) -> None:
        raise AssertionError("the edge does not know the other node")

    def handle_edge_change(self, *, is_up: bool) -> None:
        pass


async def send_packets(directory: Path, transport: Transport, seconds: float) -> None:
    """Two nodes, one of which sends to the other; prints how many were sent and arrived."""
    options = EdgeOptions(
        (EdgeAddress(HOSTS[0], PORT),),
        read_tunnel(next(tunnels_directory(str(directory)).glob("*.json"))).credentials,
        ca_file=str(authority_path(directory)),
        transports=(transport,),
    )
    keys = [NodePrivate.generate(os.urandom) for _ in range(2)]
    counts = [_Counting(), _Counting()]
    clients = [
        EdgeClient(options, key, count, entropy=os.urandom, rng=random.Random(1))
        for key, count in zip(keys, counts, strict=True)
    ]
    sender, destination = clients[0], keys[1].public().raw
    async with trio.open_nursery() as nursery:
        for client in clients:
            nursery.start_soon(client.run)
        while not all(client.is_connected for client in clients):  # noqa: ASYNC110
            await trio.sleep(0.01)
        await trio.sleep(1)  # the path's MTU
        print("ready", flush=True)
        began = progress_at = now = time.perf_counter()
        sent = lost = received = 0
        while now - began < seconds:
            if counts[1].received > received:
                received, progress_at = counts[1].received, now
            elif now - progress_at > 0.2:
                lost, progress_at = sent - received, now  # they will not come any more
            while sent - received - lost < IN_FLIGHT:
                sender.send(destination, PACKET)
                sent += 1
            await trio.lowlevel.checkpoint()
            now = time.perf_counter()
        await trio.sleep(0.2)
        print(sent, counts[1].received, now - began, flush=True)
        nursery.cancel_scope.cancel()


# ---- measuring


@dataclass(frozen=True)
class BulkRow:
    """Bodies of many megabytes."""

    connector: str
    transport: str
    side: str
    direction: str
    streams: int
    mb_per_second: float
    edge_cpu_ms_per_mb: float


@dataclass(frozen=True)
class RequestsRow:
    """Small requests."""

    connector: str
    transport: str
    side: str
    in_flight: int
    requests_per_second: float
    p50_ms: float
    p99_ms: float
    edge_cpu_us_per_request: float


@dataclass(frozen=True)
class IdleRow:
    """What a connection costs that does nothing."""

    transport: str
    connections: int
    kib_per_connection: float


@dataclass(frozen=True)
class PeersRow:
    """Packets between two nodes."""

    transport: str
    packets_per_second: float
    lost_percent: float
    edge_cpu_us_per_packet: float


Pick = Callable[[], TunnelConnection]


def get(path: str) -> RequestHead:
    return RequestHead("GET", "https", HOST, path, ())


async def expect_success(exchange: Exchange) -> None:
    response = await exchange.response()
    assert response.status == 200, response


async def download(pick: Pick, size: int) -> None:
    """One body, compared."""
    async with await pick().request(get(f"/bytes/{size}")) as exchange:
        await expect_success(exchange)
        at = 0
        while data := await exchange.receive():
            assert is_right(data, at)
            at += len(data)
        assert at == size


async def upload(pick: Pick, size: int) -> None:
    """One body; the origin compares."""
    headers = ((b"content-length", str(size).encode()),)
    head = RequestHead("POST", "https", HOST, "/sink", headers, has_body=True)
    async with await pick().request(head) as exchange:
        for start in range(0, size, CHUNK):
            await exchange.send(BLOCK[start % len(BLOCK) : start % len(BLOCK) + CHUNK])
        await exchange.send_end()
        await expect_success(exchange)
        assert await exchange.receive() == HELLO


async def in_parallel(work: Callable[[], Awaitable[None]], count: int) -> None:
    async with trio.open_nursery() as nursery:
        for _ in range(count):
            nursery.start_soon(work)


async def measure_bulk(
    name: str, transport: str, pick: Pick, streams: int, megabytes: int
) -> list[BulkRow]:
    size = megabytes * (1 << 20) // streams
    rows = []
    for direction, move in (("down", download), ("up", upload)):

        async def work(move: Callable[[Pick, int], Awaitable[None]] = move) -> None:
            await move(pick, size)

        await move(pick, 1 << 20)
        began, cpu = time.perf_counter(), time.process_time()
        await in_parallel(work, streams)
        elapsed, cpu = time.perf_counter() - began, time.process_time() - cpu
        moved = size * streams / 1e6
        rows.append(
            BulkRow(
                name, transport, "inner", direction, streams, moved / elapsed, cpu / moved * 1e3
            )
        )
    return rows


async def measure_requests(
    name: str, transport: str, pick: Pick, in_flight: int, seconds: float
) -> RequestsRow:
    times: list[float] = []
    until = time.perf_counter() + 0.5

    async def work() -> None:
        while (began := time.perf_counter()) < until:
            async with await pick().request(get("/hello")) as exchange:
                await expect_success(exchange)
                assert await exchange.receive() == HELLO
            times.append(time.perf_counter() - began)

    await in_parallel(work, in_flight)
    times.clear()
    until = time.perf_counter() + seconds
    began, cpu = time.perf_counter(), time.process_time()
    await in_parallel(work, in_flight)
    elapsed, cpu = time.perf_counter() - began, time.process_time() - cpu
    return requests_row(name, transport, "inner", in_flight, elapsed, cpu, times)


def requests_row(
    name: str,
    transport: str,
    side: str,
    in_flight: int,
    seconds: float,
    cpu: float,
    times: list[float],
) -> RequestsRow:
    cuts = statistics.quantiles(times, n=100)
    return RequestsRow(
        name,
        transport,
        side,
        in_flight,
        len(times) / seconds,
        cuts[49] * 1e3,
        cuts[98] * 1e3,
        cpu / len(times) * 1e6,
    )


async def run_visitors(work: str, count: int, amount: float) -> tuple[Any, float]:
    """The result of visitors of the public side, and the edge's CPU seconds."""
    command = [sys.executable, "-m", "tests.bench.tunnel", "--visit", work, str(count)]
    async with program([*command, str(amount)]) as process:
        assert process.stdout is not None
        assert await trio.to_thread.run_sync(process.stdout.readline) == b"ready\n"
        cpu = time.process_time()
        line = await trio.to_thread.run_sync(process.stdout.readline)
        return json.loads(line), time.process_time() - cpu


async def measure_public_bulk(
    name: str, transport: str, streams: int, megabytes: int
) -> list[BulkRow]:
    size = megabytes * (1 << 20) // streams
    moved = size * streams / 1e6
    rows = []
    for direction in ("down", "up"):
        elapsed, cpu = await run_visitors(direction, streams, size)
        rows.append(
            BulkRow(
                name, transport, "public", direction, streams, moved / elapsed, cpu / moved * 1e3
            )
        )
    return rows


async def measure_public_requests(
    name: str, transport: str, in_flight: int, seconds: float
) -> RequestsRow:
    times, cpu = await run_visitors("requests", in_flight, seconds)
    return requests_row(name, transport, "public", in_flight, seconds, cpu, times)


def _resident_kib() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") // 1024


async def measure_idle(
    held: AsyncExitStack, edge: Edge, directory: Path, transport: str, count: int
) -> IdleRow:
    """Leaves its connections in `held`, so that the next ones can't use their memory again."""

    async def hold(more: int) -> int:
        known = sum(1 for _ in edge.registry.connections())
        command = [sys.executable, "-m", "tests.bench.tunnel", "--hold", transport, str(more)]
        process = await held.enter_async_context(program([*command, str(directory)]))
        assert process.stdout is not None
        await trio.to_thread.run_sync(process.stdout.readline)
        assert sum(1 for _ in edge.registry.connections()) == known + more
        return _resident_kib()

    before = await hold(WARM_CONNECTIONS)
    return IdleRow(transport, count, (await hold(count) - before) / count)


async def measure_peers(directory: Path, transport: Transport, seconds: float) -> PeersRow:
    command = [sys.executable, "-m", "tests.bench.tunnel", "--seconds", str(seconds)]
    command += ["--peers", transport.value, str(directory)]
    async with program(command) as process:
        assert process.stdout is not None
        await trio.to_thread.run_sync(process.stdout.readline)
        cpu = time.process_time()
        line = await trio.to_thread.run_sync(process.stdout.readline)
        cpu = time.process_time() - cpu
    sent, received, elapsed = map(float, line.split())
    return PeersRow(
        transport.value, received / elapsed, 100 * (1 - received / sent), cpu / received * 1e6
    )


# ---- the stage


@asynccontextmanager
async def program(command: Sequence[str]) -> AsyncIterator[subprocess.Popen[bytes]]:
    """A process, killed when the block is left."""
    process = await trio.to_thread.run_sync(
        partial(subprocess.Popen, command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def write_public_files(directory: Path) -> None:
    """A route to the tunnel, and a certificate of its host."""
    (directory / "routes.toml").write_text(f'[[http]]\nhost = "{HOST}"\ntunnel = "web"\n')
    (directory / "visitors").mkdir()
    certificate = trustme.CA().issue_cert(HOST)
    chain = b"".join(pem.bytes() for pem in certificate.cert_chain_pems)
    (directory / "visitors" / "app.crt").write_bytes(chain)
    certificate.private_key_pem.write_to_path(str(directory / "visitors" / "app.key"))


@asynccontextmanager
async def running_edge(directory: Path) -> AsyncIterator[Edge]:
    settings = {
        "edge.listen": [f"{host}:{PORT}" for host in HOSTS],
        "edge.directory": str(directory),
        "edge.public.https": f"127.0.0.1:{PUBLIC_PORT}",
        "edge.public.routes_file": str(directory / "routes.toml"),
        "edge.public.certificates": str(directory / "visitors"),
    }
    config = Config.dev(settings)
    listeners = [sock for place in config.edge.listen for sock in open_listeners(place)]
    edge = Edge(config, listeners)
    async with trio.open_nursery() as nursery:
        await nursery.start(edge.run)
        yield edge
        nursery.cancel_scope.cancel()


async def run(options: argparse.Namespace, directory: Path) -> list[object]:
    rows: list[object] = []
    tunnel = create_tunnel(str(directory), "web", os.urandom)
    load_or_create_authority(directory)
    write_public_files(directory)
    origin = [sys.executable, "-m", "tests.bench.tunnel", "--origin"]
    async with running_edge(directory) as edge, program(origin) as process:
        assert process.stdout is not None
        origin_port = int(await trio.to_thread.run_sync(process.stdout.readline))

        def pick() -> TunnelConnection:
            connection = edge.registry.pick(tunnel.id)
            assert connection is not None
            return connection

        for name, transport in product(options.connectors, options.transports):
            command = {"underpass": underpass, "cloudflared": cloudflared}[name]
            async with program(command(directory, tunnel, origin_port, transport)):
                with trio.fail_after(30):
                    while sum(1 for _ in edge.registry.connections()) < 4:  # noqa: ASYNC110
                        await trio.sleep(0.1)
                for streams in (1, 4):
                    rows += await measure_bulk(name, transport, pick, streams, options.megabytes)
                    rows += await measure_public_bulk(name, transport, streams, options.megabytes)
                for in_flight in (1, 32):
                    rows.append(
                        await measure_requests(name, transport, pick, in_flight, options.seconds)
                    )
                    rows.append(
                        await measure_public_requests(name, transport, in_flight, options.seconds)
                    )
            await edge.registry.wait_empty()
        async with AsyncExitStack() as held:
            for transport in options.transports:
                rows.append(await measure_idle(held, edge, directory, transport, options.idle))
        await edge.registry.wait_empty()
        for transport in options.transports:
            rows.append(await measure_peers(directory, Transport(transport), options.seconds))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=5.0, help="for each requests row")
    parser.add_argument("--megabytes", type=int, default=256, help="for each bulk row")
    parser.add_argument(
        "--idle", type=int, default=100, help="connections of each idle row, at most 108"
    )
    parser.add_argument("--transports", nargs="+", default=["http2", "quic"])
    connectors = ["underpass"] + ["cloudflared"] * bool(os.environ.get("CLOUDFLARED_BIN"))
    parser.add_argument("--connectors", nargs="*", default=connectors)
    parser.add_argument("--json", action="store_true", help="print JSON lines")
    parser.add_argument("--origin", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--hold", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--visit", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--peers", help=argparse.SUPPRESS)
    parser.add_argument("directory", nargs="?", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.origin:
        serve_origin()
    if options.peers:
        directory = Path(options.directory)
        trio.run(send_packets, directory, Transport(options.peers), options.seconds)
        return
    if options.hold:
        transport, count = options.hold
        trio.run(hold_connections, Path(options.directory), Transport(transport), int(count))
    if options.visit:
        work, count, amount = options.visit
        visit(PUBLIC_PORT, work, int(count), float(amount))
        return

    def in_jail() -> bytes:
        with tempfile.TemporaryDirectory() as directory:
            rows = trio.run(run, options, Path(directory))
        return json.dumps([{"kind": type(row).__name__, **asdict(row)} for row in rows]).encode()  # type: ignore[call-overload]

    for row in json.loads(call_in_jail(in_jail, timeout_seconds=LIMIT_SECONDS)):
        kind = row.pop("kind").removesuffix("Row").lower()
        if options.json:
            print(json.dumps({"kind": kind, **row}))
            continue
        cells = [f"{v:10.1f}" if isinstance(v, float) else f"{v!s:>11}" for v in row.values()]
        names = ", ".join(name for name, v in row.items() if isinstance(v, float))
        print(f"{kind:9}", *cells, f"  ({names})")


if __name__ == "__main__":
    main()
