"""Nodes' channels for peers' packets: a node proves its key, then its frames are switched."""

from __future__ import annotations

import logging

import trio

from relay.edge.peers import Member, PeerSwitch
from traversal.io.http2_engine import Http2Error
from traversal.io.peer_pipe import PeerPipe, PeerPipeError, PeerStream
from traversal.io.quic import QuicConnection
from traversal.io.quic_stream import QuicError
from traversal.keys import NONCE_LENGTH, Entropy, NodePrivate, NodePublic
from traversal.wire.derp import (
    DerpError,
    FrameSplitter,
    FrameType,
    ServerInfo,
    encode_server_info,
    encode_server_key,
    parse_client_info,
)
from traversal.wire.tunnel.peers import HANDSHAKE_SECONDS, MAX_FRAME_BYTES, MAX_HANDSHAKE_BYTES

logger = logging.getLogger("underpass.relay.edge.peers")


class PeerChannels:
    """Serves the nodes of one edge.

    Its key is made at each start: what a node proves with it, it proves to this run of this edge,
    and whoever else got hold of it could use it nowhere.
    """

    def __init__(self, entropy: Entropy) -> None:
        self.switch = PeerSwitch()
        self._entropy = entropy
        self._private_key = NodePrivate.generate(entropy)

    async def serve(self, stream: PeerStream, quic: QuicConnection | None, who: str) -> None:
        """Serve one node until its channel ends; `who` is for the log.

        `quic` carries DATAGRAMs, where the transport has any.
        """
        try:
            with trio.move_on_after(HANDSHAKE_SECONDS) as waiting:
                key, rest = await self._shake_hands(stream)
            if waiting.cancelled_caught:
                raise DerpError(f"no handshake within {HANDSHAKE_SECONDS:.0f} s")
            await self._switch(key, rest, stream, quic)
        except (Http2Error, QuicError, DerpError, PeerPipeError) as error:
            logger.info("%s: the channel for peers ended: %s", who, error)

    async def _shake_hands(self, stream: PeerStream) -> tuple[NodePublic, bytes]:
        """The proven key, and what came behind. Raises DerpError, Http2Error, QuicError."""
        await stream.send(encode_server_key(self._private_key.public()))
        splitter = FrameSplitter(MAX_HANDSHAKE_BYTES)
        while True:
            data = await stream.receive()
            if not data:
                raise DerpError("the stream ended before the handshake was done")
            splitter.receive_data(data)
            for frame_type, body in splitter.frames():
                if frame_type != FrameType.CLIENT_INFO:
                    raise DerpError(f"the first frame is of type {frame_type:#04x}")
                key, _, box = parse_client_info(body, self._private_key)
                await stream.send(
                    encode_server_info(ServerInfo(), box, self._entropy(NONCE_LENGTH))
                )
                break
            else:
                continue
            return key, splitter.take_rest()

    async def _switch(
        self, key: NodePublic, rest: bytes, stream: PeerStream, quic: QuicConnection | None
    ) -> None:
        switch = self.switch

        def handle(frame_type: int, body: bytes) -> None:
            switch.handle_frame(member, frame_type, body, trio.current_time())

        def take(max_bytes: int) -> list[bytes]:
            return switch.take(member, max_bytes)

        pipe = PeerPipe(stream, quic, handle, take)
        member = Member(key, pipe.wake, pipe.close, trio.current_time())
        splitter = FrameSplitter(MAX_FRAME_BYTES)
        splitter.receive_data(rest)
        switch.connect(member)
        try:
            await pipe.run(splitter)
        finally:
            switch.disconnect(member)
