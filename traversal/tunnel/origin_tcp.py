"""TCP towards origins: raw, behind a websocket that is terminated here, or wherever a SOCKS client
wants."""

from __future__ import annotations

import ipaddress
from collections import deque
from collections.abc import Callable
from typing import Final

import trio
from wsproto.connection import Connection, ConnectionType
from wsproto.events import BytesMessage, CloseConnection, Event, Ping, TextMessage
from wsproto.utilities import LocalProtocolError, RemoteProtocolError, generate_accept_token

from traversal.io.stream import HandshakeStream, StreamEndedError
from traversal.tunnel.exchange import ExchangeEndedError, Incoming
from traversal.tunnel.origin_http import OriginAddress, OriginError, OriginLimits, connect_origin
from traversal.tunnel.relaying import ByteExchange, relay_bytes
from traversal.wire.socks import (
    SocksError,
    SocksRequest,
    SocksStatus,
    encode_choice,
    encode_reply,
    parse_greeting,
    parse_request,
)

PING_SECONDS: Final = 54.0
"""As the reference connector (edge tunnel specification 16)."""
MAX_SOCKS_BYTES: Final = 1024
SOCKS_SECONDS: Final = 10.0


Allows = Callable[[ipaddress.IPv4Address | ipaddress.IPv6Address, int], bool]
"""Whether a visitor may connect to an address and port."""


async def serve_tcp(incoming: Incoming, address: OriginAddress, limits: OriginLimits) -> None:
    """A private-network connection, or a visitor's websocket whose messages are the bytes.

    Raises OriginError while nothing was answered yet, ExchangeEndedError when the edge gave up.
    """
    stream = await connect_origin(address, limits)
    try:
        await relay_bytes(await _accept(incoming), stream)
    finally:
        stream.close()


async def serve_socks(incoming: Incoming, allows: Allows, limits: OriginLimits) -> None:
    """A visitor's websocket in which SOCKS 5 is spoken. Raises ExchangeEndedError."""
    exchange = await _accept(incoming)
    reader = _Reader(exchange)
    try:
        with trio.fail_after(SOCKS_SECONDS):
            await reader.take_greeting()
            await exchange.send(encode_choice(is_acceptable=True))
            request = await reader.take_request()
    except trio.TooSlowError:
        await exchange.send_end()
        return
    except SocksError as error:
        await exchange.send(encode_reply(error.status))
        await exchange.send_end()
        return
    stream, status = await _dial(request, allows, limits)
    await exchange.send(encode_reply(status))
    if stream is None:
        await exchange.send_end()
        return
    try:
        if reader.ahead:
            await stream.send_all(reader.ahead)
        await relay_bytes(exchange, stream)
    except StreamEndedError:
        pass
    finally:
        stream.close()


async def serve_bastion(
    incoming: Incoming, host: str, port: int, allows: Allows, limits: OriginLimits
) -> None:
    """A visitor's websocket whose messages are the bytes of a TCP connection to where it says.

    Raises OriginError while nothing was answered yet, ExchangeEndedError when the edge gave up.
    """
    stream, status = await _dial(SocksRequest(host, port), allows, limits)
    if stream is None:
        if status is SocksStatus.NOT_ALLOWED:
            raise OriginError(f"{host}:{port}: the rule's ipRules do not allow it")
        raise OriginError(f"{host}:{port}: unreachable")
    try:
        await relay_bytes(await _accept(incoming), stream)
    finally:
        stream.close()


