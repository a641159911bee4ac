"""The port search for one peer inside a node: carries out what `traversal.paths.punching` wants.

Made when a peer is sent to by relay, or asks for a search, and closed when it goes direct without
one: such peers cost nothing afterwards. What arrives on extra sockets comes here; the found socket
becomes the peer's way out (`Session.udp`), and what it brings is handled like everything else that
comes by UDP.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

import trio

from traversal.io.punch_sockets import FoundPath, SocketSet
from traversal.io.udp import Batch, Source
from traversal.keys import NONCE_LENGTH, Box
from traversal.paths.effects import PathState, SendCallMeMaybe
from traversal.paths.peer import Peer
from traversal.paths.punch_effects import (
    AdoptSocket,
    CloseSockets,
    MapPort,
    MeasureMapping,
    OpenSockets,
    PunchEffect,
    SearchEnded,
    SendProbe,
    SendProbePong,
    SendPunchMessage,
)
from traversal.paths.punch_facts import PunchFacts
from traversal.paths.punch_strategy import OwnSide, PeerSide, PunchPolicy
from traversal.paths.punching import Puncher
from traversal.port_searches import PortSearches
from traversal.wire.address import Address
from traversal.wire.classify import Kind, classify
from traversal.wire.disco import CallMeMaybe, DiscoError, Ping, Pong
from traversal.wire.punching import PunchMessageError, open_punch_message, seal_punch_message
from traversal.wire.stun import (
    TRANSACTION_ID_LENGTH,
    StunError,
    TransactionId,
    encode_binding_request,
    parse_binding_response,
)

if TYPE_CHECKING:
    from traversal.session import Session

MAX_PROVEN: Final = 64
"""Addresses of the peer from which datagrams on extra sockets are taken; a search meets ten."""


class PortSearch:
    """See the module's text. Whoever changes the peer's machine calls `follow` afterwards."""

    def __init__(
        self, searches: PortSearches, session: Session, policy: PunchPolicy, now: float
    ) -> None:
        self.armed_at = math.inf
        self._searches = searches
        self._session = session
        self._puncher = Puncher(
            searches.entropy,
            searches.session,
            session.key.raw,
            searches.memory,
            policy,
            searches.pace,
        )
        self._sockets = SocketSet(0)
        self._found: int | None = None
        self._proven: set[tuple[int, Source]] = set()
        self._measuring: dict[bytes, int] = {}
        self._is_carrying_out = False
        self._puncher.set_own_side(searches.own_side(), now)
        searches.open.add(self)

    # ---- look

    @property
    def facts(self) -> PunchFacts:
        """The choice, and the last or running attempt: for the verdict."""
        return self._puncher.facts

    @property
    def own_extra(self) -> tuple[Address, ...]:
        """See `Puncher.own_extra`."""
        return self._puncher.own_extra

    @property
    def is_needless(self) -> bool:
        """Whether the peer went direct without any search: then this may be closed."""
        is_direct = self._session.machine.state is PathState.DIRECT
        return is_direct and not self.facts.attempts

    # ---- command

    def set_own_side(self, own: OwnSide, now: float) -> None:
        """A net check is over."""
        self._puncher.set_own_side(own, now)
        self._carry_out()
        if self._session.machine.state is not PathState.DIRECT:
            # The peer may wait for this, though we have nothing to send to it.
            self._session.announce_nat(now)

    def handle_rebind(self, now: float) -> None:
        """Before the machine is told: it should ping by the fresh socket."""
        self._puncher.handle_rebind(now)
        self._carry_out()

    def set_peer_side(self, peer: PeerSide, now: float) -> None:
        """The peer introduced itself, or called."""
        self._puncher.set_peer_side(peer, now)
        self._carry_out()

    def close(self, now: float) -> None:
        """The peer is forgotten."""
        self._searches.open.discard(self)
        self._searches.deadlines.disarm(self)
        self._puncher.close(now)
        self._carry_out()

    # ---- timers

    def next_deadline(self) -> float:
        return self._puncher.next_deadline()

    def on_time(self, now: float) -> None:
        self._puncher.on_time(now)
        self._carry_out()

    # ---- feed

    def follow(self, machine: Peer, now: float) -> None:
        """The machine did something: perhaps the path changed."""
        is_direct = machine.state is PathState.DIRECT
        is_wanted = machine.is_active and not is_direct
        self._puncher.handle_route(is_wanted=is_wanted, is_direct=is_direct, now=now)
        if is_wanted:
            self._session.announce_nat(now)
        self._carry_out()

    def handle_pong(self, pong: Pong, now: float) -> bool:
        """A Pong of the peer that the machine does not know; whether a search asked for it."""
        is_ours = self._puncher.handle_pong(pong.transaction_id, pong.source, now)
        self._carry_out()
        return is_ours

    def handle_message(self, packet: bytes, box: Box, now: float) -> None:
        """A punch message from the peer's node key, by relay. Raises PunchMessageError."""
        if not self._puncher.handle_message(open_punch_message(packet, box), now):
            raise PunchMessageError("a punch message of another life of the peer, or repeated")
        self._carry_out()

    def _handle_opened(self, batch: int, sockets: SocketSet) -> None:
        if sockets is self._sockets:
            self._puncher.handle_opened(batch, sockets.ports, trio.current_time())
            self._carry_out()

    def _handle_batch(self, sockets: SocketSet, number: int, batch: Batch) -> None:
        """Datagrams on an extra socket."""
        if sockets is not self._sockets:
            return
        now = trio.current_time()
        data = []
        for place, (datagram, source) in enumerate(batch):
            if number == self._found:
                # Perhaps since the datagram before.
                self._searches.handle_batch(batch[place:])
                break
            match classify(datagram):
                case Kind.DISCO:
                    self._handle_disco(number, datagram, Address(*source), now)
                    self._carry_out()
                case Kind.STUN:
                    self._handle_stun(datagram, now)
                case Kind.DATA if (number, source) in self._proven:
                    # The peer may be certain of the pair before we are.
                    data.append(datagram)
        if data:
            self._session.machine.received += len(data)
            self._session.receive_data(data)
        self._carry_out()

    def _handle_disco(self, number: int, datagram: bytes, source: Address, now: float) -> None:
        try:
            message = self._session.outlet.open_disco(datagram)
        except DiscoError:
            return
        if isinstance(message, CallMeMaybe):
            return
        if len(self._proven) < MAX_PROVEN:
            self._proven.add((number, source))
        if isinstance(message, Ping):
            self._puncher.handle_ping(number, message.transaction_id, source, now)
        elif isinstance(message, Pong):
            self._puncher.handle_pong(message.transaction_id, message.source, now)

    def _handle_stun(self, datagram: bytes, now: float) -> None:
        try:
            response = parse_binding_response(datagram)
        except StunError:
            return
        number = self._measuring.pop(response.transaction_id, None)
        if number is not None:
            self._puncher.handle_mapping(number, Address(*response.mapped_address), now)

    # ---- effects

    def _carry_out(self) -> None:
        # What an effect leads to comes back here; the outer call does it, in order.
        if self._is_carrying_out:
            return
        self._is_carrying_out = True
        try:
            while effects := self._puncher.poll_effects():
                for effect in effects:
                    self._do(effect)
        finally:
            self._is_carrying_out = False
        self._searches.deadlines.arm(self)

    def _do(self, effect: PunchEffect) -> None:
        session, searches = self._session, self._searches
        match effect:
            case SendProbe(socket, address, transaction_id):
                self._send_disco(socket, Ping(transaction_id, searches.public_key), address)
            case SendProbePong(socket, address, transaction_id):
                self._send_disco(socket, Pong(transaction_id, address), address)
            case MeasureMapping(socket):
                self._measure(socket)
            case SendPunchMessage(message):
                nonce = searches.entropy(NONCE_LENGTH)
                session.outlet.send_by_relay(
                    seal_punch_message(message, session.outlet.box_of_nodes(), nonce)
                )
            case SendCallMeMaybe(addresses):
                session.outlet.send_disco_by_relay(CallMeMaybe(addresses))
            case OpenSockets(count, batch):
                self._open(count, batch)
            case CloseSockets(sockets):
                self._close(sockets)
            case AdoptSocket():
                self._adopt(effect)
            case MapPort():
                searches.endpoints.ask_router()
            case SearchEnded():
                self._sockets.keep_only(self._found)
                self._measuring.clear()
                self._proven.clear()

    def _send_disco(self, number: int | None, message: Ping | Pong, address: Address) -> None:
        envelope = self._session.outlet.seal_disco(message)
        if envelope is None:
            return
        sock = None
        if number is not None:
            sock = self._sockets.get(number)
            if sock is None:
                return
        self._searches.udp.send(envelope, address, sock)

    def _measure(self, number: int) -> None:
        server, sock = self._searches.endpoints.stun_server(), self._sockets.get(number)
        if server is None or sock is None:
            return
        transaction_id = TransactionId(self._searches.entropy(TRANSACTION_ID_LENGTH))
        self._measuring[transaction_id] = number
        self._searches.udp.send(encode_binding_request(transaction_id), server, sock)

    def _open(self, count: int, batch: int) -> None:
        self._sockets.keep_only(None)
        self._measuring.clear()
        self._proven.clear()
        sockets = self._sockets = SocketSet(count)
        self._searches.sockets.open(
            sockets,
            lambda: self._handle_opened(batch, sockets),
            lambda number, datagrams: self._handle_batch(sockets, number, datagrams),
        )

    def _close(self, numbers: tuple[int, ...]) -> None:
        self._sockets.close(numbers)
        if self._found in numbers:
            self._found = None
            self._session.outlet.udp = self._searches.udp
            self._session.tell_own_addresses(trio.current_time())

    def _adopt(self, effect: AdoptSocket) -> None:
        session, now = self._session, trio.current_time()
        sock = None if effect.socket is None else self._sockets.get(effect.socket)
        if sock is not None:
            self._found = effect.socket
            session.outlet.udp = FoundPath(self._searches.udp, sock, effect.remote)
            self._searches.want_lifetime()
        session.tell_own_addresses(now)
        session.machine.handle_found(effect.remote, effect.latency_seconds, now)
        session.carry_out()
