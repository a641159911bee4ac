"""A run as one HTML page that needs nothing else: no network, no script, light and dark."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from html import escape
from importlib import resources
from pathlib import Path
from string import Template

from netlab.explain import explain
from netlab.plan import plan_text
from netlab.report_layout import draw_lanes, draw_topology
from netlab.run_directory import RunDirectoryError, SavedRun, Summary
from netlab.timeline import (
    Event,
    NetworkChanged,
    Note,
    PacketDropped,
    PathChanged,
    ProgramOutput,
)

# A browser stays quick with this much text; the timeline file has the rest.
_MAX_OUTPUT_LINES = 2000
_MAX_TABLE_ROWS = 200
# Ten hosts have 45 pairs; more would be a page about nothing else.
_MAX_PAIRS = 6


def write_report(saved: SavedRun, path: Path | None = None) -> Path:
    """Write the page of a run, beside the run by default, and return its path.

    Raises:
        RunDirectoryError: it cannot be written.
    """
    path = saved.directory / "report.html" if path is None else path
    try:
        path.write_text(render_report(saved), encoding="utf-8")
    except OSError as error:
        raise RunDirectoryError(f"cannot write {path}: {error.strerror}") from error
    return path


def render_report(saved: SavedRun) -> str:
    """Return the page of a run."""
    summary, topology, events = saved.summary, saved.scenario.topology, saved.events
    lines = [event for event in events if isinstance(event, ProgramOutput)]
    template = Template(
        (resources.files("netlab") / "report_template.html").read_text(encoding="utf-8")
    )
    end = max([summary.duration_seconds, *(event.at for event in events[-1:])])
    return template.substitute(
        title=escape(Path(summary.scenario).stem),
        mood="good" if summary.succeeded else "bad",
        verdict="as expected" if summary.succeeded else "not as expected",
        facts=escape(_facts(summary)),
        checks=_checks(summary),
        topology=draw_topology(topology),
        lanes=draw_lanes(topology, events, end),
        drops=_drops(events),
        explanations=_explanations(saved),
        events=_event_table(events),
        output_count=len(lines),
        output=_output(lines),
        plan=escape(plan_text(topology)),
        footer=escape(_footer(summary)),
    )


def _facts(summary: Summary) -> str:
    when = datetime.fromtimestamp(summary.unix_time, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    clock = "virtual time" if summary.back_end == "simulated" else "real time"
    return (
        f"{summary.back_end} back end · {summary.duration_seconds:.3g} s of {clock} · "
        f"seed {summary.seed} · {summary.events} events · {when}"
    )


def _footer(summary: Summary) -> str:
    text = "Hover over bars, ticks and dots to read what they are. Made by underpass-lab."
    if summary.forgotten_events:
        text += f" The timeline was full: its first {summary.forgotten_events} events are missing."
    return text


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{heading}</th>" for heading in headings)
    body = "".join("<tr>" + "".join(row) + "</tr>" for row in rows)
    return f'<div class="card"><table><tr>{head}</tr>{body}</table></div>'


def _cell(text: object, css: str = "") -> str:
    attribute = f' class="{css}"' if css else ""
    return f"<td{attribute}>{escape(str(text))}</td>"


def _checks(summary: Summary) -> str:
    rows = [
        [
            _cell("holds" if c.succeeded else "fails", "good" if c.succeeded else "bad"),
            _cell(c.that, "mono"),
            _cell(f"known at {c.at_seconds:.3f} s" if c.succeeded else c.problem),
        ]
        for c in summary.checks
    ]
    rows += [[_cell("problem", "bad"), _cell(text), _cell("")] for text in summary.problems]
    if not rows:
        return ""
    return "<h2>Expectations</h2>" + _table(("", "expectation", ""), rows)


def _drops(events: Sequence[Event]) -> str:
    drops = [event for event in events if isinstance(event, PacketDropped)]
    if not drops:
        return ""
    counts = Counter((drop.where, drop.reason) for drop in drops)
    rows = []
    for (where, reason), count in counts.most_common(_MAX_TABLE_ROWS):
        group = [drop for drop in drops if (drop.where, drop.reason) == (where, reason)]
        last = group[-1]
        rows.append(
            [
                _cell(where),
                _cell(reason),
                _cell(count, "number"),
                _cell(f"{group[0].at:.3f} to {last.at:.3f} s", "number"),
                _cell(f"{last.source} → {last.destination}: {last.text}"),
            ]
        )
    headings = ("where", "reason", "packets", "when", "the last one")
    return "<h2>Dropped packets</h2>" + _table(headings, rows)


def _explanations(saved: SavedRun) -> str:
    """Explain the pairs of hosts that programs report paths between."""
    events, topology = saved.events, saved.scenario.topology
    hosts = {program.name: program.host for program in saved.scenario.programs}
    pairs = {
        tuple(sorted((hosts.get(event.host, event.host), hosts.get(event.peer, event.peer))))
        for event in events
        if isinstance(event, PathChanged)
    }
    known = [pair for pair in sorted(pairs) if all(name in topology.host_by_name for name in pair)]
    if not known:
        return ""
    parts = []
    for a, b in itertools.islice(known, _MAX_PAIRS):
        sentences = explain(topology, events, a, b).text.splitlines()
        parts.append(f"<h3>{escape(a)} and {escape(b)}</h3>")
        parts += [f"<p>{escape(sentence)}</p>" for sentence in sentences]
    return f'<h2>Why</h2><div class="card explain">{"".join(parts)}</div>'


def _event_rows(events: Sequence[Event]) -> Iterator[list[str]]:
    for event in events:
        match event:
            case PathChanged():
                what = (_cell(f"{event.host} → {event.peer}"), _cell(event.path))
            case NetworkChanged():
                what = (_cell(event.target), _cell(f"{event.what} {event.detail}".strip()))
            case Note():
                what = (_cell("note"), _cell(event.text))
            case _:
                continue
        yield [_cell(f"{event.at:.3f} s", "number"), *what]


def _event_table(events: Sequence[Event]) -> str:
    rows = list(itertools.islice(_event_rows(events), _MAX_TABLE_ROWS))
    if not rows:
        return ""
    return "<h2>Paths and changes</h2>" + _table(("when", "who", "what"), rows)


def _output(lines: Sequence[ProgramOutput]) -> str:
    shown = [f"{e.at:9.3f}  {e.program}: {e.line}" for e in lines[:_MAX_OUTPUT_LINES]]
    if len(lines) > _MAX_OUTPUT_LINES:
        shown.append(f"... and {len(lines) - _MAX_OUTPUT_LINES} more in timeline.jsonl")
    return escape("\n".join(shown))
