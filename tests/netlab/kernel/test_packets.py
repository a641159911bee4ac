"""Checksums and answers to dropped packets, against full recomputation."""

from __future__ import annotations

import struct

from hypothesis import given
from hypothesis import strategies as st

from netlab.kernel import packets

ADDRESSES = st.binary(min_size=4, max_size=4)
PORTS = st.integers(0, 65535)


def rfc1071(data: bytes) -> int:
    """The checksum the long way: RFC 1071 section 4.1."""
    data += b"\0" * (len(data) % 2)
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def is_valid(data: bytes) -> bool:
    return rfc1071(data) == 0


def test_the_example_of_rfc_1071() -> None:
    """Section 3: 00 01 f2 03 f4 f5 f6 f7 sum up to ddf2."""
    assert packets.checksum(bytes.fromhex("0001f203f4f5f6f7")) == 0xFFFF - 0xDDF2


@given(st.binary(max_size=100))
def test_checksum_equals_the_long_way(data: bytes) -> None:
    """Division by 0xffff and end-around carry give the same sum."""
    assert packets.checksum(data) == rfc1071(data)


@given(ADDRESSES, PORTS, ADDRESSES, PORTS, st.binary(max_size=40))
def test_an_adjusted_checksum_stays_valid(
    old: bytes, old_port: int, new: bytes, new_port: int, rest: bytes
) -> None:
    """After address and port change, the incremental update verifies (RFC 1624)."""
    packet = bytearray(2) + old + struct.pack("!H", old_port) + b"\x01" + rest
    struct.pack_into("!H", packet, 0, packets.checksum(packet))
    assert is_valid(bytes(packet))
    _, change = packets.endpoint_change(old, old_port, new, new_port)
    packet[2:8] = new + struct.pack("!H", new_port)
    packets.adjust_checksum(packet, 0, change)
    assert is_valid(bytes(packet))


def syn(flags: int, data: bytes = b"") -> bytes:
    segment = struct.pack("!HHIIBBHHH", 40000, 443, 1000, 2000, 5 << 4, flags, 0, 0, 0) + data
    return packets.make_packet(bytes([10, 0, 0, 1]), bytes([2, 0, 0, 1]), 6, segment)


def test_a_reset_acknowledges_a_syn_and_its_data() -> None:
    """RFC 9293 section 3.5.2: RST, ACK of everything, ports and addresses turned round."""
    answer = packets.make_reset(syn(0x02, b"abc"))
    assert answer is not None
    assert (answer[12:16], answer[16:20]) == (bytes([2, 0, 0, 1]), bytes([10, 0, 0, 1]))
    assert struct.unpack_from("!HHIIBB", answer, 20) == (443, 40000, 0, 1004, 5 << 4, 0x14)
    assert is_valid(answer[:20])
    assert is_valid(answer[12:20] + struct.pack("!HH", 6, 20) + answer[20:])


def test_a_reset_of_an_acknowledging_segment_uses_its_number() -> None:
    """A segment with ACK is answered in its own sequence space, without ACK."""
    answer = packets.make_reset(syn(0x10))
    assert answer is not None
    assert struct.unpack_from("!II", answer, 24) == (2000, 0)
    assert answer[33] == 0x04


def test_a_reset_is_never_answered() -> None:
    """Two resets would otherwise answer each other for ever."""
    assert packets.make_reset(syn(0x04)) is None


def test_an_icmp_error_carries_the_head_of_the_packet() -> None:
    """Type, code, checksum, and header plus eight bytes of what is complained of."""
    original = syn(0x02)
    error = packets.make_icmp_error(bytes([2, 0, 0, 9]), original, packets.PORT_UNREACHABLE)
    assert error[9] == 1
    assert error[16:20] == original[12:16]
    assert (error[20], error[21]) == (3, 3)
    assert error[28:] == original[:28]
    assert is_valid(error[:20])
    assert is_valid(error[20:])
