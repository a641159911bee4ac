"""`underpass-relay top`: who uses a relay, live, from its admin listener."""

from __future__ import annotations

import ssl
import sys
from bisect import bisect_left
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Final
from urllib.parse import urlsplit

import click
import msgspec
import trio
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from relay.admin import read_admin_token
from relay.config_sources import ConfigError
from relay.edge.view import EdgeView
from relay.figures import bits_text, bytes_text, count_text, seconds_text
from relay.http_client import HttpError, get
from relay.snapshot import ClientView, QueueDelay, Snapshot, Traffic

DEFAULT_URL: Final = "http://127.0.0.1:9090"
TIMEOUT_SECONDS: Final = 5.0
MAX_SNAPSHOT_BYTES: Final = 4 << 20
"""A thousand clients take 500 KB."""

_HEADER_LINES: Final = 9


class TopError(Exception):
    """No snapshot came; the text says why, and what to do."""


@dataclass(frozen=True, slots=True)
class Source:
    """Where snapshots come from: an admin listener and its token (empty for none)."""

    url: str
    token: str

    async def fetch(self) -> Snapshot:
        """The newest snapshot. Raises TopError."""
        headers = [("Authorization", f"Bearer {self.token}")] if self.token else []
        try:
            response = await get(
                f"{self.url}/api/snapshot",
                headers,
                timeout_seconds=TIMEOUT_SECONDS,
                tls=ssl.create_default_context(),
                max_bytes=MAX_SNAPSHOT_BYTES,
            )
        except HttpError as error:
            raise TopError(
                f"no answer from {self.url}: {error}; is the relay running, and is this its "
                "listen.admin? (--url says another)"
            ) from None
        if response.status == 401:
            raise TopError(f"{self.url} asks for the admin token; name its file by --token-file")
        if response.status != 200:
            text = response.body.decode(errors="replace").strip()
            raise TopError(f"{self.url} answers with status {response.status}: {text[:200]}")
        try:
            return msgspec.json.decode(response.body, type=Snapshot)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise TopError(
                f"what {self.url} sends is no snapshot of a relay of this version: {error}"
            ) from None


@click.command("top")
@click.option("--url", default=DEFAULT_URL, show_default=True, help="The relay's admin listener.")
@click.option(
    "--token-file",
    type=click.Path(dir_okay=False),
    help="Holds the admin token, if the relay asks for one.",
)
@click.option(
    "--interval",
    type=click.FloatRange(0.2, 3600),
    default=2.0,
    show_default=True,
    help="Seconds between two looks.",
)
@click.option("--once", is_flag=True, help="Look, print, and end.")
@click.option("--json", "as_json", is_flag=True, help="Snapshots as JSON, one a line.")
def top_command(
    url: str, token_file: str | None, interval: float, once: bool, as_json: bool
) -> None:
    """Show who uses a relay, how much, what is dropped and why; Ctrl-C ends it.

    Clients are listed by what they moved since the last look.
    """
    try:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.port == 0:
            raise ValueError
    except ValueError:
        raise click.BadParameter(f"{url} is no http(s) URL", param_hint="--url") from None
    try:
        source = Source(url.rstrip("/"), read_admin_token(token_file) if token_file else "")
        if as_json:
            trio.run(_print_json, source, interval, once)
        elif once:
            trio.run(_print_once, source, interval)
        else:
            trio.run(_watch, source, interval)
    except (TopError, ConfigError) as error:
        raise click.ClickException(str(error)) from None
    except KeyboardInterrupt:
        pass


async def _print_json(source: Source, interval: float, once: bool) -> None:
    while True:
        sys.stdout.write(msgspec.json.encode(await source.fetch()).decode() + "\n")
        sys.stdout.flush()
        if once:
            return
        await trio.sleep(interval)


async def _print_once(source: Source, interval: float) -> None:
    """Two looks, since rates need them."""
    before = await source.fetch()
    await trio.sleep(interval)
    Console().print(render(before, await source.fetch(), rows=None))


