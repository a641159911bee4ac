"""What the admin listener answers: metrics, health, the status page, JSON, revoking.

Who may ask: with a token, whoever presents it, as `Authorization: Bearer` or, for browsers, as the
password of basic authentication with any user name. Without a token, loopback only, and then
neither through a reverse proxy (it would make everybody loopback) nor under a foreign host name (a
web page could point its own name here and read on). `/healthz` and `/readyz` are for all, since
what probes them seldom has a token; they tell nothing about clients.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import ipaddress
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Final
from urllib.parse import parse_qs, urlsplit

import msgspec

from relay.config_sources import ConfigError, read_text_file
from relay.endpoints import HTML, NOSNIFF, plain_text
from relay.health import health_problems, readiness_problems
from relay.http import Request, Responder, Response
from relay.metrics import CONTENT_TYPE, encode_metrics
from relay.snapshot import MAX_CLIENTS, Snapshot
from relay.status_page import render_status_page
from relay.worker_pipe import WorkerError
from traversal.keys import KeyFormatError, NodePublic

MIN_TOKEN_LENGTH: Final = 16

_NO_STORE: Final = ("Cache-Control", "no-store")
_PAGE_POLICY: Final = (
    "default-src 'none'; style-src 'unsafe-inline'; form-action 'none'; base-uri 'none'; "
    "frame-ancestors 'none'"
)
_INDEX: Final = (
    "there is no such page; there are /, /metrics, /healthz, /readyz, /api/snapshot and /api/revoke"
)

Collect = Callable[[int], Awaitable[Snapshot]]
"""Takes a snapshot with at most so many clients listed."""


def admin_responder(
    *,
    collect: Collect,
    revoke: Callable[[NodePublic], Awaitable[int]],
    token: Callable[[], str],
    workers: int = 1,
) -> Responder:
    """What the admin listener answers.

    Args:
        collect, revoke: may raise WorkerError.
        revoke: ends every session of a key; returns how many.
        token: the one that is asked for now; empty for none.
        workers: how many processes should answer.
    """

    async def respond(request: Request) -> Response:
        try:
            return await answer(request)
        except WorkerError as error:
            return _verdict([f"the relay's workers don't answer: {error}"])

    async def answer(request: Request) -> Response:
        match request.path:
            case "/healthz":
                return _verdict(health_problems(await collect(0)))
            case "/readyz":
                snapshot = await collect(0)
                return _verdict(readiness_problems(snapshot, time.time(), workers))
        refusal = _refusal(request, token())
        if refusal is not None:
            return refusal
        wanted = "POST" if request.path == "/api/revoke" else "GET"
        if request.method != wanted and (request.method, wanted) != ("HEAD", "GET"):
            return plain_text(405, f"{request.path} is for {wanted}")
        match request.path:
            case "/":
                return _page(await collect(MAX_CLIENTS), workers)
            case "/metrics" | "/debug/varz":
                text = encode_metrics(await collect(0))
                return Response(200, [("Content-Type", CONTENT_TYPE), _NO_STORE], text)
            case "/api/snapshot":
                return _json(msgspec.json.encode(await collect(MAX_CLIENTS)))
            case "/api/revoke":
                return await _answer_revoke(request, revoke)
        return plain_text(404, _INDEX)

    return respond


def read_admin_token(path: str) -> str:
    """The token in a file. Raises ConfigError."""
    token = read_text_file(Path(path), "admin token").strip()
    if len(token) < MIN_TOKEN_LENGTH or not token.isascii() or any(c.isspace() for c in token):
        raise ConfigError(
            f"{path}: the admin token must be one word of {MIN_TOKEN_LENGTH} ASCII characters or "
            "more; make one with: openssl rand -hex 32"
        )
    return token


def _refusal(request: Request, token: str) -> Response | None:
    """Why a request is not answered, if so."""
    if token:
        if not hmac.compare_digest(_presented_token(request).encode(), token.encode()):
            refusal = plain_text(401, "the admin token is missing or wrong")
            challenge = ("WWW-Authenticate", 'Basic realm="underpass-relay", charset="UTF-8"')
            return Response(401, [*refusal.headers, challenge], refusal.body)
    elif not _is_loopback(request.source) or request.header("x-forwarded-for"):
        return plain_text(403, "only loopback may ask as long as admin.token_file is not set")
    elif not _is_local_name(request.header("host")):
        return plain_text(403, "ask for localhost or an IP address, or set admin.token_file")
    origin = request.header("origin")
    if request.method == "POST" and origin and urlsplit(origin).netloc != request.header("host"):
        return plain_text(403, "another web site may not ask for this")
    return None


def _presented_token(request: Request) -> str:
    scheme, _, value = request.header("authorization").partition(" ")
    if scheme.lower() == "bearer":
        return value.strip()
    if scheme.lower() == "basic":
        try:
            return base64.b64decode(value, validate=True).decode().partition(":")[2]
        except (binascii.Error, UnicodeDecodeError):
            return ""
    return ""


def _is_loopback(source: str) -> bool:
    try:
        return ipaddress.ip_address(source).is_loopback
    except ValueError:
        return False


def _is_local_name(host: str) -> bool:
    try:
        name = urlsplit(f"//{host}").hostname or ""
        return name == "localhost" or bool(ipaddress.ip_address(name))
    except ValueError:
        return False


def _verdict(problems: Sequence[str]) -> Response:
    text = "\n".join(problems) or "ok"
    answer = plain_text(503 if problems else 200, text)
    return Response(answer.status, [*answer.headers, _NO_STORE], answer.body)


def _page(snapshot: Snapshot, workers: int) -> Response:
    problems = readiness_problems(snapshot, time.time(), workers)
    headers = [HTML, NOSNIFF, _NO_STORE, ("Content-Security-Policy", _PAGE_POLICY)]
    return Response(200, headers, render_status_page(snapshot, problems).encode())


async def _answer_revoke(
    request: Request, revoke: Callable[[NodePublic], Awaitable[int]]
) -> Response:
    text = parse_qs(request.query).get("key", [""])[0]
    try:
        key = NodePublic.parse(text) if ":" in text else NodePublic.from_hex(text)
    except KeyFormatError as error:
        return plain_text(400, f"give the key as ?key=nodekey:...: {error}")
    return _json(msgspec.json.encode({"closed": await revoke(key)}))


def _json(text: bytes) -> Response:
    return Response(200, [("Content-Type", "application/json"), NOSNIFF, _NO_STORE], text)
