"""Carries out what the port mapping machine wants: datagrams to the gateway, UPnP by HTTP.

Port mapping specification 7 to 9; the decisions are in `traversal.paths.portmap`.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Callable
from typing import Final

import trio

from traversal.io.marking import new_socket
from traversal.io.upnp import delete_mapping, map_port
from traversal.keys import Entropy
from traversal.paths.portmap import (
    MappingChanged,
    PortMapper,
    Protocol,
    ReleaseUpnp,
    RunUpnp,
    SendDatagram,
)
from traversal.wire.address import Address, is_private
from traversal.wire.upnp import UpnpError

RELEASE_SECONDS: Final = 0.25
"""What closing may cost when the router does not answer UPnP."""


class PortMapping:
    """Gets one mapping for the IPv4 socket. `note_change` is called when it changes."""

    def __init__(self, entropy: Entropy, note_change: Callable[[], None]) -> None:
        self._machine = PortMapper(entropy)
        self._note_change = note_change
        self._wanted = trio.Event()
        self._gateway: ipaddress.IPv4Address | None = None

    @property
    def external(self) -> Address | None:
        """The address that reaches our socket by the mapping."""
        mapping = self._machine.mapping
        return None if mapping is None else mapping.external

    def seen(self, now: float) -> tuple[bool | None, bool | None, bool | None]:
        """Whether the gateway speaks NAT-PMP, PCP and UPnP; None before it was asked."""
        seen = self._machine.is_seen
        return (
            seen(Protocol.NAT_PMP, now),
            seen(Protocol.PCP, now),
            seen(Protocol.UPNP, now),
        )

    def set_network(
        self,
        gateway: ipaddress.IPv4Address | None,
        own_ip: ipaddress.IPv4Address | None,
        local_port: int,
    ) -> None:
        """The gateway, our address towards it, our UDP port; any may have changed."""
        self._gateway = gateway if gateway is not None and is_private(gateway) else None
        self._machine.set_network(self._gateway, own_ip, local_port, trio.current_time())
        self._wanted.set()

    def ask_now(self) -> None:
        """Try again at once, if no mapping is held and none is being asked for."""
        self._machine.ask_now(trio.current_time())
        self._wanted.set()

    async def run(self) -> None:
        """Until cancelled; what is mapped then is given back, if that takes but a moment."""
        try:
            sock = new_socket(socket.AF_INET, socket.SOCK_DGRAM)
            await sock.bind(("0.0.0.0", 0))
        except OSError:
            return
        with sock:
            try:
                await self._work(sock)
            finally:
                await self._release(sock)

    async def _work(self, sock: trio.socket.SocketType) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._receive, sock)
            while True:
                self._wanted = trio.Event()
                now = trio.current_time()
                if now >= self._machine.next_deadline():
                    self._machine.on_time(now)
                for effect in self._machine.poll_effects():
                    match effect:
                        case SendDatagram():
                            await self._send(sock, effect)
                        case MappingChanged():
                            self._note_change()
                        case RunUpnp():
                            nursery.start_soon(self._run_upnp, effect)
                        case ReleaseUpnp():
                            nursery.start_soon(self._release_upnp, effect)
                with trio.move_on_at(self._machine.next_deadline()):
                    await self._wanted.wait()

    async def _release(self, sock: trio.socket.SocketType) -> None:
        """Leave no hole in the router: one datagram, or for UPnP, whose leases may be permanent,
        an HTTP request. No answer is waited for longer than `RELEASE_SECONDS`."""
        self._machine.release("the node closes")
        with trio.move_on_after(RELEASE_SECONDS, shield=True):
            for effect in self._machine.poll_effects():
                match effect:
                    case SendDatagram():
                        await self._send(sock, effect)
                    case ReleaseUpnp():
                        await self._release_upnp(effect)

    async def _receive(self, sock: trio.socket.SocketType) -> None:
        while True:
            try:
                data, source = await sock.recvfrom(2048)
            except OSError:
                continue
            self._machine.handle_datagram(data, Address(source[0], source[1]), trio.current_time())
            self._wanted.set()

    async def _send(self, sock: trio.socket.SocketType, effect: SendDatagram) -> None:
        try:
            await sock.sendto(effect.data, effect.to)
        except OSError:
            pass  # no route to a gateway that has just gone; the machine tries again

    async def _run_upnp(self, effect: RunUpnp) -> None:
        gateway = self._gateway
        try:
            if gateway is None:
                raise UpnpError("there is no gateway any more")
            service, external, lease_seconds = await map_port(effect, gateway)
        except UpnpError:
            self._machine.handle_upnp_failed(effect.attempt, trio.current_time())
        else:
            self._machine.handle_upnp_mapped(
                effect.attempt, service, external, lease_seconds, trio.current_time()
            )
        self._wanted.set()

    async def _release_upnp(self, effect: ReleaseUpnp) -> None:
        try:
            await delete_mapping(effect.service, effect.external_port)
        except UpnpError:
            pass  # its lease ends it
