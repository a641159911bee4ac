"""Where a packet goes: the rules of DERP frames between clients.

No I/O, no clock. The pump reads bytes into a shared buffer and calls `Switch.handle_frames`; what
must be written is left in the `Outbox`, and who is connected stands in `Presence`.

The hot path (DERP specification 6.4, 6.5): SEND_PACKET and RECV_PACKET have the same size, so a
frame is turned from the one into the other **in place**, and neighbouring frames for one
destination leave as one view into the buffer (a *run*). All accounting is per run.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Final

from relay.backlog import Waiting
from relay.client import Client
from relay.counters import Counters, DropReason, Kind
from relay.outbox import PACKET_HEADER_LENGTH, Outbox
from relay.presence import Presence
from traversal.keys import KEY_LENGTH, NodePublic
from traversal.wire.derp import (
    DISCO_MAGIC,
    HEADER_LENGTH,
    MAX_PACKET_LENGTH,
    MAX_PING_LENGTH,
    MIN_DISCO_LENGTH,
    MIN_PING_LENGTH,
    FrameType,
    GoneReason,
    encode_frame,
    encode_peer_gone,
    looks_like_disco,
)
from traversal.wire.introduction import MAGIC as INTRODUCTION_MAGIC

BUFFER_SLACK: Final = 64
"""Bytes that must be readable after the data in the shared buffer: headers are unpacked before it
is known that they are complete."""
EARLY_FLUSH_BYTES: Final = 16384
"""A destination with this much pending is flushed at once, one TLS record's worth; the rest waits
for the end of the round, so that frames from many sources leave together. Measured with 50
destinations interleaved: 123 to 170 thousand frames/s with a flush per read, 271 to 279 so."""
HOME_MOVE_GRACE_SECONDS: Final = 5.0

_PACKET: Final = struct.Struct(">BI32s")
_MAX_SEND: Final = MAX_PACKET_LENGTH + 32
_MAX_FORWARD: Final = MAX_PACKET_LENGTH + 64
_DISCO_FRAME_LENGTH: Final = MIN_DISCO_LENGTH + 32
_DISCO_FIRST: Final = DISCO_MAGIC[0]

_CLIENT_FRAMES: Final[dict[int, tuple[int, int]]] = {
    FrameType.NOTE_PREFERRED: (1, 1),
    FrameType.FORWARD_PACKET: (64, _MAX_FORWARD),
    FrameType.WATCH_CONNS: (0, 0),
    FrameType.CLOSE_PEER: (32, 32),
    FrameType.PING: (MIN_PING_LENGTH, MAX_PING_LENGTH),
}
"""Frames that a client may send besides SEND_PACKET, with the bounds of their bodies."""
_MESH_FRAMES: Final = frozenset(
    {FrameType.FORWARD_PACKET, FrameType.WATCH_CONNS, FrameType.CLOSE_PEER}
)
_LINK_FRAMES: Final[dict[int, int]] = {
    FrameType.PEER_PRESENT: KEY_LENGTH,
    FrameType.PEER_GONE: KEY_LENGTH,
    FrameType.PING: MIN_PING_LENGTH,
}
"""Frames from a server that we watch which mean anything to us, with their least length; shorter
ones are skipped (DERP specification 6)."""


class ViolationError(Exception):
    """A client broke the protocol so that its connection must end; the text says how."""


class Switch:
    """All clients of one relay process and the rules between them.

    Args:
        server_key: of this relay.
        queue_depth, memory_bytes: see `Outbox`.
        flush: called when much is pending for a client, to write it before the round ends.

    The pump's side of the contract: after any call, write out every client on `outbox.dirty` (and
    clear the list), then end every connection on `outbox.doomed` with `presence.disconnect`.
    """

    def __init__(
        self,
        server_key: NodePublic,
        *,
        queue_depth: int = 32,
        memory_bytes: int = 256 << 20,
        flush: Callable[[Client], None] = lambda client: None,
    ) -> None:
        self.counters = Counters()
        self.outbox = Outbox(self.counters, queue_depth=queue_depth, memory_bytes=memory_bytes)
        self.presence = Presence(server_key, self.counters, self.outbox)
        self._flush = flush

    def handle_frames(
        self,
        client: Client,
        buffer: bytearray,
        view: memoryview,
        start: int,
        end: int,
        now: float,
    ) -> int:
        """Handle all complete frames in `buffer[start:end]`; returns where the rest begins.

        `view` is a memoryview of `buffer`, which must have BUFFER_SLACK readable bytes after `end`.
        Frames are rewritten in place. Raises ViolationError.
        """
        if client.skip_bytes:
            skipped = min(client.skip_bytes, end - start)
            client.skip_bytes -= skipped
            start += skipped
        if client.duplicate and end - start >= HEADER_LENGTH:
            self.presence.note_activity(client)
        position = start
        own_key = client.key
        routes = self.presence.active
        unpack = _PACKET.unpack_from
        pack = _PACKET.pack_into
        last = end - HEADER_LENGTH
        # A server that we dialed relays nothing through us: there type 4 is one more unknown frame.
        send_packet = -1 if client.is_outgoing else 4
        run: Client | None = None  # the destination of the frames in view[run_start:position]
        run_start = position
        packets = disco = 0
        while position <= last:
            frame_type, length, key = unpack(buffer, position)
            if frame_type == send_packet:
                if not 32 <= length <= _MAX_SEND:
                    if packets and run is not None:
                        self._end_run(client, run, view[run_start:position], packets, disco, now)
                    raise ViolationError(f"SEND_PACKET of {length} bytes")
                frame_end = position + HEADER_LENGTH + length
                if frame_end > end:
                    break
                destination = routes.get(key)
                if destination is not run or run is None:
                    if packets and run is not None:
                        self._end_run(client, run, view[run_start:position], packets, disco, now)
                    run_start = position
                    packets = disco = 0
                    run = destination
                    if destination is None or not _may_exchange(client, destination):
                        run = None
                        payload = view[position + PACKET_HEADER_LENGTH : frame_end]
                        self._send_elsewhere(client, key, payload, now)
                        position = frame_end
                        continue
                pack(buffer, position, 5, length, own_key)  # RECV_PACKET
                packets += 1
                if (
                    length >= _DISCO_FRAME_LENGTH
                    and buffer[position + PACKET_HEADER_LENGTH] == _DISCO_FIRST
                    and buffer.startswith(DISCO_MAGIC, position + PACKET_HEADER_LENGTH)
                ):
                    disco += 1
                position = frame_end
                continue
            if packets and run is not None:
                self._end_run(client, run, view[run_start:position], packets, disco, now)
                packets = disco = 0
            run = None
            if client.closed:  # by a write to itself: it must not come back into the tables
                return end
            next_position = self._handle_other(client, frame_type, length, view, position, end, now)
            if next_position < 0:
                break
            position = next_position
        if packets and run is not None:
            self._end_run(client, run, view[run_start:position], packets, disco, now)
        return position

    def _end_run(
        self,
        source: Client,
        destination: Client,
        frames: memoryview,
        packets: int,
        disco: int,
        now: float,
    ) -> None:
        """Hand neighbouring frames of one source to one destination, and count them."""
        size = len(frames)
        payload_bytes = size - packets * PACKET_HEADER_LENGTH
        counters = self.counters
        counters.bytes_received += payload_bytes
        if disco:
            counters.disco_received += disco
        counters.other_received += packets - disco
        source.packets_in += packets
        source.bytes_in += payload_bytes
        self._deliver(source.key, destination, frames, packets, payload_bytes, now)

    def _deliver(
        self,
        source_key: bytes,
        destination: Client,
        frames: memoryview,
        packets: int,
        payload_bytes: int,
        now: float,
    ) -> None:
        if destination.closed:  # by a write earlier in this very round
            self.counters.drop(DropReason.GONE_DISCONNECTED, Kind.OTHER, payload_bytes, packets)
            return
        if destination.heard_from is None or source_key not in destination.heard_from:
            self.presence.note_delivery(source_key, destination)
        if destination.blocked:
            self.outbox.queue_run(source_key, destination, frames, now)
            return
        destination.packets_out += packets
        destination.bytes_out += payload_bytes
        self.counters.packets_sent += packets
        self.counters.bytes_sent += payload_bytes
        if not destination.out:
            self.outbox.dirty.append(destination)
        destination.out.append(frames)
        destination.out_bytes += len(frames)
        if destination.out_bytes > EARLY_FLUSH_BYTES:
            self._flush(destination)

    def _send_elsewhere(self, client: Client, key: bytes, payload: memoryview, now: float) -> None:
        """A packet for a key that has no connection here, or that may not have it."""
        disco = looks_like_disco(payload)
        kind = Kind.DISCO if disco else Kind.OTHER
        counters = self.counters
        counters.disco_received += disco
        counters.other_received += not disco
        counters.bytes_received += len(payload)
        client.packets_in += 1
        client.bytes_in += len(payload)
        if (
            client.permitted is not None and key not in client.permitted
        ) or key in self.presence.active:
            counters.drop(DropReason.NOT_PERMITTED, kind, len(payload))
            client.packets_dropped += 1
            return
        link = self.presence.forwarder_of(key)
        if link is not None:
            self._forward(client.key, key, payload, link, now)
            return
        counters.drop(DropReason.UNKNOWN_DEST, kind, len(payload))
        client.packets_dropped += 1
        # Introductions of Underpass nodes are answered like disco: a person wants to know why a
        # peer can't be reached.
        if disco or bytes(payload[: len(INTRODUCTION_MAGIC)]) == INTRODUCTION_MAGIC:
            self._send_not_here(client, key, now)

    def _forward(
        self, source: bytes, key: bytes, payload: memoryview, link: Client, now: float
    ) -> None:
        frame = encode_frame(FrameType.FORWARD_PACKET, b"".join((source, key, payload)))
        self.counters.packets_forwarded_out += 1
        if link.blocked:
            self.outbox.queue(link, Waiting(frame, source, now))
            return
        self.outbox.send(link, frame)
        if link.out_bytes > EARLY_FLUSH_BYTES:
            self._flush(link)

    def _send_not_here(self, client: Client, key: bytes, now: float) -> None:
        if client.take_not_here(now):
            self.outbox.send(client, encode_peer_gone(key, GoneReason.NOT_HERE))
            self.counters.peer_gone_not_here_frames += 1

    def _handle_other(
        self,
        client: Client,
        frame_type: int,
        length: int,
        view: memoryview,
        position: int,
        end: int,
        now: float,
    ) -> int:
        """A frame that is not SEND_PACKET; the next frame's position, or -1 if incomplete."""
        self._check_frame(client, frame_type, length)
        body_start = position + HEADER_LENGTH
        frame_end = body_start + length
        if client.is_outgoing:
            known = _LINK_FRAMES.get(frame_type, MAX_PING_LENGTH + 1) <= length <= MAX_PING_LENGTH
        else:
            known = frame_type in _CLIENT_FRAMES
        if not known:
            if not client.is_outgoing:
                self.counters.unknown_frames += 1
            client.skip_bytes = max(0, frame_end - end)
            return min(frame_end, end)
        if frame_end > end:
            return -1
        body = view[body_start:frame_end]
        if frame_type == FrameType.PING:
            self._handle_ping(client, bytes(body[:MIN_PING_LENGTH]))
        elif client.is_outgoing:
            self._handle_link_frame(client, frame_type, bytes(body))
        elif frame_type == FrameType.FORWARD_PACKET:
            self._handle_forward(client, view, position, frame_end, now)
        elif frame_type == FrameType.NOTE_PREFERRED:
            self._handle_note_preferred(client, body[0] != 0, now)
        elif frame_type == FrameType.WATCH_CONNS:
            self.presence.watch(client)
        else:
            key = bytes(body)
            self.presence.close_key(
                key, "a mesh peer asked for it", tell_siblings=not client.is_sibling
            )
        return frame_end

    def _check_frame(self, client: Client, frame_type: int, length: int) -> None:
        """Lengths and rights (DERP specification 4 and 7.11). Raises ViolationError."""
        if client.is_outgoing:
            return
        bounds = _CLIENT_FRAMES.get(frame_type)
        if bounds is None:
            return
        if frame_type in _MESH_FRAMES and not client.is_mesh:
            raise ViolationError(f"{FrameType(frame_type).name} without the mesh key")
        if not bounds[0] <= length <= bounds[1]:
            raise ViolationError(f"{FrameType(frame_type).name} of {length} bytes")

    def _handle_ping(self, client: Client, data: bytes) -> None:
        self.counters.got_ping += 1
        if client.pong_waits:
            return  # one pending Pong per connection (DERP specification 6.13)
        client.pong_waits = True
        self.counters.sent_pong += 1
        self.outbox.send(client, encode_frame(FrameType.PONG, data))

    def _handle_note_preferred(self, client: Client, home: bool, now: float) -> None:
        if home == client.home:
            return
        client.home = home
        if now - client.connected_at > HOME_MOVE_GRACE_SECONDS:
            if home:
                self.counters.home_moves_in += 1
            else:
                self.counters.home_moves_out += 1

    def _handle_forward(
        self, client: Client, view: memoryview, position: int, frame_end: int, now: float
    ) -> None:
        """A packet that another relay of the region sent here; never forwarded between hosts."""
        source = bytes(view[position + 5 : position + 37])
        key = bytes(view[position + 37 : position + 69])
        payload = view[position + 69 : frame_end]
        kind = Kind.DISCO if looks_like_disco(payload) else Kind.OTHER
        self.counters.packets_forwarded_in += 1
        destination = self.presence.active.get(key)
        if destination is not None:
            if destination.permitted is not None and source not in destination.permitted:
                self.counters.drop(DropReason.NOT_PERMITTED, kind, len(payload))
                return
            # The RECV_PACKET is 32 bytes shorter: its header goes where the destination stood.
            _PACKET.pack_into(view, position + 32, 5, 32 + len(payload), source)
            frame = view[position + 32 : frame_end]
            self._deliver(source, destination, frame, 1, len(payload), now)
            return
        link = self.presence.forwarder_of(key)
        if link is not None and link.is_sibling and not client.is_sibling:
            self._forward(source, key, payload, link, now)
            return
        self.counters.drop(DropReason.UNKNOWN_DEST_ON_FWD, kind, len(payload))
        if kind is Kind.DISCO:
            self._send_not_here(client, key, now)

    def _handle_link_frame(self, link: Client, frame_type: int, body: bytes) -> None:
        """A frame from a server that we watch."""
        key = body[:32]
        if frame_type == FrameType.PEER_PRESENT:
            self.presence.add_forwarder(key, link)
        elif frame_type == FrameType.PEER_GONE and (
            len(body) == 32 or body[32] == GoneReason.DISCONNECTED
        ):
            self.presence.remove_forwarder(key, link)


def _may_exchange(source: Client, destination: Client) -> bool:
    """Whether both tokens, where there are any, allow packets from the one to the other."""
    return (source.permitted is None or destination.key in source.permitted) and (
        destination.permitted is None or source.key in destination.permitted
    )
