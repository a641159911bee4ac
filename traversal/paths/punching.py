"""Hard NATs: the attempts to reach one peer by guessing ports, from the choice to the keep-alive.

Beside each peer's machine (`traversal.paths.peer`), which goes on with plain punching all the
while, stands one `Puncher`. When traffic wants a direct path and there is none, it chooses a
strategy (`punch_strategy`), runs the search (`punch_hard_side`, `punch_easy_side`, `punch_mutual`),
coordinates it with a peer of ours by punch messages, hands a found socket over and keeps it alive.
Traffic goes by the relay meanwhile; nothing here touches it.

A punch message is believed when it names both nodes' sessions, which each knows from the other's
introduction, and a higher serial than the last: a relay can neither forge nor replay it. Whoever
asks, each side keeps its own budget and its own pause between attempts.

The methods are of four kinds: look (`facts`, `own_extra`), feed (`handle_*`), command (`set_*`),
poll: after any call of the former two kinds and after `on_time`, carry out `poll_effects()` in
order, and call `on_time(now)` no later than `next_deadline()`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Final

from traversal.keys import Entropy
from traversal.paths.effects import SendCallMeMaybe
from traversal.paths.punch_easy_side import EasySide
from traversal.paths.punch_effects import (
    AdoptSocket,
    CloseSockets,
    MapPort,
    OpenSockets,
    PunchEffect,
    SearchEnded,
    SendProbe,
    SendPunchMessage,
)
from traversal.paths.punch_hard_side import HardSide
from traversal.paths.punch_keepalive import KeepAlive
from traversal.paths.punch_memory import PunchMemory
from traversal.paths.punch_mutual import MutualSide
from traversal.paths.punch_search import Found, GaveUp
from traversal.paths.punch_strategy import (
    BLIND_PATIENCE_SECONDS,
    MAPPING_PATIENCE_SECONDS,
    Choice,
    OwnSide,
    PeerSide,
    PunchPolicy,
    Strategy,
    choose,
    public_ipv4,
)
from traversal.paths.report import NatFacts, PortAllocation, PortPattern
from traversal.wire.address import Address
from traversal.wire.disco import TRANSACTION_ID_LENGTH
from traversal.wire.punching import (
    PortPatternCode,
    PortRange,
    PunchKind,
    PunchMessage,
    PunchMethod,
)

ASK_AGAIN_SECONDS: Final = 1.0
ASK_PATIENCE_SECONDS: Final = 0.9
"""For a hard peer to say how its NAT picks ports; the decision for the relay takes no longer."""
ACCEPT_SHARE: Final = 0.5
"""Of our own pause after a failure: then the peer may ask for another attempt. Less than the whole,
because both sides' pauses began at slightly different times."""

_STRATEGIES: Final = {
    PunchMethod.BIRTHDAY: Strategy.BIRTHDAY_EASY,
    PunchMethod.PREDICTED: Strategy.PREDICTED,
    PunchMethod.MUTUAL: Strategy.MUTUAL,
}


@dataclass(frozen=True, slots=True)
class PunchFacts:
    """For the verdict: what was chosen and why, and what the last attempt cost and led to.

    `failure` is a sentence, None unless the last attempt failed. `next_attempt_at` is monotonic
    seconds.
    """

    strategy: Strategy
    reason: str
    attempts: int = 0
    is_running: bool = False
    has_succeeded: bool = False
    sockets: int = 0
    probes: int = 0
    calls: int = 0
    seconds: float = 0.0
    failure: str | None = None
    next_attempt_at: float | None = None


_Search = HardSide | EasySide | MutualSide


@dataclass(slots=True, eq=False)
class _Attempt:
    """A running search. `number` is that of punch messages, 0 until a plan names one."""

    search: _Search
    strategy: Strategy
    started_at: float
    number: int = 0
    ask_again_at: float = math.inf


@dataclass(slots=True, eq=False)
class _Adopted:
    """A found extra socket, and what keeps its mapping alive."""

    socket: int
    remote: Address
    own_address: Address
    keep_alive: KeepAlive
    pings: set[bytes] = field(default_factory=set)


