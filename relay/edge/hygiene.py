"""What a visitor's request may carry to a connector, and a connector's response to a visitor. Pure.

Nothing that a visitor sends may reach a connector's controls: headers named `cf-*` belong to the
edge (`cf-cloudflared-*` chooses what a connector does with a request), and requests for the
management host would be served by the connector itself (edge tunnel specification 5.2, 14.3).
Nothing may be read in two ways either (RFC 9112 11.2): what is ambiguous is refused, not repaired.

Header names are in lower case here; values are bytes without leading or trailing blanks.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Final, Literal
from urllib.parse import unquote_to_bytes

from relay.edge.connection import Headers, RequestHead
from relay.edge.destinations import DestinationError, DestinationPolicy

MANAGEMENT_HOST: Final = "management.argotunnel.com"
MAX_HEADERS: Final = 256
MAX_HEADER_BYTES: Final = 64 << 10
"""Of all names and values; nginx takes 32 KiB, Go's server 1 MiB."""
MAX_TARGET_BYTES: Final = 16 << 10

_TOKEN: Final = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_NAME: Final = re.compile(rb"[!#$%&'*+.^_`|~0-9a-z-]+")
_VALUE: Final = re.compile(rb"[\t\x20-\x7e\x80-\xff]*")
_TARGET: Final = re.compile(rb"[\x21\x22\x24-\x7e]+")
"""Visible ASCII without the fragment's "#"."""
_HOST: Final = re.compile(
    rb"(?P<host>[A-Za-z0-9_-]+(?:\.[A-Za-z0-9_-]+)*)\.?(?::(?P<port>[0-9]{0,5}))?"
)
_HOST_IPV6: Final = re.compile(rb"\[(?P<host>[0-9A-Fa-f:.]+)\](?::(?P<port>[0-9]{0,5}))?")
_LENGTH: Final = re.compile(rb"[0-9]{1,18}")
_ABSOLUTE: Final = re.compile(rb"https?://(?P<authority>[^/?]*)(?P<rest>.*)", re.IGNORECASE)

_HOP_BY_HOP: Final = frozenset(
    b"connection keep-alive proxy-connection proxy-authenticate proxy-authorization te "
    b"transfer-encoding upgrade http2-settings".split()
)
"""RFC 9110 7.6.1, and what only ever meant something to the next hop."""
_OURS: Final = frozenset(
    b"x-forwarded-for x-forwarded-proto x-forwarded-host x-forwarded-port x-real-ip forwarded "
    b"true-client-ip".split()
)
"""Origins believe these; behind an edge only the edge knows."""
_RESERVED_PREFIXES: Final = (b"cf-cloudflared-", b"cf-int-", b"cf-proxy-")
_JUMP: Final = b"cf-access-jump-destination"
"""Where a bastion service is to connect (specification 12.2): a destination like any other."""
_NOT_IN_TRAILERS: Final = frozenset(
    b"host content-length content-encoding content-type content-range authorization cookie "
    b"set-cookie cache-control expect max-forwards range age date expires location retry-after "
    b"vary warning www-authenticate trailer".split()
)
"""RFC 9110 6.5.1: framing, routing, authentication, what decides how to read the body."""


