"""A router's outbound firewall: blocked UDP, only 443, STUN inspection, captive portal. Pure."""

from __future__ import annotations

from netlab.behavior import Firewall
from netlab.drops import Address, Answer, Drop, DropReason
from netlab.nat import Protocol

_STUN_COOKIE = b"\x21\x12\xa4\x42"
"""The magic cookie of RFC 8489 section 5, at byte 4 of every message."""


class Gate:
    """Decides about packets that leave the inside; answers to permitted ones always pass."""

    def __init__(self, firewall: Firewall) -> None:
        self.firewall = firewall
        self._logged_in: set[Address] = set()
        self.is_open = firewall == Firewall()
        """Whether `check` never drops anything, so that callers may skip it."""

    def log_in(self, host: Address) -> None:
        """Let a host through the captive portal."""
        self._logged_in.add(host)

    def check(
        self, protocol: int, source: Address, destination_port: int, payload: bytes
    ) -> Drop | None:
        """Return why a packet may not leave, or None."""
        firewall = self.firewall
        if firewall.captive_portal and source not in self._logged_in:
            answer = Answer.RESET if protocol == Protocol.TCP else Answer.NONE
            return Drop(DropReason.CAPTIVE_PORTAL, answer)
        if protocol == Protocol.UDP:
            if firewall.udp_ports is not None and destination_port not in firewall.udp_ports:
                answer = Answer.PROHIBITED if firewall.reject else Answer.NONE
                return Drop(DropReason.FIREWALL, answer, f"UDP port {destination_port}")
            if firewall.block_stun and payload[4:8] == _STUN_COOKIE:
                return Drop(DropReason.STUN_BLOCKED)
            return None
        allowed = firewall.tcp_ports
        if protocol == Protocol.TCP and allowed is not None and destination_port not in allowed:
            answer = Answer.RESET if firewall.reject else Answer.NONE
            return Drop(DropReason.FIREWALL, answer, f"TCP port {destination_port}")
        return None
