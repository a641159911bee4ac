"""Edges that are broken or hostile, against our connector over QUIC: in the simulated internet,
where time jumps."""

from __future__ import annotations

import os
import random
import re
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from uuid import UUID

import pytest
import trio
from trio.testing import MockClock

from netlab.model import Host, Link, Server, Topology, Uplink
from netlab.simulated.internet import SimulatedInternet
from relay.edge.control import ControlServer, RegistrationRequested
from tests.fuzz.edge import REGISTRATION, EchoService
from tests.relay.edge.test_quic import make_edge_configuration
from tests.system.tunnel_world import until
from traversal.io.quic import QuicConnection
from traversal.io.quic_endpoints import QuicListener
from traversal.io.quic_stream import QuicError, QuicStream
from traversal.io.udp import bind_socket
from traversal.tunnel.edge_connection import DialFailedError, DialOptions, EdgeConnection
from traversal.tunnel.quic import CALL_SECONDS, HEAD_SECONDS, serve_quic
from traversal.tunnel.udp_flows import MAX_FLOWS, UdpFlows
from traversal.wire.address import Address
from traversal.wire.tunnel import rpc
from traversal.wire.tunnel.capnp import EMPTY, Struct
from traversal.wire.tunnel.connect import (
    DATA_PREAMBLE,
    MAX_HEAD_BYTES,
    METHOD_KEY,
    RPC_SIGNATURE,
    ConnectRequest,
    ConnectType,
)
from traversal.wire.tunnel.registration import ConnectionDetails, ConnectionRefusal

TOPOLOGY = Topology(
    hosts=(Host(name="near", uplinks=(Uplink(link=Link(delay_seconds=0.005)),)),),
    servers=(Server(name="far"),),
)
REQUEST = ConnectRequest(
    "https://app.example.com/", ConnectType.HTTP, ((METHOD_KEY, "POST"), ("HttpHeader:a", "b"))
).encode()
BODY = b"body " * 1000


class Service(EchoService):
    """With UDP flows, too."""

    def __init__(self) -> None:
        super().__init__()
        self.udp: UdpFlows = UdpFlows()  # type: ignore[assignment]  # None in the other


@dataclass
class HostileEdge:
    """The edge's end of a connection."""

    quic: QuicConnection
    control: QuicStream
    server: ControlServer = field(default_factory=lambda: ControlServer(now=0))

    async def register(self) -> None:
        """Take the connector."""
        while data := await self.control.receive():
            events = self.server.receive(data)
            for event in events:
                if isinstance(event, RegistrationRequested):
                    self.server.answer(ConnectionDetails(UUID(int=3), "lab01", False))
            await self.control.send(self.server.data_to_send())
            if events:
                return

    async def ask(self, body: bytes = BODY) -> bytes:
        """An honest request: all that comes back."""
        async with await self.quic.open_stream() as stream:
            await stream.send(REQUEST + body)
            await stream.send_end()
            return await read_all(stream)

    async def throw(self, data: bytes, *, is_end: bool = True) -> bytes:
        """Open a stream with these bytes: what comes back until the connector is done with it."""
        async with await self.quic.open_stream() as stream:
            try:
                await stream.send(data)
                if is_end:
                    await stream.send_end()
            except QuicError:
                pass  # refused before it was sent
            return await read_all(stream)


async def read_all(stream: QuicStream) -> bytes:
    data = b""
    try:
        while more := await stream.receive():
            data += more
    except QuicError:
        pass
    return data


Behaviour = Callable[[HostileEdge], Awaitable[None]]


@dataclass
class Result:
    """What became of a connection: registered, or the failure of its dialling."""

    service: Service = field(default_factory=Service)
    outcome: EdgeConnection | DialFailedError | None = None
    over: trio.Event = field(default_factory=trio.Event)
    is_done: trio.Event = field(default_factory=trio.Event)
    """Set when the edge's behaviour has come to its end."""

    async def connect(self, address: Address, ca_file: str) -> None:
        async with trio.open_nursery() as nursery:
            try:
                self.outcome = await nursery.start(
                    serve_quic, address, DialOptions(ca_file), REGISTRATION, self.service
                )
            except DialFailedError as error:
                self.outcome = error
        self.over.set()


@asynccontextmanager
async def connected(tmp_path: Path, behave: Behaviour) -> AsyncIterator[Result]:
    """A connector that connects once, and an edge that behaves so."""
    configuration = make_edge_configuration(tmp_path)
    result = Result()
    async with SimulatedInternet(TOPOLOGY) as lab, trio.open_nursery() as nursery:

        async def accept(listener: QuicListener) -> None:
            quic = await listener.accept()
            try:
                await behave(HostileEdge(quic, await quic.accept_stream()))
            except QuicError:
                pass  # the connector has closed
            result.is_done.set()

        async with lab.host("far"):
            address = lab.host("far").addresses[0]
            sock = await bind_socket(4, address, 0)
            listener = QuicListener(sock, configuration, entropy=os.urandom)
            await nursery.start(listener.run)
            nursery.start_soon(accept, listener)
        async with lab.host("near"):
            await nursery.start(result.service.udp.run)
            nursery.start_soon(
                result.connect, Address(address, listener.port), str(tmp_path / "ca")
            )
        yield result
        nursery.cancel_scope.cancel()


