"""wireguard-go over the agent's bridge: processes in the hosts of a kernel lab, behind NATs."""

from __future__ import annotations

import json
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import trio

from tests import wireguard
from tests.system.test_programs import UNDERPASS, Programs, programs, start_relay
from tests.wireguard import Key, Tunnel, open_tunnel
from traversal import NodePrivate

pytestmark = [
    pytest.mark.jail,
    pytest.mark.interop,
    pytest.mark.skipif(bool(wireguard.why_not()), reason=wireguard.why_not()),
]

ADDRESSES = {"alice": "10.88.0.1", "bob": "10.88.0.2", "carol": "10.88.0.3"}
STREAM_BYTES = 8 << 20


@dataclass
class Ends:
    """Two hosts with a tunnel each."""

    a: Tunnel
    b: Tunnel


async def start_agents(running: Programs, relay_map: Path, *hosts: str) -> None:
    """`underpass up` on two hosts, each the bridge of a WireGuard on port 51820."""
    keys = {host: NodePrivate.generate(os.urandom) for host in hosts}
    for host, other in zip(hosts, hosts[::-1], strict=True):
        home = running.home(host)
        (home / "node.key").write_text(keys[host].reveal())
        (home / "underpass.toml").write_text(
            f'key = "node.key"\nrelay_map = "{relay_map}"\nwireguard = "127.0.0.1:51820"\n'
            f'[[peers]]\nname = "{other}"\nkey = "{keys[other].public()}"\nrelay = 900\n'
            'endpoint = "127.0.0.1:51901"\n'
        )
        await running.start(host, *UNDERPASS, "up", ready="home region 900")


@asynccontextmanager
async def tunnels(running: Programs, *hosts: str) -> AsyncIterator[Ends]:
    """wireguard-go on both, with the agents' sockets as endpoints."""
    wireguard.hide_run_directory()
    keys = {host: Key() for host in hosts}
    ends = []
    for host, other in zip(hosts, hosts[::-1], strict=True):
        end = await open_tunnel(
            running.lab.host(host), f"wg-{host}", keys[host], ADDRESSES[host], 51820
        )
        await end.add_peer(keys[other], f"{ADDRESSES[other]}/32", "127.0.0.1:51901")
        ends.append(end)
    try:
        yield Ends(*ends)
    finally:
        for end in ends:
            await end.close()


async def kind(running: Programs, host: str) -> str:
    """The kind of the path that the host's agent uses."""
    _, output = await running.run(host, *UNDERPASS, "status", "--json")
    (peer,) = json.loads(output)["peers"]
    assert not str(peer["path"]["address"]).startswith("10.88."), output
    found: str = peer["path"]["kind"]
    return found


async def echoes(ends: Ends, count: int, limit_seconds: float) -> int:
    """Send numbered datagrams through the tunnel, at most one in 20 ms; how many came back."""
    async with ends.b.host:
        server = trio.socket.socket(type=trio.socket.SOCK_DGRAM)
        await server.bind((ends.b.address, 0))
    async with ends.a.host:
        client = trio.socket.socket(type=trio.socket.SOCK_DGRAM)
        await client.bind((ends.a.address, 0))
    answers: set[bytes] = set()

    async def serve() -> None:
        while True:
            await server.sendto(*await server.recvfrom(2048))

    async def collect() -> None:
        while len(answers) < count:
            answers.add(await client.recv(2048))
        nursery.cancel_scope.cancel()

    with server, client:
        async with trio.open_nursery() as nursery:
            nursery.cancel_scope.deadline = trio.current_time() + limit_seconds
            nursery.start_soon(serve)
            nursery.start_soon(collect)
            for number in range(count):
                await client.sendto(number.to_bytes(4, "big") + bytes(1200), server.getsockname())
                await trio.sleep(0.02)
            await trio.sleep(limit_seconds)
    return len(answers)


