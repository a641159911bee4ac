"""Handles for a running lab's machines: hosts and servers to be in, NATs to be hard on."""

from __future__ import annotations

import ipaddress
import os
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from ipaddress import IPv4Address
from typing import TYPE_CHECKING, Any

import trio

from netlab.addresses import InterfacePlan
from netlab.behavior import Link, ModelError, suggest
from netlab.kernel.conntrack import age_elements, age_flows, flush_conntrack
from netlab.kernel.fidelity import Engine
from netlab.kernel.namespaces import NetworkNamespace
from netlab.kernel.netfilter import load_ruleset
from netlab.kernel.netlink import (
    Netlink,
    Request,
    Route,
    add_address,
    delete_address,
    delete_route,
    replace_route,
    set_link_address,
)
from netlab.kernel.nft import dynamic_sets, flush_dynamic_sets, login_rule, router_rules
from netlab.kernel.sockets import enter_namespace, leave_namespace
from netlab.kernel.wiring import Cable, host_routes, interface_addresses

if TYPE_CHECKING:
    from netlab.kernel.lab import KernelLab


class KernelMachine:
    """A machine of a lab. Its cable is the one to its only or first network by default."""

    def __init__(self, lab: KernelLab, name: str, namespace: NetworkNamespace) -> None:
        self._lab = lab
        self.name = name
        self.namespace = namespace

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name}>"

    def _cable(self, network: str | None) -> Cable:
        cables = [cable for cable in self._lab.wiring.cables if cable.owner == self.name]
        for cable in cables:
            if network in (None, cable.network):
                return cable
        raise ModelError(
            f'"{self.name}"',
            f'no uplink leads to "{network}"; '
            + suggest(network or "", [cable.network for cable in cables]),
        )

    def cut(self, network: str | None = None) -> None:
        """Stop carrying packets between this machine and a network, in silence."""
        self._set_cable_up(self._cable(network), False)
        self._lab.record_change("cut", self.name, network or "")

    def heal(self, network: str | None = None) -> None:
        """Carry packets again."""
        self._set_cable_up(self._cable(network), True)
        self._lab.record_change("heal", self.name, network or "")

    def _set_cable_up(self, cable: Cable, up: bool) -> None:
        if cable.pumped:
            self._lab.fabric.call("set_link_up", cable.key, up)
        else:
            with Netlink(self.namespace) as netlink:
                netlink.run([set_link_address(cable.inner.index, deaf=not up)])

    def set_link(
        self, upload: Link, download: Link | None = None, network: str | None = None
    ) -> None:
        """Change what the cable does to packets from now on.

        Raises:
            ModelError: nothing impaired the cable when the lab was built, so that the kernel
                carries it; name the machine in the lab's `adjustable`.
        """
        cable = self._cable(network)
        if not cable.pumped:
            raise ModelError(
                f'"{self.name}"',
                "its link was built for speed and cannot change; name it in `adjustable`",
            )
        self._lab.fabric.call("set_link", cable.key, upload, download or upload)
        self._lab.record_change("link", self.name, network or "")


class KernelHost(KernelMachine):
    """A host or server. ``async with host:`` puts the task, and tasks it starts, into it."""

    def __init__(
        self,
        lab: KernelLab,
        name: str,
        namespace: NetworkNamespace,
        interfaces: Sequence[InterfacePlan],
    ) -> None:
        super().__init__(lab, name, namespace)
        self._interfaces = tuple(interfaces)
        self._up = [self._interfaces[0].network]

    async def __aenter__(self) -> KernelHost:
        enter_namespace(self.namespace)
        return self

    async def __aexit__(self, *_: object) -> None:
        leave_namespace()

    @property
    def addresses(self) -> tuple[str, ...]:
        """The addresses of all interfaces that are up, preferred uplink first."""
        plans = {plan.network: plan for plan in self._interfaces}
        return tuple(
            str(address)
            for network in self._up
            for address in (*plans[network].ipv4, *plans[network].ipv6)
        )

    @property
    def is_behind_nat64(self) -> bool:
        """Whether the preferred uplink is an IPv6-only network with a NAT64."""
        nat = self._lab.topology.nat_by_name.get(self._up[0]) if self._up else None
        return nat is not None and nat.behavior.nat64

    # --- programs ------------------------------------------------------------------------

    def command(self, command: Sequence[str]) -> list[str]:
        """Return the command line that runs `command` in this host, for any starter."""
        # The link, not os.getpid(): /proc may show the numbers of an outer process namespace.
        process = os.readlink("/proc/self")
        self._lab.has_run_programs = True
        namespace = f"/proc/{process}/fd/{self.namespace.descriptor}"
        return ["nsenter", f"--net={namespace}", "--", *command]

    async def run_process(
        self, command: Sequence[str], **options: Any
    ) -> subprocess.CompletedProcess[bytes]:
        """Run a program in this host as `trio.run_process` does, with the same options."""
        return await trio.run_process(self.command(command), **options)

    async def open_process(self, command: Sequence[str], **options: Any) -> trio.Process:
        """Start a program in this host as `trio.lowlevel.open_process` does.

        What still runs in the lab's hosts when the lab ends is killed.
        """
        process = await trio.lowlevel.open_process(self.command(command), **options)
        self._lab.programs.append(process)
        return process

    # --- uplinks -------------------------------------------------------------------------

    def roam(self, network: str, *, keep_old: bool = False) -> None:
        """Make the uplink to `network` the preferred one.

        The other interfaces lose their addresses unless `keep_old`; either way sockets that are
        connected keep the source address that they have.
        """
        chosen = self._cable(network)
        old = [name for name in self._up if name != network]
        requests: list[Request] = []
        if not keep_old:
            for name in old:
                requests += self._take_down(name)
        plan = self._plan(network)
        if network not in self._up:
            addresses = interface_addresses(plan)
            requests += [add_address(chosen.inner.index, address) for address in addresses]
        requests += map(replace_route, host_routes(chosen.inner.index, plan))
        self._run(requests)
        with Netlink(self.namespace) as netlink:
            for own in plan.ipv6:
                netlink.wait_until_local(own)
        self._up = [network, *(old if keep_old else ())]
        self._lab.record_change("roam", self.name, network)

    def disconnect(self) -> None:
        """Take the addresses of every interface away; `roam` brings one back."""
        self._run([request for name in self._up for request in self._take_down(name)])
        self._up = []
        self._lab.record_change("disconnect", self.name, "")

    def _plan(self, network: str) -> InterfacePlan:
        return next(plan for plan in self._interfaces if plan.network == network)

    def _take_down(self, network: str) -> list[Request]:
        # The routes that name an address as their source go with it.
        index = self._cable(network).inner.index
        addresses = interface_addresses(self._plan(network))
        return [delete_address(index, address) for address in addresses]

    def _run(self, requests: Sequence[Request]) -> None:
        with Netlink(self.namespace) as netlink:
            netlink.run(requests)


