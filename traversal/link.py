"""A link: datagrams to and from one peer, by whatever path is best at the moment."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Final, Self
from weakref import WeakSet

import trio

from traversal.io.inbox import Inbox
from traversal.io.relays import Relays
from traversal.keys import DiscoPublic, NodePublic
from traversal.paths.effects import PathChanged, PathState, PingAnswered, Route
from traversal.paths.report import NatFacts
from traversal.paths.statistics import PeerStatistics
from traversal.paths.verdict import Verdict, judge
from traversal.session import Session
from traversal.wire.address import Address
from traversal.wire.classify import WIREGUARD, is_plain_data
from traversal.wire.derp import MAX_PACKET_LENGTH

MAX_DATAGRAM_BYTES: Final = 65507
"""What UDP over IPv4 can carry. Path MTU is another matter: see `LinkPath.mtu_bytes`."""
SENDS_PER_CHECKPOINT: Final = 16
"""Half a relay queue: its writer gets a turn before the queue overflows."""
MAX_EXTRA_CHECKPOINTS: Final = 8
MAX_WAITING_CHANGES: Final = 64


class LinkError(Exception):
    """A datagram can't be sent; the text says why and what to do."""


class LinkClosedError(LinkError):
    """The link was closed."""


class PathKind(Enum):
    """How datagrams reach the peer."""

    DIRECT = "direct"
    RELAY = "relay"
    EDGE = "edge"
    PEER_RELAY = "peer-relay"


@dataclass(frozen=True, slots=True)
class LinkPath:
    """The path that datagrams take now.

    Attributes:
        address: of the peer, or of the peer relay; None by a relay or by the edge.
        region: whose relay carries datagrams when none other does; 0 when none is known.
        latency_seconds: round trip; None when it was not measured. By the relay it is measured
            every 5 s, when there has been no better path for 5 s.
        loss_ratio: of the last heartbeats, 0 to 1.
        mtu_bytes: the largest datagram proven to pass; None when that was not searched.
    """

    kind: PathKind
    address: Address | None
    region: int
    latency_seconds: float | None
    loss_ratio: float
    mtu_bytes: int | None


@dataclass(frozen=True, slots=True)
class PathChange:
    """At the monotonic time `at` the path changed; `reason` is a short sentence."""

    at: float
    old: LinkPath
    new: LinkPath
    reason: str


@dataclass(frozen=True, slots=True)
class PingAnswer:
    """An answer to `Link.ping`; `address` is None for the one that came by relay."""

    address: Address | None
    latency_seconds: float
    seen_as: Address


@dataclass(frozen=True, slots=True)
class LinkStatistics:
    """Counters since the link was made."""

    sent: int
    received: int
    dropped_for_slow_reader: int
    peer: PeerStatistics


