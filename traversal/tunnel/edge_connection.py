"""A connector's registered connection to an edge, the same over both transports."""

from __future__ import annotations

import ssl
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Protocol

import trio

from traversal.io.http2_engine import Http2Error
from traversal.io.quic_stream import QuicError
from traversal.printable import printable
from traversal.tunnel.control import (
    ControlClient,
    ControlEvent,
    Refused,
    Registered,
    ReportFailed,
    Unregistered,
)
from traversal.tunnel.exchange import Incoming
from traversal.tunnel.transport_choice import Transport
from traversal.tunnel.udp_flows import UdpFlows
from traversal.wire.address import Address
from traversal.wire.tunnel.errors import TunnelError
from traversal.wire.tunnel.registration import ConnectionDetails, RegisterConnection

REGISTRATION_SECONDS: Final = 5.0
"""For the edge's answer, as the reference."""
TRANSPORT_ERRORS: Final = (Http2Error, QuicError)
MAX_REASON: Final = 200
"""Characters of what an edge says, in a log."""


class DialFailedError(Exception):
    """There is no registered connection; the text says why. `is_unroutable`: there is no way to
    addresses of this family."""

    def __init__(self, text: str, *, is_unroutable: bool = False) -> None:
        super().__init__(text)
        self.is_unroutable = is_unroutable


class RegistrationRefusedError(DialFailedError):
    """The edge does not want us. `should_retry`: perhaps later."""

    def __init__(self, cause: str, *, should_retry: bool) -> None:
        super().__init__(f"the edge refused the registration: {_shown(cause)}")
        self.should_retry = should_retry


@dataclass(frozen=True, slots=True)
class DialOptions:
    """How to connect to edges.

    Attributes:
        ca_file: the authority that the edge's certificate comes from; None for the system's.
        make_context: TLS contexts for HTTP/2, instead of `ca_file`.
    """

    ca_file: str | None = None
    make_context: Callable[[], ssl.SSLContext] | None = None


class Service(Protocol):
    """What the connections of a connector serve."""

    udp: UdpFlows | None
    """UDP flows, which only QUIC has; None for none."""

    async def serve(self, incoming: Incoming) -> None:
        """Serve one exchange. Must raise nothing but Cancelled."""

    def update_configuration(self, version: int, document: bytes) -> tuple[int, str]:
        """The edge pushes a configuration (JSON): the version in use now, and what is wrong with
        the pushed one, empty if nothing is."""


class ControlStream(Protocol):
    """What both transports' streams can do. Its methods raise one of TRANSPORT_ERRORS."""

    async def receive(self) -> bytes:
        """Some bytes, empty at the end."""
        ...

    async def send(self, data: bytes) -> None:
        """Send bytes."""
        ...


class EdgeConnection:
    """One connection.

    Attributes:
        address: of the edge.
        index: our number for it.
        details: what the edge said of it.
        since: when it registered, in monotonic seconds.
        active: exchanges under way.
        exchanges: since it registered.
        leaving: set when the edge gives it no new requests, or soon will: replace it.
        over: set when it has ended; `failure` says why.
    """

    def __init__(
        self,
        transport: Transport,
        address: Address,
        request: RegisterConnection,
        close: Callable[[], None],
    ) -> None:
        self.transport = transport
        self.address = address
        self.index = request.connection_index
        self.details: ConnectionDetails
        self.since = trio.current_time()
        self.active = 0
        self.exchanges = 0
        self.leaving = trio.Event()
        self.over = trio.Event()
        self.failure = ""
        self._control = ControlClient(request)
        self._stream: ControlStream
        self._close = close
        self._sending = trio.Lock()
        self._answered = trio.lowlevel.ParkingLot()
        self._is_unregistered = False

    async def register(self, stream: ControlStream) -> None:
        """Register over this control stream. Raises DialFailedError."""
        self._stream = stream
        try:
            with trio.fail_after(REGISTRATION_SECONDS):
                while True:
                    await self._flush()
                    for event in self._control.receive(await stream.receive()):
                        if isinstance(event, Refused):
                            raise RegistrationRefusedError(
                                event.refusal.cause, should_retry=event.refusal.should_retry
                            )
                        if isinstance(event, Registered):
                            await self._flush()
                            self.details = event.details
                            self.since = trio.current_time()
                            return
        except trio.TooSlowError:
            raise DialFailedError(
                f"the edge did not answer to the registration within {REGISTRATION_SECONDS:.0f} s"
            ) from None
        except (TunnelError, *TRANSPORT_ERRORS) as error:
            raise DialFailedError(_shown(str(error))) from None

    async def report_configuration(self, document: bytes) -> None:
        """Tell the edge our configuration (JSON), on connection 0 where it does not manage it."""
        self._control.report_configuration(document)
        await self._flush_quietly()

    async def unregister(self) -> None:
        """Ask for no new requests; returns when the edge has agreed, or the connection is over."""
        self._control.unregister()
        await self._flush_quietly()
        while not self._is_unregistered and not self.over.is_set():
            await self._answered.park()

    def close(self) -> None:
        """End the connection at once."""
        self._close()

    # ---- for the transports

    async def follow_control(self) -> None:
        """Read the control stream until it ends, which means that the connection will be closed."""
        try:
            while True:
                for event in self._control.receive(await self._stream.receive()):
                    self._handle(event)
                await self._flush()
        except (TunnelError, *TRANSPORT_ERRORS):
            self.leaving.set()

    async def serve(self, service: Service, incoming: Incoming) -> None:
        """Have the service serve an exchange."""
        self.active += 1
        self.exchanges += 1
        try:
            with trio.CancelScope() as scope:
                async with incoming:
                    incoming.cancel_when_unwanted(scope)
                    await service.serve(incoming)
        finally:
            self.active -= 1

    def end(self, failure: str) -> None:
        """The connection has ended."""
        if not self.over.is_set():
            self.failure = _shown(failure)
            self.leaving.set()
            self.over.set()
            self._answered.unpark_all()

    def _handle(self, event: ControlEvent) -> None:
        if isinstance(event, Unregistered | ReportFailed):
            self._is_unregistered |= isinstance(event, Unregistered)
            self._answered.unpark_all()

    async def _flush(self) -> None:
        async with self._sending:
            if data := self._control.data_to_send():
                await self._stream.send(data)

    async def _flush_quietly(self) -> None:
        try:
            await self._flush()
        except TRANSPORT_ERRORS:
            pass  # the connection is over, which is found out elsewhere


def _shown(text: str) -> str:
    return printable(text if len(text) <= MAX_REASON else text[:MAX_REASON] + "...")
