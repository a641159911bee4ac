"""The NAT: one test class per axis of RFC 4787, and the properties that always hold."""

from __future__ import annotations

import itertools
import random
from ipaddress import IPv6Network, ip_address

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from netlab.drops import Answer, Drop, DropReason
from netlab.model import (
    AtLimit,
    Filtering,
    FilterScope,
    Hairpin,
    Lifetimes,
    Mapping,
    NatBehavior,
    Pooling,
    PortAllocation,
    PortAssignment,
    PortRange,
    Refresh,
    TcpBehavior,
    Translation,
    Unsolicited,
)
from netlab.nat import PrefixTranslator, Protocol, TcpFlag, Translated, Translator
from netlab.timeline import MappingBorn, MappingDied

UDP, TCP, ICMP = Protocol.UDP, Protocol.TCP, Protocol.ICMP


def ip(text: str) -> bytes:
    return ip_address(text).packed


A, B = ip("192.168.7.2"), ip("192.168.7.3")
WAN, WAN2 = ip("2.1.0.11"), ip("2.1.0.12")
S1, S2, S3 = ip("2.0.0.1"), ip("2.0.0.2"), ip("2.0.0.3")


class Bench:
    """A NAT with its clock and events, and short ways to send through it."""

    def __init__(
        self,
        behavior: NatBehavior | None = None,
        pool: tuple[bytes, ...] = (WAN,),
        seed: int = 1,
        inside_hosts: tuple[bytes, ...] = (),
    ) -> None:
        self.events: list[MappingBorn | MappingDied] = []
        self.now = 0.0
        self.nat = Translator(
            behavior or NatBehavior(),
            pool,
            generator=random.Random(seed),
            on_event=self.events.append,
            inside_hosts=inside_hosts,
        )

    def try_out(
        self, to: bytes, to_port: int, port: int = 4000, host: bytes = A, protocol: int = UDP
    ) -> Translated | Drop:
        return self.nat.outbound(protocol, host, port, to, to_port, self.now)

    def out(
        self, to: bytes, to_port: int, port: int = 4000, host: bytes = A, protocol: int = UDP
    ) -> tuple[bytes, int]:
        """Send out; return the external endpoint."""
        verdict = self.try_out(to, to_port, port, host, protocol)
        assert isinstance(verdict, Translated), verdict
        assert not verdict.to_inside
        assert (verdict.destination, verdict.destination_port) == (to, to_port)
        return verdict.source, verdict.source_port

    def back(
        self, source: bytes, source_port: int, external: tuple[bytes, int], protocol: int = UDP
    ) -> Translated | Drop:
        return self.nat.inbound(protocol, source, source_port, *external, self.now)

    def passes(self, source: bytes, source_port: int, external: tuple[bytes, int]) -> bool:
        return isinstance(self.back(source, source_port, external), Translated)


def allocating(assignment: PortAssignment, **options: object) -> PortAllocation:
    return PortAllocation(assignment=assignment, **options)  # type: ignore[arg-type]  # test data


RANDOM_PORTS = allocating(PortAssignment.RANDOM)


class TestMapping:
    @pytest.mark.parametrize(
        ("mapping", "distinct"), [(Mapping.EIM, 1), (Mapping.ADM, 3), (Mapping.APDM, 5)]
    )
    def test_destinations_that_share_a_port(self, mapping: Mapping, distinct: int) -> None:
        """Five destinations on three addresses see 1, 3 or 5 external ports."""
        bench = Bench(NatBehavior(mapping=mapping, ports=RANDOM_PORTS))
        targets = [(S1, 1), (S1, 2), (S2, 1), (S2, 2), (S3, 1)]
        seen = [bench.out(*target) for target in targets]
        assert len(set(seen)) == distinct
        assert [bench.out(*target) for target in targets] == seen
        if mapping is Mapping.ADM:
            assert seen[0] == seen[1] != seen[2] == seen[3]

    def test_inside_sockets_never_share(self) -> None:
        """Two inside hosts with the same inside port get two external ports."""
        bench = Bench()
        assert bench.out(S1, 1, host=A) != bench.out(S2, 1, host=B)

    def test_protocols_have_their_own_ports(self) -> None:
        """UDP, TCP and ICMP each preserve the same number."""
        bench = Bench()
        for protocol in (UDP, TCP, ICMP):
            assert bench.out(S1, 1, protocol=protocol) == (WAN, 4000)


