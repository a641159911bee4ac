"""Snapshots: taken of a real pump, encoded, merged."""

from __future__ import annotations

import dataclasses
import os
import random
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import msgspec
import pytest
import trio

from relay.admission import AdmissionStatistics
from relay.certificates import CertificateStatus
from relay.counters import DropReason, Kind
from relay.limits import AcceptStatistics, TokenBucket
from relay.mesh import LinkState
from relay.pump import Connection, Pump
from relay.refusals import Refusals, Stage
from relay.sampling import HISTORY_SAMPLES, RTT_LABELS, Rates, Sampler, check_pump
from relay.snapshot import MAX_CLIENTS, MeshLink, Resources, Snapshot, merge
from relay.stun import StunStatistics
from relay.upgrade import RateLimit
from traversal.keys import NodePrivate, NodePublic
from traversal.wire.derp import encode_note_preferred, encode_send_packet

SERVER = NodePrivate.generate(random.Random(0).randbytes).public()


def key(number: int) -> NodePublic:
    return NodePublic(number.to_bytes(32, "big"))


class Relay:
    """A running pump, with what a snapshot of it needs."""

    def __init__(self, pump: Pump) -> None:
        self.pump = pump
        self.sampler = Sampler(pump)
        self.refusals = Refusals(Stage, 0.0)
        self.sockets: list[socket.socket] = []

    def connect(self, number: int, **options: object) -> socket.socket:
        ours, theirs = socket.socketpair()
        theirs.setblocking(False)
        self.sockets.append(ours)
        self.pump.adopt(Connection(key(number), theirs, None, **options), b"", b"")  # type: ignore[arg-type]
        return ours

    def snapshot(self, **options: object) -> Snapshot:
        return Snapshot.of(
            self.pump,
            hostname="relay.example.com",
            version="1.2.3",
            server_key=SERVER,
            now=trio.current_time(),
            unix_time=1_800_000_000.0,
            started_at=trio.current_time() - 100,
            sampler=self.sampler,
            refusals=self.refusals,
            accepts=AcceptStatistics(accepted=4, rejected=1),
            websocket_accepts=1,
            tls_handshakes={"TLSv1.3": 3},
            **options,  # type: ignore[arg-type]
        )


@asynccontextmanager
async def relay() -> AsyncIterator[Relay]:
    """Runs until the block ends."""
    async with trio.open_nursery() as nursery:
        pump = Pump(SERVER, randomness=random.Random(1))
        await nursery.start(pump.run)
        subject = Relay(pump)
        try:
            yield subject
        finally:
            nursery.cancel_scope.cancel()
            for sock in subject.sockets:
                sock.close()


ADMISSION = AdmissionStatistics(
    allowed=3,
    denied=2,
    cut=1,
    reloads=0,
    reload_failures=0,
    hook_requests=7,
    hook_failures=0,
    hook_cached_answers=0,
    hook_failed_open=0,
    hook_is_failing=True,
)


def certificate(not_after_unix: int) -> CertificateStatus:
    return CertificateStatus("files", "relay.example.com", True, not_after_unix, None, 1, 0)


