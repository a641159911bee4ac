"""Scenarios run in simulation: programs, changes, expectations, and the same run twice."""

from __future__ import annotations

import functools
from importlib import resources

import pytest
import trio
from trio.testing import MockClock

from netlab.labs import BackEnd, ProgramError, Say, load_entry
from netlab.runner import RunResult, run_scenario
from netlab.scenario_file import parse_scenario
from netlab.timeline import NetworkChanged, ProgramOutput, encode_event

HEAD = """
duration = "10s"
[nat.home]
[host.a]
behind = "home"
[server.s]
services = ["stun", "relay", "echo", "dns"]
"""


async def talk(say: Say, *arguments: str) -> None:
    """Print the arguments, one each second."""
    for argument in arguments:
        say(argument)
        await trio.sleep(1)


async def crash(say: Say) -> None:
    """Fail as programs do."""
    say("about to")
    raise RuntimeError("out of luck")


async def ask(say: Say, name: str, port: str) -> None:
    """Print what an echo server answers."""
    with trio.socket.socket(type=trio.socket.SOCK_DGRAM) as sock:
        await sock.sendto(b"hello", (name, int(port)))
        data, _ = await sock.recvfrom(100)
        say(f"heard {data.decode()}")


async def run(text: str) -> RunResult:
    """Run a scenario whose programs are this module's functions."""
    return await run_scenario(parse_scenario(HEAD + text), BackEnd.SIMULATED)


@pytest.fixture(autouse=True)
def entries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let scenarios name this file's functions, which no import finds under importlib mode."""
    own = {"t:talk": talk, "t:crash": crash, "t:ask": ask}
    monkeypatch.setattr("netlab.labs.load_entry", lambda name: own.get(name) or load_entry(name))


async def test_expectations_end_a_run_as_soon_as_they_are_decided(
    autojump_clock: MockClock,
) -> None:
    """The verdict holds the time at which the last piece came together."""
    result = await run(
        """
        [[run]]
        on = "a"
        python = "t:talk"
        args = ["one", "two", "three"]
        [[expect]]
        within = "5s"
        that = "two in output(a)"
        """
    )
    assert result.succeeded
    assert result.verdicts[0].at_seconds == pytest.approx(1.0)
    assert result.duration_seconds == pytest.approx(1.0)


async def test_an_expectation_that_never_comes_true_fails_at_its_deadline(
    autojump_clock: MockClock,
) -> None:
    """Neither earlier nor at the end of the run."""
    result = await run(
        """
        [[run]]
        on = "a"
        python = "t:talk"
        args = ["one"]
        [[expect]]
        within = "4s"
        that = "two in output(a)"
        """
    )
    assert not result.succeeded
    assert result.verdicts[0].at_seconds == pytest.approx(4.0)
    assert "not true within 4 s" in result.verdicts[0].problem


async def test_throughout_fails_at_the_first_exception(autojump_clock: MockClock) -> None:
    """What must hold all the time is checked at every event; what holds is known at the end."""
    result = await run(
        """
        [[run]]
        on = "a"
        python = "t:talk"
        args = ["one", "two", "three"]
        [[expect]]
        within = "4s"
        throughout = true
        that = "three not in output(a)"
        [[expect]]
        within = "4s"
        throughout = true
        that = "four not in output(a)"
        """
    )
    first, second = result.verdicts
    assert (first.succeeded, first.at_seconds) == (False, pytest.approx(2.0))
    assert (second.succeeded, second.at_seconds) == (True, pytest.approx(4.0))


async def test_the_next_program_waits_for_readiness_and_gets_its_groups(
    autojump_clock: MockClock,
) -> None:
    """A named group of the readiness line fills a placeholder of a later program."""
    result = await run(
        """
        [[run]]
        on = "a"
        python = "t:talk"
        args = ["starting", "listening as k17"]
        ready = 'listening as (?P<key>\\S+)'
        [[run]]
        name = "second"
        on = "s"
        python = "t:talk"
        args = ["${a.key}", "${a.address}", "${home.external}", "${seed}"]
        """
    )
    lines = [e for e in result.timeline if isinstance(e, ProgramOutput) and e.program == "second"]
    assert lines[0].line == "k17"
    assert lines[0].at == pytest.approx(1.0)
    assert lines[1].line.startswith("192.168.")
    assert lines[2].line.startswith("2.1.")
    assert lines[3].line == "0"


async def test_a_program_that_never_gets_ready_is_a_problem(autojump_clock: MockClock) -> None:
    """It is named, with the line that was waited for."""
    result = await run(
        """
        [[run]]
        on = "a"
        python = "t:talk"
        args = ["no"]
        ready = { line = "yes", within = "3s" }
        """
    )
    assert result.problems == ['program "a" printed no line that matches "yes" within 3 s']


