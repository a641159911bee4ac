"""The rules of forwarding (DERP specification 6, 7 and 10), and a slow, plain model of them."""

from __future__ import annotations

import ipaddress
import struct
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relay.client import Client
from relay.counters import DropReason, Kind
from relay.forwarding import BUFFER_SLACK, Switch, ViolationError
from relay.outbox import MAX_CONTROL_FRAMES
from traversal.keys import NodePublic
from traversal.wire import derp
from traversal.wire.derp import (
    FrameSplitter,
    FrameType,
    GoneReason,
    PeerGone,
    PeerPresent,
    PresentFlags,
    RecvPacket,
    maybe_parse_server_frame,
)
from traversal.wire.introduction import MAGIC as INTRODUCTION_MAGIC


def key(number: int) -> NodePublic:
    return NodePublic(bytes([number]) * 32)


SERVER = key(0x53)
A, B, C, NOBODY = key(0xA1), key(0xB2), key(0xC3), key(0xEE)
DISCO = derp.DISCO_MAGIC + bytes(56)
SHORT_DISCO = DISCO[:61]


class Bench:
    """A pump without sockets: one shared buffer, one read per round, strict about ownership.

    After each round the buffer is overwritten, so that a view which outlives it shows.
    """

    def __init__(self, **options: int) -> None:
        self.closed: dict[Client, str] = {}
        self.written: dict[Client, bytearray] = {}
        self.partial: dict[Client, bytes] = {}
        self.early_flushes = 0
        self.now = 100.0
        self.failing: set[Client] = set()
        self.switch = Switch(SERVER, flush=self._flush_early, **options)

    def connect(self, public: NodePublic, **options: object) -> Client:
        client = Client(public, connected_at=self.now, **options)  # type: ignore[arg-type]
        self.written[client] = bytearray()
        self.partial[client] = b""
        self.switch.presence.connect(client)
        self.flush()
        return client

    def read(self, client: Client, data: bytes) -> None:
        """One read of one client, and the end of its round."""
        chunk = self.partial[client] + data
        before = b"\xdd" * 7
        buffer = bytearray(before + chunk + b"\xee" * BUFFER_SLACK)
        view = memoryview(buffer)
        end = len(before) + len(chunk)
        try:
            position = self.switch.handle_frames(client, buffer, view, len(before), end, self.now)
            self.partial[client] = bytes(buffer[position:end])
        except ViolationError as error:
            self.close(client, str(error))
        assert buffer[: len(before)] == before
        assert buffer[end:] == b"\xee" * BUFFER_SLACK
        self.flush()
        buffer[:] = b"\xcc" * len(buffer)

    def flush(self) -> None:
        for client in self.switch.outbox.dirty:
            self._write(client)
        self.switch.outbox.dirty.clear()
        while self.switch.outbox.doomed:
            client, reason = self.switch.outbox.doomed.pop(0)
            self.close(client, reason)
            for other in self.switch.outbox.dirty:
                self._write(other)
            self.switch.outbox.dirty.clear()

    def _flush_early(self, client: Client) -> None:
        self.early_flushes += 1
        self._write(client)

    def _write(self, client: Client) -> None:
        chunks, client.out = client.out, []
        client.out_bytes = 0
        if client in self.failing and chunks:
            self.switch.outbox.drop_unwritten(client, chunks, DropReason.WRITE_ERROR)
            self.close(client, "write error")
        elif client.blocked:
            self.switch.outbox.defer(client, chunks, self.now)
        else:
            client.pong_waits = False
            for chunk in chunks:
                self.written[client] += chunk

    def unblock(self, client: Client, max_bytes: int = 1 << 30) -> None:
        while frames := self.switch.outbox.take_waiting(client, max_bytes, self.now):
            for frame in frames:
                self.written[client] += frame
        client.pong_waits = False
        client.blocked = False

    def close(self, client: Client, reason: str = "test") -> None:
        self.closed.setdefault(client, reason)
        self.switch.presence.disconnect(client)

    def disconnect(self, client: Client) -> None:
        self.close(client)
        self.flush()

    def taken(self, client: Client) -> list[tuple[int, bytes]]:
        """The frames that a client got since the last call."""
        splitter = FrameSplitter(1 << 25)
        splitter.receive_data(bytes(self.written[client]))
        self.written[client].clear()
        return list(splitter.frames())

    def seen(self, client: Client) -> list[object]:
        """The same, parsed."""
        return [maybe_parse_server_frame(*frame) for frame in self.taken(client)]

    def tables_are_empty(self) -> bool:
        presence, outbox = self.switch.presence, self.switch.outbox
        return not any(
            (
                presence.active, presence._duplicates, presence._forwarders, presence._siblings,
                presence._watchers, presence._delivered, outbox.dirty, outbox.doomed,
                outbox.waiting_bytes,
            )
        )  # fmt: skip


def packet(to: NodePublic, payload: bytes = b"x") -> bytes:
    return derp.encode_send_packet(to, payload)


def dropped(bench: Bench) -> dict[tuple[DropReason, Kind], int]:
    return {which: count for which, count in bench.switch.counters.packets_dropped.items() if count}


# --- Routing -------------------------------------------------------------------------------------


def test_packets_arrive_with_their_source() -> None:
    """Neighbours in one read keep their own destination, payload and order."""
    bench = Bench()
    a, b, c = bench.connect(A), bench.connect(B), bench.connect(C)
    bench.read(
        a,
        packet(B, b"1")
        + packet(B, b"")
        + packet(C, b"3")
        + packet(A, b"4")
        + packet(B, b"5" * 300),
    )
    assert bench.seen(b) == [RecvPacket(A, b"1"), RecvPacket(A, b""), RecvPacket(A, b"5" * 300)]
    assert bench.seen(c) == [RecvPacket(A, b"3")]
    assert bench.seen(a) == [RecvPacket(A, b"4")]
    assert bench.switch.counters.packets_sent == 5
    assert bench.switch.counters.bytes_sent == 303


@pytest.mark.parametrize("payload", [b"", b"x", DISCO, bytes(65536)])
def test_a_frame_cut_at_any_byte_is_the_same_frame(payload: bytes) -> None:
    """What is incomplete stays untouched until the rest is there."""
    frame = packet(B, payload)
    cuts = range(1, len(frame)) if len(frame) < 200 else [1, 4, 5, 36, 37, 38, len(frame) - 1]
    for cut in cuts:
        bench = Bench()
        a, b = bench.connect(A), bench.connect(B)
        bench.read(a, frame + frame[:cut])
        assert bench.seen(b) == [RecvPacket(A, payload)]
        assert bench.partial[a] == frame[:cut]
        bench.read(a, frame[cut:])
        assert bench.seen(b) == [RecvPacket(A, payload)]


