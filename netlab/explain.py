"""Why could two hosts not talk: mappings, filters, drops, changes joined into an answer. Pure."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from collections.abc import Mapping as ReadOnlyDict
from dataclasses import dataclass

from netlab.addresses import plan_addresses
from netlab.drops import DropReason
from netlab.model import Topology
from netlab.timeline import (
    Event,
    MappingBorn,
    MappingDied,
    NetworkChanged,
    PacketDelivered,
    PacketDropped,
    PacketSent,
    PathChanged,
)

_ENDPOINT = re.compile(r"(?:\[[0-9a-f:.]+\]|\b\d+\.\d+\.\d+\.\d+):\d+")


@dataclass(frozen=True, slots=True, kw_only=True)
class Loss:
    """All drops of one direction for one reason at one place."""

    where: str
    reason: DropReason
    count: int
    first: PacketDropped
    last: PacketDropped


@dataclass(frozen=True, slots=True, kw_only=True)
class Direction:
    """What became of the packets of one host towards the other."""

    sender: str
    receiver: str
    sent: int
    delivered: int
    last_delivery: PacketDelivered | None
    losses: tuple[Loss, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """Everything on the timeline that bears on two hosts."""

    directions: tuple[Direction, Direction]
    mappings: tuple[MappingBorn | MappingDied, ...]
    """At the NATs that either host is behind."""
    changes: tuple[NetworkChanged, ...]
    paths: tuple[PathChanged, ...]
    names: ReadOnlyDict[str, str]
    """Address -> the object that owns it."""

    @property
    def text(self) -> str:
        """One answer for a person, a sentence per line."""
        lines = [line for direction in self.directions for line in _direction_lines(direction)]
        for change in self.changes:
            detail = f" ({change.detail})" if change.detail else ""
            lines.append(f"At {change.at:.3f} s: {change.what} of {change.target}{detail}.")
        lines += [
            f"At {path.at:.3f} s {path.host} reached {path.peer} by {path.path}."
            for path in self.paths[-4:]
        ]
        return _ENDPOINT.sub(self._name, "\n".join(lines))

    def _name(self, match: re.Match[str]) -> str:
        """Put the owner's name beside an endpoint."""
        owner = self.names.get(match[0].rpartition(":")[0].strip("[]"))
        return f"{owner} ({match[0]})" if owner is not None else match[0]


def explain(topology: Topology, events: Iterable[Event], a: str, b: str) -> Explanation:
    """Join what a timeline knows about the packets between two hosts.

    A packet counts as going to the other host when it was addressed to one of that host's own
    addresses or to an external endpoint that one of its NATs has mapped, or arrived there.

    Raises:
        KeyError: a host is not in the topology.
    """
    events = list(events)
    nats = {name: _nats_of(topology, name) for name in (a, b)}
    owners = _endpoint_owners(events, a, b, nats)
    directions = tuple(
        _direction(events, sender, receiver, owners) for sender, receiver in ((a, b), (b, a))
    )
    around = nats[a] | nats[b]
    return Explanation(
        directions=(directions[0], directions[1]),
        mappings=tuple(
            e for e in events if isinstance(e, MappingBorn | MappingDied) and e.nat in around
        ),
        changes=tuple(
            e for e in events if isinstance(e, NetworkChanged) and e.target in around | {a, b}
        ),
        paths=tuple(e for e in events if isinstance(e, PathChanged) and {e.host, e.peer} == {a, b}),
        names=_names(topology),
    )


def _names(topology: Topology) -> dict[str, str]:
    """Return who has which address; inside addresses that two LANs share are left out."""
    plan = plan_addresses(topology)
    pairs = [(str(x), name) for name, p in plan.servers.items() for x in (*p.ipv4, *p.ipv6)]
    pairs += [(str(x), name) for name, nat in plan.nats.items() for x in nat.outside.ipv4]
    pairs += [
        (str(x), name) for name, ps in plan.hosts.items() for p in ps for x in (*p.ipv4, *p.ipv6)
    ]
    shared = Counter(address for address, _ in pairs)
    return {address: name for address, name in pairs if shared[address] == 1}


def _nats_of(topology: Topology, host: str) -> frozenset[str]:
    uplinks = topology.host_by_name[host].uplinks
    return frozenset(
        nat.name for up in uplinks for nat in topology.nats_towards_internet(up.network)
    )


def _endpoint_owners(
    events: list[Event], a: str, b: str, nats: dict[str, frozenset[str]]
) -> dict[str, str]:
    """Return external and own endpoints -> the host of the two that they lead to."""
    owners: dict[str, str] = {}
    for event in events:
        if isinstance(event, PacketSent) and event.host in (a, b):
            owners[event.source] = event.host
        elif isinstance(event, MappingBorn):
            # Innermost first: an outer NAT's inside endpoint is an inner one's external one.
            owner = owners.get(event.inside)
            if owner is not None and event.nat in nats[owner]:
                owners[event.external] = owner
    return owners


def _direction(
    events: list[Event], sender: str, receiver: str, owners: dict[str, str]
) -> Direction:
    addresses = {_address(endpoint) for endpoint, owner in owners.items() if owner == receiver} - {
        _address(endpoint) for endpoint, owner in owners.items() if owner == sender
    }
    sent: dict[int, PacketSent] = {}
    delivered: list[PacketDelivered] = []
    dropped: list[PacketDropped] = []
    for event in events:
        if isinstance(event, PacketSent):
            if event.host == sender and (
                owners.get(event.destination) == receiver
                or _address(event.destination) in addresses
            ):
                sent[event.packet] = event
        elif isinstance(event, PacketDelivered):
            if event.packet in sent and event.host == receiver:
                delivered.append(event)
        elif isinstance(event, PacketDropped) and event.packet in sent:
            dropped.append(event)
    groups = Counter((drop.where, drop.reason) for drop in dropped)
    losses = []
    for (where, reason), count in groups.most_common():
        of_group = [drop for drop in dropped if (drop.where, drop.reason) == (where, reason)]
        losses.append(
            Loss(where=where, reason=reason, count=count, first=of_group[0], last=of_group[-1])
        )
    return Direction(
        sender=sender,
        receiver=receiver,
        sent=len(sent),
        delivered=len({event.packet for event in delivered}),
        last_delivery=delivered[-1] if delivered else None,
        losses=tuple(losses),
    )


def _address(endpoint: str) -> str:
    return endpoint.rpartition(":")[0]


def _direction_lines(direction: Direction) -> list[str]:
    d = direction
    if not d.sent:
        return [f"{d.sender} sent nothing to {d.receiver}."]
    lines = [f"{d.sender} sent {d.sent} packets to {d.receiver}; {d.delivered} arrived."]
    for loss in d.losses:
        last = loss.last
        times = f", {loss.count} times" if loss.count > 1 else ""
        lines.append(
            f"{d.sender}'s packet {last.packet} from {last.source} to {last.destination} was "
            f"dropped at {loss.where} at {last.at:.3f} s{times}: {last.text}."
        )
    return lines
