"""The addresses that this node tells its peers, best first: path selection specification 7.

The list is made anew after each net check. What a check does not see for once (a lost STUN answer)
stays for five minutes: peers need not be told to forget an address that still works.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from traversal.paths.candidates import is_local_scope
from traversal.wire.address import Address, IPAddress
from traversal.wire.introduction import MAX_ADDRESSES, AddressType

REMEMBER_SECONDS: Final = 310.0
MAX_PER_IP: Final = 6
MAX_IPV6_PER_PREFIX: Final = 2
"""Temporary and stable address of one network; more say nothing new."""

OwnAddress = tuple[AddressType, Address]


@dataclass(frozen=True, slots=True)
class Findings:
    """What one refresh found. Lists are in order of preference.

    Attributes:
        port_mapped: by NAT-PMP, PCP or UPnP.
        reflexive: by STUN.
        static: from the configuration.
        local: our interfaces' addresses, with the port of the socket of their family.
        guess_port: the configured local port when the mapping varies: perhaps it is forwarded.
    """

    port_mapped: tuple[Address, ...] = ()
    reflexive: tuple[Address, ...] = ()
    static: tuple[Address, ...] = ()
    local: tuple[Address, ...] = ()
    guess_port: int = 0


class OwnAddresses:
    """Builds the list and remembers what it once held."""

    def __init__(self) -> None:
        self._seen_at: dict[OwnAddress, float] = {}

    def handle_findings(self, findings: Findings, now: float) -> tuple[OwnAddress, ...]:
        """The list after a refresh: no address twice, at most 64."""
        fresh: list[OwnAddress] = [(AddressType.PORT_MAPPED, a) for a in findings.port_mapped]
        fresh += [(AddressType.STUN, a) for a in findings.reflexive]
        guessed = next((a for a in findings.reflexive if not a.is_ipv6), None)
        if findings.guess_port and guessed is not None:
            address = Address(guessed.host, findings.guess_port)
            fresh.append((AddressType.STUN_LOCAL_PORT, address))
        for entry in fresh:
            self._seen_at[entry] = now
        listed = fresh + self._remembered(now)
        listed += [(AddressType.EXPLICIT, a) for a in findings.static]
        listed += [(AddressType.LOCAL, a) for a in findings.local]
        first_mention = {address: kind for kind, address in reversed(listed)}
        unique = list(dict.fromkeys(address for _, address in listed))
        return tuple((first_mention[address], address) for address in unique[:MAX_ADDRESSES])

    def forget(self) -> None:
        """Our network is another one: nothing seen before is true any more."""
        self._seen_at.clear()

    def _remembered(self, now: float) -> list[OwnAddress]:
        kept: dict[OwnAddress, float] = {}
        per_ip: dict[str, int] = {}
        for entry, at in sorted(self._seen_at.items(), key=lambda item: -item[1]):
            host = entry[1].host
            if now - at <= REMEMBER_SECONDS and per_ip.get(host, 0) < MAX_PER_IP:
                kept[entry] = at
                per_ip[host] = per_ip.get(host, 0) + 1
        self._seen_at = kept
        return list(kept)


def choose_local_ips(
    addresses: Sequence[tuple[IPAddress, int, bool]],
) -> list[IPAddress]:
    """Which interface addresses to advertise, of (IP, prefix length, is on a loopback interface).

    Link-local IPv6 never; link-local IPv4 and unique local IPv6 only where there is nothing
    regular; loopback only where there is nothing else at all. IPv4 comes first.
    """
    regular: list[IPAddress] = []
    second: list[IPAddress] = []
    loopback: list[IPAddress] = []
    per_length: dict[int, int] = {}
    for ip, prefix_length, is_loopback in addresses:
        if ip.version == 6 and ip.is_link_local:
            continue
        if is_loopback or ip.is_loopback:
            if ip.is_loopback:
                loopback.append(ip)
            continue
        if ip.version == 6:
            if per_length.get(prefix_length, 0) == MAX_IPV6_PER_PREFIX:
                continue
            per_length[prefix_length] = per_length.get(prefix_length, 0) + 1
        is_second = ip.is_link_local or (ip.version == 6 and is_local_scope(ip))
        (second if is_second else regular).append(ip)
    chosen = regular or second or loopback
    return sorted(chosen, key=lambda ip: (ip.version, int(ip)))
