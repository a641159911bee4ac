"""Notices that files changed: by looking, which works on every file system and in containers.

Editors truncate and then write, and some tools replace two files one after the other. A change
therefore counts only when two looks in a row saw the same thing, so that no half-written file is
read.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Final

# Two looks make a change visible after at most half a second, and a look costs microseconds.
POLL_SECONDS: Final = 0.25

_Signature = tuple[tuple[int, int, int] | None, ...]


class FileWatch:
    """Some files, and whether they changed. Call `poll` every `POLL_SECONDS`."""

    def __init__(self, paths: Iterable[str]) -> None:
        """Whatever the files hold now counts as seen: make the watch first, then read them."""
        self._paths = tuple(Path(path) for path in paths if path)
        self._seen = self._last = self._look()

    def poll(self) -> bool:
        """Whether the files changed since the last True, and have settled."""
        last, self._last = self._last, self._look()
        if self._last == self._seen or self._last != last:
            return False
        self._seen = self._last
        return True

    def _look(self) -> _Signature:
        return tuple(map(_signature, self._paths))


def _signature(path: Path) -> tuple[int, int, int] | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino
