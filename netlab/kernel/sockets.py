"""Trio sockets inside hosts: the factory and the resolver that make Trio code run in a lab.

A context variable says which host the running task is in; child tasks inherit it. Sockets that
Trio makes in that task tree belong to the host, so unmodified Trio code (`open_tcp_stream`,
`serve_tcp`, UDP) runs "inside" several hosts of one process.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from ipaddress import ip_address
from typing import Any, TypeAlias

import trio
import trio.abc

from netlab.dns64 import IPV4_ONLY, IPV4_ONLY_NAME, synthesize
from netlab.drops import Address, address_text
from netlab.kernel.namespaces import NetworkNamespace

_Stack: TypeAlias = "tuple[NetworkNamespace, _Stack | None]"
_entered: ContextVar[_Stack | None] = ContextVar("_entered", default=None)
"""The namespaces that the running task has entered, innermost first."""


class HostSocketFactory(trio.abc.SocketFactory):
    """Creates every socket in the host that the running task is in."""

    def socket(
        self,
        family: socket.AddressFamily | int = socket.AF_INET,
        type: socket.SocketKind | int = socket.SOCK_STREAM,
        proto: int = 0,
    ) -> trio.socket.SocketType:
        stack = _entered.get()
        if stack is None:
            return trio.socket.from_stdlib_socket(socket.socket(family, type, proto))
        return trio.socket.from_stdlib_socket(stack[0].socket(family, type, proto))


class LabResolver(trio.abc.HostnameResolver):
    """Resolves the names of a lab's public machines, and extra ones; nothing else.

    Args:
        addresses: what each name has.
        is_behind_nat64: whether the host with a namespace gets synthesized addresses (RFC 6147).
    """

    def __init__(
        self,
        addresses: Mapping[str, tuple[str, ...]],
        is_behind_nat64: Callable[[NetworkNamespace], bool] = lambda _: False,
    ) -> None:
        own = {name: _packed(found) for name, found in addresses.items()}
        self._addresses = {IPV4_ONLY_NAME: IPV4_ONLY, **own}
        self._is_behind_nat64 = is_behind_nat64

    # The loose element types are those of trio.abc.HostnameResolver.
    async def getaddrinfo(
        self,
        host: bytes | None,
        port: bytes | str | int | None,
        family: int = 0,
        type: int = 0,
        proto: int = 0,
        flags: int = 0,
    ) -> list[tuple[Any, ...]]:
        await trio.lowlevel.checkpoint()
        name = (host or b"").decode("ascii", errors="replace")
        found: list[tuple[Any, ...]] = []
        addresses = self._addresses.get(name.rstrip(".").lower(), ())
        stack = _entered.get()
        if stack is not None and self._is_behind_nat64(stack[0]):
            addresses = synthesize(addresses)
        for address in addresses:
            of_family = socket.AF_INET if len(address) == 4 else socket.AF_INET6
            if family in (0, of_family):
                text = address_text(address)
                found += socket.getaddrinfo(
                    text, port, of_family, type, proto, flags | socket.AI_NUMERICHOST
                )
        if not found:
            raise socket.gaierror(
                socket.EAI_NONAME, f'the lab has no machine "{name}" with such an address'
            )
        return found

    async def getnameinfo(self, sockaddr: Any, flags: int) -> tuple[str, str]:
        """Return the address and port as text; the lab has no reverse names."""
        await trio.lowlevel.checkpoint()
        return socket.getnameinfo(sockaddr, flags | socket.NI_NUMERICHOST | socket.NI_NUMERICSERV)


def _packed(addresses: tuple[str, ...]) -> tuple[Address, ...]:
    return tuple(ip_address(address).packed for address in addresses)


def enter_namespace(namespace: NetworkNamespace) -> None:
    """Put the running task, and those that it starts, into a namespace."""
    _entered.set((namespace, _entered.get()))


def leave_namespace() -> None:
    """Go back to where the task was before the last `enter_namespace`."""
    stack = _entered.get()
    assert stack is not None
    _entered.set(stack[1])


def install_hooks(resolver: LabResolver) -> Callable[[], None]:
    """Make the running Trio program use the lab's hooks; return what puts the old ones back."""
    old_factory = trio.socket.set_custom_socket_factory(HostSocketFactory())
    old_resolver = trio.socket.set_custom_hostname_resolver(resolver)

    def restore() -> None:
        trio.socket.set_custom_socket_factory(old_factory)
        trio.socket.set_custom_hostname_resolver(old_resolver)

    return restore
