"""A connector: keeps its connections to the edge, each replaced before or as soon as it is gone.

Decisions are in `addresses`, `backoff` and `transport_choice`; a connection's own life is in
`edge_connection` and the two transports.
"""

from __future__ import annotations

import logging
import platform
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Final, Protocol
from uuid import UUID

import trio

from traversal.keys import Entropy
from traversal.tunnel.addresses import AddressBook
from traversal.tunnel.backoff import Backoff
from traversal.tunnel.discovery import DiscoveryError, EdgePlaces, discover
from traversal.tunnel.edge_connection import (
    DialFailedError,
    DialOptions,
    EdgeConnection,
    RegistrationRefusedError,
    Service,
)
from traversal.tunnel.http2 import serve_http2
from traversal.tunnel.quic import serve_quic
from traversal.tunnel.transport_choice import HEAD_START_SECONDS, Transport, TransportChoice
from traversal.wire.address import Address
from traversal.wire.tunnel.credentials import Credentials
from traversal.wire.tunnel.registration import (
    FEATURE_DATAGRAM_V3,
    FEATURE_DRAIN,
    ConnectionOptions,
    RegisterConnection,
)

logger = logging.getLogger("underpass.tunnel")

SPACING_SECONDS: Final = 0.2
"""Between the first attempts of two connections, so that they do not all choose alike."""
IMPROVE_SECONDS: Final = 1.0
BALANCE_SECONDS: Final = 5.0
"""How often it is seen whether a connection should move to QUIC, or to another address: an edge
that is back has visitors, too, who wait."""
YOUNG_SECONDS: Final = 10.0
YOUNG_BASE_SECONDS: Final = 0.1
YOUNG_CAP_SECONDS: Final = 10.0
"""A connection that does not live as long and served nothing is followed by a wait: or an edge that
registers and closes would be dialed without a pause."""
MAX_LEAVING: Final = 16
"""Connections that finish what they have after they were replaced. An edge that drains closes them
itself; for one that never does, the oldest is closed."""
_FEATURES: Final = (
    "serialized_headers",
    "allow_remote_config",
    "support_quic_eof",
    FEATURE_DRAIN,
)
_UDP: Final = FEATURE_DATAGRAM_V3


class ConnectorError(Exception):
    """The connector can't serve, and waiting does not help; the text says what to do."""


class _Serve(Protocol):
    def __call__(
        self,
        address: Address,
        options: DialOptions,
        request: RegisterConnection,
        service: Service,
        *,
        task_status: trio.TaskStatus[EdgeConnection],
    ) -> Awaitable[None]: ...


_SERVERS: Final[dict[Transport, _Serve]] = {
    Transport.QUIC: serve_quic,
    Transport.HTTP2: serve_http2,
}


@dataclass(frozen=True, slots=True)
class ConnectorOptions:
    """What a connector is told.

    Attributes:
        connections: 1 to 8, spread over the edge's addresses.
        grace_seconds: how long requests under way may take after the wish to stop.
        report: makes the document (JSON) that connection 0 reports; None for none.
    """

    credentials: Credentials
    places: EdgePlaces
    dial: DialOptions = field(default_factory=DialOptions)
    transports: tuple[Transport, ...] = (Transport.QUIC, Transport.HTTP2)
    connections: int = 4
    grace_seconds: float = 30.0
    report: Callable[[], bytes] | None = None


