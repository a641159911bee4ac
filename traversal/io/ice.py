"""ICE sessions of a node: peers that speak WebRTC's way of connecting, over the node's sockets.

A session has neither a task nor a socket of its own. What arrives is told apart by the user name
fragment (requests), the transaction id (answers) and the source address (data); timers are those
of the node's `Deadlines`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, Self

import trio

from traversal.io.deadlines import Deadlines
from traversal.io.inbox import Inbox
from traversal.io.udp import Source, UdpSockets
from traversal.keys import Entropy
from traversal.paths.candidates import LocalNetworks
from traversal.paths.effects import AddressForgotten, AddressLearned
from traversal.paths.ice import IceAgent
from traversal.paths.ice_effects import (
    CheckEnded,
    CheckStarted,
    IceError,
    IceState,
    IceStateChanged,
    SelectedPair,
    SendStun,
)
from traversal.wire.address import Address
from traversal.wire.classify import is_plain_data
from traversal.wire.ice_check import is_any_stun, is_request, maybe_receiver_ufrag
from traversal.wire.ice_description import (
    IceCandidate,
    IceDescription,
    parse_candidate,
    parse_description,
)

MAX_DATAGRAM_BYTES: Final = 65507
SENDS_PER_CHECKPOINT: Final = 16
"""A checkpoint costs as much as sending; others get a turn this often."""


@dataclass(frozen=True, slots=True)
class IceStatistics:
    """Counters since the session was opened."""

    sent: int
    received: int
    dropped_for_slow_reader: int
    rejected_stun: int


class IceRouter:
    """All ICE sessions of a node: hands them what arrives."""

    def __init__(self, udp: UdpSockets, deadlines: Deadlines, entropy: Entropy) -> None:
        self.udp = udp
        self.deadlines = deadlines
        self.entropy = entropy
        self.by_ufrag: dict[str, IceSession] = {}
        self.by_transaction: dict[bytes, IceSession] = {}
        self.by_address: dict[Source, IceSession] = {}

    def open(
        self, candidates: Iterable[IceCandidate], local: LocalNetworks, *, is_controlling: bool
    ) -> IceSession:
        """A new session."""
        agent = IceAgent(self.entropy, candidates, local, is_controlling=is_controlling)
        return IceSession(self, agent)

    def handle_datagram(self, datagram: bytes, source: Source) -> bool:
        """STUN, or data from an address of no other peer; False if it is for no session."""
        if not is_any_stun(datagram):
            session = self.by_address.get(source)
            if session is not None:
                session.deliver(datagram)
        elif is_request(datagram):
            session = self.by_ufrag.get(maybe_receiver_ufrag(datagram) or "")
            if session is not None:
                session.handle_stun(datagram, source)
        else:
            session = self.by_transaction.get(datagram[8:20])
            if session is not None:
                session.handle_stun(datagram, source)
        return session is not None

    def set_local_networks(self, local: LocalNetworks) -> None:
        """What is known about our own addresses changed."""
        for session in self.by_ufrag.values():
            session.set_local_networks(local)

    def handle_rebind(self) -> None:
        """The sockets are fresh ones: tell every peer where we are now."""
        for session in list(self.by_ufrag.values()):
            session.handle_rebind()

    def close(self) -> None:
        """Close all sessions."""
        for session in list(self.by_ufrag.values()):
            session.close()


class IceSession:
    """Made by `Node.open_ice`: datagrams to and from one ICE peer.

    Exchange `local_description` for the peer's by a channel of your own, then `connect`. Datagrams
    are not encrypted, ordered or repeated; WebRTC runs DTLS on top.
    """

    def __init__(self, router: IceRouter, agent: IceAgent) -> None:
        self.armed_at = math.inf
        self._router = router
        self._agent = agent
        self._reason = ""
        self._changed = trio.Event()
        self._inbox = Inbox(self._check_open)
        self._sent = 0
        router.by_ufrag[agent.description.ufrag] = self

    def __repr__(self) -> str:
        return f"<ICE session, {self.state.value}>"

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()

    # ---- look

    @property
    def local_description(self) -> IceDescription:
        """For the peer; `encode()` makes SDP lines of it. It contains a secret."""
        return self._agent.description

    @property
    def state(self) -> IceState:
        """Where the session is in its life."""
        return self._agent.state

    @property
    def is_controlling(self) -> bool:
        """Whether we choose the path; a conflict of roles may have changed it."""
        return self._agent.is_controlling

    @property
    def selected(self) -> SelectedPair | None:
        """The path in use; None while there is none."""
        return self._agent.selected

    def statistics(self) -> IceStatistics:
        """A snapshot."""
        inbox = self._inbox
        return IceStatistics(self._sent, inbox.received, inbox.dropped, self._agent.rejected)

    # ---- commands

    async def connect(self, remote: IceDescription | str) -> None:
        """Look for a path to the peer that described itself so; returns when there is one.

        Text is SDP. Raises IceDescriptionError for a text that is none, and IceError with the
        reason when there is no path, after 39.5 s at most. When cancelled, the search goes on
        until the session is closed.
        """
        description = parse_description(remote) if isinstance(remote, str) else remote
        await trio.lowlevel.checkpoint_if_cancelled()
        self._agent.set_remote(description, trio.current_time())
        self._carry_out()
        while self.state is IceState.CHECKING:
            await self._changed.wait()
        self._check_connected()

    def add_remote_candidate(self, candidate: IceCandidate | str) -> None:
        """A candidate that came after the description (trickle ICE); too late, it is ignored.

        Raises IceDescriptionError for a text that is none, or none that can be used.
        """
        if isinstance(candidate, str):
            candidate = parse_candidate(candidate)
        self._agent.add_remote_candidates([candidate], trio.current_time())
        self._carry_out()

    async def send(self, datagram: bytes) -> None:
        """Send one datagram; that it arrives is not promised. A checkpoint.

        Raises IceError when there is no path, or no more, and for what can't be sent at all.
        """
        self.send_nowait(datagram)
        if self._sent % SENDS_PER_CHECKPOINT:
            await trio.lowlevel.checkpoint_if_cancelled()
        else:
            await trio.lowlevel.checkpoint()

    def send_nowait(self, datagram: bytes) -> None:
        """`send` without a checkpoint, for those who make their own."""
        address = self._agent.selected_address
        if address is None:
            self._check_connected()
            return
        if len(datagram) > MAX_DATAGRAM_BYTES:
            raise IceError(
                f"a datagram has at most {MAX_DATAGRAM_BYTES} bytes, not {len(datagram)}"
            )
        if is_any_stun(datagram) or not is_plain_data(datagram):
            raise IceError(
                "a datagram that begins like STUN, disco or Geneve would be taken for one by the "
                "peer; put a header of your own in front"
            )
        self._sent += 1
        # An error is loss like any other here: consent checks notice when it lasts.
        self._router.udp.send(datagram, address)

    async def receive(self) -> bytes:
        """The next datagram. A checkpoint. Cancelling loses nothing.

        Raises IceError when the session has failed or is closed, and nothing waits any more.
        """
        return await self._inbox.receive()

    def _check_open(self) -> None:
        if self.state in (IceState.FAILED, IceState.CLOSED):
            self._check_connected()

    def close(self) -> None:
        """End the session; harmless when repeated. Whoever waits gets IceError."""
        self._agent.close()
        self._carry_out()
        self._router.deadlines.disarm(self)
        self._router.by_ufrag.pop(self._agent.description.ufrag, None)

    # ---- feed

    def handle_stun(self, datagram: bytes, source: Source) -> None:
        """A request that names us, or an answer to a check of ours."""
        self._agent.handle_stun(datagram, Address(*source), trio.current_time())
        self._carry_out()

    def deliver(self, datagram: bytes) -> None:
        """Data from an address where the peer has proved to be."""
        self._inbox.put((datagram,))

    def set_local_networks(self, local: LocalNetworks) -> None:
        """What is known about our own addresses changed."""
        self._agent.set_local_networks(local)

    def handle_rebind(self) -> None:
        """The sockets are fresh ones."""
        self._agent.handle_rebind(trio.current_time())
        self._carry_out()

    def next_deadline(self) -> float:
        """For the node's deadlines."""
        return self._agent.next_deadline()

    def on_time(self, now: float) -> None:
        """For the node's deadlines."""
        self._agent.on_time(now)
        self._carry_out()

    # ---- effects

    def _carry_out(self) -> None:
        router = self._router
        for effect in self._agent.poll_effects():
            match effect:
                case SendStun():
                    router.udp.send(effect.datagram, effect.address)
                case CheckStarted():
                    router.by_transaction[effect.transaction_id] = self
                case CheckEnded():
                    router.by_transaction.pop(effect.transaction_id, None)
                case AddressLearned():
                    router.by_address[effect.address] = self
                case AddressForgotten():
                    if router.by_address.get(effect.address) is self:
                        del router.by_address[effect.address]
                case IceStateChanged():
                    self._reason = effect.reason
                    self._changed.set()
                    self._changed = trio.Event()
                    self._inbox.wake_all()
        router.deadlines.arm(self)

    def _check_connected(self) -> None:
        if self.state is IceState.NEW:
            raise IceError("this ICE session has no peer yet: call connect() with its description")
        if self.state is IceState.CHECKING:
            raise IceError("this ICE session has no path yet: wait for connect() to return")
        if self.state is not IceState.CONNECTED:
            raise IceError(f"the ICE session is {self.state.value}: {self._reason}")
