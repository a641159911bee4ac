"""A node's own addresses as ICE candidates."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from traversal.paths.own_addresses import OwnAddress
from traversal.wire.address import Address
from traversal.wire.ice_description import IceCandidate, IceCandidateType, make_candidate

_BEST_PREFERENCE = 65535


def make_candidates(
    own: Sequence[OwnAddress], local: Collection[Address]
) -> tuple[IceCandidate, ...]:
    """Host candidates for `local` addresses, server-reflexive ones for all others of `own`.

    Port mappings and static addresses count as server-reflexive, since ICE has no type for them.
    Order is kept, but IPv6 goes before IPv4 (RFC 8421 4): it is rarely behind a NAT.
    """
    addresses = dict.fromkeys([*(address for _, address in own), *local])
    ordered = sorted(addresses, key=lambda address: not address.is_ipv6)
    candidates = []
    for place, address in enumerate(ordered):
        preference = _BEST_PREFERENCE - place
        if address in local:
            candidates.append(make_candidate(IceCandidateType.HOST, address, address, preference))
            continue
        base = next((a for a in local if a.is_ipv6 == address.is_ipv6), None)
        if base is not None:
            kind = IceCandidateType.SERVER_REFLEXIVE
            candidates.append(make_candidate(kind, address, base, preference))
    return tuple(candidates)
