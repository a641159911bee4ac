"""One TCP connection: enough of RFC 9293 that loss delays bytes, and NATs see real segments.

Handshake (simultaneous open included), sliding window, retransmission by timer and by three
duplicate acknowledgments, slow start and one-half decrease, half close, reset, lingering after
the end. Left out: sequence number wrap, SACK, delayed acknowledgments, keep-alive. Never awaits.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from enum import Enum
from typing import TYPE_CHECKING

from netlab.drops import Answer, Endpoint
from netlab.nat import TcpFlag
from netlab.simulated.packet import TCP_HEADER_BYTES, Segment

if TYPE_CHECKING:
    from netlab.simulated.host import SimulatedHost

BUFFER_BYTES = 262_144
"""What either direction may have under way or unread; no window scaling beyond it."""

# RFC 6298: the timer is 1 s before a measurement; Linux's floor afterwards is 0.2 s.
_FIRST_TIMEOUT_SECONDS = 1.0
_MIN_TIMEOUT_SECONDS = 0.2
_MAX_TIMEOUT_SECONDS = 120.0

# Linux's tcp_syn_retries and tcp_retries2: about 127 s and 15 minutes.
_SYN_RETRIES = 6
_RETRIES = 15

# RFC 6928.
_INITIAL_WINDOW_SEGMENTS = 10

# How long a closed socket waits for the peer's FIN, and how long a finished connection still
# answers repeated segments (Linux's tcp_fin_timeout and TIME-WAIT).
_LINGER_SECONDS = 60.0


class State(Enum):
    SYN_SENT = 1
    SYN_RECEIVED = 2
    ESTABLISHED = 3
    CLOSED = 4


class Connection:
    """A connection between two endpoints.

    `on_change` is called after anything that may let a reader, writer or connector go on.
    """

    def __init__(
        self,
        host: SimulatedHost,
        local: Endpoint,
        remote: Endpoint,
        on_change: Callable[[], None],
    ) -> None:
        self._host = host
        self.local = local
        self.remote = remote
        self.on_change = on_change
        self.state = State.CLOSED
        self.error = 0
        self.received = bytearray()
        self.peer_finished = False
        self._orphaned = False
        self._lingering = False
        # Sending: bytes from `_una` on are in `_unacknowledged`; the SYN and FIN count as one.
        self._iss = host.generator.getrandbits(32)
        self._una = self._iss
        self._next = self._iss
        self._unacknowledged = bytearray()
        self._finishing = False
        self._fin_sent = False
        self._peer_window = BUFFER_BYTES
        self._duplicates = 0
        # Receiving.
        self._expected = 0
        self._early: dict[int, bytes] = {}
        self._early_fin: int | None = None
        self._announced = BUFFER_BYTES
        # Timing.
        self._smoothed: float | None = None
        self._variance = 0.0
        self._timeout = _FIRST_TIMEOUT_SECONDS
        self._timed: tuple[int, float] | None = None
        self._retries = 0
        self._deadline: float | None = None
        self._alarm_at: float | None = None
        self._mss = self._segment_size()
        self._window = _INITIAL_WINDOW_SEGMENTS * self._mss
        self._threshold = BUFFER_BYTES
        host.connections[(*local, *remote)] = self

    # --- commands ------------------------------------------------------------------------

    def connect(self) -> None:
        """Send a SYN."""
        self.state = State.SYN_SENT
        self._next = self._iss + 1
        self._send(TcpFlag.SYN, self._iss)
        self._arm()

    def accept(self, segment: Segment) -> None:
        """Answer a peer's SYN."""
        self.state = State.SYN_RECEIVED
        self._expected = segment.sequence + 1
        self._peer_window = segment.window
        self._next = self._iss + 1
        self._send(TcpFlag.SYN | TcpFlag.ACK, self._iss)
        self._arm()

    @property
    def room(self) -> int:
        """How many bytes `write` takes now."""
        return BUFFER_BYTES - len(self._unacknowledged)

    def write(self, data: bytes) -> int:
        """Take as many bytes as there is room for; return their number."""
        taken = data[: self.room]
        self._unacknowledged += taken
        self._push()
        return len(taken)

    def finish(self) -> None:
        """Send FIN after everything that was written."""
        if not self._finishing:
            self._finishing = True
            self._push()

    def close(self) -> None:
        """Let go of the connection; what was written is still delivered.

        With unread bytes the peer gets RST instead, as from Linux.
        """
        self._orphaned = True
        if self.state is State.CLOSED:
            return
        if self.received or self.state in (State.SYN_SENT, State.SYN_RECEIVED):
            if self.state is not State.SYN_SENT:
                self._send(TcpFlag.RST | TcpFlag.ACK, self._next)
            self._end(0)
            return
        self.finish()
        self._maybe_linger()

    def abort(self) -> None:
        """Send RST and forget."""
        if self.state is not State.CLOSED:
            self._send(TcpFlag.RST | TcpFlag.ACK, self._next)
            self._end(0)

    def read(self, limit: int) -> bytes:
        """Take bytes out of the receive buffer, and tell the peer about the room."""
        data = bytes(self.received[:limit])
        del self.received[:limit]
        # Re-open a nearly closed window by at least half the buffer, not byte by byte.
        grown = self._receive_window() - self._announced
        if data and self.state is not State.CLOSED and grown >= BUFFER_BYTES // 2:
            self._send(TcpFlag.ACK, self._next)
        return data

    # --- segments in ---------------------------------------------------------------------

    def receive(self, segment: Segment, payload: bytes) -> None:
        """Process a segment of this connection."""
        flags = segment.flags
        if flags & TcpFlag.RST:
            self._receive_reset(segment)
        elif self.state is State.SYN_SENT:
            self._receive_in_syn_sent(segment)
        elif flags & TcpFlag.SYN:
            self._receive_repeated_syn(segment)
        elif self.state is not State.CLOSED:
            if flags & TcpFlag.ACK:
                self._receive_acknowledgment(segment, len(payload))
            if payload or flags & TcpFlag.FIN:
                self._receive_data(segment, payload)
            self._maybe_linger()
        self.on_change()

    def receive_error(self, answer: Answer) -> None:
        """React to an ICMP error about one of our segments."""
        if answer is Answer.TOO_BIG:
            self._mss = self._segment_size()
            self._next = max(self._una, self._iss + 1)
            self._fin_sent = False
            self._push()
        elif self.state is State.SYN_SENT:
            refused = answer is Answer.PORT_UNREACHABLE
            self._end(errno.ECONNREFUSED if refused else errno.EHOSTUNREACH)

    def _receive_reset(self, segment: Segment) -> None:
        if self.state is State.SYN_SENT:
            if segment.acknowledgment == self._next:
                self._end(errno.ECONNREFUSED)
        elif self.state is not State.CLOSED:
            self._end(errno.ECONNRESET)

    def _receive_in_syn_sent(self, segment: Segment) -> None:
        if not segment.flags & TcpFlag.SYN:
            return
        self._expected = segment.sequence + 1
        self._peer_window = segment.window
        if not segment.flags & TcpFlag.ACK:
            # Simultaneous open (RFC 9293 section 3.5).
            self.state = State.SYN_RECEIVED
            self._send(TcpFlag.SYN | TcpFlag.ACK, self._iss)
        elif segment.acknowledgment == self._next:
            self._acknowledge(segment.acknowledgment)
            self.state = State.ESTABLISHED
            self._send(TcpFlag.ACK, self._next)
            self._push()

    def _receive_repeated_syn(self, segment: Segment) -> None:
        if self.state is State.SYN_RECEIVED:
            if segment.flags & TcpFlag.ACK and segment.acknowledgment == self._next:
                self._acknowledge(segment.acknowledgment)
                self.state = State.ESTABLISHED
                self._send(TcpFlag.ACK, self._next)
                self._push()
            else:
                self._send(TcpFlag.SYN | TcpFlag.ACK, self._iss)
        elif self.state is State.ESTABLISHED:
            self._send(TcpFlag.ACK, self._next)

    def _receive_acknowledgment(self, segment: Segment, length: int) -> None:
        acknowledged = segment.acknowledgment
        opened = segment.window > self._peer_window
        self._peer_window = segment.window
        if self.state is State.SYN_RECEIVED and acknowledged > self._iss:
            self.state = State.ESTABLISHED
        if acknowledged > self._una:
            self._acknowledge(min(acknowledged, self._highest()))
            self._push()
        elif opened:
            self._push()
        elif acknowledged == self._una < self._next and not length:
            self._duplicates += 1
            if self._duplicates == 3:
                self._threshold = max(self._window // 2, 2 * self._mss)
                self._window = self._threshold
                self._send_from(self._una)

    def _highest(self) -> int:
        """Return the sequence number after everything that may have been sent."""
        syn = self._una == self._iss
        return self._una + syn + len(self._unacknowledged) + self._finishing

    def _acknowledge(self, acknowledged: int) -> None:
        covered = acknowledged - self._una
        if self._una == self._iss:
            covered -= 1  # the SYN
        del self._unacknowledged[: min(covered, len(self._unacknowledged))]
        self._una = acknowledged
        self._next = max(self._next, acknowledged)
        self._duplicates = 0
        self._retries = 0
        if self._timed is not None and acknowledged >= self._timed[0]:
            self._measure(self._host.world.now() - self._timed[1])
            self._timed = None
        if self._window < self._threshold:
            self._window += self._mss
        else:
            self._window += max(1, self._mss * self._mss // self._window)
        self._window = min(self._window, BUFFER_BYTES)
        self._arm()

    def _receive_data(self, segment: Segment, payload: bytes) -> None:
        start = segment.sequence
        if segment.flags & TcpFlag.FIN:
            self._early_fin = start + len(payload)
        if self._orphaned and start + len(payload) > self._expected:
            self.abort()  # bytes that nobody will read
            return
        if start <= self._expected < start + len(payload):
            self._take(payload[self._expected - start :])
            while self._early:
                first = min(self._early)
                if first > self._expected:
                    break
                data = self._early.pop(first)
                self._take(data[self._expected - first :])
        elif start > self._expected and start - self._expected < BUFFER_BYTES and payload:
            self._early[start] = payload
        if self._early_fin == self._expected and not self.peer_finished:
            self.peer_finished = True
            self._expected += 1
        self._send(TcpFlag.ACK, self._next)

    def _take(self, data: bytes) -> None:
        # Never more than was announced: a peer that ignores the window loses the rest.
        data = data[: max(0, BUFFER_BYTES - len(self.received))]
        self.received += data
        self._expected += len(data)

    def _receive_window(self) -> int:
        return max(0, BUFFER_BYTES - len(self.received))

    # --- segments out --------------------------------------------------------------------

    def _segment_size(self) -> int:
        address = self.remote[0]
        network_header = 20 if len(address) == 4 else 40
        # Not the 65535 of the loopback: round numbers of bytes per event are enough there.
        mtu = min(self._host.mtu_to(address), 16_384)
        return mtu - network_header - TCP_HEADER_BYTES

    def _send(self, flags: int, sequence: int, payload: bytes = b"") -> None:
        self._announced = self._receive_window()
        segment = Segment(flags, sequence, self._expected, self._announced)
        self._host.send_segment(self.local, self.remote, segment, payload)

    def _push(self) -> None:
        """Send what the windows allow."""
        if self.state is not State.ESTABLISHED:
            return
        first = self._una
        limit = first + min(self._window, self._peer_window)
        end = first + len(self._unacknowledged)
        while self._next < end and self._next < limit:
            self._next += self._send_from(self._next, min(limit, end))
        if self._finishing and not self._fin_sent and self._next == end:
            self._fin_sent = True
            self._send(TcpFlag.FIN | TcpFlag.ACK, self._next)
            self._next += 1
        if self._next > self._una or self._unacknowledged:
            self._arm(restart=False)

    def _send_from(self, sequence: int, limit: int | None = None) -> int:
        """Send one segment that starts at `sequence`; return its length."""
        if sequence == self._iss:
            flags = TcpFlag.SYN if self.state is State.SYN_SENT else TcpFlag.SYN | TcpFlag.ACK
            self._send(flags, sequence)
            return 1
        offset = sequence - self._una
        length = min(self._mss, len(self._unacknowledged) - offset)
        if limit is not None:
            length = min(length, limit - sequence)
        if length <= 0:
            if self._finishing:
                self._fin_sent = True
                self._send(TcpFlag.FIN | TcpFlag.ACK, sequence)
                return 1
            return 0
        data = bytes(self._unacknowledged[offset : offset + length])
        self._send(TcpFlag.ACK, sequence, data)
        if self._timed is None and self._retries == 0:
            self._timed = (sequence + length, self._host.world.now())
        return length

    # --- timers --------------------------------------------------------------------------

    def _measure(self, sample: float) -> None:
        """RFC 6298 section 2."""
        if self._smoothed is None:
            self._smoothed, self._variance = sample, sample / 2
        else:
            self._variance += (abs(sample - self._smoothed) - self._variance) / 4
            self._smoothed += (sample - self._smoothed) / 8
        self._timeout = max(_MIN_TIMEOUT_SECONDS, self._smoothed + 4 * self._variance)

    def _arm(self, restart: bool = True) -> None:
        """Set the retransmission deadline, or clear it when nothing is under way."""
        if self._next == self._una and not self._unacknowledged:
            self._deadline = None
            return
        if self._deadline is not None and not restart:
            return
        now = self._host.world.now()
        self._deadline = now + min(self._timeout * 2**self._retries, _MAX_TIMEOUT_SECONDS)
        if self._alarm_at is None or self._alarm_at > self._deadline:
            self._alarm_at = self._deadline
            self._host.world.schedule(self._deadline, self._on_time, self._deadline)

    def _on_time(self, alarm: float) -> None:
        if alarm != self._alarm_at:
            return  # an earlier alarm took its place
        self._alarm_at = None
        if self._deadline is None or self.state is State.CLOSED:
            return
        if self._deadline > alarm:
            self._alarm_at = self._deadline
            self._host.world.schedule(self._deadline, self._on_time, self._deadline)
            return
        self._retries += 1
        handshaking = self.state is not State.ESTABLISHED
        if self._retries > (_SYN_RETRIES if handshaking else _RETRIES):
            self._end(errno.ETIMEDOUT)
            self.on_change()
            return
        self._timed = None
        if self._retries > 1 or not handshaking:
            self._threshold = max(self._window // 2, 2 * self._mss)
            self._window = self._mss
        sent = self._send_from(self._una)
        if not handshaking:
            # Go back: what follows is sent again as the acknowledgments come in.
            self._next = self._una + sent
            self._fin_sent = self._fin_sent and self._next == self._highest()
        self._deadline = None
        self._arm()

    # --- the end -------------------------------------------------------------------------

    def _maybe_linger(self) -> None:
        """Start the last wait once the program has closed and our FIN has been acknowledged."""
        all_acknowledged = self._fin_sent and self._una == self._next
        if self._orphaned and all_acknowledged and not self._lingering:
            self._lingering = True
            self._host.world.schedule(self._host.world.now() + _LINGER_SECONDS, self._end, 0)

    def _end(self, error: int) -> None:
        if self.state is not State.CLOSED:
            self.state = State.CLOSED
            self.error = error
            self._deadline = None
            del self._host.connections[(*self.local, *self.remote)]
            self.on_change()
