"""A whole connector: its service, its connections, its health listener."""

from __future__ import annotations

import os
import random
from collections.abc import Awaitable, Callable

import trio

from traversal.tunnel.connector import Connector, ConnectorError, ConnectorOptions
from traversal.tunnel.edge_connection import DialOptions
from traversal.tunnel.health import serve_health
from traversal.tunnel.origin_service import OriginService
from traversal.tunnel.settings import TunnelSettings
from traversal.tunnel.udp_flows import UdpFlows


async def run_tunnel(
    settings: TunnelSettings,
    *,
    stop: Callable[[], Awaitable[None]] = trio.sleep_forever,
    task_status: trio.TaskStatus[Connector] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve a tunnel until `stop` returns; then finish what is under way.

    Starts when the first connection is registered. Raises ConnectorError.
    """
    is_private_open = settings.is_private_open
    service = OriginService(
        settings.configuration,
        UdpFlows() if is_private_open else None,
        is_private_open=is_private_open,
    )
    connector = Connector(
        ConnectorOptions(
            settings.credentials,
            settings.places,
            DialOptions(ca_file=settings.ca_file),
            settings.transports,
            settings.connections,
            settings.grace_seconds,
            report=lambda: service.configuration.encode_report({}),
        ),
        service,
        entropy=os.urandom,
        rng=random.Random(),
    )
    failure: ConnectorError | None = None
    try:
        async with trio.open_nursery() as nursery:

            async def stop_when_told() -> None:
                await stop()
                connector.stop()

            async def tell_start() -> None:
                await connector.registered.wait()
                task_status.started(connector)

            if service.udp is not None:
                nursery.start_soon(service.udp.run)
            nursery.start_soon(stop_when_told)
            nursery.start_soon(tell_start)
            try:
                await _listen(nursery, settings, connector, service)
                await connector.run()
            except ConnectorError as error:
                failure = error
            nursery.cancel_scope.cancel()
    finally:
        service.close()
    if failure is not None:
        raise failure


async def _listen(
    nursery: trio.Nursery, settings: TunnelSettings, connector: Connector, service: OriginService
) -> None:
    """Raises ConnectorError."""
    if settings.health is None:
        return
    host, port = settings.health
    try:
        await nursery.start(serve_health, settings.health, connector, service)
    except OSError as error:
        raise ConnectorError(
            f"health: {host}:{port}: {error.strerror or error}; choose an address of this machine "
            "and a port that no other program holds"
        ) from None
