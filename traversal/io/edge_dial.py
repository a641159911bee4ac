"""Dial an edge and register, up to the stream that carries peers' packets (see
`traversal.wire.tunnel.peers`)."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final

import trio

from traversal.io.dial import DialError, Target, connect
from traversal.io.http2 import Http2Connection
from traversal.io.http2_engine import Http2Error
from traversal.io.http2_stream import Http2Stream, header
from traversal.io.marking import resolve
from traversal.io.peer_pipe import PeerStream
from traversal.io.proxy import Proxy, ProxyError
from traversal.io.quic import QuicConnection
from traversal.io.quic_endpoints import dial_quic
from traversal.io.quic_settings import connector_configuration
from traversal.io.quic_stream import QuicError
from traversal.keys import NONCE_LENGTH, Box, Entropy, KeyFormatError, NodePrivate
from traversal.relay_map import CertificateName
from traversal.tunnel.control import ControlClient, Refused, Registered
from traversal.tunnel.transport_choice import Transport
from traversal.wire.derp import (
    PROTOCOL_VERSION,
    ClientInfo,
    DerpError,
    FrameSplitter,
    FrameType,
    encode_client_info,
    parse_server_info,
    parse_server_key,
)
from traversal.wire.tunnel.errors import TunnelError
from traversal.wire.tunnel.headers import CONTROL_STREAM, UPGRADE
from traversal.wire.tunnel.peers import MAX_FRAME_BYTES, PEERS, PEERS_SIGNATURE
from traversal.wire.tunnel.registration import RegisterConnection

HTTP2_NAME: Final = "h2.cftunnel.com"
DIAL_SECONDS: Final = 15.0
"""From name resolution to the end of the handshake that proves our key."""
CLIENT_INFO: Final = ClientInfo(version=PROTOCOL_VERSION)

MakeContext = Callable[[], ssl.SSLContext]


class EdgeDialError(Exception):
    """No channel for peers at an edge; the text says where and why."""


@dataclass(frozen=True, slots=True)
class EdgeAddress:
    """Where an edge is: a name or IP address, and a port, for TCP and UDP."""

    host: str
    port: int

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"


@dataclass(frozen=True, slots=True)
class PeerChannel:
    """A channel whose handshake is done.

    Attributes:
        splitter: holds what came behind the handshake.
        quic: for DATAGRAMs; None over HTTP/2.
        local_host: our address; None over QUIC, which does not depend on it.
        ping: returns when the edge has answered. Raises Http2Error; None over QUIC, which notices a
            dead edge itself.
    """

    transport: Transport
    address: EdgeAddress
    location: str
    stream: PeerStream
    splitter: FrameSplitter
    quic: QuicConnection | None
    local_host: str | None
    ping: Callable[[], Awaitable[object]] | None


async def dial_edge(
    nursery: trio.Nursery,
    transport: Transport,
    address: EdgeAddress,
    request: RegisterConnection,
    private_key: NodePrivate,
    *,
    ca_file: str | None,
    make_context: MakeContext | None,
    entropy: Entropy,
) -> PeerChannel:
    """A channel; its connection is served in `nursery`, and closed when that is cancelled.

    `make_context` is for HTTP/2; None is without TLS. Raises EdgeDialError.
    """
    try:
        with trio.fail_after(DIAL_SECONDS):
            if transport is Transport.QUIC:
                return await _dial_quic(nursery, address, request, private_key, entropy, ca_file)
            return await _dial_http2(nursery, address, request, private_key, entropy, make_context)
    except trio.TooSlowError:
        raise EdgeDialError(f"{address}: no answer within {DIAL_SECONDS:.0f} s") from None
    except DialError as error:
        raise EdgeDialError(str(error)) from None
    except (Http2Error, QuicError, TunnelError, DerpError, OSError, ProxyError) as error:
        raise EdgeDialError(f"{address}: {error}") from None


async def _dial_quic(
    nursery: trio.Nursery,
    address: EdgeAddress,
    request: RegisterConnection,
    private_key: NodePrivate,
    entropy: Entropy,
    ca_file: str | None,
) -> PeerChannel:
    found = await resolve(address.host, address.port, socket.AF_UNSPEC, socket.SOCK_DGRAM)
    host, port = found[0][4][:2]
    quic = await dial_quic(nursery, (str(host), int(port)), connector_configuration(ca_file))
    location = await _register(await quic.open_stream(), request)
    stream = await quic.accept_stream()
    start = b""
    while len(start) < len(PEERS_SIGNATURE):
        data = await stream.receive()
        if not data:
            break
        start += data
    if not start.startswith(PEERS_SIGNATURE):
        raise TunnelError("the edge opened a stream of another kind: it does not carry peers")
    splitter = FrameSplitter(MAX_FRAME_BYTES)
    splitter.receive_data(start[len(PEERS_SIGNATURE) :])
    await _prove_key(stream, splitter, private_key, entropy)
    return PeerChannel(Transport.QUIC, address, location, stream, splitter, quic, None, None)


async def _dial_http2(
    nursery: trio.Nursery,
    address: EdgeAddress,
    request: RegisterConnection,
    private_key: NodePrivate,
    entropy: Entropy,
    make_context: MakeContext | None,
) -> PeerChannel:
    if make_context is None:
        bytes_below, _ = await connect(Target(address.host, address.port, None))
    else:
        routes = ((address.host, socket.AF_UNSPEC),)
        target = Target(HTTP2_NAME, address.port, CertificateName(HTTP2_NAME), routes)
        proxy = Proxy.maybe_from_environment(address.host)
        if proxy is not None:
            # The proxy connects to the name that it is told, so that has to be the address.
            target = Target(address.host, address.port, CertificateName(HTTP2_NAME))
        bytes_below, _ = await connect(target, make_context=make_context, proxy=proxy)
    http2 = Http2Connection(bytes_below, client_side=False)
    await nursery.start(http2.run)
    control = await _accept(http2, CONTROL_STREAM)
    location = await _register(control, request)
    stream = await _accept(http2, PEERS)
    splitter = FrameSplitter(MAX_FRAME_BYTES)
    await _prove_key(stream, splitter, private_key, entropy)
    return PeerChannel(
        Transport.HTTP2,
        address,
        location,
        stream,
        splitter,
        None,
        bytes_below.local_host,
        http2.ping,
    )


async def _accept(http2: Http2Connection, kind: bytes) -> Http2Stream:
    stream = await http2.accept()
    if header(stream.request_headers, UPGRADE) != kind:
        raise TunnelError("the edge opened a stream of another kind")
    await stream.respond([(b":status", b"200")])
    return stream


async def _register(control: PeerStream, request: RegisterConnection) -> str:
    """Returns the edge's location. Raises TunnelError, Http2Error, QuicError."""
    client = ControlClient(request)
    while True:
        if data := client.data_to_send():
            await control.send(data)
        for event in client.receive(await control.receive()):
            if isinstance(event, Refused):
                raise TunnelError(f"the edge refused us: {event.refusal.cause}")
            if isinstance(event, Registered):
                await control.send(client.data_to_send())
                return event.details.location


async def _prove_key(
    stream: PeerStream, splitter: FrameSplitter, private_key: NodePrivate, entropy: Entropy
) -> None:
    """DERP's handshake, the client's way. Raises DerpError, Http2Error, QuicError."""
    server_key = None
    while True:
        for frame_type, body in splitter.frames():
            if frame_type == FrameType.SERVER_KEY and server_key is None:
                server_key = parse_server_key(body)
                nonce = entropy(NONCE_LENGTH)
                try:
                    info = encode_client_info(CLIENT_INFO, private_key, server_key, nonce)
                except KeyFormatError as error:
                    raise DerpError(f"the edge's key: {error}") from None
                await stream.send(info)
            elif frame_type == FrameType.SERVER_INFO and server_key is not None:
                parse_server_info(body, Box(private_key, server_key))
                return
            else:
                raise DerpError(f"frame type {frame_type:#04x} came before the handshake was over")
        data = await stream.receive()
        if not data:
            raise DerpError("the edge ended the stream before the handshake was over")
        splitter.receive_data(data)
