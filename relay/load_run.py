"""Push packets through a DERP server between pairs of our own clients, and measure what arrives.

The generator must cost less than the relay, or it measures itself. So everything that is sent is
encrypted before the clock starts (the records of a TLS connection only have to leave in order, not
when they are made), nothing is awaited, and what arrives is decrypted in big pieces. Every packet
that arrives is verified: its source, its number, its whole payload.
"""

from __future__ import annotations

import heapq
import select
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from relay.load_pair import Buffers, Load, LoadClient, LoadError, Pair
from traversal.io.tls import TlsError

MIN_TICK_SECONDS: Final = 0.0005
"""A pair with a rate so high that several packets are due together sends them together."""
SILENCE_SECONDS: Final = 2.0
"""Nothing arrived for so long: what is missing was dropped."""
WARM_UP_SHARE: Final = 0.1
"""Of the packets, not measured: buffers and TCP windows grow first."""
PROGRESS_SECONDS: Final = 0.1
POLL_GRAIN_SECONDS: Final = 0.01


@dataclass(frozen=True, slots=True)
class LoadResult:
    """What happened after the warm-up.

    Attributes:
        seconds: how long was measured.
        received: packets that arrived, intact.
        sent: packets that left, warm-up included; so it is for the next two.
        lost: packets that were sent and did not arrive.
        shed: packets that were due and not even sent, because the server took no more.
        server_cpu_seconds: by the caller's meter; 0 without one.
        generator_load: share of one core that the generator used.
        latencies: (seconds, packets) pairs in ascending order.
    """

    packet_bytes: int
    seconds: float
    received: int
    sent: int
    lost: int
    shed: int
    server_cpu_seconds: float
    generator_load: float
    latencies: Sequence[tuple[float, int]]

    @property
    def packets_per_second(self) -> float:
        """Packets that arrived per second."""
        return self.received / self.seconds

    @property
    def bits_per_second(self) -> float:
        """Payload only."""
        return 8 * self.packet_bytes * self.packets_per_second

    @property
    def server_cpu_seconds_per_million(self) -> float:
        """What the server's process used for a million packets."""
        return self.server_cpu_seconds / max(self.received, 1) * 1e6

    def latency_seconds(self, quantile: float) -> float:
        """For example 0.99: this share of the packets took no longer."""
        total = sum(count for _, count in self.latencies)
        passed = 0
        for seconds, count in self.latencies:
            passed += count
            if passed >= quantile * total:
                return seconds
        return 0.0


