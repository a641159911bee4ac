"""The admin listener's answers: who may ask, and what is said."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Awaitable
from pathlib import Path

import msgspec
import pytest

from relay.admin import admin_responder, read_admin_token
from relay.admission import AdmissionStatistics
from relay.certificates import CertificateStatus
from relay.config import ConfigError
from relay.counters import Counters
from relay.health import readiness_problems
from relay.http import Request, Response
from relay.refusals import Stage
from relay.sampling import RTT_LABELS, Rates
from relay.snapshot import (
    ClientView,
    Connections,
    MeshLink,
    QueueDelay,
    Resources,
    Snapshot,
    Traffic,
)
from relay.status_page import DROP_REASONS, REFUSAL_STAGES, render_status_page
from relay.worker_pipe import WorkerError
from traversal.keys import NodePublic

TOKEN = "a-token-of-some-length"
KEY = NodePublic(bytes(range(32)))


def snapshot(**changes: object) -> Snapshot:
    delay = Counters().queue_delay
    quiet = Snapshot(
        hostname="relay.example.com",
        version="1.2.3",
        server_key="nodekey:00",
        unix_time=time.time(),
        uptime_seconds=100.0,
        connections=Connections(current=1),
        traffic=Traffic.of(Counters()),
        queue_delay=QueueDelay(
            bounds_seconds=delay.bounds, counts=tuple(delay.counts), total_seconds=0.0
        ),
        rates=Rates(),
        tcp_rtt=dict.fromkeys(RTT_LABELS, 0),
        refusals={str(stage): 0 for stage in Stage},
        accepted_connections=0,
        rejected_connections=0,
        websocket_accepts=0,
        tls_handshakes={},
        tls_active={},
        resources=Resources(),
        clients=(client("192.0.2.1"),),
    )
    return msgspec.structs.replace(quiet, **changes)


def client(address: str) -> ClientView:
    return ClientView(
        key=str(KEY),
        short=KEY.short(),
        address=address,
        port=1234,
        connected_seconds=61.0,
        is_home=True,
        is_mesh=False,
        is_prober=False,
        is_duplicate=False,
        packets_in=1,
        bytes_in=2048,
        packets_out=3,
        bytes_out=4,
        packets_dropped=5,
        waiting_packets=0,
        waiting_bytes=0,
        rate_limit_bytes_per_second=None,
        is_held_back=False,
    )


class Admin:
    """A responder with a relay behind it."""

    def __init__(self, token: str = "", **changes: object) -> None:
        self.revoked: list[NodePublic] = []
        self.snapshot = snapshot(**changes)
        self.is_broken = False
        self._respond = admin_responder(
            collect=self._collect, revoke=self._revoke, token=lambda: token
        )

    async def _collect(self, max_clients: int) -> Snapshot:
        if self.is_broken:
            raise WorkerError("no worker answers")
        return self.snapshot

    async def _revoke(self, key: NodePublic) -> int:
        self.revoked.append(key)
        return 2

    async def ask(
        self,
        path: str,
        method: str = "GET",
        *,
        query: str = "",
        source: str = "127.0.0.1",
        **headers: str,
    ) -> Response:
        pairs = {"host": "127.0.0.1:9090"} | {k.replace("_", "-"): v for k, v in headers.items()}
        request = Request(method, path, query, tuple(pairs.items()), source=source, over_tls=False)
        answer = self._respond(request)
        assert isinstance(answer, Awaitable)
        return await answer


class TestWhoMayAsk:
    PATHS = ("/", "/metrics", "/debug/varz", "/api/snapshot", "/nonsense")

    @pytest.mark.parametrize("path", PATHS)
    async def test_without_a_token_loopback_only(self, path: str) -> None:
        """Directly, and under a name that no stranger can point here."""
        admin = Admin()
        assert (await admin.ask(path)).status != 403
        assert (await admin.ask(path, source="::1", host="localhost:9090")).status != 403
        assert (await admin.ask(path, source="192.0.2.1")).status == 403
        assert (await admin.ask(path, source="")).status == 403
        assert (await admin.ask(path, x_forwarded_for="127.0.0.1")).status == 403
        assert (await admin.ask(path, host="evil.example")).status == 403
        assert (await admin.ask(path, host="")).status == 403
        assert (await admin.ask(path, host="[")).status == 403

    @pytest.mark.parametrize("path", PATHS)
    async def test_with_a_token_whoever_has_it(self, path: str) -> None:
        """From anywhere; loopback is no excuse any more."""
        admin = Admin(TOKEN)
        password = base64.b64encode(f"anyone:{TOKEN}".encode()).decode()
        for value in (f"Bearer {TOKEN}", f"bearer  {TOKEN}", f"Basic {password}"):
            answer = await admin.ask(path, source="192.0.2.1", authorization=value)
            assert answer.status not in (401, 403)
        for value in ("", TOKEN, f"Bearer {TOKEN}x", "Bearer", "Basic !", "Basic /w==", "Bearer é"):
            answer = await admin.ask(path, authorization=value)
            assert answer.status == 401
            assert "WWW-Authenticate" in dict(answer.headers)

    async def test_health_is_for_all(self) -> None:
        """What probes it seldom has a token."""
        admin = Admin(TOKEN)
        for path in ("/healthz", "/readyz"):
            answer = await admin.ask(path, source="192.0.2.1", host="")
            assert (answer.status, answer.body) == (200, b"ok\n")

    async def test_other_web_sites_may_not_revoke(self) -> None:
        """A page in the operator's browser could send such a form."""
        admin = Admin()
        ask = {"method": "POST", "query": f"key={KEY}"}
        assert (await admin.ask("/api/revoke", **ask, origin="https://evil.example")).status == 403
        assert (await admin.ask("/api/revoke", **ask, origin="null")).status == 403
        same = await admin.ask("/api/revoke", **ask, origin="http://127.0.0.1:9090")
        assert same.status == 200
        assert admin.revoked == [KEY]


