"""UDP sockets on simulated hosts."""

from __future__ import annotations

import errno
import socket as stdlib
from collections import deque
from collections.abc import Awaitable
from typing import Any

import trio

from netlab.drops import Answer, Endpoint
from netlab.nat import Protocol
from netlab.simulated.host import WILDCARD, SimulatedHost, fail
from netlab.simulated.packet import UDP_HEADER_BYTES, Packet
from netlab.simulated.sockets import DEFAULT_BUFFER_BYTES, SimulatedSocket

# From the Linux headers; Python's socket module has no names for these.
_IP_MTU_DISCOVER, _IPV6_MTU_DISCOVER = 10, 23
_PMTUDISC_DONT, _PMTUDISC_WANT, _PMTUDISC_DO, _PMTUDISC_PROBE, _PMTUDISC_OMIT = 0, 1, 2, 3, 5
_SOL_UDP, _UDP_SEGMENT = 17, 103

# Linux accounts for some overhead of each queued datagram; 1300-byte ones take 2304 bytes.
_OVERHEAD_BYTES = 768

_MAX_PAYLOAD_BYTES = 65_507

_ERRORS = {
    Answer.PORT_UNREACHABLE: errno.ECONNREFUSED,
    Answer.PROHIBITED: errno.EHOSTUNREACH,
}


