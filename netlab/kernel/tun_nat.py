"""The lab's own NAT on raw IPv4 packets: headers in, `netlab.nat` asked, headers rewritten.

No I/O: the fabric process reads packets from TUN devices and writes what comes out. IPv4 only;
a router's IPv6 goes past the NAT.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from enum import IntEnum

from netlab.drops import Answer, Drop, DropReason
from netlab.kernel import packets
from netlab.nat import Protocol, Translator

# Version and header length, fragment, protocol, header checksum, addresses, ports.
_HEADERS = struct.Struct("!B5xHxBH4s4sHH")
# The same for a UDP packet, with addresses and ports in one, then its length and checksum.
_UDP = struct.Struct("!B5xHxBH12sHH")
# From byte 10 on: header checksum, addresses, ports; for UDP also its length and checksum.
_ENDPOINTS = struct.Struct("!H4s4sHH")
_UDP_ENDPOINTS = struct.Struct("!H12sHH")
_ADDRESSES = struct.Struct("!4s4s")
# Where the transport header is, there being no options.
_TRANSPORT = 20
_PORTS = struct.Struct("!HH")
_WORD = struct.Struct("!H")

# Both caches only save work (an evicted fragment is a lost datagram), so they are just emptied
# when a flood of flows or fragments has filled them.
_MAX_CHANGES = 65_536
_MAX_FRAGMENTED = 1024

_MORE_FRAGMENTS, _FRAGMENT_OFFSET = 0x2000, 0x1FFF


class Side(IntEnum):
    """The sides of a NAT."""

    INSIDE = 0
    OUTSIDE = 1


class TunNat:
    """Translates packets in place with one `Translator`.

    `handle_packet` returns the side that the packet leaves on, or None when it was dropped. An
    answer to a dropped packet goes to `answer(side, packet)`, the drop itself to
    `on_drop(drop, packet)`; the packet is only valid until that returns.

    What the translator said about a UDP flow holds for as long as `now` stays the same: asked
    again, it would say the same and renew the same timers to the same ends.
    """

    def __init__(
        self,
        translator: Translator,
        answer: Callable[[Side, bytes], None],
        on_drop: Callable[[Drop, bytes], None],
    ) -> None:
        self.translator = translator
        self.ahead_seconds = 0.0
        """How far its clock is ahead of the lab's, for whoever calls it."""
        self._outbound = translator.outbound
        self._inbound = translator.inbound
        self._answer = answer
        self._on_drop = on_drop
        # By the side that packets come from and their addresses and ports: what these become, the
        # changes of the IP header's checksum and of UDP's, and the side on which they leave.
        self._flows: tuple[dict[bytes, tuple[bytes, int, int, Side]], ...] = ({}, {})
        self._flows_from = -1.0
        self._changes: dict[tuple[bytes, int, bytes, int], tuple[int, int]] = {}
        self._fragmented: dict[tuple[bytes, bytes, int, int], tuple[bytes, bytes, Side]] = {}

    def handle_packet(self, packet: bytearray, came_from: Side, now: float) -> Side | None:
        """Translate one packet of untrusted bytes; what is no IPv4 for a NAT is ignored.

        So are packets with IP options, which hardly any router lets pass (RFC 7126).
        """
        if len(packet) < 28:
            return None
        if now != self._flows_from:
            self._forget_flows(now)
        version, fragment, protocol, ip_checksum, flow, udp_bytes, udp_checksum = _UDP.unpack_from(
            packet
        )
        known = self._flows[came_from].get(flow)
        if (
            known is not None
            and protocol == 17
            and version == 0x45
            and not fragment & (_MORE_FRAGMENTS | _FRAGMENT_OFFSET)
        ):
            new_flow, address_change, transport_change, side = known
            if udp_checksum:  # 0 means that there is none
                udp_checksum = 0xFFFF - (0xFFFF - udp_checksum + transport_change) % 0xFFFF
            ip_checksum = 0xFFFF - (0xFFFF - ip_checksum + address_change) % 0xFFFF
            _UDP_ENDPOINTS.pack_into(packet, 10, ip_checksum, new_flow, udp_bytes, udp_checksum)
            return side
        return self._ask_translator(packet, came_from, now)

    def reboot(self, now: float) -> None:
        """Forget every mapping and everything that follows from one."""
        self._forget_flows(now)
        self.translator.reboot(now)

    def renumber(self, external: Sequence[bytes], now: float) -> None:
        """Take other external addresses, which ends all mappings."""
        self._forget_flows(now)
        self.translator.renumber(external, now)

    def _forget_flows(self, now: float) -> None:
        self._flows_from = now
        for flows in self._flows:
            flows.clear()

    def _ask_translator(self, packet: bytearray, came_from: Side, now: float) -> Side | None:
        version, fragment, protocol, ip_checksum, source, destination, source_port, port = (
            _HEADERS.unpack_from(packet)
        )
        if version != 0x45:
            return None
        fragment &= _MORE_FRAGMENTS | _FRAGMENT_OFFSET
        if fragment & _FRAGMENT_OFFSET:
            return self._handle_later_fragment(packet)
        if protocol == 17:
            checksum_at, flags = 26, 0
        elif protocol == 6 and len(packet) >= 40:
            checksum_at, flags = 36, packet[33]
        elif protocol == 1:
            return self._handle_icmp(packet, came_from, now)
        else:
            return None
        inside = came_from is Side.INSIDE
        translate = self._outbound if inside else self._inbound
        verdict = translate(protocol, source, source_port, destination, port, now, flags)
        if isinstance(verdict, Drop):
            self._drop(verdict, packet, came_from)
            return None
        new_source, new_source_port, new_destination, new_port, to_inside = verdict
        # Only hairpinning changes both ends; the end that stays needs no lookup.
        address_change = transport_change = 0
        if inside:
            address_change, transport_change = self._change(
                source, source_port, new_source, new_source_port
            )
        if to_inside:
            address, transport = self._change(destination, port, new_destination, new_port)
            address_change += address
            transport_change += transport
        flow = bytes(packet[12:24])
        _ENDPOINTS.pack_into(
            packet,
            10,
            0xFFFF - (0xFFFF - ip_checksum + address_change) % 0xFFFF,
            new_source,
            new_destination,
            new_source_port,
            new_port,
        )
        (transport_checksum,) = _WORD.unpack_from(packet, checksum_at)
        if transport_checksum or protocol == 6:  # 0 means that UDP has no checksum
            changed = 0xFFFF - (0xFFFF - transport_checksum + transport_change) % 0xFFFF
            _WORD.pack_into(packet, checksum_at, changed)
        side = Side.INSIDE if to_inside else Side.OUTSIDE
        if fragment:
            self._remember_fragmented(packet, source, destination, side)
        elif protocol == 17:
            new_flow = bytes(packet[12:24])
            self._flows[came_from][flow] = (new_flow, address_change, transport_change, side)
        return side

    def _change(self, old: bytes, old_port: int, new: bytes, new_port: int) -> tuple[int, int]:
        key = (old, old_port, new, new_port)
        change = self._changes.get(key)
        if change is None:
            if len(self._changes) >= _MAX_CHANGES:
                self._changes.clear()
            change = self._changes[key] = packets.endpoint_change(*key)
        return change

    # --- fragments -----------------------------------------------------------------------

    def _remember_fragmented(
        self, packet: bytearray, source: bytes, destination: bytes, side: Side
    ) -> None:
        """Note how a first fragment was translated; the later ones carry no ports."""
        if len(self._fragmented) >= _MAX_FRAGMENTED:
            self._fragmented.clear()
        (identification,) = _WORD.unpack_from(packet, 4)
        new_source, new_destination = _ADDRESSES.unpack_from(packet, 12)
        key = (source, destination, identification, packet[9])
        self._fragmented[key] = (new_source, new_destination, side)

    def _handle_later_fragment(self, packet: bytearray) -> Side | None:
        source, destination = _ADDRESSES.unpack_from(packet, 12)
        (identification,) = _WORD.unpack_from(packet, 4)
        found = self._fragmented.get((source, destination, identification, packet[9]))
        if found is None:
            # Its first fragment was dropped or comes later; a NAT without reassembly loses it.
            return None
        new_source, new_destination, side = found
        self._rewrite_addresses(packet, new_source, new_destination)
        return side

    @staticmethod
    def _rewrite_addresses(packet: bytearray, source: bytes, destination: bytes) -> None:
        change = packets.sum_words(source + destination) - packets.sum_words(packet[12:20])
        _ADDRESSES.pack_into(packet, 12, source, destination)
        packets.adjust_checksum(packet, 10, change)

    # --- ICMP ----------------------------------------------------------------------------

    def _handle_icmp(self, packet: bytearray, came_from: Side, now: float) -> Side | None:
        kind = packet[_TRANSPORT]
        if kind in packets.ICMP_ERRORS:
            return self._handle_icmp_error(packet, came_from, now)
        source, destination = _ADDRESSES.unpack_from(packet, 12)
        (identifier,) = _WORD.unpack_from(packet, _TRANSPORT + 4)
        if came_from is Side.INSIDE and kind == packets.ICMP_ECHO_REQUEST:
            verdict = self.translator.outbound(1, source, identifier, destination, 0, now)
        elif came_from is Side.OUTSIDE and kind == packets.ICMP_ECHO_REPLY:
            verdict = self.translator.inbound(1, source, 0, destination, identifier, now)
        else:
            self._on_drop(Drop(DropReason.NO_MAPPING, note="ICMP"), bytes(packet))
            return None
        if isinstance(verdict, Drop):
            self._on_drop(verdict, bytes(packet))
            return None
        new_identifier = (
            verdict.destination_port if came_from is Side.OUTSIDE else verdict.source_port
        )
        self._rewrite_addresses(packet, verdict.source, verdict.destination)
        _WORD.pack_into(packet, _TRANSPORT + 4, new_identifier)
        packets.adjust_checksum(packet, _TRANSPORT + 2, new_identifier - identifier)
        return Side.INSIDE if verdict.to_inside else Side.OUTSIDE

    def _handle_icmp_error(self, packet: bytearray, came_from: Side, now: float) -> Side | None:
        """Translate an error together with the head of the packet that it complains of."""
        inner = _TRANSPORT + 8
        if len(packet) < inner + 28 or packet[inner] != 0x45:
            return None
        protocol = packet[inner + 9]
        if protocol not in (Protocol.TCP, Protocol.UDP):
            return None
        sender, receiver = _ADDRESSES.unpack_from(packet, inner + 12)
        sender_port, receiver_port = _PORTS.unpack_from(packet, inner + 20)
        source, destination = _ADDRESSES.unpack_from(packet, 12)
        if came_from is Side.OUTSIDE:
            found = self.translator.inside_of(protocol, sender, sender_port, now)
            if found is None:
                return None
            sender, sender_port = found
            destination = sender
        else:
            remote = (sender, sender_port)
            found = self.translator.external_of(protocol, receiver, receiver_port, remote, now)
            if found is None:
                return None
            receiver, receiver_port = found
            source = receiver
        _ADDRESSES.pack_into(packet, inner + 12, sender, receiver)
        _PORTS.pack_into(packet, inner + 20, sender_port, receiver_port)
        packet[inner + 10 : inner + 12] = b"\0\0"
        _WORD.pack_into(packet, inner + 10, packets.checksum(packet[inner : inner + 20]))
        packet[_TRANSPORT + 2 : _TRANSPORT + 4] = b"\0\0"
        _WORD.pack_into(packet, _TRANSPORT + 2, packets.checksum(packet[_TRANSPORT:]))
        self._rewrite_addresses(packet, source, destination)
        return Side.INSIDE if came_from is Side.OUTSIDE else Side.OUTSIDE

    # --- drops ---------------------------------------------------------------------------

    def _drop(self, drop: Drop, packet: bytearray, came_from: Side) -> None:
        original = bytes(packet)
        self._on_drop(drop, original)
        answer: bytes | None = None
        if drop.answer is Answer.RESET and original[9] == Protocol.TCP:
            answer = packets.make_reset(original)
        elif drop.answer in (Answer.PORT_UNREACHABLE, Answer.RESET):
            # The NAT answers with the address that was asked for, as its own.
            answer = packets.make_icmp_error(original[16:20], original, packets.PORT_UNREACHABLE)
        if answer is not None:
            self._answer(came_from, answer)
