"""Names to addresses for the net check, remembered, since it asks every 20 s.

Asked is Trio's resolver where there is no socket mark, so that a simulated internet can answer. An
address that was resolved once is used for five minutes, and longer while the resolver does not
answer: a relay rarely moves, and a broken resolver should not cost the direct paths.
"""

from __future__ import annotations

import socket
from typing import Final

import trio

from traversal.io.marking import resolve
from traversal.relay_map import Family
from traversal.wire.address import Address

FRESH_SECONDS: Final = 300.0
TIMEOUT_SECONDS: Final = 2.0


class Resolver:
    """A cache in front of Trio's resolver; at most one entry per host name of the relay map."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, Family], tuple[str, float]] = {}

    async def maybe_resolve(self, host: str, port: int, family: Family) -> Address | None:
        """The first address of a family, None when there is none."""
        known = self._known.get((host, family))
        if known is not None and trio.current_time() - known[1] < FRESH_SECONDS:
            return Address(known[0], port)
        kind = socket.AF_INET if family == 4 else socket.AF_INET6
        with trio.move_on_after(TIMEOUT_SECONDS):
            try:
                found = await resolve(host, port, kind, socket.SOCK_DGRAM)
                text = str(found[0][4][0])
                self._known[host, family] = text, trio.current_time()
                return Address(text, port)
            except (OSError, UnicodeError):
                pass
        return Address(known[0], port) if known is not None else None

    def forget(self) -> None:
        """Our network is another one; names may mean other addresses there."""
        self._known.clear()