def test_large_packets_leave_early_and_intact() -> None:
    """A run above one TLS record is written before the round ends; nothing is written twice."""
    bench = Bench()
    a, b = bench.connect(A), bench.connect(B)
    payloads = [bytes([number]) * 9000 for number in range(6)]
    bench.read(a, b"".join(packet(B, payload) + packet(NOBODY) for payload in payloads))
    assert bench.early_flushes >= 2
    assert bench.seen(b) == [RecvPacket(A, payload) for payload in payloads]


@pytest.mark.parametrize(
    ("payload", "kind", "notices"),
    [
        (DISCO, Kind.DISCO, 1),
        (SHORT_DISCO, Kind.OTHER, 0),
        (b"x" * 100, Kind.OTHER, 0),
        (INTRODUCTION_MAGIC + b"x" * 100, Kind.OTHER, 1),
    ],
)
def test_unknown_destination(payload: bytes, kind: Kind, notices: int) -> None:
    """Dropped, counted, and told of only where it looks like disco (7.3) or an introduction."""
    bench = Bench()
    a = bench.connect(A)
    bench.read(a, packet(NOBODY, payload))
    assert dropped(bench) == {(DropReason.UNKNOWN_DEST, kind): 1}
    assert bench.switch.counters.bytes_dropped[DropReason.UNKNOWN_DEST, kind] == len(payload)
    assert bench.seen(a) == [PeerGone(NOBODY, GoneReason.NOT_HERE)] * notices


def test_not_here_notices_are_limited_per_connection() -> None:
    """Three at once, then one per second, and no more than three saved up."""
    bench = Bench()
    a, b = bench.connect(A), bench.connect(B)
    counts = []
    for pause in (0.0, 0.5, 0.5, 1.0, 100.0):
        bench.now += pause
        bench.read(a, packet(NOBODY, DISCO) * 10)
        counts.append(len(bench.taken(a)))
    assert counts == [3, 0, 1, 1, 3]
    bench.read(b, packet(NOBODY, DISCO))
    assert len(bench.taken(b)) == 1
    assert bench.switch.counters.peer_gone_not_here_frames == 9


# --- Duplicates (7.2) ----------------------------------------------------------------------------


def test_duplicates_newest_then_last_speaker_then_the_one_left() -> None:
    """The vectors of 18.6 about two connections of one key."""
    bench = Bench()
    a, first, second = bench.connect(A), bench.connect(B), bench.connect(B)
    bench.read(a, packet(B, b"1"))
    assert (len(bench.taken(first)), len(bench.taken(second))) == (0, 1)
    bench.read(first, derp.KEEP_ALIVE)  # any frame counts
    bench.read(a, packet(B, b"2"))
    assert (len(bench.taken(first)), len(bench.taken(second))) == (1, 0)
    bench.disconnect(second)
    bench.read(a, packet(B, b"3"))
    assert len(bench.taken(first)) == 1
    assert bench.switch.presence.duplicate_keys == 0
    bench.disconnect(first)
    assert bench.seen(a) == []


def test_of_three_duplicates_the_most_recent_speaker_takes_over() -> None:
    """When the active one leaves, who spoke last before it receives."""
    bench = Bench()
    a, *duplicates = bench.connect(A), *(bench.connect(B) for _ in range(3))
    for number in (2, 0, 1):
        bench.read(duplicates[number], derp.KEEP_ALIVE)
    assert bench.switch.presence.duplicate_connections == 3
    for receiver in (1, 0, 2):
        bench.read(a, packet(B))
        assert [len(bench.taken(each)) for each in duplicates] == [
            int(number == receiver) for number in range(3)
        ]
        bench.disconnect(duplicates[receiver])
    bench.read(a, packet(B))
    assert dropped(bench) == {(DropReason.UNKNOWN_DEST, Kind.OTHER): 1}


def test_each_duplicate_is_warned_once() -> None:
    """Not again whenever one more comes: else whoever opens many connections with one key has each
    further one answered as often as there are."""
    bench = Bench()
    clients = [bench.connect(A, takes_notices=True) for _ in range(20)]
    for client in clients:
        assert [kind for kind, _ in bench.taken(client)] == [FrameType.HEALTH]


def test_an_inactive_duplicate_still_sends_and_becomes_active() -> None:
    """Packets from it are relayed, also to its own key: to itself, since it spoke last."""
    bench = Bench()
    a, first, second = bench.connect(A), bench.connect(B), bench.connect(B)
    bench.read(first, packet(A, b"1") + packet(B, b"2"))
    assert bench.seen(a) == [RecvPacket(B, b"1")]
    assert bench.seen(first) == [RecvPacket(B, b"2")]
    assert bench.seen(second) == []


def test_part_of_a_header_is_no_activity() -> None:
    """A complete frame header makes a connection active, four bytes do not."""
    bench = Bench()
    a, first, second = bench.connect(A), bench.connect(B), bench.connect(B)
    bench.read(first, packet(A)[:4])
    bench.read(a, packet(B))
    assert (len(bench.taken(first)), len(bench.taken(second))) == (0, 1)
    bench.read(first, packet(A)[4:5])
    bench.read(a, packet(B))
    assert (len(bench.taken(first)), len(bench.taken(second))) == (1, 0)


def test_clients_that_take_notices_learn_of_duplicates() -> None:
    """HEALTH while there are two of a key, cleared when there is one again; others get nothing."""
    bench = Bench()
    first = bench.connect(A, takes_notices=True)
    second = bench.connect(A)
    (warning,) = bench.taken(first)
    assert warning[0] == FrameType.HEALTH
    assert b"same node key" in warning[1]
    assert bench.taken(second) == []
    bench.disconnect(second)
    assert bench.taken(first) == [(FrameType.HEALTH, b"")]


# --- PeerGone (7.7) ------------------------------------------------------------------------------


def test_peer_gone_goes_to_those_who_got_packets_and_is_armed_again() -> None:
    """Once per departure, and again after each new delivery."""
    bench = Bench()
    a, b, c = bench.connect(A), bench.connect(B), bench.connect(C)
    for _ in range(2):
        bench.read(a, packet(B))
        bench.taken(b)
        bench.disconnect(a)
        assert bench.seen(b) == [PeerGone(A, GoneReason.DISCONNECTED)]
        assert bench.seen(c) == []
        a = bench.connect(A)
    bench.disconnect(a)
    assert bench.seen(b) == []
    assert bench.switch.counters.peer_gone_disconnected_frames == 2


