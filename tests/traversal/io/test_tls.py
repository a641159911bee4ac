"""TLS between memory buffers: what is read, when it ends, and what never raises anything else."""

from __future__ import annotations

import functools
import ssl

import pytest
import trustme
from hypothesis import given, settings
from hypothesis import strategies as st

from traversal.io.tls import TlsClosedError, TlsEngine, TlsError

AUTHORITY = trustme.CA()
SERVER = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
AUTHORITY.issue_cert("localhost").configure_cert(SERVER)
VERSIONS = [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3]


@functools.cache
def client_context(version: ssl.TLSVersion) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = context.maximum_version = version
    AUTHORITY.configure_trust(context)
    return context


def connected(version: ssl.TLSVersion) -> tuple[TlsEngine, TlsEngine]:
    """A client and a server whose handshake is done."""
    client = TlsEngine(client_context(version), server_side=False, server_hostname="localhost")
    server = TlsEngine(SERVER, server_side=True)
    for _ in range(6):
        client.do_handshake()
        if data := client.data_to_send():
            server.receive_data(data)
        server.do_handshake()
        if data := server.data_to_send():
            client.receive_data(data)
    assert client.do_handshake()
    assert server.do_handshake()
    return client, server


def read(engine: TlsEngine, room: int = 1 << 20) -> bytes:
    buffer = memoryview(bytearray(room))
    return bytes(buffer[: engine.read_into(buffer)])


@pytest.mark.parametrize("version", VERSIONS)
def test_all_records_of_one_read_come_at_once(version: ssl.TLSVersion) -> None:
    """And a large write is encrypted whole; a full buffer leaves the rest for the next call."""
    client, server = connected(version)
    for number in range(50):
        client.write(bytes([number]) * 1000)
    client.write(b"x" * 300_000)
    server.receive_data(client.data_to_send())
    data = read(server, 100_000) + read(server)
    assert data == b"".join(bytes([number]) * 1000 for number in range(50)) + b"x" * 300_000
    assert read(server) == b""
    assert server.failure is None


@pytest.mark.parametrize("version", VERSIONS)
def test_a_record_cut_anywhere_waits_for_its_rest(version: ssl.TLSVersion) -> None:
    """Incomplete is no error and no data."""
    client, server = connected(version)
    client.write(b"hello")
    data = client.data_to_send()
    for position in range(len(data) - 1):
        server.receive_data(data[position : position + 1])
        assert read(server) == b""
    server.receive_data(data[-1:])
    assert read(server) == b"hello"


@pytest.mark.parametrize("version", VERSIONS)
def test_the_end_comes_after_the_data_and_is_not_forgotten(version: ssl.TLSVersion) -> None:
    """A close alert behind data is known at once, and each further read raises."""
    client, server = connected(version)
    client.write(b"last")
    client.close()
    server.receive_data(client.data_to_send())
    assert read(server) == b"last"
    assert isinstance(server.failure, TlsClosedError)
    for _ in range(2):
        with pytest.raises(TlsClosedError):
            read(server)


@pytest.mark.parametrize("version", VERSIONS)
def test_a_cut_connection_is_no_orderly_end(version: ssl.TLSVersion) -> None:
    """The end of the network without an alert is an error of another kind."""
    client, server = connected(version)
    client.write(b"last")
    server.receive_data(client.data_to_send())
    server.receive_data(b"")
    assert read(server) == b"last"
    with pytest.raises(TlsError) as error:
        read(server)
    assert not isinstance(error.value, TlsClosedError)


@settings(max_examples=30, deadline=None)
@given(st.binary(min_size=1, max_size=60), st.sampled_from(VERSIONS))
def test_garbage_in_a_connection_raises_tls_error_only(
    garbage: bytes, version: ssl.TLSVersion
) -> None:
    """Data before it is still delivered; closing afterwards is harmless."""
    client, server = connected(version)
    client.write(b"good")
    server.receive_data(client.data_to_send() + garbage)
    data = b""
    try:
        data += read(server)
        data += read(server)
    except TlsError:
        pass
    assert data == b"good"
    server.close()
    server.data_to_send()


@settings(max_examples=30, deadline=None)
@given(st.binary(min_size=1, max_size=100), st.booleans())
def test_garbage_in_a_handshake_raises_tls_error_only(garbage: bytes, server_side: bool) -> None:
    """On either side; so does the end of the stream."""
    context = SERVER if server_side else client_context(VERSIONS[1])
    name = None if server_side else "localhost"
    engine = TlsEngine(context, server_side=server_side, server_hostname=name)
    try:
        engine.do_handshake()
        engine.receive_data(garbage)
        engine.do_handshake()
    except TlsError:
        return
    engine.receive_data(b"")
    with pytest.raises(TlsError):
        engine.do_handshake()


def test_an_untrusted_certificate_is_named_as_the_reason() -> None:
    """The text is for an operator."""
    client = TlsEngine(ssl.create_default_context(), server_side=False, server_hostname="localhost")
    server = TlsEngine(SERVER, server_side=True)
    client.do_handshake()
    server.receive_data(client.data_to_send())
    server.do_handshake()
    client.receive_data(server.data_to_send())
    with pytest.raises(TlsError, match="certificate verification failed"):
        client.do_handshake()
    server.receive_data(client.data_to_send())
    with pytest.raises(TlsError, match="unknown ca"):
        server.do_handshake()


def test_what_the_sides_know_of_each_other() -> None:
    """Version and the chain as presented."""
    client, _ = connected(VERSIONS[1])
    assert client.version() == "TLSv1.3"
    assert len(client.peer_chain()) >= 1
    assert ssl.DER_cert_to_PEM_cert(client.peer_chain()[0]).startswith("-----BEGIN")
