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
import time
from collections.abc import Iterable, Iterator, Sequence
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

NLM_F_REQUEST, NLM_F_ACK = 0x1, 0x4
NLM_F_REPLACE, NLM_F_EXCL, NLM_F_CREATE = 0x100, 0x200, 0x400
NLM_F_DUMP = 0x300
NLMSG_ERROR = 2
_NLMSG_DONE = 3

_RTM_NEWLINK, _RTM_GETLINK = 16, 18
_RTM_NEWADDR, _RTM_DELADDR, _RTM_NEWROUTE, _RTM_DELROUTE = 20, 21, 24, 25
_RTM_GETROUTE = 26
_IFLA_ADDRESS, _IFLA_IFNAME, _IFLA_MTU, _IFLA_LINKINFO = 1, 3, 4, 18
_IFLA_TXQLEN, _IFLA_OPERSTATE, _IFLA_NET_NS_FD, _IFLA_EXT_MASK = 13, 16, 28, 29
_IFLA_NUM_TX_QUEUES, _IFLA_NUM_RX_QUEUES = 31, 32
_RTEXT_FILTER_SKIP_STATS = 0x8
_IF_OPER_UNKNOWN, _IF_OPER_UP = 0, 6
_IFLA_INFO_KIND, _IFLA_INFO_DATA, _VETH_INFO_PEER = 1, 2, 1
_IFA_ADDRESS, _IFA_LOCAL, _IFA_FLAGS = 1, 2, 8
_RTA_DST, _RTA_OIF, _RTA_PREFSRC = 1, 4, 7
_IFA_F_NODAD = 0x02
_IFF_UP, _IFF_NOARP = 0x1, 0x80
_MAIN_TABLE, _RTPROT_STATIC, _RT_SCOPE_LINK, _RTN_UNICAST, _RTN_LOCAL, _RTN_BLACKHOLE = (
    254,
    4,
    253,
    1,
    2,
    6,
)

# Locally administered MAC addresses: the one of every veth end, and one that nobody sends to.
_COMMON_ADDRESS, _DEAF_ADDRESS = b"\x02\0\0\0\0\x01", b"\x02\0\0\0\0\x02"

# A request batch stays below the default send buffer (212 992 bytes) with room to spare, and so
# do the answers if all of them are refused: each takes up to a kilobyte of the receive buffer.
_BATCH_BYTES, _BATCH_REQUESTS = 32768, 150

_MESSAGE = struct.Struct("=IHHII")
_IFINFO = struct.Struct("=BxHiII")
_ATTRIBUTE = struct.Struct("=HH")
_ONE = struct.pack("=I", 1)


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


