"""Rulesets as text, the choice of engine, and the wiring: all without a kernel."""

from __future__ import annotations

import pytest

from netlab.addresses import plan_addresses
from netlab.kernel.fidelity import Engine, choose_engine
from netlab.kernel.nft import Router, flush_dynamic_sets, router_rules, router_sysctls
from netlab.kernel.wiring import is_impaired, plan_wiring
from netlab.model import (
    INTERNET,
    Filtering,
    Firewall,
    Hairpin,
    Host,
    Ipv6,
    Lifetimes,
    Link,
    Mapping,
    ModelError,
    Nat,
    NatBehavior,
    PortAllocation,
    PortAssignment,
    PortRange,
    Refresh,
    Server,
    TcpBehavior,
    Topology,
    Translation,
    Unsolicited,
    Uplink,
)

RANDOM = PortAllocation(assignment=PortAssignment.RANDOM)
HASH = PortAllocation(assignment=PortAssignment.HASH)


def home(behavior: NatBehavior, hosts: int = 1) -> Topology:
    return Topology(
        nats=(Nat(name="n", behavior=behavior),),
        hosts=tuple(Host(name=f"h{i}", uplinks=(Uplink(network="n"),)) for i in range(hosts)),
        servers=(Server(name="s"),),
    )


def router(engine: Engine = Engine.NFT, log_drops: bool = False, **behavior: object) -> Router:
    topology = home(NatBehavior(**behavior))
    plan = plan_addresses(topology)
    inside = [interface.ipv4[0] for interface in plan.hosts["h0"]]
    return Router(
        name="n",
        behavior=topology.nats[0].behavior,
        plan=plan.nats["n"],
        inside=inside,
        engine=engine,
        log_drops=log_drops,
    )


def rules(engine: Engine = Engine.NFT, log_drops: bool = False, **behavior: object) -> str:
    return router_rules(router(engine, log_drops, **behavior))


def test_the_usual_home_router_is_masquerade_behind_a_guard() -> None:
    """EIM+APDF: plain masquerade, and nothing unsolicited reaches the router itself."""
    text = rules()
    assert 'oifname "wan" masquerade\n' in text
    assert 'iifname "wan" ct state new drop' in text
    assert 'iifname "wan" meta nfproto ipv4 ct state established,related accept' in text
    assert "@cone" not in text


@pytest.mark.parametrize(
    ("behavior", "line"),
    [
        ({"mapping": Mapping.APDM, "ports": RANDOM}, 'oifname "wan" masquerade random'),
        (
            {
                "ports": PortAllocation(
                    assignment=PortAssignment.RANDOM, ranges=(PortRange(10000, 29999),)
                )
            },
            'oifname "wan" meta l4proto { tcp, udp } masquerade to :10000-29999\n',
        ),
        ({"mapping": Mapping.ADM, "ports": HASH}, "jhash ip saddr . th sport . ip daddr mod"),
        (
            {"mapping": Mapping.APDM, "ports": HASH},
            "jhash ip saddr . th sport . ip daddr . th dport mod",
        ),
        (
            {"ports": PortAllocation(preserved=(500,))},
            'oifname "wan" udp sport { 500 } masquerade',
        ),
        ({"unsolicited": Unsolicited.REJECT}, "reject with icmpx type port-unreachable"),
        ({"unsolicited": Unsolicited.RESET}, "meta l4proto tcp reject with tcp reset"),
        (
            {"tcp": TcpBehavior(simultaneous_open=False)},
            'iifname "wan" tcp flags & (syn | ack) == syn drop',
        ),
        (
            {"tcp": TcpBehavior(reset_after_idle=True)},
            "tcp flags & (syn | ack) == ack ct state new reject with tcp reset",
        ),
        (
            {"firewall": Firewall(udp_ports=(53,))},
            'oifname "wan" meta l4proto udp th dport != { 53 } drop',
        ),
        (
            {"firewall": Firewall(udp_ports=(), reject=True)},
            'oifname "wan" meta l4proto udp reject with icmpx type admin-prohibited',
        ),
        ({"firewall": Firewall(block_stun=True)}, "@th,96,32 0x2112a442 drop"),
        ({"firewall": Firewall(captive_portal=True)}, "ip saddr != @logged_in drop"),
        (
            {"lifetimes": Lifetimes(udp_by_port=((53, 5.0),))},
            "policy = { unreplied : 5, replied : 5 };",
        ),
        ({"ipv6": Ipv6.NAT66, "mapping": Mapping.APDM, "ports": RANDOM}, "table ip6 nat6"),
        ({"ipv6": Ipv6.NPT}, "snat ip6 prefix to 2a0f:1:1:1::/64"),
        ({"ipv6": Ipv6.ROUTED}, "table ip6 fw6"),
    ],
)
def test_each_axis_has_its_rule(behavior: dict[str, object], line: str) -> None:
    """One behaviour differs from the default; its rule is there, and not without it."""
    assert line in rules(**behavior)
    assert line not in rules()


