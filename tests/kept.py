"""How much an object keeps, for tests and benchmarks that look for growth."""

from __future__ import annotations

import gc
from collections import deque
from typing import Final

_CONTAINERS: Final = (dict, list, set, frozenset, deque)


def count_kept(root: object) -> int:
    """Entries of all containers that `root`, an object of ours, leads to by objects of ours."""
    seen: set[int] = set()
    waiting = [root]
    entries = 0
    while waiting:
        item = waiting.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        is_container = isinstance(item, _CONTAINERS)
        if is_container:
            entries += len(item)  # type: ignore[arg-type]  # told by the line before
        if is_container or isinstance(item, tuple) or _is_ours(item):
            waiting += [one for one in gc.get_referents(item) if not isinstance(one, type)]
    return entries


def _is_ours(item: object) -> bool:
    return str(type(item).__module__).startswith("traversal")
