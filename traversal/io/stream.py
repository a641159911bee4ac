"""A connection before the pump takes it over (or without the pump: HTTP, probes).

Plain or TLS bytes over a Trio socket, without `trio.SSLStream`, because socket and TLS state must
be handed on as they are when the handshake is done.
"""

from __future__ import annotations

import select
import socket
import ssl
import struct
from typing import Final

import trio

from traversal.io.tls import TlsClosedError, TlsEngine, TlsError

READ_BYTES: Final = 16384
NO_LINGER: Final = struct.pack("ii", 1, 0)
"""Closing then resets the connection."""


class StreamEndedError(Exception):
    """The other side ended the connection, or the network did; the text says how."""


class HandshakeStream:
    """Receive and send bytes; TLS once `start_tls` has run.

    `read_bytes` is the most that one `receive` returns: more is faster, and costs that much memory
    once there was so much to read.
    One task may receive while another sends. Cancelling a method leaves the stream only good for
    closing.
    """

    def __init__(self, sock: trio.socket.SocketType, *, read_bytes: int = READ_BYTES) -> None:
        self._sock = sock
        self._tls: TlsEngine | None = None
        self._read_bytes = read_bytes
        self._buffer = memoryview(bytearray(min(READ_BYTES, read_bytes)))
        self._ahead = b""
        # Reading may make TLS answer (a key update), which must not land inside a record that
        # another task is writing.
        self._sending = trio.Lock()
        self._is_sending = False
        """Whether bytes were handed to the network in part: then, and for good once cancelled."""

    @property
    def local_host(self) -> str:
        """Our own IP address on this connection. Raises OSError once it is closed."""
        host = self._sock.getsockname()[0]
        assert isinstance(host, str)
        return host

    @property
    def selected_protocol(self) -> str | None:
        """What TLS agreed on by ALPN, None for nothing or without TLS."""
        return None if self._tls is None else self._tls.selected_protocol()

    async def start_tls(
        self, context: ssl.SSLContext, *, server_side: bool, server_hostname: str | None = None
    ) -> TlsEngine:
        """Do the TLS handshake. Raises StreamEndedError."""
        tls = TlsEngine(context, server_side=server_side, server_hostname=server_hostname)
        if self._ahead:
            tls.receive_data(self._ahead)
            self._ahead = b""
        try:
            while not tls.do_handshake():
                await self._send_raw(tls.data_to_send())
                tls.receive_data(await self._receive_raw())
            await self._send_raw(tls.data_to_send())
        except TlsError as error:
            # The alert that tells the other side why; nobody needs to read it.
            try:
                await self._send_raw(tls.data_to_send())
            except StreamEndedError:
                pass
            raise StreamEndedError(f"TLS handshake: {error}") from None
        self._tls = tls
        return tls

    async def receive(self) -> bytes:
        """Some bytes, empty at the end. Raises StreamEndedError where it ends badly."""
        if self._ahead:
            data, self._ahead = self._ahead, b""
            return data
        if self._tls is None:
            return await self._receive_raw()
        while True:
            try:
                count = self._tls.read_into(self._buffer)
            except TlsClosedError:
                return b""
            except TlsError as error:
                raise StreamEndedError(str(error)) from None
            # A task that is sending takes this along; waiting for it could end in a deadlock, each
            # side waiting for the other to read.
            if self._tls.has_data_to_send() and not self._sending.locked():
                async with self._sending:
                    await self._flush(self._tls)
            if count:
                return bytes(self._buffer[:count])
            self._tls.receive_data(await self._receive_raw())

    def is_readable(self) -> bool:
        """Whether `receive` would return at once, with bytes or the end."""
        if self._ahead:
            return True
        poll = select.poll()
        poll.register(self._sock.fileno(), select.POLLIN)
        return any(not event & select.POLLNVAL for _, event in poll.poll(0))

    def put_back(self, data: bytes) -> None:
        """The next `receive` (or TLS handshake) starts with these bytes."""
        self._ahead = data + self._ahead

    async def send_all(self, data: bytes) -> None:
        """Send everything. Raises StreamEndedError."""
        if self._tls is None:
            await self._send_raw(data)
            return
        async with self._sending:
            try:
                self._tls.write(data)
            except TlsError as error:
                raise StreamEndedError(str(error)) from None
            await self._flush(self._tls)

    async def send_eof(self) -> None:
        """Nothing more from us; the other side may go on (over TLS, a close alert).

        Raises StreamEndedError.
        """
        async with self._sending:
            if self._tls is not None:
                self._tls.close()
                await self._flush(self._tls)
            try:
                self._sock.shutdown(socket.SHUT_WR)
            except OSError as error:
                raise StreamEndedError(error.strerror or type(error).__name__) from None

    def detach(self) -> tuple[socket.socket, TlsEngine | None]:
        """Give up the socket (non-blocking) and the TLS state; the caller owns them from now on."""
        sock = socket.socket(fileno=self._sock.detach())
        sock.setblocking(False)
        return sock, self._tls

    def close(self) -> None:
        """Close at once, with TLS's close alert where the kernel takes it; harmless repeated."""
        if self._sock.fileno() < 0:
            return
        try:
            # Whoever still waits for this socket must learn of it before its number is reused.
            trio.lowlevel.notify_closing(self._sock.fileno())
            sock, tls = self.detach()
        except NotImplementedError:
            # A simulated socket, from which there is nothing to detach.
            self._sock.close()
            return
        with sock:
            # An alert in the middle of a record would be no alert, but a forgery.
            if tls is not None and not self._is_sending:
                tls.close()
                try:
                    sock.send(tls.data_to_send())
                except OSError:
                    pass

    def abort(self) -> None:
        """Close a connection that has gone silent: what the other side did not acknowledge is
        thrown away, where `close` would have the kernel send it again for minutes."""
        if self._sock.fileno() >= 0:
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, NO_LINGER)
        self.close()

    async def _receive_raw(self) -> bytes:
        size = len(self._buffer)
        try:
            data = await self._sock.recv(size)
        except OSError as error:
            raise StreamEndedError(error.strerror or type(error).__name__) from None
        if len(data) == size < self._read_bytes:
            self._buffer = memoryview(bytearray(min(2 * size, self._read_bytes)))
        return data

    async def _flush(self, tls: TlsEngine) -> None:
        while tls.has_data_to_send():
            await self._send_raw(tls.data_to_send())

    async def _send_raw(self, data: bytes) -> None:
        view = memoryview(data)
        self._is_sending = True
        try:
            while view:
                view = view[await self._sock.send(view) :]
        except OSError as error:
            raise StreamEndedError(error.strerror or type(error).__name__) from None
        self._is_sending = False
