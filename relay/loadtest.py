"""`underpass-relay loadtest`: how much a relay carries, with a load that is bounded and ends."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, replace
from typing import Final

import click
import trio
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from relay.load_clients import close_clients, connect_clients
from relay.load_pair import MIN_PACKET_BYTES, Load, LoadError
from relay.load_run import LoadResult, run_load
from relay.targets import TargetError, mesh_key_option, parse_target
from traversal.io.dial import CLIENT_INFO, DialError, Target
from traversal.keys import MeshKey
from traversal.wire.derp import MAX_PACKET_LENGTH

MAX_PREPARED_BYTES: Final = 512 << 20
"""What is sent is prepared in memory before the clock starts; a run ends when it is used up."""
OVERHEAD_BYTES: Final = 64
"""DERP header, keys and TLS record around a packet, about."""
MAX_PREPARED_PACKETS: Final = 2_000_000
GENERATOR_BOUND: Final = 0.9
"""Share of a core from which on the generator measures itself."""


@dataclass(frozen=True, slots=True)
class Report:
    """The outcome of one load test; latencies in seconds."""

    server: str
    pairs: int
    packet_bytes: int
    seconds: float
    packets_per_second: float
    bits_per_second: float
    latency_p50_seconds: float
    latency_p99_seconds: float
    latency_p999_seconds: float
    packets_sent: int
    packets_lost: int
    packets_shed: int
    connections_per_second: float
    generator_bound: bool


def run_test(
    target: Target, load: Load, *, pairs: int, seconds: float, mesh_key: MeshKey | None
) -> Report:
    """Connect the clients, run the load, close them. Raises DialError, LoadError."""
    with Progress(console=Console(stderr=True), transient=True) as progress:
        connecting = progress.add_task("connecting", total=2 * pairs)
        began = time.monotonic()
        clients = trio.run(
            lambda: connect_clients(
                target,
                2 * pairs,
                info=replace(CLIENT_INFO, mesh_key=mesh_key),
                on_progress=lambda count: progress.update(connecting, completed=count),
            )
        )
        connected = 2 * pairs / (time.monotonic() - began)
        progress.update(connecting, description="connected")
        sending = progress.add_task("preparing", total=seconds)
        try:
            result = run_load(
                clients,
                load,
                seconds=seconds,
                on_progress=lambda received, elapsed: progress.update(
                    sending, description=f"{received:,} packets arrived", completed=elapsed
                ),
            )
        finally:
            close_clients(clients)
    return report_of(str(target), pairs, result, connected)


def report_of(server: str, pairs: int, result: LoadResult, connected: float) -> Report:
    """The figures of a run."""
    return Report(
        server=server,
        pairs=pairs,
        packet_bytes=result.packet_bytes,
        seconds=result.seconds,
        packets_per_second=result.packets_per_second,
        bits_per_second=result.bits_per_second,
        latency_p50_seconds=result.latency_seconds(0.5),
        latency_p99_seconds=result.latency_seconds(0.99),
        latency_p999_seconds=result.latency_seconds(0.999),
        packets_sent=result.sent,
        packets_lost=result.lost,
        packets_shed=result.shed,
        connections_per_second=connected,
        generator_bound=result.generator_load >= GENERATOR_BOUND,
    )


@click.command("loadtest")
@click.argument("server")
@click.option("--pin", default="", help="Its certificate's pin, sha256-raw:...")
@click.option("--insecure", is_flag=True, help="Accept any certificate.")
@mesh_key_option
@click.option(
    "--pairs",
    type=click.IntRange(1, 10_000),
    default=10,
    show_default=True,
    help="Pairs of clients, a sender and a receiver each.",
)
@click.option(
    "--size",
    "packet_bytes",
    type=click.IntRange(MIN_PACKET_BYTES, MAX_PACKET_LENGTH),
    default=1400,
    show_default=True,
    help="Bytes in each packet.",
)
@click.option(
    "--rate",
    type=click.FloatRange(1, 1e7),
    help="Packets per second of all pairs together; without it, as fast as answers come.",
)
@click.option(
    "--window",
    type=click.IntRange(1, 1000),
    default=16,
    show_default=True,
    help="Without --rate: packets of a pair that may be under way.",
)
@click.option(
    "--seconds",
    type=click.FloatRange(0.1, 600),
    default=5.0,
    show_default=True,
    help="How long at most.",
)
@click.option("--json", "as_json", is_flag=True, help="The figures as JSON.")
def loadtest_command(
    server: str,
    pin: str,
    insecure: bool,
    mesh_key: MeshKey | None,
    pairs: int,
    packet_bytes: int,
    rate: float | None,
    window: int,
    seconds: float,
    as_json: bool,
) -> None:
    """Send packets between pairs of clients through SERVER and measure what arrives.

    SERVER is host, host:port or https://host:port (http:// for one without TLS). Every packet is
    verified. The relay has to admit clients with new keys, or be shown its mesh key, which also
    exempts the clients from its rate limits. A relay in use is slowed down meanwhile:
    choose --rate and --seconds with care. A run may end before its time: what is sent is prepared
    in memory, 512 MiB at most.
    """
    try:
        target = parse_target(server, pin=pin, insecure=insecure)
    except TargetError as error:
        raise click.UsageError(str(error)) from None
    packets = min(MAX_PREPARED_PACKETS, MAX_PREPARED_BYTES // (packet_bytes + OVERHEAD_BYTES))
    if rate is not None:
        packets = min(packets, int(rate * seconds) + pairs)
    load = Load(packet_bytes, packets, window=window, rate=rate)
    try:
        report = run_test(target, load, pairs=pairs, seconds=seconds, mesh_key=mesh_key)
    except (DialError, LoadError) as error:
        raise click.ClickException(str(error)) from None
    if as_json:
        click.echo(json.dumps(asdict(report), indent=2))
    else:
        Console().print(_table_of(report))


def _table_of(report: Report) -> Table:
    table = Table(title=report.server, show_header=False)
    lines = {
        "load": f"{report.pairs} pairs, {report.packet_bytes} bytes a packet",
        "measured": f"{report.seconds:.2f} s",
        "arrived": f"{report.packets_per_second:,.0f} packets/s, "
        f"{report.bits_per_second / 1e6:,.0f} Mbit/s",
        "latency": f"{1000 * report.latency_p50_seconds:.2f} ms median, "
        f"{1000 * report.latency_p99_seconds:.2f} ms at 99 %, "
        f"{1000 * report.latency_p999_seconds:.2f} ms at 99.9 %",
        "lost": f"{report.packets_lost:,} of {report.packets_sent:,} packets",
        "not taken": f"{report.packets_shed:,} packets were due and the server took no more",
        "connected": f"{report.connections_per_second:,.0f} clients per second",
    }
    if not report.packets_shed:
        del lines["not taken"]
    for name, text in lines.items():
        table.add_row(name, text)
    if report.generator_bound:
        table.caption = "this program was the bottleneck: the relay can do more"
    return table
