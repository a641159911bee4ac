"""An edge and a connector of ours in one process, on loopback, for tests of the whole way."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import trio
import trustme

from relay.config import Config
from relay.edge.certificates import authority_path
from relay.edge.service import Edge
from relay.listeners import open_listeners
from traversal.tunnel.connector import Connector, ConnectorOptions
from traversal.tunnel.discovery import EdgePlaces
from traversal.tunnel.edge_connection import DialOptions
from traversal.tunnel.origin_service import OriginService
from traversal.tunnel.transport_choice import Transport
from traversal.wire.tunnel.credentials import Credentials

HOST = "app.example.com"


def edge_config(
    directory: Path, port: int = 0, visitors: int = 0, quick_domain: str = ""
) -> Config:
    routes = directory / "routes.toml"
    routes.write_text(f'[[http]]\nhost = "{HOST}"\ntunnel = "web"\n')
    return Config.dev(
        {
            "edge.listen": f"127.0.0.1:{port}",
            "edge.directory": str(directory),
            "edge.public.http": f"127.0.0.1:{visitors}",
            "edge.public.routes_file": str(routes),
            "server.drain_seconds": 5.0,
            **({"edge.quick.domain": quick_domain} if quick_domain else {}),
        }
    )


@dataclass
class RunningEdge:
    """An edge, and how to end it."""

    edge: Edge
    scope: trio.CancelScope

    @property
    def address(self) -> tuple[str, int]:
        host, port = self.edge.addresses[0]
        return host, port

    @property
    def visitors(self) -> int:
        return self.edge.public.http[0][1]


async def run_edge(
    config: Config, *, task_status: trio.TaskStatus[RunningEdge] = trio.TASK_STATUS_IGNORED
) -> None:
    with trio.CancelScope() as scope:
        listeners = open_listeners(config.edge.listen[0])
        try:
            edge = Edge(config, listeners)
            async with trio.open_nursery() as nursery:
                await nursery.start(edge.run)
                task_status.started(RunningEdge(edge, scope))
        finally:
            for listener in listeners:
                listener.close()


def make_connector(
    edges: Sequence[RunningEdge],
    credentials: Credentials,
    service: OriginService,
    directory: Path,
    transports: tuple[Transport, ...] = (Transport.QUIC, Transport.HTTP2),
    connections: int = 4,
) -> Connector:
    return Connector(
        ConnectorOptions(
            credentials,
            EdgePlaces(tuple(edge.address for edge in edges)),
            DialOptions(ca_file=str(authority_path(directory))),
            transports,
            connections=connections,
            grace_seconds=5,
        ),
        service,
        entropy=os.urandom,
        rng=random.Random(1),
    )


async def until(condition: Callable[[], bool], seconds: float = 20) -> None:
    with trio.fail_after(seconds):
        while not condition():  # noqa: ASYNC110 # there is no event for what others do
            await trio.sleep(0.02)


def visitor_certificates(directory: Path) -> tuple[trustme.CA, Path]:
    """An authority that visitors trust, and a directory with its certificate for *.example.com."""
    authority = trustme.CA()
    leaf = authority.issue_cert("*.example.com")
    certificates = directory / "public"
    certificates.mkdir()
    leaf.private_key_pem.write_to_path(str(certificates / "wildcard.key"))
    for number, blob in enumerate(leaf.cert_chain_pems):
        blob.write_to_path(str(certificates / "wildcard.crt"), append=number > 0)
    return authority, certificates
