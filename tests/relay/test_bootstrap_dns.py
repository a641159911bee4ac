"""Bootstrap DNS (DERP specification 11.2): who is told what, and how it is resolved."""

from __future__ import annotations

import json
import random
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import dns.asyncresolver
import dns.message
import dns.rcode
import dns.rrset
import pytest
import trio

from relay.bootstrap_dns import (
    MAX_QUERIED_NAMES,
    REFRESH_SECONDS,
    BootstrapDns,
    DnsResolver,
    ResolveError,
    Unpublished,
    refresh,
    refresh_forever,
)
from relay.config_schema import BootstrapDnsConfig


def bootstrap_dns() -> BootstrapDns:
    return BootstrapDns(random.Random(1))


class FakeResolver:
    """Answers from tables; what is missing fails."""

    def __init__(self) -> None:
        self.names: dict[str, list[str]] = {}
        self.texts: dict[str, str] = {}
        self.asked: list[str] = []
        self.hangs = False

    async def addresses(self, name: str) -> Sequence[str]:
        self.asked.append(name)
        if self.hangs:
            await trio.sleep_forever()
        if name not in self.names:
            raise ResolveError("no such name")
        return self.names[name]

    async def text(self, name: str) -> str:
        if name not in self.texts:
            raise ResolveError("no such record")
        return self.texts[name]


class TestAnswers:
    def test_empty_without_configuration(self) -> None:
        """0 bytes, not an empty object."""
        assert bootstrap_dns().answer("", "192.0.2.1") == b""

    def test_published_names_are_for_everyone(self) -> None:
        """Indented with tabs, as derper does."""
        subject = bootstrap_dns()
        subject.update({"a.example": ["192.0.2.1"], "b.example": []}, {})
        expected = b'{\n\t"a.example": [\n\t\t"192.0.2.1"\n\t],\n\t"b.example": []\n}'
        assert subject.answer("", "198.51.100.1") == expected
        assert subject.answer("a.example", "198.51.100.1") == expected
        subject.answer("b.example", "198.51.100.1")
        subject.answer("c.example", "198.51.100.1")
        counters = subject.counters
        assert (counters.requests, counters.queried_domains) == (4, 3)
        assert (counters.published_hits, counters.published_misses) == (1, 1)
        assert counters.unpublished_misses == 1

    def test_unpublished_names_are_only_for_those_who_ask(self) -> None:
        """And they are then told nothing else."""
        subject = bootstrap_dns()
        subject.update({"a.example": ["192.0.2.1"]}, {"u.example": Unpublished(("192.0.2.9",))})
        assert b"u.example" not in subject.answer("", "198.51.100.1")
        answer = subject.answer("u.example", "198.51.100.1")
        assert json.loads(answer) == {"u.example": ["192.0.2.9"]}
        assert subject.counters.unpublished_hits == 1

    def test_roll_out_is_a_function_of_the_address(self) -> None:
        """The same client always gets the same answer, and about the right share is selected."""
        subject = bootstrap_dns()
        subject.update({}, {"u.example": Unpublished(("192.0.2.9",), percent=30)})
        sources = [f"198.51.{n // 256}.{n % 256}" for n in range(1000)]
        first = [bool(subject.answer("u.example", source)) for source in sources]
        assert first == [bool(subject.answer("u.example", source)) for source in sources]
        assert 240 < sum(first) < 360
        counters = subject.counters
        assert counters.unpublished_percent_misses == 2 * (1000 - sum(first))
        assert counters.unpublished_misses == counters.unpublished_percent_misses

    @pytest.mark.parametrize(("percent", "selected"), [(0, False), (100, True)])
    def test_ends_of_the_roll_out(self, percent: int, selected: bool) -> None:
        """0 is nobody and 100 everybody, whoever it is."""
        subject = bootstrap_dns()
        subject.update({}, {"u.example": Unpublished(("192.0.2.9",), percent)})
        for source in ("", "127.0.0.1", "2001:db8::1"):
            assert bool(subject.answer("u.example", source)) is selected

    def test_loopback_sees_both_outcomes(self) -> None:
        """A developer's requests are decided at random."""
        subject = bootstrap_dns()
        subject.update({}, {"u.example": Unpublished(("192.0.2.9",), 30)})
        outcomes = {bool(subject.answer("u.example", "127.0.0.1")) for _ in range(50)}
        assert outcomes == {True, False}

    def test_memory_for_asked_names_is_bounded(self) -> None:
        """Whatever clients ask for."""
        subject = bootstrap_dns()
        subject.answer("x" * 5000, "192.0.2.1")
        assert subject.counters.queried_domains == 0
        for number in range(MAX_QUERIED_NAMES + 10):
            subject.answer(f"{number}.example", "192.0.2.1")
        assert subject.counters.queried_domains == MAX_QUERIED_NAMES


