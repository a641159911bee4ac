"""The relay map: which relays exist and how to reach them (DERP specification 14).

`RelayMap` > `Region` > `RelayNode`. A map is read from Tailscale's DERPMap JSON and written back
as that JSON or as the YAML file that headscale reads. The values are typed and validated when
they are built, so a map that exists is a map that can be used: ports are effective ports, an
address family is an address, "resolve the host name" or "do not use", and every mistake is named
by region, node and field together with what to write instead.

Stricter than Tailscale in one point: an `IPv4` or `IPv6` text that is neither empty, nor an
address of that family, nor `none` is refused. Tailscale takes any such text as `none`, which
turns a typing mistake into a relay that one family silently never reaches.

Everything here is pure: host names are not resolved.
"""

from __future__ import annotations

import enum
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from ipaddress import AddressValueError, IPv4Address, IPv6Address, ip_address
from types import MappingProxyType
from typing import Final, Literal, Self, TypeVar

DEFAULT_DERP_PORT: Final = 443
DEFAULT_STUN_PORT: Final = 3478
MAX_REGION_ID: Final = 2**53 - 1
"""The largest region id: the largest integer that every JSON reader keeps exact."""

_PIN_PREFIX: Final = "sha256-raw:"
_PIN = re.compile(r"[0-9a-f]{64}")
_HOST_NAME = re.compile(r"(?=.{1,253}\.?$)[A-Za-z0-9_-]{1,63}(\.[A-Za-z0-9_-]{1,63})*\.?")


class RelayMapError(ValueError):
    """A relay map is wrong. The text names region, node and field, and what to write instead."""


class Dial(enum.Enum):
    """How to find the address of one family when the map holds no literal address."""

    BY_NAME = "resolve the host name"
    NEVER = "do not use this address family"


Family = Literal[4, 6]
DialAddress = IPv4Address | IPv6Address | Dial
_AddressT = TypeVar("_AddressT", IPv4Address, IPv6Address)


@dataclass(frozen=True, slots=True)
class CertificateName:
    """The certificate must chain to a trusted root and be valid for `name` (or IP address)."""

    name: str


@dataclass(frozen=True, slots=True)
class CertificatePin:
    """Exactly one certificate, meta certificates aside, whose DER has this SHA-256.

    No root is needed. Its validity period counts, and its name if a server name was sent.
    """

    sha256: bytes


@dataclass(frozen=True, slots=True)
class CertificateUnchecked:
    """Any certificate will do: for tests only."""


CertificatePolicy = CertificateName | CertificatePin | CertificateUnchecked


