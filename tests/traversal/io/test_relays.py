"""Relay connections: queues, silence, backoff, rate limits, restarts, proxies."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from traversal.io.net_check import NetCheck
from traversal.io.proxy import Proxy, ProxyError
from traversal.io.relay_client import RelayClient, RelayOptions
from traversal.io.relays import Relays
from traversal.io.resolver import Resolver
from traversal.io.udp import UdpSockets
from traversal.keys import NodePrivate
from traversal.paths.report import Report
from traversal.relay_map import RelayMap
from traversal.wire.derp import ServerInfo, encode_recv_packet

REAL_IDLE_SECONDS = 0.05
"""The sockets are real, so the virtual clock waits for them."""


class Handler:
    """Remembers what relays tell."""

    def __init__(self) -> None:
        self.packets: list[tuple[int, bytes, bytes]] = []
        self.gone: list[tuple[int, bytes]] = []
        self.changes: list[tuple[int, bool]] = []
        self.restarting: list[int] = []
        self.is_up = trio.Event()

    def handle_relay_packet(self, region: int, source: bytes, payload: bytes) -> None:
        self.packets.append((region, source, payload))

    def handle_peer_gone(self, region: int, key: bytes) -> None:
        self.gone.append((region, key))

    def handle_relay_change(self, region: int, *, is_up: bool) -> None:
        self.changes.append((region, is_up))
        if is_up:
            self.is_up.set()

    def handle_relay_restarting(self, region: int) -> None:
        self.restarting.append(region)


def client_of(relay: Any, handler: Handler, key: NodePrivate | None = None) -> RelayClient:
    return RelayClient(
        relay.region,
        key or NodePrivate.generate(os.urandom),
        handler,
        options=RelayOptions(plain=True),
        rng=random.Random(1),
    )


async def until(condition: Callable[[], object]) -> None:
    with trio.fail_after(5):
        while not condition():  # noqa: ASYNC110
            await trio.sleep(0.002)


@pytest.fixture
async def relay(nursery: trio.Nursery, tiny_relay: Callable[..., Any]) -> Any:
    relay = tiny_relay()
    await nursery.start(relay.serve)
    return relay


async def test_queue_drops_its_oldest(relay: Any, nursery: trio.Nursery) -> None:
    """Before the connection is there, the last 32 packets wait."""
    handler = Handler()
    client = client_of(relay, handler)
    for number in range(40):
        client.send(bytes(32), b"%d" % number)
    nursery.start_soon(client.run)
    await until(lambda: len(relay.packets) == 32)
    assert [int(payload) for _, _, payload in relay.packets] == list(range(8, 40))
    assert client.statistics().packets_dropped == 8
    await until(lambda: handler.gone)
    assert handler.gone[0] == (900, bytes(32))
    with pytest.raises(ValueError, match="at most 65536"):
        client.send(bytes(32), bytes(65537))


async def test_packets_pass(relay: Any, nursery: trio.Nursery) -> None:
    """What one client sends, the other gets, with the sender's key."""
    keys = [NodePrivate.generate(os.urandom) for _ in range(2)]
    handlers = [Handler(), Handler()]
    clients = [client_of(relay, h, k) for h, k in zip(handlers, keys, strict=True)]
    for client in clients:
        nursery.start_soon(client.run)
        await client.wait_connected()
    await until(lambda: len(relay.clients) == 2)
    payload = os.urandom(60_000)
    clients[0].send(keys[1].public().raw, payload)
    await until(lambda: handlers[1].packets)
    assert handlers[1].packets == [(900, keys[0].public().raw, payload)]


async def test_announced_rate_is_kept(nursery: trio.Nursery, tiny_relay: Any) -> None:
    """Packets beyond the server's token bucket are dropped here, not there."""
    info = ServerInfo(token_bucket_bytes_per_second=1000, token_bucket_bytes_burst=2000)
    relay = tiny_relay(info=info)
    await nursery.start(relay.serve)
    client = client_of(relay, Handler())
    nursery.start_soon(client.run)
    await client.wait_connected()
    for _ in range(10):
        client.send(bytes(32), bytes(463))  # 500 bytes each with the header
    await until(lambda: client.statistics().packets_dropped)
    assert client.statistics().packets_sent == 4