class TestAnswers:
    async def test_metrics(self) -> None:
        """Under both names."""
        admin = Admin()
        answer = await admin.ask("/metrics")
        assert dict(answer.headers)["Content-Type"].startswith("text/plain; version=0.0.4")
        assert b"\nderp_current_connections 1\n" in answer.body
        assert (await admin.ask("/debug/varz")).body == answer.body

    async def test_snapshot(self) -> None:
        """All of it, as JSON."""
        admin = Admin()
        answer = await admin.ask("/api/snapshot")
        assert msgspec.json.decode(answer.body, type=Snapshot) == admin.snapshot

    async def test_revoke(self) -> None:
        """By either form of the key, and only by POST."""
        admin = Admin()
        for text in (str(KEY), KEY.raw.hex()):
            answer = await admin.ask("/api/revoke", "POST", query=f"key={text}")
            assert json.loads(answer.body) == {"closed": 2}
        assert admin.revoked == [KEY, KEY]
        assert (await admin.ask("/api/revoke", query=f"key={KEY}")).status == 405
        for wrong in ("", "key=", "key=nodekey:12", "key=zz", "key=discokey:" + KEY.raw.hex()):
            assert (await admin.ask("/api/revoke", "POST", query=wrong)).status == 400
        assert len(admin.revoked) == 2

    async def test_other_paths_and_methods(self) -> None:
        """404 names the paths there are."""
        admin = Admin()
        answer = await admin.ask("/nonsense")
        assert answer.status == 404
        assert b"/api/snapshot" in answer.body
        assert (await admin.ask("/metrics", "POST")).status == 405
        assert (await admin.ask("/metrics", "HEAD")).status == 200

    async def test_workers_that_do_not_answer(self) -> None:
        """That is an answer too, on every path."""
        admin = Admin()
        admin.is_broken = True
        for path in ("/", "/metrics", "/healthz", "/readyz"):
            answer = await admin.ask(path)
            assert answer.status == 503
            assert b"no worker answers" in answer.body


def certificate(not_after_unix: float, *, ready: bool = True) -> CertificateStatus:
    return CertificateStatus("acme", "a", ready, int(not_after_unix), None, 1, 0)


ADMISSION = AdmissionStatistics(
    allowed=0,
    denied=0,
    cut=0,
    reloads=0,
    reload_failures=0,
    hook_requests=0,
    hook_failures=0,
    hook_cached_answers=0,
    hook_failed_open=0,
    hook_is_failing=True,
)


