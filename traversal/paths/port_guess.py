"""Which ports of a hard NAT to guess, in which order, and what the chances are.

Pure arithmetic. A NAT that picks ports at random picks them from 1024 to 65535, unless it is a
carrier's, which gives each subscriber a block (RFC 6888, RFC 7422): then a few ports that were
seen lie close together, and nearly all the chances are near them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Final

from traversal.keys import Entropy
from traversal.wire.punching import PortRange

FIRST_PORT: Final = 1024
LAST_PORT: Final = 65535
ALL_PORTS: Final = (FIRST_PORT, LAST_PORT)
MAX_BLOCK: Final = 16384
"""Seen ports that lie further apart than this say nothing about a block. Six uniform ports of the
whole range lie within a quarter of it once in 220 times, and then only the order is worse."""
MIN_SAMPLES_FOR_BLOCK: Final = 4
MIN_SOCKETS: Final = 16
MAX_SOCKETS: Final = 256
"""256 sockets and as many guesses meet with 64 % (birthday arithmetic, NAT behaviours 8). More
would be most of the descriptors that a process may open by default (1024) and would fill small
NAT tables."""
SHARE_OF_BLOCK: Final = 8
"""Of a block we take an eighth at most, since the subscriber's other programs live in it too; of
512 ports that is 64, and a guess hits once in eight times."""
LEAD: Final = 48
"""Ports beyond the last one known that count as likely, in steps: what other hosts' flows take
while a measurement travels (0.3 s at 150 new flows a second)."""

Samples = Sequence[int]


def size_of(ports: PortRange) -> int:
    """How many ports a range has."""
    return ports[1] - ports[0] + 1


def likely_ranges(samples: Samples) -> tuple[PortRange, ...]:
    """Where a NAT's random ports lie, judged by some that it gave out; likely ranges first.

    Of k uniform ports the extremes miss the ends of the block by span / (k - 1) on average; three
    times that on either side holds 95 % of cases. The rest of all ports comes last.
    """
    if len(samples) < MIN_SAMPLES_FOR_BLOCK or max(samples) - min(samples) >= MAX_BLOCK:
        return (ALL_PORTS,)
    low, high = min(samples), max(samples)
    margin = max(16, 3 * math.ceil((high - low) / (len(samples) - 1)))
    below, above = max(FIRST_PORT, low - margin), min(LAST_PORT, high + margin)
    ranges = [(low, high), (below, low - 1), (high + 1, above)]
    ranges += [(FIRST_PORT, below - 1), (above + 1, LAST_PORT)]
    return tuple(ports for ports in ranges if 0 < ports[0] <= ports[1])


def sockets_for(samples: Samples) -> int:
    """How many sockets a birthday search opens towards a NAT that gave out these ports."""
    core = likely_ranges(samples)[0]
    if core == ALL_PORTS:
        return MAX_SOCKETS
    whole = size_of(core) * (len(samples) + 1) / max(1, len(samples) - 1)
    return max(MIN_SOCKETS, min(MAX_SOCKETS, int(whole) // SHARE_OF_BLOCK))


def predicted_range(last: int, step: int, sockets: int) -> PortRange:
    """Where the next `sockets` mappings of a sequential NAT will lie that gave out `last` just now.

    Always within 1 to 65535: at the ends the NAT wraps around to somewhere we do not know.
    """
    ends = (last + step, last + step * (sockets + LEAD))
    low, high = min(ends), max(ends)
    return max(1, min(low, LAST_PORT)), max(1, min(high, LAST_PORT))


def guesses(ranges: Sequence[PortRange], entropy: Entropy, *, step: int = 0) -> Iterator[int]:
    """Every port of the ranges once, range by range.

    With a step the first range is walked in steps from the end where mappings began, then what
    the steps left out. Without, ports come spread over the range: against uniform ports every
    order is as good, and against clustered ones a spread one is better than a scan.
    """
    for place, ports in enumerate(ranges):
        yield from _walk(ports, step) if step and not place else _spread(ports, entropy)


def hit_probability(sockets: int, guessed: int, ports: int) -> float:
    """That one of `guessed` different ports is one of `sockets` among `ports` equally likely."""
    if sockets + guessed > ports:
        return 1.0
    miss = 0.0
    for i in range(min(sockets, guessed)):
        miss += math.log1p(-max(sockets, guessed) / (ports - i))
    return 1.0 - math.exp(miss)


def _walk(ports: PortRange, step: int) -> Iterator[int]:
    low, high = ports
    stride = abs(step)
    for offset in range(stride):
        if step > 0:
            yield from range(low + offset, high + 1, stride)
        else:
            yield from range(high - offset, low - 1, -stride)


def _spread(ports: PortRange, entropy: Entropy) -> Iterator[int]:
    low, size = ports[0], size_of(ports)
    position = int.from_bytes(entropy(4), "big") % size
    # A stride near the golden section spreads best; coprime, it visits every port once.
    stride = max(1, int(size * 0.618) - entropy(1)[0] % max(1, size // 8))
    while math.gcd(stride, size) != 1:
        stride += 1
    for _ in range(size):
        yield low + position
        position = (position + stride) % size
