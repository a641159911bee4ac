"""The connector's file, in TOML; `[tunnel]` of the agent's file has the same keys.

    edge = ["edge1.example.com", "edge2.example.com:7844"]
    edge_domain = "example.com"      # instead: SRV records of _v2-origintunneld._tcp.<domain>
    ca = "edge-ca.pem"               # the edges' authority; absent for the system's
    credentials = "tunnel.json"      # or token_file = "token"; both are made by the edge's operator
    protocol = "auto"                # or "quic", "http2"
    connections = 4
    grace = "30s"                    # for requests under way when it stops
    health = "127.0.0.1:20241"       # /ready, /healthcheck, /metrics, /config; absent for none
    url = "http://127.0.0.1:8000"    # a single service; or rules:

    [[ingress]]
    hostname = "app.example.com"
    path = "^/api"
    service = "http://127.0.0.1:8000"
    originRequest = { connectTimeout = "5s" }
    [[ingress]]
    service = "http_status:404"

    [warp-routing]                   # lets the edge connect to any TCP or UDP address from here

Without `url` and `ingress` the edge says what is served. Paths are relative to the file.
"""

from __future__ import annotations

import ssl
import tomllib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from traversal.secret_files import read_secret
from traversal.tunnel.checking import check_keys, nearest, whole_seconds
from traversal.tunnel.configuration_file import CONFIGURATION_KEYS, read_configuration
from traversal.tunnel.discovery import EdgePlaces, parse_edge
from traversal.tunnel.ingress import Ingress
from traversal.tunnel.services import parse_place
from traversal.tunnel.transport_choice import PROTOCOLS, Transport
from traversal.wire.tunnel.configuration import Configuration
from traversal.wire.tunnel.credentials import Credentials, parse_credentials_file, parse_token
from traversal.wire.tunnel.errors import TunnelError

MAX_CONNECTIONS: Final = 8
_KEYS: Final = (
    "edge",
    "edge_domain",
    "ca",
    "credentials",
    "token_file",
    "protocol",
    "connections",
    "grace",
    "health",
    "url",
    *CONFIGURATION_KEYS,
)


class SettingsError(Exception):
    """The connector's file, or one that it names, can't be used; the text says where and why."""


@dataclass(frozen=True, slots=True)
class TunnelSettings:
    """Everything that a connector is told, checked; `repr` shows no secret."""

    places: EdgePlaces
    credentials: Credentials
    configuration: Configuration
    ca_file: str | None = None
    transports: tuple[Transport, ...] = PROTOCOLS["auto"]
    connections: int = 4
    grace_seconds: int = 30
    health: tuple[str, int] | None = None
    is_private_open: bool = True
    """Whether the edge may have us connect to any address: by a `[warp-routing]` table, or where
    the edge says what is served anyway."""


