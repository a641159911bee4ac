"""Carry out a net check: STUN from the peers' own sockets, HTTPS where UDP does not work.

What is asked and what the answers mean is decided in `traversal.paths` (`probe_plan`, `report`);
netcheck specification 5, 6 and 9 say how.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import IPv6Network
from typing import Final

import trio

from traversal.io.dial import DialError, Target, connect
from traversal.io.proxy import Proxy, ProxyError
from traversal.io.relay_client import RelayOptions
from traversal.io.resolver import Resolver
from traversal.io.stream import StreamEndedError
from traversal.io.udp import Source, UdpSockets
from traversal.keys import Entropy
from traversal.paths.nat64 import translate
from traversal.paths.probe_plan import Plan, Probe
from traversal.paths.report import Report
from traversal.relay_map import Dial, Family, Region, RelayMap, RelayNode
from traversal.wire.address import Address
from traversal.wire.stun import (
    TRANSACTION_ID_LENGTH,
    StunError,
    TransactionId,
    encode_binding_request,
    parse_binding_response,
)

STUN_LIMIT_SECONDS: Final = 3.0
HTTPS_LIMIT_SECONDS: Final = 5.0
LAST_PROBE_WAIT_SECONDS: Final = 0.5
"""With some UDP answer at hand, a set whose last probe is this old without answer is given up."""
LOST_ON_THE_WAY: Final = frozenset({0, errno.EPERM})
"""A local firewall's refusal counts as handed over (netcheck specification 6)."""
MAX_HTTP_HEAD_BYTES: Final = 8192


@dataclass(slots=True)
class _Sent:
    probe: Probe
    server: Address
    sent_at: float
    answered: trio.Event


