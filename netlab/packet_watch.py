"""Packets of a lab in the kernel on its timeline: what each host sent, what reached it.

A packet socket in every host sees what its programs send and receive. NATs change addresses on
the way, so the two ends of one packet are told by what NATs leave alone: the payload, and for TCP
the sequence numbers. Drops come from elsewhere and know only endpoints; `join_drops` finds the
packets that they were.
"""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import msgspec
import trio

from netlab.drops import endpoint_text
from netlab.kernel.namespaces import NetworkNamespace
from netlab.timeline import (
    Event,
    MappingBorn,
    PacketDelivered,
    PacketDropped,
    PacketSent,
    Timeline,
)

_ETH_P_ALL = 0x0003
_PACKET_HOST, _PACKET_OUTGOING = 0, 4
_SO_TIMESTAMPNS = 35
# Looking this often costs a few system calls per host; times come from the kernel's stamps.
_INTERVAL_SECONDS = 0.02
# Headers and enough payload to tell packets apart.
_LOOK_BYTES = 256
_MAX_HEADER_BYTES = 60
# Per host and look, so that a flood in the lab does not stop everything else.
_MAX_BATCH = 2000
# Packets on their way at one time; the oldest are given up.
_MAX_ON_THEIR_WAY = 20_000
_PROTOCOLS = {6: "tcp", 17: "udp", 1: "icmp", 58: "icmp"}
_FLAGS = ((2, "SYN"), (1, "FIN"), (4, "RST"), (16, "ACK"))


class Parsed(NamedTuple):
    """What a timeline wants to know of a raw packet."""

    protocol: str
    source: str
    destination: str
    size_bytes: int
    flags: str
    key: tuple[str, int, bytes]
    """What is the same at both ends, whatever NATs did."""


def parse_packet(data: bytes, size_bytes: int) -> Parsed | None:
    """Return what a packet's beginning tells, or None for no whole IP header."""
    if len(data) >= 20 and data[0] >> 4 == 4:
        offset, number = (data[0] & 15) * 4, data[9]
        addresses = data[12:16], data[16:20]
    elif len(data) >= 40 and data[0] >> 4 == 6:
        offset, number = 40, data[6]
        addresses = data[8:24], data[24:40]
    else:
        return None
    protocol = _PROTOCOLS.get(number, str(number))
    ports, flags, identity = (0, 0), "", data[offset:]
    if number in (6, 17) and len(data) >= offset + 8:
        ports = struct.unpack_from("!HH", data, offset)
        identity = data[offset + 8 :]
        if number == 6 and len(data) >= offset + 14:
            bits = data[offset + 13]
            flags = "+".join(name for bit, name in _FLAGS if bits & bit)
            # Not the checksum, which every NAT has to change.
            identity = data[offset + 4 : offset + 16] + data[offset + 18 :]
    return Parsed(
        protocol,
        endpoint_text((addresses[0], ports[0])),
        endpoint_text((addresses[1], ports[1])),
        size_bytes,
        flags,
        # The headers of the two IP versions differ in length, the rest does not.
        (protocol, size_bytes - offset, identity),
    )


class _Seen(NamedTuple):
    unix_time: float
    host: str
    outgoing: bool
    packet: Parsed
    data: bytes


