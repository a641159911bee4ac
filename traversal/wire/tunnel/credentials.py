"""A tunnel's credentials: the file's and the token's format (edge tunnel specification 12.1).

* file: `{"AccountTag":"…","TunnelSecret":"<base64>","TunnelID":"<uuid>","Endpoint":"…"}`
* token: base64 of `{"a":"<account>","s":"<base64 secret>","t":"<uuid>","e":"…"}`

Base64 is the standard alphabet, padded. The endpoint (a region) may be absent.
"""

from __future__ import annotations

import base64
import binascii
import json
from dataclasses import dataclass, field
from typing import Final
from uuid import UUID

import msgspec

from traversal.wire.tunnel.errors import TunnelError

SECRET_BYTES: Final = 32
"""The least that a secret has by convention."""
MAX_TOKEN_CHARACTERS: Final = 4096


class _File(msgspec.Struct, rename="pascal"):
    account_tag: str
    tunnel_secret: str
    tunnel_id: str = msgspec.field(name="TunnelID")
    endpoint: str = ""


class _Token(msgspec.Struct):
    a: str
    s: str
    t: str
    e: str = ""


@dataclass(frozen=True, slots=True)
class Credentials:
    """What proves that a connector may serve a tunnel."""

    tunnel_id: UUID
    account_tag: str
    secret: bytes = field(repr=False)
    endpoint: str = ""

    def to_file(self) -> str:
        """The credentials file's content; it must not be readable by others."""
        document = {
            "AccountTag": self.account_tag,
            "TunnelSecret": base64.b64encode(self.secret).decode(),
            "TunnelID": str(self.tunnel_id),
        }
        if self.endpoint:
            document["Endpoint"] = self.endpoint
        return json.dumps(document)

    def to_token(self) -> str:
        """The same as one word."""
        document = {
            "a": self.account_tag,
            "s": base64.b64encode(self.secret).decode(),
            "t": str(self.tunnel_id),
        }
        if self.endpoint:
            document["e"] = self.endpoint
        text = json.dumps(document, separators=(",", ":"))
        return base64.b64encode(text.encode()).decode()


def parse_credentials_file(text: str | bytes) -> Credentials:
    """Read a credentials file. Raises TunnelError, whose text holds no secret."""
    try:
        file = msgspec.json.decode(text, type=_File)
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        wanted = '{"AccountTag": "...", "TunnelSecret": "<base64>", "TunnelID": "<uuid>"}'
        raise TunnelError(f"credentials: the file must hold {wanted}") from None
    return _credentials(file.tunnel_id, file.account_tag, file.tunnel_secret, file.endpoint)


def parse_token(text: str) -> Credentials:
    """Read a token. Raises TunnelError, whose text holds no secret."""
    text = text.strip()
    if len(text) > MAX_TOKEN_CHARACTERS:
        raise TunnelError("credentials: the token is too long")
    try:
        token = msgspec.json.decode(base64.b64decode(text, validate=True), type=_Token)
    except (msgspec.DecodeError, UnicodeError, RecursionError, binascii.Error, ValueError):
        raise TunnelError(
            "credentials: this is no tunnel token, or not all of it; the edge's operator prints it "
            'with "underpass-relay edge token NAME"'
        ) from None
    return _credentials(token.t, token.a, token.s, token.e)


def _credentials(tunnel_id: str, account_tag: str, secret: str, endpoint: str) -> Credentials:
    try:
        identity = UUID(tunnel_id)
    except ValueError:
        raise TunnelError("credentials: the tunnel id is no UUID") from None
    try:
        raw = base64.b64decode(secret, validate=True)
    except (binascii.Error, ValueError):
        raise TunnelError("credentials: the secret is not base64") from None
    if not raw:
        raise TunnelError("credentials: the secret is empty")
    return Credentials(identity, account_tag, raw, endpoint)
