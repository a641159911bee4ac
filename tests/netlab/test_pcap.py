"""Captures: blocks, interfaces, comments and headers as a reader of pcapng sees them."""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator

import msgspec
from trio.testing import MockClock

from netlab.drops import DropReason
from netlab.labs import BackEnd
from netlab.pcap import encode_packet, write_timeline
from netlab.runner import run_scenario
from netlab.scenario_file import parse_scenario
from netlab.timeline import (
    Event,
    PacketDelivered,
    PacketDropped,
    PacketSent,
    encode_event,
    read_jsonl,
)

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
    header = encode_packet("udp", "192.168.1.2:4000", "2.0.0.5:3478", 128)
    assert header is not None
    assert len(header) == 28
    words = struct.unpack("!10H", header[:20])
    total = sum(words)
    assert (total & 0xFFFF) + (total >> 16) == 0xFFFF
    assert header[12:20] == bytes([192, 168, 1, 2, 2, 0, 0, 5])
    assert struct.unpack("!HHH", header[20:26]) == (4000, 3478, 108)


def test_ipv6_headers() -> None:
    """The same for IPv6 and TCP flags."""
    header = encode_packet("tcp", "[2a0f:1::1]:443", "[2a0f:1::2]:5000", 60, "SYN+ACK")
    assert header is not None
    assert (len(header), header[0] >> 4, header[6], header[53]) == (60, 6, 6, 0x12)


def test_what_has_no_endpoints_is_left_out() -> None:
    """A drop of an unknown protocol makes no packet."""
    assert encode_packet("47", "2.0.0.1", "2.0.0.2", 100) is None
    assert encode_packet("unknown", "", "", 100) is None


def test_contents_up_to_the_snap_length() -> None:
    """What the sender put behind the IP header is there at every place, with that place's ports;
    the rest shows as cut off."""
    data = bytes.fromhex("0fa00d96006c1234") + b"\x00\x01\x00\x00\x21\x12\xa4\x42" + b"x" * 20
    sent = msgspec.structs.replace(EVENTS[0], data=data)
    file = io.BytesIO()
    write_timeline([sent, EVENTS[1]], file)
    first, second = (body for kind, body in blocks(file.getvalue()) if kind == 6)
    for body, port in ((first, 4000), (second, 4000)):
        captured, original = struct.unpack_from("<II", body, 12)
        packet = body[20 : 20 + captured]
        assert (captured, original) == (20 + len(data), 128)
        assert packet[20:28] == struct.pack("!HHHH", port, 3478, 108, 0)
        assert packet[28:] == data[8:]


async def test_both_back_ends_keep_contents(autojump_clock: MockClock) -> None:
    """A run's capture shows STUN as STUN; with a snap length of 0 it has headers only."""
    text = """
        duration = "2s"
        [host.a]
        [server.s]
        services = ["stun", "relay"]
        [[run]]
        on = "a"
        python = "netlab.node:node"
        args = ["a", "b", "${s.address}"]
        [[expect]]
        that = "ready in output(a)"
    """
    for snap_bytes in (512, 0):
        result = await run_scenario(parse_scenario(text), BackEnd.SIMULATED, snap_bytes=snap_bytes)
        sent = [event for event in result.timeline if isinstance(event, PacketSent)]
        stun = [event for event in sent if event.data[12:16] == b"\x21\x12\xa4\x42"]
        assert bool(stun) == bool(snap_bytes)
        assert all(len(event.data) <= snap_bytes for event in sent)
        assert list(read_jsonl(encode_event(event) for event in sent)) == sent
