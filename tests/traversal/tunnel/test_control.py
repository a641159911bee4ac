"""The connector's control stream against the edge's, and against the specification's bytes."""

from __future__ import annotations

from pathlib import Path
from uuid import UUID

import pytest

from relay.edge import control as edge
from traversal.tunnel import control
from traversal.wire.tunnel import rpc
from traversal.wire.tunnel.errors import TunnelError
from traversal.wire.tunnel.registration import (
    ConnectionDetails,
    ConnectionOptions,
    ConnectionRefusal,
    RegisterConnection,
)

VECTORS = Path(__file__).parent.parent / "wire" / "vectors" / "tunnel.txt"
REQUEST = RegisterConnection("tag", b"s" * 32, UUID(int=1), 0, ConnectionOptions(UUID(int=2)))
DETAILS = ConnectionDetails(UUID(int=3), "LAB01")


def vector(name: str) -> bytes:
    lines = VECTORS.read_text().splitlines()
    return next(bytes.fromhex(li.partition("=")[2]) for li in lines if li.startswith(name + " ="))


def exchange(client: control.ControlClient, server: edge.ControlServer):
    """One flight there and one back: what each side noticed."""
    there = server.receive(client.data_to_send())
    return there, client.receive(server.data_to_send())


def register() -> tuple[control.ControlClient, edge.ControlServer]:
    client, server = control.ControlClient(REQUEST), edge.ControlServer(0.0)
    (asked,) = server.receive(client.data_to_send())
    assert asked == edge.RegistrationRequested(REQUEST)
    server.answer(DETAILS)
    assert client.receive(server.data_to_send()) == [control.Registered(DETAILS)]
    return client, server


def test_a_connections_life() -> None:
    """Register, report, leave: each step is seen by the other side and answered."""
    client, server = register()
    client.report_configuration(b"{}")
    there, back = exchange(client, server)
    assert there == [edge.LocalConfigurationReported(b"{}")]
    assert back == []
    client.unregister()
    there, back = exchange(client, server)
    assert there == [edge.UnregisterRequested()]
    assert back == [control.Unregistered()]
    client.end()
    assert server.receive(client.data_to_send()) == [edge.ControlEnded()]


def test_the_specifications_answers() -> None:
    """The reference's bytes of a registration's answers are understood, and finished in its
    words."""
    client = control.ControlClient(REQUEST)
    assert client.data_to_send().startswith(vector("bootstrap"))
    assert client.receive(vector("bootstrap.return")) == []
    (event,) = client.receive(vector("register.return"))
    details = ConnectionDetails(UUID("95dd153b-16f4-4914-bd80-080ce6a17422"), "LAB01")
    assert event == control.Registered(details)
    assert client.data_to_send().endswith(vector("finish"))


def test_refusal() -> None:
    """A refusal comes with its cause."""
    client, server = control.ControlClient(REQUEST), edge.ControlServer(0.0)
    server.receive(client.data_to_send())
    refusal = ConnectionRefusal("Unauthorized: no such tunnel", should_retry=True)
    server.answer(refusal)
    assert client.receive(server.data_to_send()) == [control.Refused(refusal)]


def test_a_report_may_fail() -> None:
    """An edge that knows no configurations serves all the same."""
    client, _ = register()
    client.data_to_send()
    client.report_configuration(b"{}")
    client.data_to_send()
    answer = rpc.Return(0, rpc.RpcException("unknown method")).encode()
    assert client.receive(answer) == [control.ReportFailed("unknown method")]


def test_the_end() -> None:
    """The stream's end is an error, since the edge has no reason to end it."""
    client, _ = register()
    with pytest.raises(TunnelError):
        client.receive(b"")
