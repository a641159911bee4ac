"""Connectors over QUIC: both halves of the transport, on loopback."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from uuid import UUID, uuid4

import pytest
import trio
import trustme
from qh3.quic.configuration import QuicConfiguration
from trio.testing import MockClock

from relay.edge.connection import ConnectionFailedError, RequestHead, ResponseHead
from relay.edge.quic import QuicTunnelConnection
from relay.edge.quic_session import serve_quic
from relay.edge.registration import EdgeStage, Registrar
from tests.relay.edge.fake_connector import CREDENTIALS, TUNNEL_ID, make_registrar
from traversal.io.quic import SPOOLED_BYTES, QuicConnection
from traversal.io.quic_endpoints import QuicListener, dial_quic
from traversal.io.quic_settings import SERVER_NAME, connector_configuration, edge_configuration
from traversal.io.quic_stream import QuicError, QuicStream
from traversal.io.udp import bind_socket
from traversal.tunnel.control import ControlClient, ControlEvent
from traversal.tunnel.edge_connection import (
    DialFailedError,
    DialOptions,
    EdgeConnection,
    RegistrationRefusedError,
)
from traversal.tunnel.exchange import ExchangeEndedError, Incoming
from traversal.tunnel.quic import serve_quic as serve_quic_connector
from traversal.tunnel.udp_flows import UdpFlows
from traversal.wire.address import Address
from traversal.wire.tunnel import connect
from traversal.wire.tunnel.registration import (
    FEATURE_DATAGRAM_V2,
    FEATURE_DATAGRAM_V3,
    FEATURE_DRAIN,
    ConnectionOptions,
    RegisterConnection,
)

GET = RequestHead("GET", "https", "app.example.com", "/a//b?c=d/e", ((b"cookie", b"x=1"),))
Handler = Callable[[Incoming], Awaitable[None]]


async def echo(incoming: Incoming) -> None:
    """Answer with what came, and with what the request said of itself."""
    head = incoming.head
    status = 101 if head.kind == "websocket" else 200
    try:
        await incoming.respond(
            status, ((b"X-Said", f"{head.method} {head.path} {head.has_body}".encode()),)
        )
        while data := await incoming.receive():
            await incoming.send(data)
        await incoming.send_end()
    except ExchangeEndedError:
        pass


@dataclass
class Connector:
    """What a connector has: one or more connections, and UDP flows."""

    edge: tuple[str, int]
    ca_file: str
    nursery: trio.Nursery
    handler: Handler = echo
    features: tuple[str, ...] = (FEATURE_DATAGRAM_V3,)
    configurations: list[tuple[int, bytes]] = field(default_factory=list)
    udp: UdpFlows = field(default_factory=UdpFlows)
    client_id: UUID = field(default_factory=uuid4)

    async def dial(self) -> QuicConnection:
        return await dial_quic(self.nursery, self.edge, connector_configuration(self.ca_file))

    def request(self, index: int = 0, secret: bytes = CREDENTIALS.secret) -> RegisterConnection:
        options = ConnectionOptions(self.client_id, self.features)
        return RegisterConnection(CREDENTIALS.account_tag, secret, TUNNEL_ID, index, options)

    async def register(
        self, quic: QuicConnection, request: RegisterConnection
    ) -> tuple[ControlEvent, ControlClient, QuicStream]:
        stream, control = await quic.open_stream(), ControlClient(request)
        while True:
            await stream.send(control.data_to_send())
            for event in control.receive(await stream.receive()):
                await stream.send(control.data_to_send())
                return event, control, stream

    async def connect(self, index: int = 0) -> EdgeConnection:
        options = DialOptions(ca_file=self.ca_file)
        address = Address(*self.edge)
        connection = await self.nursery.start(
            serve_quic_connector, address, options, self.request(index), self
        )
        assert isinstance(connection, EdgeConnection)
        return connection

    async def serve(self, incoming: Incoming) -> None:
        await self.handler(incoming)

    def update_configuration(self, version: int, document: bytes) -> tuple[int, str]:
        self.configurations.append((version, document))
        return version, ""


def make_edge_configuration(directory: Path) -> QuicConfiguration:
    """With a certificate whose authority is in the file `ca`."""
    authority = trustme.CA()
    certificate = authority.issue_cert(SERVER_NAME)
    authority.cert_pem.write_to_path(str(directory / "ca"))
    chain = b"".join(pem.bytes() for pem in certificate.cert_chain_pems)
    return edge_configuration(chain, certificate.private_key_pem.bytes())


@asynccontextmanager
async def running(
    tmp_path: Path, registrar: Registrar, **settings: object
) -> AsyncIterator[Connector]:
    """An edge that listens on loopback, and a connector that is not connected yet."""
    configuration = make_edge_configuration(tmp_path)
    listener = QuicListener(await bind_socket(4, "127.0.0.1", 0), configuration, entropy=os.urandom)
    async with trio.open_nursery() as nursery:

        async def accept() -> None:
            while True:
                quic = await listener.accept()
                nursery.start_soon(serve, quic)

        async def serve(quic: QuicConnection) -> None:
            await serve_quic(quic, registrar, source="192.0.2.1", new_id=uuid4)

        await nursery.start(listener.run)
        nursery.start_soon(accept)
        connector = Connector(
            ("127.0.0.1", listener.port), str(tmp_path / "ca"), nursery, **settings
        )
        await nursery.start(connector.udp.run)
        with trio.fail_after(30):
            yield connector
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def registered(
    tmp_path: Path, **settings: object
) -> AsyncIterator[tuple[Connector, EdgeConnection, QuicTunnelConnection]]:
    registrar = make_registrar()
    async with running(tmp_path, registrar, **settings) as connector:
        link = await connector.connect()
        await registrar.registry.wait_usable(TUNNEL_ID)
        connection = registrar.registry.pick(TUNNEL_ID)
        assert isinstance(connection, QuicTunnelConnection)
        yield connector, link, connection


async def read_all(exchange) -> bytes:
    body = bytearray()
    while data := await exchange.receive():
        body += data
    return bytes(body)


async def test_get(tmp_path: Path) -> None:
    """A request's head reaches the connector as it was, and the answer comes back."""
    async with registered(tmp_path) as (_, _, connection):
        async with await connection.request(GET) as exchange:
            said = (b"x-said", b"GET /a//b?c=d/e False")
            assert await exchange.response() == ResponseHead(200, (said,))
            assert await read_all(exchange) == b""
            assert connection.active == 1
        assert (connection.active, connection.requests) == (0, 1)