class PacketWatch:
    """Watches the hosts of a lab. Open it before programs start; `run` until cancelled."""

    def __init__(
        self,
        namespaces: Mapping[str, NetworkNamespace],
        timeline: Timeline,
        started_at: float,
        snap_bytes: int = 0,
    ) -> None:
        """Watch these hosts.

        Args:
            namespaces: the hosts' by name.
            timeline: where packets go.
            started_at: the monotonic time of the timeline's zero.
            snap_bytes: how much of each packet's contents goes with it.
        """
        self._timeline = timeline
        self._snap_bytes = snap_bytes
        # What turns the stamps, which are wall time, into the timeline's.
        self._zero = time.time() - (time.monotonic() - started_at)
        self._sockets: dict[str, socket.socket] = {}
        self._number = 0
        self._waiting: list[_Seen] = []
        self._on_their_way: dict[tuple[str, int, bytes], list[tuple[int, str]]] = {}
        try:
            for name, namespace in namespaces.items():
                made = namespace.socket(
                    socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(_ETH_P_ALL)
                )
                self._sockets[name] = made
                made.setblocking(False)
                made.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Let go of the sockets."""
        for made in self._sockets.values():
            made.close()
        self._sockets.clear()

    async def run(self) -> None:
        """Put packets on the timeline until cancelled."""
        while True:
            await trio.sleep(_INTERVAL_SECONDS)
            self.look()

    def look(self, *, everything: bool = False) -> None:
        """Put what has come in on the timeline, in order.

        Packets stamped after the look began wait for the next one: a host that was read early
        may have sent what another one has received since. `everything` is for the last look.
        """
        began = float("inf") if everything else time.time()
        look_bytes = max(_LOOK_BYTES, _MAX_HEADER_BYTES + self._snap_bytes)
        for host, made in self._sockets.items():
            for _ in range(_MAX_BATCH):
                try:
                    data, ancillary, _, sender = made.recvmsg(look_bytes, 64, socket.MSG_TRUNC)
                except (BlockingIOError, ConnectionError):
                    break
                interface, _, kind = sender[:3]
                if interface == "lo" or kind not in (_PACKET_HOST, _PACKET_OUTGOING):
                    continue
                parsed = parse_packet(data[:_LOOK_BYTES], _length_of(data))
                if parsed is not None:
                    kept = data[_header_bytes(data) :][: self._snap_bytes]
                    seen = _Seen(_stamp(ancillary), host, kind == _PACKET_OUTGOING, parsed, kept)
                    self._waiting.append(seen)
        self._waiting.sort(key=lambda seen: seen.unix_time)
        ready = [seen for seen in self._waiting if seen.unix_time <= began]
        del self._waiting[: len(ready)]
        for seen in ready:
            self._tell(seen)

    def _tell(self, seen: _Seen) -> None:
        at, packet = max(0.0, seen.unix_time - self._zero), seen.packet
        if seen.outgoing:
            self._number += 1
            self._on_their_way.setdefault(packet.key, []).append((self._number, seen.host))
            if len(self._on_their_way) > _MAX_ON_THEIR_WAY:
                del self._on_their_way[next(iter(self._on_their_way))]
            self._timeline.add(
                PacketSent(
                    at=at,
                    packet=self._number,
                    host=seen.host,
                    protocol=packet.protocol,
                    source=packet.source,
                    destination=packet.destination,
                    size_bytes=packet.size_bytes,
                    flags=packet.flags,
                    data=seen.data,
                )
            )
            return
        self._timeline.add(
            PacketDelivered(
                at=at,
                packet=self._take_number(seen),
                host=seen.host,
                protocol=packet.protocol,
                source=packet.source,
                destination=packet.destination,
            )
        )

    def _take_number(self, seen: _Seen) -> int:
        """Return the number that a delivered packet got when it was sent."""
        candidates = self._on_their_way.get(seen.packet.key, [])
        for index, (number, host) in enumerate(candidates):
            if host != seen.host:
                del candidates[index]
                if not candidates:
                    del self._on_their_way[seen.packet.key]
                return number
        self._number += 1
        return self._number


def _header_bytes(data: bytes) -> int:
    """Return how long a packet's IP header is."""
    return 40 if data[0] >> 4 == 6 else (data[0] & 15) * 4


def _length_of(data: bytes) -> int:
    """Return a packet's whole length, of which only the beginning was read."""
    if len(data) >= 6 and data[0] >> 4 == 6:
        return 40 + int.from_bytes(data[4:6], "big")
    return int.from_bytes(data[2:4], "big")


def _stamp(ancillary: list[tuple[int, int, bytes]]) -> float:
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == _SO_TIMESTAMPNS and len(data) >= 16:
            seconds, nanoseconds = struct.unpack_from("@qq", data)
            stamp: float = seconds + nanoseconds * 1e-9
            return stamp
    return time.time()


def join_drops(events: Iterable[Event]) -> list[Event]:
    """Return the events in order, each drop with the number and sender of its packet.

    A drop's source is followed back through the mappings of the NATs on its way; the packet is
    the last one from there to the same destination. What is not found stays as it is.
    """
    ordered = sorted(events, key=lambda event: event.at)
    inside: dict[str, str] = {}
    last_sent: dict[tuple[str, str], PacketSent] = {}
    joined: list[Event] = []
    for event in ordered:
        match event:
            case MappingBorn():
                inside[event.external] = event.inside
            case PacketSent():
                last_sent[event.source, event.destination] = event
            case PacketDropped(packet=0):
                source = event.source
                sent = last_sent.get((source, event.destination))
                # Two NATs in series are usual, more are rare; a loop must end anyway.
                for _ in range(4):
                    if sent is not None or source not in inside:
                        break
                    source = inside[source]
                    sent = last_sent.get((source, event.destination))
                if sent is not None:
                    event = msgspec.structs.replace(event, packet=sent.packet, sender=sent.host)
        joined.append(event)
    return joined