@dataclass(frozen=True, slots=True)
class RelayNode:
    """One server: a relay, a STUN server, or both.

    `name` is unique over the whole map and by convention the region id and a letter; it is not
    a host name. `derp_port` and `stun_port` are effective ports, `None` meaning that the node has
    no such service. `can_port_80` says that plain HTTP on port 80 answers captive portal checks.
    `stun_test_ip` replaces the address for STUN only, for tests. Raises RelayMapError.
    """

    name: str
    region_id: int
    host_name: str
    certificate_name: str = ""
    ipv4: IPv4Address | Dial = Dial.BY_NAME
    ipv6: IPv6Address | Dial = Dial.BY_NAME
    stun_port: int | None = DEFAULT_STUN_PORT
    stun_only: bool = False
    derp_port: int | None = DEFAULT_DERP_PORT
    insecure_for_tests: bool = False
    stun_test_ip: IPv4Address | IPv6Address | None = None
    can_port_80: bool = False

    def __post_init__(self) -> None:
        _check_region_id(self.region_id, "node " + json.dumps(self.name))
        where = _node_place(self.region_id, self.name)
        if not self.name or not self.name.isprintable():
            raise RelayMapError(
                f"{where}, Name: must be printable text, for example {self.region_id}a"
            )
        _check_host(self.host_name, f"{where}, HostName")
        if self.certificate_name.startswith(_PIN_PREFIX):
            if not _PIN.fullmatch(self.certificate_name, len(_PIN_PREFIX)):
                raise RelayMapError(
                    f"{where}, CertName: a pin is {_PIN_PREFIX} and 64 hex digits in lower case "
                    "(Tailscale's clients never match capitals)"
                )
        elif self.certificate_name:
            _check_host(self.certificate_name, f"{where}, CertName")
        for port, what in ((self.stun_port, "STUNPort"), (self.derp_port, "DERPPort")):
            if port is not None and not 1 <= port <= 65535:
                raise RelayMapError(
                    f"{where}, {what}: {port} is no port; write 1 to 65535, "
                    "0 for the default or -1 for none"
                )

    @property
    def is_relay(self) -> bool:
        """Whether the node speaks DERP."""
        return not self.stun_only and self.derp_port is not None

    @property
    def server_name(self) -> str | None:
        """The name for TLS SNI: the host name, `None` if that is an IP address."""
        return self.host_name if self._host_address is None else None

    @property
    def certificate_policy(self) -> CertificatePolicy:
        """How to judge the node's TLS certificate (DERP specification 15.2).

        A certificate name or pin wins over `insecure_for_tests`: the map's author gave a way
        to check, so it is used.
        """
        if self.certificate_name.startswith(_PIN_PREFIX):
            return CertificatePin(bytes.fromhex(self.certificate_name[len(_PIN_PREFIX) :]))
        if self.certificate_name:
            return CertificateName(self.certificate_name)
        if self.insecure_for_tests:
            return CertificateUnchecked()
        return CertificateName(self.host_name)

    def dial_address(self, family: Family) -> DialAddress:
        """Where to open the relay connection in one address family (DERP specification 15.1)."""
        address: DialAddress = self.ipv4 if family == 4 else self.ipv6
        host = self._host_address
        if address is Dial.BY_NAME and host is not None:
            return host if host.version == family else Dial.NEVER
        return address

    def stun_dial_address(self, family: Family) -> DialAddress:
        """Where to send STUN requests in one address family; `Dial.NEVER` without STUN."""
        if self.stun_port is None:
            return Dial.NEVER
        if self.stun_test_ip is not None:
            return self.stun_test_ip if self.stun_test_ip.version == family else Dial.NEVER
        return self.dial_address(family)

    @property
    def _host_address(self) -> IPv4Address | IPv6Address | None:
        return _address_or_none(self.host_name)


@dataclass(frozen=True, slots=True)
class Region:
    """Servers at one place; `nodes` in order of preference. Raises RelayMapError.

    `avoid` (deprecated) keeps the region from becoming a home unless it already is one.
    `no_measure_no_home` keeps it from being measured and from becoming a home; it is connected
    only to reach a peer whose home it is.
    """

    region_id: int
    code: str
    name: str
    nodes: tuple[RelayNode, ...]
    latitude: float | None = None
    longitude: float | None = None
    avoid: bool = False
    no_measure_no_home: bool = False

    def __post_init__(self) -> None:
        where = _region_place(self.region_id)
        _check_region_id(self.region_id, "a region")
        for text, what in ((self.code, "RegionCode"), (self.name, "RegionName")):
            if not text.isprintable():
                raise RelayMapError(f"{where}, {what}: must be printable text on one line")
        if not self.nodes:
            raise RelayMapError(
                f"{where}, Nodes: is empty; list a server, or write null for the whole region "
                "to remove it"
            )
        for node in self.nodes:
            if node.region_id != self.region_id:
                raise RelayMapError(
                    f"{_node_place(self.region_id, node.name)}, RegionID: is {node.region_id}; "
                    f"write {self.region_id}, the id of its region"
                )
        for value, limit, what in (
            (self.latitude, 90, "Latitude"),
            (self.longitude, 180, "Longitude"),
        ):
            if value is not None and not (math.isfinite(value) and abs(value) <= limit):
                raise RelayMapError(
                    f"{where}, {what}: {value} is outside -{limit} to {limit} degrees"
                )

    @property
    def may_be_home(self) -> bool:
        """Whether a node that has no home yet may choose this region."""
        return not (self.avoid or self.no_measure_no_home)


def _no_regions() -> Mapping[int, Region]:
    return MappingProxyType({})


def _no_scores() -> Mapping[int, float]:
    return MappingProxyType({})