@pytest.mark.parametrize("headers", [(), ((b"content-length", b"10240000"),)])
async def test_bodies_both_ways_at_once(tmp_path: Path, headers) -> None:
    """A response may come before and while the request is sent; large bodies arrive whole."""
    head = RequestHead("POST", "https", "app.example.com", "/", headers, has_body=True)
    body = bytes(range(256)) * 40_000
    async with (
        registered(tmp_path) as (_, _, connection),
        await connection.request(head) as exchange,
        trio.open_nursery() as nursery,
    ):

        async def send() -> None:
            for start in range(0, len(body), 100_000):
                await exchange.send(body[start : start + 100_000])
            await exchange.send_end()

        nursery.start_soon(send)
        assert (await exchange.response()).headers == ((b"x-said", b"POST / True"),)
        assert await read_all(exchange) == body


async def test_websocket_and_tcp(tmp_path: Path) -> None:
    """Both carry bytes both ways until either side ends."""
    head = RequestHead("GET", "https", "app.example.com", "/ws", (), kind="websocket")
    async with registered(tmp_path) as (_, _, connection):
        for opened, status in (
            (connection.request(head), 101),
            (connection.connect_tcp("192.0.2.1:22", "visitor"), 200),
        ):
            async with await opened as exchange:
                assert (await exchange.response()).status == status
                await exchange.send(b"ping")
                assert await exchange.receive() == b"ping"
                await exchange.send_end()
                assert await exchange.receive() == b""


