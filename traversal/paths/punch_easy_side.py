"""The search from in front of the hard NAT: probe where the peer's plan says its sockets are.

All probes leave by the node's ordinary socket, so that the NAT in front of us opens towards each
port guessed, and the peer's answer to the one that met comes through.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from traversal.keys import Entropy
from traversal.paths.port_guess import guesses, size_of
from traversal.paths.punch_outbox import BURST, Outbox
from traversal.paths.punch_search import Search
from traversal.paths.punch_strategy import is_far_source
from traversal.wire.address import Address
from traversal.wire.punching import PunchMessage, PunchMethod

PASSES: Final = 3
"""How often a small range is probed: a lost packet should not cost a whole birthday search."""
PASS_SECONDS: Final = 0.3
GRACE_SECONDS: Final = 4.0
"""After the last probe: for its answer, and for a wider plan in place of one that failed."""
STOP_GRACE_SECONDS: Final = 1.5
"""After the peer found a path: its Pong, or its Ping and our own machine's, which takes longer."""
PLAN_PATIENCE_SECONDS: Final = 3.0
"""For a plan after we asked: opening and measuring take the peer half a second."""


class EasySide(Search):
    """The attempt of the easy side; it waits for a plan."""

    def __init__(self, entropy: Entropy, outbox: Outbox, now: float) -> None:
        super().__init__(entropy, outbox)
        self.method = PunchMethod.NONE
        self._deadline = now + PLAN_PATIENCE_SECONDS
        self._host = ""
        self._guesses: Iterator[int] = iter(())
        self._again: tuple[int, ...] = ()
        self._passes_left = 0

    def handle_message(self, message: PunchMessage, now: float) -> None:
        """Probe as the plan says; a second one replaces the first."""
        if not is_far_source(message.source) or not message.ranges:
            return
        assert message.source is not None
        self.method = message.method
        self.socket_count = 0
        self.outbox.clear()
        self._host = message.source.host
        step = message.step if message.method is PunchMethod.PREDICTED else 0
        self._guesses = guesses(message.ranges, self._entropy, step=step)
        is_small = sum(map(size_of, message.ranges)) <= self.outbox.room // (2 * PASSES)
        self._again = tuple(self._guesses) if is_small else ()
        self._passes_left = PASSES - 1 if is_small else 0
        if is_small:
            self._guesses = iter(self._again)
        self._deadline = now + GRACE_SECONDS
        self.on_time(now)

    def handle_stop(self, found: Address | None, now: float) -> None:
        """The peer found a path: probe only there, in case a packet of the peer's was lost."""
        self.outbox.clear()
        self._guesses = iter(())
        self._passes_left = 0
        self._deadline = now + STOP_GRACE_SECONDS
        if found is not None and found.host == self._host and not self.is_confirming:
            self._hits.append((None, found, b""))
            self._start_confirming(now)

    def on_time(self, now: float) -> None:
        """Do what is due."""
        self._fill(now)
        super().on_time(now)
        self._fill(now)

    def _fill(self, now: float) -> None:
        """Keep a burst ready; the rest of the guesses is made when it is needed."""
        if self.ending is not None or not self.outbox.is_empty or self.outbox.room <= 0:
            return
        for _ in range(BURST):
            port = next(self._guesses, None)
            if port is None:
                return
            self.outbox.enqueue_probe(None, Address(self._host, port))
            self._deadline = now + (PASS_SECONDS if self._passes_left else GRACE_SECONDS)

    def _handle_deadline(self, now: float) -> None:
        if self._passes_left:
            self._passes_left -= 1
            self._guesses = iter(self._again)
            self._deadline = now + GRACE_SECONDS
            self._fill(now)
        elif not self._host:
            self._give_up("the peer did not say where to probe")
        else:
            self._give_up(f"none of {self.outbox.sent} probes met a port of the peer's NAT")
