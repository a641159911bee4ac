"""State machines under arbitrary orders of hostile input: what a relay forwards, a peer relay, the
port mapper, and HTTP/1.1 visitors of the edge."""

from __future__ import annotations

import ipaddress
import random
from collections.abc import Callable
from typing import Any, Final

import trio

from relay.client import Client
from relay.edge.hygiene import Visitor
from relay.edge.visit import Visit, VisitorGoneError
from relay.edge.visit_http1 import BadHttpError, serve_http1
from tests.relay.test_forwarding import Bench, key
from traversal.io.stream import StreamEndedError
from traversal.keys import Box, DiscoPrivate, NodePublic
from traversal.paths.peer_relay_server import AllocationError, PeerRelayLimits, PeerRelayServer
from traversal.paths.portmap import PortMapper, RunUpnp
from traversal.wire import derp
from traversal.wire.address import Address
from traversal.wire.disco import AllocateRequest, Answer, Bind, seal_envelope
from traversal.wire.geneve import PROTOCOL_DISCO, Header
from traversal.wire.upnp import Service

MAX_TIMERS_AT_ONCE: Final = 50
LIMITS: Final = PeerRelayLimits(endpoints=6, endpoints_per_node=4)


class _Bytes:
    """Bytes as choices; zeros where they are used up, so that the last step is a whole one."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._position = 0

    def __bool__(self) -> bool:
        return self._position < len(self._data)

    def byte(self) -> int:
        return int.from_bytes(self.take(1), "big")

    def take(self, size: int) -> bytes:
        found = self._data[self._position : self._position + size]
        self._position += size
        return found


# --- Relay forwarding ----------------------------------------------------------------------------


def drive_switch(data: bytes) -> None:
    """Clients of all kinds come, send frames whole, cut and damaged, stall, and go."""
    source = _Bytes(data)
    bench = Bench(queue_depth=4, memory_bytes=4096)
    clients: list[Client] = []
    keys = [key(number) for number in range(1, 6)]
    while source:
        choice = source.byte()
        alive = [client for client in clients if not client.closed]
        if choice % 8 == 0 or not alive:
            clients.append(_connect(bench, keys[source.byte() % 5], source.byte()))
            continue
        client = alive[source.byte() % len(alive)]
        match choice % 8:
            case 1:
                bench.disconnect(client)
            case 2:
                client.blocked = True
            case 3:
                bench.unblock(client, 1 + source.byte())
            case 4:
                bench.read(client, source.take(source.byte()))
            case 5:
                frame = _frame(source, keys)
                cut = source.byte() % (len(frame) + 1)
                bench.read(client, frame[:cut])
                if not client.closed:
                    bench.read(client, frame[cut:] + _frame(source, keys))
            case _:
                bench.read(client, _frame(source, keys) + _frame(source, keys))
        bench.now += 0.1
        for waiting in clients:
            assert len(waiting.control or ()) <= 8192
            assert waiting.backlog is None or waiting.backlog.packets <= 8
        assert 0 <= bench.switch.outbox.waiting_bytes <= 4096
    for client in clients:
        bench.disconnect(client)
    assert bench.tables_are_empty()


def _connect(bench: Bench, public: NodePublic, kind: int) -> Client:
    permitted = frozenset({key(1).raw, key(2).raw}) if kind & 8 else None
    return bench.connect(
        public,
        is_mesh=kind & 3 in (1, 2),
        is_outgoing=kind & 3 == 2,
        is_sibling=kind & 7 in (5, 6),
        takes_notices=bool(kind & 16),
        permitted=permitted,
    )


def _frame(source: _Bytes, keys: list[NodePublic]) -> bytes:
    one, other = keys[source.byte() % 5], keys[source.byte() % 5]
    body = source.take(source.byte() % 80)
    match source.byte() % 10:
        case 0 | 1 | 2:
            return derp.encode_send_packet(one, body)
        case 3:
            return derp.encode_send_packet(one, derp.DISCO_MAGIC + bytes(56) + body)
        case 4:
            return derp.encode_forward_packet(one, other, body)
        case 5:
            return derp.encode_frame(derp.FrameType.WATCH_CONNS)
        case 6:
            return derp.encode_close_peer(one)
        case 7:
            return derp.encode_peer_present(one.raw, None, 0, 0)
        case 8:
            return derp.encode_peer_gone(one.raw, derp.GoneReason.DISCONNECTED)
        case _:
            return bytes([source.byte()]) + len(body).to_bytes(4, "big") + body


# --- A peer relay --------------------------------------------------------------------------------


def drive_peer_relay(data: bytes) -> None:
    """Clients who hold keys and strangers who don't; a sender never gets more than it sent."""
    source = _Bytes(data)
    rng = random.Random(1)
    own = DiscoPrivate.generate(rng.randbytes)
    server = PeerRelayServer(own, rng.randbytes, LIMITS)
    server.addresses = (Address("203.0.113.1", 7),)
    clients = [DiscoPrivate.generate(rng.randbytes) for _ in range(4)]
    boxes = [Box(client, own.public()) for client in clients]
    answers: list[bytes] = []
    now = 0.0
    while source:
        one, other = source.byte() % 4, source.byte() % 4
        address = ("198.51.100.1", 1 + source.byte() % 4)
        match source.byte() % 6:
            case 0:
                pair = clients[one].public(), clients[other].public()
                try:
                    server.allocate(key(1 + one), AllocateRequest(pair, 1 + source.byte()), now)
                except AllocationError:
                    pass
            case 1:
                now += source.byte() * 2
                if now >= server.next_deadline():
                    server.on_time(now)
            case 2 if answers:
                datagram = bytearray(answers[source.byte() % len(answers)])
                datagram[source.byte() % len(datagram)] ^= source.byte()
                _relay(server, bytes(datagram), address, now)
            case 3:
                datagram = Header(1 + source.byte() % 8, source.byte(), control=False).encode()
                _relay(server, datagram + source.take(source.byte()), address, now)
            case _:
                vni, proof = 1 + source.byte() % 8, source.take(32).ljust(32, b"\0")
                kind = Answer if source.byte() & 1 else Bind
                message = kind(vni, 1 + source.byte() % 3, clients[other].public(), proof)
                envelope = seal_envelope(
                    message, clients[one].public(), boxes[one], rng.randbytes(24)
                )
                datagram = Header(vni, PROTOCOL_DISCO, control=True).encode() + envelope
                answer = _relay(server, datagram, address, now)
                if answer is not None:
                    answers = [*answers[-8:], answer[0]]
        assert server.statistics().endpoints <= LIMITS.endpoints