class TestFiltering:
    @pytest.mark.parametrize(
        ("filtering", "passing"),
        [
            (Filtering.EIF, [True, True, True]),
            (Filtering.ADF, [True, True, False]),
            (Filtering.APDF, [True, False, False]),
        ],
    )
    def test_who_may_send_in(self, filtering: Filtering, passing: list[bool]) -> None:
        """After one packet to S1:1, S1:1, S1:2 and S2:1 pass as the axis says."""
        bench = Bench(NatBehavior(filtering=filtering))
        external = bench.out(S1, 1)
        assert [
            bench.passes(S1, 1, external),
            bench.passes(S1, 2, external),
            bench.passes(S2, 1, external),
        ] == passing

    @pytest.mark.parametrize("scope", list(FilterScope))
    def test_scope(self, scope: FilterScope) -> None:
        """With the scope "endpoint" a permission holds for every mapping of the socket."""
        bench = Bench(NatBehavior(mapping=Mapping.APDM, ports=RANDOM_PORTS, filter_scope=scope))
        first = bench.out(S1, 1)
        bench.out(S2, 2)
        assert bench.passes(S2, 2, first) == (scope is FilterScope.ENDPOINT)
        bench.now = 1000.0
        bench.nat.on_time(bench.now)
        first = bench.out(S1, 1)
        assert not bench.passes(S2, 2, first)

    def test_drop_explains_itself(self) -> None:
        """A filtered packet's drop says whom the host had contacted and what time is left."""
        bench = Bench()
        external = bench.out(S1, 3478)
        bench.now = 103.0
        drop = bench.back(S2, 5, external)
        assert isinstance(drop, Drop)
        assert drop.reason is DropReason.FILTERED
        assert drop.text == (
            "filtered, port-dependent; 192.168.7.2:4000 had only contacted 2.0.0.1:3478; "
            "mapping expires in 17 s"
        )

    def test_permissions_age_one_by_one(self) -> None:
        """Keeping a mapping alive towards one peer does not keep another peer's permission."""
        bench = Bench()
        external = bench.out(S1, 1)
        bench.out(S2, 2)
        for _ in range(4):
            bench.now += 50.0
            assert bench.out(S1, 1) == external
        assert bench.passes(S1, 1, external)
        assert not bench.passes(S2, 2, external)


