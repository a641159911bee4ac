"""A stream whose socket and TLS state can be taken away from it."""

from __future__ import annotations

import random
import socket
import ssl
import struct

import pytest
import trio
import trustme

from traversal.io.stream import HandshakeStream, StreamEndedError

AUTHORITY = trustme.CA()
SERVER = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
AUTHORITY.issue_cert("localhost").configure_cert(SERVER)
CLIENT = ssl.create_default_context()
AUTHORITY.configure_trust(CLIENT)


def stream_pair() -> tuple[HandshakeStream, HandshakeStream]:
    left, right = trio.socket.socketpair()
    return HandshakeStream(left), HandshakeStream(right)


async def tls_pair() -> tuple[HandshakeStream, HandshakeStream]:
    client, server = stream_pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: server.start_tls(SERVER, server_side=True))
        await client.start_tls(CLIENT, server_side=False, server_hostname="localhost")
    return client, server


@pytest.mark.parametrize("with_tls", [False, True], ids=["plain", "TLS"])
async def test_bytes_arrive_whole_and_in_order_then_the_end(with_tls: bool) -> None:
    """More than any buffer holds, in both directions at once; a close is an empty read."""
    client, server = await tls_pair() if with_tls else stream_pair()
    data = random.Random(1).randbytes(1_000_000)

    async def send(stream: HandshakeStream) -> None:
        await stream.send_all(data)

    async def receive(stream: HandshakeStream) -> None:
        got = b""
        while len(got) < len(data):
            got += await stream.receive()
        assert got == data

    async with trio.open_nursery() as nursery:
        for stream in (client, server):
            nursery.start_soon(send, stream)
            nursery.start_soon(receive, stream)
    client.close()
    assert await server.receive() == b""
    server.close()
    server.close()  # harmless


@pytest.mark.parametrize("with_tls", [False, True], ids=["plain", "TLS"])
async def test_what_is_put_back_comes_first(with_tls: bool) -> None:
    """In the order that it had on the wire."""
    client, server = await tls_pair() if with_tls else stream_pair()
    await client.send_all(b"on the wire")
    server.put_back(b"second ")
    server.put_back(b"first ")
    assert await server.receive() == b"first second "
    assert await server.receive() == b"on the wire"
    client.close()
    server.close()


async def test_tls_starts_with_what_was_put_back() -> None:
    """A client hello that was looked at before is not lost."""
    client, server = stream_pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(
            lambda: client.start_tls(CLIENT, server_side=False, server_hostname="localhost")
        )
        server.put_back(await server.receive())
        await server.start_tls(SERVER, server_side=True)
    await client.send_all(b"x")
    assert await server.receive() == b"x"
    client.close()
    server.close()


async def test_socket_and_tls_state_survive_detaching() -> None:
    """Data that arrived before is in the engine or in the socket, and can be read on from there."""
    client, server = await tls_pair()
    await client.send_all(b"one")
    assert await server.receive() == b"one"
    await client.send_all(b"two")
    sock, tls = server.detach()
    assert tls is not None
    assert sock.getblocking() is False
    with sock:
        tls.receive_data(sock.recv(65536))
        buffer = memoryview(bytearray(100))
        assert bytes(buffer[: tls.read_into(buffer)]) == b"two"
        server.close()  # of a stream that owns nothing any more
        tls.write(b"three")
        sock.send(tls.data_to_send())
        assert await client.receive() == b"three"
    client.close()


async def test_a_refused_certificate_ends_both_sides_with_a_reason() -> None:
    """Each side gets StreamEndedError in words; nothing else escapes."""
    client, server = stream_pair()

    async def serve() -> None:
        with pytest.raises(StreamEndedError, match="unknown ca"):
            await server.start_tls(SERVER, server_side=True)
        server.close()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve)
        with pytest.raises(StreamEndedError, match="certificate verification failed"):
            await client.start_tls(
                ssl.create_default_context(), server_side=False, server_hostname="localhost"
            )
    client.close()


async def test_a_client_that_leaves_in_the_handshake() -> None:
    """Connect and close: StreamEndedError, nothing else."""
    client, server = stream_pair()
    client.close()
    with pytest.raises(StreamEndedError):
        await server.start_tls(SERVER, server_side=True)
    server.close()


async def test_a_reset_is_an_end_with_a_reason() -> None:
    """Reading and writing both raise StreamEndedError."""
    listener = trio.socket.socket()
    await listener.bind(("127.0.0.1", 0))
    listener.listen()
    client = trio.socket.socket()
    await client.connect(listener.getsockname())
    accepted, _ = await listener.accept()
    stream = HandshakeStream(accepted)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()
    with pytest.raises(StreamEndedError, match="reset"):
        await stream.receive()
    with pytest.raises(StreamEndedError):
        await stream.send_all(b"x")
    stream.close()
    listener.close()
