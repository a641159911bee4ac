"""Several processes that share the relay's port.

CPython's threads don't run Python code side by side, so more cores means more processes. Each
worker is a `Service` with its own listening sockets on the shared port (SO_REUSEPORT); workers
reach each other's clients over Unix sockets by the mesh frames of the protocol itself.

The parent (`WorkerPool`) holds the listening sockets, so that connections which arrive while a
worker is restarted wait in its backlog, and talks to each worker over its standard input and
output (`relay.worker_pipe`). A worker whose parent is gone sees the end of its input and ends.
"""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import Any, Final

import msgspec
import trio

from relay.certificate_files import load_or_create_self_signed
from relay.config import Config
from relay.service import Identity
from relay.snapshot import MAX_CLIENTS, Snapshot, merge, without_gauges
from relay.worker_pipe import (
    Command,
    WorkerError,
    WorkerStart,
    receive_message,
    send_message,
)

logger = logging.getLogger("underpass.relay.workers")

REPLY_TIMEOUT_SECONDS: Final = 5.0
FIRST_RESTART_SECONDS: Final = 0.2
MAX_RESTART_SECONDS: Final = 5.0
STEADY_SECONDS: Final = 30.0
"""A worker that ran this long is restarted without delay when it dies."""
STOP_SECONDS: Final = 3.0
DRAIN_POLL_SECONDS: Final = 0.2


