"""One socket carries STUN, disco, relayed and plain data: which of them is this datagram?

The order of the tests is that of disco specification 7. A WireGuard packet can never be taken for
anything else: its bytes 1 to 3 are zero. A datagram of another kind that an application wants to
send must classify as DATA, or the peer takes it for a control message; `is_plain_data` tells.
"""

from __future__ import annotations

from enum import Enum
from typing import Final

from traversal.wire.disco import MAGIC
from traversal.wire.introduction import is_introduction


class Kind(Enum):
    """What a datagram on the shared socket is."""

    STUN = "stun"
    DISCO = "disco"
    RELAYED_DISCO = "relayed disco"
    RELAYED_DATA = "relayed data"
    INTRODUCTION = "introduction"
    DATA = "data"


WIREGUARD: Final = b"\0\0\0"
"""Bytes 1 to 3 of every WireGuard packet, and of nothing else that comes by UDP here: data paths
test for them first, to spare a call."""
_STUN_COOKIE: Final = b"\x21\x12\xa4\x42"
_MIN_DISCO: Final = 38


def classify(datagram: bytes) -> Kind:
    """The kind of a whole datagram (bytes, bytearray or memoryview slice turned to bytes).

    Never fails. STUN error responses count as data, as they do to stock nodes.
    """
    # Plain data is nearly everything: one test on byte 1 to 3 sends WireGuard on its way.
    head = datagram[:8]
    if head[1:4] == WIREGUARD:
        return Kind.DATA
    if len(datagram) >= 20 and not head[0] & 0xC0 and head[1] == 1 and head[4:8] == _STUN_COOKIE:
        return Kind.STUN
    if len(head) == 8 and not head[0] & 0xC0 and not head[1] & 0x3F and not head[7]:
        protocol = head[2:4]
        if protocol == b"\x7a\x11" and datagram[8:14] == MAGIC:
            return Kind.RELAYED_DISCO
        if protocol == b"\x7a\x12":
            return Kind.RELAYED_DATA
    if len(datagram) >= _MIN_DISCO and head[:6] == MAGIC:
        return Kind.DISCO
    return Kind.INTRODUCTION if is_introduction(head) else Kind.DATA


def is_plain_data(datagram: bytes) -> bool:
    """Whether the receiver of `datagram` will take it for data, whatever path it arrives by."""
    return classify(datagram) is Kind.DATA
