"""Nothing that a visitor sends reaches a connector's controls, and nothing is read in two ways."""

from __future__ import annotations

from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.edge.connection import Headers, RequestHead
from relay.edge.hygiene import (
    HygienePolicy,
    RawRequest,
    RequestRefusedError,
    ResponseRefusedError,
    Visitor,
    clean_request,
    clean_response,
    clean_trailers,
    has_dot_segment,
    normal_host,
    websocket_response,
)

VISITOR = Visitor("192.0.2.7", "https")
POLICY = HygienePolicy()


def clean(
    *headers: tuple[bytes, bytes],
    method: bytes = b"GET",
    target: bytes = b"/",
    host: bytes | None = b"app.example.com",
    version: Literal["1.0", "1.1", "2"] = "1.1",
    authority: bytes = b"",
    protocol: bytes = b"",
) -> RequestHead:
    """A request through the hygiene."""
    all_headers = headers if host is None else ((b"host", host), *headers)
    raw = RawRequest(method, target, all_headers, authority, protocol, version)
    return clean_request(raw, VISITOR, "ray", POLICY)


def values(head: RequestHead | Headers, name: bytes) -> list[bytes]:
    headers = head.headers if isinstance(head, RequestHead) else head
    return [value for key, value in headers if key == name]


def refused(*headers: tuple[bytes, bytes], **more: object) -> int:
    with pytest.raises(RequestRefusedError) as caught:
        clean(*headers, **more)  # type: ignore[arg-type]
    return caught.value.status


def test_a_request_is_passed_on_with_what_the_edge_knows() -> None:
    """Ordinary headers stay, in order; the edge adds who asks and how."""
    head = clean((b"accept", b"*/*"), (b"x-a", b"1"), (b"x-a", b"2"), target=b"/a?b=c")
    assert (head.method, head.authority, head.path) == ("GET", "app.example.com", "/a?b=c")
    assert head.headers == (
        (b"accept", b"*/*"),
        (b"x-a", b"1"),
        (b"x-a", b"2"),
        (b"x-forwarded-for", b"192.0.2.7"),
        (b"x-forwarded-proto", b"https"),
        (b"cf-connecting-ip", b"192.0.2.7"),
        (b"cf-ray", b"ray"),
    )
    assert not head.has_body


@pytest.mark.parametrize(
    "name",
    [
        b"cf-cloudflared-proxy-connection-upgrade",
        b"cf-cloudflared-proxy-src",
        b"cf-int-cloudflared-tracing",
        b"cf-proxy-x",
        b"cf-warp-tag-id",
        b"cf-access-authenticated-user-email",
        b"cf-trace-id",
        b"forwarded",
        b"x-real-ip",
        b"true-client-ip",
        b"x-forwarded-host",
        b"proxy-connection",
        b"keep-alive",
        b"http2-settings",
    ],
)
def test_reserved_headers_of_visitors_are_taken_out(name: bytes) -> None:
    """What controls a connector, or what an origin would believe, never comes from a visitor."""
    assert not values(clean((name, b"1")), name)


def test_the_edges_own_headers_replace_the_visitors() -> None:
    """A visitor cannot say another address, scheme or ray for itself."""
    head = clean(
        (b"x-forwarded-for", b"10.0.0.1"),
        (b"cf-connecting-ip", b"10.0.0.1"),
        (b"cf-ray", b"x"),
        (b"x-forwarded-proto", b"http"),
    )
    assert values(head, b"x-forwarded-for") == [b"192.0.2.7"]
    assert values(head, b"cf-connecting-ip") == [b"192.0.2.7"]
    assert values(head, b"cf-ray") == [b"ray"]
    assert values(head, b"x-forwarded-proto") == [b"https"]


def test_connection_headers_and_what_they_list_are_taken_out() -> None:
    """Connection names further hop-by-hop headers, but can't remove what the edge adds."""
    head = clean(
        (b"connection", b"X-Secret, close, cf-connecting-ip, x-forwarded-for"),
        (b"x-secret", b"1"),
        (b"te", b"trailers, deflate"),
    )
    assert not values(head, b"x-secret")
    assert not values(head, b"connection")
    assert values(head, b"te") == [b"trailers"]
    assert values(head, b"cf-connecting-ip") == [b"192.0.2.7"]


