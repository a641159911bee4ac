"""The small HTTP client: TLS is verified, answers are bounded, failures are of one type."""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
import trustme

from relay.http_client import MAX_RESPONSE_BYTES, HttpError, HttpResponse, post


@asynccontextmanager
async def serving(reply: bytes, tls: ssl.SSLContext | None = None) -> AsyncIterator[str]:
    """A server on loopback that reads something, answers `reply`, and closes."""

    async def handle(stream: trio.abc.Stream) -> None:
        if tls is not None:
            stream = trio.SSLStream(stream, tls, server_side=True, https_compatible=True)
        try:
            await stream.receive_some()
            await stream.send_all(reply)
        except trio.BrokenResourceError:
            pass
        await trio.aclose_forcefully(stream)

    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
            await nursery.start(trio.serve_listeners, handle, [listener])
            scheme = "http" if tls is None else "https"
            yield f"{scheme}://localhost:{listener.socket.getsockname()[1]}/x"
            nursery.cancel_scope.cancel()


async def ask(url: str, tls: ssl.SSLContext | None = None) -> HttpResponse:
    return await post(url, b"{}", timeout_seconds=5, tls=tls or ssl.create_default_context())


@pytest.mark.parametrize(
    "reply",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nbody",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nbo\r\n2\r\ndy\r\n0\r\n\r\n",
        b"HTTP/1.1 103 Early\r\n\r\nHTTP/1.1 200 OK\r\n\r\nbody",
        b"HTTP/1.0 200 OK\r\n\r\nbody",
    ],
)
async def test_every_way_to_frame_a_body(reply: bytes) -> None:
    """Length, chunks, or the end of the connection."""
    async with serving(reply) as url:
        assert await ask(url) == HttpResponse(200, b"body")


async def test_an_endless_body_is_cut() -> None:
    """DERP specification 8.2: 4096 bytes and no more."""
    async with serving(b"HTTP/1.1 200 OK\r\nContent-Length: 99999999\r\n\r\n" + b"x" * 9999) as url:
        assert await ask(url) == HttpResponse(200, b"x" * MAX_RESPONSE_BYTES)


@pytest.mark.parametrize("reply", [b"", b"\x00", b"HTTP/1.1 200 OK\r\nA: " + b"x" * 99999])
async def test_what_is_not_http_is_one_error(reply: bytes) -> None:
    """An endless header too."""
    async with serving(reply) as url:
        with pytest.raises(HttpError):
            await ask(url)


async def test_https_is_verified() -> None:
    """A certificate of somebody else's authority is refused, and the reason is named."""
    authority = trustme.CA()
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(server)
    trusting = ssl.create_default_context()
    authority.configure_trust(trusting)
    async with serving(b"HTTP/1.1 204 No\r\n\r\n", server) as url:
        assert (await ask(url, trusting)).status == 204
        with pytest.raises(HttpError, match="certificate verify failed"):
            await ask(url)


async def test_a_refused_connection_is_named() -> None:
    """The innermost reason is what an operator can use."""
    with pytest.raises(HttpError, match="refused"):
        await ask("http://127.0.0.1:1/")
