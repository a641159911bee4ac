"""From an accepted connection to a client of the pump: HTTP, upgrade, DERP handshake, admission.

Everything before the pump, in ordinary Trio; one task per connection, which ends when the pump has
taken over. Each stage has a deadline, so that a slow or silent client costs a bounded time, and
nothing but its socket and a task until it has proven its key.
"""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import trio

from relay.admission import MESH_VERDICT, Admission, Grant, Verdict
from relay.http import Request
from relay.limits import TokenBucket
from relay.pump import Connection, Pump
from traversal.io.stream import HandshakeStream, StreamEndedError
from traversal.keys import NONCE_LENGTH, Box, MeshKey, NodePrivate, NodePublic
from traversal.wire.derp import (
    HEADER,
    HEADER_LENGTH,
    MAX_CLIENT_INFO_LENGTH,
    MIN_CLIENT_INFO_LENGTH,
    ClientInfo,
    DerpError,
    FrameType,
    ServerInfo,
    encode_server_info,
    encode_server_key,
    parse_client_info,
)
from traversal.wire.derp_upgrade import encode_upgrade_response

HANDSHAKE_TIMEOUT_SECONDS: Final = 10.0
"""For writing SERVER_KEY and, again, for reading CLIENT_INFO (DERP specification 5)."""
OWN_APP_NAME: Final = "underpass"
"""Clients whose AppName starts so are known to take HEALTH and RESTARTING; some others disconnect
when they get one (DERP specification 20)."""


class RefusedError(Exception):
    """A client was not let in; the text is the reason in plain words, for the operator's log."""


@dataclass(frozen=True, slots=True)
class RateLimit:
    """What is read per second from a client whose grant says nothing else."""

    bytes_per_second: int
    burst_bytes: int

    def new_bucket(self, now: float) -> TokenBucket:
        """A full bucket for one client; `now` is in monotonic seconds."""
        return TokenBucket(self.bytes_per_second, self.burst_bytes, now)


@dataclass(frozen=True, slots=True, eq=False)
class Session:
    """A connection that the pump has taken over, and why it was let in."""

    connection: Connection
    key: NodePublic
    verdict: Verdict


