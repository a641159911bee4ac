"""The path in use: which it is, how long it is trusted, when it is given up, left or taken back."""

from __future__ import annotations

import math
from typing import Final

from traversal.keys import DiscoPublic
from traversal.paths.candidates import Candidate
from traversal.paths.liveness import TICK_SECONDS, Liveness
from traversal.paths.mtu import MtuSearch
from traversal.paths.pinger import PING_TIMEOUT_SECONDS
from traversal.paths.scoring import Path, is_better

TRUST_SECONDS: Final = 6.5
"""Path selection specification 2."""
RECOVERY_FOR_SECONDS: Final = 60.0
"""A path that died is looked after for this long; then the ordinary search has to do."""
SECOND_CHANCE_SECONDS: Final = 60.0
"""A path that was left for its loss, when another took its place, may compete again after this."""
VOUCHED_SECONDS: Final = 3.0
"""Authenticated data this recent outweighs a lost heartbeat."""
_GENEVE_BYTES: Final = 8


class PathChoice:
    """The best path of one peer, direct or by a peer relay, and the one that died last.

    `best` is untrusted from `trusted_until` on; a shelved one works but loses too much. `liveness`
    and `mtu` belong to `best` and begin anew with it.
    """

    def __init__(self, ceiling_bytes: int | None, *, is_edge_first: bool = False) -> None:
        self.best: Candidate | None = None
        self.trusted_until = -math.inf
        self.liveness = Liveness()
        self.mtu: MtuSearch | None = None
        self._ceiling_bytes = ceiling_bytes
        self.is_edge_first = is_edge_first
        self.server: DiscoPublic | None = None
        self._vouched_at = -math.inf
        self._lost: Candidate | None = None
        self._lost_at = -math.inf

    @property
    def is_final(self) -> bool:
        """Whether `best` is of the kind that is wanted most: no other kind is looked for then."""
        best = self.best
        if best is None:
            return False
        return self.is_edge_first if best.path.is_edge else not best.path.vni

    def is_trusted(self, now: float) -> bool:
        """Whether `best` is set and has been answering."""
        return self.best is not None and now < self.trusted_until

    def is_mute(self, now: float) -> bool:
        """Whether `best` has been silent for as long as a Ping may take: dead, not lossy."""
        return self.best is None or now - self.best.answered_at >= PING_TIMEOUT_SECONDS

    def is_dead(self, now: float) -> bool:
        """Whether `best` is to be given up. Never while it is shelved: no traffic goes there, and
        its history must not be forgotten because of one bad stretch."""
        best = self.best
        is_out = best is not None and not best.is_shelved and not self.is_trusted(now)
        return is_out and self.is_mute(now)

    def is_loss_in_question(self, now: float) -> bool:
        """Whether more heartbeats than usual would tell something about the loss of `best`."""
        best = self.best
        if best is None or self.is_mute(now):
            return False
        return best.is_shelved or best.loss.is_suspicious

    def recovery_target(self, now: float) -> Candidate | None:
        """The path to ping often, because it should be back soon: in doubt, or just dead."""
        if self.best is not None and not self.best.is_shelved and not self.is_trusted(now):
            return self.best
        return self._lost if now - self._lost_at < RECOVERY_FOR_SECONDS else None

    def take(self, candidate: Candidate, now: float, server: DiscoPublic | None = None) -> None:
        """Make `candidate`, which just answered, the best path."""
        self.clear()
        self.best, self.server = candidate, server
        self._lost = None
        self.trusted_until = now + TRUST_SECONDS
        if self._ceiling_bytes is not None and not candidate.path.is_edge:
            self.mtu = MtuSearch(
                is_ipv6=candidate.path.address.is_ipv6,
                ceiling_bytes=self._ceiling_bytes,
                now=now,
                geneve_bytes=_GENEVE_BYTES if candidate.path.vni else 0,
            )

    def clear(self) -> None:
        """Have no best path."""
        if self.best is not None and not self.best.is_shelved:
            self.best.loss.clear()
        self.best = self.server = self.mtu = None
        self.trusted_until = self._vouched_at = -math.inf
        self.liveness.handle_answer()

    def forget(self) -> None:
        """Have no best path and look after none: our own network changed."""
        self.clear()
        self._lost = None

    def lose(self, now: float) -> None:
        """The best path is dead beyond doubt."""
        best = self.best
        self.clear()
        if best is not None and not best.path.vni:
            # Dead is not lossy: when it answers again it is as good as new.
            best.loss.clear()
            self._lost, self._lost_at = best, now

    def doubt(self, now: float) -> None:
        """End the trust in the best path."""
        self.trusted_until = now

    def vouch(self, path: Path, now: float) -> bool:
        """Authenticated data came from `path`; whether that is news about the best path."""
        best = self.best
        if best is None or best.path != path or best.is_shelved:
            return False
        if now - self._vouched_at < TICK_SECONDS:
            return False
        self.liveness.handle_answer()
        self._vouched_at = now
        self.trusted_until = max(self.trusted_until, now + TRUST_SECONDS)
        return True

    def handle_answer(
        self, candidate: Candidate, padding_bytes: int, pinged_at: float, now: float
    ) -> str:
        """The Ping to `candidate` that left at `pinged_at` was answered.

        Returns why the route may have changed.
        """
        if candidate is not self.best:
            if not self._is_preferable(candidate, now):
                return ""
            self.take(candidate, now)
            return f"{candidate.path} answers"
        self.liveness.handle_answer(pinged_at)
        self.trusted_until = now + TRUST_SECONDS
        if padding_bytes and self.mtu is not None:
            self.mtu.handle_answer(padding_bytes, now)
            candidate.wire_mtu_bytes = self.mtu.proven_bytes
        if candidate.is_shelved and candidate.loss.is_healed:
            candidate.shelved_at = None
            candidate.loss.clear()
            return f"{candidate.path} has healed"
        return f"{candidate.path} answers"

    def handle_relay_ready(self, candidate: Candidate, server: DiscoPublic, now: float) -> bool:
        """A peer relay is ready; whether it became the best path."""
        is_same_server = self.best is not None and server == self.server is not None
        if not is_same_server and not self._is_preferable(candidate, now):
            return False
        self.take(candidate, now, server)
        return True

    def handle_lost_heartbeat(self, candidate: Candidate, now: float, *, has_relay: bool) -> str:
        """A heartbeat is overdue: note it, leave the path if it is bad and a relay is there, else
        find out quickly whether it is dead. Returns why the route changed, if it did."""
        if now - self._vouched_at < VOUCHED_SECONDS:
            return ""
        candidate.loss.record(is_answered=False)
        if candidate is not self.best or candidate.is_shelved:
            return ""
        if candidate.loss.is_bad and has_relay and not self.is_mute(now):
            candidate.shelved_at = now
            self.liveness.handle_answer()
            return f"{candidate.path} loses too much ({candidate.loss.ratio:.0%} of heartbeats)"
        if self.is_trusted(now):
            self.liveness.start_burst(candidate.patient_rtt_seconds, now)
        return ""

    def _is_preferable(self, candidate: Candidate, now: float) -> bool:
        if candidate.shelved_at is not None:
            if now - candidate.shelved_at < SECOND_CHANCE_SECONDS:
                return False
            candidate.shelved_at = None
            candidate.loss.clear()
        best = self.best
        if best is None or best.is_shelved or not self.is_trusted(now):
            return True
        if self.is_edge_first and candidate.path.is_edge != best.path.is_edge:
            return candidate.path.is_edge
        return is_better(candidate.measured(), best.measured())