# --- Before the registration ---------------------------------------------------------------------


def answering(*parts: bytes) -> Behaviour:
    async def behave(edge: HostileEdge) -> None:
        for part in parts:
            await edge.control.send(part)
        await trio.sleep_forever()

    return behave


async def silence(edge: HostileEdge) -> None:
    await trio.sleep_forever()


async def reset_control(edge: HostileEdge) -> None:
    edge.control.reset(7)
    await trio.sleep_forever()


async def end_control(edge: HostileEdge) -> None:
    await edge.control.send_end()
    await trio.sleep_forever()


async def close(edge: HostileEdge) -> None:
    edge.quic.close(5, "go away")


async def refuse(edge: HostileEdge) -> None:
    while data := await edge.control.receive():
        for event in edge.server.receive(data):
            if isinstance(event, RegistrationRequested):
                edge.server.answer(ConnectionRefusal("no\n" * 10_000, 0))
        await edge.control.send(edge.server.data_to_send())


async def drop_by_drop(edge: HostileEdge) -> None:
    """One segment of a megabyte, which takes for ever."""
    await edge.control.send(struct.pack("<II", 0, (1 << 17) - 1))
    while True:
        await edge.control.send(bytes(100))
        await trio.sleep(0.1)


async def endless(edge: HostileEdge) -> None:
    message = rpc.Return(77, EMPTY).encode() * 1000
    while True:
        await edge.control.send(message)


BEFORE = {
    "silence": (silence, "did not answer to the registration within 5 s"),
    "reset": (reset_control, ""),
    "end": (end_control, ""),
    "close": (close, "go away"),
    "garbage": (answering(b"\xff" * 1000), ""),
    "answers-to-nothing": (answering(rpc.Return(5, EMPTY).encode()), ""),
    "drop-by-drop": (drop_by_drop, "did not answer to the registration within 5 s"),
    "endless": (endless, ""),
    "refusal": (refuse, "no"),
}


@pytest.mark.parametrize("name", BEFORE)
async def test_before_the_registration(
    name: str, tmp_path: Path, autojump_clock: MockClock
) -> None:
    """Whatever an edge does instead of taking the connector, dialling fails within seconds."""
    behave, reason = BEFORE[name]
    async with connected(tmp_path, behave) as result:
        with trio.fail_after(10):
            await result.over.wait()
        assert isinstance(result.outcome, DialFailedError)
        assert re.search(reason, str(result.outcome)), result.outcome
        assert len(str(result.outcome)) < 400


# --- After it ------------------------------------------------------------------------------------


def framed(*words: int, segments: int = 1) -> bytes:
    """A data stream's head with a message of these words, in one segment."""
    table = struct.pack("<II", segments - 1, len(words))
    return DATA_PREAMBLE + table + b"".join(struct.pack("<Q", word) for word in words)


def far_pointer_loop() -> bytes:
    return framed(0x2)


def deep_pointers() -> bytes:
    """A struct with one pointer, to a struct with one pointer, and so on."""
    one = 0x0001_0000_0000_0000
    return framed(*[one] * 5000)


def amplifier() -> bytes:
    """A list of half a billion empty structs, in three words."""
    root = 0x0001_0000_0000_0000
    pointer = 0x1 | (7 << 32)
    tag = ((1 << 29) - 1) << 2
    return framed(root, pointer, tag)


CALL = rpc.Call(1, rpc.ImportedCapability(0), 0x1234, 99, Struct()).encode()

