"""Set up the local WireGuard: the kernel's where the kernel has it, else wireguard-go.

The work is done by the programs that every WireGuard host has, as `wg-quick` does it: `ip` makes
the interface, `wg` gives it keys and peers. Each peer's endpoint is the bridge's socket on
loopback, so what WireGuard sends goes over the peer's link. The interface goes when the agent ends.

A peer that is allowed all addresses gets everything that is not routed more precisely, as with
`wg-quick`: by a routing table of its own, and two rules that spare the node's packets, which are
marked.
"""

from __future__ import annotations

import functools
import ipaddress
import shutil
import subprocess
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import trio

from traversal.wire.address import Address

IpInterface = ipaddress.IPv4Interface | ipaddress.IPv6Interface
IpNetwork = ipaddress.IPv4Network | ipaddress.IPv6Network

START_SECONDS: Final = 5.0
STOP_SECONDS: Final = 2.0
CONTROL_DIRECTORY: Final = Path("/var/run/wireguard")
"""Where wireguard-go puts its control socket, and `wg` looks for it."""


VALID_MARK: Final = trio.Path("/proc/sys/net/ipv4/conf/all/src_valid_mark")


class WireGuardError(Exception):
    """WireGuard can't be set up, or ended; the text says why and what to do."""


@dataclass(frozen=True, slots=True)
class WireGuardPeer:
    """A peer as WireGuard knows it; `key` is base64, `endpoint` the bridge's socket."""

    key: str
    allowed: tuple[IpNetwork, ...]
    endpoint: Address


@dataclass(frozen=True, slots=True)
class WireGuardInterface:
    """The interface to make. `key` is the private key in base64, `mtu_bytes` of what is inside."""

    name: str
    key: str = field(repr=False)
    addresses: tuple[IpInterface, ...]
    port: int
    mtu_bytes: int
    mark: int = 0
    """Of the node's own packets, and number of the routing table for all others; 0 for none."""