def run_load(
    clients: Sequence[LoadClient],
    load: Load,
    *,
    seconds: float,
    meter: Callable[[], float] = lambda: 0.0,
    on_progress: Callable[[int, float], None] = lambda _received, _elapsed: None,
) -> LoadResult:
    """Send from each even client to the odd one behind it. Blocks; never sends after `seconds`.

    The clients are spent afterwards: close them.

    Args:
        meter: the server's CPU seconds so far.
        on_progress: told ten times a second how many packets have arrived, and the time.

    Raises LoadError where the server closes, or delivers what was not sent.
    """
    share = max(1, load.packets // (len(clients) // 2))
    pairs = [
        Pair(clients[place], clients[place + 1], load, share)
        for place in range(0, len(clients) - 1, 2)
    ]
    try:
        return _Run(pairs, load, meter).run(seconds, on_progress)
    except TlsError as error:
        raise LoadError(str(error)) from None
    except OSError as error:
        raise LoadError(error.strerror or str(error)) from None


class _Run:
    """The loop: one epoll set over all receivers and those senders that the server blocks."""

    def __init__(self, pairs: list[Pair], load: Load, meter: Callable[[], float]) -> None:
        self._pairs = pairs
        self._load = load
        self._meter = meter
        self._epoll = select.epoll()
        self._receivers = {pair.receiver.sock.fileno(): pair for pair in pairs}
        self._blocked: dict[int, Pair] = {}
        for fd in self._receivers:
            self._epoll.register(fd, select.EPOLLIN)
        self._buffers = Buffers()
        self._counts: dict[float, int] = {}
        # When each pair has something due, by its place; only in an open loop.
        self._schedule: list[tuple[float, int]] = []
        self._rate = load.rate or 0.0
        self._pair_rate = self._rate / len(pairs)
        self._draining = False
        self._started = 0.0
        self._heard = 0.0
        self._progress_at = 0.0

    def run(self, seconds: float, on_progress: Callable[[int, float], None]) -> LoadResult:
        with self._epoll:
            self._start()
            warm_packets = WARM_UP_SHARE * sum(pair.total for pair in self._pairs)
            warm_until = self._started + WARM_UP_SHARE * seconds
            now = self._started
            while now < warm_until and self._received() < warm_packets:
                now = self._step(on_progress)
            self._counts.clear()
            began, received = now, self._received()
            cpu, own_cpu = self._meter(), time.thread_time()
            end = self._started + seconds
            while now < end and not any(pair.used_up for pair in self._pairs):
                now = self._step(on_progress)
            elapsed = max(now - began, 1e-9)
            own_cpu, cpu = time.thread_time() - own_cpu, self._meter() - cpu
            received = self._received() - received
            latencies = sorted(self._counts.items())
            self._drain()
        return LoadResult(
            packet_bytes=self._load.packet_bytes,
            seconds=elapsed,
            received=received,
            sent=sum(pair.sent for pair in self._pairs),
            lost=sum(pair.lost for pair in self._pairs),
            shed=sum(pair.shed for pair in self._pairs),
            server_cpu_seconds=cpu,
            generator_load=own_cpu / elapsed,
            latencies=latencies,
        )

    def _received(self) -> int:
        return sum(pair.received for pair in self._pairs)

    def _start(self) -> None:
        self._started = self._heard = self._progress_at = time.monotonic()
        if not self._rate:
            for pair in self._pairs:
                pair.allow(self._load.window, self._started)
                self._watch(pair, pair.send())
        else:
            # The pairs take turns, so that they are not due all at once.
            for place in range(len(self._pairs)):
                due = self._started + place / self._rate
                heapq.heappush(self._schedule, (due, place))

    def _step(self, on_progress: Callable[[int, float], None]) -> float:
        """Send what is due, take what arrives; returns the time."""
        now = time.monotonic()
        while self._schedule and self._schedule[0][0] <= now:
            self._send_due(now)
        self._poll(self._schedule[0][0] - now if self._schedule else SILENCE_SECONDS)
        now = time.monotonic()
        if now - self._heard > SILENCE_SECONDS:
            self._heard = now
            for pair in self._pairs:
                pair.give_up()
                if not self._rate:
                    pair.allow(pair.next_number + self._load.window, now)
                    self._watch(pair, pair.send())
        if now >= self._progress_at:
            self._progress_at = now + PROGRESS_SECONDS
            on_progress(self._received(), now - self._started)
        return now

    def _send_due(self, now: float) -> None:
        due, place = self._schedule[0]
        pair = self._pairs[place]
        first = self._started + place / self._rate
        packets = int((now - first) * self._pair_rate) + 1
        self._watch(pair, pair.offer(packets, now))
        due = max(first + packets / self._pair_rate, now + MIN_TICK_SECONDS)
        heapq.heapreplace(self._schedule, (due, place))

    def _poll(self, timeout: float) -> None:
        if timeout < POLL_GRAIN_SECONDS:
            # epoll counts in milliseconds, which is too coarse for a schedule.
            select.select([self._epoll], (), (), max(timeout, 0))
            timeout = 0
        for fd, _ in self._epoll.poll(timeout):
            pair = self._blocked.get(fd)
            if pair is not None:
                self._watch(pair, pair.send())
                continue
            pair = self._receivers[fd]
            now = self._heard = time.monotonic()
            pair.receive(self._buffers, now, self._counts)
            if not self._rate and not self._draining:
                pair.allow(pair.next_number + self._load.window, now)
                self._watch(pair, pair.send())

    def _watch(self, pair: Pair, all_went: bool) -> None:
        """Ask epoll about a sender that the server blocks, as long as it does."""
        fd = pair.sender.sock.fileno()
        if all_went and fd in self._blocked:
            del self._blocked[fd]
            self._epoll.unregister(fd)
        elif not all_went and fd not in self._blocked:
            self._blocked[fd] = pair
            self._epoll.register(fd, select.EPOLLOUT)

    def _drain(self) -> None:
        """Take what is still under way; what does not come is lost."""
        self._draining = True
        self._schedule.clear()
        self._heard = time.monotonic()
        while any(pair.next_number < pair.sent for pair in self._pairs):
            self._poll(SILENCE_SECONDS)
            if time.monotonic() - self._heard > SILENCE_SECONDS:
                break
        for pair in self._pairs:
            pair.give_up()
