"""The probe, the load test and the target they take, against a relay in this process."""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, closing, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import trio
from click.testing import CliRunner

from relay.config import Config
from relay.listeners import open_listeners
from relay.load_clients import close_clients, connect_clients
from relay.load_pair import Load, LoadError
from relay.load_run import LoadResult, run_load
from relay.loadtest import loadtest_command
from relay.probe import Outcome, plan, probe_command, run_checks
from relay.service import Identity, Service
from relay.stun import StunServer
from relay.targets import TargetError, parse_target
from traversal.io.dial import CLIENT_INFO, Target
from traversal.keys import MeshKey, NodePrivate
from traversal.relay_map import (
    CertificateName,
    CertificatePin,
    CertificateUnchecked,
    Dial,
    RelayNode,
)

MESH_KEY = MeshKey(bytes(range(32)))


@asynccontextmanager
async def relays(count: int, **settings: object) -> AsyncIterator[list[RelayNode]]:
    """Relays that know nothing of each other, and one STUN server."""
    config = Config.dev({key.replace("__", "."): value for key, value in settings.items()})
    with ExitStack() as stack:
        async with trio.open_nursery() as nursery:
            stun = await nursery.start(StunServer([("127.0.0.1", 0)]).serve)
            nodes = []
            for number in range(count):
                listener = open_listeners(config.listen.derp[0])[0]
                stack.enter_context(closing(listener))
                key = NodePrivate.generate(os.urandom)
                identity = Identity(key, MESH_KEY)
                await nursery.start(Service(config, identity, [listener]).run)
                nodes.append(
                    RelayNode(
                        f"900{'abc'[number]}",
                        900,
                        "127.0.0.1",
                        ipv6=Dial.NEVER,
                        stun_port=stun[0][1],
                        derp_port=listener.getsockname()[1],
                        insecure_for_tests=True,
                    )
                )
            yield nodes
            nursery.cancel_scope.cancel()


async def probed(
    nodes: list[RelayNode],
    *,
    load: bool = False,
    timeout_seconds: float = 20,
    mesh_key: MeshKey | None = None,
) -> dict[tuple[str, str], Outcome]:
    checks = list(plan(nodes, plain=False, load=load, mesh_key=mesh_key))
    outcomes = await run_checks(checks, timeout_seconds)
    return {(outcome.node, outcome.check): outcome for outcome in outcomes}


class TestProbe:
    async def test_a_good_relay_passes(self) -> None:
        """Every check of a lone relay, with its load."""
        async with relays(1) as nodes:
            outcomes = await probed(nodes, load=True)
        assert [outcome for outcome in outcomes.values() if not outcome.passed] == []
        assert [check for _, check in outcomes] == [
            *("TLS", "handshake", "ping", "HTTP", "STUN IPv4"),
            *("packet", "bandwidth", "queue delay"),
        ]
        assert outcomes["900a", "TLS"].values["meta_certificate"] is True
        assert str(outcomes["900a", "handshake"].values["server_key"]).startswith("nodekey:")
        assert outcomes["900a", "STUN IPv4"].values["mapped_address"][0] == "127.0.0.1"  # type: ignore[index]

    async def test_a_closed_relay_lets_in_who_has_the_mesh_key(self, tmp_path: Path) -> None:
        """Its own operator; others learn that they are not admitted."""
        keys = tmp_path / "keys"
        keys.write_text(f"{NodePrivate.generate(os.urandom).public()}\n")
        closed = {"admission__mode": "closed", "admission__keys_file": str(keys)}
        async with relays(1, **closed) as nodes:
            refused = await probed(nodes)
            outcomes = await probed(nodes, mesh_key=MESH_KEY)
            clients = await connect_clients(
                Target.of_node(nodes[0]), 2, info=replace(CLIENT_INFO, mesh_key=MESH_KEY)
            )
            close_clients(clients)
        assert not refused["900a", "ping"].passed
        assert [outcome for outcome in outcomes.values() if not outcome.passed] == []

    async def test_servers_of_a_region_without_a_mesh_fail(self) -> None:
        """Packets pass inside each server and not between the two."""
        async with relays(2) as nodes:
            outcomes = await probed(nodes, timeout_seconds=1)
        paths = {node: outcome.passed for (node, check), outcome in outcomes.items() if ">" in node}
        assert paths == {
            "900a > 900a": True,
            "900a > 900b": False,
            "900b > 900a": False,
            "900b > 900b": True,
        }
        assert outcomes["900a > 900b", "packet"].text == "not done within 1 s"

    async def test_an_unreachable_relay_is_told_once(self) -> None:
        """What needs it is left out; STUN is still asked."""
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))
            port = unused.getsockname()[1]
            node = RelayNode("900a", 900, "127.0.0.1", derp_port=port, stun_port=port)
            outcomes = await probed([node])
        assert [(check, outcome.passed) for (_, check), outcome in outcomes.items()] == [
            ("TLS", False),
            ("STUN IPv4", False),
        ]
        assert "Connection refused" in outcomes["900a", "TLS"].text


