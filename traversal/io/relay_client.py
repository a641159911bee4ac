"""Our connection to one region of the relay map, kept up for as long as its task runs.

DERP specification 15. Where it is better than the reference client: when TCP works and what follows
fails, the next node of the region is tried at once; when the server says Restarting, a new
connection is made while the old one still carries packets, and that is read until the server ends
it: what the server had sent there already is not lost.

`send` is a plain function: it puts the packet into a queue of 32 that drops its oldest, since a
packet that waited long is worth less than the one that comes after it. One task per connection
writes everything that waits in one go, another reads.
"""

from __future__ import annotations

import math
import os
import random
import ssl
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final, Protocol

import trio

from traversal.io.dial import Dialed, DialError, Target, dial
from traversal.io.proxy import Proxy, ProxyError
from traversal.io.stream import StreamEndedError
from traversal.keys import KEY_LENGTH, NodePrivate
from traversal.relay_map import Region, RelayNode
from traversal.wire.derp import (
    HEADER,
    HEADER_LENGTH,
    MAX_PACKET_LENGTH,
    DerpError,
    FrameType,
    Health,
    PeerGone,
    Ping,
    Pong,
    Restarting,
    encode_note_preferred,
    encode_ping,
    encode_pong,
    maybe_parse_server_frame,
)

QUEUE_PACKETS: Final = 32
"""DERP specification 15.4."""
MAX_PENDING_PONGS: Final = 8
"""A server that sends Pings faster than we can write is answered for the latest of them."""
READ_TIMEOUT_SECONDS: Final = 120.0
NODE_HOLD_BACK_SECONDS: Final = 1.5
"""A node of the region that has not answered by then gets company (DERP specification 15.1)."""
PING_TIMEOUT_SECONDS: Final = 5.0
CHECK_AFTER_CHANGE_SECONDS: Final = 3.0
CHECK_AFTER_SILENCE_SECONDS: Final = 5.0
"""Packets that leave after a silence this long are accompanied by a Ping. A NAT that forgot the
connection swallows everything without a word; TCP would notice in a quarter of an hour."""
MAX_BACKOFF_SECONDS: Final = 5.0
BACKOFF_UNIT_SECONDS: Final = 0.01
STEADY_SECONDS: Final = 10.0
"""A connection that lived shorter than this counts as a failure for the backoff."""
MAX_RESTART_WAIT_SECONDS: Final = 30.0
"""The server may ask us to spread our return over some time; more than this is absurd."""
SHORT_SEGMENT_BYTES: Final = 512
"""Tried in turn with the system's choice where a server that lets us connect then falls silent; it
fits into packets of 576 bytes, which every path carries (RFC 791)."""
LINGER_SECONDS: Final = 5.0
"""How long a connection that was replaced is still read."""


class RelayHandler(Protocol):
    """Who hears of what happens on relay connections. None of these may await or raise."""

    def handle_relay_packet(self, region: int, source: bytes, payload: bytes) -> None:
        """A packet came from the peer with the node key `source`."""

    def handle_peer_gone(self, region: int, key: bytes) -> None:
        """The region's relay does not know this peer (any more)."""

    def handle_relay_change(self, region: int, *, is_up: bool) -> None:
        """The connection to a region came up or went down."""

    def handle_relay_restarting(self, region: int) -> None:
        """The only relay of a region is about to restart; it still carries packets."""


@dataclass(frozen=True, slots=True)
class RelayOptions:
    """How to connect to relays.

    Attributes:
        token: an admission token of an Underpass relay.
        make_context: makes TLS contexts; by default with the system's roots.
        plain: without TLS, for tests.
    """

    token: str = ""
    make_context: Callable[[], ssl.SSLContext] = ssl.create_default_context
    plain: bool = False


@dataclass(frozen=True, slots=True)
class RelayStatistics:
    """One region's connection. Times are monotonic seconds; None is never."""

    region: int
    is_home: bool
    is_connected: bool
    server: str
    tls_version: str | None
    connected_at: float | None
    heard_at: float | None
    packets_sent: int
    packets_received: int
    packets_dropped: int
    health: str
    last_error: str


