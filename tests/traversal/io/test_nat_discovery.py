"""RFC 5780 discovery against a server with two addresses, through simulated NATs."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import trio
from trio.testing import MockClock

from netlab.behavior import Filtering, Mapping, NatBehavior
from netlab.model import Host, Nat, Server, Topology, Uplink
from netlab.simulated import SimulatedInternet
from traversal.io.nat_discovery import NatDiscovery
from traversal.io.udp import Batch, UdpSockets
from traversal.wire.address import Address
from traversal.wire.introduction import FilteringClass, MappingClass
from traversal.wire.stun import encode_binding_response, parse_binding_request

PORTS = (3478, 3479)


async def serve_square(hosts: tuple[str, ...], *, task_status: trio.TaskStatus[None]) -> None:
    """Two addresses and two ports, each answering for the others where a request asks for it."""
    sockets = {}
    for host in hosts:
        for port in PORTS:
            sockets[host, port] = trio.socket.socket(type=trio.socket.SOCK_DGRAM)
            await sockets[host, port].bind((host, port))

    async def serve(host: str, port: int) -> None:
        other_host, other_port = hosts[host == hosts[0]], PORTS[port == PORTS[0]]
        while True:
            data, source = await sockets[host, port].recvfrom(2048)
            request = parse_binding_request(data)
            response = encode_binding_response(
                request.transaction_id, source, other_address=(other_host, other_port)
            )
            answering = (
                other_host if request.change_ip else host,
                other_port if request.change_port else port,
            )
            await sockets[answering].sendto(response, source)

    async with trio.open_nursery() as nursery:
        for host, port in sockets:
            nursery.start_soon(serve, host, port)
        task_status.started()


def handler(discovery: NatDiscovery) -> Callable[[Batch], None]:
    def handle(batch: Batch) -> None:
        for datagram, _ in batch:
            discovery.handle_stun(datagram)

    return handle


@pytest.mark.parametrize("mapping", list(Mapping))
@pytest.mark.parametrize("filtering", list(Filtering))
async def test_every_class_is_told(
    autojump_clock: MockClock, nursery: trio.Nursery, mapping: Mapping, filtering: Filtering
) -> None:
    """Each of the nine combinations is recognized within 10 s."""
    behavior = NatBehavior(mapping=mapping, filtering=filtering)
    topology = Topology(
        hosts=(Host(name="a", uplinks=(Uplink(network="home"),)),),
        servers=(Server(name="s", addresses=2),),
        nats=(Nat(name="home", behavior=behavior),),
        seed=1,
    )
    async with SimulatedInternet(topology) as internet, trio.open_nursery() as inner:
        server = internet.host("s")
        async with server:
            addresses = tuple(a for a in server.addresses if ":" not in a)
            await inner.start(serve_square, addresses)
        async with internet.host("a"):
            sockets = UdpSockets({4: "0.0.0.0"})
            await sockets.open()
            discovery = NatDiscovery(sockets, os.urandom)
            inner.start_soon(sockets.receive, handler(discovery))
            began = trio.current_time()
            found = await discovery.run(Address(addresses[0], PORTS[0]), None)
            assert trio.current_time() - began < 10
        inner.cancel_scope.cancel()
        sockets.close()
    assert found is not None
    assert (
        found.mapping
        is {
            Mapping.EIM: MappingClass.ENDPOINT_INDEPENDENT,
            Mapping.ADM: MappingClass.ADDRESS_DEPENDENT,
            Mapping.APDM: MappingClass.ADDRESS_AND_PORT_DEPENDENT,
        }[mapping]
    )
    assert (
        found.filtering
        is {
            Filtering.EIF: FilteringClass.ENDPOINT_INDEPENDENT,
            Filtering.ADF: FilteringClass.ADDRESS_DEPENDENT,
            Filtering.APDF: FilteringClass.ADDRESS_AND_PORT_DEPENDENT,
        }[filtering]
    )