def test_a_pool_uses_its_addresses_and_none_between() -> None:
    """Each inside host is paired with one of them by a hash."""
    nat = router(addresses=3)
    text = router_rules(nat)
    for number, address in enumerate(nat.plan.outside.ipv4):
        assert f"jhash ip saddr mod 3 seed 0x1 == {number} snat to {address}\n" in text


def test_nothing_guards_a_router_that_accepts() -> None:
    """`Unsolicited.ACCEPT` is Linux with an open INPUT chain."""
    assert "ct state new" not in rules(unsolicited=Unsolicited.ACCEPT)


def test_open_filtering_learns_in_both_directions_of_a_flow() -> None:
    """A flow that a stranger began must not open the stranger's own port number."""
    text = rules(filtering=Filtering.EIF)
    key = "meta l4proto . ct reply proto-dst timeout 120s : ct original ip saddr"
    assert f'oifname "wan" meta l4proto udp ct direction original update @cone {{ {key}' in text
    key = "meta l4proto . ct original proto-dst timeout 120s : ct reply ip saddr"
    assert f'oifname "wan" meta l4proto udp ct direction reply update @cone {{ {key}' in text


def test_a_reboot_flushes_exactly_what_was_learned() -> None:
    """Only sets that the ruleset has are flushed: nft refuses unknown names."""
    assert flush_dynamic_sets(router()) == ""
    assert flush_dynamic_sets(router(filtering=Filtering.EIF)) == "flush map ip nat cone\n"
    assert flush_dynamic_sets(router(filtering=Filtering.ADF)) == (
        "flush map ip nat cone\nflush set inet flt seen\n"
    )


def test_external_source_hairpin_translates_the_sender_too() -> None:
    """Without it the receiver would see the sender's inside address."""
    line = "ct status dnat snat to 2.1."
    assert line in rules(filtering=Filtering.EIF, hairpin=Hairpin.EXTERNAL)
    assert line not in rules(filtering=Filtering.EIF, hairpin=Hairpin.INTERNAL)


def test_a_firewall_without_translation_has_no_nat_table() -> None:
    """Packets keep their addresses; the filter is the same."""
    text = rules(translation=Translation.NONE)
    assert "table ip nat" not in text
    assert "established,related accept" in text


def test_drops_are_logged_with_their_reason_where_observed() -> None:
    """Every logging rule stands before the drop that it explains."""
    lines = rules(log_drops=True).splitlines()
    logging = [number for number, line in enumerate(lines) if " log group 7 " in line]
    assert logging
    for number in logging:
        condition = lines[number].split(" log group")[0]
        assert lines[number + 1] == f"{condition} drop"


def test_the_user_engine_leaves_translation_and_state_out_of_nftables() -> None:
    """Only the outbound firewall and the spoofing filter stay."""
    text = rules(Engine.USER, firewall=Firewall(udp_ports=(53,)))
    assert "ct " not in text
    assert "masquerade" not in text
    assert 'oifname { "wan", "natin" } meta l4proto udp th dport != { 53 } drop' in text


def test_lifetimes_become_sysctls() -> None:
    """Unreplied and stream timers of UDP, and TCP's two."""
    lifetimes = Lifetimes(udp_seconds=90, udp_unreplied_seconds=20, tcp_seconds=1200)
    values = router_sysctls(router(lifetimes=lifetimes))
    assert values["netfilter/nf_conntrack_udp_timeout"] == "20"
    assert values["netfilter/nf_conntrack_udp_timeout_stream"] == "90"
    assert values["netfilter/nf_conntrack_tcp_timeout_established"] == "1200"
    assert values["netfilter/nf_conntrack_tcp_timeout_syn_sent"] == "240"


@pytest.mark.parametrize(
    "behavior",
    [
        {},
        {"filtering": Filtering.EIF},
        {"filtering": Filtering.ADF, "hairpin": Hairpin.EXTERNAL},
        {"mapping": Mapping.ADM, "ports": HASH},
        {"mapping": Mapping.APDM, "ports": RANDOM},
        {"translation": Translation.NONE},
        {"translation": Translation.ONE_TO_ONE, "filtering": Filtering.EIF},
    ],
)
def test_nftables_is_used_where_it_is_faithful(behavior: dict[str, object]) -> None:
    """The fidelity table's positive half."""
    assert choose_engine(NatBehavior(**behavior), 1).engine is Engine.NFT


