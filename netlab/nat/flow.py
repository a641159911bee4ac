"""What a NAT sees of a packet and what it makes of it. Pure."""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

from netlab.drops import Address, Drop


class Protocol(IntEnum):
    """IP protocol numbers that a NAT translates."""

    ICMP = 1
    TCP = 6
    UDP = 17


class TcpFlag(IntEnum):
    """The TCP flags that a NAT looks at, as in the header."""

    FIN = 1
    SYN = 2
    RST = 4
    ACK = 16


class Translated(NamedTuple):
    """A packet that goes on, with its new endpoints."""

    source: Address
    source_port: int
    destination: Address
    destination_port: int
    to_inside: bool
    """Whether it leaves on the inside: inbound packets and hairpinned ones."""


Verdict = Translated | Drop