class WorkerPool:
    """The parent's side: starts, restarts and commands the workers.

    Args:
        listeners: for each worker, its listening sockets; this object closes them.
    """

    def __init__(
        self, config: Config, identity: Identity, listeners: Sequence[Sequence[socket.socket]]
    ) -> None:
        self._config = config
        self._identity = identity
        self._listeners = listeners
        self._workers: dict[int, _Worker] = {}
        self._directory = tempfile.TemporaryDirectory(prefix="underpass-relay-")
        if config.tls.mode == "self-signed":
            # Made before they start: all workers must show the same certificate.
            tls = config.tls
            if not tls.directory:
                tls = msgspec.structs.replace(tls, directory=self._directory.name)
                self._config = msgspec.structs.replace(config, tls=tls)
            load_or_create_self_signed(tls.directory, config.server.hostname)
        self._last: dict[int, Snapshot] = {}
        self._ended: list[Snapshot] = []
        self._stopping = False

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Keep all workers running until cancelled; started when each of them serves."""
        try:
            async with trio.open_nursery() as nursery:
                async with trio.open_nursery() as starting:
                    for index in range(len(self._listeners)):
                        starting.start_soon(nursery.start, self._keep_running, index)
                task_status.started()
        finally:
            for sockets in self._listeners:
                for sock in sockets:
                    sock.close()
            self._directory.cleanup()

    async def drain(self, seconds: float) -> None:
        """As `Service.drain`, all workers at once."""
        self._stopping = True
        await self._tell_all(Command("drain", (seconds,)))
        deadline = trio.current_time() + seconds
        while trio.current_time() < deadline:
            if not any(each.connections.current for each in await self.snapshots(0)):
                return
            await trio.sleep(DRAIN_POLL_SECONDS)

    async def reconfigure(self, config: Config) -> None:
        """As `Service.reconfigure`. Raises WorkerError if a worker can't."""
        await self._tell_all(Command("reconfigure", (share_of(config, len(self._listeners)),)))
        self._config = config

    async def reload_files(self) -> None:
        """As `Service.reload_files`."""
        await self._tell_all(Command("reload_files"))

    async def revoke(self, key: bytes, reason: str) -> int:
        """As `Service.revoke`; the sum over all workers."""
        counts = await self._tell_all(Command("revoke", (key, reason)))
        return sum(counts.values())

    async def snapshots(self, max_clients: int = MAX_CLIENTS) -> list[Snapshot]:
        """One per worker that answers. Raises WorkerError if none does."""
        replies = await self._tell_all(Command("snapshot", (max_clients,)))
        silent = [last for index, last in self._last.items() if index not in replies]
        self._last.update(replies)
        return [*replies.values(), *map(without_gauges, silent), *self._ended]

    async def _tell_all(self, command: Command) -> dict[int, Any]:
        """The replies by worker. Raises WorkerError if there is none.

        A worker that does not answer in time hangs: it is killed, and restarted as any other.
        """
        replies: dict[int, Any] = {}
        problems: list[str] = []

        async def tell(worker: _Worker) -> None:
            with trio.move_on_after(REPLY_TIMEOUT_SECONDS) as timeout:
                try:
                    replies[worker.index] = await worker.request(command)
                except WorkerError as error:
                    problems.append(str(error))
            if timeout.cancelled_caught:
                problems.append(f"worker {worker.index} did not answer in time and is killed")
                worker.process.kill()

        async with trio.open_nursery() as nursery:
            for worker in list(self._workers.values()):
                nursery.start_soon(tell, worker)
        if problems and not replies:
            raise WorkerError("; ".join(problems))
        for problem in problems:
            logger.warning("%s: %s", command.name, problem)
        return replies

    async def _keep_running(
        self, index: int, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        delay = FIRST_RESTART_SECONDS
        first = True
        while True:
            began = trio.current_time()
            worker = _Worker(index, self._start_of(index))
            try:
                await worker.start()
                self._workers[index] = worker
                if first:
                    task_status.started()
                    first = False
                end = f"ended (status {await worker.process.wait()})"
            except (WorkerError, OSError) as error:
                if first:
                    raise
                end = f"could not be restarted ({error})"
            finally:
                self._workers.pop(index, None)
                with trio.CancelScope(shield=True):
                    await worker.stop()
            if index in self._last:
                # What it counted last stays in the sums.
                ended = without_gauges(self._last.pop(index))
                self._ended = [merge([*self._ended, ended])]
            if self._stopping:
                return
            if trio.current_time() - began > STEADY_SECONDS:
                delay = FIRST_RESTART_SECONDS
            logger.error("worker %d %s; restarting in %.1f s", index, end, delay)
            await trio.sleep(delay)
            delay = min(2 * delay, MAX_RESTART_SECONDS)

    def _start_of(self, index: int) -> WorkerStart:
        paths = [
            os.path.join(self._directory.name, f"worker-{number}.sock")
            for number in range(len(self._listeners))
        ]
        return WorkerStart(
            index=index,
            config=share_of(self._config, len(self._listeners)),
            identity=self._identity,
            listener_fds=tuple(sock.fileno() for sock in self._listeners[index]),
            sibling_path=paths[index],
            sibling_paths=tuple(path for path in paths if path != paths[index]),
        )


def share_of(config: Config, workers: int) -> Config:
    """What one of so many workers is told: memory and accept rate are divided.

    Connections are not: a worker that was restarted has few for a while, and the others must take
    those that it lost.
    """
    limits = config.limits
    rate = limits.accept_rate_per_second
    limits = msgspec.structs.replace(
        limits,
        memory_bytes=limits.memory_bytes // workers,
        accept_rate_per_second=None if rate is None else rate / workers,
        accept_burst=-(-limits.accept_burst // workers),
    )
    return msgspec.structs.replace(config, limits=limits)


class _Worker:
    """The parent's handle on one worker process. One request at a time."""

    def __init__(self, index: int, start: WorkerStart) -> None:
        self.index = index
        self.process: trio.Process
        self._start = start
        self._lock = trio.Lock()

    async def start(self) -> None:
        """Start the process and wait until it serves. Raises WorkerError."""
        self.process = await trio.lowlevel.open_process(
            [sys.executable, "-m", "relay.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=self._start.listener_fds,
        )
        await self.request(self._start)

    async def request(self, message: WorkerStart | Command) -> Any:
        """What the worker answers. Raises WorkerError."""
        assert self.process.stdin is not None
        async with self._lock:
            try:
                await send_message(self.process.stdin, message)
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                raise WorkerError(f"worker {self.index} is gone") from None
            return await self._receive_reply()

    async def stop(self) -> None:
        """End the process, by force if it takes too long."""
        if not hasattr(self, "process"):
            return
        assert self.process.stdin is not None
        await self.process.stdin.aclose()
        with trio.move_on_after(STOP_SECONDS):
            await self.process.wait()
        if self.process.returncode is None:
            self.process.kill()
            await self.process.wait()
        assert self.process.stdout is not None
        await self.process.stdout.aclose()

    async def _receive_reply(self) -> Any:
        assert self.process.stdout is not None
        reply = await receive_message(self.process.stdout)
        if reply is None:
            raise WorkerError(f"worker {self.index} is gone")
        if isinstance(reply, WorkerError):
            raise reply
        return reply[0]
