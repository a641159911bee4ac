"""The drawings of a report as SVG text: the network, and what happened in it over time. Pure.

Colors are CSS variables of the page, so that light and dark need no second drawing.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from html import escape

from netlab.addresses import AddressPlan, InterfacePlan, plan_addresses
from netlab.model import INTERNET, Topology
from netlab.plan import describe_link
from netlab.timeline import (
    Event,
    LatencyMeasured,
    MappingBorn,
    MappingDied,
    NetworkChanged,
    PacketDropped,
    PathChanged,
    ProgramEnded,
    ProgramOutput,
)

WIDTH = 1160
_LABELS = 168
_RIGHT = 16
_BOX_WIDTH, _BOX_HEIGHT, _GAP, _LEVEL = 184, 58, 20, 104
# More rows than this hide the rest of the page; the table of mappings has them all in JSONL.
_MAX_MAPPING_ROWS = 16
_ROW = 14


def _text(x: float, y: float, content: str, css: str = "", anchor: str = "start") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" class="{css}" text-anchor="{anchor}">'
        f"{escape(content)}</text>"
    )


def _shorten(content: str, length: int) -> str:
    return content if len(content) <= length else content[: length - 1] + "…"


# --- the network ---------------------------------------------------------------------------


@dataclass(slots=True)
class _Box:
    name: str
    kind: str
    lines: tuple[str, str]
    link: str = ""
    children: list[_Box] = field(default_factory=list)
    x: float = 0.0
    y: float = 0.0


def draw_topology(topology: Topology) -> str:
    """Return the network as a tree: the internet above, hosts below."""
    plan = plan_addresses(topology)
    root = _Box(INTERNET, "internet", ("", ""))
    root.children = _children(topology, plan, INTERNET)
    columns = _place(root, 0, 0.0)
    depth = _depth(root)
    width = max(columns * (_BOX_WIDTH + _GAP) - _GAP, _BOX_WIDTH)
    height = depth * _LEVEL - (_LEVEL - _BOX_HEIGHT) + 4
    scale = min(1.0, WIDTH / width)
    shift = (WIDTH / scale - width) / 2 if columns * (_BOX_WIDTH + _GAP) < WIDTH else 0.0
    body = "".join([*_edges(root, shift), *_boxes(root, shift)])
    return (
        f'<svg viewBox="0 0 {WIDTH / scale:.0f} {height:.0f}" role="img" '
        f'aria-label="network">{body}</svg>'
    )


def _children(topology: Topology, plan: AddressPlan, network: str) -> list[_Box]:
    found = []
    if network == INTERNET:
        for server in topology.servers:
            lines = (_first(plan.servers[server.name]), "server")
            found.append(_Box(server.name, "server", lines, describe_link(server.link)))
    for nat in topology.nats:
        if nat.uplink.network == network:
            lines = (_first(plan.nats[nat.name].outside), f"NAT {nat.behavior.class_name}")
            box = _Box(nat.name, "nat", lines, describe_link(nat.uplink.link))
            box.children = _children(topology, plan, nat.name)
            found.append(box)
    for host in topology.hosts:
        for index, uplink in enumerate(host.uplinks):
            if uplink.network == network:
                lines = (_first(plan.hosts[host.name][index]), "spare uplink" if index else "host")
                kind = "spare" if index else "host"
                found.append(_Box(host.name, kind, lines, describe_link(uplink.link)))
    return found


def _first(plan: InterfacePlan) -> str:
    return str((*plan.ipv4, *plan.ipv6, "no address")[0])


def _place(box: _Box, level: int, column: float) -> float:
    """Give a box and what is below it their places; return how many columns they take."""
    box.y = level * _LEVEL + 2
    used = 0.0
    for child in box.children:
        used += _place(child, level + 1, column + used)
    used = max(used, 1.0)
    box.x = (column + (used - 1) / 2) * (_BOX_WIDTH + _GAP)
    return used


def _depth(box: _Box) -> int:
    return 1 + max((_depth(child) for child in box.children), default=0)


def _edges(box: _Box, shift: float) -> Iterator[str]:
    x, y = box.x + shift + _BOX_WIDTH / 2, box.y + _BOX_HEIGHT
    for child in box.children:
        to_x, to_y = child.x + shift + _BOX_WIDTH / 2, child.y
        middle = (y + to_y) / 2
        css = "edge spare" if child.kind == "spare" else "edge"
        yield f'<path class="{css}" d="M{x:.1f} {y:.1f}V{middle:.1f}H{to_x:.1f}V{to_y:.1f}"/>'
        if child.link:
            yield _text(to_x + 6, to_y - 7, _shorten(child.link, 30), "small")
        yield from _edges(child, shift)


def _boxes(box: _Box, shift: float) -> Iterator[str]:
    x = box.x + shift
    yield (
        f'<rect class="box {box.kind}" x="{x:.1f}" y="{box.y:.1f}" width="{_BOX_WIDTH}" '
        f'height="{_BOX_HEIGHT}" rx="8"/>'
    )
    center = x + _BOX_WIDTH / 2
    if box.kind == "internet":
        yield _text(center, box.y + 34, box.name, "name", "middle")
    else:
        yield _text(center, box.y + 19, _shorten(box.name, 24), "name", "middle")
        yield _text(center, box.y + 34, box.lines[1], "small", "middle")
        yield _text(center, box.y + 48, _shorten(box.lines[0], 28), "small mono", "middle")
    for child in box.children:
        yield from _boxes(child, shift)


# --- what happened ---------------------------------------------------------------------------


class _Scale:
    """Where a time is on the page."""

    def __init__(self, end: float) -> None:
        self.end = max(end, 0.001)

    def x(self, at: float) -> float:
        inside = min(max(at, 0.0), self.end)
        return _LABELS + inside / self.end * (WIDTH - _LABELS - _RIGHT)

    def ticks(self) -> list[float]:
        step = next(
            unit * 10.0**power
            for power in range(-4, 7)
            for unit in (1, 2, 5)
            if self.end / (unit * 10.0**power) <= 12
        )
        return [step * index for index in range(int(self.end / step) + 1)]


@dataclass(slots=True)
class _Mapping:
    born: float
    died: float | None
    cause: str
    event: MappingBorn


def draw_lanes(topology: Topology, events: Sequence[Event], end: float) -> str:
    """Return paths, programs, mappings, drops and latencies over one time axis."""
    scale = _Scale(end)
    parts: list[str] = []
    y = 26.0
    for title, height, body in _lanes(topology, events, scale):
        parts.append(f'<line class="rule" x1="0" x2="{WIDTH}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<g transform="translate(0 {y:.1f})">{title}{body}</g>')
        y += height
    behind = [
        f'<line class="grid" x1="{scale.x(at):.1f}" x2="{scale.x(at):.1f}" y1="22" y2="{y:.1f}"/>'
        + _text(scale.x(at), 16, f"{at:g} s", "small", "middle")
        for at in scale.ticks()
    ]
    return (
        f'<svg viewBox="0 0 {WIDTH} {y + 30:.0f}" role="img" aria-label="timeline">'
        + "".join([*behind, *parts, *_changes(events, scale, y)])
        + "</svg>"
    )


def _changes(events: Sequence[Event], scale: _Scale, bottom: float) -> Iterator[str]:
    """Yield a line through everything for each change of the network, labels below."""
    last_end, row = float("-inf"), 0
    for event in events:
        if not isinstance(event, NetworkChanged):
            continue
        x = scale.x(event.at)
        label = f"{event.what} {event.target}"
        row = row + 1 if x < last_end else 0
        last_end = x + len(label) * 6 + 8
        anchor = "end" if x > WIDTH - 120 else "start"
        yield f'<line class="change" x1="{x:.1f}" x2="{x:.1f}" y1="22" y2="{bottom + 4:.1f}"/>'
        yield _text(x + 3, bottom + 13 + 11 * (row % 2), label, "small changed", anchor)


def _lanes(
    topology: Topology, events: Sequence[Event], scale: _Scale
) -> Iterator[tuple[str, float, str]]:
    """Yield (label, height, drawing) of each lane."""
    paths: dict[tuple[str, str], list[PathChanged]] = defaultdict(list)
    outputs: dict[str, list[Event]] = defaultdict(list)
    drops: dict[str, list[PacketDropped]] = defaultdict(list)
    latencies: dict[tuple[str, str], list[LatencyMeasured]] = defaultdict(list)
    understood: set[tuple[float, str]] = set()
    for event in events:
        match event:
            case PathChanged():
                paths[event.host, event.peer].append(event)
                understood.add((event.at, event.host))
            case LatencyMeasured():
                latencies[event.host, event.peer].append(event)
                understood.add((event.at, event.host))
            case ProgramOutput() | ProgramEnded():
                outputs[event.program].append(event)
            case PacketDropped():
                drops[event.where].append(event)
    for (host, peer), changes in sorted(paths.items()):
        yield _label(f"{host} → {peer}"), 30, "".join(_path_bars(changes, scale))
    for program, lines in sorted(outputs.items()):
        shown = [
            line
            for line in lines
            if isinstance(line, ProgramEnded) or (line.at, program) not in understood
        ]
        if shown:
            yield _label(f"{program} prints"), 30, "".join(_output_dots(shown, scale))
    mappings = find_mappings(events)
    for nat in topology.nats:
        rows = _pack(mappings.get(nat.name, []), scale)
        stopped = drops.pop(nat.name, [])
        if not rows and not stopped:
            continue
        height = 14 + _ROW * min(len(rows), _MAX_MAPPING_ROWS) + (18 if stopped else 0)
        if len(rows) > _MAX_MAPPING_ROWS:
            height += 14
        body = "".join([*_mapping_bars(rows, scale), *_drop_ticks(stopped, scale, height - 16)])
        counts = _count(sum(map(len, rows)), "mapping")
        if stopped:
            counts += f", {_count(len(stopped), 'drop')}"
        label = _label(nat.name, nat.behavior.class_name, counts)
        yield label, max(height, 56), body
    for place, stopped in sorted(drops.items()):
        yield (
            _label(place, _count(len(stopped), "drop")),
            42,
            "".join(_drop_ticks(stopped, scale, 14)),
        )
    if latencies:
        height = 150 + _LEGEND_ROW * _more_legend_rows(len(latencies))
        yield (
            _label("round trip", "as programs report"),
            height,
            _latency_plot(latencies, scale),
        )


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")


def _label(name: str, *notes: str) -> str:
    lines = [_text(0, 19, _shorten(name, 26), "name")]
    lines += [_text(0, 33 + 13 * i, note, "small") for i, note in enumerate(notes)]
    return "".join(lines)


def _path_bars(changes: Sequence[PathChanged], scale: _Scale) -> Iterator[str]:
    for index, change in enumerate(changes):
        until = changes[index + 1].at if index + 1 < len(changes) else scale.end
        kind = change.path.split()[0].lower() if change.path.strip() else "none"
        css = kind if kind in ("direct", "relay", "none") else "other"
        x, width = scale.x(change.at), max(scale.x(until) - scale.x(change.at), 1.5)
        yield (
            f'<rect class="path {css}" x="{x:.1f}" y="6" width="{width:.1f}" height="18" rx="3">'
            f"<title>{change.at:.3f} s: {escape(change.path)}</title></rect>"
        )
        letters = int((width - 8) / 6.2)
        if letters >= 4:
            yield _text(x + 5, 19, _shorten(change.path, letters), "small onbar")


def _buckets(events: Iterable[Event], scale: _Scale) -> dict[int, list[Event]]:
    """Group events by pixel: a million of them are still a small drawing."""
    found: dict[int, list[Event]] = defaultdict(list)
    for event in events:
        found[round(scale.x(event.at))].append(event)
    return found


def _output_dots(lines: Sequence[Event], scale: _Scale) -> Iterator[str]:
    for x, group in _buckets(lines, scale).items():
        texts = []
        for event in group[:8]:
            if isinstance(event, ProgramOutput):
                texts.append(f"{event.at:.3f} s: {event.line}")
            elif isinstance(event, ProgramEnded):
                texts.append(f"{event.at:.3f} s: ended with status {event.status}")
        failed = any(isinstance(e, ProgramEnded) and e.status != 0 for e in group)
        css = "dot failed" if failed else "dot"
        yield (
            f'<circle class="{css}" cx="{x}" cy="15" r="4">'
            f"<title>{escape(chr(10).join(texts))}</title></circle>"
        )


def _drop_ticks(drops: Sequence[PacketDropped], scale: _Scale, y: float) -> Iterator[str]:
    for x, group in _buckets(drops, scale).items():
        first = group[0]
        assert isinstance(first, PacketDropped)
        more = f" (and {len(group) - 1} more)" if len(group) > 1 else ""
        yield (
            f'<rect class="drop" x="{x - 1}" y="{y:.1f}" width="2" height="12">'
            f"<title>{first.at:.3f} s: {escape(first.source)} → {escape(first.destination)}: "
            f"{escape(first.text)}{more}</title></rect>"
        )


def find_mappings(events: Iterable[Event]) -> dict[str, list[_Mapping]]:
    """Return each NAT's mappings in order of birth."""
    found: dict[str, list[_Mapping]] = defaultdict(list)
    alive: dict[tuple[str, str, str, str], _Mapping] = {}
    for event in events:
        if isinstance(event, MappingBorn):
            mapping = _Mapping(event.at, None, "", event)
            found[event.nat].append(mapping)
            alive[event.nat, event.protocol, event.inside, event.external] = mapping
        elif isinstance(event, MappingDied):
            key = (event.nat, event.protocol, event.inside, event.external)
            dead = alive.pop(key, None)
            if dead is not None:
                dead.died, dead.cause = event.at, event.cause
    return found


