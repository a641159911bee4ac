"""Real relay processes that are told to stop: nodes that only a relay connects are elsewhere before
it ends, and lose nothing."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, replace
from ipaddress import ip_network
from pathlib import Path
from typing import Final

import trio

from tests.system.world import Conversation, World
from traversal import InterfaceFilter, Node, NodePrivate, RelayMap, open_node

START_SECONDS: Final = 30.0
DRAIN_SECONDS: Final = 3.0
TICK_SECONDS: Final = 0.01
RELAY_ONLY: Final = InterfaceFilter(denied_networks=(ip_network("0.0.0.0/0"), ip_network("::/0")))


@dataclass
class RelayProcess:
    """`map` has one region with this relay in it."""

    process: trio.Process
    map: RelayMap
    log: Path


@asynccontextmanager
async def start_relay(directory: Path, region_id: int) -> AsyncIterator[RelayProcess]:
    """`underpass-relay serve --dev` on loopback; killed in the end, if it still runs."""
    map_file, log = directory / f"{region_id}.json", directory / f"{region_id}.log"
    command = [sys.executable, "-m", "relay.cli", "serve", "--dev", "--dev-map", str(map_file)]
    command += ["--set", f"server.drain_seconds={DRAIN_SECONDS}"]
    with log.open("wb") as output:
        process = await trio.lowlevel.open_process(
            command, stdout=subprocess.DEVNULL, stderr=output
        )
    try:
        with trio.fail_after(START_SECONDS):
            while not (map_file.exists() and map_file.read_text().endswith("}\n")):
                assert process.poll() is None, log.read_text()
                await trio.sleep(0.02)
        (region,) = RelayMap.parse(map_file.read_text()).regions.values()
        nodes = tuple(
            replace(node, name=f"{region_id}a", region_id=region_id) for node in region.nodes
        )
        region = replace(region, region_id=region_id, code=f"r{region_id}", nodes=nodes)
        yield RelayProcess(process, RelayMap({region_id: region}), log)
    finally:
        if process.returncode is None:
            process.kill()
        with trio.CancelScope(shield=True):
            await process.wait()


@asynccontextmanager
async def conversation(relay_map: RelayMap) -> AsyncIterator[tuple[Node, Node, Conversation]]:
    """Two nodes on loopback that may only be reached by relay, and their traffic."""

    def open_one() -> AbstractAsyncContextManager[Node]:
        return open_node(
            NodePrivate.generate(os.urandom),
            relay_map,
            hosts={4: "127.0.0.1"},
            interfaces=RELAY_ONLY,
            map_ports=False,
            admit=lambda _: True,
        )

    async with open_one() as a, open_one() as b, trio.open_nursery() as nursery:
        world = World(None, nursery, relay_map, random.Random(1), {}, TICK_SECONDS)
        talk = await world.introduce(a, b)
        await trio.sleep(0.5)
        yield a, b, talk
        nursery.cancel_scope.cancel()


async def test_drain_loses_nothing(tmp_path: Path) -> None:
    """The home relay gets SIGTERM: both nodes are at home at the other relay before it has ended,
    and none of a hundred datagrams a second is lost either way."""
    async with start_relay(tmp_path, 901) as one, start_relay(tmp_path, 902) as two:
        relays = {901: one, 902: two}
        async with conversation(RelayMap({**one.map.regions, **two.map.regions})) as (a, b, talk):
            began, old = trio.current_time(), a.home_region
            relays[old].process.send_signal(signal.SIGTERM)
            assert await relays[old].process.wait() == 0
            for node in (a, b):
                assert node.home_region != old
                assert node.home_region in [
                    relay.region for relay in node.statistics().relays if relay.is_connected
                ]
            await trio.sleep(2)
            assert talk.lost_seconds(began) == 0, talk.describe()
