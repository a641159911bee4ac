"""What visitors may take, and what one tunnel or source may take of it."""

from __future__ import annotations

from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.edge.limits import Meter, RequestLimits, TooMuchError, charge
from relay.edge.retries import KEPT_BODY_BYTES, MAX_ATTEMPTS, ReplayableBody, may_retry

A, B = UUID(int=1), UUID(int=2)
LIMITS = RequestLimits(requests=10, requests_per_tunnel=6, requests_per_source=4)


def test_each_bound_is_one_of_its_own() -> None:
    """A source, a tunnel and all together: what is above is refused, what leaves makes room."""
    meter = Meter(LIMITS)
    entered = [meter.enter(A, "192.0.2.1", 0) for _ in range(4)]
    with pytest.raises(TooMuchError) as by_source:
        meter.enter(B, "192.0.2.1", 0)
    assert by_source.value.status == 429
    entered += [meter.enter(A, "192.0.2.2", 0) for _ in range(2)]
    with pytest.raises(TooMuchError) as by_tunnel:
        meter.enter(A, "192.0.2.3", 0)
    assert by_tunnel.value.status == 503
    for number in range(4):
        meter.enter(B, f"192.0.2.1{number}", 0)
    with pytest.raises(TooMuchError):
        meter.enter(B, "192.0.2.99", 0)
    meter.leave(entered[0], "192.0.2.1")
    assert meter.enter(A, "192.0.2.1", 0).active == 6


def test_an_ipv6_network_is_one_source() -> None:
    """Whoever has a /64 has no more than whoever has one address."""
    meter = Meter(LIMITS)
    for number in range(4):
        meter.enter(A, f"2001:db8::{number}", 0)
    with pytest.raises(TooMuchError):
        meter.enter(A, "2001:db8::ffff", 0)


def test_requests_per_second_are_per_tunnel() -> None:
    """One tunnel above its rate leaves the other alone, and may go on a second later."""
    meter = Meter(RequestLimits(tunnel_requests_per_second=1))
    for _ in range(2):
        meter.leave(meter.enter(A, "192.0.2.1", 0), "192.0.2.1")
    with pytest.raises(TooMuchError) as caught:
        meter.enter(A, "192.0.2.1", 0)
    assert caught.value.status == 429
    meter.enter(B, "192.0.2.1", 0)
    meter.enter(A, "192.0.2.1", 1)
    assert meter.tunnels[A].refused == 1


def test_bytes_are_delayed_to_the_rate() -> None:
    """Whatever the sizes, the sum of all waits makes the rate."""
    meter = Meter(RequestLimits(tunnel_bytes_per_second=1000))
    traffic = meter.enter(A, "192.0.2.1", 0)
    now = 0.0
    for _ in range(100):
        now += charge(traffic, 100, now, inward=True)
    assert now == pytest.approx(8)  # two seconds' worth was in the bucket
    assert (traffic.bytes_in, traffic.bytes_out) == (10_000, 0)
    assert charge(Meter(RequestLimits()).enter(A, "x", 0), 1 << 40, 0, inward=False) == 0


@given(st.lists(st.tuples(st.booleans(), st.sampled_from([A, B]), st.integers(0, 5))))
def test_the_counts_are_those_of_the_requests_under_way(
    steps: list[tuple[bool, UUID, int]],
) -> None:
    """After any sequence no bound is exceeded, and when all have left nothing remains."""
    meter = Meter(LIMITS)
    under_way = []
    for enters, tunnel, number in steps:
        source = f"192.0.2.{number}"
        if enters:
            try:
                under_way.append((meter.enter(tunnel, source, 0), source))
            except TooMuchError:
                pass
        elif under_way:
            meter.leave(*under_way.pop())
        assert meter.active == len(under_way) <= 10
        assert all(traffic.active <= 6 for traffic in meter.tunnels.values())
    for entry in under_way:
        meter.leave(*entry)
    assert meter.active == 0
    assert not meter._sources


@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT", "DELETE", "OPTIONS"])
def test_idempotent_requests_are_repeated(method: str) -> None:
    """While nothing of a response was seen, and the body is there."""
    more = {"is_unprocessed": False, "has_whole_body": True, "is_websocket": False}
    assert may_retry(method, attempts=1, **more)
    assert not may_retry(method, attempts=MAX_ATTEMPTS, **more)
    assert not may_retry(method, attempts=1, **{**more, "has_whole_body": False})
    assert not may_retry(method, attempts=1, **{**more, "is_websocket": True})


@pytest.mark.parametrize("method", ["POST", "PATCH", "PROPFIND"])
def test_others_only_when_nobody_has_looked_at_them(method: str) -> None:
    """A POST that may have been carried out is not carried out twice."""
    more = {"attempts": 1, "has_whole_body": True, "is_websocket": False}
    assert not may_retry(method, is_unprocessed=False, **more)  # type: ignore[arg-type]
    assert may_retry(method, is_unprocessed=True, **more)  # type: ignore[arg-type]


async def read_all(body: ReplayableBody) -> bytes:
    data = b""
    while chunk := await body.receive():
        data += chunk
    return data


@given(st.lists(st.binary(min_size=1, max_size=9)), st.integers(0, 5))
async def test_a_small_body_can_be_read_again(chunks: list[bytes], read_before: int) -> None:
    """From the start, however much of it was read before."""
    source = iter([*chunks, b"", b"", b""])

    async def receive() -> bytes:
        return next(source)

    body = ReplayableBody(receive)
    for _ in range(min(read_before, len(chunks))):
        await body.receive()
    body.rewind()
    assert await read_all(body) == b"".join(chunks)
    assert body.is_whole
    body.rewind()
    assert await read_all(body) == b"".join(chunks)


async def test_a_large_body_is_not_kept() -> None:
    """Beyond the bound it is passed on only, and cannot be read again."""
    source = iter([bytes(KEPT_BODY_BYTES), b"x", b"y", b""])

    async def receive() -> bytes:
        return next(source)

    body = ReplayableBody(receive)
    await body.receive()
    assert body.is_whole
    assert await read_all(body) == b"xy"
    assert not body.is_whole
