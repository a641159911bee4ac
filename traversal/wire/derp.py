"""DERP frames, version 2 (DERP specification 4 to 6).

Every frame is a 5-byte header and a body:

    0   1   frame type (FrameType)
    1   4   body length, big-endian, not counting the header
    5   ..  body

| Type               | Direction            | Body                                          |
|--------------------|----------------------|-----------------------------------------------|
| 01 SERVER_KEY      | server to client     | 8 magic, 32 server key                        |
| 02 CLIENT_INFO     | client to server     | 32 client key, 24 nonce, box of JSON          |
| 03 SERVER_INFO     | server to client     | 24 nonce, box of JSON                         |
| 04 SEND_PACKET     | client to server     | 32 destination, payload                       |
| 05 RECV_PACKET     | server to client     | 32 source, payload                            |
| 06 KEEP_ALIVE      | server to client     |                                               |
| 07 NOTE_PREFERRED  | client to server     | 1: not zero if this is the client's home      |
| 08 PEER_GONE       | server to client     | 32 key, 1 reason                              |
| 09 PEER_PRESENT    | server to watcher    | 32 key, 16 IP, 2 port, 1 flags                |
| 0a FORWARD_PACKET  | mesh peer to server  | 32 source, 32 destination, payload            |
| 10 WATCH_CONNS     | mesh peer to server  |                                               |
| 11 CLOSE_PEER      | mesh peer to server  | 32 key                                        |
| 12 PING, 13 PONG   | both                 | 8 opaque                                      |
| 14 HEALTH          | server to client     | UTF-8 text, empty when healthy                |
| 15 RESTARTING      | server to client     | 4 reconnect in ms, 4 try for ms               |

Frames of an unknown type are skipped by both sides; bytes after a known body are room for
extension and are ignored. SEND_PACKET and RECV_PACKET have the same size on purpose: a relay turns
the one into the other in place.
"""

from __future__ import annotations

import enum
import ipaddress
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from traversal.keys import (
    KEY_LENGTH,
    NONCE_LENGTH,
    Box,
    BoxError,
    KeyFormatError,
    MeshKey,
    NodePrivate,
    NodePublic,
)

PROTOCOL_VERSION: Final = 2
MAGIC: Final = b"DERP\xf0\x9f\x94\x91"
HEADER: Final = struct.Struct(">BI")
HEADER_LENGTH: Final = 5

MAX_PACKET_LENGTH: Final = 65536
"""Payload bytes of one packet; more is a local error for a sender, the end for a client."""
MAX_CLIENT_INFO_LENGTH: Final = 262144
MIN_CLIENT_INFO_LENGTH: Final = KEY_LENGTH + NONCE_LENGTH
MIN_PING_LENGTH: Final = 8
MAX_PING_LENGTH: Final = 1000
MIN_SERVER_KEY_LENGTH: Final = len(MAGIC) + KEY_LENGTH
MAX_SERVER_KEY_LENGTH: Final = 1024
MAX_CLIENT_SIDE_LENGTH: Final = 1048576
"""The longest frame that a client reads (DERP specification 4)."""

DISCO_MAGIC: Final = b"TS\xf0\x9f\x92\xac"
MIN_DISCO_LENGTH: Final = 62
"""A payload at least this long that starts with DISCO_MAGIC counts as a disco message."""


class DerpError(ValueError):
    """The other side sent bytes that DERP does not allow; the connection is of no further use."""


class FrameType(enum.IntEnum):
    """First byte of a frame."""

    SERVER_KEY = 0x01
    CLIENT_INFO = 0x02
    SERVER_INFO = 0x03
    SEND_PACKET = 0x04
    RECV_PACKET = 0x05
    KEEP_ALIVE = 0x06
    NOTE_PREFERRED = 0x07
    PEER_GONE = 0x08
    PEER_PRESENT = 0x09
    FORWARD_PACKET = 0x0A
    WATCH_CONNS = 0x10
    CLOSE_PEER = 0x11
    PING = 0x12
    PONG = 0x13
    HEALTH = 0x14
    RESTARTING = 0x15


