"""Which STUN servers a net check asks, when, over which family: netcheck specification 5.

A pure function of the relay map, the host's families, the last report and the home region. Each
set of probes runs beside the others; within a set the first answer ends the rest.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from traversal.relay_map import Dial, Family, Region, RelayMap, RelayNode

INITIAL_STEP_SECONDS: Final = 0.1
INITIAL_TRIES: Final = 3
UNKNOWN_LATENCY_SECONDS: Final = 0.2
LATENCY_FACTOR: Final = 1.2
LATE_STEP_SECONDS: Final = 0.05
INCREMENTAL_REGIONS: Final = 3
HOME_TRIES: Final = 4
FAST_TRIES: Final = 2
FAST_REGIONS: Final = 2


@dataclass(frozen=True, slots=True)
class Probe:
    """One STUN request: to `node`, `delay_seconds` after the start."""

    delay_seconds: float
    node: RelayNode
    family: Family


@dataclass(frozen=True, slots=True)
class LastReport:
    """What the plan needs of the last report: each region's latency, whole and by family."""

    latencies: Mapping[int, float]
    v4_latencies: Mapping[int, float]
    v6_latencies: Mapping[int, float]


Plan = dict[tuple[int, Family], list[Probe]]
"""Probes by region ID and family."""


def make_plan(
    relay_map: RelayMap, families: frozenset[Family], last: LastReport | None, home: int
) -> Plan:
    """The incremental plan, or the initial one when there is nothing to build on.

    `families` are those of which the host has an address; `home` is a region ID or 0.
    """
    if last is None or not last.latencies:
        return make_initial_plan(relay_map, families)
    plan: Plan = {}
    # Whether a family works at all is a matter of this host, not of one region.
    had_v4, had_v6 = bool(last.v4_latencies), bool(last.v6_latencies)
    for position, region in enumerate(_choose_regions(relay_map, last, home)):
        use: dict[Family, bool] = {4: 4 in families, 6: 6 in families}
        tries = 1
        if region.region_id == home:
            tries = HOME_TRIES
        elif position < FAST_REGIONS:
            tries = FAST_TRIES
        elif had_v4 and had_v6:
            use = {4: use[4] and position % 2 == 0, 6: use[6] and position % 2 == 1}
        elif not had_v6:
            use[6] = False
        latency = last.latencies.get(region.region_id, UNKNOWN_LATENCY_SECONDS)
        for family, is_used in use.items():
            # A family that did not work last time is asked once, in case it does now.
            family_tries = tries if family == 4 or had_v6 else min(tries, 1)
            delays = [_incremental_delay(latency, i) for i in range(family_tries)]
            if is_used:
                _add(plan, region, family, delays)
    return plan


def make_initial_plan(relay_map: RelayMap, families: frozenset[Family]) -> Plan:
    """Every region that is measured, three tries per family."""
    plan: Plan = {}
    for region in relay_map.regions.values():
        if region.no_measure_no_home:
            continue
        for family in sorted(families):
            _add(plan, region, family, [i * INITIAL_STEP_SECONDS for i in range(INITIAL_TRIES)])
    return plan


def _choose_regions(relay_map: RelayMap, last: LastReport, home: int) -> list[Region]:
    measured = [
        region
        for region in relay_map.regions.values()
        if not region.no_measure_no_home and (not region.avoid or region.region_id == home)
    ]
    measured.sort(key=lambda region: last.latencies.get(region.region_id, math.inf))
    chosen = measured[:INCREMENTAL_REGIONS]
    chosen += [region for region in measured[INCREMENTAL_REGIONS:] if region.region_id == home]
    return chosen


def _incremental_delay(latency_seconds: float, attempt: int) -> float:
    late = attempt * LATE_STEP_SECONDS if attempt >= 2 else 0.0
    return attempt * LATENCY_FACTOR * latency_seconds + late


def _add(plan: Plan, region: Region, family: Family, delays: list[float]) -> None:
    nodes = [n for n in region.nodes if n.stun_dial_address(family) is not Dial.NEVER]
    if nodes:
        plan[region.region_id, family] = [
            Probe(delay, nodes[i % len(nodes)], family) for i, delay in enumerate(delays)
        ]