async def _watch(source: Source, interval: float) -> None:
    console = Console()
    before = latest = await source.fetch()
    problem = ""
    with Live(console=console, screen=console.is_terminal, auto_refresh=False) as live:
        while True:
            rows = max(1, console.height - _HEADER_LINES)
            live.update(render(before, latest, rows=rows, problem=problem), refresh=True)
            await trio.sleep(interval)
            try:
                before, latest, problem = latest, await source.fetch(), ""
            except TopError as error:  # it may come back
                problem = str(error)


# --- Figures -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ClientRates:
    """What one client did between two snapshots, per second."""

    client: ClientView
    bytes_in: float
    bytes_out: float
    packets: float
    drops: float


def client_rates(before: Snapshot, after: Snapshot) -> list[ClientRates]:
    """Of all listed clients, those who moved most first."""
    elapsed = _elapsed(before, after)
    earlier = {(client.key, client.address, client.port): client for client in before.clients}
    rates = []
    for client in after.clients:
        was = earlier.get((client.key, client.address, client.port))
        if was is not None and was.bytes_in + was.bytes_out > client.bytes_in + client.bytes_out:
            was = None  # it has connected again
        rates.append(
            ClientRates(
                client,
                bytes_in=(client.bytes_in - (was.bytes_in if was else 0)) / elapsed,
                bytes_out=(client.bytes_out - (was.bytes_out if was else 0)) / elapsed,
                packets=(
                    client.packets_in
                    + client.packets_out
                    - (was.packets_in + was.packets_out if was else 0)
                )
                / elapsed,
                drops=(client.packets_dropped - (was.packets_dropped if was else 0)) / elapsed,
            )
        )
    rates.sort(key=lambda each: each.bytes_in + each.bytes_out, reverse=True)
    return rates


def delay_quantile(before: QueueDelay, after: QueueDelay, quantile: float) -> float | None:
    """The bucket's upper end, in seconds; infinite above all bounds, None without packets."""
    counts = [new - old for new, old in zip(after.counts, before.counts, strict=True)]
    cumulative = list(accumulate(counts))
    if cumulative[-1] <= 0:
        return None
    index = bisect_left(cumulative, quantile * cumulative[-1])
    return (*after.bounds_seconds, float("inf"))[index]


def _elapsed(before: Snapshot, after: Snapshot) -> float:
    return max(after.unix_time - before.unix_time, 0.001)


# --- The screen ----------------------------------------------------------------------------------


def render(
    before: Snapshot, after: Snapshot, *, rows: int | None, problem: str = ""
) -> RenderableType:
    """What is shown; `rows` bounds the list of clients."""
    parts: list[RenderableType] = [_title(after)]
    if problem:
        parts.append(Text(problem, style="bold red"))
    parts += _summary(before, after)
    if after.edge is not None:
        parts.append(_edge_table(before.edge, after.edge, _elapsed(before, after), rows))
    parts.append(_client_table(client_rates(before, after)[:rows]))
    return Group(*parts)


def _title(snapshot: Snapshot) -> Text:
    title = Text(snapshot.hostname, style="bold")
    title.append(f"  up {seconds_text(snapshot.uptime_seconds)}", style="dim")
    if snapshot.workers > 1:
        title.append(f", {snapshot.workers} workers", style="dim")
    if snapshot.is_draining:
        title.append("  draining", style="bold yellow")
    if snapshot.pump_problem:
        title.append(f"  {snapshot.pump_problem}", style="bold red")
    return title