class GoneReason(enum.IntEnum):
    """Why PEER_GONE was sent (DERP specification 6.8)."""

    DISCONNECTED = 0x00
    NOT_HERE = 0x01


class PresentFlags(enum.IntFlag):
    """What kind of client PEER_PRESENT tells of (DERP specification 6.9)."""

    REGULAR = 0x01
    MESH_PEER = 0x02
    PROBER = 0x04
    NOT_IDEAL = 0x08


def looks_like_disco(payload: bytes | bytearray | memoryview) -> bool:
    """Whether a relay counts this payload as a disco message (DERP specification 7.3)."""
    return len(payload) >= MIN_DISCO_LENGTH and payload[:6] == DISCO_MAGIC


# --- ClientInfo and ServerInfo -------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ClientInfo:
    """What a client says of itself (DERP specification 5.1)."""

    mesh_key: MeshKey | None = None
    version: int = 0
    can_ack_pings: bool = False
    is_prober: bool = False
    app_name: str = ""

    def encode_json(self) -> bytes:
        """The JSON as the reference client writes it."""
        members: dict[str, object] = {}
        if self.mesh_key is not None:
            members["meshKey"] = self.mesh_key.reveal()
        if self.version:
            members["version"] = self.version
        members["CanAckPings"] = self.can_ack_pings
        if self.is_prober:
            members["IsProber"] = True
        if self.app_name:
            members["AppName"] = self.app_name
        return msgspec.json.encode(members)

    @classmethod
    def parse_json(cls, text: bytes) -> ClientInfo:
        """Read what a client wrote. Keys match without regard to case, unknown ones are ignored.

        A mesh key that is not 64 hex digits is an error; a wrong one is for the server to judge.
        Raises DerpError.
        """
        members = _parse_members(text)
        mesh_key = None
        if "meshkey" in members:
            digits = members["meshkey"]
            # No white space here: MeshKey.parse is lenient for key files.
            if not isinstance(digits, str) or len(digits) != 2 * KEY_LENGTH:
                raise DerpError("meshKey is not 64 hex digits")
            try:
                mesh_key = MeshKey.parse(digits)
            except KeyFormatError as error:
                raise DerpError(f"meshKey: {error}") from None
            if not any(mesh_key.raw):
                mesh_key = None  # zero stands for no key, never for a right one
        return cls(
            mesh_key=mesh_key,
            version=_member(members, "version", int, 0),
            can_ack_pings=_member(members, "canackpings", bool, False),
            is_prober=_member(members, "isprober", bool, False),
            app_name=_member(members, "appname", str, ""),
        )


@dataclass(frozen=True, slots=True)
class ServerInfo:
    """What a server says of itself; rates of 0 mean no limit (DERP specification 5.2)."""

    version: int = PROTOCOL_VERSION
    token_bucket_bytes_per_second: int = 0
    token_bucket_bytes_burst: int = 0

    def encode_json(self) -> bytes:
        """The JSON as the reference server writes it; rates only when there are any."""
        members = {"version": self.version}
        if self.token_bucket_bytes_per_second:
            members["TokenBucketBytesPerSecond"] = self.token_bucket_bytes_per_second
            members["TokenBucketBytesBurst"] = self.token_bucket_bytes_burst
        return msgspec.json.encode(members)

    @classmethod
    def parse_json(cls, text: bytes) -> ServerInfo:
        """Read what a server wrote, with the leniency of `ClientInfo.parse_json`."""
        members = _parse_members(text)
        return cls(
            version=_member(members, "version", int, 0),
            token_bucket_bytes_per_second=_member(members, "tokenbucketbytespersecond", int, 0),
            token_bucket_bytes_burst=_member(members, "tokenbucketbytesburst", int, 0),
        )


