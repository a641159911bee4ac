"""When an introduction is believed, answered and repeated.

The relay carries introductions and could replay old ones, so the newest is not enough: a node that
restarted with its clock or counter reset must be heard again, a recording of its former life must
not. Every node draws a random session at its start. An introduction that echoes *our* session was
made after we began: it is fresh, unless it comes from a session that another one has replaced
since. One that does not is believed only if it contradicts
nothing (we know no session of the peer yet, or it is the same session with a higher serial);
otherwise we answer with ours and ask for another, which a replayer cannot make.

The exchange: A sends with "answer wanted"; B believes or not, answers with A's session echoed; if
B did not believe, its answer says "answer wanted" and A's reply, which echoes B's session, is
believed. No answer is ever given to one that did not want it, so there is no storm.

Order of calls: `handle_introduction`, then send what it returned; `poll_introduction(now)` when
`next_deadline()` has come.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

from traversal.keys import Entropy
from traversal.wire.introduction import SESSION_LENGTH, Introduction

FIRST_RETRY_SECONDS: Final = 0.5
"""A relay's round trip is below this nearly everywhere, and a lost first packet (the peer's relay
connection was just opening) should cost less than a person notices."""
MAX_RETRY_SECONDS: Final = 30.0
"""A peer that is off line is asked twice a minute: its own introduction finds us anyway."""
MIN_ANSWER_INTERVAL_SECONDS: Final = 0.2
"""Answers per peer; honest exchanges need two in a row at most."""
MAX_RETIRED: Final = 64
"""Former sessions of a peer remembered while we run. Beyond that the oldest could be replayed, at
the cost of one more exchange until the living peer is believed again."""

Describe = Callable[[], Introduction]
"""Makes an introduction of this node as it is now; session, echo, serial and wants_answer in it
are filled in here."""


def new_session(entropy: Entropy) -> bytes:
    """Eight random bytes that are not all zero."""
    session = entropy(SESSION_LENGTH)
    return session if any(session) else b"\x01" * SESSION_LENGTH


@dataclass(frozen=True, slots=True)
class Outcome:
    """What an introduction led to: the one to believe, and the one to send, if any."""

    believed: Introduction | None
    answer: Introduction | None


class Introducer:
    """The introduction with one peer."""

    def __init__(self, session: bytes, describe: Describe) -> None:
        self._session = session
        self._describe = describe
        self._serial = 0
        self._peer_session: bytes | None = None
        self._peer_serial = -1
        self._heard_session: bytes | None = None
        self._retired: dict[bytes, None] = {}
        self._retry_at = math.inf
        self._retry_seconds = FIRST_RETRY_SECONDS
        self._may_answer_at = -math.inf

    @property
    def is_introduced(self) -> bool:
        """Whether an introduction of the peer was believed."""
        return self._peer_session is not None

    def start(self, now: float) -> None:
        """Begin to introduce ourselves, at once and again until the peer answers."""
        self._retry_at = now
        self._retry_seconds = FIRST_RETRY_SECONDS

    def next_deadline(self) -> float:
        """When to call `poll_introduction`; infinity for never."""
        return self._retry_at

    def poll_introduction(self, now: float) -> Introduction | None:
        """The introduction that is due, if any."""
        if now < self._retry_at:
            return None
        self._retry_at = now + self._retry_seconds
        self._retry_seconds = min(2 * self._retry_seconds, MAX_RETRY_SECONDS)
        return self._make(wants_answer=True)

    def handle_introduction(self, introduction: Introduction, now: float) -> Outcome:
        """Judge one that was opened with the peer's node key."""
        if introduction.session in self._retired or introduction.session == self._session:
            # A former life of the peer; or our own words sent back: the box between two keys is
            # the same in both directions.
            return Outcome(None, None)
        self._heard_session = introduction.session
        is_fresh = introduction.echoed_session == self._session
        if introduction.session == self._peer_session:
            # Replays inside a session are out of order at best.
            is_believed = introduction.serial > self._peer_serial
        else:
            is_believed = is_fresh or self._peer_session is None
        if is_believed:
            self._retire(introduction.session)
            self._peer_session = introduction.session
            self._peer_serial = introduction.serial
        if is_fresh:
            self._retry_at = math.inf
        answer = None
        wants_proof = not is_believed and introduction.session != self._peer_session
        if (introduction.wants_answer or wants_proof) and now >= self._may_answer_at:
            self._may_answer_at = now + MIN_ANSWER_INTERVAL_SECONDS
            answer = self._make(wants_answer=wants_proof)
        return Outcome(introduction if is_believed else None, answer)

    def _retire(self, successor: bytes) -> None:
        """A former life that spoke with us echoed our session too: never believe it again."""
        if self._peer_session is not None and self._peer_session != successor:
            if len(self._retired) == MAX_RETIRED:
                del self._retired[next(iter(self._retired))]
            self._retired[self._peer_session] = None

    def _make(self, *, wants_answer: bool) -> Introduction:
        self._serial += 1
        return replace(
            self._describe(),
            session=self._session,
            echoed_session=self._heard_session,
            serial=self._serial,
            wants_answer=wants_answer,
        )
