"""Port searches between two nodes behind modeled NATs: how often, how fast, at what cost."""

from __future__ import annotations

import statistics
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from netlab.behavior import Unsolicited
from tests.traversal.paths.punch_arena import (
    BLOCKS,
    CELLS,
    EASY,
    EASY_ADF,
    OPEN,
    PRESERVING,
    RANDOM,
    SEQUENTIAL,
    Arena,
)
from traversal.paths.effects import PathState, SendCallMeMaybe
from traversal.paths.port_guess import (
    ALL_PORTS,
    guesses,
    hit_probability,
    likely_ranges,
    predicted_range,
    sockets_for,
)
from traversal.paths.punch_channel import PunchChannel
from traversal.paths.punch_effects import (
    AdoptSocket,
    CloseSockets,
    MapPort,
    OpenSockets,
    SearchEnded,
    SendProbe,
    SendPunchMessage,
)
from traversal.paths.punch_facts import Strategy
from traversal.paths.punch_memory import MAX_RECORDS, PunchMemory
from traversal.paths.punch_strategy import (
    PLAIN_PATIENCE_SECONDS,
    OwnSide,
    PeerSide,
    PunchPolicy,
    choose,
    looks_easy,
)
from traversal.paths.punching import Puncher
from traversal.paths.report import NatFacts, PortPattern
from traversal.paths.report import PortAllocation as Ports
from traversal.paths.verdict import Finding, Remedy, judge
from traversal.wire.address import Address
from traversal.wire.introduction import FilteringClass as F
from traversal.wire.introduction import MappingClass as M
from traversal.wire.punching import PunchKind, PunchMethod

SEEDS = 8
PLAIN_PAIRS = [(EASY, EASY), (RANDOM, EASY_ADF), (RANDOM, OPEN), (OPEN, EASY)]


def cell(name):
    return next(c for c in CELLS if c.name.startswith(name))


class TestRates:
    """The goals, with few seeds; the benchmark has more."""

    @pytest.mark.parametrize("row", CELLS, ids=lambda row: row.name)
    def test_pair(self, row) -> None:
        """Every seed leads to a direct path, half of them within the goal's median."""
        times = [row.play(seed)[1] for seed in range(SEEDS)]
        assert None not in times
        assert statistics.median(times) <= (5.0 if row.stock_b else 3.0)

    @pytest.mark.parametrize(("a", "b"), PLAIN_PAIRS)
    def test_plain_pairs_are_left_alone(self, a, b) -> None:
        """Where plain punching works, nothing is opened or guessed, and it takes no longer."""
        with_search = Arena(a, b)
        without = Arena(a, b, policy=PunchPolicy(is_enabled=False))
        for arena in (with_search, without):
            arena.a.talk()
            arena.b.talk()
        assert with_search.until_direct() == without.until_direct()
        for node in (with_search.a, with_search.b):
            assert node.count(OpenSockets) == node.count(SendProbe) == 0

    @pytest.mark.parametrize(
        ("a", "b"),
        [(RANDOM, RANDOM), (RANDOM, SEQUENTIAL), (SEQUENTIAL, RANDOM), (RANDOM, PRESERVING)],
    )
    @pytest.mark.parametrize("talkers", ["a", "ab"])
    def test_two_hard_nats_stay_on_the_relay(self, a, b, talkers) -> None:
        """The decision is made within a second and costs nothing but a question."""
        arena = Arena(a, b)
        for name in talkers:
            getattr(arena, name).talk()
        arena.run(1.0)
        facts = arena.a.puncher.facts
        assert facts.strategy is Strategy.RELAY
        assert "both NATs are hard" in facts.reason
        arena.run(30.0)
        for node in (arena.a, arena.b):
            assert node.count(OpenSockets) == node.count(SendProbe) == 0
            assert node.count(SendPunchMessage) <= 3
            assert node.packets < 100

    def test_block_with_few_ports_left(self) -> None:
        """A carrier that refuses most of our mappings still lets enough sockets through."""
        behavior = replace(BLOCKS, max_mappings_per_host=40)
        times = []
        for seed in range(SEEDS):
            arena = Arena(behavior, EASY, seed=seed)
            arena.a.talk()
            times.append(arena.until_direct())
        assert None not in times

    def test_wrong_prediction_becomes_a_birthday_search(self) -> None:
        """A NAT that was sequential and turned random is found all the same, and remembered."""
        arena = Arena(RANDOM, EASY)
        nat = replace(arena.a.facts.nat, ports=Ports(PortPattern.SEQUENTIAL, 1))
        arena.a.facts = replace(arena.a.facts, nat=nat)
        arena.introduce()
        arena.a.talk()
        assert arena.until_direct() is not None
        assert arena.a.puncher.facts.strategy is Strategy.BIRTHDAY_HARD
        record = arena.a.memory.recall("home", b"a")
        assert record.worked is Strategy.BIRTHDAY_HARD

    @pytest.mark.parametrize("a", [RANDOM, SEQUENTIAL])
    @pytest.mark.parametrize("stock_b", [False, True])
    def test_router_that_takes_in_strangers(self, a, stock_b) -> None:
        """An early Ping that occupies its flow at such a router does not spoil the search."""
        exposed = replace(EASY, unsolicited=Unsolicited.ACCEPT)
        found = 0
        for seed in range(SEEDS):
            arena = Arena(a, exposed, seed=seed, stock_b=stock_b)
            arena.a.talk()
            found += arena.until_direct() is not None
        assert found >= SEEDS - 1

    @pytest.mark.parametrize("row", ["random x port-restricted, b", "sequential x sequential, 20"])
    @pytest.mark.parametrize("options", [{"delay": 0.15, "relay_delay": 0.2}, {"loss": 0.2}])
    def test_bad_networks(self, row, options) -> None:
        """Far peers and a fifth of all packets lost cost time, not success."""
        pair = cell(row)
        for seed in range(SEEDS):
            arena = Arena(pair.a, pair.b, seed=seed, background=pair.background, **options)
            arena.a.talk()
            arena.b.talk()
            assert arena.until_direct() is not None

    def test_moved_peer(self) -> None:
        """The hard side aims where its peer says it is, not where it was introduced."""
        arena = Arena(RANDOM, EASY)
        stale = replace(arena.b.facts, addresses=(Address("203.0.113.2", 9),))
        side = PeerSide(stale.nat, stale.addresses, arena.b.session, can_search=True)
        arena.a.puncher.set_peer_side(side, 0.0)
        arena.a.peer.set_configured_addresses((), 0.0)
        arena.a.talk()
        arena.b.talk()
        assert arena.until_direct() is not None


