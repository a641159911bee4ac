"""The topology and its address plan."""

from __future__ import annotations

from ipaddress import IPv4Network, IPv6Network

import pytest

from netlab.addresses import plan_addresses
from netlab.model import (
    Host,
    Ipv6,
    Lifetimes,
    Link,
    ModelError,
    Nat,
    NatBehavior,
    PortAllocation,
    PortRange,
    Server,
    Topology,
    Translation,
    Uplink,
)


def behind(network: str) -> tuple[Uplink, ...]:
    return (Uplink(network=network),)


def double_nat(seed: int = 1) -> Topology:
    return Topology(
        hosts=(Host(name="a", uplinks=behind("home")), Host(name="public")),
        servers=(Server(name="stun", addresses=3),),
        nats=(
            Nat(name="home", uplink=Uplink(network="cgn")),
            Nat(name="cgn", behavior=NatBehavior(carrier=True, addresses=2)),
        ),
        seed=seed,
    )


class TestTopology:
    def test_unknown_network_suggests_the_nearest(self) -> None:
        """A misspelt uplink names the object, the field and the nearest network."""
        with pytest.raises(ModelError) as caught:
            Topology(hosts=(Host(name="a", uplinks=behind("hme")),), nats=(Nat(name="home"),))
        assert str(caught.value) == (
            'host "a": uplinks[0].network: there is no network "hme"; did you mean "home"?'
        )

    def test_one_name_is_one_object(self) -> None:
        """Hosts, servers, NATs and the internet share one space of names."""
        with pytest.raises(ModelError, match='host "x": name: a server already has this name'):
            Topology(hosts=(Host(name="x"),), servers=(Server(name="x"),))
        with pytest.raises(ModelError, match="a network already has this name"):
            Topology(hosts=(Host(name="internet"),))

    def test_loop_of_nats(self) -> None:
        """NATs that lead to each other are refused, with the loop in the message."""
        with pytest.raises(ModelError, match="never reaches the internet: a -> b -> a"):
            Topology(
                nats=(
                    Nat(name="a", uplink=Uplink(network="b")),
                    Nat(name="b", uplink=Uplink(network="a")),
                )
            )

    def test_ipv6_needs_a_routing_uplink(self) -> None:
        """A NAT cannot have IPv6 where the network around it has none."""
        with pytest.raises(ModelError, match="needs an uplink that routes IPv6"):
            Topology(
                nats=(
                    Nat(name="cgn"),
                    Nat(
                        name="home",
                        uplink=Uplink(network="cgn"),
                        behavior=NatBehavior(ipv6=Ipv6.ROUTED),
                    ),
                )
            )

    def test_crossed_nats_in_order(self) -> None:
        """The way to the internet lists the innermost NAT first."""
        names = [nat.name for nat in double_nat().nats_towards_internet("home")]
        assert names == ["home", "cgn"]
        assert [nat.name for nat in double_nat().nats_outermost_first()] == ["cgn", "home"]


@pytest.mark.parametrize(
    "make",
    [
        lambda: PortRange(5, 4),
        lambda: PortAllocation(step=0),
        lambda: PortAllocation(ranges=()),
        lambda: PortAllocation(block_size=70_000),
        lambda: Lifetimes(udp_seconds=0),
        lambda: Link(loss=1.5),
        lambda: Link(mtu_bytes=10),
        lambda: NatBehavior(addresses=0),
        lambda: NatBehavior(nat64=True),
    ],
)
def test_records_refuse_nonsense(make: object) -> None:
    """Values without a meaning do not survive construction."""
    assert callable(make)
    with pytest.raises(ModelError):
        make()


class TestAddressPlan:
    def test_follows_the_numbering_plan(self) -> None:
        """Each kind of network uses its own global-looking or carrier range."""
        plan = plan_addresses(double_nat())
        assert all(a in IPv4Network("2.0.0.0/16") for a in plan.servers["stun"].ipv4)
        assert len(set(plan.servers["stun"].ipv4)) == 3
        assert all(a in IPv4Network("2.1.0.0/16") for a in plan.nats["cgn"].outside.ipv4)
        assert len(plan.nats["cgn"].outside.ipv4) == 2
        assert plan.nats["home"].outside.ipv4[0] in IPv4Network("100.64.0.0/10")
        (a,) = plan.hosts["a"]
        assert a.ipv4[0] in IPv4Network("192.168.0.0/16")
        assert a.ipv4[0] in (plan.nats["home"].inside_ipv4 or ())
        assert a.ipv4[0] != plan.nats["home"].gateway_ipv4
        (public,) = plan.hosts["public"]
        assert public.ipv4[0] in IPv4Network("2.1.0.0/16")
        assert public.ipv6[0] in IPv6Network("2a0f:1::/32")

    def test_is_seeded(self) -> None:
        """The same seed gives the same plan, another seed another one."""
        assert plan_addresses(double_nat(1)) == plan_addresses(double_nat(1))
        assert plan_addresses(double_nat(1)) != plan_addresses(double_nat(2))

    def test_no_address_twice(self) -> None:
        """A thousand homes on one operator all have their own external address."""
        topology = Topology(nats=tuple(Nat(name=f"n{i}") for i in range(1000)))
        plan = plan_addresses(topology)
        outside = {nat.outside.ipv4 for nat in plan.nats.values()}
        assert len(outside) == 1000
        assert len({nat.inside_ipv4 for nat in plan.nats.values()}) == 256

    def test_full_lan_is_an_error(self) -> None:
        """A home LAN holds 253 hosts; the 254th is named."""
        hosts = tuple(Host(name=f"h{i}", uplinks=behind("home")) for i in range(254))
        with pytest.raises(ModelError, match=r'host "h253": network "home" .* no address left'):
            plan_addresses(Topology(hosts=hosts, nats=(Nat(name="home"),)))

    def test_one_to_one_has_an_address_per_host(self) -> None:
        """A one-to-one NAT owns as many external addresses as it has inside machines."""
        hosts = tuple(Host(name=f"h{i}", uplinks=behind("cloud")) for i in range(3))
        nat = Nat(name="cloud", behavior=NatBehavior(translation=Translation.ONE_TO_ONE))
        plan = plan_addresses(Topology(hosts=hosts, nats=(nat,)))
        assert len(plan.nats["cloud"].outside.ipv4) == 3

    @pytest.mark.parametrize("mode", list(Ipv6))
    def test_ipv6_prefixes(self, mode: Ipv6) -> None:
        """Routed and NPT sites have a delegated prefix; NPT and NAT66 number inside privately."""
        nat = Nat(name="home", behavior=NatBehavior(ipv6=mode))
        topology = Topology(hosts=(Host(name="a", uplinks=behind("home")),), nats=(nat,))
        plan = plan_addresses(topology)
        (interface,) = plan.hosts["a"]
        home = plan.nats["home"]
        assert bool(interface.ipv6) == (mode is not Ipv6.NONE)
        assert (home.external_ipv6 is not None) == (mode in (Ipv6.ROUTED, Ipv6.NPT))
        if interface.ipv6:
            private = interface.ipv6[0] in IPv6Network("fd00::/8")
            assert private == (mode in (Ipv6.NPT, Ipv6.NAT66))
