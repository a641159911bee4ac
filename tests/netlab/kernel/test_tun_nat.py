"""The NAT on raw packets: headers are rewritten whole and valid, and no bytes break it."""

from __future__ import annotations

import random
import struct

from hypothesis import given
from hypothesis import strategies as st

from netlab.behavior import Filtering, Hairpin, NatBehavior, TcpBehavior, Unsolicited
from netlab.drops import Drop, DropReason
from netlab.kernel import packets
from netlab.kernel.tun_nat import Side, TunNat
from netlab.nat import Translator

HOST, OTHER = bytes([192, 168, 1, 5]), bytes([192, 168, 1, 6])
EXTERNAL, SERVER, STRANGER = bytes([2, 1, 0, 1]), bytes([2, 0, 0, 5]), bytes([2, 0, 0, 6])


class Bench:
    """A NAT and what came out of it."""

    def __init__(self, **behavior: object) -> None:
        self.answers: list[tuple[Side, bytes]] = []
        self.drops: list[Drop] = []
        translator = Translator(
            NatBehavior(**behavior), [EXTERNAL], generator=random.Random(1), name="n"
        )
        self.nat = TunNat(
            translator,
            lambda side, packet: self.answers.append((side, packet)),
            lambda drop, packet: self.drops.append(drop),
        )

    def send(self, side: Side, packet: bytes, now: float = 1.0) -> tuple[Side, bytes] | None:
        buffer = bytearray(packet)
        leaves = self.nat.handle_packet(buffer, side, now)
        return None if leaves is None else (leaves, bytes(buffer))


def transport(source: bytes, destination: bytes, protocol: int, payload: bytes) -> bytes:
    """Return a packet whose transport checksum (UDP or TCP) is filled in."""
    at = {17: 6, 6: 16}[protocol]
    payload = payload[:at] + b"\0\0" + payload[at + 2 :]
    pseudo = source + destination + struct.pack("!HH", protocol, len(payload))
    value = packets.checksum(pseudo + payload) or 0xFFFF
    payload = payload[:at] + struct.pack("!H", value) + payload[at + 2 :]
    return packets.make_packet(source, destination, protocol, payload)


def udp(
    source: bytes, source_port: int, destination: bytes, port: int, data: bytes = b"data"
) -> bytes:
    payload = struct.pack("!HHHH", source_port, port, 8 + len(data), 0) + data
    return transport(source, destination, 17, payload)


def tcp(source: bytes, source_port: int, destination: bytes, port: int, flags: int = 2) -> bytes:
    payload = struct.pack("!HHIIBBHHH", source_port, port, 1, 0, 5 << 4, flags, 0, 0, 0)
    return transport(source, destination, 6, payload)


def test_a_udp_packet_goes_out_and_its_answer_comes_in() -> None:
    """Both directions equal packets made from scratch with the translated endpoints."""
    bench = Bench()
    assert bench.send(Side.INSIDE, udp(HOST, 4000, SERVER, 3478)) == (
        Side.OUTSIDE,
        udp(EXTERNAL, 4000, SERVER, 3478),
    )
    assert bench.send(Side.OUTSIDE, udp(SERVER, 3478, EXTERNAL, 4000)) == (
        Side.INSIDE,
        udp(SERVER, 3478, HOST, 4000),
    )


def test_the_packets_of_a_flow_are_translated_alike_within_a_tick() -> None:
    """Later ones keep their own data and checksums; a TCP packet of the same numbers is not one."""
    bench = Bench()
    for data in (b"first", b"second", b"x" * 1400):
        outbound = bench.send(Side.INSIDE, udp(HOST, 4000, SERVER, 443, data))
        assert outbound == (Side.OUTSIDE, udp(EXTERNAL, 4000, SERVER, 443, data))
        inbound = bench.send(Side.OUTSIDE, udp(SERVER, 443, EXTERNAL, 4000, data))
        assert inbound == (Side.INSIDE, udp(SERVER, 443, HOST, 4000, data))
    assert bench.send(Side.OUTSIDE, tcp(SERVER, 443, EXTERNAL, 4000)) is None