class RequestRefusedError(Exception):
    """A request that is not passed on; `status` is what the visitor gets, the text says why."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


class ResponseRefusedError(Exception):
    """A response that a connector sent and no visitor gets; the text says why."""


@dataclass(frozen=True, slots=True)
class Visitor:
    """Who asks: an IP address in text form, and how it came."""

    address: str
    scheme: Literal["http", "https"]


@dataclass(frozen=True, slots=True)
class RawRequest:
    """A request as it was parsed by h11 or h2, before anything was judged.

    Attributes:
        target: of the request line, or `:path`.
        authority: of HTTP/2's `:authority`; empty in HTTP/1.1.
        headers: without pseudo-headers.
        protocol: of an extended CONNECT (RFC 8441); empty otherwise.
    """

    method: bytes
    target: bytes
    headers: Headers
    authority: bytes = b""
    protocol: bytes = b""
    version: Literal["1.0", "1.1", "2"] = "1.1"


@dataclass(frozen=True, slots=True)
class HygienePolicy:
    """What depends on the operator: the connectors' management hosts, and the destinations that a
    bastion may be sent to."""

    management_hosts: Collection[str] = (MANAGEMENT_HOST,)
    destinations: DestinationPolicy = field(default_factory=DestinationPolicy)


def clean_request(
    raw: RawRequest, visitor: Visitor, ray: str, policy: HygienePolicy, *, has_body: bool = True
) -> RequestHead:
    """The request as a connector may see it.

    Args:
        ray: the request's id, for `cf-ray`.
        has_body: in HTTP/2, where the headers don't say it.

    Raises RequestRefusedError.
    """
    headers = _checked(raw.headers)
    websocket = _is_websocket(raw, headers)
    if not _TOKEN.fullmatch(raw.method):
        raise RequestRefusedError(400, "the method is malformed")
    if raw.method in (b"CONNECT", b"TRACE") and not websocket:
        raise RequestRefusedError(405, "this method is not served")
    authority, path = _split_target(raw)
    host = _only(headers, b"host")
    if raw.version == "1.1" and host is None:
        raise RequestRefusedError(400, "there is no Host header")
    # What the request line says counts (RFC 9112 3.2.2); a Host that says otherwise may be read by
    # somebody else.
    if host is not None and authority and _normal_authority(host) != _normal_authority(authority):
        raise RequestRefusedError(400, "the request names two hosts")
    name, port = _normal_authority(authority or host or b"")
    if name in policy.management_hosts:
        raise RequestRefusedError(403, "the connector's management host is not for visitors")
    has_body = _has_body(raw, headers, has_body)
    if websocket and has_body and raw.version != "2":
        raise RequestRefusedError(400, "a WebSocket request has no body")
    kept = _kept(headers, policy.destinations)
    if websocket and _only(headers, b"sec-websocket-key") is None:
        # HTTP/2 has none (RFC 8441 5); origins want one. Nobody checks the answer to this one.
        kept.append((b"sec-websocket-key", b"dW5kZXJwYXNzIGVkZ2UuLg=="))
    kept += [
        (b"x-forwarded-for", visitor.address.encode()),
        (b"x-forwarded-proto", visitor.scheme.encode()),
        (b"cf-connecting-ip", visitor.address.encode()),
        (b"cf-ray", ray.encode()),
    ]
    return RequestHead(
        method="GET" if websocket else raw.method.decode("ascii"),
        scheme=visitor.scheme,
        authority=name + (f":{port}" if port else ""),
        path=path.decode("ascii"),
        headers=tuple(kept),
        kind="websocket" if websocket else "http",
        has_body=has_body or websocket,
    )


def clean_response(status: int, headers: Headers) -> Headers:
    """A connector's response headers as a visitor may see them. Raises ResponseRefusedError."""
    if not 100 <= status <= 999:
        raise ResponseRefusedError(f"the status is {status}")
    if len(headers) > MAX_HEADERS or _size(headers) > MAX_HEADER_BYTES:
        raise ResponseRefusedError("there are too many or too large headers")
    listed = _listed_by_connection(headers)
    kept: list[tuple[bytes, bytes]] = []
    lengths: set[bytes] = set()
    for name, value in headers:
        if not _NAME.fullmatch(name) or not _VALUE.fullmatch(value):
            raise ResponseRefusedError(f"the header {name[:40]!r} is malformed")
        if name == b"content-length":
            if not _LENGTH.fullmatch(value):
                raise ResponseRefusedError("the content length is no number")
            lengths.add(value)
        elif not _is_dropped(name, listed):
            kept.append((name, value))
    if len(lengths) > 1:
        raise ResponseRefusedError("there are two content lengths")
    kept += [(b"content-length", length) for length in lengths]
    return tuple(kept)


