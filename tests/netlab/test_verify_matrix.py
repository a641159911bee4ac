"""`verify` and `matrix` in simulation: everything as claimed, and lies found."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from netlab.labs import BackEnd, ProgramError, Say
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


@pytest.fixture
def seen_directories(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Directories that t:serve was given; t:serve and t:client are programs."""
    seen: list[Path] = []

    async def serve(say: Say, directory: str) -> None:
        seen.append(Path(directory))
        say(f"key=k7 {is_directory(seen[0])}")
        await trio.sleep(20)

    async def client(say: Say, key: str) -> None:
        say(f"path {key} direct")

    monkeypatch.setattr(
        "netlab.labs.load_entry", {"t:serve": serve, "t:client": client}.__getitem__
    )
    return seen


def is_directory(path: Path) -> bool:
    return path.is_dir()


def pair_with_server(server_ready: str) -> ProgramPair:
    return ProgramPair(
        left="t:client ${server.key}",
        right="t:client ${server.key}",
        ready=None,
        direct=re.compile("path k7 direct"),
        relay=re.compile("never"),
        server="t:serve ${directory}",
        server_ready=re.compile(server_ready),
    )


async def test_all_pairs_share_a_server(
    autojump_clock: MockClock, seen_directories: list[Path]
) -> None:
    """It starts once; the pairs know what it printed; its directory is gone in the end."""
    pair = pair_with_server(r"key=(?P<key>\S+) True")
    result = await run_matrix(["EIM+EIF"], ["EIM+EIF", "EIM+APDF"], BackEnd.SIMULATED, pair=pair)
    assert [cell.path for cell in result.cells] == ["direct", "direct"]
    assert [is_directory(directory) for directory in seen_directories] == [False]


async def test_a_server_that_ends_too_early_is_explained(
    autojump_clock: MockClock, seen_directories: list[Path]
) -> None:
    """With the line that was its last."""
    with pytest.raises(BaseExceptionGroup) as caught:
        await run_matrix(["EIM+EIF"], ["EIM+EIF"], BackEnd.SIMULATED, pair=pair_with_server("no"))
    assert caught.group_contains(ProgramError, match="ended with status 0; it said last: .key=k7")


@pytest.mark.parametrize("name", ["mobile/nat64"])
async def test_what_cannot_be_built_is_refused(name: str, autojump_clock: MockClock) -> None:
    """With the reason."""
    with pytest.raises(ValueError, match="IPv6-only"):
        await run_matrix([name], ["EIM+EIF"], BackEnd.SIMULATED)