def _parse_members(text: bytes) -> dict[str, Any]:
    try:
        value = msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise DerpError(f"not JSON: {error}") from None
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise DerpError("the JSON is not an object")
    return {key.lower(): member for key, member in value.items()}


_MAX_NUMBER: Final = (1 << 63) - 1


def _member(members: dict[str, Any], name: str, kind: type, default: Any) -> Any:
    value = members.get(name)
    if value is None:
        return default
    if type(value) is not kind:  # bool is an int in Python, not in JSON
        raise DerpError(f"{name} is not of type {kind.__name__}")
    if isinstance(value, int) and not -_MAX_NUMBER <= value <= _MAX_NUMBER:
        # As the reference; and whoever calculates with what is beyond floats would fail.
        raise DerpError(f"{name} has more than 64 bits")
    return value


# --- Encoding ------------------------------------------------------------------------------------


def encode_frame(frame_type: FrameType, body: bytes = b"") -> bytes:
    """One frame: header and body."""
    return HEADER.pack(frame_type, len(body)) + body


def encode_server_key(server_key: NodePublic) -> bytes:
    """SERVER_KEY: the server's first frame."""
    return encode_frame(FrameType.SERVER_KEY, MAGIC + server_key.raw)


def encode_client_info(
    info: ClientInfo, private_key: NodePrivate, server_key: NodePublic, nonce: bytes
) -> bytes:
    """CLIENT_INFO, sealed to the server. Raises KeyFormatError for an unusable server key."""
    sealed = Box(private_key, server_key).seal(info.encode_json(), nonce)
    return encode_frame(FrameType.CLIENT_INFO, private_key.public().raw + sealed)


def encode_server_info(info: ServerInfo, box: Box, nonce: bytes) -> bytes:
    """SERVER_INFO, sealed to the client whose box this is."""
    return encode_frame(FrameType.SERVER_INFO, box.seal(info.encode_json(), nonce))


def encode_send_packet(destination: NodePublic, payload: bytes) -> bytes:
    """SEND_PACKET. Raises DerpError for a payload above 65536 bytes."""
    if len(payload) > MAX_PACKET_LENGTH:
        raise DerpError(f"a packet has at most {MAX_PACKET_LENGTH} bytes, this has {len(payload)}")
    return encode_frame(FrameType.SEND_PACKET, destination.raw + payload)


def encode_recv_packet(source: NodePublic, payload: bytes) -> bytes:
    """RECV_PACKET."""
    return encode_frame(FrameType.RECV_PACKET, source.raw + payload)


def encode_note_preferred(home: bool) -> bytes:
    """NOTE_PREFERRED: whether this server is the client's home."""
    return encode_frame(FrameType.NOTE_PREFERRED, b"\x01" if home else b"\x00")


def encode_peer_gone(key: bytes, reason: GoneReason) -> bytes:
    """PEER_GONE for the peer with these 32 raw bytes of key."""
    return encode_frame(FrameType.PEER_GONE, key + bytes([reason]))


def encode_peer_present(
    key: bytes, address: ipaddress.IPv4Address | ipaddress.IPv6Address | None, port: int, flags: int
) -> bytes:
    """PEER_PRESENT, 51 bytes of body; all zero where the address is unknown."""
    return encode_frame(
        FrameType.PEER_PRESENT, key + _encode_address(address, port) + bytes([flags])
    )


def encode_forward_packet(source: NodePublic, destination: NodePublic, payload: bytes) -> bytes:
    """FORWARD_PACKET, from one relay of a region to another."""
    return encode_frame(FrameType.FORWARD_PACKET, source.raw + destination.raw + payload)


def encode_close_peer(key: NodePublic) -> bytes:
    """CLOSE_PEER: asks a server to close every connection of this key."""
    return encode_frame(FrameType.CLOSE_PEER, key.raw)


