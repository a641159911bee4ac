"""What an operator sees of the edge: the picture, its metrics, the page and `top`."""

from __future__ import annotations

import io
from pathlib import Path

import trio
from rich.console import Console

from relay.config import Config
from relay.edge.metrics import edge_families
from relay.edge.service import Edge
from relay.edge.tunnel_files import create_tunnel
from relay.edge.view import EdgeView, view_tunnels
from relay.edge.visit_http1 import serve_http1
from relay.status_page import _edge
from relay.top import _edge_table
from tests.relay.edge.arena import Http1Client, open_arena


async def picture() -> EdgeView:
    """Of an edge that has served a request and refused one."""
    async with open_arena() as arena:
        arena.connect()
        client = Http1Client(arena.visit(serve_http1))
        await client.ask("POST", "/", body=b"hello")
        await client.ask("GET", "/", [("Host", "elsewhere.org")])
        return EdgeView(
            tunnels=view_tunnels(arena.registry, arena.meter.tunnels),
            registrations=1,
            visitor_refusals={str(s): n for s, n in arena.refusals.counts.items()},
            connector_refusals={"tls": 0},
            quick_tunnels=0,
            quick_tunnels_created=0,
            peer_nodes=0,
            peer_packets=0,
            peer_bytes=0,
            peer_drops=0,
        )


async def test_metrics_have_cloudflareds_names() -> None:
    """Requests, codes and connections under the names that its dashboards know."""
    samples = {
        (sample.name, *sample.labels.values()): sample.value
        for family in edge_families(await picture())
        for sample in family.samples
    }
    assert samples["cloudflared_tunnel_total_requests",] == 1
    assert samples["cloudflared_tunnel_response_by_code", "200"] == 1
    assert samples["cloudflared_tunnel_ha_connections",] == 1
    assert samples["cloudflared_tunnel_request_errors",] == 0
    assert samples["underpass_edge_bytes_received_total", "app"] == 5
    assert samples["underpass_edge_refusals_total", "request"] == 1


async def test_page_and_top_show_the_tunnels() -> None:
    """By name, with what they moved and what was refused."""
    edge = await picture()
    page = _edge(edge)
    assert ">app<" in page
    assert "1 http2" in page
    assert "Visitors refused" in page
    console = Console(width=100, file=io.StringIO(), record=True)
    console.print(_edge_table(None, edge, 1.0, None))
    assert "app" in console.export_text()
    assert _edge(None) == ""


async def test_the_edge_itself_has_a_picture(tmp_path: Path) -> None:
    """A tunnel that nobody serves is there, with zeros."""
    create_tunnel(str(tmp_path), "web", lambda size: bytes(range(size)))
    config = Config.dev({"edge.listen": "127.0.0.1:0", "edge.directory": str(tmp_path)})
    view = Edge(config, []).view()
    assert [(t.name, t.connections, t.requests) for t in view.tunnels] == [("web", 0, 0)]
    await trio.lowlevel.checkpoint()
