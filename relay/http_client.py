"""One HTTP/1.1 request at a time: to an admission hook, a local daemon, a relay's admin listener.

No redirects, no cookies, no connection kept: what is asked here is asked seldom and answered in
little.
"""

from __future__ import annotations

import os
import socket
import ssl
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Final
from urllib.parse import urlsplit

import h11
import trio

# Derper's limit for the hook's answer (DERP specification 8.2), which has tens of bytes.
MAX_RESPONSE_BYTES: Final = 4096


class HttpError(Exception):
    """No complete answer came: the other side can't be reached, is too slow, or speaks no HTTP."""


@dataclass(frozen=True, slots=True)
class HttpResponse:
    """A status and the body, cut at the limit that was asked for."""

    status: int
    body: bytes


async def post(
    url: str, body: bytes, *, timeout_seconds: float, tls: ssl.SSLContext
) -> HttpResponse:
    """POST to an http(s) URL without a Content-Type, as derper does; `tls` is for https.

    Raises HttpError.
    """
    headers = [("Content-Length", str(len(body)))]
    return await _bounded(lambda: _ask("POST", url, headers, body, tls), timeout_seconds)


async def get(
    url: str,
    headers: Sequence[tuple[str, str]],
    *,
    timeout_seconds: float,
    tls: ssl.SSLContext,
    max_bytes: int,
) -> HttpResponse:
    """GET from an http(s) URL, with so much of the body at most. Raises HttpError."""
    return await _bounded(lambda: _ask("GET", url, headers, b"", tls, max_bytes), timeout_seconds)


async def get_from_unix_socket(
    path: str, target: str, headers: Sequence[tuple[str, str]], *, timeout_seconds: float
) -> HttpResponse:
    """GET from a daemon on this machine. Raises HttpError."""

    async def ask() -> HttpResponse:
        async with await trio.open_unix_socket(path) as stream:
            return await _exchange(stream, "GET", target, headers, b"")

    return await _bounded(ask, timeout_seconds)


async def _ask(
    method: str,
    url: str,
    headers: Sequence[tuple[str, str]],
    body: bytes,
    tls: ssl.SSLContext,
    max_bytes: int = MAX_RESPONSE_BYTES,
) -> HttpResponse:
    parts = urlsplit(url)
    host = parts.hostname or ""
    port = parts.port or (443 if parts.scheme == "https" else 80)
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    stream: trio.abc.Stream = await trio.open_tcp_stream(host, port)
    if parts.scheme == "https":
        stream = trio.SSLStream(stream, tls, server_hostname=host, https_compatible=True)
    headers = [("Host", parts.netloc), *headers]
    async with stream:
        return await _exchange(stream, method, target, headers, body, max_bytes)


async def _exchange(
    stream: trio.abc.Stream,
    method: str,
    target: str,
    headers: Sequence[tuple[str, str]],
    body: bytes,
    max_bytes: int = MAX_RESPONSE_BYTES,
) -> HttpResponse:
    connection = h11.Connection(h11.CLIENT)
    request = h11.Request(method=method, target=target, headers=[*headers, ("Connection", "close")])
    out = [connection.send(request), connection.send(h11.Data(body))]
    out.append(connection.send(h11.EndOfMessage()))
    await stream.send_all(b"".join(part for part in out if part))
    status = 0
    content = bytearray()
    while len(content) < max_bytes:
        event = connection.next_event()
        if event is h11.NEED_DATA:
            data = bytes(await stream.receive_some())
            if not data and not status:
                raise HttpError("the connection ended without an answer")
            connection.receive_data(data)
        elif isinstance(event, h11.Response):
            status = event.status_code
        elif isinstance(event, h11.Data):
            content += event.data
        elif not isinstance(event, h11.InformationalResponse):
            break
    return HttpResponse(status, bytes(content[:max_bytes]))


async def _bounded(
    ask: Callable[[], Awaitable[HttpResponse]], timeout_seconds: float
) -> HttpResponse:
    """Run `ask` with a time limit, every failure of the other side as HttpError."""
    try:
        with trio.fail_after(timeout_seconds):
            return await ask()
    except trio.TooSlowError:
        raise HttpError(f"no answer within {timeout_seconds:g} s") from None
    except h11.RemoteProtocolError as error:
        raise HttpError(f"the answer is not HTTP: {error}") from error
    except (OSError, trio.BrokenResourceError) as error:
        raise HttpError(_reason(_innermost(error))) from error


def _reason(error: BaseException) -> str:
    if isinstance(error, ssl.SSLError | socket.gaierror) or not isinstance(error, OSError):
        return str(error)
    # Trio's text for a refused connection is made for programmers.
    return os.strerror(error.errno) if error.errno else str(error)


def _innermost(error: BaseException) -> BaseException:
    """What really happened: Trio wraps refused connections and TLS errors once or twice."""
    while True:
        if isinstance(error, BaseExceptionGroup):
            error = error.exceptions[-1]
        elif error.__cause__ is not None:
            error = error.__cause__
        else:
            return error
