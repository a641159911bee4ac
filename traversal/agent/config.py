"""The agent's file, in TOML.

    key = "node.key"                    # made by `underpass keygen`
    relay_map = "relays.json"           # a DERP map; a path or an https URL
    port = 41641                        # UDP; 0 or absent for any
    control = "underpass.sock"          # the control socket
    wireguard = "127.0.0.1:51820"       # where the local WireGuard listens
    peer_relay_port = 41642             # serve as a UDP peer relay there; absent for not
    port_search = true                  # guess the ports of hard NATs; the default
    state = "underpass.state"           # what the agent learns and keeps
    socket_mark = 0x7570                # of the node's own packets, for routing rules; absent for 0

    [tunnel]                            # publish services through an edge; keys as in the file of
    edge = ["edge.example.com"]         # `underpass tunnel run`
    credentials = "web.json"
    url = "http://127.0.0.1:8000"

    [[peers]]
    name = "attic"
    key = "nodekey:..."
    relay = 900
    endpoint = "127.0.0.1:51901"        # what the local WireGuard uses as this peer's endpoint
    peer_relay = true                   # this peer may carry our traffic with the others
    port_search = false                 # not for this peer

    [wireguard]                         # instead of wireguard = "...": set WireGuard up
    interface = "wg0"
    key = "wg.key"                      # made by `wg genkey`
    addresses = ["10.88.0.1/24"]
    port = 51820                        # UDP, on loopback
    mtu = 1380                          # what fits through most paths without fragments

    [[peers]]
    wireguard_key = "..."               # the peer's public key, as `wg pubkey` writes it
    allowed_ips = ["10.88.0.2/32"]

    [interfaces]                        # which the node uses; overlays are never used by default
    allow = ["eth", "wlan"]             # only names that begin so; absent for all
    deny = ["docker", "br-"]            # without allow: all but names that begin so
    allow_networks = ["10.0.0.0/8"]     # only these addresses are used; absent for all
    deny_networks = ["172.16.0.0/12"]   # addresses that are neither told to peers nor pinged

    [home]                              # which region's relay others reach this node by
    pin = 900                           # this one, if it can be reached; absent for the nearest
    ban = [901]                         # never these

    [edge]                              # an edge that the peers know, too
    addresses = ["edge.example.com:7844"]
    credentials = "tunnel.json"         # of any tunnel there
    ca = "edge-ca.pem"                  # absent for the system's authorities
    policy = "last"                     # or "before-relay", or "first"

Paths are relative to the file. `wireguard` and `endpoint` belong together: without them the agent
only keeps paths to its peers.
"""

from __future__ import annotations

import base64
import ipaddress
import re
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import msgspec

from traversal.agent.tables import (
    EdgeTable,
    InterfacesTable,
    PeerTable,
    TableError,
    WireGuardTable,
    parse_file,
)
from traversal.agent.wireguard import IpNetwork, WireGuardInterface
from traversal.io.interfaces import InterfaceFilter
from traversal.keys import KeyFormatError, NodePrivate, NodePublic
from traversal.paths.edge import EdgePolicy
from traversal.paths.home import HomePolicy
from traversal.relay_map import RelayMap, RelayMapError
from traversal.secret_files import read_secret
from traversal.tunnel.settings import SettingsError, TunnelSettings, read_settings
from traversal.wire.address import Address
from traversal.wire.tunnel.credentials import Credentials, parse_credentials_file
from traversal.wire.tunnel.errors import TunnelError

MAX_PEERS: Final = 10_000
MAP_SECONDS: Final = 10.0
MAX_MAP_BYTES: Final = 4 << 20


class ConfigError(Exception):
    """The agent's file, or one that it names, can't be used; the text says where and why."""


class UnavailableError(ConfigError):
    """What the agent's file says is well formed, but not to be had now: a server that does not
    answer, a socket that another agent holds."""


class PeerConfig(msgspec.Struct, frozen=True):
    """A peer, checked."""

    name: str
    key: NodePublic
    relay: int
    endpoint: Address | None
    wireguard_key: str
    allowed: tuple[IpNetwork, ...]
    is_peer_relay: bool
    may_search_ports: bool


class EdgeConfig(msgspec.Struct, frozen=True):
    """The edge, checked."""

    addresses: tuple[tuple[str, int], ...]
    credentials: Credentials
    ca_file: str | None
    policy: EdgePolicy


class AgentConfig(msgspec.Struct, frozen=True):
    """Everything that the agent needs, checked; `repr` shows no secret."""

    private_key: NodePrivate
    relay_map: str
    port: int
    control: Path
    wireguard: Address | None
    interface: WireGuardInterface | None
    peer_relay_port: int | None
    may_search_ports: bool
    state: Path
    static_addresses: tuple[Address, ...]
    socket_mark: int
    interfaces: InterfaceFilter
    home: HomePolicy
    edge: EdgeConfig | None
    tunnel: TunnelSettings | None
    peers: tuple[PeerConfig, ...]

    def peer(self, name: str) -> PeerConfig | None:
        """The peer of this name."""
        return next((peer for peer in self.peers if peer.name == name), None)


