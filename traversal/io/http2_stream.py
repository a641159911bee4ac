"""Streams of an HTTP/2 connection, for their users: a request and its response."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Self

import trio
from h2.errors import ErrorCodes
from h2.events import InformationalResponseReceived, ResponseReceived, TrailersReceived
from h2.exceptions import H2Error

from traversal.io.http2_engine import Http2Error

if TYPE_CHECKING:
    from traversal.io.http2 import Http2Connection

Headers = list[tuple[bytes, bytes]]
"""Names in lower case, pseudo-headers first, as on the wire."""


class Http2StreamError(Http2Error):
    """A stream was reset, or its connection ended; `code` is HTTP/2's error code (RFC 9113 7).

    `is_unprocessed` says that the other side promises to have done nothing with the request.
    """

    def __init__(self, text: str, code: int, *, is_unprocessed: bool = False) -> None:
        super().__init__(text)
        self.code = code
        self.is_unprocessed = is_unprocessed


class Http2Stream:
    """One request and its response. Use it in `async with`: leaving resets what is not over.

    One task may receive while another sends.

    Attributes:
        request_headers: of a stream that was accepted; empty on one that we opened.
        head_bytes: what they count for in the connection's limits.
        trailers: that came after the body; None before its end, and where there were none.
    """

    def __init__(
        self, connection: Http2Connection, stream_id: int, headers: Headers, window: int
    ) -> None:
        self.stream_id = stream_id
        self.request_headers = headers
        self.head_bytes = 0
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
        self._on_failure: Callable[[], None] | None = None

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

    def call_on_failure(self, callback: Callable[[], None]) -> None:
        """Have this called when the stream is reset or its connection ends; at once if it was."""
        self._on_failure = callback
        if self._failure is not None:
            callback()

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
            if self._on_failure is not None:
                self._on_failure()
            self._forget_if_over()
            self._readers.unpark_all()
            self._connection._writers.unpark_all()


def header(headers: Sequence[tuple[bytes, bytes]], name: bytes) -> bytes | None:
    """The first value of a header, by its name in lower case."""
    return next((value for key, value in headers if key == name), None)
