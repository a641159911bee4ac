"""ICE sessions of nodes on loopback: what an application sees, and what it can do wrong."""

from __future__ import annotations

import os
import random
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import cast

import pytest
import trio
import trio.testing

from traversal import (
    IceDescription,
    IceDescriptionError,
    IceError,
    IceSession,
    IceState,
    InterfaceFilter,
    Node,
    NodePrivate,
    RelayMap,
    open_node,
)
from traversal.io.deadlines import Deadlines
from traversal.io.ice import MAX_DATAGRAM_BYTES, IceRouter
from traversal.io.inbox import MAX_WAITING_DATAGRAMS
from traversal.io.udp import Source, UdpSockets
from traversal.paths.candidates import LocalNetworks
from traversal.paths.ice_candidates import make_candidates
from traversal.wire.address import Address
from traversal.wire.ice_description import IceCandidateType
from traversal.wire.introduction import AddressType

STUN_LIKE = bytes.fromhex("000100002112a442") + bytes(12)
SILENT = IceDescription("none", "p" * 22)


@asynccontextmanager
async def loopback_node() -> AsyncIterator[Node]:
    key = NodePrivate.generate(os.urandom)
    async with open_node(
        key,
        RelayMap({}),
        hosts={4: "127.0.0.1"},
        interfaces=InterfaceFilter(allowed_names=("lo",)),
        map_ports=False,
    ) as node:
        yield node


@asynccontextmanager
async def connected() -> AsyncIterator[tuple[IceSession, IceSession]]:
    with trio.fail_after(10):
        async with (
            loopback_node() as first,
            loopback_node() as second,
            first.open_ice(is_controlling=True) as a,
            second.open_ice(is_controlling=False) as b,
        ):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(a.connect, b.local_description)
                nursery.start_soon(b.connect, a.local_description.encode())
            yield a, b


async def test_datagrams_in_order() -> None:
    """What one end sends, the other receives; counters count."""
    async with connected() as (a, b):
        for number in range(100):
            await a.send(b"%d" % number)
        assert [await b.receive() for _ in range(100)] == [b"%d" % n for n in range(100)]
        assert a.statistics().sent == b.statistics().received == 100
        assert a.state is IceState.CONNECTED


async def test_candidates_that_come_later() -> None:
    """Trickle ICE: descriptions without candidates, then the candidates."""
    with trio.fail_after(10):
        async with (
            loopback_node() as first,
            loopback_node() as second,
            first.open_ice(is_controlling=True) as a,
            second.open_ice(is_controlling=False) as b,
            trio.open_nursery() as nursery,
        ):
            for ours, theirs in ((a, b), (b, a)):
                described = theirs.local_description
                bare = IceDescription(described.ufrag, described.password)
                nursery.start_soon(ours.connect, bare)
            await trio.testing.wait_all_tasks_blocked(0.01)
            assert a.state is IceState.CHECKING
            a.add_remote_candidate(b.local_description.candidates[0])


async def test_a_slow_reader_loses_the_oldest() -> None:
    """What waits for an application is bounded."""
    async with connected() as (a, b):
        for number in range(MAX_WAITING_DATAGRAMS + 10):
            b.deliver(b"%d" % number)
        assert await b.receive() == b"10"
        assert b.statistics().dropped_for_slow_reader == 10
        assert a.statistics().dropped_for_slow_reader == 0


async def test_closing_wakes_who_waits() -> None:
    """A reader learns that the session is closed; so does who sends afterwards."""
    async with connected() as (a, _), trio.open_nursery() as nursery:

        async def read() -> None:
            with pytest.raises(IceError, match="closed"):
                await a.receive()

        nursery.start_soon(read)
        await trio.testing.wait_all_tasks_blocked()
        a.close()
        a.close()
        with pytest.raises(IceError, match="closed"):
            await a.send(b"late")


async def test_a_closing_node_ends_its_sessions() -> None:
    """No session outlives its node, and nothing of it stays behind."""
    async with loopback_node() as node:
        session = node.open_ice(is_controlling=True)
    assert session.state is IceState.CLOSED


