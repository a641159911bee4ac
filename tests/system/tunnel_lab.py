"""Two edges and a connector as processes in a kernel lab, visitors and an origin as tasks.

    edge1, edge2 ── internet ── nat ── alice: the connector, and an origin on her loopback
                        └────── bob: visitors

Whatever `alice_link` does to packets happens between the NAT and the internet, in both directions;
visitors have a good network. A visitor knows both edges, as one does whose name resolves to two
addresses.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import h11
import trio

from netlab.kernel.lab import KernelLab
from netlab.model import Host, Link, Nat, Server, Topology, Uplink
from netlab.presets import class_behavior
from relay.edge.certificates import load_or_create_authority
from relay.edge.tunnel_files import create_tunnel
from tests.system.test_programs import Programs

RELAY: Final = (sys.executable, "-m", "relay.cli")
UNDERPASS: Final = (sys.executable, "-m", "traversal.cli")
HOST: Final = "app.example.com"
EDGES: Final = ("edge1", "edge2")
VISITORS_PORT: Final = 8080
ORIGIN_PORT: Final = 8000
DRAIN_SECONDS: Final = 20
ATTEMPT_SECONDS: Final = 30.0
"""An edge lets a request wait 20 s for a connector."""
CONNECT_SECONDS: Final = 5.0


class World:
    """The lab, its programs, and what tests do with them.

    Attributes:
        edges: the edges that the connector knows.
    """

    def __init__(self, running: Programs, edges: Sequence[str]) -> None:
        self.running = running
        self.lab = running.lab
        self.edges = tuple(edges)

    def address(self, edge: str) -> str:
        return self.lab.host(edge).addresses[0]

    async def start_edge(self, edge: str) -> None:
        """Start it; returns when it listens."""
        settings = {
            "edge.listen": f"{self.address(edge)}:7844",
            "edge.location": edge,
            "edge.directory": str(self.running.home("edges")),
            "edge.public.http": f"{self.address(edge)}:{VISITORS_PORT}",
            "edge.public.routes_file": str(self.running.home("edges") / "routes.toml"),
            "server.drain_seconds": DRAIN_SECONDS,
        }
        options = [word for k, v in settings.items() for word in ("--set", f"{k}={v}")]
        await self.running.start(edge, *RELAY, "serve", "--dev", *options, ready="Relay map to")

    async def kill_edge(self, edge: str) -> None:
        """As the kernel does it to a process that takes too much memory."""
        await self.running.stop(edge, *RELAY, signal_number=signal.SIGKILL)

    async def stop_edge(self, edge: str) -> None:
        """As a service manager does it; returns when it has drained."""
        await self.running.stop(edge, *RELAY)

    async def start_connector(self, protocol: str = "auto") -> None:
        """Start it; returns when its first connection is registered."""
        edges = ", ".join(f'"{self.address(edge)}:7844"' for edge in self.edges)
        (self.running.home("alice") / "tunnel.toml").write_text(
            f'edge = [{edges}]\nca = "ca.pem"\ncredentials = "web.json"\nprotocol = "{protocol}"\n'
            f'url = "http://127.0.0.1:{ORIGIN_PORT}"\nhealth = "127.0.0.1:20241"\n'
        )
        command = (*UNDERPASS, "tunnel", "run", "-c", "tunnel.toml")
        await self.running.start("alice", *command, ready="registered")

    async def metrics(self) -> str:
        """The connector's."""
        _, text = await self.running.run("alice", "curl", "-s", "http://127.0.0.1:20241/metrics")
        return text

    async def until_connections(self, *wanted: int) -> float:
        """Wait until the connector has that many at each edge; returns how long it took."""
        return await self._until(
            lambda text: (
                [text.count(f'edge_location="{edge}"') for edge in self.edges] == list(wanted)
            )
        )

    async def until_transport(self, transport: str) -> float:
        """Wait until all connections run over it; returns how long it took."""
        return await self._until(
            lambda text: f'underpass_tunnel_connections{{transport="{transport}"}} 4.0' in text
        )

    async def _until(self, is_so: Callable[[str], bool]) -> float:
        began = trio.current_time()
        with trio.fail_after(60):
            while not is_so(await self.metrics()):  # noqa: ASYNC110
                await trio.sleep(0.1)
        return trio.current_time() - began


