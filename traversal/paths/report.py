"""The net check's report: what this node learned about its network, built answer by answer.

Netcheck specification 7 and 10. Stricter than upstream in two points: the mapping counts as
endpoint-independent only when two servers with *different IPs* saw the same address (two answers of
one server prove nothing), and the first IPv6 address heard is kept, like the first IPv4 one.
"""

from __future__ import annotations

import ipaddress
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from itertools import pairwise
from typing import Final

from traversal.paths.probe_plan import LastReport, Probe
from traversal.wire.address import Address, is_private, is_shared
from traversal.wire.introduction import FilteringClass, MappingClass

ENOUGH_REGIONS: Final = 3
FULL_REPORT_SECONDS: Final = 300.0
MAX_ADDRESSES: Final = 32
"""Different reflexive addresses remembered per family: a pool of a large CGN shows a few."""
MIN_SAMPLES_FOR_PATTERN: Final = 4
MAX_STEP: Final = 64
"""Larger steps than this are not worth predicting: foreign flows fall in between."""


class PortPattern(Enum):
    """How a NAT picks public ports for new mappings."""

    UNKNOWN = "unknown"
    PRESERVING = "preserving"
    SEQUENTIAL = "sequential"
    RANDOM = "random"


@dataclass(frozen=True, slots=True)
class PortAllocation:
    """A pattern; `step` is the distance between successive ports of a sequential NAT, may be
    negative, else 0."""

    pattern: PortPattern
    step: int = 0


def classify_ports(samples: Sequence[tuple[int, int]]) -> PortAllocation:
    """The pattern behind (local, mapped) ports of new mappings, in the order of their making.

    Ports that other hosts' flows took in between show as gaps that are multiples of the step, so
    the step is the commonest difference, and three quarters of all must be small multiples of it.
    """
    if len(samples) < MIN_SAMPLES_FOR_PATTERN:
        return PortAllocation(PortPattern.UNKNOWN)
    preserved = sum(local == mapped for local, mapped in samples)
    if preserved * 4 >= len(samples) * 3:
        return PortAllocation(PortPattern.PRESERVING)
    # Modulo the port range, so that one wrap-around does not break the series.
    differences = [
        (after - before + 32768) % 65536 - 32768
        for (_, before), (_, after) in pairwise(samples)
        if after != before
    ]
    if not differences:
        return PortAllocation(PortPattern.UNKNOWN)
    counts = Counter(differences)
    # Of equally common ones the smallest: the others are its multiples.
    step = min(counts, key=lambda difference: (-counts[difference], abs(difference)))
    regular = sum(
        difference % step == 0 and 0 < difference // step <= MAX_STEP
        for difference in differences
        if step
    )
    is_regular = counts[step] * 2 >= len(differences) and regular * 4 >= len(differences) * 3
    if is_regular and abs(step) <= MAX_STEP:
        return PortAllocation(PortPattern.SEQUENTIAL, step)
    return PortAllocation(PortPattern.RANDOM)


@dataclass(frozen=True, slots=True)
class NatFacts:
    """What is known about the NAT in front of a node; shared with peers and used by the verdict."""

    mapping: MappingClass = MappingClass.UNKNOWN
    filtering: FilteringClass = FilteringClass.UNKNOWN
    ports: PortAllocation = PortAllocation(PortPattern.UNKNOWN)
    hairpins: bool | None = None
    is_udp_blocked: bool = False
    """Relays answer by HTTPS and not by UDP."""
    is_offline: bool = False
    """No relay answers in any way."""
    has_port_mapping: bool = False
    has_captive_portal: bool = False

    @property
    def is_hard(self) -> bool:
        """Whether each destination sees another public port (upstream's word)."""
        return self.mapping in (
            MappingClass.ADDRESS_DEPENDENT,
            MappingClass.ADDRESS_AND_PORT_DEPENDENT,
        )


def classify_mapping(
    local: Address, first: Address, other_ip: Address | None, other_ip_and_port: Address | None
) -> MappingClass:
    """RFC 5780 section 4.3: the addresses seen by A1:P1, A2:P1 and A2:P2 from one socket."""
    if first == local:
        return MappingClass.NONE
    if other_ip is None:
        return MappingClass.UNKNOWN
    if other_ip == first:
        return MappingClass.ENDPOINT_INDEPENDENT
    if other_ip_and_port is None:
        return MappingClass.UNKNOWN
    if other_ip_and_port == other_ip:
        return MappingClass.ADDRESS_DEPENDENT
    return MappingClass.ADDRESS_AND_PORT_DEPENDENT


def classify_filtering(
    *, is_natted: bool, from_other_ip_and_port: bool, from_other_port: bool | None
) -> FilteringClass:
    """RFC 5780 section 4.4: which of the answers from elsewhere arrived (None: not tried)."""
    if from_other_ip_and_port:
        return FilteringClass.ENDPOINT_INDEPENDENT if is_natted else FilteringClass.OPEN
    if from_other_port is None:
        return FilteringClass.UNKNOWN
    if from_other_port:
        return FilteringClass.ADDRESS_DEPENDENT
    return FilteringClass.ADDRESS_AND_PORT_DEPENDENT


