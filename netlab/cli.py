"""The `underpass-lab` command.

Exit statuses: 0 as expected; 1 measured and not as expected; 2 wrong use, file or back end;
130 interrupted.
"""

from __future__ import annotations

import os
import re
import shlex
import sys
import time
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, ParamSpec, TypeVar

import click
import msgspec
import trio
from rich.markup import escape
from rich.table import Table

from netlab.behavior import ModelError, suggest
from netlab.choice import BackEndError, Wish, choose_back_end, enter_jail
from netlab.labs import BackEnd, ProgramError
from netlab.model import Topology
from netlab.run_directory import (
    DEFAULT_PARENT,
    RunDirectoryError,
    SavedRun,
    latest_run,
    load_run,
    save_run,
)
from netlab.scenario import Scenario, ScenarioError, parse_scenario
from netlab.terminal import (
    LiveView,
    console,
    error_console,
    matrix_table,
    print_summary,
    verify_table,
)

if TYPE_CHECKING:
    from netlab.matrix import ProgramPair

_P = ParamSpec("_P")
_R = TypeVar("_R")

AS_EXPECTED, UNEXPECTED, WRONG_USE, INTERRUPTED = 0, 1, 2, 130


def _refuse(problem: object) -> NoReturn:
    error_console.print(f"[bold red]underpass-lab:[/] {escape(str(problem))}")
    sys.exit(WRONG_USE)


def _stop() -> NoReturn:
    error_console.print("underpass-lab: interrupted; the lab is gone and left nothing behind")
    sys.exit(INTERRUPTED)


