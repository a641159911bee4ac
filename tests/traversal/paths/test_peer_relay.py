"""The peer relay client against a small model of the relay server, in virtual time."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from traversal.keys import DiscoPublic, NodePublic
from traversal.paths.peer_relay import (
    INVITATIONS_BURST,
    INVITATIONS_PER_SECOND,
    PathBound,
    PathReleased,
    PeerRelayClient,
    RelayReady,
    SendAllocate,
    SendControl,
    SendRelayedPing,
    SendVia,
)
from traversal.paths.scoring import Path
from traversal.wire.address import Address
from traversal.wire.disco import (
    AllocateResponse,
    Answer,
    Bind,
    CallMeMaybeVia,
    Challenge,
    RelayEndpoint,
    sorted_pair,
)

A, B, S = (DiscoPublic(bytes([n]) * 32) for n in (1, 2, 3))
RELAY = NodePublic(b"\x09" * 32)
FAST, SLOW = Address("198.51.100.20", 40000), Address("2001:db8::20", 40000)
ENDPOINT = RelayEndpoint(S, sorted_pair(A, B), 5, 0xABC, 30 * 10**9, 300 * 10**9, (SLOW, FAST))


class Server:
    """One relay server and two clients; `now` is moved by the test."""

    def __init__(self) -> None:
        rng = random.Random(1)
        self.clients = {
            key: PeerRelayClient(key, other, rng.randbytes) for key, other in ((A, B), (B, A))
        }
        self.bound: set[DiscoPublic] = set()
        self.now = 0.0
        self.ready: dict[DiscoPublic, RelayReady] = {}
        self.allocates = 0
        self.binds = 0
        self.drop_binds = 0

    def pump(self) -> None:
        busy = True
        while busy:
            busy = False
            for key, client in self.clients.items():
                for effect in client.poll_effects():
                    busy = True
                    self.carry_out(key, client, effect)

    def carry_out(self, key, client, effect) -> None:
        other_key = A if key == B else B
        other = self.clients[other_key]
        match effect:
            case SendAllocate(relay, request):
                self.allocates += 1
                client.handle_response(
                    relay, AllocateResponse(request.generation, ENDPOINT), None, self.now
                )
            case SendVia(message):
                other.handle_via(message, None, self.now)
            case SendControl(server, path, Bind(vni, generation, remote)):
                self.binds += 1
                if self.drop_binds:
                    self.drop_binds -= 1
                elif path.address == FAST:
                    answer = Challenge(vni, generation, remote, b"c" * 32)
                    client.handle_challenge(server, path, answer, self.now)
            case SendControl(_, _, Answer(_, _, _, challenge)):
                assert challenge == b"c" * 32
                self.bound.add(key)
            case SendRelayedPing(path, transaction_id):
                if self.bound == {A, B}:
                    other.handle_ping(path, self.now)
                    self.now += 0.01
                    client.handle_pong(transaction_id, self.now)
            case RelayReady():
                self.ready[key] = effect


def test_both_sides_get_ready() -> None:
    """One allocation, an invitation, two handshakes: both end up with the same relay path."""
    server = Server()
    server.clients[A].discover([RELAY], None, 0.0)
    server.pump()
    assert set(server.ready) == {A, B}
    assert {r.path for r in server.ready.values()} == {Path(FAST, 0xABC)}
    assert server.allocates == 1
    assert not any(client.is_busy for client in server.clients.values())
    assert all(c.next_deadline() == float("inf") for c in server.clients.values())


@pytest.mark.parametrize("lost", [2, 4])
def test_lost_binds_are_repeated(lost) -> None:
    """A Bind to every address, again after 250 ms and 1 s; then it is given up in time."""
    server = Server()
    server.drop_binds = lost
    client = server.clients[A]
    server.bound.add(B)
    client.handle_via(CallMeMaybeVia(ENDPOINT), None, 0.0)
    server.pump()
    assert A not in server.ready
    while not server.ready and client.is_busy:
        server.now = client.next_deadline()
        client.on_time(server.now)
        server.pump()
    assert server.now == pytest.approx(0.25 if lost == 2 else 1.0, abs=0.02)


def test_allocation_is_repeated_once_and_given_up() -> None:
    """A relay that does not answer is asked at 0 and 3 s and forgotten at 10 s."""
    client = PeerRelayClient(A, B, random.Random(1).randbytes)
    client.discover([RELAY, RELAY], None, 0.0)
    times = [0.0] * len(client.poll_effects())
    while client.is_busy:
        now = client.next_deadline()
        client.on_time(now)
        times += [now] * len(client.poll_effects())
    assert times == [0.0, 3.0]
    assert now == 10.0


def begin() -> PeerRelayClient:
    client = PeerRelayClient(A, B, random.Random(1).randbytes)
    client.handle_via(CallMeMaybeVia(ENDPOINT), None, 0.0)
    return client


def test_a_lost_answer_is_repeated() -> None:
    """Answer and Ping leave again after 250 ms and 1 s while nothing came through the relay."""
    client = begin()
    bind = client.poll_effects()[0].message
    path = Path(FAST, 0xABC)
    client.handle_challenge(S, path, Challenge(0xABC, bind.generation, B, b"c" * 32), 0.0)
    first = client.poll_effects()
    assert [type(e) for e in first] == [PathBound, SendControl, SendRelayedPing]
    for at in (0.25, 1.0):
        assert client.next_deadline() == at
        client.on_time(at)
        answer, ping = client.poll_effects()
        assert answer == first[1]
        assert ping.path == path
    client.handle_pong(ping.transaction_id, 1.1)
    assert [type(e) for e in client.poll_effects()] == [RelayReady]


def test_bound_paths_are_bounded() -> None:
    """Data of the peer is expected by the last eight paths that were bound."""
    client = PeerRelayClient(A, B, random.Random(1).randbytes)
    effects = []
    for vni in range(1, 11):
        endpoint = replace(ENDPOINT, vni=vni, lamport_id=vni)
        client.handle_via(CallMeMaybeVia(endpoint), None, float(vni))
        bind = client.poll_effects()[0].message
        challenge = Challenge(vni, bind.generation, B, b"c" * 32)
        client.handle_challenge(S, Path(FAST, vni), challenge, float(vni))
        effects += client.poll_effects()
    assert [e.path.vni for e in effects if isinstance(e, PathBound)] == list(range(1, 11))
    assert [e.path.vni for e in effects if isinstance(e, PathReleased)] == [1, 2]


def test_unfit_challenges_are_ignored() -> None:
    """Another server, VNI, generation or peer, and any second Challenge, change nothing."""
    client = begin()
    bind = client.poll_effects()[0].message
    good = Challenge(0xABC, bind.generation, B, b"c" * 32)
    path = Path(FAST, 0xABC)
    client.handle_challenge(A, path, good, 0.1)
    client.handle_challenge(S, Path(FAST, 1), good, 0.1)
    for bad in (
        replace(good, vni=1),
        replace(good, generation=bind.generation + 1),
        replace(good, remote_key=A),
    ):
        client.handle_challenge(S, path, bad, 0.1)
    assert client.poll_effects() == []
    client.handle_challenge(S, path, good, 0.1)
    assert [type(e) for e in client.poll_effects()] == [PathBound, SendControl, SendRelayedPing]
    client.handle_challenge(S, Path(SLOW, 0xABC), good, 0.1)
    assert client.poll_effects() == []


def test_races() -> None:
    """An older or equal invitation of the same server is ignored, a newer one restarts."""
    client = begin()
    client.poll_effects()
    client.handle_via(CallMeMaybeVia(ENDPOINT), None, 0.1)
    client.handle_via(CallMeMaybeVia(replace(ENDPOINT, lamport_id=4, vni=7)), None, 0.1)
    assert client.poll_effects() == []
    client.handle_via(CallMeMaybeVia(replace(ENDPOINT, lamport_id=6, vni=7)), None, 0.1)
    assert {e.path.vni for e in client.poll_effects()} == {7}


def test_a_failed_path_is_bound_anew() -> None:
    """What worked last is tried again by UDP beside asking for a new endpoint, unless it works."""
    server = Server()
    server.clients[A].discover([RELAY], None, 0.0)
    server.pump()
    client = server.clients[A]
    client.discover([], (S, 0xABC), 60.0)
    assert client.poll_effects() == []
    client.discover([], None, 60.0)
    effects = client.poll_effects()
    assert {e.path for e in effects} == {Path(FAST, 0xABC), Path(SLOW, 0xABC)}
    assert all(isinstance(e.message, Bind) for e in effects)


def test_the_path_in_use_is_left_alone() -> None:
    """No handshake for the endpoint that carries traffic; the peer is invited all the same."""
    client = PeerRelayClient(A, B, random.Random(1).randbytes)
    client.discover([RELAY], None, 0.0)
    (sent,) = client.poll_effects()
    response = AllocateResponse(sent.request.generation, ENDPOINT)
    client.handle_response(RELAY, response, (S, 0xABC), 0.1)
    assert [type(e) for e in client.poll_effects()] == [SendVia]
    client.handle_via(CallMeMaybeVia(ENDPOINT), (S, 0xABC), 0.1)
    assert not client.is_busy


def test_everything_is_bounded() -> None:
    """Invitations to a thousand servers make eight handshakes, Pings of the peer ten of ours."""
    client = PeerRelayClient(A, B, random.Random(1).randbytes)
    for number in range(1, 1001):
        server = DiscoPublic(number.to_bytes(32, "big"))
        client.handle_via(CallMeMaybeVia(replace(ENDPOINT, server_key=server)), None, 0.0)
    assert len(client.servers()) == 8
    client = begin()
    bind = client.poll_effects()[0].message
    path = Path(FAST, 0xABC)
    client.handle_challenge(S, path, Challenge(0xABC, bind.generation, B, b"c" * 32), 0.0)
    for _ in range(100):
        client.handle_ping(path, 0.1)
    assert sum(isinstance(e, SendRelayedPing) for e in client.poll_effects()) == 10
    client.on_time(30.0)
    assert not client.is_busy


def test_other_pairs_are_refused() -> None:
    """An endpoint for other clients than us two is none of our business."""
    client = PeerRelayClient(A, B, random.Random(1).randbytes)
    foreign = replace(ENDPOINT, clients=sorted_pair(A, S))
    client.handle_via(CallMeMaybeVia(foreign), None, 0.0)
    client.discover([RELAY], None, 0.0)
    (sent,) = client.poll_effects()
    client.handle_response(RELAY, AllocateResponse(sent.request.generation, foreign), None, 0.0)
    client.handle_response(RELAY, AllocateResponse(99, ENDPOINT), None, 0.0)
    assert client.poll_effects() == []


def test_invitations_are_paced():
    """A peer that invites us all the time, to one server or to many, does not have us send Binds
    to others without end."""
    client = PeerRelayClient(A, B, random.Random(1).randbytes)
    binds = 0
    for i in range(2000):
        now = i / 100
        server = DiscoPublic(bytes([1 + i % 4]) * 32)
        endpoint = replace(
            ENDPOINT, server_key=server, lamport_id=i + 1, bind_lifetime_nanoseconds=i % 2
        )
        client.handle_via(CallMeMaybeVia(endpoint), None, now)
        binds += sum(isinstance(effect, SendControl) for effect in client.poll_effects())
        client.on_time(now)
    invitations = INVITATIONS_BURST + 20 * INVITATIONS_PER_SECOND
    assert 0 < binds <= invitations * len(ENDPOINT.addresses)
