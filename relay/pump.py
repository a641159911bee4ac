"""Moves bytes for all connected clients: one task, one private epoll set.

A round: ask epoll who has something (at most MAX_EVENTS), read each of them once into one shared
buffer, let `forwarding` rewrite and route the frames there, write each destination once. Nothing is
awaited per client or per packet; between rounds Trio's other tasks get their turn. Everything that
is not per packet (accept, handshake, admission, metrics) is ordinary Trio, elsewhere.

Hazards, each with its rule:

* Views into the shared buffer do not outlive the round: before the buffer is used again, and at the
  end of the round, every dirty client is flushed; what the kernel does not take is copied.
* Ciphertext can't be dropped any more, so packets are encrypted late: a blocked client's packets
  wait as plaintext in its backlog, and at most one flush worth of ciphertext waits beside them.
* Decrypted or undecrypted data left in the TLS engine is invisible to epoll: a read always drains
  the engine, and so does `adopt`, since the handshake may have read on into the frames.
* Reading can produce output (key updates, alerts): it is pushed after every read.
* Descriptor numbers are reused at once: a connection leaves the epoll set and the table in the same
  breath in which it is closed. epoll is level-triggered, so nothing is lost by stopping early.
"""

from __future__ import annotations

import heapq
import random
import select
import socket
from collections.abc import Callable
from typing import Final

import trio

from relay.client import Address, Client
from relay.counters import DropReason
from relay.forwarding import BUFFER_SLACK, Switch, ViolationError
from relay.limits import TokenBucket
from traversal.io.tls import TlsEngine, TlsError
from traversal.keys import NodePublic
from traversal.wire.derp import KEEP_ALIVE

MAX_EVENTS: Final = 64
"""Clients served per round; 64 lone TLS frames are about 0.8 ms."""
MAX_TURN_SECONDS: Final = 0.004
"""After so long Trio's other tasks get their turn, when there is always something to do."""
MIN_READ_BYTES: Final = 16384
MAX_READ_BYTES: Final = 262144
"""A connection's read size doubles when a read fills it and halves when one uses less than a
quarter, because OpenSSL's memory BIO keeps the size it once had: only busy clients pay for it."""
ROUND_READ_BYTES: Final = 1 << 20
"""Read in one round, shared equally by those who are ready: an elephant gets no more than a mouse
may have, and a round takes about 3 ms at most."""
TLS_ROOM_BYTES: Final = MAX_READ_BYTES + 32768
"""Decrypting makes less of it, so what one read brought, together with an incomplete record from
before, always fits, and the engine is drained."""
BUFFER_BYTES: Final = 4 * MAX_READ_BYTES
WRITE_BATCH_BYTES: Final = 65536
"""How much is encrypted at once for a client that reads slowly."""
MAX_REST_BYTES: Final = 2 * MAX_READ_BYTES
"""Ciphertext that may wait for one client: more than any flush. Only answers of TLS are added to
what waits, 23 bytes for each key update that a client asks for."""
WRITE_TIMEOUT_SECONDS: Final = 2.0
MESH_WRITE_TIMEOUT_SECONDS: Final = 30.0
KEEP_ALIVE_SECONDS: Final = 60.0
KEEP_ALIVE_SPREAD_SECONDS: Final = 5.0

_ENDED: Final = "the other side closed the connection"


