"""The verdict names the cause and what would help, for programs and for people."""

from __future__ import annotations

import json

import pytest

from traversal.paths.peer_relay import RelayAttempt, RelayStep
from traversal.paths.report import NatFacts
from traversal.paths.verdict import Finding, Remedy, can_punch, judge
from traversal.wire.introduction import FilteringClass as F
from traversal.wire.introduction import MappingClass as M

OPEN = NatFacts(M.NONE, F.OPEN)
EASY = NatFacts(M.ENDPOINT_INDEPENDENT, F.ADDRESS_AND_PORT_DEPENDENT)
EASY_AF = NatFacts(M.ENDPOINT_INDEPENDENT, F.ADDRESS_DEPENDENT)
HARD = NatFacts(M.ADDRESS_AND_PORT_DEPENDENT, F.ADDRESS_AND_PORT_DEPENDENT)
MAPPED = NatFacts(M.ADDRESS_AND_PORT_DEPENDENT, F.UNKNOWN, has_port_mapping=True)
BLOCKED = NatFacts(is_udp_blocked=True)
UNKNOWN = NatFacts()

MATRIX = [
    (OPEN, [OPEN, MAPPED, EASY, EASY_AF, HARD], [True] * 5),
    (MAPPED, [MAPPED, EASY, EASY_AF, HARD, UNKNOWN], [True] * 5),
    (EASY, [EASY, EASY_AF, HARD, UNKNOWN], [True, True, False, None]),
    (EASY_AF, [EASY_AF, HARD], [True, True]),
    (HARD, [HARD, UNKNOWN], [False, None]),
    (BLOCKED, [OPEN, MAPPED, EASY], [False] * 3),
]


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [(one, o, e) for one, others, results in MATRIX for o, e in zip(others, results, strict=True)],
)
def test_who_can_punch(one, other, expected) -> None:
    """The matrix of path selection specification 17, in both directions."""
    assert can_punch(one, other) is expected
    assert can_punch(other, one) is expected


def verdict_after(world, a_kind, b_kind, own, peer, *, seconds=12.0, knows=True, talks="ab"):
    w = world().join(a_kind, b_kind, knows=knows)
    w.talk(*[{"a": w.a, "b": w.b}[n] for n in talks], every=0.1, until=seconds)
    w.run(seconds)
    return judge("bob", w.a.peer.statistics(), own, peer, "lab-1", w.now)


def test_direct(world) -> None:
    """A direct path needs no excuse."""
    verdict = verdict_after(world, "easy", "easy", EASY, EASY)
    assert verdict.findings == (Finding.DIRECT,)
    assert verdict.remedies == ()
    assert "goes directly to 198.51.100.22:" in verdict.text()
    assert any(a.answered_ago_seconds is not None for a in verdict.attempts)


@pytest.mark.parametrize(
    ("kinds", "facts", "finding", "remedy"),
    [
        (("hard", "hard"), (HARD, HARD), Finding.BOTH_HARD, Remedy.MAP_PORT_HERE),
        (("hard", "hard"), (HARD, HARD), Finding.BOTH_HARD, Remedy.PEER_RELAY),
        (("hard", "easy"), (HARD, EASY), Finding.HARD_HERE, Remedy.PORT_SEARCH),
        (("easy", "hard"), (EASY, HARD), Finding.HARD_THERE, Remedy.PORT_SEARCH),
        (("blocked", "easy"), (BLOCKED, EASY), Finding.UDP_BLOCKED_HERE, Remedy.OPEN_UDP_HERE),
        (("easy", "blocked"), (EASY, BLOCKED), Finding.UDP_BLOCKED_THERE, Remedy.OPEN_UDP_THERE),
    ],
)
def test_relayed(world, kinds, facts, finding, remedy) -> None:
    """Each hopeless pair is named, with what would help."""
    verdict = verdict_after(world, *kinds, *facts)
    assert finding in verdict.findings
    assert remedy in verdict.remedies
    assert verdict.sentences[0] == "Traffic to bob goes by the relay lab-1."


def test_unknown_peer(world) -> None:
    """A peer that never said anything: check whether it runs."""
    verdict = verdict_after(world, "easy", "easy", EASY, UNKNOWN, knows=False, talks="a")
    assert Finding.NO_CANDIDATES in verdict.findings
    assert Remedy.CHECK_PEER in verdict.remedies


