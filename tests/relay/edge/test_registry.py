"""Which connection gets a request, and what replaces, revokes and removes connections."""

from __future__ import annotations

from typing import Literal
from uuid import UUID, uuid4

import trio

from relay.edge.connection import Exchange, RequestHead, TunnelConnection
from relay.edge.registration import Accepted, Refused
from relay.edge.registry import (
    CONNECTIONS_PER_TUNNEL,
    Registry,
    RemoteConfiguration,
    Tunnel,
)
from tests.relay.edge.fake_connector import CREDENTIALS, TUNNEL_ID, make_registrar
from traversal.wire.tunnel.credentials import Credentials
from traversal.wire.tunnel.registration import (
    DUPLICATE_CONNECTION,
    FEATURE_PEERS,
    ConnectionDetails,
    ConnectionOptions,
    RegisterConnection,
)

TUNNEL = Tunnel("web", CREDENTIALS)


def request(
    connector: int = 1,
    index: int = 0,
    credentials: Credentials = CREDENTIALS,
    features: tuple[str, ...] = (),
) -> RegisterConnection:
    return RegisterConnection(
        credentials.account_tag,
        credentials.secret,
        credentials.tunnel_id,
        index,
        ConnectionOptions(UUID(int=connector), features),
    )


class Subject(TunnelConnection):
    transport: Literal["http2", "quic"] = "http2"

    def __init__(self, connector: int = 1, index: int = 0, features: tuple[str, ...] = ()) -> None:
        details = ConnectionDetails(uuid4(), "lab01")
        super().__init__(request(connector, index, features=features), details, source="", now=0.0)
        self.usable = True
        self.said: list[str] = []

    @property
    def is_usable(self) -> bool:
        return self.usable

    @property
    def is_connected(self) -> bool:
        return self.usable

    def _close_transport(self, reason: str) -> None:
        raise NotImplementedError

    async def request(self, head: RequestHead) -> Exchange:
        raise NotImplementedError

    async def connect_tcp(self, destination: str, source: str) -> Exchange:
        raise NotImplementedError

    async def push_configuration(self, version: int, document: bytes) -> int:
        raise NotImplementedError

    def drain(self, reason: str) -> None:
        self.said.append("drain")
        self.usable = False

    def close(self, reason: str) -> None:
        self.said.append("close")
        self.usable = False


def filled(*connections: Subject) -> Registry:
    registry = Registry()
    registry.add_tunnel(TUNNEL)
    for connection in connections:
        registry.add(connection)
    return registry


def test_requests_are_spread() -> None:
    """Connections that are equally busy take turns; a busier one waits."""
    connections = [Subject(connector, index) for connector in (1, 2) for index in range(4)]
    registry = filled(*connections)
    assert {registry.pick(TUNNEL_ID) for _ in range(8)} == set(connections)
    connections[3].active = 5
    picked = [registry.pick(TUNNEL_ID) for _ in range(70)]
    assert connections[3] not in picked
    assert all(
        picked.count(connection) == 10 for connection in connections if not connection.active
    )


def test_failover() -> None:
    """What was tried already, what is leaving and what has another purpose is passed over."""
    good, tried, leaving = Subject(1), Subject(2), Subject(3)
    peers = Subject(4, features=(FEATURE_PEERS,))
    leaving.usable = False
    registry = filled(tried, leaving, peers, good)
    assert registry.pick(TUNNEL_ID, {tried}) is good
    assert registry.pick(TUNNEL_ID, {tried, good}) is None
    assert registry.pick(TUNNEL_ID, needs_udp=True) is None
    good.supports_udp = True
    assert registry.pick(TUNNEL_ID, needs_udp=True) is good
    assert registry.pick(uuid4()) is None


