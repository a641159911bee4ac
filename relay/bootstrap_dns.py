"""Host names that clients may look up here when their own DNS is broken (DERP specification 11.2).

`BootstrapDns` holds what was resolved and decides what each client is told; `refresh_forever` is
the task that resolves. A name that can't be resolved now keeps the addresses it had: they are worth
more to a client in trouble than none.
"""

from __future__ import annotations

import hashlib
import ipaddress
import json
import logging
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, NoReturn, Protocol

import trio

from relay.config_schema import BootstrapDnsConfig

if TYPE_CHECKING:
    from dns.asyncresolver import Resolver as DnspythonResolver

logger = logging.getLogger("underpass.relay.bootstrap_dns")

REFRESH_SECONDS: Final = 600.0
REFRESH_TIMEOUT_SECONDS: Final = 60.0
RECONFIGURED_POLL_SECONDS: Final = 1.0
MAX_QUERIED_NAMES: Final = 1000
"""Distinct names that are remembered to count them, since clients may ask for anything."""
MAX_NAME_LENGTH: Final = 253
"""Of a host name (RFC 1035); what is longer is not remembered."""


class ResolveError(Exception):
    """A name could not be resolved; the text says why."""


class Resolver(Protocol):
    """Asks the DNS. Its methods raise ResolveError."""

    async def addresses(self, name: str) -> Sequence[str]:
        """The IPv4 and IPv6 addresses of a name, in text form."""
        ...

    async def text(self, name: str) -> str:
        """The first TXT record of a name."""
        ...


@dataclass(frozen=True, slots=True)
class Unpublished:
    """The addresses of a name that only those learn who ask for it, and `percent` of them."""

    addresses: tuple[str, ...]
    percent: int = 100


@dataclass(slots=True)
class BootstrapDnsCounters:
    """Requests since the start; derper's words (DERP specification 16)."""

    requests: int = 0
    published_hits: int = 0
    published_misses: int = 0
    unpublished_hits: int = 0
    unpublished_misses: int = 0
    unpublished_percent_misses: int = 0
    queried_domains: int = 0
    """Distinct names that were asked for, counted up to MAX_QUERIED_NAMES."""


@dataclass(slots=True)
class BootstrapDns:
    """What is known, and who is told. `randomness` shuffles addresses and decides for loopback."""

    randomness: random.Random
    counters: BootstrapDnsCounters = field(default_factory=BootstrapDnsCounters)
    published: dict[str, tuple[str, ...]] = field(default_factory=dict)
    unpublished: dict[str, Unpublished] = field(default_factory=dict)
    _body: bytes = b""
    _queried: set[str] = field(default_factory=set)

    def update(
        self, published: Mapping[str, Sequence[str]], unpublished: Mapping[str, Unpublished]
    ) -> None:
        """Replace what is known. Addresses are shuffled, so that clients share the load."""
        self.published = {
            name: tuple(self.randomness.sample(addresses, len(addresses)))
            for name, addresses in published.items()
        }
        self.unpublished = dict(unpublished)
        self._body = _encode(self.published) if self.published else b""

    def answer(self, name: str, source: str) -> bytes:
        """The JSON for a client at IP address `source` that asked for `name` (or for nothing)."""
        counters = self.counters
        counters.requests += 1
        if not name:
            return self._body
        self._note_queried(name)
        entry = self.unpublished.get(name)
        if entry is not None and entry.addresses:
            counters.unpublished_hits += 1
            if self._is_selected(source, entry.percent):
                return _encode({name: entry.addresses})
            counters.unpublished_percent_misses += 1
        addresses = self.published.get(name)
        if addresses is None:
            counters.unpublished_misses += 1
        elif addresses:
            counters.published_hits += 1
        else:
            counters.published_misses += 1
        return self._body

    def _note_queried(self, name: str) -> None:
        if len(self._queried) < MAX_QUERIED_NAMES and len(name) <= MAX_NAME_LENGTH:
            self._queried.add(name)
            self.counters.queried_domains = len(self._queried)

    def _is_selected(self, source: str, percent: int) -> bool:
        """Whether a client is among the first `percent`; always the same for one address."""
        if percent in (0, 100):
            return percent == 100
        try:
            address = ipaddress.ip_address(source)
        except ValueError:
            return False
        if address.is_loopback:
            return self.randomness.random() < 0.5  # so that a developer sees both outcomes
        digest = hashlib.blake2b(address.packed, digest_size=8).digest()
        return int.from_bytes(digest, "big") % 100 < percent


