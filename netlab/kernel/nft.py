"""nftables rules for the model's NATs and firewalls: pure text, one ruleset per router.

A router's outside interface is ``wan``, its inside ones are ``lan0``, ``lan1``, ... Dynamic sets
and conntrack together are a router's state; a reboot has to forget both.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from ipaddress import IPv4Address

from netlab.addresses import NatPlan
from netlab.behavior import (
    Filtering,
    Hairpin,
    Ipv6,
    Mapping,
    NatBehavior,
    PortAssignment,
    PortRange,
    Translation,
    Unsolicited,
)
from netlab.drops import DropReason
from netlab.kernel.fidelity import Engine

WAN = "wan"
LAN = "lan"
NAT_INSIDE = "natin"
"""The TUN device by which packets from inside reach the user engine."""

DROP_LOG_GROUP = 7
"""The NFLOG group that carries dropped packets, with the reason as their prefix."""

LOGGED_IN = "logged_in"
_DYNAMIC_SETS = (
    ("ip nat", "map", "cone"),
    ("inet flt", "set", "seen"),
    ("ip6 fw6", "set", "seen6"),
)

# Bounds the kernel memory of a learning NAT; as many entries as there are ports.
_SET_SIZE = 65536
_ALL_PORTS = PortRange(1024, 65535)
# A sequential allocator starts again after this many ports. Loading 1000 entries takes 70 ms.
_SEQUENCE_LENGTH = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Router:
    """What the rules of one router depend on."""

    name: str
    behavior: NatBehavior
    plan: NatPlan
    inside: Sequence[IPv4Address] = ()
    """Addresses of the machines inside; one-to-one translation pairs them with the pool."""
    engine: Engine = Engine.NFT
    log_drops: bool = False
    seed: int = 0
    lan_glob: str = field(default=f'"{LAN}*"', init=False)

    def drop(self, reason: DropReason, condition: str) -> Iterator[str]:
        """Rules that drop what meets the condition, and tell why where drops are observed."""
        if self.log_drops:
            log = f"log group {DROP_LOG_GROUP} queue-threshold 1"
            yield f'{condition} {log} prefix "{reason.value}"'
        yield f"{condition} drop"

    @property
    def external(self) -> str:
        return ", ".join(map(str, self.plan.outside.ipv4))

    @property
    def translates(self) -> bool:
        return (
            self.engine is Engine.NFT and self.behavior.translation is not Translation.NONE
        ) and bool(self.plan.outside.ipv4)

    @property
    def opens_ports(self) -> bool:
        """Whether strangers, or hosts on the same LAN, can come in through a mapping."""
        return self.behavior.translation is Translation.NAPT and (
            self.behavior.filtering is not Filtering.APDF
            or self.behavior.hairpin is not Hairpin.NONE
        )


def router_rules(router: Router) -> str:
    """Return the ruleset of one router, for `nft -f`; it replaces whatever was there.

    The text is empty where nothing needs nftables.
    """
    tables = [
        *_table("inet guard", _guard(router)),
        *_table("ip nat", _nat(router)),
        *_table("ip timers", _timers(router)),
        *_table("inet flt", _filter(router)),
        *_table("ip6 fw6", _firewall_ipv6(router)),
        *_table("ip6 nat6", _nat_ipv6(router)),
    ]
    return "\n".join(["flush ruleset", *tables, ""]) if tables else ""


def router_sysctls(router: Router) -> dict[str, str]:
    """Return the sysctls below /proc/sys/net of one router."""
    behavior, lifetimes = router.behavior, router.behavior.lifetimes
    values = {
        "ipv4/conf/all/rp_filter": "0",
        "ipv4/conf/default/rp_filter": "0",
        "ipv4/ip_forward": "1",
    }
    if behavior.ipv6 is not Ipv6.NONE:
        values["ipv6/conf/all/forwarding"] = "1"
    if router.engine is Engine.NFT:
        unreplied = lifetimes.udp_unreplied_seconds or lifetimes.udp_seconds
        values["netfilter/nf_conntrack_udp_timeout"] = _whole(unreplied)
        values["netfilter/nf_conntrack_udp_timeout_stream"] = _whole(lifetimes.udp_seconds)
        values["netfilter/nf_conntrack_icmp_timeout"] = _whole(lifetimes.icmp_seconds)
        tcp = "netfilter/nf_conntrack_tcp_timeout_"
        values[tcp + "established"] = _whole(lifetimes.tcp_seconds)
        for state in ("syn_sent", "syn_recv", "fin_wait", "close_wait", "last_ack"):
            values[tcp + state] = _whole(lifetimes.tcp_transitory_seconds)
    return values


def login_rule(address: IPv4Address) -> str:
    """Return the command that lets a host through the captive portal."""
    return f"add element inet flt {LOGGED_IN} {{ {address} }}\n"


def dynamic_sets(router: Router) -> list[tuple[str, str, str]]:
    """Return (table, kind, name) of what a router learns from traffic."""
    text = router_rules(router)
    return [
        (table, kind, name) for table, kind, name in _DYNAMIC_SETS if f"{kind} {name} {{" in text
    ]


def flush_dynamic_sets(router: Router) -> str:
    """Return the commands that make a router forget what it learned from traffic."""
    return "".join(f"flush {kind} {table} {name}\n" for table, kind, name in dynamic_sets(router))


def _whole(seconds: float) -> str:
    return str(max(1, round(seconds)))


def _table(name: str, lines: Iterator[str]) -> list[str]:
    body = list(lines)
    return [f"table {name} {{", *body, "}"] if body else []


def _chain(name: str, hook: str, rules: Sequence[str], policy: str = "accept") -> Iterator[str]:
    if rules or policy != "accept":
        yield f"  chain {name} {{"
        yield f"    type {hook}; policy {policy};"
        yield from (f"    {rule}" for rule in rules)
        yield "  }"


def _guard(router: Router) -> Iterator[str]:
    """What happens to packets for the router itself.

    Without a drop here a Linux NAT isn't even endpoint-independent: a peer's early packet is
    delivered locally, conntrack confirms that flow, and the inside socket's own flow to that
    peer then has to get another external port.
    """
    if router.engine is not Engine.NFT:
        return
    unsolicited = router.behavior.unsolicited
    new = f'iifname "{WAN}" ct state new'
    rules: list[str] = []
    if unsolicited is Unsolicited.RESET:
        rules.append(f"{new} meta l4proto tcp reject with tcp reset")
    if unsolicited in (Unsolicited.RESET, Unsolicited.REJECT):
        rules.append(f"{new} meta l4proto {{ tcp, udp }} reject with icmpx type port-unreachable")
    if unsolicited is not Unsolicited.ACCEPT:
        rules += router.drop(DropReason.NO_MAPPING, new)
    if router.translates and router.behavior.hairpin is Hairpin.NONE:
        rules += router.drop(
            DropReason.NO_HAIRPIN, f"iifname {router.lan_glob} ip daddr {{ {router.external} }}"
        )
    yield from _chain("input", "filter hook input priority 0", rules)


def _nat(router: Router) -> Iterator[str]:
    if not router.translates:
        return
    behavior = router.behavior
    before: list[str] = []
    after: list[str] = []
    if behavior.translation is Translation.ONE_TO_ONE:
        pairs = list(zip(router.inside, router.plan.outside.ipv4, strict=False))
        outward = ", ".join(f"{inside} : {outside}" for inside, outside in pairs)
        inward = ", ".join(f"{outside} : {inside}" for inside, outside in pairs)
        if pairs:
            before.append(f'iifname "{WAN}" dnat to ip daddr map {{ {inward} }}')
            after.append(f'oifname "{WAN}" snat to ip saddr map {{ {outward} }}')
    else:
        after += _source_nat(router)
    if router.opens_ports:
        yield "  map cone {"
        yield "    type inet_proto . inet_service : ipv4_addr . inet_service;"
        yield f"    flags dynamic,timeout; size {_SET_SIZE};"
        yield "  }"
        where = (
            f'iifname "{WAN}"'
            if behavior.hairpin is Hairpin.NONE
            else f"ip daddr {{ {router.external} }}"
        )
        before.append(
            f"{where} meta l4proto {{ tcp, udp }} dnat ip to meta l4proto . th dport map @cone"
        )
        if behavior.hairpin is Hairpin.EXTERNAL:
            after.append(
                f"iifname {router.lan_glob} oifname {router.lan_glob} ct status dnat "
                f"snat to {router.plan.outside.ipv4[0]}"
            )
    yield from _chain("pre", "nat hook prerouting priority -100", before)
    yield from _chain("post", "nat hook postrouting priority 100", after)
    if router.opens_ports:
        yield from _chain("learn", "filter hook postrouting priority 300", list(_learn(router)))


def _source_nat(router: Router) -> Iterator[str]:
    behavior, addresses = router.behavior, router.plan.outside.ipv4
    ports, span = behavior.ports, behavior.ports.ranges[0]
    suffix = " random" if behavior.mapping is not Mapping.EIM else ""
    for number, address in enumerate(addresses):
        out = f'oifname "{WAN}"'
        # Masquerade forgets its flows when the address goes, as home routers do, but knows one
        # address only. From a pool, which is no range, a hash of the host picks its address.
        action, to = "masquerade", "masquerade to "
        if len(addresses) > 1:
            out += f" jhash ip saddr mod {len(addresses)} seed 0x1 == {number}"
            action, to = f"snat to {address}", f"snat to {address}"
        if ports.preserved:
            numbers = ", ".join(map(str, ports.preserved))
            yield f"{out} udp sport {{ {numbers} }} {action}"
        if ports.assignment in (PortAssignment.HASH, PortAssignment.SEQUENTIAL):
            port = _computed_port(router, span)
            yield f"{out} meta l4proto {{ tcp, udp }} snat to {address} : {port}"
        elif span != _ALL_PORTS:
            yield f"{out} meta l4proto {{ tcp, udp }} {to}:{span.first}-{span.last}{suffix}"
        yield f"{out} {action}{suffix}"


def _computed_port(router: Router, span: PortRange) -> str:
    """Return an expression for a port that follows from a hash or a counter."""
    behavior = router.behavior
    if behavior.ports.assignment is PortAssignment.SEQUENTIAL:
        # A number used as a port directly comes out byte-swapped; a map keeps the order.
        step = behavior.ports.step
        start = span.first if step > 0 else span.last
        length = min(_SEQUENCE_LENGTH, len(span))
        entries = ", ".join(
            f"{n} : {span.first + (start - span.first + n * step) % len(span)}"
            for n in range(length)
        )
        return f"numgen inc mod {length} map {{ {entries} }}"
    key = {
        Mapping.EIM: "ip saddr . th sport",
        Mapping.ADM: "ip saddr . th sport . ip daddr",
        Mapping.APDM: "ip saddr . th sport . ip daddr . th dport",
    }[behavior.mapping]
    # The hash comes out byte-swapped as a port, hence anywhere above 1023 whatever the range
    # says: 2^14 values from 20000 stay clear of the well-known ports either way.
    seed = zlib.crc32(f"{router.seed} {router.name}".encode())
    return f"jhash {key} mod 16384 seed {seed:#x} offset 20000"


def _learn(router: Router) -> Iterator[str]:
    """Learn the real external port after the NAT decision, from conntrack's tuples.

    A flow that a stranger began has its tuples the other way round; taking them as if the inside
    had begun it would open the *stranger's* port number.
    """
    lifetimes = router.behavior.lifetimes
    ours = "meta l4proto . ct reply proto-dst", "ct original ip saddr . ct original proto-src"
    theirs = "meta l4proto . ct original proto-dst", "ct reply ip saddr . ct reply proto-src"
    for protocol, seconds in (("udp", lifetimes.udp_seconds), ("tcp", lifetimes.tcp_seconds)):
        for out, begun_inside, begun_outside in (
            (f'oifname "{WAN}"', "original", "reply"),
            (f'iifname "{WAN}"', "reply", "original"),
        ):
            for direction, (key, value) in ((begun_inside, ours), (begun_outside, theirs)):
                yield (
                    f"{out} meta l4proto {protocol} ct direction {direction} "
                    f"update @cone {{ {key} timeout {_whole(seconds)}s : {value} }}"
                )


def _timers(router: Router) -> Iterator[str]:
    by_port = router.behavior.lifetimes.udp_by_port
    if not by_port or router.engine is not Engine.NFT:
        return
    rules = []
    for port, seconds in by_port:
        life = _whole(seconds)
        yield f"  ct timeout port{port} {{"
        yield "    protocol udp; l3proto ip;"
        yield f"    policy = {{ unreplied : {life}, replied : {life} }};"
        yield "  }"
        rules.append(f'iifname {router.lan_glob} udp dport {port} ct timeout set "port{port}"')
    yield from _chain("choose", "filter hook prerouting priority -150", rules)


def _filter(router: Router) -> Iterator[str]:
    """What may cross the router, in both directions."""
    behavior, inside = router.behavior, router.plan.inside_ipv4
    lan, wan = f"iifname {router.lan_glob}", f'iifname "{WAN}"'
    rules: list[str] = []
    if inside is not None:
        # BCP 38: what keeps an old address after a move must not leave by the new uplink.
        rules += router.drop(DropReason.SPOOFED, f"{lan} meta nfproto ipv4 ip saddr != {inside}")
    if behavior.firewall.captive_portal:
        yield f"  set {LOGGED_IN} {{"
        yield "    type ipv4_addr;"
        yield "  }"
    if router.engine is Engine.USER:
        rules += _outbound_firewall(router, f'{lan} oifname {{ "{WAN}", "{NAT_INSIDE}" }}')
        yield from _chain("forward", "filter hook forward priority 0", rules)
        return
    outward = f'{lan} oifname "{WAN}"'
    rules += _outbound_firewall(router, outward)
    if not behavior.tcp.simultaneous_open:
        rules += router.drop(DropReason.SYN_FILTERED, f"{wan} tcp flags & (syn | ack) == syn")
    if inside is not None and behavior.filtering is Filtering.ADF:
        yield "  set seen {"
        yield "    type inet_proto . ipv4_addr . inet_service . ipv4_addr;"
        yield f"    flags dynamic,timeout; size {_SET_SIZE};"
        yield "  }"
        for protocol, seconds in (
            ("udp", behavior.lifetimes.udp_seconds),
            ("tcp", behavior.lifetimes.tcp_seconds),
        ):
            life = _whole(seconds)
            rules.append(
                f"{outward} meta l4proto {protocol} update @seen "
                f"{{ meta l4proto . ip saddr . th sport . ip daddr timeout {life}s }}"
            )
    if inside is not None:
        ipv4 = f"{wan} meta nfproto ipv4"
        rules.append(f"{ipv4} ct state established,related accept")
        if behavior.filtering is Filtering.ADF:
            rules.append(
                f"{ipv4} meta l4proto {{ tcp, udp }} "
                "meta l4proto . ip daddr . th dport . ip saddr @seen accept"
            )
        if behavior.filtering is Filtering.EIF:
            translated = " ct status dnat" if router.translates else ""
            rules.append(f"{ipv4}{translated} accept")
        rules += router.drop(DropReason.FILTERED, ipv4)
    if behavior.tcp.reset_after_idle:
        rules.append(f"{lan} tcp flags & (syn | ack) == ack ct state new reject with tcp reset")
    yield from _chain("forward", "filter hook forward priority 0", rules)


def _outbound_firewall(router: Router, outward: str) -> Iterator[str]:
    firewall = router.behavior.firewall
    if firewall.captive_portal:
        guest = f"{outward} ip saddr != @{LOGGED_IN}"
        yield f"{guest} meta l4proto tcp reject with tcp reset"
        yield from router.drop(DropReason.CAPTIVE_PORTAL, guest)
    if firewall.block_stun:
        yield from router.drop(
            DropReason.STUN_BLOCKED, f"{outward} meta l4proto udp @th,96,32 0x2112a442"
        )
    for protocol, ports, refusal in (
        ("udp", firewall.udp_ports, "reject with icmpx type admin-prohibited"),
        ("tcp", firewall.tcp_ports, "reject with tcp reset"),
    ):
        if ports is None:
            continue
        blocked = f"{outward} meta l4proto {protocol}"
        if ports:
            blocked += f" th dport != {{ {', '.join(map(str, ports))} }}"
        if firewall.reject:
            yield f"{blocked} {refusal}"
        else:
            yield from router.drop(DropReason.FIREWALL, blocked)


def _firewall_ipv6(router: Router) -> Iterator[str]:
    behavior = router.behavior
    if behavior.ipv6 is Ipv6.NONE or behavior.ipv6_filtering is Filtering.EIF:
        return
    wan = f'iifname "{WAN}"'
    errors = "destination-unreachable, packet-too-big, time-exceeded, parameter-problem"
    rules = [f"{wan} ct state established,related accept"]
    if behavior.ipv6_filtering is Filtering.ADF:
        yield "  set seen6 {"
        yield "    type inet_proto . ipv6_addr . inet_service . ipv6_addr;"
        yield f"    flags dynamic,timeout; size {_SET_SIZE};"
        yield "  }"
        life = _whole(behavior.lifetimes.udp_seconds)
        key = "meta l4proto . ip6 saddr . th sport . ip6 daddr"
        rules.insert(
            0,
            f'oifname "{WAN}" meta l4proto {{ tcp, udp }} '
            f"update @seen6 {{ {key} timeout {life}s }}",
        )
        rules.append(
            f"{wan} meta l4proto {{ tcp, udp }} "
            "meta l4proto . ip6 daddr . th dport . ip6 saddr @seen6 accept"
        )
    rules.append(f"{wan} icmpv6 type {{ {errors}, echo-request }} accept")
    rules += router.drop(DropReason.FILTERED, wan)
    yield from _chain("forward", "filter hook forward priority 0", rules)


def _nat_ipv6(router: Router) -> Iterator[str]:
    behavior, plan = router.behavior, router.plan
    inside, outside = plan.inside_ipv6, plan.external_ipv6
    wan = f'oifname "{WAN}"'
    if behavior.ipv6 is Ipv6.NAT66:
        suffix = " random" if behavior.mapping is not Mapping.EIM else ""
        rules = [f"{wan} masquerade{suffix}"]
        yield from _chain("post", "nat hook postrouting priority 100", rules)
    elif behavior.ipv6 is Ipv6.NPT:
        rules = [f"{wan} ip6 saddr {inside} snat ip6 prefix to {outside}"]
        yield from _chain("post", "nat hook postrouting priority 100", rules)
        rules = [f'iifname "{WAN}" ip6 daddr {outside} dnat ip6 prefix to {inside}']
        yield from _chain("pre", "nat hook prerouting priority -100", rules)
