"""The files for operators name only what exists."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from relay.certificates import CertificateStatus
from relay.config import Config
from relay.counters import Counters
from relay.metrics import encode_metrics
from relay.refusals import Stage
from relay.sampling import RTT_LABELS, Rates
from relay.snapshot import Connections, QueueDelay, Resources, Snapshot, Traffic
from relay.upgrade import RateLimit

ROOT = Path(__file__).parents[2]


def snapshot() -> Snapshot:
    delay = Counters().queue_delay
    return Snapshot(
        hostname="relay.example.com",
        version="1.2.3",
        server_key="nodekey:00",
        unix_time=0.0,
        uptime_seconds=0.0,
        connections=Connections(),
        traffic=Traffic.of(Counters()),
        queue_delay=QueueDelay(
            bounds_seconds=delay.bounds, counts=tuple(delay.counts), total_seconds=0.0
        ),
        rates=Rates(),
        tcp_rtt=dict.fromkeys(RTT_LABELS, 0),
        refusals={str(stage): 0 for stage in Stage},
        accepted_connections=0,
        rejected_connections=0,
        websocket_accepts=0,
        tls_handshakes={},
        tls_active={},
        resources=Resources(),
        rate_limit=RateLimit(1, 1),
        certificate=CertificateStatus("files", "a", True, 1, None, 1, 0),
    )


def expressions(node: object) -> Iterator[str]:
    """Every query of a dashboard."""
    if isinstance(node, dict):
        for name, value in node.items():
            if name in ("expr", "query") and isinstance(value, str):
                yield value
            else:
                yield from expressions(value)
    elif isinstance(node, list):
        for value in node:
            yield from expressions(value)


def test_dashboard_asks_only_for_metrics_that_exist() -> None:
    """A misspelt name shows as an empty panel, which nobody notices."""
    dashboard = json.loads((ROOT / "deploy/grafana-dashboard.json").read_text())
    series = {
        re.split(r"[{ ]", line)[0]
        for line in encode_metrics(snapshot()).decode().splitlines()
        if not line.startswith("#")
    }
    names = {
        name
        for expression in expressions(dashboard)
        for name in re.findall(r"\b(?:derp|underpass|stun|bootstrap_dns|process)_\w+", expression)
    }
    assert len(names) > 30
    assert names <= series


def test_dashboard_panels_do_not_overlap() -> None:
    """Each cell of the grid belongs to one panel."""
    dashboard = json.loads((ROOT / "deploy/grafana-dashboard.json").read_text())
    cells = [
        (place["x"] + dx, place["y"] + dy)
        for place in (panel["gridPos"] for panel in dashboard["panels"])
        for dx in range(place["w"])
        for dy in range(place["h"])
    ]
    assert len(cells) == len(set(cells))
    assert max(x for x, _ in cells) < 24
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])


def test_example_configuration_is_right() -> None:
    """It is what people start from."""
    config = Config.load(ROOT / "deploy/relay.toml", {}, {})
    assert config.server.hostname == "relay.example.com"
    assert config.tls.mode == "acme"


def test_example_configuration_has_every_key_and_loads_with_all_of_them(tmp_path: Path) -> None:
    """Each key is there, as a line or as a comment that becomes one, and shows a value it takes."""
    text = (ROOT / "deploy" / "relay.toml").read_text()
    lines = re.sub(r"(?m)^# (?=\[[a-z.]+\]$|[a-z_]+ = )", "", text)
    document = tomllib.loads(lines)
    keys = {
        f"{prefix}{name}"
        for prefix, table in _tables(document)
        for name, value in table.items()
        if not isinstance(value, dict)
    }
    assert keys == {f"{prefix}{name}" for prefix, name in _keys(Config)}
    path = tmp_path / "relay.toml"
    path.write_text(text)
    assert Config.load(path, {}, {})


def _tables(table: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    yield prefix, table
    for name, value in table.items():
        if isinstance(value, dict):
            yield from _tables(value, f"{prefix}{name}.")


def _keys(section: type[msgspec.Struct], prefix: str = "") -> Iterator[tuple[str, str]]:
    for info in msgspec.structs.fields(section):
        if isinstance(info.type, type) and issubclass(info.type, msgspec.Struct):
            yield from _keys(info.type, f"{prefix}{info.name}.")
        else:
            yield prefix, info.name
