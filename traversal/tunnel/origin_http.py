"""HTTP/1.1 towards origins: connections, their pool, and one request on one of them.

Bodies stream in both directions at the same time and are never held here. An origin may answer
before it has read the request; then the connection is not used again.
"""

from __future__ import annotations

import math
import socket
import ssl
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final

import h11
import trio

from traversal.io.stream import HandshakeStream, StreamEndedError
from traversal.tunnel.exchange import ExchangeEndedError, Headers, Incoming
from traversal.tunnel.relaying import relay_bytes

READ_BYTES: Final = 65536
MAX_HEAD_BYTES: Final = 128 << 10
"""Of an origin's response."""
MAX_KEEP_ALIVE: Final = 32767
"""Seconds; the most that Linux takes."""
SWEEP_SECONDS: Final = 10.0
"""Between two looks for connections that have waited long enough."""
IDEMPOTENT: Final = frozenset({"GET", "HEAD", "OPTIONS", "TRACE", "PUT", "DELETE"})
"""RFC 9110 9.2.2: a request of these may be repeated when a pooled connection turns out dead."""

_HOP_BY_HOP: Final = frozenset(
    {
        b"connection",
        b"keep-alive",
        b"proxy-connection",
        b"te",
        b"transfer-encoding",
        b"upgrade",
        b"expect",
        b"host",
        b"content-length",
    }
)
"""Made anew for the connection to the origin (RFC 9110 7.6.1)."""


_WITH_BODY: Final = frozenset({"POST", "PUT", "PATCH"})
"""Without a content-length some origins refuse these (411); see RFC 9110 8.6."""


class OriginError(Exception):
    """The origin could not be reached, or broke the protocol; the text is for an operator."""


@dataclass(frozen=True, slots=True)
class OriginAddress:
    """Where an origin listens; equal ones share pooled connections.

    Attributes:
        host, port: TCP; `path` a Unix socket instead.
        make_context: None for plain text.
        server_name: for SNI and the certificate's check.
    """

    host: str
    port: int
    path: str = ""
    make_context: Callable[[], ssl.SSLContext] | None = None
    server_name: str = ""

    def __str__(self) -> str:
        return self.path or (f"[{self.host}]" if ":" in self.host else self.host) + f":{self.port}"


@dataclass(frozen=True, slots=True)
class OriginLimits:
    """How long and how many.

    Attributes:
        connect, tls: seconds for the connection, and for the TLS handshake.
        idle: seconds that a connection may wait for its next request.
        kept: connections to one origin that may wait.
        tcp_keep_alive: seconds after which the kernel asks a silent origin whether it is there; 0
            for never.
    """

    connect: float = 30.0
    tls: float = 10.0
    idle: float = 90.0
    kept: int = 100
    tcp_keep_alive: float = 30.0


async def connect_origin(address: OriginAddress, limits: OriginLimits) -> HandshakeStream:
    """A connection with TLS done, if it is wanted. Raises OriginError."""
    try:
        with trio.fail_after(limits.connect):
            if address.path:
                sock = (await trio.open_unix_socket(address.path)).socket
            else:
                sock = (await trio.open_tcp_stream(address.host, address.port)).socket
                _keep_alive(sock, limits.tcp_keep_alive)
    except trio.TooSlowError:
        raise OriginError(f"{address}: no connection within {limits.connect:g} s") from None
    except OSError as error:
        raise OriginError(f"{address}: {_reason(error)}") from None
    stream = HandshakeStream(sock, read_bytes=READ_BYTES)
    if address.make_context is None:
        return stream
    try:
        with trio.fail_after(limits.tls):
            await stream.start_tls(
                address.make_context(), server_side=False, server_hostname=address.server_name
            )
    except trio.TooSlowError:
        stream.close()
        raise OriginError(f"{address}: no TLS within {limits.tls:g} s") from None
    except StreamEndedError as error:
        stream.close()
        raise OriginError(f"{address}: {error}") from None
    except BaseException:
        stream.close()
        raise
    return stream


def _keep_alive(sock: trio.socket.SocketType, seconds: float) -> None:
    if seconds > 0:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL):
            sock.setsockopt(socket.IPPROTO_TCP, option, min(max(1, round(seconds)), MAX_KEEP_ALIVE))


