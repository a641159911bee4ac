"""A connector's connection over QUIC (edge tunnel specification 6)."""

from __future__ import annotations

import logging
from typing import Final

import trio

from traversal.io.quic import QuicConnection
from traversal.io.quic_endpoints import dial_quic
from traversal.io.quic_settings import (
    CONNECTOR_STREAMS,
    KEEP_ALIVE_SECONDS,
    connector_configuration,
)
from traversal.io.quic_stream import QuicError, QuicStream
from traversal.tunnel.edge_connection import (
    DialFailedError,
    DialOptions,
    EdgeConnection,
    Service,
)
from traversal.tunnel.quic_incoming import read_incoming, read_signature
from traversal.tunnel.transport_choice import Transport
from traversal.tunnel.udp_flows import UdpFlows
from traversal.wire.address import Address
from traversal.wire.tunnel import rpc
from traversal.wire.tunnel.capnp import Struct
from traversal.wire.tunnel.errors import TunnelError
from traversal.wire.tunnel.registration import RegisterConnection
from traversal.wire.tunnel.rpc_server import RpcServer
from traversal.wire.tunnel.sessions import (
    UPDATE_CONFIGURATION,
    UpdateConfiguration,
    UpdateConfigurationResponse,
)

logger = logging.getLogger("underpass.tunnel.quic")

HANDSHAKE_SECONDS: Final = 5.0
HEAD_SECONDS: Final = 10.0
"""From a stream's beginning to the end of what says what it is for."""
CALL_SECONDS: Final = 5.0


async def serve_quic(
    address: Address,
    options: DialOptions,
    request: RegisterConnection,
    service: Service,
    *,
    task_status: trio.TaskStatus[EdgeConnection] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Connect, register, and serve what the edge sends until the connection is over.

    Starts with the connection when it is registered. Raises DialFailedError before that.
    """
    failure: DialFailedError | None = None
    async with trio.open_nursery() as nursery:
        try:
            connection, quic = await _dial(nursery, address, options, request)
        except DialFailedError as error:
            failure = error
        else:
            task_status.started(connection)
            nursery.start_soon(connection.follow_control)
            nursery.start_soon(_serve_streams, connection, quic, service)
            if service.udp is not None:
                nursery.start_soon(_serve_datagrams, quic, service.udp)
            try:
                await quic.wait_over()
            finally:
                connection.end(str(quic.failure or "we closed it"))
        nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure


async def _dial(
    nursery: trio.Nursery, address: Address, options: DialOptions, request: RegisterConnection
) -> tuple[EdgeConnection, QuicConnection]:
    """Raises DialFailedError."""
    try:
        quic = await dial_quic(
            nursery,
            address,
            connector_configuration(options.ca_file),
            timeout_seconds=HANDSHAKE_SECONDS,
            keep_alive_seconds=KEEP_ALIVE_SECONDS,
            max_streams=CONNECTOR_STREAMS,
        )
        control = await quic.open_stream()
    except QuicError as error:
        raise DialFailedError(f"{address}: {error}") from None
    connection = EdgeConnection(Transport.QUIC, address, request, quic.close)
    await connection.register(control)
    return connection, quic


async def _serve_streams(
    connection: EdgeConnection, quic: QuicConnection, service: Service
) -> None:
    async with trio.open_nursery() as nursery:
        try:
            while True:
                stream = await quic.accept_stream()
                nursery.start_soon(_serve_stream, connection, stream, service)
        except QuicError:
            nursery.cancel_scope.cancel()


async def _serve_stream(connection: EdgeConnection, stream: QuicStream, service: Service) -> None:
    async with stream:
        try:
            with trio.fail_after(HEAD_SECONDS):
                is_call, received = await read_signature(stream)
                incoming = None if is_call else await read_incoming(stream, received)
            if incoming is not None:
                await connection.serve(service, incoming)
                return
            with trio.fail_after(CALL_SECONDS):
                await _answer_calls(stream, received, service)
        except (QuicError, TunnelError, trio.TooSlowError) as error:
            logger.debug("a stream of the edge's: %s", str(error) or "it takes too long")


async def _answer_calls(stream: QuicStream, data: bytes, service: Service) -> None:
    """Raises QuicError, TunnelError."""
    server = RpcServer()
    while True:
        for call in server.receive(data):
            server.answer(call.question_id, _answer(call, service))
        if answers := server.data_to_send():
            await stream.send(answers)
        data = await stream.receive()
        if not data or server.is_ended:
            await stream.send_end()
            return


def _answer(call: rpc.Call, service: Service) -> Struct | rpc.RpcException:
    """Raises TunnelError."""
    if (call.interface_id, call.method_id) != (rpc.CONFIGURATION_MANAGER, UPDATE_CONFIGURATION):
        # Among them the sessions of datagrams' version 2, which we do not offer.
        return rpc.RpcException("unknown method", rpc.ExceptionType.UNIMPLEMENTED)
    update = UpdateConfiguration.from_struct(call.params)
    applied, problem = service.update_configuration(update.version, update.configuration)
    return UpdateConfigurationResponse(applied, problem).to_struct()


async def _serve_datagrams(quic: QuicConnection, flows: UdpFlows) -> None:
    carrier = _Carrier(quic)
    try:
        while True:
            for datagram in await quic.receive_datagrams():
                flows.handle(datagram, carrier)
    except QuicError:
        pass
    finally:
        flows.forget(carrier)


class _Carrier:
    """Where UDP flows send their answers."""

    def __init__(self, quic: QuicConnection) -> None:
        self._quic = quic

    def send_datagram(self, data: bytes) -> None:
        """Send, or drop."""
        try:
            self._quic.send_datagram(data)
        except QuicError:
            pass  # too long for the path, or the connection is over
