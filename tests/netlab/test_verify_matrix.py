"""`verify` and `matrix` in simulation: everything as claimed, and lies found."""

from __future__ import annotations

import re

import pytest
from trio.testing import MockClock

from netlab.labs import BackEnd
from netlab.matrix import ProgramPair, run_matrix
from netlab.matrix_report import render_matrix
from netlab.model import Host, Nat, Topology, Uplink
from netlab.presets import class_behavior
from netlab.punch import CLASSES
from netlab.verify import Target, all_targets, scenario_targets, verify


async def test_everything_measures_as_claimed(autojump_clock: MockClock) -> None:
    """The nine classes and every preset, lifetimes and refresh included."""
    findings = await verify(all_targets(), BackEnd.SIMULATED)
    assert [finding for finding in findings if not finding.agrees or finding.skipped] == []
    assert len(findings) > 20


async def test_a_false_claim_is_found(autojump_clock: MockClock) -> None:
    """A NAT that claims another class is named with what was measured."""
    lie = Target(name="lie", chain=(class_behavior("APDM+APDF"),), claims="EIM+EIF")
    (finding,) = await verify([lie], BackEnd.SIMULATED)
    assert not finding.agrees
    assert finding.measured == "APDM+APDF"
    assert "claims EIM+EIF" in finding.disagreements[0]


async def test_a_scenario_is_measured_through_all_of_its_nats(autojump_clock: MockClock) -> None:
    """An inner NAT is judged together with those that it is behind."""
    topology = Topology(
        nats=(
            Nat(name="cgn", behavior=class_behavior("APDM+EIF")),
            Nat(name="home", behavior=class_behavior("EIM+ADF"), uplink=Uplink(network="cgn")),
        ),
        hosts=(Host(name="a", uplinks=(Uplink(network="home"),)),),
    )
    findings = await verify(scenario_targets(topology), BackEnd.SIMULATED)
    assert [(f.name, f.measured, f.agrees) for f in findings] == [
        ("cgn", "APDM+EIF", True),
        ("home", "APDM+ADF", True),
    ]


async def test_punching_over_all_pairs_fits_the_table(autojump_clock: MockClock) -> None:
    """81 pairs of the nine classes, none differently."""
    result = await run_matrix(CLASSES, CLASSES, BackEnd.SIMULATED)
    assert [cell for cell in result.cells if not cell.agrees] == []
    assert sum(cell.path == "direct" for cell in result.cells) == 45
    page = render_matrix(result)
    assert page.count("<td") == 81
    assert 'wrong" title' not in page


async def test_a_pair_of_programs_over_some_pairs(autojump_clock: MockClock) -> None:
    """The example node as the program of both sides: direct where punching is, else relay."""
    pair = ProgramPair(
        left="netlab.node:node l${cell} r${cell} ${server.address}",
        right="netlab.node:node r${cell} l${cell} ${server.address}",
        ready=re.compile("^ready"),
        direct=re.compile(r"^path \S+ direct"),
        relay=re.compile(r"^path \S+ relay"),
        timeout_seconds=5,
    )
    result = await run_matrix(
        ["home/linux", "home/restricted"], ["office/pf", "EIM+EIF"], BackEnd.SIMULATED, pair=pair
    )
    assert [(cell.path, cell.agrees) for cell in result.cells] == [
        ("relay", True),
        ("direct", True),
        ("direct", True),
        ("direct", True),
    ]


async def test_a_pair_that_tells_nothing_is_explained(autojump_clock: MockClock) -> None:
    """The cell says what was waited for and what the programs said last."""
    node = "netlab.node:node a b ${server.address}"
    never = re.compile("never")
    pair = ProgramPair(
        left=node, right=node, ready=never, direct=never, relay=never, timeout_seconds=2
    )
    result = await run_matrix(["EIM+EIF"], ["EIM+EIF"], BackEnd.SIMULATED, pair=pair)
    assert result.cells[0].path == "none"
    assert result.cells[0].problem.startswith("the left program never got ready; the last line")


@pytest.mark.parametrize("name", ["mobile/nat64"])
async def test_what_cannot_be_built_is_refused(name: str, autojump_clock: MockClock) -> None:
    """With the reason."""
    with pytest.raises(ValueError, match="IPv6-only"):
        await run_matrix([name], ["EIM+EIF"], BackEnd.SIMULATED)
