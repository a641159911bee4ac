"""Captures: blocks, interfaces, comments and headers as a reader of pcapng sees them."""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator

from netlab.drops import DropReason
from netlab.pcap import encode_header, write_timeline
from netlab.timeline import Event, PacketDelivered, PacketDropped, PacketSent

EVENTS: list[Event] = [
    PacketSent(
        at=1.5,
        packet=1,
        host="a",
        protocol="udp",
        source="192.168.1.2:4000",
        destination="2.0.0.5:3478",
        size_bytes=128,
    ),
    PacketDelivered(
        at=1.6,
        packet=1,
        host="stun",
        protocol="udp",
        source="2.1.0.9:4000",
        destination="2.0.0.5:3478",
    ),
    PacketDropped(
        at=1.7,
        packet=2,
        where="home",
        reason=DropReason.FILTERED,
        text="filtered, port-dependent",
        protocol="tcp",
        source="[2a0f:1::1]:443",
        destination="[2a0f:1::2]:5000",
    ),
]


def blocks(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Walk over the blocks of a section; both lengths must agree."""
    offset = 0
    while offset < len(data):
        kind, length = struct.unpack_from("<II", data, offset)
        assert length % 4 == 0
        assert struct.unpack_from("<I", data, offset + length - 4)[0] == length
        yield kind, data[offset + 8 : offset + length - 4]
        offset += length


def test_a_timeline_as_pcapng() -> None:
    """One section, an interface per place, a packet per event, the reason as a comment."""
    file = io.BytesIO()
    assert write_timeline(EVENTS, file, unix_time=1000.0) == 3
    found = list(blocks(file.getvalue()))
    assert [kind for kind, _ in found] == [0x0A0D0D0A, 1, 6, 1, 6, 1, 6]
    interfaces = [body for kind, body in found if kind == 1]
    assert [name in body for name, body in zip((b"a", b"stun", b"home"), interfaces, strict=True)]
    packets = [body for kind, body in found if kind == 6]
    number, high, low, captured, original = struct.unpack_from("<IIIII", packets[0])
    assert (number, high << 32 | low, captured, original) == (0, 1001_500_000, 28, 128)
    assert b"dropped at home: filtered, port-dependent" in packets[2]


def test_headers_hold_what_the_event_says() -> None:
    """Addresses, ports, length and a header checksum that adds up."""
    header = encode_header("udp", "192.168.1.2:4000", "2.0.0.5:3478", 128)
    assert header is not None
    assert len(header) == 28
    words = struct.unpack("!10H", header[:20])
    total = sum(words)
    assert (total & 0xFFFF) + (total >> 16) == 0xFFFF
    assert header[12:20] == bytes([192, 168, 1, 2, 2, 0, 0, 5])
    assert struct.unpack("!HHH", header[20:26]) == (4000, 3478, 108)


def test_ipv6_headers() -> None:
    """The same for IPv6 and TCP flags."""
    header = encode_header("tcp", "[2a0f:1::1]:443", "[2a0f:1::2]:5000", 60, "SYN+ACK")
    assert header is not None
    assert (len(header), header[0] >> 4, header[6], header[53]) == (60, 6, 6, 0x12)


def test_what_has_no_endpoints_is_left_out() -> None:
    """A drop of an unknown protocol makes no packet."""
    assert encode_header("47", "2.0.0.1", "2.0.0.2", 100) is None
    assert encode_header("unknown", "", "", 100) is None
