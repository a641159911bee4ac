"""One attempt: which search runs, why, and which of the peer's plans it follows."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Final

from traversal.keys import Entropy
from traversal.paths.punch_channel import PunchChannel
from traversal.paths.punch_easy_side import EasySide
from traversal.paths.punch_facts import PunchFacts, Strategy
from traversal.paths.punch_hard_side import HardSide
from traversal.paths.punch_mutual import MutualSide
from traversal.paths.punch_outbox import Outbox
from traversal.wire.address import Address
from traversal.wire.punching import PunchMessage, PunchMethod

_PLANNED: Final = {
    PunchMethod.BIRTHDAY: Strategy.BIRTHDAY_EASY,
    PunchMethod.PREDICTED: Strategy.PREDICTED,
}


@dataclass(slots=True, eq=False)
class Attempt:
    """A running search. `number` is that of punch messages, 0 until a plan names one;
    `ask_again_at` is when to repeat the request for a plan."""

    search: HardSide | EasySide | MutualSide
    strategy: Strategy
    started_at: float
    number: int = 0
    ask_again_at: float = math.inf

    @property
    def current_strategy(self) -> Strategy:
        """What runs now: a plan says what is asked of us, and a failed prediction widens."""
        search = self.search
        if isinstance(search, EasySide):
            return _PLANNED.get(search.method, self.strategy)
        if self.strategy is Strategy.PREDICTED and search.method is PunchMethod.BIRTHDAY:
            return Strategy.BIRTHDAY_HARD
        return self.strategy

    @property
    def lesson(self) -> Strategy:
        """What to remember if this succeeds: on the easy side the peer decides the rest."""
        is_easy = isinstance(self.search, EasySide)
        return Strategy.BIRTHDAY_EASY if is_easy else self.current_strategy

    def describe(self, facts: PunchFacts, now: float) -> PunchFacts:
        """The facts with what this attempt has cost up to now."""
        return replace(
            facts,
            strategy=self.current_strategy,
            sockets=self.search.socket_count,
            probes=self.search.outbox.sent,
            calls=self.search.calls_sent,
            seconds=now - self.started_at,
        )

    def follows(self, message: PunchMessage, *, leads: bool) -> bool:
        """Whether a plan concerns this attempt, or begins one that goes before it.

        When both sides lead a mutual search at once, the one that `leads` goes on.
        """
        is_mutual = message.method is PunchMethod.MUTUAL
        if isinstance(self.search, HardSide):
            return False
        if isinstance(self.search, EasySide):
            return not is_mutual and self.number in (0, message.attempt)
        if not is_mutual or message.attempt == self.number:
            return is_mutual
        return self.search.is_leader and not leads


def attempt_hard(
    entropy: Entropy,
    outbox: Outbox,
    channel: PunchChannel,
    strategy: Strategy,
    target: Address,
    max_sockets: int,
    now: float,
) -> Attempt:
    """From behind our hard NAT towards `target`."""
    number = draw_number(entropy)
    search = HardSide(
        entropy,
        outbox,
        channel.own,
        target,
        tell=partial(channel.tell, number),
        is_predictable=strategy is not Strategy.BIRTHDAY_HARD,
        normal_addresses=channel.own.listed if strategy is Strategy.INDUCED else None,
        max_sockets=max_sockets,
    )
    search.start()
    return Attempt(search, strategy, now, number)


def attempt_mutual(
    entropy: Entropy,
    outbox: Outbox,
    channel: PunchChannel,
    max_sockets: int,
    now: float,
    *,
    number: int,
    is_leader: bool,
) -> Attempt:
    """Between two hard NATs."""
    search = MutualSide(
        entropy,
        outbox,
        is_leader=is_leader,
        tell=partial(channel.tell, number),
        max_sockets=max_sockets,
    )
    search.start()
    return Attempt(search, Strategy.MUTUAL, now, number)


def draw_number(entropy: Entropy) -> int:
    """A number for an attempt that we plan, never 0."""
    return int.from_bytes(entropy(4), "big") or 1