async def test_dropped_connection_comes_back(relay: Any, nursery: trio.Nursery) -> None:
    """After an end the client is back at once, and tells its owner of both."""
    handler = Handler()
    client = client_of(relay, handler)
    client.set_home(True)
    nursery.start_soon(client.run)
    await until(lambda: relay.homes)
    relay.drop_clients()
    await until(lambda: relay.connects == 2)
    await until(lambda: handler.changes[-1] == (900, True))
    assert handler.changes == [(900, True), (900, False), (900, True)]


async def test_unreachable_relay_is_retried_with_backoff(
    autojump_clock: MockClock, relay: Any, nursery: trio.Nursery
) -> None:
    """Attempts get rarer, to one in five seconds, and the reason is told."""
    relay.scope.cancel()
    await trio.testing.wait_all_tasks_blocked()
    handler = Handler()
    client = client_of(relay, handler)
    nursery.start_soon(client.run)
    await trio.sleep(60)
    assert 25 < len(handler.changes) < 60
    assert "can't connect: 127.0.0.1: Connection refused" in client.statistics().last_error


async def test_backoff_grows_and_is_reset(
    autojump_clock: MockClock, relay: Any, nursery: trio.Nursery
) -> None:
    """Connections that end at once are made more and more rarely, each time after another pause;
    after one that lived for ten seconds the next is made at once."""
    autojump_clock.autojump_threshold = REAL_IDLE_SECONDS
    handler = Handler()
    client = client_of(relay, handler)
    nursery.start_soon(client.run)

    async def reconnect() -> float:
        began, handler.is_up = trio.current_time(), trio.Event()
        relay.drop_clients()
        await handler.is_up.wait()
        return trio.current_time() - began

    await client.wait_connected()
    pauses = [await reconnect() for _ in range(12)]
    assert sum(pauses[-3:]) > 5 * sum(pauses[:3])
    assert pauses[-1] > 0.5 * 12**2 * 0.01
    assert len(set(pauses)) == len(pauses)
    await trio.sleep(11)
    assert await reconnect() < 0.1


async def test_t13_rebind_replaces_connections(
    autojump_clock: MockClock, relay: Any, nursery: trio.Nursery
) -> None:
    """Conformance row T13: after a change of our addresses, a connection from one that is gone is
    replaced at once, without waiting for TCP; one that may live is asked and stays."""
    autojump_clock.autojump_threshold = REAL_IDLE_SECONDS
    handler = Handler()
    client = client_of(relay, handler)
    nursery.start_soon(client.run)
    await client.wait_connected()
    client.handle_network_change(frozenset({"127.0.0.1", "192.0.2.7"}))
    await trio.sleep(4)
    assert relay.connects == 1
    client.handle_network_change(frozenset({"192.0.2.7"}))
    await trio.sleep(0.5)
    assert relay.connects == 2
    assert client.is_connected
    assert handler.changes == [(900, True), (900, False), (900, True)]


async def test_other_nodes_of_the_region(
    relay: Any, nursery: trio.Nursery, tiny_relay: Any
) -> None:
    """Where a region's first node refuses, or talks nonsense, the next one is used at once."""

    async def talk_nonsense(stream: trio.SocketStream) -> None:
        async with stream:
            await stream.send_all(b"220 mail.test ESMTP\r\n\r\n")

    listeners = await nursery.start(trio.serve_tcp, talk_nonsense, 0)
    (good,) = relay.region.nodes
    nonsense = replace(good, name="900x", derp_port=listeners[0].socket.getsockname()[1])
    region = replace(relay.region, nodes=(replace(good, name="900y", derp_port=1), nonsense, good))
    client = RelayClient(
        region,
        NodePrivate.generate(os.urandom),
        Handler(),
        options=RelayOptions(plain=True),
        rng=random.Random(1),
    )
    nursery.start_soon(client.run)
    with trio.fail_after(1):
        await client.wait_connected()
    assert client.statistics().server == f"127.0.0.1:{relay.port}"


