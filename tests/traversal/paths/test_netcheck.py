"""Probe plans, home relay choice and the net check's report against the specification's tables."""

from __future__ import annotations

import ipaddress
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.kept import count_kept
from traversal.paths.home import HomeChooser, HomePolicy
from traversal.paths.probe_plan import LastReport, Probe, make_initial_plan, make_plan
from traversal.paths.report import (
    PortAllocation,
    PortPattern,
    Report,
    classify_filtering,
    classify_mapping,
    classify_ports,
    is_behind_another_nat,
    wants_full_report,
)
from traversal.relay_map import Dial, Region, RelayMap, RelayNode
from traversal.wire.address import Address
from traversal.wire.introduction import FilteringClass, MappingClass

BOTH = frozenset({4, 6})


def make_region(number: int, nodes: int, **options) -> Region:
    names = [f"{number}{'abcde'[i]}" for i in range(nodes)]
    return Region(
        number,
        f"r{number}",
        f"Region {number}",
        tuple(RelayNode(name, number, f"{name}.example.com") for name in names),
        **options,
    )


def make_map(*regions: Region) -> RelayMap:
    return RelayMap({region.region_id: region for region in regions})


def table(plan) -> dict[str, str]:
    """A plan as the specification writes it: {"region-1-v4": "a@0 a@12"}."""
    return {
        f"region-{region}-v{family}": " ".join(
            f"{p.node.name[-1]}@{round(p.delay_seconds * 1000)}" for p in probes
        )
        for (region, family), probes in plan.items()
    }


FIVE = make_map(*(make_region(n, n) for n in range(1, 6)))


def last_report(**first: float) -> LastReport:
    latencies = {1: 0.01, 2: 0.02, 3: 0.03, 4: 0.04}
    latencies |= {int(k[1:]): v for k, v in first.items()}
    return LastReport(latencies, {1: 0.01, 2: 0.02}, {3: 0.03, 4: 0.04})


class TestProbePlan:
    """Netcheck specification 5."""

    def test_initial(self):
        """Three tries per family at 0, 100, 200 ms, rotating over the nodes."""
        plan = table(make_initial_plan(make_map(make_region(1, 2), make_region(2, 3)), BOTH))
        assert plan == {
            "region-1-v4": "a@0 b@100 a@200",
            "region-1-v6": "a@0 b@100 a@200",
            "region-2-v4": "a@0 b@100 c@200",
            "region-2-v6": "a@0 b@100 c@200",
        }

    def test_worked_plan(self):
        """The specification's worked incremental plan."""
        assert table(make_plan(FIVE, BOTH, last_report(), home=1)) == {
            "region-1-v4": "a@0 a@12 a@124 a@186",
            "region-1-v6": "a@0 a@12 a@124 a@186",
            "region-2-v4": "a@0 b@24",
            "region-2-v6": "a@0 b@24",
            "region-3-v4": "a@0",
        }

    def test_worked_plan_with_slow_home(self):
        """The same with the home at 50 ms: it is asked in addition."""
        assert table(make_plan(FIVE, BOTH, last_report(r1=0.05), home=1)) == {
            "region-2-v4": "a@0 b@24",
            "region-2-v6": "a@0 b@24",
            "region-3-v4": "a@0 b@36",
            "region-3-v6": "a@0 b@36",
            "region-4-v4": "a@0",
            "region-1-v4": "a@0 a@60 a@220 a@330",
            "region-1-v6": "a@0 a@60 a@220 a@330",
        }

    def test_without_latencies_the_plan_is_initial(self):
        """Nothing to build on means the initial plan."""
        empty = LastReport({}, {}, {})
        assert make_plan(FIVE, BOTH, empty, 1) == make_initial_plan(FIVE, BOTH)
        assert make_plan(FIVE, BOTH, None, 1) == make_initial_plan(FIVE, BOTH)

    def test_ipv6_that_did_not_work_is_asked_once(self):
        """No IPv6 last time: one try at the fastest two and home, none further down."""
        last = LastReport({1: 0.01, 2: 0.02, 3: 0.03}, {1: 0.01}, {})
        plan = table(make_plan(FIVE, BOTH, last, home=1))
        assert plan["region-1-v6"] == plan["region-2-v6"] == "a@0"
        assert "region-3-v6" not in plan

    def test_avoided_and_unmeasured_regions(self):
        """NoMeasureNoHome is never asked; Avoid only in the first report or while it is home."""
        regions = make_map(
            make_region(1, 1, avoid=True),
            make_region(2, 1, no_measure_no_home=True),
            make_region(3, 1),
        )
        last = LastReport({1: 0.01, 3: 0.03}, {1: 0.01}, {})
        four = frozenset({4})
        assert set(table(make_plan(regions, four, last, home=3))) == {"region-3-v4"}
        assert set(table(make_plan(regions, four, last, home=1))) == {"region-1-v4", "region-3-v4"}
        assert set(table(make_initial_plan(regions, four))) == {"region-1-v4", "region-3-v4"}

    def test_families_of_nodes(self):
        """A node without an address of a family, or without STUN, is not asked over it."""
        four_only = RelayNode("1a", 1, "a.example.com", ipv6=Dial.NEVER)
        no_stun = RelayNode("1b", 1, "b.example.com", stun_port=None)
        region = Region(1, "one", "One", (four_only, no_stun))
        assert table(make_initial_plan(make_map(region), BOTH)) == {
            "region-1-v4": "a@0 a@100 a@200"
        }


