"""Push packets through a DERP server between pairs of our own clients, and measure what arrives.

The generator must cost less than the relay, or it measures itself. So everything that is sent is
encrypted before the clock starts (the records of a TLS connection only have to leave in order, not
when they are made), nothing is awaited, and what arrives is decrypted in big pieces. Every packet
that arrives is verified: its source, its number, its whole payload.

Payload of packet n:

    0   8   n, big-endian
    8   ..  random bytes, the same for all packets of the pair
"""

from __future__ import annotations

import heapq
import os
import select
import socket
import struct
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from traversal.io.tls import TlsEngine, TlsError
from traversal.wire.derp import HEADER, HEADER_LENGTH, MAX_PACKET_LENGTH, FrameType

READ_BYTES: Final = 262144
MIN_PACKET_BYTES: Final = 8
QUEUE_PACKETS: Final = 32
"""What a client keeps for a server that does not take it; older packets are given up, as real
clients do (DERP specification 15.4)."""
MIN_TICK_SECONDS: Final = 0.0005
"""A pair with a rate so high that several packets are due together sends them together."""
SILENCE_SECONDS: Final = 2.0
"""Nothing arrived for so long: what is missing was dropped."""
WARM_UP_SHARE: Final = 0.1
"""Of the packets, not measured: buffers and TCP windows grow first."""
MAX_RECORD_BYTES: Final = 16384
PROGRESS_SECONDS: Final = 0.1
POLL_GRAIN_SECONDS: Final = 0.01


class LoadError(Exception):
    """The load could not be brought to its end; the text says what the server did."""


@dataclass(slots=True)
class LoadClient:
    """A client whose handshake is done. `received` is what came behind it, decrypted."""

    key: bytes
    sock: socket.socket
    tls: TlsEngine | None
    received: bytes


@dataclass(frozen=True, slots=True)
class Load:
    """What to send.

    Attributes:
        packet_bytes: the payload of each packet, 8 to 65536.
        packets: how many in all, shared equally by the pairs.
        window: how many packets of a pair may be under way (closed loop).
        rate: packets per second of all pairs together (open loop); None for a closed loop.
        full_records: in a closed loop, fill TLS records, instead of a record for each packet as
            real clients do.
    """

    packet_bytes: int
    packets: int
    window: int = 16
    rate: float | None = None
    full_records: bool = False

    def __post_init__(self) -> None:
        if not MIN_PACKET_BYTES <= self.packet_bytes <= MAX_PACKET_LENGTH:
            raise ValueError(f"a packet has {MIN_PACKET_BYTES} to {MAX_PACKET_LENGTH} bytes")


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


class _Buffers:
    """Shared by all pairs, since only one is received at a time."""

    __slots__ = ("ciphertext", "plaintext", "raw")

    def __init__(self) -> None:
        self.ciphertext = memoryview(bytearray(READ_BYTES))
        self.raw = bytearray(2 * READ_BYTES)
        self.plaintext = memoryview(self.raw)


