"""UDP flows over one connection of a connector: datagrams of version 2 or 3 (edge tunnel
specification 9).

Version 3 registers a flow with a datagram, which may get lost: it is repeated until answered, which
is harmless. A flow can go over to another connection of the same connector, where the socket behind
it stays the same (version 3); the connector of a connection that was lost opens a new one.
"""

from __future__ import annotations

import ipaddress
import logging
import math
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Final
from uuid import UUID

import trio

from relay.edge.connection import ConnectionFailedError, UdpFlow
from traversal.io.quic import QuicConnection
from traversal.io.quic_stream import QuicError
from traversal.wire.tunnel import rpc
from traversal.wire.tunnel.capnp import Struct
from traversal.wire.tunnel.datagrams import (
    DEFAULT_IDLE_SECONDS,
    MAX_IDLE_SECONDS,
    MAX_PAYLOAD_BYTES,
    FlowAnswer,
    FlowCode,
    FlowPayload,
    RegisterFlow,
    encode_payload2,
    encode_payload3,
    maybe_parse_datagram2,
    parse_datagram3,
)
from traversal.wire.tunnel.errors import TunnelError
from traversal.wire.tunnel.sessions import (
    RegisterUdpSession,
    RegisterUdpSessionResponse,
    SessionMethod,
    UnregisterUdpSession,
)

logger = logging.getLogger("underpass.relay.edge.flows")

MAX_FLOWS: Final = 1024
"""On one connection; each is a socket of the connector's."""
MAX_WAITING: Final = 512
"""Datagrams of a flow that nobody has taken yet; beyond it the oldest is dropped. As the reference
does on its side."""
REGISTRATION_SECONDS: Final = 5.0
FIRST_REPEAT_SECONDS: Final = 0.25
"""Doubled each time."""
REFRESH_SECONDS: Final = 2.0
"""A flow of version 3 that has heard nothing for as long is registered again with its next
datagram. The connector may have lost it without a word: it restarted, or the destination's answer
was longer than the path's MTU as far as it was known (the reference ends the flow then)."""
UNREGISTER_SECONDS: Final = 2.0

Call = Callable[[int, int, Struct], Awaitable[Struct]]
"""Calls a method (interface, method, parameters) of the connector. Raises ConnectionFailedError."""


class Flow(UdpFlow):
    """One flow; `carrier` is where it is now."""

    def __init__(
        self, carrier: Flows, flow_id: UUID, host: str, port: int, idle_seconds: float
    ) -> None:
        self.carrier = carrier
        self.flow_id = flow_id
        self.host = host
        self.port = port
        self.idle_seconds = idle_seconds
        self.alive_at = -math.inf
        """When the connector showed, or was asked to show, that it has the flow."""
        self._failure: str | None = None
        self._waiting: deque[bytes] = deque(maxlen=MAX_WAITING)
        self._readers = trio.lowlevel.ParkingLot()

    async def send(self, data: bytes) -> None:
        """Send a datagram. Raises ConnectionFailedError where the flow is over."""
        await trio.lowlevel.checkpoint_if_cancelled()
        self._check()
        self.carrier.send(self, data)

    async def receive(self) -> bytes:
        """The next datagram. Raises ConnectionFailedError where the flow is over."""
        await trio.lowlevel.checkpoint_if_cancelled()
        while not self._waiting:
            self._check()
            await self._readers.park()
        return self._waiting.popleft()

    def close(self) -> None:
        """Forget the flow; harmless when repeated."""
        if self._failure is None:
            self.fail("we closed it")
            self.carrier.forget(self, tell=True)

    def deliver(self, data: bytes) -> None:
        """A datagram came."""
        self.alive_at = trio.current_time()
        self._waiting.append(data)
        self._readers.unpark()

    def fail(self, reason: str) -> None:
        """The flow is over."""
        if self._failure is None:
            self._failure = reason
            self._readers.unpark_all()

    def _check(self) -> None:
        if self._failure is not None:
            raise ConnectionFailedError(f"the UDP flow is over: {self._failure}")


