"""Which tunnel serves what visitors ask for. Pure.

A host is exact or `*.suffix` (any depth, not the suffix itself); exact beats suffix, a longer
suffix a shorter one, and under one host the longest path prefix wins. Prefixes end at slashes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from uuid import UUID

from relay.config_schema import ListenAddress
from relay.edge.destinations import Destination
from relay.edge.hygiene import has_dot_segment


@dataclass(frozen=True, slots=True)
class HttpRoute:
    """Requests for a host (in lower case) and a path prefix."""

    host: str
    tunnel: UUID
    path: str = "/"


@dataclass(frozen=True, slots=True)
class NameRoute:
    """TLS connections for a name, passed through undecrypted."""

    name: str
    tunnel: UUID
    destination: Destination


@dataclass(frozen=True, slots=True)
class PortRoute:
    """A TCP or UDP port of the edge."""

    listen: ListenAddress
    tunnel: UUID
    destination: Destination


@dataclass(frozen=True)
class RoutingTable:
    """All routes of an edge; two for the same thing are a mistake that the reader refuses."""

    http: tuple[HttpRoute, ...] = ()
    tls: tuple[NameRoute, ...] = ()
    tcp: tuple[PortRoute, ...] = ()
    udp: tuple[PortRoute, ...] = ()
    _http: dict[str, list[HttpRoute]] = field(init=False, repr=False, compare=False)
    _tls: dict[str, NameRoute] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        by_host = defaultdict(list)
        for route in sorted(self.http, key=lambda route: len(route.path), reverse=True):
            by_host[route.host].append(route)
        object.__setattr__(self, "_http", dict(by_host))
        object.__setattr__(self, "_tls", {route.name: route for route in self.tls})

    def find_http(self, host: str, path: str) -> HttpRoute | None:
        """The route of a request, by its host in lower case without port, and its path.

        A path that an origin could read as another one, further up, has no prefix but `/`.
        """
        dotted = has_dot_segment(path)
        for name in _names(host):
            for route in self._http.get(name, ()):
                if route.path == "/" or (not dotted and _is_below(path, route.path)):
                    return route
        return None

    def find_tls(self, name: str) -> NameRoute | None:
        """The pass-through route of a server name in lower case."""
        return next((self._tls[each] for each in _names(name) if each in self._tls), None)


def _names(host: str) -> Iterable[str]:
    """What a host can be listed as, best first."""
    yield host
    _, dot, rest = host.partition(".")
    while dot:
        yield f"*.{rest}"
        _, dot, rest = rest.partition(".")


def _is_below(path: str, prefix: str) -> bool:
    path = path.partition("?")[0]
    prefix = prefix.removesuffix("/")
    return path == prefix or path.startswith(f"{prefix}/")
