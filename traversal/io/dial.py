"""Connect to a DERP server as a client: TCP, TLS, upgrade, DERP handshake.

For mesh links, workers of one host, probes and load tests. The result's socket and TLS state can be
given to the pump.
"""

from __future__ import annotations

import errno
import os
import socket
import ssl
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final, Self

import trio

from traversal.io.chain_check import check_chain, is_address
from traversal.io.marking import new_socket, resolve
from traversal.io.nat64 import discover_prefixes
from traversal.io.proxy import Proxy
from traversal.io.stream import READ_BYTES, HandshakeStream, StreamEndedError
from traversal.io.tls import TlsEngine
from traversal.keys import NONCE_LENGTH, NodePrivate, NodePublic
from traversal.paths.nat64 import translate
from traversal.relay_map import (
    CertificateName,
    CertificatePolicy,
    Dial,
    Family,
    RelayNode,
)
from traversal.wire.address import Address
from traversal.wire.derp import PROTOCOL_VERSION, ClientInfo, DerpError, ServerInfo
from traversal.wire.derp_upgrade import (
    MAX_RESPONSE_HEAD_LENGTH,
    ClientHandshake,
    maybe_server_key_from_certificates,
)

DIAL_TIMEOUT_SECONDS: Final = 10.0
"""From name resolution to SERVER_INFO (DERP specification 15.1)."""
HOLD_BACK_SECONDS: Final = 0.2
"""IPv4 starts this much after IPv6, and each further address after the one before it."""
MAX_ADDRESSES: Final = 8
"""Of those that a name resolves to, so many are tried."""

CLIENT_INFO: Final = ClientInfo(version=PROTOCOL_VERSION, can_ack_pings=True, app_name="underpass")
"""What a regular client says of itself. By the name our relays know that it heeds Restarting."""

Route = tuple[str, socket.AddressFamily]
"""A host name or address to connect to, and the family to use (AF_UNSPEC for both)."""

_SocketAddress = tuple[str, int]
_NO_ROUTE: Final = frozenset({errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EADDRNOTAVAIL})
"""How a host without IPv4 refuses to connect by it."""


class DialError(Exception):
    """A DERP server could not be reached. The text names the server, the step and the reason.

    Attributes:
        step: `resolve`, `connect`, `proxy`, `tls`, `certificate`, `upgrade` or `handshake`.
        is_timeout: whether the server, once connected to, just fell silent.
    """

    def __init__(self, target: str, step: str, reason: str, *, is_timeout: bool = False) -> None:
        super().__init__(f"{target}: {_STEPS[step]}: {reason}")
        self.step = step
        self.reason = reason
        self.is_timeout = is_timeout and step not in ("resolve", "connect")


_VERIFICATION: Final = "certificate verification failed: "
_STEPS: Final = {
    "resolve": "can't resolve the name",
    "connect": "can't connect",
    "proxy": "can't connect by the proxy",
    "tls": "the TLS handshake failed",
    "certificate": "its certificate is not accepted",
    "upgrade": "it did not upgrade to DERP",
    "handshake": "the DERP handshake failed",
}


@dataclass(frozen=True, slots=True)
class Target:
    """A DERP server: where it is and how to know that it is the right one.

    Attributes:
        host: its name or IP address: for SNI, the HTTP Host header, and errors.
        policy: how to judge its certificate; None for plain HTTP.
        routes: where to connect, in order of preference; empty for `host` itself.
        segment_bytes: what TCP may put into one segment either way; 0 for the system's choice.
    """

    host: str
    port: int
    policy: CertificatePolicy | None
    routes: tuple[Route, ...] = ()
    segment_bytes: int = 0

    @classmethod
    def of_node(cls, node: RelayNode, *, plain: bool = False) -> Self:
        """A node of a relay map. Raises ValueError for one without a relay."""
        if node.derp_port is None or not node.is_relay:
            raise ValueError(f"node {node.name} is no relay: it only serves STUN")
        return cls(
            host=node.host_name,
            port=node.derp_port,
            policy=None if plain else node.certificate_policy,
            routes=(*_routes(node, 6), *_routes(node, 4)),
        )

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"

    @property
    def server_name(self) -> str | None:
        """For SNI: the host, None if that is an IP address."""
        return None if is_address(self.host) else self.host.rstrip(".")

    @property
    def host_header(self) -> str:
        """For HTTP: the host, with the port where it is not the scheme's default."""
        default = 80 if self.policy is None else 443
        return str(self).removesuffix(f":{default}")


