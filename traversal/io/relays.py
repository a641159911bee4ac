"""All relay connections of a node: the home region's always, others while they are of use.

Path selection specification 10 and DERP specification 15.5. When the home changes, the connection
to the new one is made while the old one stays, and the old one is closed only when it has been idle
for a minute: peers learn of the change late.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterable
from typing import Final

import trio

from traversal.io.relay_client import RelayClient, RelayHandler, RelayOptions, RelayStatistics
from traversal.keys import NodePrivate
from traversal.relay_map import RelayMap

FLUSH_TURNS: Final = 16
"""More than a writer needs to wake up, take its lock, encrypt and send."""
IDLE_SECONDS: Final = 60.0
SWEEP_SECONDS: Final = 15.0


class Relays:
    """The regions' clients. Run `run` in a task before sending."""

    def __init__(
        self,
        relay_map: RelayMap,
        private_key: NodePrivate,
        handler: RelayHandler,
        *,
        options: RelayOptions,
        rng: random.Random,
    ) -> None:
        self.home = 0
        self._map = relay_map
        self._private_key = private_key
        self._handler = handler
        self._options = options
        self._rng = rng
        self._clients: dict[int, tuple[RelayClient, trio.CancelScope]] = {}
        self._is_running = False
        self._to_start: deque[tuple[RelayClient, trio.CancelScope]] = deque()
        self._new = trio.Event()

    def is_known(self, region: int) -> bool:
        """Whether the map has a relay in this region."""
        entry = self._map.regions.get(region)
        return entry is not None and any(node.is_relay for node in entry.nodes)

    def connect(self, region: int) -> None:
        """Connect to a region, because packets for it are to be expected."""
        self._client(region)

    def is_connected(self, region: int) -> bool:
        """Whether a packet to this region would leave at once."""
        entry = self._clients.get(region)
        return entry is not None and entry[0].is_connected

    def problem(self, region: int) -> str:
        """Why this region's relay is not connected though it is wanted; empty if it is, or is not
        wanted."""
        entry = self._clients.get(region)
        if entry is None or entry[0].is_connected:
            return ""
        return entry[0].last_error or "it has not answered yet"

    def backlog(self, region: int) -> int:
        """How many packets wait for a region's connection, 0 while there is none."""
        entry = self._clients.get(region)
        return entry[0].backlog if entry is not None and entry[0].is_connected else 0

    async def flush(self) -> None:
        """Give what was queued just now the turns it needs to leave, where that can be at once."""
        if self._clients:
            for _ in range(FLUSH_TURNS):
                await trio.lowlevel.checkpoint()

    def heard_at(self) -> dict[int, float]:
        """When something came last from each region (monotonic seconds)."""
        return {
            region: client.heard_at
            for region, (client, _) in self._clients.items()
            if client.heard_at is not None
        }

    def statistics(self) -> tuple[RelayStatistics, ...]:
        """A snapshot of each connection that is kept up."""
        return tuple(client.statistics() for client, _ in self._clients.values())

    def send(self, region: int, destination: bytes, payload: bytes) -> bool:
        """Queue a packet for a peer by one region's relay, which is connected to if needed.

        False when the map has no relay there. Raises ValueError for a payload above 64 KiB.
        """
        client = self._client(region)
        if client is None:
            return False
        client.send(destination, payload)
        return True

    def set_home(self, region: int) -> None:
        """Make a region the home: it is connected to and told so; 0 for none."""
        if region == self.home:
            return
        self.home = region
        self._client(region)
        for number, (client, _) in self._clients.items():
            client.set_home(number == region)

    async def wait_for_home(self) -> None:
        """Until the home, if there is one, was connected to for the first time."""
        entry = self._clients.get(self.home)
        if entry is not None:
            await entry[0].wait_connected()

    def handle_network_change(self, own_hosts: frozenset[str]) -> None:
        """The host's addresses are these now (empty: unknown): replace what can't work any more."""
        for client, _ in self._clients.values():
            client.handle_network_change(own_hosts)

    def set_map(self, relay_map: RelayMap) -> None:
        """Use another map; connections to regions that are not the same in it are closed."""
        old, self._map = self._map, relay_map
        changed = [
            region
            for region in self._clients
            if relay_map.regions.get(region) != old.regions.get(region)
        ]
        self._close(changed)
        if self.home in changed:
            self._reopen_home()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Keep the connections up until cancelled."""
        async with trio.open_nursery() as nursery:
            self._is_running = True
            task_status.started()
            while True:
                with trio.move_on_after(SWEEP_SECONDS):
                    await self._new.wait()
                # Started here and not where they are wanted, so that they inherit this task's
                # context and not that of whoever sends a packet.
                self._new = trio.Event()
                while self._to_start:
                    nursery.start_soon(self._run_client, *self._to_start.popleft())
                self._close_idle(trio.current_time())

    def _close_idle(self, now: float) -> None:
        self._close(
            [
                region
                for region, (client, _) in self._clients.items()
                if region != self.home and now - client.used_at >= IDLE_SECONDS
            ]
        )

    def _client(self, region: int) -> RelayClient | None:
        entry = self._clients.get(region)
        if entry is not None:
            return entry[0]
        if not self._is_running or not self.is_known(region):
            return None
        client = RelayClient(
            self._map.regions[region],
            self._private_key,
            self._handler,
            options=self._options,
            rng=self._rng,
        )
        client.set_home(region == self.home)
        scope = trio.CancelScope()
        self._clients[region] = client, scope
        self._to_start.append((client, scope))
        self._new.set()
        return client

    async def _run_client(self, client: RelayClient, scope: trio.CancelScope) -> None:
        with scope:
            await client.run()

    def _close(self, regions: Iterable[int]) -> None:
        for region in list(regions):
            _, scope = self._clients.pop(region)
            scope.cancel()

    def _reopen_home(self) -> None:
        home, self.home = self.home, 0
        if self.is_known(home):
            self.set_home(home)
