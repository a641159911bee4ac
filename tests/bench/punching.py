"""Success rates and times of the port searches, in virtual time against modeled NATs.

    python -m tests.bench.punching [--seeds 50]

Times are from the first datagram until both nodes send directly; the round trip is 60 ms direct
and 100 ms by relay.
"""

from __future__ import annotations

import argparse
import statistics

from tests.traversal.paths.punch_arena import CELLS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=50)
    parser.add_argument("--only", default="")
    options = parser.parse_args()
    print(f"{'pair':48} {'direct':>8} {'median':>7} {'95th':>7} {'probes':>7} {'most':>6}  goal")
    for cell in CELLS:
        if options.only not in cell.name:
            continue
        times, packets = [], []
        for seed in range(options.seeds):
            arena, seconds = cell.play(seed)
            packets.append(max(arena.a.packets, arena.b.packets))
            if seconds is not None:
                times.append(seconds)
        times.sort()
        middle = f"{statistics.median(times):.2f} s" if times else "-"
        late = f"{times[int(len(times) * 0.95)]:.2f} s" if times else "-"
        print(
            f"{cell.name:48} {len(times):4}/{options.seeds:<3} {middle:>7} {late:>7}"
            f" {statistics.median(packets):7.0f} {max(packets):6}  {cell.goal}"
        )


if __name__ == "__main__":
    main()
