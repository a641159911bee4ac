"""Stateless IP/ICMP translation: there and back, valid checksums, and no bytes break it."""

from __future__ import annotations

import struct
from ipaddress import ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from netlab.drops import Drop, DropReason
from netlab.kernel import packets
from netlab.kernel.siit import Siit

HOST = ip_address("2a0f:1:1:1::11").packed
SERVER = bytes([2, 0, 0, 5])
SERVER_IN_IPV6 = ip_address("64:ff9b::2.0.0.5").packed
UDP, TCP, FRAGMENT, ICMPV6 = 17, 6, 44, 58
CHECKSUM_AT = {UDP: 6, TCP: 16, ICMPV6: 2}


def ipv6(
    header: int, payload: bytes, source: bytes = HOST, destination: bytes = SERVER_IN_IPV6
) -> bytes:
    """Return an IPv6 packet, with the checksum of its whole payload filled in."""
    at = CHECKSUM_AT.get(header)
    if at is not None:
        pseudo = source + destination + struct.pack("!IxxxB", len(payload), header)
        blank = payload[:at] + b"\0\0" + payload[at + 2 :]
        value = packets.checksum(pseudo + blank) or 0xFFFF
        payload = payload[:at] + struct.pack("!H", value) + payload[at + 2 :]
    return struct.pack("!IHBB", 6 << 28, len(payload), header, 64) + source + destination + payload


def udp(data: bytes) -> bytes:
    return ipv6(UDP, struct.pack("!HHHH", 4000, 3478, 8 + len(data), 0) + data)


def is_valid_ipv4(packet: bytes | bytearray) -> bool:
    """Whether the header's and the transport's checksums hold."""
    protocol, payload = packet[9], packet[20:]
    pseudo = packet[12:20] + struct.pack("!HH", protocol, len(payload))
    covered = payload if protocol == 1 else pseudo + payload
    return packets.checksum(packet[:20]) == packets.checksum(covered) == 0


def is_valid_ipv6(packet: bytes) -> bool:
    pseudo = packet[8:40] + struct.pack("!IxxxB", len(packet) - 40, packet[6])
    return packets.checksum(pseudo + packet[40:]) == 0


def readdress(packet: bytes | bytearray) -> bytes:
    """Return the answer to an IPv4 packet that carries the same: ends swapped."""
    changed = bytearray(packet)
    changed[12:16], changed[16:20] = packet[16:20], packet[12:16]
    return bytes(changed)


@given(st.binary(max_size=1200), st.sampled_from([UDP, TCP]))
def test_there_and_back(data: bytes, protocol: int) -> None:
    """What an inside host sent comes back to it byte for byte, checksums valid on both sides."""
    siit = Siit()
    transport = struct.pack("!HHHH", 4000, 3478, 8 + len(data), 0)
    if protocol == TCP:
        transport = struct.pack("!HHIIBBHHH", 4000, 443, 1, 2, 5 << 4, 16, 9, 0, 0)
    sent = ipv6(protocol, transport + data)
    packet = siit.to_ipv4(sent)
    assert packet is not None
    assert packet[16:20] == SERVER
    assert is_valid_ipv4(packet)
    (back,) = siit.to_ipv6(readdress(packet))
    assert (back[8:24], back[24:40]) == (SERVER_IN_IPV6, HOST)
    assert back[40:] == sent[40:]
    assert is_valid_ipv6(back)


def test_hosts_keep_their_stand_ins() -> None:
    """The NAT's mappings hang on them; events and drops name the real address."""
    siit = Siit()
    first, second = siit.to_ipv4(udp(b"1")), siit.to_ipv4(udp(b"2"))
    other = siit.to_ipv4(ipv6(UDP, bytes(8), source=HOST[:15] + b"\x12"))
    assert first is not None
    assert second is not None
    assert other is not None
    assert first[12:16] == second[12:16] != other[12:16]
    stand_in = bytes(first[12:16])
    assert siit.reveal(f"{ip_address(stand_in)}:4000") == "[2a0f:1:1:1::11]:4000"
    drop, packet = siit.reveal_drop(
        Drop(DropReason.FILTERED, inside=(stand_in, 4000)), bytes(first)
    )
    assert drop.inside == (HOST, 4000)
    assert packets.describe(packet)[1:] == ("[2a0f:1:1:1::11]:4000", "[64:ff9b::200:5]:3478")


def test_an_echo_and_its_answer() -> None:
    """Ping works, although the two versions count different things into its checksum."""
    siit = Siit()
    request = siit.to_ipv4(ipv6(ICMPV6, b"\x80\0\0\0\x12\x34\0\1ping"))
    assert request is not None
    assert (request[9], request[20], request[24:]) == (1, 8, b"\x12\x34\0\1ping")
    assert is_valid_ipv4(request)
    message = bytearray(b"\0\0\0\0\x12\x34\0\1ping")
    struct.pack_into("!H", message, 2, packets.checksum(message))
    answer = packets.make_packet(SERVER, bytes(request[12:16]), 1, bytes(message))
    (back,) = siit.to_ipv6(answer)
    assert (back[6], back[40], back[44:]) == (ICMPV6, 0x81, b"\x12\x34\0\1ping")
    assert is_valid_ipv6(back)