def _routes(node: RelayNode, family: Family) -> Sequence[Route]:
    address = node.dial_address(family)
    if address is Dial.NEVER:
        return ()
    kind = socket.AF_INET if family == 4 else socket.AF_INET6
    return ((node.host_name if address is Dial.BY_NAME else str(address), kind),)


@dataclass(frozen=True, slots=True)
class DialTimes:
    """How long each step took, in seconds; name resolution counts as connecting."""

    connect_seconds: float
    tls_seconds: float
    handshake_seconds: float


@dataclass(frozen=True, slots=True)
class Dialed:
    """A connection to a DERP server on which frames flow.

    Attributes:
        stream: for sending; receive by `receive_frames`.
        chain: the certificates that were presented, in DER; empty for a plain connection.
        fast_start: whether the server's key was known from its meta certificate.
    """

    target: str
    stream: HandshakeStream
    handshake: ClientHandshake
    server_key: NodePublic
    server_info: ServerInfo
    tls_version: str | None
    chain: tuple[bytes, ...]
    fast_start: bool
    times: DialTimes

    async def receive_frames(self) -> list[tuple[int, bytes]]:
        """At least one frame as (type, body), all that are there.

        Raises StreamEndedError at the end of the connection, DerpError for a frame too long.
        """
        splitter = self.handshake.splitter
        while not (frames := list(splitter.frames())):
            data = await self.stream.receive()
            if not data:
                raise StreamEndedError("the server closed the connection")
            splitter.receive_data(data)
        return frames

    def detach(self) -> tuple[socket.socket, TlsEngine | None, bytes]:
        """Socket (non-blocking), TLS state, and the bytes received beyond the handshake.

        For the pump; this object must not be used afterwards.
        """
        received = self.handshake.splitter.take_rest()
        sock, tls = self.stream.detach()
        return sock, tls, received

    def close(self) -> None:
        """Close at once; harmless when repeated."""
        self.stream.close()


async def dial(
    target: Target,
    private_key: NodePrivate,
    *,
    info: ClientInfo = CLIENT_INFO,
    token: str = "",
    ideal_node: str = "",
    fast_start: bool = True,
    make_context: Callable[[], ssl.SSLContext] = ssl.create_default_context,
    proxy: Proxy | None = None,
) -> Dialed:
    """Connect and shake hands, within 10 s in all.

    Args:
        info: what to say of ourselves, for example a mesh key.
        token: an admission token of an Underpass relay.
        ideal_node: the name of the node that would have been preferred.
        fast_start: use the server's meta certificate if there is one.
        make_context: makes a context that verifies chains; by default with the system's roots.
        proxy: connect by this HTTP proxy; it resolves the server's name.

    Raises DialError.
    """
    progress = _Progress(str(target))
    with progress, trio.move_on_after(DIAL_TIMEOUT_SECONDS):
        stream, tls = await _open(target, progress, make_context, proxy)
        with _closed_on_error(stream):
            return await _shake_hands(
                stream,
                tls,
                private_key,
                progress,
                host=target.host_header,
                info=info,
                token=token,
                ideal_node=ideal_node,
                fast_start=fast_start,
            )
    raise progress.timeout()


async def connect(
    target: Target,
    *,
    make_context: Callable[[], ssl.SSLContext] = ssl.create_default_context,
    proxy: Proxy | None = None,
    read_bytes: int = READ_BYTES,
) -> tuple[HandshakeStream, TlsEngine | None]:
    """Connect by TCP and TLS only, within 10 s, for HTTP. Raises DialError."""
    progress = _Progress(str(target))
    with progress, trio.move_on_after(DIAL_TIMEOUT_SECONDS):
        return await _open(target, progress, make_context, proxy, read_bytes)
    raise progress.timeout()


async def _tunnel(stream: HandshakeStream, target: str, proxy: Proxy, progress: _Progress) -> None:
    """Have the proxy connect us (DERP specification 15.1); nothing may follow its answer."""
    progress.step = "proxy"
    await stream.send_all(proxy.encode_connect(target))
    head = b""
    while b"\r\n\r\n" not in head:
        data = await stream.receive()
        if not data or len(head) > MAX_RESPONSE_HEAD_LENGTH:
            raise progress.error(f"the proxy {proxy} did not answer to CONNECT")
        head += data
    status = head.split(b"\r\n", 1)[0].decode("latin-1")
    if status.split(" ")[1:2] != ["200"]:
        raise progress.error(f"the proxy {proxy} refused: {status!r}")
    stream.put_back(head.partition(b"\r\n\r\n")[2])