def lying(seed=0, **options):
    """A pair that both believe to be hard and easy, while both are hard: a search in vain."""
    arena = Arena(RANDOM, RANDOM, seed=seed, knows=False, **options)
    easy = NatFacts(M.ENDPOINT_INDEPENDENT, F.ADDRESS_AND_PORT_DEPENDENT)
    arena.b.facts = replace(arena.b.facts, nat=easy)
    arena.introduce()
    return arena


class TestBudgets:
    """What a search may cost, above all one in vain."""

    def test_search_in_vain(self) -> None:
        """At most 256 sockets, 2500 probes, 500 packets a second; everything is closed soon."""
        arena = lying()
        arena.a.talk()
        arena.run(25.0)
        ended = [(t, e) for t, e in arena.a.effects if isinstance(e, SearchEnded)]
        assert [e.has_succeeded for _, e in ended] == [False]
        assert ended[0][0] < 12
        assert arena.a.peak_sockets == 256
        assert list(arena.a.ports) == list(arena.b.ports) == [None]
        for node in (arena.a, arena.b):
            assert node.count(SendProbe) <= 2500
            for start in range(25):
                assert sum(start <= t < start + 1 for t in node.sent_at) <= 500 + 32 + 60
        assert arena.b.puncher.facts.probes == 2500
        facts = arena.a.puncher.facts
        assert facts.failure is not None
        assert facts.sockets == 256
        assert facts.next_attempt_at == pytest.approx(ended[0][0] + 60)

    def test_pauses_grow(self) -> None:
        """Attempts in vain are a minute apart, then two, then four."""
        arena = lying()
        arena.a.talk(every=1.0)
        arena.b.talk(every=1.0)
        arena.run(520.0)
        ended = [t for t, e in arena.a.effects if isinstance(e, SearchEnded)]
        gaps = [after - before for before, after in pairwise(ended)]
        assert 3 <= len(ended) <= 4
        assert gaps[0] > 30
        assert all(after > before * 1.5 for before, after in pairwise(gaps))

    def test_switched_off(self) -> None:
        """Nobody opens or probes anything when the owner forbids it; the peer is told."""
        for node in "ab":
            arena = Arena(RANDOM, EASY)
            getattr(arena, node).puncher.set_policy(PunchPolicy(is_enabled=False), 0.0)
            arena.a.talk()
            arena.b.talk()
            arena.run(20.0)
            assert not arena.is_direct
            assert getattr(arena, node).count(SendProbe) == 0
            assert getattr(arena, node).puncher.facts.is_forbidden
            assert list(arena.a.ports) == [None]

    def test_switched_off_in_the_middle(self) -> None:
        """A running search ends at once, and its sockets are closed."""
        arena = lying()
        arena.a.talk()
        arena.run(0.5)
        assert len(arena.a.ports) == 257
        arena.a.puncher.set_policy(PunchPolicy(is_enabled=False), arena.now)
        arena.a.flush()
        assert list(arena.a.ports) == [None]
        arena.run(1.0)
        probes = arena.b.count(SendProbe)
        arena.run(5.0)
        assert arena.b.count(SendProbe) == probes

    def test_smaller_budgets(self) -> None:
        """A policy lowers both budgets."""
        arena = lying(policy=PunchPolicy(max_sockets=20, max_probes=100))
        arena.a.talk()
        arena.run(20.0)
        assert arena.a.peak_sockets == 20
        assert arena.a.count(SendProbe) <= 100
        assert arena.b.count(SendProbe) == 100

    def test_no_sockets_left(self) -> None:
        """A system without descriptors fails the attempt, with the reason."""
        arena = Arena(RANDOM, EASY, knows=False)
        puncher = arena.a.puncher
        puncher.set_own_side(arena.a.facts, 0.0)
        nat = NatFacts(M.ENDPOINT_INDEPENDENT, F.ADDRESS_AND_PORT_DEPENDENT)
        side = PeerSide(nat, arena.b.facts.listed, arena.b.session, can_search=True)
        puncher.set_peer_side(side, 0.0)
        puncher.handle_route(is_wanted=True, is_direct=False, now=0.0)
        (opened,) = [e for e in puncher.poll_effects() if isinstance(e, OpenSockets)]
        puncher.handle_opened(opened.batch, (), 0.1)
        assert "open files" in puncher.facts.failure