async def refresh_forever(
    bootstrap_dns: BootstrapDns,
    config: Callable[[], BootstrapDnsConfig],
    resolver: Resolver,
) -> NoReturn:
    """Resolve the configured names now, every 10 minutes, and when `config` gives others."""
    while True:
        names = config()
        await refresh(bootstrap_dns, names, resolver)
        with trio.move_on_after(REFRESH_SECONDS):
            while config() == names:  # noqa: ASYNC110  # an event would need one more parameter
                await trio.sleep(RECONFIGURED_POLL_SECONDS)


async def refresh(
    bootstrap_dns: BootstrapDns, config: BootstrapDnsConfig, resolver: Resolver
) -> None:
    """Resolve all names once, at most for a minute; names that fail keep what they had."""
    published: dict[str, Sequence[str]] = {}
    unpublished: dict[str, Unpublished] = {}
    for name in config.names:
        if name in bootstrap_dns.published:
            published[name] = bootstrap_dns.published[name]
    for entry in config.unpublished_names:
        name = entry.partition("/")[0]
        if name in bootstrap_dns.unpublished:
            unpublished[name] = bootstrap_dns.unpublished[name]

    async def resolve_published(name: str) -> None:
        addresses = await _maybe_addresses(resolver, name)
        if addresses is not None:
            published[name] = addresses

    async def resolve_unpublished(entry: str) -> None:
        name, _, text_name = entry.partition("/")
        addresses = await _maybe_addresses(resolver, name)
        if addresses is not None:
            percent = await _roll_out_percent(resolver, text_name) if text_name else 100
            unpublished[name] = Unpublished(tuple(addresses), percent)

    with trio.move_on_after(REFRESH_TIMEOUT_SECONDS) as timeout:
        async with trio.open_nursery() as nursery:
            for name in config.names:
                nursery.start_soon(resolve_published, name)
            for entry in config.unpublished_names:
                nursery.start_soon(resolve_unpublished, entry)
    if timeout.cancelled_caught:
        logger.warning("bootstrap DNS: not all names could be resolved within 1 minute")
    bootstrap_dns.update(published, unpublished)


async def _maybe_addresses(resolver: Resolver, name: str) -> Sequence[str] | None:
    try:
        return await resolver.addresses(name)
    except ResolveError as error:
        logger.warning("bootstrap DNS: can't resolve %s: %s", name, error)
        return None


async def _roll_out_percent(resolver: Resolver, name: str) -> int:
    """From a TXT record; absent or malformed means nobody."""
    try:
        text = await resolver.text(name)
    except ResolveError as error:
        logger.warning("bootstrap DNS: can't resolve the TXT record of %s: %s", name, error)
        return 0
    if text.isascii() and text.isdigit() and len(text) <= 3 and int(text) <= 100:
        return int(text)
    logger.warning("bootstrap DNS: TXT record of %s: %r is not a number up to 100", name, text)
    return 0


class DnsResolver:
    """Asks the name servers of this machine, or those of `resolver`, by dnspython."""

    def __init__(self, resolver: DnspythonResolver | None = None) -> None:
        self._resolver = resolver

    async def addresses(self, name: str) -> Sequence[str]:
        """See `Resolver`."""
        import dns.asyncbackend
        import dns.exception

        try:
            answers = await self._get().resolve_name(
                name, lifetime=REFRESH_TIMEOUT_SECONDS, backend=dns.asyncbackend.get_backend("trio")
            )
        except (dns.exception.DNSException, OSError, UnicodeError) as error:
            raise ResolveError(str(error)) from error
        return list(answers.addresses())

    async def text(self, name: str) -> str:
        """See `Resolver`."""
        import dns.asyncbackend
        import dns.exception

        try:
            answer = await self._get().resolve(
                name,
                "TXT",
                lifetime=REFRESH_TIMEOUT_SECONDS,
                backend=dns.asyncbackend.get_backend("trio"),
            )
        except (dns.exception.DNSException, OSError, UnicodeError) as error:
            raise ResolveError(str(error)) from error
        return b"".join(answer[0].strings).decode("latin-1")

    def _get(self) -> DnspythonResolver:
        import dns.asyncresolver

        if self._resolver is None:
            self._resolver = dns.asyncresolver.Resolver()
        return self._resolver


def _encode(addresses: Mapping[str, Sequence[str]]) -> bytes:
    return json.dumps(addresses, indent="\t", sort_keys=True).encode()