async def dial_path(path: str, private_key: NodePrivate, *, info: ClientInfo) -> Dialed:
    """Connect to a relay on this host by its Unix socket, without TLS. Raises DialError."""
    progress = _Progress(path)
    with progress, trio.move_on_after(DIAL_TIMEOUT_SECONDS):
        sock = trio.socket.socket(socket.AF_UNIX)
        stream = HandshakeStream(sock)
        with _closed_on_error(stream):
            await sock.connect(path)
            return await _shake_hands(
                stream, None, private_key, progress, host="localhost", info=info
            )
    raise progress.timeout()


class _Progress:
    """Which step we are at and when each began; turns the errors of a step into DialError."""

    def __init__(self, target: str) -> None:
        self.target = target
        self.step = "connect"
        self.began = {"connect": trio.current_time()}

    def enter(self, step: str) -> None:
        self.step = step
        self.began[step] = trio.current_time()

    def error(self, reason: str) -> DialError:
        return DialError(self.target, self.step, reason)

    def timeout(self) -> DialError:
        reason = f"no answer within {DIAL_TIMEOUT_SECONDS:.0f} s"
        return DialError(self.target, self.step, reason, is_timeout=True)

    def times(self) -> DialTimes:
        shaking = self.began["upgrade"]
        tls = self.began.get("tls", shaking)
        return DialTimes(
            connect_seconds=tls - self.began["connect"],
            tls_seconds=shaking - tls,
            handshake_seconds=trio.current_time() - shaking,
        )

    def __enter__(self) -> None:
        pass

    def __exit__(self, _type: object, error: BaseException | None, _traceback: object) -> None:
        if isinstance(error, StreamEndedError | DerpError):
            reason = str(error).removeprefix("TLS handshake: ")
            if reason.startswith(_VERIFICATION):
                self.step = "certificate"
            raise self.error(reason.removeprefix(_VERIFICATION)) from None
        if isinstance(error, OSError):
            raise self.error(_reason(error)) from None


@contextmanager
def _closed_on_error(stream: HandshakeStream) -> Iterator[None]:
    try:
        yield
    except BaseException:
        stream.close()
        raise


async def _open(
    target: Target,
    progress: _Progress,
    make_context: Callable[[], ssl.SSLContext],
    proxy: Proxy | None,
    read_bytes: int = READ_BYTES,
) -> tuple[HandshakeStream, TlsEngine | None]:
    first = target
    if proxy is not None:
        first = Target(proxy.host, proxy.port, None, segment_bytes=target.segment_bytes)
    stream = HandshakeStream(await _connect(first, progress), read_bytes=read_bytes)
    with _closed_on_error(stream):
        if proxy is not None:
            await _tunnel(stream, str(target), proxy, progress)
        if target.policy is None:
            return stream, None
        progress.enter("tls")
        tls = await _start_tls(stream, target, make_context)
        problem = check_chain(
            tls.peer_chain(), target.policy, target.server_name, datetime.now(UTC)
        )
        if problem is not None:
            progress.step = "certificate"
            raise progress.error(problem)
    return stream, tls


async def _connect(target: Target, progress: _Progress) -> trio.socket.SocketType:
    """The first connection that succeeds, through a NAT64 where there is no way for IPv4."""
    addresses = await _resolve(target, progress)
    progress.step = "connect"
    failed: dict[_SocketAddress, OSError] = {}
    sock = await _race(addresses, failed, target.segment_bytes)
    if sock is None:
        without_route = [
            Address(*address)
            for address, error in failed.items()
            if ":" not in address[0] and error.errno in _NO_ROUTE
        ]
        translated = await _through_nat64(without_route)
        sock = await _race(translated, failed, target.segment_bytes)
    if sock is None:
        raise progress.error("; ".join(f"{a[0]}: {_reason(e)}" for a, e in failed.items()))
    return sock


async def _through_nat64(addresses: Sequence[Address]) -> list[tuple[int, _SocketAddress]]:
    """What an IPv6-only host can dial instead; a relay known by name needs none of this, because
    its network's DNS64 translates (RFC 7050)."""
    prefixes = await discover_prefixes() if addresses else ()
    if not prefixes:
        return []
    return [(socket.AF_INET6, (a.host, a.port)) for a in translate(addresses, prefixes)]


