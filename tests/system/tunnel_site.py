"""A site that is published through our edge by our connector: services of every kind."""

from __future__ import annotations

import os
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import h11
import trio
import trustme

from relay.config import Config
from relay.edge.tunnel_files import create_tunnel
from tests.system.tunnel_origin import Origin
from tests.system.tunnel_visitors import Visitor
from tests.system.tunnel_world import RunningEdge, make_connector, run_edge, visitor_certificates
from traversal.io.http2 import Http2Connection
from traversal.io.http2_engine import Http2Error
from traversal.io.http2_stream import Http2Stream, header
from traversal.io.stream import HandshakeStream, StreamEndedError
from traversal.tunnel.configuration_file import read_configuration
from traversal.tunnel.connector import Connector
from traversal.tunnel.origin_service import OriginService
from traversal.tunnel.transport_choice import Transport
from traversal.tunnel.udp_flows import UdpFlows


class Http2Origin:
    """An https origin that speaks HTTP/2 only, as a gRPC server does: each message comes back at
    once, the status in trailers."""

    def __init__(self, context: ssl.SSLContext) -> None:
        context.set_alpn_protocols(["h2"])
        self._context = context
        self.connections = 0
        self.abandoned = trio.Event()
        """Set when a stream was reset by the client."""

    async def serve(self, stream: trio.SocketStream) -> None:
        """Serve one connection."""
        self.connections += 1
        below = HandshakeStream(stream.socket)
        try:
            await below.start_tls(self._context, server_side=True)
        except StreamEndedError:
            return
        connection = Http2Connection(below, client_side=False)
        async with trio.open_nursery() as nursery:
            await nursery.start(connection.run)
            try:
                while True:
                    nursery.start_soon(self._answer, await connection.accept())
            except Http2Error:
                nursery.cancel_scope.cancel()

    async def _answer(self, stream: Http2Stream) -> None:
        try:
            async with stream:
                path = header(stream.request_headers, b":path")
                if path == b"/not-modified":
                    await stream.respond([(b":status", b"304"), (b"content-length", b"1234")])
                    await stream.send_end()
                    return
                await stream.respond([(b":status", b"200"), (b"content-type", b"application/grpc")])
                while data := await stream.receive():
                    await stream.send(data)
                    if path == b"/reset":
                        return
                told = header(stream.trailers or [], b"x-checksum") or b"none"
                await stream.send_end([(b"grpc-status", b"0"), (b"x-checksum", told)])
        except Http2Error:
            self.abandoned.set()


class RawOrigin:
    """Keeps all that comes, and answers each request that has a body as it is framed."""

    def __init__(self) -> None:
        self.received: list[bytearray] = []
        """Per connection."""

    async def serve(self, stream: trio.SocketStream) -> None:
        """Serve one connection."""
        received = bytearray()
        self.received.append(received)
        protocol = h11.Connection(h11.SERVER, max_incomplete_event_size=1 << 20)
        try:
            async for data in stream:
                received += data
                protocol.receive_data(data)
                while isinstance(event := protocol.next_event(), h11.Event):
                    if isinstance(event, h11.EndOfMessage):
                        answer = h11.Response(status_code=200, headers=[("content-length", "0")])
                        await stream.send_all(
                            (protocol.send(answer) or b"")
                            + (protocol.send(h11.EndOfMessage()) or b"")
                        )
                        protocol.start_next_cycle()
        except (h11.ProtocolError, trio.BrokenResourceError):
            pass

    def requests(self) -> list[h11.Request]:
        """What was received, read by a strict parser; it fails where that is no HTTP."""
        found = []
        for received in self.received:
            protocol = h11.Connection(h11.SERVER, max_incomplete_event_size=1 << 20)
            protocol.receive_data(bytes(received))
            while isinstance(event := protocol.next_event(), h11.Event):
                if isinstance(event, h11.Request):
                    found.append(event)
                if isinstance(event, h11.EndOfMessage):
                    protocol.send(h11.Response(status_code=200, headers=[]))
                    protocol.send(h11.EndOfMessage())
                    if protocol.our_state is h11.MUST_CLOSE:
                        break
                    protocol.start_next_cycle()
        return found


class Site:
    """What a test of the whole way needs."""

    def __init__(
        self,
        edge: RunningEdge,
        connector: Connector,
        service: OriginService,
        origin: Origin,
        grpc: Http2Origin,
        authority: trustme.CA,
    ) -> None:
        self.edge = edge
        self.connector = connector
        self.service = service
        self.origin = origin
        self.grpc = grpc
        self.raw = RawOrigin()
        self.udp_senders: list[tuple[str, int]] = []
        self._authority = authority

    def visitor(self, version: str) -> Visitor:
        """Somebody who comes with this version of HTTP."""
        return Visitor(version, self.edge.edge.public.https[0][1], self.context())

    def context(self) -> ssl.SSLContext:
        """TLS for visitors."""
        context = ssl.create_default_context()
        self._authority.configure_trust(context)
        return context


