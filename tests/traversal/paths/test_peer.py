"""What the peer machine does beyond the conformance rows, and what it never does."""

from __future__ import annotations

import ipaddress
import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from traversal.paths.effects import (
    AddressForgotten,
    AddressLearned,
    DiscoverPeerRelay,
    PathChanged,
    PathState,
    PingAnswered,
    Route,
    SendCallMeMaybe,
    SendPing,
    SendPong,
)
from traversal.paths.extra_pings import PING_BACKS_BURST, PING_BACKS_PER_SECOND
from traversal.paths.peer import Peer
from traversal.paths.scoring import Path
from traversal.wire.address import Address

X, Y = Address("203.0.113.1", 41641), Address("203.0.113.2", 41641)
OWN = (Address("198.51.100.1", 41641),)
EASY = ("open", "easy", "easyAF")


def make_peer(*addresses: Address, local=None, **options) -> Peer:
    peer = Peer(random.Random(1).randbytes, local, **options)
    peer.set_own_addresses(OWN, 0.0)
    peer.set_configured_addresses(addresses, 0.0)
    peer.poll_effects()
    return peer


def sent_pings(peer: Peer) -> list[Address]:
    return [e.path.address for e in peer.poll_effects() if isinstance(e, SendPing)]


class TestEstablishing:
    """From nothing to direct."""

    @pytest.mark.parametrize("a_kind", EASY)
    @pytest.mark.parametrize("b_kind", EASY)
    def test_every_easy_pair_is_direct_within_three_round_trips(self, world, a_kind, b_kind):
        """Both ends are direct in less than 3 round trips + 50 ms, and nothing is lost."""
        w = world().join(a_kind, b_kind)
        log = w.talk(w.a, w.b, every=0.01, until=2.0)
        w.run(3 * 2 * w.delay + 0.05)
        assert w.a.peer.state is PathState.DIRECT
        assert w.b.peer.state is PathState.DIRECT
        w.run(3.0)
        assert w.lost(log, 0.0, 2.0) == []

    @pytest.mark.parametrize(("a_kind", "b_kind"), [("hard", "open"), ("hard", "easyAF")])
    def test_hard_nat_against_lenient_filters(self, world, a_kind, b_kind):
        """A hard NAT is direct with peers whose filter lets its fresh port in."""
        w = world().join(a_kind, b_kind)
        w.talk(w.a, w.b, every=0.05, until=8.0)
        w.run(8.0)
        assert w.a.peer.state is PathState.DIRECT
        assert w.b.peer.state is PathState.DIRECT

    @pytest.mark.parametrize(("a_kind", "b_kind"), [("hard", "easy"), ("hard", "hard")])
    def test_hard_pairs_stay_on_the_relay(self, world, a_kind, b_kind):
        """Where plain punching cannot work the relay carries everything, with few Pings."""
        w = world().join(a_kind, b_kind)
        log = w.talk(w.a, w.b, every=0.05, until=30.0)
        w.run(31.0)
        assert w.a.peer.state is PathState.RELAY
        assert w.lost(log, 0.0, 30.0) == []
        assert len(w.a.sent(SendPing)) < 60

    @pytest.mark.parametrize(("kind", "is_one_way"), [("open", True), ("easy", False)])
    def test_calls_without_knowing_any_address(self, world, kind, is_one_way):
        """A peer of which nothing is known is called (P6), and its Pings lead to a path."""
        w = world().join(kind, "easy", knows=False)
        w.talk(*((w.a,) if is_one_way else (w.a, w.b)), every=0.05, until=1.0)
        w.run(1.0)
        assert len(w.a.sent(SendCallMeMaybe)) == 1
        assert w.a.peer.state is PathState.DIRECT

    def test_peer_that_neither_sends_nor_calls(self, world):
        """One-way traffic is enough to make both directions direct."""
        w = world().join("easy", "easy")
        w.talk(w.a, every=0.05, until=1.0)
        w.run(1.0)
        assert w.a.peer.state is PathState.DIRECT
        assert w.b.peer.state is PathState.DIRECT
        assert w.b.sent(SendCallMeMaybe) == []

    def test_no_call_in_answer_to_a_call(self):
        """A CallMeMaybe is answered by Pings alone."""
        peer = make_peer()
        peer.handle_call_me_maybe((X,), 0.0)
        assert {type(e) for e in peer.poll_effects()} == {SendPing}

    def test_nothing_happens_without_traffic(self):
        """A thousand configured peers cost nothing: no timer, no effect."""
        peer = make_peer(X, Y)
        assert peer.next_deadline() == float("inf")
        assert peer.poll_effects() == []


