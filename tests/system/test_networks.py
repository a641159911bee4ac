"""Networks that need more than a hole punched: what a person behind them gets."""

from __future__ import annotations

import dataclasses
import functools
import ssl

import pytest
import trio
import trustme
from trio.testing import MockClock

from netlab.model import (
    Firewall,
    Hairpin,
    Host,
    Ipv6,
    Link,
    Nat,
    Server,
    Topology,
    Uplink,
)
from netlab.nat import Protocol
from netlab.presets import class_behavior, nat_preset
from netlab.simulated.host import SimulatedHost
from netlab.simulated.packet import Packet
from relay.simulated import SimRelay
from tests.system.checks import DIRECT, RELAY, check_stays_on_the_relay
from tests.system.world import DELAY_SECONDS, WIRE, simulate, topology
from traversal import NodePrivate, RelayMap, RelayOptions
from traversal.agent.status import nat_status
from traversal.io.dial import Target, dial
from traversal.relay_map import Dial
from traversal.wire.introduction import MappingClass

EASY = class_behavior("EIM+APDF")
ROUTED = dataclasses.replace(EASY, ipv6=Ipv6.ROUTED)


def chain(*nats: Nat, seed: int = 1, **hosts: str) -> Topology:
    """Hosts by the name of the network that each is in, one relay."""
    return Topology(
        hosts=tuple(
            Host(name=name, uplinks=(Uplink(network=network, link=WIRE),))
            for name, network in hosts.items()
        ),
        servers=(Server(name="r0"),),
        nats=nats,
        seed=seed,
    )


@pytest.mark.parametrize("reject", [False, True])
async def test_blocked_udp(reject: bool, autojump_clock: MockClock) -> None:
    """Where only TCP port 443 leads out, the relay carries everything and nothing is lost."""
    only_443 = dataclasses.replace(
        EASY, firewall=Firewall(udp_ports=(), tcp_ports=(443,), reject=reject)
    )
    async with simulate(topology(only_443, EASY)) as world:
        a, b = await world.open_nodes("h0", "h1")
        assert a.nat.is_udp_blocked
        assert not b.nat.is_udp_blocked
        assert a.home_region == 900
        conversation = await world.introduce(a, b)
        await trio.sleep(10)
        assert conversation.kinds == RELAY
        assert conversation.lost_seconds() == 0
        assert "UDP" in conversation.left.verdict().text()


async def test_captive_portal(autojump_clock: MockClock) -> None:
    """A node in a hotel finds its relay as soon as the guest has logged in, and a direct path a
    few seconds later: while UDP is blocked and somebody talks, one server is asked every 3 s."""
    portal = dataclasses.replace(EASY, firewall=Firewall(captive_portal=True))
    async with simulate(topology(portal, EASY)) as world:
        a, b = await world.open_nodes("h0", "h1")
        await trio.sleep(20)
        world.lab.nat("n0").log_in(world.lab.host("h0"))
        with trio.fail_after(15):
            conversation = await world.introduce(a, b)
        took = await conversation.until_direct(10)
        print(f"LAB portal {took:.2f}")


async def test_one_site(autojump_clock: MockClock) -> None:
    """Two hosts on one LAN talk by their private addresses, whatever their router is."""
    hard = nat_preset("cloud/aws").behavior
    async with simulate(chain(Nat(name="n", behavior=hard), h0="n", h1="n")) as world:
        conversation = await world.converse()
        took = await conversation.until_direct(1)
        print(f"LAB one site {took:.3f}")
        await trio.sleep(6)
        assert conversation.kinds == DIRECT
        assert conversation.left.path.address.host.startswith("192.168.")
        assert conversation.lost_seconds() == 0


@pytest.mark.parametrize("hairpin", list(Hairpin))
async def test_two_homes_behind_one_carrier(hairpin: Hairpin, autojump_clock: MockClock) -> None:
    """Behind one carrier NAT two homes reach each other directly if it hairpins as RFC 4787 asks;
    otherwise the relay carries the traffic."""
    carrier = dataclasses.replace(class_behavior("EIM+APDF"), carrier=True, hairpin=hairpin)
    of = chain(
        Nat(name="cgn", behavior=carrier),
        Nat(name="n0", behavior=EASY, uplink=Uplink(network="cgn")),
        Nat(name="n1", behavior=EASY, uplink=Uplink(network="cgn")),
        h0="n0",
        h1="n1",
    )
    async with simulate(of) as world:
        conversation = await world.converse()
        if hairpin is Hairpin.EXTERNAL:
            took = await conversation.until_direct(1)
            print(f"LAB hairpin {took:.3f}")
        await trio.sleep(8)
        assert conversation.lost_seconds() == 0
        assert conversation.kinds == (DIRECT if hairpin is Hairpin.EXTERNAL else RELAY)


