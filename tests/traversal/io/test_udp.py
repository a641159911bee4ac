"""The peers' UDP sockets: batches, offload, rebinding, errors as numbers."""

from __future__ import annotations

import errno
import socket
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest
import trio
import trio.testing

from traversal.io.udp import Batch, Source, UdpError, UdpSocket, UdpSockets, bind_socket

HOSTS: Any = {4: "127.0.0.1"}


class Sink:
    """Collects what a pair of sockets receives."""

    def __init__(self) -> None:
        self.batches: list[Batch] = []

    def handle(self, batch: Batch) -> None:
        self.batches.append(batch)

    @property
    def datagrams(self) -> list[bytes]:
        return [datagram for batch in self.batches for datagram, _ in batch]

    async def until(self, count: int) -> list[bytes]:
        with trio.fail_after(5):
            while len(self.datagrams) < count:  # noqa: ASYNC110
                await trio.sleep(0.002)
        return self.datagrams


@pytest.fixture
async def receiver(nursery: trio.Nursery) -> AsyncIterator[tuple[UdpSockets, Sink]]:
    sockets, sink = UdpSockets(HOSTS), Sink()
    await sockets.open()
    nursery.start_soon(sockets.receive, sink.handle)
    yield sockets, sink
    sockets.close()


async def test_datagrams_keep_their_edges(receiver: tuple[UdpSockets, Sink]) -> None:
    """Whatever offload does, each datagram arrives as it was sent, from where it was sent."""
    sockets, sink = receiver
    sender = UdpSockets(HOSTS)
    await sender.open()
    sent = [b"a" * 100] * 70 + [b"b" * 100, b"c" * 40, b"", b"d" * 1500, b"e" * 9000] + [b"f"] * 3
    assert sender.send_many(sent, ("127.0.0.1", sockets.port(4) or 0)) == 0
    assert await sink.until(len(sent)) == sent
    assert {source for batch in sink.batches for _, source in batch} == {
        ("127.0.0.1", sender.port(4))
    }
    sender.close()


async def test_both_families_share_a_port() -> None:
    """Left to choose, both sockets get the same number where that is free."""
    sockets = UdpSockets({4: "127.0.0.1", 6: "::1"})
    await sockets.open()
    assert sockets.port(4) == sockets.port(6)
    sockets.close()


async def test_rebind_keeps_the_port_if_it_can(receiver: tuple[UdpSockets, Sink]) -> None:
    """The same port if it is free, another if it was taken meanwhile; receiving goes on."""
    sockets, sink = receiver
    port = sockets.port(4)
    await sockets.rebind()
    assert sockets.port(4) == port
    with trio.socket.socket(type=socket.SOCK_DGRAM) as other:
        sockets.close()
        await other.bind(("127.0.0.1", port))
        assert sockets.send(b"x", ("127.0.0.1", 9)) == errno.EAFNOSUPPORT
        await sockets.rebind()
        assert sockets.port(4) != port
        await other.sendto(b"still there", ("127.0.0.1", sockets.port(4)))
        assert await sink.until(1) == [b"still there"]


async def test_taken_port() -> None:
    """A port that was asked for and is taken is an error that names it."""
    with trio.socket.socket(type=socket.SOCK_DGRAM) as other:
        await other.bind(("127.0.0.1", 0))
        port = other.getsockname()[1]
        with pytest.raises(UdpError, match=f"127.0.0.1 port {port}: Address already in use"):
            await UdpSockets(HOSTS).open(port)


async def test_errors_are_numbers() -> None:
    """What can't be sent is told by an errno, never by an exception."""
    sockets = UdpSockets(HOSTS)
    await sockets.open()
    assert sockets.send(b"x", ("::1", 9)) == errno.EAFNOSUPPORT
    assert sockets.send(bytes(65508), ("127.0.0.1", 9)) == errno.EMSGSIZE
    assert sockets.send_unfragmented(bytes(65508), ("127.0.0.1", 9)) == errno.EMSGSIZE
    # From a socket on loopback nothing else can be reached; no packet leaves.
    assert sockets.send(b"x", ("192.0.2.1", 9)) in (errno.EINVAL, errno.ENETUNREACH)
    assert sockets.statistics().send_errors == 3
    sockets.close()


async def test_tasks_that_wait_for_room_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tasks find the send buffer of one socket full at the same time; all send in the
    end."""
    sock, target = [await bind_socket(4, "127.0.0.1", 0) for _ in range(2)]
    send_run = type(sock).send_run
    refusals = 4

    def refuse_some(sock: UdpSocket, run: Sequence[bytes], address: Source) -> None:
        nonlocal refusals
        if refusals:
            refusals -= 1
            raise BlockingIOError
        send_run(sock, run, address)

    monkeypatch.setattr(type(sock), "send_run", refuse_some)
    async with trio.open_nursery() as nursery:
        for data in (b"one", b"two", b"three"):
            nursery.start_soon(sock.send_patiently, [data], ("127.0.0.1", target.port))
    got: set[bytes] = set()
    with trio.fail_after(5):
        while len(got) < 3:
            got |= {data for data, _ in await target.receive()}
    assert got == {b"one", b"two", b"three"}
    sock.close()
    target.close()