@asynccontextmanager
async def published_site(
    directory: Path, transport: Transport, connections: int = 1
) -> AsyncIterator[Site]:
    """A connector with services of every kind, registered over this transport."""
    credentials = create_tunnel(str(directory), "web", os.urandom).credentials
    authority, certificates = visitor_certificates(directory)
    authority.cert_pem.write_to_path(str(directory / "visitors-ca.pem"))
    origin_authority = trustme.CA()
    origin_authority.cert_pem.write_to_path(str(directory / "origins-ca.pem"))

    def origin_context(name: str, issuer: trustme.CA = origin_authority) -> ssl.SSLContext:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        issuer.issue_cert(name).configure_cert(context)
        return context

    origin = Origin()
    grpc = Http2Origin(origin_context("grpc.internal"))
    through_context = origin_context("through.example.com", authority)
    senders: list[tuple[str, int]] = []

    async def own_tls(stream: trio.SocketStream) -> None:
        tls = trio.SSLStream(stream, through_context, server_side=True)
        try:
            await tls.send_all(b"own: " + await tls.receive_some(100))
        except trio.BrokenResourceError:
            pass

    async def silent(stream: trio.SocketStream) -> None:
        await trio.sleep_forever()

    async def answer_datagrams(sock: trio.socket.SocketType) -> None:
        while True:
            data, sender = await sock.recvfrom(2000)
            senders.append(sender)
            await sock.sendto(data.upper(), sender)

    async with trio.open_nursery() as nursery:
        await nursery.start(origin.run)

        async def listen(serve) -> int:
            (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
            nursery.start_soon(trio.serve_listeners, serve, [listener])
            return int(listener.socket.getsockname()[1])

        raw = RawOrigin()
        raw_port = await listen(raw.serve)
        grpc_port = await listen(grpc.serve)
        through_port = await listen(own_tls)
        silent_port = await listen(silent)
        unix_path = directory / "origin.sock"
        unix = trio.socket.socket(trio.socket.AF_UNIX)
        await unix.bind(str(unix_path))
        unix.listen()
        nursery.start_soon(trio.serve_listeners, origin.serve, [trio.SocketListener(unix)])
        udp = trio.socket.socket(type=trio.socket.SOCK_DGRAM)
        await udp.bind(("127.0.0.1", 0))
        nursery.start_soon(answer_datagrams, udp)

        (directory / "routes.toml").write_text(f"""
[[http]]
host = "*.example.com"
tunnel = "web"
[[tls]]
name = "through.example.com"
tunnel = "web"
destination = "127.0.0.1:{through_port}"
[[tcp]]
listen = "127.0.0.1:0"
tunnel = "web"
destination = "127.0.0.1:{origin.tcp_port}"
[[tcp]]
listen = "127.0.0.2:0"
tunnel = "web"
destination = "127.0.0.1:1"
[[udp]]
listen = "127.0.0.1:0"
tunnel = "web"
destination = "127.0.0.1:{udp.getsockname()[1]}"
""")
        config = Config.dev(
            {
                "edge.listen": "127.0.0.1:0",
                "edge.directory": str(directory),
                "edge.public.https": "127.0.0.1:0",
                "edge.public.routes_file": str(directory / "routes.toml"),
                "edge.public.certificates": str(certificates),
                "edge.public.allowed_destinations": "127.0.0.0/8",
            }
        )

        def rule(name: str, service: str, **options: object) -> dict[str, object]:
            host = f"{name}.example.com"
            return {"hostname": host, "service": service, "originRequest": options}

        flows = UdpFlows()
        tls = {"caPool": str(directory / "origins-ca.pem"), "originServerName": "grpc.internal"}
        service = OriginService(
            read_configuration(
                {
                    "ingress": [
                        rule("app", f"http://127.0.0.1:{origin.port}"),
                        rule("unix", f"unix:{unix_path}"),
                        rule("grpc", f"https://127.0.0.1:{grpc_port}", http2Origin=True, **tls),
                        rule("untrusted", f"https://127.0.0.1:{grpc_port}", http2Origin=True),
                        rule("raw", f"http://127.0.0.1:{raw_port}"),
                        rule("ssh", f"tcp://127.0.0.1:{origin.tcp_port}"),
                        rule("teapot", "http_status:418"),
                        rule("down", "http://127.0.0.1:1"),
                        rule("mute", f"https://127.0.0.1:{silent_port}", tlsTimeout="300ms"),
                        {"service": "http_status:404"},
                    ]
                }
            ),
            flows,
        )
        await nursery.start(flows.run)
        edge = await nursery.start(run_edge, config)
        connector = make_connector(
            [edge], credentials, service, directory, (transport,), connections
        )
        try:
            await nursery.start(connector.run)
            site = Site(edge, connector, service, origin, grpc, authority)
            site.udp_senders = senders
            site.raw = raw
            yield site
        finally:
            nursery.cancel_scope.cancel()
            udp.close()
            service.close()
