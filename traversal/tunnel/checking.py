"""Documents that people write: errors name place, key and the nearest valid name. Pure."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Collection, Mapping
from typing import Any, Final

from traversal.wire.tunnel.errors import TunnelError

_DURATION: Final = re.compile(r"(?:\d+(?:\.\d+)?(?:ms|s|m|h))+")
_DURATION_PART: Final = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h)")
_UNIT_SECONDS: Final = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}


def check_keys(where: str, table: object, known: Collection[str]) -> dict[str, Any]:
    """The table, if it is one and all its keys are known. Raises TunnelError."""
    if not isinstance(table, Mapping):
        raise TunnelError(f"{where}: must be a table, not {table!r:.60}")
    for key in table:
        if key not in known:
            raise TunnelError(f"{where}: unknown key {key!r}{nearest(str(key), known)}")
    return dict(table)


def nearest(word: str, known: Collection[str]) -> str:
    """What a mistyped word may have meant, for the end of an error's text."""
    lowered = {name.lower(): name for name in known}
    found = difflib.get_close_matches(word.lower(), lowered, n=1, cutoff=0.5)
    if found:
        return f"; did you mean {lowered[found[0]]!r}?"
    return f"; there are {', '.join(sorted(known))}"


def whole_seconds(where: str, key: str, value: object) -> int:
    """A number of seconds, or text like `30s` or `1m30s`, rounded up. Raises TunnelError."""
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1e9:
        return math.ceil(value)
    if isinstance(value, str) and len(value) < 40 and _DURATION.fullmatch(value):
        parts = _DURATION_PART.findall(value)
        return math.ceil(sum(float(number) * _UNIT_SECONDS[unit] for number, unit in parts))
    raise TunnelError(
        f'{where}, {key}: must be a number of seconds or text like "30s", not {value!r:.60}'
    )
