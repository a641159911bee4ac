"""The commands `verify` and `matrix`."""

from __future__ import annotations

import functools
import re
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import click
import msgspec
from rich.markup import escape

from netlab.choice import Wish, choose_back_end, enter_jail
from netlab.cli_common import (
    AS_EXPECTED,
    UNEXPECTED,
    backend_option,
    explain_errors,
    json_option,
    print_json,
    read_scenario,
    refuse,
    run_trio,
)
from netlab.labs import BackEnd
from netlab.matrix import MatrixResult, ProgramPair, run_matrix
from netlab.matrix_report import matrix_markdown, render_matrix
from netlab.program_pairs import program_pair, program_version
from netlab.punch import CLASSES
from netlab.run_directory import DEFAULT_PARENT
from netlab.scenario import find_nat
from netlab.terminal import console, error_console, matrix_table, verify_table
from netlab.verify import Finding, all_targets, preset_target, scenario_targets, verify


@click.command("verify")
@click.argument("scenario", required=False)
@click.option(
    "--nat", "names", multiple=True, help="Only this preset or class; may be given several times."
)
@backend_option
@json_option
@explain_errors
def verify_command(scenario: str | None, names: tuple[str, ...], wish: Wish, as_json: bool) -> None:
    """Measure every NAT of a SCENARIO against what it claims.

    A probe behind each NAT measures its class (see `underpass-lab presets`), how ports are given
    out, how long an idle mapping lives and what renews it, and whether inside hosts reach each
    other by external addresses (hairpin). Without SCENARIO: the nine classes of RFC 4787 and every
    preset. The exit status is 1 if one of them measures differently.
    """

    if scenario is not None and names:
        refuse("give either a scenario or --nat")
    if scenario is not None:
        targets = scenario_targets(read_scenario(scenario)[0].topology)
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
        print_json({"back_end": back_end, "seconds": round(seconds, 3), "findings": findings})
        sys.exit(UNEXPECTED if wrong else AS_EXPECTED)
    if error_console.is_terminal:
        error_console.print("\r" + " " * 40 + "\r", end="")
    console.print(verify_table(findings, back_end))
    for one in findings:
        why = one.skipped or "; ".join(one.disagreements)
        if why:
            console.print(f"[red]{escape(one.name)}[/]: {escape(why)}")
    skipped = sum(bool(finding.skipped) for finding in findings)
    measured = len(findings) - skipped
    console.print(
        f"\n{measured - len(wrong)} of {measured} as claimed on the {back_end} back end"
        + (f", {skipped} skipped" if skipped else "")
        + f", {seconds:.1f} s"
    )
    sys.exit(UNEXPECTED if wrong else AS_EXPECTED)


