"""The search from behind the hard NAT: open sockets, have the peer guess their public ports.

Path selection specification 21. A few sockets ask a STUN server first: what they learn says whether
ports come in order, or from a block, and which public IP we have now. The peer is told where to
probe, by a plan if it is ours, by CallMeMaybes if it is of another make. All sockets send a Ping to
the peer's address, so that our NAT has as many mappings that let the peer in: at once if ports are
random, after the peer has probed if they can be predicted.

While the peer probes, the sockets are replaced by fresh ones in waves. A fresh socket's Ping meets
every port that the peer has probed already, which its NAT keeps open for 30 s at least, so each
wave is another draw, against a growing number of ports. And it is the only draw against a router
that accepts what strangers send to itself (a Linux box with an open INPUT chain): there our Ping,
if it comes before the peer's probe, occupies the flow, and the probe leaves from another port.

Chances against a stock peer, 256 guesses per CallMeMaybe, one per 2 s (S2), 256 sockets: the first
call finds a socket with 64 %, half a second later fresh sockets meet its ports with 64 %; then 512
ports are open and fresh sockets meet them with 87 %, and so on: 64 % by 0.6 s after the start, 87 %
by 1.2 s, 95 % by 2.6 s, 99 % by 3.2 s. Without the waves 95 % would take 4.6 s. With the patience
of 1.5 s before it, the median is about 2.2 s and the 95th percentile about 4.2 s.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from typing import Final

from traversal.keys import Entropy
from traversal.paths.effects import SendCallMeMaybe
from traversal.paths.port_guess import (
    ALL_PORTS,
    MAX_SOCKETS,
    guesses,
    likely_ranges,
    predicted_range,
    sockets_for,
)
from traversal.paths.punch_effects import CloseSockets, OpenSockets
from traversal.paths.punch_outbox import MAX_PROBES, PROBES_PER_SECOND, Outbox
from traversal.paths.punch_search import Search, Tell
from traversal.paths.punch_strategy import OwnSide
from traversal.paths.report import PortPattern, classify_ports
from traversal.wire.address import Address
from traversal.wire.punching import MAX_RANGES, PortRange, PunchKind, PunchMethod

PREDICTED_SOCKETS: Final = 32
"""Enough that the peer meets one of them though foreign flows took ports in between."""
PREDICTING_SOCKETS: Final = 2
"""STUN answers that tell the last port, with one to spare for loss."""
MEASURING_SOCKETS: Final = 6
"""STUN answers that tell a pattern (four are needed) with two to spare for loss."""
MEASURE_PATIENCE_SECONDS: Final = 0.4
"""For STUN answers; a relay's server is nearer than that."""
PREDICTION_PATIENCE_SECONDS: Final = 1.5
"""From a plan of 80 probes until the birthday search: relay, three passes, and a round trip."""
ANSWER_PATIENCE_SECONDS: Final = MAX_PROBES / PROBES_PER_SECOND + 2.0
"""From a plan for the whole budget until giving up: the probes, the relay, and the last answer."""
GUESSES_PER_CALL: Final = 256
CALL_SECONDS: Final = 2.0
MAX_CALLS: Final = 8
"""All three: path selection specification S2."""
WAVE_SECONDS: Final = 1.6
"""Between waves of fresh sockets: the peer has probed 750 ports by the first, which meets one with
95 %. Until then most searches have ended without any."""
WAVE_AFTER_CALL_SECONDS: Final = 0.5
"""For a call to reach the peer, and what it probes to find the present sockets first."""
MAX_WAVES: Final = 8
"""One per call. With the first sockets that makes 2304 packets, within the budget."""
SHORT_HEAD_START_SECONDS: Final = 0.35
HEAD_START_SECONDS: Final = 0.9
"""For a plan to reach the peer, and for it to probe the 80 ports of a prediction, or the 300 of a
wider one, before our sockets take them: where ports can be known beforehand the peer's probes go
first, which no router in front of it minds."""