def _pack(mappings: Sequence[_Mapping], scale: _Scale) -> list[list[_Mapping]]:
    """Put mappings that don't overlap into one row."""
    rows: list[list[_Mapping]] = []
    free_at: list[float] = []
    for mapping in mappings:
        start = scale.x(mapping.born)
        end = scale.x(scale.end if mapping.died is None else mapping.died)
        for index, free in enumerate(free_at):
            if free + 2 <= start:
                rows[index].append(mapping)
                free_at[index] = end
                break
        else:
            rows.append([mapping])
            free_at.append(end)
    return rows


def _mapping_bars(rows: Sequence[Sequence[_Mapping]], scale: _Scale) -> Iterator[str]:
    for index, row in enumerate(rows[:_MAX_MAPPING_ROWS]):
        y = 8 + _ROW * index
        for mapping in row:
            event = mapping.event
            x = scale.x(mapping.born)
            end = scale.x(scale.end if mapping.died is None else mapping.died)
            fate = (
                "still there at the end"
                if mapping.died is None
                else f"{mapping.cause} at {mapping.died:.3f} s"
            )
            css = "mapping" if mapping.died is None else "mapping dead"
            width = max(end - x, 2.0)
            yield (
                f'<rect class="{css}" x="{x:.1f}" y="{y}" width="{width:.1f}" height="11" rx="2">'
                f"<title>{mapping.born:.3f} s: {escape(event.inside)} → "
                f"{escape(event.external)}, made for {escape(event.remote)}; {fate}</title></rect>"
            )
            if width > 46:
                port = event.external.rpartition(":")[2]
                label = f"{port} for {event.remote}" if width > 190 else port
                yield _text(x + 4, y + 8.8, label, "tiny onbar")
    hidden = len(rows) - _MAX_MAPPING_ROWS
    if hidden > 0:
        y = 8 + _ROW * _MAX_MAPPING_ROWS + 9
        count = sum(map(len, rows[_MAX_MAPPING_ROWS:]))
        yield _text(_LABELS, y, f"and {count} more mappings in timeline.jsonl", "small")