class TestPorts:
    def test_preserve_else_random(self) -> None:
        """The inside port is kept while it is free; the second host gets another one."""
        bench = Bench()
        assert bench.out(S1, 1, host=A) == (WAN, 4000)
        assert bench.out(S1, 1, host=B)[1] != 4000

    def test_preserve_or_nothing(self) -> None:
        """Strict preservation refuses a mapping rather than change the port."""
        bench = Bench(NatBehavior(ports=allocating(PortAssignment.PRESERVE)))
        bench.out(S1, 1, host=A)
        drop = bench.try_out(S1, 1, host=B)
        assert isinstance(drop, Drop)
        assert drop.reason is DropReason.NO_PORT

    @pytest.mark.parametrize("step", [1, 2, -1, 7])
    def test_sequential(self, step: int) -> None:
        """Each new mapping's port is one step from the one before, whoever asks."""
        behavior = NatBehavior(
            mapping=Mapping.APDM, ports=allocating(PortAssignment.SEQUENTIAL, step=step)
        )
        bench = Bench(behavior)
        ports = [bench.out(S1, n, host=A if n % 2 else B)[1] for n in range(1, 20)]
        size = 65535 - 1024 + 1
        steps = {(after - before) % size for before, after in itertools.pairwise(ports)}
        assert steps == {step % size}

    def test_contiguous(self) -> None:
        """The inside port first, then the next free ones above it."""
        behavior = NatBehavior(mapping=Mapping.APDM, ports=allocating(PortAssignment.CONTIGUOUS))
        bench = Bench(behavior)
        assert [bench.out(S1, n)[1] for n in (1, 2, 3)] == [4000, 4001, 4002]

    def test_hash_is_stable_until_reboot(self) -> None:
        """A hashed port comes back after expiry and changes with a reboot."""
        bench = Bench(NatBehavior(ports=allocating(PortAssignment.HASH)))
        before = bench.out(S1, 1)
        bench.now = 1000.0
        assert bench.out(S1, 1) == before
        bench.nat.reboot(bench.now)
        assert bench.out(S1, 1) != before

    def test_blocks(self) -> None:
        """Each subscriber gets its own block; the ninth socket in a block of 8 gets nothing."""
        ports = allocating(PortAssignment.RANDOM, block_size=8, ranges=(PortRange(1024, 1039),))
        bench = Bench(NatBehavior(ports=ports))
        of_a = {bench.out(S1, 1, port=5000 + n, host=A)[1] for n in range(8)}
        of_b = {bench.out(S1, 1, port=5000 + n, host=B)[1] for n in range(8)}
        assert of_a == set(range(1024, 1032))
        assert of_b == set(range(1032, 1040))
        drop = bench.try_out(S1, 1, port=5008)
        assert isinstance(drop, Drop)
        assert drop.reason is DropReason.NO_PORT
        drop = bench.try_out(S1, 1, host=ip("192.168.7.4"))
        assert isinstance(drop, Drop)

    def test_scattered_ranges(self) -> None:
        """A MAP-E style set of ranges is used in full and never left."""
        ranges = (PortRange(2000, 2003), PortRange(3000, 3003))
        bench = Bench(NatBehavior(ports=allocating(PortAssignment.RANDOM, ranges=ranges)))
        used = {bench.out(S1, 1, port=5000 + n)[1] for n in range(8)}
        assert used == {2000, 2001, 2002, 2003, 3000, 3001, 3002, 3003}

    def test_parity(self) -> None:
        """With parity, even stays even and odd stays odd."""
        bench = Bench(NatBehavior(ports=allocating(PortAssignment.RANDOM, parity=True)))
        for port in range(5000, 5050):
            assert (bench.out(S1, 1, port=port)[1] - port) % 2 == 0

    def test_static_port(self) -> None:
        """A preserved port keeps its number under a random assignment."""
        bench = Bench(NatBehavior(ports=allocating(PortAssignment.RANDOM, preserved=(500,))))
        assert bench.out(S1, 500, port=500) == (WAN, 500)

    def test_overloading(self) -> None:
        """Two sockets share a port towards different servers; a collision moves the later one,
        for later destinations too, as measured on Linux."""
        behavior = NatBehavior(
            ports=allocating(PortAssignment.PRESERVE_ELSE_RANDOM, overloading=True)
        )
        bench = Bench(behavior)
        assert bench.out(S1, 1, host=A) == (WAN, 4000)
        assert bench.out(S3, 1, host=B) == (WAN, 4000)
        moved = bench.out(S1, 1, host=B)
        assert moved != (WAN, 4000)
        assert bench.out(S2, 1, host=B) == moved
        assert bench.out(S3, 1, host=B) == (WAN, 4000)
        back_a = bench.back(S1, 1, (WAN, 4000))
        back_b = bench.back(S3, 1, (WAN, 4000))
        assert isinstance(back_a, Translated)
        assert isinstance(back_b, Translated)
        assert (back_a.destination, back_b.destination) == (A, B)


class TestPools:
    HOSTS = tuple(ip(f"192.168.7.{n}") for n in range(10, 20))

    def test_paired(self) -> None:
        """One inside host always shows the same external address; hosts are spread."""
        bench = Bench(NatBehavior(addresses=2), pool=(WAN, WAN2))
        for host in self.HOSTS:
            assert len({bench.out(S1, 1, port=p, host=host)[0] for p in range(5000, 5010)}) == 1
        assert {bench.out(S1, 1, host=host)[0] for host in self.HOSTS} == {WAN, WAN2}

    def test_arbitrary(self) -> None:
        """One inside host shows several external addresses."""
        bench = Bench(NatBehavior(addresses=2, pooling=Pooling.ARBITRARY), pool=(WAN, WAN2))
        assert {bench.out(S1, 1, port=p)[0] for p in range(5000, 5020)} == {WAN, WAN2}


