"""Sampling of ports and the hairpin test through simulated NATs."""

from __future__ import annotations

import os

import pytest
import trio
from trio.testing import MockClock

from netlab.behavior import Hairpin, NatBehavior, PortAllocation, PortAssignment
from netlab.model import Host, Nat, Server, Topology, Uplink
from netlab.simulated import SimulatedInternet
from traversal.io.port_sampling import SAMPLES, PortSamples, sample_ports
from traversal.paths.report import PortPattern, classify_ports
from traversal.wire.address import Address
from traversal.wire.stun import encode_binding_response, parse_binding_request


async def serve_stun(
    host: str, losses: set[int], *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
) -> None:
    """Answers every request but those whose place in the order is in `losses`."""
    with trio.socket.socket(type=trio.socket.SOCK_DGRAM) as sock:
        await sock.bind((host, 3478))
        task_status.started()
        number = 0
        while True:
            data, source = await sock.recvfrom(2048)
            request = parse_binding_request(data)
            if number not in losses:
                await sock.sendto(encode_binding_response(request.transaction_id, source), source)
            number += 1


async def sample(behavior: NatBehavior | None, losses: set[int] | None = None) -> PortSamples:
    """What a host behind such a NAT finds, within 2 s."""
    uplink = Uplink(network="home") if behavior is not None else Uplink()
    topology = Topology(
        hosts=(Host(name="a", uplinks=(uplink,)),),
        servers=(Server(name="s"),),
        nats=(Nat(name="home", behavior=behavior),) if behavior is not None else (),
        seed=1,
    )
    async with SimulatedInternet(topology) as internet, trio.open_nursery() as nursery:
        server = internet.host("s")
        address = next(a for a in server.addresses if ":" not in a)
        async with server:
            await nursery.start(serve_stun, address, losses or set())
        began = trio.current_time()
        async with internet.host("a") as host:
            samples = await sample_ports(
                Address(address, 3478), "0.0.0.0", frozenset(host.addresses), os.urandom
            )
        assert trio.current_time() - began < 2.01
        nursery.cancel_scope.cancel()
    return samples


@pytest.mark.parametrize(
    ("assignment", "step", "pattern"),
    [
        (PortAssignment.PRESERVE, 1, PortPattern.PRESERVING),
        (PortAssignment.SEQUENTIAL, 1, PortPattern.SEQUENTIAL),
        (PortAssignment.SEQUENTIAL, 2, PortPattern.SEQUENTIAL),
        (PortAssignment.RANDOM, 1, PortPattern.RANDOM),
    ],
)
async def test_patterns(
    autojump_clock: MockClock, assignment: PortAssignment, step: int, pattern: PortPattern
) -> None:
    """A NAT's way of picking ports is recognized, with the step of a counting one."""
    ports = PortAllocation(assignment=assignment, step=step)
    samples = await sample(NatBehavior(ports=ports))
    assert len(samples.ports) == SAMPLES
    found = classify_ports(samples.ports)
    assert found.pattern is pattern
    assert found.step == (step if pattern is PortPattern.SEQUENTIAL else 0)


async def test_lost_answers(autojump_clock: MockClock) -> None:
    """Lost answers are asked for again and leave the order of the samples as it is."""
    ports = PortAllocation(assignment=PortAssignment.SEQUENTIAL, step=1)
    samples = await sample(NatBehavior(ports=ports), losses={0, 3, 4, 9})
    assert len(samples.ports) == SAMPLES
    assert classify_ports(samples.ports).step == 1


async def test_silent_server(autojump_clock: MockClock) -> None:
    """Without answers nothing is claimed."""
    samples = await sample(NatBehavior(), losses=set(range(100)))
    assert samples == PortSamples((), None)


@pytest.mark.parametrize("hairpin", list(Hairpin))
async def test_hairpin(autojump_clock: MockClock, hairpin: Hairpin) -> None:
    """Two sockets behind one NAT reach each other's public address only if the NAT hairpins."""
    samples = await sample(NatBehavior(hairpin=hairpin))
    assert samples.hairpins is (hairpin is not Hairpin.NONE)


async def test_without_nat(autojump_clock: MockClock) -> None:
    """A host on the internet has nothing to hairpin, and its ports are its own."""
    samples = await sample(None)
    assert samples.hairpins is None
    assert classify_ports(samples.ports).pattern is PortPattern.PRESERVING
