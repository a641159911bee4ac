"""HTTP/2 under Trio, either role: the edge towards connectors, connectors towards the edge, public
visitors, origins.

One task reads, one writes; a stream has none of its own. What a stream's reader has not taken yet
is bounded by that stream's window alone: the connection's window is opened again as soon as bytes
arrive, so that a reader that stalls holds up nobody else (`Http2Limits.buffered_bytes` bounds the
sum). Writers wait for windows and for the network, and take turns frame by frame.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from types import TracebackType
from typing import Final, Protocol, Self

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

from traversal.io.http2_engine import Http2Engine, Http2Error, Http2Limits
from traversal.io.stream import StreamEndedError

Headers = list[tuple[bytes, bytes]]
"""Names in lower case, pseudo-headers first, as on the wire."""

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


class Http2StreamError(Http2Error):
    """A stream was reset, or its connection ended; `code` is HTTP/2's error code (RFC 9113 7).

    `is_unprocessed` says that the other side promises to have done nothing with the request.
    """

    def __init__(self, text: str, code: int, *, is_unprocessed: bool = False) -> None:
        super().__init__(text)
        self.code = code
        self.is_unprocessed = is_unprocessed


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
                if self._is_leaving:
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
        self._streams.pop(stream.stream_id, None)
        self._openers.unpark_all()


class Http2Stream:
    """One request and its response. Use it in `async with`: leaving resets what is not over.

    One task may receive while another sends.

    Attributes:
        request_headers: of a stream that was accepted; empty on one that we opened.
        trailers: that came after the body; None before its end, and where there were none.
    """

    def __init__(
        self, connection: Http2Connection, stream_id: int, headers: Headers, window: int
    ) -> None:
        self.stream_id = stream_id
        self.request_headers = headers
        self.trailers: Headers | None = None
        self._connection = connection
        self._window = window
        self._chunks: deque[bytes] = deque()
        self._buffered = 0
        self._unacknowledged = 0
        self._response: Headers | None = None
        self._readers = trio.lowlevel.ParkingLot()
        self._is_receive_ended = False
        self._is_send_ended = False
        self._failure: Http2StreamError | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.discard()

    # ---- receiving

    async def response(self) -> Headers:
        """The response's headers. Raises Http2StreamError."""
        await trio.lowlevel.checkpoint_if_cancelled()
        while self._response is None:
            self._check()
            if self._is_receive_ended:
                raise Http2StreamError("HTTP/2: no response", ErrorCodes.PROTOCOL_ERROR)
            await self._readers.park()
        return self._response

    async def receive(self, max_bytes: float = math.inf) -> bytes:
        """What came of the body, at least a byte of it, at most about `max_bytes`; empty at its
        end. Raises Http2StreamError, but only after all that came before was returned."""
        await trio.lowlevel.checkpoint_if_cancelled()
        while not self._chunks:
            if self._is_receive_ended:
                return b""
            self._check()
            await self._readers.park()
        chunks = self._chunks
        taken = [chunks.popleft()]
        size = len(taken[0])
        while chunks and size + len(chunks[0]) <= max_bytes:
            taken.append(chunks.popleft())
            size += len(taken[-1])
        self._note_taken(size)
        self._acknowledge(size)
        return taken[0] if len(taken) == 1 else b"".join(taken)

    def _acknowledge(self, size: int) -> None:
        """Open the stream's window again by what was taken; half a window at a time."""
        self._unacknowledged += size
        connection = self._connection
        if (
            self._unacknowledged < self._window // 2
            or self._is_receive_ended
            or self._failure is not None
        ):
            return
        try:
            connection._engine.increment_flow_control_window(self._unacknowledged, self.stream_id)
        except (H2Error, KeyError):
            return  # it is over, and the event that says so is on its way
        self._unacknowledged = 0
        connection._flush()

    @property
    def is_receive_ended(self) -> bool:
        """Whether the other side has sent all it will, and all of it was received."""
        return self._is_receive_ended and not self._chunks

    @property
    def may_receive_more(self) -> bool:
        """Whether `receive` may return anything: the body is not known to be at its end."""
        return bool(self._chunks) or not self._is_receive_ended

    async def failed(self) -> None:
        """Returns when the stream was reset or its connection ended; may never."""
        await trio.lowlevel.checkpoint_if_cancelled()
        while self._failure is None:
            await self._readers.park()

    # ---- sending

    async def respond(self, headers: Headers, *, end_stream: bool = False) -> None:
        """Send the response's headers, informational ones included. Raises Http2StreamError."""
        await self._send_headers(headers, end_stream=end_stream)

    async def send(self, data: bytes | bytearray | memoryview) -> None:
        """Send some of the body; returns when it is on its way. Raises Http2StreamError."""
        await trio.lowlevel.checkpoint_if_cancelled()
        connection = self._connection
        view = memoryview(data)
        while view:
            room = await connection._wait_writable(self)
            connection._engine.send_data(self.stream_id, view[:room])
            connection._flush()
            view = view[room:]
            if view:
                # Others want a turn.
                await trio.lowlevel.checkpoint()

    async def send_end(self, trailers: Headers | None = None) -> None:
        """No more body. Raises Http2StreamError; harmless when repeated."""
        if self._is_send_ended:
            return
        if trailers:
            await self._send_headers(trailers, end_stream=True)
            return
        await trio.lowlevel.checkpoint_if_cancelled()
        self._check()
        self._connection._engine.end_stream(self.stream_id)
        self._connection._flush()
        self._note_send_ended()

    async def _send_headers(self, headers: Headers, *, end_stream: bool) -> None:
        await trio.lowlevel.checkpoint_if_cancelled()
        self._check()
        try:
            self._connection._engine.send_headers(self.stream_id, headers, end_stream=end_stream)
        except H2Error as error:
            self.reset(ErrorCodes.INTERNAL_ERROR)
            raise Http2StreamError(f"HTTP/2: {error}", ErrorCodes.INTERNAL_ERROR) from None
        self._connection._flush()
        if end_stream:
            self._note_send_ended()

    def reset(self, code: int = ErrorCodes.CANCEL) -> None:
        """End both directions at once; harmless on a stream that is over."""
        if self._failure is not None or (self._is_send_ended and self._is_receive_ended):
            return
        connection = self._connection
        if connection.failure is None:
            try:
                connection._engine.reset_stream(self.stream_id, code)
            except H2Error:
                pass
            connection._flush()
        self._fail(Http2StreamError("HTTP/2: we reset the stream", int(code)))

    def discard(self, code: int = ErrorCodes.CANCEL) -> None:
        """Reset the stream, if it is not over, and forget what nobody read."""
        self.reset(code)
        if self._chunks and self._failure is None:
            # It was over, but for its reader: who comes later must not take it for complete.
            self._is_receive_ended = False
            self._failure = Http2StreamError("HTTP/2: the body was not read in time", int(code))
        self._chunks.clear()
        self._note_taken(self._buffered)

    # ---- from the connection

    def _check(self) -> None:
        failure = self._failure
        if failure is not None:
            # A new one each time: an exception keeps the tracebacks of all that raised it.
            raise Http2StreamError(
                str(failure), failure.code, is_unprocessed=failure.is_unprocessed
            )

    def _handle_data(self, data: bytes, flow_controlled_length: int) -> None:
        padding = flow_controlled_length - len(data)
        if data:
            self._chunks.append(data)
            self._buffered += len(data)
            self._readers.unpark_all()
        if padding:
            self._acknowledge(padding)

    def _handle_headers(
        self, event: ResponseReceived | TrailersReceived | InformationalResponseReceived
    ) -> None:
        if isinstance(event, ResponseReceived):
            self._response = list(event.headers)
        elif isinstance(event, TrailersReceived):
            self.trailers = list(event.headers)
        self._readers.unpark_all()

    def _handle_end(self) -> None:
        self._is_receive_ended = True
        self._readers.unpark_all()
        self._forget_if_over()

    def _note_send_ended(self) -> None:
        self._is_send_ended = True
        self._forget_if_over()

    def _note_taken(self, size: int) -> None:
        self._buffered -= size
        self._connection._buffered -= size
        self._forget_if_over()

    def _forget_if_over(self) -> None:
        is_over = self._failure is not None or (self._is_send_ended and self._is_receive_ended)
        if is_over and not self._chunks:
            self._connection._forget(self)

    def _fail(self, failure: Http2StreamError) -> None:
        if self._failure is None and not (self._is_send_ended and self._is_receive_ended):
            self._failure = failure
            self._forget_if_over()
            self._readers.unpark_all()
            self._connection._writers.unpark_all()


def header(headers: Sequence[tuple[bytes, bytes]], name: bytes) -> bytes | None:
    """The first value of a header, by its name in lower case."""
    return next((value for key, value in headers if key == name), None)
