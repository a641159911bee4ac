"""Captures in pcapng (draft-ietf-opsawg-pcapng), with drop reasons as packet comments. Pure.

One interface stands for each machine; the link type is RAW, a packet starts with its IP header.

    block        := type(4) total_length(4) body padded to 4 bytes, total_length(4)
    section      := 0x0A0D0D0A, byte-order magic, version 1.0, section length -1
    interface    := 1, link type(2) reserved(2) snap length(4) options
    packet       := 6, interface(4) time high(4) low(4) captured(4) original(4) data options
    option       := code(2) length(2) value padded to 4 bytes; the end is code 0

A timeline knows what each packet carried up to the run's snap length, and its addresses at every
place: `write_timeline` makes the IP headers and says how long the packet was, so that Wireshark
shows the rest as truncated.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from ipaddress import ip_address
from typing import IO

from netlab.timeline import Event, PacketDelivered, PacketDropped, PacketSent

_SECTION, _INTERFACE, _PACKET = 0x0A0D0D0A, 1, 6
_MAGIC = 0x1A2B3C4D
_LINK_TYPE_RAW = 101
_OPTION_COMMENT, _OPTION_NAME, _OPTION_RESOLUTION = 1, 2, 9
_MICROSECONDS = 6
_UDP, _TCP, _ICMP, _ICMP6 = 17, 6, 1, 58
_NUMBERS = {"udp": _UDP, "tcp": _TCP, "icmp": _ICMP}
_TCP_FLAGS = {"FIN": 1, "SYN": 2, "RST": 4, "ACK": 16}


class PcapngWriter:
    """Writes one section of a pcapng file.

    Args:
        file: takes bytes.
        unix_time: the wall time of the lab's start, so that the packets have dates.
    """

    def __init__(self, file: IO[bytes], unix_time: float = 0.0) -> None:
        self._file = file
        self._unix_time = unix_time
        self._interfaces: dict[str, int] = {}
        self._block(_SECTION, struct.pack("<IHHq", _MAGIC, 1, 0, -1))

    def _block(self, kind: int, body: bytes) -> None:
        body += bytes(-len(body) % 4)
        length = struct.pack("<I", len(body) + 12)
        self._file.write(struct.pack("<I", kind) + length + body + length)

    def _interface(self, name: str) -> int:
        number = self._interfaces.get(name)
        if number is None:
            number = self._interfaces[name] = len(self._interfaces)
            options = _option(_OPTION_NAME, name.encode())
            options += _option(_OPTION_RESOLUTION, bytes([_MICROSECONDS]))
            options += _option(0, b"")
            self._block(_INTERFACE, struct.pack("<HHI", _LINK_TYPE_RAW, 0, 0) + options)
        return number

    def write(
        self,
        at: float,
        interface: str,
        packet: bytes,
        *,
        original_bytes: int | None = None,
        comment: str = "",
    ) -> None:
        """Add a packet, `at` seconds after the lab's start."""
        number = self._interface(interface)
        time = round((self._unix_time + at) * 1_000_000)
        original = len(packet) if original_bytes is None else max(original_bytes, len(packet))
        head = struct.pack("<IIIII", number, time >> 32, time & 0xFFFFFFFF, len(packet), original)
        body = head + packet + bytes(-len(packet) % 4)
        if comment:
            body += _option(_OPTION_COMMENT, comment.encode()) + _option(0, b"")
        self._block(_PACKET, body)


def _option(code: int, value: bytes) -> bytes:
    return struct.pack("<HH", code, len(value)) + value + bytes(-len(value) % 4)


def write_timeline(events: Iterable[Event], file: IO[bytes], unix_time: float = 0.0) -> int:
    """Write the packets of a timeline; return how many there were.

    A sent and a delivered packet show at their host's interface, a dropped one at the place
    where it ended, with the reason as its comment.
    """
    writer = PcapngWriter(file, unix_time)
    known: dict[int, PacketSent] = {}
    count = 0
    for event in events:
        comment = ""
        match event:
            case PacketSent():
                place = event.host
                known[event.packet] = event
            case PacketDelivered():
                place = event.host
            case PacketDropped():
                place = event.where
                comment = f"dropped at {event.where}: {event.text}"
            case _:
                continue
        sent = known.get(event.packet)
        size = sent.size_bytes if sent is not None else 0
        packet = encode_packet(
            event.protocol,
            event.source,
            event.destination,
            size,
            sent.flags if sent is not None else "",
            sent.data if sent is not None else b"",
        )
        if packet is None:
            continue
        count += 1
        writer.write(event.at, place, packet, original_bytes=size, comment=comment)
    return count


def _split(endpoint: str) -> tuple[str, int]:
    address, _, port = endpoint.rpartition(":")
    if address.startswith("["):
        return address[1:-1], int(port)
    if address and ":" not in address:
        return address, int(port)
    return endpoint, 0


def encode_packet(
    protocol: str,
    source: str,
    destination: str,
    size_bytes: int,
    flags: str = "",
    data: bytes = b"",
) -> bytes | None:
    """Return a packet that a timeline tells about: headers, and what is known of its contents.

    Args:
        protocol, source, destination: as events have them.
        size_bytes: of the whole packet.
        flags: of TCP, where there is no `data`.
        data: what followed the IP header at the sender; its ports become these, and its checksum
            0, since addresses that NATs have changed would make it wrong.

    Returns:
        None for what has no endpoints to show, such as a protocol that nobody translates.
    """
    try:
        (source_ip, source_port), (target_ip, target_port) = _split(source), _split(destination)
        one, other = ip_address(source_ip), ip_address(target_ip)
    except ValueError:
        return None
    number = _NUMBERS.get(protocol)
    if number is None or one.version != other.version:
        return None
    size = max(size_bytes, 28 if one.version == 4 else 48)
    inner_bytes = size - (20 if one.version == 4 else 40)
    if number in (_UDP, _TCP) and len(data) >= 8:
        inner = struct.pack("!HH", source_port, target_port) + data[4:]
        at = 6 if number == _UDP else 16
        if len(inner) >= at + 2:
            inner = inner[:at] + b"\0\0" + inner[at + 2 :]
    elif number == _ICMP and data:
        number, inner = (_ICMP if one.version == 4 else _ICMP6), data
    elif number == _UDP:
        inner = struct.pack("!HHHH", source_port, target_port, inner_bytes, 0)
    elif number == _TCP:
        bits = sum(_TCP_FLAGS.get(name, 0) for name in flags.split("+"))
        inner = struct.pack("!HHIIBBHHH", source_port, target_port, 0, 0, 0x50, bits, 0, 0, 0)
    else:
        number = _ICMP if one.version == 4 else _ICMP6
        inner = struct.pack("!BBHI", 3 if one.version == 4 else 1, 0, 0, 0)
    if one.version == 6:
        head = struct.pack("!IHBB", 6 << 28, inner_bytes & 0xFFFF, number, 64)
        return head + one.packed + other.packed + inner
    head = struct.pack("!BBHHHBBH", 0x45, 0, size & 0xFFFF, 0, 0, 64, number, 0)
    checksum = _checksum(head + one.packed + other.packed)
    return head[:10] + struct.pack("!H", checksum) + one.packed + other.packed + inner


def _checksum(header: bytes) -> int:
    total: int = sum(struct.unpack(f"!{len(header) // 2}H", header))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return 0xFFFF - total
