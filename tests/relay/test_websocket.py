"""DERP over WebSocket (DERP specification 3.6), with wsproto's client on the other side."""

from __future__ import annotations

import os
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest
import trio
from wsproto import ConnectionType, WSConnection, events
from wsproto.extensions import PerMessageDeflate

from relay.admission import Admission
from relay.config import AdmissionConfig
from relay.http import Upgrade, serve_http
from relay.pump import Pump
from relay.upgrade import RefusedError, Upgrader
from relay.websocket import MAX_MESSAGE_BYTES, serve_websocket
from traversal.io.stream import HandshakeStream, StreamEndedError
from traversal.keys import NodePrivate
from traversal.wire.derp import (
    ClientInfo,
    DerpError,
    FrameSplitter,
    FrameType,
    encode_client_info,
    encode_ping,
    encode_send_packet,
    parse_server_key,
)

SERVER = NodePrivate(bytes.fromhex("00" * 31 + "40"))


@dataclass
class Relay:
    """A pump that serves WebSocket clients over socket pairs."""

    nursery: trio.Nursery
    pump: Pump
    refuse: bool = False
    accepted: int = 0
    endings: list[Exception | None] = field(default_factory=list)
    ended: trio.Event = field(default_factory=trio.Event)
    sockets: list[trio.socket.SocketType] = field(default_factory=list)

    def _on_accept(self) -> None:
        self.accepted += 1

    async def serve(self, sock: trio.socket.SocketType) -> None:
        upgrader = Upgrader(
            SERVER,
            self.pump,
            mesh_key=None,
            admission=Admission(AdmissionConfig()),
            rate_limit=lambda: None,
            on_close=lambda connection, reason: None,
        )
        stream = HandshakeStream(sock)
        upgrade = await serve_http(
            stream, lambda request: pytest.fail("no upgrade"), source="192.0.2.1", over_tls=False
        )
        assert isinstance(upgrade, Upgrade)

        async def shake_hands(plain: HandshakeStream) -> None:
            if self.refuse:
                raise RefusedError("not on the list")
            await upgrader.upgrade(plain, upgrade.request, with_response=False)

        try:
            await serve_websocket(stream, upgrade.request, shake_hands, on_accept=self._on_accept)
            self.endings.append(None)
        except (StreamEndedError, DerpError, RefusedError) as error:
            self.endings.append(error)
        finally:
            stream.close()
            self.ended.set()

    async def connect(self, *, subprotocols: tuple[str, ...] = ("derp",)) -> Browser:
        ours, theirs = trio.socket.socketpair()
        self.nursery.start_soon(self.serve, theirs)
        browser = Browser(trio.SocketStream(ours))
        self.sockets.append(ours)
        await browser.open(subprotocols)
        return browser


@asynccontextmanager
async def relay() -> AsyncIterator[Relay]:
    """Runs until the block ends."""
    async with trio.open_nursery() as nursery:
        pump = Pump(SERVER.public(), write_timeout_seconds=0.2, randomness=random.Random(1))
        await nursery.start(pump.run)
        server = Relay(nursery, pump)
        try:
            yield server
        finally:
            nursery.cancel_scope.cancel()
            for sock in server.sockets:
                sock.close()


