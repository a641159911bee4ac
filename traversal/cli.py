"""The `underpass` command."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import click
import trio

from traversal.agent.config import AgentConfig, ConfigError, load_config, load_map
from traversal.agent.service import ControlError, NoAgentError, ask, ping_once, run_agent
from traversal.agent.status import (
    link_status,
    nat_status,
    report_status,
)
from traversal.agent.wireguard import WireGuardError
from traversal.io.udp import UdpError
from traversal.keys import KeyFormatError, NodePrivate, NodePublic
from traversal.link import PathKind
from traversal.node import NodeError, open_node
from traversal.paths.punch_strategy import PunchPolicy
from traversal.relay_map import RelayMap
from traversal.tunnel.commands import tunnel

_T = TypeVar("_T")
_FAILURES = (ConfigError, ControlError, KeyFormatError, NodeError, UdpError, WireGuardError)

_as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
_config = click.option(
    "-c",
    "--config",
    "config_path",
    type=click.Path(dir_okay=False, path_type=Path),
    default=Path("underpass.toml"),
    show_default=True,
    help="The agent's file.",
)
_map = click.option("--map", "map_source", metavar="FILE|URL", help="The relay map (DERP map).")


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="underpass", prog_name="underpass")
def main() -> None:
    """Reach peers directly wherever a direct path exists, by a relay otherwise."""


@main.command()
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), help="Key file.")
@_as_json
def keygen(output: Path | None, as_json: bool) -> None:
    """Make a node key.

    Without --output the private key is printed; with it, only the public one.
    """
    key = NodePrivate.generate(os.urandom)
    if output is not None:
        try:
            fd = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:
            _fail(f"{output} exists; a key is never overwritten")
        except OSError as error:
            _fail(f"{output}: {error.strerror}")
        with os.fdopen(fd, "w") as file:
            file.write(key.reveal() + "\n")
    values = {"public": str(key.public())}
    if output is None:
        values["private"] = key.reveal()
    if as_json:
        click.echo(json.dumps(values))
    else:
        for name, value in values.items():
            click.echo(value if output is not None else f"{name:8} {value}")


@main.command()
@_map
@_config
@_as_json
def netcheck(map_source: str | None, config_path: Path, as_json: bool) -> None:
    """Say what this network is like: NAT, addresses, relays and their latencies."""
    relay_map = _load_map(map_source, config_path)

    async def run() -> dict[str, Any]:
        async with open_node(NodePrivate.generate(os.urandom), relay_map) as node:
            # Servers that answered late, and the port mapping, are in the second report.
            report = await node.refresh()
            return {
                **report_status(report, relay_map, node.home_region),
                "nat": nat_status(node.nat),
                "addresses": [
                    {"type": kind.name.lower(), "address": str(address)}
                    for kind, address in node.own_addresses
                ],
            }

    found = _run(run)
    if as_json:
        click.echo(json.dumps(found, indent=2))
        return
    click.echo(f"UDP         {'works' if found['udp'] else 'is blocked'}")
    if found["captive_portal"]:
        click.echo("Portal      a captive portal answers for the relays: sign in by a browser")
    click.echo(f"NAT         {found['nat']['text']}")
    hairpins = {True: "yes", False: "no", None: "not to be told"}[found["nat"]["hairpins"]]
    click.echo(f"Hairpin     {hairpins}")
    for family in ("ipv4", "ipv6"):
        addresses = ", ".join(found[family])
        click.echo(f"{family.replace('ip', 'IP'):11} {addresses or 'no answer'}")
    services = [name for name in ("nat_pmp", "pcp", "upnp") if found[name]]
    click.echo(f"Port maps   {', '.join(services).replace('_', '-').upper() or 'none offered'}")
    for entry in found["addresses"]:
        click.echo(f"Advertised  {entry['address']} ({entry['type'].replace('_', ' ')})")
    for region in found["regions"]:
        seconds = region["latency_seconds"]
        latency = "no answer" if seconds is None else f"{seconds * 1000:.1f} ms"
        home = "  home" if region["is_home"] else ""
        click.echo(f"Relay {region['region']:<5} {latency:>10}  {region['name']}{home}")


@main.command()
@click.argument("peer")
@click.option("--relay", type=int, default=0, help="The peer's home region, if PEER is a key.")
@click.option("--until-direct", is_flag=True, help="Ping until a direct path is found.")
@click.option("-n", "--count", type=click.IntRange(1, 10_000), default=5, show_default=True)
@click.option("--timeout", type=click.FloatRange(0.1, 3600), default=20.0, show_default=True)
@_map
@_config
@_as_json
def ping(
    peer: str,
    relay: int,
    until_direct: bool,
    count: int,
    timeout: float,
    map_source: str | None,
    config_path: Path,
    as_json: bool,
) -> None:
    """Ping PEER, a name in the agent's file or a node key, and say by which path and why.

    The running agent pings; without one, a node with the agent's key, or with a new one where there
    is no file, does it for as long as needed. Exit status 1 if nothing answered or, with
    --until-direct, no direct path was found.
    """
    config = _maybe_config(config_path)
    pings: list[dict[str, Any]] = []

    async def ping_often(ask_once: Callable[[], Awaitable[dict[str, Any]]]) -> None:
        while True:
            answer = await ask_once()
            pings.append(answer)
            is_direct = answer["path"]["kind"] == PathKind.DIRECT.value
            if not as_json:
                latency = answer["latency_seconds"]
                took = "no answer" if latency is None else f"{latency * 1000:.1f} ms"
                way = f" by {answer['way']}" if answer["way"] else ""
                click.echo(f"{took}{way} (path: {answer['path']['kind']})")
            if is_direct if until_direct else len(pings) == count:
                return
            await trio.sleep(0.25 if until_direct else 1.0)

    async def by_agent(control: Path) -> dict[str, Any]:
        found: dict[str, Any] = {}

        async def ask_once() -> dict[str, Any]:
            found.update(await ask(control, "ping", peer=peer))
            answer: dict[str, Any] = found.pop("ping")
            return answer

        with trio.move_on_after(timeout):
            await ping_often(ask_once)
        return found

    async def by_own_node() -> dict[str, Any]:
        entry = config.peer(peer) if config is not None else None
        try:
            peer_key = entry.key if entry is not None else NodePublic.parse(peer)
        except KeyFormatError as error:
            raise ConfigError(
                f"{peer!r} is no peer in {config_path}, no node key: {error}"
            ) from None
        region = relay or (entry.relay if entry is not None else 0)
        key = config.private_key if config is not None else NodePrivate.generate(os.urandom)
        may_search = config is None or config.may_search_ports
        if entry is not None:
            may_search &= entry.may_search_ports
        policy = PunchPolicy(is_enabled=may_search)
        async with open_node(key, _load_map(map_source, config_path), port_search=policy) as node:
            link = await node.connect(peer_key, relay=region or node.home_region)
            with trio.move_on_after(timeout):
                await ping_often(lambda: ping_once(link))
            return link_status(link, peer)

    async def run() -> dict[str, Any]:
        if config is not None:
            try:
                return await by_agent(config.control)
            except NoAgentError:
                pass
        return await by_own_node()

    found = {"pings": pings, **_run(run)}
    if as_json:
        click.echo(json.dumps(found, indent=2))
    elif "text" in found:
        click.echo(found["text"])
    if until_direct:
        is_good = bool(pings) and pings[-1]["path"]["kind"] == PathKind.DIRECT.value
    else:
        is_good = any(entry["latency_seconds"] is not None for entry in pings)
    if not is_good:
        sys.exit(1)


@main.command()
@_config
def up(config_path: Path) -> None:
    """Run the node agent until it is interrupted or gets SIGTERM."""
    config = _load_config(config_path)
    relay_map = _load_map(config.relay_map, config_path)

    async def run() -> None:
        async with trio.open_nursery() as nursery:
            node = await nursery.start(run_agent, config, relay_map)
            click.echo(f"{node.public_key}, home region {node.home_region or 'none'}", err=True)
            for peer in config.peers:
                if peer.endpoint is not None:
                    click.echo(f"WireGuard endpoint of {peer.name}: {peer.endpoint}", err=True)
            with trio.open_signal_receiver(signal.SIGTERM) as signals:
                async for _ in signals:
                    nursery.cancel_scope.cancel()

    try:
        _run(run)
    except KeyboardInterrupt:
        click.echo("stopped", err=True)


@main.command()
@_config
@_as_json
def status(config_path: Path, as_json: bool) -> None:
    """Say what the running agent knows: our addresses, relays, and each peer's path."""
    config = _load_config(config_path)

    async def run() -> dict[str, Any]:
        return await ask(config.control, "status")

    found = _run(run)
    if as_json:
        click.echo(json.dumps(found, indent=2))
        return
    click.echo(f"{found['key']}")
    click.echo(f"Home region {found['home_region'] or 'none'}; {found['nat']['text']}")
    for relay in found["relays"]:
        state = "connected" if relay["is_connected"] else relay["last_error"] or "connecting"
        click.echo(f"Relay {relay['region']}: {state} {relay['health']}".rstrip())
    for peer in found["peers"]:
        click.echo(f"{peer['name']}: {peer['text']}")


def _run(main_function: Callable[[], Awaitable[_T]]) -> _T:
    try:
        return trio.run(main_function)
    except BaseException as error:
        cause = error
        while isinstance(cause, BaseExceptionGroup) and len(cause.exceptions) == 1:
            cause = cause.exceptions[0]
        if isinstance(cause, _FAILURES):
            _fail(str(cause))
        if isinstance(cause, KeyboardInterrupt):
            raise cause from None
        raise


def _load_config(path: Path) -> AgentConfig:
    try:
        return load_config(path)
    except ConfigError as error:
        _fail(str(error))


def _maybe_config(path: Path) -> AgentConfig | None:
    return _load_config(path) if path.exists() else None


def _load_map(source: str | None, config_path: Path) -> RelayMap:
    if source is None:
        config = _maybe_config(config_path)
        if config is None:
            _fail(f"no relay map: give --map FILE, or write {config_path}")
        source = config.relay_map
    try:
        return load_map(source)
    except ConfigError as error:
        _fail(str(error))


def _fail(text: str) -> NoReturn:
    click.echo(f"underpass: {text}", err=True)
    sys.exit(2)


main.add_command(tunnel)


if __name__ == "__main__":
    main()
