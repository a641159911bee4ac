"""The edge tunnel as a path: used when it should be, left when it need not be, in virtual time."""

from __future__ import annotations

import pytest

from traversal.paths.edge import EdgePolicy
from traversal.paths.effects import PathState, SendCallMeMaybe, SendPing
from traversal.paths.scoring import EDGE_HOST, EDGE_PATH, Measured, Path, is_better
from traversal.wire.address import Address

DIRECT, VIA = Path(Address("198.51.100.7", 1)), Path(Address("198.51.100.7", 1), 9)


@pytest.fixture
def make(world):
    """Two nodes with an edge tunnel each; `options` are those of the machines."""

    def build(a="hard", b="hard", **options):
        w = world().join(a, b, **options)
        for node in (w.a, w.b):
            node.peer.set_edge_available(True, 0.0)
        return w

    return build


def set_relay(w, is_up):
    w.is_relay_up = is_up
    for node in (w.a, w.b):
        node.peer.set_relay_available(is_up, w.now)
        node.flush()


def states(w):
    return w.a.peer.state, w.b.peer.state


def edge_pings(node, since=0.0):
    return [t for t, e in node.sent(SendPing, since) if e.path.is_edge]


def test_ranks():
    """Direct, peer relay, edge: whatever their latencies. No peer can name the edge's address."""
    fast, slow = 0.001, 0.9
    assert is_better(Measured(DIRECT, slow), Measured(EDGE_PATH, fast))
    assert is_better(Measured(VIA, slow), Measured(EDGE_PATH, fast))
    assert not is_better(Measured(EDGE_PATH, fast), Measured(VIA, slow))
    assert not is_better(Measured(EDGE_PATH, fast), Measured(DIRECT, slow))
    assert str(EDGE_PATH) == "the edge"


def test_an_address_like_the_edge_is_no_candidate(make):
    """A peer that lists the fictitious host makes us ping nothing."""
    w = make()
    w.a.peer.handle_call_me_maybe((Address(EDGE_HOST, 5), Address(EDGE_HOST, 0)), 0.0)
    w.a.flush()
    assert not edge_pings(w.a)
    assert all(c.path.address.host != EDGE_HOST for c in w.a.peer.statistics().candidates)


def test_unused_while_the_relay_works(make):
    """By default two hard NATs stay on DERP, and the edge is not even pinged."""
    w = make()
    log = w.talk(w.a, w.b, until=20)
    w.run(20)
    assert states(w) == (PathState.RELAY, PathState.RELAY)
    assert not edge_pings(w.a)
    assert not w.lost(log, 0, 19)


def test_takes_over_when_the_relay_goes_and_gives_back(make):
    """DERP goes: the edge carries traffic within a round trip. DERP returns: it takes over, and not
    a datagram is lost by that."""
    w = make()
    log = w.talk(w.a, w.b, until=40)
    w.run(10)
    set_relay(w, False)
    w.run(10.2)
    assert states(w) == (PathState.EDGE, PathState.EDGE)
    w.run(25)
    assert states(w) == (PathState.EDGE, PathState.EDGE)
    set_relay(w, True)
    w.run(25.3)
    assert states(w) == (PathState.RELAY, PathState.RELAY)
    w.run(40)
    # What left between the relay's end and the edge's first Pong is lost in the pure machine; the
    # shell sends it by the edge as well.
    assert not w.lost(log, 10.15, 39)


def test_direct_beats_it(make):
    """With DERP gone a direct path that answers is taken from the edge at once."""
    w = make("easy", "easy")
    w.is_down = True
    set_relay(w, False)
    log = w.talk(w.a, w.b, until=30)
    w.run(8)
    assert states(w) == (PathState.EDGE, PathState.EDGE)
    w.is_down = False
    w.run(14.5)
    assert states(w) == (PathState.DIRECT, PathState.DIRECT)
    w.run(30)
    assert not w.lost(log, 0.2, 29)


def test_a_dead_direct_path_is_left_for_it(make):
    """Without DERP, a silent direct path costs less than a second before the edge carries on."""
    w = make("easy", "easy")
    log = w.talk(w.a, w.b, until=30)
    w.run(5)
    set_relay(w, False)
    w.run(10)
    assert states(w) == (PathState.DIRECT, PathState.DIRECT)
    w.is_down = True
    w.run(11.2)
    assert states(w) == (PathState.EDGE, PathState.EDGE)
    w.run(20)
    assert len(w.lost(log, 9.9, 19)) * 0.05 / 2 < 1.2
    w.is_down = False
    w.run(24)
    assert states(w) == (PathState.DIRECT, PathState.DIRECT)


def test_before_the_relay(make):
    """Where policy prefers the edge to DERP it is found with the first search, and when it dies
    DERP carries the traffic within a second."""
    w = make(edge_policy=EdgePolicy.BEFORE_RELAY)
    log = w.talk(w.a, w.b, until=30)
    w.run(0.2)
    assert states(w) == (PathState.EDGE, PathState.EDGE)
    w.run(10)
    w.is_edge_up = False
    w.run(20)
    assert states(w) == (PathState.RELAY, PathState.RELAY)
    assert len(w.lost(log, 9.9, 19)) * 0.05 / 2 < 1
    w.is_edge_up = True
    w.run(26)
    assert states(w) == (PathState.EDGE, PathState.EDGE)


def test_first(make):
    """Where policy wants the edge before all, it is used though a direct path works; nothing else
    is looked for; and without a tunnel the direct path is good enough."""
    w = make("easy", "easy", edge_policy=EdgePolicy.FIRST)
    log = w.talk(w.a, w.b, until=60)
    w.run(1)
    assert states(w) == (PathState.EDGE, PathState.EDGE)
    w.run(20)
    assert len(w.a.sent(SendCallMeMaybe, 6, 20)) == 0
    for node in (w.a, w.b):
        node.peer.set_edge_available(False, w.now)
        node.flush()
    w.run(21)
    assert states(w) == (PathState.DIRECT, PathState.DIRECT)
    w.run(40)
    assert len(w.a.sent(SendCallMeMaybe, 26, 40)) == 0
    for node in (w.a, w.b):
        node.peer.set_edge_available(True, w.now)
        node.flush()
    w.run(40.5)
    assert states(w) == (PathState.EDGE, PathState.EDGE)
    w.run(60)
    assert not w.lost(log, 0, 59)


def test_first_with_a_peer_that_has_no_edge(make):
    """The peer has no tunnel: the direct path is used, and the edge is asked for once a minute."""
    w = make("easy", "easy", edge_policy=EdgePolicy.FIRST)
    w.is_edge_up = False
    w.talk(w.a, w.b, until=130)
    w.run(130)
    assert states(w) == (PathState.DIRECT, PathState.DIRECT)
    assert len(edge_pings(w.a, 10)) <= 3


def test_the_relay_is_asked_whether_it_is_back(make):
    """On the edge the relay is pinged with each search: its Pong brings the traffic back."""
    w = make()
    w.talk(w.a, w.b, until=30)
    w.run(5)
    set_relay(w, False)
    w.run(10)
    assert states(w) == (PathState.EDGE, PathState.EDGE)
    w.is_relay_up = True
    w.run(17)
    assert states(w) == (PathState.RELAY, PathState.RELAY)


def test_idle(make):
    """Without traffic the edge is not pinged either."""
    w = make()
    set_relay(w, False)
    w.talk(w.a, w.b, until=5)
    w.run(60)
    assert not edge_pings(w.a, 54)
    assert w.a.peer.next_deadline() == float("inf")
