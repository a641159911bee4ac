"""The pump with real sockets on loopback: what arrives is intact, whoever is slow or vanishes."""

from __future__ import annotations

import gc
import hashlib
import hmac
import itertools
import os
import random
import socket
import ssl
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import trio
import trio.lowlevel
import trio.testing
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305

from relay.counters import DropReason, Kind
from relay.pump import BUFFER_BYTES, Connection
from relay.upgrade import RateLimit
from traversal.io.stream import HandshakeStream, StreamEndedError
from traversal.keys import NodePrivate, NodePublic
from traversal.wire import derp
from traversal.wire.derp import (
    ClientInfo,
    GoneReason,
    KeepAlive,
    PeerGone,
    PeerPresent,
    Pong,
    RecvPacket,
    ServerInfo,
    encode_client_info,
)
from traversal.wire.derp_upgrade import encode_upgrade_request

if TYPE_CHECKING:
    from tests.relay.conftest import Contexts, DerpClient, Relay

RunRelay = Callable[..., Any]
TLS = [None, ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3]
TLS_IDS = ["plain", "TLS 1.2", "TLS 1.3"]
PING = derp.encode_ping(b"12345678")
DISCO = derp.DISCO_MAGIC + bytes(56)


def key(number: int) -> NodePrivate:
    return NodePrivate.generate(lambda size: random.Random(number).randbytes(size))


A, B, C = key(1), key(2), key(3)
NOBODY = NodePublic(bytes([0xEE]) * 32)


def packet(to: NodePublic, payload: bytes = b"x") -> bytes:
    return derp.encode_send_packet(to, payload)


def raw(frame_type: int, length: int) -> bytes:
    return derp.HEADER.pack(frame_type, length) + bytes(length)


@pytest.fixture
def jumping_clock() -> trio.testing.MockClock:
    """Time jumps when nothing has happened for 20 ms of real time: enough for loopback."""
    return trio.testing.MockClock(autojump_threshold=0.02)


@pytest.fixture
def descriptors() -> Iterator[None]:
    """No descriptor is left behind."""
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    yield
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) <= before


def tables_are_empty(relay: Relay) -> bool:
    presence, outbox = relay.pump.switch.presence, relay.pump.switch.outbox
    return not any(
        (
            relay.pump.connections, presence.active, presence._duplicates, presence._delivered,
            presence._watchers, presence._forwarders, outbox.waiting_bytes, outbox.dirty,
            outbox.doomed,
        )
    )  # fmt: skip


# --- The checker ---------------------------------------------------------------------------------

NOISE = random.Random(7).randbytes(200_000)
STAMP = struct.Struct(">BBIII")  # source, destination, sequence number, offset in NOISE, length
SECOND = 1_000_000  # where the numbers of a duplicate connection start
SIZES = [0, 1, 40, 62, 1300, 1300, 1300, 9000, 16384, 65536 - STAMP.size]


def stamped(randomness: random.Random, source: int, destination: int, sequence: int) -> bytes:
    size = randomness.choice(SIZES)
    offset = randomness.randrange(len(NOISE) - size)
    head = STAMP.pack(source, destination, sequence, offset, size)
    return head + NOISE[offset : offset + size]


def check_packet(frame: RecvPacket, receiver: int) -> tuple[int, int]:
    """Source and sequence number of a packet that is intact and from whom it says."""
    source, destination, sequence, offset, size = STAMP.unpack_from(frame.payload)
    assert frame.source == key(source).public()
    assert destination == receiver
    assert frame.payload[STAMP.size :] == NOISE[offset : offset + size]
    return source, sequence