def test_no_peer_gone_while_a_duplicate_or_a_forwarder_is_left() -> None:
    """The key has to leave the region."""
    bench = Bench()
    link = bench.connect(SERVER, is_outgoing=True, is_mesh=True)
    a, duplicate, b = bench.connect(A), bench.connect(A), bench.connect(B)
    bench.read(a, packet(B))
    bench.taken(b)
    bench.disconnect(a)
    assert bench.seen(b) == []
    bench.read(link, present(A))
    bench.disconnect(duplicate)
    assert bench.seen(b) == []
    bench.read(link, gone(A))
    assert bench.seen(b) == [PeerGone(A, GoneReason.DISCONNECTED)]


def test_a_client_that_only_sent_is_forgotten_with_its_receivers() -> None:
    """No table keeps what a closed connection has heard."""
    bench = Bench()
    a, b = bench.connect(A), bench.connect(B)
    bench.read(a, packet(B) + packet(A))
    bench.disconnect(b)
    bench.disconnect(a)
    assert bench.tables_are_empty()


# --- Frames of section 6 -------------------------------------------------------------------------

PING = derp.encode_ping(b"12345678")
PONG = (FrameType.PONG, b"12345678")


def raw(frame_type: int, length: int) -> bytes:
    return derp.HEADER.pack(frame_type, length) + bytes(length)


HARMLESS = [
    raw(0x7F, 100),
    raw(0x7F, 2 << 20),
    raw(0x06, 0),
    raw(0x13, 8),
    raw(0x02, 56),
    raw(0x01, 40),
    raw(0x03, 0),
    raw(0x05, 40),
    raw(0x08, 33),
    raw(0x09, 51),
    raw(0x14, 3),
    raw(0x15, 8),
    raw(0x0B, 0),
    b"\x07\x00\x00\x00\x01\x05",
]


@pytest.mark.parametrize("frame", HARMLESS, ids=lambda frame: frame[:5].hex())
@pytest.mark.parametrize("size", [1 << 30, 65536, 3])
def test_unknown_frames_are_skipped_in_any_split(frame: bytes, size: int) -> None:
    """A ping behind them is answered, and they are never held in memory."""
    if size == 3 and len(frame) > 1000:
        frame = raw(0x7F, 1000)
    bench = Bench()
    a = bench.connect(A)
    stream = frame + PING
    for position in range(0, len(stream), size):
        bench.read(a, stream[position : position + size])
        assert len(bench.partial[a]) < 1009
    assert bench.taken(a) == [PONG]
    assert bench.closed == {}


def test_a_frame_of_4_gib_is_skipped_too() -> None:
    """Its length is no error; the count of bytes to skip is right across reads."""
    bench = Bench()
    a = bench.connect(A)
    bench.read(a, b"\x7f\xff\xff\xff\xff" + bytes(10))
    assert a.skip_bytes == 0xFFFFFFFF - 10
    a.skip_bytes = 3
    bench.read(a, b"abc" + PING)
    assert bench.taken(a) == [PONG]


VIOLATIONS = [
    raw(0x07, 0),
    raw(0x07, 2),
    raw(0x12, 7),
    raw(0x12, 1001),
    raw(0x10, 0),  # without the mesh key
    raw(0x11, 32),
    raw(0x0A, 64),
    raw(0x04, 31),
    derp.HEADER.pack(0x04, 65569),
    derp.HEADER.pack(0x04, 0xFFFFFFFF),
    derp.HEADER.pack(0x12, 0xFFFFFFFF),
]


@pytest.mark.parametrize("frame", VIOLATIONS, ids=lambda frame: frame[:5].hex())
def test_violations_close_after_what_came_before(frame: bytes) -> None:
    """The header alone is enough; packets before it are delivered, frames behind it are not."""
    bench = Bench()
    a, b = bench.connect(A), bench.connect(B)
    bench.read(a, packet(B, b"1") + frame[:5])
    if a not in bench.closed:
        bench.read(a, frame[5:] + packet(B, b"2"))
    assert a in bench.closed
    assert bench.seen(b) == [RecvPacket(A, b"1"), PeerGone(A, GoneReason.DISCONNECTED)]


@pytest.mark.parametrize(
    "frame",
    [raw(0x10, 1), raw(0x11, 31), raw(0x11, 33), raw(0x0A, 63), derp.HEADER.pack(0x0A, 65601)],
    ids=lambda frame: frame[:5].hex(),
)
def test_violations_of_mesh_peers(frame: bytes) -> None:
    """Exact lengths hold for privileged frames too."""
    bench = Bench()
    peer = bench.connect(A, is_mesh=True)
    bench.read(peer, frame)
    assert peer in bench.closed


def test_largest_and_smallest_packets_pass() -> None:
    """65536 and 0 bytes of payload, to a known and an unknown key."""
    bench = Bench()
    a, b = bench.connect(A), bench.connect(B)
    bench.read(a, packet(B, bytes(65536)) + packet(NOBODY, bytes(65536)) + packet(B, b""))
    assert bench.seen(b) == [RecvPacket(A, bytes(65536)), RecvPacket(A, b"")]
    assert bench.closed == {}


def test_one_pong_is_pending_at_most() -> None:
    """Pings that arrive while one waits are ignored; the Pong has the first 8 bytes."""
    bench = Bench()
    a = bench.connect(A)
    bench.read(a, derp.encode_frame(FrameType.PING, b"12345678" + bytes(992)) + PING * 49)
    assert bench.taken(a) == [PONG]
    a.blocked = True
    for _ in range(20):
        bench.read(a, PING)
    bench.unblock(a)
    assert bench.taken(a) == [PONG]
    bench.read(a, PING)
    assert bench.taken(a) == [PONG]
    assert bench.switch.counters.got_ping == 71
    assert bench.switch.counters.sent_pong == 3


def test_home_and_home_moves() -> None:
    """Any value but zero means home; a change after 5 s is a move."""
    bench = Bench()
    a = bench.connect(A)
    home, away = b"\x07\x00\x00\x00\x01\x05", derp.encode_note_preferred(False)
    bench.read(a, home)
    assert a.home
    counters = bench.switch.counters
    assert (counters.home_moves_in, counters.home_moves_out) == (0, 0)
    bench.now += 5.1
    bench.read(a, home + away + away + home)
    assert (counters.home_moves_in, counters.home_moves_out) == (1, 1)


# --- Mesh (10) -----------------------------------------------------------------------------------


def present(who: NodePublic) -> bytes:
    return derp.encode_peer_present(who.raw, None, 0, PresentFlags.REGULAR)


def gone(who: NodePublic, reason: GoneReason = GoneReason.DISCONNECTED) -> bytes:
    return derp.encode_peer_gone(who.raw, reason)


