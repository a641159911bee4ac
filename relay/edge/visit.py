"""One request of a visitor, whatever version of HTTP it came by: the boundary towards `proxy`."""

from __future__ import annotations

from abc import ABC, abstractmethod

from relay.edge.connection import Headers
from relay.edge.hygiene import RawRequest, Visitor


class VisitorGoneError(Exception):
    """The visitor left, stalled, or broke the protocol in the middle of a request."""


class Visit(ABC):
    """A request to answer. One task may receive while another sends.

    Attributes:
        has_body: whether a body follows, as far as the transport knows.
        has_responded: whether any of a final response was sent.
        trailers: of the request, once `receive` has returned nothing.
    """

    def __init__(self, raw: RawRequest, visitor: Visitor, *, has_body: bool) -> None:
        self.raw = raw
        self.visitor = visitor
        self.has_body = has_body
        self.has_responded = False
        self.trailers: Headers = ()

    @abstractmethod
    async def receive(self) -> bytes:
        """Some of the request's body (or of a WebSocket's bytes), empty at its end. Raises
        VisitorGoneError."""

    @abstractmethod
    async def respond(self, status: int, headers: Headers) -> None:
        """Send the response's head; 101 makes the rest a WebSocket. Raises VisitorGoneError."""

    @abstractmethod
    async def send(self, data: bytes) -> None:
        """Send some of the body. Raises VisitorGoneError."""

    @abstractmethod
    async def send_end(self, trailers: Headers = ()) -> None:
        """The response is complete. Raises VisitorGoneError."""

    @abstractmethod
    async def gone(self) -> None:
        """Returns when the visitor has left; may never."""

    @abstractmethod
    def abort(self) -> None:
        """End a response in the middle, so that the visitor can tell."""
