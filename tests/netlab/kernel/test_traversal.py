"""The nine classes on the kernel back end: classified, and punched against one another."""

from __future__ import annotations

import itertools
import random
import select
import socket
import time
from contextlib import ExitStack

import pytest

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
    PortRange,
    Server,
    Topology,
    Uplink,
)

pytestmark = pytest.mark.jail

CLASSES = tuple(itertools.product(Mapping, Filtering))
ASSIGNMENTS = {
    Mapping.EIM: PortAssignment.PRESERVE_ELSE_RANDOM,
    Mapping.ADM: PortAssignment.HASH,
    Mapping.APDM: PortAssignment.RANDOM,
}

# Simple punching, row by row in the order of CLASSES: D goes direct; B, b and R do not.
# The other letters say what more effort brings and are not tried here.
MATRIX = """
    D D D D D D D D D
    D D D D D D D D D
    D D D B B B B B B
    D D B D D B D D B
    D D B D B B D B B
    D D B B B R B b R
    D D B D D B D D R
    D D B D B b D B R
    D D B B B R R R R
"""

Endpoint = tuple[str, int]


def behavior_of(mapping: Mapping, filtering: Filtering, **ports: object) -> NatBehavior:
    allocation = PortAllocation(assignment=ASSIGNMENTS[mapping], **ports)
    return NatBehavior(mapping=mapping, filtering=filtering, ports=allocation)


def lab_of(behaviors: list[NatBehavior], **options: object) -> KernelLab:
    """Return a lab with a host h0, h1, ... behind a NAT n0, n1, ... of each behaviour."""
    topology = Topology(
        nats=tuple(Nat(name=f"n{i}", behavior=b) for i, b in enumerate(behaviors)),
        hosts=tuple(
            Host(name=f"h{i}", uplinks=(Uplink(network=f"n{i}"),)) for i in range(len(behaviors))
        ),
        servers=(Server(name="s1"), Server(name="s2")),
    )
    return KernelLab(topology, **options)


def udp(host: KernelHost, port: int = 0) -> socket.socket:
    made = host.namespace.socket(socket.AF_INET, socket.SOCK_DGRAM)
    made.bind(("" if port == 0 else host.addresses[0], port))
    made.settimeout(5)
    return made


class Servers(ExitStack):
    """Two servers with two ports each, as the probe of RFC 5780 needs."""

    def __init__(self, lab: KernelLab) -> None:
        super().__init__()
        self.sockets = {
            (name, port): self.enter_context(udp(lab.host(name), port))
            for name in ("s1", "s2")
            for port in (3478, 3479)
        }

    def mapping(self, client: socket.socket, name: str, port: int) -> Endpoint:
        """Return the external endpoint that a server sees a client's socket at."""
        server = self.sockets[name, port]
        client.sendto(b"?", server.getsockname())
        return server.recvfrom(100)[1]

    def classify(self, host: KernelHost) -> str:
        with udp(host) as client:
            seen = [
                self.mapping(client, name, port)
                for name, port in (("s1", 3478), ("s1", 3479), ("s2", 3478), ("s2", 3479))
            ]
        mapping = {1: "EIM", 2: "ADM", 4: "APDM"}[len(set(seen))]
        assert (seen[0] == seen[1]) == (mapping != "APDM")
        with udp(host) as client:
            endpoint = self.mapping(client, "s1", 3478)
            # The permitted sender comes last: when its packet is there, the others have failed.
            for name, port in (("s2", 3478), ("s1", 3479), ("s1", 3478)):
                self.sockets[name, port].sendto(f"{name} {port}".encode(), endpoint)
            heard = set()
            while "s1 3478" not in heard:
                heard.add(client.recv(100).decode())
        filtering = "EIF" if "s2 3478" in heard else "ADF" if "s1 3479" in heard else "APDF"
        return f"{mapping}+{filtering}"


