"""The status page: one snapshot as HTML, without scripts and without anything from elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from html import escape
from typing import Final

from relay.edge.view import EdgeView, TunnelView
from relay.figures import bits_text, bytes_text, count_text, seconds_text
from relay.sampling import SAMPLE_SECONDS
from relay.snapshot import ClientView, Snapshot

REFRESH_SECONDS: Final = 10
EXPIRY_WARNING_SECONDS: Final = 14 * 86400
"""Half of what is left when ACME renews; monitoring of DERP servers wants 7 days."""

DROP_REASONS: Final = {
    "unknown_dest": "the destination is not connected",
    "unknown_dest_on_fwd": "it came over the mesh, and the destination is not here",
    "gone_disconnected": "the destination left before it could be sent",
    "queue_head": "the destination reads too slowly; an older packet made room",
    "queue_tail": "the memory for waiting packets was used up",
    "write_error": "writing to the destination failed",
    "dup_client": "the destination has several connections",
    "not_permitted": "the sender's token does not name this destination",
}
REFUSAL_STAGES: Final = {
    "accept_rate": "more connections per second than limits.accept_rate_per_second",
    "connections": "limits.connections was reached",
    "connections_per_ip": "limits.connections_per_ip was reached",
    "handshakes": "limits.handshakes was reached",
    "proxy": "a trusted proxy sent no good PROXY header",
    "tls": "the TLS handshake failed",
    "http": "no good HTTP request came",
    "derp": "the DERP handshake failed",
    "admission": "not admitted",
}

_CLIENT_TITLES: Final = (
    "connected",
    "packets in",
    "bytes in",
    "packets out",
    "bytes out",
    "dropped",
    "waiting",
)
_GRAPH_WIDTH: Final = 720
_GRAPH_HEIGHT: Final = 90

_STYLE: Final = """
:root { color-scheme: light dark; --ink: #1c2330; --dim: #5d6878; --line: #dde2ea;
  --ground: #f5f6f9; --card: #fff; --accent: #1f6feb; --good: #1a7f47; --bad: #c0362c; }
@media (prefers-color-scheme: dark) { :root { --ink: #e3e8f0; --dim: #94a0b3; --line: #2b3342;
  --ground: #12161d; --card: #1a202a; --accent: #6ea8ff; --good: #56c98a; --bad: #ff7b6e; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1.25rem 3rem; max-width: 76rem; background: var(--ground);
  color: var(--ink); font: 15px/1.45 system-ui, sans-serif; }
header { display: flex; flex-wrap: wrap; gap: .25rem 1rem; align-items: baseline; }
h1 { font-size: 1.5rem; margin: 0; }
h2 { font-size: 1.05rem; margin: 2rem 0 .6rem; }
.dim, footer { color: var(--dim); }
.state { font-weight: 600; color: var(--good); }
.state.bad, .bad { color: var(--bad); }
ul.problems { margin: .6rem 0 0; padding-left: 1.2rem; color: var(--bad); }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(15rem, 45%), 1fr));
  gap: .75rem; margin-top: 1.25rem; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; }
.tile { padding: .7rem .9rem; }
.tile b { display: block; font-size: 1.35rem; font-weight: 600;
  font-variant-numeric: tabular-nums; }
.tile small { color: var(--dim); }
.graph { padding: .9rem; margin-top: .75rem; }
.graph svg { display: block; width: 100%; height: 5.6rem; }
.graph path { fill: var(--accent); fill-opacity: .16; stroke: var(--accent); stroke-width: 1.5;
  vector-effect: non-scaling-stroke; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .38rem .8rem; text-align: right; white-space: nowrap;
  border-top: 1px solid var(--line); }
thead th { border-top: 0; color: var(--dim); font-weight: 500; font-size: .85rem; }
.left { text-align: left; }
.wrap { white-space: normal; }
.left.wrap { width: 65%; }
code { font: .9em ui-monospace, monospace; }
.mark { display: inline-block; padding: 0 .4rem; border-radius: .6rem; font-size: .78rem;
  border: 1px solid var(--line); color: var(--dim); }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(24rem, 100%), 1fr));
  gap: 0 1.25rem; }
