"""Network namespaces held by descriptors: no names, no files, nothing to clean up.

The kernel removes a namespace when the last descriptor, process and socket in it is gone, so a
lab that dies, even by SIGKILL, leaves none behind.

A thread that is inside another namespace must not await: every task of the thread would move
with it. `NetworkNamespace.entered` is therefore a plain context manager for synchronous code. A
socket stays in the namespace it was created in, wherever it is used afterwards.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import resource
import socket
from collections.abc import Iterator
from contextlib import contextmanager

CLONE_NEWNS = 0x00020000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000

# libnftables and select() stop working when *their* descriptors pass 1024, so the long-lived
# ones of a lab live above that.
_FIRST_DESCRIPTOR = 2048

_THREAD_NAMESPACE = "/proc/thread-self/ns/net"
_libc = ctypes.CDLL(None, use_errno=True)


class NamespaceError(OSError):
    """The kernel refused to create or to enter a namespace."""


def unshare(flags: int) -> None:
    """Move the calling thread into new namespaces (`unshare(2)`).

    Raises:
        NamespaceError: with the kernel's errno.
    """
    if _libc.unshare(flags) != 0:
        number = ctypes.get_errno()
        raise NamespaceError(number, f"cannot create namespaces: {os.strerror(number)}")


def setns(descriptor: int, kind: int = CLONE_NEWNET) -> None:
    """Move the calling thread into the namespace behind `descriptor` (`setns(2)`).

    Raises:
        NamespaceError: with the kernel's errno.
    """
    if _libc.setns(descriptor, kind) != 0:
        number = ctypes.get_errno()
        raise NamespaceError(number, f"cannot enter the namespace: {os.strerror(number)}")


def raise_descriptor_limit() -> None:
    """Lift this process's soft limit of open files to its hard limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def move_descriptor_up(descriptor: int) -> int:
    """Return a duplicate of `descriptor` that is out of the way of `select`; close the original.

    Raises:
        NamespaceError: the process may not open that many files.
    """
    try:
        return fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, _FIRST_DESCRIPTOR)
    except OSError as error:
        if error.errno not in (errno.EMFILE, errno.EINVAL):
            raise
        raise NamespaceError(
            error.errno,
            "this process may not open enough files for the lab; raise the limit (ulimit -n)",
        ) from error
    finally:
        os.close(descriptor)


class NetworkNamespace:
    """One network namespace, alive while this object is open or something runs in it."""

    __slots__ = ("_descriptor",)

    def __init__(self, descriptor: int) -> None:
        """Take over `descriptor`, which refers to a network namespace."""
        self._descriptor = descriptor

    @classmethod
    def current(cls) -> NetworkNamespace:
        """Return the calling thread's own namespace."""
        return cls(move_descriptor_up(os.open(_THREAD_NAMESPACE, os.O_RDONLY | os.O_CLOEXEC)))

    @property
    def descriptor(self) -> int:
        """The descriptor, or -1 when closed."""
        return self._descriptor

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Run the body, which must not await, with the calling thread in this namespace."""
        home = os.open(_THREAD_NAMESPACE, os.O_RDONLY | os.O_CLOEXEC)
        try:
            setns(self._descriptor)
            try:
                yield
            finally:
                setns(home)
        finally:
            os.close(home)

    def socket(
        self, family: int, kind: int = socket.SOCK_STREAM, protocol: int = 0
    ) -> socket.socket:
        """Create a socket that belongs to this namespace."""
        with self.entered():
            return socket.socket(family, kind, protocol)

    def close(self) -> None:
        """Let go of the namespace; closing twice is harmless."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)


def create_namespaces(count: int) -> list[NetworkNamespace]:
    """Create `count` empty namespaces.

    Raises:
        NamespaceError: not permitted, or a limit is reached; none of them stays.
    """
    made: list[NetworkNamespace] = []
    home = os.open(_THREAD_NAMESPACE, os.O_RDONLY | os.O_CLOEXEC)
    try:
        for _ in range(count):
            unshare(CLONE_NEWNET)
            made.append(NetworkNamespace.current())
    except BaseException:
        for namespace in made:
            namespace.close()
        raise
    finally:
        setns(home)
        os.close(home)
    return made
