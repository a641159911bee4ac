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
from qh3._hazmat import Buffer, QuicConnectionCore
from qh3.quic.configuration import QuicConfiguration
from qh3.quic.connection import QuicConnection as _Connection
from qh3.quic.connection import QuicConnectionError
from qh3.quic.packet import (
    QuicErrorCode,
    encode_quic_retry,
    pull_quic_transport_parameters,
    push_quic_transport_parameters,
)
from qh3.quic.tls_bridge import QuicTlsBridge

MIN_INITIAL_BYTES: Final = 1200
"""A client pads its first datagram to this (RFC 9000 14.1), so that our answer is no amplifier."""
MAX_CONNECTION_ID_BYTES: Final = 20
MAX_STREAMS: Final = 100
RETRY_TOKEN_SECONDS: Final = 10.0
_NO_ROOM: Final = "packet builder capacity exhausted"

_T = TypeVar("_T")
_VERSION_1: Final = 1
_UNI_STREAMS: Final = 103
"""What the library says that it allows; nobody uses these here."""
_MAX_PARAMETERS_BYTES: Final = 1024
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

    Calls as in qh3, but `receive_run` and `take_datagrams` for many datagrams.

    The core extends flow control credit for whatever was taken from it, all streams alike: a single
    one can't be held back, so whoever reads a stream slowly needs room elsewhere (`Spool`).
    """

    def __init__(
        self,
        configuration: QuicConfiguration,
        initial: InitialHeader | None = None,
        *,
        original_id: bytes | None = None,
        max_streams: int = MAX_STREAMS,
    ) -> None:
        """`initial` and, if that answered a Retry, `original_id` are for servers; the other side
        may have `max_streams` bidirectional streams open at a time."""
        self._max_streams = max_streams
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
    def may_open_stream(self) -> bool:
        """Whether the other side allows one more bidirectional stream of ours now."""
        if self._core is None:
            return False
        limit, _, opened, _ = self._core.stream_limits
        return opened < limit

    @property
    def congestion_room(self) -> int:
        """Bytes that may be sent before something is acknowledged; below 0 if too much was sent."""
        core = self._require_core()
        return core.congestion_window - core.bytes_in_flight

    @property
    def round_trip_seconds(self) -> float:
        """Smoothed (RFC 9002 5.3)."""
        return self._require_core().smoothed_rtt or self.configuration.initial_rtt

    def receive_run(self, run: bytes, step: int, address: Any, now: float) -> None:
        """Datagrams of one sender, joined, all of `step` bytes but the last. Faster than the
        library's calls, which look at each in Python, for a log."""
        if self._core is None or not self._handshake_complete:
            for at in range(0, len(run), step):
                self.receive_datagram(run[at : at + step], address, now)
        else:
            self._call_core(self._core.receive_gro_buffer, run, step, address, now)
            self._drain_core()

    def take_datagrams(self, now: float, max_count: int) -> list[tuple[Any, list[bytes]]]:
        """Some of what is to be sent: where, and what. The library's own call sends without limit
        and spends a third of its time on a log that is off."""
        taken: list[tuple[Any, list[bytes]]] = []
        if self._core is None:
            return taken
        poll_transmit = self._core.poll_transmit
        last, datagrams = None, list[bytes]()
        try:
            for _ in range(max_count):
                transmit = poll_transmit(now)
                if transmit is None:
                    break
                if transmit[1] != last:
                    last, datagrams = transmit[1], []
                    taken.append((last[:2], datagrams))
                datagrams.append(transmit[0])
        except (RuntimeError, ValueError) as error:
            # So the core says, too, that it may send no more to an address that is not validated
            # (RFC 9000 8.1): a long certificate goes on when the client has sent again.
            if self._handshake_complete or str(error) != _NO_ROOM:
                raise QuicConnectionError(QuicErrorCode.INTERNAL_ERROR, None, str(error)) from None
        return taken

    def _call_core(self, operation: Callable[..., _T], *args: Any) -> _T:
        # The door to the native core, which has two errors for one thing.
        try:
            return super()._call_core(operation, *args)
        except ValueError as error:
            raise QuicConnectionError(QuicErrorCode.INTERNAL_ERROR, None, str(error)) from None

    def _create_core(self, remote_addr: Any, initial_dcid: bytes, now: float) -> None:
        # As the library's own, but for the streams, of which it would allow 100, and for the
        # connection id of clients that have none. We never resume sessions.
        configuration = self.configuration
        if self._is_peer_anonymous:
            # The core sends to this id until it learns another, and an empty one is never learned.
            # Then our own id must be the one that the client's first packets carry (RFC 9000 7.2
            # lets a server choose any), and the keys that come from it are derived here.
            self.host_cid = initial_dcid
        core = self._core = QuicConnectionCore(
            is_client=configuration.is_client,
            version=_VERSION_1,
            local_addr=("0.0.0.0", 0),
            remote_addr=remote_addr,
            source_cid=self.host_cid,
            destination_cid=b"" if self._is_peer_anonymous else initial_dcid,
            peer_address_validated=configuration.is_client
            or self._retry_source_connection_id is not None,
            active_connection_id_limit=2 if configuration.is_client else 8,
            max_datagram_size=configuration.max_datagram_size,
            probe_datagram_size=configuration.probe_datagram_size,
            idle_timeout=configuration.idle_timeout,
            ack_delay_exponent=3,
            max_datagram_frame_size=configuration.max_datagram_frame_size,
            peer_max_datagram_frame_size=None,
            connection_receive_window=configuration.max_data,
            connection_send_limit=0,
            stream_receive_window=configuration.max_stream_data,
            stream_send_limit_bidi_local=0,
            stream_send_limit_bidi_remote=0,
            stream_send_limit_uni=0,
            max_stream_reassembly=configuration.max_stream_data,
            local_max_streams_bidi=self._max_streams,
            local_max_streams_uni=_UNI_STREAMS,
            peer_max_streams_bidi=0,
            peer_max_streams_uni=0,
            initial_rtt=configuration.initial_rtt,
            max_ack_delay=0.025,
            initial_time=now,
        )
        self._applied_transport_parameters = None
        self._pre_handshake_state_replayed = False
        if not self._is_peer_anonymous:
            return
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

    def _create_tls(self, remote_source_cid: bytes | None) -> QuicTlsBridge:
        self._tls = tls = _Tls(
            self._max_streams,
            self.configuration,
            version=_VERSION_1,
            local_initial_source_connection_id=self.host_cid,
            remote_initial_source_connection_id=b""
            if self._is_peer_anonymous
            else remote_source_cid,
            original_destination_connection_id=self._original_destination_connection_id,
            retry_source_connection_id=self._retry_source_connection_id,
            version_change_handler=self._set_version,
        )
        return tls


class _Tls(QuicTlsBridge):
    """The library's, but for the number of streams."""

    def __init__(self, max_streams: int, *args: Any, **options: Any) -> None:
        self._max_streams = max_streams
        super().__init__(*args, **options)

    def serialize_transport_parameters(self) -> bytes:
        parameters = pull_quic_transport_parameters(
            Buffer(data=super().serialize_transport_parameters())
        )
        parameters.initial_max_streams_bidi = self._max_streams
        buffer = Buffer(capacity=_MAX_PARAMETERS_BYTES)
        push_quic_transport_parameters(buffer, parameters)
        return bytes(buffer.data)


def _expand_label(secret: bytes, label: bytes, length: int) -> bytes:
    """HKDF-Expand-Label of TLS 1.3 (RFC 8446 7.1) with an empty context."""
    full = b"tls13 " + label
    info = length.to_bytes(2, "big") + bytes([len(full)]) + full + b"\0"
    return HKDFExpand(SHA256(), length, info).derive(secret)
