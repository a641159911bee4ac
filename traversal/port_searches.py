"""What the port searches of a node share: sockets, pace, memory, and what is known of our NAT."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import trio

from traversal.endpoints import Endpoints
from traversal.io.deadlines import Deadlines
from traversal.io.mapping_lifetime import measure_lifetime
from traversal.io.punch_sockets import PunchSockets
from traversal.io.udp import Batch, UdpSockets
from traversal.keys import Entropy, NodePublic
from traversal.paths.punch_memory import PunchMemory
from traversal.paths.punch_outbox import Pace
from traversal.paths.punch_strategy import OwnSide, PunchPolicy

if TYPE_CHECKING:
    from traversal.port_search import PortSearch


class PortSearches:
    """See the module's text. `session` is our own, in introductions; `handle_batch` gets what comes
    on a socket that a search found."""

    def __init__(
        self,
        session: bytes,
        public_key: NodePublic,
        policy: PunchPolicy,
        memory: PunchMemory,
        *,
        udp: UdpSockets,
        deadlines: Deadlines,
        endpoints: Endpoints,
        entropy: Entropy,
        handle_batch: Callable[[Batch], None],
    ) -> None:
        self.session = session
        self.public_key = public_key
        self.policy = policy
        self.memory = memory
        self.udp = udp
        self.deadlines = deadlines
        self.endpoints = endpoints
        self.entropy = entropy
        self.handle_batch = handle_batch
        self.pace = Pace()
        self.sockets = PunchSockets(udp)
        self.open: set[PortSearch] = set()
        self._lifetime_wanted = trio.Event()

    def own_side(self) -> OwnSide:
        """What we know of ourselves."""
        own = self.endpoints.own_side()
        return replace(own, lifetime_seconds=self.memory.lifetime(own.fingerprint))

    def handle_refresh(self, now: float) -> None:
        """Something of it may have changed."""
        if self.open:
            own = self.own_side()
            for search in list(self.open):
                search.set_own_side(own, now)

    def want_lifetime(self) -> None:
        """A found socket must be kept alive: measure how long this network's NAT remembers, unless
        that is known."""
        self._lifetime_wanted.set()

    async def run(self) -> None:
        """Serve the searches until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.sockets.run)
            while True:
                await self._lifetime_wanted.wait()
                await self._measure_lifetime()
                self._lifetime_wanted = trio.Event()

    async def _measure_lifetime(self) -> None:
        own, server = self.own_side(), self.endpoints.stun_server()
        if own.lifetime_seconds is not None or server is None:
            return
        host = self.udp.bound_host(4) or "0.0.0.0"
        seconds = await measure_lifetime(server, host, self.entropy)
        if seconds is not None and self.own_side().fingerprint == own.fingerprint:
            self.memory.note_lifetime(own.fingerprint, seconds)
            self.handle_refresh(trio.current_time())
