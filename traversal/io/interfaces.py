"""What network this host is on: interfaces, addresses, gateways; and when that changes.

The kernel is asked by netlink. Where there is none (a simulated internet), connecting a UDP socket,
which sends nothing, tells the address that the host would use; changes are then found by asking
again twice a second.

A change is reported after 0.1 s of silence, one second after its first sign at the latest: a DHCP
client or a Wi-Fi roam makes a burst of events, and only the last state counts.
"""

from __future__ import annotations

import ipaddress
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Final

import trio

from traversal.io import netlink
from traversal.io.marking import new_socket
from traversal.io.netlink import InterfaceAddress
from traversal.wire.address import IPAddress

IPNetwork = ipaddress.IPv4Network | ipaddress.IPv6Network

QUIET_SECONDS: Final = 0.1
MAX_DEBOUNCE_SECONDS: Final = 1.0
POLL_SECONDS: Final = 0.5
SLEEP_POLL_SECONDS: Final = 5.0
SLEEP_SECONDS: Final = 10.0
"""A host that slept this long has lost its NAT mappings and perhaps its network."""
_PROBE_ADDRESSES: Final = ("192.0.2.1", "2001:db8::1")
"""Documentation addresses (RFC 5737, RFC 3849): a route to them is the default route."""


@dataclass(frozen=True, slots=True)
class InterfaceFilter:
    """Which interfaces and addresses to use.

    Overlays are left alone by default: a path through a tunnel that itself travels over the link
    would be a loop. Networks of interfaces that are left alone are not pinged either.

    Attributes:
        denied_names: prefixes of interface names to leave alone.
        denied_kinds: drivers whose interfaces are left alone, as `ip -d link` names them.
        allowed_names: if not empty, only interfaces with one of these prefixes.
        excluded: whole names that are left alone whatever the others say.
        allowed_networks: if not empty, only addresses in these ranges are used, that is advertised
            and pinged.
        denied_networks: ranges whose addresses are neither advertised nor pinged.
    """

    denied_names: tuple[str, ...] = ("zt", "wt0", "tailscale", "wg")
    denied_kinds: tuple[str, ...] = ("wireguard",)
    allowed_names: tuple[str, ...] = ()
    excluded: tuple[str, ...] = ()
    allowed_networks: tuple[IPNetwork, ...] = ()
    denied_networks: tuple[IPNetwork, ...] = ()

    def admits(self, name: str, kind: str = "") -> bool:
        """Whether an interface may be used."""
        if name in self.excluded:
            return False
        if self.allowed_names:
            return name.startswith(self.allowed_names)
        return not name.startswith(self.denied_names) and kind not in self.denied_kinds

    def admits_address(self, ip: IPAddress) -> bool:
        """Whether an address of an interface may be used."""
        allowed = self.allowed_networks
        if allowed and not any(ip in network for network in allowed):
            return False
        return not any(ip in network for network in self.denied_networks)


@dataclass(frozen=True, slots=True)
class Interface:
    """A usable interface that is up."""

    name: str
    addresses: tuple[InterfaceAddress, ...]
    is_loopback: bool = False
    mtu_bytes: int = 1500


@dataclass(frozen=True, slots=True)
class NetworkState:
    """What the host has now. `default_*` name the interface of the default route, `excluded` are
    the networks of interfaces that must be left alone."""

    interfaces: tuple[Interface, ...] = ()
    excluded: tuple[IPNetwork, ...] = ()
    default_ipv4: str | None = None
    default_ipv6: str | None = None
    gateway_ipv4: str | None = None
    gateway_ipv6: str | None = None

    @property
    def mtu_bytes(self) -> int:
        """The MTU of the default interface, of the loopback interface if that is all."""
        wanted = {self.default_ipv4, self.default_ipv6} - {None}
        sizes = [i.mtu_bytes for i in self.interfaces if i.name in wanted]
        return max(sizes or [i.mtu_bytes for i in self.interfaces] or [1500])

    def needs_rebind(self, before: NetworkState) -> bool:
        """Whether sockets made in the state `before` had better be replaced."""

        def essence(state: NetworkState) -> object:
            defaults = {state.default_ipv4, state.default_ipv6}
            return (
                state.default_ipv4,
                state.default_ipv6,
                state.gateway_ipv4,
                state.gateway_ipv6,
                {
                    i.name: frozenset(
                        a for a in i.addresses if a.version == 4 or not a.is_link_local
                    )
                    for i in state.interfaces
                    if i.name in defaults
                },
            )

        return essence(self) != essence(before)