def _explain_errors(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Show errors that the user can do something about as one line."""

    @wraps(function)
    def wrapped(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        from netlab.kernel.builder import BuildError
        from netlab.kernel.fabric_client import FabricError
        from netlab.kernel.jail import JailError
        from netlab.kernel.netfilter import NftError

        known = (ScenarioError, ModelError, BackEndError, ProgramError, RunDirectoryError)
        expected = (*known, BuildError, FabricError, JailError, NftError)
        try:
            return function(*args, **kwargs)
        except expected as error:
            _refuse(error)
        except BaseExceptionGroup as group:
            # Nurseries wrap what is raised in them, once for each.
            interrupts, others = group.split(KeyboardInterrupt)
            if interrupts is not None:
                _stop()
            if others is None or others.split(expected)[1] is not None:
                raise
            leaf: BaseException = others
            while isinstance(leaf, BaseExceptionGroup):
                leaf = leaf.exceptions[0]
            _refuse(leaf)
        except KeyboardInterrupt:
            _stop()

    return wrapped


def run_trio(back_end: BackEnd, function: Callable[..., Any], *args: object) -> Any:
    """Run a Trio function, in the simulated internet on a clock that jumps over idle time.

    The result is whatever the function returns, hence Any.
    """
    if back_end is BackEnd.KERNEL:
        return trio.run(function, *args)
    from trio.testing import MockClock

    return trio.run(function, *args, clock=MockClock(autojump_threshold=0))


def examples() -> dict[str, Path]:
    """Return the scenarios that come with the lab, by name."""
    folder = Path(__file__).parent / "scenarios"
    return {path.stem: path for path in sorted(folder.glob("*.toml"))}


def _read_scenario(name: str) -> tuple[Scenario, str]:
    """Read a file, or an example by its name."""
    path = Path(name)
    if not path.exists() and name in examples():
        path = examples()[name]
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        known = [*examples(), *(str(p) for p in Path().glob("*.toml"))]
        raise ScenarioError(
            f"there is no file {name} and no example of that name; {suggest(name, known)}"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ScenarioError(f"cannot read {name}: {error}") from error
    return parse_scenario(text, path.name), text


_backend = click.option(
    "--backend",
    "wish",
    type=click.Choice([wish.value for wish in Wish]),
    callback=lambda _context, _option, value: Wish(value),
    default=Wish.ANY.value,
    show_default=True,
    help="What makes the network; any means the kernel where it is possible.",
)
_json = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")


def _print_json(value: object) -> None:
    click.echo(msgspec.json.format(msgspec.json.encode(value)).decode())


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="underpass")
def main() -> None:
    """Any NAT, any network trouble, on a laptop, in CI and in simulation.

    A SCENARIO is a TOML file, or the name of an example (see `underpass-lab examples`). Two back
    ends run it: the kernel's namespaces, inside a jail that needs no root and leaks nothing, and
    an internet in memory with a virtual clock.
    """


@main.command("examples")
@_json
def examples_command(as_json: bool) -> None:
    """List the scenarios that come with the lab."""
    found = {
        name: path.read_text(encoding="utf-8").split("\n", 1)[0].lstrip("# ")
        for name, path in examples().items()
    }
    if as_json:
        _print_json(found)
        return
    for name, text in found.items():
        console.print(f"[bold]{name:<16}[/] {escape(text)}")


@main.command()
@click.argument("scenario")
@click.option("--commands", is_flag=True, help="Also print the ip and nft text.")
@_json
@_explain_errors
def plan(scenario: str, commands: bool, as_json: bool) -> None:
    """Print what a SCENARIO would build, and build nothing."""
    from netlab.plan import drawing, engines, plan_text

    found, _ = _read_scenario(scenario)
    if as_json:
        _print_json(_plan_data(found.topology))
        return
    if commands:
        click.echo(plan_text(found.topology), nl=False)
        return
    console.print(escape(drawing(found.topology)))
    table = Table(box=None, pad_edge=False, title_justify="left")
    for heading in ("NAT", "class", "ports", "idle UDP", "hairpin", "kernel engine"):
        table.add_column(heading, overflow="fold")
    try:
        chosen = engines(found.topology)
    except ModelError as error:
        chosen = {}
        console.print(f"[yellow]only on the simulated back end: {escape(str(error))}[/]")
    for nat in found.topology.nats:
        behavior = nat.behavior
        engine, reasons = chosen.get(nat.name, ("-", ()))
        table.add_row(
            nat.name,
            behavior.class_name,
            str(behavior.ports.assignment),
            f"{behavior.lifetimes.udp_seconds:g} s",
            str(behavior.hairpin),
            str(engine) + (f" ({'; '.join(reasons)})" if reasons else ""),
        )
    if found.topology.nats:
        console.print()
        console.print(table)
    for program in found.programs:
        what = shlex.join(program.command) or program.python
        console.print(f"run   {program.name} on {program.host}: {escape(what)}")
    for change in found.changes:
        console.print(f"at    {change.at_seconds:g} s: {change.action} {change.target} {change.to}")
    for expectation in found.expectations:
        console.print(
            f"expect within {expectation.within_seconds:g} s: {escape(str(expectation.that))}"
        )


def _plan_data(topology: Topology) -> object:
    from netlab.addresses import plan_addresses
    from netlab.kernel.wiring import plan_wiring

    addresses = plan_addresses(topology)

    def texts(values: Any) -> list[str]:
        return [str(value) for value in values]

    data: dict[str, object] = {
        "seed": topology.seed,
        "nats": {
            name: {
                "class": topology.nat_by_name[name].behavior.class_name,
                "behind": topology.nat_by_name[name].uplink.network,
                "external": texts((*p.outside.ipv4, *p.outside.ipv6)),
                "inside": texts(n for n in (p.inside_ipv4, p.inside_ipv6) if n),
            }
            for name, p in addresses.nats.items()
        },
        "hosts": {
            name: [{"network": p.network, "addresses": texts((*p.ipv4, *p.ipv6))} for p in plans]
            for name, plans in addresses.hosts.items()
        },
        "servers": {name: texts((*p.ipv4, *p.ipv6)) for name, p in addresses.servers.items()},
    }
    try:
        wiring = plan_wiring(topology)
    except ModelError as error:
        data["kernel"] = str(error)
        return data
    data["kernel"] = {
        name: {
            "rules": machine.rules,
            "sysctls": machine.sysctls,
            **({"engine": str(machine.router.engine)} if machine.router else {}),
        }
        for name, machine in wiring.machines.items()
    }
    return data


@main.command()
@_json
def doctor(as_json: bool) -> None:
    """Tell what this machine can do, and which way each feature will use.

    The exit status is 0 if the kernel back end works, 1 if only the simulated one does.
    """
    from netlab.choice import kernel_shortcomings
    from netlab.kernel.capabilities import examine

    found = examine()
    missing = kernel_shortcomings()
    if as_json:
        _print_json({"kernel_back_end": not missing, "capabilities": found})
        sys.exit(UNEXPECTED if missing else AS_EXPECTED)
    table = Table(box=None, pad_edge=False)
    for heading in ("feature", "", "used for", "note"):
        table.add_column(heading, overflow="fold")
    for one in found:
        mark = "[green]yes[/]" if one.available else "[red]no[/]"
        table.add_row(one.name, mark, escape(one.used), escape(one.why))
    console.print(table)
    if missing:
        console.print("\nThe simulated back end works here; the kernel's does not.")
        sys.exit(UNEXPECTED)
    console.print("\nBoth back ends work here.")


@main.command()
@click.argument("scenario")
@_backend
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    help=f"Where timeline, capture and report go.  [default: {DEFAULT_PARENT}/NAME]",
)
@click.option("--seed", type=int, help="Replace the scenario's seed.")
@click.option("-v", "--verbose", is_flag=True, help="Show every mapping and every drop.")
@_json
@_explain_errors
def run(
    scenario: str, wish: Wish, output: Path | None, seed: int | None, verbose: bool, as_json: bool
) -> None:
    """Run a SCENARIO, judge it, and write a report.

    A scenario with a [matrix] runs once for every pair. The exit status is 0 if every expectation
    held, 1 if one did not.
    """
    from dataclasses import replace

    from netlab.report import write_report

    found, text = _read_scenario(scenario)
    if seed is not None:
        found = replace(found, topology=replace(found.topology, seed=seed))
    back_end = choose_back_end(wish, needs_kernel=found.needs_kernel)
    if back_end is BackEnd.KERNEL:
        enter_jail()
    directory = output or DEFAULT_PARENT / Path(found.name).stem
    if found.matrix is not None:
        _run_cells(found, text, back_end, directory, as_json)
        return
    saved = _run_once(found, text, back_end, directory, show=not as_json, verbose=verbose)
    write_report(saved)
    if as_json:
        _print_json(saved.summary)
    else:
        print_summary(saved.summary)
        console.print(f"report: {directory / 'report.html'}")
    sys.exit(AS_EXPECTED if saved.summary.succeeded else UNEXPECTED)


def _run_once(
    scenario: Scenario, text: str, back_end: BackEnd, directory: Path, *, show: bool, verbose: bool
) -> SavedRun:
    from netlab.runner import run_scenario

    view = LiveView(mappings=verbose)
    unix_time = time.time()

    async def go() -> Any:
        return await run_scenario(scenario, back_end, watch=view.watch if show else None)

    result = run_trio(back_end, go)
    view.close()
    return save_run(directory, scenario, text, result, unix_time)


def _run_cells(
    scenario: Scenario, text: str, back_end: BackEnd, directory: Path, as_json: bool
) -> None:
    """Run every pair of a scenario's matrix and show a line for each."""
    from netlab.report import write_report

    rows = []
    for left, right, cell in scenario.cells():
        place = directory / f"{left}--{right}".replace("/", "_")
        saved = _run_once(cell, text, back_end, place, show=False, verbose=False)
        write_report(saved)
        summary = saved.summary
        rows.append({"left": left, "right": right, "summary": summary})
        if not as_json:
            mark = "[green]holds[/]" if summary.succeeded else "[bold red]fails[/]"
            console.print(f"{mark}  {left} - {right}  [dim]{summary.duration_seconds:.3g} s[/]")
            for check in summary.checks:
                if not check.succeeded:
                    console.print(f"       {escape(check.that)}: {escape(check.problem)}")
    if as_json:
        _print_json(rows)
    failed = [row for row in rows if not row["summary"].succeeded]  # type: ignore[attr-defined]
    if not as_json:
        console.print(f"{len(rows) - len(failed)} of {len(rows)} pairs as expected; {directory}/")
    sys.exit(UNEXPECTED if failed else AS_EXPECTED)


@main.command("verify")
@click.argument("scenario", required=False)
@click.option(
    "--nat", "names", multiple=True, help="Only this preset or class; may be given several times."
)
@_backend
@_json
@_explain_errors
def verify_command(scenario: str | None, names: tuple[str, ...], wish: Wish, as_json: bool) -> None:
    """Measure every NAT of a SCENARIO against what it claims.

    Without SCENARIO: the nine classes of RFC 4787 and every preset. The exit status is 1 if one
    of them measures differently. NATs that the back end cannot build are named and skipped.
    """
    from netlab.scenario import find_nat
    from netlab.verify import Finding, all_targets, preset_target, scenario_targets, verify

    if scenario is not None and names:
        _refuse("give either a scenario or --nat")
    if scenario is not None:
        targets = scenario_targets(_read_scenario(scenario)[0].topology)
    else:
        targets = [preset_target(find_nat(name)) for name in names] or all_targets()
    back_end = choose_back_end(wish)
    if back_end is BackEnd.KERNEL:
        enter_jail()
    started = time.monotonic()
    done = 0

    def show(finding: Finding) -> None:
        nonlocal done
        done += 1
        if not as_json and error_console.is_terminal:
            error_console.print(f"\r{done} of {len(targets)}  {finding.name:<24}", end="")

    async def go() -> Any:
        return await verify(targets, back_end, on_finding=show)

    findings: list[Finding] = run_trio(back_end, go)
    seconds = time.monotonic() - started
    wrong = [finding for finding in findings if not finding.agrees]
    if as_json:
        _print_json({"back_end": back_end, "seconds": round(seconds, 3), "findings": findings})
        sys.exit(UNEXPECTED if wrong else AS_EXPECTED)
    if error_console.is_terminal:
        error_console.print("\r" + " " * 40 + "\r", end="")
    console.print(verify_table(findings, back_end))
    skipped = sum(bool(finding.skipped) for finding in findings)
    measured = len(findings) - skipped
    console.print(
        f"\n{measured - len(wrong)} of {measured} as claimed on the {back_end} back end"
        + (f", {skipped} skipped" if skipped else "")
        + f", {seconds:.1f} s"
    )
    sys.exit(UNEXPECTED if wrong else AS_EXPECTED)


@main.command("matrix")
@click.option("--nat", "names", multiple=True, help="A preset or class for both sides.")
@click.option("--left-nat", "left_names", multiple=True, help="A preset or class for the left.")
@click.option("--right-nat", "right_names", multiple=True, help="The same for the right.")
@click.option("--left", "left", help="The left program's command line, or module:function ARGS.")
@click.option("--right", "right", help="The right program's.")
@click.option("--ready", help="A line of the left one (a regular expression) to wait for.")
@click.option("--direct", default=r"^path \S+ direct", help="A line that tells a direct path.")
@click.option("--relay", default=r"^path \S+ relay", help="A line that tells a relayed path.")
@click.option("--timeout", "timeout", default=10.0, show_default=True, help="Seconds per pair.")
@click.option("--at-once", default=4, show_default=True, help="Pairs of programs at a time.")
@click.option("--seed", default=0, show_default=True)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    default=DEFAULT_PARENT / "matrix",
    show_default=True,
    help="Where matrix.json and matrix.html go.",
)
@_backend
@_json
@_explain_errors
def matrix_command(
    names: tuple[str, ...],
    left_names: tuple[str, ...],
    right_names: tuple[str, ...],
    left: str | None,
    right: str | None,
    ready: str | None,
    direct: str,
    relay: str,
    timeout: float,
    at_once: int,
    seed: int,
    output: Path,
    wish: Wish,
    as_json: bool,
) -> None:
    """Run a pair of programs over every pair of NATs.

    Without --left and --right the pair is simple punching, and the exit status is 1 if a pair
    comes out differently from the published table. Otherwise these are the command lines of any
    programs, and it is 1 if a pair finds no path at all. Placeholders: ${left.address},
    ${right.address}, ${server.address} (which offers STUN on port 3478), ${cell}, ${seed}, and
    ${left.NAME} for the named groups of --ready.

    The nine classes are used unless --nat, or --left-nat and --right-nat, name others.
    """
    from netlab.matrix import MatrixResult, run_matrix
    from netlab.matrix_report import render_matrix
    from netlab.punch import CLASSES

    lefts = list(left_names or names or CLASSES)
    rights = list(right_names or names or CLASSES)
    if bool(left) != bool(right):
        _refuse("--left and --right go together")
    pair = None
    needs_kernel = False
    if left is not None and right is not None:
        pair = _program_pair(left, right, ready, direct, relay, timeout)
        needs_kernel = not all(re.match(r"[\w.]+:\w+(\s|$)", line) for line in (left, right))
    back_end = choose_back_end(wish, needs_kernel=needs_kernel)
    if back_end is BackEnd.KERNEL:
        enter_jail()
    started = time.monotonic()
    done = 0

    def show(_: object) -> None:
        nonlocal done
        done += 1
        if not as_json and error_console.is_terminal:
            error_console.print(f"\r{done} of {len(lefts) * len(rights)} pairs", end="")

    async def go() -> Any:
        return await run_matrix(
            lefts, rights, back_end, pair=pair, at_once=at_once, seed=seed, on_cell=show
        )

    result: MatrixResult = run_trio(back_end, go)
    try:
        output.mkdir(parents=True, exist_ok=True)
        encoded = msgspec.json.format(msgspec.json.encode(result))
        (output / "matrix.json").write_bytes(encoded + b"\n")
        (output / "matrix.html").write_text(render_matrix(result), encoding="utf-8")
    except OSError as error:
        _refuse(f"cannot write to {output}: {error.strerror}")
    if pair is None:
        wrong = [cell for cell in result.cells if not cell.agrees]
    else:
        wrong = [cell for cell in result.cells if cell.path == "none"]
    if as_json:
        _print_json(result)
        sys.exit(UNEXPECTED if wrong else AS_EXPECTED)
    if error_console.is_terminal:
        error_console.print("\r" + " " * 40 + "\r", end="")
    console.print(matrix_table(result))
    for cell in wrong:
        console.print(
            f"[red]{escape(cell.left)} - {escape(cell.right)}[/]: {cell.path}, "
            f"predicted {cell.expected} {escape(cell.problem)}"
        )
    direct_count = sum(cell.path == "direct" for cell in result.cells)
    agreeing = sum(cell.agrees for cell in result.cells)
    console.print(
        f"\n{direct_count} of {len(result.cells)} direct, {agreeing} as simple punching predicts; "
        f"{back_end} back end, {time.monotonic() - started:.1f} s; {output / 'matrix.html'}"
    )
    sys.exit(UNEXPECTED if wrong else AS_EXPECTED)