def encode_ping(data: bytes) -> bytes:
    """PING with 8 opaque bytes."""
    return encode_frame(FrameType.PING, data)


def encode_pong(data: bytes) -> bytes:
    """PONG with the 8 bytes of the ping."""
    return encode_frame(FrameType.PONG, data)


def encode_health(problem: str) -> bytes:
    """HEALTH: a problem in words, or empty when there is none any more."""
    return encode_frame(FrameType.HEALTH, problem.encode())


def encode_restarting(reconnect_in_ms: int, try_for_ms: int) -> bytes:
    """RESTARTING: reconnect after so many milliseconds, keep trying for so many."""
    return encode_frame(FrameType.RESTARTING, struct.pack(">II", reconnect_in_ms, try_for_ms))


KEEP_ALIVE: Final = encode_frame(FrameType.KEEP_ALIVE)
WATCH_CONNS: Final = encode_frame(FrameType.WATCH_CONNS)


def _encode_address(
    address: ipaddress.IPv4Address | ipaddress.IPv6Address | None, port: int
) -> bytes:
    if address is None:
        return bytes(18)
    packed = address.packed
    if len(packed) == 4:
        packed = bytes(10) + b"\xff\xff" + packed
    return packed + struct.pack(">H", port)


# --- What a client receives ----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class RecvPacket:
    """A packet from a peer."""

    source: NodePublic
    payload: bytes


@dataclass(frozen=True, slots=True)
class KeepAlive:
    """The server is still there."""


@dataclass(frozen=True, slots=True)
class PeerGone:
    """A peer left the region, or was never there; `reason` may be one we don't know."""

    key: NodePublic
    reason: int


@dataclass(frozen=True, slots=True)
class PeerPresent:
    """A client is connected; `flags` is 0 from servers that don't send them."""

    key: NodePublic
    address: ipaddress.IPv4Address | ipaddress.IPv6Address | None = None
    port: int = 0
    flags: int = 0


@dataclass(frozen=True, slots=True)
class Ping:
    """To be answered with a Pong of the same data."""

    data: bytes


@dataclass(frozen=True, slots=True)
class Pong:
    """The answer to our Ping of this data."""

    data: bytes


@dataclass(frozen=True, slots=True)
class Health:
    """The server has a problem; empty when it has none any more."""

    problem: str


@dataclass(frozen=True, slots=True)
class Restarting:
    """The server goes away; milliseconds as in `encode_restarting`."""

    reconnect_in_ms: int
    try_for_ms: int


ServerFrame = RecvPacket | KeepAlive | PeerGone | PeerPresent | Ping | Pong | Health | Restarting


def maybe_parse_server_frame(frame_type: int, body: bytes) -> ServerFrame | None:
    """What a server sent after the handshake; None for what a client skips.

    Skipped are unknown types, a repeated SERVER_KEY (fast start), and frames shorter than their
    fixed part (DERP specification 6): the connection stays.
    """
    match frame_type:
        case FrameType.RECV_PACKET if len(body) >= KEY_LENGTH:
            return RecvPacket(NodePublic(body[:KEY_LENGTH]), body[KEY_LENGTH:])
        case FrameType.KEEP_ALIVE:
            return KeepAlive()
        case FrameType.PEER_GONE if len(body) >= KEY_LENGTH:
            reason = body[KEY_LENGTH] if len(body) > KEY_LENGTH else GoneReason.DISCONNECTED
            return PeerGone(NodePublic(body[:KEY_LENGTH]), reason)
        case FrameType.PEER_PRESENT if len(body) >= KEY_LENGTH:
            return _parse_peer_present(body)
        case FrameType.PING if len(body) >= MIN_PING_LENGTH:
            return Ping(body[:MIN_PING_LENGTH])
        case FrameType.PONG if len(body) >= MIN_PING_LENGTH:
            return Pong(body[:MIN_PING_LENGTH])
        case FrameType.HEALTH:
            return Health(body.decode(errors="replace"))
        case FrameType.RESTARTING if len(body) >= 8:
            return Restarting(*struct.unpack_from(">II", body))
        case _:
            return None


