"""The agent's task tree: the node, links to all peers, their bridges, the control socket."""

from __future__ import annotations

import errno
import json
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgspec
import trio

from traversal.agent.config import AgentConfig, ConfigError, EdgeConfig, UnavailableError
from traversal.agent.peers import Peers
from traversal.agent.state import remembered
from traversal.agent.status import link_status, node_status, path_status
from traversal.agent.wireguard import run_wireguard, sync_wireguard
from traversal.io.interfaces import InterfaceFilter
from traversal.io.marking import marked
from traversal.io.peer_relay_server import PeerRelayOptions
from traversal.io.relay_client import RelayOptions
from traversal.link import Link
from traversal.node import Node, open_node
from traversal.paths.edge import EdgePolicy
from traversal.paths.punch_strategy import PunchPolicy
from traversal.relay_map import Family, RelayMap
from traversal.tunnel.settings import TunnelSettings

if TYPE_CHECKING:
    from traversal.io.edge_client import EdgeOptions

logger = logging.getLogger("underpass.agent")

TUNNEL_AGAIN_SECONDS: Final = 60.0
ACCEPT_AGAIN_SECONDS: Final = 1.0
ASK_SECONDS: Final = 5.0
PING_SECONDS: Final = 2.0
MAX_SOCKET_PATH_BYTES: Final = 107
"""Of Linux."""
MAX_QUESTION_BYTES: Final = 4096
MAX_ANSWER_BYTES: Final = 64 << 20


class ControlError(Exception):
    """The agent can't be asked; the text says why."""


class NoAgentError(ControlError):
    """No agent is running."""