@dataclass(frozen=True, slots=True)
class RelayMap:
    """All regions by id, in ascending order, read-only. Raises RelayMapError.

    `removed_region_ids` are the regions that the map gives as null: a map of an administrator
    removes defaults so. `home_scores` multiply a region's measured latency before a home is
    chosen: below 1 attracts, above 1 repels.
    """

    regions: Mapping[int, Region] = field(default_factory=_no_regions)
    removed_region_ids: frozenset[int] = frozenset()
    home_scores: Mapping[int, float] = field(default_factory=_no_scores)
    omit_default_regions: bool = False

    def __post_init__(self) -> None:
        owners: dict[str, int] = {}
        for key, region in self.regions.items():
            if key in self.removed_region_ids:
                raise RelayMapError(f"{_region_place(key)}: is both listed and removed; do one")
            if region.region_id != key:
                raise RelayMapError(
                    f"{_region_place(key)}, RegionID: is {region.region_id}; "
                    f"write {key}, the region's key in the map"
                )
            for node in region.nodes:
                if node.name in owners:
                    raise RelayMapError(
                        f"{_node_place(key, node.name)}, Name: is also a node of region "
                        f"{owners[node.name]}; node names are unique over the whole map"
                    )
                owners[node.name] = key
        for region_id, score in self.home_scores.items():
            if not (math.isfinite(score) and score > 0):
                raise RelayMapError(
                    f"{_region_place(region_id)}, HomeParams.RegionScore: {score} must be above 0"
                )
        # The caller keeps his dictionaries: a map never changes after it was checked.
        object.__setattr__(self, "regions", MappingProxyType(dict(sorted(self.regions.items()))))
        object.__setattr__(self, "home_scores", MappingProxyType(dict(self.home_scores)))

    @classmethod
    def parse(cls, text: str | bytes) -> Self:
        """Read DERPMap JSON. Raises RelayMapError, whatever the text.

        Field names match in any case, unknown fields are ignored, a null field counts as absent.
        Scores of 0 and below are ignored, as the specification demands.
        """
        try:
            if isinstance(text, bytes):
                text = text.decode()
            top = json.loads(text, parse_constant=_refuse_constant)
        except (ValueError, RecursionError) as error:
            raise RelayMapError(f"relay map: is not valid JSON in UTF-8: {error}") from None
        fields = _Fields(top, "relay map")
        regions: dict[int, Region] = {}
        removed: set[int] = set()
        for key, value in fields.table("Regions"):
            region_id = _region_key(key, "relay map, Regions")
            if value is None:
                removed.add(region_id)
            else:
                regions[region_id] = _parse_region(region_id, value)
        home = _Fields(fields.get("HomeParams") or {}, "relay map, HomeParams")
        scores = {
            _region_key(key, "relay map, HomeParams.RegionScore"): _number(
                value, f"{_region_place(key)}, HomeParams.RegionScore"
            )
            for key, value in home.table("RegionScore")
        }
        return cls(
            regions=regions,
            removed_region_ids=frozenset(removed),
            home_scores={region_id: score for region_id, score in scores.items() if score > 0},
            omit_default_regions=fields.flag("OmitDefaultRegions"),
        )

    def nodes(self) -> Iterator[RelayNode]:
        """Every node of every region, regions in ascending order."""
        for region in self.regions.values():
            yield from region.nodes

    def home_score(self, region_id: int) -> float:
        """The factor for a region's latency when a home is chosen; 1 unless the map says more."""
        return self.home_scores.get(region_id, 1.0)

    def to_json(self, *, indent: int | None = 2) -> str:
        """The map as DERPMap JSON, as Tailscale's clients and servers read it."""
        table: dict[str, object] = {}
        if self.home_scores:
            table["HomeParams"] = {
                "RegionScore": {str(key): score for key, score in self.home_scores.items()}
            }
        table["Regions"] = {str(key): value for key, value in self._region_tables()}
        if self.omit_default_regions:
            table["omitDefaultRegions"] = True
        return json.dumps(table, indent=indent, ensure_ascii=False)

    def to_headscale_yaml(self) -> str:
        """The map as a file for headscale's `derp.paths` (its name must end in .yaml or .yml).

        headscale reads the regions of such a file and nothing else: scores and
        `omit_default_regions` have no place in it. Whether Tailscale's own regions are used is
        decided by `derp.urls` of its configuration.
        """
        lines = ["regions:" if self.regions or self.removed_region_ids else "regions: {}"]
        for key, value in self._region_tables():
            if value is None:
                lines.append(f"  {key}: null")
                continue
            lines.append(f"  {key}:")
            for name, item in value.items():
                if not isinstance(item, list):
                    lines.append(f"    {name.lower()}: {_yaml_scalar(item)}")
                    continue
                lines.append(f"    {name.lower()}:")
                for node in item:
                    pairs = [f"{field.lower()}: {_yaml_scalar(it)}" for field, it in node.items()]
                    lines.append("      - " + "\n        ".join(pairs))
        return "\n".join(lines) + "\n"

    def _region_tables(self) -> Iterator[tuple[int, dict[str, object] | None]]:
        for key in sorted({*self.regions, *self.removed_region_ids}):
            region = self.regions.get(key)
            yield key, None if region is None else _region_table(region)


