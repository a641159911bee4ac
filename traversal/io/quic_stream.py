"""Streams of a QUIC connection, for their users: what was received and not taken, what is to be
sent and was not handed to the library."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Final, Self

import trio
from qh3.quic.connection import QuicConnectionError

from traversal.io.spool import Spool

if TYPE_CHECKING:
    from traversal.io.quic import QuicConnection

SEND_BUFFER_BYTES: Final = 512 << 10
"""A stream's writer waits while this much of it was not sent once."""
STREAM_HEADER_BYTES: Final = 20
NO_ERROR: Final = 0


class QuicError(Exception):
    """A connection or stream failed or was closed; `code` is the application's or QUIC's code."""

    def __init__(self, text: str, code: int = NO_ERROR) -> None:
        super().__init__(text)
        self.code = code


class QuicStream:
    """A bidirectional stream. Use it in `async with`: leaving aborts what is not over.

    One task may receive while another sends.
    """

    def __init__(self, connection: QuicConnection, stream_id: int) -> None:
        self.stream_id = stream_id
        self._connection = connection
        self._spool = Spool()
        self._unsent: deque[memoryview] = deque()
        self._unsent_bytes = 0
        self._fed_bytes = 0
        """What the library was given of it."""
        self._has_unsent = False
        self._is_end_unsent = False
        self._readers = trio.lowlevel.ParkingLot()
        self._senders = trio.lowlevel.ParkingLot()
        self._is_receive_ended = False
        self._is_send_ended = False
        self._receive_failure: QuicError | None = None
        self._send_failure: QuicError | None = None
        self._on_send_failure: Callable[[], None] | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.abort()

    # ---- receiving

    async def receive(self) -> bytes:
        """Some bytes, empty at the end. Raises QuicError, but only after what came before."""
        await trio.lowlevel.checkpoint_if_cancelled()
        while not self._spool:
            if self._is_receive_ended:
                return b""
            if self._receive_failure is not None:
                raise QuicError(str(self._receive_failure), self._receive_failure.code)
            await self._readers.park()
        data = self._spool.take()
        self._connection._spooled -= len(data)
        self._forget_if_over()
        return data

    def stop(self, code: int = NO_ERROR) -> None:
        """Tell the other side that we read no more (STOP_SENDING)."""
        if self._is_receive_ended or self._receive_failure is not None:
            return
        connection = self._connection
        try:
            connection._engine.stop_stream(self.stream_id, code)
        except QuicConnectionError:
            pass
        if self.stream_id & 3 == connection._foreign:
            connection._aborted.add(self.stream_id)
        self._fail_receiving(QuicError("QUIC: we stopped reading", code))
        connection._wake.set()

    # ---- sending

    async def send(self, data: bytes | bytearray | memoryview) -> None:
        """Send bytes; returns when they are on their way or soon will be. Raises QuicError."""
        await trio.lowlevel.checkpoint_if_cancelled()
        # A copy of what may change when we return.
        view = memoryview(data if isinstance(data, bytes) else bytes(data))
        while view:
            self._check_sending()
            if self._unsent_bytes >= SEND_BUFFER_BYTES:
                await self._senders.park()
                continue
            self._write(view[:SEND_BUFFER_BYTES])
            view = view[SEND_BUFFER_BYTES:]

    async def send_end(self) -> None:
        """No more from us (FIN). Raises QuicError; harmless when repeated."""
        await trio.lowlevel.checkpoint_if_cancelled()
        if not self._is_send_ended:
            self._check_sending()
            self._is_end_unsent = True
            self._write(memoryview(b""))
            self._is_send_ended = True
            self._forget_if_over()

    def call_on_send_failure(self, callback: Callable[[], None]) -> None:
        """Have this called when the other side stops reading, or the connection ends before
        `send_end`; at once if that has happened."""
        self._on_send_failure = callback
        if self._send_failure is not None:
            callback()

    def reset(self, code: int = NO_ERROR) -> None:
        """Tell the other side that what we sent is void (RESET_STREAM)."""
        if self._is_send_ended or self._send_failure is not None:
            return
        try:
            self._connection._engine.reset_stream(self.stream_id, code)
        except QuicConnectionError:
            pass
        self._fail_sending(QuicError("QUIC: we reset the stream", code))
        self._connection._wake.set()

    def abort(self, code: int = NO_ERROR) -> None:
        """Both `reset` and `stop`, and forget what nobody read; harmless on one that is over."""
        if self._connection.failure is None:
            self.reset(code)
            self.stop(code)
        if self._spool:
            # Who comes later must not take it for complete.
            self._is_receive_ended = False
            self._receive_failure = self._receive_failure or QuicError("QUIC: not read in time")
            self._connection._spooled -= len(self._spool)
            self._spool.clear()
        self._forget_if_over()

    def _check_sending(self) -> None:
        if self._send_failure is not None:
            raise QuicError(str(self._send_failure), self._send_failure.code)

    def _write(self, data: memoryview) -> None:
        connection = self._connection
        if not self._has_unsent and self not in connection._stalled:
            connection._writers.append(self)
        self._has_unsent = True
        if data:
            self._unsent.append(data)
            self._unsent_bytes += len(data)
        connection._wake.set()

    def _feed(self, max_bytes: int) -> int:
        """Hand bytes to the library; how many, with something for a header."""
        data = memoryview(b"")
        if self._unsent:
            data = self._unsent.popleft()
            if len(data) > max_bytes:
                self._unsent.appendleft(data[max_bytes:])
                data = data[:max_bytes]
            self._unsent_bytes -= len(data)
            self._fed_bytes += len(data)
            if self._unsent_bytes < SEND_BUFFER_BYTES:
                self._senders.unpark_all()
        self._has_unsent = bool(self._unsent)
        is_end = self._is_end_unsent and not self._has_unsent
        if self._send_failure is None or self._is_send_ended:
            try:
                self._connection._engine.send_stream_data(self.stream_id, data, is_end)
            except QuicConnectionError:
                # The other side stopped reading, and that is among the events to come.
                self._drop_unsent()
        return len(data) + STREAM_HEADER_BYTES

    def _drop_unsent(self) -> None:
        self._unsent.clear()
        self._unsent_bytes = 0
        self._has_unsent = False

    # ---- from the connection

    def _handle_data(self, data: bytes, *, is_end: bool) -> None:
        if data:
            self._spool.append(data)
        if is_end:
            self._is_receive_ended = True
        self._readers.unpark_all()
        self._forget_if_over()

    def _fail_receiving(self, failure: QuicError) -> None:
        if not self._is_receive_ended and self._receive_failure is None:
            self._receive_failure = failure
            self._readers.unpark_all()
            self._forget_if_over()

    def _fail_sending(self, failure: QuicError) -> None:
        if not self._is_send_ended and self._send_failure is None:
            self._send_failure = failure
            self._drop_unsent()
            if self._on_send_failure is not None:
                self._on_send_failure()
            self._senders.unpark_all()
            self._forget_if_over()

    def _fail(self, failure: QuicError) -> None:
        self._fail_receiving(failure)
        self._fail_sending(failure)

    def _forget_if_over(self) -> None:
        is_received = self._is_receive_ended or self._receive_failure is not None
        is_sent = self._is_send_ended or self._send_failure is not None
        if is_received and is_sent and not self._spool:
            self._connection._forget(self)
