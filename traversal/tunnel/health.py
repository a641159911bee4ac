"""The connector's own HTTP listener: /ready, /healthcheck, /metrics, /config (edge tunnel
specification 14.1). Names of metrics are cloudflared's where the meaning is."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from typing import Final

import h11
import trio
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from traversal.tunnel.connector import Connector
from traversal.tunnel.origin_service import OriginService

REQUEST_SECONDS: Final = 10.0
MAX_CLIENTS: Final = 32
_TEXT: Final = "text/plain; charset=utf-8"
_JSON: Final = "application/json"
_PATHS: Final = "/ready, /healthcheck, /metrics, /config"


async def serve_health(
    place: tuple[str, int],
    connector: Connector,
    service: OriginService,
    *,
    task_status: trio.TaskStatus[int] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve until cancelled; starts with the port. Raises OSError when it can't be listened on."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Metrics(connector, service))
    slots = trio.CapacityLimiter(MAX_CLIENTS)

    async def handle(stream: trio.SocketStream) -> None:
        async with stream, slots:
            with trio.move_on_after(REQUEST_SECONDS):
                await _answer(stream, connector, service, registry)

    listeners = await trio.open_tcp_listeners(place[1], host=place[0])
    task_status.started(listeners[0].socket.getsockname()[1])
    await trio.serve_listeners(handle, listeners)


async def _answer(
    stream: trio.SocketStream,
    connector: Connector,
    service: OriginService,
    registry: CollectorRegistry,
) -> None:
    connection = h11.Connection(h11.SERVER)
    try:
        while not isinstance(event := connection.next_event(), h11.Request):
            if event is not h11.NEED_DATA:
                return
            connection.receive_data(await stream.receive_some(4096))
        path = event.target.partition(b"?")[0].decode("latin-1")
        status, kind, body = _respond(path, connector, service, registry)
        headers = [("content-type", kind), ("content-length", str(len(body)))]
        head = h11.Response(status_code=status, headers=[*headers, ("connection", "close")])
        data = connection.send(head) or b""
        data += connection.send(h11.Data(data=b"" if event.method == b"HEAD" else body)) or b""
        await stream.send_all(data)
    except (h11.RemoteProtocolError, h11.LocalProtocolError, trio.BrokenResourceError):
        return


def _respond(
    path: str, connector: Connector, service: OriginService, registry: CollectorRegistry
) -> tuple[int, str, bytes]:
    if path == "/ready":
        count = len(connector.connections)
        status = 200 if count else 503
        answer = {
            "status": status,
            "readyConnections": count,
            "connectorId": str(connector.connector_id),
        }
        return status, _JSON, json.dumps(answer).encode()
    if path == "/healthcheck":
        return 200, _TEXT, b"OK\n"
    if path == "/metrics":
        return 200, "text/plain; version=0.0.4; charset=utf-8", generate_latest(registry)
    if path == "/config":
        document = b'{"version":%d,"config":%b}'
        return 200, _JSON, document % (service.version, service.configuration.encode())
    return 404, _TEXT, f"There are {_PATHS}.\n".encode()


class _Metrics(Collector):
    """Read from snapshots when they are asked for."""

    def __init__(self, connector: Connector, service: OriginService) -> None:
        self._connector = connector
        self._service = service

    def collect(self) -> Iterator[Metric]:
        """All metrics."""
        connector, statistics = self._connector, self._service.statistics()
        connections = connector.connections
        yield GaugeMetricFamily(
            "cloudflared_tunnel_ha_connections", "Connections to the edge", len(connections)
        )
        transports = GaugeMetricFamily(
            "underpass_tunnel_connections", "Connections by transport", labels=["transport"]
        )
        for transport, count in Counter(c.transport.value for c in connections).items():
            transports.add_metric([transport], count)
        yield transports
        places = GaugeMetricFamily(
            "cloudflared_tunnel_server_locations",
            "Where each connection is",
            labels=["connection_id", "edge_location"],
        )
        for connection in connections:
            places.add_metric([str(connection.index), connection.details.location], 1)
        yield places
        yield CounterMetricFamily(
            "cloudflared_tunnel_tunnel_register_success",
            "Registered connections",
            connector.registrations,
        )
        yield CounterMetricFamily(
            "cloudflared_tunnel_tunnel_register_fail",
            "Attempts to connect that came to nothing",
            connector.failures,
        )
        yield CounterMetricFamily(
            "cloudflared_tunnel_total_requests", "Requests", statistics.requests
        )
        yield CounterMetricFamily(
            "cloudflared_tunnel_request_errors", "Requests without an origin", statistics.errors
        )
        yield GaugeMetricFamily(
            "cloudflared_tunnel_concurrent_requests_per_tunnel",
            "Requests under way",
            statistics.active,
        )
        codes = CounterMetricFamily(
            "cloudflared_tunnel_response_by_code", "Responses", labels=["status_code"]
        )
        for status, count in sorted(statistics.by_status.items()):
            codes.add_metric([str(status)], count)
        yield codes
        yield CounterMetricFamily(
            "cloudflared_tcp_total_sessions", "TCP sessions", statistics.tcp_sessions
        )
        yield GaugeMetricFamily(
            "cloudflared_orchestration_config_version",
            "Version of the configuration in use; -1 for the local one",
            self._service.version,
        )
