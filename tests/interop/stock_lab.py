"""Tailcat and a node of ours in hosts of a kernel lab, with our relay between them.

What test_tailcat does on loopback needs no network; what is here does: paths that die, addresses
that move, relays that restart, small MTUs, IPv6. Everything runs in the jail of the test.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from typing import Any, Final

import trio

from netlab.kernel.lab import KernelLab
from netlab.model import Topology
from tests.interop.tailcat import MEOW, PURR, REGION, be_admitted, encode_address, program
from tests.system.kernel_world import START_SECONDS
from traversal import (
    Address,
    DiscoPublic,
    Link,
    Node,
    NodePrivate,
    NodePublic,
    PathChange,
    PathKind,
    RelayMap,
    open_node,
)
from traversal.relay_map import Dial, Region, RelayNode

STUN_PORT: Final = 3478
MAP_PORT: Final = 80


@dataclass
class Stock:
    """A running tailcat. `text()` is what it said."""

    process: trio.Process
    home: Path

    def text(self) -> str:
        return (self.home / "log").read_text(errors="replace")

    async def until(self, condition: Callable[[str], object], seconds: float, what: str) -> float:
        """Wait until its log fulfils something; returns how long it took."""
        began = trio.current_time()
        with trio.move_on_after(seconds):
            while not condition(self.text()):  # noqa: ASYNC110  # the log is a file
                await trio.sleep(0.02)
            return trio.current_time() - began
        raise AssertionError(f"{what}: not within {seconds} s; tailcat said\n{self.text()[-4000:]}")

    async def until_using(self, host: str, seconds: float, *, after: int = 0) -> float:
        """Until it says that it sends to an IPv4 address (empty: any) directly, in its log from
        `after` on."""
        said = f"now using {host}:" if host else "now using "
        return await self.until(lambda text: said in text[after:], seconds, said)


@dataclass
class StockLab:
    """The lab: our relay is on r0 and can be stopped and started."""

    lab: KernelLab
    nursery: trio.Nursery
    directory: Path
    relay_map: RelayMap
    is_ipv6_only: bool
    _relay: trio.Process | None = field(default=None)
    _count: int = 0

    # ---- the relay

    async def start_relay(self) -> None:
        """Start the relay; a second time it has another key and certificate, as a stranger's."""
        host = self.lab.host("r0")
        command = [sys.executable, "-m", "relay.cli", "serve", "--dev", "--derp", ":443"]
        command += ["--stun", f":{STUN_PORT}"]
        ready = self.directory / f"map-{self._count}"
        self._count += 1
        command += ["--http", "off", "--admin", "off", "--dev-map", str(ready)]
        with (self.directory / "relay.log").open("ab") as log:
            self._relay = await host.open_process(command, stdout=log, stderr=log)
        with trio.fail_after(START_SECONDS):
            while not ready.exists():
                assert self._relay.poll() is None, (self.directory / "relay.log").read_text()
                await trio.sleep(0.02)

    async def kill_relay(self) -> None:
        """End it without a word to its clients."""
        assert self._relay is not None
        self._relay.kill()
        await self._relay.wait()

    async def serve_map(self, *, task_status: trio.TaskStatus[None]) -> None:
        """The relay map by HTTP, on every host itself: it takes no part in what is tested."""
        body = self.relay_map.to_json().encode()
        head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"

        async def answer(stream: trio.SocketStream) -> None:
            async with stream:
                await stream.receive_some()
                await stream.send_all(head.encode() + body)

        async def serve(*, task_status: trio.TaskStatus[list[trio.SocketListener]]) -> None:
            await trio.serve_tcp(answer, MAP_PORT, host="127.0.0.1", task_status=task_status)

        async with trio.open_nursery() as nursery:
            for name in (host.name for host in self.lab.topology.hosts):
                async with self.lab.host(name):
                    await nursery.start(serve)
            task_status.started()

    # ---- tailcat

    @asynccontextmanager
    async def tailcat(self, host: str, *arguments: str, **environment: str) -> AsyncIterator[Stock]:
        """The program in a host, for the length of the block."""
        self._count += 1
        home = self.directory / f"tailcat-{self._count}"
        home.mkdir()
        with (home / "log").open("wb") as log:
            process = await self.lab.host(host).open_process(
                [str(program()), *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={
                    "HOME": str(home),
                    "PATH": os.environ["PATH"],
                    "TAILCAT_DERPMAP_URL": f"http://127.0.0.1:{MAP_PORT}/",
                    "TAILCAT_ADDR_FILE": str(home / "address"),
                    **environment,
                },
            )
        try:
            yield Stock(process, home)
        finally:
            process.kill()
            with trio.CancelScope(shield=True):
                await process.wait()

    @asynccontextmanager
    async def server(self, host: str, **environment: str) -> AsyncIterator[Stock]:
        """Tailcat that waits for us (role A)."""
        arguments = ("serve", "--verbose", "--full-address", "7777")
        async with self.tailcat(host, *arguments, **environment) as stock:
            file = stock.home / "address"
            await stock.until(
                lambda text: file.exists() and file.read_text() and "endpoints changed: " in text,
                15,
                "its address",
            )
            yield stock

    @asynccontextmanager
    async def caller(self, host: str, node: Node, **environment: str) -> AsyncIterator[Stock]:
        """Tailcat that calls us and keeps talking (role B): a connection a second to a port that it
        forwards, so that its WireGuard says hello for ever."""
        address = encode_address(node.public_key, node.disco_key, REGION)
        arguments = ("--verbose", "forward", address, "6000:80")

        async def knock() -> None:
            async with self.lab.host(host):
                while True:
                    try:
                        async with await trio.open_tcp_stream("127.0.0.1", 6000) as stream:
                            await stream.send_all(b"x")
                            await trio.sleep(1)
                    except OSError:
                        await trio.sleep(0.1)

        async with (
            self.tailcat(host, *arguments, **environment) as stock,
            trio.open_nursery() as nursery,
        ):
            nursery.start_soon(knock)
            yield stock
            nursery.cancel_scope.cancel()

    # ---- ours

    @asynccontextmanager
    async def node(self, host: str, **options: Any) -> AsyncIterator[Node]:
        """A node of ours, which admits whoever asks as tailcat does."""
        requests, asked = trio.open_memory_channel[tuple[NodePublic, DiscoPublic]](8)

        def handle_stranger(_: int, key: NodePublic, payload: bytes) -> None:
            if payload.startswith(MEOW) and payload[5:37] == key.raw:
                try:
                    requests.send_nowait((key, DiscoPublic(payload[37:69])))
                except trio.WouldBlock:
                    pass

        async def admit(node: Node) -> None:
            async for key, disco_key in asked:
                link = await node.connect(key, relay=REGION, disco_key=disco_key)
                await link.send(PURR)

        async with (
            self.lab.host(host),
            open_node(
                NodePrivate.generate(os.urandom),
                self.relay_map,
                handle_stranger=handle_stranger,
                map_ports=False,
                **options,
            ) as node,
            trio.open_nursery() as nursery,
        ):
            nursery.start_soon(admit, node)
            yield node
            nursery.cancel_scope.cancel()

    async def connect(self, node: Node, stock: Stock) -> Link:
        """To a tailcat that serves. A control plane would tell its endpoints; here its log does."""
        listed = re.findall(r"endpoints changed: (.*)", stock.text())
        candidates = [Address.parse(text) for text in re.findall(r"(\S+) \(", listed[-1])]
        address = (stock.home / "address").read_text().strip()
        link = await be_admitted(node, address, candidates=candidates)
        # It answers before it knows our disco key, and would drop a CallMeMaybe that comes first.
        await stock.until(lambda text: "derp route for [" in text, 10, "having us as a peer")
        return link

    # ---- the network

    async def block_udp(self, *hosts: str) -> None:
        """UDP that comes to these hosts is dropped in silence, but for STUN's answers."""
        rules = (
            "table inet cut {\nchain input {\ntype filter hook input priority 0;\n"
            f"udp sport != {STUN_PORT} drop\n}}\n}}\n"
        )
        for host in hosts:
            await self.lab.host(host).run_process(["nft", "-f", "-"], stdin=rules.encode())

    async def unblock_udp(self, *hosts: str) -> None:
        for host in hosts:
            await self.lab.host(host).run_process(["nft", "delete", "table", "inet", "cut"])


async def until_direct(
    link: Link, seconds: float, is_wanted: Callable[[Any], bool] = bool
) -> float:
    """Until we send directly, to an address that is wanted; returns how long it took."""
    return await until_path(
        link,
        lambda: link.path.kind is PathKind.DIRECT and is_wanted(link.path.address),
        seconds,
        "a direct path",
    )


async def until_path(
    link: Link, condition: Callable[[], object], seconds: float, what: str
) -> float:
    """Until a change of path makes something true."""
    began = trio.current_time()
    changes = link.path_changes()
    with trio.move_on_after(seconds):
        while not condition():
            await changes.__anext__()
        return trio.current_time() - began
    raise AssertionError(f"{what}: not within {seconds} s\n{link.verdict().text()}")


@asynccontextmanager
async def collect_changes(link: Link) -> AsyncIterator[list[PathChange]]:
    """The link's changes of path, as they happen."""
    changes: list[PathChange] = []

    async def collect() -> None:
        async for change in link.path_changes():
            changes.append(change)  # noqa: PERF401  # one at a time

    async with trio.open_nursery() as nursery:
        nursery.start_soon(collect)
        yield changes
        nursery.cancel_scope.cancel()


async def until(condition: Callable[[], object], seconds: float) -> None:
    """Wait for what no event tells."""
    with trio.fail_after(seconds):
        while not condition():  # noqa: ASYNC110
            await trio.sleep(0.02)


async def only_link(node: Node, seconds: float = 15) -> Link:
    """The link to the one tailcat that called."""
    await until(lambda: node.links, seconds)
    (link,) = node.links
    return link


@asynccontextmanager
async def busy(link: Link, every_seconds: float = 0.1) -> AsyncIterator[None]:
    """Traffic in the background: WireGuard's hello, which nobody can open."""

    async def send() -> None:
        while True:
            await link.send(b"\1\0\0\0" + os.urandom(144))
            await trio.sleep(every_seconds)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(send)
        yield
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def stock_lab(
    of: Topology, directory: Path, *, is_ipv6_only: bool = False, **options: Any
) -> AsyncIterator[StockLab]:
    """The topology in the kernel, with our relay on r0. With `is_ipv6_only` hosts lose IPv4."""
    async with KernelLab(of, observe=False, **options) as lab, trio.open_nursery() as nursery:
        v4 = [a for a in lab.host("r0").addresses if ":" not in a]
        v6 = [a for a in lab.host("r0").addresses if ":" in a]
        if is_ipv6_only:
            for host in of.hosts:
                flush = ["ip", "-4", "address", "flush", "scope", "global"]
                await lab.host(host.name).run_process(flush)
        node = RelayNode(
            f"{REGION}a",
            REGION,
            "relay.test",
            ipv4=Dial.NEVER if is_ipv6_only else IPv4Address(v4[0]),
            ipv6=IPv6Address(v6[0]) if v6 else Dial.NEVER,
            stun_port=STUN_PORT,
            derp_port=443,
            insecure_for_tests=True,
        )
        relay_map = RelayMap({REGION: Region(REGION, "lab", "Laboratory", (node,))})
        world = StockLab(lab, nursery, directory, relay_map, is_ipv6_only)
        await world.start_relay()
        await nursery.start(world.serve_map)
        try:
            yield world
        finally:
            with trio.CancelScope(shield=True):
                await world.kill_relay()
        nursery.cancel_scope.cancel()
