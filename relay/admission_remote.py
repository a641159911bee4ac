"""Asking others whether a key may use this relay: an HTTP hook, or the local tailscaled.

Both answer with `Answer`; neither raises for anything the other side does.
"""

from __future__ import annotations

import logging
import math
import ssl
from collections import OrderedDict
from dataclasses import dataclass
from typing import Final

import msgspec
import trio

from relay.config_schema import HookConfig
from relay.http_client import HttpError, HttpResponse, get_from_unix_socket, post
from traversal.keys import NodePublic

logger = logging.getLogger(__name__)

# A hook that is down for longer than this is no outage that old answers should bridge.
LAST_KNOWN_SECONDS: Final = 86400.0

_WHOIS_TIMEOUT_SECONDS: Final = 5.0
_WHOIS_CONCURRENCY: Final = 64
_TAILSCALE_CAPABILITY: Final = "145"


@dataclass(frozen=True, slots=True)
class Answer:
    """Whether a key may use the relay, as far as one method can tell, and why."""

    allow: bool
    reason: str


@dataclass(slots=True)
class HookCounters:
    """What happened at the hook since the start."""

    requests: int = 0
    failures: int = 0
    cached_answers: int = 0
    failed_open: int = 0
    is_failing: bool = False
    """The last question got no answer."""
    failed_at: float = -math.inf
    """When that was last so, in monotonic seconds."""


class LastKnown:
    """The last answer for each of many keys, bounded, oldest out first. Pure.

    Allowed and denied keys are kept apart: keys cost a stranger nothing, and a flood of denied
    ones must not push out those that matter.
    """

    def __init__(self, entries: int) -> None:
        """At most `entries` of either kind."""
        self._entries = entries
        self._allowed: OrderedDict[NodePublic, float] = OrderedDict()
        self._denied: OrderedDict[NodePublic, float] = OrderedDict()

    def remember(self, now: float, key: NodePublic, allow: bool) -> None:
        """Note an answer."""
        wanted, other = self._allowed, self._denied
        if not allow:
            wanted, other = other, wanted
        other.pop(key, None)
        wanted[key] = now
        wanted.move_to_end(key)
        if len(wanted) > self._entries:
            wanted.popitem(last=False)

    def recall(self, now: float, key: NodePublic) -> bool | None:
        """The last answer, if it is known and not older than `LAST_KNOWN_SECONDS`."""
        for answers, allow in ((self._allowed, True), (self._denied, False)):
            noted = answers.get(key)
            if noted is not None and now - noted <= LAST_KNOWN_SECONDS:
                return allow
        return None


class _Flight:
    """One question under way, and who else waits for its answer."""

    __slots__ = ("answer", "done")

    def __init__(self) -> None:
        self.done = trio.Event()
        self.answer: Answer | None = None


class Hook:
    """derper's --verify-client-url, also headscale's /verify (DERP specification 8.2).

    An answer always counts. Without one (the network failed, or status 500 and above) the last
    known answer counts; without that, `fail_open` decides for network failures, and everything
    else is a denial. One question at a time is asked for the same key and source.
    """

    def __init__(self, config: HookConfig, counters: HookCounters) -> None:
        self._config = config
        self._counters = counters
        self._tls = ssl.create_default_context()
        self._last_known = LastKnown(config.cache_entries)
        self._flights: dict[tuple[NodePublic, str], _Flight] = {}
        self._places = trio.CapacityLimiter(config.concurrency)
        counters.is_failing = False

    async def ask(self, key: NodePublic, source: str) -> Answer:
        """Ask the hook, or wait for the answer to the same question."""
        question = (key, source)
        while (flight := self._flights.get(question)) is not None:
            await flight.done.wait()
            # No answer: whoever asked went away, and somebody else has to.
            if flight.answer is not None:
                return flight.answer
        flight = self._flights[question] = _Flight()
        try:
            async with self._places:
                flight.answer = await self._ask(key, source)
            return flight.answer
        finally:
            del self._flights[question]
            flight.done.set()

    async def _ask(self, key: NodePublic, source: str) -> Answer:
        self._counters.requests += 1
        body = msgspec.json.encode({"NodePublic": str(key), "Source": source})
        timeout = self._config.timeout_seconds
        try:
            response = await post(self._config.url, body, timeout_seconds=timeout, tls=self._tls)
        except HttpError as error:
            return self._answer_for_none(key, str(error), fail_open=self._config.fail_open)
        if response.status >= 500:
            return self._answer_for_none(key, f"status {response.status}", fail_open=False)
        if self._counters.is_failing:
            self._counters.is_failing = False
            logger.warning("the admission hook answers again")
        answer = _read_answer(response)
        self._last_known.remember(trio.current_time(), key, answer.allow)
        return answer

    def _answer_for_none(self, key: NodePublic, failure: str, *, fail_open: bool) -> Answer:
        self._counters.failures += 1
        self._counters.failed_at = trio.current_time()
        if not self._counters.is_failing:
            self._counters.is_failing = True
            logger.error("the admission hook fails (%s); last known answers count", failure)
        known = self._last_known.recall(trio.current_time(), key)
        if known is not None:
            self._counters.cached_answers += 1
            verb = "allowed" if known else "denied"
            return Answer(known, f"the admission hook fails ({failure}) and {verb} it before")
        if fail_open:
            self._counters.failed_open += 1
            return Answer(True, f"the admission hook fails ({failure}) and fail_open is set")
        return Answer(False, f"the admission hook fails ({failure})")


def _read_answer(response: HttpResponse) -> Answer:
    if response.status != 200:
        return Answer(False, f"the admission hook answered with status {response.status}")
    try:
        document = msgspec.json.decode(response.body, type=dict[str, object])
    except msgspec.DecodeError:
        return Answer(False, "the admission hook answered with something else than a JSON object")
    # The reference server's reader takes member names in any case.
    if any(name.lower() == "allow" and value is True for name, value in document.items()):
        return Answer(True, "the admission hook allows it")
    return Answer(False, "the admission hook denies it")


class TailscaledWhois:
    """derper's --verify-clients: is the key a peer of the tailscaled on this machine
    (DERP specification 8.1)?"""

    def __init__(self, socket_path: str) -> None:
        self._socket_path = socket_path
        self._places = trio.CapacityLimiter(_WHOIS_CONCURRENCY)

    async def ask(self, key: NodePublic, source: str) -> Answer:
        """Ask the daemon; `source` plays no part."""
        target = f"/localapi/v0/whois?addr=nodekey%3A{key.raw.hex()}"
        headers = [("Host", "local-tailscaled.sock"), ("Tailscale-Cap", _TAILSCALE_CAPABILITY)]
        try:
            async with self._places:
                response = await get_from_unix_socket(
                    self._socket_path, target, headers, timeout_seconds=_WHOIS_TIMEOUT_SECONDS
                )
        except HttpError as error:
            return Answer(False, f"the local tailscaled can't be asked: {error}")
        if response.status == 200:
            return Answer(True, "it is a peer of the local tailscaled")
        if response.status == 404:
            return Answer(False, "it is no peer of the local tailscaled")
        hint = "; is the daemon too old?" if b"invalid 'addr' parameter" in response.body else ""
        return Answer(False, f"the local tailscaled answered with status {response.status}{hint}")