def load_settings(path: Path) -> TunnelSettings:
    """Read the file and those that it names. Raises SettingsError."""
    try:
        table = tomllib.loads(path.read_text())
    except OSError as error:
        raise SettingsError(f"{path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        hint = ""
        if path.suffix in (".yml", ".yaml"):
            hint = "; write it in TOML, cloudflared's YAML is not read, though its rules are alike"
        raise SettingsError(f"{path}: {error}{hint}") from None
    try:
        return read_settings(table, path.parent)
    except SettingsError as error:
        raise SettingsError(f"{path}: {error}") from None


def read_settings(
    table: dict[str, Any],
    directory: Path,
    *,
    credentials: Credentials | None = None,
    token: str | None = None,
) -> TunnelSettings:
    """From a table; paths in it are relative to `directory`.

    With `credentials` or `token` the table must name no file of them. Raises SettingsError.
    """
    try:
        given = check_keys("the file", table, _KEYS)
        return TunnelSettings(
            places=_places(given),
            credentials=credentials or (_token(token) if token else _credentials(given, directory)),
            configuration=_configuration(given),
            ca_file=_ca_file(given, directory),
            transports=_protocol(given.get("protocol", "auto")),
            connections=_connections(given.get("connections", 4)),
            grace_seconds=whole_seconds("the file", "grace", given.get("grace", 30)),
            health=_health(given.get("health", "")),
            is_private_open="warp-routing" in given or not ({"url", "ingress"} & given.keys()),
        )
    except TunnelError as error:
        raise SettingsError(str(error)) from None


def _places(given: dict[str, Any]) -> EdgePlaces:
    listed = given.get("edge", [])
    listed = [listed] if isinstance(listed, str) else listed
    if not isinstance(listed, list) or not all(isinstance(entry, str) for entry in listed):
        raise TunnelError('edge: write a list like ["edge.example.com"]')
    domain = given.get("edge_domain", "")
    if not isinstance(domain, str):
        raise TunnelError("edge_domain: must be a text")
    if bool(listed) == bool(domain):
        raise TunnelError(
            'say where the edge is: --edge HOST:PORT, or in the file edge = ["HOST:PORT"] or '
            'edge_domain = "DOMAIN", one of them'
        )
    return EdgePlaces(tuple(map(parse_edge, listed)), domain)


def _credentials(given: dict[str, Any], directory: Path) -> Credentials:
    names = [name for name in ("credentials", "token_file") if given.get(name)]
    if len(names) != 1:
        raise TunnelError(
            "say which tunnel it is: --credentials-file FILE, --token-file FILE, TUNNEL_TOKEN, "
            'or in the file credentials = "FILE" or token_file = "FILE", one of them'
        )
    name = names[0]
    text = _read(given, name, directory, "create-tunnel NAME", read_secret).strip()
    # Each is taken for the other now and then.
    is_file = text.startswith("{")
    if is_file and name == "token_file":
        raise TunnelError(
            f"token_file: {given[name]}: this is a credentials file: write "
            'credentials = "FILE" or --credentials-file FILE'
        )
    try:
        return parse_credentials_file(text) if name == "credentials" else parse_token(text)
    except TunnelError as error:
        reason = str(error).removeprefix("credentials: ")
        raise TunnelError(f"{name}: {given[name]}: {reason}") from None


def _token(text: str) -> Credentials:
    try:
        return parse_token(text)
    except TunnelError as error:
        reason = str(error).removeprefix("credentials: ")
        raise TunnelError(f"TUNNEL_TOKEN: {reason}") from None


def _read(
    given: dict[str, Any],
    name: str,
    directory: Path,
    command: str,
    read: Callable[[Path], str] = Path.read_text,
) -> str:
    place = given[name]
    if not isinstance(place, str):
        raise TunnelError(f"{name}: must be a path")
    path = directory / place
    try:
        return read(path)
    except OSError as error:
        raise TunnelError(
            f"{name}: {path}: {error.strerror}. The edge's operator makes it with "
            f'"underpass-relay edge {command}".'
        ) from None
    except UnicodeDecodeError:
        raise TunnelError(f"{name}: {path}: is no text") from None


def _configuration(given: dict[str, Any]) -> Configuration:
    url = given.get("url", "")
    rules: dict[str, Any] = {key: given[key] for key in CONFIGURATION_KEYS if key in given}
    if url:
        if "ingress" in rules:
            raise TunnelError("url and ingress exclude each other: make the url a rule")
        rules["ingress"] = [{"service": url}]
    configuration = read_configuration(rules)
    Ingress.of(configuration)
    return configuration


def _ca_file(given: dict[str, Any], directory: Path) -> str | None:
    if not given.get("ca"):
        return None
    _read(given, "ca", directory, "authority")
    path = str(directory / given["ca"])
    try:
        ssl.create_default_context(cafile=path)
    except OSError:
        raise TunnelError(
            f"ca: {path}: holds no certificate. The edge's operator prints it with "
            '"underpass-relay edge authority".'
        ) from None
    return path


def _protocol(name: object) -> tuple[Transport, ...]:
    if not isinstance(name, str) or name not in PROTOCOLS:
        raise TunnelError(f"protocol: {name!r} is none{nearest(str(name), PROTOCOLS)}")
    return PROTOCOLS[name]


def _connections(number: object) -> int:
    if not isinstance(number, int) or not 1 <= number <= MAX_CONNECTIONS:
        raise TunnelError(f"connections: must be a number from 1 to {MAX_CONNECTIONS}")
    return number


def _health(text: object) -> tuple[str, int] | None:
    if not text:
        return None
    place = ("", 0)
    if isinstance(text, str):
        with suppress(TunnelError):
            place = parse_place(text)
    if not place[1]:
        raise TunnelError(f'health: {text!r} must read IP:PORT, like "127.0.0.1:20241"')
    return place
