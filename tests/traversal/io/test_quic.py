"""QUIC connections between our driver's two ends, on loopback and through a bad network."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
import trustme
from hypothesis import given
from hypothesis import strategies as st
from qh3.quic.configuration import QuicConfiguration
from trio.testing import MockClock

from netlab.model import Host, Link, Server, Topology, Uplink
from netlab.simulated.internet import SimulatedInternet
from traversal.io import quic, quic_endpoints
from traversal.io.quic import QuicConnection
from traversal.io.quic_endpoints import QuicLimits, QuicListener, dial_quic
from traversal.io.quic_engine import (
    MAX_STREAMS,
    InitialHeader,
    QuicEngine,
    RetryTokens,
    parse_initial,
)
from traversal.io.quic_stream import QuicError, QuicStream
from traversal.io.spool import MEMORY_BYTES, Spool
from traversal.io.udp import bind_socket

NAME = "quic.test"


@pytest.fixture(scope="module")
def configurations(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[QuicConfiguration, QuicConfiguration]:
    """Server's and client's."""
    directory: Path = tmp_path_factory.mktemp("quic")
    authority = trustme.CA()
    certificate = authority.issue_cert(NAME)
    chain, key, root = directory / "chain", directory / "key", directory / "root"
    chain.write_bytes(b"".join(pem.bytes() for pem in certificate.cert_chain_pems))
    certificate.private_key_pem.write_to_path(str(key))
    authority.cert_pem.write_to_path(str(root))
    server = QuicConfiguration(
        is_client=False,
        alpn_protocols=["test"],
        max_datagram_frame_size=65536,
        idle_timeout=10,
        max_datagram_size=1232,
    )
    server.load_cert_chain(str(chain), str(key))
    client = QuicConfiguration(
        alpn_protocols=["test"],
        server_name=NAME,
        max_datagram_frame_size=65536,
        idle_timeout=10,
        max_datagram_size=1232,
        cafile=str(root),
    )
    return server, client


@asynccontextmanager
async def joined(
    configurations: tuple[QuicConfiguration, QuicConfiguration],
    host: str = "127.0.0.1",
    limits: QuicLimits | None = None,
    max_streams: int = MAX_STREAMS,
) -> AsyncIterator[tuple[QuicConnection, QuicConnection, QuicListener]]:
    """A client's and a server's end of one connection."""
    server, client = configurations
    listener = QuicListener(
        await bind_socket(4, host, 0), server, entropy=os.urandom, limits=limits
    )
    async with trio.open_nursery() as nursery:
        await nursery.start(listener.run)
        near = await dial_quic(nursery, (host, listener.port), client, max_streams=max_streams)
        yield near, await listener.accept(), listener
        nursery.cancel_scope.cancel()


async def test_clients_without_a_connection_id(
    configurations: tuple[QuicConfiguration, QuicConfiguration],
) -> None:
    """A client whose own connection id is empty, as cloudflared's is, connects and is answered."""
    server, client = configurations
    anonymous = dataclasses.replace(client, connection_id_length=0)
    listener = QuicListener(await bind_socket(4, "127.0.0.1", 0), server, entropy=os.urandom)
    async with trio.open_nursery() as nursery:
        await nursery.start(listener.run)
        address = ("127.0.0.1", listener.port)
        sock = await bind_socket(4, "127.0.0.1", 0)
        engine = QuicEngine(anonymous)
        # The library would make this one empty as well, which no real client does.
        engine._original_destination_connection_id = os.urandom(11)
        engine.connect(address, trio.current_time())
        near = QuicConnection(engine, sock, address)

        async def receive() -> None:
            while True:
                for run, step, _ in await sock.receive_runs():
                    near.receive(run, step, address)

        nursery.start_soon(near.run)
        nursery.start_soon(receive)
        with trio.fail_after(10):
            await near.wait_established()
            await exchange(near, await listener.accept(), 100_000)
        nursery.cancel_scope.cancel()
    sock.close()


async def read_all(stream: QuicStream) -> bytes:
    body = bytearray()
    while chunk := await stream.receive():
        body += chunk
    return bytes(body)


