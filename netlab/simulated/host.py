"""A machine in the simulated internet: interfaces, ports, and who gets an arriving packet."""

from __future__ import annotations

import errno
import os
import random
from contextvars import ContextVar
from ipaddress import ip_address
from typing import TYPE_CHECKING, NoReturn

from netlab.behavior import ModelError, suggest
from netlab.drops import Address, Answer, Drop, DropReason, Endpoint
from netlab.nat import Protocol, TcpFlag
from netlab.simulated.network import Attachment, answer_to
from netlab.simulated.packet import IcmpError, Packet, Segment
from netlab.simulated.world import World
from netlab.timeline import NetworkChanged

if TYPE_CHECKING:
    from netlab.simulated.connection import Connection
    from netlab.simulated.tcp import TcpSocket
    from netlab.simulated.udp import UdpSocket

# Linux's default net.ipv4.ip_local_port_range.
_EPHEMERAL = range(32768, 61000)

_LOOPBACK = {4: b"\x7f\0\0\1", 16: bytes(15) + b"\1"}
WILDCARD = {4: bytes(4), 16: bytes(16)}

# A stack of entered hosts: (host, the stack below). A context variable, because child tasks
# inherit it and a task that leaves a host must not disturb its siblings.
_Stack = tuple["SimulatedHost", "_Stack | None"]
_entered: ContextVar[_Stack | None] = ContextVar("netlab_host", default=None)


def current_host() -> SimulatedHost | None:
    """Return the host that the running task is in."""
    stack = _entered.get()
    return stack[0] if stack is not None else None


def fail(code: int) -> NoReturn:
    """Raise the OSError that a real socket would."""
    raise OSError(code, os.strerror(code))


class Interface:
    """A host's place in one network."""

    __slots__ = ("addresses", "attachment", "is_up", "network")

    def __init__(
        self, network: str, attachment: Attachment, addresses: tuple[Address, ...]
    ) -> None:
        self.network = network
        self.attachment = attachment
        self.addresses = addresses
        self.is_up = False

    def bring_up(self) -> None:
        self.is_up = True
        for address in self.addresses:
            self.attachment.network.members[address] = self.attachment

    def take_down(self) -> None:
        self.is_up = False
        for address in self.addresses:
            self.attachment.network.members.pop(address, None)

    def address(self, size: int) -> Address | None:
        """Return the first address of 4 or 16 bytes."""
        return next((a for a in self.addresses if len(a) == size), None)


