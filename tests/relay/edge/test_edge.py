"""The edge as a whole: certificates, tunnel files, the listener, drain and reload, the commands."""

from __future__ import annotations

import json
import os
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
from click.testing import CliRunner
from cryptography import x509

from relay.cli import main
from relay.config import Config, ConfigError
from relay.edge.certificates import (
    HTTP2_NAME,
    NAMES,
    EdgeCertificates,
    authority_path,
    issue,
    load_or_create_authority,
)
from relay.edge.registration import EdgeStage
from relay.edge.registry import Registry
from relay.edge.service import HANDSHAKES_PER_SOURCE, Edge
from relay.edge.tunnel_files import TunnelFiles, create_tunnel, read_tunnel, tunnels_directory
from relay.listeners import open_listeners
from relay.server import check_files
from tests.relay.edge.fake_connector import FakeConnector
from traversal.io.http2 import Http2Connection
from traversal.io.http2_engine import Http2Error
from traversal.io.stream import HandshakeStream
from traversal.wire.tunnel.credentials import parse_token
from traversal.wire.tunnel.registration import (
    DUPLICATE_CONNECTION,
    ConnectionDetails,
    ConnectionRefusal,
)


def config_of(directory: Path, **settings: object) -> Config:
    return Config.dev(
        {
            "edge.listen": "127.0.0.1:0",
            "edge.directory": str(directory),
            "server.drain_seconds": 1.0,
            **settings,
        }
    )


def touch(path: Path, text: str, seconds: int) -> None:
    path.write_text(text)
    os.utime(path, (1_800_000_000 + seconds,) * 2)


class TestCertificates:
    """The authority and what it issues."""

    def test_authority_is_kept_and_vouches_for_the_names(self, tmp_path: Path) -> None:
        """A second start finds the same authority; a client that trusts it accepts the names."""
        config = config_of(tmp_path).edge
        first, second = EdgeCertificates(config), EdgeCertificates(config)
        assert first.pair.chain != second.pair.chain
        assert (tmp_path / "ca.key").stat().st_mode & 0o777 == 0o600
        client = ssl.create_default_context(cafile=str(authority_path(tmp_path)))
        for name in NAMES:
            handshake(client, second.context, name)
        with pytest.raises(ssl.SSLCertVerificationError):
            handshake(client, second.context, "example.com")

    def test_the_authority_is_worth_nothing_elsewhere(self, tmp_path: Path) -> None:
        """Its key cannot vouch for another domain: clients check its name constraints."""
        authority = load_or_create_authority(tmp_path)
        constraints = authority.leaf.extensions.get_extension_for_class(x509.NameConstraints)
        assert constraints.critical
        assert constraints.value.permitted_subtrees == [x509.DNSName("cftunnel.com")]

    def test_renewal(self, tmp_path: Path) -> None:
        """A certificate in memory is renewed long before it expires."""
        now = [1_800_000_000.0]
        certificates = EdgeCertificates(config_of(tmp_path).edge, unix_clock=lambda: now[0])
        assert certificates.pair.not_after_unix == now[0] + 90 * 86400
        now[0] += 61 * 86400
        certificates.reload()
        assert certificates.pair.not_after_unix == now[0] + 90 * 86400

    def test_given_files_must_have_all_names(self, tmp_path: Path) -> None:
        """A certificate for other names is refused at the start, with the name that is missing."""
        pair = issue(load_or_create_authority(tmp_path), 1_800_000_000)
        cert, key = tmp_path / "edge.crt", tmp_path / "edge.key"
        cert.write_bytes(pair.chain_pem())
        key.write_bytes(pair.key_pem)
        files = {"edge.cert_file": str(cert), "edge.key_file": str(key)}
        assert EdgeCertificates(config_of(tmp_path, **files).edge).pair.chain == pair.chain
        assert check_files(config_of(tmp_path, **files)) == []
        cert.write_bytes(load_or_create_authority(tmp_path).chain_pem())
        (problem,) = check_files(config_of(tmp_path, **files))
        assert "edge.key" in problem
        with pytest.raises(ConfigError, match="go together"):
            config_of(tmp_path, **{"edge.cert_file": str(cert)})

    def test_routes_and_visitors_certificates_are_checked(self, tmp_path: Path) -> None:
        """Before anything is started; every mistake names its file."""
        routes, visitors = tmp_path / "routes.toml", tmp_path / "visitors"
        visitors.mkdir()
        (visitors / "app.crt").write_text("oops")
        routes.write_text('[[http]]\nhost = "app.example.com"\ntunnel = "nobody"\n')
        settings = {
            "edge.public.routes_file": str(routes),
            "edge.public.certificates": str(visitors),
        }
        problems = check_files(config_of(tmp_path, **settings))
        assert any("routes.toml" in each and 'no tunnel "nobody"' in each for each in problems)
        assert any("visitors/app" in each for each in problems)