class TestHealth:
    @pytest.mark.parametrize(
        ("changes", "reason"),
        [
            ({"is_draining": True}, "draining"),
            ({"certificate": certificate(time.time() - 1)}, "the certificate has expired"),
            ({"certificate": certificate(time.time() + 9e6, ready=False)}, "no certificate yet"),
            ({"admission": ADMISSION}, "hook"),
        ],
    )
    async def test_alive_but_not_ready(self, changes: dict[str, object], reason: str) -> None:
        """503 with the reason in plain words; a restart would not help."""
        admin = Admin(**changes)
        answer = await admin.ask("/readyz")
        assert answer.status == 503
        assert reason in answer.body.decode()
        assert (await admin.ask("/healthz")).status == 200

    async def test_dead(self) -> None:
        """A pump that does not serve."""
        admin = Admin(pump_problem="the pump did not answer")
        for path in ("/healthz", "/readyz"):
            answer = await admin.ask(path)
            assert (answer.status, answer.body) == (503, b"the pump did not answer\n")

    def test_missing_workers(self) -> None:
        """Those that answer are fewer than were asked for."""
        assert readiness_problems(snapshot(workers=2), 0.0, 2) == []
        assert readiness_problems(snapshot(workers=1), 0.0, 2) == ["only 1 of 2 workers answer"]


class TestStatusPage:
    async def test_needs_nothing_from_elsewhere(self) -> None:
        """No scripts, no links to other resources; the policy forbids them as well."""
        answer = await Admin().ask("/")
        page = answer.body.decode()
        for word in ("<script", "src=", "href=", "url(", "@import"):
            assert word not in page
        policy = dict(answer.headers)["Content-Security-Policy"]
        assert policy.startswith("default-src 'none'; style-src 'unsafe-inline';")
        assert "prefers-color-scheme: dark" in page

    def test_shows_who_is_connected(self) -> None:
        """Short key with the full one behind it, address, figures."""
        page = render_status_page(snapshot(), [])
        assert f'<code title="{KEY}">{KEY.short()}</code>' in page
        for text in ("192.0.2.1", "1m 1s", "2.00 KiB", ">home<", "ready", "relay.example.com"):
            assert text in page

    def test_names_what_is_wrong(self) -> None:
        """Reasons not to be ready, drops, refusals, links that are down, little time left."""
        counters = Counters()
        subject = snapshot(
            traffic=msgspec.structs.replace(
                Traffic.of(counters), packets_dropped={"queue_head": {"disco": 1, "other": 41}}
            ),
            refusals={"tls": 17},
            mesh_links=(MeshLink(name="b:443", is_up=False, problem="connection refused"),),
            certificate=certificate(time.time() + 3 * 86400 + 60),
        )
        page = render_status_page(subject, ["the admission hook does not answer"])
        assert "not ready" in page
        assert "the admission hook does not answer" in page
        assert f'{DROP_REASONS["queue_head"]}</td><td class="wrap"><span class="bad">42' in page
        assert f'{REFUSAL_STAGES["tls"]}</td><td class="wrap"><span class="bad">17' in page
        assert '<span class="bad">connection refused</span>' in page
        assert '<span class="bad">3d 0h</span>' in page

    def test_every_reason_has_words(self) -> None:
        """For people who have not read the code."""
        assert set(Traffic.of(Counters()).packets_dropped) == set(DROP_REASONS)
        assert {str(stage) for stage in Stage} == set(REFUSAL_STAGES)

    def test_nothing_gets_out_of_its_place(self) -> None:
        """Whatever a name or an error text holds."""
        nasty = "<b>\"'&"
        subject = snapshot(
            hostname=nasty,
            version=nasty,
            clients=(client(nasty),),
            mesh_links=(MeshLink(name=nasty, is_up=False, problem=nasty),),
            refusals={nasty: 1},
        )
        page = render_status_page(subject, [nasty])
        assert '<b>"' not in page
        assert page.count("&lt;b&gt;") >= 7

    def test_graph(self) -> None:
        """Drawn as soon as there are two points, also when nothing moved."""
        assert "<svg" not in render_status_page(snapshot(rates=Rates(history=(1.0,))), [])
        page = render_status_page(snapshot(rates=Rates(history=(0.0, 0.0))), [])
        assert "<svg" in page


class TestToken:
    def test_read(self, tmp_path: Path) -> None:
        """Surrounding white space does not count."""
        path = tmp_path / "token"
        path.write_text(f"{TOKEN}\n")
        assert read_admin_token(str(path)) == TOKEN

    @pytest.mark.parametrize("text", ["", "short", "two words of some length", "ü" * 20])
    def test_weak_or_odd_tokens_are_refused(self, tmp_path: Path, text: str) -> None:
        """An empty file must not mean that none is needed."""
        path = tmp_path / "token"
        path.write_text(text)
        with pytest.raises(ConfigError, match="admin token"):
            read_admin_token(str(path))