def test_every_tick_renews_a_mapping_and_none_outlives_it() -> None:
    """Mappings last 120 s from their last packet, however many went before."""
    bench = Bench()
    packet, answer = udp(HOST, 4000, SERVER, 3478), udp(SERVER, 3478, EXTERNAL, 4000)
    for now in (1.0, 1.0, 100.0, 100.0):
        assert bench.send(Side.INSIDE, packet, now) is not None
    assert bench.send(Side.OUTSIDE, answer, 219.9) is not None
    assert bench.send(Side.OUTSIDE, answer, 340.0) is None
    assert bench.drops[-1].reason is DropReason.EXPIRED


def test_a_reboot_is_felt_at_once() -> None:
    """Also by a flow that was translated in the same tick."""
    bench = Bench()
    answer = udp(SERVER, 3478, EXTERNAL, 4000)
    bench.send(Side.INSIDE, udp(HOST, 4000, SERVER, 3478))
    assert bench.send(Side.OUTSIDE, answer) is not None
    bench.nat.reboot(1.0)
    assert bench.send(Side.OUTSIDE, answer) is None
    bench.send(Side.INSIDE, udp(HOST, 4000, SERVER, 3478))
    bench.nat.renumber([STRANGER], 1.0)
    assert bench.send(Side.INSIDE, udp(HOST, 4000, SERVER, 3478)) == (
        Side.OUTSIDE,
        udp(STRANGER, 4000, SERVER, 3478),
    )


def test_tcp_is_translated_as_well() -> None:
    """A SYN leaves with the external address and a valid checksum."""
    assert Bench().send(Side.INSIDE, tcp(HOST, 4000, SERVER, 443)) == (
        Side.OUTSIDE,
        tcp(EXTERNAL, 4000, SERVER, 443),
    )


def test_udp_without_a_checksum_stays_without() -> None:
    """0 means "none" (RFC 768) and must not become a wrong one."""
    packet = bytearray(udp(HOST, 4000, SERVER, 3478))
    packet[26:28] = b"\0\0"
    result = Bench().send(Side.INSIDE, bytes(packet))
    assert result is not None
    assert result[1][26:28] == b"\0\0"


def test_hairpinning_changes_both_ends() -> None:
    """A packet to the NAT's own address goes back inside, from the sender's external port."""
    bench = Bench(hairpin=Hairpin.EXTERNAL)
    bench.send(Side.INSIDE, udp(OTHER, 5000, SERVER, 3478))
    assert bench.send(Side.INSIDE, udp(HOST, 4000, EXTERNAL, 5000)) == (
        Side.INSIDE,
        udp(EXTERNAL, 4000, OTHER, 5000),
    )


def test_a_stranger_is_dropped_with_the_reason() -> None:
    """Filtered packets vanish; the report says why."""
    bench = Bench(filtering=Filtering.APDF)
    bench.send(Side.INSIDE, udp(HOST, 4000, SERVER, 3478))
    assert bench.send(Side.OUTSIDE, udp(STRANGER, 3478, EXTERNAL, 4000)) is None
    assert [drop.reason for drop in bench.drops] == [DropReason.FILTERED]
    assert bench.answers == []


def test_unsolicited_packets_are_rejected_where_the_nat_does() -> None:
    """UDP gets an ICMP error and TCP a RST, out of the side they came from."""
    bench = Bench(unsolicited=Unsolicited.RESET)
    bench.send(Side.OUTSIDE, udp(STRANGER, 1, EXTERNAL, 4000))
    bench.send(Side.OUTSIDE, tcp(STRANGER, 1, EXTERNAL, 4000))
    (first_side, error), (second_side, reset) = bench.answers
    assert (first_side, second_side) == (Side.OUTSIDE, Side.OUTSIDE)
    assert (error[9], error[20], error[21], error[16:20]) == (1, 3, 3, STRANGER)
    assert (reset[9], reset[33] & 4, reset[16:20]) == (6, 4, STRANGER)


