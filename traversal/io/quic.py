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

BURST_DATAGRAMS: Final = 44
"""What is sent before others have a turn; as much as one system call takes, if it is equally
long."""
BURST_BYTES: Final = 64 << 10
MANY_STREAMS: Final = 256
MIN_PATIENCE_SECONDS: Final = 0.025
TURN_BYTES: Final = 16 << 10
"""What a stream hands to the library before the next one may."""
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
MAX_SKIPPED: Final = 1024
"""Streams of the other side that are remembered as not yet seen, when later ones come first."""


class QuicConnection:
    """One connection, made by `QuicListener.accept` and `dial_quic`.

    Attributes:
        address: of the other side; it changes when the other side moves.
        failure: why the connection is over; None while it is not.
        is_established: whether the handshake is done.
        spooled_bytes: what all streams together may leave lying; see the module's text.
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
        self.spooled_bytes = spooled_bytes
        self._spooled = 0
        self._streams: dict[int, QuicStream] = {}
        self._aborted: set[int] = set()
        """Streams of the other side that we gave up and that it has not ended yet."""
        self._opened: deque[QuicStream] = deque()
        self._datagrams: deque[bytes] = deque(maxlen=MAX_WAITING_DATAGRAMS)
        self._outgoing: deque[bytes] = deque(maxlen=MAX_WAITING_DATAGRAMS)
        self._writers: deque[QuicStream] = deque()
        """Streams with bytes, or an end, that the library does not have yet."""
        self._fed: dict[QuicStream, tuple[int, float]] = {}
        """Streams of which the library may have bytes that it did not send yet: how many it did
        send, and since when that is so."""
        self._stalled: dict[QuicStream, int] = {}
        """Streams that the other side's windows hold back, and how many bytes of them the library
        has. They get no more, so that they never take the others' room."""
        self._look_at = math.inf
        self._has_received = False
        self._foreign = 0 if engine.configuration.is_client is False else 1
        """The two low bits of the other side's bidirectional streams (RFC 9000 2.1)."""
        self._next_foreign = self._foreign
        self._skipped: dict[int, None] = {}
        """Streams before the next one of which nothing has come yet."""
        self._note_id: Callable[[bytes, QuicConnection], None] | None = None
        self._forget_id: Callable[[bytes], None] | None = None
        self._wake = trio.Event()
        self._waiting = trio.lowlevel.ParkingLot()
        """Tasks that wait for the handshake, room for a stream or datagram, or the end."""
        self._acceptors = trio.lowlevel.ParkingLot()
        self._datagram_readers = trio.lowlevel.ParkingLot()
        self._closing = False
        self._close_code, self._close_reason = NO_ERROR, ""

    # ---- the connection

    async def run(self) -> None:
        """Send and serve timers until the connection is over; then everybody is told."""
        engine = self._engine
        ping_at = trio.current_time() + self._keep_alive_seconds
        try:
            while self.failure is None:
                self._handle_events()
                self.max_datagram_bytes = engine.max_datagram_bytes
                may_send_more = await self._send_burst()
                self._waiting.unpark_all()
                timer = engine.get_timer() or math.inf
                if may_send_more:
                    await trio.lowlevel.checkpoint()
                else:
                    with trio.CancelScope(deadline=min(timer, ping_at, self._look_at)):
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
                    await self._say_goodbye()
                    self._end(QuicError("QUIC: we closed the connection"))
        except trio.Cancelled:
            self.close()
            with trio.move_on_after(CLOSE_SECONDS, shield=True):
                await self._say_goodbye()
            raise
        except QuicConnectionError as error:
            self._end(QuicError(f"QUIC: {error.reason_phrase}", error.error_code))
        except OSError as error:
            self._end(QuicError(f"QUIC: {error.strerror or error}"))
        finally:
            self._end(QuicError("QUIC: the connection was closed"))

    def close(self, code: int = NO_ERROR, reason: str = "") -> None:
        """End the connection, streams included; says so to the other side, after what may be sent
        at once."""
        if self.failure is None and not self._closing:
            self._closing = True
            self._close_code, self._close_reason = code, reason
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

    def receive(self, run: bytes, step: int, address: Source) -> None:
        """The socket's side: datagrams for this connection, see `Run`."""
        try:
            self._engine.receive_run(run, step, address, trio.current_time())
        except QuicConnectionError as error:
            self._end(QuicError(f"QUIC: {error.reason_phrase}", error.error_code))
        self._has_received = True
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
            for lot in (self._waiting, self._acceptors, self._datagram_readers):
                lot.unpark_all()

    # ---- streams

    async def open_stream(self) -> QuicStream:
        """A new bidirectional stream; waits while the other side allows no further one.

        The other side learns of it with the first bytes. Raises QuicError.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        engine = self._engine
        while True:
            self._check()
            if self.is_established and engine.may_open_stream:
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
            await self._acceptors.park()
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
            await self._datagram_readers.park()
        datagrams = list(self._datagrams)
        self._datagrams.clear()
        return datagrams

    # ---- inside

    async def _send_burst(self) -> bool:
        """Send some of what may be sent; whether there may be more."""
        engine = self._engine
        now = trio.current_time()
        count = 0
        while count < BURST_DATAGRAMS:
            taken = engine.take_datagrams(now, BURST_DATAGRAMS - count)
            for address, datagrams in taken:
                count += len(datagrams)
                await self._sock.send_patiently(datagrams, address)
            if count < BURST_DATAGRAMS and not self._feed():
                return False
        return True

    def _feed(self) -> bool:
        """Hand the library what the congestion window has room for; whether there was any."""
        self._look_at = math.inf
        if not self._outgoing and not self._writers and not self._stalled:
            return False
        room = self._engine.congestion_room
        if room <= 0:
            return False
        fed = self._queue_datagrams(room)
        if self._has_received and self._stalled:
            self._note_progress()
        return self._feed_streams(room - fed - RESERVE_BYTES) + fed > 0

    async def _say_goodbye(self) -> None:
        try:
            while await self._send_burst():
                pass
            self._engine.close(error_code=self._close_code, reason_phrase=self._close_reason)
            await self._send_burst()
        except QuicConnectionError:
            pass  # it was over before

    def _queue_datagrams(self, room: int) -> int:
        """Hand DATAGRAMs to the library as far as the congestion window allows: the library itself
        sends them whatever that says (RFC 9221 5.4). How many bytes."""
        engine = self._engine
        longest = self.max_datagram_bytes
        left = room
        while self._outgoing and left > 0:
            datagram = self._outgoing.popleft()
            left -= len(datagram)
            if len(datagram) <= longest:  # the path may have become narrower
                engine.send_datagram_frame(datagram)
        return room - left

    def _feed_streams(self, room: int) -> int:
        """Hand bytes of streams to the library, in turns, as far as the congestion window allows:
        see RESERVE_BYTES. How many."""
        if not self._writers or room <= 0:
            return 0
        engine = self._engine
        held = engine.get_send_buffer_size()
        if not held:
            self._fed.clear()
        held -= sum(self._stalled.values())
        if held >= room or len(self._fed) > MANY_STREAMS:
            held -= self._note_stalled()
        left = room = min(room - held, BURST_BYTES)
        writers = self._writers
        while writers and left > 0:
            turn = max(left // len(writers), TURN_BYTES)
            stream = writers.popleft()
            left -= stream._feed(min(turn, left))
            self._fed.setdefault(stream, (-1, 0.0))
            if stream._has_unsent:
                writers.append(stream)
        return room - left

    def _note_stalled(self) -> int:
        """There is room in the congestion window, and the library does not send what it has: then
        it spreads it over the round trip, or a reader has stalled and the other side's windows are
        full. Only that lasts. How many bytes are known to be held back now and were not before."""
        now = trio.current_time()
        patience = 2 * self._engine.round_trip_seconds + MIN_PATIENCE_SECONDS
        stalled = 0
        for stream, (sent, since) in list(self._fed.items()):
            held = self._engine.get_send_buffer_size(stream.stream_id)
            if not held:
                del self._fed[stream]
            elif stream._fed_bytes - held != sent:
                self._fed[stream] = (stream._fed_bytes - held, now)
            elif now - since >= patience:
                del self._fed[stream]
                self._stalled[stream] = held
                stalled += held
        if stalled:
            self._writers = deque(s for s in self._writers if s not in self._stalled)
        if self._fed:
            self._look_at = now + patience
        return stalled

    def _note_progress(self) -> None:
        """The other side may have opened windows."""
        self._has_received = False
        for stream, before in list(self._stalled.items()):
            if self._engine.get_send_buffer_size(stream.stream_id) < before:
                del self._stalled[stream]
                self._fed[stream] = (-1, 0.0)
                if stream._has_unsent:
                    self._writers.append(stream)

    def _handle_events(self) -> None:
        while (event := self._engine.next_event()) is not None:
            match event:
                case events.StreamDataReceived():
                    self._handle_data(event)
                case events.DatagramFrameReceived():
                    self._datagrams.append(event.data)
                    self._datagram_readers.unpark_all()
                case events.StreamReset():
                    self._aborted.discard(event.stream_id)
                    if (stream := self._stream(event.stream_id)) is not None:
                        code = event.error_code
                        stream._fail_receiving(
                            QuicError(f"QUIC: the other side reset the stream (code {code})", code)
                        )
                case events.StopSendingReceived():
                    if (stream := self._stream(event.stream_id)) is not None:
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

    def _stream(self, stream_id: int) -> QuicStream | None:
        """The stream that the other side ended one direction of. It may begin with that: a visitor
        left before anything was sent. Then our direction has to be ended, too."""
        stream = self._streams.get(stream_id)
        if stream is None and stream_id & 3 == self._foreign and self._note_first(stream_id):
            stream = self._add(stream_id)
        return stream

    def _note_first(self, stream_id: int) -> bool:
        """Something came of the other side's stream: whether it is the first of it."""
        if stream_id < self._next_foreign:
            is_new = stream_id in self._skipped
            self._skipped.pop(stream_id, None)
            return is_new
        first = max(self._next_foreign, stream_id - 4 * MAX_SKIPPED)
        self._skipped.update(dict.fromkeys(range(first, stream_id, 4)))
        while len(self._skipped) > MAX_SKIPPED:
            del self._skipped[next(iter(self._skipped))]
        self._next_foreign = stream_id + 4
        return True

    def _add(self, stream_id: int) -> QuicStream:
        stream = self._streams[stream_id] = QuicStream(self, stream_id)
        self._opened.append(stream)
        self._acceptors.unpark()
        return stream

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
            self._note_first(stream_id)
            stream = self._add(stream_id)
        try:
            self._spooled += len(event.data)
            stream._handle_data(event.data, is_end=event.end_stream)
        except OSError:
            stream.abort()
        if self._spooled > self.spooled_bytes:
            max(self._streams.values(), key=lambda s: len(s._spool)).abort()

    def _forget(self, stream: QuicStream) -> None:
        if self._streams.pop(stream.stream_id, None) is not None:
            self._waiting.unpark_all()
