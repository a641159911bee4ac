"""Which edge address each connection uses (edge tunnel specification 2.4). Pure.

Connections spread over the regions, and over the addresses of a region, and keep what they have
until told that it failed. Unlike the reference's, the book always has an answer: where there are
fewer addresses than connections they share, and a single one that failed is given out again. How
long to wait before is the backoff's business, not this one's.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Final, TypeVar

from traversal.wire.address import Address

_T = TypeVar("_T")

MAX_ADDRESSES_PER_REGION: Final = 64
SUSPICION_SECONDS: Final = 60.0
"""An address that failed is avoided as long, while another has not."""
FAMILY_SUSPICION_SECONDS: Final = 600.0
"""A family that could not be routed is avoided as long (specification 2.3)."""


class AddressBook:
    """Addresses in regions, and who has which. `draw` returns random numbers in [0, 1)."""

    def __init__(self, regions: Sequence[Iterable[Address]], draw: Callable[[], float]) -> None:
        self._draw = draw
        self._region_of: dict[Address, int] = {}
        self._given: dict[int, Address] = {}
        self._failed_at: dict[Address, float] = {}
        self._unroutable_at: dict[bool, float] = {}
        """By `Address.is_ipv6`."""
        self.replace(regions)

    @property
    def addresses(self) -> tuple[Address, ...]:
        """All of them."""
        return tuple(self._region_of)

    def replace(self, regions: Sequence[Iterable[Address]]) -> None:
        """Discovery found these now; at least one. Connections keep what is still there."""
        region_of: dict[Address, int] = {}
        for number, region in enumerate(regions):
            for address in list(region)[:MAX_ADDRESSES_PER_REGION]:
                region_of.setdefault(address, number)
        if not region_of:
            raise ValueError("an address book needs an address")
        self._region_of = region_of
        for index, address in list(self._given.items()):
            if address not in region_of:
                del self._given[index]
        self._failed_at = {a: at for a, at in self._failed_at.items() if a in region_of}

    def address(self, index: int, now: float) -> Address:
        """The address of a connection, chosen now if it has none."""
        if index not in self._given:
            others = [address for i, address in self._given.items() if i != index]
            regions = Counter(self._region_of[address] for address in others)
            users = Counter(others)
            self._given[index] = min(
                self._region_of,
                key=lambda address: (
                    self._is_unroutable(address, now),
                    self._suspicion(address, now),
                    regions[self._region_of[address]],
                    users[address],
                    self._draw(),
                ),
            )
        return self._given[index]

    def rotate(self, index: int, now: float, *, is_unroutable: bool = False) -> None:
        """The connection's address failed: another next time, if there is another.

        `is_unroutable`: there is no way to its family at all.
        """
        address = self._given.pop(index, None)
        if address is not None:
            self._failed_at[address] = now
            if is_unroutable:
                self._unroutable_at[address.is_ipv6] = now

    def take(self, index: int, address: Address) -> None:
        """The connection is at this address now: it moved."""
        self._given[index] = address

    def note_success(self, index: int) -> None:
        """The connection registered at its address."""
        address = self._given.get(index)
        if address is not None:
            self._failed_at.pop(address, None)
            self._unroutable_at.pop(address.is_ipv6, None)

    def crowded(self, now: float) -> tuple[int, Address] | None:
        """A connection that should move, and where to: so that each region has its share, and
        within a region each address. None while all is even.

        An address that failed lately is proposed, too: who tries to move there finds out whether it
        is back.
        """
        usable = [a for a in self._region_of if not self._is_unroutable(a, now)]
        users = Counter(self._given.values())
        if not usable:
            return None
        regions = {self._region_of[address]: 0 for address in usable}
        for address in self._given.values():
            region = self._region_of[address]
            regions[region] = regions.get(region, 0) + 1
        uneven = _extremes(regions)
        if uneven is not None:
            crowd, others = (
                [a for a in places if self._region_of[a] == region]
                for region, places in zip(uneven, (self._region_of, usable), strict=True)
            )
            most = max(crowd, key=users.__getitem__)
            target = min(others, key=lambda a: (self._suspicion(a, now), users[a], self._draw()))
            return self._someone_at(most), target
        for region in regions:
            places = [a for a in usable if self._region_of[a] == region]
            pair = _extremes({address: users[address] for address in places})
            if pair is not None:
                return self._someone_at(pair[0]), pair[1]
        return None

    def _someone_at(self, address: Address) -> int:
        return max(index for index, given in self._given.items() if given == address)

    def _is_unroutable(self, address: Address, now: float) -> bool:
        at = self._unroutable_at.get(address.is_ipv6)
        return at is not None and now - at < FAMILY_SUSPICION_SECONDS

    def _suspicion(self, address: Address, now: float) -> float:
        """Minus infinity for none; what failed longest ago is the least suspect."""
        at = self._failed_at.get(address)
        return at if at is not None and now - at < SUSPICION_SECONDS else -math.inf


def split_static(addresses: Sequence[Address]) -> tuple[list[Address], list[Address]]:
    """Listed addresses in two regions, by turns (specification 2.2)."""
    return list(addresses[::2]), list(addresses[1::2])


def _extremes(counts: dict[_T, int]) -> tuple[_T, _T] | None:
    """The most and the least used, if taking from the one and giving to the other evens out."""
    most, least = max(counts, key=counts.__getitem__), min(counts, key=counts.__getitem__)
    return (most, least) if counts[most] - counts[least] >= 2 else None
