"""A tunnel's configuration as JSON (edge tunnel specification 12.2, 12.3).

The edge pushes one to connectors that are remotely managed; others report theirs to the edge.
Durations are whole seconds. What is not given is None here, so that a rule's options can be laid
over the global ones; the defaults are the connector's business.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Final
from urllib.parse import urlsplit

import msgspec
from msgspec import Meta, Struct

from traversal.wire.tunnel.errors import TunnelError
from traversal.wire.tunnel.path_patterns import compile_path_pattern

MAX_RULES: Final = 1000

Seconds = Annotated[int, Meta(ge=0, le=10**9)]
Count = Annotated[int, Meta(ge=0, le=2**31 - 1)]
Port = Annotated[int, Meta(ge=0, le=65535)]

_FIXED_SERVICES: Final = ("hello_world", "hello-world", "bastion", "socks-proxy")
_STATUS_SERVICE: Final = re.compile(r"http_status:[1-9][0-9]{2}")
_HTTP_SCHEMES: Final = ("http", "https", "ws", "wss")
_HOSTNAME: Final = re.compile(r"(\*\.)?[^\s*/:@]+|\*")


class IpRule(Struct, frozen=True):
    """Which destinations a SOCKS proxy may be asked for."""

    prefix: str
    allow: bool
    ports: tuple[Port, ...] = ()


class AccessRule(Struct, frozen=True, rename="camel"):
    """Requests must carry a token of this team."""

    required: bool = False
    team_name: str = ""
    aud_tag: tuple[str, ...] = ()
    environment: str = ""


class OriginRequest(Struct, frozen=True, rename="camel", omit_defaults=True):
    """How to talk to an origin; None: not said here."""

    connect_timeout: Seconds | None = None
    tls_timeout: Seconds | None = None
    tcp_keep_alive: Seconds | None = None
    no_happy_eyeballs: bool | None = None
    keep_alive_connections: Count | None = None
    keep_alive_timeout: Seconds | None = None
    http_host_header: str | None = None
    origin_server_name: str | None = None
    match_sni_to_host: bool | None = msgspec.field(default=None, name="matchSNItoHost")
    ca_pool: str | None = None
    no_tls_verify: bool | None = msgspec.field(default=None, name="noTLSVerify")
    disable_chunked_encoding: bool | None = None
    bastion_mode: bool | None = None
    proxy_address: str | None = None
    proxy_port: Port | None = None
    proxy_type: str | None = None
    ip_rules: tuple[IpRule, ...] | None = None
    http2_origin: bool | None = None
    access: AccessRule | None = None

    def over(self, base: OriginRequest) -> OriginRequest:
        """These options, completed by more general ones."""
        given = {
            name: value
            for name in self.__struct_fields__
            if (value := getattr(self, name)) is not None
        }
        return msgspec.structs.replace(base, **given)


class IngressRule(Struct, frozen=True, rename="camel", omit_defaults=True):
    """Requests for a host and path go to a service; the first rule that matches counts.

    Attributes:
        hostname: exact or `*.suffix`; empty: any.
        path: an expression that is searched for in the path (`path_patterns`); empty: any.
    """

    service: str
    hostname: str = ""
    path: str = ""
    origin_request: OriginRequest = OriginRequest()

    @property
    def is_catch_all(self) -> bool:
        """Whether it takes every request."""
        return self.hostname in ("", "*") and not self.path


class WarpRouting(Struct, frozen=True, rename="camel", omit_defaults=True):
    """TCP and UDP flows to private addresses."""

    connect_timeout: Seconds | None = None
    max_active_flows: Count | None = None
    tcp_keep_alive: Seconds | None = None


class Configuration(Struct, frozen=True, rename="camel", omit_defaults=True):
    """What a connector does with requests. Without rules it answers all with 503."""

    ingress: tuple[IngressRule, ...] = ()
    origin_request: OriginRequest = OriginRequest()
    warp_routing: WarpRouting = msgspec.field(default=WarpRouting(), name="warp-routing")

    def encode(self) -> bytes:
        """The document."""
        return msgspec.json.encode(self)

    def encode_report(self, flags: Mapping[str, str]) -> bytes:
        """The document with which a connector reports a configuration of its own."""
        document = msgspec.to_builtins(self)
        return msgspec.json.encode({"__configuration_flags": dict(flags), **document})


def parse_configuration(text: bytes | str) -> Configuration:
    """Read and check a document. Raises TunnelError that says what is wrong, and in which rule."""
    try:
        configuration = msgspec.json.decode(text, type=Configuration)
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise TunnelError(f"configuration: {error}") from None
    check_configuration(configuration)
    return configuration


def check_configuration(configuration: Configuration) -> None:
    """Raises TunnelError for rules that no connector would take."""
    rules = configuration.ingress
    if len(rules) > MAX_RULES:
        raise TunnelError(f"configuration: {len(rules)} rules, at most {MAX_RULES} are read")
    for number, rule in enumerate(rules, 1):
        problem = _problem(rule, is_last=number == len(rules))
        if problem:
            raise TunnelError(f"configuration: rule {number} ({rule.service}): {problem}")


def _problem(rule: IngressRule, *, is_last: bool) -> str:
    if is_last and not rule.is_catch_all:
        return "the last rule must have neither hostname nor path, so that it takes what is left"
    if not is_last and rule.is_catch_all:
        return "only the last rule may take everything; those after it would never be used"
    if rule.hostname and not _HOSTNAME.fullmatch(rule.hostname):
        return f'the hostname "{rule.hostname}" is neither a name nor "*." and a name'
    if rule.path:
        try:
            compile_path_pattern(rule.path)
        except TunnelError as error:
            return f'path "{rule.path}": {error}'
    return _service_problem(rule.service)


def _service_problem(service: str) -> str:
    if service in _FIXED_SERVICES or _STATUS_SERVICE.fullmatch(service):
        return ""
    scheme, colon, rest = service.partition(":")
    if scheme in ("unix", "unix+tls") and colon:
        return "" if rest else "there is no path after unix:"
    try:
        url = urlsplit(service)
        has_host = bool(url.hostname) and (url.port is None or url.port > 0)
    except ValueError:
        has_host = False
    if not has_host:
        return "the service is not scheme://host:port, unix:path, http_status:code or a known name"
    if scheme in _HTTP_SCHEMES and (url.path not in ("", "/") or url.query):
        return "the service may have no path"
    return ""
