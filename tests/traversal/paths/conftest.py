"""An internet of two in virtual time: peers' machines joined by a seeded link, NATs and a relay."""

from __future__ import annotations

import heapq
import itertools
import random

import pytest

from traversal.paths.candidates import LocalNetworks
from traversal.paths.effects import (
    AddressForgotten,
    AddressLearned,
    DiscoverPeerRelay,
    PathChanged,
    PathState,
    PingAnswered,
    RefreshEndpoints,
    Route,
    SendCallMeMaybe,
    SendPing,
    SendPong,
    SendRelayPing,
)
from traversal.paths.peer import Peer
from traversal.paths.scoring import EDGE_PATH, Measured, Path, is_better
from traversal.wire.address import Address

PING_PAYLOAD = 124
MAX_STEPS_PER_INSTANT = 200


class Nat:
    """Address translation and filtering of one site: open, easy, easyAF, hard or blocked."""

    def __init__(self, kind: str, public_ip: str) -> None:
        self.kind = kind
        self.public_ip = public_ip
        self.mappings: dict[object, int] = {}
        self.contacted: set[object] = set()
        self.ports = itertools.count(20000)

    def outbound(self, source: Address, to: Address) -> Address | None:
        if self.kind == "blocked":
            return None
        if self.kind == "open":
            return source
        self.contacted.add(to if self.kind != "easyAF" else to.host)
        key = (source, to) if self.kind == "hard" else source
        if key not in self.mappings:
            self.mappings[key] = next(self.ports)
        return Address(self.public_ip, self.mappings[key])

    def inbound(self, source: Address, to: Address, local: Address) -> bool:
        if self.kind in ("open", "blocked"):
            return self.kind == "open" and to == local
        for key, port in self.mappings.items():
            if port == to.port:
                if self.kind == "hard":
                    return key == (local, source)
                return (source if self.kind == "easy" else source.host) in self.contacted
        return False


class StockPeer:
    """A stock node's rules, path selection specification 5 and 6, without ours: no Ping back, no
    early doubt, a Ping per candidate and 5 s, heartbeats of 3 s, trust of 6.5 s, empty lists erase.

    One with silent disco (14) sends no heartbeats; data from the best address extends its trust.
    """

    def __init__(self, entropy):
        self.entropy = entropy
        self.is_silent = False
        self.sent = self.received = 0
        self.own = ()
        self.candidates = {}
        self.called = set()
        self.best, self.best_latency, self.trusted_until = None, 0.0, -1.0
        self.last_sent, self.full_ping_at, self.heartbeat_at = -1e9, -1e9, float("inf")
        self.outstanding = {}
        self.effects = []
        self.now = 0.0

    @property
    def route(self):
        trusted = self.best is not None and self.now <= self.trusted_until
        path = Path(self.best) if self.best is not None else None
        return Route(path, relay=not trusted, wake=True)

    @property
    def state(self):
        if self.best is None:
            return PathState.RELAY
        return PathState.DOUBT if self.route.relay else PathState.DIRECT

    def poll_effects(self):
        effects, self.effects = self.effects, []
        return effects

    def next_deadline(self):
        return min([self.heartbeat_at] + [at + 5.0 for _, at in self.outstanding.values()])

    def set_own_addresses(self, addresses, now):
        self.own = addresses

    def set_configured_addresses(self, addresses, now):
        for address in addresses:
            self.candidates.setdefault(address, -1e9)

    def _ping(self, address):
        self.candidates[address] = self.now
        transaction_id = self.entropy(12)
        self.outstanding[transaction_id] = (address, self.now)
        self.effects.append(SendPing(Path(address), transaction_id))

    def _full_ping(self, call):
        self.full_ping_at = self.now
        due = [a for a, at in self.candidates.items() if self.now - at >= 5.0]
        for address in due:
            self._ping(address)
        if due and call:
            self.effects.append(SendCallMeMaybe(self.own))

    def _wants_full_ping(self):
        if self.best is None or self.now > self.trusted_until:
            return True
        return self.best_latency > 0.005 and self.now - self.full_ping_at >= 60

    def handle_send(self, now):
        self.now = now
        if self.best is None or now > self.trusted_until:
            self._full_ping(call=True)
        self.last_sent = now
        if self.heartbeat_at == float("inf"):
            self.heartbeat_at = now + 3.0

    def on_time(self, now):
        self.now = now
        for transaction_id, (address, at) in list(self.outstanding.items()):
            if now >= at + 5.0:
                del self.outstanding[transaction_id]
                if address == self.best and now > self.trusted_until:
                    self.best = None
        if now >= self.heartbeat_at:
            if now - self.last_sent > 45.0:
                self.heartbeat_at = float("inf")
                return
            if self.best is not None and not self.is_silent:
                self._ping(self.best)
            if self._wants_full_ping():
                self._full_ping(call=True)
            self.heartbeat_at = now + 3.0

    def handle_ping(self, transaction_id, path, now):
        self.now = now
        self.candidates.setdefault(path.address, -1e9)
        self.effects.append(AddressLearned(path.address))
        self.effects.append(SendPong(path, transaction_id, path.address))

    def handle_relay_ping(self, transaction_id, region):
        self.effects.append(SendPong(None, transaction_id, Address("127.3.3.40", region)))

    def handle_pong(self, transaction_id, source, seen_as, now):
        self.now = now
        if transaction_id not in self.outstanding:
            return
        address, at = self.outstanding.pop(transaction_id)
        if address not in self.candidates:
            return
        latency = now - at
        if self.best != address and (
            self.best is None
            or now > self.trusted_until
            or is_better(
                Measured(Path(address), latency), Measured(Path(self.best), self.best_latency)
            )
        ):
            self.best = address
        if self.best == address:
            self.best_latency, self.trusted_until = latency, now + 6.5

    def handle_data(self, source, now):
        if self.is_silent and source == self.best:
            self.trusted_until = now + 6.5

    def handle_call_me_maybe(self, addresses, now):
        self.now = now
        for address in self.called - set(addresses):
            self.candidates.pop(address, None)
            if self.best == address:
                self.best = None
        self.called = set(addresses)
        for address in addresses:
            self.candidates[address] = -1e9
        self.candidates = dict.fromkeys(self.candidates, -1e9)
        self._full_ping(call=False)


