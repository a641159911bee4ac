"""Underpass traversal: a peer is always reachable, by the best path there is.

`open_node` opens a node, `Node.connect` and `Node.accept` give links, and a link sends and receives
datagrams; everything a program needs is exported here.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from traversal.io.edge_client import EdgeOptions, EdgeStatistics
    from traversal.io.edge_dial import EdgeAddress
    from traversal.io.ice import IceSession, IceStatistics
    from traversal.io.interfaces import InterfaceFilter
    from traversal.io.peer_relay_server import PeerRelayOptions
    from traversal.io.relay_client import RelayOptions, RelayStatistics
    from traversal.io.udp import UdpError, UdpStatistics
    from traversal.keys import (
        DiscoPrivate,
        DiscoPublic,
        KeyFormatError,
        NodePrivate,
        NodePublic,
    )
    from traversal.link import (
        Link,
        LinkClosedError,
        LinkError,
        LinkPath,
        LinkStatistics,
        PathChange,
        PathChanges,
        PathKind,
        PingAnswer,
    )
    from traversal.node import Node, NodeError, NodeStatistics, open_node
    from traversal.paths.edge import EdgePolicy
    from traversal.paths.effects import PathState
    from traversal.paths.home import HomePolicy
    from traversal.paths.ice_effects import IceError, IceState, SelectedPair
    from traversal.paths.peer_relay_server import PeerRelayLimits, PeerRelayStatistics
    from traversal.paths.punch_memory import PunchMemory
    from traversal.paths.punch_strategy import PunchPolicy
    from traversal.paths.report import NatFacts, Report
    from traversal.paths.verdict import Verdict
    from traversal.relay_map import RelayMap, RelayMapError
    from traversal.wire.address import Address
    from traversal.wire.ice_description import (
        IceCandidate,
        IceCandidateType,
        IceDescription,
        IceDescriptionError,
    )

__all__ = [
    # A node and its links
    "open_node",
    "Node",
    "Link",
    "LinkPath",
    "PathKind",
    "PathChange",
    "PathChanges",
    "PathState",
    "PingAnswer",
    "Verdict",
    "Report",
    "NatFacts",
    # Peers that speak ICE
    "IceSession",
    "IceState",
    "SelectedPair",
    "IceDescription",
    "IceCandidate",
    "IceCandidateType",
    # What they are made with
    "RelayMap",
    "RelayOptions",
    "HomePolicy",
    "PunchPolicy",
    "PunchMemory",
    "InterfaceFilter",
    "PeerRelayOptions",
    "PeerRelayLimits",
    "EdgeOptions",
    "EdgeAddress",
    "EdgePolicy",
    "Address",
    "NodePrivate",
    "NodePublic",
    "DiscoPrivate",
    "DiscoPublic",
    # Snapshots
    "NodeStatistics",
    "LinkStatistics",
    "RelayStatistics",
    "PeerRelayStatistics",
    "UdpStatistics",
    "IceStatistics",
    "EdgeStatistics",
    # Errors
    "NodeError",
    "LinkError",
    "LinkClosedError",
    "IceError",
    "IceDescriptionError",
    "UdpError",
    "KeyFormatError",
    "RelayMapError",
]

# A name's module is imported when the name is first used (PEP 562): all of them take half a second,
# for which no command should wait that needs a key or nothing at all.
_MODULES = {
    "traversal.io.edge_client": ("EdgeOptions", "EdgeStatistics"),
    "traversal.io.edge_dial": ("EdgeAddress",),
    "traversal.io.ice": ("IceSession", "IceStatistics"),
    "traversal.io.interfaces": ("InterfaceFilter",),
    "traversal.io.peer_relay_server": ("PeerRelayOptions",),
    "traversal.io.relay_client": ("RelayOptions", "RelayStatistics"),
    "traversal.io.udp": ("UdpError", "UdpStatistics"),
    "traversal.keys": (
        "DiscoPrivate", "DiscoPublic", "KeyFormatError", "NodePrivate", "NodePublic",
    ),
    "traversal.link": (
        "Link", "LinkClosedError", "LinkError", "LinkPath", "LinkStatistics", "PathChange",
        "PathChanges", "PathKind", "PingAnswer",
    ),
    "traversal.node": ("Node", "NodeError", "NodeStatistics", "open_node"),
    "traversal.paths.edge": ("EdgePolicy",),
    "traversal.paths.effects": ("PathState",),
    "traversal.paths.home": ("HomePolicy",),
    "traversal.paths.ice_effects": ("IceError", "IceState", "SelectedPair"),
    "traversal.paths.peer_relay_server": ("PeerRelayLimits", "PeerRelayStatistics"),
    "traversal.paths.punch_memory": ("PunchMemory",),
    "traversal.paths.punch_strategy": ("PunchPolicy",),
    "traversal.paths.report": ("NatFacts", "Report"),
    "traversal.paths.verdict": ("Verdict",),
    "traversal.relay_map": ("RelayMap", "RelayMapError"),
    "traversal.wire.address": ("Address",),
    "traversal.wire.ice_description": (
        "IceCandidate", "IceCandidateType", "IceDescription", "IceDescriptionError",
    ),
}  # fmt: skip
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_MODULE_OF[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
