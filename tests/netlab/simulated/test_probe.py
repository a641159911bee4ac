"""The probe measures in simulation what every class and preset claims; punching fits the matrix."""

from __future__ import annotations

import dataclasses
import itertools
import random

import pytest
import trio
from trio.testing import MockClock

from netlab.model import (
    Filtering,
    Hairpin,
    Host,
    Lifetimes,
    Mapping,
    Nat,
    NatBehavior,
    Pooling,
    PortAllocation,
    PortAssignment,
    Refresh,
    Server,
    Topology,
    Translation,
    Unsolicited,
    Uplink,
)
from netlab.presets import class_behavior, nat_preset, nat_presets
from netlab.probe import ProbeReport, ProbeServers, disagreements, probe_nat, serve_probe
from netlab.punch import CLASSES, Outcome, expected_outcome, punch
from netlab.simulated import SimulatedInternet


def lab(*chain: NatBehavior, seed: int = 3) -> Topology:
    """One host behind NATs, the innermost first, and the probe's server."""
    nats = []
    for number, behavior in enumerate(chain):
        outer = f"nat{number + 1}" if number + 1 < len(chain) else "internet"
        nats.append(Nat(name=f"nat{number}", behavior=behavior, uplink=Uplink(network=outer)))
    return Topology(
        hosts=(Host(name="client", uplinks=(Uplink(network="nat0"),)),),
        servers=(Server(name="probe", addresses=3),),
        nats=tuple(nats),
        seed=seed,
    )


async def measure(
    topology: Topology, limit: float | None = None, log_in: bool = False
) -> ProbeReport:
    async with SimulatedInternet(topology, record_packets=False) as internet:
        plan = internet.plan.servers["probe"]
        one, two, three = map(str, plan.ipv4)
        servers = ProbeServers(addresses=(one, two, three))
        if topology.nats[0].behavior.nat64:
            one, two, three = (f"64:ff9b::{address}" for address in (one, two, three))
        seen = ProbeServers(addresses=(one, two, three))
        async with trio.open_nursery() as nursery:
            async with internet.host("probe"):
                await nursery.start(serve_probe, servers)
            if log_in:
                internet.nat("nat0").log_in(internet.host("client"))
            async with internet.host("client"):
                report = await probe_nat(
                    seen, generator=random.Random(1), lifetime_limit_seconds=limit
                )
            nursery.cancel_scope.cancel()
    return report


@pytest.mark.parametrize("name", CLASSES)
async def test_nine_classes(name: str, autojump_clock: MockClock) -> None:
    """Each class measures as what it is."""
    behavior = class_behavior(name)
    report = await measure(lab(behavior))
    assert report.class_name == name
    assert disagreements(report, behavior) == []


@pytest.mark.parametrize("name", sorted(nat_presets()))
async def test_presets_keep_their_claims(name: str, autojump_clock: MockClock) -> None:
    """Each preset measures as it claims, lifetime and refresh included."""
    preset = nat_preset(name)
    chain = [preset.behavior]
    if preset.behind is not None:
        chain.append(nat_preset(preset.behind).behavior)
    if preset.claims in ("no-udp", "portal"):
        assert not (await measure(lab(*chain))).reachable
        if preset.claims == "portal":
            report = await measure(lab(*chain), log_in=True)
            assert report.class_name == preset.behavior.class_name
        return
    report = await measure(lab(*chain), limit=700.0)
    assert report.class_name == preset.claims
    if preset.behind is None:
        assert disagreements(report, preset.behavior) == []


@pytest.mark.parametrize(
    "behavior",
    [
        NatBehavior(hairpin=Hairpin.INTERNAL),
        NatBehavior(hairpin=Hairpin.EXTERNAL),
        NatBehavior(unsolicited=Unsolicited.ACCEPT),
        NatBehavior(unsolicited=Unsolicited.REJECT),
        NatBehavior(refresh=Refresh.OUTBOUND, lifetimes=Lifetimes(udp_seconds=37)),
        NatBehavior(ports=PortAllocation(assignment=PortAssignment.SEQUENTIAL, step=3)),
        NatBehavior(addresses=3, pooling=Pooling.PAIRED),
        NatBehavior(addresses=4, pooling=Pooling.ARBITRARY),
        NatBehavior(addresses=4, pooling=Pooling.ARBITRARY, mapping=Mapping.APDM),
        NatBehavior(translation=Translation.NONE, filtering=Filtering.ADF),
    ],
)
async def test_each_axis_is_measured(behavior: NatBehavior, autojump_clock: MockClock) -> None:
    """The probe finds what a description says about the other axes."""
    report = await measure(lab(behavior), limit=400.0)
    assert disagreements(report, behavior) == []


