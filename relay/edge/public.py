"""The edge's listeners for visitors: HTTP with and without TLS, names passed through, TCP ports.

A TLS connection is looked at before anything is decrypted: if its server name is passed through,
its bytes go to the tunnel as they are, and the edge never sees what is in them.
"""

from __future__ import annotations

import logging
import os
import random
import socket
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Final
from uuid import UUID

import trio

from relay.config import Config, ListenAddress
from relay.config_sources import ConfigError
from relay.edge.client_hello import ClientHelloError, parse_client_hello
from relay.edge.connection import ConnectionFailedError, Exchange
from relay.edge.destinations import Destination, DestinationPolicy
from relay.edge.hygiene import HygienePolicy, Visitor
from relay.edge.limits import Meter, RequestLimits, TooMuchError, TunnelTraffic, charge
from relay.edge.proxy import Finder, GatewayError, Proxy, in_time_for_a_stream
from relay.edge.public_certificates import PublicCertificates
from relay.edge.public_udp import UdpPort
from relay.edge.quick import QuickTunnels
from relay.edge.registry import Registry
from relay.edge.routes import PortRoute, RoutingTable
from relay.edge.routes_file import read_routes
from relay.edge.visit import Visit
from relay.edge.visit_http1 import BadHttpError, serve_http1
from relay.edge.visit_http2 import serve_http2
from relay.edge.visitor_stages import VisitorStage
from relay.file_watch import POLL_SECONDS, FileWatch
from relay.limits import ConnectionCounter
from relay.listeners import Guard, ListenError, accept_loop, open_listeners, take_waiting
from relay.peers import peer_of, receive_proxy_header
from relay.proxy_protocol import ProxyProtocolError, TrustedProxies
from relay.refusals import Refusals
from traversal.io.stream import HandshakeStream, StreamEndedError

logger = logging.getLogger("underpass.relay.edge")

READ_BYTES: Final = 128 << 10
"""Of what a visitor sends, at a time: of memory, too, for each that sends much."""
TLS_SECONDS: Final = 10.0
TCP_BYTES: Final = 65536
FORGET_SECONDS: Final = 10.0
HALF_CLOSED_SECONDS: Final = 300.0
"""How long one direction may go on when the other has ended."""