def _summary(before: Snapshot, after: Snapshot) -> Iterator[Text]:
    elapsed = _elapsed(before, after)
    now, was = after.traffic, before.traffic
    connections = after.connections
    yield Text(
        f"{connections.current} clients, {connections.home} at home here; "
        f"{connections.waiting_packets} packets ({bytes_text(connections.waiting_bytes)}) wait; "
        f"memory {bytes_text(after.resources.memory_bytes)}, "
        f"CPU {100 * (after.resources.cpu_seconds - before.resources.cpu_seconds) / elapsed:.0f} %"
    )
    delays = [
        delay_quantile(before.queue_delay, after.queue_delay, quantile) for quantile in (0.5, 0.99)
    ]
    yield Text(
        f"{bits_text((now.bytes_sent - was.bytes_sent) / elapsed)} and "
        f"{count_text((now.packets_sent - was.packets_sent) / elapsed)} packets/s delivered; "
        f"queue delay p50 {_delay_text(delays[0])}, p99 {_delay_text(delays[1])}"
    )
    yield _counts_line("dropped", _by_reason(was), _by_reason(now), elapsed)
    yield _counts_line("refused", before.refusals, after.refusals, elapsed)


def _by_reason(traffic: Traffic) -> dict[str, int]:
    return {reason: sum(kinds.values()) for reason, kinds in traffic.packets_dropped.items()}


def _counts_line(
    title: str, before: Mapping[str, int], after: Mapping[str, int], elapsed: float
) -> Text:
    """How much per second now, and how much since the start."""
    rates = {name: (count - before.get(name, 0)) / elapsed for name, count in after.items()}
    shown = ", ".join(f"{name} {count_text(rate)}/s" for name, rate in rates.items() if rate > 0)
    line = Text(f"{title}: ", style="" if shown else "dim")
    line.append(shown or "nothing", style="red" if shown else "dim")
    total = ", ".join(f"{name} {count_text(count)}" for name, count in after.items() if count)
    if total:
        line.append(f"; since the start {total}", style="dim")
    return line


def _delay_text(delay_seconds: float | None) -> str:
    if delay_seconds is None:
        return "none"
    if delay_seconds == float("inf"):
        return "above 2 s"
    return f"up to {1000 * delay_seconds:g} ms"


def _client_table(rates: list[ClientRates]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim", expand=True)
    for title in ("key", "address", "what"):
        table.add_column(title, no_wrap=True)
    for title in ("connected", "in", "out", "packets/s", "drops/s", "waiting", "total"):
        table.add_column(title, justify="right", no_wrap=True)
    for each in rates:
        client = each.client
        table.add_row(
            Text(client.short),
            Text(client.address or "unknown"),
            _marks(client),
            seconds_text(client.connected_seconds),
            bits_text(each.bytes_in),
            bits_text(each.bytes_out),
            count_text(each.packets),
            Text(count_text(each.drops), style="red" if each.drops > 0 else ""),
            bytes_text(client.waiting_bytes),
            bytes_text(client.bytes_in + client.bytes_out),
        )
    return table


def _edge_table(
    before: EdgeView | None, after: EdgeView, elapsed: float, rows: int | None
) -> Table:
    """Half of the screen at most is for tunnels."""
    table = Table(box=None, pad_edge=False, header_style="dim", expand=True)
    table.add_column("tunnel", no_wrap=True)
    for title in ("connections", "now", "requests/s", "failed/s", "in", "out"):
        table.add_column(title, justify="right", no_wrap=True)
    earlier = {each.id: each for each in before.tunnels} if before is not None else {}
    for tunnel in after.tunnels[: None if rows is None else max(1, rows // 2)]:
        was = earlier.get(tunnel.id, tunnel)
        failed = (tunnel.errors - was.errors) / elapsed
        table.add_row(
            Text(tunnel.name),
            Text(str(tunnel.connections), style="" if tunnel.connections else "red"),
            count_text(tunnel.requests_active),
            count_text((tunnel.requests - was.requests) / elapsed),
            Text(count_text(failed), style="red" if failed > 0 else ""),
            bits_text((tunnel.bytes_in - was.bytes_in) / elapsed),
            bits_text((tunnel.bytes_out - was.bytes_out) / elapsed),
        )
    return table


def _marks(client: ClientView) -> Text:
    marks = (
        (client.is_home, "home"),
        (client.is_mesh, "mesh"),
        (client.is_prober, "prober"),
        (client.is_held_back, "limited"),
    )
    return Text(" ".join(text for is_set, text in marks if is_set), style="dim")
