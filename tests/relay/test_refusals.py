"""Refused connections are counted all, and logged at a bounded rate."""

from __future__ import annotations

import logging

import pytest

from relay.refusals import LINES_BURST, Refusals, Stage


def test_a_flood_is_counted_and_does_not_fill_the_log(caplog: pytest.LogCaptureFixture) -> None:
    """A burst of lines, then a few per second, which say how many were left out."""
    caplog.set_level(logging.INFO, "underpass.relay.refusals")
    refusals = Refusals(Stage, 0.0)
    for _ in range(1000):
        refusals.note(Stage.TLS, "192.0.2.1", "no common version", 0.0)
    assert refusals.counts[Stage.TLS] == 1000
    assert len(caplog.records) == LINES_BURST
    refusals.note(Stage.TLS, "", "no common version", 1.0)
    message = caplog.records[-1].getMessage()
    assert f"{1000 - LINES_BURST} such lines left out" in message
    assert "unknown source" in message


def test_one_stage_does_not_silence_another(caplog: pytest.LogCaptureFixture) -> None:
    """A flood of bad TLS must not hide who is not admitted."""
    caplog.set_level(logging.INFO, "underpass.relay.refusals")
    refusals = Refusals(Stage, 0.0)
    for _ in range(100):
        refusals.note(Stage.TLS, "192.0.2.1", "x", 0.0)
    refusals.note(Stage.ADMISSION, "192.0.2.2", "its key is not in the key list", 0.0)
    assert caplog.records[-1].getMessage() == (
        "refused 192.0.2.2 (admission): its key is not in the key list"
    )
    assert refusals.counts[Stage.DERP] == 0