class UdpSocket(SimulatedSocket):
    """A datagram socket; `sendto_nowait` and `recvfrom_nowait` are the twins that never wait."""

    def __init__(self, host: SimulatedHost, family: int) -> None:
        super().__init__(host, family, stdlib.SOCK_DGRAM)
        self._queue: deque[tuple[bytes, Endpoint]] = deque()
        self._queued_bytes = 0

    # --- from the network ----------------------------------------------------------------

    def match(self, packet: Packet) -> int:
        """Return how well this socket fits a packet: 0 not at all, 3 best."""
        assert self._local is not None
        address = self._local[0]
        score = 1
        if any(address):
            if address != packet.destination:
                return 0
            score = 2
        elif len(packet.destination) != self._size and not self._is_dual:
            return 0
        if self._remote is not None:
            return 3 if self._remote == packet.source_endpoint else 0
        return score

    def enqueue(self, packet: Packet) -> bool:
        """Keep a datagram for the reader; False when the buffer is full."""
        limit = self._options.get((stdlib.SOL_SOCKET, stdlib.SO_RCVBUF), DEFAULT_BUFFER_BYTES)
        assert isinstance(limit, int)
        if self._queued_bytes >= limit:
            return False
        self._queue.append((packet.payload, packet.source_endpoint))
        self._queued_bytes += len(packet.payload) + _OVERHEAD_BYTES
        self._readable.wake()
        return True

    def receive_error(self, answer: Answer, remote: Endpoint) -> None:
        """Note an ICMP error; only a connected socket hears of it, as on Linux."""
        code = _ERRORS.get(answer)
        if code is not None and self._remote == remote:
            self._pending_error = code
            self._readable.wake()

    # --- local address -------------------------------------------------------------------

    async def bind(self, address: Any) -> None:
        self._check_open()
        host, port = await self._resolve(address)
        await trio.lowlevel.checkpoint()
        self.bind_nowait((host, port))

    def bind_nowait(self, endpoint: Endpoint) -> None:
        """Bind to packed address and port."""
        self._check_open()
        if self._local is not None:
            fail(errno.EINVAL)
        address, port = endpoint
        self._check_local(address)
        sockets = self._host.udp_sockets
        if port == 0:
            port = self._host.free_port(Protocol.UDP)
        elif not self._options.get((stdlib.SOL_SOCKET, stdlib.SO_REUSEPORT)):
            for other in sockets.get(port, ()):
                if other.conflicts(self, address):
                    fail(errno.EADDRINUSE)
        self._local = (address, port)
        sockets.setdefault(port, []).append(self)

    def conflicts(self, other: SimulatedSocket, address: bytes) -> bool:
        """Return whether another socket may not bind to `address` on the same port."""
        assert self._local is not None
        mine = self._local[0]
        if any(mine) and any(address):
            return mine == address
        return len(mine) == len(address) or self._is_dual or other._is_dual

    def _release(self) -> None:
        if self._local is not None:
            sockets = self._host.udp_sockets[self._local[1]]
            sockets.remove(self)
            if not sockets:
                del self._host.udp_sockets[self._local[1]]
        self._queue.clear()

    async def connect(self, address: Any) -> None:
        self._check_open()
        remote = await self._resolve(address)
        await trio.lowlevel.checkpoint()
        source = self._host.source_for(remote[0])
        if self._local is None:
            self.bind_nowait((WILDCARD[self._size], 0))
        assert self._local is not None
        if not any(self._local[0]):
            self._local = (source, self._local[1])
        self._remote = remote

    # --- sending -------------------------------------------------------------------------

    def sendto_nowait(self, data: bytes | bytearray | memoryview, address: Any) -> int:
        """Send to a numeric address without a checkpoint.

        Raises:
            OSError: as the real one; ECONNREFUSED reports an earlier ICMP error.
            ValueError: `address` is no numeric address of this family.
        """
        remote = self._parse(address)
        if remote is None:
            raise ValueError(f"{address!r} is not numeric")
        return self._send(data, remote)

    def _send(self, data: Any, remote: Endpoint) -> int:
        self._check_open()
        if self._pending_error:
            self._raise_pending()
        payload = bytes(data)
        if self._local is None:
            self.bind_nowait((WILDCARD[self._size], 0))
        assert self._local is not None
        address, port = self._local
        destination = remote[0]
        if not any(address):
            address = self._host.source_for(destination)
        elif len(address) != len(destination):
            fail(errno.EINVAL if self._size == 4 else errno.ENETUNREACH)
        if remote[1] == 0:
            fail(errno.EINVAL)
        may_fragment = self._leaves_fragmenting_to_routers
        headers = UDP_HEADER_BYTES + (20 if len(destination) == 4 else 40)
        if len(payload) + headers > self._host.mtu_to(destination):
            if len(payload) > _MAX_PAYLOAD_BYTES or self._forbids_fragments:
                fail(errno.EMSGSIZE)
            may_fragment = True
        self._host.send_datagram((address, port), remote, payload, may_fragment)
        return len(payload)

    @property
    def _mtu_mode(self) -> object:
        if self._size == 4:
            return self._options.get((stdlib.IPPROTO_IP, _IP_MTU_DISCOVER), _PMTUDISC_WANT)
        return self._options.get((stdlib.IPPROTO_IPV6, _IPV6_MTU_DISCOVER), _PMTUDISC_WANT)

    @property
    def _forbids_fragments(self) -> bool:
        return self._mtu_mode in (_PMTUDISC_DO, _PMTUDISC_PROBE)

    @property
    def _leaves_fragmenting_to_routers(self) -> bool:
        """IPv4 without "don't fragment"; IPv6's routers never do it."""
        return self._size == 4 and self._mtu_mode in (_PMTUDISC_DONT, _PMTUDISC_OMIT)

    async def sendto(self, *args: Any) -> int:
        data, address = args[0], args[-1]
        await trio.lowlevel.checkpoint_if_cancelled()
        self._check_open()
        if self._remote is not None and address is None:
            return await self._send_checkpointed(data, self._remote)
        return await self._send_checkpointed(data, await self._resolve(address))

    async def _send_checkpointed(self, data: Any, remote: Endpoint) -> int:
        sent = self._send(data, remote)
        await trio.lowlevel.cancel_shielded_checkpoint()
        return sent

    def send(self, data: Any, flags: int = 0, /) -> Awaitable[int]:
        return self._send_connected(data)

    async def _send_connected(self, data: Any) -> int:
        await trio.lowlevel.checkpoint_if_cancelled()
        self._check_open()
        if self._remote is None:
            fail(errno.EDESTADDRREQ)
        return await self._send_checkpointed(data, self._remote)

    async def sendmsg(
        self, buffers: Any, ancdata: Any = (), flags: int = 0, address: Any = None
    ) -> int:
        """Send the joined buffers; UDP_SEGMENT cuts them into datagrams as the kernel does."""
        await trio.lowlevel.checkpoint_if_cancelled()
        self._check_open()
        remote = self._remote if address is None else await self._resolve(address)
        if remote is None:
            fail(errno.EDESTADDRREQ)
        data = b"".join(bytes(buffer) for buffer in buffers)
        size = len(data) or 1
        for level, kind, value in ancdata:
            if (level, kind) == (_SOL_UDP, _UDP_SEGMENT):
                size = int.from_bytes(bytes(value)[:2], "little") or size
        for start in range(0, len(data) or 1, size):
            self._send(data[start : start + size], remote)
        await trio.lowlevel.cancel_shielded_checkpoint()
        return len(data)

    async def wait_writable(self) -> None:
        await trio.lowlevel.checkpoint()
        self._check_open()

    def shutdown(self, flag: int) -> None:
        self._check_open()
        if self._remote is None:
            fail(errno.ENOTCONN)
        self._shut_for_writing = flag in (stdlib.SHUT_WR, stdlib.SHUT_RDWR)

    # --- receiving -----------------------------------------------------------------------

    def is_readable(self) -> bool:
        return bool(self._queue or self._pending_error)

    def recvfrom_nowait(self, bufsize: int, flags: int = 0) -> tuple[bytes, Any]:
        """Return a datagram and its source.

        Raises:
            BlockingIOError: nothing has arrived.
            OSError: as the real one; ECONNREFUSED reports an earlier ICMP error.
        """
        self._check_open()
        if self._pending_error:
            self._raise_pending()
        if self._local is None:
            self.bind_nowait((WILDCARD[self._size], 0))
        if not self._queue:
            raise BlockingIOError(errno.EAGAIN, "nothing has arrived")
        if flags & stdlib.MSG_PEEK:
            data, source = self._queue[0]
        else:
            data, source = self._queue.popleft()
            self._queued_bytes -= len(data) + _OVERHEAD_BYTES
        return data[:bufsize], self._python_address(source)

    def recvfrom(self, bufsize: int, flags: int = 0, /) -> Awaitable[tuple[bytes, Any]]:
        return self._until(lambda: self.recvfrom_nowait(bufsize, flags), self._readable)

    def recv(self, buflen: int, flags: int = 0, /) -> Awaitable[bytes]:
        return self._until(lambda: self.recvfrom_nowait(buflen, flags)[0], self._readable)

    def recvfrom_into(
        self, buffer: Any, nbytes: int = 0, flags: int = 0
    ) -> Awaitable[tuple[int, Any]]:
        return self._recvfrom_into(buffer, nbytes, flags)

    async def _recvfrom_into(self, buffer: Any, nbytes: int, flags: int) -> tuple[int, Any]:
        with memoryview(buffer).cast("B") as view:
            data, source = await self.recvfrom(nbytes or len(view), flags)
            view[: len(data)] = data
        return len(data), source

    def recvmsg(
        self, bufsize: int, ancbufsize: int = 0, flags: int = 0, /
    ) -> Awaitable[tuple[bytes, list[tuple[int, int, bytes]], int, object]]:
        return self._recvmsg(bufsize, flags)

    async def _recvmsg(
        self, bufsize: int, flags: int
    ) -> tuple[bytes, list[tuple[int, int, bytes]], int, object]:
        data, source = await self.recvfrom(65_535, flags)
        truncated = stdlib.MSG_TRUNC if len(data) > bufsize else 0
        return data[:bufsize], [], int(truncated), source