footer { margin-top: 2rem; font-size: .85rem; overflow-wrap: anywhere; }
"""


def render_status_page(snapshot: Snapshot, problems: Sequence[str]) -> str:
    """The page. `problems` are why the relay is not ready, in plain words."""
    state, look = ("not ready", "state bad") if problems else ("ready", "state")
    listed = "".join(f"<li>{escape(problem)}</li>" for problem in problems)
    workers = f", {snapshot.workers} workers" if snapshot.workers > 1 else ""
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="refresh" content="{REFRESH_SECONDS}">
<title>{escape(snapshot.hostname)} &middot; Underpass relay</title>
<style>{_STYLE}</style>
</head>
<body>
<header><h1>{escape(snapshot.hostname)}</h1>
<span class="{look}">{state}</span>
<span class="dim">up {seconds_text(snapshot.uptime_seconds)}{workers}</span></header>
{f'<ul class="problems">{listed}</ul>' if listed else ""}
{_tiles(snapshot)}
{_graph(snapshot.rates.history)}
{_clients(snapshot)}
<div class="pair">
<section>{_drops(snapshot)}</section>
<section>{_refusals(snapshot)}</section>
<section>{_mesh(snapshot)}</section>
<section>{_services(snapshot)}</section>
</div>
{_edge(snapshot.edge)}
<footer>Underpass {escape(snapshot.version)} &middot; <code>{escape(snapshot.server_key)}</code><br>
{time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(snapshot.unix_time))} UTC, anew every
{REFRESH_SECONDS} s &middot; rates are of the last {SAMPLE_SECONDS:.0f} s</footer>
</body>
</html>
"""


def _tiles(snapshot: Snapshot) -> str:
    connections, rates, resources = snapshot.connections, snapshot.rates, snapshot.resources
    keys = connections.local_keys + connections.remote_keys
    count = count_text
    tiles = [
        (count(connections.current), "clients", f"{count(connections.home)} at home here"),
        (
            bits_text(rates.bytes_per_second),
            "delivered",
            f"{count(rates.packets_per_second)} packets/s",
        ),
        (f"{rates.queue_delay_ms:.2f} ms", "queue delay", "mean in the relay"),
        (f"{count(rates.drops_per_second)}/s", "dropped", "see the reasons below"),
        (
            bytes_text(connections.waiting_bytes),
            "waiting",
            f"{count(connections.waiting_packets)} packets for slow readers",
        ),
        (count(keys), "keys in the region", f"{count(connections.local_keys)} of them here"),
        _expiry(snapshot),
        (
            bytes_text(resources.memory_bytes),
            "memory",
            f"{count(resources.open_descriptors)} descriptors",
        ),
    ]
    cells = "".join(
        f'<div class="card tile"><small>{label}</small><b>{figure}</b><small>{note}</small></div>'
        for figure, label, note in tiles
    )
    return f'<div class="tiles">{cells}</div>'


def _expiry(snapshot: Snapshot) -> tuple[str, str, str]:
    certificate = snapshot.certificate
    if certificate is None:
        return "none", "certificate", "TLS is off"
    if not certificate.ready:
        return "none yet", "certificate", f"mode {escape(certificate.mode)}"
    left = certificate.not_after_unix - snapshot.unix_time
    text = seconds_text(left) if left > 0 else "expired"
    if left < EXPIRY_WARNING_SECONDS:
        text = f'<span class="bad">{text}</span>'
    day = time.strftime("%Y-%m-%d", time.gmtime(certificate.not_after_unix))
    return text, "certificate expires in", f"{day}, {escape(certificate.mode)}"


def _graph(history: Sequence[float]) -> str:
    if len(history) < 2:
        return ""
    top = max(*history, 1.0)
    step = _GRAPH_WIDTH / (len(history) - 1)
    points = " ".join(
        f"L{index * step:.1f} {_GRAPH_HEIGHT - value / top * (_GRAPH_HEIGHT - 4):.1f}"
        for index, value in enumerate(history)
    )
    span = seconds_text((len(history) - 1) * SAMPLE_SECONDS)
    return f"""<div class="card graph"><svg viewBox="0 0 {_GRAPH_WIDTH} {_GRAPH_HEIGHT}"
preserveAspectRatio="none" role="img" aria-label="Traffic">
<path d="M-2 {_GRAPH_HEIGHT + 2} {points} L{_GRAPH_WIDTH + 2} {_GRAPH_HEIGHT + 2}"/></svg>
<small class="dim">delivered in the last {span}, at most {bits_text(top)}</small></div>"""


