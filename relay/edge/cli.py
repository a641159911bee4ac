"""`underpass-relay edge`: the tunnels of an edge."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from relay.certificate_files import CertificateError
from relay.config import ConfigError
from relay.config_schema import EdgeConfig

_F = TypeVar("_F", bound=Callable[..., Any])


@click.group("edge")
def edge_command() -> None:
    """Tunnels: services that connectors such as cloudflared publish through this edge.

    A running edge notices new, changed and removed tunnels by itself.
    """


def _directory_option(command: _F) -> _F:
    return click.option(
        "--directory",
        envvar="UNDERPASS_RELAY_EDGE_DIRECTORY",
        default=EdgeConfig().directory,
        show_default=True,
        type=click.Path(file_okay=False),
        help="edge.directory of the configuration.",
    )(command)


@edge_command.command("create-tunnel")
@click.argument("name")
@click.option("--json", "as_json", is_flag=True, help="The result as JSON, token included.")
@_directory_option
def create(name: str, as_json: bool, directory: str) -> None:
    """Make a tunnel, and print the token with which a connector serves it.

    The same credentials are in the file tunnels/NAME.json, which a connector reads with
    --credentials-file. To give the tunnel's connectors their configuration from here, write it to
    tunnels/NAME.config.json. To end the tunnel, remove its files.
    """
    from relay.edge.tunnel_files import create_tunnel, tunnels_directory

    try:
        tunnel = create_tunnel(directory, name, os.urandom)
    except ConfigError as error:
        raise click.ClickException(str(error)) from None
    path = tunnels_directory(directory) / f"{name}.json"
    token = tunnel.credentials.to_token()
    if as_json:
        shown = {"name": name, "id": str(tunnel.id), "token": token, "file": str(path)}
        click.echo(json.dumps(shown))
        return
    click.echo(token)
    click.echo(f"id {tunnel.id}, credentials in {path}", err=True)


@edge_command.command("tunnels")
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
@_directory_option
def list_tunnels(as_json: bool, directory: str) -> None:
    """List the tunnels, without their secrets."""
    from relay.edge.tunnel_files import credentials_files, read_tunnel

    try:
        tunnels = list(map(read_tunnel, credentials_files(directory)))
    except ConfigError as error:
        raise click.ClickException(str(error)) from None
    shown = [
        {
            "name": tunnel.name,
            "id": str(tunnel.id),
            "configuration_version": tunnel.configuration and tunnel.configuration.version,
        }
        for tunnel in tunnels
    ]
    if as_json:
        click.echo(json.dumps(shown))
        return
    if not tunnels:
        click.echo(f"there are no tunnels in {directory}; make one with create-tunnel", err=True)
    for tunnel in tunnels:
        kind = "configured at the connector" if tunnel.configuration is None else "configured here"
        click.echo(f"{tunnel.id}  {tunnel.name}  {kind}")


@edge_command.command("token")
@click.argument("name")
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
@_directory_option
def token(name: str, as_json: bool, directory: str) -> None:
    """Print a tunnel's token again."""
    from relay.edge.tunnel_files import credentials_files, read_tunnel, tunnels_directory

    path = tunnels_directory(directory) / f"{name}.json"
    try:
        known = credentials_files(directory)
        if path not in known:
            names = ", ".join(file.stem for file in known)
            hint = f"there are {names}" if known else "make it with create-tunnel"
            raise ConfigError(f"{path}: there is no tunnel of this name; {hint}")
        tunnel = read_tunnel(path)
    except ConfigError as error:
        raise click.ClickException(str(error)) from None
    text = tunnel.credentials.to_token()
    click.echo(json.dumps({"name": name, "token": text}) if as_json else text)


@edge_command.command("authority")
@_directory_option
def authority(directory: str) -> None:
    """Print the certificate that connectors are to trust (cloudflared's --cacert).

    Makes the edge's own authority if there is none yet.
    """
    from relay.edge.certificates import authority_pem

    try:
        click.echo(authority_pem(Path(directory)).decode(), nl=False)
    except CertificateError as error:
        raise click.ClickException(str(error)) from None
