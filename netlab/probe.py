"""The conformance probe: measure what a NAT does, by the method of RFC 5780.

Both sides are plain Trio programs over `trio.socket`, so they run in every back end: the server
on a machine with three addresses, `probe_nat` on a host behind the NAT. Every test uses fresh
sockets, and filtering is measured before anything else has touched the servers.
"""

from __future__ import annotations

import itertools
import math
import random
import socket as stdlib
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import trio

from netlab.addresses import NAT64_PREFIX
from netlab.behavior import (
    Filtering,
    Hairpin,
    Mapping,
    NatBehavior,
    PortAssignment,
    Refresh,
    Translation,
    Unsolicited,
)
from netlab.stun import Request, Response, StunError, parse

Address = tuple[str, int]
Pause = Callable[[float], Awaitable[None]]

# Sockets opened one after the other to see how ports are assigned; fewer could preserve all
# ports or keep a step by chance.
_ASSIGNMENT_SOCKETS = 8

# A request is repeated once: on a lossy link a silent filter is then told from loss.
_ATTEMPTS = 2

# A NAT that takes any of its addresses for each mapping soon takes a given one.
_ADDRESS_ATTEMPTS = 50


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeServers:
    """Where the probe's server listens: three addresses, each with two ports."""

    addresses: tuple[str, str, str]
    ports: tuple[int, int] = (3478, 3479)


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeReport:
    """What was measured. None means that it could not be, or was not asked for."""

    reachable: bool
    mapping: Mapping | None = None
    filtering: Filtering | None = None
    translates: bool | None = None
    preserves_ports: bool | None = None
    port_step: int | None = None
    """The constant distance between the ports of new sockets, if there is one."""
    external: tuple[Address, ...] = field(default=())
    """Every external endpoint that was seen."""
    hairpin: Hairpin | None = None
    keeps_mapping_after_early_packet: bool | None = None
    lifetime_seconds: float | None = None
    refresh: Refresh | None = None

    @property
    def class_name(self) -> str | None:
        if self.mapping is None or self.filtering is None:
            return None
        return f"{self.mapping.name}+{self.filtering.name}"


# --- the server --------------------------------------------------------------------------


async def serve_probe(
    servers: ProbeServers, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
) -> None:
    """Answer probes on all addresses and ports until cancelled."""
    family = stdlib.AF_INET6 if ":" in servers.addresses[0] else stdlib.AF_INET
    sockets: dict[tuple[int, int], trio.socket.SocketType] = {}
    try:
        for a, address in enumerate(servers.addresses):
            for p, port in enumerate(servers.ports):
                sockets[a, p] = trio.socket.socket(family, stdlib.SOCK_DGRAM)
                await sockets[a, p].bind((address, port))
        async with trio.open_nursery() as nursery:
            for a, p in sockets:
                nursery.start_soon(_serve_socket, sockets, a, p)
            task_status.started()
    finally:
        for sock in sockets.values():
            sock.close()


async def _serve_socket(
    sockets: dict[tuple[int, int], trio.socket.SocketType], a: int, p: int
) -> None:
    addresses = 1 + max(index for index, _ in sockets)
    while True:
        try:
            data, source = await sockets[a, p].recvfrom(2048)
            request = parse(data)
        except (StunError, ConnectionError):
            continue
        if not isinstance(request, Request):
            continue
        answer_from = sockets[
            (a + 1) % addresses if request.change_address else a,
            1 - p if request.change_port else p,
        ]
        host, port = source[:2]
        response = Response(transaction=request.transaction, address=host, port=port)
        target = (host, port if request.response_port is None else request.response_port)
        try:
            await answer_from.sendto(response.encode(), target)
        except OSError:
            continue  # the asking host has no way back any more


# --- the client --------------------------------------------------------------------------


class _Prober:
    """One probe run: its sockets' common settings and everything seen so far."""

    def __init__(
        self,
        servers: ProbeServers,
        timeout_seconds: float,
        generator: random.Random,
        pause: Pause,
    ) -> None:
        self.servers = servers
        self.timeout_seconds = timeout_seconds
        self.generator = generator
        self.pause = pause
        self.family = stdlib.AF_INET6 if ":" in servers.addresses[0] else stdlib.AF_INET
        self.seen: dict[Address, None] = {}

    def at(self, address: int, port: int) -> Address:
        return self.servers.addresses[address], self.servers.ports[port]

    @contextmanager
    def socket(self) -> Iterator[_ProbeSocket]:
        with trio.socket.socket(self.family, stdlib.SOCK_DGRAM) as sock:
            yield _ProbeSocket(self, sock)