class TestPingBack:
    """P7: a valid Ping from an address that never answered us is answered by one of our own."""

    def test_at_once_and_rarely(self):
        """One Ping back at once, then one per 5 s however many Pings come."""
        peer = make_peer()
        peer.handle_ping(b"0" * 12, Path(X), 0.0)
        effects = peer.poll_effects()
        assert [type(e) for e in effects] == [SendPong, AddressLearned, SendPing]
        count = 0
        for i in range(1, 100):
            peer.handle_ping(i.to_bytes(12, "big"), Path(X), i * 0.05)
            count += len(sent_pings(peer))
        assert count == 0
        peer.handle_ping(b"1" * 12, Path(X), 5.1)
        assert sent_pings(peer) == [X]

    def test_new_ports_of_the_host_in_use_are_not_pinged(self):
        """With a direct path in use, a Ping from another port of that host (the peer's NAT maps by
        destination) brings a Pong only, and other hosts are pinged once in 5 s; otherwise two such
        NATs would keep the peers pinging for ever."""
        peer = make_peer(X)
        peer.handle_send(0.0)
        (ping,) = (e for e in peer.poll_effects() if isinstance(e, SendPing))
        peer.handle_pong(ping.transaction_id, X, Y, 0.04)
        peer.on_time(0.04)
        peer.poll_effects()
        for i in range(50):
            peer.handle_ping(bytes([i]) * 12, Path(Address(X.host, 1000 + i)), 0.05)
        assert sent_pings(peer) == []
        others = [Address(f"198.51.100.{i}", 9) for i in range(1, 50)]
        for i, other in enumerate(others):
            peer.handle_ping(bytes([i]) * 12, Path(other), 0.05)
        assert sent_pings(peer) == others[:1]

    def test_duplicate_pings_are_dropped(self):
        """The same Ping twice from one address is answered once; from another it is answered."""
        peer = make_peer()
        for address, pongs in ((X, 1), (X, 0), (Y, 1)):
            peer.handle_ping(b"0" * 12, Path(address), 0.0)
            found = [e for e in peer.poll_effects() if isinstance(e, SendPong)]
            assert len(found) == pongs

    def test_addresses_are_learned_anew(self):
        """A Ping claims its source each time, an answer proves the address that was pinged, and
        one from elsewhere proves nothing."""
        peer = make_peer(X)
        for i in range(2):
            peer.handle_ping(bytes([i]) * 12, Path(Y), 0.0)
            assert AddressLearned(Y) in peer.poll_effects()
        assert not peer.has_answered_from(Y, 0.0)
        for source in (X, Y):
            peer.handle_send(100.0)
            peer.ping_all(100.0)
            ping = [e for e in peer.poll_effects() if isinstance(e, SendPing)][-1]
            peer.handle_pong(ping.transaction_id, source, Y, 100.1)
            learned = [e for e in peer.poll_effects() if isinstance(e, AddressLearned)]
            assert AddressLearned(ping.path.address, is_proven=source == X) in learned
            assert all(e.is_proven <= (e.address == source == X) for e in learned)
        assert peer.has_answered_from(X, 144.0)
        assert not peer.has_answered_from(X, 146.0)

    def test_pongs_are_limited_per_source(self):
        """A flood of Pings gets 20 Pongs a second after a burst of 40."""
        peer = make_peer()
        pongs = 0
        for i in range(10_000):
            peer.handle_ping(i.to_bytes(12, "big"), Path(X), i / 1000)
            pongs += sum(isinstance(e, SendPong) for e in peer.poll_effects())
        assert pongs == pytest.approx(40 + 200, abs=2)

    def test_replays_from_many_sources_are_bounded(self):
        """Thousands of forged sources leave a hundred candidates, all unmapped in the end."""
        peer = make_peer(X)
        learned, forgotten, pings = 0, 0, 0
        for i in range(4000):
            source = Address(f"198.18.{i // 250}.{i % 250}", 1)
            peer.handle_ping(b"recorded-one", Path(source), i / 1000)
            for effect in peer.poll_effects():
                learned += isinstance(effect, AddressLearned)
                forgotten += isinstance(effect, AddressForgotten)
                pings += isinstance(effect, SendPing)
        assert len(peer.statistics().candidates) <= 100
        assert learned - forgotten <= 100
        assert 1 <= pings <= PING_BACKS_BURST + 4 * PING_BACKS_PER_SECOND


