"""Admission: who gets in by which rule, and who is cut when rules change."""

from __future__ import annotations

import json
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import pytest
import trio

from relay.admission import MESH_VERDICT, Admission, Verdict
from relay.admission_remote import LAST_KNOWN_SECONDS, LastKnown
from relay.config import AdmissionConfig, ConfigError, HookConfig, TokensConfig
from relay.tokens import Claims, TokenSigner
from traversal.keys import NodePublic

ALICE = NodePublic(b"a" * 32)
BOB = NodePublic(b"b" * 32)
SIGNER = TokenSigner(b"s" * 32)


@dataclass
class Session:
    key: NodePublic
    verdict: Verdict


def closed(**settings: object) -> AdmissionConfig:
    return msgspec.convert({"mode": "closed", **settings}, AdmissionConfig, from_attributes=True)


def key_list(directory: Path, *keys: NodePublic) -> str:
    path = directory / "keys"
    path.write_text("".join(f"{key}\n" for key in keys))
    return str(path)


def tokens(directory: Path) -> TokensConfig:
    (directory / "token.pub").write_text(f"{SIGNER.public()}  # the operator's\n")
    (directory / "revoked").write_text("# none yet\n")
    return TokensConfig(
        public_key_file=str(directory / "token.pub"), revoked_file=str(directory / "revoked")
    )


async def allows(admission: Admission, key: NodePublic, token: str | None = None) -> bool:
    return (await admission.decide(key, "203.0.113.5", token)).allow


class TestLocalRules:
    async def test_open_admits_everybody(self) -> None:
        """Without a word of configuration."""
        admission = Admission(AdmissionConfig())
        assert await allows(admission, ALICE)
        assert admission.statistics().allowed == 1

    async def test_a_key_list_has_comments_and_both_forms(self, tmp_path: Path) -> None:
        """`nodekey:` and bare hex; the reason of a refusal is plain."""
        path = tmp_path / "keys"
        path.write_text(f"# staff\n\n{ALICE}  # alice\n{BOB.raw.hex().upper()}\n")
        admission = Admission(closed(keys_file=str(path)))
        assert await allows(admission, ALICE)
        assert await allows(admission, BOB)
        verdict = await admission.decide(NodePublic(b"c" * 32), "203.0.113.5", None)
        assert (verdict.allow, verdict.reason) == (False, "its key is not in the key list")

    def test_a_bad_list_at_start_names_the_line(self, tmp_path: Path) -> None:
        """Nothing starts with a list that was misread."""
        path = tmp_path / "keys"
        path.write_text(f"{ALICE}\nnodekey:abc\n")
        with pytest.raises(ConfigError, match=r"keys:2: a nodekey has 64 hex digits"):
            Admission(closed(keys_file=str(path)))

    async def test_a_token_admits_its_holder_with_its_limits(self, tmp_path: Path) -> None:
        """Though the key is in no list."""
        token = SIGNER.issue(Claims("t1", BOB, 2000, 10, 20, frozenset({ALICE})))
        admission = Admission(
            closed(keys_file=key_list(tmp_path, ALICE), tokens=tokens(tmp_path)),
            unix_clock=lambda: 1000,
        )
        verdict = await admission.decide(BOB, "203.0.113.5", token)
        grant = verdict.grant
        assert verdict.allow
        assert (grant.rate_bytes_per_second, grant.burst_bytes) == (10, 20)
        assert (grant.expires_unix, grant.peers) == (2000, {ALICE})
        assert not await allows(admission, BOB)

    async def test_a_token_that_does_not_count_leaves_the_other_rules(self, tmp_path: Path) -> None:
        """A listed key gets in with whatever it brings; others are told what was wrong."""
        token = SIGNER.issue(Claims("t1", NodePublic(b"c" * 32), 2000))
        admission = Admission(
            closed(keys_file=key_list(tmp_path, ALICE), tokens=tokens(tmp_path)),
            unix_clock=lambda: 1000,
        )
        assert await allows(admission, ALICE, token)
        verdict = await admission.decide(BOB, "203.0.113.5", token)
        assert not verdict.allow
        assert "not in the key list; token t1 belongs to another key" in verdict.reason
        assert not await allows(admission, BOB, "upt1.x.y")

    async def test_tokens_alone(self, tmp_path: Path) -> None:
        """Whoever has none is told what is missing."""
        admission = Admission(closed(tokens=tokens(tmp_path)), unix_clock=lambda: 1000)
        verdict = await admission.decide(BOB, "203.0.113.5", None)
        assert verdict.reason == "this relay admits only holders of a token; it presented none"
        expired = await admission.decide(BOB, "", SIGNER.issue(Claims("t1", BOB, 1000)))
        assert expired.reason.endswith("a token; token t1 has expired")