class Upgrader:
    """Turns a request for `/derp` into a client of the pump.

    Args:
        mesh_key: the region's; None where there is no mesh.
        rate_limit: a function, since a reload may change it; None for no limit.
        on_close: told when an adopted connection ends, with the reason.
    """

    def __init__(
        self,
        private_key: NodePrivate,
        pump: Pump,
        *,
        mesh_key: MeshKey | None,
        admission: Admission,
        rate_limit: Callable[[], RateLimit | None],
        on_close: Callable[[Connection, str], None],
    ) -> None:
        self._private_key = private_key
        self._server_key = private_key.public()
        self._pump = pump
        self._mesh_key = mesh_key
        self._admission = admission
        self._rate_limit = rate_limit
        self._on_close = on_close

    async def upgrade(
        self,
        stream: HandshakeStream,
        request: Request,
        *,
        port: int = 0,
        is_sibling: bool = False,
        with_response: bool = True,
    ) -> Session:
        """Do the handshake and hand the connection to the pump.

        Args:
            request: for `/derp`; its source and headers count.
            port: the client's TCP port, for mesh peers and logs.
            is_sibling: it came over the socket between workers of this host.
            with_response: False where the upgrade was answered already (WebSocket).

        Raises StreamEndedError, DerpError, RefusedError.
        """
        key, info, box, received = await self._exchange(stream, request, with_response)
        is_mesh = self._mesh_key is not None and info.mesh_key == self._mesh_key
        if is_sibling and not is_mesh:
            raise RefusedError("it is no worker of this relay: its mesh key is wrong")
        verdict = MESH_VERDICT if is_mesh else await self._decide(key, request)
        limit = None if is_mesh else self._limit_of(verdict.grant)
        server_info = ServerInfo()
        if limit is not None:
            server_info = ServerInfo(
                token_bucket_bytes_per_second=limit.bytes_per_second,
                token_bucket_bytes_burst=limit.burst_bytes,
            )
        now = trio.current_time()
        # Before the socket changes hands: an address that does not parse must not leak it.
        address = ipaddress.ip_address(request.source) if request.source else None
        peers = verdict.grant.peers
        sock, tls = stream.detach()
        connection = Connection(
            key,
            sock,
            tls,
            on_close=self._on_close,
            bucket=None if limit is None else limit.new_bucket(now),
            connected_at=now,
            address=address,
            port=port,
            is_mesh=is_mesh,
            is_sibling=is_sibling,
            is_prober=info.is_prober,
            not_ideal=bool(request.header("ideal-node")) and with_response,
            takes_notices=info.app_name.startswith(OWN_APP_NAME),
            permitted=None if peers is None else frozenset(peer.raw for peer in peers),
        )
        self._pump.adopt(
            connection, encode_server_info(server_info, box, os.urandom(NONCE_LENGTH)), received
        )
        return Session(connection, key, verdict)

    async def _decide(self, key: NodePublic, request: Request) -> Verdict:
        """Ask whether the client may use this relay. Raises RefusedError."""
        scheme, _, token = request.header("authorization").partition(" ")
        if scheme.lower() != "bearer":
            token = ""
        verdict = await self._admission.decide(key, request.source, token.strip() or None)
        if not verdict.allow:
            raise RefusedError(f"{key.short()}: {verdict.reason}")
        problem = self._admission.recheck(key, verdict)
        if problem is not None:
            raise RefusedError(f"{key.short()}: {problem}")
        return verdict

    def _limit_of(self, grant: Grant) -> RateLimit | None:
        if grant.rate_bytes_per_second is None:
            return self._rate_limit()
        burst = grant.burst_bytes or 2 * grant.rate_bytes_per_second
        return RateLimit(grant.rate_bytes_per_second, burst)

    async def _exchange(
        self, stream: HandshakeStream, request: Request, with_response: bool
    ) -> tuple[NodePublic, ClientInfo, Box, bytes]:
        greeting = encode_server_key(self._server_key)
        if with_response and request.header("derp-fast-start") != "1":
            greeting = encode_upgrade_response(self._server_key) + greeting
        with trio.move_on_after(HANDSHAKE_TIMEOUT_SECONDS) as writing:
            await stream.send_all(greeting)
        if writing.cancelled_caught:
            raise StreamEndedError("it did not read SERVER_KEY within 10 s")
        with trio.move_on_after(HANDSHAKE_TIMEOUT_SECONDS) as reading:
            body, received = await _receive_client_info(stream)
        if reading.cancelled_caught:
            raise StreamEndedError("it sent no CLIENT_INFO within 10 s")
        key, info, box = parse_client_info(body, self._private_key)
        return key, info, box, received


async def _receive_client_info(stream: HandshakeStream) -> tuple[bytes, bytes]:
    """The body of CLIENT_INFO and what came behind it. Raises DerpError, StreamEndedError."""
    received = bytearray()
    length = None
    while True:
        data = await stream.receive()
        if not data:
            raise StreamEndedError("it closed the connection before CLIENT_INFO")
        received += data
        if length is None and len(received) >= HEADER_LENGTH:
            frame_type, length = HEADER.unpack_from(received)
            if frame_type != FrameType.CLIENT_INFO:
                raise DerpError(f"its first frame has type {frame_type:#04x}, not CLIENT_INFO")
            if not MIN_CLIENT_INFO_LENGTH <= length <= MAX_CLIENT_INFO_LENGTH:
                raise DerpError(f"CLIENT_INFO of {length} bytes")
        if length is not None and len(received) >= HEADER_LENGTH + length:
            end = HEADER_LENGTH + length
            return bytes(received[HEADER_LENGTH:end]), bytes(received[end:])
