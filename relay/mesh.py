"""Links to the other relays of the region and to the other workers of this host.

One mechanism for both: we connect as a client with our own server key and the mesh key, ask who is
connected there (WATCH_CONNS), and from then on packets for those keys leave over the link
(DERP specification 10). What the frames mean is `forwarding`'s business; this module keeps the
links up.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import trio

from relay.config import MeshPeer
from relay.pump import Connection, Pump
from traversal.io.dial import Dialed, DialError, Target, dial, dial_path
from traversal.keys import MeshKey, NodePrivate
from traversal.relay_map import CertificateName
from traversal.wire.derp import PROTOCOL_VERSION, ClientInfo

logger = logging.getLogger("underpass.relay.mesh")

RETRY_SECONDS: Final = 5.0
SIBLING_RETRY_SECONDS: Final = 0.2
"""A worker of this host is restarted within a second; its clients wait for it."""

SHORT_LIFE_SECONDS: Final = 2.0
"""A link that ends sooner was not wanted."""


@dataclass(slots=True)
class LinkState:
    """One link, for the operator: where to, whether it is up, and else why not."""

    name: str
    is_up: bool = False
    problem: str = "not tried yet"


class MeshLinks:
    """Keeps one link to each peer and each sibling."""

    def __init__(
        self,
        pump: Pump,
        private_key: NodePrivate,
        mesh_key: MeshKey | None,
        peers: Sequence[MeshPeer],
        siblings: Sequence[Path],
    ) -> None:
        self._pump = pump
        self._private_key = private_key
        self._info = ClientInfo(mesh_key=mesh_key, version=PROTOCOL_VERSION)
        self._peers = [(LinkState(f"{peer.host}:{peer.port}"), peer) for peer in peers]
        self._siblings = [(LinkState(path.stem), path) for path in siblings]

    @property
    def links(self) -> list[LinkState]:
        """Links to other hosts, in the order of the configuration."""
        return [state for state, _ in self._peers]

    async def run(self) -> None:
        """Keep all links up until cancelled."""
        async with trio.open_nursery() as nursery:
            for state, peer in self._peers:
                nursery.start_soon(self._keep_up, state, self._dial_peer(peer), False)
            for state, path in self._siblings:
                nursery.start_soon(self._keep_up, state, self._dial_sibling(path), True)

    def _dial_peer(self, peer: MeshPeer) -> Callable[[], Awaitable[Dialed]]:
        route = (peer.dial_host, socket.AF_UNSPEC)
        target = Target(peer.host, peer.port, CertificateName(peer.host), routes=(route,))
        return lambda: dial(target, self._private_key, info=self._info)

    def _dial_sibling(self, path: Path) -> Callable[[], Awaitable[Dialed]]:
        return lambda: dial_path(str(path), self._private_key, info=self._info)

    async def _keep_up(
        self, state: LinkState, dial_it: Callable[[], Awaitable[Dialed]], is_sibling: bool
    ) -> None:
        while True:
            try:
                dialed = await dial_it()
            except DialError as error:
                if state.problem != str(error):
                    # The parent tells of a worker that does not start, and most of them will.
                    level = logging.DEBUG if is_sibling else logging.WARNING
                    logger.log(level, "mesh link to %s: %s", state.name, error)
                state.problem = str(error)
            else:
                if not is_sibling and dialed.server_key == self._private_key.public():
                    dialed.close()
                    logger.info("mesh peer %s is this relay itself; no link", state.name)
                    state.problem = "it is this relay itself"
                    return
                await self._use(state, dialed, is_sibling)
            await trio.sleep(SIBLING_RETRY_SECONDS if is_sibling else RETRY_SECONDS)

    async def _use(self, state: LinkState, dialed: Dialed, is_sibling: bool) -> None:
        """Hand the connection to the pump and wait for its end."""
        ended = trio.Event()

        def on_close(connection: Connection, reason: str) -> None:
            state.is_up = False
            state.problem = reason
            ended.set()

        sock, tls, received = dialed.detach()
        connection = Connection(
            dialed.server_key,
            sock,
            tls,
            on_close=on_close,
            connected_at=trio.current_time(),
            is_mesh=True,
            is_sibling=is_sibling,
            is_outgoing=True,
        )
        state.is_up = True
        state.problem = ""
        logger.info("mesh link to %s is up", state.name)
        self._pump.adopt(connection, b"", received)
        await ended.wait()
        if trio.current_time() - connection.connected_at < SHORT_LIFE_SECONDS:
            # A server does not say that it has another key; it closes when we ask to watch it.
            state.problem += "; does it have the same mesh key?"
        logger.warning("mesh link to %s is down: %s", state.name, state.problem)
