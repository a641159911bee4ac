"""Program pairs over pairs of NATs: which path they find, and how fast.

All pairs live in one lab, each behind NATs of its own. Without command lines the pair is simple
punching (`netlab.punch`), whose results the table of outcomes predicts.
"""

from __future__ import annotations

import itertools
import random
import re
import shlex
from collections.abc import Callable, Sequence
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
    """From the start of the pair to a direct path, if there is one."""
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
    ``${cell}`` (the pair's number), ``${seed}``, and ``${left.NAME}`` for the named groups of the
    left program's readiness line.
    """

    left: str
    right: str
    ready: re.Pattern[str] | None
    """A line of the left program after which the right one starts."""
    direct: re.Pattern[str]
    relay: re.Pattern[str]
    timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS


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
    limiter = trio.CapacityLimiter(_PUNCHES_AT_ONCE if pair is None else at_once)
    async with open_lab(topology, back_end, record_packets=False) as lab:
        started = lab.now()

        async def run_cell(number: int) -> None:
            async with limiter:
                if pair is None:
                    path, seconds, problem = await _punch(lab, number)
                else:
                    path, seconds, problem = await _run_programs(lab, number, pair)
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
            async with trio.open_nursery() as running:
                for number in range(len(names)):
                    running.start_soon(run_cell, number)
            serving.cancel_scope.cancel()
        seconds = lab.now() - started
    return MatrixResult(
        back_end=back_end,
        pair="simple punching" if pair is None else f"{pair.left} | {pair.right}",
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
            self.groups = {f"left.{k}": v or "" for k, v in found.groupdict().items()}
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


async def _run_programs(lab: Lab, number: int, pair: ProgramPair) -> tuple[str, float | None, str]:
    watch = _Watch(lab, pair)
    values = {
        "left.address": lab.address(f"a{number}"),
        "right.address": lab.address(f"b{number}"),
        "server.address": lab.address(SERVER),
        "cell": str(number),
        "seed": str(lab.topology.seed),
    }

    def fill(text: str) -> str:
        def value(found: re.Match[str]) -> str:
            known = values | watch.groups
            if found[1] not in known:
                raise ProgramError(
                    f'nothing is called "${{{found[1]}}}"; known: ' + ", ".join(sorted(known))
                )
            return known[found[1]]

        return PLACEHOLDER.sub(value, text)

    async def run(host: str, line: str, say: Callable[[str], None]) -> None:
        words = [fill(word) for word in shlex.split(line)]
        entry, command = "", tuple(words)
        arguments: tuple[str, ...] = ()
        if _ENTRY.fullmatch(words[0]):
            entry, command, arguments = words[0], (), tuple(words[1:])
        status = await lab.run_program(host, command, entry, arguments, say)
        ended.append(f"status {status}")
        if len(ended) == 2:
            nursery.cancel_scope.cancel()

    started = lab.now()
    problem = ""
    ended: list[str] = []
    with trio.move_on_after(pair.timeout_seconds):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(run, f"a{number}", pair.left, watch.hear_left)
            if pair.ready is not None:
                await watch.ready.wait()
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
