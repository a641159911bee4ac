"""The relay's one configuration: frozen, typed, checked before anything starts.

`Config.load` reads a TOML file, then environment variables (`UNDERPASS_RELAY_LIMITS_CONNECTIONS`
for `limits.connections`), then command-line overrides; later ones win. Every mistake is reported
at once, with the line or variable it stands in. A relative path in the file starts at the file's
directory. The keys are in `relay.config_schema`.
"""

from __future__ import annotations

import difflib
import ipaddress
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple, TypeVar
from urllib.parse import urlsplit

import msgspec
from msgspec import Struct, field

from relay.certificate_files import is_hostname
from relay.config_schema import (
    AcmeConfig,
    AdminConfig,
    AdmissionConfig,
    BootstrapDnsConfig,
    EdgeConfig,
    FilePath,
    HookConfig,
    LimitsConfig,
    ListenAddress,
    ListenConfig,
    LogConfig,
    MeshConfig,
    MeshPeer,
    ProxyConfig,
    Section,
    ServerConfig,
    TlsConfig,
    TokensConfig,
)
from relay.config_sources import (
    ConfigError,
    Setting,
    from_environment,
    from_overrides,
    from_toml_file,
)
from relay.derper_files import read_rate_config

__all__ = [
    "Config",
    "ConfigError",
    "Reload",
    "diff_reload",
    "AcmeConfig",
    "AdminConfig",
    "AdmissionConfig",
    "BootstrapDnsConfig",
    "EdgeConfig",
    "HookConfig",
    "LimitsConfig",
    "ListenConfig",
    "LogConfig",
    "MeshConfig",
    "ProxyConfig",
    "ServerConfig",
    "TlsConfig",
    "TokensConfig",
    "ListenAddress",
    "MeshPeer",
]

_S = TypeVar("_S", bound=Struct)

_DEV: Final[Mapping[str, object]] = {
    "server.hostname": "127.0.0.1",
    "server.key_file": "",
    "listen.derp": ["127.0.0.1:0"],
    "listen.http": "127.0.0.1:0",
    "listen.stun": "127.0.0.1:0",
    "listen.admin": "127.0.0.1:0",
    "tls.mode": "self-signed",
    "tls.directory": "",
}


class Config(Section, frozen=True):
    """Everything the relay was told. Sections as in the TOML file."""

    server: ServerConfig = field(default_factory=ServerConfig)
    listen: ListenConfig = field(default_factory=ListenConfig)
    tls: TlsConfig = field(default_factory=TlsConfig)
    proxy: ProxyConfig = field(default_factory=ProxyConfig)
    admission: AdmissionConfig = field(default_factory=AdmissionConfig)
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    bootstrap_dns: BootstrapDnsConfig = field(default_factory=BootstrapDnsConfig)
    edge: EdgeConfig = field(default_factory=EdgeConfig)
    admin: AdminConfig = field(default_factory=AdminConfig)
    log: LogConfig = field(default_factory=LogConfig)

    @classmethod
    def load(
        cls,
        path: Path | None,
        env: Mapping[str, str],
        overrides: Mapping[str, object],
    ) -> Config:
        """The configuration from a file (or none), the environment, and dotted overrides.

        An override's value may be text, as typed, or the value itself. Raises ConfigError.
        """
        return _build(
            {
                **(from_toml_file(path) if path is not None else {}),
                **from_environment(env, _FIELDS),
                **from_overrides(overrides),
            }
        )

    @classmethod
    def dev(cls, overrides: Mapping[str, object] = types.MappingProxyType({})) -> Config:
        """A relay to try things with: loopback, free ports, key and certificate in memory.

        Raises ConfigError for wrong overrides.
        """
        return _build({**from_overrides(_DEV), **from_overrides(overrides)})


class Reload(NamedTuple):
    """What a changed configuration means for a running relay."""

    config: Config
    """What holds from now on: the new values where they can change, else the old."""
    applied: tuple[str, ...]
    needs_restart: tuple[str, ...]


# The keys, or whole sections, whose new value counts without a restart. Everything else needs
# sockets, tasks or processes that only a start makes.
RELOADABLE: Final = (
    "server.home_page",
    "server.drain_seconds",
    "proxy",
    "admission",
    "limits",
    "bootstrap_dns",
    "admin.token_file",
    "log.level",
)


