"""One peer inside a node: its state machine, its keys, and the carrying out of its effects.

The shell around `traversal.paths.peer`: bytes come in, are opened with the peer's key and fed to
the machine; what it wants done is sealed and sent. Before the peer's disco key is known, by
introduction, everything travels by the relay and the machine sleeps.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import trio

from traversal.keys import NONCE_LENGTH, DiscoPublic, KeyFormatError, NodePublic
from traversal.outlet import Outlet
from traversal.paths.effects import (
    AddressForgotten,
    AddressLearned,
    DiscoverPeerRelay,
    Effect,
    PathChanged,
    PathState,
    PingAnswered,
    RefreshEndpoints,
    SendCallMeMaybe,
    SendPing,
    SendPong,
    SendRelayPing,
)
from traversal.paths.introduction import Introducer
from traversal.paths.peer import ACTIVITY_SECONDS, Peer
from traversal.paths.peer_relay import RelayAttempt
from traversal.paths.punch_strategy import PeerSide, PunchPolicy
from traversal.paths.report import NatFacts
from traversal.paths.scoring import EDGE_PATH, Path
from traversal.paths.verdict import Contact
from traversal.port_search import PortSearch
from traversal.wire.address import Address
from traversal.wire.disco import CallMeMaybe, DiscoError, Message, Ping, Pong
from traversal.wire.introduction import (
    Capability,
    FilteringClass,
    Introduction,
    IntroductionError,
    MappingClass,
    open_introduction,
    seal_introduction,
)
from traversal.wiring import Wiring


class Session:
    """See the module's text. `receive_data` takes the datagrams that are the application's,
    `note_change` the changes of path, `note_ping` the answers to pings a person asked for."""

    def __init__(
        self,
        wiring: Wiring,
        key: NodePublic,
        region: int,
        machine: Peer,
        introducer: Introducer | None,
        search_policy: PunchPolicy,
    ) -> None:
        self.armed_at = math.inf
        self.key = key
        self.machine = machine
        self.outlet = Outlet(wiring, key, machine, self.carry_out)
        self.outlet.home_region = region
        self.disco_key: DiscoPublic | None = None
        self.can_use_peer_relays = False
        """Whether the peer understands disco's messages about UDP peer relays."""
        self.search: PortSearch | None = None
        self.receive_data: Callable[[list[bytes]], None] = _ignore
        self.note_change: Callable[[PathChanged], None] = _ignore
        self.note_ping: Callable[[PingAnswered], None] = _ignore
        self._wiring = wiring
        self._introducer = introducer
        self._search_policy = search_policy
        self._side = PeerSide()
        self._told_nat = (MappingClass.UNKNOWN, FilteringClass.UNKNOWN)
        self._own_addresses: tuple[Address, ...] = ()
        self._wanted_at = -math.inf
        self._has_keys = trio.Event()

    @property
    def peer_relay_attempts(self) -> tuple[RelayAttempt, ...]:
        """What was tried to reach the peer by peer relays."""
        return self._wiring.peer_relays.attempts(self)

    @property
    def nat(self) -> NatFacts:
        """What the peer says of the NAT in front of it."""
        return self._side.nat

    @property
    def contact(self) -> Contact:
        """How far the way by the relay leads."""
        contact = self.outlet.contact
        is_stranger = self._introducer is not None and not self._introducer.is_introduced
        return Contact.NOT_INTRODUCED if contact is Contact.OPEN and is_stranger else contact

    # ---- commands

    def start(self, now: float) -> None:
        """Introduce ourselves, if that is how keys are exchanged with this peer."""
        if self._introducer is not None:
            self._introducer.start(now)
            self._introduce(now)
        self.carry_out()

    def close(self) -> None:
        """Leave no trace in what sessions share."""
        wiring = self._wiring
        wiring.deadlines.disarm(self)
        if self.search is not None:
            self.search.close(trio.current_time())
        for address in [a for a, s in wiring.by_address.items() if s is self]:
            del wiring.by_address[address]
        wiring.peer_relays.forget(self)
        self._set_disco_index(None)

    def set_disco_key(self, key: DiscoPublic, now: float) -> None:
        """The peer's disco key, from its introduction or a control plane.

        Raises KeyFormatError for a key that no honest peer has.
        """
        if key == self.disco_key:
            return
        self.outlet.set_disco_key(key)
        self._wiring.peer_relays.forget(self)
        self._set_disco_index(key)
        self._has_keys.set()
        self.machine.handle_new_disco_key(now)
        if now - self._wanted_at < ACTIVITY_SECONDS:
            self.machine.handle_send(now)
        self.carry_out()

    def set_own_addresses(self, addresses: tuple[Address, ...], now: float) -> None:
        """What we tell the peer, best first."""
        self._own_addresses = addresses
        self.tell_own_addresses(now)
        self.carry_out()

    def tell_own_addresses(self, now: float) -> None:
        """They, or the one of a socket that a port search found, changed."""
        extra = self.search.own_extra if self.search is not None else ()
        self.machine.set_own_addresses((*self._own_addresses, *extra), now)

    def set_home_region(self, region: int, now: float) -> None:
        """The region whose relay reaches the peer, if the map has one there."""
        if region != self.outlet.home_region and self._wiring.relays.is_known(region):
            # By the old one the peer is reached until we are connected to the new one.
            self._wiring.relays.connect(region)
            self.outlet.home_region = region
            self.machine.set_relay_available(True, now)
            self.carry_out()

    def set_candidates(self, addresses: tuple[Address, ...], now: float) -> None:
        """The peer's addresses from a control plane."""
        self.machine.set_configured_addresses(addresses, now)
        self._set_side(replace(self._side, addresses=addresses), now)

    def announce(self, now: float) -> None:
        """Tell the peer of our new home until it answers, if it knows us at all."""
        if self._introducer is not None and self._introducer.is_introduced:
            self._introducer.start(now)
            self._introduce(now)
            self.carry_out()

    def announce_nat(self, now: float) -> None:
        """Tell the peer what our NAT is like, if it does not know yet: it may wait for that to
        search our ports."""
        nat = self._wiring.port_searches.endpoints.nat
        told = (nat.mapping, nat.filtering)
        if nat.mapping is not MappingClass.UNKNOWN and told != self._told_nat:
            self._told_nat = told
            self.announce(now)

    async def wait_for_keys(self) -> None:
        """Until the peer's disco key is known and pings make sense."""
        await self._has_keys.wait()

    def ping(self, now: float) -> None:
        """Ping by all ways at once; without the peer's disco key this does nothing."""
        if self.outlet.has_keys:
            self.machine.ping_all(now)
            self.carry_out()

    # ---- data

    def wake(self, now: float) -> None:
        """A datagram was sent while the machine slept."""
        self._wanted_at = now
        if self.outlet.has_keys:
            self.machine.handle_send(now)
            self.carry_out()

    # ---- feed

    def handle_disco(self, message: Message, path: Path, now: float) -> bool:
        """An opened message that came by UDP, perhaps by a peer relay; False when it is none of
        this peer's business."""
        is_known = isinstance(message, Ping)
        if isinstance(message, Ping):
            self.machine.handle_ping(message.transaction_id, path, now)
        elif isinstance(message, Pong):
            is_known = self.machine.handle_pong(
                message.transaction_id, path.address, message.source, now
            )
            if is_known and not path.vni and self.outlet.udp is self._wiring.udp:
                self._wiring.note_seen_as(path.address, message.source, now)
            if not is_known and self.search is not None and not path.vni:
                return self.search.handle_pong(message, now)
        # A CallMeMaybe counts only by relay (disco specification D5).
        self.carry_out()
        if path.vni and (isinstance(message, Ping) or not is_known):
            return self._wiring.peer_relays.handle_relayed(self, message, path, now)
        return is_known

    def handle_relay_disco(self, datagram: bytes, region: int, now: float) -> None:
        """A disco envelope by relay, from this peer's node key. Raises DiscoError."""
        self._note_heard(region)
        message = self._open_relayed(datagram)
        if isinstance(message, Ping):
            self.machine.handle_relay_ping(message.transaction_id, region)
        elif isinstance(message, Pong):
            self.machine.handle_relay_pong(message.transaction_id, message.source, now)
        else:
            self._handle_call(message, now)
        self.carry_out()

    def handle_edge_disco(self, datagram: bytes, now: float) -> None:
        """A disco envelope by the edge, from this peer's node key. Raises DiscoError."""
        message = self._open_relayed(datagram)
        if isinstance(message, Ping):
            self.machine.handle_ping(message.transaction_id, EDGE_PATH, now)
        elif isinstance(message, Pong):
            self.machine.handle_pong(message.transaction_id, EDGE_PATH.address, message.source, now)
        else:
            self._handle_call(message, now)
        self.carry_out()

    def _open_relayed(self, datagram: bytes) -> Message:
        if self.disco_key is None or datagram[6:38] != self.disco_key.raw:
            raise DiscoError("a disco message by relay that is not sealed by its source")
        return self.outlet.open_disco(datagram)

    def _handle_call(self, message: Message, now: float) -> None:
        if isinstance(message, CallMeMaybe):
            self.machine.handle_call_me_maybe(message.addresses, now)
            if message.addresses:
                self._set_side(replace(self._side, addresses=message.addresses), now)
        else:
            self._wiring.peer_relays.handle_message(self, message, now)

    def handle_introduction(self, packet: bytes, region: int, now: float) -> None:
        """An introduction from this peer's node key, by the relay of `region` or, with 0, by the
        edge or by UDP from an address of the peer. Raises IntroductionError."""
        if region:
            self._note_heard(region)
        if self._introducer is None:
            raise IntroductionError("this peer's keys come from a control plane")
        outcome = self._introducer.handle_introduction(
            open_introduction(packet, self.outlet.box_of_nodes()), now
        )
        if outcome.answer is not None:
            self._send_introduction(outcome.answer)
        if outcome.believed is not None:
            self._believe(outcome.believed, now)
        self.carry_out()

    def handle_punch_message(self, packet: bytes, region: int, now: float) -> None:
        """A punch message from this peer's node key, by relay. Raises PunchMessageError."""
        self._note_heard(region)
        self._make_search(now).handle_message(packet, self.outlet.box_of_nodes(), now)

    def handle_relay_data(self, payload: bytes, region: int) -> None:
        """The application's datagram, by relay."""
        self._note_heard(region)
        self.receive_data([payload])

    def handle_edge_data(self, payload: bytes) -> None:
        """The application's datagram, by the edge."""
        if self.machine.route.path == EDGE_PATH:
            self.machine.received += 1
        self.receive_data([payload])

    def handle_edge_change(self, now: float, *, is_up: bool) -> None:
        """Our tunnel to the edge came up or went down."""
        self.machine.set_edge_available(is_up, now)
        if is_up and self._introducer is not None and not self._introducer.is_introduced:
            self._introducer.start(now)
            self._introduce(now)
        self.carry_out()

    def handle_edge_gone(self, now: float) -> None:
        """The edge does not know the peer."""
        self.machine.handle_send_error(EDGE_PATH, now)
        self.carry_out()

    def handle_peer_gone(self, region: int, now: float) -> None:
        """The relay of a region does not know the peer."""
        if self.outlet.note_gone(region):
            self.machine.set_relay_available(False, now)
        self.carry_out()

    def _note_heard(self, region: int) -> None:
        if self.outlet.note_heard(region):
            self.machine.set_relay_available(True, trio.current_time())

    # ---- timers

    def next_deadline(self) -> float:
        deadline = self.machine.next_deadline() if self.outlet.has_keys else math.inf
        if self._introducer is not None:
            deadline = min(deadline, self._introducer.next_deadline())
        return deadline

    def on_time(self, now: float) -> None:
        if self._introducer is not None and now >= self._introducer.next_deadline():
            self._introduce(now)
        if self.outlet.has_keys:
            self.machine.on_time(now)
        self.carry_out()

    # ---- effects

    def carry_out(self) -> None:
        """Do what the machine wants done; call this after every call of the machine."""
        while effects := self.machine.poll_effects():
            for effect in effects:
                self._carry_out(effect)
        self._wiring.deadlines.arm(self)
        machine, search = self.machine, self.search
        if search is not None:
            now = trio.current_time()
            search.follow(machine, now)
            if search is self.search and search.is_needless:
                search.close(now)
                self.search = None
        elif machine.is_active and machine.state is not PathState.DIRECT:
            now = trio.current_time()
            self._make_search(now).follow(machine, now)

    def _carry_out(self, effect: Effect) -> None:
        match effect:
            case SendPing():
                self.outlet.send_ping(effect)
            case SendPong(path=None):
                self.outlet.send_disco_by_relay(Pong(effect.transaction_id, effect.source))
            case SendPong(path=Path() as path):
                self.outlet.send_disco(Pong(effect.transaction_id, effect.source), path)
            case SendCallMeMaybe():
                self.outlet.send_disco_by_relay(CallMeMaybe(effect.addresses))
            case SendRelayPing():
                ping = Ping(effect.transaction_id, self._wiring.public_key)
                self.outlet.send_disco_by_relay(ping)
            case RefreshEndpoints():
                self._wiring.refresh()
            case AddressLearned():
                self._take_address(effect, trio.current_time())
            case AddressForgotten():
                if self._wiring.by_address.get(effect.address) is self:
                    del self._wiring.by_address[effect.address]
            case PathChanged():
                self.note_change(effect)
            case PingAnswered():
                self.note_ping(effect)
            case DiscoverPeerRelay():
                self._wiring.peer_relays.discover(self, trio.current_time())

    def _take_address(self, learned: AddressLearned, now: float) -> None:
        """Have datagrams from this address for our peer's, unless another peer's claim is better:
        else a peer could forge a Ping from there, and take the other's datagrams away."""
        by_address = self._wiring.by_address
        holder = by_address.get(learned.address)
        has_better_claim = (
            holder is not None
            and not learned.is_proven
            and holder.machine.has_answered_from(learned.address, now)
        )
        if not has_better_claim:
            by_address[learned.address] = self

    # ---- introductions

    def _introduce(self, now: float) -> None:
        assert self._introducer is not None
        introduction = self._introducer.poll_introduction(now)
        if introduction is not None:
            self._send_introduction(introduction)

    def _send_introduction(self, introduction: Introduction) -> None:
        self._told_nat = (introduction.mapping, introduction.filtering)
        nonce = self._wiring.entropy(NONCE_LENGTH)
        packet = seal_introduction(introduction, self.outlet.box_of_nodes(), nonce)
        self.outlet.send_by_relay(packet)
        # The peer's home may be dead, and this be the news of where we went: then a direct path
        # still leads to the peer, and perhaps it went where we are.
        relays, region = self._wiring.relays, self.outlet.relay_region
        path = self.machine.route.path
        if path is not None and not path.vni:
            self.outlet.udp.send(packet, path.address)
        if relays.home != region and not relays.is_connected(region):
            relays.send(relays.home, self.key.raw, packet)

    def _believe(self, introduction: Introduction, now: float) -> None:
        self.set_home_region(introduction.home_region, now)
        self.can_use_peer_relays = Capability.PEER_RELAY in introduction.capabilities
        self._wiring.peer_relays.update(self)
        addresses = tuple(address for _, address in introduction.addresses)
        self.machine.set_configured_addresses(addresses, now)
        side = PeerSide(
            NatFacts(mapping=introduction.mapping, filtering=introduction.filtering),
            addresses,
            introduction.session,
            can_search=Capability.PORT_SEARCH in introduction.capabilities,
        )
        self._set_side(side, now)
        try:
            self.set_disco_key(introduction.disco_key, now)
        except KeyFormatError as error:
            raise IntroductionError(f"the disco key of an introduction: {error}") from None

    # ---- port search

    def _set_side(self, side: PeerSide, now: float) -> None:
        self._side = side
        if self.search is not None:
            self.search.set_peer_side(side, now)

    def _make_search(self, now: float) -> PortSearch:
        if self.search is None:
            self.search = PortSearch(self._wiring.port_searches, self, self._search_policy, now)
            self.search.set_peer_side(self._side, now)
        return self.search

    # ---- keys

    def _set_disco_index(self, key: DiscoPublic | None) -> None:
        index = self._wiring.by_disco
        if self.disco_key is not None:
            sessions = index[self.disco_key.raw]
            sessions.remove(self)
            if not sessions:
                del index[self.disco_key.raw]
        self.disco_key = key
        if key is not None:
            index.setdefault(key.raw, []).append(self)


def _ignore(_: object) -> None:
    pass
