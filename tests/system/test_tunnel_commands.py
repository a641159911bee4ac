"""`underpass tunnel` as a user runs it: processes, files, signals."""

from __future__ import annotations

import json
import os
import signal
import socket
import ssl
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path

import pytest
import trio
import trustme
from click.testing import CliRunner

from relay.config import Config
from relay.edge.certificates import authority_path, authority_pem
from relay.edge.tunnel_files import create_tunnel
from tests.system.test_tunnel import fetch, origin
from tests.system.tunnel_world import RunningEdge, edge_config, run_edge, until
from traversal import NodePrivate, RelayMap
from traversal.agent.config import ConfigError, load_config
from traversal.agent.service import run_agent
from traversal.cli import main
from traversal.tunnel.quick import QuickTunnelError, ask_for_quick_tunnel
from traversal.tunnel.settings import load_settings

COMMAND = [sys.executable, "-m", "traversal.cli", "tunnel"]


@asynccontextmanager
async def local_service() -> AsyncIterator[int]:
    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(partial(trio.serve_tcp, origin, 0, host="127.0.0.1"))
        yield listeners[0].socket.getsockname()[1]
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def command(*arguments: str, **environment: str) -> AsyncIterator[trio.Process]:
    async with trio.open_nursery() as nursery:
        process = await nursery.start(
            partial(
                trio.run_process,
                [*COMMAND, *arguments],
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=os.environ | environment,
                check=False,
            )
        )
        yield process
        nursery.cancel_scope.cancel()


async def test_run(tmp_path: Path) -> None:
    """A token in the environment and a URL publish a service; health says ready; SIGTERM leaves in
    good order."""
    token = create_tunnel(str(tmp_path), "web", os.urandom).credentials.to_token()
    with trio.fail_after(40):
        async with local_service() as port, trio.open_nursery() as nursery:
            edge = await nursery.start(run_edge, edge_config(tmp_path))
            edge_place = "{}:{}".format(*edge.address)
            arguments = ["--edge", edge_place, "--url", f"http://127.0.0.1:{port}"]
            arguments += ["--ca", str(authority_path(tmp_path))]
            async with command("run", *arguments, TUNNEL_TOKEN=token) as process:
                registry = edge.edge.registry
                await until(lambda: len(list(registry.connections())) == 4)
                assert await fetch(edge.visitors, "/a") == (200, b"/a")
                process.send_signal(signal.SIGTERM)
                assert await process.wait() == 0
            assert list(registry.connections()) == []
            nursery.cancel_scope.cancel()


async def test_quick(tmp_path: Path) -> None:
    """One command without an account gives a name under which the local port is reached."""
    create_tunnel(str(tmp_path), "web", os.urandom)
    config: Config = edge_config(tmp_path, quick_domain="localhost")
    with trio.fail_after(40):
        async with local_service() as port, trio.open_nursery() as nursery:
            edge: RunningEdge = await nursery.start(run_edge, config)
            base = f"http://localhost:{edge.visitors}"
            place = "{}:{}".format(*edge.address)
            arguments = ["--edge", base, "--connect", place, "--url", f"http://127.0.0.1:{port}"]
            arguments += ["--ca", str(authority_path(tmp_path)), "--json"]
            async with command("quick", *arguments) as process:
                assert process.stdout is not None
                said = json.loads(await process.stdout.receive_some())
                host = said["url"].removeprefix("http://")
                assert host.endswith(".localhost")
                await until(lambda: bool(list(edge.edge.registry.connections())))
                assert await fetch(edge.visitors, "/q", host=host) == (200, b"/q")
                process.send_signal(signal.SIGINT)
                assert await process.wait() == 0
            nursery.cancel_scope.cancel()


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ('edge = ["e"]\ncredentials = "c.json"\nurl = "htp://h"', "did you mean 'http://'"),
        ('edge = ["e"]\ncredential = "c.json"', "did you mean 'credentials'"),
        ('edge = ["e"]\ncredentials = "none.json"', "create-tunnel"),
        ('credentials = "c.json"', "edge = ["),
        ('edge = ["e"]\ncredentials = "c.json"\nurl = "http://h"\nprotocol = "htp2"', "'http2'"),
        ('edge = ["e"]\ncredentials = "c.json"\nurl = "h:80"', "write http://h:80"),
        ('edge = ["e"]\ncredentials = "c.json"\nca = "none.pem"', "edge authority"),
        ('edge = ["e"]\ncredentials = "c.json"\nca = "c.json"', "no certificate"),
        ('edge = ["e"]\ntoken_file = "c.json"', "this is a credentials file"),
        ('edge = ["e"]\ncredentials = "c.json"\nhealth = "20241"', "must read IP:PORT"),
        ('edge = ["e"]\ncredentials = "c.json"\nhealth = "::1"', "must read IP:PORT"),
        ('edge = ["e"]\ncredentials = "c.json"\nhealth = 20241', "must read IP:PORT"),
    ],
)
def test_check_names_the_fix(tmp_path: Path, text: str, part: str) -> None:
    """A wrong file is told with what to write; a right one with what it means."""
    credentials = create_tunnel(str(tmp_path), "web", os.urandom).credentials
    (tmp_path / "c.json").write_text(credentials.to_file())
    file = tmp_path / "tunnel.toml"
    file.write_text(text)
    result = CliRunner().invoke(main, ["tunnel", "check", "-c", str(file)])
    assert result.exit_code == 2
    assert part in result.output
    file.write_text('edge = ["e"]\ncredentials = "c.json"\nurl = "http://h"')
    result = CliRunner().invoke(main, ["tunnel", "check", "-c", str(file)])
    assert (result.exit_code, "* * -> http://h" in result.output) == (0, True)