def test_an_idle_connection_is_reset_towards_the_inside() -> None:
    """A segment that belongs to no mapping is answered by RST where the NAT does so."""
    bench = Bench(tcp=TcpBehavior(reset_after_idle=True))
    assert bench.send(Side.INSIDE, tcp(HOST, 4000, SERVER, 443, flags=16)) is None
    ((side, reset),) = bench.answers
    assert (side, reset[12:16], reset[16:20]) == (Side.INSIDE, SERVER, HOST)


def test_an_echo_request_and_its_reply_pass() -> None:
    """Ping works: the identifier is the port, and both checksums stay valid."""
    bench = Bench()

    def echo(kind: int, source: bytes, destination: bytes, identifier: int) -> bytes:
        message = bytearray(struct.pack("!BBHHH", kind, 0, 0, identifier, 1) + b"ping")
        struct.pack_into("!H", message, 2, packets.checksum(message))
        return packets.make_packet(source, destination, 1, bytes(message))

    request = bench.send(Side.INSIDE, echo(8, HOST, SERVER, 4077))
    assert request is not None
    (identifier,) = struct.unpack_from("!H", request[1], 24)
    assert request == (Side.OUTSIDE, echo(8, EXTERNAL, SERVER, identifier))
    reply = bench.send(Side.OUTSIDE, echo(0, SERVER, EXTERNAL, identifier))
    assert reply == (Side.INSIDE, echo(0, SERVER, HOST, 4077))


def test_an_icmp_error_finds_the_inside_socket() -> None:
    """The packet complained of is translated back, so that the host recognizes its own."""
    bench = Bench()
    sent = udp(HOST, 4000, SERVER, 3478)
    bench.send(Side.INSIDE, sent)
    seen = udp(EXTERNAL, 4000, SERVER, 3478)
    error = packets.make_icmp_error(SERVER, seen, packets.PORT_UNREACHABLE)
    result = bench.send(Side.OUTSIDE, error)
    assert result is not None
    side, packet = result
    assert side is Side.INSIDE
    assert packet[16:20] == HOST
    # All but the transport checksum of the packet complained of, which nobody checks there.
    assert packet[28:54] == sent[:26]
    assert packets.checksum(packet[:20]) == packets.checksum(packet[20:]) == 0


def test_fragments_follow_their_first_one() -> None:
    """Later fragments carry no ports and go the way of the first; strays are lost."""
    bench = Bench()

    def fragment(packet: bytes, bits: int) -> bytes:
        changed = bytearray(packet)
        struct.pack_into("!HH", changed, 4, 77, bits)
        changed[10:12] = b"\0\0"
        struct.pack_into("!H", changed, 10, packets.checksum(changed[:20]))
        return bytes(changed)

    later = fragment(packets.make_packet(HOST, SERVER, 17, b"x" * 16), 3)
    assert bench.send(Side.INSIDE, later) is None
    assert bench.send(Side.INSIDE, fragment(udp(HOST, 4000, SERVER, 3478), 0x2000)) is not None
    assert bench.send(Side.INSIDE, later) == (
        Side.OUTSIDE,
        fragment(packets.make_packet(EXTERNAL, SERVER, 17, b"x" * 16), 3),
    )


@given(st.binary(max_size=120), st.sampled_from(Side))
def test_no_bytes_break_it(data: bytes, side: Side) -> None:
    """Random bytes, also behind a plausible header, are translated or dropped, never raised."""
    bench = Bench(unsolicited=Unsolicited.RESET, hairpin=Hairpin.EXTERNAL)
    bench.send(side, data)
    for protocol in (1, 6, 17, 47):
        header = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(data), 0, 0, 64, protocol, 0)
        bench.send(side, header + HOST + SERVER + data)