class _ProbeSocket:
    """A fresh socket that asks for its external endpoint."""

    def __init__(self, prober: _Prober, sock: trio.socket.SocketType) -> None:
        self._prober = prober
        self.sock = sock

    async def ask(self, server: Address, **options: Any) -> Address | None:
        """Return the external endpoint that `server` saw; None for silence."""
        for _ in range(_ATTEMPTS):
            transaction = self._prober.generator.randbytes(12)
            request = Request(transaction=transaction, **options)
            await self.sock.sendto(request.encode(), server)
            response = await self.hear(transaction)
            if response is not None:
                external = (response[0].address, response[0].port)
                self._prober.seen[external] = None
                return external
        return None

    async def hear(self, transaction: bytes) -> tuple[Response, Address] | None:
        """Wait for the response to a transaction; return it with its source."""
        with trio.move_on_after(self._prober.timeout_seconds):
            while True:
                try:
                    data, source = await self.sock.recvfrom(2048)
                    message = parse(data)
                except (StunError, ConnectionError):
                    continue
                if isinstance(message, Response) and message.transaction == transaction:
                    return message, source[:2]
        return None


async def probe_nat(
    servers: ProbeServers,
    *,
    generator: random.Random,
    timeout_seconds: float = 0.3,
    lifetime_limit_seconds: float | None = None,
    pause: Pause = trio.sleep,
) -> ProbeReport:
    """Measure the NAT that the current host is behind.

    Args:
        servers: where `serve_probe` runs.
        generator: draws the transaction identifiers.
        timeout_seconds: how long silence takes to be believed; more than a round trip.
        lifetime_limit_seconds: measure the mapping lifetime and the refresh direction, up to
            this; None skips both, since they take several lifetimes.
        pause: lets so many seconds pass for the NAT.

    Raises:
        OSError: the host has no network at all.
    """
    prober = _Prober(servers, timeout_seconds, generator, pause)
    with prober.socket() as sock:
        if await sock.ask(prober.at(0, 0)) is None:
            return ProbeReport(reachable=False)
    filtering = await _measure_filtering(prober)
    mapping = await _measure_mapping(prober)
    preserves, step, translates = await _measure_assignment(prober)
    lifetime = refresh = None
    if lifetime_limit_seconds is not None:
        lifetime = await _measure_lifetime(prober, lifetime_limit_seconds)
        if lifetime is not None:
            refresh = await _measure_refresh(prober, lifetime)
    return ProbeReport(
        reachable=True,
        mapping=mapping,
        filtering=filtering,
        translates=translates,
        preserves_ports=preserves,
        port_step=step,
        hairpin=await _measure_hairpin(prober),
        keeps_mapping_after_early_packet=await _measure_early_packet(prober),
        lifetime_seconds=lifetime,
        refresh=refresh,
        external=tuple(prober.seen),
    )


async def _measure_filtering(prober: _Prober) -> Filtering | None:
    """RFC 5780 section 4.4: after one packet to S1:1, who else may send in?"""
    with prober.socket() as sock:
        first = prober.at(0, 0)
        if await sock.ask(first) is None:
            return None
        if await sock.ask(first, change_address=True, change_port=True) is not None:
            return Filtering.EIF
        if await sock.ask(first, change_port=True) is not None:
            return Filtering.ADF
        return Filtering.APDF


async def _measure_mapping(prober: _Prober) -> Mapping | None:
    """RFC 5780 section 4.3, over five destinations; None for a mixture of the classes."""
    with prober.socket() as sock:
        seen = [
            await sock.ask(prober.at(a, p)) for a, p in ((0, 0), (0, 1), (1, 0), (1, 1), (2, 0))
        ]
    if None in seen:
        return None
    if len(set(seen)) == 1:
        return Mapping.EIM
    if len(set(seen)) == 5:
        return Mapping.APDM
    if seen[0] == seen[1] and seen[2] == seen[3] and len(set(seen)) == 3:
        return Mapping.ADM
    return None


async def _measure_assignment(prober: _Prober) -> tuple[bool | None, int | None, bool | None]:
    """Open sockets in a row: are ports preserved, are they a constant step apart, and does
    anything change at all?"""
    inside: list[Address] = []
    outside: list[Address] = []
    for _ in range(_ASSIGNMENT_SOCKETS):
        with prober.socket() as sock:
            await sock.sock.connect(prober.at(0, 0))
            inside.append(sock.sock.getsockname()[:2])
            external = await sock.ask(prober.at(0, 0))
            if external is None:
                return None, None, None
            outside.append(external)
    ports = [port for _, port in outside]
    preserves = ports == [port for _, port in inside]
    steps = [after - before for before, after in itertools.pairwise(ports)]
    common = max(steps, key=steps.count)
    # One other step is allowed: the counter may have passed the end of its range.
    regular = steps.count(common) >= len(steps) - 1
    step = common if regular and not preserves else None
    return preserves, step, inside != outside


async def _measure_hairpin(prober: _Prober) -> Hairpin | None:
    """RFC 5780 section 4.5 with two sockets: does a packet to X's external endpoint arrive?"""
    with prober.socket() as x, prober.socket() as y:
        target = await x.ask(prober.at(0, 0))
        if target is None or await y.ask(prober.at(0, 0)) is None:
            return None
        transaction = prober.generator.randbytes(12)
        probe = Response(transaction=transaction, address="0.0.0.0", port=0)
        if prober.family == stdlib.AF_INET6 and ":" not in target[0]:
            # Behind a NAT64 the server sees an IPv4 address; from inside it has the prefix.
            target = f"{NAT64_PREFIX.network_address}{target[0]}", target[1]
        for _ in range(_ATTEMPTS):
            await y.sock.sendto(probe.encode(), target)
            heard = await x.hear(transaction)
            if heard is not None:
                external = {address for address, _ in prober.seen}
                return Hairpin.EXTERNAL if heard[1][0] in external else Hairpin.INTERNAL
    return Hairpin.NONE


