"""A connector's connection over HTTP/2: it dials, and the edge is the client (edge tunnel
specification 5)."""

from __future__ import annotations

import functools
import logging
import os
import socket
import ssl
from collections.abc import Iterable
from errno import EADDRNOTAVAIL, EHOSTUNREACH, ENETUNREACH
from typing import Final

import msgspec
import trio

from traversal.io.dial import DialError, Target, connect
from traversal.io.http2 import Http2Connection
from traversal.io.http2_engine import Http2Error, Http2Limits
from traversal.io.http2_stream import Http2Stream, header
from traversal.io.proxy import Proxy, ProxyError
from traversal.io.quic_settings import CONNECTOR_STREAMS
from traversal.relay_map import CertificateName
from traversal.tunnel.edge_connection import (
    DialFailedError,
    DialOptions,
    EdgeConnection,
    Service,
)
from traversal.tunnel.exchange import ExchangeEndedError, Headers, Incoming, IncomingHead
from traversal.tunnel.transport_choice import Transport
from traversal.wire.address import Address
from traversal.wire.tunnel.headers import (
    CONTROL_STREAM,
    RESPONSE_HEADERS,
    RESPONSE_META,
    TCP_SOURCE,
    UPDATE_CONFIGURATION,
    UPGRADE,
    WEBSOCKET,
    ResponseMeta,
    is_reserved,
    serialize_headers,
)
from traversal.wire.tunnel.registration import RegisterConnection

logger = logging.getLogger("underpass.tunnel.http2")

SERVER_NAME: Final = "h2.cftunnel.com"
CONTROL_SECONDS: Final = 10.0
"""For the edge's preface and the control stream."""
PING_SECONDS: Final = 10.0
PING_PATIENCE_SECONDS: Final = 10.0
"""A path that swallows everything is noticed within the sum; TCP alone takes minutes."""
MAX_CONFIGURATION_BYTES: Final = 1 << 20
READ_BYTES: Final = 128 << 10
_NO_ROUTE: Final = tuple(os.strerror(code) for code in (ENETUNREACH, EHOSTUNREACH, EADDRNOTAVAIL))
LIMITS: Final = Http2Limits(streams=CONNECTOR_STREAMS, stream_window=1 << 20, header_bytes=1 << 20)
"""More than an edge needs (the reference allows as much, and any number of streams), and all that
it makes us hold."""


