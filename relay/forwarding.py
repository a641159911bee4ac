"""Who is connected, where a packet goes, what is queued, what is dropped and why.

No I/O, no clock. The pump reads bytes into a shared buffer and calls `Switch.handle_frames`; what
must be written is left on each `Client` and the clients concerned are put on `Switch.dirty`.

The hot path (DERP specification 6.4, 6.5): SEND_PACKET and RECV_PACKET have the same size, so a
frame is turned from the one into the other **in place**, and neighbouring frames for one
destination leave as one view into the buffer (a *run*). All accounting is per run.

Ownership: views in `Client.out` point into the pump's shared buffer. They are valid until the pump
ends its round; what can't be written by then must be copied, by `defer`.
"""

from __future__ import annotations

import ipaddress
import struct
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Final

from relay.backlog import Backlog, Waiting
from relay.counters import Counters, DropReason, Kind
from traversal.keys import KEY_LENGTH, NodePublic
from traversal.wire.derp import (
    DISCO_MAGIC,
    HEADER,
    HEADER_LENGTH,
    MAX_PACKET_LENGTH,
    MAX_PING_LENGTH,
    MIN_DISCO_LENGTH,
    MIN_PING_LENGTH,
    WATCH_CONNS,
    FrameType,
    GoneReason,
    PresentFlags,
    encode_frame,
    encode_health,
    encode_peer_gone,
    encode_peer_present,
    looks_like_disco,
)

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

PACKET_HEADER_LENGTH: Final = HEADER_LENGTH + 32
"""A SEND_PACKET or RECV_PACKET up to its payload."""
FORWARD_HEADER_LENGTH: Final = HEADER_LENGTH + 64
"""A FORWARD_PACKET up to its payload."""
BUFFER_SLACK: Final = 64
"""Bytes that must be readable after the data in the shared buffer: headers are unpacked before it
is known that they are complete."""
EARLY_FLUSH_BYTES: Final = 16384
"""A destination with this much pending is flushed at once, one TLS record's worth; the rest waits
for the end of the round, so that frames from many sources leave together. Measured with 50
destinations interleaved: 123 to 170 thousand frames/s with a flush per read, 271 to 279 so."""
NOT_HERE_BURST: Final = 3
NOT_HERE_PER_SECOND: Final = 1.0
"""PEER_GONE "not here" notices per connection (DERP specification 7.3)."""
HOME_MOVE_GRACE_SECONDS: Final = 5.0
MAX_CONTROL_FRAMES: Final = 8192
"""Frames that are never dropped and wait for one client, some 400 KB. It may have heard from a few
thousand peers that leave at once; a client that reads a byte now and then, and so never times out,
must not collect notices for ever. Mesh peers have to know of every change, and are trusted."""

DUPLICATE_WARNING: Final = (
    "another connection uses the same node key; "
    "if that is another machine, give it a key of its own"
)

_PACKET: Final = struct.Struct(">BI32s")
_MAX_SEND: Final = MAX_PACKET_LENGTH + 32
_MAX_FORWARD: Final = MAX_PACKET_LENGTH + 64
_DISCO_FRAME_LENGTH: Final = MIN_DISCO_LENGTH + 32
_DISCO_FIRST: Final = DISCO_MAGIC[0]


class ViolationError(Exception):
    """A client broke the protocol so that its connection must end; the text says how."""


