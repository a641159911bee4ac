"""Connectivity checks: round trips, aioice as a referee, and hostile bytes."""

from __future__ import annotations

import aioice.stun
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from traversal.wire.address import Address
from traversal.wire.ice_check import (
    CheckRequest,
    CheckResponse,
    encode_check_request,
    encode_check_response,
    encode_role_conflict,
    is_any_stun,
    is_request,
    maybe_receiver_ufrag,
    parse_check_request,
    parse_check_response,
)
from traversal.wire.stun import Message, StunError, TransactionId, encode_message

ID = TransactionId(bytes(range(12)))
PASSWORD = "VOkJxbRl1RmTxUk/WvJxBt"

# RFC 5769 2.1: a request of an ICE agent, with SOFTWARE before and spaces as padding.
RFC_5769_REQUEST = bytes.fromhex(
    "000100582112a442b7e7a701bc34d686fa87dfae"
    "802200105354554e207465737420636c69656e74"
    "002400046e0001ff"
    "80290008932ff9b151263b36"
    "000600096576746a3a68367659202020"
    "000800149aeaa70cbfd8cb56781ef2b5b2d3f249c1b571a2"
    "80280004e57a3bcf"
)
# RFC 5769 2.2 and 2.3: its answers.
RFC_5769_RESPONSES = {
    "0101003c2112a442b7e7a701bc34d686fa87dfae"
    "8022000b7465737420766563746f7220"
    "002000080001a147e112a643"
    "000800142b91f599fd9e90c38c7489f92af9ba53f06be7d7"
    "80280004c07d4c96": Address("192.0.2.1", 32853),
    "010100482112a442b7e7a701bc34d686fa87dfae"
    "8022000b7465737420766563746f7220"
    "002000140002a1470113a9faa5d3f179bc25f4b5bed2b9d9"
    "00080014a382954e4be67bf11784c97c8292c275bfe3ed41"
    "80280004c8fb0b4c": Address("2001:db8:1234:5678:11:2233:4455:6677", 32853),
}

requests = st.builds(
    CheckRequest,
    transaction_id=st.binary(min_size=12, max_size=12).map(TransactionId),
    username=st.from_regex(r"[A-Za-z0-9+/]{4,30}:[A-Za-z0-9+/]{4,30}", fullmatch=True),
    priority=st.integers(1, 2**31 - 1),
    is_controlling=st.booleans(),
    tie_breaker=st.integers(0, 2**64 - 1),
    use_candidate=st.booleans(),
)


def test_the_request_of_rfc_5769() -> None:
    """The RFC's vector is read, down to the role."""
    assert maybe_receiver_ufrag(RFC_5769_REQUEST) == "evtj"
    assert parse_check_request(RFC_5769_REQUEST, PASSWORD) == CheckRequest(
        transaction_id=TransactionId(bytes.fromhex("b7e7a701bc34d686fa87dfae")),
        username="evtj:h6vY",
        priority=0x6E0001FF,
        is_controlling=False,
        tie_breaker=0x932FF9B151263B36,
    )


@pytest.mark.parametrize(("text", "mapped"), RFC_5769_RESPONSES.items())
def test_the_responses_of_rfc_5769(text: str, mapped: Address) -> None:
    """The RFC's vectors over IPv4 and IPv6."""
    assert parse_check_response(bytes.fromhex(text), PASSWORD).mapped_address == mapped


@settings(deadline=None)
@given(requests)
def test_round_trip_of_requests(request: CheckRequest) -> None:
    """What we write, we read, and aioice reads it too."""
    datagram = encode_check_request(request, PASSWORD)
    assert is_any_stun(datagram)
    assert is_request(datagram)
    assert maybe_receiver_ufrag(datagram) == request.username.partition(":")[0]
    assert parse_check_request(datagram, PASSWORD) == request
    theirs = aioice.stun.parse_message(datagram)
    assert theirs.check_message_integrity(PASSWORD.encode())
    assert ("USE-CANDIDATE" in theirs.attributes) is request.use_candidate


def test_round_trip_of_responses() -> None:
    """Success and role conflict; neither is a request."""
    success = encode_check_response(ID, Address("192.0.2.1", 5), PASSWORD)
    conflict = encode_role_conflict(ID, PASSWORD)
    assert not is_request(success)
    assert is_any_stun(conflict)
    assert maybe_receiver_ufrag(success) is None
    assert parse_check_response(success, PASSWORD) == CheckResponse(ID, Address("192.0.2.1", 5))
    assert parse_check_response(conflict, PASSWORD) == CheckResponse(ID, None, 487)


def test_another_password() -> None:
    """Whoever does not know the password can neither ask nor answer."""
    other = "x" * 22
    request = CheckRequest(ID, "abcd:efgh", 1, True, 1)
    with pytest.raises(StunError, match="MESSAGE-INTEGRITY"):
        parse_check_request(encode_check_request(request, other), PASSWORD)
    with pytest.raises(StunError, match="MESSAGE-INTEGRITY"):
        parse_check_response(encode_role_conflict(ID, other), PASSWORD)


@pytest.mark.parametrize("missing", ["USERNAME", "PRIORITY", "ICE-CONTROLLING"])
def test_incomplete_requests(missing: str) -> None:
    """A check without what it takes is refused."""
    attributes: dict[str, object] = {
        "USERNAME": "abcd:efgh",
        "PRIORITY": 1,
        "ICE-CONTROLLING": 1,
    }
    del attributes[missing]
    message = Message(1, 0, ID, attributes)
    with pytest.raises(StunError, match="without"):
        parse_check_request(encode_message(message, integrity_key=PASSWORD.encode()), PASSWORD)


@settings(deadline=None)
@given(st.one_of(st.binary(max_size=200), st.data()))
def test_any_bytes_are_survived(source: bytes | st.DataObject) -> None:
    """One error type, whatever the bytes."""
    if isinstance(source, bytes):
        datagram = source
    else:
        mutant = bytearray(RFC_5769_REQUEST)
        for _ in range(source.draw(st.integers(1, 5))):
            mutant[source.draw(st.integers(0, len(mutant) - 1))] = source.draw(st.integers(0, 255))
        datagram = bytes(mutant)
    maybe_receiver_ufrag(datagram)
    for parse in (parse_check_request, parse_check_response):
        try:
            parse(datagram, PASSWORD)
        except StunError:
            pass
