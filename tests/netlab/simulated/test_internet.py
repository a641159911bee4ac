"""The simulated internet as a whole: repeatable, large, and changed while it runs."""

from __future__ import annotations

import io
import random
import socket as stdlib

import pytest
import trio
from trio.testing import MockClock

from netlab.drops import DropReason
from netlab.model import (
    Firewall,
    Host,
    Lifetimes,
    Link,
    ModelError,
    Nat,
    NatBehavior,
    PortAllocation,
    PortAssignment,
    Server,
    Topology,
    Uplink,
)
from netlab.presets import class_behavior, link_preset
from netlab.probe import ProbeServers, serve_probe
from netlab.punch import punch
from netlab.simulated import SimulatedInternet
from netlab.timeline import (
    MappingDied,
    NetworkChanged,
    PacketDropped,
    write_jsonl,
)

RANDOM_NAT = NatBehavior(ports=PortAllocation(assignment=PortAssignment.RANDOM))


def roaming_topology(behavior: NatBehavior = RANDOM_NAT) -> Topology:
    uplinks = (Uplink(network="home"), Uplink(network="cell"))
    return Topology(
        hosts=(Host(name="phone", uplinks=uplinks),),
        servers=(Server(name="server"),),
        nats=(Nat(name="home", behavior=behavior), Nat(name="cell", behavior=behavior)),
        seed=2,
    )


async def udp(port: int = 0) -> trio.socket.SocketType:
    sock = trio.socket.socket(type=stdlib.SOCK_DGRAM)
    await sock.bind(("0.0.0.0", port))
    return sock


class TestChanges:
    async def test_roaming(self, autojump_clock: MockClock) -> None:
        """After roaming an unconnected socket is seen behind the other NAT; a connected one
        keeps its dead address and gets ENETUNREACH."""
        async with SimulatedInternet(roaming_topology()) as internet:
            phone = internet.host("phone")
            async with internet.host("server"):
                server = await udp(53)
            async with phone:
                sock = await udp()
                connected = await udp()
                await connected.connect(("server", 53))
                await sock.sendto(b"1", ("server", 53))
                _, at_home = await server.recvfrom(10)
                before = phone.addresses
                phone.roam("cell")
                assert set(phone.addresses).isdisjoint(before)
                await sock.sendto(b"2", ("server", 53))
                _, at_cell = await server.recvfrom(10)
                with pytest.raises(OSError, match="Network is unreachable"):
                    await connected.send(b"3")
            assert at_home[0] == str(internet.plan.nats["home"].outside.ipv4[0])
            assert at_cell[0] == str(internet.plan.nats["cell"].outside.ipv4[0])

    async def test_old_source_on_the_new_uplink_is_dropped(self, autojump_clock: MockClock) -> None:
        """With both interfaces up a connected socket's packets leave by the wrong uplink, whose
        NAT refuses the foreign source address."""
        async with SimulatedInternet(roaming_topology()) as internet:
            phone = internet.host("phone")
            async with phone:
                connected = await udp()
                await connected.connect(("server", 53))
                phone.roam("cell", keep_old=True)
                await connected.send(b"x")
            drops = [e for e in internet.timeline if isinstance(e, PacketDropped)]
            assert [(d.where, d.reason) for d in drops] == [("cell", DropReason.SPOOFED)]

    async def test_reboot_and_renumber(self, autojump_clock: MockClock) -> None:
        """A reboot kills the mapping, renumbering the address; both show on the timeline."""
        async with SimulatedInternet(roaming_topology()) as internet:
            async with internet.host("server"):
                server = await udp(53)
            async with internet.host("phone"):
                sock = await udp()

            async def seen() -> tuple[str, int]:
                await sock.sendto(b"x", ("server", 53))
                return (await server.recvfrom(10))[1]

            first = await seen()
            assert await seen() == first
            internet.nat("home").reboot()
            await server.sendto(b"lost", first)
            second = await seen()
            assert second[0] == first[0]
            assert second[1] != first[1]
            internet.nat("home").renumber((bytes((2, 1, 9, 9)),))
            third = await seen()
            assert third[0] == "2.1.9.9"
            await server.sendto(b"arrives", third)
            assert await sock.recv(10) == b"arrives"
            died = [e.cause for e in internet.timeline if isinstance(e, MappingDied)]
            changed = [e.what for e in internet.timeline if isinstance(e, NetworkChanged)]
            assert died == ["reboot", "renumbered"]
            assert changed == ["reboot", "renumber"]

    async def test_cut_and_heal(self, autojump_clock: MockClock) -> None:
        """A cut link loses packets without an error; TCP survives a cut and its bytes arrive."""
        async with SimulatedInternet(roaming_topology()) as internet:
            async with internet.host("server"):
                (listener,) = await trio.open_tcp_listeners(80, host="0.0.0.0")
            async with internet.host("phone"):
                client = await trio.open_tcp_stream("server", 80)
            server = await listener.accept()
            internet.host("phone").cut()
            await client.send_all(b"late")
            began = trio.current_time()
            await trio.sleep(5)
            internet.host("phone").heal()
            assert await server.receive_some() == b"late"
            assert trio.current_time() - began > 5

    async def test_mappings_die_on_time(self, autojump_clock: MockClock) -> None:
        """An expired mapping's death is on the timeline at its moment, with nobody sending."""
        lifetimes = Lifetimes(udp_seconds=350)
        async with SimulatedInternet(
            roaming_topology(NatBehavior(lifetimes=lifetimes))
        ) as internet:
            async with internet.host("phone"):
                sock = await udp()
                await sock.sendto(b"x", ("server", 53))
            await trio.sleep(3600)
            (died,) = (e for e in internet.timeline if isinstance(e, MappingDied))
            assert died.at == pytest.approx(350.0)

    async def test_portal_and_firewall(self, autojump_clock: MockClock) -> None:
        """Only TCP 443 passes that firewall; nothing passes the portal before login."""
        only_443 = NatBehavior(firewall=Firewall(udp_ports=(), tcp_ports=(443,), reject=True))
        portal = NatBehavior(firewall=Firewall(captive_portal=True))
        for behavior in (only_443, portal):
            async with SimulatedInternet(roaming_topology(behavior)) as internet:
                async with internet.host("server"):
                    for port in (80, 443):
                        await trio.open_tcp_listeners(port, host="0.0.0.0")
                async with internet.host("phone"):
                    with pytest.raises(OSError, match="all attempts"):
                        await trio.open_tcp_stream("server", 80)
                    if behavior is portal:
                        with pytest.raises(OSError, match="all attempts"):
                            await trio.open_tcp_stream("server", 443)
                        internet.nat("home").log_in(internet.host("phone"))
                    await trio.open_tcp_stream("server", 443)

    async def test_unknown_names_are_suggested(self, autojump_clock: MockClock) -> None:
        """Asking for a machine that is not there names the nearest that is."""
        async with SimulatedInternet(roaming_topology()) as internet:
            with pytest.raises(ModelError, match='did you mean "phone"'):
                internet.host("fone")
            with pytest.raises(ModelError, match='did you mean "home"'):
                internet.nat("hom")
            with pytest.raises(ModelError, match='did you mean "cell"'):
                internet.host("phone").roam("celll")


