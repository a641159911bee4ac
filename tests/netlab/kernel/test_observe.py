"""What the timeline says of packets that nftables dropped: as much as the lab's own NAT tells."""

from __future__ import annotations

import socket

import pytest
import trio

from netlab.behavior import Filtering, NatBehavior
from netlab.drops import DropReason
from netlab.kernel.fidelity import Engine
from netlab.kernel.lab import KernelLab
from netlab.model import Host, Nat, Server, Topology, Uplink
from netlab.timeline import PacketDropped

pytestmark = pytest.mark.jail


@pytest.mark.parametrize("engine", list(Engine))
@pytest.mark.parametrize(
    ("filtering", "note"),
    [(Filtering.APDF, "port-dependent"), (Filtering.ADF, "address-dependent")],
)
async def test_a_filtered_packet_is_explained(
    engine: Engine, filtering: Filtering, note: str
) -> None:
    """Who had been contacted and when the mapping ends; later, that it has ended."""
    topology = Topology(
        nats=(Nat(name="home", behavior=NatBehavior(filtering=filtering)),),
        hosts=(Host(name="a", uplinks=(Uplink(network="home"),)),),
        servers=(Server(name="s"), Server(name="stranger")),
    )
    async with KernelLab(topology, engines={"home": engine}) as lab:
        sockets = {}
        for name in ("a", "s", "stranger"):
            async with lab.host(name):
                sockets[name] = trio.socket.socket(type=socket.SOCK_DGRAM)
                await sockets[name].bind((lab.host(name).addresses[0], 4000))

        async def provoke() -> PacketDropped:
            await sockets["stranger"].sendto(b"knock", external)
            await trio.sleep(0.1)
            return [event for event in lab.timeline if isinstance(event, PacketDropped)][-1]

        try:
            await sockets["a"].sendto(b"hello", sockets["s"].getsockname())
            _, external = await sockets["s"].recvfrom(100)
            await trio.sleep(0.05)
            drop = await provoke()
            assert drop.reason is DropReason.FILTERED
            server = "{}:{}".format(*sockets["s"].getsockname())
            inside = "{}:{}".format(*sockets["a"].getsockname())
            assert f"filtered, {note}; {inside} had only contacted {server}" in drop.text
            assert "mapping expires in 1" in drop.text  # 119 or 120 s
            lab.advance_nats(200)
            await trio.sleep(0.05)
            drop = await provoke()
            assert drop.reason is DropReason.EXPIRED, drop
            assert "expired" in drop.text
        finally:
            for one in sockets.values():
                one.close()
