"""ICE agents in conversation: over a seeded lossy network, behind NATs, in virtual time."""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from traversal.paths.candidates import LocalNetworks
from traversal.paths.effects import AddressForgotten, AddressLearned
from traversal.paths.ice import (
    MAX_EARLY_CHECKS,
    PACE_SECONDS,
    PATIENCE_SECONDS,
    IceAgent,
)
from traversal.paths.ice_checks import MAX_PAIRS, MAX_PEER_REFLEXIVE
from traversal.paths.ice_effects import (
    CheckEnded,
    CheckStarted,
    IceError,
    IceState,
    IceStateChanged,
    SendStun,
)
from traversal.wire.address import Address
from traversal.wire.ice_check import (
    CheckRequest,
    encode_check_request,
    encode_check_response,
    parse_check_request,
)
from traversal.wire.ice_description import (
    IceCandidate,
    IceCandidateType,
    IceDescription,
    make_candidate,
)
from traversal.wire.stun import StunError, TransactionId

HOST, REFLEXIVE = IceCandidateType.HOST, IceCandidateType.SERVER_REFLEXIVE
A, B, C = Address("192.0.2.1", 1000), Address("192.0.2.2", 2000), Address("192.0.2.3", 3000)


def host(address: Address, preference: int = 65535) -> IceCandidate:
    return make_candidate(HOST, address, address, preference)


def reflexive(address: Address, base: Address) -> IceCandidate:
    return make_candidate(REFLEXIVE, address, base, 65535)


@dataclass
class Nat:
    """Maps one inside address to `public`; lets in only who was sent to."""

    inside: Address
    public: Address
    contacted: set[Address] = field(default_factory=set)


class Network:
    """Agents at addresses, joined by a network with delay, loss and NATs."""

    def __init__(self, seed: int = 0, *, loss: float = 0.0, delay: float = 0.02) -> None:
        self.rng = random.Random(seed)
        self.loss, self.delay = loss, delay
        self.now = 0.0
        self.agents: dict[Address, IceAgent] = {}
        self.nats: list[Nat] = []
        self.dead: set[Address] = set()
        self.sent: list[tuple[float, Address, Address, bytes]] = []
        self.learned: dict[IceAgent, set[Address]] = {}
        self.waited_for: dict[IceAgent, set[bytes]] = {}
        self.states: dict[IceAgent, list[IceState]] = {}
        self.reasons: list[str] = []
        self._wire: list[tuple[float, int, Address, Address, bytes]] = []
        self._numbers = itertools.count()

    def agent(self, address: Address, *candidates: IceCandidate, is_controlling: bool) -> IceAgent:
        agent = IceAgent(
            self.rng.randbytes,
            candidates or (host(address),),
            LocalNetworks(),
            is_controlling=is_controlling,
        )
        self.agents[address] = agent
        return agent

    def move(self, agent: IceAgent, to: Address) -> None:
        self.agents = {at: a for at, a in self.agents.items() if a is not agent}
        self.agents[to] = agent

    def run(self, seconds: float, until: Callable[[], bool] = lambda: False) -> None:
        end = self.now + seconds
        steps = 0
        while not until():
            for address, agent in list(self.agents.items()):
                self._carry_out(agent, address)
            due = min((agent.next_deadline() for agent in self.agents.values()), default=math.inf)
            if self._wire:
                due = min(due, self._wire[0][0])
            if due > end:
                self.now = end
                return
            steps = steps + 1 if due <= self.now else 0
            assert steps < 100, "an agent is busy without end"
            self.now = max(self.now, due)
            while self._wire and self._wire[0][0] <= self.now:
                _, _, source, to, data = heapq.heappop(self._wire)
                if to in self.agents:
                    self.agents[to].handle_stun(data, source, self.now)
                    self._carry_out(self.agents[to], to)
            for agent in self.agents.values():
                if agent.next_deadline() <= self.now:
                    agent.on_time(self.now)

    def _carry_out(self, agent: IceAgent, address: Address) -> None:
        for effect in agent.poll_effects():
            match effect:
                case SendStun():
                    self.send(effect.datagram, address, effect.address)
                case CheckStarted():
                    self.waited_for.setdefault(agent, set()).add(effect.transaction_id)
                case CheckEnded():
                    self.waited_for[agent].remove(effect.transaction_id)
                case AddressLearned():
                    self.learned.setdefault(agent, set()).add(effect.address)
                case AddressForgotten():
                    self.learned[agent].remove(effect.address)
                case IceStateChanged():
                    self.states.setdefault(agent, []).append(effect.state)
                    self.reasons.append(effect.reason)

    def send(self, data: bytes, source: Address, to: Address) -> None:
        self.sent.append((self.now, source, to, data))
        for nat in self.nats:
            if nat.inside == source:
                nat.contacted.add(to)
                source = nat.public
        for nat in self.nats:
            if nat.public == to:
                if source not in nat.contacted:
                    return
                to = nat.inside
            elif nat.inside == to:
                return
        if to in self.dead or self.rng.random() < self.loss:
            return
        at = self.now + self.delay * self.rng.uniform(0.9, 1.1)
        heapq.heappush(self._wire, (at, next(self._numbers), source, to, data))


