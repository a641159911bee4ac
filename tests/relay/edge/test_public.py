"""The public listeners on loopback: TLS by name, names passed through, ports, limits, routes."""

from __future__ import annotations

import os
import random
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
import trio.testing
import trustme

from relay.config import Config, ConfigError
from relay.edge.public import PublicEdge
from relay.edge.registry import Registry
from relay.edge.visitor_stages import VisitorStage
from tests.relay.edge.arena import (
    TUNNEL,
    FakeConnection,
    Http1Client,
    Origin,
    OriginExchange,
    echo,
    open_arena,
)

REQUESTS = int(os.environ.get("UNDERPASS_EDGE_REQUESTS", 1000))
ROUTES = """
[[http]]
host = "*.example.com"
tunnel = "app"
[[tls]]
name = "through.example.com"
tunnel = "app"
destination = "10.0.0.6:8443"
[[tcp]]
listen = "127.0.0.1:0"
tunnel = "app"
destination = "10.0.0.5:22"
[[udp]]
listen = "127.0.0.1:0"
tunnel = "app"
destination = "10.0.0.7:53"
"""


class Site:
    def __init__(self, public: PublicEdge, authority: trustme.CA, nursery: trio.Nursery) -> None:
        self.public = public
        self.registry: Registry
        self.nursery = nursery
        self._authority = authority
        self._count = 0
        self.visitors: list[trio.SocketStream] = []

    def connect(self, origin: Origin = echo) -> FakeConnection:
        self._count += 1
        connection = FakeConnection(self.nursery, origin, self._count)
        self.registry.add(connection)
        return connection

    async def visit(
        self, name: str, *protocols: str
    ) -> tuple[trio.SSLStream[trio.SocketStream], str | None]:
        context = ssl.create_default_context()
        self._authority.configure_trust(context)
        if protocols:
            context.set_alpn_protocols(list(protocols))
        stream = await trio.open_tcp_stream(*self.public.https[0])
        self.visitors.append(stream)
        tls = trio.SSLStream(stream, context, server_hostname=name, https_compatible=True)
        await tls.do_handshake()
        return tls, tls.selected_alpn_protocol()


@asynccontextmanager
async def site(tmp_path: Path, routes: str = ROUTES, **settings: object) -> AsyncIterator[Site]:
    authority = trustme.CA()
    leaf = authority.issue_cert("*.example.com")
    leaf.private_key_pem.write_to_path(str(tmp_path / "wildcard.key"))
    leaf.cert_chain_pems[0].write_to_path(str(tmp_path / "wildcard.crt"))
    (tmp_path / "routes.toml").write_text(routes)
    config = Config.dev(
        {
            "edge.listen": "127.0.0.1:0",
            "edge.directory": str(tmp_path),
            "edge.public.https": "127.0.0.1:0",
            "edge.public.http": "127.0.0.1:0",
            "edge.public.routes_file": str(tmp_path / "routes.toml"),
            "edge.public.certificates": str(tmp_path),
            **settings,
        }
    )
    registry = Registry()
    registry.add_tunnel(TUNNEL)
    public = PublicEdge(config, registry)
    async with trio.open_nursery() as nursery:
        await nursery.start(public.run)
        running = Site(public, authority, nursery)
        running.registry = registry
        yield running
        for stream in running.visitors:
            await trio.aclose_forcefully(stream)
        nursery.cancel_scope.cancel()


async def test_tls_by_name_and_protocol(tmp_path: Path) -> None:
    """HTTP/2 where the visitor offers it, else HTTP/1.1, under the certificate for the name."""
    async with site(tmp_path) as running:
        running.connect()
        tls, protocol = await running.visit("app.example.com", "h2", "http/1.1")
        assert protocol == "h2"
        await tls.aclose()
        tls, protocol = await running.visit("app.example.com")
        assert protocol is None
        answer = await Http1Client(tls).ask("POST", "/", body=b"hello")
        assert (answer.status, answer.body) == (200, b"hello")
        with pytest.raises(trio.BrokenResourceError):
            await running.visit("elsewhere.org")


