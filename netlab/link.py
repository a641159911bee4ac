"""One direction of a link as a sans-IO object: when does a packet arrive, if at all? Pure.

`LinkDirection.send(now, size_bytes)` answers with the arrival times of the copies, or a `Drop`.
The order of effects is that of a modem: too big, lost in a bad period, lost, queued and clocked
out at the rate, delayed, duplicated.
"""

from __future__ import annotations

import random

from netlab.behavior import Link
from netlab.drops import Answer, Drop, DropReason


class LinkDirection:
    """The state of one direction: its queue, its bad period, its random draws.

    Call `send` in the order of `now`. `link` and `up` may be changed at any time.
    """

    def __init__(self, link: Link, generator: random.Random) -> None:
        self._generator = generator
        self._free_at = 0.0
        self._bad_until = 0.0
        self._last_arrival = 0.0
        self.up = True
        self.link = link

    @property
    def link(self) -> Link:
        return self._link

    @link.setter
    def link(self, link: Link) -> None:
        self._link = link
        self._is_plain = not (
            link.jitter_seconds
            or link.loss
            or link.burst_probability
            or link.duplication
            or link.rate_bits_per_second
        )

    def send(self, now: float, size_bytes: int) -> tuple[float, ...] | Drop:
        """Return the arrival times of a packet handed in at `now`, all at or after it."""
        link = self._link
        if not self.up:
            return Drop(DropReason.LINK_DOWN)
        if size_bytes > link.mtu_bytes:
            answer = Answer.NONE if link.mtu_black_hole else Answer.TOO_BIG
            return Drop(DropReason.TOO_BIG, answer, f"{size_bytes} > {link.mtu_bytes} bytes")
        if self._is_plain:
            return (now + link.delay_seconds,)
        return self._send_impaired(now, size_bytes)

    def _send_impaired(self, now: float, size_bytes: int) -> tuple[float, ...] | Drop:
        link = self._link
        chance = self._generator.random
        if now < self._bad_until:
            if link.burst_loss >= 1.0 or chance() < link.burst_loss:
                return Drop(DropReason.BURST)
        elif link.burst_probability and chance() < link.burst_probability:
            self._bad_until = now + link.burst_seconds
            return Drop(DropReason.BURST)
        if link.loss and chance() < link.loss:
            return Drop(DropReason.LOSS)
        departure = now
        if link.rate_bits_per_second is not None:
            start = max(now, self._free_at)
            if start - now > link.queue_seconds:
                return Drop(DropReason.QUEUE_FULL)
            departure = start + size_bytes * 8 / link.rate_bits_per_second
            self._free_at = departure
        first = self._arrival(departure)
        if link.duplication and chance() < link.duplication:
            return first, self._arrival(departure)
        return (first,)

    def _arrival(self, departure: float) -> float:
        link = self._link
        arrival = departure + link.delay_seconds
        if link.jitter_seconds:
            arrival += self._generator.uniform(-link.jitter_seconds, link.jitter_seconds)
            arrival = max(arrival, departure)
        if not link.reorder:
            arrival = self._last_arrival = max(arrival, self._last_arrival)
        return arrival
