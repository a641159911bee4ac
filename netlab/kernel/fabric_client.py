"""Starting the fabric process and telling it what to carry."""

from __future__ import annotations

import os
import pickle
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import netlab
from netlab.kernel.fabric import MAX_COMMAND_BYTES

# The fabric answers within a batch of packets; a machine that is too slow for this is stuck.
_ANSWER_SECONDS = 10.0


class FabricError(Exception):
    """The fabric process died or could not do what it was told."""


class FabricProcess:
    """A running fabric process; `close` ends it.

    Start it before the namespaces are made: its interpreter then starts meanwhile.
    """

    def __init__(self) -> None:
        self._control, control = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.events, events = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._control.settimeout(_ANSWER_SECONDS)
        package = str(Path(netlab.__file__).parent.parent)
        path = os.environ.get("PYTHONPATH", "")
        with control, events:
            self._process = subprocess.Popen(
                [
                    sys.executable,
                    "-P",  # whatever lies in the working directory is none of its modules
                    "-m",
                    "netlab.kernel.fabric",
                    str(control.fileno()),
                    str(events.fileno()),
                ],
                pass_fds=(control.fileno(), events.fileno()),
                stdin=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": f"{package}:{path}" if path else package},
            )
        self._unanswered = 0

    @property
    def pid(self) -> int:
        """The process's number."""
        return self._process.pid

    def post(self, name: str, *arguments: object, descriptors: tuple[int, ...] = ()) -> None:
        """Send a command without waiting for its answer; the next `call` waits for all."""
        # Both sides' socket buffers are finite: never let hundreds of answers pile up.
        if self._unanswered >= 64:
            self._collect()
        data = pickle.dumps((name, arguments))
        assert len(data) < MAX_COMMAND_BYTES
        try:
            socket.send_fds(self._control, [data], list(descriptors))
        except OSError as error:
            raise FabricError(f"the fabric process is gone: {error}") from error
        self._unanswered += 1

    def call(self, name: str, *arguments: object) -> Any:  # Any: as many types as commands
        """Send a command and return its result.

        Raises:
            FabricError: it failed, or the process is gone.
        """
        self.post(name, *arguments)
        return self._collect()

    def _collect(self) -> Any:
        result: Any = None
        while self._unanswered:
            try:
                data = self._control.recv(MAX_COMMAND_BYTES)
            except OSError as error:
                raise FabricError(f"the fabric process does not answer: {error}") from error
            if not data:
                raise FabricError("the fabric process died; its error is on standard error")
            self._unanswered -= 1
            worked, result = pickle.loads(data)
            if not worked:
                raise FabricError(f"the fabric process failed:\n{result}")
        return result

    def close(self) -> None:
        """End the process."""
        self._control.close()
        self.events.close()
        self._process.kill()
        self._process.wait()