@pytest.mark.parametrize("version", TLS, ids=TLS_IDS)
async def test_every_packet_that_arrives_is_intact(
    descriptors: None, run_relay: RunRelay, contexts: Contexts, version: ssl.TLSVersion | None
) -> None:
    """Random sizes and contents between many clients, some of which are slow, never read, send in
    small pieces, share a key, or vanish with a RST; then nothing is left."""
    many = range(10, 22)
    slow, never, duplicate, vanishing = {12, 13}, {14}, 15, {16, 17}
    got: Counter[int] = Counter()
    last: dict[tuple[int, int, int], int] = {}

    async with run_relay(
        contexts if version else None, send_buffer=16384, write_timeout_seconds=60.0
    ) as relay:
        options = {"version": version} if version else {}
        clients: dict[int, DerpClient] = {}
        for number in many:
            small = number in slow | never
            clients[number] = await relay.connect(
                key(number), receive_buffer=4096 if small else None, **options
            )
        second = await relay.connect(key(duplicate), **options)

        async def receive(number: int, client: DerpClient) -> None:
            while frames := await client.receive():
                for frame in frames:
                    if isinstance(frame, RecvPacket):
                        source, sequence = check_packet(frame, number)
                        got[number] += 1
                        pair = source, sequence // SECOND, id(client)
                        assert sequence > last.get(pair, -1)
                        last[pair] = sequence
                if number in slow:
                    await trio.sleep(0.002)

        async def send(number: int, client: DerpClient, start: int = 0) -> None:
            mine = random.Random(number + start)
            for burst in range(12):
                stream = b"".join(
                    packet(key(to).public(), stamped(mine, number, to, start + 100 * burst + turn))
                    for turn, to in enumerate(mine.choices(many, k=mine.choice([1, 4, 20])))
                )
                if mine.random() < 0.3:
                    stream += raw(0x7F, mine.choice([0, 5, 70_000])) + PING
                while stream:
                    cut = mine.choice([1, 3, 37, 1400, 1 << 20])
                    await client.send(stream[:cut])
                    stream = stream[cut:]
                if number in vanishing and burst == 8:
                    client.reset()
                    return

        async with trio.open_nursery() as receivers:
            for number, client in clients.items():
                if number not in never | vanishing:
                    receivers.start_soon(receive, number, client)
            receivers.start_soon(receive, duplicate, second)
            async with trio.open_nursery() as senders:
                for number, client in clients.items():
                    senders.start_soon(send, number, client)
                senders.start_soon(send, duplicate, second, SECOND)
            await relay.until(lambda: len(relay.pump.connections) == len(clients) - 1)
            clients[14].close()  # with packets waiting for it
            counters = relay.pump.switch.counters
            await relay.until(lambda: relay.pump.switch.outbox.waiting_bytes == 0)
            received = sum(counters.packets_received.values())
            assert received == counters.packets_sent + sum(counters.packets_dropped.values())
            assert counters.protocol_violations == 0
            for number, client in clients.items():
                if number not in vanishing | never:
                    relay.pump.close(relay.connection(client), "the test ends")
            relay.pump.close(relay.connection(second), "the test ends")
            relay.pump.flush()
        assert tables_are_empty(relay)
        assert all(got[number] for number in many if number not in never | vanishing)
        assert counters.packets_waited > 0
        assert counters.packets_dropped[DropReason.QUEUE_HEAD, Kind.OTHER] > 0
        for client in [*clients.values(), second]:
            client.close()


# --- Behavioural vectors (18.6) ------------------------------------------------------------------

PONG = [Pong(b"12345678")]
VECTORS: list[tuple[bytes, bool]] = [
    (raw(0x7F, 100), True),
    (raw(0x7F, 2 << 20), True),
    (raw(0x06, 0), True),
    (bytes.fromhex("13000000080102030405060708"), True),
    (raw(0x02, 56), True),
    (bytes.fromhex("0700000000"), False),
    (bytes.fromhex("07000000020101"), False),
    (bytes.fromhex("070000000105"), True),
    (raw(0x12, 7), False),
    (raw(0x12, 1001), False),
    (derp.WATCH_CONNS, False),
    (derp.encode_close_peer(A.public()), False),
    (derp.encode_forward_packet(A.public(), B.public(), b"x"), False),
    (raw(0x04, 31), False),
    (derp.HEADER.pack(0x04, 65569), False),
    (packet(NOBODY, bytes(65536)), True),
    (packet(NOBODY, DISCO[:61]), True),
]


