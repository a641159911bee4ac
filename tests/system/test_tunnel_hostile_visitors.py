"""Visitors who want an origin to read what the edge did not: what arrives at the origin, through
our edge and our connector, over both transports."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import ConnectionTerminated, ResponseReceived, StreamEnded, StreamReset
from h2.exceptions import H2Error

from tests.system.tunnel_site import Site, published_site
from tests.system.tunnel_visitors import TruncatedError
from traversal.io.stream import StreamEndedError
from traversal.tunnel.transport_choice import Transport

SECONDS = 60
HOST = b"Host: raw.example.com\r\n"
POST = b"POST / HTTP/1.1\r\n" + HOST
GET = b"GET / HTTP/1.1\r\n" + HOST
END = b"GET /end HTTP/1.1\r\n" + HOST + b"Connection: close\r\n\r\n"
SMUGGLED = b"GET /smuggled HTTP/1.1\r\nHost: raw.example.com\r\n\r\n"
OURS = {
    b"x-forwarded-for": b"127.0.0.1",
    b"x-forwarded-proto": b"https",
    b"cf-connecting-ip": b"127.0.0.1",
}
"""What an origin may believe."""
FORGED = [
    (b"X-Forwarded-For", b"192.0.2.66"),
    (b"X-Forwarded-Proto", b"http"),
    (b"X-Forwarded-Host", b"evil"),
    (b"X-Real-IP", b"192.0.2.66"),
    (b"Forwarded", b"for=192.0.2.66"),
    (b"CF-Connecting-IP", b"192.0.2.66"),
    (b"Cf-Ray", b"evil"),
    (b"Cf-Warp-Tag-Id", b"evil"),
    (b"Cf-Cloudflared-Proxy-Src", b"evil"),
    (b"Cf-Cloudflared-Proxy-Connection-Upgrade", b"control-stream"),
    (b"Cf-Cloudflared-Request-Headers", b"WC1FdmlsOmV2aWw"),
    (b"Cf-Int-Cloudflared-Tracing", b"evil"),
    (b"Cf-Proxy-Evil", b"evil"),
]


@pytest.fixture(params=list(Transport), ids=lambda transport: transport.value)
async def site(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Site]:
    with trio.fail_after(SECONDS):
        async with published_site(tmp_path, request.param) as made:
            yield made


async def attack1(site: Site, data: bytes) -> bytes:
    """Send raw bytes in HTTP/1.1, and a last request; everything that comes back."""
    stream = await site.visitor("1.1").connect("raw.example.com")
    answer = b""
    try:
        await stream.send_all(data + END)
        while more := await stream.receive():
            answer += more
    except StreamEndedError:
        pass
    finally:
        stream.close()
    return answer


async def attack2(
    site: Site, headers: list[tuple[bytes, bytes]], body: bytes | None = None
) -> int | None:
    """One request of HTTP/2 with these headers as they are; its status, if there is one."""
    stream = await site.visitor("2").connect("raw.example.com")
    configuration = H2Configuration(
        header_encoding=None,
        validate_outbound_headers=False,
        normalize_outbound_headers=False,
    )
    protocol = H2Connection(configuration)
    protocol.initiate_connection()
    protocol.send_headers(1, headers, end_stream=body is None)
    if body is not None:
        protocol.send_data(1, body, end_stream=True)
    status = None
    try:
        while True:
            await stream.send_all(protocol.data_to_send())
            if not (data := await stream.receive()):
                return status
            for event in protocol.receive_data(data):
                if isinstance(event, ResponseReceived):
                    status = int(dict(event.headers)[b":status"])
                if isinstance(event, StreamEnded | StreamReset | ConnectionTerminated):
                    return status
    except (StreamEndedError, H2Error):
        return status
    finally:
        stream.close()


async def assert_unharmed(site: Site, expected: int) -> None:
    """The origin got what it may get, and the tunnel's connection still serves others."""
    seen = [request for request in site.raw.requests() if request.target != b"/end"]
    assert len(seen) <= expected
    for request in seen:
        headers = [(bytes(name), bytes(value)) for name, value in request.headers]
        names = [name for name, _ in headers]
        assert request.target != b"/smuggled"
        assert (b"host", b"raw.example.com") in headers
        for name in (b"host", b"content-length", b"transfer-encoding", *OURS):
            assert names.count(name) <= 1, name
        assert not {b"content-length", b"transfer-encoding"} <= set(names)
        assert OURS.items() <= dict(headers).items()
        assert not any(n.startswith((b"cf-cloudflared", b"cf-int-", b"cf-proxy-")) for n in names)
        assert not any(b"evil" in value for _, value in headers)
        assert b"192.0.2.66" not in dict(headers).values()
    assert (await site.visitor("1.1").ask("GET", "/", host="teapot.example.com")).status == 418
    assert site.connector.registrations == 1


