"""What this kernel can do for a lab, as data: each feature, whether it is there, what is used.

Looking is done inside a jail of its own, so that it changes nothing and asks for no root.
"""

from __future__ import annotations

import errno
import functools
import os
import shutil
from collections.abc import Callable, Iterator

import msgspec

from netlab.behavior import (
    Filtering,
    Firewall,
    Hairpin,
    Mapping,
    NatBehavior,
    PortAllocation,
    PortAssignment,
)
from netlab.kernel.builder import BuildError, open_tun, write_sysctl
from netlab.kernel.conntrack import flush_conntrack
from netlab.kernel.fidelity import Engine
from netlab.kernel.jail import JailCallError, JailError, call_in_jail
from netlab.kernel.namespaces import NetworkNamespace, create_namespaces
from netlab.kernel.netfilter import NftError, load_ruleset, nft_way
from netlab.kernel.netlink import LinkEnd, Netlink, NetlinkError, add_link_kind, add_veth
from netlab.kernel.wiring import plan_wiring
from netlab.model import Nat, Topology

_CHECK_SECONDS = 20.0


class Capability(msgspec.Struct, frozen=True):
    """One feature of this machine."""

    name: str
    available: bool
    why: str
    """The kernel's or the tool's own words where it isn't there, and the remedy."""
    used: str
    """What the lab does here: which back end or way the feature will use."""


def examine() -> list[Capability]:
    """Try every feature that the kernel back end may use; takes about 50 ms.

    The first is the jail itself; without it the others can't be tried and are not listed.
    """
    try:
        found = call_in_jail(
            lambda: msgspec.json.encode(list(_examine_inside())), timeout_seconds=_CHECK_SECONDS
        )
    except (JailError, JailCallError) as error:
        return [Capability("jail", False, str(error), "only the simulated back end works here")]
    way = "as root" if os.geteuid() == 0 else "without root"
    jail = Capability("jail", True, "", f"user, network, mount and process namespaces, {way}")
    return [jail, *msgspec.json.decode(found, type=list[Capability])]


_HASHED = PortAllocation(assignment=PortAssignment.HASH)
_OTHER_ENGINE = "such NATs have to be named in `engines`, for the user-space engine"
# A feature of nftables, a NAT whose rules need it, what it is used for, what is done without.
_NFT_FEATURES = (
    ("nat", NatBehavior(), "NATs in the kernel where it is faithful", _OTHER_ENGINE),
    (
        "learning sets",
        NatBehavior(filtering=Filtering.ADF, hairpin=Hairpin.EXTERNAL),
        "open filtering and hairpin in the kernel",
        _OTHER_ENGINE,
    ),
    (
        "hashed ports",
        NatBehavior(mapping=Mapping.ADM, ports=_HASHED),
        "address-dependent mapping in the kernel",
        _OTHER_ENGINE,
    ),
    (
        "payload matches",
        NatBehavior(firewall=Firewall(block_stun=True, udp_ports=(53,), reject=True)),
        "firewalls",
        "no firewalls",
    ),
)


def _examine_inside() -> Iterator[Capability]:
    namespace, other = create_namespaces(2)
    yield _try(
        "veth",
        lambda: _add_veth(namespace, other),
        "cables between machines",
        "no cables: load the module veth",
    )
    yield _try(
        "sysctl",
        lambda: _write_sysctl(namespace),
        "routers forward, timers are set",
        "routers can't forward: mount /proc/sys writable",
    )
    yield _try(
        "nsenter",
        _find_nsenter,
        "programs run in hosts",
        "no programs in hosts: install the package util-linux",
    )
    way = nft_way()
    missing = "" if way else "nftables is not installed; install the package nftables"
    without = "NATs on the user-space engine; no firewalls, no IPv6 filtering"
    yield Capability("nftables", way is not None, missing, way or without)
    if way is not None:
        for name, behavior, used, instead in _NFT_FEATURES:
            wiring = plan_wiring(
                Topology(nats=(Nat(name="nat", behavior=behavior),)), engines={"nat": Engine.NFT}
            )
            load = functools.partial(load_ruleset, namespace, wiring.machines["nat"].rules)
            yield _try(name, load, used, instead)
        yield _try(
            "conntrack",
            lambda: flush_conntrack(namespace),
            "NAT reboots forget flows at once",
            "NATs in the kernel can't be rebooted",
        )
    yield _try(
        "tun",
        lambda: os.close(open_tun(namespace, "tun0", 500)),
        "impaired links and user-space NATs",
        "only plain links and nftables NATs",
    )
    for kind in ("dummy", "wireguard"):
        yield _try(
            kind,
            functools.partial(_add_link, namespace, kind),
            "programs in hosts may use it",
            "programs in hosts can't use it",
        )
    yield Capability(
        "netem", False, "not needed", "impairments are done by the lab's own pump everywhere"
    )


def _try(name: str, attempt: Callable[[], object], used: str, instead: str) -> Capability:
    try:
        attempt()
    except (BuildError, NftError, NetlinkError) as error:
        words = error.strerror if isinstance(error, OSError) else str(error)
        return Capability(name, False, words or str(error), instead)
    except OSError as error:
        return Capability(name, False, error.strerror or str(error), instead)
    return Capability(name, True, "", used)


def _add_veth(left: NetworkNamespace, right: NetworkNamespace) -> None:
    with Netlink() as netlink:
        netlink.run([add_veth(LinkEnd(left, "wan", 501), LinkEnd(right, "lan", 502))])


def _write_sysctl(namespace: NetworkNamespace) -> None:
    with namespace.entered():
        write_sysctl("ipv4/ip_forward", "1")


def _find_nsenter() -> None:
    if shutil.which("nsenter") is None:
        raise OSError(errno.ENOENT, "there is no program nsenter")


def _add_link(namespace: NetworkNamespace, kind: str) -> None:
    with Netlink(namespace) as netlink:
        netlink.run([add_link_kind(kind)])
