"""When a request may be sent again over another connection. Pure.

A connection may die with requests on it whose fate nobody knows. A request that was certainly not
looked at may always be repeated; one that perhaps was, only if repeating does no harm (RFC 9110
9.2.2), and neither once the visitor has seen any of a response, nor when its body is gone.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Final

IDEMPOTENT: Final = frozenset({"GET", "HEAD", "OPTIONS", "PUT", "DELETE"})
MAX_ATTEMPTS: Final = 8
"""Two connectors with their four connections each; when a host dies, all of its may be dying."""
KEPT_BODY_BYTES: Final = 64 << 10
"""A body that has sent more than this can't be sent again: it is not kept."""


def may_retry(
    method: str, *, attempts: int, is_unprocessed: bool, has_whole_body: bool, is_websocket: bool
) -> bool:
    """Whether to try once more after `attempts` that failed without a byte of a response."""
    if attempts >= MAX_ATTEMPTS or not has_whole_body:
        return False
    return is_unprocessed or (method in IDEMPOTENT and not is_websocket)


class ReplayableBody:
    """A body that can be read again from the start as long as little of it was read."""

    def __init__(self, receive: Callable[[], Awaitable[bytes]]) -> None:
        """`receive` returns some bytes, empty at the end."""
        self._receive = receive
        self._kept: list[bytes] = []
        self._kept_bytes = 0
        self._position = 0

    @property
    def is_whole(self) -> bool:
        """Whether everything that was read is kept."""
        return self._kept_bytes <= KEPT_BODY_BYTES

    def rewind(self) -> None:
        """The next `receive` starts at the beginning."""
        self._position = 0

    def stop_keeping(self) -> None:
        """It will not be read again: a response is on its way."""
        del self._kept[: self._position]
        self._position = 0
        self._kept_bytes = KEPT_BODY_BYTES + 1

    async def receive(self) -> bytes:
        """Some bytes, empty at the end."""
        if self._position < len(self._kept):
            self._position += 1
            return self._kept[self._position - 1]
        data = await self._receive()
        # No checkpoint from here on: what was read is kept even if the reader is cancelled.
        self._kept_bytes += len(data)
        if self.is_whole:
            self._kept.append(data)
            self._position += 1
        else:
            self._kept.clear()
            self._position = 0
        return data
