"""A relay's core on loopback for tests: listener, HTTP, upgrade and pump, with clients for it."""

from __future__ import annotations

import os
import random
import socket
import ssl
import struct
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import trio
import trustme

from relay.admission import Admission
from relay.config import ListenAddress
from relay.config_schema import AdmissionConfig
from relay.http import Request, Response, serve_http
from relay.listeners import accept_loop, open_listeners
from relay.pump import Connection, Pump
from relay.upgrade import RateLimit, RefusedError, Upgrader
from tests.relay.fake_authority import FakeAuthority, Proof
from traversal.io.stream import HandshakeStream, StreamEndedError
from traversal.io.tls import TlsEngine
from traversal.keys import MeshKey, NodePrivate, NodePublic
from traversal.wire.derp import ClientInfo, DerpError, ServerFrame, maybe_parse_server_frame
from traversal.wire.derp_upgrade import ClientHandshake

MESH_KEY = MeshKey(bytes(range(1, 33)))


def private_key(number: int) -> NodePrivate:
    """The same key each time."""
    return NodePrivate.generate(lambda size: random.Random(number).randbytes(size))


@dataclass(frozen=True)
class Contexts:
    """TLS for both sides, of one authority."""

    server: ssl.SSLContext
    authority: trustme.CA

    def client(self, version: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = context.maximum_version = version
        self.authority.configure_trust(context)
        return context


@pytest.fixture(scope="session")
def contexts() -> Contexts:
    authority = trustme.CA()
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(server)
    return Contexts(server, authority)


class DerpClient:
    """A client whose handshake is done."""

    def __init__(
        self, private: NodePrivate, stream: HandshakeStream, handshake: ClientHandshake
    ) -> None:
        self.public = private.public()
        self.stream = stream
        self._splitter = handshake.splitter
        self.server_info = handshake.server_info

    async def send(self, data: bytes) -> None:
        await self.stream.send_all(data)

    async def receive(self) -> list[ServerFrame | None]:
        """The frames of one read, at least one unless the connection has ended."""
        while True:
            frames = [maybe_parse_server_frame(*frame) for frame in self._splitter.frames()]
            if frames:
                return frames
            try:
                data = await self.stream.receive()
            except StreamEndedError:
                return []
            if not data:
                return []
            self._splitter.receive_data(data)

    async def receive_exactly(self, count: int) -> list[ServerFrame | None]:
        """Frames, until there are `count`, or fewer at the end of the connection."""
        frames: list[ServerFrame | None] = []
        while len(frames) < count and (more := await self.receive()):
            frames += more
        return frames

    async def receive_all(self) -> list[ServerFrame | None]:
        """Everything until the other side closes."""
        return await self.receive_exactly(1 << 60)

    def detach(self) -> tuple[socket.socket, TlsEngine | None]:
        return self.stream.detach()

    def close(self) -> None:
        self.stream.close()

    def reset(self) -> None:
        """End with RST instead of FIN."""
        sock, _ = self.stream.detach()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        sock.close()


@dataclass
class Relay:
    """A running relay core."""

    pump: Pump
    private: NodePrivate
    port: int
    contexts: Contexts | None
    nursery: trio.Nursery
    closed: list[tuple[Connection, str]] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    handlers: int = 0
    opened: list[trio.socket.SocketType] = field(default_factory=list)

    async def open(self, *, receive_buffer: int | None = None) -> trio.socket.SocketType:
        """A TCP connection to the relay."""
        sock = trio.socket.socket()
        self.opened.append(sock)
        if receive_buffer is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        await sock.connect(("127.0.0.1", self.port))
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return sock

    async def open_stream(
        self,
        *,
        receive_buffer: int | None = None,
        version: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3,
    ) -> HandshakeStream:
        """The same, with the TLS handshake done where the relay speaks TLS."""
        stream = HandshakeStream(await self.open(receive_buffer=receive_buffer))
        if self.contexts is not None:
            context = self.contexts.client(version)
            await stream.start_tls(context, server_side=False, server_hostname="localhost")
        return stream

    async def connect(
        self,
        private: NodePrivate,
        *,
        fast: bool = False,
        is_mesh: bool = False,
        extra: bytes = b"",
        stream: HandshakeStream | None = None,
        receive_buffer: int | None = None,
        version: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3,
    ) -> DerpClient:
        """A client; `extra` follows CLIENT_INFO at once."""
        if stream is None:
            stream = await self.open_stream(receive_buffer=receive_buffer, version=version)
        info = ClientInfo(mesh_key=MESH_KEY if is_mesh else None, version=2)
        handshake = ClientHandshake(
            private,
            "localhost",
            info=info,
            nonce=os.urandom(24),
            server_key=self.private.public() if fast else None,
        )
        flight = handshake.first_flight()
        await stream.send_all(flight + extra if fast else flight)
        while handshake.server_info is None:
            data = await stream.receive()
            if not data:
                raise StreamEndedError("the relay closed the connection in the handshake")
            answer = handshake.receive_data(data)
            if answer:
                await stream.send_all(answer + extra)
        return DerpClient(private, stream, handshake)

    def connection(self, client: DerpClient | NodePublic) -> Connection:
        """The relay's end of a client."""
        public = client if isinstance(client, NodePublic) else client.public
        connection = self.pump.switch.presence.connections_of(public.raw)[-1]
        assert isinstance(connection, Connection)
        return connection

    async def until(self, condition: Callable[[], Any]) -> None:
        """Let the relay work until something is so."""
        with trio.fail_after(1000):
            while not condition():  # noqa: ASYNC110 - the pump has no event for tests
                await trio.sleep(0.001)


@pytest.fixture
async def run_relay() -> AsyncIterator[Callable[..., Any]]:
    """An async context manager that runs a relay's core; see `_run_relay`.

    The clients' sockets are closed after the test.
    """
    relays: list[Relay] = []

    @asynccontextmanager
    async def run(*args: Any, **options: Any) -> AsyncIterator[Relay]:
        async with _run_relay(*args, **options) as relay:
            relays.append(relay)
            yield relay
        assert not relay.pump.connections

    yield run
    for relay in relays:
        for sock in relay.opened:
            sock.close()


@asynccontextmanager
async def _run_relay(
    contexts: Contexts | None = None,
    *,
    mesh_key: MeshKey | None = MESH_KEY,
    rate_limit: RateLimit | None = None,
    send_buffer: int | None = None,
    respond: Callable[[Request], Response] | None = None,
    **pump_options: Any,
) -> AsyncIterator[Relay]:
    private = private_key(0)
    pump = Pump(private.public(), randomness=random.Random(1), **pump_options)
    (listener,) = open_listeners(ListenAddress("127.0.0.1", 0))
    upgrader = Upgrader(
        private,
        pump,
        mesh_key=mesh_key,
        admission=Admission(AdmissionConfig()),
        rate_limit=lambda: rate_limit,
        on_close=lambda connection, reason: relay.closed.append((connection, reason)),
    )

    async def handle(sock: trio.socket.SocketType) -> None:
        relay.handlers += 1
        if send_buffer is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
        stream = HandshakeStream(sock)
        try:
            if contexts is not None:
                await stream.start_tls(contexts.server, server_side=True)
            upgrade = await serve_http(
                stream,
                respond or (lambda request: Response(404)),
                source="127.0.0.1",
                over_tls=contexts is not None,
            )
            if upgrade is not None:
                await upgrader.upgrade(stream, upgrade.request)
        except (StreamEndedError, DerpError, RefusedError) as error:
            relay.refused.append(str(error))
        finally:
            stream.close()
            relay.handlers -= 1

    async with trio.open_nursery() as nursery:
        relay = Relay(pump, private, listener.getsockname()[1], contexts, nursery)
        await nursery.start(pump.run)
        nursery.start_soon(accept_loop, listener, handle)
        try:
            with trio.fail_after(1000):  # of a clock that may jump
                yield relay
        finally:
            nursery.cancel_scope.cancel()
            listener.close()


@pytest.fixture
def authority(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Proof, str], FakeAuthority]]:
    """A function that starts an ACME authority; its client's pauses are cut short."""
    pytest.importorskip("acme", reason="the extra 'acme' is not installed")
    monkeypatch.setattr("acme.client.time", SimpleNamespace(sleep=lambda _: None))
    monkeypatch.setattr("relay.acme._PUBLISHED_AFTER_SECONDS", 0.0)
    started = []

    def start(proof: Proof, challenge: str) -> FakeAuthority:
        made = FakeAuthority(proof, challenge)
        started.append(made)
        threading.Thread(target=made.server.serve_forever, args=(0.01,), daemon=True).start()
        return made

    yield start
    for made in started:
        made.server.shutdown()
        made.server.server_close()
