"""Our connector and our edge together, on loopback: visitor, edge, connector, origin."""

from __future__ import annotations

import os
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import h11
import pytest
import trio

from relay.edge.tunnel_files import create_tunnel
from tests.system.tunnel_world import (
    HOST,
    edge_config,
    make_connector,
    run_edge,
    until,
)
from traversal.tunnel import connector as connector_module
from traversal.tunnel.configuration_file import read_configuration
from traversal.tunnel.connector import ConnectorError
from traversal.tunnel.origin_service import OriginService
from traversal.tunnel.transport_choice import Transport
from traversal.tunnel.udp_flows import UdpFlows

REQUESTS = int(os.environ.get("UNDERPASS_TUNNEL_REQUESTS", "300"))
"""Of the test that kills edges: 10000 is the figure to be shown, this is what the suite runs."""


async def origin(stream: trio.SocketStream) -> None:
    """Echoes bodies, tells the path, keeps connections."""
    connection = h11.Connection(h11.SERVER)
    while True:
        body = b""
        path = ""
        while True:
            try:
                event = connection.next_event()
                if event is h11.NEED_DATA:
                    connection.receive_data(await stream.receive_some(65536))
                    continue
            except (trio.BrokenResourceError, h11.RemoteProtocolError):
                return
            if event is h11.PAUSED:
                return
            if isinstance(event, h11.Request):
                path = event.target.decode()
            elif isinstance(event, h11.Data):
                body += event.data
            elif isinstance(event, h11.EndOfMessage):
                break
            else:
                return
        answer = body or path.encode()
        head = h11.Response(status_code=200, headers=[("content-length", str(len(answer)))])
        await stream.send_all(
            (connection.send(head) or b"")
            + (connection.send(h11.Data(data=answer)) or b"")
            + (connection.send(h11.EndOfMessage()) or b"")
        )
        connection.start_next_cycle()


async def fetch(port: int, path: str, body: bytes = b"", host: str = HOST) -> tuple[int, bytes]:
    """One request on a connection of its own."""
    async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
        connection = h11.Connection(h11.CLIENT)
        headers = [("host", host), ("connection", "close")]
        if body:
            headers.append(("content-length", str(len(body))))
        method = "POST" if body else "GET"
        data = connection.send(h11.Request(method=method, target=path, headers=headers)) or b""
        data += (connection.send(h11.Data(data=body)) or b"") if body else b""
        data += connection.send(h11.EndOfMessage()) or b""

        status, answer = 0, b""

        async def read() -> None:
            nonlocal status, answer
            while True:
                event = connection.next_event()
                if event is h11.NEED_DATA:
                    connection.receive_data(await stream.receive_some(65536))
                elif isinstance(event, h11.Response):
                    status = event.status_code
                elif isinstance(event, h11.Data):
                    answer += event.data
                elif isinstance(event, h11.EndOfMessage):
                    return

        async with trio.open_nursery() as nursery:
            nursery.start_soon(stream.send_all, data)
            nursery.start_soon(read)
        return status, answer


@asynccontextmanager
async def origin_service() -> AsyncIterator[OriginService]:
    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(partial(trio.serve_tcp, origin, 0, host="127.0.0.1"))
        port = listeners[0].socket.getsockname()[1]
        configuration = read_configuration(
            {
                "ingress": [
                    {"hostname": HOST, "path": "^/hello", "service": "hello_world"},
                    {"hostname": HOST, "path": "^/dead", "service": "http://127.0.0.1:1"},
                    {"hostname": HOST, "service": f"http://127.0.0.1:{port}"},
                    {"service": "http_status:404"},
                ]
            }
        )
        service = OriginService(configuration, UdpFlows())
        try:
            yield service
        finally:
            service.close()
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("transport", list(Transport))
async def test_requests(tmp_path: Path, transport: Transport) -> None:
    """Requests reach the rule's service over either transport, large bodies whole; a connector that
    stops leaves at once when it is idle."""
    credentials = create_tunnel(str(tmp_path), "web", os.urandom).credentials
    async with origin_service() as service, trio.open_nursery() as nursery:
        edge = await nursery.start(run_edge, edge_config(tmp_path))
        connector = make_connector([edge], credentials, service, tmp_path, (transport,))
        ended = trio.Event()

        async def run(*, task_status: trio.TaskStatus[None]) -> None:
            await connector.run(task_status=task_status)
            ended.set()

        with trio.fail_after(30):
            await nursery.start(run)
            await until(lambda: len(connector.connections) == 4)
            assert {c.transport for c in connector.connections} == {transport}
            assert await fetch(edge.visitors, "/a?b=c") == (200, b"/a?b=c")
            body = os.urandom(3_000_000)
            assert await fetch(edge.visitors, "/", body) == (200, body)
            status, page = await fetch(edge.visitors, "/hello")
            assert (status, b"It works" in page) == (200, True)
            assert (await fetch(edge.visitors, "/dead"))[0] == 502
            assert service.statistics().errors == 1
            connector.stop()
            with trio.fail_after(3):
                await ended.wait()
            assert edge.edge.registry.pick(credentials.tunnel_id) is None
        nursery.cancel_scope.cancel()


