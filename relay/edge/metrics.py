"""The edge's metrics, under cloudflared's names where the meaning is equal (specification 14.2).

Seen from the edge: a request is one of a visitor, a session one of a published port. Its labels
differ where the edge has several tunnels and a connector has one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping

from prometheus_client.core import Metric

from relay.edge.view import EdgeView

_SUMS = (
    ("counter", "cloudflared_tunnel_total_requests", "Requests of visitors.", "requests"),
    ("counter", "cloudflared_tunnel_request_errors", "Requests that failed.", "errors"),
    ("counter", "cloudflared_tcp_total_sessions", "TCP connections passed through.", "tcp_total"),
    ("gauge", "cloudflared_tcp_active_sessions", "TCP connections now.", "tcp_active"),
    ("counter", "cloudflared_udp_total_flows", "UDP flows of visitors.", "udp_total"),
    ("gauge", "cloudflared_udp_active_flows", "UDP flows now.", "udp_active"),
    ("gauge", "cloudflared_tunnel_ha_connections", "Registered connections.", "connections"),
)
_BY_TUNNEL = (
    (
        "gauge",
        "cloudflared_tunnel_concurrent_requests_per_tunnel",
        "Requests now.",
        "requests_active",
    ),
    (
        "gauge",
        "cloudflared_tunnel_max_concurrent_requests_per_tunnel",
        "The most requests at one time.",
        "requests_most_active",
    ),
    ("gauge", "underpass_edge_connectors", "Connected connectors.", "connectors"),
    ("counter", "underpass_edge_retries_total", "Requests sent once more.", "retries"),
    ("counter", "underpass_edge_limited_total", "Requests beyond a limit.", "refused"),
    ("counter", "underpass_edge_bytes_received_total", "From visitors.", "bytes_in"),
    ("counter", "underpass_edge_bytes_sent_total", "To visitors.", "bytes_out"),
)


def edge_families(edge: EdgeView) -> Iterator[Metric]:
    """All metrics of an edge; every sample's name is exactly what is to be written."""
    for kind, name, text, attribute in _SUMS:
        yield _family(kind, name, text, {(): sum(getattr(t, attribute) for t in edge.tunnels)})
    by_status: Counter[str] = Counter()
    for tunnel in edge.tunnels:
        by_status.update(tunnel.responses)
    yield _family(
        "counter",
        "cloudflared_tunnel_response_by_code",
        "Responses to visitors, by status.",
        {(("status_code", status),): count for status, count in sorted(by_status.items())},
    )
    for kind, name, text, attribute in _BY_TUNNEL:
        yield _family(
            kind,
            name,
            text,
            {(("tunnel", tunnel.name),): getattr(tunnel, attribute) for tunnel in edge.tunnels},
        )
    yield _family(
        "counter",
        "cloudflared_tunnel_tunnel_register_success",
        "Connections that were registered.",
        {(): edge.registrations},
    )
    for name, text, counts in (
        (
            "cloudflared_tunnel_tunnel_register_fail",
            "Connectors turned away, by stage.",
            edge.connector_refusals,
        ),
        ("underpass_edge_refusals_total", "Visitors turned away.", edge.visitor_refusals),
    ):
        label = "error" if "register" in name else "stage"
        yield _family(
            "counter", name, text, {((label, stage),): count for stage, count in counts.items()}
        )
    for kind, name, text, value in (
        ("gauge", "underpass_edge_quick_tunnels", "Quick tunnels now.", edge.quick_tunnels),
        (
            "counter",
            "underpass_edge_quick_tunnels_created_total",
            "Quick tunnels made.",
            edge.quick_tunnels_created,
        ),
        ("gauge", "underpass_edge_peer_nodes", "Nodes connected to the edge.", edge.peer_nodes),
        ("counter", "underpass_edge_peer_packets_total", "Between nodes.", edge.peer_packets),
        ("counter", "underpass_edge_peer_bytes_total", "Between nodes.", edge.peer_bytes),
        ("counter", "underpass_edge_peer_drops_total", "Between nodes.", edge.peer_drops),
    ):
        yield _family(kind, name, text, {(): value})


def _family(
    kind: str, name: str, text: str, values: Mapping[tuple[tuple[str, str], ...], float]
) -> Metric:
    family = Metric(name, text, kind)
    for labels, value in values.items():
        family.add_sample(name, dict(labels), value)
    return family
