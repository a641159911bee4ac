"""What a run leaves behind: one directory that `report`, `explain` and `capture` read again.

scenario.toml   the text of the scenario
timeline.jsonl  every event
summary.json    verdicts, problems, seed, back end
plan.txt        what was built, as ip and nft text
capture.pcapng  the packets, with drop reasons as comments
report.html     the same for a person
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from netlab.labs import BackEnd
from netlab.packet_watch import join_drops
from netlab.pcap import write_timeline
from netlab.plan import plan_text
from netlab.runner import RunResult
from netlab.scenario import Scenario
from netlab.scenario_file import ScenarioError, parse_scenario
from netlab.timeline import Event, TimelineError, read_jsonl, write_jsonl

DEFAULT_PARENT = Path("lab-results")


class RunDirectoryError(Exception):
    """A directory holds no run that can be read; the message says what is wrong."""


class Check(msgspec.Struct, frozen=True):
    """One expectation and what became of it."""

    that: str
    succeeded: bool
    at_seconds: float
    problem: str


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """A run in short."""

    scenario: str
    cell: tuple[str, str] | None
    """Which pair of the scenario's matrix this was."""
    back_end: BackEnd
    seed: int
    succeeded: bool
    duration_seconds: float
    unix_time: float
    checks: list[Check]
    problems: list[str]
    events: int
    forgotten_events: int


@dataclass(frozen=True, slots=True)
class SavedRun:
    """A run as read back."""

    directory: Path
    scenario: Scenario
    summary: Summary
    events: list[Event]


def summarize(scenario: Scenario, result: RunResult, unix_time: float) -> Summary:
    """Return the run in short."""
    return Summary(
        scenario=scenario.name,
        cell=scenario.cell,
        back_end=result.back_end,
        seed=scenario.topology.seed,
        succeeded=result.succeeded,
        duration_seconds=round(result.duration_seconds, 6),
        unix_time=unix_time,
        checks=[
            Check(str(v.expectation.that), v.succeeded, round(v.at_seconds, 6), v.problem)
            for v in result.verdicts
        ],
        problems=result.problems,
        events=len(result.timeline),
        forgotten_events=result.timeline.forgotten,
    )


def save_run(
    directory: Path, scenario: Scenario, text: str, result: RunResult, unix_time: float
) -> SavedRun:
    """Write everything but the report, over what was there.

    Raises:
        RunDirectoryError: the directory cannot be written.
    """
    summary = summarize(scenario, result, unix_time)
    # The kernel's packets, mappings and drops come from different sources.
    events = join_drops(result.timeline)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "scenario.toml").write_text(text, encoding="utf-8")
        (directory / "plan.txt").write_text(plan_text(scenario.topology), encoding="utf-8")
        encoded = msgspec.json.format(msgspec.json.encode(summary))
        (directory / "summary.json").write_bytes(encoded + b"\n")
        with (directory / "timeline.jsonl").open("wb") as file:
            write_jsonl(events, file)
        with (directory / "capture.pcapng").open("wb") as file:
            write_timeline(events, file, unix_time)
    except OSError as error:
        raise RunDirectoryError(f"cannot write to {directory}: {error.strerror}") from error
    return SavedRun(directory, scenario, summary, events)


def load_run(directory: Path) -> SavedRun:
    """Read a run back.

    Raises:
        RunDirectoryError: there is none, or its files are damaged.
    """
    try:
        text = (directory / "scenario.toml").read_text(encoding="utf-8")
        summary = msgspec.json.decode((directory / "summary.json").read_bytes(), type=Summary)
        scenario = parse_scenario(text, summary.scenario)
        if scenario.matrix is not None:
            scenario = next(cell for cell in scenario.cells() if cell.cell == summary.cell)
        topology = replace(scenario.topology, seed=summary.seed)
        scenario = replace(scenario, topology=topology)
        with (directory / "timeline.jsonl").open("rb") as file:
            events = list(read_jsonl(file))
    except OSError as error:
        raise RunDirectoryError(
            f"{error.filename}: {error.strerror}; give the directory that `underpass-lab run` wrote"
        ) from error
    except StopIteration:
        raise RunDirectoryError(f"{directory} is of no pair of its own scenario") from None
    except (msgspec.DecodeError, ScenarioError, TimelineError, UnicodeDecodeError) as error:
        raise RunDirectoryError(f"{directory} is damaged: {error}") from error
    return SavedRun(directory, scenario, summary, events)


def latest_run(parent: Path = DEFAULT_PARENT) -> Path:
    """Return the run that was written last.

    Raises:
        RunDirectoryError: there is none.
    """
    found = [path.parent for path in parent.glob("*/timeline.jsonl")]
    if not found:
        raise RunDirectoryError(f"there is no run below {parent}/; give a directory")
    return max(found, key=lambda path: (path / "timeline.jsonl").stat().st_mtime)
