"""The forwarding plane: networks, the links of their members, and the NATs between them.

A packet climbs from its host through the NATs until a network knows the destination, then goes
down again. Each link on the way may delay it; without delay a whole way is one call chain.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import TYPE_CHECKING

from netlab.addresses import NAT64_PREFIX, NatPlan
from netlab.behavior import Ipv6, Link, NatBehavior, PortAllocation, Translation
from netlab.drops import Address, Answer, Drop, DropReason, Endpoint
from netlab.gate import Gate
from netlab.link import LinkDirection
from netlab.nat import PrefixTranslator, Protocol, TcpFlag, Translated, Translator
from netlab.simulated.packet import IcmpError, Packet, Segment
from netlab.simulated.world import Receiver, World
from netlab.timeline import MappingBorn, MappingDied, NetworkChanged

if TYPE_CHECKING:
    from netlab.simulated.host import SimulatedHost

_NAT64 = NAT64_PREFIX.network_address.packed[:12]


def prefix_of(address: Address) -> bytes:
    """Return the part of an address that routes to a site: a /24, or a /64 in IPv6."""
    return address[:3] if len(address) == 4 else address[:8]


def answer_to(
    packet: Packet, drop: Drop, world: World, reporter: Address, mtu: int
) -> Packet | None:
    """Return what tells a packet's sender about a drop; None for silence.

    An error is never answered with an error, and a RST never with a RST.
    """
    if drop.answer is Answer.NONE or packet.error is not None or packet.flags & TcpFlag.RST:
        return None
    if drop.answer is Answer.RESET and packet.segment is not None:
        old = packet.segment
        length = len(packet.payload) + bool(old.flags & (TcpFlag.SYN | TcpFlag.FIN))
        return Packet(
            world.next_packet_number(),
            packet.sender,
            Protocol.TCP,
            packet.destination,
            packet.destination_port,
            packet.source,
            packet.source_port,
            segment=Segment(
                TcpFlag.RST | TcpFlag.ACK, old.acknowledgment, old.sequence + length, 0
            ),
        )
    error = IcmpError(
        drop.answer,
        packet.protocol,
        packet.source,
        packet.source_port,
        packet.destination,
        packet.destination_port,
        mtu,
    )
    return Packet(
        world.next_packet_number(),
        packet.sender,
        Protocol.ICMP,
        reporter,
        0,
        packet.source,
        0,
        error=error,
    )


class Attachment:
    """A machine's link into a network: one direction up, one down."""

    def __init__(
        self,
        world: World,
        owner: Receiver,
        network: Network,
        up: Link,
        down: Link,
        generator: random.Random,
    ) -> None:
        self._world = world
        self.owner = owner
        self.network = network
        self.up = LinkDirection(up, generator)
        self.down = LinkDirection(down, generator)

    def set_up(self, up: bool) -> None:
        """Cut or heal both directions."""
        self.up.up = self.down.up = up

    def send(self, packet: Packet) -> None:
        """Take a packet from the owner into the network."""
        self._carry(self.up, packet, self.network.forward, self.owner.receive)

    def deliver(self, packet: Packet) -> None:
        """Take a packet from the network to the owner; never at once, even without delay."""
        self._carry(self.down, packet, None, self.network.forward)

    def _carry(
        self,
        direction: LinkDirection,
        packet: Packet,
        inline: Callable[[Packet], None] | None,
        report: Callable[[Packet], None],
    ) -> None:
        world = self._world
        now = world.now()
        size = packet.size_bytes
        if packet.may_fragment and size > direction.link.mtu_bytes:
            size = direction.link.mtu_bytes
        arrivals = direction.send(now, size)
        if isinstance(arrivals, Drop):
            world.dropped(packet, f"link of {self.owner.name}", arrivals)
            reporter = packet.destination
            report_packet = answer_to(packet, arrivals, world, reporter, direction.link.mtu_bytes)
            if report_packet is not None:
                world.schedule(now, report, report_packet)
            return
        for arrival in arrivals:
            if inline is None:
                world.schedule(arrival, self.owner.receive, packet)
            elif arrival <= now:
                inline(packet)
            else:
                world.schedule(arrival, inline, packet)


class Network:
    """What is between the inside of one NAT (or the internet's core) and its members."""

    def __init__(self, world: World, name: str) -> None:
        self._world = world
        self.name = name
        self.members: dict[Address, Attachment] = {}
        self.sites: dict[bytes, Attachment] = {}
        self.router: NatNode | None = None

    def route(self, address: Address) -> Attachment | None:
        return self.members.get(address) or self.sites.get(prefix_of(address))

    def forward(self, packet: Packet) -> None:
        """Take a packet from a member towards its destination."""
        target = self.route(packet.destination)
        if target is not None:
            target.deliver(packet)
        elif self.router is not None:
            self.router.receive_from_inside(packet)
        else:
            self._world.dropped(packet, self.name, Drop(DropReason.NO_ROUTE))

    def deliver(self, packet: Packet) -> None:
        """Take a packet from the router to a member."""
        target = self.route(packet.destination)
        if target is not None:
            target.deliver(packet)
        else:
            self._world.dropped(packet, self.name, Drop(DropReason.NO_ROUTE))


