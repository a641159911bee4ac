"""Sockets of the simulated internet behave like real ones behind Trio's interfaces."""

from __future__ import annotations

import errno
import re
import socket as stdlib
import ssl
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import trio
import trio.testing
import trustme
from trio.testing import MockClock

from netlab.model import (
    Host,
    Ipv6,
    Link,
    Nat,
    NatBehavior,
    Server,
    Topology,
    Translation,
    Unsolicited,
    Uplink,
)
from netlab.simulated import SimulatedInternet

PORT = 7777


def topology(link: Link | None = None, behavior: NatBehavior | None = None) -> Topology:
    """Host a behind a NAT, host b on the internet, a server; `link` is a's."""
    uplink = Uplink(network="home", link=link or Link())
    return Topology(
        hosts=(Host(name="a", uplinks=(uplink,)), Host(name="b")),
        servers=(Server(name="server", addresses=2),),
        nats=(Nat(name="home", behavior=behavior or NatBehavior(ipv6=Ipv6.ROUTED)),),
        seed=1,
    )


@contextmanager
def raises_errno(code: int) -> Iterator[None]:
    """Expect an OSError with this number."""
    with pytest.raises(OSError, match=re.escape(f"[Errno {code}]")):
        yield


async def udp(family: int = stdlib.AF_INET, port: int = 0) -> trio.socket.SocketType:
    sock = trio.socket.socket(family, stdlib.SOCK_DGRAM)
    await sock.bind(("0.0.0.0" if family == stdlib.AF_INET else "::", port))
    return sock


