"""A node's own UDP peer relay: its sockets, and how it finds out where others reach them.

The shell around `traversal.paths.peer_relay_server`. The relay has a port of its own, best one that
a router forwards or a firewall leaves open. Where it is reached is found out every 20 to 26 s: the
interfaces' addresses, and what STUN servers see (peer relay specification 11). Unlike the node's
own socket it asks no router for a mapping.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Final

import trio

from traversal.io.net_check import NetCheck
from traversal.io.relay_client import RelayOptions
from traversal.io.resolver import Resolver
from traversal.io.udp import Batch, Source, UdpSockets
from traversal.keys import DiscoPrivate, Entropy, NodePublic
from traversal.paths.own_addresses import Findings, OwnAddresses
from traversal.paths.peer_relay_server import (
    SWEEP_SECONDS,
    AllocationError,
    PeerRelayLimits,
    PeerRelayServer,
    PeerRelayStatistics,
)
from traversal.paths.probe_plan import make_plan
from traversal.paths.report import Report
from traversal.relay_map import Family, RelayMap
from traversal.wire.address import Address
from traversal.wire.classify import Kind, classify
from traversal.wire.disco import AllocateRequest, AllocateResponse

REDISCOVERY_SECONDS: Final = (20.0, 26.0)


@dataclass(frozen=True, slots=True)
class PeerRelayOptions:
    """How a node serves as a peer relay for others.

    Attributes:
        port: UDP port for both families; 0 lets the kernel choose.
        static_addresses: where others reach it besides what is found, for forwarded ports.
        admit: which of the node's peers may have two nodes meet here; by default all of them.
        limits: of the endpoints that it keeps.
    """

    port: int = 0
    static_addresses: tuple[Address, ...] = ()
    admit: Callable[[NodePublic], bool] | None = None
    limits: PeerRelayLimits = field(default_factory=PeerRelayLimits)


class PeerRelayService:
    """Run `run` in a task; it says that it has started when it knows its addresses."""

    def __init__(
        self,
        options: PeerRelayOptions,
        relay_map: RelayMap,
        *,
        hosts: dict[Family, str] | None,
        find_local_hosts: Callable[[], Iterable[str]],
        relay_options: RelayOptions,
        entropy: Entropy,
        rng: random.Random,
    ) -> None:
        self._options = options
        self._map = relay_map
        self._find_local_hosts = find_local_hosts
        self._rng = rng
        self._udp = UdpSockets(hosts)
        self._check = NetCheck(self._udp, Resolver(), entropy, relay_options)
        self._book = OwnAddresses()
        self._server = PeerRelayServer(DiscoPrivate.generate(entropy), entropy, options.limits)
        self._last: Report | None = None

    def set_map(self, relay_map: RelayMap) -> None:
        """Find our addresses by the servers of another relay map."""
        self._map = relay_map

    def statistics(self) -> PeerRelayStatistics:
        """A snapshot."""
        return self._server.statistics()

    @property
    def addresses(self) -> tuple[Address, ...]:
        """Where clients are told to reach us."""
        return self._server.addresses

    def maybe_allocate(
        self, requester: NodePublic, request: AllocateRequest, now: float
    ) -> AllocateResponse | None:
        """An endpoint for a pair of which `requester` is one; None when there is none for it."""
        admit = self._options.admit
        if admit is not None and not admit(requester):
            return None
        try:
            return self._server.allocate(requester, request, now)
        except AllocationError:
            return None

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until cancelled. Raises UdpError when the port can't be had."""
        await self._udp.open(self._options.port)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._udp.receive, self._handle_batch)
                nursery.start_soon(self._sweep_forever)
                await self._discover()
                task_status.started()
                while True:
                    await trio.sleep(self._rng.uniform(*REDISCOVERY_SECONDS))
                    await self._discover()
        finally:
            self._udp.close()

    async def _sweep_forever(self) -> None:
        while True:
            await trio.sleep(SWEEP_SECONDS)
            self._server.on_time(trio.current_time())

    def _handle_batch(self, batch: Batch) -> None:
        # Runs for one destination leave in one system call.
        now = trio.current_time()
        outgoing: dict[Source, list[bytes]] = {}
        handle = self._server.handle_datagram
        for datagram, source in batch:
            if datagram[4:8] == b"\x21\x12\xa4\x42" and classify(datagram) is Kind.STUN:
                self._check.handle_stun(datagram, source, now)
                continue
            to_send = handle(datagram, source, now)
            if to_send is not None:
                outgoing.setdefault(to_send[1], []).append(to_send[0])
        for destination, datagrams in outgoing.items():
            self._udp.send_many(datagrams, destination)

    async def _discover(self) -> None:
        local = [
            Address(host, port)
            for host in self._find_local_hosts()
            if (port := self._udp.port(6 if ":" in host else 4)) is not None
        ]
        families: set[Family] = {6 if address.is_ipv6 else 4 for address in local}
        report = Report(trio.current_time())
        last = self._last.last_report() if self._last is not None else None
        await self._check.run(report, make_plan(self._map, frozenset(families), last, 0))
        self._last = report
        findings = Findings(
            reflexive=tuple(report.reflexive_addresses()),
            local=tuple(local),
            guess_port=(self._udp.port(4) or 0) if report.mapping_varies else 0,
        )
        found = self._book.handle_findings(findings, trio.current_time())
        everywhere = (*self._options.static_addresses, *(address for _, address in found))
        self._server.addresses = tuple(dict.fromkeys(everywhere))