# Each is refused, or read as one request; `status` is what the visitor is told.
HTTP1 = {
    "cl-te": (
        POST + b"Content-Length: 6\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + SMUGGLED,
        400,
    ),
    "te-cl": (
        POST + b"Transfer-Encoding: chunked\r\nContent-Length: 4\r\n\r\n"
        b"31\r\n" + SMUGGLED + b"\r\n0\r\n\r\n",
        400,
    ),
    "two-lengths": (
        b"POST / HTTP/1.1\r\n"
        + HOST
        + b"Content-Length: 0\r\nContent-Length: 47\r\n\r\n"
        + SMUGGLED,
        400,
    ),
    "length-list": (
        POST + b"Content-Length: 0, 47\r\n\r\n" + SMUGGLED,
        400,
    ),
    "length-sign": (POST + b"Content-Length: +47\r\n\r\n" + SMUGGLED, 400),
    "other-encoding": (
        POST + b"Transfer-Encoding: xchunked\r\n\r\n" + SMUGGLED,
        501,
    ),
    "two-encodings": (
        POST + b"Transfer-Encoding: identity\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        501,
    ),
    "blank-before-colon": (
        POST + b"Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n" + SMUGGLED,
        400,
    ),
    "encoding-in-1.0": (
        b"POST / HTTP/1.0\r\n" + HOST + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + SMUGGLED,
        400,
    ),
    "no-host": (b"GET / HTTP/1.1\r\n\r\n", 400),
    "two-hosts": (GET + b"Host: evil.example.com\r\n\r\n", 400),
    "other-host-in-target": (b"GET http://evil.example.com/ HTTP/1.1\r\n" + HOST + b"\r\n", 400),
    "host-with-path": (b"GET / HTTP/1.1\r\nHost: raw.example.com/evil\r\n\r\n", 400),
    "host-with-user": (b"GET / HTTP/1.1\r\nHost: evil@raw.example.com\r\n\r\n", 400),
    "nul": (GET + b"X: a\0b\r\n\r\n", 400),
    "bare-cr": (GET + b"X: a\rCf-Ray: evil\r\n\r\n", 400),
    "bare-cr-in-target": (b"GET /\rX: HTTP/1.1\r\n" + HOST + b"\r\n", 400),
    "name-with-blank": (GET + b"X Y: z\r\n\r\n", 400),
    "name-with-colon": (GET + b":path: /smuggled\r\n\r\n", 400),
    "chunk-size": (
        POST + b"Transfer-Encoding: chunked\r\n\r\n0x0\r\n\r\n" + SMUGGLED,
        None,
    ),
    "chunk-overflow": (
        POST + b"Transfer-Encoding: chunked\r\n\r\n100000000000000000000\r\n\r\n" + SMUGGLED,
        None,
    ),
    "chunk-longer-than-said": (
        b"POST / HTTP/1.1\r\n"
        + HOST
        + b"Transfer-Encoding: chunked\r\n\r\n1\r\nab\r\n0\r\n\r\n"
        + SMUGGLED,
        None,
    ),
    "management": (b"GET / HTTP/1.1\r\nHost: management.argotunnel.com\r\n\r\n", 403),
    "connect": (b"CONNECT 127.0.0.1:22 HTTP/1.1\r\nHost: 127.0.0.1:22\r\n\r\n", 405),
    "not-http": (b"\x16\x03\x01\x00\x05hello\r\n\r\n", 400),
}


