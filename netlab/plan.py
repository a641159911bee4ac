"""What a back end would build, for people: a drawing of the network, and ip and nft text. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from netlab.addresses import AddressPlan, InterfacePlan, plan_addresses
from netlab.behavior import Link, ModelError
from netlab.kernel.fidelity import Engine
from netlab.kernel.wiring import Machine, Wiring, plan_wiring
from netlab.model import INTERNET, Nat, Topology


def describe_link(link: Link) -> str:
    """Return what a link does to packets, in a few words; nothing for a perfect one."""
    parts = []
    if link.delay_seconds:
        jitter = f"±{link.jitter_seconds * 1000:g}" if link.jitter_seconds else ""
        parts.append(f"{link.delay_seconds * 1000:g}{jitter} ms")
    if link.loss:
        parts.append(f"{link.loss:.3g} loss" if link.loss < 1e-4 else f"{link.loss:.2%} loss")
    if link.burst_probability:
        parts.append("bursts")
    if link.duplication:
        parts.append(f"{link.duplication:.2%} doubled")
    if link.rate_bits_per_second is not None:
        parts.append(f"{link.rate_bits_per_second / 1e6:g} Mbit/s")
    if link.mtu_bytes != 1500:
        parts.append(f"MTU {link.mtu_bytes}" + (" (black hole)" if link.mtu_black_hole else ""))
    return ", ".join(parts)


def drawing(topology: Topology) -> str:
    """Return the network as a tree, the internet at its root."""
    addresses = plan_addresses(topology)
    return "\n".join([INTERNET, *_branches(topology, addresses, INTERNET, "")])


def _branches(
    topology: Topology, addresses: AddressPlan, network: str, indent: str
) -> Iterator[str]:
    found: list[tuple[str, str | None]] = []
    if network == INTERNET:
        for server in topology.servers:
            text = f"{server.name}  server  {_addresses(addresses.servers[server.name])}"
            found.append((_with_link(text, server.link), None))
    found += [
        (_nat_line(nat, addresses), nat.name)
        for nat in topology.nats
        if nat.uplink.network == network
    ]
    for host in topology.hosts:
        plans = addresses.hosts[host.name]
        for number, (uplink, plan) in enumerate(zip(host.uplinks, plans, strict=True)):
            if uplink.network == network:
                spare = "  (spare uplink)" if number else ""
                text = f"{host.name}  host  {_addresses(plan)}{spare}"
                found.append((_with_link(text, uplink.link), None))
    for index, (text, inner) in enumerate(found):
        is_last = index == len(found) - 1
        yield f"{indent}{'└── ' if is_last else '├── '}{text}"
        if inner is not None:
            yield from _branches(
                topology, addresses, inner, indent + ("    " if is_last else "│   ")
            )


def _nat_line(nat: Nat, addresses: AddressPlan) -> str:
    plan = addresses.nats[nat.name]
    kind = nat.behavior.class_name
    if nat.behavior.translation != "napt":
        kind = f"{nat.behavior.translation} {nat.behavior.filtering.name}"
    text = f"{nat.name}  NAT {kind}  {_addresses(plan.outside)}"
    text += f"  inside {plan.inside_ipv4 or plan.inside_ipv6}"
    return _with_link(text, nat.uplink.link)


def _addresses(plan: InterfacePlan) -> str:
    shown = [str(address) for address in (*plan.ipv4, *plan.ipv6)]
    return ", ".join(shown[:4]) + (f", ... ({len(shown)})" if len(shown) > 4 else "")


def _with_link(text: str, link: Link) -> str:
    words = describe_link(link)
    return f"{text}  [{words}]" if words else text


def engines(topology: Topology) -> dict[str, tuple[Engine, tuple[str, ...]]]:
    """Return each NAT's engine on the kernel back end, and why it is not nftables.

    Raises:
        ModelError: the kernel back end cannot build this topology.
    """
    return {
        name: (machine.router.engine, machine.fidelity.reasons)
        for name, machine in plan_wiring(topology).machines.items()
        if machine.router is not None and machine.fidelity is not None
    }


def plan_text(topology: Topology) -> str:
    """Return the network as a drawing and as what ip and nft would be told.

    The lab speaks netlink itself; this is the same in the words of the usual tools.
    """
    try:
        wiring = plan_wiring(topology)
    except ModelError as error:
        return f"{drawing(topology)}\n\nNot possible on the kernel back end: {error}\n"
    parts = [drawing(topology), ""]
    parts += [f"ip netns add {name}" for name in wiring.machines]
    for cable in wiring.cables:
        if cable.pumped:
            parts.append(
                f"# {cable.key}: TUN {cable.inner.machine}/{cable.inner.name} <-> "
                f"{cable.outer.machine}/{cable.outer.name}, "
                f"{describe_link(cable.upload) or 'plain'} up, "
                f"{describe_link(cable.download) or 'plain'} down"
            )
        else:
            parts.append(
                f"ip link add {cable.inner.name} netns {cable.inner.machine} mtu "
                f"{cable.mtu_bytes} type veth peer name {cable.outer.name} "
                f"netns {cable.outer.machine}"
            )
    for nat in wiring.user_nats:
        reasons = wiring.machines[nat.router.name].fidelity
        why = "; ".join(reasons.reasons) if reasons is not None else ""
        parts.append(
            f"# {nat.router.name}: user-space NAT between TUN {nat.inside.name} and "
            f"{nat.uplink.key}" + (f" ({why})" if why else "")
        )
    for machine in wiring.machines.values():
        parts += ["", f"# --- {machine.name}", *_machine_lines(machine, _interfaces(wiring))]
    return "\n".join(parts) + "\n"


def _interfaces(wiring: Wiring) -> dict[tuple[str, int], str]:
    ends = [end for cable in wiring.cables for end in (cable.inner, cable.outer)]
    ends += [nat.inside for nat in wiring.user_nats]
    return {(end.machine, end.index): end.name for end in ends}


def _machine_lines(machine: Machine, names: dict[tuple[str, int], str]) -> Iterator[str]:
    name = machine.name
    for key, value in machine.sysctls.items():
        yield f"ip netns exec {name} sysctl -w net.{key.replace('/', '.')}={value}"
    for index, address in machine.addresses:
        yield f"ip -n {name} addr add {address} dev {names.get((name, index), 'lo')}"
    for route in machine.routes:
        device = f"dev {names[name, route.index]}" if route.index is not None else ""
        kind = "" if route.index is not None else "blackhole "
        yield f"ip -n {name} route replace {kind}{route.destination} {device}".rstrip()
    if machine.rules:
        yield f"ip netns exec {name} nft -f - <<'END'"
        yield machine.rules.strip()
        yield "END"