async def test_plain_http(tmp_path: Path) -> None:
    """The listener without TLS serves the same, and says so to the origin."""
    async with site(tmp_path) as running:
        connection = running.connect()
        async with await trio.open_tcp_stream(*running.public.http[0]) as stream:
            assert (await Http1Client(stream).ask()).status == 200
        head = connection.exchanges[0].head
        assert not isinstance(head, str)
        assert (b"x-forwarded-proto", b"http") in head.headers


async def test_a_name_is_passed_through_undecrypted(tmp_path: Path) -> None:
    """The origin gets the visitor's ClientHello, byte for byte, and what follows."""
    hello = bytearray()

    async with site(tmp_path) as running:

        async def origin(exchange: OriginExchange) -> None:
            exchange.origin_respond(200)
            hello.extend(await exchange.origin_receive())
            await exchange.origin_send(b"\x15\x03\x03\x00\x02\x02\x28")
            exchange.origin_end()

        connection = running.connect(origin)
        with pytest.raises(trio.BrokenResourceError):
            await running.visit("through.example.com")
        assert b"through.example.com" in hello
        assert hello[0] == 0x16
        assert connection.exchanges[0].head == "10.0.0.6:8443"


async def test_a_tcp_port_leads_to_its_destination(tmp_path: Path) -> None:
    """Bytes both ways, half-closing, and an end when the connector can't connect."""
    async with site(tmp_path) as running:

        async def origin(exchange: OriginExchange) -> None:
            exchange.origin_respond(200)
            while data := await exchange.origin_receive():
                await exchange.origin_send(data)
            await exchange.origin_send(b"end")
            exchange.origin_end()

        connection = running.connect(origin)
        async with await trio.open_tcp_stream(*running.public.tcp[0]) as stream:
            await stream.send_all(b"hello ")
            await stream.send_eof()
            received = b""
            async for data in stream:
                received += data
        assert received == b"hello end"
        assert connection.exchanges[0].head == "10.0.0.5:22"

        async def refuse(exchange: OriginExchange) -> None:
            exchange.origin_respond(502)
            exchange.origin_end()

        connection.drain("")
        running.connect(refuse)
        async with await trio.open_tcp_stream(*running.public.tcp[0]) as stream:
            assert await stream.receive_some(10) == b""
        assert running.public.refusals.counts[VisitorStage.TUNNEL] == 1


async def test_no_tls_and_too_many(tmp_path: Path) -> None:
    """What speaks no TLS, and connections above a source's share, are closed and counted."""
    async with site(tmp_path, **{"edge.public.connections_per_source": 2}) as running:
        refusals = running.public.refusals.counts
        async with await trio.open_tcp_stream(*running.public.https[0]) as stream:
            await stream.send_all(b"GET / HTTP/1.1\r\n\r\n")
            assert await stream.receive_some(10) == b""
        assert refusals[VisitorStage.TLS] == 1
        streams = [await trio.open_tcp_stream(*running.public.https[0]) for _ in range(3)]
        with trio.fail_after(5):
            assert await streams[2].receive_some(10) == b""
        assert refusals[VisitorStage.CONNECTIONS] == 1
        for stream in streams:
            await stream.aclose()


async def test_a_proxy_says_who_asks(tmp_path: Path) -> None:
    """With the PROXY protocol from a trusted address, the visitor's address is the header's."""
    settings = {"proxy.protocol": "proxy-protocol", "proxy.trusted": "127.0.0.0/8"}
    async with site(tmp_path, **settings) as running:
        connection = running.connect()
        async with await trio.open_tcp_stream(*running.public.http[0]) as stream:
            await stream.send_all(b"PROXY TCP4 203.0.113.9 192.0.2.1 1234 80\r\n")
            assert (await Http1Client(stream).ask()).status == 200
        head = connection.exchanges[0].head
        assert not isinstance(head, str)
        assert (b"cf-connecting-ip", b"203.0.113.9") in head.headers