_LEGEND_COLUMNS, _LEGEND_ROW = 5, 16
_SERIES = 6
"""How many colors the page's style has for points."""


def _more_legend_rows(count: int) -> int:
    return (count - 1) // _LEGEND_COLUMNS


def _latency_plot(latencies: dict[tuple[str, str], list[LatencyMeasured]], scale: _Scale) -> str:
    highest = max(event.seconds for series in latencies.values() for event in series) * 1000
    shift = _LEGEND_ROW * _more_legend_rows(len(latencies))
    top, bottom = 30.0 + shift, 140.0 + shift
    step = next(
        unit * 10.0**power
        for power in range(-3, 7)
        for unit in (1, 2, 5)
        if highest / (unit * 10.0**power) <= 4
    )
    limit = step * (int(highest / step) + 1)

    def y(milliseconds: float) -> float:
        return bottom - milliseconds / limit * (bottom - top)

    parts = []
    for index in range(int(limit / step) + 1):
        value = index * step
        at = y(value)
        parts.append(
            f'<line class="grid" x1="{_LABELS}" x2="{WIDTH - _RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>'
        )
        parts.append(_text(_LABELS - 6, at + 4, f"{value:g} ms", "small", "end"))
    for number, ((host, peer), series) in enumerate(sorted(latencies.items())):
        css = f"series{number % _SERIES}"
        x = _LABELS + 6 + 190 * (number % _LEGEND_COLUMNS)
        line = 15 + _LEGEND_ROW * (number // _LEGEND_COLUMNS)
        parts.append(f'<circle class="point {css}" cx="{x}" cy="{line}" r="4"/>')
        parts.append(_text(x + 8, line + 4, _shorten(f"{host} → {peer}", 26), "small"))
        seen: set[tuple[int, int]] = set()
        for event in series:
            place = (round(scale.x(event.at)), round(y(event.seconds * 1000)))
            if place not in seen:
                seen.add(place)
                parts.append(
                    f'<circle class="point {css}" cx="{place[0]}" cy="{place[1]}" r="2.4">'
                    f"<title>{event.at:.3f} s: {event.seconds * 1000:.1f} ms</title></circle>"
                )
    return "".join(parts)
