"""Stateless IP/ICMP translation (RFC 7915), the IPv6 side of a NAT64. Pure.

The lab's NAT on raw packets knows IPv4 only, so a NAT64 is that NAT with this in front of it, as
RFC 6146 itself describes it. Every inside IPv6 address gets an IPv4
stand-in that nobody outside ever sees; the other end is 64:ff9b:: and its IPv4 address.

    IPv6      0 version, traffic class, flow  4 length  6 next header  7 hop limit
              8 source  24 destination
    Fragment  0 next header  2 offset and more-fragments bit  4 identification
"""

from __future__ import annotations

import struct
from ipaddress import IPv4Address

from netlab.addresses import NAT64_PREFIX
from netlab.drops import Address, Drop, endpoint_text
from netlab.kernel import packets

_IPV4 = struct.Struct("!BBHHHBBH4s4s")
_IPV6 = struct.Struct("!IHBB16s16s")
_FRAGMENT = struct.Struct("!BxHI")
_WORD = struct.Struct("!H")
_IPV4_BYTES, _IPV6_BYTES, _FRAGMENT_BYTES = 20, 40, 8

_PREFIX = NAT64_PREFIX.network_address.packed[:12]
_ICMP, _TCP, _UDP, _FRAGMENT_HEADER, _ICMPV6 = 1, 6, 17, 44, 58
_CHECKSUM_AT = {_TCP: 16, _UDP: 6}
_DONT_FRAGMENT, _MORE_FRAGMENTS, _OFFSET = 0x4000, 0x2000, 0x1FFF
# What IPv6 carries everywhere (RFC 8200 section 5); an IPv4 packet that may be cut is cut to it.
_SAFE_BYTES = 1280

# Stand-ins come from 240.0.0.0/4, which no network has. One for each inside address that ever
# sent; more than a /64 of phones would be an attack on the lab by its own user.
_STAND_INS = 0xF0000000
_MAX_HOSTS = 65_536

# ICMP type and code of IPv4 -> of IPv6 (RFC 7915 sections 4.2 and 5.2). Packet-too-big and what
# has no counterpart are handled in the code.
_ERRORS_TO_IPV6 = {
    (3, 0): (1, 0),
    (3, 1): (1, 0),
    (3, 3): (1, 4),
    (3, 9): (1, 1),
    (3, 10): (1, 1),
    (3, 13): (1, 1),
    (11, 0): (3, 0),
    (11, 1): (3, 1),
}
_ERRORS_TO_IPV4 = {
    (1, 0): (3, 1),
    (1, 1): (3, 10),
    (1, 2): (3, 1),
    (1, 3): (3, 1),
    (1, 4): (3, 3),
    (3, 0): (11, 0),
    (3, 1): (11, 1),
}
_ECHO_TO_IPV6 = {8: 128, 0: 129}
_ECHO_TO_IPV4 = {128: 8, 129: 0}