@dataclass(slots=True)
class Report:
    """One net check. Latencies are in seconds, None means "not measured"."""

    started_at: float
    is_full: bool = True
    is_udp_working: bool = False
    ipv4_can_send: bool = False
    ipv6_can_send: bool = False
    mapping_varies: bool | None = None
    latencies: dict[int, float] = field(default_factory=dict)
    v4_latencies: dict[int, float] = field(default_factory=dict)
    v6_latencies: dict[int, float] = field(default_factory=dict)
    global_v4: dict[Address, int] = field(default_factory=dict)
    global_v6: dict[Address, int] = field(default_factory=dict)
    upnp: bool | None = None
    nat_pmp: bool | None = None
    pcp: bool | None = None
    captive_portal: bool | None = None
    preferred_region: int = 0
    mapping: MappingClass = MappingClass.UNKNOWN
    filtering: FilteringClass = FilteringClass.UNKNOWN
    ports: PortAllocation = PortAllocation(PortPattern.UNKNOWN)
    hairpins: bool | None = None
    _first_v4: tuple[str, Address] | None = None

    def handle_sent(self, probe: Probe, *, was_handed_over: bool) -> None:
        """A probe was given to the kernel, or lost in a way that a firewall loses packets."""
        if was_handed_over:
            if probe.family == 4:
                self.ipv4_can_send = True
            else:
                self.ipv6_can_send = True

    def handle_stun_answer(
        self, region: int, server: Address, reflexive: Address, latency_seconds: float
    ) -> None:
        """A server of a region answered a probe. `server` is the address that was asked."""
        self.is_udp_working = True
        self.handle_latency(region, latency_seconds)
        is_ipv6 = reflexive.is_ipv6
        _lower(self.v6_latencies if is_ipv6 else self.v4_latencies, region, latency_seconds)
        seen = self.global_v6 if is_ipv6 else self.global_v4
        if reflexive in seen or len(seen) < MAX_ADDRESSES:
            seen[reflexive] = seen.get(reflexive, 0) + 1
        if is_ipv6:
            return
        if self._first_v4 is None:
            self._first_v4 = (server.host, reflexive)
        elif self._first_v4[1] != reflexive:
            self.mapping_varies = True
        elif self._first_v4[0] != server.host and self.mapping_varies is None:
            self.mapping_varies = False

    def handle_latency(self, region: int, latency_seconds: float) -> None:
        """A latency from STUN, HTTPS or ICMP; the least counts."""
        _lower(self.latencies, region, latency_seconds)

    def would_help(self, probe: Probe) -> bool:
        """Whether a probe that is due would still tell something (netcheck specification 6)."""
        if probe.node.region_id not in self.latencies:
            return True
        if probe.family == 6:
            return not self.v6_latencies
        return self.mapping_varies is None

    def stop_after_seconds(self) -> float | None:
        """How long to wait for more once enough regions have answered; None before."""
        if len(self.latencies) < ENOUGH_REGIONS:
            return None
        slowest = max(self.latencies.values())
        return 2 * slowest if self.is_full else slowest

    def reflexive_addresses(self) -> list[Address]:
        """What to advertise: of each family the first heard, then those heard more than once."""
        chosen = []
        for seen in (self.global_v4, self.global_v6):
            for place, (address, count) in enumerate(seen.items()):
                if place == 0 or count > 1:
                    chosen.append(address)
        return chosen

    @property
    def first_v4(self) -> tuple[str, Address] | None:
        """The first IPv4 answer: the server's host and what it saw."""
        return self._first_v4

    def nat_facts(
        self,
        local: Address | None = None,
        *,
        has_port_mapping: bool = False,
        evidence: MappingClass = MappingClass.UNKNOWN,
    ) -> NatFacts:
        """The report as facts about the NAT. `local` is our socket's address, if it is known.

        Answers of several servers give a class where RFC 5780 tests gave none, and `evidence`,
        from peers, where there is but one server.
        """
        mapping = self.mapping
        if mapping is MappingClass.UNKNOWN:
            if self._first_v4 is not None and self._first_v4[1] == local:
                mapping = MappingClass.NONE
            elif self.mapping_varies is False:
                mapping = MappingClass.ENDPOINT_INDEPENDENT
            elif self.mapping_varies:
                mapping = MappingClass.ADDRESS_AND_PORT_DEPENDENT
            else:
                mapping = evidence
        return NatFacts(
            mapping=mapping,
            filtering=self.filtering,
            ports=self.ports,
            hairpins=self.hairpins,
            is_udp_blocked=not self.is_udp_working and bool(self.latencies),
            is_offline=not self.latencies,
            has_port_mapping=has_port_mapping,
            has_captive_portal=not self.is_udp_working and self.captive_portal is True,
        )

    def last_report(self) -> LastReport:
        """For the next plan."""
        return LastReport(self.latencies, self.v4_latencies, self.v6_latencies)


def wants_full_report(last: Report | None, last_full_at: float, now: float) -> bool:
    """Whether the next net check must be a full one (netcheck specification 1)."""
    if last is None or not last.latencies or now - last_full_at > FULL_REPORT_SECONDS:
        return True
    return not last.is_udp_working and last.captive_portal is True


def is_behind_another_nat(ip: ipaddress.IPv4Address) -> bool:
    """Whether a gateway's external address is itself private or shared (100.64/10)."""
    return is_private(ip) or is_shared(ip)


def _lower(table: dict[int, float], region: int, latency_seconds: float) -> None:
    table[region] = min(table.get(region, latency_seconds), latency_seconds)
