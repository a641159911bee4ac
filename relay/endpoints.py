"""What the public HTTP ports answer (DERP specification 11): everything but upgrades of `/derp`.

The main listeners have the relay's probes, the captive portal check, bootstrap DNS and a home
page; the plain HTTP port has the captive portal check, ACME challenges and redirects. derper's
debug pages are not here at all: operators have the admin listener.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Final
from urllib.parse import parse_qs

from relay.acme_files import HTTP_CHALLENGE_PATH
from relay.http import Request, Responder, Response

TEXT: Final = ("Content-Type", "text/plain; charset=utf-8")
HTML: Final = ("Content-Type", "text/html; charset=utf-8")
NOSNIFF: Final = ("X-Content-Type-Options", "nosniff")
CONTENT_POLICY: Final = (
    "default-src 'self'; frame-ancestors 'none'; form-action 'self'; base-uri 'self'; "
    "block-all-mixed-content; object-src 'none'"
)
BROWSER_HEADERS: Final = (
    ("Strict-Transport-Security", "max-age=63072000; includeSubDomains"),
    ("Content-Security-Policy", CONTENT_POLICY),
    ("X-Frame-Options", "DENY"),
    NOSNIFF,
)

_PROBES: Final = ("/derp/probe", "/derp/latency-check")
_ROBOTS: Final = b"User-agent: *\nDisallow: /\n"
_CHALLENGE: Final = re.compile(r"[A-Za-z0-9._:-]{1,64}")
_HOST: Final = re.compile(r"(?P<name>[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(:[0-9]{1,5})?")
_HOME_PAGE: Final = b"""<!DOCTYPE html>
<html lang="en">
<head><meta charset="utf-8"><title>DERP relay</title></head>
<body>
<h1>DERP relay</h1>
<p>This is a relay for the DERP protocol, run by Underpass. Where two computers of an overlay
network can't reach each other directly, it passes their packets on. They are encrypted from end
to end, so it can't read them.</p>
<p>There is nothing else to see here.</p>
</body>
</html>
"""

BootstrapAnswer = Callable[[str, str], bytes]
"""The JSON for `/bootstrap-dns`, from the name that was asked for (or an empty string) and the
client's IP address."""


def public_responder(*, home_page: Callable[[], str], bootstrap_dns: BootstrapAnswer) -> Responder:
    """What the main listeners answer. `home_page` gives the setting `server.home_page`."""

    def respond(request: Request) -> Response:
        path = request.path
        if request.method == "CONNECT":
            return plain_text(403, "CONNECT not enabled", close=True)
        if path == "/derp":
            return plain_text(426, "DERP requires connection upgrade")
        if path in _PROBES:
            return _answer_probe(request)
        if path == "/generate_204":
            return _answer_captive_portal_check(request)
        if path == "/bootstrap-dns":
            name = parse_qs(request.query).get("q", [""])[0]
            body = bootstrap_dns(name, request.source)
            # Every client asks once and asks several relays: nothing is gained by waiting for more.
            return _browser(200, ("Content-Type", "application/json"), body=body, close=True)
        if path == "/robots.txt":
            return _browser(200, TEXT, body=_ROBOTS)
        if _is_debug(path):
            return plain_text(403, "debug access denied")
        return _answer_home(home_page())

    return respond


def plain_http_responder(
    *, acme_answer: Callable[[str], bytes | None], https_port: Callable[[str], int]
) -> Responder:
    """What the plain HTTP port answers.

    Args:
        acme_answer: for ACME's HTTP-01, from the path to what is to be answered.
        https_port: from a host to where it is served by HTTPS, as clients see it.
    """

    def respond(request: Request) -> Response:
        path = request.path
        if path == "/generate_204":
            return _answer_captive_portal_check(request)
        if path.startswith(HTTP_CHALLENGE_PATH):
            answer = acme_answer(path)
            if answer is None:
                return plain_text(404, "there is no such challenge")
            return Response(200, [("Content-Type", "application/octet-stream")], answer)
        if _is_debug(path):
            return plain_text(403, "debug access denied")
        host = _HOST.fullmatch(request.header("host"))
        if request.method not in ("GET", "HEAD") or host is None or not path.startswith("/"):
            return plain_text(400, "Use HTTPS")
        port = https_port(host["name"].lower())
        place = host["name"] if port == 443 else f"{host['name']}:{port}"
        query = f"?{request.query}" if request.query else ""
        return Response(302, [("Location", f"https://{place}{path}{query}")])

    return respond


def plain_text(status: int, text: str, *, close: bool = False) -> Response:
    """A short answer for people, as derper writes its errors."""
    return Response(status, [TEXT, NOSNIFF], f"{text}\n".encode(), close=close)


def _answer_probe(request: Request) -> Response:
    if request.method not in ("GET", "HEAD"):
        return plain_text(405, "bogus probe method")
    return Response(200, [("Access-Control-Allow-Origin", "*")])


def _answer_captive_portal_check(request: Request) -> Response:
    headers = [("Cache-Control", "no-cache, no-store, must-revalidate, no-transform, max-age=0")]
    challenge = request.header("x-tailscale-challenge")
    if _CHALLENGE.fullmatch(challenge):
        headers.append(("X-Tailscale-Response", f"response {challenge}"))
    return Response(204, headers)


def _answer_home(home_page: str) -> Response:
    if home_page == "blank":
        return _browser(200, HTML)
    if home_page:
        return _browser(302, ("Location", home_page))
    return _browser(200, HTML, body=_HOME_PAGE)


def _browser(
    status: int, header: tuple[str, str], *, body: bytes = b"", close: bool = False
) -> Response:
    return Response(status, [header, *BROWSER_HEADERS], body, close=close)


def _is_debug(path: str) -> bool:
    return path == "/debug" or path.startswith("/debug/")