def test_the_same_connection_again() -> None:
    """A second registration with the same key takes over; the first one's end changes nothing."""
    old, new = Subject(1, 2), Subject(1, 2)
    registry = filled(old, new)
    assert old.said == ["drain"]
    registry.remove(old)
    assert list(registry.connections()) == [new]
    registry.remove(new)
    registry.remove(new)
    assert list(registry.connections()) == []


def test_revocation() -> None:
    """New credentials and removal close connections; a new name or configuration does not."""
    connection = Subject()
    registry = filled(connection)
    registry.add_tunnel(Tunnel("other", CREDENTIALS, RemoteConfiguration(1, b"{}")))
    assert connection.said == []
    renewed = Credentials(TUNNEL_ID, "account", b"T" * 32)
    registry.add_tunnel(Tunnel("other", renewed))
    assert connection.said == ["close"]
    registry.remove(connection)
    late = Subject()
    registry.add(late)
    registry.remove_tunnel(TUNNEL_ID)
    registry.remove_tunnel(TUNNEL_ID)
    assert late.said == ["close"]
    assert registry.pick(TUNNEL_ID) is None
    registry.remove(late)


def test_authentication() -> None:
    """Only the very credentials count, and an unknown tunnel is no easier than a wrong secret."""
    registry = filled()
    assert registry.authenticate(request()) is TUNNEL
    for wrong in (
        Credentials(TUNNEL_ID, "account", b"T" * 32),
        Credentials(TUNNEL_ID, "account", b"S" * 31),
        Credentials(TUNNEL_ID, "account", b""),
        Credentials(TUNNEL_ID, "other", b"S" * 32),
        Credentials(TUNNEL_ID, "\udcff".encode("utf-8", "replace").decode(), b"S" * 32),
        Credentials(uuid4(), "account", b"S" * 32),
        Credentials(uuid4(), "", bytes(32)),
    ):
        assert registry.authenticate(request(credentials=wrong)) is None


async def test_decisions() -> None:
    """Wrong credentials are refused for good; what may pass by itself is only put off."""
    registrar = make_registrar()
    accepted = registrar.decide(request())
    assert isinstance(accepted, Accepted)
    assert accepted.details.location == "lab01"
    assert not accepted.details.is_remotely_managed
    wrong = registrar.decide(request(credentials=Credentials(TUNNEL_ID, "account", b"x")))
    assert isinstance(wrong, Refused)
    assert not wrong.refusal.should_retry
    for connector in range(CONNECTIONS_PER_TUNNEL):
        registrar.registry.add(Subject(connector))
    full = registrar.decide(request(connector=9999))
    assert isinstance(full, Refused)
    assert full.refusal.cause == DUPLICATE_CONNECTION
    assert isinstance(registrar.decide(request(connector=7)), Accepted)  # replaces its old one
    registrar.is_draining = True
    stopping = registrar.decide(request())
    assert isinstance(stopping, Refused)
    assert stopping.refusal.cause == DUPLICATE_CONNECTION


async def test_waiting_for_a_connector(autojump_clock: trio.testing.MockClock) -> None:
    """Requests can wait for a connector that is about to come back."""
    registry = filled()

    async def come() -> None:
        await trio.sleep(3)
        registry.add(Subject())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(come)
        await registry.wait_usable(TUNNEL_ID)
    assert trio.current_time() == 3
    await registry.wait_usable(uuid4())


async def test_waiting_for_a_configuration(autojump_clock: trio.testing.MockClock) -> None:
    """Each newer version is seen once; the end of the tunnel ends the waiting."""
    registry = filled()
    first = RemoteConfiguration(5, b"{}")

    async def change() -> None:
        await trio.sleep(1)
        registry.add_tunnel(Tunnel("web", CREDENTIALS, first))
        await trio.sleep(1)
        registry.remove_tunnel(TUNNEL_ID)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(change)
        assert await registry.wait_configuration(TUNNEL_ID, -1) == first
        assert await registry.wait_configuration(TUNNEL_ID, 5) is None
    assert trio.current_time() == 2