class RelayClient:
    """One region. Run `run` in a task; `send` may be called before and after it connects."""

    def __init__(
        self,
        region: Region,
        private_key: NodePrivate,
        handler: RelayHandler,
        *,
        options: RelayOptions,
        rng: random.Random,
    ) -> None:
        self.region = region
        self.used_at = trio.current_time()
        """When a packet was sent last; for closing what is idle."""
        self.heard_at: float | None = None
        self._private_key = private_key
        self._handler = handler
        self._options = options
        self._rng = rng
        self._is_home = False
        self._segment_bytes = 0
        self._queue: deque[tuple[bytes, bytes]] = deque(maxlen=QUEUE_PACKETS)
        self._connection: _Connection | None = None
        self._retry_now = trio.Event()
        self._was_connected = trio.Event()
        self._sent = 0
        self._received = 0
        self._dropped = 0
        self._health = ""
        self._last_error = ""

    @property
    def is_connected(self) -> bool:
        """Whether packets can leave now."""
        return self._connection is not None

    @property
    def last_error(self) -> str:
        """Why it is not connected; empty while it is, and before the first attempt."""
        return self._last_error

    @property
    def backlog(self) -> int:
        """How many packets wait."""
        return len(self._queue)

    async def wait_connected(self) -> None:
        """Until it is connected for the first time."""
        await self._was_connected.wait()

    def statistics(self) -> RelayStatistics:
        """A snapshot."""
        connection = self._connection
        return RelayStatistics(
            region=self.region.region_id,
            is_home=self._is_home,
            is_connected=connection is not None,
            server=connection.dialed.target if connection is not None else "",
            tls_version=connection.dialed.tls_version if connection is not None else None,
            connected_at=connection.began_at if connection is not None else None,
            heard_at=self.heard_at,
            packets_sent=self._sent,
            packets_received=self._received,
            packets_dropped=self._dropped,
            health=self._health,
            last_error=self._last_error,
        )

    def send(self, destination: bytes, payload: bytes) -> None:
        """Queue a packet for the peer with node key `destination` (32 bytes).

        Raises ValueError for a payload above 64 KiB.
        """
        if len(payload) > MAX_PACKET_LENGTH:
            raise ValueError(f"a relay carries packets of at most {MAX_PACKET_LENGTH} bytes")
        if len(self._queue) == QUEUE_PACKETS:
            self._dropped += 1
        self._queue.append((destination, payload))
        self.used_at = trio.current_time()
        if self._connection is not None:
            self._connection.wake()

    def set_home(self, is_home: bool) -> None:
        """Tell the server whether this is our home, now and whenever we connect."""
        if is_home == self._is_home:
            return
        self._is_home = is_home
        if self._connection is not None:
            self._connection.send_control(encode_note_preferred(is_home))

    def check(self, timeout_seconds: float = PING_TIMEOUT_SECONDS) -> None:
        """Ping the server; the connection is given up if nothing comes back in time."""
        if self._connection is not None:
            self._connection.check(trio.current_time() + timeout_seconds)

    def handle_network_change(self, own_hosts: frozenset[str]) -> None:
        """Our addresses changed: a connection from one that is gone is replaced at once, another
        has 3 s to prove that it lives. A wait for the next attempt to connect ends."""
        self._retry_now.set()
        if self._connection is None:
            return
        if own_hosts and self._connection.local_host not in own_hosts:
            self._connection.close()
        else:
            self.check(CHECK_AFTER_CHANGE_SECONDS)

    async def run(self) -> None:
        """Connect, and connect again, until cancelled."""
        failures = 0
        avoid = ""
        async with trio.open_nursery() as nursery:
            while True:
                try:
                    dialed = await self._dial_region(avoid)
                except DialError as error:
                    failures += 1
                    self._last_error = str(error)
                    if error.is_timeout:
                        # Perhaps long packets vanish on the way: TCP never finds out by itself.
                        self._segment_bytes = SHORT_SEGMENT_BYTES - self._segment_bytes
                    self._handler.handle_relay_change(self.region.region_id, is_up=False)
                    await self._back_off(failures)
                    continue
                avoid = ""
                connection = _Connection(self, dialed)
                old, self._connection = self._connection, connection
                connection.wake()  # for what was queued before
                nursery.start_soon(self._converse, connection)
                if old is not None:
                    old.close_after(LINGER_SECONDS)
                await connection.left.wait()
                if connection.restart is not None:
                    # The old connection still carries packets meanwhile.
                    avoid = dialed.target
                    await self._wait_for_restart(connection)
                is_steady = trio.current_time() - connection.began_at >= STEADY_SECONDS
                if connection.restart is not None and is_steady:
                    continue
                # A server that sends each new connection away at once is one that fails.
                failures = 1 if is_steady else failures + 1
                await self._back_off(failures)

    async def _back_off(self, failures: int) -> None:
        seconds = min(failures**2 * BACKOFF_UNIT_SECONDS, MAX_BACKOFF_SECONDS)
        self._retry_now = trio.Event()
        with trio.move_on_after(seconds * self._rng.uniform(0.5, 1.5)):
            await self._retry_now.wait()

    async def _wait_for_restart(self, connection: _Connection) -> None:
        """Until it is our turn to move, as the server spreads its clients over some time, or until
        the server is gone."""
        assert connection.restart is not None
        seconds = min(connection.restart.reconnect_in_ms / 1000, MAX_RESTART_WAIT_SECONDS)
        with trio.move_on_after(seconds * self._rng.uniform(0.5, 1.0)):
            await connection.ended.wait()
        if sum(node.is_relay for node in self.region.nodes) == 1:
            self._handler.handle_relay_restarting(self.region.region_id)

    # ---- dialing

    async def _dial_region(self, avoid: str) -> Dialed:
        """The first node of the region to finish the handshake; starts are staggered.

        `avoid` is a server that is about to restart: it is tried last. Raises DialError.
        """
        nodes = [node for node in self.region.nodes if node.is_relay]
        nodes.sort(key=lambda node: str(Target.of_node(node)) == avoid)
        if not nodes:
            raise DialError(f"region {self.region.region_id}", "connect", "it has no relay")
        winners: list[Dialed] = []
        problems: list[DialError] = []
        ideal = nodes[0].name

        async def attempt(node: RelayNode, ended: trio.Event) -> None:
            try:
                dialed = await self._dial_node(node, "" if node.name == ideal else ideal)
            except DialError as error:
                problems.append(error)
                ended.set()
            else:
                winners.append(dialed)
                nursery.cancel_scope.cancel()

        try:
            async with trio.open_nursery() as nursery:
                for node in nodes:
                    ended = trio.Event()
                    nursery.start_soon(attempt, node, ended)
                    with trio.move_on_after(NODE_HOLD_BACK_SECONDS):
                        await ended.wait()
        except BaseException:
            for dialed in winners:
                dialed.close()
            raise
        for dialed in winners[1:]:
            dialed.close()
        if not winners:
            raise problems[0]
        return winners[0]

    async def _dial_node(self, node: RelayNode, ideal_node: str) -> Dialed:
        target = Target.of_node(node, plain=self._options.plain)
        target = replace(target, segment_bytes=self._segment_bytes)
        try:
            proxy = Proxy.maybe_from_environment(node.host_name)
        except ProxyError as error:
            raise DialError(str(target), "proxy", str(error)) from None
        return await dial(
            target,
            self._private_key,
            token=self._options.token,
            ideal_node=ideal_node,
            make_context=self._options.make_context,
            proxy=proxy,
        )

    # ---- a connection's life

    async def _converse(self, connection: _Connection) -> None:
        if self._is_home:
            connection.send_control(encode_note_preferred(True))
        self._was_connected.set()
        self._last_error = self._health = ""
        self._handler.handle_relay_change(self.region.region_id, is_up=True)
        try:
            await connection.run()
        except (StreamEndedError, DerpError) as error:
            self._last_error = f"{connection.dialed.target}: {error}"
        finally:
            connection.dialed.close()
            connection.left.set()
            connection.ended.set()
            if self._connection is connection:
                self._connection = None
                self._handler.handle_relay_change(self.region.region_id, is_up=False)

    def take_packets(self, connection: _Connection) -> list[bytes]:
        """Everything queued, as frames; for the current connection only."""
        if self._connection is not connection:
            return []
        frames = []
        queue = self._queue
        while queue:
            destination, payload = queue.popleft()
            if not connection.spend(HEADER_LENGTH + KEY_LENGTH + len(payload)):
                self._dropped += 1
                continue
            frames.append(HEADER.pack(FrameType.SEND_PACKET, KEY_LENGTH + len(payload)))
            frames.append(destination)
            frames.append(payload)
            self._sent += 1
        return frames

    def handle_frame(self, connection: _Connection, frame_type: int, body: bytes) -> None:
        """One frame of the server."""
        region = self.region.region_id
        if frame_type == FrameType.RECV_PACKET:
            if len(body) >= KEY_LENGTH:
                self._received += 1
                self._handler.handle_relay_packet(region, body[:KEY_LENGTH], body[KEY_LENGTH:])
            return
        frame = maybe_parse_server_frame(frame_type, body)
        if isinstance(frame, Ping):
            connection.send_control(encode_pong(frame.data))
        elif isinstance(frame, Pong):
            connection.handle_pong(frame.data)
        elif isinstance(frame, PeerGone):
            self._handler.handle_peer_gone(region, frame.key.raw)
        elif isinstance(frame, Health):
            self._health = frame.problem
        elif isinstance(frame, Restarting):
            connection.restart = frame
            connection.left.set()