def link_to(bench: Bench, number: int, **options: object) -> Client:
    link = bench.connect(key(number), is_outgoing=True, is_mesh=True, **options)
    assert bench.taken(link) == [(FrameType.WATCH_CONNS, b"")]
    return link


def test_watchers_learn_of_all_that_is_and_all_that_changes() -> None:
    """Those connected, the watcher itself among them, then each connect and the last disconnect."""
    bench = Bench()
    address = ipaddress.ip_address("203.0.113.5")
    bench.connect(A, address=address, port=7)
    bench.connect(B, is_prober=True, not_ideal=True)
    watcher = bench.connect(C, is_mesh=True)
    bench.read(watcher, derp.WATCH_CONNS)
    assert bench.seen(watcher) == [
        PeerPresent(A, address, 7, PresentFlags.REGULAR),
        PeerPresent(B, None, 0, PresentFlags.PROBER | PresentFlags.NOT_IDEAL),
        PeerPresent(C, None, 0, PresentFlags.MESH_PEER),
    ]
    again = bench.connect(A)
    bench.disconnect(again)
    assert bench.seen(watcher) == [PeerPresent(A, None, 0, 1)]
    bench.disconnect(bench.switch.presence.connections_of(A.raw)[0])
    assert bench.seen(watcher) == [PeerGone(A, 0)]


def test_a_server_that_reached_itself_watches_nothing() -> None:
    """WATCH_CONNS under the server's own key is ignored and the connection stays."""
    bench = Bench()
    itself = bench.connect(SERVER, is_mesh=True)
    bench.read(itself, derp.WATCH_CONNS + PING)
    assert bench.taken(itself) == [PONG]
    assert bench.switch.presence.watchers == 0


def test_forwarders_are_used_in_the_order_of_their_age() -> None:
    """The oldest is used, the next takes over; local delivery goes before all of them."""
    bench = Bench()
    first, second, a = link_to(bench, 1), link_to(bench, 2), bench.connect(A)
    bench.read(first, present(B) + present(B))
    bench.read(second, present(B))
    counters = bench.switch.counters
    assert counters.multiforwarder_created == 1
    forward = (FrameType.FORWARD_PACKET, A.raw + B.raw + b"x")
    for winner, loser, loss in ((first, second, gone(B)), (second, first, b"")):
        bench.read(a, packet(B))
        assert bench.taken(winner) == [forward]
        assert bench.taken(loser) == []
        if loss:
            bench.read(winner, loss)
    assert counters.multiforwarder_deleted == 1
    b = bench.connect(B)
    bench.read(a, packet(B))
    assert bench.seen(b) == [RecvPacket(A, b"x")]
    bench.disconnect(b)
    bench.disconnect(second)
    bench.read(a, packet(B))
    assert dropped(bench) == {(DropReason.UNKNOWN_DEST, Kind.OTHER): 1}
    bench.read(first, gone(B))
    assert counters.forwarder_delete_other_value == 1
    assert counters.packets_forwarded_out == 2


def test_not_here_from_a_link_removes_no_forwarder() -> None:
    """Reason 0x01 answers a forwarded packet; only 0x00 says that the key has left."""
    bench = Bench()
    link = link_to(bench, 1)
    bench.read(link, present(B) + gone(B, GoneReason.NOT_HERE))
    assert bench.switch.presence.forwarder_of(B.raw) is link
    bench.read(link, derp.encode_frame(FrameType.PEER_GONE, B.raw))
    assert bench.switch.presence.forwarder_of(B.raw) is None


def test_a_link_that_ends_takes_its_keys_along() -> None:
    """All who got packets of them are told, where the key is nowhere else."""
    bench = Bench()
    link, other, a = link_to(bench, 1), link_to(bench, 2), bench.connect(A)
    bench.read(link, present(B) + present(C))
    bench.read(other, present(C))
    peer = bench.connect(key(1), is_mesh=True)
    bench.read(
        peer, derp.encode_forward_packet(B, A, b"1") + derp.encode_forward_packet(C, A, b"2")
    )
    assert bench.seen(a) == [RecvPacket(B, b"1"), RecvPacket(C, b"2")]
    bench.disconnect(link)
    assert bench.seen(a) == [PeerGone(B, 0)]
    assert bench.switch.presence.remote_keys == 1


@pytest.mark.parametrize("payload", [b"", b"hello", DISCO, bytes(65536)])
def test_forwarded_packets_are_delivered_in_any_split(payload: bytes) -> None:
    """The frame shrinks by 32 bytes in place; its neighbours stay whole."""
    frame = derp.encode_forward_packet(A, B, payload)
    for cut in (1, 5, 37, 68, 69, len(frame)):
        bench = Bench()
        peer, b, c = bench.connect(key(1), is_mesh=True), bench.connect(B), bench.connect(C)
        stream = packet(C, b"before") + frame + frame + packet(C, b"after")
        cut += len(packet(C, b"before"))
        bench.read(peer, stream[:cut])
        bench.read(peer, stream[cut:])
        assert bench.seen(b) == [RecvPacket(A, payload)] * 2
        assert bench.seen(c) == [RecvPacket(key(1), b"before"), RecvPacket(key(1), b"after")]
        assert bench.switch.counters.packets_forwarded_in == 2


def test_forwarded_packets_go_no_further() -> None:
    """One hop between hosts; the peer is told of disco packets that found nobody."""
    bench = Bench()
    link, peer = link_to(bench, 1), bench.connect(key(2), is_mesh=True)
    bench.read(link, present(B))
    bench.read(peer, derp.encode_forward_packet(A, B, DISCO))
    bench.read(peer, derp.encode_forward_packet(A, B, b"x"))
    assert bench.taken(link) == []
    assert bench.seen(peer) == [PeerGone(B, GoneReason.NOT_HERE)]
    reason = DropReason.UNKNOWN_DEST_ON_FWD
    assert dropped(bench) == {(reason, Kind.DISCO): 1, (reason, Kind.OTHER): 1}


def test_close_peer_ends_every_connection_of_the_key() -> None:
    """Also its own; unknown keys are ignored."""
    bench = Bench()
    a, b, again = bench.connect(A), bench.connect(B), bench.connect(B)
    peer = bench.connect(C, is_mesh=True)
    bench.read(peer, derp.encode_close_peer(NOBODY) + derp.encode_close_peer(B))
    assert set(bench.closed) == {b, again}
    bench.read(peer, derp.encode_close_peer(C))
    assert peer in bench.closed
    bench.disconnect(a)
    assert bench.tables_are_empty()


