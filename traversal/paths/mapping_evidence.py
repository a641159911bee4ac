"""What peers' Pongs tell of our own NAT, where a single STUN server cannot tell its class.

A Pong says from which address our Ping seemed to come. If that is the address that the STUN server
saw, two destinations shared one mapping: it is endpoint-independent. If it is another one, each
destination gets its own. A peer can lie, so servers that say otherwise have the last word, and a
NAT that forgot its mappings a moment ago looks like a hard one, so that is believed only of two net
checks in succession.
"""

from __future__ import annotations

import math
from typing import Final

from traversal.paths.candidates import is_local_scope
from traversal.wire.address import Address
from traversal.wire.introduction import MappingClass

FRESH_SECONDS: Final = 5.0
"""How old a Pong may be when a net check is over: older, the mapping may be another one by now."""
MAX_PEERS: Final = 32
CHECKS_TO_BELIEVE: Final = 2
ASK_SECONDS: Final = 3.0
MAX_ASKED: Final = 4
"""Net checks that Pongs may ask for, in one network; afterwards the periodic ones have to do."""


class MappingEvidence:
    """Collects Pongs; `mapping` is what they say, unknown at first."""

    def __init__(self) -> None:
        self.mapping = MappingClass.UNKNOWN
        self._seen: dict[str, tuple[Address, float]] = {}
        self._differing_checks = 0
        self._asked = 0
        self._asked_at = -math.inf

    def handle_pong(self, peer: Address, seen_as: Address, now: float) -> bool:
        """A peer saw our Ping come from `seen_as`. Returns whether a net check would now help."""
        if is_local_scope(peer.ip) or is_local_scope(seen_as.ip) or peer.is_ipv6 or seen_as.is_ipv6:
            return False
        self._seen.pop(peer.host, None)
        if len(self._seen) == MAX_PEERS:
            del self._seen[next(iter(self._seen))]
        self._seen[peer.host] = seen_as, now
        is_unknown = self.mapping is MappingClass.UNKNOWN
        if not is_unknown or self._asked == MAX_ASKED or now - self._asked_at < ASK_SECONDS:
            return False
        self._asked += 1
        self._asked_at = now
        return True

    def handle_check(self, server: str, reflexive: Address, now: float) -> None:
        """A net check is over: the STUN server at the host `server` saw us as `reflexive`."""
        fresh = [
            seen_as
            for peer, (seen_as, at) in self._seen.items()
            if peer != server and now - at <= FRESH_SECONDS
        ]
        if not fresh:
            return
        if all(seen_as == reflexive for seen_as in fresh):
            self._differing_checks = 0
            self.mapping = MappingClass.ENDPOINT_INDEPENDENT
            return
        self._differing_checks += 1
        if self._differing_checks >= CHECKS_TO_BELIEVE:
            self.mapping = MappingClass.ADDRESS_AND_PORT_DEPENDENT
