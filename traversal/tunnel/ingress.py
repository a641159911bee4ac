"""Ingress rules: which request goes to which service (edge tunnel specification 12.2). Pure.

The first rule whose host and path match decides. A host is exact, or `*.suffix` for all names
below, in either spelling where it is not ASCII (punycode). A path is an expression searched for
anywhere in the request's path. The last rule takes everything, and only the last.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Self
from urllib.parse import unquote

import idna

from traversal.tunnel.origin_options import OriginOptions
from traversal.tunnel.services import (
    BastionService,
    Service,
    SocksService,
    StatusService,
    TcpService,
    parse_service,
)
from traversal.wire.tunnel.configuration import Configuration, IngressRule, check_configuration
from traversal.wire.tunnel.errors import TunnelError
from traversal.wire.tunnel.path_patterns import PathPattern, compile_path_pattern


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule, ready for use.

    Attributes:
        hostname: in lower case and ASCII; empty for every host.
        pattern: None for every path.
    """

    hostname: str
    pattern: PathPattern | None
    service: Service
    options: OriginOptions

    def matches(self, host: str, path: str) -> bool:
        """Whether the rule takes a request; `host` as `normalized_host` returns it."""
        if self.hostname.startswith("*."):
            if not host.endswith(self.hostname[1:]):
                return False
        elif self.hostname and host != self.hostname:
            return False
        return self.pattern is None or bool(self.pattern.search(path))


_NOTHING: Final = Rule("", None, StatusService(503), OriginOptions())
"""What takes requests where there are no rules."""


@dataclass(frozen=True, slots=True)
class Ingress:
    """All rules, in order."""

    rules: tuple[Rule, ...] = ()

    @classmethod
    def of(cls, configuration: Configuration) -> Self:
        """The rules of a configuration. Raises TunnelError that names the rule and the key."""
        rules = []
        for number, rule in enumerate(configuration.ingress, 1):
            try:
                rules.append(_rule(rule, configuration))
            except TunnelError as error:
                raise TunnelError(f"ingress, rule {number}, {error}") from None
        check_configuration(configuration)
        return cls(tuple(rules))

    def match(self, authority: str, target: str) -> Rule:
        """The rule for a request, by its host (a port is ignored) and its path (with a query)."""
        host = normalized_host(authority)
        path = unquote(target.partition("?")[0])
        return next((rule for rule in self.rules if rule.matches(host, path)), _NOTHING)


def normalized_host(authority: str) -> str:
    """A request's host without its port, comparable with rules."""
    if authority.startswith("["):
        return authority[1:].partition("]")[0].lower()
    return authority.partition(":")[0].lower().removesuffix(".")


def _rule(rule: IngressRule, configuration: Configuration) -> Rule:
    options = OriginOptions.of(rule.origin_request.over(configuration.origin_request))
    service = parse_service(rule.service)
    if options.is_bastion:
        service = BastionService()
    elif options.is_socks and isinstance(service, TcpService):
        service = SocksService()
    return Rule(
        hostname=_hostname(rule.hostname),
        pattern=compile_path_pattern(rule.path) if rule.path else None,
        service=service,
        options=options,
    )


def _hostname(text: str) -> str:
    if text in ("", "*"):
        return ""
    name = text.removeprefix("*.")
    ascii_name = name.lower().removesuffix(".")
    if not name.isascii():
        try:
            ascii_name = idna.encode(name, uts46=True).decode()
        except idna.IDNAError as error:
            raise TunnelError(f"hostname: {text!r}: {error}") from None
    return ("*." if text.startswith("*.") else "") + ascii_name
