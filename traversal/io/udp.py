"""The node's UDP sockets, one per address family: STUN, disco, peer relays and data share them.

They must be shared, because the NAT mapping that STUN finds has to be the one that peers reach
(disco specification 6.1). Nothing here awaits per packet: sending is a plain call that drops what
the kernel has no room for, receiving drains the socket after one wake-up. Measured per datagram of
1200 bytes: `trio.socket` 10 us out and 6 us in; a socket drained by hand 3.3 and 1.2; segmentation
offload (GSO, GRO) in bursts 0.13 and 0.26.

Sockets come from `trio.socket`, so that a simulated internet can stand in for the kernel. A real
socket is taken from Trio's wrapper and read by hand; another kind must have the methods
`bind_nowait`, `sendto_nowait` and `recvfrom_nowait`.
"""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol, cast

import trio

from traversal.io.marking import new_socket
from traversal.relay_map import Family

BUFFER_BYTES: Final = 7 << 20
"""Asked for in each direction, like stock nodes (path selection specification 2)."""
MAX_READS: Final = 64
"""Reads per wake-up, so that a flood in one family leaves time for everything else."""
MAX_SEGMENTS: Final = 64
"""The kernel's bound for segments in one send (UDP_MAX_SEGMENTS of older kernels)."""
MAX_DATAGRAM_BYTES: Final = 65507

Source = tuple[str, int]
Batch = list[tuple[bytes, Source]]
"""Datagrams and where they came from."""
Run = tuple[bytes, int, Source]
"""Datagrams from one address, joined; how long each is but the last, which may be shorter."""

# From the Linux headers; Python's socket module lacks most of them.
_SO_SNDBUFFORCE, _SO_RCVBUFFORCE = 32, 33
_SOL_UDP, _UDP_SEGMENT, _UDP_GRO = 17, 103, 104
_IP_MTU_DISCOVER, _IPV6_MTU_DISCOVER = 10, 23
MAY_FRAGMENT, DONT_FRAGMENT, _PMTUDISC_OMIT = 1, 3, 5
"""Modes of `set_path_mtu_mode`: the second is for protocols that find the path's MTU themselves,
the first for those that can't."""
_ANCILLARY_BYTES: Final = 64
_SEGMENT: Final = struct.Struct("=H")
_NO_OFFLOAD: Final = frozenset({errno.EINVAL, errno.EIO, errno.ENOPROTOOPT, errno.EOPNOTSUPP})

_KINDS: Final[dict[Family, socket.AddressFamily]] = {4: socket.AF_INET, 6: socket.AF_INET6}
_WILDCARDS: Final[dict[Family, str]] = {4: "0.0.0.0", 6: "::"}


class UdpError(Exception):
    """No UDP socket could be opened; the text says for which address and why."""


class _NonWaitingSocket(Protocol):
    """What a socket that is not the kernel's must offer besides Trio's methods."""

    def sendto_nowait(self, data: bytes, address: Source) -> int: ...
    def recvfrom_nowait(self, size: int) -> tuple[bytes, Any]: ...


@dataclass(frozen=True, slots=True)
class UdpStatistics:
    """Counters since the start; the ports are those bound now, None for a family without."""

    ipv4_port: int | None
    ipv6_port: int | None
    datagrams_received: int
    dropped_for_full_buffer: int
    send_errors: int


class Sender(Protocol):
    """What datagrams leave by: both sockets, or these and one more for a single destination."""

    def send(self, data: bytes, address: Source) -> int:
        """See `UdpSockets.send`."""

    def send_many(self, datagrams: Sequence[bytes], address: Source) -> int:
        """See `UdpSockets.send_many`."""

    def send_unfragmented(self, data: bytes, address: Source) -> int:
        """See `UdpSockets.send_unfragmented`."""