@pytest.mark.parametrize("fast", [False, True], ids=["slow start", "fast start"])
@pytest.mark.parametrize("with_tls", [False, True], ids=["plain", "TLS"])
async def test_behavioural_vectors(
    run_relay: RunRelay, contexts: Contexts, with_tls: bool, fast: bool
) -> None:
    """Each input, then a Ping: answered with a Pong and nothing else, or closed without one."""
    async with run_relay(contexts if with_tls else None) as relay:
        for data, stays in VECTORS:
            client = await relay.connect(A, fast=fast)
            assert client.server_info == ServerInfo()
            try:
                await client.send(data + PING)
            except Exception:
                assert not stays
            if stays:
                assert await client.receive_exactly(1) == PONG, data[:8].hex()
            else:
                assert await client.receive_all() == [], data[:8].hex()
            client.close()
            await relay.until(lambda: not relay.pump.connections)
        # The same right behind CLIENT_INFO, in the handshake's flight.
        for data, stays in VECTORS[:1] + VECTORS[2:12]:
            stream = await relay.open_stream()
            if stays:
                client = await relay.connect(A, fast=fast, extra=data + PING, stream=stream)
                assert await client.receive_exactly(1) == PONG, data[:8].hex()
            else:
                with pytest.raises(StreamEndedError):
                    await relay.connect(A, fast=fast, extra=data + PING, stream=stream)
            stream.close()
            await relay.until(lambda: not relay.pump.connections)


async def test_long_ping_self_send_and_not_here(run_relay: RunRelay) -> None:
    """The vectors whose answer is something else than a Pong."""
    async with run_relay() as relay:
        a, b = await relay.connect(A), await relay.connect(B)
        ping = derp.encode_frame(derp.FrameType.PING, b"abcdefgh" + bytes(992))
        await a.send(ping + packet(A.public(), b"self"))
        assert await a.receive_exactly(2) == [Pong(b"abcdefgh"), RecvPacket(A.public(), b"self")]
        await a.send(packet(NOBODY, DISCO) * 10 + PING)
        assert await a.receive_exactly(4) == [PeerGone(NOBODY, GoneReason.NOT_HERE)] * 3 + PONG
        await a.send(packet(B.public(), b"hello"))
        assert await b.receive_exactly(1) == [RecvPacket(A.public(), b"hello")]
        a.close()
        assert await b.receive_exactly(1) == [PeerGone(A.public(), GoneReason.DISCONNECTED)]


async def test_duplicates_over_sockets(run_relay: RunRelay) -> None:
    """Newest, then last speaker, then the one that is left."""
    async with run_relay() as relay:
        a, first = await relay.connect(A), await relay.connect(B)
        second = await relay.connect(B)
        await a.send(packet(B.public(), b"1"))
        assert await second.receive_exactly(1) == [RecvPacket(A.public(), b"1")]
        await first.send(PING)
        assert await first.receive_exactly(1) == PONG
        await a.send(packet(B.public(), b"2"))
        assert await first.receive_exactly(1) == [RecvPacket(A.public(), b"2")]
        await second.send(PING)
        assert await second.receive_exactly(1) == PONG
        second.close()
        await relay.until(lambda: len(relay.pump.connections) == 2)
        await a.send(packet(B.public(), b"3"))
        assert await first.receive_exactly(1) == [RecvPacket(A.public(), b"3")]


async def test_mesh_over_sockets(run_relay: RunRelay) -> None:
    """A peer with the mesh key watches, forwards and closes."""
    async with run_relay() as relay:
        a, peer = await relay.connect(A), await relay.connect(C, is_mesh=True)
        await peer.send(derp.WATCH_CONNS)
        present = await peer.receive_exactly(2)
        assert [type(frame) for frame in present] == [PeerPresent, PeerPresent]
        await peer.send(derp.encode_forward_packet(B.public(), A.public(), b"hello"))
        assert await a.receive_exactly(1) == [RecvPacket(B.public(), b"hello")]
        await peer.send(derp.encode_close_peer(A.public()))
        assert await a.receive_all() == []
        assert await peer.receive_exactly(1) == [PeerGone(A.public(), 0)]


