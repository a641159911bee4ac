"""Connections that were turned away: counted by stage, logged in plain words, at a bounded rate.

An operator wants to read why a client does not get in; a flood of bad connections must not fill the
disk. So each stage may log a burst of lines and then a few per second, and says how many were left
out.
"""

from __future__ import annotations

import enum
import logging
from collections.abc import Iterable
from typing import Final, Generic, TypeVar

from relay.limits import TokenBucket

logger = logging.getLogger("underpass.relay.refusals")

LINES_PER_SECOND: Final = 2.0
LINES_BURST: Final = 20


class Stage(enum.StrEnum):
    """Where a connection was turned away."""

    ACCEPT_RATE = "accept_rate"
    CONNECTIONS = "connections"
    CONNECTIONS_PER_IP = "connections_per_ip"
    HANDSHAKES = "handshakes"
    PROXY = "proxy"
    TLS = "tls"
    HTTP = "http"
    DERP = "derp"
    ADMISSION = "admission"


AnyStage = TypeVar("AnyStage", bound=enum.StrEnum)


class Refusals(Generic[AnyStage]):
    """Counts and logs. `now` is in monotonic seconds."""

    def __init__(self, stages: Iterable[AnyStage], now: float) -> None:
        self.counts: dict[AnyStage, int] = dict.fromkeys(stages, 0)
        self._buckets = {
            stage: TokenBucket(LINES_PER_SECOND, LINES_BURST, now) for stage in self.counts
        }
        self._left_out: dict[AnyStage, int] = dict.fromkeys(self.counts, 0)

    def note(self, stage: AnyStage, source: str, reason: str, now: float) -> None:
        """One connection from `source` was turned away for `reason`."""
        self.counts[stage] += 1
        if not self._buckets[stage].try_take(now, 1):
            self._left_out[stage] += 1
            return
        left_out = self._left_out[stage]
        self._left_out[stage] = 0
        more = f" ({left_out} such lines left out before)" if left_out else ""
        logger.info("refused %s (%s): %s%s", source or "unknown source", stage, reason, more)
