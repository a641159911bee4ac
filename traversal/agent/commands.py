"""What the commands `underpass netcheck`, `ping`, `up` and `status` do.

Apart from `traversal.cli`, which needs nothing of this to print a help text.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final, TypeVar

import trio

from traversal.agent.config import (
    AgentConfig,
    ConfigError,
    UnavailableError,
    load_config,
    load_map,
)
from traversal.agent.service import Agent, ControlError, NoAgentError, ask, ping_once, run_agent
from traversal.agent.status import link_status, nat_status, report_status
from traversal.agent.wireguard import WireGuardError
from traversal.io.udp import UdpError
from traversal.keys import KeyFormatError, NodePrivate, NodePublic
from traversal.link import PathKind
from traversal.node import NodeError, open_node
from traversal.paths.punch_strategy import PunchPolicy
from traversal.relay_map import RelayMap

_T = TypeVar("_T")
Say = Callable[[str], None]

UNTIL_DIRECT_PAUSE_SECONDS: Final = 0.25
PING_PAUSE_SECONDS: Final = 1.0


class CommandError(Exception):
    """A command can't do what was asked; the text says why and what to do.

    Attributes:
        is_usage: whether the command line, or a file that it names, is wrong.
    """

    def __init__(self, text: str, *, is_usage: bool) -> None:
        super().__init__(text)
        self.is_usage = is_usage


_FAILURES: Final = (
    CommandError,
    ConfigError,
    ControlError,
    KeyFormatError,
    NodeError,
    UdpError,
    WireGuardError,
)


def run(main: Callable[[], Awaitable[_T]]) -> _T:
    """Run with Trio; what fails in one of its tasks comes out alone.

    Raises CommandError, KeyboardInterrupt, BrokenPipeError when nobody reads what is printed, and
    whatever else is a mistake in Underpass.
    """
    try:
        return trio.run(main)
    except BaseException as error:
        for cause in _leaves(error):
            if isinstance(cause, KeyboardInterrupt | BrokenPipeError):
                raise cause from None
            if isinstance(cause, _FAILURES):
                raise CommandError(str(cause), is_usage=_is_usage(cause)) from None
        raise


def _is_usage(cause: BaseException) -> bool:
    if isinstance(cause, CommandError):
        return cause.is_usage
    return isinstance(cause, ConfigError | KeyFormatError) and not isinstance(
        cause, UnavailableError
    )


def _leaves(error: BaseException) -> list[BaseException]:
    if not isinstance(error, BaseExceptionGroup):
        return [error]
    return [leaf for inner in error.exceptions for leaf in _leaves(inner)]


async def netcheck(map_source: str | None, config_path: Path) -> dict[str, Any]:
    """A net check by a node of its own."""
    config = _maybe_config(config_path)
    relay_map = await _find_map(map_source, config, config_path)
    mark = config.socket_mark if config is not None else 0
    async with open_node(NodePrivate.generate(os.urandom), relay_map, socket_mark=mark) as node:
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


async def status(config_path: Path) -> dict[str, Any]:
    """What the running agent says."""
    return await ask(load_config(config_path).control, "status")


async def ping(
    peer: str,
    region: int,
    *,
    until_direct: bool,
    count: int,
    timeout_seconds: float,
    map_source: str | None,
    config_path: Path,
    tell: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """Ping by the running agent or by a node of our own; `tell` hears of each ping."""
    config = _maybe_config(config_path)
    pings: list[dict[str, Any]] = []

    async def ping_often(ask_once: Callable[[], Awaitable[dict[str, Any]]]) -> None:
        with trio.move_on_after(timeout_seconds):
            while True:
                answer = await ask_once()
                pings.append(answer)
                tell(answer)
                is_direct = answer["path"]["kind"] == PathKind.DIRECT.value
                if is_direct if until_direct else len(pings) == count:
                    return
                await trio.sleep(UNTIL_DIRECT_PAUSE_SECONDS if until_direct else PING_PAUSE_SECONDS)

    async def by_agent(control: Path) -> dict[str, Any]:
        found: dict[str, Any] = {}

        async def ask_once() -> dict[str, Any]:
            found.update(await ask(control, "ping", peer=peer))
            answer: dict[str, Any] = found.pop("ping")
            return answer

        await ping_often(ask_once)
        if not found:
            raise CommandError(
                f"{control}: the agent did not answer within {timeout_seconds:g} s", is_usage=False
            )
        return found

    async def by_own_node() -> dict[str, Any]:
        entry = config.peer(peer) if config is not None else None
        try:
            peer_key = entry.key if entry is not None else NodePublic.parse(peer)
        except KeyFormatError as error:
            raise CommandError(_no_peer(peer, config, config_path, error), is_usage=True) from None
        key = config.private_key if config is not None else NodePrivate.generate(os.urandom)
        may_search = config is None or config.may_search_ports
        if entry is not None:
            may_search &= entry.may_search_ports
        policy = PunchPolicy(is_enabled=may_search)
        relay_map = await _find_map(map_source, config, config_path)
        async with open_node(
            key, relay_map, port_search=policy, socket_mark=config.socket_mark if config else 0
        ) as node:
            home = region or (entry.relay if entry is not None else 0) or node.home_region
            link = await node.connect(peer_key, relay=home)
            await ping_often(lambda: ping_once(link))
            return link_status(link, peer if entry is not None else peer_key.short())

    if config is not None:
        try:
            return {"pings": pings, **await by_agent(config.control)}
        except NoAgentError:
            pass
    return {"pings": pings, **await by_own_node()}


async def up(config_path: Path, say: Say) -> None:
    """Be the node agent until SIGINT or SIGTERM; SIGHUP reads file and relay map again."""
    config = load_config(config_path)
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM, signal.SIGHUP) as signals:
        async with trio.open_nursery() as nursery:
            agent: Agent | None = None
            reloading = trio.Lock()

            async def serve() -> None:
                nonlocal agent
                relay_map = await _load_map(config.relay_map)
                agent = await nursery.start(run_agent, config, relay_map)
                node = agent.node
                say(f"{node.public_key}, home region {node.home_region or 'none'}")
                for peer in config.peers:
                    if peer.endpoint is not None:
                        say(f"WireGuard endpoint of {peer.name}: {peer.endpoint}")

            nursery.start_soon(serve)
            async for number in signals:
                if number != signal.SIGHUP:
                    nursery.cancel_scope.cancel()
                elif agent is not None:
                    nursery.start_soon(_reload, config_path, agent, reloading, say)
    say("stopped")


async def _reload(config_path: Path, agent: Agent, reloading: trio.Lock, say: Say) -> None:
    async with reloading:
        try:
            config = load_config(config_path)
            relay_map = await _load_map(config.relay_map)
        except ConfigError as error:
            say(f"everything stays as it is: {error}")
            return
        try:
            needs_restart = await agent.reload(config, relay_map)
        except (ConfigError, WireGuardError) as error:
            say(f"reloaded, but {error}")
            return
    say(f"reloaded: {len(config.peers)} peers, {len(relay_map.regions)} regions")
    if needs_restart:
        say(f"changes that need a restart: {', '.join(needs_restart)}")


def _no_peer(
    peer: str, config: AgentConfig | None, config_path: Path, error: KeyFormatError
) -> str:
    if config is None:
        return f"{peer!r} is no node key ({error}), and there is no {config_path} with names"
    names = ", ".join(entry.name for entry in config.peers[:10]) or "nobody"
    return f"{peer!r} is no peer in {config_path} (there is {names}) and no node key: {error}"


def _maybe_config(path: Path) -> AgentConfig | None:
    return load_config(path) if path.exists() else None


async def _find_map(source: str | None, config: AgentConfig | None, config_path: Path) -> RelayMap:
    if source is None:
        if config is None:
            raise CommandError(
                f"no relay map: give --map FILE, or write {config_path}", is_usage=True
            )
        source = config.relay_map
    return await _load_map(source)


async def _load_map(source: str) -> RelayMap:
    """In a thread, so that signals are heard while a server does not answer."""
    return await trio.to_thread.run_sync(load_map, source, abandon_on_cancel=True)
