"""IPv6-to-IPv6 network prefix translation, stateless and checksum-neutral (RFC 6296). Pure."""

from __future__ import annotations

from ipaddress import IPv6Network

from netlab.drops import Address


class PrefixTranslator:
    """Swaps one /64 prefix for another so that no transport checksum changes.

    The interface identifier's first 16-bit word that is not 0xffff takes up the difference of the
    two prefixes' one's complement sums (RFC 6296 section 3.5).

    Raises:
        ValueError: a prefix is not a /64.
    """

    def __init__(self, inside: IPv6Network, outside: IPv6Network) -> None:
        if inside.prefixlen != 64 or outside.prefixlen != 64:
            raise ValueError("prefix translation needs two /64 prefixes")
        self._inside = inside.network_address.packed[:8]
        self._outside = outside.network_address.packed[:8]
        # One's complement arithmetic is arithmetic modulo 0xffff.
        self._adjustment = (_sum(self._inside) - _sum(self._outside)) % 0xFFFF

    def outbound(self, address: Address) -> Address:
        """Return the external address of an inside one."""
        return self._outside + self._adjust(address[8:], self._adjustment)

    def inbound(self, address: Address) -> Address:
        """Return the inside address of an external one."""
        return self._inside + self._adjust(address[8:], -self._adjustment)

    @staticmethod
    def _adjust(identifier: bytes, adjustment: int) -> bytes:
        words = [int.from_bytes(identifier[i : i + 2], "big") for i in range(0, 8, 2)]
        for index, word in enumerate(words):
            if word != 0xFFFF:
                words[index] = (word + adjustment) % 0xFFFF
                break
        return b"".join(word.to_bytes(2, "big") for word in words)


def _sum(data: bytes) -> int:
    return sum(int.from_bytes(data[i : i + 2], "big") for i in range(0, len(data), 2))
