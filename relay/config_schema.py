"""The sections of the relay's configuration, with every key, its type, range and default.

Conventions: a key that can be switched off takes the value "off" (`None` here, or an empty list);
a list of one may be written as that one; an empty path or URL means "none"; units are in the names.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from typing import Annotated, Final, Literal, NewType, Self
from urllib.parse import urlsplit

from msgspec import Meta, Struct, field

FilePath = NewType("FilePath", str)
Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Count = Annotated[int, Meta(ge=1)]
Positive = Annotated[float, Meta(gt=0)]

# DERP specification 9: one maximum frame always fits into a burst.
MIN_CLIENT_BURST_BYTES: Final = 65536 + 32
DERP_PORT: Final = 443


@dataclass(frozen=True, slots=True)
class ListenAddress:
    """Where to listen. An empty host means every address of both families; port 0, any port."""

    host: str
    port: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read ":443", "192.0.2.1:443" or "[2001:db8::1]:443". Raises ValueError."""
        host, colon, port = text.rpartition(":")
        if not colon:
            raise ValueError(f'"{text}" has no port; write ":443" or "192.0.2.1:443"')
        try:
            if host.startswith("[") and host.endswith("]"):
                host = str(ipaddress.IPv6Address(host[1:-1]))
            elif host:
                host = str(ipaddress.IPv4Address(host))
        except ValueError:
            raise ValueError(
                f'"{text}" must have an IP address, IPv6 in brackets, or no host'
            ) from None
        return cls(host, _parse_port(port))

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class MeshPeer:
    """Another server of the region. `dial_host` is where to connect; `host` is its name."""

    host: str
    port: int
    dial_host: str

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read "host[:port]" or "host[:port]/dialhost" (DERP specification 10).

        Raises ValueError.
        """
        name, _, dial_host = text.partition("/")
        url = urlsplit(f"//{name}")
        if not url.hostname or url.username is not None or any(c.isspace() for c in text):
            raise ValueError(f'"{text}" is not "host", "host:port" or "host:port/dialhost"')
        port = url.port
        return cls(url.hostname, DERP_PORT if port is None else port, dial_host or url.hostname)


class Section(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A table of the configuration file."""


class ServerConfig(Section, frozen=True):
    """[server]"""

    hostname: str = ""
    """The name (or bare IP address) that clients know this relay by."""
    key_file: FilePath = FilePath("/var/lib/underpass-relay/relay.key")
    """derper's key file; made if absent. Empty: a new key at each start."""
    mesh_key_file: FilePath = FilePath("")
    """64 hex digits that all servers of the region share."""
    home_page: str = ""
    """"" (a short explanation), "blank", or a URL to redirect to."""
    workers: Annotated[int, Meta(ge=1, le=256)] = 1
    drain_seconds: Annotated[float, Meta(ge=0, le=3600)] = 20.0
    """How long clients are given to leave after SIGTERM."""


class ListenConfig(Section, frozen=True):
    """[listen]"""

    derp: tuple[ListenAddress, ...] = (ListenAddress("", DERP_PORT),)
    http: ListenAddress | None = ListenAddress("", 80)
    """Plain HTTP: captive portal check, ACME challenges, redirects to HTTPS."""
    stun: tuple[ListenAddress, ...] = (ListenAddress("", 3478),)
    stun_alternate: tuple[ListenAddress, ...] = ()
    """RFC 5780's second addresses, one of a family at most: another IP address and another port
    than the one in `stun`."""
    admin: ListenAddress | None = ListenAddress("127.0.0.1", 9090)


class AcmeConfig(Section, frozen=True):
    """[tls.acme]"""

    directory_url: str = "https://acme-v02.api.letsencrypt.org/directory"
    email: str = ""
    challenge: Literal["http-01", "tls-alpn-01"] = "http-01"
    profile: str = ""
    """The authority's certificate profile; "shortlived" for IP addresses at Let's Encrypt."""
    state_directory: FilePath = FilePath("/var/lib/underpass-relay/acme")


class TlsConfig(Section, frozen=True):
    """[tls]"""

    mode: Literal["files", "acme", "self-signed", "off"] = "self-signed"
    cert_file: FilePath = FilePath("")
    key_file: FilePath = FilePath("")
    directory: FilePath = FilePath("/var/lib/underpass-relay/certificates")
    """Holds <hostname>.crt and <hostname>.key unless both files are named.

    Empty with mode "self-signed": a new certificate at each start, in memory only.
    """
    acme: AcmeConfig = field(default_factory=AcmeConfig)


class ProxyConfig(Section, frozen=True):
    """[proxy]: which reverse proxies may say where a client comes from, and how they say it."""

    protocol: Literal["none", "proxy-protocol", "x-forwarded-for"] = "none"
    trusted: tuple[Network, ...] = ()


class HookConfig(Section, frozen=True):
    """[admission.hook]: derper's --verify-client-url (DERP specification 8.2)."""

    url: str = ""
    fail_open: bool = False
    """Admit clients that the hook was never asked about while it can't be reached."""
    timeout_seconds: Positive = 5.0
    cache_entries: Annotated[int, Meta(ge=0)] = 10_000
    """Last-known answers kept; they count only while the hook fails."""
    concurrency: Count = 64


