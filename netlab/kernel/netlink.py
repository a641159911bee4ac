"""A small rtnetlink: links, addresses and routes, many requests to one system call.

A request is a netlink message (`nlmsghdr`, a family header, attributes), built by a pure
function and sent by `Netlink.run`:

    nlmsghdr   u32 length, u16 type, u16 flags, u32 sequence, u32 port
    rtattr     u16 length (header included), u16 type, payload, padding to 4 bytes

Only what the lab needs is here; the layouts are those of linux/rtnetlink.h and linux/if_link.h.
"""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from netlab.kernel.namespaces import NetworkNamespace

IpAddress: TypeAlias = ipaddress.IPv4Address | ipaddress.IPv6Address
IpInterface: TypeAlias = ipaddress.IPv4Interface | ipaddress.IPv6Interface
IpNetwork: TypeAlias = ipaddress.IPv4Network | ipaddress.IPv6Network

NETLINK_ROUTE = 0
NETLINK_NETFILTER = 12
SOL_NETLINK = 270
NETLINK_ADD_MEMBERSHIP = 1
NETLINK_CAP_ACK = 10

NLM_F_REQUEST, NLM_F_ACK, NLM_F_DUMP = 0x1, 0x4, 0x300
NLM_F_REPLACE, NLM_F_EXCL, NLM_F_CREATE = 0x100, 0x200, 0x400
NLMSG_ERROR, NLMSG_DONE = 2, 3

_RTM_NEWLINK, _RTM_DELLINK, _RTM_SETLINK = 16, 17, 19
_RTM_NEWADDR, _RTM_DELADDR, _RTM_NEWROUTE, _RTM_DELROUTE = 20, 21, 24, 25
_IFLA_ADDRESS, _IFLA_IFNAME, _IFLA_MTU, _IFLA_LINKINFO = 1, 3, 4, 18
_IFLA_NET_NS_FD, _IFLA_GSO_MAX_SEGS = 28, 40
_IFLA_INFO_KIND, _IFLA_INFO_DATA, _VETH_INFO_PEER = 1, 2, 1
_IFA_ADDRESS, _IFA_LOCAL, _IFA_FLAGS = 1, 2, 8
_RTA_DST, _RTA_OIF, _RTA_PREFSRC = 1, 4, 7
_IFA_F_NODAD = 0x02
_IFF_UP, _IFF_NOARP = 0x1, 0x80
_RT_TABLE_MAIN, _RTPROT_STATIC, _RT_SCOPE_LINK, _RTN_UNICAST = 254, 4, 253, 1

# A request batch stays below the default send buffer (212 992 bytes) with room to spare.
_BATCH_BYTES = 32768

_MESSAGE = struct.Struct("=IHHII")
_IFINFO = struct.Struct("=BxHiII")
_ATTRIBUTE = struct.Struct("=HH")


class NetlinkError(OSError):
    """The kernel refused a request; `strerror` names the request and the reason."""


@dataclass(frozen=True, slots=True)
class Request:
    """One request: what it does in words, and its message type, flags and body."""

    label: str
    kind: int
    flags: int
    body: bytes


def attribute(kind: int, payload: bytes) -> bytes:
    """Encode one attribute with its padding."""
    return _ATTRIBUTE.pack(4 + len(payload), kind) + payload + b"\0" * (-len(payload) % 4)


@dataclass(frozen=True, slots=True)
class LinkEnd:
    """One end of a link: where it lives, what it is called, its index there."""

    namespace: NetworkNamespace
    name: str
    index: int
    mtu_bytes: int = 1500


def _encode_end(end: LinkEnd) -> bytes:
    # Point-to-point without ARP: both ends share one MAC address, so that every frame is for
    # the receiver. ARP over a fresh link loses its first request now and then, and then waits
    # a second.
    flags = _IFF_UP | _IFF_NOARP
    return b"".join(
        (
            _IFINFO.pack(socket.AF_UNSPEC, 0, end.index, flags, flags),
            attribute(_IFLA_IFNAME, end.name.encode() + b"\0"),
            attribute(_IFLA_ADDRESS, b"\x02\0\0\0\0\x01"),
            attribute(_IFLA_MTU, struct.pack("=I", end.mtu_bytes)),
            attribute(_IFLA_NET_NS_FD, struct.pack("=i", end.namespace.descriptor)),
        )
    )


def add_veth(left: LinkEnd, right: LinkEnd) -> Request:
    """Create a veth pair whose ends appear in their namespaces, up and without ARP."""
    data = attribute(_IFLA_INFO_DATA, attribute(_VETH_INFO_PEER, _encode_end(right)))
    info = attribute(_IFLA_LINKINFO, attribute(_IFLA_INFO_KIND, b"veth") + data)
    return Request(
        f"create the link {left.name} - {right.name}",
        _RTM_NEWLINK,
        NLM_F_CREATE | NLM_F_EXCL,
        _encode_end(left) + info,
    )


def set_link(index: int, *, up: bool, gso_max_segments: int | None = None) -> Request:
    """Set a link up or down, and how many segments the kernel may leave in one packet."""
    body = _IFINFO.pack(socket.AF_UNSPEC, 0, index, _IFF_UP if up else 0, _IFF_UP)
    if gso_max_segments is not None:
        body += attribute(_IFLA_GSO_MAX_SEGS, struct.pack("=I", gso_max_segments))
    return Request(f"set link {index} {'up' if up else 'down'}", _RTM_SETLINK, 0, body)


