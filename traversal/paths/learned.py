"""The addresses by which the datagrams of one peer are known to be its own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from traversal.paths.candidates import CandidateBook
from traversal.paths.effects import AddressForgotten, AddressLearned, Effect
from traversal.wire.address import Address

MAX_FOREIGN_SOURCES: Final = 16
"""Addresses that Pongs came from though they were not pinged; each is an asymmetric NAT."""


class LearnedAddresses:
    """Candidates that pinged us or answered, as long as they are candidates, and the last foreign
    sources of Pongs. Every method yields what is to be told to the shell."""

    def __init__(self, book: CandidateBook) -> None:
        self._book = book
        self._candidates: set[Address] = set()
        self._foreign: dict[Address, None] = {}

    def learn(self, address: Address, *, is_proven: bool = False) -> Iterator[Effect]:
        """The peer pinged from a candidate's address or, if `is_proven`, answered from there."""
        if self._book.get(address) is not None:
            self._candidates.add(address)
            # Each time: another peer may have had this address in between.
            yield AddressLearned(address, is_proven)

    def learn_foreign(self, source: Address) -> Iterator[Effect]:
        """A Pong came from an address that was not pinged."""
        if source not in self._foreign and len(self._foreign) == MAX_FOREIGN_SOURCES:
            oldest = next(iter(self._foreign))
            del self._foreign[oldest]
            yield AddressForgotten(oldest)
        self._foreign[source] = None
        yield AddressLearned(source)

    def forget_missing(self) -> Iterator[Effect]:
        """What is no candidate any more."""
        for address in [a for a in self._candidates if self._book.get(a) is None]:
            self._candidates.discard(address)
            yield AddressForgotten(address)
