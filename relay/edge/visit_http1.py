"""HTTP/1.1 (and 1.0) on the public side: requests in, responses out, over one connection.

h11 does the protocol. One task reads for as long as the connection lives, one chunk ahead of what
is wanted: so a visitor that leaves is noticed while its response is being made, and no read is ever
cancelled in the middle. Pipelined requests are answered one after the other.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Iterable
from http import HTTPStatus
from typing import Final, Literal

import h11
import trio

from relay.edge.connection import Headers
from relay.edge.hygiene import MAX_HEADER_BYTES, MAX_TARGET_BYTES, RawRequest, Visitor
from relay.edge.visit import Visit, VisitorGoneError
from traversal.io.stream import HandshakeStream, StreamEndedError

logger = logging.getLogger("underpass.relay.edge")

HEAD_SECONDS: Final = 20.0
"""For a request's head, from its first byte (or from the connection's start) to its last."""
IDLE_SECONDS: Final = 75.0
"""Between two requests; nginx's default."""
BODY_SECONDS: Final = 60.0
"""Between two pieces of a request's body; nginx's default."""
LINGER_SECONDS: Final = 2.0
LINGER_BYTES: Final = 1 << 20
"""What is read and thrown away when a response was sent before the request was read: closing at
once would make the kernel throw the response away."""

Serve = Callable[[Visit], Awaitable[None]]
"""Answers a request; raises nothing but Cancelled."""


class BadHttpError(Exception):
    """The visitor speaks no HTTP, or too slowly; the text says how."""


async def serve_http1(
    stream: HandshakeStream, visitor: Visitor, serve: Serve, leaving: trio.Event
) -> None:
    """Serve a connection until it is over, or until it is idle once `leaving` is set.

    Raises BadHttpError; closing is the caller's.
    """
    connection = _Connection(stream, visitor, serve, leaving)
    problem: BadHttpError | None = None
    async with trio.open_nursery() as nursery:
        nursery.start_soon(connection.read)
        nursery.start_soon(connection.leave_when_told)
        try:
            await connection.serve()
        except BadHttpError as error:
            problem = error
        except VisitorGoneError as error:
            logger.debug("a visitor's connection ended: %s", error)
        nursery.cancel_scope.cancel()
    if problem is not None:
        raise problem


class _Connection:
    def __init__(
        self, stream: HandshakeStream, visitor: Visitor, serve: Serve, leaving: trio.Event
    ) -> None:
        self.visitor = visitor
        self.leaving = leaving
        self.has_left = trio.Event()
        self.protocol = h11.Connection(
            h11.SERVER, max_incomplete_event_size=MAX_HEADER_BYTES + MAX_TARGET_BYTES
        )
        self._stream = stream
        self._serve = serve
        self._arrived, self._chunks = trio.open_memory_channel[bytes](0)
        self._early = b""
        self._requests = 0
        self._idle = trio.CancelScope()

    async def leave_when_told(self) -> None:
        """Stop waiting for another request when we are leaving."""
        await self.leaving.wait()
        if self._requests:
            self._idle.cancel()

    async def read(self) -> None:
        try:
            while data := await self._stream.receive():
                await self._arrived.send(data)
        except StreamEndedError:
            pass
        self.has_left.set()
        self._arrived.close()

    async def serve(self) -> None:
        protocol = self.protocol
        while (request := await self._next_request()) is not None:
            self._requests += 1
            visit = _Http1Visit(self, request)
            await self._serve(visit)
            if visit.is_over:
                return
            if protocol.their_state is h11.SEND_BODY:
                await self._linger()
                return
            if protocol.our_state is not h11.DONE or protocol.their_state is not h11.DONE:
                return
            protocol.start_next_cycle()

    async def _next_request(self) -> h11.Request | None:
        """None where the visitor is done."""
        protocol = self.protocol
        if protocol.their_state is h11.IDLE and not protocol.trailing_data[0]:
            if self._requests and self.leaving.is_set():
                return None
            self._idle = trio.CancelScope(deadline=trio.current_time() + IDLE_SECONDS)
            with self._idle:
                await self.receive_more()
            if self._idle.cancelled_caught:
                return None
        with trio.move_on_after(HEAD_SECONDS):
            while True:
                try:
                    event = protocol.next_event()
                except h11.RemoteProtocolError as error:
                    await self._refuse(error.error_status_hint, str(error))
                    raise BadHttpError(str(error)) from None
                if isinstance(event, h11.Request):
                    return event
                if event is not h11.NEED_DATA:
                    return None
                await self.receive_more()
        await self._refuse(408, "the request did not come in time")
        raise BadHttpError("no complete request in time")

    async def receive_more(self) -> None:
        """Feed h11 with what comes next."""
        self.protocol.receive_data(await self.receive_raw())

    async def receive_raw(self) -> bytes:
        """What comes next; empty at the end."""
        if self._early:
            data, self._early = self._early, b""
            return data
        try:
            return await self._chunks.receive()
        except trio.EndOfChannel:
            return b""

    def put_back(self, data: bytes) -> None:
        """The next `receive_raw` returns this."""
        self._early = data

    async def send(self, data: bytes) -> None:
        try:
            await self._stream.send_all(data)
        except StreamEndedError as error:
            raise VisitorGoneError(str(error)) from None

    async def _refuse(self, status: int, text: str) -> None:
        if self.protocol.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            return
        body = f"{text}\n".encode()
        headers = [
            ("content-type", "text/plain; charset=utf-8"),
            ("content-length", str(len(body))),
            ("connection", "close"),
        ]
        head = h11.Response(status_code=status, headers=headers, reason=_reason(status))
        data = (self.protocol.send(head) or b"") + (self.protocol.send(h11.Data(data=body)) or b"")
        with trio.move_on_after(LINGER_SECONDS):
            await self.send(data)
            await self._linger()

    async def _linger(self) -> None:
        """Let the visitor read the response, and its end, before the connection is closed."""
        ignored = 0
        with trio.move_on_after(LINGER_SECONDS):
            try:
                await self._stream.send_eof()
            except StreamEndedError as error:
                raise VisitorGoneError(str(error)) from None
            while ignored < LINGER_BYTES and (data := await self.receive_raw()):
                ignored += len(data)