async def test_routes_are_read_again(tmp_path: Path) -> None:
    """New ones count at once; a file that is wrong leaves the old ones."""
    async with site(tmp_path) as running:
        routes = tmp_path / "routes.toml"
        routes.write_text('[[http]]\nhost = "new.org"\ntunnel = "app"\n')
        running.public.reload()
        assert running.public.table.find_http("new.org", "/")
        assert not running.public.table.find_http("app.example.com", "/")
        routes.write_text('[[http]]\nhost = "bad.org"\ntunnel = "nobody"\n')
        running.public.reload()
        assert running.public.table.find_http("new.org", "/")


@pytest.mark.parametrize(
    ("routes", "problem"),
    [
        ("[[http]]\n", "host"),
        ('[[http]]\nhost = "a b"\ntunnel = "app"\n', "no host name"),
        ('[[http]]\nhost = "a.org:80"\ntunnel = "app"\n', "no host name"),
        ('[[http]]\nhost = "a.org"\npath = "x"\ntunnel = "app"\n', "slash"),
        ('[[http]]\nhost = "a.org"\ntunnel = "x"\n', 'no tunnel "x"'),
        (2 * '[[http]]\nhost = "a.org"\ntunnel = "app"\n', "same as another"),
        ('[[http]]\nhost = "a.org"\ntunnel = "app"\nport = 1\n', "port"),
        ('[[tcp]]\nlisten = ":1"\ntunnel = "app"\ndestination = "127.0.0.1:1"\n', "loopback"),
        ('[[tcp]]\nlisten = ":1"\ntunnel = "app"\ndestination = "localhost:1"\n', "name"),
        ('[[tls]]\nname = "a.org"\ntunnel = "app"\ndestination = "10.0.0.1"\n', "port"),
        ("[[http", "TOML"),
    ],
)
async def test_mistakes_in_routes_are_told(tmp_path: Path, routes: str, problem: str) -> None:
    """With the file and what is wrong."""
    with pytest.raises(ConfigError, match=r"routes\.toml") as caught:
        async with site(tmp_path, routes):
            pass
    if problem != "TOML":
        assert problem in str(caught.value)


async def test_no_idempotent_request_fails_while_connections_die() -> None:
    """Connections die under the requests all the time, at times all of them; visitors see nothing
    of it. UNDERPASS_EDGE_REQUESTS says how many requests."""
    chance = random.Random(1)

    async def origin(exchange: OriginExchange) -> None:
        await trio.sleep(chance.random() * 0.002)
        if not exchange.is_over and exchange.failure is None:
            exchange.origin_answer_at_once(b"whole")

    async with open_arena() as arena:
        for _ in range(4):
            arena.connect(origin)
        statuses: dict[int, int] = {}
        left = REQUESTS

        async def ask() -> None:
            nonlocal left
            from relay.edge.visit_http1 import serve_http1

            client = Http1Client(arena.visit(serve_http1))
            while left > 0:
                left -= 1
                answer = await client.ask(chance.choice(["GET", "PUT"]), body=b"x")
                statuses[answer.status] = statuses.get(answer.status, 0) + 1

        async def kill() -> None:
            while True:
                await trio.sleep(0.01)
                usable = [c for c in arena.connections if c.is_usable]
                for victim in usable if chance.random() < 0.1 else usable[:1]:
                    victim.close("killed")
                    arena.registry.remove(victim)
                await trio.sleep(0.005)
                while sum(c.is_usable for c in arena.connections) < 4:
                    arena.connect(origin)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(kill)
            async with trio.open_nursery() as visitors:
                for _ in range(20):
                    visitors.start_soon(ask)
            nursery.cancel_scope.cancel()
        assert statuses == {200: REQUESTS}
        assert arena.meter.tunnels[TUNNEL.id].retries > 0