class TestHairpin:
    def hairpin(self, mode: Hairpin) -> tuple[Bench, tuple[bytes, int], Translated | Drop]:
        bench = Bench(NatBehavior(hairpin=mode, ports=RANDOM_PORTS))
        of_a = bench.out(S1, 1, host=A)
        return bench, of_a, bench.try_out(*of_a, port=7000, host=B)

    def test_none(self) -> None:
        """Without hairpin the packet is dropped for that reason."""
        _, _, verdict = self.hairpin(Hairpin.NONE)
        assert isinstance(verdict, Drop)
        assert verdict.reason is DropReason.NO_HAIRPIN

    def test_internal_source(self) -> None:
        """Internal source shows the sender's inside endpoint."""
        _, _, verdict = self.hairpin(Hairpin.INTERNAL)
        assert verdict == (B, 7000, A, 4000, True)

    def test_external_source(self) -> None:
        """External source shows the sender's own mapping, to which the receiver can answer."""
        bench, of_a, verdict = self.hairpin(Hairpin.EXTERNAL)
        assert isinstance(verdict, Translated)
        assert verdict.to_inside
        of_b = (verdict.source, verdict.source_port)
        assert of_b[0] == WAN
        assert (verdict.destination, verdict.destination_port) == (A, 4000)
        answer = bench.try_out(*of_b, port=4000, host=A)
        assert answer == (*of_a, B, 7000, True)


class TestLifetimes:
    def test_expiry(self) -> None:
        """A mapping works up to its lifetime and not beyond; the drop says since when."""
        bench = Bench(NatBehavior(lifetimes=Lifetimes(udp_seconds=30)))
        external = bench.out(S1, 1)
        bench.now = 29.9
        assert bench.passes(S1, 1, external)
        bench.now = 60.0
        drop = bench.back(S1, 1, external)
        assert isinstance(drop, Drop)
        assert drop.reason is DropReason.EXPIRED
        assert "mapping expired 0.1 s ago" in drop.text

    @pytest.mark.parametrize("refresh", list(Refresh))
    @pytest.mark.parametrize("direction", ["outbound", "inbound"])
    def test_refresh(self, refresh: Refresh, direction: str) -> None:
        """Outbound packets always renew, inbound ones only where the axis says so."""
        bench = Bench(NatBehavior(refresh=refresh, lifetimes=Lifetimes(udp_seconds=30)))
        external = bench.out(S1, 1)
        for _ in range(10):
            bench.now += 10.0
            if direction == "outbound":
                bench.out(S1, 1)
            else:
                bench.back(S1, 1, external)
        alive = bench.passes(S1, 1, external)
        assert alive == (direction == "outbound" or refresh is Refresh.BOTH)

    def test_two_stages_like_linux(self) -> None:
        """A quick exchange keeps the short timer; traffic both ways after 2 s the long one."""
        lifetimes = Lifetimes(udp_seconds=120, udp_unreplied_seconds=30)
        quick = Bench(NatBehavior(lifetimes=lifetimes))
        external = quick.out(S1, 1)
        assert quick.passes(S1, 1, external)
        quick.now = 31.0
        assert not quick.passes(S1, 1, external)

        lasting = Bench(NatBehavior(lifetimes=lifetimes))
        external = lasting.out(S1, 1)
        lasting.back(S1, 1, external)
        lasting.now = 3.0
        lasting.out(S1, 1)
        lasting.now = 120.0
        assert lasting.passes(S1, 1, external)

    def test_by_port(self) -> None:
        """A mapping made for a DNS server dies early."""
        bench = Bench(NatBehavior(lifetimes=Lifetimes(udp_by_port=((53, 5.0),))))
        external = bench.out(S1, 53)
        bench.now = 6.0
        assert not bench.passes(S1, 53, external)

    def test_events_are_punctual(self) -> None:
        """`on_time` at `next_deadline` reports each death at the moment of expiry."""
        bench = Bench()
        bench.out(S1, 1)
        bench.now = 100.0
        bench.out(S1, 1)
        while (deadline := bench.nat.next_deadline()) is not None:
            bench.nat.on_time(deadline)
        born, died = bench.events
        assert isinstance(born, MappingBorn)
        assert isinstance(died, MappingDied)
        assert (died.at, died.cause, died.born_at) == (220.0, "expired", 0.0)
        assert bench.nat.mapping_count == 0


