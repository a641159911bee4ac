"""Listening sockets and accept loops."""

from __future__ import annotations

import errno
import socket
from contextlib import ExitStack

import pytest
import trio
import trio.testing

from relay.config import ListenAddress
from relay.listeners import ListenError, accept_loop, open_listeners, take_waiting


def test_accepted_sockets_inherit_the_options() -> None:
    """TCP_NODELAY, keepalive and the user time-out (DERP specification 3.1)."""
    (listener,) = open_listeners(ListenAddress("127.0.0.1", 0))
    with listener, socket.create_connection(listener.getsockname()):
        accepted, _ = listener.accept()
        with accepted:
            tcp = socket.IPPROTO_TCP
            assert accepted.getsockopt(tcp, socket.TCP_NODELAY) == 1
            assert accepted.getsockopt(tcp, socket.TCP_USER_TIMEOUT) == 15_000
            assert accepted.getsockopt(tcp, socket.TCP_KEEPIDLE) == 600
            assert accepted.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1


def test_without_a_host_both_families_share_a_port() -> None:
    """Or IPv4 alone where the machine has no IPv6."""
    listeners = open_listeners(ListenAddress("", 0))
    assert listeners[0].family == socket.AF_INET
    assert len({listener.getsockname()[1] for listener in listeners}) == 1
    for listener in listeners:
        listener.close()


def test_a_port_in_use_is_named() -> None:
    """The error says which address, and why."""
    (listener,) = open_listeners(ListenAddress("127.0.0.1", 0))
    port = listener.getsockname()[1]
    with listener, pytest.raises(ListenError, match=f"127.0.0.1 port {port}.*another program"):
        open_listeners(ListenAddress("127.0.0.1", port))


class Flaky:
    """A listener whose `accept` fails first, then gives a connection, then waits."""

    def __init__(self, errors: list[int]) -> None:
        self.errors = errors

    async def accept(self) -> tuple[str, None]:
        await trio.lowlevel.checkpoint()
        if self.errors:
            raise OSError(self.errors.pop(0), "test")
        self.errors = [errno.EBADF]
        return "connection", None


async def test_accept_survives_what_concerns_one_connection_and_full_tables(
    autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It pauses where there are no descriptors; it ends where the listener itself is broken."""
    errors = [errno.ECONNABORTED, errno.EPROTO, errno.EMFILE, errno.ENFILE, errno.EPERM]
    monkeypatch.setattr(trio.socket, "from_stdlib_socket", lambda sock: sock)
    accepted = []

    async def handle(connection: object) -> None:
        accepted.append(connection)

    flaky: object = Flaky(errors)
    with trio.fail_after(1), pytest.RaisesGroup(OSError):
        await accept_loop(flaky, handle)  # type: ignore[arg-type]
    assert accepted == ["connection"]
    assert trio.current_time() == pytest.approx(0.2)


async def test_a_mistake_ends_one_connection_only(
    caplog: pytest.LogCaptureFixture, autojump_clock: trio.testing.MockClock
) -> None:
    """An error that nobody foresaw is logged, once for many of them, and the loop goes on."""
    (listener,) = open_listeners(ListenAddress("127.0.0.1", 0))
    served = trio.Event()
    connections = 0

    async def handle(connection: trio.socket.SocketType) -> None:
        nonlocal connections
        connections += 1
        connection.close()
        if connections < 4:
            raise RuntimeError("a mistake")
        served.set()

    with listener:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(accept_loop, listener, handle)
            for _ in range(4):
                with trio.socket.socket() as visitor:
                    await visitor.connect(listener.getsockname())
            await served.wait()
            nursery.cancel_scope.cancel()
    assert [record.exc_info is not None for record in caplog.records] == [True]


async def test_waiting_connections_are_taken() -> None:
    """What the kernel has accepted before a listener is closed is served and not reset."""
    (listener,) = open_listeners(ListenAddress("127.0.0.1", 0))
    with listener, ExitStack() as stack:
        place = listener.getsockname()
        clients = [stack.enter_context(socket.create_connection(place)) for _ in range(3)]
        taken = list(take_waiting(listener))
        assert [sock.getpeername() for sock in taken] == [c.getsockname() for c in clients]
        for sock in taken:
            sock.close()
        assert list(take_waiting(listener)) == []