# Reading. Only these functions see text that somebody else wrote.


class _Fields:
    """One JSON object whose field names match in any case, as Go's reader matches them."""

    def __init__(self, value: object, where: str) -> None:
        if not isinstance(value, dict):
            raise RelayMapError(f"{where}: must be a JSON object, this is {_kind(value)}")
        self._fields = {str(name).lower(): item for name, item in value.items()}
        self._where = where

    def get(self, name: str) -> object:
        return self._fields.get(name.lower())

    def table(self, name: str) -> list[tuple[str, object]]:
        value = self.get(name)
        if value is None:
            return []
        if not isinstance(value, dict):
            raise RelayMapError(
                f"{self._where}, {name}: must be a JSON object, this is {_kind(value)}"
            )
        return list(value.items())

    def text(self, name: str) -> str:
        value = self.get(name)
        if value is None:
            return ""
        if not isinstance(value, str):
            raise RelayMapError(f"{self._where}, {name}: must be a string, this is {_kind(value)}")
        return value

    def flag(self, name: str) -> bool:
        value = self.get(name)
        if value is None:
            return False
        if not isinstance(value, bool):
            raise RelayMapError(
                f"{self._where}, {name}: must be true or false, this is {_kind(value)}"
            )
        return value

    def integer(self, name: str) -> int:
        value = self.get(name)
        if value is None:
            return 0
        if not isinstance(value, int) or isinstance(value, bool):
            raise RelayMapError(
                f"{self._where}, {name}: must be a whole number, this is {_kind(value)}"
            )
        return value

    def number(self, name: str) -> float | None:
        value = self.get(name)
        return None if value is None else _number(value, f"{self._where}, {name}")

    def port(self, name: str, default: int) -> int | None:
        value = self.integer(name)
        return {0: default, -1: None}.get(value, value)


def _parse_region(region_id: int, value: object) -> Region:
    where = _region_place(region_id)
    fields = _Fields(value, where)
    own_id = fields.integer("RegionID")
    if own_id != region_id:
        raise RelayMapError(
            f"{where}, RegionID: is {own_id or 'missing'}; write {region_id}, "
            "the region's key in the map"
        )
    nodes = fields.get("Nodes")
    if nodes is None:
        nodes = []
    if not isinstance(nodes, list):
        raise RelayMapError(f"{where}, Nodes: must be a list, this is {_kind(nodes)}")
    return Region(
        region_id=region_id,
        code=fields.text("RegionCode"),
        name=fields.text("RegionName"),
        nodes=tuple(_parse_node(region_id, place, node) for place, node in enumerate(nodes)),
        latitude=fields.number("Latitude"),
        longitude=fields.number("Longitude"),
        avoid=fields.flag("Avoid"),
        no_measure_no_home=fields.flag("NoMeasureNoHome"),
    )


def _parse_node(region_id: int, place: int, value: object) -> RelayNode:
    where = f"{_region_place(region_id)}, node {place + 1}"
    name = _Fields(value, where).text("Name")
    if name:
        where = _node_place(region_id, name)
    fields = _Fields(value, where)
    own_id = fields.integer("RegionID")
    if own_id != region_id:
        raise RelayMapError(
            f"{where}, RegionID: is {own_id or 'missing'}; write {region_id}, the id of its region"
        )
    test_ip = fields.text("STUNTestIP")
    stun_test_ip = _address_or_none(test_ip)
    if test_ip and stun_test_ip is None:
        raise RelayMapError(f"{where}, STUNTestIP: {test_ip!r} is no IP address")
    return RelayNode(
        name=name,
        region_id=region_id,
        host_name=fields.text("HostName"),
        certificate_name=fields.text("CertName"),
        ipv4=_parse_family(fields.text("IPv4"), IPv4Address, "IPv4", where),
        ipv6=_parse_family(fields.text("IPv6"), IPv6Address, "IPv6", where),
        stun_port=fields.port("STUNPort", DEFAULT_STUN_PORT),
        stun_only=fields.flag("STUNOnly"),
        derp_port=fields.port("DERPPort", DEFAULT_DERP_PORT),
        insecure_for_tests=fields.flag("InsecureForTests"),
        stun_test_ip=stun_test_ip,
        can_port_80=fields.flag("CanPort80"),
    )


