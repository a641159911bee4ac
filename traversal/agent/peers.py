"""The peers of a running agent: their links and bridges, which follow the agent's file."""

from __future__ import annotations

from dataclasses import dataclass, field

import trio

from traversal.agent.bridge import run_bridge
from traversal.agent.config import AgentConfig, ConfigError, PeerConfig
from traversal.agent.wireguard import WireGuardPeer
from traversal.io.udp import UdpError
from traversal.keys import KeyFormatError, NodePublic
from traversal.link import Link
from traversal.node import Node, NodeError
from traversal.paths.punch_strategy import PunchPolicy
from traversal.wire.address import Address

ANY_PORT = Address("127.0.0.1", 0)


class Peers:
    """Who is a peer. Bridges run in `nursery`.

    Attributes:
        names: by raw node key.
    """

    def __init__(self, config: AgentConfig) -> None:
        self.names = _names(config)
        self._running: dict[PeerConfig, _Running] = {}

    def admit(self, key: NodePublic) -> bool:
        """Whether a node key is a peer's."""
        return key.raw in self.names

    def wireguard(self) -> list[WireGuardPeer]:
        """What our WireGuard interface has to know."""
        return [
            WireGuardPeer(peer.wireguard_key, peer.allowed, running.endpoint)
            for peer, running in self._running.items()
            if peer.wireguard_key and running.endpoint is not None
        ]

    async def apply(self, config: AgentConfig, node: Node, nursery: trio.Nursery) -> None:
        """Have the peers of `config` and no others; those that are as they were notice nothing.

        Raises ConfigError that names every peer which can't be had; the others are.
        """
        self.names = _names(config)
        for peer in self._running.keys() - set(config.peers):
            await self._running.pop(peer).end()
        problems = []
        for peer in config.peers:
            if peer not in self._running:
                try:
                    self._running[peer] = await _start(peer, config, node, nursery)
                except (NodeError, KeyFormatError, UdpError) as error:
                    problems.append(f"peer {peer.name}: {error}")
        node.set_peer_relays(peer.key for peer in config.peers if peer.is_peer_relay)
        if problems:
            raise ConfigError("; ".join(problems))


@dataclass(slots=True)
class _Running:
    link: Link
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    bridge_ended: trio.Event = field(default_factory=trio.Event)
    endpoint: Address | None = None

    async def run_bridge(
        self,
        endpoint: Address,
        wireguard: Address,
        *,
        task_status: trio.TaskStatus[Address],
    ) -> None:
        try:
            with self.scope:
                await run_bridge(self.link, endpoint, wireguard, task_status=task_status)
        finally:
            self.bridge_ended.set()

    async def end(self) -> None:
        """Close link and bridge; the bridge's port is free afterwards."""
        self.scope.cancel()
        if self.endpoint is not None:
            await self.bridge_ended.wait()
        self.link.close()


async def _start(
    peer: PeerConfig, config: AgentConfig, node: Node, nursery: trio.Nursery
) -> _Running:
    """Raises NodeError, KeyFormatError, UdpError."""
    may_search = config.may_search_ports and peer.may_search_ports
    policy = PunchPolicy(is_enabled=may_search)
    running = _Running(await node.connect(peer.key, relay=peer.relay, port_search=policy))
    wanted = peer.endpoint or (ANY_PORT if peer.wireguard_key else None)
    if wanted is not None and config.wireguard is not None:
        running.endpoint = await nursery.start(running.run_bridge, wanted, config.wireguard)
    return running


def _names(config: AgentConfig) -> dict[bytes, str]:
    return {peer.key.raw: peer.name for peer in config.peers}
