"""The demonstration: a scenario that a person watches, with captions and a closing paragraph."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator, Sequence
from itertools import combinations

from rich.console import Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from netlab.drops import DropReason
from netlab.labs import BackEnd
from netlab.model import Topology
from netlab.plan import drawing
from netlab.prediction import predict_outcome, simple_path
from netlab.terminal import LiveView, console
from netlab.timeline import (
    Event,
    LatencyMeasured,
    MappingBorn,
    NetworkChanged,
    PacketDropped,
    PathChanged,
    ProgramEnded,
    ProgramOutput,
)

_STYLES = {"direct": "bold green", "relay": "bold yellow", "none": "bold red"}
_BARS = "▁▂▃▄▅▆▇█"
_SAMPLES = 30
# What a program said last, should it end badly.
_LAST_LINES = 12


def _kind(path: str) -> str:
    return path.split()[0] if path.strip() else "none"


class DemoView:
    """Shows a run as it happens: the network above, the lines, and the paths at the bottom."""

    def __init__(self, topology: Topology, back_end: BackEnd) -> None:
        self._topology = topology
        self._lines = LiveView()
        self._output: dict[str, deque[str]] = {}
        self._paths: dict[tuple[str, str], str] = {}
        self._latencies: dict[tuple[str, str], deque[float]] = {}
        self._mappings = self._drops = 0
        self._told: set[str] = set()
        self._was_cut = False
        self._live = Live(console=console, auto_refresh=False, transient=True)
        console.print(escape(drawing(topology)))
        where = "the kernel's namespaces" if back_end is BackEnd.KERNEL else "a simulated internet"
        console.print(f"\n[dim]built in {where}; nothing of it reaches a real network[/]")
        hosts = ", ".join(host.name for host in topology.hosts)
        console.print(f"[dim]starting a relay, and nodes on {hosts} ...[/]")

    def __enter__(self) -> DemoView:
        if console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._lines.close()
        self._live.stop()

    def watch(self, event: Event) -> None:
        """Take one event, as a sink of a timeline."""
        for caption in self._captions(event):
            console.print(f"\n[bold]{caption}[/]")
        match event:
            case ProgramOutput():
                if event.program not in self._output:
                    console.print(f"[dim]{event.at:9.3f}  {event.program} is up[/]")
                lines = self._output.setdefault(event.program, deque(maxlen=_LAST_LINES))
                lines.append(event.line)
            case ProgramEnded() if event.status > 0:
                console.print(escape("\n".join(self._output.get(event.program, ()))))
                self._lines.watch(event)
            case PacketDropped():
                self._drops += 1
                if event.reason is DropReason.FILTERED:
                    self._lines.watch(event)
            case MappingBorn():
                self._mappings += 1
            case PathChanged():
                self._paths[event.host, event.peer] = event.path
                self._lines.watch(event)
            case LatencyMeasured():
                series = self._latencies.setdefault(
                    (event.host, event.peer), deque(maxlen=_SAMPLES)
                )
                series.append(event.seconds * 1000)
            case NetworkChanged():
                self._lines.watch(event)
            case _:
                return
        if self._live.is_started and self._paths:
            self._live.update(self._state(event.at), refresh=True)

    def _captions(self, event: Event) -> Iterator[str]:
        """Say what is going on, each thing once."""
        match event:
            case ProgramOutput() if event.line.startswith("ready"):
                yield from self._once("ready", "The nodes have met the relay, and say hello by it.")
            case PathChanged() if _kind(event.path) == "relay" and not self._was_cut:
                yield from self._once("relay", "Relay first: they talk before any hole is open.")
            case PathChanged() if _kind(event.path) == "direct" and not self._was_cut:
                if self._is_hard(event):
                    pair = " and ".join(sorted((event.host, event.peer)))
                    text = f"Direct even between {pair}: ports of the hard NAT were searched."
                    yield from self._once("hard", text)
                else:
                    text = "Direct: holes are punched, the relay carries nothing any more."
                    yield from self._once("direct", text)
            case NetworkChanged(what="cut"):
                self._was_cut = True
                yield f"The router {event.target} loses power; its mappings are gone with it."
            case NetworkChanged(what="heal"):
                yield f"{event.target} is back, and remembers nothing."
            case PathChanged() if _kind(event.path) == "relay":
                yield from self._once("relay again", "The direct paths are dead: to the relay.")
            case PathChanged() if _kind(event.path) == "direct":
                yield from self._once("direct again", "Direct again, through new mappings.")

    def _is_hard(self, event: PathChanged) -> bool:
        """Whether simple punching cannot work for this pair."""
        outcome = predict_outcome(self._topology, event.host, event.peer)
        return simple_path(outcome) == "relay"

    def _once(self, key: str, text: str) -> Iterator[str]:
        if key not in self._told:
            self._told.add(key)
            yield text

    def _state(self, at: float) -> RenderableType:
        table = Table(box=None, pad_edge=False, show_header=False)
        for pair, path in sorted(self._paths.items()):
            series = self._latencies.get(pair, deque())
            text = Text(path, style=_STYLES.get(_kind(path), "bold"))
            last = f"{series[-1]:.0f} ms" if series else ""
            table.add_row(f"{pair[0]} → {pair[1]}", text, last, Text(_sparkline(series), "cyan"))
        counts = f"[dim]{at:.1f} s   {self._mappings} mappings   {self._drops} packets dropped[/]"
        return Panel(Group(table, counts), title="paths", title_align="left", expand=False)


def _sparkline(values: Sequence[float]) -> str:
    highest = max(values, default=0.0)
    if not highest:
        return ""
    return "".join(_BARS[min(7, int(value / highest * 7.99))] for value in values)


def tell_story(topology: Topology, events: Sequence[Event]) -> str:
    """Return one paragraph about what happened between the nodes."""
    sentences: list[str] = []
    for a, b in combinations((host.name for host in topology.hosts), 2):
        sentences += _meeting(topology, events, a, b)
    for cut in events:
        if isinstance(cut, NetworkChanged) and cut.what == "cut":
            sentences += _recovery(events, cut)
    drops = [event for event in events if isinstance(event, PacketDropped)]
    born = sum(isinstance(event, MappingBorn) for event in events)
    reasons = Counter(drop.reason.value for drop in drops).most_common(3)
    listed = ", ".join(f"{count} {reason}" for reason, count in reasons)
    sentences.append(
        f"{born} mappings were born, {len(drops)} packets dropped"
        + (f" ({listed})." if drops else ".")
    )
    return " ".join(sentences)


def _meeting(topology: Topology, events: Sequence[Event], a: str, b: str) -> Iterator[str]:
    """Say how a pair found its first direct path."""
    cut = next((e.at for e in events if isinstance(e, NetworkChanged) and e.what == "cut"), None)
    relay = _first(events, a, b, "relay", 0.0)
    direct = _first(events, a, b, "direct", 0.0)
    if relay is None and direct is None:
        yield f"{a} and {b} never met."
        return
    places = [
        f"{name} (behind {nat.name}, {nat.behavior.class_name})"
        for name in (a, b)
        for nat in topology.nats_towards_internet(topology.host_by_name[name].uplinks[0].network)[
            :1
        ]
    ]
    text = " and ".join(places)
    if relay is not None:
        text += " met by the relay" + _round_trip(
            events, a, b, relay.at, direct.at if direct else cut
        )
    if direct is None or (cut is not None and direct.at > cut and relay is not None):
        yield text + " and stayed on it."
        return
    took = f" {direct.at - relay.at:.2g} s later" if relay is not None else ""
    text += f"{' and' if relay is not None else ''} were direct{took}"
    yield text + _round_trip(events, a, b, direct.at, cut) + "."


def _recovery(events: Sequence[Event], cut: NetworkChanged) -> Iterator[str]:
    """Say what a router's power cut did to the paths that led through it."""
    back = next(
        (
            e.at
            for e in events
            if isinstance(e, NetworkChanged)
            and (e.what, e.target) == ("heal", cut.target)
            and e.at > cut.at
        ),
        None,
    )
    if back is None:
        return
    text = f"When {cut.target} lost power for {back - cut.at:.0f} s, and all its mappings"
    again = [
        event
        for event in events
        if isinstance(event, PathChanged) and event.at > back and _kind(event.path) == "direct"
    ]
    if again:
        first = again[0]
        text += f", {first.host} and {first.peer} were direct again {first.at - back:.2g} s after"
        text += " it came back"
    else:
        text += ", no direct path came back before the end"
    yield text + "."


def _first(events: Sequence[Event], a: str, b: str, kind: str, after: float) -> PathChanged | None:
    """Return the first time after which either of a pair had a kind of path."""
    return next(
        (
            event
            for event in events
            if isinstance(event, PathChanged)
            and {event.host, event.peer} == {a, b}
            and _kind(event.path) == kind
            and event.at > after
        ),
        None,
    )


def _round_trip(events: Sequence[Event], a: str, b: str, start: float, end: float | None) -> str:
    """Return the median round trip between two times, in brackets."""
    values = sorted(
        event.seconds
        for event in events
        if isinstance(event, LatencyMeasured)
        and {event.host, event.peer} == {a, b}
        and event.at >= start
        and (end is None or event.at < end)
    )
    return f" ({values[len(values) // 2] * 1000:.0f} ms round trip)" if values else ""
