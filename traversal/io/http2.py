"""HTTP/2 under Trio, either role: the edge towards connectors, connectors towards the edge, public
visitors, origins.

One task reads, one writes; a stream has none of its own. What a stream's reader has not taken yet
is bounded by that stream's window alone: the connection's window is opened again as soon as bytes
arrive, so that a reader that stalls holds up nobody else (`Http2Limits.buffered_bytes` bounds the
sum). Writers wait for windows and for the network, and take turns frame by frame.
"""

from __future__ import annotations

from collections import deque
from typing import Final, Protocol

import trio
from h2.errors import ErrorCodes
from h2.events import (
    ConnectionTerminated,
    DataReceived,
    Event,
    InformationalResponseReceived,
    PingAckReceived,
    RemoteSettingsChanged,
    RequestReceived,
    ResponseReceived,
    StreamEnded,
    StreamReset,
    TrailersReceived,
    WindowUpdated,
)
from h2.exceptions import H2Error

from traversal.io.http2_engine import (
    Http2Engine,
    Http2Error,
    Http2Limits,
    header_list_size,
)
from traversal.io.http2_stream import Headers, Http2Stream, Http2StreamError
from traversal.io.stream import StreamEndedError

OUTGOING_BYTES: Final = 512 << 10
"""Bodies wait while this much waits for the network; enough to keep it busy for a turn."""
CONTROL_BYTES: Final = 1 << 20
"""More than this unsent means that the other side makes us answer and does not read: then we do
not read either."""
CHUNK_BYTES: Final = 64 << 10
"""The most that one stream sends in a turn."""
LAST_WORDS_SECONDS: Final = 1.0


class ByteStream(Protocol):
    """What the connection runs over; `traversal.io.stream.HandshakeStream` is one."""

    async def receive(self) -> bytes:
        """Some bytes, empty at the end. Raises StreamEndedError."""
        ...

    async def send_all(self, data: bytes) -> None:
        """Send everything. Raises StreamEndedError."""
        ...

    def close(self) -> None:
        """Close at once."""
        ...


