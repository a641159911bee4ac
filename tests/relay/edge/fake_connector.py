"""A connector in a few lines, for tests of the edge: it registers and answers with a handler."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from uuid import UUID, uuid4

import trio
from trio.testing import memory_stream_pair

from relay.edge.connection import TunnelConnection
from relay.edge.http2_session import serve_http2
from relay.edge.peer_channel import PeerChannels
from relay.edge.registration import EdgeStage, Registrar
from relay.edge.registry import Registry, RemoteConfiguration, Tunnel
from relay.refusals import Refusals
from traversal.io.http2 import Http2Connection
from traversal.io.http2_engine import Http2Limits
from traversal.io.http2_stream import Http2Stream, header
from traversal.io.stream import StreamEndedError
from traversal.wire.tunnel import rpc
from traversal.wire.tunnel.capnp import MessageSplitter, Struct
from traversal.wire.tunnel.credentials import Credentials
from traversal.wire.tunnel.headers import CONTROL_STREAM, UPGRADE
from traversal.wire.tunnel.registration import (
    EMPTY_RESULTS,
    ConnectionDetails,
    ConnectionOptions,
    ConnectionRefusal,
    RegisterConnection,
    RegistrationMethod,
    UpdateLocalConfiguration,
    parse_register_results,
)

TUNNEL_ID = UUID("11111111-2222-3333-4444-555555555555")
CREDENTIALS = Credentials(TUNNEL_ID, "account", b"S" * 32)

Handler = Callable[[Http2Stream], Awaitable[None]]


class Pipe:
    """A byte stream in memory."""

    def __init__(self, stream: trio.StapledStream) -> None:
        self.stream = stream

    async def receive(self) -> bytes:
        try:
            return bytes(await self.stream.receive_some(65536))
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            raise StreamEndedError("broken") from None

    async def send_all(self, data: bytes) -> None:
        try:
            await self.stream.send_all(data)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            raise StreamEndedError("broken") from None

    def close(self) -> None:
        self.stream.send_stream.close()  # type: ignore[attr-defined]
        self.stream.receive_stream.close()  # type: ignore[attr-defined]


def make_registrar(
    *, configuration: RemoteConfiguration | None = None, drain_seconds: float = 5.0
) -> Registrar:
    """A registrar that knows one tunnel."""
    registry = Registry()
    registry.add_tunnel(Tunnel("web", CREDENTIALS, configuration))
    return Registrar(
        registry,
        Refusals(EdgeStage, trio.current_time()),
        location="lab01",
        drain_seconds=drain_seconds,
        new_id=uuid4,
        peers=PeerChannels(os.urandom),
    )


class FakeConnector:
    """One connection: `connection` is the HTTP/2 server, `control` the control stream."""

    def __init__(self, connection: Http2Connection, connector_id: UUID, index: int) -> None:
        self.connection = connection
        self.connector_id = connector_id
        self.index = index
        self.control: Http2Stream
        self._messages: list[rpc.RpcMessage] = []
        self._splitter = MessageSplitter()

    async def accept_control(self) -> None:
        """Take the control stream, as the first one."""
        self.control = await self.connection.accept()
        assert header(self.control.request_headers, UPGRADE) == CONTROL_STREAM
        await self.control.respond([(b":status", b"200")])

    async def send(self, *messages: bytes) -> None:
        await self.control.send(b"".join(messages))

    async def next_message(self) -> rpc.RpcMessage | None:
        """The edge's next message; None at the end of the stream."""
        while not self._messages:
            data = await self.control.receive()
            if not data:
                return None
            self._messages += map(rpc.parse_rpc, self._splitter.receive(data))
        return self._messages.pop(0)

    def registration(
        self,
        credentials: Credentials = CREDENTIALS,
        features: Sequence[str] = ("serialized_headers",),
    ) -> RegisterConnection:
        return RegisterConnection(
            credentials.account_tag,
            credentials.secret,
            credentials.tunnel_id,
            self.index,
            ConnectionOptions(self.connector_id, tuple(features), "1.2.3", "linux_amd64"),
        )

    async def register(
        self, request: RegisterConnection | None = None
    ) -> ConnectionDetails | ConnectionRefusal | None:
        """Register as the reference does, in one go; None if the edge does not answer."""
        request = request or self.registration()
        await self.send(
            rpc.Bootstrap(0).encode(),
            call(1, RegistrationMethod.REGISTER_CONNECTION, request.to_struct(), 0).encode(),
        )
        assert await self.next_message() == rpc.Return(0, rpc.Hosted(0))
        answer = await self.next_message()
        if answer is None:
            return None
        assert isinstance(answer, rpc.Return)
        assert isinstance(answer.result, Struct)
        await self.send(rpc.Finish(0).encode(), rpc.Finish(1).encode())
        return parse_register_results(answer.result)

    async def unregister(self) -> None:
        """Tell the edge that this connection leaves."""
        method = RegistrationMethod.UNREGISTER_CONNECTION
        await self.send(call(1, method, EMPTY_RESULTS).encode())
        assert await self.next_message() == rpc.Return(1, EMPTY_RESULTS)
        await self.send(rpc.Finish(1).encode(), rpc.Abort(rpc.SHUTDOWN_REASON).encode())

    async def report(self, document: bytes) -> None:
        """Tell the edge the configuration."""
        method = RegistrationMethod.UPDATE_LOCAL_CONFIGURATION
        params = UpdateLocalConfiguration(document).to_struct()
        await self.send(call(1, method, params).encode())
        assert await self.next_message() == rpc.Return(1, EMPTY_RESULTS)
        await self.send(rpc.Finish(1).encode())

    async def serve(self, handle: Handler) -> None:
        """Answer requests until the connection ends."""
        async with trio.open_nursery() as nursery:
            while self.connection.failure is None:
                try:
                    stream = await self.connection.accept()
                except Exception:
                    return
                nursery.start_soon(handle, stream)


