"""The mappings of one NAT: by inside, by external endpoint, by host, and by when they end. Pure.

An expired mapping stays in the tables until `on_time` buries it; whoever looks one up compares its
`expires` with the time.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable

from netlab.drops import Address, Endpoint, endpoint_text
from netlab.nat.flow import Protocol
from netlab.timeline import MappingBorn, MappingDied

MappingKey = tuple[object, ...]
External = tuple[int, Address, int]

# Recently dead external endpoints, kept only so that a drop can say "expired" with the time.
_MAX_GRAVES = 4096


class Mapped:
    """A live mapping."""

    __slots__ = (
        "born",
        "closing",
        "expires",
        "external",
        "external_port",
        "inside",
        "inside_port",
        "key",
        "lifetime",
        "older",
        "permits",
        "protocol",
        "remotes",
        "replied",
    )

    def __init__(
        self,
        protocol: int,
        inside: Address,
        inside_port: int,
        external: Address,
        external_port: int,
        key: MappingKey,
        born: float,
        lifetime: float,
    ) -> None:
        self.protocol = protocol
        self.inside = inside
        self.inside_port = inside_port
        self.external = external
        self.external_port = external_port
        self.key = key
        self.born = born
        self.lifetime = lifetime
        self.expires = born + lifetime
        self.remotes: dict[Endpoint, float] = {}
        # What the filter looks in: `remotes` itself for APDF with the scope "mapping".
        self.permits: dict[object, float] = {}
        self.replied = False
        self.closing = False
        self.older: Mapped | None = None


class MappingTable:
    """All mappings of a NAT.

    Args:
        permits_of_endpoint: mappings of one inside endpoint share their permissions
            (`FilterScope.ENDPOINT`).
        name: how events call the NAT.
        on_event: gets `MappingBorn` and `MappingDied`.
    """

    def __init__(
        self,
        *,
        permits_of_endpoint: bool,
        name: str,
        on_event: Callable[[MappingBorn | MappingDied], None] | None,
    ) -> None:
        self.by_inside: dict[MappingKey, Mapped] = {}
        """The newest mapping of each key; older ones hang on its `older`."""
        self.by_external: dict[External, list[Mapped]] = {}
        self.graves: dict[External, Mapped] = {}
        self._by_host: dict[Address, dict[Mapped, None]] = {}
        self._permits_of_endpoint = permits_of_endpoint
        # The shared permissions of inside endpoints, and which mappings use them.
        self._shared_permits: dict[MappingKey, tuple[dict[object, float], set[Mapped]]] = {}
        self._deadlines: list[tuple[float, int, Mapped]] = []
        self._serial = 0
        self._name = name
        self._on_event = on_event

    def of_host(self, inside: Address) -> dict[Mapped, None]:
        """The mappings of an inside host, the oldest first."""
        return self._by_host.get(inside, {})

    def __len__(self) -> int:
        """How many mappings there are, expired ones included until `on_time`."""
        return sum(map(len, self.by_external.values()))

    def live(self, external: External, now: float) -> Mapped | None:
        """The first mapping on an external endpoint that has not expired."""
        for entry in self.by_external.get(external, ()):
            if entry.expires > now:
                return entry
        return None

    def add(self, entry: Mapped, remote: Endpoint) -> None:
        """Enter a new mapping, made for a packet to `remote`."""
        if self._permits_of_endpoint:
            entry.permits, users = self._shared_permits.setdefault(entry.key[:3], ({}, set()))
            users.add(entry)
        external = (entry.external, entry.external_port)
        entry.older = self.by_inside.get(entry.key)
        self.by_inside[entry.key] = entry
        self.by_external.setdefault((entry.protocol, *external), []).append(entry)
        self._by_host.setdefault(entry.inside, {})[entry] = None
        self._serial += 1
        heapq.heappush(self._deadlines, (entry.expires, self._serial, entry))
        if self._on_event is not None:
            self._on_event(
                MappingBorn(
                    at=entry.born,
                    nat=self._name,
                    protocol=Protocol(entry.protocol).name.lower(),
                    inside=endpoint_text((entry.inside, entry.inside_port)),
                    external=endpoint_text(external),
                    remote=endpoint_text(remote),
                )
            )

    def bury(self, entry: Mapped, cause: str, now: float) -> None:
        """Take a mapping out of every table."""
        external = (entry.protocol, entry.external, entry.external_port)
        entries = self.by_external[external]
        entries.remove(entry)
        if not entries:
            del self.by_external[external]
        of_host = self._by_host[entry.inside]
        del of_host[entry]
        if not of_host:
            del self._by_host[entry.inside]
        newest = self.by_inside.get(entry.key)
        if newest is entry:
            if entry.older is None:
                del self.by_inside[entry.key]
            else:
                self.by_inside[entry.key] = entry.older
        else:
            while newest is not None and newest.older is not entry:
                newest = newest.older
            if newest is not None:
                newest.older = entry.older
        if self._permits_of_endpoint:
            _, users = self._shared_permits[entry.key[:3]]
            users.discard(entry)
            if not users:
                del self._shared_permits[entry.key[:3]]
        self.graves.pop(external, None)
        self.graves[external] = entry
        if len(self.graves) > _MAX_GRAVES:
            del self.graves[next(iter(self.graves))]
        entry.expires = min(entry.expires, now)
        if self._on_event is not None:
            self._on_event(
                MappingDied(
                    at=entry.expires if cause == "expired" else now,
                    nat=self._name,
                    protocol=Protocol(entry.protocol).name.lower(),
                    inside=endpoint_text((entry.inside, entry.inside_port)),
                    external=endpoint_text((entry.external, entry.external_port)),
                    cause=cause,
                    born_at=entry.born,
                )
            )

    def clear(self, cause: str, now: float) -> None:
        """Take all mappings out."""
        for entries in list(self._by_host.values()):
            for entry in list(entries):
                self.bury(entry, cause, now)
        self._deadlines.clear()
        self._shared_permits.clear()

    def next_deadline(self) -> float | None:
        """Return when the next mapping may have expired."""
        return self._deadlines[0][0] if self._deadlines else None

    def on_time(self, now: float) -> None:
        """Bury the mappings that have expired by `now`."""
        deadlines = self._deadlines
        while deadlines and deadlines[0][0] <= now:
            _, serial, entry = heapq.heappop(deadlines)
            if entry.expires > now:
                heapq.heappush(deadlines, (entry.expires, serial, entry))
            elif entry in self._by_host.get(entry.inside, ()):
                self.bury(entry, "expired", now)

    def external_endpoints(self, now: float) -> list[tuple[int, Address, int]]:
        """Return (protocol, address, port) of every live mapping."""
        return [
            external
            for external, entries in self.by_external.items()
            for entry in entries
            if entry.expires > now
        ]
