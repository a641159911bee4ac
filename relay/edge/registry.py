"""Which tunnels there are, and which connections serve them.

A tunnel has any number of connectors, each of them several connections. All serve alike: a request
goes to the usable connection with the fewest under way, in turns where they are equal.
"""

from __future__ import annotations

import hmac
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Final
from uuid import UUID

import trio

from relay.edge.connection import TunnelConnection
from traversal.wire.tunnel.credentials import Credentials
from traversal.wire.tunnel.registration import RegisterConnection

CONNECTIONS_PER_TUNNEL: Final = 256
"""64 connectors with the usual four connections: more are a fault in somebody's automation."""

_NO_SECRET: Final = bytes(32)


@dataclass(frozen=True, slots=True)
class RemoteConfiguration:
    """What a tunnel's connectors are to use, instead of a configuration of their own.

    Attributes:
        version: higher than any that a connector has; connectors ignore lower ones.
        document: JSON (edge tunnel specification 12.2).
    """

    version: int
    document: bytes


@dataclass(frozen=True, slots=True)
class Tunnel:
    """A tunnel as the operator made it; `name` is for people and for routes."""

    name: str
    credentials: Credentials
    configuration: RemoteConfiguration | None = None

    @property
    def id(self) -> UUID:
        """The tunnel's id, unique over all edges."""
        return self.credentials.tunnel_id


@dataclass(slots=True)
class _Served:
    """A tunnel and its connections, by connector and index."""

    tunnel: Tunnel
    connections: dict[tuple[UUID, int], TunnelConnection] = field(default_factory=dict)
    is_usable: trio.lowlevel.ParkingLot = field(default_factory=trio.lowlevel.ParkingLot)
    is_changed: trio.lowlevel.ParkingLot = field(default_factory=trio.lowlevel.ParkingLot)


class Registry:
    """The edge's tunnels and connections. Nothing here waits, but for the `wait_` methods."""

    def __init__(self) -> None:
        self._tunnels: dict[UUID, _Served] = {}
        self._turn = 0
        self._last_turn: dict[TunnelConnection, int] = {}
        self._is_empty = trio.lowlevel.ParkingLot()

    # ---- tunnels

    def add_tunnel(self, tunnel: Tunnel) -> None:
        """Serve a tunnel, or go over to its new credentials, name and configuration.

        Connections that registered with other credentials are closed.
        """
        served = self._tunnels.get(tunnel.id)
        if served is None:
            self._tunnels[tunnel.id] = _Served(tunnel)
            return
        is_revoked = served.tunnel.credentials != tunnel.credentials
        served.tunnel = tunnel
        served.is_changed.unpark_all()
        if is_revoked:
            for connection in list(served.connections.values()):
                connection.close("the tunnel has new credentials")

    def remove_tunnel(self, tunnel_id: UUID) -> None:
        """Serve it no longer; its connections are closed."""
        served = self._tunnels.pop(tunnel_id, None)
        if served is None:
            return
        for connection in list(served.connections.values()):
            self._last_turn.pop(connection, None)
            connection.close("the tunnel was removed")
        served.is_usable.unpark_all()
        served.is_changed.unpark_all()

    def tunnel(self, tunnel_id: UUID) -> Tunnel | None:
        """The tunnel, if it is served here."""
        served = self._tunnels.get(tunnel_id)
        return None if served is None else served.tunnel

    def tunnels(self) -> list[Tunnel]:
        """All that are served here."""
        return [served.tunnel for served in self._tunnels.values()]

    def authenticate(self, request: RegisterConnection) -> Tunnel | None:
        """The tunnel that a registration is for, if it has its credentials.

        Takes as long whether the tunnel exists or not, and wherever the secrets differ.
        """
        tunnel = self.tunnel(request.tunnel_id)
        secret = _NO_SECRET if tunnel is None else tunnel.credentials.secret
        account = "" if tunnel is None else tunnel.credentials.account_tag
        is_right = hmac.compare_digest(secret, request.tunnel_secret)
        is_right &= hmac.compare_digest(account.encode(), request.account_tag.encode())
        return tunnel if is_right else None

    # ---- connections

    def has_room(self, request: RegisterConnection) -> bool:
        """Whether the tunnel may have this connection, too."""
        served = self._tunnels.get(request.tunnel_id)
        if served is None:
            return False
        is_known = (request.options.client_id, request.connection_index) in served.connections
        return is_known or len(served.connections) < CONNECTIONS_PER_TUNNEL

    def add(self, connection: TunnelConnection) -> None:
        """Give it requests from now on. An older one of the same connector and index is drained:
        the connector has given it up, or will when it notices."""
        served = self._tunnels[connection.tunnel_id]
        key = connection.connector_id, connection.index
        replaced = served.connections.get(key)
        served.connections[key] = connection
        self._last_turn[connection] = self._turn
        if replaced is not None:
            self._last_turn.pop(replaced, None)
            replaced.drain("the connector registered the same connection again")
        served.is_usable.unpark_all()

    def remove(self, connection: TunnelConnection) -> None:
        """Forget it; harmless when repeated or replaced."""
        self._last_turn.pop(connection, None)
        served = self._tunnels.get(connection.tunnel_id)
        key = connection.connector_id, connection.index
        if served is not None and served.connections.get(key) is connection:
            del served.connections[key]
        if not any(served.connections for served in self._tunnels.values()):
            self._is_empty.unpark_all()

    def connections(self, tunnel_id: UUID | None = None) -> Iterator[TunnelConnection]:
        """Those of a tunnel, or all."""
        for identity, served in self._tunnels.items():
            if tunnel_id is None or tunnel_id == identity:
                yield from list(served.connections.values())

    def pick(
        self,
        tunnel_id: UUID,
        exclude: Collection[TunnelConnection] = (),
        *,
        needs_udp: bool = False,
    ) -> TunnelConnection | None:
        """The connection to give the next request to; None if there is none."""
        served = self._tunnels.get(tunnel_id)
        if served is None:
            return None
        last_turn = self._last_turn
        best = min(
            (
                connection
                for connection in served.connections.values()
                if connection.is_usable
                and connection.serves_requests
                and connection not in exclude
                and (connection.supports_udp or not needs_udp)
            ),
            key=lambda connection: (connection.active, last_turn[connection]),
            default=None,
        )
        if best is not None:
            self._turn += 1
            last_turn[best] = self._turn
        return best

    async def wait_usable(self, tunnel_id: UUID) -> None:
        """Return when the tunnel has a usable connection, or is not served here."""
        await trio.lowlevel.checkpoint_if_cancelled()
        while (served := self._tunnels.get(tunnel_id)) is not None:
            if any(c.is_usable and c.serves_requests for c in served.connections.values()):
                return
            await served.is_usable.park()

    async def wait_empty(self) -> None:
        """Return when no tunnel has a connection."""
        await trio.lowlevel.checkpoint_if_cancelled()
        while any(served.connections for served in self._tunnels.values()):
            await self._is_empty.park()

    async def wait_configuration(self, tunnel_id: UUID, version: int) -> RemoteConfiguration | None:
        """The tunnel's remote configuration as soon as it is newer; None if the tunnel is gone."""
        await trio.lowlevel.checkpoint_if_cancelled()
        while (served := self._tunnels.get(tunnel_id)) is not None:
            configuration = served.tunnel.configuration
            if configuration is not None and configuration.version > version:
                return configuration
            await served.is_changed.park()
        return None