class Http2Connection:
    """One connection. `await nursery.start(connection.run)`, then `open` or `accept` streams.

    `run` returns when the connection is over and closes the stream below; `failure` says why.
    """

    def __init__(
        self,
        stream: ByteStream,
        *,
        client_side: bool,
        limits: Http2Limits | None = None,
        connect_protocol: bool = False,
    ) -> None:
        self.failure: Http2Error | None = None
        self.received_at = trio.current_time()
        """When the other side was last heard of."""
        self._limits = limits or Http2Limits()
        self._io = stream
        self._engine = Http2Engine(self._limits, client_side=client_side, now=trio.current_time())
        self._connect_protocol = connect_protocol
        self._streams: dict[int, Http2Stream] = {}
        self._outgoing: list[bytes] = []
        self._unsent = 0
        """Bytes in `_outgoing` and in the writer's hands."""
        self._has_outgoing = trio.Event()
        self._writers = trio.lowlevel.ParkingLot()
        """Streams that wait for windows or for the network."""
        self._openers = trio.lowlevel.ParkingLot()
        self._reader = trio.lowlevel.ParkingLot()
        self._opened: deque[Http2Stream] = deque()
        self._acceptors = trio.lowlevel.ParkingLot()
        self._pings: dict[bytes, trio.Event] = {}
        self._ping_number = 0
        self._unacknowledged = 0
        self._buffered = 0
        self._head_bytes = 0
        self._is_leaving = False
        self._reading = trio.CancelScope()

    # ---- look

    @property
    def is_usable(self) -> bool:
        """Whether a new stream can be opened: connected, and neither side is leaving."""
        return self.failure is None and not self._is_leaving and not self._engine.is_leaving

    @property
    def stream_count(self) -> int:
        """Streams that are open, or over with something left to read."""
        return len(self._streams)

    # ---- the connection

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve the connection until it ends, in order or not; raises nothing but Cancelled."""
        self._engine.start(connect_protocol=self._connect_protocol)
        self._flush()
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._write)
                task_status.started()
                with self._reading:
                    await self._read()
                with trio.move_on_after(LAST_WORDS_SECONDS):
                    while self._unsent:
                        await self._reader.park()
                nursery.cancel_scope.cancel()
        finally:
            self._end(Http2Error("HTTP/2: the connection was closed"))
            self._io.close()

    def close(self, code: int = ErrorCodes.NO_ERROR) -> None:
        """End the connection now, streams included; says so to the other side."""
        if self.failure is None:
            try:
                self._engine.close_connection(code)
            except H2Error:
                pass
            self._flush()
            self._end(Http2Error("HTTP/2: we closed the connection"))
        self._reading.cancel()

    def leave(self) -> None:
        """Serve no new streams; those that are open go on (GOAWAY, RFC 9113 6.8)."""
        if self.failure is None and not self._is_leaving:
            self._is_leaving = True
            self._flush()
            self._queue(self._engine.announce_leaving())
        self._openers.unpark_all()

    async def ping(self) -> float:
        """Round trip in seconds. Raises Http2Error when the connection ends meanwhile."""
        self._check()
        self._ping_number += 1
        payload = self._ping_number.to_bytes(8, "big")
        answered = self._pings[payload] = trio.Event()
        started = trio.current_time()
        try:
            self._engine.ping(payload)
            self._flush()
            await answered.wait()
        finally:
            self._pings.pop(payload, None)
        self._check()
        return trio.current_time() - started

    # ---- streams

    async def open(self, headers: Headers, *, end_stream: bool = False) -> Http2Stream:
        """Send a request; waits while the other side allows no further stream.

        Raises Http2Error, and Http2StreamError with `is_unprocessed` when the other side is
        leaving.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        while True:
            self._check()
            if not self.is_usable:
                raise Http2StreamError(
                    "HTTP/2: the connection takes no new requests",
                    ErrorCodes.REFUSED_STREAM,
                    is_unprocessed=True,
                )
            engine = self._engine
            if engine.open_outbound_streams < engine.remote_settings.max_concurrent_streams:
                break
            await self._openers.park()
        stream_id = engine.get_next_available_stream_id()
        try:
            engine.send_headers(stream_id, headers, end_stream=end_stream)
        except H2Error as error:
            raise Http2Error(f"HTTP/2: {error}") from None
        stream = Http2Stream(self, stream_id, [], self._limits.stream_window)
        stream._is_send_ended = end_stream
        self._streams[stream_id] = stream
        self._flush()
        return stream

    async def accept(self) -> Http2Stream:
        """The next stream that the other side opens. Raises Http2Error at the end."""
        await trio.lowlevel.checkpoint_if_cancelled()
        while True:
            while self._opened:
                stream = self._opened.popleft()
                if stream._failure is None:
                    return stream
            self._check()
            await self._acceptors.park()

    def _check(self) -> None:
        if self.failure is not None:
            raise Http2Error(str(self.failure))

    # ---- reading

    async def _read(self) -> None:
        while True:
            while self._unsent > CONTROL_BYTES:
                await self._reader.park()
            try:
                data = await self._io.receive()
                if not data:
                    raise Http2Error("HTTP/2: the other side closed the connection")
                self.received_at = trio.current_time()
                events = self._engine.receive(data, self.received_at)
            except (StreamEndedError, Http2Error) as error:
                failure = error if isinstance(error, Http2Error) else Http2Error(str(error))
                self._flush()
                self._end(failure)
                return
            for event in events:
                self._handle(event)
            self._acknowledge()
            self._flush()
            if self.failure is not None:
                return

    def _handle(self, event: Event) -> None:
        match event:
            case DataReceived():
                self._handle_data(event)
            case RequestReceived():
                stream = Http2Stream(
                    self, event.stream_id, list(event.headers), self._limits.stream_window
                )
                self._streams[event.stream_id] = stream
                stream.head_bytes = header_list_size(stream.request_headers)
                self._head_bytes += stream.head_bytes
                if self._is_leaving or self._head_bytes > self._limits.buffered_bytes:
                    stream.reset(ErrorCodes.REFUSED_STREAM)
                    return
                self._opened.append(stream)
                self._acceptors.unpark()
            case ResponseReceived() | TrailersReceived() | InformationalResponseReceived():
                if (found := self._streams.get(event.stream_id)) is not None:
                    found._handle_headers(event)
            case StreamEnded():
                if (found := self._streams.get(event.stream_id)) is not None:
                    found._handle_end()
            case StreamReset():
                if (found := self._streams.get(event.stream_id)) is not None:
                    code = event.error_code
                    found._fail(
                        Http2StreamError(
                            f"HTTP/2: the other side reset the stream (code {int(code)})",
                            int(code),
                            is_unprocessed=code == ErrorCodes.REFUSED_STREAM,
                        )
                    )
            case WindowUpdated() | RemoteSettingsChanged():
                self._writers.unpark_all()
                self._openers.unpark_all()
            case PingAckReceived():
                if (waiting := self._pings.get(event.ping_data)) is not None:
                    waiting.set()
            case ConnectionTerminated():
                self._handle_goaway(event)

    def _handle_data(self, event: DataReceived) -> None:
        self._unacknowledged += event.flow_controlled_length
        stream = self._streams.get(event.stream_id)
        if stream is None:
            return
        stream._handle_data(event.data, event.flow_controlled_length)
        self._buffered += len(event.data)
        if self._buffered > self._limits.buffered_bytes:
            max(self._streams.values(), key=lambda s: s._buffered).discard(
                ErrorCodes.ENHANCE_YOUR_CALM
            )

    def _acknowledge(self) -> None:
        if self._unacknowledged >= self._limits.connection_window // 2 and self.failure is None:
            self._engine.increment_flow_control_window(self._unacknowledged)
            self._unacknowledged = 0

    def _handle_goaway(self, event: ConnectionTerminated) -> None:
        code = int(event.error_code or 0)
        if code:
            self._end(Http2Error(f"HTTP/2: the other side ended the connection (code {code})"))
            return
        # Streams beyond the last one named were not looked at; servers' streams are even.
        parity = 1 if self._engine.config.client_side else 0
        last = event.last_stream_id or 0
        for stream_id, stream in list(self._streams.items()):
            if stream_id > last and stream_id % 2 == parity:
                stream._fail(
                    Http2StreamError(
                        "HTTP/2: the other side left before it took the request",
                        ErrorCodes.REFUSED_STREAM,
                        is_unprocessed=True,
                    )
                )
        self._openers.unpark_all()

    def _end(self, failure: Http2Error) -> None:
        if self.failure is not None:
            return
        self.failure = failure
        error = Http2StreamError(str(failure), ErrorCodes.INTERNAL_ERROR)
        for stream in list(self._streams.values()):
            stream._fail(error)
        for waiting in self._pings.values():
            waiting.set()
        for lot in (self._writers, self._openers, self._acceptors):
            lot.unpark_all()

    # ---- writing

    def _flush(self) -> None:
        """Have the writer send what the engine queued."""
        data = self._engine.data_to_send()
        if data:
            self._queue(data)

    def _queue(self, data: bytes) -> None:
        self._outgoing.append(data)
        self._unsent += len(data)
        self._has_outgoing.set()

    async def _write(self) -> None:
        while True:
            await self._has_outgoing.wait()
            self._has_outgoing = trio.Event()
            data = b"".join(self._outgoing)
            self._outgoing.clear()
            try:
                await self._io.send_all(data)
            except StreamEndedError as error:
                # The reader learns of it too, but perhaps it waits for us.
                self._end(Http2Error(str(error)))
                self._unsent = 0
                self._reading.cancel()
                return
            self._unsent -= len(data)
            self._writers.unpark_all()
            self._reader.unpark_all()

    async def _wait_writable(self, stream: Http2Stream) -> int:
        """Until `stream` may send; how many bytes."""
        while True:
            stream._check()
            if self._unsent < OUTGOING_BYTES:
                engine = self._engine
                window = engine.local_flow_control_window(stream.stream_id)
                if window > 0:
                    return min(window, engine.max_outbound_frame_size, CHUNK_BYTES)
            await self._writers.park()

    def _forget(self, stream: Http2Stream) -> None:
        if self._streams.pop(stream.stream_id, None) is not None:
            self._head_bytes -= stream.head_bytes
        self._openers.unpark_all()
