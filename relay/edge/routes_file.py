"""The operator's file of routes: which hosts, ports and names lead to which tunnel (TOML).

[[http]]
host = "app.example.com"          # or "*.example.com"
path = "/api"                     # a prefix; optional
tunnel = "home"                   # its name or id

[[tls]]                           # passed through undecrypted, by server name
name = "db.example.com"
tunnel = "home"
destination = "10.0.0.6:8443"     # what the connector dials

[[tcp]]                           # and [[udp]]
listen = ":2222"
tunnel = "home"
destination = "10.0.0.5:22"
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar
from uuid import UUID

import msgspec
from msgspec import Struct

from relay.config_schema import ListenAddress
from relay.config_sources import ConfigError, read_text_file
from relay.edge.destinations import DestinationError, DestinationPolicy
from relay.edge.hygiene import normal_host
from relay.edge.registry import Tunnel
from relay.edge.routes import HttpRoute, NameRoute, PortRoute, RoutingTable

_T = TypeVar("_T")


class _Http(Struct, forbid_unknown_fields=True):
    host: str
    tunnel: str
    path: str = "/"


class _Tls(Struct, forbid_unknown_fields=True):
    name: str
    tunnel: str
    destination: str


class _Port(Struct, forbid_unknown_fields=True):
    listen: str
    tunnel: str
    destination: str


class _File(Struct, forbid_unknown_fields=True):
    http: tuple[_Http, ...] = ()
    tls: tuple[_Tls, ...] = ()
    tcp: tuple[_Port, ...] = ()
    udp: tuple[_Port, ...] = ()


def read_routes(
    path: str, tunnels: Iterable[Tunnel], destinations: DestinationPolicy
) -> RoutingTable:
    """The routes in a file; none if `path` is empty. Raises ConfigError with every mistake."""
    if not path:
        return RoutingTable()
    text = read_text_file(Path(path), "routes file")
    try:
        file = msgspec.convert(tomllib.loads(text), _File)
    except (tomllib.TOMLDecodeError, msgspec.ValidationError) as error:
        raise ConfigError(f"{path}: {error}") from None
    return _Reader(path, tunnels, destinations).read(file)


class _Reader:
    def __init__(
        self, path: str, tunnels: Iterable[Tunnel], destinations: DestinationPolicy
    ) -> None:
        self._path = path
        self._tunnels = {
            key: tunnel.id for tunnel in tunnels for key in (tunnel.name, str(tunnel.id))
        }
        self._destinations = destinations
        self._problems: list[str] = []

    def read(self, file: _File) -> RoutingTable:
        table = RoutingTable(
            http=self._each("http", file.http, self._http, lambda r: (r.host, r.path)),
            tls=self._each("tls", file.tls, self._tls, lambda r: r.name),
            tcp=self._each("tcp", file.tcp, self._port, lambda r: r.listen),
            udp=self._each("udp", file.udp, self._port, lambda r: r.listen),
        )
        if self._problems:
            raise ConfigError(*self._problems)
        return table

    def _each(
        self,
        kind: str,
        entries: Iterable[Any],
        read: Callable[[Any], _T],
        key: Callable[[_T], object],
    ) -> tuple[_T, ...]:
        routes: dict[object, _T] = {}
        for number, entry in enumerate(entries, 1):
            try:
                route = read(entry)
                if routes.setdefault(key(route), route) is not route:
                    raise ValueError("is for the same as another one before it")
            except (ValueError, DestinationError) as error:
                self._problems.append(f"{self._path}: [[{kind}]] number {number}: {error}")
        return tuple(routes.values())

    def _http(self, entry: _Http) -> HttpRoute:
        if not entry.path.startswith("/") or "?" in entry.path:
            raise ValueError(f'the path "{entry.path}" must start with a slash, without a query')
        return HttpRoute(_host(entry.host), self._tunnel(entry.tunnel), entry.path)

    def _tls(self, entry: _Tls) -> NameRoute:
        destination = self._destinations.authorize(entry.destination)
        return NameRoute(_host(entry.name), self._tunnel(entry.tunnel), destination)

    def _port(self, entry: _Port) -> PortRoute:
        destination = self._destinations.authorize(entry.destination)
        listen = ListenAddress.parse(entry.listen)
        return PortRoute(listen, self._tunnel(entry.tunnel), destination)

    def _tunnel(self, name: str) -> UUID:
        if name not in self._tunnels:
            raise ValueError(
                f'there is no tunnel "{name}"; make it with "underpass-relay edge create-tunnel"'
            )
        return self._tunnels[name]


def _host(text: str) -> str:
    prefix = "*." if text.startswith("*.") else ""
    host = normal_host(text.removeprefix("*."))
    if host is None or ":" in text.rpartition("]")[2]:
        raise ValueError(f'"{text}" is no host name, nor "*." and one')
    return prefix + host
