"""Scenario files: what they mean, and that every mistake names file, line, key and remedy."""

from __future__ import annotations

from importlib import resources

import pytest

from netlab.model import Filtering, Mapping, PortAssignment, PortRange
from netlab.scenario import Action, ServiceKind
from netlab.scenario_file import ScenarioError, parse_scenario

TEXT = """seed = 7
duration = "20s"
[nat.home]
preset = "home/linux"
[nat.office]
mapping = "apdm"
filtering = "apdf"
ports = { assignment = "random", ranges = [[2000, 2999]] }
lifetimes = { udp = "45s" }
[nat.far]
preset = "double"
[host.a]
behind = "home"
link = { delay = "25ms", loss = "0.5%", rate = "20Mbit/s" }
[host.b]
uplinks = [{ to = "office", link = "wifi" }, { to = "far" }]
[server.stun]
services = ["stun", "relay"]
addresses = 3
[[run]]
on = "a"
python = "netlab.node:node"
args = ["a", "b", "${stun.address}"]
ready = 'ready (?P<id>\\S+)'
[[run]]
on = "b"
cmd = ["dial", "${a.id}", "${home.external}", "${seed}"]
[[at]]
time = "5s"
do = "nat.reboot"
target = "home"
[[at]]
time = "2s"
do = "host.move"
target = "b"
to = "far"
[[at]]
time = "6s"
do = "link.set"
target = "a"
link = { loss = "5%" }
[[expect]]
within = "8s"
that = "path(a, b) == expected_path(a, b)"
"""


def test_a_whole_file() -> None:
    """Every part of a file arrives in the model."""
    scenario = parse_scenario(TEXT, "office.toml")
    topology = scenario.topology
    assert topology.seed == 7
    office = topology.nat_by_name["office"].behavior
    assert (office.mapping, office.filtering) == (Mapping.APDM, Filtering.APDF)
    assert office.ports.assignment is PortAssignment.RANDOM
    assert office.ports.ranges == (PortRange(2000, 2999),)
    assert office.lifetimes.udp_seconds == 45.0
    link = topology.host_by_name["a"].uplinks[0].link
    assert (link.delay_seconds, link.loss, link.rate_bits_per_second) == (0.025, 0.005, 20e6)
    assert [uplink.network for uplink in topology.host_by_name["b"].uplinks] == ["office", "far"]
    assert {service.kind for service in scenario.services} == {
        ServiceKind.STUN,
        ServiceKind.RELAY,
    }
    assert scenario.needs_kernel
    assert [change.action for change in scenario.changes] == [
        Action.HOST_MOVE,
        Action.NAT_REBOOT,
        Action.LINK_SET,
    ]
    assert scenario.adjustable == {"a"}


def test_a_preset_that_is_a_chain_gives_every_nat_of_it() -> None:
    """The innermost has the name; the other stands between it and its uplink."""
    topology = parse_scenario(TEXT).topology
    assert topology.nat_by_name["far"].uplink.network == "far.outer"
    assert topology.nat_by_name["far.outer"].behavior.mapping is Mapping.APDM
    assert [nat.name for nat in topology.nats_towards_internet("far")] == ["far", "far.outer"]


def test_link_set_changes_only_what_it_names() -> None:
    """The delay of the link stays when its loss is set."""
    change = next(c for c in parse_scenario(TEXT).changes if c.action is Action.LINK_SET)
    assert change.link is not None
    assert (change.link.delay_seconds, change.link.loss) == (0.025, 0.05)


