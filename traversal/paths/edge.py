"""The edge tunnel as a way to a peer: when it may carry traffic, beside UDP and DERP.

A node that has a tunnel to an edge can reach others that have one, too, by their node keys; nothing
but the tunnel's one outgoing connection is needed. To a peer's machine the edge is one more
candidate: it is pinged, its Pongs measure it and make it trusted, silence puts it in doubt. What is
particular is only when it is wanted, and that is decided here.
"""

from __future__ import annotations

from enum import Enum

from traversal.paths.candidates import Candidate
from traversal.paths.scoring import EDGE_PATH


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

    def is_wanted(self, *, has_relay: bool) -> bool:
        """Whether the edge should be tried, and used if it answers and nothing better does."""
        return self.is_available and (self.policy is not EdgePolicy.LAST or not has_relay)