class Connector:
    """See the module's text. `run` it; `stop` lets it end in order.

    Attributes:
        connector_id: of this process.
        registered: set when the first connection is.
        registrations, failures: registered connections, and attempts that came to nothing.
    """

    def __init__(
        self,
        options: ConnectorOptions,
        service: Service,
        *,
        entropy: Entropy,
        rng: random.Random,
    ) -> None:
        self.connector_id = UUID(bytes=entropy(16), version=4)
        self.registrations = self.failures = 0
        self._options = options
        self._service = service
        self._rng = rng
        self._choice = TransportChoice(options.transports, rng.random)
        self._book: AddressBook | None = None
        self._current: dict[int, EdgeConnection] = {}
        self._old: set[EdgeConnection] = set()
        self.registered = trio.Event()
        self._refusal = ""
        self._stopping = trio.Event()
        self._nursery: trio.Nursery

    @property
    def connections(self) -> tuple[EdgeConnection, ...]:
        """Those that take requests, by their index."""
        return tuple(c for _, c in sorted(self._current.items()) if not c.leaving.is_set())

    def stop(self) -> None:
        """Take no new requests, finish those under way, then end `run`."""
        self._stopping.set()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until stopped. Starts when the first connection is registered.

        Raises ConnectorError when the edge refuses the credentials at the start.
        """
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            async with trio.open_nursery() as keepers:
                for index in range(self._options.connections):
                    keepers.start_soon(self._keep, index)
                keepers.start_soon(self._improve_forever)
                await _first(self.registered, self._stopping)
                if self.registered.is_set():
                    task_status.started()
                await self._stopping.wait()
                keepers.cancel_scope.cancel()
            if not self._refusal:
                await self._leave()
            nursery.cancel_scope.cancel()
        if self._refusal:
            raise ConnectorError(self._refusal)

    # ---- one connection

    async def _keep(self, index: int) -> None:
        backoff = Backoff(self._rng.random)
        pauses = Backoff(
            self._rng.random, base_seconds=YOUNG_BASE_SECONDS, cap_seconds=YOUNG_CAP_SECONDS
        )
        is_useless = False
        await trio.sleep(index * SPACING_SECONDS)
        while True:
            connection = self._current.get(index)
            if connection is None or connection.leaving.is_set():
                if is_useless:
                    await trio.sleep(pauses.next_wait())
                connection = await self._connect(index, backoff)
                if connection is None:
                    return
            # What leaves is replaced at once, while it finishes what it has.
            await connection.leaving.wait()
            if self._current.get(index) is not connection:
                continue
            del self._current[index]
            now = trio.current_time()
            is_useless = not connection.exchanges and now - connection.since < YOUNG_SECONDS
            if not is_useless:
                pauses.reset()
            if connection.over.is_set():
                logger.warning(
                    "Connection %d (%s, %s) ended: %s",
                    index,
                    connection.transport.value,
                    connection.address,
                    connection.failure,
                )
                self._choice.note_lost(connection.transport, now - connection.since, now)
            else:
                logger.info("The edge drains connection %d (%s).", index, connection.address)
                self._retire(connection)
            if self._book is not None:
                self._book.rotate(index, now)

    async def _connect(self, index: int, backoff: Backoff) -> EdgeConnection | None:
        """Until there is a connection; None when the edge refuses us for good at the start."""
        while True:
            try:
                book = await self._addresses(is_refresh=backoff.failures % 4 == 3)
                address = book.address(index, trio.current_time())
                connection = await self._race(index, address, backoff.failures)
            except (DialFailedError, DiscoveryError) as error:
                self.failures += 1
                if _is_final(error) and not self.registered.is_set():
                    self._refusal = f"{error}. Is this the right credentials file for this edge?"
                    self._stopping.set()
                    return None
                wait = backoff.next_wait()
                logger.warning("Connection %d: %s; again in %.0f s", index, error, wait)
                if self._book is not None:
                    is_unroutable = isinstance(error, DialFailedError) and error.is_unroutable
                    self._book.rotate(index, trio.current_time(), is_unroutable=is_unroutable)
                await trio.sleep(wait)
                continue
            backoff.reset()
            book.note_success(index)
            await self._take(index, connection)
            self.registered.set()
            return connection

    async def _take(self, index: int, connection: EdgeConnection) -> None:
        self.registrations += 1
        self._current[index] = connection
        logger.info(
            "Connection %d registered at %s over %s (%s).",
            index,
            connection.address,
            connection.transport.value,
            connection.details.location or "no location",
        )
        report = self._options.report
        if index == 0 and report is not None and not connection.details.is_remotely_managed:
            await connection.report_configuration(report())

    async def _addresses(self, *, is_refresh: bool) -> AddressBook:
        if self._book is None or is_refresh:
            try:
                regions = await discover(self._options.places)
            except DiscoveryError:
                if self._book is None:
                    raise
                return self._book
            if self._book is None:
                self._book = AddressBook(regions, self._rng.random)
            else:
                self._book.replace(regions)
        return self._book

    # ---- dialing

    async def _race(self, index: int, address: Address, attempts: int) -> EdgeConnection:
        """By the preferred transport, and by the other if it is not there within a second.

        Raises DialFailedError.
        """
        order = self._choice.order
        winner: EdgeConnection | None = None
        errors: dict[Transport, DialFailedError] = {}
        tried: set[Transport] = set()
        failed = trio.Event()

        async def attempt(transport: Transport) -> None:
            nonlocal winner
            tried.add(transport)
            try:
                connection = await self._dial(transport, index, address, attempts)
            except DialFailedError as error:
                errors[transport] = error
                failed.set()
                return
            if winner is None:
                winner = connection
                race.cancel_scope.cancel()
            else:
                connection.close()

        async with trio.open_nursery() as race:
            race.start_soon(attempt, order[0])
            for transport in order[1:]:
                with trio.move_on_after(HEAD_START_SECONDS):
                    await failed.wait()
                race.start_soon(attempt, transport)
        if winner is None:
            refused = [e for e in errors.values() if isinstance(e, RegistrationRefusedError)]
            raise (
                refused[0]
                if refused
                else DialFailedError(
                    "; ".join(f"{t.value}: {error}" for t, error in errors.items()),
                    is_unroutable=any(error.is_unroutable for error in errors.values()),
                )
            )
        self._choice.note_registered(
            winner.transport, trio.current_time(), quic_was_tried=Transport.QUIC in tried
        )
        return winner

    async def _dial(
        self, transport: Transport, index: int, address: Address, attempts: int
    ) -> EdgeConnection:
        """Raises DialFailedError."""
        credentials = self._options.credentials
        request = RegisterConnection(
            account_tag=credentials.account_tag,
            tunnel_secret=credentials.secret,
            tunnel_id=credentials.tunnel_id,
            connection_index=index,
            options=ConnectionOptions(
                client_id=self.connector_id,
                features=_FEATURES if self._service.udp is None else (*_FEATURES, _UDP),
                version=f"underpass/{version('underpass')}",
                arch=f"linux_{platform.machine()}",
                previous_attempts=min(attempts, 255),
            ),
        )
        connection: EdgeConnection = await self._nursery.start(
            _SERVERS[transport], address, self._options.dial, request, self._service
        )
        return connection

    # ---- better connections

    async def _improve_forever(self) -> None:
        balanced_at = trio.current_time()
        while True:
            await trio.sleep(IMPROVE_SECONDS)
            now = trio.current_time()
            slow = [c for c in self.connections if c.transport is Transport.HTTP2]
            if slow and self._choice.should_move_to_quic(now):
                await self._move(slow[0].index, slow[0].address, Transport.QUIC)
            elif self._book is not None and now - balanced_at >= BALANCE_SECONDS:
                crowded = self._book.crowded(now)
                is_whole = len(self.connections) == self._options.connections
                has_moved = (
                    crowded is not None
                    and is_whole
                    and await self._move(*crowded, self._choice.order[0])
                )
                if not has_moved:  # else the address is good, and the next one need not wait
                    balanced_at = now

    async def _move(self, index: int, address: Address, transport: Transport) -> bool:
        """Replace a connection by a better one, if that can be made; whether it could."""
        old = self._current.get(index)
        book = self._book
        if old is None or book is None:
            return False
        try:
            new = await self._dial(transport, index, address, 0)
        except DialFailedError as error:
            logger.debug("Connection %d stays where it is: %s", index, error)
            if transport is Transport.QUIC and old.transport is Transport.HTTP2:
                self._choice.note_probe_failed(trio.current_time())
            return False
        now = trio.current_time()
        self._choice.note_registered(transport, now, quic_was_tried=False)
        book.take(index, address)
        self._retire(old)
        await self._take(index, new)
        # Its keeper looks up what is current when this one leaves.
        old.leaving.set()
        self._nursery.start_soon(old.unregister)
        return True

    def _retire(self, connection: EdgeConnection) -> None:
        """Keep a connection that was replaced for what it still has to do."""
        self._old = {c for c in self._old if not c.over.is_set()} | {connection}
        if len(self._old) > MAX_LEAVING:
            min(self._old, key=lambda c: c.since).close()

    # ---- the end

    async def _leave(self) -> None:
        """Ask for no more requests on any connection, and let those under way end."""
        connections = {*self._current.values(), *self._old}
        with trio.move_on_after(self._options.grace_seconds):
            async with trio.open_nursery() as nursery:
                for connection in connections:
                    nursery.start_soon(self._leave_one, connection)

    async def _leave_one(self, connection: EdgeConnection) -> None:
        await connection.unregister()
        await connection.over.wait()


async def _first(one: trio.Event, other: trio.Event) -> None:
    async with trio.open_nursery() as nursery:

        async def wait(event: trio.Event) -> None:
            await event.wait()
            nursery.cancel_scope.cancel()

        nursery.start_soon(wait, one)
        nursery.start_soon(wait, other)


def _is_final(error: Exception) -> bool:
    return isinstance(error, RegistrationRefusedError) and not error.should_retry
