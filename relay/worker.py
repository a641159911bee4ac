"""One worker process: `python -m relay.worker`, started by `relay.workers.WorkerPool` only."""

from __future__ import annotations

import logging
import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import trio

from relay.config import Config
from relay.logs import set_level, set_up_logging
from relay.service import Service
from relay.worker_pipe import WorkerError, WorkerStart, receive_message, send_message

logger = logging.getLogger("underpass.relay.worker")


async def _serve_worker() -> None:
    commands = trio.lowlevel.FdStream(os.dup(0))
    replies = trio.lowlevel.FdStream(os.dup(1))
    start = await receive_message(commands)
    if start is None:
        return
    assert isinstance(start, WorkerStart)
    set_up_logging(start.config.log, prefix=f"worker {start.index}: ")
    service = Service(
        start.config,
        start.identity,
        [socket.socket(fileno=fd) for fd in start.listener_fds],
        sibling_listener=_listen_for_siblings(start.sibling_path),
        siblings=[Path(path) for path in start.sibling_paths],
    )

    async def reconfigure(config: Config) -> None:
        await service.reconfigure(config)
        set_level(config.log)

    methods: dict[str, Callable[..., Any]] = {
        "reconfigure": reconfigure,
        "reload_files": service.reload_files,
        "revoke": service.revoke,
        "snapshot": service.snapshot,
    }
    async with trio.open_nursery() as nursery:
        # Draining takes long, and the worker goes on answering meanwhile.
        methods["drain"] = lambda seconds: nursery.start_soon(service.drain, seconds)
        await nursery.start(service.run)
        await send_message(replies, (None,))
        while (command := await receive_message(commands)) is not None:
            await send_message(replies, await _carry_out(methods[command.name], command.arguments))
        nursery.cancel_scope.cancel()


def _listen_for_siblings(path: str) -> socket.socket:
    Path(path).unlink(missing_ok=True)  # of a worker that died
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen()
    listener.setblocking(False)
    return listener


async def _carry_out(method: Callable[..., Any], arguments: tuple[Any, ...]) -> object:
    try:
        result = method(*arguments)
        if hasattr(result, "__await__"):
            result = await result
    except Exception as error:  # whatever it is, the parent must hear of it and the worker go on
        logger.exception("a command of the parent failed")
        return WorkerError(str(error))
    return (result,)


def _main() -> None:
    # A terminal's interrupt goes to all processes of its group; the parent decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    trio.run(_serve_worker)


if __name__ == "__main__":
    _main()
