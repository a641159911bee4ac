"""The admin listener of a whole relay that serves, with a client connected to it."""

from __future__ import annotations

import os
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from relay.config import Config
from relay.http_client import HttpResponse, get, post
from relay.server import Bound, serve
from relay.top import Source
from traversal.io.dial import Dialed, Target, dial
from traversal.io.stream import StreamEndedError
from traversal.keys import NodePrivate
from traversal.relay_map import CertificatePin
from traversal.wire.derp import ClientInfo, encode_note_preferred

TOKEN = "a-token-of-some-length"


@asynccontextmanager
async def relay(**overrides: object) -> AsyncIterator[Bound]:
    """Until the block ends."""
    config = Config.dev({name.replace("__", "."): value for name, value in overrides.items()})
    async with trio.open_nursery() as nursery:
        yield await nursery.start(serve, config, lambda: config)
        nursery.cancel_scope.cancel()


async def ask(bound: Bound, path: str) -> HttpResponse:
    (host, port), *_ = bound.admin
    return await get(
        f"http://{host}:{port}{path}",
        [],
        timeout_seconds=5,
        tls=ssl.create_default_context(),
        max_bytes=1 << 20,
    )


async def connect(bound: Bound) -> tuple[NodePrivate, Dialed]:
    (host, port), *_ = bound.derp
    key = NodePrivate.generate(os.urandom)
    pin = CertificatePin(bytes.fromhex(bound.pin.removeprefix("sha256-raw:")))
    target = Target(host, port, pin)
    return key, await dial(target, key, info=ClientInfo(version=2))


async def ends(client: Dialed) -> bool:
    """Whether the connection ends within 5 s, cleanly or not."""
    with trio.move_on_after(5):
        try:
            while await client.stream.receive():
                pass
        except StreamEndedError:
            pass
        return True
    return False


class TestLive:
    async def test_everything_answers(self) -> None:
        """Health, readiness, metrics, page and JSON of one relay with one client at home."""
        async with relay() as bound:
            key, client = await connect(bound)
            await client.stream.send_all(encode_note_preferred(True))
            for path in ("/healthz", "/readyz"):
                assert (await ask(bound, path)).body == b"ok\n"
            (host, port), *_ = bound.admin
            with trio.fail_after(5):
                snapshot = await Source(f"http://{host}:{port}", "").fetch()
                while not snapshot.connections.home:
                    snapshot = await Source(f"http://{host}:{port}", "").fetch()
            assert [each.key for each in snapshot.clients] == [str(key.public())]
            assert snapshot.server_key == str(bound.server_key)
            assert snapshot.tls_active == {"1.2": 0, "1.3": 1}
            assert snapshot.stun is not None
            metrics = (await ask(bound, "/metrics")).body
            assert b"\nderp_current_home_connections 1\n" in metrics
            assert key.public().short() in (await ask(bound, "/")).body.decode()
            client.close()

    async def test_revoking_ends_the_connection(self) -> None:
        """At once, and the answer says how many there were."""
        async with relay() as bound:
            key, client = await connect(bound)
            (host, port), *_ = bound.admin
            url = f"http://{host}:{port}/api/revoke?key={key.public()}"
            answer = await post(url, b"", timeout_seconds=5, tls=ssl.create_default_context())
            assert answer.body == b'{"closed":1}'
            assert await ends(client)
            client.close()

    async def test_the_token_is_asked_for(self, tmp_path: Path) -> None:
        """Where the configuration names one."""
        path = tmp_path / "token"
        path.write_text(TOKEN)
        async with relay(admin__token_file=str(path)) as bound:
            assert (await ask(bound, "/metrics")).status == 401
            (host, port), *_ = bound.admin
            assert (await Source(f"http://{host}:{port}", TOKEN).fetch()).hostname
