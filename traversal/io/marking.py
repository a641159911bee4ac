"""Sockets and names for a node whose packets must not go where the host's other packets go.

Where everything is routed into a tunnel (WireGuard with AllowedIPs 0.0.0.0/0), the node's own
packets, which carry that tunnel, must stay outside. As with WireGuard's FwMark and Tailscale's
bypass mark, its sockets get a mark (SO_MARK), and a routing rule sends marked packets another way.

The mark belongs to the tasks that run inside `marked`, and to those that these start, so that no
socket can be forgotten. All sockets of `traversal` towards the network are made by `new_socket`,
and all its names looked up by `resolve`: the system's resolver would ask without the mark.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Final

import trio

DNS_PORT: Final = 53
DNS_TIMEOUT_SECONDS: Final = 2.0
"""For one server; the next is asked then."""
RESOLVER_FILE: Final = "/etc/resolv.conf"
MAX_SERVERS: Final = 3
MAX_DNS_BYTES: Final = 4096

_mark: ContextVar[int] = ContextVar("underpass socket mark", default=0)

AddressInfo = tuple[int, int, int, str, tuple[Any, ...]]


@contextmanager
def marked(mark: int) -> Iterator[None]:
    """Inside, and in tasks started inside, sockets get this mark; 0 for none."""
    token = _mark.set(mark)
    try:
        yield
    finally:
        _mark.reset(token)


def new_socket(
    family: int = socket.AF_INET, kind: int = socket.SOCK_STREAM
) -> trio.socket.SocketType:
    """A socket with the mark that is in force. Raises OSError: PermissionError without the right
    to set a mark."""
    sock = trio.socket.socket(family, kind)
    mark = _mark.get()
    if mark:
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, mark)
        except BaseException:
            sock.close()
            raise
    return sock


async def resolve(host: str, port: int | None, family: int, kind: int) -> list[AddressInfo]:
    """`getaddrinfo` as Trio does it; with a mark in force, by DNS with marked packets instead.

    Names that only the system knows (files, mDNS) are left to its resolver then, too, but only if
    no DNS server knows them. Raises OSError.
    """
    if not _mark.get() or _is_address(host):
        return list(await trio.socket.getaddrinfo(host, port, family=family, type=kind))
    found: list[AddressInfo] = []
    for wanted, record in ((socket.AF_INET6, "AAAA"), (socket.AF_INET, "A")):
        if family in (wanted, socket.AF_UNSPEC):
            for address in await _ask_servers(host, record):
                found += await trio.socket.getaddrinfo(address, port, family=wanted, type=kind)
    if found:
        return found
    return list(await trio.socket.getaddrinfo(host, port, family=family, type=kind))


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


async def _ask_servers(host: str, record: str) -> list[str]:
    # Imported late: it is slow to import, and few nodes have a mark.
    import dns.exception
    import dns.resolver

    try:
        servers = dns.resolver.Resolver(RESOLVER_FILE).nameservers
    except dns.exception.DNSException:
        return []
    for server in servers[:MAX_SERVERS]:
        with trio.move_on_after(DNS_TIMEOUT_SECONDS):
            try:
                return await _ask(str(server), host, record)
            except (OSError, dns.exception.DNSException, UnicodeError):
                continue
    return []


async def _ask(server: str, host: str, record: str) -> list[str]:
    """The addresses that a server knows, by UDP or, for a long answer, by TCP. Raises OSError and
    DNSException."""
    import dns.flags
    import dns.message
    import dns.rdatatype

    query = dns.message.make_query(host, record)
    wire = query.to_wire()
    family = socket.AF_INET6 if ":" in server else socket.AF_INET
    with new_socket(family, socket.SOCK_DGRAM) as sock:
        await sock.connect((server, DNS_PORT))
        await sock.send(wire)
        while True:
            answer = dns.message.from_wire(await sock.recv(MAX_DNS_BYTES), ignore_trailing=True)
            if query.is_response(answer):
                break
    if answer.flags & dns.flags.TC:
        with new_socket(family) as sock:
            await sock.connect((server, DNS_PORT))
            stream = trio.SocketStream(sock)
            await stream.send_all(len(wire).to_bytes(2, "big") + wire)
            data = b""
            while len(data) < 2 or len(data) < 2 + int.from_bytes(data[:2], "big"):
                more = await stream.receive_some(MAX_DNS_BYTES)
                if not more:
                    raise OSError("the DNS server hung up")
                data += more
            answer = dns.message.from_wire(data[2:])
    kind = dns.rdatatype.from_text(record)
    return [item.address for rrset in answer.answer if rrset.rdtype == kind for item in rrset]
