"""From a fresh TLS (or TCP) connection to DERP frames, the client's way (DERP specification 3, 5).

Slow start: the client sends an HTTP request, the server answers 101 and its SERVER_KEY frame, the
client sends CLIENT_INFO. Fast start: the client already knows the server's key from the meta
certificate, so it sends request and CLIENT_INFO at once, and the server leaves the 101 out.

`ClientHandshake` is the client's side of both, without I/O.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from traversal.keys import Box, KeyFormatError, NodePrivate, NodePublic
from traversal.wire.derp import (
    PROTOCOL_VERSION,
    ClientInfo,
    DerpError,
    FrameSplitter,
    FrameType,
    ServerInfo,
    encode_client_info,
    parse_server_info,
    parse_server_key,
)

META_CERTIFICATE_PREFIX: Final = b"derpkey"
MAX_RESPONSE_HEAD_LENGTH: Final = 16384
"""More HTTP header than this before the blank line is not a DERP server's answer."""


def encode_upgrade_request(
    host: str, *, fast_start: bool = False, ideal_node: str = "", token: str = ""
) -> bytes:
    """The request for `/derp`. `host` carries the port where it is not the scheme's default.

    `ideal_node` names the node that the client would rather have reached; `token` is an admission
    token of an Underpass relay. Raises ValueError for a line break in any of them.
    """
    lines = [f"GET /derp HTTP/1.1\r\nHost: {host}\r\nConnection: Upgrade"]
    if fast_start:
        lines.append("Derp-Fast-Start: 1")
    lines.append("Upgrade: DERP")
    if ideal_node:
        lines.append(f"Ideal-Node: {ideal_node}")
    if token:
        lines.append(f"Authorization: Bearer {token}")
    for value in (host, ideal_node, token):
        if "\r" in value or "\n" in value:
            raise ValueError("an HTTP header value must not hold a line break")
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


def encode_upgrade_response(server_key: NodePublic) -> bytes:
    """The server's 101, byte for byte as derper writes it."""
    return (
        "HTTP/1.1 101 Switching Protocols\r\n"
        "Upgrade: DERP\r\n"
        "Connection: Upgrade\r\n"
        f"Derp-Version: {PROTOCOL_VERSION}\r\n"
        f"Derp-Public-Key: {server_key.raw.hex()}\r\n"
        "\r\n"
    ).encode()


def maybe_server_key_from_certificates(certificates: Iterable[bytes]) -> NodePublic | None:
    """The server's key from its meta certificate, None where a slow start is needed.

    `certificates` is the presented chain in DER. All of them are looked through; neither dates nor
    signature are checked (DERP specification 3.3). Only trust the answer under TLS 1.3, where
    certificates are hidden from the network path.
    """
    for der in certificates:
        serial, names = _serial_and_common_names(der)
        for name in names:
            if not name.startswith(META_CERTIFICATE_PREFIX) or not 0 < serial < 256:
                continue
            try:
                return NodePublic.from_hex(name[len(META_CERTIFICATE_PREFIX) :].decode("ascii"))
            except (KeyFormatError, UnicodeDecodeError):
                continue
    return None


# A meta certificate's 71-character common name is above X.520's bound of 64, at which certificate
# libraries balk, so the two fields we need are read from the DER by hand.
_COMMON_NAME_OID: Final = bytes.fromhex("0603550403")


def _serial_and_common_names(der: bytes) -> tuple[int, list[bytes]]:
    """Serial number and subject common names; (0, []) for what is no certificate."""
    try:
        (certificate,) = _der_items(der)[:1]
        fields = _der_items(_der_items(certificate[1])[0][1])
        if fields[0][0] == 0xA0:  # the explicit version tag is optional
            fields = fields[1:]
        serial = int.from_bytes(fields[0][1], "big")
        names = []
        for _, relative_name in _der_items(fields[4][1]):
            for _, attribute in _der_items(relative_name):
                if attribute.startswith(_COMMON_NAME_OID):
                    names.append(_der_items(attribute)[1][1])
    except (IndexError, ValueError):
        return 0, []
    return serial, names