class Flows:
    """The flows of one connection. Run `run` in a task.

    Attributes:
        version: of the datagrams, 2 or 3.
        dropped: datagrams that were too long, malformed, or of no flow.
    """

    def __init__(
        self, quic: QuicConnection, version: int, call: Call, new_id: Callable[[], UUID]
    ) -> None:
        self.version = version
        self.dropped = 0
        self._quic = quic
        self._call = call
        self._new_id = new_id
        self._flows: dict[UUID, Flow] = {}
        self._answers: dict[UUID, FlowAnswer | None] = {}
        self._answered = trio.lowlevel.ParkingLot()
        self._to_unregister: deque[UUID] = deque(maxlen=MAX_FLOWS)
        self._has_to_unregister = trio.Event()

    def __len__(self) -> int:
        return len(self._flows)

    async def run(self) -> None:
        """Carry datagrams until the connection is over."""
        async with trio.open_nursery() as nursery:
            if self.version == 2:
                nursery.start_soon(self._unregister)
            try:
                while True:
                    for datagram in await self._quic.receive_datagrams():
                        self._handle(datagram)
            except QuicError:
                self._answered.unpark_all()
            nursery.cancel_scope.cancel()

    async def open(self, destination: str, idle_seconds: float) -> Flow:
        """A new flow to `IP:port`. Raises ConnectionFailedError."""
        host, _, port = destination.rpartition(":")
        try:
            address = ipaddress.ip_address(host.strip("[]"))
            flow = Flow(self, self._new_id(), str(address), int(port), idle_seconds)
        except ValueError:
            raise ConnectionFailedError(
                f"{destination!r} is no IP address and port", is_unprocessed=True
            ) from None
        await self.adopt(flow)
        return flow

    async def adopt(self, flow: Flow) -> None:
        """Have the flow here from now on. Raises ConnectionFailedError."""
        if len(self._flows) >= MAX_FLOWS:
            raise ConnectionFailedError(
                f"the connection has {MAX_FLOWS} UDP flows", is_unprocessed=True
            )
        self._flows[flow.flow_id] = flow
        try:
            with trio.fail_after(REGISTRATION_SECONDS):
                await (self._register2(flow) if self.version == 2 else self._register3(flow))
        except BaseException as error:
            self._flows.pop(flow.flow_id, None)
            if isinstance(error, trio.TooSlowError):
                raise ConnectionFailedError("the connector does not open a UDP flow") from None
            raise
        former, flow.carrier = flow.carrier, self
        if former is not self:
            former.forget(flow, tell=False)

    async def move_to(self, others: Flows) -> None:
        """Give all flows to another connection; those that it can't have are over."""
        async with trio.open_nursery() as nursery:
            for flow in list(self._flows.values()):
                nursery.start_soon(self._move, flow, others)

    async def _move(self, flow: Flow, others: Flows) -> None:
        try:
            await others.adopt(flow)
        except ConnectionFailedError as error:
            flow.fail(str(error))

    def fail(self, reason: str) -> None:
        """Nobody carries these flows any more."""
        for flow in self._flows.values():
            flow.fail(reason)
        self._flows.clear()

    def send(self, flow: Flow, data: bytes) -> None:
        """Send a flow's datagram, or drop it."""
        if len(data) > MAX_PAYLOAD_BYTES:
            self.dropped += 1
            return
        if self.version == 2:
            self._send(encode_payload2(flow.flow_id, data))
            return
        now = trio.current_time()
        if now - flow.alive_at > REFRESH_SECONDS:
            flow.alive_at = now
            self._send(_registration(flow))
        self._send(encode_payload3(flow.flow_id, data))

    def forget(self, flow: Flow, *, tell: bool) -> None:
        """The flow is not here any more. Version 3 has no word for that: it ends by idling."""
        if self._flows.pop(flow.flow_id, None) is not None and tell and self.version == 2:
            self._to_unregister.append(flow.flow_id)
            self._has_to_unregister.set()

    def handle_unregistered(self, request: UnregisterUdpSession) -> None:
        """The connector ended a flow (version 2)."""
        flow = self._flows.pop(request.session_id, None)
        if flow is not None:
            flow.fail(request.message or "the connector ended it")

    def _send(self, datagram: bytes) -> None:
        try:
            self._quic.send_datagram(datagram)
        except QuicError:
            # Too long for the path, or the connection is over, which its session notices, too.
            self.dropped += 1

    def _handle(self, datagram: bytes) -> None:
        try:
            parse = maybe_parse_datagram2 if self.version == 2 else parse_datagram3
            message = parse(datagram)
        except TunnelError:
            self.dropped += 1
            return
        match message:
            case FlowPayload(flow_id, data) if flow_id in self._flows:
                self._flows[flow_id].deliver(data)
            case FlowAnswer(flow_id) if flow_id in self._answers:
                self._answers[flow_id] = message
                self._answered.unpark_all()
            case FlowAnswer(flow_id, FlowCode.OK) if flow_id in self._flows:
                pass  # repeated, or to a refresh
            case FlowAnswer(flow_id) if flow_id in self._flows:
                self._flows.pop(flow_id).fail(_refusal(message))
            case _:
                self.dropped += 1

    async def _register2(self, flow: Flow) -> None:
        request = RegisterUdpSession(
            flow.flow_id, flow.host, flow.port, int(flow.idle_seconds * 1e9)
        )
        results = await self._call(
            rpc.SESSION_MANAGER, SessionMethod.REGISTER_UDP_SESSION, request.to_struct()
        )
        try:
            response = RegisterUdpSessionResponse.from_struct(results)
        except TunnelError as error:
            raise ConnectionFailedError(str(error)) from None
        if response.error:
            raise ConnectionFailedError(f"the connector opens no flow: {response.error}")

    async def _register3(self, flow: Flow) -> None:
        try:
            datagram = _registration(flow)
        except TunnelError as error:
            raise ConnectionFailedError(str(error), is_unprocessed=True) from None
        self._answers[flow.flow_id] = None
        pause = FIRST_REPEAT_SECONDS
        try:
            while (answer := self._answers[flow.flow_id]) is None:
                if self._quic.failure is not None:
                    raise ConnectionFailedError(str(self._quic.failure), is_unprocessed=True)
                self._send(datagram)
                with trio.move_on_after(pause):
                    while self._answers[flow.flow_id] is None and self._quic.failure is None:
                        await self._answered.park()
                pause *= 2
        finally:
            del self._answers[flow.flow_id]
        if answer.code != FlowCode.OK:
            raise ConnectionFailedError(_refusal(answer))
        flow.alive_at = trio.current_time()

    async def _unregister(self) -> None:
        """Tell the connector of flows that we closed."""
        while True:
            await self._has_to_unregister.wait()
            self._has_to_unregister = trio.Event()
            while self._to_unregister:
                request = UnregisterUdpSession(self._to_unregister.popleft(), "closed by the edge")
                method = SessionMethod.UNREGISTER_UDP_SESSION
                try:
                    with trio.move_on_after(UNREGISTER_SECONDS):
                        await self._call(rpc.SESSION_MANAGER, method, request.to_struct())
                except ConnectionFailedError as error:
                    logger.debug("a UDP flow was not unregistered: %s", error)


def _registration(flow: Flow) -> bytes:
    """Raises TunnelError."""
    idle_seconds = min(math.ceil(flow.idle_seconds or DEFAULT_IDLE_SECONDS), MAX_IDLE_SECONDS)
    return RegisterFlow(flow.flow_id, flow.host, flow.port, idle_seconds).encode()


def _refusal(answer: FlowAnswer) -> str:
    return f"the connector opens no flow: {answer.text or f'code {answer.code}'}"