@pytest.mark.parametrize(
    "host",
    [
        b"management.argotunnel.com",
        b"MANAGEMENT.ArgoTunnel.COM",
        b"management.argotunnel.com:443",
        b"management.argotunnel.com.",
        b"Management.argotunnel.com.:8443",
    ],
)
def test_the_management_host_is_refused_in_every_spelling(host: bytes) -> None:
    """As Host, as :authority, and as the host of an absolute URL."""
    assert refused(host=host) == 403
    assert refused(host=None, authority=host, version="2") == 403
    assert refused(host=None, target=b"http://" + host + b"/logs", version="1.0") == 403
    assert refused(host=host, target=b"http://" + host + b"/logs") == 403
    # The request line counts, whatever Host says.
    assert refused(host=b"app.example.com", target=b"https://" + host + b"/logs") == 400


@pytest.mark.parametrize(
    "host",
    [
        b"",
        b"a b",
        b"user@management.argotunnel.com",
        b"app.example.com, management.argotunnel.com",
        b"management%2eargotunnel.com",
        b"app.example.com:99999",
        b"app.example.com:443:1",
        b"app.example.com/x",
        b"app.example.com..",
        b".example.com",
        b"\xe3\x80\x82com",
        b"[::1",
        b"[zz]",
        b"app.example.com#",
    ],
)
def test_malformed_hosts_are_refused(host: bytes) -> None:
    """A host is a name or a bracketed IPv6 address, with a port at most."""
    assert refused(host=host) == 400


def test_one_host_and_one_only() -> None:
    """No Host, several, or two that differ, are refused; equal ones in two places are not."""
    assert refused(host=None) == 400
    assert refused((b"host", b"app.example.com")) == 400
    assert refused(host=b"a.example.com", authority=b"b.example.com", version="2") == 400
    head = clean(host=b"A.example.com.:0443", target=b"http://a.example.com:443?x")
    assert (head.authority, head.path) == ("a.example.com:443", "/?x")


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ([(b"content-length", b"5"), (b"transfer-encoding", b"chunked")], 400),
        ([(b"content-length", b"5"), (b"content-length", b"5")], 400),
        ([(b"content-length", b"5"), (b"content-length", b"6")], 400),
        ([(b"content-length", b"5, 5")], 400),
        ([(b"content-length", b"+5")], 400),
        ([(b"content-length", b"-1")], 400),
        ([(b"content-length", b"0x5")], 400),
        ([(b"content-length", b"")], 400),
        ([(b"content-length", b"9" * 30)], 400),
        ([(b"transfer-encoding", b"chunked"), (b"transfer-encoding", b"identity")], 400),
        ([(b"transfer-encoding", b"gzip, chunked")], 501),
        ([(b"transfer-encoding", b"xchunked")], 501),
        ([(b"transfer-encoding", b"chunked\x0b")], 400),
        ([(b"x-a", b"1\r\nx-b: 2")], 400),
        ([(b"x-a", b"1\n")], 400),
        ([(b"x-a", b"\x00")], 400),
        ([(b"x:a", b"1")], 400),
        ([(b"x a", b"1")], 400),
        ([(b"", b"1")], 400),
        ([(b"transfer-encoding ", b"chunked")], 400),
        ([(b"x-\xc3\xa9", b"1")], 400),
        ([(b":path", b"/")], 400),
        ([(b"X-A", b"1")], 400),
    ],
)
def test_what_can_be_read_in_two_ways_is_refused(
    headers: list[tuple[bytes, bytes]], status: int
) -> None:
    """Request smuggling needs a message that two programs cut differently: none passes."""
    assert refused(*headers, method=b"POST") == status


@pytest.mark.parametrize(
    "target", [b"", b"x", b"/a b", b"/a\r\nb", b"/\x00", b"/#x", b"/\xff", b"ftp://h/", b"//",
               b"https:///x", b"*"],
)  # fmt: skip
def test_targets_are_paths_or_http_urls(target: bytes) -> None:
    """Everything else is refused, `//` aside, which is a path."""
    if target == b"//":
        assert clean(target=target).path == "//"
    else:
        assert refused(target=target) == 400
    assert clean(target=b"*", method=b"OPTIONS").path == "*"
    assert refused(target=b"/" + b"a" * 20000) == 414
    assert refused(target=b"http://app.example.com/", host=None, authority=b"x", version="2") == 400


def test_methods() -> None:
    """CONNECT and TRACE are not served, malformed methods refused, unknown ones passed on."""
    assert refused(method=b"CONNECT", target=b"app.example.com:443") == 405
    assert refused(method=b"TRACE") == 405
    assert refused(method=b"GE T") == 400
    assert clean(method=b"PROPFIND").method == "PROPFIND"


