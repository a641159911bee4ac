"""What a kernel NAT does, as timeline events: conntrack's births and deaths, NFLOG's drops.

Conntrack's messages are those of `netlab.kernel.conntrack`; the drops' layout is that of
linux/netfilter/nfnetlink_log.h, behind the same headers.

A mapping is what several flows of one inside socket may share: it is born with its first flow
and dies with its last one. A drop is told with what its mapping had been used for.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Callable, Iterator

import trio

from netlab.behavior import Filtering
from netlab.drops import Drop, DropReason, Endpoint, endpoint_text
from netlab.kernel import packets
from netlab.kernel.conntrack import (
    CONNTRACK_DELETE,
    CONNTRACK_NEW,
    HEADER_BYTES,
    Flow,
    lives_for,
    parse_flow,
)
from netlab.kernel.namespaces import NetworkNamespace
from netlab.kernel.netlink import (
    NETLINK_ADD_MEMBERSHIP,
    NETLINK_NETFILTER,
    NLM_F_ACK,
    NLM_F_REQUEST,
    NLMSG_ERROR,
    SOL_NETLINK,
    NetlinkError,
    attribute,
    find_attribute,
    messages,
)
from netlab.kernel.nft import DROP_LOG_GROUP, Router
from netlab.nat import Protocol
from netlab.timeline import Event, MappingBorn, MappingDied, Note, PacketDropped

_GROUP_NEW, _GROUP_DESTROY = 1, 3

_LOG_PACKET, _LOG_CONFIG = 0x400, 0x401
_NFULA_CFG_CMD, _NFULA_CFG_MODE, _NFULA_CFG_QTHRESH = 1, 2, 5
_NFULA_PAYLOAD, _NFULA_PREFIX = 9, 10
_BIND, _COPY_PACKET = 1, 2
# Enough for the headers of a dropped packet.
_LOGGED_BYTES = 128

# Remote endpoints that a drop is told with, the last ones.
_MAX_CONTACTED = 3
# Dead mappings that are remembered, so that a drop can say "expired" and when.
_MAX_GRAVES = 4096
# As much as an ordinary user may ask for; a burst of more than some hundred events is told as lost.
_BUFFER_BYTES = 4 << 20


_MappingKey = tuple[int, Endpoint, Endpoint]


class NatObserver:
    """Watches one router in the kernel and puts what happens on a timeline."""

    def __init__(
        self,
        router: Router,
        namespace: NetworkNamespace,
        now: Callable[[], float],
        report: Callable[[Event], None],
    ) -> None:
        self._name = router.name
        self._filtering = router.behavior.filtering
        self._namespace = namespace
        self._now = now
        self._report = report
        # By protocol, inside and external endpoint: when it was born, and its flows.
        self._mappings: dict[_MappingKey, tuple[float, dict[Flow, None]]] = {}
        self._external: dict[tuple[int, Endpoint], _MappingKey] = {}
        self._graves: dict[tuple[int, Endpoint], tuple[Endpoint, float]] = {}
        self._flows = _open(namespace)
        self._drops = _open(namespace)
        for group in (_GROUP_NEW, _GROUP_DESTROY):
            self._flows.setsockopt(SOL_NETLINK, NETLINK_ADD_MEMBERSHIP, group)
        _bind_to_log(self._drops)
        for watched in (self._flows, self._drops):
            watched.setblocking(False)

    def close(self) -> None:
        """Stop watching."""
        self._flows.close()
        self._drops.close()

    async def run(self) -> None:
        """Watch until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._wait_and_drain, self._flows)
            nursery.start_soon(self._wait_and_drain, self._drops)

    async def _wait_and_drain(self, watched: socket.socket) -> None:
        while True:
            await trio.lowlevel.wait_readable(watched)
            self.drain()

    def drain(self, cause: str = "expired") -> None:
        """Take what has happened so far; mappings that died did so by `cause`."""
        # Flows first: whether a dropped packet was for a living mapping depends on them.
        for watched in (self._flows, self._drops):
            for kind, message in self._receive(watched):
                if kind == CONNTRACK_NEW:
                    self._handle_flow(message, self._handle_new)
                elif kind == CONNTRACK_DELETE:
                    self._handle_flow(message, lambda flow: self._handle_gone(flow, cause))
                elif kind == _LOG_PACKET:
                    self._handle_drop(message)

    def _receive(self, watched: socket.socket) -> Iterator[tuple[int, bytes]]:
        while True:
            try:
                data = watched.recv(1 << 16)
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                text = f"{self._name}: more happened at once than the kernel could tell"
                self._report(Note(at=self._now(), text=text))
                continue
            yield from messages(data)

    @staticmethod
    def _handle_flow(message: bytes, handle: Callable[[Flow], None]) -> None:
        flow = parse_flow(message)
        # Only flows that leave with another source were given an external endpoint.
        if flow is not None and flow.source != flow.answer_destination:
            handle(flow)

    def _handle_new(self, flow: Flow) -> None:
        key = (flow.protocol, flow.source, flow.answer_destination)
        self._external[flow.protocol, flow.answer_destination] = key
        born, flows = self._mappings.setdefault(key, (self._now(), {}))
        flows[flow] = None
        if len(flows) == 1:
            self._report(
                MappingBorn(
                    at=born,
                    nat=self._name,
                    protocol=_protocol_name(flow.protocol),
                    inside=endpoint_text(flow.source),
                    external=endpoint_text(flow.answer_destination),
                    remote=endpoint_text(flow.destination),
                )
            )

    def _handle_gone(self, flow: Flow, cause: str) -> None:
        key = (flow.protocol, flow.source, flow.answer_destination)
        born, flows = self._mappings.get(key, (0.0, {}))
        if flow not in flows:
            return  # it was born before anybody watched, or its birth was lost
        del flows[flow]
        if flows:
            return
        del self._mappings[key]
        external = (flow.protocol, flow.answer_destination)
        if self._external.get(external) == key:
            del self._external[external]
        if cause == "expired":
            self._graves.pop(external, None)
            self._graves[external] = (flow.source, self._now())
            if len(self._graves) > _MAX_GRAVES:
                del self._graves[next(iter(self._graves))]
        self._report(
            MappingDied(
                at=self._now(),
                nat=self._name,
                protocol=_protocol_name(flow.protocol),
                inside=endpoint_text(flow.source),
                external=endpoint_text(flow.answer_destination),
                cause=cause,
                born_at=born,
            )
        )

    def _handle_drop(self, message: bytes) -> None:
        packet = find_attribute(message, HEADER_BYTES, _NFULA_PAYLOAD)
        prefix = find_attribute(message, HEADER_BYTES, _NFULA_PREFIX)
        if packet is None or prefix is None:
            return
        drop = self._explain(DropReason(prefix.rstrip(b"\0").decode()), packet)
        protocol, source, destination = packets.describe(packet)
        self._report(
            PacketDropped(
                at=self._now(),
                packet=0,
                where=self._name,
                reason=drop.reason,
                text=drop.text,
                protocol=protocol,
                source=source,
                destination=destination,
            )
        )

    def _explain(self, reason: DropReason, packet: bytes) -> Drop:
        """Join a dropped packet with what is known of the mapping that it was for."""
        target = packets.destination_of(packet)
        if target is None or reason not in (DropReason.NO_MAPPING, DropReason.FILTERED):
            return Drop(reason)
        key = self._external.get(target)
        if key is None and reason is DropReason.FILTERED:
            # The filter behind the translation sees the inside endpoint.
            key = next((one for one in self._mappings if (one[0], one[1]) == target), None)
        if key is None:
            grave = self._graves.get(target)
            if grave is None or reason is DropReason.FILTERED:
                return Drop(reason)
            inside, died = grave
            return Drop(
                DropReason.EXPIRED, inside=inside, expires_in_seconds=min(0.0, died - self._now())
            )
        # A kernel NAT sends what its filter stops to its own INPUT, like what nobody mapped.
        flows = list(self._mappings[key][1])
        left = [lives_for(self._namespace, flow) for flow in flows[-_MAX_CONTACTED:]]
        return Drop(
            DropReason.FILTERED,
            note="port-dependent" if self._filtering is Filtering.APDF else "address-dependent",
            inside=key[1],
            contacted=tuple(flow.destination for flow in flows[-_MAX_CONTACTED:]),
            expires_in_seconds=max((one for one in left if one is not None), default=None),
        )


