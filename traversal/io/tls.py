"""TLS as bytes in, bytes out: an `ssl.SSLObject` between two memory BIOs.

By hand instead of `trio.SSLStream` or `ssl.SSLSocket`: one `recv` takes every record there is
(OpenSSL on a socket reads header and body of each record apart), and nothing is awaited per record.
Measured on one core with one TLS record per frame: 26 thousand frames/s with a stream per client,
75 thousand with `SSLSocket`, 314 thousand so.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable
from typing import cast


class TlsError(Exception):
    """The TLS connection failed or was closed; the text says why, in OpenSSL's words."""


class TlsClosedError(TlsError):
    """The other side closed the TLS connection in due form."""


class TlsEngine:
    """One connection's TLS state.

    Pass bytes from the network to `receive_data`, take decrypted bytes with `read_into`, encrypt
    with `write`; after each of these send what `data_to_send` returns.

    Attributes:
        failure: why nothing can be read any more; it may be set by a `read_into` that still
            returned data.
    """

    __slots__ = ("_incoming", "_object", "_outgoing", "_read", "failure")

    def __init__(
        self, context: ssl.SSLContext, *, server_side: bool, server_hostname: str | None = None
    ) -> None:
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self.failure: TlsError | None = None
        self._object = context.wrap_bio(
            self._incoming,
            self._outgoing,
            server_side=server_side,
            server_hostname=server_hostname,
        )
        # `SSLObject.read` only passes its arguments on to the object below it; without it a record
        # costs a tenth less. typeshed does not know that the number of bytes comes back.
        self._read = cast("Callable[[int, memoryview], int]", self._object._sslobj.read)  # type: ignore[attr-defined]

    def receive_data(self, data: bytes | bytearray | memoryview) -> None:
        """Bytes from the network; empty at its end."""
        if data:
            self._incoming.write(data)
        else:
            self._incoming.write_eof()

    def has_data_to_send(self) -> bool:
        """Whether `data_to_send` has something."""
        return self._outgoing.pending > 0

    def data_to_send(self) -> bytes:
        """Bytes for the network; empty when there are none."""
        return self._outgoing.read() if self._outgoing.pending else b""

    def do_handshake(self) -> bool:
        """Go on with the handshake; whether it is done. Raises TlsError."""
        try:
            self._object.do_handshake()
        except ssl.SSLWantReadError:
            return False
        except (ssl.SSLError, OSError, ValueError) as error:
            raise TlsError(_describe(error)) from None
        return True

    def read_into(self, buffer: memoryview) -> int:
        """Decrypt into `buffer` until it is full or nothing is left.

        Returns the number of bytes; drain until it returns less than there was room for. Raises
        TlsError at the end of the connection, TlsClosedError where it ended in due form, but not
        before all data was returned.
        """
        if self.failure is not None:
            raise self.failure
        size = 0
        room = len(buffer)
        read = self._read
        incoming = self._incoming
        try:
            # Asking first spares an exception per wake-up in the common case.
            while size < room and (incoming.pending or incoming.eof or self._object.pending()):
                count = read(room - size, buffer[size:])
                if not count:
                    raise ssl.SSLZeroReturnError
                size += count
        except ssl.SSLWantReadError:
            pass
        except (ssl.SSLError, OSError) as error:
            closed = isinstance(error, ssl.SSLZeroReturnError)
            self.failure = (TlsClosedError if closed else TlsError)(_describe(error))
            if size == 0:
                raise self.failure from None
        return size

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Encrypt; the result waits in `data_to_send`. Raises TlsError."""
        try:
            self._object.write(data)
        except (ssl.SSLError, OSError) as error:
            raise TlsError(_describe(error)) from None

    def close(self) -> None:
        """Put the close alert among the data to send, where the connection is in a state for it."""
        try:
            self._object.unwrap()
        except (ssl.SSLError, OSError, ValueError):
            pass

    def version(self) -> str | None:
        """For example `TLSv1.3`; None before the handshake is done."""
        return self._object.version()

    def server_name(self) -> str | None:
        """The name that a client asked for or, on the client's side, that we asked for."""
        return self._object.server_hostname

    def selected_protocol(self) -> str | None:
        """The application protocol that both sides agreed on (ALPN), if they did."""
        return self._object.selected_alpn_protocol()

    def peer_chain(self) -> list[bytes]:
        """The certificates that the other side presented, in DER, in their order on the wire."""
        certificates = self._object._sslobj.get_unverified_chain()  # type: ignore[attr-defined]
        return [certificate.public_bytes(_DER) for certificate in certificates or ()]


# `SSLObject.get_unverified_chain` is public from Python 3.13 on; the object below it has it since
# 3.10, with this constant of the private `_ssl` module (ENCODING_DER).
_DER = 2


def _describe(error: Exception) -> str:
    reason: str | None = getattr(error, "reason", None)
    if isinstance(error, ssl.SSLZeroReturnError) or reason == "UNEXPECTED_EOF_WHILE_READING":
        return "the other side closed the connection"
    if reason == "CALLBACK_FAILED":  # the only callback that we set looks at the name
        return "it asked for no server name, or for one that is not served here"
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"certificate verification failed: {error.verify_message}"
    if isinstance(error, ssl.SSLError) and reason:
        return reason.replace("_", " ").lower()
    return str(error) or type(error).__name__
