"""Which engine translates: nftables in the kernel, or the lab's own NAT on a TUN device. Pure.

Two NATs of one RFC 5780 class can still traverse differently: conntrack keys everything by flow,
so that a packet let in by a DNAT map makes a flow of its own, and address-dependent mapping with
open filtering comes out wrong although it classifies right. The kernel is used where it is
faithful to the model, the model's own NAT everywhere else.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from netlab.behavior import (
    Filtering,
    FilterScope,
    Hairpin,
    Mapping,
    NatBehavior,
    Pooling,
    PortAssignment,
    PortRange,
    Refresh,
    Translation,
    Unsolicited,
)

# Where Linux takes ephemeral ports from. An external range that overlaps it preserves ports.
_EPHEMERAL_PORTS = range(32768, 61000)
_ALL_PORTS = (PortRange(1024, 65535),)
_PRESERVING = (
    PortAssignment.PRESERVE,
    PortAssignment.PRESERVE_ELSE_RANDOM,
    PortAssignment.CONTIGUOUS,
)


class Engine(StrEnum):
    """What translates packets."""

    NFT = "nft"
    USER = "user"


@dataclass(frozen=True, slots=True)
class Fidelity:
    """The engine for one NAT, and what nftables can't do faithfully there (none: nftables)."""

    engine: Engine
    reasons: tuple[str, ...]


def choose_engine(behavior: NatBehavior, inside_machines: int) -> Fidelity:
    """Choose the engine for a NAT with so many machines directly inside it.

    A single machine never asks twice for one port, so nftables' overloading can't show there.
    """
    reasons = tuple(_nft_shortcomings(behavior, inside_machines))
    return Fidelity(Engine.USER if reasons else Engine.NFT, reasons)


def _nft_shortcomings(behavior: NatBehavior, inside_machines: int) -> Iterator[str]:
    if behavior.nat64:
        yield "no translation between IPv6 and IPv4"
    yield from _lifetime_shortcomings(behavior)
    if behavior.translation is Translation.NONE:
        return
    if behavior.filter_scope is FilterScope.ENDPOINT and behavior.mapping is not Mapping.EIM:
        yield "filters are per flow, not per inside endpoint"
    if behavior.hairpin is not Hairpin.NONE and behavior.mapping is not Mapping.EIM:
        yield "a hairpinned packet would not get an external port of its own"
    if behavior.translation is Translation.ONE_TO_ONE:
        return
    yield from _mapping_shortcomings(behavior)
    yield from _port_shortcomings(behavior, inside_machines)


def _lifetime_shortcomings(behavior: NatBehavior) -> Iterator[str]:
    lifetimes = behavior.lifetimes
    seconds = [
        lifetimes.udp_seconds,
        lifetimes.tcp_seconds,
        lifetimes.tcp_transitory_seconds,
        lifetimes.icmp_seconds,
        lifetimes.udp_unreplied_seconds or 1.0,
        *(value for _, value in lifetimes.udp_by_port),
    ]
    if any(value != int(value) for value in seconds):
        yield "timers have whole seconds"
    if behavior.refresh is not Refresh.BOTH:
        yield "inbound packets renew every flow"
    if (
        behavior.filtering is not Filtering.APDF
        and lifetimes.udp_unreplied_seconds not in (None, lifetimes.udp_seconds)
    ) or (behavior.filtering is not Filtering.APDF and lifetimes.udp_by_port):
        yield "the map of open ports has one timer"


def _mapping_shortcomings(behavior: NatBehavior) -> Iterator[str]:
    mapping, assignment = behavior.mapping, behavior.ports.assignment
    if mapping is not Mapping.EIM:
        if behavior.filtering is not Filtering.APDF:
            yield f"{behavior.class_name} classifies right but traverses wrong"
        if behavior.unsolicited is Unsolicited.ACCEPT:
            yield "the early packet's effect is proven for endpoint-independent mapping only"
    faithful = {
        Mapping.EIM: (*_PRESERVING, PortAssignment.RANDOM),
        Mapping.ADM: (PortAssignment.HASH,),
        Mapping.APDM: (PortAssignment.RANDOM, PortAssignment.HASH),
    }
    if assignment not in faithful[mapping]:
        yield f"{mapping.name} with {assignment} ports"


def _port_shortcomings(behavior: NatBehavior, inside_machines: int) -> Iterator[str]:
    ports = behavior.ports
    if len(ports.ranges) > 1:
        yield "several external port ranges"
    elif ports.assignment is PortAssignment.RANDOM and behavior.mapping is Mapping.EIM:
        ours = range(ports.ranges[0].first, ports.ranges[0].last + 1)
        if ours.start < _EPHEMERAL_PORTS.stop and _EPHEMERAL_PORTS.start < ours.stop:
            yield "random endpoint-independent ports in a range that inside ports are in"
    elif ports.assignment in _PRESERVING and ports.ranges != _ALL_PORTS:
        yield f"{ports.assignment} ports in a limited range"
    if ports.assignment in _PRESERVING and not ports.overloading and inside_machines > 1:
        yield "several inside machines may get one external port"
    if ports.parity:
        yield "port parity"
    if ports.block_size is not None:
        yield "port blocks"
    if behavior.max_mappings_per_host is not None:
        yield "a limit of mappings per host"
    if behavior.addresses > 1 and behavior.pooling is Pooling.ARBITRARY:
        yield "arbitrary pooling per mapping"
    if behavior.addresses > 1 and behavior.hairpin is Hairpin.EXTERNAL:
        yield "hairpinning with several external addresses"