async def test_wrong_order_of_calls() -> None:
    """Each mistake is answered by what to do."""
    async with loopback_node() as node, node.open_ice(is_controlling=True) as ice:
        with pytest.raises(IceError, match=r"call connect\(\)"):
            await ice.send(b"early")
        with pytest.raises(IceDescriptionError, match="ice-ufrag"):
            await ice.connect("hello")
        with trio.move_on_after(0.05):
            await ice.connect(SILENT)
        with pytest.raises(IceError, match=r"connect\(\) to return"):
            await ice.send(b"early")
        with pytest.raises(IceError, match="open a new one"):
            await ice.connect(SILENT)
        with pytest.raises(IceDescriptionError, match="candidate"):
            ice.add_remote_candidate("nonsense")


async def test_datagrams_that_cannot_be_sent() -> None:
    """Too long, or what the peer would take for a control message."""
    async with connected() as (a, _):
        with pytest.raises(IceError, match="at most"):
            await a.send(bytes(MAX_DATAGRAM_BYTES + 1))
        with pytest.raises(IceError, match="header of your own"):
            await a.send(STUN_LIKE)


class Wire:
    """Stands in for the sockets: keeps what is sent."""

    def __init__(self) -> None:
        self.sent: list[tuple[bytes, Source]] = []

    def send(self, data: bytes, address: Source) -> int:
        self.sent.append((data, address))
        return 0


async def test_mutants_at_the_router(autojump_clock: trio.testing.MockClock) -> None:
    """Mutants of honest messages keep no session from connecting, and closing leaves nothing."""
    rng = random.Random(1)
    wires = (Wire(), Wire())
    routers = [IceRouter(cast(UdpSockets, w), Deadlines(), rng.randbytes) for w in wires]
    places = [("192.0.2.1", 1), ("192.0.2.2", 2)]
    a, b = (
        router.open(
            make_candidates((), (Address(*place),)), LocalNetworks(), is_controlling=bool(number)
        )
        for number, (router, place) in enumerate(zip(routers, places, strict=True))
    )
    async with trio.open_nursery() as nursery:
        nursery.start_soon(a.connect, b.local_description)
        nursery.start_soon(b.connect, a.local_description)
        await trio.testing.wait_all_tasks_blocked()
        for session in (a, b):
            session.on_time(trio.current_time())
        honest = [data for wire in wires for data, _ in wire.sent]
        assert honest
        for _ in range(3000):
            mutant = bytearray(rng.choice(honest))
            for _ in range(rng.randrange(3)):
                mutant[rng.randrange(len(mutant))] = rng.randrange(256)
            cut = bytes(mutant[: rng.choice((len(mutant), rng.randrange(len(mutant))))])
            for router, place in zip(routers, reversed(places), strict=True):
                router.handle_datagram(cut, place)
        while {a.state, b.state} != {IceState.CONNECTED}:
            for number in (0, 1):
                sent, wires[number].sent = wires[number].sent, []
                for data, _ in sent:
                    routers[1 - number].handle_datagram(data, places[number])
            await trio.sleep(0.01)
            for session in (a, b):
                session.on_time(trio.current_time())
    for router in routers:
        router.close()
        assert not router.by_ufrag
        assert not router.by_transaction
        assert not router.by_address


def test_candidates_of_a_node() -> None:
    """Interfaces give host candidates, all else server-reflexive ones; IPv6 goes first."""
    local = (Address("10.0.0.1", 5), Address("2001:db8::1", 5), Address("192.0.2.1", 5))
    own = (
        (AddressType.STUN, Address("192.0.2.1", 5)),
        (AddressType.STUN, Address("203.0.113.1", 7)),
        (AddressType.LOCAL, local[0]),
        (AddressType.LOCAL, local[1]),
    )
    made = make_candidates(own, local)
    assert [(c.type, c.address) for c in sorted(made, key=lambda c: -c.priority)] == [
        (IceCandidateType.HOST, local[1]),
        (IceCandidateType.HOST, local[2]),
        (IceCandidateType.HOST, local[0]),
        (IceCandidateType.SERVER_REFLEXIVE, Address("203.0.113.1", 7)),
    ]
    assert made[2].related == local[0]


def test_the_example_in_the_docs(capsys: pytest.CaptureFixture[str]) -> None:
    """What docs/ice.md shows runs as it stands."""
    page = Path(__file__).parents[3] / "docs" / "ice.md"
    example = re.search(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    assert example is not None
    exec(compile(example[1], str(page), "exec"), {})
    assert capsys.readouterr().out.startswith("b'hello' from 127.0.0.1:")
