"""Program pairs over pairs of NATs: which path they find, and how fast.

All pairs live in one lab, each behind NATs of its own. Without command lines the pair is simple
punching (`netlab.punch`), whose results the table of outcomes predicts.
"""

from __future__ import annotations

import itertools
import random
import re
import shlex
import tempfile
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

import msgspec
import trio

from netlab.behavior import ModelError
from netlab.labs import BackEnd, Lab, ProgramError, open_lab
from netlab.model import Host, Server, Topology, Uplink
from netlab.prediction import predict_outcome, simple_path
from netlab.punch import punch
from netlab.scenario import PLACEHOLDER, Service, ServiceKind, find_nat
from netlab.services import STUN_PORTS, run_service
from netlab.verify import chain_of_nats, preset_target

SERVER = "server"
# To get ready, for the server's program and for the left ones; more is a program that hangs.
# Several that start at once on a busy machine take seconds each.
_READY_SECONDS = 30.0
_ENTRY = re.compile(r"[\w.]+:\w+")

# What is not told within this ends up in the result's "none".
DEFAULT_TIMEOUT_SECONDS = 10.0
# Simple punching is 70 packets a second and pair; so many pairs at once don't wait for each other.
_PUNCHES_AT_ONCE = 30


class Cell(msgspec.Struct, frozen=True, kw_only=True):
    """One pair of NATs and what came of it."""

    left: str
    right: str
    path: str
    """``direct``, ``relay`` or ``none``."""
    seconds: float | None
    """From the start of the right program to a direct path, if there is one."""
    expected: str
    """What simple punching comes to."""
    letter: str
    """D, B, b or R, as in the table of outcomes."""
    agrees: bool
    problem: str = ""


class MatrixResult(msgspec.Struct, frozen=True, kw_only=True):
    """A whole matrix."""

    back_end: BackEnd
    pair: str
    seed: int
    seconds: float
    left: list[str]
    right: list[str]
    cells: list[Cell]


@dataclass(frozen=True, slots=True, kw_only=True)
class ProgramPair:
    """Two command lines and how their output is read.

    Placeholders in them: ``${left.address}``, ``${right.address}``, ``${server.address}``,
    ``${server.address2}``, ``${cell}`` (the pair's number), ``${seed}``, ``${directory}`` (a new
    one, which is removed in the end), and ``${left.NAME}`` and ``${server.NAME}`` for the named
    groups of the readiness lines of the left program and the server's.
    """

    left: str
    right: str
    ready: re.Pattern[str] | None
    """A line of the left program after which the right one starts."""
    direct: re.Pattern[str]
    relay: re.Pattern[str]
    timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS
    server: str = ""
    """What all pairs share, such as a relay: a program that runs on the server throughout."""
    server_ready: re.Pattern[str] | None = None
    """A line of the server's program after which the pairs start."""
    title: str = ""
    """What the pair is called in results; by default its command lines."""


async def run_matrix(
    left: Sequence[str],
    right: Sequence[str],
    back_end: BackEnd,
    *,
    pair: ProgramPair | None = None,
    at_once: int = 4,
    seed: int = 0,
    on_cell: Callable[[Cell], None] = lambda _: None,
) -> MatrixResult:
    """Run a pair of programs over every pair of NATs.

    Args:
        left, right: names of presets or classes.
        back_end: where.
        pair: the programs; simple punching if absent.
        at_once: how many pairs of programs run at the same time.
        seed: the lab's seed.
        on_cell: gets each result when it is there, in any order.

    Raises:
        ModelError: a name is unknown, or the back end cannot build such a NAT.
        ProgramError: a program cannot be started.
    """
    names = list(itertools.product(left, right))
    topology = _topology(names, seed)
    cells: dict[int, Cell] = {}
    values = {"seed": str(seed)}
    limiter = trio.CapacityLimiter(_PUNCHES_AT_ONCE if pair is None else at_once)
    async with _directory(values), open_lab(topology, back_end, record_packets=False) as lab:
        own = [address for address in lab.host(SERVER).addresses if ":" not in address]
        values["server.address"], values["server.address2"] = own[:2]

        async def run_cell(number: int) -> None:
            async with limiter:
                if pair is None:
                    path, seconds, problem = await _punch(lab, number)
                else:
                    path, seconds, problem = await _run_programs(lab, number, pair, values)
            outcome = predict_outcome(topology, f"a{number}", f"b{number}")
            expected = simple_path(outcome)
            cells[number] = Cell(
                left=names[number][0],
                right=names[number][1],
                path=path,
                seconds=None if seconds is None else round(seconds, 4),
                expected=expected,
                letter=outcome.value,
                agrees=path == expected,
                problem=problem,
            )
            on_cell(cells[number])

        async with trio.open_nursery() as serving:
            for kind in (ServiceKind.STUN, ServiceKind.RELAY):
                await serving.start(run_service, lab, Service(SERVER, kind))
            if pair is not None and pair.server:
                await serving.start(_serve, lab, pair, values)
            started = lab.now()
            async with trio.open_nursery() as running:
                for number in range(len(names)):
                    running.start_soon(run_cell, number)
            seconds = lab.now() - started
            serving.cancel_scope.cancel()
    return MatrixResult(
        back_end=back_end,
        pair="simple punching" if pair is None else pair.title or f"{pair.left} | {pair.right}",
        seed=seed,
        seconds=round(seconds, 3),
        left=list(left),
        right=list(right),
        cells=[cells[number] for number in range(len(names))],
    )