def punch(servers: Servers, left: KernelHost, right: KernelHost) -> bool:
    """Let both sides send to each other's mapping, and to whoever is heard, for a while."""
    with udp(left) as a, udp(right) as b:
        targets = {
            a: {servers.mapping(b, "s1", 3478)},
            b: {servers.mapping(a, "s1", 3478)},
        }
        heard: set[socket.socket] = set()
        for _ in range(8):
            for side, goals in targets.items():
                for goal in goals:
                    side.sendto(b"punch", goal)
            # The user engine is another process; the kernel's NATs are done when sendto is.
            end = time.monotonic() + 0.004
            while (left_over := end - time.monotonic()) > 0:
                for side in select.select([a, b], [], [], left_over)[0]:
                    targets[side].add(side.recvfrom(100)[1])
                    heard.add(side)
            if len(heard) == 2:
                return True
    return False


@pytest.mark.parametrize("engine", ["by fidelity", "user"])
async def test_every_class_measures_as_claimed(engine: str) -> None:
    """All nine classes, on the engine that is faithful to each and on the user engine."""
    engines = {f"n{i}": Engine.USER for i in range(9)} if engine == "user" else None
    async with lab_of([behavior_of(*axes) for axes in CLASSES], engines=engines) as lab:
        with Servers(lab) as servers:
            measured = [servers.classify(lab.host(f"h{i}")) for i in range(9)]
        used = [lab.nat(f"n{i}").engine for i in range(9)]
    assert measured == [f"{mapping.name}+{filtering.name}" for mapping, filtering in CLASSES]
    if engine == "by fidelity":
        in_kernel = {name for name, engine in zip(measured, used, strict=True) if engine == "nft"}
        assert in_kernel == {"EIM+EIF", "EIM+ADF", "EIM+APDF", "ADM+APDF", "APDM+APDF"}


async def test_simple_punching_succeeds_exactly_where_the_matrix_says() -> None:
    """All 45 pairs of classes, each class on the engine that is faithful to it."""
    expected = [row.split() for row in MATRIX.strip().splitlines()]
    names = [f"{mapping.name}/{filtering.name}" for mapping, filtering in CLASSES]
    wrong = []
    async with lab_of([behavior_of(*axes) for axes in CLASSES * 2]) as lab:
        with Servers(lab) as servers:
            for row, column in itertools.combinations_with_replacement(range(9), 2):
                direct = punch(servers, lab.host(f"h{row}"), lab.host(f"h{9 + column}"))
                if direct != (expected[row][column] == "D"):
                    wrong.append((names[row], names[column], direct))
    assert wrong == []


@pytest.mark.parametrize("engine", list(Engine))
async def test_spraying_ports_gets_through_to_a_hard_nat(engine: Engine) -> None:
    """Cell B: 64 sockets behind APDM+APDF meet 512 guesses from EIM+APDF.

    With 4096 ports the chance to fail is (1 - 64/4096)^512, about 1 in 3000; the guesses are
    seeded, the user engine's ports as well.
    """
    hard = behavior_of(Mapping.APDM, Filtering.APDF, ranges=(PortRange(1024, 5119),))
    easy = behavior_of(Mapping.EIM, Filtering.APDF)
    async with lab_of([hard, easy], engines={"n0": engine}) as lab:
        with Servers(lab) as servers, udp(lab.host("h1")) as sprayer:
            openers = [servers.enter_context(udp(lab.host("h0"))) for _ in range(64)]
            goal = servers.mapping(sprayer, "s1", 3478)
            address = servers.mapping(openers[0], "s1", 3478)[0]
            for opener in openers:
                opener.sendto(b"open", goal)
            for port in random.Random(4).sample(range(1024, 5120), 512):
                sprayer.sendto(b"guess", (address, port))
            heard = select.select(openers, [], [], 5)[0]
            assert heard
            heard[0].sendto(b"found", heard[0].recvfrom(100)[1])
            while (answer := sprayer.recv(100)) == b"open":
                pass
            assert answer == b"found"
