"""Who may serve a tunnel: decides on registrations, for both transports.

What an answer does to the reference connector (edge tunnel specification 6.6) was seen in runs with
it. Over QUIC it tries again whatever it is told. Over HTTP/2, on its first connection, every error
makes the program exit, and so does a connection that is closed without an answer; only `EDUPCONN`
makes it try again, at another address. So wrong credentials get an error of their own, and
everything that may pass by itself gets `EDUPCONN`. Duplicates need no answer: the same connector
may have all its connections here.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, TypeAlias
from uuid import UUID

import trio

from relay.edge.connection import ConnectionFailedError, TunnelConnection
from relay.edge.peer_channel import PeerChannels
from relay.edge.registry import Registry, Tunnel
from relay.limits import ConnectionCounter
from relay.refusals import Refusals
from traversal.wire.tunnel.registration import (
    DUPLICATE_CONNECTION,
    ConnectionDetails,
    ConnectionRefusal,
    RegisterConnection,
)

CONNECTIONS: Final = 20_000
"""Registered ones, all tunnels together; one that is idle costs some 100 KiB."""
UNREGISTERED: Final = 2_000
UNREGISTERED_PER_SOURCE: Final = 100
"""Connections that have not registered yet, for which a connector takes a second and a stranger
may take ten; each costs as much as a registered one."""
PUSH_SECONDS: Final = 10.0
PUSH_AGAIN_SECONDS: Final = 30.0


class EdgeStage(enum.StrEnum):
    """Where a connector was turned away."""

    LIMITS = "limits"
    TLS = "tls"
    PROTOCOL = "protocol"
    REGISTRATION = "registration"


@dataclass(frozen=True, slots=True)
class Accepted:
    """Answer with these details, then add the connection to the registry."""

    tunnel: Tunnel
    details: ConnectionDetails


@dataclass(frozen=True, slots=True)
class Refused:
    """Answer so, then close the connection. `reason` is for our log."""

    refusal: ConnectionRefusal
    reason: str


Decision: TypeAlias = Accepted | Refused


def _put_off(reason: str) -> Refused:
    """Have the connector try again, elsewhere if it can."""
    return Refused(ConnectionRefusal(DUPLICATE_CONNECTION, should_retry=True), reason)


class Registrar:
    """Decides on registrations, and keeps connectors configured.

    Attributes:
        location: what connectors show in their logs as the place that they are connected to.
        drain_seconds: how long a connection that leaves may take to finish what is under way.
        peers: serves connections that carry peers' packets.
        is_draining: the edge is about to stop; nobody new is taken.
        unregistered: counts connections on their way to a registration.
    """

    def __init__(
        self,
        registry: Registry,
        refusals: Refusals[EdgeStage],
        *,
        location: str,
        drain_seconds: float,
        new_id: Callable[[], UUID],
        peers: PeerChannels,
    ) -> None:
        self.registry = registry
        self.refusals = refusals
        self.location = location
        self.drain_seconds = drain_seconds
        self.peers = peers
        self.is_draining = False
        self.unregistered = ConnectionCounter(UNREGISTERED, UNREGISTERED_PER_SOURCE)
        self.accepted = 0
        self._new_id = new_id

    def decide(self, request: RegisterConnection) -> Decision:
        """What to do about a registration."""
        if self.is_draining:
            return _put_off("the edge is about to stop")
        tunnel = self.registry.authenticate(request)
        if tunnel is None:
            return Refused(
                ConnectionRefusal("the edge does not know this tunnel, or not with this secret"),
                f"wrong credentials for tunnel {request.tunnel_id}",
            )
        if not self.registry.has_room(request):
            return _put_off(f"tunnel {tunnel.name} has as many connections as one may have")
        if sum(1 for _ in self.registry.connections()) >= CONNECTIONS:
            return _put_off(f"the edge has {CONNECTIONS} connections")
        self.accepted += 1
        return Accepted(
            tunnel,
            ConnectionDetails(
                self._new_id(), self.location, is_remotely_managed=tunnel.configuration is not None
            ),
        )

    def refuse(self, stage: EdgeStage, source: str, reason: str) -> None:
        """Count and log a connection that was turned away."""
        self.refusals.note(stage, source, reason, trio.current_time())

    async def keep_configured(self, connection: TunnelConnection) -> None:
        """Push the tunnel's remote configuration, now and whenever it changes.

        For connectors that were told that they are remotely managed. Returns when the connection or
        the tunnel is gone.
        """
        version = -1
        while True:
            configuration = await self.registry.wait_configuration(connection.tunnel_id, version)
            if configuration is None:
                return
            try:
                with trio.fail_after(PUSH_SECONDS):
                    applied = await connection.push_configuration(
                        configuration.version, configuration.document
                    )
            except (ConnectionFailedError, trio.TooSlowError) as error:
                self.refuse(
                    EdgeStage.PROTOCOL,
                    connection.source,
                    f"{connection} did not take its configuration: {str(error) or 'no answer'}",
                )
                if not connection.is_usable:
                    return
                await trio.sleep(PUSH_AGAIN_SECONDS)
                continue
            # A connector that has a newer one (of another edge) says so and keeps it.
            version = max(applied, configuration.version)