# --- Slow and silent clients ---------------------------------------------------------------------


async def block(relay: Relay, sender: DerpClient, receiver: DerpClient) -> None:
    """Send until the receiver, which does not read, takes no more."""
    while not relay.connection(receiver).blocked:
        await sender.send(packet(receiver.public, bytes(8192)))
        await trio.lowlevel.checkpoint()


async def test_a_slow_reader_delays_nobody(run_relay: RunRelay, contexts: Contexts) -> None:
    """While one destination is blocked, another gets each packet before the next is sent."""
    async with run_relay(contexts, send_buffer=16384, write_timeout_seconds=60.0) as relay:
        a, b = await relay.connect(A), await relay.connect(B)
        slow = await relay.connect(C, receive_buffer=4096)
        await block(relay, a, slow)
        for number in range(100):
            stamp = number.to_bytes(4, "big")
            await a.send(packet(slow.public, bytes(3000)) * 5 + packet(B.public(), stamp))
            assert await b.receive_exactly(1) == [RecvPacket(A.public(), stamp)]
            assert relay.connection(slow).blocked
        backlog = relay.connection(slow).backlog
        assert backlog is not None
        assert backlog.packets == 32


@pytest.mark.parametrize("with_tls", [False, True], ids=["plain", "TLS"])
async def test_what_waited_arrives_when_the_reader_goes_on(
    run_relay: RunRelay, contexts: Contexts, with_tls: bool
) -> None:
    """The newest 32 packets, intact and in order, after what was on its way already."""
    tls = contexts if with_tls else None
    async with run_relay(tls, send_buffer=16384, write_timeout_seconds=60.0) as relay:
        a, slow = await relay.connect(A), await relay.connect(C, receive_buffer=4096)
        await block(relay, a, slow)
        for number in range(100):
            await a.send(packet(slow.public, number.to_bytes(4, "big") * 250) + PING)
            assert await a.receive_exactly(1) == PONG
        tail: list[bytes] = []
        while len(tail) < 32:
            for frame in await slow.receive():
                assert isinstance(frame, RecvPacket)
                if len(frame.payload) == 1000:
                    tail.append(frame.payload)
        assert tail == [number.to_bytes(4, "big") * 250 for number in range(68, 100)]
        connection = relay.connection(slow)
        await relay.until(lambda: not connection.blocked)
        assert relay.pump.switch.outbox.waiting_bytes == 0
        await a.send(packet(slow.public, b"after"))
        assert await slow.receive_exactly(1) == [RecvPacket(A.public(), b"after")]


async def test_mice_pass_an_elephant_at_a_blocked_destination(run_relay: RunRelay) -> None:
    """Single packets survive the flood of another sender."""
    async with run_relay(send_buffer=16384, write_timeout_seconds=60.0) as relay:
        elephant, slow = await relay.connect(A), await relay.connect(C, receive_buffer=4096)
        mice = [await relay.connect(key(number)) for number in range(10, 20)]
        await block(relay, elephant, slow)
        for mouse in mice:
            await mouse.send(packet(slow.public, b"mouse") + PING)
            assert await mouse.receive_exactly(1) == PONG
            await elephant.send(packet(slow.public, bytes(1000)) * 50 + PING)
            assert await elephant.receive_exactly(1) == PONG
        heard = set()
        while len(heard) < len(mice):
            for frame in await slow.receive():
                if isinstance(frame, RecvPacket) and frame.payload == b"mouse":
                    heard.add(frame.source)
        assert heard == {mouse.public for mouse in mice}


