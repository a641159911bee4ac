"""What the kernel is asked for: machines, cables, addresses and routes of a topology. Pure.

    host ── cable ── router of a NAT ── cable ── internet ── cable ── server
     eth0        lan0            wan

Every machine, and the internet itself, is a network namespace; every uplink is a cable of its
own, point to point, with /32 and /128 addresses and routes to devices: no subnets, no ARP.
A NAT of the user engine has one more interface in its router, a TUN device that leads into the
fabric process. That one carries the uplink's packets as well, as it does those of impaired links,
so that IPv4 is in the kernel again only where the uplink ends:

    lan0 ── natin ══ engine ══ uplink ══ (the next router's or the internet's interface)
      └──── wan (IPv6 only) ═════╝
"""

from __future__ import annotations

import ipaddress
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

from netlab.addresses import NAT64_PREFIX, AddressPlan, InterfacePlan, NatPlan, plan_addresses
from netlab.behavior import Link, ModelError, Translation
from netlab.kernel.fidelity import Engine, Fidelity, choose_engine
from netlab.kernel.netlink import IpInterface, Route
from netlab.kernel.nft import (
    LAN,
    NAT_INSIDE,
    WAN,
    Router,
    router_rules,
    router_sysctls,
)
from netlab.model import INTERNET, Nat, Topology, Uplink

_LOOPBACK_INDEX = 1
# The kernel's own fallback devices (tunl0, sit0, ...) have the first numbers of a namespace.
_FIRST_INDEX = 101

_EVERYWHERE_IPV4 = IPv4Network("0.0.0.0/0")
_EVERYWHERE_IPV6 = IPv6Network("::/0")


@dataclass(frozen=True, slots=True)
class End:
    """One end of a cable: the machine, the interface's name and its number there."""

    machine: str
    name: str
    index: int


@dataclass(frozen=True, slots=True)
class Cable:
    """The connection of one uplink. `outer` is the end towards the internet."""

    owner: str
    network: str
    outer: End
    inner: End
    upload: Link
    download: Link
    pumped: bool
    """Whether the fabric process carries the packets, instead of a veth pair."""

    @property
    def key(self) -> str:
        """What the fabric process and its events call this cable."""
        return f"{self.owner} - {self.network}"

    @property
    def mtu_bytes(self) -> int:
        """The MTU that both interfaces show; a black hole shows the usual one."""
        links = (self.upload, self.download)
        return min(1500 if link.mtu_black_hole else link.mtu_bytes for link in links)


@dataclass(slots=True)
class Machine:
    """One namespace: what it is given in the beginning."""

    name: str
    addresses: list[tuple[int, IpInterface]] = field(default_factory=list)
    routes: list[Route] = field(default_factory=list)
    sysctls: dict[str, str] = field(default_factory=dict)
    rules: str = ""
    router: Router | None = None
    fidelity: Fidelity | None = None
    _next_index: int = _FIRST_INDEX

    def take_index(self) -> int:
        """Return the number for one more interface."""
        index, self._next_index = self._next_index, self._next_index + 1
        return index


@dataclass(frozen=True, slots=True)
class UserNat:
    """A NAT that the fabric process translates for."""

    router: Router
    inside: End
    uplink: Cable

    @property
    def inside_mtu_bytes(self) -> int:
        """What is bigger than this is refused, or cut into pieces, before it is translated."""
        if self.router.behavior.nat64:
            # The IPv6 header is 20 bytes longer, and 1280 is its least MTU (RFC 8200).
            return max(1280, min(65535, self.uplink.mtu_bytes + 20))
        return self.uplink.mtu_bytes


@dataclass(frozen=True, slots=True)
class Wiring:
    """Everything that a back end has to make for a topology."""

    topology: Topology
    addresses: AddressPlan
    machines: Mapping[str, Machine]
    cables: tuple[Cable, ...]
    user_nats: tuple[UserNat, ...]


def is_impaired(link: Link) -> bool:
    """Whether a link does anything that a veth pair can't."""
    return bool(
        link.delay_seconds
        or link.jitter_seconds
        or link.loss
        or link.burst_probability
        or link.duplication
        or link.rate_bits_per_second
        or (link.mtu_black_hole and link.mtu_bytes < 1500)
    )