class TestLimits:
    def limited(self, at_limit: AtLimit) -> tuple[Bench, list[tuple[bytes, int]]]:
        bench = Bench(NatBehavior(max_mappings_per_host=3, at_limit=at_limit))
        return bench, [bench.out(S1, 1, port=5000 + n) for n in range(3)]

    def test_refuse(self) -> None:
        """The fourth mapping of a host is refused; other hosts do not notice."""
        bench, _ = self.limited(AtLimit.REFUSE)
        drop = bench.try_out(S1, 1, port=5003)
        assert isinstance(drop, Drop)
        assert drop.reason is DropReason.HOST_LIMIT
        bench.out(S1, 1, host=B)

    def test_evict_oldest(self) -> None:
        """The fourth mapping of a host costs it its first."""
        bench, externals = self.limited(AtLimit.EVICT_OLDEST)
        bench.out(S1, 1, port=5003)
        assert [bench.passes(S1, 1, e) for e in externals] == [False, True, True]


class TestUnsolicited:
    @pytest.mark.parametrize(
        ("reaction", "udp", "tcp"),
        [
            (Unsolicited.DROP, Answer.NONE, Answer.NONE),
            (Unsolicited.REJECT, Answer.PORT_UNREACHABLE, Answer.PORT_UNREACHABLE),
            (Unsolicited.RESET, Answer.PORT_UNREACHABLE, Answer.RESET),
        ],
    )
    def test_answers(self, reaction: Unsolicited, udp: Answer, tcp: Answer) -> None:
        """A stranger hears silence, ICMP or RST."""
        bench = Bench(NatBehavior(unsolicited=reaction))
        for protocol, answer in ((UDP, udp), (TCP, tcp)):
            drop = bench.back(S1, 1, (WAN, 4000), protocol)
            assert isinstance(drop, Drop)
            assert (drop.reason, drop.answer) == (DropReason.NO_MAPPING, answer)

    @pytest.mark.parametrize("reaction", list(Unsolicited))
    def test_early_packet(self, reaction: Unsolicited) -> None:
        """An early packet changes the mapping towards its sender only with "accept"."""
        bench = Bench(NatBehavior(unsolicited=reaction))
        assert bench.out(S1, 1) == (WAN, 4000)
        bench.back(S2, 2, (WAN, 4000))
        moved = bench.out(S2, 2)
        assert (moved != (WAN, 4000)) == (reaction is Unsolicited.ACCEPT)
        assert bench.passes(S2, 2, (WAN, 4000)) == (reaction is not Unsolicited.ACCEPT)
        assert bench.out(S1, 1) == (WAN, 4000)


class TestTranslation:
    def test_one_to_one(self) -> None:
        """One-to-one keeps the port, gives each host its address, and is open with EIF."""
        behavior = NatBehavior(translation=Translation.ONE_TO_ONE, filtering=Filtering.EIF)
        bench = Bench(behavior, pool=(WAN, WAN2), inside_hosts=(A, B))
        arrived = bench.back(S1, 1, (WAN2, 80))
        assert isinstance(arrived, Translated)
        assert (arrived.destination, arrived.destination_port) == (B, 80)
        assert bench.out(S1, 1, host=A) == (WAN, 4000)
        assert bench.out(S1, 1, host=B) == (WAN2, 4000)

    def test_stateful_router(self) -> None:
        """Without translation only the filter works."""
        bench = Bench(NatBehavior(translation=Translation.NONE), pool=())
        assert bench.out(S1, 1) == (A, 4000)
        assert bench.passes(S1, 1, (A, 4000))
        assert not bench.passes(S2, 1, (A, 4000))

    def test_translating_needs_an_address(self) -> None:
        """A NAT without an external address is refused."""
        with pytest.raises(ValueError, match="external address"):
            Bench(pool=())


