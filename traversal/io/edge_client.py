"""A node's connection to an edge, by which other nodes reach it, and it them, by their keys.

QUIC where UDP gets through, HTTP/2 where it does not: both are tried, QUIC first, and while it runs
over HTTP/2 QUIC is tried again every few seconds (`traversal.tunnel.transport_choice`). The old
connection carries packets until the new one does.
"""

from __future__ import annotations

import logging
import random
import ssl
from collections import deque
from dataclasses import dataclass, field
from typing import Final, Protocol
from uuid import UUID

import trio

from traversal.io.edge_dial import EdgeAddress, EdgeDialError, MakeContext, PeerChannel, dial_edge
from traversal.io.http2_engine import Http2Error
from traversal.io.peer_pipe import PeerPipe, PeerPipeError
from traversal.keys import KEY_LENGTH, Entropy, NodePrivate
from traversal.tunnel.backoff import Backoff
from traversal.tunnel.transport_choice import HEAD_START_SECONDS, Transport, TransportChoice
from traversal.wire.derp import HEADER, FrameType
from traversal.wire.tunnel.credentials import Credentials
from traversal.wire.tunnel.peers import MAX_PAYLOAD_BYTES
from traversal.wire.tunnel.registration import (
    FEATURE_PEERS,
    ConnectionOptions,
    RegisterConnection,
)

logger = logging.getLogger("underpass.edge")

QUEUE_PACKETS: Final = 256
PROBE_EACH_SECONDS: Final = 1.0
STEADY_SECONDS: Final = 10.0
"""A connection that lived shorter counts as a failure for the backoff."""
PING_SECONDS: Final = 5.0
PING_TIMEOUT_SECONDS: Final = 8.0
"""Over HTTP/2: TCP alone takes minutes to notice that the edge is gone."""


class EdgeHandler(Protocol):
    """Who hears of what happens at the edge. None of these may await or raise."""

    def handle_edge_packet(self, source: bytes, payload: bytes) -> None:
        """A packet came from the node with the key `source`, which the edge has verified."""

    def handle_edge_peer_gone(self, key: bytes) -> None:
        """The edge does not know this node (any more)."""

    def handle_edge_change(self, *, is_up: bool) -> None:
        """The connection came up or went down."""


@dataclass(frozen=True, slots=True)
class EdgeOptions:
    """How to connect to an edge.

    Attributes:
        addresses: of the edge, or of several that know each other's nodes; tried in turns.
        ca_file: the authority that the edge's certificate comes from; None for the system's.
        transports: that may be used, for both in this order.
        make_context: TLS contexts for HTTP/2, instead of `ca_file`.
        plain: HTTP/2 without TLS, for tests.
    """

    addresses: tuple[EdgeAddress, ...]
    credentials: Credentials = field(repr=False)
    ca_file: str | None = None
    transports: tuple[Transport, ...] = (Transport.QUIC, Transport.HTTP2)
    make_context: MakeContext | None = None
    plain: bool = False

    def context_maker(self) -> MakeContext | None:
        """What makes TLS contexts; None for no TLS."""
        if self.plain:
            return None
        return self.make_context or (lambda: ssl.create_default_context(cafile=self.ca_file))


@dataclass(frozen=True, slots=True)
class EdgeStatistics:
    """A snapshot. Times are monotonic seconds; empty texts and None while not connected."""

    transport: Transport | None
    server: str
    location: str
    connected_at: float | None
    packets_sent: int
    packets_received: int
    packets_dropped: int
    last_error: str


