"""wireguard-go in the hosts of a kernel lab: an independent tunnel for tests and benchmarks."""

from __future__ import annotations

import base64
import os
import shutil
import subprocess
from dataclasses import dataclass
from typing import Any, Final

import trio

from netlab.kernel.machines import KernelHost
from traversal import NodePrivate

START_SECONDS: Final = 10.0
MTU_BYTES: Final = 1420


def why_not() -> str:
    """Why wireguard-go can't be run here; empty if it can."""
    missing = [name for name in ("wireguard-go", "wg", "ip", "mount") if not shutil.which(name)]
    if missing:
        return f"not installed: {', '.join(missing)}"
    return "" if os.path.exists("/dev/net/tun") else "there is no /dev/net/tun"


def hide_run_directory() -> None:
    """In a jail: let wireguard-go put its control socket where nothing else sees it."""
    subprocess.run(["mount", "-t", "tmpfs", "none", "/run"], check=True)


class Key:
    """A WireGuard key pair as `wg` writes it."""

    def __init__(self) -> None:
        private = NodePrivate.generate(os.urandom)
        text = private.reveal().removeprefix("privkey:")
        self.private = base64.b64encode(bytes.fromhex(text)).decode()
        self.public = base64.b64encode(private.public().raw).decode()


@dataclass
class Tunnel:
    """One end: the interface `name` with `address` in a host."""

    host: KernelHost
    name: str
    address: str
    process: trio.Process | None = None
    """Absent for one that somebody else started."""

    async def add_peer(self, key: Key, allowed: str, endpoint: str) -> None:
        """Send what is for `allowed` to the peer at `endpoint`."""
        peer = ("peer", key.public, "allowed-ips", allowed, "endpoint", endpoint)
        await self.host.run_process(["wg", "set", self.name, *peer], capture_stderr=True)

    async def close(self) -> None:
        """End it."""
        if self.process is not None:
            self.process.terminate()
            await self.process.wait()

    async def transferred(self) -> int:
        """Bytes that came through the tunnel."""
        done = await self.host.run_process(
            ["wg", "show", self.name, "transfer"], capture_stdout=True
        )
        return sum(int(line.split()[1]) for line in done.stdout.splitlines())


async def open_tunnel(host: KernelHost, name: str, key: Key, address: str, port: int) -> Tunnel:
    """Start wireguard-go in a host of a lab; it ends with the lab."""
    options: dict[str, Any] = {
        "stdin": subprocess.DEVNULL,
        "stdout": subprocess.DEVNULL,
        "stderr": subprocess.DEVNULL,
    }
    process = await host.open_process(["wireguard-go", "-f", name], **options)
    socket = trio.Path(f"/run/wireguard/{name}.sock")
    with trio.fail_after(START_SECONDS):
        while not await socket.exists():
            assert process.poll() is None, "wireguard-go ended"
            await trio.sleep(0.02)
    await host.run_process(
        ["wg", "set", name, "listen-port", str(port), "private-key", "/dev/stdin"],
        stdin=key.private.encode(),
    )
    for command in (
        ["ip", "address", "add", f"{address}/24", "dev", name],
        ["ip", "link", "set", name, "mtu", str(MTU_BYTES), "up"],
    ):
        await host.run_process(command)
    return Tunnel(host, name, address, process)
