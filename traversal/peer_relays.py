"""The UDP peer relays of a node: which nodes are one, and the handshakes with them for each peer.

The shell around `traversal.paths.peer_relay` (the client's side) and, on a node that serves as a
peer relay itself, the door to its server. Allocation travels by DERP, sealed with the disco keys of
the nodes; the bind handshake goes by UDP to the server, which has a disco key of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from traversal.io.peer_relay_server import PeerRelayService
from traversal.io.udp import Source
from traversal.keys import NONCE_LENGTH, Box, DiscoPublic, KeyFormatError, NodePublic
from traversal.paths.peer_relay import (
    Effect,
    PathBound,
    PathReleased,
    PeerRelayClient,
    RelayAttempt,
    RelayReady,
    SendAllocate,
    SendControl,
    SendRelayedPing,
    SendVia,
)
from traversal.paths.scoring import Path
from traversal.session import Session
from traversal.wire.address import Address
from traversal.wire.disco import (
    AllocateRequest,
    AllocateResponse,
    CallMeMaybeVia,
    Challenge,
    DiscoError,
    Message,
    Ping,
    is_disco,
    open_envelope,
    seal_envelope,
)
from traversal.wire.geneve import HEADER_LENGTH, PROTOCOL_DISCO, Header
from traversal.wiring import Wiring


@dataclass(slots=True)
class _Server:
    """A relay server that somebody of us is shaking hands with, by the peers' disco keys."""

    box: Box
    negotiations: dict[bytes, Negotiation] = field(default_factory=dict)