def ms(value: float) -> float:
    return value / 1000


HOME_CASES = {
    "first reading": ([{1: 2, 2: 3}], 1),
    "history wins": ([{1: 2, 2: 3}, {1: 4, 2: 3}], 1),
    "old gone": ([{1: 2, 2: 3}, {1: 4, 2: 3}, {2: 3}], 2),
    "back": ([{1: 2, 2: 3}, {1: 4, 2: 3}, {2: 3}, {1: 4, 2: 3}], 1),
    "history expires": ([{1: 2, 2: 3}, {1: 4, 2: 3}, 600, {3: 3}], 3),
    "not enough better": ([{1: 4, 2: 5}, {1: 4, 2: 3}], 1),
    "absolute threshold": ([{1: ms(4), 2: ms(5)}, {1: ms(4), 2: ms(1)}], 1),
    "switch": ([{1: 4, 2: 5}, {1: 4, 2: 1}], 2),
    "percent threshold": ([{1: ms(34), 2: ms(35)}, {1: ms(34), 2: ms(23)}], 1),
}


class TestHome:
    """Netcheck specification 8."""

    @pytest.mark.parametrize("name", HOME_CASES)
    def test_decision_table(self, name):
        """The specification's steps lead to its result."""
        steps, expected = HOME_CASES[name]
        chooser, now = HomeChooser(), 0.0
        for step in steps:
            if isinstance(step, int):
                now += step
                continue
            now += 10
            chooser.handle_report(step, {}, now - 1, now)
        assert chooser.home == expected

    @pytest.mark.parametrize(
        ("scores", "latencies", "expected"),
        [
            ({1: 2 / 3}, {1: 10, 2: 8}, 1),
            ({1: 2 / 3}, {1: 100, 2: 10}, 2),
            ({1: 0, 2: -1}, {1: 4, 2: 5}, 1),
        ],
    )
    def test_scores(self, scores, latencies, expected):
        """Scores multiply latency; those of 0 and below are ignored."""
        assert HomeChooser(scores=scores).handle_report(latencies, {}, 0.0, 1.0) == expected

    def test_a_network_that_flaps_costs_no_memory(self):
        """However many reports it makes within the five minutes."""
        chooser, most = HomeChooser(), 0
        for number in range(1000):
            chooser.handle_report({1: 2, 2: 3}, {}, number / 10, number / 10 + 0.05)
            most = max(most, count_kept(chooser))
        assert most < 100

    @pytest.mark.parametrize(("age", "expected"), [(7.9, 1), (8.1, 2)])
    def test_relay_traffic_keeps_the_home(self, age, expected):
        """Hearing the old home's relay within 8 s keeps it though it answered no probe."""
        chooser = HomeChooser()
        chooser.handle_report({1: 2, 2: 3}, {}, 0.0, 1.0)
        assert chooser.handle_report({2: 3}, {1: 100.0 - age}, 99.0, 100.0) == expected

    def test_traffic_since_the_start_counts(self):
        """A frame after the report began counts, however long the report took."""
        chooser = HomeChooser()
        chooser.handle_report({1: 2, 2: 3}, {}, 0.0, 1.0)
        assert chooser.handle_report({2: 3}, {1: 90.5}, 90.0, 100.0) == 1

    @pytest.mark.parametrize(
        ("latencies", "heard", "expected"),
        [({1: 1, 2: 9}, {}, 2), ({1: 1}, {}, 1), ({1: 1}, {2: 99.0}, 2)],
    )
    def test_pinned(self, latencies, heard, expected):
        """A pinned region is home when it answers or its relay is heard."""
        chooser = HomeChooser(HomePolicy(pinned=2))
        assert chooser.handle_report(latencies, heard, 99.5, 100.0) == expected

    def test_banned(self):
        """A banned region is never home, also when it was."""
        chooser = HomeChooser(HomePolicy(banned=frozenset({1})))
        assert chooser.handle_report({1: 0.001, 2: 9}, {1: 100.0}, 99.0, 100.0) == 2

    @pytest.mark.parametrize(("age", "expected"), [(120, 1), (121, 0)])
    def test_no_data(self, age, expected):
        """With no answer at all the home is kept if heard within 120 s."""
        chooser = HomeChooser()
        chooser.handle_report({1: 2}, {}, 0.0, 1.0)
        assert chooser.handle_report({}, {1: 500.0 - age}, 499.0, 500.0) == expected


