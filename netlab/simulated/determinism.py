"""Make Trio's scheduler repeatable for as long as a simulated internet runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import trio._core._run as trio_run


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