class TestCallMeMaybe:
    """Lists from the peer."""

    def test_any_size_is_taken_64_are_pinged_at_100_a_second(self):
        """A list of 3600 makes 64 candidates; the Pings leave paced."""
        peer = make_peer()
        many = tuple(Address("198.18.0.1", port) for port in range(1, 3601))
        peer.handle_call_me_maybe(many, 0.0)
        first = sent_pings(peer)
        assert len(first) == 32
        rest = []
        while peer.next_deadline() < 1.0:
            now = peer.next_deadline()
            peer.on_time(now)
            rest += [(now, address) for address in sent_pings(peer)]
        assert len(rest) == 32
        assert rest[-1][0] == pytest.approx(0.32, abs=0.02)
        assert set(first) | {a for _, a in rest} == set(many[:64])

    @pytest.mark.parametrize(
        "text",
        [
            "0.0.0.0:1",
            "224.0.0.1:1",
            "255.255.255.255:1",
            "1.2.3.4:0",
            "[fe80::1]:1",
            "[ff02::1]:1",
            "[::]:1",
            "127.3.3.40:7",
            "0.1.2.3:9",
            "240.0.0.1:5",
            "100.64.7.7:1",
        ],
    )
    def test_unusable_addresses_are_skipped(self, networks, text):
        """Nothing is sent to addresses that no peer can have, or to the overlay itself."""
        local = networks(excluded=(ipaddress.ip_network("100.64.0.0/16"),))
        peer = make_peer(local=local)
        peer.handle_call_me_maybe((Address.parse(text), X), 0.0)
        assert sent_pings(peer) == [X]

    def test_allowed_ranges(self, networks):
        """Where ranges are allowed, nothing else is pinged, nor what is excluded among them."""
        allowed = (ipaddress.ip_network("203.0.113.0/30"), ipaddress.ip_network("2001:db8::/32"))
        excluded = (ipaddress.ip_network("203.0.113.2"),)
        peer = make_peer(local=networks(allowed=allowed, excluded=excluded))
        other = Address("203.0.113.9", 41641)
        six = Address("2001:db8::1", 41641)
        peer.handle_call_me_maybe((other, Y, X, six), 0.0)
        assert sent_pings(peer) == [X, six]


class TestScope:
    """P10: private addresses are pinged where they make sense, or when nothing else works."""

    LOCAL = (ipaddress.ip_network("192.168.1.0/24"),)
    FOREIGN = Address("10.9.9.9", 41641)
    NEAR = Address("192.168.1.7", 41641)

    def test_foreign_private_addresses_wait(self, networks):
        """They are tried after 5 s of failure, not before."""
        peer = make_peer(X, self.FOREIGN, self.NEAR, local=networks(networks=self.LOCAL))
        peer.sent += 1
        peer.handle_send(0.0)
        assert sent_pings(peer) == [X, self.NEAR]
        late = []
        while peer.next_deadline() <= 5.5:
            now = peer.next_deadline()
            peer.on_time(now)
            late += sent_pings(peer)
        assert self.FOREIGN in late

    def test_peers_behind_our_own_public_address_are_near(self, networks):
        """Sharing a public address means sharing a site: everything is tried at once."""
        local = networks(networks=self.LOCAL, public_ips=frozenset({X.host}))
        peer = make_peer(X, self.FOREIGN, local=local)
        peer.handle_send(0.0)
        assert sent_pings(peer) == [X, self.FOREIGN]

    def test_only_foreign_addresses(self, networks):
        """When there is nothing else they are tried at once."""
        peer = make_peer(self.FOREIGN, local=networks(networks=self.LOCAL))
        peer.handle_send(0.0)
        assert sent_pings(peer) == [self.FOREIGN]


