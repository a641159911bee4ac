"""Carrying out a wiring: namespaces, cables, addresses, routes, rules, in a dozen milliseconds.

Nothing here awaits, since the thread changes namespaces on the way.
"""

from __future__ import annotations

import errno
import fcntl
import functools
import os
import struct
from collections.abc import Iterable, Mapping

from netlab.behavior import Firewall, Ipv6
from netlab.kernel.fidelity import Engine
from netlab.kernel.namespaces import NetworkNamespace, create_namespaces, move_descriptor_up
from netlab.kernel.netfilter import load_ruleset, nft_way
from netlab.kernel.netlink import (
    LinkEnd,
    Netlink,
    Request,
    add_address,
    add_veth,
    replace_route,
    set_link,
)
from netlab.kernel.wiring import Cable, End, Machine, Wiring

_LOOPBACK_INDEX = 1
_TUN_DEVICE = "/dev/net/tun"
_TUNSETIFF, _TUNSETIFINDEX = 0x400454CA, 0x400454DA
_IFF_TUN, _IFF_NO_PI = 0x0001, 0x1000
# The usual 500 packets overflow at 100 000 packets/s when the fabric process waits 5 ms for a CPU.
_TUN_QUEUE_PACKETS = 4000


class BuildError(Exception):
    """The kernel cannot build this lab; the message names the machine and the remedy."""


def open_tun(namespace: NetworkNamespace, name: str, index: int) -> int:
    """Create a TUN device in a namespace and return its descriptor, which does not block.

    Raises:
        BuildError: the device file is missing or may not be opened.
    """
    with namespace.entered():
        try:
            device = os.open(_TUN_DEVICE, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            remedy = (
                "let this user open it (chmod 0666, as most distributions do)"
                if error.errno == errno.EACCES
                else "load the module tun"
            )
            raise BuildError(
                f"cannot open {_TUN_DEVICE} ({error.strerror}), which impaired links and the "
                f"user-space NAT need: {remedy}"
            ) from error
        try:
            fcntl.ioctl(device, _TUNSETIFINDEX, struct.pack("=I", index))
            fcntl.ioctl(
                device, _TUNSETIFF, struct.pack("=16sH22x", name.encode(), _IFF_TUN | _IFF_NO_PI)
            )
        except BaseException:
            os.close(device)
            raise
    return move_descriptor_up(device)


class Built:
    """A lab in the kernel: its namespaces, and the TUN descriptors that the fabric needs."""

    def __init__(self, wiring: Wiring) -> None:
        self.wiring = wiring
        self.namespaces: Mapping[str, NetworkNamespace] = {}
        self.tuns: dict[tuple[str, str], int] = {}
        """Descriptors by machine and interface name."""

    def build(self) -> None:
        """Make everything.

        Raises:
            BuildError: the kernel lacks something; what was made is gone again.
            NamespaceError, NetlinkError, NftError: the kernel refused a step; the same.
        """
        try:
            self._build()
        except BaseException:
            self.close()
            raise

    def _build(self) -> None:
        machines = self.wiring.machines
        made = create_namespaces(len(machines))
        self.namespaces = dict(zip(machines, made, strict=True))
        with Netlink() as netlink:
            netlink.run(
                add_veth(self._link_end(cable, cable.outer), self._link_end(cable, cable.inner))
                for cable in self.wiring.cables
                if not cable.pumped
            )
        links: dict[str, list[Request]] = {name: [] for name in machines}
        veths: dict[str, list[int]] = {name: [] for name in machines}
        for cable in self.wiring.cables:
            ends = cable.outer, cable.inner
            if cable.pumped:
                for end in ends:
                    links[end.machine].append(self._add_tun(end, cable.mtu_bytes))
            else:
                links[cable.inner.machine].append(set_link(cable.inner.index, up=True))
                for end in ends:
                    veths[end.machine].append(end.index)
        for nat in self.wiring.user_nats:
            links[nat.inside.machine].append(self._add_tun(nat.inside, nat.inside_mtu_bytes))
        # From the leaves inwards: a cable's inner end comes up with its own machine, and when its
        # outer machine's turn comes, both ends have what they need to carry packets.
        for name, machine in reversed(list(machines.items())):
            self._configure(machine, links[name], veths[name])

    def _link_end(self, cable: Cable, end: End) -> LinkEnd:
        return LinkEnd(self.namespaces[end.machine], end.name, end.index, cable.mtu_bytes)

    def _add_tun(self, end: End, mtu_bytes: int) -> Request:
        descriptor = open_tun(self.namespaces[end.machine], end.name, end.index)
        self.tuns[end.machine, end.name] = descriptor
        return set_link(end.index, up=True, mtu_bytes=mtu_bytes, queue_packets=_TUN_QUEUE_PACKETS)

    def _configure(self, machine: Machine, before: Iterable[Request], veths: Iterable[int]) -> None:
        namespace = self.namespaces[machine.name]
        requests = [set_link(_LOOPBACK_INDEX, up=True), *before]
        requests += [add_address(index, address) for index, address in machine.addresses]
        requests += map(replace_route, machine.routes)
        with namespace.entered():
            # Connection tracking, and with it some of the sysctls, starts with the rules.
            if machine.rules and self._must_load_rules(machine):
                load_ruleset(namespace, machine.rules)
            for name, value in machine.sysctls.items():
                if _fresh_sysctl(name) != value:
                    write_sysctl(name, value)
            with Netlink() as netlink:
                netlink.run(requests)
                # A link that was up before its peer has no carrier yet, and IPv6 starts on
                # neither before the kernel has noticed the carrier.
                for index in veths:
                    netlink.wait_until_up(index)
                for _, address in machine.addresses:
                    if address.version == 6:
                        netlink.wait_until_local(address.ip)

    @staticmethod
    def _must_load_rules(machine: Machine) -> bool:
        """Return False where nftables is missing and only its spoofing filter is lost by that."""
        if nft_way() is not None:
            return True
        router = machine.router
        assert router is not None
        plain = router.behavior.firewall == Firewall() and router.behavior.ipv6 is Ipv6.NONE
        if router.engine is Engine.USER and plain:
            return False
        raise BuildError(
            f'NAT "{machine.name}" needs nftables, which is not installed: install the package '
            'nftables, or give a NAT without firewall and IPv6 the engine "user"'
        )

    def close_tuns(self) -> None:
        """Let go of the TUN devices, which live on while another process holds them."""
        for descriptor in self.tuns.values():
            os.close(descriptor)
        self.tuns.clear()

    def close(self) -> None:
        """Let go of everything; the kernel reclaims it."""
        self.close_tuns()
        for namespace in self.namespaces.values():
            namespace.close()
        self.namespaces = {}


@functools.cache
def _fresh_sysctl(name: str) -> str | None:
    """Return a sysctl's value in the calling thread's namespace, which must be a fresh one.

    All fresh namespaces have the same values, so a lab of hundreds only writes what differs.
    """
    try:
        with open(f"/proc/sys/net/{name}") as file:
            return file.read().strip()
    except OSError:
        return None


def write_sysctl(name: str, value: str) -> None:
    """Write a sysctl below /proc/sys/net in the calling thread's namespace.

    Raises:
        BuildError: it doesn't exist or may not be written.
    """
    path = f"/proc/sys/net/{name}"
    try:
        # Not open(): a large lab writes thousands, and this takes half the time.
        descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(descriptor, value.encode())
        finally:
            os.close(descriptor)
    except OSError as error:
        raise BuildError(
            f"cannot set {path} ({error.strerror}); is /proc/sys mounted read-only, "
            "as in some containers?"
        ) from error
