"""The whole relay: keys, listeners, STUN, HTTP, admin, signals, drain, reload.

The data plane is a `Service` in this process or, with `server.workers` above 1, a `WorkerPool`;
everything else is the same.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import trio

from relay.config import Config
from relay.derper_files import load_or_create_server_key, read_mesh_key
from relay.service import Identity
from relay.snapshot import Snapshot
from traversal.keys import MeshKey, NodePrivate, NodePublic

logger = logging.getLogger("underpass.relay")


class DataPlane(Protocol):
    """What moves the packets: one service, or several in workers."""

    async def run(self, *, task_status: trio.TaskStatus[None]) -> None: ...
    async def drain(self, seconds: float) -> None: ...
    async def reconfigure(self, config: Config) -> None: ...
    async def reload_files(self) -> None: ...
    async def revoke(self, key: bytes, reason: str) -> int: ...
    async def snapshots(self) -> list[Snapshot]: ...


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


async def serve(
    config: Config,
    load_again: Callable[[], Config],
    *,
    task_status: trio.TaskStatus[Bound] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Run a relay until SIGTERM or SIGINT has drained it, or until cancelled.

    Args:
        load_again: reads the configuration anew, for SIGHUP; may raise ConfigError.

    Raises ConfigError, CertificateError, ListenError, StunServerError, WorkerError at the start.
    """
    identity = load_identity(config)
    relay = _Relay(config, load_again, identity)
    try:
        await relay.run(task_status)
    finally:
        relay.close()


class _Relay:
    """One run of `serve`."""

    def __init__(
        self, config: Config, load_again: Callable[[], Config], identity: Identity
    ) -> None:
        self._config = config
        self._load_again = load_again
        self._identity = identity
        self._sockets: list[socket.socket] = []
        try:
            workers = config.server.workers
            derp = self._open(config.listen.derp, reuse_port=workers > 1)
            self._http = self._open_optional(config.listen.http)
            self._admin = self._open_optional(config.listen.admin)
            self._derp = derp
            self._plane: DataPlane
            if workers == 1:
                self._plane = Service(config, identity, derp)
            else:
                # Each further worker listens on the ports that the first one got.
                bound = [ListenAddress(*sock.getsockname()[:2]) for sock in derp]
                more = [self._open(bound, reuse_port=True) for _ in range(workers - 1)]
                self._plane = WorkerPool(config, identity, [derp, *more])
        except BaseException:
            self.close()
            raise
        self._stun = None
        if config.listen.stun is not None:
            self._stun = StunServer(
                [(config.listen.stun.host or "::", config.listen.stun.port)],
                alternates=_alternates(config),
            )

    def close(self) -> None:
        for sock in self._sockets:
            sock.close()

    async def run(self, task_status: trio.TaskStatus[Bound]) -> None:
        stopping = trio.Event()
        async with trio.open_nursery() as nursery:
            with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as signals:
                await nursery.start(self._plane.run)
                stun: list[tuple[str, int]] = []
                if self._stun is not None:
                    stun = await nursery.start(self._stun.serve)
                for listeners, respond in (
                    (self._http, self._respond_plainly),
                    (self._admin, self._respond_to_admin),
                ):
                    for listener in listeners:
                        nursery.start_soon(accept_loop, listener, _http_handler(respond))
                task_status.started(self._bound(stun))
                async for number in signals:
                    if number == signal.SIGHUP:
                        await self._reload()
                    elif stopping.is_set():
                        break  # asked twice: leave at once
                    else:
                        stopping.set()
                        nursery.start_soon(self._drain_and_stop, nursery.cancel_scope)
            nursery.cancel_scope.cancel()