async def stream(ends: Ends) -> float:
    """Carry 8 MiB by TCP through the tunnel; returns the seconds that took."""
    async with ends.b.host:
        listener = trio.socket.socket()
        await listener.bind((ends.b.address, 0))
        listener.listen(1)
    async with ends.a.host:
        sender = trio.socket.socket()
    data = os.urandom(1 << 16) * (STREAM_BYTES >> 16)
    received = bytearray()
    began = trio.current_time()

    async def receive() -> None:
        accepted, _ = await listener.accept()
        with accepted:
            while chunk := await accepted.recv(1 << 16):
                received.extend(chunk)

    with listener, trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(receive)
            await sender.connect(listener.getsockname())
            async with trio.SocketStream(sender) as out:
                await out.send_all(data)
    assert received == data
    return trio.current_time() - began


async def test_easy_nats(tmp_path: Path) -> None:
    """Datagrams and a stream go through the tunnel, directly, and not through the tunnel itself; a
    restarted agent carries on without WireGuard being told."""
    async with programs(tmp_path) as running:
        relay_map = await start_relay(running)
        await start_agents(running, relay_map, "alice", "bob")
        async with tunnels(running, "alice", "bob") as ends:
            # Until WireGuard has shaken hands, what is sent waits.
            assert await echoes(ends, 1, 10) == 1
            assert await echoes(ends, 50, 3) == 50
            assert await kind(running, "alice") == await kind(running, "bob") == "direct"
            seconds = await stream(ends)
            print(f"LAB 8 MiB by TCP over WireGuard over a link: {seconds:.2f} s")
            assert await ends.b.transferred() > STREAM_BYTES

            await running.stop("alice", *UNDERPASS)
            await running.start("alice", *UNDERPASS, "up", ready="home region 900")
            began = trio.current_time()
            while await echoes(ends, 1, 0.1) == 0:
                assert trio.current_time() - began < 10
            print(
                f"LAB the tunnel works {trio.current_time() - began:.2f} s after the agent is back"
            )
            assert await echoes(ends, 50, 3) == 50
            assert await kind(running, "bob") == "direct"


async def test_hard_nat(tmp_path: Path) -> None:
    """Behind a hard NAT the tunnel works from the first packet on, by the relay if need be."""
    async with programs(tmp_path) as running:
        relay_map = await start_relay(running)
        await start_agents(running, relay_map, "alice", "carol")
        async with tunnels(running, "alice", "carol") as ends:
            assert await echoes(ends, 1, 10) == 1
            assert await echoes(ends, 50, 3) == 50
            await stream(ends)


async def test_the_agent_sets_wireguard_up(tmp_path: Path) -> None:
    """Where the kernel makes no WireGuard interface the agent runs wireguard-go, gives both ends
    keys, addresses and a route, and takes the interface away when it ends."""
    async with programs(tmp_path) as running:
        wireguard.hide_run_directory()
        relay_map = await start_relay(running)
        hosts = ("alice", "bob")
        nodes = {host: NodePrivate.generate(os.urandom) for host in hosts}
        keys = {host: Key() for host in hosts}
        for host, other in zip(hosts, hosts[::-1], strict=True):
            home = running.home(host)
            (home / "node.key").write_text(nodes[host].reveal())
            (home / "wg.key").write_text(keys[host].private)
            (home / "underpass.toml").write_text(
                f'key = "node.key"\nrelay_map = "{relay_map}"\n[wireguard]\n'
                f'interface = "up-{host}"\nkey = "wg.key"\naddresses = ["{ADDRESSES[host]}/24"]\n'
                f'[[peers]]\nname = "{other}"\nkey = "{nodes[other].public()}"\nrelay = 900\n'
                f'wireguard_key = "{keys[other].public}"\n'
                f'allowed_ips = ["{ADDRESSES[other]}/32", "10.99.{host == "bob":d}.0/24"]\n'
            )
            await running.start(host, *UNDERPASS, "up", ready="home region 900")
        lab = running.lab
        ends = Ends(*(Tunnel(lab.host(host), f"up-{host}", ADDRESSES[host]) for host in hosts))
        while await echoes(ends, 1, 0.2) == 0:
            pass
        assert await echoes(ends, 50, 3) == 50
        assert await kind(running, "alice") == "direct"
        _, routes = await running.run("alice", "ip", "route", "show", "dev", "up-alice")
        assert "10.99.0.0/24" in routes
        await stream(ends)
        await running.stop("alice", *UNDERPASS)
        status, _ = await running.run("alice", "ip", "link", "show", "dev", "up-alice")
        assert status != 0