async def test_first_node_is_silent(
    autojump_clock: MockClock, relay: Any, nursery: trio.Nursery
) -> None:
    """A first node of the region that takes the connection and says nothing gets company after
    1.5 s; the second carries the packets."""
    autojump_clock.autojump_threshold = REAL_IDLE_SECONDS

    async def say_nothing(stream: trio.SocketStream) -> None:
        async with stream:
            await trio.sleep_forever()

    listeners = await nursery.start(trio.serve_tcp, say_nothing, 0)
    (good,) = relay.region.nodes
    silent = replace(good, name="900x", derp_port=listeners[0].socket.getsockname()[1])
    client = RelayClient(
        replace(relay.region, nodes=(silent, good)),
        NodePrivate.generate(os.urandom),
        Handler(),
        options=RelayOptions(plain=True),
        rng=random.Random(1),
    )
    began = trio.current_time()
    nursery.start_soon(client.run)
    await client.wait_connected()
    assert trio.current_time() - began == pytest.approx(1.5, abs=0.1)
    await trio.sleep(60)
    assert client.statistics().server == f"127.0.0.1:{relay.port}"
    assert relay.connects == 1


async def test_restart_with_another_node(
    autojump_clock: MockClock, relay: Any, nursery: trio.Nursery, tiny_relay: Any
) -> None:
    """The other node of the region takes over, when it is our turn; what still comes by the old
    connection is not lost, and that ends by itself."""
    autojump_clock.autojump_threshold = REAL_IDLE_SECONDS
    other = tiny_relay()
    await nursery.start(other.serve)
    (first,), (second,) = relay.region.nodes, other.region.nodes
    handler = Handler()
    client = RelayClient(
        replace(relay.region, nodes=(first, replace(second, name="900b"))),
        key := NodePrivate.generate(os.urandom),
        handler,
        options=RelayOptions(plain=True),
        rng=random.Random(1),
    )
    nursery.start_soon(client.run)
    await client.wait_connected()
    (old,) = relay.clients.values()
    await relay.say_restarting(4000)
    await trio.sleep(1.9)
    assert other.connects == 0
    await trio.sleep(2.2)
    assert other.connects == 1
    assert client.statistics().server == f"127.0.0.1:{other.port}"
    sender = key.public()
    for server in (relay, other):
        await server.clients[key.public().raw].send_all(encode_recv_packet(sender, b"late"))
    await trio.sleep(0.1)
    assert [payload for _, _, payload in handler.packets] == [b"late", b"late"]
    assert handler.changes == [(900, True)] * 2
    assert handler.restarting == []
    await trio.sleep(5)
    assert key.public().raw not in relay.clients
    assert client.is_connected
    assert old is not other.clients[key.public().raw]


async def test_restart_of_the_only_node(
    autojump_clock: MockClock, relay: Any, nursery: trio.Nursery
) -> None:
    """The owner is told when it is our turn, or when the server has gone before."""
    autojump_clock.autojump_threshold = REAL_IDLE_SECONDS
    for wait_ms, drops in ((2000, False), (20_000, True)):
        handler = Handler()
        client = client_of(relay, handler)
        nursery.start_soon(client.run)
        await client.wait_connected()
        await relay.say_restarting(wait_ms)
        await trio.sleep(0.9)
        assert handler.restarting == []
        if drops:
            relay.drop_clients()
        await trio.sleep(1.2)
        assert handler.restarting == [900]


async def test_server_that_is_always_about_to_restart(
    autojump_clock: MockClock, relay: Any, nursery: trio.Nursery
) -> None:
    """One that sends us away whenever we come is asked ever more rarely."""
    autojump_clock.autojump_threshold = REAL_IDLE_SECONDS
    client = client_of(relay, Handler())
    nursery.start_soon(client.run)

    async def send_away() -> None:
        seen = 0
        while True:
            if relay.connects > seen:
                seen = relay.connects
                await client.wait_connected()
                await relay.say_restarting(0)
            await trio.sleep(0.5)

    nursery.start_soon(send_away)
    await trio.sleep(60)
    assert 5 < relay.connects < 50


async def test_silent_server_is_left(
    autojump_clock: MockClock, nursery: trio.Nursery, relay: Any
) -> None:
    """Nothing for two minutes, or no Pong within 3 s after a change of network: dial again."""
    client = client_of(relay, Handler())
    nursery.start_soon(client.run)
    await client.wait_connected()
    (stream,) = relay.clients.values()
    relay.clients.clear()  # no keepalive any more, but Pings are answered
    client.handle_network_change(frozenset({"127.0.0.1"}))
    await trio.sleep(60)
    assert relay.connects == 1
    await trio.sleep(65)
    assert relay.connects == 2
    client.handle_network_change(frozenset({"192.0.2.7"}))  # our old address has gone
    await trio.sleep(1)
    assert relay.connects == 3
    del stream


