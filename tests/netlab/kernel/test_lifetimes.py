"""NATs' clocks that jump ahead: minutes of a mapping's life in milliseconds, on either engine."""

from __future__ import annotations

import socket
from dataclasses import replace

import pytest
import trio

from netlab.behavior import Filtering, Lifetimes, NatBehavior, Refresh
from netlab.kernel.conntrack import age_elements
from netlab.kernel.fidelity import Engine
from netlab.kernel.lab import KernelLab
from netlab.kernel.netfilter import list_elements, load_ruleset
from netlab.labs import BackEnd
from netlab.model import Host, Nat, Server, Topology, Uplink
from netlab.presets import class_behavior
from netlab.timeline import MappingDied
from netlab.verify import Target, verify

pytestmark = pytest.mark.jail

LIFETIME_SECONDS = 300


def topology(behavior: NatBehavior) -> Topology:
    return Topology(
        nats=(Nat(name="home", behavior=behavior), Nat(name="other", behavior=behavior)),
        hosts=(
            Host(name="a", uplinks=(Uplink(network="home"),)),
            Host(name="b", uplinks=(Uplink(network="other"),)),
        ),
        servers=(Server(name="s"),),
    )


@pytest.mark.parametrize("engine", list(Engine))
@pytest.mark.parametrize("filtering", list(Filtering))
async def test_a_mapping_lives_as_long_as_it_says(engine: Engine, filtering: Filtering) -> None:
    """5 minutes from the last packet, whoever may send in; the timeline has its end."""
    behavior = NatBehavior(
        filtering=filtering, lifetimes=Lifetimes(udp_seconds=float(LIFETIME_SECONDS))
    )
    async with KernelLab(
        topology(behavior), engines=dict.fromkeys(("home", "other"), engine)
    ) as lab:
        async with lab.host("s"):
            server = trio.socket.socket(type=socket.SOCK_DGRAM)
            await server.bind((lab.host("s").addresses[0], 3478))
        async with lab.host("a"):
            client = trio.socket.socket(type=socket.SOCK_DGRAM)
        with server, client:
            await client.sendto(b"out", server.getsockname())
            with trio.fail_after(5):
                _, external = await server.recvfrom(100)

            async def comes_in() -> bool:
                await server.sendto(b"in", external)
                with trio.move_on_after(0.2):
                    return await client.recv(100) == b"in"
                return False

            began = trio.current_time()
            lab.advance_nats(LIFETIME_SECONDS - 3)
            assert await comes_in()
            # What came in has renewed it.
            lab.advance_nats(LIFETIME_SECONDS - 3)
            assert await comes_in()
            assert trio.current_time() - began < 2
            assert [event for event in lab.timeline if isinstance(event, MappingDied)] == []
            lab.advance_nats(LIFETIME_SECONDS + 3)
            await trio.sleep(0.05)
            assert not await comes_in()
            (died,) = (event for event in lab.timeline if isinstance(event, MappingDied))
            assert (died.nat, died.cause) == ("home", "expired")


async def test_one_nat_ages_alone() -> None:
    """The others' clocks stand where they were, on both engines."""
    behavior = NatBehavior(lifetimes=Lifetimes(udp_seconds=float(LIFETIME_SECONDS)))
    for engine in Engine:
        engines = dict.fromkeys(("home", "other"), engine)
        async with KernelLab(topology(behavior), engines=engines) as lab:
            for name in ("a", "b"):
                async with lab.host(name):
                    with trio.socket.socket(type=socket.SOCK_DGRAM) as client:
                        await client.sendto(b"out", (lab.host("s").addresses[0], 9))
            await trio.sleep(0.05)
            lab.nat("home").advance(LIFETIME_SECONDS + 3)
            await trio.sleep(0.05)
            died = [event.nat for event in lab.timeline if isinstance(event, MappingDied)]
            assert died == ["home"], engine


async def test_learned_elements_age() -> None:
    """Each element of a set or map keeps what is left of its life, less the time that passed."""
    async with KernelLab(topology(class_behavior("EIM+EIF"))) as lab:
        namespace = lab.nat("home").namespace
        cone = ("ip nat", "map", "cone")
        rest = "{ udp . 4000 timeout 120s expires 90s : 192.168.1.5 . 4000 }"
        load_ruleset(namespace, f"add element ip nat cone {rest}\n")
        load_ruleset(namespace, f"add element ip nat cone {rest.replace('4000', '5000')}\n")
        age_elements(namespace, [cone], 60.0)
        elements = list_elements(namespace, *cone)
        assert len(elements) == 2
        assert all("expires 29s" in one or "expires 30s" in one for one in elements), elements
        age_elements(namespace, [cone], 60.0)
        assert list_elements(namespace, *cone) == []


async def test_verify_measures_lifetimes() -> None:
    """On either engine; nothing says what they should be."""
    in_kernel = class_behavior("EIM+APDF")
    in_user_space = replace(in_kernel, refresh=Refresh.OUTBOUND)
    short = replace(in_kernel, lifetimes=Lifetimes(udp_seconds=45.0))
    targets = [
        Target(name=str(number), chain=(behavior,), claims="EIM+APDF")
        for number, behavior in enumerate((in_kernel, in_user_space, short))
    ]
    findings = await verify(targets, BackEnd.KERNEL)
    assert [finding.engine for finding in findings] == ["nft", "user", "nft"]
    assert all(finding.agrees for finding in findings), findings
    measured = [finding.lifetime_seconds for finding in findings]
    assert measured == [pytest.approx(expected, abs=3) for expected in (120, 120, 45)]
