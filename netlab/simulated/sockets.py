"""What UDP and TCP sockets share: addresses as Python writes them, options, waiting, closing."""

from __future__ import annotations

import errno
import itertools
import socket as stdlib
from collections.abc import Awaitable, Callable
from functools import lru_cache
from ipaddress import ip_address
from typing import Any, TypeVar

import trio

from netlab.drops import Address, Endpoint
from netlab.simulated.host import WILDCARD, SimulatedHost, fail

T = TypeVar("T")

_MAPPED = bytes(10) + b"\xff\xff"
"""The prefix of IPv4 addresses on an IPv6 socket (RFC 4291 section 2.5.5.2)."""

# Beyond every real descriptor: whoever hands it to the kernel gets EBADF, not a stranger's file.
_numbers = itertools.count(1 << 28)

# Linux's net.core.rmem_default.
DEFAULT_BUFFER_BYTES = 212_992


@lru_cache(maxsize=65_536)
def _packed(family: int, host: str) -> Address:
    return stdlib.inet_pton(family, host.partition("%")[0])


@lru_cache(maxsize=65_536)
def _written(address: Address) -> str:
    return str(ip_address(address))


class WaitSlot:
    """A place where one task waits, as for readability of a real socket in Trio."""

    __slots__ = ("_task",)

    def __init__(self) -> None:
        self._task: trio.lowlevel.Task | None = None

    async def wait(self) -> None:
        """Sleep until `wake`.

        Raises:
            trio.BusyResourceError: another task waits here already.
        """
        if self._task is not None:
            raise trio.BusyResourceError("another task is using this socket in the same way")
        self._task = trio.lowlevel.current_task()

        def abort(_: object) -> trio.lowlevel.Abort:
            self._task = None
            return trio.lowlevel.Abort.SUCCEEDED

        await trio.lowlevel.wait_task_rescheduled(abort)

    def wake(self) -> None:
        if self._task is not None:
            task, self._task = self._task, None
            trio.lowlevel.reschedule(task)


