"""TCP sockets on simulated hosts: listening, connecting, streaming."""

from __future__ import annotations

import errno
import operator
import socket as stdlib
import struct
from collections import deque
from collections.abc import Awaitable
from typing import Any, Final

import trio

from netlab.drops import Address
from netlab.nat import Protocol
from netlab.simulated.connection import Connection, State
from netlab.simulated.host import WILDCARD, SimulatedHost, fail
from netlab.simulated.packet import Packet
from netlab.simulated.sockets import SimulatedSocket

NO_LINGER: Final = struct.pack("ii", 1, 0)


class TcpSocket(SimulatedSocket):
    """A stream socket, before, while or after it is connected, or a listening one."""

    def __init__(self, host: SimulatedHost, family: int) -> None:
        super().__init__(host, family, stdlib.SOCK_STREAM)
        self._connection: Connection | None = None
        self._accepted: deque[Connection] = deque()
        self._backlog: int | None = None
        self._holds_port = False
        self._shut_for_reading = False

    def getsockopt(self, level: int, optname: int, buflen: int | None = None) -> Any:
        if (level, optname) == (stdlib.SOL_SOCKET, stdlib.SO_ACCEPTCONN):
            self._check_open()
            return int(self._backlog is not None)
        return super().getsockopt(level, optname, buflen)

    # --- local address -------------------------------------------------------------------

    async def bind(self, address: Any) -> None:
        self._check_open()
        local, port = await self._resolve(address)
        await trio.lowlevel.checkpoint()
        self._check_open()
        self._bind(local, port)

    def _bind(self, address: Address, port: int) -> None:
        if self._local is not None:
            fail(errno.EINVAL)
        self._check_local(address)
        ports = self._host.tcp_ports
        if port == 0:
            port = self._host.free_port(Protocol.TCP)
        elif any(other.accepts_like(self, address) for other in self._host.listeners.get(port, ())):
            fail(errno.EADDRINUSE)
        self._local = (address, port)
        self._holds_port = True
        ports[port] = ports.get(port, 0) + 1

    def _release(self) -> None:
        if self._holds_port:
            assert self._local is not None
            port = self._local[1]
            self._host.tcp_ports[port] -= 1
            if not self._host.tcp_ports[port]:
                del self._host.tcp_ports[port]
        if self._backlog is not None:
            assert self._local is not None
            listeners = self._host.listeners[self._local[1]]
            listeners.remove(self)
            if not listeners:
                del self._host.listeners[self._local[1]]
            for connection in self._accepted:
                connection.abort()
        if self._connection is not None:
            if self._options.get((stdlib.SOL_SOCKET, stdlib.SO_LINGER)) == NO_LINGER:
                self._connection.abort()
            else:
                self._connection.close()

    # --- listening -----------------------------------------------------------------------

    def listen(self, backlog: int = 128) -> None:
        self._check_open()
        if self._connection is not None:
            fail(errno.EINVAL)
        if self._local is None:
            self._bind(WILDCARD[self._size], 0)
        if self._backlog is None:
            assert self._local is not None
            self._host.listeners.setdefault(self._local[1], []).append(self)
        self._backlog = max(1, backlog)

    def accepts(self, address: Address) -> bool:
        """Return whether a SYN to `address` is for this listener."""
        assert self._local is not None
        mine = self._local[0]
        if any(mine):
            return mine == address
        return len(address) == self._size or self._is_dual

    def accepts_like(self, other: TcpSocket, address: Address) -> bool:
        """Return whether another socket may not bind to `address` on this listener's port."""
        assert self._local is not None
        mine = self._local[0]
        if any(mine) and any(address):
            return mine == address
        return len(mine) == len(address) or self._is_dual or other._is_dual

    def receive_syn(self, packet: Packet) -> None:
        """Start a connection; a full backlog ignores the SYN, and the peer tries again."""
        assert self._backlog is not None
        assert packet.segment is not None
        if len(self._accepted) >= self._backlog:
            return
        connection: Connection

        def on_change() -> None:
            if connection.state is State.ESTABLISHED and not self.is_closed:
                connection.on_change = _nothing
                self._accepted.append(connection)
                self._readable.wake()

        connection = Connection(
            self._host, packet.destination_endpoint, packet.source_endpoint, on_change
        )
        connection.accept(packet.segment)

    async def accept(self) -> tuple[TcpSocket, Any]:
        self._check_open()
        if self._backlog is None:
            fail(errno.EINVAL)
        connection = await self._until(self._next_accepted, self._readable)
        child = TcpSocket(self._host, self._family)
        child._options.update(self._options)
        child._adopt(connection)
        return child, child.getpeername()

    def _next_accepted(self) -> Connection:
        if not self._accepted:
            raise BlockingIOError
        return self._accepted.popleft()

    def _adopt(self, connection: Connection) -> None:
        self._connection = connection
        self._local, self._remote = connection.local, connection.remote
        connection.on_change = self._on_change

    def _on_change(self) -> None:
        self._readable.wake()
        self._writable.wake()

    # --- connecting ----------------------------------------------------------------------

    async def connect(self, address: Any) -> None:
        self._check_open()
        if self._connection is not None:
            fail(errno.EISCONN)
        remote = await self._resolve(address)
        await trio.lowlevel.checkpoint()
        self._check_open()
        source = self._host.source_for(remote[0])
        if self._local is None:
            self._bind(WILDCARD[self._size], 0)
        assert self._local is not None
        local = (self._local[0] if any(self._local[0]) else source, self._local[1])
        if (*local, *remote) in self._host.connections:
            fail(errno.EADDRINUSE)
        self._local = local
        connection = Connection(self._host, local, remote, self._on_change)
        self._connection = connection
        self._remote = remote
        connection.connect()
        try:
            while connection.state in (State.SYN_SENT, State.SYN_RECEIVED):
                await self._writable.wait()
                if self.is_closed:
                    raise trio.ClosedResourceError("another task closed this socket")
        except trio.Cancelled:
            # As Trio's own socket: a half-made connection is of no use to anybody.
            self.close()
            raise
        if connection.state is State.CLOSED:
            self._connection = self._remote = None
            fail(connection.error or errno.ECONNABORTED)

    # --- streaming -----------------------------------------------------------------------

    def _stream(self) -> Connection:
        if self._connection is None:
            fail(errno.ENOTCONN)
        return self._connection

    def is_readable(self) -> bool:
        if self._backlog is not None:
            return bool(self._accepted)
        connection = self._connection
        return connection is not None and bool(
            connection.received or connection.peer_finished or connection.state is State.CLOSED
        )

    def _recv_nowait(self, limit: int, flags: int) -> bytes:
        connection = self._stream()
        if self._shut_for_reading:
            return b""
        if connection.received:
            if flags & stdlib.MSG_PEEK:
                return bytes(connection.received[:limit])
            return connection.read(limit)
        if connection.peer_finished:
            return b""
        if connection.state is State.CLOSED:
            self._raise_connection_error(connection)
            return b""
        raise BlockingIOError

    def _raise_connection_error(self, connection: Connection) -> None:
        """Raise the reason of the end once, as the kernel does."""
        error, connection.error = connection.error, 0
        if error:
            fail(error)

    def recv(self, buflen: int, flags: int = 0, /) -> Awaitable[bytes]:
        limit = operator.index(buflen)
        return self._until(lambda: self._recv_nowait(limit, flags), self._readable)

    def recvfrom(self, bufsize: int, flags: int = 0, /) -> Awaitable[tuple[bytes, Any]]:
        return self._until(lambda: (self._recv_nowait(bufsize, flags), None), self._readable)

    def _send_nowait(self, data: bytes) -> int:
        connection = self._stream()
        if connection.state is State.CLOSED:
            self._raise_connection_error(connection)
            fail(errno.EPIPE)
        if self._shut_for_writing:
            fail(errno.EPIPE)
        if not data:
            return 0
        if not connection.room:
            raise BlockingIOError
        return connection.write(data)

    def send(self, data: Any, flags: int = 0, /) -> Awaitable[int]:
        payload = bytes(data)
        return self._until(lambda: self._send_nowait(payload), self._writable)

    async def sendmsg(
        self, buffers: Any, ancdata: Any = (), flags: int = 0, address: Any = None
    ) -> int:
        return await self.send(b"".join(bytes(buffer) for buffer in buffers))

    async def wait_writable(self) -> None:
        await self._until(self._need_room, self._writable)

    def _need_room(self) -> None:
        connection = self._connection
        if connection is not None and connection.state is not State.CLOSED and not connection.room:
            raise BlockingIOError

    def shutdown(self, flag: int) -> None:
        self._check_open()
        connection = self._stream()
        if connection.state is State.CLOSED and flag != stdlib.SHUT_RD:
            fail(errno.ENOTCONN)
        if flag in (stdlib.SHUT_RD, stdlib.SHUT_RDWR):
            self._shut_for_reading = True
            self._readable.wake()
        if flag in (stdlib.SHUT_WR, stdlib.SHUT_RDWR):
            self._shut_for_writing = True
            connection.finish()


def _nothing() -> None:
    """Nobody waits for a connection between handshake and accept."""