async def test_a_crash_is_a_finding(autojump_clock: MockClock) -> None:
    """The exception shows as the program's last line, with status 1, and the run goes on."""
    result = await run(
        """
        [[run]]
        on = "a"
        python = "t:crash"
        [[expect]]
        within = "5s"
        that = "status(a) == 1 and 'out of luck' in output(a)"
        """
    )
    assert result.succeeded


async def test_services_answer(autojump_clock: MockClock) -> None:
    """A program behind a NAT reaches a server by name."""
    result = await run(
        """
        [[run]]
        on = "a"
        python = "t:ask"
        args = ["s", "7"]
        [[expect]]
        within = "5s"
        that = "'heard hello' in output(a)"
        """
    )
    assert result.succeeded


async def test_changes_happen_in_time(autojump_clock: MockClock) -> None:
    """Each is on the timeline at its time; renumbering takes an address nobody had."""
    result = await run(
        """
        [[at]]
        time = "1s"
        do = "nat.reboot"
        target = "home"
        [[at]]
        time = "2s"
        do = "nat.renumber"
        target = "home"
        [[at]]
        time = "3s"
        do = "link.cut"
        target = "a"
        [[at]]
        time = "3500ms"
        do = "link.heal"
        target = "a"
        [[at]]
        time = "4s"
        do = "link.set"
        target = "a"
        link = { loss = "50%" }
        [[expect]]
        after = "4500ms"
        within = "5s"
        that = "true"
        """
    )
    changes = [(e.at, e.what) for e in result.timeline if isinstance(e, NetworkChanged)]
    assert [what for _, what in changes] == ["reboot", "renumber", "cut", "heal", "link"]
    assert [at for at, _ in changes] == pytest.approx([1.0, 2.0, 3.0, 3.5, 4.0], abs=0.01)


async def test_command_lines_need_the_kernel(autojump_clock: MockClock) -> None:
    """The simulated back end says so before it starts anything."""
    scenario = parse_scenario(HEAD + '[[run]]\non = "a"\ncmd = ["true"]')
    with pytest.raises(ProgramError, match="needs the kernel back end"):
        await run_scenario(scenario, BackEnd.SIMULATED)


@pytest.mark.parametrize("name", ["punch", "reboot", "roam", "demo"])
def test_the_examples_come_out_as_they_say(name: str) -> None:
    """Each example holds in simulation, and its timeline is the same twice over.

    Of real nodes that are the packets without what is in them: the nonces of their handshakes
    come from the operating system.
    """
    text = (resources.files("netlab") / "scenarios" / f"{name}.toml").read_text()
    scenario = parse_scenario(text, name)

    def once() -> tuple[bool, list[bytes]]:
        clock = MockClock(autojump_threshold=0)
        run = functools.partial(run_scenario, snap_bytes=0 if name == "demo" else 512)
        result = trio.run(run, scenario, BackEnd.SIMULATED, clock=clock)
        assert isinstance(result, RunResult)
        return result.succeeded, [encode_event(event) for event in result.timeline]

    first = once()
    assert first[0]
    assert first == once()


async def test_programs_share_a_directory(autojump_clock: MockClock) -> None:
    """It is the same for all programs of a run, and gone when the run is over."""
    result = await run(
        """
[[run]]
on = "a"
python = "t:talk"
args = ["at ${directory}", "at ${directory}"]
"""
    )
    first, second = (e.line for e in result.timeline if isinstance(e, ProgramOutput))
    assert first == second
    assert not await trio.Path(first.removeprefix("at ")).exists()


async def test_times_may_count_from_readiness(autojump_clock: MockClock) -> None:
    """However long programs take to start, changes and deadlines come so long after."""
    result = await run_scenario(
        parse_scenario(
            "count_from_ready = true\n"
            + HEAD
            + """
            [[run]]
            on = "a"
            python = "t:talk"
            args = ["starting", "still", "ready", "set", "go", "more", "more"]
            ready = "ready"
            [[at]]
            time = "1.5s"
            do = "nat.reboot"
            target = "home"
            [[expect]]
            within = "1s"
            that = "ready in output(a)"
            [[expect]]
            after = "0.5s"
            within = "1.2s"
            that = "set in output(a)"
            """
        ),
        BackEnd.SIMULATED,
    )
    assert result.succeeded, result.verdicts
    (reboot,) = (event for event in result.timeline if isinstance(event, NetworkChanged))
    assert reboot.at == pytest.approx(3.5, abs=0.01)