def interface_addresses(plan: InterfacePlan | NatPlan) -> list[IpInterface]:
    """Return a machine's addresses in a network, each with its longest prefix."""
    outside = plan.outside if isinstance(plan, NatPlan) else plan
    addresses: list[IPv4Address | IPv6Address] = [*outside.ipv4, *outside.ipv6]
    return [ipaddress.ip_interface(address) for address in addresses]


def host_routes(index: int, plan: InterfacePlan) -> list[Route]:
    """Return the default routes of a machine that has the addresses of `plan`."""
    routes = [Route(_EVERYWHERE_IPV4, index, source=address) for address in plan.ipv4[:1]]
    return routes + [Route(_EVERYWHERE_IPV6, index, source=address) for address in plan.ipv6[:1]]


def plan_wiring(
    topology: Topology,
    *,
    engines: Mapping[str, Engine] | None = None,
    pumped: Collection[str] = (),
    log_drops: bool = False,
) -> Wiring:
    """Work out what the kernel is to be asked for.

    Args:
        topology: the lab.
        engines: NATs that must use this engine, whatever the fidelity table says.
        pumped: owners whose cables the fabric carries though nothing impairs them yet.
        log_drops: whether dropped packets are reported through NFLOG.

    Raises:
        ModelError: the topology does not fit the address plan, or needs what the kernel back
            end doesn't have.
    """
    planner = _Planner(topology, dict(engines or {}), set(pumped), log_drops)
    return planner.plan()