@click.command("matrix")
@click.option("--nat", "names", multiple=True, help="A preset or class for both sides.")
@click.option("--left-nat", "left_names", multiple=True, help="A preset or class for the left.")
@click.option("--right-nat", "right_names", multiple=True, help="The same for the right.")
@click.option(
    "--programs",
    "programs",
    multiple=True,
    metavar="NAME",
    help="A well-known pair: underpass or tailcat. Several are shown side by side.",
)
@click.option("--left", "left", help="The left program's command line, or module:function ARGS.")
@click.option("--right", "right", help="The right program's.")
@click.option("--ready", help="A line of the left one (a regular expression) to wait for.")
@click.option("--server", default="", help="A program that runs on the server for all pairs.")
@click.option("--server-ready", help="A line of it (a regular expression) to wait for.")
@click.option("--direct", default=r"^path \S+ direct", help="A line that tells a direct path.")
@click.option("--relay", default=r"^path \S+ relay", help="A line that tells a relayed path.")
@click.option("--timeout", "timeout", default=10.0, show_default=True, help="Seconds per pair.")
@click.option("--at-once", default=4, show_default=True, help="Pairs of programs at a time.")
@click.option("--seed", default=0, show_default=True, help="Decides addresses, ports and losses.")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    default=DEFAULT_PARENT / "matrix",
    show_default=True,
    help="Where matrix.json and matrix.html go, or NAME.json and NAME.html of --programs.",
)
@click.option("--markdown", is_flag=True, help="Print a table for a document.")
@backend_option
@json_option
@explain_errors
def matrix_command(
    names: tuple[str, ...],
    left_names: tuple[str, ...],
    right_names: tuple[str, ...],
    programs: tuple[str, ...],
    left: str | None,
    right: str | None,
    ready: str | None,
    server: str,
    server_ready: str | None,
    direct: str,
    relay: str,
    timeout: float,
    at_once: int,
    seed: int,
    output: Path,
    markdown: bool,
    wish: Wish,
    as_json: bool,
) -> None:
    """Run a pair of programs over every pair of NATs.

    Without programs the pair is simple punching, and the exit status is 1 if a pair comes out
    differently from the published table. Otherwise it is 1 if a pair finds no path at all.

    --programs names well-known pairs of nodes. --left and --right are the command lines of any
    others. Placeholders: ${left.address}, ${right.address}, ${server.address} (which offers STUN on
    port 3478), ${server.address2}, ${cell}, ${seed}, ${directory} (a new one, removed in the end),
    and ${left.NAME} and ${server.NAME} for the named groups of --ready and --server-ready.

    The nine classes are used unless --nat, or --left-nat and --right-nat, name others.
    """

    lefts = list(left_names or names or CLASSES)
    rights = list(right_names or names or CLASSES)
    if bool(left) != bool(right):
        refuse("--left and --right go together")
    if programs and left:
        refuse("give either --programs or --left and --right")
    if server and not left:
        refuse("--server is for the programs of --left and --right; give these too")
    if server_ready and not server:
        refuse("--server-ready is a line of the program that --server names; give this too")
    pairs: list[ProgramPair | None] = [None]
    needs_kernel = bool(programs)
    if programs:
        pairs = [program_pair(name, timeout) for name in dict.fromkeys(programs)]
    elif left is not None and right is not None:
        lines = {"--left": left, "--right": right} | ({"--server": server} if server else {})
        _check_command_lines(lines)
        pairs = [
            ProgramPair(
                left=left,
                right=right,
                ready=_maybe_pattern("--ready", ready),
                direct=_pattern("--direct", direct),
                relay=_pattern("--relay", relay),
                timeout_seconds=timeout,
                server=server,
                server_ready=_maybe_pattern("--server-ready", server_ready),
            )
        ]
        needs_kernel = not all(re.match(r"[\w.]+:\w+(\s|$)", line) for line in lines.values())
    back_end = choose_back_end(wish, needs_kernel=needs_kernel)
    if back_end is BackEnd.KERNEL:
        enter_jail()
    started = time.monotonic()
    done = 0

    def show(_: object) -> None:
        nonlocal done
        done += 1
        if not as_json and error_console.is_terminal:
            total = len(lefts) * len(rights) * len(pairs)
            error_console.print(f"\r{done} of {total} pairs", end="")

    async def go(pair: ProgramPair | None) -> Any:
        return await run_matrix(
            lefts, rights, back_end, pair=pair, at_once=at_once, seed=seed, on_cell=show
        )

    results: list[MatrixResult] = [
        run_trio(back_end, functools.partial(go, pair)) for pair in pairs
    ]
    pages = [
        output / f"{name}.html" for name in (programs and dict.fromkeys(programs)) or ["matrix"]
    ]
    try:
        output.mkdir(parents=True, exist_ok=True)
        for page, result in zip(pages, results, strict=True):
            encoded = msgspec.json.format(msgspec.json.encode(result))
            page.with_suffix(".json").write_bytes(encoded + b"\n")
            page.write_text(render_matrix(result), encoding="utf-8")
    except OSError as error:
        refuse(f"cannot write to {output}: {error.strerror}")
    if pairs == [None]:
        wrong = [cell for cell in results[0].cells if not cell.agrees]
    else:
        wrong = [cell for result in results for cell in result.cells if cell.path == "none"]
    if as_json:
        print_json(results[0] if len(results) == 1 else results)
        sys.exit(UNEXPECTED if wrong else AS_EXPECTED)
    if error_console.is_terminal:
        error_console.print("\r" + " " * 40 + "\r", end="")
    if markdown:
        click.echo(matrix_markdown(results))
    else:
        console.print(matrix_table(results))
    for cell in wrong:
        console.print(
            f"[red]{escape(cell.left)} - {escape(cell.right)}[/]: {cell.path}, "
            f"predicted {cell.expected} {escape(cell.problem)}"
        )
    for result, page in zip(results, pages, strict=True):
        direct_count = sum(cell.path == "direct" for cell in result.cells)
        agreeing = sum(cell.agrees for cell in result.cells)
        version = program_version(result.pair) + ": " if programs else ""
        console.print(
            f"\n{version}{direct_count} of {len(result.cells)} direct, {agreeing} as simple "
            f"punching predicts; {back_end} back end, {result.seconds:.1f} s; {page}"
        )
    if len(results) > 1:
        console.print(f"\nIn this order in each field. {time.monotonic() - started:.0f} s in all")
    sys.exit(UNEXPECTED if wrong else AS_EXPECTED)


def _pattern(option: str, text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        refuse(f"{option} is not a regular expression: {error}")


def _maybe_pattern(option: str, text: str | None) -> re.Pattern[str] | None:
    return None if text is None else _pattern(option, text)


def _check_command_lines(lines: dict[str, str]) -> None:
    for option, line in lines.items():
        try:
            words = shlex.split(line)
        except ValueError as error:
            refuse(f"{option}: {error}")
        if not words:
            refuse(f"{option} is empty")
