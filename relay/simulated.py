"""A relay that runs in a simulated internet: the real forwarding rules behind a plain Trio shell.

The real relay's pump sleeps in an epoll set of its own and hands sockets to the kernel, which a
simulated host does not have. Here one task reads and one writes for each client;
`relay.forwarding.Switch` decides everything else. STUN is answered on every address, with the
other address and port of RFC 5780 where the host has two addresses.

    [[run]]
    on = "relay"
    python = "relay.simulated:serve"
    args = ["${directory}/relays.json", "${seed}", "${relay.address}"]
"""

from __future__ import annotations

import random
import ssl
from collections import deque
from collections.abc import Callable, Sequence
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path
from typing import Final

import trio

from relay.client import Client
from relay.forwarding import BUFFER_SLACK, Switch, ViolationError
from traversal.io.stream import HandshakeStream, StreamEndedError
from traversal.keys import NONCE_LENGTH, NodePrivate
from traversal.relay_map import Dial, Region, RelayMap, RelayNode
from traversal.wire.derp import (
    DerpError,
    FrameSplitter,
    FrameType,
    ServerInfo,
    encode_frame,
    encode_restarting,
    encode_server_info,
    encode_server_key,
    parse_client_info,
)
from traversal.wire.derp_upgrade import encode_upgrade_response
from traversal.wire.stun import StunError, encode_binding_response, parse_binding_request

STUN_PORT: Final = 3478
OTHER_STUN_PORT: Final = 3479
KEEP_ALIVE_SECONDS: Final = 60.0
BLOCK_AT_BYTES: Final = 65536
"""With this much unwritten, a client's packets go to the switch's backlog."""

_EMPTY_ANSWER: Final = b"HTTP/1.1 204 No Content\r\nConnection: close\r\n\r\n"


class SimClient(Client):
    """A client of the switch, and what waits for its writer."""

    def __init__(self, *args: object, **options: object) -> None:
        super().__init__(*args, **options)  # type: ignore[arg-type]  # as Client
        self.unwritten: deque[bytes] = deque()
        self.unwritten_bytes = 0
        self.wanted = trio.Event()