def introduce(network: Network, a: IceAgent, b: IceAgent) -> None:
    a.set_remote(b.description, network.now)
    b.set_remote(a.description, network.now)


def are_connected(*agents: IceAgent) -> Callable[[], bool]:
    return lambda: all(agent.state is IceState.CONNECTED for agent in agents)


def connected_pair(network: Network) -> tuple[IceAgent, IceAgent]:
    a = network.agent(A, is_controlling=True)
    b = network.agent(B, is_controlling=False)
    introduce(network, a, b)
    network.run(1, until=are_connected(a, b))
    assert are_connected(a, b)()
    return a, b


class TestConversation:
    def test_two_agents_connect_in_two_round_trips(self) -> None:
        """A check each way and a nomination: no more than that on a plain network."""
        network = Network()
        a, b = connected_pair(network)
        assert network.now < 2 * 2 * 0.022 + 2 * PACE_SECONDS
        assert (a.selected_address, b.selected_address) == (B, A)
        assert network.learned == {a: {B}, b: {A}}
        assert a.selected is not None
        assert a.selected.mapped_address == A
        assert a.selected.latency_seconds == pytest.approx(0.04, rel=0.1)

    @pytest.mark.parametrize("seed", range(20))
    def test_loss_of_a_third_is_survived(self, seed: int) -> None:
        """Checks are repeated, and both sides agree in the end."""
        network = Network(seed, loss=0.33)
        a = network.agent(A, is_controlling=True)
        b = network.agent(B, is_controlling=False)
        introduce(network, a, b)
        network.run(35, until=are_connected(a, b))
        assert (a.selected_address, b.selected_address) == (B, A)

    def test_both_behind_nats(self) -> None:
        """Each side's checks open its own NAT for the other's: hole punching."""
        network = Network()
        public_a, public_b = Address("198.51.100.1", 7000), Address("198.51.100.2", 8000)
        inside_a, inside_b = Address("10.0.0.1", 1000), Address("10.0.0.1", 2000)
        network.nats = [Nat(inside_a, public_a), Nat(inside_b, public_b)]
        a = network.agent(
            inside_a, host(inside_a), reflexive(public_a, inside_a), is_controlling=True
        )
        b = network.agent(
            inside_b, host(inside_b), reflexive(public_b, inside_b), is_controlling=False
        )
        introduce(network, a, b)
        network.run(2, until=are_connected(a, b))
        assert (a.selected_address, b.selected_address) == (public_b, public_a)
        assert a.selected is not None
        assert a.selected.type is REFLEXIVE
        assert a.selected.mapped_address == public_a

    def test_a_peer_that_described_no_candidate(self) -> None:
        """Its checks tell where it is: a peer-reflexive candidate is as good as another."""
        network = Network()
        a = network.agent(A, is_controlling=True)
        b = network.agent(B, is_controlling=False)
        b.set_remote(a.description, 0.0)
        network.run(1)
        a.set_remote(IceDescription(b.description.ufrag, b.description.password), network.now)
        network.run(2, until=are_connected(a, b))
        assert a.selected is not None
        assert a.selected.type is IceCandidateType.PEER_REFLEXIVE
        assert a.selected_address == B

    def test_a_signalled_candidate_names_a_peer_reflexive_one(self) -> None:
        """RFC 8838: a candidate that arrives later explains the address seen before."""
        network = Network()
        a = network.agent(A, is_controlling=False)
        b = network.agent(B, is_controlling=True)
        a.set_remote(IceDescription(b.description.ufrag, b.description.password), 0.0)
        b.set_remote(a.description, 0.0)
        network.run(1, until=lambda: B in network.learned.get(a, ()))
        a.add_remote_candidates(b.description.candidates, network.now)
        network.run(1, until=are_connected(a, b))
        assert a.selected is not None
        assert a.selected.type is HOST

    def test_the_better_pair_wins(self) -> None:
        """Of two addresses that work, both agents use the one of higher priority."""
        network = Network()
        a = network.agent(A, is_controlling=True)
        b = network.agent(B, host(B), reflexive(C, B), is_controlling=False)
        network.agents[C] = b
        introduce(network, a, b)
        network.run(2, until=are_connected(a, b))
        assert a.selected_address == B

    def test_an_unreachable_better_address_costs_a_moment(self) -> None:
        """A dead address of higher priority holds the nomination up for 0.2 s, not for 39 s."""
        network = Network()
        dead = Address("192.0.2.99", 9)
        a = network.agent(A, is_controlling=True)
        b = network.agent(B, host(dead), reflexive(B, dead), is_controlling=False)
        introduce(network, a, b)
        network.run(5, until=are_connected(a, b))
        assert a.selected_address == B
        assert network.now < 0.5

    @pytest.mark.parametrize("is_controlling", [True, False])
    @pytest.mark.parametrize("seed", range(4))
    def test_role_conflict(self, seed: int, is_controlling: bool) -> None:
        """Two agents of one role settle it by their tie-breakers (RFC 8445 7.3.1.1)."""
        network = Network(seed)
        a = network.agent(A, is_controlling=is_controlling)
        b = network.agent(B, is_controlling=is_controlling)
        introduce(network, a, b)
        network.run(5, until=are_connected(a, b))
        assert (a.selected_address, b.selected_address) == (B, A)
        assert a.is_controlling is not b.is_controlling

    def test_a_lite_peer_is_controlled(self) -> None:
        """RFC 8445 6.1.1: the full agent controls a lite one, whatever role it was given."""
        network = Network()
        a = network.agent(A, is_controlling=False)
        a.set_remote(IceDescription("lite", "p" * 22, (host(B),), is_lite=True), 0.0)
        assert a.is_controlling


