"""The search between two hard NATs that both pick ports in order.

Each guess takes a port of the guesser's own NAT, so two sides that both scan shift their targets
for ever (Klinec and Matyas; NAT behaviours 8). So nobody scans: each side bets all its sockets on
*one* port that the other NAT will soon give out, `LEAD` steps beyond the last known one. A round:

1. the leader measures its NAT's last port and tells it;
2. the follower measures its own, tells it, and lets all sockets ping the leader's bet;
3. the leader, at that, lets all its sockets ping the follower's bet.

Of 64 sockets one gets the bet port itself, unless a foreign flow took it. So a round succeeds
unless one of two bets was lost: with f foreign flows among 64 on each side, (64 / (64 + f)) ** 2;
50 new flows a second behind each NAT (4 in the 0.07 s of a bet) leave 89 % per round, and 99.8 % in
three.
"""

from __future__ import annotations

import math
from typing import Final

from traversal.keys import Entropy
from traversal.paths.port_guess import MAX_SOCKETS
from traversal.paths.punch_effects import OpenSockets
from traversal.paths.punch_outbox import Outbox
from traversal.paths.punch_search import Search, Tell
from traversal.paths.punch_strategy import is_far_source
from traversal.wire.address import Address
from traversal.wire.punching import PunchKind, PunchMessage, PunchMethod

BETTING_SOCKETS: Final = 64
LEAD: Final = 40
"""Steps from the measured port to the bet. Up to 39 foreign flows may come between measuring and
betting (0.3 s at 130 a second), and 24 sockets are left for those that come among ours."""
MAX_ROUNDS: Final = 5
REPEATS_SECONDS: Final = (0.2, 0.5)
"""After the bet: the same pings again, since the first of the side that bet earlier found the
other's NAT closed. They take no new ports."""
ROUND_SECONDS: Final = 0.9
REPLY_SECONDS: Final = 1.2
"""For the other side's half of a round: relay twice and a measurement."""
FOLLOWER_PATIENCE_SECONDS: Final = 3.5


class MutualSide(Search):
    """One side's half of the search."""

    def __init__(
        self,
        entropy: Entropy,
        outbox: Outbox,
        *,
        is_leader: bool,
        tell: Tell,
        max_sockets: int = MAX_SOCKETS,
    ) -> None:
        super().__init__(entropy, outbox)
        self.is_leader = is_leader
        self.method = PunchMethod.MUTUAL
        self._tell = tell
        self._max_sockets = max_sockets
        self._count = 0
        self._betting = 0
        self._rounds = 0
        self._peer_plan: PunchMessage | None = None
        self._bet: Address | None = None
        self._bet_at = math.inf
        self._repeats: list[float] = []

    def start(self) -> None:
        """Open all sockets: one per round measures, since a second packet from the same one would
        see its first mapping again."""
        self._effects.append(OpenSockets(min(BETTING_SOCKETS + MAX_ROUNDS, self._max_sockets)))

    def handle_opened(self, ports: tuple[int, ...], now: float) -> None:
        """Begin the first round, or answer it."""
        self._count = self.socket_count = len(ports)
        self._betting = self._count - MAX_ROUNDS
        if self._betting < BETTING_SOCKETS // 2:
            self._give_up(f"{self._count} sockets are too few for two hard NATs")
        elif self.is_leader or self._peer_plan is not None:
            self._measure(now)

    def handle_mapping(self, socket: int, address: Address, now: float) -> None:
        """Our NAT's last port: tell it, and as the follower bet at once."""
        if socket != self._betting + self._rounds - 1 or self._bet is not None:
            return
        self._effects.append(
            self._tell(PunchKind.PLAN, PunchMethod.MUTUAL, sockets=self._betting, address=address)
        )
        if self.is_leader:
            self._deadline = now + REPLY_SECONDS
        else:
            self._place_bet(now)

    def handle_message(self, message: PunchMessage, now: float) -> None:
        """The other side's last port."""
        if not is_far_source(message.address) or not message.step or self.is_confirming:
            return
        self._peer_plan = message
        if self.is_leader:
            if self._bet is None:
                self._place_bet(now)
        elif self._count:
            self._measure(now)

    def next_deadline(self) -> float:
        """When to call `on_time` at the latest."""
        deadline = super().next_deadline()
        if self.ending is None and self._repeats:
            deadline = min(deadline, self._repeats[0])
        return deadline

    def on_time(self, now: float) -> None:
        """Do what is due."""
        if self._repeats and now >= self._repeats[0]:
            del self._repeats[0]
            self._ping_bet()
        super().on_time(now)

    def _handle_deadline(self, now: float) -> None:
        if self.is_confirming:
            self._deadline = self._confirm_at
        elif not self.is_leader:
            self._give_up("the peer began no further round")
        elif self._rounds < MAX_ROUNDS:
            self._measure(now)
        else:
            self._give_up(f"{self._rounds} rounds, and foreign flows took one of both bets in each")

    def _measure(self, now: float) -> None:
        if self._rounds >= MAX_ROUNDS:
            self._give_up(f"{self._rounds} rounds, and foreign flows took one of both bets in each")
            return
        self.outbox.clear()
        self._repeats = []
        self._bet = None
        self.outbox.enqueue_measurement(self._betting + self._rounds)
        self._rounds += 1
        self._effects += self.outbox.poll(now)
        self._deadline = now + (REPLY_SECONDS if self.is_leader else FOLLOWER_PATIENCE_SECONDS)

    def _place_bet(self, now: float) -> None:
        plan = self._peer_plan
        assert plan is not None
        assert plan.address is not None
        port = plan.address.port + plan.step * LEAD
        # Near either end the NAT wraps around somewhere we do not know; the next round will do.
        if not 0 < port < 65536:
            self._deadline = now + ROUND_SECONDS
            return
        self._bet = Address(plan.address.host, port)
        self._ping_bet()
        self._effects += self.outbox.poll(now)
        self._repeats = [now + seconds for seconds in REPEATS_SECONDS]
        self._deadline = now + (ROUND_SECONDS if self.is_leader else FOLLOWER_PATIENCE_SECONDS)

    def _ping_bet(self) -> None:
        if self._bet is not None and not self.is_confirming:
            for socket in range(self._betting):
                self.outbox.enqueue_probe(socket, self._bet)
