"""The searches that guess ports: behind the hard NAT, in front of it, and between two hard ones.

Each is a machine without clock or sockets for one attempt, driven by `traversal.paths.punching`:
feed `handle_*`, call `on_time` when `next_deadline` has come, carry out `poll_effects`, and stop as
soon as `ending` is set.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final, Protocol

from traversal.keys import Entropy
from traversal.paths.punch_effects import PunchEffect, SendProbePong
from traversal.paths.punch_outbox import Outbox
from traversal.wire.address import Address
from traversal.wire.punching import PortRange, PunchKind, PunchMessage, PunchMethod

CONFIRM_SECONDS: Final = 0.3
"""Between Pings that confirm a hit; a round trip is shorter nearly everywhere."""
MAX_CONFIRMS: Final = 4
MAX_HITS: Final = 16
"""Hits kept while the first is being confirmed; a search expects ten at most."""


class Tell(Protocol):
    """Makes the effect that sends a punch message; the caller fills in sessions and our NAT."""

    def __call__(
        self,
        kind: PunchKind,
        method: PunchMethod = PunchMethod.NONE,
        *,
        sockets: int = 0,
        address: Address | None = None,
        source: Address | None = None,
        ranges: tuple[PortRange, ...] = (),
    ) -> PunchEffect: ...


@dataclass(frozen=True, slots=True)
class Found:
    """A working pair: our socket (None for the ordinary one), where the peer is seen from it, how
    the peer sees it, and the round trip."""

    socket: int | None
    remote: Address
    own_address: Address
    latency_seconds: float


@dataclass(frozen=True, slots=True)
class GaveUp:
    """The search ended without a path; a sentence that says why."""

    why: str


class Search:
    """What all searches share: the outbox, the extra sockets and the confirmation of a hit.

    A Ping that arrives on an extra socket is a hit. It is answered, and a Ping of ours must be
    answered in turn before the pair counts. A Pong to one of the first Pings proves the same.
    Further hits wait, unanswered, so that both sides take the same pair.
    """

    def __init__(self, entropy: Entropy, outbox: Outbox) -> None:
        self.ending: Found | GaveUp | None = None
        self.socket_count = 0
        self.calls_sent = 0
        self.outbox = outbox
        self._entropy = entropy
        self._effects: list[PunchEffect] = []
        self._hits: list[tuple[int | None, Address, bytes]] = []
        self._confirms = 0
        self._confirm_at = math.inf
        self._deadline = math.inf

    # ---- poll

    def poll_effects(self) -> list[PunchEffect]:
        """Everything to do since the last call, in order."""
        effects, self._effects = self._effects, []
        return effects

    def next_deadline(self) -> float:
        """When to call `on_time` at the latest."""
        if self.ending is not None:
            return math.inf
        return min(self.outbox.next_deadline(), self._confirm_at, self._deadline)

    def on_time(self, now: float) -> None:
        """Do what is due."""
        if self.ending is None and now >= self._confirm_at:
            self._confirm(now)
        if self.ending is None and now >= self._deadline:
            self._handle_deadline(now)
        if self.ending is None:
            self._effects += self.outbox.poll(now)

    # ---- feed

    def handle_opened(self, ports: tuple[int, ...], now: float) -> None:
        """The sockets asked for are open, or as many as the system had."""

    def handle_mapping(self, socket: int, address: Address, now: float) -> None:
        """A STUN server sees an extra socket at this address."""

    def handle_message(self, message: PunchMessage, now: float) -> None:
        """A plan of the peer for this attempt."""

    def handle_ping(self, socket: int, transaction_id: bytes, source: Address, now: float) -> None:
        """A Ping of the peer, authenticated, came on an extra socket."""
        if self.ending is not None or len(self._hits) >= MAX_HITS:
            return
        if self._hits and self._hits[0][:2] == (socket, source):
            self._effects.append(SendProbePong(socket, source, transaction_id))
            return
        self._hits.append((socket, source, transaction_id))
        if len(self._hits) == 1:
            self._start_confirming(now)

    def handle_pong(self, transaction_id: bytes, seen_as: Address, now: float) -> bool:
        """A Pong of the peer, authenticated; whether it answered a probe of this search."""
        probe = self.outbox.take(transaction_id)
        if probe is None:
            return False
        socket, remote = probe.socket, probe.address
        if self.ending is None and (not self._hits or self._hits[0][:2] == (socket, remote)):
            self.ending = Found(socket, remote, seen_as, now - probe.sent_at)
        elif self.ending is None and socket is not None and len(self._hits) < MAX_HITS:
            self._hits.append((socket, remote, b""))
        return True

    def handle_stop(self, found: Address | None, now: float) -> None:
        """The peer found a path in this attempt, where it is seen as `found`: its last packets to
        us are on their way."""

    # ---- for the kinds of search

    @property
    def is_confirming(self) -> bool:
        """Whether a hit is being confirmed: nothing new should be tried meanwhile."""
        return bool(self._hits)

    def _handle_deadline(self, now: float) -> None:
        raise NotImplementedError

    def _give_up(self, why: str) -> None:
        self.ending = GaveUp(why)

    def _start_confirming(self, now: float) -> None:
        socket, source, transaction_id = self._hits[0]
        if socket is not None and transaction_id:
            self._effects.append(SendProbePong(socket, source, transaction_id))
        self._confirms = 0
        self._confirm(now)

    def _confirm(self, now: float) -> None:
        if self._confirms < MAX_CONFIRMS:
            socket, source, _ = self._hits[0]
            self._confirms += 1
            self._confirm_at = now + CONFIRM_SECONDS
            self._effects.append(self.outbox.probe_now(socket, source, now))
            return
        self._confirm_at = math.inf
        self._hits = [hit for hit in self._hits if hit[:2] != self._hits[0][:2]]
        if self._hits:
            self._start_confirming(now)
