"""Connect many clients to a DERP server at once, for load tests."""

from __future__ import annotations

import os
import resource
from collections.abc import Callable
from typing import Final

import trio

from relay.load_pair import LoadClient
from traversal.io.dial import CLIENT_INFO, DialError, Target, dial
from traversal.keys import NodePrivate
from traversal.wire.derp import ClientInfo

CONCURRENT_DIALS: Final = 32
"""More would only wait in the server's queue and time out there."""
SPARE_DESCRIPTORS: Final = 64


async def connect_clients(
    target: Target,
    count: int,
    *,
    info: ClientInfo = CLIENT_INFO,
    on_progress: Callable[[int], None] = lambda _connected: None,
) -> list[LoadClient]:
    """Clients with fresh keys; the caller closes their sockets. Raises DialError for the first
    that fails; then all are closed."""
    _raise_descriptor_limit(count)
    limiter = trio.CapacityLimiter(CONCURRENT_DIALS)
    clients: list[LoadClient] = []
    problems: list[DialError] = []

    async def connect() -> None:
        async with limiter:
            key = NodePrivate.generate(os.urandom)
            try:
                dialed = await dial(target, key, info=info)
            except DialError as error:
                problems.append(error)
                nursery.cancel_scope.cancel()
                return
        sock, tls, received = dialed.detach()
        clients.append(LoadClient(key.public().raw, sock, tls, received))
        on_progress(len(clients))

    try:
        async with trio.open_nursery() as nursery:
            for _ in range(count):
                nursery.start_soon(connect)
        if problems:
            raise problems[0]
    except BaseException:
        close_clients(clients)
        raise
    return clients


def close_clients(clients: list[LoadClient]) -> None:
    """Close all sockets."""
    for client in clients:
        client.sock.close()


def _raise_descriptor_limit(count: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + SPARE_DESCRIPTORS
    if soft != resource.RLIM_INFINITY and soft < wanted:
        if hard != resource.RLIM_INFINITY:
            wanted = min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
