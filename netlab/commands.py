"""The commands of `underpass-lab`; `netlab.cli` is the way to them.

Exit statuses: 0 as expected; 1 measured and not as expected; 2 wrong use, file or back end;
130 interrupted.
"""

from __future__ import annotations

import os
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import click
import trio
from rich.markup import escape
from rich.table import Table

from netlab.behavior import ModelError, suggest
from netlab.choice import Wish, choose_back_end, enter_jail
from netlab.cli_common import (
    AS_EXPECTED,
    UNEXPECTED,
    backend_option,
    examples,
    explain_errors,
    json_option,
    print_json,
    read_scenario,
    refuse,
    run_trio,
)
from netlab.cli_measuring import matrix_command, verify_command
from netlab.labs import BackEnd
from netlab.model import Topology
from netlab.run_directory import DEFAULT_PARENT, SavedRun, latest_run, load_run, save_run
from netlab.runner import DEFAULT_SNAP_BYTES
from netlab.scenario import Scenario
from netlab.terminal import LiveView, console, print_summary


@click.group()
def commands() -> None:
    """All of them; `netlab.cli` is what people call."""


@commands.command("examples")
@json_option
def examples_command(as_json: bool) -> None:
    """List the scenarios that come with the lab."""
    found = {
        name: path.read_text(encoding="utf-8").split("\n", 1)[0].lstrip("# ")
        for name, path in examples().items()
    }
    if as_json:
        print_json(found)
        return
    for name, text in found.items():
        console.print(f"[bold]{name:<16}[/] {escape(text)}")


@commands.command("presets")
@json_option
def presets_command(as_json: bool) -> None:
    """List the NATs and links that scenarios can name.

    A class such as EIM+APDF says how a NAT maps and filters UDP, in the words of RFC 4787. Mapping,
    which destinations see one external port: EIM all of them, ADM those at one address, APDM each
    address and port its own ("symmetric", hard to punch). Filtering, who may send in: EIF
    everybody, ADF addresses that were sent to, APDF addresses and ports that were sent to.
    `class = "EIM+APDF"` works in scenarios as well.
    """
    from netlab.plan import describe_link
    from netlab.presets import link_presets, nat_presets

    nats, links = nat_presets(), link_presets()
    if as_json:
        print_json(
            {
                "nats": {
                    name: {"claims": preset.claims, "seen_on": preset.seen_on}
                    for name, preset in nats.items()
                },
                "links": {name: describe_link(link) for name, link in links.items()},
            }
        )
        return
    for name, preset in nats.items():
        console.print(f"[bold]{name:<19}[/] {preset.claims:<10} {escape(preset.seen_on)}")
    console.print("\nLinks, each way:")
    for name, link in links.items():
        console.print(f"[bold]{name:<19}[/] {escape(describe_link(link)) or 'nothing'}")


@commands.command(short_help="Print what a SCENARIO would build; build nothing.")
@click.argument("scenario")
@click.option("--commands", is_flag=True, help="As commands of ip and nft instead.")
@json_option
@explain_errors
def plan(scenario: str, commands: bool, as_json: bool) -> None:
    """Print what a SCENARIO would build, and build nothing."""
    from netlab.plan import drawing, engines, plan_text

    found, _ = read_scenario(scenario)
    if as_json:
        print_json(_plan_data(found.topology))
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


@commands.command(short_help="Tell what this machine can do, and what is missing.")
@json_option
def doctor(as_json: bool) -> None:
    """Tell what this machine can do, how the lab uses it, and how to get what is missing.

    The exit status is 0 if the kernel back end works, 1 if only the simulated one does.
    """
    from netlab.choice import kernel_shortcomings
    from netlab.kernel.capabilities import examine

    found = examine()
    missing = kernel_shortcomings()
    if as_json:
        print_json({"kernel_back_end": not missing, "capabilities": found})
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