@asynccontextmanager
async def tunnel_world(
    home: Path, *, edges: Sequence[str] = EDGES, alice_link: Link | None = None
) -> AsyncIterator[World]:
    """The lab with its edges running and the origin serving; the connector is the test's."""
    uplink = Uplink(link=alice_link or Link())
    topology = Topology(
        nats=(Nat(name="nat", behavior=class_behavior("EIM+APDF"), uplink=uplink),),
        hosts=(Host(name="alice", uplinks=(Uplink(network="nat"),)), Host(name="bob")),
        servers=tuple(Server(name=edge) for edge in edges),
    )
    async with KernelLab(topology) as lab, trio.open_nursery() as nursery:
        running = Programs(lab, home)
        world = World(running, edges)
        directory = running.home("edges")
        tunnel = create_tunnel(str(directory), "web", os.urandom)
        load_or_create_authority(directory)
        (directory / "routes.toml").write_text(f'[[http]]\nhost = "{HOST}"\ntunnel = "web"\n')
        (running.home("alice") / "ca.pem").write_text((directory / "ca.pem").read_text())
        (running.home("alice") / "web.json").write_text(tunnel.credentials.to_file())
        async with lab.host("alice"):
            listeners = await trio.open_tcp_listeners(ORIGIN_PORT, host="127.0.0.1")
            nursery.start_soon(trio.serve_listeners, serve_origin, listeners)
        try:
            async with trio.open_nursery() as starting:
                for edge in edges:
                    starting.start_soon(world.start_edge, edge)
            yield world
        finally:
            await running.end()
            nursery.cancel_scope.cancel()


async def serve_origin(stream: trio.SocketStream) -> None:
    """HTTP/1.1: a path that begins with /bytes/ gets so many bytes, anything else its path and the
    request's body. An upgrade makes the connection an echo of bytes."""
    connection = h11.Connection(h11.SERVER)
    path, body = "", b""
    try:
        while True:
            event = connection.next_event()
            if event is h11.NEED_DATA:
                connection.receive_data(await stream.receive_some(65536))
            elif isinstance(event, h11.Request):
                path, body = event.target.decode(), b""
            elif isinstance(event, h11.Data):
                body += event.data
            elif isinstance(event, h11.EndOfMessage):
                if connection.their_state is h11.MIGHT_SWITCH_PROTOCOL:
                    await _echo(connection, stream)
                    return
                await _answer(connection, stream, path, body)
                connection.start_next_cycle()
            else:
                return
    except (trio.BrokenResourceError, h11.RemoteProtocolError):
        return


async def _answer(
    connection: h11.Connection, stream: trio.SocketStream, path: str, body: bytes
) -> None:
    start, _, size = path.rpartition("/")
    answer = bytes(int(size)) if start == "/bytes" else path.encode() + body
    head = h11.Response(status_code=200, headers=[("content-length", str(len(answer)))])
    await stream.send_all(
        (connection.send(head) or b"")
        + (connection.send(h11.Data(data=answer)) or b"")
        + (connection.send(h11.EndOfMessage()) or b"")
    )


async def _echo(connection: h11.Connection, stream: trio.SocketStream) -> None:
    # No visitor here checks it, but edges look whether it is there.
    headers = [("upgrade", "websocket"), ("connection", "upgrade"), ("sec-websocket-accept", "x")]
    switch = h11.InformationalResponse(status_code=101, headers=headers)
    await stream.send_all(connection.send(switch) or b"")
    while data := await stream.receive_some(65536):
        await stream.send_all(data)


