"""The resolver is asked for ipv4only.arpa, and its silence costs two seconds at most."""

from __future__ import annotations

import socket
from ipaddress import IPv6Network
from typing import Any

import trio
import trio.abc

from traversal.io.nat64 import discover_prefixes


class Resolver(trio.abc.HostnameResolver):
    """Answers with what it was given, or never."""

    def __init__(self, *answers: str, is_silent: bool = False) -> None:
        self.answers, self.is_silent = answers, is_silent
        self.asked: list[tuple[Any, int]] = []

    async def getaddrinfo(self, host: Any, port: Any, family: int = 0, *_: int, **__: int) -> Any:
        self.asked.append((host, family))
        if self.is_silent:
            await trio.sleep_forever()
        if not self.answers:
            raise socket.gaierror(socket.EAI_NONAME, "no such name")
        return [
            (socket.AF_INET6, socket.SOCK_DGRAM, 17, "", (answer, 0, 0, 0))
            for answer in self.answers
        ]

    async def getnameinfo(self, sockaddr: Any, flags: int) -> Any:
        raise NotImplementedError


async def test_prefixes_from_the_resolver() -> None:
    """The AAAA records of a DNS64 give the prefix."""
    resolver = Resolver("64:ff9b::c000:aa", "64:ff9b::c000:ab")
    trio.socket.set_custom_hostname_resolver(resolver)
    assert await discover_prefixes() == (IPv6Network("64:ff9b::/96"),)
    assert resolver.asked == [(b"ipv4only.arpa", socket.AF_INET6)]


async def test_no_dns64() -> None:
    """A name without AAAA record means no NAT64."""
    trio.socket.set_custom_hostname_resolver(Resolver())
    assert await discover_prefixes() == ()


async def test_silent_resolver(autojump_clock: Any) -> None:
    """A resolver that never answers is given two seconds."""
    trio.socket.set_custom_hostname_resolver(Resolver(is_silent=True))
    before = trio.current_time()
    assert await discover_prefixes() == ()
    assert trio.current_time() - before == 2.0
