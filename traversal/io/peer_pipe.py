"""Peers' packets through the edge, either end: DERP's frames over a stream of the tunnel, and over
QUIC's DATAGRAMs where a packet fits (see `traversal.wire.tunnel.peers`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, Protocol

import trio

from traversal.io.http2_engine import Http2Error
from traversal.io.quic import QuicConnection
from traversal.io.quic_stream import QuicError
from traversal.wire.derp import HEADER, HEADER_LENGTH, DerpError, FrameSplitter, FrameType

FRAMES_PER_TURN: Final = 64
"""Handled before other tasks get a turn, so that the queues of those who get them don't
overflow."""
TAKE_BYTES: Final = 64 << 10
"""Taken from the queue at a time: what is taken can't be dropped any more."""

_PACKETS: Final = (FrameType.SEND_PACKET, FrameType.RECV_PACKET)


class PeerStream(Protocol):
    """What the streams of both transports can do."""

    async def receive(self) -> bytes:
        """Some bytes, empty at the end. Raises Http2Error, QuicError."""
        ...

    async def send(self, data: bytes) -> None:
        """Send bytes. Raises Http2Error, QuicError."""
        ...


class PeerPipeError(Exception):
    """The pipe ended; the text says why."""


class PeerPipe:
    """One end, from the handshake on.

    Args:
        quic: carries DATAGRAMs; None over HTTP/2.
        handle: is given each frame (type, body); must not wait; may raise DerpError.
        take: returns frames to send, about so many bytes; none when nothing waits. Call `wake`
            when that changes.
    """

    def __init__(
        self,
        stream: PeerStream,
        quic: QuicConnection | None,
        handle: Callable[[int, bytes], None],
        take: Callable[[int], list[bytes]],
    ) -> None:
        self._stream = stream
        self._quic = quic
        self._handle = handle
        self._take = take
        self._wanted = trio.Event()
        self._scope = trio.CancelScope()
        self._failure = ""

    def wake(self) -> None:
        """Something waits to be sent."""
        self._wanted.set()

    def close(self) -> None:
        """End `run`."""
        self._end("it was replaced")

    async def run(self, splitter: FrameSplitter) -> None:
        """Carry frames until the pipe ends; `splitter` may hold some already.

        Raises PeerPipeError.
        """
        with self._scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._guard, self._write)
                if self._quic is not None:
                    nursery.start_soon(self._guard, self._read_datagrams, self._quic)
                await self._guard(self._read, splitter)
        if self._failure:
            raise PeerPipeError(self._failure)

    def _end(self, failure: str) -> None:
        self._failure = self._failure or failure
        self._scope.cancel()

    async def _guard(self, work: Callable[..., object], *arguments: object) -> None:
        try:
            await work(*arguments)  # type: ignore[misc] # any of the three below
        except (Http2Error, QuicError, DerpError) as error:
            self._end(str(error))

    async def _read(self, splitter: FrameSplitter) -> None:
        while True:
            for number, (frame_type, body) in enumerate(splitter.frames(), 1):
                self._handle(frame_type, body)
                if number % FRAMES_PER_TURN == 0:
                    await trio.lowlevel.checkpoint()
            data = await self._stream.receive()
            if not data:
                raise DerpError("the other side ended the channel")
            splitter.receive_data(data)

    async def _read_datagrams(self, quic: QuicConnection) -> None:
        while True:
            for number, datagram in enumerate(await quic.receive_datagrams(), 1):
                if len(datagram) >= HEADER_LENGTH:
                    frame_type, length = HEADER.unpack_from(datagram)
                    if frame_type in _PACKETS and length == len(datagram) - HEADER_LENGTH:
                        self._handle(frame_type, datagram[HEADER_LENGTH:])
                if number % FRAMES_PER_TURN == 0:
                    await trio.lowlevel.checkpoint()

    async def _write(self) -> None:
        quic = self._quic
        while True:
            await self._wanted.wait()
            self._wanted = trio.Event()
            while frames := self._take(TAKE_BYTES):
                if quic is not None:
                    await quic.wait_datagram_room()
                    longest = quic.max_datagram_bytes
                    rest = []
                    for frame in frames:
                        if len(frame) <= longest and frame[0] in _PACKETS:
                            quic.send_datagram(frame)
                        else:
                            rest.append(frame)
                    frames = rest
                if frames:
                    await self._stream.send(b"".join(frames))
