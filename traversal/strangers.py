"""Nodes that we are not connected to and that open a link to us: who may, and how many at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import trio

from traversal.keys import Box, KeyFormatError, NodePrivate, NodePublic
from traversal.link import Link
from traversal.session import Session
from traversal.wire.introduction import IntroductionError, is_introduction, open_introduction

MAX_WAITING_LINKS: Final = 64
"""Links that peers opened and nobody has accepted yet; further peers must try again."""
STRANGERS_PER_SECOND: Final = 50.0
STRANGERS_BURST: Final = 200.0
"""Introductions of unknown keys that are opened: each costs a key agreement of 30 us."""

Admit = Callable[[NodePublic], bool]
"""Whether a peer that is not connected yet may open a link to us."""
HandleStranger = Callable[[int, NodePublic, bytes], None]
"""Region, node key and payload of a relay packet from a node that is no peer of ours."""
AddPeer = Callable[[NodePublic], tuple[Session, Link]]
"""Make the session and the link of a peer that introduced itself."""


class Strangers:
    """`handle_packet` takes what they send by a relay or the edge; `accept` gives their links."""

    def __init__(
        self,
        private_key: NodePrivate,
        admit: Admit | None,
        handle_stranger: HandleStranger | None,
        add_peer: AddPeer,
    ) -> None:
        self.rejected_introductions = 0
        self._private_key = private_key
        self._admit = admit
        self._handle_stranger = handle_stranger
        self._add_peer = add_peer
        self._opened_links, self._links_to_accept = trio.open_memory_channel[Link](
            MAX_WAITING_LINKS
        )
        self._budget = STRANGERS_BURST
        self._budget_at = trio.current_time()

    async def accept(self) -> Link:
        """The next link that an admitted peer opened."""
        return await self._links_to_accept.receive()

    def close(self) -> None:
        """Admit nobody any more."""
        self._admit = None
        self._opened_links.close()

    def handle_packet(self, region: int, source: bytes, payload: bytes) -> None:
        """A packet from the node key `source`, by the relay of `region` or, with 0, by the edge."""
        key = NodePublic(source)
        if not is_introduction(payload):
            if self._handle_stranger is not None:
                self._handle_stranger(region, key, payload)
            return
        now = trio.current_time()
        try:
            self._check(key, payload, now)
            session, link = self._add_peer(key)
            try:
                session.handle_introduction(payload, region, now)
            except IntroductionError:
                link.close()
                raise
        except IntroductionError:
            self.rejected_introductions += 1
        else:
            self._opened_links.send_nowait(link)

    def _check(self, key: NodePublic, payload: bytes, now: float) -> None:
        """Raises IntroductionError for a stranger that may not open a link."""
        if self._admit is None or not key or not self._admit(key):
            raise IntroductionError("this node is not admitted")
        earned = (now - self._budget_at) * STRANGERS_PER_SECOND
        self._budget = min(STRANGERS_BURST, self._budget + earned)
        self._budget_at = now
        waiting = self._links_to_accept.statistics().current_buffer_used
        if self._budget < 1 or waiting >= MAX_WAITING_LINKS:
            raise IntroductionError("too many strangers at a time")
        self._budget -= 1
        try:
            # Opened here for the proof, so that a forgery costs no state.
            open_introduction(payload, Box(self._private_key, key))
        except KeyFormatError as error:
            raise IntroductionError(f"the key of a stranger: {error}") from None
