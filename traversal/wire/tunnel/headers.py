"""Headers that the tunnel's HTTP/2 transport carries for itself (edge tunnel specification 5).

The origin's response headers travel in one header, serialized: `b64(name) ":" b64(value)` for each,
joined by `;`, base64 without padding. Names of the tunnel's own never travel so.
"""

from __future__ import annotations

import binascii
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

import msgspec

from traversal.wire.tunnel.errors import TunnelError

UPGRADE: Final = b"cf-cloudflared-proxy-connection-upgrade"
"""Says what a stream is; absent on plain HTTP."""
CONTROL_STREAM: Final = b"control-stream"
WEBSOCKET: Final = b"websocket"
UPDATE_CONFIGURATION: Final = b"update-configuration"
TCP_SOURCE: Final = b"cf-cloudflared-proxy-src"
"""Present and not empty: the stream is a TCP connection to `:authority`."""
RESPONSE_HEADERS: Final = b"cf-cloudflared-response-headers"
RESPONSE_META: Final = b"cf-cloudflared-response-meta"

RESERVED_PREFIXES: Final = (b":", b"cf-int-", b"cf-cloudflared-", b"cf-proxy-")
"""Names (in lower case) that never come from a visitor and never go to one."""

Header = tuple[bytes, bytes]


def is_reserved(name: bytes) -> bool:
    """Whether a header of this name is the tunnel's own business."""
    return name.lower().startswith(RESERVED_PREFIXES)


def serialize_headers(headers: Iterable[Header]) -> bytes:
    """The origin's headers as one value; reserved names are left out."""
    return b";".join(
        _encode(name) + b":" + _encode(value) for name, value in headers if not is_reserved(name)
    )


def parse_serialized_headers(text: bytes) -> list[Header]:
    """Raises TunnelError. Reserved names are left out here, too: the other side may be another."""
    if not text:
        return []
    headers = []
    for entry in text.split(b";"):
        name, colon, value = entry.partition(b":")
        if not colon or not name:
            raise TunnelError("headers: an entry is not a name, a colon and a value")
        header = _decode(name), _decode(value)
        if not is_reserved(header[0]):
            headers.append(header)
    return headers


def _encode(data: bytes) -> bytes:
    return binascii.b2a_base64(data, newline=False).rstrip(b"=")


def _decode(text: bytes) -> bytes:
    try:
        return binascii.a2b_base64(text + b"=" * (-len(text) % 4), strict_mode=True)
    except binascii.Error as error:
        raise TunnelError(f"headers: not base64: {error}") from None


class _Meta(msgspec.Struct):
    src: str
    flow_rate_limited: bool = False


@dataclass(frozen=True, slots=True)
class ResponseMeta:
    """Who made the response: the origin, or the connector itself, perhaps to limit flows."""

    is_from_origin: bool
    is_rate_limited: bool = False

    def encode(self) -> bytes:
        """The header's value."""
        source = "origin" if self.is_from_origin else "cloudflared"
        meta: dict[str, str | bool] = {"src": source}
        if self.is_rate_limited:
            meta["flow_rate_limited"] = True
        return msgspec.json.encode(meta)


def parse_response_meta(text: bytes) -> ResponseMeta:
    """Read the header's value. Raises TunnelError."""
    try:
        meta = msgspec.json.decode(text, type=_Meta)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise TunnelError(f"headers: response meta: {error}") from None
    return ResponseMeta(meta.src == "origin", meta.flow_rate_limited)