def test_a_server_that_we_dialed_cannot_send_as_a_client() -> None:
    """On a link only presence and pings mean anything; the rest is skipped, whatever its length."""
    bench = Bench()
    link, a = link_to(bench, 1), bench.connect(A)
    noise = (
        packet(A) + raw(0x04, 3) + raw(0x0A, 80) + raw(0x10, 0) + raw(0x11, 32) + raw(0x07, 9)
        + raw(0x12, 7) + raw(0x08, 31) + raw(0x09, 31) + raw(0x09, 70_000) + raw(0x14, 70_000)
    )  # fmt: skip
    for position in range(0, len(noise), 5000):
        bench.read(link, noise[position : position + 5000])
        assert len(bench.partial[link]) < 1009
    bench.read(link, PING)
    assert bench.taken(link) == [PONG]
    assert bench.taken(a) == []
    assert bench.closed == {}
    bench.disconnect(link)
    bench.disconnect(a)
    assert bench.tables_are_empty()


def test_workers_of_a_host_look_like_one_relay_from_outside() -> None:
    """Outside watchers learn of a sibling's clients; a packet from outside may cross to it."""
    bench = Bench()
    sibling = link_to(bench, 1, is_sibling=True)
    watching = bench.connect(key(1), is_mesh=True, is_sibling=True)
    bench.read(watching, derp.WATCH_CONNS)
    outsider = bench.connect(key(2), is_mesh=True)
    bench.read(sibling, present(A))
    bench.taken(watching)
    bench.read(outsider, derp.WATCH_CONNS)
    assert PeerPresent(A, None, 0, 1) in bench.seen(outsider)
    bench.read(sibling, present(B))
    assert bench.seen(outsider) == [PeerPresent(B, None, 0, 1)]
    assert bench.seen(watching) == []  # a sibling is not told of siblings

    bench.read(outsider, derp.encode_forward_packet(C, A, b"x"))
    assert bench.taken(sibling) == [(FrameType.FORWARD_PACKET, C.raw + A.raw + b"x")]
    bench.read(watching, derp.encode_forward_packet(C, A, b"x"))  # but not back again
    assert bench.taken(sibling) == []

    # A moves from the sibling to here: for outsiders it never was away.
    a = bench.connect(A)
    bench.read(sibling, gone(A))
    assert bench.seen(outsider) == [PeerPresent(A, None, 0, 1)]
    bench.read(sibling, present(A))
    bench.disconnect(a)
    assert bench.seen(outsider) == []
    assert bench.seen(watching) == [PeerPresent(A, None, 0, 1), PeerGone(A, 0)]
    bench.disconnect(sibling)
    assert sorted(map(str, bench.seen(outsider))) == sorted(
        map(str, [PeerGone(A, 0), PeerGone(B, 0)])
    )
    bench.disconnect(outsider)
    bench.disconnect(watching)
    assert bench.tables_are_empty()


def test_a_sibling_is_nearer_than_another_host() -> None:
    """Whatever came first; and outsiders are not told of keys on other hosts."""
    bench = Bench()
    host, sibling, a = link_to(bench, 1), link_to(bench, 2, is_sibling=True), bench.connect(A)
    watcher = bench.connect(key(3), is_mesh=True)
    bench.read(watcher, derp.WATCH_CONNS)
    bench.taken(watcher)
    bench.read(host, present(B))
    assert bench.seen(watcher) == []
    bench.read(sibling, present(B))
    bench.read(a, packet(B))
    assert len(bench.taken(sibling)) == 1
    assert bench.taken(host) == []


def test_tokens_hold_in_both_directions_and_over_the_mesh() -> None:
    """Neither may a holder send to others, nor others to it."""
    bench = Bench()
    a, b = bench.connect(A, permitted=frozenset({B.raw})), bench.connect(B)
    c, peer = bench.connect(C), bench.connect(key(1), is_mesh=True)
    bench.read(a, packet(B, b"1") + packet(C, b"2") + packet(B, b"3") + packet(NOBODY, DISCO))
    bench.read(b, packet(A, b"4"))
    bench.read(c, packet(A, b"5") + packet(B, b"6"))
    bench.read(
        peer, derp.encode_forward_packet(C, A, b"7") + derp.encode_forward_packet(B, A, b"8")
    )
    assert bench.seen(a) == [RecvPacket(B, b"4"), RecvPacket(B, b"8")]
    assert bench.seen(b) == [RecvPacket(A, b"1"), RecvPacket(A, b"3"), RecvPacket(C, b"6")]
    assert bench.seen(c) == []
    refused = DropReason.NOT_PERMITTED
    assert dropped(bench) == {(refused, Kind.OTHER): 3, (refused, Kind.DISCO): 1}


# --- Slow receivers ------------------------------------------------------------------------------


def test_what_waits_is_copied_and_disco_goes_first() -> None:
    """The shared buffer is overwritten after each round, and the backlog does not notice."""
    bench = Bench()
    a, b = bench.connect(A), bench.connect(B)
    b.blocked = True
    bench.read(a, packet(B, b"1") + packet(B, DISCO) + packet(B, b"2"))
    bench.read(a, packet(B, b"3"))
    counters = bench.switch.counters
    assert counters.packets_sent == 0
    assert bench.switch.outbox.waiting_bytes == 4 * 37 + 3 + len(DISCO)
    bench.unblock(b)
    assert bench.seen(b) == [
        RecvPacket(A, DISCO), RecvPacket(A, b"1"), RecvPacket(A, b"2"), RecvPacket(A, b"3"),
    ]  # fmt: skip
    assert counters.packets_sent == counters.packets_waited == 4
    assert bench.switch.outbox.waiting_bytes == 0


def test_a_client_that_blocks_in_the_middle_of_a_round_keeps_its_order() -> None:
    """What was pending when it blocked goes to the backlog, ahead of what comes later."""
    bench = Bench()
    a, b = bench.connect(A), bench.connect(B)
    buffer = bytearray(packet(B, b"1") + PING + bytes(BUFFER_SLACK))
    for client, data in ((a, packet(B, b"1")), (b, PING)):
        buffer[: len(data)] = data
        bench.switch.handle_frames(client, buffer, memoryview(buffer), 0, len(data), bench.now)
        if client is a:
            buffer = bytearray(200)
    b.blocked = True
    bench.flush()
    bench.read(a, packet(B, b"2"))
    counters = bench.switch.counters
    assert counters.packets_sent == 0
    bench.unblock(b)
    assert bench.taken(b) == [PONG, (5, A.raw + b"1"), (5, A.raw + b"2")]


