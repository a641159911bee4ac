"""A frozen picture of the edge, for metrics, the status page and `top`."""

from __future__ import annotations

from collections.abc import Mapping
from uuid import UUID

from msgspec import Struct

from relay.edge.limits import TunnelTraffic
from relay.edge.registry import Registry


class TunnelView(Struct, frozen=True, kw_only=True):
    """One tunnel. Counts are since the edge started."""

    id: str
    name: str
    connectors: int
    """Processes; several serve alike."""
    connections: int
    transports: dict[str, int]
    """Connections by what they run over."""
    versions: tuple[str, ...]
    """Of the connectors' programs."""
    requests_active: int
    requests_most_active: int
    requests: int
    errors: int
    retries: int
    refused: int
    responses: dict[str, int]
    """By status."""
    bytes_in: int
    """From visitors."""
    bytes_out: int
    tcp_active: int
    tcp_total: int
    udp_active: int
    udp_total: int


class EdgeView(Struct, frozen=True, kw_only=True):
    """The edge at one moment."""

    tunnels: tuple[TunnelView, ...]
    registrations: int
    visitor_refusals: dict[str, int]
    """By stage (`relay.edge.visitor_stages`)."""
    connector_refusals: dict[str, int]
    """By stage (`relay.edge.registration`)."""
    quick_tunnels: int
    quick_tunnels_created: int
    peer_nodes: int
    peer_packets: int
    peer_bytes: int
    peer_drops: int


def view_tunnels(
    registry: Registry, traffic: Mapping[UUID, TunnelTraffic]
) -> tuple[TunnelView, ...]:
    """All tunnels, those that moved most bytes first."""
    views = []
    for tunnel in registry.tunnels():
        connections = list(registry.connections(tunnel.id))
        counts = traffic.get(tunnel.id) or TunnelTraffic()
        transports: dict[str, int] = {}
        for connection in connections:
            transports[connection.transport] = transports.get(connection.transport, 0) + 1
        views.append(
            TunnelView(
                id=str(tunnel.id),
                name=tunnel.name,
                connectors=len({connection.connector_id for connection in connections}),
                connections=len(connections),
                transports=transports,
                versions=tuple(sorted({each.options.version for each in connections})),
                requests_active=counts.active,
                requests_most_active=counts.most_active,
                requests=counts.requests,
                errors=counts.errors,
                retries=counts.retries,
                refused=counts.refused,
                responses={str(status): n for status, n in sorted(counts.by_status.items())},
                bytes_in=counts.bytes_in,
                bytes_out=counts.bytes_out,
                tcp_active=counts.tcp_active,
                tcp_total=counts.tcp_total,
                udp_active=counts.udp_active,
                udp_total=counts.udp_total,
            )
        )
    return tuple(sorted(views, key=lambda v: v.bytes_in + v.bytes_out, reverse=True))