def handshake(client: ssl.SSLContext, server: ssl.SSLContext, name: str) -> None:
    """A TLS handshake in memory. Raises ssl.SSLError."""
    there, back = ssl.MemoryBIO(), ssl.MemoryBIO()
    near = client.wrap_bio(back, there, server_hostname=name)
    far = server.wrap_bio(there, back, server_side=True)
    for _ in range(3):
        for side in (near, far):
            try:
                side.do_handshake()
            except ssl.SSLWantReadError:
                pass
    near.do_handshake()


class TestTunnelFiles:
    """The directory of tunnels."""

    def test_files_come_change_and_go(self, tmp_path: Path) -> None:
        """The registry follows; what others put into it stays."""
        registry = Registry()
        files = TunnelFiles(str(tmp_path), registry)
        assert files.reload() == []
        web = create_tunnel(str(tmp_path), "web", os.urandom)
        create_tunnel(str(tmp_path), "db", os.urandom)
        assert files.poll() is None  # not settled yet
        assert files.poll() == []
        assert {tunnel.name for tunnel in registry.tunnels()} == {"web", "db"}
        assert registry.tunnel(web.id) == web
        (tunnels_directory(str(tmp_path)) / "db.json").unlink()
        assert files.reload() == []
        assert registry.tunnels() == [web]

    def test_configurations_have_growing_versions(self, tmp_path: Path) -> None:
        """Each change has a higher version than the last, even within a second, even backwards."""
        registry = Registry()
        files = TunnelFiles(str(tmp_path), registry)
        tunnel = create_tunnel(str(tmp_path), "web", os.urandom)
        path = tunnels_directory(str(tmp_path)) / "web.config.json"
        versions = []
        for text, seconds in (
            ('{"ingress":[]}', 0),
            ('{"ingress":[{"service":"http_status:404"}]}', 0),
            ('{"ingress":[{"service":"http_status:405"}]}', 100),
            ('{"ingress":[{"service":"http_status:406"}]}', 50),
        ):
            touch(path, text, seconds)
            assert files.reload() == []
            found = registry.tunnel(tunnel.id)
            assert found is not None
            assert found.configuration is not None
            versions.append(found.configuration.version)
        assert versions == [100_000_000, 100_000_001, 100_000_100, 100_000_101]

    def test_what_is_wrong_changes_nothing(self, tmp_path: Path) -> None:
        """A bad file is named, and its tunnel stays as it was."""
        registry = Registry()
        files = TunnelFiles(str(tmp_path), registry)
        tunnel = create_tunnel(str(tmp_path), "web", os.urandom)
        assert files.reload() == []
        directory = tunnels_directory(str(tmp_path))
        (directory / "bad.json").write_text("{")
        (directory / "copy.json").write_text((directory / "web.json").read_text())
        (directory / "web.config.json").write_text('{"ingress":[{"service":"nonsense"}]}')
        problems = sorted(files.reload())
        assert [problem.partition(":")[0] for problem in problems] == [
            f"{directory}/bad.json",
            f"{directory}/copy.json",
            f"{directory}/web.config.json",
        ]
        assert registry.tunnels() == [tunnel]

    def test_names(self, tmp_path: Path) -> None:
        """A name can't lead out of the directory, and is not used twice."""
        for name in ("", "../web", "web.config", ".web", "a/b"):
            with pytest.raises(ConfigError, match="no name"):
                create_tunnel(str(tmp_path), name, os.urandom)
        create_tunnel(str(tmp_path), "web", os.urandom)
        with pytest.raises(ConfigError, match="already"):
            create_tunnel(str(tmp_path), "web", os.urandom)


def test_commands(tmp_path: Path) -> None:
    """An operator makes a tunnel, sees it, and gets its token and the authority."""

    def run(*arguments: str) -> str:
        result = CliRunner().invoke(
            main, ["edge", *arguments, "--directory", str(tmp_path)], catch_exceptions=False
        )
        assert result.exit_code == 0, result.output
        return result.stdout

    made = json.loads(run("create-tunnel", "web", "--json"))
    tunnel = read_tunnel(Path(made["file"]))
    assert parse_token(made["token"]) == tunnel.credentials
    assert run("token", "web").strip() == made["token"]
    assert json.loads(run("tunnels", "--json")) == [
        {"name": "web", "id": str(tunnel.id), "configuration_version": None}
    ]
    assert "web" in run("tunnels")
    assert made["token"] not in run("tunnels")
    assert run("authority") == authority_path(tmp_path).read_text()


