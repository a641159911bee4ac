"""Listening sockets of the relay and their accept loops, which shed load but never end."""

from __future__ import annotations

import errno
import logging
import math
import socket
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, Final

import trio

from relay.config import ListenAddress

logger = logging.getLogger("underpass.relay.listeners")

TCP_USER_TIMEOUT_MS: Final = 15_000
"""Unacknowledged bytes kill a connection after this long (DERP specification 3.1)."""
TCP_KEEPALIVE_IDLE_SECONDS: Final = 600
BACKLOG: Final = 4096
"""The kernel's own bound (net.core.somaxconn) applies as well; a storm of reconnecting clients
should wait there and not be refused."""

FAILURE_LOG_SECONDS: Final = 10.0

_RESOURCE_ERRORS: Final = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_LISTENER_ERRORS: Final = (errno.EBADF, errno.EINVAL, errno.ENOTSOCK)


class ListenError(Exception):
    """An address can't be listened on; the text says which, why, and what to try."""


def open_listeners(address: ListenAddress, *, reuse_port: bool = False) -> list[socket.socket]:
    """Listening TCP sockets for an address: one, or one per family where no host is given.

    Raises ListenError.
    """
    if address.host:
        return [_open_listener(address.host, address.port, reuse_port)]
    sockets = [_open_listener("0.0.0.0", address.port, reuse_port)]
    try:
        sockets.append(_open_listener("::", sockets[0].getsockname()[1], reuse_port))
    except ListenError as error:
        if not isinstance(error.__cause__, OSError) or error.__cause__.errno not in (
            errno.EAFNOSUPPORT,
            errno.EADDRNOTAVAIL,
        ):
            sockets[0].close()
            raise
    return sockets


def _open_listener(host: str, port: int, reuse_port: bool) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if reuse_port:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        # Accepted sockets inherit these.
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, TCP_USER_TIMEOUT_MS)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, TCP_KEEPALIVE_IDLE_SECONDS)
        sock.bind((host, port))
        sock.listen(BACKLOG)
        sock.setblocking(False)
    except OSError as error:
        sock.close()
        hint = {
            errno.EACCES: "; ports below 1024 need CAP_NET_BIND_SERVICE or root",
            errno.EADDRINUSE: "; another program listens there",
            errno.EADDRNOTAVAIL: "; it is no address of this machine",
        }.get(error.errno or 0, "")
        raise ListenError(f"can't listen on {host} port {port}: {error.strerror}{hint}") from error
    return sock


class Guard:
    """Runs what serves one connection, so that a mistake of ours in it ends nothing else.

    Attributes:
        failures: how many connections ended so; each is worth a report.
    """

    def __init__(self) -> None:
        self.failures = 0
        self._logged_at = -math.inf

    async def run(self, serve: Callable[..., Awaitable[None]], *arguments: Any) -> None:
        """Await `serve(*arguments)`; raises nothing but Cancelled."""
        try:
            await serve(*arguments)
        except Exception:
            self.failures += 1
            now = trio.current_time()
            # Whoever finds such a mistake may repeat it as often as they like.
            if now - self._logged_at >= FAILURE_LOG_SECONDS:
                self._logged_at = now
                logger.exception(
                    "a mistake in this program ended one connection (%d so far); "
                    "everybody else is served on, please report this",
                    self.failures,
                )


def take_waiting(listener: socket.socket) -> Iterator[trio.socket.SocketType]:
    """The connections that the kernel has accepted for us already: closing the listener would reset
    them, though whoever made them believes to be connected."""
    while True:
        try:
            connection, _ = listener.accept()
        except OSError as error:
            if error.errno == errno.ECONNABORTED:
                continue
            return
        yield trio.socket.from_stdlib_socket(connection)


async def accept_loop(
    listener: socket.socket, handle: Callable[[trio.socket.SocketType], Awaitable[None]]
) -> None:
    """Accept for ever and start `handle` for each connection, in a nursery of this loop.

    Cancelling cancels the connections that are still in a handler.
    Raises OSError only where the listener itself is broken.
    """
    sock = trio.socket.from_stdlib_socket(listener)
    guard = Guard()
    async with trio.open_nursery() as nursery:
        while True:
            try:
                connection, _ = await sock.accept()
            except OSError as error:
                if error.errno in _RESOURCE_ERRORS:
                    logger.warning(
                        "can't accept: %s; waiting 0.1 s (raise LimitNOFILE if this repeats)",
                        error.strerror,
                    )
                    await trio.sleep(0.1)
                elif error.errno in _LISTENER_ERRORS:
                    raise
                continue  # others concern the one connection, which is gone already
            nursery.start_soon(guard.run, handle, connection)
