"""The parent of the workers: what each is told, and that it outlives their troubles."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from relay.config import Config
from relay.listeners import open_listeners
from relay.service import Identity
from relay.workers import WorkerPool, share_of
from tests.relay.arena import new_key
from traversal.keys import MeshKey


@asynccontextmanager
async def pool(config: Config) -> AsyncIterator[WorkerPool]:
    """Running workers."""
    address = config.listen.derp[0]
    listeners = [open_listeners(address, reuse_port=True) for _ in range(config.server.workers)]
    subject = WorkerPool(config, Identity(new_key(), MeshKey.generate(os.urandom)), listeners)
    async with trio.open_nursery() as nursery:
        await nursery.start(subject.run)
        yield subject
        nursery.cancel_scope.cancel()


async def until_logged(caplog: pytest.LogCaptureFixture, text: str) -> None:
    deadline = trio.current_time() + 20
    while text not in caplog.text:
        assert trio.current_time() < deadline, caplog.text
        await trio.sleep(0.02)


def children() -> set[int]:
    """The processes that this one has started; they belong to the thread that did."""
    lists = Path("/proc/self/task").glob("*/children")
    return {int(child) for children in lists for child in children.read_text().split()}


async def test_a_worker_that_can_not_be_restarted_is_tried_again(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever keeps it from starting, the others go on, and it comes back when that is over."""
    caplog.set_level(logging.INFO)
    others = children()
    async with pool(Config.dev({"server.workers": 2})) as subject:
        assert len(await subject.snapshots(0)) == 2
        victim = min(children() - others)
        monkeypatch.setattr("sys.executable", "/bin/false")
        os.kill(victim, signal.SIGKILL)
        await until_logged(caplog, "could not be restarted")
        assert sum(each.workers for each in await subject.snapshots(0)) == 1
        monkeypatch.undo()
        deadline = trio.current_time() + 20
        while sum(each.workers for each in await subject.snapshots(0)) < 2:
            assert trio.current_time() < deadline
            await trio.sleep(0.05)


def test_workers_share_memory_and_accept_rate() -> None:
    """Both bounds are for the relay, however many processes it has."""
    config = Config.dev(
        {
            "limits.memory_bytes": 8 << 20,
            "limits.accept_rate_per_second": 10,
            "limits.accept_burst": 5,
        }
    )
    for workers, expected in ((1, (8 << 20, 10, 5)), (4, (2 << 20, 2.5, 2))):
        limits = share_of(config, workers).limits
        shares = (limits.memory_bytes, limits.accept_rate_per_second, limits.accept_burst)
        assert shares == expected
