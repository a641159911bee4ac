"""Trio sockets inside hosts: the factory and the resolver that make Trio code run in a lab.

A context variable says which host the running task is in; child tasks inherit it. Sockets that
Trio makes in that task tree belong to the host, so unmodified Trio code (`open_tcp_stream`,
`serve_tcp`, UDP) runs "inside" several hosts of one process.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from contextvars import ContextVar, Token
from ipaddress import IPv4Address, IPv6Address
from types import TracebackType
from typing import Any

import trio
import trio.abc

from netlab.kernel.namespaces import NetworkNamespace

_current_namespace: ContextVar[NetworkNamespace | None] = ContextVar(
    "_current_namespace", default=None
)


class HostSocketFactory(trio.abc.SocketFactory):
    """Creates every socket in the host that the running task is in."""

    def socket(
        self,
        family: socket.AddressFamily | int = socket.AF_INET,
        type: socket.SocketKind | int = socket.SOCK_STREAM,
        proto: int = 0,
    ) -> trio.socket.SocketType:
        namespace = _current_namespace.get()
        if namespace is None:
            return trio.socket.from_stdlib_socket(socket.socket(family, type, proto))
        return trio.socket.from_stdlib_socket(namespace.socket(family, type, proto))


class LabResolver(trio.abc.HostnameResolver):
    """Resolves the names of a lab's machines, and nothing else."""

    def __init__(self, addresses: Mapping[str, tuple[IPv4Address | IPv6Address, ...]]) -> None:
        self._addresses = addresses

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
        for address in self._addresses.get(name.lower(), ()):
            of_family = socket.AF_INET if address.version == 4 else socket.AF_INET6
            if family in (0, of_family):
                found += socket.getaddrinfo(
                    str(address), port, of_family, type, proto, flags | socket.AI_NUMERICHOST
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


class InsideHost(AbstractContextManager[None]):
    """Marks the running task, and those it starts, as being inside a namespace."""

    def __init__(self, namespace: NetworkNamespace) -> None:
        self._namespace = namespace
        self._token: Token[NetworkNamespace | None] | None = None

    def __enter__(self) -> None:
        self._token = _current_namespace.set(self._namespace)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._token is not None
        _current_namespace.reset(self._token)


def install_hooks(resolver: LabResolver) -> Callable[[], None]:
    """Make the running Trio program use the lab's hooks; return what puts the old ones back."""
    old_factory = trio.socket.set_custom_socket_factory(HostSocketFactory())
    old_resolver = trio.socket.set_custom_hostname_resolver(resolver)

    def restore() -> None:
        trio.socket.set_custom_socket_factory(old_factory)
        trio.socket.set_custom_hostname_resolver(old_resolver)

    return restore