def test_silent_peer_is_not_off_line(world) -> None:
    """A peer that only listens is suspected until it answers a Ping by the relay, which is sent
    with searches that go on for 5 s."""
    w = world().join("easy", "hard")
    w.is_relay_up = False
    w.talk(w.a, every=0.1, until=12.0)
    w.run(4.0)
    assert Finding.NO_CALL in judge("bob", w.a.peer.statistics(), EASY, HARD, "x", w.now).findings
    assert w.a.peer.relay_latency_seconds is None
    w.is_relay_up = True
    w.run(11.0)
    assert w.a.peer.relay_latency_seconds == pytest.approx(0.06)
    verdict = judge("bob", w.a.peer.statistics(), EASY, HARD, "x", w.now)
    assert Finding.NO_CALL not in verdict.findings
    assert Remedy.CHECK_PEER not in verdict.remedies


def test_lost_path(world) -> None:
    """A path that worked is said to have worked, and until when."""
    w = world().join("easy", "easy")
    w.talk(w.a, w.b, every=0.1, until=40.0)
    w.run(10.0)
    w.is_down = True
    w.run(11.0)
    doubt = judge("bob", w.a.peer.statistics(), EASY, EASY, "lab-1", w.now)
    assert doubt.findings == (Finding.DOUBT,)
    w.run(30.0)
    lost = judge("bob", w.a.peer.statistics(), EASY, EASY, "lab-1", w.now)
    assert Finding.PATH_LOST in lost.findings
    assert "worked until 2" in lost.text()


def test_lossy_path(world) -> None:
    """A shelved path is named with its loss."""
    w = world(5).join()
    w.talk(w.a, w.b, every=0.1, until=40.0)
    w.run(10.0)
    w.loss = 0.4
    w.run(40.0)
    verdict = judge("bob", w.a.peer.statistics(), EASY, EASY, "lab-1", w.now)
    assert Finding.LOSSY in verdict.findings


def test_idle(world) -> None:
    """Without traffic there is no path, and that is no fault."""
    verdict = verdict_after(world, "easy", "easy", EASY, EASY, talks="")
    assert verdict.findings == (Finding.IDLE,)


def test_detours(world) -> None:
    """What was tried by peer relays and by the edge is told, and why it does not help."""
    w = world().join("hard", "hard")
    w.is_edge_up = False
    w.a.peer.set_edge_available(True, w.now)
    w.a.peer.set_relay_available(False, w.now)
    w.talk(w.a, w.b, every=0.1, until=20.0)
    w.run(19.5)
    w.a.peer.set_relay_available(True, w.now)
    tried = (
        RelayAttempt("one", RelayStep.SILENT, 2.5),
        RelayAttempt("two", RelayStep.UNREACHABLE, 3.5),
        RelayAttempt("three", RelayStep.BINDING, 19.0),
    )
    verdict = judge("bob", w.a.peer.statistics(), HARD, HARD, "x", w.now, peer_relays=tried)
    assert {Finding.PEER_RELAYS_FAILED, Finding.EDGE_UNANSWERED} <= set(verdict.findings)
    assert "one did not answer our request, two does not answer us by UDP." in verdict.text()
    assert "three" not in verdict.text()
    by_source = {attempt.source: attempt for attempt in verdict.attempts}
    assert by_source["peer-relay"].address == "peer relay three"
    assert by_source["peer-relay"].pinged_ago_seconds == pytest.approx(0.5)
    assert by_source["edge"].outcome in ("no answer", "no answer yet")
    direct = [a.outcome for a in verdict.attempts if a.address.startswith("198.51.100.22:")]
    assert direct in (["no answer"], ["no answer yet"])


def test_json(world) -> None:
    """The verdict is plain JSON with stable codes."""
    verdict = verdict_after(world, "hard", "hard", HARD, HARD)
    table = json.loads(json.dumps(verdict.to_dict()))
    assert table["state"] == "relay"
    assert "both-nats-hard" in table["findings"]
    assert table["own_nat"]["mapping"] == "address_and_port_dependent"
    assert table["attempts"][0]["pinged_ago_seconds"] > 0