def _parse_peer_present(body: bytes) -> PeerPresent:
    key = NodePublic(body[:KEY_LENGTH])
    if len(body) < 50:
        return PeerPresent(key)
    packed = body[32:48]
    address: ipaddress.IPv4Address | ipaddress.IPv6Address | None = None
    if any(packed):
        address = ipaddress.IPv6Address(packed)
        address = address.ipv4_mapped or address
    return PeerPresent(
        key, address, int.from_bytes(body[48:50], "big"), body[50] if len(body) > 50 else 0
    )


def parse_server_key(body: bytes) -> NodePublic:
    """The body of SERVER_KEY. Raises DerpError."""
    if not MIN_SERVER_KEY_LENGTH <= len(body) <= MAX_SERVER_KEY_LENGTH:
        raise DerpError(f"SERVER_KEY has {len(body)} bytes, not 40 to {MAX_SERVER_KEY_LENGTH}")
    if body[: len(MAGIC)] != MAGIC:
        raise DerpError("SERVER_KEY lacks the DERP magic: this is not a DERP server")
    return NodePublic(body[len(MAGIC) : MIN_SERVER_KEY_LENGTH])


def parse_server_info(body: bytes, box: Box) -> ServerInfo:
    """The body of SERVER_INFO. Raises DerpError."""
    try:
        return ServerInfo.parse_json(box.open(body))
    except BoxError as error:
        raise DerpError(f"SERVER_INFO: {error}") from None


def parse_client_info(body: bytes, private_key: NodePrivate) -> tuple[NodePublic, ClientInfo, Box]:
    """The body of CLIENT_INFO: the proven key, what it says, and the box to answer with.

    Raises DerpError.
    """
    if not MIN_CLIENT_INFO_LENGTH <= len(body) <= MAX_CLIENT_INFO_LENGTH:
        raise DerpError(f"CLIENT_INFO has {len(body)} bytes, not 56 to {MAX_CLIENT_INFO_LENGTH}")
    key = NodePublic(bytes(body[:KEY_LENGTH]))
    try:
        box = Box(private_key, key)
        text = box.open(bytes(body[KEY_LENGTH:]))
    except (BoxError, KeyFormatError) as error:
        raise DerpError(f"CLIENT_INFO: {error}") from None
    return key, ClientInfo.parse_json(text), box


class FrameSplitter:
    """Cuts a byte stream into frames; for clients and tests (a relay's own path is faster).

    Feed with `receive_data`, then iterate `frames()` until it ends; what is incomplete waits.
    At most `max_length` bytes of one body are ever held.
    """

    __slots__ = ("_buffer", "_max_length")

    def __init__(self, max_length: int = MAX_CLIENT_SIDE_LENGTH) -> None:
        self._buffer = bytearray()
        self._max_length = max_length

    def receive_data(self, data: bytes | bytearray | memoryview) -> None:
        """Add bytes from the stream."""
        self._buffer += data

    def frames(self) -> Iterator[tuple[int, bytes]]:
        """Complete frames as (type, body). Raises DerpError for one that is too long."""
        buffer = self._buffer
        position = 0
        try:
            while len(buffer) - position >= HEADER_LENGTH:
                frame_type, length = HEADER.unpack_from(buffer, position)
                if length > self._max_length:
                    raise DerpError(f"a frame of {length} bytes is above {self._max_length}")
                end = position + HEADER_LENGTH + length
                if end > len(buffer):
                    break
                body = bytes(buffer[position + HEADER_LENGTH : end])
                position = end
                yield frame_type, body
        finally:
            del buffer[:position]

    def take_rest(self) -> bytes:
        """The bytes of the incomplete frame, for whoever reads the stream from here on."""
        rest = bytes(self._buffer)
        self._buffer.clear()
        return rest