class Browser:
    """A WebSocket client that speaks DERP."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self.stream = stream
        self.websocket = WSConnection(ConnectionType.CLIENT)
        self.received = bytearray()
        self.message_sizes: list[int] = []
        self.close_code: int | None = None
        self.close_reason: str | None = None
        self.pongs: list[bytes] = []
        self.frames: list[tuple[int, bytes]] = []
        self._splitter = FrameSplitter(1 << 20)
        self._message_size = 0

    async def open(self, subprotocols: tuple[str, ...]) -> None:
        request = events.Request(
            host="relay.example.com",
            target="/derp",
            subprotocols=list(subprotocols),
            extensions=[PerMessageDeflate()],
        )
        await self.send(request)
        self.accept = await self._next()
        assert isinstance(self.accept, events.AcceptConnection)

    async def send(self, event: events.Event) -> None:
        await self.stream.send_all(self.websocket.send(event))

    async def send_bytes(self, data: bytes) -> None:
        await self.send(events.BytesMessage(data))

    async def _next(self) -> events.Event:
        while True:
            for event in self.websocket.events():
                return event
            data = await self.stream.receive_some(65536)
            self.websocket.receive_data(data or None)

    async def next_frame(self) -> tuple[int, bytes]:
        """The next DERP frame, however it is cut into messages."""
        while not self.frames:
            assert await self.handle_event(), f"closed: {self.close_code}"
        return self.frames.pop(0)

    async def handle_event(self) -> bool:
        event = await self._next()
        if isinstance(event, events.BytesMessage):
            self._message_size += len(event.data)
            if event.message_finished:
                self.message_sizes.append(self._message_size)
                self._message_size = 0
            self._splitter.receive_data(event.data)
            self.frames += self._splitter.frames()
        elif isinstance(event, events.Pong):
            self.pongs.append(bytes(event.payload))
        elif isinstance(event, events.CloseConnection):
            self.close_code, self.close_reason = event.code, event.reason
            return False
        return True

    async def until_closed(self) -> None:
        while await self.handle_event():
            pass

    async def shake_hands(self, key: NodePrivate) -> None:
        frame_type, body = await self.next_frame()
        assert frame_type == FrameType.SERVER_KEY
        info = ClientInfo(version=2)
        await self.send_bytes(encode_client_info(info, key, parse_server_key(body), os.urandom(24)))
        assert (await self.next_frame())[0] == FrameType.SERVER_INFO


def new_key() -> NodePrivate:
    return NodePrivate.generate(os.urandom)


class TestOpening:
    async def test_chooses_derp_and_refuses_compression(self) -> None:
        """The handshake is answered by ServerKey without a second 101."""
        async with relay() as server:
            browser = await server.connect(subprotocols=("chat", "derp"))
            assert isinstance(browser.accept, events.AcceptConnection)
            assert browser.accept.subprotocol == "derp"
            assert browser.accept.extensions == []
            assert (await browser.next_frame())[0] == FrameType.SERVER_KEY
            assert server.accepted == 1

    async def test_another_subprotocol_is_closed(self) -> None:
        """`derp` occurs in the header, so it is a WebSocket, but it is not what was offered."""
        async with relay() as server:
            browser = await server.connect(subprotocols=("derp-like",))
            await browser.until_closed()
            assert browser.close_code == 1008
            assert browser.close_reason == "client must speak the derp subprotocol"
            assert server.accepted == 0

    @pytest.mark.parametrize(
        ("head", "status"),
        [
            ("POST /derp HTTP/1.1\r\nSec-WebSocket-Version: 13\r\n", 405),
            ("GET /derp HTTP/1.1\r\nSec-WebSocket-Version: 13\r\n", 400),
            ("GET /derp HTTP/1.1\r\nSec-WebSocket-Version: 8\r\n", 426),
            ("GET /derp HTTP/1.1\r\nSec-WebSocket-Protocol: \xa1\r\n", 400),
            ("GET /derp HTTP/1.1\r\nSec-WebSocket-Extensions: \xa1\r\n", 400),
            ("GET /derp HTTP/1.1\r\nConnection: \xa1\r\n", 400),
        ],
    )
    async def test_wrong_handshakes_get_a_status(self, head: str, status: int) -> None:
        """And count as refused."""
        async with relay() as server:
            ours, theirs = trio.socket.socketpair()
            server.nursery.start_soon(server.serve, theirs)
            server.sockets.append(ours)
            stream = trio.SocketStream(ours)
            rest = (
                "Host: \xfc\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
                "Sec-WebSocket-Protocol: derp\r\n\r\n"
            )
            await stream.send_all((head + rest).encode("latin-1"))
            answer = await stream.receive_some(1000)
            assert answer.startswith(f"HTTP/1.1 {status} ".encode())
            await server.ended.wait()
            assert isinstance(server.endings[0], RefusedError)


class TestFrames:
    async def test_two_browsers_exchange_packets(self) -> None:
        """Large frames leave in several messages, none above the limit."""
        async with relay() as server:
            one, two = await server.connect(), await server.connect()
            one_key, two_key = new_key(), new_key()
            await one.shake_hands(one_key)
            await two.shake_hands(two_key)
            payloads = [os.urandom(size) for size in (1, 1400, 65536, 40000)]
            for payload in payloads:
                await one.send_bytes(encode_send_packet(two_key.public(), payload))
            for payload in payloads:
                frame_type, body = await two.next_frame()
                assert frame_type == FrameType.RECV_PACKET
                assert body == one_key.public().raw + payload
            assert max(two.message_sizes) <= MAX_MESSAGE_BYTES

    async def test_message_boundaries_mean_nothing(self) -> None:
        """One byte per message, and fragments of one message, make the same frames."""
        async with relay() as server:
            browser = await server.connect()
            await browser.shake_hands(new_key())
            ping = encode_ping(b"12345678")
            for byte in ping:
                await browser.send_bytes(bytes([byte]))
            await browser.send(events.BytesMessage(ping[:3], message_finished=False))
            await browser.send(events.BytesMessage(b"", message_finished=False))
            await browser.send(events.BytesMessage(ping[3:]))
            for _ in range(2):
                assert await browser.next_frame() == (FrameType.PONG, b"12345678")

    async def test_messages_of_any_size_are_taken(self) -> None:
        """derper closes above 32768 bytes; here a message of 1 MiB passes through."""
        async with relay() as server:
            browser = await server.connect()
            key = new_key()
            await browser.shake_hands(key)
            frame = encode_send_packet(key.public(), bytes(65000))
            message = frame * 16
            async with trio.open_nursery() as nursery:
                nursery.start_soon(browser.send_bytes, message)
                for _ in range(16):
                    assert (await browser.next_frame())[0] == FrameType.RECV_PACKET

    async def test_pings_are_answered(self) -> None:
        """RFC 6455 section 5.5.2, also in the middle of a message."""
        async with relay() as server:
            browser = await server.connect()
            await browser.shake_hands(new_key())
            await browser.send(events.BytesMessage(encode_ping(b"x" * 8), message_finished=False))
            await browser.send(events.Ping(b"hello"))
            while not browser.pongs:
                await browser.handle_event()
            assert browser.pongs == [b"hello"]


class TestClosing:
    async def test_text_is_refused(self) -> None:
        """1003, and the relay forgets the client."""
        async with relay() as server:
            browser = await server.connect()
            await browser.shake_hands(new_key())
            await browser.send(events.TextMessage("hello"))
            await browser.until_closed()
            assert browser.close_code == 1003
            await browser.stream.aclose()
            await server.ended.wait()
            await _until(lambda: not server.pump.connections)
            assert server.endings == [None]

    @pytest.mark.parametrize("code", [1000, 1001])
    async def test_closing_is_the_end_of_the_stream(self, code: int) -> None:
        """The close is answered with the same code."""
        async with relay() as server:
            browser = await server.connect()
            await browser.shake_hands(new_key())
            await browser.send(events.CloseConnection(code))
            await browser.until_closed()
            assert browser.close_code == code
            await browser.stream.aclose()
            await server.ended.wait()
            await _until(lambda: not server.pump.connections)

    async def test_the_relay_closes(self) -> None:
        """A client that the pump ends is told so."""
        async with relay() as server:
            browser = await server.connect()
            await browser.shake_hands(new_key())
            (connection,) = server.pump.connections.values()
            server.pump.close(connection, "revoked")
            await browser.until_closed()
            assert browser.close_code == 1001

    async def test_a_refused_client(self) -> None:
        """1008, and the reason goes to the caller, for the operator's log."""
        async with relay() as server:
            server.refuse = True
            browser = await server.connect()
            with pytest.raises(AssertionError, match="1008"):
                await browser.shake_hands(new_key())
            await browser.stream.aclose()
            await server.ended.wait()
            assert isinstance(server.endings[0], RefusedError)

    async def test_bytes_that_are_no_websocket(self) -> None:
        """1002, whatever they are."""
        async with relay() as server:
            browser = await server.connect()
            await browser.stream.send_all(b"\xff" * 100)
            await browser.until_closed()
            assert browser.close_code == 1002
            await browser.stream.aclose()
            await server.ended.wait()

    async def test_a_browser_that_vanishes(self) -> None:
        """Without a closing handshake, before and after it has registered."""
        async with relay() as server:
            first, second = await server.connect(), await server.connect()
            await second.shake_hands(new_key())
            await first.stream.aclose()
            await second.stream.aclose()
            await _until(lambda: len(server.endings) == 2 and not server.pump.connections)

    async def test_a_browser_that_never_reads(self) -> None:
        """It is closed by the pump's deadline, and what waits for it stays bounded."""
        async with relay() as server:
            sender, silent = await server.connect(), await server.connect()
            silent_key = new_key()
            await sender.shake_hands(new_key())
            await silent.shake_hands(silent_key)
            packet = encode_send_packet(silent_key.public(), bytes(60000))
            with trio.fail_after(20):
                while server.pump.switch.counters.write_timeouts == 0:
                    await sender.send_bytes(packet)
                    await trio.sleep(0.02)
            assert server.pump.switch.outbox.waiting_bytes == 0


async def _until(condition: object) -> None:
    assert callable(condition)
    with trio.fail_after(5):
        while not condition():  # noqa: ASYNC110 - only looked at from outside
            await trio.sleep(0.005)