class Client:
    """One connection, as forwarding sees it. The pump's connection extends this class.

    Attributes that the pump reads:
        out: frames and runs to write, in order; see "Ownership" above.
        blocked: set by the pump while the connection takes no bytes; then packets go to `backlog`
            and other frames to `control`.
    """

    __slots__ = (
        "address",
        "backlog",
        "blocked",
        "bytes_in",
        "bytes_out",
        "closed",
        "connected_at",
        "control",
        "duplicate",
        "heard_from",
        "home",
        "is_mesh",
        "is_outgoing",
        "is_prober",
        "is_sibling",
        "key",
        "not_here_at",
        "not_here_tokens",
        "not_ideal",
        "out",
        "out_bytes",
        "packets_dropped",
        "packets_in",
        "packets_out",
        "permitted",
        "pong_waits",
        "port",
        "skip_bytes",
        "takes_notices",
    )

    def __init__(
        self,
        key: NodePublic,
        *,
        connected_at: float = 0.0,
        address: Address | None = None,
        port: int = 0,
        is_mesh: bool = False,
        is_sibling: bool = False,
        is_outgoing: bool = False,
        is_prober: bool = False,
        not_ideal: bool = False,
        takes_notices: bool = False,
        permitted: frozenset[bytes] | None = None,
    ) -> None:
        """
        Args:
            connected_at: monotonic seconds.
            is_mesh: presented the mesh key, so may watch, forward and close.
            is_sibling: a worker of this same host.
            is_outgoing: we dialed; the other side is the server, and we watch it.
            not_ideal: came with an Ideal-Node header.
            takes_notices: is known to understand HEALTH and RESTARTING.
            permitted: raw keys that it may exchange packets with; None for all.
        """
        self.key = key.raw
        self.connected_at = connected_at
        self.address = address
        self.port = port
        self.is_mesh = is_mesh
        self.is_sibling = is_sibling
        self.is_outgoing = is_outgoing
        self.is_prober = is_prober
        self.not_ideal = not_ideal
        self.takes_notices = takes_notices
        self.permitted = permitted
        self.home = False
        self.duplicate = False
        self.closed = False
        self.out: list[memoryview | bytes] = []
        self.out_bytes = 0
        self.blocked = False
        self.backlog: Backlog | None = None
        self.control: deque[bytes] | None = None
        self.pong_waits = False
        self.skip_bytes = 0
        self.heard_from: set[bytes] | None = None
        self.not_here_tokens = float(NOT_HERE_BURST)
        self.not_here_at = 0.0
        self.packets_in = 0
        self.bytes_in = 0
        self.packets_out = 0
        self.bytes_out = 0
        self.packets_dropped = 0

    def present_flags(self) -> PresentFlags:
        """What PEER_PRESENT says of this client (DERP specification 6.9)."""
        flags = PresentFlags(0)
        if self.is_mesh:
            flags |= PresentFlags.MESH_PEER
        if self.is_prober:
            flags |= PresentFlags.PROBER
        if self.not_ideal:
            flags |= PresentFlags.NOT_IDEAL
        return flags or PresentFlags.REGULAR

    def short(self) -> str:
        """For logs: the key's short form and the address."""
        where = f" {self.address} port {self.port}" if self.address else ""
        return NodePublic(self.key).short() + where


