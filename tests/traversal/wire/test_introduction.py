"""The introduction: its bytes, and when it is believed and answered."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from traversal.keys import Box, DiscoPublic, NodePrivate
from traversal.paths.introduction import Introducer, Outcome, new_session
from traversal.wire import introduction as wire
from traversal.wire.address import Address
from traversal.wire.classify import Kind, classify

ALICE, BOB, EVE = (NodePrivate.generate(lambda n, x=x: bytes([x]) * n) for x in (1, 2, 3))
SAMPLE = wire.Introduction(
    session=b"alice-01",
    echoed_session=None,
    serial=1,
    disco_key=DiscoPublic(b"\x11" * 32),
    home_region=900,
    addresses=(
        (wire.AddressType.STUN, Address("203.0.113.7", 41641)),
        (wire.AddressType.LOCAL, Address("2001:db8::7", 41642)),
    ),
    wants_answer=True,
    mapping=wire.MappingClass.ENDPOINT_INDEPENDENT,
    filtering=wire.FilteringClass.ADDRESS_AND_PORT_DEPENDENT,
    capabilities=wire.Capability.PORT_SEARCH,
)
SAMPLE_HEX = (
    "01616c6963652d3031000000000000000000000000000000011111111111111111111111111111111111111111"
    "1111111111111111111111110384020400000001020200000000000000000000ffffcb007107a2a9"
    "0120010db8000000000000000000000007a2aa"
)


def test_vector() -> None:
    """The plaintext is laid out as documented."""
    assert SAMPLE.encode().hex() == SAMPLE_HEX
    assert wire.parse_introduction(bytes.fromhex(SAMPLE_HEX)) == SAMPLE


def test_only_the_two_nodes_can_make_and_read_it() -> None:
    """It opens for the receiver under the sender's key, and under no other key of either."""
    packet = wire.seal_introduction(SAMPLE, Box(ALICE, BOB.public()), bytes(24))
    assert wire.open_introduction(packet, Box(BOB, ALICE.public())) == SAMPLE
    for box in (Box(BOB, EVE.public()), Box(EVE, ALICE.public())):
        with pytest.raises(wire.IntroductionError):
            wire.open_introduction(packet, box)


def test_stock_nodes_ignore_it() -> None:
    """It is neither disco nor STUN, and no WireGuard message (bytes 1 to 3 would be zero)."""
    packet = wire.seal_introduction(SAMPLE, Box(ALICE, BOB.public()), bytes(24))
    assert classify(packet) is Kind.INTRODUCTION
    assert packet[1:4] != bytes(3)


def test_later_versions() -> None:
    """Another version is refused; unknown classes, bits and trailing bytes of this one are not."""
    box = Box(BOB, ALICE.public())
    packet = bytearray(wire.seal_introduction(SAMPLE, Box(ALICE, BOB.public()), bytes(24)))
    packet[6] = 2
    with pytest.raises(wire.IntroductionError, match="version 2"):
        wire.open_introduction(bytes(packet), box)
    plain = bytearray(SAMPLE.encode() + b"more")
    plain[59] = 77
    plain[61] = 0xFF
    parsed = wire.parse_introduction(bytes(plain))
    assert parsed == replace(SAMPLE, mapping=wire.MappingClass.UNKNOWN)


def test_refusals() -> None:
    """Zero sessions and keys, too many and missing addresses."""
    plain = SAMPLE.encode()
    for bad in (
        plain[:65],
        plain[:-1],
        plain[:1] + bytes(8) + plain[9:],
        plain[:25] + bytes(32) + plain[57:],
        plain[:65] + b"\xff" + bytes(19 * 255),
    ):
        with pytest.raises(wire.IntroductionError):
            wire.parse_introduction(bad)
    with pytest.raises(wire.IntroductionError):
        replace(SAMPLE, addresses=SAMPLE.addresses * 33).encode()


@given(st.binary(max_size=300))
def test_any_bytes_parse_or_raise_own_error(data: bytes) -> None:
    """Random input never raises anything else."""
    for read in (
        wire.parse_introduction,
        lambda d: wire.open_introduction(wire.MAGIC + d, Box(BOB, ALICE.public())),
    ):
        try:
            read(data)
        except wire.IntroductionError:
            pass