S1, S2 = Address("192.0.2.1", 3478), Address("192.0.2.2", 3478)
M1, M2 = Address("203.0.113.7", 1000), Address("203.0.113.7", 1001)
LOCAL = Address("10.0.0.5", 41641)


class TestReport:
    """Netcheck specification 7."""

    @pytest.mark.parametrize(
        ("answers", "varies"),
        [
            ([], None),
            ([(S1, M1)], None),
            ([(S1, M1), (S1, M1)], None),
            ([(S1, M1), (S2, M1)], False),
            ([(S1, M1), (S2, M2)], True),
            ([(S1, M1), (S1, M2)], True),
            ([(S1, M1), (S2, M2), (S2, M1)], True),
        ],
    )
    def test_mapping_needs_two_servers(self, answers, varies):
        """ "Does not vary" takes two servers; "varies" is never taken back."""
        report = Report(0.0)
        for server, reflexive in answers:
            report.handle_stun_answer(1, server, reflexive, 0.02)
        assert report.mapping_varies is varies
        facts = report.nat_facts(LOCAL)
        assert facts.is_hard is bool(varies)
        assert facts.is_offline is not bool(answers)
        assert not facts.is_udp_blocked

    def test_blocked_is_not_offline(self):
        """Only a relay that answers by HTTPS shows that UDP is blocked."""
        report = Report(0.0)
        assert not report.nat_facts(LOCAL).is_udp_blocked
        report.handle_latency(1, 0.02)
        assert report.nat_facts(LOCAL).is_udp_blocked
        assert not report.nat_facts(LOCAL).is_offline

    def test_no_nat(self):
        """A reflexive address equal to our own means that there is no NAT."""
        report = Report(0.0)
        report.handle_stun_answer(1, S1, LOCAL, 0.02)
        assert report.nat_facts(LOCAL).mapping is MappingClass.NONE

    def test_latency_is_the_least(self):
        """Of all answers of a region, over either family and HTTPS, the fastest counts."""
        report = Report(0.0)
        report.handle_stun_answer(1, S1, M1, 0.03)
        report.handle_stun_answer(1, S1, Address("2001:db8::7", 9), 0.02)
        report.handle_latency(1, 0.05)
        assert report.latencies == {1: 0.02}
        assert report.v4_latencies == {1: 0.03}
        assert report.v6_latencies == {1: 0.02}

    def test_advertised_addresses(self):
        """The first of each family, then those seen more than once."""
        report = Report(0.0)
        six = [Address("2001:db8::7", port) for port in (1, 2)]
        for reflexive in (M1, M2, M2, *six, Address("203.0.113.8", 5)):
            report.handle_stun_answer(1, S1, reflexive, 0.02)
        assert report.reflexive_addresses() == [M1, M2, six[0]]

    def test_whether_a_probe_would_help(self):
        """Only what is still unknown is asked."""
        four = Probe(0.0, make_region(1, 1).nodes[0], 4)
        six = Probe(0.0, make_region(1, 1).nodes[0], 6)
        report = Report(0.0)
        assert report.would_help(four)
        report.handle_stun_answer(1, S1, M1, 0.02)
        assert report.would_help(four)
        assert report.would_help(six)
        report.handle_stun_answer(1, S2, M1, 0.02)
        assert not report.would_help(four)
        report.handle_stun_answer(1, S1, Address("2001:db8::7", 9), 0.02)
        assert not report.would_help(six)

    def test_stop_timer(self):
        """After three regions: the slowest so far, twice that in a full report."""
        report = Report(0.0)
        for region in (1, 2):
            report.handle_stun_answer(region, S1, M1, region / 10)
        assert report.stop_after_seconds() is None
        report.handle_stun_answer(3, S1, M1, 0.05)
        assert report.stop_after_seconds() == 0.4
        report.is_full = False
        assert report.stop_after_seconds() == 0.2

    def test_families_that_can_send(self):
        """A packet handed to the kernel marks its family, a refused one does not."""
        report = Report(0.0)
        report.handle_sent(Probe(0.0, make_region(1, 1).nodes[0], 6), was_handed_over=True)
        report.handle_sent(Probe(0.0, make_region(1, 1).nodes[0], 4), was_handed_over=False)
        assert (report.ipv4_can_send, report.ipv6_can_send) == (False, True)

    def test_when_a_full_report_is_due(self):
        """At first, every five minutes, without results, and behind a captive portal."""
        report = Report(0.0)
        assert wants_full_report(None, 0.0, 1.0)
        assert wants_full_report(report, 0.0, 1.0)
        report.handle_latency(1, 0.1)
        report.is_udp_working = True
        assert not wants_full_report(report, 0.0, 299.0)
        assert wants_full_report(report, 0.0, 301.0)
        report.is_udp_working, report.captive_portal = False, True
        assert wants_full_report(report, 0.0, 1.0)

    def test_reflexive_addresses_are_bounded(self):
        """A network that shows a new address per answer fills a bounded table."""
        report = Report(0.0)
        for port in range(1, 1000):
            report.handle_stun_answer(1, S1, Address("203.0.113.7", port), 0.02)
        assert len(report.global_v4) == 32

    def test_gateway_behind_another_nat(self):
        """Private and shared external addresses tell of a second NAT."""
        for text, expected in (("192.168.0.1", True), ("100.64.0.1", True), ("8.8.8.8", False)):
            assert is_behind_another_nat(ipaddress.IPv4Address(text)) is expected