def many_pairs(pairs: int, seed: int) -> Topology:
    """Pairs of hosts behind NATs of two classes, with a lossy, jittery link on one side."""
    classes = (class_behavior("EIM+APDF"), class_behavior("APDM+ADF"))
    hosts, nats = [], []
    for n in range(pairs):
        for side, behavior in zip("ab", (classes[n % 2], class_behavior("EIM+ADF")), strict=True):
            link = link_preset("wifi") if side == "a" else Link(delay_seconds=0.02)
            nats.append(Nat(name=f"nat-{side}{n}", behavior=behavior))
            uplink = Uplink(network=f"nat-{side}{n}", link=link)
            hosts.append(Host(name=f"{side}{n}", uplinks=(uplink,)))
    return Topology(
        hosts=tuple(hosts),
        servers=(Server(name="stun", addresses=3),),
        nats=tuple(nats),
        seed=seed,
    )


async def punch_all(
    pairs: int, seed: int, record_packets: bool, duration_seconds: float
) -> tuple[int, bytes]:
    """Let all pairs punch within a few seconds; return how many connected, and the trace."""
    topology = many_pairs(pairs, seed)
    connected = 0
    async with SimulatedInternet(
        topology, record_packets=record_packets, tick_seconds=0.001
    ) as internet:
        one, two, three = map(str, internet.plan.servers["stun"].ipv4)

        async def one_pair(n: int) -> None:
            nonlocal connected
            generator = random.Random(f"pair {n}")
            # All at once would overflow the receive buffer of the one STUN server.
            await trio.sleep(generator.uniform(0, pairs / 200))
            result = await punch(
                internet.host(f"a{n}"),
                internet.host(f"b{n}"),
                (one, 3478),
                generator=generator,
                duration_seconds=duration_seconds,
            )
            connected += result

        async with trio.open_nursery() as nursery:
            async with internet.host("stun"):
                await nursery.start(serve_probe, ProbeServers(addresses=(one, two, three)))
            async with trio.open_nursery() as punching:
                for n in range(pairs):
                    punching.start_soon(one_pair, n)
            nursery.cancel_scope.cancel()
        file = io.BytesIO()
        write_jsonl(internet.timeline, file)
    return connected, file.getvalue()


def run(
    pairs: int, seed: int, record_packets: bool = True, duration_seconds: float = 0.7
) -> tuple[int, bytes]:
    clock = MockClock(autojump_threshold=0)
    return trio.run(punch_all, pairs, seed, record_packets, duration_seconds, clock=clock)


def test_same_seed_same_trace() -> None:
    """The same topology, seed and programs give the same timeline, byte for byte."""
    _, first = run(10, seed=1, duration_seconds=0.4)
    assert first.count(b"\n") > 100
    assert run(10, seed=1, duration_seconds=0.4)[1] == first
    assert run(10, seed=2, duration_seconds=0.4)[1] != first


@pytest.mark.slow
def test_two_thousand_hosts() -> None:
    """A thousand pairs behind two thousand NATs punch each other in one process."""
    connected, _ = run(1000, seed=1, record_packets=False, duration_seconds=0.15)
    assert connected == 1000


async def test_errors_of_the_body_pass_unwrapped(autojump_clock: MockClock) -> None:
    """An exception inside the block arrives as it was raised, and the hooks are undone."""
    with pytest.raises(LookupError):
        async with SimulatedInternet(Topology()):
            raise LookupError
    with trio.socket.socket() as real:
        assert real.fileno() < 1 << 20
