"""The files through which the ACME task and the listeners meet, in one state directory.

    account.pem          the account's key
    <hostname>.pem       certificate's key and chain in one file, so that both change at once
    http-01/<token>      what to answer at /.well-known/acme-challenge/<token>
    tls-alpn-01.pem      key and certificate for whoever connects with ALPN "acme-tls/1"

Files, because the worker process that the authority happens to reach need not be the one that
ordered the certificate.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

from relay.certificate_files import certificate_paths

HTTP_CHALLENGE_PATH: Final = "/.well-known/acme-challenge/"

# RFC 8555, section 8.3: base64url without padding, at least 128 bits. Nothing else gets near
# the file system.
_TOKEN = re.compile(r"[A-Za-z0-9_-]{16,256}")


def account_key_path(state_directory: str) -> Path:
    """The account's key in PEM."""
    return Path(state_directory, "account.pem")


def certificate_path(state_directory: str, hostname: str) -> Path:
    """The certificate's key and chain in PEM."""
    return certificate_paths(state_directory, hostname)[0].with_suffix(".pem")


def tls_challenge_path(state_directory: str) -> Path:
    """The TLS-ALPN-01 certificate with its key, while an order is under way."""
    return Path(state_directory, "tls-alpn-01.pem")


def http_challenge_path(state_directory: str, token: str) -> Path | None:
    """The file of an HTTP-01 answer; None if this can't be a token."""
    if not _TOKEN.fullmatch(token):
        return None
    return Path(state_directory, "http-01", token)


def http_challenge_answer(state_directory: str, target: str) -> bytes | None:
    """The body for a plain HTTP request to `target`; None if there is no such challenge."""
    if not target.startswith(HTTP_CHALLENGE_PATH):
        return None
    path = http_challenge_path(state_directory, target.removeprefix(HTTP_CHALLENGE_PATH))
    try:
        return path.read_bytes() if path is not None else None
    except OSError:
        return None
