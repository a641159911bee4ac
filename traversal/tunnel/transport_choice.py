"""QUIC or HTTP/2, and when to try QUIC again (edge tunnel specification 4, without its minutes of
waiting). Pure.

Where both are allowed they race: the preferred one has a head start of a second. QUIC is preferred
until it fails where HTTP/2 works; then HTTP/2 is, and QUIC is tried every few seconds for one
connection, which moves to it when it works again, and the others follow.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import Final

from traversal.tunnel.backoff import Backoff

HEAD_START_SECONDS: Final = 1.0
"""A handshake takes two round trips at most, so this is long even by satellite."""
PROBE_BASE_SECONDS: Final = 5.0
PROBE_CAP_SECONDS: Final = 20.0
"""With a handshake's 5 s it keeps the way back to QUIC well below a minute."""
STEADY_SECONDS: Final = 30.0
"""A QUIC connection that does not live as long counts as a failure of QUIC: else one whose path
drops large packets would be made again and again."""


class Transport(enum.Enum):
    """What a connection to an edge runs over."""

    QUIC = "quic"
    HTTP2 = "http2"


PROTOCOLS: Final = {
    "auto": (Transport.QUIC, Transport.HTTP2),
    "quic": (Transport.QUIC,),
    "http2": (Transport.HTTP2,),
}
"""What a person may allow, the preferred transport first."""


class TransportChoice:
    """The choice of a whole connector; `draw` returns random numbers in [0, 1)."""

    def __init__(self, allowed: tuple[Transport, ...], draw: Callable[[], float]) -> None:
        if not allowed:
            raise ValueError("at least one transport must be allowed")
        self._allowed = allowed
        self._is_quic_blocked = False
        self._probes = Backoff(draw, base_seconds=PROBE_BASE_SECONDS, cap_seconds=PROBE_CAP_SECONDS)
        self._probe_at = 0.0

    @property
    def is_quic_blocked(self) -> bool:
        """Whether QUIC failed where HTTP/2 works."""
        return self._is_quic_blocked

    @property
    def order(self) -> tuple[Transport, ...]:
        """What to dial by, the preferred one first."""
        if len(self._allowed) == 1:
            return self._allowed
        if self._is_quic_blocked:
            return Transport.HTTP2, Transport.QUIC
        return Transport.QUIC, Transport.HTTP2

    def note_registered(self, transport: Transport, now: float, *, quic_was_tried: bool) -> None:
        """A connection registered. `quic_was_tried`: it is HTTP/2 and QUIC was slower or failed."""
        if transport is Transport.QUIC:
            self._is_quic_blocked = False
        elif quic_was_tried:
            self._note_quic_failure(now)

    def note_probe_failed(self, now: float) -> None:
        """QUIC was tried for a connection that runs over HTTP/2, and failed."""
        self._note_quic_failure(now)

    def note_lost(self, transport: Transport, lived_seconds: float, now: float) -> None:
        """A registered connection ended without anybody's wish."""
        if transport is not Transport.QUIC:
            return
        if lived_seconds >= STEADY_SECONDS:
            self._probes.reset()
        elif len(self._allowed) > 1:
            self._note_quic_failure(now)

    def should_move_to_quic(self, now: float) -> bool:
        """Whether a connection that runs over HTTP/2 should try QUIC now."""
        if len(self._allowed) == 1:
            return False
        return not self._is_quic_blocked or now >= self._probe_at

    def _note_quic_failure(self, now: float) -> None:
        self._is_quic_blocked = True
        self._probe_at = now + self._probes.next_wait()
