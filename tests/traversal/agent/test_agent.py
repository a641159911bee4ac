"""The agent: its file, its control socket, its WireGuard bridge, and the commands."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Callable
from ipaddress import ip_address, ip_network
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import UUID

import pytest
import trio
from click.testing import CliRunner

from traversal import Address, NodePrivate, RelayMap, RelayOptions
from traversal.agent.config import AgentConfig, ConfigError, load_config, load_key
from traversal.agent.service import (
    Agent,
    ControlError,
    NoAgentError,
    _serve,
    ask,
    run_agent,
)
from traversal.cli import main
from traversal.paths.edge import EdgePolicy
from traversal.paths.home import HomePolicy
from traversal.wire.tunnel.credentials import Credentials


def write_config(directory: Path, text: str = "", *, peers: str = "") -> Path:
    directory.mkdir(exist_ok=True)
    key = directory / "node.key"
    if not key.exists():
        key.write_text(NodePrivate.generate(os.urandom).reveal())
    path = directory / "underpass.toml"
    path.write_text(f'key = "node.key"\nrelay_map = "relays.json"\n{text}\n{peers}')
    return path


def peer_table(name: str, key: str, **more: object) -> str:
    extra = "".join(f"{name} = {json.dumps(value)}\n" for name, value in more.items())
    return f'[[peers]]\nname = "{name}"\nkey = "{key}"\n{extra}'


def a_key() -> str:
    return str(NodePrivate.generate(os.urandom).public())


class TestConfig:
    def test_reads_everything(self, tmp_path: Path) -> None:
        """A full file is read, paths are relative to it."""
        path = write_config(
            tmp_path,
            'port = 41641\nwireguard = "127.0.0.1:51820"',
            peers=peer_table("attic", a_key(), relay=900, endpoint="127.0.0.1:51901"),
        )
        config = load_config(path)
        assert config.control == tmp_path / "underpass.sock"
        assert config.state == tmp_path / "underpass.state"
        assert config.peer("attic") is not None
        assert config.peer("cellar") is None
        assert "privkey" not in repr(config)

    def test_port_search_can_be_switched_off(self, tmp_path: Path) -> None:
        """For all peers or for one; by default ports are searched."""
        peers = peer_table("a", a_key()) + peer_table("b", a_key(), port_search=False)
        config = load_config(write_config(tmp_path, peers=peers))
        assert config.may_search_ports
        assert [peer.may_search_ports for peer in config.peers] == [True, False]
        assert not load_config(write_config(tmp_path, "port_search = false")).may_search_ports

    def test_interfaces(self, tmp_path: Path) -> None:
        """Interfaces and ranges can be allowed and denied; overlays stay denied."""
        table = '[interfaces]\ndeny = ["docker"]\ndeny_networks = ["10.0.0.0/8"]\n'
        table += 'allow_networks = ["10.0.0.0/7", "2001:db8::/32"]'
        found = load_config(write_config(tmp_path, table)).interfaces
        assert found.admits("eth0")
        assert not found.admits("docker0")
        assert not found.admits("tailscale0")
        assert found.denied_networks == (ip_network("10.0.0.0/8"),)
        addresses = ("11.0.0.1", "2001:db8::1", "10.0.0.1", "192.0.2.1", "2001:db9::1")
        used = [text for text in addresses if found.admits_address(ip_address(text))]
        assert used == ["11.0.0.1", "2001:db8::1"]

    def test_home_and_static_addresses(self, tmp_path: Path) -> None:
        """A home can be pinned or banned, and a forwarded port be told; by default neither."""
        usual = load_config(write_config(tmp_path))
        assert (usual.home, usual.static_addresses) == (HomePolicy(), ())
        tables = 'addresses = ["192.0.2.7:9"]\n[home]\npin = 900\nban = [901, 902]'
        found = load_config(write_config(tmp_path, tables))
        assert found.home == HomePolicy(900, frozenset({901, 902}))
        assert found.static_addresses == (Address("192.0.2.7", 9),)
        only = load_config(write_config(tmp_path, '[interfaces]\nallow = ["wlan"]')).interfaces
        assert only.admits("wlan0")
        assert not only.admits("eth0")

    def test_edge(self, tmp_path: Path) -> None:
        """The table names the edge, a credentials file and when to use it."""
        table = '[edge]\naddresses = {}\ncredentials = "tunnel.json"\n'
        path = write_config(tmp_path, table.format('["e.example:7844", "[::1]:1"]'))
        with pytest.raises(ConfigError, match=r"tunnel\.json: No such file"):
            load_config(path)
        (tmp_path / "tunnel.json").write_text("{}")
        with pytest.raises(ConfigError, match=r"tunnel\.json"):
            load_config(path)
        credentials = Credentials(UUID(int=5), "me", b"s" * 32)
        (tmp_path / "tunnel.json").write_text(credentials.to_file())
        edge = load_config(path).edge
        assert edge is not None
        assert edge.addresses == (("e.example", 7844), ("::1", 1))
        assert (edge.credentials, edge.policy) == (credentials, EdgePolicy.LAST)
        for wrong in ("[]", '["e.example"]', '["e.example:x"]'):
            with pytest.raises(ConfigError, match=r"edge\.addresses"):
                load_config(write_config(tmp_path, table.format(wrong)))
        with pytest.raises(ConfigError, match="policy"):
            load_config(write_config(tmp_path, table.format("[]") + 'policy = "never"'))

    @pytest.mark.parametrize(
        ("text", "complaint"),
        [
            ("port = 70000", "port: must be a whole number <= 65535"),
            ('speed = "fast"', "unknown key 'speed'"),
            ("prot = 1", "unknown key 'prot'; did you mean 'port'"),
            ('port = "x"', "port: must be a whole number, not text in quotes"),
            ("[[peers]]\nrelai = 9", "peer 1: unknown key 'relai'; did you mean 'relay'"),
            ('[[peers]]\nname = "x"', "peer 1: 'key' is missing"),
            ('[peers]\nname = "x"', r"begin each peer's table with \[\[peers\]\]"),
            ("wireguard = 3", "wireguard: must be text in quotes or a table"),
            ("[interfaces]\nalow = []", "interfaces: unknown key 'alow'; did you mean 'allow'"),
            (
                '[edge]\naddresses = []\ncredentials = ""\npolicy = "lst"',
                "edge, policy: 'lst' is none; did you mean 'last'",
            ),
            ("port = ", "Invalid value"),
            (peer_table("a", "nodekey:12"), r"peer 1 \(a\), key"),
            (peer_table("", a_key()), "peer 1, name"),
            (peer_table("a", a_key()) + peer_table("a", a_key()), "two peers have the name a"),
            (peer_table("a", a_key(), endpoint="127.0.0.1:1"), "write wireguard"),
            (peer_table("a", a_key(), endpoint="192.0.2.1:1"), "is no loopback address"),
            ('wireguard = "here"', "must read IP:PORT"),
            ('[interfaces]\ndeny_networks = ["10.0.0.1/8"]', "deny_networks: 10.0.0.1/8 has host"),
            ('[interfaces]\nallow_networks = ["x"]', "allow_networks: 'x' does not"),
            ('addresses = ["192.0.2.7"]', "addresses: '192.0.2.7' is no address"),
            ("[home]\npin = -1", "home, pin: must be"),
        ],
    )
    def test_names_what_is_wrong(self, tmp_path: Path, text: str, complaint: str) -> None:
        """Errors name the file and the place."""
        path = write_config(tmp_path, text)
        with pytest.raises(ConfigError, match=complaint) as caught:
            load_config(path)
        assert str(path) in str(caught.value)

    def test_full_tunnel_needs_a_mark(self, tmp_path: Path) -> None:
        """Everything through a peer would lead the node's own packets there, too."""
        guard_key = base64.b64encode(bytes(32)).decode()
        (tmp_path / "wg.key").write_text(guard_key)
        text = '[wireguard]\ninterface = "wg0"\nkey = "wg.key"\naddresses = ["10.8.0.1/24"]\n'
        peer = peer_table("exit", a_key(), wireguard_key=guard_key, allowed_ips=["0.0.0.0/0"])
        with pytest.raises(ConfigError, match="write socket_mark"):
            load_config(write_config(tmp_path, text, peers=peer))
        config = load_config(write_config(tmp_path, "socket_mark = 0x7570\n" + text, peers=peer))
        assert config.interface is not None
        assert config.socket_mark == config.interface.mark == 0x7570

    def test_missing_files(self, tmp_path: Path) -> None:
        """A missing key is explained by how to make one."""
        with pytest.raises(ConfigError, match="No such file"):
            load_config(tmp_path / "none.toml")
        path = write_config(tmp_path)
        (tmp_path / "node.key").unlink()
        with pytest.raises(ConfigError, match="underpass keygen -o"):
            load_config(path)


