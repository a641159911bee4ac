"""What punching should come to, for chains of NATs, shared NATs and firewalls."""

from __future__ import annotations

import pytest

from netlab.behavior import Filtering, Firewall, Hairpin, Mapping, ModelError, NatBehavior, Pooling
from netlab.model import Host, Nat, Server, Topology, Uplink
from netlab.prediction import combined_class, predict_outcome, simple_path
from netlab.presets import class_behavior

SYMMETRIC = class_behavior("APDM+APDF")
HOME = class_behavior("EIM+APDF")


def lab(cgn: NatBehavior) -> Topology:
    """Two homes behind one carrier NAT, one home elsewhere, one public host."""
    nats = [Nat(name="cgn", behavior=cgn)]
    nats += [Nat(name=f"home{i}", behavior=HOME, uplink=Uplink(network="cgn")) for i in (1, 2)]
    nats.append(Nat(name="away", behavior=HOME))
    hosts = [Host(name=f"h-{n.name}", uplinks=(Uplink(network=n.name),)) for n in nats[1:]]
    hosts.append(Host(name="public"))
    return Topology(nats=tuple(nats), hosts=tuple(hosts), servers=(Server(name="s"),))


def test_chains_take_the_worst_of_each_axis() -> None:
    """The most dependent mapping and the most restrictive filtering."""
    assert combined_class([]) == "EIM+EIF"
    chain = [class_behavior("EIM+APDF"), class_behavior("APDM+EIF")]
    assert combined_class(chain) == "APDM+APDF"


def test_an_arbitrary_address_is_one_more_thing_to_depend_on() -> None:
    """Where mappings depend on the destination, no peer knows the next one's address either; one
    mapping for all destinations stays one."""
    pool = {"addresses": 4, "pooling": Pooling.ARBITRARY, "filtering": Filtering.ADF}
    assert combined_class([NatBehavior(mapping=Mapping.EIM, **pool)]) == "EIM+ADF"
    assert combined_class([NatBehavior(mapping=Mapping.ADM, **pool)]) == "APDM+APDF"


def test_a_symmetric_carrier_makes_an_easy_home_hard() -> None:
    """An easy home meets another easy home directly, unless a hard carrier is in between."""
    topology = lab(SYMMETRIC)
    assert simple_path(predict_outcome(topology, "h-home1", "h-away")) == "relay"
    assert simple_path(predict_outcome(topology, "public", "h-home1")) == "direct"
    assert simple_path(predict_outcome(topology, "s", "away")) == "direct"


def test_subscribers_of_one_carrier_need_its_hairpin() -> None:
    """Two homes behind one carrier NAT reach each other only if it hairpins."""
    eif = {"mapping": Mapping.EIM, "filtering": Filtering.EIF}
    with_hairpin = lab(NatBehavior(**eif, hairpin=Hairpin.EXTERNAL))
    without = lab(NatBehavior(**eif))
    assert simple_path(predict_outcome(with_hairpin, "h-home1", "h-home2")) == "direct"
    assert simple_path(predict_outcome(without, "h-home1", "h-home2")) == "relay"


def test_blocked_udp_needs_the_relay() -> None:
    """Whatever the other side is."""
    topology = lab(NatBehavior(firewall=Firewall(udp_ports=())))
    assert simple_path(predict_outcome(topology, "h-home1", "public")) == "relay"


def test_unknown_names_are_refused() -> None:
    """With the nearest known name."""
    with pytest.raises(ModelError, match='did you mean "home1"'):
        predict_outcome(lab(HOME), "hom1", "away")
