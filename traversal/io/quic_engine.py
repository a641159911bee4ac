"""QUIC version 1 as bytes and `now` in, bytes and events out: qh3, and what it lacks for us.

Chosen over aioquic (2026-11, qh3 2.1, aioquic 1.7): six times its speed, and X25519MLKEM768, the
only group for which cloudflared sends a key share. As a server qh3 mishandles clients whose own
connection id is empty, as cloudflared's is: its core goes on sending to the id of the client's
first Initial, and its TLS compares a transport parameter with one that it never notes. `QuicEngine`
mends both.

Pure but for the library's own randomness.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from hmac import compare_digest
from hmac import digest as hmac_digest
from typing import Any, Final, TypeVar

from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.hmac import HMAC
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand
from qh3.quic.configuration import QuicConfiguration
from qh3.quic.connection import QuicConnection as _Connection
from qh3.quic.connection import QuicConnectionError
from qh3.quic.packet import QuicErrorCode, encode_quic_retry

MIN_INITIAL_BYTES: Final = 1200
"""A client pads its first datagram to this (RFC 9000 14.1), so that our answer is no amplifier."""
MAX_CONNECTION_ID_BYTES: Final = 20
RETRY_TOKEN_SECONDS: Final = 10.0

_T = TypeVar("_T")
_VERSION_1: Final = 1
_FRAME_OVERHEAD: Final = 3
"""A DATAGRAM frame's type and length (RFC 9221 4)."""
_DATAGRAM_OVERHEAD: Final = 1 + MAX_CONNECTION_ID_BYTES + 4 + 16 + _FRAME_OVERHEAD
"""The longest header, packet number and tag of a packet, too (RFC 9000 17.3)."""
_INITIAL_SALT: Final = bytes.fromhex("38762cf7f55934b34d179ae6a4c80cadccbb7f0a")
"""RFC 9001 5.2."""


@dataclass(frozen=True, slots=True)
class InitialHeader:
    """What the first datagram of a client says in the clear."""

    destination_id: bytes
    source_id: bytes
    token: bytes


def parse_initial(datagram: bytes) -> InitialHeader | None:
    """The header of a version 1 Initial of full size; None for anything else (RFC 9000 17.2.2)."""
    if len(datagram) < MIN_INITIAL_BYTES or datagram[0] & 0xF0 != 0xC0:
        return None
    if int.from_bytes(datagram[1:5], "big") != _VERSION_1:
        return None
    length = datagram[5]
    if not 8 <= length <= MAX_CONNECTION_ID_BYTES:
        return None
    at = 6 + length
    source_length = datagram[at]
    if source_length > MAX_CONNECTION_ID_BYTES:
        return None
    destination_id = datagram[6:at]
    source_id = datagram[at + 1 : at + 1 + source_length]
    at += 1 + source_length
    # The token's length is a variable-length integer (RFC 9000 16), at most two bytes for ours.
    token_length = datagram[at] & 0x3F
    if datagram[at] & 0xC0 == 0x40:
        at += 1
        token_length = token_length << 8 | datagram[at]
    elif datagram[at] & 0xC0:
        return None
    token = datagram[at + 1 : at + 1 + token_length]
    return InitialHeader(destination_id, source_id, token) if len(token) == token_length else None


class RetryTokens:
    """Proof that a client is where its datagrams say, kept by the client (RFC 9000 8.1.2).

    Layout: time in seconds (8), original destination id (length 1, bytes), HMAC (16) over
    these, the client's address and the connection id of the Retry.
    """

    def __init__(self, key: bytes) -> None:
        self._key = key

    def encode_retry(
        self, initial: InitialHeader, address: tuple[str, int], retry_id: bytes, now: float
    ) -> bytes:
        """A Retry packet for a client's first Initial; `retry_id` is 8 random bytes."""
        original = initial.destination_id
        stated = int(now).to_bytes(8, "big") + bytes([len(original)]) + original
        token = stated + self._seal(stated, address, retry_id)
        return encode_quic_retry(
            version=_VERSION_1,
            source_cid=retry_id,
            destination_cid=initial.source_id,
            original_destination_cid=original,
            retry_token=token,
        )

    def original_id(
        self, initial: InitialHeader, address: tuple[str, int], now: float
    ) -> bytes | None:
        """The original destination id that a valid token of this client holds, else None."""
        token = initial.token
        stated, seal = token[:-16], token[-16:]
        if len(stated) < 9 or len(stated) != 9 + stated[8]:
            return None
        if not compare_digest(seal, self._seal(stated, address, initial.destination_id)):
            return None
        age = now - int.from_bytes(stated[:8], "big")
        return stated[9:] if age <= RETRY_TOKEN_SECONDS else None

    def _seal(self, stated: bytes, address: tuple[str, int], retry_id: bytes) -> bytes:
        bound = f"{address[0]} {address[1]} ".encode() + retry_id
        return hmac_digest(self._key, bound + stated, "sha256")[:16]


