"""What a node knows of its own place in the network, and the tasks that keep it up to date.

Net checks (every 20 to 26 s while a peer is active, and on demand), home relay, port mapping, own
addresses, changes of interface, fresh sockets: path selection specification 7, 11, 15 and 16.
"""

from __future__ import annotations

import ipaddress
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Final, Protocol

import trio

from traversal.io.captive_portal import find_captive_portal
from traversal.io.interfaces import (
    InterfaceFilter,
    NetworkChange,
    NetworkState,
    read_network_state,
    watch_network,
)
from traversal.io.nat64 import discover_prefixes
from traversal.io.nat_discovery import NatBehavior, NatDiscovery
from traversal.io.net_check import NetCheck
from traversal.io.port_mapper import PortMapping
from traversal.io.port_sampling import PortSamples, sample_ports
from traversal.io.relay_client import RelayOptions
from traversal.io.relays import Relays
from traversal.io.resolver import Resolver
from traversal.io.udp import Source, UdpSockets
from traversal.keys import Entropy
from traversal.paths.candidates import LocalNetworks
from traversal.paths.home import HomeChooser, HomePolicy
from traversal.paths.mapping_evidence import MappingEvidence
from traversal.paths.own_addresses import Findings, OwnAddress, OwnAddresses, choose_local_ips
from traversal.paths.probe_plan import make_initial_plan, make_plan
from traversal.paths.punch_strategy import OwnSide, public_ipv4
from traversal.paths.report import NatFacts, Report, classify_ports, wants_full_report
from traversal.relay_map import Family, RelayMap, RelayNode
from traversal.wire.address import Address
from traversal.wire.introduction import MappingClass

PERIOD_SECONDS: Final = (20.0, 26.0)
MIN_SPACING_SECONDS: Final = 1.0
"""Least time between the starts of two checks on demand."""
KNOCK_SECONDS: Final = 3.0
"""How often a node whose UDP is blocked asks one server whether it still is, while a peer is
active: firewalls get opened and guests sign in, and a check comes every 20 to 26 s only."""
REBIND_SPACING_SECONDS: Final = 5.0
DISCOVERY_PATIENCE_SECONDS: Final = 12.0
"""What sampling ports and the RFC 5780 tests of one server take at most."""
MAX_PROBED_MTU_BYTES: Final = 9000


class IsBusy(Protocol):
    """Whether any peer is active: without one, periodic checks pause."""

    def __call__(self) -> bool: ...


class HandleRefresh(Protocol):
    """Own addresses were found anew (they may be the same)."""

    def __call__(self, *, has_home_changed: bool) -> None: ...


class HandleRebind(Protocol):
    """The sockets are fresh ones."""

    def __call__(self) -> None: ...


