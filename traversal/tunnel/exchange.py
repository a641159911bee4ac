"""What a transport hands to the connector's service: one request, or one TCP connection.

`traversal.tunnel.http2` and `traversal.tunnel.quic` implement it; `traversal.tunnel.serve` uses
nothing else.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from types import TracebackType
from typing import Literal, Self

import trio

Headers = tuple[tuple[bytes, bytes], ...]
"""Names in lower case; no pseudo-headers."""


class ExchangeEndedError(Exception):
    """The edge, or the connection to it, ended an exchange; the text says how."""


@dataclass(frozen=True, slots=True)
class IncomingHead:
    """What the edge asks for.

    Attributes:
        kind: "tcp" is a private-network connection to `authority`, an `IP:port`.
        authority: the host that a visitor asked for; ingress rules are matched against it.
        path: with the query.
        has_body: whether a body follows; a websocket's or TCP connection's is its raw bytes.
    """

    kind: Literal["http", "websocket", "tcp"]
    method: str
    authority: str
    path: str
    headers: Headers
    has_body: bool


class Incoming(ABC):
    """One exchange, seen from the origin's side. Leaving its `async with` resets what is not over.
    One task may receive while another sends. Every method raises ExchangeEndedError.

    Attributes:
        trailers: of the request, once `receive` has returned nothing.
    """

    head: IncomingHead
    trailers: Headers = ()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.reset()

    @abstractmethod
    def cancel_when_unwanted(self, scope: trio.CancelScope) -> None:
        """Cancel the scope when the edge wants no answer any more: nobody might look otherwise,
        while an origin has nothing to say."""

    @abstractmethod
    async def receive(self) -> bytes:
        """Some of the request's body, empty at its end."""

    @abstractmethod
    async def respond(
        self,
        status: int,
        headers: Iterable[tuple[bytes, bytes]] = (),
        *,
        is_from_connector: bool = False,
    ) -> None:
        """The response's head, once. 101 accepts a websocket, 200 a TCP connection."""

    @abstractmethod
    async def send(self, data: bytes) -> None:
        """Send some of the response's body."""

    @abstractmethod
    async def send_end(self, trailers: Headers = ()) -> None:
        """No more body; harmless when repeated."""

    @abstractmethod
    def reset(self) -> None:
        """End both directions at once; harmless on an exchange that is over."""
