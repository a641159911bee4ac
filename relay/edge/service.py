"""The edge: listeners for connectors, and what they share.

It runs in the process that the operator started: with several workers, in their parent, which has
little else to do. Connectors and visitors then meet in one process, and no request crosses another.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Sequence
from typing import Final, NoReturn
from uuid import uuid4

import trio

from relay.config import Config
from relay.edge.certificates import EdgeCertificates
from relay.edge.http2_session import READ_BYTES, serve_http2
from relay.edge.peer_channel import PeerChannels
from relay.edge.public import PublicEdge
from relay.edge.quic_listeners import QuicListeners
from relay.edge.registration import EdgeStage, Registrar
from relay.edge.registry import Registry
from relay.edge.tunnel_files import TunnelFiles
from relay.edge.view import EdgeView, view_tunnels
from relay.file_watch import POLL_SECONDS
from relay.limits import ConnectionCounter
from relay.listeners import Guard, accept_loop
from relay.refusals import Refusals
from traversal.io.stream import HandshakeStream, StreamEndedError

logger = logging.getLogger("underpass.relay.edge")

HANDSHAKE_SECONDS: Final = 15.0
"""A connector allows as long for its side of the TLS handshake."""
SETTLE_SECONDS: Final = 2.0
"""An edge that stops gives visitors who have just connected so long to ask for something, before it
lets its connectors go; some connect in advance and may never ask."""
SEGMENT_BYTES: Final = 1220
"""The longest TCP segment from and to connectors: fits the least MTU of IPv6. HTTP/2 is for where
QUIC does not pass, and such networks often hide from both ends how narrow they are."""
HANDSHAKES: Final = 500
HANDSHAKES_PER_SOURCE: Final = 100
"""TLS handshakes under way; a connector that starts makes four, one a second."""


class Edge:
    """Everything of the edge that runs. Construction raises CertificateError, ConfigError
    and ListenError.

    Args:
        listeners: where connectors connect; non-blocking, closed by whoever opened them.

    Attributes:
        public: what faces visitors.
        addresses: (host, port) pairs of the listeners, for TCP and UDP.
        quic: the UDP side of them.
        registry: the tunnels and their connections.
        registrar: decides who may serve a tunnel.
    """

    def __init__(self, config: Config, listeners: Sequence[socket.socket]) -> None:
        now = trio.current_time()
        self.registry = Registry()
        self.refusals = Refusals(EdgeStage, now)
        self.registrar = Registrar(
            self.registry,
            self.refusals,
            location=config.edge.location,
            drain_seconds=config.server.drain_seconds,
            new_id=uuid4,
            peers=PeerChannels(os.urandom),
        )
        self.certificates = EdgeCertificates(config.edge)
        self._listeners = listeners
        for listener in listeners:  # what is accepted inherits it
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, SEGMENT_BYTES)
        self.addresses = tuple(sock.getsockname()[:2] for sock in listeners)
        self.quic = QuicListeners(self.addresses, self.certificates, self.registrar)
        self._files = TunnelFiles(config.edge.directory, self.registry)
        self._handshakes = ConnectionCounter(HANDSHAKES, HANDSHAKES_PER_SOURCE)
        self._accepting = trio.CancelScope()
        self._guard = Guard()
        self._note_problems(self._files.reload())
        self.public = PublicEdge(config, self.registry)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until cancelled; `drain` ends the accepting but not this. Raises ListenError."""
        async with trio.open_nursery() as nursery:
            await nursery.start(self.quic.run)
            await nursery.start(self.public.run)
            nursery.start_soon(self.certificates.run)
            nursery.start_soon(self._watch_files)
            nursery.start_soon(self._accept, nursery)
            logger.info("%d tunnels can be served", len(self.registry.tunnels()))
            task_status.started()

    async def _accept(self, connections: trio.Nursery) -> None:
        async def start(sock: trio.socket.SocketType) -> None:
            connections.start_soon(self._guard.run, self._handle_connection, sock)

        try:
            with self._accepting:
                async with trio.open_nursery() as nursery:
                    for listener in self._listeners:
                        nursery.start_soon(accept_loop, listener, start)
        finally:
            # A connector whose attempt is refused at once tries another edge at once.
            for listener in self._listeners:
                listener.close()

    async def drain(self, seconds: float) -> None:
        """Take no more connectors, and let those that are here finish what is under way.

        Returns when all are gone, after `seconds` at most.
        """
        self._accepting.cancel()
        self.public.stop_accepting()
        self.registrar.is_draining = True
        self.registrar.drain_seconds = seconds
        with trio.move_on_after(seconds):
            with trio.move_on_after(min(SETTLE_SECONDS, seconds / 2)):
                await self.public.wait_asked()
            for connection in self.registry.connections():
                connection.drain("the edge is about to stop")
            await self.registry.wait_empty()
            await self.public.wait_answered()

    def view(self) -> EdgeView:
        """A picture of it."""
        peers = self.registrar.peers.switch.statistics()
        dropped = peers.dropped_for_full_queue, peers.dropped_for_memory, peers.dropped_not_here
        public = self.public
        return EdgeView(
            tunnels=view_tunnels(self.registry, public.meter.tunnels),
            registrations=self.registrar.accepted,
            visitor_refusals={str(stage): n for stage, n in public.refusals.counts.items()},
            connector_refusals={str(stage): n for stage, n in self.refusals.counts.items()},
            quick_tunnels=len(public.quick),
            quick_tunnels_created=public.quick.created,
            peer_nodes=peers.nodes,
            peer_packets=peers.forwarded,
            peer_bytes=peers.forwarded_bytes,
            peer_drops=sum(dropped),
        )

    def reconfigure(self, config: Config) -> None:
        """Take over what can change while it runs."""
        self.registrar.drain_seconds = config.server.drain_seconds

    def reload_files(self) -> None:
        """Read certificate and tunnels again, whether they look changed or not (SIGHUP)."""
        self.certificates.reload()
        self._note_problems(self._files.reload())
        self.public.reload()

    async def _watch_files(self) -> NoReturn:
        while True:
            await trio.sleep(POLL_SECONDS)
            problems = self._files.poll()
            if problems is not None:
                logger.info("tunnels were read again: %d", len(self.registry.tunnels()))
                self._note_problems(problems)

    def _note_problems(self, problems: Sequence[str]) -> None:
        for problem in problems:
            logger.error("a tunnel stays as it was: %s", problem)

    async def _handle_connection(self, sock: trio.socket.SocketType) -> None:
        try:
            source = sock.getpeername()[0].partition("%")[0].removeprefix("::ffff:")
        except OSError:  # it is gone already
            sock.close()
            return
        stream = HandshakeStream(sock, read_bytes=READ_BYTES)
        try:
            if await self._start_tls(stream, source):
                await serve_http2(stream, self.registrar, source=source)
        finally:
            stream.close()

    async def _start_tls(self, stream: HandshakeStream, source: str) -> bool:
        """Whether there is a TLS connection now; a failure has been noted."""
        if self._handshakes.refusal(source) is not None:
            self.registrar.refuse(EdgeStage.LIMITS, source, "too many TLS handshakes are under way")
            return False
        try:
            with trio.fail_after(HANDSHAKE_SECONDS):
                await stream.start_tls(self.certificates.context, server_side=True)
        except (StreamEndedError, trio.TooSlowError) as error:
            reason = str(error) or f"no TLS handshake within {HANDSHAKE_SECONDS:.0f} s"
            self.registrar.refuse(EdgeStage.TLS, source, reason)
            return False
        finally:
            self._handshakes.remove(source)
        return True
