"""An ICE agent (RFC 8445), so that a WebRTC-style peer can reach a node: pure decisions.

Both roles, with checks of our own, so that it works from behind a NAT; consent by RFC 7675. What
the RFC has and this agent lacks, because a node's datagrams need one component over one socket per
family: several streams and components, and with them the Frozen state, which only keeps checks
of one foundation from overtaking each other; pairs that differ in nothing but our own candidate
(RFC 8445 6.1.2.4 prunes them); relayed candidates of our own; and restarts, for which the
application opens a new session.

What a stranger can cause: a request is verified before anything is remembered or answered, and no
answer is longer than its request. Whoever knows our password, because we described ourselves to
them, can make us send at most 20 checks a second, repetitions apart, to at most 100 addresses.
"""

from __future__ import annotations

import binascii
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Final

from traversal.keys import Entropy
from traversal.paths.candidates import LocalNetworks, is_usable
from traversal.paths.effects import AddressForgotten, AddressLearned
from traversal.paths.ice_checks import (
    PATIENCE_FACTOR,
    Check,
    CheckList,
    ChecksUnderWay,
    Pair,
    PairState,
)
from traversal.paths.ice_effects import (
    IceEffect,
    IceError,
    IceState,
    IceStateChanged,
    SelectedPair,
    SendStun,
)
from traversal.paths.ice_selection import DOUBT_SECONDS, Selection
from traversal.paths.nat64 import translate
from traversal.wire.address import Address
from traversal.wire.ice_check import (
    ROLE_CONFLICT,
    CheckRequest,
    encode_check_request,
    encode_check_response,
    encode_role_conflict,
    is_request,
    parse_check_request,
    parse_check_response,
)
from traversal.wire.ice_description import (
    PEER_REFLEXIVE_PRIORITY,
    IceCandidate,
    IceCandidateType,
    IceDescription,
)
from traversal.wire.stun import TRANSACTION_ID_LENGTH, StunError, TransactionId

PACE_SECONDS: Final = 0.05
"""Ta, the least time between two new checks (RFC 8445 14.2)."""
TIMEOUT_SECONDS: Final = 0.5
"""The first wait for an answer (RFC 8445 14.3 forbids less)."""
PATIENCE_SECONDS: Final = 39.5
"""How long a path is looked for: as long as a check takes to fail (RFC 8863 4)."""
NOMINATION_PATIENCE_SECONDS: Final = 0.2
"""How long a better pair may take to work after the first one did: a round trip, usually."""
CONSENT_ANSWER_SECONDS: Final = 8.0
"""How long the answer to a consent check counts: longer than any round trip."""
MAX_EARLY_CHECKS: Final = 16
"""Addresses from which a peer checked before the application told us of it."""


@dataclass(frozen=True, slots=True)
class _EarlyCheck:
    source: Address
    request: CheckRequest


