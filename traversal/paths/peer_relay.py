"""The client side of UDP peer relays, for one peer: allocate, bind, prove, hand over a path.

Peer relay specification 8 and 9. For each relay server one handshake at most is in progress:

    allocating -> bind sent -> answer sent -> ready

Better than a stock client in three points: Bind, and after it Answer and Ping, are repeated at
250 ms and 1 s, since a single lost datagram costs a stock client 30 s (R3); a Challenge must carry
our generation (R4); and a path that failed is bound anew by UDP, without waiting for an allocation:
when our NAT forgot us, the relay does not know our address any more, and DERP is gone as well.

Feed `handle_*`, carry out `poll_effects()` in order, call `on_time(now)` by `next_deadline()`.
`RelayReady` goes to `Peer.handle_peer_relay_ready`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Final

from traversal.keys import DiscoPublic, Entropy, NodePublic
from traversal.paths.scoring import Path
from traversal.wire.address import Address
from traversal.wire.disco import (
    TRANSACTION_ID_LENGTH,
    AllocateRequest,
    AllocateResponse,
    Answer,
    Bind,
    CallMeMaybeVia,
    Challenge,
    RelayEndpoint,
    sorted_pair,
)

ALLOCATE_RETRY_SECONDS: Final = 3.0
ALLOCATE_LIMIT_SECONDS: Final = 10.0
HANDSHAKE_LIMIT_SECONDS: Final = 30.0
REPEAT_AFTER: Final = (0.25, 1.0)
MAX_PINGS: Final = 10
MAX_HANDSHAKES: Final = 8
"""Servers tried at once: the peer can invite us to any, each invitation costs us three Binds."""
INVITATIONS_PER_SECOND: Final = 0.5
INVITATIONS_BURST: Final = 16.0
"""Taken from the peer, who invites us once in 30 s for each relay that it knows: an invitation of
800 bytes has us send Binds of 160 bytes to 32 addresses of its choice."""
MAX_BOUND: Final = 8
"""Paths by which the peer's data is taken for its own; beyond these the oldest is released."""
MAX_ATTEMPTS: Final = 8
"""Remembered for the verdict."""


@dataclass(frozen=True, slots=True)
class SendAllocate:
    """Send `request` to the relay node by its home relay."""

    relay: NodePublic
    request: AllocateRequest


@dataclass(frozen=True, slots=True)
class SendVia:
    """Send CallMeMaybeVia to the peer by its home relay."""

    message: CallMeMaybeVia


@dataclass(frozen=True, slots=True)
class SendControl:
    """Send `message`, sealed for `server`, behind a Geneve header with the control bit."""

    server: DiscoPublic
    path: Path
    message: Bind | Answer


@dataclass(frozen=True, slots=True)
class SendRelayedPing:
    """Send a Ping to the peer through the relay, behind Geneve without the control bit."""

    path: Path
    transaction_id: bytes


@dataclass(frozen=True, slots=True)
class PathBound:
    """From now on the peer's data may come by `path`: we proved our address to the server."""

    path: Path


@dataclass(frozen=True, slots=True)
class PathReleased:
    """`path` is not the peer's any more."""

    path: Path


@dataclass(frozen=True, slots=True)
class RelayReady:
    """The path works in both directions."""

    path: Path
    server: DiscoPublic
    latency_seconds: float


Effect = (
    SendAllocate | SendVia | SendControl | SendRelayedPing | PathBound | PathReleased | RelayReady
)


class RelayStep(Enum):
    """How far the way by one relay came; the value says it in words."""

    ASKED = "was asked for a place to meet"
    SILENT = "did not answer our request"
    BINDING = "is being tried by UDP"
    UNREACHABLE = "does not answer us by UDP"
    NO_PEER = "answers us by UDP, but leads to no answer of the peer"
    READY = "leads to the peer"


@dataclass(frozen=True, slots=True)
class RelayAttempt:
    """The last attempt with one relay, for the verdict. Times are monotonic; None is never.

    Attributes:
        relay: a short form of the relay's node key, or, where the peer chose it, of the disco key.
    """

    relay: str
    step: RelayStep
    began_at: float
    answered_at: float | None = None
    latency_seconds: float | None = None


@dataclass(slots=True)
class _Allocation:
    request: AllocateRequest
    ends_at: float
    retry_at: float


@dataclass(slots=True)
class _Handshake:
    endpoint: RelayEndpoint
    generation: int
    ends_at: float
    repeat_times: list[float]
    address: Address | None = None
    answer: Answer | None = None
    pings: dict[bytes, float] = field(default_factory=dict)


