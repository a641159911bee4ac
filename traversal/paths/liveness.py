"""Is the path that we send on still there? Suspicion from silence, certainty from a burst of Pings.

A stock node notices a dead path when its trust of 6.5 s runs out: 3.5 to 6.5 s of lost traffic. We
look earlier. While we send and nothing comes back for 0.3 s, or when a heartbeat stays unanswered
for three round trips, a burst of three Pings goes out; only if none of them is answered either is
the path in doubt, and from then on every packet also goes by the relay. A one-way flow therefore
costs a Ping per 0.5 s (three when the round trip is long) and is otherwise untouched: the Pongs
vouch for it. Stock nodes answer every Ping, so nothing is asked of them that they do not do anyway.

Data that comes back only calms the suspicion; it does not extend trust, since it is known by its
source address alone, which anybody can forge. Nor does it tell that what we send arrives: a path
may die in one direction only. So traffic that has flowed for 0.5 s without an authenticated answer
leads to a burst, too, whatever comes back: a Ping per 0.5 s while traffic flows. Single datagrams,
more than 0.3 s apart, have only the heartbeats to tell on them; few are lost in 3 s.
"""

from __future__ import annotations

import math
from typing import Final

TICK_SECONDS: Final = 0.1
"""How often the counters are compared while there is traffic; nothing runs when there is none."""
SUSPECT_AFTER_SECONDS: Final = 0.15
"""Two ticks after the one that first saw sending without return: 0.2 to 0.3 s of silence."""
UNANSWERED_SECONDS: Final = 0.5
PAUSE_SECONDS: Final = 0.3
"""After a pause this long traffic begins anew."""
QUIET_AFTER_SECONDS: Final = 1.0
BURST: Final = 3
"""Pings of a burst: at 20 % loss of round trips, all three are lost once in 125 bursts, and then
the price is some duplicates by the relay until the next Pong."""
MIN_BURST_INTERVAL_SECONDS: Final = 0.5
LONG_RTT_SECONDS: Final = 0.15
"""Up to this round trip the second Ping waits for the answer to the first and is mostly spared.
Beyond it there is no time for that: with 300 ms the verdict comes 0.9 s after the path died."""
_GAP_SECONDS: Final = 0.04


class Liveness:
    """Compares what was sent with what came back, on a tick."""

    def __init__(self) -> None:
        self._sent = 0
        self._received = 0
        self._silent_since = math.inf
        self._unanswered_since = math.inf
        self._sent_at = -math.inf
        self._quiet_since = -math.inf
        self._burst_allowed_at = -math.inf
        self._burst_began_at = -math.inf
        self._burst_left = 0
        self._burst_next_at = math.inf
        self._verdict_at = math.inf
        self._first_gap_seconds = 0.0

    @property
    def is_confirming(self) -> bool:
        """Whether a burst is under way."""
        return self._verdict_at != math.inf

    def next_deadline(self) -> float:
        """When `poll_burst` or `poll_verdict` has something to say; infinity for never."""
        return min(self._burst_next_at, self._verdict_at)

    def handle_answer(self, pinged_at: float = math.inf) -> None:
        """All is well: a Pong came for the Ping of `pinged_at`, or we begin anew.

        What was sent after that Ping is still unanswered, which counts when the way is long: a Pong
        for an older Ping than the burst's ends the burst, but the next one need not wait.
        """
        if self.is_confirming and pinged_at < self._burst_began_at:
            self._burst_allowed_at = -math.inf
        self._silent_since = math.inf
        self._unanswered_since = pinged_at
        self._burst_left = 0
        self._burst_next_at = self._verdict_at = math.inf

    def handle_tick(self, sent: int, received: int, now: float) -> tuple[bool, bool]:
        """Compare counters. Returns whether anything was sent, and whether the path is suspect."""
        has_sent = sent != self._sent
        if received != self._received:
            self._silent_since = math.inf
            self._quiet_since = now
        elif has_sent:
            self._silent_since = min(self._silent_since, now)
            self._quiet_since = now
        self._sent, self._received = sent, received
        is_unanswered = has_sent and self._note_flow(now)
        return has_sent, is_unanswered or now - self._silent_since >= SUSPECT_AFTER_SECONDS

    def _note_flow(self, now: float) -> bool:
        """Something was sent; whether traffic has flowed for too long without an answer."""
        is_new = now - self._sent_at > PAUSE_SECONDS
        self._unanswered_since = now if is_new else min(self._unanswered_since, now)
        self._sent_at = now
        return now - self._unanswered_since >= UNANSWERED_SECONDS

    def is_quiet(self, now: float) -> bool:
        """Whether ticks may stop: nothing moves, and nothing sent is unanswered."""
        return self._silent_since == math.inf and now - self._quiet_since >= QUIET_AFTER_SECONDS

    def start_burst(self, rtt_seconds: float, now: float) -> None:
        """Find out, unless a burst is under way or one was answered a moment ago."""
        if self.is_confirming or now < self._burst_allowed_at:
            return
        self._burst_began_at = now
        self._burst_allowed_at = now + MIN_BURST_INTERVAL_SECONDS
        is_long = rtt_seconds > LONG_RTT_SECONDS
        self._first_gap_seconds = _GAP_SECONDS if is_long else max(1.1 * rtt_seconds, 0.05)
        patience = min(1.1 * rtt_seconds + 0.05, 0.8)
        self._burst_left = BURST
        self._burst_next_at = now
        last_at = now + self._first_gap_seconds + (BURST - 2) * _GAP_SECONDS
        self._verdict_at = last_at + patience

    def poll_burst(self, now: float) -> bool:
        """Whether to send a Ping of the burst now."""
        if now < self._burst_next_at:
            return False
        self._burst_left -= 1
        gap = self._first_gap_seconds if self._burst_left == BURST - 1 else _GAP_SECONDS
        self._burst_next_at = now + gap if self._burst_left else math.inf
        return True

    def poll_verdict(self, now: float) -> bool:
        """True once when the burst went unanswered: the path is in doubt."""
        if now < self._verdict_at:
            return False
        self.handle_answer()
        return True
