"""The frozen topology of a lab: hosts, servers, NATs and what connects them. Pure.

    internet ── nat "cgn" ── nat "home" ── host "a"
        └────── server "stun"

Every object has one name; an uplink names the network it leads to, which is either a NAT or
`INTERNET`. A `Topology` checks itself when it is made and raises `ModelError`;
`netlab.addresses.plan_addresses` then gives every interface its addresses. The records of
behaviour live in `netlab.behavior` and are offered here too, so that one import is enough.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

from netlab.behavior import (
    AtLimit,
    Filtering,
    FilterScope,
    Firewall,
    Hairpin,
    Ipv6,
    Lifetimes,
    Link,
    Mapping,
    ModelError,
    NatBehavior,
    Pooling,
    PortAllocation,
    PortAssignment,
    PortRange,
    Refresh,
    TcpBehavior,
    Translation,
    Unsolicited,
    suggest,
)

__all__ = [
    "INTERNET",
    "Host",
    "Nat",
    "Server",
    "Topology",
    "Uplink",
    "AtLimit",
    "Filtering",
    "FilterScope",
    "Firewall",
    "Hairpin",
    "Ipv6",
    "Lifetimes",
    "Link",
    "Mapping",
    "ModelError",
    "NatBehavior",
    "Pooling",
    "PortAllocation",
    "PortAssignment",
    "PortRange",
    "Refresh",
    "TcpBehavior",
    "Translation",
    "Unsolicited",
    "suggest",
]

INTERNET = "internet"
"""The name of the network that every outermost NAT and every server is on."""

# What may be a name: it appears in file names, interface names (shortened) and command lines.
_NAME = re.compile(r"[a-z0-9][a-z0-9_.-]{0,62}", re.IGNORECASE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Uplink:
    """A way towards the internet."""

    network: str = INTERNET
    """The name of the NAT that this leads to, or `INTERNET`."""
    link: Link = field(default_factory=Link)
    """Away from the owner, and towards it as well unless `download` is given."""
    download: Link | None = None

    @property
    def towards_owner(self) -> Link:
        return self.link if self.download is None else self.download


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """A machine that programs run on. Of several uplinks the first is in use at the start."""

    name: str
    uplinks: tuple[Uplink, ...] = (Uplink(),)


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """A machine with fixed public addresses."""

    name: str
    addresses: int = 1
    ipv6: bool = True
    link: Link = field(default_factory=Link)


@dataclass(frozen=True, slots=True, kw_only=True)
class Nat:
    """A router between an inside network, which has its name, and an uplink."""

    name: str
    behavior: NatBehavior = field(default_factory=NatBehavior)
    uplink: Uplink = field(default_factory=Uplink)
    operator: int = 1
    """Which operator numbers an outermost NAT: its addresses are in 2.<operator>.0.0/16."""


# Not slotted: the lookup tables below are computed once and kept in the instance.
@dataclass(frozen=True, kw_only=True)
class Topology:
    """A whole lab.

    Raises:
        ModelError: a name is used twice or unknown, or the parts do not fit together.
    """

    hosts: tuple[Host, ...] = ()
    servers: tuple[Server, ...] = ()
    nats: tuple[Nat, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        self._check_names()
        for kind, owner, place, uplink in self._uplinks():
            if uplink.network != INTERNET and uplink.network not in self.nat_by_name:
                raise ModelError(
                    f'{kind} "{owner}": {place}',
                    f'there is no network "{uplink.network}"; '
                    + suggest(uplink.network, [INTERNET, *self.nat_by_name]),
                )
        for host in self.hosts:
            networks = [uplink.network for uplink in host.uplinks]
            if len(set(networks)) != len(networks):
                raise ModelError(
                    f'host "{host.name}": uplinks', "two of them lead to the same network"
                )
        for server in self.servers:
            if not 1 <= server.addresses <= 64:
                raise ModelError(
                    f'server "{server.name}": addresses', f"{server.addresses} is not within 1-64"
                )
        for nat in self.nats:
            self._check_nat(nat)

    @cached_property
    def host_by_name(self) -> dict[str, Host]:
        return {host.name: host for host in self.hosts}

    @cached_property
    def server_by_name(self) -> dict[str, Server]:
        return {server.name: server for server in self.servers}

    @cached_property
    def nat_by_name(self) -> dict[str, Nat]:
        return {nat.name: nat for nat in self.nats}

    def nats_towards_internet(self, network: str) -> tuple[Nat, ...]:
        """Return the NATs that a packet from inside `network` crosses, innermost first."""
        crossed: list[Nat] = []
        while network != INTERNET:
            nat = self.nat_by_name[network]
            crossed.append(nat)
            network = nat.uplink.network
        return tuple(crossed)

    def nats_outermost_first(self) -> tuple[Nat, ...]:
        """Return every NAT after the one that its uplink leads to."""
        return tuple(sorted(self.nats, key=lambda nat: len(self.nats_towards_internet(nat.name))))

    def _uplinks(self) -> Iterator[tuple[str, str, str, Uplink]]:
        for host in self.hosts:
            for index, uplink in enumerate(host.uplinks):
                yield "host", host.name, f"uplinks[{index}].network", uplink
        for nat in self.nats:
            yield "nat", nat.name, "uplink.network", nat.uplink

    def _check_names(self) -> None:
        seen: dict[str, str] = {INTERNET: "network"}
        for kind, parts in (("nat", self.nats), ("server", self.servers), ("host", self.hosts)):
            for part in parts:
                where = f'{kind} "{part.name}": name'
                if not _NAME.fullmatch(part.name):
                    raise ModelError(
                        where,
                        "use up to 63 letters, digits, '-', '_' and '.', "
                        "starting with a letter or digit",
                    )
                if part.name in seen:
                    raise ModelError(where, f"a {seen[part.name]} already has this name")
                seen[part.name] = kind
        for host in self.hosts:
            if not host.uplinks:
                raise ModelError(f'host "{host.name}": uplinks', "give at least one uplink")

    def _check_nat(self, nat: Nat) -> None:
        where = f'nat "{nat.name}"'
        path = [nat.name]
        network = nat.uplink.network
        while network != INTERNET:
            if network in path:
                raise ModelError(
                    f"{where}: uplink.network",
                    "never reaches the internet: " + " -> ".join([*path, network]),
                )
            path.append(network)
            network = self.nat_by_name[network].uplink.network
        if not 1 <= nat.operator <= 9:
            raise ModelError(f"{where}: operator", f"{nat.operator} is not within 1-9")
        if nat.uplink.network == INTERNET:
            return
        outer = self.nat_by_name[nat.uplink.network]
        if nat.behavior.ipv6 is not Ipv6.NONE and outer.behavior.ipv6 is not Ipv6.ROUTED:
            raise ModelError(
                f"{where}: behavior.ipv6",
                f'"{nat.behavior.ipv6}" needs an uplink that routes IPv6, '
                f'but nat "{outer.name}" has ipv6 = "{outer.behavior.ipv6}"',
            )
        if outer.behavior.nat64:
            raise ModelError(
                f"{where}: uplink.network",
                f'nat "{outer.name}" gives its inside no IPv4 (nat64), so no NAT can be behind it',
            )