class TestTcp:
    def syn(self, bench: Bench, external: tuple[bytes, int]) -> Translated | Drop:
        return bench.nat.inbound(TCP, S1, 1, *external, bench.now, TcpFlag.SYN)

    @pytest.mark.parametrize("allowed", [True, False])
    def test_simultaneous_open(self, allowed: bool) -> None:
        """An inbound SYN passes an open filter unless the NAT refuses bare SYNs."""
        bench = Bench(NatBehavior(tcp=TcpBehavior(simultaneous_open=allowed)))
        external = bench.out(S1, 1, protocol=TCP)
        assert isinstance(self.syn(bench, external), Translated) == allowed

    def test_established_lives_long(self) -> None:
        """An answered connection outlives the transitory time; a closed one does not."""
        bench = Bench()
        external = bench.out(S1, 1, protocol=TCP)
        bench.nat.inbound(TCP, S1, 1, *external, 0.1, TcpFlag.SYN | TcpFlag.ACK)
        bench.now = 0.2
        bench.nat.outbound(TCP, A, 4000, S1, 1, bench.now, TcpFlag.ACK)
        bench.now = 7000.0
        assert isinstance(bench.back(S1, 1, external, TCP), Translated)
        bench.nat.outbound(TCP, A, 4000, S1, 1, bench.now, TcpFlag.FIN | TcpFlag.ACK)
        bench.now += 241.0
        assert isinstance(bench.back(S1, 1, external, TCP), Drop)

    def test_reset_after_idle(self) -> None:
        """A NAT of that kind answers RST to a segment of a forgotten connection."""
        bench = Bench(NatBehavior(tcp=TcpBehavior(reset_after_idle=True)))
        drop = bench.nat.outbound(TCP, A, 4000, S1, 1, 0.0, TcpFlag.ACK)
        assert isinstance(drop, Drop)
        assert drop.answer is Answer.RESET
        assert isinstance(bench.nat.outbound(TCP, A, 4000, S1, 1, 0.0, TcpFlag.SYN), Translated)


class TestEvents:
    def test_reboot(self) -> None:
        """A reboot closes every hole; a preserving NAT gives the same port again."""
        bench = Bench()
        external = bench.out(S1, 1)
        bench.nat.reboot(1.0)
        assert not bench.passes(S1, 1, external)
        assert bench.out(S1, 1) == external
        assert isinstance(bench.events[1], MappingDied)
        assert bench.events[1].cause == "reboot"

    def test_renumber(self) -> None:
        """After renumbering, mappings are on the new address and the old one is dead."""
        bench = Bench()
        old = bench.out(S1, 1)
        bench.nat.renumber((WAN2,), 1.0)
        assert bench.out(S1, 1) == (WAN2, 4000)
        assert not bench.passes(S1, 1, old)

    def test_icmp_errors_find_their_socket(self) -> None:
        """An error about a translated packet is led back to the inside, and vice versa."""
        bench = Bench(NatBehavior(ports=RANDOM_PORTS))
        external = bench.out(S1, 1)
        assert bench.nat.inside_of(UDP, *external, 0.0) == (A, 4000)
        assert bench.nat.external_of(UDP, A, 4000, (S1, 1), 0.0) == external
        assert bench.nat.inside_of(UDP, WAN, 1, 0.0) is None


