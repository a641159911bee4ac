"""Which DERP server a command line means: `HOST:PORT` or a URL, or a node of a relay map."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import urlsplit

import click

from relay.config_sources import ConfigError
from relay.derper_files import read_mesh_key
from traversal.io.dial import Target
from traversal.keys import MeshKey
from traversal.relay_map import (
    DEFAULT_STUN_PORT,
    RelayMap,
    RelayMapError,
    RelayNode,
)


class TargetError(ValueError):
    """A command line names no DERP server; the text says what to write."""


def parse_target(text: str, *, pin: str = "", insecure: bool = False) -> Target:
    """`host`, `host:port`, `https://host:port` or `http://host:port` (no TLS).

    Args:
        pin: `sha256-raw:` and 64 hex digits, as a relay prints it.
        insecure: accept any certificate.

    Raises TargetError.
    """
    node = parse_node(text, pin=pin, insecure=insecure)
    return Target.of_node(node, plain=text.startswith("http://"))


def parse_node(
    text: str, *, pin: str = "", insecure: bool = False, stun_port: int = DEFAULT_STUN_PORT
) -> RelayNode:
    """The same as a node of a relay map, named like the text. A `stun_port` of -1 means none.

    Raises TargetError.
    """
    url = urlsplit(text if "://" in text else f"https://{text}")
    try:
        host, port = url.hostname, url.port
    except ValueError:
        host = port = None
    if url.scheme not in ("https", "http") or not host or url.path not in ("", "/", "/derp"):
        raise TargetError(
            f"{text!r} is no DERP server; write host, host:port or https://host:port "
            "(http:// for one without TLS; an IPv6 address in brackets)"
        )
    if pin and not pin.startswith("sha256-raw:"):
        raise TargetError(f"the pin {pin!r} does not start with sha256-raw:, as relays print it")
    try:
        return RelayNode(
            name=text,
            region_id=1,
            host_name=host,
            certificate_name=pin,
            stun_port=None if stun_port == -1 else stun_port or DEFAULT_STUN_PORT,
            derp_port=port or (80 if url.scheme == "http" else 443),
            insecure_for_tests=insecure,
        )
    except RelayMapError as error:
        raise TargetError(str(error).partition(": ")[2]) from None


def read_relay_map(path: Path) -> RelayMap:
    """A file with DERPMap JSON. Raises TargetError."""
    try:
        return RelayMap.parse(path.read_bytes())
    except OSError as error:
        raise TargetError(f"{path}: {error.strerror}") from None
    except RelayMapError as error:
        raise TargetError(f"{path}: {error}") from None


def _read_mesh_key(
    _context: click.Context, _parameter: click.Parameter, path: Path | None
) -> MeshKey | None:
    try:
        return None if path is None else read_mesh_key(path)
    except ConfigError as error:
        raise click.BadParameter(str(error)) from None


mesh_key_option = click.option(
    "--mesh-key-file",
    "mesh_key",
    type=click.Path(dir_okay=False, path_type=Path),
    callback=_read_mesh_key,
    help="The region's mesh key, for a relay that does not admit everybody.",
)
"""For commands that come to a relay with keys which it has never seen."""