class NatNode:
    """A router in the simulated internet: a gate and one translator per address family."""

    def __init__(
        self,
        world: World,
        name: str,
        behavior: NatBehavior,
        plan: NatPlan,
        inside: Network,
        generator: random.Random,
        inside_hosts: tuple[Address, ...],
    ) -> None:
        self.name = name
        self.behavior = behavior
        self.plan = plan
        self.inside = inside
        self.outside: Attachment
        self.gate = Gate(behavior.firewall)
        self._world = world
        self._generator = generator
        self._alarm: float | None = None
        self.external_ipv4 = tuple(address.packed for address in plan.outside.ipv4)
        translating = behavior.translation is not Translation.NONE
        self.ipv4 = self._translator(
            behavior, self.external_ipv4 if translating else (), inside_hosts
        )
        self.ipv6: Translator | None = None
        self._prefixes: PrefixTranslator | None = None
        if behavior.ipv6 is Ipv6.NAT66:
            self.ipv6 = self._translator(behavior, [a.packed for a in plan.outside.ipv6][:1])
        elif behavior.ipv6 is not Ipv6.NONE:
            firewall = NatBehavior(
                translation=Translation.NONE,
                filtering=behavior.ipv6_filtering,
                lifetimes=behavior.lifetimes,
                refresh=behavior.refresh,
                unsolicited=behavior.unsolicited,
                tcp=behavior.tcp,
                ports=PortAllocation(),
            )
            self.ipv6 = self._translator(firewall, ())
            if behavior.ipv6 is Ipv6.NPT:
                assert plan.inside_ipv6 is not None
                assert plan.external_ipv6 is not None
                self._prefixes = PrefixTranslator(plan.inside_ipv6, plan.external_ipv6)

    def _translator(
        self,
        behavior: NatBehavior,
        external: list[Address] | tuple[Address, ...],
        inside_hosts: tuple[Address, ...] = (),
    ) -> Translator:
        return Translator(
            behavior,
            external,
            generator=self._generator,
            name=self.name,
            on_event=self._on_mapping,
            inside_hosts=inside_hosts,
        )

    # --- commands ------------------------------------------------------------------------

    def reboot(self) -> None:
        """Lose all state at once."""
        now = self._world.now()
        self.ipv4.reboot(now)
        if self.ipv6 is not None:
            self.ipv6.reboot(now)
        self._world.record(NetworkChanged(at=now, what="reboot", target=self.name))

    def renumber(self, external: tuple[Address, ...]) -> None:
        """Take other external IPv4 addresses, which nobody else may have."""
        network = self.outside.network
        for address in self.external_ipv4:
            del network.members[address]
        for address in external:
            network.members[address] = self.outside
        self.external_ipv4 = external
        now = self._world.now()
        self.ipv4.renumber(external, now)
        self._world.record(NetworkChanged(at=now, what="renumber", target=self.name))

    def cut(self) -> None:
        """Stop carrying packets on the uplink."""
        self._set_uplink("cut", up=False)

    def heal(self) -> None:
        """Carry packets again."""
        self._set_uplink("heal", up=True)

    def log_in(self, host: SimulatedHost) -> None:
        """Let a host through the captive portal."""
        for interface in host.interfaces:
            for address in interface.addresses:
                self.gate.log_in(address)
        self._world.record(
            NetworkChanged(at=self._world.now(), what="login", target=self.name, detail=host.name)
        )

    def _set_uplink(self, what: str, up: bool) -> None:
        self.outside.set_up(up)
        self._world.record(NetworkChanged(at=self._world.now(), what=what, target=self.name))

    # --- packets -------------------------------------------------------------------------

    def receive_from_inside(self, packet: Packet) -> None:
        """Take a packet that no machine inside has the address of."""
        if packet.error is not None:
            self._error_from_inside(packet, packet.error)
            return
        if self.inside.route(packet.source) is None:
            self._refuse(packet, Drop(DropReason.SPOOFED), self.inside.deliver)
            return
        if not self.gate.is_open:
            stopped = self.gate.check(
                packet.protocol, packet.source, packet.destination_port, packet.payload
            )
            if stopped is not None:
                self._refuse(packet, stopped, self.inside.deliver)
                return
        destination = packet.destination
        translator = self.ipv4
        if len(destination) == 16:
            if self.behavior.nat64 and destination.startswith(_NAT64):
                destination = destination[12:]
            elif self.ipv6 is not None:
                translator = self.ipv6
            else:
                self._refuse(packet, Drop(DropReason.NO_ROUTE), self.inside.deliver)
                return
        elif self.behavior.nat64:
            self._refuse(packet, Drop(DropReason.NO_ROUTE), self.inside.deliver)
            return
        verdict = translator.outbound(
            packet.protocol,
            packet.source,
            packet.source_port,
            destination,
            packet.destination_port,
            self._world.now(),
            packet.flags,
        )
        if isinstance(verdict, Drop):
            self._refuse(packet, verdict, self.inside.deliver)
        elif verdict.to_inside:
            self._deliver_inside(packet, verdict)
        else:
            source = verdict.source
            if self._prefixes is not None and len(source) == 16:
                source = self._prefixes.outbound(source)
            self.outside.send(
                packet.readdressed(source, verdict.source_port, destination, verdict[3])
            )

    def receive(self, packet: Packet) -> None:
        """Take a packet from the uplink."""
        if packet.error is not None:
            self._error_from_outside(packet, packet.error)
            return
        destination = packet.destination
        translator: Translator | None = self.ipv4
        if len(destination) == 16:
            translator = self.ipv6
            if self._prefixes is not None:
                destination = self._prefixes.inbound(destination)
        if translator is None:
            self._refuse(packet, Drop(DropReason.NO_ROUTE), self.outside.send)
            return
        verdict = translator.inbound(
            packet.protocol,
            packet.source,
            packet.source_port,
            destination,
            packet.destination_port,
            self._world.now(),
            packet.flags,
        )
        if isinstance(verdict, Drop):
            self._refuse(packet, verdict, self.outside.send)
        else:
            self._deliver_inside(packet, verdict)

    def _deliver_inside(self, packet: Packet, verdict: Translated) -> None:
        source = verdict.source
        if len(verdict.destination) == 16 and len(source) == 4:
            source = _NAT64 + source
        self.inside.deliver(
            packet.readdressed(
                source, verdict.source_port, verdict.destination, verdict.destination_port
            )
        )

    def _refuse(self, packet: Packet, drop: Drop, send: Callable[[Packet], None]) -> None:
        inside = ""
        if drop.inside is not None:
            member = self.inside.members.get(drop.inside[0])
            inside = member.owner.name if member is not None else ""
        self._world.dropped(packet, self.name, drop, inside)
        answer = answer_to(packet, drop, self._world, packet.destination, 0)
        if answer is not None:
            send(answer)

    # --- ICMP errors ---------------------------------------------------------------------

    def _error_from_outside(self, packet: Packet, error: IcmpError) -> None:
        """Lead an error about a translated packet back to the inside host."""
        source = error.source
        translator = self.ipv4 if len(source) == 4 else self.ipv6
        if self._prefixes is not None and len(source) == 16:
            source = self._prefixes.inbound(source)
        inside: Endpoint | None = None
        if translator is not None:
            inside = translator.inside_of(
                error.protocol, source, error.source_port, self._world.now()
            )
        if inside is None:
            self._world.dropped(packet, self.name, Drop(DropReason.NO_MAPPING))
            return
        destination = error.destination
        reporter = packet.source
        if len(inside[0]) == 16 and len(destination) == 4:
            destination = _NAT64 + destination
            reporter = _NAT64 + reporter
        quoted = error._replace(source=inside[0], source_port=inside[1], destination=destination)
        self.inside.deliver(packet.readdressed(reporter, 0, inside[0], 0, quoted))

    def _error_from_inside(self, packet: Packet, error: IcmpError) -> None:
        """Send out an inside host's error about a packet that was let in."""
        remote = (error.source, error.source_port)
        translator = self.ipv4
        if len(error.source) == 16:
            if self.behavior.nat64 and error.source.startswith(_NAT64):
                remote = (error.source[12:], error.source_port)
            elif self.ipv6 is not None:
                translator = self.ipv6
        external = translator.external_of(
            error.protocol,
            error.destination,
            error.destination_port,
            remote,
            self._world.now(),
        )
        if external is None:
            self._world.dropped(packet, self.name, Drop(DropReason.NO_MAPPING))
            return
        address, port = external
        if self._prefixes is not None and len(address) == 16:
            address = self._prefixes.outbound(address)
        quoted = error._replace(source=remote[0], destination=address, destination_port=port)
        self.outside.send(packet.readdressed(address, 0, remote[0], 0, quoted))

    # --- deaths of mappings --------------------------------------------------------------

    def _on_mapping(self, event: MappingBorn | MappingDied) -> None:
        self._world.record(event)
        if self._alarm is None and isinstance(event, MappingBorn):
            # The translator has the new mapping in its deadlines when this call has returned.
            self._alarm = event.at
            self._world.schedule(event.at, self._on_time)

    def _on_time(self) -> None:
        """Report expired mappings when it is time; one alarm is enough."""
        # The clock may stand just before the alarm's time, and an expiry that is not due yet would
        # ask for the same alarm again, for ever.
        now = max(self._world.now(), self._alarm or 0.0)
        deadlines = []
        for translator in (self.ipv4, self.ipv6):
            if translator is not None:
                translator.on_time(now)
                deadline = translator.next_deadline()
                if deadline is not None:
                    deadlines.append(deadline)
        self._alarm = min(deadlines, default=None)
        if self._alarm is not None:
            self._world.schedule(self._alarm, self._on_time)
