"""Punch messages: their bytes, whom they are for, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from traversal.keys import Box, NodePrivate
from traversal.wire import punching as wire
from traversal.wire.address import Address
from traversal.wire.classify import is_plain_data
from traversal.wire.introduction import FilteringClass, MappingClass, is_introduction

ALICE, BOB, EVE = (NodePrivate.generate(lambda n, x=x: bytes([x]) * n) for x in (1, 2, 3))
SAMPLE = wire.PunchMessage(
    kind=wire.PunchKind.PLAN,
    session=b"alice-01",
    echoed_session=b"bob---01",
    serial=7,
    attempt=0x01020304,
    method=wire.PunchMethod.PREDICTED,
    mapping=MappingClass.ADDRESS_AND_PORT_DEPENDENT,
    filtering=FilteringClass.ADDRESS_AND_PORT_DEPENDENT,
    pattern=wire.PortPatternCode.SEQUENTIAL,
    step=-2,
    sockets=32,
    address=Address("203.0.113.7", 41641),
    source=Address("198.51.100.9", 0),
    ranges=((4000, 4080), (1024, 65535)),
)
SAMPLE_HEX = (
    "02616c6963652d3031626f622d2d2d30310000000000000007010203040204"
    "0402fffe002000000000000000000000ffffcb007107a2a9"
    "00000000000000000000ffffc63364090000020fa00ff00400ffff"
)


def test_vector() -> None:
    """The plaintext is laid out as documented."""
    assert SAMPLE.encode().hex() == SAMPLE_HEX
    assert wire.parse_punch_message(bytes.fromhex(SAMPLE_HEX)) == SAMPLE


def test_only_the_two_nodes_can_make_and_read_it() -> None:
    """It opens for the receiver under the sender's key, and under no other key of either."""
    packet = wire.seal_punch_message(SAMPLE, Box(ALICE, BOB.public()), bytes(24))
    assert wire.open_punch_message(packet, Box(BOB, ALICE.public())) == SAMPLE
    for box in (Box(BOB, EVE.public()), Box(EVE, ALICE.public())):
        with pytest.raises(wire.PunchMessageError):
            wire.open_punch_message(packet, box)


def test_nobody_else_takes_it_for_something() -> None:
    """It is no disco, no STUN, no introduction and no WireGuard message."""
    packet = wire.seal_punch_message(SAMPLE, Box(ALICE, BOB.public()), bytes(24))
    assert is_plain_data(packet)
    assert not is_introduction(packet)
    assert packet[1:4] != bytes(3)


def test_later_versions() -> None:
    """Another version is refused; unknown classes and trailing bytes of this one are not."""
    box = Box(BOB, ALICE.public())
    packet = bytearray(wire.seal_punch_message(SAMPLE, Box(ALICE, BOB.public()), bytes(24)))
    packet[6] = 2
    with pytest.raises(wire.PunchMessageError, match="version 2"):
        wire.open_punch_message(bytes(packet), box)
    plain = bytearray(SAMPLE.encode() + b"more")
    plain[30] = plain[32] = 77
    assert wire.parse_punch_message(bytes(plain)) == replace(
        SAMPLE, mapping=MappingClass.UNKNOWN, pattern=wire.PortPatternCode.UNKNOWN
    )


def test_refusals() -> None:
    """Short messages, missing sessions and ranges, empty ranges, unknown kinds and methods."""
    plain = SAMPLE.encode()
    for bad in (
        plain[:73],
        plain[:-1],
        plain[:1] + bytes(8) + plain[9:],
        plain[:9] + bytes(8) + plain[17:],
        b"\x09" + plain[1:],
        plain[:29] + b"\x09" + plain[30:],
        plain[:73] + b"\x09" + plain[74:] * 9,
        plain[:74] + bytes(4) + plain[78:],
        plain[:74] + b"\x20\x00\x10\x00" + plain[78:],
    ):
        with pytest.raises(wire.PunchMessageError):
            wire.parse_punch_message(bad)
    with pytest.raises(wire.PunchMessageError):
        replace(SAMPLE, ranges=SAMPLE.ranges * 5).encode()


ports = st.integers(1, 65535)
messages = st.builds(
    wire.PunchMessage,
    kind=st.sampled_from(wire.PunchKind),
    session=st.binary(min_size=8, max_size=8).filter(any),
    echoed_session=st.binary(min_size=8, max_size=8).filter(any),
    serial=st.integers(0, 2**64 - 1),
    attempt=st.integers(0, 2**32 - 1),
    method=st.sampled_from(wire.PunchMethod),
    mapping=st.sampled_from(MappingClass),
    filtering=st.sampled_from(FilteringClass),
    pattern=st.sampled_from(wire.PortPatternCode),
    step=st.integers(-32768, 32767),
    sockets=st.integers(0, 65535),
    address=st.none() | st.builds(Address, st.just("203.0.113.7"), ports),
    source=st.none() | st.builds(Address, st.just("2001:db8::9"), ports),
    ranges=st.lists(
        st.tuples(ports, ports).map(lambda pair: (min(pair), max(pair))), max_size=8
    ).map(tuple),
)


@given(messages)
def test_round_trip(message: wire.PunchMessage) -> None:
    """What is encoded is read back the same."""
    assert wire.parse_punch_message(message.encode()) == message


@given(st.binary(max_size=200))
def test_any_bytes_parse_or_raise_own_error(data: bytes) -> None:
    """Random input never raises anything else."""
    for read in (
        wire.parse_punch_message,
        lambda d: wire.open_punch_message(wire.MAGIC + d, Box(BOB, ALICE.public())),
    ):
        try:
            read(data)
        except wire.PunchMessageError:
            pass