class TestSnapshot:
    async def test_shows_clients_and_traffic(self) -> None:
        """What was sent between two clients is in both their lines and in the sums."""
        async with relay() as subject:
            bucket = TokenBucket(1e6, 1e6, trio.current_time())
            one = subject.connect(1, bucket=bucket, connected_at=trio.current_time() - 5)
            subject.connect(2, is_prober=True)
            one.send(encode_note_preferred(True) + encode_send_packet(key(2), b"hello"))
            one.send(encode_send_packet(key(3), b"nobody"))
            await trio.testing.wait_all_tasks_blocked(0.01)
            snapshot = subject.snapshot()
            assert (snapshot.connections.current, snapshot.connections.home) == (2, 1)
            assert snapshot.traffic.packets_received == {"disco": 0, "other": 2}
            assert snapshot.traffic.packets_dropped["unknown_dest"]["other"] == 1
            assert set(snapshot.traffic.packets_dropped) == set(DropReason)
            first, second = snapshot.clients
            assert (first.key, first.short) == (str(key(1)), key(1).short())
            assert (first.packets_in, first.bytes_in, first.packets_dropped) == (2, 11, 1)
            assert first.rate_limit_bytes_per_second == 1e6
            assert first.connected_seconds == pytest.approx(5, abs=1)
            assert (second.packets_out, second.bytes_out, second.is_prober) == (1, 5, True)
            assert snapshot.uptime_seconds == pytest.approx(100, abs=1)
            assert snapshot.resources.memory_bytes > 1 << 20
            assert snapshot.resources.open_descriptors >= 5

    async def test_survives_json(self) -> None:
        """Workers send theirs to the one that answers."""
        async with relay() as subject:
            subject.connect(1)
            subject.refusals.note(Stage.TLS, "192.0.2.1", "no", 0.0)
            snapshot = subject.snapshot(
                stun=StunStatistics(success=4),
                admission=ADMISSION,
                certificate=certificate(1_000_000_000),
                rate_limit=RateLimit(1000, 2000),
            )
            text = msgspec.json.encode(snapshot)
            assert msgspec.json.decode(text, type=Snapshot) == snapshot
            assert snapshot.refusals["tls"] == 1
            assert snapshot.admission is not None
            assert snapshot.admission.hook_requests == 7

    async def test_links_are_no_clients(self) -> None:
        """Neither those to other relays nor those between workers."""
        async with relay() as subject:
            subject.connect(1, is_outgoing=True, port=443)
            subject.connect(2, is_outgoing=True, is_sibling=True)
            subject.connect(3, is_sibling=True)
            subject.connect(4, is_mesh=True)
            link = LinkState("b.example.com:443", is_up=False, problem="refused")
            snapshot = subject.snapshot(mesh_links=[link])
            assert snapshot.connections.current == 1
            assert [client.key for client in snapshot.clients] == [str(key(4))]
            (view,) = snapshot.mesh_links
            assert view == MeshLink(name="b.example.com:443", is_up=False, problem="refused")

    async def test_waiting_packets_are_seen(self) -> None:
        """Of a client that does not read, in its line and in the sum."""
        async with relay() as subject:
            one = subject.connect(1)
            subject.connect(2)
            one.setblocking(False)
            frame = encode_send_packet(key(2), bytes(60000))
            for _ in range(20):
                try:
                    one.send(frame)
                except BlockingIOError:
                    break
                await trio.testing.wait_all_tasks_blocked(0.002)
            snapshot = subject.snapshot()
            waiting = next(client for client in snapshot.clients if client.key == str(key(2)))
            assert waiting.waiting_packets > 0
            assert waiting.waiting_bytes == snapshot.connections.waiting_bytes
            assert waiting.waiting_packets == snapshot.connections.waiting_packets

    async def test_the_list_is_bounded(self) -> None:
        """The busiest are kept, the others counted."""
        async with relay() as subject:
            clients = [subject.connect(number) for number in (1, 2, 3)]
            clients[1].send(encode_send_packet(key(9), b"x"))
            await trio.testing.wait_all_tasks_blocked(0.01)
            snapshot = subject.snapshot(max_clients=1)
            assert [client.key for client in snapshot.clients] == [str(key(2))]
            assert snapshot.clients_left_out == 2
            assert subject.snapshot(max_clients=0).clients == ()

    def test_resources_are_this_process(self) -> None:
        """Opening a descriptor adds one."""
        before = Resources.read().open_descriptors
        descriptor = os.open("/dev/null", os.O_RDONLY)
        try:
            assert Resources.read().open_descriptors == before + 1
        finally:
            os.close(descriptor)


