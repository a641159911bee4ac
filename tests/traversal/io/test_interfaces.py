"""What the kernel says about this host's network, and when a change matters."""

from __future__ import annotations

import errno
from dataclasses import replace
from ipaddress import IPv4Interface, IPv6Interface, ip_network
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from traversal.io import interfaces, netlink
from traversal.io.interfaces import (
    Interface,
    InterfaceFilter,
    NetworkChange,
    NetworkState,
    read_network_state,
    watch_network,
)


async def test_the_loopback_interface_is_found() -> None:
    """Every host has it, with 127.0.0.1/8."""
    state = await read_network_state(InterfaceFilter(allowed_names=("lo",)))
    (loopback,) = state.interfaces
    assert loopback.is_loopback
    assert IPv4Interface("127.0.0.1/8") in loopback.addresses
    assert loopback.mtu_bytes >= 1280


async def test_denied_ranges_are_left_out() -> None:
    """Addresses in a denied range are as good as not there."""
    denied = InterfaceFilter(allowed_names=("lo",), denied_networks=(ip_network("127.0.0.0/8"),))
    state = await read_network_state(denied)
    assert not any(a.version == 4 for i in state.interfaces for a in i.addresses)


async def test_without_netlink(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then the address that the host would use is found by connecting a UDP socket."""

    async def refuse() -> Any:
        raise OSError(errno.EAFNOSUPPORT, "no netlink here")

    monkeypatch.setattr(netlink, "dump", refuse)
    state = await read_network_state(InterfaceFilter())
    assert [interface.name for interface in state.interfaces] in ([], ["default"])
    await trio.lowlevel.checkpoint()


def test_names() -> None:
    """Deny lists are prefixes, and an allow list rules alone."""
    assert not InterfaceFilter().admits("zt7nnig26")
    assert InterfaceFilter().admits("eth0")
    assert not InterfaceFilter(allowed_names=("wlan",)).admits("eth0")
    assert InterfaceFilter(allowed_names=("zt",)).admits("zt0")
    assert not InterfaceFilter(allowed_names=("zt",), excluded=("zt0",)).admits("zt0")


@pytest.fixture
async def changes(nursery: trio.Nursery) -> trio.MemoryReceiveChannel[NetworkChange]:
    """What `watch_network` tells of this namespace from now on, after a state that is not its own:
    as if the last address had come while nobody watched."""
    sender, receiver = trio.open_memory_channel[NetworkChange](100)
    nursery.start_soon(watch_network, NetworkState(), InterfaceFilter(), sender.send)
    with trio.fail_after(5):
        first = await receiver.receive()
    assert not first.has_slept
    return receiver


@pytest.mark.jail
async def test_changes_are_told(changes: trio.MemoryReceiveChannel[NetworkChange]) -> None:
    """A new interface with the default route, addresses more, and its end are told, and whether
    they need fresh sockets."""

    async def run(*arguments: str) -> bool:
        """Change something; whether any change that was told until quiet needs fresh sockets."""
        await trio.run_process(["ip", *arguments])
        with trio.fail_after(5):
            told = [await changes.receive()]
        with trio.move_on_after(0.5):
            while True:
                told.append(await changes.receive())
        state.append(told[-1].state)
        return any(change.needs_rebind for change in told)

    state: list[NetworkState] = []
    await trio.run_process(["ip", "link", "add", "up0", "type", "veth", "peer", "name", "down0"])
    await trio.run_process(["ip", "link", "set", "down0", "up"])
    await run("link", "set", "up0", "up")
    assert not await run("address", "add", "10.1.0.2/24", "dev", "up0")
    assert await run("route", "add", "default", "via", "10.1.0.1")
    assert (state[-1].default_ipv4, state[-1].gateway_ipv4) == ("up0", "10.1.0.1")
    assert not await run("address", "add", "127.0.0.9/8", "dev", "lo")
    assert await run("address", "add", "10.1.0.3/24", "dev", "up0")
    assert await run("link", "delete", "up0")
    assert state[-1].default_ipv4 is None


@pytest.mark.jail
async def test_sleep(
    autojump_clock: MockClock,
    monkeypatch: pytest.MonkeyPatch,
    nursery: trio.Nursery,
) -> None:
    """A host that slept for ten seconds gets fresh sockets, though its addresses are the same; one
    that dozed for less does not."""
    suspended = [100.0]
    monkeypatch.setattr(interfaces, "_suspended_seconds", lambda: suspended[0])
    told: list[NetworkChange] = []

    async def handle(change: NetworkChange) -> None:
        told.append(change)

    before = await read_network_state(InterfaceFilter())
    nursery.start_soon(watch_network, before, InterfaceFilter(), handle)
    await trio.sleep(20)
    suspended[0] += 9.0
    await trio.sleep(20)
    assert told == []
    suspended[0] += 11.0
    await trio.sleep(6)
    assert [(change.has_slept, change.needs_rebind) for change in told] == [(True, True)]
    await trio.sleep(60)
    assert len(told) == 1


def test_the_two_clocks() -> None:
    """The time that the host was suspended is never negative, and stands still while it runs."""
    first, second = interfaces._suspended_seconds(), interfaces._suspended_seconds()
    assert 0 <= second - first + 0.01 < 0.1
    assert first > -0.01


def test_which_changes_need_fresh_sockets() -> None:
    """Another default route or other addresses on it do; another interface does not, nor a
    link-local address of IPv6, which comes a second after the interface."""

    def state(address: str, extra: tuple[Interface, ...] = (), **more: str) -> NetworkState:
        uplink = Interface("eth0", (IPv4Interface(address),))
        values: dict[str, Any] = {"default_ipv4": "eth0", "gateway_ipv4": "192.0.2.1", **more}
        return NetworkState((uplink, *extra), **values)

    before = state("192.0.2.2/24")
    assert state("192.0.2.3/24").needs_rebind(before)
    assert state("192.0.2.2/24", gateway_ipv4="192.0.2.9").needs_rebind(before)
    assert state("192.0.2.2/24", default_ipv4="wlan0").needs_rebind(before)
    own = Interface("eth0", (IPv4Interface("192.0.2.2/24"), IPv6Interface("fe80::1/64")))
    assert not replace(before, interfaces=(own,)).needs_rebind(before)
    virtual = Interface("virbr0", (IPv4Interface("192.0.2.130/25"),))
    assert not state("192.0.2.2/24", (virtual,)).needs_rebind(before)


def test_overlays_are_left_alone() -> None:
    """WireGuard's interfaces are no way to a peer, whatever they are called, unless allowed."""
    assert not InterfaceFilter().admits("wg0", "tun")
    assert not InterfaceFilter().admits("office", "wireguard")
    assert InterfaceFilter().admits("tun0", "tun")
    assert InterfaceFilter(allowed_names=("office",)).admits("office", "wireguard")