@commands.command()
@click.argument("scenario")
@backend_option
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    help=f"Where timeline, capture and report go.  [default: {DEFAULT_PARENT}/NAME]",
)
@click.option("--seed", type=int, help="Replace the scenario's seed.")
@click.option("-v", "--verbose", is_flag=True, help="Show every mapping and every drop.")
@click.option(
    "--snap",
    "snap_bytes",
    type=click.IntRange(0, 65535),
    default=DEFAULT_SNAP_BYTES,
    show_default=True,
    help="Bytes of each packet's contents that the capture keeps; 0: headers only.",
)
@json_option
@explain_errors
def run(
    scenario: str,
    wish: Wish,
    output: Path | None,
    seed: int | None,
    verbose: bool,
    snap_bytes: int,
    as_json: bool,
) -> None:
    """Run a SCENARIO, judge it, and write a report.

    A scenario with a [matrix] runs once for every pair. The exit status is 0 if every expectation
    held, 1 if one did not.
    """
    from dataclasses import replace

    from netlab.report import write_report

    found, text = read_scenario(scenario)
    if seed is not None:
        found = replace(found, topology=replace(found.topology, seed=seed))
    back_end = choose_back_end(wish, needs_kernel=found.needs_kernel)
    if back_end is BackEnd.KERNEL:
        enter_jail()
    directory = output or DEFAULT_PARENT / Path(found.name).stem
    if found.matrix is not None:
        _run_cells(found, text, back_end, directory, snap_bytes, as_json)
        return
    view = LiveView(mappings=verbose)
    saved = _run_once(found, text, back_end, directory, snap_bytes, None if as_json else view)
    view.close()
    write_report(saved)
    if as_json:
        print_json(saved.summary)
    else:
        print_summary(saved.summary)
        console.print(f"report: {directory / 'report.html'}")
    sys.exit(AS_EXPECTED if saved.summary.succeeded else UNEXPECTED)


def _run_once(
    scenario: Scenario,
    text: str,
    back_end: BackEnd,
    directory: Path,
    snap_bytes: int,
    view: LiveView | None,
) -> SavedRun:
    from netlab.runner import run_scenario

    unix_time = time.time()
    watch = view.watch if view is not None else None

    async def go() -> Any:
        return await run_scenario(scenario, back_end, watch=watch, snap_bytes=snap_bytes)

    result = run_trio(back_end, go)
    return save_run(directory, scenario, text, result, unix_time)


def _run_cells(
    scenario: Scenario,
    text: str,
    back_end: BackEnd,
    directory: Path,
    snap_bytes: int,
    as_json: bool,
) -> None:
    """Run every pair of a scenario's matrix and show a line for each."""
    from netlab.report import write_report

    rows = []
    for cell in scenario.cells():
        assert cell.cell is not None
        left, right = cell.cell
        place = directory / f"{left}--{right}".replace("/", "_")
        saved = _run_once(cell, text, back_end, place, snap_bytes, None)
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
        print_json(rows)
    failed = [row for row in rows if not row["summary"].succeeded]  # type: ignore[attr-defined]
    if not as_json:
        console.print(f"{len(rows) - len(failed)} of {len(rows)} pairs as expected; {directory}/")
    sys.exit(UNEXPECTED if failed else AS_EXPECTED)


def _saved(directory: Path | None) -> SavedRun:
    return load_run(directory if directory is not None else latest_run())


_directory = click.argument(
    "directory", required=False, type=click.Path(path_type=Path, file_okay=False)
)


@commands.command(short_help="Tell why two hosts of a run could or could not talk.")
@click.argument("a")
@click.argument("b")
@_directory
@json_option
@explain_errors
def explain(a: str, b: str, directory: Path | None, as_json: bool) -> None:
    """Tell why hosts A and B could or could not talk, from a saved run.

    DIRECTORY is what `underpass-lab run` wrote; without it the latest run is taken.
    """
    from netlab.explain import explain as join

    saved = _saved(directory)
    hosts = saved.scenario.topology.host_by_name
    for name in (a, b):
        if name not in hosts:
            refuse(f'the run has no host "{name}"; {suggest(name, hosts)}')
    found = join(saved.scenario.topology, saved.events, a, b)
    if as_json:
        print_json(found)
    else:
        console.print(escape(found.text))