class Link:
    """Made by `Node.connect` and `Node.accept`. Closing it forgets the peer.

    Datagrams are not encrypted, ordered, or repeated here: that is for what runs on top (WireGuard,
    for example). While a path is in doubt they are sent both ways, so the peer may get one twice.
    """

    def __init__(
        self,
        session: Session,
        relays: Relays,
        own_nat: Callable[[], NatFacts],
        forget: Callable[[Link], None],
    ) -> None:
        self._session = session
        self._machine = session.machine
        self._outlet = session.outlet
        self._relays = relays
        self._own_nat = own_nat
        self._forget = forget
        self._is_closed = False
        self._inbox = Inbox(self._check_open)
        self._sent = 0
        self._last_path = self.path
        # Weak, so that a reader that stopped reading costs nothing.
        self._watchers: WeakSet[PathChanges] = WeakSet()
        self._pingers: dict[trio.CancelScope, trio.MemorySendChannel[PingAnswer]] = {}
        session.receive_data = self._inbox.put
        session.note_change = self._note_change
        session.note_ping = self._note_ping

    def __repr__(self) -> str:
        return f"<Link to {self.peer_key.short()}, {self.path.kind.value}>"

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()

    @property
    def peer_key(self) -> NodePublic:
        """Who is at the other end."""
        return self._session.key

    @property
    def path(self) -> LinkPath:
        """The path in use at the moment."""
        machine = self._machine
        route = machine.route
        kind = _kind(route)
        has_address = kind in (PathKind.DIRECT, PathKind.PEER_RELAY)
        best = None if kind is PathKind.RELAY else machine.statistics().best
        mtu_bytes = machine.max_payload_bytes
        latency_seconds = best.latency_seconds or None if best is not None else None
        if kind is PathKind.RELAY:
            mtu_bytes, latency_seconds = MAX_PACKET_LENGTH, machine.relay_latency_seconds
        elif kind is PathKind.EDGE:
            mtu_bytes = self._outlet.edge_payload_bytes
        return LinkPath(
            kind=kind,
            address=route.path.address if has_address and route.path is not None else None,
            region=self._outlet.relay_region,
            latency_seconds=latency_seconds,
            loss_ratio=best.loss_ratio if best is not None else 0.0,
            mtu_bytes=mtu_bytes,
        )

    @property
    def state(self) -> PathState:
        """The state of path selection, with more nuances than `path.kind`."""
        return self._machine.state

    def statistics(self) -> LinkStatistics:
        """A snapshot."""
        inbox = self._inbox
        return LinkStatistics(self._sent, inbox.received, inbox.dropped, self._machine.statistics())

    def verdict(self, peer_name: str = "") -> Verdict:
        """Why this path: what is known, what was tried, what would help.

        Sentences call the peer `peer_name`, by default a short form of its key.
        """
        session, region = self._session, self._outlet.relay_region
        return judge(
            peer_name or session.key.short(),
            self._machine.statistics(),
            self._own_nat(),
            session.nat,
            f"of region {region}" if region else "(none known)",
            trio.current_time(),
            session.search.facts if session.search is not None else None,
            session.contact,
            self._relays.problem(region),
            session.peer_relay_attempts,
        )

    def path_changes(self) -> PathChanges:
        """`async for change in link.path_changes()`: changes from now on, until the link closes.

        A reader that falls 64 behind misses the oldest, which `PathChanges.missed` counts.
        """
        watcher = PathChanges(self._watchers)
        if self._is_closed:
            watcher.end()
        return watcher

    # ---- sending

    async def send(self, datagram: bytes) -> None:
        """Send one datagram; that it arrives is not promised. A checkpoint.

        Raises LinkClosedError, and LinkError for a datagram that can't be sent at all.
        """
        self.send_nowait(datagram)
        await trio.lowlevel.checkpoint_if_cancelled()
        if self._sent % SENDS_PER_CHECKPOINT == 0:
            await self._let_others_run()

    async def send_many(self, datagrams: Sequence[bytes]) -> None:
        """Send several; on a direct path, runs of one size leave in one system call.

        Raises as `send`; then none was sent.
        """
        if self._takes_runs(self._machine.route):
            self.send_many_nowait(datagrams)
            await trio.lowlevel.checkpoint()
            return
        self._check_all(datagrams)
        for datagram in datagrams:
            await self.send(datagram)

    def send_many_nowait(self, datagrams: Sequence[bytes]) -> None:
        """`send_many` without a checkpoint, for those who make their own."""
        self._check_all(datagrams)
        route = self._machine.route
        if not self._takes_runs(route):
            for datagram in datagrams:
                self.send_nowait(datagram)
        elif datagrams and route.path is not None:
            self._machine.sent += len(datagrams)
            self._sent += len(datagrams)
            if route.path.vni:
                fault = self._outlet.send_data(datagrams, route.path)
            else:
                fault = self._outlet.udp.send_many(datagrams, route.path.address)
            self._follow_up(route, fault)

    @staticmethod
    def _takes_runs(route: Route) -> bool:
        """Whether datagrams leave by UDP and by nothing else."""
        return route.path is not None and not route.relay and not route.path.is_edge

    async def _let_others_run(self) -> None:
        await trio.lowlevel.checkpoint()
        if self._machine.route.relay:
            # The relay's writer needs a few turns for what it queued; more than these means that
            # the network is slower than we are, and then datagrams are dropped, not held up.
            for _ in range(MAX_EXTRA_CHECKPOINTS):
                if self._relays.backlog(self._outlet.relay_region) < SENDS_PER_CHECKPOINT:
                    return
                await trio.lowlevel.checkpoint()

    def send_nowait(self, datagram: bytes) -> None:
        """`send` without a checkpoint, for those who make their own."""
        self._check(datagram)
        route = self._machine.route
        self._machine.sent += 1
        self._sent += 1
        fault = 0
        if route.path is not None:
            address, vni = route.path
            if vni:
                fault = self._outlet.send_data((datagram,), route.path)
            else:
                fault = self._outlet.udp.send(datagram, address)
        if route.relay:
            self._outlet.send_by_relay(datagram)
        if fault or route.wake:
            self._follow_up(route, fault)

    def _check_all(self, datagrams: Sequence[bytes]) -> None:
        for datagram in datagrams:
            if datagram[1:4] != WIREGUARD or len(datagram) > MAX_DATAGRAM_BYTES or self._is_closed:
                self._check(datagram)

    def _check(self, datagram: bytes) -> None:
        if self._is_closed:
            raise LinkClosedError(f"the link to {self.peer_key.short()} is closed")
        if len(datagram) > MAX_DATAGRAM_BYTES:
            raise LinkError(
                f"a datagram has at most {MAX_DATAGRAM_BYTES} bytes, not {len(datagram)}"
            )
        if datagram[1:4] != WIREGUARD and not is_plain_data(datagram):
            raise LinkError(
                "a datagram that begins like STUN, disco, Geneve or an introduction would be "
                "taken for one by the peer; put a header of your own in front"
            )

    def _follow_up(self, route: Route, fault: int) -> None:
        now = trio.current_time()
        if fault and route.path is not None:
            self._outlet.handle_send_fault(fault, route.path, now)
        if route.wake:
            self._session.wake(now)

    # ---- receiving

    async def receive(self) -> bytes:
        """The next datagram. A checkpoint. Raises LinkClosedError.

        Cancelling loses nothing.
        """
        return await self._inbox.receive()

    async def receive_many(self) -> list[bytes]:
        """Everything that waits, at least one datagram. Otherwise like `receive`."""
        return await self._inbox.receive_many()

    def _check_open(self) -> None:
        if self._is_closed:
            raise LinkClosedError(f"the link to {self.peer_key.short()} is closed")

    # ---- watching and pinging

    async def ping(self, timeout_seconds: float = 5.0) -> PingAnswer | None:
        """Ping the peer by its relay and every address at once; the first answer, or None.

        Counts as traffic: it starts the search for a direct path. Raises LinkClosedError, also when
        the link is closed meanwhile.
        """
        self._check_open()
        sender, receiver = trio.open_memory_channel[PingAnswer](1)
        with trio.move_on_after(timeout_seconds) as scope:
            self._pingers[scope] = sender
            try:
                await self._session.wait_for_keys()
                self._session.ping(trio.current_time())
                return await receiver.receive()
            finally:
                del self._pingers[scope]
        self._check_open()
        return None

    def _note_ping(self, effect: PingAnswered) -> None:
        address = effect.path.address if effect.path is not None else None
        answer = PingAnswer(address, effect.latency_seconds, effect.seen_as)
        for pinger in self._pingers.values():
            try:
                pinger.send_nowait(answer)
            except trio.WouldBlock:
                pass

    def _note_change(self, effect: PathChanged) -> None:
        old, self._last_path = self._last_path, self.path
        if (old.kind, old.address) == (self._last_path.kind, self._last_path.address):
            return
        change = PathChange(effect.at, old, self._last_path, effect.reason)
        for watcher in list(self._watchers):
            watcher.push(change)

    def update(
        self,
        *,
        relay: int = 0,
        disco_key: DiscoPublic | None = None,
        candidates: Iterable[Address] | None = None,
    ) -> None:
        """What a control plane newly says of the peer; what is left out stays as it was.

        A new disco key is that of a peer that started anew: its paths are found again, and until
        then datagrams go by the relay.

        Args:
            relay: the peer's home region.
            candidates: all addresses that the control plane knows now.

        Raises LinkClosedError, LinkError for a region that the relay map lacks, and KeyFormatError
        for a key that no honest peer has; then nothing is changed.
        """
        self._check_open()
        if relay and not self._relays.is_known(relay):
            raise LinkError(f"region {relay} has no relay in our relay map: give us a newer map")
        now = trio.current_time()
        if disco_key is not None:
            self._session.set_disco_key(disco_key, now)
        if relay:
            self._session.set_home_region(relay, now)
        if candidates is not None:
            self._session.set_candidates(tuple(candidates), now)

    def close(self) -> None:
        """Forget the peer; harmless when repeated.

        Who waits in `receive` or `ping` gets LinkClosedError, `path_changes` ends. What had come
        and was not read yet can still be received. `Node.connect` makes a new link to the peer.
        """
        if self._is_closed:
            return
        self._is_closed = True
        self._session.close()
        self._forget(self)
        for watcher in list(self._watchers):
            watcher.end()
        for scope in self._pingers:
            scope.cancel()
        self._inbox.wake_all()


class PathChanges:
    """An asynchronous iterator of `PathChange`; see `Link.path_changes`. Tasks may share one.

    Attributes:
        missed: changes that were dropped because 64 newer ones waited to be read.
    """

    def __init__(self, registry: WeakSet[PathChanges]) -> None:
        self.missed = 0
        self._changes: deque[PathChange] = deque()
        self._is_ended = False
        self._readers = trio.lowlevel.ParkingLot()
        registry.add(self)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> PathChange:
        await trio.lowlevel.checkpoint()
        while not self._changes:
            if self._is_ended:
                raise StopAsyncIteration
            await self._readers.park()
        return self._changes.popleft()

    def push(self, change: PathChange) -> None:
        """The link's side."""
        if len(self._changes) == MAX_WAITING_CHANGES:
            self._changes.popleft()
            self.missed += 1
        self._changes.append(change)
        self._readers.unpark()

    def end(self) -> None:
        """No more changes will come."""
        self._is_ended = True
        self._readers.unpark_all()


def _kind(route: Route) -> PathKind:
    path = route.path
    if path is None or route.relay:
        return PathKind.RELAY
    if path.is_edge:
        return PathKind.EDGE
    return PathKind.PEER_RELAY if path.vni else PathKind.DIRECT