class UdpSockets:
    """Both sockets. `open` them, run `receive` in a task, then `send` at will."""

    def __init__(self, hosts: dict[Family, str] | None = None) -> None:
        self._hosts = _WILDCARDS if hosts is None else hosts
        self._sockets: dict[Family, UdpSocket] = {}
        self.wanted_port = 0
        """The port that `open` was asked for; 0 for any."""
        self._reopened = trio.Event()
        self._received = 0
        self._dropped = 0
        self._errors = 0

    async def open(self, port: int = 0) -> None:
        """Bind one socket per family, if possible all to the same port.

        `port` 0 lets the kernel choose. A family that the host lacks is left out. Raises UdpError
        when none is left, or when a `port` other than 0 is taken.
        """
        self.wanted_port = port
        problems = []
        for family, host in sorted(self._hosts.items()):
            try:
                self._sockets[family] = await self._bind_one(family, host, port)
            except OSError as error:
                problems.append(f"{host} port {port or 'any'}: {_reason(error)}")
                if port and error.errno == errno.EADDRINUSE:
                    self.close()
                    break
        if not self._sockets:
            hint = "; choose another port, or 0 for any" if port else ""
            raise UdpError("can't open a UDP socket: " + "; ".join(problems) + hint)

    async def rebind(self) -> None:
        """Replace both sockets, on the same port if it can be had.

        For a changed network, or after an error that only a fresh socket heals. `receive` goes on
        with the new ones. A family that can't be bound any more is left out until the next time.
        """
        ports = {family: sock.port for family, sock in self._sockets.items()}
        self.close()
        for family, host in sorted(self._hosts.items()):
            for port in (self.wanted_port or ports.get(family, 0), 0):
                try:
                    self._sockets[family] = await self._bind_one(family, host, port)
                except OSError:
                    continue
                break
        self._reopened.set()
        self._reopened = trio.Event()

    def close(self) -> None:
        """Close the sockets at once; `receive` waits for the next `rebind`."""
        sockets, self._sockets = self._sockets, {}
        for sock in sockets.values():
            sock.close()

    def port(self, family: Family) -> int | None:
        """The local port of a family, None if it has no socket."""
        sock = self._sockets.get(family)
        return None if sock is None else sock.port

    def bound_host(self, family: Family) -> str | None:
        """The address that a family's socket is bound to, None for all addresses."""
        host = self._hosts.get(family)
        return None if host == _WILDCARDS[family] else host

    def statistics(self) -> UdpStatistics:
        """A snapshot of the counters."""
        return UdpStatistics(
            ipv4_port=self.port(4),
            ipv6_port=self.port(6),
            datagrams_received=self._received,
            dropped_for_full_buffer=self._dropped,
            send_errors=self._errors,
        )

    def send(self, data: bytes, address: Source, by: UdpSocket | None = None) -> int:
        """Send one datagram: 0, or the errno for which it was dropped. Never raises OSError.

        A full send buffer counts as loss on the way and yields 0. `by` is another socket than the
        one for the address's family.
        """
        sock = by or self._sockets.get(6 if ":" in address[0] else 4)
        if sock is None:
            return errno.EAFNOSUPPORT
        try:
            sock.send(data, address)
        except BlockingIOError:
            self._dropped += 1
        except OSError as error:
            return self._fault(error)
        return 0

    def send_many(
        self, datagrams: Sequence[bytes], address: Source, by: UdpSocket | None = None
    ) -> int:
        """Send several to one address; runs of equal size leave in one system call.

        0, or the errno for which at least one was dropped. `by` as for `send`.
        """
        sock = by or self._sockets.get(6 if ":" in address[0] else 4)
        if sock is None:
            return errno.EAFNOSUPPORT
        start = 0
        fault = 0
        while start < len(datagrams):
            end = _end_of_run(datagrams, start)
            try:
                sock.send_run(datagrams[start:end], address)
            except BlockingIOError:
                self._dropped += end - start
            except OSError as error:
                fault = self._fault(error)
            start = end
        return fault

    def send_unfragmented(self, data: bytes, address: Source, by: UdpSocket | None = None) -> int:
        """Like `send`, with "don't fragment" set: for path MTU probes."""
        sock = by or self._sockets.get(6 if ":" in address[0] else 4)
        if sock is None:
            return errno.EAFNOSUPPORT
        sock.set_path_mtu_mode(DONT_FRAGMENT)
        try:
            return self.send(data, address, by)
        finally:
            sock.set_path_mtu_mode(_PMTUDISC_OMIT)

    async def receive(self, handle: Callable[[Batch], None]) -> None:
        """Pass everything that arrives to `handle`, in batches, until cancelled.

        `handle` must not await and must not raise. Addresses are canonical text without zone;
        what comes from an IPv6 link-local address is dropped, since it can't be answered without.
        """
        async with trio.open_nursery() as nursery:
            for family in self._hosts:
                nursery.start_soon(self._receive_family, family, handle)

    async def _receive_family(self, family: Family, handle: Callable[[Batch], None]) -> None:
        while True:
            reopened = self._reopened
            sock = self._sockets.get(family)
            if sock is None:
                await reopened.wait()
                continue
            try:
                while True:
                    batch = await sock.receive()
                    self._received += len(batch)
                    handle(batch)
            except (trio.ClosedResourceError, OSError):
                # Closed for a rebind; or broken, and then only a rebind helps.
                if self._sockets.get(family) is sock:
                    await reopened.wait()

    async def _bind_one(self, family: Family, host: str, port: int) -> UdpSocket:
        # The family that was bound first tells the port that the other would like to have.
        others = [sock.port for sock in self._sockets.values()]
        if not port and others:
            try:
                return await bind_socket(family, host, others[0])
            except OSError:
                pass
        return await bind_socket(family, host, port)

    def _fault(self, error: OSError) -> int:
        self._errors += 1
        return error.errno or errno.EIO