class TestLiveness:
    """P8: silence raises suspicion, a burst of Pings decides."""

    def test_one_way_flows_are_not_punished(self, world):
        """A flow without any return stays direct for a minute, with two extra Pings a second."""
        w = world(delay=0.05).join()
        log = w.talk(w.a, every=0.02, until=60.0)
        w.run(60.0)
        states = [e for t, e in w.a.sent(PathChanged) if t > 1.0]
        assert states == []
        assert len(w.a.sent(SendPing, since=1.0)) < 2.5 * 60
        assert w.lost(log, 0.0, 59.0) == []

    @pytest.mark.parametrize(("every", "most"), [(0.02, 75), (0.1, 75), (0.4, 10)])
    def test_two_way_flows_cost_few_pings(self, world, every, most):
        """With return traffic some two Pings a second are sent; single datagrams that are
        answered cost nothing beyond the heartbeats."""
        w = world().join()
        w.talk(w.a, w.b, every=every, until=31.0)
        w.run(31.0)
        assert 10 <= len(w.a.sent(SendPing, since=1.0)) <= most

    @pytest.mark.parametrize("delay", [0.001, 0.05, 0.15])
    def test_path_dead_in_one_direction(self, world, delay):
        """What we send is lost while the peer is heard well: less than a second of it is lost, and
        the peer, whose Pings go unanswered, loses nothing that arrives."""
        for seed in range(5):
            w = world(seed, delay=delay).join()
            log = w.talk(w.a, w.b, every=0.02, until=20.0)
            start = 10.0 + seed * 0.617
            w.run(start)
            w.refuses = lambda source, to, deaf=w.b.address: to == deaf
            w.run(20.0)
            ours = {number: entry for number, entry in log.items() if entry[1] is w.a}
            lost = w.lost(ours, start - 1.0, 19.0)
            assert 0 < max(lost) - min(lost) < 1.0
            assert w.a.peer.route.relay
            assert len(w.lost(log, 0.0, 19.0)) == len(lost)

    @pytest.mark.parametrize("delay", [0.001, 0.05, 0.15])
    @pytest.mark.parametrize("is_one_way", [True, False])
    def test_dead_path_costs_less_than_a_second(self, world, delay, is_one_way):
        """At round trips of 2, 100 and 300 ms, one-way or not, a dead path loses < 1 s."""
        for seed in range(5):
            w = world(seed, delay=delay).join()
            log = w.talk(*((w.a,) if is_one_way else (w.a, w.b)), every=0.01, until=20.0)
            start = 10.0 + seed * 0.617
            w.run(start)
            w.is_down = True
            w.run(20.0)
            lost = w.lost(log, start - 1.0, 19.0)
            assert max(lost) - min(lost) < 1.0

    def test_jitter_alone_raises_no_doubt(self, world):
        """Delays that vary tenfold do not make a path dubious."""
        w = world(3)
        w.jitter = 0.18
        w.join()
        w.talk(w.a, w.b, every=0.05, until=60.0)
        w.run(60.0)
        doubts = [e for t, e in w.a.sent(PathChanged) if t > 3.0]
        assert doubts == []

    def test_authenticated_data_extends_trust(self):
        """Data that a tunnel vouches for keeps a path trusted without Pongs."""
        peer = make_peer(X)
        peer.sent += 1
        peer.handle_send(0.0)
        (ping,) = [e for e in peer.poll_effects() if isinstance(e, SendPing)]
        peer.handle_pong(ping.transaction_id, X, OWN[0], 0.02)
        for step in range(1, 100):
            now = step / 10
            peer.received += 1
            peer.handle_authenticated_data(Path(X), now)
            while peer.next_deadline() <= now:
                peer.on_time(now)
        assert peer.state is PathState.DIRECT


