"""Hard NATs: the attempts to reach one peer by guessing ports, from the choice to the keep-alive.

Beside each peer's machine (`traversal.paths.peer`), which goes on with plain punching all the
while, stands one `Puncher`. When traffic wants a direct path and there is none, it chooses a
strategy (`punch_strategy`), runs the search (`punch_hard_side`, `punch_easy_side`, `punch_mutual`),
coordinates it with a peer of ours by punch messages, hands a found socket over and keeps it alive.
Traffic goes by the relay meanwhile; nothing here touches it.

Whoever asks for a search, each side keeps its own budget and its own pause between attempts.

The methods are of four kinds: look (`facts`, `own_extra`), feed (`handle_*`), command (`set_*`),
poll: after any call of the former two kinds and after `on_time`, carry out `poll_effects()` in
order, and call `on_time(now)` no later than `next_deadline()`.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Final

from traversal.keys import Entropy
from traversal.paths.effects import SendCallMeMaybe
from traversal.paths.punch_attempt import Attempt, attempt_hard, attempt_mutual, draw_number
from traversal.paths.punch_channel import PunchChannel
from traversal.paths.punch_easy_side import EasySide
from traversal.paths.punch_effects import (
    AdoptSocket,
    CloseSockets,
    MapPort,
    OpenSockets,
    PunchEffect,
    SearchEnded,
    SendProbe,
)
from traversal.paths.punch_facts import PunchFacts, Strategy
from traversal.paths.punch_hard_side import HardSide
from traversal.paths.punch_keepalive import FoundSocket, KeepAlive
from traversal.paths.punch_memory import PunchMemory
from traversal.paths.punch_outbox import Outbox, Pace
from traversal.paths.punch_search import Found, GaveUp, Search
from traversal.paths.punch_strategy import (
    BLIND_PATIENCE_SECONDS,
    MAPPING_PATIENCE_SECONDS,
    Choice,
    OwnSide,
    PeerSide,
    PunchPolicy,
    choose,
    is_far_source,
    public_ipv4,
)
from traversal.wire.address import Address
from traversal.wire.disco import TRANSACTION_ID_LENGTH
from traversal.wire.introduction import MappingClass
from traversal.wire.punching import PunchKind, PunchMessage, PunchMethod

ASK_AGAIN_SECONDS: Final = 1.0
ASK_PATIENCE_SECONDS: Final = 0.9
"""For a peer to say what its NAT is like; the decision for the relay takes no longer."""
POSTPONE_SECONDS: Final = 3.0
"""Before we ask again a peer that does not know its NAT, or not again after a move: the tests take
three seconds."""
ACCEPT_SHARE: Final = 0.5
"""Of our own pause after a failure: then the peer may ask for another attempt. Less than the whole,
because both sides' pauses began at slightly different times."""