async def test_changed_map(
    nursery: trio.Nursery, tiny_relay: Any, map_of: Callable[..., RelayMap]
) -> None:
    """A region that moved is connected to at its new place, and the home stays the home."""
    first, second = tiny_relay(), tiny_relay()
    for relay in (first, second):
        await nursery.start(relay.serve)
    relays = Relays(
        map_of(first),
        NodePrivate.generate(os.urandom),
        Handler(),
        options=RelayOptions(plain=True),
        rng=random.Random(1),
    )
    assert not relays.send(900, bytes(32), b"not running yet")
    await nursery.start(relays.run)
    relays.set_home(900)
    await relays.wait_for_home()
    relays.set_map(map_of(second))
    await until(lambda: second.homes)
    assert relays.is_connected(900)
    assert not relays.send(901, bytes(32), b"unknown region")


class TestProxy:
    @pytest.fixture
    async def heads(
        self, relay: Any, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
    ) -> list[bytes]:
        """A proxy to the relay, set in the environment: the requests that it gets."""
        heads: list[bytes] = []

        async def serve(stream: trio.SocketStream) -> None:
            head = b""
            while b"\r\n\r\n" not in head:
                head += await stream.receive_some()
            heads.append(head)
            onward = await trio.open_tcp_stream("127.0.0.1", relay.port)
            await stream.send_all(b"HTTP/1.1 200 OK\r\n\r\n")

            async def pump(source: trio.SocketStream, sink: trio.SocketStream) -> None:
                try:
                    async for data in source:
                        await sink.send_all(data)
                except trio.BrokenResourceError:
                    pass

            async with stream, onward, trio.open_nursery() as both:
                both.start_soon(pump, stream, onward)
                both.start_soon(pump, onward, stream)

        listeners = await nursery.start(trio.serve_tcp, serve, 0)
        port = listeners[0].socket.getsockname()[1]
        monkeypatch.setenv("HTTPS_PROXY", f"http://me:s%20cret@127.0.0.1:{port}")
        monkeypatch.setenv("NO_PROXY", "")
        return heads

    async def test_connects_through(
        self, relay: Any, nursery: trio.Nursery, heads: list[bytes]
    ) -> None:
        """HTTPS_PROXY is dialed, asked to CONNECT with credentials, and carries DERP."""
        client = client_of(relay, Handler())
        nursery.start_soon(client.run)
        with trio.fail_after(5):
            await client.wait_connected()
        assert heads[0].startswith(b"CONNECT 127.0.0.1:%d HTTP/1.1\r\n" % relay.port)
        assert b"Proxy-Authorization: Basic bWU6cyBjcmV0" in heads[0]

    async def test_latency_is_measured_through(self, relay: Any, heads: list[bytes]) -> None:
        """Where UDP and direct TCP are blocked, regions are measured by HTTPS_PROXY."""
        options = RelayOptions(plain=True)
        check = NetCheck(UdpSockets(), Resolver(), os.urandom, options)
        report = Report(0.0)
        await check.run_https(report, RelayMap({relay.region_id: relay.region}))
        assert set(report.latencies) == {relay.region_id}
        assert len(heads) == 1

    async def test_useless_proxy_gives_no_latency(
        self, relay: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A proxy that can't be used leaves the latency unknown and the node running."""
        monkeypatch.setenv("HTTPS_PROXY", "socks5://127.0.0.1:1")
        monkeypatch.setenv("NO_PROXY", "")
        check = NetCheck(UdpSockets(), Resolver(), os.urandom, RelayOptions(plain=True))
        report = Report(0.0)
        await check.run_https(report, RelayMap({relay.region_id: relay.region}))
        assert report.latencies == {}

    def test_environment(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """NO_PROXY is respected, and what can't be used is said."""
        monkeypatch.setenv("HTTPS_PROXY", "http://proxy.test:3128")
        monkeypatch.setenv("NO_PROXY", "relay.test")
        assert Proxy.maybe_from_environment("relay.test") is None
        assert Proxy.maybe_from_environment("other.test") == Proxy("proxy.test", 3128)
        for url in ("socks5://proxy.test", "http://", "http://proxy.test:99999"):
            with pytest.raises(ProxyError):
                Proxy.parse(url)
        assert "s3cret" not in repr(Proxy.parse("http://me:s3cret@proxy.test"))
