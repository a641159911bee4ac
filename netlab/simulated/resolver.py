"""Names in the simulated internet: hosts and servers by name, extra records, DNS64."""

from __future__ import annotations

import socket as stdlib
from collections.abc import Callable
from ipaddress import ip_address
from typing import Any

import trio

from netlab.dns64 import IPV4_ONLY, IPV4_ONLY_NAME, synthesize
from netlab.drops import Address
from netlab.simulated.host import SimulatedHost, current_host


class Resolver(trio.abc.HostnameResolver):
    """Answers from a table of records.

    Args:
        records: the addresses of a name; may be changed while the lab runs.
        is_behind_nat64: whether a host gets synthesized AAAA records (RFC 6147).
    """

    def __init__(
        self,
        records: dict[str, tuple[Address, ...]],
        is_behind_nat64: Callable[[SimulatedHost], bool],
    ) -> None:
        self.records = records
        self._is_behind_nat64 = is_behind_nat64

    async def getaddrinfo(
        self,
        host: bytes | str | None,
        port: bytes | str | int | None,
        family: int = 0,
        type: int = 0,
        proto: int = 0,
        flags: int = 0,
    ) -> list[Any]:
        """As `socket.getaddrinfo`, seen from the current host."""
        await trio.lowlevel.checkpoint()
        name = host.decode() if isinstance(host, bytes) else host or ""
        asking = current_host()
        if asking is None or not any(interface.is_up for interface in asking.interfaces):
            raise stdlib.gaierror(stdlib.EAI_AGAIN, f"no resolver is reachable to look up {name}")
        answers: list[Any] = []
        for address in self._addresses(name.rstrip(".").lower(), asking):
            own_family = stdlib.AF_INET if len(address) == 4 else stdlib.AF_INET6
            if family in (0, own_family):
                # The number and service part is the C library's business, without any network.
                answers += stdlib.getaddrinfo(
                    str(ip_address(address)), port, own_family, type, proto, stdlib.AI_NUMERICHOST
                )
        if not answers:
            raise stdlib.gaierror(
                stdlib.EAI_NONAME, f"the simulated internet has no address for the name {name!r}"
            )
        return answers

    def _addresses(self, name: str, asking: SimulatedHost) -> tuple[Address, ...]:
        if name == "localhost":
            return bytes(15) + b"\1", b"\x7f\0\0\1"
        found = IPV4_ONLY if name == IPV4_ONLY_NAME else self.records.get(name, ())
        return synthesize(found) if self._is_behind_nat64(asking) else found

    async def getnameinfo(self, sockaddr: Any, flags: int) -> tuple[str, str]:
        """Return the name that has the address, else the address itself."""
        await trio.lowlevel.checkpoint()
        address = ip_address(sockaddr[0]).packed
        for name, addresses in self.records.items():
            if address in addresses and not flags & stdlib.NI_NUMERICHOST:
                return name, str(sockaddr[1])
        return str(sockaddr[0]), str(sockaddr[1])