async def exchange(near: QuicConnection, far: QuicConnection, size: int) -> None:
    """`size` random bytes both ways on each of two streams, one opened by either end."""
    one = await near.open_stream()
    two = await far.open_stream()
    await one.send(b"1")
    await two.send(b"2")
    one_far = await far.accept_stream()
    two_near = await near.accept_stream()
    assert await one_far.receive() == b"1"
    assert await two_near.receive() == b"2"
    sent = os.urandom(size)
    arrived = []

    async def send(stream: QuicStream) -> None:
        await stream.send(sent)
        await stream.send_end()

    async def receive(stream: QuicStream) -> None:
        arrived.append(await read_all(stream))

    async with trio.open_nursery() as nursery:
        for stream in (one, two, one_far, two_near):
            nursery.start_soon(send, stream)
            nursery.start_soon(receive, stream)
    assert arrived == [sent] * 4


async def test_streams_both_ways(
    configurations: tuple[QuicConfiguration, QuicConfiguration],
) -> None:
    """Bytes arrive whole and in order on streams that either side opened; nothing is left over."""
    async with joined(configurations) as (near, far, _):
        await exchange(near, far, 3_000_000)
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert not near._streams
        assert not far._streams


async def test_a_bad_network(
    configurations: tuple[QuicConfiguration, QuicConfiguration], autojump_clock: MockClock
) -> None:
    """With 5 % loss, jitter that reorders, and an MTU of 1280, everything still arrives, and the
    connection outlives idle times by its keep-alive."""
    link = Link(delay_seconds=0.02, jitter_seconds=0.005, loss=0.05, mtu_bytes=1280)
    topology = Topology(
        hosts=(Host(name="near", uplinks=(Uplink(network="internet", link=link),)),),
        servers=(Server(name="far"),),
        seed=5,
    )
    async with SimulatedInternet(topology) as lab:
        server, client = configurations
        async with lab.host("far"):
            address = lab.host("far").addresses[0]
            listener = QuicListener(await bind_socket(4, address, 0), server, entropy=os.urandom)
        async with trio.open_nursery() as nursery:
            async with lab.host("far"):
                await nursery.start(listener.run)
            async with lab.host("near"):
                near = await dial_quic(nursery, (address, listener.port), client)
                far = await listener.accept()
                await exchange(near, far, 200_000)
                await trio.sleep(60)
                await exchange(near, far, 1000)
            nursery.cancel_scope.cancel()


async def test_slow_reader_is_spooled_and_holds_up_nobody(
    configurations: tuple[QuicConfiguration, QuicConfiguration],
) -> None:
    """More than all windows may wait unread on one stream while another moves on, and is there when
    its reader comes."""
    size = 24 << 20
    async with joined(configurations) as (near, far, _):
        slow, live = await near.open_stream(), await near.open_stream()
        await slow.send(b"s")
        await live.send(b"l")
        slow_far, live_far = await far.accept_stream(), await far.accept_stream()
        with trio.fail_after(60):
            await slow_far.send(bytes(size))
            await slow_far.send_end()
            await live_far.send(b"at once")
            await live_far.send_end()
            assert await read_all(live) == b"at once"
            assert near._spooled > MEMORY_BYTES
            assert await read_all(slow) == bytes(size)
        assert near._spooled == 0


async def test_spool_limit(
    configurations: tuple[QuicConfiguration, QuicConfiguration],
) -> None:
    """A reader that never comes costs no more than the limit: its stream alone is given up."""
    limits = QuicLimits(spooled_bytes=2 << 20)
    async with joined(configurations, limits=limits) as (near, far, _):
        stalled = await near.open_stream()
        await stalled.send(b"x")
        stalled_far = await far.accept_stream()
        with pytest.raises(QuicError):
            await stalled.send(bytes(64 << 20))
        with pytest.raises(QuicError):
            await read_all(stalled_far)
        assert far._spooled == 0
        await exchange(near, far, 100_000)


