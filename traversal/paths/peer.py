"""The state machine of one peer: which path to send on, when to probe, when to call by the relay.

Path selection specification 2 to 9 is the base, so that a stock node on the other end sees what it
expects. Deliberate differences, each harmless to it:

* a dead path is found by silence and a burst of Pings within a second (`liveness`), not by the end
  of trust after 6.5 s, and others are looked for then; the rule of 6.5 s stays as the last word;
* a valid Ping from an address that never answered us is answered by a Ping of our own (P7);
* a CallMeMaybe is sent even when we know no address of the peer (P6);
* an empty CallMeMaybe makes us ping, not forget: a later version of the message reads as empty;
* a CallMeMaybe makes us confirm the path in use: when it died in our direction only, the peer is
  the one that notices;
* private addresses that make no sense from here are tried only after 5 s without success (P10);
* latency is the least of three samples (P9), which a candidate that answers late gets within a
  second (`extra_pings`); and a path that loses too much is left for the relay
  until it has healed (`loss`; P13);
* after a path died, it is pinged every 1.5 s for a minute, so that it is back soon after it heals.

The machine does no I/O and reads no clock. Its methods are of four kinds:

* look: `route` (the only thing the data path reads), `state`, `statistics`;
* feed: `handle_*` for what came from the network, `sent` and `received` which the data path counts
  up: every datagram sent, every datagram that came by UDP from an address of this peer;
* command: `set_*`, `ping_all`;
* poll: after any call of the former two kinds and after `on_time`, carry out `poll_effects()` in
  order and call `on_time(now)` no later than `next_deadline()`.
"""

from __future__ import annotations

import math
from typing import Final

from traversal.keys import DiscoPublic, Entropy
from traversal.paths.calling import Call, Caller
from traversal.paths.candidates import Candidate, CandidateBook, LocalNetworks, is_usable
from traversal.paths.choice import PathChoice
from traversal.paths.edge import EdgePolicy, EdgeUse
from traversal.paths.effects import (
    DiscoverPeerRelay,
    Effect,
    PathChanged,
    PathState,
    PingAnswered,
    RefreshEndpoints,
    Route,
    SendCallMeMaybe,
    SendPing,
    SendPong,
    SendRelayPing,
)
from traversal.paths.extra_pings import PingBacks, SecondLooks
from traversal.paths.learned import LearnedAddresses
from traversal.paths.liveness import TICK_SECONDS
from traversal.paths.pinger import Pinger, Purpose
from traversal.paths.scoring import GOOD_ENOUGH_SECONDS, Path
from traversal.paths.search import SearchSchedule
from traversal.paths.statistics import CandidateStatistics, PeerStatistics, none_if_never
from traversal.wire.address import Address
from traversal.wire.disco import RELAY_REGION_HOST

HEARTBEAT_SECONDS: Final = 3.0
ACTIVITY_SECONDS: Final = 45.0
PEER_RELAY_MIN_SECONDS: Final = 30.0
PEER_RELAY_UPGRADE_SECONDS: Final = 60.0
"""All four: path selection specification 2."""

RECOVERY_SECONDS: Final = 1.5
"""A path that died is pinged at this pace for a minute: healed, it is used within 3 s, even if one
Ping is lost."""
LOSS_PROBE_SECONDS: Final = 0.5
"""Heartbeats on a path whose loss is in question: 16 outcomes take 8 s instead of 48."""
RELAY_TICK_SECONDS: Final = 1.0