class QuicEngine(_Connection):
    """A connection, whose calls raise QuicConnectionError and nothing else.

    Calls as in qh3: `receive_datagram`, `datagrams_to_send`, `get_timer`, `handle_timer`,
    `next_event`.

    The core extends flow control credit for whatever was taken from it, all streams alike: a single
    one can't be held back, so whoever reads a stream slowly needs room elsewhere (`Spool`).
    """

    def __init__(
        self,
        configuration: QuicConfiguration,
        initial: InitialHeader | None = None,
        *,
        original_id: bytes | None = None,
    ) -> None:
        """`initial` and, if that answered a Retry, `original_id` are for servers."""
        self._is_peer_anonymous = initial is not None and not initial.source_id
        first_id = initial.destination_id if initial is not None else None
        super().__init__(
            configuration=configuration,
            original_destination_connection_id=original_id or first_id,
            retry_source_connection_id=first_id if original_id else None,
        )

    @property
    def max_datagram_bytes(self) -> int:
        """The longest DATAGRAM frame that fits into a packet of the path now; 0 if the other side
        takes none. A longer one would end the connection."""
        if self._core is None or not self._remote_max_datagram_frame_size:
            return 0
        *_, path_bytes = self._core.active_path
        return min(
            path_bytes - _DATAGRAM_OVERHEAD, self._remote_max_datagram_frame_size - _FRAME_OVERHEAD
        )

    @property
    def congestion_room(self) -> int:
        """Bytes that may be sent before something is acknowledged; below 0 if too much was sent."""
        core = self._require_core()
        return core.congestion_window - core.bytes_in_flight

    def datagrams_to_send(self, now: float) -> list[tuple[bytes, Any]]:
        """What to send where. As the library's own, but for what its log costs even when it is off:
        a third of the time that sending takes."""
        if self._core is None:
            return []
        datagrams = []
        poll_transmit = self._core.poll_transmit
        try:
            while (transmit := poll_transmit(now)) is not None:
                datagrams.append((transmit[0], transmit[1]))
        except (RuntimeError, ValueError) as error:
            raise QuicConnectionError(QuicErrorCode.INTERNAL_ERROR, None, str(error)) from None
        return datagrams

    def _call_core(self, operation: Callable[..., _T], *args: Any) -> _T:
        # The door to the native core, which has two errors for one thing.
        try:
            return super()._call_core(operation, *args)
        except ValueError as error:
            raise QuicConnectionError(QuicErrorCode.INTERNAL_ERROR, None, str(error)) from None

    def _create_core(self, remote_addr: Any, initial_dcid: bytes, now: float) -> None:
        if not self._is_peer_anonymous:
            super()._create_core(remote_addr, initial_dcid, now)
            return
        # The core sends to this id until it learns another, and an empty one is never learned.
        # Then our own id must be the one that the client's first packets carry (RFC 9000 7.2 lets
        # a server choose any), and the keys that come from it are derived here.
        self.host_cid = initial_dcid
        super()._create_core(remote_addr, b"", now)
        core = self._require_core()
        secret = HMAC(_INITIAL_SALT, SHA256())
        secret.update(initial_dcid)
        initial_secret = secret.finalize()
        for direction, label in (("receive", b"client in"), ("send", b"server in")):
            traffic_secret = _expand_label(initial_secret, label, 32)
            core.install_packet_key(
                direction,
                0,
                ("aes-128-gcm", "aes-128-ecb"),
                _expand_label(traffic_secret, b"quic key", 16),
                _expand_label(traffic_secret, b"quic iv", 12),
                _expand_label(traffic_secret, b"quic hp", 16),
                0,
                traffic_secret,
                _VERSION_1,
            )

    def _create_tls(self, remote_source_cid: bytes | None) -> Any:
        bridge = super()._create_tls(remote_source_cid)
        if self._is_peer_anonymous:
            bridge.remote_initial_source_connection_id = b""
        return bridge


def _expand_label(secret: bytes, label: bytes, length: int) -> bytes:
    """HKDF-Expand-Label of TLS 1.3 (RFC 8446 7.1) with an empty context."""
    full = b"tls13 " + label
    info = length.to_bytes(2, "big") + bytes([len(full)]) + full + b"\0"
    return HKDFExpand(SHA256(), length, info).derive(secret)