async def test_a_stalled_reader_delays_nobody(
    configurations: tuple[QuicConfiguration, QuicConfiguration], autojump_clock: MockClock
) -> None:
    """Streams whose windows are full, since their readers have stalled, do not take the room of
    others in a small congestion window: these wait a few round trips once, and never again."""
    server, client = configurations
    # A reader of the library's gives credit for all that it takes; one that takes nothing stalls.
    small = dataclasses.replace(client, max_stream_data=4096)
    link = Link(delay_seconds=0.01)
    topology = Topology(
        hosts=(Host(name="near", uplinks=(Uplink(network="internet", link=link),)),),
        servers=(Server(name="far"),),
        seed=5,
    )
    async with SimulatedInternet(topology) as lab, trio.open_nursery() as nursery:
        async with lab.host("far"):
            address = lab.host("far").addresses[0]
            listener = QuicListener(await bind_socket(4, address, 0), server, entropy=os.urandom)
            await nursery.start(listener.run)
        async with lab.host("near"):
            near = await dial_quic(nursery, (address, listener.port), small)
            far = await listener.accept()
        stalled = [await far.open_stream() for _ in range(3)]
        await trio.sleep(1)
        near._engine._drain_core = lambda: None  # type: ignore[method-assign]
        for stream in stalled:
            nursery.start_soon(stream.send, bytes(200_000))
        await trio.sleep(0.05)
        for limit in (0.2, 0.05, 0.05):
            live = await far.open_stream()
            await live.send(bytes(3000))
            await live.send_end()
            await trio.sleep(limit)
            assert not live._has_unsent
            assert not far._engine.get_send_buffer_size(live.stream_id)
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("max_streams", [MAX_STREAMS, 250])
async def test_limit_of_streams(
    configurations: tuple[QuicConfiguration, QuicConfiguration], max_streams: int
) -> None:
    """As many streams may be open at a time as the other side says, at the beginning and after as
    many were; one more waits for its turn, and the connection goes on."""
    async with joined(configurations, max_streams=max_streams) as (near, far, _):
        for _ in range(2):
            streams = []
            with trio.fail_after(20):
                for _ in range(max_streams):
                    streams.append(await far.open_stream())
                    await streams[-1].send(b"x")
                accepted = [await near.accept_stream() for _ in range(max_streams)]
            with trio.move_on_after(0.05) as waited:
                await far.open_stream()
            assert waited.cancelled_caught
            for stream in (*streams, *accepted):
                stream.abort()
        assert far.failure is None


async def test_reset_and_stop(
    configurations: tuple[QuicConfiguration, QuicConfiguration],
) -> None:
    """Either direction can be given up with a code, and the other direction goes on."""
    async with joined(configurations) as (near, far, _):
        stream = await near.open_stream()
        await stream.send(b"x")
        other = await far.accept_stream()
        assert await other.receive() == b"x"
        stream.reset(7)
        with pytest.raises(QuicError) as caught:
            await other.receive()
        assert caught.value.code == 7
        await other.send(b"still")
        assert await stream.receive() == b"still"
        stream.stop(9)
        with pytest.raises(QuicError) as caught:
            await other.send(bytes(64 << 20))
        assert caught.value.code == 9


async def test_streams_that_begin_with_their_end(
    configurations: tuple[QuicConfiguration, QuicConfiguration],
) -> None:
    """A stream that is reset before any byte of it was sent is accepted and ended on both sides:
    else it would count for ever among those that the other side may have open."""
    async with joined(configurations, max_streams=8) as (near, far, _):
        with trio.fail_after(10):
            for _ in range(50):
                opened = await far.open_stream()
                await opened.send(b"never sent")
                opened.reset(5)
                accepted = await near.accept_stream()
                with pytest.raises(QuicError):
                    await accepted.receive()
                accepted.abort()
                with pytest.raises(QuicError):
                    await opened.receive()
            await exchange(near, far, 1000)


async def test_datagrams(configurations: tuple[QuicConfiguration, QuicConfiguration]) -> None:
    """DATAGRAM frames pass both ways."""
    async with joined(configurations) as (near, far, _):
        near.send_datagram(b"one")
        near.send_datagram(b"two")
        got: list[bytes] = []
        while len(got) < 2:
            got += await far.receive_datagrams()
        assert got == [b"one", b"two"]
        far.send_datagram(bytes(1000))
        assert await near.receive_datagrams() == [bytes(1000)]


async def test_datagrams_that_do_not_fit(
    configurations: tuple[QuicConfiguration, QuicConfiguration],
) -> None:
    """The longest datagram arrives; one byte more is refused and harms nobody."""
    async with joined(configurations) as (near, far, _):
        length = far.max_datagram_bytes
        assert length >= 1180
        with pytest.raises(QuicError):
            far.send_datagram(bytes(length + 1))
        far.send_datagram(bytes(length))
        assert await near.receive_datagrams() == [bytes(length)]


