"""What is looked at from time to time instead of counted: rates, and the TCP RTT of clients."""

from __future__ import annotations

import socket
import struct
from bisect import bisect_left
from collections import deque
from typing import Final, NoReturn

import trio
from msgspec import Struct

from relay.counters import Counters
from relay.pump import Connection, Pump
from traversal.keys import NodePublic
from traversal.wire.derp import encode_ping

SAMPLE_SECONDS: Final = 10.0
"""As derper (DERP specification 17)."""
HISTORY_SAMPLES: Final = 90
"""A quarter of an hour."""

RTT_BOUNDS_MS: Final = (10, 20, 50, 100, 150, 250, 500)
RTT_LABELS: Final = (*(f"{bound}ms" for bound in RTT_BOUNDS_MS), "inf", "non-tcp", "error")
"""derper's, of `derp_tcp_rtt`."""

# `tcpi_rtt` in `struct tcp_info`, in microseconds; the kernel only ever appends to the structure.
_TCPI_RTT_OFFSET: Final = 68
_RTT: Final = struct.Struct("=I")
CHECK_TIMEOUT_SECONDS: Final = 2.0

# Never routed to: it is not among the clients.
_CHECKER: Final = NodePublic(b"\xff" * 32)
_PING: Final = encode_ping(bytes(8))
# About 1 ms of work, then other tasks get their turn.
_SLICE: Final = 500


class Rates(Struct, frozen=True, kw_only=True):
    """What happened in the last sampling interval, per second."""

    packets_per_second: float = 0.0
    bytes_per_second: float = 0.0
    """Payload bytes that were delivered."""
    drops_per_second: float = 0.0
    queue_delay_ms: float = 0.0
    """Mean over the packets of the interval."""
    history: tuple[float, ...] = ()
    """`bytes_per_second` of the last HISTORY_SAMPLES intervals, the newest last."""


class Sampler:
    """Run it as a task beside the pump; what it holds is never older than 10 s."""

    def __init__(self, pump: Pump) -> None:
        self.rates = Rates()
        self.rtt: dict[str, int] = dict.fromkeys(RTT_LABELS, 0)
        """Samples since the start, by label."""
        self.pump_problem = ""
        """Why the pump does not serve, if it does not."""
        self._pump = pump
        self._totals = _totals(pump.switch.counters)
        self._history: deque[float] = deque(maxlen=HISTORY_SAMPLES)

    async def run(self) -> NoReturn:
        """Sample every 10 s."""
        then = trio.current_time()
        while True:
            await trio.sleep(SAMPLE_SECONDS)
            now = trio.current_time()
            self.sample_rates(now - then)
            then = now
            self.pump_problem = await check_pump(self._pump)
            connections = list(self._pump.connections.values())
            for start in range(0, len(connections), _SLICE):
                for connection in connections[start : start + _SLICE]:
                    if not connection.closed:
                        self.rtt[_rtt_label(connection)] += 1
                await trio.lowlevel.checkpoint()

    def sample_rates(self, elapsed_seconds: float) -> None:
        """Take what was counted since the last call."""
        totals = _totals(self._pump.switch.counters)
        packets, size, drops, delay_seconds, delayed = (
            after - before for after, before in zip(totals, self._totals, strict=True)
        )
        self._totals = totals
        self._history.append(size / elapsed_seconds)
        self.rates = Rates(
            packets_per_second=packets / elapsed_seconds,
            bytes_per_second=size / elapsed_seconds,
            drops_per_second=drops / elapsed_seconds,
            queue_delay_ms=1000 * delay_seconds / delayed if delayed else 0.0,
            history=tuple(self._history),
        )


async def check_pump(pump: Pump) -> str:
    """Be a client that sends a ping; the problem if no answer comes, else nothing.

    The client is registered like a worker of this host: no watcher is told of it, and it is in no
    number but those of pings and pongs.
    """
    ours, theirs = trio.socket.socketpair()
    with ours:
        sock = socket.socket(fileno=theirs.detach())
        sock.setblocking(False)
        try:
            connection = Connection(_CHECKER, sock, None, is_sibling=True)
            pump.adopt(connection, b"", b"")
        except (OSError, ValueError) as error:
            sock.close()
            return f"the pump takes no connections: {error}"
        with trio.move_on_after(CHECK_TIMEOUT_SECONDS):
            await ours.send(_PING)
            if await ours.recv(1):
                pump.close(connection, "checked")
                return ""
        pump.close(connection, "checked")
    return f"the pump did not answer a ping within {CHECK_TIMEOUT_SECONDS:.0f} s"


def _totals(counters: Counters) -> tuple[int, int, int, float, int]:
    delay = counters.queue_delay
    drops = sum(counters.packets_dropped.values())
    return counters.packets_sent, counters.bytes_sent, drops, delay.total, sum(delay.counts)


def _rtt_label(connection: Connection) -> str:
    sock = connection.sock
    if sock.family not in (socket.AF_INET, socket.AF_INET6):
        return "non-tcp"  # a WebSocket, or another worker
    try:
        info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104)
        (rtt_us,) = _RTT.unpack_from(info, _TCPI_RTT_OFFSET)
    except (OSError, struct.error):
        return "error"
    return RTT_LABELS[bisect_left(RTT_BOUNDS_MS, rtt_us / 1000)]