@commands.command()
@_directory
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    help="The file to write.  [default: report.html beside the run]",
)
@json_option
@explain_errors
def report(directory: Path | None, output: Path | None, as_json: bool) -> None:
    """Write the HTML page of a saved run again.

    DIRECTORY is what `underpass-lab run` wrote; without it the latest run is taken.
    """
    from netlab.report import write_report

    path = write_report(_saved(directory), output)
    if as_json:
        print_json({"file": str(path)})
    else:
        console.print(str(path))


@commands.command(short_help="Write a run's packets for Wireshark, with drop reasons.")
@_directory
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    default=Path("capture.pcapng"),
    show_default=True,
    help="The file to write.",
)
@json_option
@explain_errors
def capture(directory: Path | None, output: Path, as_json: bool) -> None:
    """Write a saved run's packets as pcapng, with the reason of each drop as a comment.

    DIRECTORY is what `underpass-lab run` wrote; without it the latest run is taken.
    """
    from netlab.pcap import write_timeline

    saved = _saved(directory)
    try:
        with output.open("wb") as file:
            count = write_timeline(saved.events, file, saved.summary.unix_time)
    except OSError as error:
        refuse(f"cannot write {output}: {error.strerror}")
    if as_json:
        print_json({"file": str(output), "packets": count})
    else:
        console.print(f"{output}: {count} packets")


@commands.command(
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False}
)
@click.argument("scenario")
@click.argument("host")
@click.argument("command", nargs=-1)
@explain_errors
def shell(scenario: str, host: str, command: tuple[str, ...]) -> None:
    """Open a shell in HOST of a SCENARIO on the kernel back end.

    Services of the scenario run meanwhile; its programs, changes and expectations do not. With
    COMMAND, that runs instead of the shell, and its exit status is this one's.
    """
    from netlab.runner import run_services_around

    found, _ = read_scenario(scenario)
    topology = found.topology
    known = [*topology.host_by_name, *topology.server_by_name, *topology.nat_by_name]
    if host not in known:
        refuse(f'the scenario has no machine "{host}"; {suggest(host, known)}')
    choose_back_end(Wish.KERNEL)
    enter_jail()
    if command[:1] == ("--",):
        command = command[1:]
    chosen = command or (os.environ.get("SHELL", "/bin/sh"),)
    if not command:
        console.print(f"[dim]a shell in {host}; leave it with exit[/]")
    sys.exit(trio.run(run_services_around, found, host, chosen))


@commands.command(short_help="Watch nodes behind NATs find each other. Start here.")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    default=DEFAULT_PARENT / "demo",
    show_default=True,
    help="Where timeline, capture and report go.",
)
@backend_option
@json_option
@explain_errors
def demo(output: Path, wish: Wish, as_json: bool) -> None:
    """Watch Underpass nodes find each other: relay, direct, a router's power cut, recovery.

    A relay and three nodes run behind two easy NATs and a hard one: as processes in network
    namespaces where the kernel allows it, else in a simulated internet. Takes 20 seconds.
    """
    from netlab.demo import DemoView, tell_story
    from netlab.report import write_report
    from netlab.runner import run_scenario

    scenario, text = read_scenario(str(examples()["demo"]))
    back_end = choose_back_end(wish)
    if back_end is BackEnd.KERNEL:
        enter_jail()
    unix_time = time.time()

    async def go(view: DemoView) -> Any:
        return await run_scenario(scenario, back_end, watch=view.watch)

    if as_json:
        saved = _run_once(scenario, text, back_end, output, DEFAULT_SNAP_BYTES, None)
        write_report(saved)
        print_json(saved.summary)
        sys.exit(AS_EXPECTED if saved.summary.succeeded else UNEXPECTED)
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


commands.add_command(verify_command)
commands.add_command(matrix_command)