async def test_a_flood_of_datagrams(
    configurations: tuple[QuicConfiguration, QuicConfiguration],
) -> None:
    """Datagrams wait for the congestion window; of more than may wait, the oldest are dropped."""
    async with joined(configurations) as (near, far, _):
        for number in range(3 * quic.MAX_WAITING_DATAGRAMS):
            near.send_datagram(number.to_bytes(4, "big") + bytes(1000))
        got: list[bytes] = []
        while not got or got[-1][:4] != (3 * quic.MAX_WAITING_DATAGRAMS - 1).to_bytes(4, "big"):
            got += await far.receive_datagrams()
        assert got[0][:4] == (2 * quic.MAX_WAITING_DATAGRAMS).to_bytes(4, "big")
        assert len(got) <= quic.MAX_WAITING_DATAGRAMS
        assert near._engine.congestion_room > -2000


async def test_close_reaches_the_other_side(
    configurations: tuple[QuicConfiguration, QuicConfiguration],
) -> None:
    """Closing fails whatever waits at the other end, with the code; the listener forgets it."""
    async with joined(configurations) as (near, far, listener):
        near.close(5, "enough")
        with pytest.raises(QuicError) as caught, trio.fail_after(5):
            await far.accept_stream()
        assert caught.value.code == 5
        assert "enough" in str(caught.value)
        await trio.testing.wait_all_tasks_blocked(0.05)
        assert listener.connections == 0
        assert not listener._by_id


async def test_nobody_there(
    configurations: tuple[QuicConfiguration, QuicConfiguration],
) -> None:
    """A dial that nobody answers fails in time."""
    with await _silent() as sock:
        address = ("127.0.0.1", sock.getsockname()[1])
        async with trio.open_nursery() as nursery:
            with pytest.raises(QuicError, match="no answer"):
                await dial_quic(nursery, address, configurations[1], timeout_seconds=0.2)


async def _silent() -> trio.socket.SocketType:
    sock = trio.socket.socket(trio.socket.AF_INET, trio.socket.SOCK_DGRAM)
    await sock.bind(("127.0.0.1", 0))
    return sock