def test_full_queues_drop_the_oldest_and_each_queue_has_its_own_bound() -> None:
    """32 of each kind wait (7.4); what is dropped is counted by its kind."""
    bench = Bench()
    a, b = bench.connect(A), bench.connect(B)
    b.blocked = True
    for number in range(40):
        bench.read(a, packet(B, bytes([number])) + packet(B, DISCO + bytes([number])))
    reason = DropReason.QUEUE_HEAD
    assert dropped(bench) == {(reason, Kind.OTHER): 8, (reason, Kind.DISCO): 8}
    bench.unblock(b)
    frames = [body[32:] for _, body in bench.taken(b)]
    assert frames == [DISCO + bytes([n]) for n in range(8, 40)] + [bytes([n]) for n in range(8, 40)]


def test_an_elephant_does_not_push_out_mice() -> None:
    """At a blocked destination the sender that holds most of the queue loses."""
    bench = Bench()
    elephant, b = bench.connect(A), bench.connect(B)
    mice = [bench.connect(key(number)) for number in range(1, 11)]
    b.blocked = True
    for mouse in mice:
        bench.read(mouse, packet(B, b"mouse"))
        bench.read(elephant, packet(B, b"elephant") * 100)
    bench.unblock(b)
    sources = Counter(frame.source for frame in bench.seen(b) if isinstance(frame, RecvPacket))
    assert all(sources[NodePublic(mouse.key)] == 1 for mouse in mice)
    assert sources[A] == 22


def test_memory_bound_holds_over_all_clients() -> None:
    """What would pass it is dropped; the account returns to zero however the packets leave."""
    bench = Bench(memory_bytes=5000)
    a, b, c = bench.connect(A), bench.connect(B), bench.connect(C)
    b.blocked = c.blocked = True
    for _ in range(10):
        bench.read(a, packet(B, bytes(900)) + packet(C, bytes(900)))
        assert bench.switch.outbox.waiting_bytes <= 5000
    assert dropped(bench) == {(DropReason.QUEUE_TAIL, Kind.OTHER): 15}
    bench.unblock(b)
    bench.disconnect(c)
    assert bench.switch.outbox.waiting_bytes == 0
    assert dropped(bench)[DropReason.GONE_DISCONNECTED, Kind.OTHER] == 2


def test_forwards_over_a_slow_link_wait_and_are_counted_by_payload() -> None:
    """Whether the link was blocked already or blocks with them pending."""
    bench = Bench()
    link, a = link_to(bench, 1), bench.connect(A)
    bench.read(link, present(B))
    frame = packet(B, b"12345")
    buffer = bytearray(frame + bytes(BUFFER_SLACK))
    bench.switch.handle_frames(a, buffer, memoryview(buffer), 0, len(frame), bench.now)
    link.blocked = True
    bench.flush()
    bench.read(a, packet(B, b"6789"))
    bench.unblock(link, 1)
    assert [body[64:] for _, body in bench.taken(link)] == [b"12345", b"6789"]
    link.blocked = True
    bench.read(a, packet(B, b"12345"))
    bench.disconnect(link)
    reason = DropReason.GONE_DISCONNECTED
    assert bench.switch.counters.bytes_dropped[reason, Kind.OTHER] == 5
    assert bench.switch.outbox.waiting_bytes == 0


def test_a_client_that_hardly_reads_does_not_collect_notices_for_ever() -> None:
    """It is closed at a bound; a mesh peer, who must know all, is not."""
    bench = Bench()
    a, watcher = bench.connect(A), bench.connect(C, is_mesh=True)
    a.blocked = watcher.blocked = True
    bench.switch.outbox.send_to_all(derp.KEEP_ALIVE, [a, watcher] * (MAX_CONTROL_FRAMES - 1))
    bench.flush()
    assert bench.closed == {}
    bench.switch.outbox.send_to_all(derp.KEEP_ALIVE, [a, watcher] * 5)
    bench.flush()
    assert list(bench.closed) == [a]


def test_a_write_error_in_the_middle_of_a_read_ends_the_reader_for_good() -> None:
    """A self-send may close the very connection that is read; nothing of it comes back."""
    bench = Bench()
    for public in (A, B):
        peer = bench.connect(public, is_mesh=True)
        bench.connect(public)  # a duplicate
        bench.failing.add(peer)
        bench.read(
            peer,
            packet(public, bytes(20000)) + derp.WATCH_CONNS + packet(public, bytes(20000))
            + PING + derp.WATCH_CONNS,
        )  # fmt: skip
        assert peer in bench.closed
    assert bench.switch.presence.watchers == 0
    assert bench.switch.presence.duplicate_keys == 0
    for client in list(bench.switch.presence.clients()):
        bench.disconnect(client)
    assert bench.tables_are_empty()


def test_disconnecting_twice_is_harmless_and_pending_packets_are_counted() -> None:
    """What a connection had not been written when it ended was not sent."""
    bench = Bench()
    a, b = bench.connect(A), bench.connect(B)
    data = packet(B, b"12") + packet(B, DISCO)
    buffer = bytearray(data + bytes(BUFFER_SLACK))
    bench.switch.handle_frames(a, buffer, memoryview(buffer), 0, len(data), bench.now)
    bench.disconnect(b)
    bench.disconnect(b)
    reason = DropReason.GONE_DISCONNECTED
    assert dropped(bench) == {(reason, Kind.OTHER): 1, (reason, Kind.DISCO): 1}
    assert bench.switch.counters.packets_sent == 0
    assert bench.switch.counters.bytes_sent == 0


# --- Against a model -----------------------------------------------------------------------------


@dataclass(eq=False)
class ModelClient:
    public: bytes
    is_mesh: bool
    is_link: bool
    output: bytearray = field(default_factory=bytearray)
    stream: bytes = b""
    skip: int = 0
    blocked: bool = False
    control: list[bytes] = field(default_factory=list)
    queues: dict[Kind, list[bytes]] = field(default_factory=lambda: {k: [] for k in Kind})
    pong_waits: bool = False
    heard: set[bytes] = field(default_factory=set)
    tokens: float = 3.0
    tokens_at: float = 0.0


