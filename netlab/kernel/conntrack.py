"""What a router in the kernel knows of flows: reading it, making it forget, making it older.

Messages are `nlmsghdr`, then `nfgenmsg` (u8 family, u8 version, u16 resource in network order),
then attributes; types are subsystem * 256 + message. The layouts are those of
linux/netfilter/nfnetlink_conntrack.h.
"""

from __future__ import annotations

import errno
import re
import socket
import struct
from collections.abc import Sequence
from typing import NamedTuple

from netlab.drops import Endpoint
from netlab.kernel.namespaces import NetworkNamespace
from netlab.kernel.netfilter import NftError, list_elements, load_ruleset
from netlab.kernel.netlink import (
    NETLINK_NETFILTER,
    Netlink,
    NetlinkError,
    Request,
    attribute,
    find_attribute,
)

CONNTRACK_NEW, CONNTRACK_DELETE = 0x100, 0x102
_CONNTRACK_GET = 0x101
_TUPLE_ORIGINAL, _TUPLE_REPLY, _TUPLE_IP, _TUPLE_PROTOCOL, _TIMEOUT = 1, 2, 1, 2, 7
_IPV4_SOURCE, _IPV4_DESTINATION, _IPV6_SOURCE, _IPV6_DESTINATION = 1, 2, 3, 4
_NUMBER, _SOURCE_PORT, _DESTINATION_PORT = 1, 2, 3
_NESTED = 0x8000

HEADER_BYTES = 20  # nlmsghdr and nfgenmsg
_ALL_FAMILIES = struct.pack("!BBH", socket.AF_UNSPEC, 0, 0)

_UNIT_SECONDS = {"d": 86400.0, "h": 3600.0, "m": 60.0, "s": 1.0, "ms": 0.001}
_EXPIRES = re.compile(r"expires ((?:\d+(?:ms|[dhms]))+)")


class Flow(NamedTuple):
    """A tracked flow as its first packet and its answers look."""

    protocol: int
    source: Endpoint
    destination: Endpoint
    answer_source: Endpoint
    answer_destination: Endpoint


def parse_flow(message: bytes) -> Flow | None:
    """Parse a conntrack message; None for protocols without ports."""
    tuples = []
    for kind in (_TUPLE_ORIGINAL, _TUPLE_REPLY):
        found = find_attribute(message, HEADER_BYTES, kind)
        parsed = None if found is None else _parse_tuple(found)
        if parsed is None:
            return None
        tuples.append(parsed)
    (protocol, source, destination), (_, answer_source, answer_destination) = tuples
    return Flow(protocol, source, destination, answer_source, answer_destination)


def _parse_tuple(data: bytes) -> tuple[int, Endpoint, Endpoint] | None:
    addresses = find_attribute(data, 0, _TUPLE_IP)
    transport = find_attribute(data, 0, _TUPLE_PROTOCOL)
    if addresses is None or transport is None:
        return None
    protocol = find_attribute(transport, 0, _NUMBER)
    ports = [find_attribute(transport, 0, kind) for kind in (_SOURCE_PORT, _DESTINATION_PORT)]
    ends = [
        find_attribute(addresses, 0, ipv4) or find_attribute(addresses, 0, ipv6)
        for ipv4, ipv6 in ((_IPV4_SOURCE, _IPV6_SOURCE), (_IPV4_DESTINATION, _IPV6_DESTINATION))
    ]
    if protocol is None or None in ports or None in ends:
        return None
    source, destination = (
        (end, int.from_bytes(port, "big"))
        for end, port in zip(ends, ports, strict=True)
        if end is not None and port is not None
    )
    return protocol[0], source, destination


def _encode_tuple(protocol: int, source: Endpoint, destination: Endpoint) -> bytes:
    is_ipv4 = len(source[0]) == 4
    kinds = (_IPV4_SOURCE, _IPV4_DESTINATION) if is_ipv4 else (_IPV6_SOURCE, _IPV6_DESTINATION)
    addresses = attribute(kinds[0], source[0]) + attribute(kinds[1], destination[0])
    transport = (
        attribute(_NUMBER, bytes([protocol]))
        + attribute(_SOURCE_PORT, source[1].to_bytes(2, "big"))
        + attribute(_DESTINATION_PORT, destination[1].to_bytes(2, "big"))
    )
    return attribute(_TUPLE_IP | _NESTED, addresses) + attribute(
        _TUPLE_PROTOCOL | _NESTED, transport
    )