def _topology(names: Sequence[tuple[str, str]], seed: int) -> Topology:
    nats = []
    hosts = []
    for number, sides in enumerate(names):
        for letter, name in zip("ab", sides, strict=True):
            target = preset_target(find_nat(name))
            if target.chain[0].nat64:
                raise ModelError(f'nat "{name}"', "IPv6-only networks are not for this matrix")
            nats += chain_of_nats(f"n{letter}{number}", target.chain)
            uplink = Uplink(network=f"n{letter}{number}")
            hosts.append(Host(name=f"{letter}{number}", uplinks=(uplink,)))
    server = Server(name=SERVER, addresses=3)
    return Topology(hosts=tuple(hosts), nats=tuple(nats), servers=(server,), seed=seed)


async def _punch(lab: Lab, number: int) -> tuple[str, float | None, str]:
    started = lab.now()
    succeeded = await punch(
        lab.host(f"a{number}"),
        lab.host(f"b{number}"),
        (lab.address(SERVER), STUN_PORTS[0]),
        generator=random.Random(f"{number} {lab.topology.seed}"),
    )
    return ("direct", lab.now() - started, "") if succeeded else ("relay", None, "")


class _Watch:
    """What the two programs of a cell have told so far."""

    def __init__(self, lab: Lab, pair: ProgramPair) -> None:
        self._lab = lab
        self._pair = pair
        self.path = "none"
        self.direct_at: float | None = None
        self.ready = trio.Event()
        self.direct = trio.Event()
        self.groups: dict[str, str] = {}
        self.last_line = ""

    def hear_left(self, line: str) -> None:
        pattern = self._pair.ready
        found = pattern.search(line) if pattern is not None else None
        if found is not None and not self.ready.is_set():
            self.groups = _named_groups("left", found)
            self.ready.set()
        self.hear(line)

    def hear(self, line: str) -> None:
        self.last_line = line or self.last_line
        if self._pair.direct.search(line):
            self.path = "direct"
            if self.direct_at is None:
                self.direct_at = self._lab.now()
            self.direct.set()
        elif self._pair.relay.search(line) and not self.direct.is_set():
            self.path = "relay"


@asynccontextmanager
async def _directory(values: dict[str, str]) -> AsyncIterator[None]:
    """Set ${directory}: a place for the programs' files."""
    with tempfile.TemporaryDirectory(
        prefix="underpass-lab-", ignore_cleanup_errors=True
    ) as directory:
        values["directory"] = directory
        yield


async def _run_line(
    lab: Lab, host: str, line: str, values: Mapping[str, str], say: Callable[[str], None]
) -> int:
    """Run a command line with its placeholders filled in; return its status."""

    def value(found: re.Match[str]) -> str:
        if found[1] not in values:
            raise ProgramError(
                f'nothing is called "${{{found[1]}}}"; known: ' + ", ".join(sorted(values))
            )
        return values[found[1]]

    words = tuple(PLACEHOLDER.sub(value, word) for word in shlex.split(line))
    if _ENTRY.fullmatch(words[0]):
        return await lab.run_program(host, (), words[0], words[1:], say)
    return await lab.run_program(host, words, "", (), say)


def _named_groups(program: str, found: re.Match[str]) -> dict[str, str]:
    return {f"{program}.{name}": text or "" for name, text in found.groupdict().items()}


async def _serve(
    lab: Lab,
    pair: ProgramPair,
    values: dict[str, str],
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Run the server's program; when it is ready, `values` has its named groups."""
    ready = trio.Event()
    last_line = ""

    def hear(line: str) -> None:
        nonlocal last_line
        last_line = line or last_line
        pattern = pair.server_ready
        found = pattern.search(line) if pattern is not None else None
        if found is not None and not ready.is_set():
            values.update(_named_groups(SERVER, found))
            ready.set()

    async def run() -> None:
        status = await _run_line(lab, SERVER, pair.server, values, hear)
        told = f'; it said last: "{last_line}"' if last_line else ""
        raise ProgramError(f"the server's program ended with status {status}{told}")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(run)
        if pair.server_ready is not None:
            with trio.move_on_after(_READY_SECONDS):
                await ready.wait()
            if not ready.is_set():
                raise ProgramError(
                    "the server's program printed no line that matches "
                    f'"{pair.server_ready.pattern}" within {_READY_SECONDS:g} s'
                )
        task_status.started()


async def _run_programs(
    lab: Lab, number: int, pair: ProgramPair, shared: Mapping[str, str]
) -> tuple[str, float | None, str]:
    watch = _Watch(lab, pair)
    values = {
        **shared,
        "left.address": lab.address(f"a{number}"),
        "right.address": lab.address(f"b{number}"),
        "cell": str(number),
    }

    async def run(host: str, line: str, say: Callable[[str], None]) -> None:
        status = await _run_line(lab, host, line, values | watch.groups, say)
        ended.append(f"status {status}")
        if len(ended) == 2:
            nursery.cancel_scope.cancel()

    problem = ""
    ended: list[str] = []
    started = lab.now()
    with trio.move_on_after(_READY_SECONDS if pair.ready else pair.timeout_seconds) as limit:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(run, f"a{number}", pair.left, watch.hear_left)
            if pair.ready is not None:
                await watch.ready.wait()
                limit.deadline = trio.current_time() + pair.timeout_seconds
            started = lab.now()
            nursery.start_soon(run, f"b{number}", pair.right, watch.hear)
            await watch.direct.wait()
            nursery.cancel_scope.cancel()
    if watch.path == "none":
        unready = pair.ready is not None and not watch.ready.is_set()
        problem = "the left program never got ready" if unready else "no path was told"
        if ended:
            problem += f"; ended with {' and '.join(ended)}"
        problem += f'; the last line: "{watch.last_line}"' if watch.last_line else ""
    seconds = None if watch.direct_at is None else watch.direct_at - started
    return watch.path, seconds, problem