class OriginPool:
    """Connections to origins that wait for their next request."""

    def __init__(self) -> None:
        self._idle: dict[OriginAddress, deque[tuple[HandshakeStream, float]]] = {}
        """With the time until which each may wait; the freshest is the last."""
        self._sweep_at = 0.0

    def __len__(self) -> int:
        return sum(map(len, self._idle.values()))

    def take(self, address: OriginAddress) -> HandshakeStream | None:
        """A connection that the origin has not closed meanwhile, the freshest first."""
        waiting = self._idle.get(address)
        while waiting:
            stream, until = waiting.pop()
            # Whatever comes without a request is the end, or nothing that one could use.
            if trio.current_time() < until and not stream.is_readable():
                return stream
            stream.close()
        return None

    def put(self, address: OriginAddress, stream: HandshakeStream, limits: OriginLimits) -> None:
        """Keep a connection; the one that has waited longest goes where there are too many."""
        now = trio.current_time()
        if now >= self._sweep_at:
            self._sweep(now)
        waiting = self._idle.setdefault(address, deque())
        waiting.append((stream, now + limits.idle))
        while len(waiting) > limits.kept:
            waiting.popleft()[0].close()

    def close(self) -> None:
        """Close all."""
        self._sweep(math.inf)

    def _sweep(self, now: float) -> None:
        self._sweep_at = now + SWEEP_SECONDS
        for address, waiting in list(self._idle.items()):
            for stream, until in waiting:
                if until <= now:
                    stream.close()
            kept = deque((stream, until) for stream, until in waiting if until > now)
            if kept:
                self._idle[address] = kept
            else:
                del self._idle[address]


@dataclass(frozen=True, slots=True)
class OriginRequest:
    """What an origin is asked: the visitor's request after the ingress rule's changes."""

    method: str
    path: str
    host: str
    headers: Headers
    is_chunked_allowed: bool = True
    """WSGI servers know no chunked requests: then a body needs a content-length."""


async def serve_http(
    incoming: Incoming,
    request: OriginRequest,
    address: OriginAddress,
    limits: OriginLimits,
    pool: OriginPool,
) -> None:
    """Carry a request to the origin and its response back.

    Raises OriginError while nothing was answered yet, ExchangeEndedError when the origin breaks off
    afterwards or the edge gives up.
    """
    stream = pool.take(address)
    if stream is not None:
        attempt = _Attempt(incoming, request, stream)
        try:
            reusable = await attempt.run()
        except OriginError:
            stream.close()
            # The origin may have closed it while it lay idle; nothing is lost by another try
            # unless it may have acted on the request, or its body has been read in part.
            if attempt.has_answered or attempt.has_read_body or request.method not in IDEMPOTENT:
                raise
        except BaseException:
            stream.close()
            raise
        else:
            if reusable:
                pool.put(address, stream, limits)
            else:
                stream.close()
            return
    stream = await connect_origin(address, limits)
    try:
        reusable = await _Attempt(incoming, request, stream).run()
    except BaseException:
        stream.close()
        raise
    if reusable:
        pool.put(address, stream, limits)
    else:
        stream.close()


async def serve_http_on(
    incoming: Incoming, request: OriginRequest, stream: HandshakeStream
) -> None:
    """The same on a connection that is there, and not used again. Raises as `serve_http`."""
    await _Attempt(incoming, request, stream).run()


async def serve_websocket(
    incoming: Incoming, request: OriginRequest, address: OriginAddress, limits: OriginLimits
) -> None:
    """Carry a websocket's handshake to the origin, then its bytes both ways, unread.

    Raises as `serve_http`.
    """
    stream = await connect_origin(address, limits)
    try:
        extra = [(b"connection", b"Upgrade"), (b"upgrade", b"websocket")]
        if not any(name == b"sec-websocket-version" for name, _ in request.headers):
            extra.append((b"sec-websocket-version", b"13"))
        attempt = _Attempt(incoming, request, stream, upgrade=tuple(extra))
        await attempt.run()
        if attempt.has_switched:
            await relay_bytes(incoming, stream)
    finally:
        stream.close()


