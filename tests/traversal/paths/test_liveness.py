"""Suspicion and bursts, on a clock that is an argument."""

from __future__ import annotations

from traversal.paths.liveness import MIN_BURST_INTERVAL_SECONDS, Liveness

RTT_SECONDS = 0.3


def test_an_older_answer_does_not_hold_up_the_next_burst() -> None:
    """A burst begins, then the path dies, then the Pong of a Ping from before comes: it says
    nothing about now, so the burst that finds the death need not wait."""
    liveness = Liveness()
    liveness.start_burst(RTT_SECONDS, 10.0)
    assert liveness.poll_burst(10.0)
    liveness.handle_answer(9.8)
    assert not liveness.is_confirming
    liveness.start_burst(RTT_SECONDS, 10.1)
    assert liveness.is_confirming
    assert liveness.next_deadline() == 10.1


def test_answered_bursts_have_their_distance() -> None:
    """A burst that was answered itself is followed by the next one not before its time."""
    liveness = Liveness()
    liveness.start_burst(RTT_SECONDS, 10.0)
    liveness.handle_answer(10.0)
    liveness.start_burst(RTT_SECONDS, 10.3)
    assert not liveness.is_confirming
    liveness.start_burst(RTT_SECONDS, 10.0 + MIN_BURST_INTERVAL_SECONDS)
    assert liveness.is_confirming
