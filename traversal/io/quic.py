"""QUIC connections and streams under Trio; `quic_endpoints` makes them, for either role.

A connection has one task that sends and serves the timer; receiving is the socket's task, shared by
all connections of a listener. Streams have none. Nothing is dropped for a full send buffer: the
sender waits.

What a slow reader leaves lying is spooled (`Spool`); when the spools of a connection hold
`QuicLimits.spooled_bytes`, the stream that is furthest behind is reset.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from typing import Final

import trio
from qh3.quic import events
from qh3.quic.connection import QuicConnectionError

from traversal.io.quic_engine import QuicEngine
from traversal.io.quic_stream import NO_ERROR, QuicError, QuicStream
from traversal.io.udp import Source, UdpSocket

TURN_BYTES: Final = 16 << 10
"""What a stream hands to the library before the next one may."""
STALLED_SECONDS: Final = 0.5
RESERVE_BYTES: Final = 1500
"""Of the congestion window, never filled with streams. qh3 2.1 sends no acknowledgments while what
is left of the window is too small for the stream data that waits; with both ends in that state
each waits for the other until the connection times out."""
MAX_WAITING_DATAGRAMS: Final = 1024
"""DATAGRAM frames that nobody has received yet, and of those that the network has no room for;
beyond it the oldest is dropped."""
SPOOLED_BYTES: Final = 1 << 30
FEW_DATAGRAMS: Final = 128
CLOSE_SECONDS: Final = 1.0


class QuicConnection:
    """One connection, made by `QuicListener.accept` and `dial_quic`.

    Attributes:
        address: of the other side; it changes when the other side moves.
        failure: why the connection is over; None while it is not.
        is_established: whether the handshake is done.
        max_datagram_bytes: the longest DATAGRAM that fits into a packet now; 0 if the other side
            takes none.
    """

    def __init__(
        self,
        engine: QuicEngine,
        sock: UdpSocket,
        address: Source,
        *,
        spooled_bytes: int = SPOOLED_BYTES,
        keep_alive_seconds: float = math.inf,
    ) -> None:
        self.address = address
        self.failure: QuicError | None = None
        self.is_established = False
        self.max_datagram_bytes = 0
        self._engine = engine
        self._sock = sock
        self._keep_alive_seconds = keep_alive_seconds
        self._pings = 0
        self._spooled_bytes = spooled_bytes
        self._spooled = 0
        self._streams: dict[int, QuicStream] = {}
        self._aborted: set[int] = set()
        """Streams of the other side that we gave up and that it has not ended yet."""
        self._opened: deque[QuicStream] = deque()
        self._datagrams: deque[bytes] = deque(maxlen=MAX_WAITING_DATAGRAMS)
        self._outgoing: deque[bytes] = deque(maxlen=MAX_WAITING_DATAGRAMS)
        self._writers: deque[QuicStream] = deque()
        """Streams with bytes, or an end, that the library does not have yet."""
        self._leftover = 0
        self._leftover_since = -math.inf
        self._withheld = 0
        """Bytes that the library has and the other side's windows do not admit."""
        self._foreign = 0 if engine.configuration.is_client is False else 1
        """The two low bits of the other side's bidirectional streams (RFC 9000 2.1)."""
        self._note_id: Callable[[bytes, QuicConnection], None] | None = None
        self._forget_id: Callable[[bytes], None] | None = None
        self._wake = trio.Event()
        self._waiting = trio.lowlevel.ParkingLot()
        """Tasks that wait for streams, datagrams, the handshake, or room to send."""
        self._closing = False

    # ---- the connection

    async def run(self) -> None:
        """Send and serve timers until the connection is over; then everybody is told."""
        engine = self._engine
        ping_at = trio.current_time() + self._keep_alive_seconds
        try:
            while self.failure is None:
                self._handle_events()
                self.max_datagram_bytes = engine.max_datagram_bytes
                await self._transmit()
                self._waiting.unpark_all()
                timer = engine.get_timer() or math.inf
                with trio.CancelScope(deadline=min(timer, ping_at)):
                    await self._wake.wait()
                self._wake = trio.Event()
                now = trio.current_time()
                if now >= timer:
                    engine.handle_timer(now)
                if now >= ping_at:
                    ping_at = now + self._keep_alive_seconds
                    if self.is_established and not self._closing:
                        self._pings += 1
                        engine.send_ping(self._pings)
                if self._closing:
                    await self._transmit()
                    self._end(QuicError("QUIC: we closed the connection"))
        except trio.Cancelled:
            self.close()
            with trio.move_on_after(CLOSE_SECONDS, shield=True):
                await self._transmit()
            raise
        except QuicConnectionError as error:
            self._end(QuicError(f"QUIC: {error.reason_phrase}", error.error_code))
        except OSError as error:
            self._end(QuicError(f"QUIC: {error.strerror or error}"))
        finally:
            self._end(QuicError("QUIC: the connection was closed"))

    def close(self, code: int = NO_ERROR, reason: str = "") -> None:
        """End the connection, streams included; says so to the other side."""
        if self.failure is None and not self._closing:
            self._closing = True
            try:
                self._feed_streams()
                self._engine.close(error_code=code, reason_phrase=reason)
            except QuicConnectionError:
                pass
            self._wake.set()

    async def wait_over(self) -> None:
        """Until the connection has ended; `failure` says why."""
        await trio.lowlevel.checkpoint_if_cancelled()
        while self.failure is None:
            await self._waiting.park()

    async def wait_established(self) -> None:
        """Until the handshake is done. Raises QuicError."""
        while not self.is_established:
            self._check()
            await self._waiting.park()

    def receive(self, datagrams: list[bytes], address: Source) -> None:
        """The socket's side: datagrams for this connection."""
        try:
            self._engine.receive_many_datagrams(datagrams, address, trio.current_time())
        except QuicConnectionError as error:
            self._end(QuicError(f"QUIC: {error.reason_phrase}", error.error_code))
        self._wake.set()

    def _check(self) -> None:
        if self.failure is not None:
            raise QuicError(str(self.failure), self.failure.code)

    def _end(self, failure: QuicError) -> None:
        if self.failure is None:
            self.failure = failure
            for stream in list(self._streams.values()):
                stream._fail(failure)
            self._wake.set()
            self._waiting.unpark_all()

    # ---- streams

    async def open_stream(self) -> QuicStream:
        """A new bidirectional stream; waits while the other side allows no further one.

        The other side learns of it with the first bytes. Raises QuicError.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        engine = self._engine
        while True:
            self._check()
            if (
                self.is_established
                and engine.open_outbound_streams < engine.max_concurrent_bidi_streams
            ):
                break
            await self._waiting.park()
        try:
            # The library numbers a stream when it is opened, so that two that open at once differ.
            stream = QuicStream(self, engine._open_stream())
        except QuicConnectionError as error:
            # The other side closed, and the event that says so waits for its turn; nobody else is
            # to come here meanwhile.
            self._end(QuicError(f"QUIC: {error.reason_phrase}", error.error_code))
            raise QuicError(f"QUIC: {error.reason_phrase}", error.error_code) from None
        self._streams[stream.stream_id] = stream
        return stream

    async def accept_stream(self) -> QuicStream:
        """The next stream that the other side opened. Raises QuicError at the end."""
        await trio.lowlevel.checkpoint_if_cancelled()
        while not self._opened:
            self._check()
            await self._waiting.park()
        return self._opened.popleft()

    # ---- datagrams

    def send_datagram(self, data: bytes) -> None:
        """Send a DATAGRAM frame; like UDP's it may get lost. Raises QuicError, also for one that is
        longer than `max_datagram_bytes`."""
        self._check()
        if len(data) > self.max_datagram_bytes:
            raise QuicError("QUIC: the datagram is too long for the path")
        self._outgoing.append(data)
        self._wake.set()

    async def wait_datagram_room(self) -> None:
        """Until few datagrams wait for the network. Raises QuicError."""
        await trio.lowlevel.checkpoint_if_cancelled()
        while len(self._outgoing) > FEW_DATAGRAMS:
            self._check()
            await self._waiting.park()

    async def receive_datagrams(self) -> list[bytes]:
        """All that wait, at least one. Raises QuicError at the end."""
        await trio.lowlevel.checkpoint_if_cancelled()
        while not self._datagrams:
            self._check()
            await self._waiting.park()
        datagrams = list(self._datagrams)
        self._datagrams.clear()
        return datagrams

    # ---- inside

    def _queue_datagrams(self) -> None:
        """Hand DATAGRAMs to the library as far as the congestion window allows: the library itself
        sends them whatever that says (RFC 9221 5.4)."""
        if not self._outgoing:
            return
        engine = self._engine
        room = engine.congestion_room
        longest = self.max_datagram_bytes
        while self._outgoing and room > 0:
            datagram = self._outgoing.popleft()
            room -= len(datagram)
            if len(datagram) <= longest:  # the path may have become narrower
                engine.send_datagram_frame(datagram)

    def _feed_streams(self) -> None:
        """Hand bytes of streams to the library, in turns, as far as the congestion window allows:
        see RESERVE_BYTES."""
        if not self._writers:
            return
        engine = self._engine
        buffered = engine.get_send_buffer_size() - self._withheld
        room = engine.congestion_room - RESERVE_BYTES - max(0, buffered)
        while self._writers and room > 0:
            stream = self._writers.popleft()
            room -= stream._feed(min(room, TURN_BYTES))
            if stream._has_unsent:
                self._writers.append(stream)

    def _note_withheld(self) -> None:
        """What the library has had for long without sending it waits for other windows than that
        of congestion: a reader has stalled, and must not hold up the other streams."""
        size = self._engine.get_send_buffer_size()
        now = trio.current_time()
        if size != self._leftover:
            self._leftover, self._leftover_since = size, now
            self._withheld = min(self._withheld, size)
        elif now - self._leftover_since > STALLED_SECONDS:
            self._withheld = size

    async def _transmit(self) -> None:
        while True:
            self._queue_datagrams()
            self._feed_streams()
            datagrams = self._engine.datagrams_to_send(trio.current_time())
            if not datagrams:
                self._note_withheld()
                return
            start = 0
            while start < len(datagrams):
                address = datagrams[start][1][:2]
                end = start + 1
                while end < len(datagrams) and datagrams[end][1][:2] == address:
                    end += 1
                await self._sock.send_patiently([d for d, _ in datagrams[start:end]], address)
                start = end

    def _handle_events(self) -> None:
        while (event := self._engine.next_event()) is not None:
            match event:
                case events.StreamDataReceived():
                    self._handle_data(event)
                case events.DatagramFrameReceived():
                    self._datagrams.append(event.data)
                case events.StreamReset():
                    self._aborted.discard(event.stream_id)
                    if (stream := self._streams.get(event.stream_id)) is not None:
                        code = event.error_code
                        stream._fail_receiving(
                            QuicError(f"QUIC: the other side reset the stream (code {code})", code)
                        )
                case events.StopSendingReceived():
                    if (stream := self._streams.get(event.stream_id)) is not None:
                        code = event.error_code
                        stream._fail_sending(
                            QuicError(f"QUIC: the other side stopped reading (code {code})", code)
                        )
                case events.HandshakeCompleted():
                    self.is_established = True
                case events.ConnectionIdIssued():
                    if self._note_id is not None:
                        self._note_id(event.connection_id, self)
                case events.ConnectionIdRetired():
                    if self._forget_id is not None:
                        self._forget_id(event.connection_id)
                case events.ConnectionTerminated():
                    text = event.reason_phrase or "the connection ended"
                    self._end(QuicError(f"QUIC: {text}", event.error_code))

    def _handle_data(self, event: events.StreamDataReceived) -> None:
        stream_id = event.stream_id
        stream = self._streams.get(stream_id)
        if stream is None:
            if stream_id in self._aborted:
                if event.end_stream:
                    self._aborted.discard(stream_id)
                return
            if stream_id & 3 != self._foreign:
                return  # one of ours that is over, or unidirectional: nobody uses those
            stream = QuicStream(self, stream_id)
            self._streams[stream_id] = stream
            self._opened.append(stream)
            self._waiting.unpark_all()
        try:
            self._spooled += len(event.data)
            stream._handle_data(event.data, is_end=event.end_stream)
        except OSError:
            stream.abort()
        if self._spooled > self._spooled_bytes:
            max(self._streams.values(), key=lambda s: len(s._spool)).abort()

    def _forget(self, stream: QuicStream) -> None:
        if self._streams.pop(stream.stream_id, None) is not None:
            self._waiting.unpark_all()