class TestStockPeer:
    """Rules S1 to S8 of path selection specification 21."""

    def test_calls(self) -> None:
        """At most 8 calls of 256 guesses, 2 s apart, of our own IP, then a clean one; and a
        pause of an hour."""
        arena = Arena(RANDOM, RANDOM, stock_b=True)
        reflexive = arena.b.facts.addresses[0]
        side = PeerSide(addresses=(reflexive,))
        arena.a.puncher.set_peer_side(side, 0.0)
        arena.a.talk(every=0.5)
        arena.run(60.0)
        calls = [
            (t, e.addresses) for t, e in arena.a.effects
            if isinstance(e, SendCallMeMaybe) and len(e.addresses) > 10
        ]  # fmt: skip
        assert len(calls) == 8
        normal = arena.a.facts.listed
        guessed = [a for _, addresses in calls for a in addresses if a not in normal]
        assert {a.host for a in guessed} == {"198.51.100.1"}
        assert len(set(guessed)) == len(guessed) == 8 * 256
        assert all(set(normal) <= set(addresses) for _, addresses in calls)
        assert all(after - before >= 2 for (before, _), (after, _) in pairwise(calls))
        clean = [
            t
            for t, e in arena.a.effects
            if isinstance(e, SendCallMeMaybe) and e.addresses == normal
        ]
        ended = [t for t, e in arena.a.effects if isinstance(e, SearchEnded)]
        assert ended[0] in clean
        assert arena.a.puncher.facts.next_attempt_at == pytest.approx(ended[0] + 3600)
        assert arena.a.puncher.facts.calls == 8

    def test_path_lasts(self) -> None:
        """After success the guesses are gone, and later calls keep the winner."""
        arena = Arena(RANDOM, EASY, stock_b=True)
        arena.a.talk()
        arena.b.talk()
        assert arena.until_direct() is not None
        (adopted,) = [e for _, e in arena.a.effects if isinstance(e, AdoptSocket)]
        arena.run(arena.now + 60.0)
        assert arena.a.peer.state is arena.b.peer.state is PathState.DIRECT
        assert len(arena.b.peer.called) <= 3
        assert adopted.own_address in arena.b.peer.called
        assert arena.b.peer.best == adopted.own_address
        assert arena.a.puncher.facts.attempts == 1

    def test_can_be_forbidden(self) -> None:
        """Peers that did not agree to probe are left alone if the owner says so."""
        arena = Arena(RANDOM, EASY, stock_b=True, policy=PunchPolicy(allows_stock=False))
        arena.a.talk()
        arena.run(20.0)
        assert arena.a.count(OpenSockets) == 0
        assert arena.a.puncher.facts.is_forbidden

    def test_remembered(self) -> None:
        """In the same network the search that worked begins without patience."""
        arena = Arena(RANDOM, EASY, stock_b=True)
        arena.a.talk()
        assert arena.until_direct() is not None
        own = arena.a.facts
        arena.a.puncher.close(arena.now)
        later = Puncher(
            lambda n: bytes(n), b"session2", b"a", arena.a.memory, PunchPolicy(allows_stock=True)
        )
        now = arena.now + 1000.0
        later.set_own_side(own, now)
        later.set_peer_side(PeerSide(addresses=arena.b.facts.addresses), now)
        later.handle_route(is_wanted=True, is_direct=False, now=now)
        assert any(isinstance(e, OpenSockets) for e in later.poll_effects())