class Model:
    """The rules, one frame at a time, with lists and loops."""

    def __init__(self) -> None:
        self.clients: list[ModelClient] = []
        # Connections per key, the active one last; in the order of the keys' arrival.
        self.by_key: dict[bytes, list[ModelClient]] = {}
        self.watchers: list[ModelClient] = []
        self.forwarders: dict[bytes, list[ModelClient]] = {}
        self.now = 100.0
        self.count: Counter[str] = Counter()

    def send(self, client: ModelClient, frame: bytes) -> None:
        if client.blocked:
            client.control.append(frame)
        else:
            client.output += frame

    def connect(self, public: bytes, is_mesh: bool, is_link: bool) -> ModelClient:
        client = ModelClient(public, is_mesh, is_link)
        self.clients.append(client)
        if is_link:
            self.send(client, derp.WATCH_CONNS)
            return client
        self.by_key.setdefault(public, []).append(client)
        for watcher in self.watchers:
            self.send(watcher, self.presence(client))
        return client

    def presence(self, client: ModelClient) -> bytes:
        flags = PresentFlags.MESH_PEER if client.is_mesh else PresentFlags.REGULAR
        return derp.encode_peer_present(client.public, None, 0, flags)

    def disconnect(self, client: ModelClient) -> None:
        self.clients.remove(client)
        if client in self.watchers:
            self.watchers.remove(client)
        for kind, queue in client.queues.items():
            self.count[f"dropped gone_disconnected {kind}"] += len(queue)
        if client.is_link:
            for public in [p for p, links in self.forwarders.items() if client in links]:
                self.remove_forwarder(public, client)
            return
        self.by_key[client.public].remove(client)
        if not self.by_key[client.public]:
            del self.by_key[client.public]
            frame = derp.encode_peer_gone(client.public, GoneReason.DISCONNECTED)
            for watcher in self.watchers:
                self.send(watcher, frame)
            self.maybe_gone(client.public)

    def remove_forwarder(self, public: bytes, link: ModelClient) -> None:
        if link not in self.forwarders.get(public, []):
            return
        self.forwarders[public].remove(link)
        if not self.forwarders[public]:
            del self.forwarders[public]
        self.maybe_gone(public)

    def maybe_gone(self, public: bytes) -> None:
        if public in self.by_key or public in self.forwarders:
            return
        for client in self.clients:
            if public in client.heard:
                client.heard.remove(public)
                self.send(client, derp.encode_peer_gone(public, GoneReason.DISCONNECTED))

    def read(self, client: ModelClient, data: bytes) -> None:
        client.stream += data
        skipped = min(client.skip, len(client.stream))
        client.skip -= skipped
        client.stream = client.stream[skipped:]
        if not client.is_link and len(client.stream) >= 5:
            same = self.by_key[client.public]
            same.remove(client)
            same.append(client)
        while client in self.clients and len(client.stream) >= 5:
            frame_type, length = struct.unpack(">BI", client.stream[:5])
            if not self.is_legal(client, frame_type, length):
                self.disconnect(client)
                return
            if not self.is_known(client, frame_type, length):
                client.skip = max(0, 5 + length - len(client.stream))
                client.stream = client.stream[5 + length :]
                continue
            if len(client.stream) < 5 + length:
                break
            body, client.stream = client.stream[5 : 5 + length], client.stream[5 + length :]
            self.handle(client, frame_type, body)
        if not client.blocked:
            client.pong_waits = False

    def is_legal(self, client: ModelClient, frame_type: int, length: int) -> bool:
        if client.is_link:
            return True
        bounds = {4: (32, 65568), 7: (1, 1), 0x12: (8, 1000)}
        mesh_bounds = {0x0A: (64, 65600), 0x10: (0, 0), 0x11: (32, 32)}
        if frame_type in mesh_bounds:
            low, high = mesh_bounds[frame_type]
            return client.is_mesh and low <= length <= high
        low, high = bounds.get(frame_type, (0, 1 << 32))
        return low <= length <= high

    def is_known(self, client: ModelClient, frame_type: int, length: int) -> bool:
        if client.is_link:
            return length <= 1000 and length >= {8: 32, 9: 32, 0x12: 8}.get(frame_type, 1 << 32)
        return frame_type in (0x04, 0x07, 0x0A, 0x10, 0x11, 0x12)

    def handle(self, client: ModelClient, frame_type: int, body: bytes) -> None:
        if frame_type == 4:
            self.handle_packet(client, client.public, body[:32], body[32:])
        elif frame_type == 0x0A:
            self.handle_packet(client, body[:32], body[32:64], body[64:], forwarded=True)
        elif frame_type == 0x12:
            if not client.pong_waits:
                client.pong_waits = True
                self.send(client, derp.encode_pong(body[:8]))
        elif frame_type == 0x10:
            if client not in self.watchers:
                self.watchers.append(client)
            for connections in self.by_key.values():
                self.send(client, self.presence(connections[-1]))
        elif frame_type == 9:
            links = self.forwarders.setdefault(body[:32], [])
            if client not in links:
                links.append(client)
        elif frame_type == 8 and body[32:33] in (b"", b"\0"):
            self.remove_forwarder(body[:32], client)

    def handle_packet(
        self,
        client: ModelClient,
        source: bytes,
        to: bytes,
        payload: bytes,
        *,
        forwarded: bool = False,
    ) -> None:
        disco = len(payload) >= 62 and payload.startswith(derp.DISCO_MAGIC)
        kind = Kind.DISCO if disco else Kind.OTHER
        self.count["forwarded in" if forwarded else f"received {kind}"] += 1
        if to in self.by_key:
            receiver = self.by_key[to][-1]
            receiver.heard.add(source)
            frame = derp.encode_recv_packet(NodePublic(source), payload)
            if receiver.blocked:
                self.queue(receiver, kind, frame)
            else:
                receiver.output += frame
                self.count["sent"] += 1
        elif to in self.forwarders and not forwarded:
            link = self.forwarders[to][0]
            self.count["forwarded out"] += 1
            frame = derp.encode_frame(FrameType.FORWARD_PACKET, source + to + payload)
            if link.blocked:
                self.queue(link, kind, frame)
            else:
                link.output += frame
        else:
            self.count[f"dropped unknown_dest{'_on_fwd' if forwarded else ''} {kind}"] += 1
            if disco:
                client.tokens = min(3.0, client.tokens + self.now - client.tokens_at)
                client.tokens_at = self.now
                if client.tokens >= 1:
                    client.tokens -= 1
                    self.send(client, derp.encode_peer_gone(to, GoneReason.NOT_HERE))

    def queue(self, client: ModelClient, kind: Kind, frame: bytes) -> None:
        queue = client.queues[kind]
        if len(queue) == DEPTH:
            holders = Counter(waiting[5:37] for waiting in queue)
            most = max(holders.values())
            victim = next(w for w in queue if holders[w[5:37]] == most)
            queue.remove(victim)
            self.count[f"dropped queue_head {kind}"] += 1
        queue.append(frame)

    def unblock(self, client: ModelClient) -> None:
        client.blocked = client.pong_waits = False
        for frame in client.control + client.queues[Kind.DISCO] + client.queues[Kind.OTHER]:
            client.output += frame
            self.count["sent"] += frame[0] == 5
        client.control.clear()
        for queue in client.queues.values():
            queue.clear()


