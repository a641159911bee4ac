"""What a kernel NAT does, as timeline events: conntrack's births and deaths, NFLOG's drops.

Conntrack's messages are those of `netlab.kernel.conntrack`; the drops' layout is that of
linux/netfilter/nfnetlink_log.h, behind the same headers.

A mapping is what several flows of one inside socket may share: it is born with its first flow
and dies with its last one.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Callable, Iterator

import trio

from netlab.drops import Drop, DropReason, Endpoint, endpoint_text
from netlab.kernel import packets
from netlab.kernel.conntrack import (
    CONNTRACK_DELETE,
    CONNTRACK_NEW,
    HEADER_BYTES,
    Flow,
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
from netlab.kernel.nft import DROP_LOG_GROUP
from netlab.nat import Protocol
from netlab.timeline import Event, MappingBorn, MappingDied, Note, PacketDropped

_GROUP_NEW, _GROUP_DESTROY = 1, 3

_LOG_PACKET, _LOG_CONFIG = 0x400, 0x401
_NFULA_CFG_CMD, _NFULA_CFG_MODE, _NFULA_CFG_QTHRESH = 1, 2, 5
_NFULA_PAYLOAD, _NFULA_PREFIX = 9, 10
_BIND, _COPY_PACKET = 1, 2
# Enough for the headers of a dropped packet.
_LOGGED_BYTES = 128

# As much as an ordinary user may ask for; a burst of more than some hundred events is told as lost.
_BUFFER_BYTES = 4 << 20


class NatObserver:
    """Watches one router in the kernel and puts what happens on a timeline."""

    def __init__(
        self,
        name: str,
        namespace: NetworkNamespace,
        now: Callable[[], float],
        report: Callable[[Event], None],
    ) -> None:
        self._name = name
        self._now = now
        self._report = report
        self._mappings: dict[tuple[int, Endpoint, Endpoint], tuple[float, int]] = {}
        self._external: dict[tuple[int, Endpoint], int] = {}
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
        external = (flow.protocol, flow.answer_destination)
        self._external[external] = self._external.get(external, 0) + 1
        born, flows = self._mappings.get(key, (self._now(), 0))
        self._mappings[key] = (born, flows + 1)
        if not flows:
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
        if key not in self._mappings:
            return  # it was born before anybody watched, or its birth was lost
        external = (flow.protocol, flow.answer_destination)
        self._external[external] -= 1
        if not self._external[external]:
            del self._external[external]
        born, flows = self._mappings[key]
        self._mappings[key] = (born, flows - 1)
        if flows == 1:
            del self._mappings[key]
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
        reason = DropReason(prefix.rstrip(b"\0").decode())
        protocol, source, destination = packets.describe(packet)
        # A kernel NAT sends what its filter stops to its own INPUT, like what nobody mapped.
        if reason is DropReason.NO_MAPPING and self._is_mapped(protocol, destination):
            reason = DropReason.FILTERED
        self._report(
            PacketDropped(
                at=self._now(),
                packet=0,
                where=self._name,
                reason=reason,
                text=Drop(reason).text,
                protocol=protocol,
                source=source,
                destination=destination,
            )
        )

    def _is_mapped(self, protocol: str, destination: str) -> bool:
        return any(
            protocol == _protocol_name(number) and destination == endpoint_text(endpoint)
            for number, endpoint in self._external
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
