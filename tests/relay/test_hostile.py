"""Hostile and broken clients: the others' traffic goes on, memory stays bounded, all is counted."""

from __future__ import annotations

import logging
import os
import random
import resource
import socket
import ssl

import pytest
import trio

from relay.refusals import Stage
from tests.relay.arena import arena, new_key
from traversal.io.dial import DialError
from traversal.io.stream import HandshakeStream, StreamEndedError
from traversal.wire.derp import ClientInfo, FrameType, encode_client_info, encode_send_packet
from traversal.wire.derp_upgrade import encode_upgrade_request


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


async def test_connections_that_never_speak_leave_room_for_others() -> None:
    """One source may hold a quarter of `limits.handshakes`; others get in meanwhile, and when the
    silent ones go, their room is back."""
    async with arena(limits__handshakes=20) as stage:
        silent = [await stage.tcp("127.0.0.9") for _ in range(30)]
        await stage.until_refused(Stage.HANDSHAKES, 25)
        await stage.converse()
        for sock in silent:
            sock.close()
        await stage.until_refused(Stage.TLS, 5)
        assert not stage.service._handshakes


async def test_handshakes_of_all_sources_together_are_bounded() -> None:
    """Beyond `limits.handshakes` in all, whoever comes is turned away."""
    async with arena(limits__handshakes=8) as stage:
        silent = [await stage.tcp(f"127.0.0.{10 + number // 2}") for number in range(12)]
        await stage.until_refused(Stage.HANDSHAKES, 4)
        assert stage.service._handshakes.total() == 8
        for sock in silent:
            sock.close()
        await stage.until_refused(Stage.TLS, 8)
        await stage.converse()


async def test_a_silent_client_is_cut_after_ten_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    """A TLS handshake that does not go on ends by its deadline (shortened here)."""
    monkeypatch.setattr("relay.service.TLS_TIMEOUT_SECONDS", 0.05)
    async with arena() as stage:
        with await stage.tcp() as sock:
            await sock.send(b"\x16")
            with trio.fail_after(10):
                assert await sock.recv(1) == b""
        await stage.until_refused(Stage.TLS, 1)


async def test_a_client_that_never_reads_costs_a_bounded_amount() -> None:
    """Its packets are dropped beyond its queue, it is closed after 2 s, and others go on."""
    async with arena() as stage:
        deaf_key, flooder_key = new_key(), new_key()
        deaf, flooder = await stage.connect(deaf_key), await stage.connect(flooder_key)
        deaf.stream._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        packet = encode_send_packet(deaf_key.public(), bytes(8000))
        switch = stage.service.pump.switch
        most = 0

        async def flood() -> None:
            nonlocal most
            while True:
                await flooder.stream.send_all(packet * 20)
                most = max(most, switch.outbox.waiting_bytes)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(flood)
            deadline = trio.current_time() + 20
            while switch.counters.write_timeouts == 0:
                assert trio.current_time() < deadline
                await stage.converse()
            nursery.cancel_scope.cancel()
        assert most <= 32 * (8000 + 37)
        assert switch.outbox.waiting_bytes == 0
        assert sum(switch.counters.packets_dropped.values()) > 0