class TokensConfig(Section, frozen=True):
    """[admission.tokens]"""

    public_key_file: FilePath = FilePath("")
    """The operator's token keys (public halves), one a line."""
    revoked_file: FilePath = FilePath("")
    """Ids of tokens that no longer count, one a line."""


class AdmissionConfig(Section, frozen=True):
    """[admission]: `mode` alone decides whether anyone may use this relay."""

    mode: Literal["open", "closed"] = "open"
    keys_file: FilePath = FilePath("")
    """Node keys that are admitted, one a line."""
    tailscaled_socket: FilePath = FilePath("")
    """derper's --verify-clients: ask the local tailscaled (DERP specification 8.1)."""
    hook: HookConfig = field(default_factory=HookConfig)
    tokens: TokensConfig = field(default_factory=TokensConfig)


class LimitsConfig(Section, frozen=True):
    """[limits]

    Several workers share the accept rate and the memory; each of them counts connections and
    handshakes for itself.
    """

    accept_rate_per_second: Positive | None = None
    accept_burst: Count = 1000
    connections: Count = 50_000
    connections_per_ip: Count | None = None
    handshakes: Count = 1000
    """Connections between accept and registration at one time; one source may hold a quarter."""
    client_bytes_per_second: Count | None = None
    client_burst_bytes: Count | None = None
    """Raised to 65568 if lower; default: two seconds of `client_bytes_per_second`."""
    rate_config_file: FilePath = FilePath("")
    """derper's --rate-config; replaces the two keys above."""
    queue_packets: Annotated[int, Meta(ge=1, le=4096)] = 32
    """Per client and kind (DERP specification 7.4)."""
    memory_bytes: Annotated[int, Meta(ge=1 << 20)] = 256 << 20
    """All queued packets together."""

    def client_rate(self) -> tuple[int, int] | None:
        """Bytes per second and burst in bytes for one client; None if there is no limit."""
        rate = self.client_bytes_per_second
        if rate is None:
            return None
        return rate, max(self.client_burst_bytes or 2 * rate, MIN_CLIENT_BURST_BYTES)


class MeshConfig(Section, frozen=True):
    """[mesh]"""

    peers: tuple[MeshPeer, ...] = ()


class BootstrapDnsConfig(Section, frozen=True):
    """[bootstrap_dns] (DERP specification 11.2)"""

    names: tuple[str, ...] = ()
    unpublished_names: tuple[str, ...] = ()
    """"name" or "name/txtname"."""


class EdgePublicConfig(Section, frozen=True):
    """[edge.public]: where visitors come in, and how much of them there may be at one time."""

    https: tuple[ListenAddress, ...] = ()
    http: tuple[ListenAddress, ...] = ()
    """Without TLS; for a reverse proxy in front, or for trying things."""
    routes_file: FilePath = FilePath("")
    """Which hosts, names and ports lead to which tunnel (`relay.edge.routes_file`)."""
    certificates: FilePath = FilePath("")
    """A directory with `<anything>.crt` and `<anything>.key` for the published hosts."""
    acme: bool = False
    """Whether to order certificates for the others, by the settings of [tls.acme]."""
    allowed_destinations: tuple[Network, ...] = ()
    """Of the loopback, link-local and metadata addresses, those that connectors may be asked to
    dial."""
    connections: Count = 20_000
    connections_per_source: Count = 2_000
    requests: Count = 20_000
    """A WebSocket or TCP connection is one as long as it lasts."""
    requests_per_tunnel: Count = 10_000
    requests_per_source: Count = 2_000
    tunnel_requests_per_second: Positive | None = None
    tunnel_bytes_per_second: Positive | None = None


class EdgeQuickConfig(Section, frozen=True):
    """[edge.quick]: tunnels without an account, on names of the operator's domain."""

    domain: str = ""
    """Names are `<random>.<domain>`; the API is `https://<domain>/tunnel`. Empty: off."""
    per_hour: Count = 20
    """That one source may make."""
    tunnels: Count = 1_000
    """At one time."""
    unused_seconds: Positive = 600.0
    """A tunnel that had no connector for so long is forgotten."""


class EdgeConfig(Section, frozen=True):
    """[edge]: tunnels of connectors such as cloudflared (edge tunnel specification)."""

    listen: tuple[ListenAddress, ...] = ()
    """Where connectors connect, usually ":7844", TCP and UDP. Empty: there is no edge."""
    directory: FilePath = FilePath("/var/lib/underpass-relay/edge")
    """Holds the tunnels and, unless `cert_file` is given, an authority of the edge's own."""
    cert_file: FilePath = FilePath("")
    key_file: FilePath = FilePath("")
    """A certificate for h2.cftunnel.com, quic.cftunnel.com and probe.cftunnel.com."""
    location: str = "edge01"
    """What connectors show in their logs as the place that they are connected to."""
    public: EdgePublicConfig = field(default_factory=EdgePublicConfig)
    quick: EdgeQuickConfig = field(default_factory=EdgeQuickConfig)


class AdminConfig(Section, frozen=True):
    """[admin]"""

    token_file: FilePath = FilePath("")
    """Holds the bearer token that admin requests must carry. Empty: none is asked for."""


class LogConfig(Section, frozen=True):
    """[log]"""

    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["text", "json"] = "text"


def _parse_port(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) <= 65535):
        raise ValueError(f'"{text}" is not a port number (0 to 65535)')
    return int(text)
