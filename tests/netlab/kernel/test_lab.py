"""Whole labs in the kernel: packets through NATs, Trio code in hosts, changes under way."""

from __future__ import annotations

import socket

import pytest
import trio

from netlab.drops import DropReason
from netlab.kernel.fidelity import Engine
from netlab.kernel.lab import KernelLab
from netlab.model import (
    Filtering,
    Host,
    Link,
    Nat,
    NatBehavior,
    Server,
    Topology,
    Uplink,
)
from netlab.timeline import Event, MappingBorn, MappingDied, PacketDropped

pytestmark = pytest.mark.jail


def reference_topology(**behavior: object) -> Topology:
    return Topology(
        nats=(Nat(name="home", behavior=NatBehavior(**behavior)), Nat(name="office")),
        hosts=(
            Host(name="a", uplinks=(Uplink(network="home"),)),
            Host(name="b", uplinks=(Uplink(network="office"),)),
        ),
        servers=(Server(name="s1"), Server(name="s2"), Server(name="s3")),
    )


async def echo_server(lab: KernelLab, name: str, port: int, task_status: trio.TaskStatus) -> None:
    """Answer every datagram with the address that it came from."""
    async with lab.host(name):
        with trio.socket.socket(type=socket.SOCK_DGRAM) as server:
            await server.bind((lab.host(name).addresses[0], port))
            task_status.started()
            while True:
                _, sender = await server.recvfrom(2000)
                await server.sendto(f"{sender[0]} {sender[1]}".encode(), sender)


async def ask(client: trio.socket.SocketType, lab: KernelLab, name: str, port: int) -> str:
    with trio.fail_after(5):
        await client.sendto(b"who am I?", (lab.host(name).addresses[0], port))
        return (await client.recvfrom(2000))[0].decode()


@pytest.mark.parametrize("engine", list(Engine))
async def test_a_packet_comes_back_through_either_engine(engine: Engine) -> None:
    """A host behind a NAT reaches a server, which sees the NAT's external address."""
    async with (
        KernelLab(reference_topology(), engines={"home": engine}) as lab,
        trio.open_nursery() as nursery,
    ):
        await nursery.start(echo_server, lab, "s1", 3478)
        async with lab.host("a"):
            with trio.socket.socket(type=socket.SOCK_DGRAM) as client:
                await client.bind(("0.0.0.0", 40000))
                seen = await ask(client, lab, "s1", 3478)
        assert seen == f"{lab.nat('home').external[0]} 40000"
        nursery.cancel_scope.cancel()


async def test_trio_streams_run_unchanged_inside_hosts() -> None:
    """`serve_tcp` and `open_tcp_stream` work in two hosts of one process, by machine name."""
    async with KernelLab(reference_topology()) as lab, trio.open_nursery() as nursery:

        async def serve(stream: trio.SocketStream) -> None:
            await stream.send_all(b"peer " + stream.socket.getpeername()[0].encode())

        async with lab.host("s2"):
            await nursery.start(trio.serve_tcp, serve, 8080)
        async with lab.host("a"):
            stream = await trio.open_tcp_stream("s2", 8080)
            assert await stream.receive_some() == f"peer {lab.nat('home').external[0]}".encode()
            await stream.aclose()
        nursery.cancel_scope.cancel()


async def test_a_socket_outside_every_host_reaches_nothing() -> None:
    """What escapes its host fails at once instead of reaching a real network."""
    async with KernelLab(reference_topology()) as lab:
        with (
            trio.socket.socket(type=socket.SOCK_DGRAM) as stray,
            pytest.raises(OSError, match="unreachable"),
        ):
            await stray.sendto(b"?", (lab.host("s1").addresses[0], 1))


async def test_programs_run_in_hosts_and_end_with_the_lab() -> None:
    """A program sees its host's addresses; one left running is killed when the lab closes."""
    async with KernelLab(reference_topology()) as lab:
        done = await lab.host("a").run_process(["ip", "-br", "addr"], capture_stdout=True)
        left = await lab.host("b").open_process(["sleep", "600"])
    assert lab.plan.hosts["a"][0].ipv4[0].exploded in done.stdout.decode()
    with trio.fail_after(5):
        assert await left.wait() == -9


@pytest.mark.parametrize("pumped", [False, True])
async def test_a_cut_is_silent_and_heals(pumped: bool) -> None:
    """Across a cut nothing arrives and nothing fails; afterwards the same socket goes on."""
    adjustable = ["a"] if pumped else []
    async with (
        KernelLab(reference_topology(), adjustable=adjustable) as lab,
        trio.open_nursery() as nursery,
    ):
        await nursery.start(echo_server, lab, "s1", 3478)
        async with lab.host("a"):
            with trio.socket.socket(type=socket.SOCK_DGRAM) as client:
                await ask(client, lab, "s1", 3478)
                lab.host("a").cut()
                await client.sendto(b"lost", (lab.host("s1").addresses[0], 3478))
                with trio.move_on_after(0.1) as waited:
                    await client.recvfrom(100)
                assert waited.cancelled_caught
                lab.host("a").heal()
                await ask(client, lab, "s1", 3478)
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("engine", list(Engine))
async def test_a_rebooted_nat_has_forgotten_the_hole(engine: Engine) -> None:
    """After a reboot the outside gets no more in until the inside sends again."""
    async with (
        KernelLab(reference_topology(filtering=Filtering.EIF), engines={"home": engine}) as lab,
        trio.open_nursery() as nursery,
    ):
        await nursery.start(echo_server, lab, "s1", 3478)
        async with lab.host("s2"):
            stranger = trio.socket.socket(type=socket.SOCK_DGRAM)
        async with lab.host("a"):
            client = trio.socket.socket(type=socket.SOCK_DGRAM)
        with stranger, client:
            address, port = (await ask(client, lab, "s1", 3478)).split()
            await stranger.sendto(b"before", (address, int(port)))
            with trio.fail_after(5):
                assert await client.recv(100) == b"before"
            lab.nat("home").reboot()
            await stranger.sendto(b"between", (address, int(port)))
            with trio.move_on_after(0.1) as waited:
                await client.recv(100)
            assert waited.cancelled_caught
            await ask(client, lab, "s1", 3478)
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("engine", list(Engine))
async def test_a_renumbered_nat_shows_its_new_address(engine: Engine) -> None:
    """After renumbering, the same inside socket appears at the new external address."""
    async with (
        KernelLab(reference_topology(), engines={"home": engine}) as lab,
        trio.open_nursery() as nursery,
    ):
        await nursery.start(echo_server, lab, "s1", 3478)
        async with lab.host("a"):
            with trio.socket.socket(type=socket.SOCK_DGRAM) as client:
                await ask(client, lab, "s1", 3478)
                lab.nat("home").renumber((bytes([2, 1, 250, 9]),))
                assert (await ask(client, lab, "s1", 3478)).startswith("2.1.250.9 ")
        nursery.cancel_scope.cancel()


