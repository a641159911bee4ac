"""Public HTTP endpoints (DERP specification 11)."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.endpoints import plain_http_responder, public_responder
from relay.http import Request, Response


def ask(method: str, path: str, *, home: str = "", query: str = "", **headers: str) -> Response:
    """What a main listener answers; header names are given with underscores."""
    respond = public_responder(
        home_page=lambda: home,
        bootstrap_dns=lambda name, source: f"{name} for {source}".encode(),
    )
    answer = respond(_request(method, path, query, headers))
    assert isinstance(answer, Response)
    return answer


def ask_plain(
    method: str, path: str, *, query: str = "", port: int = 443, **headers: str
) -> Response:
    """What the plain HTTP port answers."""
    challenges = {"/.well-known/acme-challenge/token": b"token.thumbprint"}
    respond = plain_http_responder(acme_answer=challenges.get, https_port=lambda host: port)
    answer = respond(_request(method, path, query, headers))
    assert isinstance(answer, Response)
    return answer


def _request(method: str, path: str, query: str, headers: dict[str, str]) -> Request:
    pairs = tuple((name.replace("_", "-"), value) for name, value in headers.items())
    return Request(method, path, query, pairs, source="192.0.2.7")


def headers_of(response: Response) -> dict[str, str]:
    return dict(response.headers)


class TestMainListener:
    def test_derp_without_upgrade(self) -> None:
        """The exact 426 of the specification, section 3.4."""
        response = ask("GET", "/derp")
        assert response.status == 426
        assert response.body == b"DERP requires connection upgrade\n"
        assert headers_of(response) == {
            "Content-Type": "text/plain; charset=utf-8",
            "X-Content-Type-Options": "nosniff",
        }

    @pytest.mark.parametrize("path", ["/derp/probe", "/derp/latency-check"])
    def test_probes(self, path: str) -> None:
        """GET and HEAD are answered empty for any origin, and nothing else is."""
        for method in ("GET", "HEAD"):
            response = ask(method, path)
            assert (response.status, response.body) == (200, b"")
            assert headers_of(response) == {"Access-Control-Allow-Origin": "*"}
        refused = ask("POST", path)
        assert (refused.status, refused.body) == (405, b"bogus probe method\n")

    def test_bootstrap_dns(self) -> None:
        """The asked name and the client's address decide; the connection is not kept."""
        response = ask("GET", "/bootstrap-dns", query="x=1&q=a.example")
        assert response.body == b"a.example for 192.0.2.7"
        assert response.close
        assert headers_of(response)["Content-Type"] == "application/json"
        assert "Content-Security-Policy" in headers_of(response)
        assert ask("GET", "/bootstrap-dns").body == b" for 192.0.2.7"

    def test_robots(self) -> None:
        """The 26 bytes of the specification."""
        body = ask("GET", "/robots.txt").body
        assert body.hex() == "557365722d6167656e743a202a0a446973616c6c6f773a202f0a"

    @pytest.mark.parametrize("path", ["/", "/derp/", "/nonsense", "/derpish", "/debugging"])
    def test_every_other_path_is_the_home_page(self, path: str) -> None:
        """Unknown paths are not 404, and browsers are told to be careful."""
        response = ask("GET", path)
        assert response.status == 200
        assert response.body.startswith(b"<!DOCTYPE html>")
        headers = headers_of(response)
        assert headers["Content-Type"] == "text/html; charset=utf-8"
        assert headers["Strict-Transport-Security"] == "max-age=63072000; includeSubDomains"
        assert headers["X-Frame-Options"] == "DENY"
        assert headers["Content-Security-Policy"] == (
            "default-src 'self'; frame-ancestors 'none'; form-action 'self'; base-uri 'self'; "
            "block-all-mixed-content; object-src 'none'"
        )

    def test_home_page_variants(self) -> None:
        """Blank is empty; a URL is a redirect."""
        assert (ask("GET", "/", home="blank").status, ask("GET", "/", home="blank").body) == (
            200,
            b"",
        )
        response = ask("GET", "/", home="https://example.com/")
        assert response.status == 302
        assert headers_of(response)["Location"] == "https://example.com/"

    @pytest.mark.parametrize("path", ["/debug", "/debug/", "/debug/varz"])
    def test_debug_pages_are_not_for_the_public(self, path: str) -> None:
        """They exist on the admin listener only."""
        assert (ask("GET", path).status, ask("GET", path).body) == (403, b"debug access denied\n")

    def test_connect_is_refused(self) -> None:
        """The relay is no open proxy."""
        response = ask("CONNECT", "example.com:443")
        assert (response.status, response.body) == (403, b"CONNECT not enabled\n")


class TestCaptivePortalCheck:
    @pytest.mark.parametrize("ask_port", [ask, ask_plain])
    def test_challenge_is_echoed(self, ask_port: object) -> None:
        """On both kinds of listeners, whatever the query is."""
        assert callable(ask_port)
        response = ask_port(
            "GET", "/generate_204", query="t=1", x_tailscale_challenge="ts_a.b:c-D9"
        )
        assert response.status == 204
        assert headers_of(response) == {
            "Cache-Control": "no-cache, no-store, must-revalidate, no-transform, max-age=0",
            "X-Tailscale-Response": "response ts_a.b:c-D9",
        }

    @given(st.text(max_size=80))
    def test_only_harmless_challenges_are_echoed(self, challenge: str) -> None:
        """1 to 64 characters of a fixed alphabet; anything else is left out, still 204."""
        response = ask("GET", "/generate_204", x_tailscale_challenge=challenge)
        alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789.-_:"
        valid = 1 <= len(challenge) <= 64 and set(challenge) <= set(alphabet)
        assert response.status == 204
        assert ("X-Tailscale-Response" in headers_of(response)) == valid


class TestPlainHttp:
    def test_redirects_to_https(self) -> None:
        """Path and query are kept; the port is the main listener's."""
        response = ask_plain("GET", "/a/b", query="c=d", host="relay.example.com")
        assert response.status == 302
        assert headers_of(response)["Location"] == "https://relay.example.com/a/b?c=d"
        response = ask_plain("HEAD", "/", host="[2001:db8::1]:8080", port=8443)
        assert headers_of(response)["Location"] == "https://[2001:db8::1]:8443/"

    @pytest.mark.parametrize("host", ["", "evil.example/@", "a b", "x@y"])
    def test_strange_hosts_are_not_redirected(self, host: str) -> None:
        """Nor is anything that is not GET or HEAD."""
        assert ask_plain("GET", "/", host=host).status == 400
        refused = ask_plain("POST", "/", host="relay.example.com")
        assert (refused.status, refused.body) == (400, b"Use HTTPS\n")

    def test_acme_challenge(self) -> None:
        """RFC 8555 section 8.3."""
        response = ask_plain("GET", "/.well-known/acme-challenge/token")
        assert (response.status, response.body) == (200, b"token.thumbprint")
        assert ask_plain("GET", "/.well-known/acme-challenge/other").status == 404

    def test_debug_pages_are_not_for_the_public(self) -> None:
        """The same refusal as on the main listener."""
        assert ask_plain("GET", "/debug/", host="relay.example.com").status == 403
