"""Edge addresses, waiting times and the choice of transport, on a virtual clock."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from traversal.tunnel.addresses import (
    FAMILY_SUSPICION_SECONDS,
    SUSPICION_SECONDS,
    AddressBook,
    split_static,
)
from traversal.tunnel.backoff import Backoff
from traversal.tunnel.transport_choice import (
    PROBE_CAP_SECONDS,
    STEADY_SECONDS,
    Transport,
    TransportChoice,
)
from traversal.wire.address import Address


def addresses(region: int, count: int) -> list[Address]:
    return [Address(f"198.18.{region}.{number + 1}", 7844) for number in range(count)]


def book(*counts: int, seed: int = 1) -> AddressBook:
    regions = [addresses(region, count) for region, count in enumerate(counts)]
    return AddressBook(regions, random.Random(seed).random)


def region_of(address: Address) -> str:
    return address.host.split(".")[2]


@settings(deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 8), st.integers(0, 1000))
def test_connections_spread(first: int, second: int, connections: int, seed: int) -> None:
    """Regions differ by one connection at most, and nobody shares an address without need."""
    some = book(first, second, seed=seed)
    given_out = [some.address(index, 0.0) for index in range(connections)]
    regions = Counter(map(region_of, given_out))
    assert abs(regions["0"] - regions["1"]) <= 1
    for region, count in (("0", first), ("1", second)):
        users = Counter(address for address in given_out if region_of(address) == region)
        assert all(n <= -(-regions[region] // count) for n in users.values())
    assert some.crowded(0.0) is None


@settings(deadline=None)
@given(st.data())
def test_book_always_answers(data: st.DataObject) -> None:
    """Whatever fails whenever, every connection has an address that exists, and moving the crowded
    ones comes to an end."""
    some = book(data.draw(st.integers(1, 4)), data.draw(st.integers(0, 4)), seed=3)
    now = 0.0
    for _ in range(data.draw(st.integers(0, 40))):
        now += data.draw(st.floats(0, 30))
        index = data.draw(st.integers(0, 3))
        assert some.address(index, now) in some.addresses
        match data.draw(st.sampled_from(["rotate", "unroutable", "works", "replace"])):
            case "rotate":
                some.rotate(index, now)
            case "unroutable":
                some.rotate(index, now, is_unroutable=True)
            case "works":
                some.note_success(index)
            case "replace":
                some.replace([addresses(0, data.draw(st.integers(1, 4))), addresses(1, 2)])
    for _ in range(20):
        move = some.crowded(now)
        if move is None:
            break
        some.take(*move)
    assert some.crowded(now) is None


def test_failed_address_is_avoided_and_comes_back() -> None:
    """A connection whose address failed takes another and keeps it; the failed one is proposed for
    a move at once, and given out again after a while."""
    some = book(1, 1)
    first = some.address(0, 0.0)
    some.rotate(0, 1.0)
    second = some.address(0, 1.0)
    assert second != first
    assert some.address(0, 2.0) == second
    assert some.address(1, 2.0) == second
    assert some.crowded(2.0) == (1, first)
    some.take(1, first)
    some.note_success(1)
    assert some.crowded(3.0) is None
    assert some.address(2, 4 + SUSPICION_SECONDS) in (first, second)


def test_single_address_is_given_again() -> None:
    """With one address there is no error and no other to go to."""
    some = book(1)
    only = some.address(0, 0.0)
    some.rotate(0, 0.0)
    assert some.address(0, 0.0) == only
    assert some.address(1, 0.0) == only


def test_all_failed_goes_round() -> None:
    """When every address fails, each is tried in turn."""
    some = book(3)
    tried = []
    for now in range(6):
        tried.append(some.address(0, float(now)))
        some.rotate(0, float(now))
    assert set(tried[:3]) == set(some.addresses)
    assert tried[3:] == tried[:3]


def test_family_without_route_is_left() -> None:
    """One IPv6 address without a route spares the other nine an attempt, for ten minutes."""
    v6 = [Address(f"2001:db8::{number}", 7844) for number in range(1, 11)]
    v4 = addresses(0, 2)
    books = (AddressBook([v6, v4], random.Random(seed).random) for seed in range(100))
    some = next(book for book in books if book.address(0, 0.0).is_ipv6)
    some.rotate(0, 0.0, is_unroutable=True)
    assert not some.address(0, 1.0).is_ipv6
    assert not some.address(1, 1.0).is_ipv6
    assert some.crowded(2.0) is None
    some.rotate(0, FAMILY_SUSPICION_SECONDS - 1)
    some.rotate(1, FAMILY_SUSPICION_SECONDS - 1)
    assert some.address(0, FAMILY_SUSPICION_SECONDS + 1).is_ipv6


def test_static_addresses_alternate() -> None:
    """The first listed is in one region, the second in the other."""
    listed = addresses(0, 5)
    assert split_static(listed) == ([listed[0], listed[2], listed[4]], [listed[1], listed[3]])


@settings(deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 2000))
def test_backoff_grows_within_bounds(seed: int, failures: int) -> None:
    """Waits stay between half a second and the cap, whatever was drawn, and shrink on success."""
    backoff = Backoff(random.Random(seed).random, base_seconds=1.0, cap_seconds=30.0)
    waits = [backoff.next_wait() for _ in range(failures)]
    assert all(0.5 <= wait <= 30.0 for wait in waits)
    assert all(wait >= 15.0 for wait in waits[5:])
    backoff.reset()
    assert backoff.next_wait() <= 1.0


def test_quic_is_preferred_until_it_fails() -> None:
    """QUIC first; HTTP/2 first where QUIC was beaten; QUIC again within half a minute."""
    choice = TransportChoice((Transport.QUIC, Transport.HTTP2), random.Random(1).random)
    assert choice.order == (Transport.QUIC, Transport.HTTP2)
    choice.note_registered(Transport.HTTP2, 10.0, quic_was_tried=True)
    assert choice.order == (Transport.HTTP2, Transport.QUIC)
    now, probes = 10.0, 0
    while now < 600:
        if choice.should_move_to_quic(now):
            probes += 1
            choice.note_probe_failed(now)
        now += 0.1
    assert 600 / PROBE_CAP_SECONDS <= probes <= 2 * 600 / PROBE_CAP_SECONDS + 2
    healed = now
    while not choice.should_move_to_quic(now):
        now += 0.1
    assert now - healed <= PROBE_CAP_SECONDS
    choice.note_registered(Transport.QUIC, now, quic_was_tried=True)
    assert choice.order == (Transport.QUIC, Transport.HTTP2)
    assert choice.should_move_to_quic(now)


def test_flapping_quic_is_left() -> None:
    """A QUIC connection that dies young counts against QUIC, one that lived does not."""
    choice = TransportChoice((Transport.QUIC, Transport.HTTP2), random.Random(1).random)
    choice.note_registered(Transport.QUIC, 0.0, quic_was_tried=True)
    choice.note_lost(Transport.QUIC, STEADY_SECONDS, 40.0)
    assert not choice.is_quic_blocked
    choice.note_lost(Transport.QUIC, 1.0, 50.0)
    assert choice.is_quic_blocked
    assert not choice.should_move_to_quic(51.0)


@pytest.mark.parametrize("only", list(Transport))
def test_only_one_transport(only: Transport) -> None:
    """Where one is allowed nothing else is tried."""
    choice = TransportChoice((only,), random.Random(1).random)
    choice.note_lost(only, 0.1, 1.0)
    assert choice.order == (only,)
    assert not choice.should_move_to_quic(1000.0)
