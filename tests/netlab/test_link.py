"""Links: statistics of the impairments, order, rate, MTU."""

from __future__ import annotations

import itertools
import random

import pytest

from netlab.drops import Answer, Drop, DropReason
from netlab.link import LinkDirection
from netlab.model import Link

PACKETS = 20_000


def send_many(
    link: Link, interval: float = 0.001, seed: int = 1
) -> list[tuple[float, tuple[float, ...] | Drop]]:
    """Send packets of 100 bytes at a fixed rate."""
    direction = LinkDirection(link, random.Random(seed))
    return [(i * interval, direction.send(i * interval, 100)) for i in range(PACKETS)]


def losses(link: Link) -> list[int]:
    """Return the numbers of the packets that were lost."""
    return [n for n, (_, out) in enumerate(send_many(link)) if isinstance(out, Drop)]


def test_plain_link_only_delays() -> None:
    """Without impairments each packet arrives once, after exactly the delay."""
    for sent, out in send_many(Link(delay_seconds=0.025)):
        assert out == (sent + 0.025,)


def test_loss_rate() -> None:
    """Loss of 5 % loses 5 % of the packets, within 4 standard deviations."""
    lost = len(losses(Link(loss=0.05)))
    assert abs(lost - 0.05 * PACKETS) < 4 * (PACKETS * 0.05 * 0.95) ** 0.5


def test_bursts_are_blackouts() -> None:
    """A bad period of 200 ms at 1000 packets a second loses some 200 packets in a row."""
    lost = losses(Link(burst_probability=0.001, burst_seconds=0.2))
    runs = [1]
    for before, after in itertools.pairwise(lost):
        if after == before + 1:
            runs[-1] += 1
        else:
            runs.append(1)
    assert len(runs) > 5
    # The last one may be cut off; two may touch.
    assert all(run >= 199 for run in runs[:-1])


def test_duplication_rate() -> None:
    """Duplication of 10 % delivers 10 % of the packets twice."""
    copies = [len(out) for _, out in send_many(Link(duplication=0.1)) if not isinstance(out, Drop)]
    assert set(copies) == {1, 2}
    assert abs(copies.count(2) - 0.1 * PACKETS) < 4 * (PACKETS * 0.09) ** 0.5


@pytest.mark.parametrize("reorder", [False, True])
def test_jitter(reorder: bool) -> None:
    """Jitter stays within its bounds, and overtakes only where reordering is allowed."""
    out = send_many(Link(delay_seconds=0.025, jitter_seconds=0.005, reorder=reorder))
    arrivals = []
    for sent, times in out:
        assert not isinstance(times, Drop)
        assert sent + 0.02 <= times[0] <= sent + 0.03 + 1e-9
        arrivals.append(times[0])
    assert (arrivals != sorted(arrivals)) == reorder


def test_rate_and_queue() -> None:
    """A full queue delays by its length and drops the rest; the goodput is the rate."""
    link = Link(rate_bits_per_second=400_000, queue_seconds=0.1)  # offered: 800 kbit/s
    out = send_many(link)
    delivered = [(sent, times[0]) for sent, times in out if not isinstance(times, Drop)]
    reasons = {drop.reason for _, drop in out if isinstance(drop, Drop)}
    assert reasons == {DropReason.QUEUE_FULL}
    goodput = len(delivered) * 800 / delivered[-1][1]
    assert goodput == pytest.approx(400_000, rel=0.01)
    assert max(arrived - sent for sent, arrived in delivered) <= 0.1 + 0.002 + 1e-9


@pytest.mark.parametrize("black_hole", [False, True])
def test_mtu(black_hole: bool) -> None:
    """What is too big is answered, or vanishes in a black hole."""
    link = Link(mtu_bytes=1280, mtu_black_hole=black_hole)
    direction = LinkDirection(link, random.Random(1))
    assert direction.send(0.0, 1280) == (0.0,)
    drop = direction.send(0.0, 1281)
    assert isinstance(drop, Drop)
    assert drop.reason is DropReason.TOO_BIG
    assert drop.answer is (Answer.NONE if black_hole else Answer.TOO_BIG)
    assert "1281 > 1280" in drop.text


def test_seed_decides() -> None:
    """The same seed gives the same fate to every packet; another seed another one."""
    link = Link(loss=0.3, jitter_seconds=0.01, duplication=0.1)
    assert send_many(link, seed=4) == send_many(link, seed=4)
    assert send_many(link, seed=4) != send_many(link, seed=5)


def test_down() -> None:
    """A link that is down drops, and works again afterwards."""
    direction = LinkDirection(Link(), random.Random(1))
    direction.up = False
    drop = direction.send(0.0, 100)
    assert isinstance(drop, Drop)
    assert drop.reason is DropReason.LINK_DOWN
    direction.up = True
    assert direction.send(1.0, 100) == (1.0,)
