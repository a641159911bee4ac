"""What a node says of its own NAT, for every preset and every class."""

from __future__ import annotations

import pytest
from trio.testing import MockClock

from netlab.model import Host, Mapping, Nat, NatBehavior, Server, Topology, Uplink
from netlab.presets import class_behavior, nat_preset, nat_presets
from netlab.punch import CLASSES
from tests.system.world import WIRE, simulate, topology
from traversal.paths.report import MappingClass

BLOCKED = {"portal", "no-udp"}


def preset_topology(name: str) -> Topology:
    """A host behind the chain of NATs of a preset, and two relays."""
    nats: list[Nat] = []
    preset = nat_preset(name)
    while True:
        outer = preset.behind
        network = outer.replace("/", "-") if outer else "internet"
        nats.append(
            Nat(
                name=preset.name.replace("/", "-"),
                behavior=preset.behavior,
                uplink=Uplink(network=network, link=WIRE),
            )
        )
        if outer is None:
            break
        preset = nat_preset(outer)
    return Topology(
        hosts=(Host(name="h0", uplinks=(Uplink(network=nats[0].name),)),),
        servers=(Server(name="r0"), Server(name="r1")),
        nats=tuple(nats),
        seed=3,
    )


@pytest.mark.parametrize("name", list(nat_presets()))
async def test_presets(name: str, autojump_clock: MockClock) -> None:
    """Mapping by destination is told from mapping by source, and blocked UDP from both."""
    preset = nat_preset(name)
    async with simulate(preset_topology(name)) as world:
        node = await world.open_node("h0")
        facts = node.nat
        assert node.home_region in (900, 901)
    is_shut = facts.is_udp_blocked or facts.is_offline  # a portal lets no HTTPS through either
    assert is_shut is (preset.claims in BLOCKED)
    if not is_shut:
        translates = preset.behavior.translation != "none"
        assert facts.mapping is expected_mapping(Mapping[preset.claims.split("+")[0]], translates)


@pytest.mark.parametrize("name", CLASSES)
async def test_classes(name: str, autojump_clock: MockClock) -> None:
    """The nine classes by their mapping."""
    behavior = class_behavior(name)
    assert await measured(behavior) is expected_mapping(behavior.mapping, translates=True)


async def test_no_nat(autojump_clock: MockClock) -> None:
    """A host on the internet knows that it is."""
    assert await measured(None) is MappingClass.NONE


async def measured(behavior: NatBehavior | None) -> MappingClass:
    async with simulate(topology(behavior, relays=2)) as world:
        node = await world.open_node("h0")
        return node.nat.mapping


def expected_mapping(mapping: Mapping, translates: bool) -> MappingClass:
    """Two servers with one address each cannot tell ADM from APDM; it counts as the worse."""
    if not translates:
        return MappingClass.NONE
    if mapping is Mapping.EIM:
        return MappingClass.ENDPOINT_INDEPENDENT
    return MappingClass.ADDRESS_AND_PORT_DEPENDENT
