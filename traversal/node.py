"""A node: the task tree that joins the decisions in `traversal.paths` to sockets and relays.

`open_node` starts it, `Node.connect` and `Node.accept` give links. One task receives by UDP per
family, one serves the timers of all peers, one runs net checks, one watches interfaces, and each
relay connection has its own two; peers have none.
"""

from __future__ import annotations

import os
import random
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import trio

from traversal.endpoints import Endpoints
from traversal.io.deadlines import Deadlines
from traversal.io.ice import IceRouter, IceSession
from traversal.io.interfaces import InterfaceFilter
from traversal.io.marking import marked, new_socket
from traversal.io.peer_relay_server import PeerRelayOptions, PeerRelayService
from traversal.io.relay_client import RelayOptions, RelayStatistics
from traversal.io.relays import Relays
from traversal.io.udp import UdpSockets, UdpStatistics
from traversal.keys import (
    Box,
    DiscoPrivate,
    DiscoPublic,
    Entropy,
    NodePrivate,
    NodePublic,
)
from traversal.link import Link
from traversal.paths.edge import EdgePolicy
from traversal.paths.home import HomePolicy
from traversal.paths.ice_candidates import make_candidates
from traversal.paths.introduction import Introducer, new_session
from traversal.paths.own_addresses import OwnAddress
from traversal.paths.peer import Peer
from traversal.paths.peer_relay_server import PeerRelayStatistics
from traversal.paths.punch_memory import PunchMemory
from traversal.paths.punch_strategy import PunchPolicy
from traversal.paths.report import NatFacts, Report
from traversal.peer_relays import PeerRelays
from traversal.port_searches import PortSearches
from traversal.reception import Reception
from traversal.relay_map import Family, RelayMap
from traversal.session import Session
from traversal.strangers import Admit, HandleStranger, Strangers
from traversal.wire.address import Address
from traversal.wire.introduction import (
    Capability,
    Introduction,
)
from traversal.wiring import Wiring

if TYPE_CHECKING:
    from traversal.io.edge_client import EdgeClient, EdgeOptions, EdgeStatistics

CHECK_PATIENCE_SECONDS: Final = 5.0
"""How long opening a node waits for the first net check. It takes longer only where relays answer
neither by UDP nor by HTTPS, and then there is nothing to wait for."""
HOME_PATIENCE_SECONDS: Final = 2.0
"""How long opening a node waits for its home relay, so that peers can reach it at once."""
ANNOUNCE_AT_ONCE: Final = 16
ANNOUNCE_PAUSE_SECONDS: Final = 0.05
"""A relay queue holds 32 packets: announcements to a thousand peers must not overrun it."""


class NodeError(Exception):
    """A node can't do what was asked; the text says what to do."""


@dataclass(frozen=True, slots=True)
class NodeStatistics:
    """A snapshot for status pages and metrics."""

    peers: int
    home_region: int
    udp: UdpStatistics
    relays: tuple[RelayStatistics, ...]
    unknown_datagrams: int
    rejected_disco: int
    rejected_introductions: int
    edge: EdgeStatistics | None
    """Of the connection to the edge, if there is one."""
    peer_relay: PeerRelayStatistics | None
    """Of the peer relay that this node is for others, if it is one."""
    rejected_punch_messages: int


