"""A scenario as data: a network, what runs in it, what happens to it, what must come of it.

`netlab.scenario_file` reads one from a file. Pure.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import StrEnum

from netlab.behavior import Link, ModelError, suggest
from netlab.expressions import Expression
from netlab.model import Nat, Topology, Uplink
from netlab.presets import NatPreset, class_behavior, nat_preset, nat_presets
from netlab.punch import CLASSES

__all__ = [
    "Action",
    "Change",
    "Expectation",
    "Matrix",
    "Program",
    "Scenario",
    "Service",
]

DEFAULT_DURATION_SECONDS = 30.0
DEFAULT_READY_SECONDS = 10.0
PATH_PATTERN = r"path (?P<peer>\S+) (?P<path>.+)"
"""The lines by which programs tell their path, unless a scenario says otherwise."""
LATENCY_PATTERN = r"rtt (?P<peer>\S+) (?P<milliseconds>[0-9.]+) ms"

PLACEHOLDER = re.compile(r"\$\{([^}]*)\}")
"""``${name}`` in an argument of a program."""


class ServiceKind(StrEnum):
    """What a server of the lab itself can offer."""

    STUN = "stun"
    RELAY = "relay"
    DNS = "dns"
    ECHO = "echo"


class Action(StrEnum):
    """What can happen to a network while it runs."""

    NAT_REBOOT = "nat.reboot"
    NAT_RENUMBER = "nat.renumber"
    NAT_LOGIN = "nat.login"
    HOST_MOVE = "host.move"
    HOST_DISCONNECT = "host.disconnect"
    LINK_CUT = "link.cut"
    LINK_HEAL = "link.heal"
    LINK_SET = "link.set"


@dataclass(frozen=True, slots=True)
class Service:
    """A service on a server."""

    server: str
    kind: ServiceKind


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """A program to run on a host: a command line, or a Trio function of a module.

    With both, the kernel back end runs the command line and the simulated one the function.
    """

    name: str
    host: str
    command: tuple[str, ...] = ()
    python: str = ""
    """``module:function``; called as ``await function(say, *arguments)``."""
    arguments: tuple[str, ...] = ()
    """Of the function, or of the command line if there is no function."""
    ready: re.Pattern[str] | None = None
    """The line after which the next program starts; its groups become placeholders."""
    ready_seconds: float = DEFAULT_READY_SECONDS
    path: re.Pattern[str] = re.compile(PATH_PATTERN)
    latency: re.Pattern[str] = re.compile(LATENCY_PATTERN)


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """Something that happens to the network at a time."""

    at_seconds: float
    action: Action
    target: str
    to: str = ""
    """The network to move to, or the network of the link that is meant."""
    host: str = ""
    """Who logs in to a captive portal."""
    link: Link | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Expectation:
    """What must be true at some instant, or all the time, between two times."""

    that: Expression
    after_seconds: float = 0.0
    within_seconds: float
    throughout: bool = False


@dataclass(frozen=True, slots=True)
class Matrix:
    """The NATs that take the places of [nat.left] and [nat.right], by their names."""

    left: tuple[str, ...]
    right: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """One scenario file."""

    name: str
    topology: Topology
    services: tuple[Service, ...] = ()
    programs: tuple[Program, ...] = ()
    changes: tuple[Change, ...] = ()
    expectations: tuple[Expectation, ...] = ()
    matrix: Matrix | None = None
    cell: tuple[str, str] | None = None
    """Of which pair of a matrix this is."""
    duration_seconds: float = DEFAULT_DURATION_SECONDS
    count_from_ready: bool = False
    """Whether all times count from when the last program is ready, instead of the lab's start."""

    @property
    def needs_kernel(self) -> bool:
        """Whether it runs command lines, which no simulated internet can."""
        return any(not program.python for program in self.programs)

    @property
    def adjustable(self) -> frozenset[str]:
        """The owners of links that are changed under way."""
        return frozenset(c.target for c in self.changes if c.action is Action.LINK_SET)

    @property
    def name_servers(self) -> tuple[str, ...]:
        """The servers that offer DNS."""
        return tuple(s.server for s in self.services if s.kind is ServiceKind.DNS)

    def cells(self) -> Iterator[Scenario]:
        """Yield a scenario for every pair of the matrix."""
        assert self.matrix is not None
        for left in self.matrix.left:
            for right in self.matrix.right:
                presets = {"left": find_nat(left), "right": find_nat(right)}
                nats: list[Nat] = []
                for nat in self.topology.nats:
                    preset = presets.get(nat.name)
                    if preset is None:
                        nats.append(nat)
                    else:
                        chosen = replace(nat, behavior=preset.behavior)
                        nats += chain_of_preset(chosen, preset)
                topology = replace(self.topology, nats=tuple(nats))
                yield replace(self, topology=topology, matrix=None, cell=(left, right))


def chain_of_preset(nat: Nat, preset: NatPreset) -> list[Nat]:
    """Return a NAT, and those that its preset puts between it and its uplink."""
    nats = [nat]
    while preset.behind is not None:
        preset = nat_preset(preset.behind)
        outer = Nat(
            name=f"{nats[-1].name}.outer",
            behavior=preset.behavior,
            uplink=nats[-1].uplink,
            operator=nat.operator,
        )
        nats[-1] = replace(nats[-1], uplink=Uplink(network=outer.name))
        nats.append(outer)
    return nats


def find_nat(name: str) -> NatPreset:
    """Return a preset, or one of the nine classes such as ``EIM+APDF``, by its name.

    Raises:
        ModelError: it is neither; the nearest name is suggested.
    """
    if name.upper().replace("/", "+") in CLASSES:
        name = name.upper().replace("/", "+")
        behavior = class_behavior(name)
        return NatPreset(name=name, claims=name, seen_on="a plain class", behavior=behavior)
    presets = nat_presets()
    if name not in presets:
        hint = suggest(name, [*presets, *CLASSES])
        raise ModelError(f'nat "{name}"', f'"{name}" is no preset and no class; {hint}')
    return presets[name]
