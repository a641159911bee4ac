"""The UDP side of the edge's listening addresses: each TCP port's twin."""

from __future__ import annotations

import os
from collections.abc import Sequence
from uuid import uuid4

import trio
from qh3.quic.configuration import QuicConfiguration

from relay.certificate_files import CertificatePair
from relay.edge.certificates import EdgeCertificates
from relay.edge.quic_session import serve_quic
from relay.edge.registration import Registrar
from relay.listeners import Guard, ListenError
from traversal.io.quic import QuicConnection
from traversal.io.quic_endpoints import QuicListener
from traversal.io.quic_settings import edge_configuration
from traversal.io.udp import bind_socket


class QuicListeners:
    """Accepts connectors over QUIC at the (host, port) pairs of `addresses`."""

    def __init__(
        self,
        addresses: Sequence[tuple[str, int]],
        certificates: EdgeCertificates,
        registrar: Registrar,
    ) -> None:
        self._addresses = addresses
        self._certificates = certificates
        self._registrar = registrar
        self._guard = Guard()
        self._listeners: list[QuicListener] = []

    @property
    def ignored(self) -> int:
        """Clients that were not served because there were too many."""
        return sum(listener.ignored_initials for listener in self._listeners)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until cancelled. Raises ListenError."""
        async with trio.open_nursery() as nursery:
            for host, port in self._addresses:
                await self._open(host, port, nursery)
            task_status.started()

    async def _open(self, host: str, port: int, nursery: trio.Nursery) -> None:
        try:
            sock = await bind_socket(6 if ":" in host else 4, host, port)
        except OSError as error:
            raise ListenError(
                f"can't receive UDP on {host} port {port}: {error.strerror}; choose a port that no "
                "other program has, for TCP and UDP"
            ) from None
        pair = self._certificates.pair
        listener = QuicListener(sock, _configuration(pair), entropy=os.urandom)
        self._listeners.append(listener)
        await nursery.start(listener.run)
        nursery.start_soon(self._accept, listener, pair, nursery)

    async def _accept(
        self, listener: QuicListener, pair: CertificatePair, nursery: trio.Nursery
    ) -> None:
        while True:
            connection = await listener.accept()
            nursery.start_soon(self._guard.run, self._serve, connection)
            if pair is not self._certificates.pair:
                pair = self._certificates.pair
                listener.set_configuration(_configuration(pair))

    async def _serve(self, connection: QuicConnection) -> None:
        source = connection.address[0]
        await serve_quic(connection, self._registrar, source=source, new_id=uuid4)


def _configuration(pair: CertificatePair) -> QuicConfiguration:
    return edge_configuration(pair.chain_pem(), pair.key_pem)