async def test_connectors_own_errors(tmp_path: Path) -> None:
    """A connector that can't reach its origin is told from an origin that says 502."""

    async def fail(incoming: Incoming) -> None:
        is_own = incoming.head.path == "/own" or incoming.head.kind == "tcp"
        await incoming.respond(502, is_from_connector=is_own)
        await incoming.send_end()

    async with registered(tmp_path, handler=fail) as (_, _, connection):
        for path, is_own in (("/own", True), ("/origin", False)):
            head = RequestHead("GET", "https", "app.example.com", path, ())
            async with await connection.request(head) as exchange:
                assert await exchange.response() == ResponseHead(502, (), is_own)
        async with await connection.connect_tcp("192.0.2.1:22", "visitor") as exchange:
            assert await exchange.response() == ResponseHead(502, (), is_from_connector=True)


async def test_a_body_that_nobody_wants(tmp_path: Path) -> None:
    """A connector that answers without reading the request ends no exchange by it."""

    async def hasty(incoming: Incoming) -> None:
        await incoming.respond(200)
        await incoming.send(b"enough")
        await incoming.send_end()

    head = RequestHead("POST", "https", "app.example.com", "/", (), has_body=True)
    async with (
        registered(tmp_path, handler=hasty) as (_, _, connection),
        await connection.request(head) as exchange,
    ):
        for _ in range(100):
            await exchange.send(bytes(100_000))
        await exchange.send_end()
        assert await read_all(exchange) == b"enough"


async def test_resets(tmp_path: Path) -> None:
    """An exchange that either side gives up fails for the other; the connection goes on."""
    gone = trio.Event()

    async def half(incoming: Incoming) -> None:
        await incoming.respond(200)
        await incoming.send(b"half")
        if incoming.head.path == "/visitor":
            try:
                while True:
                    await incoming.send(bytes(100_000))
            finally:
                gone.set()

    async with registered(tmp_path, handler=half) as (_, _, connection):
        head = RequestHead("GET", "https", "app.example.com", "/connector", ())
        async with await connection.request(head) as exchange:
            with pytest.raises(ConnectionFailedError) as caught:
                await read_all(exchange)
            assert not caught.value.is_unprocessed
        head = RequestHead("GET", "https", "app.example.com", "/visitor", ())
        async with await connection.request(head) as exchange:
            await exchange.response()
        await gone.wait()
        assert connection.is_usable
        assert connection.active == 0


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\n\r\n",
        connect.DATA_PREAMBLE + bytes(4) + b"\xff\xff\xff\xff",
        connect.ConnectResponse(metadata=(("HttpStatus", "2x0"),)).encode(),
        connect.ConnectResponse(metadata=(("HttpStatus", "200"),)).encode()[:-1],
    ],
    ids=["signature", "size", "status", "cut"],
)
async def test_bad_answers(tmp_path: Path, answer: bytes) -> None:
    """What is no answer fails the exchange and nothing else."""

    async def babble(incoming: Incoming) -> None:
        await incoming.send(answer)
        await incoming.send_end()

    async with registered(tmp_path, handler=babble) as (_, _, connection):
        async with await connection.request(GET) as exchange:
            with pytest.raises(ConnectionFailedError):
                await exchange.response()
        assert connection.is_usable


async def test_impossible_header(tmp_path: Path) -> None:
    """A header that the connector would misread is not sent."""
    head = RequestHead("GET", "https", "app.example.com", "/", ((b"a:b", b"c"),))
    async with registered(tmp_path) as (_, _, connection):
        with pytest.raises(ConnectionFailedError):
            await connection.request(head)
        assert connection.active == 0


async def test_configuration_push(tmp_path: Path) -> None:
    """A configuration reaches the connector, which says what it uses now."""
    async with registered(tmp_path) as (connector, _, connection):
        assert await connection.push_configuration(7, b"{}") == 7
        assert connector.configurations == [(7, b"{}")]


