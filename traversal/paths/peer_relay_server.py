"""The server side of UDP peer relays: who may meet where, and which datagram goes on to whom.

Peer relay specification 4 to 7. A pair of clients gets an endpoint (a VNI), each proves with a
challenge that it receives at the address it sends from, and from then on what comes from one bound
address is sent unchanged to the other.

Strangers cost nothing: an endpoint is made only for somebody who was admitted, a datagram with an
unknown VNI or from an unknown key is counted and dropped before any cryptography, and the challenge
is a MAC over the sender's address, so that nothing is kept for an address that proves nothing.
Beyond the specification, endpoints are limited, in all and per requester.

Feed `allocate` and `handle_datagram`; call `on_time(now)` by `next_deadline()`.
"""

from __future__ import annotations

import hashlib
import hmac
import math
from dataclasses import dataclass, field
from typing import Final

from traversal.keys import (
    KEY_LENGTH,
    NONCE_LENGTH,
    Box,
    DiscoPrivate,
    DiscoPublic,
    Entropy,
    KeyFormatError,
    NodePublic,
)
from traversal.wire.address import Address
from traversal.wire.disco import (
    MAX_RELAY_ADDRESSES,
    AllocateRequest,
    AllocateResponse,
    Answer,
    Bind,
    Challenge,
    DiscoError,
    RelayEndpoint,
    is_disco,
    open_envelope,
    parse_sender,
    seal_envelope,
)
from traversal.wire.geneve import HEADER_LENGTH, PROTOCOL_DISCO, GeneveError, Header, parse_header

BIND_LIFETIME_SECONDS: Final = 30.0
STEADY_LIFETIME_SECONDS: Final = 300.0
SWEEP_SECONDS: Final = 30.0
SECRET_SECONDS: Final = 120.0
"""All four: peer relay specification 2."""
MAX_VNI: Final = (1 << 24) - 1


class AllocationError(Exception):
    """No endpoint can be given; the text says why. The client gets no answer."""


@dataclass(frozen=True, slots=True)
class PeerRelayLimits:
    """How many endpoints there may be: in all, and asked for by one node."""

    endpoints: int = 1024
    endpoints_per_node: int = 64


@dataclass(frozen=True, slots=True)
class PeerRelayStatistics:
    """A snapshot."""

    endpoints: int
    open_endpoints: int
    allocations: int
    refused_allocations: int
    forwarded_datagrams: int
    forwarded_bytes: int
    dropped_datagrams: int


@dataclass(slots=True)
class _Leg:
    """One client's side of an endpoint. `generation` is that of a handshake in progress, or 0."""

    key: DiscoPublic
    box: Box
    generation: int = 0
    address: Address | None = None
    seen_at: float = -math.inf


@dataclass(slots=True)
class _Endpoint:
    vni: int
    lamport_id: int
    owner: NodePublic
    allocated_at: float
    legs: tuple[_Leg, _Leg]

    @property
    def is_open(self) -> bool:
        return all(leg.address is not None for leg in self.legs)

    def is_expired(self, now: float) -> bool:
        if not self.is_open:
            return now - self.allocated_at > BIND_LIFETIME_SECONDS
        return any(now - leg.seen_at > STEADY_LIFETIME_SECONDS for leg in self.legs)


@dataclass(slots=True)
class _Secrets:
    """The keys of the MAC: the current one and the one before."""

    current: bytes
    previous: bytes
    rotated_at: float = field(default=-math.inf)


