"""Places of keys in TOML files, and errors that name them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from netlab.toml_reading import ScenarioError, find_key_lines, parse_seconds, parse_toml

TEXT = '''
a = 1
[one.two]
b = [
  "x = 1",
  "y",
]
c = """
d = 3
"""
"e.f" = 2
[[many]]
g = { h = 1 }
[[many]]
g = 2
[many.deep]
i = 1
'''


def test_lines_of_keys() -> None:
    """Headers, arrays of tables and quoted keys are found; what only looks like a key is not."""
    lines = find_key_lines(TEXT)
    assert lines[("a",)] == 2
    assert lines[("one", "two")] == 3
    assert lines[("one", "two", "b")] == 4
    assert lines[("one", "two", "c")] == 8
    assert lines[("one", "two", "e.f")] == 11
    assert lines[("many", 0, "g")] == 13
    assert lines[("many", 1, "g")] == 15
    assert lines[("many", 1, "deep", "i")] == 17
    assert not any("d" in path or "x" in path for path in lines)


@given(st.text())
def test_any_text_is_read_or_refused(text: str) -> None:
    """Whatever a file holds, there is a table or a ScenarioError."""
    try:
        parse_toml(text, "f.toml")
    except ScenarioError:
        pass


@pytest.mark.parametrize(
    ("text", "seconds"), [("250ms", 0.25), ("5s", 5.0), ("2min", 120.0), ("1h", 3600.0)]
)
def test_times(text: str, seconds: float) -> None:
    """A time is a number with a unit."""
    assert parse_seconds(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["5", "", "5 parsecs", "s", "-1s", "1.2.3s"])
def test_what_is_no_time(text: str) -> None:
    """Everything else is refused, also a number that Python cannot read."""
    with pytest.raises(ValueError, match=r"not a time|could not convert"):
        parse_seconds(text)


def test_values_of_the_wrong_kind() -> None:
    """The message says what is wanted and what is there."""
    table = parse_toml('n = "7"\nl = 3\nt = 1\nw = true\n', "f.toml")
    with pytest.raises(ScenarioError, match=r"f\.toml:1: n: must be a whole number, not a text"):
        table.take_int("n", 0)
    with pytest.raises(ScenarioError, match=r"f\.toml:2: l: must be a list of texts"):
        table.take_texts("l")
    with pytest.raises(ScenarioError, match=r"f\.toml:3: t: must be a table"):
        table.maybe_table("t")
    with pytest.raises(ScenarioError, match=r"f\.toml:4: w: must be a time"):
        table.take_seconds("w")
