"""HTTP/1.1 on a listener of the relay: requests in, responses out, and upgrades handed on.

What is answered to which path is decided by a `Responder`; this module only moves the bytes (h11
does the protocol).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Final

import h11
import trio

from traversal.io.stream import HandshakeStream, StreamEndedError

MAX_REQUEST_BODY_BYTES: Final = 65536
"""No endpoint of a relay takes more."""
READ_TIMEOUT_SECONDS: Final = 30.0
WRITE_TIMEOUT_SECONDS: Final = 30.0


@dataclass(frozen=True, slots=True)
class Request:
    """One HTTP request.

    Attributes:
        path: without the query, percent-encoding kept.
        query: after the question mark, without it.
        headers: names in lower case.
        source: the client's IP address in text form, empty if unknown.
        over_tls: whether it came over TLS.
    """

    method: str
    path: str
    query: str = ""
    headers: tuple[tuple[str, str], ...] = ()
    body: bytes = b""
    source: str = ""
    over_tls: bool = True

    def header(self, name: str) -> str:
        """The first header of this (lower-case) name, empty if there is none."""
        return next((value for key, value in self.headers if key == name), "")


@dataclass(frozen=True, slots=True)
class Response:
    """One HTTP response; Content-Length is added, `close` ends the connection after it."""

    status: int
    headers: Sequence[tuple[str, str]] = field(default=())
    body: bytes = b""
    close: bool = False


Responder = Callable[[Request], Response | Awaitable[Response]]
"""Decides what a request is answered. Those for the public are pure functions; one that has to ask
others first, as the admin listener's has, is an async function."""


@dataclass(frozen=True, slots=True)
class Upgrade:
    """A request for `/derp` that wants another protocol; the stream's next bytes are its."""

    request: Request


async def serve_http(
    stream: HandshakeStream, respond: Responder, *, source: str, over_tls: bool
) -> Upgrade | None:
    """Answer requests until the client is done (None) or asks for an upgrade on `/derp`.

    Raises StreamEndedError where the connection ends in the middle of something.
    """
    connection = h11.Connection(h11.SERVER)
    while True:
        request = await _receive_request(stream, connection, source, over_tls)
        if request is None:
            return None
        if request.path == "/derp" and wanted_protocol(request):
            stream.put_back(connection.trailing_data[0])
            return Upgrade(request)
        answer = respond(request)
        response = answer if isinstance(answer, Response) else await answer
        await _send_response(stream, connection, request.method, response)
        if connection.our_state is h11.MUST_CLOSE or connection.our_state is h11.CLOSED:
            return None
        connection.start_next_cycle()


def wanted_protocol(request: Request) -> str:
    """`derp` or `websocket` where the request asks for it, else empty (specification 3.4)."""
    protocol = request.header("upgrade").lower()
    if protocol == "websocket" and "derp" not in request.header("sec-websocket-protocol"):
        return "derp"  # very old clients
    return protocol if protocol in ("derp", "websocket") else ""


async def _receive_request(
    stream: HandshakeStream, connection: h11.Connection, source: str, over_tls: bool
) -> Request | None:
    head: h11.Request | None = None
    body = bytearray()
    with trio.move_on_after(READ_TIMEOUT_SECONDS) as timeout:
        while True:
            try:
                event = connection.next_event()
            except h11.RemoteProtocolError as error:
                await _send_refusal(stream, connection, head, error.error_status_hint, str(error))
                return None
            if event is h11.NEED_DATA:
                connection.receive_data(await stream.receive())
            elif isinstance(event, h11.Request):
                head = event
                if head.method == b"CONNECT":
                    await _send_refusal(stream, connection, head, 403, "CONNECT not enabled")
                    return None
                request = _request_of(head, b"", source, over_tls)
                if request.path == "/derp" and wanted_protocol(request):
                    return request
            elif isinstance(event, h11.Data):
                body += event.data
                if len(body) > MAX_REQUEST_BODY_BYTES:
                    reason = "the request body is too long"
                    await _send_refusal(stream, connection, head, 413, reason)
                    return None
            elif isinstance(event, h11.EndOfMessage):
                assert head is not None
                return _request_of(head, bytes(body), source, over_tls)
            else:
                return None  # the client has closed
    if timeout.cancelled_caught:
        raise StreamEndedError("no complete HTTP request in time")
    return None


def _request_of(head: h11.Request, body: bytes, source: str, over_tls: bool) -> Request:
    path, _, query = head.target.decode("latin-1").partition("?")
    return Request(
        method=head.method.decode("latin-1"),
        path=path,
        query=query,
        headers=tuple((n.decode("latin-1"), v.decode("latin-1")) for n, v in head.headers),
        body=body,
        source=source,
        over_tls=over_tls,
    )


async def _send_response(
    stream: HandshakeStream, connection: h11.Connection, method: str, response: Response
) -> None:
    headers = list(response.headers)
    if response.status not in (204, 304):
        headers.append(("Content-Length", str(len(response.body))))
    if response.close:
        headers.append(("Connection", "close"))
    head = h11.Response(
        status_code=response.status, headers=headers, reason=HTTPStatus(response.status).phrase
    )
    data = connection.send(head) or b""
    if response.body and method != "HEAD":
        data += connection.send(h11.Data(data=response.body)) or b""
    data += connection.send(h11.EndOfMessage()) or b""
    with trio.move_on_after(WRITE_TIMEOUT_SECONDS) as timeout:
        await stream.send_all(data)
    if timeout.cancelled_caught:
        raise StreamEndedError("the client did not read the HTTP response in time")


async def _send_refusal(
    stream: HandshakeStream,
    connection: h11.Connection,
    head: h11.Request | None,
    status: int,
    reason: str,
) -> None:
    if connection.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
        return
    refusal = Response(
        status, [("Content-Type", "text/plain; charset=utf-8")], f"{reason}\n".encode(), close=True
    )
    method = "GET" if head is None else head.method.decode("latin-1")
    await _send_response(stream, connection, method, refusal)
