"""What comes in by UDP, relays and the edge: told apart, opened, given to the peer's session."""

from __future__ import annotations

import trio

from traversal.endpoints import Endpoints
from traversal.io.ice import IceRouter
from traversal.io.udp import Batch, Source
from traversal.paths.scoring import Path
from traversal.session import Session
from traversal.strangers import Strangers
from traversal.wire.address import Address
from traversal.wire.classify import WIREGUARD, Kind, classify
from traversal.wire.disco import MAGIC, DiscoError, Message, Ping, is_disco
from traversal.wire.introduction import IntroductionError, is_introduction
from traversal.wire.punching import PunchMessageError, is_punch_message
from traversal.wiring import Wiring


class Reception:
    """The handler of a node's sockets, relays and edge; `sessions` are by raw node key.

    `connect` it before any of them runs.
    """

    _wiring: Wiring
    _endpoints: Endpoints
    _ice: IceRouter

    def __init__(self, sessions: dict[bytes, Session], strangers: Strangers) -> None:
        self.unknown_datagrams = 0
        self.rejected_disco = 0
        self.rejected_introductions = 0
        self.rejected_punch_messages = 0
        self._sessions = sessions
        self._strangers = strangers

    def connect(self, wiring: Wiring, endpoints: Endpoints, ice: IceRouter) -> None:
        """Say who else gets what comes in; they in turn were made with this handler."""
        self._wiring, self._endpoints, self._ice = wiring, endpoints, ice

    # ---- from UDP

    def handle_batch(self, batch: Batch) -> None:
        """Datagrams that came by UDP."""
        # Data is nearly everything, so it is sorted by source and looked up and delivered once per
        # source; most of it is told by the zero bytes of WireGuard, without a call.
        data: dict[Source, list[bytes]] = {}
        for datagram, source in batch:
            kind = Kind.DATA if datagram[1:4] == WIREGUARD else classify(datagram)
            if kind is Kind.DATA:
                if source in data:
                    data[source].append(datagram)
                else:
                    data[source] = [datagram]
            elif kind is Kind.DISCO:
                self._handle_disco(datagram, source)
            elif kind is Kind.STUN:
                if not self._ice.handle_datagram(datagram, source):
                    self._endpoints.handle_stun(datagram, source, trio.current_time())
            elif kind is Kind.INTRODUCTION:
                self._handle_direct_introduction(datagram, source)
            elif kind is Kind.RELAYED_DISCO:
                self._handle_relayed_disco(datagram, source)
            elif not self._wiring.peer_relays.handle_data(datagram, source):
                self.unknown_datagrams += 1
        for source, datagrams in data.items():
            session = self._wiring.by_address.get(source)
            if session is not None:
                session.machine.received += len(datagrams)
                session.receive_data(datagrams)
                continue
            for datagram in datagrams:
                if not self._ice.handle_datagram(datagram, source):
                    self.unknown_datagrams += 1

    def _handle_disco(self, datagram: bytes, source: Source) -> None:
        sessions = self._wiring.by_disco.get(datagram[6:38])
        if sessions is None or not is_disco(datagram):
            self.rejected_disco += 1
            return
        try:
            message = sessions[0].outlet.open_disco(datagram)
        except DiscoError:
            self.rejected_disco += 1
            return
        now = trio.current_time()
        for session in _order_by_claim(sessions, message):
            if session.handle_disco(message, Path(Address(*source)), now):
                return
        self.rejected_disco += 1

    def _handle_relayed_disco(self, datagram: bytes, source: Source) -> None:
        try:
            self._wiring.peer_relays.handle_disco(datagram, source, trio.current_time())
        except DiscoError:
            self.rejected_disco += 1

    def _handle_direct_introduction(self, datagram: bytes, source: Source) -> None:
        session = self._wiring.by_address.get(source)
        try:
            if session is None:
                raise IntroductionError("it comes from no address of a peer")
            session.handle_introduction(datagram, 0, trio.current_time())
        except IntroductionError:
            self.rejected_introductions += 1

    # ---- from relays

    def handle_relay_packet(self, region: int, source: bytes, payload: bytes) -> None:
        """A packet came by relay from the node key `source`."""
        session = self._sessions.get(source)
        if session is None:
            self._strangers.handle_packet(region, source, payload)
        elif payload.startswith(MAGIC):
            try:
                session.handle_relay_disco(payload, region, trio.current_time())
            except DiscoError:
                self.rejected_disco += 1
        elif is_introduction(payload):
            try:
                session.handle_introduction(payload, region, trio.current_time())
            except IntroductionError:
                self.rejected_introductions += 1
        elif is_punch_message(payload):
            try:
                session.handle_punch_message(payload, region, trio.current_time())
            except PunchMessageError:
                self.rejected_punch_messages += 1
        else:
            session.handle_relay_data(payload, region)

    def handle_peer_gone(self, region: int, key: bytes) -> None:
        """A relay does not know a peer of ours."""
        session = self._sessions.get(key)
        if session is not None:
            session.handle_peer_gone(region, trio.current_time())

    # ---- from the edge

    def handle_edge_packet(self, source: bytes, payload: bytes) -> None:
        """A packet came by the edge from the node key `source`, which the edge has verified."""
        session = self._sessions.get(source)
        now = trio.current_time()
        try:
            if session is None:
                self._strangers.handle_packet(0, source, payload)
            elif payload.startswith(MAGIC):
                session.handle_edge_disco(payload, now)
            elif is_introduction(payload):
                session.handle_introduction(payload, 0, now)
            else:
                session.handle_edge_data(payload)
        except DiscoError:
            self.rejected_disco += 1
        except IntroductionError:
            self.rejected_introductions += 1

    def handle_edge_peer_gone(self, key: bytes) -> None:
        """The edge does not know a peer of ours."""
        session = self._sessions.get(key)
        if session is not None:
            session.handle_edge_gone(trio.current_time())

    def handle_edge_change(self, *, is_up: bool) -> None:
        """The tunnel to the edge came up or went down."""
        now = trio.current_time()
        for session in list(self._sessions.values()):
            session.handle_edge_change(now, is_up=is_up)

    def handle_relay_change(self, region: int, *, is_up: bool) -> None:
        """A relay connection came up or went down."""
        now = trio.current_time()
        for session in list(self._sessions.values()):
            if session.outlet.home_region == region:
                session.machine.set_relay_available(is_up, now)
                session.carry_out()
        has_network_come = is_up and self._endpoints.nat.is_offline
        if has_network_come or (not is_up and region == self._wiring.relays.home):
            self._endpoints.refresh()

    def handle_relay_restarting(self, region: int) -> None:
        """The only relay of a region is about to restart."""
        self._endpoints.leave_home(region)


def _order_by_claim(sessions: list[Session], message: Message) -> list[Session]:
    """Of several nodes with one disco key, the one that a Ping names first (disco 8.2)."""
    if len(sessions) == 1 or not isinstance(message, Ping):
        return list(sessions)
    return sorted(sessions, key=lambda session: session.key != message.node_key)
