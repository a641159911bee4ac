"""What the parent and its workers say to each other over pipes.

Each message is a length and a pickle; both ends are this program, started by the same user.
"""

from __future__ import annotations

import pickle
import struct
from dataclasses import dataclass
from typing import Any, Final

import trio

from relay.config import Config
from relay.service import Identity

_LENGTH: Final = struct.Struct(">I")
_MAX_MESSAGE: Final = 64 << 20


@dataclass(frozen=True, slots=True)
class WorkerStart:
    """The first thing that a worker is told."""

    index: int
    config: Config
    identity: Identity
    listener_fds: tuple[int, ...]
    sibling_path: str
    sibling_paths: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Command:
    """A method of the worker's service to call, with its arguments."""

    name: str
    arguments: tuple[Any, ...] = ()


class WorkerError(Exception):
    """A worker could not do what it was asked; the text is its own."""


async def send_message(stream: trio.abc.SendStream, message: object) -> None:
    data = pickle.dumps(message)
    await stream.send_all(_LENGTH.pack(len(data)) + data)


async def receive_message(stream: trio.abc.ReceiveStream) -> Any:
    """The next message, None at the end."""
    data = bytearray()
    wanted = _LENGTH.size
    while len(data) < wanted:
        try:
            more = await stream.receive_some(65536)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            return None
        if not more:
            return None
        data += more
        if wanted == _LENGTH.size and len(data) >= wanted:
            wanted += _LENGTH.unpack_from(data)[0]
            if wanted > _MAX_MESSAGE:
                return None
    return pickle.loads(data[_LENGTH.size : wanted])
