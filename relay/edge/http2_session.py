"""The life of a connector's HTTP/2 connection: control stream, registration, service, leaving.

Edge tunnel specification 5.1, 5.4, 5.8. A connector notices a refusal, and that it may leave, only
when the edge closes the connection: no way out of here forgets that.
"""

from __future__ import annotations

import logging
import math
from typing import Final

import trio

from relay.edge.control import (
    REGISTRATION_SECONDS,
    ControlEnded,
    ControlServer,
    LocalConfigurationReported,
    RegistrationRequested,
    UnregisterRequested,
)
from relay.edge.http2 import Http2TunnelConnection, internal_request
from relay.edge.registration import Accepted, EdgeStage, Refused, Registrar
from traversal.io.http2 import ByteStream, Http2Connection, Http2Stream, header
from traversal.io.http2_engine import Http2Error, Http2Limits
from traversal.wire.tunnel.headers import CONTROL_STREAM, UPGRADE

logger = logging.getLogger("underpass.relay.edge.http2")

READ_BYTES: Final = 128 << 10
"""What a `HandshakeStream` for a connector should read at once. The memory is touched only when
there is so much to read."""
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
            await _Session(http2, registrar, source).run()
        finally:
            http2.close()


class _Session:
    def __init__(self, http2: Http2Connection, registrar: Registrar, source: str) -> None:
        self._http2 = http2
        self._registrar = registrar
        self._source = source
        self._server = ControlServer(trio.current_time())

    async def run(self) -> None:
        connection: Http2TunnelConnection | None = None
        problem = ""
        try:
            with trio.CancelScope(deadline=self._server.next_deadline() or math.inf) as waiting:
                control = await self._http2.open(
                    internal_request(b"GET", (UPGRADE, CONTROL_STREAM))
                )
                status = header(await control.response(), b":status")
                if status != b"200":
                    self._refuse(EdgeStage.PROTOCOL, f"the control stream's status is {status!r}")
                    return
                connection = await self._register(control)
            if waiting.cancelled_caught:
                problem = f"no registration within {REGISTRATION_SECONDS:.0f} s"
        except Http2Error as error:
            problem = str(error)
        if problem:
            self._refuse(EdgeStage.PROTOCOL, problem)
        if connection is not None:
            await self._serve(connection, control)

    def _refuse(self, stage: EdgeStage, reason: str) -> None:
        self._registrar.refuse(stage, self._source, reason)

    async def _register(self, control: Http2Stream) -> Http2TunnelConnection | None:
        """Wait for the registration and answer it. Raises Http2Error."""
        server = self._server
        while True:
            for event in server.receive(await control.receive()):
                match event:
                    case RegistrationRequested(request):
                        decision = self._registrar.decide(request)
                        if isinstance(decision, Accepted):
                            server.answer(decision.details)
                            connection = Http2TunnelConnection(
                                self._http2,
                                request,
                                decision.details,
                                source=self._source,
                                now=trio.current_time(),
                            )
                            await self._flush(control)
                            return connection
                        self._refuse(EdgeStage.REGISTRATION, decision.reason)
                        if isinstance(decision, Refused):
                            server.answer(decision.refusal)
                            await self._flush(control)
                        return None
                    case ControlEnded(failure):
                        self._refuse(EdgeStage.PROTOCOL, failure)
                        await self._flush(control)
                        return None
            await self._flush(control)

    async def _serve(self, connection: Http2TunnelConnection, control: Http2Stream) -> None:
        registrar = self._registrar
        registrar.registry.add(connection)
        logger.info("%r registered from %s", connection, self._source)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._follow_control, connection, control)
                nursery.start_soon(self._watch, connection)
                if connection.is_remotely_managed:
                    nursery.start_soon(registrar.keep_configured, connection)
                await connection.wait_over(registrar.drain_seconds)
                nursery.cancel_scope.cancel()
        finally:
            registrar.registry.remove(connection)
            logger.info("%r is gone", connection)

    async def _follow_control(
        self, connection: Http2TunnelConnection, control: Http2Stream
    ) -> None:
        try:
            while True:
                for event in self._server.receive(await control.receive()):
                    match event:
                        case UnregisterRequested():
                            connection.drain("the connector leaves")
                        case LocalConfigurationReported(document):
                            connection.local_configuration = document
                        case ControlEnded(failure):
                            if failure:
                                self._refuse(EdgeStage.PROTOCOL, f"{connection!r}: {failure}")
                            await self._flush(control)
                            connection.drain("the control stream ended")
                            return
                await self._flush(control)
        except Http2Error as error:
            # The stream alone may have been reset: the reference does so after unregistering.
            if self._http2.failure is None:
                connection.drain(str(error))
            else:
                connection.close(str(error))

    async def _watch(self, connection: Http2TunnelConnection) -> None:
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

    async def _flush(self, control: Http2Stream) -> None:
        if data := self._server.data_to_send():
            await control.send(data)
