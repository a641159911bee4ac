"""How messages and datagrams leave for one peer: by UDP, by its relay, by the edge.

Messages are sealed for the peer here; what the network answers to sending, an errno, is told to the
peer's machine here, too.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence
from typing import Final

import trio

from traversal.io.udp import Sender
from traversal.keys import NONCE_LENGTH, Box, DiscoPublic, KeyFormatError, NodePublic
from traversal.paths.effects import SendPing
from traversal.paths.peer import Peer
from traversal.paths.scoring import Path
from traversal.paths.verdict import Contact
from traversal.wire.disco import DiscoError, Message, Ping, open_envelope, seal_envelope
from traversal.wire.geneve import PROTOCOL_DISCO, PROTOCOL_WIREGUARD, Header
from traversal.wiring import Wiring

NO_ROUTE: Final = frozenset(
    {
        errno.ENETUNREACH,
        errno.EHOSTUNREACH,
        errno.ENETDOWN,
        errno.EHOSTDOWN,
        errno.EADDRNOTAVAIL,
        errno.EAFNOSUPPORT,
        errno.EINVAL,
    }
)
"""Send errors that say: this address can't be reached from here."""
NEEDS_FRESH_SOCKET: Final = frozenset({errno.EPIPE, errno.ENOTCONN, errno.EPERM})
"""Send errors that a rebind may heal (path selection specification 15)."""


