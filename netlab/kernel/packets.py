"""Raw IPv4 packets for the user-space NAT: rewriting in place, and answers to dropped ones. Pure.

Checksums are updated incrementally (RFC 1624): a packet keeps whatever damage it came with, and
the cost doesn't depend on its size. One's complement arithmetic is arithmetic modulo 0xffff.

    IPv4  0 version and header words  2 length  4 identification  6 flags and fragment offset
          8 TTL  9 protocol  10 checksum  12 source  16 destination
    UDP   0 source port  2 destination port  4 length  6 checksum (0: none)
    TCP   0 source port  2 destination port  4 sequence  8 acknowledgement  13 flags  16 checksum
    ICMP  0 type  1 code  2 checksum  4 identifier (echo), 8 the packet complained of (errors)
"""

from __future__ import annotations

import struct

from netlab.drops import Endpoint, address_text, endpoint_text
from netlab.nat import Protocol

ICMP_ECHO_REPLY, ICMP_UNREACHABLE, ICMP_ECHO_REQUEST = 0, 3, 8
ICMP_ERRORS = (3, 11, 12)
PORT_UNREACHABLE, FRAGMENTATION_NEEDED, PROHIBITED = 3, 4, 13

_WORD = struct.Struct("!H")
_TCP_RST, _TCP_ACK, _TCP_SYN, _TCP_FIN = 4, 16, 2, 1


def sum_words(data: bytes | bytearray | memoryview) -> int:
    """Return the sum of the 16-bit words of `data` modulo 0xffff; an odd end counts as padded."""
    if len(data) % 2:
        data = bytes(data) + b"\0"
    return int.from_bytes(data, "big") % 0xFFFF


def checksum(data: bytes | bytearray | memoryview) -> int:
    """Return the internet checksum (RFC 1071) of data whose checksum field is 0."""
    # The sum is only 0 modulo 0xffff, without being 0, where a sum of 0xffff was meant.
    return 0xFFFF - (sum_words(data) or (0xFFFF if any(data) else 0))


def adjust_checksum(packet: bytearray, offset: int, change: int) -> None:
    """Update the checksum at `offset` after the words it covers grew by `change`."""
    old = packet[offset] << 8 | packet[offset + 1]
    new = 0xFFFF - (0xFFFF - old + change) % 0xFFFF
    packet[offset] = new >> 8
    packet[offset + 1] = new & 0xFF


def endpoint_change(old: bytes, old_port: int, new: bytes, new_port: int) -> tuple[int, int]:
    """Return how much an address, and an address with its port, change the sums of words."""
    address = (sum_words(new) - sum_words(old)) % 0xFFFF
    return address, (address + new_port - old_port) % 0xFFFF


def make_packet(source: bytes, destination: bytes, protocol: int, payload: bytes) -> bytes:
    """Return an IPv4 packet without options."""
    header = bytearray(
        struct.pack(
            "!BBHHHBBH4s4s",
            0x45,
            0,
            20 + len(payload),
            0,
            0x4000,
            64,
            protocol,
            0,
            source,
            destination,
        )
    )
    _WORD.pack_into(header, 10, checksum(header))
    return bytes(header) + payload


def make_icmp_error(
    source: bytes, original: bytes, code: int, kind: int = ICMP_UNREACHABLE, mtu_bytes: int = 0
) -> bytes:
    """Return the ICMP error with which `source` answers the sender of `original`."""
    header_bytes = (original[0] & 15) * 4
    message = bytearray(struct.pack("!BBHHH", kind, code, 0, 0, mtu_bytes))
    message += original[: header_bytes + 8]
    _WORD.pack_into(message, 2, checksum(message))
    return make_packet(source, bytes(original[12:16]), 1, bytes(message))


def make_reset(original: bytes) -> bytes | None:
    """Return the RST that refuses a TCP segment (RFC 9293 section 3.5.2), None for a RST."""
    offset = (original[0] & 15) * 4
    source_port, destination_port, sequence, acknowledgement = struct.unpack_from(
        "!HHII", original, offset
    )
    flags = original[offset + 13]
    if flags & _TCP_RST:
        return None
    if flags & _TCP_ACK:
        answer = (acknowledgement, 0, _TCP_RST)
    else:
        data = len(original) - offset - (original[offset + 12] >> 4) * 4
        length = data + bool(flags & _TCP_SYN) + bool(flags & _TCP_FIN)
        answer = (0, (sequence + length) & 0xFFFFFFFF, _TCP_RST | _TCP_ACK)
    segment = bytearray(
        struct.pack(
            "!HHIIBBHHH",
            destination_port,
            source_port,
            answer[0],
            answer[1],
            5 << 4,
            answer[2],
            0,
            0,
            0,
        )
    )
    source, destination = bytes(original[16:20]), bytes(original[12:16])
    pseudo_header = source + destination + struct.pack("!HH", 6, len(segment))
    _WORD.pack_into(segment, 16, checksum(pseudo_header + segment))
    return make_packet(source, destination, 6, bytes(segment))


def destination_of(packet: bytes) -> tuple[int, Endpoint] | None:
    """Return protocol number and destination of a raw UDP or TCP packet over IPv4, else None."""
    offset = (packet[0] & 15) * 4 if packet else 0
    if len(packet) < offset + 4 or packet[0] >> 4 != 4 or packet[9] not in (6, 17):
        return None
    (port,) = _WORD.unpack_from(packet, offset + 2)
    return packet[9], (packet[16:20], port)


def describe(packet: bytes) -> tuple[str, str, str]:
    """Return protocol, source and destination of a raw packet as text."""
    if len(packet) >= 40 and packet[0] >> 4 == 6:
        offset, number = 40, packet[6]
        source, destination = packet[8:24], packet[24:40]
    elif len(packet) >= 20 and packet[0] >> 4 == 4:
        offset, number = (packet[0] & 15) * 4, packet[9]
        source, destination = packet[12:16], packet[16:20]
    else:
        return "unknown", "", ""
    try:
        protocol = Protocol(number).name.lower()
    except ValueError:
        protocol = str(number)
    if number in (6, 17) and len(packet) >= offset + 4:
        ports = struct.unpack_from("!HH", packet, offset)
        return protocol, endpoint_text((source, ports[0])), endpoint_text((destination, ports[1]))
    return protocol, address_text(source), address_text(destination)
