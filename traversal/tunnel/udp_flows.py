"""UDP flows that the edge opens through a connector: datagrams of version 3 (edge tunnel
specification 9.2, 9.3).

Each flow is a socket of its own. It belongs to the connector, not to a connection: when
the edge registers it again over another one, its answers leave there from then on. It ends when it
has been idle, or with the connection that it is bound to.
"""

from __future__ import annotations

from collections import deque
from typing import Final, Protocol
from uuid import UUID

import trio

from traversal.io.udp import UdpSocket, bind_socket
from traversal.wire.tunnel.datagrams import (
    DEFAULT_IDLE_SECONDS,
    MAX_PAYLOAD_BYTES,
    FlowAnswer,
    FlowCode,
    FlowPayload,
    RegisterFlow,
    encode_payload3,
    parse_datagram3,
)
from traversal.wire.tunnel.errors import TunnelError

MAX_FLOWS: Final = 1024
"""Each is a file descriptor."""


class Carrier(Protocol):
    """A connection to the edge."""

    def send_datagram(self, data: bytes) -> None:
        """Send, or drop. Must not raise."""
        ...


class UdpFlows:
    """All flows of a connector. Run `run` in a task; then feed `handle`.

    Attributes:
        dropped: datagrams that were malformed, too long, or of no flow.
    """

    def __init__(self) -> None:
        self.dropped = 0
        self._flows: dict[UUID, _Flow] = {}
        self._to_open: deque[_Flow] = deque()
        self._has_to_open = trio.Event()
        self._buffer = bytearray(1 << 16)

    def __len__(self) -> int:
        return len(self._flows)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until cancelled."""
        async with trio.open_nursery() as nursery:
            task_status.started()
            while True:
                await self._has_to_open.wait()
                self._has_to_open = trio.Event()
                while self._to_open:
                    nursery.start_soon(self._serve, self._to_open.popleft())

    def handle(self, datagram: bytes, carrier: Carrier) -> None:
        """A datagram came from the edge over this connection."""
        try:
            message = parse_datagram3(datagram)
        except TunnelError:
            self.dropped += 1
            return
        match message:
            case FlowPayload(flow_id, data) if flow_id in self._flows:
                if not self._flows[flow_id].send(data):
                    self.dropped += 1
            case RegisterFlow():
                self._register(message, carrier)
            case _:
                self.dropped += 1

    def forget(self, carrier: Carrier) -> None:
        """This connection is over, and so are the flows that are bound to it."""
        for flow in list(self._flows.values()):
            if flow.carrier is carrier:
                flow.scope.cancel()

    def _register(self, request: RegisterFlow, carrier: Carrier) -> None:
        flow = self._flows.get(request.flow_id)
        if flow is not None:
            flow.carrier = carrier
            flow.touch()
            if flow.sock is not None:
                _answer(flow, FlowCode.OK)
        elif len(self._flows) >= MAX_FLOWS:
            carrier.send_datagram(FlowAnswer(request.flow_id, FlowCode.TOO_MANY).encode())
        else:
            flow = _Flow(request, carrier)
            self._flows[request.flow_id] = flow
            self._to_open.append(flow)
            self._has_to_open.set()

    async def _serve(self, flow: _Flow) -> None:
        host, port = flow.destination
        try:
            with flow.scope:
                try:
                    if ":" in host:
                        flow.sock = await bind_socket(6, "::", 0, self._buffer)
                    else:
                        flow.sock = await bind_socket(4, "0.0.0.0", 0, self._buffer)
                except OSError:
                    _answer(flow, FlowCode.CANNOT_BIND)
                    return
                _answer(flow, FlowCode.OK)
                while True:
                    for data, source in await flow.sock.receive():
                        if source == (host, port):
                            self._deliver(flow, data)
        except OSError:
            pass  # the socket broke; the edge registers the flow again when it is used
        finally:
            del self._flows[flow.flow_id]
            if flow.sock is not None:
                flow.sock.close()

    def _deliver(self, flow: _Flow, data: bytes) -> None:
        if len(data) > MAX_PAYLOAD_BYTES:
            self.dropped += 1
            return
        flow.touch()
        flow.carrier.send_datagram(encode_payload3(flow.flow_id, data))


class _Flow:
    def __init__(self, request: RegisterFlow, carrier: Carrier) -> None:
        self.flow_id = request.flow_id
        self.carrier = carrier
        self.destination = request.host, request.port
        self.sock: UdpSocket | None = None
        self.scope = trio.CancelScope()
        """Its deadline is when the flow has been idle for too long."""
        self._idle_seconds = request.idle_seconds or DEFAULT_IDLE_SECONDS
        self.touch()

    def touch(self) -> None:
        """The flow is in use."""
        self.scope.deadline = trio.current_time() + self._idle_seconds

    def send(self, data: bytes) -> bool:
        """Send to the destination; False where that was not possible."""
        self.touch()
        if self.sock is None:
            return False
        try:
            self.sock.send(data, self.destination)
        except OSError:  # no room, no route
            return False
        return True


def _answer(flow: _Flow, code: FlowCode) -> None:
    flow.carrier.send_datagram(FlowAnswer(flow.flow_id, code).encode())
