"""Two nodes behind modeled NATs, a relay, a STUN server and the time: for tests of port searches.

NATs are `netlab`'s, the ones that the simulated internet and the TUN engine use. Each node is a
peer's machine and a puncher, joined as a shell joins them.
"""

from __future__ import annotations

import heapq
import itertools
import random
from dataclasses import dataclass
from ipaddress import IPv4Address

from netlab.behavior import (
    Filtering,
    Lifetimes,
    Mapping,
    NatBehavior,
    PortAllocation,
    PortAssignment,
)
from netlab.nat import Protocol, Translated, Translator
from tests.traversal.paths.conftest import StockPeer
from traversal.paths.effects import (
    PathState,
    RefreshEndpoints,
    SendCallMeMaybe,
    SendPing,
    SendPong,
)
from traversal.paths.peer import Peer
from traversal.paths.punch_effects import (
    AdoptSocket,
    CloseSockets,
    MapPort,
    MeasureMapping,
    OpenSockets,
    SearchEnded,
    SendProbe,
    SendProbePong,
    SendPunchMessage,
)
from traversal.paths.punch_memory import PunchMemory
from traversal.paths.punch_strategy import OwnSide, PeerSide, PunchPolicy
from traversal.paths.punching import Puncher
from traversal.paths.report import NatFacts, classify_ports
from traversal.paths.scoring import Path
from traversal.wire.address import Address
from traversal.wire.introduction import FilteringClass, MappingClass
from traversal.wire.punching import parse_punch_message

STUN = Address("192.0.2.1", 3478)
HOME = Lifetimes(udp_seconds=120.0, udp_unreplied_seconds=30.0)
EASY = NatBehavior(lifetimes=HOME)
EASY_ADF = NatBehavior(filtering=Filtering.ADF, lifetimes=HOME)
OPEN = NatBehavior(filtering=Filtering.EIF, lifetimes=HOME)


def hard(assignment=PortAssignment.RANDOM, **options) -> NatBehavior:
    """A NAT with a port per destination."""
    return NatBehavior(
        mapping=Mapping.APDM, lifetimes=HOME, ports=PortAllocation(assignment=assignment, **options)
    )


RANDOM = hard()
SEQUENTIAL = hard(PortAssignment.SEQUENTIAL)
STEPWISE = hard(PortAssignment.SEQUENTIAL, step=2)
PRESERVING = hard(PortAssignment.PRESERVE_ELSE_RANDOM)
BLOCKS = hard(block_size=512)
BIG_BLOCKS = hard(block_size=2048)

_MAPPINGS = {
    Mapping.EIM: MappingClass.ENDPOINT_INDEPENDENT,
    Mapping.ADM: MappingClass.ADDRESS_DEPENDENT,
    Mapping.APDM: MappingClass.ADDRESS_AND_PORT_DEPENDENT,
}
_FILTERINGS = {
    Filtering.EIF: FilteringClass.ENDPOINT_INDEPENDENT,
    Filtering.ADF: FilteringClass.ADDRESS_DEPENDENT,
    Filtering.APDF: FilteringClass.ADDRESS_AND_PORT_DEPENDENT,
}
LOCAL = IPv4Address("10.0.0.2").packed
NEIGHBOR = IPv4Address("10.0.0.9").packed
MAIN_PORT = 41641


