"""Which punch messages of the peer are believed, and the making of ours.

A message counts when it names both nodes' sessions, which each knows from the other's introduction,
and a higher serial than any before it. So a relay can neither forge one (it is sealed between the
node keys) nor replay it, in this life of both nodes or in a later one.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from traversal.paths.punch_effects import SendPunchMessage
from traversal.paths.punch_strategy import OwnSide, PeerSide
from traversal.paths.report import NatFacts, PortAllocation, PortPattern
from traversal.wire.address import Address
from traversal.wire.punching import (
    PortPatternCode,
    PortRange,
    PunchKind,
    PunchMessage,
    PunchMethod,
)

UNKNOWN_PORTS: Final = PortAllocation(PortPattern.UNKNOWN)


class PunchChannel:
    """Punch messages with one peer; `own` and `peer` are what we know of both sides.

    `peer` is kept complete by what messages say: introductions tell a NAT's classes, only punch
    messages how it picks ports.
    """

    def __init__(self, session: bytes) -> None:
        self.own = OwnSide()
        self.peer = PeerSide()
        self._session = session
        self._serial = 0
        self._peer_serial = 0

    @property
    def leads(self) -> bool:
        """Whether we go on when both sides lead at once."""
        return self.peer.session is None or self._session > self.peer.session

    def set_peer(self, peer: PeerSide) -> bool:
        """Note the peer as introduced; returns whether it is another life of it."""
        is_new = peer.session != self.peer.session
        if is_new:
            self._peer_serial = 0
        else:
            known = self.peer.nat
            nat = replace(
                peer.nat,
                mapping=peer.nat.mapping or known.mapping,
                filtering=peer.nat.filtering or known.filtering,
                ports=known.ports if peer.nat.ports == UNKNOWN_PORTS else peer.nat.ports,
            )
            peer = replace(peer, nat=nat)
        self.peer = peer
        return is_new

    def believes(self, message: PunchMessage) -> bool:
        """Whether a message is new and meant for us as we are now; what it says is then noted."""
        if message.session != self.peer.session or message.echoed_session != self._session:
            return False
        if message.serial <= self._peer_serial:
            return False
        self._peer_serial = message.serial
        self._note_nat(message)
        return True

    def _note_nat(self, message: PunchMessage) -> None:
        pattern, step = PortPattern[message.pattern.name], message.step
        if pattern is PortPattern.SEQUENTIAL and not step:
            pattern = PortPattern.UNKNOWN
        nat = self.peer.nat
        ports = PortAllocation(pattern, step if pattern is PortPattern.SEQUENTIAL else 0)
        self.peer = replace(
            self.peer,
            nat=NatFacts(
                mapping=message.mapping or nat.mapping,
                filtering=message.filtering or nat.filtering,
                ports=nat.ports if pattern is PortPattern.UNKNOWN else ports,
                hairpins=nat.hairpins,
                is_udp_blocked=nat.is_udp_blocked,
                has_port_mapping=nat.has_port_mapping,
            ),
        )

    def tell(
        self,
        attempt: int,
        kind: PunchKind,
        method: PunchMethod = PunchMethod.NONE,
        *,
        sockets: int = 0,
        address: Address | None = None,
        source: Address | None = None,
        ranges: tuple[PortRange, ...] = (),
    ) -> SendPunchMessage:
        """A message to the peer, which must be one of ours."""
        assert self.peer.session is not None
        self._serial += 1
        nat = self.own.nat
        return SendPunchMessage(
            PunchMessage(
                kind=kind,
                session=self._session,
                echoed_session=self.peer.session,
                serial=self._serial,
                attempt=attempt,
                method=method,
                mapping=nat.mapping,
                filtering=nat.filtering,
                pattern=PortPatternCode[nat.ports.pattern.name],
                step=nat.ports.step,
                sockets=sockets,
                address=address,
                source=source,
                ranges=ranges,
            )
        )