class TestFoundSocket:
    """The winning socket's life."""

    def test_outlives_silence(self) -> None:
        """Ten minutes without traffic, then the path is used again without another search."""
        arena = Arena(RANDOM, EASY)
        arena.a.talk(until=5.0)
        arena.b.talk(until=5.0)
        assert arena.until_direct() is not None
        arena.run(600.0)
        arena.a.talk()
        arena.run(603.0)
        assert arena.a.peer.state is PathState.DIRECT
        assert arena.a.puncher.facts.attempts == 1

    def test_given_up_after_half_an_hour(self) -> None:
        """A socket that nobody uses is closed."""
        arena = Arena(RANDOM, EASY)
        arena.a.talk(until=5.0)
        assert arena.until_direct() is not None
        arena.run(2400.0)
        assert list(arena.a.ports) == [None]
        assert arena.a.puncher.own_extra == ()

    def test_measured_lifetime_sets_the_pace(self) -> None:
        """A NAT that forgets after 10 s is pinged twice in that time."""
        behavior = replace(RANDOM, lifetimes=replace(RANDOM.lifetimes, udp_seconds=10.0,
                                                     udp_unreplied_seconds=10.0))  # fmt: skip
        arena = Arena(behavior, EASY, knows=False)
        arena.a.facts = replace(arena.a.facts, lifetime_seconds=10.0)
        arena.introduce()
        arena.a.talk(until=2.0)
        assert arena.until_direct() is not None
        arena.run(300.0)
        arena.a.talk()
        arena.run(302.0)
        assert arena.a.peer.state is PathState.DIRECT
        assert arena.a.puncher.facts.attempts == 1

    def test_reboot_of_a_nat(self) -> None:
        """When the mapping dies the search starts over and finds another."""
        arena = Arena(RANDOM, EASY)
        arena.a.talk()
        arena.b.talk()
        assert arena.until_direct() is not None
        arena.run(20.0)
        arena.a.nat.reboot(arena.now)
        arena.run(40.0)
        assert arena.a.peer.state is PathState.DIRECT
        assert arena.a.puncher.facts.attempts == 2
        assert len(arena.a.ports) == 2

    def test_other_network(self) -> None:
        """In another network the socket is closed and everything starts afresh."""
        arena = Arena(RANDOM, EASY)
        arena.a.talk()
        assert arena.until_direct() is not None
        puncher = arena.a.puncher
        puncher.set_own_side(replace(arena.a.facts, fingerprint="cafe"), arena.now)
        assert any(isinstance(e, CloseSockets) for e in puncher.poll_effects())
        assert puncher.own_extra == ()


