"""The fabric process: carries the packets of impaired links and of user-space NATs.

    python -m netlab.kernel.fabric CONTROL_DESCRIPTOR EVENTS_DESCRIPTOR

It holds the other sides of TUN devices and runs outside the event loop under test, so that
neither delays the other. Commands arrive on the control socket as pickled (name, arguments),
with descriptors attached, from the process that started it, and each is answered by a pickled
(worked, result or error text). Events leave as JSON lines. It ends when the control socket does.

Waiting is done with epoll and a timer descriptor: epoll's own timeout has whole milliseconds,
which would be the largest error of all delays. Setting a timer that is soon due is dear, though,
above all in a virtual machine (13 us, more than everything else that a packet costs), so under
load packets leave when others arrive, and the timer is set at most once per `_REST_SECONDS`.
"""

from __future__ import annotations

import ctypes
import gc
import heapq
import math
import os
import pickle
import random
import select
import signal
import socket
import struct
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable
from typing import Any

import msgspec

from netlab.behavior import Link, NatBehavior
from netlab.drops import Drop, DropReason
from netlab.kernel.packets import describe
from netlab.kernel.siit import Siit
from netlab.kernel.tun_nat import Side, TunNat
from netlab.link import LinkDirection
from netlab.nat import Translator
from netlab.timeline import Event, MappingBorn, MappingDied, PacketDropped, encode_event

MAX_COMMAND_BYTES = 1 << 20
MAX_DESCRIPTORS = 2

# Packets taken from one device before the others get their turn: the latency that a flood on
# one link may add to another one is then about half a millisecond.
_BATCH_PACKETS = 64
_MAX_PACKET_BYTES = 65536
# How long a sleeping process takes to wake up, at the very least: the timer is set that much
# early. What is left of it is waited for awake.
_WAKE_UP_SECONDS = 30e-6
# After a delivery the next one waits this long, unless an arriving packet comes first.
_REST_SECONDS = 300e-6
# Expired mappings are reported this late at most; they translate nothing in the meantime.
_HOUSEKEEPING_SECONDS = 0.05
# The NATs' clock goes in steps, within which a flow's packets are all translated alike.
_NAT_TICKS_PER_SECOND = 1000
# Drops that are told one by one; a flood would otherwise spend its time on telling.
_MAX_DROP_EVENTS_PER_SECOND = 2000
# A packet more in flight than this would mean 300 MB of memory.
_MAX_IN_FLIGHT = 200_000

_CLOCK_MONOTONIC, _TFD_NONBLOCK_CLOEXEC, _TFD_TIMER_ABSTIME = 1, 0o2004000, 1
_libc = ctypes.CDLL(None, use_errno=True)


# What takes a packet at a time: a device, a cable or a NAT.
_Carrier = Callable[[bytes | bytearray, float], None]


class _Timer:
    """A timer descriptor on the monotonic clock."""

    def __init__(self) -> None:
        self.descriptor: int = _libc.timerfd_create(_CLOCK_MONOTONIC, _TFD_NONBLOCK_CLOEXEC)
        if self.descriptor < 0:
            raise OSError(ctypes.get_errno(), "cannot create a timer")
        self._set_for = math.inf

    def set(self, deadline: float) -> None:
        """Make the descriptor readable at `deadline`, or before that if it was set so."""
        if deadline < self._set_for:
            self._set_for = deadline
            nanoseconds = int(deadline * 1e9)
            setting = struct.pack(
                "=qqqq", 0, 0, nanoseconds // 1_000_000_000, nanoseconds % 1_000_000_000
            )
            _libc.timerfd_settime(self.descriptor, _TFD_TIMER_ABSTIME, setting, None)

    def acknowledge(self) -> None:
        """Make the descriptor, which has become readable, ready to be set again."""
        self._set_for = math.inf
        os.read(self.descriptor, 8)


class _Flight:
    """Packets on their way, in the order of their arrival, and what takes them then."""

    __slots__ = ("deliver", "packets")

    def __init__(self, deliver: _Carrier) -> None:
        self.deliver = deliver
        self.packets: deque[tuple[float, bytes | bytearray]] = deque()


