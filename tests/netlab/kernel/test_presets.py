"""Every preset and other axes, measured on the kernel back end by the conformance probe."""

from __future__ import annotations

import random

import pytest
import trio

from netlab.kernel.fidelity import Engine
from netlab.kernel.lab import KernelLab
from netlab.model import (
    Filtering,
    Hairpin,
    Host,
    Nat,
    NatBehavior,
    PortAllocation,
    PortAssignment,
    Server,
    Topology,
    Translation,
    Unsolicited,
    Uplink,
)
from netlab.presets import nat_preset, nat_presets
from netlab.probe import ProbeReport, ProbeServers, disagreements, probe_nat, serve_probe

pytestmark = pytest.mark.jail

UNREACHABLE = ("no-udp", "portal")


def probing_topology(chains: dict[str, list[NatBehavior]]) -> Topology:
    """Return a lab with a host behind each chain of NATs, the innermost first."""
    nats: list[Nat] = []
    for name, chain in chains.items():
        for number, behavior in enumerate(chain):
            outer = f"{name}.{number + 1}" if number + 1 < len(chain) else "internet"
            uplink = Uplink(network=outer)
            nats.append(Nat(name=f"{name}.{number}", behavior=behavior, uplink=uplink))
    return Topology(
        nats=tuple(nats),
        hosts=tuple(Host(name=name, uplinks=(Uplink(network=f"{name}.0"),)) for name in chains),
        servers=(Server(name="probe", addresses=3),),
    )


async def measure(
    chains: dict[str, list[NatBehavior]], engine: Engine | None, portals: tuple[str, ...] = ()
) -> dict[str, ProbeReport]:
    """Probe from every host at once; hosts named in `portals` log in first."""
    topology = probing_topology(chains)
    engines = {} if engine is None else dict.fromkeys((nat.name for nat in topology.nats), engine)
    reports: dict[str, ProbeReport] = {}
    limiter = trio.CapacityLimiter(8)

    async def probe(name: str) -> None:
        # All at once would wait for one another, and the probe takes silence for an answer.
        async with limiter, lab.host(name):
            reports[name] = await probe_nat(servers, generator=random.Random(name))

    async with KernelLab(topology, engines=engines) as lab:
        one, two, three = map(str, lab.plan.servers["probe"].ipv4)
        servers = ProbeServers(addresses=(one, two, three))
        for name in portals:
            lab.nat(f"{name}.0").log_in(lab.host(name))
        async with trio.open_nursery() as nursery:
            async with lab.host("probe"):
                await nursery.start(serve_probe, servers)
            async with trio.open_nursery() as probing:
                for name in chains:
                    probing.start_soon(probe, name)
            nursery.cancel_scope.cancel()
    return reports


@pytest.mark.parametrize("engine", [None, Engine.USER], ids=["by fidelity", "user"])
async def test_every_preset_keeps_its_claims(engine: Engine | None) -> None:
    """All but NAT64's (see test_nat64.py), each on the engine faithful to it, and on the user's."""
    chains: dict[str, list[NatBehavior]] = {}
    presets = {name.replace("/", "-"): nat_preset(name) for name in nat_presets()}
    presets = {name: preset for name, preset in presets.items() if not preset.behavior.nat64}
    portals = tuple(f"{n}-in" for n, preset in presets.items() if preset.claims == "portal")
    for name, preset in presets.items():
        chains[name] = [preset.behavior]
        if preset.behind is not None:
            chains[name].append(nat_preset(preset.behind).behavior)
        if preset.claims == "portal":
            chains[f"{name}-in"] = chains[name]
    reports = await measure(chains, engine, portals)
    wrong: dict[str, object] = {}
    for name, preset in presets.items():
        report = reports[name]
        if preset.claims in UNREACHABLE:
            if report.reachable:
                wrong[name] = "reachable"
        elif report.class_name != preset.claims:
            wrong[name] = report
        elif preset.behind is None and (found := disagreements(report, preset.behavior)):
            wrong[name] = found
    for name in portals:
        if reports[name].class_name != chains[name][0].class_name:
            wrong[name] = reports[name]
    assert wrong == {}


# Not internal-source hairpin: the probe asks itself, and Linux drops what comes from outside with
# an own source address.
BEHAVIORS = {
    "hairpin-external": NatBehavior(hairpin=Hairpin.EXTERNAL),
    "accepting": NatBehavior(unsolicited=Unsolicited.ACCEPT),
    "rejecting": NatBehavior(unsolicited=Unsolicited.REJECT),
    "pool": NatBehavior(addresses=3),
    "sequential": NatBehavior(ports=PortAllocation(assignment=PortAssignment.SEQUENTIAL, step=3)),
    "routed": NatBehavior(translation=Translation.NONE, filtering=Filtering.ADF),
    "one-to-one": NatBehavior(translation=Translation.ONE_TO_ONE, filtering=Filtering.EIF),
}


@pytest.mark.parametrize("engine", [None, Engine.USER], ids=["by fidelity", "user"])
async def test_the_other_axes_measure_as_described(engine: Engine | None) -> None:
    """Hairpin, reaction to strangers, pools, order of ports, no translation and one-to-one."""
    reports = await measure({name: [b] for name, b in BEHAVIORS.items()}, engine)
    wrong = {
        name: found for name, b in BEHAVIORS.items() if (found := disagreements(reports[name], b))
    }
    assert wrong == {}