class Switch:
    """All clients of one relay process and the rules between them.

    Args:
        server_key: of this relay.
        queue_depth: packets that may wait for a slow client, in each of its two queues.
        memory_bytes: bound on all waiting packets together.
        flush: called when much is pending for a client, to write it before the round ends.

    The pump's side of the contract: after any call, write out every client on `dirty` (and clear
    the list), then end every connection on `doomed` with `disconnect`.
    """

    def __init__(
        self,
        server_key: NodePublic,
        *,
        queue_depth: int = 32,
        memory_bytes: int = 256 << 20,
        flush: Callable[[Client], None] = lambda client: None,
    ) -> None:
        self._server_key = server_key.raw
        self._flush = flush
        self.counters = Counters()
        self.dirty: list[Client] = []
        self.doomed: list[tuple[Client, str]] = []
        self.queue_depth = queue_depth
        self.memory_bytes = memory_bytes
        self.waiting_bytes = 0
        self._active: dict[bytes, Client] = {}
        # Keys with more than one connection: all of them, the most recent speaker last.
        self._duplicates: dict[bytes, list[Client]] = {}
        # Keys connected elsewhere: the links that lead there. The first one is used.
        self._forwarders: dict[bytes, list[Client]] = {}
        self._siblings: set[Client] = set()
        self._watchers: set[Client] = set()
        # Source key -> connections that got a packet of it, to be told when it goes.
        self._delivered: dict[bytes, set[Client]] = {}

    # --- Looking ---------------------------------------------------------------------------------

    def connections_of(self, key: bytes) -> list[Client]:
        """Every local connection of a key."""
        if key in self._duplicates:
            return list(self._duplicates[key])
        active = self._active.get(key)
        return [] if active is None else [active]

    def clients(self) -> Iterator[Client]:
        """Every registered connection but those between workers of this host."""
        for key, active in self._active.items():
            yield from self._duplicates.get(key, (active,))

    def forwarder_of(self, key: bytes) -> Client | None:
        """The link over which packets for a key that is not here leave, if there is one."""
        links = self._forwarders.get(key)
        return links[0] if links else None

    @property
    def local_keys(self) -> int:
        """Distinct keys connected here."""
        return len(self._active)

    @property
    def remote_keys(self) -> int:
        """Distinct keys connected only elsewhere in the region."""
        return sum(1 for key in self._forwarders if key not in self._active)

    @property
    def duplicate_keys(self) -> int:
        """Keys with two connections or more."""
        return len(self._duplicates)

    @property
    def duplicate_connections(self) -> int:
        """Connections of such keys."""
        return sum(map(len, self._duplicates.values()))

    @property
    def watchers(self) -> int:
        """Connections that asked to be told who comes and goes."""
        return len(self._watchers)

    # --- Coming and going ------------------------------------------------------------------------

    def connect(self, client: Client) -> None:
        """Register a connection; from here on packets for its key go to it.

        An outgoing link asks the other side, with its first frame, who is connected there.
        """
        if client.is_outgoing:
            self._send(client, WATCH_CONNS)
        if client.is_sibling:
            self._siblings.add(client)
        if client.is_outgoing or client.is_sibling:
            return
        self.counters.accepts += 1
        key = client.key
        previous = self._active.get(key)
        if previous is not None:
            self.counters.duplicate_connections += 1
            connections = self._duplicates.setdefault(key, [previous])
            connections.append(client)
            previous.duplicate = client.duplicate = True
            self._send_health(connections, DUPLICATE_WARNING)
        self._active[key] = client
        self._tell_watchers(
            encode_peer_present(key, client.address, client.port, client.present_flags())
        )

    def disconnect(self, client: Client) -> None:
        """Forget a connection; harmless when repeated."""
        if client.closed:
            return
        client.closed = True
        self.drop_unwritten(client, client.out, DropReason.GONE_DISCONNECTED)
        client.out.clear()
        client.out_bytes = 0
        client.control = None
        self._drop_backlog(client)
        self._watchers.discard(client)
        self._siblings.discard(client)
        for source in client.heard_from or ():
            receivers = self._delivered[source]
            receivers.discard(client)
            if not receivers:
                del self._delivered[source]
        client.heard_from = None
        if client.is_outgoing:
            self._drop_forwarders(client)
        elif not client.is_sibling:
            self._unregister(client)

    def _unregister(self, client: Client) -> None:
        key = client.key
        connections = self._duplicates.get(key)
        if connections is not None:
            connections.remove(client)
            self._active[key] = connections[-1]
            if len(connections) == 1:
                connections[0].duplicate = False
                self._send_health(connections, "")
                del self._duplicates[key]
            return
        del self._active[key]
        here = self._reachable_by_sibling(key)
        self._tell_watchers(encode_peer_gone(key, GoneReason.DISCONNECTED), only_siblings=here)
        self._maybe_left_region(key)

    def _send_health(self, clients: Iterable[Client], problem: str) -> None:
        for client in clients:
            if client.takes_notices:
                self._send(client, encode_health(problem))

    def _note_activity(self, client: Client) -> None:
        """The last of several connections of a key to speak is the one that receives."""
        connections = self._duplicates[client.key]
        if connections[-1] is not client:
            connections.remove(client)
            connections.append(client)
            self._active[client.key] = client

    def _maybe_left_region(self, key: bytes) -> None:
        """If the key is nowhere any more, tell all who got packets of it (specification 7.7).

        Unlike derper we tell them each time: a new delivery arms the notice again.
        """
        if key in self._active or key in self._forwarders:
            return
        frame = encode_peer_gone(key, GoneReason.DISCONNECTED)
        for receiver in self._delivered.pop(key, ()):
            if receiver.heard_from is not None:
                receiver.heard_from.discard(key)
            self._send(receiver, frame)
            self.counters.peer_gone_disconnected_frames += 1

    # --- Mesh ------------------------------------------------------------------------------------

    def _reachable_by_sibling(self, key: bytes) -> bool:
        return any(link.is_sibling for link in self._forwarders.get(key, ()))

    def _add_forwarder(self, key: bytes, link: Client) -> None:
        links = self._forwarders.setdefault(key, [])
        if link in links:
            return
        if len(links) == 1:
            self.counters.multiforwarder_created += 1
        news = link.is_sibling and key not in self._active and not self._reachable_by_sibling(key)
        # A worker of this host is nearer than another host; among equals the oldest is used.
        if link.is_sibling:
            links.insert(sum(other.is_sibling for other in links), link)
        else:
            links.append(link)
        if news:
            frame = encode_peer_present(key, None, 0, PresentFlags.REGULAR)
            self._tell_watchers(frame, only_outsiders=True)

    def _remove_forwarder(self, key: bytes, link: Client) -> None:
        links = self._forwarders.get(key, [])
        if link not in links:
            self.counters.forwarder_delete_other_value += 1
            return
        links.remove(link)
        if len(links) == 1:
            self.counters.multiforwarder_deleted += 1
        if not links:
            del self._forwarders[key]
        if link.is_sibling and key not in self._active and not self._reachable_by_sibling(key):
            frame = encode_peer_gone(key, GoneReason.DISCONNECTED)
            self._tell_watchers(frame, only_outsiders=True)
        self._maybe_left_region(key)

    def _drop_forwarders(self, link: Client) -> None:
        for key in [key for key, links in self._forwarders.items() if link in links]:
            self._remove_forwarder(key, link)

    def _tell_watchers(
        self, frame: bytes, *, only_siblings: bool = False, only_outsiders: bool = False
    ) -> None:
        for watcher in self._watchers:
            if (only_siblings and not watcher.is_sibling) or (
                only_outsiders and watcher.is_sibling
            ):
                continue
            self._send(watcher, frame)

    def _watch(self, client: Client) -> None:
        if client.key == self._server_key and not client.is_sibling:
            return  # this server has reached itself (DERP specification 10)
        self._watchers.add(client)
        for key, active in self._active.items():
            frame = encode_peer_present(key, active.address, active.port, active.present_flags())
            self._send(client, frame)
        if client.is_sibling:
            return
        for key in self._forwarders:
            if key not in self._active and self._reachable_by_sibling(key):
                self._send(client, encode_peer_present(key, None, 0, PresentFlags.REGULAR))

    def close_key(self, key: bytes, reason: str, *, tell_siblings: bool = True) -> int:
        """End every connection of a key, on all workers of this host; returns how many here."""
        connections = self.connections_of(key)
        self.doomed.extend((connection, reason) for connection in connections)
        if tell_siblings:
            for sibling in self._siblings:
                if sibling.is_outgoing:
                    self._send(sibling, encode_frame(FrameType.CLOSE_PEER, key))
        return len(connections)

    # --- Frames ----------------------------------------------------------------------------------

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
            self._note_activity(client)
        position = start
        own_key = client.key
        routes = self._active
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
        heard_from = destination.heard_from
        if heard_from is None:
            heard_from = destination.heard_from = set()
        if source_key not in heard_from:
            heard_from.add(source_key)
            self._delivered.setdefault(source_key, set()).add(destination)
        if destination.blocked:
            self._queue_run(source_key, destination, frames, now)
            return
        destination.packets_out += packets
        destination.bytes_out += payload_bytes
        self.counters.packets_sent += packets
        self.counters.bytes_sent += payload_bytes
        if not destination.out:
            self.dirty.append(destination)
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
        if (client.permitted is not None and key not in client.permitted) or key in self._active:
            counters.drop(DropReason.NOT_PERMITTED, kind, len(payload))
            client.packets_dropped += 1
            return
        link = self.forwarder_of(key)
        if link is not None:
            self._forward(client.key, key, payload, link, now)
            return
        counters.drop(DropReason.UNKNOWN_DEST, kind, len(payload))
        client.packets_dropped += 1
        if disco:
            self._send_not_here(client, key, now)

    def _forward(
        self, source: bytes, key: bytes, payload: memoryview, link: Client, now: float
    ) -> None:
        frame = encode_frame(FrameType.FORWARD_PACKET, b"".join((source, key, payload)))
        self.counters.packets_forwarded_out += 1
        if link.blocked:
            self._queue(link, Waiting(frame, source, now))
            return
        self._send(link, frame)
        if link.out_bytes > EARLY_FLUSH_BYTES:
            self._flush(link)

    def _send_not_here(self, client: Client, key: bytes, now: float) -> None:
        tokens = client.not_here_tokens + (now - client.not_here_at) * NOT_HERE_PER_SECOND
        client.not_here_at = now
        client.not_here_tokens = min(tokens, NOT_HERE_BURST)
        if client.not_here_tokens >= 1:
            client.not_here_tokens -= 1
            self._send(client, encode_peer_gone(key, GoneReason.NOT_HERE))
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
            self._watch(client)
        else:
            key = bytes(body)
            self.close_key(key, "a mesh peer asked for it", tell_siblings=not client.is_sibling)
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
        self._send(client, encode_frame(FrameType.PONG, data))

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
        destination = self._active.get(key)
        if destination is not None:
            if destination.permitted is not None and source not in destination.permitted:
                self.counters.drop(DropReason.NOT_PERMITTED, kind, len(payload))
                return
            # The RECV_PACKET is 32 bytes shorter: its header goes where the destination stood.
            _PACKET.pack_into(view, position + 32, 5, 32 + len(payload), source)
            frame = view[position + 32 : frame_end]
            self._deliver(source, destination, frame, 1, len(payload), now)
            return
        link = self.forwarder_of(key)
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
            self._add_forwarder(key, link)
        elif frame_type == FrameType.PEER_GONE and (
            len(body) == 32 or body[32] == GoneReason.DISCONNECTED
        ):
            self._remove_forwarder(key, link)

    # --- Output ----------------------------------------------------------------------------------

    def _send(self, client: Client, frame: bytes) -> None:
        """A frame that is never dropped."""
        if client.closed:
            return
        if client.blocked:
            if client.control is None:
                client.control = deque()
            client.control.append(frame)
            if len(client.control) == MAX_CONTROL_FRAMES and not client.is_mesh:
                self.doomed.append((client, "it does not read what it is told"))
            return
        if not client.out:
            self.dirty.append(client)
        client.out.append(frame)
        client.out_bytes += len(frame)

    def send_to_all(self, frame: bytes, clients: Iterable[Client]) -> None:
        """The same frame to several clients."""
        for client in clients:
            self._send(client, frame)

    def defer(self, client: Client, chunks: Iterable[memoryview | bytes], now: float) -> None:
        """Copy what could not be written: packets to the backlog, other frames to `control`.

        The pump calls this for a client that has become blocked.
        """
        for chunk in chunks:
            if chunk[0] == FrameType.RECV_PACKET:
                self._uncount_sent(client, chunk)
                self._queue_run(bytes(chunk[5:37]), client, memoryview(chunk), now)
            elif chunk[0] == FrameType.FORWARD_PACKET:
                self._queue(client, Waiting(bytes(chunk), bytes(chunk[5:37]), now))
            else:
                self._send(client, bytes(chunk))

    def drop_unwritten(
        self, client: Client, chunks: Iterable[memoryview | bytes], reason: DropReason
    ) -> None:
        """Count as dropped what was on its way out when the connection ended."""
        for chunk in chunks:
            if chunk[0] == FrameType.RECV_PACKET:
                self._uncount_sent(client, chunk)
            elif chunk[0] != FrameType.FORWARD_PACKET:
                continue
            for frame in _split(memoryview(chunk)):
                self._count_drop(client, _kind_of(frame), frame, reason)

    def _count_drop(
        self, client: Client, kind: Kind, frame: memoryview | bytes, reason: DropReason
    ) -> None:
        forwarded = frame[0] == FrameType.FORWARD_PACKET
        header_length = FORWARD_HEADER_LENGTH if forwarded else PACKET_HEADER_LENGTH
        self.counters.drop(reason, kind, len(frame) - header_length)
        client.packets_dropped += 1

    def _uncount_sent(self, client: Client, run: memoryview | bytes) -> None:
        packets = sum(1 for _ in _split(memoryview(run)))
        payload_bytes = len(run) - packets * PACKET_HEADER_LENGTH
        client.packets_out -= packets
        client.bytes_out -= payload_bytes
        self.counters.packets_sent -= packets
        self.counters.bytes_sent -= payload_bytes

    def _queue_run(
        self, source: bytes, destination: Client, frames: memoryview, now: float
    ) -> None:
        for frame in _split(frames):
            self._queue(destination, Waiting(bytes(frame), source, now))

    def _queue(self, client: Client, waiting: Waiting) -> None:
        size = len(waiting.frame)
        kind = _kind_of(waiting.frame)
        if self.waiting_bytes + size > self.memory_bytes:
            self._count_drop(client, kind, waiting.frame, DropReason.QUEUE_TAIL)
            return
        if client.backlog is None:
            client.backlog = Backlog(self.queue_depth)
        victim = client.backlog.push(kind, waiting)
        self.waiting_bytes += size
        if victim is not None:
            self.waiting_bytes -= len(victim.frame)
            self._count_drop(client, kind, victim.frame, DropReason.QUEUE_HEAD)

    def take_waiting(self, client: Client, max_bytes: int, now: float) -> list[bytes]:
        """Frames that have waited for a client which takes bytes again, control frames first."""
        frames: list[bytes] = []
        if client.control:
            frames.extend(client.control)
            client.control = None
        if client.backlog:
            for frame, _, since in client.backlog.pop(max_bytes):
                frames.append(frame)
                self.waiting_bytes -= len(frame)
                self.counters.queue_delay.observe(now - since)
                if frame[0] == FrameType.RECV_PACKET:
                    payload_bytes = len(frame) - PACKET_HEADER_LENGTH
                    client.packets_out += 1
                    client.bytes_out += payload_bytes
                    self.counters.packets_waited += 1
                    self.counters.packets_sent += 1
                    self.counters.bytes_sent += payload_bytes
        if not client.backlog:
            client.backlog = None
        return frames

    def _drop_backlog(self, client: Client) -> None:
        if client.backlog is None:
            return
        for kind, waiting in client.backlog.clear():
            self.waiting_bytes -= len(waiting.frame)
            self._count_drop(client, kind, waiting.frame, DropReason.GONE_DISCONNECTED)
        client.backlog = None


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


def _kind_of(frame: memoryview | bytes) -> Kind:
    """The kind of a RECV_PACKET or FORWARD_PACKET."""
    forwarded = frame[0] == FrameType.FORWARD_PACKET
    payload = frame[FORWARD_HEADER_LENGTH if forwarded else PACKET_HEADER_LENGTH :]
    return Kind.DISCO if looks_like_disco(payload) else Kind.OTHER


def _may_exchange(source: Client, destination: Client) -> bool:
    """Whether both tokens, where there are any, allow packets from the one to the other."""
    return (source.permitted is None or destination.key in source.permitted) and (
        destination.permitted is None or source.key in destination.permitted
    )


def _split(frames: memoryview) -> Iterator[memoryview]:
    """The single frames of a run."""
    position = 0
    while position < len(frames):
        length = HEADER.unpack_from(frames, position)[1]
        frame_end = position + HEADER_LENGTH + length
        yield frames[position:frame_end]
        position = frame_end