class IceAgent:
    """One session with one peer.

    Look: `description`, `state`, `selected_address`, `selected`, `is_controlling`. Command:
    `set_remote`, `add_remote_candidates`, `set_local_networks`, `handle_rebind`, `close`. Feed:
    `handle_stun`. After each of these, and after `on_time`, take `poll_effects` and mind
    `next_deadline`.
    """

    def __init__(
        self,
        entropy: Entropy,
        candidates: Iterable[IceCandidate],
        local: LocalNetworks,
        *,
        is_controlling: bool,
    ) -> None:
        self.state = IceState.NEW
        self.selected_address: Address | None = None
        self.rejected = 0
        """STUN messages that were for us and not what they must be."""
        self.description = IceDescription(
            ufrag=_random_text(entropy, 8),
            password=_random_text(entropy, 24),
            candidates=tuple(candidates),
        )
        self._entropy = entropy
        self._local = local
        self._tie_breaker = int.from_bytes(entropy(8), "big")
        self._remote: IceDescription | None = None
        self._pairs = CheckList()
        self._pairs.is_controlling = is_controlling
        self._early: dict[Address, _EarlyCheck] = {}
        self._effects: list[IceEffect] = []
        self._checks = ChecksUnderWay(self._effects)
        self._selection: Selection | None = None
        self._nominee: Pair | None = None
        self._first_valid_at = math.inf
        self._last_check_at = -math.inf
        self._give_up_at = math.inf

    # ---- look

    @property
    def is_controlling(self) -> bool:
        """Whether we nominate; a conflict of roles may change it."""
        return self._pairs.is_controlling

    @property
    def selected(self) -> SelectedPair | None:
        """The pair in use; None before and after."""
        return None if self._selection is None else self._selection.look()

    def poll_effects(self) -> list[IceEffect]:
        """What is to be done, in this order."""
        effects = list(self._effects)
        self._effects.clear()
        return effects

    def next_deadline(self) -> float:
        """When to call `on_time`, in monotonic seconds; infinity for never."""
        deadline = min(
            self._give_up_at,
            self._checks.next_deadline(),
            self._nomination_due_at(),
            self._recheck_due_at(),
        )
        if self._has_work():
            deadline = min(deadline, self._last_check_at + PACE_SECONDS)
        if self._selection is not None:
            deadline = min(deadline, self._selection.ask_at, self._selection.expires_at)
        return deadline

    # ---- commands

    def set_remote(self, description: IceDescription, now: float) -> None:
        """The peer's description arrived: look for a path. Raises IceError the second time."""
        if self.state is not IceState.NEW:
            raise IceError(
                f"this ICE session is {self.state.value}: a session takes one description of its "
                "peer; open a new one for another"
            )
        self._remote = description
        if description.is_lite:
            self._pairs.is_controlling = True
        self._set_state(IceState.CHECKING, "the peer's description is known")
        self._give_up_at = now + PATIENCE_SECONDS
        self.add_remote_candidates(description.candidates, now)
        early, self._early = self._early, {}
        for check in early.values():
            if self._is_for_us(check.request):
                self._note_request(check.request, check.source, now)

    def add_remote_candidates(self, candidates: Iterable[IceCandidate], now: float) -> None:
        """Candidates that came after the description (trickle ICE, RFC 8838).

        Those that can't be reached from here are left out, and so are those beyond 100.
        """
        if self.state is not IceState.CHECKING:
            return
        for candidate in candidates:
            for address in translate([candidate.address], self._local.nat64_prefixes):
                reachable = replace(candidate, address=address)
                known = self._pairs.get(address)
                if known is None:
                    self._maybe_add_pair(reachable)
                elif known.remote.type is IceCandidateType.PEER_REFLEXIVE:
                    known.remote = reachable

    def set_local_networks(self, local: LocalNetworks) -> None:
        """What is known about our own addresses changed; matters for candidates yet to come."""
        self._local = local

    def handle_rebind(self, now: float) -> None:
        """Our own address or route changed: the peer must learn our new one at once."""
        if self._selection is not None:
            self._send_consent_check(self._selection, now)
        elif self.state is IceState.CHECKING:
            for pair in self._pairs:
                self._pairs.trigger(pair)

    def close(self) -> None:
        """Forget the peer. Harmless when repeated."""
        self._finish(IceState.CLOSED, "the session was closed")

    # ---- feed

    def handle_stun(self, datagram: bytes, source: Address, now: float) -> None:
        """A STUN message that names us or one of our checks. Anything may be in it."""
        if self.state in (IceState.FAILED, IceState.CLOSED):
            return
        try:
            if is_request(datagram):
                self._handle_request(datagram, source, now)
            else:
                self._handle_response(datagram, source, now)
        except StunError:
            self.rejected += 1

    def on_time(self, now: float) -> None:
        """Do what is due."""
        selection = self._selection
        if selection is not None:
            if now >= selection.expires_at:
                self._finish(IceState.FAILED, "the peer has not answered for 30 s")
                return
        elif now >= self._give_up_at:
            self._finish(IceState.FAILED, self._describe_failure())
            return
        for pair in self._checks.handle_time(now):
            self._note_failure(pair)
        if selection is not None and now >= selection.ask_at:
            self._send_consent_check(selection, now)
        if now >= self._recheck_due_at():
            self._recheck()
        self._maybe_nominate(now)
        if self._has_work() and now >= self._last_check_at + PACE_SECONDS:
            self._send_next(now)

    # ---- requests of the peer

    def _handle_request(self, datagram: bytes, source: Address, now: float) -> None:
        request = parse_check_request(datagram, self.description.password)
        if not self._is_for_us(request):
            raise StunError("a connectivity check between others")
        transaction_id, password = request.transaction_id, self.description.password
        if request.is_controlling is self.is_controlling:
            # RFC 8445 7.3.1.1: the larger tie-breaker controls.
            has_won = self._tie_breaker >= request.tie_breaker
            if has_won is self.is_controlling:
                answer = encode_role_conflict(transaction_id, password)
                self._effects.append(SendStun(answer, source))
                return
            self._switch_role()
        answer = encode_check_response(transaction_id, source, password)
        self._effects.append(SendStun(answer, source))
        if self._remote is not None:
            self._note_request(request, source, now)
        elif source in self._early or len(self._early) < MAX_EARLY_CHECKS:
            self._early[source] = _EarlyCheck(source, request)

    def _is_for_us(self, request: CheckRequest) -> bool:
        receiver, _, sender = request.username.partition(":")
        if receiver != self.description.ufrag:
            return False
        return self._remote is None or sender == self._remote.ufrag

    def _note_request(self, request: CheckRequest, source: Address, now: float) -> None:
        """Triggered checks and nomination (RFC 8445 7.3.1.3 to 7.3.1.5)."""
        pair = self._pairs.get(source) or self._maybe_add_reflexive(request.priority, source)
        if pair is None:
            return
        self._note_heard(pair, now)
        if pair.state is not PairState.SUCCEEDED:
            self._pairs.trigger(pair)
        if request.use_candidate and not self.is_controlling:
            pair.is_nominated = True
            self._maybe_follow(pair, now)

    # ---- answers of the peer

    def _handle_response(self, datagram: bytes, source: Address, now: float) -> None:
        check = self._checks.get(datagram[8:20])
        if check is None or self._remote is None:
            return
        response = parse_check_response(datagram, self._remote.password)
        self._checks.end(check)
        pair = check.pair
        if response.error_code == ROLE_CONFLICT:
            if check.request.is_controlling is self.is_controlling:
                self._switch_role()
                self._tie_breaker = int.from_bytes(self._entropy(8), "big")
            self._pairs.trigger(pair)
            return
        if response.error_code is not None or source != pair.address:
            # An answer from elsewhere means that the path is not the same both ways (7.2.5.2.1).
            self._note_failure(pair)
            return
        self._note_heard(pair, now)
        pair.answered_at = now
        pair.mapped_address = response.mapped_address
        if check.sends == 1:
            pair.latency_seconds = now - check.sent_at
        was_valid = pair.state is PairState.SUCCEEDED
        pair.state = PairState.SUCCEEDED
        if pair is not self._nominee:
            self._pairs.withdraw(pair)
        self._first_valid_at = min(self._first_valid_at, now)
        selection = self._selection
        if selection is not None and pair is selection.pair:
            selection.note_answered()
        if check.request.use_candidate and pair is self._nominee:
            self._nominee = None
            self._select(pair, now)
        elif not self.is_controlling:
            self._maybe_follow(pair, now)
        elif selection is not None and not was_valid and selection.unanswered_since is None:
            # The peer checked from a new address: has it left the old one?
            self._send_consent_check(selection, now)
        self._maybe_nominate(now)

    def _note_failure(self, pair: Pair) -> None:
        if not self._is_selected(pair):
            pair.state = PairState.FAILED
        if pair is self._nominee:
            self._nominee = None

    # ---- checks of ours

    def _has_work(self) -> bool:
        if self._pairs.has_triggered:
            return True
        return (
            self.state is IceState.CHECKING
            and self._pairs.maybe_best(PairState.WAITING) is not None
        )

    def _send_next(self, now: float) -> None:
        pair = self._pairs.maybe_next_triggered() or self._pairs.maybe_best(PairState.WAITING)
        if pair is None:
            return
        self._last_check_at = now
        is_nomination = pair is self._nominee
        under_way = pair.check
        if under_way is not None:
            request = under_way.request
            if (request.use_candidate, request.is_controlling) == (
                is_nomination,
                self.is_controlling,
            ):
                # Sent again instead of anew: the peer's NAT may be open for it by now.
                self._checks.send_again(under_way)
                return
            under_way.resend_at = math.inf
        if pair.state is not PairState.SUCCEEDED:
            pair.state = PairState.IN_PROGRESS
        timeout = max(TIMEOUT_SECONDS, PACE_SECONDS * self._pairs.count_unfinished())
        pair.check = self._start_check(
            pair, now, timeout * PATIENCE_FACTOR, is_nomination=is_nomination
        )
        pair.check.repeat(timeout)

    def _send_consent_check(self, selection: Selection, now: float) -> None:
        selection.note_asked(now, int.from_bytes(self._entropy(2), "big") / 65536)
        # The controlling agent goes on nominating, so that the peer follows when we move.
        self._start_check(
            selection.pair, now, CONSENT_ANSWER_SECONDS, is_nomination=self.is_controlling
        )

    def _start_check(
        self, pair: Pair, now: float, timeout_seconds: float, *, is_nomination: bool
    ) -> Check:
        assert self._remote is not None
        request = CheckRequest(
            transaction_id=TransactionId(self._entropy(TRANSACTION_ID_LENGTH)),
            username=f"{self._remote.ufrag}:{self.description.ufrag}",
            priority=PEER_REFLEXIVE_PRIORITY,
            is_controlling=self.is_controlling,
            tie_breaker=self._tie_breaker,
            use_candidate=is_nomination and self.is_controlling,
        )
        datagram = encode_check_request(request, self._remote.password)
        check = Check(request, datagram, pair, now, now + timeout_seconds)
        self._checks.start(check)
        return check

    # ---- nomination

    def _maybe_best_valid(self) -> Pair | None:
        """The pair to nominate: valid, and heard since the selected one fell silent."""
        if not self.is_controlling:
            return None
        selection = self._selection
        if selection is None:
            return self._pairs.maybe_best(PairState.SUCCEEDED)
        if selection.unanswered_since is None:
            return None
        best = self._pairs.maybe_best(PairState.SUCCEEDED, selection.unanswered_since)
        return best if best is not selection.pair else None

    def _nomination_due_at(self) -> float:
        """When to nominate the best valid pair; infinity if there is nothing to nominate."""
        if self._nominee is not None or self._maybe_best_valid() is None:
            return math.inf
        if self._selection is not None and self._selection.unanswered_since is not None:
            return self._selection.unanswered_since + DOUBT_SECONDS
        return self._first_valid_at + NOMINATION_PATIENCE_SECONDS

    def _maybe_nominate(self, now: float) -> None:
        best = self._maybe_best_valid()
        if best is None or self._nominee is not None:
            return
        is_early = now < self._nomination_due_at()
        if is_early and (self._selection is not None or self._pairs.count_unfinished(above=best)):
            return
        self._nominee = best
        self._pairs.trigger(best, is_urgent=True)

    def _recheck_due_at(self) -> float:
        """When to see which other pairs work, because the selected one is silent."""
        selection = self._selection
        if selection is None or selection.unanswered_since is None or not self.is_controlling:
            return math.inf
        return math.inf if selection.has_rechecked else selection.unanswered_since + DOUBT_SECONDS

    def _recheck(self) -> None:
        assert self._selection is not None
        self._selection.has_rechecked = True
        for pair in sorted(self._pairs, key=self._pairs.priority, reverse=True):
            if pair is not self._selection.pair:
                self._pairs.trigger(pair)

    def _maybe_follow(self, pair: Pair, now: float) -> None:
        """The controlling peer nominated a pair; use it if it works."""
        if not pair.is_nominated or pair.state is not PairState.SUCCEEDED:
            return
        selection, priority = self._selection, self._pairs.priority
        if (
            selection is None
            or selection.is_settled(now)
            or priority(pair) > priority(selection.pair)
        ):
            self._select(pair, now)

    def _select(self, pair: Pair, now: float) -> None:
        pair.is_nominated = False
        if self._is_selected(pair):
            return
        self._selection = Selection.make(pair, now)
        self.selected_address = pair.address
        self._give_up_at = math.inf
        self._checks.stop_repeating()
        self._set_state(
            IceState.CONNECTED, f"datagrams go to {pair.address} ({pair.remote.type.value})"
        )

    def _is_selected(self, pair: Pair) -> bool:
        return self._selection is not None and self._selection.pair is pair

    def _switch_role(self) -> None:
        self._pairs.is_controlling = not self.is_controlling
        self._nominee = None

    # ---- pairs

    def _maybe_add_pair(self, candidate: IceCandidate) -> Pair | None:
        if self._pairs.is_full or not is_usable(candidate.address, self._local):
            return None
        local_priority = max(
            (
                own.priority
                for own in self.description.candidates
                if own.address.is_ipv6 == candidate.address.is_ipv6
            ),
            default=1,
        )
        pair = Pair(candidate, local_priority)
        self._pairs.add(pair)
        return pair

    def _maybe_add_reflexive(self, priority: int, source: Address) -> Pair | None:
        selected = None if self._selection is None else self._selection.pair
        oldest = self._pairs.maybe_oldest_reflexive(keep=(selected, self._nominee))
        if oldest is not None:
            self._remove(oldest)
        kind = IceCandidateType.PEER_REFLEXIVE
        return self._maybe_add_pair(IceCandidate("prflx", priority, source, kind))

    def _remove(self, pair: Pair) -> None:
        self._pairs.remove(pair)
        self._checks.end_all(pair)
        if pair.heard_at > -math.inf:
            self._effects.append(AddressForgotten(pair.address))

    def _note_heard(self, pair: Pair, now: float) -> None:
        if pair.heard_at == -math.inf:
            self._effects.append(AddressLearned(pair.address))
        pair.heard_at = now

    # ---- the session as a whole

    def _set_state(self, state: IceState, reason: str) -> None:
        self.state = state
        self._effects.append(IceStateChanged(state, reason))

    def _describe_failure(self) -> str:
        if not self._pairs:
            return "the peer named no address that can be reached from here"
        if any(pair.heard_at > -math.inf for pair in self._pairs):
            return (
                "the peer was heard, but no path was agreed on; it may have ended, or taken "
                "another description for ours"
            )
        tried = len(self._pairs)
        return (
            f"none of the peer's {tried} addresses answered in {PATIENCE_SECONDS} s; a firewall "
            "may drop UDP, or the peer did not get our description"
        )

    def _finish(self, state: IceState, reason: str) -> None:
        if self.state in (IceState.FAILED, IceState.CLOSED):
            return
        for pair in self._pairs:
            self._remove(pair)
        self._early.clear()
        self._selection = self._nominee = self.selected_address = None
        self._give_up_at = math.inf
        self._set_state(state, reason)


def _random_text(entropy: Entropy, characters: int) -> str:
    """Characters of ICE's alphabet, which is that of base64: 6 bits of entropy each."""
    return binascii.b2a_base64(entropy(characters * 6 // 8), newline=False).decode()
