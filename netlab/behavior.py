"""How a NAT, a firewall and a link behave: frozen records without a place in a network.

The words are those of RFC 4787 (UDP), RFC 5382 (TCP) and RFC 6888 (carrier-grade NAT). There is
no "NAT type" here: a NAT is a record of independent axes, and a preset is a named record.
Every record checks itself when it is made and raises `ModelError`, which names the field.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum


class ModelError(ValueError):
    """The description of a network is wrong; the message names object, field and remedy.

    Attributes:
        where: the object and field, such as ``nat "home-a": lifetimes.udp_seconds``.
        problem: what is wrong there and what to do about it.
    """

    def __init__(self, where: str, problem: str) -> None:
        super().__init__(f"{where}: {problem}")
        self.where = where
        self.problem = problem


def suggest(name: str, known: Iterable[str]) -> str:
    """Return a sentence that names the known name nearest to `name`, or all of a short list."""
    choices = sorted(known)
    nearest = difflib.get_close_matches(name, choices, n=1, cutoff=0.5)
    if nearest:
        return f'did you mean "{nearest[0]}"?'
    if not choices:
        return "there are none"
    listed = ", ".join(choices[:12]) + (", ..." if len(choices) > 12 else "")
    return f"known names: {listed}"


class Mapping(StrEnum):
    """Which destinations share one external port of an inside socket (RFC 4787 section 4.1)."""

    EIM = "eim"  # endpoint-independent
    ADM = "adm"  # address-dependent
    APDM = "apdm"  # address-and-port-dependent


class Filtering(StrEnum):
    """Who may send in through a mapping (RFC 4787 section 5)."""

    EIF = "eif"  # anybody
    ADF = "adf"  # addresses that the inside socket has sent to
    APDF = "apdf"  # addresses and ports that the inside socket has sent to


class FilterScope(StrEnum):
    """What the set of permitted senders belongs to; the two differ only when mapping is not EIM."""

    MAPPING = "mapping"  # as in a flow table
    ENDPOINT = "endpoint"  # the inside address and port: the letter of RFC 4787 section 5


class PortAssignment(StrEnum):
    """How a new mapping gets its external port."""

    PRESERVE = "preserve"  # the inside port, or no mapping at all
    PRESERVE_ELSE_RANDOM = "preserve-else-random"
    CONTIGUOUS = "contiguous"  # the inside port, else the next free one above it
    RANDOM = "random"
    SEQUENTIAL = "sequential"  # one counter for the whole NAT, advancing by `step`
    HASH = "hash"  # a seeded hash of what the mapping depends on


class AtLimit(StrEnum):
    """What happens to a new mapping of a host that already has all it may have."""

    REFUSE = "refuse"  # the packet is dropped in silence
    EVICT_OLDEST = "evict-oldest"


class Pooling(StrEnum):
    """Which of several external addresses a new mapping gets (RFC 4787 REQ-2)."""

    PAIRED = "paired"  # one inside host stays on one external address
    ARBITRARY = "arbitrary"


class Hairpin(StrEnum):
    """What happens to a packet from inside to an external endpoint of the same NAT."""

    NONE = "none"
    INTERNAL = "internal"  # delivered, showing the sender's inside endpoint
    EXTERNAL = "external"  # delivered, showing the sender's external endpoint (REQ-9)


class Refresh(StrEnum):
    """Which packets renew a mapping's lifetime (RFC 4787 REQ-6)."""

    OUTBOUND = "outbound"
    BOTH = "both"


class Unsolicited(StrEnum):
    """The reaction to an inbound packet that no mapping lets in."""

    DROP = "drop"
    REJECT = "reject"  # ICMP port unreachable, for TCP as well
    RESET = "reset"  # TCP RST, for UDP ICMP port unreachable
    # Linux with an open INPUT chain: rejected, and the sender's flow then occupies the external
    # port, so that a later outbound flow to that very sender gets another one.
    ACCEPT = "accept"


class Translation(StrEnum):
    """Whether addresses and ports change at all."""

    NAPT = "napt"  # addresses and ports
    ONE_TO_ONE = "one-to-one"  # one external address per inside host, ports kept
    NONE = "none"  # a router with a stateful firewall


