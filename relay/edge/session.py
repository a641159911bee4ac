"""The life of a connector's connection: control stream, registration, service, leaving. The same
over both transports (edge tunnel specification 5.4, 5.8, 6.2, 7.4).

A connector notices a refusal, and that it may leave, only when the edge closes the connection: who
calls `run_session` closes it afterwards, whatever happened.
"""

from __future__ import annotations

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, Protocol

import trio

from relay.edge.connection import TunnelConnection
from relay.edge.control import (
    REGISTRATION_SECONDS,
    ControlEnded,
    ControlServer,
    LocalConfigurationReported,
    RegistrationRequested,
    UnregisterRequested,
)
from relay.edge.registration import Accepted, EdgeStage, Registrar
from traversal.io.http2_engine import Http2Error
from traversal.io.quic_stream import QuicError
from traversal.wire.tunnel.registration import ConnectionDetails, RegisterConnection

logger = logging.getLogger("underpass.relay.edge.session")

TRANSPORT_ERRORS: Final = (Http2Error, QuicError)
NOTICE_SECONDS: Final = 2.0
Service = Callable[[], Awaitable[None]]


class ControlStream(Protocol):
    """What both transports' streams can do. Its methods raise one of TRANSPORT_ERRORS."""

    async def receive(self) -> bytes:
        """Some bytes, empty at the end."""
        ...

    async def send(self, data: bytes) -> None:
        """Send bytes."""
        ...


class Transport(ABC):
    """A connector's connection before it is registered. Its methods raise TRANSPORT_ERRORS."""

    @abstractmethod
    async def open_control(self) -> ControlStream | None:
        """The control stream; None where there will be none, and nothing is wrong with that."""

    @abstractmethod
    def make_connection(
        self, request: RegisterConnection, details: ConnectionDetails
    ) -> TunnelConnection:
        """The connection, now that it is registered."""

    @abstractmethod
    async def hand_over(self, connection: TunnelConnection) -> None:
        """The connection leaves: let others have what they can."""

    @abstractmethod
    def services(self, connection: TunnelConnection) -> Sequence[Service]:
        """What must run while it is registered."""


async def run_session(transport: Transport, registrar: Registrar, *, source: str) -> None:
    """Serve a connector until its connection is over or should be closed."""
    await _Session(transport, registrar, source).run()


class _Session:
    def __init__(self, transport: Transport, registrar: Registrar, source: str) -> None:
        self._transport = transport
        self._registrar = registrar
        self._source = source
        self._server = ControlServer(trio.current_time())

    async def run(self) -> None:
        connection: TunnelConnection | None = None
        problem = ""
        unregistered = self._registrar.unregistered
        if unregistered.refusal(self._source) is not None:
            self._refuse(EdgeStage.LIMITS, "too many connections have not registered yet")
            return
        try:
            with trio.CancelScope(deadline=self._server.next_deadline() or math.inf) as waiting:
                control = await self._transport.open_control()
                if control is None:
                    return
                connection = await self._register(control)
            if waiting.cancelled_caught:
                problem = f"no registration within {REGISTRATION_SECONDS:.0f} s"
        except TRANSPORT_ERRORS as error:
            problem = str(error)
        finally:
            unregistered.remove(self._source)
        if problem:
            self._refuse(EdgeStage.PROTOCOL, problem)
        if connection is not None:
            assert control is not None
            await self._serve(connection, control)

    def _refuse(self, stage: EdgeStage, reason: str) -> None:
        self._registrar.refuse(stage, self._source, reason)

    async def _register(self, control: ControlStream) -> TunnelConnection | None:
        """Wait for the registration and answer it."""
        server = self._server
        while True:
            for event in server.receive(await control.receive()):
                match event:
                    case RegistrationRequested(request):
                        decision = self._registrar.decide(request)
                        if isinstance(decision, Accepted):
                            server.answer(decision.details)
                            connection = self._transport.make_connection(request, decision.details)
                            await self._flush(control)
                            return connection
                        self._refuse(EdgeStage.REGISTRATION, decision.reason)
                        server.answer(decision.refusal)
                        await self._flush(control)
                        await self._wait_noticed(control)
                        return None
                    case ControlEnded(failure):
                        self._refuse(EdgeStage.PROTOCOL, failure)
                        await self._flush(control)
                        return None
            await self._flush(control)

    async def _serve(self, connection: TunnelConnection, control: ControlStream) -> None:
        registrar = self._registrar
        registrar.registry.add(connection)
        logger.info("%r registered from %s", connection, self._source)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._follow_control, connection, control)
                for service in self._transport.services(connection):
                    nursery.start_soon(service)
                if connection.is_remotely_managed:
                    nursery.start_soon(registrar.keep_configured, connection)
                await connection.wait_leaving()
                await self._transport.hand_over(connection)
                await connection.wait_over(registrar.drain_seconds)
                nursery.cancel_scope.cancel()
        finally:
            registrar.registry.remove(connection)
            logger.info("%r is gone", connection)

    async def _follow_control(self, connection: TunnelConnection, control: ControlStream) -> None:
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
        except TRANSPORT_ERRORS as error:
            # The stream alone may have been reset: the reference does so after unregistering.
            if connection.is_connected:
                connection.drain(str(error))
            else:
                connection.close(str(error))

    async def _wait_noticed(self, control: ControlStream) -> None:
        """Until the connector has ended the control stream.

        One whose connection is closed before it has looked at its refusal takes it for a loss of
        the connection, and does something else about it: the reference may then exit.
        """
        with trio.move_on_after(NOTICE_SECONDS):
            try:
                while await control.receive():
                    pass
            except TRANSPORT_ERRORS:
                pass

    async def _flush(self, control: ControlStream) -> None:
        if data := self._server.data_to_send():
            await control.send(data)
