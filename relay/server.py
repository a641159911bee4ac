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
        self._listeners = [self._open(config.listen.derp, reuse_port=False)]
        self._http_listeners = self._open_optional(config.listen.http)
        self._admin_listeners = self._open_optional(config.listen.admin)

    def close(self) -> None:
        for sock in self._sockets:
            sock.close()

    def _open(
        self, addresses: Sequence[ListenAddress], *, reuse_port: bool
    ) -> list[socket.socket]:
        sockets = [sock for address in addresses for sock in open_listeners(address, reuse_port=reuse_port)]
        self._sockets += sockets
        return sockets