class SimulatedSocket(trio.socket.SocketType):
    """A Trio socket on a simulated host."""

    def __init__(self, host: SimulatedHost, family: int, kind: int) -> None:
        super().__init__()
        self._host = host
        self._family = stdlib.AddressFamily(family)
        self._kind = stdlib.SocketKind(kind)
        self._size = 4 if family == stdlib.AF_INET else 16
        self._number = next(_numbers)
        self._options: dict[tuple[int, int], int | bytes] = {}
        self._readable = WaitSlot()
        self._writable = WaitSlot()
        self._local: Endpoint | None = None
        self._remote: Endpoint | None = None
        self._pending_error = 0
        self._shut_for_writing = False

    def __repr__(self) -> str:
        return f"<{type(self).__name__} on {self._host.name} {self._local}>"

    def __enter__(self) -> Any:  # the typed twin in Trio returns Self
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- identity ------------------------------------------------------------------------

    @property
    def family(self) -> stdlib.AddressFamily:
        return self._family

    @property
    def type(self) -> stdlib.SocketKind:
        return self._kind

    @property
    def proto(self) -> int:
        is_stream = self._kind == stdlib.SOCK_STREAM
        return stdlib.IPPROTO_TCP if is_stream else stdlib.IPPROTO_UDP

    @property
    def did_shutdown_SHUT_WR(self) -> bool:  # noqa: N802  # Trio's name
        return self._shut_for_writing

    def fileno(self) -> int:
        """Return a number that names the socket; it is no descriptor of this process."""
        return self._number

    def get_inheritable(self) -> bool:
        return False

    def set_inheritable(self, inheritable: bool) -> None:
        self._check_open()

    @property
    def is_closed(self) -> bool:
        return self._number == -1

    def _check_open(self) -> None:
        if self._number == -1:
            fail(errno.EBADF)

    # --- options -------------------------------------------------------------------------

    def getsockopt(self, level: int, optname: int, buflen: int | None = None) -> Any:
        self._check_open()
        if level == stdlib.SOL_SOCKET:
            if optname == stdlib.SO_ERROR:
                code, self._pending_error = self._pending_error, 0
                return code
            if optname == stdlib.SO_TYPE:
                return int(self._kind)
            if optname == stdlib.SO_DOMAIN:
                return int(self._family)
            if optname in (stdlib.SO_RCVBUF, stdlib.SO_SNDBUF):
                return self._options.get((level, optname), DEFAULT_BUFFER_BYTES)
        value = self._options.get((level, optname), 0)
        if buflen is not None and isinstance(value, int):
            return value.to_bytes(4, "little")[:buflen]
        return value

    def setsockopt(self, level: int, optname: int, value: Any, optlen: int | None = None) -> None:
        self._check_open()
        self._options[level, optname] = value if isinstance(value, int) else bytes(value or b"")

    @property
    def _is_dual(self) -> bool:
        """Whether this is an IPv6 socket that also speaks IPv4."""
        return self._size == 16 and not self._options.get((stdlib.IPPROTO_IPV6, stdlib.IPV6_V6ONLY))

    # --- addresses -----------------------------------------------------------------------

    async def _resolve(self, address: object) -> Endpoint:
        """Return an endpoint as sockets of the wire see it; names are looked up."""
        endpoint = self._parse(address)
        if endpoint is not None:
            return endpoint
        assert isinstance(address, tuple)
        host, port = address[:2]
        async with self._host:
            found = await trio.socket.getaddrinfo(
                host or None, port, self._family, self._kind, flags=stdlib.AI_PASSIVE
            )
        endpoint = self._parse(found[0][4])
        assert endpoint is not None
        return endpoint

    def _parse(self, address: object) -> Endpoint | None:
        """Return the endpoint of a numeric address, None for a name.

        Raises:
            ValueError: it is no address of this family at all.
        """
        least, most = (2, 2) if self._size == 4 else (2, 4)
        if not isinstance(address, tuple) or not least <= len(address) <= most:
            raise ValueError("address should be a (host, port) tuple, for IPv6 with up to 2 more")
        host, port = address[:2]
        if not isinstance(host, str) or not isinstance(port, int):
            return None
        if not 0 <= port <= 65535:
            raise OverflowError("port must be 0-65535.")
        try:
            packed = _packed(self._family, host)
        except OSError:
            return None
        if self._size == 16 and packed.startswith(_MAPPED):
            if not self._is_dual:
                fail(errno.ENETUNREACH)
            packed = packed[12:]
        return packed, port

    def _python_address(self, endpoint: Endpoint) -> Any:
        """Return an endpoint as Python writes it for this socket's family."""
        address, port = endpoint
        if self._size == 4:
            return _written(address), port
        if len(address) == 4:
            address = _MAPPED + address if any(address) else WILDCARD[16]
        return _written(address), port, 0, 0

    def getsockname(self) -> Any:
        self._check_open()
        return self._python_address(self._local or (WILDCARD[self._size], 0))

    def getpeername(self) -> Any:
        self._check_open()
        if self._remote is None:
            fail(errno.ENOTCONN)
        return self._python_address(self._remote)

    def _check_local(self, address: Address) -> None:
        """Refuse to bind to an address that the host does not have."""
        if any(address) and not self._host.is_own(address):
            fail(errno.EADDRNOTAVAIL)

    # --- waiting -------------------------------------------------------------------------

    async def _until(self, attempt: Callable[[], T], slot: WaitSlot) -> T:
        """Run the non-blocking twin of an operation until it does not have to wait."""
        await trio.lowlevel.checkpoint_if_cancelled()
        self._check_open()
        try:
            result = attempt()
        except BlockingIOError:
            pass
        else:
            await trio.lowlevel.cancel_shielded_checkpoint()
            return result
        while True:
            await slot.wait()
            if self._number == -1:
                raise trio.ClosedResourceError("another task closed this socket")
            try:
                return attempt()
            except BlockingIOError:
                continue

    async def wait_readable(self) -> None:
        """Sleep until something can be read; a hand-drained socket uses this and the
        ``_nowait`` methods."""
        await self._until(self._need_readable, self._readable)

    def _need_readable(self) -> None:
        if not self.is_readable():
            raise BlockingIOError

    def is_readable(self) -> bool:
        raise NotImplementedError

    def _raise_pending(self) -> None:
        code, self._pending_error = self._pending_error, 0
        if code:
            fail(code)

    def close(self) -> None:
        """Close; tasks that wait on the socket get `trio.ClosedResourceError`."""
        if self._number != -1:
            self._number = -1
            self._release()
            self._readable.wake()
            self._writable.wake()

    def _release(self) -> None:
        raise NotImplementedError

    # --- reading into buffers ------------------------------------------------------------

    def recv_into(self, buffer: Any, nbytes: int = 0, flags: int = 0) -> Awaitable[int]:
        return self._recv_into(buffer, nbytes, flags)

    async def _recv_into(self, buffer: Any, nbytes: int, flags: int) -> int:
        with memoryview(buffer).cast("B") as view:
            data = await self.recv(nbytes or len(view), flags)
            view[: len(data)] = data
        return len(data)