@asynccontextmanager
async def open_node(
    private_key: NodePrivate,
    relay_map: RelayMap,
    *,
    port: int = 0,
    hosts: dict[Family, str] | None = None,
    disco_key: DiscoPrivate | None = None,
    admit: Admit | None = None,
    handle_stranger: HandleStranger | None = None,
    static_addresses: Iterable[Address] = (),
    interfaces: InterfaceFilter | None = None,
    socket_mark: int = 0,
    home: HomePolicy | None = None,
    relay_options: RelayOptions | None = None,
    map_ports: bool = True,
    peer_relay: PeerRelayOptions | None = None,
    port_search: PunchPolicy | None = None,
    punch_memory: PunchMemory | None = None,
    edge: EdgeOptions | None = None,
    edge_policy: EdgePolicy = EdgePolicy.LAST,
    entropy: Entropy = os.urandom,
    rng: random.Random | None = None,
) -> AsyncIterator[Node]:
    """Open a node for the length of the block; leaving it closes every socket and link.

    On entry the first net check is over (0.1 to 4 s), a home relay is chosen and, unless that takes
    more than 2 s, connected. Where no relay answers it takes 5 s: then `home_region` is 0, the
    check goes on, and so does everything else as soon as the network comes.

    Args:
        port: local UDP port for both families; 0 lets the kernel choose.
        hosts: local address to bind by family, for example `{4: "127.0.0.1"}`; by default all.
        disco_key: by default a fresh one, which is best: peers can't be tracked by it.
        admit: which peers may open links to us; by default none but those that we connect to.
        handle_stranger: gets relay packets from nodes that are no peers, for a control plane that
            speaks over the relay. Must neither await nor raise.
        static_addresses: advertised besides what is found, for forwarded ports.
        interfaces: which interfaces and ranges to use.
        socket_mark: for all sockets of the node (SO_MARK, 32 bits), so that a routing rule can keep
            them out of a tunnel that everything else goes through; 0 for none. Needs the right
            CAP_NET_ADMIN, or CAP_NET_RAW from Linux 5.17 on.
        home: pinned and banned home regions.
        map_ports: whether to ask the router for a port mapping.
        peer_relay: serve as a UDP peer relay for our peers; by default not.
        port_search: whether and how hard the ports of hard NATs are guessed; see
            `docs/port-search.md`.
        punch_memory: what port searches learned in an earlier life.
        edge: an edge by which peers that know it, too, are reached where nothing else works.
        edge_policy: when traffic goes by the edge.
        entropy: random bytes, `os.urandom` or a seeded source for tests.
        rng: spreads periodic work; by default seeded from `entropy`.

    Raises UdpError when no UDP socket can be opened, NodeError without the right to set
    `socket_mark`. What the block raises comes out as it is.
    """
    rng = rng or random.Random(entropy(8))
    node = Node(
        private_key,
        relay_map,
        hosts=hosts,
        disco_key=disco_key or DiscoPrivate.generate(entropy),
        admit=admit,
        handle_stranger=handle_stranger,
        static_addresses=tuple(static_addresses),
        interfaces=interfaces or InterfaceFilter(),
        socket_mark=socket_mark,
        home=home or HomePolicy(),
        relay_options=relay_options or RelayOptions(),
        map_ports=map_ports,
        peer_relay=peer_relay,
        port_search=port_search or PunchPolicy(),
        punch_memory=punch_memory or PunchMemory(),
        edge=edge,
        edge_policy=edge_policy,
        entropy=entropy,
        rng=rng,
    )
    try:
        async with trio.open_nursery() as nursery:
            # Tasks that are started inside inherit the mark.
            with marked(socket_mark):
                _check_right_to_mark()
                await nursery.start(node._run, port)
            try:
                yield node
                # A program that says its last word and ends wants it to arrive.
                await node._relays.flush()
            finally:
                node._close()
                nursery.cancel_scope.cancel()
    except BaseExceptionGroup as group:
        # That there is a nursery is our own affair: callers want to catch what was raised.
        if len(group.exceptions) > 1:
            raise
        raise group.exceptions[0] from group.exceptions[0].__cause__


def _check_right_to_mark() -> None:
    try:
        new_socket().close()
    except PermissionError:
        raise NodeError(
            "a socket mark needs the right CAP_NET_ADMIN, or CAP_NET_RAW from Linux 5.17 on: run "
            "as root, or give the right in the service's unit (AmbientCapabilities)"
        ) from None