def diff_reload(old: Config, new: Config) -> Reload:
    """Compare two configurations by dotted keys, each in sorted order."""
    before, after = dict(_flatten(old)), dict(_flatten(new))
    changed = sorted(key for key in before if before[key] != after[key])
    applied = tuple(key for key in changed if _is_reloadable(key))
    needs_restart = tuple(key for key in changed if not _is_reloadable(key))
    values = {key: after[key] if _is_reloadable(key) else before[key] for key in before}
    return Reload(_assemble(Config, values), applied, needs_restart)


def _is_reloadable(key: str) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in RELOADABLE)


def _fields(section: type[Struct], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for info in msgspec.structs.fields(section):
        if isinstance(info.type, type) and issubclass(info.type, Struct):
            yield from _fields(info.type, f"{prefix}{info.name}.")
        else:
            yield prefix + info.name, info.type


_FIELDS: Final[Mapping[str, Any]] = dict(_fields(Config))
"""Every dotted key and the type of its value."""


def _flatten(section: Struct, prefix: str = "") -> Iterator[tuple[str, object]]:
    for name in section.__struct_fields__:
        value = getattr(section, name)
        if isinstance(value, Section):
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _assemble(section: type[_S], values: Mapping[str, object], prefix: str = "") -> _S:
    arguments: dict[str, object] = {}
    for info in msgspec.structs.fields(section):
        key = prefix + info.name
        if isinstance(info.type, type) and issubclass(info.type, Struct):
            arguments[info.name] = _assemble(info.type, values, f"{key}.")
        elif key in values:
            arguments[info.name] = values[key]
    return section(**arguments)


def _build(settings: Mapping[str, Setting]) -> Config:
    problems: list[str] = []
    values: dict[str, object] = {}
    for key, setting in settings.items():
        if key not in _FIELDS:
            problems.append(f"{setting.origin}: {_unknown(key)}")
            continue
        try:
            values[key] = _convert(_FIELDS[key], setting)
        except ValueError as error:
            problems.append(f"{setting.origin}: {key}: {error}")
    if problems:
        raise ConfigError(*problems)
    config = _assemble(Config, values)
    for key, problem in _contradictions(config):
        origin = f"{settings[key].origin}: " if key in settings else ""
        problems.append(f"{origin}{key}: {problem}")
    if problems:
        raise ConfigError(*problems)
    if path := config.limits.rate_config_file:
        rate = read_rate_config(Path(path))
        limits = msgspec.structs.replace(
            config.limits,
            client_bytes_per_second=rate.bytes_per_second,
            client_burst_bytes=rate.burst_bytes,
        )
        config = msgspec.structs.replace(config, limits=limits)
    return config


def _unknown(key: str) -> str:
    if any(known.startswith(f"{key}.") for known in _FIELDS):
        return f"{key} is a section, not a value; write [{key}] above its keys"
    leaf = key.rpartition(".")[2]
    same_leaf = [known for known in _FIELDS if known.rpartition(".")[2] == leaf]
    near = same_leaf or difflib.get_close_matches(key, _FIELDS, n=1, cutoff=0.6)
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"there is no key {key}{hint}"


def _convert(wanted: Any, setting: Setting) -> object:
    """The value as the type of its key. Raises ValueError that says what is expected."""
    value = setting.value
    arguments = typing.get_args(wanted)
    if type(None) in arguments:
        if value == "off":
            return None
        wanted = next(kind for kind in arguments if kind is not type(None))
    if typing.get_origin(wanted) is tuple:
        if isinstance(value, str):
            parts = [] if value == "off" else value.split(",") if setting.text else [value]
            value = [part.strip() for part in parts if part.strip()]
        parse = _parser(arguments[0])
        return tuple(parse(item) for item in _plain(value, tuple[str, ...], setting))
    if wanted is ListenAddress:
        return ListenAddress.parse(_plain(value, str, setting))
    if wanted is FilePath:
        path = _plain(value, str, setting)
        return str(setting.base / path) if path else path
    if typing.get_origin(wanted) is Literal and value not in typing.get_args(wanted):
        known = ", ".join(f'"{option}"' for option in typing.get_args(wanted))
        raise ValueError(f"expected one of {known}, got {value!r}")
    return _plain(value, wanted, setting)


def _parser(kind: Any) -> Callable[[str], object]:
    if kind is ListenAddress:
        return ListenAddress.parse
    if kind is MeshPeer:
        return MeshPeer.parse
    return str if kind is str else ipaddress.ip_network


def _plain(value: object, wanted: Any, setting: Setting) -> Any:
    try:
        return msgspec.convert(value, wanted, strict=not setting.text)
    except msgspec.ValidationError as error:
        raise ValueError(str(error)) from None


def _contradictions(config: Config) -> Iterator[tuple[str, str]]:
    """Keys that are right by themselves and wrong together."""
    server, listen, tls, admission = config.server, config.listen, config.tls, config.admission
    if not server.hostname:
        yield "server.hostname", "is missing; give the DNS name or IP address clients connect to"
    elif not is_hostname(server.hostname):
        yield "server.hostname", f'"{server.hostname}" is neither a DNS name nor an IP address'
    if server.home_page not in ("", "blank") and not _is_web_url(server.home_page):
        yield "server.home_page", 'must be "", "blank" or an http(s) URL'
    if not listen.derp:
        yield "listen.derp", 'is empty; give at least one address, such as ":443"'
    if listen.stun_alternate and not all(
        address.host for address in (*listen.stun, *listen.stun_alternate)
    ):
        yield "listen.stun_alternate", "needs an IP address here and in listen.stun"
    if bool(tls.cert_file) != bool(tls.key_file):
        yield "tls.cert_file", "and tls.key_file go together; give both or neither"
    if tls.mode == "files" and not tls.cert_file and not tls.directory:
        yield "tls.mode", 'is "files"; give tls.cert_file and tls.key_file, or tls.directory'
    if tls.mode == "acme" or config.edge.public.acme:
        if not _is_web_url(tls.acme.directory_url):
            yield "tls.acme.directory_url", "must be an http(s) URL, without user and password"
        if not tls.acme.state_directory:
            yield "tls.acme.state_directory", "is empty; the account and certificates need a place"
        if tls.acme.challenge == "http-01" and listen.http is None:
            yield "tls.acme.challenge", 'is "http-01" but listen.http is off; use "tls-alpn-01"'
    if config.proxy.protocol != "none" and not config.proxy.trusted:
        yield "proxy.trusted", f'is empty; name the proxies that speak "{config.proxy.protocol}"'
    methods = (
        admission.keys_file,
        admission.tailscaled_socket,
        admission.hook.url,
        admission.tokens.public_key_file,
    )
    if admission.mode == "open" and any(methods):
        yield "admission.mode", 'is "open" but a way to check clients is set; make it "closed"'
    if admission.mode == "closed" and not any(methods):
        yield (
            "admission.mode",
            'is "closed" and nobody could be admitted; set a way to check clients in [admission]',
        )
    if admission.hook.url and not _is_web_url(admission.hook.url):
        yield "admission.hook.url", "must be an http(s) URL, without user and password"
    if bool(config.edge.cert_file) != bool(config.edge.key_file):
        yield "edge.cert_file", "and edge.key_file go together; give both or neither"
    if config.edge.listen and not config.edge.directory:
        yield "edge.directory", "is empty; the tunnels need a place"
    public = config.edge.public
    if (public.https or public.http) and not config.edge.listen:
        yield "edge.listen", 'is empty; visitors need connectors, and they an address like ":7844"'
    if public.acme and not public.https:
        yield "edge.public.acme", "is on but nothing listens for HTTPS; set edge.public.https"
    domain = config.edge.quick.domain
    if domain and (not is_hostname(domain) or domain != domain.lower().rstrip(".")):
        yield "edge.quick.domain", "must be a DNS name in lower case"
    if config.mesh.peers and not server.mesh_key_file:
        yield "mesh.peers", "needs server.mesh_key_file, the key that the region's servers share"


def _is_web_url(text: str) -> bool:
    if not text.isascii() or not text.isprintable() or " " in text:
        return False
    try:
        url = urlsplit(text)
        is_web = url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0
        # Secrets do not belong into a configuration that is printed and logged.
        return is_web and url.username is None
    except ValueError:
        return False
