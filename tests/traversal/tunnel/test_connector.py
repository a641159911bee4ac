"""The connector against our edge on loopback: what it serves, and how its connections last."""

from __future__ import annotations

import functools
import os
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from relay.config import Config
from relay.edge.certificates import authority_path
from relay.edge.connection import RequestHead, TunnelConnection
from relay.edge.service import Edge
from relay.edge.tunnel_files import create_tunnel
from relay.listeners import open_listeners
from traversal.tunnel import connector as connector_module
from traversal.tunnel.connector import Connector, ConnectorOptions
from traversal.tunnel.discovery import EdgePlaces
from traversal.tunnel.edge_connection import DialFailedError, DialOptions
from traversal.tunnel.origin_service import OriginService
from traversal.tunnel.quic import serve_quic
from traversal.tunnel.transport_choice import Transport
from traversal.wire.tunnel.configuration import Configuration, IngressRule
from traversal.wire.tunnel.credentials import Credentials

SECONDS = 20


class Place:
    """A directory of tunnels with one or more edges, an origin, and connectors."""

    def __init__(self, directory: Path, transports: tuple[Transport, ...]) -> None:
        self.directory = directory
        self.transports = transports
        self.credentials: Credentials = create_tunnel(str(directory), "web", os.urandom).credentials
        self.edges: list[Edge] = []

    @asynccontextmanager
    async def edge(self, port: int = 0) -> AsyncIterator[Edge]:
        config = Config.dev(
            {
                "edge.listen": f"127.0.0.1:{port}",
                "edge.directory": str(self.directory),
                "server.drain_seconds": 5.0,
            }
        )
        edge = Edge(config, open_listeners(config.edge.listen[0]))
        async with trio.open_nursery() as nursery:
            await nursery.start(edge.run)
            yield edge
            nursery.cancel_scope.cancel()

    @asynccontextmanager
    async def connector(
        self, *edges: Edge, service: str = "http_status:204", is_private_open: bool = True
    ) -> AsyncIterator[Connector]:
        """A connector whose four connections are registered."""
        configuration = Configuration((IngressRule(service),))
        served = OriginService(configuration, is_private_open=is_private_open)
        connector = Connector(
            ConnectorOptions(
                self.credentials,
                EdgePlaces(tuple(edge.addresses[0] for edge in edges)),
                DialOptions(ca_file=str(authority_path(self.directory))),
                self.transports,
                report=lambda: served.configuration.encode_report({}),
            ),
            served,
            entropy=os.urandom,
            rng=random.Random(1),
        )
        async with trio.open_nursery() as nursery:
            await nursery.start(connector.run)
            await until(lambda: len(connector.connections) == 4)
            yield connector
            nursery.cancel_scope.cancel()
        served.close()


async def until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110 # there is no event for what others do
        await trio.sleep(0.02)


