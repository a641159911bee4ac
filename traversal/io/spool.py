"""Bytes of a stream that wait for its reader: a little in memory, the rest in a temporary file.

For transports that can't hold one stream back without holding back its neighbors (QUIC as qh3 does
it): a slow reader then costs disk, not the others' time, as nginx does it for slow clients. Writes
go to the page cache and take microseconds, so they are made in place.
"""

from __future__ import annotations

import tempfile
from collections import deque
from typing import IO, Final

MEMORY_BYTES: Final = 1 << 20
READ_BYTES: Final = 256 << 10


class Spool:
    """A queue of bytes. `len(spool)` is what waits."""

    __slots__ = ("_chunks", "_file", "_in_memory", "_read_at", "_written")

    def __init__(self) -> None:
        self._chunks: deque[bytes] = deque()
        self._in_memory = 0
        self._file: IO[bytes] | None = None
        self._read_at = 0
        self._written = 0

    def __len__(self) -> int:
        return self._in_memory + self._written - self._read_at

    def append(self, data: bytes) -> None:
        """Add bytes at the end. Raises OSError when the disk is full."""
        if self._file is None and self._in_memory < MEMORY_BYTES:
            self._chunks.append(data)
            self._in_memory += len(data)
            return
        if self._file is None:
            self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115
        self._file.seek(self._written)
        self._file.write(data)
        self._written += len(data)

    def take(self) -> bytes:
        """Some bytes from the start, empty if none wait."""
        if self._chunks:
            data = b"".join(self._chunks)
            self._chunks.clear()
            self._in_memory = 0
            return data
        if self._file is None:
            return b""
        self._file.seek(self._read_at)
        data = self._file.read(READ_BYTES)
        self._read_at += len(data)
        if self._read_at == self._written:
            self.clear()
        return data

    def clear(self) -> None:
        """Forget everything that waits."""
        self._chunks.clear()
        self._in_memory = self._read_at = self._written = 0
        if self._file is not None:
            self._file.close()
            self._file = None
