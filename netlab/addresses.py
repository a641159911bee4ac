"""The address plan: which interface of a topology has which addresses. Pure and seeded.

All numbers look global where real ones would be, because software treats documentation and
private ranges specially; a lab has no way out, so the real owners never see a packet.

* servers ``2.0.0.0/16``; hosts and NATs on the internet ``2.<operator>.0.0/16``
* inside carrier-grade NATs ``100.64.0.0/10`` (a /16 each), inside others ``192.168.n.0/24``,
  behind routers that translate nothing ``2.10.n.0/24``
* IPv6 ``2a0f:1::/32``: servers in ``2a0f:1:0:1::/64``, subscribers in ``2a0f:1:0:2::/64``, the
  n-th NAT's delegated prefix ``2a0f:1:1:n::/64``; inside NPTv6 and NAT66 ``fd00:aaaa:0:n::/64``

Which LAN and which subscriber gets which number is drawn from the topology's seed, so that no
program can rely on neighbours being numbered alike.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping as ReadOnlyDict
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

from netlab.behavior import Ipv6, ModelError, NatBehavior, Translation
from netlab.model import INTERNET, Nat, Topology

SERVERS_IPV6 = IPv6Network("2a0f:1:0:1::/64")
SUBSCRIBERS_IPV6 = IPv6Network("2a0f:1:0:2::/64")
NAT64_PREFIX = IPv6Network("64:ff9b::/96")
"""The well-known prefix of RFC 6052."""


@dataclass(frozen=True, slots=True, kw_only=True)
class InterfacePlan:
    """The addresses of one machine in one network."""

    network: str
    ipv4: tuple[IPv4Address, ...]
    ipv6: tuple[IPv6Address, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class NatPlan:
    """The addresses of a NAT. Its own inside addresses are the gateways of its hosts."""

    outside: InterfacePlan
    """In the uplink's network; the IPv4 addresses are the NAT's external pool. Without
    translation these are the router's own and nothing is translated to them."""
    inside_ipv4: IPv4Network | None
    inside_ipv6: IPv6Network | None
    gateway_ipv4: IPv4Address | None
    gateway_ipv6: IPv6Address | None
    external_ipv6: IPv6Network | None
    """The prefix that the uplink routes to this NAT: the inside prefix itself when routed, the
    one it is translated to for NPTv6, None for NAT66 and without IPv6."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AddressPlan:
    """Every address of a topology, by object name."""

    hosts: ReadOnlyDict[str, tuple[InterfacePlan, ...]]
    """One plan per uplink, in the order of `Host.uplinks`."""
    servers: ReadOnlyDict[str, InterfacePlan]
    nats: ReadOnlyDict[str, NatPlan]


class _Pool:
    """Hands out each number below `size` once, in an order drawn from the seed."""

    def __init__(self, size: int, generator: random.Random) -> None:
        # An affine walk over the whole range: no list of 65 536 numbers per network.
        self._next = generator.randrange(size)
        self._stride = generator.choice([3, 7, 11, 19, 23])
        while math.gcd(self._stride, size) != 1:
            self._stride += 2
        self._size = self._left = size

    def take(self) -> int | None:
        if not self._left:
            return None
        self._left -= 1
        number, self._next = self._next, (self._next + self._stride) % self._size
        return number

    def refill(self) -> None:
        self._left = self._size


class _Network:
    """The addresses inside one network."""

    def __init__(
        self,
        name: str,
        ipv4: IPv4Network | None,
        ipv6: IPv6Network | None,
        generator: random.Random,
    ) -> None:
        self.name = name
        self.ipv4 = ipv4
        self.ipv6 = ipv6
        # Without network, gateway (.1) and broadcast address.
        self._pool = _Pool(ipv4.num_addresses - 3 if ipv4 else 65_000, generator)

    def interface(self, where: str, addresses: int = 1, ipv6: bool = True) -> InterfacePlan:
        numbers: list[int] = []
        for _ in range(addresses):
            number = self._pool.take()
            if number is None:
                raise ModelError(
                    where,
                    f'network "{self.name}" ({self.ipv4 or self.ipv6}) has no address left; '
                    "spread the hosts over more NATs or use a carrier NAT (carrier = true)",
                )
            numbers.append(number + 2)
        return InterfacePlan(
            network=self.name,
            ipv4=tuple(self.ipv4[n] for n in numbers) if self.ipv4 is not None else (),
            ipv6=tuple(self.ipv6[n] for n in numbers) if self.ipv6 is not None and ipv6 else (),
        )


def plan_addresses(topology: Topology) -> AddressPlan:
    """Give every interface its addresses; the same topology and seed give the same plan.

    Raises:
        ModelError: a network has more machines than addresses.
    """
    generator = random.Random(f"addresses {topology.seed}")
    servers_network = _Network(INTERNET, IPv4Network("2.0.0.0/16"), SERVERS_IPV6, generator)
    servers = {
        server.name: servers_network.interface(
            f'server "{server.name}"', server.addresses, server.ipv6
        )
        for server in topology.servers
    }
    operators = {
        n: _Network(INTERNET, IPv4Network(f"2.{n}.0.0/16"), SUBSCRIBERS_IPV6, generator)
        for n in sorted({1, *(nat.operator for nat in topology.nats)})
    }
    lans = _Pool(256, generator)
    carriers = _Pool(64, generator)
    routed = _Pool(256, generator)
    insides: dict[str, _Network] = {}
    nats: dict[str, NatPlan] = {}
    for number, nat in enumerate(topology.nats_outermost_first(), start=1):
        if number > 65_535:
            raise ModelError(f'nat "{nat.name}"', "there are prefixes for 65535 NATs")
        if nat.uplink.network == INTERNET:
            around = operators[nat.operator]
        else:
            around = insides[nat.uplink.network]
        behavior = nat.behavior
        outside = around.interface(
            f'nat "{nat.name}"', _outside_addresses(nat, topology), behavior.ipv6 is not Ipv6.NONE
        )
        inside_ipv4 = _inside_ipv4(nat, lans, carriers, routed)
        inside_ipv6, external_ipv6 = _ipv6_prefixes(behavior, number)
        insides[nat.name] = _Network(nat.name, inside_ipv4, inside_ipv6, generator)
        nats[nat.name] = NatPlan(
            outside=outside,
            inside_ipv4=inside_ipv4,
            inside_ipv6=inside_ipv6,
            gateway_ipv4=inside_ipv4[1] if inside_ipv4 is not None else None,
            gateway_ipv6=inside_ipv6[1] if inside_ipv6 is not None else None,
            external_ipv6=external_ipv6,
        )
    hosts = {
        host.name: tuple(
            (operators[1] if uplink.network == INTERNET else insides[uplink.network]).interface(
                f'host "{host.name}"'
            )
            for uplink in host.uplinks
        )
        for host in topology.hosts
    }
    return AddressPlan(hosts=hosts, servers=servers, nats=nats)


def _outside_addresses(nat: Nat, topology: Topology) -> int:
    """Return the size of the external pool: one-to-one needs an address per inside machine."""
    if nat.behavior.translation is not Translation.ONE_TO_ONE:
        return nat.behavior.addresses
    uplinks = [uplink for host in topology.hosts for uplink in host.uplinks]
    inside = sum(uplink.network == nat.name for uplink in uplinks) + sum(
        inner.behavior.addresses for inner in topology.nats if inner.uplink.network == nat.name
    )
    return max(nat.behavior.addresses, inside)


def _inside_ipv4(nat: Nat, lans: _Pool, carriers: _Pool, routed: _Pool) -> IPv4Network | None:
    if nat.behavior.nat64:
        return None
    if nat.behavior.carrier:
        number = carriers.take()
        if number is None:
            raise ModelError(f'nat "{nat.name}": carrier', "100.64.0.0/10 has room for 64 of them")
        return IPv4Network((0x64400000 + (number << 16), 16))
    if nat.behavior.translation is Translation.NONE:
        number = routed.take()
        if number is None:
            raise ModelError(
                f'nat "{nat.name}": translation', "there are 256 networks for routed sites"
            )
        return IPv4Network((0x020A0000 + (number << 8), 24))
    number = lans.take()
    if number is None:
        # More homes than LAN numbers: real homes share them as well.
        lans.refill()
        number = lans.take()
    assert number is not None
    return IPv4Network((0xC0A80000 + (number << 8), 24))


def _ipv6_prefixes(
    behavior: NatBehavior, number: int
) -> tuple[IPv6Network | None, IPv6Network | None]:
    """Return the inside prefix and the one that the uplink routes here."""
    delegated = IPv6Network(((0x2A0F_0001_0001_0000 | number) << 64, 64))
    private = IPv6Network(((0xFD00_AAAA_0000_0000 | number) << 64, 64))
    match behavior.ipv6:
        case Ipv6.NONE:
            return None, None
        case Ipv6.ROUTED:
            return delegated, delegated
        case Ipv6.NPT:
            return private, delegated
        case Ipv6.NAT66:
            return private, None
