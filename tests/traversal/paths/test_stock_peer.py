"""Our machine against a model of a stock node's rules: both stay direct, neither is bothered."""

from __future__ import annotations

import itertools

import pytest

from traversal.paths.effects import PathState, SendCallMeMaybe, SendPing
from traversal.wire.address import Address

PAIRS = list(itertools.product(("open", "easy", "easyAF"), repeat=2))


@pytest.mark.parametrize(("a_kind", "b_kind"), PAIRS)
@pytest.mark.parametrize("is_one_way", [True, False])
def test_direct_within_three_round_trips(world, a_kind, b_kind, is_one_way) -> None:
    """When we speak, alone or not, the speakers are direct in 3 round trips + 50 ms."""
    w = world().join(a_kind, b_kind, stock_b=True)
    speakers = (w.a,) if is_one_way else (w.a, w.b)
    w.talk(*speakers, every=0.02, until=1.0)
    w.run(3 * 2 * w.delay + 0.05)
    for node in speakers:
        assert node.peer.state is PathState.DIRECT


@pytest.mark.parametrize(("a_kind", "b_kind"), PAIRS)
def test_only_the_stock_node_speaks(world, a_kind, b_kind) -> None:
    """We know a path in 3 round trips; the stock node needs its own next round of Pings at most,
    since it never Pings back, and a CallMeMaybe of ours would be an answer to its own."""
    w = world().join(a_kind, b_kind, stock_b=True)
    w.talk(w.b, every=0.02, until=7.0)
    w.run(3 * 2 * w.delay + 0.05)
    assert w.a.peer.route.path is not None
    w.run(6.1)
    assert w.b.peer.state is PathState.DIRECT
    assert w.a.sent(SendCallMeMaybe) == []


def test_a_stock_peer_that_knows_nothing(world) -> None:
    """A stock node without our addresses is called once and then direct, both ways."""
    w = world().join("easy", "easy", stock_b=True, knows=False)
    w.a.peer.set_configured_addresses(w.b.own_addresses(), 0.0)
    w.talk(w.a, w.b, every=0.05, until=2.0)
    w.run(2.0)
    assert w.a.peer.state is PathState.DIRECT
    assert w.b.peer.state is PathState.DIRECT
    assert len(w.a.sent(SendCallMeMaybe)) == 1


def test_undisturbed_for_minutes(world) -> None:
    """Five minutes of traffic: nobody leaves the direct path, Pings stay few."""
    w = world().join("easy", "easy", stock_b=True)
    log = w.talk(w.a, w.b, every=0.1, until=300.0)
    w.run(1.0)
    for second in range(2, 300):
        w.run(float(second))
        assert w.a.peer.state is PathState.DIRECT
        assert w.b.peer.state is PathState.DIRECT
    assert w.lost(log, 0.0, 298.0) == []
    assert len(w.a.sent(SendPing)) < 2.5 * 300
    assert len(w.a.sent(SendCallMeMaybe)) < 8


@pytest.mark.parametrize("outage", [2.0, 5.0, 12.0, 40.0])
def test_outage(world, outage) -> None:
    """We are back in 3 s, the stock node in the 6.1 s that its own rules give."""
    w = world().join("easy", "easy", stock_b=True)
    log = w.talk(w.a, w.b, every=0.05, until=90.0)
    w.run(10.0)
    w.is_down = True
    w.run(10.0 + outage)
    w.is_down = False
    w.run(13.1 + outage)
    assert w.a.peer.state is PathState.DIRECT
    w.run(16.1 + outage)
    assert w.b.peer.state is PathState.DIRECT
    w.run(90.0)
    ours = {number: entry for number, entry in log.items() if entry[1] is w.a}
    assert w.lost(ours, 11.0, 88.0) == []


@pytest.mark.parametrize("moves_at", [1.0, 10.0])
def test_our_rebind(world, moves_at) -> None:
    """We move; the stock node follows on our CallMeMaybe, however recent the last is, and we lose
    nothing after 1 s."""
    w = world().join("easy", "easy", stock_b=True)
    log = w.talk(w.a, w.b, every=0.05, until=30.0)
    w.run(moves_at)
    assert w.a.sent(SendCallMeMaybe, until=1.0)
    w.a.address = Address("10.0.0.77", 5555)
    w.a.nat.public_ip = "198.51.100.78"
    w.a.peer.handle_rebind(w.now)
    w.a.flush()
    w.run(moves_at + 3.0)
    assert w.a.peer.state is PathState.DIRECT
    assert w.b.peer.state is PathState.DIRECT
    assert w.b.peer.best.host == "198.51.100.78"
    w.run(30.0)
    ours = {number: entry for number, entry in log.items() if entry[1] is w.a}
    assert w.lost(ours, moves_at + 1.0, 29.0) == []


def test_one_way_traffic_to_a_stock_node(world) -> None:
    """A stock node that only receives is not taken for dead."""
    w = world(delay=0.04).join("easy", "easy", stock_b=True)
    w.talk(w.a, every=0.02, until=120.0)
    w.run(2.0)
    for second in range(3, 120):
        w.run(float(second))
        assert w.a.peer.state is PathState.DIRECT


@pytest.mark.parametrize("speakers", ["a", "b", "ab"])
def test_silent_disco(world, speakers) -> None:
    """A stock node that sends no heartbeats is taken for dead by nobody: our own Pings, which it
    answers, and the data vouch for the path, whoever speaks; and it pings only when it has to."""
    w = world().join("easy", "easy", stock_b=True)
    w.b.peer.is_silent = True
    talkers = [getattr(w, name) for name in speakers]
    log = w.talk(*talkers, every=0.05, until=120.0)
    w.run(7.0)
    for second in range(8, 120):
        w.run(float(second))
        if "a" in speakers:
            assert w.a.peer.state is PathState.DIRECT
    if speakers == "ab":
        assert w.b.peer.state is PathState.DIRECT
        assert w.b.sent(SendPing, since=10.0, until=59.0) == []
    assert w.lost(log, 0.0, 118.0) == []


def test_a_silent_path_that_dies(world) -> None:
    """Without its heartbeats we still find out within a second, and are back 3 s after it heals."""
    w = world().join("easy", "easy", stock_b=True)
    w.b.peer.is_silent = True
    log = w.talk(w.a, w.b, every=0.05, until=60.0)
    w.run(20.0)
    w.is_down = True
    w.run(40.0)
    w.is_down = False
    w.run(43.1)
    assert w.a.peer.state is PathState.DIRECT
    w.run(60.0)
    ours = {number: entry for number, entry in log.items() if entry[1] is w.a}
    assert w.lost(ours, 21.0, 58.0) == []