class Connection(Client):
    """A client with its socket; owned by the pump."""

    __slots__ = (
        "bucket",
        "fd",
        "keep_alive_seconds",
        "on_close",
        "partial",
        "paused",
        "progress_timer",
        "read_bytes",
        "rest",
        "sock",
        "tls",
        "write_deadline",
    )

    def __init__(
        self,
        key: NodePublic,
        sock: socket.socket,
        tls: TlsEngine | None,
        *,
        on_close: Callable[[Connection, str], None] | None = None,
        bucket: TokenBucket | None = None,
        connected_at: float = 0.0,
        address: Address | None = None,
        port: int = 0,
        is_mesh: bool = False,
        is_sibling: bool = False,
        is_outgoing: bool = False,
        is_prober: bool = False,
        not_ideal: bool = False,
        takes_notices: bool = False,
        permitted: frozenset[bytes] | None = None,
    ) -> None:
        """
        Args:
            sock: connected and non-blocking; the pump closes it.
            tls: after the handshake; None for a plain connection.
            on_close: called once, with the reason in words.
            bucket: limits what is read from this client.
        """
        super().__init__(
            key,
            connected_at=connected_at,
            address=address,
            port=port,
            is_mesh=is_mesh,
            is_sibling=is_sibling,
            is_outgoing=is_outgoing,
            is_prober=is_prober,
            not_ideal=not_ideal,
            takes_notices=takes_notices,
            permitted=permitted,
        )
        self.sock = sock
        self.fd = sock.fileno()
        self.tls = tls
        self.on_close = on_close
        self.bucket = bucket
        self.keep_alive_seconds = 0.0
        self.partial = b""
        self.read_bytes = MIN_READ_BYTES
        self.rest: memoryview | None = None
        self.write_deadline = 0.0
        self.progress_timer = False
        self.paused = False


