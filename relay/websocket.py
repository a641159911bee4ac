"""DERP over WebSocket, for browsers (DERP specification 3.6).

The pump knows plain connections and TLS connections. A WebSocket client becomes a plain one: the
pump gets one end of a socket pair, and here bytes move between the other end and the WebSocket.
Message boundaries mean nothing, so nothing is ever put together: what a read brought is passed on
at once, and the only buffers are those of the sockets.
"""

from __future__ import annotations

import http
import socket
from collections.abc import Awaitable, Callable
from typing import Final

import trio
from wsproto import ConnectionType, WSConnection, events
from wsproto.frame_protocol import CloseReason
from wsproto.utilities import RemoteProtocolError

from relay.http import Request
from relay.upgrade import RefusedError
from traversal.io.stream import HandshakeStream, StreamEndedError
from traversal.wire.derp import DerpError

SUBPROTOCOL: Final = "derp"
MAX_MESSAGE_BYTES: Final = 32768
"""Of what we send: derper and the browser client take no more. What we receive has no limit."""
PAIR_BUFFER_BYTES: Final = 65536
"""In the socket between the pump and here. Small, so that packets for a slow client wait in its
backlog, where old ones are dropped, and not here, where they would all arrive late."""
SEND_TIMEOUT_SECONDS: Final = 10.0
"""For one message. The pump's own limit (2 s without progress) ends at the socket pair."""
CLOSE_TIMEOUT_SECONDS: Final = 1.0
"""For the closing handshake, so that the client can read why before the connection is reset."""

# What a client may send after our closing frame before we stop listening for its own.
_MAX_IGNORED_BYTES: Final = 1 << 20
_HANDSHAKE_HEADERS: Final = ("connection", "upgrade", "sec-websocket-")

Upgrade = Callable[[HandshakeStream], Awaitable[object]]
"""Does the DERP handshake on a plain stream and hands it to the pump: `Upgrader.upgrade` with
`with_response=False`."""


async def serve_websocket(
    stream: HandshakeStream,
    request: Request,
    upgrade: Upgrade,
    *,
    on_accept: Callable[[], None] = lambda: None,
) -> None:
    """Serve one WebSocket client to its end; the caller closes `stream`.

    `on_accept` is called once the opening handshake is answered. Raises RefusedError where that
    handshake is wrong, and what `upgrade` raises: StreamEndedError, DerpError, RefusedError.
    """
    websocket, speaks_derp = await _open(stream, request)
    bridge = _Bridge(stream, websocket)
    failure: Exception | None = None
    if speaks_derp:
        on_accept()
        failure = await bridge.run(upgrade)
    else:
        reason = "client must speak the derp subprotocol"
        bridge.farewell = events.CloseConnection(CloseReason.POLICY_VIOLATION, reason)
        failure = RefusedError("its WebSocket does not offer the subprotocol derp")
    await bridge.say_farewell()
    if failure is not None:
        raise failure


async def _open(stream: HandshakeStream, request: Request) -> tuple[WSConnection, bool]:
    """Answer the opening handshake (RFC 6455 section 4.2.2); whether `derp` was chosen.

    Extensions are not accepted. Raises StreamEndedError, RefusedError.
    """
    websocket = WSConnection(ConnectionType.SERVER)
    if request.method != "GET":
        await _refuse(stream, 405, "a WebSocket is opened by GET")
    # Only what concerns the handshake: nothing else of the client's may fail it.
    headers = [
        (name.encode("latin-1"), value.encode("latin-1"))
        for name, value in request.headers
        if name.startswith(_HANDSHAKE_HEADERS)
    ]
    try:
        websocket.initiate_upgrade_connection([(b"host", b"relay"), *headers], "/derp")
    except UnicodeError:
        # wsproto decodes some of these headers as ASCII without asking whether they are.
        await _refuse(stream, 400, "a header of its WebSocket handshake is not ASCII")
    except RemoteProtocolError as error:
        hint = error.event_hint
        status = hint.status_code if isinstance(hint, events.RejectConnection) else 400
        await _refuse(stream, status, f"its WebSocket handshake is wrong: {error}")
    opening = next(iter(websocket.events()))
    assert isinstance(opening, events.Request)
    speaks_derp = SUBPROTOCOL in opening.subprotocols
    subprotocol = SUBPROTOCOL if speaks_derp else None
    await stream.send_all(websocket.send(events.AcceptConnection(subprotocol=subprotocol)))
    return websocket, speaks_derp


