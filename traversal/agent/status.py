"""What the agent and the commands tell about a node, as plain values for JSON."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from traversal.link import Link, LinkPath
from traversal.node import Node
from traversal.paths.report import NatFacts, Report
from traversal.paths.verdict import describe_nat
from traversal.relay_map import RelayMap

if TYPE_CHECKING:
    from traversal.io.edge_client import EdgeStatistics


def path_status(path: LinkPath) -> dict[str, Any]:
    """A link's path."""
    return {
        "kind": path.kind.value,
        "address": str(path.address) if path.address is not None else None,
        "region": path.region or None,
        "latency_seconds": path.latency_seconds,
        "loss_ratio": path.loss_ratio,
        "mtu_bytes": path.mtu_bytes,
    }


def nat_status(nat: NatFacts) -> dict[str, Any]:
    """A NAT's classes and what they mean."""
    return {
        "mapping": nat.mapping.name.lower(),
        "filtering": nat.filtering.name.lower(),
        "port_pattern": nat.ports.pattern.value,
        "port_step": nat.ports.step,
        "hairpins": nat.hairpins,
        "is_udp_blocked": nat.is_udp_blocked,
        "is_offline": nat.is_offline,
        "has_port_mapping": nat.has_port_mapping,
        "text": describe_nat(nat),
    }


def report_status(report: Report, relay_map: RelayMap, home: int) -> dict[str, Any]:
    """A net check, for `underpass netcheck --json`."""
    regions = []
    for region_id, region in relay_map.regions.items():
        regions.append(
            {
                "region": region_id,
                "name": region.name,
                "latency_seconds": report.latencies.get(region_id),
                "is_home": region_id == home,
            }
        )
    regions.sort(key=lambda entry: (entry["latency_seconds"] is None, entry["latency_seconds"]))
    return {
        "udp": report.is_udp_working,
        "ipv4": [str(address) for address in report.global_v4],
        "ipv6": [str(address) for address in report.global_v6],
        "captive_portal": report.captive_portal,
        "mapping_varies": report.mapping_varies,
        "nat_pmp": report.nat_pmp,
        "pcp": report.pcp,
        "upnp": report.upnp,
        "home_region": home or None,
        "regions": regions,
    }


def link_status(link: Link, name: str) -> dict[str, Any]:
    """One peer."""
    statistics = link.statistics()
    verdict = link.verdict(name)
    return {
        "name": name,
        "key": str(link.peer_key),
        "state": link.state.value,
        "path": path_status(link.path),
        "sent": statistics.sent,
        "received": statistics.received,
        "verdict": verdict.to_dict(),
        "text": verdict.text(),
    }


def edge_status(edge: EdgeStatistics | None) -> dict[str, Any] | None:
    """The connection to the edge; None without one."""
    if edge is None:
        return None
    return {
        "transport": edge.transport.value if edge.transport is not None else None,
        "server": edge.server or None,
        "last_error": edge.last_error,
    }


def node_status(node: Node, names: dict[bytes, str]) -> dict[str, Any]:
    """The whole node; `names` are the peers' by raw key."""
    statistics = node.statistics()
    return {
        "key": str(node.public_key),
        "home_region": node.home_region or None,
        "addresses": [str(address) for _, address in node.own_addresses],
        "nat": nat_status(node.nat),
        "relays": [
            {
                "region": relay.region,
                "is_connected": relay.is_connected,
                "server": relay.server,
                "health": relay.health,
                "last_error": relay.last_error,
            }
            for relay in statistics.relays
        ],
        "edge": edge_status(statistics.edge),
        "peers": [
            link_status(link, names.get(link.peer_key.raw, link.peer_key.short()))
            for link in node.links
        ],
    }
