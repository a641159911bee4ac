"""Expectations as text: comparisons of what a run has shown so far. Pure; nothing is executed.

    path(a, b) == direct
    path(a, b) == expected_path(a, b) and latency_ms(a, b) < 80
    drops(home, filtered) >= 1 or not "refused" in output(a)

A bare word is a text, so names need quotes only if they hold a dot, a dash or a slash. The words
are `and`, `or`, `not`, `in` and the comparisons; the functions are those that the caller offers.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from netlab.behavior import suggest

Value: TypeAlias = str | float | bool
Function: TypeAlias = Callable[..., Value]

# Any: the operators' own types are protocols; the values are texts, numbers and truths.
_COMPARE: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.In: lambda left, right: str(left) in str(right),
    ast.NotIn: lambda left, right: str(left) not in str(right),
}

# An expectation is one line that a person wrote; this also bounds the parser's recursion.
_MAX_LENGTH = 1000


class ExpressionError(ValueError):
    """An expression is wrong; the message says what and where."""


@dataclass(frozen=True, slots=True)
class Expression:
    """A parsed expression; `evaluate` gives it the functions to call."""

    text: str
    _tree: ast.expr

    def evaluate(self, functions: Mapping[str, Function]) -> Value:
        """Return the value.

        Raises:
            ExpressionError: values of different kinds were ordered.
        """
        return _evaluate(self._tree, functions)

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True, slots=True)
class Call:
    """A use of a function, for checks before anything runs."""

    function: str
    arguments: tuple[Value | None, ...]
    """None where an argument is not a plain value."""


def parse_expression(text: str, functions: Mapping[str, tuple[int, int]]) -> Expression:
    """Parse a text; `functions` gives the least and most number of arguments of each.

    Raises:
        ExpressionError: it isn't an expression of this language.
    """
    if len(text) > _MAX_LENGTH:
        raise ExpressionError(f"longer than {_MAX_LENGTH} characters; split it in several")
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        column = f" at column {error.offset}" if isinstance(error, SyntaxError) else ""
        raise ExpressionError(f'"{text}" is not an expression{column}') from None
    for node in ast.walk(tree):
        _check(node, functions)
    return Expression(text.strip(), tree)


def find_calls(expression: Expression) -> list[Call]:
    """Return every use of a function."""
    return [
        Call(
            node.func.id,
            tuple(
                argument.id
                if isinstance(argument, ast.Name)
                else argument.value
                if isinstance(argument, ast.Constant)
                and isinstance(argument.value, str | int | float)
                else None
                for argument in node.args
            ),
        )
        for node in ast.walk(expression._tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    ]


def _check(node: ast.AST, functions: Mapping[str, tuple[int, int]]) -> None:
    match node:
        case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]):
            if name not in functions:
                raise ExpressionError(f'no function is called "{name}"; {suggest(name, functions)}')
            least, most = functions[name]
            if not least <= len(arguments) <= most:
                wanted = str(least) if least == most else f"{least} to {most}"
                raise ExpressionError(f"{name}() takes {wanted} arguments, not {len(arguments)}")
        case ast.Constant(value=value) if isinstance(value, str | int | float | bool):
            pass
        case ast.UnaryOp(op=ast.Not() | ast.USub()) | ast.BoolOp():
            pass
        case ast.Compare(ops=operators) if all(type(op) in _COMPARE for op in operators):
            pass
        case ast.Name() | ast.expr_context() | ast.boolop() | ast.cmpop() | ast.unaryop():
            pass
        case _:
            raise ExpressionError(
                f"{type(node).__name__.lower()} is not part of the language of expectations; "
                "write comparisons of " + ", ".join(f"{name}()" for name in functions)
            )


def _evaluate(node: ast.expr, functions: Mapping[str, Function]) -> Value:
    match node:
        case ast.Constant(value=value):
            assert isinstance(value, str | int | float)
            return value
        case ast.Name(id=name):
            return {"true": True, "false": False}.get(name, name)
        case ast.Call(func=ast.Name(id=name), args=arguments):
            return functions[name](*(_evaluate(argument, functions) for argument in arguments))
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            return not _evaluate(operand, functions)
        case ast.UnaryOp(operand=operand):
            value = _evaluate(operand, functions)
            if isinstance(value, str):
                raise ExpressionError(f'"-{value}": only a number has a sign; quote names')
            return -value
        case ast.BoolOp(op=ast.And(), values=values):
            return all(_evaluate(value, functions) for value in values)
        case ast.BoolOp(values=values):
            return any(_evaluate(value, functions) for value in values)
        case ast.Compare(left=left, ops=operators, comparators=rights):
            value = _evaluate(left, functions)
            for comparison, right in zip(operators, rights, strict=True):
                other = _evaluate(right, functions)
                try:
                    if not _COMPARE[type(comparison)](value, other):
                        return False
                except TypeError:
                    raise ExpressionError(
                        f"{value!r} and {other!r} have no order: one is a text, one a number"
                    ) from None
                value = other
            return True
    raise AssertionError(f"{ast.dump(node)} was let through")
