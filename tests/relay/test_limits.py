"""Limits: what a bucket lets through, what is counted per source."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.limits import (
    AcceptLimiter,
    AcceptStatistics,
    ConnectionCounter,
    TokenBucket,
)
from traversal.wire.address import source_of


class TestTokenBucket:
    def test_starts_full_and_refills_continuously(self) -> None:
        """DERP specification 9."""
        bucket = TokenBucket(rate=100, burst=50, now=10)
        assert bucket.level(10) == 50
        assert bucket.take(10, 50)
        assert bucket.level(10.25) == 25
        assert bucket.level(99) == 50

    def test_debt_delays_and_is_paid_exactly(self) -> None:
        """A charge over the level passes; the next one waits until the debt is paid."""
        bucket = TokenBucket(rate=100, burst=50, now=0)
        assert not bucket.take(0, 80)
        assert bucket.ready_at(0) == pytest.approx(0.3)
        assert bucket.ready_at(0.3) == pytest.approx(0.3)

    def test_try_take_leaves_the_level_alone_when_it_fails(self) -> None:
        """Refused amounts are not owed."""
        bucket = TokenBucket(rate=1, burst=3, now=0)
        assert bucket.try_take(0, 3)
        assert not bucket.try_take(0.5, 1)
        assert bucket.try_take(1, 1)

    def test_a_clock_that_steps_back_refills_nothing(self) -> None:
        """Neither now nor when the time passes again."""
        bucket = TokenBucket(rate=1, burst=10, now=100)
        bucket.take(100, 10)
        assert bucket.level(50) == 0
        assert bucket.level(101) == 1

    @given(
        rate=st.floats(1, 1e9),
        burst=st.floats(1, 1e9),
        charges=st.lists(st.tuples(st.floats(0, 100), st.floats(0, 1e6)), max_size=50),
    )
    def test_a_waiting_sender_never_exceeds_its_rate(
        self, rate: float, burst: float, charges: list[tuple[float, float]]
    ) -> None:
        """Whatever is sent up to a moment is at most burst + rate x time + the last charge."""
        bucket = TokenBucket(rate, burst, 0)
        now = sent = 0.0
        for pause, amount in charges:
            now = bucket.ready_at(now + pause)
            assert sent <= (burst + rate * now) * (1 + 1e-9) + 1e-3
            bucket.take(now, amount)
            sent += amount

    @pytest.mark.parametrize(("rate", "burst"), [(0, 1), (1, 0), (-1, 1)])
    def test_nonsense_is_refused(self, rate: float, burst: float) -> None:
        """No limit is the absence of a bucket."""
        with pytest.raises(ValueError, match="above zero"):
            TokenBucket(rate, burst, 0)


class TestAcceptLimiter:
    def test_sheds_over_the_burst_and_recovers(self) -> None:
        """Rejected connections are counted, and serving goes on."""
        limiter = AcceptLimiter(rate_per_second=2, burst=3, now=0)
        assert [limiter.admit(0) for _ in range(5)] == [True, True, True, False, False]
        assert limiter.admit(0.5)
        assert limiter.statistics() == AcceptStatistics(accepted=4, rejected=2)

    def test_without_a_rate_everything_passes(self) -> None:
        """And a limit may come later."""
        limiter = AcceptLimiter(None, 1, 0)
        assert all(limiter.admit(0) for _ in range(1000))
        limiter.configure(1, 1, 0)
        assert [limiter.admit(0), limiter.admit(0)] == [True, False]


class TestConnectionCounter:
    def test_each_source_has_its_share(self) -> None:
        """The refusal says who, how many, and which setting to change."""
        counter = ConnectionCounter(limit=3, limit_per_source=1)
        assert counter.refusal("192.0.2.1") is None
        refusal = counter.refusal("192.0.2.1")
        assert refusal == "192.0.2.1 has 1 connections and limits.connections_per_ip is 1"
        assert counter.refusal("192.0.2.2") is None

    def test_all_together_are_bounded(self) -> None:
        """Also when every source is below its share."""
        counter = ConnectionCounter(limit=1, limit_per_source=None)
        assert counter.refusal("192.0.2.1") is None
        refusal = counter.refusal("192.0.2.2")
        assert refusal is not None
        assert "limits.connections is 1" in refusal

    def test_one_ipv6_network_is_one_source(self) -> None:
        """A /64 is as cheap as an address."""
        counter = ConnectionCounter(limit=9, limit_per_source=1)
        assert counter.refusal("2001:db8:0:1::1") is None
        assert counter.refusal("2001:db8:0:1:ffff::2") is not None
        assert counter.refusal("2001:db8:0:2::1") is None

    @given(st.lists(st.sampled_from(["192.0.2.1", "::ffff:192.0.2.1", "2001:db8::1", "?"])))
    def test_nothing_is_remembered_of_those_who_left(self, hosts: list[str]) -> None:
        """Memory is bounded by open connections."""
        counter = ConnectionCounter(limit=5, limit_per_source=2)
        counted = [host for host in hosts if counter.refusal(host) is None]
        assert counter.total == len(counted)
        for host in counted:
            counter.remove(host)
        assert (counter.total, counter.sources()) == (0, 0)

    def test_a_mapped_address_is_its_ipv4_address(self) -> None:
        """A dual-stack listener must not double anyone's share."""
        assert source_of("::ffff:192.0.2.1") == source_of("192.0.2.1") == "192.0.2.1"
