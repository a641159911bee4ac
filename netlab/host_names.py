"""The names of a lab's machines for programs in the kernel back end: an own /etc/hosts, and
an /etc/resolv.conf where the lab has a DNS service.

Trio code gets them from the lab's resolver; programs ask the C library. The jail has mounts of its
own, so that nobody outside sees these files.
"""

from __future__ import annotations

import ctypes
import os
import socket
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

_HOSTS, _RESOLVER = b"/etc/hosts", b"/etc/resolv.conf"
_MS_BIND, _MNT_DETACH = 0x1000, 2
_libc = ctypes.CDLL(None, use_errno=True)


def hosts_text(names: Mapping[str, Sequence[str]]) -> str:
    """Return the file's text for names with their addresses."""
    # Programs look their own machine's name up; a query for it would only time out in a lab.
    lines = ["127.0.0.1 localhost", "::1 localhost", f"127.0.1.1 {socket.gethostname()}"]
    lines += [f"{address} {name}" for name, found in names.items() for address in found]
    return "\n".join(lines) + "\n"


def resolver_text(name_servers: Sequence[str]) -> str:
    """Return the text of a resolv.conf with these name servers."""
    # IPv6 first: a host with IPv4 only notices at once that it cannot send there, and the C
    # library then asks the next one.
    servers = sorted(name_servers, key=lambda address: ":" not in address)
    return "".join(f"nameserver {address}\n" for address in servers[:3]) + "options timeout:1\n"


@contextmanager
def names_for_programs(
    names: Mapping[str, Sequence[str]], name_servers: Sequence[str] = ()
) -> Iterator[None]:
    """Let every program in this jail resolve these names, until the block ends.

    Where the kernel does not allow it, programs have to use addresses (``${name.address}``).

    Args:
        names: for /etc/hosts, the same in every host.
        name_servers: addresses of the lab's DNS services, for all other names.
    """
    with ExitStack() as mounts:
        mounts.enter_context(_mounted(_HOSTS, hosts_text(names)))
        if name_servers:
            mounts.enter_context(_mounted(_RESOLVER, resolver_text(name_servers)))
        yield


@contextmanager
def _mounted(target: bytes, text: str) -> Iterator[None]:
    """Put a file with this text over a system file, in this mount namespace only."""
    descriptor, path = tempfile.mkstemp(prefix="underpass-lab-")
    try:
        with os.fdopen(descriptor, "w", encoding="ascii") as file:
            file.write(text)
        os.chmod(path, 0o644)
        mounted = _libc.mount(path.encode(), target, None, _MS_BIND, None) == 0
    finally:
        # The mount keeps the file alive, and a lab that is killed leaves nothing behind.
        os.unlink(path)
    try:
        yield
    finally:
        if mounted:
            _libc.umount2(target, _MNT_DETACH)
