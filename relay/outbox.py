"""What leaves for each client: at once, later, or not at all. No I/O, no clock.

A frame to be written is left on `Client.out`, and the client is put on `Outbox.dirty`. For a client
that takes no bytes, packets wait in its backlog and may be dropped; other frames wait in
`Client.control` and never are.

Ownership: views in `Client.out` point into the pump's shared buffer. They are valid until the pump
ends its round; what can't be written by then must be copied, by `defer`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from typing import Final

from relay.backlog import Backlog, Waiting
from relay.client import Client
from relay.counters import Counters, DropReason, Kind
from traversal.wire.derp import HEADER, HEADER_LENGTH, FrameType, looks_like_disco

PACKET_HEADER_LENGTH: Final = HEADER_LENGTH + 32
"""A SEND_PACKET or RECV_PACKET up to its payload."""
FORWARD_HEADER_LENGTH: Final = HEADER_LENGTH + 64
"""A FORWARD_PACKET up to its payload."""
MAX_CONTROL_FRAMES: Final = 8192
"""Frames that are never dropped and wait for one client, some 400 KB. It may have heard from a few
thousand peers that leave at once; a client that reads a byte now and then, and so never times out,
must not collect notices for ever. Mesh peers have to know of every change, and are trusted."""


class Outbox:
    """What is on its way to all clients of one relay process.

    Args:
        counters: where packets sent and dropped are counted.
        queue_depth: packets that may wait for a slow client, in each of its two queues.
        memory_bytes: bound on all waiting packets together.
    """

    def __init__(self, counters: Counters, *, queue_depth: int, memory_bytes: int) -> None:
        self.counters = counters
        self.queue_depth = queue_depth
        self.memory_bytes = memory_bytes
        self.dirty: list[Client] = []
        self.doomed: list[tuple[Client, str]] = []
        self.waiting_bytes = 0

    def send(self, client: Client, frame: bytes) -> None:
        """A frame that is never dropped."""
        if client.closed:
            return
        if client.blocked:
            if client.control is None:
                client.control = deque()
            client.control.append(frame)
            if len(client.control) == MAX_CONTROL_FRAMES and not client.is_mesh:
                self.doomed.append((client, "it does not read what it is told"))
            return
        if not client.out:
            self.dirty.append(client)
        client.out.append(frame)
        client.out_bytes += len(frame)

    def send_to_all(self, frame: bytes, clients: Iterable[Client]) -> None:
        """The same frame to several clients."""
        for client in clients:
            self.send(client, frame)

    def defer(self, client: Client, chunks: Iterable[memoryview | bytes], now: float) -> None:
        """Copy what could not be written: packets to the backlog, other frames to `control`.

        The pump calls this for a client that has become blocked.
        """
        for chunk in chunks:
            if chunk[0] == FrameType.RECV_PACKET:
                self._uncount_sent(client, chunk)
                self.queue_run(bytes(chunk[5:37]), client, memoryview(chunk), now)
            elif chunk[0] == FrameType.FORWARD_PACKET:
                self.queue(client, Waiting(bytes(chunk), bytes(chunk[5:37]), now))
            else:
                self.send(client, bytes(chunk))

    def drop_unwritten(
        self, client: Client, chunks: Iterable[memoryview | bytes], reason: DropReason
    ) -> None:
        """Count as dropped what was on its way out when the connection ended."""
        for chunk in chunks:
            if chunk[0] == FrameType.RECV_PACKET:
                self._uncount_sent(client, chunk)
            elif chunk[0] != FrameType.FORWARD_PACKET:
                continue
            for frame in _split(memoryview(chunk)):
                self._count_drop(client, _kind_of(frame), frame, reason)

    def _count_drop(
        self, client: Client, kind: Kind, frame: memoryview | bytes, reason: DropReason
    ) -> None:
        forwarded = frame[0] == FrameType.FORWARD_PACKET
        header_length = FORWARD_HEADER_LENGTH if forwarded else PACKET_HEADER_LENGTH
        self.counters.drop(reason, kind, len(frame) - header_length)
        client.packets_dropped += 1

    def _uncount_sent(self, client: Client, run: memoryview | bytes) -> None:
        packets = sum(1 for _ in _split(memoryview(run)))
        payload_bytes = len(run) - packets * PACKET_HEADER_LENGTH
        client.packets_out -= packets
        client.bytes_out -= payload_bytes
        self.counters.packets_sent -= packets
        self.counters.bytes_sent -= payload_bytes

    def queue_run(self, source: bytes, destination: Client, frames: memoryview, now: float) -> None:
        """Copy the packets of a run to the backlog of a blocked client."""
        for frame in _split(frames):
            self.queue(destination, Waiting(bytes(frame), source, now))

    def queue(self, client: Client, waiting: Waiting) -> None:
        """Put one packet into the backlog of a blocked client; a full one drops another."""
        size = len(waiting.frame)
        kind = _kind_of(waiting.frame)
        if self.waiting_bytes + size > self.memory_bytes:
            self._count_drop(client, kind, waiting.frame, DropReason.QUEUE_TAIL)
            return
        if client.backlog is None:
            client.backlog = Backlog(self.queue_depth)
        victim = client.backlog.push(kind, waiting)
        self.waiting_bytes += size
        if victim is not None:
            self.waiting_bytes -= len(victim.frame)
            self._count_drop(client, kind, victim.frame, DropReason.QUEUE_HEAD)

    def take_waiting(self, client: Client, max_bytes: int, now: float) -> list[bytes]:
        """Frames that have waited for a client which takes bytes again, control frames first."""
        frames: list[bytes] = []
        if client.control:
            frames.extend(client.control)
            client.control = None
        if client.backlog:
            for frame, _, since in client.backlog.pop(max_bytes):
                frames.append(frame)
                self.waiting_bytes -= len(frame)
                self.counters.queue_delay.observe(now - since)
                if frame[0] == FrameType.RECV_PACKET:
                    payload_bytes = len(frame) - PACKET_HEADER_LENGTH
                    client.packets_out += 1
                    client.bytes_out += payload_bytes
                    self.counters.packets_waited += 1
                    self.counters.packets_sent += 1
                    self.counters.bytes_sent += payload_bytes
        if not client.backlog:
            client.backlog = None
        return frames

    def forget(self, client: Client) -> None:
        """Count as dropped all that waits for a client which is gone."""
        self.drop_unwritten(client, client.out, DropReason.GONE_DISCONNECTED)
        client.out.clear()
        client.out_bytes = 0
        client.control = None
        if client.backlog is not None:
            for kind, waiting in client.backlog.clear():
                self.waiting_bytes -= len(waiting.frame)
                self._count_drop(client, kind, waiting.frame, DropReason.GONE_DISCONNECTED)
            client.backlog = None


def _kind_of(frame: memoryview | bytes) -> Kind:
    """The kind of a RECV_PACKET or FORWARD_PACKET."""
    forwarded = frame[0] == FrameType.FORWARD_PACKET
    payload = frame[FORWARD_HEADER_LENGTH if forwarded else PACKET_HEADER_LENGTH :]
    return Kind.DISCO if looks_like_disco(payload) else Kind.OTHER


def _split(frames: memoryview) -> Iterator[memoryview]:
    """The single frames of a run."""
    position = 0
    while position < len(frames):
        length = HEADER.unpack_from(frames, position)[1]
        frame_end = position + HEADER_LENGTH + length
        yield frames[position:frame_end]
        position = frame_end