async def test_wrong_secret(tmp_path: Path) -> None:
    """Credentials that the edge does not know end the connector, with what to look at."""
    create_tunnel(str(tmp_path), "web", os.urandom)
    wrong = create_tunnel(str(tmp_path / "other"), "web", os.urandom).credentials
    async with origin_service() as service, trio.open_nursery() as nursery:
        edge = await nursery.start(run_edge, edge_config(tmp_path))
        connector = make_connector([edge], wrong, service, tmp_path)
        with pytest.raises(ConnectorError, match="credentials"), trio.fail_after(20):
            await connector.run()
        nursery.cancel_scope.cancel()


async def test_pushed_configuration(tmp_path: Path) -> None:
    """A tunnel that the edge manages gets its rules from there."""
    credentials = create_tunnel(str(tmp_path), "web", os.urandom).credentials
    pushed = tmp_path / "tunnels" / "web.config.json"
    pushed.write_text('{"ingress":[{"service":"http_status:418"}]}')
    async with origin_service() as service, trio.open_nursery() as nursery:
        edge = await nursery.start(run_edge, edge_config(tmp_path))
        connector = make_connector([edge], credentials, service, tmp_path, connections=1)
        with trio.fail_after(20):
            await nursery.start(connector.run)
            await until(lambda: service.version >= 0)
            assert (await fetch(edge.visitors, "/"))[0] == 418
        nursery.cancel_scope.cancel()


class Visitors:
    """Sends idempotent requests one after another from several tasks, and keeps count."""

    def __init__(self, ports: Callable[[], int], wanted: int) -> None:
        self.done = 0
        self.failed: list[object] = []
        self._port = ports
        self._wanted = wanted
        self._sent = 0

    def has_done(self, count: int) -> bool:
        return self.done >= count

    async def run(self, parallel: int = 6) -> None:
        async with trio.open_nursery() as nursery:
            for _ in range(parallel):
                nursery.start_soon(self._visit)

    async def _visit(self) -> None:
        while self._sent < self._wanted:
            self._sent += 1
            path = f"/{self._sent}"
            try:
                answer = await fetch(self._port(), path)
            except (OSError, trio.BrokenResourceError, h11.RemoteProtocolError) as error:
                self.failed.append((path, error))
                continue
            if answer != (200, path.encode()):
                self.failed.append((path, answer))
            self.done += 1


async def test_connections_die_and_no_request_fails(tmp_path: Path) -> None:
    """While the connector's connections are cut one after the other, every idempotent request is
    answered: by another connection, or by the one that replaces it."""
    credentials = create_tunnel(str(tmp_path), "web", os.urandom).credentials
    async with origin_service() as service, trio.open_nursery() as nursery:
        edge = await nursery.start(run_edge, edge_config(tmp_path))
        connector = make_connector([edge], credentials, service, tmp_path)
        await nursery.start(connector.run)
        visitors = Visitors(lambda: edge.visitors, REQUESTS)

        async def cut() -> None:
            while True:
                if connector.connections:
                    connector.connections[0].close()
                following = visitors.done + 8
                await until(partial(visitors.has_done, following))

        with trio.fail_after(120 + REQUESTS / 5):
            async with trio.open_nursery() as inner:
                inner.start_soon(cut)
                await visitors.run()
                inner.cancel_scope.cancel()
        assert visitors.failed == []
        assert visitors.done == REQUESTS
        nursery.cancel_scope.cancel()