def _program_pair(
    left: str, right: str, ready: str | None, direct: str, relay: str, timeout: float
) -> ProgramPair:
    from netlab.matrix import ProgramPair

    def pattern(option: str, text: str) -> re.Pattern[str]:
        try:
            return re.compile(text)
        except re.error as error:
            _refuse(f"{option} is not a regular expression: {error}")

    for option, line in (("--left", left), ("--right", right)):
        try:
            words = shlex.split(line)
        except ValueError as error:
            _refuse(f"{option}: {error}")
        if not words:
            _refuse(f"{option} is empty")
    return ProgramPair(
        left=left,
        right=right,
        ready=None if ready is None else pattern("--ready", ready),
        direct=pattern("--direct", direct),
        relay=pattern("--relay", relay),
        timeout_seconds=timeout,
    )


def _saved(directory: Path | None) -> SavedRun:
    return load_run(directory if directory is not None else latest_run())


_directory = click.argument(
    "directory", required=False, type=click.Path(path_type=Path, file_okay=False)
)


@main.command()
@click.argument("a")
@click.argument("b")
@_directory
@_json
@_explain_errors
def explain(a: str, b: str, directory: Path | None, as_json: bool) -> None:
    """Tell why hosts A and B could or could not talk, from a saved run.

    DIRECTORY is what `underpass-lab run` wrote; without it the latest run is taken.
    """
    from netlab.explain import explain as join

    saved = _saved(directory)
    hosts = saved.scenario.topology.host_by_name
    for name in (a, b):
        if name not in hosts:
            _refuse(f'the run has no host "{name}"; {suggest(name, hosts)}')
    found = join(saved.scenario.topology, saved.events, a, b)
    if as_json:
        _print_json(found)
    else:
        console.print(escape(found.text))