class Node:
    """See `open_node`, which makes it."""

    def __init__(
        self,
        private_key: NodePrivate,
        relay_map: RelayMap,
        *,
        hosts: dict[Family, str] | None,
        disco_key: DiscoPrivate,
        admit: Admit | None,
        handle_stranger: HandleStranger | None,
        static_addresses: tuple[Address, ...],
        interfaces: InterfaceFilter,
        socket_mark: int,
        home: HomePolicy,
        relay_options: RelayOptions,
        map_ports: bool,
        peer_relay: PeerRelayOptions | None,
        port_search: PunchPolicy,
        punch_memory: PunchMemory,
        edge: EdgeOptions | None,
        edge_policy: EdgePolicy,
        entropy: Entropy,
        rng: random.Random,
    ) -> None:
        self.public_key = private_key.public()
        self.disco_key = disco_key.public()
        self._entropy = entropy
        self._introduction_session = new_session(entropy)
        self._capabilities = Capability.PEER_RELAY
        if port_search.is_enabled:
            self._capabilities |= Capability.PORT_SEARCH
        self._sessions: dict[bytes, Session] = {}
        self._links: dict[bytes, Link] = {}
        self._strangers = Strangers(
            private_key,
            admit,
            handle_stranger,
            lambda key: self._add_peer(key, 0, is_introduced=True),
        )
        self._reception = reception = Reception(self._sessions, self._strangers)
        self._udp = UdpSockets(hosts)
        self._relays = Relays(relay_map, private_key, reception, options=relay_options, rng=rng)
        self._deadlines = Deadlines()
        self._ice = IceRouter(self._udp, self._deadlines, entropy)
        self._endpoints = Endpoints(
            relay_map,
            self._udp,
            self._relays,
            is_busy=lambda: any(s.machine.is_active for s in self._sessions.values()),
            handle_refresh=self._handle_refresh,
            handle_rebind=self._handle_rebind,
            handle_own_hosts=self._handle_own_hosts,
            interfaces=interfaces,
            static_addresses=static_addresses,
            home=home,
            relay_options=relay_options,
            map_ports=map_ports,
            entropy=entropy,
            rng=rng,
        )
        self._port_searches = PortSearches(
            self._introduction_session,
            self.public_key,
            port_search,
            punch_memory,
            udp=self._udp,
            deadlines=self._deadlines,
            endpoints=self._endpoints,
            entropy=entropy,
            handle_batch=reception.handle_batch,
        )
        self._wiring = Wiring(
            private_key=private_key,
            public_key=self.public_key,
            disco_private=disco_key,
            disco_public=self.disco_key,
            entropy=entropy,
            udp=self._udp,
            relays=self._relays,
            deadlines=self._deadlines,
            refresh=self._endpoints.refresh,
            want_rebind=self._endpoints.want_rebind,
            note_seen_as=self._endpoints.handle_seen_as,
            port_searches=self._port_searches,
        )
        reception.connect(self._wiring, self._endpoints, self._ice)
        self._edge_policy = edge_policy
        self._edge: EdgeClient | None = None
        if edge is not None:
            # Imported late: QUIC and HTTP/2 are slow to import, and few nodes need them.
            from traversal.io.edge_client import EdgeClient

            self._edge = EdgeClient(edge, private_key, reception, entropy=entropy, rng=rng)
            self._wiring.edge = self._edge
        self._relay_service: PeerRelayService | None = None
        if peer_relay is not None:
            self._relay_service = PeerRelayService(
                peer_relay,
                relay_map,
                hosts=hosts,
                find_local_hosts=self._endpoints.local_hosts,
                relay_options=relay_options,
                entropy=entropy,
                rng=rng,
            )
        self._peer_relays = PeerRelays(self._wiring, self._sessions.get, self._relay_service)
        self._wiring.peer_relays = self._peer_relays
        self._announce_wanted = trio.Event()
        self._socket_mark = socket_mark
        self._is_closed = False
        self._waiting: set[trio.CancelScope] = set()

    # ---- look

    @property
    def home_region(self) -> int:
        """The region whose relay reaches us always; 0 while none is chosen."""
        return self._relays.home

    @property
    def report(self) -> Report:
        """The last net check."""
        return self._endpoints.report

    @property
    def nat(self) -> NatFacts:
        """What is known about the NAT in front of us."""
        return self._endpoints.nat

    @property
    def own_addresses(self) -> tuple[OwnAddress, ...]:
        """What we tell peers, best first."""
        return self._endpoints.own_addresses

    @property
    def links(self) -> tuple[Link, ...]:
        """All links that are open."""
        return tuple(self._links.values())

    def statistics(self) -> NodeStatistics:
        """A snapshot."""
        reception = self._reception
        rejected = reception.rejected_introductions + self._strangers.rejected_introductions
        return NodeStatistics(
            peers=len(self._sessions),
            home_region=self.home_region,
            udp=self._udp.statistics(),
            relays=self._relays.statistics(),
            unknown_datagrams=reception.unknown_datagrams,
            rejected_disco=reception.rejected_disco,
            rejected_introductions=rejected,
            edge=self._edge.statistics() if self._edge else None,
            peer_relay=self._relay_service.statistics() if self._relay_service else None,
            rejected_punch_messages=reception.rejected_punch_messages,
        )

    # ---- commands

    async def connect(
        self,
        peer_key: NodePublic,
        *,
        relay: int = 0,
        disco_key: DiscoPublic | None = None,
        candidates: Iterable[Address] = (),
        can_use_peer_relays: bool = False,
        port_search: PunchPolicy | None = None,
    ) -> Link:
        """A link to a peer. Returns at once: the first datagrams go by relay.

        Args:
            relay: the peer's home region.
            disco_key: from a control plane; without it we introduce ourselves over the relay.
            candidates: addresses that a control plane knows.
            can_use_peer_relays: a control plane says so (capability version 121 and later); what
                is not said by one is learned from the peer's introduction.
            port_search: as for `open_node`, for this peer.

        A link that exists already, because the peer opened it, is updated and returned. Raises
        NodeError for our own key, for a region that the relay map lacks and when the node is
        closed, KeyFormatError for a key that no honest peer has.
        """
        await trio.lowlevel.checkpoint()
        self._check_open()
        if peer_key == self.public_key:
            raise NodeError("this is our own key: a node can't connect to itself")
        if relay and not self._relays.is_known(relay):
            raise NodeError(
                f"region {relay} has no relay in our relay map: give the peer's home region, and "
                "use the map that the peer uses"
            )
        existing = self._links.get(peer_key.raw)
        if existing is not None:
            existing.update(relay=relay, disco_key=disco_key, candidates=tuple(candidates) or None)
            return existing
        Box(self._wiring.private_key, peer_key)
        now = trio.current_time()
        session, link = self._add_peer(
            peer_key, relay, is_introduced=disco_key is None, port_search=port_search
        )
        session.set_candidates(tuple(candidates), now)
        session.can_use_peer_relays = can_use_peer_relays
        self._peer_relays.update(session)
        if disco_key is not None:
            session.set_disco_key(disco_key, now)
        session.start(now)
        return link

    async def accept(self) -> Link:
        """The next link that an admitted peer opened towards us. Raises NodeError when the node is
        closed; cancelling loses no link."""
        with self._while_open():
            return await self._strangers.accept()
        raise self._closed_error()

    def set_peer_relays(self, keys: Iterable[NodePublic]) -> None:
        """Say which peers serve as UDP peer relays: they may carry traffic between us and others.

        Replaces the last list. A relay is asked once its disco key is known, so connect to it. Like
        any relay it sees who talks to whom, and what is not encrypted by what runs on top.
        """
        self._peer_relays.set_keys(keys)
        for session in self._sessions.values():
            self._peer_relays.update(session)

    def set_relay_map(self, relay_map: RelayMap) -> None:
        """Use another relay map, as a control plane sends one when its relays change.

        Connections to regions that are the same in it go on, others are closed. A full net check
        begins at once and chooses the home anew; until it is over there is none where the home's
        region is gone. Links stay; one whose peer's region is gone has no relay to fall back to
        until the peer introduces itself by another one, or `Link.update` names it.
        """
        self._relays.set_map(relay_map)
        self._endpoints.set_map(relay_map)
        if self._relay_service is not None:
            self._relay_service.set_map(relay_map)

    def open_ice(self, *, is_controlling: bool) -> IceSession:
        """A session with a peer that speaks ICE, as WebRTC does, over our sockets.

        Use it in `async with`. The side that makes the first offer is usually controlling; if both
        claim it, they settle it. A peer that is linked by `connect` can't be an ICE peer from the
        same address at the same time. Raises NodeError when the node is closed.
        """
        self._check_open()
        candidates = make_candidates(self.own_addresses, self._endpoints.local_addresses())
        return self._ice.open(
            candidates, self._endpoints.local_networks, is_controlling=is_controlling
        )

    async def refresh(self) -> Report:
        """Run a full net check now and wait for it. Raises NodeError when the node is closed."""
        with self._while_open():
            return await self._endpoints.refresh_now()
        raise self._closed_error()

    async def rebind(self) -> None:
        """Replace our sockets, as after a change of network. Raises NodeError when the node is
        closed."""
        await trio.lowlevel.checkpoint()
        self._check_open()
        # Without a shield, cancelling could leave the node between two pairs of sockets.
        with trio.CancelScope(shield=True), marked(self._socket_mark):
            await self._endpoints.rebind()
        if self._is_closed:
            self._udp.close()
            raise self._closed_error()

    # ---- the task tree

    async def _run(
        self, port: int, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        await self._udp.open(port)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._udp.receive, self._reception.handle_batch)
                nursery.start_soon(self._deadlines.run)
                nursery.start_soon(self._announce_forever)
                nursery.start_soon(self._port_searches.run)
                await nursery.start(self._relays.run)
                if self._edge is not None:
                    nursery.start_soon(self._edge.run)
                await nursery.start(self._endpoints.run)
                if self._relay_service is not None:
                    await nursery.start(self._relay_service.run)
                with trio.move_on_after(CHECK_PATIENCE_SECONDS):
                    await self._endpoints.wait_checked()
                with trio.move_on_after(HOME_PATIENCE_SECONDS):
                    await self._relays.wait_for_home()
                task_status.started()
        finally:
            self._udp.close()

    def _close(self) -> None:
        self._is_closed = True
        for scope in self._waiting:
            scope.cancel()
        self._strangers.close()
        for link in self.links:
            link.close()
        self._ice.close()

    @contextmanager
    def _while_open(self) -> Iterator[None]:
        """Ends the block when the node is closed."""
        self._check_open()
        with trio.CancelScope() as scope:
            self._waiting.add(scope)
            try:
                yield
            finally:
                self._waiting.discard(scope)

    def _check_open(self) -> None:
        if self._is_closed:
            raise self._closed_error()

    def _closed_error(self) -> NodeError:
        return NodeError("the node is closed: use it inside the block of open_node")

    async def _announce_forever(self) -> None:
        while True:
            await self._announce_wanted.wait()
            self._announce_wanted = trio.Event()
            # Peers that hear of a new home go there at once, so we should be there.
            with trio.move_on_after(HOME_PATIENCE_SECONDS):
                await self._relays.wait_for_home()
            for number, session in enumerate(list(self._sessions.values()), 1):
                session.announce(trio.current_time())
                if number % ANNOUNCE_AT_ONCE == 0:
                    await trio.sleep(ANNOUNCE_PAUSE_SECONDS)

    # ---- peers

    def _add_peer(
        self,
        key: NodePublic,
        region: int,
        *,
        is_introduced: bool,
        port_search: PunchPolicy | None = None,
    ) -> tuple[Session, Link]:
        machine = Peer(
            self._entropy,
            self._endpoints.local_networks,
            ceiling_bytes=self._endpoints.mtu_ceiling_bytes,
            edge_policy=self._edge_policy,
        )
        introducer = None
        if is_introduced:
            introducer = Introducer(self._introduction_session, self._describe)
        policy = port_search or self._port_searches.policy
        session = Session(self._wiring, key, region, machine, introducer, policy)
        link = Link(session, self._relays, lambda: self.nat, self._forget)
        self._sessions[key.raw] = session
        self._links[key.raw] = link
        now = trio.current_time()
        session.set_own_addresses(self._own_bare_addresses(), now)
        edge = self._wiring.edge
        machine.set_edge_available(edge is not None and edge.is_connected, now)
        return session, link

    def _forget(self, link: Link) -> None:
        self._sessions.pop(link.peer_key.raw, None)
        self._links.pop(link.peer_key.raw, None)

    def _describe(self) -> Introduction:
        nat = self.nat
        return Introduction(
            session=self._introduction_session,
            echoed_session=None,
            serial=0,
            disco_key=self.disco_key,
            home_region=self.home_region,
            addresses=self.own_addresses,
            mapping=nat.mapping,
            filtering=nat.filtering,
            capabilities=self._capabilities,
        )

    def _own_bare_addresses(self) -> tuple[Address, ...]:
        return tuple(address for _, address in self.own_addresses)

    # ---- from the network check

    def _handle_refresh(self, *, has_home_changed: bool) -> None:
        now = trio.current_time()
        addresses = self._own_bare_addresses()
        local = self._endpoints.local_networks
        for session in list(self._sessions.values()):
            session.machine.set_local_networks(local)
            session.set_own_addresses(addresses, now)
        self._port_searches.handle_refresh(now)
        self._ice.set_local_networks(local)
        if has_home_changed:
            self._announce_wanted.set()

    def _handle_own_hosts(self, own_hosts: frozenset[str]) -> None:
        self._relays.handle_network_change(own_hosts)
        if self._edge is not None:
            self._edge.handle_network_change(own_hosts)

    def _handle_rebind(self) -> None:
        now = trio.current_time()
        for session in list(self._sessions.values()):
            session.machine.set_local_networks(self._endpoints.local_networks)
            if session.search is not None:
                session.search.handle_rebind(now)
            session.machine.handle_rebind(now)
            session.carry_out()
        self._ice.set_local_networks(self._endpoints.local_networks)
        self._ice.handle_rebind()
