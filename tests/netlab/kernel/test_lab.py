"""Whole labs in the kernel: packets through NATs, Trio code in hosts, changes under way."""

from __future__ import annotations

import errno
import socket

import pytest
import trio

from netlab.drops import DropReason
from netlab.kernel.fidelity import Engine
from netlab.kernel.lab import KernelLab
from netlab.model import (
    Filtering,
    Firewall,
    Hairpin,
    Host,
    Ipv6,
    Link,
    Nat,
    NatBehavior,
    Server,
    Topology,
    Uplink,
)
from netlab.timeline import Event, MappingBorn, MappingDied, PacketDropped

pytestmark = pytest.mark.jail

# From linux/in.h; Python's socket module doesn't have them.
IP_MTU_DISCOVER, IP_PMTUDISC_DO = 10, 2


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


def udp_socket(family: int = socket.AF_INET) -> trio.socket.SocketType:
    return trio.socket.socket(family, socket.SOCK_DGRAM)


@pytest.mark.parametrize("engine", list(Engine))
async def test_hairpinning_shows_the_external_source(engine: Engine) -> None:
    """Two hosts of one LAN meet at their external addresses (RFC 4787 REQ-9)."""
    behavior = NatBehavior(filtering=Filtering.EIF, hairpin=Hairpin.EXTERNAL)
    topology = Topology(
        nats=(Nat(name="n", behavior=behavior),),
        hosts=tuple(Host(name=name, uplinks=(Uplink(network="n"),)) for name in "ab"),
        servers=(Server(name="s1"),),
    )
    async with KernelLab(topology, engines={"n": engine}) as lab, trio.open_nursery() as nursery:
        await nursery.start(echo_server, lab, "s1", 3478)
        async with lab.host("a"):
            left = udp_socket()
        async with lab.host("b"):
            right = udp_socket()
        with left, right, trio.fail_after(5):
            await left.bind(("0.0.0.0", 4001))
            await right.bind(("0.0.0.0", 4002))
            left_seen = (await ask(left, lab, "s1", 3478)).split()
            right_seen = (await ask(right, lab, "s1", 3478)).split()
            await left.sendto(b"hello", (right_seen[0], int(right_seen[1])))
            data, source = await right.recvfrom(100)
            assert (data, source) == (b"hello", (left_seen[0], int(left_seen[1])))
            await right.sendto(b"back", source)
            assert await left.recv(100) == b"back"
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize(
    "engines",
    [{}, {"cgn": Engine.USER}, {"home": Engine.USER}, dict.fromkeys(("cgn", "home"), "user")],
)
async def test_nats_in_series_translate_one_after_the_other(engines: dict[str, Engine]) -> None:
    """Behind a carrier's NAT the server sees the carrier's address, on any mix of engines."""
    topology = Topology(
        nats=(
            Nat(name="cgn", behavior=NatBehavior(carrier=True)),
            Nat(name="home", uplink=Uplink(network="cgn")),
        ),
        hosts=(Host(name="a", uplinks=(Uplink(network="home"),)),),
        servers=(Server(name="s1"),),
    )
    async with KernelLab(topology, engines=engines) as lab, trio.open_nursery() as nursery:
        await nursery.start(echo_server, lab, "s1", 3478)
        async with lab.host("a"):
            with udp_socket() as client:
                seen = await ask(client, lab, "s1", 3478)
        assert seen.split()[0] == str(lab.nat("cgn").external[0])
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("engine", list(Engine))
async def test_a_firewall_lets_only_tcp_443_out(engine: Engine) -> None:
    """UDP vanishes, TCP to 443 connects, TCP to another port is refused."""
    firewall = Firewall(udp_ports=(), tcp_ports=(443,), reject=True)
    async with (
        KernelLab(reference_topology(firewall=firewall), engines={"home": engine}) as lab,
        trio.open_nursery() as nursery,
    ):

        async def serve(stream: trio.SocketStream) -> None:
            await stream.send_all(b"x" * 200_000)

        async with lab.host("s1"):
            await nursery.start(trio.serve_tcp, serve, 443)
            await nursery.start(trio.serve_tcp, serve, 80)
        async with lab.host("a"):
            with trio.fail_after(10):
                async with await trio.open_tcp_stream("s1", 443) as stream:
                    received = b"".join([chunk async for chunk in stream])
                assert received == b"x" * 200_000
                with pytest.raises(OSError, match="all attempts to connect"):
                    await trio.open_tcp_stream("s1", 80)
            with udp_socket() as client:
                await client.connect((lab.host("s1").addresses[0], 3478))
                await client.send(b"?")
                with trio.fail_after(5), pytest.raises(OSError, match="No route to host"):
                    await client.recv(10)
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("engine", list(Engine))
async def test_ipv6_goes_untranslated_through_a_stateful_firewall(engine: Engine) -> None:
    """The server sees the host's own address; a stranger's packet gets nowhere."""
    async with KernelLab(reference_topology(ipv6=Ipv6.ROUTED), engines={"home": engine}) as lab:
        async with lab.host("s1"):
            server = udp_socket(socket.AF_INET6)
        async with lab.host("s2"):
            stranger = udp_socket(socket.AF_INET6)
        async with lab.host("a"):
            client = udp_socket(socket.AF_INET6)
        with server, stranger, client, trio.fail_after(5):
            await server.bind(("::", 3478))
            await client.bind(("::", 4000))
            own, goal = (
                next(a for a in lab.host(name).addresses if ":" in a) for name in ("a", "s1")
            )
            await client.sendto(b"hello", (goal, 3478))
            data, source = await server.recvfrom(100)
            assert (data, source[:2]) == (b"hello", (own, 4000))
            await stranger.sendto(b"stranger", (own, 4000))
            await server.sendto(b"back", source)
            assert await client.recv(100) == b"back"


async def test_the_path_mtu_is_found_unless_the_link_is_a_black_hole() -> None:
    """A link of 1280 bytes tells the sender of a larger packet; a black hole tells nobody."""

    async def send_1400_bytes(black_hole: bool) -> str:
        link = Link(mtu_bytes=1280, mtu_black_hole=black_hole)
        topology = Topology(
            nats=(Nat(name="n", uplink=Uplink(link=link)),),
            hosts=(Host(name="a", uplinks=(Uplink(network="n"),)),),
            servers=(Server(name="s1"),),
        )
        async with KernelLab(topology) as lab:
            async with lab.host("s1"):
                server = udp_socket()
            async with lab.host("a"):
                client = udp_socket()
            with server, client, trio.fail_after(5):
                address = lab.host("s1").addresses[0], 3478
                await server.bind(address)
                await client.connect(address)
                client.setsockopt(socket.IPPROTO_IP, IP_MTU_DISCOVER, IP_PMTUDISC_DO)
                await client.send(b"x" * 1400)
                await client_settles(client)
                try:
                    await client.send(b"x" * 1400)
                except OSError as error:
                    return errno.errorcode[error.errno or 0]
                await client.send(b"small")
                return (await server.recv(2000)).decode()

    assert await send_1400_bytes(black_hole=False) == "EMSGSIZE"
    assert await send_1400_bytes(black_hole=True) == "small"


async def client_settles(client: trio.socket.SocketType) -> None:
    """Wait until an ICMP error had its chance to arrive; it is delivered within the send."""
    with trio.move_on_after(0.02):
        try:
            await client.recv(1)
        except OSError:
            pass