class EdgeClient:
    """Run `run` in a task; `send` may be called at any time."""

    def __init__(
        self,
        options: EdgeOptions,
        private_key: NodePrivate,
        handler: EdgeHandler,
        *,
        entropy: Entropy,
        rng: random.Random,
    ) -> None:
        self.max_payload_bytes: int = MAX_PAYLOAD_BYTES
        self._options = options
        self._private_key = private_key
        self._handler = handler
        self._entropy = entropy
        self._rng = rng
        self._connector_id = UUID(bytes=entropy(16), version=4)
        self._connection_number = 0
        self._choice = TransportChoice(options.transports, rng.random)
        self._link: _Link | None = None
        self._queue: deque[bytes] = deque()
        self._retry_now = trio.Event()
        self._sent = 0
        self._received = 0
        self._dropped = 0
        self._last_error = ""

    @property
    def is_connected(self) -> bool:
        """Whether packets can leave now."""
        return self._link is not None

    @property
    def backlog(self) -> int:
        """How many packets wait."""
        return len(self._queue)

    def statistics(self) -> EdgeStatistics:
        """A snapshot."""
        link = self._link
        return EdgeStatistics(
            transport=link.channel.transport if link else None,
            server=str(link.channel.address) if link else "",
            location=link.channel.location if link else "",
            connected_at=link.since if link else None,
            packets_sent=self._sent,
            packets_received=self._received,
            packets_dropped=self._dropped,
            last_error=self._last_error,
        )

    def send(self, destination: bytes, payload: bytes) -> bool:
        """Queue a packet for the node with this raw key; of too many the oldest is dropped. False
        when it can't be carried: too long, or there is no connection."""
        link = self._link
        if link is None or len(payload) > MAX_PAYLOAD_BYTES:
            return False
        if len(self._queue) >= QUEUE_PACKETS:
            self._queue.popleft()
            self._dropped += 1
        head = HEADER.pack(FrameType.SEND_PACKET, KEY_LENGTH + len(payload))
        self._queue.append(head + destination + payload)
        link.pipe.wake()
        return True

    def handle_network_change(self, own_hosts: frozenset[str]) -> None:
        """Our addresses changed (empty: unknown). A TCP connection from one that is gone is
        replaced at once, another has a few seconds to prove that it lives; QUIC moves by itself.
        A wait for the next attempt ends, and QUIC gets another chance."""
        self._choice = TransportChoice(self._options.transports, self._rng.random)
        self._retry_now.set()
        if self._link is None:
            return
        local_host = self._link.channel.local_host
        if own_hosts and local_host is not None and local_host not in own_hosts:
            self._link.pipe.close()
        else:
            self._link.check_now.set()

    async def run(self) -> None:
        """Stay connected until cancelled."""
        backoff = Backoff(self._rng.random)
        number = 0
        try:
            async with trio.open_nursery() as nursery:
                while True:
                    address = self._options.addresses[number % len(self._options.addresses)]
                    link = await self._race(nursery, address)
                    if link is not None:
                        await self._keep(nursery, link)
                        if trio.current_time() - link.since >= STEADY_SECONDS:
                            backoff.reset()
                    number += 1
                    self._retry_now = trio.Event()
                    with trio.move_on_after(backoff.next_wait()):
                        await self._retry_now.wait()
        finally:
            self._use(None)

    # ---- one connection after the other

    async def _keep(self, nursery: trio.Nursery, link: _Link) -> None:
        """Use a connection until it is over; go over to QUIC when that works again."""
        while True:
            self._use(link)
            while not link.over.is_set():
                with trio.move_on_after(PROBE_EACH_SECONDS):
                    await link.over.wait()
                is_http2 = link.channel.transport is Transport.HTTP2
                if (
                    is_http2
                    and not link.is_probing
                    and self._choice.should_move_to_quic(trio.current_time())
                ):
                    link.is_probing = True
                    nursery.start_soon(self._probe, nursery, link)
            successor = link.successor
            if successor is None:
                now = trio.current_time()
                self._choice.note_lost(link.channel.transport, now - link.since, now)
                self._use(None)
                return
            self._use(successor)
            link.scope.cancel()
            link = successor

    async def _probe(self, nursery: trio.Nursery, link: _Link) -> None:
        """Try QUIC beside a connection over HTTP/2."""
        race = _Race()
        self._start(nursery, race, Transport.QUIC, link.channel.address)
        await race.decided.wait()
        link.is_probing = False
        now = trio.current_time()
        if race.winner is None:
            self._choice.note_probe_failed(now)
            return
        self._choice.note_registered(Transport.QUIC, now, quic_was_tried=True)
        if link.over.is_set():
            race.winner.scope.cancel()  # another one is on its way
        else:
            link.successor = race.winner
            link.over.set()

    async def _race(self, nursery: trio.Nursery, address: EdgeAddress) -> _Link | None:
        """The first transport that gets through, the preferred one with a head start."""
        race = _Race()
        order = self._choice.order
        for position, transport in enumerate(order):
            if position:
                with trio.move_on_after(HEAD_START_SECONDS):
                    await race.decided.wait()
                if race.winner is not None:
                    break
                race.decided = trio.Event()
            self._start(nursery, race, transport, address)
        while race.winner is None and race.attempts:
            race.decided = trio.Event()
            await race.decided.wait()
        winner = race.winner
        if winner is not None:
            for scope in race.attempts:
                scope.cancel()
            transport = winner.channel.transport
            tried = Transport.QUIC in order and Transport.QUIC in race.tried
            self._choice.note_registered(transport, trio.current_time(), quic_was_tried=tried)
        return winner

    def _start(
        self, nursery: trio.Nursery, race: _Race, transport: Transport, address: EdgeAddress
    ) -> None:
        scope = trio.CancelScope()
        race.attempts.add(scope)
        race.tried.add(transport)
        nursery.start_soon(self._live, race, scope, transport, address)

    def _use(self, link: _Link | None) -> None:
        was_up, self._link = self._link is not None, link
        if link is None:
            self._queue.clear()
        elif self._queue:
            link.pipe.wake()
        if was_up != (link is not None):
            self._handler.handle_edge_change(is_up=link is not None)

    # ---- one connection

    async def _live(
        self, race: _Race, scope: trio.CancelScope, transport: Transport, address: EdgeAddress
    ) -> None:
        """Connect; if that wins the race, serve the connection to its end."""
        link: _Link | None = None
        try:
            with scope:
                async with trio.open_nursery() as nursery:
                    try:
                        link = await self._dial(nursery, scope, transport, address)
                        race.attempts.discard(scope)
                        if race.winner is None:
                            race.winner = link
                            race.decided.set()
                            if link.channel.ping is not None:
                                nursery.start_soon(_watch, link)
                            await link.pipe.run(link.channel.splitter)
                    except (EdgeDialError, PeerPipeError) as error:
                        self._note_error(str(error))
                    nursery.cancel_scope.cancel()
        finally:
            race.attempts.discard(scope)
            race.decided.set()
            if link is not None:
                link.over.set()

    async def _dial(
        self,
        nursery: trio.Nursery,
        scope: trio.CancelScope,
        transport: Transport,
        address: EdgeAddress,
    ) -> _Link:
        credentials = self._options.credentials
        # Each connection has a number of its own: the edge ends an older one of the same number.
        self._connection_number = (self._connection_number + 1) % 256
        request = RegisterConnection(
            credentials.account_tag,
            credentials.secret,
            credentials.tunnel_id,
            self._connection_number,
            ConnectionOptions(self._connector_id, (FEATURE_PEERS,), version="underpass"),
        )
        channel = await dial_edge(
            nursery,
            transport,
            address,
            request,
            self._private_key,
            ca_file=self._options.ca_file,
            make_context=self._options.context_maker(),
            entropy=self._entropy,
        )
        link = _Link(channel, scope, trio.current_time())

        def take(max_bytes: int) -> list[bytes]:
            return self._take(link, max_bytes)

        link.pipe = PeerPipe(channel.stream, channel.quic, self._handle_frame, take)
        return link

    def _take(self, link: _Link, max_bytes: int) -> list[bytes]:
        if link is not self._link:
            return []
        frames = []
        while self._queue and max_bytes > 0:
            frames.append(self._queue.popleft())
            max_bytes -= len(frames[-1])
        self._sent += len(frames)
        return frames

    def _handle_frame(self, frame_type: int, body: bytes) -> None:
        if len(body) < KEY_LENGTH:
            return
        if frame_type == FrameType.RECV_PACKET:
            self._received += 1
            self._handler.handle_edge_packet(body[:KEY_LENGTH], body[KEY_LENGTH:])
        elif frame_type == FrameType.PEER_GONE:
            self._handler.handle_edge_peer_gone(body[:KEY_LENGTH])

    def _note_error(self, text: str) -> None:
        if text != self._last_error:
            logger.warning("the edge: %s", text)
        self._last_error = text


class _Link:
    """One connection that is, or could be, in use; `over` is set at its end, or when it has a
    successor."""

    pipe: PeerPipe

    def __init__(self, channel: PeerChannel, scope: trio.CancelScope, now: float) -> None:
        self.channel = channel
        self.scope = scope
        self.since = now
        self.over = trio.Event()
        self.successor: _Link | None = None
        self.is_probing = False
        self.check_now = trio.Event()


class _Race:
    """Attempts to connect, of which the first to succeed wins."""

    def __init__(self) -> None:
        self.winner: _Link | None = None
        self.attempts: set[trio.CancelScope] = set()
        self.tried: set[Transport] = set()
        self.decided = trio.Event()
        """Set when an attempt succeeds or fails."""


async def _watch(link: _Link) -> None:
    """End a connection whose edge does not answer any more."""
    ping = link.channel.ping
    assert ping is not None
    while True:
        with trio.move_on_after(PING_SECONDS):
            await link.check_now.wait()
        link.check_now = trio.Event()
        try:
            with trio.fail_after(PING_TIMEOUT_SECONDS):
                await ping()
        except (Http2Error, trio.TooSlowError):
            link.pipe.close()
            return
