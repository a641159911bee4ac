"""Peers' packets through the edge: between our own connectors and edges only.

A connection that registers with the feature `FEATURE_PEERS` gets no requests. Instead the edge
opens one stream to it, which it marks: over HTTP/2 by the value `PEERS` of the upgrade header, over
QUIC by `PEERS_SIGNATURE` at its start. On it both speak DERP's frames as a relay and its client do,
from SERVER_KEY on (DERP specification 5, 6): so the edge knows that the node has the key that it
names. Over QUIC a packet's frame, whole, travels in a DATAGRAM where it fits into one, and on the
stream where not.
"""

from __future__ import annotations

from typing import Final

from traversal.keys import KEY_LENGTH
from traversal.wire.derp import MAX_PACKET_LENGTH

PEERS: Final = b"underpass-peers"
PEERS_SIGNATURE: Final = bytes.fromhex("75b0d8a49c31")
MAX_PAYLOAD_BYTES: Final = MAX_PACKET_LENGTH
MAX_FRAME_BYTES: Final = MAX_PAYLOAD_BYTES + KEY_LENGTH
"""Of a frame's body."""
HANDSHAKE_SECONDS: Final = 10.0
MAX_HANDSHAKE_BYTES: Final = 4096
"""Of a frame before the node has proved its key."""
