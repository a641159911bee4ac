"""One NAT: mappings, filters, hairpin and timers as a sans-IO object. Pure.

A `Translator` sees flows, not bytes: protocol and four address parts in, the translated parts or
a `Drop` out. The simulated internet calls it with its packet objects, the TUN engine with the
fields of raw headers. For ICMP echo the identifier stands for the inside port and 0 for the
remote one.

Order of calls: `outbound` and `inbound` per packet, in the order of their `now`; `on_time(now)`
at `next_deadline()` or later, which only makes deaths of mappings punctual on the event stream:
an expired mapping never translates anything.

How filters age (not settled by RFC 4787): every remote endpoint that a mapping was used for has
its own timer, as in a flow table, and a mapping lives as long as its youngest one.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from netlab.behavior import (
    AtLimit,
    Filtering,
    FilterScope,
    Hairpin,
    Mapping,
    NatBehavior,
    Pooling,
    Refresh,
    Translation,
    Unsolicited,
)
from netlab.drops import Address, Answer, Drop, DropReason, Endpoint
from netlab.nat.flow import Protocol, TcpFlag, Translated, Verdict
from netlab.nat.ports import PortAllocator
from netlab.nat.table import External, Mapped, MappingKey, MappingTable
from netlab.timeline import MappingBorn, MappingDied

# Linux makes a UDP flow long-lived when packets go both ways and it is older than this.
_STREAM_AFTER_SECONDS = 2.0

# Remote endpoints remembered per mapping. More only fit a port scan from inside; the oldest
# permission goes first, as in a router whose flow table is full.
_MAX_REMOTES = 65_536

# Occupied tuples (`Unsolicited.ACCEPT`) come from strangers, so their number is bounded.
_MAX_OCCUPIED = 4096

# Linux's life of a flow that was never answered, which is what an accepted stranger has.
_OCCUPIED_SECONDS = 30.0


class Translator:
    """The state of one NAT for one address family.

    Args:
        behavior: the axes.
        external: the external address pool; empty for a router that translates nothing.
        generator: decides every random port and address.
        name: how events call this NAT.
        on_event: gets `MappingBorn` and `MappingDied`.
        inside_hosts: inside addresses in order, each of which gets its own external address
            beforehand where translation is one-to-one; other hosts get theirs on first use.
    """

    def __init__(
        self,
        behavior: NatBehavior,
        external: Sequence[Address],
        *,
        generator: random.Random,
        name: str = "nat",
        on_event: Callable[[MappingBorn | MappingDied], None] | None = None,
        inside_hosts: Sequence[Address] = (),
    ) -> None:
        if not external and behavior.translation is not Translation.NONE:
            raise ValueError("a NAT that translates needs at least one external address")
        self.behavior = behavior
        self._generator = generator
        self._allocator = PortAllocator(behavior.ports, generator)
        self._inside_hosts = tuple(inside_hosts)
        self._lifetime_by_port = dict(behavior.lifetimes.udp_by_port)
        self._by_mapping = behavior.filter_scope is FilterScope.MAPPING
        self._table = MappingTable(
            permits_of_endpoint=not self._by_mapping, name=name, on_event=on_event
        )
        self._occupied: dict[tuple[int, Address, int, Address, int], float] = {}
        self._pairs: dict[Address, Address] = {}
        # What the packet path asks about on every packet.
        self._translates = behavior.translation is not Translation.NONE
        self._napt = behavior.translation is Translation.NAPT
        self._mapping = behavior.mapping if self._napt else Mapping.EIM
        self._filtering = behavior.filtering
        self._refresh_inbound = behavior.refresh is Refresh.BOTH
        self._shares_ports = behavior.ports.overloading and self._napt
        self._remotes_are_permits = self._filtering is Filtering.APDF and self._by_mapping
        self._two_stages = behavior.lifetimes.udp_unreplied_seconds is not None
        self._may_split = self._shares_ports or behavior.unsolicited is Unsolicited.ACCEPT
        self._set_external(external)

    # --- packets -------------------------------------------------------------------------

    def outbound(
        self,
        protocol: int,
        source: Address,
        source_port: int,
        destination: Address,
        destination_port: int,
        now: float,
        tcp_flags: int = 0,
    ) -> Verdict:
        """Translate a packet from inside; a hairpinned one comes back with `to_inside`."""
        if destination in self._external:
            return self._hairpin(
                protocol, source, source_port, destination, destination_port, now, tcp_flags
            )
        entry = self._use(
            protocol, source, source_port, destination, destination_port, now, tcp_flags
        )
        if isinstance(entry, Drop):
            return entry
        return Translated(entry.external, entry.external_port, destination, destination_port, False)

    def inbound(
        self,
        protocol: int,
        source: Address,
        source_port: int,
        destination: Address,
        destination_port: int,
        now: float,
        tcp_flags: int = 0,
    ) -> Verdict:
        """Translate a packet that arrived from outside, or drop it."""
        external = (protocol, destination, destination_port)
        entries = self._table.by_external.get(external)
        if entries is not None:
            for entry in entries:
                if entry.expires <= now:
                    continue
                remote = (source, source_port)
                if self._permits(entry, remote, now):
                    if protocol == 6 and self._is_refused_syn(tcp_flags):
                        return Drop(DropReason.SYN_FILTERED)
                    if not entry.replied:
                        entry.replied = True
                    if protocol == 6:
                        self._track_tcp(entry, tcp_flags, now)
                    if self._refresh_inbound:
                        self._refresh(entry, remote, now)
                    return Translated(source, source_port, entry.inside, entry.inside_port, True)
        return self._refuse(external, (source, source_port), now)

    def inside_of(self, protocol: int, external: Address, port: int, now: float) -> Endpoint | None:
        """Return the inside endpoint behind an external one, for ICMP errors from outside."""
        entry = self._table.live((protocol, external, port), now)
        return None if entry is None else (entry.inside, entry.inside_port)

    def external_of(
        self, protocol: int, inside: Address, port: int, remote: Endpoint, now: float
    ) -> Endpoint | None:
        """Return the external endpoint that `remote` knows, for ICMP errors from inside."""
        entry = self._table.by_inside.get(self._key(protocol, inside, port, *remote))
        while entry is not None:
            if entry.expires > now:
                return entry.external, entry.external_port
            entry = entry.older
        return None

    # --- commands ------------------------------------------------------------------------

    def reboot(self, now: float) -> None:
        """Forget every mapping, filter, block and hash seed."""
        self._clear("reboot", now)
        self._allocator.forget()

    def renumber(self, external: Sequence[Address], now: float) -> None:
        """Replace the external addresses; every mapping on the old ones dies."""
        self._clear("renumbered", now)
        self._set_external(external)

    # --- time ----------------------------------------------------------------------------

    def next_deadline(self) -> float | None:
        """Return when the next mapping may have expired."""
        return self._table.next_deadline()

    def on_time(self, now: float) -> None:
        """Bury the mappings that have expired by `now`."""
        self._table.on_time(now)

    @property
    def mapping_count(self) -> int:
        """How many mappings the table holds, expired ones included until `on_time`."""
        return len(self._table)

    def external_endpoints(self, now: float) -> list[External]:
        """Return (protocol, address, port) of every live mapping."""
        return self._table.external_endpoints(now)

    # --- outbound ------------------------------------------------------------------------

    def _key(
        self, protocol: int, inside: Address, port: int, remote: Address, remote_port: int
    ) -> MappingKey:
        if self._mapping is Mapping.EIM:
            return (protocol, inside, port)
        if self._mapping is Mapping.ADM:
            return (protocol, inside, port, remote)
        return (protocol, inside, port, remote, remote_port)

    def _use(
        self,
        protocol: int,
        source: Address,
        source_port: int,
        destination: Address,
        destination_port: int,
        now: float,
        tcp_flags: int,
    ) -> Mapped | Drop:
        """Find or make the mapping of an outbound packet, and refresh it."""
        # `_key`, written out: this is the one place where a call per packet would show.
        key: MappingKey
        if self._mapping is Mapping.EIM:
            key = (protocol, source, source_port)
        elif self._mapping is Mapping.ADM:
            key = (protocol, source, source_port, destination)
        else:
            key = (protocol, source, source_port, destination, destination_port)
        entry = self._table.by_inside.get(key)
        remote = (destination, destination_port)
        if entry is None or entry.expires <= now or self._may_split:
            found = self._find_or_make(key, entry, remote, now, tcp_flags)
            if isinstance(found, Drop):
                return found
            entry = found
        if protocol == 6:
            self._track_tcp(entry, tcp_flags, now)
        # `_refresh`, written out for the same reason.
        if self._two_stages and entry.replied:
            self._mature(entry, now)
        expires = now + entry.lifetime
        entry.remotes[remote] = expires
        if not self._remotes_are_permits:
            entry.permits[self._permit_key(remote)] = expires
        if expires > entry.expires:
            entry.expires = expires
        if len(entry.remotes) > _MAX_REMOTES:
            del entry.remotes[next(iter(entry.remotes))]
        return entry

    def _find_or_make(
        self,
        key: MappingKey,
        newest: Mapped | None,
        remote: Endpoint,
        now: float,
        tcp_flags: int,
    ) -> Mapped | Drop:
        """Take an existing mapping that may be used towards `remote`, else make one."""
        entry = newest
        while entry is not None:
            if entry.expires > now and remote in entry.remotes:
                return entry
            entry = entry.older
        if (
            newest is not None
            and newest.expires > now
            and not self._is_taken(
                newest.protocol, newest.external, newest.external_port, remote, now, newest
            )
        ):
            return newest
        self.on_time(now)
        if (
            key[0] == Protocol.TCP
            and self.behavior.tcp.reset_after_idle
            and not tcp_flags & TcpFlag.SYN
        ):
            return Drop(DropReason.IDLE_CONNECTION, Answer.RESET)
        return self._make(key, remote, now)

    def _make(self, key: MappingKey, remote: Endpoint, now: float) -> Mapped | Drop:
        protocol, inside, inside_port = key[:3]
        assert isinstance(protocol, int)
        assert isinstance(inside, bytes)
        assert isinstance(inside_port, int)
        of_host = self._table.of_host(inside)
        limit = self.behavior.max_mappings_per_host
        if limit is not None and len(of_host) >= limit:
            if self.behavior.at_limit is AtLimit.REFUSE:
                return Drop(DropReason.HOST_LIMIT, note=f"{limit} mappings")
            self._table.bury(next(iter(of_host)), "evicted", now)
        endpoint = self._external_endpoint(protocol, inside, inside_port, key, remote, now)
        if endpoint is None:
            return Drop(DropReason.NO_PORT, inside=(inside, inside_port))
        external, external_port = endpoint
        entry = Mapped(
            protocol,
            inside,
            inside_port,
            external,
            external_port,
            key,
            now,
            self._first_lifetime(protocol, remote[1]),
        )
        if self._remotes_are_permits:
            entry.permits = entry.remotes  # type: ignore[assignment]  # read only through permits
        self._table.add(entry, remote)
        return entry

    def _external_endpoint(
        self,
        protocol: int,
        inside: Address,
        inside_port: int,
        key: MappingKey,
        remote: Endpoint,
        now: float,
    ) -> Endpoint | None:
        if not self._translates:
            return inside, inside_port
        external = self._external_address(inside)
        if external is None:
            return None
        if not self._napt:
            return external, inside_port

        def is_free(port: int) -> bool:
            return not self._is_taken(protocol, external, port, remote, now, None)

        port = self._allocator.allocate(inside, inside_port, key, is_free)
        return None if port is None else (external, port)

    def _is_taken(
        self,
        protocol: int,
        external: Address,
        port: int,
        remote: Endpoint,
        now: float,
        user: Mapped | None,
    ) -> bool:
        """Return whether an external port cannot be used towards `remote` (by `user`)."""
        if self._occupied:
            until = self._occupied.get((protocol, external, port, *remote), now)
            if until > now:
                return True
        for entry in self._table.by_external.get((protocol, external, port), ()):
            if entry is user or entry.expires <= now:
                continue
            if not self._shares_ports or entry.remotes.get(remote, now) > now:
                return True
        return False

    def _external_address(self, inside: Address) -> Address | None:
        """Choose the external address of a new mapping."""
        pool = self._pool
        if self._napt and self.behavior.pooling is Pooling.ARBITRARY:
            return pool[self._generator.randrange(len(pool))]
        paired = self._pairs.get(inside)
        if paired is None:
            # One-to-one takes the next address nobody has, pairing distributes in turn.
            if not self._napt and len(self._pairs) >= len(pool):
                return None
            paired = self._pairs[inside] = pool[len(self._pairs) % len(pool)]
        return paired

    def _first_lifetime(self, protocol: int, remote_port: int) -> float:
        lifetimes = self.behavior.lifetimes
        if protocol == Protocol.TCP:
            return lifetimes.tcp_transitory_seconds
        if protocol == Protocol.ICMP:
            return lifetimes.icmp_seconds
        special = self._lifetime_by_port.get(remote_port)
        if special is not None:
            return special
        if lifetimes.udp_unreplied_seconds is not None:
            return lifetimes.udp_unreplied_seconds
        return lifetimes.udp_seconds

    # --- filters and timers --------------------------------------------------------------

    def _permit_key(self, remote: Endpoint) -> object:
        if self._filtering is Filtering.APDF:
            return remote
        return remote[0] if self._filtering is Filtering.ADF else None

    def _permits(self, entry: Mapped, remote: Endpoint, now: float) -> bool:
        if self._filtering is Filtering.APDF:
            return entry.permits.get(remote, now) > now
        if self._filtering is Filtering.ADF:
            return entry.permits.get(remote[0], now) > now
        return True

    def _refresh(self, entry: Mapped, remote: Endpoint, now: float) -> None:
        """Renew the mapping, and the permission of the remote endpoint that was heard."""
        if self._two_stages:
            self._mature(entry, now)
        expires = now + entry.lifetime
        if remote in entry.remotes:
            entry.remotes[remote] = expires
        if not self._remotes_are_permits:
            permit = self._permit_key(remote)
            if permit in entry.permits:
                entry.permits[permit] = expires
        if expires > entry.expires:
            entry.expires = expires

    def _mature(self, entry: Mapped, now: float) -> None:
        """Give a UDP mapping with traffic both ways its long life."""
        if entry.protocol == Protocol.UDP and now - entry.born > _STREAM_AFTER_SECONDS:
            entry.lifetime = self.behavior.lifetimes.udp_seconds

    def _track_tcp(self, entry: Mapped, flags: int, now: float) -> None:
        """Give a connection that was answered its long life, and a closing one its short one.

        Connections that share a mapping share its lifetime: the table follows endpoints, not
        sequence numbers.
        """
        lifetimes = self.behavior.lifetimes
        if flags & (TcpFlag.FIN | TcpFlag.RST):
            entry.lifetime = lifetimes.tcp_transitory_seconds
            entry.closing = True
            entry.expires = now + entry.lifetime
        elif flags & TcpFlag.SYN:
            entry.closing = False
        elif entry.replied and not entry.closing:
            entry.lifetime = lifetimes.tcp_seconds

    # --- inbound -------------------------------------------------------------------------

    def _is_refused_syn(self, flags: int) -> bool:
        bare_syn = flags & (TcpFlag.SYN | TcpFlag.ACK) == TcpFlag.SYN
        return bare_syn and not self.behavior.tcp.simultaneous_open

    def _refuse(self, external: External, remote: Endpoint, now: float) -> Verdict:
        """Decide about an inbound packet that no mapping lets in."""
        protocol, destination, port = external
        if not self._napt and self._filtering is Filtering.EIF:
            host = self._host_behind(destination)
            if host is not None:
                return Translated(*remote, host, port, True)
        reaction = self.behavior.unsolicited
        answer = Answer.NONE
        if reaction is Unsolicited.REJECT:
            answer = Answer.PORT_UNREACHABLE
        elif reaction is not Unsolicited.DROP:
            answer = Answer.RESET if protocol == Protocol.TCP else Answer.PORT_UNREACHABLE
        if reaction is Unsolicited.ACCEPT:
            self._occupied[(*external, *remote)] = now + _OCCUPIED_SECONDS
            if len(self._occupied) > _MAX_OCCUPIED:
                del self._occupied[next(iter(self._occupied))]
        grave = self._table.graves.get(external)
        for entry in self._table.by_external.get(external, ()):
            if entry.expires > now:
                apdf = self._filtering is Filtering.APDF
                return Drop(
                    DropReason.FILTERED,
                    answer,
                    "port-dependent" if apdf else "address-dependent",
                    (entry.inside, entry.inside_port),
                    tuple(entry.remotes)[-3:],
                    entry.expires - now,
                )
            grave = entry
        if grave is not None:
            inside = (grave.inside, grave.inside_port)
            return Drop(DropReason.EXPIRED, answer, "", inside, (), min(grave.expires - now, 0.0))
        return Drop(DropReason.NO_MAPPING, answer)

    def _host_behind(self, destination: Address) -> Address | None:
        """Return the inside host of an untranslated or one-to-one external address."""
        if not self._translates:
            return destination
        for inside, external in self._pairs.items():
            if external == destination:
                return inside
        return None

    def _hairpin(
        self,
        protocol: int,
        source: Address,
        source_port: int,
        destination: Address,
        destination_port: int,
        now: float,
        tcp_flags: int,
    ) -> Verdict:
        """Turn a packet round to the inside. It is not filtered: it never was outside."""
        mode = self.behavior.hairpin
        if mode is Hairpin.NONE:
            return Drop(DropReason.NO_HAIRPIN)
        target = self._table.live((protocol, destination, destination_port), now)
        if target is None:
            return Drop(DropReason.NO_MAPPING, note="asked for from inside")
        target.replied = True
        if mode is Hairpin.INTERNAL:
            return Translated(source, source_port, target.inside, target.inside_port, True)
        entry = self._use(
            protocol, source, source_port, destination, destination_port, now, tcp_flags
        )
        if isinstance(entry, Drop):
            return entry
        return Translated(
            entry.external, entry.external_port, target.inside, target.inside_port, True
        )

    # --- addresses ------------------------------------------------------------------------

    def _set_external(self, external: Sequence[Address]) -> None:
        self._pool = tuple(external)
        self._external = frozenset(external)
        self._pairs.clear()
        if self.behavior.translation is Translation.ONE_TO_ONE:
            for inside in self._inside_hosts:
                self._external_address(inside)

    def _clear(self, cause: str, now: float) -> None:
        self._table.clear(cause, now)
        self._occupied.clear()
