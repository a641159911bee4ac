"""Who may use the relay, and who no longer may.

`admission.mode` decides: "open" admits everybody. In "closed" mode

* a valid token admits its holder with the token's limits, and nothing else is asked;
* otherwise every configured method (key list, hook, local tailscaled) must allow the key.

Mesh peers are never asked about (DERP specification 8); theirs is `MESH_VERDICT`. The server's
part of the contract:

1. `await decide(...)` once the client has proved that it owns its key;
2. `recheck(...)` when it registers the session, since rules may have changed meanwhile;
3. run `run(...)` beside everything else: it watches the files and cuts, within a second, every
   session whose key left the list, whose token was revoked or expired, or whose method is no
   longer the one that is configured. What a hook thinks later of an admitted client is not asked.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NoReturn, Protocol, TypeVar

import trio

from relay.admission_remote import Hook, HookCounters, TailscaledWhois
from relay.config_schema import AdmissionConfig
from relay.config_sources import ConfigError, read_text_file
from relay.file_watch import POLL_SECONDS, FileWatch
from relay.tokens import Token, TokenError, TokenKey, open_token, parse_token_id
from traversal.keys import NodePublic

logger = logging.getLogger(__name__)

# Nearly a million keys with a comment each.
_MAX_LIST_BYTES: Final = 64 << 20
_HOOK_FAILURE_COUNTS_SECONDS: Final = 60.0

# A check takes about a microsecond; everybody's packets wait for no more than a millisecond.
_SWEEP_RUN: Final = 1000

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Grant:
    """What an admitted client may do. None: the relay's own limit, or none at all."""

    rate_bytes_per_second: int | None = None
    burst_bytes: int | None = None
    expires_unix: int | None = None
    peers: frozenset[NodePublic] | None = None
    """The only keys it may exchange packets with, in either direction."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """The decision about one client, with its reason in plain words."""

    allow: bool
    reason: str
    grant: Grant = Grant()
    asked: frozenset[str] = frozenset()
    """Who else was asked: hook, tailscaled."""
    token: Token | None = None
    is_exempt: bool = False
    """No rule applies, now or later."""


MESH_VERDICT: Final = Verdict(True, "it presented the mesh key", is_exempt=True)
"""The verdict for mesh peers, about whom `Admission.decide` is not asked."""


class Session(Protocol):
    """What admission needs to know of a connected client."""

    @property
    def key(self) -> NodePublic:
        """The key it proved to own."""
        ...

    @property
    def verdict(self) -> Verdict:
        """What `decide` said."""
        ...


SessionT = TypeVar("SessionT", bound=Session)


@dataclass(frozen=True, slots=True)
class AdmissionStatistics:
    """Counts since the start."""

    allowed: int
    denied: int
    cut: int
    reloads: int
    reload_failures: int
    hook_requests: int
    hook_failures: int
    hook_cached_answers: int
    hook_failed_open: int
    hook_is_failing: bool
    """The last question to the hook got no answer, and that was within the last minute.

    Not longer, since a relay that is taken out of service for it is asked no questions any more.
    """


@dataclass(frozen=True, slots=True)
class _Rules:
    """One consistent state of everything that decides; replaced as a whole."""

    is_open: bool
    keys: frozenset[NodePublic] | None
    token_keys: frozenset[TokenKey]
    revoked: frozenset[str]
    others: frozenset[str]
    """Who else has to be asked; changes with the settings of whoever it is."""


class Admission:
    """Decides about clients. Construction reads the files and raises ConfigError."""

    def __init__(
        self, config: AdmissionConfig, *, unix_clock: Callable[[], float] = time.time
    ) -> None:
        self._unix_clock = unix_clock
        self._counters = HookCounters()
        self._allowed = self._denied = self._cut = self._reloads = self._reload_failures = 0
        self._loading = trio.Lock()
        self._is_stale = False
        self._next_expiry = math.inf
        self._config = AdmissionConfig()
        self._hook: Hook | None = None
        self._tailscaled: TailscaledWhois | None = None
        self._watch = _watch(config)
        self._adopt(config, _load(config))

    async def decide(self, key: NodePublic, source: str, token: str | None) -> Verdict:
        """Decide about a client that owns `key` and connects from the IP address `source`.

        `token` is what stood behind "Bearer" in its Authorization header.
        """
        verdict = await self._decide(key, source, token)
        if verdict.allow:
            self._allowed += 1
        else:
            self._denied += 1
        return verdict

    def recheck(self, key: NodePublic, verdict: Verdict) -> str | None:
        """Why an allowed client may no longer stay, if so. Waits for nothing, asks nobody.

        From the first call on, `run` knows when the client's token expires.
        """
        rules = self._rules
        if rules.is_open or verdict.is_exempt:
            return None
        if verdict.token is not None:
            problem = verdict.token.problem(
                rules.token_keys, unix_time=self._unix_clock(), revoked=rules.revoked
            )
            if problem is None:
                self._next_expiry = min(self._next_expiry, verdict.token.claims.expires_unix)
            return problem
        if rules.keys is not None and key not in rules.keys:
            return "its key is not in the key list"
        if rules.keys is None and not rules.others:
            return "this relay now admits only holders of a token"
        if not rules.others <= verdict.asked:
            return "the admission rules have changed; it has to connect again to be checked"
        return None

    async def reconfigure(self, config: AdmissionConfig) -> None:
        """Go over to another configuration. Raises ConfigError, and then nothing has changed."""
        async with self._loading:
            watch = _watch(config)
            self._adopt(config, await trio.to_thread.run_sync(_load, config))
            self._watch = watch

    async def reload(self) -> None:
        """Read the files again (SIGHUP). A bad file is logged, and all old ones keep counting."""
        async with self._loading:
            config = self._config
            try:
                self._adopt(config, await trio.to_thread.run_sync(_load, config))
            except ConfigError as error:
                self._reload_failures += 1
                logger.error("admission keeps its old rules: %s", error)
                return
            self._reloads += 1
            if not self._rules.is_open:
                logger.info("admission rules were read again")

    async def run(
        self, sessions: Callable[[], Iterable[SessionT]], cut: Callable[[SessionT, str], None]
    ) -> NoReturn:
        """Watch files and clock forever; call `cut` with a reason for whoever has to go.

        `sessions` gives the connected clients that `decide` admitted. A sweep over many lets
        other tasks run in between, so a session may be gone when it is cut: that must be harmless.
        """
        while True:
            await trio.sleep(POLL_SECONDS)
            if self._watch.poll():
                await self.reload()
            if self._is_stale or self._unix_clock() >= self._next_expiry:
                self._is_stale = False
                self._next_expiry = math.inf
                await self._sweep(tuple(sessions()), cut)

    def statistics(self) -> AdmissionStatistics:
        """A snapshot."""
        counters = self._counters
        return AdmissionStatistics(
            allowed=self._allowed,
            denied=self._denied,
            cut=self._cut,
            reloads=self._reloads,
            reload_failures=self._reload_failures,
            hook_requests=counters.requests,
            hook_failures=counters.failures,
            hook_cached_answers=counters.cached_answers,
            hook_failed_open=counters.failed_open,
            hook_is_failing=counters.is_failing
            and trio.current_time() - counters.failed_at < _HOOK_FAILURE_COUNTS_SECONDS,
        )

    async def _sweep(
        self, sessions: tuple[SessionT, ...], cut: Callable[[SessionT, str], None]
    ) -> None:
        for index, session in enumerate(sessions):
            if index % _SWEEP_RUN == 0:
                await trio.lowlevel.checkpoint()
            reason = self.recheck(session.key, session.verdict)
            if reason is not None:
                self._cut += 1
                cut(session, reason)

    async def _decide(self, key: NodePublic, source: str, token: str | None) -> Verdict:
        rules, others = self._rules, (self._hook, self._tailscaled)
        if rules.is_open:
            return Verdict(True, "admission is open")
        token_problem = ""
        if token is not None and rules.token_keys:
            try:
                return self._admit_by_token(rules, key, token)
            except TokenError as error:
                token_problem = f"; {error}"
        if rules.keys is None and not rules.others:
            missing = "" if token_problem else "; it presented none"
            reason = f"this relay admits only holders of a token{missing}{token_problem}"
            return Verdict(False, reason)
        if rules.keys is not None and key not in rules.keys:
            return Verdict(False, f"its key is not in the key list{token_problem}")
        reason = "its key is in the key list"
        for other in others:
            if other is None:
                continue
            answer = await other.ask(key, source)
            if not answer.allow:
                return Verdict(False, answer.reason + token_problem)
            reason = answer.reason
        return Verdict(True, reason, asked=rules.others)

    def _admit_by_token(self, rules: _Rules, key: NodePublic, text: str) -> Verdict:
        token = open_token(text, rules.token_keys)
        claims = token.claims
        if claims.key != key:
            raise TokenError(f"token {claims.id} belongs to another key, {claims.key.short()}")
        unix_time = self._unix_clock()
        if problem := token.problem(rules.token_keys, unix_time=unix_time, revoked=rules.revoked):
            raise TokenError(problem)
        grant = Grant(
            claims.rate_bytes_per_second, claims.burst_bytes, claims.expires_unix, claims.peers
        )
        return Verdict(True, f"token {claims.id} is valid", grant, token=token)

    def _adopt(self, config: AdmissionConfig, rules: _Rules) -> None:
        # The hook keeps its last known answers as long as its settings are the same.
        if config.hook != self._config.hook:
            self._hook = Hook(config.hook, self._counters) if config.hook.url else None
        path = config.tailscaled_socket
        self._tailscaled = TailscaledWhois(path) if path else None
        self._config, self._rules = config, rules
        self._is_stale = True


def _watch(config: AdmissionConfig) -> FileWatch:
    tokens = config.tokens
    return FileWatch([config.keys_file, tokens.public_key_file, tokens.revoked_file])


def _load(config: AdmissionConfig) -> _Rules:
    tokens = config.tokens
    others = (
        (config.hook.url, f"hook {config.hook.url}"),
        (config.tailscaled_socket, f"tailscaled {config.tailscaled_socket}"),
    )
    keys = _read_list(config.keys_file, "key list", _parse_node_key)
    return _Rules(
        is_open=config.mode == "open",
        keys=keys if config.keys_file else None,
        token_keys=_read_list(tokens.public_key_file, "token key file", TokenKey.parse),
        revoked=_read_list(tokens.revoked_file, "revocation file", parse_token_id),
        others=frozenset(label for setting, label in others if setting),
    )


def _read_list(path: str, what: str, parse: Callable[[str], _T]) -> frozenset[_T]:
    """The items of a file: one a line, `#` starts a comment. Raises ConfigError, with the line."""
    items = set()
    text = read_text_file(Path(path), what, _MAX_LIST_BYTES) if path else ""
    for number, line in enumerate(text.splitlines(), 1):
        if item := line.partition("#")[0].strip():
            try:
                items.add(parse(item))
            except ValueError as error:
                raise ConfigError(f"{path}:{number}: {error}") from None
    return frozenset(items)


def _parse_node_key(text: str) -> NodePublic:
    is_typed = text.startswith(NodePublic.prefix)
    return NodePublic.parse(text) if is_typed else NodePublic.from_hex(text)
