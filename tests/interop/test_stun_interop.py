"""STUN with programs that nobody here wrote: coturn's clients and server, aioice's client."""

from __future__ import annotations

import asyncio
import shutil
import socket
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import cast

import aioice.stun
import pytest
import trio

from relay.stun import StunServer
from traversal.wire import stun
from traversal.wire.stun import Address, TransactionId

pytestmark = pytest.mark.interop

ID = TransactionId(bytes(range(12)))


def program(name: str) -> str:
    """The path of one of coturn's programs, or the reason to skip."""
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"{name} is not installed; Debian's package coturn has it")
    return path


def free_port() -> int:
    """A UDP port that nobody held a moment ago, on any loopback address."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("0.0.0.0", 0))
        port: int = sock.getsockname()[1]
        return port


@asynccontextmanager
async def discovery_server() -> AsyncIterator[tuple[StunServer, Address, Address]]:
    """Our server with both IP addresses and both ports of RFC 5780."""
    primary, alternate = ("127.0.0.1", free_port()), ("127.0.0.2", free_port())
    server = StunServer([primary], alternates=[alternate])
    async with trio.open_nursery() as nursery:
        await nursery.start(server.serve)
        yield server, primary, alternate
        nursery.cancel_scope.cancel()


async def output_of(*command: str) -> str:
    with trio.fail_after(20):
        finished = await trio.run_process(
            command, capture_stdout=True, stderr=subprocess.STDOUT, check=False
        )
    return finished.stdout.decode()


class TestForeignClients:
    """Clients of others understand our server."""

    async def test_turnutils_stunclient(self) -> None:
        """coturn's STUN client learns its address and finds RFC 5780."""
        client = program("turnutils_stunclient")
        async with discovery_server() as (server, (host, port), (other_host, other_port)):
            output = await output_of(client, "-p", str(port), "-f", host)
            assert f"Response origin: : {host}:{port}" in output
            assert f"Response origin: : {other_host}:{other_port}" in output
            assert f"Other addr: : {other_host}:{other_port}" in output
            assert "UDP reflexive addr: 127.0.0.1:" in output
            assert server.statistics().not_stun == 0

    async def test_turnutils_stunclient_on_one_address(self) -> None:
        """coturn's STUN client is served by a server without alternate address too."""
        client = program("turnutils_stunclient")
        server = StunServer([("127.0.0.1", 0)])
        async with trio.open_nursery() as nursery:
            [(host, port)] = await nursery.start(server.serve)
            output = await output_of(client, "-p", str(port), host)
            assert "UDP reflexive addr: 127.0.0.1:" in output
            nursery.cancel_scope.cancel()

    @pytest.mark.parametrize("padding", [[], ["-P"]])
    async def test_turnutils_natdiscovery(self, padding: list[str]) -> None:
        """coturn's NAT discovery finds no NAT and no filter on loopback, with padding too."""
        client = program("turnutils_natdiscovery")
        async with discovery_server() as (server, (host, port), _):
            output = await output_of(
                client, "-m", "-f", *padding, "-L", "127.0.0.1", "-p", str(port), host
            )
            assert "No NAT! (Endpoint Independent Mapping)" in output
            assert "NAT with Endpoint Independent Filtering!" in output
            assert "timeout" not in output
            assert server.statistics().not_stun == 0

    async def test_aioice(self) -> None:
        """aioice's STUN transaction gets its address from our server."""
        server = StunServer([("127.0.0.1", 0)])
        async with trio.open_nursery() as nursery:
            [address] = await nursery.start(server.serve)
            with trio.fail_after(10):
                mapped, local = await trio.to_thread.run_sync(
                    asyncio.run, aioice_binding(address), abandon_on_cancel=True
                )
            assert mapped == local
            nursery.cancel_scope.cancel()


class AioiceProtocol(asyncio.DatagramProtocol):
    """The little that aioice's Transaction needs of a transport."""

    transport: asyncio.DatagramTransport
    transaction: aioice.stun.Transaction

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.DatagramTransport, transport)

    def datagram_received(self, data: bytes, addr: Address) -> None:
        self.transaction.response_received(aioice.stun.parse_message(data), addr)

    def send_stun(self, message: aioice.stun.Message, addr: Address) -> None:
        self.transport.sendto(bytes(message), addr)


async def aioice_binding(server: Address) -> tuple[Address, Address]:
    """Ask with aioice; returns the mapped and the local address. Runs under asyncio."""
    loop = asyncio.get_running_loop()
    transport, protocol = await loop.create_datagram_endpoint(
        AioiceProtocol, local_addr=("127.0.0.1", 0)
    )
    try:
        request = aioice.stun.Message(
            message_method=aioice.stun.Method.BINDING, message_class=aioice.stun.Class.REQUEST
        )
        request.add_fingerprint()
        protocol.transaction = aioice.stun.Transaction(request, server, protocol)
        response, _ = await protocol.transaction.run()
        return response.attributes["XOR-MAPPED-ADDRESS"], transport.get_extra_info("sockname")
    finally:
        transport.close()


@asynccontextmanager
async def coturn() -> AsyncIterator[tuple[Address, Address]]:
    """coturn's server on loopback, with both IP addresses and both ports of RFC 5780."""
    path = program("turnserver")
    port, other_port = free_port(), free_port()
    async with trio.open_nursery() as nursery:
        command = [path, "-n", "--stun-only", "--no-tcp", "--no-tls", "--no-dtls", "--no-cli"]
        command += ["-L", "127.0.0.1", "-L", "127.0.0.2", "-p", str(port)]
        command += [
            f"--alt-listening-port={other_port}",
            "--log-file=stdout",
            "--pidfile=/dev/null",
        ]
        process = await nursery.start(
            partial(
                trio.run_process,
                command,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                check=False,
            )
        )
        try:
            yield ("127.0.0.1", port), ("127.0.0.2", other_port)
        finally:
            process.terminate()


async def ask(sock: trio.socket.SocketType, request: bytes, server: Address) -> bytes:
    """Send a request again and again, since coturn takes a moment to start, until it answers."""
    with trio.fail_after(10):
        while True:
            await sock.sendto(request, server)
            with trio.move_on_after(0.1):
                datagram, _ = await sock.recvfrom(2048)
                return datagram


class TestForeignServer:
    """Our client codec understands coturn's server."""

    async def test_coturn(self) -> None:
        """Tailscale's request, a plain one and a change request are answered and understood."""
        async with coturn() as (primary, alternate):
            with trio.socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
                await sock.bind(("127.0.0.1", 0))
                local = sock.getsockname()
                for request, origin in (
                    (stun.encode_binding_request(ID), primary),
                    (stun.encode_discovery_request(ID), primary),
                    (
                        stun.encode_discovery_request(ID, change_ip=True, change_port=True),
                        alternate,
                    ),
                ):
                    response = stun.parse_binding_response(await ask(sock, request, primary))
                    assert response == stun.BindingResponse(ID, local, origin, alternate)

    async def test_coturn_refuses(self) -> None:
        """coturn's error response for an unknown attribute is understood."""
        async with coturn() as (primary, _):
            with trio.socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
                request = bytes.fromhex("000100042112a442") + ID + bytes.fromhex("77770000")
                error = stun.parse_error_response(await ask(sock, request, primary))
                assert (error.code, error.unknown_attributes) == (420, (0x7777,))