@pytest.mark.parametrize(
    ("behavior", "reason"),
    [
        ({"mapping": Mapping.APDM, "ports": RANDOM, "filtering": Filtering.EIF}, "traverses wrong"),
        ({"mapping": Mapping.ADM}, "ADM with preserve-else-random"),
        ({"ports": PortAllocation(parity=True)}, "parity"),
        ({"ports": PortAllocation(block_size=512)}, "blocks"),
        ({"ports": RANDOM}, "in a range that inside ports are in"),
        ({"refresh": Refresh.OUTBOUND}, "inbound packets renew"),
        ({"lifetimes": Lifetimes(udp_seconds=0.5)}, "whole seconds"),
        ({"max_mappings_per_host": 5}, "limit"),
    ],
)
def test_the_user_engine_is_used_elsewhere_and_says_why(
    behavior: dict[str, object], reason: str
) -> None:
    """The fidelity table's negative half, with the reason for a person."""
    fidelity = choose_engine(NatBehavior(**behavior), 1)
    assert fidelity.engine is Engine.USER
    assert reason in "; ".join(fidelity.reasons)


def test_overloading_matters_from_the_second_inside_machine_on() -> None:
    """One machine never asks twice for one port; two may, and then the kernel overloads."""
    assert choose_engine(NatBehavior(), 2).engine is Engine.USER
    shared = NatBehavior(ports=PortAllocation(overloading=True))
    assert choose_engine(shared, 2).engine is Engine.NFT


def test_the_choice_can_be_overridden() -> None:
    """A scenario may insist on an engine; the reasons stay visible."""
    hard = NatBehavior(mapping=Mapping.APDM, ports=RANDOM, filtering=Filtering.EIF)
    wiring = plan_wiring(home(hard), engines={"n": Engine.NFT})
    assert wiring.user_nats == ()
    fidelity = wiring.machines["n"].fidelity
    assert fidelity is not None
    assert fidelity.reasons


def test_nat64_is_for_the_user_engine() -> None:
    """It gets the IPv4 in IPv6 of its inside; nftables is refused with the way out."""
    topology = home(NatBehavior(nat64=True, ipv6=Ipv6.ROUTED))
    (nat,) = plan_wiring(topology).user_nats
    assert nat.inside_mtu_bytes == 1520
    routes = plan_wiring(topology).machines["n"].routes
    assert "64:ff9b::/96" in [str(route.destination) for route in routes]
    with pytest.raises(ModelError, match=r'nat "n": nat64: .* use the engine "user"'):
        plan_wiring(topology, engines={"n": Engine.NFT})


def test_a_user_nats_router_never_sees_external_addresses() -> None:
    """What it forwards goes into the engine; the engine's uplink ends in the next network."""
    wiring = plan_wiring(home(NatBehavior()), engines={"n": Engine.USER})
    machine, external = wiring.machines["n"], wiring.addresses.nats["n"].outside.ipv4[0]
    (nat,) = wiring.user_nats
    assert all(address.ip != external for _, address in machine.addresses)
    defaults = [r for r in machine.routes if r.destination.prefixlen == 0]
    assert [route.index for route in defaults] == [nat.inside.index]
    outside = wiring.machines[INTERNET].routes
    to_nat = [r for r in outside if r.destination.network_address == external]
    assert [route.index for route in to_nat] == [nat.uplink.outer.index]
    assert nat.uplink.pumped


def test_interface_numbers_and_names_are_unique_in_a_machine() -> None:
    """Also with many cables in one namespace."""
    wiring = plan_wiring(home(NatBehavior(ports=PortAllocation(overloading=True)), hosts=40))
    for name in wiring.machines:
        ends = [e for c in wiring.cables for e in (c.outer, c.inner) if e.machine == name]
        assert len({end.name for end in ends}) == len({end.index for end in ends}) == len(ends)
        assert all(len(end.name) < 16 for end in ends)


def test_only_impaired_cables_are_pumped() -> None:
    """Plain links stay veth pairs; a smaller MTU alone doesn't need the pump."""
    impaired = Link(delay_seconds=0.01)
    topology = Topology(
        hosts=(
            Host(name="far", uplinks=(Uplink(link=impaired),)),
            Host(name="near", uplinks=(Uplink(link=Link(mtu_bytes=1280)),)),
        )
    )
    wiring = plan_wiring(topology)
    assert {cable.owner: (cable.pumped, cable.mtu_bytes) for cable in wiring.cables} == {
        "far": (True, 1500),
        "near": (False, 1280),
    }
    assert is_impaired(Link(mtu_bytes=1280, mtu_black_hole=True))


def test_the_internet_reaches_every_external_address() -> None:
    """The core has a route to each machine on it, and what nobody has vanishes."""
    wiring = plan_wiring(home(NatBehavior(addresses=3)))
    core = {
        route.destination.with_prefixlen: route.index for route in wiring.machines[INTERNET].routes
    }
    for address in wiring.addresses.nats["n"].outside.ipv4:
        assert core[f"{address}/32"] is not None
    assert core["0.0.0.0/0"] is None
