"""Visitors of an edge, by HTTP/1.1 (h11) and HTTP/2, that can tell a response's end from its
breaking off."""

from __future__ import annotations

import ssl
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import h11
import trio

from traversal.io.http2 import Http2Connection
from traversal.io.http2_engine import Http2Error
from traversal.io.http2_stream import Http2Stream
from traversal.io.stream import HandshakeStream, StreamEndedError

Headers = Sequence[tuple[bytes, bytes]]


class TruncatedError(Exception):
    """The response broke off."""


@dataclass
class Answer:
    """A response that came to its end."""

    status: int
    headers: dict[bytes, bytes]
    body: bytes = b""
    trailers: dict[bytes, bytes] = field(default_factory=dict)
    interim: list[int] = field(default_factory=list)


class Visit(ABC):
    """One request. `receive` raises TruncatedError where the response does not end as it should."""

    trailers: Headers = ()

    @abstractmethod
    async def send(self, data: bytes) -> None: ...

    @abstractmethod
    async def send_end(self, trailers: Headers = ()) -> None: ...

    @abstractmethod
    async def response(self) -> tuple[int, dict[bytes, bytes]]: ...

    @abstractmethod
    async def receive(self) -> bytes: ...

    @abstractmethod
    async def leave(self) -> None:
        """As somebody who closes the page."""

    async def answer(self) -> Answer:
        """All of it."""
        status, headers = await self.response()
        body = bytearray()
        while data := await self.receive():
            body += data
        return Answer(status, headers, bytes(body), dict(self.trailers))


class Visitor:
    """Somebody outside, who trusts `authority_pem` and finds every name at `port` of this host."""

    def __init__(self, version: str, port: int, context: ssl.SSLContext) -> None:
        self.version = version
        self._port = port
        self._context = context
        context.set_alpn_protocols(["h2"] if version == "2" else ["http/1.1"])

    async def connect(self, host: str) -> HandshakeStream:
        """TLS with the edge."""
        stream = HandshakeStream((await trio.open_tcp_stream("127.0.0.1", self._port)).socket)
        await stream.start_tls(self._context, server_side=False, server_hostname=host)
        return stream

    @asynccontextmanager
    async def visit(
        self,
        method: str,
        path: str,
        headers: Headers = (),
        *,
        host: str = "app.example.com",
        has_body: bool = False,
        pseudo: Headers = (),
    ) -> AsyncIterator[Visit]:
        """A request on a connection of its own, with its head sent."""
        stream = await self.connect(host)
        try:
            if self.version == "2":
                async with trio.open_nursery() as nursery:
                    connection = Http2Connection(stream, client_side=True)
                    await nursery.start(connection.run)
                    head = [
                        (b":method", method.encode()),
                        (b":scheme", b"https"),
                        (b":authority", host.encode()),
                        (b":path", path.encode()),
                        *pseudo,
                        *headers,
                    ]
                    if pseudo:
                        await connection.ping()  # RFC 8441: only when the settings are there
                    yield _Visit2(await connection.open(head, end_stream=not has_body))
                    nursery.cancel_scope.cancel()
            else:
                visit = _Visit1(stream)
                framing = [] if not has_body else [(b"transfer-encoding", b"chunked")]
                if any(name == b"content-length" for name, _ in headers):
                    framing = []
                await visit.begin(method, path, [(b"host", host.encode()), *framing, *headers])
                if not has_body:
                    await visit.send_end()
                yield visit
        finally:
            stream.close()

    async def ask(
        self,
        method: str,
        path: str,
        headers: Headers = (),
        *,
        host: str = "app.example.com",
        body: bytes | None = None,
        trailers: Headers = (),
    ) -> Answer:
        """A request and its whole response."""
        has_body = body is not None
        async with (
            self.visit(method, path, headers, host=host, has_body=has_body) as visit,
            trio.open_nursery() as nursery,
        ):

            async def send() -> None:
                await visit.send(body or b"")
                await visit.send_end(trailers)

            if has_body:
                nursery.start_soon(send)
            answer = await visit.answer()
            nursery.cancel_scope.cancel()
        return answer


class _Visit1(Visit):
    def __init__(self, stream: HandshakeStream) -> None:
        self._stream = stream
        self._h11 = h11.Connection(h11.CLIENT)

    async def begin(self, method: str, path: str, headers: Headers) -> None:
        await self._send(h11.Request(method=method, target=path, headers=list(headers)))

    async def _send(self, event: h11.Event) -> None:
        await self._stream.send_all(self._h11.send(event) or b"")

    async def send(self, data: bytes) -> None:
        await self._send(h11.Data(data=data))

    async def send_end(self, trailers: Headers = ()) -> None:
        await self._send(h11.EndOfMessage(headers=list(trailers)))

    async def response(self) -> tuple[int, dict[bytes, bytes]]:
        while True:
            event = await self._next()
            if isinstance(event, h11.Response):
                return event.status_code, dict(event.headers)
            assert isinstance(event, h11.InformationalResponse), event

    async def receive(self) -> bytes:
        event = await self._next()
        if isinstance(event, h11.Data):
            return bytes(event.data)
        assert isinstance(event, h11.EndOfMessage), event
        self.trailers = list(event.headers)
        return b""

    async def leave(self) -> None:
        self._stream.close()
        await trio.lowlevel.checkpoint()

    async def _next(self) -> h11.Event:
        while True:
            try:
                event = self._h11.next_event()
                if isinstance(event, h11.Event):
                    if isinstance(event, h11.ConnectionClosed):
                        raise TruncatedError("closed without a response")
                    return event
                self._h11.receive_data(await self._stream.receive())
            except (h11.RemoteProtocolError, StreamEndedError) as error:
                raise TruncatedError(str(error)) from None


class _Visit2(Visit):
    def __init__(self, stream: Http2Stream) -> None:
        self._stream = stream

    async def send(self, data: bytes) -> None:
        await self._stream.send(data)

    async def send_end(self, trailers: Headers = ()) -> None:
        await self._stream.send_end(list(trailers))

    async def response(self) -> tuple[int, dict[bytes, bytes]]:
        try:
            headers = dict(await self._stream.response())
        except Http2Error as error:
            raise TruncatedError(str(error)) from None
        return int(headers[b":status"]), headers

    async def receive(self) -> bytes:
        try:
            data = await self._stream.receive()
        except Http2Error as error:
            raise TruncatedError(str(error)) from None
        if not data:
            self.trailers = self._stream.trailers or ()
        return data

    async def leave(self) -> None:
        self._stream.reset()
        await trio.lowlevel.checkpoint()
