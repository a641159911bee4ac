"""What travels in the simulated internet: packets as objects, with sizes as on the wire."""

from __future__ import annotations

import struct
from typing import NamedTuple

from netlab.drops import Address, Answer, Endpoint
from netlab.nat import Protocol

UDP_HEADER_BYTES = 8
TCP_HEADER_BYTES = 20


class Segment(NamedTuple):
    """A TCP header. Sequence numbers do not wrap: they are counters that start anywhere."""

    flags: int
    sequence: int
    acknowledgment: int
    window: int


class IcmpError(NamedTuple):
    """An ICMP error and the flow of the packet that it is about, as its reporter saw it."""

    answer: Answer
    protocol: int
    source: Address
    source_port: int
    destination: Address
    destination_port: int
    mtu_bytes: int = 0


class Packet:
    """A packet, never changed after it was sent: a NAT makes a new one with the same number."""

    __slots__ = (
        "destination",
        "destination_port",
        "error",
        "may_fragment",
        "number",
        "payload",
        "protocol",
        "segment",
        "sender",
        "size_bytes",
        "source",
        "source_port",
    )

    def __init__(
        self,
        number: int,
        sender: str,
        protocol: int,
        source: Address,
        source_port: int,
        destination: Address,
        destination_port: int,
        payload: bytes = b"",
        segment: Segment | None = None,
        error: IcmpError | None = None,
        may_fragment: bool = False,
    ) -> None:
        self.number = number
        self.sender = sender
        self.protocol = protocol
        self.source = source
        self.source_port = source_port
        self.destination = destination
        self.destination_port = destination_port
        self.payload = payload
        self.segment = segment
        self.error = error
        self.may_fragment = may_fragment
        network_header = 20 if len(destination) == 4 else 40
        if protocol == Protocol.TCP:
            self.size_bytes = network_header + TCP_HEADER_BYTES + len(payload)
        else:
            # ICMP echo has a header of 8 bytes as well; an error quotes 28.
            self.size_bytes = network_header + UDP_HEADER_BYTES + len(payload)

    def readdressed(
        self,
        source: Address,
        source_port: int,
        destination: Address,
        destination_port: int,
        error: IcmpError | None = None,
    ) -> Packet:
        """Return the packet as it goes on behind a NAT."""
        return Packet(
            self.number,
            self.sender,
            self.protocol,
            source,
            source_port,
            destination,
            destination_port,
            self.payload,
            self.segment,
            error or self.error,
            self.may_fragment,
        )

    def transport_bytes(self, limit: int) -> bytes:
        """Return the packet from its transport header on, without checksums; ICMP has none."""
        if self.protocol == Protocol.UDP:
            size = UDP_HEADER_BYTES + len(self.payload)
            head = struct.pack("!HHHH", self.source_port, self.destination_port, size & 0xFFFF, 0)
        elif self.segment is not None:
            head = struct.pack(
                "!HHIIBBHHH",
                self.source_port,
                self.destination_port,
                self.segment.sequence & 0xFFFFFFFF,
                self.segment.acknowledgment & 0xFFFFFFFF,
                TCP_HEADER_BYTES << 2,
                self.segment.flags,
                min(self.segment.window, 0xFFFF),
                0,
                0,
            )
        else:
            return b""
        return head + self.payload[: max(0, limit - len(head))]

    @property
    def source_endpoint(self) -> Endpoint:
        return self.source, self.source_port

    @property
    def destination_endpoint(self) -> Endpoint:
        return self.destination, self.destination_port

    @property
    def flags(self) -> int:
        return self.segment.flags if self.segment is not None else 0