async def test_who_takes_nothing_for_two_seconds_is_closed(
    run_relay: RunRelay, contexts: Contexts, jumping_clock: trio.testing.MockClock
) -> None:
    """The write time-out; what waited is dropped and its memory is free."""
    async with run_relay(contexts, send_buffer=16384) as relay:
        a, slow = await relay.connect(A), await relay.connect(C, receive_buffer=4096)
        await block(relay, a, slow)
        started = trio.current_time()
        connection = relay.connection(slow)
        while not connection.closed:
            await a.send(packet(slow.public, bytes(1000)) * 50)
            await trio.sleep(0.25)
        assert trio.current_time() - started == pytest.approx(2.0, abs=0.3)
        counters = relay.pump.switch.counters
        assert counters.write_timeouts == 1
        assert counters.packets_dropped[DropReason.GONE_DISCONNECTED, Kind.OTHER] >= 32
        assert relay.pump.switch.outbox.waiting_bytes == 0


async def test_a_reader_that_goes_on_in_time_is_kept(
    run_relay: RunRelay, jumping_clock: trio.testing.MockClock
) -> None:
    """Any progress renews the time-out, and one timer is enough for all of it."""
    async with run_relay(send_buffer=16384) as relay:
        a, slow = await relay.connect(A), await relay.connect(C, receive_buffer=4096)
        await block(relay, a, slow)
        connection = relay.connection(slow)
        timers = len(relay.pump._timers)
        for _ in range(12):
            await trio.sleep(1.5)
            while connection.blocked:
                await slow.receive()
                await trio.lowlevel.checkpoint()
            await block(relay, a, slow)
        assert not connection.closed
        assert len(relay.pump._timers) <= timers


async def test_keep_alives_come_every_60_to_65_seconds(
    run_relay: RunRelay, jumping_clock: trio.testing.MockClock
) -> None:
    """Per connection one period, drawn once."""
    async with run_relay() as relay:
        a = await relay.connect(A)
        times = [trio.current_time()]
        for _ in range(3):
            with trio.fail_after(300):
                assert await a.receive() == [KeepAlive()]
            times.append(trio.current_time())
        pauses = [later - earlier for earlier, later in itertools.pairwise(times)]
        assert all(60 <= pause <= 65.1 for pause in pauses)
        assert pauses[1] == pytest.approx(pauses[2], abs=0.05)


async def test_a_client_above_its_rate_is_read_slower(
    run_relay: RunRelay, jumping_clock: trio.testing.MockClock
) -> None:
    """Nothing is lost, and the long-term rate holds; others are read meanwhile."""
    limit = RateLimit(100_000, 70_000)
    async with run_relay(rate_limit=limit) as relay:
        a, b = await relay.connect(A), await relay.connect(B)
        assert a.server_info == ServerInfo(2, 100_000, 70_000)
        started = trio.current_time()
        relay.nursery.start_soon(a.send, packet(B.public(), bytes(10_000)) * 57)
        assert len(await b.receive_exactly(57)) == 57
        elapsed = trio.current_time() - started
        assert elapsed == pytest.approx((57 * 10_037 - 70_000) / 100_000, rel=0.2)
        assert relay.pump.switch.counters.rate_limit_waits > 0
        await b.send(PING)
        assert await b.receive_exactly(1) == PONG


# --- Ends ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["fin", "rst", "half", "garbage"])
@pytest.mark.parametrize("with_tls", [False, True], ids=["plain", "TLS"])
async def test_every_way_to_leave_frees_everything(
    descriptors: None, run_relay: RunRelay, contexts: Contexts, with_tls: bool, how: str
) -> None:
    """Also with data in the very segment that ends it, which is still delivered."""
    async with run_relay(contexts if with_tls else None) as relay:
        b = await relay.connect(B)
        a = await relay.connect(A)
        await a.send(packet(B.public(), b"last"))
        if how == "fin":
            a.close()
        elif how == "rst":
            assert await b.receive_exactly(1) == [RecvPacket(A.public(), b"last")]
            a.reset()
        elif how == "half":
            sock, tls = a.detach()
            if tls is not None:  # a close alert, but the TCP connection stays
                tls.close()
                sock.send(tls.data_to_send())
            else:
                sock.shutdown(socket.SHUT_WR)
        else:
            sock, _ = a.detach()
            sock.send(b"\xff" * 40)
        if how != "garbage" or with_tls:
            expected = [RecvPacket(A.public(), b"last"), PeerGone(A.public(), 0)]
            got = await b.receive_exactly(2 - (how == "rst"))
            assert got == expected[how == "rst" :]
            await relay.until(lambda: len(relay.pump.connections) == 1)
        if how in ("half", "garbage"):
            sock.close()
        b.close()
        await relay.until(lambda: not relay.pump.connections)
        assert tables_are_empty(relay)