def _der_items(data: bytes) -> list[tuple[int, bytes]]:
    """The (tag, content) pairs of a DER sequence's content. Raises ValueError, IndexError."""
    items = []
    position = 0
    while position < len(data):
        tag, length = data[position], data[position + 1]
        position += 2
        if length & 0x80:
            size = length & 0x7F
            length = int.from_bytes(data[position : position + size], "big")
            position += size
        if position + length > len(data):
            raise ValueError("DER item longer than its container")
        items.append((tag, data[position : position + length]))
        position += length
    return items


class ClientHandshake:
    """The client's side of the handshake, without I/O.

    Send what `first_flight()` returns, then pass every byte that arrives to `receive_data()` and
    send what that returns, until `server_info` is set. After that the stream is frames: keep
    feeding `splitter`.

    Args:
        private_key: the client's node key.
        host: for the HTTP Host header.
        info: what to tell the server.
        nonce: 24 random bytes, never used before.
        server_key: from the meta certificate; None for a slow start.
    """

    def __init__(
        self,
        private_key: NodePrivate,
        host: str,
        *,
        info: ClientInfo,
        nonce: bytes,
        server_key: NodePublic | None = None,
        ideal_node: str = "",
        token: str = "",
    ) -> None:
        self._private_key = private_key
        self._info = info
        self._nonce = nonce
        self._request = encode_upgrade_request(
            host, fast_start=server_key is not None, ideal_node=ideal_node, token=token
        )
        # What came of the HTTP response's head; None once it is complete, or not expected.
        self._head: bytearray | None = bytearray() if server_key is None else None
        self.server_key = server_key
        self.server_info: ServerInfo | None = None
        self.splitter = FrameSplitter()

    def first_flight(self) -> bytes:
        """The bytes that open the conversation."""
        if self.server_key is None:
            return self._request
        return self._request + self._encode_client_info(self.server_key)

    def receive_data(self, data: bytes) -> bytes:
        """Take bytes from the server, return bytes for it. Raises DerpError."""
        if self._head is not None:
            head = self._head
            head += data
            end = head.find(b"\r\n\r\n")
            if end < 0:
                if len(head) > MAX_RESPONSE_HEAD_LENGTH:
                    raise DerpError("no end of the HTTP response head within 16 KiB")
                return b""
            _check_response_head(bytes(head[:end]))
            data = bytes(head[end + 4 :])
            self._head = None
        self.splitter.receive_data(data)
        if self.server_info is not None:
            return b""
        answer = b""
        for frame_type, body in self.splitter.frames():
            answer += self._handle_frame(frame_type, body)
            if frame_type == FrameType.SERVER_INFO:
                break
        return answer

    def _handle_frame(self, frame_type: int, body: bytes) -> bytes:
        if frame_type == FrameType.SERVER_KEY:
            key = parse_server_key(body)
            if self.server_key is None:
                self.server_key = key
                return self._encode_client_info(key)
            return b""  # fast start: we are past that
        if frame_type != FrameType.SERVER_INFO or self.server_key is None:
            raise DerpError(f"frame type {frame_type:#04x} came before the handshake was over")
        self.server_info = parse_server_info(body, Box(self._private_key, self.server_key))
        return b""

    def _encode_client_info(self, server_key: NodePublic) -> bytes:
        try:
            return encode_client_info(self._info, self._private_key, server_key, self._nonce)
        except KeyFormatError as error:
            raise DerpError(f"the server's key: {error}") from None


def _check_response_head(head: bytes) -> None:
    status_line = head.split(b"\r\n", 1)[0].decode("latin-1")
    parts = status_line.split(" ", 2)
    if len(parts) < 2 or not parts[0].startswith("HTTP/1."):
        raise DerpError("the answer is not HTTP/1.x")
    if parts[1] != "101":
        raise DerpError(f"the server refused the upgrade to DERP: {status_line!r}")