class PublicEdge:
    """Everything that faces visitors. Construction raises ConfigError, CertificateError and
    ListenError.

    Attributes:
        https, http, tcp, udp: (host, port) pairs that are listened on; the last two in the order
            of the routes.
    """

    def __init__(self, config: Config, registry: Registry) -> None:
        now = trio.current_time()
        self._config = config
        self._registry = registry
        self.refusals = Refusals(VisitorStage, now)
        public = config.edge.public
        self.meter = Meter(_limits_of(config))
        self._finder = Finder(registry)
        self._destinations = DestinationPolicy(public.allowed_destinations)
        self._policy = HygienePolicy(destinations=self._destinations)
        self._routes_watch = FileWatch([public.routes_file])
        self.table = self._read_routes()
        self._proxies = TrustedProxies(config.proxy.trusted)
        self._counter = ConnectionCounter(public.connections, public.connections_per_source)
        self.certificates = PublicCertificates(
            public.certificates,
            state_directory=config.tls.acme.state_directory if public.acme else "",
            published=lambda: (route.host for route in self.table.http),
        )
        quick = config.edge.quick
        self.quick = QuickTunnels(
            registry,
            os.urandom,
            domain=quick.domain,
            per_hour=quick.per_hour,
            limit=quick.tunnels,
            unused_seconds=quick.unused_seconds,
        )
        self._proxy = Proxy(
            self._finder,
            self.meter,
            self.refusals,
            table=lambda: self.table,
            policy=lambda: self._policy,
            quick=self.quick,
            randomness=random.Random(),
        )
        self._accepting = trio.CancelScope()
        self._has_stopped = trio.Event()
        self._guard = Guard()
        self._leaving = trio.Event()
        self._silent: set[HandshakeStream] = set()
        """Visitors who have connected and not asked for anything yet."""
        self._requests = 0
        self._changed = trio.lowlevel.ParkingLot()
        self._listeners: list[tuple[socket.socket, _Handler]] = []
        self.udp: tuple[tuple[str, int], ...] = ()
        self._udp: list[UdpPort] = []
        try:
            self.https = self._listen(public.https, self._handle_tls)
            self.http = self._listen(public.http, self._handle_plain)
            self.tcp = tuple(
                place
                for route in self.table.tcp
                for place in self._listen([route.listen], partial(self._handle_tcp, route))
            )
            for route in self.table.udp:
                self._open_udp(route)
        except BaseException:
            self.close()
            raise

    def https_port(self, host: str) -> int | None:
        """Where a host (in lower case) is served by HTTPS; None if it is not published."""
        if not self.https or self.table.find_http(host, "/") is None:
            return None
        return self.https[0][1]

    def close(self) -> None:
        """Close the listening sockets; harmless when repeated."""
        for listener, _ in self._listeners:
            listener.close()
        for port in self._udp:
            port.close()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until cancelled; `stop_accepting` ends the accepting but not this."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.certificates.run)
            nursery.start_soon(self._watch_routes)
            nursery.start_soon(self._forget_unused)
            for port in self._udp:
                nursery.start_soon(port.run)
            nursery.start_soon(self._accept, nursery)
            task_status.started()

    def stop_accepting(self) -> None:
        """Take no more visitors. The requests of those that are here are served, and their
        connections are closed when they are idle."""
        self._accepting.cancel()
        self._leaving.set()

    async def wait_asked(self) -> None:
        """Return when nobody is accepted any more and every visitor who is here has asked for
        something."""
        await self._has_stopped.wait()
        while self._silent:
            await self._changed.park()

    async def wait_answered(self) -> None:
        """Return when no request is under way; one that finds no connector does not wait for one
        any more, for none will come."""
        self._finder.is_leaving = True
        while self._requests:
            await self._changed.park()

    def reload(self) -> None:
        """Read routes and certificates again; what is no good leaves everything as it was. Ports
        that are new need a restart."""
        try:
            table = self._read_routes()
        except ConfigError as error:
            logger.error("the old routes stay in use: %s", error)
        else:
            if (table.tcp, table.udp) != (self.table.tcp, self.table.udp):
                logger.warning("published ports have changed, which needs a restart")
            self.table = table
        self.certificates.reload()

    def _listen(
        self, addresses: Sequence[ListenAddress], handler: _Handler
    ) -> tuple[tuple[str, int], ...]:
        places = []
        for address in addresses:
            for listener in open_listeners(address):
                self._listeners.append((listener, handler))
                places.append(listener.getsockname()[:2])
        return tuple(places)

    def _read_routes(self) -> RoutingTable:
        return read_routes(
            self._config.edge.public.routes_file, self._registry.tunnels(), self._destinations
        )

    def _open_udp(self, route: PortRoute) -> None:
        host = route.listen.host or "0.0.0.0"
        sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM)
        try:
            sock.bind((host, route.listen.port))
            sock.setblocking(False)
        except OSError as error:
            sock.close()
            problem = f"can't listen on UDP {route.listen}: {error.strerror}"
            raise ListenError(problem) from None
        port = UdpPort(
            trio.socket.from_stdlib_socket(sock),
            route,
            self._registry,
            lambda: self.meter.traffic(route.tunnel, trio.current_time()),
        )
        self._udp.append(port)
        self.udp += (sock.getsockname()[:2],)

    async def _forget_unused(self) -> None:
        while True:
            await trio.sleep(FORGET_SECONDS)
            for tunnel in self.quick.forget_unused(trio.current_time()):
                self.meter.forget(tunnel)
                self._finder.forget(tunnel)

    async def _watch_routes(self) -> None:
        while True:
            await trio.sleep(POLL_SECONDS)
            if self._routes_watch.poll():
                self.reload()

    # --- Connections -----------------------------------------------------------------------------

    async def _accept(self, connections: trio.Nursery) -> None:
        def starter(handler: _Handler) -> Callable[[trio.socket.SocketType], Awaitable[None]]:
            async def start(sock: trio.socket.SocketType) -> None:
                stream = HandshakeStream(sock, read_bytes=READ_BYTES)
                self._silent.add(stream)
                connections.start_soon(self._guard.run, self._handle, handler, sock, stream)

            return start

        try:
            with self._accepting:
                async with trio.open_nursery() as nursery:
                    for listener, handler in self._listeners:
                        nursery.start_soon(accept_loop, listener, starter(handler))
            for listener, handler in self._listeners:
                for sock in take_waiting(listener):
                    await starter(handler)(sock)
        finally:
            self.close()
            self._has_stopped.set()

    async def _handle(
        self, handler: _Handler, sock: trio.socket.SocketType, stream: HandshakeStream
    ) -> None:
        try:
            peer = peer_of(sock)
        except OSError:  # it is gone already
            sock.close()
            self._note_asked(stream)
            return
        stage = VisitorStage.CONNECTIONS
        source = peer.source
        counted = False
        try:
            if self._config.proxy.protocol == "proxy-protocol" and source in self._proxies:
                stage = VisitorStage.PROXY
                source = (await receive_proxy_header(stream, peer)).source
            stage = VisitorStage.CONNECTIONS
            if problem := self._counter.refusal(source):
                self._refuse(stage, source, problem)
                return
            counted = True
            stage = VisitorStage.TLS
            await handler(sock, stream, source)
        except (StreamEndedError, ProxyProtocolError, ClientHelloError) as error:
            self._refuse(stage, source, str(error))
        except BadHttpError as error:
            self._refuse(VisitorStage.HTTP, source, str(error))
        except (TooMuchError, GatewayError, ConnectionFailedError) as error:
            self._refuse(VisitorStage.TUNNEL, source, str(error))
        finally:
            if counted:
                self._counter.remove(source)
            stream.close()
            self._note_asked(stream)

    def _note_asked(self, stream: HandshakeStream) -> None:
        self._silent.discard(stream)
        self._changed.unpark_all()

    async def _serve(self, stream: HandshakeStream, visit: Visit) -> None:
        self._note_asked(stream)
        self._requests += 1
        try:
            await self._proxy.serve(visit)
        finally:
            self._requests -= 1
            self._changed.unpark_all()

    async def _handle_plain(
        self, sock: trio.socket.SocketType, stream: HandshakeStream, source: str
    ) -> None:
        serve = partial(self._serve, stream)
        await serve_http1(stream, Visitor(source, "http"), serve, self._leaving)

    async def _handle_tls(
        self, sock: trio.socket.SocketType, stream: HandshakeStream, source: str
    ) -> None:
        with trio.move_on_after(TLS_SECONDS) as timeout:
            data = b""
            while (hello := parse_client_hello(data)) is None:
                more = await stream.receive()
                if not more:
                    raise StreamEndedError("it closed the connection before TLS")
                data += more
            route = self.table.find_tls(hello.server_name)
            if route is None:
                stream.put_back(data)
                context = self.certificates.context_for(hello.server_name, data)
                tls = await stream.start_tls(context, server_side=True)
        if timeout.cancelled_caught:
            raise StreamEndedError(f"no TLS handshake within {TLS_SECONDS:.0f} s")
        serve = partial(self._serve, stream)
        if route is not None:
            self._note_asked(stream)
            await self._pass_through(sock, data, route.tunnel, route.destination, source)
        elif tls.selected_protocol() == "h2":
            await serve_http2(stream, Visitor(source, "https"), serve, self._leaving)
        else:
            await serve_http1(stream, Visitor(source, "https"), serve, self._leaving)

    async def _handle_tcp(
        self, route: PortRoute, sock: trio.socket.SocketType, stream: HandshakeStream, source: str
    ) -> None:
        self._note_asked(stream)
        await self._pass_through(sock, b"", route.tunnel, route.destination, source)

    # --- Bytes without a protocol ----------------------------------------------------------------

    async def _pass_through(
        self,
        sock: trio.socket.SocketType,
        early: bytes,
        tunnel: UUID,
        destination: Destination,
        source: str,
    ) -> None:
        """Join a visitor's socket to a destination behind the tunnel. Raises TooMuchError,
        GatewayError, ConnectionFailedError."""
        traffic = self.meter.enter(tunnel, source, trio.current_time())
        traffic.tcp_total += 1
        traffic.tcp_active += 1
        try:
            async with await self._connect(tunnel, destination, source) as exchange:
                if early:
                    await exchange.send(early)
                await _join(sock, exchange, traffic)
        except (ConnectionFailedError, GatewayError):
            traffic.errors += 1
            raise
        finally:
            traffic.tcp_active -= 1
            self.meter.leave(traffic, source)

    async def _connect(self, tunnel: UUID, destination: Destination, source: str) -> Exchange:
        """A connection that the connector has opened; tries another one if the first fails."""
        connection = await self._finder.find(tunnel)
        for attempt in range(2):
            try:
                with in_time_for_a_stream():
                    exchange = await connection.connect_tcp(str(destination), source)
                try:
                    response = await exchange.response()
                except BaseException:
                    exchange.reset()
                    raise
            except ConnectionFailedError:
                other = self._finder.maybe_find(tunnel, [connection])
                if attempt or other is None or other is connection:
                    raise
                connection = other
                continue
            if response.status == 200:
                return exchange
            exchange.reset()
            raise GatewayError(502, f"the connector can't connect to {destination}")
        raise AssertionError("the second attempt returns or raises")

    def _refuse(self, stage: VisitorStage, source: str, reason: str) -> None:
        self.refusals.note(stage, source, reason, trio.current_time())


