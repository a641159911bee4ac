"""Underpass traversal: a peer is always reachable, by the best path there is.

`open_node` opens a node, `Node.connect` and `Node.accept` give links, and a link sends and receives
datagrams; everything a program needs is exported here.
"""

from traversal.io.ice import IceSession, IceStatistics
from traversal.io.interfaces import InterfaceFilter
from traversal.io.peer_relay_server import PeerRelayOptions
from traversal.io.relay_client import RelayOptions, RelayStatistics
from traversal.io.udp import UdpError, UdpStatistics
from traversal.keys import DiscoPrivate, DiscoPublic, KeyFormatError, NodePrivate, NodePublic
from traversal.link import (
    Link,
    LinkClosedError,
    LinkError,
    LinkPath,
    LinkStatistics,
    PathChange,
    PathKind,
    PingAnswer,
)
from traversal.node import Node, NodeError, NodeStatistics, open_node
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
