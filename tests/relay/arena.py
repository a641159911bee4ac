"""A whole data plane in the test's own process, and clients for it."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import trio

from relay.config import Config
from relay.listeners import open_listeners
from relay.refusals import Stage
from relay.service import Identity, Service
from traversal.io.dial import Dialed, Target, dial
from traversal.keys import NodePrivate, NodePublic
from traversal.relay_map import CertificateUnchecked
from traversal.wire.derp import FrameType, encode_send_packet

CONVERSATION_PACKETS = 20


@dataclass
class Arena:
    """A relay in this process and the means to attack it."""

    service: Service
    port: int
    server_key: NodePublic
    clients: list[Dialed] = field(default_factory=list)

    async def connect(self, key: NodePrivate | None = None, *, token: str = "") -> Dialed:
        over_tls = self.service.certificates is not None
        target = Target("127.0.0.1", self.port, CertificateUnchecked() if over_tls else None)
        client = await dial(target, key or new_key(), token=token)
        self.clients.append(client)
        return client

    async def tcp(self, source: str = "127.0.0.1") -> trio.socket.SocketType:
        sock = trio.socket.socket()
        await sock.bind((source, 0))
        await sock.connect(("127.0.0.1", self.port))
        return sock

    def refused(self, stage: Stage) -> int:
        return self.service.refusals.counts[stage]

    async def until_refused(self, stage: Stage, count: int) -> None:
        deadline = trio.current_time() + 20
        while self.refused(stage) < count:
            assert trio.current_time() < deadline, self.service.refusals.counts
            await trio.sleep(0.01)

    async def converse(self) -> None:
        """Two clients talk to each other; every packet must arrive, in order."""
        a, b = new_key(), new_key()
        client_a, client_b = await self.connect(a), await self.connect(b)
        for number in range(CONVERSATION_PACKETS):
            payload = number.to_bytes(4, "big") * 50
            await client_a.stream.send_all(encode_send_packet(b.public(), payload))
            with trio.fail_after(10):
                frames = await client_b.receive_frames()
            assert frames == [(FrameType.RECV_PACKET, a.public().raw + payload)]
        client_a.close()
        client_b.close()


@asynccontextmanager
async def arena(**settings: object) -> AsyncIterator[Arena]:
    """A relay on loopback, open to all unless told otherwise.

    Keyword arguments are configuration keys, with two underscores for a dot.
    """
    config = Config.dev({key.replace("__", "."): value for key, value in settings.items()})
    listeners = open_listeners(config.listen.derp[0])
    identity = Identity(new_key(), None)
    service = Service(config, identity, listeners)
    async with trio.open_nursery() as nursery:
        await nursery.start(service.run)
        port = listeners[0].getsockname()[1]
        stage = Arena(service, port, identity.private_key.public())
        try:
            yield stage
        finally:
            for client in stage.clients:
                client.close()
            nursery.cancel_scope.cancel()
    for listener in listeners:
        listener.close()


def new_key() -> NodePrivate:
    return NodePrivate.generate(os.urandom)