class TestUntrustedPlans:
    """What an introduced peer can make us do."""

    def plan(self, arena, **changes):
        channel = PunchChannel(arena.b.session)
        channel.set_peer(PeerSide(session=arena.a.session, can_search=True))
        message = channel.tell(7, PunchKind.PLAN, PunchMethod.BIRTHDAY, ranges=((1024, 65535),),
                               source=Address("203.0.113.2", 0)).message  # fmt: skip
        arena.a.puncher.handle_message(replace(message, **changes), arena.now)
        arena.a.flush()

    @pytest.mark.parametrize("host", ["10.0.0.1", "127.0.0.1", "100.64.0.1", "fe80::1"])
    def test_private_targets(self, host) -> None:
        """Nothing is sent to where only we can reach."""
        arena = Arena(EASY, RANDOM)
        self.plan(arena, source=Address(host, 0))
        arena.run(5.0)
        assert arena.a.count(SendProbe) == 0

    @pytest.mark.parametrize("host", ["10.0.0.1", "127.0.0.1", "224.0.0.1", "255.255.255.255"])
    def test_target_that_becomes_private(self, host) -> None:
        """A later plan of the same attempt can't aim where the first one could not."""
        arena = Arena(EASY, RANDOM)
        self.plan(arena, serial=1)
        arena.run(0.5)
        self.plan(arena, serial=2, source=Address(host, 0))
        arena.run(5.0)
        hosts = {probe.address.host for _, probe in arena.a.effects if isinstance(probe, SendProbe)}
        assert hosts == {"203.0.113.2"}

    def test_plans_in_a_row(self) -> None:
        """However many plans come, one budget is spent in half a minute."""
        arena = Arena(EASY, RANDOM)
        for serial in range(1, 250):
            self.plan(arena, serial=serial, attempt=serial)
            arena.run(serial / 10)
        assert arena.a.count(SendProbe) <= 2500


class TestChannel:
    """Which punch messages count."""

    def channels(self):
        one, two = PunchChannel(b"one-----"), PunchChannel(b"two-----")
        one.set_peer(PeerSide(session=b"two-----", can_search=True))
        two.set_peer(PeerSide(session=b"one-----", can_search=True))
        return one, two

    def test_replays_and_strangers(self) -> None:
        """A message counts once, in this life of both nodes only."""
        one, two = self.channels()
        first, second = (one.tell(0, PunchKind.ASK).message for _ in range(2))
        assert two.believes(first)
        assert two.believes(second)
        assert not two.believes(first)
        assert not two.believes(second)
        assert not two.believes(replace(second, serial=9, session=b"other---"))
        assert not two.believes(replace(second, serial=9, echoed_session=b"other---"))
        two.set_peer(PeerSide(session=b"one-new-", can_search=True))
        assert not two.believes(replace(second, serial=9))
        assert two.believes(replace(second, serial=1, session=b"one-new-"))

    def test_peers_ports_are_learned(self) -> None:
        """What an introduction lacks a message says, and a new introduction does not erase it."""
        one, two = self.channels()
        one.own = OwnSide(
            NatFacts(M.ADDRESS_AND_PORT_DEPENDENT, ports=Ports(PortPattern.SEQUENTIAL, -2))
        )
        assert two.believes(one.tell(0, PunchKind.ASK).message)
        two.set_peer(two.peer)
        two.set_peer(PeerSide(session=b"one-----", can_search=True))
        assert two.peer.nat.ports == Ports(PortPattern.SEQUENTIAL, -2)


EASY_FACTS = NatFacts(M.ENDPOINT_INDEPENDENT, F.ADDRESS_AND_PORT_DEPENDENT)
EASY_UNSURE = NatFacts(M.ENDPOINT_INDEPENDENT)
HARD_RANDOM = NatFacts(
    M.ADDRESS_AND_PORT_DEPENDENT, F.ADDRESS_AND_PORT_DEPENDENT, Ports(PortPattern.RANDOM)
)
HARD_ORDERED = replace(HARD_RANDOM, ports=Ports(PortPattern.SEQUENTIAL, 1))
HARD_UNSURE = replace(HARD_RANDOM, ports=Ports(PortPattern.UNKNOWN))
BLOCKED = NatFacts(is_udp_blocked=True)
ALLOWED = PunchPolicy(allows_stock=True)
STOCK_EASY = PeerSide(addresses=(Address("203.0.113.2", 41641), Address("10.0.0.2", 41641)))
STOCK_HARD = PeerSide(addresses=(Address("203.0.113.2", 9), Address("203.0.113.2", 41641)))