async def run_agent(
    config: AgentConfig,
    relay_map: RelayMap,
    *,
    hosts: dict[Family, str] | None = None,
    relay_options: RelayOptions | None = None,
    map_ports: bool = True,
    task_status: trio.TaskStatus[Agent] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve until cancelled.

    Raises UdpError, NodeError and ConfigError when it can't begin.
    """
    peers = Peers(config)
    peer_relay = None
    if config.peer_relay_port is not None:
        peer_relay = PeerRelayOptions(port=config.peer_relay_port)
    policy = PunchPolicy(is_enabled=config.may_search_ports)
    with _listening(config.control) as listener, remembered(config.state) as memory:
        async with (
            open_node(
                config.private_key,
                relay_map,
                port=config.port,
                hosts=hosts,
                admit=peers.admit,
                relay_options=relay_options,
                static_addresses=config.static_addresses,
                interfaces=_interfaces(config),
                home=config.home,
                socket_mark=config.socket_mark,
                map_ports=map_ports,
                peer_relay=peer_relay,
                edge=_edge_options(config.edge) if config.edge is not None else None,
                edge_policy=config.edge.policy if config.edge is not None else EdgePolicy.LAST,
                port_search=policy,
                punch_memory=memory,
            ) as node,
            trio.open_nursery() as nursery,
        ):
            await peers.apply(config, node, nursery)
            if config.interface is not None:
                await nursery.start(run_wireguard, config.interface, peers.wireguard())
            task_status.started(Agent(config, relay_map, node, peers, nursery))
            if config.tunnel is not None:
                nursery.start_soon(_keep_tunnel, config.tunnel, config.socket_mark)
            while True:
                try:
                    sock, _ = await listener.accept()
                except OSError as error:
                    logger.error("The control socket: %s", error)  # no files left, for example
                    await trio.sleep(ACCEPT_AGAIN_SECONDS)
                    continue
                nursery.start_soon(_serve, sock, node, peers)


class Agent:
    """A running agent, as `run_agent` tells its starter.

    Attributes:
        config: in use.
    """

    def __init__(
        self,
        config: AgentConfig,
        relay_map: RelayMap,
        node: Node,
        peers: Peers,
        nursery: trio.Nursery,
    ) -> None:
        self.config = config
        self.node = node
        self._relay_map = relay_map
        self._peers = peers
        self._nursery = nursery

    async def reload(self, config: AgentConfig, relay_map: RelayMap) -> tuple[str, ...]:
        """Use another relay map and other peers; returns the keys whose changes need a restart.

        Raises ConfigError for peers that can't be had, WireGuardError.
        """
        if relay_map != self._relay_map:
            self._relay_map = relay_map
            self.node.set_relay_map(relay_map)
        before = self.config
        self.config = msgspec.structs.replace(
            before, peers=config.peers, relay_map=config.relay_map
        )
        known = self._peers.wireguard()
        try:
            await self._peers.apply(self.config, self.node, self._nursery)
        finally:
            if before.interface is not None:
                await sync_wireguard(before.interface, known, self._peers.wireguard())
        return tuple(
            name
            for name in config.__struct_fields__
            if getattr(config, name) != getattr(self.config, name)
        )


def _interfaces(config: AgentConfig) -> InterfaceFilter:
    """As configured, and never the one whose packets we carry."""
    wanted = config.interfaces
    if config.interface is None:
        return wanted
    return replace(wanted, excluded=(config.interface.name,))


def _edge_options(edge: EdgeConfig) -> EdgeOptions:
    # Imported late: QUIC and HTTP/2 are slow to import, and few agents need them.
    from traversal.io.edge_client import EdgeOptions
    from traversal.io.edge_dial import EdgeAddress

    addresses = tuple(EdgeAddress(host, port) for host, port in edge.addresses)
    return EdgeOptions(addresses, edge.credentials, ca_file=edge.ca_file)


async def _keep_tunnel(settings: TunnelSettings, mark: int) -> None:
    """Serve a tunnel; what is wrong with it must not cost the node its peers."""
    # Imported late: not every agent has a tunnel.
    from traversal.tunnel.connector import ConnectorError
    from traversal.tunnel.running import run_tunnel

    while True:
        try:
            with marked(mark):
                await run_tunnel(settings)
        except ConnectorError as error:
            logger.error("The tunnel does not work: %s", error)
        await trio.sleep(TUNNEL_AGAIN_SECONDS)


@contextmanager
def _listening(path: Path) -> Iterator[trio.socket.SocketType]:
    with _listen(path) as listener:
        try:
            yield listener
        finally:
            path.unlink(missing_ok=True)


def _listen(path: Path) -> trio.socket.SocketType:
    sock = trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    inner = socket.socket(fileno=sock.detach())
    try:
        if len(os.fsencode(path)) > MAX_SOCKET_PATH_BYTES:
            raise ConfigError(
                f"{path}: a socket's path has at most {MAX_SOCKET_PATH_BYTES} bytes; set control "
                "to a shorter one"
            )
        if path.exists() and not path.is_socket():
            raise ConfigError(f"{path}: is no socket; remove it, or set control to another path")
        if path.is_socket():
            _unlink_if_dead(path)
        before = os.umask(0o177)
        try:
            inner.bind(str(path))
        finally:
            os.umask(before)
        inner.listen(16)
    except OSError as error:
        inner.close()
        raise UnavailableError(
            f"{path}: {error.strerror or error}; set control to a path where this user may write"
        ) from None
    except BaseException:
        inner.close()
        raise
    return trio.socket.from_stdlib_socket(inner)


def _unlink_if_dead(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)  # an agent that hangs accepts nobody
        fault = probe.connect_ex(str(path))
    if fault in (0, errno.EAGAIN):
        raise UnavailableError(f"{path}: another agent answers there; stop it first")
    if fault not in (errno.ECONNREFUSED, errno.ENOENT):
        raise ConfigError(f"{path}: {os.strerror(fault)}; set control to a path of our own")
    path.unlink(missing_ok=True)


async def _serve(sock: trio.socket.SocketType, node: Node, peers: Peers) -> None:
    """One question, one answer, both a line of JSON."""
    stream = trio.SocketStream(sock)
    try:
        async with stream:
            with trio.move_on_after(ASK_SECONDS):
                question = b""
                while not question.endswith(b"\n") and len(question) < MAX_QUESTION_BYTES:
                    data = await stream.receive_some()
                    if not data:
                        return
                    question += data
                answer = await _answer(question, node, peers.names)
                await stream.send_all(json.dumps(answer).encode() + b"\n")
    except trio.BrokenResourceError:
        pass


async def _answer(question: bytes, node: Node, names: dict[bytes, str]) -> dict[str, Any]:
    try:
        asked = json.loads(question)
        command, peer = asked["command"], asked.get("peer")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return {"error": 'a question is a line of JSON with a "command"'}
    if command == "status":
        return node_status(node, names)
    if command == "ping":
        for link in node.links:
            name = names.get(link.peer_key.raw, "")
            if peer in (name, str(link.peer_key)):
                return {"ping": await ping_once(link), **link_status(link, name)}
        return {"error": f"the agent has no peer {peer!r}"}
    return {"error": f"unknown command {command!r}; there are status and ping"}


async def ping_once(link: Link) -> dict[str, Any]:
    """Ping a peer: how long it took, by which way, and the path that datagrams take."""
    answer = await link.ping(PING_SECONDS)
    path = link.path
    way = None
    if answer is not None:
        way = str(answer.address) if answer.address is not None else f"relay {path.region}"
    return {
        "latency_seconds": answer.latency_seconds if answer is not None else None,
        "way": way,
        "path": path_status(path),
    }


async def ask(path: Path, command: str, **more: str) -> dict[str, Any]:
    """Ask the agent at a control socket. Raises ControlError; NoAgentError if none is there."""
    data = b""
    try:
        with trio.fail_after(ASK_SECONDS):
            try:
                stream = await trio.open_unix_socket(str(path))
            except OSError as error:
                reason = error.strerror or str(error)
                raise NoAgentError(
                    f'{path}: no agent answers ({reason}); is "underpass up" running?'
                ) from None
            async with stream:
                await stream.send_all(json.dumps({"command": command, **more}).encode() + b"\n")
                async for chunk in stream:
                    data += chunk
                    if len(data) > MAX_ANSWER_BYTES:
                        raise ControlError(f"{path}: the answer has no end")
        answer = json.loads(data)
    except trio.TooSlowError:
        raise ControlError(f"{path}: the agent did not answer within 5 s") from None
    except (ValueError, trio.BrokenResourceError):
        raise ControlError(f"{path}: what answers there is no agent of Underpass") from None
    if not isinstance(answer, dict) or "error" in answer:
        raise ControlError(str(answer["error"] if isinstance(answer, dict) else answer))
    return answer
