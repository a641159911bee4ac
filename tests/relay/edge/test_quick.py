"""Quick tunnels: made by whoever asks, within bounds, and forgotten when nobody uses them."""

from __future__ import annotations

import base64
import json
import os
from uuid import UUID

import pytest
import trio

from relay.edge.quick import QuickRefusedError, QuickTunnels
from relay.edge.registry import Registry
from relay.edge.visit_http1 import serve_http1
from tests.relay.edge.arena import Http1Client, echo, open_arena


def quick_tunnels(registry: Registry) -> QuickTunnels:
    return QuickTunnels(
        registry, os.urandom, domain="try.example.org", per_hour=2, limit=3, unused_seconds=600
    )


async def test_a_tunnel_is_made_by_the_api_and_served_under_its_name() -> None:
    """The answer has what cloudflared wants; without a connector its name answers 503."""
    async with open_arena() as arena:
        client = Http1Client(arena.visit(serve_http1))
        answer = await client.ask("POST", "/tunnel", [("Host", "try.example.org")], body=b"")
        assert answer.status == 200
        document = json.loads(answer.body)
        assert document["success"] is True
        assert document["errors"] == []
        result = document["result"]
        tunnel = arena.registry.tunnel(UUID(result["id"]))
        assert tunnel is not None
        assert tunnel.credentials.secret == base64.b64decode(result["secret"])
        assert tunnel.credentials.account_tag == result["account_tag"]
        assert result["hostname"].endswith(".try.example.org")
        assert arena.quick.find(result["hostname"]) == tunnel.id
        assert (await client.ask("GET", "/tunnel", [("Host", "try.example.org")])).status == 404
        other = [("Host", "other.try.example.org")]
        assert (await client.ask("GET", "/", other)).status == 404
        arena.connect(echo)
        statuses = [
            (await client.ask("POST", "/tunnel", [("Host", "try.example.org")], body=b"")).status
            for _ in range(3)
        ]
        assert statuses == [200, 200, 429]


async def test_bounds() -> None:
    """Each source has so many an hour, and all together there are so many."""
    registry = Registry()
    quick = quick_tunnels(registry)
    for _ in range(2):
        quick.create("192.0.2.1", 0)
    with pytest.raises(QuickRefusedError) as caught:
        quick.create("192.0.2.1", 0)
    assert caught.value.status == 429
    quick.create("192.0.2.2", 0)
    with pytest.raises(QuickRefusedError) as caught:
        quick.create("192.0.2.3", 0)
    assert caught.value.status == 503
    assert len(registry.tunnels()) == 3


async def test_unused_ones_are_forgotten() -> None:
    """After ten minutes without a connector, also when there was one in between."""
    registry = Registry()
    quick = quick_tunnels(registry)
    result = json.loads(quick.create("192.0.2.1", 0))["result"]
    assert quick.forget_unused(599) == []
    assert quick.forget_unused(600) == [UUID(result["id"])]
    assert quick.find(result["hostname"]) is None
    assert registry.tunnels() == []
    assert len(quick) == 0


async def test_off_unless_there_is_a_domain() -> None:
    """Without a domain no request is for the API."""
    quick = QuickTunnels(Registry(), os.urandom, domain="", per_hour=1, limit=1, unused_seconds=1)
    await trio.lowlevel.checkpoint()
    assert not quick.is_api("POST", "", "/tunnel")