class TestAgent:
    @pytest.fixture
    async def relay_map(
        self,
        nursery: trio.Nursery,
        tiny_relay: Callable[[], Any],
        map_of: Callable[..., RelayMap],
    ) -> RelayMap:
        relay = tiny_relay()
        await nursery.start(relay.serve)
        return map_of(relay)

    async def start(self, nursery: trio.Nursery, path: Path, relay_map: RelayMap) -> Agent:
        config = load_config(path)

        async def run(*, task_status: trio.TaskStatus[Any]) -> None:
            await run_agent(
                config,
                relay_map,
                hosts={4: "127.0.0.1"},
                relay_options=RelayOptions(plain=True),
                map_ports=False,
                task_status=task_status,
            )

        agent: Agent = await nursery.start(run)
        return agent

    async def test_bridges_wireguard(
        self, nursery: trio.Nursery, relay_map: RelayMap, tmp_path: Path
    ) -> None:
        """What one host's WireGuard sends to its peer's endpoint reaches the other's."""
        keys = [NodePrivate.generate(os.urandom) for _ in range(2)]
        guards = [trio.socket.socket(type=trio.socket.SOCK_DGRAM) for _ in range(2)]
        ports = []
        for guard in guards:
            await guard.bind(("127.0.0.1", 0))
            ports.append(guard.getsockname()[1])
        probe = trio.socket.socket(type=trio.socket.SOCK_DGRAM)
        with guards[0], guards[1], probe:
            endpoints = []
            for number in range(2):
                directory = tmp_path / str(number)
                directory.mkdir()
                (directory / "node.key").write_text(keys[number].reveal())
                with trio.socket.socket(type=trio.socket.SOCK_DGRAM) as free:
                    await free.bind(("127.0.0.1", 0))
                    endpoint = free.getsockname()
                endpoints.append(endpoint)
                path = write_config(
                    directory,
                    f'wireguard = "127.0.0.1:{ports[number]}"',
                    peers=peer_table(
                        "other",
                        str(keys[1 - number].public()),
                        relay=900,
                        endpoint=f"127.0.0.1:{endpoint[1]}",
                    ),
                )
                config = (await self.start(nursery, path, relay_map)).config
            await probe.sendto(b"\1\0\0\0 from a stranger on this host", endpoints[0])
            for packet in (b"\1\0\0\0 handshake", b"\4\0\0\0 data"):
                await guards[0].sendto(packet, endpoints[0])
                with trio.fail_after(5):
                    assert await guards[1].recvfrom(2048) == (packet, endpoints[1])
                await guards[1].sendto(packet, endpoints[1])
                with trio.fail_after(5):
                    assert await guards[0].recvfrom(2048) == (packet, endpoints[0])
            status = await ask(config.control, "status")
            assert status["home_region"] == 900
            assert [peer["name"] for peer in status["peers"]] == ["other"]
            answer = await ask(config.control, "ping", peer="other")
            assert answer["ping"]["latency_seconds"] > 0
            with pytest.raises(ControlError, match="no peer 'nobody'"):
                await ask(config.control, "ping", peer="nobody")
            with pytest.raises(ControlError, match="unknown command"):
                await ask(config.control, "dance")
            with pytest.raises(ConfigError, match="another agent answers there"):
                await run_agent(config, relay_map, hosts={4: "127.0.0.1"}, map_ports=False)

    async def test_reload(self, nursery: trio.Nursery, relay_map: RelayMap, tmp_path: Path) -> None:
        """Peers come, go and change; one that stays keeps its link, and a bridge's port moves on
        to the next one. What can't be had is told by name, and what needs a restart."""
        stays, goes, comes = a_key(), a_key(), a_key()
        with trio.socket.socket(type=trio.socket.SOCK_DGRAM) as free:
            await free.bind(("127.0.0.1", 0))
            endpoint = f"127.0.0.1:{free.getsockname()[1]}"

        def config_of(*peers: str, text: str = 'wireguard = "127.0.0.1:9"') -> AgentConfig:
            return load_config(write_config(tmp_path, text, peers="".join(peers)))

        first = peer_table("stays", stays, relay=900)
        config_of(first, peer_table("goes", goes, relay=900, endpoint=endpoint))
        agent = await self.start(nursery, tmp_path / "underpass.toml", relay_map)
        (link,) = (link for link in agent.node.links if str(link.peer_key) == stays)

        config = config_of(first, peer_table("comes", comes, relay=900, endpoint=endpoint))
        assert await agent.reload(config, relay_map) == ()
        assert {str(link.peer_key) for link in agent.node.links} == {stays, comes}
        assert link in agent.node.links
        status = await ask(config.control, "status")
        assert sorted(peer["name"] for peer in status["peers"]) == ["comes", "stays"]

        lost = peer_table("lost", goes, relay=77)
        config = config_of(lost, first, text="port = 41641")
        with pytest.raises(ConfigError, match="peer lost: region 77 has no relay"):
            await agent.reload(config, relay_map)
        assert {str(link.peer_key) for link in agent.node.links} == {stays}
        assert await agent.reload(config_of(first, text="port = 41641"), relay_map) == (
            "port",
            "wireguard",
        )

    async def test_nobody_there(self, tmp_path: Path) -> None:
        """Asking without an agent says what to start."""
        with pytest.raises(NoAgentError, match="underpass up"):
            await ask(tmp_path / "none.sock", "status")


