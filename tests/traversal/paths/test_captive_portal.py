"""Whom to ask for a captive portal and what the answers mean."""

from __future__ import annotations

from ipaddress import IPv4Address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from traversal.paths.captive_portal import (
    MAX_CHECKS,
    choose_servers,
    conclude,
    encode_check,
    is_portal,
)
from traversal.relay_map import Dial, Region, RelayMap, RelayNode

SERVER = IPv4Address("192.0.2.7")


def region(number: int, *, can_port_80: bool = True, has_literal: bool = True) -> Region:
    node = RelayNode(
        name=f"{number}a",
        region_id=number,
        host_name=f"r{number}.example",
        ipv4=IPv4Address(f"192.0.2.{number}") if has_literal else Dial.BY_NAME,
        can_port_80=can_port_80,
    )
    return Region(number, f"r{number}", f"Region {number}", (node,))


def test_choice_of_servers() -> None:
    """The preferred region comes first; names and nodes without plain HTTP are left out."""
    regions = [region(1), region(2, can_port_80=False), region(3, has_literal=False), region(4)]
    relay_map = RelayMap({r.region_id: r for r in regions})
    assert [str(a) for a in choose_servers(relay_map, 4)] == ["192.0.2.4", "192.0.2.1"]
    many = RelayMap({number: region(number) for number in range(1, 20)})
    assert len(choose_servers(many, 0)) == MAX_CHECKS


@pytest.mark.parametrize(
    ("head", "expected"),
    [
        (b"HTTP/1.1 204 No Content\r\nx-tailscale-response:response ts_192.0.2.7", False),
        (b"HTTP/1.1 204\r\nX-Tailscale-Response: response ts_192.0.2.7", False),
        (b"HTTP/1.1 204 No Content", True),
        (b"HTTP/1.1 204 No Content\r\nX-Tailscale-Response: response ts_192.0.2.8", True),
        (b"HTTP/1.0 302 Found\r\nLocation: http://login.example/", True),
        (b"HTTP/1.1 200 OK\r\nX-Tailscale-Response: response ts_192.0.2.7", True),
        (b"SSH-2.0-OpenSSH_9.2", None),
        (b"", None),
    ],
)
def test_answers(head: bytes, expected: bool | None) -> None:
    """Only a 204 with our challenge comes from the relay; what is no HTTP proves nothing."""
    assert is_portal(head, SERVER) is expected


@given(st.binary(max_size=200), st.sampled_from([b"", b"HTTP/1.1 204 \r\n"]))
def test_never_raises(garbage: bytes, prefix: bytes) -> None:
    """Whatever a portal sends is judged, and nothing it could guess passes for the relay."""
    assert is_portal(prefix + garbage, SERVER) is not False


def test_request_and_conclusion() -> None:
    """The challenge names the server; a single portal outweighs good answers."""
    assert b"\r\nX-Tailscale-Challenge: ts_192.0.2.7\r\n" in encode_check(SERVER)
    assert conclude([]) is conclude([None]) is None
    assert conclude([None, False]) is False
    assert conclude([False, True]) is True