@asynccontextmanager
async def udp_echo() -> AsyncIterator[tuple[str, list[int]]]:
    """A destination, and the ports that it was asked from."""
    sock = await bind_socket(4, "127.0.0.1", 0)
    ports: list[int] = []

    async def serve() -> None:
        while True:
            for data, source in await sock.receive():
                ports.append(source[1])
                sock.send(data, source)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve)
        yield f"127.0.0.1:{sock.port}", ports
        nursery.cancel_scope.cancel()
    sock.close()


async def test_udp(tmp_path: Path) -> None:
    """Datagrams of up to 1280 bytes pass both ways, of each flow from a port of its own."""
    async with registered(tmp_path) as (connector, _, connection), udp_echo() as (place, ports):
        flows = [await connection.open_udp(place, 30) for _ in range(2)]
        for flow in flows:
            for size in (0, 1, 1280):
                got = None
                while got is None:  # the connector has to find the path's MTU first
                    await flow.send(bytes(size))
                    with trio.move_on_after(0.2):
                        got = await flow.receive()
                assert got == bytes(size)
        assert len(set(ports)) == 2
        await flows[0].send(bytes(1281))
        assert connection.flows.dropped == 1
        flows[0].close()
        with pytest.raises(ConnectionFailedError):
            await flows[0].receive()
        assert len(connector.udp) == 2


async def test_udp_refused(tmp_path: Path) -> None:
    """A flow that the connector does not open, or that has no destination, is refused."""
    features = (FEATURE_DATAGRAM_V2,)
    async with registered(tmp_path, features=features) as (_, _, connection):
        with pytest.raises(ConnectionFailedError, match="unknown method"):
            await connection.open_udp("192.0.2.1:53", 30)
        with pytest.raises(ConnectionFailedError, match="no IP address"):
            await connection.open_udp("host:53", 30)
        assert len(connection.flows) == 0


async def test_migration(tmp_path: Path) -> None:
    """When a connection drains its flows go on over another one, from the same port; the connector
    is told that the connection will go, and it goes."""
    features = (FEATURE_DATAGRAM_V3, FEATURE_DRAIN)
    async with (
        registered(tmp_path, features=features) as (connector, link, connection),
        udp_echo() as (place, ports),
    ):
        await connector.connect(1)
        flow = await connection.open_udp(place, 30)
        await flow.send(b"one")
        assert await flow.receive() == b"one"
        connection.drain("the test wants it")
        await link.leaving.wait()
        await link.over.wait()
        await flow.send(b"two")
        assert await flow.receive() == b"two"
        assert len(set(ports)) == 1


async def test_a_lost_connections_flows(tmp_path: Path) -> None:
    """Without another connection the flows end with theirs."""
    async with registered(tmp_path) as (_, link, connection), udp_echo() as (place, _):
        flow = await connection.open_udp(place, 30)
        link.close()
        with pytest.raises(ConnectionFailedError):
            await flow.receive()
        with pytest.raises(ConnectionFailedError):
            await connection.request(GET)


async def test_drain_waits(tmp_path: Path) -> None:
    """A connection that drains finishes what is under way before it is closed."""
    async with registered(tmp_path) as (_, link, connection):
        head = RequestHead("POST", "https", "app.example.com", "/", (), has_body=True)
        async with await connection.request(head) as exchange:
            await exchange.response()
            await link.unregister()
            await connection.wait_leaving()
            await exchange.send(b"late")
            assert await exchange.receive() == b"late"
            assert not link.over.is_set()
        await link.over.wait()


async def test_refused(tmp_path: Path) -> None:
    """Wrong credentials are answered, and the connection is closed."""
    registrar = make_registrar()
    async with running(tmp_path, registrar) as connector:
        request = connector.request(secret=b"wrong" * 8)
        options = DialOptions(ca_file=connector.ca_file)
        with pytest.raises(RegistrationRefusedError):
            await serve_quic_connector(Address(*connector.edge), options, request, connector)
        assert registrar.refusals.counts[EdgeStage.REGISTRATION] == 1