async def serve_http2(
    address: Address,
    options: DialOptions,
    request: RegisterConnection,
    service: Service,
    *,
    task_status: trio.TaskStatus[EdgeConnection] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Connect, register, and serve what the edge sends until the connection is over.

    Through HTTPS_PROXY, where that is set. Starts with the connection when it is registered. Raises
    DialFailedError before that.
    """
    failure: DialFailedError | None = None
    async with trio.open_nursery() as nursery:
        try:
            connection, http2 = await _dial(nursery, address, options, request)
        except DialFailedError as error:
            failure = error
        else:
            task_status.started(connection)
            nursery.start_soon(connection.follow_control)
            nursery.start_soon(_watch, connection, http2)
            try:
                await _serve_streams(connection, http2, service)
            finally:
                connection.end(str(http2.failure or "we closed it"))
                http2.close()
        nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure


async def _dial(
    nursery: trio.Nursery, address: Address, options: DialOptions, request: RegisterConnection
) -> tuple[EdgeConnection, Http2Connection]:
    """Raises DialFailedError."""
    make_context = options.make_context or functools.partial(
        ssl.create_default_context, cafile=options.ca_file
    )
    try:
        proxy = Proxy.maybe_from_environment(address.host)
        # A proxy connects to the host that it is told, so that has to be the address.
        target = Target(address.host, address.port, CertificateName(SERVER_NAME))
        if proxy is None:
            routes = ((address.host, socket.AF_UNSPEC),)
            target = Target(SERVER_NAME, address.port, CertificateName(SERVER_NAME), routes)
        stream, _ = await connect(
            target, make_context=make_context, proxy=proxy, read_bytes=READ_BYTES
        )
    except DialError as error:
        is_unroutable = any(text in error.reason for text in _NO_ROUTE)
        # What the certificate is for is no place, and would be taken for one.
        reason = str(error).removeprefix(f"{target}: ")
        raise DialFailedError(f"{address}: {reason}", is_unroutable=is_unroutable) from None
    except (ProxyError, OSError) as error:
        raise DialFailedError(f"{address}: {error}") from None
    http2 = Http2Connection(stream, client_side=False, limits=LIMITS)
    await nursery.start(http2.run)
    try:
        with trio.fail_after(CONTROL_SECONDS):
            control = await http2.accept()
            if header(control.request_headers, UPGRADE) != CONTROL_STREAM:
                raise DialFailedError(f"{address}: no edge: its first request is no control stream")
            await control.respond([(b":status", b"200")])
    except trio.TooSlowError:
        raise DialFailedError(
            f"{address}: no edge: no control stream within {CONTROL_SECONDS:.0f} s"
        ) from None
    except Http2Error as error:
        raise DialFailedError(f"{address}: {error}") from None
    connection = EdgeConnection(Transport.HTTP2, address, request, http2.close)
    await connection.register(control)
    return connection, http2


async def _watch(connection: EdgeConnection, http2: Http2Connection) -> None:
    """Notice a path that leads nowhere any more, and an edge that takes its leave."""
    try:
        while True:
            with trio.fail_after(PING_PATIENCE_SECONDS):
                await http2.ping()
            if not http2.is_usable:
                connection.leaving.set()
            with trio.move_on_after(PING_SECONDS):
                await connection.over.wait()
                return
    except (trio.TooSlowError, Http2Error):
        http2.close()


async def _serve_streams(
    connection: EdgeConnection, http2: Http2Connection, service: Service
) -> None:
    async with trio.open_nursery() as nursery:
        try:
            while True:
                stream = await http2.accept()
                nursery.start_soon(_serve_stream, connection, stream, service)
        except Http2Error:
            nursery.cancel_scope.cancel()


async def _serve_stream(connection: EdgeConnection, stream: Http2Stream, service: Service) -> None:
    if header(stream.request_headers, UPGRADE) == UPDATE_CONFIGURATION:
        async with stream:
            try:
                await _update_configuration(stream, service)
            except Http2Error as error:
                logger.debug("a pushed configuration: %s", error)
        return
    await connection.serve(service, Http2Incoming(stream))


class _Update(msgspec.Struct):
    version: int
    config: msgspec.Raw


async def _update_configuration(stream: Http2Stream, service: Service) -> None:
    """Raises Http2Error."""
    body = b""
    while data := await stream.receive():
        body += data
        if len(body) > MAX_CONFIGURATION_BYTES:
            return
    try:
        update = msgspec.json.decode(body, type=_Update)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        await stream.respond([(b":status", b"400")])
        await stream.send(str(error).encode())
        await stream.send_end()
        return
    applied, problem = service.update_configuration(update.version, bytes(update.config))
    answer = {"lastAppliedVersion": applied, "err": problem or None}
    await stream.respond([(b":status", b"200"), (b"content-type", b"application/json")])
    await stream.send(msgspec.json.encode(answer))
    await stream.send_end()


class Http2Incoming(Incoming):
    """One exchange. See `Incoming`."""

    def __init__(self, stream: Http2Stream) -> None:
        self.head = _head(stream)
        self._stream = stream

    @property
    def trailers(self) -> Headers:  # type: ignore[override] # they come with the body's end
        """Of the request."""
        return tuple(self._stream.trailers or ())

    def cancel_when_unwanted(self, scope: trio.CancelScope) -> None:
        """Cancel the scope when the edge resets the stream."""
        self._stream.call_on_failure(scope.cancel)

    async def receive(self) -> bytes:
        """Some of the request's body, empty at its end. Raises ExchangeEndedError."""
        try:
            return await self._stream.receive()
        except Http2Error as error:
            raise ExchangeEndedError(str(error)) from None

    async def respond(
        self,
        status: int,
        headers: Iterable[tuple[bytes, bytes]] = (),
        *,
        is_from_connector: bool = False,
    ) -> None:
        """The response's head, once. Raises ExchangeEndedError."""
        headers = list(headers)
        response = [
            # HTTP/2 has no 101.
            (b":status", b"%d" % (200 if status == 101 else status)),
            (RESPONSE_HEADERS, serialize_headers(headers)),
            (RESPONSE_META, ResponseMeta(is_from_origin=not is_from_connector).encode()),
        ]
        length = header(headers, b"content-length")
        if length is not None and status != 101:
            response.append((b"content-length", length))
        try:
            await self._stream.respond(response)
        except Http2Error as error:
            raise ExchangeEndedError(str(error)) from None

    async def send(self, data: bytes) -> None:
        """Send some of the response's body. Raises ExchangeEndedError."""
        try:
            await self._stream.send(data)
        except Http2Error as error:
            raise ExchangeEndedError(str(error)) from None

    async def send_end(self, trailers: Headers = ()) -> None:
        """No more body. Raises ExchangeEndedError."""
        kept = [(name, value) for name, value in trailers if not is_reserved(name)]
        try:
            await self._stream.send_end(kept or None)
        except Http2Error as error:
            raise ExchangeEndedError(str(error)) from None

    def reset(self) -> None:
        """End both directions at once; harmless on an exchange that is over."""
        self._stream.discard()


def _head(stream: Http2Stream) -> IncomingHead:
    headers = stream.request_headers

    def text(name: bytes) -> str:
        return (header(headers, name) or b"").decode("latin-1")

    authority, method, path = text(b":authority"), text(b":method"), text(b":path")
    is_websocket = header(headers, UPGRADE) == WEBSOCKET
    if not is_websocket and header(headers, TCP_SOURCE):
        return IncomingHead("tcp", "CONNECT", authority, "", (), has_body=True)
    return IncomingHead(
        kind="websocket" if is_websocket else "http",
        method=method,
        authority=authority,
        path=path,
        headers=tuple(pair for pair in headers if not is_reserved(pair[0])),
        has_body=is_websocket or stream.may_receive_more,
    )
