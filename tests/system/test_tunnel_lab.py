"""The edge and the connector as processes behind a lab's NAT, with UDP blocked and healed."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import trio

from tests.system.test_programs import Programs, programs

pytestmark = pytest.mark.jail

RELAY = (sys.executable, "-m", "relay.cli")
UNDERPASS = (sys.executable, "-m", "traversal.cli")
HOST = "app.example.com"
BLOCK_UDP = (
    "add table inet blocked; add chain inet blocked out { type filter hook output priority 0; };"
    " add rule inet blocked out udp dport 7844 drop"
)


async def start_edge(running: Programs) -> str:
    """An edge on the server, with a tunnel called web; returns its address."""
    address = running.lab.host("relay").addresses[0]
    home = running.home("relay")
    (home / "routes.toml").write_text(f'[[http]]\nhost = "{HOST}"\ntunnel = "web"\n')
    directory = str(home / "edge")
    for command in ("create-tunnel web", "authority"):
        status, printed = await running.run(
            "relay", *RELAY, "edge", *command.split(), "--directory", directory
        )
        assert status == 0
    (running.home("alice") / "ca.pem").write_text(printed)
    credentials = (home / "edge" / "tunnels" / "web.json").read_text()
    (running.home("alice") / "tunnel.json").write_text(credentials)
    settings = {
        "edge.listen": f"{address}:7844",
        "edge.directory": directory,
        "edge.public.http": f"{address}:8080",
        "edge.public.routes_file": str(home / "routes.toml"),
    }
    options = [word for k, v in settings.items() for word in ("--set", f"{k}={v}")]
    await running.start("relay", *RELAY, "serve", "--dev", *options, ready="Relay map to give")
    return address


async def start_connector(running: Programs, edge: str) -> None:
    """A connector on alice for a web server of hers."""
    home = running.home("alice")
    (home / "page").write_text("hello from alice")
    web = (sys.executable, "-u", "-m", "http.server", "8000", "--bind", "127.0.0.1")
    await running.start("alice", *web, ready="Serving HTTP")
    (home / "tunnel.toml").write_text(
        f'edge = ["{edge}:7844"]\nca = "ca.pem"\ncredentials = "tunnel.json"\n'
        'url = "http://127.0.0.1:8000"\nhealth = "127.0.0.1:20241"\n'
    )
    await running.start(
        "alice", *UNDERPASS, "tunnel", "run", "-c", "tunnel.toml", ready="registered"
    )


async def fetch(running: Programs, url: str) -> tuple[int, str]:
    """What curl on bob gets."""
    return await running.run("bob", "curl", "-sS", "--max-time", "10", "-H", f"Host: {HOST}", url)


async def transports(running: Programs) -> dict[str, int]:
    """How many of the connector's connections run over what, by its own metrics."""
    _, text = await running.run("alice", "curl", "-s", "http://127.0.0.1:20241/metrics")
    found = {}
    for line in text.splitlines():
        if line.startswith("underpass_tunnel_connections{"):
            found[line.split('"')[1]] = int(float(line.split()[1]))
    return found


async def until_transports(running: Programs, wanted: dict[str, int], seconds: float) -> float:
    """Wait for that; returns how long it took."""
    start = trio.current_time()
    with trio.fail_after(seconds):
        while await transports(running) != wanted:  # noqa: ASYNC110 # another process's state
            await trio.sleep(0.2)
    return trio.current_time() - start


async def test_udp_blocked_and_healed(tmp_path: Path) -> None:
    """From behind a NAT a connector publishes a web server; where UDP is blocked it does so over
    HTTP/2 within seconds, and it is back on QUIC within 60 s of UDP's healing, without a failed
    request."""
    async with programs(tmp_path) as running:
        edge = await start_edge(running)
        alice = running.lab.host("alice")
        await alice.run_process(["nft", BLOCK_UDP])
        await start_connector(running, edge)
        await until_transports(running, {"http2": 4}, 20)
        assert await fetch(running, f"http://{edge}:8080/page") == (0, "hello from alice")
        _, ready = await running.run("alice", "curl", "-s", "http://127.0.0.1:20241/ready")
        assert json.loads(ready)["readyConnections"] == 4
        await alice.run_process(["nft", "delete table inet blocked"])
        failed = []

        async def visit() -> None:
            while True:
                answer = await fetch(running, f"http://{edge}:8080/page")
                if answer != (0, "hello from alice"):
                    failed.append(answer)
                await trio.sleep(0.2)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(visit)
            took = await until_transports(running, {"quic": 4}, 60)
            nursery.cancel_scope.cancel()
        print(f"LAB back on QUIC after {took:.1f} s")
        assert failed == []
