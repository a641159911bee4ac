"""The HTTP proxy by which relays are reached, from the environment (DERP specification 15.1).

`HTTPS_PROXY` (or `https_proxy`) is `http://[user:password@]host[:port]`; `NO_PROXY` lists hosts
that are reached without.
"""

from __future__ import annotations

import base64
import urllib.parse
import urllib.request
from dataclasses import dataclass, field
from typing import Final, Self

DEFAULT_PORT: Final = 80


class ProxyError(ValueError):
    """The environment's proxy can't be used; the text says why."""


@dataclass(frozen=True, slots=True)
class Proxy:
    """An HTTP proxy that takes CONNECT."""

    host: str
    port: int
    authorization: str = field(default="", repr=False)

    @classmethod
    def maybe_from_environment(cls, target_host: str) -> Self | None:
        """The proxy for connections to `target_host`, None for none. Raises ProxyError."""
        url = urllib.request.getproxies_environment().get("https")
        if not url or urllib.request.proxy_bypass(target_host):
            return None
        return cls.parse(url)

    @classmethod
    def parse(cls, url: str) -> Self:
        """Read a proxy's URL. Raises ProxyError."""
        try:
            parts = urllib.parse.urlsplit(url if "://" in url else f"http://{url}")
            port = parts.port or DEFAULT_PORT
        except ValueError as error:
            raise ProxyError(f"HTTPS_PROXY: {error}") from None
        if parts.scheme != "http" or not parts.hostname:
            raise ProxyError("HTTPS_PROXY: write http://host:port; only plain HTTP proxies work")
        authorization = ""
        if parts.username is not None:
            user = urllib.parse.unquote(parts.username)
            password = urllib.parse.unquote(parts.password or "")
            authorization = base64.b64encode(f"{user}:{password}".encode()).decode()
        return cls(parts.hostname, port, authorization)

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"

    def encode_connect(self, target: str) -> bytes:
        """The request that asks for a tunnel to `target` (host:port)."""
        lines = [f"CONNECT {target} HTTP/1.1", f"Host: {target}"]
        if self.authorization:
            lines.append(f"Proxy-Authorization: Basic {self.authorization}")
        return ("\r\n".join(lines) + "\r\n\r\n").encode()
