"""The tables of the agent's file, and what is said of one that is not as it should be. Pure.

Only form is checked here: names and types. `traversal.agent.config` checks what the values mean.
"""

from __future__ import annotations

import re
import tomllib
from typing import Annotated, Any, Final

import msgspec

from traversal.paths.edge import EdgePolicy
from traversal.tunnel.checking import nearest


class TableError(ValueError):
    """The file is no TOML or has a wrong key or type; the text says where."""


class PeerTable(msgspec.Struct, frozen=True):
    """A `[[peers]]` table."""

    name: str
    key: str
    relay: int = 0
    endpoint: str = ""
    peer_relay: bool = False
    port_search: bool = True
    wireguard_key: str = ""
    allowed_ips: list[str] = []


class WireGuardTable(msgspec.Struct, frozen=True):
    """The `[wireguard]` table."""

    interface: str
    key: str
    addresses: list[str]
    port: Annotated[int, msgspec.Meta(ge=1, le=65535)] = 51820
    mtu: Annotated[int, msgspec.Meta(ge=576, le=65535)] = 1380


class EdgeTable(msgspec.Struct, frozen=True):
    """The `[edge]` table."""

    addresses: list[str]
    credentials: str
    ca: str = ""
    policy: EdgePolicy = EdgePolicy.LAST


class InterfacesTable(msgspec.Struct, frozen=True):
    """The `[interfaces]` table."""

    allow: list[str] = []
    deny: list[str] = []
    allow_networks: list[str] = []
    deny_networks: list[str] = []


class HomeTable(msgspec.Struct, frozen=True):
    """The `[home]` table."""

    pin: Annotated[int, msgspec.Meta(ge=0)] = 0
    ban: list[int] = []


class AgentFile(msgspec.Struct, frozen=True):
    """The whole file."""

    key: str
    relay_map: str
    port: Annotated[int, msgspec.Meta(ge=0, le=65535)] = 0
    control: str = "underpass.sock"
    wireguard: str | WireGuardTable = ""
    peer_relay_port: Annotated[int, msgspec.Meta(ge=0, le=65535)] | None = None
    port_search: bool = True
    socket_mark: Annotated[int, msgspec.Meta(ge=0, lt=1 << 32)] = 0
    state: str = "underpass.state"
    addresses: list[str] = []
    interfaces: InterfacesTable = InterfacesTable()
    home: HomeTable = HomeTable()
    edge: EdgeTable | None = None
    tunnel: dict[str, Any] | None = None
    peers: list[PeerTable] = []


_TABLES: Final[dict[str, type[msgspec.Struct]]] = {
    "wireguard": WireGuardTable,
    "edge": EdgeTable,
    "interfaces": InterfacesTable,
    "home": HomeTable,
    "peers": PeerTable,
}
_WORDS: Final = {
    "int": "a whole number",
    "float": "a number with a point",
    "str": "text in quotes",
    "bool": "true or false",
    "array": "a list",
    "object": "a table",
    "null": "absent",
}
_PLACE: Final = re.compile(r" - at `\$\.?(.*)`$")
_PEER: Final = re.compile(r"^peers\[(\d+)\]")


def parse_file(text: str) -> AgentFile:
    """Read the file's text. Raises TableError."""
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise TableError(f"is no TOML: {error}") from None
    _check_keys("", document, AgentFile)
    if isinstance(document.get("peers"), dict):
        raise TableError("peers: begin each peer's table with [[peers]], in double brackets")
    for name, kind in _TABLES.items():
        entry = document.get(name)
        if isinstance(entry, list):
            for number, table in enumerate(entry, 1):
                _check_keys(f"peer {number}: ", table, kind)
        else:
            _check_keys(f"{name}: ", entry, kind)
    try:
        return msgspec.convert(document, AgentFile)
    except msgspec.ValidationError as error:
        raise TableError(_explain(str(error))) from None


def _check_keys(where: str, table: object, kind: type[msgspec.Struct]) -> None:
    if not isinstance(table, dict):
        return
    for key in table:
        if key not in kind.__struct_fields__:
            raise TableError(f"{where}unknown key {key!r}{nearest(key, kind.__struct_fields__)}")


def _explain(problem: str) -> str:
    """A message of msgspec in words for people: "peer 2, relay: must be a whole number"."""
    place = _PLACE.search(problem)
    if place is not None:
        problem = problem[: place.start()]
    where = place[1] if place is not None else ""
    where = _PEER.sub(lambda match: f"peer {int(match[1]) + 1}", where).replace(".", ", ")
    text = re.sub(r"`(\w+)`", lambda match: _WORDS.get(match[1], match[1]), problem)
    text = re.sub(r"`(\w+) \| (\w+)`", lambda m: f"{_word(m[1])} or {_word(m[2])}", text)
    text = re.sub(r"^Object missing required field (\w+)", r"'\1' is missing", text)
    text = re.sub(r"^Expected (.*), got (.*)", r"must be \1, not \2", text)
    text = re.sub(r"^Expected ", "must be ", text)
    wrong = re.match(r"Invalid enum value '(.*)'$", text)
    if wrong is not None:
        text = f"{wrong[1]!r} is none{nearest(wrong[1], [policy.value for policy in EdgePolicy])}"
    return f"{where}: {text}" if where else text


def _word(name: str) -> str:
    return _WORDS.get(name, name)