class Outlet:
    """One peer's. `settle` carries out what the machine wants done."""

    def __init__(
        self, wiring: Wiring, key: NodePublic, machine: Peer, settle: Callable[[], None]
    ) -> None:
        self.key = key
        self.home_region = 0
        self.udp: Sender = wiring.udp
        """What direct datagrams leave by."""
        self._wiring = wiring
        self._machine = machine
        self._settle = settle
        self._heard_region = 0
        self._gone_region = 0
        """Whose relay said that the peer is not there, and nothing came by a relay since."""
        self._is_gone = False
        self._box: Box | None = None
        self._node_box: Box | None = None

    # ---- keys

    @property
    def has_keys(self) -> bool:
        """Whether the peer's disco key is known, so that it can be pinged."""
        return self._box is not None

    def set_disco_key(self, key: DiscoPublic) -> None:
        """Seal messages for this key. Raises KeyFormatError for a key that no honest peer has."""
        if key == self._wiring.disco_public:
            # What we seal ourselves would open as the peer's: anybody could send it back to us.
            raise KeyFormatError("this is our own disco key")
        self._box = Box(self._wiring.disco_private, key)

    def box_of_nodes(self) -> Box:
        """The box between our node key and the peer's."""
        if self._node_box is None:
            self._node_box = Box(self._wiring.private_key, self.key)
        return self._node_box

    def open_disco(self, datagram: bytes) -> Message:
        """Open an envelope from this peer. Raises DiscoError."""
        if self._box is None:
            raise DiscoError("the peer's disco key is not known")
        return open_envelope(datagram, self._box)

    # ---- relay and edge

    def note_heard(self, region: int) -> bool:
        """Something of the peer came by the relay of this region; whether it had been gone."""
        was_gone, self._is_gone = self._is_gone, False
        self._heard_region = region
        self._gone_region = 0
        return was_gone

    def note_gone(self, region: int) -> bool:
        """The relay of this region does not know the peer; whether no other relay leads there."""
        self._gone_region = region
        is_used = self._wiring.edge is not None and region == self.relay_region
        self._is_gone = self._is_gone or is_used
        if self._heard_region == region:
            self._heard_region = 0
        return is_used

    @property
    def relay_region(self) -> int:
        """By which region's relay the peer is sent to; 0 for none (path selection 10)."""
        relays, home, heard = self._wiring.relays, self.home_region, self._heard_region
        if heard and heard != home and not relays.is_connected(home) and relays.is_connected(heard):
            return heard
        return home or heard

    @property
    def contact(self) -> Contact:
        """How far the way by the relay leads, as far as relays tell."""
        relays, region = self._wiring.relays, self.relay_region
        if not relays.is_known(region):
            return Contact.NO_REGION
        if relays.problem(region):
            return Contact.RELAY_DOWN
        return Contact.NOT_THERE if self._gone_region == region else Contact.OPEN

    def send_by_relay(self, payload: bytes) -> None:
        """Queue a packet for the peer at its relay; and at the edge, if the relay can't be relied
        upon and the edge is there."""
        wiring, region = self._wiring, self.relay_region
        wiring.relays.send(region, self.key.raw, payload)
        if wiring.edge is None:
            return
        is_out = not wiring.relays.is_connected(region)
        if is_out and self._machine.has_relay:
            self._machine.set_relay_available(False, trio.current_time())
            self._settle()
        if is_out or self._is_gone:
            self.send_by_edge(payload)

    def send_by_edge(self, payload: bytes) -> bool:
        """Queue a packet for the peer at the edge; False when that can't carry it."""
        edge = self._wiring.edge
        return edge is not None and edge.send(self.key.raw, payload)

    @property
    def edge_payload_bytes(self) -> int | None:
        """The longest datagram that the edge carries, None without one."""
        edge = self._wiring.edge
        return edge.max_payload_bytes if edge is not None else None

    def send_data(self, datagrams: Sequence[bytes], path: Path) -> int:
        """Send the application's datagrams by a path that is not direct: 0 or an errno."""
        if path.is_edge:
            for datagram in datagrams:
                if not self.send_by_edge(datagram):
                    self._wiring.relays.send(self.relay_region, self.key.raw, datagram)
            return 0
        header = Header(path.vni, PROTOCOL_WIREGUARD).encode()
        return self._wiring.udp.send_many([header + d for d in datagrams], path.address)

    def handle_send_fault(self, fault: int, path: Path, now: float) -> None:
        """Sending to `path` failed with this errno."""
        if fault in NEEDS_FRESH_SOCKET:
            self._wiring.want_rebind()
        elif fault in NO_ROUTE:
            self._machine.handle_send_error(path, now)
            self._settle()

    # ---- messages

    def send_ping(self, effect: SendPing) -> None:
        """Send a Ping; a padded one is never fragmented."""
        ping = Ping(effect.transaction_id, self._wiring.public_key, effect.padding_bytes)
        if not effect.padding_bytes:
            self.send_disco(ping, effect.path)
            return
        envelope = self._seal(ping, effect.path)
        if envelope is None:
            return
        fault = self._sender(effect.path).send_unfragmented(envelope, effect.path.address)
        if fault == errno.EMSGSIZE:
            self._machine.handle_too_big(effect.padding_bytes, trio.current_time())
        elif fault:
            self._handle_disco_fault(fault, effect.path)

    def send_disco(self, message: Message, path: Path) -> None:
        """Send a message to the peer by UDP, behind Geneve if the path has a VNI."""
        envelope = self._seal(message, path)
        if envelope is not None and path.is_edge:
            self.send_by_edge(envelope)
        elif envelope is not None:
            fault = self._sender(path).send(envelope, path.address)
            if fault:
                self._handle_disco_fault(fault, path)

    def _sender(self, path: Path) -> Sender:
        """Peer relays know us by the node's own sockets, whatever a port search found."""
        return self._wiring.udp if path.vni else self.udp

    def _handle_disco_fault(self, fault: int, path: Path) -> None:
        if fault in NEEDS_FRESH_SOCKET:
            self._wiring.want_rebind()
        elif fault in NO_ROUTE:
            self._machine.handle_send_error(path, trio.current_time())

    def send_disco_by_relay(self, message: Message) -> None:
        """Send a message to the peer by its relay; nothing while its disco key is unknown."""
        envelope = self.seal_disco(message)
        if envelope is not None:
            self.send_by_relay(envelope)

    def seal_disco(self, message: Message) -> bytes | None:
        """An envelope for the peer; None while its disco key is not known."""
        if self._box is None:
            return None
        wiring = self._wiring
        nonce = wiring.entropy(NONCE_LENGTH)
        return seal_envelope(message, wiring.disco_public, self._box, nonce)

    def _seal(self, message: Message, path: Path) -> bytes | None:
        envelope = self.seal_disco(message)
        if envelope is not None and path.vni and not path.is_edge:
            return Header(path.vni, PROTOCOL_DISCO).encode() + envelope
        return envelope