class SimRelay:
    """One region with one server, on the simulated host that the task of `serve` is in.

    Args:
        addresses: of the host, as text; with two of a family, the second is for RFC 5780.
        context: makes it speak TLS; without, it is plain.
        pin: for the map, `sha256-raw:...` of the certificate.
        port: of DERP.
    """

    def __init__(
        self,
        region_id: int,
        name: str,
        addresses: Sequence[str],
        generator: random.Random,
        *,
        context: ssl.SSLContext | None = None,
        pin: str = "",
        port: int = 443,
    ) -> None:
        self.region_id = region_id
        self.name = name
        self.port = port
        self.key = NodePrivate.generate(generator.randbytes)
        self.switch = Switch(self.key.public())
        self._generator = generator
        self._context = context
        self._pin = pin
        parsed = [ip_address(address) for address in addresses]
        self._ipv4 = [a for a in parsed if isinstance(a, IPv4Address)]
        self._ipv6 = [a for a in parsed if isinstance(a, IPv6Address)]
        self._scope = trio.CancelScope()

    @property
    def region(self) -> Region:
        """For the relay map."""
        node = RelayNode(
            name=f"{self.region_id}a",
            region_id=self.region_id,
            host_name=self.name,
            certificate_name=self._pin,
            ipv4=self._ipv4[0] if self._ipv4 else Dial.NEVER,
            ipv6=self._ipv6[0] if self._ipv6 else Dial.NEVER,
            stun_port=STUN_PORT,
            derp_port=self.port,
        )
        return Region(self.region_id, self.name, self.name, (node,))

    @property
    def connected(self) -> int:
        """How many clients there are."""
        return self.switch.presence.local_keys

    def stop(self) -> None:
        """Die as a killed process does; `serve` may be called again."""
        self._scope.cancel()

    def say_restarting(self, reconnect_in_ms: int = 0) -> None:
        """Announce a restart to every client."""
        frame = encode_restarting(reconnect_in_ms, 5000)
        self.switch.outbox.send_to_all(frame, list(self.switch.presence.clients()))
        self._finish_round()

    async def serve(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until `stop` or cancelled."""
        self.switch = Switch(self.key.public())
        self._scope = trio.CancelScope()
        with self._scope:
            async with trio.open_nursery() as nursery:
                await nursery.start(self._serve_stun)
                nursery.start_soon(self._keep_alive)
                for kind, hosts in (
                    (trio.socket.AF_INET, self._ipv4),
                    (trio.socket.AF_INET6, self._ipv6),
                ):
                    if hosts:
                        listener = trio.socket.socket(kind, trio.socket.SOCK_STREAM)
                        await listener.bind((str(hosts[0]), self.port))
                        listener.listen(128)
                        nursery.start_soon(self._accept, listener)
                task_status.started()

    async def _keep_alive(self) -> None:
        while True:
            await trio.sleep(KEEP_ALIVE_SECONDS)
            self.switch.outbox.send_to_all(
                encode_frame(FrameType.KEEP_ALIVE), self.switch.presence.clients()
            )
            self._finish_round()

    # ---- STUN

    async def _serve_stun(self, task_status: trio.TaskStatus[None]) -> None:
        async with trio.open_nursery() as nursery:
            for hosts in (self._ipv4, self._ipv6):
                sockets: dict[tuple[int, int], trio.socket.SocketType] = {}
                for index, host in enumerate(hosts[:2]):
                    for which, port in enumerate((STUN_PORT, OTHER_STUN_PORT)):
                        kind = trio.socket.AF_INET if host.version == 4 else trio.socket.AF_INET6
                        sock = trio.socket.socket(kind, trio.socket.SOCK_DGRAM)
                        await sock.bind((str(host), port))
                        sockets[index, which] = sock
                for place in sockets:
                    nursery.start_soon(self._answer_stun, sockets, place)
            task_status.started()

    async def _answer_stun(
        self, sockets: dict[tuple[int, int], trio.socket.SocketType], place: tuple[int, int]
    ) -> None:
        sock = sockets[place]
        opposite = sockets.get((1 - place[0], 1 - place[1]))
        other = opposite.getsockname()[:2] if opposite is not None else None
        with sock:
            while True:
                data, source = await sock.recvfrom(2048)
                try:
                    request = parse_binding_request(data)
                except StunError:
                    continue
                index, which = place
                answering = sockets.get(
                    (
                        1 - index if request.change_ip else index,
                        1 - which if request.change_port else which,
                    )
                )
                if answering is None:
                    continue
                answer = encode_binding_response(
                    request.transaction_id, source[:2], other_address=other
                )
                try:
                    await answering.sendto(answer, source)
                except OSError:
                    continue

    # ---- connections

    async def _accept(self, listener: trio.socket.SocketType) -> None:
        with listener:
            async with trio.open_nursery() as nursery:
                while True:
                    sock, _ = await listener.accept()
                    nursery.start_soon(self._serve_connection, HandshakeStream(sock))

    async def _serve_connection(self, stream: HandshakeStream) -> None:
        try:
            if self._context is not None:
                await stream.start_tls(self._context, server_side=True)
            client = await self._maybe_upgrade(stream)
            if client is not None:
                await self._converse(stream, *client)
        except* (StreamEndedError, DerpError, ViolationError):
            pass
        finally:
            stream.close()

    async def _maybe_upgrade(self, stream: HandshakeStream) -> tuple[SimClient, bytes] | None:
        """The client and what it sent beyond the handshake; None for another request."""
        head = b""
        while b"\r\n\r\n" not in head:
            head += await _receive(stream)
        text, _, rest = head.partition(b"\r\n\r\n")
        lines = text.decode().lower().split("\r\n")
        if lines[0].split(" ")[1] != "/derp":
            await stream.send_all(_EMPTY_ANSWER)
            return None
        greeting = encode_server_key(self.key.public())
        if "derp-fast-start: 1" not in lines:
            greeting = encode_upgrade_response(self.key.public()) + greeting
        await stream.send_all(greeting)
        splitter = FrameSplitter()
        splitter.receive_data(rest)
        while not (frame := next(splitter.frames(), None)):
            splitter.receive_data(await _receive(stream))
        kind, body = frame
        if kind != FrameType.CLIENT_INFO:
            raise DerpError("its first frame is no CLIENT_INFO")
        key, info, box = parse_client_info(body, self.key)
        nonce = self._generator.randbytes(NONCE_LENGTH)
        await stream.send_all(encode_server_info(ServerInfo(), box, nonce))
        client = SimClient(
            key,
            connected_at=trio.current_time(),
            takes_notices=info.app_name.startswith("underpass"),
        )
        return client, bytes(splitter._buffer)

    async def _converse(self, stream: HandshakeStream, client: SimClient, received: bytes) -> None:
        self.switch.presence.connect(client)
        self._finish_round()
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._write, stream, client, nursery.cancel_scope)
                while not client.closed:
                    received = self._handle(client, received)
                    received += await _receive(stream)
        finally:
            self.switch.presence.disconnect(client)
            self._finish_round()

    def _handle(self, client: SimClient, data: bytes) -> bytes:
        """Handle what came; returns the incomplete frame at the end."""
        buffer = bytearray(data) + bytes(BUFFER_SLACK)
        end = self.switch.handle_frames(
            client, buffer, memoryview(buffer), 0, len(data), trio.current_time()
        )
        rest = data[end:]
        self._finish_round()
        return rest

    def _finish_round(self) -> None:
        dirty, self.switch.outbox.dirty = self.switch.outbox.dirty, []
        for client in dirty:
            assert isinstance(client, SimClient)
            data = b"".join(client.out)
            client.out.clear()
            client.out_bytes = 0
            client.unwritten.append(data)
            client.unwritten_bytes += len(data)
            client.blocked = client.unwritten_bytes >= BLOCK_AT_BYTES
            client.wanted.set()
        for doomed, _ in self.switch.outbox.doomed:
            self.switch.presence.disconnect(doomed)
        self.switch.outbox.doomed.clear()

    async def _write(
        self, stream: HandshakeStream, client: SimClient, scope: trio.CancelScope
    ) -> None:
        try:
            while True:
                await client.wanted.wait()
                client.wanted = trio.Event()
                while client.unwritten:
                    data = client.unwritten.popleft()
                    client.pong_waits = False
                    await stream.send_all(data)
                    client.unwritten_bytes -= len(data)
                    if client.blocked and not client.unwritten:
                        client.blocked = False
                        now = trio.current_time()
                        frames = self.switch.outbox.take_waiting(client, BLOCK_AT_BYTES, now)
                        client.unwritten.extend(frames)
                        client.unwritten_bytes += sum(map(len, frames))
        except StreamEndedError:
            scope.cancel()


async def serve(say: Callable[[str], None], map_file: str, seed: str, *addresses: str) -> None:
    """Be the relay of a scenario until cancelled; plain, since TLS would make no two runs alike.

    Args:
        say: prints a line, for the scenario.
        map_file: where the relay map is written once everybody may come.
        seed: decides the relay's key.
        addresses: of the host.
    """
    relay = SimRelay(900, addresses[0], addresses, random.Random(f"relay {seed}"))
    async with trio.open_nursery() as nursery:
        await nursery.start(relay.serve)
        relay_map = RelayMap({relay.region_id: relay.region})
        # Not in a thread, for which the virtual clock would not wait.
        Path(map_file).write_text(relay_map.to_json() + "\n")  # noqa: ASYNC240
        say("Relay map written")


async def _receive(stream: HandshakeStream) -> bytes:
    data = await stream.receive()
    if not data:
        raise StreamEndedError("the client closed the connection")
    return data
