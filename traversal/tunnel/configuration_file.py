"""The part of a connector's file that a pushed configuration could say as well: `ingress`,
`originRequest`, `warp-routing` (edge tunnel specification 12.2). Pure.

Names are those of the documents, cloudflared's. Unlike in a document, which may come from somebody
newer than us, an unknown name is an error, and durations may be texts like `1m30s`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, TypeVar

import msgspec

from traversal.tunnel.checking import check_keys, whole_seconds
from traversal.wire.tunnel.configuration import (
    AccessRule,
    Configuration,
    IngressRule,
    IpRule,
    OriginRequest,
    WarpRouting,
)
from traversal.wire.tunnel.errors import TunnelError

_T = TypeVar("_T")

_DURATIONS: Final = frozenset({"connectTimeout", "tlsTimeout", "tcpKeepAlive", "keepAliveTimeout"})
CONFIGURATION_KEYS: Final = ("ingress", "originRequest", "warp-routing")


def read_configuration(tables: dict[str, Any]) -> Configuration:
    """From TOML tables under `CONFIGURATION_KEYS`. Raises TunnelError, naming rule and key.

    `traversal.tunnel.ingress.Ingress.of` checks what the rules mean.
    """
    rules = tables.get("ingress", [])
    if not isinstance(rules, list):
        raise TunnelError("ingress: write [[ingress]], once for each rule")
    return Configuration(
        tuple(_rule(f"ingress, rule {number}", rule) for number, rule in enumerate(rules, 1)),
        _origin_request("originRequest", tables.get("originRequest", {})),
        _struct("warp-routing", tables.get("warp-routing", {}), WarpRouting),
    )


def _rule(where: str, table: object) -> IngressRule:
    options: list[OriginRequest] = []

    def read_options(given: dict[str, Any]) -> None:
        if "originRequest" in given:
            table = given.pop("originRequest")
            options.append(_origin_request(f"{where}, originRequest", table))

    rule = _struct(where, table, IngressRule, read_options)
    return msgspec.structs.replace(rule, origin_request=options[0]) if options else rule


def _origin_request(where: str, table: object) -> OriginRequest:
    def check(given: dict[str, Any]) -> None:
        rules = given.get("ipRules", [])
        for number, rule in enumerate(rules if isinstance(rules, list) else [], 1):
            check_keys(f"{where}, ipRules, rule {number}", rule, _keys(IpRule))
        if "access" in given:
            check_keys(f"{where}, access", given["access"], _keys(AccessRule))

    return _struct(where, table, OriginRequest, check)


def _struct(
    where: str,
    table: object,
    kind: type[_T],
    prepare: Callable[[dict[str, Any]], None] = lambda given: None,
) -> _T:
    given = check_keys(where, table, _keys(kind))
    prepare(given)
    for key in _DURATIONS & given.keys():
        given[key] = whole_seconds(where, key, given[key])
    try:
        return msgspec.convert(given, kind)
    except msgspec.ValidationError as error:
        reason, _, place = str(error).partition(" - at `$")
        place = place.rstrip("`").lstrip(".")
        raise TunnelError(f"{where}{', ' + place if place else ''}: {reason}") from None


def _keys(kind: type) -> tuple[str, ...]:
    return tuple(field.encode_name for field in msgspec.structs.fields(kind))