class PeerRelays:
    """What all peers share. `find_session` looks a peer up by its raw node key."""

    def __init__(
        self,
        wiring: Wiring,
        find_session: Callable[[bytes], Session | None],
        service: PeerRelayService | None,
    ) -> None:
        self._wiring = wiring
        self._find_session = find_session
        self._service = service
        self._keys: tuple[NodePublic, ...] = ()
        self._negotiations: dict[Session, Negotiation] = {}
        self._servers: dict[bytes, _Server] = {}
        self._by_path: dict[tuple[Source, int], Session] = {}

    # ---- command

    def set_keys(self, keys: Iterable[NodePublic]) -> None:
        """Which peers of ours serve as relays."""
        self._keys = tuple(dict.fromkeys(keys))

    def update(self, session: Session) -> None:
        """Tell the machine whether looking for a relay makes sense: call it when the peer or the
        list of relays changed."""
        has_relay = self._service is not None or bool(self._keys)
        session.machine.has_peer_relays = has_relay and session.can_use_peer_relays

    def discover(self, session: Session, now: float) -> None:
        """Ask the relays that can be asked for a place where to meet the peer."""
        relays = [key for key in self._keys if self._can_ask(key)]
        if self._service is not None:
            relays.append(self._wiring.public_key)
        negotiation = self._negotiation(session)
        if negotiation is not None:
            negotiation.discover(relays, now)

    def attempts(self, session: Session) -> tuple[RelayAttempt, ...]:
        """What was tried to reach the peer by peer relays."""
        negotiation = self._negotiations.get(session)
        return negotiation.client.attempts if negotiation is not None else ()

    def forget(self, session: Session) -> None:
        """The peer is gone or has another disco key: end its handshakes and take no more data."""
        negotiation = self._negotiations.pop(session, None)
        if negotiation is not None:
            negotiation.close()

    # ---- feed: by DERP

    def handle_message(self, session: Session, message: Message, now: float) -> None:
        """A message of the allocation, by DERP, sealed by the disco key of the peer that the relay
        names. Raises DiscoError for one that is not in order."""
        match message:
            case CallMeMaybeVia():
                negotiation = self._negotiation(session) if session.can_use_peer_relays else None
                if negotiation is None:
                    raise DiscoError("an invitation to a peer relay, which this peer cannot use")
                negotiation.handle_via(message, now)
            case AllocateResponse():
                for other in self._sessions_of(message.endpoint.clients):
                    if (negotiation := self._negotiations.get(other)) is not None:
                        negotiation.handle_response(session.key, message, now)
            case AllocateRequest():
                self._serve(session, message, now)
            case _:
                raise DiscoError("a disco message that does not travel by DERP")

    def _serve(self, session: Session, request: AllocateRequest, now: float) -> None:
        if self._service is None or session.disco_key not in request.clients:
            raise DiscoError("an allocation that is not for its sender, or not for this node")
        response = self._service.maybe_allocate(session.key, request, now)
        if response is not None:
            session.outlet.send_disco_by_relay(response)

    def _sessions_of(self, clients: tuple[DiscoPublic, DiscoPublic]) -> list[Session]:
        own = self._wiring.disco_public
        if own not in clients:
            raise DiscoError("an endpoint of a peer relay that is not for us")
        other = clients[0] if clients[1] == own else clients[1]
        return list(self._wiring.by_disco.get(other.raw, ()))

    # ---- feed: by UDP

    def handle_data(self, datagram: bytes, source: Source) -> bool:
        """Data behind a Geneve header; False when it comes by no path that we bound."""
        session = self._by_path.get((source, int.from_bytes(datagram[4:7], "big")))
        if session is None:
            return False
        session.machine.received += 1
        session.receive_data([datagram[HEADER_LENGTH:]])
        return True

    def handle_disco(self, datagram: bytes, source: Source, now: float) -> None:
        """Disco behind a Geneve header, from anybody. Raises DiscoError when it is to be ignored,
        before any cryptography if its sender is unknown."""
        envelope = datagram[HEADER_LENGTH:]
        if not is_disco(envelope):
            raise DiscoError("too short")
        path = Path(Address(*source), int.from_bytes(datagram[4:7], "big"))
        if datagram[1] & 0x80:
            self._handle_control(envelope, path, now)
            return
        sessions = self._wiring.by_disco.get(envelope[6:38])
        if sessions is None:
            raise DiscoError("relayed disco from nobody we know")
        message = sessions[0].outlet.open_disco(envelope)
        for session in list(sessions):
            if session.handle_disco(message, path, now):
                return
        raise DiscoError("relayed disco that answers nothing")

    def handle_relayed(self, session: Session, message: Message, path: Path, now: float) -> bool:
        """A Ping, or a Pong that the machine did not ask for, came by a relay; whether it is of
        use."""
        negotiation = self._negotiations.get(session)
        if negotiation is None:
            return isinstance(message, Ping)
        return negotiation.handle_relayed(message, path, now)

    def _handle_control(self, envelope: bytes, path: Path, now: float) -> None:
        server = self._servers.get(envelope[6:38])
        if server is None:
            raise DiscoError("a control packet of no relay that we talk to")
        message = open_envelope(envelope, server.box)
        if not isinstance(message, Challenge):
            raise DiscoError("a relay server sends challenges only")
        negotiation = server.negotiations.get(message.remote_key.raw)
        if negotiation is None:
            raise DiscoError("a challenge about another peer")
        negotiation.handle_challenge(DiscoPublic(envelope[6:38]), path, message, now)

    # ---- for negotiations

    def enlist(self, server: DiscoPublic, negotiation: Negotiation) -> None:
        """A handshake with this server began."""
        entry = self._servers.get(server.raw)
        if entry is None:
            try:
                entry = _Server(Box(self._wiring.disco_private, server))
            except KeyFormatError:
                return  # nothing is sent to it, and the handshake ends by its time-out
            self._servers[server.raw] = entry
        entry.negotiations[negotiation.peer.raw] = negotiation

    def release(self, server: DiscoPublic, negotiation: Negotiation) -> None:
        """The handshake with this server is over."""
        entry = self._servers.get(server.raw)
        if entry is not None and entry.negotiations.get(negotiation.peer.raw) is negotiation:
            del entry.negotiations[negotiation.peer.raw]
            if not entry.negotiations:
                del self._servers[server.raw]

    def bind(self, path: Path, session: Session) -> None:
        """Data by `path` is this peer's, unless another one's traffic takes it now: the peer says
        where the relay is, and could name one that others use."""
        holder = self._by_path.get(path, session)
        route = holder.machine.route
        if holder is session or route.relay or route.path != path:
            self._by_path[path] = session

    def unbind(self, path: Path, session: Session) -> None:
        """It is not any more."""
        if self._by_path.get(path) is session:
            del self._by_path[path]

    def send_control(self, effect: SendControl) -> None:
        """Send a step of the handshake to a server."""
        entry = self._servers.get(effect.server.raw)
        if entry is None:
            return
        wiring = self._wiring
        nonce = wiring.entropy(NONCE_LENGTH)
        envelope = seal_envelope(effect.message, wiring.disco_public, entry.box, nonce)
        header = Header(effect.path.vni, PROTOCOL_DISCO, control=True)
        wiring.udp.send(header.encode() + envelope, effect.path.address)

    def ask(self, effect: SendAllocate, now: float) -> AllocateResponse | None:
        """Ask a relay node for an endpoint; the answer is returned if that node is ourselves."""
        if self._service is not None and effect.relay == self._wiring.public_key:
            return self._service.maybe_allocate(effect.relay, effect.request, now)
        relay = self._find_session(effect.relay.raw)
        if relay is not None:
            relay.outlet.send_disco_by_relay(effect.request)
        return None

    def _can_ask(self, key: NodePublic) -> bool:
        session = self._find_session(key.raw)
        return session is not None and session.disco_key is not None

    def _negotiation(self, session: Session) -> Negotiation | None:
        negotiation = self._negotiations.get(session)
        if negotiation is None and session.disco_key is not None:
            negotiation = Negotiation(self, self._wiring, session, session.disco_key)
            self._negotiations[session] = negotiation
        return negotiation


