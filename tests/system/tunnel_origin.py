"""An origin for tests of the whole way: HTTP/1.1 by h11, WebSockets by wsproto, raw TCP."""

from __future__ import annotations

import struct
from collections.abc import Awaitable, Callable
from socket import SO_LINGER, SOL_SOCKET
from urllib.parse import parse_qs, urlsplit

import h11
import trio
import wsproto

Receive = Callable[[], Awaitable["h11.Event | type[h11.NEED_DATA] | type[h11.PAUSED]"]]
Send = Callable[[h11.Event], Awaitable[None]]


class Origin:
    """An HTTP/1.1 server, and a TCP echo server.

    Attributes:
        requests: in the order in which they came.
        connections: of HTTP, since the start.
        go_on: set: `/slow` ends, and `/events` has its second event.
        abandoned: set when a client left in the middle of `/events`, `/never` or `/drink`.
    """

    def __init__(self) -> None:
        self.requests: list[h11.Request] = []
        self.connections = 0
        self.go_on = trio.Event()
        self.abandoned = trio.Event()
        self.port = 0
        self.tcp_port = 0

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        async with trio.open_nursery() as nursery:
            http, tcp = [(await trio.open_tcp_listeners(0, host="127.0.0.1"))[0] for _ in range(2)]
            self.port = http.socket.getsockname()[1]
            self.tcp_port = tcp.socket.getsockname()[1]
            nursery.start_soon(trio.serve_listeners, self.serve, [http])
            nursery.start_soon(trio.serve_listeners, self._echo, [tcp])
            task_status.started()

    async def _echo(self, stream: trio.SocketStream) -> None:
        try:
            async for data in stream:
                await stream.send_all(data)
            await stream.send_eof()
        except trio.BrokenResourceError:
            pass

    async def serve(self, stream: trio.SocketStream) -> None:
        """Serve one HTTP connection."""
        self.connections += 1
        connection = h11.Connection(h11.SERVER)

        async def send(event: h11.Event) -> None:
            data = connection.send(event)
            if data:
                try:
                    await stream.send_all(data)
                except trio.BrokenResourceError:
                    raise ConnectionError from None

        async def receive() -> h11.Event | type[h11.NEED_DATA] | type[h11.PAUSED]:
            while True:
                event = connection.next_event()
                if event is not h11.NEED_DATA:
                    return event
                try:
                    connection.receive_data(await stream.receive_some(65536))
                except trio.BrokenResourceError:
                    raise ConnectionError from None

        try:
            while True:
                request = await receive()
                if not isinstance(request, h11.Request):
                    return
                self.requests.append(request)
                if dict(request.headers).get(b"upgrade") == b"websocket":
                    await self._websocket(stream, request)
                    return
                if await self._break_off(stream, request):
                    return
                await self._answer(stream, request, receive, send)
                if connection.our_state is h11.MUST_CLOSE:
                    return
                connection.start_next_cycle()
        except (ConnectionError, h11.ProtocolError):
            pass

    async def _answer(
        self, stream: trio.SocketStream, request: h11.Request, receive: Receive, send: Send
    ) -> None:
        url = urlsplit(request.target.decode())
        chunked = [("Transfer-Encoding", "chunked"), ("Set-Cookie", "a=1"), ("Set-Cookie", "b=2")]
        match url.path:
            case "/echo":
                await send(h11.Response(status_code=200, headers=chunked))
                while isinstance(event := await receive(), h11.Data):
                    await send(h11.Data(data=bytes(event.data)))
                assert isinstance(event, h11.EndOfMessage)
                await send(h11.EndOfMessage(headers=event.headers))
                return
            case "/bytes":
                size = int(parse_qs(url.query)["n"][0])
                headers = [("Content-Length", str(size))]
                await send(h11.Response(status_code=200, headers=headers))
                sent = 0
                while sent < size:
                    piece = pattern(sent, min(65536, size - sent))
                    await send(h11.Data(data=piece))
                    sent += len(piece)
                await send(h11.EndOfMessage())
            case "/trailers":
                headers = [*chunked, ("Trailer", "X-Checksum")]
                await send(h11.Response(status_code=200, headers=headers))
                await send(h11.Data(data=b"body"))
                # HTTP/2 forbids the second one.
                await send(h11.EndOfMessage(headers=[("X-Checksum", "1"), ("TE", "gzip")]))
            case "/slow":
                await send(h11.Response(status_code=200, headers=chunked))
                await send(h11.Data(data=b"begun;"))
                await self.go_on.wait()
                await send(h11.Data(data=b"done"))
                await send(h11.EndOfMessage())
            case "/events":
                headers = [("Content-Type", "text/event-stream"), ("Cache-Control", "no-store")]
                await send(h11.Response(status_code=200, headers=headers))
                await send(h11.Data(data=b"data: 1\n\n"))
                await self.go_on.wait()
                await send(h11.Data(data=b"data: 2\n\n"))
                await self._wait_abandoned(stream)
            case "/never":
                await self._wait_abandoned(stream)
            case "/drink":
                # Of an upload that breaks off, h11 says so.
                try:
                    while isinstance(await receive(), h11.Data):
                        pass
                except h11.RemoteProtocolError:
                    self.abandoned.set()
                    raise
            case "/hints":
                link = [("Link", "</style.css>; rel=preload")]
                await send(h11.InformationalResponse(status_code=103, headers=link))
                headers = [("Content-Length", "4")]
                await send(h11.Response(status_code=200, headers=headers))
                await send(h11.Data(data=b"page"))
                await send(h11.EndOfMessage())
            case "/status":
                code = int(parse_qs(url.query)["code"][0])
                headers = [("ETag", '"1"')] + ([("Content-Length", "1234")] if code == 304 else [])
                await send(h11.Response(status_code=code, headers=headers))
                await send(h11.EndOfMessage())
            case _:
                body = url.path.encode()
                headers = [("Content-Length", str(len(body))), ("X-Origin", "yes")]
                await send(h11.Response(status_code=200, headers=headers))
                if request.method != b"HEAD":
                    await send(h11.Data(data=body))
                await send(h11.EndOfMessage())
        while not isinstance(await receive(), h11.EndOfMessage):
            pass

    async def _wait_abandoned(self, stream: trio.SocketStream) -> None:
        """Until the client has closed the connection."""
        try:
            while await stream.receive_some(65536):
                pass
        except trio.BrokenResourceError:
            pass
        self.abandoned.set()
        raise ConnectionError

    async def _break_off(self, stream: trio.SocketStream, request: h11.Request) -> bool:
        """Whether the request was for a response that an origin breaks off, and that was done."""
        length = b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n0123456789"
        chunks = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\na\r\n0123456789\r\n"
        sent = {
            b"/reset": length,
            b"/short": length,
            b"/cut": chunks,
            b"/cut-in-chunk": chunks + b"ff\r\n0123",
            b"/nonsense": b"SSH-2.0-OpenSSH_9.2\r\n",
        }.get(bytes(request.target))
        if sent is None:
            return False
        await stream.send_all(sent)
        if request.target == b"/reset":
            await trio.sleep(0.05)  # a reset throws away what was not read yet
            stream.socket.setsockopt(SOL_SOCKET, SO_LINGER, struct.pack("ii", 1, 0))
        return True

    async def _websocket(self, stream: trio.SocketStream, request: h11.Request) -> None:
        connection = wsproto.WSConnection(wsproto.ConnectionType.SERVER)
        connection.initiate_upgrade_connection(list(request.headers), request.target.decode())
        while True:
            for event in connection.events():
                match event:
                    case wsproto.events.Request(target="/refused"):
                        answer: wsproto.events.Event = wsproto.events.RejectConnection(
                            status_code=403, headers=[(b"content-length", b"0")]
                        )
                    case wsproto.events.Request():
                        answer = wsproto.events.AcceptConnection()
                    case wsproto.events.TextMessage():
                        answer = wsproto.events.TextMessage(
                            event.data.upper(), event.frame_finished, event.message_finished
                        )
                    case wsproto.events.BytesMessage():
                        answer = wsproto.events.BytesMessage(
                            event.data, event.frame_finished, event.message_finished
                        )
                    case wsproto.events.CloseConnection():
                        return
                await stream.send_all(connection.send(answer))
            connection.receive_data(await stream.receive_some(65536) or None)


def pattern(start: int, size: int) -> bytes:
    """Bytes that differ by their position."""
    block = b"".join(i.to_bytes(4, "big") for i in range(start // 4, (start + size) // 4 + 2))
    return block[start % 4 : start % 4 + size]
