"""A small node that finds its path to a peer: relay first, then direct by simple punching.

It is what `underpass-lab demo` and the example scenarios run, on either back end. It knows one
server with a STUN service and the lab's own relay (`netlab.services`), and it prints:

    ready
    mapping 2.1.0.9:40000
    path b relay
    path b direct 2.1.0.7:51820
    path b none
    rtt b 24.1 ms

Messages between nodes are text: ``PING number``, ``PONG number``, ``CANDIDATE address port``,
``ANSWER address port``. Pings and pongs go over every path that is in question, a candidate and
the answer to it, which is the other side's, through the relay only.
"""

from __future__ import annotations

import random

import trio

from netlab.labs import Say
from netlab.services import RELAY_PORT, STUN_PORTS
from netlab.stun import Request, Response, StunError, parse

Endpoint = tuple[str, int]

_PUNCH_INTERVAL_SECONDS = 0.03
_PUNCH_SECONDS = 0.7
"""As in the method behind the table of outcomes (`netlab.punch`)."""
_TICK_SECONDS = 0.25
_LOST_SECONDS = 1.0
"""A path without an answer for this long is lost: four pings."""
_ROUND_SECONDS = 1.5
"""From one attempt to go direct to the next."""
# Every source that a ping came from is answered and tried; strangers must not fill the memory.
_MAX_TARGETS = 8


async def node(say: Say, name: str, peer: str, server: str, direct_after: str = "0") -> None:
    """Be a node until cancelled.

    Args:
        say: prints a line.
        name: the node's name at the relay.
        peer: the other node's name.
        server: the address of the STUN server and relay.
        direct_after: seconds to stay on the relay at first, so that a person can watch.
    """
    with trio.socket.socket(type=trio.socket.SOCK_DGRAM) as sock:
        await sock.bind(("0.0.0.0", 0))
        here = _Node(say, name, peer, server, sock, trio.current_time() + float(direct_after))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(here.receive)
            nursery.start_soon(here.tick)


class _Node:
    def __init__(
        self,
        say: Say,
        name: str,
        peer: str,
        server: str,
        sock: trio.socket.SocketType,
        direct_from: float,
    ) -> None:
        self._say = say
        self._name = name
        self._peer = peer
        self._stun: Endpoint = (server, STUN_PORTS[0])
        self._relay: Endpoint = (server, RELAY_PORT)
        self._sock = sock
        self._direct_from = direct_from
        self._generator = random.Random(name)
        self._is_ready = False
        self._mapping: Endpoint | None = None
        self._targets: dict[Endpoint, None] = {}
        self._pings: dict[int, float] = {}
        self._number = 0
        self._direct: Endpoint | None = None
        self._direct_heard = self._relay_heard = float("-inf")
        self._punch_until = self._next_round = float("-inf")
        self._path = ""

    # --- sending -------------------------------------------------------------------------

    async def _send(self, data: bytes, target: Endpoint) -> None:
        try:
            await self._sock.sendto(data, target)
        except OSError:
            pass  # no network at the moment; the ticks go on

    async def _send_to_peer(self, text: str, target: Endpoint | None) -> None:
        """Send directly, or through the relay if there is no target."""
        if target is None:
            await self._send(f"TO {self._peer}\n{text}".encode(), self._relay)
        else:
            await self._send(text.encode(), target)

    async def _ping(self, target: Endpoint | None) -> None:
        self._number += 1
        self._pings[self._number] = trio.current_time()
        self._pings.pop(self._number - 200, None)
        await self._send_to_peer(f"PING {self._number}", target)

    async def tick(self) -> None:
        """Keep the paths alive and look for better ones."""
        while True:
            now = trio.current_time()
            self._judge(now)
            if self._direct is None and now >= self._next_round:
                self._next_round = now + _ROUND_SECONDS
                await self._send(f"HELLO {self._name}".encode(), self._relay)
                request = Request(transaction=self._generator.randbytes(12))
                await self._send(request.encode(), self._stun)
            await self._ping(None)
            if self._direct is not None:
                await self._ping(self._direct)
            end = now + _TICK_SECONDS
            while (now := trio.current_time()) < end:
                if now < self._punch_until and self._direct is None:
                    for target in list(self._targets):
                        await self._ping(target)
                    await trio.sleep(_PUNCH_INTERVAL_SECONDS)
                else:
                    await trio.sleep(end - now)

    def _judge(self, now: float) -> None:
        """Tell which path is in use, if that has changed."""
        if self._direct is not None and now - self._direct_heard > _LOST_SECONDS:
            self._direct = None
            self._targets.clear()
            self._next_round = now
        if self._direct is not None:
            path = f"direct {self._direct[0]}:{self._direct[1]}"
        else:
            path = "relay" if now - self._relay_heard <= _LOST_SECONDS else "none"
        if path != self._path and (path != "none" or self._path):
            self._path = path
            self._say(f"path {self._peer} {path}")

    # --- receiving -----------------------------------------------------------------------

    async def receive(self) -> None:
        """Handle whatever comes."""
        while True:
            try:
                data, source = await self._sock.recvfrom(2048)
            except OSError:
                continue  # an ICMP error about an earlier packet
            if source == self._stun:
                await self._handle_stun(data)
            elif source == self._relay:
                head, _, payload = data.partition(b"\n")
                if head == b"WELCOME" and not self._is_ready:
                    self._is_ready = True
                    self._say("ready")
                elif head == b"FROM " + self._peer.encode():
                    await self._handle_message(payload.decode(errors="replace"), None)
            else:
                await self._handle_message(data.decode(errors="replace"), source[:2])

    async def _handle_stun(self, data: bytes) -> None:
        try:
            response = parse(data)
        except StunError:
            return
        if not isinstance(response, Response):
            return
        mapping = (response.address, response.port)
        if mapping != self._mapping:
            self._mapping = mapping
            self._say(f"mapping {mapping[0]}:{mapping[1]}")
        if trio.current_time() >= self._direct_from:
            await self._send_to_peer(f"CANDIDATE {mapping[0]} {mapping[1]}", None)

    async def _handle_message(self, text: str, source: Endpoint | None) -> None:
        now = trio.current_time()
        match text.split():
            case ["PING", number]:
                await self._send_to_peer(f"PONG {number}", source)
                if source is not None:
                    self._add_target(source, now)
            case ["PONG", number] if number.isdigit():
                self._handle_pong(int(number), source, now)
            case ["CANDIDATE" | "ANSWER" as verb, address, port] if port.isdigit():
                if source is not None or now < self._direct_from:
                    return
                self._add_target((address, int(port)), now)
                self._punch_until = now + _PUNCH_SECONDS
                # Both have to punch at the same time, so the peer has to know our side too.
                if verb == "CANDIDATE" and self._mapping is not None:
                    await self._send_to_peer(f"ANSWER {self._mapping[0]} {self._mapping[1]}", None)

    def _add_target(self, target: Endpoint, now: float) -> None:
        if target not in self._targets and len(self._targets) < _MAX_TARGETS:
            self._targets[target] = None
            if self._direct is None and now >= self._direct_from:
                self._punch_until = now + _PUNCH_SECONDS

    def _handle_pong(self, number: int, source: Endpoint | None, now: float) -> None:
        sent = self._pings.pop(number, None)
        if sent is None:
            return
        if source is None:
            self._relay_heard = now
        else:
            self._direct_heard = now
            self._direct = source
        if source is not None or self._direct is None:
            self._say(f"rtt {self._peer} {(now - sent) * 1000:.1f} ms")
        self._judge(now)