async def run_wireguard(
    interface: WireGuardInterface,
    peers: Sequence[WireGuardPeer],
    *,
    task_status: trio.TaskStatus[str] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Keep the interface up until cancelled; tells "kernel" or "wireguard-go" when it is.

    Raises WireGuardError.
    """
    async with _device(interface.name) as (kind, ended):
        await _run(["wg", "setconf", interface.name, "/dev/stdin"], make_config(interface, peers))
        for command in make_commands(interface, peers):
            await _run(command)
        async with _rules(make_rules(interface, peers)):
            task_status.started(kind)
            await ended.wait()
        raise WireGuardError(f"{kind} of {interface.name} ended; its log says why")


async def sync_wireguard(
    interface: WireGuardInterface, before: Sequence[WireGuardPeer], after: Sequence[WireGuardPeer]
) -> None:
    """Change the peers of the interface that runs; sessions of those that stay go on.

    Raises WireGuardError.
    """
    await _run(["wg", "syncconf", interface.name, "/dev/stdin"], make_config(interface, after))
    old, new = routed_networks(interface, before), routed_networks(interface, after)
    for network in old:
        if network not in new:
            await _run(_route_command("delete", network, interface))
    for network in new:
        if network not in old:
            await _run(_route_command("replace", network, interface))


def make_config(interface: WireGuardInterface, peers: Sequence[WireGuardPeer]) -> str:
    """The text for `wg setconf`."""
    lines = ["[Interface]", f"PrivateKey = {interface.key}", f"ListenPort = {interface.port}"]
    for peer in peers:
        lines += [
            "[Peer]",
            f"PublicKey = {peer.key}",
            f"AllowedIPs = {', '.join(map(str, peer.allowed))}",
            f"Endpoint = {peer.endpoint}",
        ]
    return "\n".join(lines) + "\n"


def make_commands(interface: WireGuardInterface, peers: Sequence[WireGuardPeer]) -> list[list[str]]:
    """What gives the interface its addresses, and peers' networks their routes."""
    name = interface.name
    commands = [
        ["ip", "address", "add", str(address), "dev", name] for address in interface.addresses
    ]
    commands.append(["ip", "link", "set", "dev", name, "mtu", str(interface.mtu_bytes), "up"])
    commands += [
        _route_command("replace", network, interface)
        for network in routed_networks(interface, peers)
    ]
    return commands


def routed_networks(
    interface: WireGuardInterface, peers: Sequence[WireGuardPeer]
) -> list[IpNetwork]:
    """The peers' networks that need a route: those that are not the interface's own."""
    own = [address.network for address in interface.addresses]
    return [
        network
        for peer in peers
        for network in peer.allowed
        if not any(
            network.version == one.version and network.subnet_of(one)  # type: ignore[arg-type]
            for one in own
        )
    ]


def _route_command(action: str, network: IpNetwork, interface: WireGuardInterface) -> list[str]:
    family = "-6" if network.version == 6 else "-4"
    command = ["ip", family, "route", action, str(network), "dev", interface.name]
    return [*command, "table", str(interface.mark)] if network.prefixlen == 0 else command


def make_rules(
    interface: WireGuardInterface, peers: Sequence[WireGuardPeer]
) -> list[tuple[str, list[str]]]:
    """With a mark, rules that lead what is neither marked nor routed by more than a default route
    to the table of that number; each with the option for its family. While the table is empty they
    change nothing."""
    if not interface.mark:
        return []
    mark = str(interface.mark)
    versions = {address.version for address in interface.addresses}
    versions |= {network.version for peer in peers for network in peer.allowed}
    return [
        (f"-{version}", rule)
        for version in sorted(versions)
        for rule in (
            ["not", "fwmark", mark, "table", mark],
            ["table", "main", "suppress_prefixlength", "0"],
        )
    ]


@asynccontextmanager
async def _rules(rules: Sequence[tuple[str, list[str]]]) -> AsyncIterator[None]:
    made: list[tuple[str, list[str]]] = []
    try:
        for family, rule in rules:
            await _run(["ip", family, "rule", "add", *rule])
            made.append((family, rule))
        if made:
            # Else strict filters of the reverse path drop what answers marked packets.
            with suppress(OSError):
                await VALID_MARK.write_text("1")
        yield
    finally:
        with trio.move_on_after(STOP_SECONDS, shield=True):
            for family, rule in made:
                await trio.run_process(["ip", family, "rule", "delete", *rule], check=False)


@asynccontextmanager
async def _device(name: str) -> AsyncIterator[tuple[str, trio.Event]]:
    """The interface, and an event that is set if it ends by itself."""
    for program, package in (("ip", "iproute2"), ("wg", "wireguard-tools")):
        if shutil.which(program) is None:
            raise WireGuardError(f"the program {program} is missing: install {package}")
    made = await trio.run_process(
        ["ip", "link", "add", "dev", name, "type", "wireguard"],
        check=False,
        capture_stderr=True,
    )
    if made.returncode == 0:
        try:
            yield "kernel", trio.Event()
        finally:
            with trio.move_on_after(STOP_SECONDS, shield=True):
                await trio.run_process(["ip", "link", "delete", "dev", name], check=False)
        return
    problem = made.stderr.decode(errors="replace").strip()
    if "exist" in problem.lower():
        raise WireGuardError(f"there is an interface {name} already: remove it, or name another")
    if shutil.which("wireguard-go") is None:
        raise WireGuardError(
            f"this kernel makes no WireGuard interface ({problem}), and wireguard-go is not "
            "installed: install one of the two, and run as root"
        )
    async with _wireguard_go(name) as ended:
        yield "wireguard-go", ended


@asynccontextmanager
async def _wireguard_go(name: str) -> AsyncIterator[trio.Event]:
    ended = trio.Event()
    async with trio.open_nursery() as nursery:
        run = functools.partial(trio.run_process, check=False, stdin=subprocess.DEVNULL)
        process: trio.Process = await nursery.start(run, ["wireguard-go", "-f", name])

        async def watch() -> None:
            await process.wait()
            ended.set()

        nursery.start_soon(watch)
        socket = trio.Path(CONTROL_DIRECTORY / f"{name}.sock")
        with trio.move_on_after(START_SECONDS):
            while not (await socket.exists() or ended.is_set()):  # noqa: ASYNC110
                await trio.sleep(0.02)
        if ended.is_set() or not await socket.exists():
            raise WireGuardError(f"wireguard-go made no interface {name}; it must run as root")
        try:
            yield ended
        finally:
            process.terminate()
            nursery.cancel_scope.cancel()


async def _run(command: list[str], text: str = "") -> None:
    done = await trio.run_process(
        command, stdin=text.encode(), check=False, capture_stdout=True, capture_stderr=True
    )
    if done.returncode:
        problem = done.stderr.decode(errors="replace").strip()
        raise WireGuardError(f"{' '.join(command)}: {problem}")
