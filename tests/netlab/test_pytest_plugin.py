"""The pytest plugin, in a pytest of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from netlab.choice import kernel_shortcomings

TESTS = """
import random

import pytest
import trio

from netlab.prediction import predict_outcome, simple_path
from netlab.punch import punch


async def connects(lab):
    server = (lab.address("server"), 3478)
    return await punch(lab.host("a"), lab.host("b"), server, generator=random.Random(1))


@pytest.mark.nats(left=["home/linux", "EIM+ADF"], right="office/pf")
async def test_punching(lab):
    expected = simple_path(predict_outcome(lab.topology, "a", "b"))
    assert ("direct" if await connects(lab) else "relay") == expected


@pytest.mark.nats(left="EIM+EIF", right="EIM+EIF", seed=3)
async def test_failing(lab):
    await connects(lab)
    assert lab.topology.seed == 4
"""

VIRTUAL = """
@pytest.mark.nats(left="EIM+EIF", right="EIM+EIF")
async def test_time_is_virtual(lab):
    await trio.sleep(100_000)
"""


def run_pytest(place: Path, text: str, *arguments: str) -> str:
    """Run pytest with the plugin on a test file; return what it prints."""
    (place / "test_it.py").write_text(text)
    (place / "pytest.ini").write_text("[pytest]\nfilterwarnings = error\n")
    command = [sys.executable, "-m", "pytest", "-p", "netlab.pytest_plugin", "-q", str(place)]
    done = subprocess.run(
        [*command, "-p", "no:cacheprovider", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
    )
    return done.stdout + done.stderr


def check_evidence(place: Path, output: str) -> None:
    """The failure names a directory that holds all there is to know."""
    directory = place / "lab-results/pytest/test_it.py_test_failing_EIM+EIF-EIM+EIF"
    assert f"timeline, capture and plan: {directory}" in output
    assert "mapping-born" in (directory / "timeline.jsonl").read_text()
    assert (directory / "capture.pcapng").stat().st_size > 100
    assert "NAT EIM+EIF" in (directory / "plan.txt").read_text()


def test_simulated(tmp_path: Path) -> None:
    """A test for every pair, virtual time, evidence of the failure."""
    output = run_pytest(tmp_path, TESTS + VIRTUAL, "--netlab-backend=simulated")
    assert "1 failed, 3 passed" in output
    check_evidence(tmp_path, output)


def test_in_the_kernel_under_xdist(tmp_path: Path) -> None:
    """Each test in a jail of its own, with two workers; the evidence survives the jail."""
    if kernel_shortcomings():
        pytest.skip("no kernel back end here")
    output = run_pytest(tmp_path, TESTS, "--netlab-backend=kernel", "-n", "2")
    assert "1 failed, 2 passed" in output
    check_evidence(tmp_path, output)


def test_wrong_markers_are_explained(tmp_path: Path) -> None:
    """A missing marker and a name that is no NAT."""
    output = run_pytest(tmp_path, "async def test_it(lab): ...")
    assert '@pytest.mark.nats(left="home/linux", right="office/pf")' in output
    text = 'import pytest\n@pytest.mark.nats(left="home/linus", right="EIM+EIF")\n'
    output = run_pytest(tmp_path, text + "async def test_it(lab): ...")
    assert 'did you mean "home/linux"' in output
