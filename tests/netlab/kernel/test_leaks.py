"""Nothing is left of a lab: not after 200 of them, not after SIGKILL."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from netlab.kernel.builder import Built
from netlab.kernel.fidelity import Engine
from netlab.kernel.lab import KernelLab
from netlab.kernel.wiring import plan_wiring
from netlab.model import Host, Nat, Server, Topology, Uplink

TOPOLOGY = Topology(
    nats=(Nat(name="n"),),
    hosts=(Host(name="a", uplinks=(Uplink(network="n"),)),),
    servers=(Server(name="s"),),
)


def descriptors() -> list[str]:
    return sorted(os.listdir("/proc/self/fd"))


def network_namespaces() -> set[int]:
    """Return the network namespaces that processes of this jail are in or hold open."""
    found = set()
    for link in [*Path("/proc").glob("[0-9]*/ns/net"), *Path("/proc").glob("[0-9]*/fd/*")]:
        try:
            if os.readlink(link).startswith("net:"):
                found.add(link.stat().st_ino)
        except OSError:
            continue  # the process has ended, or the descriptor was the listing's own
    return found


def running(argument: str) -> bool:
    """Return whether a process of this jail has an argument like this."""
    return any(
        argument.encode() in path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline")
    )


@pytest.mark.jail
def test_200_labs_leave_no_descriptor_and_no_namespace() -> None:
    """Building and closing 200 labs changes neither what is open nor what exists."""
    wiring = plan_wiring(TOPOLOGY)
    before = descriptors(), network_namespaces()
    for _ in range(200):
        built = Built(wiring)
        built.build()
        built.close()
    assert (descriptors(), network_namespaces()) == before


@pytest.mark.jail
async def test_labs_with_a_fabric_and_programs_leave_nothing_behind() -> None:
    """Neither the fabric process nor a program, its child or a descriptor outlives the lab."""
    async with KernelLab(TOPOLOGY):
        pass  # libnftables and Trio's worker threads open what they keep
    before = descriptors(), network_namespaces()
    for _ in range(5):
        async with KernelLab(TOPOLOGY, engines={"n": Engine.USER}) as lab:
            script = "setsid sleep 86402 & echo ready; wait"
            program = await lab.host("a").open_process(["sh", "-c", script], stdout=subprocess.PIPE)
            assert program.stdout is not None
            async with program.stdout as output:
                assert await output.receive_some() == b"ready\n"
        await program.wait()
        assert not running("86402")
        assert not running("netlab.kernel.fabric")
    assert (descriptors(), network_namespaces()) == before


@pytest.mark.jail
def test_a_lab_that_fails_halfway_is_taken_down() -> None:
    """An error while building gives everything back."""
    wiring = plan_wiring(TOPOLOGY)
    wiring.machines["n"].sysctls["ipv4/no_such_setting"] = "1"
    before = descriptors()
    with pytest.raises(Exception, match="no_such_setting"):
        Built(wiring).build()
    assert descriptors() == before


LAB_PROGRAM = """
import trio
from netlab.kernel.fidelity import Engine
from netlab.kernel.lab import KernelLab
from netlab.model import Host, Nat, Topology, Uplink

async def main():
    topology = Topology(
        nats=(Nat(name="n"),), hosts=(Host(name="a", uplinks=(Uplink(network="n"),)),)
    )
    async with KernelLab(topology, engines={"n": Engine.USER}) as lab:
        program = await lab.host("a").open_process(["sleep", "86403"])
        print(lab.fabric.pid, program.pid, flush=True)
        await trio.sleep_forever()

trio.run(main)
"""


@pytest.mark.jail
def test_a_lab_killed_by_sigkill_leaves_nothing_in_its_jail() -> None:
    """In the jail of a killed lab program nothing runs any more, and so nothing is held."""
    command = [sys.executable, "-m", "netlab.kernel.jail", "--", sys.executable, "-c", LAB_PROGRAM]
    before = network_namespaces()
    with subprocess.Popen(command, stdout=subprocess.PIPE) as outer:
        assert outer.stdout is not None
        outer.stdout.readline()
        # The outer jail sees the processes of the inner one: a fabric, a program, the lab.
        assert len(network_namespaces()) > len(before)
        outer.send_signal(signal.SIGKILL)
        outer.wait(5)
    deadline = time.monotonic() + 5
    while network_namespaces() != before:
        assert time.monotonic() < deadline, "a killed lab still holds namespaces"
        time.sleep(0.002)