async def read_network_state(admitted: InterfaceFilter) -> NetworkState:
    """Find out. An empty state where nothing can be found out."""
    try:
        links, routes = await netlink.dump()
    except OSError:
        return await _probe_network_state()
    names = {link.index: link.name for link in links}
    denied = [link for link in links if not admitted.admits(link.name, link.kind)]
    denied_indices = {link.index for link in denied}
    best: dict[int, netlink.DefaultRoute] = {}
    for route in sorted(routes, key=lambda route: route.priority):
        if route.interface_index not in denied_indices:
            best.setdefault(route.family, route)
    interfaces = tuple(
        Interface(
            name=link.name,
            addresses=tuple(
                address for address in link.addresses if admitted.admits_address(address.ip)
            ),
            is_loopback=link.is_loopback,
            mtu_bytes=link.mtu_bytes,
        )
        for link in links
        if link.is_up and link.index not in denied_indices
    )
    v4, v6 = best.get(4), best.get(6)
    return NetworkState(
        interfaces=interfaces,
        excluded=tuple(
            address.network
            for link in denied
            for address in link.addresses
            if not (address.is_link_local or address.is_loopback)
        ),
        default_ipv4=names.get(v4.interface_index) if v4 else None,
        default_ipv6=names.get(v6.interface_index) if v6 else None,
        gateway_ipv4=v4.gateway if v4 else None,
        gateway_ipv6=v6.gateway if v6 else None,
    )


async def _probe_network_state() -> NetworkState:
    addresses: list[InterfaceAddress] = []
    for target in _PROBE_ADDRESSES:
        family = trio.socket.AF_INET6 if ":" in target else trio.socket.AF_INET
        try:
            with new_socket(family, trio.socket.SOCK_DGRAM) as sock:
                await sock.connect((target, 9))
                host = sock.getsockname()[0]
        except OSError:
            continue
        addresses.append(ipaddress.ip_interface(f"{host}/{64 if ':' in host else 24}"))
    if not addresses:
        return NetworkState()
    versions = {address.version for address in addresses}
    return NetworkState(
        interfaces=(Interface("default", tuple(addresses)),),
        default_ipv4="default" if 4 in versions else None,
        default_ipv6="default" if 6 in versions else None,
    )


@dataclass(frozen=True, slots=True)
class NetworkChange:
    """The state after a change. `has_slept` says that the host was suspended."""

    state: NetworkState
    needs_rebind: bool
    has_slept: bool = False


async def watch_network(
    before: NetworkState,
    admitted: InterfaceFilter,
    handle: Callable[[NetworkChange], Awaitable[None]],
) -> None:
    """Await `handle` for each change from `before` on, until cancelled."""
    async with _open_signal() as signal:
        suspended = _suspended_seconds()
        # Something may have changed before the watch was open.
        is_sign = True
        while True:
            suspended_before, suspended = suspended, _suspended_seconds()
            has_slept = suspended - suspended_before >= SLEEP_SECONDS
            if is_sign or has_slept:
                state = await read_network_state(admitted)
                if state != before or has_slept:
                    needs_rebind = has_slept or state.needs_rebind(before)
                    before = state
                    await handle(NetworkChange(state, needs_rebind, has_slept))
            is_sign = await signal.wait()


class _Signal:
    """Sleeps until something may have changed."""

    def __init__(self, sock: trio.socket.SocketType | None) -> None:
        self._sock = sock

    async def wait(self) -> bool:
        """Whether there was a sign of change; False when it is merely time to look for sleep."""
        if self._sock is None:
            await trio.sleep(POLL_SECONDS)
            return True
        with trio.move_on_after(SLEEP_POLL_SECONDS) as scope:
            await self._drain()
        if scope.cancelled_caught:
            return False
        with trio.move_on_after(MAX_DEBOUNCE_SECONDS):
            while True:
                with trio.move_on_after(QUIET_SECONDS) as quiet:
                    await self._drain()
                if quiet.cancelled_caught:
                    break
        return True

    async def _drain(self) -> None:
        assert self._sock is not None
        try:
            await self._sock.recv(1 << 16)
        except OSError:
            pass  # ENOBUFS: events were lost, so something did change.


@asynccontextmanager
async def _open_signal() -> AsyncIterator[_Signal]:
    try:
        sock = await netlink.open_watch()
    except OSError:
        yield _Signal(None)
        return
    with sock:
        yield _Signal(sock)


def _suspended_seconds() -> float:
    # Two clocks of the kernel, of which one stands still while the host is suspended. Reading them
    # here is not reading the time: their difference is a counter.
    return time.clock_gettime(time.CLOCK_BOOTTIME) - time.clock_gettime(time.CLOCK_MONOTONIC)
