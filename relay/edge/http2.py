"""A connector's connection over HTTP/2, on which the edge is the client (edge tunnel specification
5). Each request, websocket, TCP connection and configuration push is a stream that the edge opens.
"""

from __future__ import annotations

from typing import Final

import msgspec

from relay.edge.connection import (
    ConnectionFailedError,
    Exchange,
    Headers,
    RequestHead,
    ResponseHead,
    TunnelConnection,
)
from traversal.io.http2 import Http2Connection
from traversal.io.http2_engine import Http2Error
from traversal.io.http2_stream import Http2Stream, Http2StreamError, header
from traversal.wire.tunnel.errors import TunnelError
from traversal.wire.tunnel.headers import (
    RESPONSE_HEADERS,
    RESPONSE_META,
    TCP_SOURCE,
    UPDATE_CONFIGURATION,
    UPGRADE,
    WEBSOCKET,
    ResponseMeta,
    is_reserved,
    parse_response_meta,
    parse_serialized_headers,
)
from traversal.wire.tunnel.registration import ConnectionDetails, RegisterConnection

MAX_CONFIGURATION_ANSWER: Final = 16 << 10


class _ConfigurationAnswer(msgspec.Struct, rename={"last_applied": "lastAppliedVersion"}):
    last_applied: int


class Http2TunnelConnection(TunnelConnection):
    """A registered connection. `relay.edge.http2_session` brings it about and ends it."""

    transport = "http2"

    def __init__(
        self,
        http2: Http2Connection,
        request: RegisterConnection,
        details: ConnectionDetails,
        *,
        source: str,
        now: float,
    ) -> None:
        super().__init__(request, details, source=source, now=now)
        self._http2 = http2

    @property
    def is_usable(self) -> bool:
        """Whether new requests may be given to it."""
        return not self.is_leaving and self._http2.is_usable

    @property
    def is_connected(self) -> bool:
        """Whether what it runs over still works."""
        return self._http2.failure is None

    async def request(self, head: RequestHead) -> Exchange:
        """Send a request's head; doesn't wait for the response. Raises ConnectionFailedError."""
        headers = [
            (b":method", head.method.encode()),
            (b":scheme", head.scheme.encode()),
            (b":authority", head.authority.encode()),
            (b":path", head.path.encode()),
            *head.headers,
        ]
        is_websocket = head.kind == "websocket"
        if is_websocket:
            headers.append((UPGRADE, WEBSOCKET))
        stream = await self._open(headers, end_stream=not is_websocket and not head.has_body)
        return _Http2Exchange(self, stream, is_websocket=is_websocket)

    async def connect_tcp(self, destination: str, source: str) -> Exchange:
        """Have the connector dial `IP:port`. Raises ConnectionFailedError."""
        headers = internal_request(b"GET", (TCP_SOURCE, source.encode()), destination.encode())
        return _Http2Exchange(self, await self._open(headers))

    async def push_configuration(self, version: int, document: bytes) -> int:
        """Have the connector use a configuration. Raises ConnectionFailedError."""
        body = b'{"version":%d,"config":%b}' % (version, document)
        headers = internal_request(b"POST", (UPGRADE, UPDATE_CONFIGURATION))
        exchange = _Http2Exchange(self, await self._open(headers))
        async with exchange:
            await exchange.send(body)
            await exchange.send_end()
            response = await exchange.response()
            answer = b""
            while data := await exchange.receive():
                answer += data
                if len(answer) > MAX_CONFIGURATION_ANSWER:
                    break
        try:
            return msgspec.json.decode(answer, type=_ConfigurationAnswer).last_applied
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            raise ConnectionFailedError(
                f"the configuration was answered with {response.status} and no version"
            ) from None

    def _close_transport(self, reason: str) -> None:
        self._http2.close()

    async def _open(
        self, headers: list[tuple[bytes, bytes]], *, end_stream: bool = False
    ) -> Http2Stream:
        self._begin_exchange()
        try:
            stream = await self._http2.open(headers, end_stream=end_stream)
        except Http2Error as error:
            self._end_exchange()
            # Nothing was sent.
            raise ConnectionFailedError(str(error), is_unprocessed=True) from None
        except BaseException:
            self._end_exchange()
            raise
        self.requests += 1
        return stream


class _Http2Exchange(Exchange):
    """A stream as the side that faces visitors wants it."""

    def __init__(
        self, connection: Http2TunnelConnection, stream: Http2Stream, *, is_websocket: bool = False
    ) -> None:
        self._connection = connection
        self._stream = stream
        self._is_websocket = is_websocket
        self._is_over = False

    async def response(self) -> ResponseHead:
        """The response's head. Raises ConnectionFailedError."""
        try:
            headers = await self._stream.response()
        except Http2StreamError as error:
            raise _failed(error) from None
        try:
            return _response_head(headers, is_websocket=self._is_websocket)
        except TunnelError as error:
            raise ConnectionFailedError(str(error)) from None

    async def receive(self) -> bytes:
        """Some of the response's body, empty at its end. Raises ConnectionFailedError."""
        try:
            data = await self._stream.receive()
        except Http2StreamError as error:
            raise _failed(error) from None
        if not data and self._stream.trailers:
            self.trailers = _clean(self._stream.trailers)
        return data

    async def send(self, data: bytes) -> None:
        """Send some of the request's body. Raises ConnectionFailedError."""
        try:
            await self._stream.send(data)
        except Http2StreamError as error:
            raise _failed(error) from None

    async def send_end(self, trailers: Headers = ()) -> None:
        """No more body. Raises ConnectionFailedError."""
        try:
            await self._stream.send_end(list(trailers) or None)
        except Http2StreamError as error:
            raise _failed(error) from None

    def reset(self) -> None:
        """End both directions at once; harmless on an exchange that is over."""
        if not self._is_over:
            self._is_over = True
            self._stream.discard()
            self._connection._end_exchange()


def internal_request(
    method: bytes, kind: tuple[bytes, bytes], authority: bytes = b"edge"
) -> list[tuple[bytes, bytes]]:
    """Headers of a request that no visitor made; for TCP the authority is the destination."""
    return [
        (b":method", method),
        (b":scheme", b"https"),
        (b":authority", authority),
        (b":path", b"/"),
        kind,
    ]


def _failed(error: Http2StreamError) -> ConnectionFailedError:
    return ConnectionFailedError(str(error), is_unprocessed=error.is_unprocessed)


def _response_head(headers: list[tuple[bytes, bytes]], *, is_websocket: bool) -> ResponseHead:
    status_text = header(headers, b":status") or b""
    if len(status_text) != 3 or not status_text.isdigit():
        raise TunnelError(f"the connector answered with status {status_text!r}")
    status = int(status_text)
    meta_text = header(headers, RESPONSE_META)
    meta = ResponseMeta(is_from_origin=True) if not meta_text else parse_response_meta(meta_text)
    origin = [
        (name.lower(), value)
        for name, value in parse_serialized_headers(header(headers, RESPONSE_HEADERS) or b"")
    ]
    # HTTP/2 has no 101; the origin's handshake headers tell an accepted websocket from a page.
    if is_websocket and status == 200 and header(origin, b"sec-websocket-accept") is not None:
        status = 101
    return ResponseHead(
        status,
        tuple(origin),
        is_from_connector=not meta.is_from_origin,
        is_flow_limited=meta.is_rate_limited,
    )


def _clean(trailers: list[tuple[bytes, bytes]]) -> Headers:
    return tuple((name, value) for name, value in trailers if not is_reserved(name))
