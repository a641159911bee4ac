"""How a connector talks to an origin: `originRequest` with its defaults (edge tunnel
specification 12.2). Pure.

`noHappyEyeballs`, `proxyAddress`, `proxyPort` and `access` with `required` false are taken and have
no effect.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from typing import Self

from traversal.wire.tunnel.configuration import IpRule, OriginRequest
from traversal.wire.tunnel.errors import TunnelError

_Address = ipaddress.IPv4Address | ipaddress.IPv6Address


@dataclass(frozen=True, slots=True)
class DestinationRule:
    """Allows or denies destinations; no ports stand for all."""

    network: ipaddress.IPv4Network | ipaddress.IPv6Network
    ports: frozenset[int]
    is_allowed: bool

    def covers(self, address: _Address, port: int) -> bool:
        """Whether this rule decides about a destination."""
        return address in self.network and (not self.ports or port in self.ports)


@dataclass(frozen=True, slots=True)
class OriginOptions:
    """One rule's options; durations in seconds.

    Attributes:
        keep_alive_connections: that may wait for requests, to one origin.
        tcp_keep_alive: between the kernel's questions to a silent origin; 0 for none.
        host_header: what the origin gets as Host; the visitor's goes to X-Forwarded-Host.
        server_name: for SNI and the certificate; empty for the origin's host.
        is_sni_of_request: SNI is the host that the visitor asked for.
        ca_pool: a PEM file of roots besides the system's.
        is_verified: whether an https origin's certificate must be valid.
        is_chunked_allowed: WSGI servers may know no chunked requests.
        is_http2: speak HTTP/2 to an https origin that agrees to it.
        is_bastion: the service is a bastion whatever it says.
        is_socks: a TCP service is a SOCKS proxy instead.
        destinations: where bastion and SOCKS may connect; the first that covers one decides.
    """

    connect_timeout: float = 30.0
    tls_timeout: float = 10.0
    keep_alive_timeout: float = 90.0
    keep_alive_connections: int = 100
    tcp_keep_alive: float = 30.0
    host_header: str = ""
    server_name: str = ""
    is_sni_of_request: bool = False
    ca_pool: str = ""
    is_verified: bool = True
    is_chunked_allowed: bool = True
    is_http2: bool = False
    is_bastion: bool = False
    is_socks: bool = False
    destinations: tuple[DestinationRule, ...] = ()

    @classmethod
    def of(cls, document: OriginRequest) -> Self:
        """From a document, complete with defaults. Raises TunnelError."""
        if document.access is not None and document.access.required:
            # Not to check tokens where it is demanded would open what should be closed.
            raise TunnelError(
                "originRequest, access: tokens of Cloudflare Access can't be checked here; remove "
                "it, and let the origin or the edge decide who may come in"
            )
        if document.proxy_type not in (None, "", "socks"):
            raise TunnelError(
                f'originRequest, proxyType: only "socks" is known, not {document.proxy_type!r}'
            )

        values = {
            "connect_timeout": document.connect_timeout,
            "tls_timeout": document.tls_timeout,
            "keep_alive_timeout": document.keep_alive_timeout,
            "keep_alive_connections": document.keep_alive_connections,
            "tcp_keep_alive": document.tcp_keep_alive,
            "host_header": document.http_host_header,
            "server_name": document.origin_server_name,
            "is_sni_of_request": document.match_sni_to_host,
            "ca_pool": document.ca_pool,
            "is_verified": not document.no_tls_verify,
            "is_chunked_allowed": not document.disable_chunked_encoding,
            "is_http2": document.http2_origin,
            "is_bastion": document.bastion_mode,
            "is_socks": document.proxy_type == "socks",
            "destinations": tuple(map(_destination_rule, document.ip_rules or ())),
        }
        given = {name: value for name, value in values.items() if value is not None}
        return cls(**given)  # type: ignore[arg-type]  # each has its field's type

    def allows(self, address: _Address, port: int) -> bool:
        """Whether a visitor may connect there; without rules nothing is allowed."""
        if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
            address = address.ipv4_mapped
        return next((r.is_allowed for r in self.destinations if r.covers(address, port)), False)


def _destination_rule(rule: IpRule) -> DestinationRule:
    try:
        network = ipaddress.ip_network(rule.prefix, strict=False)
    except ValueError:
        raise TunnelError(
            f"originRequest, ipRules, prefix: {rule.prefix!r} is no network; write one like "
            "10.0.0.0/8"
        ) from None
    if 0 in rule.ports:
        raise TunnelError("originRequest, ipRules, ports: 0 is no port")
    return DestinationRule(network, frozenset(rule.ports), rule.allow)
