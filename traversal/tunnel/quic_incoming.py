"""What the edge asks for over QUIC: each stream that it opens is one exchange, or one call of a
method of ours (edge tunnel specification 6.2 to 6.5)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import trio

from traversal.io.quic_stream import QuicError, QuicStream
from traversal.tunnel.exchange import ExchangeEndedError, Headers, Incoming, IncomingHead
from traversal.wire.tunnel.connect import (
    HOST_KEY,
    METHOD_KEY,
    RPC_SIGNATURE,
    SIGNATURE_LENGTH,
    STATUS_KEY,
    ConnectRequest,
    ConnectResponse,
    ConnectType,
    data_head_length,
    header_metadata,
    metadata_headers,
    parse_data_head,
)
from traversal.wire.tunnel.errors import TunnelError

_BAD_GATEWAY: Final = 502


class QuicIncoming(Incoming):
    """One exchange. See `Incoming`."""

    def __init__(self, stream: QuicStream, head: IncomingHead, ahead: bytes) -> None:
        self.head = head
        self._stream = stream
        self._ahead = ahead

    def cancel_when_unwanted(self, scope: trio.CancelScope) -> None:
        """Cancel the scope when the edge stops reading."""
        self._stream.call_on_send_failure(scope.cancel)

    async def receive(self) -> bytes:
        """Some of the request's body, empty at its end. Raises ExchangeEndedError."""
        if self._ahead:
            data, self._ahead = self._ahead, b""
            return data
        try:
            return await self._stream.receive()
        except QuicError as error:
            raise ExchangeEndedError(str(error)) from None

    async def respond(
        self,
        status: int,
        headers: Iterable[tuple[bytes, bytes]] = (),
        *,
        is_from_connector: bool = False,
    ) -> None:
        """The response's head, once. Raises ExchangeEndedError."""
        response = ConnectResponse()
        if is_from_connector and status == _BAD_GATEWAY:
            # The one status that this transport has an own word for.
            response = ConnectResponse(error="the origin can't be reached")
        elif self.head.kind != "tcp":
            metadata = ((STATUS_KEY, str(status)), *header_metadata(headers))
            response = ConnectResponse(metadata=metadata)
        await self.send(response.encode())

    async def send(self, data: bytes) -> None:
        """Send some of the response's body. Raises ExchangeEndedError."""
        try:
            await self._stream.send(data)
        except QuicError as error:
            raise ExchangeEndedError(str(error)) from None

    async def send_end(self, trailers: Headers = ()) -> None:
        """No more body; trailers have no place on this transport. Raises ExchangeEndedError."""
        try:
            await self._stream.send_end()
        except QuicError as error:
            raise ExchangeEndedError(str(error)) from None

    def reset(self) -> None:
        """End both directions at once; harmless on an exchange that is over. A response that is
        complete stays so; the rest of the request is not wanted any more."""
        self._stream.abort()


async def read_signature(stream: QuicStream) -> tuple[bool, bytes]:
    """Whether the stream is for a call, and what was read behind the signature of a call, or all
    that was read of an exchange. Raises QuicError, TunnelError."""
    received = b""
    while len(received) < SIGNATURE_LENGTH:
        received += await _receive(stream)
    is_call = received.startswith(RPC_SIGNATURE)
    return is_call, received[SIGNATURE_LENGTH:] if is_call else received


async def read_incoming(stream: QuicStream, received: bytes) -> QuicIncoming:
    """The exchange that a stream is for; `received` was read of it. Raises QuicError,
    TunnelError."""
    while (length := data_head_length(received)) is None:
        received += await _receive(stream)
    request = ConnectRequest.from_struct(parse_data_head(received[:length]))
    return QuicIncoming(stream, _head(request), received[length:])


async def _receive(stream: QuicStream) -> bytes:
    data = await stream.receive()
    if not data:
        raise TunnelError("connect: the stream ended before its head was complete")
    return data


def _head(request: ConnectRequest) -> IncomingHead:
    metadata = dict(request.metadata)
    if request.type is ConnectType.TCP:
        return IncomingHead("tcp", "CONNECT", request.destination, "", (), True)
    # Not by a parser of URLs, which would tidy up: the path belongs to the visitor and the origin.
    host, slash, path = request.destination.partition("://")[2].partition("/")
    if not slash:
        host, _, query = host.partition("?")
        path = f"?{query}" if query else ""
    headers = metadata_headers(request.metadata)
    is_websocket = request.type is ConnectType.WEBSOCKET
    names = dict(headers)
    # The rule of the reference: without either the request has no body.
    has_body = names.get(b"content-length", b"0") != b"0" or b"transfer-encoding" in names
    return IncomingHead(
        kind="websocket" if is_websocket else "http",
        method=metadata.get(METHOD_KEY) or "GET",
        authority=metadata.get(HOST_KEY) or host,
        path="/" + path,
        headers=tuple(header for header in headers if header[0] != b"transfer-encoding"),
        has_body=is_websocket or has_body,
    )