async def test_double_nat(autojump_clock: MockClock) -> None:
    """A home NAT behind a carrier NAT, both easy, is as good as one."""
    of = chain(
        Nat(name="cgn", behavior=dataclasses.replace(EASY, carrier=True)),
        Nat(name="n0", behavior=EASY, uplink=Uplink(network="cgn")),
        Nat(name="n1", behavior=EASY),
        h0="n0",
        h1="n1",
    )
    async with simulate(of) as world:
        conversation = await world.converse()
        took = await conversation.until_direct(0.17)
        print(f"LAB double {took:.3f}")
        await trio.sleep(3)
        assert conversation.lost_seconds() == 0


async def test_ipv6_only(autojump_clock: MockClock) -> None:
    """Two phones without IPv4 meet by IPv6 through stateful firewalls, and stay: that IPv4 can't
    send makes no node replace its sockets, as stock nodes do at each net check."""
    mobile = nat_preset("mobile/nat64").behavior
    async with simulate(topology(mobile, mobile)) as world:
        nodes = await world.open_nodes("h0", "h1")
        conversation = await world.introduce(*nodes)
        took = await conversation.until_direct(0.17)
        print(f"LAB ipv6 {took:.3f}")
        assert conversation.left.path.address.is_ipv6
        ports = [node._udp.port(6) for node in nodes]
        changes = len(conversation.changes)
        await trio.sleep(90)
        assert [node._udp.port(6) for node in nodes] == ports
        assert len(conversation.changes) == changes
        assert conversation.lost_seconds() == 0


async def test_nat64(autojump_clock: MockClock) -> None:
    """A phone without IPv4 reaches a host that has nothing else, through its carrier's NAT64."""
    mobile = nat_preset("mobile/nat64").behavior
    async with simulate(topology(mobile, class_behavior("EIM+EIF"))) as world:
        conversation = await world.converse()
        took = await conversation.until_direct(10)
        print(f"LAB nat64 {took:.3f}")
        await trio.sleep(3)
        assert conversation.lost_seconds() == 0


async def test_dual_stack_prefers_ipv6(autojump_clock: MockClock) -> None:
    """Both families work: IPv6 is used, and stays in use."""
    async with simulate(topology(ROUTED, ROUTED)) as world:
        conversation = await world.converse()
        await conversation.until_direct(0.17)
        await trio.sleep(5)
        assert all(link.path.address.is_ipv6 for link in conversation.links)
        assert conversation.lost_seconds() == 0


async def test_dual_stack_avoids_much_slower_ipv6(autojump_clock: MockClock) -> None:
    """IPv6 by a detour, as by a tunnel: IPv4 is used."""
    of = topology(ROUTED, ROUTED)
    async with simulate(of) as world:
        for name in ("h0", "h1"):
            delay_ipv6(world.lab.host(name), 0.1)
        conversation = await world.converse()
        await conversation.until_direct(2)
        await trio.sleep(5)
        assert all(not link.path.address.is_ipv6 for link in conversation.links)
        assert conversation.lost_seconds() == 0


async def test_relay_whose_ipv6_leads_nowhere(autojump_clock: MockClock) -> None:
    """Packets to its IPv6 address vanish: the relay is reached by IPv4 0.2 s later."""
    async with simulate(topology(ROUTED, ROUTED)) as world:
        (node,) = world.relay_map.regions[900].nodes
        target = Target.of_node(node, plain=True)
        assert [":" in host for host, _ in target.routes] == [True, False]
        key = NodePrivate.generate(world.random.randbytes)
        took = []
        for is_broken in (False, True):
            if is_broken:
                drop_ipv6(world.lab.host("r0"))
            async with world.lab.host("h0"):
                began = trio.current_time()
                (await dial(target, key)).close()
                took.append(trio.current_time() - began)
        assert took[1] - took[0] == pytest.approx(0.2, abs=0.05)


def drop_ipv6(host: SimulatedHost) -> None:
    """Lose everything that comes to a host by IPv6."""
    receive = host.receive

    def receive_ipv4(packet: Packet) -> None:
        if len(packet.destination) == 4:
            receive(packet)

    host.receive = receive_ipv4  # type: ignore[method-assign]  # on this host


def delay_ipv6(host: SimulatedHost, seconds: float) -> None:
    """Hold back IPv6 datagrams on their way to a host."""
    receive = host.receive

    def receive_later(packet: Packet) -> None:
        if packet.protocol == Protocol.UDP and len(packet.destination) == 16:
            host.world.schedule(host.world.now() + seconds, receive, packet)
        else:
            receive(packet)

    host.receive = receive_later  # type: ignore[method-assign]  # on this host


