"""Simple hole punching, and what it should achieve between any two classes of NAT.

`punch` is the method behind the outcome matrix: both learn their mapping from one STUN server,
exchange it out of band, send to it every 30 ms for 0.7 s, and answer any source they hear from.
It is plain Trio over `trio.socket`, so that both back ends are judged by the same program.
"""

from __future__ import annotations

import random
import socket as stdlib
from contextlib import AbstractAsyncContextManager
from enum import StrEnum
from typing import Any

import trio

from netlab.behavior import Filtering, Mapping
from netlab.stun import Request, Response, StunError, parse

Address = tuple[str, int]

INTERVAL_SECONDS = 0.03
DURATION_SECONDS = 0.7

_PUNCH = b"punch"
_ANSWER = b"answer"


class Outcome(StrEnum):
    """What it takes to connect two NATs over UDP, without port mapping and IPv6."""

    DIRECT = "D"  # simple punching does
    BIRTHDAY = "B"  # many sockets and many guesses, ordinary effort
    RARE = "b"  # as above, with rare success
    RELAY = "R"


CLASSES = tuple(
    f"{mapping.name}+{filtering.name}" for mapping in Mapping for filtering in Filtering
)
"""The nine classes, in the order of the matrix."""

# Measured with filters per mapping; rows and columns in the order of CLASSES.
_MATRIX = (
    "DDDDDDDDD",
    "DDDDDDDDD",
    "DDDBBBBBB",
    "DDBDDBDDB",
    "DDBDBBDBB",
    "DDBBBRBbR",
    "DDBDDBDDR",
    "DDBDBbDBR",
    "DDBBBRRRR",
)


def expected_outcome(left: str, right: str) -> Outcome:
    """Return the outcome for two class names such as ``EIM+APDF``.

    Raises:
        ValueError: a name is not in `CLASSES`.
    """
    return Outcome(_MATRIX[CLASSES.index(left)][CLASSES.index(right)])


async def punch(
    left: AbstractAsyncContextManager[object],
    right: AbstractAsyncContextManager[object],
    server: Address,
    *,
    generator: random.Random,
    duration_seconds: float = DURATION_SECONDS,
) -> bool:
    """Try to connect two hosts; return whether each heard the other, as soon as both did.

    Args:
        left, right: what puts a task into each host (`async with host:`).
        server: a STUN server that both can reach.
        generator: draws transaction identifiers.
        duration_seconds: how long both keep trying.
    """
    sides = [_Side(host, server, generator) for host in (left, right)]
    try:
        async with trio.open_nursery() as nursery:
            for side in sides:
                nursery.start_soon(side.learn_mapping)
        if any(side.mapping is None for side in sides):
            return False
        with trio.move_on_after(duration_seconds):
            async with trio.open_nursery() as nursery:
                for side, peer in (sides, sides[::-1]):
                    nursery.start_soon(side.receive)
                    nursery.start_soon(side.send, peer.mapping)
                # Not before both have: the slower side's filter is opened by the faster one.
                for side in sides:
                    await side.heard_peer.wait()
                nursery.cancel_scope.cancel()
        return all(side.heard_peer.is_set() for side in sides)
    finally:
        for side in sides:
            side.close()


class _Side:
    """One end of a punch."""

    def __init__(
        self,
        host: AbstractAsyncContextManager[object],
        server: Address,
        generator: random.Random,
    ) -> None:
        self._host = host
        self._server = server
        self._transaction = generator.randbytes(12)
        self._sock: trio.socket.SocketType | None = None
        self.mapping: Address | None = None
        self.heard_peer = trio.Event()

    def close(self) -> None:
        if self._sock is not None:
            self._sock.close()

    async def learn_mapping(self) -> None:
        async with self._host:
            family = stdlib.AF_INET6 if ":" in self._server[0] else stdlib.AF_INET
            sock = self._sock = trio.socket.socket(family, stdlib.SOCK_DGRAM)
        request = Request(transaction=self._transaction).encode()
        for _ in range(3):
            await sock.sendto(request, self._server)
            with trio.move_on_after(0.3):
                while self.mapping is None:
                    data, _ = await sock.recvfrom(2048)
                    try:
                        response = parse(data)
                    except StunError:
                        continue
                    if isinstance(response, Response):
                        self.mapping = response.address, response.port
            if self.mapping is not None:
                return

    async def send(self, peer: Any) -> None:
        assert self._sock is not None
        while True:
            await self._sock.sendto(_PUNCH, peer)
            await trio.sleep(INTERVAL_SECONDS)

    async def receive(self) -> None:
        """Answer a punch where it came from, which may not be where we send to."""
        assert self._sock is not None
        while True:
            try:
                data, source = await self._sock.recvfrom(2048)
            except ConnectionError:
                continue  # an ICMP error of the time before the hole was open
            if data in (_PUNCH, _ANSWER):
                self.heard_peer.set()
            if data == _PUNCH:
                await self._sock.sendto(_ANSWER, source)
