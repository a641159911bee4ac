"""Records from tables: units, nesting, and errors that name the key and the nearest name."""

from __future__ import annotations

import pytest

from netlab.model import Filtering, Link, ModelError, NatBehavior, PortAssignment, PortRange
from netlab.presets import class_behavior, link_preset, nat_preset, nat_presets
from netlab.punch import CLASSES
from netlab.records import read_record


def test_units_and_nesting() -> None:
    """Quantities with units, enums, nested tables and lists become a record."""
    link = read_record(
        Link, {"delay": "25ms", "loss": "0.5%", "rate": "50Mbit/s", "jitter_seconds": 1}, "link"
    )
    assert link == Link(
        delay_seconds=0.025, loss=0.005, rate_bits_per_second=50e6, jitter_seconds=1.0
    )
    nat = read_record(
        NatBehavior,
        {
            "filtering": "adf",
            "lifetimes": {"udp": "2min", "udp_by_port": [[53, 10]]},
            "ports": {"assignment": "random", "ranges": [[1000, 1999]]},
        },
        "nat",
    )
    assert nat.filtering is Filtering.ADF
    assert nat.lifetimes.udp_seconds == 120.0
    assert nat.lifetimes.udp_by_port == ((53, 10.0),)
    assert nat.ports.assignment is PortAssignment.RANDOM
    assert nat.ports.ranges == (PortRange(1000, 1999),)


def test_base_is_kept() -> None:
    """What a table leaves out stays as in the base, in nested tables too."""
    base = nat_preset("office/pf").behavior
    changed = read_record(NatBehavior, {"ports": {"step": 2}}, "nat", base)
    assert changed.mapping is base.mapping
    assert changed.ports.preserved == (500,)
    assert changed.ports.step == 2


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"filterin": "adf"}, 'nat "x": filterin: unknown key; did you mean "filtering"?'),
        ({"filtering": "adff"}, 'did you mean "adf"?'),
        ({"lifetimes": {"udp": "2 parsecs"}}, 'nat "x": lifetimes: udp: '),
        ({"addresses": 1.5}, "no whole number"),
        ({"addresses": 0}, 'nat "x": addresses: 0 is not within'),
        ({"carrier": 1}, "is no yes or no"),
        ({"ports": {"ranges": [[5, 1]]}}, "5-1 is not within"),
        ({"ports": 7}, "is no table"),
    ],
)
def test_errors(table: dict[str, object], message: str) -> None:
    """Each mistake names object, key and remedy."""
    with pytest.raises(ModelError) as caught:
        read_record(NatBehavior, table, 'nat "x"')
    assert message in str(caught.value)


def test_presets_load() -> None:
    """Every preset is well-formed, and chains name presets that exist."""
    for preset in nat_presets().values():
        assert preset.claims in {*CLASSES, "no-udp", "portal"}
        assert preset.behind is None or preset.behind in nat_presets()
    assert link_preset("leo").burst_seconds == 0.2
    with pytest.raises(ModelError, match='did you mean "home/linux"'):
        nat_preset("home/linus")
    with pytest.raises(ModelError, match='did you mean "wifi"'):
        link_preset("wify")
    assert class_behavior("adm+eif").class_name == "ADM+EIF"
    with pytest.raises(ModelError, match="unknown"):
        class_behavior("EIM")
