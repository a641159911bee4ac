"""The state machine of one peer under arbitrary orders of events.

What must hold whatever happens: nothing is raised; effects and candidates stay bounded; timers make
progress (a deadline that was served does not come back at once, for ever); route and state agree.
"""

from __future__ import annotations

import math
import random
from typing import Final

from traversal.keys import DiscoPublic
from traversal.paths.candidates import MAX_CANDIDATES, MAX_LISTED
from traversal.paths.effects import Effect, PathState, SendPing, SendPong, SendRelayPing
from traversal.paths.peer import Peer
from traversal.paths.scoring import Path
from traversal.wire.address import Address

ADDRESSES: Final = tuple(
    Address(host, port)
    for host in ("203.0.113.1", "10.0.0.1", "2001:db8::1", "fd00::1", "127.0.0.1", "198.51.100.1")
    for port in (1, 41641)
)
SERVER: Final = DiscoPublic(bytes(range(32)))
MAX_TIMERS_PER_INSTANT: Final = 50
MAX_EFFECTS: Final = 2 * MAX_CANDIDATES + 2 * MAX_LISTED


class Driver:
    """Turns bytes into events."""

    def __init__(self, data: bytes) -> None:
        self._data = iter(data)
        self.now = 0.0
        self.peer = Peer(random.Random(1).randbytes, ceiling_bytes=1500)
        self._pings: list[tuple[bytes, Address, bool]] = []
        self._serial = 0

    def byte(self) -> int:
        return next(self._data)

    def address(self) -> Address:
        return ADDRESSES[self.byte() % len(ADDRESSES)]

    def addresses(self) -> tuple[Address, ...]:
        bits = self.byte()
        return tuple(address for n, address in enumerate(ADDRESSES) if bits >> n % 8 & 1)

    def run(self) -> None:
        """Until the bytes are used up."""
        try:
            while True:
                self.step()
                self.check()
        except StopIteration:
            pass

    def step(self) -> None:
        peer, now = self.peer, self.now
        match self.byte() % 20:
            case 0 | 1:
                peer.sent += 1
                if peer.route.wake:
                    peer.handle_send(now)
            case 2:
                peer.received += 1
            case 3 | 4 | 5:
                self.advance(self.byte() / 100)
            case 6:
                self.advance(self.byte() / 2)
            case 7:
                self._serial += 1
                peer.handle_ping(self._serial.to_bytes(12), Path(self.address()), now)
            case 8 | 9 | 10:
                if self._pings:
                    ping, address, is_relayed = self._pings.pop(self.byte() % len(self._pings))
                    if is_relayed:
                        peer.handle_relay_pong(ping, ADDRESSES[0], now)
                    else:
                        peer.handle_pong(ping, address, ADDRESSES[0], now)
            case 11:
                if self._pings:
                    ping, _, _ = self._pings[self.byte() % len(self._pings)]
                    peer.handle_pong(ping, self.address(), ADDRESSES[0], now)
            case 12:
                peer.handle_call_me_maybe(self.addresses(), now)
            case 13:
                peer.set_configured_addresses(self.addresses(), now)
            case 14:
                peer.set_own_addresses(self.addresses(), now)
            case 15:
                peer.handle_rebind(now)
            case 16:
                peer.handle_send_error(Path(self.address()), now)
            case 17:
                bits = self.byte()
                if bits & 1:
                    peer.set_relay_available(bool(bits & 2), now)
                else:
                    peer.set_edge_available(bool(bits & 2), now)
            case 18:
                bits = self.byte()
                path = Path(self.address(), vni=1 + bits % 2)
                if bits & 4:
                    peer.has_peer_relays = True
                    peer.handle_peer_relay_ready(path, SERVER, bits / 1000, now)
                elif bits & 8:
                    peer.handle_found(self.address(), bits / 1000, now)
                elif bits & 16:
                    peer.handle_authenticated_data(Path(self.address()), now)
                else:
                    peer.handle_new_disco_key(now)
            case 19:
                if self.byte() & 1:
                    peer.ping_all(now)
                else:
                    peer.handle_too_big(self.byte() * 8, now)
        self.take_effects()

    def advance(self, seconds: float) -> None:
        """Let time pass, serving timers when they are due."""
        until = self.now + seconds
        at_once = 0
        while (deadline := self.peer.next_deadline()) <= until:
            at_once = at_once + 1 if deadline <= self.now else 0
            assert at_once < MAX_TIMERS_PER_INSTANT, f"a timer spins at {self.now}"
            self.now = max(self.now, deadline)
            self.peer.on_time(self.now)
            self.take_effects()
            self.check()
        self.now = until

    def take_effects(self) -> None:
        effects: list[Effect] = self.peer.poll_effects()
        assert len(effects) <= MAX_EFFECTS, f"{len(effects)} effects at once"
        for effect in effects:
            if isinstance(effect, SendPing):
                assert effect.path.is_edge or effect.path.address.port, "a Ping to port 0"
                self._pings.append((effect.transaction_id, effect.path.address, False))
            elif isinstance(effect, SendRelayPing):
                self._pings.append((effect.transaction_id, ADDRESSES[0], True))
            elif isinstance(effect, SendPong):
                assert len(effect.transaction_id) == 12
        del self._pings[:-64]

    def check(self) -> None:
        peer = self.peer
        route = peer.route
        statistics = peer.statistics()
        assert len(statistics.candidates) <= MAX_CANDIDATES + 2 * MAX_LISTED
        assert route.path is not None or route.relay, "traffic has no way out"
        if peer.state in (PathState.DIRECT, PathState.PEER_RELAY):
            assert statistics.best is not None
            assert statistics.best.path == route.path
        assert not math.isnan(peer.next_deadline())


def drive_peer(data: bytes) -> None:
    """The fuzz target."""
    Driver(data).run()