def call(
    question_id: int, method: RegistrationMethod, params: Struct, promised: int | None = None
) -> rpc.Call:
    """A call on the edge's object, or on what the answer to a question will be."""
    target: rpc.PromisedAnswer | rpc.ImportedCapability = rpc.ImportedCapability(0)
    if promised is not None:
        target = rpc.PromisedAnswer(promised)
    return rpc.Call(question_id, target, rpc.REGISTRATION_SERVER, method, params)


@asynccontextmanager
async def dialled(
    registrar: Registrar,
    *,
    connector_id: UUID | None = None,
    index: int = 0,
    limits: Http2Limits | None = None,
) -> AsyncIterator[FakeConnector]:
    """A connector that has connected to the edge over HTTP/2 in memory, not yet registered."""
    near, far = memory_stream_pair()
    server = Http2Connection(Pipe(far), client_side=False, limits=limits)
    async with trio.open_nursery() as nursery:

        async def serve() -> None:
            await serve_http2(Pipe(near), registrar, source="192.0.2.1")

        nursery.start_soon(serve)
        await nursery.start(server.run)
        connector = FakeConnector(server, connector_id or uuid4(), index)
        await connector.accept_control()
        yield connector
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def registered(
    registrar: Registrar,
    handle: Handler,
    *,
    connector_id: UUID | None = None,
    index: int = 0,
    limits: Http2Limits | None = None,
) -> AsyncIterator[tuple[FakeConnector, TunnelConnection]]:
    """A connector that has registered and answers requests, and the edge's picture of it."""
    async with dialled(
        registrar, connector_id=connector_id, index=index, limits=limits
    ) as connector:
        details = await connector.register()
        assert isinstance(details, ConnectionDetails)
        await registrar.registry.wait_usable(TUNNEL_ID)
        connection = next(
            connection
            for connection in registrar.registry.connections(TUNNEL_ID)
            if connection.connection_id == details.connection_id
        )
        async with trio.open_nursery() as nursery:
            nursery.start_soon(connector.serve, handle)
            yield connector, connection
            nursery.cancel_scope.cancel()
