"""Bytes between an exchange and a connection to an origin, both ways."""

from __future__ import annotations

from typing import Protocol

import trio

from traversal.io.stream import HandshakeStream, StreamEndedError
from traversal.tunnel.exchange import ExchangeEndedError


class ByteExchange(Protocol):
    """The byte pipe of an `Incoming`, or something between it and us."""

    async def receive(self) -> bytes:
        """Some bytes, empty at the end. Raises ExchangeEndedError."""
        ...

    async def send(self, data: bytes) -> None:
        """Send all. Raises ExchangeEndedError."""
        ...

    async def send_end(self) -> None:
        """No more from us. Raises ExchangeEndedError."""
        ...


async def relay_bytes(exchange: ByteExchange, stream: HandshakeStream) -> None:
    """Until both directions are over or one of the two ends fails; each may end its direction
    first. Raises ExchangeEndedError when the exchange failed, nothing when the origin did."""
    failure: ExchangeEndedError | None = None

    async def to_origin() -> None:
        nonlocal failure
        try:
            while data := await exchange.receive():
                await stream.send_all(data)
            await stream.send_eof()
        except StreamEndedError:
            nursery.cancel_scope.cancel()
        except ExchangeEndedError as error:
            failure = error
            nursery.cancel_scope.cancel()

    async def from_origin() -> None:
        nonlocal failure
        try:
            while data := await stream.receive():
                await exchange.send(data)
            await exchange.send_end()
        except StreamEndedError:
            nursery.cancel_scope.cancel()
        except ExchangeEndedError as error:
            failure = error
            nursery.cancel_scope.cancel()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(to_origin)
        nursery.start_soon(from_origin)
    if failure is not None:
        raise failure
