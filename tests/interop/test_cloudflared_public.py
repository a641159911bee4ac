"""The whole way as a visitor goes it: curl, the edge's public side, the real connector, an origin.

Opt in: CLOUDFLARED_BIN=/path/to/cloudflared. Each test runs in a network namespace of its own.
"""

from __future__ import annotations

import json
import os
import shutil
import ssl
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import pytest
import trio
import trustme
import wsproto

from relay.config import Config
from relay.edge.certificates import authority_path, load_or_create_authority
from relay.edge.service import Edge
from relay.edge.tunnel_files import create_tunnel
from relay.listeners import open_listeners
from tests.interop.test_cloudflared import HOSTS, PORT, PROGRAM, Stage, eventually
from tests.system.tunnel_origin import Origin, pattern
from tests.system.tunnel_world import visitor_certificates

CURL = shutil.which("curl") or ""

pytestmark = [
    pytest.mark.interop,
    pytest.mark.jail,
    pytest.mark.skipif(not PROGRAM, reason="CLOUDFLARED_BIN names no cloudflared"),
    pytest.mark.skipif(not CURL, reason="there is no curl"),
]

BULK_BYTES = 20_000_000


@pytest.fixture(params=["http2", "quic"])
def transport(request: pytest.FixtureRequest) -> str:
    """What the connector runs over."""
    return str(request.param)


class Site:
    """A published origin, and a visitor's tools."""

    def __init__(self, stage: Stage, edge: Edge, authority: trustme.CA, directory: Path) -> None:
        self.stage = stage
        self.edge = edge
        self.authority = authority
        self.directory = directory
        self.port = edge.public.https[0][1]

    async def curl(self, path: str, *arguments: str, host: str = "app.example.com") -> bytes:
        """What curl prints; it fails where curl fails."""
        command = [CURL, "-sS", "--fail-with-body", "--max-time", "60"]
        command += ["--cacert", str(self.directory / "visitors-ca.pem")]
        command += ["--resolve", f"{host}:{self.port}:127.0.0.1"]
        command += [*arguments, f"https://{host}:{self.port}{path}"]
        done = await trio.run_process(command, capture_stdout=True, capture_stderr=True)
        return done.stdout

    async def connect(self, name: str = "app.example.com") -> trio.SSLStream[trio.SocketStream]:
        context = ssl.create_default_context()
        self.authority.configure_trust(context)
        stream = await trio.open_tcp_stream("127.0.0.1", self.port)
        tls = trio.SSLStream(stream, context, server_hostname=name, https_compatible=True)
        await tls.do_handshake()
        return tls


@asynccontextmanager
async def published(tmp_path: Path, transport: str) -> AsyncIterator[Site]:
    """An origin under app.example.com, its TCP port, and a name that is passed through."""
    origin = Origin()
    authority, certificates = visitor_certificates(tmp_path)
    authority.cert_pem.write_to_path(str(tmp_path / "visitors-ca.pem"))
    async with trio.open_nursery() as nursery:
        await nursery.start(origin.run)
        tunnel = create_tunnel(str(tmp_path), "web", os.urandom)
        load_or_create_authority(tmp_path)
        server_context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        authority.issue_cert("through.example.com").configure_cert(server_context)
        (through,) = await trio.open_tcp_listeners(0, host="127.0.0.1")

        async def own_tls(stream: trio.SocketStream) -> None:
            tls = trio.SSLStream(stream, server_context, server_side=True)
            try:
                await tls.send_all(b"own: " + await tls.receive_some(100))
            except trio.BrokenResourceError:
                pass

        nursery.start_soon(trio.serve_listeners, own_tls, [through])
        (tmp_path / "routes.toml").write_text(f"""
[[http]]
host = "*.example.com"
tunnel = "web"
[[tls]]
name = "through.example.com"
tunnel = "web"
destination = "127.0.0.1:{through.socket.getsockname()[1]}"
[[tcp]]
listen = "127.0.0.1:0"
tunnel = "web"
destination = "127.0.0.1:{origin.tcp_port}"
""")
        config = Config.dev(
            {
                "edge.listen": [f"{host}:{PORT}" for host in HOSTS],
                "edge.directory": str(tmp_path),
                "edge.public.https": "127.0.0.1:0",
                "edge.public.routes_file": str(tmp_path / "routes.toml"),
                "edge.public.certificates": str(certificates),
                "edge.public.allowed_destinations": "127.0.0.0/8",
            }
        )
        listeners = [sock for place in config.edge.listen for sock in open_listeners(place)]
        edge = Edge(config, listeners)
        stage = Stage(tmp_path, transport, origin, tunnel)
        stage.edge = edge
        await nursery.start(edge.run)
        with stage.connector(connections=2):
            await stage.usable()
            yield Site(stage, edge, authority, tmp_path)
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("version", ["--http1.1", "--http2"])
async def test_curl(tmp_path: Path, transport: str, version: str) -> None:
    """GET, POST, 20 MB each way, chunks, streaming, trailers, an unknown host, forged headers."""
    async with published(tmp_path, transport) as site:
        assert await site.curl("/page?x=1", version) == b"/page"
        request = site.stage.origin.requests[-1]
        headers = dict(request.headers)
        assert headers[b"x-forwarded-for"] == headers[b"cf-connecting-ip"] == b"127.0.0.1"
        assert headers[b"x-forwarded-proto"] == b"https"
        assert await site.curl("/echo", version, "-d", "hello") == b"hello"
        (tmp_path / "bulk").write_bytes(pattern(0, BULK_BYTES))
        back = await site.curl(
            "/echo", version, "-H", "Expect:", "--data-binary", f"@{tmp_path / 'bulk'}"
        )
        assert back == pattern(0, BULK_BYTES)
        assert await site.curl(f"/bytes?n={BULK_BYTES}", version) == pattern(0, BULK_BYTES)
        chunked = ("-H", "Transfer-Encoding: chunked", "-d", "@-") if "1.1" in version else ()
        if chunked:
            command = await site.curl("/echo", version, *chunked[:2], "-d", "piece")
            assert command == b"piece"
        shown = await site.curl("/trailers", version, "-i")
        assert b"set-cookie: a=1" in shown.lower()
        if transport == "http2":
            assert b"x-checksum: 1" in shown.lower()
        # The reference passes on the length that an origin names in a 304.
        assert b" 304" in (await site.curl("/status?code=304", version, "-i"))[:20]
        forged = "Cf-Cloudflared-Proxy-Src: me"
        assert await site.curl("/forged", version, "-H", forged) == b"/forged"
        with pytest.raises(subprocess.CalledProcessError):
            await site.curl("/x", version, "-H", "Host: management.argotunnel.com")