class TestFailure:
    def test_nobody_answers(self) -> None:
        """After 39.5 s the session fails and says why; nothing is left behind."""
        network = Network()
        a = network.agent(A, is_controlling=True)
        a.set_remote(IceDescription("none", "p" * 22, (host(B),)), 0.0)
        network.run(100)
        assert network.states[a] == [IceState.CHECKING, IceState.FAILED]
        assert "none of the peer's 1 addresses answered" in network.reasons[-1]
        assert len(network.sent) == 7
        assert network.sent[-1][0] < PATIENCE_SECONDS
        assert network.waited_for[a] == set()
        assert a.next_deadline() == math.inf

    def test_no_usable_candidate(self) -> None:
        """The reason tells a peer without addresses from a silent one."""
        network = Network()
        a = network.agent(A, is_controlling=True)
        a.set_remote(IceDescription("none", "p" * 22, (host(Address("224.0.0.1", 5)),)), 0.0)
        network.run(100)
        assert "no address that can be reached" in network.reasons[-1]
        assert network.sent == []

    def test_consent_expires(self) -> None:
        """A peer that went silent gets nothing any more after 30 s (RFC 7675)."""
        network = Network()
        a, b = connected_pair(network)
        network.run(60)
        assert a.state is IceState.CONNECTED
        del network.agents[B]
        silent_since = network.now
        network.run(120)
        assert a.state is IceState.FAILED
        assert a.selected_address is None
        assert silent_since + 24 < network.sent[-1][0] < silent_since + 36
        assert network.learned[a] == set()
        assert b.state is IceState.CONNECTED

    def test_consent_costs_little(self) -> None:
        """Idle sessions exchange one check each way every 4 to 6 s."""
        network = Network()
        connected_pair(network)
        before = len(network.sent)
        network.run(600)
        assert 4 * 600 / 6 <= len(network.sent) - before <= 4 * 600 / 4

    def test_second_description(self) -> None:
        """A session takes one peer."""
        network = Network()
        a, b = connected_pair(network)
        with pytest.raises(IceError, match="open a new one"):
            a.set_remote(b.description, network.now)

    def test_closing_forgets_everything(self) -> None:
        """A closed agent has no deadline, no address and no answer for anybody."""
        network = Network()
        a, b = connected_pair(network)
        a.close()
        a.close()
        network.run(0)
        assert network.learned[a] == set()
        assert network.waited_for[a] == set()
        assert a.next_deadline() == math.inf
        before = len(network.sent)
        network.run(10)
        assert all(source == B for _, source, _, _ in network.sent[before:])
        assert b.state is IceState.CONNECTED