def _protocol_name(number: int) -> str:
    try:
        return Protocol(number).name.lower()
    except ValueError:
        return str(number)


def _open(namespace: NetworkNamespace) -> socket.socket:
    made = namespace.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_NETFILTER)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER_BYTES)
    made.bind((0, 0))
    return made


def _bind_to_log(log: socket.socket) -> None:
    """Make a socket the one that gets what the drop rules log."""
    body = (
        struct.pack("!BBH", socket.AF_UNSPEC, 0, DROP_LOG_GROUP)
        + attribute(_NFULA_CFG_CMD, bytes([_BIND]))
        + attribute(_NFULA_CFG_MODE, struct.pack("!IBx", _LOGGED_BYTES, _COPY_PACKET))
        # Without this the first record is held back for up to a second.
        + attribute(_NFULA_CFG_QTHRESH, struct.pack("!I", 1))
    )
    header = struct.pack("=IHHII", 16 + len(body), _LOG_CONFIG, NLM_F_REQUEST | NLM_F_ACK, 1, 0)
    log.send(header + body)
    for kind, message in messages(log.recv(1 << 16)):
        if kind == NLMSG_ERROR:
            (code,) = struct.unpack_from("=i", message, 16)
            if code:
                raise NetlinkError(-code, f"cannot follow dropped packets: {os.strerror(-code)}")
