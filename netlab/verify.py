"""Measuring every NAT of a scenario, or every preset and the nine classes, against its claim."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import msgspec
import trio

from netlab.addresses import NAT64_PREFIX
from netlab.behavior import ModelError, NatBehavior
from netlab.labs import BackEnd, Lab, open_lab
from netlab.model import INTERNET, Host, Nat, Server, Topology, Uplink
from netlab.prediction import combined_class
from netlab.presets import NatPreset, class_behavior, nat_preset, nat_presets
from netlab.probe import ProbeReport, ProbeServers, disagreements, probe_nat, serve_probe
from netlab.punch import CLASSES

NO_UDP, PORTAL = "no-udp", "portal"
"""Claims of NATs that let no probe through, the second before the login only."""

# All at once would wait for one another, and the probe takes silence for an answer.
_AT_ONCE = 8
_SERVER = "probe-server"
# Longer than the longest lifetime of a preset, so that it is measured; such time costs nothing.
_LIFETIME_LIMIT_SECONDS = 700.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A NAT to measure: what stands between a host and the internet, the innermost first."""

    name: str
    chain: tuple[NatBehavior, ...]
    claims: str


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """What was measured of one target."""

    name: str
    claims: str
    measured: str
    """A class, ``unreachable`` or ``mixed``."""
    agrees: bool
    engine: str = ""
    """On the kernel back end: nft or user."""
    skipped: str = ""
    """Why it could not be measured here; empty if it was."""
    disagreements: list[str] = []
    lifetime_seconds: float | None = None
    preserves_ports: bool | None = None
    hairpin: str | None = None


def preset_target(preset: NatPreset) -> Target:
    """Return a preset with all NATs that its chain has."""
    chain = [preset.behavior]
    while preset.behind is not None:
        outer = nat_preset(preset.behind)
        chain.append(outer.behavior)
        preset = replace(outer, name=preset.name, claims=preset.claims)
    return Target(name=preset.name, chain=tuple(chain), claims=preset.claims)


def all_targets() -> list[Target]:
    """Return the nine classes and every preset."""
    classes = [Target(name=name, chain=(class_behavior(name),), claims=name) for name in CLASSES]
    return classes + [preset_target(preset) for preset in nat_presets().values()]


def scenario_targets(topology: Topology) -> list[Target]:
    """Return every NAT of a topology, each with those that it is behind.

    What they claim follows from their descriptions.
    """
    targets = []
    for nat in topology.nats:
        chain = tuple(n.behavior for n in topology.nats_towards_internet(nat.name))
        claims = combined_class(list(chain))
        if any(behavior.firewall.captive_portal for behavior in chain):
            claims = PORTAL
        elif any(behavior.firewall.udp_ports is not None for behavior in chain):
            claims = NO_UDP
        targets.append(Target(name=nat.name, chain=chain, claims=claims))
    return targets


async def verify(
    targets: Sequence[Target],
    back_end: BackEnd,
    *,
    on_finding: Callable[[Finding], None] = lambda _: None,
) -> list[Finding]:
    """Measure all targets in one lab, each from a host of its own.

    Args:
        targets: what to measure.
        back_end: where.
        on_finding: gets each result when it is there, in any order.

    Returns:
        The findings in the order of the targets.
    """
    findings: dict[int, Finding] = {}
    nats: list[Nat] = []
    hosts: list[Host] = []
    for index, target in enumerate(targets):
        problem = _obstacle(target, back_end)
        if problem is not None:
            findings[index] = Finding(
                name=target.name, claims=target.claims, measured="", agrees=True, skipped=problem
            )
            on_finding(findings[index])
            continue
        nats += chain_of_nats(f"n{index}", target.chain)
        hosts.append(Host(name=f"h{index}", uplinks=(Uplink(network=f"n{index}"),)))
    server = Server(name=_SERVER, addresses=3)
    topology = Topology(hosts=tuple(hosts), nats=tuple(nats), servers=(server,))
    async with open_lab(topology, back_end, record_packets=False) as lab:
        limiter = trio.CapacityLimiter(_AT_ONCE)

        async def measure(index: int) -> None:
            async with limiter:
                findings[index] = await _measure(lab, targets[index], f"h{index}", f"n{index}")
                on_finding(findings[index])

        async with trio.open_nursery() as serving:
            async with lab.host(_SERVER):
                await serving.start(serve_probe, _probe_servers(lab, nat64=False))
            async with trio.open_nursery() as measuring:
                for index in range(len(targets)):
                    if index not in findings:
                        measuring.start_soon(measure, index)
            serving.cancel_scope.cancel()
    return [findings[index] for index in range(len(targets))]


def chain_of_nats(name: str, chain: Iterable[NatBehavior]) -> list[Nat]:
    """Return NATs in series; the innermost has the name, the others follow from it."""
    behaviors = list(chain)
    names = [name, *(f"{name}.{number}" for number in range(1, len(behaviors)))]
    networks = [*names[1:], INTERNET]
    return [
        Nat(name=own, behavior=behavior, uplink=Uplink(network=outer))
        for own, behavior, outer in zip(names, behaviors, networks, strict=True)
    ]


def _obstacle(target: Target, back_end: BackEnd) -> str | None:
    """Return why a target can't be built, or None."""
    if back_end is not BackEnd.KERNEL:
        return None
    from netlab.kernel.wiring import plan_wiring

    try:
        plan_wiring(Topology(nats=tuple(chain_of_nats("nat", target.chain))))
    except ModelError as error:
        return error.problem
    return None


def _probe_servers(lab: Lab, *, nat64: bool) -> ProbeServers:
    found = [str(address) for address in lab.addresses.servers[_SERVER].ipv4]
    if nat64:
        prefix = int(NAT64_PREFIX.network_address)
        plan = lab.addresses.servers[_SERVER].ipv4
        found = [str(type(NAT64_PREFIX.network_address)(prefix | int(a))) for a in plan]
    return ProbeServers(addresses=(found[0], found[1], found[2]))


async def _measure(lab: Lab, target: Target, host: str, nat: str) -> Finding:
    servers = _probe_servers(lab, nat64=target.chain[0].nat64)
    generator = random.Random(target.name)
    nats = [own.name for own in lab.topology.nats_towards_internet(nat)]

    async def probe() -> ProbeReport:
        async with lab.host(host):
            return await probe_nat(
                servers,
                generator=generator,
                lifetime_limit_seconds=_LIFETIME_LIMIT_SECONDS,
                pause=lambda seconds: lab.let_pass(nats, seconds),
            )

    report = await probe()
    problems: list[str] = []
    if target.claims in (NO_UDP, PORTAL):
        measured = "unreachable"
        if report.reachable:
            problems.append(f"claims {target.claims}, but the probe's server was reached")
        elif target.claims == PORTAL:
            lab.log_in(nat, host)
            report = await probe()
            claims = combined_class(list(target.chain))
            measured = f"unreachable, then {report.class_name}"
            if report.class_name != claims:
                problems.append(f"after the login: claims {claims}, measured {report.class_name}")
    else:
        measured = report.class_name or ("mixed" if report.reachable else "unreachable")
        if measured != target.claims:
            problems.append(f"class: claims {target.claims}, measured {measured}")
        if len(target.chain) == 1:
            problems += disagreements(report, target.chain[0])
    return Finding(
        name=target.name,
        claims=target.claims,
        measured=measured,
        agrees=not problems,
        engine=lab.engine(nat),
        disagreements=problems,
        lifetime_seconds=report.lifetime_seconds,
        preserves_ports=report.preserves_ports,
        hairpin=None if report.hairpin is None else str(report.hairpin),
    )