class Puncher:
    """See the module's text. `session` is our own in introductions, `peer_key` the peer's raw node
    key, under which `memory` remembers. Those of one node share `memory` and `pace`."""

    def __init__(
        self,
        entropy: Entropy,
        session: bytes,
        peer_key: bytes,
        memory: PunchMemory,
        policy: PunchPolicy | None = None,
        pace: Pace | None = None,
    ) -> None:
        self._entropy = entropy
        self._channel = PunchChannel(session)
        self._key = peer_key
        self._memory = memory
        self._policy = policy or PunchPolicy()
        self._pace = pace or Pace()
        self._effects: list[PunchEffect] = []
        self._attempt: Attempt | None = None
        self._adopted: FoundSocket | None = None
        self._facts = PunchFacts()
        self._wanted_since: float | None = None
        self._is_direct = False
        self._was_mapping_tried = False
        self._asked_until = math.inf
        self._paused_until = -math.inf
        self._consider_at = math.inf
        self._batch = 0

    # ---- look

    @property
    def facts(self) -> PunchFacts:
        """The choice, and the last or running attempt."""
        return self._facts

    @property
    def own_extra(self) -> tuple[Address, ...]:
        """Our address on the found socket: to be in every CallMeMaybe, or stock peers drop it."""
        return () if self._adopted is None else (self._adopted.own_address,)

    @property
    def _fingerprint(self) -> str:
        return self._channel.own.fingerprint

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
        has_moved = own.fingerprint != self._fingerprint
        self._channel.own = own
        if self._adopted is not None:
            self._adopted.keep_alive.set_lifetime(own.lifetime_seconds)
        if has_moved:
            self._was_mapping_tried = False
            self._asked_until = math.inf
            self._paused_until = -math.inf
            self._abandon(now, "our network changed")
            self._release()
        self._consider(now)

    def set_peer_side(self, peer: PeerSide, now: float) -> None:
        """What we know of the peer changed."""
        if self._channel.set_peer(peer):
            self._asked_until = math.inf
        self._consider(now)

    def handle_rebind(self, now: float) -> None:
        """The node's sockets are fresh ones, perhaps in another network: what was found or is being
        searched with the old ones is void."""
        self._abandon(now, "our sockets were replaced")
        self._release()

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
                self._abandon(now, "plain punching found a path first", is_direct=True)
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
        if not self._channel.believes(message):
            return False
        match message.kind:
            case PunchKind.ASK:
                self._handle_ask(message, now)
            case PunchKind.PLAN:
                self._handle_plan(message, now)
            case PunchKind.STOP:
                self._handle_stop(message, now)
        return True

    # ---- messages

    def _handle_ask(self, message: PunchMessage, now: float) -> None:
        attempt = self._attempt
        target = None if message.address is None else public_ipv4((message.address,))
        if attempt is not None:
            search = attempt.search
            if isinstance(search, HardSide) and target not in (None, search.target):
                assert target is not None
                search.retarget(target, now)
                self._collect(now)
            return
        if self._adopted is not None:
            self._adopted.keep_alive.check(now)
            return
        choice = self._choose(is_asked=True)
        strategies = (Strategy.PREDICTED, Strategy.BIRTHDAY_HARD, Strategy.MUTUAL)
        if choice.strategy in strategies and self._may_accept(now):
            self._begin(choice, now, target)
        else:
            self._effects.append(self._channel.tell(0, PunchKind.STOP))

    def _handle_plan(self, message: PunchMessage, now: float) -> None:
        attempt = self._attempt
        if attempt is not None and not attempt.follows(message, leads=self._channel.leads):
            return
        if attempt is not None and attempt.number not in (0, message.attempt):
            self._abandon(now, "the peer leads")
            attempt = None
        if attempt is None:
            if self._adopted is not None or not self._may_accept(now):
                self._effects.append(self._channel.tell(message.attempt, PunchKind.STOP))
                return
            attempt = self._accept(message, now)
            if attempt is None:
                self._effects.append(self._channel.tell(message.attempt, PunchKind.STOP))
                return
        attempt.number = message.attempt
        attempt.ask_again_at = math.inf
        attempt.search.handle_message(message, now)
        self._collect(now)

    def _accept(self, message: PunchMessage, now: float) -> Attempt | None:
        """Take part in an attempt that the peer began."""
        if message.method is PunchMethod.MUTUAL:
            choice = self._choose(is_asked=True)
            if choice.strategy is not Strategy.MUTUAL:
                return None
            return self._start(self._mutual(message.attempt, now, is_leader=False), choice.reason)
        is_far = is_far_source(message.source)
        if self._channel.own.nat.is_hard or not message.ranges or not is_far:
            return None
        return self._start(self._easy(now), "the peer's NAT is hard and ours easy: we probe")

    def _handle_stop(self, message: PunchMessage, now: float) -> None:
        if self._asked_until < math.inf:
            self._asked_until = now
        attempt = self._attempt
        if attempt is None or attempt.number != message.attempt:
            self._consider(now)
        # A hit that is being confirmed needs nothing more of the peer's search.
        elif message.method is not PunchMethod.NONE:
            attempt.search.handle_stop(message.address, now)
            self._collect(now)
        elif message.mapping is MappingClass.UNKNOWN and not attempt.search.outbox.sent:
            # It will tell when it knows, or plan by itself.
            self._paused_until = now + POSTPONE_SECONDS
            self._abandon(now, "the peer does not know its NAT yet")
            self._consider(now)
        elif not attempt.search.is_confirming:
            self._fail(attempt, "the peer ended the search or did not take part in it", now)

    def _may_accept(self, now: float) -> bool:
        """Whether our own pause admits an attempt that the peer asks for."""
        record = self._memory.recall(self._fingerprint, self._key)
        if not self._policy.is_enabled:
            return False
        if record.allowed_at == -math.inf:
            return True
        pause = record.allowed_at - record.ended_at
        return now >= record.ended_at + pause * ACCEPT_SHARE

    # ---- choosing

    def _choose(self, *, has_plain_failed: bool = False, is_asked: bool = False) -> Choice:
        """`is_asked`: the peer wants a search, for which it has its reasons."""
        record = self._memory.recall(self._fingerprint, self._key)
        return choose(
            self._channel.own,
            self._channel.peer,
            self._policy,
            remembered=record.worked,
            was_mapping_tried=self._was_mapping_tried or is_asked,
            has_plain_failed=has_plain_failed or is_asked,
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
                Strategy.RELAY, "the peer did not say what its NAT is like and how it picks ports"
            )
        self._facts = replace(
            self._facts,
            strategy=choice.strategy,
            reason=choice.reason,
            is_forbidden=choice.is_forbidden,
        )
        if choice.strategy is Strategy.PLAIN:
            self._consider_at = plain_until
        elif choice.strategy is Strategy.ASK and self._asked_until < math.inf:
            self._consider_at = self._asked_until
        elif choice.strategy is not Strategy.RELAY:
            record = self._memory.recall(self._fingerprint, self._key)
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
                attempt = self._start(self._easy(now), choice.reason)
                attempt.ask_again_at = now + ASK_AGAIN_SECONDS
                self._ask()
            case Strategy.MUTUAL:
                number = draw_number(self._entropy)
                self._start(self._mutual(number, now, is_leader=True), choice.reason)
            case _:
                self._begin_hard(choice, target or public_ipv4(self._channel.peer.addresses), now)
        self._collect(now)

    def _begin_hard(self, choice: Choice, target: Address | None, now: float) -> None:
        if target is None:
            failure = "no public IPv4 address of the peer is known"
            self._facts = replace(self._facts, failure=failure)
            return
        attempt = attempt_hard(
            self._entropy,
            self._outbox(),
            self._channel,
            choice.strategy,
            target,
            self._policy.max_sockets,
            now,
        )
        self._start(attempt, choice.reason)

    # ---- attempts

    def _easy(self, now: float) -> Attempt:
        search = EasySide(self._entropy, self._outbox(), now)
        return Attempt(search, Strategy.BIRTHDAY_EASY, now)

    def _mutual(self, number: int, now: float, *, is_leader: bool) -> Attempt:
        return attempt_mutual(
            self._entropy,
            self._outbox(),
            self._channel,
            self._policy.max_sockets,
            now,
            number=number,
            is_leader=is_leader,
        )

    def _outbox(self) -> Outbox:
        return Outbox(self._entropy, self._policy.max_probes, self._pace)

    def _start(self, attempt: Attempt, reason: str) -> Attempt:
        self._attempt = attempt
        self._consider_at = math.inf
        self._facts = PunchFacts(
            attempt.strategy, reason, attempts=self._facts.attempts + 1, is_running=True
        )
        return attempt

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
                self._facts = attempt.describe(self._facts, now)

    def _take_effects(self, search: Search) -> None:
        for effect in search.poll_effects():
            if isinstance(effect, OpenSockets):
                self._batch += 1
                self._effects.append(replace(effect, batch=self._batch))
            else:
                self._effects.append(effect)

    def _finish(self, attempt: Attempt, found: Found | None, now: float) -> None:
        """A path was found; `found` is None where the peer's machine saw it first."""
        self._end(attempt, now, has_succeeded=True)
        self._memory.note_success(self._fingerprint, self._key, attempt.lesson, now)
        search = attempt.search
        if found is not None:
            self._effects.append(
                AdoptSocket(found.socket, found.remote, found.own_address, found.latency_seconds)
            )
        if found is not None and found.socket is not None:
            self._adopted = FoundSocket(
                found.socket,
                found.remote,
                found.own_address,
                KeepAlive(self._channel.own.lifetime_seconds, now),
            )
            others = [n for n in range(search.socket_count) if n != found.socket]
            self._effects.append(CloseSockets(tuple(others)))
            if attempt.strategy is Strategy.INDUCED:
                # Without the winner among them, the peer would drop it (S3); with it, the guesses
                # go (S4).
                self._effects.append(
                    SendCallMeMaybe((*self._channel.own.listed, found.own_address))
                )
            elif isinstance(search, HardSide):
                self._effects.append(
                    self._channel.tell(
                        attempt.number, PunchKind.STOP, search.method, address=found.own_address
                    )
                )
        self._effects.append(
            SearchEnded(
                True,
                f"found a direct path in {self._facts.seconds:.1f} s "
                f"({self._facts.strategy.value}, {self._facts.probes} probes)",
            )
        )

    def _fail(self, attempt: Attempt, why: str, now: float) -> None:
        """No path was found: clean up, and pause."""
        self._end(attempt, now, has_succeeded=False)
        self._memory.note_failure(self._fingerprint, self._key, attempt.strategy, now)
        record = self._memory.recall(self._fingerprint, self._key)
        self._facts = replace(self._facts, failure=why, next_attempt_at=record.allowed_at)
        self._clean_up(attempt)
        self._effects.append(SearchEnded(False, why))
        self._consider(now)

    def _abandon(self, now: float, why: str, *, is_direct: bool = False) -> None:
        """End the running search, if there is one, without judging the strategy."""
        attempt = self._attempt
        if attempt is not None:
            self._end(attempt, now, has_succeeded=False)
            self._clean_up(attempt, is_direct=is_direct)
            self._effects.append(SearchEnded(False, why))

    def _end(self, attempt: Attempt, now: float, *, has_succeeded: bool) -> None:
        self._take_effects(attempt.search)
        self._facts = replace(
            attempt.describe(self._facts, now),
            is_running=False,
            has_succeeded=has_succeeded,
            next_attempt_at=None,
        )
        self._attempt = None

    def _clean_up(self, attempt: Attempt, *, is_direct: bool = False) -> None:
        """Free everything at once; NATs forget their part within 30 s, as nothing refreshes it."""
        search = attempt.search
        if search.socket_count:
            self._effects.append(CloseSockets(tuple(range(search.socket_count))))
        if search.calls_sent and self._channel.own.listed:
            self._effects.append(SendCallMeMaybe(self._channel.own.listed))
        if self._channel.peer.is_ours:
            # A method says that there is a path, so that the peer's own attempt is no failure.
            method = search.method if is_direct else PunchMethod.NONE
            self._effects.append(self._channel.tell(attempt.number, PunchKind.STOP, method))

    # ---- the found socket

    def _keep(self, adopted: FoundSocket, now: float) -> None:
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
        address = public_ipv4(self._channel.own.addresses)
        self._effects.append(self._channel.tell(0, PunchKind.ASK, address=address))
