"""One registered connection of a connector, whatever it runs over: the boundary inside the edge.

`relay.edge.http2` and `relay.edge.quic` implement it; what faces visitors uses nothing else.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from dataclasses import dataclass
from types import TracebackType
from typing import Literal, Self
from uuid import UUID

import trio

from traversal.wire.tunnel.registration import (
    FEATURE_PEERS,
    ConnectionDetails,
    ConnectionOptions,
    RegisterConnection,
)

logger = logging.getLogger("underpass.relay.edge")

Headers = tuple[tuple[bytes, bytes], ...]
"""Names in lower case; no pseudo-headers."""


class ConnectionFailedError(Exception):
    """A connection or one exchange on it is over. `is_unprocessed` says that the connector
    promises, or cannot but have done, nothing with the request: repeating it is safe."""

    def __init__(self, text: str, *, is_unprocessed: bool = False) -> None:
        super().__init__(text)
        self.is_unprocessed = is_unprocessed


@dataclass(frozen=True, slots=True)
class RequestHead:
    """A request for a connector, cleaned already.

    Attributes:
        path: with the query, starting with a slash (or `*`).
        kind: a websocket's bodies are its raw bytes.
        has_body: whether anything will be sent after it.
    """

    method: str
    scheme: str
    authority: str
    path: str
    headers: Headers
    kind: Literal["http", "websocket"] = "http"
    has_body: bool = False


@dataclass(frozen=True, slots=True)
class ResponseHead:
    """A connector's answer.

    Attributes:
        status: 101 for a websocket that the origin accepted, over every transport.
        headers: the origin's.
        is_from_connector: the connector made it, because it has no origin for the request or
            could not reach it.
        is_flow_limited: it refused the request because it has too many.
    """

    status: int
    headers: Headers
    is_from_connector: bool = False
    is_flow_limited: bool = False


class Exchange(ABC):
    """One request and its response, or one TCP connection. Leaving its `async with` resets what is
    not over. One task may receive while another sends.

    Every method raises ConnectionFailedError.

    Attributes:
        trailers: of the response, once `receive` has returned nothing; empty where there are none.
    """

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
    async def response(self) -> ResponseHead:
        """The response's head; it may come before the request's body was sent."""

    @abstractmethod
    async def receive(self) -> bytes:
        """Some of the response's body, empty at its end."""

    @abstractmethod
    async def send(self, data: bytes) -> None:
        """Send some of the request's body."""

    @abstractmethod
    async def send_end(self, trailers: Headers = ()) -> None:
        """No more body; harmless when repeated."""

    @abstractmethod
    def reset(self) -> None:
        """End both directions at once; harmless on an exchange that is over."""


class UdpFlow(ABC):
    """Datagrams to one destination behind a connector and back."""

    @abstractmethod
    async def send(self, data: bytes) -> None:
        """Send a datagram of at most 1280 bytes; what can't be sent is dropped.

        Raises ConnectionFailedError where the flow is over."""

    @abstractmethod
    async def receive(self) -> bytes:
        """The next datagram. Raises ConnectionFailedError where the flow is over."""

    @abstractmethod
    def close(self) -> None:
        """Forget the flow; harmless when repeated."""


class TunnelConnection(ABC):
    """A registered connection of a connector.

    Attributes:
        index: the connector's number for it, from 0.
        options: what the connector said of itself.
        is_remotely_managed: whether it was told to expect configurations from the edge.
        source: its IP address.
        since: when it registered, in monotonic seconds.
        local_configuration: what it reported (JSON), on its connection 0 only; empty if nothing.
        active: exchanges that are open.
        requests: exchanges since the beginning.
        supports_udp: whether `open_udp` can be used.
    """

    transport: Literal["http2", "quic"]
    supports_udp: bool = False

    def __init__(
        self, request: RegisterConnection, details: ConnectionDetails, *, source: str, now: float
    ) -> None:
        self.tunnel_id: UUID = request.tunnel_id
        self.index: int = request.connection_index
        self.options: ConnectionOptions = request.options
        self.connection_id: UUID = details.connection_id
        self.is_remotely_managed = details.is_remotely_managed
        self.source = source
        self.since = now
        self.local_configuration = b""
        self.active = 0
        self.requests = 0
        self._is_leaving = trio.Event()
        self._is_closed = False
        self._idle = trio.lowlevel.ParkingLot()

    @property
    def connector_id(self) -> UUID:
        """The process that made this connection."""
        return self.options.client_id

    @property
    def serves_requests(self) -> bool:
        """Whether requests are what it is for; else it carries peers' packets."""
        return FEATURE_PEERS not in self.options.features

    def __repr__(self) -> str:
        return f"<{self.transport} {self.tunnel_id}/{self.connector_id}/{self.index}>"

    @property
    @abstractmethod
    def is_usable(self) -> bool:
        """Whether new requests may be given to it."""

    @abstractmethod
    async def request(self, head: RequestHead) -> Exchange:
        """Send a request's head; doesn't wait for the response. Raises ConnectionFailedError."""

    @abstractmethod
    async def connect_tcp(self, destination: str, source: str) -> Exchange:
        """Have the connector dial `IP:port`; the response's status is 200 when it has.

        `source` is who wants it, for the connector's log. Raises ConnectionFailedError."""

    async def open_udp(self, destination: str, idle_seconds: float) -> UdpFlow:
        """Have the connector open a flow. Raises ConnectionFailedError."""
        raise ConnectionFailedError("this transport has no datagrams", is_unprocessed=True)

    @abstractmethod
    async def push_configuration(self, version: int, document: bytes) -> int:
        """Have the connector use a configuration (JSON); returns the version that it uses now.

        Raises ConnectionFailedError."""

    @property
    @abstractmethod
    def is_connected(self) -> bool:
        """Whether what it runs over still works."""

    @abstractmethod
    def _close_transport(self, reason: str) -> None:
        """Close what the connection runs over; harmless when repeated."""

    # ---- leaving, the same over both transports

    @property
    def is_leaving(self) -> bool:
        """Whether it takes no more requests."""
        return self._is_leaving.is_set()

    def drain(self, reason: str) -> None:
        """Take no new requests, and close when those under way are done, or late; harmless when
        repeated."""
        if not self._is_leaving.is_set():
            logger.info("%r takes no more requests: %s", self, reason)
            self._is_leaving.set()

    def close(self, reason: str) -> None:
        """Close at once; harmless when repeated."""
        if not self._is_closed:
            logger.info("%r is closed: %s", self, reason)
        self._is_closed = True
        self._is_leaving.set()
        self._close_transport(reason)
        self._idle.unpark_all()

    async def wait_leaving(self) -> None:
        """Return when the connection is closed, or was told to drain."""
        await self._is_leaving.wait()

    async def wait_over(self, drain_seconds: float) -> None:
        """Return when the connection is closed, or was told to drain and has nothing to do any
        more, or did not come to that in time."""
        await self._is_leaving.wait()
        with trio.move_on_after(drain_seconds):
            while self.active and not self._is_closed:
                await self._idle.park()

    def _begin_exchange(self) -> None:
        self.active += 1

    def _end_exchange(self) -> None:
        self.active -= 1
        if not self.active:
            self._idle.unpark_all()
