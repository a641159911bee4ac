"""The scenario file: a network, what runs in it, what happens to it, what must come of it.

    seed = 7
    duration = "20s"

    [nat.home]
    preset = "home/linux"            # or class = "EIM+APDF", or the axes one by one
    [nat.office]
    mapping = "apdm"
    filtering = "apdf"

    [host.a]
    behind = "home"
    link = { delay = "25ms", loss = "0.5%" }
    [host.b]
    behind = "office"

    [server.stun]
    services = ["stun", "relay"]

    [[run]]
    on = "a"
    python = "netlab.node:node"      # or cmd = ["program", "argument"]
    args = ["a", "b", "${stun.address}"]
    ready = "ready"

    [[at]]
    time = "5s"
    do = "nat.reboot"
    target = "home"

    [[expect]]
    within = "8s"
    that = "path(a, b) == expected_path(a, b)"

`parse_scenario` checks everything that can be known before anything runs. Every mistake is a
`ScenarioError` with file, line and key.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any, TypeVar, cast

from netlab.behavior import Link, ModelError, NatBehavior, suggest
from netlab.expressions import Expression, ExpressionError, find_calls, parse_expression
from netlab.model import INTERNET, Host, Nat, Server, Topology, Uplink
from netlab.observations import FUNCTIONS, NAME_ARGUMENTS
from netlab.presets import NatPreset, link_preset
from netlab.records import read_record
from netlab.scenario import (
    DEFAULT_DURATION_SECONDS,
    DEFAULT_READY_SECONDS,
    LATENCY_PATTERN,
    PATH_PATTERN,
    PLACEHOLDER,
    Action,
    Change,
    Expectation,
    Matrix,
    Program,
    Scenario,
    Service,
    ServiceKind,
    chain_of_preset,
    find_nat,
)
from netlab.toml_reading import ScenarioError, Table, parse_toml

__all__ = ["ScenarioError", "parse_scenario"]

_Record = TypeVar("_Record")


def parse_scenario(text: str, name: str = "scenario") -> Scenario:
    """Parse a scenario file; `name` is the file's name, for errors.

    Raises:
        ScenarioError: something in it is wrong.
    """
    return _Parser(parse_toml(text, name), name).parse()


class _Parser:
    def __init__(self, table: Table, name: str) -> None:
        self._table = table
        self._name = name
        self._topology = Topology()

    def parse(self) -> Scenario:
        table = self._table
        seed = table.take_int("seed", 0)
        duration = table.take_seconds("duration", DEFAULT_DURATION_SECONDS)
        count_from_ready = table.take_bool("count_from_ready", False)
        matrix = self._matrix(table.maybe_table("matrix"))
        nats = tuple(
            nat
            for name, inner in table.tables_by_name("nat").items()
            for nat in self._nat(name, inner)
        )
        hosts = tuple(self._host(*item) for item in table.tables_by_name("host").items())
        services: list[Service] = []
        servers = tuple(
            self._server(name, inner, services)
            for name, inner in table.tables_by_name("server").items()
        )
        try:
            self._topology = Topology(hosts=hosts, servers=servers, nats=nats, seed=seed)
        except ModelError as error:
            raise self._located(error) from None
        if matrix is not None:
            self._check_matrix(nats)
        runs = table.table_list("run")
        programs: list[Program] = []
        for run in runs:
            programs.append(self._program(run, programs))
        changes = sorted(
            (self._change(item) for item in table.table_list("at")), key=lambda c: c.at_seconds
        )
        expectations = tuple(
            self._expectation(item, duration, programs) for item in table.table_list("expect")
        )
        table.end()
        return Scenario(
            name=self._name,
            topology=self._topology,
            services=tuple(services),
            programs=tuple(programs),
            changes=tuple(changes),
            expectations=expectations,
            matrix=matrix,
            duration_seconds=duration,
            count_from_ready=count_from_ready,
        )

    # --- the network ---------------------------------------------------------------------

    def _matrix(self, table: Table | None) -> Matrix | None:
        if table is None:
            return None
        sides = {}
        for side in ("left", "right"):
            sides[side] = table.take_texts(side)
            if not sides[side]:
                raise table.error(side, "names no NAT; give a list of presets or classes")
            for name in sides[side]:
                self._preset(table, side, name)
        table.end()
        return Matrix(sides["left"], sides["right"])

    def _check_matrix(self, nats: tuple[Nat, ...]) -> None:
        names = {nat.name for nat in nats}
        for side in ("left", "right"):
            if side not in names:
                problem = f"fills [nat.{side}], which this file does not have; add [nat.{side}]"
                raise self._table.error("matrix", problem)

    def _preset(self, table: Table, key: str, name: str) -> NatPreset:
        try:
            return find_nat(name)
        except ModelError as error:
            raise table.error(key, error.problem) from None

    def _nat(self, name: str, table: Table) -> list[Nat]:
        """Read one NAT; a preset that is a chain gives one more for each NAT further out."""
        preset = table.maybe_text("preset")
        class_name = table.maybe_text("class")
        if preset is not None and class_name is not None:
            raise table.error("class", 'give either "preset" or "class"')
        key = "preset" if preset is not None else "class"
        chosen = preset or class_name
        found = NatPreset(name="", claims="", seen_on="")
        if chosen is not None:
            found = self._preset(table, key, chosen)
        uplink = self._uplink(table, "behind")
        operator = table.take_int("operator", 1)
        behavior = self._record(table, NatBehavior, found.behavior)
        nat = Nat(name=name, behavior=behavior, uplink=uplink, operator=operator)
        return chain_of_preset(nat, found)

    def _record(self, table: Table, kind: type[_Record], base: _Record) -> _Record:
        """Read what is left of a table as a record of behaviour."""
        known = table.known_keys
        values = table.take_rest()
        try:
            return read_record(kind, values, "", base)
        except ModelError as error:
            path = [part for part in re.split(r": |\.", error.where) if part]
            problem = error.problem
            if problem.startswith("unknown key") and len(path) == 1:
                fields = [field.name for field in dataclasses.fields(cast("Any", kind))]
                problem = f"unknown key; {suggest(path[0], [*known, *fields])}"
            place = (*table.path, *path) if path and path[0] in values else table.path
            raise table.document.error(place, problem) from None

    def _host(self, name: str, table: Table) -> Host:
        if "uplinks" in table:
            inner = table.table_list("uplinks")
            if not inner:
                raise table.error("uplinks", "give at least one uplink")
            uplinks = tuple(self._uplink(item, "to", alone=True) for item in inner)
        else:
            uplinks = (self._uplink(table, "behind"),)
        table.end(["uplinks"])
        return Host(name=name, uplinks=uplinks)

    def _uplink(self, table: Table, key: str, *, alone: bool = False) -> Uplink:
        network = table.take_text(key, None if alone else INTERNET)
        link = self._link(table, "link")
        download = self._link(table, "download") if "download" in table else None
        if alone:
            table.end()
        return Uplink(network=network, link=link, download=download)

    def _link(self, table: Table, key: str, base: Link | None = None) -> Link:
        base = Link() if base is None else base
        if key not in table:
            table.pop(key)
            return base
        value = table.pop(key)
        if isinstance(value, str):
            try:
                return link_preset(value)
            except ModelError as error:
                raise table.error(key, error.problem) from None
        if not isinstance(value, dict):
            raise table.error(key, 'must be a link preset or a table such as { delay = "25ms" }')
        inner = Table(table.document, (*table.path, key), value)
        preset = inner.maybe_text("preset")
        if preset is not None:
            try:
                base = link_preset(preset)
            except ModelError as error:
                raise inner.error("preset", error.problem) from None
        return self._record(inner, Link, base)

    def _server(self, name: str, table: Table, services: list[Service]) -> Server:
        kinds = table.take_texts("services")
        services += [Service(name, table.choose("services", kind, ServiceKind)) for kind in kinds]
        server = Server(
            name=name,
            addresses=table.take_int("addresses", 1),
            ipv6=table.take_bool("ipv6", True),
            link=self._link(table, "link"),
        )
        table.end()
        return server

    def _located(self, error: ModelError) -> ScenarioError:
        """Give the model's complaint about an object the place that the object has here."""
        found = re.match(r'(nat|host|server) "([^"]*)"', error.where)
        if found is None:
            return ScenarioError(f"{self._name}: {error}")
        key = {"uplink.network": "behind", "uplinks[0].network": "behind"}.get(
            error.where.rpartition(": ")[2], ""
        )
        path = (found[1], found[2], key) if key else (found[1], found[2])
        return self._table.document.error(path, error.problem)

    # --- what runs -----------------------------------------------------------------------

    def _machine(self, table: Table, key: str, name: str, kind: str = "host") -> str:
        topology = self._topology
        known = {
            "host": [*topology.host_by_name, *topology.server_by_name],
            "nat": [*topology.nat_by_name],
            "link": [*topology.host_by_name, *topology.server_by_name, *topology.nat_by_name],
        }[kind]
        if name not in known:
            raise table.error(key, f'there is no {kind} "{name}"; {suggest(name, known)}')
        return name

    def _pattern(self, table: Table, key: str, text: str) -> re.Pattern[str]:
        try:
            return re.compile(text)
        except re.error as error:
            raise table.error(key, f"is not a regular expression: {error}") from None

    def _program(self, table: Table, earlier: list[Program]) -> Program:
        host = self._machine(table, "on", table.take_text("on"))
        name = table.take_text("name", host)
        if name in [program.name for program in earlier]:
            raise table.error(
                "name" if "name" in table else None,
                f'another program is called "{name}" already; give each a "name" of its own',
            )
        command = table.take_texts("cmd")
        python = table.take_text("python", "")
        if not command and not python:
            raise table.error(None, 'give "cmd" (a command line) or "python" (a Trio function)')
        if python and not re.fullmatch(r"[\w.]+:\w+", python):
            raise table.error("python", f'"{python}" is not of the form module:function')
        arguments = table.take_texts("args")
        ready, ready_seconds = None, DEFAULT_READY_SECONDS
        if table.holds_table("ready"):
            inner = table.maybe_table("ready")
            assert inner is not None
            ready = self._pattern(inner, "line", inner.take_text("line"))
            ready_seconds = inner.take_seconds("within", ready_seconds)
            inner.end()
        elif "ready" in table:
            ready = self._pattern(table, "ready", table.take_text("ready"))
        path = self._pattern(table, "path", table.take_text("path", PATH_PATTERN))
        latency = self._pattern(table, "latency", table.take_text("latency", LATENCY_PATTERN))
        table.end()
        for key, texts in (("cmd", command), ("args", arguments)):
            for text in texts:
                self._check_placeholders(table, key, text, earlier)
        return Program(
            name=name,
            host=host,
            command=command,
            python=python,
            arguments=arguments,
            ready=ready,
            ready_seconds=ready_seconds,
            path=path,
            latency=latency,
        )

    def _check_placeholders(
        self, table: Table, key: str, text: str, earlier: list[Program]
    ) -> None:
        known = {"seed", "directory"}
        for name in [*self._topology.host_by_name, *self._topology.server_by_name]:
            known |= {f"{name}.address", f"{name}.address6"}
        known |= {f"{name}.external" for name in self._topology.nat_by_name}
        for program in earlier:
            if program.ready is not None:
                known |= {f"{program.name}.{group}" for group in program.ready.groupindex}
        for found in PLACEHOLDER.findall(text):
            if found not in known:
                hint = suggest(found, known)
                raise table.error(key, f'nothing is called "${{{found}}}" here; {hint}')

    def _change(self, table: Table) -> Change:
        at = table.take_seconds("time")
        action = table.choose("do", table.take_text("do"), Action)
        kind = action.partition(".")[0]
        target = self._machine(table, "target", table.take_text("target"), kind)
        to = table.take_text("to", "")
        host, link = "", None
        if action is Action.HOST_MOVE:
            networks = [u.network for u in self._topology.host_by_name[target].uplinks]
            if to not in networks:
                raise table.error(
                    "to", f'"{target}" has no uplink to "{to}"; {suggest(to, networks)}'
                )
        elif action is Action.NAT_LOGIN:
            host = self._machine(table, "host", table.take_text("host"))
        elif action is Action.LINK_SET:
            if "link" not in table:
                raise table.error(None, 'the key "link" is missing, such as { loss = "5%" }')
            link = self._link(table, "link", self._link_of(target, to))
        table.end()
        return Change(at_seconds=at, action=action, target=target, to=to, host=host, link=link)

    def _link_of(self, owner: str, network: str) -> Link:
        topology = self._topology
        if owner in topology.server_by_name:
            return topology.server_by_name[owner].link
        if owner in topology.nat_by_name:
            return topology.nat_by_name[owner].uplink.link
        uplinks = topology.host_by_name[owner].uplinks
        return next((u.link for u in uplinks if network in ("", u.network)), uplinks[0].link)

    def _expectation(self, table: Table, duration: float, programs: list[Program]) -> Expectation:
        within = table.take_seconds("within", duration)
        after = table.take_seconds("after", 0.0)
        throughout = table.take_bool("throughout", False)
        text = table.take_text("that")
        table.end()
        if not after < within <= duration:
            raise table.error(
                "within",
                f'"after" ({after:g} s) < "within" ({within:g} s) <= duration ({duration:g} s) '
                "must hold",
            )
        try:
            expression = parse_expression(text, FUNCTIONS)
        except ExpressionError as error:
            raise table.error("that", str(error)) from None
        self._check_names(table, expression, [program.name for program in programs])
        return Expectation(
            that=expression, after_seconds=after, within_seconds=within, throughout=throughout
        )

    def _check_names(self, table: Table, expression: Expression, programs: list[str]) -> None:
        topology = self._topology
        machines = [*topology.host_by_name, *topology.server_by_name]
        known = {
            "program": programs,
            "nat": [*topology.nat_by_name],
            "place": [*machines, *topology.nat_by_name],
        }
        for call in find_calls(expression):
            for kind, argument in zip(NAME_ARGUMENTS[call.function], call.arguments, strict=False):
                names = known.get(kind)
                if names is not None and isinstance(argument, str) and argument not in names:
                    raise table.error(
                        "that",
                        f'{call.function}(): there is no {kind} "{argument}"; '
                        + suggest(argument, names),
                    )