def _parse_family(
    text: str, kind: Callable[[str], _AddressT], family: str, where: str
) -> _AddressT | Dial:
    if not text:
        return Dial.BY_NAME
    if text.lower() == "none":
        return Dial.NEVER
    try:
        return kind(text)
    except AddressValueError:
        raise RelayMapError(
            f"{where}, {family}: {text!r} is no {family} address; write one, leave the field out "
            'to resolve the host name, or write "none" to leave this address family unused'
        ) from None


def _region_key(key: str, where: str) -> int:
    # At most 16 digits, so that the conversion is cheap whatever the text.
    if len(key) > 16 or not (key.isascii() and key.isdigit()) or str(int(key)) != key:
        raise RelayMapError(f"{where}: the key {key[:40]!r} is no region id; write one like 900")
    _check_region_id(int(key), where)
    return int(key)


def _number(value: object, where: str) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise RelayMapError(f"{where}: must be a number, this is {_kind(value)}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise RelayMapError(f"{where}: is too large a number")
    return number


def _refuse_constant(name: str) -> object:
    raise ValueError(f"{name} is no JSON")


def _kind(value: object) -> str:
    if value is None:
        return "null"
    names = {bool: "a boolean", str: "a string", list: "a list", dict: "an object"}
    return names.get(type(value), "a number")


# Checking.


def _check_region_id(region_id: int, where: str) -> None:
    if not 1 <= region_id <= MAX_REGION_ID:
        raise RelayMapError(
            f"{where}: {region_id} is no region id; write 1 to 2^53 - 1, "
            "900 to 999 for regions of your own"
        )


def _check_host(text: str, where: str) -> None:
    if not (_HOST_NAME.fullmatch(text) or _address_or_none(text) is not None):
        raise RelayMapError(
            f"{where}: {text!r} is no DNS name or IP address; write it without scheme, port or "
            "brackets, international names in their xn-- form"
        )


def _address_or_none(text: str) -> IPv4Address | IPv6Address | None:
    try:
        return ip_address(text)
    except ValueError:
        return None


def _region_place(region_id: int | str) -> str:
    return f"region {region_id}"


def _node_place(region_id: int, name: str) -> str:
    return f"region {region_id}, node {name!r}"


# Writing. Field names and their order are Tailscale's; what has its default value is left out.


def _region_table(region: Region) -> dict[str, object]:
    table: dict[str, object] = {
        "RegionID": region.region_id,
        "RegionCode": region.code,
        "RegionName": region.name,
    }
    optional = {
        "Latitude": region.latitude,
        "Longitude": region.longitude,
        "Avoid": region.avoid,
        "NoMeasureNoHome": region.no_measure_no_home,
    }
    table |= {name: value for name, value in optional.items() if value}
    table["Nodes"] = [_node_table(node) for node in region.nodes]
    return table


def _node_table(node: RelayNode) -> dict[str, object]:
    optional = {
        "CertName": node.certificate_name,
        "IPv4": _family_text(node.ipv4),
        "IPv6": _family_text(node.ipv6),
        "STUNPort": _port_number(node.stun_port, DEFAULT_STUN_PORT),
        "STUNOnly": node.stun_only,
        "DERPPort": _port_number(node.derp_port, DEFAULT_DERP_PORT),
        "InsecureForTests": node.insecure_for_tests,
        "STUNTestIP": "" if node.stun_test_ip is None else str(node.stun_test_ip),
        "CanPort80": node.can_port_80,
    }
    return {
        "Name": node.name,
        "RegionID": node.region_id,
        "HostName": node.host_name,
        **{name: value for name, value in optional.items() if value},
    }


def _family_text(address: DialAddress) -> str:
    if isinstance(address, Dial):
        return "none" if address is Dial.NEVER else ""
    return str(address)


def _port_number(port: int | None, default: int) -> int:
    if port is None:
        return -1
    return 0 if port == default else port


def _yaml_scalar(value: object) -> str:
    # A JSON scalar is a YAML scalar, and quotes keep YAML from reading `no` or `1e3` as it likes.
    return json.dumps(value, ensure_ascii=False)