def _relay(
    server: PeerRelayServer, datagram: bytes, address: tuple[str, int], now: float
) -> tuple[bytes, tuple[str, int]] | None:
    answer = server.handle_datagram(datagram, address, now)
    assert answer is None or len(answer[0]) <= len(datagram)
    return answer


# --- Port mapping --------------------------------------------------------------------------------


def drive_port_mapper(data: bytes) -> None:
    """A gateway, and strangers in its network, say anything at any time."""
    source = _Bytes(data)
    mapper = PortMapper(random.Random(1).randbytes)
    gateway = ipaddress.IPv4Address("192.168.1.1")
    now = 0.0
    runs: list[RunUpnp] = []
    while source:
        match source.byte() % 8:
            case 0:
                own = ipaddress.IPv4Address(0xC0A80102 + source.byte() % 2)
                mapper.set_network(gateway if source.byte() & 7 else None, own, 41641, now)
            case 1 | 2:
                host = str(gateway) if source.byte() & 3 else "192.168.1.77"
                port = 5351 if source.byte() & 3 else source.byte()
                mapper.handle_datagram(source.take(source.byte()), Address(host, port), now)
            case 3 if runs:
                service = Service("urn:x", "http://192.168.1.1/")
                external = Address("203.0.113.5", 1024 + source.byte())
                lease = int.from_bytes(source.take(4), "big")
                mapper.handle_upnp_mapped(runs.pop().attempt, service, external, lease, now)
            case 4 if runs:
                mapper.handle_upnp_failed(runs.pop().attempt, now)
            case 5:
                mapper.ask_now(now)
            case _:
                until = now + source.byte() ** 2 / 8
                at_once = 0
                while (deadline := mapper.next_deadline()) <= until:
                    at_once = at_once + 1 if deadline <= now else 0
                    assert at_once < MAX_TIMERS_AT_ONCE, f"a timer spins at {now}"
                    now = max(now, deadline)
                    mapper.on_time(now)
                    runs += [e for e in mapper.poll_effects() if isinstance(e, RunUpnp)]
                now = until
        runs = (runs + [e for e in mapper.poll_effects() if isinstance(e, RunUpnp)])[-8:]


# --- Visitors ------------------------------------------------------------------------------------


class _Memory:
    """The part of HandshakeStream that visits use; what is sent is thrown away."""

    def __init__(self, data: bytes) -> None:
        size = max(1, len(data) // 3)
        self._pieces = [data[at : at + size] for at in range(0, len(data), size)]

    async def receive(self) -> bytes:
        await trio.lowlevel.checkpoint()
        return self._pieces.pop(0) if self._pieces else b""

    async def send_all(self, data: bytes) -> None:
        await trio.lowlevel.checkpoint()

    async def send_eof(self) -> None:
        await trio.lowlevel.checkpoint()


async def _echo(visit: Visit) -> None:
    """What a proxy does with a visit, in short."""
    try:
        body = b""
        while visit.has_body and (piece := await visit.receive()):
            body += piece
        await visit.respond(200, ((b"content-length", b"%d" % len(body)),))
        if body:
            await visit.send(body)
        await visit.send_end()
    except VisitorGoneError:
        visit.abort()


def drive_visitor(data: bytes) -> None:
    """Everything that a visitor may send to the edge's HTTP/1.1 listener."""
    stream: Any = _Memory(data)
    serve: Callable[[], Any] = lambda: serve_http1(  # noqa: E731
        stream, Visitor("192.0.2.1", "http"), _echo, trio.Event()
    )
    try:
        trio.run(serve)
    except (BadHttpError, StreamEndedError):
        pass