@pytest.mark.parametrize("mtu", [576, 600, 1280, 1400, 1492])
@pytest.mark.parametrize("black_hole", [True, False])
async def test_path_mtu(mtu: int, black_hole: bool, autojump_clock: MockClock) -> None:
    """The search finds what fits through a narrow link in the middle, whether the router there
    tells or swallows, and a datagram of just that size arrives while a longer one does not."""
    narrow = Link(delay_seconds=DELAY_SECONDS, mtu_bytes=mtu, mtu_black_hole=black_hole)
    of = Topology(
        hosts=(
            Host(name="h0", uplinks=(Uplink(network="n0", link=WIRE),)),
            Host(name="h1", uplinks=(Uplink(network="n1", link=WIRE),)),
        ),
        servers=(Server(name="r0"),),
        nats=(
            Nat(name="n0", behavior=EASY, uplink=Uplink(link=narrow)),
            Nat(name="n1", behavior=EASY),
        ),
    )
    async with simulate(of) as world:
        conversation = await world.converse()
        await conversation.until_direct(1)
        await trio.sleep(15)
        sizes = [link.path.mtu_bytes for link in conversation.links]
        print(f"LAB mtu {mtu} {black_hole} {sizes}")
        assert conversation.kinds == DIRECT
        assert all(size is not None and mtu - 28 - 8 <= size <= mtu - 28 for size in sizes)
        assert conversation.lost_seconds() == 0


async def test_relay_with_tls(autojump_clock: MockClock) -> None:
    """A relay with a certificate is reached by its name, and carries hard pairs."""
    authority = trustme.CA()
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("r0").configure_cert(server)

    def make_context() -> ssl.SSLContext:
        context = ssl.create_default_context()
        authority.configure_trust(context)
        return context

    hard = class_behavior("APDM+APDF")
    async with simulate(
        topology(hard, hard),
        options={"relay_options": RelayOptions(make_context=make_context)},
        make_relay=functools.partial(SimRelay, context=server),
    ) as world:
        conversation = await check_stays_on_the_relay(world, 12)
        assert conversation.left.path.region == 900
        assert all(link.path.latency_seconds for link in conversation.links)


@pytest.mark.parametrize("peer", ["EIM+APDF", "EIM+ADF"])
async def test_ipv4_servers_through_nat64(peer: str, autojump_clock: MockClock) -> None:
    """A host without IPv4 asks servers that have nothing else through the NAT64, and tells peers
    the IPv4 address that these see: so even a peer behind an easy NAT lets it in."""
    nat64 = dataclasses.replace(EASY, ipv6=Ipv6.ROUTED, nat64=True)
    async with simulate(topology(nat64, class_behavior(peer), relays=2)) as world:
        nodes = {
            region_id: dataclasses.replace(
                region,
                nodes=tuple(
                    dataclasses.replace(node, ipv6=Dial.NEVER, stun_test_ip=None)
                    for node in region.nodes
                ),
            )
            for region_id, region in world.relay_map.regions.items()
        }
        world.relay_map = RelayMap(nodes)
        a, b = await world.open_nodes("h0", "h1")
        assert a.report.is_udp_working
        assert not a.report.global_v6
        (seen,) = a.report.global_v4
        assert seen in [address for _, address in a.own_addresses]
        conversation = await world.introduce(a, b)
        took = await conversation.until_direct(1)
        print(f"LAB nat64 and an easy NAT {took:.3f}")
        assert a.nat.mapping is MappingClass.ENDPOINT_INDEPENDENT
        await trio.sleep(3)
        assert conversation.lost_seconds() == 0


@pytest.mark.parametrize(
    ("own", "mapping"),
    [
        ("EIM+APDF", MappingClass.ENDPOINT_INDEPENDENT),
        ("APDM+APDF", MappingClass.ADDRESS_AND_PORT_DEPENDENT),
    ],
)
async def test_own_nat_with_one_stun_server(
    own: str, mapping: MappingClass, autojump_clock: MockClock
) -> None:
    """One STUN server with one address cannot tell the NAT's class; a peer that answers can."""
    async with simulate(topology(class_behavior(own), None)) as world:
        a, b = await world.open_nodes("h0", "h1")
        await trio.sleep(30)
        assert a.nat.mapping is MappingClass.UNKNOWN
        assert "unknown" in nat_status(a.nat)["text"]
        conversation = await world.introduce(a, b)
        await conversation.until_direct()
        await trio.sleep(6)
        assert a.nat.mapping is mapping
        assert b.nat.mapping is MappingClass.NONE
        assert conversation.lost_seconds() == 0
