"""IPv6-only hosts behind a NAT64 in the kernel: probed, by name, and with big packets."""

from __future__ import annotations

import socket

import pytest
import trio

from netlab.kernel.lab import KernelLab
from netlab.labs import BackEnd
from netlab.model import Host, Link, Nat, Server, Topology, Uplink
from netlab.presets import nat_preset
from netlab.runner import run_scenario
from netlab.scenario_file import parse_scenario
from netlab.timeline import MappingBorn, ProgramOutput
from netlab.verify import preset_target, verify

pytestmark = pytest.mark.jail


async def test_the_preset_measures_as_claimed() -> None:
    """The same probe as in simulation, through 64:ff9b::."""
    (finding,) = await verify([preset_target(nat_preset("mobile/nat64"))], BackEnd.KERNEL)
    assert finding.agrees, finding
    assert (finding.engine, finding.skipped, finding.measured) == ("user", "", "APDM+APDF")


def topology(link: Link) -> Topology:
    behavior = nat_preset("mobile/nat64").behavior
    return Topology(
        nats=(Nat(name="mobile", behavior=behavior, uplink=Uplink(link=link)),),
        hosts=(Host(name="phone", uplinks=(Uplink(network="mobile"),)),),
        servers=(Server(name="old", ipv6=False),),
    )


@pytest.mark.parametrize("mtu", [1500, 1400])
async def test_tcp_to_an_old_server_by_its_name(mtu: int) -> None:
    """The lab's resolver synthesizes its address; both ways full-sized segments arrive, also
    where the IPv4 side carries less than the IPv6 side."""
    text = bytes(range(256)) * 1000
    async with KernelLab(topology(Link(mtu_bytes=mtu))) as lab, trio.open_nursery() as nursery:
        async with lab.host("old"):
            listeners = await trio.open_tcp_listeners(80, host="0.0.0.0")

            async def echo(stream: trio.SocketStream) -> None:
                async for data in stream:
                    await stream.send_all(data)

            nursery.start_soon(trio.serve_listeners, echo, listeners)
        async with lab.host("phone"):
            with trio.fail_after(10):
                stream = await trio.open_tcp_stream("old", 80)
            async with stream:
                assert stream.socket.getpeername()[0].startswith("64:ff9b::")
                nursery.start_soon(stream.send_all, text)
                received = b""
                while len(received) < len(text):
                    with trio.fail_after(5):
                        received += await stream.receive_some()
        nursery.cancel_scope.cancel()
        assert received == text
        (born,) = (event for event in lab.timeline if isinstance(event, MappingBorn))
        assert born.inside.startswith("[2a0f:")


async def test_udp_in_fragments() -> None:
    """A datagram larger than either MTU is put together again at both ends."""
    async with KernelLab(topology(Link())) as lab:
        async with lab.host("old"):
            server = trio.socket.socket(type=socket.SOCK_DGRAM)
            await server.bind(("0.0.0.0", 7))
        async with lab.host("phone"):
            client = trio.socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
        with server, client, trio.fail_after(5):
            address = lab.host("old").addresses[0]
            await client.sendto(b"x" * 4000, (f"64:ff9b::{address}", 7))
            data, source = await server.recvfrom(5000)
            await server.sendto(data + b"y", source)
            assert await client.recv(5000) == b"x" * 4000 + b"y"


async def test_programs_are_told_by_dns64() -> None:
    """With the lab's DNS service the C library gets an address that it can reach, here and
    for a host that has IPv4."""
    result = await run_scenario(
        parse_scenario("""
            duration = "10s"
            [nat.mobile]
            preset = "mobile/nat64"
            [host.phone]
            behind = "mobile"
            [host.pc]
            [server.old]
            ipv6 = false
            [server.names]
            services = ["dns"]
            [[run]]
            on = "phone"
            cmd = ["getent", "ahosts", "old"]
            [[run]]
            on = "pc"
            cmd = ["getent", "ahosts", "old"]
        """),
        BackEnd.KERNEL,
    )
    lines: dict[str, list[str]] = {}
    for event in result.timeline:
        if isinstance(event, ProgramOutput):
            lines.setdefault(event.program, []).append(event.line.split()[0])
    assert {line[:9] for line in lines["phone"]} == {"64:ff9b::"}
    assert {line[:4] for line in lines["pc"]} == {"2.0."}
