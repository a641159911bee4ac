"""Where QUIC connections come from: a listener, with all of its on one socket, and dialing, with a
socket for each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import trio
from qh3.quic.configuration import QuicConfiguration

from traversal.io.quic import SPOOLED_BYTES, QuicConnection
from traversal.io.quic_engine import MAX_STREAMS, QuicEngine, RetryTokens, parse_initial
from traversal.io.quic_stream import QuicError
from traversal.io.udp import DONT_FRAGMENT, MAY_FRAGMENT, Run, Source, UdpSocket, bind_socket
from traversal.relay_map import Family
from traversal.wire.address import source_of

HANDSHAKE_SECONDS: Final = 5.0
MAX_READS: Final = 16
"""Of up to 64 KiB, before connections have a turn to answer and readers one to read."""
FREE_HANDSHAKES: Final = 32
"""Handshakes at one time that begin without a Retry: each costs 30 KiB for up to 5 s."""


@dataclass(frozen=True, slots=True)
class QuicLimits:
    """What a listener lets others do.

    Attributes:
        connections: at one time.
        handshakes: not finished yet, at one time; further Initials are ignored.
        handshakes_per_source: of these, from one IPv4 address or one /64 of IPv6: else one client
            that begins handshakes and leaves them would keep everybody out.
        spooled_bytes: what all streams of a connection may leave lying together.
    """

    connections: int = 10_000
    handshakes: int = 256
    handshakes_per_source: int = 64
    spooled_bytes: int = SPOOLED_BYTES


class QuicListener:
    """A server on one UDP socket. `await nursery.start(listener.run)`, then `accept`.

    Datagrams are sorted by the connection id that we gave out, which also finds a client whose NAT
    moved it. When more than a few handshakes are under way, a client must first prove its address
    by a Retry, which costs us nothing.
    """

    def __init__(
        self,
        sock: UdpSocket,
        configuration: QuicConfiguration,
        *,
        entropy: Callable[[int], bytes],
        limits: QuicLimits | None = None,
    ) -> None:
        self.ignored_initials = 0
        """Clients that were not served because of our limits."""
        self._sock = sock
        self._configuration = configuration
        self._limits = limits or QuicLimits()
        self._entropy = entropy
        self._tokens = RetryTokens(entropy(32))
        self._by_id: dict[bytes, QuicConnection] = {}
        self._id_lengths: list[int] = []
        self._connections: set[QuicConnection] = set()
        self._handshakes: Counter[str] = Counter()
        """Under way, by source."""
        self._ready_in, self._ready_out = trio.open_memory_channel[QuicConnection](
            self._limits.handshakes
        )

    @property
    def port(self) -> int:
        """The UDP port."""
        return self._sock.port

    @property
    def connections(self) -> int:
        """How many there are, handshakes included."""
        return len(self._connections)

    def set_configuration(self, configuration: QuicConfiguration) -> None:
        """For connections from now on: certificates that were renewed."""
        self._configuration = configuration

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until cancelled; closes the socket and every connection."""
        # qh3 searches the path's MTU as client only. As server its packets keep the size that they
        # have from the beginning, and on a path that is narrower IP has to fragment them.
        self._sock.set_path_mtu_mode(MAY_FRAGMENT)
        try:
            async with trio.open_nursery() as nursery:
                task_status.started()
                while True:
                    try:
                        runs = await self._sock.receive_runs(MAX_READS)
                    except OSError:
                        continue  # an ICMP error for somebody; the next datagram may be fine
                    for run in runs:
                        self._handle_run(run, nursery)
        finally:
            self._sock.close()
            self._ready_in.close()

    async def accept(self) -> QuicConnection:
        """The next client whose handshake is done. Raises QuicError at the end."""
        try:
            return await self._ready_out.receive()
        except trio.EndOfChannel:
            raise QuicError("QUIC: the listener was closed") from None

    def _handle_run(self, received: Run, nursery: trio.Nursery) -> None:
        run, step, source = received
        start = 0
        while start < len(run):
            datagram = run[start : start + step]
            end = start + step
            identifier = self._find(datagram)
            if identifier is not None:
                connection: QuicConnection | None = self._by_id[identifier]
                if not datagram[0] & 0x80:
                    # Almost always all that came together is for one connection.
                    while run.startswith(identifier, end + 1) and not run[end] & 0x80:
                        end += step
            else:
                connection = self._admit(datagram, source, nursery)
            if connection is not None:
                connection.receive(run[start:end], step, source)
            start = end

    def _find(self, datagram: bytes) -> bytes | None:
        """The connection id of ours that a datagram is for."""
        if len(datagram) < 21:
            return None
        if datagram[0] & 0x80:
            identifier = datagram[6 : 6 + datagram[5]]
            return identifier if identifier in self._by_id else None
        for length in self._id_lengths:
            identifier = datagram[1 : 1 + length]
            if identifier in self._by_id:
                return identifier
        return None

    def _admit(
        self, datagram: bytes, source: Source, nursery: trio.Nursery
    ) -> QuicConnection | None:
        initial = parse_initial(datagram)
        if initial is None:
            return None
        limits = self._limits
        under_way = self._handshakes.total()
        origin = source_of(source[0])
        if (
            under_way >= limits.handshakes
            or self._handshakes[origin] >= limits.handshakes_per_source
            or len(self._connections) >= limits.connections
        ):
            self.ignored_initials += 1
            return None
        now = trio.current_time()
        original_id = self._tokens.original_id(initial, source, now) if initial.token else None
        if original_id is None and under_way >= FREE_HANDSHAKES:
            retry = self._tokens.encode_retry(initial, source, self._entropy(8), now)
            try:
                self._sock.send(retry, source)
            except OSError:
                pass
            return None
        engine = QuicEngine(self._configuration, initial, original_id=original_id)
        connection = QuicConnection(engine, self._sock, source, spooled_bytes=limits.spooled_bytes)
        connection._note_id = self._note_id
        connection._forget_id = self._forget_id
        self._note_id(initial.destination_id, connection)
        self._note_id(engine.host_cid, connection)
        self._connections.add(connection)
        self._handshakes[origin] += 1
        nursery.start_soon(self._serve, connection, origin)
        return connection

    async def _serve(self, connection: QuicConnection, origin: str) -> None:
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(connection.run)
                try:
                    with trio.fail_after(HANDSHAKE_SECONDS):
                        await connection.wait_established()
                    self._ready_in.send_nowait(connection)
                except (QuicError, trio.TooSlowError, trio.WouldBlock):
                    connection.close()
                finally:
                    self._handshakes[origin] -= 1
                    if not self._handshakes[origin]:
                        del self._handshakes[origin]
        finally:
            self._connections.discard(connection)
            for identifier in [i for i, c in self._by_id.items() if c is connection]:
                self._forget_id(identifier)

    def _note_id(self, identifier: bytes, connection: QuicConnection) -> None:
        self._by_id[identifier] = connection
        if len(identifier) not in self._id_lengths:
            self._id_lengths.append(len(identifier))

    def _forget_id(self, identifier: bytes) -> None:
        self._by_id.pop(identifier, None)