async def _refuse(stream: HandshakeStream, status: int, reason: str) -> None:
    version = "Sec-WebSocket-Version: 13\r\n" if status == 426 else ""
    head = f"HTTP/1.1 {status} {http.HTTPStatus(status).phrase}\r\n{version}"
    await stream.send_all(f"{head}Connection: close\r\nContent-Length: 0\r\n\r\n".encode())
    raise RefusedError(reason)


class _Bridge:
    """Moves bytes between a WebSocket and the pump; `farewell` says how the WebSocket closes."""

    def __init__(self, stream: HandshakeStream, websocket: WSConnection) -> None:
        self.farewell = events.CloseConnection(CloseReason.GOING_AWAY)
        self._stream = stream
        self._websocket = websocket
        self._sending = trio.Lock()
        # False while a message is on its way: after a cancelled send nothing may follow.
        self._intact = True

    async def run(self, upgrade: Upgrade) -> Exception | None:
        """Until either side ends; returns why the DERP handshake failed, if it did."""
        ours, theirs = trio.socket.socketpair()
        for sock in (ours, theirs):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, PAIR_BUFFER_BYTES)
        plain = HandshakeStream(theirs)
        failure: Exception | None = None

        async def end() -> None:
            async with self._sending:  # a message on its way is finished, or nothing may follow
                nursery.cancel_scope.cancel()

        async def shake_hands() -> None:
            nonlocal failure
            try:
                await upgrade(plain)
            except (StreamEndedError, DerpError, RefusedError) as error:
                failure = error
                self.farewell = events.CloseConnection(
                    CloseReason.POLICY_VIOLATION, "the DERP handshake failed"
                )
                await end()

        async def until_ended(move: Callable[[trio.socket.SocketType], Awaitable[None]]) -> None:
            try:
                await move(ours)
            except (StreamEndedError, OSError):
                pass  # an ending like any other
            await end()

        try:
            with ours:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(shake_hands)
                    nursery.start_soon(until_ended, self._move_in)
                    nursery.start_soon(until_ended, self._move_out)
        finally:
            plain.close()  # harmless where the pump has it
        return failure

    async def say_farewell(self) -> None:
        """The closing handshake (RFC 6455 section 7.1), as far as the client plays along."""
        if not self._intact:
            return
        with trio.move_on_after(CLOSE_TIMEOUT_SECONDS):
            try:
                await self._send(self.farewell)
                ignored = 0
                while ignored < _MAX_IGNORED_BYTES and (data := await self._stream.receive()):
                    ignored += len(data)
            except StreamEndedError:
                pass

    async def _move_in(self, pump: trio.socket.SocketType) -> None:
        """From the WebSocket to the pump, until the client closes or does something wrong."""
        while data := await self._stream.receive():
            self._websocket.receive_data(data)
            for event in self._websocket.events():
                if isinstance(event, events.BytesMessage):
                    await _send_all(pump, event.data)
                elif isinstance(event, events.Ping):
                    await self._send(event.response())
                elif isinstance(event, events.TextMessage):
                    self.farewell = events.CloseConnection(
                        CloseReason.UNSUPPORTED_DATA, "DERP needs binary messages"
                    )
                    return
                elif isinstance(event, events.CloseConnection):
                    # Either the client's, which is answered with its own code, or the code for
                    # bytes that are no WebSocket frames.
                    self.farewell = event.response()
                    return

    async def _move_out(self, pump: trio.socket.SocketType) -> None:
        """From the pump to the WebSocket, until the pump closes."""
        while data := await pump.recv(MAX_MESSAGE_BYTES):
            await self._send(events.BytesMessage(data))

    async def _send(self, event: events.Event) -> None:
        async with self._sending:
            self._intact = False
            with trio.move_on_after(SEND_TIMEOUT_SECONDS) as timeout:
                await self._stream.send_all(self._websocket.send(event))
            if timeout.cancelled_caught:
                raise StreamEndedError("it took no bytes in time")
            self._intact = True


async def _send_all(sock: trio.socket.SocketType, data: bytes | bytearray) -> None:
    view = memoryview(data)
    while view:
        view = view[await sock.send(view) :]
