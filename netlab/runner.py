"""Running a scenario on either back end: services, programs, changes, expectations.

result = await run_scenario(scenario, BackEnd.SIMULATED)
assert result.succeeded
"""

from __future__ import annotations

import math
import re
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field

import trio

from netlab.behavior import ModelError
from netlab.expressions import ExpressionError
from netlab.labs import BackEnd, Lab, ProgramError, open_lab
from netlab.model import Topology
from netlab.observations import Observations
from netlab.scenario import PLACEHOLDER, Action, Change, Expectation, Program, Scenario
from netlab.services import run_service
from netlab.timeline import (
    Event,
    LatencyMeasured,
    Note,
    PathChanged,
    ProgramEnded,
    ProgramOutput,
    Timeline,
)

DEFAULT_SNAP_BYTES = 512
"""Enough for whole STUN and disco messages, and the beginnings of everything else."""

# What a program's exception shows as when it runs inside the simulated internet.
_CRASHED = 1


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of one expectation."""

    expectation: Expectation
    succeeded: bool
    at_seconds: float
    """When that was known."""
    problem: str = ""


@dataclass(slots=True)
class RunResult:
    """A finished run."""

    topology: Topology
    back_end: BackEnd
    timeline: Timeline
    verdicts: list[Verdict] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    """What went wrong apart from expectations: a program that never got ready, say."""
    duration_seconds: float = 0.0

    @property
    def succeeded(self) -> bool:
        return not self.problems and all(verdict.succeeded for verdict in self.verdicts)


async def run_scenario(
    scenario: Scenario,
    back_end: BackEnd,
    *,
    watch: Callable[[Event], None] | None = None,
    snap_bytes: int = DEFAULT_SNAP_BYTES,
) -> RunResult:
    """Build the scenario's network, run it to its end, and judge it.

    Args:
        scenario: what to run; a matrix must have been expanded (`Scenario.cells`).
        back_end: where.
        watch: gets every event as it happens.
        snap_bytes: how much of each packet's contents the timeline keeps; 0: headers only.

    Raises:
        ProgramError: the back end cannot run the scenario's programs at all.
        JailError, BuildError, FabricError: the kernel back end cannot be built here.
    """
    if scenario.needs_kernel and back_end is BackEnd.SIMULATED:
        raise ProgramError(
            f"{scenario.name} runs command lines, which needs the kernel back end; "
            "see what stands in its way with `underpass-lab doctor`"
        )
    # What programs left in their directory goes when they are dead, so after the lab.
    with ExitStack() as files:
        async with open_lab(
            scenario.topology,
            back_end,
            adjustable=scenario.adjustable,
            snap_bytes=snap_bytes,
            name_servers=scenario.name_servers,
        ) as lab:
            run = _Run(scenario, lab, files)
            lab.timeline.sinks.append(run.observe)
            if watch is not None:
                lab.timeline.sinks.append(watch)
            return await run.to_its_end()


class _Run:
    def __init__(self, scenario: Scenario, lab: Lab, files: ExitStack) -> None:
        self._scenario = scenario
        self._lab = lab
        self._files = files
        self._directory = ""
        self._observations = Observations(scenario.topology)
        self._wake = trio.Event()
        self._groups: dict[str, str] = {}
        self._running = 0
        # From when the scenario's times count, once that is known, on the lab's clock.
        self._zero: float | None = None if scenario.count_from_ready else 0.0
        self._all_started = trio.Event()
        self._result = RunResult(lab.topology, lab.back_end, lab.timeline)

    def observe(self, event: Event) -> None:
        """Take note of an event of the timeline."""
        self._observations.add(event)
        self._wake.set()

    async def to_its_end(self) -> RunResult:
        """Run until everything is decided, all programs have ended, or the time is over."""
        scenario, lab = self._scenario, self._lab
        with trio.CancelScope() as self._scope:
            if self._zero is not None:
                self._limit_duration(self._zero)
            async with trio.open_nursery() as nursery:
                for service in scenario.services:
                    await nursery.start(run_service, lab, service)
                nursery.start_soon(self._carry_out_changes)
                nursery.start_soon(self._start_programs, nursery)
                await self._judge()
                nursery.cancel_scope.cancel()
        decided = {id(verdict.expectation) for verdict in self._result.verdicts}
        for expectation in scenario.expectations:
            if id(expectation) not in decided:
                self._decide(expectation, expectation.throughout)
        order = {id(expectation): i for i, expectation in enumerate(scenario.expectations)}
        self._result.verdicts.sort(key=lambda verdict: order[id(verdict.expectation)])
        self._result.duration_seconds = lab.now()
        return self._result

    def _limit_duration(self, zero: float) -> None:
        left = zero + self._scenario.duration_seconds - self._lab.now()
        self._scope.deadline = trio.current_time() + max(0.0, left)

    # --- programs ------------------------------------------------------------------------

    async def _start_programs(self, nursery: trio.Nursery) -> None:
        for program in self._scenario.programs:
            ready = trio.Event()
            self._running += 1  # here, as the run is over when all have started and none runs
            nursery.start_soon(self._run_program, program, ready)
            if program.ready is None:
                continue
            with trio.move_on_after(program.ready_seconds) as waited:
                await ready.wait()
            if waited.cancelled_caught:
                self._problem(
                    f'program "{program.name}" printed no line that matches '
                    f'"{program.ready.pattern}" within {program.ready_seconds:g} s'
                )
        if self._zero is None:
            self._zero = self._lab.now()
            self._limit_duration(self._zero)
        self._all_started.set()
        self._wake.set()

    async def _run_program(self, program: Program, ready: trio.Event) -> None:
        status = _CRASHED
        try:
            status = await self._lab.run_program(
                program.host,
                tuple(map(self._fill, program.command)),
                program.python,
                tuple(map(self._fill, program.arguments)),
                lambda line: self._hear(program, ready, line),
            )
        except (ProgramError, ModelError) as error:
            self._problem(f'program "{program.name}": {error}')
        except Exception as error:
            # A program's crash is a finding about the program, not the end of the run.
            self._hear(program, ready, f"{type(error).__name__}: {error}")
        finally:
            self._running -= 1
        ended = ProgramEnded(
            at=self._lab.now(), host=program.host, program=program.name, status=status
        )
        self._lab.timeline.add(ended)
        if status != 0 and not self._scenario.expectations:
            self._problem(f'program "{program.name}" ended with status {status}')

    def _hear(self, program: Program, ready: trio.Event, line: str) -> None:
        """Take one line of a program: what it says about readiness, paths and latencies."""
        now, add = self._lab.now(), self._lab.timeline.add
        add(ProgramOutput(at=now, host=program.host, program=program.name, line=line))
        if program.ready is not None and not ready.is_set():
            found = program.ready.search(line)
            if found is not None:
                for name, value in found.groupdict().items():
                    self._groups[f"{program.name}.{name}"] = value or ""
                ready.set()
        path = program.path.search(line)
        if path is not None:
            peer, kind = path["peer"], path["path"].strip()
            add(PathChanged(at=now, host=program.name, peer=peer, path=kind))
        latency = program.latency.search(line)
        if latency is not None:
            seconds = float(latency["milliseconds"]) / 1000
            peer = latency["peer"]
            add(LatencyMeasured(at=now, host=program.name, peer=peer, seconds=seconds))

    def _fill(self, text: str) -> str:
        """Replace the placeholders of an argument.

        Raises:
            ProgramError: the program that should have printed a value never did.
        """

        def value(found: re.Match[str]) -> str:
            name = found[1]
            if name == "seed":
                return str(self._scenario.topology.seed)
            if name == "directory":
                return self._make_directory()
            machine, _, attribute = name.rpartition(".")
            if attribute in ("address", "address6") and name not in self._groups:
                return self._lab.address(machine, ipv6=attribute == "address6")
            if attribute == "external" and name not in self._groups:
                return str(self._lab.external(machine)[0])
            if name not in self._groups:
                raise ProgramError(f'"{machine}" has not printed the value of ${{{name}}}')
            return self._groups[name]

        return PLACEHOLDER.sub(value, text)

    def _make_directory(self) -> str:
        if not self._directory:
            made = tempfile.TemporaryDirectory(prefix="underpass-lab-", ignore_cleanup_errors=True)
            self._directory = self._files.enter_context(made)
        return self._directory

    def _problem(self, text: str) -> None:
        self._result.problems.append(text)
        self._lab.timeline.add(Note(at=self._lab.now(), text=text))

    # --- changes -------------------------------------------------------------------------

    async def _carry_out_changes(self) -> None:
        if self._zero is None:
            await self._all_started.wait()
        for change in self._scenario.changes:
            await trio.sleep(max(0.0, change.at_seconds - self._time))
            try:
                apply_change(self._lab, change)
            except ModelError as error:
                self._problem(f"{change.action} at {change.at_seconds:g} s: {error}")

    @property
    def _time(self) -> float:
        """The scenario's time: below 0, whatever it says, as long as it doesn't count."""
        if self._zero is None:
            return -1.0
        # Rounded: a wait that ends a hair early must not lead to another one of no length.
        return round(self._lab.now() - self._zero, 6)

    # --- expectations --------------------------------------------------------------------

    async def _judge(self) -> None:
        """Decide expectations as events come in; return when there is nothing to wait for."""
        open_ones = list(self._scenario.expectations)
        while True:
            now = self._time
            open_ones = [one for one in open_ones if not self._is_decided(one, now)]
            if not open_ones and self._is_over():
                return
            self._wake = trio.Event()
            deadlines = [
                time
                for one in open_ones
                for time in (one.after_seconds, one.within_seconds)
                if time > now
            ]
            next_look = math.inf if self._zero is None else min(deadlines, default=math.inf)
            with trio.move_on_after(next_look - now):
                await self._wake.wait()

    def _is_over(self) -> bool:
        last_change = max((c.at_seconds for c in self._scenario.changes), default=0.0)
        if not self._all_started.is_set() or self._time < last_change:
            return False
        return bool(self._scenario.expectations) or (
            bool(self._scenario.programs) and not self._running
        )

    def _is_decided(self, expectation: Expectation, now: float) -> bool:
        if now < expectation.after_seconds:
            return False
        try:
            holds = bool(expectation.that.evaluate(self._observations.functions))
        except ExpressionError as error:
            self._decide(expectation, False, str(error))
            return True
        if holds != expectation.throughout:
            self._decide(expectation, holds)
            return True
        if now >= expectation.within_seconds:
            self._decide(expectation, expectation.throughout)
            return True
        return False

    def _decide(self, expectation: Expectation, succeeded: bool, problem: str = "") -> None:
        now = self._lab.now()
        if not succeeded and not problem:
            if expectation.throughout:
                problem = f"was not true at {now:.3f} s"
            else:
                problem = f"was not true within {expectation.within_seconds:g} s"
        self._result.verdicts.append(Verdict(expectation, succeeded, now, problem))
        word = "holds" if succeeded else "fails"
        self._lab.timeline.add(Note(at=now, text=f"expectation {word}: {expectation.that}"))


def apply_change(lab: Lab, change: Change) -> None:
    """Do to a running lab what a scenario says.

    Raises:
        ModelError: the lab cannot.
    """
    match change.action:
        case Action.NAT_REBOOT:
            lab.nat(change.target).reboot()
        case Action.NAT_RENUMBER:
            lab.renumber(change.target)
        case Action.NAT_LOGIN:
            lab.log_in(change.target, change.host)
        case Action.HOST_MOVE:
            lab.host(change.target).roam(change.to)
        case Action.HOST_DISCONNECT:
            lab.host(change.target).disconnect()
        case Action.LINK_CUT | Action.LINK_HEAL:
            heal = change.action is Action.LINK_HEAL
            lab.cut_or_heal(change.target, change.to or None, heal=heal)
        case Action.LINK_SET:
            assert change.link is not None
            lab.set_link(change.target, change.to or None, change.link)


async def run_services_around(scenario: Scenario, machine: str, command: tuple[str, ...]) -> int:
    """Run a command in a machine of the scenario's network, on this terminal; return its status.

    Raises:
        ProgramError: there is no such command.
    """
    async with (
        open_lab(scenario.topology, BackEnd.KERNEL, name_servers=scenario.name_servers) as lab,
        trio.open_nursery() as nursery,
    ):
        for service in scenario.services:
            await nursery.start(run_service, lab, service)
        status = await lab.run_on_terminal(machine, command)
        nursery.cancel_scope.cancel()
    return status
