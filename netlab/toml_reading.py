"""Reading TOML with errors that name file, line and key, and suggest the nearest valid name.

`parse_toml` gives a `Table`. Each `take_...` removes one key and checks its type; `end` complains
about what is left. Every mistake raises `ScenarioError`, which is the only error type here.

    table = parse_toml(text, "office.toml")
    seed = table.take_int("seed", 0)
    table.end()
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Mapping
from enum import StrEnum
from typing import TypeAlias, TypeVar

from netlab.behavior import suggest

_Value: TypeAlias = object
_KeyPath: TypeAlias = tuple[str | int, ...]
_Choice = TypeVar("_Choice", bound=StrEnum)


class ScenarioError(ValueError):
    """A scenario file is wrong; the message is ``file:line: key: what to do``."""


# --- which line a key is on ----------------------------------------------------------------

_PART = r"""(?:[A-Za-z0-9_-]+|"[^"]*"|'[^']*')"""
_DOTTED = rf"{_PART}(?:\s*\.\s*{_PART})*"
_HEADER = re.compile(rf"\s*(\[\[?)\s*({_DOTTED})\s*\]\]?")
_KEY = re.compile(rf"\s*({_DOTTED})\s*=")
_STRING = re.compile(r'"""|\'\'\'|"(?:\\.|[^"\\])*"|\'[^\']*\'|#.*|[\[\]{}]')


def _split(dotted: str) -> list[str]:
    return [part.strip("\"'") for part in re.findall(_PART, dotted)]


def find_key_lines(text: str) -> dict[_KeyPath, int]:
    """Return the line of every table header and key of a valid TOML text, counted from 1.

    Keys inside inline tables are left out; their lines are those of the key outside.
    """
    lines: dict[_KeyPath, int] = {}
    counters: dict[_KeyPath, int] = {}
    prefix: _KeyPath = ()
    depth, open_string = 0, ""
    for number, line in enumerate(text.splitlines(), start=1):
        if not open_string and not depth:
            header = _HEADER.match(line)
            if header is not None:
                prefix = ()
                parts = _split(header[2])
                for index, part in enumerate(parts):
                    prefix = (*prefix, part)
                    is_array = header[1] == "[[" and index == len(parts) - 1
                    if is_array:
                        counters[prefix] = counters.get(prefix, -1) + 1
                    if prefix in counters:
                        prefix = (*prefix, counters[prefix])
                lines.setdefault(prefix, number)
                continue
            key = _KEY.match(line)
            if key is None:
                continue
            lines.setdefault((*prefix, *_split(key[1])), number)
            line = line[key.end() :]
        while True:
            if open_string:
                end = line.find(open_string)
                if end < 0:
                    break
                line, open_string = line[end + 3 :], ""
            token = _STRING.search(line)
            if token is None:
                break
            line = line[token.end() :]
            if token[0] in ('"""', "'''"):
                open_string = token[0]
            elif token[0] in "[{":
                depth += 1
            elif token[0] in "]}":
                depth -= 1
    return lines


# --- values --------------------------------------------------------------------------------

_DURATION = re.compile(r"([0-9.]+)\s*(us|ms|s|min|h)")
_SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "min": 60.0, "h": 3600.0}


def parse_seconds(text: str) -> float:
    """Return the seconds of ``250ms``, ``5s``, ``2min`` or ``1h``.

    Raises:
        ValueError: it is none of these.
    """
    found = _DURATION.fullmatch(text.strip())
    if found is None:
        raise ValueError(f'"{text}" is not a time; write for example 250ms, 5s, 2min or 1h')
    return float(found[1]) * _SECONDS[found[2]]


def _kind(value: _Value) -> str:
    names = {str: "a text", bool: "true or false", int: "a number", float: "a number"}
    names |= {list: "a list", dict: "a table"}
    return names.get(type(value), type(value).__name__)


class Document:
    """A TOML file as it is being read: where things are, for errors."""

    def __init__(self, text: str, name: str) -> None:
        self.name = name
        self._lines = find_key_lines(text)

    def error(self, path: _KeyPath, problem: str) -> ScenarioError:
        """Return the error for one key."""
        place = path
        while place and place not in self._lines:
            place = place[:-1]
        line = f":{self._lines[place]}" if place else ""
        key = ""
        for part in path:
            key += f"[{part}]" if isinstance(part, int) else f".{part}" if key else part
        return ScenarioError(f"{self.name}{line}: {key + ': ' if key else ''}{problem}")


