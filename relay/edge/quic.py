"""A connector's connection over QUIC (edge tunnel specification 6): each request, websocket and TCP
connection is a stream that the edge opens, as is each call of a method of the connector's.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Final
from uuid import UUID

import trio

from relay.edge.connection import (
    ConnectionFailedError,
    Exchange,
    Headers,
    RequestHead,
    ResponseHead,
    TunnelConnection,
)
from relay.edge.flows import Flow, Flows
from traversal.io.quic import QuicConnection
from traversal.io.quic_stream import NO_ERROR, QuicError, QuicStream
from traversal.wire.tunnel import rpc
from traversal.wire.tunnel.capnp import Struct
from traversal.wire.tunnel.connect import (
    FLOW_ID_KEY,
    HOST_KEY,
    METHOD_KEY,
    RATE_LIMITED_KEY,
    RPC_SIGNATURE,
    STATUS_KEY,
    ConnectRequest,
    ConnectResponse,
    ConnectType,
    Metadata,
    data_head_length,
    header_metadata,
    metadata_headers,
    parse_data_head,
)
from traversal.wire.tunnel.errors import TunnelError
from traversal.wire.tunnel.headers import is_reserved
from traversal.wire.tunnel.registration import (
    FEATURE_DATAGRAM_V3,
    ConnectionDetails,
    RegisterConnection,
)
from traversal.wire.tunnel.rpc_client import RpcClient
from traversal.wire.tunnel.sessions import (
    UPDATE_CONFIGURATION,
    UpdateConfiguration,
    UpdateConfigurationResponse,
)

logger = logging.getLogger("underpass.relay.edge.quic")

CALL_SECONDS: Final = 5.0
"""The connector gives up an RPC stream then."""


class QuicTunnelConnection(TunnelConnection):
    """A registered connection. `relay.edge.quic_session` brings it about and ends it."""

    transport = "quic"

    def __init__(
        self,
        quic: QuicConnection,
        request: RegisterConnection,
        details: ConnectionDetails,
        *,
        source: str,
        now: float,
        new_id: Callable[[], UUID],
    ) -> None:
        super().__init__(request, details, source=source, now=now)
        version = 3 if FEATURE_DATAGRAM_V3 in request.options.features else 2
        self.flows = Flows(quic, version, self.call, new_id)
        self.supports_udp = True
        self._quic = quic

    @property
    def is_usable(self) -> bool:
        """Whether new requests may be given to it."""
        return not self.is_leaving and self._quic.failure is None

    @property
    def is_connected(self) -> bool:
        """Whether what it runs over still works."""
        return self._quic.failure is None

    async def request(self, head: RequestHead) -> Exchange:
        """Send a request's head; doesn't wait for the response. Raises ConnectionFailedError."""
        is_websocket = head.kind == "websocket"
        try:
            request = _connect_request(head)
        except TunnelError as error:
            raise ConnectionFailedError(str(error), is_unprocessed=True) from None
        exchange = await self._exchange(request)
        if not is_websocket and not head.has_body:
            await exchange.send_end()
        return exchange

    async def connect_tcp(self, destination: str, source: str) -> Exchange:
        """Have the connector dial `IP:port`. Raises ConnectionFailedError."""
        metadata = ((FLOW_ID_KEY, source),)
        return await self._exchange(ConnectRequest(destination, ConnectType.TCP, metadata))

    async def open_udp(self, destination: str, idle_seconds: float) -> Flow:
        """Have the connector open a flow. Raises ConnectionFailedError."""
        return await self.flows.open(destination, idle_seconds)

    async def push_configuration(self, version: int, document: bytes) -> int:
        """Have the connector use a configuration. Raises ConnectionFailedError."""
        params = UpdateConfiguration(version, document).to_struct()
        results = await self.call(rpc.CONFIGURATION_MANAGER, UPDATE_CONFIGURATION, params)
        try:
            response = UpdateConfigurationResponse.from_struct(results)
        except TunnelError as error:
            raise ConnectionFailedError(str(error)) from None
        if response.error:
            logger.warning("%r did not like its configuration: %s", self, response.error)
        return response.latest_applied_version

    async def call(self, interface_id: int, method_id: int, params: Struct) -> Struct:
        """Call a method of the connector's. Raises ConnectionFailedError."""
        client = RpcClient()
        question = client.call(interface_id, method_id, params)
        try:
            with trio.fail_after(CALL_SECONDS):
                async with await self._quic.open_stream() as stream:
                    await stream.send(RPC_SIGNATURE + client.data_to_send())
                    while True:
                        data = await stream.receive()
                        if not data:
                            raise ConnectionFailedError("the connector ended a call")
                        for answer in client.receive(data):
                            if answer.question_id != question:
                                continue
                            await stream.send(client.data_to_send())
                            await stream.send_end()
                            if isinstance(answer.result, rpc.RpcException):
                                raise ConnectionFailedError(answer.result.reason)
                            return answer.result
                        await stream.send(client.data_to_send())
        except trio.TooSlowError:
            raise ConnectionFailedError("the connector does not answer a call") from None
        except (QuicError, TunnelError) as error:
            raise ConnectionFailedError(str(error)) from None

    def _close_transport(self, reason: str) -> None:
        self._quic.close(NO_ERROR, reason)

    async def _exchange(self, request: ConnectRequest) -> _QuicExchange:
        self._begin_exchange()
        stream: QuicStream | None = None
        try:
            stream = await self._quic.open_stream()
            await stream.send(request.encode())
        except QuicError as error:
            self._end_exchange()
            # Without its head the connector can't have done anything with it.
            raise ConnectionFailedError(str(error), is_unprocessed=True) from None
        except BaseException:
            if stream is not None:
                stream.abort()
            self._end_exchange()
            raise
        self.requests += 1
        return _QuicExchange(self, stream)


