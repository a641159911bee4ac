"""What an ingress rule leads to (edge tunnel specification 12.2). Pure.

| text | meaning |
|---|---|
| `http://host:port`, `https://`, `ws://`, `wss://` | an HTTP origin |
| `unix:/path`, `unix+tls:/path` | HTTP over a Unix socket |
| `tcp://host:port`, `ssh://`, `rdp://`, `smb://` | TCP, for the visitor inside a websocket |
| `http_status:NNN` | a fixed answer |
| `hello_world` | a page of our own |
| `bastion` | TCP to where the visitor says, as far as the rule's `ipRules` allow |
| `socks-proxy` | SOCKS5 in a websocket, as far as the rule's `ipRules` allow |
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final, TypeAlias

from traversal.tunnel.checking import nearest
from traversal.wire.tunnel.errors import TunnelError

_HTTP_SCHEMES: Final = {"http": 80, "https": 443, "ws": 80, "wss": 443}
_TCP_SCHEMES: Final = {"tcp": 7864, "ssh": 22, "rdp": 3389, "smb": 445}
"""With their default ports."""
_WORDS: Final = ("hello_world", "bastion", "socks-proxy", "http_status:404")
_PLACE: Final = re.compile(
    r"(?:\[(?P<ipv6>[0-9A-Fa-f:.]+(?:%[^\]]+)?)\]|(?P<host>[^\s:/?#@\[\]]+))(?::(?P<port>[0-9]{1,5}))?"
)


@dataclass(frozen=True, slots=True)
class HttpService:
    """An HTTP origin, by TCP or, where `path` is set, by a Unix socket."""

    is_tls: bool
    host: str = "localhost"
    port: int = 0
    path: str = ""


@dataclass(frozen=True, slots=True)
class TcpService:
    """A TCP origin: the visitor's end speaks websocket, whose messages are the bytes."""

    host: str
    port: int


@dataclass(frozen=True, slots=True)
class StatusService:
    """A fixed answer without a body."""

    status: int


@dataclass(frozen=True, slots=True)
class HelloService:
    """A page of our own, to see that a tunnel works."""


@dataclass(frozen=True, slots=True)
class BastionService:
    """TCP to the host that the visitor names in `cf-access-jump-destination`."""


@dataclass(frozen=True, slots=True)
class SocksService:
    """SOCKS5: the visitor names the destination in the protocol."""


Service: TypeAlias = (
    HttpService | TcpService | StatusService | HelloService | BastionService | SocksService
)


def parse_service(text: str) -> Service:
    """Read a rule's service. Raises TunnelError."""
    match text:
        case "hello_world" | "hello-world":
            return HelloService()
        case "bastion":
            return BastionService()
        case "socks-proxy":
            return SocksService()
    scheme, colon, rest = text.partition(":")
    if scheme == "http_status" and colon:
        if not re.fullmatch("[1-9][0-9]{2}", rest):
            raise TunnelError(f"service: {rest!r} is no status from 100 to 999")
        return StatusService(int(rest))
    if scheme in ("unix", "unix+tls") and colon:
        if not rest.startswith("/"):
            raise TunnelError(f"service: write {scheme}:/path/of/the/socket")
        return HttpService(is_tls=scheme == "unix+tls", path=rest)
    if scheme not in _HTTP_SCHEMES and scheme not in _TCP_SCHEMES:
        known = [f"{name}://" for name in (*_HTTP_SCHEMES, *_TCP_SCHEMES)]
        guess = nearest(f"{scheme}://" if "://" in text else text, (*known, "unix:/", *_WORDS))
        if rest.isdigit():  # a host and its port
            guess = f"; write http://{text}"
        raise TunnelError(f"service: {text!r} is no service{guess}")
    host, port = _place(scheme, rest)
    if scheme in _TCP_SCHEMES:
        return TcpService(host, port or _TCP_SCHEMES[scheme])
    return HttpService(scheme in ("https", "wss"), host, port or _HTTP_SCHEMES[scheme])


def parse_place(text: str) -> tuple[str, int]:
    """`host:port`, the port 0 where there is none. Raises TunnelError."""
    found = _PLACE.fullmatch(text)
    if found is None:
        raise TunnelError(f"service: {text!r} is not host:port")
    port = int(found["port"] or 0)
    if port > 65535 or (found["port"] and not port):
        raise TunnelError(f"service: {found['port']} is no port from 1 to 65535")
    return found["ipv6"] or found["host"], port


def _place(scheme: str, rest: str) -> tuple[str, int]:
    place = rest.removeprefix("//")
    if not rest.startswith("//") or not place:
        raise TunnelError(f"service: write {scheme}://host:port")
    host, _, path = place.partition("/")
    if path:
        raise TunnelError(
            f"service: a path ({'/' + path!r}) is not possible; the origin gets the path "
            f"of the request. Write {scheme}://{host}"
        )
    return parse_place(host)