class _Pump:
    """Both directions of one cable, upload first, and their flights."""

    def __init__(self, directions: tuple[LinkDirection, LinkDirection], ends: list[int]) -> None:
        self.directions = directions
        inner, outer = ends
        self.flights = (_Flight(_writer(outer)), _Flight(_writer(inner)))


def _ipv6_outlet(siit: Siit, write: _Carrier) -> _Carrier:
    """Return what takes a NAT64's IPv4 packets to its inside."""

    def write_translated(packet: bytes | bytearray, now: float) -> None:
        for piece in siit.to_ipv6(packet):
            write(piece, now)

    return write_translated


def _writer(device: int) -> _Carrier:
    write = os.write

    def write_packet(packet: bytes | bytearray, now: float) -> None:
        try:
            write(device, packet)
        except OSError:
            # The device is down, or the kernel is out of buffers: a cable would lose it too.
            pass

    return write_packet


class Fabric:
    """The state of the process and its loop."""

    def __init__(self, control: socket.socket, events: socket.socket) -> None:
        self._control = control
        self._events = events
        self._epoll = select.epoll()
        self._timer = _Timer()
        self._readers: dict[int, Callable[[], None]] = {}
        self._pumps: dict[str, _Pump] = {}
        self._carriers: dict[str, _Carrier] = {}
        self._nats: dict[str, TunNat] = {}
        # When the first packet of each flight is due; the number only breaks ties.
        self._due: list[tuple[float, int, _Flight]] = []
        self._serial = 0
        self._in_flight = 0
        self._rest_until = 0.0
        self._started = time.monotonic()
        # The NATs' clock: real seconds since the start times the scale. Each may be ahead of it.
        self._scale = 1.0
        self._nat_now = 0.0
        self._drop_budget = _MAX_DROP_EVENTS_PER_SECOND
        self._lost_events = 0
        self._next_housekeeping = 0.0
        self._next_budget = 0.0

    # --- the loop ------------------------------------------------------------------------

    def run(self) -> None:
        """Serve until the control socket closes."""
        epoll, timer, control = self._epoll, self._timer, self._control.fileno()
        epoll.register(timer.descriptor, select.EPOLLIN)
        epoll.register(control, select.EPOLLIN)
        readers, due, monotonic = self._readers, self._due, time.monotonic
        while True:
            deadline = self._next_housekeeping
            if due:
                deadline = min(deadline, max(due[0][0], self._rest_until))
            if deadline - monotonic() > _WAKE_UP_SECONDS:
                timer.set(deadline - _WAKE_UP_SECONDS)
                ready = epoll.poll()
            else:
                ready = epoll.poll(0)
            self._nat_now = self._nat_time(monotonic())
            for descriptor, _ in ready:
                reader = readers.get(descriptor)
                if reader is not None:
                    reader()
                elif descriptor == timer.descriptor:
                    timer.acknowledge()
                elif not self._handle_command():
                    return
            now = monotonic()
            if due and due[0][0] <= now:
                self._deliver(now)
            if now >= self._next_housekeeping:
                self._keep_house(now)

    def _deliver(self, now: float) -> None:
        """Hand over a batch of what is due."""
        due = self._due
        left = _BATCH_PACKETS
        while due and due[0][0] <= now:
            if not left:
                self._rest_until = now
                return
            _, serial, flight = heapq.heappop(due)
            deliver, packets, before = flight.deliver, flight.packets, left
            while left and packets and packets[0][0] <= now:
                left -= 1
                deliver(packets.popleft()[1], now)
            self._in_flight -= before - left
            if packets:
                heapq.heappush(due, (packets[0][0], serial, flight))
        self._rest_until = now + _REST_SECONDS

    def _keep_house(self, now: float) -> None:
        self._next_housekeeping = now + _HOUSEKEEPING_SECONDS
        if now >= self._next_budget:
            self._next_budget = now + 1.0
            self._drop_budget = _MAX_DROP_EVENTS_PER_SECOND
        for nat in self._nats.values():
            nat_now = self._nat_time(now) + nat.ahead_seconds
            deadline = nat.translator.next_deadline()
            if deadline is not None and deadline <= nat_now:
                nat.translator.on_time(nat_now)

    def _nat_time(self, now: float) -> float:
        seconds = (now - self._started) * self._scale
        return int(seconds * _NAT_TICKS_PER_SECOND) / _NAT_TICKS_PER_SECOND

    # --- links ---------------------------------------------------------------------------

    def add_pump(
        self, descriptors: list[int], key: str, upload: Link, download: Link, seed: str
    ) -> None:
        """Carry packets between two devices; `upload` is from the first to the second."""
        pump = self._pumps[key] = _Pump(
            (
                LinkDirection(upload, random.Random(f"{seed} up")),
                LinkDirection(download, random.Random(f"{seed} down")),
            ),
            descriptors,
        )
        for source, direction, flight in zip(
            descriptors, pump.directions, pump.flights, strict=True
        ):
            carry = self._carrier(key, direction, flight)
            self._read_from(source, carry)
            self._carriers.setdefault(key, carry)

    def _read_from(self, device: int, carry: _Carrier) -> None:
        """Take packets from a device whenever it has some."""
        read, monotonic = os.read, time.monotonic

        def read_packets() -> None:
            for _ in range(_BATCH_PACKETS):
                try:
                    packet = read(device, _MAX_PACKET_BYTES)
                except OSError:
                    return
                carry(packet, monotonic())

        self._readers[device] = read_packets
        self._epoll.register(device, select.EPOLLIN)

    def _carrier(self, key: str, direction: LinkDirection, flight: _Flight) -> _Carrier:
        send, packets = direction.send, flight.packets

        def carry_packet(packet: bytes | bytearray, now: float) -> None:
            arrivals = send(now, len(packet))
            if isinstance(arrivals, Drop):
                self._report_drop(key, arrivals, packet)
                return
            for arrival in arrivals:
                if arrival <= now:
                    flight.deliver(packet, now)
                elif self._in_flight >= _MAX_IN_FLIGHT:
                    self._report_drop(key, Drop(DropReason.QUEUE_FULL), packet)
                else:
                    self._in_flight += 1
                    if packets and arrival >= packets[-1][0]:
                        packets.append((arrival, packet))
                    else:
                        # What overtakes the last one flies alone.
                        self._launch(
                            _Flight(flight.deliver) if packets else flight, arrival, packet
                        )

        return carry_packet

    def _launch(self, flight: _Flight, arrival: float, packet: bytes | bytearray) -> None:
        flight.packets.append((arrival, packet))
        self._serial += 1
        heapq.heappush(self._due, (arrival, self._serial, flight))

    def set_link(self, _: list[int], key: str, upload: Link, download: Link) -> None:
        """Change what a pumped cable does to packets."""
        for direction, link in zip(self._pumps[key].directions, (upload, download), strict=True):
            direction.link = link

    def set_link_up(self, _: list[int], key: str, up: bool) -> None:
        """Cut a pumped cable, or heal it."""
        for direction in self._pumps[key].directions:
            direction.up = up

    # --- NATs ----------------------------------------------------------------------------

    def add_nat(
        self,
        descriptors: list[int],
        name: str,
        uplink: str,
        behavior: NatBehavior,
        external: list[bytes],
        inside_hosts: list[bytes],
        seed: str,
    ) -> None:
        """Translate between an inside device and a pumped cable, whose IPv6 goes on as before."""
        pump = self._pumps[uplink]
        to_router = pump.flights[1].deliver
        siit = Siit() if behavior.nat64 else None
        to_inside = _writer(descriptors[0])
        carry: tuple[_Carrier, _Carrier] = (
            to_inside if siit is None else _ipv6_outlet(siit, to_inside),
            self._carriers[uplink],
        )

        def on_mapping(event: MappingBorn | MappingDied) -> None:
            if siit is not None:
                event = msgspec.structs.replace(event, inside=siit.reveal(event.inside))
            self._report_mapping(event)

        translator = Translator(
            behavior,
            external,
            generator=random.Random(seed),
            name=name,
            on_event=on_mapping,
            inside_hosts=inside_hosts,
        )

        def answer(side: Side, packet: bytes) -> None:
            carry[side](packet, time.monotonic())

        def on_drop(drop: Drop, packet: bytes) -> None:
            if siit is not None:
                drop, packet = siit.reveal_drop(drop, packet)
            self._report_drop(name, drop, packet)

        nat = self._nats[name] = TunNat(translator, answer, on_drop)
        handle = nat.handle_packet

        def translate_outbound(packet: bytes | bytearray, now: float) -> None:
            changed = bytearray(packet) if siit is None else siit.to_ipv4(packet)
            if changed is None:
                return
            leaves = handle(changed, Side.INSIDE, self._nat_now + nat.ahead_seconds)
            if leaves is not None:
                carry[leaves](changed, now)

        def translate_inbound(packet: bytes | bytearray, now: float) -> None:
            if len(packet) >= 40 and packet[0] >> 4 == 6:
                to_router(packet, now)
                return
            changed = bytearray(packet)
            leaves = handle(changed, Side.OUTSIDE, self._nat_now + nat.ahead_seconds)
            if leaves is not None:
                carry[leaves](changed, now)

        self._read_from(descriptors[0], translate_outbound)
        pump.flights[1].deliver = translate_inbound

    def reboot(self, _: list[int], name: str) -> None:
        """Make a NAT forget everything."""
        nat = self._nats[name]
        nat.reboot(self._nat_now + nat.ahead_seconds)

    def renumber(self, _: list[int], name: str, external: list[bytes]) -> None:
        """Give a NAT other external addresses."""
        nat = self._nats[name]
        nat.renumber(external, self._nat_now + nat.ahead_seconds)

    def set_clock(self, _: list[int], started: float, scale: float) -> None:
        """Set the start of the lab's time, and how fast the NATs' timers run against it."""
        self._started = started
        self._scale = scale

    def advance(self, _: list[int], name: str, seconds: float) -> None:
        """Let a NAT's clock jump ahead."""
        nat = self._nats[name]
        nat.ahead_seconds += seconds
        nat.translator.on_time(self._nat_now + nat.ahead_seconds)

    def statistics(self, _: list[int]) -> dict[str, int]:
        """Return counters: mappings, packets in flight, events lost."""
        mappings = sum(nat.translator.mapping_count for nat in self._nats.values())
        return {
            "mappings": mappings,
            "in_flight": self._in_flight,
            "lost_events": self._lost_events,
        }

    # --- commands and events -------------------------------------------------------------

    def _handle_command(self) -> bool:
        """Carry out one command; return False when there are no more."""
        data, descriptors, _, _ = socket.recv_fds(self._control, MAX_COMMAND_BYTES, MAX_DESCRIPTORS)
        if not data:
            return False
        commands: dict[str, Callable[..., Any]] = {
            "add_pump": self.add_pump,
            "set_link": self.set_link,
            "set_link_up": self.set_link_up,
            "add_nat": self.add_nat,
            "reboot": self.reboot,
            "renumber": self.renumber,
            "set_clock": self.set_clock,
            "advance": self.advance,
            "statistics": self.statistics,
        }
        try:
            name, arguments = pickle.loads(data)
            answer = (True, commands[name](descriptors, *arguments))
        except Exception:
            answer = (False, traceback.format_exc())
        self._control.send(pickle.dumps(answer))
        return True

    def _report(self, event: Event) -> None:
        try:
            self._events.send(encode_event(event))
        except BlockingIOError:
            self._lost_events += 1

    def _report_mapping(self, event: MappingBorn | MappingDied) -> None:
        # The timeline has one clock, and a NAT's own may run faster.
        at = time.monotonic() - self._started
        self._report(msgspec.structs.replace(event, at=at))

    def _report_drop(self, where: str, drop: Drop, packet: bytes | bytearray) -> None:
        if not self._drop_budget:
            self._lost_events += 1
            return
        self._drop_budget -= 1
        protocol, source, destination = describe(bytes(packet))
        self._report(
            PacketDropped(
                at=time.monotonic() - self._started,
                packet=0,
                where=where,
                reason=drop.reason,
                text=drop.text,
                protocol=protocol,
                source=source,
                destination=destination,
            )
        )


def main(arguments: list[str]) -> None:
    """Run the fabric on inherited sockets until its starter lets go of them."""
    # Ctrl-C in the terminal is for the starter, which then closes the sockets.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    control, events = (socket.socket(fileno=int(argument)) for argument in arguments)
    events.setblocking(False)
    # Packets in flight are many objects without cycles: nothing for the collector to find.
    gc.disable()
    Fabric(control, events).run()


if __name__ == "__main__":
    main(sys.argv[1:])
