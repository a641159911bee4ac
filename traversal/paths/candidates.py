"""The addresses at which a peer may be reachable: where each comes from, when it goes again.

Three sources (path selection specification 4):

* configured: from a control plane or an introduction; stays until the next list lacks it;
* called: from a CallMeMaybe; stays until the next CallMeMaybe lacks it;
* seen: a valid Ping came from there; stays for 45 s after the last one, or the last answer.

Growth is bounded three ways. A CallMeMaybe may be of any length (the format has no cap, stock nodes
accept any, and path selection specification P3 says accept it), but only its first 64 usable
addresses become candidates: the list is in the sender's order of preference, honest ones have
fewer than 20, and each further one would only let an authenticated peer aim more of our
pings at strangers (disco specification 9.2). All of those 64 are pinged, paced at 100 a second.
Configured lists are cut alike. Seen addresses are pruned, oldest first, beyond 100 candidates,
since a recorded Ping can be replayed from forged sources.
"""

from __future__ import annotations

import ipaddress
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Final

from traversal.paths.loss import LossWindow
from traversal.paths.nat64 import WELL_KNOWN_PREFIX, translate
from traversal.paths.scoring import EDGE_HOST, Measured, Path
from traversal.wire.address import Address, IPAddress, is_private, is_shared
from traversal.wire.disco import RELAY_REGION_HOST

IPNetwork = ipaddress.IPv4Network | ipaddress.IPv6Network

SEEN_LIFETIME_SECONDS: Final = 45.0
MAX_LISTED: Final = 64
MAX_CANDIDATES: Final = 100
LATENCY_SAMPLES: Final = 3
LATENCY_LIFETIME_SECONDS: Final = 15.0
"""A path that was measured an hour ago, when the network was idle, is not compared by that with one
that is measured all the time: traffic would go back and forth with every change of load."""
PONG_RATE: Final = 20.0
PONG_BURST: Final = 40.0
"""Pongs per source address: a stock node sends at most six Pings at once (path MTU), 20 a second
is twice what the specification calls generous (disco specification D12)."""
DEFAULT_RTT_SECONDS: Final = 0.2
"""Assumed for time-outs before anything was measured; most of the Internet is nearer."""


@dataclass(frozen=True, slots=True)
class LocalNetworks:
    """What this node knows about its own addresses.

    `networks` are the prefixes of its interfaces (empty: unknown), `public_ips` the addresses that
    others see it by, `allowed` the only ranges to be pinged (empty: all), `excluded` ranges never
    to be pinged (the overlay's own). `nat64_prefixes`
    are set where there is a route for IPv6 and none for IPv4: a peer's IPv4 addresses are then
    tried through them.
    """

    networks: tuple[IPNetwork, ...] = ()
    public_ips: frozenset[str] = frozenset()
    allowed: tuple[IPNetwork, ...] = ()
    excluded: tuple[IPNetwork, ...] = ()
    has_ipv4: bool = True
    has_ipv6: bool = True
    nat64_prefixes: tuple[ipaddress.IPv6Network, ...] = ()


def is_usable(address: Address, local: LocalNetworks) -> bool:
    """Whether an address that somebody told us may be pinged at all."""
    ip = address.ip
    if address.port == 0 or ip.is_unspecified or ip.is_multicast:
        return False
    if ip.is_reserved and ip not in WELL_KNOWN_PREFIX:
        return False
    if ip.version == 4:
        # 240/4 counts as reserved above and holds the broadcast address; 0/8 is "this network".
        is_fictitious = address.host in (RELAY_REGION_HOST, EDGE_HOST)
        if not local.has_ipv4 or ip.packed[0] == 0 or is_fictitious:
            return False
    elif not local.has_ipv6 or ip.is_link_local:
        return False
    if local.allowed and not any(ip in network for network in local.allowed):
        return False
    return not any(ip in network for network in local.excluded)


def is_local_scope(ip: IPAddress) -> bool:
    """Whether an address means something only inside some site or host."""
    return is_private(ip) or ip.is_link_local or ip.is_loopback or is_shared(ip)