class _Pair:
    """One sender, one receiver, and the stream of packets between them."""

    __slots__ = (
        "_allowed",
        "_body",
        "_bursts",
        "_header_and_key",
        "_partial",
        "_record_bytes",
        "_record_packets",
        "_sent_bytes",
        "_unpacker",
        "_wire",
        "lost",
        "next_number",
        "received",
        "receiver",
        "sender",
        "shed",
        "total",
    )

    def __init__(self, sender: LoadClient, receiver: LoadClient, load: Load, packets: int) -> None:
        self.sender = sender
        self.receiver = receiver
        self.total = packets
        length = 32 + load.packet_bytes
        self._body = os.urandom(load.packet_bytes - 8)
        self._header_and_key = HEADER.pack(FrameType.RECV_PACKET, length) + sender.key
        self._unpacker = struct.Struct(f">{HEADER_LENGTH + 32}sQ{len(self._body)}x")
        self._record_packets = 1
        if load.full_records and load.rate is None:
            self._record_packets = max(1, MAX_RECORD_BYTES // self._unpacker.size)
        self._wire = memoryview(self._encrypt(load))
        self._sent_bytes = 0
        self._partial = receiver.received
        self._allowed = 0
        # (number of the first packet behind it, when it was allowed to leave)
        self._bursts: deque[tuple[int, float]] = deque()
        self.next_number = 0
        self.received = 0
        self.lost = 0
        self.shed = 0

    def _encrypt(self, load: Load) -> bytearray:
        """Everything that will be sent, as it goes over the wire."""
        head = HEADER.pack(FrameType.SEND_PACKET, 32 + load.packet_bytes) + self.receiver.key
        tls = self.sender.tls
        wire = bytearray()
        for first in range(0, self.total, self._record_packets):
            plain = b"".join(
                head + number.to_bytes(8, "big") + self._body
                for number in range(first, min(first + self._record_packets, self.total))
            )
            if tls is None:
                wire += plain
            else:
                tls.write(plain)
                wire += tls.data_to_send()
            if first == 0:
                self._record_bytes = len(wire)
        return wire

    @property
    def sent(self) -> int:
        """Packets that have left whole."""
        if self._sent_bytes == len(self._wire):
            return self.total
        return self._sent_bytes // self._record_bytes * self._record_packets

    @property
    def used_up(self) -> bool:
        """Whether everything that was prepared is allowed to leave."""
        return self._allowed == self.total

    def allow(self, packets: int, now: float) -> None:
        """Packets up to this number may leave from now on, and what shares a record with them."""
        records = -(-packets // self._record_packets)
        packets = min(records * self._record_packets, self.total)
        if packets > self._allowed:
            self._allowed = packets
            self._bursts.append((packets, now))

    def offer(self, due: int, now: float) -> bool:
        """Send what is due by a schedule; what neither the server nor our queue takes is shed.

        Returns whether all that was allowed went.
        """
        self.allow(due - self.shed, now)
        if self.send():
            return True
        queued = min(self._allowed, self.sent + QUEUE_PACKETS)
        self.shed += self._allowed - queued
        self._allowed = queued
        while self._bursts and self._bursts[-1][0] > queued:
            _, since = self._bursts.pop()
            if not self._bursts or self._bursts[-1][0] < queued:
                self._bursts.append((queued, since))
                break
        return False

    def send(self) -> bool:
        """Send what is allowed; whether all of it went."""
        end = len(self._wire)
        if self._allowed < self.total:
            end = self._allowed // self._record_packets * self._record_bytes
        while self._sent_bytes < end:
            try:
                self._sent_bytes += self.sender.sock.send(self._wire[self._sent_bytes : end])
            except BlockingIOError:
                return False
        return True

    def give_up(self) -> None:
        """What is under way will not arrive any more."""
        self.lost += self.sent - self.next_number
        self.next_number = self.sent

    def receive(self, buffers: _Buffers, now: float, counts: dict[float, int]) -> None:
        """Take what has arrived and add latency and number of packets to `counts`.

        Raises LoadError, OSError, TlsError.
        """
        ciphertext, plaintext = buffers.ciphertext, buffers.plaintext
        size = len(self._partial)
        plaintext[:size] = self._partial
        receiver = self.receiver
        if receiver.tls is None:
            count = receiver.sock.recv_into(plaintext[size : size + READ_BYTES])
            size += count
        else:
            count = receiver.sock.recv_into(ciphertext)
            receiver.tls.receive_data(ciphertext[:count])
            size += receiver.tls.read_into(plaintext[size:])
        if count == 0:
            raise LoadError("the server closed the connection of a receiver")
        first = self.next_number
        position = 0
        while True:
            start = self._skip_other_frames(plaintext, position, size)
            position = self._verify(buffers, start, size)
            if position == start:
                break
        self._partial = bytes(plaintext[position:size])
        self._count_latencies(first, now, counts)

    def _skip_other_frames(self, plaintext: memoryview, position: int, size: int) -> int:
        """Behind keepalives and whatever else is no packet."""
        while size - position >= HEADER_LENGTH and plaintext[position] != FrameType.RECV_PACKET:
            end = position + HEADER_LENGTH + HEADER.unpack_from(plaintext, position)[1]
            if end > size:
                break
            position = end
        return position

    def _verify(self, buffers: _Buffers, position: int, size: int) -> int:
        """Check neighbouring packets; returns the position behind them."""
        frame_bytes = self._unpacker.size
        body_at = position + frame_bytes - len(self._body)
        whole = (size - position) // frame_bytes * frame_bytes
        expected, body, allowed = self._header_and_key, self._body, self._allowed
        starts_with = buffers.raw.startswith  # compares without copying
        number = first = self.next_number
        packets = 0
        for prefix, got in self._unpacker.iter_unpack(
            buffers.plaintext[position : position + whole]
        ):
            if prefix != expected:
                if prefix[0] == FrameType.RECV_PACKET:
                    raise LoadError("a packet arrived with another source or length than sent")
                break
            if not (number <= got < allowed and starts_with(body, body_at)):
                raise LoadError(f"packet {got} arrived damaged, twice or out of order")
            body_at += frame_bytes
            number = got + 1
            packets += 1
        self.next_number = number
        self.received += packets
        self.lost += number - first - packets
        return position + packets * frame_bytes

    def _count_latencies(self, first: int, now: float, counts: dict[float, int]) -> None:
        number = self.next_number
        bursts = self._bursts
        while first < number:
            end, since = bursts[0]
            upto = min(end, number)
            counts[now - since] = counts.get(now - since, 0) + upto - first
            first = upto
            if end <= number:
                bursts.popleft()


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
        _Pair(clients[place], clients[place + 1], load, share)
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

    def __init__(self, pairs: list[_Pair], load: Load, meter: Callable[[], float]) -> None:
        self._pairs = pairs
        self._load = load
        self._meter = meter
        self._epoll = select.epoll()
        self._receivers = {pair.receiver.sock.fileno(): pair for pair in pairs}
        self._blocked: dict[int, _Pair] = {}
        for fd in self._receivers:
            self._epoll.register(fd, select.EPOLLIN)
        self._buffers = _Buffers()
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

    def _watch(self, pair: _Pair, all_went: bool) -> None:
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
