"""Our NAT's class from what peers see of us, where one STUN server cannot tell it."""

from __future__ import annotations

import pytest

from traversal.paths.mapping_evidence import MAX_ASKED, MAX_PEERS, MappingEvidence
from traversal.wire.address import Address
from traversal.wire.introduction import MappingClass

SERVER = "198.51.100.1"
REFLEXIVE = Address("203.0.113.9", 4000)
OTHER_PORT = Address("203.0.113.9", 4001)
PEER = Address("198.51.100.7", 41641)


def test_one_equal_pong_is_enough() -> None:
    """A peer saw what the server saw: easy, after the next check."""
    evidence = MappingEvidence()
    assert evidence.handle_pong(PEER, REFLEXIVE, 1.0)
    assert evidence.mapping is MappingClass.UNKNOWN
    evidence.handle_check(SERVER, REFLEXIVE, 1.1)
    assert evidence.mapping is MappingClass.ENDPOINT_INDEPENDENT
    assert not evidence.handle_pong(PEER, REFLEXIVE, 9.0)


def test_a_difference_is_believed_the_second_time() -> None:
    """Once may be a NAT that restarted a moment ago."""
    evidence = MappingEvidence()
    evidence.handle_pong(PEER, OTHER_PORT, 1.0)
    evidence.handle_check(SERVER, REFLEXIVE, 1.1)
    assert evidence.mapping is MappingClass.UNKNOWN
    assert evidence.handle_pong(PEER, OTHER_PORT, 4.1)
    evidence.handle_check(SERVER, REFLEXIVE, 4.2)
    assert evidence.mapping is MappingClass.ADDRESS_AND_PORT_DEPENDENT


def test_a_restarted_nat_is_not_hard() -> None:
    """The new mapping is seen by both at the second check."""
    evidence = MappingEvidence()
    evidence.handle_pong(PEER, OTHER_PORT, 1.0)
    evidence.handle_check(SERVER, REFLEXIVE, 1.1)
    evidence.handle_pong(PEER, OTHER_PORT, 4.0)
    evidence.handle_check(SERVER, OTHER_PORT, 4.1)
    assert evidence.mapping is MappingClass.ENDPOINT_INDEPENDENT


@pytest.mark.parametrize(
    ("peer", "seen_as"),
    [
        (Address("192.168.1.4", 1), Address("192.168.1.9", 4000)),
        (PEER, Address("192.168.1.9", 4000)),
        (Address("2001:db8::7", 1), Address("2001:db8::9", 4000)),
        (Address(SERVER, 5), OTHER_PORT),
    ],
)
def test_what_says_nothing(peer: Address, seen_as: Address) -> None:
    """Neighbors, IPv6, and the server's own host tell nothing about our mapping of IPv4."""
    evidence = MappingEvidence()
    for at in (1.0, 4.0):
        evidence.handle_pong(peer, seen_as, at)
        evidence.handle_check(SERVER, REFLEXIVE, at)
    assert evidence.mapping is MappingClass.UNKNOWN


def test_old_pongs_say_nothing() -> None:
    """A Pong of six seconds ago is not compared with a check of now."""
    evidence = MappingEvidence()
    evidence.handle_pong(PEER, REFLEXIVE, 1.0)
    evidence.handle_check(SERVER, REFLEXIVE, 7.1)
    assert evidence.mapping is MappingClass.UNKNOWN


def test_bounds() -> None:
    """Thousands of peers are remembered as 32, and lead to four net checks."""
    evidence = MappingEvidence()
    asked = 0
    for number in range(2000):
        peer = Address(f"198.51.{100 + number // 250}.{number % 250}", 1)
        asked += evidence.handle_pong(peer, REFLEXIVE, float(number))
    assert asked == MAX_ASKED
    assert len(evidence._seen) == MAX_PEERS
