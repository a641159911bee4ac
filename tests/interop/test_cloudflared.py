"""Our edge with the real connector. Opt in: CLOUDFLARED_BIN=/path/to/cloudflared.

Each test runs in a network namespace with nothing but loopback, where the program can't reach
anybody else.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, nullcontext
from pathlib import Path

import pytest
import trio
import wsproto

from relay.config import Config
from relay.edge.certificates import authority_path, load_or_create_authority
from relay.edge.connection import Exchange, RequestHead, TunnelConnection
from relay.edge.registration import EdgeStage
from relay.edge.registry import Tunnel
from relay.edge.service import Edge
from relay.edge.tunnel_files import create_tunnel, tunnels_directory
from relay.listeners import open_listeners
from tests.system.tunnel_origin import Origin, pattern
from traversal.wire.tunnel.credentials import Credentials

PROGRAM = os.environ.get("CLOUDFLARED_BIN", "")

pytestmark = [
    pytest.mark.interop,
    pytest.mark.jail,
    pytest.mark.skipif(not PROGRAM, reason="CLOUDFLARED_BIN names no cloudflared"),
]

HOSTS = ["127.0.0.1", "127.0.0.2", "127.0.0.3", "127.0.0.4"]
"""One for each connection: the connector never makes two to one address."""
PORT = 7844
BULK_BYTES = 20_000_000


@pytest.fixture(params=["http2", "quic"])
def transport(request: pytest.FixtureRequest) -> str:
    """What the connector runs over."""
    return str(request.param)


# --- The stage -----------------------------------------------------------------------------------


class Stage:
    """An edge, an origin, a tunnel, and connectors for it."""

    def __init__(self, directory: Path, transport: str, origin: Origin, tunnel: Tunnel) -> None:
        self.directory = directory
        self.transport = transport
        self.origin = origin
        self.tunnel = tunnel
        self.edge: Edge

    @contextmanager
    def connector(
        self,
        *arguments: str,
        connections: int = 1,
        credentials: Credentials | None = None,
        checks_first: bool = False,
    ) -> Iterator[Cloudflared]:
        """A running program; it is ended when the block is left."""
        credentials_path = self.directory / "credentials.json"
        credentials_path.write_text((credentials or self.tunnel.credentials).to_file())
        arguments = arguments or ("--url", f"http://127.0.0.1:{self.origin.port}")
        command = [PROGRAM, "tunnel", "--protocol", self.transport]
        command += [] if checks_first else ["--no-prechecks"]
        command += ["--no-autoupdate", "--ha-connections", str(connections)]
        command += ["--cacert", str(authority_path(self.directory)), "--metrics", "127.0.0.1:0"]
        command += ["--grace-period", "20s", "--loglevel", "debug"]
        command += [part for host in HOSTS for part in ("--edge", f"{host}:{PORT}")]
        command += ["run", "--credentials-file", str(credentials_path), *arguments]
        command.append(str(self.tunnel.id))
        log_path = self.directory / "cloudflared.log"
        environment = {"PATH": os.environ["PATH"], "HOME": str(self.directory)}
        with log_path.open("ab") as log:
            process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        try:
            yield Cloudflared(process, log_path)
        finally:
            process.kill()
            process.wait()

    @asynccontextmanager
    async def running_edge(self, drain_seconds: float = 5.0) -> AsyncIterator[Edge]:
        config = Config.dev(
            {
                "edge.listen": [f"{host}:{PORT}" for host in HOSTS],
                "edge.directory": str(self.directory),
                "server.drain_seconds": drain_seconds,
            }
        )
        listeners = [sock for place in config.edge.listen for sock in open_listeners(place)]
        self.edge = Edge(config, listeners)
        async with trio.open_nursery() as nursery:
            await nursery.start(self.edge.run)
            yield self.edge
            nursery.cancel_scope.cancel()

    async def usable(self, count: int = 1) -> TunnelConnection:
        """Some connection, when there are so many; the program waits up to 20 s before it dials
        again (specification 11)."""
        with trio.fail_after(30):
            while True:
                connections = list(self.edge.registry.connections(self.tunnel.id))
                if len(connections) >= count:
                    assert all(c.transport == self.transport for c in connections)
                    picked = self.edge.registry.pick(self.tunnel.id)
                    assert picked is not None
                    return picked
                await trio.sleep(0.05)


class Cloudflared:
    """The program."""

    def __init__(self, process: subprocess.Popen[bytes], log_path: Path) -> None:
        self.process = process
        self._log_path = log_path

    def log(self) -> str:
        return self._log_path.read_text(errors="replace")

    def stop(self) -> None:
        """As an operator does it: once."""
        self.process.send_signal(signal.SIGINT)

    async def exit_status(self) -> int:
        return await trio.to_thread.run_sync(self.process.wait, abandon_on_cancel=True)


@asynccontextmanager
async def staged(tmp_path: Path, transport: str, *, with_edge: bool = True) -> AsyncIterator[Stage]:
    origin = Origin()
    async with trio.open_nursery() as nursery:
        await nursery.start(origin.run)
        tunnel = create_tunnel(str(tmp_path), "web", os.urandom)
        load_or_create_authority(tmp_path)
        stage = Stage(tmp_path, transport, origin, tunnel)
        async with stage.running_edge() if with_edge else nullcontext():
            yield stage
        nursery.cancel_scope.cancel()


def get(path: str, *headers: tuple[bytes, bytes]) -> RequestHead:
    return RequestHead("GET", "https", "app.example.com", path, headers)


def post(path: str, *headers: tuple[bytes, bytes]) -> RequestHead:
    return RequestHead("POST", "https", "app.example.com", path, headers, has_body=True)


async def read_all(exchange: Exchange) -> bytes:
    body = bytearray()
    while data := await exchange.receive():
        body += data
    return bytes(body)


async def fetch(connection: TunnelConnection, head: RequestHead) -> tuple[int, bytes]:
    async with await connection.request(head) as exchange:
        return (await exchange.response()).status, await read_all(exchange)


async def eventually(condition: Callable[[], Awaitable[bool] | bool]) -> None:
    """Another program has to do its part: nothing here tells when."""
    with trio.fail_after(20):
        while True:
            result = condition()
            if result if isinstance(result, bool) else await result:
                return
            await trio.sleep(0.05)


# --- The matrix ----------------------------------------------------------------------------------


async def test_get(tmp_path: Path, transport: str) -> None:
    """A request reaches the origin with the visitor's headers, and the answer comes back."""
    async with staged(tmp_path, transport) as stage:
        with stage.connector():
            connection = await stage.usable()
            assert connection.options.version
            async with await connection.request(get("/a?b=c", (b"x-own", b"1"))) as exchange:
                response = await exchange.response()
                assert response.status == 200
                assert not response.is_from_connector
                assert (b"x-origin", b"yes") in response.headers
                assert await read_all(exchange) == b"/a"
            (request,) = stage.origin.requests
            headers = dict(request.headers)
            assert (request.target, headers[b"host"]) == (b"/a?b=c", b"app.example.com")
            assert headers[b"x-own"] == b"1"
            # It reports its configuration, since it isn't remotely managed.
            await eventually(lambda: bool(connection.local_configuration))
            assert "ingress" in json.loads(connection.local_configuration)