class TestSecondLook:
    """One late first sample does not decide between two addresses for a minute."""

    @pytest.mark.parametrize("late_first", [True, False])
    def test_late_first_sample(self, late_first):
        """An IPv6 address whose first Pong is late, before or after that of IPv4, is measured twice
        more within a second, and then used; one that is slow is not, and is left in peace."""
        four, six = Address("203.0.113.1", 41641), Address("2001:db8::1", 41641)
        for later, expected in ((0.021, six), (0.3, four)):
            peer = make_peer(four, six)
            delays = {four: 0.25 if late_first else 0.02, six: 0.2}
            due, pinged = [], []
            now = 0.0
            while now < 2.9:
                peer.sent += 1
                peer.received += 1
                if peer.route.wake:
                    peer.handle_send(now)
                if now >= peer.next_deadline():
                    peer.on_time(now)
                for effect in peer.poll_effects():
                    if isinstance(effect, SendPing) and effect.path.address in delays:
                        address = effect.path.address
                        pinged.append((now, address))
                        due.append((now + delays[address], effect.transaction_id, address))
                        delays[address] = 0.02 if address == four else later
                for entry in [entry for entry in due if entry[0] <= now]:
                    due.remove(entry)
                    peer.handle_pong(entry[1], entry[2], OWN[0], now)
                now += 0.001
            assert peer.route.path == Path(expected)
            other = four if expected == six else six
            assert len([at for at, address in pinged if address == other]) <= 3
            assert max(at for at, address in pinged if address == other) < 1.5


class TestLoss:
    """P13: a path that loses too much gives way to the relay and returns when it has healed."""

    def test_bad_path_is_left_and_taken_back(self, world):
        """At 50 % loss the relay takes over within 30 s; healed, the path returns within 10 s."""
        w = world(5).join()
        w.talk(w.a, w.b, every=0.05, until=200.0)
        w.run(10.0)
        w.loss = 0.4
        w.run(40.0)
        assert w.a.peer.route.path is None
        assert w.a.peer.route.relay
        w.loss = 0.0
        w.run(55.0)
        assert w.a.peer.state is PathState.DIRECT

    @pytest.mark.parametrize("seed", range(3))
    def test_no_flapping(self, world, seed):
        """Under steady heavy loss the route settles; under light loss it never leaves."""
        heavy = world(seed).join()
        heavy.talk(heavy.a, heavy.b, every=0.05, until=330.0)
        heavy.run(10.0)
        heavy.loss = 0.3
        heavy.run(330.0)
        changes = [
            e for t, e in heavy.a.sent(PathChanged, since=40.0) if not e.new.relay and e.old.relay
        ]
        assert len(changes) <= 3
        light = world(seed).join()
        light.talk(light.a, light.b, every=0.05, until=330.0)
        light.run(10.0)
        light.loss = 0.01
        light.run(330.0)
        assert light.a.sent(PathChanged, since=10.0) == []

    def test_lossy_path_is_kept_without_a_relay(self, world):
        """With no relay to go to, half a path is better than none."""
        w = world(5).join()
        w.talk(w.a, w.b, every=0.05, until=100.0)
        w.run(10.0)
        w.a.peer.set_relay_available(False, w.now)
        w.loss = 0.4
        for second in range(11, 100):
            w.run(float(second))
            assert w.a.peer.route.path is not None or w.a.peer.route.relay


class TestPathMtu:
    """Padded Pings find the size of the path, above 1500 and below 600."""

    @pytest.mark.parametrize("payload", [8972, 1472, 1452, 1252, 1100, 572, 300])
    def test_search(self, world, payload):
        """The result is within 8 bytes below the truth, exact for common sizes."""
        w = world()
        w.max_payload = payload
        w.join(ceiling_bytes=9000)
        w.talk(w.a, w.b, every=0.1, until=40.0)
        w.run(40.0)
        found = w.a.peer.max_payload_bytes
        assert payload - 8 <= found <= payload
        if payload in (8972, 1472, 1252, 572):
            assert found == payload

    def test_shrinking_path_is_noticed(self, world):
        """The repeated search after ten minutes finds a smaller size too."""
        w = world()
        w.join(ceiling_bytes=1500)
        w.talk(w.a, w.b, every=0.5, until=700.0)
        w.run(300.0)
        assert w.a.peer.max_payload_bytes == 1472
        w.max_payload = 1252
        w.run(700.0)
        assert w.a.peer.max_payload_bytes == 1252

    def test_send_refusal_ends_a_size_at_once(self):
        """EMSGSIZE counts as a refusal without waiting."""
        peer = make_peer(X, ceiling_bytes=1500)
        peer.sent += 1
        peer.handle_send(0.0)
        (ping,) = [e for e in peer.poll_effects() if isinstance(e, SendPing)]
        peer.handle_pong(ping.transaction_id, X, OWN[0], 0.02)
        peer.on_time(0.02)
        (probe,) = [e for e in peer.poll_effects() if isinstance(e, SendPing)]
        assert probe.padding_bytes == 1500 - 28 - 124
        peer.handle_too_big(probe.padding_bytes, 0.03)
        peer.on_time(0.03)
        (probe,) = [e for e in peer.poll_effects() if isinstance(e, SendPing)]
        assert probe.padding_bytes < 1500 - 28 - 124


