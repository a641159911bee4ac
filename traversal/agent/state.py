"""What the agent learns and keeps in a file: which port searches worked, in which network."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from traversal.paths.punch_memory import PunchMemory


@contextmanager
def remembered(path: Path) -> Iterator[PunchMemory]:
    """The memory in a file, which is written anew at the end if something was learned.

    A file that can't be read or written only costs what is in it: the next search starts blind.
    """
    memory = PunchMemory()
    with suppress(OSError, ValueError):
        memory = PunchMemory.from_dict(json.loads(path.read_bytes()))
    known = memory.to_dict()
    try:
        yield memory
    finally:
        learned = memory.to_dict()
        if learned != known:
            with suppress(OSError):
                fresh = path.with_name(path.name + ".new")
                fresh.write_text(json.dumps(learned, indent=1))
                fresh.replace(path)