class Node:
    """One end: a Peer machine for the other end, a socket address, a NAT, a log of everything."""

    def __init__(self, world, name, ip, kind, public_ip, **options):
        self.world = world
        self.name = name
        self.address = Address(ip, 41641)
        self.nat = Nat(kind, public_ip)
        entropy = random.Random(f"{world.seed}{name}").randbytes
        is_stock = options.pop("is_stock", False)
        local = options.pop("local", None)
        self.peer = StockPeer(entropy) if is_stock else Peer(entropy, local, **options)
        self.other = None
        self.effects = []
        self.arrived = {}
        self.last_received_by = None
        self.mapped = set()
        self.answers_refresh = True

    def own_addresses(self) -> tuple[Address, ...]:
        """What a net check would find: the reflexive address, then the local one."""
        stun = self.nat.outbound(self.address, Address("192.0.2.1", 3478))
        return tuple(dict.fromkeys(a for a in (stun, self.address) if a is not None))

    def refresh(self) -> None:
        self.peer.set_own_addresses(self.own_addresses(), self.world.now)
        self.flush()

    def flush(self) -> None:
        world = self.world
        for effect in self.peer.poll_effects():
            self.effects.append((world.now, effect))
            match effect:
                case SendPing(path, transaction_id, _) if path.is_edge:
                    world.send_edge(self, ("ping", transaction_id))
                case SendPong(path, transaction_id, source) if path is not None and path.is_edge:
                    world.send_edge(self, ("pong", transaction_id, source))
                case SendPing(path, transaction_id, padding):
                    world.send_udp(self, path.address, ("ping", transaction_id), padding)
                case SendPong(None, transaction_id, source):
                    world.send_relay(self, ("pong", transaction_id, source))
                case SendPong(path, transaction_id, source):
                    world.send_udp(self, path.address, ("pong", transaction_id, source))
                case SendRelayPing(transaction_id):
                    world.send_relay(self, ("ping", transaction_id))
                case SendCallMeMaybe(addresses):
                    world.send_relay(self, ("call", addresses))
                case RefreshEndpoints():
                    if self.answers_refresh:
                        world.later(0.05, self.refresh)
                case AddressLearned(address):
                    self.mapped.add(address)
                case AddressForgotten(address):
                    self.mapped.discard(address)
                case PathChanged() | PingAnswered() | DiscoverPeerRelay():
                    pass
                case _:
                    raise AssertionError(effect)

    def send_data(self, number: int) -> None:
        """What the data path of a shell does."""
        route = self.peer.route
        if route.path is not None and route.path.is_edge:
            self.world.send_edge(self, ("data", number))
        elif route.path is not None:
            self.world.send_udp(self, route.path.address, ("data", number))
        if route.relay:
            self.world.send_relay(self, ("data", number))
        self.peer.sent += 1
        if route.wake:
            self.peer.handle_send(self.world.now)
            self.flush()

    def receive(self, message, source: Address | None) -> None:
        now = self.world.now
        match message:
            case ("ping", transaction_id):
                if source == EDGE_PATH.address:
                    self.peer.handle_ping(transaction_id, EDGE_PATH, now)
                elif source is None:
                    self.peer.handle_relay_ping(transaction_id, 900)
                else:
                    self.peer.handle_ping(transaction_id, Path(source), now)
            case ("pong", transaction_id, seen_as):
                if source is None:
                    self.peer.handle_relay_pong(transaction_id, seen_as, now)
                else:
                    self.peer.handle_pong(transaction_id, source, seen_as, now)
            case ("call", addresses):
                self.peer.handle_call_me_maybe(addresses, now)
            case ("data", number):
                self.arrived.setdefault(number, now)
                if isinstance(self.peer, StockPeer):
                    self.peer.handle_data(source, now)
                if source in self.mapped or source == EDGE_PATH.address:
                    self.peer.received += 1
        self.flush()

    def sent(self, kind, since=0.0, until=float("inf")):
        """Effects of one kind with their times."""
        return [(t, e) for t, e in self.effects if isinstance(e, kind) and since <= t <= until]