class Peer:
    """The paths to one peer. See the module's text for the order of calls.

    `entropy` makes transaction IDs (`os.urandom`); `ceiling_bytes` is the MTU of the interface, the
    largest size that path MTU search tries, or None for no search.
    """

    def __init__(
        self,
        entropy: Entropy,
        local: LocalNetworks | None = None,
        *,
        ceiling_bytes: int | None = None,
        edge_policy: EdgePolicy = EdgePolicy.LAST,
    ) -> None:
        self.route = Route(None, relay=True, wake=True)
        self.sent = 0
        self.received = 0
        self.has_peer_relays = False
        """Whether UDP peer relays are known and the peer can use them."""
        self._local = local or LocalNetworks()
        self._edge = EdgeUse(edge_policy)
        self._choice = PathChoice(ceiling_bytes, is_edge_first=edge_policy is EdgePolicy.FIRST)
        self.has_relay = True
        """Whether the relay can carry traffic to the peer, as far as is known."""
        self.relay_latency_seconds: float | None = None
        """The last round trip by the relay; None before the peer answered there."""
        self._book = CandidateBook()
        self._pinger = Pinger(entropy)
        self._caller = Caller()
        self._effects: list[Effect] = []
        self._learned = LearnedAddresses(self._book)
        self._ping_backs = PingBacks()
        self._second_looks = SecondLooks()

        self._last_sent_at = -math.inf
        self._heartbeat_at = math.inf
        self._tick_at = math.inf
        self._recovery_at = math.inf
        self._schedule = SearchSchedule()
        self._peer_relay_wanted_at = -math.inf

        self._calls_sent = 0
        self._calls_received = 0
        self._relay_pongs = 0
        self._foreign_pongs = 0

    # ---- look

    @property
    def is_active(self) -> bool:
        """Whether something was sent in the last 45 s, or heartbeats are still due for it."""
        return self._heartbeat_at != math.inf

    @property
    def state(self) -> PathState:
        """The state's name, path selection specification 3."""
        path = self.route.path
        if path is not None and not self.route.relay:
            if path.is_edge:
                return PathState.EDGE
            return PathState.PEER_RELAY if path.vni else PathState.DIRECT
        if not self.is_active:
            return PathState.IDLE
        return PathState.RELAY if path is None else PathState.DOUBT

    @property
    def max_payload_bytes(self) -> int | None:
        """The largest datagram proven to fit the current path; None when it was not searched."""
        mtu = self._choice.mtu
        return mtu.max_payload_bytes if mtu is not None else None

    def peer_relay_in_use(self, now: float) -> tuple[DiscoPublic, int] | None:
        """Server and VNI of the path in use, if it is a trusted one by a peer relay."""
        best, server = self._choice.best, self._choice.server
        if best is None or server is None or not self._choice.is_trusted(now):
            return None
        return server, best.path.vni

    def has_answered_from(self, address: Address, now: float) -> bool:
        """Whether the peer answered a Ping to this address in the last 45 s."""
        candidate = self._book.get(address)
        return candidate is not None and now - candidate.answered_at < ACTIVITY_SECONDS

    def statistics(self) -> PeerStatistics:
        """A snapshot for status pages, metrics and the verdict."""
        best, edge = self._choice.best, self._edge.candidate
        return PeerStatistics(
            state=self.state,
            route=self.route,
            best=CandidateStatistics.of(best) if best is not None else None,
            max_payload_bytes=self.max_payload_bytes,
            last_sent_at=none_if_never(self._last_sent_at),
            calls_sent=self._calls_sent,
            calls_received=self._calls_received,
            relay_pongs=self._relay_pongs,
            foreign_pongs=self._foreign_pongs,
            candidates=tuple(map(CandidateStatistics.of, self._book)),
            edge=CandidateStatistics.of(edge) if edge.pinged_at != -math.inf else None,
        )

    # ---- poll

    def poll_effects(self) -> list[Effect]:
        """Everything to do since the last call, in order."""
        effects, self._effects = self._effects, []
        return effects

    def next_deadline(self) -> float:
        """When to call `on_time` at the latest; infinity for never."""
        deadline = min(
            self._pinger.next_deadline(),
            self._caller.next_deadline(),
            self._choice.liveness.next_deadline(),
            self._second_looks.next_deadline(),
            self._tick_at,
            self._heartbeat_at,
            self._recovery_at,
        )
        if self.route.path is not None and not self.route.relay:
            deadline = min(deadline, self._choice.trusted_until)
        if self.is_active and self._is_searching:
            deadline = min(deadline, self._schedule.next_deadline())
        if self._choice.mtu is not None and self._may_search_mtu:
            deadline = min(deadline, self._choice.mtu.next_deadline())
        return deadline

    def on_time(self, now: float) -> None:
        """Do what is due."""
        reason = ""
        choice = self._choice
        for ping in self._pinger.poll_expired(now):
            best = choice.best
            if best is not None and ping.candidate is best and choice.is_dead(now):
                reason = f"{best.path} did not answer for 5 s"
                choice.lose(now)
                self._recovery_at = min(self._recovery_at, now + RECOVERY_SECONDS)
        for candidate in self._pinger.poll_overdue_heartbeats(now):
            reason = self._handle_lost_heartbeat(candidate, now) or reason
        for candidate in self._second_looks.poll(now):
            if self._is_settled and candidate is not choice.best and candidate in self._book:
                self._send_ping(candidate, Purpose.DISCOVERY, now)
        if now >= self._tick_at:
            self._tick(now)
        if choice.liveness.poll_burst(now) and choice.best is not None:
            self._send_ping(choice.best, Purpose.CONFIRM, now)
        if choice.liveness.poll_verdict(now) and choice.best is not None:
            choice.doubt(now)
            reason = f"{choice.best.path} went silent"
            if self.is_active:
                self._look_elsewhere(now)
        if self._is_settled and not choice.is_trusted(now):
            if self.is_active:
                reason = reason or f"{self.route.path} did not answer for 6.5 s"
                self._recovery_at = now + RECOVERY_SECONDS
                # Perhaps our NAT forgot us: then our list is wrong, however fresh.
                self._caller.forget_freshness()
                self._search(now, is_forced=True)
            else:
                reason = "there is no traffic, so the path is not looked after"
        if now >= self._heartbeat_at:
            self._heartbeat(now)
        if now >= self._recovery_at:
            self._recover(now)
        if self.is_active and self._is_searching:
            self._search(now)
        self._probe_mtu(now)
        self._flush(now, reason)

    # ---- feed

    def handle_send(self, now: float) -> None:
        """A datagram was sent while `route.wake` was true."""
        self._note_sent(now)
        if self._is_searching:
            self._search(now)
        self._flush(now, "traffic")

    def handle_ping(self, transaction_id: bytes, path: Path, now: float) -> None:
        """A Ping of this peer, authenticated, came by UDP from `path`."""
        if path.vni:
            self._effects.append(SendPong(path, transaction_id, path.address))
            if path.is_edge:
                self._edge.peer_pinged_at = now
                self._ask_relay(now)
                self._review_edge(now)
                self._flush(now)
            return
        if not is_usable(path.address, self._local):
            return
        candidate, is_new = self._book.see(path.address, now)
        if candidate.last_ping_id == transaction_id:
            return
        candidate.last_ping_id = transaction_id
        if not candidate.take_pong(now):
            return
        self._effects.append(SendPong(path, transaction_id, path.address))
        self._effects += self._learned.learn(path.address)
        if is_new:
            self._book.prune(now, keep=self._choice.best)
        settled = self._choice.best if self._is_settled else None
        if self._ping_backs.take(candidate, settled, now, is_active=self.is_active):
            self._send_ping(candidate, Purpose.DISCOVERY, now)
        self._flush(now)

    def handle_relay_ping(self, transaction_id: bytes, region: int) -> None:
        """A Ping of this peer, authenticated, came by the relay of `region`."""
        source = Address(RELAY_REGION_HOST, region)
        self._effects.append(SendPong(None, transaction_id, source))

    def handle_pong(
        self, transaction_id: bytes, source: Address, seen_as: Address, now: float
    ) -> bool:
        """A Pong of this peer, authenticated, came by UDP from `source`.

        `seen_as` is the address in it. Returns whether it answered an outstanding Ping.
        """
        ping = self._pinger.get(transaction_id)
        if ping is None or ping.candidate is None:
            return False
        self._pinger.take(transaction_id)
        candidate = ping.candidate
        is_listed = candidate in self._book
        is_edge = candidate is self._edge.candidate
        if candidate is not self._choice.best and not is_listed and not is_edge:
            return True
        latency = now - ping.sent_at
        if ping.purpose is Purpose.USER:
            self._effects.append(PingAnswered(candidate.path, latency, seen_as))
        if not ping.padding_bytes:
            candidate.note_latency(latency, now)
        candidate.answered_at = now
        if not candidate.path.vni:
            is_proven = source == candidate.path.address
            self._effects += self._learned.learn(candidate.path.address, is_proven=is_proven)
            if source != candidate.path.address:
                self._foreign_pongs += 1
                self._effects += self._learned.learn_foreign(source)
        if ping.purpose is Purpose.HEARTBEAT:
            candidate.loss.record(is_answered=True)
        reason, before = "", self._choice.best
        if not is_edge or self._wants_edge(now):
            reason = self._choice.handle_answer(candidate, ping.padding_bytes, ping.sent_at, now)
        best = self._choice.best
        loser = before if best is candidate else candidate
        if loser is not None and loser is not best and loser in self._book:
            self._second_looks.note(loser, now)
        self._flush(now, reason)
        return True

    def handle_relay_pong(self, transaction_id: bytes, seen_as: Address, now: float) -> bool:
        """A Pong came by the relay: it answers a relay Ping and never says a path works."""
        ping = self._pinger.get(transaction_id)
        if ping is None or ping.candidate is not None:
            return False
        self._pinger.take(transaction_id)
        self._relay_pongs += 1
        self.relay_latency_seconds = now - ping.sent_at
        if ping.purpose is Purpose.USER:
            self._effects.append(PingAnswered(None, now - ping.sent_at, seen_as))
        self._edge.relay_proven_at = now
        self.set_relay_available(True, now)
        return True

    def handle_call_me_maybe(self, addresses: tuple[Address, ...], now: float) -> None:
        """A CallMeMaybe came by the relay, from this peer's node key, sealed by its disco key."""
        self._calls_received += 1
        # A list of a version to come reads as empty. Stock nodes forget everything then; for us it
        # only says "ping me", since forgetting would break working paths.
        if addresses:
            self._book.set_called(addresses, self._local, now)
        reason = self._drop_removed_best(now, "the peer's new list of addresses lacks the path")
        for candidate in self._choose_candidates(now):
            candidate.pinged_at = -math.inf
            self._pinger.enqueue(candidate)
        self._schedule.handle_called(now)
        best = self._choice.best
        if best is not None and self._is_settled:
            # Who calls has no direct path, or looks for a better one: perhaps ours leads nowhere,
            # though the peer's datagrams still come.
            self._choice.liveness.start_burst(best.patient_rtt_seconds, now)
        self._flush(now, reason)

    def handle_authenticated_data(self, path: Path, now: float) -> None:
        """Data that a tunnel above us authenticated came from `path`: it vouches for the path.

        Once per batch of datagrams is enough.
        """
        if self._choice.vouch(path, now):
            self._flush(now, f"authenticated data from {path}")

    def handle_send_error(self, path: Path, now: float) -> None:
        """Sending to `path` failed for want of a route ("host unreachable" and the like)."""
        candidate = self._book.get(path.address)
        if candidate is not None and not path.vni:
            candidate.forget_dynamics()
            candidate.pinged_at = now
        best = self._choice.best
        if best is not None and best.path == path:
            self._choice.clear()
        self._flush(now, f"no route to {path}")

    def handle_too_big(self, padding_bytes: int, now: float) -> None:
        """A padded Ping could not be sent because it exceeds the interface's MTU."""
        if self._choice.mtu is not None:
            self._choice.mtu.handle_too_big(padding_bytes, now)

    def handle_rebind(self, now: float) -> None:
        """Our sockets or our network are others now: all that was measured is void."""
        for candidate in self._book:
            candidate.forget_dynamics()
        self._pinger.forget_all()
        self._second_looks.forget()
        self._choice.forget()
        self.relay_latency_seconds = None
        self._recovery_at = math.inf
        self._caller.handle_rebind(now)
        self._schedule.restart(now)
        self._peer_relay_wanted_at = -math.inf
        if self.is_active:
            self._search(now)
        self._flush(now, "our network changed")

    def handle_new_disco_key(self, now: float) -> None:
        """The peer's disco key changed: nothing sent to the old one is answered. Paths stay."""
        self._pinger.forget_all()
        self._schedule.restart(now)

    def handle_found(self, address: Address, latency_seconds: float, now: float) -> None:
        """A search for ports proved a path: its Ping to `address` was answered after so long."""
        candidate, _ = self._book.see(address, now)
        candidate.note_latency(latency_seconds, now)
        candidate.answered_at = now
        self._effects += self._learned.learn(address, is_proven=True)
        self._book.prune(now, keep=candidate)
        reason = self._choice.handle_answer(candidate, 0, now - latency_seconds, now)
        self._flush(now, reason)

    def handle_peer_relay_ready(
        self, path: Path, server: DiscoPublic, latency_seconds: float, now: float
    ) -> None:
        """A handshake with a UDP peer relay is complete; `server` is the relay's own key."""
        candidate = Candidate(path)
        candidate.note_latency(latency_seconds, now)
        candidate.answered_at = now
        if self._choice.handle_relay_ready(candidate, server, now):
            self._flush(now, f"peer relay {path} is ready")

    # ---- command

    def set_configured_addresses(self, addresses: tuple[Address, ...], now: float) -> None:
        """The peer's addresses from a control plane or its introduction; replaces the last list."""
        fresh = self._book.set_configured(addresses, self._local)
        if self.is_active and self._is_searching:
            for candidate in fresh:
                self._pinger.enqueue(candidate)
            self._caller.want(now)
        self._flush(now)

    def set_own_addresses(self, addresses: tuple[Address, ...], now: float) -> None:
        """Our own addresses, best first, as a completed refresh found them."""
        has_changed = self._caller.set_own_addresses(addresses, now)
        if has_changed and self.is_active:
            # The peer finds us again by this, long before its trust in our old address ends.
            self._caller.want(now)
        self._flush(now)

    def set_local_networks(self, local: LocalNetworks) -> None:
        """Our interfaces changed; `handle_rebind` is called besides when sockets did too."""
        self._local = local

    def set_relay_available(self, is_available: bool, now: float) -> None:
        """Whether the relay can carry traffic: a lossy path is kept when it cannot."""
        has_come = is_available and not self.has_relay
        self.has_relay = is_available
        if has_come and self.is_active and self._is_searching:
            self._caller.repeat(now)
        self._review_edge(now)
        self._flush(now, "the relay came" if is_available else "the relay went")

    def set_edge_available(self, is_available: bool, now: float) -> None:
        """Whether our tunnel to the edge is up, so that the peer may be reached by it."""
        self._edge.is_available = is_available
        self._review_edge(now)
        self._flush(now, "the edge tunnel came" if is_available else "the edge tunnel went")

    def ping_all(self, now: float) -> None:
        """Ping by the relay and by every candidate, or only by a trusted direct path, at once.

        Counts as traffic. Answers are told as PingAnswered.
        """
        self._effects.append(SendRelayPing(self._pinger.register(None, Purpose.USER, now)))
        best = self._choice.best
        if best is not None and self.state is PathState.DIRECT:
            self._send_ping(best, Purpose.USER, now)
        else:
            for candidate in self._book:
                self._send_ping(candidate, Purpose.USER, now)
            if self._wants_edge(now):
                self._send_ping(self._edge.candidate, Purpose.USER, now)
        self.handle_send(now)

    # ---- sending

    def _send_ping(
        self, candidate: Candidate, purpose: Purpose, now: float, padding_bytes: int = 0
    ) -> None:
        candidate.pinged_at = now
        transaction_id = self._pinger.register(candidate, purpose, now, padding_bytes)
        self._effects.append(SendPing(candidate.path, transaction_id, padding_bytes))

    def _flush(self, now: float, reason: str = "") -> None:
        """Let out what may leave, Pings before the CallMeMaybe, and bring `route` up to date."""
        for candidate in self._pinger.poll_queue(now):
            is_known = candidate in self._book or candidate is self._edge.candidate
            if is_known and now - candidate.pinged_at >= RECOVERY_SECONDS:
                self._send_ping(candidate, Purpose.DISCOVERY, now)
        call = self._caller.poll(now)
        if call is Call.REFRESH:
            self._effects.append(RefreshEndpoints())
        elif call is Call.SEND:
            self._calls_sent += 1
            self._effects.append(SendCallMeMaybe(self._caller.own_addresses))
        self._effects += self._learned.forget_missing()
        self._update_route(now, reason)

    def _update_route(self, now: float, reason: str) -> None:
        best = self._choice.best
        path = best.path if best is not None else None
        if best is not None and best.is_shelved and self.has_relay:
            path = None
        is_trusted = path is not None and self._choice.is_trusted(now)
        route = Route(path, relay=not is_trusted, wake=self._tick_at == math.inf)
        old = self.route
        if route == old:
            return
        self.route = route
        if (old.path, old.relay) != (route.path, route.relay):
            self._effects.append(PathChanged(now, old, route, self.state, reason))
            if is_trusted and self._tick_at != math.inf:
                # From the relay's slow tick to the one that finds a dead path in time.
                self._tick_at = min(self._tick_at, now + TICK_SECONDS)
        if is_trusted and self._choice.is_final:
            self._schedule.handle_success()
        else:
            self._schedule.handle_failing(now)

    # ---- searching

    @property
    def _is_searching(self) -> bool:
        """Whether a trusted and good path of the kind that is wanted most is wanting."""
        best = self._choice.best
        is_final = best is not None and self._choice.is_final and not best.is_shelved
        return not is_final or self.route.relay

    def _wants_edge(self, now: float) -> bool:
        return self._edge.is_wanted(now, has_relay=self.has_relay)

    def _review_edge(self, now: float) -> None:
        """The edge or the relay came or went, or the peer began to use it: try it, or leave it."""
        best = self._choice.best
        self._leave_edge(now)
        if not self.is_active or not self._wants_edge(now) or (best and best.path.is_edge):
            return
        if self._is_searching or self._edge.policy is EdgePolicy.FIRST:
            self._pinger.enqueue(self._edge.candidate)

    def _leave_edge(self, now: float) -> None:
        """Leave the edge if it is not wanted any more."""
        best = self._choice.best
        if best is not None and best.path.is_edge and not self._wants_edge(now):
            self._choice.clear()
            if self.is_active:
                self._search(now, is_forced=True)

    def _ask_relay(self, now: float) -> None:
        """The edge is in use, or the peer would use it: does the relay work both ways?"""
        if self._edge.take_relay_ping(now):
            self._ping_relay(now)

    def _ping_relay(self, now: float) -> None:
        self._effects.append(SendRelayPing(self._pinger.register(None, Purpose.RECOVERY, now)))

    @property
    def _is_settled(self) -> bool:
        """Whether traffic goes to one trusted path only."""
        return self.route.path is not None and not self.route.relay

    def _choose_candidates(self, now: float) -> list[Candidate]:
        self._book.prune(now, keep=self._choice.best)
        if self._schedule.is_wide(now):
            return list(self._book)
        return self._book.in_scope(self._local) or list(self._book)

    def _search(self, now: float, *, is_forced: bool = False) -> None:
        """A full ping and a CallMeMaybe, if the last is long enough ago."""
        if not self._schedule.take(now, is_forced=is_forced):
            return
        for candidate in self._choose_candidates(now):
            self._pinger.enqueue(candidate)
        if self._wants_edge(now):
            self._pinger.enqueue(self._edge.candidate)
            self._ask_relay(now)
        elif self.route.relay and self.has_relay and self._schedule.is_wide(now):
            # The relay is in use, and will be for a while: how long does it take?
            self._ping_relay(now)
        self._caller.want(now)
        is_trusted = self._choice.is_trusted(now)
        pause = PEER_RELAY_UPGRADE_SECONDS if is_trusted else PEER_RELAY_MIN_SECONDS
        is_due = now - self._peer_relay_wanted_at >= pause
        if self.has_peer_relays and self._is_searching and is_due:
            self._peer_relay_wanted_at = now
            self._effects.append(DiscoverPeerRelay())

    def _look_elsewhere(self, now: float) -> None:
        """The path went silent: search at once, and do not spare those that answered just now."""
        for candidate in self._book:
            if candidate.answered_at >= candidate.pinged_at:
                candidate.pinged_at = -math.inf
        self._search(now, is_forced=True)

    def _drop_removed_best(self, now: float, reason: str) -> str:
        best = self._choice.best
        if best is None or best.path.vni or best in self._book:
            return ""
        self._choice.clear()
        if self.is_active:
            self._search(now, is_forced=True)
        return reason

    def _handle_lost_heartbeat(self, candidate: Candidate, now: float) -> str:
        reason = self._choice.handle_lost_heartbeat(candidate, now, has_relay=self.has_relay)
        if self.is_active and self._choice.is_loss_in_question(now):
            self._heartbeat_at = min(self._heartbeat_at, now + LOSS_PROBE_SECONDS)
        return reason

    # ---- timers

    def _note_sent(self, now: float) -> None:
        self._last_sent_at = now
        if not self.is_active:
            self._heartbeat_at = now + HEARTBEAT_SECONDS
            self._schedule.restart(now)
            if self.route.path is not None and self.route.relay:
                self._recovery_at = now
        if self._tick_at == math.inf:
            self._tick_at = now + TICK_SECONDS

    def _tick(self, now: float) -> None:
        choice = self._choice
        has_sent, is_suspect = choice.liveness.handle_tick(self.sent, self.received, now)
        if has_sent:
            self._last_sent_at = now
        if is_suspect and self._is_settled and choice.best is not None:
            choice.liveness.start_burst(choice.best.patient_rtt_seconds, now)
        if choice.liveness.is_quiet(now) or not self.is_active:
            self._tick_at = math.inf
        else:
            self._tick_at = now + (TICK_SECONDS if self._is_settled else RELAY_TICK_SECONDS)

    def _heartbeat(self, now: float) -> None:
        if now - self._last_sent_at > ACTIVITY_SECONDS:
            self._heartbeat_at = self._tick_at = self._recovery_at = math.inf
            return
        self._leave_edge(now)
        best = self._choice.best
        interval = HEARTBEAT_SECONDS
        if best is not None:
            self._send_ping(best, Purpose.HEARTBEAT, now)
            if self._choice.is_loss_in_question(now):
                interval = LOSS_PROBE_SECONDS
            is_fast = 0 < best.latency_seconds <= GOOD_ENOUGH_SECONDS
            if not self._is_searching and not is_fast and self._schedule.wants_upgrade(now):
                self._search(now)
        self._heartbeat_at += interval
        if self._heartbeat_at <= now:
            self._heartbeat_at = now + interval

    def _recover(self, now: float) -> None:
        """Ping the path in doubt, or the one that died a short while ago."""
        target = self._choice.recovery_target(now)
        if target is None or not self.is_active:
            self._recovery_at = math.inf
            return
        self._send_ping(target, Purpose.RECOVERY, now)
        self._recovery_at = now + RECOVERY_SECONDS

    @property
    def _may_search_mtu(self) -> bool:
        return self.is_active and self._is_settled

    def _probe_mtu(self, now: float) -> None:
        best, mtu = self._choice.best, self._choice.mtu
        if mtu is None or best is None or not self._may_search_mtu:
            return
        padding = mtu.poll_probe(now, best.patient_rtt_seconds)
        if padding is not None:
            self._send_ping(best, Purpose.MTU, now, padding)
        best.wire_mtu_bytes = mtu.proven_bytes
