"""ICE descriptions: the RFC's example, what browsers send, round trips, and hostile text."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address

import pytest
from aioice import Candidate as AioiceCandidate
from aioice.candidate import candidate_priority
from hypothesis import given, settings
from hypothesis import strategies as st

from traversal.wire.address import Address
from traversal.wire.ice_description import (
    MAX_CANDIDATES,
    MAX_TEXT_CHARACTERS,
    PEER_REFLEXIVE_PRIORITY,
    IceCandidate,
    IceCandidateType,
    IceDescription,
    IceDescriptionError,
    encode_candidate,
    make_candidate,
    parse_candidate,
    parse_description,
)

# RFC 8839 5.6 and its appendix A.
EXAMPLE = """v=0
o=jdoe 2890844526 2890842807 IN IP6 2001:db8:a0b:12f0::1
s=
c=IN IP4 192.0.2.3
t=0 0
a=ice-options:ice2
a=ice-pacing:50
a=ice-pwd:asd88fgpdd777uzjYhagZg
a=ice-ufrag:8hhY
m=audio 45664 RTP/AVP 0
b=RS:0
b=RR:0
a=rtpmap:0 PCMU/8000
a=candidate:1 1 UDP 2130706431 203.0.113.141 8998 typ host
a=candidate:2 1 UDP 1694498815 192.0.2.3 45664 typ srflx raddr 203.0.113.141 rport 8998
"""

BROWSER = "\r\n".join(
    [
        "a=candidate:1 1 udp 2113937151 3b6a.local 5 typ host generation 0 network-cost 999",
        "a=candidate:2 1 tcp 1518280447 192.0.2.7 9 typ host tcptype active generation 0",
        "a=candidate:3 2 udp 2113937150 192.0.2.7 6 typ host generation 0",
        "a=candidate:4 1 udp 1677729535 2001:db8::7 7 typ srflx raddr :: rport 0 generation 0",
        "a=candidate:nonsense",
        "a=ice-ufrag:EsAw",
        "a=ice-pwd:bP+XJMM09aR8AiX1jdukzR6Y",
        "a=end-of-candidates",
    ]
)

addresses = st.builds(
    lambda ip, port: Address(str(ip), port),
    st.one_of(
        st.builds(IPv4Address, st.integers(0, 2**32 - 1)),
        st.builds(IPv6Address, st.integers(0, 2**128 - 1)),
    ),
    st.integers(1, 65535),
)
candidates = st.builds(
    make_candidate,
    st.sampled_from(IceCandidateType),
    addresses,
    addresses,
    st.integers(0, 65535),
)


def test_the_example_of_rfc_8839() -> None:
    """A whole session description, as the RFC has it."""
    description = parse_description(EXAMPLE)
    assert description.ufrag == "8hhY"
    assert description.password == "asd88fgpdd777uzjYhagZg"
    assert description.candidates == (
        IceCandidate("1", 2130706431, Address("203.0.113.141", 8998), IceCandidateType.HOST),
        IceCandidate(
            "2",
            1694498815,
            Address("192.0.2.3", 45664),
            IceCandidateType.SERVER_REFLEXIVE,
            Address("203.0.113.141", 8998),
        ),
    )


def test_what_browsers_send() -> None:
    """Candidates that UDP to an IP address can't reach are left out, the rest is kept."""
    (candidate,) = parse_description(BROWSER).candidates
    assert candidate.address == Address("2001:db8::7", 7)


@settings(deadline=None)
@given(st.lists(candidates, max_size=5, unique_by=lambda c: c.address), st.booleans())
def test_round_trip(listed: list[IceCandidate], is_lite: bool) -> None:
    """What we write, we read."""
    description = IceDescription("abcd", "p" * 22, tuple(listed), is_lite)
    assert parse_description(description.encode()) == description


@settings(deadline=None)
@given(candidates)
def test_aioice_reads_what_we_write(candidate: IceCandidate) -> None:
    """Another implementation understands our candidates."""
    theirs = AioiceCandidate.from_sdp(encode_candidate(candidate))
    assert (theirs.host, theirs.port) == candidate.address
    assert theirs.type == candidate.type.value
    assert theirs.priority == candidate.priority


@settings(deadline=None)
@given(st.text(max_size=300))
def test_any_text_is_survived(text: str) -> None:
    """One error type, whatever the text."""
    for parse in (parse_description, parse_candidate):
        try:
            parse(text)
        except IceDescriptionError:
            pass


@settings(deadline=None)
@given(st.lists(st.text(max_size=12), min_size=6, max_size=12))
def test_any_words_are_survived(words: list[str]) -> None:
    """Also of a candidate line only."""
    try:
        parse_candidate(" ".join(words))
    except IceDescriptionError:
        pass


@pytest.mark.parametrize(
    "line",
    [
        "",
        "1 1 udp 2130706431 192.0.2.1 8998",
        "1 1 udp 2130706431 192.0.2.1 0 typ host",
        "1 1 udp 2130706431 192.0.2.1 70000 typ host",
        "1 1 udp 2130706431 192.0.2.1 -1 typ host",
        "1 1 udp 2130706431 fe80::1%eth0 8998 typ host",
        "1 1 udp 2130706431 peer.example 8998 typ host",
        "1 1 udp 0 192.0.2.1 8998 typ host",
        "1 1 udp 4294967296 192.0.2.1 8998 typ host",
        "1 1 udp 2130706431 192.0.2.1 8998 typ alien",
        "1 1 tcp 2130706431 192.0.2.1 8998 typ host",
        "1 2 udp 2130706431 192.0.2.1 8998 typ host",
        "one! 1 udp 2130706431 192.0.2.1 8998 typ host",
    ],
)
def test_unusable_candidates(line: str) -> None:
    """Each is refused with a text that says why."""
    with pytest.raises(IceDescriptionError, match="candidate"):
        parse_candidate(line)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("a=ice-ufrag:abcd\n", "a=ice-pwd"),
        ("a=ice-pwd:asd88fgpdd777uzjYhagZg\n", "a=ice-ufrag"),
        ("a=ice-ufrag:abc\na=ice-pwd:asd88fgpdd777uzjYhagZg\n", "4 to 256"),
        ("a=ice-ufrag:abcd\na=ice-pwd:short\n", "22 to 256"),
        ("a=ice-ufrag:abcd\na=ice-pwd:asd88fgpdd777uzjYhag:g\n", "22 to 256"),
        ("x" * (MAX_TEXT_CHARACTERS + 1), "at most"),
    ],
)
def test_unusable_descriptions(text: str, match: str) -> None:
    """The text says which line is missing or wrong."""
    with pytest.raises(IceDescriptionError, match=match):
        parse_description(text)


def test_candidates_are_bounded() -> None:
    """A description of hundreds of addresses is cut."""
    lines = [f"a=candidate:1 1 udp 1 192.0.2.1 {port} typ host" for port in range(1, 500)]
    text = "\n".join(["a=ice-ufrag:abcd", "a=ice-pwd:" + "p" * 22, *lines])
    assert len(parse_description(text).candidates) == MAX_CANDIDATES


def test_the_password_stays_hidden() -> None:
    """A description in a log is no way in."""
    assert "secret" not in repr(IceDescription("abcd", "secret" * 4))


def test_priority_of_checks() -> None:
    """The PRIORITY of our checks is RFC 8445's for a peer-reflexive candidate."""
    assert candidate_priority(1, "prflx") == PEER_REFLEXIVE_PRIORITY
