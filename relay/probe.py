"""`underpass-relay probe`: look at DERP servers from outside, ours or not."""

from __future__ import annotations

import json
import sys
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Final

import click
import trio
from rich.console import Console
from rich.table import Table

from relay.probe_checks import (
    FAILURES,
    Found,
    ProbeError,
    check_bandwidth,
    check_handshakes,
    check_http,
    check_path,
    check_ping,
    check_queue_delay,
    check_stun,
    check_tls,
)
from relay.targets import TargetError, mesh_key_option, parse_node, read_relay_map
from traversal.io.dial import Target
from traversal.keys import MeshKey
from traversal.relay_map import RelayNode
from traversal.wire.derp import PROTOCOL_VERSION, ClientInfo

DEFAULT_TIMEOUT_SECONDS: Final = 15.0
REACHABLE: Final = "TLS"
"""The check without which the others of a relay make no sense."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """One check of one node (or of a path between two)."""

    node: str
    check: str
    passed: bool
    text: str
    values: dict[str, object] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Check:
    """A check to run; `relays` are the nodes whose relay it needs."""

    node: str
    name: str
    run: Callable[[], Awaitable[Found | None]]
    relays: tuple[str, ...] = ()


def plan(
    nodes: list[RelayNode], *, plain: bool, load: bool, mesh_key: MeshKey | None = None
) -> Iterator[Check]:
    """The checks for some nodes, those of one region together; the ones with load come last.

    With the region's mesh key a relay lets us in that does not admit everybody.
    """
    info = ClientInfo(version=PROTOCOL_VERSION, is_prober=True, mesh_key=mesh_key)
    relays = {node.name: Target.of_node(node, plain=plain) for node in nodes if node.is_relay}
    regions = {node.name: node.region_id for node in nodes}
    for name, target in relays.items():
        yield Check(name, REACHABLE, partial(check_tls, target), (name,))
        yield Check(name, "handshake", partial(check_handshakes, target, info), (name,))
        yield Check(name, "ping", partial(check_ping, target, info), (name,))
        yield Check(name, "HTTP", partial(check_http, target), (name,))
    for node in nodes:
        yield Check(node.name, "STUN IPv4", partial(check_stun, node, 4))
        yield Check(node.name, "STUN IPv6", partial(check_stun, node, 6))
    for sender, sender_at in relays.items():
        for receiver, receiver_at in relays.items():
            if regions[sender] == regions[receiver]:
                run = partial(check_path, sender_at, receiver_at, info)
                yield Check(f"{sender} > {receiver}", "packet", run, (sender, receiver))
    if load:
        for name, target in relays.items():
            yield Check(name, "bandwidth", partial(check_bandwidth, target, info), (name,))
            yield Check(name, "queue delay", partial(check_queue_delay, target, info), (name,))


async def run_checks(
    checks: list[Check],
    timeout_seconds: float,
    on_start: Callable[[Check], None] = lambda _check: None,
) -> list[Outcome]:
    """Run one check after the other.

    What does not apply is left out, and so is what needs a relay that can't be reached at all.
    """
    outcomes = []
    unreachable: set[str] = set()
    for check in checks:
        if not unreachable.isdisjoint(check.relays):
            continue
        on_start(check)
        try:
            with trio.fail_after(timeout_seconds):
                found = await check.run()
        except FAILURES as error:
            text = (
                f"not done within {timeout_seconds:g} s"
                if isinstance(error, trio.TooSlowError)
                else getattr(error, "strerror", None) or str(error)
            )
            outcomes.append(Outcome(check.node, check.name, False, text))
            if check.name == REACHABLE and not isinstance(error, ProbeError):
                unreachable.add(check.node)
        else:
            if found is not None:
                values = dict(found.values)
                outcomes.append(Outcome(check.node, check.name, True, found.text, values))
    return outcomes


def _nodes_of_map(path: Path, region: int | None, names: tuple[str, ...]) -> list[RelayNode]:
    relay_map = read_relay_map(path)
    nodes = list(relay_map.nodes())
    if region is not None:
        nodes = [node for node in nodes if node.region_id == region]
        if not nodes:
            known = ", ".join(map(str, relay_map.regions)) or "none"
            raise TargetError(f"{path}: no region {region}; it has {known}")
    for name in names:
        if name not in (node.name for node in nodes):
            known = ", ".join(node.name for node in nodes) or "none"
            raise TargetError(f"{path}: no node {name!r}; there are {known}")
    nodes = [node for node in nodes if not names or node.name in names]
    if not nodes:
        raise TargetError(f"{path}: holds no node to probe")
    return nodes


@click.command("probe")
@click.argument("server", required=False)
@click.option(
    "--map",
    "map_path",
    type=click.Path(dir_okay=False, path_type=Path),
    help="A relay map (DERPMap JSON) instead of one SERVER.",
)
@click.option("--region", type=int, help="With --map: only this region.")
@click.option("--node", "names", multiple=True, help="With --map: only this node. May be repeated.")
@click.option("--pin", default="", help="With SERVER: its certificate's pin, sha256-raw:...")
@click.option("--insecure", is_flag=True, help="With SERVER: accept any certificate.")
@click.option(
    "--stun-port",
    type=click.IntRange(-1, 65535),
    default=3478,
    show_default=True,
    help="With SERVER; -1 for none.",
)
@mesh_key_option
@click.option("--load/--no-load", default=True, help="Bandwidth and queue delay, or not.")
@click.option("--json", "as_json", is_flag=True, help="The outcome as JSON.")
@click.option(
    "--timeout",
    "timeout_seconds",
    type=click.FloatRange(0.1, 600),
    default=DEFAULT_TIMEOUT_SECONDS,
    show_default=True,
    help="Seconds for each check.",
)
def probe_command(
    server: str | None,
    map_path: Path | None,
    region: int | None,
    names: tuple[str, ...],
    pin: str,
    insecure: bool,
    stun_port: int,
    mesh_key: MeshKey | None,
    load: bool,
    as_json: bool,
    timeout_seconds: float,
) -> None:
    """Check DERP servers from outside: TLS, handshake, HTTP, STUN, packets, bandwidth, delay.

    SERVER is host, host:port or https://host:port (http:// for one without TLS). Exit status 0
    means that every check passed, 1 that one did not, 2 that the command line is wrong.
    """
    plain = False
    try:
        if map_path is not None:
            if server or pin or insecure:
                raise TargetError("give either SERVER, with --pin or --insecure, or --map")
            nodes = _nodes_of_map(map_path, region, names)
        elif server is not None:
            if region is not None or names:
                raise TargetError("--region and --node choose from a --map")
            plain = server.startswith("http://")
            nodes = [parse_node(server, pin=pin, insecure=insecure, stun_port=stun_port)]
        else:
            raise TargetError("say what to probe: SERVER or --map FILE")
    except TargetError as error:
        raise click.UsageError(str(error)) from None
    console = Console(stderr=True)
    checks = list(plan(nodes, plain=plain, load=load, mesh_key=mesh_key))
    with console.status("") as status:
        outcomes = trio.run(
            run_checks,
            checks,
            timeout_seconds,
            lambda check: status.update(f"{check.node}: {check.name}"),
        )
    if as_json:
        click.echo(json.dumps([asdict(outcome) for outcome in outcomes], indent=2))
    else:
        Console().print(_table_of(outcomes))
    sys.exit(0 if all(outcome.passed for outcome in outcomes) else 1)


def _table_of(outcomes: list[Outcome]) -> Table:
    table = Table()
    for heading in ("node", "check", "", "found"):
        table.add_column(heading, overflow="fold")
    for outcome in outcomes:
        verdict = "[green]ok[/]" if outcome.passed else "[bold red]FAILED[/]"
        table.add_row(outcome.node, outcome.check, verdict, outcome.text)
    return table