class Endpoints:
    """Run `run` in a task; `wait_checked` waits for its first check."""

    def __init__(
        self,
        relay_map: RelayMap,
        udp: UdpSockets,
        relays: Relays,
        *,
        is_busy: IsBusy,
        handle_refresh: HandleRefresh,
        handle_rebind: HandleRebind,
        handle_own_hosts: Callable[[frozenset[str]], None],
        interfaces: InterfaceFilter,
        static_addresses: tuple[Address, ...],
        home: HomePolicy,
        relay_options: RelayOptions,
        map_ports: bool,
        entropy: Entropy,
        rng: random.Random,
    ) -> None:
        self.report = Report(trio.current_time())
        self.nat = NatFacts()
        self.own_addresses: tuple[OwnAddress, ...] = ()
        self.local_networks = LocalNetworks(
            allowed=interfaces.allowed_networks, excluded=interfaces.denied_networks
        )
        self.state = NetworkState()
        self._nat64_prefixes: tuple[ipaddress.IPv6Network, ...] = ()
        self._map = relay_map
        self._udp = udp
        self._relays = relays
        self._is_busy = is_busy
        self._handle_refresh = handle_refresh
        self._handle_rebind = handle_rebind
        self._handle_own_hosts = handle_own_hosts
        self._interfaces = interfaces
        self._static = static_addresses
        self._entropy = entropy
        self._rng = rng
        self._resolver = Resolver()
        self._check = NetCheck(udp, self._resolver, entropy, relay_options)
        self._discovery = NatDiscovery(udp, entropy)
        self._evidence = MappingEvidence()
        self._behavior: NatBehavior | None = None
        self._samples: PortSamples | None = None
        self._tested_network = ("-", "-")
        self._public_host = "-"
        self._discovery_wanted = trio.Event()
        self._discovered = trio.Event()
        self._chooser = HomeChooser(home, relay_map.home_scores)
        self._book = OwnAddresses()
        self._port_mapping = PortMapping(entropy, self.refresh) if map_ports else None
        self._last: Report | None = None
        self._last_full_at = 0.0
        self._wanted = trio.Event()
        self._finished = trio.Event()
        self._is_full_wanted = False
        self._rebind_wanted = trio.Event()

    @property
    def mtu_ceiling_bytes(self) -> int:
        """The largest packet that path MTU search should try."""
        return min(self.state.mtu_bytes, MAX_PROBED_MTU_BYTES)

    def own_side(self) -> OwnSide:
        """What port searches know of us."""
        listed = tuple(address for _, address in self.own_addresses)
        reflexive = tuple(self.report.reflexive_addresses())
        nat = self.nat
        if self._nat64_prefixes:
            # Searches send by IPv4, of which there is none here: the NAT64 can't be searched.
            nat = replace(nat, mapping=MappingClass.UNKNOWN)
            reflexive = tuple(address for address in reflexive if address.is_ipv6)
        offers_mapping = False
        if self._port_mapping is not None and self._external_address() is None:
            offers_mapping = True in self._port_mapping.seen(trio.current_time())
        samples = self._samples.ports if self._samples is not None else ()
        return OwnSide(
            nat=nat,
            addresses=reflexive,
            listed=listed,
            port_samples=tuple(mapped for _, mapped in samples),
            fingerprint=self._fingerprint(),
            offers_mapping=offers_mapping,
        )

    def stun_server(self) -> Address | None:
        """The nearest STUN server for IPv4."""
        servers = self._check.answering_servers()
        return servers[0] if servers else None

    def ask_router(self) -> None:
        """Ask the router for a port mapping now, if it refused before."""
        if self._port_mapping is not None:
            self._port_mapping.ask_now()

    def handle_stun(self, datagram: bytes, source: Source, now: float) -> None:
        """A STUN message came in on the peers' sockets."""
        if not self._discovery.handle_stun(datagram):
            self._check.handle_stun(datagram, source, now)

    def handle_seen_as(self, peer: Address, seen_as: Address, now: float) -> None:
        """A peer at an address of IPv4 says where a Ping from our sockets came from."""
        if self._evidence.handle_pong(peer, seen_as, now):
            self.refresh()

    def set_map(self, relay_map: RelayMap) -> None:
        """Use another relay map: a full check soon tells which region is home."""
        self._map = relay_map
        self._chooser.set_scores(relay_map.home_scores)
        self._is_full_wanted = True
        self._wanted.set()

    def refresh(self) -> None:
        """Ask for a check soon; requests during a check lead to one more."""
        self._wanted.set()

    async def refresh_now(self) -> Report:
        """Run a full check and wait for its end, and before for tests of the NAT under way.

        The first check of all is such a one, so that no second is run while it is under way.
        """
        if self._last is None:
            await self._finished.wait()
            return self.report
        with trio.move_on_after(DISCOVERY_PATIENCE_SECONDS):
            await self._discovered.wait()
        self._is_full_wanted = True
        self._wanted.set()
        while self._is_full_wanted:
            await self._finished.wait()
        return self.report

    def leave_home(self, region: int) -> None:
        """The relay of this region is about to go: be at home elsewhere before it does."""
        now = trio.current_time()
        chosen = self._chooser.leave(region, now)
        if region == self._relays.home != chosen:
            self.report.preferred_region = chosen
            self._relays.set_home(chosen)
            self._handle_refresh(has_home_changed=True)

    def want_rebind(self) -> None:
        """Ask for fresh sockets; at most one in 5 s."""
        self._rebind_wanted.set()

    async def rebind(self) -> None:
        """Fresh sockets now; what was measured through the old ones is void, and what was found of
        the NAT too if the network is another one."""
        await self._udp.rebind()
        self._book.forget()
        self._evidence = MappingEvidence()
        if self._network() != self._tested_network:
            self._behavior = self._samples = None
        self._discovered = trio.Event()
        self._discovery_wanted.set()
        self._update_local_networks()
        self._handle_rebind()
        self._is_full_wanted = True
        self._wanted.set()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Keep everything up to date until cancelled."""
        self.state = await read_network_state(self._interfaces)
        self._update_local_networks()
        async with trio.open_nursery() as nursery:
            if self._port_mapping is not None:
                nursery.start_soon(self._port_mapping.run)
                self._map_port()
            # On a network without IPv4 the first check needs to know how IPv4 is reached.
            task_status.started()
            await self._discover_nat64()
            await self._run_check()
            nursery.start_soon(self._check_forever)
            nursery.start_soon(self._knock_forever)
            nursery.start_soon(self._rebind_forever)
            nursery.start_soon(self._discover_forever)
            nursery.start_soon(
                watch_network, self.state, self._interfaces, self._handle_network_change
            )

    async def wait_checked(self) -> None:
        """Until a check has ended."""
        while self._last is None:
            await self._finished.wait()

    # ---- tasks

    async def _check_forever(self) -> None:
        while True:
            began = trio.current_time()
            pause = self._rng.uniform(*PERIOD_SECONDS)
            while not self._wanted.is_set():
                with trio.move_on_after(pause):
                    await self._wanted.wait()
                if self._is_busy() or not self.report.latencies:
                    break
            if not self._is_full_wanted:
                await trio.sleep(max(0.0, began + MIN_SPACING_SECONDS - trio.current_time()))
            await self._run_check()

    async def _knock_forever(self) -> None:
        while True:
            finished, node = self._finished, self._stun_node()
            if self.report.is_udp_working or node is None:
                await finished.wait()
            elif not self._is_busy():
                await trio.sleep(KNOCK_SECONDS)
            elif await self._check.knock(node, self._families(), KNOCK_SECONDS):
                self.refresh()
                await finished.wait()

    def _stun_node(self) -> RelayNode | None:
        home = self._map.regions.get(self._relays.home)
        nodes = home.nodes if home is not None else ()
        return next((node for node in nodes if node.stun_port is not None), None)

    async def _discover_forever(self) -> None:
        """Tests of the NAT, at the start and after each change of network, off the hot path."""
        while True:
            self._discovery_wanted = trio.Event()
            servers = self._check.answering_servers()
            self._tested_network = self._network()
            if servers:
                await self._sample_ports(servers[0])
            local = self._local_ipv4()
            for server in servers:
                behavior = await self._discovery.run(server, local)
                if behavior is not None:
                    self._behavior = behavior
                    self._note_nat_tests()
                    self.refresh()
                    break
            self._discovered.set()
            await self._discovery_wanted.wait()
            await self._finished.wait()

    async def _sample_ports(self, server: Address) -> None:
        own_hosts = frozenset(address.host for address in self.local_addresses())
        host = self._udp.bound_host(4) or "0.0.0.0"
        self._samples = await sample_ports(server, host, own_hosts, self._entropy)
        self._note_nat_tests()

    def _note_nat_tests(self) -> None:
        """Peers that wait for it to plan a search should not wait for the next check."""
        self._take_nat_tests(self.report)
        self._handle_refresh(has_home_changed=False)

    async def _rebind_forever(self) -> None:
        while True:
            await self._rebind_wanted.wait()
            await self.rebind()
            await trio.sleep(REBIND_SPACING_SECONDS)
            self._rebind_wanted = trio.Event()

    async def _handle_network_change(self, change: NetworkChange) -> None:
        self.state = change.state
        hosts = frozenset(
            str(address.ip) for i in change.state.interfaces for address in i.addresses
        )
        self._handle_own_hosts(hosts)
        self._map_port()
        if change.needs_rebind:
            self._resolver.forget()
            await self.rebind()
            await self._discover_nat64()
        else:
            self._update_local_networks()
            self.refresh()

    async def _discover_nat64(self) -> None:
        is_only_ipv6 = self.state.default_ipv6 is not None and self.state.default_ipv4 is None
        found = await discover_prefixes() if is_only_ipv6 else ()
        if found != self._nat64_prefixes:
            self._nat64_prefixes = self._check.nat64_prefixes = found
            self._update_local_networks()
            self.refresh()

    def _map_port(self) -> None:
        if self._port_mapping is None:
            return
        own = self._addresses_of(self.state.default_ipv4, 4)
        gateway = self.state.gateway_ipv4
        self._port_mapping.set_network(
            ipaddress.IPv4Address(gateway) if gateway else None,
            ipaddress.IPv4Address(own[0]) if own else None,
            self._udp.port(4) or 0,
        )

    # ---- one check

    async def _run_check(self) -> None:
        self._wanted = trio.Event()
        now = trio.current_time()
        is_full = self._is_full_wanted or wants_full_report(self._last, self._last_full_at, now)
        families = self._families()
        report = Report(now, is_full=is_full)
        if is_full or self._last is None:
            plan = make_initial_plan(self._map, families)
        else:
            last = self._last.last_report()
            plan = make_plan(self._map, families, last, self._relays.home)
        async with trio.open_nursery() as nursery:
            if is_full:
                nursery.start_soon(find_captive_portal, report, self._map, self._relays.home)
            await self._check.run(report, plan)
            if report.is_udp_working:
                nursery.cancel_scope.cancel()
        if not report.is_udp_working:
            await self._check.run_https(report, self._map)
        self._conclude(report)
        finished, self._finished = self._finished, trio.Event()
        if is_full:
            self._is_full_wanted = False
        finished.set()

    def _conclude(self, report: Report) -> None:
        now = trio.current_time()
        was_offline = self._last is not None and not self._last.latencies
        if was_offline and report.latencies and not report.is_udp_working:
            # The network may have come during this check, too late for its STUN requests.
            self._wanted.set()
        self._last = self.report = report
        if report.is_full:
            self._last_full_at = now
        home_before = self._relays.home
        report.preferred_region = self._choose_home(report, now)
        self._relays.set_home(report.preferred_region)
        mapped = self._external_address()
        if self._port_mapping is not None:
            report.nat_pmp, report.pcp, report.upnp = self._port_mapping.seen(now)
        if report.first_v4 is not None:
            self._evidence.handle_check(*report.first_v4, now)
        self._take_nat_tests(report)
        findings = Findings(
            port_mapped=(mapped,) if mapped is not None else (),
            reflexive=tuple(report.reflexive_addresses()),
            static=self._static,
            local=self.local_addresses(),
            guess_port=self._udp.wanted_port if self.nat.is_hard else 0,
        )
        self.own_addresses = self._book.handle_findings(findings, now)
        self._update_local_networks()
        self._handle_refresh(has_home_changed=report.preferred_region != home_before)

    def _take_nat_tests(self, report: Report) -> None:
        if self._behavior is not None:
            report.mapping = self._behavior.mapping
            report.filtering = self._behavior.filtering
        if self._samples is not None:
            report.ports = classify_ports(self._samples.ports)
            report.hairpins = self._samples.hairpins
        self.nat = report.nat_facts(
            self._local_ipv4(),
            has_port_mapping=self._external_address() is not None,
            evidence=self._evidence.mapping,
        )

    def _network(self) -> tuple[str, str]:
        """The IPv4 gateway and our address towards it."""
        own = self._addresses_of(self.state.default_ipv4, 4)
        return self.state.gateway_ipv4 or "-", own[0] if own else "-"

    def _fingerprint(self) -> str:
        """Names the network that we are in: gateway, our address in it, public IP."""
        public = public_ipv4(address for _, address in self.own_addresses)
        if public is not None:
            self._public_host = public.host
        # A check that nobody answered does not mean that we moved.
        return " ".join((*self._network(), self._public_host))

    def _external_address(self) -> Address | None:
        return self._port_mapping.external if self._port_mapping is not None else None

    def _choose_home(self, report: Report, now: float) -> int:
        may_be_home = {
            region: seconds
            for region, seconds in report.latencies.items()
            # The map may have changed during the check.
            if region in self._map.regions and self._map.regions[region].may_be_home
        }
        heard_at = self._relays.heard_at()
        chosen = self._chooser.handle_report(may_be_home, heard_at, report.started_at, now)
        if chosen or self._relays.home:
            return chosen or self._relays.home
        usable = sorted(r.region_id for r in self._map.regions.values() if r.may_be_home)
        return self._rng.choice(usable) if usable else 0

    # ---- own addresses

    def _families(self) -> frozenset[Family]:
        has: set[Family] = set()
        families: tuple[Family, ...] = (4, 6)
        for family in families:
            if self._udp.port(family) is not None and self._ips(family):
                has.add(family)
        if self._nat64_prefixes and 6 in has:
            has.add(4)
        return frozenset(has)

    def _ips(self, version: int) -> list[str]:
        entries = [
            (address.ip, address.network.prefixlen, interface.is_loopback)
            for interface in self.state.interfaces
            for address in interface.addresses
        ]
        return [str(ip) for ip in choose_local_ips(entries) if ip.version == version]

    def _addresses_of(self, interface_name: str | None, version: int) -> list[str]:
        return [
            str(address.ip)
            for interface in self.state.interfaces
            if interface.name == interface_name
            for address in interface.addresses
            if address.version == version
        ]

    def local_addresses(self) -> tuple[Address, ...]:
        """Our interfaces' addresses, each with the port of the socket of its family."""
        found: list[Address] = []
        families: tuple[Family, ...] = (4, 6)
        for family in families:
            port = self._udp.port(family)
            if port is None:
                continue
            bound = self._udp.bound_host(family)
            found += [Address(ip, port) for ip in ([bound] if bound else self._ips(family))]
        return tuple(found)

    def local_hosts(self) -> tuple[str, ...]:
        """The hosts of `local_addresses`."""
        return tuple(dict.fromkeys(address.host for address in self.local_addresses()))

    def _local_ipv4(self) -> Address | None:
        return next((a for a in self.local_addresses() if not a.is_ipv6), None)

    def _update_local_networks(self) -> None:
        self.local_networks = LocalNetworks(
            networks=tuple(
                address.network for i in self.state.interfaces for address in i.addresses
            ),
            public_ips=frozenset(a.host for a in self.report.reflexive_addresses()),
            allowed=self._interfaces.allowed_networks,
            excluded=(*self._interfaces.denied_networks, *self.state.excluded),
            has_ipv4=self._udp.port(4) is not None,
            has_ipv6=self._udp.port(6) is not None,
            nat64_prefixes=self._nat64_prefixes,
        )