@dataclass(slots=True, eq=False)
class Candidate:
    """One path to a peer and everything known about it. Times are monotonic seconds."""

    path: Path
    is_configured: bool = False
    called_at: float | None = None
    seen_at: float = -math.inf
    last_ping_id: bytes = b""
    pinged_at: float = -math.inf
    pinged_back_at: float = -math.inf
    answered_at: float = -math.inf
    latencies: tuple[float, ...] = ()
    loss: LossWindow = field(default_factory=LossWindow)
    shelved_at: float | None = None
    wire_mtu_bytes: int = 0
    pong_budget: float = 0.0
    pong_budget_at: float = -math.inf

    @property
    def is_shelved(self) -> bool:
        """Whether traffic left this path because it loses too much."""
        return self.shelved_at is not None

    @property
    def latency_seconds(self) -> float:
        """The least of the last three round trips; 0.0 when there was none."""
        return min(self.latencies, default=0.0)

    @property
    def patient_rtt_seconds(self) -> float:
        """The greatest of the last three round trips: what a time-out must allow for."""
        return max(self.latencies, default=DEFAULT_RTT_SECONDS)

    def note_latency(self, seconds: float, now: float) -> None:
        """A Pong came after so long; call this before `answered_at` is set."""
        if now - self.answered_at > LATENCY_LIFETIME_SECONDS:
            self.latencies = ()
        self.latencies = (*self.latencies, seconds)[-LATENCY_SAMPLES:]

    def measured(self) -> Measured:
        """For comparison with another."""
        return Measured(self.path, self.latency_seconds, self.wire_mtu_bytes)

    def take_pong(self, now: float) -> bool:
        """Whether a Pong may be sent here now, within the rate that one source gets."""
        earned = (now - self.pong_budget_at) * PONG_RATE
        self.pong_budget = min(PONG_BURST, self.pong_budget + earned)
        self.pong_budget_at = now
        if self.pong_budget < 1:
            return False
        self.pong_budget -= 1
        return True

    def forget_dynamics(self) -> None:
        """After our own address or route changed: what was measured is void. Who vouches for the
        candidate, and when the peer last pinged from there, stays known."""
        self.pinged_at = self.pinged_back_at = self.answered_at = -math.inf
        self.latencies = ()
        self.loss.clear()
        self.shelved_at = None
        self.wire_mtu_bytes = 0


class CandidateBook:
    """The direct candidates of one peer."""

    def __init__(self) -> None:
        self._by_address: dict[Address, Candidate] = {}

    def __iter__(self) -> Iterator[Candidate]:
        return iter(list(self._by_address.values()))

    def __len__(self) -> int:
        return len(self._by_address)

    def __contains__(self, candidate: Candidate) -> bool:
        return self._by_address.get(candidate.path.address) is candidate

    def get(self, address: Address) -> Candidate | None:
        """The candidate at `address`, if it is one."""
        return self._by_address.get(address)

    def set_configured(self, addresses: Iterable[Address], local: LocalNetworks) -> list[Candidate]:
        """Replace the configured list; the new candidates among it are returned."""
        wanted = _first_usable(addresses, local)
        for candidate in self:
            candidate.is_configured = candidate.path.address in wanted
        fresh = [self._add(address) for address in wanted if address not in self._by_address]
        for candidate in fresh:
            candidate.is_configured = True
        return fresh

    def set_called(self, addresses: Iterable[Address], local: LocalNetworks, now: float) -> None:
        """Replace the list of the last CallMeMaybe.

        What only or also the previous CallMeMaybe had listed, and this one lacks, is removed,
        whatever other source it had: the peer says it is not there any more.
        """
        wanted = _first_usable(addresses, local)
        for candidate in self:
            if candidate.called_at is not None and candidate.path.address not in wanted:
                del self._by_address[candidate.path.address]
        for address in wanted:
            self._add(address).called_at = now

    def see(self, address: Address, now: float) -> tuple[Candidate, bool]:
        """Note a valid Ping from `address`; also tells whether it is a new candidate."""
        is_new = address not in self._by_address
        candidate = self._add(address)
        candidate.seen_at = now
        return candidate, is_new

    def prune(self, now: float, keep: Candidate | None = None) -> None:
        """Drop what no source vouches for any more, and the oldest seen ones above the cap."""
        for candidate in self:
            if candidate.is_configured or candidate.called_at is not None:
                continue
            last_sign = max(candidate.seen_at, candidate.answered_at)
            if candidate is not keep and now - last_sign > SEEN_LIFETIME_SECONDS:
                del self._by_address[candidate.path.address]
        excess = len(self) - MAX_CANDIDATES
        if excess > 0:
            only_seen = [
                candidate
                for candidate in self
                if not candidate.is_configured
                and candidate.called_at is None
                and candidate is not keep
            ]
            only_seen.sort(key=lambda candidate: candidate.seen_at)
            for candidate in only_seen[:excess]:
                del self._by_address[candidate.path.address]

    def in_scope(self, local: LocalNetworks) -> list[Candidate]:
        """The candidates that make sense from here (path selection specification P10).

        A private address is left out when no interface of ours is in its network and the peer is
        not behind our own public address; one that a Ping came from always makes sense. The
        caller tries all of them when these do not work.
        """
        if not local.networks:
            return list(self)
        shares_site = any(candidate.path.address.host in local.public_ips for candidate in self)
        chosen = []
        for candidate in self:
            ip = candidate.path.address.ip
            if (
                candidate.seen_at != -math.inf
                or shares_site
                or not is_local_scope(ip)
                or any(ip in network for network in local.networks)
            ):
                chosen.append(candidate)
        return chosen

    def _add(self, address: Address) -> Candidate:
        candidate = self._by_address.get(address)
        if candidate is None:
            candidate = self._by_address[address] = Candidate(Path(address))
        return candidate


def _first_usable(addresses: Iterable[Address], local: LocalNetworks) -> dict[Address, None]:
    usable: dict[Address, None] = {}
    for address in translate(addresses, local.nat64_prefixes):
        if is_usable(address, local):
            usable[address] = None
            if len(usable) == MAX_LISTED:
                break
    return usable