async def _dial(
    request: SocksRequest, allows: Allows, limits: OriginLimits
) -> tuple[HandshakeStream | None, SocksStatus]:
    try:
        found = await trio.socket.getaddrinfo(
            request.host, request.port, type=trio.socket.SOCK_STREAM
        )
    except OSError:
        return None, SocksStatus.HOST_UNREACHABLE
    # Names are resolved before they are judged, and what was judged is what is dialed.
    hosts = dict.fromkeys(str(entry[4][0]) for entry in found)
    allowed = [
        host for host in hosts if allows(ipaddress.ip_address(host.partition("%")[0]), request.port)
    ]
    if not allowed:
        return None, SocksStatus.NOT_ALLOWED
    for host in allowed:
        try:
            stream = await connect_origin(OriginAddress(host, request.port), limits)
        except OriginError:
            continue
        return stream, SocksStatus.SUCCEEDED
    return None, SocksStatus.HOST_UNREACHABLE


class _Reader:
    """Messages of SOCKS from a byte exchange."""

    def __init__(self, exchange: ByteExchange) -> None:
        self.ahead = b""
        self._exchange = exchange

    async def take_greeting(self) -> None:
        """Until the greeting is complete. Raises SocksError."""
        while (length := parse_greeting(self.ahead)) is None:
            await self._more()
        self.ahead = self.ahead[length:]

    async def take_request(self) -> SocksRequest:
        """The request. Raises SocksError."""
        while (found := parse_request(self.ahead)) is None:
            await self._more()
        request, length = found
        self.ahead = self.ahead[length:]
        return request

    async def _more(self) -> None:
        data = await self._exchange.receive()
        if not data or len(self.ahead) + len(data) > MAX_SOCKS_BYTES:
            raise SocksError("no complete SOCKS message", SocksStatus.FAILED)
        self.ahead += data


async def _accept(incoming: Incoming) -> ByteExchange:
    """Answer an exchange, and give its bytes: raw, or those in a websocket's messages.

    Raises OriginError for a visitor that speaks no websocket.
    """
    if incoming.head.kind == "tcp":
        await incoming.respond(200)
        return incoming
    key = next((v for n, v in incoming.head.headers if n == b"sec-websocket-key"), None)
    if incoming.head.kind != "websocket" or key is None:
        raise OriginError("this service is TCP: reach it by a websocket client")
    accept = generate_accept_token(key)
    headers = [(b"upgrade", b"websocket"), (b"connection", b"Upgrade")]
    await incoming.respond(101, [*headers, (b"sec-websocket-accept", accept)])
    return _WebsocketBytes(incoming)


class _WebsocketBytes:
    """The bytes in a websocket's messages, and its keep-alive."""

    def __init__(self, incoming: Incoming) -> None:
        self._incoming = incoming
        self._websocket = Connection(ConnectionType.SERVER)
        self._received: deque[bytes] = deque()
        self._is_ended = False

    async def receive(self) -> bytes:
        while not self._received:
            if self._is_ended:
                return b""
            data = None
            with trio.move_on_after(PING_SECONDS):
                data = await self._incoming.receive()
            if data is None:
                await self._incoming.send(self._websocket.send(Ping()))
                continue
            if not data:
                return b""
            try:
                self._websocket.receive_data(data)
                for event in self._websocket.events():
                    await self._handle(event)
            except (RemoteProtocolError, LocalProtocolError) as error:
                raise ExchangeEndedError(f"the visitor's websocket: {error}") from None
        return self._received.popleft()

    async def send(self, data: bytes) -> None:
        if not self._is_ended:
            await self._incoming.send(self._websocket.send(BytesMessage(data=data)))

    async def send_end(self) -> None:
        if not self._is_ended:
            self._is_ended = True
            await self._incoming.send(self._websocket.send(CloseConnection(code=1000)))
        await self._incoming.send_end()

    async def _handle(self, event: Event) -> None:
        if isinstance(event, BytesMessage) and event.data:
            self._received.append(bytes(event.data))
        elif isinstance(event, TextMessage) and event.data:
            self._received.append(event.data.encode())
        elif isinstance(event, Ping):
            await self._incoming.send(self._websocket.send(event.response()))
        elif isinstance(event, CloseConnection) and not self._is_ended:
            self._is_ended = True
            await self._incoming.send(self._websocket.send(event.response()))