class Table:
    """One table of a document."""

    def __init__(self, document: Document, path: _KeyPath, values: Mapping[str, _Value]) -> None:
        self.document = document
        self.path = path
        self._values = dict(values)
        self._known: set[str] = set()

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def holds_table(self, key: str) -> bool:
        """Whether a key's value is a table."""
        return isinstance(self._values.get(key), dict)

    @property
    def names(self) -> list[str]:
        """Return the keys that are not taken yet."""
        return list(self._values)

    def error(self, key: str | None, problem: str) -> ScenarioError:
        """Return the error for a key of this table, or for the table itself."""
        return self.document.error(self.path if key is None else (*self.path, key), problem)

    def pop(self, key: str) -> _Value:
        """Return a value of any type, or None if the key is absent."""
        self._known.add(key)
        return self._values.pop(key, None)

    def _wrong(self, key: str, wanted: str, value: _Value) -> ScenarioError:
        return self.error(key, f"must be {wanted}, not {_kind(value)}")

    def take_text(self, key: str, default: str | None = None) -> str:
        value = self.pop(key)
        if value is None:
            if default is None:
                raise self.error(None, f'the key "{key}" is missing')
            return default
        if not isinstance(value, str):
            raise self._wrong(key, "a text", value)
        return value

    def maybe_text(self, key: str) -> str | None:
        self._known.add(key)
        return self.take_text(key) if key in self._values else None

    def take_texts(self, key: str, default: tuple[str, ...] = ()) -> tuple[str, ...]:
        value = self.pop(key)
        if value is None:
            return default
        if isinstance(value, str):
            return (value,)
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self._wrong(key, "a list of texts", value)
        return tuple(value)

    def take_bool(self, key: str, default: bool) -> bool:
        value = self.pop(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self._wrong(key, "true or false", value)
        return value

    def take_int(self, key: str, default: int) -> int:
        value = self.pop(key)
        if value is None:
            return default
        if not isinstance(value, int) or isinstance(value, bool):
            raise self._wrong(key, "a whole number", value)
        return value

    def take_seconds(self, key: str, default: float | None = None) -> float:
        value = self.pop(key)
        if value is None:
            if default is None:
                raise self.error(None, f'the key "{key}" is missing; it takes a time such as "5s"')
            return default
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
        if not isinstance(value, str):
            raise self._wrong(key, 'a time such as "5s"', value)
        try:
            return parse_seconds(value)
        except ValueError as error:
            raise self.error(key, str(error)) from None

    def choose(self, key: str, value: _Value, kind: type[_Choice]) -> _Choice:
        """Return the member of an enumeration that a value names, in any case of letters."""
        if not isinstance(value, str):
            raise self._wrong(key, "a text", value)
        try:
            return kind(value.lower())
        except ValueError:
            hint = suggest(value.lower(), [member.value for member in kind])
            raise self.error(key, f'"{value}" is unknown; {hint}') from None

    def maybe_table(self, key: str) -> Table | None:
        value = self.pop(key)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self._wrong(key, "a table", value)
        return Table(self.document, (*self.path, key), value)

    def tables_by_name(self, key: str) -> dict[str, Table]:
        """Return the tables [key.NAME]."""
        outer = self.maybe_table(key)
        if outer is None:
            return {}
        found: dict[str, Table] = {}
        for name in outer.names:
            table = outer.maybe_table(name)
            assert table is not None
            found[name] = table
        return found

    def table_list(self, key: str) -> list[Table]:
        """Return the tables [[key]]."""
        value = self.pop(key)
        if value is None:
            return []
        if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
            raise self.error(key, f"must be a list of tables; write [[{key}]] above each")
        return [
            Table(self.document, (*self.path, key, index), item) for index, item in enumerate(value)
        ]

    def take_rest(self) -> dict[str, _Value]:
        """Return everything that is left, for a reader of its own."""
        rest, self._values = self._values, {}
        return rest

    @property
    def known_keys(self) -> frozenset[str]:
        """The keys that were asked for so far."""
        return frozenset(self._known)

    def end(self, also: Iterable[str] = ()) -> None:
        """Complain about a key that nobody took.

        Raises:
            ScenarioError: there is one; the nearest known key is suggested.
        """
        for key in self._values:
            raise self.error(key, f"unknown key; {suggest(key, {*self._known, *also})}")


def parse_toml(text: str, name: str) -> Table:
    """Parse a file's text.

    Raises:
        ScenarioError: it isn't TOML.
    """
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        found = re.search(r"\(at line (\d+), column (\d+)\)", str(error))
        line = f":{found[1]}" if found else ""
        problem = str(error).split(" (at ")[0]
        raise ScenarioError(f"{name}{line}: not valid TOML: {problem}") from error
    return Table(Document(text, name), (), values)
