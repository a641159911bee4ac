"""The relay's HTTP listener on bytes: requests, the upgrade, and what comes through a WebSocket."""

from __future__ import annotations

from typing import Any, Final

import trio

from relay.http import Request, Response, serve_http
from relay.upgrade import RefusedError
from relay.websocket import serve_websocket
from traversal.io.stream import StreamEndedError

WEBSOCKET: Final = Request(
    "GET",
    "/derp",
    headers=(
        ("host", "relay.test"),
        ("upgrade", "websocket"),
        ("connection", "upgrade"),
        ("sec-websocket-version", "13"),
        ("sec-websocket-key", "dW5kZXJwYXNzIGVkZ2UuLg=="),
        ("sec-websocket-protocol", "derp"),
    ),
)


class _Memory:
    """The part of HandshakeStream that both use; the client's bytes come in three pieces."""

    def __init__(self, data: bytes) -> None:
        size = max(1, len(data) // 3)
        self._pieces = [data[at : at + size] for at in range(0, len(data), size)]

    async def receive(self) -> bytes:
        await trio.lowlevel.checkpoint()
        return self._pieces.pop(0) if self._pieces else b""

    async def send_all(self, data: bytes) -> None:
        await trio.lowlevel.checkpoint()

    def put_back(self, data: bytes) -> None:
        if data:
            self._pieces.insert(0, data)


async def _read_to_the_end(plain: Any) -> None:
    while await plain.receive():
        pass


def serve_requests(data: bytes) -> None:
    """Everything a client may send to the listener."""
    stream: Any = _Memory(data)

    async def serve() -> None:
        found = await serve_http(
            stream, lambda _: Response(200, body=b"ok"), source="192.0.2.1", over_tls=True
        )
        if found is not None and found.request.header("upgrade").lower() == "websocket":
            await serve_websocket(stream, found.request, _read_to_the_end, on_accept=lambda: None)

    _run(serve)


def serve_frames(data: bytes) -> None:
    """What a client may send once its WebSocket is accepted."""
    stream: Any = _Memory(data)

    async def serve() -> None:
        await serve_websocket(stream, WEBSOCKET, _read_to_the_end, on_accept=lambda: None)

    _run(serve)


def _run(serve: Any) -> None:
    try:
        trio.run(serve)
    except (StreamEndedError, RefusedError):
        pass