class Siit:
    """Translates packets of one inside network; what cannot be translated becomes nothing."""

    def __init__(self) -> None:
        self._stand_ins: dict[Address, Address] = {}
        self._hosts: dict[Address, Address] = {}

    def inside_of(self, stand_in: Address) -> Address:
        """Return the inside IPv6 address behind a stand-in; any other IPv4 address in 64:ff9b::."""
        return self._hosts.get(stand_in) or _PREFIX + stand_in

    def reveal(self, endpoint: str) -> str:
        """Return an inside endpoint of the NAT's, as text, with the inside IPv6 address."""
        address, _, port = endpoint.rpartition(":")
        return endpoint_text((self.inside_of(IPv4Address(address).packed), int(port)))

    def reveal_drop(self, drop: Drop, packet: bytes) -> tuple[Drop, bytes]:
        """Return a drop of the NAT's and its packet as the inside knows them."""
        if drop.inside is not None:
            drop = drop._replace(inside=(self.inside_of(drop.inside[0]), drop.inside[1]))
        if packet[12:16] in self._hosts:
            packet = next(iter(self.to_ipv6(packet)), packet)
        return drop, packet

    def _stand_in(self, host: Address) -> Address | None:
        """Return the IPv4 address that an IPv6 address has on the NAT's side."""
        if host.startswith(_PREFIX):
            return host[12:]
        found = self._stand_ins.get(host)
        if found is None and len(self._hosts) < _MAX_HOSTS:
            found = (_STAND_INS + len(self._hosts)).to_bytes(4, "big")
            self._stand_ins[host] = found
            self._hosts[found] = host
        return found

    # --- from inside ---------------------------------------------------------------------

    def to_ipv4(self, packet: bytes | bytearray) -> bytearray | None:
        """Translate an untrusted packet from inside; None for what an RFC 7915 box drops."""
        translated = self._to_ipv4(bytes(packet), is_quoted=False)
        return None if translated is None else bytearray(translated)

    def _to_ipv4(self, packet: bytes, *, is_quoted: bool) -> bytes | None:
        if len(packet) < _IPV6_BYTES or packet[0] >> 4 != 6:
            return None
        first, length, header, hops, source, destination = _IPV6.unpack_from(packet)
        payload = packet[_IPV6_BYTES:]
        if not is_quoted:
            payload = payload[:length]
        identification, fragment = 0, _DONT_FRAGMENT
        if header == _FRAGMENT_HEADER:
            if len(payload) < _FRAGMENT_BYTES:
                return None
            header, place, number = _FRAGMENT.unpack_from(payload)
            payload, length = payload[_FRAGMENT_BYTES:], length - _FRAGMENT_BYTES
            identification = number & 0xFFFF
            fragment = (place >> 3) | (_MORE_FRAGMENTS if place & 1 else 0)
        if not is_quoted and not destination.startswith(_PREFIX):
            return None
        new_source, new_destination = self._stand_in(source), self._stand_in(destination)
        if new_source is None or new_destination is None:
            return None
        protocol = _ICMP if header == _ICMPV6 else header
        if not fragment & _OFFSET:
            if header == _ICMPV6:
                message = self._icmp_to_ipv4(payload, is_quoted)
                if message is None:
                    return None
                length += len(message) - len(payload)
                payload = message
            else:
                change = _address_change(source + destination, new_source + new_destination)
                payload = _adjust(payload, protocol, change)
        return (
            _ipv4_header(
                first >> 20 & 0xFF,
                length,
                identification,
                fragment,
                hops,
                protocol,
                new_source + new_destination,
            )
            + payload
        )

    def _icmp_to_ipv4(self, message: bytes, is_quoted: bool) -> bytes | None:
        if len(message) < 8:
            return None
        kind, code = message[0], message[1]
        if kind in _ECHO_TO_IPV4:
            return _icmp(_ECHO_TO_IPV4[kind], 0, message[4:])
        if is_quoted:
            return None  # an error about an error
        if kind == 2:
            mtu = int.from_bytes(message[4:8], "big")
            new, rest = (3, 4), struct.pack("!HH", 0, min(0xFFFF, max(68, mtu - 20)))
        elif (kind, code) in _ERRORS_TO_IPV4:
            new, rest = _ERRORS_TO_IPV4[kind, code], bytes(4)
        else:
            return None  # neighbour discovery, multicast and whatever IPv4 has no word for
        quoted = self._to_ipv4(message[8:], is_quoted=True)
        return None if quoted is None else _icmp(*new, rest + quoted)

    # --- to the inside -------------------------------------------------------------------

    def to_ipv6(self, packet: bytes | bytearray) -> list[bytes]:
        """Translate a packet to the inside, in pieces where it is big and may be cut."""
        return self._to_ipv6(bytes(packet), is_quoted=False)

    def _to_ipv6(self, packet: bytes, *, is_quoted: bool) -> list[bytes]:
        if len(packet) < _IPV4_BYTES or packet[0] != 0x45:
            return []
        _, traffic, total, identification, fragment, hops, protocol, _, source, destination = (
            _IPV4.unpack_from(packet)
        )
        payload = packet[_IPV4_BYTES:]
        if not is_quoted:
            payload = payload[: total - _IPV4_BYTES]
        new_source, new_destination = self.inside_of(source), self.inside_of(destination)
        header, addresses = protocol, new_source + new_destination
        whole_bytes = total - _IPV4_BYTES
        if not fragment & _OFFSET:
            if protocol == _ICMP:
                message = self._icmp_to_ipv6(payload, addresses, is_quoted)
                if message is None:
                    return []
                whole_bytes += len(message) - len(payload)
                payload = message
            elif protocol == _UDP and payload[6:8] == b"\0\0" and not is_quoted:
                if fragment & _MORE_FRAGMENTS:
                    return []  # IPv6 has no UDP without checksum, and this one is not all here
                payload = _with_udp_checksum(payload, addresses)
            else:
                change = _address_change(source + destination, addresses)
                payload = _adjust(payload, protocol, change)
        if protocol == _ICMP:
            header = _ICMPV6
        is_fragment = bool(fragment & (_OFFSET | _MORE_FRAGMENTS))
        offset, more = fragment & _OFFSET, bool(fragment & _MORE_FRAGMENTS)
        may_cut = not fragment & _DONT_FRAGMENT and not is_quoted
        first = 6 << 28 | traffic << 20
        if not is_fragment and not (may_cut and len(payload) > _SAFE_BYTES - _IPV6_BYTES):
            return [_IPV6.pack(first, whole_bytes, header, hops, *_halves(addresses)) + payload]
        room = (_SAFE_BYTES - _IPV6_BYTES - _FRAGMENT_BYTES) // 8 * 8 if may_cut else len(payload)
        pieces = []
        for start in range(0, max(1, len(payload)), max(8, room)):
            piece = payload[start : start + room]
            is_last = start + room >= len(payload)
            place = (offset << 3) + start | (0 if is_last and not more else 1)
            body = _FRAGMENT.pack(header, place, identification) + piece
            pieces.append(
                _IPV6.pack(first, len(body), _FRAGMENT_HEADER, hops, *_halves(addresses)) + body
            )
        return pieces

    def _icmp_to_ipv6(self, message: bytes, addresses: bytes, is_quoted: bool) -> bytes | None:
        if len(message) < 8:
            return None
        kind, code = message[0], message[1]
        if kind in _ECHO_TO_IPV6:
            return _icmp(_ECHO_TO_IPV6[kind], 0, message[4:], addresses)
        if is_quoted:
            return None
        if (kind, code) == (3, 4):
            mtu = int.from_bytes(message[6:8], "big")
            # A router that names no MTU (RFC 1191 section 5): what IPv6 carries everywhere.
            new, rest = (2, 0), (max(_SAFE_BYTES, mtu + 20)).to_bytes(4, "big")
        elif (kind, code) in _ERRORS_TO_IPV6:
            new, rest = _ERRORS_TO_IPV6[kind, code], bytes(4)
        else:
            return None
        quoted = self._to_ipv6(message[8:], is_quoted=True)
        return _icmp(*new, rest + quoted[0], addresses) if quoted else None