class Puncher:
    """See the module's text. `session` is our own in introductions, `peer_key` the peer's raw node
    key, under which `memory` remembers."""

    def __init__(
        self,
        entropy: Entropy,
        session: bytes,
        peer_key: bytes,
        memory: PunchMemory,
        policy: PunchPolicy | None = None,
    ) -> None:
        self._entropy = entropy
        self._session = session
        self._key = peer_key
        self._memory = memory
        self._policy = policy or PunchPolicy()
        self._own = OwnSide()
        self._peer = PeerSide()
        self._peer_nat: NatFacts | None = None
        self._effects: list[PunchEffect] = []
        self._attempt: _Attempt | None = None
        self._adopted: _Adopted | None = None
        self._facts = PunchFacts(Strategy.PLAIN, "nothing was tried yet")
        self._wanted_since: float | None = None
        self._is_direct = False
        self._was_mapping_tried = False
        self._asked_until = math.inf
        self._paused_until = -math.inf
        self._consider_at = math.inf
        self._batch = 0
        self._serial = 0
        self._peer_serial = 0

    # ---- look

    @property
    def facts(self) -> PunchFacts:
        """The choice, and the last or running attempt."""
        attempt = self._attempt
        if attempt is None:
            return self._facts
        return replace(
            self._facts,
            is_running=True,
            sockets=attempt.search.socket_count,
            probes=attempt.search.outbox.sent,
            calls=attempt.search.calls_sent,
        )

    @property
    def own_extra(self) -> tuple[Address, ...]:
        """Our address on the found socket: to be in every CallMeMaybe, or stock peers drop it."""
        return () if self._adopted is None else (self._adopted.own_address,)

    # ---- poll

    def poll_effects(self) -> list[PunchEffect]:
        """Everything to do since the last call, in order."""
        effects, self._effects = self._effects, []
        return effects

    def next_deadline(self) -> float:
        """When to call `on_time` at the latest; infinity for never."""
        deadline = self._consider_at
        if self._attempt is not None:
            search = self._attempt.search
            deadline = min(deadline, search.next_deadline(), self._attempt.ask_again_at)
        if self._adopted is not None:
            deadline = min(deadline, self._adopted.keep_alive.next_deadline())
        return deadline

    def on_time(self, now: float) -> None:
        """Do what is due."""
        attempt = self._attempt
        if attempt is not None:
            if now >= attempt.ask_again_at:
                attempt.ask_again_at = math.inf
                self._ask()
            attempt.search.on_time(now)
            self._collect(now)
        if self._adopted is not None:
            self._keep(self._adopted, now)
        if now >= self._consider_at:
            self._consider(now)

    # ---- command

    def set_own_side(self, own: OwnSide, now: float) -> None:
        """What we know of ourselves changed. In another network everything starts afresh."""
        has_moved = own.fingerprint != self._own.fingerprint
        self._own = own
        if has_moved:
            self._was_mapping_tried = False
            self._asked_until = math.inf
            self._paused_until = -math.inf
            self._abandon(now, "our network changed")
            self._release()
        self._consider(now)

    def set_peer_side(self, peer: PeerSide, now: float) -> None:
        """What we know of the peer changed."""
        if peer.session != self._peer.session:
            self._peer_serial = 0
            self._peer_nat = None
            self._asked_until = math.inf
        self._peer = peer
        self._consider(now)

    def set_policy(self, policy: PunchPolicy, now: float) -> None:
        """The owner changed what is allowed; switched off, a running search ends at once."""
        self._policy = policy
        if not policy.is_enabled:
            self._abandon(now, "the port search was switched off")
        self._consider(now)

    def close(self, now: float) -> None:
        """The peer is forgotten."""
        self._wanted_since = None
        self._abandon(now, "the peer was forgotten")
        self._release()
        self._consider_at = math.inf

    # ---- feed

    def handle_route(self, *, is_wanted: bool, is_direct: bool, now: float) -> None:
        """After each change of the peer's path: whether there is traffic for it, and whether that
        goes directly."""
        was_direct, self._is_direct = self._is_direct, is_direct
        if not is_wanted or is_direct:
            self._wanted_since = None
        elif self._wanted_since is None:
            self._wanted_since = now
        if self._adopted is not None:
            if is_wanted:
                self._adopted.keep_alive.note_use(now)
            if was_direct and not is_direct:
                self._adopted.keep_alive.check(now)
        attempt = self._attempt
        if is_direct and attempt is not None and not attempt.search.is_confirming:
            if isinstance(attempt.search, EasySide) and attempt.search.outbox.sent:
                self._finish(attempt, None, now)
            else:
                self._abandon(now, "plain punching found a path first")
        self._consider(now)

    def handle_opened(self, batch: int, ports: tuple[int, ...], now: float) -> None:
        """The sockets asked for are open; their local ports, in order of number."""
        if self._attempt is not None and batch == self._batch:
            self._attempt.search.handle_opened(ports, now)
            self._collect(now)

    def handle_mapping(self, socket: int, address: Address, now: float) -> None:
        """A STUN answer came on an extra socket."""
        if self._attempt is not None:
            self._attempt.search.handle_mapping(socket, address, now)
            self._collect(now)

    def handle_ping(self, socket: int, transaction_id: bytes, source: Address, now: float) -> None:
        """A Ping of the peer, authenticated, came on an extra socket that is not adopted."""
        if self._attempt is not None:
            self._attempt.search.handle_ping(socket, transaction_id, source, now)
            self._collect(now)

    def handle_pong(self, transaction_id: bytes, seen_as: Address, now: float) -> bool:
        """A Pong of the peer, authenticated, came on any socket and answered no Ping of the peer's
        machine; whether it answered one of ours. `seen_as` is the address in it."""
        adopted = self._adopted
        if adopted is not None and transaction_id in adopted.pings:
            adopted.pings.clear()
            adopted.keep_alive.handle_pong(now)
            return True
        if self._attempt is None:
            return False
        is_ours = self._attempt.search.handle_pong(transaction_id, seen_as, now)
        self._collect(now)
        return is_ours

    def handle_message(self, message: PunchMessage, now: float) -> bool:
        """A punch message of this peer, opened; False if it is not to be believed."""
        if message.session != self._peer.session or message.echoed_session != self._session:
            return False
        if message.serial <= self._peer_serial:
            return False
        self._peer_serial = message.serial
        self._note_peer_nat(message)
        match message.kind:
            case PunchKind.ASK:
                self._handle_ask(message, now)
            case PunchKind.PLAN:
                self._handle_plan(message, now)
            case PunchKind.STOP:
                self._handle_stop(message, now)
        return True

    # ---- messages

    def _note_peer_nat(self, message: PunchMessage) -> None:
        pattern = PortPattern[message.pattern.name]
        step = message.step if pattern is PortPattern.SEQUENTIAL else 0
        if pattern is PortPattern.SEQUENTIAL and not step:
            pattern = PortPattern.UNKNOWN
        nat = self._peer.nat
        self._peer_nat = replace(
            nat,
            mapping=nat.mapping or message.mapping,
            filtering=nat.filtering or message.filtering,
            ports=PortAllocation(pattern, step),
        )

    def _handle_ask(self, message: PunchMessage, now: float) -> None:
        attempt = self._attempt
        if attempt is not None:
            target = message.address
            if isinstance(attempt.search, HardSide) and target not in (None, attempt.search.target):
                assert target is not None
                attempt.search.retarget(target, now)
                self._collect(now)
            return
        if self._adopted is not None:
            self._adopted.keep_alive.check(now)
            return
        choice = self._choose()
        strategies = (Strategy.PREDICTED, Strategy.BIRTHDAY_HARD, Strategy.MUTUAL)
        if choice.strategy in strategies and self._may_accept(now):
            self._begin(choice, now, message.address)
        else:
            self._effects.append(self._tell(0, PunchKind.STOP))

    def _handle_plan(self, message: PunchMessage, now: float) -> None:
        attempt = self._attempt
        method = message.method
        if attempt is not None and not self._yields_to(message, attempt):
            return
        if attempt is not None and attempt.number not in (0, message.attempt):
            self._abandon(now, "the peer leads")
            attempt = None
        if attempt is None:
            if self._adopted is not None or not self._may_accept(now):
                self._effects.append(self._tell(message.attempt, PunchKind.STOP))
                return
            attempt = self._accept(message, now)
            if attempt is None:
                self._effects.append(self._tell(message.attempt, PunchKind.STOP))
                return
        attempt.number = message.attempt
        attempt.ask_again_at = math.inf
        if not isinstance(attempt.search, MutualSide):
            attempt.strategy = _STRATEGIES.get(method, attempt.strategy)
        self._facts = replace(self._facts, strategy=attempt.strategy)
        attempt.search.handle_message(message, now)
        self._collect(now)

    def _yields_to(self, message: PunchMessage, attempt: _Attempt) -> bool:
        """Whether a plan concerns the running attempt, or one that goes before it.

        When both lead a mutual search at once, the higher session's goes on.
        """
        if isinstance(attempt.search, HardSide):
            return False
        is_mutual = message.method is PunchMethod.MUTUAL
        if isinstance(attempt.search, EasySide):
            return not is_mutual and attempt.number in (0, message.attempt)
        if not is_mutual or message.attempt == attempt.number:
            return is_mutual
        assert self._peer.session is not None
        return attempt.search.is_leader and self._peer.session > self._session

    def _accept(self, message: PunchMessage, now: float) -> _Attempt | None:
        """Take part in an attempt that the peer began."""
        if message.method is PunchMethod.MUTUAL:
            if self._choose().strategy is not Strategy.MUTUAL:
                return None
            self._start_mutual(message.attempt, now, is_leader=False)
            self._collect(now)
            return self._attempt
        if self._own.nat.is_hard or not message.ranges:
            return None
        search = EasySide(self._entropy, now, max_probes=self._policy.max_probes)
        reason = "the peer's NAT is hard and ours easy: we probe"
        return self._start(search, Strategy.BIRTHDAY_EASY, reason, now)

    def _handle_stop(self, message: PunchMessage, now: float) -> None:
        if self._asked_until < math.inf:
            self._asked_until = now
        attempt = self._attempt
        if attempt is None or attempt.number != message.attempt:
            self._consider(now)
        # A hit that is being confirmed needs nothing more of the peer's search.
        elif message.method is not PunchMethod.NONE:
            attempt.search.handle_stop(now)
        elif not attempt.search.is_confirming:
            self._fail(attempt, "the peer ended the search or did not take part in it", now)

    def _may_accept(self, now: float) -> bool:
        """Whether our own pause admits an attempt that the peer asks for."""
        record = self._memory.recall(self._own.fingerprint, self._key)
        pause = record.allowed_at - record.ended_at if record.failures else 0.0
        return self._policy.is_enabled and now >= record.ended_at + pause * ACCEPT_SHARE

    # ---- choosing

    def _choose(self, *, has_plain_failed: bool = False) -> Choice:
        peer = self._peer
        if self._peer_nat is not None:
            peer = replace(peer, nat=self._peer_nat)
        record = self._memory.recall(self._own.fingerprint, self._key)
        return choose(
            self._own,
            peer,
            self._policy,
            remembered=record.worked,
            was_mapping_tried=self._was_mapping_tried,
            has_plain_failed=has_plain_failed,
        )

    def _consider(self, now: float) -> None:
        """Start what should be started, or say when to look again."""
        self._consider_at = math.inf
        if self._wanted_since is None or self._attempt is not None or self._adopted is not None:
            return
        plain_until = self._wanted_since + BLIND_PATIENCE_SECONDS
        choice = self._choose(has_plain_failed=now >= plain_until)
        if choice.strategy is Strategy.ASK and self._asked_until <= now:
            choice = Choice(
                Strategy.RELAY, "both NATs are hard, and the peer did not say how its picks ports"
            )
        self._facts = replace(self._facts, strategy=choice.strategy, reason=choice.reason)
        if choice.strategy is Strategy.PLAIN:
            self._consider_at = plain_until
        elif choice.strategy is Strategy.ASK and self._asked_until < math.inf:
            self._consider_at = self._asked_until
        elif choice.strategy is not Strategy.RELAY:
            record = self._memory.recall(self._own.fingerprint, self._key)
            start_at = max(
                self._wanted_since + choice.patience_seconds, record.allowed_at, self._paused_until
            )
            if now >= start_at:
                self._begin(choice, now, None)
            else:
                self._consider_at = start_at
                self._facts = replace(self._facts, next_attempt_at=start_at)

    def _begin(self, choice: Choice, now: float, target: Address | None) -> None:
        """Carry out a choice. `target` is where the peer asked to be reached."""
        strategy = choice.strategy
        self._facts = replace(self._facts, strategy=strategy, reason=choice.reason)
        match strategy:
            case Strategy.PORT_MAPPING:
                self._was_mapping_tried = True
                self._paused_until = self._consider_at = now + MAPPING_PATIENCE_SECONDS
                self._effects.append(MapPort())
            case Strategy.ASK:
                self._asked_until = self._consider_at = now + ASK_PATIENCE_SECONDS
                self._ask()
            case Strategy.BIRTHDAY_EASY:
                search = EasySide(self._entropy, now, max_probes=self._policy.max_probes)
                attempt = self._start(search, strategy, choice.reason, now)
                attempt.ask_again_at = now + ASK_AGAIN_SECONDS
                self._ask()
            case Strategy.MUTUAL:
                self._facts = replace(self._facts, reason=choice.reason)
                self._start_mutual(self._draw_number(), now, is_leader=True)
            case _:
                self._start_hard(choice, target or public_ipv4(self._peer.addresses), now)
        self._collect(now)

    # ---- attempts

    def _start_hard(self, choice: Choice, target: Address | None, now: float) -> None:
        if target is None:
            self._facts = replace(
                self._facts, failure="no public IPv4 address of the peer is known"
            )
            return
        number = self._draw_number()
        is_induced = choice.strategy is Strategy.INDUCED
        search = HardSide(
            self._entropy,
            self._own,
            target,
            tell=partial(self._tell, number),
            normal_addresses=self._own.listed if is_induced else None,
            max_sockets=self._policy.max_sockets,
            max_probes=self._policy.max_probes,
        )
        self._start(search, choice.strategy, choice.reason, now).number = number
        search.start()

    def _start_mutual(self, number: int, now: float, *, is_leader: bool) -> None:
        search = MutualSide(
            self._entropy,
            is_leader=is_leader,
            tell=partial(self._tell, number),
            max_probes=self._policy.max_probes,
        )
        reason = "both NATs are hard, and both pick ports in order"
        self._start(search, Strategy.MUTUAL, reason, now).number = number
        search.start()

    def _start(self, search: _Search, strategy: Strategy, reason: str, now: float) -> _Attempt:
        attempt = self._attempt = _Attempt(search, strategy, now)
        self._consider_at = math.inf
        self._facts = PunchFacts(strategy, reason, attempts=self._facts.attempts + 1)
        return attempt

    def _draw_number(self) -> int:
        return int.from_bytes(self._entropy(4), "big") or 1

    def _collect(self, now: float) -> None:
        """Take the effects of the running search, and its end."""
        attempt = self._attempt
        if attempt is None:
            return
        self._take_effects(attempt.search)
        match attempt.search.ending:
            case Found() as found:
                self._finish(attempt, found, now)
            case GaveUp(why):
                self._fail(attempt, why, now)
            case None:
                if isinstance(attempt.search, HardSide):
                    self._note_method(attempt, attempt.search)

    def _take_effects(self, search: _Search) -> None:
        for effect in search.poll_effects():
            if isinstance(effect, OpenSockets):
                self._batch += 1
                self._effects.append(replace(effect, batch=self._batch))
            else:
                self._effects.append(effect)

    @staticmethod
    def _note_method(attempt: _Attempt, search: HardSide) -> None:
        """A prediction that failed goes on as a birthday search."""
        if attempt.strategy is Strategy.PREDICTED and search.method is PunchMethod.BIRTHDAY:
            attempt.strategy = Strategy.BIRTHDAY_HARD

    def _finish(self, attempt: _Attempt, found: Found | None, now: float) -> None:
        """A path was found; `found` is None where the peer's machine saw it first."""
        self._end(attempt, now, has_succeeded=True)
        self._memory.note_success(self._own.fingerprint, self._key, attempt.strategy, now)
        search = attempt.search
        if found is not None:
            self._effects.append(
                AdoptSocket(found.socket, found.remote, found.own_address, found.latency_seconds)
            )
        if found is not None and found.socket is not None:
            self._adopted = _Adopted(
                found.socket,
                found.remote,
                found.own_address,
                KeepAlive(self._own.lifetime_seconds, now),
            )
            others = [n for n in range(search.socket_count) if n != found.socket]
            self._effects.append(CloseSockets(tuple(others)))
            if attempt.strategy is Strategy.INDUCED:
                # Without the winner among them, the peer would drop it (S3); with it, the guesses
                # go (S4).
                self._effects.append(SendCallMeMaybe((*self._own.listed, found.own_address)))
            elif isinstance(search, HardSide):
                self._effects.append(self._tell(attempt.number, PunchKind.STOP, search.method))
        self._effects.append(
            SearchEnded(
                True,
                f"found a direct path in {self._facts.seconds:.1f} s "
                f"({attempt.strategy.value}, {self._facts.probes} probes)",
            )
        )

    def _fail(self, attempt: _Attempt, why: str, now: float) -> None:
        """No path was found: clean up, and pause."""
        self._end(attempt, now, has_succeeded=False)
        self._memory.note_failure(self._own.fingerprint, self._key, attempt.strategy, now)
        record = self._memory.recall(self._own.fingerprint, self._key)
        self._facts = replace(self._facts, failure=why, next_attempt_at=record.allowed_at)
        self._clean_up(attempt)
        self._effects.append(SearchEnded(False, why))
        self._consider(now)

    def _abandon(self, now: float, why: str) -> None:
        """End the running search, if there is one, without judging the strategy."""
        attempt = self._attempt
        if attempt is not None:
            self._end(attempt, now, has_succeeded=False)
            self._clean_up(attempt)
            self._effects.append(SearchEnded(False, why))

    def _end(self, attempt: _Attempt, now: float, *, has_succeeded: bool) -> None:
        self._take_effects(attempt.search)
        self._facts = replace(
            self.facts,
            strategy=attempt.strategy,
            is_running=False,
            has_succeeded=has_succeeded,
            seconds=now - attempt.started_at,
            next_attempt_at=None,
        )
        self._attempt = None

    def _clean_up(self, attempt: _Attempt) -> None:
        """Free everything at once; NATs forget their part within 30 s, as nothing refreshes it."""
        search = attempt.search
        if search.socket_count:
            self._effects.append(CloseSockets(tuple(range(search.socket_count))))
        if search.calls_sent and self._own.listed:
            self._effects.append(SendCallMeMaybe(self._own.listed))
        if self._peer.is_ours:
            self._effects.append(self._tell(attempt.number, PunchKind.STOP))

    # ---- the found socket

    def _keep(self, adopted: _Adopted, now: float) -> None:
        if adopted.keep_alive.poll(now):
            transaction_id = self._entropy(TRANSACTION_ID_LENGTH)
            adopted.pings.add(transaction_id)
            self._effects.append(SendProbe(adopted.socket, adopted.remote, transaction_id))
        if adopted.keep_alive.is_lost:
            self._release()
            if not self._is_direct:
                self._consider(now)

    def _release(self) -> None:
        if self._adopted is not None:
            self._effects.append(CloseSockets((self._adopted.socket,)))
            self._adopted = None

    # ---- messages out

    def _ask(self) -> None:
        address = public_ipv4(self._own.addresses)
        self._effects.append(self._tell(0, PunchKind.ASK, address=address))

    def _tell(
        self,
        number: int,
        kind: PunchKind,
        method: PunchMethod = PunchMethod.NONE,
        *,
        sockets: int = 0,
        address: Address | None = None,
        source: Address | None = None,
        ranges: tuple[PortRange, ...] = (),
    ) -> PunchEffect:
        assert self._peer.session is not None
        self._serial += 1
        nat = self._own.nat
        return SendPunchMessage(
            PunchMessage(
                kind=kind,
                session=self._session,
                echoed_session=self._peer.session,
                serial=self._serial,
                attempt=number,
                method=method,
                mapping=nat.mapping,
                filtering=nat.filtering,
                pattern=PortPatternCode[nat.ports.pattern.name],
                step=nat.ports.step,
                sockets=sockets,
                address=address,
                source=source,
                ranges=ranges,
            )
        )