@pytest.mark.parametrize(
    ("good", "bad", "message"),
    [
        ("seed = 7", "sede = 7", ':1: sede: unknown key; did you mean "seed"'),
        ("home/linux", "home/linus", ':4: nat.home.preset: .*did you mean "home/linux"'),
        ('"apdm"', '"apdn"', ":6: nat.office.mapping: 'apdn' .*did you mean \"apdm\""),
        ("mapping =", "maping =", ':6: nat.office.maping: unknown key; did you mean "mapping"'),
        ('= "random"', '= "rand"', ":8: nat.office.ports.assignment: .*random"),
        ('behind = "home"', 'behind = "hme"', ':13: host.a.behind: .*did you mean "home"'),
        ('"25ms"', '"5 parsecs"', ":14: host.a.link.delay: "),
        ('"wifi"', '"wiffi"', r':16: host.b.uplinks\[0\].link: .*did you mean "wifi"'),
        ('"stun", "relay"', '"sturn"', ':18: server.stun.services: .*did you mean "stun"'),
        ('on = "a"', 'on = "q"', r':21: run\[0\].on: there is no host "q"'),
        ('"netlab.node:node"', '"node"', r":22: run\[0\].python: .*module:function"),
        ("${stun.", "${stum.", r':23: run\[0\].args: .*did you mean "stun.address"'),
        ("ready (?P", "ready ((?P", r":24: run\[0\].ready: is not a regular expression"),
        ("${a.id}", "${a.key}", r":27: run\[1\].cmd: nothing is called"),
        ("nat.reboot", "nat.reboto", r':30: at\[0\].do: .*did you mean "nat.reboot"'),
        ('target = "home"', 'target = "homer"', r':31: at\[0\].target: .*did you mean "home"'),
        ('to = "far"\n[[at]]', 'to = "home"\n[[at]]', r":36: at\[1\].to: .*no uplink"),
        ('within = "8s"', 'within = "80s"', r":43: expect\[0\].within: "),
        ("path(a", "path(z", r':44: expect\[0\].that: .*there is no program "z"'),
        ("path(a", "pth(a", r':44: expect\[0\].that: .*did you mean "path"'),
        ('on = "b"', 'on = "a"', r':25: run\[1\]: another program is called "a"'),
        ('cmd = ["dial"', 'ready = ["dial"', 'give "cmd"'),
        ("[nat.home]", "[nat.home]\nports = { step = 0 }", "nat.home.ports.step: 0 would"),
        (
            "[nat.home]",
            "[nat.home]\nfirewall = { udp_ports = [53, 70000] }",
            "nat.home.firewall.udp_ports: 70000 is not within 1-65535",
        ),
        ("seed = 7", "seed = ", ":1: not valid TOML"),
        ("seed = 7", "seed = true", ":1: seed: must be a whole number, not true or false"),
    ],
)
def test_mistakes(good: str, bad: str, message: str) -> None:
    """The error names the file, the line, the key, and the nearest valid name."""
    assert good in TEXT
    with pytest.raises(ScenarioError, match="^office.toml.*" + message):
        parse_scenario(TEXT.replace(good, bad, 1), "office.toml")


def test_a_matrix_makes_a_scenario_of_every_pair() -> None:
    """The NATs of the matrix take the places of left and right."""
    text = """
    matrix = { left = ["home/linux", "EIM+EIF"], right = ["cgn/strict"] }
    [nat.left]
    [nat.right]
    """
    cells = list(parse_scenario(text).cells())
    assert [cell.cell for cell in cells] == [
        ("home/linux", "cgn/strict"),
        ("EIM+EIF", "cgn/strict"),
    ]
    assert cells[1].topology.nat_by_name["left"].behavior.filtering is Filtering.EIF


def test_a_chain_in_a_matrix_keeps_all_of_its_nats() -> None:
    """A preset that is two NATs in series is two NATs in a cell as well."""
    text = "matrix = { left = ['double'], right = ['EIM+EIF'] }\n[nat.left]\n[nat.right]\n"
    (cell,) = parse_scenario(text).cells()
    assert [nat.name for nat in cell.topology.nats_towards_internet("left")] == [
        "left",
        "left.outer",
    ]


def test_a_matrix_needs_its_nats() -> None:
    """Without [nat.left] the matrix has no place to fill."""
    with pytest.raises(ScenarioError, match=r"f:2: matrix: .*add \[nat.right\]"):
        parse_scenario("[nat.left]\n[matrix]\nleft = ['EIM+EIF']\nright = ['EIM+EIF']", "f")


@pytest.mark.parametrize(
    "name", [p.name for p in (resources.files("netlab") / "scenarios").iterdir()]
)
def test_the_examples_are_valid(name: str) -> None:
    """Every scenario that comes with the lab parses and says in its first line what it is."""
    text = (resources.files("netlab") / "scenarios" / name).read_text()
    parse_scenario(text, name)
    assert text.startswith("# ")
