"""Who is at the other end of an accepted connection, and what a trusted proxy says of it."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from typing import Final

import trio

from relay.proxy_protocol import ProxyProtocolError, parse_proxy_header
from traversal.io.stream import HandshakeStream, StreamEndedError

PROXY_TIMEOUT_SECONDS: Final = 5.0


@dataclass(frozen=True, slots=True)
class Peer:
    """Where a connection comes from; `source` is an IP address in text form."""

    source: str
    port: int


def peer_of(sock: trio.socket.SocketType) -> Peer:
    """The socket's other end, an IPv4-mapped address as IPv4. Raises OSError where it is gone."""
    host, port = sock.getpeername()[:2]
    address = ipaddress.ip_address(host.partition("%")[0])
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    return Peer(str(address), port)


async def receive_proxy_header(stream: HandshakeStream, peer: Peer) -> Peer:
    """The client's address from the proxy's PROXY header. Raises ProxyProtocolError and
    StreamEndedError."""
    received = b""
    with trio.move_on_after(PROXY_TIMEOUT_SECONDS):
        while True:
            data = await stream.receive()
            if not data:
                raise StreamEndedError("the proxy closed the connection before a PROXY header")
            received += data
            header = parse_proxy_header(received)
            if header is not None:
                stream.put_back(received[header.length :])
                if header.source is None:
                    return peer
                return Peer(*header.source)
    raise ProxyProtocolError("the trusted proxy sent no PROXY header within 5 s")