_Handler = Callable[[trio.socket.SocketType, HandshakeStream, str], Awaitable[None]]


async def _join(sock: trio.socket.SocketType, exchange: Exchange, traffic: TunnelTraffic) -> None:
    """Both directions until both have ended, or one has failed."""
    async with trio.open_nursery() as nursery:
        scope = nursery.cancel_scope

        @contextmanager
        def direction() -> Iterator[None]:
            try:
                yield
            except (OSError, ConnectionFailedError):
                scope.cancel()
            # The other direction may have the last word, but not forever.
            scope.deadline = min(scope.deadline, trio.current_time() + HALF_CLOSED_SECONDS)

        async def upload() -> None:
            with direction():
                while data := await sock.recv(TCP_BYTES):
                    await exchange.send(data)
                    await _pause(charge(traffic, len(data), trio.current_time(), inward=True))
                await exchange.send_end()

        async def download() -> None:
            with direction():
                while data := await exchange.receive():
                    view = memoryview(data)
                    while view:
                        view = view[await sock.send(view) :]
                    await _pause(charge(traffic, len(data), trio.current_time(), inward=False))
                sock.shutdown(socket.SHUT_WR)

        nursery.start_soon(upload)
        nursery.start_soon(download)


async def _pause(seconds: float) -> None:
    if seconds:
        await trio.sleep(seconds)


def _limits_of(config: Config) -> RequestLimits:
    public = config.edge.public
    return RequestLimits(
        requests=public.requests,
        requests_per_tunnel=public.requests_per_tunnel,
        requests_per_source=public.requests_per_source,
        tunnel_requests_per_second=public.tunnel_requests_per_second,
        tunnel_bytes_per_second=public.tunnel_bytes_per_second,
    )
