"""Why a packet did not arrive: one vocabulary for NATs, firewalls, links and hosts. Pure."""

from __future__ import annotations

from enum import StrEnum
from ipaddress import ip_address
from typing import NamedTuple

Address = bytes
"""A packed IP address: 4 bytes for IPv4, 16 for IPv6. Packed, because both a packet's header
and a socket call have it in this form, and because `bytes` caches its hash."""

Endpoint = tuple[Address, int]


def address_text(address: Address) -> str:
    return str(ip_address(address))


def endpoint_text(endpoint: Endpoint) -> str:
    """Return ``192.0.2.1:53`` or ``[2001:db8::1]:53``."""
    address, port = endpoint
    return (
        f"{address_text(address)}:{port}"
        if len(address) == 4
        else (f"[{address_text(address)}]:{port}")
    )


class DropReason(StrEnum):
    """The one cause of a drop."""

    NO_MAPPING = "no-mapping"
    EXPIRED = "mapping-expired"
    FILTERED = "filtered"
    SYN_FILTERED = "inbound-syn"
    NO_HAIRPIN = "no-hairpin"
    NO_PORT = "no-free-port"
    HOST_LIMIT = "host-limit"
    IDLE_CONNECTION = "idle-connection"
    FIREWALL = "firewall"
    STUN_BLOCKED = "stun-blocked"
    CAPTIVE_PORTAL = "captive-portal"
    SPOOFED = "foreign-source"
    NO_ROUTE = "no-route"
    LOSS = "loss"
    BURST = "burst"
    QUEUE_FULL = "queue-full"
    TOO_BIG = "too-big"
    LINK_DOWN = "link-down"
    PORT_CLOSED = "port-closed"
    BUFFER_FULL = "buffer-full"


_SENTENCES = {
    DropReason.NO_MAPPING: "no mapping for this external endpoint",
    DropReason.EXPIRED: "the mapping has expired",
    DropReason.FILTERED: "filtered",
    DropReason.SYN_FILTERED: "filtered: this NAT lets no bare SYN in",
    DropReason.NO_HAIRPIN: "sent to the NAT's own external address, and it does not hairpin",
    DropReason.NO_PORT: "no external port is free for a new mapping",
    DropReason.HOST_LIMIT: "the inside host has all the mappings it may have",
    DropReason.IDLE_CONNECTION: "a TCP segment of a connection whose mapping has expired",
    DropReason.FIREWALL: "the firewall does not allow this protocol and port",
    DropReason.STUN_BLOCKED: "the firewall recognised STUN and blocks it",
    DropReason.CAPTIVE_PORTAL: "the host has not logged in to the captive portal",
    DropReason.SPOOFED: "the source address does not belong to this network",
    DropReason.NO_ROUTE: "no machine has the destination address",
    DropReason.LOSS: "lost on the link",
    DropReason.BURST: "lost in a bad period of the link",
    DropReason.QUEUE_FULL: "the queue in front of the link is full",
    DropReason.TOO_BIG: "larger than the link's MTU",
    DropReason.LINK_DOWN: "the link is down",
    DropReason.PORT_CLOSED: "no socket is bound to the destination port",
    DropReason.BUFFER_FULL: "the receiving socket's buffer is full",
}


class Answer(StrEnum):
    """What the sender of a dropped packet gets to hear."""

    NONE = "none"
    PORT_UNREACHABLE = "port-unreachable"
    PROHIBITED = "administratively-prohibited"
    TOO_BIG = "fragmentation-needed"
    RESET = "reset"


class Drop(NamedTuple):
    """A dropped packet: the cause, the answer to its sender, and what `text` needs."""

    reason: DropReason
    answer: Answer = Answer.NONE
    note: str = ""
    """How the cause is qualified, such as ``port-dependent``."""
    inside: Endpoint | None = None
    """The inside endpoint that the packet would have reached."""
    contacted: tuple[Endpoint, ...] = ()
    """Some of the remote endpoints that the inside endpoint has sent to, latest last."""
    expires_in_seconds: float | None = None
    """The rest of the mapping's life; negative when it has ended."""

    @property
    def text(self) -> str:
        """One clause for a person, such as ``filtered, port-dependent; 192.168.7.2:4000 had
        only contacted 2.0.0.5:3478; mapping expires in 17 s``."""
        parts = [_SENTENCES[self.reason] + (f", {self.note}" if self.note else "")]
        if self.reason is DropReason.FILTERED and self.inside is not None:
            who = endpoint_text(self.inside)
            if self.contacted:
                peers = ", ".join(map(endpoint_text, self.contacted))
                parts.append(f"{who} had only contacted {peers}")
            else:
                parts.append(f"{who} has contacted nobody")
        if self.expires_in_seconds is not None:
            seconds = self.expires_in_seconds
            parts.append(
                f"mapping expires in {seconds:.3g} s"
                if seconds >= 0
                else f"mapping expired {-seconds:.3g} s ago"
            )
        return "; ".join(parts)