def test_ping_all_reports_every_answer(world):
    """The user's ping goes by relay and by every address, and tells who answered."""
    w = world().join("easy", "easy")
    w.a.peer.ping_all(0.0)
    w.a.flush()
    w.run(0.2)
    w.a.peer.ping_all(w.now)
    w.a.flush()
    w.run(0.5)
    answers = [e for _, e in w.a.sent(PingAnswered)]
    assert {e.path for e in answers} == {None, w.a.peer.route.path}


def test_peer_relays_are_looked_for_while_no_direct_path_is_trusted():
    """DiscoverPeerRelay comes every 30 s on the relay, every 60 s on a peer relay, never else."""
    peer = make_peer(X)
    peer.has_peer_relays = True
    times, now = [], 0.0
    while now < 200.0:
        peer.sent += 1
        if peer.route.wake:
            peer.handle_send(now)
        while peer.next_deadline() <= now + 0.5:
            peer.on_time(peer.next_deadline())
        if now >= 95.0:
            peer.received += 1
            peer.handle_peer_relay_ready(Path(Y, 9), "server", 0.01, now)
        times += [now for e in peer.poll_effects() if isinstance(e, DiscoverPeerRelay)]
        now += 0.5
    gaps = [b - a for a, b in itertools.pairwise(times)]
    assert gaps == pytest.approx([30, 30, 30, 60], abs=5)


def test_new_disco_key_keeps_paths_and_drops_pings():
    """The peer restarted: its addresses stay, answers to old Pings do not count."""
    peer = make_peer(X)
    peer.handle_send(0.0)
    (ping,) = [e for e in peer.poll_effects() if isinstance(e, SendPing)]
    peer.handle_new_disco_key(0.01)
    assert not peer.handle_pong(ping.transaction_id, X, OWN[0], 0.02)
    peer.on_time(2.0)
    assert sent_pings(peer) == [X]


def test_send_error_clears_the_path():
    """A route that the kernel does not have is left at once (E19)."""
    peer = make_peer(X)
    peer.sent += 1
    peer.handle_send(0.0)
    (ping,) = [e for e in peer.poll_effects() if isinstance(e, SendPing)]
    peer.handle_pong(ping.transaction_id, X, OWN[0], 0.02)
    peer.handle_send_error(Path(X), 1.0)
    assert peer.route.path is None
    assert peer.route.relay


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 2**32),
    st.sampled_from(EASY),
    st.sampled_from(EASY),
    st.floats(0.0005, 0.15),
    st.floats(0, 0.15),
    st.lists(
        st.tuples(
            st.floats(0.5, 12), st.sampled_from(["down", "up", "roam", "rebind", "lossy", "mute"])
        ),
        max_size=6,
    ),
)
def test_whatever_happens_a_direct_path_is_found_again(world, seed, a, b, delay, loss, events):
    """After any sequence of trouble a working direct path is used again within 10 s of quiet,
    and data keeps arriving by some way throughout but for a second after each event."""
    w = world(seed, delay=delay).join(a, b)
    w.loss = loss / 10
    log = w.talk(w.a, w.b, every=0.1, until=200.0)
    now, trouble = 0.0, [0.0]
    for pause, event in events:
        now += pause
        w.run(now)
        trouble.append(now)
        match event:
            case "down":
                w.is_down = True
            case "up":
                w.is_down = False
            case "lossy":
                w.loss = 0.5
            case "mute":
                w.refuses = lambda source, to: source.host == "198.51.100.11"
            case "roam":
                w.b.address = Address(w.b.address.host, w.b.address.port + 1)
                w.b.nat.mappings.clear()
                w.b.nat.contacted.clear()
                w.b.peer.handle_rebind(now)
                w.b.flush()
            case "rebind":
                w.a.peer.handle_rebind(now)
                w.a.flush()
    w.is_down, w.loss, w.refuses = False, 0.0, lambda source, to: False
    w.run(now + 25.0)
    assert w.a.peer.state is PathState.DIRECT, w.a.peer.statistics()
    assert w.b.peer.state is PathState.DIRECT, w.b.peer.statistics()
    quiet = w.lost(log, now + 15.0, now + 24.0)
    assert quiet == []


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from(["blocked", "hard"]), st.floats(0.001, 0.2))
def test_without_a_direct_path_everything_is_delivered(world, seed, kind, delay):
    """Where no direct path can be, the relay delivers every datagram from the first on."""
    w = world(seed, delay=delay).join(kind, "hard")
    log = w.talk(w.a, w.b, every=0.1, until=20.0)
    w.run(21.0)
    assert w.lost(log, 0.0, 20.0) == []
    assert w.a.peer.state is PathState.RELAY