async def test_no_edge(tmp_path: Path, autojump_clock: MockClock) -> None:
    """Where nobody answers the dial fails in time."""
    sock = await bind_socket(4, "127.0.0.1", 0)
    connector = Connector(("127.0.0.1", sock.port), "", None)
    with pytest.raises(DialFailedError, match=r"QUIC: (no answer|Idle timeout)"):
        await serve_quic_connector(
            Address(*connector.edge), DialOptions(), connector.request(), connector
        )
    sock.close()


async def test_probe(tmp_path: Path) -> None:
    """A connector that only looks whether it could connect is no fault."""
    registrar = make_registrar()
    async with running(tmp_path, registrar) as connector:
        quic = await connector.dial()
        quic.close(0, "precheck complete")
        await trio.sleep(0.1)
        assert sum(registrar.refusals.counts.values()) == 0


@pytest.mark.parametrize("data", [b"nonsense", bytes(100), b"\xff" * 100])
async def test_bad_control_streams(tmp_path: Path, data: bytes) -> None:
    """A control stream of nonsense ends the connection; it is counted."""
    registrar = make_registrar()
    async with running(tmp_path, registrar) as connector:
        quic = await connector.dial()
        stream = await quic.open_stream()
        await stream.send(data)
        await stream.send_end()
        await quic.wait_over()
        assert registrar.refusals.counts[EdgeStage.PROTOCOL] == 1


async def test_bad_streams_and_datagrams(tmp_path: Path) -> None:
    """A connector's streams and datagrams of nonsense are refused and counted; requests go on."""
    registrar = make_registrar()
    async with running(tmp_path, registrar) as connector:
        quic = await connector.dial()
        await connector.register(quic, connector.request())
        await registrar.registry.wait_usable(TUNNEL_ID)
        connection = registrar.registry.pick(TUNNEL_ID)
        assert isinstance(connection, QuicTunnelConnection)
        for data in (b"nonsense", connect.RPC_SIGNATURE + bytes(100), connect.DATA_PREAMBLE):
            stream = await quic.open_stream()
            await stream.send(data)
            await stream.send_end()
        for datagram in (b"x", b"", b"\x01", bytes(1000), b"\x03" + bytes(16)):
            quic.send_datagram(datagram)
        while connection.flows.dropped < 5:  # noqa: ASYNC110 # there is no event for it
            await trio.sleep(0.01)
        async with await connection.request(GET):
            assert (await quic.accept_stream()).stream_id == 1


async def test_unregistered_connectors_are_kept_little_for(tmp_path: Path) -> None:
    """Of what a stranger's streams leave lying, all together, one is reset beyond a megabyte; a
    connector that has registered may leave more."""
    registrar = make_registrar()
    async with running(tmp_path, registrar) as connector:
        stranger = await connector.dial()
        await (await stranger.open_stream()).send(b"\0")  # the control stream, for all that is said
        await until_resets(stranger, 2)
        assert stranger.failure is None
        quic = await connector.dial()
        await connector.register(quic, connector.request())
        connection = registrar.registry.pick(TUNNEL_ID)
        assert isinstance(connection, QuicTunnelConnection)
        assert connection._quic.spooled_bytes == SPOOLED_BYTES


async def until_resets(quic: QuicConnection, count: int) -> None:
    """Wait until so many of four streams of 400 kB, which nobody reads, are not wanted at the other
    end."""
    streams = [await quic.open_stream() for _ in range(4)]
    for stream in streams:
        await stream.send(bytes(400_000))
    resets = 0
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:

            async def watch(stream: QuicStream) -> None:
                nonlocal resets
                try:
                    await stream.receive()
                except QuicError:
                    resets += 1
                    if resets == count:
                        nursery.cancel_scope.cancel()

            for stream in streams:
                nursery.start_soon(watch, stream)
    assert resets == count
