"""The simulated internet: a topology come to life for unmodified Trio programs.

    async with SimulatedInternet(topology) as internet:
        async with internet.host("a"):
            stream = await trio.open_tcp_stream("relay-1", 443)

Inside the outer block every socket that `trio.socket` makes, and every name it looks up, belongs
to the simulated host that the running task is in; a task that is in none gets ENETUNREACH, so
nothing leaks to a real network. Time is Trio's: with `trio.testing.MockClock(autojump_threshold=0)`
minutes pass in milliseconds, with the normal clock the lab runs in real time. The same topology,
seed and programs give the same timeline, byte for byte, as long as the programs take randomness
only from seeded generators.
"""

from __future__ import annotations

import errno
import random
import socket as stdlib
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from ipaddress import ip_address
from types import TracebackType

import trio

from netlab.addresses import AddressPlan, InterfacePlan, plan_addresses
from netlab.behavior import Ipv6, Link, ModelError, Translation, suggest
from netlab.drops import Address
from netlab.model import INTERNET, Nat, Topology
from netlab.simulated.determinism import driven_by_clock, repeatable_schedule
from netlab.simulated.host import Interface, SimulatedHost, current_host
from netlab.simulated.network import Attachment, NatNode, Network, prefix_of
from netlab.simulated.resolver import Resolver
from netlab.simulated.sockets import SimulatedSocket
from netlab.simulated.tcp import TcpSocket
from netlab.simulated.udp import UdpSocket
from netlab.simulated.world import World
from netlab.timeline import Note, Timeline