def ours(nat):
    return PeerSide(nat, session=b"session1", can_search=True)


class TestStrategy:
    """The table."""

    @pytest.mark.parametrize(
        ("own", "peer", "expected", "patience"),
        [
            (EASY_FACTS, ours(EASY_FACTS), Strategy.PLAIN, 0.0),
            (HARD_RANDOM, ours(EASY_FACTS), Strategy.BIRTHDAY_HARD, 0.0),
            (HARD_UNSURE, ours(EASY_FACTS), Strategy.BIRTHDAY_HARD, 0.0),
            (HARD_RANDOM, ours(EASY_UNSURE), Strategy.BIRTHDAY_HARD, PLAIN_PATIENCE_SECONDS),
            (HARD_ORDERED, ours(EASY_FACTS), Strategy.PREDICTED, 0.0),
            (EASY_FACTS, ours(HARD_RANDOM), Strategy.BIRTHDAY_EASY, 0.0),
            (EASY_FACTS, ours(HARD_ORDERED), Strategy.BIRTHDAY_EASY, 0.0),
            (HARD_ORDERED, ours(HARD_ORDERED), Strategy.MUTUAL, 0.0),
            (HARD_ORDERED, ours(HARD_UNSURE), Strategy.ASK, 0.0),
            (HARD_ORDERED, ours(HARD_RANDOM), Strategy.RELAY, 0.0),
            (HARD_UNSURE, ours(HARD_ORDERED), Strategy.RELAY, 0.0),
            (HARD_RANDOM, ours(HARD_UNSURE), Strategy.RELAY, 0.0),
            (BLOCKED, ours(EASY_FACTS), Strategy.RELAY, 0.0),
            (NatFacts(), ours(HARD_RANDOM), Strategy.RELAY, 0.0),
            (HARD_RANDOM, STOCK_EASY, Strategy.INDUCED, PLAIN_PATIENCE_SECONDS),
            (HARD_RANDOM, STOCK_HARD, Strategy.RELAY, 0.0),
            (EASY_FACTS, STOCK_HARD, Strategy.RELAY, 0.0),
            (HARD_RANDOM, PeerSide(HARD_RANDOM), Strategy.RELAY, 0.0),
        ],
    )  # fmt: skip
    def test_pair(self, own, peer, expected, patience) -> None:
        """Each pair has its strategy, and plain punching the head start that it deserves."""
        choice = choose(OwnSide(own), peer, ALLOWED)
        assert (choice.strategy, choice.patience_seconds) == (expected, patience)
        assert choice.reason

    def test_router_first(self) -> None:
        """A router that maps ports is asked before anything is guessed, once."""
        own = OwnSide(HARD_RANDOM, offers_mapping=True)
        assert choose(own, ours(EASY_FACTS), ALLOWED).strategy is Strategy.PORT_MAPPING
        tried = choose(own, ours(EASY_FACTS), ALLOWED, was_mapping_tried=True)
        assert tried.strategy is Strategy.BIRTHDAY_HARD

    def test_router_that_does_not_answer(self) -> None:
        """After two seconds without a mapping the search begins."""
        arena = Arena(RANDOM, EASY, knows=False)
        arena.a.facts = replace(arena.a.facts, offers_mapping=True)
        arena.introduce()
        arena.a.talk()
        assert 2.0 < arena.until_direct() < 5.0
        assert arena.a.count(MapPort) == 1

    def test_plain_that_fails(self) -> None:
        """Where plain punching should work and does not, the search has its turn."""
        peer = ours(replace(EASY_FACTS, filtering=F.ADDRESS_DEPENDENT))
        choice = choose(OwnSide(HARD_RANDOM), peer, ALLOWED, has_plain_failed=True)
        assert choice.strategy is Strategy.BIRTHDAY_HARD

    def test_lists_of_stock_nodes(self) -> None:
        """One port per public IP speaks for an easy NAT, several against it."""
        assert looks_easy(STOCK_EASY.addresses)
        assert not looks_easy(STOCK_HARD.addresses)
        assert not looks_easy((Address("10.0.0.2", 41641),))

    def test_memory_is_bounded(self) -> None:
        """The oldest of too many networks is forgotten."""
        memory = PunchMemory()
        for i in range(MAX_RECORDS + 1):
            memory.note_success(str(i), b"peer", Strategy.INDUCED, 0.0)
        assert memory.recall("0", b"peer").worked is None
        assert memory.recall("1", b"peer").worked is Strategy.INDUCED