def _end_of_run(datagrams: Sequence[bytes], start: int) -> int:
    """Where the run of equal sizes ends; a shorter last one still belongs to it."""
    size = len(datagrams[start])
    limit = min(len(datagrams), start + min(MAX_SEGMENTS, MAX_DATAGRAM_BYTES // (size or 1)))
    end = start + 1
    while end < limit and len(datagrams[end]) == size:
        end += 1
    if end < limit and 0 < len(datagrams[end]) < size:
        end += 1
    return max(end, start + 1)


async def bind_socket(
    family: Family, host: str, port: int, buffer: bytearray | None = None
) -> UdpSocket:
    """A bound socket that is read in batches. Raises OSError.

    Sockets of one thread may share a `buffer` of 64 KiB: nothing stays in it.
    """
    sock = new_socket(_KINDS[family], socket.SOCK_DGRAM)
    try:
        if family == 6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        await sock.bind((host, port))
        bound_port = sock.getsockname()[1]
    except BaseException:
        sock.close()
        raise
    if hasattr(sock, "sendto_nowait"):
        return _OtherSocket(sock, bound_port)
    inner = socket.socket(fileno=sock.detach())
    return _KernelSocket(inner, family, bound_port, buffer or bytearray(1 << 16))


def bind_any_port_nowait(host: str, buffer: bytearray) -> UdpSocket:
    """Like `bind_socket` for IPv4 and any port, without a checkpoint. Raises OSError."""
    sock = new_socket(socket.AF_INET, socket.SOCK_DGRAM)
    if hasattr(sock, "bind_nowait"):
        sock.bind_nowait((socket.inet_aton(host), 0))
        return _OtherSocket(sock, sock.getsockname()[1])
    inner = socket.socket(fileno=sock.detach())
    try:
        inner.bind((host, 0))
        return _KernelSocket(inner, 4, inner.getsockname()[1], buffer)
    except BaseException:
        inner.close()
        raise


class _KernelSocket:
    """A socket of the kernel, drained by hand."""

    def __init__(self, sock: socket.socket, family: Family, port: int, buffer: bytearray) -> None:
        self.port = port
        self._sock = sock
        self._family = family
        self._buffer = buffer
        self._view = memoryview(self._buffer)
        self._has_gso = True
        self._waiting = trio.Lock()
        sock.setblocking(False)
        for forced, plain in (
            (_SO_RCVBUFFORCE, socket.SO_RCVBUF),
            (_SO_SNDBUFFORCE, socket.SO_SNDBUF),
        ):
            try:
                sock.setsockopt(socket.SOL_SOCKET, forced, BUFFER_BYTES)
            except OSError:
                sock.setsockopt(socket.SOL_SOCKET, plain, BUFFER_BYTES)
        try:
            sock.setsockopt(_SOL_UDP, _UDP_GRO, 1)
        except OSError:
            pass
        # Routers may fragment data, and no ICMP message, forged or not, shrinks what we send.
        self.set_path_mtu_mode(_PMTUDISC_OMIT)

    def set_path_mtu_mode(self, mode: int) -> None:
        try:
            if self._family == 4:
                self._sock.setsockopt(socket.IPPROTO_IP, _IP_MTU_DISCOVER, _ipv4_mode(mode))
            else:
                self._sock.setsockopt(socket.IPPROTO_IPV6, _IPV6_MTU_DISCOVER, mode)
        except OSError:
            pass

    def send(self, data: bytes, address: Source) -> None:
        self._sock.sendto(data, address)

    def send_run(self, run: Sequence[bytes], address: Source) -> None:
        if self._has_gso and len(run) > 1:
            ancillary = [(_SOL_UDP, _UDP_SEGMENT, _SEGMENT.pack(len(run[0])))]
            try:
                self._sock.sendmsg(run, ancillary, 0, address)
                return
            except BlockingIOError:
                raise
            except OSError as error:
                if error.errno not in _NO_OFFLOAD:
                    raise
                self._has_gso = False
        for data in run:
            self._sock.sendto(data, address)

    async def send_patiently(self, datagrams: Sequence[bytes], address: Source) -> None:
        """Send all, waiting for room; what can't be sent for another reason is lost."""
        start = 0
        while start < len(datagrams):
            end = _end_of_run(datagrams, start)
            try:
                self.send_run(datagrams[start:end], address)
            except BlockingIOError:
                # Trio lets one task wait for a socket at a time, and a listener's connections share
                # theirs.
                async with self._waiting:
                    await trio.lowlevel.wait_writable(self._sock)
                continue
            except OSError:
                pass
            start = end

    async def receive(self) -> Batch:
        """What has arrived. Raises trio.ClosedResourceError, also if it was closed before: whoever
        handled the last batch may have done so."""
        batch: Batch = []
        for run, step, source in await self.receive_runs():
            if step < len(run):
                # One copy of all, then slices of it: cheaper than a view for each datagram.
                batch += [(run[at : at + step], source) for at in range(0, len(run), step)]
            else:
                batch.append((run, source))
        return batch

    async def receive_runs(self, max_reads: int = MAX_READS) -> list[Run]:
        """Like `receive`, but datagrams that came together stay so; a run is at most 64 KiB."""
        if self._sock.fileno() < 0:
            raise trio.ClosedResourceError("this socket was closed")
        await trio.lowlevel.wait_readable(self._sock)
        runs: list[Run] = []
        receive = self._sock.recvmsg_into
        buffers = (self._buffer,)
        for _ in range(max_reads):
            try:
                size, ancillary, _, source = receive(buffers, _ANCILLARY_BYTES)
            except BlockingIOError:
                break
            if self._family == 6:
                source = source[:2]
                if "%" in source[0]:
                    continue
            step = int.from_bytes(ancillary[0][2][:4], "little") if ancillary else 0
            runs.append((bytes(self._view[:size]), step or size, source))
        return runs

    def close(self) -> None:
        if self._sock.fileno() >= 0:
            trio.lowlevel.notify_closing(self._sock)
            self._sock.close()


class _OtherSocket:
    """A socket of a simulated internet."""

    def __init__(self, sock: trio.socket.SocketType, port: int) -> None:
        self.port = port
        self._sock = sock
        self._twin = cast(_NonWaitingSocket, sock)
        self._is_ipv6 = sock.family == socket.AF_INET6
        self.set_path_mtu_mode(_PMTUDISC_OMIT)

    def set_path_mtu_mode(self, mode: int) -> None:
        if self._is_ipv6:
            self._sock.setsockopt(socket.IPPROTO_IPV6, _IPV6_MTU_DISCOVER, mode)
        else:
            self._sock.setsockopt(socket.IPPROTO_IP, _IP_MTU_DISCOVER, _ipv4_mode(mode))

    def send(self, data: bytes, address: Source) -> None:
        self._twin.sendto_nowait(data, address)

    def send_run(self, run: Sequence[bytes], address: Source) -> None:
        for data in run:
            self._twin.sendto_nowait(data, address)

    async def send_patiently(self, datagrams: Sequence[bytes], address: Source) -> None:
        for data in datagrams:
            try:
                await self._sock.sendto(data, address)
            except OSError:
                pass

    async def receive(self) -> Batch:
        return [(data, source) for data, _, source in await self.receive_runs()]

    async def receive_runs(self, max_reads: int = MAX_READS) -> list[Run]:
        data, source = await self._sock.recvfrom(1 << 16)
        runs: list[Run] = [(data, len(data), source[:2])]
        for _ in range(max_reads):
            try:
                data, source = self._twin.recvfrom_nowait(1 << 16)
            except BlockingIOError:
                break
            runs.append((data, len(data), source[:2]))
        return runs

    def close(self) -> None:
        self._sock.close()


UdpSocket = _KernelSocket | _OtherSocket
"""One bound socket: `receive` gives batches, `close` closes; send by `UdpSockets.send`."""


def _ipv4_mode(mode: int) -> int:
    # IPv4's routers fragment what lacks "don't fragment"; those of IPv6 only tell the sender to.
    return _PMTUDISC_OMIT if mode == MAY_FRAGMENT else mode


def _reason(error: OSError) -> str:
    return error.strerror or str(error)