class TestMerge:
    async def test_adds_workers_up(self) -> None:
        """Sums of counts, all clients, the first certificate to expire."""
        async with relay() as one, relay() as two:
            one.connect(1)
            two.connect(2)
            two.connect(3)
            counters = one.pump.switch.counters, two.pump.switch.counters
            for each in counters:
                each.drop(DropReason.QUEUE_HEAD, Kind.DISCO, 10)
                each.queue_delay.observe(0.0003, 2)
            snapshots = [
                one.snapshot(
                    stun=StunStatistics(success=1),
                    certificate=certificate(2_000_000_000),
                ),
                two.snapshot(
                    stun=StunStatistics(success=2),
                    certificate=certificate(1_000_000_000),
                    is_draining=True,
                ),
            ]
            merged = merge(snapshots)
            assert merged.workers == 2
            assert merged.is_draining
            assert merged.connections.current == 3
            assert {client.key for client in merged.clients} == {str(key(n)) for n in (1, 2, 3)}
            assert merged.traffic.accepts == 3
            assert merged.traffic.bytes_dropped["queue_head"]["disco"] == 20
            assert sum(merged.queue_delay.counts) == 4
            assert merged.queue_delay.total_seconds == pytest.approx(0.0012)
            assert merged.stun == StunStatistics(success=3)
            assert merged.admission is None
            assert merged.tls_handshakes == {"1.2": 0, "1.3": 6}
            assert merged.certificate is not None
            assert merged.certificate.not_after_unix == 1_000_000_000
            assert merge(snapshots[:1]) == snapshots[0]

    async def test_other_workers_keys_are_not_remote(self) -> None:
        """To each worker the others' keys are elsewhere; to the relay they are not."""
        async with relay() as one:
            first = one.snapshot()
            first, second = (
                msgspec.structs.replace(
                    first,
                    connections=msgspec.structs.replace(
                        first.connections, local_keys=local, remote_keys=remote
                    ),
                )
                # 5 keys of the region are connected to another host.
                for local, remote in ((10, 25), (20, 15))
            )
            connections = merge([first, second]).connections
            assert (connections.local_keys, connections.remote_keys) == (30, 5)

    async def test_the_list_stays_bounded(self) -> None:
        """However many workers there are."""
        async with relay() as subject:
            subject.connect(1)
            snapshot = subject.snapshot()
            many = msgspec.structs.replace(snapshot, clients=snapshot.clients * MAX_CLIENTS)
            merged = merge([many, many])
            assert len(merged.clients) == MAX_CLIENTS
            assert merged.clients_left_out == MAX_CLIENTS

    async def test_a_mesh_link_is_up_when_all_workers_have_it(self) -> None:
        """Otherwise the reason is one of theirs."""
        async with relay() as subject:
            up, down = (
                msgspec.structs.replace(subject.snapshot(), mesh_links=(link,))
                for link in (
                    MeshLink(name="b", is_up=True, problem=""),
                    MeshLink(name="b", is_up=False, problem="refused"),
                )
            )
            assert merge([up, down]).mesh_links == merge([down, up]).mesh_links == down.mesh_links
            assert merge([up, up]).mesh_links == up.mesh_links

    async def test_what_is_true_for_one_worker_is_true(self) -> None:
        """A hook that fails for one of them fails."""
        async with relay() as subject:
            calm = dataclasses.replace(ADMISSION, hook_is_failing=False)
            snapshots = [subject.snapshot(admission=each) for each in (calm, ADMISSION)]
            merged = merge(snapshots).admission
            assert merged is not None
            assert (merged.hook_is_failing, merged.hook_requests) == (True, 14)

    async def test_rates(self) -> None:
        """Sums, the mean delay weighted by packets, histories aligned at their ends."""
        async with relay() as subject:
            snapshot = subject.snapshot()
            rates = (
                Rates(packets_per_second=1, queue_delay_ms=4, history=(1.0, 2.0, 3.0)),
                Rates(packets_per_second=3, queue_delay_ms=0, history=(10.0,)),
            )
            merged = merge([msgspec.structs.replace(snapshot, rates=each) for each in rates])
            assert merged.rates.packets_per_second == 4
            assert merged.rates.queue_delay_ms == 1
            assert merged.rates.history == (1.0, 2.0, 13.0)


class TestSampler:
    async def test_a_pump_that_serves(self) -> None:
        """It answers, and nobody else notices the question."""
        async with relay() as subject:
            assert await check_pump(subject.pump) == ""
            assert subject.pump.switch.counters.accepts == 0
            assert not subject.pump.connections

    async def test_a_pump_that_does_not(self, autojump_clock: trio.testing.MockClock) -> None:
        """Whether it hangs or has ended."""
        pump = Pump(SERVER, randomness=random.Random(1))
        assert "did not answer" in await check_pump(pump)
        assert not pump.connections
        with trio.move_on_after(0):
            await pump.run()
        assert "takes no connections" in await check_pump(pump)

    async def test_rates_and_rtt(self, autojump_clock: trio.testing.MockClock) -> None:
        """Every 10 s; a socket that is not TCP has no RTT."""
        async with relay() as subject, trio.open_nursery() as nursery:
            subject.connect(1)
            nursery.start_soon(subject.sampler.run)
            counters = subject.pump.switch.counters
            counters.packets_sent += 50
            counters.bytes_sent += 1000
            counters.queue_delay.observe(0.002, 50)
            counters.drop(DropReason.QUEUE_TAIL, Kind.OTHER, 7, packets=20)
            await trio.sleep(11)
            rates = subject.sampler.rates
            assert rates.packets_per_second == pytest.approx(5)
            assert rates.bytes_per_second == pytest.approx(100)
            assert rates.drops_per_second == pytest.approx(2)
            assert rates.queue_delay_ms == pytest.approx(2)
            assert subject.sampler.rtt["non-tcp"] == 1
            await trio.sleep(10 * HISTORY_SAMPLES + 5)
            assert subject.sampler.rates.bytes_per_second == 0
            assert len(subject.sampler.rates.history) == HISTORY_SAMPLES
            nursery.cancel_scope.cancel()

    async def test_tcp_rtt(self, autojump_clock: trio.testing.MockClock) -> None:
        """The kernel's word for it: on loopback it is below 10 ms."""
        async with relay() as subject, trio.open_nursery() as nursery:
            with socket.create_server(("127.0.0.1", 0)) as listener:
                near = socket.create_connection(listener.getsockname())
                far, _ = listener.accept()
                far.setblocking(False)
                subject.sockets.append(near)
                subject.pump.adopt(Connection(key(1), far, None), b"", b"")
                nursery.start_soon(subject.sampler.run)
                await trio.sleep(11)
            assert subject.sampler.rtt["10ms"] == 1
            assert tuple(subject.sampler.rtt) == RTT_LABELS
            nursery.cancel_scope.cancel()