class TestArithmetic:
    """Which ports are guessed, and how likely they are."""

    @pytest.mark.parametrize(
        ("sockets", "guessed", "percent"),
        [(64, 128, 12), (128, 256, 64 - 24), (256, 256, 64), (256, 1024, 98), (64, 2048, 87)],
    )
    def test_spec_table(self, sockets, guessed, percent) -> None:
        """Path selection specification 21's table."""
        assert round(100 * hit_probability(sockets, guessed, 64512)) == percent

    @given(
        st.lists(st.tuples(st.integers(1, 3000), st.integers(0, 300)), max_size=3),
        st.integers(-4, 4),
        st.binary(min_size=4, max_size=4),
    )
    def test_every_port_once(self, spans, step, noise) -> None:
        """Guesses cover their ranges without repeating a port of one range."""
        ranges = tuple((first, first + length) for first, length in spans)
        found = list(guesses(ranges, lambda n: (noise * n)[:n], step=step))
        wanted = [port for first, last in ranges for port in range(first, last + 1)]
        assert sorted(found) == sorted(wanted)

    @given(st.lists(st.integers(1024, 65535), max_size=12))
    def test_likely_ranges_cover_everything(self, samples) -> None:
        """Whatever was seen, every port from 1024 on is in exactly one range."""
        ranges = sorted(likely_ranges(samples))
        assert ranges[0][0] == ALL_PORTS[0]
        assert ranges[-1][1] == ALL_PORTS[1]
        assert all(before[1] + 1 == after[0] for before, after in pairwise(ranges))
        assert 16 <= sockets_for(samples) <= 256

    @given(st.integers(1, 65535), st.integers(-64, 64).filter(bool), st.integers(1, 256))
    def test_predictions_are_port_ranges(self, last, step, sockets) -> None:
        """Any measurement gives a valid range."""
        first, end = predicted_range(last, step, sockets)
        assert 1 <= first <= end <= 65535

    def test_prediction_in_both_directions(self) -> None:
        """The range begins beside the last port and leaves room for foreign flows."""
        assert predicted_range(4000, 2, 32) == (4002, 4160)
        assert predicted_range(4000, -1, 32) == (3920, 3999)


class TestVerdict:
    """What people are told."""

    def verdict(self, arena):
        node = arena.a
        return judge("bob", node.peer.statistics(), node.facts.nat, EASY_FACTS, "lab-1",
                     arena.now, node.puncher.facts)  # fmt: skip

    def test_found(self) -> None:
        """Which strategy found the path, and what it cost."""
        arena = Arena(SEQUENTIAL, EASY)
        arena.a.talk()
        arena.until_direct()
        verdict = self.verdict(arena)
        assert Finding.PORTS_FOUND in verdict.findings
        assert "(predicted) found it: 32 sockets" in verdict.text()
        assert verdict.to_dict()["port_search"]["has_succeeded"] is True

    def test_failed(self) -> None:
        """Why it failed, when it may try again, and no advice to switch on what is on."""
        arena = lying()
        arena.a.talk()
        arena.run(15.0)
        verdict = self.verdict(arena)
        assert Finding.PORTS_NOT_FOUND in verdict.findings
        assert "256 sockets" in verdict.text()
        assert "try again in" in verdict.text()
        assert Remedy.PORT_SEARCH not in verdict.remedies

    def test_running_and_forbidden(self) -> None:
        """A running search is told, and a forbidden one with the remedy."""
        arena = lying()
        arena.a.talk()
        arena.run(1.0)
        assert Finding.PORTS_SEARCHED in self.verdict(arena).findings
        arena.a.puncher.set_policy(PunchPolicy(is_enabled=False), arena.now)
        verdict = self.verdict(arena)
        assert Finding.NO_PORT_SEARCH in verdict.findings
        assert Remedy.PORT_SEARCH in verdict.remedies
