"""The `underpass-relay` command.

What a command needs is imported when it runs: all of it takes a second, which a help text must not
cost.
"""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from importlib import import_module
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

import click

if TYPE_CHECKING:
    from relay.config import Config
    from traversal.relay_map import RelayMap

_F = TypeVar("_F", bound=Callable[..., Any])

DEFAULT_CONFIG_PATH = "/etc/underpass-relay/relay.toml"
MAX_TOKEN_DAYS = 36_500
ELSEWHERE: Final = {
    "demo": ("relay.demo:demo_command", "Run a relay and two clients that send packets."),
    "edge": ("relay.edge.cli:edge_command", "Tunnels: services that connectors publish here."),
    "loadtest": ("relay.loadtest:loadtest_command", "Send packets through a server and measure."),
    "probe": ("relay.probe:probe_command", "Check DERP servers from outside."),
    "top": ("relay.top:top_command", "Show who uses a relay, live."),
}
"""Commands in modules of their own: where, and what the list of commands says of them."""


class _Group(click.Group):
    """Imports commands of `ELSEWHERE` only when they are called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted([*super().list_commands(ctx), *ELSEWHERE])

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in ELSEWHERE:
            return super().get_command(ctx, cmd_name)
        module, _, name = ELSEWHERE[cmd_name][0].partition(":")
        command: click.Command = getattr(import_module(module), name)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        near = get_close_matches(args[0], self.list_commands(ctx), n=1)
        if near and args[0] not in near:
            # click itself knows only of commands that are loaded.
            ctx.fail(f"No such command {args[0]!r}. Did you mean {near[0]!r}?")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        rows = []
        for name in self.list_commands(ctx):
            if name in ELSEWHERE:
                rows.append((name, ELSEWHERE[name][1]))
            elif (command := super().get_command(ctx, name)) is not None:
                rows.append((name, command.get_short_help_str(limit=80)))
        with formatter.section("Commands"):
            formatter.write_dl(rows)


@click.group(
    cls=_Group,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(package_name="underpass", prog_name="underpass-relay")
def main() -> None:
    """A relay for DERP clients: a drop-in for Tailscale's derper, with STUN.

    Try it at once with "underpass-relay serve --dev"; nothing has to be set up for that.
    """


# --- Configuration -------------------------------------------------------------------------------


def _config_options(command: _F) -> _F:
    """Options that say where the configuration comes from, strongest last."""
    decorators = (
        click.option(
            "-c",
            "--config",
            "config_path",
            type=click.Path(dir_okay=False),
            envvar="UNDERPASS_RELAY_CONFIG",
            help=f"Configuration file (TOML). Default: {DEFAULT_CONFIG_PATH} if it is there.",
        ),
        click.option("--hostname", help="server.hostname: the name that clients connect to."),
        click.option("--derp", multiple=True, metavar="[HOST]:PORT", help="listen.derp"),
        click.option("--http", metavar="[HOST]:PORT|off", help="listen.http"),
        click.option("--stun", metavar="[HOST]:PORT|off", help="listen.stun"),
        click.option("--admin", metavar="[HOST]:PORT|off", help="listen.admin"),
        click.option("--workers", type=int, help="server.workers: processes to share the load."),
        click.option("--log-level", help="log.level: debug, info, warning or error."),
        click.option(
            "--set",
            "settings",
            multiple=True,
            metavar="KEY=VALUE",
            help="Any other key, for example --set limits.connections=1000. May be repeated.",
        ),
    )
    for decorator in reversed(decorators):
        command = decorator(command)
    return command


def _overrides(options: Mapping[str, Any]) -> dict[str, object]:
    named = {
        "server.hostname": options["hostname"],
        "listen.derp": ",".join(options["derp"]) or None,
        "listen.http": options["http"],
        "listen.stun": options["stun"],
        "listen.admin": options["admin"],
        "server.workers": options["workers"],
        "log.level": options["log_level"],
    }
    overrides: dict[str, object] = {key: value for key, value in named.items() if value is not None}
    for setting in options["settings"]:
        key, equals, value = setting.partition("=")
        if not equals:
            raise click.UsageError(f"--set {setting}: write it as KEY=VALUE")
        overrides[key] = value
    return overrides


def _config_path(options: Mapping[str, Any]) -> str:
    """The configuration file; empty if none is named and there is none at the usual place."""
    named: str | None = options["config_path"]
    if named is not None:
        return named
    return DEFAULT_CONFIG_PATH if Path(DEFAULT_CONFIG_PATH).exists() else ""


def _loader(options: Mapping[str, Any], *, dev: bool = False) -> Callable[[], Config]:
    """A function that reads the configuration, now and at each reload."""
    from relay.config import Config

    overrides = _overrides(options)
    if dev:
        if options["config_path"]:
            raise click.UsageError("--dev needs no configuration file; leave --config out")
        return lambda: Config.dev(overrides)
    path = _config_path(options)
    return lambda: Config.load(Path(path) if path else None, os.environ, overrides)


def _load(options: Mapping[str, Any]) -> Config:
    from relay.config import ConfigError

    try:
        return _loader(options)()
    except ConfigError as error:
        raise click.ClickException(str(error)) from None


# --- Commands ------------------------------------------------------------------------------------


@main.command()
@click.option(
    "--dev",
    is_flag=True,
    help="Try it: loopback only, free ports, a key and a certificate in memory, open to all.",
)
@click.option(
    "--dev-map",
    type=click.Path(dir_okay=False, writable=True),
    help="Also write the relay map of this relay to this file, once it serves.",
)
@_config_options
def serve(dev: bool, dev_map: str | None, **options: Any) -> None:
    """Run the relay until SIGTERM, which drains it; SIGHUP reloads.

    Settings come from the configuration file, then UNDERPASS_RELAY_... environment variables, then
    the options below; the later ones win.
    """
    import trio

    from relay.config import ConfigError
    from relay.logs import set_up_logging
    from relay.server import Bound, StartError
    from relay.server import serve as serve_relay
    from traversal.relay_map import RelayMapError

    load = _loader(options, dev=dev)
    path = "" if dev else _config_path(options)

    async def run(config: Config) -> None:
        async with trio.open_nursery() as nursery:
            bound: Bound = await nursery.start(
                functools.partial(serve_relay, config, load, config_path=path)
            )
            if dev or dev_map:
                text = _map_of_running(config, bound).to_json()
                if dev_map:
                    try:
                        await trio.Path(dev_map).write_text(text + "\n")
                    except OSError as error:
                        raise ConfigError(
                            f"{dev_map}: can't be written: {error.strerror}"
                        ) from None
                if dev:
                    click.echo(_dev_banner(bound, text))

    problems: list[str] = []
    try:
        config = load()
        set_up_logging(config.log)
        trio.run(run, config)
    except* (*StartError, RelayMapError) as group:
        problems = _messages(group)
    if problems:
        raise click.ClickException("\n".join(problems))


def _messages(group: BaseExceptionGroup[Any]) -> list[str]:
    """The texts of the errors in a group, however deep."""
    texts = []
    for error in group.exceptions:
        texts += _messages(error) if isinstance(error, BaseExceptionGroup) else [str(error)]
    return texts


def _map_of_running(config: Config, bound: Any) -> RelayMap:
    from relay.map_entry import build_map

    return build_map(
        config,
        derp_port=bound.derp[0][1],
        stun_port=bound.stun[0][1] if bound.stun else None,
        can_port_80=any(port == 80 for _, port in bound.http),
        pin=bound.pin,
    )


def _dev_banner(bound: Any, map_text: str) -> str:
    def places(addresses: Iterable[tuple[str, int]]) -> str:
        return ", ".join(f"{host}:{port}" for host, port in addresses) or "off"

    return (
        f"A relay for trying things is running; stop it with Ctrl-C.\n\n"
        f"  DERP    {places(bound.derp)} (TLS)\n"
        f"  STUN    {places(bound.stun)} (UDP)\n"
        f"  HTTP    {places(bound.http)}\n"
        f"  status  {f'http://{places(bound.admin)}/' if bound.admin else 'off'}\n"
        f"  key     {bound.server_key}\n"
        f"  pin     {bound.pin or 'none'}\n\n"
        f"Relay map to give to clients:\n\n{map_text}\n"
    )


@main.command("check-config")
@click.option("--json", "as_json", is_flag=True, help="The result as JSON.")
@_config_options
def check_config(as_json: bool, **options: Any) -> None:
    """Say whether the configuration is right, without starting anything.

    Exit status 1 if it is not. Everything wrong is listed, with file and line.
    """
    from relay.config import ConfigError
    from relay.server import check_files

    problems: list[str] = []
    try:
        config = _loader(options)()
        problems = check_files(config)
    except ConfigError as error:
        problems = list(error.problems)
    if as_json:
        click.echo(json.dumps({"ok": not problems, "problems": problems}))
    elif problems:
        click.echo("\n".join(problems), err=True)
    else:
        click.echo("The configuration is right.")
    sys.exit(1 if problems else 0)


@main.command()
@click.argument("kind", type=click.Choice(["server", "mesh"]), default="server")
@click.option("-o", "--output", type=click.Path(dir_okay=False), help="Write to this file (0600).")
@click.option("--json", "as_json", is_flag=True, help="The public half, too, as JSON.")
def keygen(kind: str, output: str | None, as_json: bool) -> None:
    """Make a key: the SERVER's own, in derper's file format, or a MESH key for a region."""
    from traversal.keys import MeshKey, NodePrivate

    public = ""
    if kind == "server":
        private = NodePrivate.generate(os.urandom)
        public = str(private.public())
        text = json.dumps({"PrivateKey": private.reveal()}, indent="\t")
    else:
        text = MeshKey.generate(os.urandom).reveal()
    if output is not None:
        _write_key(output, text)
    if as_json:
        shown = {"kind": kind, "public": public, "file": output}
        click.echo(json.dumps(shown if output else {**shown, "key": text}))
    elif output is None:
        click.echo(text)
    else:
        click.echo(f"Wrote {output}" + (f"; its public half is {public}" if public else ""))


def _write_key(path: str, text: str) -> None:
    """Write a new key file. An old one stays: clients or tokens may depend on it."""
    from relay.derper_files import write_private_file

    try:
        write_private_file(Path(path), f"{text}\n".encode(), replace=False)
    except FileExistsError:
        message = f"{path}: there is a file already; move it away first, or write another"
        raise click.ClickException(message) from None
    except OSError as error:
        raise click.ClickException(f"{path}: can't be written: {error.strerror}") from None


def _address_type(kind: type[IPv4Address] | type[IPv6Address]) -> Callable[..., Any]:
    def convert(_context: click.Context, _parameter: click.Parameter, value: str | None) -> Any:
        if value is None:
            return None
        try:
            address = ip_address(value)
        except ValueError:
            raise click.BadParameter(f"{value} is no IP address") from None
        if not isinstance(address, kind):
            raise click.BadParameter(f"{value} is of the other address family")
        return address

    return convert


@main.command("print-map")
@click.option("--region-id", type=int, help="Default: 900, the first that is free for own use.")
@click.option("--region-code", default="underpass", show_default=True)
@click.option("--region-name", default="Underpass", show_default=True)
@click.option("--node-name", default="", help="Default: the region id and the letter a.")
@click.option(
    "--derp-port",
    type=click.IntRange(1, 65535),
    help="As clients see it, behind a proxy or port mapping. Default: that of listen.derp.",
)
@click.option(
    "--stun-port",
    type=click.IntRange(1, 65535),
    help="As clients see it. Default: that of listen.stun.",
)
@click.option("--ipv4", callback=_address_type(IPv4Address), help="Dial this instead of DNS.")
@click.option("--ipv6", callback=_address_type(IPv6Address), help="Dial this instead of DNS.")
@click.option(
    "--format",
    "form",
    type=click.Choice(["json", "headscale"]),
    default="json",
    show_default=True,
    help="Tailscale's DERPMap JSON, or the YAML that headscale reads.",
)
@_config_options
def print_map(
    region_id: int | None,
    region_code: str,
    region_name: str,
    node_name: str,
    derp_port: int | None,
    stun_port: int | None,
    ipv4: IPv4Address | None,
    ipv6: IPv6Address | None,
    form: str,
    **options: Any,
) -> None:
    """Print the relay-map entry under which clients find this relay, complete and checked.

    For a self-signed certificate the entry carries its pin.
    """
    from relay.config_schema import DERP_PORT
    from relay.map_entry import PRIVATE_REGION_ID, build_map
    from relay.server import StartError, certificate_pin
    from traversal.relay_map import RelayMapError

    config = _load(options)
    listen = config.listen
    try:
        relay_map = build_map(
            config,
            derp_port=derp_port or listen.derp[0].port or DERP_PORT,
            stun_port=stun_port or (listen.stun[0].port if listen.stun else None),
            can_port_80=listen.http is not None and listen.http.port == 80,
            pin=certificate_pin(config),
            region_id=PRIVATE_REGION_ID if region_id is None else region_id,
            region_code=region_code,
            region_name=region_name,
            node_name=node_name,
            ipv4=ipv4,
            ipv6=ipv6,
        )
    except (*StartError, RelayMapError) as error:
        raise click.ClickException(str(error)) from None
    click.echo(relay_map.to_json() if form == "json" else relay_map.to_headscale_yaml())


# --- Tokens --------------------------------------------------------------------------------------


@main.group()
def token() -> None:
    """Admission tokens: let a key in with limits, for a time, and revoke it."""


@token.command("keygen")
@click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False),
    required=True,
    help="Write the secret half to this file (0600).",
)
@click.option("--json", "as_json", is_flag=True, help="The public half as JSON.")
def token_keygen(output: str, as_json: bool) -> None:
    """Make the key that signs tokens; prints the public half.

    The public half belongs into the file that admission.tokens.public_key_file names.
    """
    from relay.tokens import TokenSigner

    signer = TokenSigner.generate(os.urandom)
    _write_key(output, signer.reveal())
    public = str(signer.public())
    click.echo(json.dumps({"public": public, "file": output}) if as_json else public)


@token.command("issue")
@click.option(
    "--signing-key",
    type=click.Path(dir_okay=False),
    required=True,
    help='The file that "token keygen" wrote.',
)
@click.option("--key", "node_key", required=True, help="The node key (nodekey:…) it is for.")
@click.option(
    "--days",
    type=click.FloatRange(0, MAX_TOKEN_DAYS, min_open=True),
    default=30,
    show_default=True,
    help="How long it counts.",
)
@click.option("--rate", type=int, help="Bytes per second that its holder may send.")
@click.option("--burst", type=int, help="Burst in bytes; default: two seconds of the rate.")
@click.option("--peer", "peers", multiple=True, help="Only these node keys may be reached.")
@click.option("--id", "token_id", help="Its id, for revoking it; default: random.")
@click.option("--json", "as_json", is_flag=True, help="Token, id and expiry as JSON.")
def token_issue(
    signing_key: str,
    node_key: str,
    days: float,
    rate: int | None,
    burst: int | None,
    peers: tuple[str, ...],
    token_id: str | None,
    as_json: bool,
) -> None:
    """Print a token, and its id on standard error.

    To revoke it, add its id to the file that admission.tokens.revoked_file names.
    """
    import time

    from relay.config_sources import ConfigError, read_text_file
    from relay.tokens import Claims, TokenError, TokenSigner
    from traversal.keys import KeyFormatError, NodePublic

    try:
        signer = TokenSigner.parse(read_text_file(Path(signing_key), "signing key"))
    except ConfigError as error:
        raise click.ClickException(str(error)) from None
    except TokenError:
        message = f'{signing_key}: this is no signing key; "token keygen" makes one'
        raise click.ClickException(message) from None
    try:
        claims = Claims(
            id=token_id or os.urandom(8).hex(),
            key=NodePublic.parse(node_key),
            expires_unix=int(time.time() + days * 86400),
            rate_bytes_per_second=rate,
            burst_bytes=burst,
            peers=frozenset(NodePublic.parse(peer) for peer in peers) or None,
        )
        text = signer.issue(claims)
    except (TokenError, KeyFormatError) as error:
        raise click.ClickException(str(error)) from None
    if as_json:
        shown = {"token": text, "id": claims.id, "expires_unix": claims.expires_unix}
        click.echo(json.dumps(shown))
    else:
        click.echo(text)
        click.echo(f"id {claims.id}", err=True)


if __name__ == "__main__":
    main()