@pytest.mark.parametrize("name", HTTP1)
async def test_ambiguous_http1(site: Site, name: str) -> None:
    """What could be read in two ways is refused, and the origin never reads the second one."""
    data, status = HTTP1[name]
    answer = await attack1(site, data)
    if status is not None:
        assert answer.startswith(b"HTTP/1.1 %d " % status), answer
        assert answer.count(b"HTTP/1.1 ") <= 2  # of the last request, too
    await assert_unharmed(site, expected=1 if status is None else 0)


async def test_odd_http1(site: Site) -> None:
    """What is allowed though odd arrives in one plain form: folded lines, chunk extensions,
    hop-by-hop lists, forged headers, an absolute target."""
    folded = b"GET /1 HTTP/1.1\r\n" + HOST + b"X: a\r\n Cf-Ray: folded\r\n\r\n"
    answer = await attack1(site, folded)
    assert answer.startswith((b"HTTP/1.1 200 ", b"HTTP/1.1 400 "))
    extended = (
        b"POST /2 HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: chunked\r\n\r\n"
        b"2;a=b\r\nok\r\n0\r\nX-Trailer: 1\r\nContent-Length: 5\r\n\r\n"
    )
    assert (await attack1(site, extended)).startswith(b"HTTP/1.1 200 ")
    absolute = b"GET https://RAW.example.com/3 HTTP/1.1\r\n" + HOST + b"\r\n"
    assert (await attack1(site, absolute)).startswith(b"HTTP/1.1 200 ")
    listed = (
        b"POST /4 HTTP/1.1\r\n" + HOST + b"Content-Length: 2\r\nX-Hop: evil\r\n"
        b"Connection: keep-alive, X-Hop, Content-Length, X-Forwarded-For, Host\r\n\r\nok"
    )
    assert (await attack1(site, listed)).startswith(b"HTTP/1.1 200 ")
    forged = b"".join(name + b": " + value + b"\r\n" for name, value in FORGED)
    assert (await attack1(site, b"GET /5 HTTP/1.1\r\n" + HOST + forged + b"\r\n")).startswith(
        b"HTTP/1.1 200 "
    )
    await assert_unharmed(site, expected=5)
    assert {request.target for request in site.raw.requests()} >= {b"/2", b"/3", b"/4", b"/5"}


PSEUDO = [
    (b":method", b"POST"),
    (b":scheme", b"https"),
    (b":authority", b"raw.example.com"),
    (b":path", b"/"),
]


def with_pseudo(name: bytes, value: bytes) -> list[tuple[bytes, bytes]]:
    return [(key, value if key == name else old) for key, old in PSEUDO]