async def test_repeated_headers(tmp_path: Path, transport: str) -> None:
    """Two cookies stay two headers."""
    async with staged(tmp_path, transport) as stage:
        with stage.connector():
            connection = await stage.usable()
            head = post("/echo", (b"content-length", b"0"))
            async with await connection.request(head) as exchange:
                await exchange.send_end()
                response = await exchange.response()
                cookies = [value for name, value in response.headers if name == b"set-cookie"]
                assert sorted(cookies) == [b"a=1", b"b=2"]


async def test_large_bodies(tmp_path: Path, transport: str) -> None:
    """20 MB down, and 20 MB up that come back while they are sent, arrive unchanged."""
    # Before there is a connection, which would not outlive that on a busy machine.
    expected = pattern(0, BULK_BYTES)
    async with staged(tmp_path, transport) as stage:
        with stage.connector():
            connection = await stage.usable()
            status, body = await fetch(connection, get(f"/bytes?n={BULK_BYTES}"))
            assert (status, body) == (200, expected)
            head = post("/echo", (b"content-length", str(BULK_BYTES).encode()))
            async with await connection.request(head) as exchange, trio.open_nursery() as nursery:

                async def send() -> None:
                    for start in range(0, BULK_BYTES, 1 << 18):
                        await exchange.send(body[start : start + (1 << 18)])
                    await exchange.send_end()

                nursery.start_soon(send)
                assert (await exchange.response()).status == 200
                assert await read_all(exchange) == body