class TestPrefixTranslation:
    def test_rfc_6296_example(self) -> None:
        """The adjustment of RFC 6296's example, where 0x0001 becomes 0xd550, that is + 0xd54f."""
        # There the prefixes are /48 and the subnet takes it up; here the identifier's first word.
        npt = PrefixTranslator(IPv6Network("fd01:203:405:1::/64"), IPv6Network("2001:db8:1:1::/64"))
        assert npt.outbound(ip("fd01:203:405:1::1234")) == ip("2001:db8:1:1:d54f::1234")

    @given(st.binary(min_size=8, max_size=8))
    def test_round_trip_and_neutrality(self, identifier: bytes) -> None:
        """Translation is reversible and keeps the one's complement sum."""
        inside, outside = IPv6Network("fd00:aaaa:0:1::/64"), IPv6Network("2a0f:1:1:1::/64")
        npt = PrefixTranslator(inside, outside)
        address = inside.network_address.packed[:8] + identifier
        translated = npt.outbound(address)

        def checksum(data: bytes) -> int:
            return sum(int.from_bytes(data[i : i + 2], "big") for i in range(0, 16, 2)) % 0xFFFF

        assert checksum(translated) == checksum(address)
        back = npt.inbound(translated)
        # 0x0000 and 0xffff are one number in one's complement; RFC 6296 maps to 0x0000.
        assert checksum(back) == checksum(address)
        assert translated.startswith(outside.network_address.packed[:8])
        if b"\xff\xff" != identifier[:2] != b"\0\0":
            assert back == address


behaviors = st.builds(
    NatBehavior,
    mapping=st.sampled_from(Mapping),
    filtering=st.sampled_from(Filtering),
    filter_scope=st.sampled_from(FilterScope),
    refresh=st.sampled_from(Refresh),
    pooling=st.sampled_from(Pooling),
    hairpin=st.sampled_from(Hairpin),
    unsolicited=st.sampled_from(Unsolicited),
    max_mappings_per_host=st.sampled_from([None, 4]),
    at_limit=st.sampled_from(AtLimit),
    ports=st.builds(
        PortAllocation,
        assignment=st.sampled_from(PortAssignment),
        step=st.sampled_from([1, 2, -3]),
        parity=st.booleans(),
        block_size=st.sampled_from([None, 5]),
        # Few ports, so that they run out.
        ranges=st.sampled_from([(PortRange(4000, 4011),), (PortRange(1, 4), PortRange(9, 15))]),
    ),
)
packets = st.lists(
    st.tuples(
        st.sampled_from(["out", "in", "reboot"]) | st.just("out") | st.just("in"),
        st.sampled_from([A, B]),
        st.integers(4000, 4004),
        st.sampled_from([S1, S2]),
        st.integers(1, 2),
        st.sampled_from([0.0, 1.0, 45.0, 130.0]),
    ),
    max_size=60,
)
Step = tuple[str, bytes, int, bytes, int, float]


def run_steps(behavior: NatBehavior, steps: list[Step], check: bool) -> list[object]:
    """Play packets against a NAT; optionally check the invariants after each."""
    bench = Bench(behavior, pool=(WAN, WAN2), seed=7)
    opened: set[tuple[tuple[bytes, int], object]] = set()
    trace: list[object] = []
    for action, host, port, remote, remote_port, pause in steps:
        bench.now += pause
        if action == "reboot":
            bench.nat.reboot(bench.now)
            opened.clear()
            continue
        if action == "out":
            verdict = bench.try_out(remote, remote_port, port, host)
            if isinstance(verdict, Translated):
                opened.add(((host, port), remote))
        else:
            live = bench.nat.external_endpoints(bench.now)
            external = live[port % len(live)][1:] if live else (WAN, port)
            verdict = bench.back(remote, remote_port, external)
            if check and isinstance(verdict, Translated):
                inside = (verdict.destination, verdict.destination_port)
                if behavior.filtering is Filtering.EIF:
                    assert any(opener == inside for opener, _ in opened)
                else:
                    assert (inside, remote) in opened
        trace.append(verdict)
        if check:
            live = bench.nat.external_endpoints(bench.now)
            assert len(live) == len(set(live))
    return trace


@settings(max_examples=150, deadline=None)
@given(behaviors, packets)
def test_properties(behavior: NatBehavior, steps: list[Step]) -> None:
    """No two live mappings share an external endpoint, nothing passes a filter that was not
    opened from inside, and the same seed gives the same verdicts."""
    trace = run_steps(behavior, steps, check=True)
    assert trace == run_steps(behavior, steps, check=False)