def clean_trailers(trailers: Headers) -> Headers:
    """Trailers of either direction, without what must not be one; malformed ones are left out."""
    if len(trailers) > MAX_HEADERS or _size(trailers) > MAX_HEADER_BYTES:
        return ()
    return tuple(
        (name, value)
        for name, value in trailers
        if _NAME.fullmatch(name)
        and _VALUE.fullmatch(value)
        and not _is_dropped(name, ())
        and name not in _NOT_IN_TRAILERS
        and name not in _OURS
        and not name.startswith(b"cf-")
    )


def websocket_response(headers: Headers, version: str) -> Headers:
    """The headers of a successful WebSocket upgrade, cleaned, for a visitor of this version."""
    kept = [(n, v) for n, v in headers if n not in (b"content-length", b"content-type")]
    if version == "2":
        return tuple((n, v) for n, v in kept if n != b"sec-websocket-accept")
    return (*kept, (b"upgrade", b"websocket"), (b"connection", b"Upgrade"))


def normal_host(text: str) -> str | None:
    """A host name as it is compared: lower case, without port and final dot; None if malformed."""
    try:
        return _normal_authority(text.encode("ascii"))[0]
    except (RequestRefusedError, UnicodeEncodeError):
        return None


def has_dot_segment(path: str) -> bool:
    """Whether an origin could read this path (without query) as another one, further up: a segment
    `.` or `..` in any spelling, of which Tomcat's `..;x`, encoded and doubly encoded dots and
    slashes, and backslashes are some."""
    data = path.partition("?")[0].encode("latin-1", "replace")
    for _ in range(3):
        decoded = unquote_to_bytes(data)
        if decoded == data:
            break
        data = decoded
    segments = data.replace(b"\\", b"/").split(b"/")
    return any(segment.partition(b";")[0] in (b".", b"..") for segment in segments)


def _checked(headers: Headers) -> Headers:
    """The headers, if each of them is well formed."""
    if len(headers) > MAX_HEADERS or _size(headers) > MAX_HEADER_BYTES:
        raise RequestRefusedError(431, "there are too many or too large headers")
    for name, value in headers:
        if not _NAME.fullmatch(name) or not _VALUE.fullmatch(value):
            raise RequestRefusedError(400, f"the header {name[:40]!r} is malformed")
    return headers


def _is_websocket(raw: RawRequest, headers: Headers) -> bool:
    if raw.protocol:
        if raw.method == b"CONNECT" and raw.protocol == b"websocket":
            return True
        raise RequestRefusedError(501, "this protocol is not served by CONNECT")
    if raw.version != "1.1" or b"websocket" not in _words(headers, b"upgrade"):
        return False
    if b"upgrade" not in _words(headers, b"connection"):
        return False
    if raw.method != b"GET":
        raise RequestRefusedError(400, "a WebSocket request must be a GET")
    if _only(headers, b"sec-websocket-key") is None:
        raise RequestRefusedError(400, "a WebSocket request needs Sec-WebSocket-Key")
    return True


def _split_target(raw: RawRequest) -> tuple[bytes, bytes]:
    """Authority (empty if only Host says it) and path with query."""
    target = raw.target
    if len(target) > MAX_TARGET_BYTES:
        raise RequestRefusedError(414, "the request target is too long")
    if not _TARGET.fullmatch(target):
        raise RequestRefusedError(400, "the request target is malformed")
    if target == b"*" and raw.method == b"OPTIONS":
        return raw.authority, target
    if target.startswith(b"/"):
        return raw.authority, target
    if raw.version != "2" and (match := _ABSOLUTE.fullmatch(target)):
        rest = match["rest"]
        if not match["authority"]:
            raise RequestRefusedError(400, "the request target has no host")
        return match["authority"], rest if rest.startswith(b"/") else b"/" + rest
    raise RequestRefusedError(400, "the request target is neither a path nor an http URL")


