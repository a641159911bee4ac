"""Port mapping with miniupnpd (Debian's `miniupnpd-nftables`) as the router of a kernel lab.

The daemon runs in the network namespace of a NAT that lets nobody in by itself, and works on its
real rules: a mapping counts when a datagram from the internet arrives by it.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from ipaddress import IPv4Address
from pathlib import Path
from typing import Final

import pytest
import trio

from netlab.behavior import Hairpin
from netlab.kernel.fidelity import Engine
from netlab.kernel.lab import KernelLab
from netlab.model import Host, Nat, Topology, Uplink
from netlab.presets import class_behavior
from traversal.io.port_mapper import PortMapping
from traversal.paths.portmap import Protocol
from traversal.wire.address import Address

PROGRAM: Final = shutil.which("miniupnpd", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
LOCAL_PORT: Final = 41641
LIMIT_SECONDS: Final = 15.0
NOTHING_SECONDS: Final = 0.3

pytestmark = [
    pytest.mark.jail,
    pytest.mark.interop,
    pytest.mark.skipif(PROGRAM is None, reason="miniupnpd-nftables is not installed"),
]

BEHAVIOR: Final = replace(class_behavior("EIM+APDF"), hairpin=Hairpin.NONE)
"""Nobody gets in by a mapping that traffic made, whatever the firewall lets through."""

CHAINS: Final = """
table inet upnp {
  chain mapped { }
  chain before { type nat hook prerouting priority -110; policy accept; jump mapped_before; }
  chain after { type nat hook postrouting priority 90; policy accept; jump mapped_after; }
  chain mapped_before { }
  chain mapped_after { }
}
insert rule inet flt forward iifname "wan" ct status dnat accept
"""
"""The daemon's chains, hooked in before the NAT's own, and what a router's firewall has for it."""
NO_NAT_PMP: Final = """
table inet deaf {
  chain input {
    type filter hook input priority -10; policy accept;
    udp dport 5351 @th,64,8 0 drop
  }
}
"""
"""A datagram whose first byte is 0 is NAT-PMP; PCP's is 2."""


@dataclass
class Home:
    """A host behind the router, and one on the internet."""

    lab: KernelLab
    log: Path

    @asynccontextmanager
    async def mapping(self) -> AsyncIterator[PortMapping]:
        """The port mapper of the host inside, for the length of the block."""
        async with self.lab.host("inside"):
            mapping = PortMapping(os.urandom, lambda: None)
            own = IPv4Address(self.lab.host("inside").addresses[0])
            mapping.set_network(self.lab.plan.nats["home"].gateway_ipv4, own, LOCAL_PORT)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(mapping.run)
                yield mapping
                nursery.cancel_scope.cancel()

    async def external(self, mapping: PortMapping) -> Address:
        """The mapped address, once there is one."""
        with trio.move_on_after(LIMIT_SECONDS):
            while mapping.external is None:  # noqa: ASYNC110  # no event tells
                await trio.sleep(0.02)
            return mapping.external
        raise AssertionError(f"nothing mapped; miniupnpd said\n{self.log.read_text()[-4000:]}")

    async def arrives(self, address: Address) -> bool:
        """Whether a datagram that somebody on the internet sends there reaches our port."""
        async with self.lab.host("inside"):
            ours = trio.socket.socket(type=trio.socket.SOCK_DGRAM)
            await ours.bind((self.lab.host("inside").addresses[0], LOCAL_PORT))
        async with self.lab.host("outside"):
            theirs = trio.socket.socket(type=trio.socket.SOCK_DGRAM)
            await theirs.bind((self.lab.host("outside").addresses[0], 0))
        with ours, theirs:
            await theirs.sendto(b"hello", address)
            with trio.move_on_after(NOTHING_SECONDS):
                data, source = await ours.recvfrom(100)
                assert (data, source) == (b"hello", theirs.getsockname())
                await ours.sendto(b"welcome", source)
                data, source = await theirs.recvfrom(100)
                assert (data, source) == (b"welcome", tuple(address))
                return True
        return False


CONFIGURATION: Final = """
ext_ifname=wan
listening_ip={lan}
upnp_table_name=upnp
upnp_nat_table_name=upnp
upnp_forward_chain=mapped
upnp_nat_chain=mapped_before
upnp_nat_postrouting_chain=mapped_after
secure_mode=yes
ipv6_disable=yes
allow 1024-65535 0.0.0.0/0 1024-65535
deny 0-65535 0.0.0.0/0 0-65535
"""


def start_daemon(
    lab: KernelLab, directory: Path, speaks: str, rules: str
) -> subprocess.Popen[bytes]:
    """miniupnpd as the router's program; `speaks` says in its words which protocols."""
    assert PROGRAM is not None
    config = directory / "miniupnpd.conf"
    with lab.namespaces["home"].entered(), (directory / "log").open("wb") as log:
        # The lab has the gateway's address on "lo"; the daemon wants it on the interface.
        (lan,) = (name for _, name in socket.if_nameindex() if name.startswith("lan"))
        gateway = f"{lab.plan.nats['home'].gateway_ipv4}/24"
        subprocess.run(["ip", "address", "add", gateway, "dev", lan], check=True)
        subprocess.run(["nft", "-f", "-"], input=(CHAINS + rules).encode(), check=True)
        config.write_text(CONFIGURATION.format(lan=lan) + speaks)
        return subprocess.Popen(
            [PROGRAM, "-d", "-f", str(config), "-P", str(directory / "pid")],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )


@asynccontextmanager
async def home(directory: Path, speaks: str, rules: str) -> AsyncIterator[Home]:
    """A lab whose router runs miniupnpd."""
    topology = Topology(
        hosts=(
            Host(name="inside", uplinks=(Uplink(network="home"),)),
            Host(name="outside"),
        ),
        nats=(Nat(name="home", behavior=BEHAVIOR),),
        seed=1,
    )
    async with KernelLab(topology, engines={"home": Engine.NFT}) as lab:
        daemon = start_daemon(lab, directory, speaks, rules)
        try:
            yield Home(lab, directory / "log")
        finally:
            daemon.kill()
            daemon.wait()


@pytest.mark.parametrize(
    ("protocol", "speaks", "rules"),
    [
        (Protocol.NAT_PMP, "enable_natpmp=yes\nenable_upnp=no\n", ""),
        (Protocol.PCP, "enable_natpmp=yes\nenable_upnp=no\n", NO_NAT_PMP),
        (Protocol.UPNP, "enable_natpmp=no\nenable_upnp=yes\n", ""),
    ],
    ids=lambda value: getattr(value, "value", ""),
)
async def test_mapped_by_each_protocol(
    tmp_path: Path, protocol: Protocol, speaks: str, rules: str
) -> None:
    """The router maps our port (that it takes up to 2 s to answer searches for UPnP does not
    matter), datagrams come in by it, and are shut out when we have closed."""
    async with home(tmp_path, speaks, rules) as at:
        async with at.mapping() as mapping:
            external = await at.external(mapping)
            seen = zip(Protocol, mapping.seen(trio.current_time()), strict=True)
            assert dict(seen)[protocol]
            assert IPv4Address(external.host) == at.lab.nat("home").external[0]
            assert await at.arrives(external)
        with trio.fail_after(LIMIT_SECONDS):
            while await at.arrives(external):
                pass
