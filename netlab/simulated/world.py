"""Time, order and record of a simulated internet: one heap of events, one timeline."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable
from functools import lru_cache
from typing import Protocol as StructuralType

import trio

from netlab.drops import Drop, Endpoint, endpoint_text
from netlab.nat import Protocol
from netlab.simulated.packet import Packet
from netlab.timeline import (
    Event,
    PacketDelivered,
    PacketDropped,
    PacketSent,
    Timeline,
)

# The clock arrives at a tick only up to floating-point error; without this the pump would wake
# just before an event and go round once more.
_ROUNDING_SECONDS = 1e-9

# A lab's endpoints come again and again; formatting one costs as much as a NAT lookup.
_text: Callable[[Endpoint], str] = lru_cache(maxsize=65_536)(endpoint_text)

_PROTOCOL_NAMES = {protocol.value: protocol.name.lower() for protocol in Protocol}

_FLAG_NAMES = ((2, "SYN"), (1, "FIN"), (4, "RST"), (16, "ACK"))


class Receiver(StructuralType):
    """A machine at the end of a link."""

    name: str

    def receive(self, packet: Packet) -> None: ...


class World:
    """The shared state of one simulated internet.

    `schedule` and everything it calls run to completion without awaiting. Events at the same
    instant happen in the order in which they were scheduled, which makes runs repeatable.
    """

    def __init__(
        self, timeline: Timeline, record_packets: bool, tick_seconds: float, snap_bytes: int = 0
    ) -> None:
        # Events happen in their own order, but on ticks: each instant at which anything happens
        # costs Trio some 100 us, and jitter gives every packet an instant of its own.
        self._tick_seconds = tick_seconds
        self.timeline = timeline
        self._record_packets = record_packets
        self._snap_bytes = snap_bytes
        self._heap: list[tuple[float, int, Callable[..., None], tuple[object, ...]]] = []
        self._serial = 0
        self._packets = 0
        self._started_at = 0.0
        self._sleep: trio.CancelScope | None = None
        self.events_run = 0
        self.is_driven = False
        """Whether a jumping clock carries out what lies in the future (see `driven_by_clock`), so
        that the pump has to care for the present only."""

    # --- time ----------------------------------------------------------------------------

    def now(self) -> float:
        """Return the seconds since the internet was started."""
        return trio.current_time() - self._started_at

    def schedule(self, at: float, call: Callable[..., None], *args: object) -> None:
        """Call later, or as soon as the pump runs if `at` has passed."""
        self._serial += 1
        heapq.heappush(self._heap, (at, self._serial, call, args))
        sleep = self._sleep
        if sleep is not None and not (self.is_driven and at > self.now() + _ROUNDING_SECONDS):
            sleep.deadline = min(sleep.deadline, self.wake_at(at))

    @property
    def next_wake(self) -> float:
        """When the pump has to wake next, in Trio's time; infinity for never."""
        return self.wake_at(self._heap[0][0]) if self._heap else math.inf

    def wake_at(self, at: float) -> float:
        """Return when to wake for an event: on the next tick, in Trio's time."""
        return math.ceil(at / self._tick_seconds) * self._tick_seconds + self._started_at

    async def run(self, task_status: trio.TaskStatus[None]) -> None:
        """Carry out scheduled calls until cancelled."""
        self._started_at = trio.current_time()
        task_status.started()
        while True:
            self.run_due()
            now = trio.current_time() + _ROUNDING_SECONDS
            deadline = self.next_wake
            if self.is_driven and deadline > now:
                deadline = math.inf
            with trio.CancelScope(deadline=deadline) as self._sleep:
                await trio.sleep_forever()
            self._sleep = None

    def run_due(self) -> None:
        """Carry out the calls that are due, without those that they schedule for this instant:
        these come next, after the tasks that have been woken."""
        heap = self._heap
        now = self.now() + _ROUNDING_SECONDS
        last = self._serial
        while heap and heap[0][0] <= now and heap[0][1] <= last:
            _, _, call, args = heapq.heappop(heap)
            self.events_run += 1
            call(*args)

    # --- record --------------------------------------------------------------------------

    def next_packet_number(self) -> int:
        self._packets += 1
        return self._packets

    @property
    def packet_count(self) -> int:
        return self._packets

    def record(self, event: Event) -> None:
        self.timeline.add(event)

    def sent(self, packet: Packet) -> None:
        if self._record_packets:
            self.timeline.add(
                PacketSent(
                    at=self.now(),
                    packet=packet.number,
                    host=packet.sender,
                    protocol=_PROTOCOL_NAMES[packet.protocol],
                    source=_text(packet.source_endpoint),
                    destination=_text(packet.destination_endpoint),
                    size_bytes=packet.size_bytes,
                    flags="+".join(name for bit, name in _FLAG_NAMES if packet.flags & bit),
                    data=packet.transport_bytes(self._snap_bytes) if self._snap_bytes else b"",
                )
            )

    def delivered(self, packet: Packet, host: str) -> None:
        if self._record_packets:
            self.timeline.add(
                PacketDelivered(
                    at=self.now(),
                    packet=packet.number,
                    host=host,
                    protocol=_PROTOCOL_NAMES[packet.protocol],
                    source=_text(packet.source_endpoint),
                    destination=_text(packet.destination_endpoint),
                )
            )

    def dropped(self, packet: Packet, where: str, drop: Drop, inside: str = "") -> None:
        if self._record_packets:
            self.timeline.add(
                PacketDropped(
                    at=self.now(),
                    packet=packet.number,
                    where=where,
                    reason=drop.reason,
                    text=drop.text,
                    protocol=_PROTOCOL_NAMES[packet.protocol],
                    source=_text(packet.source_endpoint),
                    destination=_text(packet.destination_endpoint),
                    sender=packet.sender,
                    inside=inside,
                )
            )