async def test_body_of_unknown_length(tmp_path: Path, transport: str) -> None:
    """A chunked upload streams: what was sent comes back before the rest is."""
    async with staged(tmp_path, transport) as stage:
        with stage.connector():
            connection = await stage.usable()
            head = post("/echo")
            async with await connection.request(head) as exchange:
                await exchange.send(b"one")
                assert (await exchange.response()).status == 200
                assert await exchange.receive() == b"one"
                await exchange.send(b"two")
                await exchange.send_end()
                assert await read_all(exchange) == b"two"


async def test_trailers(tmp_path: Path, transport: str) -> None:
    """The origin's trailers arrive over HTTP/2; the reference drops them over QUIC."""
    async with staged(tmp_path, transport) as stage:
        with stage.connector():
            connection = await stage.usable()
            async with await connection.request(get("/trailers")) as exchange:
                assert await read_all(exchange) == b"body"
                expected = ((b"x-checksum", b"1"),) if transport == "http2" else ()
                assert exchange.trailers == expected


async def test_unreachable_origin(tmp_path: Path, transport: str) -> None:
    """The connector's own 502 is told from one of the origin."""
    async with staged(tmp_path, transport) as stage:
        with stage.connector("--url", "http://127.0.0.1:1"):
            connection = await stage.usable()
            async with await connection.request(get("/")) as exchange:
                response = await exchange.response()
                assert (response.status, response.is_from_connector) == (502, True)


async def test_websocket(tmp_path: Path, transport: str) -> None:
    """A websocket is accepted with 101 and carries messages both ways until it is closed."""
    async with staged(tmp_path, transport) as stage:
        with stage.connector():
            connection = await stage.usable()
            client = wsproto.connection.Connection(wsproto.ConnectionType.CLIENT)
            headers = (
                (b"sec-websocket-key", b"dGhlIHNhbXBsZSBub25jZQ=="),
                (b"sec-websocket-version", b"13"),
            )
            head = RequestHead("GET", "https", "app.example.com", "/ws", headers, kind="websocket")
            async with await connection.request(head) as exchange:
                response = await exchange.response()
                assert response.status == 101
                accept = dict(response.headers)[b"sec-websocket-accept"]
                assert accept == b"s3pPLMBiTxaQ9kYGzzhZRbK+xOo="
                for text in ("hello", "again"):
                    await exchange.send(client.send(wsproto.events.TextMessage(text)))
                    events: list[wsproto.events.Event] = []
                    while not events:
                        client.receive_data(await exchange.receive())
                        events = list(client.events())
                    assert events[0] == wsproto.events.TextMessage(text.upper())


async def test_tcp(tmp_path: Path, transport: str) -> None:
    """The connector dials an address that the edge names and carries bytes both ways; a port where
    nobody listens is refused."""
    async with staged(tmp_path, transport) as stage:
        with stage.connector():
            connection = await stage.usable()
            destination = f"127.0.0.1:{stage.origin.tcp_port}"
            async with await connection.connect_tcp(destination, "192.0.2.1:5") as exchange:
                assert (await exchange.response()).status == 200
                for text in (b"SSH-2.0", b"x" * 1_000_000):
                    await exchange.send(text)
                    received = b""
                    while len(received) < len(text):
                        received += await exchange.receive()
                    assert received == text
                await exchange.send_end()
                assert await exchange.receive() == b""
            async with await connection.connect_tcp("127.0.0.1:1", "192.0.2.1:5") as exchange:
                response = await exchange.response()
                assert (response.status, response.is_from_connector) == (502, True)


async def test_configuration_push(tmp_path: Path, transport: str) -> None:
    """A tunnel that is configured at the edge gets its rules from there, and each change."""
    async with staged(tmp_path, transport) as stage:
        path = tunnels_directory(str(tmp_path)) / "web.config.json"

        def configure(status: int) -> None:
            path.write_text(json.dumps({"ingress": [{"service": f"http_status:{status}"}]}))
            stage.edge.reload_files()

        configure(418)
        with stage.connector():
            connection = await stage.usable()
            assert connection.is_remotely_managed
            for status in (418, 419):
                configure(status)

                async def is_applied(status: int = status) -> bool:
                    return (await fetch(connection, get("/")))[0] == status

                await eventually(is_applied)
            assert stage.edge.refusals.counts[EdgeStage.PROTOCOL] == 0