async def serve_echo(task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
    """Echo every TCP stream until its end, then half-close."""

    async def echo(stream: trio.SocketStream) -> None:
        async with stream:
            async for data in stream:
                await stream.send_all(data)
            await stream.send_eof()

    async with trio.open_nursery() as nursery:
        await nursery.start(trio.serve_tcp, echo, PORT)
        task_status.started()


class TestUdp:
    async def test_through_a_nat_and_back(self, autojump_clock: MockClock) -> None:
        """A server sees the NAT's address, and its answer arrives inside."""
        async with SimulatedInternet(topology()) as internet:
            async with internet.host("server"):
                server = await udp(port=53)
            async with internet.host("a"):
                client = await udp(port=4000)
                await client.sendto(b"question", ("server", 53))
            data, source = await server.recvfrom(100)
            assert data == b"question"
            assert source == (str(internet.plan.nats["home"].outside.ipv4[0]), 4000)
            await server.sendto(b"answer", source)
            data, source = await client.recvfrom(100)
            assert (data, source) == (
                b"answer",
                (str(internet.plan.servers["server"].ipv4[0]), 53),
            )

    @pytest.mark.parametrize("family", [stdlib.AF_INET, stdlib.AF_INET6])
    async def test_connected(self, autojump_clock: MockClock, family: int) -> None:
        """A connected socket has a source address, hears its peer only, and uses send."""
        async with SimulatedInternet(topology()) as internet:
            async with internet.host("server"):
                server = await udp(family, 53)
                stranger = await udp(family, 54)
            async with internet.host("b"):
                client = trio.socket.socket(family, stdlib.SOCK_DGRAM)
                await client.connect(("server", 53))
                assert client.getsockname()[0] in internet.host("b").addresses
                assert client.getpeername()[1] == 53
                await client.send(b"x")
            _, source = await server.recvfrom(10)
            await stranger.sendto(b"stranger", source)
            await server.sendto(b"friend", source)
            assert await client.recv(100) == b"friend"
            with pytest.raises(BlockingIOError):
                client.recvfrom_nowait(10)  # type: ignore[attr-defined]

    async def test_refused(self, autojump_clock: MockClock) -> None:
        """A closed port refuses a connected socket on its next call, not an unconnected one."""
        async with SimulatedInternet(topology()) as internet, internet.host("a"):
            connected = trio.socket.socket(type=stdlib.SOCK_DGRAM)
            await connected.connect(("server", 9))
            await connected.send(b"x")
            with pytest.raises(ConnectionRefusedError):
                await connected.recv(10)
            unconnected = await udp()
            await unconnected.sendto(b"x", ("server", 9))
            with trio.move_on_after(1) as scope:
                await unconnected.recvfrom(10)
            assert scope.cancelled_caught

    async def test_no_way(self, autojump_clock: MockClock) -> None:
        """Without an uplink, or without the family, sending is ENETUNREACH."""
        plain = topology(behavior=NatBehavior())
        async with SimulatedInternet(plain) as internet, internet.host("a"):
            six = await udp(stdlib.AF_INET6)
            with raises_errno(errno.ENETUNREACH):
                await six.sendto(b"x", ("2a0f:1:0:1::5", 1))
            four = await udp()
            internet.host("a").disconnect()
            with raises_errno(errno.ENETUNREACH):
                await four.sendto(b"x", ("2.0.0.1", 1))

    async def test_no_host_is_no_network(self, autojump_clock: MockClock) -> None:
        """A task that has entered no host cannot open a socket."""
        async with SimulatedInternet(topology()) as internet:
            with pytest.raises(OSError, match="in no simulated host"):
                trio.socket.socket()
            async with internet.host("a"), internet.host("b"):
                pass
            with pytest.raises(OSError, match="in no simulated host"):
                trio.socket.socket()

    async def test_dual_stack(self, autojump_clock: MockClock) -> None:
        """An IPv6 wildcard socket also speaks IPv4, with mapped addresses."""
        async with SimulatedInternet(topology()) as internet:
            async with internet.host("server"):
                server = await udp(stdlib.AF_INET6, 53)
            async with internet.host("b"):
                client = await udp()
                await client.sendto(b"x", (str(internet.plan.servers["server"].ipv4[0]), 53))
            _, source = await server.recvfrom(10)
            assert source[0].startswith("::ffff:")
            await server.sendto(b"y", source)
            assert await client.recv(10) == b"y"

    async def test_bind_conflicts_and_foreign_addresses(self, autojump_clock: MockClock) -> None:
        """A taken port is EADDRINUSE, another machine's address EADDRNOTAVAIL."""
        async with SimulatedInternet(topology()) as internet, internet.host("a"):
            first = await udp(port=5000)
            with raises_errno(errno.EADDRINUSE):
                await udp(port=5000)
            first.close()
            await udp(port=5000)
            sock = trio.socket.socket(type=stdlib.SOCK_DGRAM)
            with raises_errno(errno.EADDRNOTAVAIL):
                await sock.bind(("2.0.0.1", 0))

    async def test_close_wakes_the_reader(self, autojump_clock: MockClock) -> None:
        """Closing a socket under a reader raises ClosedResourceError there."""
        async with SimulatedInternet(topology()) as internet, internet.host("a"):
            sock = await udp()

            async def read() -> None:
                with pytest.raises(trio.ClosedResourceError):
                    await sock.recvfrom(10)

            async with trio.open_nursery() as nursery:
                nursery.start_soon(read)
                await trio.testing.wait_all_tasks_blocked()
                with pytest.raises(trio.BusyResourceError):
                    await sock.recvfrom(10)
                sock.close()
            assert sock.fileno() == -1
            with raises_errno(errno.EBADF):
                await sock.sendto(b"x", ("2.0.0.1", 1))

    async def test_segmentation_offload(self, autojump_clock: MockClock) -> None:
        """UDP_SEGMENT cuts one sendmsg into datagrams."""
        async with SimulatedInternet(topology()) as internet:
            async with internet.host("server"):
                server = await udp(port=53)
            async with internet.host("a"):
                client = await udp()
                size = (400).to_bytes(2, "little")
                await client.sendmsg([b"x" * 900, b"y" * 100], [(17, 103, size)], 0, ("server", 53))
            sizes = [len((await server.recvfrom(2000))[0]) for _ in range(3)]
            assert sizes == [400, 400, 200]

    async def test_full_buffer_drops(self, autojump_clock: MockClock) -> None:
        """What a reader does not take is dropped beyond the receive buffer."""
        async with SimulatedInternet(topology()) as internet:
            async with internet.host("server"):
                server = await udp(port=53)
            async with internet.host("a"):
                client = await udp()
                for _ in range(300):
                    await client.sendto(bytes(1200), ("server", 53))
                await trio.sleep(1)
            received = 0
            while server.is_readable():
                await server.recvfrom(2000)
                received += 1
            assert 50 < received < 200

    async def test_path_mtu(self, autojump_clock: MockClock) -> None:
        """Beyond a small link a don't-fragment socket learns EMSGSIZE; others get through."""
        nat = Nat(name="home", uplink=Uplink(link=Link(mtu_bytes=1280)))
        small = Topology(
            hosts=(Host(name="a", uplinks=(Uplink(network="home"),)),),
            servers=(Server(name="server"),),
            nats=(nat,),
        )
        async with SimulatedInternet(small) as internet:
            async with internet.host("server"):
                server = await udp(port=53)
            async with internet.host("a"):
                client = await udp()
                client.setsockopt(stdlib.IPPROTO_IP, 10, 2)  # IP_MTU_DISCOVER, IP_PMTUDISC_DO
                await client.sendto(bytes(1400), ("server", 53))
                await trio.sleep(0.1)
                with raises_errno(errno.EMSGSIZE):
                    await client.sendto(bytes(1400), ("server", 53))
                client.setsockopt(stdlib.IPPROTO_IP, 10, 1)  # IP_PMTUDISC_WANT
                await client.sendto(bytes(1400), ("server", 53))
            data, _ = await server.recvfrom(2000)
            assert len(data) == 1400


class TestTcp:
    async def test_is_a_trio_stream(self, autojump_clock: MockClock) -> None:
        """Trio's own conformance suite for half-closeable streams passes."""
        async with SimulatedInternet(topology()) as internet:
            async with internet.host("server"):
                listeners = await trio.open_tcp_listeners(PORT)

            async def make() -> tuple[trio.SocketStream, trio.SocketStream]:
                accepted: list[trio.SocketStream] = []

                async def accept() -> None:
                    accepted.append(await listeners[0].accept())

                async with internet.host("a"), trio.open_nursery() as nursery:
                    nursery.start_soon(accept)
                    client = await trio.open_tcp_stream(
                        str(internet.plan.servers["server"].ipv4[0]), PORT
                    )
                return client, accepted[0]

            async def make_clogged() -> tuple[trio.SocketStream, trio.SocketStream]:
                streams = await make()
                for stream in streams:
                    with trio.move_on_after(1):
                        while True:
                            await stream.send_all(bytes(65_536))
                return streams

            await trio.testing.check_half_closeable_stream(make, make_clogged)

    async def test_serve_and_open_by_name(self, autojump_clock: MockClock) -> None:
        """serve_tcp and open_tcp_stream work unmodified, name lookup included."""
        async with SimulatedInternet(topology()) as internet, trio.open_nursery() as nursery:
            async with internet.host("server"):
                await nursery.start(serve_echo)
            async with internet.host("a"):
                stream = await trio.open_tcp_stream("server", PORT)
            async with stream:
                await stream.send_all(b"hello")
                assert await stream.receive_some() == b"hello"
                await stream.send_eof()
                assert await stream.receive_some() == b""
            nursery.cancel_scope.cancel()

    async def test_tls(self, autojump_clock: MockClock) -> None:
        """TLS runs over the simulated streams."""
        authority = trustme.CA()
        server_context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        authority.issue_cert("server").configure_cert(server_context)
        client_context = ssl.create_default_context()
        authority.configure_trust(client_context)

        async def greet(stream: trio.SSLStream[trio.SocketStream]) -> None:
            await stream.send_all(await stream.receive_some())
            await stream.aclose()

        async with SimulatedInternet(topology()) as internet, trio.open_nursery() as nursery:
            async with internet.host("server"):
                await nursery.start(trio.serve_ssl_over_tcp, greet, 443, server_context)
            async with internet.host("a"):
                stream = await trio.open_ssl_over_tcp_stream(
                    "server", 443, ssl_context=client_context
                )
            await stream.send_all(b"secret")
            assert await stream.receive_some() == b"secret"
            nursery.cancel_scope.cancel()

    @pytest.mark.parametrize(
        "link",
        [
            Link(
                delay_seconds=0.02, loss=0.05, jitter_seconds=0.01, reorder=True, duplication=0.05
            ),
            Link(delay_seconds=0.01, rate_bits_per_second=5e6, queue_seconds=0.03),
            Link(mtu_bytes=600),
        ],
    )
    async def test_bytes_survive_impairments(self, autojump_clock: MockClock, link: Link) -> None:
        """Loss, reordering, duplication, a thin queue and a small MTU delay bytes, no more."""
        sent = bytes(n * 7 % 251 for n in range(300_000))
        async with SimulatedInternet(topology(link)) as internet, trio.open_nursery() as nursery:
            async with internet.host("server"):
                await nursery.start(serve_echo)
            async with internet.host("a"):
                stream = await trio.open_tcp_stream("server", PORT)

            async def send() -> None:
                await stream.send_all(sent)
                await stream.send_eof()

            nursery.start_soon(send)
            received = bytearray()
            with trio.fail_after(600):
                async for data in stream:
                    received += data
            assert received == sent
            nursery.cancel_scope.cancel()

    async def test_refused_and_silent(self, autojump_clock: MockClock) -> None:
        """A closed port refuses at once; a NAT that drops times out after Linux's retries."""
        async with SimulatedInternet(topology()) as internet:
            async with internet.host("a"):
                with pytest.raises(OSError, match="all attempts to connect"):
                    await trio.open_tcp_stream("server", 81)
            async with internet.host("b"):
                sock = trio.socket.socket()
                began = trio.current_time()
                with pytest.raises(TimeoutError):
                    await sock.connect((str(internet.plan.nats["home"].outside.ipv4[0]), 80))
                assert 100 < trio.current_time() - began < 150

    async def test_reset_by_nat(self, autojump_clock: MockClock) -> None:
        """A NAT that answers unsolicited SYNs with RST makes connecting fail at once."""
        behavior = NatBehavior(unsolicited=Unsolicited.RESET)
        async with SimulatedInternet(topology(behavior=behavior)) as internet, internet.host("b"):
            sock = trio.socket.socket()
            with pytest.raises(ConnectionRefusedError):
                await sock.connect((str(internet.plan.nats["home"].outside.ipv4[0]), 80))

    async def test_unread_bytes_reset(self, autojump_clock: MockClock) -> None:
        """Closing with unread bytes resets the peer."""
        async with SimulatedInternet(topology()) as internet:
            async with internet.host("server"):
                (listener, *_) = await trio.open_tcp_listeners(PORT, host="0.0.0.0")
            async with internet.host("a"):
                client = await trio.open_tcp_stream("server", PORT)
            server = await listener.accept()
            await client.send_all(b"unread")
            await trio.sleep(0.1)
            await server.aclose()
            with pytest.raises(trio.BrokenResourceError):
                await client.receive_some()

    @pytest.mark.parametrize("skew", [0.0, 0.2, 1.5])
    async def test_simultaneous_open(self, autojump_clock: MockClock, skew: float) -> None:
        """Two hosts behind NATs that drop unsolicited SYNs connect to each other."""
        two = Topology(
            hosts=tuple(
                Host(name=n, uplinks=(Uplink(network=f"nat-{n}", link=Link(delay_seconds=0.01)),))
                for n in "ab"
            ),
            nats=(Nat(name="nat-a"), Nat(name="nat-b")),
        )
        async with SimulatedInternet(two) as internet:

            async def connect(me: str, peer: str, delay: float) -> None:
                async with internet.host(me):
                    sock = trio.socket.socket()
                    await sock.bind(("0.0.0.0", 6000))
                    await trio.sleep(delay)
                    address = str(internet.plan.nats[f"nat-{peer}"].outside.ipv4[0])
                    await sock.connect((address, 6000))
                    await sock.send(me.encode())
                    assert await sock.recv(10) == peer.encode()

            with trio.fail_after(60):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(connect, "a", "b", 0.0)
                    nursery.start_soon(connect, "b", "a", skew)


class TestNames:
    async def test_unknown_name(self, autojump_clock: MockClock) -> None:
        """An unknown name fails as in the real resolver."""
        async with SimulatedInternet(topology()) as internet, internet.host("a"):
            with pytest.raises(stdlib.gaierror):
                await trio.socket.getaddrinfo("nowhere.example", 1)

    async def test_families_and_extra_names(self, autojump_clock: MockClock) -> None:
        """Servers have A and AAAA records; the lab can add names."""
        names = {"derp1.example": ["2.0.0.77"]}
        async with (
            SimulatedInternet(topology(), names=names) as internet,
            internet.host("a"),
        ):
            found = await trio.socket.getaddrinfo("server", 1, type=stdlib.SOCK_STREAM)
            assert {entry[0] for entry in found} == {stdlib.AF_INET, stdlib.AF_INET6}
            found = await trio.socket.getaddrinfo("derp1.example", 1, type=stdlib.SOCK_STREAM)
            assert [entry[4] for entry in found] == [("2.0.0.77", 1)]


class TestNat64:
    async def test_reaches_ipv4_by_name(self, autojump_clock: MockClock) -> None:
        """An IPv6-only host reaches an IPv4 server through a synthesized address."""
        nat64 = NatBehavior(nat64=True, ipv6=Ipv6.ROUTED)
        lab = Topology(
            hosts=(Host(name="phone", uplinks=(Uplink(network="cell"),)),),
            servers=(Server(name="old", ipv6=False),),
            nats=(Nat(name="cell", behavior=nat64),),
        )
        async with SimulatedInternet(lab) as internet, trio.open_nursery() as nursery:
            async with internet.host("old"):
                await nursery.start(serve_echo)
                datagrams = await udp(port=53)
            async with internet.host("phone"):
                stream = await trio.open_tcp_stream("old", PORT)
                assert stream.socket.getpeername()[0].startswith("64:ff9b::")
                await stream.send_all(b"hi")
                assert await stream.receive_some() == b"hi"
                six = await udp(stdlib.AF_INET6)
                await six.sendto(b"x", ("old", 53))
            _, source = await datagrams.recvfrom(10)
            assert source[0] == str(internet.plan.nats["cell"].outside.ipv4[0])
            await datagrams.sendto(b"y", source)
            data, source = await six.recvfrom(10)
            assert data == b"y"
            assert source[0].startswith("64:ff9b::")
            nursery.cancel_scope.cancel()


class TestIpv6:
    @pytest.mark.parametrize("mode", [Ipv6.ROUTED, Ipv6.NPT, Ipv6.NAT66])
    async def test_modes(self, autojump_clock: MockClock, mode: Ipv6) -> None:
        """Each mode carries a question and its answer, with or without another address."""
        lab = topology(behavior=NatBehavior(ipv6=mode))
        async with SimulatedInternet(lab) as internet:
            async with internet.host("server"):
                server = await udp(stdlib.AF_INET6, 53)
            async with internet.host("a"):
                client = await udp(stdlib.AF_INET6)
                await client.sendto(b"x", ("server", 53))
            _, source = await server.recvfrom(10)
            inside = internet.host("a").addresses
            assert (source[0] in inside) == (mode is Ipv6.ROUTED)
            await server.sendto(b"y", source)
            assert await client.recv(10) == b"y"

    async def test_stateful_by_default(self, autojump_clock: MockClock) -> None:
        """The IPv6 firewall lets nobody in who was not contacted."""
        async with SimulatedInternet(topology()) as internet:
            async with internet.host("a"):
                inside = await udp(stdlib.AF_INET6, 4000)
            address = next(a for a in internet.host("a").addresses if ":" in a)
            async with internet.host("b"):
                stranger = await udp(stdlib.AF_INET6)
                await stranger.sendto(b"x", (address, 4000))
            with trio.move_on_after(1) as scope:
                await inside.recv(10)
            assert scope.cancelled_caught


async def test_routed_site_without_translation(autojump_clock: MockClock) -> None:
    """Behind a router that translates nothing a host is seen by its own address."""
    lab = topology(behavior=NatBehavior(translation=Translation.NONE))
    async with SimulatedInternet(lab) as internet:
        async with internet.host("server"):
            server = await udp(port=53)
        async with internet.host("a"):
            client = await udp(port=4000)
            await client.sendto(b"x", ("server", 53))
        _, source = await server.recvfrom(10)
        assert source == (internet.host("a").addresses[0], 4000)
        await server.sendto(b"y", source)
        assert await client.recv(10) == b"y"