async def _measure_early_packet(prober: _Prober) -> bool | None:
    """Let a stranger send to the mapping first, then send to that stranger: is it the same
    mapping? Only meaningful where the mapping does not depend on the destination."""
    with prober.socket() as sock:
        before = await sock.ask(prober.at(0, 0))
        await sock.ask(prober.at(0, 0), change_address=True)
        after = await sock.ask(prober.at(1, 0))
        if before is None:
            return None
        # Silence means that the NAT has no way out for this flow any more.
        return before == after


async def _is_alive(prober: _Prober, x: _ProbeSocket, external: Address) -> bool:
    """Have the server send to a mapping without refreshing it: RFC 5780 section 4.6."""
    for _ in range(_ADDRESS_ATTEMPTS):
        with prober.socket() as y:
            # The server answers to the address that asks, which must be that of the mapping.
            asking = await y.ask(prober.at(0, 0))
            if asking is None or asking[0] != external[0]:
                continue
            for _ in range(_ATTEMPTS):
                transaction = prober.generator.randbytes(12)
                request = Request(transaction=transaction, response_port=external[1])
                await y.sock.sendto(request.encode(), prober.at(0, 0))
                if await x.hear(transaction) is not None:
                    return True
            return False
    return False


async def _measure_lifetime(prober: _Prober, limit_seconds: float) -> float | None:
    """Return how long an idle mapping lives, to 1 %; None beyond the limit."""

    async def survives(seconds: float) -> bool:
        with prober.socket() as x:
            external = await x.ask(prober.at(0, 0))
            if external is None:
                return False
            await prober.pause(seconds)
            return await _is_alive(prober, x, external)

    if await survives(limit_seconds):
        return None
    low, high = 0.0, limit_seconds
    while high - low > max(0.01 * high, 0.5):
        middle = (low + high) / 2
        if await survives(middle):
            low = middle
        else:
            high = middle
    return high


async def _measure_refresh(prober: _Prober, lifetime_seconds: float) -> Refresh | None:
    """Send inbound packets only for 2.5 lifetimes: is the mapping still there?"""
    with prober.socket() as x:
        external = await x.ask(prober.at(0, 0))
        if external is None:
            return None
        # Well before the end each time; a last look in the middle of the third lifetime.
        for _ in range(math.ceil(2.5 / 0.4)):
            await prober.pause(0.4 * lifetime_seconds)
            if not await _is_alive(prober, x, external):
                return Refresh.OUTBOUND
        return Refresh.BOTH


# --- comparing ---------------------------------------------------------------------------


def disagreements(report: ProbeReport, behavior: NatBehavior) -> list[str]:
    """Return how a measurement contradicts a description, one sentence each.

    What was not measured, and what a single NAT's probe cannot see, is not compared.
    """
    found: list[str] = []

    def compare(what: str, claimed: object, measured: object) -> None:
        if measured is not None and measured != claimed:
            found.append(f"{what}: claims {claimed}, measured {measured}")

    if not report.reachable:
        return ["the probe's server cannot be reached through this NAT"]
    napt = behavior.translation is Translation.NAPT
    if report.mapping is None:
        found.append("mapping: the measurement fits none of EIM, ADM and APDM")
    compare("mapping", behavior.mapping if napt else Mapping.EIM, report.mapping)
    compare("filtering", behavior.filtering, report.filtering)
    compare("translation", behavior.translation is not Translation.NONE, report.translates)
    assignment = behavior.ports.assignment
    if napt and behavior.ports.block_size is None:
        if assignment is PortAssignment.SEQUENTIAL:
            compare("port step", behavior.ports.step, report.port_step)
        elif assignment in (PortAssignment.RANDOM, PortAssignment.HASH):
            compare("port preservation", False, report.preserves_ports)
        elif behavior.mapping is Mapping.EIM:
            compare("port preservation", True, report.preserves_ports)
    if behavior.translation is Translation.NAPT:
        compare("hairpin", behavior.hairpin, report.hairpin)
    if napt and behavior.mapping is Mapping.EIM and behavior.filtering is not Filtering.EIF:
        keeps = behavior.unsolicited is not Unsolicited.ACCEPT
        compare(
            "mapping kept after an early packet", keeps, report.keeps_mapping_after_early_packet
        )
    compare("refresh", behavior.refresh, report.refresh)
    lifetimes = behavior.lifetimes
    if report.lifetime_seconds is not None:
        # One question and one answer within 2 s: the short timer where there are two.
        claimed = lifetimes.udp_unreplied_seconds or lifetimes.udp_seconds
        if abs(report.lifetime_seconds - claimed) > max(0.03 * claimed, 1.5):
            compare("lifetime in seconds", claimed, report.lifetime_seconds)
    return found
