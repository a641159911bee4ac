"""Packets between nodes that are connected to this edge: who is here, where a packet goes, what
waits, what is dropped.

No I/O, no clock. What waits for a node is bounded, and fairly: of a full queue the oldest packet of
the sender that has most in it goes (`relay.backlog`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

from relay.backlog import Backlog, Waiting
from relay.counters import Kind
from relay.limits import TokenBucket
from traversal.keys import KEY_LENGTH, NodePublic
from traversal.wire.derp import (
    HEADER,
    MAX_PACKET_LENGTH,
    MAX_PING_LENGTH,
    MIN_PING_LENGTH,
    DerpError,
    FrameType,
    GoneReason,
    encode_peer_gone,
    encode_pong,
    looks_like_disco,
)

QUEUE_PACKETS: Final = 256
"""For one node, of disco and of other packets each; at 1300 bytes 25 ms of 100 Mbit/s."""
WAITING_BYTES: Final = 64 << 20
"""For all nodes together."""
CONTROL_FRAMES: Final = 256
"""Notices for one node; beyond it the oldest are dropped."""
HEARD_FROM: Final = 4096
"""Senders of which a node is told when they leave."""
NOT_HERE_PER_SECOND: Final = 1.0
NOT_HERE_BURST: Final = 3.0
"""As DERP does (specification 7.3)."""


@dataclass(frozen=True, slots=True)
class PeerStatistics:
    """Of all nodes since the start."""

    nodes: int
    forwarded: int
    forwarded_bytes: int
    dropped_for_full_queue: int
    dropped_for_memory: int
    dropped_not_here: int


class Member:
    """One node's connection.

    Attributes:
        wake: called when something waits for it; must not raise.
        close: called when another connection takes its place.
    """

    def __init__(
        self, key: NodePublic, wake: Callable[[], None], close: Callable[[], None], now: float
    ) -> None:
        self.key = key.raw
        self.wake = wake
        self.close = close
        self.backlog = Backlog(QUEUE_PACKETS)
        self.control: deque[bytes] = deque(maxlen=CONTROL_FRAMES)
        self.heard_from: set[bytes] = set()
        self.not_here = TokenBucket(NOT_HERE_PER_SECOND, NOT_HERE_BURST, now)


class PeerSwitch:
    """All nodes of an edge."""

    def __init__(self) -> None:
        self._members: dict[bytes, Member] = {}
        self._delivered: dict[bytes, set[Member]] = {}
        self._waiting_bytes = 0
        self._forwarded = 0
        self._forwarded_bytes = 0
        self._dropped_for_full_queue = 0
        self._dropped_for_memory = 0
        self._dropped_not_here = 0

    def statistics(self) -> PeerStatistics:
        """A snapshot."""
        return PeerStatistics(
            nodes=len(self._members),
            forwarded=self._forwarded,
            forwarded_bytes=self._forwarded_bytes,
            dropped_for_full_queue=self._dropped_for_full_queue,
            dropped_for_memory=self._dropped_for_memory,
            dropped_not_here=self._dropped_not_here,
        )

    def connect(self, member: Member) -> None:
        """Deliver packets for its key to it; an older connection of the key is closed: the node
        has found a better way here, or gave the old one up."""
        former = self._members.get(member.key)
        self._members[member.key] = member
        if former is not None:
            former.close()

    def disconnect(self, member: Member) -> None:
        """Forget it; harmless when repeated. Nodes that heard from it are told if it is gone."""
        self._waiting_bytes -= member.backlog.size_bytes
        for _ in member.backlog.clear():
            pass
        for key in member.heard_from:
            receivers = self._delivered.get(key)
            if receivers is not None:
                receivers.discard(member)
                if not receivers:
                    del self._delivered[key]
        member.heard_from.clear()
        if self._members.get(member.key) is not member:
            return
        del self._members[member.key]
        for receiver in self._delivered.pop(member.key, ()):
            receiver.heard_from.discard(member.key)
            self._notify(receiver, encode_peer_gone(member.key, GoneReason.DISCONNECTED))

    def handle_frame(self, source: Member, frame_type: int, body: bytes, now: float) -> None:
        """A frame of a node; unknown types are skipped. Raises DerpError."""
        if frame_type == FrameType.SEND_PACKET:
            if not KEY_LENGTH <= len(body) <= KEY_LENGTH + MAX_PACKET_LENGTH:
                raise DerpError(f"a packet of {len(body)} bytes")
            self._forward(source, body[:KEY_LENGTH], body[KEY_LENGTH:], now)
        elif frame_type == FrameType.PING:
            if not MIN_PING_LENGTH <= len(body) <= MAX_PING_LENGTH:
                raise DerpError(f"a ping of {len(body)} bytes")
            self._notify(source, encode_pong(body[:MIN_PING_LENGTH]))

    def take(self, member: Member, max_bytes: int) -> list[bytes]:
        """Frames for a node, notices first; about `max_bytes` of packets."""
        frames = list(member.control)
        member.control.clear()
        before = member.backlog.size_bytes
        frames += [waiting.frame for waiting in member.backlog.pop(max_bytes)]
        self._waiting_bytes -= before - member.backlog.size_bytes
        return frames

    def keys(self) -> Iterator[NodePublic]:
        """Of the nodes that are here."""
        return map(NodePublic, self._members)

    def _forward(self, source: Member, destination: bytes, payload: bytes, now: float) -> None:
        member = self._members.get(destination)
        if member is None:
            self._dropped_not_here += 1
            if source.not_here.try_take(now, 1.0):
                self._notify(source, encode_peer_gone(destination, GoneReason.NOT_HERE))
            return
        size = KEY_LENGTH + len(payload)
        if self._waiting_bytes + size > WAITING_BYTES:
            self._dropped_for_memory += 1
            return
        frame = HEADER.pack(FrameType.RECV_PACKET, size) + source.key + payload
        kind = Kind.DISCO if looks_like_disco(payload) else Kind.OTHER
        before = member.backlog.size_bytes
        if member.backlog.push(kind, Waiting(frame, source.key, now)) is not None:
            self._dropped_for_full_queue += 1
        self._waiting_bytes += member.backlog.size_bytes - before
        self._forwarded += 1
        self._forwarded_bytes += len(payload)
        if source.key not in member.heard_from and len(member.heard_from) < HEARD_FROM:
            member.heard_from.add(source.key)
            self._delivered.setdefault(source.key, set()).add(member)
        member.wake()

    def _notify(self, member: Member, frame: bytes) -> None:
        member.control.append(frame)
        member.wake()