def _clients(snapshot: Snapshot) -> str:
    if not snapshot.clients:
        return '<h2>Clients</h2><p class="dim">Nobody is connected.</p>'
    more = ""
    if snapshot.clients_left_out:
        more = f" (the {len(snapshot.clients)} busiest of {snapshot.connections.current})"
    head = '<th class="left">key</th><th class="left">address</th>' + "".join(
        f"<th>{title}</th>" for title in _CLIENT_TITLES
    )
    body = "".join(map(_client_row, snapshot.clients))
    return (
        f"<h2>Clients{more}</h2>"
        f'<div class="card scroll"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _client_row(client: ClientView) -> str:
    marks = [
        (client.is_home, "home"),
        (client.is_mesh, "mesh"),
        (client.is_prober, "prober"),
        (client.is_duplicate, "several connections"),
        (client.is_held_back, "above its rate"),
    ]
    shown = "".join(f' <span class="mark">{text}</span>' for is_set, text in marks if is_set)
    cells = (
        seconds_text(client.connected_seconds),
        count_text(client.packets_in),
        bytes_text(client.bytes_in),
        count_text(client.packets_out),
        bytes_text(client.bytes_out),
        _maybe_bad(client.packets_dropped),
        bytes_text(client.waiting_bytes) if client.waiting_bytes else "0",
    )
    return (
        f'<tr><td class="left"><code title="{escape(client.key)}">{escape(client.short)}</code>'
        f'{shown}</td><td class="left">{escape(client.address) or "unknown"}</td>'
        + "".join(f"<td>{cell}</td>" for cell in cells)
        + "</tr>"
    )


def _drops(snapshot: Snapshot) -> str:
    rows = [
        (DROP_REASONS.get(reason, reason), _maybe_bad(sum(kinds.values())))
        for reason, kinds in snapshot.traffic.packets_dropped.items()
        if any(kinds.values())
    ]
    return _list("Packets dropped", rows, "None since the start.")


def _refusals(snapshot: Snapshot) -> str:
    rows = [
        (REFUSAL_STAGES.get(stage, stage), _maybe_bad(count))
        for stage, count in snapshot.refusals.items()
        if count
    ]
    return _list("Connections refused", rows, "None since the start.")


def _mesh(snapshot: Snapshot) -> str:
    rows = [
        (link.name, "up" if link.is_up else f'<span class="bad">{escape(link.problem)}</span>')
        for link in snapshot.mesh_links
    ]
    return _list("Mesh links", rows, "This relay is alone in its region.")


def _services(snapshot: Snapshot) -> str:
    rows = []
    if snapshot.stun is not None:
        stun = snapshot.stun
        rows.append(("STUN requests answered", count_text(stun.success)))
        rows.append(
            ("STUN datagrams left unanswered", count_text(stun.not_stun + stun.over_budget))
        )
    if snapshot.admission is not None:
        admission = snapshot.admission
        rows.append(("clients admitted", count_text(admission.allowed)))
        rows.append(("clients not admitted", _maybe_bad(admission.denied)))
        rows.append(("sessions cut", count_text(admission.cut)))
        if admission.hook_requests:
            hook = f"{count_text(admission.hook_requests)}, {admission.hook_failures} failed"
            rows.append(("questions to the admission hook", hook))
    rows.append(("WebSocket clients so far", count_text(snapshot.websocket_accepts)))
    rows.append(("slow readers closed", _maybe_bad(snapshot.traffic.write_timeouts)))
    rows.append(("protocol violations", _maybe_bad(snapshot.traffic.protocol_violations)))
    for version, count in snapshot.tls_active.items():
        rows.append((f"clients with TLS {version}", count_text(count)))
    return _list("Other counts", rows, "")


def _edge(edge: EdgeView | None) -> str:
    if edge is None:
        return ""
    titles = ("connections", "now", "requests", "failed", "bytes in", "bytes out", "ports")
    rows = "".join(
        f'<tr><td class="left"><code title="{escape(t.id)}">{escape(t.name)}</code></td>'
        f"<td>{_tunnel_state(t)}</td><td>{count_text(t.requests_active)}</td>"
        f"<td>{count_text(t.requests)}</td><td>{_maybe_bad(t.errors)}</td>"
        f"<td>{bytes_text(t.bytes_in)}</td><td>{bytes_text(t.bytes_out)}</td>"
        f"<td>{count_text(t.tcp_active + t.udp_active)}</td></tr>"
        for t in edge.tunnels
    )
    head = '<th class="left">tunnel</th>' + "".join(f"<th>{title}</th>" for title in titles)
    refused = _list(
        "Visitors refused",
        [(stage, _maybe_bad(n)) for stage, n in edge.visitor_refusals.items() if n],
        "None since the start.",
    )
    connectors = _list(
        "Connectors refused",
        [(stage, _maybe_bad(n)) for stage, n in edge.connector_refusals.items() if n],
        "None since the start.",
    )
    return (
        f'<h2>Tunnels</h2><div class="card scroll"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
        f'<div class="pair"><section>{refused}</section><section>{connectors}</section></div>'
    )


def _tunnel_state(tunnel: TunnelView) -> str:
    if not tunnel.connections:
        return '<span class="bad">not connected</span>'
    shown = ", ".join(f"{count} {name}" for name, count in tunnel.transports.items())
    return escape(shown)


def _list(title: str, rows: Iterable[tuple[str, str]], otherwise: str) -> str:
    """A table of names (escaped here) and values (HTML)."""
    body = "".join(
        f'<tr><td class="left wrap">{escape(name)}</td><td class="wrap">{value}</td></tr>'
        for name, value in rows
    )
    if not body:
        return f'<h2>{title}</h2><p class="dim">{otherwise}</p>'
    return f'<h2>{title}</h2><div class="card scroll"><table><tbody>{body}</tbody></table></div>'


def _maybe_bad(count: int) -> str:
    return f'<span class="bad">{count_text(count)}</span>' if count else "0"