class _Planner:
    """Collects the wiring while walking the topology from the internet inwards."""

    def __init__(
        self,
        topology: Topology,
        engines: dict[str, Engine],
        pumped: set[str],
        log_drops: bool,
    ) -> None:
        self._topology = topology
        self._engines = engines
        self._pumped = pumped
        self._log_drops = log_drops
        self._addresses = plan_addresses(topology)
        self._machines: dict[str, Machine] = {}
        self._cables: list[Cable] = []
        self._user_nats: list[UserNat] = []
        self._outer_ends: dict[str, End] = {}
        self._inside: dict[str, list[IPv4Address]] = {nat.name: [] for nat in topology.nats}
        for host in topology.hosts:
            for uplink, plan in zip(host.uplinks, self._addresses.hosts[host.name], strict=True):
                if uplink.network != INTERNET:
                    self._inside[uplink.network] += plan.ipv4
        for nat in topology.nats:
            if nat.uplink.network != INTERNET:
                plan = self._addresses.nats[nat.name].outside
                self._inside[nat.uplink.network] += plan.ipv4

    def plan(self) -> Wiring:
        topology = self._topology
        core = self._machines[INTERNET] = Machine(INTERNET)
        core.sysctls = {
            "ipv4/conf/all/rp_filter": "0",
            "ipv4/conf/default/rp_filter": "0",
            "ipv4/ip_forward": "1",
            "ipv6/conf/all/forwarding": "1",
        }
        # What nobody has goes nowhere, in silence, as on most of the internet.
        core.routes += [Route(_EVERYWHERE_IPV4, None), Route(_EVERYWHERE_IPV6, None)]
        for nat in topology.nats_outermost_first():
            self._add_nat(nat)
        for server in topology.servers:
            machine = self._machines[server.name] = Machine(server.name)
            uplink = Uplink(link=server.link)
            plan = self._addresses.servers[server.name]
            self._add_host_cable(machine, "eth0", uplink, plan, in_use=True)
        for host in topology.hosts:
            machine = self._machines[host.name] = Machine(host.name)
            plans = self._addresses.hosts[host.name]
            for number, (uplink, plan) in enumerate(zip(host.uplinks, plans, strict=True)):
                self._add_host_cable(machine, f"eth{number}", uplink, plan, in_use=number == 0)
        return Wiring(
            topology,
            self._addresses,
            self._machines,
            tuple(self._cables),
            tuple(self._user_nats),
        )

    def _add_host_cable(
        self, machine: Machine, name: str, uplink: Uplink, plan: InterfacePlan, *, in_use: bool
    ) -> None:
        inner = self._add_cable(machine, name, uplink, [*plan.ipv4, *plan.ipv6])
        if in_use:
            machine.addresses += [(inner.index, a) for a in interface_addresses(plan)]
            machine.routes += host_routes(inner.index, plan)

    def _add_cable(
        self,
        machine: Machine,
        name: str,
        uplink: Uplink,
        reachable: list[IPv4Address | IPv6Address],
        delegated: IPv6Network | None = None,
    ) -> End:
        """Connect a machine to its uplink's network, which then routes `reachable` to it."""
        outer_machine = self._machines[uplink.network]
        index = outer_machine.take_index()
        # The number makes a router's inside interfaces easy to tell apart: lan0, lan1, ...
        prefix = "net" if uplink.network == INTERNET else LAN
        outer = End(uplink.network, f"{prefix}{index - _FIRST_INDEX}", index)
        inner = End(machine.name, name, machine.take_index())
        self._outer_ends[machine.name] = outer
        links = (uplink.link, uplink.towards_owner)
        pumped = machine.name in self._pumped or any(map(is_impaired, links))
        self._cables.append(Cable(machine.name, uplink.network, outer, inner, *links, pumped))
        for address in reachable:
            outer_machine.routes.append(Route(ipaddress.ip_network(address), index))
        if delegated is not None:
            outer_machine.routes.append(Route(delegated, index))
        return inner

    def _add_nat(self, nat: Nat) -> None:
        plan, behavior = self._addresses.nats[nat.name], nat.behavior
        inside = self._inside[nat.name]
        fidelity = choose_engine(behavior, len(inside))
        engine = Engine(self._engines.get(nat.name, fidelity.engine))
        if behavior.nat64 and engine is not Engine.USER:
            raise ModelError(
                f'nat "{nat.name}": nat64',
                'nftables translates no IPv6 to IPv4; use the engine "user"',
            )
        router = Router(
            name=nat.name,
            behavior=behavior,
            plan=plan,
            inside=inside,
            engine=engine,
            log_drops=self._log_drops,
            seed=self._topology.seed,
        )
        machine = self._machines[nat.name] = Machine(nat.name, router=router, fidelity=fidelity)
        machine.sysctls = router_sysctls(router)
        machine.rules = router_rules(router)
        if engine is Engine.USER:
            self._pumped.add(nat.name)
        wan = self._add_cable(
            machine,
            WAN,
            nat.uplink,
            [*plan.outside.ipv4, *plan.outside.ipv6],
            plan.external_ipv6,
        )
        if behavior.translation is Translation.NONE and plan.inside_ipv4 is not None:
            self._route_untranslated(nat, plan.inside_ipv4)
        own = interface_addresses(plan)
        gateways = [ipaddress.ip_interface(a) for a in (plan.gateway_ipv4, plan.gateway_ipv6) if a]
        machine.addresses += [(_LOOPBACK_INDEX, gateway) for gateway in gateways]
        # An inside address that no machine has must not leave by the default route.
        networks = [network for network in (plan.inside_ipv4, plan.inside_ipv6) if network]
        machine.routes += [Route(network, None) for network in networks]
        if behavior.ipv6 is not behavior.ipv6.NONE:
            machine.routes.append(Route(_EVERYWHERE_IPV6, wan.index))
        if engine is Engine.NFT:
            machine.addresses += [(wan.index, address) for address in own]
            machine.routes.append(Route(_EVERYWHERE_IPV4, wan.index))
            return
        # The engine owns the external IPv4 addresses; the router doesn't even see their packets.
        machine.addresses += [(wan.index, address) for address in own if address.version == 6]
        inward = End(nat.name, NAT_INSIDE, machine.take_index())
        translated = NAT64_PREFIX if behavior.nat64 else _EVERYWHERE_IPV4
        machine.routes.append(Route(translated, inward.index))
        self._user_nats.append(UserNat(router, inward, self._cables[-1]))

    def _route_untranslated(self, nat: Nat, inside: IPv4Network) -> None:
        """Let everything between a router that translates nothing and the next NAT find it."""
        while True:
            outer = self._outer_ends[nat.name]
            self._machines[outer.machine].routes.append(Route(inside, outer.index))
            if outer.machine == INTERNET:
                return
            nat = self._topology.nat_by_name[outer.machine]
            if nat.behavior.translation is not Translation.NONE:
                return