@main.command()
@_directory
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    help="The file to write.  [default: report.html beside the run]",
)
@_explain_errors
def report(directory: Path | None, output: Path | None) -> None:
    """Write the HTML page of a saved run again."""
    from netlab.report import write_report

    path = write_report(_saved(directory), output)
    console.print(str(path))


@main.command()
@_directory
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    default=Path("capture.pcapng"),
    show_default=True,
)
@_explain_errors
def capture(directory: Path | None, output: Path) -> None:
    """Write a saved run's packets as pcapng, drop reasons as packet comments."""
    from netlab.pcap import write_timeline

    saved = _saved(directory)
    try:
        with output.open("wb") as file:
            count = write_timeline(saved.events, file, saved.summary.unix_time)
    except OSError as error:
        _refuse(f"cannot write {output}: {error.strerror}")
    console.print(f"{output}: {count} packets")


@main.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.argument("scenario")
@click.argument("host")
@click.argument("command", nargs=-1)
@_explain_errors
def shell(scenario: str, host: str, command: tuple[str, ...]) -> None:
    """Open a shell in HOST of a SCENARIO on the kernel back end.

    Services of the scenario run meanwhile; its programs, changes and expectations do not. With
    COMMAND, that runs instead of the shell, and its exit status is this one's.
    """
    from netlab.runner import run_services_around

    found, _ = _read_scenario(scenario)
    topology = found.topology
    known = [*topology.host_by_name, *topology.server_by_name, *topology.nat_by_name]
    if host not in known:
        _refuse(f'the scenario has no machine "{host}"; {suggest(host, known)}')
    choose_back_end(Wish.KERNEL)
    enter_jail()
    chosen = command or (os.environ.get("SHELL", "/bin/sh"),)
    if not command:
        console.print(f"[dim]a shell in {host}; leave it with exit[/]")
    sys.exit(trio.run(run_services_around, found, host, chosen))