@pytest.mark.parametrize(
    ("first", "second", "third", "expected"),
    [
        (LOCAL, None, None, MappingClass.NONE),
        (M1, None, None, MappingClass.UNKNOWN),
        (M1, M1, None, MappingClass.ENDPOINT_INDEPENDENT),
        (M1, M2, None, MappingClass.UNKNOWN),
        (M1, M2, M2, MappingClass.ADDRESS_DEPENDENT),
        (M1, M2, Address("203.0.113.7", 5), MappingClass.ADDRESS_AND_PORT_DEPENDENT),
    ],
)
def test_rfc_5780_mapping(first, second, third, expected):
    """RFC 5780 section 4.3."""
    assert classify_mapping(LOCAL, first, second, third) is expected


@pytest.mark.parametrize(
    ("natted", "both", "port", "expected"),
    [
        (True, True, None, FilteringClass.ENDPOINT_INDEPENDENT),
        (False, True, None, FilteringClass.OPEN),
        (True, False, True, FilteringClass.ADDRESS_DEPENDENT),
        (True, False, False, FilteringClass.ADDRESS_AND_PORT_DEPENDENT),
        (True, False, None, FilteringClass.UNKNOWN),
    ],
)
def test_rfc_5780_filtering(natted, both, port, expected):
    """RFC 5780 section 4.4."""
    result = classify_filtering(is_natted=natted, from_other_ip_and_port=both, from_other_port=port)
    assert result is expected