class Node:
    """One end."""

    def __init__(self, arena, name, behavior, public, *, is_stock=False, policy=None, memory=None):
        self.arena, self.name = arena, name
        rng = random.Random(f"{arena.seed}{name}")
        self.rng = rng
        self.nat = Translator(behavior, [IPv4Address(public).packed], generator=rng)
        # A carrier's NAT serves others too: their blocks come first.
        for other in range(rng.randrange(1, 20)):
            host = IPv4Address(f"10.0.1.{other}").packed
            self.nat.outbound(Protocol.UDP, host, 5000, LOCAL, 53, arena.now)
        self.is_stock = is_stock
        self.memory = memory or PunchMemory()
        self.peer = StockPeer(rng.randbytes) if is_stock else Peer(rng.randbytes)
        self.session = rng.randbytes(8)
        self.puncher = None
        if not is_stock:
            self.puncher = Puncher(rng.randbytes, self.session, name.encode(), self.memory, policy)
        self.ports = {None: MAIN_PORT}
        self.sockets = {MAIN_PORT: None}
        self.adopted = None
        self.direct_at = None
        self.effects = []
        self.packets = 0
        self.sent_at = []
        self.peak_sockets = 0
        self.facts = self.measure(behavior)

    def measure(self, behavior):
        """What a net check says."""
        samples = []
        for local in range(50000, 50006):
            mapped = self.translate(local, STUN)
            samples.append((local, mapped.port))
        nat = NatFacts(
            _MAPPINGS[behavior.mapping],
            _FILTERINGS[behavior.filtering],
            classify_ports(samples),
        )
        self.reflexive = self.translate(MAIN_PORT, STUN)
        return OwnSide(
            nat=nat,
            addresses=(self.reflexive,),
            listed=(self.reflexive, Address("10.0.0.2", MAIN_PORT)),
            port_samples=tuple(mapped for _, mapped in samples),
            fingerprint="home",
        )

    def translate(self, local_port, to):
        out = self.nat.outbound(
            Protocol.UDP, LOCAL, local_port, IPv4Address(to.host).packed, to.port, self.arena.now
        )
        if not isinstance(out, Translated):
            return None
        return Address(str(IPv4Address(out.source)), out.source_port)

    def background(self, rate):
        """Other hosts behind the same NAT start `rate` flows a second."""

        def step():
            port = 1024 + next(self.arena.order) % 60000
            self.nat.outbound(Protocol.UDP, NEIGHBOR, port, STUN_BYTES, 53, self.arena.now)
            self.arena.later(self.rng.expovariate(rate), step)

        self.arena.later(self.rng.expovariate(rate), step)

    def send(self, socket, to, message):
        if socket not in self.ports:
            return
        self.packets += 1
        self.sent_at.append(self.arena.now)
        source = self.translate(self.ports[socket], to)
        arena = self.arena
        if source is None or arena.random.random() < arena.loss:
            return
        if to == STUN:
            arena.later(arena.delay, lambda: self.puncher_call("handle_mapping", socket, source))
            return
        other = self.other
        arena.later(arena.one_way(), lambda: other.arrive(source, to, message))

    def arrive(self, source, to, message):
        into = self.nat.inbound(
            Protocol.UDP, IPv4Address(source.host).packed, source.port,
            IPv4Address(to.host).packed, to.port, self.arena.now,
        )  # fmt: skip
        if isinstance(into, Translated) and into.destination == LOCAL:
            socket = self.sockets.get(into.destination_port, "closed")
            if socket != "closed":
                self.receive(socket, message, source)

    def socket_for(self, address):
        return self.adopted[0] if self.adopted and self.adopted[1] == address else None

    def receive(self, socket, message, source):
        now = self.arena.now
        is_peers = socket is None or (self.adopted is not None and socket == self.adopted[0])
        match message:
            case ("ping", transaction_id) if source is None:
                self.peer.handle_relay_ping(transaction_id, 900)
            case ("ping", transaction_id) if is_peers:
                self.peer.handle_ping(transaction_id, Path(source), now)
            case ("ping", transaction_id):
                self.puncher.handle_ping(socket, transaction_id, source, now)
            case ("pong", transaction_id, seen_as):
                is_known = is_peers and self.peer.handle_pong(transaction_id, source, seen_as, now)
                if not is_known and self.puncher is not None:
                    self.puncher.handle_pong(transaction_id, seen_as, now)
            case ("call", addresses):
                self.peer.handle_call_me_maybe(addresses, now)
            case ("punch", data) if self.puncher is not None:
                self.puncher.handle_message(parse_punch_message(data), now)
            case "data":
                self.peer.received += 1
        self.flush()

    def puncher_call(self, name, *arguments):
        getattr(self.puncher, name)(*arguments, self.arena.now)
        self.flush()

    def flush(self):
        now = self.arena.now
        while True:
            effects = self.peer.poll_effects()
            if self.puncher is not None:
                effects = [*effects, *self.puncher.poll_effects()]
            for effect in effects:
                self.carry_out(effect)
            if not effects:
                break
        state = self.peer.state
        is_direct = state is PathState.DIRECT
        if is_direct and self.direct_at is None:
            self.direct_at = now
        if self.puncher is not None:
            is_wanted = state in (PathState.RELAY, PathState.DOUBT)
            self.puncher.handle_route(is_wanted=is_wanted, is_direct=is_direct, now=now)
            effects = self.puncher.poll_effects()
            for effect in effects:
                self.carry_out(effect)
            if effects:
                self.flush()

    def carry_out(self, effect):
        now, arena = self.arena.now, self.arena
        self.effects.append((now, effect))
        match effect:
            case SendPing(path, transaction_id):
                self.send(self.socket_for(path.address), path.address, ("ping", transaction_id))
            case SendPong(None, transaction_id, source):
                arena.relay(self, ("pong", transaction_id, source))
            case SendPong(path, transaction_id, source):
                socket = self.socket_for(path.address)
                self.send(socket, path.address, ("pong", transaction_id, source))
            case SendCallMeMaybe(addresses):
                arena.relay(self, ("call", addresses))
            case SendPunchMessage(message):
                arena.relay(self, ("punch", message.encode()))
            case SendProbe(socket, address, transaction_id):
                self.send(socket, address, ("ping", transaction_id))
            case SendProbePong(socket, address, transaction_id):
                self.send(socket, address, ("pong", transaction_id, address))
            case MeasureMapping(socket):
                self.send(socket, STUN, "stun")
            case OpenSockets(count, batch):
                ports = self.rng.sample(range(32768, 41000), count)
                for number, port in enumerate(ports):
                    self.ports[number] = port
                    self.sockets[port] = number
                self.peak_sockets = max(self.peak_sockets, len(self.ports) - 1)
                arena.later(0.0, lambda: self.puncher_call("handle_opened", batch, tuple(ports)))
            case CloseSockets(sockets):
                for socket in sockets:
                    self.sockets.pop(self.ports.pop(socket, None), None)
                    if self.adopted is not None and self.adopted[0] == socket:
                        self.adopted = None
            case AdoptSocket(socket, remote, _, latency):
                if socket is not None:
                    self.adopted = (socket, remote)
                self.tell_own_addresses()
                self.peer.handle_found(remote, latency, now)
            case RefreshEndpoints():
                arena.later(0.05, self.refresh)
            case MapPort() | SearchEnded():
                pass

    def tell_own_addresses(self):
        extra = self.puncher.own_extra if self.puncher is not None else ()
        self.peer.set_own_addresses((*self.facts.listed, *extra), self.arena.now)

    def refresh(self):
        self.tell_own_addresses()
        self.flush()

    def talk(self, every=0.1, until=float("inf")):
        def step():
            if self.arena.now > until:
                return
            route = self.peer.route
            if route.path is not None:
                self.send(self.socket_for(route.path.address), route.path.address, "data")
            self.peer.sent += 1
            if route.wake:
                self.peer.handle_send(self.arena.now)
                self.flush()
            self.arena.later(every, step)

        self.arena.later(0.0, step)

    def deadline(self):
        own = self.puncher.next_deadline() if self.puncher is not None else float("inf")
        return min(own, self.peer.next_deadline())

    def on_time(self):
        if self.peer.next_deadline() <= self.arena.now:
            self.peer.on_time(self.arena.now)
        if self.puncher is not None and self.puncher.next_deadline() <= self.arena.now:
            self.puncher.on_time(self.arena.now)
        self.flush()

    def count(self, kind):
        return sum(isinstance(effect, kind) for _, effect in self.effects)


