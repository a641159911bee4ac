"""The whole relay: keys, listeners, STUN, HTTP, admin, signals, drain, reload.

The data plane is a `Service` in this process or, with `server.workers` above 1, a `WorkerPool`;
everything else is the same.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final, NoReturn, Protocol

import msgspec
import trio

from relay.acme import AcmeRenewer
from relay.acme_files import http_challenge_answer
from relay.admin import admin_responder, read_admin_token
from relay.admission import Admission
from relay.certificate_files import CertificateError, load_or_create_self_signed
from relay.certificates import Certificates
from relay.config import Config, ConfigError, ListenAddress, diff_reload
from relay.derper_files import load_or_create_server_key, read_mesh_key, read_server_key
from relay.edge.certificates import EdgeCertificates
from relay.edge.destinations import DestinationPolicy
from relay.edge.public_certificates import PublicCertificates
from relay.edge.registry import Tunnel
from relay.edge.routes_file import read_routes
from relay.edge.service import Edge
from relay.edge.tunnel_files import credentials_files, read_tunnel
from relay.endpoints import plain_http_responder
from relay.file_watch import POLL_SECONDS, FileWatch
from relay.http import Responder, serve_http
from relay.listeners import ListenError, accept_loop, open_listeners
from relay.logs import set_level
from relay.service import Identity, Service
from relay.snapshot import MAX_CLIENTS, Snapshot, merge
from relay.stun import StunServer, StunServerError
from relay.worker_pipe import WorkerError
from relay.workers import WorkerPool
from traversal.io.stream import HandshakeStream, StreamEndedError
from traversal.keys import MeshKey, NodePrivate, NodePublic

logger = logging.getLogger("underpass.relay")

MAX_HTTP_CONNECTIONS: Final = 1000
"""At one time on each of the plain HTTP and admin listeners; descriptors belong to DERP clients."""

StartError = (ConfigError, CertificateError, ListenError, StunServerError, WorkerError)
"""What can be wrong at the start; each text says what to do."""


class DataPlane(Protocol):
    """What moves the packets: one service, or several in workers."""

    async def run(self, *, task_status: trio.TaskStatus[None]) -> None: ...
    async def drain(self, seconds: float) -> None: ...
    async def reconfigure(self, config: Config) -> None: ...
    async def reload_files(self) -> None: ...
    async def revoke(self, key: bytes, reason: str) -> int: ...
    async def snapshots(self, max_clients: int = MAX_CLIENTS) -> list[Snapshot]: ...


@dataclass(frozen=True, slots=True)
class Bound:
    """Where a started relay can be reached: (host, port) pairs, and its identity.

    Attributes:
        pin: `sha256-raw:...` where the certificate is self-signed, else empty.
    """

    server_key: NodePublic
    derp: tuple[tuple[str, int], ...]
    stun: tuple[tuple[str, int], ...]
    http: tuple[tuple[str, int], ...]
    admin: tuple[tuple[str, int], ...]
    pin: str
    edge: tuple[tuple[str, int], ...] = ()


def load_identity(config: Config) -> Identity:
    """The relay's keys, from files or made anew. Raises ConfigError."""
    server = config.server
    private_key = (
        load_or_create_server_key(Path(server.key_file), os.urandom)
        if server.key_file
        else NodePrivate.generate(os.urandom)
    )
    mesh_key = read_mesh_key(Path(server.mesh_key_file)) if server.mesh_key_file else None
    if mesh_key is None and server.workers > 1:
        mesh_key = MeshKey.generate(os.urandom)  # for the workers among themselves
    return Identity(private_key, mesh_key)


def certificate_pin(config: Config) -> str:
    """The `sha256-raw:` pin of a kept self-signed certificate, made if absent; else empty.

    Raises CertificateError.
    """
    if config.tls.mode != "self-signed" or not config.tls.directory:
        return ""
    return load_or_create_self_signed(config.tls.directory, config.server.hostname).pin()


def check_files(config: Config) -> list[str]:
    """What is wrong with the files that a configuration names, without making any."""
    problems = []

    def attempt(check: Callable[[], object]) -> None:
        try:
            check()
        except StartError as error:
            problems.append(str(error))

    server = config.server
    if server.key_file and Path(server.key_file).exists():
        attempt(lambda: read_server_key(Path(server.key_file)))
    if server.mesh_key_file:
        attempt(lambda: read_mesh_key(Path(server.mesh_key_file)))
    attempt(lambda: Admission(config.admission))
    if config.tls.mode == "files":
        key = NodePrivate.generate(os.urandom).public()
        attempt(lambda: Certificates(config.tls, server.hostname, key))
    if config.tls.mode == "acme" or config.edge.public.acme:
        attempt(lambda: AcmeRenewer(config.tls.acme, tuple))
    if config.edge.listen:
        public = config.edge.public
        tunnels: list[Tunnel] = []
        attempt(lambda: EdgeCertificates(config.edge))
        for path in credentials_files(config.edge.directory):
            attempt(partial(_read_into, tunnels, path))
        policy = DestinationPolicy(public.allowed_destinations)
        attempt(lambda: read_routes(public.routes_file, tunnels, policy))
        attempt(lambda: PublicCertificates(public.certificates))
    attempt(lambda: _stun_server(config))
    attempt(lambda: _admin_token(config))
    return problems


