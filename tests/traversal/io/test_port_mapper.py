"""Port mapping end to end against a small router in the simulated internet."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from ipaddress import IPv4Address

import pytest
import trio
from trio.testing import MockClock

from netlab.model import Host, Nat, Topology, Uplink
from netlab.simulated import SimulatedInternet
from traversal.io.port_mapper import PortMapping
from traversal.wire import nat_pmp
from traversal.wire.address import Address

EXTERNAL = IPv4Address("203.0.113.7")
LOCAL_PORT = 41641
EXTERNAL_PORT = 50000


class Router:
    """Speaks NAT-PMP (version 0) or PCP (version 2) and keeps one mapping per client."""

    def __init__(self, version: int) -> None:
        self.version = version
        self.mappings: dict[str, int] = {}
        """Internal port by client."""
        self.deletions = 0

    async def serve(
        self, host: str, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        with trio.socket.socket(type=trio.socket.SOCK_DGRAM) as sock:
            await sock.bind((host, nat_pmp.GATEWAY_PORT))
            task_status.started()
            while True:
                data, source = await sock.recvfrom(2048)
                if data[0] == self.version:
                    answer = self._nat_pmp if self.version == 0 else self._pcp
                    await sock.sendto(answer(data, source[0]), source)

    def _nat_pmp(self, data: bytes, client: str) -> bytes:
        epoch = int(trio.current_time()).to_bytes(4, "big")
        if data[1] == 0:
            return bytes.fromhex("00800000") + epoch + EXTERNAL.packed
        lifetime = self._map(client, int.from_bytes(data[4:6], "big"), data[8:12])
        head = bytes.fromhex("00810000") + epoch + data[4:6]
        return head + EXTERNAL_PORT.to_bytes(2, "big") + lifetime

    def _pcp(self, data: bytes, client: str) -> bytes:
        assert IPv4Address(data[20:24]) == IPv4Address(client)
        epoch = int(trio.current_time()).to_bytes(4, "big") + bytes(12)
        if data[1] == 0:
            return bytes([2, 0x80, 0, 0]) + bytes(4) + epoch
        lifetime = self._map(client, int.from_bytes(data[40:42], "big"), data[4:8])
        external = EXTERNAL_PORT.to_bytes(2, "big") + bytes(10) + b"\xff\xff" + EXTERNAL.packed
        return bytes([2, 0x81, 0, 0]) + lifetime + epoch + data[24:42] + external

    def _map(self, client: str, port: int, lifetime: bytes) -> bytes:
        if any(lifetime):
            self.mappings[client] = port
        elif self.mappings.pop(client, None) is not None:
            self.deletions += 1
        return lifetime


Open = Callable[[Callable[[], None]], Awaitable[tuple[PortMapping, trio.CancelScope]]]


@asynccontextmanager
async def home(router: Router) -> AsyncIterator[Open]:
    """A network with a router; yields what starts port mapping on a host of it."""
    topology = Topology(
        hosts=tuple(Host(name=n, uplinks=(Uplink(network="home"),)) for n in ("a", "router")),
        nats=(Nat(name="home"),),
        seed=1,
    )
    async with SimulatedInternet(topology) as internet, trio.open_nursery() as nursery:
        gateway, own = (
            next(a for a in internet.host(name).addresses if ":" not in a)
            for name in ("router", "a")
        )
        async with internet.host("router"):
            await nursery.start(router.serve, gateway)

        async def run(
            note_change: Callable[[], None],
            *,
            task_status: trio.TaskStatus[tuple[PortMapping, trio.CancelScope]],
        ) -> None:
            async with internet.host("a"):
                mapping = PortMapping(random.Random(1).randbytes, note_change)
                mapping.set_network(IPv4Address(gateway), IPv4Address(own), LOCAL_PORT)
                with trio.CancelScope() as scope:
                    task_status.started((mapping, scope))
                    await mapping.run()

        async def start(
            note_change: Callable[[], None],
        ) -> tuple[PortMapping, trio.CancelScope]:
            opened: tuple[PortMapping, trio.CancelScope] = await nursery.start(run, note_change)
            return opened

        yield start
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("version", [0, 2])
async def test_mapped_kept_and_released(autojump_clock: MockClock, version: int) -> None:
    """The port is mapped within a second, kept for a day, and given back at once on closing."""
    router = Router(version)
    changes: list[None] = []
    async with home(router) as start:
        mapping, scope = await start(lambda: changes.append(None))
        await trio.sleep(1)
        assert mapping.external == Address(str(EXTERNAL), EXTERNAL_PORT)
        seen = mapping.seen(trio.current_time())
        assert seen == (version == 0, version == 2, False)
        assert list(router.mappings.values()) == [LOCAL_PORT]
        assert len(changes) == 1
        await trio.sleep(86400)
        assert len(changes) == 1
        assert mapping.external is not None
        closed_at = trio.current_time()
        scope.cancel()
        await trio.testing.wait_all_tasks_blocked()
        assert trio.current_time() == closed_at
        await trio.sleep(0.1)
        assert router.mappings == {}
        assert router.deletions == 1
        assert mapping.external is None


async def test_closing_without_a_mapping(autojump_clock: MockClock) -> None:
    """With a router that speaks nothing there is nothing to release."""
    router = Router(version=9)
    async with home(router) as start:
        mapping, scope = await start(lambda: None)
        await trio.sleep(30)
        assert mapping.external is None
        scope.cancel()
        await trio.sleep(0.1)
        assert router.deletions == 0