async def test_a_close_alert_behind_data_ends_the_connection(
    run_relay: RunRelay, contexts: Contexts
) -> None:
    """Both in one segment: the packet is delivered, and the alert answered."""
    async with run_relay(contexts) as relay:
        a, b = await relay.connect(A), await relay.connect(B)
        sock, tls = a.detach()
        assert tls is not None
        tls.write(packet(B.public(), b"last"))
        tls.close()
        sock.send(tls.data_to_send())
        assert await b.receive_exactly(2) == [
            RecvPacket(A.public(), b"last"),
            PeerGone(A.public(), 0),
        ]
        sock.close()


async def test_timers_of_closed_connections_are_forgotten(run_relay: RunRelay) -> None:
    """The heap stays in proportion to the open connections, however many come and go."""
    async with run_relay() as relay:
        stays = await relay.connect(B)
        for _ in range(100):
            (await relay.connect(A)).close()
            await relay.until(lambda: len(relay.pump.connections) == 1)
            assert len(relay.pump._timers) < 6
        await stays.send(PING)
        assert await stays.receive_exactly(1) == PONG
        assert len(relay.closed) == 100


@pytest.mark.parametrize("with_tls", [False, True], ids=["plain", "TLS"])
async def test_cancellation_closes_everything(
    descriptors: None, run_relay: RunRelay, contexts: Contexts, with_tls: bool
) -> None:
    """Clients see the end of the stream, `on_close` is told, and no descriptor is left."""
    async with run_relay(contexts if with_tls else None, send_buffer=16384) as relay:
        a, slow = await relay.connect(A), await relay.connect(C, receive_buffer=4096)
        await block(relay, a, slow)
    assert tables_are_empty(relay)
    assert {reason for _, reason in relay.closed} == {"the relay stops"}
    assert await a.receive_all() == []
    a.close()
    slow.close()


async def test_on_close_comes_once_with_a_reason(run_relay: RunRelay) -> None:
    """In words for an operator."""
    async with run_relay() as relay:
        a = await relay.connect(A)
        await a.send(raw(0x04, 31))
        await relay.until(lambda: relay.closed)
        ((connection, reason),) = relay.closed
        assert reason == "protocol violation: SEND_PACKET of 31 bytes"
        relay.pump.close(connection, "again")
        assert len(relay.closed) == 1
        assert relay.pump.switch.counters.protocol_violations == 1


async def test_a_flush_that_ends_the_very_client_that_is_read(
    run_relay: RunRelay, contexts: Contexts
) -> None:
    """A full buffer is flushed in the middle of a round; who is closed by it is not read on."""
    for tls in (None, contexts):
        async with run_relay(tls) as relay:
            a, again, b = await relay.connect(A), await relay.connect(A), await relay.connect(B)
            pump = relay.pump
            connection = pump.switch.presence.connections_of(A.public().raw)[0]
            assert isinstance(connection, Connection)
            # Its next write fails, and the buffer is as full as a round can make it.
            connection.sock.shutdown(socket.SHUT_WR)
            pump.switch.outbox.send_to_all(derp.KEEP_ALIVE, [connection])
            pump._used = BUFFER_BYTES
            await a.send(packet(B.public(), b"x") + PING)
            await relay.until(lambda c=connection: c.closed)
            await again.send(packet(B.public(), b"y"))
            assert await b.receive_exactly(1) == [RecvPacket(A.public(), b"y")]
            assert pump.switch.presence.duplicate_keys == 0
            for client in (a, again, b):
                client.close()
            await relay.until(lambda p=pump: not p.connections)


