"""The name in a ClientHello, from real ones, cut ones and nonsense."""

from __future__ import annotations

import ssl

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relay.edge.client_hello import (
    MAX_BYTES,
    MAX_RECORDS,
    ClientHello,
    ClientHelloError,
    parse_client_hello,
)


def hello(name: str | None = "app.example.com", protocols: tuple[str, ...] = ()) -> bytes:
    """What OpenSSL sends first."""
    context = ssl.create_default_context()
    context.check_hostname = name is not None
    if protocols:
        context.set_alpn_protocols(list(protocols))
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = context.wrap_bio(incoming, outgoing, server_hostname=name)
    with pytest.raises(ssl.SSLWantReadError):
        client.do_handshake()
    return outgoing.read()


def records(message: bytes, size: int) -> bytes:
    """A handshake message in records of at most `size` bytes."""
    parts = [message[start : start + size] for start in range(0, len(message), size)]
    return b"".join(b"\x16\x03\x01" + len(part).to_bytes(2, "big") + part for part in parts)


def test_openssls_hello() -> None:
    """Name and protocols are found in what a real client sends."""
    assert parse_client_hello(hello("App.Example.com", ("h2", "http/1.1"))) == ClientHello(
        "app.example.com", (b"h2", b"http/1.1")
    )
    assert parse_client_hello(hello(None)) == ClientHello()


def test_every_prefix_needs_more() -> None:
    """A hello that comes byte by byte is read when it is complete, and not before."""
    data = hello()
    assert all(parse_client_hello(data[:length]) is None for length in range(len(data)))
    assert parse_client_hello(data + b"more") == parse_client_hello(data)


@pytest.mark.parametrize("parts", [2, 5, MAX_RECORDS])
def test_a_hello_may_span_records(parts: int) -> None:
    """Nothing hides in record boundaries."""
    message = hello()[5:]
    data = records(message, -(-len(message) // parts))
    assert parse_client_hello(data) == ClientHello("app.example.com")
    assert parse_client_hello(data[:-1]) is None


def test_a_hello_in_crumbs() -> None:
    """Thousands of tiny records would be read again for each packet: they are refused, as soon as
    there are too many."""
    crumbs = records(b"\1\0\x30\0" + bytes(0x3000), 1)
    assert parse_client_hello(crumbs[: 6 * MAX_RECORDS - 1]) is None
    with pytest.raises(ClientHelloError, match="spans more than"):
        parse_client_hello(crumbs[: 6 * MAX_RECORDS])


def built(extensions: bytes) -> bytes:
    body = b"\x03\x03" + bytes(32) + b"\0" + b"\0\2\x13\1" + b"\1\0"
    body += len(extensions).to_bytes(2, "big") + extensions
    return records(b"\1" + len(body).to_bytes(3, "big") + body, 16384)


def extension(kind: int, content: bytes) -> bytes:
    return kind.to_bytes(2, "big") + len(content).to_bytes(2, "big") + content


def server_name(name: bytes) -> bytes:
    entry = b"\0" + len(name).to_bytes(2, "big") + name
    return extension(0, len(entry).to_bytes(2, "big") + entry)


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\n",
        b"\x16\x02\x00",
        b"\x15\x03\x03\x00\x02\x02\x28",
        b"\x16\x03\x01\x00\x00",
        b"\x16\x03\x01\xff\xff",
        b"\x16\x03\x01\x00\x04\x02\x00\x00\x00",
        b"\x16\x03\x01\x00\x04\x01\x00\x00\x00",
        b"\x16\x03\x01\x00\x04\x01\xff\xff\xff",
        built(server_name(b"a") + server_name(b"a")),
        built(server_name(b"a b")),
        built(server_name(b"a..b")),
        built(server_name(b"a" * 64)),
        built(server_name(b"a\0.example")),
        built(server_name(b"a") + b"\0"),
        built(extension(0, b"\0\4\0\0\1ax")),
        built(extension(16, b"\0\5\4h2")),
    ],
)
def test_what_is_no_hello_is_refused(data: bytes) -> None:
    """With the one error, whatever is wrong with it."""
    with pytest.raises(ClientHelloError):
        parse_client_hello(data)


def test_a_built_hello_passes() -> None:
    """The builder of the cases above makes good ones, too."""
    assert parse_client_hello(built(server_name(b"A.b."))) == ClientHello("a.b")


def test_no_more_is_read_than_there_may_be() -> None:
    """A hello that never ends is refused at a fixed size."""
    endless = records(b"\1\0\x4f\xff" + bytes(MAX_BYTES), 1000)[: MAX_BYTES - 1]
    assert parse_client_hello(endless) is None
    with pytest.raises(ClientHelloError):
        parse_client_hello(endless + b"\x16")


@settings(deadline=None)
@given(st.binary(max_size=300), st.integers(0, 600), st.binary(max_size=8))
def test_no_bytes_do_harm(noise: bytes, position: int, patch: bytes) -> None:
    """Random bytes, and a real hello with a few of them changed, are parsed or refused."""
    real = hello()
    for data in (noise, real[:position] + patch + real[position + len(patch) :]):
        try:
            parse_client_hello(data)
        except ClientHelloError:
            pass
