"""The tunnel over QUIC where the network is bad: virtual time, simulated internet."""

from __future__ import annotations

import os
from pathlib import Path
from uuid import uuid4

import trio
from trio.testing import MockClock

from netlab.model import Host, Link, Server, Topology, Uplink
from netlab.simulated.internet import SimulatedInternet
from relay.edge.connection import RequestHead
from relay.edge.quic_session import serve_quic
from tests.relay.edge.fake_connector import TUNNEL_ID, make_registrar
from tests.relay.edge.test_quic import Connector, make_edge_configuration, read_all
from traversal.io.quic import QuicConnection
from traversal.io.quic_endpoints import QuicListener
from traversal.io.udp import bind_socket

BAD = Link(
    delay_seconds=0.03,
    jitter_seconds=0.01,
    loss=0.02,
    duplication=0.01,
    mtu_bytes=1280,
    mtu_black_hole=True,
)
REQUESTS = 100


async def test_loss_and_a_small_mtu(tmp_path: Path, autojump_clock: MockClock) -> None:
    """With 2 % loss each way, reordering, duplicates, and an MTU of 1280 of which no router tells,
    every request of a hundred is answered in full, and the longest datagrams of UDP flows reach the
    connector."""
    configuration = make_edge_configuration(tmp_path)
    registrar = make_registrar()
    topology = Topology(
        hosts=(Host(name="near", uplinks=(Uplink(network="internet", link=BAD),)),),
        servers=(Server(name="far"),),
        seed=3,
    )

    async def serve(quic: QuicConnection) -> None:
        await serve_quic(quic, registrar, source="192.0.2.1", new_id=uuid4)

    async with SimulatedInternet(topology) as lab, trio.open_nursery() as nursery:

        async def accept() -> None:
            while True:
                nursery.start_soon(serve, await listener.accept())

        async with lab.host("far"):
            address = lab.host("far").addresses[0]
            listener = QuicListener(
                await bind_socket(4, address, 0), configuration, entropy=os.urandom
            )
            await nursery.start(listener.run)
            nursery.start_soon(accept)
        async with lab.host("near"):
            connector = Connector((address, listener.port), str(tmp_path / "ca"), nursery)
            await nursery.start(connector.udp.run)
            await connector.connect()
            own = lab.host("near").addresses[0]
            origin = await bind_socket(4, own, 0)
        await registrar.registry.wait_usable(TUNNEL_ID)
        connection = registrar.registry.pick(TUNNEL_ID)
        assert connection is not None
        body = bytes(range(256)) * 80
        answered = 0

        async def ask() -> None:
            nonlocal answered
            head = RequestHead("POST", "https", "app.example.com", "/", (), has_body=True)
            async with await connection.request(head) as exchange:
                await exchange.send(body)
                await exchange.send_end()
                assert (await exchange.response()).status == 200
                assert await read_all(exchange) == body
            answered += 1

        began = trio.current_time()
        with trio.fail_after(120):
            async with trio.open_nursery() as requests:
                for _ in range(REQUESTS):
                    requests.start_soon(ask)
                    await trio.sleep(0.02)
        print(f"LAB {answered} requests in {trio.current_time() - began:.2f} s")
        assert answered == REQUESTS

        flow = await connection.open_udp(f"{own}:{origin.port}", 30)
        got: list[bytes] = []
        with trio.fail_after(30):
            while not got:
                await flow.send(bytes(1280))
                with trio.move_on_after(1):
                    async with lab.host("near"):
                        got = [data for data, _ in await origin.receive()]
        assert len(got[0]) == 1280
        origin.close()
        nursery.cancel_scope.cancel()
