"""A DERP and STUN server in a few lines, for tests of nodes on loopback and in simulated internets.

The real relay owns an epoll set and so can't run in a simulated internet.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from ipaddress import IPv4Address

import pytest
import trio

from traversal.io.stream import HandshakeStream, StreamEndedError
from traversal.keys import NodePrivate, NodePublic
from traversal.relay_map import Dial, Region, RelayMap, RelayNode
from traversal.wire.derp import (
    KEEP_ALIVE,
    FrameSplitter,
    FrameType,
    GoneReason,
    ServerInfo,
    encode_peer_gone,
    encode_pong,
    encode_recv_packet,
    encode_restarting,
    encode_server_info,
    encode_server_key,
    parse_client_info,
)
from traversal.wire.derp_upgrade import encode_upgrade_response
from traversal.wire.stun import encode_binding_response, parse_binding_request


@dataclass
class TinyRelay:
    """One region: DERP without TLS and STUN, on the same port number if none is given."""

    region_id: int = 900
    info: ServerInfo = field(default_factory=ServerInfo)
    clients: dict[bytes, HandshakeStream] = field(default_factory=dict)
    homes: dict[bytes, bool] = field(default_factory=dict)
    packets: list[tuple[bytes, bytes, bytes]] = field(default_factory=list)
    """Source, destination and payload of every packet."""
    connects: int = 0
    mutes_stun: bool = False
    key: NodePrivate = field(default_factory=lambda: NodePrivate.generate(os.urandom))
    host: str = "127.0.0.1"
    port: int = 0
    stun_port: int = 0
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)

    @property
    def region(self) -> Region:
        node = RelayNode(
            name=f"{self.region_id}a",
            region_id=self.region_id,
            host_name=self.host,
            ipv4=IPv4Address(self.host),
            ipv6=Dial.NEVER,
            stun_port=self.stun_port,
            derp_port=self.port,
            insecure_for_tests=True,
        )
        return Region(self.region_id, f"r{self.region_id}", f"Region {self.region_id}", (node,))

    async def serve(self, host: str = "127.0.0.1", *, task_status: trio.TaskStatus[None]) -> None:
        self.host = host
        family = trio.socket.AF_INET6 if ":" in host else trio.socket.AF_INET
        listener = trio.socket.socket(family)
        stun = trio.socket.socket(family, trio.socket.SOCK_DGRAM)
        with listener, stun, self.scope:
            listener.setsockopt(trio.socket.SOL_SOCKET, trio.socket.SO_REUSEADDR, 1)
            await listener.bind((host, self.port))
            listener.listen(64)
            self.port = listener.getsockname()[1]
            await stun.bind((host, self.stun_port))
            self.stun_port = stun.getsockname()[1]
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._serve_stun, stun)
                nursery.start_soon(self._keep_alive)
                task_status.started()
                while True:
                    sock, _ = await listener.accept()
                    nursery.start_soon(self._serve_client, HandshakeStream(sock))

    async def _serve_stun(self, sock: trio.socket.SocketType) -> None:
        while True:
            data, source = await sock.recvfrom(2048)
            if not self.mutes_stun:
                request = parse_binding_request(data)
                await sock.sendto(
                    encode_binding_response(request.transaction_id, source[:2]), source
                )

    async def _keep_alive(self) -> None:
        while True:
            await trio.sleep(60)
            for stream in list(self.clients.values()):
                await stream.send_all(KEEP_ALIVE)

    async def _serve_client(self, stream: HandshakeStream) -> None:
        key = b""
        try:
            received = b""
            while b"\r\n\r\n" not in received:
                received += await self._receive(stream)
            if b"/derp/latency-check" in received:
                await stream.send_all(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
                return
            await stream.send_all(
                encode_upgrade_response(self.key.public()) + encode_server_key(self.key.public())
            )
            splitter = FrameSplitter()
            splitter.receive_data(received.partition(b"\r\n\r\n")[2])
            while True:
                for kind, body in splitter.frames():
                    if kind == FrameType.CLIENT_INFO:
                        public, _, box = parse_client_info(body, self.key)
                        key = public.raw
                        self.connects += 1
                        self.clients[key] = stream
                        await stream.send_all(encode_server_info(self.info, box, os.urandom(24)))
                    else:
                        await self._handle(stream, key, kind, body)
                splitter.receive_data(await self._receive(stream))
        except (StreamEndedError, trio.ClosedResourceError):
            pass
        finally:
            stream.close()
            if self.clients.get(key) is stream:
                del self.clients[key]

    async def _handle(self, stream: HandshakeStream, key: bytes, kind: int, body: bytes) -> None:
        if kind == FrameType.SEND_PACKET:
            destination, payload = body[:32], body[32:]
            self.packets.append((key, destination, payload))
            target = self.clients.get(destination)
            if target is None:
                await stream.send_all(encode_peer_gone(destination, GoneReason.NOT_HERE))
                return
            try:
                await target.send_all(encode_recv_packet(NodePublic(key), payload))
            except (StreamEndedError, trio.ClosedResourceError):
                pass
        elif kind == FrameType.PING:
            await stream.send_all(encode_pong(body[:8]))
        elif kind == FrameType.NOTE_PREFERRED:
            self.homes[key] = bool(body[0])

    async def _receive(self, stream: HandshakeStream) -> bytes:
        data = await stream.receive()
        if not data:
            raise StreamEndedError("closed")
        return data

    async def say_restarting(self, reconnect_in_ms: int = 0) -> None:
        """Tell every client to move."""
        for stream in list(self.clients.values()):
            await stream.send_all(encode_restarting(reconnect_in_ms, 5000))

    def drop_clients(self) -> None:
        """End every connection, as a crash does."""
        for stream in list(self.clients.values()):
            stream.close()


def _map_of(*relays: TinyRelay) -> RelayMap:
    return RelayMap({relay.region_id: relay.region for relay in relays})


@pytest.fixture
def tiny_relay() -> type[TinyRelay]:
    """The class, so that tests make as many as they need."""
    return TinyRelay


@pytest.fixture
def map_of() -> Callable[..., RelayMap]:
    """Makes a map of tiny relays that serve already."""
    return _map_of