# None: refused by a status, a reset, or the connection's end.
HTTP2: dict[str, tuple[list[tuple[bytes, bytes]], bytes | None]] = {
    "encoding": ([*PSEUDO, (b"transfer-encoding", b"chunked")], b"0\r\n\r\n" + SMUGGLED),
    "length-too-short": ([*PSEUDO, (b"content-length", b"1")], b"a" + SMUGGLED),
    "length-too-long": ([*PSEUDO, (b"content-length", b"99")], b"a"),
    "two-lengths": ([*PSEUDO, (b"content-length", b"0"), (b"content-length", b"49")], SMUGGLED),
    "length-list": ([*PSEUDO, (b"content-length", b"49, 49")], SMUGGLED),
    "connection": ([*PSEUDO, (b"connection", b"x-forwarded-for")], None),
    "crlf-in-value": (
        [*PSEUDO, (b"x", b"a\r\nTransfer-Encoding: chunked\r\n\r\n" + SMUGGLED)],
        None,
    ),
    "lf-in-value": ([*PSEUDO, (b"x", b"a\ncf-ray: evil")], None),
    "nul-in-value": ([*PSEUDO, (b"x", b"a\0b")], None),
    "crlf-in-name": ([*PSEUDO, (b"x: a\r\ny", b"b")], None),
    "colon-in-name": ([*PSEUDO, (b"x:y", b"b")], None),
    "upper-case": ([*PSEUDO, (b"Cf-Cloudflared-Proxy-Src", b"evil")], None),
    "crlf-in-path": (with_pseudo(b":path", b"/ HTTP/1.1\r\nHost: evil\r\n\r\n" + SMUGGLED), None),
    "blank-in-path": (with_pseudo(b":path", b"/smuggled HTTP/1.1"), None),
    "absolute-path": (with_pseudo(b":path", b"https://evil.example.com/"), None),
    "empty-path": (with_pseudo(b":path", b""), None),
    "crlf-in-method": (with_pseudo(b":method", b"GET /smuggled HTTP/1.1\r\nX: y\r\n"), None),
    "crlf-in-authority": (with_pseudo(b":authority", b"raw.example.com\r\nX: evil"), None),
    "user-in-authority": (with_pseudo(b":authority", b"evil@raw.example.com"), None),
    "other-host": ([*PSEUDO, (b"host", b"evil.example.com")], None),
    "two-paths": ([*PSEUDO, (b":path", b"/smuggled")], None),
    "unknown-pseudo": ([*PSEUDO, (b":evil", b"1")], None),
    "pseudo-after": ([(b"x", b"y"), *PSEUDO], None),
    "management": (with_pseudo(b":authority", b"management.argotunnel.com"), None),
    "connect": ([(b":method", b"CONNECT"), (b":authority", b"127.0.0.1:22")], b"SSH"),
}


@pytest.mark.parametrize("name", HTTP2)
async def test_malformed_http2(site: Site, name: str) -> None:
    """What is no header or no path, and would be another one in HTTP/1.1, is refused."""
    headers, body = HTTP2[name]
    status = await attack2(site, headers, body)
    assert status is None or 400 <= status < 600
    await assert_unharmed(site, expected=1)
    assert not any(b"/smuggled" in received for received in site.raw.received if body is None)


async def test_odd_http2(site: Site) -> None:
    """Forged headers, cookies apart, and bytes that are no ASCII."""
    forged = [(name.lower(), value) for name, value in FORGED]
    assert await attack2(site, [*PSEUDO, *forged], b"x") == 200
    cookies = [(b"cookie", b"a=1"), (b"cookie", b"b=2"), (b"x-name", "Zoë".encode("latin-1"))]
    assert await attack2(site, [*PSEUDO, *cookies, (b"te", b"trailers")], b"x") == 200
    await assert_unharmed(site, expected=2)
    headers = dict(site.raw.requests()[-1].headers)
    assert (headers[b"cookie"], headers[b"x-name"]) == (b"a=1; b=2", "Zoë".encode("latin-1"))


@pytest.mark.parametrize("version", ["1.1", "2"])
async def test_large_heads(site: Site, version: str) -> None:
    """As many and as large headers as the edge takes, and more, cost no connection to the
    connector, on which others' requests are."""
    many = [(b"x-%d" % number, b"v") for number in range(240)]
    large = [(b"x-large", b"v" * 60_000)]
    both = [(b"x-%d" % number, b"v" * 200) for number in range(240)]
    escaped = [(b"x-escaped", b"\xff" * 60_000)]
    statuses = []
    for headers in (many, large, both, escaped, many * 2, large * 2):
        async with site.visitor(version).visit(
            "GET", "/", headers, host="raw.example.com"
        ) as visit:
            try:
                statuses.append((await visit.response())[0])
            except TruncatedError:
                statuses.append(431)  # in HTTP/2 the connection ends before it is a request
    assert statuses[:4] == [200] * 4
    assert all(400 <= status < 500 for status in statuses[4:])
    await assert_unharmed(site, expected=4)
