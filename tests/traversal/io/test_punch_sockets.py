"""The extra sockets of port searches, on loopback."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import trio

from traversal.io.punch_sockets import MAX_OPEN, FoundPath, PunchSockets, SocketSet
from traversal.io.udp import Batch, UdpSockets

HOST = "127.0.0.1"


@pytest.fixture
async def udp() -> AsyncIterator[UdpSockets]:
    sockets = UdpSockets({4: HOST})
    await sockets.open()
    yield sockets
    sockets.close()


@pytest.fixture
async def pool(udp: UdpSockets, nursery: trio.Nursery) -> PunchSockets:
    sockets = PunchSockets(udp)
    nursery.start_soon(sockets.run)
    return sockets


def ignore(_number: int, _batch: Batch) -> None:
    pass


async def opened(pool: PunchSockets, count: int, handle=ignore) -> SocketSet:
    sockets, done = SocketSet(count), trio.Event()
    pool.open(sockets, done.set, handle)
    with trio.fail_after(5):
        await done.wait()
    return sockets


async def test_datagrams_come_with_the_number_of_their_socket(
    udp: UdpSockets, pool: PunchSockets
) -> None:
    """Each socket has a port of its own, is sent by, and is read."""
    heard: dict[int, list[bytes]] = {}
    news = trio.Event()

    def handle(number: int, batch: Batch) -> None:
        heard.setdefault(number, []).extend(datagram for datagram, _ in batch)
        if len(heard) == 3:
            news.set()

    sockets = await opened(pool, 3, handle)
    assert len(set(sockets.ports)) == 3
    for number, port in enumerate(sockets.ports):
        # From the next one, so that the last hears the first.
        udp.send(b"%d" % number, (HOST, port), sockets.get((number + 1) % 3))
    with trio.fail_after(5):
        await news.wait()
    assert heard == {0: [b"0"], 1: [b"1"], 2: [b"2"]}


async def test_a_socket_may_be_closed_by_what_it_brought(
    udp: UdpSockets, pool: PunchSockets
) -> None:
    """Closing in the middle of handling a datagram, or before the first, ends its task quietly."""
    closed = trio.Event()

    def handle(number: int, batch: Batch) -> None:
        sockets.close(range(2))
        closed.set()

    sockets = await opened(pool, 2, handle)
    udp.send(b"close", (HOST, sockets.ports[0]))
    with trio.fail_after(5):
        await closed.wait()
    await trio.sleep(0.05)
    assert pool.open_count == 0
    assert sockets.get(0) is None
    again = SocketSet(4)
    pool.open(again, lambda: again.keep_only(None), ignore)
    await trio.sleep(0.05)
    assert pool.open_count == 0
    assert len((await opened(pool, 1)).ports) == 1


async def test_the_budget_is_for_all(pool: PunchSockets) -> None:
    """A set waits until the sets before it leave room, and the found socket does not count."""
    first = await opened(pool, MAX_OPEN + 100)
    assert pool.open_count == len(first.ports) == MAX_OPEN
    second, done = SocketSet(16), trio.Event()
    pool.open(second, done.set, ignore)
    await trio.sleep(0.05)
    assert not done.is_set()
    first.keep_only(7)
    with trio.fail_after(5):
        await done.wait()
    assert pool.open_count == 16
    assert first.get(7) is not None
    assert first.get(8) is None
    first.close((7,))
    assert pool.open_count == 16


async def test_a_set_that_ended_is_never_opened(pool: PunchSockets) -> None:
    """An attempt that was given up meanwhile costs nothing."""
    sockets = SocketSet(8)
    pool.open(sockets, lambda: pytest.fail("it was opened"), ignore)
    sockets.keep_only(None)
    await trio.sleep(0.05)
    assert sockets.ports == ()
    assert pool.open_count == 0


async def test_found_path(udp: UdpSockets, pool: PunchSockets) -> None:
    """Only what goes to the found address leaves by the found socket."""
    sockets = await opened(pool, 1)
    found = sockets.get(0)
    assert found is not None
    kind = trio.socket.SOCK_DGRAM
    with trio.socket.socket(type=kind) as peer, trio.socket.socket(type=kind) as other:
        await peer.bind((HOST, 0))
        await other.bind((HOST, 0))
        path = FoundPath(udp, found, peer.getsockname())
        path.send(b"one", peer.getsockname())
        path.send_many([b"two", b"six"], peer.getsockname())
        path.send_unfragmented(b"ten", peer.getsockname())
        path.send(b"one", other.getsockname())
        with trio.fail_after(5):
            seen = [await peer.recvfrom(100) for _ in range(4)]
            _, source = await other.recvfrom(100)
    assert [data for data, _ in seen] == [b"one", b"two", b"six", b"ten"]
    assert {port for _, (_, port) in seen} == {found.port}
    assert source[1] == udp.port(4)