class Ipv6(StrEnum):
    """What the router does with IPv6."""

    NONE = "none"
    ROUTED = "routed"
    NPT = "npt"  # stateless prefix translation (RFC 6296)
    NAT66 = "nat66"  # the IPv4 axes, applied to IPv6


def _check_port(where: str, port: int) -> None:
    if not 1 <= port <= 65535:
        raise ModelError(where, f"{port} is not within 1-65535")


@dataclass(frozen=True, slots=True)
class PortRange:
    """External ports from `first` to `last`, both included."""

    first: int
    last: int

    def __post_init__(self) -> None:
        if not 1 <= self.first <= self.last <= 65535:
            raise ModelError(
                "port range", f"{self.first}-{self.last} is not within 1-65535 in rising order"
            )

    def __len__(self) -> int:
        return self.last - self.first + 1


@dataclass(frozen=True, slots=True, kw_only=True)
class PortAllocation:
    """Where external ports come from."""

    assignment: PortAssignment = PortAssignment.PRESERVE_ELSE_RANDOM
    ranges: tuple[PortRange, ...] = (PortRange(1024, 65535),)
    step: int = 1
    """Distance between two sequential ports; may be negative, never 0."""
    parity: bool = False
    """Even inside ports get even external ports, odd ones odd (RFC 4787 REQ-3, optional)."""
    block_size: int | None = None
    """Ports per inside host, cut from `ranges` in order of first appearance (RFC 7422)."""
    overloading: bool = False
    """Whether several inside sockets may share one external port towards different remote
    endpoints, as stock Linux does and RFC 4787 REQ-3 forbids."""
    preserved: tuple[int, ...] = ()
    """Inside ports that keep their number whatever `assignment` says (IPsec's 500)."""

    def __post_init__(self) -> None:
        if not self.ranges:
            raise ModelError("ports.ranges", "no external ports; give at least one range")
        if self.step == 0:
            raise ModelError("ports.step", "0 would hand out one port for ever; use 1 or more")
        for port in self.preserved:
            _check_port("ports.preserved", port)
        size = sum(map(len, self.ranges))
        if self.block_size is not None and not 1 <= self.block_size <= size:
            raise ModelError("ports.block_size", f"{self.block_size} is not within 1-{size}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Lifetimes:
    """How long a mapping lives without the packets that refresh it, in seconds."""

    udp_seconds: float = 120.0
    udp_unreplied_seconds: float | None = None
    """Until packets have gone both ways for more than 2 s (Linux: 30 s); None: `udp_seconds`."""
    udp_by_port: tuple[tuple[int, float], ...] = ()
    """(remote port, seconds): shorter or longer lives of mappings made for that port."""
    tcp_seconds: float = 7440.0
    tcp_transitory_seconds: float = 240.0
    icmp_seconds: float = 60.0

    def __post_init__(self) -> None:
        for name in ("udp_seconds", "tcp_seconds", "tcp_transitory_seconds", "icmp_seconds"):
            if getattr(self, name) <= 0:
                raise ModelError(f"lifetimes.{name}", "must be more than 0 seconds")
        if self.udp_unreplied_seconds is not None and self.udp_unreplied_seconds <= 0:
            raise ModelError("lifetimes.udp_unreplied_seconds", "must be more than 0 seconds")


@dataclass(frozen=True, slots=True, kw_only=True)
class TcpBehavior:
    """What a NAT does with TCP beyond its mapping and filtering (RFC 5382)."""

    simultaneous_open: bool = True
    """Whether an inbound bare SYN may pass a filter that is open for its sender (REQ-2)."""
    reset_after_idle: bool = False
    """Answer RST to an outbound segment that belongs to no mapping and is no SYN."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Firewall:
    """What a router lets its inside send out; None means every port."""

    udp_ports: tuple[int, ...] | None = None
    tcp_ports: tuple[int, ...] | None = None
    reject: bool = False
    """Answer what is not allowed (ICMP for UDP, RST for TCP) instead of dropping it."""
    block_stun: bool = False
    """Drop UDP payloads that carry STUN's magic cookie, as some inspection does."""
    captive_portal: bool = False
    """Nothing passes before the host has logged in; TCP is reset, UDP dropped."""

    def __post_init__(self) -> None:
        for name in ("udp_ports", "tcp_ports"):
            for port in getattr(self, name) or ():
                _check_port(f"firewall.{name}", port)


@dataclass(frozen=True, slots=True, kw_only=True)
class NatBehavior:
    """One NAT's behaviour: the record of the axes."""

    mapping: Mapping = Mapping.EIM
    filtering: Filtering = Filtering.APDF
    filter_scope: FilterScope = FilterScope.MAPPING
    ports: PortAllocation = PortAllocation()
    addresses: int = 1
    """External IPv4 addresses in the pool (with one-to-one translation: one per inside host)."""
    pooling: Pooling = Pooling.PAIRED
    hairpin: Hairpin = Hairpin.NONE
    lifetimes: Lifetimes = Lifetimes()
    refresh: Refresh = Refresh.BOTH
    unsolicited: Unsolicited = Unsolicited.DROP
    translation: Translation = Translation.NAPT
    max_mappings_per_host: int | None = None
    at_limit: AtLimit = AtLimit.REFUSE
    tcp: TcpBehavior = TcpBehavior()
    firewall: Firewall = Firewall()
    ipv6: Ipv6 = Ipv6.NONE
    ipv6_filtering: Filtering = Filtering.APDF
    """The stateful IPv6 firewall's rule (RFC 6092); EIF means open."""
    nat64: bool = False
    """The inside is IPv6-only and reaches IPv4 through 64:ff9b::/96 (RFC 6146)."""
    carrier: bool = False
    """Inside addresses come from 100.64.0.0/10 instead of 192.168.0.0/16."""

    def __post_init__(self) -> None:
        if not 1 <= self.addresses <= 4096:
            raise ModelError("addresses", f"{self.addresses} is not within 1-4096")
        if self.max_mappings_per_host is not None and self.max_mappings_per_host < 1:
            raise ModelError("max_mappings_per_host", "must be at least 1, or absent for no limit")
        if self.nat64 and self.ipv6 is not Ipv6.ROUTED:
            raise ModelError("nat64", 'the inside is IPv6-only, so ipv6 must be "routed"')
        if self.nat64 and self.translation is not Translation.NAPT:
            raise ModelError("nat64", 'translation must be "napt"')

    @property
    def class_name(self) -> str:
        """The RFC 4787 class, such as ``EIM+APDF``."""
        return f"{self.mapping.name}+{self.filtering.name}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """One direction of a link. Probabilities are 0 to 1 per packet."""

    delay_seconds: float = 0.0
    jitter_seconds: float = 0.0
    """Each packet's delay is drawn from `delay_seconds` plus or minus this."""
    reorder: bool = False
    """Whether jitter may let a packet overtake an earlier one."""
    loss: float = 0.0
    burst_probability: float = 0.0
    """Chance that a packet starts a bad period (Gilbert-Elliott, with a fixed length)."""
    burst_seconds: float = 0.2
    burst_loss: float = 1.0
    """Loss within a bad period; 1 is a blackout."""
    duplication: float = 0.0
    rate_bits_per_second: float | None = None
    queue_seconds: float = 0.05
    """What the queue in front of a limited rate can hold, as time at that rate."""
    mtu_bytes: int = 1500
    mtu_black_hole: bool = False
    """Drop what is too big in silence instead of answering "fragmentation needed"."""

    def __post_init__(self) -> None:
        for name in ("loss", "burst_probability", "burst_loss", "duplication"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ModelError(f"link.{name}", f"{getattr(self, name)} is not within 0-1")
        for name in ("delay_seconds", "jitter_seconds", "burst_seconds", "queue_seconds"):
            if getattr(self, name) < 0.0:
                raise ModelError(f"link.{name}", "must not be negative")
        if self.rate_bits_per_second is not None and self.rate_bits_per_second <= 0:
            raise ModelError("link.rate_bits_per_second", "must be more than 0, or absent")
        # 68 bytes is the smallest MTU of IPv4 (RFC 791).
        if not 68 <= self.mtu_bytes <= 65535:
            raise ModelError("link.mtu_bytes", f"{self.mtu_bytes} is not within 68-65535")