def load_config(path: Path) -> AgentConfig:
    """Read the file and the key it names. Raises ConfigError."""
    try:
        file = parse_file(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except (TableError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from None
    if len(file.peers) > MAX_PEERS:
        raise ConfigError(f"{path}: at most {MAX_PEERS} peers, not {len(file.peers)}")
    private_key = load_key(path.parent / file.key)
    peers = tuple(_check_peer(path, number, entry) for number, entry in enumerate(file.peers, 1))
    own = private_key.public()
    for number, peer in enumerate(peers, 1):
        if peer.key == own:
            raise ConfigError(f"{path}, peer {number} ({peer.name}), key: is this node's own key")
    for what in ("name", "key", "endpoint"):
        values = Counter(getattr(peer, what) for peer in peers)
        for value, count in values.items():
            if value is not None and count > 1:
                raise ConfigError(f"{path}: two peers have the {what} {value}")
    interface = None
    if isinstance(file.wireguard, WireGuardTable):
        interface = _check_interface(path, file.wireguard, file.socket_mark)
        if not file.socket_mark and any(n.prefixlen == 0 for peer in peers for n in peer.allowed):
            raise ConfigError(
                f"{path}: a peer's allowed_ips are everything, which would lead the node's own "
                "packets into the tunnel that they carry; write socket_mark = 0x7570, or any number"
            )
        wireguard: Address | None = Address("127.0.0.1", interface.port)
    else:
        wireguard = _address(path, "wireguard", file.wireguard)
        if any(peer.wireguard_key for peer in peers):
            raise ConfigError(f"{path}: peers have a wireguard_key, so write a [wireguard] table")
    if wireguard is None and any(peer.endpoint for peer in peers):
        raise ConfigError(f'{path}: peers have an endpoint, so write wireguard = "IP:PORT" too')
    return AgentConfig(
        private_key=private_key,
        relay_map=file.relay_map if "://" in file.relay_map else str(path.parent / file.relay_map),
        port=file.port,
        control=path.parent / file.control,
        wireguard=wireguard,
        interface=interface,
        peer_relay_port=file.peer_relay_port,
        may_search_ports=file.port_search,
        state=path.parent / file.state,
        static_addresses=_addresses(path, "addresses", file.addresses),
        socket_mark=file.socket_mark,
        interfaces=_check_interfaces(path, file.interfaces),
        home=HomePolicy(file.home.pin, frozenset(file.home.ban)),
        edge=_check_edge(path, file.edge) if file.edge is not None else None,
        tunnel=_check_tunnel(path, file.tunnel) if file.tunnel is not None else None,
        peers=peers,
    )


def _check_tunnel(path: Path, table: dict[str, Any]) -> TunnelSettings:
    try:
        return read_settings(table, path.parent)
    except SettingsError as error:
        raise ConfigError(f"{path}, tunnel: {error}") from None


def _check_interfaces(path: Path, table: InterfacesTable) -> InterfaceFilter:
    def networks(what: str, texts: list[str]) -> tuple[IpNetwork, ...]:
        try:
            return tuple(map(ipaddress.ip_network, texts))
        except ValueError as error:
            raise ConfigError(f"{path}, interfaces, {what}: {error}") from None

    usual = InterfaceFilter()
    return InterfaceFilter(
        denied_names=(*usual.denied_names, *table.deny),
        allowed_names=tuple(table.allow),
        allowed_networks=networks("allow_networks", table.allow_networks),
        denied_networks=networks("deny_networks", table.deny_networks),
    )


def load_key(path: Path) -> NodePrivate:
    """Read a key file. Raises ConfigError."""
    try:
        return NodePrivate.parse(read_secret(path).strip())
    except FileNotFoundError:
        raise ConfigError(
            f'{path}: No such file. Make a key with "underpass keygen -o {path}".'
        ) from None
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except (KeyFormatError, UnicodeDecodeError) as error:
        raise ConfigError(f'{path} is no key file of "underpass keygen": {error}') from None


def load_map(source: str) -> RelayMap:
    """Read a relay map from a file or an http(s) URL; blocks, 10 s at most for each step of a
    server. Raises ConfigError."""
    try:
        return RelayMap.parse(_read_map(source))
    except OSError as error:
        raise ConfigError(f"{source}: {error.strerror or error}") from None
    except RelayMapError as error:
        raise ConfigError(f"{source}: {error}") from None


def _read_map(source: str) -> bytes:
    if "://" not in source:
        return Path(source).read_bytes()
    if not source.startswith(("https://", "http://")):
        raise ConfigError(f"{source}: a relay map comes from a file or an https URL")
    # Imported late: they are slow to import and most maps are files.
    import http.client
    import urllib.error
    import urllib.request

    try:
        with urllib.request.urlopen(source, timeout=MAP_SECONDS) as answer:
            data: bytes = answer.read(MAX_MAP_BYTES + 1)
    except urllib.error.HTTPError as error:
        raise UnavailableError(
            f"{source}: the server answers {error.code} {error.reason}"
        ) from None
    except urllib.error.URLError as error:
        reason = error.reason
        text = reason.strerror if isinstance(reason, OSError) and reason.strerror else str(reason)
        raise UnavailableError(
            f"{source}: {text}; see whether the address is right and its server runs, or use a "
            "file as relay map"
        ) from None
    except http.client.HTTPException as error:
        raise UnavailableError(f"{source}: {error}") from None
    except ValueError as error:
        raise ConfigError(f"{source}: {error}") from None
    if len(data) > MAX_MAP_BYTES:
        raise ConfigError(f"{source}: a relay map has at most {MAX_MAP_BYTES} bytes")
    return data


def _check_peer(path: Path, number: int, entry: PeerTable) -> PeerConfig:
    where = f"{path}, peer {number}"
    if not entry.name or not entry.name.isprintable():
        raise ConfigError(f"{where}, name: must be printable text")
    try:
        key = NodePublic.parse(entry.key)
    except KeyFormatError as error:
        raise ConfigError(f"{where} ({entry.name}), key: {error}") from None
    endpoint = _address(path, f"peer {number} ({entry.name}), endpoint", entry.endpoint)
    if endpoint is not None and not endpoint.ip.is_loopback:
        raise ConfigError(f"{where} ({entry.name}), endpoint: {endpoint} is no loopback address")
    allowed = tuple(_network(where, text) for text in entry.allowed_ips)
    if entry.wireguard_key:
        _check_wireguard_key(f"{where} ({entry.name}), wireguard_key", entry.wireguard_key)
    return PeerConfig(
        name=entry.name,
        key=key,
        relay=entry.relay,
        endpoint=endpoint,
        wireguard_key=entry.wireguard_key,
        allowed=allowed,
        is_peer_relay=entry.peer_relay,
        may_search_ports=entry.port_search,
    )


def _check_interface(path: Path, table: WireGuardTable, mark: int) -> WireGuardInterface:
    where = f"{path}, wireguard"
    if not re.fullmatch(r"[A-Za-z0-9_.-]{1,15}", table.interface):
        raise ConfigError(f"{where}.interface: {table.interface!r} is no name of an interface")
    key_file = path.parent / table.key
    try:
        key = read_secret(key_file).strip()
        addresses = tuple(ipaddress.ip_interface(text) for text in table.addresses)
    except OSError as error:
        raise ConfigError(
            f'{key_file}: {error.strerror}. Make a key with "wg genkey > {key_file}".'
        ) from None
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from None
    _check_wireguard_key(str(key_file), key)
    return WireGuardInterface(table.interface, key, addresses, table.port, table.mtu, mark)


def _check_wireguard_key(where: str, text: str) -> None:
    try:
        is_key = len(base64.b64decode(text, validate=True)) == 32
    except ValueError:
        is_key = False
    if not is_key:
        raise ConfigError(f"{where}: a WireGuard key is 32 bytes in base64, as wg writes it")


def _network(where: str, text: str) -> IpNetwork:
    try:
        return ipaddress.ip_network(text)
    except ValueError as error:
        hint = ""
        with suppress(ValueError):
            hint = f"; write {ipaddress.ip_network(text, strict=False)}"
        raise ConfigError(f"{where}, allowed_ips: {error}{hint}") from None


def _check_edge(path: Path, table: EdgeTable) -> EdgeConfig:
    addresses = []
    for text in table.addresses:
        host, colon, port = text.rpartition(":")
        if not host or not colon or not (port.isascii() and port.isdigit()) or int(port) > 65535:
            raise ConfigError(f"{path}, edge.addresses: {text!r} must read HOST:PORT")
        addresses.append((host.removeprefix("[").removesuffix("]"), int(port)))
    if not addresses:
        raise ConfigError(f"{path}, edge.addresses: name at least one HOST:PORT")
    file = path.parent / table.credentials
    try:
        credentials = parse_credentials_file(read_secret(file))
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror}") from None
    except (TunnelError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: {error}") from None
    ca_file = str(path.parent / table.ca) if table.ca else None
    return EdgeConfig(tuple(addresses), credentials, ca_file, table.policy)


def _addresses(path: Path, what: str, texts: list[str]) -> tuple[Address, ...]:
    found = (_address(path, what, text) for text in texts)
    return tuple(address for address in found if address is not None)


def _address(path: Path, what: str, text: str) -> Address | None:
    try:
        return Address.parse(text) if text else None
    except ValueError as error:
        raise ConfigError(f"{path}, {what}: {error}") from None