class PeerRelayClient:
    """Handshakes with relay servers on behalf of one peer. Times are monotonic seconds."""

    def __init__(self, own: DiscoPublic, peer: DiscoPublic, entropy: Entropy) -> None:
        self._pair = sorted_pair(own, peer)
        self._peer = peer
        self._entropy = entropy
        self._generation = 0
        self._allocations: dict[NodePublic, _Allocation] = {}
        self._handshakes: dict[DiscoPublic, _Handshake] = {}
        self._bound: dict[Path, None] = {}
        self._last: RelayEndpoint | None = None
        self._invited_at = -math.inf
        self._invitations = INVITATIONS_BURST
        self._effects: list[Effect] = []
        self._attempts: dict[str, RelayAttempt] = {}
        self._names: dict[DiscoPublic, str] = {}

    @property
    def attempts(self) -> tuple[RelayAttempt, ...]:
        """The last attempt with each of the last relays."""
        return tuple(self._attempts.values())

    @property
    def is_busy(self) -> bool:
        """Whether anything is in progress."""
        return bool(self._allocations or self._handshakes)

    def poll_effects(self) -> list[Effect]:
        """Everything to do since the last call, in order."""
        effects, self._effects = self._effects, []
        return effects

    def next_deadline(self) -> float:
        """When to call `on_time` at the latest; infinity for never."""
        times = [min(a.ends_at, a.retry_at) for a in self._allocations.values()]
        times += [min([h.ends_at, *h.repeat_times]) for h in self._handshakes.values()]
        return min(times, default=math.inf)

    def on_time(self, now: float) -> None:
        """Repeat and give up."""
        for relay, allocation in list(self._allocations.items()):
            if now >= allocation.ends_at:
                del self._allocations[relay]
                self._note_step(relay.short(), RelayStep.SILENT)
            elif now >= allocation.retry_at:
                allocation.retry_at = math.inf
                self._effects.append(SendAllocate(relay, allocation.request))
        for server, handshake in list(self._handshakes.items()):
            if now >= handshake.ends_at:
                del self._handshakes[server]
                is_bound = handshake.address is not None
                step = RelayStep.NO_PEER if is_bound else RelayStep.UNREACHABLE
                self._note_step(self._name(server), step)
            elif handshake.repeat_times and now >= handshake.repeat_times[0]:
                handshake.repeat_times.pop(0)
                if handshake.answer is None:
                    self._bind(handshake)
                else:
                    self._answer(handshake, now)

    def discover(
        self, relays: list[NodePublic], best: tuple[DiscoPublic, int] | None, now: float
    ) -> None:
        """Ask relay nodes for an endpoint; those that were asked already are not asked again.

        `best` is as for `handle_response`.
        """
        if self._last is not None and best != (self._last.server_key, self._last.vni):
            self._start(self._last, now)
        for relay in relays[:MAX_HANDSHAKES]:
            if relay in self._allocations or len(self._allocations) >= MAX_HANDSHAKES:
                continue
            request = AllocateRequest(self._pair, self._next_generation())
            ends_at, retry_at = now + ALLOCATE_LIMIT_SECONDS, now + ALLOCATE_RETRY_SECONDS
            self._allocations[relay] = _Allocation(request, ends_at, retry_at)
            self._effects.append(SendAllocate(relay, request))
            self._note_attempt(RelayAttempt(relay.short(), RelayStep.ASKED, now))

    def handle_response(
        self,
        relay: NodePublic,
        response: AllocateResponse,
        best: tuple[DiscoPublic, int] | None,
        now: float,
    ) -> None:
        """A relay node answered by its home relay, sealed by its disco key.

        `best` is (server, VNI) of the path in use if it is by a peer relay and trusted: that one is
        not shaken hands with again, for the server would move our address under the traffic.
        """
        allocation = self._allocations.get(relay)
        if allocation is None or allocation.request.generation != response.generation:
            return
        endpoint = response.endpoint
        if endpoint.clients != self._pair:
            return
        del self._allocations[relay]
        self._note_name(endpoint.server_key, relay.short())
        self._effects.append(SendVia(CallMeMaybeVia(endpoint)))
        if best != (endpoint.server_key, endpoint.vni):
            self._start(endpoint, now)
        else:
            self._note_step(relay.short(), RelayStep.READY, now)

    def handle_via(
        self, message: CallMeMaybeVia, best: tuple[DiscoPublic, int] | None, now: float
    ) -> None:
        """The peer invites us to an endpoint."""
        endpoint = message.endpoint
        if endpoint.clients != self._pair or best == (endpoint.server_key, endpoint.vni):
            return
        earned = min(now - self._invited_at, INVITATIONS_BURST) * INVITATIONS_PER_SECOND
        budget = min(self._invitations + earned, INVITATIONS_BURST)
        if budget >= 1:
            self._invited_at, self._invitations = now, budget - 1
            self._start(endpoint, now)

    def handle_challenge(
        self, server: DiscoPublic, path: Path, challenge: Challenge, now: float
    ) -> None:
        """A relay server, authenticated by its disco key, challenges us. The first wins: it came
        by the fastest of the server's addresses."""
        handshake = self._handshakes.get(server)
        if (
            handshake is None
            or handshake.address is not None
            or path.vni != handshake.endpoint.vni
            or challenge.vni != handshake.endpoint.vni
            or challenge.generation != handshake.generation
            or challenge.remote_key != self._peer
        ):
            return
        handshake.address = path.address
        handshake.repeat_times = _repeats(now)
        handshake.answer = Answer(
            challenge.vni, challenge.generation, self._peer, challenge.challenge
        )
        self._note_bound(path)
        self._answer(handshake, now)

    def handle_ping(self, path: Path, now: float) -> None:
        """The peer's Ping came through a relay; its Pong is sent elsewhere, always.

        It shows that the peer is bound, so a Ping of ours gets through now.
        """
        for handshake in self._handshakes.values():
            if handshake.address == path.address and handshake.endpoint.vni == path.vni:
                self._ping(handshake, now)

    def handle_pong(self, transaction_id: bytes, now: float) -> bool:
        """A Pong with a transaction ID that `Peer` did not know; True if it was ours."""
        for server, handshake in self._handshakes.items():
            sent_at = handshake.pings.get(transaction_id)
            if sent_at is not None and handshake.address is not None:
                del self._handshakes[server]
                self._last = handshake.endpoint
                path = Path(handshake.address, handshake.endpoint.vni)
                self._effects.append(RelayReady(path, server, now - sent_at))
                self._note_step(self._name(server), RelayStep.READY, now, now - sent_at)
                return True
        return False

    def servers(self) -> set[DiscoPublic]:
        """Disco keys from which a Challenge may come: other control packets are dropped unread."""
        return set(self._handshakes)

    def _name(self, server: DiscoPublic) -> str:
        return self._names.get(server, server.short())

    def _note_name(self, server: DiscoPublic, relay: str) -> None:
        """That server belongs to that relay node; perhaps the peer invited us there before."""
        self._names[server] = relay
        invited = self._attempts.pop(server.short(), None)
        if invited is not None:
            self._note_attempt(replace(invited, relay=relay))

    def _note_attempt(self, attempt: RelayAttempt) -> None:
        self._attempts.pop(attempt.relay, None)
        self._attempts[attempt.relay] = attempt
        while len(self._attempts) > MAX_ATTEMPTS:
            del self._attempts[next(iter(self._attempts))]
        while len(self._names) > MAX_ATTEMPTS:
            del self._names[next(iter(self._names))]

    def _note_step(
        self,
        relay: str,
        step: RelayStep,
        answered_at: float | None = None,
        latency_seconds: float | None = None,
    ) -> None:
        attempt = self._attempts.get(relay)
        if attempt is not None:
            self._attempts[relay] = replace(
                attempt, step=step, answered_at=answered_at, latency_seconds=latency_seconds
            )

    def _note_bound(self, path: Path) -> None:
        self._bound.pop(path, None)
        if len(self._bound) == MAX_BOUND:
            oldest = next(iter(self._bound))
            del self._bound[oldest]
            self._effects.append(PathReleased(oldest))
        self._bound[path] = None
        self._effects.append(PathBound(path))

    def _next_generation(self) -> int:
        # 0 means "none" on the wire.
        self._generation = self._generation % 0xFFFFFFFF + 1
        return self._generation

    def _start(self, endpoint: RelayEndpoint, now: float) -> None:
        running = self._handshakes.get(endpoint.server_key)
        if running is not None and endpoint.lamport_id <= running.endpoint.lamport_id:
            return
        if running is None and len(self._handshakes) >= MAX_HANDSHAKES:
            return
        lifetime = min(endpoint.bind_lifetime_nanoseconds / 1e9, HANDSHAKE_LIMIT_SECONDS)
        handshake = _Handshake(
            endpoint,
            self._next_generation(),
            now + lifetime,
            _repeats(now),
        )
        self._handshakes[endpoint.server_key] = handshake
        self._note_attempt(RelayAttempt(self._name(endpoint.server_key), RelayStep.BINDING, now))
        self._bind(handshake)

    def _bind(self, handshake: _Handshake) -> None:
        endpoint = handshake.endpoint
        bind = Bind(endpoint.vni, handshake.generation, self._peer, bytes(32))
        for address in endpoint.addresses:
            path = Path(address, endpoint.vni)
            self._effects.append(SendControl(endpoint.server_key, path, bind))

    def _answer(self, handshake: _Handshake, now: float) -> None:
        if handshake.address is not None and handshake.answer is not None:
            endpoint = handshake.endpoint
            path = Path(handshake.address, endpoint.vni)
            self._effects.append(SendControl(endpoint.server_key, path, handshake.answer))
            self._ping(handshake, now)

    def _ping(self, handshake: _Handshake, now: float) -> None:
        if handshake.address is None or len(handshake.pings) >= MAX_PINGS:
            return
        transaction_id = self._entropy(TRANSACTION_ID_LENGTH)
        handshake.pings[transaction_id] = now
        path = Path(handshake.address, handshake.endpoint.vni)
        self._effects.append(SendRelayedPing(path, transaction_id))


def _repeats(now: float) -> list[float]:
    return [now + delay for delay in REPEAT_AFTER]