class TestRoaming:
    @pytest.mark.parametrize("controlling_moves", [True, False])
    def test_a_peer_that_moves_is_followed(self, controlling_moves: bool) -> None:
        """After a rebind both ends use the new address within two seconds."""
        network = Network()
        a, b = connected_pair(network)
        network.run(20)
        mover, other = (a, b) if controlling_moves else (b, a)
        network.move(mover, C)
        mover.handle_rebind(network.now)
        network.run(2)
        assert other.selected_address == C
        network.run(120)
        assert are_connected(a, b)()

    @pytest.mark.parametrize("seed", range(4))
    def test_a_dead_path_is_left_for_another(self, seed: int) -> None:
        """The peer's first uplink dies and nobody says so: within 8 s the other one is used."""
        network = Network(seed)
        a = network.agent(A, is_controlling=True)
        b = network.agent(B, host(B), reflexive(C, B), is_controlling=False)
        network.agents[C] = b
        introduce(network, a, b)
        network.run(60)
        assert a.selected_address == B
        network.move(b, C)
        network.run(8)
        assert a.selected_address == C
        network.run(120)
        assert are_connected(a, b)()

    def test_rebind_while_searching(self) -> None:
        """All addresses are checked again from the new socket."""
        network = Network()
        a = network.agent(A, is_controlling=True)
        b = network.agent(B, is_controlling=False)
        network.dead.add(B)
        introduce(network, a, b)
        network.run(3)
        network.dead.clear()
        a.handle_rebind(network.now)
        network.run(0.5)
        assert are_connected(a, b)()