def delete_link(index: int) -> Request:
    """Remove a link, and a veth's other end with it."""
    body = _IFINFO.pack(socket.AF_UNSPEC, 0, index, 0, 0)
    return Request(f"delete link {index}", _RTM_DELLINK, 0, body)


def _encode_address(index: int, address: IpInterface) -> bytes:
    # Duplicate address detection would hold an IPv6 address back for a second.
    flags = _IFA_F_NODAD if address.version == 6 else 0
    family = socket.AF_INET6 if address.version == 6 else socket.AF_INET
    header = struct.pack("=BBBBI", family, address.network.prefixlen, flags, 0, index)
    packed = address.ip.packed
    return header + attribute(_IFA_LOCAL, packed) + attribute(_IFA_ADDRESS, packed)


def add_address(index: int, address: IpInterface) -> Request:
    """Give an interface an address; the prefix makes the connected route."""
    body = _encode_address(index, address)
    return Request(f"add address {address}", _RTM_NEWADDR, NLM_F_CREATE | NLM_F_REPLACE, body)


def delete_address(index: int, address: IpInterface) -> Request:
    """Take an address away from an interface."""
    return Request(f"delete address {address}", _RTM_DELADDR, 0, _encode_address(index, address))


def _encode_route(index: int, destination: IpNetwork, source: IpAddress | None) -> bytes:
    family = socket.AF_INET6 if destination.version == 6 else socket.AF_INET
    header = struct.pack(
        "=BBBBBBBBI",
        family,
        destination.prefixlen,
        0,
        0,
        _RT_TABLE_MAIN,
        _RTPROT_STATIC,
        _RT_SCOPE_LINK if destination.version == 4 else 0,
        _RTN_UNICAST,
        0,
    )
    body = header + attribute(_RTA_OIF, struct.pack("=i", index))
    if destination.prefixlen:
        body += attribute(_RTA_DST, destination.network_address.packed)
    if source is not None:
        body += attribute(_RTA_PREFSRC, source.packed)
    return body


def replace_route(index: int, destination: IpNetwork, source: IpAddress | None = None) -> Request:
    """Route `destination` out of the interface; `source` is what own packets carry."""
    return Request(
        f"route {destination}",
        _RTM_NEWROUTE,
        NLM_F_CREATE | NLM_F_REPLACE,
        _encode_route(index, destination, source),
    )


def delete_route(index: int, destination: IpNetwork) -> Request:
    """Remove the route to `destination` by this interface."""
    body = _encode_route(index, destination, None)
    return Request(f"delete route {destination}", _RTM_DELROUTE, 0, body)


class Netlink:
    """A netlink socket of one namespace; use it as a context manager or close it."""

    def __init__(self, namespace: NetworkNamespace | None = None, protocol: int = NETLINK_ROUTE):
        kind = socket.SOCK_RAW | socket.SOCK_CLOEXEC
        if namespace is None:
            self._socket = socket.socket(socket.AF_NETLINK, kind, protocol)
        else:
            self._socket = namespace.socket(socket.AF_NETLINK, kind, protocol)
        self._socket.setsockopt(SOL_NETLINK, NETLINK_CAP_ACK, 1)
        self._sequence = 0

    def __enter__(self) -> Netlink:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()

    def run(self, requests: Iterable[Request]) -> None:
        """Carry out the requests in order.

        Raises:
            NetlinkError: of the first that was refused. Later ones of its batch may still have
                been carried out, so the caller should give up the namespace.
        """
        batch: list[Request] = []
        size = 0
        for request in requests:
            batch.append(request)
            size += 16 + len(request.body)
            if size > _BATCH_BYTES:
                self._run_batch(batch)
                batch, size = [], 0
        if batch:
            self._run_batch(batch)

    def _run_batch(self, batch: Sequence[Request]) -> None:
        first = self._sequence + 1
        self._sequence += len(batch)
        self._socket.send(
            b"".join(
                _MESSAGE.pack(
                    16 + len(request.body),
                    request.kind,
                    request.flags | NLM_F_REQUEST | NLM_F_ACK,
                    first + offset,
                    0,
                )
                + request.body
                for offset, request in enumerate(batch)
            )
        )
        missing = len(batch)
        refused: tuple[int, Request] | None = None
        while missing:
            answer = self._socket.recv(65536)
            position = 0
            while position < len(answer):
                length, kind, _, sequence, _ = _MESSAGE.unpack_from(answer, position)
                if kind == NLMSG_ERROR and sequence >= first:
                    (code,) = struct.unpack_from("=i", answer, position + 16)
                    missing -= 1
                    if code and refused is None:
                        refused = (-code, batch[sequence - first])
                position += (length + 3) & ~3
        if refused is not None:
            number, request = refused
            raise NetlinkError(
                number, f"the kernel refused to {request.label}: {os.strerror(number)}"
            )


def interface_names() -> list[str]:
    """Return the names of the interfaces in the calling thread's namespace."""
    try:
        return [name for _, name in socket.if_nameindex()]
    except OSError as error:
        if error.errno == errno.ENODEV:
            return []
        raise
