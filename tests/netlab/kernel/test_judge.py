"""coturn's NAT discovery (RFC 5780) as an independent judge of the nine classes."""

from __future__ import annotations

import itertools
import os
import shutil
import socket
import struct
import subprocess
from pathlib import Path

import pytest
import trio

from netlab.kernel.fidelity import Engine
from netlab.kernel.lab import KernelLab
from netlab.kernel.machines import KernelHost
from netlab.model import (
    Filtering,
    Host,
    Mapping,
    Nat,
    NatBehavior,
    PortAllocation,
    PortAssignment,
    Server,
    Topology,
    Uplink,
)

SERVER, CLIENT = "turnserver", "turnutils_natdiscovery"

pytestmark = [
    pytest.mark.jail,
    pytest.mark.interop,
    pytest.mark.slow,
    pytest.mark.skipif(
        not (shutil.which(SERVER) and shutil.which(CLIENT)),
        reason=f"{SERVER} and {CLIENT} are not installed; install the package coturn",
    ),
]

CLASSES = tuple(itertools.product(Mapping, Filtering))
ASSIGNMENTS = {
    Mapping.EIM: PortAssignment.PRESERVE_ELSE_RANDOM,
    Mapping.ADM: PortAssignment.HASH,
    Mapping.APDM: PortAssignment.RANDOM,
}
WORDS = {
    "EIM": "NAT with Endpoint Independent Mapping!",
    "ADM": "NAT with Address Dependent Mapping!",
    "APDM": "NAT with Address and Port Dependent Mapping!",
    "EIF": "NAT with Endpoint Independent Filtering!",
    "ADF": "NAT with Address Dependent Filtering!",
    "APDF": "NAT with Address and Port Dependent Filtering!",
}


async def start_server(host: KernelHost, directory: Path) -> trio.Process:
    """Start coturn on both of a host's IPv4 addresses and wait until it answers."""
    first, second = (address for address in host.addresses if ":" not in address)
    options = ["-n", "-z", "-m", "0", "--no-tls", "--no-dtls", "--no-cli", "--simple-log"]
    files = ["-l", str(directory / "log"), "--pidfile", str(directory / "pid")]
    database = ["-b", str(directory / "database")]
    process = await host.open_process(
        [SERVER, *options, *files, *database, "-L", first, "-L", second],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd=directory,
    )
    request = struct.pack("!HHI", 0x0001, 0, 0x2112A442) + os.urandom(12)
    async with host:
        with trio.socket.socket(type=socket.SOCK_DGRAM) as client, trio.fail_after(15):
            while True:
                await client.sendto(request, (second, 3479))
                with trio.move_on_after(0.05):
                    await client.recvfrom(2000)
                    return process


async def test_coturn_agrees_with_every_claimed_class(tmp_path: Path) -> None:
    """Its verdicts on mapping and filtering are the nine claims, on either engine.

    The first nine NATs are on the engine that is faithful to each, the others on the user engine.
    """
    behaviors = [
        NatBehavior(
            mapping=mapping,
            filtering=filtering,
            ports=PortAllocation(assignment=ASSIGNMENTS[mapping]),
        )
        for mapping, filtering in CLASSES * 2
    ]
    topology = Topology(
        nats=tuple(Nat(name=f"n{i}", behavior=b) for i, b in enumerate(behaviors)),
        hosts=tuple(Host(name=f"h{i}", uplinks=(Uplink(network=f"n{i}"),)) for i in range(18)),
        servers=(Server(name="stun", addresses=2),),
    )
    verdicts: dict[int, str] = {}

    async def judge(number: int) -> None:
        command = [CLIENT, "-m", "-f", lab.host("stun").addresses[0]]
        done = await lab.host(f"h{number}").run_process(command, capture_stdout=True)
        verdicts[number] = done.stdout.decode()

    async with KernelLab(topology, engines={f"n{i}": Engine.USER for i in range(9, 18)}) as lab:
        server = await start_server(lab.host("stun"), tmp_path)
        # Each takes 3 s for every packet that a filter drops, so all judge at once.
        async with trio.open_nursery() as nursery:
            for number in range(18):
                nursery.start_soon(judge, number)
        server.kill()
        await server.wait()
    judged = [
        "+".join(name for name, words in WORDS.items() if words in verdicts[i]) for i in range(18)
    ]
    assert judged == [behavior.class_name for behavior in behaviors]
