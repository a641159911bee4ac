"""What a simulated internet changes in Trio while it runs: the order of tasks, and clock jumps.

Both reach into private parts of Trio, which is why they are together here; `trio.testing` offers
neither. A test of repeatability fails where a later Trio has changed them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import trio._core._run as trio_run
from trio.testing import MockClock

from netlab.simulated.world import World


@contextmanager
def repeatable_schedule(seed: object) -> Iterator[None]:
    """Run tasks that are ready at the same instant in an order drawn from `seed`.

    Trio shuffles them on purpose and offers no public seed. Its own Hypothesis plugin sets the
    same two private names; where a later Trio has renamed them this raises AttributeError, since
    a simulation that silently stopped being repeatable would be worse.
    """
    generator = trio_run._r
    before = (trio_run._ALLOW_DETERMINISTIC_SCHEDULING, generator.getstate())
    trio_run._ALLOW_DETERMINISTIC_SCHEDULING = True  # type: ignore[misc]  # Final for type checks
    generator.seed(f"schedule {seed}")
    try:
        yield
    finally:
        trio_run._ALLOW_DETERMINISTIC_SCHEDULING = before[0]  # type: ignore[misc]
        generator.setstate(before[1])


@contextmanager
def driven_by_clock(world: World) -> Iterator[None]:
    """Let a jumping `MockClock` carry out the world's future events itself.

    Otherwise every instant at which a packet moves costs two turns of Trio's loop to wake the
    pump. Driven, a packet crosses links and NATs without waking any task before it arrives. With
    any other clock nothing changes, and the pump does all the work.
    """
    runner = trio_run.GLOBAL_RUN_CONTEXT.runner
    clock = runner.clock
    if not isinstance(clock, MockClock) or clock.autojump_threshold > 0:
        yield
        return

    def jump() -> None:
        while not runner.runq:
            wake = world.next_wake
            if wake == math.inf or wake > runner.deadlines.next_deadline():
                MockClock._autojump(clock)
                return
            clock.jump(max(0.0, wake - clock.current_time()))
            world.run_due()

    world.is_driven = True
    clock._autojump = jump  # type: ignore[method-assign]  # on this instance, undone below
    try:
        yield
    finally:
        world.is_driven = False
        del clock._autojump
