"""Parameters and results of the registration methods (edge tunnel specification 7.3, 7.5).

The interface is `rpc.REGISTRATION_SERVER`; the connector calls, the edge answers. Layouts (words of
data/pointers):

* registerConnection 1/3: connIndex u8@0; p0 TunnelAuth 0/2 (account tag, secret), p1 tunnel id,
  p2 ConnectionOptions
* ConnectionOptions 1/2: replaceExisting bit 0, compressionQuality u8@1, numPreviousAttempts u8@2;
  p0 ClientInfo 0/4 (id, features, version, arch), p1 origin local IP
* its results 0/1: ConnectionResponse 1/1: which u16@0 (0 error, 1 details)
* ConnectionError 2/1: retryAfter i64@0 in ns, shouldRetry bit 64; p0 cause
* ConnectionDetails 1/2: remotely managed bit 0; p0 connection id, p1 location
* unregisterConnection 0/0 and its results 0/0
* updateLocalConfiguration 0/1: p0 JSON; its results 0/0
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Final
from uuid import UUID

from traversal.wire.tunnel.capnp import Struct, blob_node, text_node
from traversal.wire.tunnel.errors import TunnelError


class RegistrationMethod(IntEnum):
    """Methods of `rpc.REGISTRATION_SERVER`."""

    REGISTER_CONNECTION = 0
    UNREGISTER_CONNECTION = 1
    UPDATE_LOCAL_CONFIGURATION = 2


FEATURE_SERIALIZED_HEADERS: Final = "serialized_headers"
FEATURE_ALLOW_REMOTE_CONFIG: Final = "allow_remote_config"
FEATURE_DATAGRAM_V2: Final = "support_datagram_v2"
FEATURE_DATAGRAM_V3: Final = "support_datagram_v3_2"
FEATURE_QUIC_EOF: Final = "support_quic_eof"
FEATURE_MANAGEMENT_LOGS: Final = "management_logs"
FEATURE_PEERS: Final = "underpass_peers"
"""Ours: the connection carries peers' packets and gets no requests."""
FEATURE_DRAIN: Final = "underpass_drain"
"""Ours: the end of the control stream means that the connection will be closed when it is idle, and
is to be replaced."""

DUPLICATE_CONNECTION: Final = "EDUPCONN"
"""The cause that makes a connector try another address (specification 6.6)."""

EMPTY_RESULTS: Final = Struct()
"""Of the methods that return nothing."""


@dataclass(frozen=True, slots=True)
class ConnectionOptions:
    """What a connector says of itself.

    Attributes:
        client_id: the connector's id, new at each start of its process.
        origin_local_ip: 4 or 16 bytes, or none; do not rely on it.
        previous_attempts: failed ones before this, at most 255.
    """

    client_id: UUID
    features: tuple[str, ...] = ()
    version: str = ""
    arch: str = ""
    origin_local_ip: bytes = b""
    replace_existing: bool = False
    compression_quality: int = 0
    previous_attempts: int = 0


@dataclass(frozen=True, slots=True)
class RegisterConnection:
    """A connector asks to serve a tunnel over this connection."""

    account_tag: str
    tunnel_secret: bytes = field(repr=False)
    tunnel_id: UUID
    connection_index: int
    options: ConnectionOptions

    def to_struct(self) -> Struct:
        """The parameters of the call."""
        options = self.options
        auth = Struct(pointers=(text_node(self.account_tag), blob_node(self.tunnel_secret)))
        client = Struct(
            pointers=(
                options.client_id.bytes,
                tuple(text_node(feature) for feature in options.features),
                text_node(options.version),
                text_node(options.arch),
            )
        )
        flags = bytes(
            [
                options.replace_existing,
                options.compression_quality,
                min(options.previous_attempts, 255),
            ]
        )
        return Struct(
            bytes([self.connection_index]) + bytes(7),
            (
                auth,
                self.tunnel_id.bytes,
                Struct(flags + bytes(5), (client, blob_node(options.origin_local_ip))),
            ),
        )

    @classmethod
    def from_struct(cls, params: Struct) -> RegisterConnection:
        """Raises TunnelError."""
        auth, options = params.struct(0), params.struct(2)
        client = options.struct(0)
        return cls(
            account_tag=auth.text(0),
            tunnel_secret=auth.blob(1),
            tunnel_id=_uuid(params.blob(1), "tunnel id"),
            connection_index=params.u8(0),
            options=ConnectionOptions(
                client_id=_uuid(client.blob(0), "connector id"),
                features=client.texts(1),
                version=client.text(2),
                arch=client.text(3),
                origin_local_ip=options.blob(1),
                replace_existing=options.bit(0),
                compression_quality=options.u8(1),
                previous_attempts=options.u8(2),
            ),
        )


@dataclass(frozen=True, slots=True)
class ConnectionDetails:
    """The registration succeeded."""

    connection_id: UUID
    location: str
    is_remotely_managed: bool = False

    def to_struct(self) -> Struct:
        """The results of the call."""
        details = Struct(
            bytes([self.is_remotely_managed]) + bytes(7),
            (self.connection_id.bytes, text_node(self.location)),
        )
        return Struct(pointers=(Struct(struct.pack("<Q", 1), (details,)),))


@dataclass(frozen=True, slots=True)
class ConnectionRefusal:
    """The registration failed; `retry_after_ns` is advice that the reference ignores."""

    cause: str
    should_retry: bool = False
    retry_after_ns: int = 0

    def to_struct(self) -> Struct:
        """The results of the call."""
        error = Struct(
            struct.pack("<qQ", self.retry_after_ns, self.should_retry), (text_node(self.cause),)
        )
        return Struct(pointers=(Struct(bytes(8), (error,)),))


def parse_register_results(results: Struct) -> ConnectionDetails | ConnectionRefusal:
    """The results of registerConnection. Raises TunnelError."""
    response = results.struct(0)
    match response.u16(0):
        case 0:
            error = response.struct(0)
            return ConnectionRefusal(error.text(0), error.bit(64), error.i64(0))
        case 1:
            details = response.struct(0)
            return ConnectionDetails(
                _uuid(details.blob(0), "connection id"), details.text(1), details.bit(0)
            )
        case which:
            raise TunnelError(f"registration: an answer of the unknown kind {which}")


@dataclass(frozen=True, slots=True)
class UpdateLocalConfiguration:
    """A connector that is not remotely managed reports its configuration (JSON)."""

    configuration: bytes

    def to_struct(self) -> Struct:
        """The parameters of the call."""
        return Struct(pointers=(blob_node(self.configuration),))

    @classmethod
    def from_struct(cls, params: Struct) -> UpdateLocalConfiguration:
        """Raises TunnelError."""
        return cls(params.blob(0))


def _uuid(raw: bytes, what: str) -> UUID:
    if len(raw) != 16:
        raise TunnelError(f"registration: a {what} of {len(raw)} bytes instead of 16")
    return UUID(bytes=raw)