# --- Key updates ---------------------------------------------------------------------------------


class RecordWriter:
    """A TLS 1.3 client's writing half by hand, since `ssl` can't be told to update its keys."""

    def __init__(self, secret: bytes, cipher: str) -> None:
        self._hash = hashlib.sha384 if cipher.endswith("SHA384") else hashlib.sha256
        self._aead = ChaCha20Poly1305 if "CHACHA" in cipher else AESGCM
        self._key_length = 16 if "AES_128" in cipher else 32
        self._use(secret)

    def _use(self, secret: bytes) -> None:
        self._secret = secret
        self._cipher = self._aead(self._expand(b"key", self._key_length))
        self._iv = int.from_bytes(self._expand(b"iv", 12), "big")
        self._sequence = 0

    def _expand(self, label: bytes, length: int) -> bytes:
        label = b"tls13 " + label
        info = struct.pack(">HB", length, len(label)) + label + b"\0\1"
        return hmac.digest(self._secret, info, self._hash().name)[:length]

    def record(self, data: bytes, content_type: int = 23) -> bytes:
        nonce = (self._iv ^ self._sequence).to_bytes(12, "big")
        self._sequence += 1
        header = struct.pack(">BHH", 23, 0x0303, len(data) + 17)
        return header + self._cipher.encrypt(nonce, data + bytes([content_type]), header)

    def key_update(self, *, with_answer: bool) -> bytes:
        record = self.record(bytes([24, 0, 0, 1, with_answer]), content_type=22)
        self._use(self._expand(b"traffic upd", self._hash().digest_size))
        return record


async def test_key_updates_are_answered_and_bounded(
    run_relay: RunRelay, contexts: Contexts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client may ask for as many as it likes, also one that never reads the answers."""
    log = tmp_path / "keys"
    async with run_relay(contexts, send_buffer=16384, write_timeout_seconds=60.0) as relay:
        context = contexts.client()
        context.keylog_filename = str(log)
        stream = HandshakeStream(await relay.open(receive_buffer=4096))
        tls = await stream.start_tls(context, server_side=False, server_hostname="localhost")
        secret = next(
            bytes.fromhex(line.split()[2])
            for line in log.read_text().splitlines()
            if line.startswith("CLIENT_TRAFFIC_SECRET_0 ")
        )
        cipher = tls._object.cipher()
        assert cipher is not None
        writer = RecordWriter(secret, cipher[0])
        flight = encode_upgrade_request("localhost", fast_start=True) + encode_client_info(
            ClientInfo(version=2), A, relay.private.public(), os.urandom(24)
        )
        sock, _ = stream.detach()
        trio_sock = trio.socket.from_stdlib_socket(sock)
        await trio_sock.send(writer.record(flight))
        await relay.until(lambda: relay.pump.connections)
        connection = relay.connection(A.public())
        b = await relay.connect(B)
        # One that reads its answers may have many, and its packets go through.
        sock.setblocking(False)
        for _ in range(50):
            flood = writer.key_update(with_answer=True) + writer.record(derp.KEEP_ALIVE)
            await trio_sock.send(flood)
        await trio_sock.send(writer.record(packet(B.public(), b"still there")))
        assert await b.receive_exactly(1) == [RecvPacket(A.public(), b"still there")]
        # One that reads nothing is closed at a bound, without waiting for a time-out.
        monkeypatch.setattr("relay.pump.MAX_REST_BYTES", 60_000)
        while not connection.closed:
            flood = writer.key_update(with_answer=True) + writer.record(derp.KEEP_ALIVE)
            try:
                await trio_sock.send(flood)
            except OSError:
                break
            assert len(connection.rest or b"") <= 60_000
        await relay.until(lambda: connection.closed)
        ((_, reason),) = relay.closed
        assert "key updates" in reason
        trio_sock.close()
