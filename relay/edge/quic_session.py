"""Connectors that come over QUIC (edge tunnel specification 6.1, 6.2, 9): the connector opens the
control stream first, later at most streams for calls that end UDP flows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Final
from uuid import UUID

import trio

from relay.edge.connection import TunnelConnection
from relay.edge.quic import QuicTunnelConnection
from relay.edge.registration import EdgeStage, Registrar
from relay.edge.session import ControlStream, Service, Transport, run_session
from traversal.io.quic import SPOOLED_BYTES, QuicConnection
from traversal.io.quic_stream import NO_ERROR, QuicError, QuicStream
from traversal.wire.tunnel import rpc
from traversal.wire.tunnel.capnp import Struct
from traversal.wire.tunnel.connect import RPC_SIGNATURE, SIGNATURE_LENGTH
from traversal.wire.tunnel.errors import TunnelError
from traversal.wire.tunnel.peers import PEERS_SIGNATURE
from traversal.wire.tunnel.registration import (
    EMPTY_RESULTS,
    FEATURE_DRAIN,
    ConnectionDetails,
    RegisterConnection,
)
from traversal.wire.tunnel.rpc_server import RpcServer
from traversal.wire.tunnel.sessions import SessionMethod, UnregisterUdpSession

CALL_SECONDS: Final = 5.0
"""For a connector's call, from the stream's beginning; the reference's bound."""
UNREGISTERED_SPOOLED_BYTES: Final = 1 << 20
"""What a connector that has shown no credentials may make us keep, on all its streams."""
CALLS: Final = 32
"""Streams of one connector that are served at a time; others wait."""
CALL_BYTES: Final = 64 << 10


async def serve_quic(
    quic: QuicConnection, registrar: Registrar, *, source: str, new_id: Callable[[], UUID]
) -> None:
    """Serve a connector whose handshake is done, until the connection is over; it is closed then.

    Raises nothing but Cancelled.
    """
    quic.spooled_bytes = UNREGISTERED_SPOOLED_BYTES
    try:
        await run_session(_QuicTransport(quic, registrar, source, new_id), registrar, source=source)
    finally:
        quic.close()


class _QuicTransport(Transport):
    def __init__(
        self,
        quic: QuicConnection,
        registrar: Registrar,
        source: str,
        new_id: Callable[[], UUID],
    ) -> None:
        self._quic = quic
        self._registrar = registrar
        self._source = source
        self._new_id = new_id
        self._control: QuicStream | None = None

    async def open_control(self) -> ControlStream | None:
        """See Transport."""
        try:
            self._control = await self._quic.accept_stream()
            return self._control
        except QuicError as error:
            if error.code == NO_ERROR:
                return None  # a connector that looks whether it could connect (specification 4)
            raise

    def make_connection(
        self, request: RegisterConnection, details: ConnectionDetails
    ) -> QuicTunnelConnection:
        """See Transport."""
        self._quic.spooled_bytes = SPOOLED_BYTES
        return QuicTunnelConnection(
            self._quic,
            request,
            details,
            source=self._source,
            now=trio.current_time(),
            new_id=self._new_id,
        )

    def services(self, connection: TunnelConnection) -> Sequence[Service]:
        """See Transport."""
        assert isinstance(connection, QuicTunnelConnection)
        if not connection.serves_requests:
            return [partial(self._serve_peers, connection)]
        return [
            connection.flows.run,
            partial(self._serve_calls, connection),
        ]

    async def hand_over(self, connection: TunnelConnection) -> None:
        """Tell a connector of ours; give the connection's UDP flows to another one, of the same
        connector if possible."""
        assert isinstance(connection, QuicTunnelConnection)
        # The reference drops the whole connection at once when its control stream ends.
        if FEATURE_DRAIN in connection.options.features and self._control is not None:
            try:
                await self._control.send_end()
            except QuicError:
                pass
        candidates = [
            other
            for other in self._registrar.registry.connections(connection.tunnel_id)
            if isinstance(other, QuicTunnelConnection) and other.is_usable
        ]
        # Another connector of the tunnel reaches the same destination, from another address.
        candidates.sort(key=lambda other: other.connector_id != connection.connector_id)
        try:
            if candidates:
                await connection.flows.move_to(candidates[0].flows)
        finally:
            connection.flows.fail("the connector's connection is over")

    async def _serve_peers(self, connection: QuicTunnelConnection) -> None:
        problem = "the channel for peers ended"
        try:
            async with await self._quic.open_stream() as stream:
                await stream.send(PEERS_SIGNATURE)
                await self._registrar.peers.serve(stream, self._quic, repr(connection))
        except QuicError as error:
            problem = str(error)
        connection.close(problem)

    async def _serve_calls(self, connection: QuicTunnelConnection) -> None:
        """Answer what the connector calls, each call on a stream of its own."""
        room = trio.Semaphore(CALLS)
        async with trio.open_nursery() as nursery:
            try:
                while True:
                    await room.acquire()
                    nursery.start_soon(
                        self._serve_call, connection, await self._quic.accept_stream(), room
                    )
            except QuicError:
                return

    async def _serve_call(
        self, connection: QuicTunnelConnection, stream: QuicStream, room: trio.Semaphore
    ) -> None:
        try:
            async with stream:
                with trio.move_on_after(CALL_SECONDS):
                    await _answer_call(connection, stream)
        except (QuicError, TunnelError) as error:
            if self._quic.failure is None:
                self._registrar.refuse(EdgeStage.PROTOCOL, self._source, f"{connection!r}: {error}")
        finally:
            room.release()


async def _answer_call(connection: QuicTunnelConnection, stream: QuicStream) -> None:
    """Raises QuicError, TunnelError."""
    received = b""
    while len(received) < SIGNATURE_LENGTH:
        data = await stream.receive()
        if not data:
            return
        received += data
    if not received.startswith(RPC_SIGNATURE):
        raise TunnelError("a stream of an unknown kind")
    server = RpcServer(CALL_BYTES)
    data = received[SIGNATURE_LENGTH:]
    while True:
        for call in server.receive(data):
            server.answer(call.question_id, _call(connection, call))
        if answers := server.data_to_send():
            await stream.send(answers)
        data = await stream.receive()
        if not data or server.is_ended:
            await stream.send_end()
            return


def _call(connection: QuicTunnelConnection, call: rpc.Call) -> Struct | rpc.RpcException:
    """The one method that connectors call here, in version 2 of datagrams. Raises TunnelError."""
    if (call.interface_id, call.method_id) != (
        rpc.SESSION_MANAGER,
        SessionMethod.UNREGISTER_UDP_SESSION,
    ):
        return rpc.RpcException("unknown method", rpc.ExceptionType.UNIMPLEMENTED)
    connection.flows.handle_unregistered(UnregisterUdpSession.from_struct(call.params))
    return EMPTY_RESULTS