class PeerRelayServer:
    """The endpoints of one relay server. Times are monotonic seconds."""

    def __init__(
        self, private_key: DiscoPrivate, entropy: Entropy, limits: PeerRelayLimits | None = None
    ) -> None:
        """`private_key` is the server's own, made anew at each start and used for nothing else."""
        self.public_key = private_key.public()
        self.addresses: tuple[Address, ...] = ()
        """Where the server is reached, static addresses first; empty while that is unknown."""
        self._private_key = private_key
        self._entropy = entropy
        self._limits = limits or PeerRelayLimits()
        self._by_vni: dict[int, _Endpoint] = {}
        self._by_pair: dict[tuple[DiscoPublic, DiscoPublic], _Endpoint] = {}
        self._lamport_id = 0
        self._last_vni = 0
        self._secrets = _Secrets(entropy(KEY_LENGTH), entropy(KEY_LENGTH))
        self._swept_at = -math.inf
        self._allocations = 0
        self._refused = 0
        self._forwarded = 0
        self._forwarded_bytes = 0
        self._dropped = 0

    def statistics(self) -> PeerRelayStatistics:
        """A snapshot of the counters."""
        return PeerRelayStatistics(
            endpoints=len(self._by_vni),
            open_endpoints=sum(endpoint.is_open for endpoint in self._by_vni.values()),
            allocations=self._allocations,
            refused_allocations=self._refused,
            forwarded_datagrams=self._forwarded,
            forwarded_bytes=self._forwarded_bytes,
            dropped_datagrams=self._dropped,
        )

    # ---- allocation

    def allocate(
        self, requester: NodePublic, request: AllocateRequest, now: float
    ) -> AllocateResponse:
        """An endpoint for a pair of clients; the same one as before while it lives.

        The caller has checked that `requester` may use this relay and is one of the pair. Raises
        AllocationError.
        """
        self._allocations += 1
        try:
            endpoint = self._find_or_make(requester, request, now)
        except AllocationError:
            self._refused += 1
            raise
        return AllocateResponse(
            request.generation,
            RelayEndpoint(
                server_key=self.public_key,
                clients=request.clients,
                lamport_id=endpoint.lamport_id,
                vni=endpoint.vni,
                bind_lifetime_nanoseconds=int(BIND_LIFETIME_SECONDS * 1e9),
                steady_state_lifetime_nanoseconds=int(STEADY_LIFETIME_SECONDS * 1e9),
                addresses=self.addresses[:MAX_RELAY_ADDRESSES],
            ),
        )

    def _find_or_make(
        self, requester: NodePublic, request: AllocateRequest, now: float
    ) -> _Endpoint:
        if not self.addresses:
            raise AllocationError("this relay does not know its own address yet")
        endpoint = self._by_pair.get(request.clients)
        if endpoint is None or endpoint.is_expired(now):
            if endpoint is not None:
                self._remove(endpoint)
            return self._make(requester, request, now)
        if not endpoint.is_open:
            # The answer promises the whole time to bind, so let it be the whole time.
            endpoint.allocated_at = now
        return endpoint

    def _make(self, requester: NodePublic, request: AllocateRequest, now: float) -> _Endpoint:
        one, other = request.clients
        if one == other or self.public_key in request.clients:
            raise AllocationError("a pair is two clients, neither of them this relay")
        if len(self._by_vni) >= self._limits.endpoints:
            raise AllocationError(f"all {self._limits.endpoints} endpoints are in use")
        owned = sum(endpoint.owner == requester for endpoint in self._by_vni.values())
        if owned >= self._limits.endpoints_per_node:
            raise AllocationError(f"{requester.short()} has {owned} endpoints, no more are allowed")
        try:
            legs = (
                _Leg(one, Box(self._private_key, one)),
                _Leg(other, Box(self._private_key, other)),
            )
        except KeyFormatError as error:
            raise AllocationError(str(error)) from None
        self._lamport_id += 1
        endpoint = _Endpoint(self._next_vni(), self._lamport_id, requester, now, legs)
        self._by_vni[endpoint.vni] = self._by_pair[request.clients] = endpoint
        return endpoint

    def _next_vni(self) -> int:
        # In sequence, so that a number is used again as late as possible. There are fewer endpoints
        # than numbers, by the limit.
        while True:
            self._last_vni = self._last_vni % MAX_VNI + 1
            if self._last_vni not in self._by_vni:
                return self._last_vni

    # ---- datagrams

    def handle_datagram(
        self, datagram: bytes, source: tuple[str, int], now: float
    ) -> tuple[bytes, tuple[str, int]] | None:
        """What to send where because of a datagram that came from `source`; None for nothing.

        Anything may be in it.
        """
        endpoint = self._by_vni.get(int.from_bytes(datagram[4:7], "big"))
        if endpoint is None or len(datagram) <= HEADER_LENGTH:
            self._dropped += 1
            return None
        if datagram[1] & 0x80:
            answer = self._handle_control(endpoint, datagram, Address(*source), now)
            return None if answer is None else (answer, source)
        one, other = endpoint.legs
        if one.address == source:
            leg, target = one, other.address
        elif other.address == source:
            leg, target = other, one.address
        else:
            target = None
        if target is None:
            self._dropped += 1
            return None
        leg.seen_at = now
        self._forwarded += 1
        self._forwarded_bytes += len(datagram)
        return datagram, target

    def _handle_control(
        self, endpoint: _Endpoint, datagram: bytes, source: Address, now: float
    ) -> bytes | None:
        try:
            header = parse_header(datagram)
            envelope = datagram[HEADER_LENGTH:]
            if header.protocol != PROTOCOL_DISCO or not is_disco(envelope):
                raise DiscoError("a control packet that is no disco message")
            sender = parse_sender(envelope)
            leg = next((leg for leg in endpoint.legs if leg.key == sender), None)
            if leg is None:
                raise DiscoError("a control packet from none of the pair")
            message = open_envelope(envelope, leg.box)
        except (GeneveError, DiscoError):
            self._dropped += 1
            return None
        one, other = endpoint.legs
        remote = other if leg is one else one
        if isinstance(message, Bind | Answer) and self._fits(message, endpoint, remote):
            if isinstance(message, Bind):
                return self._challenge(endpoint, leg, message, source, now)
            if self._bind(leg, message, source, now):
                return None
        self._dropped += 1
        return None

    @staticmethod
    def _fits(message: Bind | Answer, endpoint: _Endpoint, remote: _Leg) -> bool:
        return message.vni == endpoint.vni and message.remote_key == remote.key

    def _challenge(
        self, endpoint: _Endpoint, leg: _Leg, bind: Bind, source: Address, now: float
    ) -> bytes:
        leg.generation = bind.generation
        self._rotate(now)
        mac = make_mac(self._secrets.current, bind, source)
        challenge = Challenge(bind.vni, bind.generation, bind.remote_key, mac)
        nonce = self._entropy(NONCE_LENGTH)
        header = Header(endpoint.vni, PROTOCOL_DISCO, control=True)
        return header.encode() + seal_envelope(challenge, self.public_key, leg.box, nonce)

    def _bind(self, leg: _Leg, answer: Answer, source: Address, now: float) -> bool:
        self._rotate(now)
        if not leg.generation or answer.generation != leg.generation:
            return False
        secrets = (self._secrets.current, self._secrets.previous)
        macs = [make_mac(secret, answer, source) for secret in secrets]
        if not any(hmac.compare_digest(mac, answer.challenge) for mac in macs):
            return False
        leg.address, leg.seen_at, leg.generation = source, now, 0
        return True

    def _rotate(self, now: float) -> None:
        secrets = self._secrets
        age = now - secrets.rotated_at
        if age < SECRET_SECONDS:
            return
        # One that is older than twice the time is not the previous one any more.
        is_recent = age < 2 * SECRET_SECONDS
        secrets.previous = secrets.current if is_recent else self._entropy(KEY_LENGTH)
        secrets.current = self._entropy(KEY_LENGTH)
        secrets.rotated_at = now

    # ---- timers

    def next_deadline(self) -> float:
        """When to call `on_time` at the latest; infinity for never."""
        return self._swept_at + SWEEP_SECONDS if self._by_vni else math.inf

    def on_time(self, now: float) -> None:
        """Forget what has expired."""
        self._swept_at = now
        for endpoint in [e for e in self._by_vni.values() if e.is_expired(now)]:
            self._remove(endpoint)

    def _remove(self, endpoint: _Endpoint) -> None:
        one, other = endpoint.legs
        del self._by_vni[endpoint.vni], self._by_pair[one.key, other.key]


def make_mac(secret: bytes, message: Bind | Answer, source: Address) -> bytes:
    """The challenge: what only somebody who receives at `source` can echo from there."""
    data = (
        message.vni.to_bytes(4, "big")
        + message.generation.to_bytes(4, "big")
        + message.remote_key.raw
        + source.ip.packed
        + source.port.to_bytes(2, "little")
    )
    return hashlib.blake2s(data, key=secret).digest()
