"""Figures for people."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.figures import bits_text, bytes_text, count_text, seconds_text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0 B"), (999, "999 B"), (1023, "1.00 KiB"), (1536, "1.50 KiB"), (5 << 30, "5.00 GiB")],
)
def test_bytes(value: float, text: str) -> None:
    """Three digits and a binary unit."""
    assert bytes_text(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (3.25, "3.2"), (9999, "9999"), (12345, "12.3k"), (5e6, "5.00M")]
)
def test_counts(value: float, text: str) -> None:
    """Exact while that is short."""
    assert count_text(value) == text


def test_rates_are_in_bits() -> None:
    """As network people count."""
    assert bits_text(1e6) == "8.00 Mbit/s"
    assert bits_text(0) == "0 bit/s"


@pytest.mark.parametrize(
    ("value", "text"), [(-1, "0s"), (59.9, "59s"), (725, "12m 5s"), (86400 * 3 + 4, "3d 0h")]
)
def test_durations(value: float, text: str) -> None:
    """The two largest units."""
    assert seconds_text(value) == text


@given(st.floats(0, 1e18))
def test_figures_are_short(value: float) -> None:
    """They must fit into a table."""
    assert len(bytes_text(value)) <= 12
    assert len(count_text(value)) <= 9
