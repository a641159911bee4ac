"""The `underpass` command.

Trio and the node are imported by the commands that need them: they take half a second, which a help
text or a key must not cost.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import click

from traversal.exit_statuses import FAILED, WRONG_USE, fail
from traversal.tunnel.commands import tunnel

_T = TypeVar("_T")

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
    """Reach peers directly wherever a direct path exists, by a relay otherwise.

    Exit statuses: 0 if all is well; 1 for what failed; 2 for a wrong command line or file.
    """


@main.command()
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), help="Key file.")
@_as_json
def keygen(output: Path | None, as_json: bool) -> None:
    """Make a node key.

    Without --output the private key is printed; with it, only the public one.
    """
    from traversal.keys import NodePrivate

    key = NodePrivate.generate(os.urandom)
    if output is not None:
        try:
            fd = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:
            fail(f"{output} exists; a key is never overwritten", FAILED)
        except OSError as error:
            fail(f"{output}: {error.strerror}", FAILED)
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
    """Say what this network is like.

    NAT, public addresses, port mapping, and the relays with their latencies. The exit status is 1
    when no relay answers.
    """
    from traversal.agent import commands
    from traversal.agent.screens import netcheck_screen

    found = _run(partial(commands.netcheck, map_source, config_path))
    click.echo(json.dumps(found, indent=2) if as_json else netcheck_screen(found, _columns()))
    if found["nat"]["is_offline"]:
        fail(
            "no relay answers; see whether this machine is online, whether a firewall keeps it "
            "from the relays, and whether the relay map is right",
            FAILED,
        )


@main.command()
@click.argument("peer")
@click.option("--relay", type=int, default=0, help="The peer's home region, if PEER is a key.")
@click.option("--until-direct", is_flag=True, help="Ping until a direct path is found.")
@click.option("-n", "--count", type=click.IntRange(1, 10_000), default=5, show_default=True)
@click.option(
    "--timeout",
    type=click.FloatRange(0.1, 3600),
    default=20.0,
    show_default=True,
    callback=lambda _context, _option, value: _finite(value),
    help="Seconds for all pings together.",
)
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
    """Ping a peer: how long, by which path, and why.

    PEER is a name in the agent's file or a node key. The running agent pings; without one, a node
    with the agent's key, or with a new one where there is no file, does it for as long as needed.
    Exit status 1 if nothing answered or, with --until-direct, no direct path was found.
    """
    from traversal.agent import commands
    from traversal.agent.screens import ping_line, ping_screen

    def tell(ping: dict[str, Any]) -> None:
        if not as_json:
            click.echo(ping_line(ping))

    found = _run(
        partial(
            commands.ping,
            peer,
            relay,
            until_direct=until_direct,
            count=count,
            timeout_seconds=timeout,
            map_source=map_source,
            config_path=config_path,
            tell=tell,
        )
    )
    click.echo(json.dumps(found, indent=2) if as_json else ping_screen(found, _columns()))
    pings = found["pings"]
    if until_direct:
        is_good = bool(pings) and pings[-1]["path"]["kind"] == "direct"
    else:
        is_good = any(entry["latency_seconds"] is not None for entry in pings)
    if not is_good:
        sys.exit(1)


@main.command()
@_config
def up(config_path: Path) -> None:
    """Run the node agent until it is interrupted or gets SIGTERM."""
    from traversal.agent import commands

    _run(partial(commands.up, config_path, partial(click.echo, err=True)))


@main.command()
@_config
@_as_json
def status(config_path: Path, as_json: bool) -> None:
    """Say what the running agent knows.

    Our addresses and relays, each peer's path, and why it is the one.
    """
    from traversal.agent import commands
    from traversal.agent.screens import status_screen

    found = _run(partial(commands.status, config_path))
    click.echo(json.dumps(found, indent=2) if as_json else status_screen(found, _columns()))


def _run(main_function: Callable[[], Awaitable[_T]]) -> _T:
    from traversal.agent.commands import CommandError, run

    try:
        return run(main_function)
    except CommandError as error:
        fail(str(error), WRONG_USE if error.is_usage else FAILED)


def _finite(value: float) -> float:
    if not math.isfinite(value):
        raise click.BadParameter("must be a number of seconds")
    return value


def _columns() -> int:
    return shutil.get_terminal_size().columns


main.add_command(tunnel)


if __name__ == "__main__":
    main()