def _halves(addresses: bytes) -> tuple[bytes, bytes]:
    return addresses[:16], addresses[16:]


def _address_change(old: bytes, new: bytes) -> int:
    """Return how much the transport checksums' sums grow; lengths and protocols stay."""
    return packets.sum_words(new) - packets.sum_words(old)


def _adjust(payload: bytes, protocol: int, change: int) -> bytes:
    """Return a payload whose checksum, if it has one and it is there, fits other addresses."""
    at = _CHECKSUM_AT.get(protocol)
    if at is None or len(payload) < at + 2 or (protocol == _UDP and payload[6:8] == b"\0\0"):
        return payload
    changed = bytearray(payload)
    packets.adjust_checksum(changed, at, change)
    if protocol == _UDP and changed[6:8] == b"\0\0":
        changed[6:8] = b"\xff\xff"
    return bytes(changed)


def _pseudo_header(addresses: bytes, size: int, protocol: int) -> bytes:
    return addresses + struct.pack("!IxxxB", size, protocol)


def _with_udp_checksum(payload: bytes, addresses: bytes) -> bytes:
    pseudo = _pseudo_header(addresses, len(payload), _UDP)
    return payload[:6] + _WORD.pack(packets.checksum(pseudo + payload) or 0xFFFF) + payload[8:]


def _icmp(kind: int, code: int, rest: bytes, addresses: bytes = b"") -> bytes:
    """Return an ICMP message, or with IPv6 addresses an ICMPv6 one, which covers these too."""
    message = struct.pack("!BBH", kind, code, 0) + rest
    pseudo = _pseudo_header(addresses, len(message), _ICMPV6) if addresses else b""
    return message[:2] + _WORD.pack(packets.checksum(pseudo + message)) + rest


def _ipv4_header(
    traffic: int,
    payload_bytes: int,
    identification: int,
    fragment: int,
    hops: int,
    protocol: int,
    addresses: bytes,
) -> bytes:
    header = bytearray(
        _IPV4.pack(
            0x45,
            traffic,
            min(0xFFFF, max(0, payload_bytes) + _IPV4_BYTES),
            identification,
            fragment,
            hops,
            protocol,
            0,
            addresses[:4],
            addresses[4:],
        )
    )
    _WORD.pack_into(header, 10, packets.checksum(header))
    return bytes(header)
