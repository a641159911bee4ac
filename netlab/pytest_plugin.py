"""The pytest plugin: a lab as a fixture, on either back end, safe under pytest-xdist.

    @pytest.mark.nats(left=["home/linux", "cgn/strict"], right="office/pf")
    async def test_nodes_connect(lab: Lab) -> None:
        async with lab.host("a"):
            ...

`lab` is a running `netlab.labs.Lab`: host ``a`` behind NAT ``left``, host ``b`` behind NAT
``right``, and ``server``, which offers STUN on port 3478 and the lab's relay. Lists make one test
for every pair. With ``--netlab-backend=simulated`` time is virtual; on the kernel back end every
test runs in a forked copy of pytest inside a jail of its own, which needs no root and leaves
nothing behind. What a failed test's lab has seen is kept in a directory that the failure names.

Needs pytest-trio. Load it with ``-p netlab.pytest_plugin`` or ``pytest_plugins``.
"""

from __future__ import annotations

import itertools
import pickle
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import pytest
import trio
from _pytest.runner import runtestprotocol
from pytest_trio import trio_fixture  # type: ignore[import-untyped]  # it has no types
from trio.testing import MockClock

from netlab.behavior import ModelError
from netlab.choice import BackEndError, Wish, choose_back_end
from netlab.kernel.jail import JailCallError, JailError, call_in_jail, in_jail
from netlab.labs import BackEnd, Lab, open_lab
from netlab.model import Host, Server, Topology, Uplink
from netlab.packet_watch import join_drops
from netlab.pcap import write_timeline
from netlab.plan import plan_text
from netlab.scenario import Service, ServiceKind, find_nat
from netlab.services import run_service
from netlab.timeline import write_jsonl
from netlab.verify import chain_of_nats, preset_target

if TYPE_CHECKING:
    from trio.abc import Clock, Instrument

_Result = TypeVar("_Result")

SERVER = "server"
# Ends a test that hangs in its jail; a test that takes longer is no test of one lab.
_JAIL_SECONDS = 120.0

_back_end_key = pytest.StashKey[BackEnd]()
_lab_key = pytest.StashKey[Lab]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("netlab", "labs of NATs")
    group.addoption(
        "--netlab-backend",
        choices=[wish.value for wish in Wish],
        default=Wish.ANY.value,
        help="what makes the networks of the fixture `lab`; any: the kernel where possible",
    )
    group.addoption(
        "--netlab-results",
        type=Path,
        default=Path("lab-results/pytest"),
        help="where timeline, capture and plan of failed tests are kept",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers",
        "nats(left, right, seed=0): the NATs of the fixture `lab`, presets or classes; "
        "lists make a test for every pair",
    )


# --- what to build -------------------------------------------------------------------------


def _names(value: str | Sequence[str]) -> list[str]:
    return [value] if isinstance(value, str) else list(value)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "netlab_pair" not in metafunc.fixturenames:
        return
    marker = metafunc.definition.get_closest_marker("nats")
    if marker is None or marker.args or not {"left", "right"} <= marker.kwargs.keys():
        raise pytest.UsageError(
            f"{metafunc.definition.nodeid}: the fixture `lab` needs "
            '@pytest.mark.nats(left="home/linux", right="office/pf")'
        )
    pairs = list(itertools.product(_names(marker.kwargs["left"]), _names(marker.kwargs["right"])))
    for name in itertools.chain.from_iterable(pairs):
        try:
            find_nat(name)
        except ModelError as error:
            raise pytest.UsageError(f"{metafunc.definition.nodeid}: {error}") from None
    ids = [f"{left}-{right}" for left, right in pairs]
    metafunc.parametrize("netlab_pair", pairs, ids=ids, indirect=True)


def topology_of_pair(left: str, right: str, seed: int = 0) -> Topology:
    """Return the topology of the fixture: ``a`` behind ``left``, ``b`` behind ``right``.

    Raises:
        ModelError: a name is no preset and no class.
    """
    nats = []
    for side, name in (("left", left), ("right", right)):
        nats += chain_of_nats(side, preset_target(find_nat(name)).chain)
    hosts = (
        Host(name="a", uplinks=(Uplink(network="left"),)),
        Host(name="b", uplinks=(Uplink(network="right"),)),
    )
    server = Server(name=SERVER, addresses=3)
    return Topology(hosts=hosts, nats=tuple(nats), servers=(server,), seed=seed)