ADDRESSES = st.sampled_from([X, Y, Address("10.0.0.1", 1), Address("2001:db8::1", 5)])


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 13), ADDRESSES, st.integers(0, 3), st.floats(0, 8)), max_size=60
    )
)
def test_any_order_of_calls_is_survived(steps):
    """Random calls in random order never raise, never loop, and keep the promises of `route`."""
    peer = make_peer(X, ceiling_bytes=1500)
    now, ids = 0.0, [bytes(12)]
    for what, address, number, pause in steps:
        path = Path(address, number if number > 2 else 0)
        match what:
            case 0 | 1:
                peer.sent += 1
                if peer.route.wake:
                    peer.handle_send(now)
            case 2:
                peer.handle_ping(ids[-1 - number % len(ids)], path, now)
            case 3 | 4 | 5:
                peer.handle_pong(ids[-1 - number % len(ids)], address, X, now)
            case 6:
                peer.handle_call_me_maybe((address, Y)[:number], now)
            case 7:
                peer.handle_rebind(now)
            case 8:
                peer.handle_send_error(path, now)
            case 9:
                peer.handle_peer_relay_ready(Path(address, 9), number, 0.01, now)
            case 10:
                peer.set_configured_addresses((address,), now)
            case 11:
                peer.set_own_addresses((address,)[:number], now)
            case 12:
                peer.ping_all(now)
            case 13:
                peer.set_relay_available(bool(number), now)
        end = now + pause
        turns = 0
        while peer.next_deadline() <= end:
            now = max(now, peer.next_deadline())
            peer.on_time(now)
            turns += 1
            assert turns < 2000
        now = end
        for effect in peer.poll_effects():
            if isinstance(effect, SendPing):
                ids.append(effect.transaction_id)
            if isinstance(effect, SendCallMeMaybe):
                assert effect.addresses
        assert peer.route.relay or peer.route.path is not None
        peer.statistics()


def test_a_silent_path_is_left_for_one_that_answered_just_now() -> None:
    """The peer moved: it pinged from its new address, which answers, but no better than the old one
    did. When the old one goes silent, the new one is asked at once, not with the next search."""
    peer = make_peer(X)
    answered = {X, Y}
    now, number = 0.0, 0
    peer.handle_send(now)

    def run(until: float) -> list[tuple[float, Address]]:
        """Send and receive 50 datagrams a second; answer Pings after 20 ms."""
        nonlocal now, number
        asked = []
        pongs: list[tuple[float, bytes, Address]] = []
        while now < until:
            for effect in peer.poll_effects():
                if isinstance(effect, SendPing):
                    asked.append((now, effect.path.address))
                    if effect.path.address in answered and not effect.padding_bytes:
                        pongs.append((now + 0.02, effect.transaction_id, effect.path.address))
            now += 0.02
            for due in [pong for pong in pongs if pong[0] <= now]:
                pongs.remove(due)
                peer.handle_pong(due[1], due[2], OWN[0], now)
            peer.sent += 1
            peer.received += X in answered
            if peer.route.wake:
                peer.handle_send(now)
            peer.on_time(now)
        return asked

    run(59.0)
    assert peer.route == Route(Path(X), relay=False, wake=False)
    run(61.0)  # a search for something better, by chance just now
    answered.remove(X)
    peer.handle_ping(b"0" * 12, Path(Y), now)
    died = now
    asked = run(died + 2)
    assert peer.route.path == Path(Y)
    assert not peer.route.relay
    first, second = [at - died for at, address in asked if address == Y][:2]
    assert first < 0.1
    assert second < 1
