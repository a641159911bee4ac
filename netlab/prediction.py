"""What simple hole punching should come to between two places of a topology. Pure.

NATs in series compose: the most dependent mapping and the most restrictive filtering of all of
them. Behind a NAT that both sides share, their public addresses only help if it hairpins.
"""

from __future__ import annotations

from netlab.behavior import (
    Filtering,
    Hairpin,
    Mapping,
    ModelError,
    NatBehavior,
    Pooling,
    suggest,
)
from netlab.model import Nat, Topology
from netlab.punch import Outcome, expected_outcome

_MAPPINGS, _FILTERINGS = tuple(Mapping), tuple(Filtering)


def simple_path(outcome: Outcome) -> str:
    """Return the kind of path that simple punching ends with: ``direct`` or ``relay``."""
    return "direct" if outcome is Outcome.DIRECT else "relay"


def nats_around(topology: Topology, name: str) -> tuple[Nat, ...]:
    """Return the NATs between a host, server or NAT and the internet, innermost first.

    Raises:
        ModelError: nothing has this name.
    """
    if name in topology.nat_by_name:
        return topology.nats_towards_internet(name)
    if name in topology.server_by_name:
        return ()
    if name in topology.host_by_name:
        return topology.nats_towards_internet(topology.host_by_name[name].uplinks[0].network)
    known = [*topology.host_by_name, *topology.server_by_name, *topology.nat_by_name]
    raise ModelError(f'"{name}"', f"nothing is called so; {suggest(name, known)}")


def predict_outcome(topology: Topology, left: str, right: str) -> Outcome:
    """Return what punching between two hosts, or from behind two NATs, needs.

    Raises:
        ModelError: a name is unknown.
    """
    chains = [nats_around(topology, name) for name in (left, right)]
    if any(_blocks_udp(nat.behavior) for chain in chains for nat in chain):
        return Outcome.RELAY
    shared = [nat for nat in chains[0] if nat in chains[1]]
    if shared:
        if shared[0].behavior.hairpin is Hairpin.NONE:
            return Outcome.RELAY
        # Packets turn around at the innermost shared NAT, through which both have mappings.
        chains = [chain[: chain.index(shared[0]) + 1] for chain in chains]
    classes = [combined_class([nat.behavior for nat in chain]) for chain in chains]
    return expected_outcome(*classes)


def combined_class(behaviors: list[NatBehavior]) -> str:
    """Return the class of NATs in series; of none, that of a public host."""
    mapping, filtering = 0, 0
    for behavior in behaviors:
        one, other = behavior.mapping, behavior.filtering
        is_arbitrary = behavior.addresses > 1 and behavior.pooling is Pooling.ARBITRARY
        if is_arbitrary and one is not Mapping.EIM:
            # Not even the address of the next mapping is known beforehand.
            one, other = Mapping.APDM, Filtering.APDF
        mapping = max(mapping, _MAPPINGS.index(one))
        filtering = max(filtering, _FILTERINGS.index(other))
    return f"{_MAPPINGS[mapping].name}+{_FILTERINGS[filtering].name}"


def _blocks_udp(behavior: NatBehavior) -> bool:
    firewall = behavior.firewall
    return firewall.udp_ports is not None or firewall.captive_portal