def introducer(name: bytes) -> Introducer:
    return Introducer(name, lambda: replace(SAMPLE, disco_key=DiscoPublic(name * 4)))


class TestIntroducer:
    """Belief, answers and retries."""

    def test_exchange_takes_one_round_trip(self) -> None:
        """Both believe after one packet each, and nothing more is sent."""
        alice, bob = introducer(b"alice-01"), introducer(b"bob---01")
        alice.start(0.0)
        hello = alice.poll_introduction(0.0)
        assert hello is not None
        outcome = bob.handle_introduction(hello, 0.1)
        assert outcome.believed == hello
        assert outcome.answer is not None
        assert not outcome.answer.wants_answer
        last = alice.handle_introduction(outcome.answer, 0.2)
        assert last.believed == outcome.answer
        assert last.answer is None
        assert alice.next_deadline() == float("inf")

    def test_retries_back_off(self) -> None:
        """Unanswered introductions are repeated at 0.5, 1, 2 ... 30 s."""
        alice = introducer(b"alice-01")
        alice.start(0.0)
        times = []
        while len(times) < 9:
            times.append(alice.next_deadline())
            assert alice.poll_introduction(times[-1]) is not None
        gaps = [b - a for a, b in itertools.pairwise(times)]
        assert gaps == [0.5, 1, 2, 4, 8, 16, 30, 30]

    def test_replay_of_a_former_life_is_not_believed(self) -> None:
        """A recording changes nothing; the restarted node itself is heard by the proof."""
        old_alice, bob, alice = (introducer(n) for n in (b"alice-01", b"bob---01", b"alice-02"))
        old_alice.start(0.0)
        recording = old_alice.poll_introduction(0.0)
        assert recording is not None
        bob.handle_introduction(recording, 0.0)

        # Alice restarts. Bob does not believe at once, asks for proof, gets it.
        alice.start(10.0)
        hello = alice.poll_introduction(10.0)
        assert hello is not None
        asked = bob.handle_introduction(hello, 10.0)
        assert asked.believed is None
        assert asked.answer is not None
        assert asked.answer.wants_answer
        proof = alice.handle_introduction(asked.answer, 10.1)
        assert proof.believed is not None
        assert proof.answer is not None
        assert bob.handle_introduction(proof.answer, 10.2).believed == proof.answer

        replayed = bob.handle_introduction(recording, 11.0)
        assert replayed.believed is None
        again = bob.handle_introduction(proof.answer, 12.0)
        assert again.believed is None
        assert again.answer is None

    def test_replay_of_a_former_life_that_knew_us(self) -> None:
        """A recording that echoes our present session is not believed after a restart either."""
        bob, old, new = (introducer(n) for n in (b"bob---01", b"alice-01", b"alice-02"))
        first = bob.handle_introduction(old._make(wants_answer=False), 0.0)
        assert first.believed is not None
        old.handle_introduction(bob._make(wants_answer=False), 0.1)
        recording = old._make(wants_answer=False)
        assert recording.echoed_session == b"bob---01"
        new.handle_introduction(bob._make(wants_answer=False), 10.0)
        assert bob.handle_introduction(new._make(wants_answer=False), 10.1).believed is not None
        for _ in range(3):
            assert bob.handle_introduction(recording, 11.0).believed is None
        assert bob.handle_introduction(new._make(wants_answer=False), 12.0).believed is not None

    def test_floods_get_few_answers(self) -> None:
        """A thousand introductions within a second are answered at most five or six times."""
        bob = introducer(b"bob---01")
        answers = 0
        for i in range(1000):
            hello = replace(SAMPLE, session=i.to_bytes(8, "big") if i else b"x" * 8, serial=i)
            answers += bob.handle_introduction(hello, i / 1000).answer is not None
        assert 1 <= answers <= 6

    def test_session_is_never_zero(self) -> None:
        """Even a broken random source gives a usable session."""
        assert any(new_session(bytes))

    def test_own_words_sent_back(self) -> None:
        """Whoever reflects an introduction of ours is not believed to be the peer: the box between
        two nodes' keys opens in both directions."""
        alice = introducer(b"alice-01")
        alice.start(0.0)
        hello = alice.poll_introduction(0.0)
        assert hello is not None
        assert alice.handle_introduction(hello, 0.1) == Outcome(None, None)
        assert not alice.is_introduced
