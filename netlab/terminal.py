"""What the commands show in a terminal: timeline lines as they happen, tables, verdicts."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from netlab.labs import BackEnd
from netlab.matrix import Cell, MatrixResult
from netlab.run_directory import Summary
from netlab.timeline import (
    Event,
    LatencyMeasured,
    MappingBorn,
    MappingDied,
    NetworkChanged,
    Note,
    PacketDropped,
    PathChanged,
    ProgramEnded,
    ProgramOutput,
)
from netlab.verify import Finding

# A file or a pipe has no width, and cutting tables to a terminal's would only lose words.
_WIDTH = None if sys.stdout.isatty() else 200
console = Console(highlight=False, soft_wrap=True, width=_WIDTH)
error_console = Console(stderr=True, highlight=False, soft_wrap=True)


def event_line(event: Event, *, mappings: bool = True) -> str | None:
    """Return an event as one line with markup; None for what nobody could read live."""
    match event:
        case PathChanged():
            kind = event.path.split()[0] if event.path else "none"
            style = {"direct": "bold green", "relay": "bold yellow"}.get(kind, "bold red")
            text = f"{event.host} reaches {event.peer}: [{style}]{escape(event.path)}[/]"
        case NetworkChanged():
            detail = f" ({escape(event.detail)})" if event.detail else ""
            text = f"[bold magenta]{event.what}[/] of {event.target}{detail}"
        case MappingBorn() if mappings:
            text = (
                f"[dim]{event.nat}: mapping {event.inside} -> {event.external} "
                f"for {event.remote}[/]"
            )
        case MappingDied() if mappings:
            text = f"[dim]{event.nat}: mapping {event.external} gone ({event.cause})[/]"
        case PacketDropped() if mappings:
            text = (
                f"[red]{event.where}: dropped {event.source} -> {event.destination}[/]"
                f"[dim]: {escape(event.text)}[/]"
            )
        case ProgramOutput():
            text = f"[cyan]{event.program}[/] {escape(event.line)}"
        case ProgramEnded():
            style = "dim" if event.status == 0 else "red"
            text = f"[{style}]{event.program} ended with status {event.status}[/]"
        case Note():
            text = f"[italic]{escape(event.text)}[/]"
        case _:
            return None
    return f"[dim]{event.at:9.3f}[/]  {text}"


class LiveView:
    """Prints a timeline as it grows.

    A line that says the same as the one before about the same place is counted, not repeated.
    Program output that was understood (a path, a latency) shows once, as what it means.
    """

    def __init__(self, *, mappings: bool = False) -> None:
        self._mappings = mappings
        self._held: ProgramOutput | None = None
        self._drops: dict[tuple[str, str], int] = {}

    def watch(self, event: Event) -> None:
        """Take one event, as a sink of a timeline."""
        held, self._held = self._held, None
        if held is not None and not isinstance(event, PathChanged | LatencyMeasured):
            self._print(held)
        match event:
            case ProgramOutput():
                self._held = event
            case PacketDropped():
                key = (event.where, event.reason)
                self._drops[key] = self._drops.get(key, 0) + 1
                if self._drops[key] == 1 or self._mappings:
                    self._print(event, always=True)
            case _:
                self._print(event)

    def close(self) -> None:
        """Print what was held back."""
        held, self._held = self._held, None
        if held is not None:
            self._print(held)

    def _print(self, event: Event, *, always: bool = False) -> None:
        line = event_line(event, mappings=self._mappings or always)
        if line is not None:
            console.print(line)


def print_summary(summary: Summary) -> None:
    """Show the verdicts of a run."""
    if summary.checks:
        table = Table(box=None, pad_edge=False, show_header=False)
        for check in summary.checks:
            mark = "[green]holds[/]" if check.succeeded else "[bold red]fails[/]"
            when = f"at {check.at_seconds:.3f} s" if check.succeeded else check.problem
            table.add_row(mark, escape(check.that), f"[dim]{escape(when)}[/]")
        console.print(table)
    for problem in summary.problems:
        console.print(f"[bold red]problem[/]  {escape(problem)}")
    verdict = "[bold green]succeeded[/]" if summary.succeeded else "[bold red]failed[/]"
    console.print(
        f"{summary.scenario} {verdict} on the {summary.back_end} back end, "
        f"{summary.duration_seconds:.3g} s, seed {summary.seed}"
    )


def verify_table(findings: Sequence[Finding], back_end: BackEnd) -> Table:
    """Return the table of `underpass-lab verify`."""
    table = Table(box=None, pad_edge=False)
    for heading in ("", "NAT", "claims", "measured", "idle UDP", "ports kept", "hairpin"):
        table.add_column(heading, no_wrap=heading in ("", "NAT", "claims"))
    if back_end is BackEnd.KERNEL:
        table.add_column("engine")
    for one in findings:
        mark = "[green]agrees[/]" if one.agrees else "[bold red]differs[/]"
        if one.skipped:
            mark = "[yellow]skipped[/]"
        lifetime = "" if one.lifetime_seconds is None else f"{one.lifetime_seconds:.3g} s"
        kept = {True: "yes", False: "no", None: ""}[one.preserves_ports]
        row = [mark, one.name, one.claims, one.measured, lifetime, kept, one.hairpin or ""]
        if back_end is BackEnd.KERNEL:
            row.append(one.engine)
        table.add_row(*row)
    return table


def matrix_table(results: Sequence[MatrixResult]) -> Table:
    """Return the table of `underpass-lab matrix`; several results stand side by side, a single one
    marks what simple punching does not predict."""
    cells = [{(cell.left, cell.right): cell for cell in result.cells} for result in results]
    table = Table(box=None, pad_edge=False)
    table.add_column("")
    for right in results[0].right:
        table.add_column(right.replace("+", "+\n"), justify="right")
    for left in results[0].left:
        row = []
        for right in results[0].right:
            here = [by_pair[left, right] for by_pair in cells]
            text = " / ".join(map(_matrix_cell, here))
            mark = "" if len(results) > 1 or here[0].agrees else "[bold red]![/]"
            row.append(text + mark)
        table.add_row(left, *row)
    return table


def _matrix_cell(cell: Cell) -> str:
    style = {"direct": "green", "relay": "yellow"}.get(cell.path, "bold red")
    time = f"{cell.seconds * 1000:.0f} ms" if cell.seconds is not None else cell.path
    return f"[{style}]{time}[/]"