def messages(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield (type, whole message) of each netlink message in what was received."""
    position = 0
    while position + 16 <= len(data):
        length, kind = struct.unpack_from("=IH", data, position)
        yield kind, data[position : position + length]
        position += max(16, (length + 3) & ~3)


def find_attribute(data: bytes, offset: int, wanted: int) -> bytes | None:
    """Return the payload of the first attribute of a kind, or None."""
    while offset + 4 <= len(data):
        length, kind = _ATTRIBUTE.unpack_from(data, offset)
        # The two upper bits of the kind are flags (nested, byte order).
        if kind & 0x3FFF == wanted:
            return data[offset + 4 : offset + length]
        offset += max(4, (length + 3) & ~3)
    return None


@dataclass(frozen=True, slots=True)
class LinkEnd:
    """One end of a link: where it lives, what it is called, its index there."""

    namespace: NetworkNamespace
    name: str
    index: int
    mtu_bytes: int = 1500


def _encode_end(end: LinkEnd, *, up: bool) -> bytes:
    # Point-to-point without ARP: both ends share one MAC address, so that every frame is for
    # the receiver. ARP over a fresh link loses its first request now and then, and then waits
    # a second.
    flags = _IFF_NOARP | (_IFF_UP if up else 0)
    return b"".join(
        (
            _IFINFO.pack(socket.AF_UNSPEC, 0, end.index, flags, _IFF_NOARP | _IFF_UP),
            attribute(_IFLA_IFNAME, end.name.encode() + b"\0"),
            attribute(_IFLA_ADDRESS, _COMMON_ADDRESS),
            attribute(_IFLA_MTU, struct.pack("=I", end.mtu_bytes)),
            # Queues for every processor would take a quarter of the time to make a pair.
            attribute(_IFLA_NUM_TX_QUEUES, _ONE),
            attribute(_IFLA_NUM_RX_QUEUES, _ONE),
            attribute(_IFLA_NET_NS_FD, struct.pack("=i", end.namespace.descriptor)),
        )
    )


def add_veth(left: LinkEnd, right: LinkEnd) -> Request:
    """Create a veth pair whose ends appear in their namespaces, without ARP.

    The left end is up; the right one exists first and can't be up before its peer does.
    """
    peer = attribute(_VETH_INFO_PEER, _encode_end(right, up=False))
    data = attribute(_IFLA_INFO_DATA, peer)
    info = attribute(_IFLA_LINKINFO, attribute(_IFLA_INFO_KIND, b"veth") + data)
    return Request(
        f"create the link {left.name} - {right.name}",
        _RTM_NEWLINK,
        NLM_F_CREATE | NLM_F_EXCL,
        _encode_end(left, up=True) + info,
    )


def add_link_kind(kind: str) -> Request:
    """Create a link of a kind that needs no parameters, with a name of the kernel's choice."""
    info = attribute(_IFLA_LINKINFO, attribute(_IFLA_INFO_KIND, kind.encode()))
    body = _IFINFO.pack(socket.AF_UNSPEC, 0, 0, 0, 0) + info
    return Request(f"create a {kind} link", _RTM_NEWLINK, NLM_F_CREATE | NLM_F_EXCL, body)


def set_link(
    index: int, *, up: bool, mtu_bytes: int | None = None, queue_packets: int | None = None
) -> Request:
    """Set a link up or down, its MTU and the length of its transmit queue."""
    body = _IFINFO.pack(socket.AF_UNSPEC, 0, index, _IFF_UP if up else 0, _IFF_UP)
    if mtu_bytes is not None:
        body += attribute(_IFLA_MTU, struct.pack("=I", mtu_bytes))
    if queue_packets is not None:
        body += attribute(_IFLA_TXQLEN, struct.pack("=I", queue_packets))
    return Request(f"set link {index} {'up' if up else 'down'}", _RTM_NEWLINK, 0, body)


def set_link_address(index: int, *, deaf: bool) -> Request:
    """Change a veth end's MAC address so that neither side takes the other's frames, or back.

    No route, address or carrier changes: to both sides it is a silent cut.
    """
    body = _IFINFO.pack(socket.AF_UNSPEC, 0, index, 0, 0)
    body += attribute(_IFLA_ADDRESS, _DEAF_ADDRESS if deaf else _COMMON_ADDRESS)
    return Request(f"{'cut' if deaf else 'heal'} link {index}", _RTM_NEWLINK, 0, body)


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


@dataclass(frozen=True, slots=True)
class Route:
    """Packets for `destination` leave by the interface `index`; by none, they vanish."""

    destination: IpNetwork
    index: int | None
    source: IpAddress | None = None
    """The source address of this machine's own packets."""

    def encode(self) -> bytes:
        """Return the body of a request about this route (`struct rtmsg` and attributes)."""
        is_ipv4 = self.destination.version == 4
        body = struct.pack(
            "=BBBBBBBBI",
            socket.AF_INET if is_ipv4 else socket.AF_INET6,
            self.destination.prefixlen,
            0,
            0,
            _MAIN_TABLE,
            _RTPROT_STATIC,
            _RT_SCOPE_LINK if is_ipv4 and self.index is not None else 0,
            _RTN_BLACKHOLE if self.index is None else _RTN_UNICAST,
            0,
        )
        if self.index is not None:
            body += attribute(_RTA_OIF, struct.pack("=i", self.index))
        if self.destination.prefixlen:
            body += attribute(_RTA_DST, self.destination.network_address.packed)
        if self.source is not None:
            body += attribute(_RTA_PREFSRC, self.source.packed)
        return body


def replace_route(route: Route) -> Request:
    """Add a route, in place of one to the same destination."""
    flags = NLM_F_CREATE | NLM_F_REPLACE
    return Request(f"route {route.destination}", _RTM_NEWROUTE, flags, route.encode())


def delete_route(route: Route) -> Request:
    """Remove a route."""
    return Request(f"delete route {route.destination}", _RTM_DELROUTE, 0, route.encode())


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
            if size > _BATCH_BYTES or len(batch) >= _BATCH_REQUESTS:
                self._run_batch(batch)
                batch, size = [], 0
        if batch:
            self._run_batch(batch)

    def get(self, kind: int, body: bytes) -> bytes:
        """Ask for one object; return its message whole.

        Raises:
            NetlinkError: there is none, or the kernel refused.
        """
        self._sequence += 1
        header = _MESSAGE.pack(16 + len(body), kind, NLM_F_REQUEST, self._sequence, 0)
        self._socket.send(header + body)
        for answer, message in messages(self._socket.recv(65536)):
            if answer != NLMSG_ERROR:
                return message
            (code,) = struct.unpack_from("=i", message, 16)
            raise NetlinkError(-code, os.strerror(-code))
        raise NetlinkError(errno.EPROTO, "the kernel gave no answer")

    def dump(self, kind: int, body: bytes) -> list[bytes]:
        """Ask for all objects of a kind; return their messages whole.

        Raises:
            NetlinkError: the kernel refused.
        """
        self._sequence += 1
        header = _MESSAGE.pack(16 + len(body), kind, NLM_F_REQUEST | NLM_F_DUMP, self._sequence, 0)
        self._socket.send(header + body)
        found: list[bytes] = []
        while True:
            for answer, message in messages(self._socket.recv(1 << 17)):
                if answer == _NLMSG_DONE:
                    return found
                if answer == NLMSG_ERROR:
                    (code,) = struct.unpack_from("=i", message, 16)
                    raise NetlinkError(-code, os.strerror(-code))
                found.append(message)

    def wait_until_up(self, index: int, *, timeout_seconds: float = 2.0) -> None:
        """Wait until a link whose peer just came up carries packets.

        The kernel notices a new carrier in the background and drops everything until then.
        Asking makes Linux 6.8 and later notice at once; older ones take some milliseconds.

        Raises:
            NetlinkError: it didn't come up.
        """
        deadline = time.monotonic() + timeout_seconds
        mask = attribute(_IFLA_EXT_MASK, struct.pack("=I", _RTEXT_FILTER_SKIP_STATS))
        body = _IFINFO.pack(socket.AF_UNSPEC, 0, index, 0, 0) + mask
        while True:
            self._sequence += 1
            self._socket.send(
                _MESSAGE.pack(16 + len(body), _RTM_GETLINK, NLM_F_REQUEST, self._sequence, 0) + body
            )
            answer = self._socket.recv(65536)
            state = find_attribute(answer, 16 + _IFINFO.size, _IFLA_OPERSTATE)
            if state is not None and state[0] in (_IF_OPER_UNKNOWN, _IF_OPER_UP):
                return
            if time.monotonic() > deadline:
                raise NetlinkError(errno.ETIMEDOUT, f"link {index} does not come up")
            time.sleep(0.0005)

    def wait_until_local(self, address: IpAddress, *, timeout_seconds: float = 2.0) -> None:
        """Wait until packets to one of this machine's IPv6 addresses are taken in.

        Linux makes that route in the background, also where it detects no duplicates.

        Raises:
            NetlinkError: the route didn't appear.
        """
        deadline = time.monotonic() + timeout_seconds
        body = struct.pack("=BBBBBBBBI", socket.AF_INET6, 128, 0, 0, 0, 0, 0, 0, 0)
        body += attribute(_RTA_DST, address.packed)
        header = (16 + len(body), _RTM_GETROUTE, NLM_F_REQUEST)
        while True:
            self._sequence += 1
            self._socket.send(_MESSAGE.pack(*header, self._sequence, 0) + body)
            answer = self._socket.recv(65536)
            # The type of a route is byte 7 of struct rtmsg.
            (kind,) = struct.unpack_from("=H", answer, 4)
            if kind == _RTM_NEWROUTE and answer[16 + 7] == _RTN_LOCAL:
                return
            if time.monotonic() > deadline:
                raise NetlinkError(errno.ETIMEDOUT, f"the address {address} does not come up")
            time.sleep(0.0005)

    def _run_batch(self, batch: Sequence[Request]) -> None:
        first = self._sequence + 1
        last = self._sequence = self._sequence + len(batch)
        # Refusals are always told; only the last request asks for an answer in any case. A
        # thousand answers would not even fit into the socket's buffer.
        self._socket.send(
            b"".join(
                _MESSAGE.pack(
                    16 + len(request.body),
                    request.kind,
                    request.flags | NLM_F_REQUEST | (NLM_F_ACK if sequence == last else 0),
                    sequence,
                    0,
                )
                + request.body
                for sequence, request in enumerate(batch, first)
            )
        )
        refused: tuple[int, Request] | None = None
        sequence = 0
        while sequence != last:
            for kind, message in messages(self._socket.recv(65536)):
                (sequence,) = struct.unpack_from("=I", message, 8)
                if kind == NLMSG_ERROR and sequence >= first:
                    (code,) = struct.unpack_from("=i", message, 16)
                    if code and refused is None:
                        refused = (-code, batch[sequence - first])
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
