"""The demonstration: a scenario that a person watches, with captions and a closing paragraph."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator, Sequence

from rich.console import Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from netlab.labs import BackEnd
from netlab.model import Topology
from netlab.plan import drawing
from netlab.terminal import LiveView, console
from netlab.timeline import (
    Event,
    LatencyMeasured,
    MappingBorn,
    NetworkChanged,
    PacketDropped,
    PathChanged,
)

_STYLES = {"direct": "bold green", "relay": "bold yellow", "none": "bold red"}
_BARS = "▁▂▃▄▅▆▇█"
_SAMPLES = 30


def _kind(path: str) -> str:
    return path.split()[0] if path.strip() else "none"


class DemoView:
    """Shows a run as it happens: the network above, the lines, and the paths at the bottom."""

    def __init__(self, topology: Topology, back_end: BackEnd) -> None:
        self._topology = topology
        self._lines = LiveView()
        self._paths: dict[tuple[str, str], str] = {}
        self._latencies: dict[tuple[str, str], deque[float]] = {}
        self._mappings = self._drops = 0
        self._told: set[str] = set()
        self._was_cut = False
        self._live = Live(console=console, auto_refresh=False, transient=True)
        console.print(escape(drawing(topology)))
        where = "the kernel's namespaces" if back_end is BackEnd.KERNEL else "a simulated internet"
        console.print(f"\n[dim]built in {where}; nothing of it reaches a real network[/]\n")

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
        self._lines.watch(event)
        match event:
            case PathChanged():
                self._paths[event.host, event.peer] = event.path
            case LatencyMeasured():
                series = self._latencies.setdefault(
                    (event.host, event.peer), deque(maxlen=_SAMPLES)
                )
                series.append(event.seconds * 1000)
            case MappingBorn():
                self._mappings += 1
            case PacketDropped():
                self._drops += 1
            case _:
                return
        if self._live.is_started:
            self._live.update(self._state(event.at), refresh=True)

    def _captions(self, event: Event) -> Iterator[str]:
        """Say what is going on, each thing once."""
        match event:
            case PathChanged() if _kind(event.path) == "relay" and not self._was_cut:
                yield from self._once("relay", "Relay first: they talk before any hole is open.")
            case PathChanged() if _kind(event.path) == "direct" and not self._was_cut:
                yield from self._once(
                    "direct", "Direct: both punched at once, and the hard NAT's new port was heard."
                )
            case NetworkChanged(what="cut"):
                self._was_cut = True
                yield f"The router {event.target} loses power; its mappings are gone with it."
            case NetworkChanged(what="heal"):
                yield f"{event.target} is back, and remembers nothing."
            case PathChanged() if _kind(event.path) == "relay":
                yield from self._once("relay again", "The relay carries them meanwhile.")
            case PathChanged() if _kind(event.path) == "direct":
                yield from self._once("direct again", "Direct again, through new mappings.")

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
    """Return one paragraph about what happened between two nodes."""
    paths = [event for event in events if isinstance(event, PathChanged)]
    changes = [event for event in events if isinstance(event, NetworkChanged)]
    drops = [event for event in events if isinstance(event, PacketDropped)]
    born = sum(isinstance(event, MappingBorn) for event in events)
    a, b = (host.name for host in topology.hosts[:2])
    nats = [topology.nats_towards_internet(h.uplinks[0].network)[0] for h in topology.hosts[:2]]
    sentences = [
        (
            f"{a} (behind {nats[0].name}, {nats[0].behavior.class_name}) and {b} (behind "
            f"{nats[1].name}, {nats[1].behavior.class_name})"
        )
    ]
    relay = _first(paths, a, "relay", 0.0)
    direct = _first(paths, a, "direct", 0.0)
    if relay is not None:
        sentences[0] += f" talked through the relay after {relay.at:.1f} s"
        sentences[0] += _round_trip(events, a, relay.at, direct.at if direct else None)
    if direct is not None:
        cut = next((c.at for c in changes if c.what == "cut"), None)
        sentences[0] += f" and directly after {direct.at:.1f} s"
        sentences[0] += _round_trip(events, a, direct.at, cut)
    sentences[0] += "."
    for change in changes:
        if change.what != "cut":
            continue
        back = next((c.at for c in changes if c.what == "heal" and c.at > change.at), None)
        if back is None:
            continue
        text = f"When {change.target} lost power for {back - change.at:.0f} s and all its mappings"
        again = _first(paths, a, "direct", back)
        relayed = _first(paths, a, "relay", change.at)
        if relayed is not None:
            text += f", they were back on the relay {relayed.at - back:.1f} s after it returned"
        if again is not None:
            text += f" and direct again after {again.at - back:.1f} s"
        sentences.append(text + ".")
    reasons = Counter(drop.reason.value for drop in drops).most_common(3)
    listed = ", ".join(f"{count} {reason}" for reason, count in reasons)
    sentences.append(
        f"{born} mappings were born, {len(drops)} packets dropped"
        + (f" ({listed})." if drops else ".")
    )
    return " ".join(sentences)


def _first(paths: Sequence[PathChanged], host: str, kind: str, after: float) -> PathChanged | None:
    return next(
        (p for p in paths if p.host == host and _kind(p.path) == kind and p.at > after), None
    )


def _round_trip(events: Sequence[Event], host: str, start: float, end: float | None) -> str:
    """Return the median round trip between two times, in brackets."""
    values = sorted(
        event.seconds
        for event in events
        if isinstance(event, LatencyMeasured)
        and event.host == host
        and event.at >= start
        and (end is None or event.at < end)
    )
    return f" ({values[len(values) // 2] * 1000:.0f} ms round trip)" if values else ""