def _read_into(tunnels: list[Tunnel], path: Path) -> None:
    tunnels.append(read_tunnel(path))


async def serve(
    config: Config,
    load_again: Callable[[], Config],
    *,
    config_path: str = "",
    task_status: trio.TaskStatus[Bound] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Run a relay until SIGTERM or SIGINT has drained it, or until cancelled.

    Args:
        load_again: reads the configuration anew; may raise ConfigError. Called at SIGHUP and when
            the file changes.
        config_path: that file; empty if there is none.

    Raises one of StartError at the start.
    """
    relay = _Relay(config, load_again, load_identity(config), config_path)
    try:
        await relay.run(task_status)
    finally:
        relay.close()


class _Relay:
    """One run of `serve`."""

    def __init__(
        self,
        config: Config,
        load_again: Callable[[], Config],
        identity: Identity,
        config_path: str,
    ) -> None:
        self._watch = FileWatch(
            [config_path, config.limits.rate_config_file, config.admin.token_file]
        )
        self._config = config
        self._load_again = load_again
        self._identity = identity
        self._sockets: list[socket.socket] = []
        self._stopping = False
        self._admin_token = _admin_token(config)
        self._plane: DataPlane
        try:
            workers = config.server.workers
            self._derp = self._open(config.listen.derp, reuse_port=workers > 1)
            self._http = self._open([config.listen.http] if config.listen.http else [])
            self._admin = self._open([config.listen.admin] if config.listen.admin else [])
            if workers == 1:
                self._plane = Service(config, identity, self._derp)
            else:
                # Each further worker listens on the ports that the first one got.
                ports = [ListenAddress(*sock.getsockname()[:2]) for sock in self._derp]
                more = [self._open(ports, reuse_port=True) for _ in range(workers - 1)]
                self._plane = WorkerPool(config, identity, [self._derp, *more])
            self._stun = _stun_server(config)
            self._edge = None
            if config.edge.listen:
                self._edge = Edge(config, self._open(config.edge.listen))
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the listening sockets; harmless repeated."""
        for sock in self._sockets:
            sock.close()

    def _open(
        self, addresses: Sequence[ListenAddress], *, reuse_port: bool = False
    ) -> list[socket.socket]:
        sockets: list[socket.socket] = []
        for address in addresses:
            sockets += open_listeners(address, reuse_port=reuse_port)
        self._sockets += sockets
        return sockets

    async def collect(self, max_clients: int = MAX_CLIENTS) -> Snapshot:
        """One picture of the whole relay. Raises WorkerError."""
        snapshots = await self._plane.snapshots(max_clients)
        if not snapshots:
            raise WorkerError("no worker answers")
        snapshot = merge(snapshots)
        stun = None if self._stun is None else self._stun.statistics()
        edge = None if self._edge is None else self._edge.view()
        return msgspec.structs.replace(snapshot, stun=stun, edge=edge)

    async def _revoke(self, key: NodePublic) -> int:
        return await self._plane.revoke(key.raw, "the operator ended its sessions")

    async def run(self, task_status: trio.TaskStatus[Bound]) -> None:
        async with trio.open_nursery() as nursery:
            with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as signals:
                bound = await self._start(nursery)
                logger.info("serving DERP on %s, key %s", _text(bound.derp), bound.server_key)
                task_status.started(bound)
                async for number in signals:
                    if number == signal.SIGHUP:
                        await self._reload()
                    elif self._stopping:
                        break  # asked twice: leave at once
                    else:
                        self._stopping = True
                        nursery.start_soon(self._drain, nursery.cancel_scope)
            nursery.cancel_scope.cancel()

    async def _start(self, nursery: trio.Nursery) -> Bound:
        """Start everything; returns when all of it serves."""
        await nursery.start(self._plane.run)
        stun: list[tuple[str, int]] = []
        if self._stun is not None:
            stun = await nursery.start(self._stun.serve)
        if self._edge is not None:
            await nursery.start(self._edge.run)
        tls = self._config.tls
        plain = plain_http_responder(
            acme_answer=partial(http_challenge_answer, tls.acme.state_directory),
            https_port=self._https_port,
        )
        for listener in self._http:
            nursery.start_soon(accept_loop, listener, _http_handler(plain))
        admin = admin_responder(
            collect=self.collect,
            revoke=self._revoke,
            token=lambda: self._admin_token,
            workers=self._config.server.workers,
        )
        for listener in self._admin:
            nursery.start_soon(accept_loop, listener, _http_handler(admin))
        if tls.mode == "acme" or self._config.edge.public.acme:
            nursery.start_soon(AcmeRenewer(tls.acme, self._acme_names).run)
        nursery.start_soon(self._watch_config)
        certificate = (await self.collect(0)).certificate
        return Bound(
            server_key=self._identity.private_key.public(),
            derp=_places(self._derp),
            stun=tuple(stun),
            http=_places(self._http),
            admin=_places(self._admin),
            pin=(certificate.pin or "") if certificate is not None else "",
            edge=() if self._edge is None else self._edge.addresses,
        )

    def _https_port(self, host: str) -> int:
        """Where plain HTTP for a host is sent on to."""
        port = None if self._edge is None else self._edge.public.https_port(host)
        return port or self._derp[0].getsockname()[1]

    def _acme_names(self) -> list[str]:
        """The hosts that are to have certificates by ACME."""
        own = [self._config.server.hostname] if self._config.tls.mode == "acme" else []
        return own + ([] if self._edge is None else self._edge.public.certificates.names_to_order())

    async def _drain(self, everything: trio.CancelScope) -> None:
        logger.info("stopping; a second signal stops at once")
        seconds = self._config.server.drain_seconds
        async with trio.open_nursery() as nursery:
            if self._edge is not None:
                nursery.start_soon(self._edge.drain, seconds)
            try:
                await self._plane.drain(seconds)
            except WorkerError as error:
                logger.error("there is nobody left to drain: %s", error)
        everything.cancel()

    async def _watch_config(self) -> NoReturn:
        while True:
            await trio.sleep(POLL_SECONDS)
            if self._watch.poll():
                await self._reload()

    async def _reload(self) -> None:
        """Configuration and files anew; what is wrong leaves everything as it was."""
        try:
            reload = diff_reload(self._config, self._load_again())
            admin_token = _admin_token(reload.config)
            await self._plane.reconfigure(reload.config)
        except (ConfigError, WorkerError) as error:
            logger.error("the old configuration stays in use: %s", error)
            return
        if self._edge is not None:
            self._edge.reconfigure(reload.config)
        self._config = reload.config
        self._admin_token = admin_token
        set_level(reload.config.log)
        if self._edge is not None:
            self._edge.reload_files()
        try:
            await self._plane.reload_files()
        except WorkerError as error:
            logger.error("certificates and admission files are not read again: %s", error)
        if reload.applied:
            logger.info("reloaded: %s", ", ".join(reload.applied))
        if reload.needs_restart:
            logger.warning("these keys need a restart: %s", ", ".join(reload.needs_restart))


def _admin_token(config: Config) -> str:
    path = config.admin.token_file
    return read_admin_token(path) if path else ""


def _stun_server(config: Config) -> StunServer | None:
    """None if there is to be none. Raises StunServerError."""
    listen = config.listen
    if not listen.stun:
        return None
    return StunServer(
        [(address.host or _any_host(), address.port) for address in listen.stun],
        alternates=[(address.host, address.port) for address in listen.stun_alternate],
    )


def _any_host() -> str:
    """Every address of both families; IPv4's alone where the kernel has no IPv6."""
    try:
        socket.socket(socket.AF_INET6, socket.SOCK_DGRAM).close()
    except OSError:
        return "0.0.0.0"
    return "::"


def _places(listeners: Sequence[socket.socket]) -> tuple[tuple[str, int], ...]:
    return tuple(listener.getsockname()[:2] for listener in listeners)


def _text(addresses: Sequence[tuple[str, int]]) -> str:
    return ", ".join(str(ListenAddress(*address)) for address in addresses)


def _http_handler(respond: Responder) -> Callable[[trio.socket.SocketType], Awaitable[None]]:
    """A handler of connections that speak nothing but HTTP, without TLS."""
    connections = 0

    async def handle(sock: trio.socket.SocketType) -> None:
        nonlocal connections
        stream = HandshakeStream(sock)
        if connections >= MAX_HTTP_CONNECTIONS:
            stream.close()
            return
        connections += 1
        try:
            source = sock.getpeername()[0]
            await serve_http(stream, respond, source=source, over_tls=False)
        except (StreamEndedError, OSError) as error:
            logger.debug("an HTTP connection ended: %s", error)
        finally:
            connections -= 1
            stream.close()

    return handle
