"""The real relay as a process in a kernel lab, for nodes that run in this one."""

from __future__ import annotations

import random
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

import trio

from netlab.kernel.lab import KernelLab
from netlab.model import Topology
from tests.system.world import TICK_SECONDS, World
from traversal import RelayMap

START_SECONDS: Final = 20.0


@asynccontextmanager
async def start_relay(lab: KernelLab, server: str = "r0") -> AsyncIterator[RelayMap]:
    """`underpass-relay` on a server, until the lab ends; with two addresses it does RFC 5780."""
    host = lab.host(server)
    address, *others = (address for address in host.addresses if ":" not in address)
    command = [sys.executable, "-m", "relay.cli", "serve", "--dev"]
    command += ["--hostname", address, "--derp", f"{address}:443"]
    command += ["--stun", f"{address}:3478", "--http", "off", "--admin", "off"]
    if others:
        command += ["--set", f"listen.stun_alternate={others[0]}:3479"]
    with tempfile.TemporaryDirectory() as directory:
        map_file = Path(directory) / "map.json"
        relay = await host.open_process(
            [*command, "--dev-map", str(map_file)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            with trio.fail_after(START_SECONDS):
                while not (map_file.exists() and map_file.read_text().endswith("\n")):
                    assert relay.poll() is None, "the relay ended"
                    await trio.sleep(0.02)
            yield RelayMap.parse(map_file.read_text())
        finally:
            relay.kill()
            with trio.CancelScope(shield=True):
                await relay.wait()


@asynccontextmanager
async def in_kernel(of: Topology, tick_seconds: float = TICK_SECONDS) -> AsyncIterator[World]:
    """The topology in namespaces, with `underpass-relay` on r0."""
    async with (
        KernelLab(of, observe=False) as lab,
        start_relay(lab) as relay_map,
        trio.open_nursery() as nursery,
    ):
        yield World(lab, nursery, relay_map, random.Random(of.seed), {}, tick_seconds)
        nursery.cancel_scope.cancel()