class TestHostility:
    def test_strangers_get_no_answer_and_cost_no_state(self) -> None:
        """Requests with a wrong password, a wrong user name or no fingerprint vanish."""
        network = Network()
        a, b = connected_pair(network)
        network.run(0)
        before = len(network.sent)
        names = (a.description.ufrag, b.description.ufrag)
        forged = check(f"{names[0]}:{names[1]}", "wrong" * 5)
        foreign = check(f"{names[0]}:XXXX", a.description.password)
        unsealed = check(f"{names[0]}:{names[1]}", a.description.password)[:-8]
        for datagram in (forged, foreign, unsealed, forged[:50]):
            a.handle_stun(datagram, C, network.now)
        assert a.rejected == 4
        assert a.poll_effects() == []
        assert len(network.sent) == before

    def test_no_answer_is_longer_than_its_question(self) -> None:
        """Whatever is asked, nobody can be flooded with our answers."""
        network = Network(1)
        a = network.agent(A, is_controlling=True)
        for is_controlling, ufrag in itertools.product((True, False), ("XXXX", "Y" * 200)):
            datagram = check(
                f"{a.description.ufrag}:{ufrag}",
                a.description.password,
                is_controlling=is_controlling,
                tie_breaker=0,
            )
            a.handle_stun(datagram, Address("2001:db8::1", 5), 0.0)
            (answer,) = a.poll_effects()
            assert isinstance(answer, SendStun)
            assert len(answer.datagram) <= len(datagram)

    def test_early_checks_are_bounded(self) -> None:
        """Before our peer is known, a few sources are remembered, and nothing is sent to them
        but answers."""
        network = Network()
        a = network.agent(A, is_controlling=False)
        name = f"{a.description.ufrag}:peer"
        for port in range(1, 200):
            a.handle_stun(check(name, a.description.password), Address("192.0.2.9", port), 0.0)
        assert len(a.poll_effects()) == 199
        a.set_remote(IceDescription("peer", "p" * 22), 0.0)
        sources = [e.address for e in a.poll_effects() if isinstance(e, AddressLearned)]
        assert len(sources) == MAX_EARLY_CHECKS

    def test_a_peer_that_checks_from_everywhere(self) -> None:
        """It makes us remember a few addresses and send at most 20 checks a second."""
        network = Network()
        a = network.agent(A, is_controlling=True)
        a.set_remote(IceDescription("peer", "p" * 22), 0.0)
        name = f"{a.description.ufrag}:peer"
        for port in range(1, 2000):
            datagram = check(name, a.description.password, is_controlling=False)
            network.now = port / 1000
            a.handle_stun(datagram, Address("192.0.2.9", port), network.now)
            network.run(0.0005)
        assert len(network.learned[a]) <= MAX_PEER_REFLEXIVE
        assert len(network.waited_for[a]) <= MAX_PEER_REFLEXIVE
        fresh = [data for _, _, _, data in network.sent if data[:2] == b"\0\x01"]
        assert len({data[8:20] for data in fresh}) <= 2 / PACE_SECONDS + 1

    def test_a_description_of_a_thousand_addresses(self) -> None:
        """At most a hundred of them are tried."""
        network = Network()
        a = network.agent(A, is_controlling=True)
        candidates = [host(Address("192.0.2.9", port)) for port in range(1, 1000)]
        a.set_remote(IceDescription("peer", "p" * 22, tuple(candidates)), 0.0)
        network.run(30)
        assert len({to for _, _, to, _ in network.sent}) == MAX_PAIRS

    def test_an_answer_from_elsewhere_does_not_count(self) -> None:
        """RFC 8445 7.2.5.2.1: a path must be the same both ways."""
        network = Network()
        a = network.agent(A, is_controlling=True)
        a.set_remote(IceDescription("peer", "p" * 22, (host(B),)), 0.0)
        network.run(0.01)
        request = parse_check_request(network.sent[0][3], "p" * 22)
        answer = encode_check_response(request.transaction_id, A, "p" * 22)
        a.handle_stun(answer, C, network.now)
        network.run(1)
        assert a.selected_address is None
        assert network.learned.get(a, set()) == set()

    @settings(max_examples=200, deadline=None)
    @given(st.data())
    def test_any_bytes_are_survived(self, data: st.DataObject) -> None:
        """Mutants of honest messages, in any order, do no harm; the real peer still connects."""
        network = Network()
        a = network.agent(A, is_controlling=True)
        b = network.agent(B, is_controlling=False)
        introduce(network, a, b)
        network.run(0.03)
        honest = [datagram for _, _, _, datagram in network.sent]
        for _ in range(data.draw(st.integers(1, 5))):
            mutant = bytearray(data.draw(st.sampled_from(honest)))
            for _ in range(data.draw(st.integers(0, 3))):
                mutant[data.draw(st.integers(0, len(mutant) - 1))] = data.draw(st.integers(0, 255))
            end = data.draw(st.integers(0, len(mutant)))
            for agent in (a, b):
                agent.handle_stun(bytes(mutant[:end]), B if agent is a else A, network.now)
        network.run(3, until=are_connected(a, b))
        assert are_connected(a, b)()


def check(
    username: str, password: str, *, is_controlling: bool = True, tie_breaker: int = 5
) -> bytes:
    request = CheckRequest(
        transaction_id=TransactionId(bytes(12)),
        username=username,
        priority=1,
        is_controlling=is_controlling,
        tie_breaker=tie_breaker,
    )
    return encode_check_request(request, password)


def test_parsing_refuses_what_is_not_a_check() -> None:
    """One error type, whatever the bytes."""
    with pytest.raises(StunError):
        parse_check_request(bytes(2000), "p" * 22)