async def test_a_host_roams_to_its_other_uplink() -> None:
    """After roaming, an unconnected socket leaves through the other NAT."""
    topology = Topology(
        nats=(Nat(name="home"), Nat(name="cell")),
        hosts=(Host(name="a", uplinks=(Uplink(network="home"), Uplink(network="cell"))),),
        servers=(Server(name="s1"),),
    )
    async with KernelLab(topology) as lab, trio.open_nursery() as nursery:
        await nursery.start(echo_server, lab, "s1", 3478)
        async with lab.host("a") as host:
            with trio.socket.socket(type=socket.SOCK_DGRAM) as client:
                first = await ask(client, lab, "s1", 3478)
                host.roam("cell")
                second = await ask(client, lab, "s1", 3478)
                host.disconnect()
                with pytest.raises(OSError, match="unreachable"):
                    await client.sendto(b"?", (lab.host("s1").addresses[0], 3478))
                host.roam("home")
                third = await ask(client, lab, "s1", 3478)
        home, cell = (str(lab.nat(name).external[0]) for name in ("home", "cell"))
        assert [seen.split()[0] for seen in (first, second, third)] == [home, cell, home]
        nursery.cancel_scope.cancel()


async def test_a_link_delays_and_loses_as_told() -> None:
    """A link of 20 ms each way takes at least 40 ms there and back, and loses what it should."""
    link = Link(delay_seconds=0.02)
    topology = Topology(
        hosts=(Host(name="a", uplinks=(Uplink(link=link),)),), servers=(Server(name="s1"),)
    )
    async with KernelLab(topology) as lab, trio.open_nursery() as nursery:
        await nursery.start(echo_server, lab, "s1", 3478)
        async with lab.host("a") as host:
            with trio.socket.socket(type=socket.SOCK_DGRAM) as client:
                started = trio.current_time()
                await ask(client, lab, "s1", 3478)
                assert trio.current_time() - started >= 0.04
                host.set_link(Link(loss=1.0))
                await client.sendto(b"lost", (lab.host("s1").addresses[0], 3478))
                with trio.move_on_after(0.1) as waited:
                    await client.recvfrom(100)
                assert waited.cancelled_caught
        nursery.cancel_scope.cancel()


def heard(lab: KernelLab, kind: type[Event]) -> trio.Event:
    """Return what is set when an event of a kind is on the timeline."""
    happened = trio.Event()
    lab.timeline.sinks.append(lambda e: happened.set() if isinstance(e, kind) else None)
    return happened


@pytest.mark.parametrize("engine", list(Engine))
async def test_the_timeline_tells_of_mappings_and_drops(engine: Engine) -> None:
    """Both engines report the birth and death of a mapping, and why a stranger got nowhere."""
    async with (
        KernelLab(reference_topology(), engines={"home": engine}) as lab,
        trio.open_nursery() as nursery,
    ):
        await nursery.start(echo_server, lab, "s1", 3478)
        dropped, ended = heard(lab, PacketDropped), heard(lab, MappingDied)
        async with lab.host("a"):
            client = trio.socket.socket(type=socket.SOCK_DGRAM)
        async with lab.host("s2"):
            stranger = trio.socket.socket(type=socket.SOCK_DGRAM)
        with client, stranger, trio.fail_after(5):
            await client.bind(("0.0.0.0", 40000))
            address, port = (await ask(client, lab, "s1", 3478)).split()
            await stranger.sendto(b"?", (address, int(port)))
            await dropped.wait()
            lab.nat("home").reboot()
            await ended.wait()
        inside, server = lab.host("a").addresses[0], lab.host("s1").addresses[0]
        nursery.cancel_scope.cancel()
    (born,) = (event for event in lab.timeline if isinstance(event, MappingBorn))
    assert (born.nat, born.protocol) == ("home", "udp")
    assert (born.inside, born.external) == (f"{inside}:40000", f"{address}:{port}")
    assert born.remote == f"{server}:3478"
    (drop,) = (event for event in lab.timeline if isinstance(event, PacketDropped))
    assert (drop.where, drop.reason) == ("home", DropReason.FILTERED)
    assert drop.destination == f"{address}:{port}"
    (died,) = (event for event in lab.timeline if isinstance(event, MappingDied))
    assert (died.external, died.cause) == (born.external, "reboot")