class NetCheck:
    """Runs one check at a time. Feed STUN answers to `handle_stun`."""

    def __init__(
        self, udp: UdpSockets, resolver: Resolver, entropy: Entropy, options: RelayOptions
    ) -> None:
        self._udp = udp
        self._resolver = resolver
        self._entropy = entropy
        self._options = options
        self._sent: dict[bytes, _Sent] = {}
        self._report = Report(0.0)
        self._changed = trio.Event()
        self._answering: dict[Address, None] = {}
        self.nat64_prefixes: tuple[IPv6Network, ...] = ()
        """Set where IPv4 is reached only through a NAT64: its servers are asked that way, and what
        they see is the NAT64's IPv4 address, by which peers without IPv6 reach us."""
        self._knock_id: bytes = b""
        self._is_open = trio.Event()
        self.foreign_answers = 0
        """Answers that came from another address than was asked."""

    def handle_stun(self, datagram: bytes, source: Source, now: float) -> None:
        """A STUN message came in on a peers' socket. Anything may be in it."""
        if datagram[8:20] not in self._sent and datagram[8:20] != self._knock_id:
            return  # before it is parsed: anybody can send these
        try:
            response = parse_binding_response(datagram)
        except StunError:
            return
        sent = self._sent.pop(response.transaction_id, None)
        if sent is None:
            if response.transaction_id == self._knock_id:
                self._is_open.set()
            return
        if source != sent.server:
            self.foreign_answers += 1
        if not sent.server.is_ipv6:
            self._answering[sent.server] = None
        self._report.handle_stun_answer(
            sent.probe.node.region_id,
            sent.server,
            Address(*response.mapped_address),
            now - sent.sent_at,
        )
        sent.answered.set()
        self._changed.set()

    def answering_servers(self) -> tuple[Address, ...]:
        """The IPv4 servers that answered in the last check, fastest first."""
        return tuple(self._answering)

    async def run(self, report: Report, plan: Plan) -> None:
        """Fill `report` by asking what `plan` says; at most 3 s."""
        self._report = report
        self._sent.clear()
        self._answering.clear()
        try:
            with trio.move_on_after(STUN_LIMIT_SECONDS):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._stop_early, nursery.cancel_scope)
                    async with trio.open_nursery() as sets:
                        for probes in plan.values():
                            sets.start_soon(self._run_set, probes)
                    nursery.cancel_scope.cancel()
        finally:
            self._sent.clear()

    async def knock(self, node: RelayNode, families: Iterable[Family], seconds: float) -> bool:
        """Whether one datagram by each family to a node's STUN server is answered in time. Cheap
        beside a check, which may run meanwhile."""
        self._knock_id = transaction_id = TransactionId(self._entropy(TRANSACTION_ID_LENGTH))
        self._is_open = trio.Event()
        with trio.move_on_after(seconds):
            for family in families:
                server = await self._address(Probe(0.0, node, family))
                if server is not None:
                    self._udp.send(encode_binding_request(transaction_id), server)
            await self._is_open.wait()
        return self._is_open.is_set()

    async def run_https(self, report: Report, relay_map: RelayMap) -> None:
        """Measure by HTTPS what UDP could not (netcheck specification 9.1); at most 5 s."""
        with trio.move_on_after(HTTPS_LIMIT_SECONDS):
            async with trio.open_nursery() as nursery:
                for region in relay_map.regions.values():
                    if region.may_be_home and region.region_id not in report.latencies:
                        nursery.start_soon(self._measure_https, region, report)

    async def _stop_early(self, scope: trio.CancelScope) -> None:
        """When enough regions have answered, the rest is not waited for."""
        while True:
            await self._changed.wait()
            self._changed = trio.Event()
            seconds = self._report.stop_after_seconds()
            if seconds is not None:
                await trio.sleep(seconds)
                scope.cancel()

    async def _run_set(self, probes: list[Probe]) -> None:
        began = trio.current_time()
        answered = trio.Event()
        for probe in probes:
            with trio.move_on_at(began + probe.delay_seconds):
                await answered.wait()
            if answered.is_set() or not self._report.would_help(probe):
                return
            server = await self._address(probe)
            if server is not None:
                self._send(probe, server, answered)
        while not answered.is_set():
            with trio.move_on_after(LAST_PROBE_WAIT_SECONDS):
                await answered.wait()
            if self._report.is_udp_working:
                return

    def _send(self, probe: Probe, server: Address, answered: trio.Event) -> None:
        transaction_id = TransactionId(self._entropy(TRANSACTION_ID_LENGTH))
        self._sent[transaction_id] = _Sent(probe, server, trio.current_time(), answered)
        fault = self._udp.send(encode_binding_request(transaction_id), server)
        self._report.handle_sent(probe, was_handed_over=fault in LOST_ON_THE_WAY)

    async def _address(self, probe: Probe) -> Address | None:
        node = probe.node
        address = node.stun_dial_address(probe.family)
        if address is Dial.NEVER or node.stun_port is None:
            return None
        server: Address | None = Address(str(address), node.stun_port)
        if address is Dial.BY_NAME:
            server = await self._resolver.maybe_resolve(
                node.host_name, node.stun_port, probe.family
            )
        if server is None or not self.nat64_prefixes:
            return server
        return next(iter(translate([server], self.nat64_prefixes)), None)

    async def _measure_https(self, region: Region, report: Report) -> None:
        for node in region.nodes:
            if not node.is_relay:
                continue
            target = Target.of_node(node, plain=self._options.plain)
            try:
                proxy = Proxy.maybe_from_environment(node.host_name)
                seconds = await self._time_request(target, proxy)
            except (ProxyError, DialError, StreamEndedError):
                continue
            if seconds is not None:
                report.handle_latency(region.region_id, seconds)
                return

    async def _time_request(self, target: Target, proxy: Proxy | None) -> float | None:
        stream, _ = await connect(target, make_context=self._options.make_context, proxy=proxy)
        try:
            began = trio.current_time()
            request = (
                f"GET /derp/latency-check HTTP/1.1\r\nHost: {target.host_header}\r\n"
                "Connection: close\r\n\r\n"
            )
            await stream.send_all(request.encode())
            head = b""
            while b"\r\n" not in head and len(head) < MAX_HTTP_HEAD_BYTES:
                data = await stream.receive()
                if not data:
                    return None
                head += data
            seconds = trio.current_time() - began
            status = head.split(b"\r\n", 1)[0].split(b" ")[1:2]
            return seconds if status and status[0].startswith(b"2") else None
        finally:
            stream.close()
