"""One connection of the relay, as forwarding sees it. No I/O, no clock."""

from __future__ import annotations

import ipaddress
from collections import deque
from typing import Final

from relay.backlog import Backlog
from traversal.keys import NodePublic
from traversal.wire.derp import PresentFlags

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

NOT_HERE_BURST: Final = 3
NOT_HERE_PER_SECOND: Final = 1.0
"""PEER_GONE "not here" notices per connection (DERP specification 7.3)."""


class Client:
    """One connection, as forwarding sees it. The pump's connection extends this class.

    Attributes that the pump reads:
        out: frames and runs to write, in order; see "Ownership" above.
        blocked: set by the pump while the connection takes no bytes; then packets go to `backlog`
            and other frames to `control`.
    """

    __slots__ = (
        "address",
        "backlog",
        "blocked",
        "bytes_in",
        "bytes_out",
        "closed",
        "connected_at",
        "control",
        "duplicate",
        "heard_from",
        "home",
        "is_mesh",
        "is_outgoing",
        "is_prober",
        "is_sibling",
        "key",
        "not_here_at",
        "not_here_tokens",
        "not_ideal",
        "out",
        "out_bytes",
        "packets_dropped",
        "packets_in",
        "packets_out",
        "permitted",
        "pong_waits",
        "port",
        "skip_bytes",
        "takes_notices",
    )

    def __init__(
        self,
        key: NodePublic,
        *,
        connected_at: float = 0.0,
        address: Address | None = None,
        port: int = 0,
        is_mesh: bool = False,
        is_sibling: bool = False,
        is_outgoing: bool = False,
        is_prober: bool = False,
        not_ideal: bool = False,
        takes_notices: bool = False,
        permitted: frozenset[bytes] | None = None,
    ) -> None:
        """
        Args:
            connected_at: monotonic seconds.
            is_mesh: presented the mesh key, so may watch, forward and close.
            is_sibling: a worker of this same host.
            is_outgoing: we dialed; the other side is the server, and we watch it.
            not_ideal: came with an Ideal-Node header.
            takes_notices: is known to understand HEALTH and RESTARTING.
            permitted: raw keys that it may exchange packets with; None for all.
        """
        self.key = key.raw
        self.connected_at = connected_at
        self.address = address
        self.port = port
        self.is_mesh = is_mesh
        self.is_sibling = is_sibling
        self.is_outgoing = is_outgoing
        self.is_prober = is_prober
        self.not_ideal = not_ideal
        self.takes_notices = takes_notices
        self.permitted = permitted
        self.home = False
        self.duplicate = False
        self.closed = False
        self.out: list[memoryview | bytes] = []
        self.out_bytes = 0
        self.blocked = False
        self.backlog: Backlog | None = None
        self.control: deque[bytes] | None = None
        self.pong_waits = False
        self.skip_bytes = 0
        self.heard_from: set[bytes] | None = None
        self.not_here_tokens = float(NOT_HERE_BURST)
        self.not_here_at = 0.0
        self.packets_in = 0
        self.bytes_in = 0
        self.packets_out = 0
        self.bytes_out = 0
        self.packets_dropped = 0

    def present_flags(self) -> PresentFlags:
        """What PEER_PRESENT says of this client (DERP specification 6.9)."""
        flags = PresentFlags(0)
        if self.is_mesh:
            flags |= PresentFlags.MESH_PEER
        if self.is_prober:
            flags |= PresentFlags.PROBER
        if self.not_ideal:
            flags |= PresentFlags.NOT_IDEAL
        return flags or PresentFlags.REGULAR

    def short(self) -> str:
        """For logs: the key's short form and the address."""
        where = f" {self.address} port {self.port}" if self.address else ""
        return NodePublic(self.key).short() + where

    def take_not_here(self, now: float) -> bool:
        """Whether this client may be told once more that a peer is not here."""
        tokens = self.not_here_tokens + (now - self.not_here_at) * NOT_HERE_PER_SECOND
        self.not_here_at = now
        self.not_here_tokens = min(tokens, NOT_HERE_BURST)
        if self.not_here_tokens < 1:
            return False
        self.not_here_tokens -= 1
        return True