class World:
    """Two nodes, `a` and `b`, and the time."""

    def __init__(self, seed=0, delay=0.02, relay_delay=0.03):
        self.seed = seed
        self.random = random.Random(seed)
        self.now = 0.0
        self.delay = delay
        self.relay_delay = relay_delay
        self.loss = 0.0
        self.jitter = 0.0
        self.is_down = False
        self.is_relay_up = self.is_edge_up = True
        self.edge_delay = 0.05
        self.max_payload = 10_000
        self.refuses = lambda source, to: False
        self.queue = []
        self.order = itertools.count()
        self.numbers = itertools.count()

    def join(
        self, a_kind="open", b_kind="open", *, lan=False, knows=True, stock_b=False, **options
    ):
        """Make both nodes; `knows`: each has the other's addresses as configured ones."""
        a_ip = "10.0.0.1" if a_kind != "open" else "198.51.100.1"
        b_ip = "10.0.0.2" if b_kind != "open" else "198.51.100.2"
        self.a = Node(self, "a", a_ip, a_kind, "198.51.100.11", **options)
        if stock_b:
            options = {"is_stock": True}
        self.b = Node(self, "b", b_ip, b_kind, "198.51.100.22", **options)
        self.a.other, self.b.other = self.b, self.a
        for node in (self.a, self.b):
            node.refresh()
        if knows:
            for node in (self.a, self.b):
                node.peer.set_configured_addresses(node.other.own_addresses(), 0.0)
                node.flush()
        return self

    def later(self, seconds, action):
        heapq.heappush(self.queue, (self.now + seconds, next(self.order), action))

    def send_udp(self, node, to, message, padding=0):
        if self.is_down or self.random.random() < self.loss:
            return
        if padding + PING_PAYLOAD > self.max_payload:
            return
        other = node.other
        delay = self.delay + self.random.random() * self.jitter
        source = node.nat.outbound(node.address, to)
        if source is None or self.refuses(source, to):
            return

        def arrive():
            if other.nat.kind == "open":
                is_in = to == other.address
            else:
                is_in = to.host == other.nat.public_ip and other.nat.inbound(
                    source, to, other.address
                )
            if is_in:
                other.receive(message, source)

        self.later(delay, arrive)

    def send_edge(self, node, message):
        if self.is_edge_up:
            other = node.other
            self.later(self.edge_delay, lambda: other.receive(message, EDGE_PATH.address))

    def send_relay(self, node, message):
        if not self.is_relay_up:
            return
        self.later(self.relay_delay, lambda: node.other.receive(message, None))

    def talk(self, *nodes, every=0.05, until=10.0):
        """Let nodes send numbered data regularly; returns {number: (time, node)}."""
        log = {}

        def step(node):
            if self.now > until + 1e-9:
                return
            number = next(self.numbers)
            log[number] = (self.now, node)
            node.send_data(number)
            self.later(every, lambda: step(node))

        for node in nodes:
            self.later(0.0, lambda node=node: step(node))
        return log

    def run(self, until):
        """Advance to `until`, from one interesting instant to the next."""
        steps, instant = 0, None
        while True:
            deadlines = [node.peer.next_deadline() for node in (self.a, self.b)]
            upcoming = min(deadlines + ([self.queue[0][0]] if self.queue else []))
            if upcoming > until:
                break
            moment = max(self.now, upcoming)
            steps = steps + 1 if moment == instant else 0
            instant = moment
            assert steps < MAX_STEPS_PER_INSTANT, f"no progress at {moment}: {deadlines}"
            self.now = moment
            if self.queue and self.queue[0][0] <= self.now:
                heapq.heappop(self.queue)[2]()
            for node in (self.a, self.b):
                if node.peer.next_deadline() <= self.now:
                    node.peer.on_time(self.now)
                    node.flush()
        self.now = until

    def lost(self, log, since, until):
        """Times of data sent in an interval that never arrived."""
        return [
            t
            for number, (t, node) in log.items()
            if since <= t <= until and number not in node.other.arrived
        ]


@pytest.fixture(scope="session")
def world():
    """The World class, to make one per example."""
    return World


@pytest.fixture(scope="session")
def networks():
    """LocalNetworks, for tests that need scopes."""
    return LocalNetworks