class Negotiation:
    """The relay handshakes for one peer, as an item of `Deadlines`."""

    def __init__(
        self, shared: PeerRelays, wiring: Wiring, session: Session, peer: DiscoPublic
    ) -> None:
        self.armed_at = math.inf
        self.peer = peer
        self.client = PeerRelayClient(wiring.disco_public, peer, wiring.entropy)
        self._shared = shared
        self._wiring = wiring
        self._session = session
        self._servers: set[DiscoPublic] = set()
        self._paths: set[Path] = set()

    def close(self) -> None:
        """Leave no trace in what negotiations share."""
        self._wiring.deadlines.disarm(self)
        for server in self._servers:
            self._shared.release(server, self)
        for path in self._paths:
            self._shared.unbind(path, self._session)

    def next_deadline(self) -> float:
        return self.client.next_deadline()

    def on_time(self, now: float) -> None:
        self.client.on_time(now)
        self.carry_out(now)

    def discover(self, relays: list[NodePublic], now: float) -> None:
        self.client.discover(relays, self._in_use(now), now)
        self.carry_out(now)

    def handle_via(self, message: CallMeMaybeVia, now: float) -> None:
        self.client.handle_via(message, self._in_use(now), now)
        self.carry_out(now)

    def handle_response(self, relay: NodePublic, message: AllocateResponse, now: float) -> None:
        self.client.handle_response(relay, message, self._in_use(now), now)
        self.carry_out(now)

    def handle_challenge(
        self, server: DiscoPublic, path: Path, message: Challenge, now: float
    ) -> None:
        self.client.handle_challenge(server, path, message, now)
        self.carry_out(now)

    def handle_relayed(self, message: Message, path: Path, now: float) -> bool:
        if isinstance(message, Ping):
            self.client.handle_ping(path, now)
            is_of_use = True
        else:
            transaction_id = getattr(message, "transaction_id", b"")
            is_of_use = self.client.handle_pong(transaction_id, now)
        self.carry_out(now)
        return is_of_use

    def carry_out(self, now: float) -> None:
        """Do what the client wants done; call this after every call of the client."""
        while effects := self.client.poll_effects():
            self._note_servers()
            for effect in effects:
                self._carry_out(effect, now)
        self._note_servers()
        self._wiring.deadlines.arm(self)

    def _carry_out(self, effect: Effect, now: float) -> None:
        session = self._session
        match effect:
            case SendAllocate():
                response = self._shared.ask(effect, now)
                if response is not None:
                    self.client.handle_response(effect.relay, response, self._in_use(now), now)
            case SendVia():
                session.outlet.send_disco_by_relay(effect.message)
            case SendControl():
                self._shared.send_control(effect)
            case SendRelayedPing():
                ping = Ping(effect.transaction_id, self._wiring.public_key)
                session.outlet.send_disco(ping, effect.path)
            case PathBound():
                self._paths.add(effect.path)
                self._shared.bind(effect.path, session)
            case PathReleased():
                self._paths.discard(effect.path)
                self._shared.unbind(effect.path, session)
            case RelayReady():
                session.machine.handle_peer_relay_ready(
                    effect.path, effect.server, effect.latency_seconds, now
                )
                session.carry_out()

    def _note_servers(self) -> None:
        servers = self.client.servers()
        for server in self._servers - servers:
            self._shared.release(server, self)
        for server in servers - self._servers:
            self._shared.enlist(server, self)
        self._servers = servers

    def _in_use(self, now: float) -> tuple[DiscoPublic, int] | None:
        return self._session.machine.peer_relay_in_use(now)