@pytest.fixture
def netlab_pair(request: pytest.FixtureRequest) -> tuple[str, str]:
    """The names of the NATs, set by the marker `nats`."""
    pair: tuple[str, str] = request.param
    return pair


@trio_fixture  # type: ignore[untyped-decorator]  # as above
async def lab(request: pytest.FixtureRequest, netlab_pair: tuple[str, str]) -> AsyncIterator[Lab]:
    """A running lab of the NATs that the marker `nats` names."""
    marker = request.node.get_closest_marker("nats")
    assert marker is not None
    topology = topology_of_pair(*netlab_pair, seed=marker.kwargs.get("seed", 0))
    async with (
        open_lab(topology, request.node.stash[_back_end_key]) as running,
        trio.open_nursery() as services,
    ):
        request.node.stash[_lab_key] = running
        for kind in (ServiceKind.STUN, ServiceKind.RELAY):
            await services.start(run_service, running, Service(SERVER, kind))
        yield running
        services.cancel_scope.cancel()


# --- how to run it -------------------------------------------------------------------------


def _run_in_virtual_time(
    function: Callable[..., Awaitable[_Result]],
    *arguments: object,
    clock: Clock | None = None,
    instruments: Sequence[Instrument] = (),
) -> _Result:
    """Run as `trio.run`, on a clock that jumps over idle time unless the test has its own."""
    chosen = MockClock(autojump_threshold=0) if clock is None else clock
    return trio.run(function, *arguments, clock=chosen, instruments=instruments)


def _back_end(config: pytest.Config) -> BackEnd:
    if _back_end_key not in config.stash:
        config.stash[_back_end_key] = choose_back_end(Wish(config.getoption("--netlab-backend")))
    return config.stash[_back_end_key]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if "lab" not in getattr(item, "fixturenames", ()):
            continue
        try:
            item.stash[_back_end_key] = back_end = _back_end(config)
        except BackEndError as error:
            item.add_marker(pytest.mark.skip(reason=str(error)))
            continue
        if back_end is BackEnd.SIMULATED:
            # pytest-trio runs a test by the `run` of its nearest marker.
            item.add_marker(pytest.mark.trio(run=_run_in_virtual_time), append=False)
        elif item.get_closest_marker("trio") is None:
            item.add_marker(pytest.mark.trio)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
    """Run a test of the kernel back end in a forked copy of pytest, inside a jail."""
    if item.stash.get(_back_end_key, None) is not BackEnd.KERNEL or in_jail():
        return None

    def run() -> bytes:
        reports = runtestprotocol(item, log=False)
        to_data = item.config.hook.pytest_report_to_serializable
        return pickle.dumps([to_data(config=item.config, report=report) for report in reports])

    try:
        data = pickle.loads(call_in_jail(run, timeout_seconds=_JAIL_SECONDS))
    except (JailError, JailCallError) as error:
        problem = str(error)

        def fail(**_: object) -> None:
            pytest.fail(problem, pytrace=False)

        del item.stash[_back_end_key]
        # The test itself cannot run; what stands in its place has no fixtures.
        assert isinstance(item, pytest.Function)
        item.obj = fail
        return None
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    from_data = item.config.hook.pytest_report_from_serializable
    for report in data:
        item.ihook.pytest_runtest_logreport(report=from_data(config=item.config, data=report))
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    """Keep what a failed test's lab has seen; the generator is pytest's protocol, hence Any."""
    report = yield
    seen = item.stash.get(_lab_key, None)
    if report.when == "call" and report.failed and seen is not None:
        try:
            place = keep_evidence(seen, item)
        except OSError as error:
            report.sections.append(("netlab", f"evidence could not be kept: {error}"))
        else:
            report.sections.append(("netlab", f"timeline, capture and plan: {place}"))
    return report


def keep_evidence(seen: Lab, item: pytest.Item) -> Path:
    """Write timeline, capture and plan of a test's lab; return their directory.

    Raises:
        OSError: it cannot be written.
    """
    results: Path = item.config.getoption("--netlab-results")
    name = re.sub(r"[^A-Za-z0-9._+-]+", "_", item.nodeid).strip("_")[-150:]
    place = item.config.rootpath / results / name
    place.mkdir(parents=True, exist_ok=True)
    events = join_drops(seen.timeline)
    with (place / "timeline.jsonl").open("wb") as file:
        write_jsonl(events, file)
    with (place / "capture.pcapng").open("wb") as file:
        write_timeline(events, file)
    (place / "plan.txt").write_text(plan_text(seen.topology), encoding="utf-8")
    return place
