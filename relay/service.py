"""The data plane of one relay process: accept, upgrade, pump, mesh links, drain.

A relay with one process has one; with several workers each of them has one.
"""

from __future__ import annotations

import logging
import random
import socket
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Final

import trio

from relay.admission import Admission
from relay.bootstrap_dns import BootstrapDns, DnsResolver, refresh_forever
from relay.certificates import Certificates
from relay.config import BootstrapDnsConfig, Config
from relay.endpoints import public_responder
from relay.http import Request, serve_http, wanted_protocol
from relay.limits import AcceptLimiter, ConnectionCounter
from relay.listeners import accept_loop
from relay.mesh import MeshLinks
from relay.peers import Peer, peer_of, receive_proxy_header
from relay.proxy_protocol import ProxyProtocolError, TrustedProxies
from relay.pump import Connection, Pump
from relay.refusals import Refusals, Stage
from relay.sampling import Sampler
from relay.snapshot import MAX_CLIENTS, Snapshot
from relay.upgrade import RateLimit, RefusedError, Session, Upgrader
from relay.websocket import serve_websocket
from traversal.io.stream import HandshakeStream, StreamEndedError
from traversal.keys import MeshKey, NodePrivate
from traversal.wire.address import source_of
from traversal.wire.derp import DerpError, encode_health, encode_restarting

logger = logging.getLogger("underpass.relay.service")

TLS_TIMEOUT_SECONDS: Final = 10.0
HANDSHAKES_SHARE: Final = 4
"""One source may hold this part (a quarter) of `limits.handshakes`: silent connections of one
attacker leave room for everybody else's. Trusted proxies speak for many and are exempt."""
RESTARTING_TRY_MS: Final = 5000
MOVE_SECONDS: Final = 2.0
"""When a client's turn to leave has come, its connection stays for so long: it makes another one
first, and tells its peers."""
"""How long clients should keep trying before they treat it as a failure; "no more than a few
seconds" (DERP specification 6.15)."""


@dataclass(frozen=True, slots=True)
class Identity:
    """The relay's keys."""

    private_key: NodePrivate
    mesh_key: MeshKey | None


@dataclass(slots=True)
class _Arrival:
    """A connection on its way to the pump, and what was counted for it so far."""

    peer: Peer
    origin: str
    """What its handshake is counted as."""
    stage: Stage = Stage.PROXY
    in_handshake: bool = True
    counted_as: str | None = None