class KernelNat(KernelMachine):
    """A NAT, on either engine."""

    @property
    def engine(self) -> Engine:
        """What translates here."""
        return self._lab.routers[self.name].engine

    @property
    def external(self) -> tuple[IPv4Address, ...]:
        """The external IPv4 addresses."""
        return self._lab.routers[self.name].plan.outside.ipv4

    def reboot(self) -> None:
        """Lose all state at once: conntrack, learned sets, or the user engine's tables."""
        router = self._lab.routers[self.name]
        if router.engine is Engine.USER:
            self._lab.fabric.call("reboot", self.name)
        flush = flush_dynamic_sets(router)
        if flush:
            load_ruleset(self.namespace, flush)
        self._forget_flows("reboot")
        self._lab.record_change("reboot", self.name, "")

    def _forget_flows(self, cause: str) -> None:
        observer = self._lab.observers.get(self.name)
        if observer is not None:
            observer.drain()
        flush_conntrack(self.namespace)
        if observer is not None:
            observer.drain(cause)

    def advance(self, seconds: float) -> None:
        """Let this NAT's clock jump ahead: mappings and permissions lose that much of their life.

        The kernel counts whole seconds, so the end of a flow there may be off by one.
        """
        router = self._lab.routers[self.name]
        if router.engine is Engine.USER:
            self._lab.fabric.call("advance", self.name, seconds)
        observer = self._lab.observers.get(self.name)
        if observer is not None:
            observer.drain()
        age_elements(self.namespace, dynamic_sets(router), seconds)
        if self._lab.wiring.machines[self.name].rules:
            age_flows(self.namespace, seconds)
        if observer is not None:
            observer.drain()
        self._lab.record_change("advance", self.name, f"{seconds:g} s")

    def renumber(self, external: tuple[bytes, ...]) -> None:
        """Take other external IPv4 addresses (packed), which nobody else may have."""
        old = self._lab.routers[self.name]
        outside = replace(old.plan.outside, ipv4=tuple(map(IPv4Address, external)))
        router = replace(old, plan=replace(old.plan, outside=outside))
        cable = self._cable(None)
        upstream = [Route(ipaddress.ip_network(a), cable.outer.index) for a in outside.ipv4]
        gone = [Route(ipaddress.ip_network(a), cable.outer.index) for a in self.external]
        with Netlink(self._lab.namespaces[cable.outer.machine]) as netlink:
            netlink.run([*map(delete_route, gone), *map(replace_route, upstream)])
        if router.engine is Engine.USER:
            self._lab.fabric.call("renumber", self.name, list(external))
        else:
            index = cable.inner.index
            # The new address first: without any, the kernel would take the routes down too.
            requests = [
                *(add_address(index, ipaddress.ip_interface(a)) for a in outside.ipv4),
                *(delete_address(index, ipaddress.ip_interface(a)) for a in self.external),
            ]
            with Netlink(self.namespace) as netlink:
                netlink.run(requests)
            load_ruleset(self.namespace, router_rules(router))
            self._forget_flows("renumbered")
        self._lab.routers[self.name] = router
        self._lab.record_change("renumber", self.name, ", ".join(map(str, outside.ipv4)))

    def log_in(self, host: KernelHost) -> None:
        """Let an inside host through the captive portal."""
        for address in host.addresses:
            if ":" not in address:
                load_ruleset(self.namespace, login_rule(IPv4Address(address)))
