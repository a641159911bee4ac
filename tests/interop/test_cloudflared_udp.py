"""UDP flows through the real connector, both versions of datagrams. Opt in as test_cloudflared."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import pytest
import trio

from relay.edge.connection import ConnectionFailedError, UdpFlow
from relay.edge.quic import QuicTunnelConnection
from tests.interop.test_cloudflared import PROGRAM, Cloudflared, Stage, eventually, staged

pytestmark = [
    pytest.mark.interop,
    pytest.mark.jail,
    pytest.mark.skipif(not PROGRAM, reason="CLOUDFLARED_BIN names no cloudflared"),
]


@asynccontextmanager
async def echoing() -> AsyncIterator[str]:
    """A UDP service that answers with the port that it was asked from, a colon, and the data."""
    sock = trio.socket.socket(type=trio.socket.SOCK_DGRAM)
    await sock.bind(("127.0.0.1", 0))

    async def echo() -> None:
        while True:
            data, source = await sock.recvfrom(2000)
            await sock.sendto((b"%d:" % source[1] + data)[:1280], source)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(echo)
        try:
            yield f"127.0.0.1:{sock.getsockname()[1]}"
        finally:
            nursery.cancel_scope.cancel()
            sock.close()


@contextmanager
def connector(stage: Stage, version: int, connections: int = 1) -> Iterator[Cloudflared]:
    arguments = ["--url", f"http://127.0.0.1:{stage.origin.port}"]
    if version == 3:
        arguments += ["--features", "support_datagram_v3_2"]
    with stage.connector(*arguments, connections=connections) as program:
        yield program


async def ask(flow: UdpFlow, data: bytes) -> tuple[int, bytes]:
    """Send until something comes back: the port that the connector used, and the data."""
    with trio.fail_after(10):
        while True:
            await flow.send(data)
            with trio.move_on_after(1):
                port, _, rest = (await flow.receive()).partition(b":")
                return int(port), rest


@pytest.mark.parametrize("version", [2, 3])
async def test_flows(tmp_path: Path, version: int) -> None:
    """Each flow has a socket of its own at the connector; datagrams up to 1280 bytes come back; a
    flow that was closed is of no more use."""
    async with staged(tmp_path, "quic") as stage, echoing() as destination:
        with connector(stage, version):
            connection = await stage.usable()
            assert connection.supports_udp
            assert isinstance(connection, QuicTunnelConnection)
            assert connection.flows.version == version
            one, two = [await connection.open_udp(destination, 30) for _ in range(2)]
            (port_one, text), (port_two, _) = await ask(one, b"one"), await ask(two, b"two")
            assert text == b"one"
            assert port_one != port_two
            assert len((await ask(one, bytes(1280)))[1]) > 1270
            one.close()
            with pytest.raises(ConnectionFailedError):
                await one.send(b"closed")
            assert (await ask(two, b"still"))[0] == port_two


async def test_the_connector_ends_an_idle_flow(tmp_path: Path) -> None:
    """With version 2 the connector says so when a flow was idle for as long as it may be."""
    async with staged(tmp_path, "quic") as stage, echoing() as destination:
        with connector(stage, 2):
            connection = await stage.usable()
            flow = await connection.open_udp(destination, 1)
            with trio.fail_after(20), pytest.raises(ConnectionFailedError, match="idle"):
                await flow.receive()


async def test_migration(tmp_path: Path) -> None:
    """When the connection under a flow of version 3 drains, the flow goes on over another one, and
    its destination sees no difference."""
    async with staged(tmp_path, "quic") as stage, echoing() as destination:
        with connector(stage, 3, connections=2):
            connection = await stage.usable(2)
            assert isinstance(connection, QuicTunnelConnection)
            flow = await connection.open_udp(destination, 30)
            port, _ = await ask(flow, b"before")
            connection.drain("the test wants it")
            await eventually(lambda: flow.carrier is not connection.flows)
            assert await ask(flow, b"after") == (port, b"after")