class TestLoad:
    async def run(self, target: Target, load: Load, *, pairs: int = 3) -> LoadResult:
        clients = await connect_clients(target, 2 * pairs)
        try:
            return await trio.to_thread.run_sync(partial(run_load, clients, load, seconds=3))
        finally:
            close_clients(clients)

    @pytest.mark.parametrize(
        "load",
        [
            Load(8, 300),
            Load(1400, 300, window=4, full_records=True),
            Load(65536, 150),
            Load(200, 300, rate=2000),
        ],
    )
    async def test_everything_arrives(self, load: Load) -> None:
        """Closed and open loop, small and big: what was sent was received and verified."""
        async with relays(1) as nodes:
            result = await self.run(Target.of_node(nodes[0]), load)
        assert load.packets // 3 <= result.sent <= load.packets
        assert (result.lost, result.shed) == (0, 0)
        assert 0 < result.received <= load.packets
        assert 0 < result.latency_seconds(0.5) <= result.latency_seconds(1.0)

    async def test_a_server_that_closes_is_an_error(self) -> None:
        """And not a result of zero."""
        async with relays(1) as nodes:
            clients = await connect_clients(Target.of_node(nodes[0]), 2)
        with pytest.raises(LoadError, match="closed"):
            run_load(clients, Load(100, 100), seconds=1)
        close_clients(clients)


class TestTargets:
    def test_forms(self) -> None:
        """Host, port and URL; certificate by name, by pin, or not looked at."""
        assert parse_target("relay.example.com").policy == CertificateName("relay.example.com")
        assert parse_target("relay.example.com").port == 443
        assert parse_target("[2001:db8::1]:8443").host == "2001:db8::1"
        assert parse_target("http://relay.example.com").policy is None
        assert parse_target("http://relay.example.com").port == 80
        assert parse_target("h:1", insecure=True).policy == CertificateUnchecked()
        pin = "sha256-raw:" + "ab" * 32
        assert parse_target("h", pin=pin).policy == CertificatePin(b"\xab" * 32)

    @pytest.mark.parametrize(
        ("text", "pin", "message"),
        [
            ("ftp://relay.example.com", "", "is no DERP server; write host"),
            ("relay.example.com:99999", "", "is no DERP server"),
            ("relay.example.com/other", "", "is no DERP server"),
            ("", "", "is no DERP server"),
            ("under score!", "", "no DNS name"),
            ("h", "abc", "does not start with sha256-raw:"),
            ("h", "sha256-raw:12", "64 hex digits"),
        ],
    )
    def test_mistakes(self, text: str, pin: str, message: str) -> None:
        """What to write instead."""
        with pytest.raises(TargetError, match=message):
            parse_target(text, pin=pin)


@contextmanager
def relay_in_thread() -> Iterator[str]:
    """host:port of a relay, for commands that run Trio themselves."""
    started = threading.Event()
    stop: list[Callable[[], object]] = []
    address = []

    async def serve() -> None:
        async with relays(1) as nodes:
            done = trio.Event()
            token = trio.lowlevel.current_trio_token()
            stop.append(lambda: token.run_sync_soon(done.set))
            address.append(f"127.0.0.1:{nodes[0].derp_port}")
            started.set()
            await done.wait()

    thread = threading.Thread(target=trio.run, args=(serve,))
    thread.start()
    started.wait(10)
    try:
        yield address[0]
    finally:
        stop[0]()
        thread.join()


class TestCommands:
    def test_probe_json_and_status(self) -> None:
        """0 when all is well, 1 when the certificate is not accepted."""
        with relay_in_thread() as address:
            arguments = [address, "--no-load", "--json", "--stun-port=-1"]
            good = CliRunner().invoke(probe_command, [*arguments, "--insecure"])
            bad = CliRunner().invoke(probe_command, arguments)
        assert (good.exit_code, bad.exit_code) == (0, 1)
        assert {outcome["check"] for outcome in json.loads(good.stdout)} == {
            *("TLS", "handshake", "ping", "HTTP", "packet")
        }
        assert "certificate is not accepted" in json.loads(bad.stdout)[0]["text"]

    def test_probe_with_wrong_input(self, tmp_path: Path) -> None:
        """Status 2 and a sentence."""
        relay_map = tmp_path / "map.json"
        relay_map.write_text('{"Regions": {}}')
        for arguments, message in (
            ([], "say what to probe"),
            (["h", "--region", "1"], "choose from a --map"),
            (["h", "--map", str(relay_map)], "give either SERVER"),
            (["--map", str(tmp_path / "none")], "No such file"),
            (["--map", str(relay_map), "--region", "5"], "no region 5; it has none"),
            (["--map", str(relay_map), "--node", "x"], "no node 'x'"),
            (["--map", str(relay_map)], "holds no node"),
            (["h", "--mesh-key-file", str(relay_map)], "map.json"),
        ):
            result = CliRunner().invoke(probe_command, arguments)
            assert (result.exit_code, message in result.stderr) == (2, True), result.stderr

    def test_loadtest(self) -> None:
        """A bounded run, as JSON."""
        with relay_in_thread() as address:
            arguments = [address, "--insecure", "--pairs=2", "--rate=500", "--seconds=0.3"]
            result = CliRunner().invoke(loadtest_command, [*arguments, "--json"])
        report = json.loads(result.stdout)
        assert report["packets_lost"] == 0
        assert report["packets_sent"] > 0

    def test_loadtest_errors(self) -> None:
        """A server that is not there, and one that can't be."""
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))
            result = CliRunner().invoke(loadtest_command, [f"127.0.0.1:{unused.getsockname()[1]}"])
        assert (result.exit_code, "Connection refused" in result.stderr) == (1, True)
        result = CliRunner().invoke(loadtest_command, ["ftp://x"])
        assert (result.exit_code, "is no DERP server" in result.stderr) == (2, True)