STUN_BYTES = IPv4Address(STUN.host).packed


class Arena:
    """Nodes `a` and `b`; both know each other from the start, as after an introduction."""

    def __init__(
        self, a, b, *, seed=0, stock_b=False, background=0.0, loss=0.0, policy=None, knows=True,
        delay=0.03, relay_delay=0.05, memory=None,
    ):  # fmt: skip
        self.seed, self.now, self.loss = seed, 0.0, loss
        self.delay, self.relay_delay = delay, relay_delay
        self.random = random.Random(seed)
        self.queue, self.order = [], itertools.count()
        policy = policy or PunchPolicy(allows_stock=True)
        self.a = Node(self, "a", a, "198.51.100.1", policy=policy, memory=memory)
        self.b = Node(self, "b", b, "203.0.113.2", is_stock=stock_b, policy=policy)
        self.a.other, self.b.other = self.b, self.a
        for node in (self.a, self.b):
            if background:
                node.background(background)
            node.tell_own_addresses()
            node.peer.set_configured_addresses(node.other.facts.listed, 0.0)
        if knows:
            self.introduce()

    def introduce(self):
        for node in (self.a, self.b):
            if node.puncher is not None:
                other = node.other
                node.puncher.set_own_side(node.facts, self.now)
                if other.is_stock:
                    side = PeerSide(addresses=other.facts.listed)
                else:
                    # An introduction carries classes, no port pattern.
                    nat = NatFacts(other.facts.nat.mapping, other.facts.nat.filtering)
                    side = PeerSide(nat, other.facts.listed, other.session, can_search=True)
                node.puncher.set_peer_side(side, self.now)
                node.flush()

    def one_way(self):
        return self.delay * (1 + 0.1 * self.random.random())

    def later(self, seconds, action):
        heapq.heappush(self.queue, (self.now + seconds, next(self.order), action))

    def relay(self, node, message):
        self.later(self.relay_delay, lambda: node.other.receive(None, message, None))

    def run(self, until, stop=lambda: False):
        steps, instant = 0, None
        while not stop():
            nodes = (self.a, self.b)
            upcoming = min(node.deadline() for node in nodes)
            if self.queue:
                upcoming = min(upcoming, self.queue[0][0])
            if upcoming > until:
                self.now = until
                return
            self.now = max(self.now, upcoming)
            steps = steps + 1 if self.now == instant else 0
            instant = self.now
            assert steps < 3000, f"no progress at {instant}"
            if self.queue and self.queue[0][0] <= self.now:
                heapq.heappop(self.queue)[2]()
            for node in nodes:
                if node.deadline() <= self.now:
                    node.on_time()

    @property
    def is_direct(self):
        return all(node.direct_at is not None for node in (self.a, self.b))

    def until_direct(self, until=30.0):
        """Run until both nodes send directly; the time, or None."""
        self.run(until, stop=lambda: self.is_direct)
        if not self.is_direct:
            return None
        return max(self.a.direct_at, self.b.direct_at)


