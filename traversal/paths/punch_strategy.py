"""Which way to a direct path: a table over what is known of both NATs.

Path selection specification 21, NAT behaviours 8, netcheck specification 10.5. The side with the
hard NAT always opens the sockets, whichever end it is on: only then do chances grow with the
product of sockets and probes. Against a stock peer that is the hard one they do not, so that pair
stays on the relay.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from traversal.paths.candidates import is_local_scope
from traversal.paths.punch_facts import Strategy
from traversal.paths.report import NatFacts, PortPattern
from traversal.paths.verdict import can_punch
from traversal.wire.address import Address
from traversal.wire.introduction import FilteringClass, MappingClass

PLAIN_PATIENCE_SECONDS: Final = 1.5
"""Plain punching needs two to four round trips by the relay; where it works it is done by then."""
BLIND_PATIENCE_SECONDS: Final = 10.0
"""After this long plain punching counts as failed, whatever was known of both NATs (path selection
specification S1)."""
MAPPING_PATIENCE_SECONDS: Final = 2.0
"""For a router that speaks a port mapping protocol to answer; most do within 0.1 s."""


_UNKNOWN_NAT: Final = NatFacts()


@dataclass(frozen=True, slots=True)
class PunchPolicy:
    """What a node's owner allows towards one peer.

    `is_enabled` switches every guessing of ports off. `allows_stock` admits the search against
    peers that are not ours, which makes them send probes they did not agree to: 256 small packets
    to our own address in the usual case, 2048 in an hour at most. `max_sockets` (0 to 256) and
    `max_probes` (0 to 2500) lower the budgets.
    """

    is_enabled: bool = True
    allows_stock: bool = True
    max_sockets: int = 256
    max_probes: int = 2500


@dataclass(frozen=True, slots=True)
class OwnSide:
    """What this node knows of itself.

    `addresses` are its reflexive ones, `listed` all that an ordinary CallMeMaybe lists,
    `port_samples` public ports that its NAT gave out, `fingerprint` names the network it is in,
    `offers_mapping` says that the router speaks a port mapping protocol, and `lifetime_seconds` is
    the measured idle lifetime of a mapping, if it was measured.
    """

    nat: NatFacts = _UNKNOWN_NAT
    addresses: tuple[Address, ...] = ()
    listed: tuple[Address, ...] = ()
    port_samples: tuple[int, ...] = ()
    fingerprint: str = ""
    offers_mapping: bool = False
    lifetime_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class PeerSide:
    """What this node knows of the peer. `session` is that of its introduction, None for a peer
    that is not ours; `can_search` is its capability bit."""

    nat: NatFacts = _UNKNOWN_NAT
    addresses: tuple[Address, ...] = ()
    session: bytes | None = None
    can_search: bool = False

    @property
    def is_ours(self) -> bool:
        """Whether punch messages reach it."""
        return self.session is not None and self.can_search


@dataclass(frozen=True, slots=True)
class Choice:
    """A strategy, the reason as a sentence for people, how long plain punching goes first, and
    whether only the policy speaks against another strategy."""

    strategy: Strategy
    reason: str
    patience_seconds: float = 0.0
    is_forbidden: bool = False


def public_ipv4(addresses: Iterable[Address]) -> Address | None:
    """The first address that a far NAT can be reached at; hard NATs are a matter of IPv4."""
    for address in addresses:
        ip = address.ip
        is_nobody = ip.is_multicast or ip.is_reserved or ip.packed[0] == 0
        if not address.is_ipv6 and address.port and not is_local_scope(ip) and not is_nobody:
            return address
    return None


def is_far_source(source: Address | None) -> bool:
    """Whether a plan may name it as where the peer's datagrams come from; the port is of no matter.

    Never private addresses: a peer must not aim our probes at what only we can reach.
    """
    return source is not None and public_ipv4((Address(source.host, 1),)) is not None


def looks_easy(addresses: Iterable[Address]) -> bool:
    """Whether a stock peer's list speaks for an easy NAT.

    A stock node behind a hard NAT lists its public IP with several ports: each one that two
    servers saw, and its local port besides (path selection specification 7).
    """
    hosts: dict[str, set[int]] = {}
    for address in addresses:
        if not address.is_ipv6 and not is_local_scope(address.ip):
            hosts.setdefault(address.host, set()).add(address.port)
    return bool(hosts) and all(len(ports) == 1 for ports in hosts.values())


def choose(
    own: OwnSide,
    peer: PeerSide,
    policy: PunchPolicy,
    *,
    remembered: Strategy | None = None,
    was_mapping_tried: bool = False,
    has_plain_failed: bool = False,
) -> Choice:
    """The strategy for a pair. `remembered` is what led to a path before, from this network to
    this peer: then plain punching gets no head start."""
    plainly = can_punch(own.nat, peer.nat)
    if plainly and not has_plain_failed:
        return Choice(Strategy.PLAIN, "plain punching works for these NATs")
    if own.nat.is_udp_blocked or peer.nat.is_udp_blocked:
        return Choice(Strategy.RELAY, "a firewall blocks UDP on one side")
    if own.offers_mapping and not was_mapping_tried:
        return Choice(Strategy.PORT_MAPPING, "our router may map a port, which ends all guessing")
    if peer.session is not None and not peer.can_search:
        return Choice(Strategy.RELAY, "the port search is switched off on the peer's side")
    choice = _choose_for_ours(own, peer) if peer.is_ours else _choose_for_stock(own, peer)
    if choice.strategy is Strategy.RELAY:
        return choice
    if not policy.is_enabled:
        reason = "the port search is switched off for this peer"
        return Choice(Strategy.RELAY, reason, is_forbidden=True)
    if not (peer.is_ours or policy.allows_stock):
        reason = "the port search is not allowed with peers of another make"
        return Choice(Strategy.RELAY, reason, is_forbidden=True)
    if remembered is choice.strategy:
        return Choice(remembered, choice.reason)
    if choice.strategy is Strategy.PREDICTED and remembered is Strategy.BIRTHDAY_HARD:
        return Choice(remembered, "our NAT is hard, and its ports could not be predicted before")
    if plainly is None and peer.is_ours:
        return Choice(choice.strategy, choice.reason, PLAIN_PATIENCE_SECONDS)
    return choice


def _choose_for_ours(own: OwnSide, peer: PeerSide) -> Choice:
    ours, theirs = own.nat, peer.nat
    if ours.mapping is MappingClass.UNKNOWN:
        return Choice(Strategy.RELAY, "our NAT is not known yet, so nothing can be planned")
    if theirs.mapping is MappingClass.UNKNOWN:
        return Choice(Strategy.ASK, "the peer must say what its NAT is like")
    if ours.is_hard and theirs.is_hard:
        return _choose_for_hard_pair(ours, theirs)
    if not ours.is_hard and not theirs.is_hard:
        return Choice(
            Strategy.RELAY, "both NATs are easy, so no port is in doubt: a firewall is in the way"
        )
    if not ours.is_hard:
        return Choice(Strategy.BIRTHDAY_EASY, "the peer's NAT is hard and ours easy: we probe")
    if ours.ports.pattern in (PortPattern.SEQUENTIAL, PortPattern.PRESERVING):
        pattern = ours.ports.pattern.value
        return Choice(Strategy.PREDICTED, f"our NAT is hard, but its ports are {pattern}")
    return Choice(Strategy.BIRTHDAY_HARD, "our NAT is hard and the peer's easy: we open sockets")


def _choose_for_hard_pair(ours: NatFacts, theirs: NatFacts) -> Choice:
    for side, whose in ((ours, "our"), (theirs, "the peer's")):
        if side.ports.pattern in (PortPattern.RANDOM, PortPattern.PRESERVING):
            return Choice(
                Strategy.RELAY,
                f"both NATs are hard and {whose} ports can't be predicted: 64 000 probes from "
                "either side would meet in two of three cases only",
            )
    if ours.ports.pattern is PortPattern.UNKNOWN:
        return Choice(Strategy.RELAY, "both NATs are hard and how ours picks ports is not known")
    if theirs.ports.pattern is PortPattern.UNKNOWN:
        return Choice(Strategy.ASK, "both NATs are hard; the peer must say how its picks ports")
    return Choice(Strategy.MUTUAL, "both NATs are hard, and both pick ports in order")


def _choose_for_stock(own: OwnSide, peer: PeerSide) -> Choice:
    if not own.nat.is_hard:
        return Choice(
            Strategy.RELAY,
            "a peer of another make behind a hard NAT probes from one port only, which gains "
            "nothing by guessing",
        )
    if peer.nat.is_hard:
        return Choice(Strategy.RELAY, "both NATs are hard and the peer is of another make")
    is_known = peer.nat.mapping in (MappingClass.NONE, MappingClass.ENDPOINT_INDEPENDENT)
    reason = "our NAT is hard; the peer probes the ports that our CallMeMaybe lists"
    if is_known and peer.nat.filtering is not FilteringClass.UNKNOWN:
        return Choice(Strategy.INDUCED, reason)
    if is_known or looks_easy(peer.addresses):
        return Choice(Strategy.INDUCED, reason, PLAIN_PATIENCE_SECONDS)
    return Choice(
        Strategy.RELAY,
        "our NAT is hard, and the peer, of another make, lists no public address or several "
        "ports of one, as nodes behind a hard NAT do",
    )