async def test_one_of_two_edges_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When one of two edges dies, the other has every connection within seconds, and when it comes
    back it gets its share again."""
    monkeypatch.setattr(connector_module, "BALANCE_SECONDS", 1.0)
    created = create_tunnel(str(tmp_path), "web", os.urandom).credentials
    async with origin_service() as service, trio.open_nursery() as nursery:
        one = await nursery.start(run_edge, edge_config(tmp_path))
        two = await nursery.start(run_edge, edge_config(tmp_path))
        connector = make_connector([one, two], created, service, tmp_path)
        await nursery.start(connector.run)

        def spread() -> list[int]:
            ports = [c.address.port for c in connector.connections]
            return [ports.count(edge.address[1]) for edge in (one, two)]

        await until(lambda: spread() == [2, 2])
        visitors = Visitors(lambda: two.visitors, REQUESTS)
        async with trio.open_nursery() as inner:
            inner.start_soon(visitors.run)
            await trio.sleep(0.3)
            one.scope.cancel()
        assert visitors.failed == []
        await until(lambda: spread() == [0, 4])
        one = await nursery.start(run_edge, edge_config(tmp_path, one.address[1]))
        await until(lambda: spread() == [2, 2], 60)
        assert (await fetch(one.visitors, "/again"))[0] == 200
        nursery.cancel_scope.cancel()


async def test_edge_restart(tmp_path: Path) -> None:
    """An edge that is killed and started again on the same ports has its connector back within
    seconds; requests that come meanwhile wait instead of failing."""
    credentials = create_tunnel(str(tmp_path), "web", os.urandom).credentials
    async with origin_service() as service, trio.open_nursery() as nursery:
        edge = await nursery.start(run_edge, edge_config(tmp_path))
        connector = make_connector([edge], credentials, service, tmp_path)
        await nursery.start(connector.run)
        await until(lambda: len(connector.connections) == 4)
        edge.scope.cancel()
        await until(lambda: not connector.connections)
        config = edge_config(tmp_path, edge.address[1], edge.visitors)
        again = await nursery.start(run_edge, config)
        with trio.fail_after(20):
            assert await fetch(again.visitors, "/waited") == (200, b"/waited")
        nursery.cancel_scope.cancel()


async def test_planned_restart_lets_requests_finish(tmp_path: Path) -> None:
    """An edge that drains lets a request under way finish; the connector is at the other edge
    before it is gone from this one."""
    credentials = create_tunnel(str(tmp_path), "web", os.urandom).credentials
    async with origin_service() as service, trio.open_nursery() as nursery:
        one = await nursery.start(run_edge, edge_config(tmp_path))
        two = await nursery.start(run_edge, edge_config(tmp_path))
        connector = make_connector([one, two], credentials, service, tmp_path)
        await nursery.start(connector.run)
        await until(lambda: len(connector.connections) == 4)
        body = os.urandom(4_000_000)
        answers = []

        async def upload() -> None:
            answers.append(await fetch(one.visitors, "/", body))

        async with trio.open_nursery() as inner:
            inner.start_soon(upload)
            await until(lambda: service.statistics().active == 1)
            inner.start_soon(one.edge.drain, 40)
            await until(lambda: {c.address.port for c in connector.connections} == {two.address[1]})
        assert answers == [(200, body)]
        nursery.cancel_scope.cancel()


async def test_a_visitor_who_has_connected_is_served_by_an_edge_that_stops(tmp_path: Path) -> None:
    """Also if the request comes a little later, and though its connection was not accepted yet when
    the edge was told to stop; the edge then waits for nothing else."""
    credentials = create_tunnel(str(tmp_path), "web", os.urandom).credentials
    async with origin_service() as service, trio.open_nursery() as nursery:
        edge = await nursery.start(run_edge, edge_config(tmp_path))
        connector = make_connector([edge], credentials, service, tmp_path)
        await nursery.start(connector.run)
        with socket.create_connection(("127.0.0.1", edge.visitors)) as visitor:
            drained = trio.Event()

            async def drain() -> None:
                await edge.edge.drain(15)
                drained.set()

            nursery.start_soon(drain)
            await trio.sleep(0.7)
            visitor.sendall(f"GET /late HTTP/1.1\r\nHost: {HOST}\r\n\r\n".encode())
            await drained.wait()
            visitor.settimeout(5)
            answer = await trio.to_thread.run_sync(visitor.recv, 4096)
        assert answer.startswith(b"HTTP/1.1 200 "), answer
        assert answer.endswith(b"/late")
        nursery.cancel_scope.cancel()