@pytest.mark.parametrize(
    ("kind", "code", "mtu", "expected"),
    [
        (3, 3, 0, (1, 4, 0)),
        (3, 4, 1400, (2, 0, 1420)),
        (3, 4, 0, (2, 0, 1280)),
        (11, 0, 0, (3, 0, 0)),
    ],
    ids=["port unreachable", "too big", "too big, no MTU", "time exceeded"],
)
def test_errors_reach_the_inside(
    kind: int, code: int, mtu: int, expected: tuple[int, int, int]
) -> None:
    """With the packet complained of as the host sent it, and its MTU 20 bytes larger."""
    siit = Siit()
    sent = udp(b"hello")
    packet = siit.to_ipv4(sent)
    assert packet is not None
    error = bytearray(packets.make_icmp_error(SERVER, bytes(packet), code, kind, mtu))
    (back,) = siit.to_ipv6(error)
    number = int.from_bytes(back[44:48], "big")
    assert (back[40], back[41], number) == expected
    assert back[48:] == sent[: len(back) - 48]
    assert is_valid_ipv6(back)


def test_errors_of_the_inside_leave() -> None:
    """A router inside that finds a packet too big tells the IPv4 sender, in IPv4's terms."""
    siit = Siit()
    packet = siit.to_ipv4(udp(b"hello"))
    assert packet is not None
    (incoming,) = siit.to_ipv6(readdress(packet))
    message = struct.pack("!BBHI", 2, 0, 0, 1280) + incoming[:48]
    error = siit.to_ipv4(ipv6(ICMPV6, message))
    assert error is not None
    assert (error[20], error[21], error[26:28]) == (3, 4, (1260).to_bytes(2, "big"))
    assert error[28 + 12 : 28 + 20] == packet[16:20] + packet[12:16]
    assert is_valid_ipv4(error)


def test_a_big_packet_that_may_be_cut_is_cut() -> None:
    """To what every IPv6 link carries; the pieces together are the packet (RFC 7915 section 4)."""
    siit = Siit()
    packet = siit.to_ipv4(udp(b"x" * 1440))
    assert packet is not None
    whole = bytearray(readdress(packet))
    assert len(siit.to_ipv6(whole)) == 1  # it says "don't fragment"
    whole[6:8] = b"\0\0"
    pieces = siit.to_ipv6(whole)
    assert [len(piece) <= 1280 for piece in pieces] == [True, True]
    assert {(piece[6], piece[40]) for piece in pieces} == {(FRAGMENT, UDP)}
    offsets = [int.from_bytes(piece[42:44], "big") for piece in pieces]
    assert offsets == [1, len(pieces[0]) - 48]
    joined = b"".join(piece[48:] for piece in pieces)
    assert is_valid_ipv6(
        struct.pack("!IHBB", 6 << 28, len(joined), UDP, 64) + pieces[0][8:40] + joined
    )


def test_fragments_of_the_inside() -> None:
    """Keep their offsets and their identification."""
    siit = Siit()
    header = struct.pack("!BxHI", UDP, 1448 | 1, 0xABCD1234)
    packet = siit.to_ipv4(ipv6(FRAGMENT, header + b"x" * 64))
    assert packet is not None
    assert struct.unpack_from("!HHH", packet, 2) == (84, 0x1234, 0x2000 | 181)
    assert packet[9] == UDP


def test_udp_without_a_checksum_gets_one() -> None:
    """IPv6 has no UDP without."""
    siit = Siit()
    packet = siit.to_ipv4(udp(b"hello"))
    assert packet is not None
    packet[26:28] = b"\0\0"
    (back,) = siit.to_ipv6(readdress(packet))
    assert back[46:48] != b"\0\0"
    assert is_valid_ipv6(back)


def test_other_destinations_are_none_of_its_business() -> None:
    """Neighbour discovery and multicast on the device vanish."""
    assert Siit().to_ipv4(ipv6(UDP, bytes(8), destination=ip_address("ff02::1").packed)) is None
    assert Siit().to_ipv4(ipv6(ICMPV6, b"\x87" + bytes(23))) is None


@given(st.binary(max_size=120), st.sampled_from([0, 1, UDP, TCP, FRAGMENT, 50, ICMPV6]))
def test_no_bytes_break_it(data: bytes, header: int) -> None:
    """Random bytes, also behind plausible headers, are translated or dropped, never raised."""
    siit = Siit()
    siit.to_ipv4(data)
    siit.to_ipv6(data)
    siit.to_ipv4(struct.pack("!IHBB", 6 << 28, len(data), header, 1) + HOST + SERVER_IN_IPV6 + data)
    for fragment in (0, 0x4000, 0x2000, 0x2001):
        head = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(data), 1, fragment, 1, header, 0)
        siit.to_ipv6(head + SERVER + SERVER + data)
