"""Asking an edge for a quick tunnel: a random name, without an account (specification 13.1)."""

from __future__ import annotations

import base64
import binascii
import ssl
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from typing import Final
from uuid import UUID

import msgspec

from traversal.wire.tunnel.credentials import Credentials

ASK_SECONDS: Final = 15.0
MAX_ANSWER_BYTES: Final = 64 << 10


class QuickTunnelError(Exception):
    """The edge gives no quick tunnel; the text says why."""


@dataclass(frozen=True, slots=True)
class QuickTunnel:
    """A tunnel that lives as long as it is used, and the name under which it is reached."""

    hostname: str
    credentials: Credentials = field(repr=False)


class _Result(msgspec.Struct):
    id: UUID
    hostname: str
    account_tag: str
    secret: str


class _Answer(msgspec.Struct):
    success: bool
    result: _Result


def ask_for_quick_tunnel(base: str, ca_file: str | None) -> QuickTunnel:
    """Ask at `base`, the URL of the domain of quick tunnels; blocks. Raises QuickTunnelError."""
    if not base.startswith(("https://", "http://")):
        raise QuickTunnelError(f"{base}: write https://DOMAIN, the edge's domain of quick tunnels")
    url = base.rstrip("/") + "/tunnel"
    request = urllib.request.Request(
        url, data=b"", headers={"Content-Type": "application/json"}, method="POST"
    )
    try:
        context = ssl.create_default_context(cafile=ca_file)
        with urllib.request.urlopen(request, timeout=ASK_SECONDS, context=context) as response:
            text = response.read(MAX_ANSWER_BYTES)
    except urllib.error.HTTPError as error:
        reason = error.read(500).decode("utf-8", "replace").strip()
        raise QuickTunnelError(f"{url}: {error.code}: {reason or error.reason}") from None
    except urllib.error.URLError as error:
        raise QuickTunnelError(f"{url}: {_reason(error.reason)}") from None
    except (OSError, ValueError) as error:
        raise QuickTunnelError(f"{url}: {error}") from None
    try:
        result = msgspec.json.decode(text, type=_Answer).result
        secret = base64.b64decode(result.secret, validate=True)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, binascii.Error):
        raise QuickTunnelError(f"{url}: what answers there offers no quick tunnels") from None
    return QuickTunnel(result.hostname, Credentials(result.id, result.account_tag, secret))


def _reason(reason: str | BaseException) -> str:
    """Why nothing answered, and what to do about it."""
    if isinstance(reason, ssl.SSLCertVerificationError):
        return (
            f"its certificate can't be verified: {reason.verify_message}; --web-ca FILE names "
            "another authority than the system's"
        )
    text = reason.strerror if isinstance(reason, OSError) and reason.strerror else str(reason)
    return f"{text}; see whether the address is right and the edge runs"
