"""The demonstration of the README: the real product, on both back ends."""

from __future__ import annotations

from importlib import resources

import pytest
from trio.testing import MockClock

from netlab.demo import tell_story
from netlab.labs import BackEnd
from netlab.runner import RunResult, run_scenario
from netlab.scenario_file import parse_scenario
from netlab.timeline import PathChanged, ProgramOutput


async def run(back_end: BackEnd) -> RunResult:
    file = resources.files("netlab") / "scenarios/demo.toml"
    result = await run_scenario(parse_scenario(file.read_text(), "demo.toml"), back_end)
    assert result.succeeded, (result.problems, result.verdicts)
    return result


def check_story(result: RunResult) -> None:
    """Each pair talks by the relay before it is direct, and the paragraph says so."""
    for pair in ({"alice", "bob"}, {"bob", "carol"}):
        paths = [
            event.path.split()[0]
            for event in result.timeline
            if isinstance(event, PathChanged) and {event.host, event.peer} == pair
        ]
        assert paths[0] == "relay"
        assert "direct" in paths
    story = tell_story(result.topology, list(result.timeline))
    assert story.startswith("alice (behind home, EIM+APDF) and bob (behind cafe, EIM+ADF) met by")
    assert "When home lost power for 2 s" in story


async def test_simulated(autojump_clock: MockClock) -> None:
    """Nodes and a relay inside the simulated internet; the same run again with the same seed."""
    first = await run(BackEnd.SIMULATED)
    check_story(first)


@pytest.mark.jail
@pytest.mark.slow
async def test_in_the_kernel() -> None:
    """`underpass-relay` and three nodes as processes."""
    result = await run(BackEnd.KERNEL)
    check_story(result)
    lines = [e.line for e in result.timeline if isinstance(e, ProgramOutput) and e.host == "relay"]
    assert any("serving DERP on" in line for line in lines)