async def dial_quic(
    nursery: trio.Nursery,
    address: Source,
    configuration: QuicConfiguration,
    *,
    timeout_seconds: float = 5.0,
    keep_alive_seconds: float = 1.0,
    max_streams: int = MAX_STREAMS,
) -> QuicConnection:
    """A connection to a server, from a socket of its own, served in `nursery` until it is over.

    `configuration.server_name` must be set. The server may have `max_streams` streams open at a
    time. A PING every `keep_alive_seconds` keeps NATs open and
    tells soon when the other side is gone. Raises QuicError when there is no connection within
    `timeout_seconds`. Cancelling the nursery closes the connection.
    """
    family: Family = 6 if ":" in address[0] else 4
    try:
        sock = await bind_socket(family, "::" if family == 6 else "0.0.0.0", 0)
    except OSError as error:
        raise QuicError(f"QUIC: no UDP socket: {error.strerror}") from None
    sock.set_path_mtu_mode(DONT_FRAGMENT)
    engine = QuicEngine(configuration, max_streams=max_streams)
    engine.connect(address, trio.current_time())
    connection = QuicConnection(engine, sock, address, keep_alive_seconds=keep_alive_seconds)
    nursery.start_soon(_serve_dialed, connection, sock)
    try:
        with trio.fail_after(timeout_seconds):
            await connection.wait_established()
    except trio.TooSlowError:
        connection.close()
        raise QuicError(f"QUIC: no answer within {timeout_seconds:g} s") from None
    except BaseException:
        connection.close()
        raise
    return connection


async def _serve_dialed(connection: QuicConnection, sock: UdpSocket) -> None:
    async def receive() -> None:
        while True:
            try:
                runs = await sock.receive_runs(MAX_READS)
            except OSError:
                continue  # "port unreachable"; the handshake's time limit decides
            for run, step, _ in runs:
                if run:
                    connection.receive(run, step, connection.address)

    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(receive)
            await connection.run()
            nursery.cancel_scope.cancel()
    finally:
        sock.close()
