"""The edge tunnel as a way to a peer: when it may carry traffic, beside UDP and DERP.

A node that has a tunnel to an edge can reach others that have one, too, by their node keys; nothing
but the tunnel's one outgoing connection is needed. To a peer's machine the edge is one more
candidate: it is pinged, its Pongs measure it and make it trusted, silence puts it in doubt. What is
particular is only when it is wanted, and that is decided here.
"""

from __future__ import annotations

import math
from enum import Enum
from typing import Final

from traversal.paths.candidates import Candidate
from traversal.paths.scoring import EDGE_PATH

PEER_WANTS_SECONDS: Final = 10.0
"""A peer that uses the edge pings it every 3 s, one that looks for it every 5 s."""
PROVEN_SECONDS: Final = 7.0
"""How long a Pong by the relay says that it works both ways; searches ask for one every 5 s."""
ASK_RELAY_SECONDS: Final = 2.0


class EdgePolicy(Enum):
    """When traffic goes by the edge."""

    LAST = "last"
    """When neither UDP nor DERP works. The default: DERP servers are nearer and may be your own."""
    BEFORE_RELAY = "before-relay"
    """When UDP does not work: DERP is used only if the edge does not work either."""
    FIRST = "first"
    """Always, if it works; UDP and DERP are what it falls back to."""


class EdgeUse:
    """What one peer's machine knows about the edge."""

    def __init__(self, policy: EdgePolicy) -> None:
        self.policy = policy
        self.candidate = Candidate(EDGE_PATH)
        self.is_available = False
        """Whether our own tunnel is up."""
        self.peer_pinged_at = -math.inf
        """When the peer last pinged us by the edge."""
        self.relay_proven_at = -math.inf
        """When the peer last answered a Ping by the relay."""

        self._relay_pinged_at = -math.inf

    def take_relay_ping(self, now: float) -> bool:
        """Whether to ping the peer by the relay now, to learn whether it works both ways. That
        matters only where the edge comes last."""
        if self.policy is not EdgePolicy.LAST or now - self._relay_pinged_at < ASK_RELAY_SECONDS:
            return False
        self._relay_pinged_at = now
        return True

    def is_wanted(self, now: float, *, has_relay: bool) -> bool:
        """Whether the edge should be tried, and used if it answers and nothing better does.

        A peer that pings by it may have lost DERP, which we cannot see from here: what we send it
        by DERP may lead nowhere, while the edge proves itself. Only a Pong by DERP is a better
        proof; without that rule two nodes would keep each other on the edge for ever.
        """
        if self.policy is not EdgePolicy.LAST or not has_relay:
            return self.is_available
        does_peer_want = now - self.peer_pinged_at < PEER_WANTS_SECONDS
        is_proven = now - self.relay_proven_at < PROVEN_SECONDS
        return self.is_available and does_peer_want and not is_proven
