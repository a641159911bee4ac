"""The names of a lab's machines for programs in the kernel back end: an own /etc/hosts.

Trio code gets them from the lab's resolver; programs ask the C library. The jail has mounts of its
own, so that nobody outside sees this file.
"""

from __future__ import annotations

import ctypes
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

_HOSTS = b"/etc/hosts"
_MS_BIND, _MNT_DETACH = 0x1000, 2
_libc = ctypes.CDLL(None, use_errno=True)


def hosts_text(names: Mapping[str, Sequence[str]]) -> str:
    """Return the file's text for names with their addresses."""
    lines = ["127.0.0.1 localhost", "::1 localhost"]
    lines += [f"{address} {name}" for name, found in names.items() for address in found]
    return "\n".join(lines) + "\n"


@contextmanager
def names_for_programs(names: Mapping[str, Sequence[str]]) -> Iterator[None]:
    """Let every program in this jail resolve these names, until the block ends.

    Where the kernel does not allow it, programs have to use addresses (``${name.address}``).
    """
    descriptor, path = tempfile.mkstemp(prefix="underpass-lab-hosts-")
    try:
        with os.fdopen(descriptor, "w", encoding="ascii") as file:
            file.write(hosts_text(names))
        os.chmod(path, 0o644)
        mounted = _libc.mount(path.encode(), _HOSTS, None, _MS_BIND, None) == 0
    finally:
        # The mount keeps the file alive, and a lab that is killed leaves nothing behind.
        os.unlink(path)
    try:
        yield
    finally:
        if mounted:
            _libc.umount2(_HOSTS, _MNT_DETACH)