def test_bodies_are_announced_as_they_are() -> None:
    """A request has a body where Content-Length is above zero or the body is chunked."""
    assert clean((b"content-length", b"0"), method=b"POST").has_body is False
    assert clean((b"content-length", b"7"), method=b"POST").has_body is True
    chunked = clean((b"transfer-encoding", b"Chunked"), method=b"POST")
    assert chunked.has_body is True
    assert not values(chunked, b"transfer-encoding")


def test_cookies_that_come_apart_go_on_together() -> None:
    """HTTP/2 splits Cookie; origins speak HTTP/1.1."""
    head = clean((b"cookie", b"a=1"), (b"x-a", b"1"), (b"cookie", b"b=2"))
    assert values(head, b"cookie") == [b"a=1; b=2"]


def test_too_many_headers_are_refused() -> None:
    """In number and in size."""
    assert refused(*[(b"x", b"")] * 300) == 431
    assert refused((b"x", b"a" * 70000)) == 431


UPGRADE = (
    (b"connection", b"keep-alive, Upgrade"),
    (b"upgrade", b"websocket"),
    (b"sec-websocket-key", b"dGhlIHNhbXBsZSBub25jZQ=="),
    (b"sec-websocket-protocol", b"chat"),
)


def test_websockets_in_either_version() -> None:
    """HTTP/1.1's upgrade and HTTP/2's extended CONNECT become the same request."""
    head = clean(*UPGRADE)
    assert (head.kind, head.method, head.has_body) == ("websocket", "GET", True)
    assert values(head, b"sec-websocket-protocol") == [b"chat"]
    assert not values(head, b"upgrade")
    assert not values(head, b"connection")
    over_http2 = clean(
        method=b"CONNECT", protocol=b"websocket", host=None, authority=b"a.example", version="2"
    )
    assert (over_http2.kind, over_http2.method) == ("websocket", "GET")
    assert len(values(over_http2, b"sec-websocket-key")) == 1
    assert refused(*UPGRADE, method=b"POST") == 400
    assert refused(*UPGRADE, (b"content-length", b"3")) == 400
    assert refused(*UPGRADE[:2]) == 400
    assert clean(*UPGRADE[1:]).kind == "http", "without Connection: upgrade it is none"
    assert clean(*UPGRADE[:1], (b"upgrade", b"h2c")).kind == "http"


def test_a_bastions_destination_is_authorized() -> None:
    """The one `cf-` header that clients send says what a connector is to dial: it is checked."""
    jump = b"cf-access-jump-destination"
    assert values(clean((jump, b"10.0.0.9:22")), jump) == [b"10.0.0.9:22"]
    for bad in (b"127.0.0.1:22", b"169.254.169.254:80", b"localhost:22", b"metadata:80"):
        assert refused((jump, bad)) == 403


def test_responses_lose_what_was_for_the_edge() -> None:
    """Hop-by-hop and reserved headers stay here; the others, repeated ones too, go on."""
    headers = (
        (b"set-cookie", b"a=1"),
        (b"set-cookie", b"b=2"),
        (b"connection", b"x-hop"),
        (b"x-hop", b"1"),
        (b"cf-cloudflared-response-meta", b"{}"),
        (b"cf-int-x", b"1"),
        (b"transfer-encoding", b"chunked"),
        (b"content-length", b"3"),
    )
    assert clean_response(200, headers) == (
        (b"set-cookie", b"a=1"),
        (b"set-cookie", b"b=2"),
        (b"content-length", b"3"),
    )


@pytest.mark.parametrize(
    ("status", "headers"),
    [
        (99, ()),
        (1000, ()),
        (200, ((b"x", b"a\r\nset-cookie: evil"),)),
        (200, ((b"x y", b"a"),)),
        (200, ((b"content-length", b"1"), (b"content-length", b"2"))),
        (200, ((b"content-length", b"1x"),)),
        (200, ((b"x", b""),) * 300),
    ],
)
def test_bad_responses_reach_nobody(status: int, headers: Headers) -> None:
    """A response that splits, or that can be read in two ways, is a failure of the connector."""
    with pytest.raises(ResponseRefusedError):
        clean_response(status, headers)


