"""One pair of clients of a load test: what it sends, and the check of what arrives.

Payload of packet n:

    0   8   n, big-endian
    8   ..  random bytes, the same for all packets of the pair
"""

from __future__ import annotations

import os
import socket
import struct
from collections import deque
from dataclasses import dataclass
from typing import Final

from traversal.io.tls import TlsEngine
from traversal.wire.derp import HEADER, HEADER_LENGTH, MAX_PACKET_LENGTH, FrameType

READ_BYTES: Final = 262144
MIN_PACKET_BYTES: Final = 8
QUEUE_PACKETS: Final = 32
"""What a client keeps for a server that does not take it; older packets are given up, as real
clients do (DERP specification 15.4)."""
MAX_RECORD_BYTES: Final = 16384


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


class Buffers:
    """Shared by all pairs, since only one is received at a time."""

    __slots__ = ("ciphertext", "plaintext", "raw")

    def __init__(self) -> None:
        self.ciphertext = memoryview(bytearray(READ_BYTES))
        self.raw = bytearray(2 * READ_BYTES)
        self.plaintext = memoryview(self.raw)


class Pair:
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

    def receive(self, buffers: Buffers, now: float, counts: dict[float, int]) -> None:
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

    def _verify(self, buffers: Buffers, position: int, size: int) -> int:
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