@main.command()
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    default=DEFAULT_PARENT / "demo",
    show_default=True,
    help="Where timeline, capture and report go.",
)
@_backend
@_explain_errors
def demo(output: Path, wish: Wish) -> None:
    """Watch two nodes find each other: relay, direct, a router's power cut, recovery.

    Takes about 14 seconds, on the kernel's network where that is possible, else in simulation.
    """
    from netlab.demo import DemoView, tell_story
    from netlab.report import write_report
    from netlab.runner import run_scenario

    scenario, text = _read_scenario(str(examples()["demo"]))
    back_end = choose_back_end(wish)
    if back_end is BackEnd.KERNEL:
        enter_jail()
    unix_time = time.time()

    async def go(view: DemoView) -> Any:
        return await run_scenario(scenario, back_end, watch=view.watch)

    with DemoView(scenario.topology, back_end) as view:
        # A person watches: real time on either back end.
        result = trio.run(go, view)
    saved = save_run(output, scenario, text, result, unix_time)
    console.print(f"\n{escape(tell_story(scenario.topology, saved.events))}")
    for verdict in result.verdicts:
        if not verdict.succeeded:
            console.print(f"[bold red]fails[/] {escape(str(verdict.expectation.that))}")
    console.print(f"The whole story: {write_report(saved)}")
    sys.exit(AS_EXPECTED if result.succeeded else UNEXPECTED)


if __name__ == "__main__":
    main()