def _normal_authority(authority: bytes) -> tuple[str, str]:
    """Host in lower case without final dot, and port (empty if none)."""
    match = _HOST.fullmatch(authority) or _HOST_IPV6.fullmatch(authority)
    if match is None or len(authority) > 260:
        raise RequestRefusedError(400, "the host is malformed")
    port = (match["port"] or b"").decode().lstrip("0")
    if port and int(port) > 65535:
        raise RequestRefusedError(400, "the host's port is malformed")
    name = match["host"].decode().lower()
    if not authority.startswith(b"["):
        return name, port
    try:
        return f"[{ipaddress.IPv6Address(name)}]", port
    except ValueError:
        raise RequestRefusedError(400, "the host is malformed") from None


def _has_body(raw: RawRequest, headers: Headers, otherwise: bool) -> bool:
    """Whether a body follows; refuses what can be read in two ways."""
    length = _only(headers, b"content-length")
    if length is not None and not _LENGTH.fullmatch(length):
        raise RequestRefusedError(400, "the content length is no number")
    if raw.version == "2":
        return otherwise
    encoding = _only(headers, b"transfer-encoding")
    if encoding is None:
        return length is not None and int(length) > 0
    if raw.version == "1.0" or length is not None:
        raise RequestRefusedError(400, "there are two ways to read where the body ends")
    if encoding.lower() != b"chunked":
        raise RequestRefusedError(501, "this transfer encoding is not served")
    return True


def _kept(headers: Headers, destinations: DestinationPolicy) -> list[tuple[bytes, bytes]]:
    listed = _listed_by_connection(headers)
    kept: list[tuple[bytes, bytes]] = []
    for name, value in headers:
        if name == _JUMP:
            try:
                kept.append((name, str(destinations.authorize(value.decode("latin-1"))).encode()))
            except DestinationError as error:
                raise RequestRefusedError(403, str(error)) from None
        elif (
            not _is_dropped(name, listed)
            and not name.startswith(b"cf-")
            and name not in _OURS
            and name not in (b"host", b"expect")
        ):
            kept.append((name, value))
    if b"trailers" in _words(headers, b"te"):
        kept.append((b"te", b"trailers"))  # gRPC asks for it, and HTTP/2 allows just this
    return _with_one_cookie(kept)


def _with_one_cookie(headers: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """HTTP/2 may send cookies apart, which HTTP/1.1 may not (RFC 9113 8.2.3)."""
    cookies = [value for name, value in headers if name == b"cookie"]
    if len(cookies) < 2:
        return headers
    kept = [(name, value) for name, value in headers if name != b"cookie"]
    return [*kept, (b"cookie", b"; ".join(cookies))]


def _is_dropped(name: bytes, listed: Collection[bytes]) -> bool:
    return name in _HOP_BY_HOP or name in listed or name.startswith(_RESERVED_PREFIXES)


def _listed_by_connection(headers: Headers) -> set[bytes]:
    """The names that Connection makes hop-by-hop; never those that say where a body ends."""
    return _words(headers, b"connection") - {b"content-length", b"host"}


def _words(headers: Headers, wanted: bytes) -> set[bytes]:
    """The comma-separated words of all headers of a name, in lower case."""
    values = (value for name, value in headers if name == wanted)
    return {word.strip().lower() for value in values for word in value.split(b",")} - {b""}


def _only(headers: Headers, wanted: bytes) -> bytes | None:
    """The value of a header that may be there once."""
    values = [value for name, value in headers if name == wanted]
    if len(values) > 1:
        raise RequestRefusedError(400, f"there are several {wanted.decode()} headers")
    return values[0] if values else None


def _size(headers: Iterable[tuple[bytes, bytes]]) -> int:
    return sum(len(name) + len(value) for name, value in headers)
