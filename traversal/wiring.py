"""What all sessions of a node share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from traversal.io.deadlines import Deadlines
from traversal.io.relays import Relays
from traversal.io.udp import Source, UdpSockets
from traversal.keys import DiscoPrivate, DiscoPublic, Entropy, NodePrivate, NodePublic
from traversal.port_searches import PortSearches
from traversal.wire.address import Address

if TYPE_CHECKING:
    from traversal.peer_relays import PeerRelays
    from traversal.session import Session


class EdgeCarrier(Protocol):
    """The tunnel to the edge, which carries packets to nodes by their keys."""

    @property
    def is_connected(self) -> bool:
        """Whether a packet would leave at once."""

    @property
    def max_payload_bytes(self) -> int:
        """The longest packet that it carries."""

    def send(self, destination: bytes, payload: bytes) -> bool:
        """Queue a packet for the node with this raw key; False when it can't be carried."""


@dataclass(slots=True)
class Wiring:
    """What all sessions of a node share."""

    private_key: NodePrivate
    public_key: NodePublic
    disco_private: DiscoPrivate
    disco_public: DiscoPublic
    entropy: Entropy
    udp: UdpSockets
    relays: Relays
    deadlines: Deadlines
    refresh: Callable[[], None]
    """Ask for a net check; coalesced."""
    want_rebind: Callable[[], None]
    """Ask for fresh sockets; throttled."""
    note_seen_as: Callable[[Address, Address, float], None]
    """A peer at the first address saw us at the second."""
    port_searches: PortSearches
    by_address: dict[Source, Session] = field(default_factory=dict)
    by_disco: dict[bytes, list[Session]] = field(default_factory=dict)
    peer_relays: PeerRelays = field(init=False)
    edge: EdgeCarrier | None = None