DEPTH = 3
KEYS = [key(number) for number in (0xA1, 0xB2, 0xC3, 0xD4)]
ANY_KEY = st.sampled_from(KEYS)
PAYLOADS = st.one_of(
    st.binary(max_size=80), st.binary(max_size=20).map(lambda tail: DISCO + tail),
    st.sampled_from([SHORT_DISCO, bytes(9000), bytes(17000)]),
)  # fmt: skip
FRAMES = st.one_of(
    st.builds(packet, ANY_KEY, PAYLOADS),
    st.builds(packet, ANY_KEY, PAYLOADS),
    st.builds(lambda to, payload: packet(to, payload) * 4, ANY_KEY, PAYLOADS),
    st.builds(derp.encode_forward_packet, ANY_KEY, ANY_KEY, PAYLOADS),
    st.builds(raw, st.sampled_from([0x05, 0x0B, 0x13, 0x7F, 0xFF]), st.integers(0, 300)),
    ANY_KEY.map(present),
    ANY_KEY.map(gone),
    st.sampled_from([PING, derp.WATCH_CONNS, derp.KEEP_ALIVE, raw(0x04, 31), raw(0x12, 7)]),
    st.builds(raw, st.integers(0, 255), st.integers(0, 40)),
)
NUMBERS = st.integers(0, 30)
CONNECTS = st.tuples(
    st.just("connect"), ANY_KEY, st.sampled_from(["client", "client", "client", "mesh", "link"])
)
STEPS = st.one_of(
    CONNECTS,
    CONNECTS,
    st.tuples(st.just("disconnect"), NUMBERS),
    *[
        st.tuples(
            st.just("send"),
            NUMBERS,
            st.lists(FRAMES, max_size=6).map(b"".join),
            st.lists(st.integers(1, 300), max_size=4),
            st.integers(0, 12),
        )
    ]
    * 5,
    st.tuples(st.just("block"), NUMBERS),
    st.tuples(st.just("unblock"), NUMBERS),
    st.tuples(st.just("wait"), st.integers(1, 3)),
)


def cut_up(data: bytes, sizes: Iterable[int]) -> Iterable[bytes]:
    for size in sizes:
        yield data[:size]
        data = data[size:]
    yield data


@settings(max_examples=250, deadline=None)
@given(st.lists(STEPS, min_size=20, max_size=50))
def test_forwarding_agrees_with_the_model(steps: list[tuple[object, ...]]) -> None:
    """Same bytes to everybody, same drops, counters that add up, and no leak at the end."""
    bench, model = Bench(queue_depth=DEPTH), Model()
    pairs: list[tuple[Client, ModelClient]] = []
    late: dict[Client, bytes] = {}
    pairs.extend(
        (bench.connect(p), model.connect(p.raw, False, False)) for p in (KEYS[0], *KEYS[:3])
    )
    for step in steps:
        match step:
            case ("connect", NodePublic() as public, kind):
                is_mesh, is_link = kind == "mesh", kind == "link"
                client = bench.connect(public, is_mesh=is_mesh or is_link, is_outgoing=is_link)
                pairs.append((client, model.connect(public.raw, is_mesh, is_link)))
            case ("wait", int(seconds)):
                bench.now += seconds
                model.now += seconds
            case (str(what), int(number), *rest) if pairs:
                client, twin = pairs[number % len(pairs)]
                if what == "disconnect":
                    bench.disconnect(client)
                    model.disconnect(twin)
                elif what == "block":
                    client.blocked = twin.blocked = True
                elif what == "unblock":
                    bench.unblock(client)
                    model.unblock(twin)
                else:
                    data, sizes, held_back = rest
                    assert isinstance(data, bytes)
                    data = late.pop(client, b"") + data
                    keep = len(data) - held_back
                    late[client] = data[max(keep, 0) :]
                    for piece in cut_up(data[: max(keep, 0)], sizes):
                        if not client.closed:
                            bench.read(client, piece)
                            model.read(twin, piece)
        pairs = [(client, twin) for client, twin in pairs if twin in model.clients]
        assert {client for client, _ in pairs}.isdisjoint(bench.closed)
        for client, twin in pairs:
            assert bench.written[client] == twin.output
            bench.written[client].clear()
            twin.output.clear()
        check_counters(bench, model, [client for client, _ in pairs])
    for client, _ in pairs:
        bench.disconnect(client)
    assert bench.tables_are_empty()


def check_counters(bench: Bench, model: Model, clients: list[Client]) -> None:
    counters = bench.switch.counters
    drops = {
        f"dropped {reason} {kind}": count
        for (reason, kind), count in counters.packets_dropped.items()
    }
    # What a client sent itself in the very read that ends it may or may not have left early.
    gone = [f"dropped gone_disconnected {kind}" for kind in Kind]
    assert counters.packets_sent + sum(drops.pop(name) for name in gone) == sum(
        model.count[name] for name in ["sent", *gone]
    )
    for name, count in {
        "forwarded in": counters.packets_forwarded_in,
        "forwarded out": counters.packets_forwarded_out,
        **{f"received {kind}": n for kind, n in counters.packets_received.items()},
        **drops,
    }.items():
        assert count == model.count[name], name
    waiting = [frame for twin in model.clients for queue in twin.queues.values() for frame in queue]
    assert bench.switch.outbox.waiting_bytes == sum(map(len, waiting))
    assert sum(c.backlog.packets for c in clients if c.backlog) == len(waiting)
    if not counters.packets_forwarded_out:
        received = sum(counters.packets_received.values()) + counters.packets_forwarded_in
        all_drops = sum(counters.packets_dropped.values())
        assert received == counters.packets_sent + all_drops + len(waiting)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.builds(packet, ANY_KEY, PAYLOADS), min_size=1, max_size=12).map(b"".join),
    st.lists(st.integers(1, 100), max_size=20),
)
def test_the_split_of_a_stream_does_not_matter(stream: bytes, sizes: list[int]) -> None:
    """One read or many: every receiver gets the same bytes."""
    outputs = []
    for pieces in ([stream], list(cut_up(stream, sizes))):
        bench = Bench()
        clients = [bench.connect(public) for public in KEYS[:3]]
        for piece in pieces:
            bench.read(clients[0], piece)
        outputs.append([bytes(bench.written[client]) for client in clients])
    assert outputs[0] == outputs[1]


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200), st.booleans(), st.booleans())
def test_garbage_is_a_violation_or_nothing(data: bytes, is_mesh: bool, is_link: bool) -> None:
    """Whatever a client sends, nothing but ViolationError comes out."""
    bench = Bench()
    client = bench.connect(A, is_mesh=is_mesh or is_link, is_outgoing=is_link)
    bench.read(client, data)
    if not client.closed:
        bench.read(client, data)
    bench.disconnect(client)
    assert bench.tables_are_empty()