@asynccontextmanager
async def watching(
    admission: Admission, sessions: list[Session]
) -> AsyncIterator[trio.MemoryReceiveChannel[tuple[Session, str]]]:
    """Run the admission's watch over some sessions; what is cut arrives on the channel."""
    send, receive = trio.open_memory_channel[tuple[Session, str]](100)

    def cut(session: Session, reason: str) -> None:
        sessions.remove(session)
        send.send_nowait((session, reason))

    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(admission.run, lambda: iter(sessions), cut)
            yield receive
            nursery.cancel_scope.cancel()


async def connect(admission: Admission, key: NodePublic, token: str | None = None) -> Session:
    verdict = await admission.decide(key, "203.0.113.5", token)
    assert verdict.allow
    assert admission.recheck(key, verdict) is None
    return Session(key, verdict)


class TestRevoking:
    async def test_a_key_that_leaves_the_list_is_cut(self, tmp_path: Path) -> None:
        """And nobody else."""
        admission = Admission(closed(keys_file=key_list(tmp_path, ALICE, BOB)))
        alice, bob = await connect(admission, ALICE), await connect(admission, BOB)
        sessions = [alice, bob]
        async with watching(admission, sessions) as cut:
            key_list(tmp_path, ALICE)
            assert await cut.receive() == (bob, "its key is not in the key list")
        assert sessions == [alice]
        assert (admission.statistics().reloads, admission.statistics().cut) == (1, 1)
        assert not await allows(admission, BOB)

    async def test_a_revoked_token_is_cut(self, tmp_path: Path) -> None:
        """By its id, while another token of the same key stays."""
        admission = Admission(closed(tokens=tokens(tmp_path)), unix_clock=lambda: 1000)
        old = await connect(admission, BOB, SIGNER.issue(Claims("old", BOB, 2000)))
        new = await connect(admission, BOB, SIGNER.issue(Claims("new", BOB, 2000)))
        async with watching(admission, [old, new]) as cut:
            (tmp_path / "revoked").write_text("old\n")
            assert await cut.receive() == (old, "token old was revoked")

    async def test_an_expired_token_is_cut_within_a_second(
        self, tmp_path: Path, autojump_clock: trio.testing.MockClock
    ) -> None:
        """The session ends with the ticket, for a session that came while others ran too."""
        start = trio.current_time()
        admission = Admission(
            closed(tokens=tokens(tmp_path)), unix_clock=lambda: 1000 + trio.current_time() - start
        )
        sessions = [await connect(admission, BOB, SIGNER.issue(Claims("t", BOB, 1000 + 30)))]
        async with watching(admission, sessions) as cut:
            await trio.sleep(10)
            late = SIGNER.issue(Claims("late", ALICE, 1000 + 20))
            sessions.append(await connect(admission, ALICE, late))
            assert (await cut.receive())[1] == "token late has expired"
            assert 20 <= trio.current_time() - start < 21
            assert (await cut.receive())[1] == "token t has expired"
            assert trio.current_time() - start < 31

    async def test_a_bad_list_keeps_the_old_one(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Nobody is cut by a typing mistake, and the log says where it is."""
        path = tmp_path / "keys"
        admission = Admission(closed(keys_file=key_list(tmp_path, ALICE)))
        session = await connect(admission, ALICE)
        path.write_text("oops\n")
        await admission.reload()
        assert admission.recheck(ALICE, session.verdict) is None
        assert await allows(admission, ALICE)
        assert "keys:1:" in caplog.text
        path.unlink()
        await admission.reload()
        assert await allows(admission, ALICE)
        assert admission.statistics().reload_failures == 2

    async def test_closing_an_open_relay_cuts_whoever_has_no_right(self, tmp_path: Path) -> None:
        """The listed one stays, the other goes; opening again lets all in."""
        admission = Admission(AdmissionConfig())
        alice, bob = await connect(admission, ALICE), await connect(admission, BOB)
        with pytest.raises(ConfigError):
            await admission.reconfigure(closed(keys_file=str(tmp_path / "absent")))
        assert admission.recheck(BOB, bob.verdict) is None
        await admission.reconfigure(closed(keys_file=key_list(tmp_path, ALICE)))
        assert admission.recheck(BOB, bob.verdict) == "its key is not in the key list"
        assert admission.recheck(ALICE, alice.verdict) is None
        hook = HookConfig(url="http://127.0.0.1:1/")
        await admission.reconfigure(closed(keys_file=key_list(tmp_path, ALICE), hook=hook))
        reason = admission.recheck(ALICE, alice.verdict)
        assert reason is not None
        assert "connect again to be checked" in reason
        await admission.reconfigure(AdmissionConfig())
        assert admission.recheck(BOB, bob.verdict) is None

    async def test_mesh_peers_are_never_cut(self, tmp_path: Path) -> None:
        """No key list names them (DERP specification 8)."""
        admission = Admission(closed(keys_file=key_list(tmp_path, ALICE)))
        assert admission.recheck(BOB, MESH_VERDICT) is None

    async def test_rules_that_change_during_a_decision_count_at_registration(
        self, tmp_path: Path
    ) -> None:
        """A client between decision and registration does not slip through."""
        admission = Admission(closed(keys_file=key_list(tmp_path, ALICE)))
        session = await connect(admission, ALICE)
        key_list(tmp_path, BOB)
        await admission.reload()
        assert admission.recheck(ALICE, session.verdict) is not None


Responder = Callable[[bytes, trio.abc.Stream], Awaitable[None]]


@dataclass
class FakeHook:
    """An HTTP server that keeps the requests it got and answers all alike."""

    url: str = ""
    reply: bytes = b""
    requests: list[bytes] = field(default_factory=list)
    release: trio.Event | None = None

    def answer(self, body: str, status: int = 200) -> None:
        self.reply = f"HTTP/1.1 {status} X\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode()


@asynccontextmanager
async def fake_hook(listener: trio.abc.Listener[trio.SocketStream]) -> AsyncIterator[FakeHook]:
    hook = FakeHook()

    async def handle(stream: trio.SocketStream) -> None:
        request = b""
        while b"\r\n\r\n" not in request or (
            request.startswith(b"POST") and not request.endswith(b"}")
        ):
            request += await stream.receive_some()
        hook.requests.append(request)
        if hook.release is not None:
            await hook.release.wait()
        await stream.send_all(hook.reply)
        await stream.aclose()

    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            await nursery.start(trio.serve_listeners, handle, [listener])
            yield hook
            nursery.cancel_scope.cancel()


@asynccontextmanager
async def tcp_hook() -> AsyncIterator[FakeHook]:
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with fake_hook(listener) as hook:
        hook.url = f"http://127.0.0.1:{listener.socket.getsockname()[1]}/verify?relay=1"
        yield hook


def by_hook(url: str, **settings: object) -> Admission:
    return Admission(closed(hook=msgspec.convert({"url": url, **settings}, HookConfig)))


@contextmanager
def unreachable_url() -> Iterator[str]:
    """A URL on loopback where nobody listens, and nobody else can start to."""
    import socket

    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{bound.getsockname()[1]}/"


class TestHook:
    async def test_the_request_is_derpers(self) -> None:
        """POST, no Content-Type, key and source (DERP specification 8.2)."""
        async with tcp_hook() as hook:
            hook.answer('{"Allow":true}')
            verdict = await by_hook(hook.url).decide(ALICE, "2001:db8::1", None)
        assert verdict.allow
        head, _, body = hook.requests[0].partition(b"\r\n\r\n")
        assert head.startswith(b"POST /verify?relay=1 HTTP/1.1\r\n")
        assert b"content-type" not in head.lower()
        assert json.loads(body) == {"NodePublic": str(ALICE), "Source": "2001:db8::1"}

    @pytest.mark.parametrize(
        ("status", "body", "allow"),
        [
            (200, '{"Allow":true}', True),
            (200, '{"Allow":true,"Reason":"friend"}\n', True),
            (200, '{"allow":true}', True),
            (200, '{"Allow":false}', False),
            (200, '{"Allow":"true"}', False),
            (200, "{}", False),
            (200, "[true]", False),
            (200, "yes", False),
            (200, '{"Allow":true,"x":"' + "x" * 5000 + '"}', False),
            (302, '{"Allow":true}', False),
            (403, '{"Allow":true}', False),
            (500, '{"Allow":true}', False),
        ],
    )
    async def test_only_a_clear_yes_allows(self, status: int, body: str, allow: bool) -> None:
        """Also with fail_open, which is for a hook that can't be reached."""
        async with tcp_hook() as hook:
            hook.answer(body, status)
            assert await allows(by_hook(hook.url, fail_open=True), ALICE) is allow

    @pytest.mark.parametrize("fail_open", [False, True])
    async def test_an_unreachable_hook_denies_unless_told_otherwise(self, fail_open: bool) -> None:
        """And is counted."""
        with unreachable_url() as url:
            admission = by_hook(url, fail_open=fail_open)
            verdict = await admission.decide(ALICE, "", None)
        assert verdict.allow is fail_open
        assert "refused" in verdict.reason
        statistics = admission.statistics()
        assert (statistics.hook_failures, statistics.hook_failed_open) == (1, int(fail_open))

    async def test_a_silent_hook_is_given_up(self) -> None:
        """After the configured time, with a reason."""
        async with tcp_hook() as hook:
            hook.release = trio.Event()
            verdict = await by_hook(hook.url, timeout_seconds=0.05).decide(ALICE, "", None)
        assert verdict.reason == "the admission hook fails (no answer within 0.05 s)"

    async def test_not_http_is_a_failure(self) -> None:
        """Garbage is no verdict."""
        async with tcp_hook() as hook:
            for hook.reply in (
                b"SSH-2.0-x\r\n",
                b"",
                b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{",
            ):
                assert not await allows(by_hook(hook.url), ALICE)

    async def test_last_known_answers_bridge_an_outage(self) -> None:
        """Known clients stay welcome, unknown ones are denied."""
        async with tcp_hook() as hook:
            admission = by_hook(hook.url)
            hook.answer('{"Allow":true}')
            assert await allows(admission, ALICE)
            hook.answer("down", 503)
            assert await allows(admission, ALICE)
            assert not await allows(admission, BOB)
            hook.answer('{"Allow":false}')
            assert not await allows(admission, ALICE)
            hook.answer("down", 503)
            assert not await allows(admission, ALICE)
        statistics = admission.statistics()
        assert (statistics.hook_requests, statistics.hook_cached_answers) == (5, 2)

    async def test_one_question_at_a_time_for_one_key(self) -> None:
        """A reconnect storm of one client is one request, even if the first asker leaves."""
        async with tcp_hook() as hook:
            hook.answer('{"Allow":true}')
            hook.release = trio.Event()
            admission = by_hook(hook.url)
            results: list[bool] = []

            async def ask() -> None:
                results.append(await allows(admission, ALICE))

            async with trio.open_nursery() as nursery:
                first = trio.CancelScope()

                async def ask_and_leave() -> None:
                    with first:
                        await ask()

                nursery.start_soon(ask_and_leave)
                await trio.testing.wait_all_tasks_blocked(0.01)
                for _ in range(10):
                    nursery.start_soon(ask)
                await trio.testing.wait_all_tasks_blocked(0.01)
                assert len(hook.requests) == 1
                first.cancel()
                await trio.testing.wait_all_tasks_blocked(0.01)
                hook.release.set()
            assert results == [True] * 10
            assert len(hook.requests) == 2

    async def test_all_methods_must_allow(self, tmp_path: Path) -> None:
        """A key list and a hook together are stricter than each."""
        async with tcp_hook() as hook:
            admission = Admission(
                closed(keys_file=key_list(tmp_path, ALICE), hook=HookConfig(url=hook.url))
            )
            hook.answer('{"Allow":true}')
            assert await allows(admission, ALICE)
            assert not await allows(admission, BOB)
            assert len(hook.requests) == 1
            hook.answer('{"Allow":false}')
            assert not await allows(admission, ALICE)


class TestTailscaled:
    @pytest.mark.parametrize(
        ("status", "body", "allow", "reason"),
        [
            (200, "{}", True, "it is a peer of the local tailscaled"),
            (404, "", False, "it is no peer"),
            (500, "", False, "status 500"),
            (400, "invalid 'addr' parameter", False, "too old"),
        ],
    )
    async def test_verdict_is_the_status(
        self, tmp_path: Path, status: int, body: str, allow: bool, reason: str
    ) -> None:
        """DERP specification 8.1, request line and headers included."""
        path = str(tmp_path / "s")
        listening = trio.socket.socket(trio.socket.AF_UNIX)
        await listening.bind(path)
        listening.listen(1)
        async with fake_hook(trio.SocketListener(listening)) as hook:
            hook.answer(body, status)
            verdict = await Admission(closed(tailscaled_socket=path)).decide(ALICE, "", None)
        assert verdict.allow is allow
        assert reason in verdict.reason
        head = hook.requests[0].decode().split("\r\n")
        assert head[0] == f"GET /localapi/v0/whois?addr=nodekey%3A{ALICE.raw.hex()} HTTP/1.1"
        assert {"Host: local-tailscaled.sock", "Tailscale-Cap: 145"} <= set(head)
        assert not any(line.lower().startswith(("origin", "referer")) for line in head)

    async def test_no_daemon_is_a_denial(self, tmp_path: Path) -> None:
        """There is no fail-open here."""
        admission = Admission(closed(tailscaled_socket=os.fspath(tmp_path / "absent")))
        verdict = await admission.decide(ALICE, "", None)
        assert not verdict.allow
        assert "can't be asked" in verdict.reason


class TestLastKnown:
    def test_bounded_and_denials_push_out_no_admission(self) -> None:
        """A flood of strangers costs the regulars nothing."""
        known = LastKnown(2)
        known.remember(0, ALICE, True)
        for number in range(10):
            known.remember(1, NodePublic(bytes([number + 1]) * 32), False)
        assert known.recall(2, ALICE) is True
        assert known.recall(2, NodePublic(bytes([1]) * 32)) is None
        assert known.recall(2, NodePublic(bytes([10]) * 32)) is False

    def test_the_latest_answer_counts_and_grows_old(self) -> None:
        """A day later nobody is known."""
        known = LastKnown(2)
        known.remember(0, ALICE, True)
        known.remember(1, ALICE, False)
        assert known.recall(1, ALICE) is False
        known.remember(2, ALICE, True)
        assert known.recall(2 + LAST_KNOWN_SECONDS, ALICE) is True
        assert known.recall(3 + LAST_KNOWN_SECONDS, ALICE) is None
