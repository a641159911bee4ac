"""What the kernel says about this host's network, and when a change matters."""

from __future__ import annotations

import errno
from ipaddress import IPv4Interface, ip_network
from typing import Any

import pytest
import trio

from traversal.io import netlink
from traversal.io.interfaces import (
    Interface,
    InterfaceFilter,
    NetworkState,
    read_network_state,
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


def test_which_changes_need_fresh_sockets() -> None:
    """Another default route or other addresses on it do; another interface does not."""

    def state(address: str, extra: tuple[Interface, ...] = (), **more: str) -> NetworkState:
        uplink = Interface("eth0", (IPv4Interface(address),))
        values: dict[str, Any] = {"default_ipv4": "eth0", "gateway_ipv4": "192.0.2.1", **more}
        return NetworkState((uplink, *extra), **values)

    before = state("192.0.2.2/24")
    assert state("192.0.2.3/24").needs_rebind(before)
    assert state("192.0.2.2/24", gateway_ipv4="192.0.2.9").needs_rebind(before)
    assert state("192.0.2.2/24", default_ipv4="wlan0").needs_rebind(before)
    virtual = Interface("virbr0", (IPv4Interface("192.0.2.130/25"),))
    assert not state("192.0.2.2/24", (virtual,)).needs_rebind(before)


def test_overlays_are_left_alone() -> None:
    """WireGuard's interfaces are no way to a peer, whatever they are called, unless allowed."""
    assert not InterfaceFilter().admits("wg0", "tun")
    assert not InterfaceFilter().admits("office", "wireguard")
    assert InterfaceFilter().admits("tun0", "tun")
    assert InterfaceFilter(allowed_names=("office",)).admits("office", "wireguard")