def test_trailers_are_trailers_only() -> None:
    """Framing, routing and authentication don't come late."""
    assert clean_trailers(
        (
            (b"grpc-status", b"0"),
            (b"content-length", b"1"),
            (b"host", b"x"),
            (b"authorization", b"x"),
            (b"cf-cloudflared-proxy-src", b"x"),
            (b"x-forwarded-for", b"x"),
            (b"transfer-encoding", b"chunked"),
            (b"bad name", b"x"),
            (b"x", b"\r\n"),
        )
    ) == ((b"grpc-status", b"0"),)


def test_websocket_responses() -> None:
    """HTTP/1.1 gets the upgrade back, HTTP/2 the plain headers without the accept key."""
    headers = ((b"sec-websocket-accept", b"x"), (b"sec-websocket-protocol", b"chat"))
    assert websocket_response(headers, "1.1") == (
        *headers,
        (b"upgrade", b"websocket"),
        (b"connection", b"Upgrade"),
    )
    assert websocket_response(headers, "2") == headers[1:]


@pytest.mark.parametrize(
    ("path", "dotted"),
    [
        ("/a/b", False),
        ("/a.b/..c/...", False),
        ("/a?x=/../b", False),
        ("/a/../b", True),
        ("/a/.", True),
        ("/a/%2e%2E/b", True),
        ("/a/%252e%252e/b", True),
        ("/a/..%2fb", True),
        ("/a/..%5cb", True),
        ("/a\\..\\b", True),
        ("/a/..;x=1/b", True),
    ],
)
def test_dot_segments_are_found_in_every_spelling(path: str, dotted: bool) -> None:
    """A prefix route is no prefix of a path that leads elsewhere."""
    assert has_dot_segment(path) is dotted


def test_normal_hosts() -> None:
    """Case, port and final dot don't count."""
    assert normal_host("App.Example.com.:8443") == "app.example.com"
    assert normal_host("[2001:DB8::0:1]:1") == "[2001:db8::1]"
    assert normal_host("a b") is None
    assert normal_host("é") is None


header_names = st.one_of(
    st.sampled_from(
        [b"host", b"connection", b"content-length", b"transfer-encoding", b"upgrade", b"te",
         b"cf-cloudflared-proxy-src", b"cf-access-jump-destination", b"x-a", b"cookie"]
    ),
    st.binary(max_size=8),
)  # fmt: skip
header_values = st.one_of(
    st.sampled_from(
        [b"close, x-a", b"upgrade", b"websocket", b"chunked", b"5", b"a.example", b"trailers"]
    ),
    st.binary(max_size=12),
)
wild_headers = st.lists(st.tuples(header_names, header_values), max_size=8).map(tuple)


@given(
    st.sampled_from([b"GET", b"POST", b"CONNECT", b"OPTIONS"]),
    st.one_of(st.sampled_from([b"/", b"*", b"http://h/x"]), st.binary(max_size=20)),
    wild_headers,
    st.sampled_from(["1.0", "1.1", "2"]),
    st.sampled_from([b"", b"a.example"]),
)
def test_whatever_comes_is_refused_or_clean(
    method: bytes, target: bytes, headers: Headers, version: Literal["1.0", "1.1", "2"],
    authority: bytes,
) -> None:  # fmt: skip
    """What passes has no reserved, hop-by-hop or malformed header, and a plain target."""
    raw = RawRequest(method, target, headers, authority, b"", version)
    try:
        head = clean_request(raw, VISITOR, "ray", POLICY)
    except RequestRefusedError:
        return
    names = [name for name, _ in head.headers]
    for name, value in head.headers:
        assert name == name.lower()
        assert not set(name + value) & set(b"\r\n\0")
        assert b":" not in name
        assert not name.startswith((b"cf-cloudflared-", b"cf-int-", b"cf-proxy-"))
    assert not set(names) & {b"connection", b"transfer-encoding", b"host", b"upgrade"}
    assert names.count(b"content-length") <= 1
    assert names.count(b"cf-connecting-ip") == 1
    assert head.path.startswith("/") or head.path == "*"
    assert head.authority.isascii()


@given(st.integers(0, 1200), wild_headers)
def test_whatever_response_comes_is_refused_or_clean(status: int, headers: Headers) -> None:
    """The same for responses."""
    try:
        cleaned = clean_response(status, headers)
    except ResponseRefusedError:
        return
    names = [name for name, _ in cleaned]
    assert not set(names) & {b"connection", b"transfer-encoding", b"upgrade"}
    assert names.count(b"content-length") <= 1
    assert not any(set(name + value) & set(b"\r\n\0") for name, value in cleaned)