class _Connection:
    """One TLS connection: a reader, a writer, the deadlines of both."""

    def __init__(self, client: RelayClient, dialed: Dialed) -> None:
        self.dialed = dialed
        self.began_at = self._heard_at = trio.current_time()
        self.local_host = dialed.stream.local_host
        self.restart: Restarting | None = None
        self.left = trio.Event()
        """Set when another connection is needed: this one ended, or will."""
        self.ended = trio.Event()
        self._client = client
        self._control: deque[bytes] = deque(maxlen=MAX_PENDING_PONGS)
        self._wanted = trio.Event()
        self._scope = trio.CancelScope()
        self._closes_at = math.inf
        self._check_data = b""
        info = dialed.server_info
        self._rate = info.token_bucket_bytes_per_second
        self._burst = max(info.token_bucket_bytes_burst, HEADER_LENGTH + KEY_LENGTH)
        self._tokens = float(self._burst)
        self._tokens_at = self.began_at

    def wake(self) -> None:
        """Something waits to be written."""
        self._wanted.set()

    def send_control(self, frame: bytes) -> None:
        """Write a frame that is no packet; beyond 8 that wait, the oldest is dropped."""
        self._control.append(frame)
        self._wanted.set()

    def check(self, deadline: float) -> None:
        """Ping the server and end the connection if it has not answered by `deadline`."""
        if not self._check_data:
            self._check_data = os.urandom(8)
            self.send_control(encode_ping(self._check_data))
            self._scope.deadline = min(self._scope.deadline, deadline)

    def handle_pong(self, data: bytes) -> None:
        """The server answered."""
        if data == self._check_data:
            self._check_data = b""

    def spend(self, size: int) -> bool:
        """Take from the token bucket that the server announced; False if it lacks so much."""
        if self._rate <= 0:
            return True
        now = trio.current_time()
        self._tokens = min(self._burst, self._tokens + (now - self._tokens_at) * self._rate)
        self._tokens_at = now
        if self._tokens < size:
            return False
        self._tokens -= size
        return True

    def close(self) -> None:
        """End the connection's tasks."""
        self._scope.cancel()

    def close_after(self, seconds: float) -> None:
        """End the connection then, if the server has not: another one took its place."""
        self._closes_at = trio.current_time() + seconds
        self._scope.deadline = min(self._scope.deadline, self._closes_at)

    async def run(self) -> None:
        """Until the connection ends. Raises StreamEndedError, DerpError."""
        with self._scope:
            self._expect_frames()
            failure: StreamEndedError | DerpError | None = None

            async def write() -> None:
                nonlocal failure
                try:
                    await self._write()
                except StreamEndedError as error:
                    failure = failure or error
                    self._scope.cancel()

            try:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(write)
                    try:
                        await self._read()
                    except (StreamEndedError, DerpError) as error:
                        failure = failure or error
                        nursery.cancel_scope.cancel()
            finally:
                if self._scope.cancel_called and trio.current_time() < self._closes_at:
                    # Silent, or its network has gone. Packets that reach the server when that comes
                    # back would be stale, and make it send ours there for a moment.
                    self.dialed.stream.abort()
                else:
                    self.dialed.close()
        if failure is not None:
            raise failure
        if self._scope.cancelled_caught:
            raise StreamEndedError("it has gone silent")

    def _expect_frames(self) -> None:
        deadline = trio.current_time() + READ_TIMEOUT_SECONDS
        self._scope.deadline = min(deadline, self._closes_at)

    async def _read(self) -> None:
        client = self._client
        while True:
            frames = await self.dialed.receive_frames()
            self._heard_at = client.heard_at = trio.current_time()
            for frame_type, body in frames:
                client.handle_frame(self, frame_type, body)
            if not self._check_data:
                self._expect_frames()

    async def _write(self) -> None:
        while True:
            await self._wanted.wait()
            self._wanted = trio.Event()
            packets = self._client.take_packets(self)
            now = trio.current_time()
            if packets and now - self._heard_at >= CHECK_AFTER_SILENCE_SECONDS:
                self.check(now + PING_TIMEOUT_SECONDS)
            frames = [*self._control, *packets]
            self._control.clear()
            if frames:
                await self.dialed.stream.send_all(b"".join(frames))