async def test_four_connections(tmp_path: Path, transport: str) -> None:
    """A connector has four, all serve, and when one is cut the others do, and it comes back."""
    async with staged(tmp_path, transport) as stage:
        with stage.connector(connections=4):
            await stage.usable(4)
            registry = stage.edge.registry
            connections = list(registry.connections(stage.tunnel.id))
            assert sorted(connection.index for connection in connections) == [0, 1, 2, 3]
            assert len({connection.connector_id for connection in connections}) == 1
            for connection in connections:
                assert await fetch(connection, get("/")) == (200, b"/")
            connections[1].close("test")
            for _ in range(20):
                picked = registry.pick(stage.tunnel.id)
                assert picked is not None
                assert await fetch(picked, get("/")) == (200, b"/")
            await stage.usable(4)


async def test_graceful_stop(tmp_path: Path, transport: str) -> None:
    """A connector that is told to stop finishes its request and exits as soon as that is done."""
    async with staged(tmp_path, transport) as stage:
        with stage.connector() as connector:
            connection = await stage.usable()
            async with await connection.request(get("/slow")) as exchange:
                assert await exchange.receive() == b"begun;"
                connector.stop()
                await eventually(lambda: not connection.is_usable)
                assert stage.edge.registry.pick(stage.tunnel.id) is None
                stage.origin.go_on.set()
                assert await read_all(exchange) == b"done"
            with trio.fail_after(5):
                assert await connector.exit_status() == 0


async def test_edge_restart(tmp_path: Path, transport: str) -> None:
    """An edge that stops lets a long request finish; the connector comes back to the next one."""
    async with staged(tmp_path, transport, with_edge=False) as stage:
        with stage.connector():
            async with stage.running_edge(drain_seconds=20):
                connection = await stage.usable()
                async with (
                    trio.open_nursery() as nursery,
                    await connection.request(get("/slow")) as exchange,
                ):
                    assert await exchange.receive() == b"begun;"
                    nursery.start_soon(stage.edge.drain, 20)
                    await trio.sleep(0.5)
                    assert stage.edge.registry.pick(stage.tunnel.id) is None
                    stage.origin.go_on.set()
                    assert await read_all(exchange) == b"done"
            async with stage.running_edge():
                connection = await stage.usable()
                assert await fetch(connection, get("/again")) == (200, b"/again")


async def test_wrong_credentials(tmp_path: Path, transport: str) -> None:
    """They are refused; over HTTP/2 the program then exits, over QUIC it goes on trying."""
    async with staged(tmp_path, transport) as stage:
        wrong = Credentials(stage.tunnel.id, stage.tunnel.credentials.account_tag, b"wrong" * 8)
        with stage.connector(credentials=wrong) as connector:
            refused = stage.edge.refusals.counts
            if transport == "http2":
                with trio.fail_after(20):
                    assert await connector.exit_status() == 1
            await eventually(lambda: refused[EdgeStage.REGISTRATION] > 0)
            # Over QUIC the reference does not tell its user why.
            told = {"http2": "does not know this tunnel", "quic": "control stream encountered"}
            await eventually(lambda: told[transport] in connector.log())
        assert list(stage.edge.registry.connections()) == []


async def test_registration_put_off(tmp_path: Path, transport: str) -> None:
    """An edge that takes nobody at the moment is tried again, with success later."""
    async with staged(tmp_path, transport) as stage:
        stage.edge.registrar.is_draining = True
        with stage.connector() as connector:
            await eventually(lambda: stage.edge.refusals.counts[EdgeStage.REGISTRATION] > 2)
            stage.edge.registrar.is_draining = False
            with trio.fail_after(40):
                await stage.edge.registry.wait_usable(stage.tunnel.id)
            assert connector.process.poll() is None


async def test_probes(tmp_path: Path, transport: str) -> None:
    """The program's checks at its start find the edge, and are no failure in our counts."""
    async with staged(tmp_path, transport) as stage:
        with stage.connector(checks_first=True) as connector:
            await stage.usable()
            await eventually(lambda: "precheck complete" in connector.log())
            assert 'UDP Connectivity" details="QUIC connection successful' in connector.log()
            assert 'TCP Connectivity" details="HTTP/2 connection successful' in connector.log()
            assert sum(stage.edge.refusals.counts.values()) == 0