class RefusedError(Exception):
    """No connection: the edge does not listen, or is not there."""


class BrokenError(Exception):
    """A connection ended before the response was complete."""


async def fetch(address: str, path: str, body: bytes = b"") -> tuple[int, bytes]:
    """One request on a connection of its own. Raises RefusedError, BrokenError, TooSlowError."""
    try:
        with trio.fail_after(CONNECT_SECONDS):
            stream = await trio.open_tcp_stream(address, VISITORS_PORT)
    except (OSError, trio.TooSlowError) as error:
        raise RefusedError(repr(error)) from None
    connection = h11.Connection(h11.CLIENT)
    headers = [("host", HOST), ("connection", "close"), ("content-length", str(len(body)))]
    head = h11.Request(method="PUT" if body else "GET", target=path, headers=headers)
    data = (connection.send(head) or b"") + (connection.send(h11.Data(data=body)) or b"")
    status, answer = 0, b""
    try:
        with trio.fail_after(ATTEMPT_SECONDS):
            async with stream:
                await stream.send_all(data + (connection.send(h11.EndOfMessage()) or b""))
                while True:
                    event = connection.next_event()
                    if event is h11.NEED_DATA:
                        connection.receive_data(await stream.receive_some(65536))
                    elif isinstance(event, h11.Response):
                        status = event.status_code
                    elif isinstance(event, h11.Data):
                        answer += event.data
                    elif isinstance(event, h11.EndOfMessage):
                        return status, answer
                    else:
                        raise BrokenError("the connection ended without a response")
    except (trio.BrokenResourceError, h11.RemoteProtocolError) as error:
        raise BrokenError(repr(error)) from None


@dataclass
class Visitors:
    """Tasks that send idempotent requests one after another, and keep count.

    Attributes:
        addresses: of the edges, tried in turns: another one for each request, and the next one
            where a connection can't be made or breaks.
        body: of a request, which is then a PUT.
        patience_seconds: how long to try on where no edge listens.
        done: requests that were answered.
        moved: attempts that got no connection.
        broken: attempts whose connection ended without a whole response.
        failed: requests that no edge answered with what the origin says.
        slowest: the longest that an answered request took, in seconds.
    """

    addresses: Sequence[str]
    body: bytes = b""
    patience_seconds: float = 0
    done: int = 0
    moved: int = 0
    broken: list[str] = field(default_factory=list)
    failed: list[object] = field(default_factory=list)
    slowest: float = 0.0
    _sent: int = 0

    async def run(self, is_enough: Callable[[], bool], parallel: int = 8) -> None:
        """Until `is_enough`, with so many requests at a time."""
        async with trio.open_nursery() as nursery:
            for _ in range(parallel):
                nursery.start_soon(self._visit, is_enough)

    async def _visit(self, is_enough: Callable[[], bool]) -> None:
        while not is_enough():
            self._sent += 1
            await self._request(self._sent)

    async def _request(self, number: int) -> None:
        path = f"/{number}"
        began = trio.current_time()
        answer: object = "no edge was reached"
        attempt = 0
        while attempt < 2 * len(self.addresses):
            address = self.addresses[(number + attempt) % len(self.addresses)]
            attempt += 1
            try:
                answer = await fetch(address, path, self.body)
                break
            except RefusedError:
                self.moved += 1
                if trio.current_time() - began < self.patience_seconds:
                    await trio.sleep(0.05)
                    attempt = 0
            except (BrokenError, trio.TooSlowError) as error:
                self.broken.append(f"{path} at {address}: {error!r}")
        if answer == (200, path.encode() + self.body):
            self.done += 1
            self.slowest = max(self.slowest, trio.current_time() - began)
        else:
            self.failed.append((path, answer))

    def __str__(self) -> str:
        return (
            f"{self.done} answered, {len(self.failed)} failed, {len(self.broken)} broken attempts, "
            f"{self.moved} attempts without a connection, slowest {self.slowest:.2f} s"
        )