async def test_a_lie_is_found(autojump_clock: MockClock) -> None:
    """A description that differs in any measured axis is contradicted on that axis."""
    truth = NatBehavior(lifetimes=Lifetimes(udp_seconds=60), refresh=Refresh.OUTBOUND)
    report = await measure(lab(truth), limit=400.0)
    assert disagreements(report, truth) == []
    lies = {
        "filtering": dataclasses.replace(truth, filtering=Filtering.EIF),
        "hairpin": dataclasses.replace(truth, hairpin=Hairpin.EXTERNAL),
        "refresh": dataclasses.replace(truth, refresh=Refresh.BOTH),
        "lifetime": dataclasses.replace(truth, lifetimes=Lifetimes(udp_seconds=120)),
        "port preservation": dataclasses.replace(
            truth, ports=PortAllocation(assignment=PortAssignment.RANDOM)
        ),
        "translation": dataclasses.replace(truth, translation=Translation.NONE),
    }
    for axis, lie in lies.items():
        assert any(text.startswith(axis) for text in disagreements(report, lie)), axis


@pytest.mark.parametrize(
    ("inner", "outer"), [("EIM+APDF", "EIM+EIF"), ("EIM+EIF", "APDM+APDF"), ("ADM+ADF", "EIM+ADF")]
)
async def test_series_composes(inner: str, outer: str, autojump_clock: MockClock) -> None:
    """Two NATs in series have the most dependent mapping and the most restrictive filter."""
    behaviors = (class_behavior(inner), class_behavior(outer))
    report = await measure(lab(behaviors[0], dataclasses.replace(behaviors[1], carrier=True)))
    order = ["EIM", "ADM", "APDM"], ["EIF", "ADF", "APDF"]
    parts = zip(inner.split("+"), outer.split("+"), strict=True)
    worst = [max(pair, key=rank.index) for pair, rank in zip(parts, order, strict=True)]
    assert report.class_name == "+".join(worst)


def pair_topology(left: NatBehavior, right: NatBehavior) -> Topology:
    return Topology(
        hosts=tuple(Host(name=n, uplinks=(Uplink(network=f"nat-{n}"),)) for n in "ab"),
        servers=(Server(name="stun", addresses=3),),
        nats=(Nat(name="nat-a", behavior=left), Nat(name="nat-b", behavior=right)),
        seed=5,
    )


async def can_punch(topology: Topology) -> bool:
    async with SimulatedInternet(topology, record_packets=False) as internet:
        one, two, three = map(str, internet.plan.servers["stun"].ipv4)
        async with trio.open_nursery() as nursery:
            async with internet.host("stun"):
                await nursery.start(serve_probe, ProbeServers(addresses=(one, two, three)))
            result = await punch(
                internet.host("a"),
                internet.host("b"),
                (one, 3478),
                generator=random.Random(1),
            )
            nursery.cancel_scope.cancel()
    return result


@pytest.mark.parametrize(
    ("left", "right"), list(itertools.combinations_with_replacement(CLASSES, 2))
)
async def test_outcome_matrix(left: str, right: str, autojump_clock: MockClock) -> None:
    """Simple punching connects exactly the pairs that the matrix calls direct."""
    topology = pair_topology(class_behavior(left), class_behavior(right))
    assert await can_punch(topology) == (expected_outcome(left, right) is Outcome.DIRECT)
    assert expected_outcome(left, right) is expected_outcome(right, left)


@pytest.mark.parametrize("hairpin", [Hairpin.NONE, Hairpin.EXTERNAL])
async def test_two_homes_behind_one_carrier(hairpin: Hairpin, autojump_clock: MockClock) -> None:
    """Two homes behind one carrier NAT meet at its public address only if it hairpins."""
    carrier = NatBehavior(carrier=True, filtering=Filtering.EIF, hairpin=hairpin)
    topology = Topology(
        hosts=tuple(Host(name=n, uplinks=(Uplink(network=f"home-{n}"),)) for n in "ab"),
        servers=(Server(name="stun", addresses=3),),
        nats=(
            Nat(name="cgn", behavior=carrier),
            *(Nat(name=f"home-{n}", uplink=Uplink(network="cgn")) for n in "ab"),
        ),
    )
    assert await can_punch(topology) == (hairpin is Hairpin.EXTERNAL)