def test_only_secrets_should_be_secret(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Credentials that others can read are warned of, the authority's certificate is for all."""
    token = create_tunnel(str(tmp_path), "web", os.urandom).credentials.to_token()
    (tmp_path / "ca.pem").write_bytes(authority_pem(tmp_path))
    (tmp_path / "web.token").write_text(token)
    for name in ("ca.pem", "web.token"):
        (tmp_path / name).chmod(0o644)
    file = tmp_path / "tunnel.toml"
    file.write_text('edge = ["e"]\ntoken_file = "web.token"\nca = "ca.pem"')
    load_settings(file)
    assert "web.token: other users can read" in caplog.text
    assert "ca.pem" not in caplog.text


async def test_agent_serves_a_tunnel(tmp_path: Path) -> None:
    """A `[tunnel]` table makes the node agent a connector, too; a mistake in it is named."""
    credentials = create_tunnel(str(tmp_path), "web", os.urandom).credentials
    (tmp_path / "web.json").write_text(credentials.to_file())
    (tmp_path / "node.key").write_text(NodePrivate.generate(os.urandom).reveal())
    file = tmp_path / "underpass.toml"
    start = 'key = "node.key"\nrelay_map = "relays.json"\n[tunnel]\ncredentials = "web.json"\n'
    file.write_text(start + 'edges = ["h"]')
    with pytest.raises(ConfigError, match=r"tunnel.*did you mean 'edge'"):
        load_config(file)
    with trio.fail_after(40):
        async with local_service() as port, trio.open_nursery() as nursery:
            edge: RunningEdge = await nursery.start(run_edge, edge_config(tmp_path))
            place = "{}:{}".format(*edge.address)
            rest = f'edge = ["{place}"]\nca = "ca.pem"\nurl = "http://127.0.0.1:{port}"\n'
            file.write_text(start + rest)
            run = partial(run_agent, hosts={4: "127.0.0.1"}, map_ports=False)
            await nursery.start(run, load_config(file), RelayMap({}))
            await until(lambda: bool(list(edge.edge.registry.connections())))
            assert await fetch(edge.visitors, "/agent") == (200, b"/agent")
            nursery.cancel_scope.cancel()


async def test_quick_does_not_know_the_certificate() -> None:
    """The option that names another authority is told; so is what to see to where nobody is."""
    authority = trustme.CA()
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("127.0.0.1").configure_cert(context)

    async def ask(port: int) -> str:
        base = f"https://127.0.0.1:{port}"
        with pytest.raises(QuickTunnelError) as caught:
            await trio.to_thread.run_sync(ask_for_quick_tunnel, base, None)
        return str(caught.value)

    async def refuse(stream: trio.SSLStream[trio.SocketStream]) -> None:
        with suppress(trio.BrokenResourceError):
            await stream.do_handshake()

    async with trio.open_nursery() as nursery:
        serve = partial(trio.serve_ssl_over_tcp, refuse, 0, context, host="127.0.0.1")
        listeners = await nursery.start(serve)
        port = listeners[0].transport_listener.socket.getsockname()[1]
        assert "--web-ca FILE" in await ask(port)
        nursery.cancel_scope.cancel()
    assert "refused; see whether the address is right" in await ask(port)


@pytest.mark.parametrize("edge", ["nonsense", "http://[bad", "ftp://x"])
def test_quick_names_the_fix(edge: str) -> None:
    """What is no edge's address is said to be none."""
    arguments = ["tunnel", "quick", "--url", "http://127.0.0.1:1", "--edge", edge]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2
    assert "write https://DOMAIN" in result.output


def test_what_fails_is_status_1(tmp_path: Path) -> None:
    """A health port that is taken, an edge that is not there: the command line is right."""
    credentials = create_tunnel(str(tmp_path), "web", os.urandom).credentials
    with socket.create_server(("127.0.0.1", 0)) as taken:
        health = f"127.0.0.1:{taken.getsockname()[1]}"
        arguments = ["tunnel", "run", "--edge", "127.0.0.1:1", "--url", "http://127.0.0.1:1"]
        result = CliRunner(env={"TUNNEL_TOKEN": credentials.to_token()}).invoke(
            main, [*arguments, "--health", health]
        )
        assert (result.exit_code, f"{health}: Address already in use" in result.output) == (1, True)
    quick = ["tunnel", "quick", "--url", "http://127.0.0.1:1", "--edge", "https://127.0.0.1:1"]
    assert CliRunner().invoke(main, quick).exit_code == 1
