"""The whole relay as a process, as an operator runs it."""

from __future__ import annotations

import os
import signal
import socket
import ssl
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import trio

from relay.http_client import get
from traversal.io.dial import Dialed, DialError, Target, dial
from traversal.io.stream import StreamEndedError
from traversal.keys import MeshKey, NodePrivate, NodePublic
from traversal.relay_map import RelayMap
from traversal.wire.derp import (
    ClientInfo,
    FrameType,
    Health,
    PeerGone,
    RecvPacket,
    Restarting,
    ServerFrame,
    encode_send_packet,
    maybe_parse_server_frame,
)

START_SECONDS = 30
OWN = ClientInfo(version=2, app_name="underpass")


@dataclass
class Relay:
    """A running relay process."""

    process: trio.Process
    target: Target
    log: Path
    clients: list[Dialed] = field(default_factory=list)

    async def connect(self, key: NodePrivate, *, info: ClientInfo = OWN) -> Dialed:
        self.clients.append(await dial(self.target, key, info=info))
        return self.clients[-1]

    async def terminate(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return await self.process.wait()

    async def wait_for_log(self, text: str) -> None:
        deadline = trio.current_time() + 10
        while text not in self.log.read_text():
            assert trio.current_time() < deadline, self.log.read_text()
            await trio.sleep(0.02)


Start = Callable[..., AbstractAsyncContextManager[Relay]]


@pytest.fixture
def start(tmp_path: Path) -> Start:
    """Start `underpass-relay serve --dev` with more options; it is killed in the end."""

    @asynccontextmanager
    async def run(*options: str, name: str = "relay") -> AsyncIterator[Relay]:
        map_path = tmp_path / f"{name}.json"
        log_path = tmp_path / f"{name}.log"
        command = [sys.executable, "-m", "relay.cli", "serve", "--dev", "--dev-map", str(map_path)]
        with log_path.open("w") as log:
            process = await trio.lowlevel.open_process(
                [*command, "--set", "server.drain_seconds=0.5", *options],
                stdout=subprocess.DEVNULL,
                stderr=log,
                env={**os.environ, **ENVIRONMENT},
            )
        try:
            deadline = trio.current_time() + START_SECONDS
            while not (map_path.exists() and map_path.read_text().endswith("}\n")):
                assert process.poll() is None, log_path.read_text()
                assert trio.current_time() < deadline, log_path.read_text()
                await trio.sleep(0.02)
            node = next(RelayMap.parse(map_path.read_text()).nodes())
            relay = Relay(process, Target.of_node(node), log_path)
            try:
                yield relay
            finally:
                for client in relay.clients:
                    client.close()
        finally:
            if process.returncode is None:
                process.kill()
            with trio.CancelScope(shield=True):
                await process.wait()

    return run


ENVIRONMENT: dict[str, str] = {}


def new_key() -> NodePrivate:
    return NodePrivate.generate(os.urandom)


async def receive(client: Dialed, kind: type[ServerFrame]) -> ServerFrame:
    """The next frame of a kind; others are skipped."""
    with trio.fail_after(10):
        while True:
            for frame_type, body in await client.receive_frames():
                frame = maybe_parse_server_frame(frame_type, body)
                if isinstance(frame, kind):
                    return frame


async def send_until_received(source: Dialed, key: NodePublic, destination: Dialed) -> None:
    """Packets until one arrives: routes over a mesh need a moment."""
    with trio.fail_after(10):
        while True:
            await source.stream.send_all(encode_send_packet(key, b"through"))
            with trio.move_on_after(0.2):
                packet = await receive(destination, RecvPacket)
                assert isinstance(packet, RecvPacket)
                assert packet.payload == b"through"
                return


async def frames_until_closed(client: Dialed) -> list[int]:
    """The types of all frames until the relay closes the connection, goodbyes of peers aside."""
    kinds: list[int] = []
    with trio.fail_after(10):
        try:
            while True:
                kinds += [kind for kind, _ in await client.receive_frames()]
        except StreamEndedError:
            return [kind for kind in kinds if kind != FrameType.PEER_GONE]


async def test_two_clients_exchange_packets_and_a_drain_tells_them(start: Start) -> None:
    """SIGTERM: those that understand are told, all are closed, and the exit status is 0."""
    async with start() as relay:
        a, b = new_key(), new_key()
        client_a, client_b = await relay.connect(a), await relay.connect(b)
        await client_a.stream.send_all(encode_send_packet(b.public(), b"hello"))
        assert await receive(client_b, RecvPacket) == RecvPacket(a.public(), b"hello")
        stock = await relay.connect(new_key(), info=ClientInfo(version=2))
        relay.process.send_signal(signal.SIGTERM)
        assert await frames_until_closed(client_b) == [FrameType.HEALTH, FrameType.RESTARTING]
        assert await frames_until_closed(stock) == []
        assert await relay.process.wait() == 0


async def test_clients_of_different_workers_reach_each_other(start: Start) -> None:
    """With several workers every pair works, whoever accepted whom, and goodbyes cross too."""
    async with start("--workers", "2", "--admin", "off") as relay:
        keys = [new_key() for _ in range(6)]
        clients = [await relay.connect(key) for key in keys]
        for source in clients:
            for key, destination in zip(keys, clients, strict=True):
                await send_until_received(source, key.public(), destination)
        clients[0].close()
        for other in clients[1:]:
            assert await receive(other, PeerGone) == PeerGone(keys[0].public(), 0)
        assert await relay.terminate() == 0


async def test_a_killed_worker_loses_only_its_own_clients_and_comes_back(start: Start) -> None:
    """The others' connections go on, newcomers are served by its successor, no count goes down."""
    admin = f"127.0.0.1:{free_port()}"
    async with start("--workers", "2", "--admin", admin) as relay:
        clients = [await relay.connect(new_key()) for _ in range(8)]
        before = await read_accepts(admin)
        assert before >= 8
        workers = _children(relay.process.pid)
        assert len(workers) == 2
        os.kill(workers[0], signal.SIGKILL)
        closed = [False] * len(clients)

        async def watch(index: int) -> None:
            with trio.move_on_after(1):
                await frames_until_closed(clients[index])
                closed[index] = True

        async with trio.open_nursery() as nursery:
            for index in range(len(clients)):
                nursery.start_soon(watch, index)
        survivors = [client for client, gone in zip(clients, closed, strict=True) if not gone]
        assert 0 < len(survivors) < len(clients)
        await relay.wait_for_log("restarting")
        # Enough newcomers that both workers get some.
        for _ in range(8):
            key = new_key()
            newcomer = await relay.connect(key)
            await send_until_received(survivors[0], key.public(), newcomer)
        assert len(_children(relay.process.pid)) == 2
        assert await read_accepts(admin) >= before + 8


async def test_a_mesh_of_two_relays_forwards_and_says_goodbye(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Packets take one hop between relays of a region, both ways, once both links are up."""
    mesh_key = tmp_path / "mesh.key"
    mesh_key.write_text(MeshKey.generate(os.urandom).reveal())
    certificates = tmp_path / "certificates"
    common = ("--set", f"server.mesh_key_file={mesh_key}", "--admin", "off")
    common += ("--set", f"tls.directory={certificates}")
    async with start(*common, name="x") as x:
        # The certificate that both use is self-signed: for the mesh it is made a trusted root.
        monkeypatch.setitem(ENVIRONMENT, "SSL_CERT_FILE", str(certificates / "127.0.0.1.crt"))
        peer = f"mesh.peers=127.0.0.1:{x.target.port}"
        async with start(*common, "--set", peer, name="y") as y:
            await y.wait_for_log("mesh link to 127.0.0.1")
            a, b = new_key(), new_key()
            on_x, on_y = await x.connect(a), await y.connect(b)
            await send_until_received(on_y, a.public(), on_x)
            on_y.close()
            # X learned nothing of B but its packets: only Y dials here.
            assert (await y.terminate(), await x.terminate()) == (0, 0)


async def test_a_mesh_peer_with_another_key_is_named(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The log says what to compare, and not only that the link is down."""
    certificates = tmp_path / "certificates"
    keys = [tmp_path / "x.key", tmp_path / "y.key"]
    for path in keys:
        path.write_text(MeshKey.generate(os.urandom).reveal())
    common = ("--admin", "off", "--set", f"tls.directory={certificates}")
    async with start(*common, "--set", f"server.mesh_key_file={keys[0]}", name="x") as x:
        monkeypatch.setitem(ENVIRONMENT, "SSL_CERT_FILE", str(certificates / "127.0.0.1.crt"))
        peer = ("--set", f"mesh.peers=127.0.0.1:{x.target.port}")
        async with start(*common, *peer, "--set", f"server.mesh_key_file={keys[1]}", name="y") as y:
            await y.wait_for_log("is down: the other side closed the connection; does it have")


async def test_a_key_removed_from_the_list_is_cut_and_a_reload_keeps_the_others(
    start: Start, tmp_path: Path
) -> None:
    """Closed admission: only listed keys get in, and a removed key's session ends at once."""
    keys_file = tmp_path / "keys"
    kept, removed = new_key(), new_key()
    keys_file.write_text(f"{kept.public()}\n{removed.public()}\n")
    options = ("--set", "admission.mode=closed", "--set", f"admission.keys_file={keys_file}")
    async with start(*options) as relay:
        client_kept, client_removed = await relay.connect(kept), await relay.connect(removed)
        with pytest.raises(DialError):
            await relay.connect(new_key())
        await relay.wait_for_log("its key is not in the key list")
        keys_file.write_text(f"{kept.public()}\n")
        began = trio.current_time()
        await frames_until_closed(client_removed)
        assert trio.current_time() - began < 5  # a bound for a loaded machine; the promise is 1 s
        relay.process.send_signal(signal.SIGHUP)
        await client_kept.stream.send_all(encode_send_packet(kept.public(), b"still here"))
        assert await receive(client_kept, RecvPacket) == RecvPacket(kept.public(), b"still here")


async def test_a_second_connection_of_a_key_is_warned_of(start: Start) -> None:
    """Clients that understand HEALTH hear of a duplicate, and of its end."""
    async with start("--admin", "off") as relay:
        key = new_key()
        first = await relay.connect(key)
        second = await relay.connect(key)
        warning = await receive(first, Health)
        assert isinstance(warning, Health)
        assert "same node key" in warning.problem
        second.close()
        assert await receive(first, Health) == Health("")


async def test_restarting_spreads_the_clients(start: Start) -> None:
    """Each client is told another moment to come back."""
    async with start("--admin", "off") as relay:
        clients = [await relay.connect(new_key()) for _ in range(4)]
        relay.process.send_signal(signal.SIGTERM)
        waits = set()
        for client in clients:
            frame = await receive(client, Restarting)
            assert isinstance(frame, Restarting)
            waits.add(frame.reconnect_in_ms)
        assert len(waits) == 4
        assert max(waits) <= 500


async def read_accepts(admin: str) -> float:
    """The value of the metric `derp_accepts`."""
    response = await get(
        f"http://{admin}/metrics",
        [],
        timeout_seconds=10,
        tls=ssl.create_default_context(),
        max_bytes=1 << 20,
    )
    assert response.status == 200
    lines = response.body.decode().splitlines()
    return float(next(line.split()[1] for line in lines if line.startswith("derp_accepts ")))


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


def _children(pid: int) -> list[int]:
    """Processes are children of the thread that started them."""
    lists = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for children in lists for child in children.read_text().split()]