@dataclass(frozen=True)
class Cell:
    """One row of the goals."""

    name: str
    a: NatBehavior
    b: NatBehavior
    goal: str
    talkers: str = "ab"
    stock_b: bool = False
    background: float = 0.0
    loss: float = 0.0

    def play(self, seed):
        """One run; returns the arena and the time to direct, or None."""
        arena = Arena(
            self.a, self.b, seed=seed, stock_b=self.stock_b, background=self.background,
            loss=self.loss,
        )  # fmt: skip
        for name in self.talkers:
            getattr(arena, name).talk()
        return arena, arena.until_direct()


PUNCHED = "95 %, median 3 s, 95th 6 s"
CELLS = [
    Cell("random x port-restricted, hard side talks", RANDOM, EASY, PUNCHED, "a"),
    Cell("random x port-restricted, easy side talks", RANDOM, EASY, PUNCHED, "b"),
    Cell("random x port-restricted, both talk", RANDOM, EASY, PUNCHED),
    Cell("the same, 5 % loss", RANDOM, EASY, PUNCHED, loss=0.05),
    Cell("random x stock port-restricted", RANDOM, EASY, "95 %, median 5 s", "a", stock_b=True),
    Cell("sequential x stock port-restricted", SEQUENTIAL, EASY, "95 %, median 5 s", stock_b=True),
    Cell("sequential x port-restricted, 20 flows/s", SEQUENTIAL, EASY, "90 %, median 3 s",
         background=20.0),
    Cell("sequential x port-restricted, 100 flows/s", SEQUENTIAL, EASY, "90 %, median 3 s",
         background=100.0),
    Cell("stepwise (2) x port-restricted, 20 flows/s", STEPWISE, EASY, "90 %, median 3 s",
         background=20.0),
    Cell("sequential x sequential, 20 flows/s", SEQUENTIAL, SEQUENTIAL, "90 %, median 3 s",
         background=20.0),
    Cell("sequential x sequential, 50 flows/s", SEQUENTIAL, SEQUENTIAL, "90 %, median 3 s",
         background=50.0),
    Cell("sequential x stepwise, one talks, 20 flows/s", SEQUENTIAL, STEPWISE, "90 %, median 3 s",
         "b", background=20.0),
    Cell("preserving hard x port-restricted", PRESERVING, EASY, "90 %, median 3 s"),
    Cell("CGNAT block of 512 x port-restricted", BLOCKS, EASY, "95 %"),
    Cell("CGNAT block of 2048 x port-restricted", BIG_BLOCKS, EASY, "95 %"),
    Cell("plain: port-restricted x port-restricted", EASY, EASY, "as fast as before"),
    Cell("plain: random x address-restricted", RANDOM, EASY_ADF, "as fast as before"),
    Cell("plain: random x open filter", RANDOM, OPEN, "as fast as before"),
]  # fmt: skip
