"""How large a datagram fits through a path, found by padded Pings, never by ICMP.

A search begins with the sizes that most paths have (1500 and 1280 on the wire), then halves the
rest of the interval, common sizes first, until 8 bytes are left. A Pong proves the size for our
direction only; the peer searches its own. Small paths (down to 600 bytes on the wire and below)
are found like large ones: nothing is assumed to fit but the unpadded Ping.

All sizes are bytes on the wire, IP header included.
"""

from __future__ import annotations

from typing import Final

from traversal.wire.disco import PING_LENGTH

UDP_HEADER_BYTES: Final = 8
COMMON_SIZES: Final = (1500, 1280, 1492, 1460, 1420, 1400, 1360, 9000, 8000, 1024, 800, 600, 576)
RESOLUTION_BYTES: Final = 8
TRIES_PER_SIZE: Final = 3
"""At 10 % loss a size that fits is missed once in 146 searches (0.19 ** 3)."""
MIN_TRY_SECONDS: Final = 0.25
REPEAT_SECONDS: Final = 600.0
"""RFC 8899 section 5.1.1 raises the probe size again after 600 s."""


def ip_header_bytes(*, is_ipv6: bool) -> int:
    """The IP header in front of UDP."""
    return 40 if is_ipv6 else 20


class MtuSearch:
    """The search on one path. Poll `poll_probe` when `next_deadline()` has come; feed
    `handle_answer` and `handle_too_big`."""

    def __init__(
        self, *, is_ipv6: bool, ceiling_bytes: int, now: float, geneve_bytes: int = 0
    ) -> None:
        self._header_bytes = ip_header_bytes(is_ipv6=is_ipv6) + UDP_HEADER_BYTES + geneve_bytes
        self._floor = PING_LENGTH + self._header_bytes
        self._ceiling = max(ceiling_bytes, self._floor)
        self.proven_bytes = self._floor
        self._refuted = self._ceiling + 1
        self._size = 0
        self._tries = 0
        self._next_at = now
        self.is_done = False

    @property
    def max_payload_bytes(self) -> int:
        """The largest UDP payload proven to fit (Geneve header not counted in)."""
        return self.proven_bytes - self._header_bytes

    def next_deadline(self) -> float:
        """When to poll. A finished search begins again 600 s later."""
        return self._next_at

    def poll_probe(self, now: float, rtt_seconds: float) -> int | None:
        """The padding of the Ping to send now, if one is due."""
        if now < self._next_at:
            return None
        if self.is_done:
            # Begin again with what was proven: the path may have shrunk as well as grown.
            self.is_done = False
            self._refuted = self._ceiling + 1
            self._size, self._tries = self.proven_bytes, 0
        if self._size and self._tries >= TRIES_PER_SIZE:
            self._refute(self._size)
        if not self._size:
            self._size, self._tries = self._pick(), 0
        if not self._size:
            self.is_done = True
            self._next_at = now + REPEAT_SECONDS
            return None
        self._tries += 1
        self._next_at = now + max(MIN_TRY_SECONDS, 2 * rtt_seconds)
        return self._size - self._floor

    def handle_answer(self, padding_bytes: int, now: float) -> None:
        """A padded Ping was answered."""
        size = self._floor + padding_bytes
        self.proven_bytes = max(self.proven_bytes, size)
        self._refuted = max(self._refuted, self.proven_bytes + 1)
        if self._size and size >= self._size:
            self._size = 0
            self._next_at = now

    def handle_too_big(self, padding_bytes: int, now: float) -> None:
        """Our own kernel refused to send a padded Ping: it exceeds the interface."""
        self._refute(self._floor + padding_bytes)
        self._next_at = now

    def _refute(self, size: int) -> None:
        if size <= self.proven_bytes:
            self.proven_bytes = self._floor
        self._refuted = min(self._refuted, size)
        self._size = 0

    def _pick(self) -> int:
        if self._refuted - self.proven_bytes <= RESOLUTION_BYTES:
            # The top of the interval may be one step away, and common sizes matter to the byte.
            return self._ceiling if self.proven_bytes < self._ceiling < self._refuted else 0
        if self._ceiling <= COMMON_SIZES[0] and self._refuted > self._ceiling:
            return self._ceiling
        for size in COMMON_SIZES:
            if self.proven_bytes < size < self._refuted:
                return size
        return (self.proven_bytes + self._refuted) // 2