# --- The running edge -----------------------------------------------------------------------------


@asynccontextmanager
async def running(config: Config) -> AsyncIterator[Edge]:
    listeners = open_listeners(config.edge.listen[0])
    edge = Edge(config, listeners)
    async with trio.open_nursery() as nursery:
        await nursery.start(edge.run)
        yield edge
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def connected(edge: Edge, directory: Path, index: int = 0) -> AsyncIterator[FakeConnector]:
    """A connector over real TCP and TLS, not yet registered."""
    tcp = await trio.open_tcp_stream(*edge.addresses[0])
    stream = HandshakeStream(tcp.socket)
    context = ssl.create_default_context(cafile=str(authority_path(directory)))
    await stream.start_tls(context, server_side=False, server_hostname=HTTP2_NAME)
    server = Http2Connection(stream, client_side=False)
    async with trio.open_nursery() as nursery:
        await nursery.start(server.run)
        tunnel = edge.registry.tunnels()[0]
        connector = FakeConnector(server, tunnel.id, index)
        await connector.accept_control()
        yield connector
        nursery.cancel_scope.cancel()


async def test_registration_over_tls(tmp_path: Path) -> None:
    """A connector that trusts the authority registers with the credentials of a file."""
    tunnel = create_tunnel(str(tmp_path), "web", os.urandom)
    async with running(config_of(tmp_path)) as edge:
        for index in range(2):
            async with connected(edge, tmp_path, index) as connector:
                details = await connector.register(connector.registration(tunnel.credentials))
                assert isinstance(details, ConnectionDetails)
                assert details.location == "edge01"
                picked = edge.registry.pick(tunnel.id)
                assert picked is not None
                assert (picked.index, picked.source) == (index, "127.0.0.1")


async def test_drain(tmp_path: Path) -> None:
    """Connectors are let go when they are idle, and the port refuses new ones at once."""
    tunnel = create_tunnel(str(tmp_path), "web", os.urandom)
    async with (
        running(config_of(tmp_path)) as edge,
        connected(edge, tmp_path) as connector,
        connected(edge, tmp_path, 1) as late,
    ):
        await connector.register(connector.registration(tunnel.credentials))
        await edge.registry.wait_usable(tunnel.id)
        with trio.fail_after(5):
            await edge.drain(10)
            assert edge.registry.pick(tunnel.id) is None
            with pytest.raises(Http2Error):
                await connector.connection.accept()
            # One that had not registered yet is sent elsewhere.
            answer = await late.register(late.registration(tunnel.credentials))
            assert answer == ConnectionRefusal(DUPLICATE_CONNECTION, should_retry=True)
        with pytest.raises(OSError, match="attempts to connect"):
            async with connected(edge, tmp_path):
                pass


async def test_a_removed_tunnel_loses_its_connectors(tmp_path: Path) -> None:
    """To take a file away is to revoke it; nobody has to restart anything."""
    tunnel = create_tunnel(str(tmp_path), "web", os.urandom)
    async with running(config_of(tmp_path)) as edge, connected(edge, tmp_path) as connector:
        await connector.register(connector.registration(tunnel.credentials))
        await edge.registry.wait_usable(tunnel.id)
        (tunnels_directory(str(tmp_path)) / "web.json").unlink()
        edge.reload_files()
        with trio.fail_after(5), pytest.raises(Http2Error):
            await connector.connection.accept()


async def test_no_tls(tmp_path: Path) -> None:
    """Plain text and connections that say nothing are refused and counted, within limits."""
    async with running(config_of(tmp_path)) as edge:
        async with await trio.open_tcp_stream(*edge.addresses[0]) as stream:
            await stream.send_all(b"PRI * HTTP/2.0\r\n\r\n")
            with trio.fail_after(5):
                while await stream.receive_some():
                    pass
        assert edge.refusals.counts[EdgeStage.TLS] == 1
        place = edge.addresses[0]
        silent = [await trio.open_tcp_stream(*place) for _ in range(HANDSHAKES_PER_SOURCE)]
        with trio.fail_after(5):
            async with await trio.open_tcp_stream(*place) as stream:
                assert await stream.receive_some() == b""
        assert edge.refusals.counts[EdgeStage.LIMITS] == 1
        for stream in silent:
            await stream.aclose()
