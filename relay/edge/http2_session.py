"""Connectors that come over HTTP/2 (edge tunnel specification 5.1): the edge opens the control
stream, and pings."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Final

import trio

from relay.edge.connection import TunnelConnection
from relay.edge.http2 import Http2TunnelConnection, internal_request
from relay.edge.registration import Registrar
from relay.edge.session import ControlStream, Service, Transport, run_session
from traversal.io.http2 import ByteStream, Http2Connection
from traversal.io.http2_engine import Http2Error, Http2Limits
from traversal.io.http2_stream import Http2Stream, header
from traversal.wire.tunnel.headers import CONTROL_STREAM, UPGRADE
from traversal.wire.tunnel.peers import PEERS
from traversal.wire.tunnel.registration import (
    FEATURE_DRAIN,
    ConnectionDetails,
    RegisterConnection,
)

READ_BYTES: Final = 128 << 10
"""What a `HandshakeStream` for a connector should read at once, at most."""
PING_SECONDS: Final = 10.0
PING_TIMEOUT_SECONDS: Final = 15.0
"""The reference sends no pings of its own, and TCP alone may take minutes to notice a dead peer."""

_LIMITS: Final = Http2Limits(
    streams=0,  # connectors open none
    header_bytes=256 << 10,  # all of the origin's headers, in base64, are one of ours
)


async def serve_http2(stream: ByteStream, registrar: Registrar, *, source: str) -> None:
    """Serve a connector that has finished its TLS handshake, until the connection is over.

    Raises nothing but Cancelled. The stream is closed then.
    """
    http2 = Http2Connection(stream, client_side=True, limits=_LIMITS)
    async with trio.open_nursery() as nursery:
        await nursery.start(http2.run)
        try:
            await run_session(_Http2Transport(http2, registrar, source), registrar, source=source)
        finally:
            http2.close()


class _Http2Transport(Transport):
    def __init__(self, http2: Http2Connection, registrar: Registrar, source: str) -> None:
        self._http2 = http2
        self._registrar = registrar
        self._source = source
        self._control: Http2Stream | None = None

    async def open_control(self) -> ControlStream | None:
        """See Transport."""
        began = self._http2.received_at
        try:
            control = await self._http2.open(internal_request(b"GET", (UPGRADE, CONTROL_STREAM)))
            status = header(await control.response(), b":status")
        except Http2Error:
            # A connector that looks whether it can reach us (specification 4) says nothing.
            if self._http2.received_at == began:
                return None
            raise
        if status != b"200":
            raise Http2Error(f"the control stream's status is {status!r}")
        self._control = control
        return control

    def make_connection(
        self, request: RegisterConnection, details: ConnectionDetails
    ) -> Http2TunnelConnection:
        """See Transport."""
        now = trio.current_time()
        return Http2TunnelConnection(self._http2, request, details, source=self._source, now=now)

    def services(self, connection: TunnelConnection) -> Sequence[Service]:
        """See Transport."""
        watch = partial(self._watch, connection)
        if connection.serves_requests:
            return [watch]
        return [watch, partial(self._serve_peers, connection)]

    async def hand_over(self, connection: TunnelConnection) -> None:
        """Tell a connector of ours, so that it replaces the connection before it ends."""
        # The reference might take it for a failure.
        if FEATURE_DRAIN in connection.options.features and self._control is not None:
            try:
                await self._control.send_end()
            except Http2Error:
                pass

    async def _serve_peers(self, connection: TunnelConnection) -> None:
        problem = "the channel for peers ended"
        try:
            async with await self._http2.open(internal_request(b"GET", (UPGRADE, PEERS))) as stream:
                status = header(await stream.response(), b":status")
                if status != b"200":
                    raise Http2Error(f"the status of the channel for peers is {status!r}")
                await self._registrar.peers.serve(stream, None, repr(connection))
        except Http2Error as error:
            problem = str(error)
        connection.close(problem)

    async def _watch(self, connection: TunnelConnection) -> None:
        """Close the connection when its other end is gone without a word."""
        try:
            while True:
                await trio.sleep(PING_SECONDS)
                with trio.move_on_after(PING_TIMEOUT_SECONDS) as waiting:
                    await self._http2.ping()
                silence = trio.current_time() - self._http2.received_at
                # An answer may wait for long behind a body on a slow line.
                if waiting.cancelled_caught and silence >= PING_TIMEOUT_SECONDS:
                    connection.close("no answer to a ping")
                    return
        except Http2Error:
            return