async def test_streaming_reaches_the_visitor_as_it_comes(tmp_path: Path, transport: str) -> None:
    """What an origin has sent arrives while it is still thinking about the rest."""
    async with published(tmp_path, transport) as site:
        stream = await site.connect()
        await stream.send_all(b"GET /slow HTTP/1.1\r\nHost: app.example.com\r\n\r\n")
        data = b""
        with trio.fail_after(10):
            while b"begun;" not in data:
                data += await stream.receive_some(65536)
            assert b"done" not in data
            site.stage.origin.go_on.set()
            while not data.endswith(b"0\r\n\r\n"):
                data += await stream.receive_some(65536)
        assert b"done" in data


async def test_websocket(tmp_path: Path, transport: str) -> None:
    """A WebSocket from a visitor to the origin, both ways."""
    async with published(tmp_path, transport) as site:
        stream = await site.connect()
        client = wsproto.WSConnection(wsproto.ConnectionType.CLIENT)
        await stream.send_all(client.send(wsproto.events.Request("app.example.com", "/ws")))
        texts = []
        with trio.fail_after(10):
            while len(texts) < 2:
                client.receive_data(await stream.receive_some(65536))
                for event in client.events():
                    if isinstance(event, wsproto.events.AcceptConnection):
                        for text in ("hello", "again"):
                            message = wsproto.events.TextMessage(text)
                            await stream.send_all(client.send(message))
                    elif isinstance(event, wsproto.events.TextMessage):
                        texts.append(event.data)
        assert "".join(texts) == "HELLOAGAIN"


async def test_ports_and_names(tmp_path: Path, transport: str) -> None:
    """A TCP port of the edge leads to the origin's, and a TLS name to the origin's own TLS."""
    async with published(tmp_path, transport) as site:
        stream = await trio.open_tcp_stream(*site.edge.public.tcp[0])
        received = b""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stream.send_all, pattern(0, 1_000_000))
            with trio.fail_after(20):
                # No half-closing: the real connector ends both directions with the first.
                while len(received) < 1_000_000:
                    received += await stream.receive_some(65536)
        await stream.aclose()
        assert received == pattern(0, 1_000_000)
        tls = await site.connect("through.example.com")
        await tls.send_all(b"hi")
        assert await tls.receive_some(100) == b"own: hi"
        assert json.dumps([t.tcp_total for t in site.edge.public.meter.tunnels.values()]) == "[2]"


async def test_quick_tunnel(tmp_path: Path) -> None:
    """One command without an account publishes a port on a random name."""
    origin = Origin()
    load_or_create_authority(tmp_path)
    config = Config.dev(
        {
            "edge.listen": [f"{host}:{PORT}" for host in HOSTS],
            "edge.directory": str(tmp_path),
            "edge.public.http": "127.0.0.1:0",
            "edge.quick.domain": "localhost",
        }
    )
    async with trio.open_nursery() as nursery:
        await nursery.start(origin.run)
        edge = Edge(config, [s for place in config.edge.listen for s in open_listeners(place)])
        await nursery.start(edge.run)
        port = edge.public.http[0][1]
        command = [PROGRAM, "tunnel", "--no-autoupdate", "--no-prechecks"]
        command += ["--cacert", str(authority_path(tmp_path)), "--metrics", "127.0.0.1:0"]
        command += [part for host in HOSTS for part in ("--edge", f"{host}:{PORT}")]
        command += ["--quick-service", f"http://localhost:{port}"]
        command += ["--url", f"http://127.0.0.1:{origin.port}"]
        environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}
        run = partial(trio.run_process, command, env=environment, capture_stderr=True, check=False)
        nursery.start_soon(run)
        with trio.fail_after(20):
            await eventually(lambda: bool(list(edge.registry.connections())))
            (tunnel,) = edge.registry.tunnels()
            host = f"{tunnel.name.removeprefix('quick-')}.localhost"
            ask = [CURL, "-sS", "--fail", "-H", f"Host: {host}", f"http://127.0.0.1:{port}/quick"]
            assert (await trio.run_process(ask, capture_stdout=True)).stdout == b"/quick"
        nursery.cancel_scope.cancel()
