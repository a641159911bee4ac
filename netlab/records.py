"""Read the records of `netlab.behavior` from tables (TOML), with errors that name the key. Pure.

Keys are the field names. A field whose name ends in a unit may also be given without it, as a
text with a unit: ``delay = "25ms"`` for ``delay_seconds = 0.025``, ``rate = "50Mbit/s"`` for
``rate_bits_per_second``, and any probability as ``"0.5%"``.
"""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from collections.abc import Mapping as ReadOnlyDict
from enum import StrEnum
from typing import Any, TypeVar

from netlab.behavior import ModelError, PortRange, suggest

Record = TypeVar("Record")

_UNITS = {
    "_seconds": {"us": 1e-6, "ms": 1e-3, "s": 1.0, "min": 60.0, "h": 3600.0, "d": 86400.0},
    "_bits_per_second": {"kbit/s": 1e3, "Mbit/s": 1e6, "Gbit/s": 1e9},
    "_bytes": {"B": 1.0, "kB": 1e3, "KiB": 1024.0},
}
_QUANTITY = re.compile(r"\s*([0-9.]+)\s*([a-zA-Z/%]+)\s*")


def read_record(
    kind: type[Record],
    table: ReadOnlyDict[str, object],
    where: str,
    base: Record | None = None,
) -> Record:
    """Return a record made from a table; what the table leaves out is as in `base`.

    Args:
        kind: a record class, such as `NatBehavior`.
        table: keys and values.
        where: what error messages call the table, such as ``nat "home"``.
        base: a record to start from, such as a preset; default: the class's defaults.

    Raises:
        ModelError: a key is unknown or a value does not fit; names the key.
    """
    assert dataclasses.is_dataclass(kind)
    hints = typing.get_type_hints(kind)
    names = _accepted_keys(hints)
    values: dict[str, Any] = {}
    for key, value in table.items():
        field_name = names.get(key)
        place = f"{where}: {key}"
        if field_name is None:
            raise ModelError(place, f"unknown key; {suggest(key, names)}")
        if field_name in values:
            raise ModelError(place, f'"{field_name}" is given twice')
        before = getattr(base, field_name) if base is not None else None
        values[field_name] = _read(hints[field_name], value, place, field_name, before)
    try:
        if base is not None:
            made: Any = dataclasses.replace(base, **values)  # type: ignore[type-var]
        else:
            made = kind(**values)
    except ModelError as error:
        # A record names itself first (`ports.step`), which the place has told already.
        head, _, rest = error.where.partition(".")
        place = rest if rest and where.endswith(head) else error.where
        raise ModelError(f"{where}: {place}", error.problem) from None
    except TypeError as error:
        raise ModelError(where, f"a key is missing: {error}") from None
    assert isinstance(made, kind)
    return made


def _accepted_keys(hints: ReadOnlyDict[str, object]) -> dict[str, str]:
    """Return accepted key -> field name: the names themselves, and those without a unit."""
    names = {name: name for name in hints}
    for name in hints:
        for unit in _UNITS:
            if name.endswith(unit):
                names.setdefault(name.removesuffix(unit), name)
    return names


def _read(hint: Any, value: object, place: str, field_name: str, before: object) -> object:
    """Convert one value to the type that a field wants."""
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        (hint,) = (part for part in typing.get_args(hint) if part is not type(None))
        origin = typing.get_origin(hint)
    if origin is tuple:
        return _read_list(typing.get_args(hint), value, place, field_name)
    if hint is PortRange:
        if isinstance(value, list) and len(value) == 2 and all(type(v) is int for v in value):
            try:
                return PortRange(*value)
            except ModelError as error:
                raise ModelError(place, error.problem) from None
        raise ModelError(place, f"{value!r} is no range of ports; write [first, last]")
    if isinstance(hint, type) and issubclass(hint, StrEnum):
        for member in hint:
            if value == member.value:
                return member
        raise ModelError(place, f"{value!r} is not one of these; {suggest(str(value), hint)}")
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, dict):
            raise ModelError(place, f"{value!r} is no table")
        return read_record(hint, value, place, before)  # type: ignore[arg-type]
    if hint is bool or hint is str:
        if type(value) is not hint:
            raise ModelError(place, f"{value!r} is no {'yes or no' if hint is bool else 'text'}")
        return value
    return _read_number(hint, value, place, field_name)


def _read_list(parts: tuple[Any, ...], value: object, place: str, field_name: str) -> object:
    if not isinstance(value, list):
        raise ModelError(place, f"{value!r} is no list")
    if len(parts) == 2 and parts[1] is Ellipsis:
        return tuple(_read(parts[0], item, place, field_name, None) for item in value)
    if len(parts) != len(value):
        raise ModelError(place, f"{value!r} should have {len(parts)} items")
    return tuple(
        _read(part, item, place, field_name, None) for part, item in zip(parts, value, strict=True)
    )


def _read_number(hint: type, value: object, place: str, field_name: str) -> float:
    if isinstance(value, str):
        units = next((u for end, u in _UNITS.items() if field_name.endswith(end)), {"%": 0.01})
        match = _QUANTITY.fullmatch(value)
        factor = units.get(match[2]) if match is not None else None
        if match is None or factor is None:
            raise ModelError(place, f"{value!r} is no number with a unit ({', '.join(units)})")
        value = float(match[1]) * factor
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ModelError(place, f"{value!r} is no number")
    if hint is int:
        if value != int(value):
            raise ModelError(place, f"{value!r} is no whole number")
        return int(value)
    return float(value)
