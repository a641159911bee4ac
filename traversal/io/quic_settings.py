"""How the tunnel's two ends configure QUIC (edge tunnel specification 3, 6.1)."""

from __future__ import annotations

from typing import Final

from qh3.quic.configuration import QuicConfiguration

ALPN: Final = "argotunnel"
SERVER_NAME: Final = "quic.cftunnel.com"
IDLE_SECONDS: Final = 5.0
KEEP_ALIVE_SECONDS: Final = 1.0
"""Of the connector; so both sides notice within 5 s that the other is gone."""

CONNECTOR_STREAMS: Final = 1 << 14
"""That the edge may have open at a time: requests, websockets and TCP connections. Each costs the
connector memory, so an edge may not have any number, unlike the reference's."""

_EDGE_PACKET_BYTES: Final = 1372
"""Fits into an MTU of 1400 with IPv4, 1420 with IPv6, and holds the longest datagram of a UDP flow
(1297 bytes); on narrower paths IP fragments it."""
_CONNECTOR_PACKET_BYTES: Final = 1232
"""Fits into the least MTU of IPv6; the connector searches upward from there."""
_DATAGRAM_FRAME_BYTES: Final = 65536
_STREAM_WINDOW: Final = 6 << 20
_CONNECTION_WINDOW: Final = 30 << 20
"""What the reference allows at most; as receiver it needs time to get there, we don't."""


def edge_configuration(chain_pem: bytes, key_pem: bytes) -> QuicConfiguration:
    """For the edge's listener. Raises ValueError for what is no certificate chain and its key."""
    configuration = QuicConfiguration(
        is_client=False,
        alpn_protocols=[ALPN],
        idle_timeout=IDLE_SECONDS,
        max_datagram_size=_EDGE_PACKET_BYTES,
        max_datagram_frame_size=_DATAGRAM_FRAME_BYTES,
        max_data=_CONNECTION_WINDOW,
        max_stream_data=_STREAM_WINDOW,
    )
    configuration.load_cert_chain(chain_pem, key_pem)
    return configuration


def connector_configuration(
    ca_file: str | None, server_name: str = SERVER_NAME
) -> QuicConfiguration:
    """For a connector's connections; without a file the system's authorities are trusted."""
    return QuicConfiguration(
        alpn_protocols=[ALPN],
        server_name=server_name,
        cafile=ca_file,
        idle_timeout=IDLE_SECONDS,
        max_datagram_size=_CONNECTOR_PACKET_BYTES,
        max_datagram_frame_size=_DATAGRAM_FRAME_BYTES,
        max_data=_CONNECTION_WINDOW,
        max_stream_data=_STREAM_WINDOW,
    )
