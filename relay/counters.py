"""What the relay counts. Plain integers: the hot path adds, metrics and pages read."""

from __future__ import annotations

import enum
from bisect import bisect_left
from dataclasses import dataclass, field
from typing import Final


class Kind(enum.StrEnum):
    """What a packet looks like from outside (DERP specification 7.3)."""

    DISCO = "disco"
    OTHER = "other"


class DropReason(enum.StrEnum):
    """Why a packet was not delivered; derper's words (DERP specification 16)."""

    UNKNOWN_DEST = "unknown_dest"
    UNKNOWN_DEST_ON_FWD = "unknown_dest_on_fwd"
    GONE_DISCONNECTED = "gone_disconnected"
    QUEUE_HEAD = "queue_head"
    QUEUE_TAIL = "queue_tail"
    WRITE_ERROR = "write_error"
    DUP_CLIENT = "dup_client"
    NOT_PERMITTED = "not_permitted"
    """Ours: the sender's token does not name this destination."""


QUEUE_DELAY_BOUNDS_SECONDS: Final = (
    0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.0,
)  # fmt: skip


class Histogram:
    """Counts per bucket; `bounds` are the upper ends, and one more bucket is for the rest."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        """Count a value, or several equal ones."""
        self.counts[bisect_left(self.bounds, value)] += times
        self.total += value * times


@dataclass(slots=True)
class Counters:
    """Since the relay started. Payload bytes only, no frame headers (DERP specification 16)."""

    accepts: int = 0
    disco_received: int = 0
    other_received: int = 0
    """Packets of either kind; apart, because a lookup by Kind costs as much as routing a packet."""
    bytes_received: int = 0
    packets_sent: int = 0
    bytes_sent: int = 0
    packets_waited: int = 0
    """Of those sent, how many had to wait because their destination read too slowly."""
    packets_dropped: dict[tuple[DropReason, Kind], int] = field(
        default_factory=lambda: {(reason, kind): 0 for reason in DropReason for kind in Kind}
    )
    bytes_dropped: dict[tuple[DropReason, Kind], int] = field(
        default_factory=lambda: {(reason, kind): 0 for reason in DropReason for kind in Kind}
    )
    packets_forwarded_out: int = 0
    packets_forwarded_in: int = 0
    peer_gone_disconnected_frames: int = 0
    peer_gone_not_here_frames: int = 0
    home_moves_in: int = 0
    home_moves_out: int = 0
    got_ping: int = 0
    sent_pong: int = 0
    unknown_frames: int = 0
    write_timeouts: int = 0
    rate_limit_waits: int = 0
    duplicate_connections: int = 0
    multiforwarder_created: int = 0
    multiforwarder_deleted: int = 0
    forwarder_delete_other_value: int = 0
    protocol_violations: int = 0
    queue_delay: Histogram = field(default_factory=lambda: Histogram(QUEUE_DELAY_BOUNDS_SECONDS))

    @property
    def packets_received(self) -> dict[Kind, int]:
        """By kind."""
        return {Kind.DISCO: self.disco_received, Kind.OTHER: self.other_received}

    def drop(self, reason: DropReason, kind: Kind, payload_bytes: int, packets: int = 1) -> None:
        """Count packets that will not arrive."""
        self.packets_dropped[reason, kind] += packets
        self.bytes_dropped[reason, kind] += payload_bytes
