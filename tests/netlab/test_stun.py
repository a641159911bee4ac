"""The probe's STUN messages: vectors, round trips, and nothing but StunError for bad bytes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from netlab.stun import Request, Response, StunError, parse

# RFC 5769 section 2.2 (IPv4) and 2.3 (IPv6), cut down to XOR-MAPPED-ADDRESS.
TRANSACTION = bytes.fromhex("b7e7a701bc34d686fa87dfae")
RESPONSE_IPV4 = (
    bytes.fromhex("0101000c2112a442") + TRANSACTION + bytes.fromhex("002000080001a147e112a643")
)
RESPONSE_IPV6 = (
    bytes.fromhex("010100182112a442")
    + TRANSACTION
    + bytes.fromhex("002000140002a1470113a9faa5d3f179bc25f4b5bed2b9d9")
)


@pytest.mark.parametrize(
    ("data", "address"),
    [(RESPONSE_IPV4, "192.0.2.1"), (RESPONSE_IPV6, "2001:db8:1234:5678:11:2233:4455:6677")],
)
def test_vectors(data: bytes, address: str) -> None:
    """The addresses of RFC 5769 are read, and written with the same bytes."""
    message = parse(data)
    assert message == Response(transaction=TRANSACTION, address=address, port=32853)
    encoded = message.encode()
    assert encoded[:20] == data[:20]
    # The reserved byte is 0 in both.
    assert encoded[20:] == data[20:]


transactions = st.binary(min_size=12, max_size=12)
requests = st.builds(
    Request,
    transaction=transactions,
    change_address=st.booleans(),
    change_port=st.booleans(),
    response_port=st.none() | st.integers(0, 65535),
)
responses = st.builds(
    Response,
    transaction=transactions,
    address=st.ip_addresses().map(str),
    port=st.integers(0, 65535),
)


@given(requests | responses)
def test_round_trip(message: Request | Response) -> None:
    """Every message is read back as it was."""
    assert parse(message.encode()) == message


@given(st.binary(max_size=80) | st.builds(lambda m, n: m.encode()[:n], requests, st.integers(0)))
def test_never_crashes(data: bytes) -> None:
    """Any bytes give a message or a StunError."""
    try:
        parse(data)
    except StunError:
        pass