async def test_bad_handshakes_are_counted_and_logged_at_a_bounded_rate(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Garbage instead of TLS: each is counted, a few are logged, no descriptor leaks."""
    caplog.set_level(logging.INFO)
    generator = random.Random(1)
    attempts = 1000
    async with arena() as stage:
        await stage.converse()
        before = open_descriptors()

        async def attack() -> None:
            for _ in range(attempts // 10):
                with await stage.tcp() as sock:
                    await sock.send(generator.randbytes(generator.randrange(1, 600)))

        async with trio.open_nursery() as nursery:
            for _ in range(10):
                nursery.start_soon(attack)
            nursery.start_soon(stage.converse)
        await stage.until_refused(Stage.TLS, attempts)
        await stage.converse()
        assert open_descriptors() <= before + 2
        lines = [record for record in caplog.records if "refused" in record.getMessage()]
        assert 20 <= len(lines) <= 100


async def test_a_conversation_cut_at_every_byte() -> None:
    """Whatever a client has sent when it vanishes, nothing of it stays."""
    async with arena() as stage:
        key = new_key()
        info = encode_client_info(ClientInfo(version=2), key, stage.server_key, os.urandom(24))
        everything = (
            encode_upgrade_request("127.0.0.1", fast_start=True)
            + info
            + encode_send_packet(key.public(), b"to myself")
        )
        for length in range(len(everything)):
            stream = HandshakeStream(await stage.tcp())
            await stream.start_tls(_unchecked(), server_side=False)
            await stream.send_all(everything[:length])
            stream.close()
        deadline = trio.current_time() + 10
        while stage.service.pump.connections or stage.service._handshakes:
            assert trio.current_time() < deadline
            await trio.sleep(0.01)
        await stage.converse()


@pytest.mark.parametrize(
    "frame",
    [
        bytes([FrameType.SEND_PACKET]) + (65569).to_bytes(4, "big"),
        bytes([FrameType.SEND_PACKET]) + (31).to_bytes(4, "big"),
        bytes([FrameType.PING]) + (1001).to_bytes(4, "big"),
        bytes([FrameType.FORWARD_PACKET]) + (64).to_bytes(4, "big") + bytes(64),
        bytes([FrameType.WATCH_CONNS]) + bytes(4),
        bytes([FrameType.CLOSE_PEER]) + (32).to_bytes(4, "big") + bytes(32),
    ],
    ids=["oversized", "undersized", "long-ping", "forward", "watch", "close"],
)
async def test_a_violation_ends_that_client_only(frame: bytes) -> None:
    """The connection is closed at the frame's header, counted, and the others go on."""
    async with arena() as stage:
        offender = await stage.connect()
        await offender.stream.send_all(frame)
        with trio.fail_after(10), pytest.raises(StreamEndedError):
            await offender.receive_frames()
        assert stage.service.pump.switch.counters.protocol_violations == 1
        await stage.converse()


async def test_a_flood_of_clients_past_the_limits() -> None:
    """Per address and in all; whoever is in stays in, and a place that gets free is given away."""
    async with arena(limits__connections_per_ip=5) as stage:
        inside = [await stage.connect() for _ in range(5)]
        for _ in range(5):
            with pytest.raises(DialError):
                await stage.connect()
        assert stage.refused(Stage.CONNECTIONS_PER_IP) == 5
        inside[0].close()
        deadline = trio.current_time() + 10
        while len(stage.service.pump.connections) > 4:
            assert trio.current_time() < deadline
            await trio.sleep(0.01)
        await stage.connect()


async def test_an_accept_rate_sheds_and_recovers() -> None:
    """Over the rate connections are closed at once; the relay goes on, unlike derper."""
    async with arena(limits__accept_rate_per_second=20, limits__accept_burst=5) as stage:
        for _ in range(30):
            (await stage.tcp()).close()
        await stage.until_refused(Stage.ACCEPT_RATE, 10)
        await trio.sleep(0.3)  # the bucket fills in real time
        await stage.converse()


async def test_running_out_of_descriptors_is_survived(caplog: pytest.LogCaptureFixture) -> None:
    """accept() fails while there are none, says what to do, and works again afterwards."""
    async with arena() as stage:
        await stage.converse()
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        sockets = [trio.socket.socket() for _ in range(3)]
        fillers: list[int] = []
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (max_descriptor() + 1, hard))
            fillers = fill_descriptors()
            for sock in sockets:
                await sock.connect(("127.0.0.1", stage.port))
            deadline = trio.current_time() + 10
            while not any("can't accept" in record.getMessage() for record in caplog.records):
                assert trio.current_time() < deadline
                await trio.sleep(0.01)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            for filler in fillers:
                os.close(filler)
            for sock in sockets:
                sock.close()
        await stage.converse()


def fill_descriptors() -> list[int]:
    fillers = []
    try:
        while True:
            fillers.append(os.dup(0))
    except OSError:
        return fillers  # EMFILE


def max_descriptor() -> int:
    return max(int(name) for name in os.listdir("/proc/self/fd"))


def _unchecked() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context
