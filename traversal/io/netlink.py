"""A little of rtnetlink: dump interfaces, addresses and default routes (rtnetlink(7)).

Every message begins with length (4), type (2), flags (2), sequence (4), port (4), in the host's
byte order; then a fixed part by type, then attributes: length (2), type (2), value, padded to 4.
"""

from __future__ import annotations

import ipaddress
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

import trio

NETLINK_ROUTE: Final = 0
_DONE, _ERROR = 3, 2
_NEW_LINK, _GET_LINK, _NEW_ADDRESS, _GET_ADDRESS, _NEW_ROUTE, _GET_ROUTE = 16, 18, 20, 22, 24, 26
_REQUEST_DUMP: Final = 0x301
_HEADER: Final = struct.Struct("=IHHII")
_LINK: Final = struct.Struct("=BxHiII")
_ADDRESS: Final = struct.Struct("=BBBBI")
_ROUTE: Final = struct.Struct("=BBBBBBBBI")
_ATTRIBUTE: Final = struct.Struct("=HH")
_U32: Final = struct.Struct("=I")
_IFLA_IFNAME, _IFLA_MTU, _IFLA_LINKINFO, _IFLA_INFO_KIND = 3, 4, 18, 1
_IFA_ADDRESS, _IFA_LOCAL, _IFA_FLAGS = 1, 2, 8
_RTA_OIF, _RTA_GATEWAY, _RTA_PRIORITY, _RTA_TABLE = 4, 5, 6, 15
_IFA_F_TENTATIVE, _IFA_F_DEPRECATED = 0x40, 0x20
_IFF_UP, _IFF_LOOPBACK = 0x1, 0x8
_MAIN_TABLE, _UNICAST = 254, 1
_READ_BYTES: Final = 1 << 17
CHANGE_GROUPS: Final = 0x1 | 0x10 | 0x40 | 0x100 | 0x400
"""Multicast groups that tell of links, and of addresses and routes in both families."""

InterfaceAddress = ipaddress.IPv4Interface | ipaddress.IPv6Interface


@dataclass(slots=True)
class Link:
    """A network interface as the kernel describes it."""

    index: int
    name: str
    is_up: bool
    is_loopback: bool
    mtu_bytes: int
    kind: str = ""
    """The driver's name for virtual interfaces, such as "wireguard", "tun" and "veth"."""
    addresses: list[InterfaceAddress] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class DefaultRoute:
    """A default route; `gateway` is None on a point-to-point link."""

    family: int
    interface_index: int
    gateway: str | None
    priority: int


async def dump() -> tuple[list[Link], list[DefaultRoute]]:
    """Ask the kernel. Raises OSError where there is no netlink."""
    with trio.socket.socket(
        socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, NETLINK_ROUTE
    ) as sock:
        await sock.bind((0, 0))
        links: dict[int, Link] = {}
        for body in await _ask(sock, _GET_LINK, _NEW_LINK):
            link = _parse_link(body)
            links[link.index] = link
        for body in await _ask(sock, _GET_ADDRESS, _NEW_ADDRESS):
            index, address = _parse_address(body)
            if address is not None and index in links:
                links[index].addresses.append(address)
        routes = [_maybe_parse_route(body) for body in await _ask(sock, _GET_ROUTE, _NEW_ROUTE)]
    return list(links.values()), [route for route in routes if route is not None]


async def open_watch() -> trio.socket.SocketType:
    """A socket that becomes readable when something changes. Raises OSError."""
    sock = trio.socket.socket(
        socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, NETLINK_ROUTE
    )
    try:
        await sock.bind((0, CHANGE_GROUPS))
    except BaseException:
        sock.close()
        raise
    return sock


async def _ask(sock: trio.socket.SocketType, request: int, answer: int) -> list[bytes]:
    await sock.send(_HEADER.pack(_HEADER.size + 4, request, _REQUEST_DUMP, request, 0) + bytes(4))
    bodies: list[bytes] = []
    while True:
        for kind, body in _messages(await sock.recv(_READ_BYTES)):
            if kind == _DONE:
                return bodies
            if kind == _ERROR:
                raise OSError("the kernel refused to list its interfaces")
            if kind == answer:
                bodies.append(body)


def _messages(data: bytes) -> Iterator[tuple[int, bytes]]:
    position = 0
    while position + _HEADER.size <= len(data):
        length, kind, _, _, _ = _HEADER.unpack_from(data, position)
        if length < _HEADER.size:
            return
        yield kind, data[position + _HEADER.size : position + length]
        position += (length + 3) & ~3


def _attributes(body: bytes, start: int) -> dict[int, bytes]:
    found = {}
    while start + _ATTRIBUTE.size <= len(body):
        length, kind = _ATTRIBUTE.unpack_from(body, start)
        if length < _ATTRIBUTE.size:
            break
        found[kind & 0x3FFF] = body[start + _ATTRIBUTE.size : start + length]
        start += (length + 3) & ~3
    return found


def _parse_link(body: bytes) -> Link:
    _, _, index, flags, _ = _LINK.unpack_from(body)
    attributes = _attributes(body, _LINK.size)
    return Link(
        index=index,
        name=_text(attributes.get(_IFLA_IFNAME, b"")),
        is_up=bool(flags & _IFF_UP),
        is_loopback=bool(flags & _IFF_LOOPBACK),
        mtu_bytes=_U32.unpack(attributes[_IFLA_MTU])[0] if _IFLA_MTU in attributes else 1500,
        kind=_text(_attributes(attributes.get(_IFLA_LINKINFO, b""), 0).get(_IFLA_INFO_KIND, b"")),
    )


def _text(value: bytes) -> str:
    return value.rstrip(b"\0").decode(errors="replace")


def _parse_address(body: bytes) -> tuple[int, InterfaceAddress | None]:
    _, prefix_length, flags, _, index = _ADDRESS.unpack_from(body)
    attributes = _attributes(body, _ADDRESS.size)
    if _IFA_FLAGS in attributes:
        flags = _U32.unpack(attributes[_IFA_FLAGS])[0]
    # On a point-to-point link ADDRESS is the other end's.
    packed = attributes.get(_IFA_LOCAL, attributes.get(_IFA_ADDRESS, b""))
    if len(packed) not in (4, 16) or flags & (_IFA_F_TENTATIVE | _IFA_F_DEPRECATED):
        return index, None
    return index, ipaddress.ip_interface((packed, prefix_length))


def _maybe_parse_route(body: bytes) -> DefaultRoute | None:
    family, prefix_length, _, _, table, _, _, kind, _ = _ROUTE.unpack_from(body)
    attributes = _attributes(body, _ROUTE.size)
    if _RTA_TABLE in attributes:
        table = _U32.unpack(attributes[_RTA_TABLE])[0]
    if prefix_length or table != _MAIN_TABLE or kind != _UNICAST or _RTA_OIF not in attributes:
        return None
    gateway = attributes.get(_RTA_GATEWAY)
    priority = attributes.get(_RTA_PRIORITY)
    return DefaultRoute(
        family=4 if family == socket.AF_INET else 6,
        interface_index=_U32.unpack(attributes[_RTA_OIF])[0],
        gateway=str(ipaddress.ip_address(gateway)) if gateway else None,
        priority=_U32.unpack(priority)[0] if priority else 0,
    )