class TestCommands:
    def test_keygen(self, tmp_path: Path) -> None:
        """A key file is private, never overwritten, and its public half is printed."""
        runner = CliRunner()
        path = tmp_path / "node.key"
        made = runner.invoke(main, ["keygen", "-o", str(path)])
        assert made.exit_code == 0
        assert str(NodePrivate.parse(path.read_text().strip()).public()) == made.output.strip()
        assert path.stat().st_mode & 0o777 == 0o600
        again = runner.invoke(main, ["keygen", "-o", str(path)])
        assert again.exit_code == 1
        assert "never overwritten" in again.output
        printed = json.loads(runner.invoke(main, ["keygen", "--json"]).output)
        assert str(NodePrivate.parse(printed["private"]).public()) == printed["public"]

    @pytest.mark.parametrize(
        ("arguments", "complaint"),
        [
            (["netcheck", "-c", "none.toml"], "no relay map"),
            (["netcheck", "--map", "none.json"], "none.json: No such file"),
            (["netcheck", "--map", "ftp://x"], "file or an https URL"),
            (["status", "-c", "none.toml"], "none.toml: No such file"),
            (["up", "-c", "none.toml"], "none.toml: No such file"),
            (["ping", "nodekey:1", "-c", "none.toml"], "'nodekey:1' is no node key"),
        ],
    )
    def test_wrong_input(self, arguments: list[str], complaint: str) -> None:
        """Every mistake ends with one line and status 2."""
        result = CliRunner().invoke(main, arguments)
        assert result.exit_code == 2
        assert complaint in result.output
        assert "Traceback" not in result.output

    def test_failures(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Where nothing is wrong with what was typed, the status is 1."""
        monkeypatch.chdir(tmp_path)
        write_config(tmp_path, 'control = "none/a.sock"')
        (tmp_path / "relays.json").write_text('{"Regions": {}}')
        for arguments, complaint in (
            (["netcheck", "--map", "http://127.0.0.1:1"], "refused; see whether the address"),
            (["status"], 'is "underpass up" running?'),
            (["up"], "none/a.sock: No such file or directory; set control to a path"),
            (["keygen", "-o", "none/node.key"], "none/node.key: No such file"),
        ):
            result = CliRunner().invoke(main, arguments)
            assert (result.exit_code, complaint in result.output) == (1, True), result.output

    @pytest.mark.parametrize("mode", [0o600, 0o644, 0o640])
    def test_secrets_that_others_can_read(
        self, mode: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        """They are used, and there is a warning that names the remedy."""
        path = tmp_path / "node.key"
        path.write_text(NodePrivate.generate(os.urandom).reveal())
        path.chmod(mode)
        load_key(path)
        assert (f"chmod 600 {path}" in caplog.text) == (mode != 0o600)

    @pytest.mark.parametrize("is_offline", [True, False])
    def test_netcheck_tells_scripts(
        self, is_offline: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Where no relay answers, the exit status and one line say so, beside the JSON."""

        async def netcheck(map_source: str | None, config_path: Path) -> dict[str, Any]:
            return {"nat": {"is_offline": is_offline}}

        monkeypatch.setattr("traversal.agent.commands.netcheck", netcheck)
        result = CliRunner().invoke(main, ["netcheck", "--json"])
        assert result.exit_code == is_offline
        assert json.loads(result.stdout)["nat"]["is_offline"] is is_offline
        assert ("no relay answers; see whether" in result.stderr) is is_offline


@pytest.mark.parametrize("question", [b"[" * 4095, b"null", b'{"command":[]}', b"\xff", b"\0"])
async def test_no_question_ends_the_agent(question: bytes) -> None:
    """Whatever is asked, there is an answer."""
    ours, theirs = trio.socket.socketpair()
    node: Any = None  # is not looked at
    peers: Any = SimpleNamespace(names={})
    async with trio.SocketStream(ours) as stream, trio.open_nursery() as nursery:
        nursery.start_soon(_serve, theirs, node, peers)
        await stream.send_all(question + b"\n")
        assert b'"error"' in await stream.receive_some()
