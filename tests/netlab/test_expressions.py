"""The language of expectations: what it means, and what it refuses."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from netlab.expressions import ExpressionError, find_calls, parse_expression

ARITIES = {"path": (1, 2), "count": (0, 0), "output": (1, 1)}
FUNCTIONS = {
    "path": lambda host, peer="": f"{host}-{peer}",
    "count": lambda: 3,
    "output": lambda program: f"{program} says hello",
}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("path(a, b) == 'a-b'", True),
        ("path('a', b) != 'a-b'", False),
        ("count() > 2 and count() <= 3", True),
        ("1 < count() < 3", False),
        ("not count() == 3 or hello in output(x)", True),
        ("'bye' not in output(x)", True),
        ("count() > -1", True),
        ("path(a, b)", "a-b"),
        ("direct == direct", True),
        ("true", True),
    ],
)
def test_values(text: str, value: object) -> None:
    """Bare words are texts; comparisons chain as in Python."""
    assert parse_expression(text, ARITIES).evaluate(FUNCTIONS) == value


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("pth(a, b)", 'did you mean "path"'),
        ("path()", "takes 1 to 2 arguments, not 0"),
        ("count(1)", "takes 0 arguments"),
        ("path(a, b", "is not an expression"),
        ("", "is not an expression"),
        ("().__class__", "not part of the language"),
        ("count.x", "not part of the language"),
        ("[x for x in output(a)]", "not part of the language"),
        ("lambda: 1", "not part of the language"),
        ("path(a)(b)", "not part of the language"),
        ("path(*a)", "not part of the language"),
        ("path(a, peer=b)", "not part of the language"),
        ("2 ** 2 ** 99", "not part of the language"),
        ("f'{a}'", "not part of the language"),
        ("a is b", "not part of the language"),
        ("(x := 3)", "not part of the language"),
        ("1 < " * 500 + "1", "longer than"),
    ],
)
def test_what_is_refused(text: str, problem: str) -> None:
    """Nothing but comparisons of the offered functions gets through."""
    with pytest.raises(ExpressionError, match=problem):
        parse_expression(text, ARITIES)


@given(st.text(max_size=80))
def test_any_text_is_parsed_or_refused(text: str) -> None:
    """Whatever a person writes, there is an expression or an ExpressionError, then and later."""
    try:
        parse_expression(text, ARITIES).evaluate(FUNCTIONS)
    except ExpressionError:
        pass


def test_a_text_and_a_number_have_no_order() -> None:
    """The message says so instead of a TypeError."""
    with pytest.raises(ExpressionError, match="no order"):
        parse_expression("output(a) < 3", ARITIES).evaluate(FUNCTIONS)


def test_calls_are_found_for_checks() -> None:
    """Each call shows its plain arguments; what is computed is None."""
    calls = find_calls(parse_expression("path(a, path(b)) == count()", ARITIES))
    assert {(call.function, call.arguments) for call in calls} == {
        ("path", ("a", None)),
        ("path", ("b",)),
        ("count", ()),
    }