class _Attempt:
    """One request on one connection."""

    def __init__(
        self,
        incoming: Incoming,
        request: OriginRequest,
        stream: HandshakeStream,
        upgrade: Headers = (),
    ) -> None:
        self.has_answered = False
        self.has_read_body = False
        self.has_switched = False
        self._failure: OriginError | ExchangeEndedError | None = None
        self._is_chunked = False
        self._incoming = incoming
        self._request = request
        self._stream = stream
        self._upgrade = upgrade
        self._h11 = h11.Connection(h11.CLIENT, max_incomplete_event_size=MAX_HEAD_BYTES)

    async def run(self) -> bool:
        """Whether the connection can be used for another request."""
        try:
            await self._send(self._head())
        except h11.LocalProtocolError as error:
            raise OriginError(f"the request can't be sent in HTTP/1.1: {error}") from None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._send_body, nursery.cancel_scope)
            try:
                await self._receive_response()
            except (OriginError, ExchangeEndedError) as error:
                self._failure = error
            # After an early answer nobody needs the rest of the request.
            nursery.cancel_scope.cancel()
        failure = self._failure
        if isinstance(failure, OriginError) and self.has_answered:
            raise ExchangeEndedError(f"the origin broke off: {failure}")
        if failure is not None:
            raise failure
        # What follows a response without a request would be read as the answer to the next one.
        is_over = self._h11.our_state is h11.DONE and self._h11.their_state is h11.DONE
        return is_over and not self._h11.trailing_data[0]

    def _head(self) -> h11.Request:
        request, incoming = self._request, self._incoming.head
        headers = [(b"host", request.host.encode("ascii", "replace"))]
        headers += [(name, value) for name, value in request.headers if name not in _HOP_BY_HOP]
        if self._upgrade:
            headers += self._upgrade
        elif incoming.has_body:
            length = next((v for n, v in request.headers if n == b"content-length"), None)
            if length is not None:
                headers.append((b"content-length", length))
            elif request.is_chunked_allowed:
                headers.append((b"transfer-encoding", b"chunked"))
                self._is_chunked = True
            else:
                raise OriginError("the request has no content-length, and chunks are not allowed")
        elif request.method in _WITH_BODY:
            headers.append((b"content-length", b"0"))
        return h11.Request(method=request.method, target=request.path, headers=headers)

    async def _send(self, event: h11.Event) -> None:
        if data := self._h11.send(event):
            try:
                await self._stream.send_all(data)
            except StreamEndedError as error:
                raise OriginError(f"the origin ended the connection: {error}") from None

    async def _send_body(self, scope: trio.CancelScope) -> None:
        incoming = self._incoming
        try:
            if incoming.head.has_body and not self._upgrade:
                while data := await incoming.receive():
                    self.has_read_body = True
                    await self._send(h11.Data(data=data))
            trailers = list(incoming.trailers) if self._is_chunked else []
            await self._send(h11.EndOfMessage(headers=trailers))
        except OriginError:
            return  # it may have answered before it stopped reading; who receives knows
        except ExchangeEndedError as error:
            self._failure = error
            scope.cancel()
        except h11.LocalProtocolError as error:
            # Another length than its head said; the origin would wait for the rest.
            self._failure = ExchangeEndedError(f"the request's body is malformed: {error}")
            scope.cancel()

    async def _receive_response(self) -> None:
        while True:
            event = await self._next_event()
            if isinstance(event, h11.InformationalResponse):
                if event.status_code == 101 and self._upgrade:
                    self.has_answered = True
                    await self._incoming.respond(101, _end_to_end(event.headers, is_upgrade=True))
                    rest, _ = self._h11.trailing_data
                    self._stream.put_back(rest)
                    self.has_switched = True
                    return
            elif isinstance(event, h11.Response):
                self.has_answered = True
                await self._incoming.respond(event.status_code, _end_to_end(event.headers))
            elif isinstance(event, h11.Data):
                await self._incoming.send(bytes(event.data))
            elif isinstance(event, h11.EndOfMessage):
                await self._incoming.send_end(tuple(_end_to_end(event.headers)))
                return

    async def _next_event(self) -> h11.Event:
        while True:
            try:
                event = self._h11.next_event()
            except h11.RemoteProtocolError as error:
                raise OriginError(f"the origin's answer is no HTTP/1.1: {error}") from None
            if not isinstance(event, h11.Event):
                if event is h11.PAUSED:
                    raise OriginError("the origin wants another protocol that nobody asked for")
                try:
                    self._h11.receive_data(await self._stream.receive())
                except StreamEndedError as error:
                    raise OriginError(f"the origin ended the connection: {error}") from None
                continue
            if isinstance(event, h11.ConnectionClosed):
                raise OriginError("the origin closed the connection without an answer")
            return event


def _end_to_end(
    headers: Iterable[tuple[bytes, bytes]], *, is_upgrade: bool = False
) -> list[tuple[bytes, bytes]]:
    kept = {b"content-length"} | ({b"connection", b"upgrade"} if is_upgrade else set())
    return [(n, v) for n, v in headers if n in kept or n not in _HOP_BY_HOP]


def _reason(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__