class Service:
    """One process's data plane.

    Args:
        listeners: where clients connect; non-blocking, closed when `run` ends.
        sibling_listener: the Unix socket on which the other workers of this host connect.
        siblings: theirs.

    Raises ConfigError, CertificateError.
    """

    def __init__(
        self,
        config: Config,
        identity: Identity,
        listeners: Sequence[socket.socket],
        *,
        sibling_listener: socket.socket | None = None,
        siblings: Sequence[Path] = (),
    ) -> None:
        now = trio.current_time()
        self.config = config
        self.admission = Admission(config.admission)
        self.refusals = Refusals(Stage, now)
        self._websocket_accepts = 0
        self._tls_handshakes: Counter[str] = Counter()
        self._started_at = now
        self._draining = False
        self._identity = identity
        self.certificates = None
        if config.tls.mode != "off":
            self.certificates = Certificates(
                config.tls, config.server.hostname, identity.private_key.public()
            )
        self._listeners = listeners
        self._sibling_listener = sibling_listener
        self._randomness = random.Random()
        self.bootstrap_dns = BootstrapDns(self._randomness)
        self._respond = public_responder(
            home_page=lambda: self.config.server.home_page, bootstrap_dns=self.bootstrap_dns.answer
        )
        self._sessions: dict[Connection, Session] = {}
        self._counted: dict[Connection, str] = {}
        # Under way, by source (an IPv4 address or an IPv6 /64).
        self._handshakes: Counter[str] = Counter()
        limits = config.limits
        self.accepts = AcceptLimiter(limits.accept_rate_per_second, limits.accept_burst, now)
        self._counter = ConnectionCounter(limits.connections, limits.connections_per_ip)
        self._proxies = TrustedProxies(config.proxy.trusted)
        self.pump = Pump(
            identity.private_key.public(),
            queue_depth=limits.queue_packets,
            memory_bytes=limits.memory_bytes,
            randomness=self._randomness,
        )
        self._upgrader = Upgrader(
            identity.private_key,
            self.pump,
            mesh_key=identity.mesh_key,
            admission=self.admission,
            rate_limit=self._rate_limit,
            on_close=self._handle_close,
        )
        self.mesh = MeshLinks(
            self.pump, identity.private_key, identity.mesh_key, config.mesh.peers, siblings
        )
        self._sampler = Sampler(self.pump)
        self._accepting = trio.CancelScope()

    # --- Tasks -----------------------------------------------------------------------------------

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until cancelled; `drain` ends the accepting but not this."""
        async with trio.open_nursery() as nursery:
            await nursery.start(self.pump.run)
            nursery.start_soon(self.mesh.run)
            nursery.start_soon(self.admission.run, self._sessions.values, self._cut)
            if self.certificates is not None:
                nursery.start_soon(self.certificates.run)
            nursery.start_soon(
                refresh_forever, self.bootstrap_dns, self._bootstrap_config, DnsResolver()
            )
            nursery.start_soon(self._sampler.run)
            nursery.start_soon(self._accept)
            task_status.started()

    async def _accept(self) -> None:
        with self._accepting:
            async with trio.open_nursery() as nursery:
                for listener in self._listeners:
                    nursery.start_soon(accept_loop, listener, self._handle_connection)
                if self._sibling_listener is not None:
                    nursery.start_soon(accept_loop, self._sibling_listener, self._handle_sibling)

    def _bootstrap_config(self) -> BootstrapDnsConfig:
        return self.config.bootstrap_dns

    async def drain(self, seconds: float) -> None:
        """Stop accepting, tell the clients that understand it, and close all, spread over time.

        Returns when every client is gone, after `seconds` at most. Mesh links stay up meanwhile, so
        that those who have moved can reach those who have not.
        """
        self._draining = True
        self._accepting.cancel()
        clients = [
            connection for connection in self.pump.connections.values() if not connection.is_mesh
        ]
        self._randomness.shuffle(clients)
        logger.info("draining %d clients in at most %.0f s", len(clients), seconds)
        moving = min(MOVE_SECONDS, seconds / 2)
        spread = seconds - moving
        for position, connection in enumerate(clients):
            if connection.takes_notices:
                wait_ms = int(1000 * spread * position / len(clients))
                notices = encode_health("this relay is about to restart") + encode_restarting(
                    wait_ms, RESTARTING_TRY_MS
                )
                self.pump.switch.outbox.send_to_all(notices, [connection])
        self.pump.flush()
        started = trio.current_time()
        for position, connection in enumerate(clients):
            await trio.sleep_until(started + moving + spread * position / len(clients))
            self.pump.close(connection, "the relay is about to stop")
            self.pump.flush()

    def snapshot(self, max_clients: int = MAX_CLIENTS) -> Snapshot:
        """A picture of this process, with so many clients listed."""
        certificates = self.certificates
        return Snapshot.of(
            self.pump,
            hostname=self.config.server.hostname,
            version=version("underpass"),
            server_key=self._identity.private_key.public(),
            now=trio.current_time(),
            unix_time=time.time(),
            started_at=self._started_at,
            sampler=self._sampler,
            refusals=self.refusals,
            accepts=self.accepts.statistics(),
            websocket_accepts=self._websocket_accepts,
            tls_handshakes=self._tls_handshakes,
            is_draining=self._draining,
            rate_limit=self._rate_limit(),
            bootstrap_dns=self.bootstrap_dns.counters,
            admission=self.admission.statistics(),
            certificate=None if certificates is None else certificates.status(),
            mesh_links=self.mesh.links,
            max_clients=max_clients,
        )

    async def snapshots(self, max_clients: int = MAX_CLIENTS) -> list[Snapshot]:
        """The one that there is; a `WorkerPool` has several."""
        return [self.snapshot(max_clients)]

    # --- Live changes ----------------------------------------------------------------------------

    async def reconfigure(self, config: Config) -> None:
        """Go over to another configuration, of which only reloadable keys differ, at once.

        Raises ConfigError where a file that it names can't be read; then nothing has changed.
        """
        await self.admission.reconfigure(config.admission)
        self.config = config
        now = trio.current_time()
        limits = config.limits
        self.accepts.configure(limits.accept_rate_per_second, limits.accept_burst, now)
        self._counter.limit = limits.connections
        self._counter.limit_per_source = limits.connections_per_ip
        self._proxies = TrustedProxies(config.proxy.trusted)
        self.pump.switch.outbox.queue_depth = limits.queue_packets
        self.pump.switch.outbox.memory_bytes = limits.memory_bytes
        limit = self._rate_limit()
        for connection, session in self._sessions.items():
            if not connection.is_mesh and session.verdict.grant.rate_bytes_per_second is None:
                self.pump.set_rate(connection, None if limit is None else limit.new_bucket(now))

    async def reload_files(self) -> None:
        """Read certificates and key lists again, whether they look changed or not (SIGHUP)."""
        if self.certificates is not None:
            self.certificates.reload()
        await self.admission.reload()

    async def revoke(self, key: bytes, reason: str) -> int:
        """Cut every session of a key, on all workers of this host; returns how many here."""
        count = self.pump.switch.presence.close_key(key, reason)
        self.pump.flush()
        return count

    def _rate_limit(self) -> RateLimit | None:
        rate = self.config.limits.client_rate()
        return None if rate is None else RateLimit(*rate)

    def _cut(self, session: Session, reason: str) -> None:
        self.refusals.note(
            Stage.ADMISSION,
            str(session.connection.address or ""),
            f"{session.key.short()} was connected and is cut: {reason}",
            trio.current_time(),
        )
        self.pump.close(session.connection, reason)
        self.pump.flush()

    def _handle_close(self, connection: Connection, reason: str) -> None:
        logger.debug("closed %s: %s", connection.short(), reason)
        self._sessions.pop(connection, None)
        counted_as = self._counted.pop(connection, None)
        if counted_as is not None:
            self._counter.remove(counted_as)

    # --- One connection --------------------------------------------------------------------------

    async def _handle_connection(self, sock: trio.socket.SocketType) -> None:
        now = trio.current_time()
        try:
            peer = peer_of(sock)
        except OSError:  # it is gone already
            sock.close()
            return
        if not self.accepts.admit(now):
            self._refuse(Stage.ACCEPT_RATE, peer.source, "more connections per second than allowed")
            sock.close()
            return
        origin = source_of(peer.source)
        if problem := self._handshake_problem(origin, peer.source in self._proxies):
            self._refuse(Stage.HANDSHAKES, peer.source, problem)
            sock.close()
            return
        stream = HandshakeStream(sock)
        self._handshakes[origin] += 1
        arrival = _Arrival(peer, origin)
        try:
            await self._handle_stream(stream, arrival)
        except (StreamEndedError, ProxyProtocolError, DerpError) as error:
            self._refuse(arrival.stage, arrival.peer.source, str(error))
        except RefusedError as error:
            self._refuse(Stage.ADMISSION, arrival.peer.source, str(error))
        finally:
            self._end_handshake(arrival)
            if arrival.counted_as is not None:
                self._counter.remove(arrival.counted_as)
            stream.close()

    def _handshake_problem(self, origin: str, is_proxy: bool) -> str:
        """Why there is no room for one more handshake, empty if there is."""
        limit = self.config.limits.handshakes
        under_way = self._handshakes.total()
        if under_way >= limit:
            return f"{under_way} handshakes are under way, which is limits.handshakes"
        share = max(1, limit // HANDSHAKES_SHARE)
        if not is_proxy and self._handshakes[origin] >= share:
            return f"{origin} has {share} handshakes under way, its share of limits.handshakes"
        return ""

    def _end_handshake(self, arrival: _Arrival) -> None:
        """Give back the arrival's place among the handshakes; harmless when repeated."""
        if not arrival.in_handshake:
            return
        arrival.in_handshake = False
        self._handshakes[arrival.origin] -= 1
        if not self._handshakes[arrival.origin]:
            del self._handshakes[arrival.origin]

    async def _handle_stream(self, stream: HandshakeStream, arrival: _Arrival) -> None:
        """Everything from the first byte on. Raises what ends it; `arrival.stage` says where."""
        if self.config.proxy.protocol == "proxy-protocol" and arrival.peer.source in self._proxies:
            arrival.peer = await receive_proxy_header(stream, arrival.peer)
        source = arrival.peer.source
        # A proxy that speaks HTTP says later for whom the connection is.
        by_http = self.config.proxy.protocol == "x-forwarded-for" and source in self._proxies
        if not by_http and not self._count(arrival, source):
            return
        arrival.stage = Stage.TLS
        if self.certificates is not None:
            await self._start_tls(stream, self.certificates)
        arrival.stage = Stage.HTTP
        upgrade = await serve_http(
            stream, self._respond, source=source, over_tls=self.certificates is not None
        )
        if upgrade is None:
            return
        arrival.stage = Stage.DERP
        request = self._with_true_source(upgrade.request)
        if by_http and not self._count(arrival, request.source):
            return
        if wanted_protocol(request) == "websocket":
            await serve_websocket(
                stream,
                request,
                lambda pair: self._adopt(pair, request, arrival, with_response=False),
                on_accept=self._count_websocket,
            )
        else:
            await self._adopt(stream, request, arrival, with_response=True)

    def _count(self, arrival: _Arrival, source: str) -> bool:
        """Count a connection of this IP address; False if that is one too many."""
        problem = self._counter.refusal(source)
        if problem is not None:
            self._refuse(_stage_of_count(problem), source, problem)
            return False
        arrival.counted_as = source
        return True

    def _with_true_source(self, request: Request) -> Request:
        """Believe X-Forwarded-For where it comes from a trusted proxy."""
        if self.config.proxy.protocol != "x-forwarded-for":
            return request
        forwarded_for = [value for name, value in request.headers if name == "x-forwarded-for"]
        return replace(request, source=self._proxies.client_of(request.source, forwarded_for))

    def _count_websocket(self) -> None:
        self._websocket_accepts += 1

    async def _adopt(
        self, stream: HandshakeStream, request: Request, arrival: _Arrival, *, with_response: bool
    ) -> None:
        session = await self._upgrader.upgrade(
            stream, request, port=arrival.peer.port, with_response=with_response
        )
        self._end_handshake(arrival)
        if session.connection.closed:
            return  # by what it sent with its handshake
        self._sessions[session.connection] = session
        if arrival.counted_as is not None:
            self._counted[session.connection] = arrival.counted_as
            arrival.counted_as = None

    async def _start_tls(self, stream: HandshakeStream, certificates: Certificates) -> None:
        with trio.move_on_after(TLS_TIMEOUT_SECONDS) as timeout:
            hello = b""
            while (context := certificates.context_for(hello)) is None:
                data = await stream.receive()
                if not data:
                    raise StreamEndedError("it closed the connection before TLS")
                hello += data
            stream.put_back(hello)
            tls = await stream.start_tls(context, server_side=True)
            self._tls_handshakes[tls.version() or ""] += 1
        if timeout.cancelled_caught:
            raise StreamEndedError("no TLS handshake within 10 s")

    async def _handle_sibling(self, sock: trio.socket.SocketType) -> None:
        """A connection of another worker of this host, over a Unix socket: plain, mesh key due."""
        stream = HandshakeStream(sock)
        try:
            upgrade = await serve_http(stream, self._respond, source="", over_tls=False)
            if upgrade is not None:
                await self._upgrader.upgrade(stream, upgrade.request, is_sibling=True)
        except (StreamEndedError, DerpError, RefusedError) as error:
            logger.warning("a worker of this host could not connect: %s", error)
        finally:
            stream.close()

    def _refuse(self, stage: Stage, source: str, reason: str) -> None:
        self.refusals.note(stage, source, reason, trio.current_time())


def _stage_of_count(problem: str) -> Stage:
    return Stage.CONNECTIONS if problem.startswith("the relay") else Stage.CONNECTIONS_PER_IP