async def test_retry(
    configurations: tuple[QuicConfiguration, QuicConfiguration], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A listener that wants proof of addresses first still connects honest clients."""
    monkeypatch.setattr(quic_endpoints, "FREE_HANDSHAKES", 0)
    async with joined(configurations) as (near, far, _):
        await exchange(near, far, 10_000)


async def test_unproven_initials_cost_little(
    configurations: tuple[QuicConfiguration, QuicConfiguration],
) -> None:
    """A flood of first datagrams makes no more connections than those that need no proof, and gets
    fewer bytes back than it sent."""
    listener = QuicListener(
        await bind_socket(4, "127.0.0.1", 0), configurations[0], entropy=os.urandom
    )
    async with trio.open_nursery() as nursery:
        await nursery.start(listener.run)
        with await _silent() as sock:
            sent = received = 0
            for number in range(400):
                initial = b"\xc3\0\0\0\1\x08" + number.to_bytes(8, "big") + b"\x08" + bytes(8)
                datagram = initial + b"\0\x44\x60" + os.urandom(1180)
                sent += await sock.sendto(datagram, ("127.0.0.1", listener.port))
                with trio.move_on_after(0.001):
                    received += len(await sock.recv(2000))
            assert listener.connections <= quic_endpoints.FREE_HANDSHAKES
            assert 0 < received < sent
        nursery.cancel_scope.cancel()


@given(st.binary(min_size=1200, max_size=1300), st.booleans())
def test_parse_initial_survives_anything(data: bytes, looks_right: bool) -> None:
    """Whatever comes, there is a header or None."""
    if looks_right:
        data = b"\xc0\0\0\0\1" + data
    header = parse_initial(data)
    assert header is None or 8 <= len(header.destination_id) <= 20


def test_retry_tokens_are_bound() -> None:
    """A token counts from the address it was made for, with its connection id, for ten seconds."""
    tokens = RetryTokens(bytes(32))
    here = ("192.0.2.1", 1000)
    first = InitialHeader(b"original", b"client", b"")
    retry = tokens.encode_retry(first, here, b"retryid!", now=100)
    at = 6 + len(b"client") + 1 + len(b"retryid!")
    again = InitialHeader(b"retryid!", b"client", retry[at:-16])
    assert tokens.original_id(again, here, 105) == b"original"
    assert tokens.original_id(again, here, 200) is None
    assert tokens.original_id(again, ("192.0.2.2", 1000), 105) is None
    assert tokens.original_id(again, ("192.0.2.1", 1001), 105) is None
    moved = dataclasses.replace(again, destination_id=b"otherid!")
    assert tokens.original_id(moved, here, 105) is None


@given(st.lists(st.one_of(st.none(), st.binary(min_size=1, max_size=MEMORY_BYTES // 4))))
def test_spool_is_a_queue(steps: list[bytes | None]) -> None:
    """What is taken is what was appended, in order, whatever went to disk."""
    spool = Spool()
    put = bytearray()
    got = bytearray()
    for step in steps:
        if step is None:
            got += spool.take()
        else:
            spool.append(step)
            put += step
        assert len(spool) == len(put) - len(got)
    while spool:
        got += spool.take()
    assert got == put


async def test_one_source_leaves_room_for_others(
    configurations: tuple[QuicConfiguration, QuicConfiguration], autojump_clock: MockClock
) -> None:
    """Whoever begins many handshakes from one host and ends none takes a share of the places."""
    server, client = configurations
    topology = Topology(servers=tuple(Server(name=name) for name in ("edge", "flood", "honest")))
    limits = QuicLimits(handshakes=16, handshakes_per_source=4)
    async with SimulatedInternet(topology) as lab, trio.open_nursery() as nursery:
        async with lab.host("edge"):
            edge = lab.host("edge").addresses[0]
            sock = await bind_socket(4, edge, 0)
            listener = QuicListener(sock, server, entropy=os.urandom, limits=limits)
            await nursery.start(listener.run)
        async with lab.host("flood"):
            sock = await bind_socket(4, lab.host("flood").addresses[0], 0)
            for _ in range(40):
                engine = QuicEngine(client)
                engine.connect((edge, listener.port), trio.current_time())
                for datagram, _ in engine.datagrams_to_send(trio.current_time()):
                    sock.send(datagram, (edge, listener.port))
            await trio.sleep(1)
            assert listener.connections == 4
        async with lab.host("honest"):
            near = await dial_quic(nursery, (edge, listener.port), client)
            await exchange(near, await listener.accept(), 1000)
        nursery.cancel_scope.cancel()
    assert not listener._handshakes


async def test_long_certificates(tmp_path: Path) -> None:
    """A certificate that is longer than what may be sent before the client's address is validated
    (three times what the client has sent) takes a round trip more, and no more than that is sent to
    a client that does not go on."""
    authority = trustme.CA()
    certificate = authority.issue_cert(NAME, *(f"name-{n}.long.example" for n in range(300)))
    authority.cert_pem.write_to_path(str(tmp_path / "root"))
    server = QuicConfiguration(is_client=False, alpn_protocols=["test"])
    chain = b"".join(pem.bytes() for pem in certificate.cert_chain_pems)
    server.load_cert_chain(chain, certificate.private_key_pem.bytes())
    client = QuicConfiguration(
        alpn_protocols=["test"], server_name=NAME, cafile=str(tmp_path / "root")
    )
    async with joined((server, client)) as (near, far, _):
        await exchange(near, far, 1000)
    near = QuicEngine(client)
    near.connect(("192.0.2.1", 1), 0.0)
    flight = [d for _, some in near.take_datagrams(0.0, 64) for d in some]
    initial = parse_initial(flight[0])
    assert initial is not None
    far = QuicEngine(server, initial)
    for datagram in flight:
        far.receive_datagram(datagram, ("192.0.2.2", 2), 0.0)
    sent, now = 0, 0.0
    while now < 5:
        sent += sum(len(d) for _, some in far.take_datagrams(now, 64) for d in some)
        now = min(far.get_timer() or 5.0, 5.0)
        far.handle_timer(now)
    assert 2 * sum(map(len, flight)) < sent <= 3 * sum(map(len, flight))
