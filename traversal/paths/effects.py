"""What a peer's state machine wants done, for the shell to carry out in the order given."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from traversal.paths.scoring import Path
from traversal.wire.address import Address


class PathState(Enum):
    """The named states of path selection specification 3."""

    IDLE = "idle"
    RELAY = "relay"
    DIRECT = "direct"
    PEER_RELAY = "peer relay"
    EDGE = "edge"
    DOUBT = "doubt"


@dataclass(frozen=True, slots=True)
class Route:
    """How to send a datagram now. The data path reads this one attribute and nothing else.

    Send to `path` if there is one, and by the relay if `relay` is true (both in DOUBT). If `wake`
    is true, call `Peer.handle_send` after sending: the machine sleeps and must learn of it.
    """

    path: Path | None
    relay: bool
    wake: bool


@dataclass(frozen=True, slots=True)
class SendPing:
    """Send a disco Ping, with our node key, to `path` by UDP (behind Geneve if it has a VNI)."""

    path: Path
    transaction_id: bytes
    padding_bytes: int = 0


@dataclass(frozen=True, slots=True)
class SendRelayPing:
    """Send a disco Ping by the relay."""

    transaction_id: bytes


@dataclass(frozen=True, slots=True)
class SendPong:
    """Send a disco Pong that says `source`, to `path` by UDP, or by the relay if that is None."""

    path: Path | None
    transaction_id: bytes
    source: Address


@dataclass(frozen=True, slots=True)
class SendCallMeMaybe:
    """Send a CallMeMaybe by the peer's home relay; the list is never empty."""

    addresses: tuple[Address, ...]


@dataclass(frozen=True, slots=True)
class RefreshEndpoints:
    """Find out our own addresses anew, then call `Peer.set_own_addresses`: a CallMeMaybe waits."""


@dataclass(frozen=True, slots=True)
class DiscoverPeerRelay:
    """Look for a UDP peer relay, then call `Peer.handle_peer_relay_ready`."""


@dataclass(frozen=True, slots=True)
class AddressLearned:
    """Data from `address` belongs to this peer: a valid disco message came from there.

    `is_proven` says that the peer answered a Ping to that address. The source of a Ping alone can
    be forged: another peer that answered from there lately (`Peer.has_answered_from`) keeps it.
    """

    address: Address
    is_proven: bool = False


@dataclass(frozen=True, slots=True)
class AddressForgotten:
    """`address` is no candidate any more; if it still maps to this peer, unmap it."""

    address: Address


@dataclass(frozen=True, slots=True)
class PingAnswered:
    """A Ping that `Peer.ping_all` asked for was answered; `path` is None for the relay.

    `seen_as` is where the peer says that our Ping came from.
    """

    path: Path | None
    latency_seconds: float
    seen_as: Address


@dataclass(frozen=True, slots=True)
class PathChanged:
    """The route changed. `reason` is a short sentence for a person."""

    at: float
    old: Route
    new: Route
    state: PathState
    reason: str


Effect = (
    SendPing
    | SendRelayPing
    | SendPong
    | SendCallMeMaybe
    | RefreshEndpoints
    | DiscoverPeerRelay
    | AddressLearned
    | AddressForgotten
    | PingAnswered
    | PathChanged
)