class SimulatedInternet:
    """All machines of a topology, in memory.

    Args:
        topology: what to build; its seed decides every random draw.
        timeline: where events go; a new one if absent.
        record_packets: whether each packet's fate is recorded, or only mappings and changes.
        snap_bytes: how much of each recorded packet's contents is kept for captures.
        tick_seconds: how late an event may be, to be carried out together with others; a
            coarser tick makes labs of thousands of hosts faster.
        names: extra names for the resolver, with their addresses. Servers, and hosts that are
            on the internet itself, have their own names anyway.
    """

    def __init__(
        self,
        topology: Topology,
        *,
        timeline: Timeline | None = None,
        record_packets: bool = True,
        snap_bytes: int = 0,
        tick_seconds: float = 0.0001,
        names: Mapping[str, Iterable[str]] | None = None,
    ) -> None:
        self.topology = topology
        self.plan: AddressPlan = plan_addresses(topology)
        self.timeline = Timeline() if timeline is None else timeline
        self.world = World(self.timeline, record_packets, tick_seconds, snap_bytes)
        self._networks = {INTERNET: Network(self.world, INTERNET)}
        self._nats: dict[str, NatNode] = {}
        self._hosts: dict[str, SimulatedHost] = {}
        self._build()
        records = {
            name.lower(): tuple(ip_address(address).packed for address in addresses)
            for name, addresses in (names or {}).items()
        }
        self.resolver = Resolver(self._public_names() | records, self._is_behind_nat64)

    # --- looking -------------------------------------------------------------------------

    def host(self, name: str) -> SimulatedHost:
        """Return a host or server.

        Raises:
            ModelError: there is none of that name.
        """
        try:
            return self._hosts[name]
        except KeyError:
            raise ModelError(f'host "{name}"', f"unknown; {suggest(name, self._hosts)}") from None

    def nat(self, name: str) -> NatNode:
        """Return a NAT.

        Raises:
            ModelError: there is none of that name.
        """
        try:
            return self._nats[name]
        except KeyError:
            raise ModelError(f'nat "{name}"', f"unknown; {suggest(name, self._nats)}") from None

    def note(self, text: str) -> None:
        """Put a remark on the timeline."""
        self.timeline.add(Note(at=self.world.now(), text=text))

    # --- running -------------------------------------------------------------------------

    async def __aenter__(self) -> SimulatedInternet:
        self._undo = ExitStack()
        self._manager = trio.open_nursery()
        self._nursery = await self._manager.__aenter__()
        self._undo.enter_context(repeatable_schedule(self.topology.seed))
        self._undo.callback(
            trio.socket.set_custom_socket_factory,
            trio.socket.set_custom_socket_factory(_SocketFactory()),
        )
        self._undo.callback(
            trio.socket.set_custom_hostname_resolver,
            trio.socket.set_custom_hostname_resolver(self.resolver),
        )
        await self._nursery.start(self.world.run)
        self._undo.enter_context(driven_by_clock(self.world))
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._undo.close()
        self._nursery.cancel_scope.cancel()
        try:
            await self._manager.__aexit__(kind, value, traceback)
        except BaseExceptionGroup as group:
            # The nursery is ours alone: an error of the body passes as it was raised.
            if value is None or group.exceptions != (value,):
                raise

    # --- building ------------------------------------------------------------------------

    def _generator(self, purpose: str) -> random.Random:
        """Return a stream of randomness that nothing else draws from."""
        return random.Random(f"{purpose} {self.topology.seed}")

    def _build(self) -> None:
        inside_hosts: dict[str, list[Address]] = {}
        for interfaces in self.plan.hosts.values():
            for interface in interfaces:
                addresses = inside_hosts.setdefault(interface.network, [])
                addresses += (address.packed for address in interface.ipv4)
        for nat in self.topology.nats_outermost_first():
            self._build_nat(nat, inside_hosts.get(nat.name, []))
        for server in self.topology.servers:
            node = self._new_host(server.name)
            plan = self.plan.servers[server.name]
            self._add_interface(node, plan, server.link, server.link).bring_up()
        for host in self.topology.hosts:
            node = self._new_host(host.name)
            for uplink, plan in zip(host.uplinks, self.plan.hosts[host.name], strict=True):
                self._add_interface(node, plan, uplink.link, uplink.towards_owner)
            node.interfaces[0].bring_up()

    def _new_host(self, name: str) -> SimulatedHost:
        node = SimulatedHost(self.world, name, self._generator(f"host {name}"))
        self._hosts[name] = node
        return node

    def _add_interface(
        self, node: SimulatedHost, plan: InterfacePlan, up: Link, down: Link
    ) -> Interface:
        attachment = Attachment(
            self.world,
            node,
            self._networks[plan.network],
            up,
            down,
            self._generator(f"link {node.name} {plan.network}"),
        )
        interface = Interface(plan.network, attachment, _packed(plan))
        node.add_interface(interface)
        return interface

    def _build_nat(self, nat: Nat, inside_hosts: list[Address]) -> None:
        plan = self.plan.nats[nat.name]
        inside = self._networks[nat.name] = Network(self.world, nat.name)
        node = NatNode(
            self.world,
            nat.name,
            nat.behavior,
            plan,
            inside,
            self._generator(f"nat {nat.name}"),
            tuple(inside_hosts),
        )
        inside.router = node
        around = self._networks[nat.uplink.network]
        node.outside = Attachment(
            self.world,
            node,
            around,
            nat.uplink.link,
            nat.uplink.towards_owner,
            self._generator(f"link {nat.name}"),
        )
        for address in _packed(plan.outside):
            around.members[address] = node.outside
        if nat.behavior.ipv6 in (Ipv6.ROUTED, Ipv6.NPT):
            assert plan.external_ipv6 is not None
            self._route_site(nat, plan.external_ipv6.network_address.packed)
        if nat.behavior.translation is Translation.NONE:
            assert plan.inside_ipv4 is not None
            self._route_site(nat, plan.inside_ipv4.network_address.packed)
        self._nats[nat.name] = node

    def _route_site(self, nat: Nat, network_address: Address) -> None:
        """Route a site's prefix to it, in the network around it and in all around that."""
        node = self._nats.get(nat.name) or self._networks[nat.name].router
        assert node is not None
        prefix = prefix_of(network_address)
        self._networks[nat.uplink.network].sites[prefix] = node.outside
        for outer in self.topology.nats_towards_internet(nat.uplink.network):
            routes = len(network_address) == 16 or outer.behavior.translation is Translation.NONE
            if not routes:
                break
            self._networks[outer.uplink.network].sites[prefix] = self._nats[outer.name].outside

    # --- names ---------------------------------------------------------------------------

    def _public_names(self) -> dict[str, tuple[Address, ...]]:
        names = {name.lower(): _packed(plan) for name, plan in self.plan.servers.items()}
        for name, interfaces in self.plan.hosts.items():
            public = [_packed(plan) for plan in interfaces if plan.network == INTERNET]
            if public:
                names[name.lower()] = public[0]
        return names

    def _is_behind_nat64(self, host: SimulatedHost) -> bool:
        network = next((i.network for i in host.interfaces if i.is_up), INTERNET)
        return network != INTERNET and self._nats[network].behavior.nat64


class _SocketFactory(trio.abc.SocketFactory):
    """Makes sockets on the host that the running task is in."""

    def socket(
        self,
        family: stdlib.AddressFamily | int = stdlib.AF_INET,
        type: stdlib.SocketKind | int = stdlib.SOCK_STREAM,
        proto: int = 0,
    ) -> SimulatedSocket:
        host = current_host()
        if host is None:
            raise OSError(
                errno.ENETUNREACH,
                "this task is in no simulated host; open sockets inside `async with host:`",
            )
        if family not in (stdlib.AF_INET, stdlib.AF_INET6):
            raise OSError(errno.EAFNOSUPPORT, "the simulated internet has IPv4 and IPv6 only")
        if type == stdlib.SOCK_DGRAM:
            return UdpSocket(host, family)
        if type == stdlib.SOCK_STREAM:
            return TcpSocket(host, family)
        raise OSError(errno.EPROTONOSUPPORT, "the simulated internet has UDP and TCP only")


def _packed(plan: InterfacePlan) -> tuple[Address, ...]:
    return (*(a.packed for a in plan.ipv4), *(a.packed for a in plan.ipv6))