class HardSide(Search):
    """The attempt of the hard side against `target`, the peer's easy address.

    `normal_addresses` are those of an ordinary CallMeMaybe; with them the search is the induced
    one, without it is planned with a peer of ours by `tell`. Not `is_predictable`: prediction
    failed here before.
    """

    def __init__(
        self,
        entropy: Entropy,
        outbox: Outbox,
        own: OwnSide,
        target: Address,
        *,
        tell: Tell,
        is_predictable: bool = True,
        normal_addresses: tuple[Address, ...] | None = None,
        max_sockets: int = MAX_SOCKETS,
    ) -> None:
        super().__init__(entropy, outbox)
        self.target = target
        is_regular = own.nat.ports.pattern in (PortPattern.SEQUENTIAL, PortPattern.PRESERVING)
        is_predicted = is_regular and is_predictable
        self.method = PunchMethod.PREDICTED if is_predicted else PunchMethod.BIRTHDAY
        self._own = own
        self._tell = tell
        self._normal = normal_addresses
        self._max_sockets = max_sockets
        self._ports: tuple[int, ...] = ()
        self._measuring: tuple[int, ...] = ()
        self._mapped: dict[int, Address] = {}
        self._is_planned = False
        self._guesses: Iterator[int] = iter(())
        self._host = ""
        self._calls_left = MAX_CALLS
        self._waves_left = MAX_WAVES
        self._wave_at = math.inf
        self._fire_at = math.inf
        self._is_wave = False
        self._is_widened = False

    def start(self) -> None:
        """Open sockets: few for a NAT that can be predicted, many for others."""
        self._open()

    def retarget(self, target: Address, now: float) -> None:
        """The peer says that it is elsewhere: all sockets ping there."""
        self.target = target
        self._fire(now)

    def handle_opened(self, ports: tuple[int, ...], now: float) -> None:
        """Send the first packets of all sockets, in order."""
        self._ports = ports
        count = len(ports)
        self.socket_count = max(self.socket_count, count)
        if not count:
            self._give_up("the system had no socket left; raise the limit of open files")
            return
        if self._is_wave:
            if self._normal is None:
                self._wave_at = now + WAVE_SECONDS
            self._fire(now)
            return
        wanted = PREDICTING_SOCKETS if self.method is PunchMethod.PREDICTED else MEASURING_SOCKETS
        self._measuring = tuple(range(min(wanted, count)))
        for socket in self._measuring:
            self.outbox.enqueue_measurement(socket)
        if self.method is PunchMethod.BIRTHDAY and not self._is_widened:
            self._fire(now)
        self._effects += self.outbox.poll(now)
        self._deadline = now + MEASURE_PATIENCE_SECONDS

    def handle_mapping(self, socket: int, address: Address, now: float) -> None:
        """One measurement more; the last one completes the plan."""
        if socket in self._measuring and not self._is_planned:
            self._mapped[socket] = address
            if len(self._mapped) == len(self._measuring):
                self._plan(now)

    def next_deadline(self) -> float:
        """When to call `on_time` at the latest."""
        if self.ending is not None:
            return math.inf
        return min(super().next_deadline(), self._fire_at, self._wave_at)

    def on_time(self, now: float) -> None:
        """Do what is due."""
        if now >= self._fire_at:
            self._fire_at = math.inf
            self._fire(now)
        if now >= self._wave_at:
            self._wave_at = math.inf
            if not self.is_confirming and self._waves_left:
                self._start_wave(now)
        super().on_time(now)

    def _handle_deadline(self, now: float) -> None:
        if self.is_confirming:
            self._deadline = self._confirm_at
        elif not self._is_planned:
            self._plan(now)
        elif self._normal is not None and self._calls_left:
            self._call(now)
        elif self.method is PunchMethod.PREDICTED and self._normal is None:
            self._widen()
        else:
            self._give_up(
                f"{self.socket_count} sockets, and no probe of the peer met any of their ports"
            )

    # ---- sockets

    def _fire(self, now: float) -> None:
        for socket in range(len(self._ports)):
            self.outbox.enqueue_probe(socket, self.target)
        self._effects += self.outbox.poll(now)

    def _start_wave(self, now: float) -> None:
        """Replace all sockets by fresh ones."""
        self._is_wave = True
        self._waves_left -= 1
        self.outbox.clear()
        count = len(self._ports)
        self._effects += [CloseSockets(tuple(range(count))), OpenSockets(count)]

    def _open(self) -> None:
        if self.method is PunchMethod.BIRTHDAY:
            wanted = sockets_for(self._random_samples())
        elif self._own.nat.ports.pattern is PortPattern.PRESERVING:
            # A fresh socket's first mapping keeps its port; a plan can name eight of them.
            wanted = MAX_RANGES + PREDICTING_SOCKETS
        else:
            wanted = PREDICTED_SOCKETS
        self._deadline = math.inf
        self._effects.append(OpenSockets(min(wanted, self._max_sockets)))

    def _widen(self) -> None:
        """The prediction did not come true: search with all means, and let the peer's probes go
        first, for routers where our Ping before its probe does harm."""
        self._is_widened = True
        self.method = PunchMethod.BIRTHDAY
        self._is_planned = False
        self._mapped.clear()
        self.outbox.clear()
        self._effects.append(CloseSockets(tuple(range(len(self._ports)))))
        self._open()

    # ---- where to probe

    def _plan(self, now: float) -> None:
        self._is_planned = True
        hosts = Counter(address.host for address in self._mapped.values())
        if not hosts:
            hosts.update(address.host for address in self._own.addresses if not address.is_ipv6)
        if not hosts:
            self._give_up("our public IP is not known")
            return
        if len(hosts) > 2:
            self._give_up(f"our NAT uses {len(hosts)} public IPs at random")
            return
        self._host = hosts.most_common(1)[0][0]
        ranges, step = self._ranges()
        if self._normal is not None:
            self._guesses = guesses(ranges, self._entropy, step=step)
            if self.method is PunchMethod.PREDICTED:
                self._fire_at = now + SHORT_HEAD_START_SECONDS
                self._deadline = now
            else:
                # The first call waits for all mappings, since it is a quarter of all chances.
                self._deadline = now + max(0.0, len(self._ports) / PROBES_PER_SECOND - 0.1)
            return
        self._effects.append(
            self._tell(
                PunchKind.PLAN,
                self.method,
                sockets=len(self._ports),
                address=self.target,
                source=Address(self._host, 0),
                ranges=ranges,
            )
        )
        if self.method is PunchMethod.PREDICTED:
            self._fire_at = now + SHORT_HEAD_START_SECONDS
            self._deadline = now + PREDICTION_PATIENCE_SECONDS
            return
        self._deadline = now + ANSWER_PATIENCE_SECONDS
        self._wave_at = now + WAVE_SECONDS
        if self._is_widened:
            self._fire_at = now + HEAD_START_SECONDS
            self._wave_at += HEAD_START_SECONDS

    def _ranges(self) -> tuple[tuple[PortRange, ...], int]:
        """Where our sockets' mappings lie, likely ranges first, and in which steps."""
        measured = [
            (self._ports[socket], self._mapped[socket].port)
            for socket in self._measuring
            if socket in self._mapped
        ]
        allocation = self._own.nat.ports
        if self.method is PunchMethod.BIRTHDAY:
            allocation = classify_ports(measured)
        elif allocation.pattern is PortPattern.PRESERVING:
            fresh = self._ports[PREDICTING_SOCKETS:][:MAX_RANGES]
            return tuple((port, port) for port in fresh), 0
        if allocation.pattern is PortPattern.SEQUENTIAL and measured:
            likely = predicted_range(measured[-1][1], allocation.step, len(self._ports))
            rest = () if self.method is PunchMethod.PREDICTED else (ALL_PORTS,)
            return (likely, *rest), allocation.step
        self.method = PunchMethod.BIRTHDAY
        return likely_ranges([*self._random_samples(), *(mapped for _, mapped in measured)]), 0

    def _random_samples(self) -> tuple[int, ...]:
        """Ports seen before, unless they lie close together for another reason than a block."""
        is_random = self._own.nat.ports.pattern is PortPattern.RANDOM
        return self._own.port_samples if is_random else ()

    def _call(self, now: float) -> None:
        assert self._normal is not None
        guessed = [Address(self._host, port) for port in islice(self._guesses, GUESSES_PER_CALL)]
        if not guessed:
            self._calls_left = 0
        else:
            self._calls_left -= 1
            self.calls_sent += 1
            self._effects.append(SendCallMeMaybe((*self._normal, *guessed)))
            self._wave_at = now + WAVE_AFTER_CALL_SECONDS
        self._deadline = now + CALL_SECONDS