async def _race(
    addresses: Sequence[tuple[int, _SocketAddress]],
    failed: dict[_SocketAddress, OSError],
    segment_bytes: int,
) -> trio.socket.SocketType | None:
    """The first that connects; the starts are staggered (RFC 8305, simplified)."""
    winners: list[trio.socket.SocketType] = []

    async def attempt(family: int, address: _SocketAddress, ended: trio.Event) -> None:
        sock = new_socket(family)
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if segment_bytes:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, segment_bytes)
            await sock.connect(address)
        except BaseException as error:
            sock.close()
            if not isinstance(error, OSError):
                raise
            failed[address] = error
            ended.set()
        else:
            winners.append(sock)
            nursery.cancel_scope.cancel()

    try:
        async with trio.open_nursery() as nursery:
            for family, address in addresses:
                ended = trio.Event()
                nursery.start_soon(attempt, family, address, ended)
                with trio.move_on_after(HOLD_BACK_SECONDS):
                    await ended.wait()
    except BaseException:
        for sock in winners:
            sock.close()
        raise
    for sock in winners[1:]:
        sock.close()
    return winners[0] if winners else None


async def _resolve(target: Target, progress: _Progress) -> list[tuple[int, _SocketAddress]]:
    """The addresses to try, in the order of the routes. Raises DialError if there is none."""
    progress.step = "resolve"
    routes = target.routes or ((target.host, socket.AF_UNSPEC),)
    addresses: list[tuple[int, _SocketAddress]] = []
    problem = ""
    for host, family in routes:
        try:
            found = await resolve(host, target.port, family, socket.SOCK_STREAM)
        except OSError as error:
            problem = f"{host}: {_reason(error)}"
            continue
        for kind, _, _, _, address in found:
            assert isinstance(address[0], str)
            assert isinstance(address[1], int)
            addresses.append((kind, (address[0], address[1])))
    if not addresses:
        raise progress.error(problem)
    return addresses[:MAX_ADDRESSES]


async def _start_tls(
    stream: HandshakeStream,
    target: Target,
    make_context: Callable[[], ssl.SSLContext],
) -> TlsEngine:
    policy = target.policy
    name = target.server_name
    if isinstance(policy, CertificateName):
        context = make_context()
        if policy.name == target.host:
            # Given an IP address, OpenSSL sends no SNI and compares with the certificate's
            # addresses, where Tailscale's clients would check no name at all.
            name = policy.name
        else:
            context.check_hostname = False
    else:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return await stream.start_tls(context, server_side=False, server_hostname=name)


async def _shake_hands(
    stream: HandshakeStream,
    tls: TlsEngine | None,
    private_key: NodePrivate,
    progress: _Progress,
    *,
    host: str,
    info: ClientInfo,
    token: str = "",
    ideal_node: str = "",
    fast_start: bool = False,
) -> Dialed:
    progress.enter("upgrade")
    chain = tuple(tls.peer_chain()) if tls is not None else ()
    server_key = None
    if fast_start and tls is not None and tls.version() == "TLSv1.3":
        # Only TLS 1.3 hides certificates from the network path.
        server_key = maybe_server_key_from_certificates(chain)
    handshake = ClientHandshake(
        private_key,
        host,
        info=info,
        nonce=os.urandom(NONCE_LENGTH),
        server_key=server_key,
        ideal_node=ideal_node,
        token=token,
    )
    await stream.send_all(handshake.first_flight())
    while handshake.server_info is None:
        if handshake.server_key is not None:
            progress.step = "handshake"
        data = await stream.receive()
        if not data:
            raise StreamEndedError(_CLOSED[progress.step])
        answer = handshake.receive_data(data)
        if answer:
            await stream.send_all(answer)
    assert handshake.server_key is not None
    return Dialed(
        target=progress.target,
        stream=stream,
        handshake=handshake,
        server_key=handshake.server_key,
        server_info=handshake.server_info,
        tls_version=tls.version() if tls is not None else None,
        chain=chain,
        fast_start=server_key is not None,
        times=progress.times(),
    )


def _reason(error: OSError) -> str:
    if isinstance(error, socket.gaierror) or not error.errno:
        return error.strerror or str(error)
    return os.strerror(error.errno)  # Trio's own text repeats the address


_CLOSED: Final = {
    "upgrade": "the server closed the connection; is it a DERP server?",
    "handshake": "the server closed the connection; does it admit this key?",
}