class TestPortPattern:
    """Port preserving, sequential with its step, random."""

    @given(st.integers(0, 2**32), st.sampled_from([1, 2, 4, 8, -1, -2]), st.integers(0, 65535))
    def test_sequential(self, seed, step, start):
        """The step is found though a quarter of the ports went to other flows."""
        rng = random.Random(seed)
        port, samples = start, []
        skips = [1] * 9 + [rng.choice((2, 3))] * 3
        rng.shuffle(skips)
        for skip in skips:
            samples.append((40000, port))
            port = (port + step * skip) % 65536
        assert classify_ports(samples) == PortAllocation(PortPattern.SEQUENTIAL, step)

    @given(st.integers(0, 2**32))
    def test_random(self, seed):
        """Random ports are called random."""
        rng = random.Random(seed)
        samples = [(40000, rng.randrange(1024, 65536)) for _ in range(10)]
        assert classify_ports(samples) == PortAllocation(PortPattern.RANDOM)

    def test_preserving(self):
        """Preserved ports, one collision allowed."""
        samples = [(40000 + i, 40000 + i) for i in range(4)] + [(40009, 1024)]
        assert classify_ports(samples) == PortAllocation(PortPattern.PRESERVING)

    def test_too_few_samples(self):
        """Three ports say nothing; the same port every time neither."""
        assert classify_ports([(1, 2), (1, 3), (1, 4)]).pattern is PortPattern.UNKNOWN
        assert classify_ports([(1, 2)] * 9).pattern is PortPattern.UNKNOWN


def test_home_that_restarts() -> None:
    """The best other region is the home for a minute, a pin notwithstanding; alone, it stays."""
    pinned = HomeChooser(HomePolicy(pinned=1))
    for chooser in (HomeChooser(), pinned):
        assert chooser.handle_report({1: 0.01, 2: 0.05, 3: 0.04}, {}, 0.0, 0.0) == 1
        assert chooser.leave(2, 1.0) == 1
        assert chooser.leave(1, 2.0) == 3
        assert chooser.handle_report({1: 0.01, 2: 0.05, 3: 0.04}, {1: 59.0}, 60.0, 60.0) == 3
        assert chooser.handle_report({1: 0.01, 2: 0.05, 3: 0.04}, {}, 63.0, 63.0) == 1
    alone = HomeChooser()
    assert alone.handle_report({1: 0.01}, {}, 0.0, 0.0) == 1
    assert alone.leave(1, 1.0) == 1
    assert alone.handle_report({1: 0.01}, {}, 2.0, 2.0) == 1
    assert alone.handle_report({1: 0.01, 2: 0.5}, {1: 3.0}, 3.0, 3.0) == 2
