"""NAT64 prefixes: the table of RFC 6052, the discovery of RFC 7050, and their opposites."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address, IPv6Network

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from traversal.paths.candidates import CandidateBook, LocalNetworks
from traversal.paths.nat64 import (
    MAX_PREFIXES,
    PREFIX_LENGTHS,
    WELL_KNOWN_IPV4,
    WELL_KNOWN_PREFIX,
    extract,
    find_prefixes,
    synthesize,
    translate,
)
from traversal.wire.address import Address

# RFC 6052 2.4, tables 2 and 3.
VECTORS = [
    ("2001:db8::/32", "2001:db8:c000:221::"),
    ("2001:db8:100::/40", "2001:db8:1c0:2:21::"),
    ("2001:db8:122::/48", "2001:db8:122:c000:2:2100::"),
    ("2001:db8:122:300::/56", "2001:db8:122:3c0:0:221::"),
    ("2001:db8:122:344::/64", "2001:db8:122:344:c0:2:2100::"),
    ("2001:db8:122:344::/96", "2001:db8:122:344::192.0.2.33"),
    ("64:ff9b::/96", "64:ff9b::192.0.2.33"),
]

prefixes = st.builds(
    lambda value, length: IPv6Network((value & ~(0xFF << 56), length), strict=False),
    st.integers(0, 2**128 - 1),
    st.sampled_from(PREFIX_LENGTHS),
)
ipv4 = st.builds(IPv4Address, st.integers(0, 2**32 - 1))


@pytest.mark.parametrize(("prefix", "text"), VECTORS)
def test_vectors_of_rfc_6052(prefix: str, text: str) -> None:
    """192.0.2.33 stands where the RFC's tables have it, and is found there again."""
    network = IPv6Network(prefix)
    assert synthesize(network, IPv4Address("192.0.2.33")) == IPv6Address(text)
    assert extract(network, IPv6Address(text)) == IPv4Address("192.0.2.33")


@settings(deadline=None)
@given(prefixes, ipv4)
def test_round_trip(prefix: IPv6Network, address: IPv4Address) -> None:
    """What was put in comes out, under every prefix."""
    synthesized = synthesize(prefix, address)
    assert synthesized in prefix
    assert extract(prefix, synthesized) == address


@settings(deadline=None)
@given(prefixes)
def test_a_dns64_is_found_out(prefix: IPv6Network) -> None:
    """From the two answers of a DNS64, its prefix is found, whatever its length."""
    assert prefix in find_prefixes(synthesize(prefix, known) for known in WELL_KNOWN_IPV4)


@settings(deadline=None)
@given(st.lists(st.builds(IPv6Address, st.integers(0, 2**128 - 1)), max_size=8))
def test_any_answers_are_survived(answers: list[IPv6Address]) -> None:
    """Whatever a resolver says, few prefixes come of it, and only fitting ones."""
    found = find_prefixes(answers)
    assert len(found) <= MAX_PREFIXES
    for prefix in found:
        assert any(a in prefix and extract(prefix, a) in WELL_KNOWN_IPV4 for a in answers)


def test_one_answer_is_enough() -> None:
    """RFC 7050 3: some DNS64 synthesize only one of the two records."""
    assert find_prefixes([IPv6Address("64:ff9b::192.0.0.170")]) == (WELL_KNOWN_PREFIX,)


def test_no_dns64() -> None:
    """No answer, or one that holds neither address, means that there is no NAT64."""
    assert find_prefixes([]) == ()
    assert find_prefixes([IPv6Address("2001:db8::1")]) == ()


def test_several_prefixes_keep_their_order() -> None:
    """RFC 7050 3: a network may have several prefixes; the resolver's order is kept."""
    first, second = IPv6Network("2001:db8:122:300::/56"), WELL_KNOWN_PREFIX
    answers = [synthesize(p, known) for p in (first, second) for known in WELL_KNOWN_IPV4]
    assert find_prefixes(answers) == (first, second)


def test_an_ambiguous_answer_needs_the_other_one() -> None:
    """RFC 7050 3: a prefix that holds a well-known address itself misleads nobody."""
    prefix = IPv6Network("2001:db8:c000:aa::/96")
    first = synthesize(prefix, WELL_KNOWN_IPV4[0])
    assert find_prefixes([first]) == ()
    assert find_prefixes([first, synthesize(prefix, WELL_KNOWN_IPV4[1])]) == (prefix,)


def test_translation_of_a_peers_addresses() -> None:
    """Public IPv4 goes through every prefix, IPv6 stays, and private IPv4 is left out."""
    addresses = [
        Address("192.0.2.33", 1),
        Address("2001:db8::5", 2),
        Address("10.0.0.1", 3),
        Address("100.64.0.1", 4),
        Address("127.0.0.1", 5),
    ]
    other = IPv6Network("2001:db8:122:344::/64")
    assert translate(addresses, [WELL_KNOWN_PREFIX, other]) == [
        Address("64:ff9b::c000:221", 1),
        Address("2001:db8:122:344:c0:2:2100:0", 1),
        Address("2001:db8::5", 2),
    ]
    assert translate(addresses, []) == addresses


def test_wrong_prefixes_and_addresses_are_refused() -> None:
    """A length that RFC 6052 lacks, an address elsewhere, a byte u that is not zero."""
    with pytest.raises(ValueError, match="32, 40, 48"):
        synthesize(IPv6Network("2001:db8::/33"), WELL_KNOWN_IPV4[0])
    with pytest.raises(ValueError, match="not in"):
        extract(WELL_KNOWN_PREFIX, IPv6Address("2001:db8::1"))
    with pytest.raises(ValueError, match="64 to 71"):
        extract(IPv6Network("2001:db8::/32"), IPv6Address("2001:db8:c000:221:100::"))


def test_a_peers_ipv4_candidates_on_an_ipv6_only_host() -> None:
    """What a peer lists becomes candidates that an IPv6-only host can ping."""
    local = LocalNetworks(nat64_prefixes=(WELL_KNOWN_PREFIX,))
    book = CandidateBook()
    book.set_called([Address("192.0.2.33", 7), Address("10.0.0.1", 7)], local, 0.0)
    assert [candidate.path.address for candidate in book] == [Address("64:ff9b::c000:221", 7)]