HEADS = {
    "half-a-signature": DATA_PREAMBLE[:3],
    "another-signature": b"GET / HTTP/1.1\r\n\r\n",
    "only-a-preamble": DATA_PREAMBLE,
    "half-a-request": REQUEST[: len(REQUEST) // 2],
    "many-segments": DATA_PREAMBLE + struct.pack("<I", 0xFFFF_FFFE) + bytes(100),
    "too-long": DATA_PREAMBLE + struct.pack("<II", 0, MAX_HEAD_BYTES) + bytes(MAX_HEAD_BYTES),
    "far-pointer": far_pointer_loop(),
    "deep-pointers": deep_pointers(),
    "amplifier": amplifier(),
    "unknown-type": REQUEST[:-8] + b"\xff" * 8,
    "call-garbage": RPC_SIGNATURE + b"\xff" * 1000,
    "call-of-nothing": RPC_SIGNATURE + CALL,
    "call-half": RPC_SIGNATURE + CALL[:-9],
}


@pytest.mark.parametrize("is_end", [True, False], ids=["ended", "open"])
@pytest.mark.parametrize("name", HEADS)
async def test_heads(name: str, is_end: bool, tmp_path: Path, autojump_clock: MockClock) -> None:
    """A stream whose head is broken, or never complete, is given up in time; others are served
    meanwhile and afterwards."""
    answers: list[bytes] = []
    took = 0.0

    async def behave(edge: HostileEdge) -> None:
        nonlocal took
        await edge.register()
        async with trio.open_nursery() as nursery:

            async def throw() -> None:
                nonlocal took
                began = trio.current_time()
                await edge.throw(HEADS[name], is_end=is_end)
                took = trio.current_time() - began

            nursery.start_soon(throw)
            answers.append(await edge.ask())
        answers.append(await edge.ask())

    async with connected(tmp_path, behave) as result:
        with trio.fail_after(60):
            await result.is_done.wait()
        assert all(answer.endswith(BODY) for answer in answers)
        assert len(answers) == 2
        assert took <= HEAD_SECONDS + CALL_SECONDS + 1
        await until(lambda: not result.service.active)
        assert isinstance(result.outcome, EdgeConnection)
        assert not result.over.is_set()


async def reset_bodies(edge: HostileEdge) -> None:
    """Exchanges that the edge gives up in the middle, in every way."""
    for number in range(200):
        stream = await edge.quic.open_stream()
        await stream.send(REQUEST + BODY)
        if number % 2:
            await stream.receive()
        match number % 3:
            case 0:
                stream.reset(1)
                await read_all(stream)
            case 1:
                stream.stop(1)
                await stream.send_end()
            case _:
                stream.abort(1)


async def silent_streams(edge: HostileEdge) -> None:
    """Streams that say nothing, by the thousand."""
    streams = [await edge.quic.open_stream() for _ in range(2000)]
    for stream in streams:
        await stream.send(b"\x0a")
    assert (await edge.ask()).endswith(BODY)
    await trio.sleep(HEAD_SECONDS + 1)
    for stream in streams:
        with trio.fail_after(1):
            assert await read_all(stream) == b""


async def unread_answers(edge: HostileEdge) -> None:
    """Requests whose answers nobody reads stall nobody else."""
    streams = [await edge.quic.open_stream() for _ in range(10)]

    async def send(stream: QuicStream) -> None:
        with trio.move_on_after(2):
            await stream.send(bytes(1_000_000))

    async with trio.open_nursery() as nursery:
        for stream in streams:
            await stream.send(REQUEST)
            nursery.start_soon(send, stream)
        await trio.sleep(1)
        assert (await edge.ask()).endswith(BODY)
    for stream in streams:
        stream.abort()


async def datagrams(edge: HostileEdge) -> None:
    """Datagrams of no flow, of no kind, and of random bytes."""
    generator = random.Random(1)
    for number in range(3000):
        kind = number % 8
        size = generator.randrange(1100)
        await edge.quic.wait_datagram_room()
        edge.quic.send_datagram(bytes([kind])[: size + 1] + generator.randbytes(size))
    assert (await edge.ask()).endswith(BODY)


async def control_garbage(edge: HostileEdge) -> None:
    """The connection is to be replaced, but what it serves goes on."""
    stream = await edge.quic.open_stream()
    await stream.send(REQUEST)
    await stream.receive()
    await edge.control.send(b"\xff" * 100)
    await trio.sleep(1)
    await stream.send(BODY)
    await stream.send_end()
    assert (await read_all(stream)).endswith(BODY)


AFTER = [reset_bodies, silent_streams, unread_answers, datagrams, control_garbage]


@pytest.mark.parametrize("attack", AFTER, ids=lambda attack: attack.__name__)
async def test_after_the_registration(
    attack: Behaviour, tmp_path: Path, autojump_clock: MockClock
) -> None:
    """What an edge gives up, leaves open or makes up costs the connector nothing in the end."""
    problem: BaseException | None = None

    async def behave(edge: HostileEdge) -> None:
        nonlocal problem
        await edge.register()
        try:
            await attack(edge)
        except (AssertionError, QuicError, trio.TooSlowError) as error:
            problem = error

    async with connected(tmp_path, behave) as result:
        with trio.fail_after(120):
            await result.is_done.wait()
        assert problem is None, repr(problem)
        with trio.fail_after(HEAD_SECONDS + 1):
            await until(lambda: not result.service.active)
        connection = result.outcome
        assert isinstance(connection, EdgeConnection)
        assert connection.active == 0
        assert not result.over.is_set()
        assert connection.leaving.is_set() == (attack is control_garbage)
        assert len(result.service.udp) <= MAX_FLOWS
        assert (result.service.udp.dropped > 2000) == (attack is datagrams)


async def test_an_edge_that_vanishes(tmp_path: Path, autojump_clock: MockClock) -> None:
    """A connection that is closed with exchanges under way ends them, and itself."""

    async def behave(edge: HostileEdge) -> None:
        await edge.register()
        for _ in range(50):
            await (await edge.quic.open_stream()).send(REQUEST + BODY)
        await trio.sleep(1)
        edge.quic.close(9, "bye")

    async with connected(tmp_path, behave) as result:
        with trio.fail_after(10):
            await result.over.wait()
        assert isinstance(result.outcome, EdgeConnection)
        assert result.service.served == 50
        assert (result.service.active, result.outcome.active) == (0, 0)
        assert "bye" in result.outcome.failure