class _QuicExchange(Exchange):
    """A stream as the side that faces visitors wants it."""

    def __init__(self, connection: QuicTunnelConnection, stream: QuicStream) -> None:
        self._connection = connection
        self._stream = stream
        self._ahead = b""
        self._response: ResponseHead | None = None
        self._is_body_unwanted = False
        self._is_over = False

    async def response(self) -> ResponseHead:
        """The response's head. Raises ConnectionFailedError."""
        if self._response is None:
            self._response = await self._receive_head()
        return self._response

    async def receive(self) -> bytes:
        """Some of the response's body, empty at its end. Raises ConnectionFailedError."""
        await self.response()
        if self._ahead:
            data, self._ahead = self._ahead, b""
            return data
        try:
            return await self._stream.receive()
        except QuicError as error:
            raise ConnectionFailedError(str(error)) from None

    async def send(self, data: bytes) -> None:
        """Send some of the request's body. Raises ConnectionFailedError."""
        if not self._is_body_unwanted:
            try:
                await self._stream.send(data)
            except QuicError as error:
                self._note_send_failure(error)

    async def send_end(self, trailers: Headers = ()) -> None:
        """No more body; trailers have no place on this transport. Raises ConnectionFailedError."""
        if not self._is_body_unwanted:
            try:
                await self._stream.send_end()
            except QuicError as error:
                self._note_send_failure(error)

    def reset(self) -> None:
        """End both directions at once; harmless on an exchange that is over."""
        if not self._is_over:
            self._is_over = True
            self._stream.abort()
            self._connection._end_exchange()

    def _note_send_failure(self, error: QuicError) -> None:
        # A connector that is done with a request says STOP_SENDING with code 0 (specification 6.3):
        # the response is complete, or will be without the rest of the body.
        if error.code or self._connection._quic.failure is not None or self._is_over:
            raise ConnectionFailedError(str(error)) from None
        self._is_body_unwanted = True

    async def _receive_head(self) -> ResponseHead:
        received = b""
        try:
            while (length := data_head_length(received)) is None:
                data = await self._stream.receive()
                if not data:
                    raise ConnectionFailedError("the connector ended the stream without a response")
                received += data
            response = ConnectResponse.from_struct(parse_data_head(received[:length]))
            self._ahead = received[length:]
            return _response_head(response)
        except (QuicError, TunnelError) as error:
            raise ConnectionFailedError(str(error)) from None


def _connect_request(head: RequestHead) -> ConnectRequest:
    headers = head.headers
    if head.has_body and not any(name == b"content-length" for name, _ in headers):
        # Without either the connector takes the request for one without a body.
        headers = (*headers, (b"transfer-encoding", b"chunked"))
    metadata: Metadata = (
        (METHOD_KEY, head.method),
        (HOST_KEY, head.authority),
        *header_metadata(headers),
    )
    kind = ConnectType.WEBSOCKET if head.kind == "websocket" else ConnectType.HTTP
    path = "" if head.path == "*" else head.path
    return ConnectRequest(f"{head.scheme}://{head.authority}{path}", kind, metadata)


def _response_head(response: ConnectResponse) -> ResponseHead:
    metadata = dict(response.metadata)
    is_limited = metadata.get(RATE_LIMITED_KEY) == "true"
    if response.error:
        logger.debug("a connector could not reach its origin: %s", response.error)
        return ResponseHead(502, (), is_from_connector=True, is_flow_limited=is_limited)
    status = metadata.get(STATUS_KEY, "200")  # TCP has none
    if len(status) != 3 or not (status.isascii() and status.isdigit()):
        raise TunnelError(f"the connector answered with status {status!r}")
    headers = metadata_headers(response.metadata)
    return ResponseHead(
        int(status), tuple(header for header in headers if not is_reserved(header[0]))
    )