class Pump:
    """Owns all connections of one relay process.

    Args:
        server_key: of this relay.
        queue_depth, memory_bytes: see `Switch`.
        write_timeout_seconds: a client that takes nothing for this long is closed.
        randomness: spreads the keepalives.
    """

    def __init__(
        self,
        server_key: NodePublic,
        *,
        queue_depth: int = 32,
        memory_bytes: int = 256 << 20,
        write_timeout_seconds: float = WRITE_TIMEOUT_SECONDS,
        randomness: random.Random,
    ) -> None:
        self.switch = Switch(
            server_key, queue_depth=queue_depth, memory_bytes=memory_bytes, flush=self._flush_client
        )
        self.connections: dict[int, Connection] = {}
        self._write_timeout_seconds = write_timeout_seconds
        self._randomness = randomness
        self._epoll = select.epoll()
        self._buffer = bytearray(BUFFER_BYTES + BUFFER_SLACK)
        self._view = memoryview(self._buffer)
        self._ciphertext = memoryview(bytearray(MAX_READ_BYTES))
        self._used = 0
        self._read_bytes = MIN_READ_BYTES
        self._now = 0.0
        # (deadline, tie-breaker, what to do, connection); entries of closed connections are ignored
        self._timers: list[tuple[float, int, Callable[[Connection], None], Connection]] = []
        self._timer_count = 0
        self._closed_with_timers = 0
        self._timers_changed = trio.Event()

    # --- Tasks -----------------------------------------------------------------------------------

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until cancelled; then every connection is closed."""
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._run_timers)
                task_status.started()
                while True:
                    await trio.lowlevel.wait_readable(self._epoll.fileno())
                    stop_at = trio.current_time() + MAX_TURN_SECONDS
                    while self._round() and self._now < stop_at:
                        pass
        finally:
            for connection in list(self.connections.values()):
                self.close(connection, "the relay stops")
            self._epoll.close()

    async def _run_timers(self) -> None:
        while True:
            self._timers_changed = trio.Event()
            with trio.move_on_at(self._timers[0][0] if self._timers else float("inf")):
                await self._timers_changed.wait()
            self._now = trio.current_time()
            while self._timers and self._timers[0][0] <= self._now:
                _, _, action, connection = heapq.heappop(self._timers)
                if not connection.closed:
                    action(connection)
            self.flush()

    def _at(
        self, deadline: float, action: Callable[[Connection], None], connection: Connection
    ) -> None:
        self._timer_count += 1
        heapq.heappush(self._timers, (deadline, self._timer_count, action, connection))
        if self._timers[0][1] == self._timer_count:
            self._timers_changed.set()

    def _forget_timers(self) -> None:
        """Keep the heap from filling up with closed connections where many come and go."""
        self._closed_with_timers += 1
        if 2 * self._closed_with_timers > len(self._timers):
            self._timers = [entry for entry in self._timers if not entry[3].closed]
            heapq.heapify(self._timers)
            self._closed_with_timers = 0

    # --- Connections -----------------------------------------------------------------------------

    def adopt(self, connection: Connection, first_frame: bytes, received: bytes) -> None:
        """Take over a connection whose handshake is done.

        `first_frame` leaves before anything else (SERVER_INFO, or nothing for an outgoing link);
        `received` is what was read beyond the handshake.
        """
        self._now = trio.current_time()
        self.connections[connection.fd] = connection
        self._epoll.register(connection.fd, select.EPOLLIN)
        connection.keep_alive_seconds = (
            KEEP_ALIVE_SECONDS + self._randomness.random() * KEEP_ALIVE_SPREAD_SECONDS
        )
        if first_frame:
            self.switch.outbox.send_to_all(first_frame, [connection])
        self.switch.presence.connect(connection)
        if not connection.is_outgoing:
            self._at(self._now + connection.keep_alive_seconds, self._keep_alive, connection)
        connection.partial = received
        self._guarded(connection, self._handle_left_over, 0)
        self.flush()

    def _handle_left_over(self, connection: Connection, _: int) -> None:
        """What the handshake read beyond its end, decrypted or not."""
        if connection.tls is None:
            self._handle_frames(connection, *self._place_partial(connection, 0))
        else:
            self._drain_tls(connection, connection.tls)

    def set_rate(self, connection: Connection, bucket: TokenBucket | None) -> None:
        """Limit what is read from a connection in another way, from now on."""
        connection.bucket = bucket
        if connection.paused:
            self._resume(connection)

    def close(self, connection: Connection, reason: str) -> None:
        """End a connection now; harmless when repeated."""
        if connection.closed:
            return
        del self.connections[connection.fd]
        self._epoll.unregister(connection.fd)
        self.switch.presence.disconnect(connection)
        try:
            if connection.tls is not None and connection.rest is None:
                connection.tls.close()
                connection.sock.send(connection.tls.data_to_send())
        except OSError:
            pass
        connection.sock.close()
        self._forget_timers()
        connection.partial = b""
        connection.rest = None
        connection.tls = None
        if connection.on_close is not None:
            connection.on_close(connection, reason)

    def _guarded(
        self, connection: Connection, handle: Callable[[Connection, int], None], argument: int
    ) -> None:
        """Run a step for one connection; whatever it does wrong ends that connection only."""
        try:
            handle(connection, argument)
        except ViolationError as error:
            self.switch.counters.protocol_violations += 1
            self.close(connection, f"protocol violation: {error}")
        except TlsError as error:
            self.close(connection, str(error))
        except OSError as error:
            self.close(connection, error.strerror or type(error).__name__)

    # --- The round -------------------------------------------------------------------------------

    def _round(self) -> bool:
        """Serve whoever is ready; whether there may be more to do at once."""
        events = self._epoll.poll(0, MAX_EVENTS)
        if not events:
            return False
        self._now = trio.current_time()
        self._read_bytes = max(MIN_READ_BYTES, ROUND_READ_BYTES // len(events))
        counters = self.switch.counters
        at_once_before = counters.packets_sent - counters.packets_waited
        connections = self.connections
        for fd, event in events:
            connection = connections.get(fd)
            if connection is not None:
                self._guarded(connection, self._handle_event, event)
        self.flush()
        at_once = counters.packets_sent - counters.packets_waited - at_once_before
        if at_once > 0:
            counters.queue_delay.observe(trio.current_time() - self._now, at_once)
        return True

    def _handle_event(self, connection: Connection, event: int) -> None:
        if event & select.EPOLLOUT:
            self._handle_writable(connection)
        if event & ~select.EPOLLOUT and not connection.closed:
            if connection.paused:
                # Only an error or a hang-up is reported for a paused connection.
                self.close(connection, _ENDED)
            else:
                self._handle_readable(connection)

    def _handle_readable(self, connection: Connection) -> None:
        """Read once and handle what came."""
        wanted = min(connection.read_bytes, self._read_bytes)
        if connection.tls is None:
            start, end = self._place_partial(connection, wanted)
            if connection.closed:  # by the flush that made room
                return
            count = _recv_into(connection.sock, self._view[end : end + wanted])
            if count > 0:
                self._handle_frames(connection, start, end + count)
        else:
            count = _recv_into(connection.sock, self._ciphertext[:wanted])
            if count > 0:
                connection.tls.receive_data(self._ciphertext[:count])
                self._drain_tls(connection, connection.tls)
        if count == 0:
            self.close(connection, _ENDED)
        elif count == connection.read_bytes:
            connection.read_bytes = min(2 * count, MAX_READ_BYTES)
        elif count < connection.read_bytes // 4 and connection.read_bytes > MIN_READ_BYTES:
            connection.read_bytes //= 2

    def _drain_tls(self, connection: Connection, tls: TlsEngine) -> None:
        start, end = self._place_partial(connection, TLS_ROOM_BYTES)
        if connection.closed:  # by the flush that made room
            return
        try:
            end += tls.read_into(self._view[end : end + TLS_ROOM_BYTES])
        except TlsError:
            pass  # it is raised below, after the answer (an alert) has left
        answer = tls.data_to_send()
        if answer:
            self._write_ciphertext(connection, answer)
        self._handle_frames(connection, start, end)
        if tls.failure is not None:
            raise tls.failure

    def _handle_frames(self, connection: Connection, start: int, end: int) -> None:
        self._used = end
        position = self.switch.handle_frames(
            connection, self._buffer, self._view, start, end, self._now
        )
        if connection.closed:  # by a write to itself
            return
        connection.partial = bytes(self._view[position:end])
        if connection.bucket is not None:
            self._charge(connection, connection.bucket, position - start)

    def _place_partial(self, connection: Connection, size: int) -> tuple[int, int]:
        """Put the incomplete frame of the last read where `size` bytes are free behind it.

        Returns its start and end in the shared buffer. Flushes where the buffer is full.
        """
        partial = connection.partial
        if self._used + len(partial) + size > BUFFER_BYTES:
            self._flush_dirty()
            self._used = 0
        start = self._used
        end = start + len(partial)
        if partial:
            self._view[start:end] = partial
        return start, end

    def _charge(self, connection: Connection, bucket: TokenBucket, size: int) -> None:
        """Read no more from a client that is above its rate (DERP specification 9)."""
        if bucket.take(self._now, size):
            return
        self.switch.counters.rate_limit_waits += 1
        connection.paused = True
        self._watch_events(connection)
        self._at(bucket.ready_at(self._now), self._resume, connection)

    def _resume(self, connection: Connection) -> None:
        connection.paused = False
        self._watch_events(connection)

    def _watch_events(self, connection: Connection) -> None:
        events = (0 if connection.paused else select.EPOLLIN) | (
            select.EPOLLOUT if connection.blocked else 0
        )
        self._epoll.modify(connection.fd, events)

    # --- Writing ---------------------------------------------------------------------------------

    def flush(self) -> None:
        """Write everything pending and end what is doomed; the shared buffer is free after it."""
        self._flush_dirty()
        doomed = self.switch.outbox.doomed
        while doomed:
            for client, reason in list(doomed):
                assert isinstance(client, Connection)
                self.close(client, reason)
                doomed.remove((client, reason))
            self._flush_dirty()  # those who are told of it
        self._used = 0

    def _flush_dirty(self) -> None:
        dirty = self.switch.outbox.dirty
        if not dirty:
            return
        # Flushing may close a connection, and that makes others dirty: the list grows meanwhile.
        for client in dirty:
            self._flush_client(client)
        dirty.clear()

    def _flush_client(self, client: Client) -> None:
        assert isinstance(client, Connection)
        if client.out:
            self._guarded(client, self._write_out, 0)

    def _write_out(self, connection: Connection, _: int) -> None:
        chunks = connection.out
        connection.out = []
        connection.out_bytes = 0
        if connection.blocked:
            self.switch.outbox.defer(connection, chunks, self._now)
            return
        connection.pong_waits = False
        data = chunks[0] if len(chunks) == 1 else b"".join(chunks)
        try:
            if connection.tls is not None:
                connection.tls.write(data)
                data = connection.tls.data_to_send()
            self._write_ciphertext(connection, data)
        except (TlsError, OSError):
            self.switch.outbox.drop_unwritten(connection, chunks, DropReason.WRITE_ERROR)
            raise

    def _write_ciphertext(self, connection: Connection, data: bytes | memoryview) -> None:
        """Bytes that must go as they are; what the kernel does not take now waits in `rest`."""
        if connection.rest is not None:
            if len(connection.rest) + len(data) > MAX_REST_BYTES:
                raise TlsError("it asks for TLS key updates and does not read the answers")
            connection.rest = memoryview(bytes(connection.rest) + bytes(data))
            return
        count = _send(connection.sock, data)
        if count < len(data):
            connection.rest = memoryview(bytes(data[count:]))
            connection.blocked = True
            if connection.out:  # the data was an answer of TLS: what is pending waits in order
                self._write_out(connection, 0)
            self._watch_events(connection)
            self._expect_progress(connection)

    def _handle_writable(self, connection: Connection) -> None:
        """A blocked connection takes bytes again."""
        while connection.blocked:
            if connection.rest is not None:
                count = _send(connection.sock, connection.rest)
                if count:
                    connection.write_deadline = self._now + self._timeout(connection)
                if count < len(connection.rest):
                    connection.rest = connection.rest[count:]
                    return
                connection.rest = None
            frames = self.switch.outbox.take_waiting(connection, WRITE_BATCH_BYTES, self._now)
            connection.pong_waits = False
            if not frames:
                connection.blocked = False
                self._watch_events(connection)
                return
            data = b"".join(frames)
            if connection.tls is not None:
                connection.tls.write(data)
                data = connection.tls.data_to_send()
            count = _send(connection.sock, data)
            connection.rest = memoryview(data)[count:] if count < len(data) else None
            if connection.rest is not None:
                return

    def _timeout(self, connection: Connection) -> float:
        if connection.is_mesh:
            return MESH_WRITE_TIMEOUT_SECONDS
        return self._write_timeout_seconds

    def _expect_progress(self, connection: Connection) -> None:
        connection.write_deadline = self._now + self._timeout(connection)
        # One timer per connection, however often it blocks and goes on before the timer is due.
        if not connection.progress_timer:
            connection.progress_timer = True
            self._at(connection.write_deadline, self._check_progress, connection)

    def _check_progress(self, connection: Connection) -> None:
        connection.progress_timer = False
        if not connection.blocked:
            return
        if self._now < connection.write_deadline:
            connection.progress_timer = True
            self._at(connection.write_deadline, self._check_progress, connection)
            return
        self.switch.counters.write_timeouts += 1
        self.close(connection, "it took no bytes in time")

    def _keep_alive(self, connection: Connection) -> None:
        self._at(self._now + connection.keep_alive_seconds, self._keep_alive, connection)
        if not connection.blocked:  # otherwise there is traffic enough
            self.switch.outbox.send_to_all(KEEP_ALIVE, [connection])


def _recv_into(sock: socket.socket, buffer: memoryview) -> int:
    """Bytes read, 0 at the end of the stream, -1 if there is nothing now."""
    try:
        return sock.recv_into(buffer)
    except BlockingIOError:
        return -1


def _send(sock: socket.socket, data: bytes | memoryview) -> int:
    """How many bytes the kernel took; 0 if it takes none now."""
    try:
        return sock.send(data)
    except BlockingIOError:
        return 0