def lives_for(namespace: NetworkNamespace, flow: Flow) -> float | None:
    """Return how many seconds a flow has left if no packet renews it; None if it is gone."""
    family = socket.AF_INET if len(flow.source[0]) == 4 else socket.AF_INET6
    body = struct.pack("!BBH", family, 0, 0) + attribute(
        _TUPLE_ORIGINAL | _NESTED, _encode_tuple(flow.protocol, flow.source, flow.destination)
    )
    try:
        with Netlink(namespace, NETLINK_NETFILTER) as netlink:
            message = netlink.get(_CONNTRACK_GET, body)
    except NetlinkError:
        return None
    timeout = find_attribute(message, HEADER_BYTES, _TIMEOUT)
    return None if timeout is None else float(int.from_bytes(timeout, "big"))


def flush_conntrack(namespace: NetworkNamespace) -> None:
    """Make the kernel forget every flow of a namespace.

    Raises:
        NftError: the kernel refuses.
    """
    request = Request("forget all flows", CONNTRACK_DELETE, 0, _ALL_FAMILIES)
    try:
        with Netlink(namespace, NETLINK_NETFILTER) as netlink:
            netlink.run([request])
    except NetlinkError as error:
        raise NftError(f"cannot flush conntrack: {error.strerror}") from error


def age_flows(namespace: NetworkNamespace, seconds: float) -> None:
    """Take time off the rest of every flow's life, as if it had passed without a packet.

    The kernel counts whole seconds, so a flow's end may be off by one.

    Raises:
        NftError: the kernel refuses.
    """
    try:
        with Netlink(namespace, NETLINK_NETFILTER) as netlink:
            requests = []
            for message in netlink.dump(_CONNTRACK_GET, _ALL_FAMILIES):
                request = _age(message, seconds)
                if request is not None:
                    requests.append(request)
            # One at a time: a flow that has died by itself since must not spoil the others.
            for request in requests:
                try:
                    netlink.run([request])
                except NetlinkError as error:
                    if error.errno != errno.ENOENT:
                        raise
    except NetlinkError as error:
        raise NftError(f"cannot change the age of flows: {error.strerror}") from error


def _age(message: bytes, seconds: float) -> Request | None:
    """Return what makes one flow of a dump older, or ends it."""
    own_tuple = find_attribute(message, HEADER_BYTES, _TUPLE_ORIGINAL)
    timeout = find_attribute(message, HEADER_BYTES, _TIMEOUT)
    if own_tuple is None or timeout is None:
        return None
    body = message[16:HEADER_BYTES] + attribute(_TUPLE_ORIGINAL | _NESTED, own_tuple)
    # The kernel tells the rest of a life rounded down, and takes whole seconds only.
    left = int.from_bytes(timeout, "big") + 1 - seconds
    if left <= 0:
        return Request("end a flow", CONNTRACK_DELETE, 0, body)
    body += attribute(_TIMEOUT, max(1, round(left)).to_bytes(4, "big"))
    return Request("make a flow older", CONNTRACK_NEW, 0, body)


def age_elements(
    namespace: NetworkNamespace, sets: Sequence[tuple[str, str, str]], seconds: float
) -> None:
    """Take time off the rest of the life of all elements of sets and maps.

    Args:
        namespace: of the router.
        sets: (table, kind, name) of each.
        seconds: how much.

    Raises:
        NftError: nftables refuses.
    """
    commands = []
    for table, kind, name in sets:
        elements = list_elements(namespace, table, kind, name)
        commands.append(f"flush {kind} {table} {name}\n")
        left = [aged for element in elements if (aged := _age_element(element, seconds))]
        if left:
            commands.append(f"add element {table} {name} {{ {', '.join(left)} }}\n")
    if commands:
        load_ruleset(namespace, "".join(commands))


def _age_element(element: str, seconds: float) -> str | None:
    """Return an element's text with less time left; None when that was all it had."""
    found = _EXPIRES.search(element)
    if found is None:
        return element
    parts = re.findall(r"(\d+)(ms|[dhms])", found[1])
    left = sum(int(number) * _UNIT_SECONDS[unit] for number, unit in parts) - seconds
    if left <= 0:
        return None
    return _EXPIRES.sub(f"expires {max(1, round(left * 1000))}ms", element)