class SimulatedHost:
    """One machine. ``async with host:`` puts the task, and tasks it starts, into it."""

    def __init__(self, world: World, name: str, generator: random.Random) -> None:
        self.world = world
        self.name = name
        self.generator = generator
        self.interfaces: list[Interface] = []
        self.udp_sockets: dict[int, list[UdpSocket]] = {}
        self.listeners: dict[int, list[TcpSocket]] = {}
        self.tcp_ports: dict[int, int] = {}
        self.connections: dict[tuple[Address, int, Address, int], Connection] = {}
        self.path_mtus: dict[Address, int] = {}

    def __repr__(self) -> str:
        return f"<SimulatedHost {self.name}>"

    async def __aenter__(self) -> SimulatedHost:
        _entered.set((self, _entered.get()))
        return self

    async def __aexit__(self, *_: object) -> None:
        stack = _entered.get()
        assert stack is not None
        _entered.set(stack[1])

    # --- uplinks -------------------------------------------------------------------------

    def add_interface(self, interface: Interface) -> None:
        self.interfaces.append(interface)

    def interface(self, network: str) -> Interface:
        """Return the interface in a network.

        Raises:
            ModelError: the host has none there.
        """
        for interface in self.interfaces:
            if interface.network == network:
                return interface
        raise ModelError(
            f'host "{self.name}"',
            f'no uplink leads to "{network}"; '
            + suggest(network, [interface.network for interface in self.interfaces]),
        )

    @property
    def addresses(self) -> tuple[str, ...]:
        """The addresses of all interfaces that are up, preferred uplink first."""
        return tuple(
            str(ip_address(address))
            for interface in self.interfaces
            if interface.is_up
            for address in interface.addresses
        )

    def roam(self, network: str, *, keep_old: bool = False) -> None:
        """Make the uplink to `network` the preferred one.

        The other interfaces lose their addresses unless `keep_old`; either way sockets that are
        connected keep the source address that they have, as on Linux.
        """
        chosen = self.interface(network)
        if not keep_old:
            for interface in self.interfaces:
                if interface is not chosen:
                    interface.take_down()
        chosen.bring_up()
        self.interfaces.sort(key=lambda interface: interface is not chosen)
        self._record("roam", network)

    def cut(self, network: str | None = None) -> None:
        """Stop carrying packets on one uplink, or on all; the addresses stay."""
        self._set_links(network, up=False)
        self._record("cut", network or "")

    def heal(self, network: str | None = None) -> None:
        """Carry packets again."""
        self._set_links(network, up=True)
        self._record("heal", network or "")

    def disconnect(self) -> None:
        """Take every interface down, addresses included; `roam` brings one back."""
        for interface in self.interfaces:
            interface.take_down()
        self._record("disconnect", "")

    def _set_links(self, network: str | None, up: bool) -> None:
        chosen = self.interfaces if network is None else [self.interface(network)]
        for interface in chosen:
            interface.attachment.set_up(up)

    def _record(self, what: str, detail: str) -> None:
        now = self.world.now()
        self.world.record(NetworkChanged(at=now, what=what, target=self.name, detail=detail))

    # --- sending -------------------------------------------------------------------------

    def is_own(self, address: Address) -> bool:
        """Return whether packets to an address stay on this machine."""
        if address == _LOOPBACK[16] or (len(address) == 4 and address[0] == 127):
            return True
        return any(
            address in interface.addresses for interface in self.interfaces if interface.is_up
        )

    def source_for(self, destination: Address) -> Address:
        """Choose the source address for a destination.

        Raises:
            OSError: ENETUNREACH, there is no way there.
        """
        size = len(destination)
        if self.is_own(destination):
            return destination
        for interface in self.interfaces:
            if interface.is_up:
                address = interface.address(size)
                if address is not None:
                    return address
        fail(errno.ENETUNREACH)

    def mtu_to(self, destination: Address) -> int:
        """Return the path MTU as far as this host knows it."""
        known = self.path_mtus.get(destination)
        if known is not None:
            return known
        if self.is_own(destination):
            return 65535
        for interface in self.interfaces:
            if interface.is_up and interface.address(len(destination)) is not None:
                return interface.attachment.up.link.mtu_bytes
        return 1500

    def send(self, packet: Packet) -> None:
        """Put a packet on the wire, by way of the preferred uplink.

        Raises:
            OSError: ENETUNREACH, the source address has gone or no uplink is there.
        """
        if self.is_own(packet.destination):
            self.world.sent(packet)
            self.world.schedule(self.world.now(), self.receive, packet)
            return
        if not self.is_own(packet.source):
            fail(errno.ENETUNREACH)
        for interface in self.interfaces:
            if interface.is_up and interface.address(len(packet.destination)) is not None:
                self.world.sent(packet)
                interface.attachment.send(packet)
                return
        fail(errno.ENETUNREACH)

    def send_datagram(
        self, local: Endpoint, remote: Endpoint, payload: bytes, may_fragment: bool
    ) -> None:
        self.send(
            Packet(
                self.world.next_packet_number(),
                self.name,
                Protocol.UDP,
                *local,
                *remote,
                payload,
                may_fragment=may_fragment,
            )
        )

    def send_segment(
        self, local: Endpoint, remote: Endpoint, segment: Segment, payload: bytes = b""
    ) -> None:
        """Send a TCP segment; without a way it is lost, and TCP's timers see to it."""
        packet = Packet(
            self.world.next_packet_number(),
            self.name,
            Protocol.TCP,
            *local,
            *remote,
            payload,
            segment,
        )
        try:
            self.send(packet)
        except OSError:
            self.world.dropped(packet, self.name, Drop(DropReason.NO_ROUTE))

    # --- receiving -----------------------------------------------------------------------

    def receive(self, packet: Packet) -> None:
        """Give an arriving packet to its socket."""
        if packet.error is not None:
            self._receive_error(packet.error)
        elif packet.protocol == Protocol.UDP:
            self._receive_datagram(packet)
        elif packet.protocol == Protocol.TCP:
            self._receive_segment(packet)

    def _receive_datagram(self, packet: Packet) -> None:
        best: UdpSocket | None = None
        best_score = 0
        for socket in self.udp_sockets.get(packet.destination_port, ()):
            score = socket.match(packet)
            if score > best_score:
                best, best_score = socket, score
        if best is None:
            self._refuse(packet, Drop(DropReason.PORT_CLOSED, Answer.PORT_UNREACHABLE))
        elif best.enqueue(packet):
            self.world.delivered(packet, self.name)
        else:
            self._refuse(packet, Drop(DropReason.BUFFER_FULL))

    def _receive_segment(self, packet: Packet) -> None:
        assert packet.segment is not None
        key = (*packet.destination_endpoint, *packet.source_endpoint)
        connection = self.connections.get(key)
        if connection is not None:
            self.world.delivered(packet, self.name)
            connection.receive(packet.segment, packet.payload)
            return
        if packet.segment.flags & (TcpFlag.SYN | TcpFlag.ACK) == TcpFlag.SYN:
            for listener in self.listeners.get(packet.destination_port, ()):
                if listener.accepts(packet.destination):
                    self.world.delivered(packet, self.name)
                    listener.receive_syn(packet)
                    return
        self._refuse(packet, Drop(DropReason.PORT_CLOSED, Answer.RESET))

    def _refuse(self, packet: Packet, drop: Drop) -> None:
        self.world.dropped(packet, self.name, drop, self.name)
        answer = answer_to(packet, drop, self.world, packet.destination, 0)
        if answer is not None:
            try:
                self.send(answer)
            except OSError:
                self.world.dropped(answer, self.name, Drop(DropReason.NO_ROUTE))

    def _receive_error(self, error: IcmpError) -> None:
        remote = (error.destination, error.destination_port)
        if error.answer is Answer.TOO_BIG:
            self.path_mtus[error.destination] = error.mtu_bytes
        if error.protocol == Protocol.UDP:
            for socket in self.udp_sockets.get(error.source_port, ()):
                socket.receive_error(error.answer, remote)
        elif error.protocol == Protocol.TCP:
            connection = self.connections.get((error.source, error.source_port, *remote))
            if connection is not None:
                connection.receive_error(error.answer)

    # --- ports ---------------------------------------------------------------------------

    def free_port(self, protocol: int) -> int:
        """Return an ephemeral port that no socket is bound to.

        Raises:
            OSError: EADDRINUSE, all are taken.
        """
        taken = self.udp_sockets.keys() if protocol == Protocol.UDP else self.tcp_ports.keys()
        start = self.generator.randrange(len(_EPHEMERAL))
        for offset in range(len(_EPHEMERAL)):
            port = _EPHEMERAL[(start + offset) % len(_EPHEMERAL)]
            if port not in taken:
                return port
        fail(errno.EADDRINUSE)
