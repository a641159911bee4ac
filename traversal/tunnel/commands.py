"""The commands `underpass tunnel ...`."""

from __future__ import annotations

import json
import logging
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

import click

from traversal.exit_statuses import FAILED, WRONG_USE, fail
from traversal.printable import LineFormatter
from traversal.tunnel.transport_choice import PROTOCOLS

# The rest is imported where it is used: it takes half a second, for which no other command of
# `underpass` should wait.
if TYPE_CHECKING:
    import trio

    from traversal.tunnel.connector import Connector
    from traversal.tunnel.settings import TunnelSettings

_LEVELS: Final = ("debug", "info", "warning", "error")

_config = click.option(
    "-c",
    "--config",
    "config_path",
    type=click.Path(dir_okay=False, path_type=Path),
    help="The tunnel's file (TOML); the other options are for doing without.",
)
_edge = click.option(
    "--edge", multiple=True, metavar="HOST[:PORT]", help="An edge; port 7844 by default."
)
_ca = click.option("--ca", metavar="FILE", help="The edges' authority, if not the system's.")
_credentials = click.option("--credentials-file", metavar="FILE", help="Made by the operator.")
_token = click.option(
    "--token-file", metavar="FILE", help="The same as one word; or set TUNNEL_TOKEN."
)
_url = click.option("--url", help="The service to publish, like http://127.0.0.1:8000.")
_protocol = click.option("--protocol", type=click.Choice(tuple(PROTOCOLS)), help="Default: auto.")
_health = click.option("--health", metavar="IP:PORT", help="Serve /ready, /metrics and so on.")
_level = click.option("--log-level", type=click.Choice(_LEVELS), default="info", show_default=True)
_as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@click.group()
def tunnel() -> None:
    """Publish services through an edge, without an open port."""


@tunnel.command()
@_config
@_edge
@_ca
@_credentials
@_token
@_url
@_protocol
@_health
@_level
def run(config_path: Path | None, log_level: str, **options: Any) -> None:
    """Serve a tunnel until it is interrupted.

    The first SIGINT or SIGTERM lets requests under way finish, the second ends at once. Without
    --url and rules in the file, the edge says what is served.
    """
    settings = _settings(config_path, options)
    _serve(settings, log_level)


@tunnel.command()
@_config
@_edge
@_ca
@_credentials
@_token
@_url
@_protocol
@_health
@_as_json
def check(config_path: Path | None, as_json: bool, **options: Any) -> None:
    """Say whether a tunnel's file is right, and what it means."""
    settings = _settings(config_path, options)
    rules = [
        {"hostname": rule.hostname or "*", "path": rule.path or "*", "service": rule.service}
        for rule in settings.configuration.ingress
    ]
    if as_json:
        found = {"tunnel": str(settings.credentials.tunnel_id), "rules": rules}
        click.echo(json.dumps(found, indent=2))
        return
    click.echo(f"tunnel {settings.credentials.tunnel_id}")
    for rule in rules:
        click.echo(f"{rule['hostname']} {rule['path']} -> {rule['service']}")
    if not rules:
        click.echo("the edge says what is served")


@tunnel.command()
@click.option("--url", required=True, help="The service to publish.")
@click.option(
    "--edge", "base", required=True, metavar="URL", help="The edge's domain of quick tunnels."
)
@click.option(
    "--connect",
    multiple=True,
    metavar="HOST[:PORT]",
    help="Where connectors connect; default: the domain's port 7844.",
)
@_ca
@click.option("--web-ca", metavar="FILE", help="The authority of the domain's certificate.")
@_protocol
@_health
@_level
@_as_json
def quick(
    url: str,
    base: str,
    connect: tuple[str, ...],
    web_ca: str | None,
    log_level: str,
    as_json: bool,
    **options: Any,
) -> None:
    """Publish a local service under a random name, as long as this runs."""
    from traversal.tunnel.quick import QuickTunnelError, ask_for_quick_tunnel
    from traversal.tunnel.services import parse_service
    from traversal.tunnel.settings import SettingsError, read_settings
    from traversal.wire.tunnel.errors import TunnelError

    try:
        edges = list(connect) or [urlsplit(base).hostname or ""]
    except ValueError as error:
        fail(
            f"{base}: {error}; write https://DOMAIN, the edge's domain of quick tunnels", WRONG_USE
        )
    table = {key: value for key, value in options.items() if value} | {"url": url, "edge": edges}
    try:
        parse_service(url)  # before the edge makes a tunnel for it
        made = ask_for_quick_tunnel(base, web_ca)
        settings = read_settings(
            table | {"connections": 1}, Path.cwd(), credentials=made.credentials
        )
    except (SettingsError, TunnelError) as error:
        fail(str(error), WRONG_USE)
    except QuickTunnelError as error:
        is_url = base.startswith(("https://", "http://"))
        fail(str(error), FAILED if is_url else WRONG_USE)
    address = f"{urlsplit(base).scheme}://{made.hostname}"
    click.echo(json.dumps({"url": address}) if as_json else address)
    _serve(settings, log_level)


def _settings(config_path: Path | None, options: dict[str, Any]) -> TunnelSettings:
    from traversal.tunnel.settings import SettingsError, load_settings, read_settings

    names = {"credentials_file": "credentials"}
    table = {
        names.get(key, key): list(value) if isinstance(value, tuple) else value
        for key, value in options.items()
        if value
    }
    try:
        if config_path is not None:
            if table:
                fail(
                    "--config does not go together with other options; write them in the file",
                    WRONG_USE,
                )
            return load_settings(config_path)
        token = None
        if "credentials" not in table and "token_file" not in table:
            token = os.environ.get("TUNNEL_TOKEN")
        return read_settings(table, Path.cwd(), token=token)
    except SettingsError as error:
        fail(str(error), WRONG_USE)


def _serve(settings: TunnelSettings, log_level: str) -> None:
    import trio

    from traversal.tunnel.connector import ConnectorError

    handler = logging.StreamHandler()
    handler.setFormatter(LineFormatter("%(asctime)s %(levelname)s %(message)s"))
    logging.basicConfig(level=log_level.upper(), handlers=[handler])
    # The QUIC library tells every end of a connection.
    logging.getLogger("quic").setLevel(logging.ERROR)
    try:
        trio.run(_run_until_told, settings)
    except* ConnectorError as group:
        fail(str(group.exceptions[0]), FAILED)


async def _run_until_told(settings: TunnelSettings) -> None:
    import trio

    from traversal.tunnel.running import run_tunnel

    told = trio.Event()
    async with trio.open_nursery() as nursery:

        async def listen(*, task_status: trio.TaskStatus[None]) -> None:
            with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
                task_status.started()
                async for _ in signals:
                    if told.is_set() or not connectors:
                        nursery.cancel_scope.cancel()
                        return
                    click.echo("stopping; again to stop at once", err=True)
                    told.set()

        connectors: list[Connector] = []

        async def serve(*, task_status: trio.TaskStatus[Connector]) -> None:
            await run_tunnel(settings, stop=told.wait, task_status=task_status)
            nursery.cancel_scope.cancel()

        await nursery.start(listen)
        connectors.append(await nursery.start(serve))
        click.echo(f"tunnel {settings.credentials.tunnel_id} is up", err=True)
