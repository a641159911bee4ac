"""Parameters and results of what the edge calls on a connector over QUIC (specification 7.3, 7.5).

Layouts (words of data/pointers):

* `rpc.SESSION_MANAGER`, registerUdpSession 2/3: dstPort u16@0, closeAfterIdleHint i64@8 in ns;
  p0 session id, p1 dstIp (4 or 16 bytes), p2 trace context. Results 0/1: p0 response 0/2: p0 err,
  p1 spans
* unregisterUdpSession 0/2: p0 session id, p1 message; results 0/0. The connector calls it, too
* `rpc.CONFIGURATION_MANAGER`, updateConfiguration 1/1: version i32@0; p0 JSON. Results 0/1: p0
  response 1/1: latestAppliedVersion i32@0; p0 err
"""

from __future__ import annotations

import ipaddress
import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import Final
from uuid import UUID

from traversal.wire.tunnel.capnp import Struct, blob_node, text_node
from traversal.wire.tunnel.errors import TunnelError

UPDATE_CONFIGURATION: Final = 0
"""The method of `rpc.CONFIGURATION_MANAGER`."""


class SessionMethod(IntEnum):
    """Methods of `rpc.SESSION_MANAGER`."""

    REGISTER_UDP_SESSION = 0
    UNREGISTER_UDP_SESSION = 1


@dataclass(frozen=True, slots=True)
class RegisterUdpSession:
    """Open a UDP flow, datagram version 2; idle time 0 stands for 210 s."""

    session_id: UUID
    host: str
    port: int
    close_after_idle_ns: int = 0
    trace_context: str = ""

    def to_struct(self) -> Struct:
        """The parameters of the call."""
        return Struct(
            struct.pack("<H6xq", self.port, self.close_after_idle_ns),
            (
                self.session_id.bytes,
                ipaddress.ip_address(self.host).packed,
                text_node(self.trace_context),
            ),
        )

    @classmethod
    def from_struct(cls, params: Struct) -> RegisterUdpSession:
        """Raises TunnelError."""
        raw = params.blob(1)
        if len(raw) not in (4, 16):
            raise TunnelError(f"session: an address of {len(raw)} bytes")
        return cls(
            session_id=_session_id(params.blob(0)),
            host=str(ipaddress.ip_address(raw)),
            port=params.u16(0),
            close_after_idle_ns=params.i64(8),
            trace_context=params.text(2),
        )


@dataclass(frozen=True, slots=True)
class RegisterUdpSessionResponse:
    """Empty `error`: the flow is open."""

    error: str = ""
    spans: bytes = b""

    def to_struct(self) -> Struct:
        """The results of the call."""
        return Struct(pointers=(Struct(pointers=(text_node(self.error), blob_node(self.spans))),))

    @classmethod
    def from_struct(cls, results: Struct) -> RegisterUdpSessionResponse:
        """Raises TunnelError."""
        response = results.struct(0)
        return cls(response.text(0), response.blob(1))


@dataclass(frozen=True, slots=True)
class UnregisterUdpSession:
    """A UDP flow has ended, or is to."""

    session_id: UUID
    message: str = ""

    def to_struct(self) -> Struct:
        """The parameters of the call."""
        return Struct(pointers=(self.session_id.bytes, text_node(self.message)))

    @classmethod
    def from_struct(cls, params: Struct) -> UnregisterUdpSession:
        """Raises TunnelError."""
        return cls(_session_id(params.blob(0)), params.text(1))


@dataclass(frozen=True, slots=True)
class UpdateConfiguration:
    """Push a configuration document (JSON, specification 12.2)."""

    version: int
    configuration: bytes

    def to_struct(self) -> Struct:
        """The parameters of the call."""
        return Struct(struct.pack("<i4x", self.version), (blob_node(self.configuration),))

    @classmethod
    def from_struct(cls, params: Struct) -> UpdateConfiguration:
        """Raises TunnelError."""
        return cls(params.i32(0), params.blob(0))


@dataclass(frozen=True, slots=True)
class UpdateConfigurationResponse:
    """The version in use now, which may be newer than the pushed one."""

    latest_applied_version: int
    error: str = ""

    def to_struct(self) -> Struct:
        """The results of the call."""
        response = Struct(
            struct.pack("<i4x", self.latest_applied_version), (text_node(self.error),)
        )
        return Struct(pointers=(response,))

    @classmethod
    def from_struct(cls, results: Struct) -> UpdateConfigurationResponse:
        """Raises TunnelError."""
        response = results.struct(0)
        return cls(response.i32(0), response.text(0))


def _session_id(raw: bytes) -> UUID:
    if len(raw) != 16:
        raise TunnelError(f"session: an id of {len(raw)} bytes instead of 16")
    return UUID(bytes=raw)