@pytest.fixture(params=[(Transport.HTTP2,), (Transport.QUIC,)], ids=["http2", "quic"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    return Place(tmp_path, request.param)


async def picked(edge: Edge, place: Place) -> TunnelConnection:
    await edge.registry.wait_usable(place.credentials.tunnel_id)
    connection = edge.registry.pick(place.credentials.tunnel_id)
    assert connection is not None
    return connection


def head(method: str = "GET", path: str = "/", **more: object) -> RequestHead:
    return RequestHead(method, "https", "app.example", path, **{"headers": (), **more})  # type: ignore[arg-type]


async def ask(connection: TunnelConnection, request: RequestHead) -> tuple[int, bytes]:
    async with await connection.request(request) as exchange:
        response = await exchange.response()
        body = b""
        while data := await exchange.receive():
            body += data
        return response.status, body


async def test_answers_and_reports(place: Place) -> None:
    """Requests go to the ingress rule's service, and the edge learns the configuration."""
    with trio.fail_after(SECONDS):
        async with place.edge() as edge, place.connector(edge, service="hello_world") as connector:
            assert [c.index for c in connector.connections] == [0, 1, 2, 3]
            status, body = await ask(await picked(edge, place), head())
            assert (status, b"It works" in body) == (200, True)
            reported = {c.index: c.local_configuration for c in edge.registry.connections()}
            assert b"hello_world" in reported[0]
            assert not reported[1]


async def test_small_bodies_arrive(place: Place) -> None:
    """A body that comes together with its head, as small ones do, reaches the origin."""
    async with echo_origin() as port:
        with trio.fail_after(SECONDS):
            async with place.edge() as edge, place.connector(edge, service=f"http://{port}"):
                headers = ((b"content-length", b"5"),)
                for _ in range(20):
                    connection = await picked(edge, place)
                    request = head("POST", headers=headers, has_body=True)
                    async with await connection.request(request) as exchange:
                        await exchange.send(b"hello")
                        await exchange.send_end()
                        assert (await exchange.response()).status == 200
                        assert await exchange.receive() == b"hello"


@pytest.mark.parametrize("is_open", [True, False])
async def test_private_connections_need_leave(place: Place, is_open: bool) -> None:
    """The edge can have the connector connect to an address only where that is allowed."""
    async with slow_origin() as port:
        with trio.fail_after(SECONDS):
            async with place.edge() as edge, place.connector(edge, is_private_open=is_open):
                connection = await picked(edge, place)
                async with await connection.connect_tcp(port, "test") as exchange:
                    response = await exchange.response()
                    assert response.status == (200 if is_open else 502)
                    assert response.is_from_connector is not is_open


@pytest.mark.slow
async def test_quic_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where UDP is blocked all connections run over HTTP/2 within seconds; when it heals all are
    back on QUIC within half a minute."""
    is_blocked = True

    async def serve(*arguments: Any, task_status: trio.TaskStatus[Any]) -> None:
        if is_blocked:
            await trio.sleep(1.5)
            raise DialFailedError("nothing comes back")
        await serve_quic(*arguments, task_status=task_status)

    monkeypatch.setitem(connector_module._SERVERS, Transport.QUIC, serve)
    place = Place(tmp_path, (Transport.QUIC, Transport.HTTP2))
    async with place.edge() as edge:
        with trio.fail_after(40):
            async with place.connector(edge) as connector:
                assert {c.transport for c in connector.connections} == {Transport.HTTP2}
                is_blocked = False
                with trio.fail_after(30):
                    await until(
                        lambda: [c.transport for c in connector.connections] == [Transport.QUIC] * 4
                    )
                assert (await ask(await picked(edge, place), head()))[0] == 204


async def test_planned_restart_loses_nothing(place: Place) -> None:
    """The connections of an edge that drains are replaced at the other one while a long response
    still comes over the old."""
    async with slow_origin() as port:
        with trio.fail_after(SECONDS):
            async with (
                place.edge() as first,
                place.edge() as second,
                place.connector(first, second, service=f"http://{port}") as connector,
            ):
                assert {c.address.port for c in connector.connections} == {
                    edge.addresses[0][1] for edge in (first, second)
                }
                connection = await picked(first, place)
                async with await connection.request(head()) as exchange:
                    assert (await exchange.response()).status == 200
                    async with trio.open_nursery() as nursery:
                        nursery.start_soon(first.drain, 10.0)
                        with trio.fail_after(2):
                            await until(lambda: len(list(second.registry.connections())) == 4)
                        received = b""
                        while data := await exchange.receive():
                            received += data
                        assert received == b"x" * 5000
                        nursery.cancel_scope.cancel()


async def test_killed_edge_is_left_and_comes_back(place: Place) -> None:
    """One of two edges dies without a word: all connections serve at the other within seconds, and
    when it is back it gets its share."""
    with trio.fail_after(40):
        async with place.edge() as stays, trio.open_nursery() as nursery:
            killed = trio.CancelScope()

            async def run(*, task_status: trio.TaskStatus[Edge]) -> None:
                with killed:
                    async with place.edge() as edge:
                        task_status.started(edge)
                        await trio.sleep_forever()

            dies = await nursery.start(run)
            async with place.connector(stays, dies):
                killed.cancel()
                await until(lambda: len(list(stays.registry.connections())) == 4)
                async with place.edge(dies.addresses[0][1]) as back:
                    assert (await ask(await picked(back, place), head()))[0] == 204


async def test_edge_that_closes_at_once_is_not_hammered(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A connection that is closed right after its registration is not made again without a wait."""

    def add(connection: TunnelConnection) -> None:
        connection.close("a test")

    async with place.edge() as edge:
        monkeypatch.setattr(edge.registry, "add", add)
        with trio.fail_after(SECONDS):
            connector_options = ConnectorOptions(
                place.credentials,
                EdgePlaces((edge.addresses[0],)),
                DialOptions(ca_file=str(authority_path(place.directory))),
                place.transports,
                connections=1,
            )
            service = OriginService(Configuration((IngressRule("http_status:204"),)))
            connector = Connector(
                connector_options, service, entropy=os.urandom, rng=random.Random(1)
            )
            with trio.move_on_after(3):
                await connector.run()
            assert 1 <= connector.registrations + connector.failures <= 8


@asynccontextmanager
async def _serve(handle: Callable[[trio.SocketStream], Awaitable[None]]) -> AsyncIterator[str]:
    async with trio.open_nursery() as nursery:

        async def serve(stream: trio.SocketStream) -> None:
            try:
                await handle(stream)
            except trio.BrokenResourceError:
                pass

        listeners = await nursery.start(
            functools.partial(trio.serve_tcp, serve, 0, host="127.0.0.1")
        )
        yield f"127.0.0.1:{listeners[0].socket.getsockname()[1]}"
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def slow_origin() -> AsyncIterator[str]:
    """Sends 5000 bytes in a second and a half."""

    async def handle(stream: trio.SocketStream) -> None:
        await stream.receive_some()
        await stream.send_all(b"HTTP/1.1 200 OK\r\nContent-Length: 5000\r\n\r\n")
        for _ in range(5):
            await stream.send_all(b"x" * 1000)
            await trio.sleep(0.3)

    async with _serve(handle) as place:
        yield place


@asynccontextmanager
async def echo_origin() -> AsyncIterator[str]:
    """Returns the five bytes of a request's body."""

    async def handle(stream: trio.SocketStream) -> None:
        request = b""
        while not request.endswith(b"\r\n\r\nhello"):
            request += (data := await stream.receive_some())
            if not data:
                return
        await stream.send_all(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n")
        await stream.send_all(b"Connection: close\r\n\r\nhello")

    async with _serve(handle) as place:
        yield place