class _Http1Visit(Visit):
    def __init__(self, connection: _Connection, request: h11.Request) -> None:
        super().__init__(_raw_of(request), connection.visitor, has_body=True)
        self._connection = connection
        self._is_websocket = False
        self._is_aborted = False
        self._takes_trailers = False
        framing = [v for n, v in self.raw.headers if n in (b"content-length", b"transfer-encoding")]
        if not any(value.strip(b"0") for value in framing):
            self.has_body = False
            connection.protocol.next_event()  # the end of the message, which is there already

    @property
    def is_over(self) -> bool:
        """Whether the connection can't be used for another request."""
        return self._is_websocket or self._is_aborted

    async def receive(self) -> bytes:
        connection = self._connection
        protocol = connection.protocol
        if self._is_websocket:
            return await connection.receive_raw()
        while True:
            try:
                event = protocol.next_event()
            except h11.RemoteProtocolError as error:
                raise VisitorGoneError(f"the request's body is malformed: {error}") from None
            if isinstance(event, h11.Data):
                return bytes(event.data)
            if isinstance(event, h11.EndOfMessage):
                self.trailers = _plain(event.headers)
                return b""
            if event is not h11.NEED_DATA:
                return b""
            if protocol.they_are_waiting_for_100_continue:
                interim = h11.InformationalResponse(
                    status_code=100, headers=[], reason=_reason(100)
                )
                await connection.send(protocol.send(interim) or b"")
            with trio.move_on_after(BODY_SECONDS) as timeout:
                await connection.receive_more()
            if timeout.cancelled_caught:
                raise VisitorGoneError("no more of the request's body came in time")

    async def respond(self, status: int, headers: Headers) -> None:
        self.has_responded = True
        reason = _reason(status)
        if status == 101:
            self._is_websocket = True
            await self._send(
                h11.InformationalResponse(status_code=101, headers=list(headers), reason=reason)
            )
            self._connection.put_back(self._connection.protocol.trailing_data[0])
            return
        self._takes_trailers = (
            self.raw.version == "1.1"
            and self.raw.method != b"HEAD"
            and status not in (204, 304)
            and all(name != b"content-length" for name, _ in headers)
        )
        is_unread = status >= 400 and self._connection.protocol.their_state is h11.SEND_BODY
        if is_unread or self._connection.leaving.is_set():
            # The rest of the request is not wanted and nothing can follow it, or nothing should.
            headers = (*headers, (b"connection", b"close"))
        await self._send(h11.Response(status_code=status, headers=list(headers), reason=reason))

    async def send(self, data: bytes) -> None:
        if self._is_websocket:
            await self._connection.send(data)
        else:
            await self._send(h11.Data(data=data))

    async def send_end(self, trailers: Headers = ()) -> None:
        if not self._is_websocket:
            await self._send(
                h11.EndOfMessage(headers=list(trailers) if self._takes_trailers else [])
            )

    async def gone(self) -> None:
        await self._connection.has_left.wait()

    def abort(self) -> None:
        self._is_aborted = True

    async def _send(self, event: h11.Event) -> None:
        try:
            data = self._connection.protocol.send(event)
        except h11.LocalProtocolError as error:
            # The origin's fault: for example a body of another length than it announced.
            raise VisitorGoneError(f"the response can't be sent: {error}") from None
        if data:
            await self._connection.send(data)


def _raw_of(request: h11.Request) -> RawRequest:
    version: Literal["1.0", "1.1"] = "1.1" if request.http_version == b"1.1" else "1.0"
    return RawRequest(
        bytes(request.method), bytes(request.target), _plain(request.headers), version=version
    )


def _plain(headers: Iterable[tuple[bytes, bytes]]) -> Headers:
    return tuple((bytes(name), bytes(value)) for name, value in headers)


def _reason(status: int) -> str:
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return ""