class TestRefresh:
    CONFIG = BootstrapDnsConfig(
        names=("a.example", "b.example"), unpublished_names=("u.example/t.example", "v.example")
    )

    async def test_resolves_everything(self) -> None:
        """The TXT record says how many are told of an unpublished name."""
        subject, resolver = bootstrap_dns(), FakeResolver()
        resolver.names = {name: [f"192.0.2.{i}"] for i, name in enumerate("abuv")}
        resolver.names = {f"{name}.example": value for name, value in resolver.names.items()}
        resolver.texts["t.example"] = "30"
        await refresh(subject, self.CONFIG, resolver)
        assert subject.published == {"a.example": ("192.0.2.0",), "b.example": ("192.0.2.1",)}
        assert subject.unpublished == {
            "u.example": Unpublished(("192.0.2.2",), 30),
            "v.example": Unpublished(("192.0.2.3",), 100),
        }

    @pytest.mark.parametrize("text", [None, "", "101", "-1", "50%", "0x10", "٣"])
    async def test_malformed_percentage_is_zero(self, text: str | None) -> None:
        """Absent or not an integer from 0 to 100: nobody."""
        subject, resolver = bootstrap_dns(), FakeResolver()
        resolver.names["u.example"] = ["192.0.2.1"]
        if text is not None:
            resolver.texts["t.example"] = text
        config = BootstrapDnsConfig(unpublished_names=("u.example/t.example",))
        await refresh(subject, config, resolver)
        assert subject.unpublished["u.example"].percent == 0

    async def test_failures_keep_the_last_known_addresses(self) -> None:
        """Only what left the configuration is forgotten."""
        subject, resolver = bootstrap_dns(), FakeResolver()
        resolver.names = {"a.example": ["192.0.2.1"], "b.example": ["192.0.2.2"]}
        config = BootstrapDnsConfig(names=("a.example", "b.example"))
        await refresh(subject, config, resolver)
        resolver.names = {}
        await refresh(subject, BootstrapDnsConfig(names=("b.example",)), resolver)
        assert subject.published == {"b.example": ("192.0.2.2",)}

    async def test_repeats_and_gives_up_after_a_minute(self, autojump_clock: object) -> None:
        """A name server that never answers does not stop the loop."""
        subject, resolver = bootstrap_dns(), FakeResolver()
        resolver.hangs = True
        config = BootstrapDnsConfig(names=("a.example",))
        with trio.move_on_after(2 * REFRESH_SECONDS):
            await refresh_forever(subject, lambda: config, resolver)
        assert len(resolver.asked) == 2

    async def test_new_names_are_resolved_at_once(self, autojump_clock: object) -> None:
        """A reload does not wait for the next turn."""
        subject, resolver = bootstrap_dns(), FakeResolver()
        resolver.names = {"a.example": ["192.0.2.1"], "b.example": ["192.0.2.2"]}
        configs = [BootstrapDnsConfig(names=("a.example",))]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(refresh_forever, subject, lambda: configs[-1], resolver)
            await trio.sleep(REFRESH_SECONDS / 2)
            assert list(subject.published) == ["a.example"]
            configs.append(BootstrapDnsConfig(names=("b.example",)))
            await trio.sleep(2)
            assert list(subject.published) == ["b.example"]
            nursery.cancel_scope.cancel()


@asynccontextmanager
async def name_server() -> AsyncIterator[DnsResolver]:
    """A name server on loopback that knows `a.example` and `t.example`."""
    records = {
        ("a.example.", "A"): "192.0.2.1",
        ("a.example.", "AAAA"): "2001:db8::1",
        ("t.example.", "TXT"): '"42"',
    }

    async def serve(sock: trio.socket.SocketType) -> None:
        while True:
            datagram, source = await sock.recvfrom(2048)
            query = dns.message.from_wire(datagram)
            response = dns.message.make_response(query)
            question = query.question[0]
            kind = dns.rdatatype.to_text(question.rdtype)
            value = records.get((question.name.to_text(), kind))
            if value is not None:
                response.answer.append(dns.rrset.from_text(question.name, 60, "IN", kind, value))
            else:
                response.set_rcode(dns.rcode.NXDOMAIN)
            await sock.sendto(response.to_wire(), source)

    with trio.socket.socket(trio.socket.AF_INET, trio.socket.SOCK_DGRAM) as sock:
        await sock.bind(("127.0.0.1", 0))
        resolver = dns.asyncresolver.Resolver(configure=False)
        resolver.nameservers = ["127.0.0.1"]
        resolver.port = sock.getsockname()[1]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve, sock)
            yield DnsResolver(resolver)
            nursery.cancel_scope.cancel()


class TestDnsResolver:
    async def test_asks_a_name_server(self) -> None:
        """Both families, and TXT records, over real sockets."""
        async with name_server() as resolver:
            assert sorted(await resolver.addresses("a.example")) == ["192.0.2.1", "2001:db8::1"]
            assert await resolver.text("t.example") == "42"

    @pytest.mark.parametrize("name", ["nowhere.example", "a" * 64 + ".example", "..", "a..b"])
    async def test_failures_have_one_type(self, name: str) -> None:
        """Unknown names and impossible ones."""
        async with name_server() as resolver:
            with pytest.raises(ResolveError):
                await resolver.addresses(name)
            with pytest.raises(ResolveError):
                await resolver.text(name)
