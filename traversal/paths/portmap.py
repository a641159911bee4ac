"""Getting and keeping one UDP port mapping from the gateway: NAT-PMP, PCP, UPnP IGD.

Port mapping specification 7 to 9, with these differences: requests are repeated within the budget,
since home routers drop (M5); any failure leads on to the next protocol (M6); one PCP nonce serves a
mapping for its life, renewals and deletion included (M2); both protocols' epochs are judged by
their full rules on every answer, announcements included (M3); answers must match in everything
(M1).

The machine lives through four phases: idle (no gateway or no port), probing, mapping (one protocol
after the other), waiting (for the renewal of what is held, or for another try). It does no I/O:
feed it, then carry out `poll_effects()` and call `on_time(now)` by `next_deadline()`. UPnP calls
are HTTP, so the shell makes them when RunUpnp says so and reports with `handle_upnp_*`.
"""

from __future__ import annotations

import ipaddress
import math
from dataclasses import dataclass
from enum import Enum
from typing import Final

from traversal.keys import Entropy
from traversal.paths.report import is_behind_another_nat
from traversal.wire import nat_pmp, pcp, upnp
from traversal.wire.address import Address

LIFETIME_SECONDS: Final = 7200
MIN_RENEWAL_SECONDS: Final = 4.0
"""RFC 6887 section 11.2.1: never renew faster."""
TRIES_AT: Final = (0.0, 0.08, 0.2)
PROBE_SECONDS: Final = 0.25
SSDP_SECONDS: Final = 2.5
"""Gateways may take the two seconds that our searches grant them (MX); miniupnpd does. Nothing
waits for that: a reply after the probe begins another round, once."""
MAP_SECONDS: Final = 1.0
"""Nobody waits for a mapping, so a slow gateway gets more time than upstream's 250 ms."""
UPNP_SECONDS: Final = 5.0
SEEN_SECONDS: Final = 600.0
FIRST_RETRY_SECONDS: Final = 60.0
MAX_RETRY_SECONDS: Final = 600.0


class Protocol(Enum):
    """Port mapping protocols, in order of preference."""

    NAT_PMP = "NAT-PMP"
    PCP = "PCP"
    UPNP = "UPnP"


@dataclass(frozen=True, slots=True)
class Mapping:
    """A held mapping: datagrams to `external` reach our `internal_port`. Monotonic seconds."""

    protocol: Protocol
    external: Address
    internal_port: int
    good_until: float
    is_behind_another_nat: bool
    service: upnp.Service | None = None


@dataclass(frozen=True, slots=True)
class SendDatagram:
    """Send `data` from the port mapper's socket."""

    data: bytes
    to: Address


@dataclass(frozen=True, slots=True)
class RunUpnp:
    """Map a port by UPnP within 5 s, trying `service` first if given, then the gateways that
    `replies` name; then call `handle_upnp_mapped` or `handle_upnp_failed` with `attempt`."""

    attempt: int
    replies: tuple[upnp.SsdpReply, ...]
    service: upnp.Service | None
    internal: Address
    external_port: int
    lease_seconds: int


@dataclass(frozen=True, slots=True)
class ReleaseUpnp:
    """Delete a mapping by UPnP, as well as it goes."""

    service: upnp.Service
    external_port: int


@dataclass(frozen=True, slots=True)
class MappingChanged:
    """Advertise `mapping`, or stop advertising the last one."""

    mapping: Mapping | None
    reason: str


Effect = SendDatagram | RunUpnp | ReleaseUpnp | MappingChanged


class EpochTracker:
    """Whether a gateway kept its mappings between two answers (port mapping specification 5.3)."""

    def __init__(self) -> None:
        self._last: tuple[float, int] | None = None

    def handle_epoch(self, protocol: Protocol, epoch_seconds: int, now: float) -> bool:
        """Judge an answer's epoch; False means that the gateway forgot everything."""
        last, self._last = self._last, (now, epoch_seconds)
        if last is None:
            return True
        client, server = now - last[0], epoch_seconds - last[1]
        if protocol is Protocol.NAT_PMP:
            return server >= client * 7 / 8 - 2
        if server < -1:
            return False
        return client + 2 >= server - server / 16 and server + 2 >= client - client / 16


class PortMapper:
    """See the module's text. `entropy` makes nonces and spreads renewals."""

    def __init__(self, entropy: Entropy) -> None:
        self.mapping: Mapping | None = None
        self._entropy = entropy
        self._gateway: ipaddress.IPv4Address | None = None
        self._own_ip: ipaddress.IPv4Address | None = None
        self._local_port = 0
        self._effects: list[Effect] = []
        self._attempt = 0
        self._forget_gateway()

    def _forget_gateway(self) -> None:
        self._seen: dict[Protocol, float] = {}
        self._was_probed = False
        self._replies: list[upnp.SsdpReply] = []
        self._epochs = {Protocol.NAT_PMP: EpochTracker(), Protocol.PCP: EpochTracker()}
        self._nonce = b""
        self._external_hint = 0
        self._pmp_external: ipaddress.IPv4Address | None = None
        self._pmp_mapped: nat_pmp.MapResponse | None = None
        self._retry_seconds = FIRST_RETRY_SECONDS
        self._to_try: list[Protocol] = []
        self._trying: Protocol | None = None
        self._probe_ends_at = math.inf
        self._late_until = -math.inf
        self._give_up_at = math.inf
        self._sends: list[tuple[float, SendDatagram]] = []
        self._begin_at = math.inf

    # ---- look

    def is_seen(self, protocol: Protocol, now: float) -> bool | None:
        """Whether the gateway speaks a protocol; None before it was asked."""
        seen_at = self._seen.get(protocol)
        if seen_at is not None and now - seen_at <= SEEN_SECONDS:
            return True
        return False if self._was_probed else None

    # ---- poll

    def poll_effects(self) -> list[Effect]:
        """Everything to do since the last call, in order."""
        effects, self._effects = self._effects, []
        return effects

    def next_deadline(self) -> float:
        """When to call `on_time` at the latest; infinity for never."""
        deadline = min(self._probe_ends_at, self._give_up_at, self._begin_at)
        if self._sends:
            deadline = min(deadline, self._sends[0][0])
        if self.mapping is not None:
            deadline = min(deadline, self.mapping.good_until)
        return deadline

    def on_time(self, now: float) -> None:
        """Do what is due."""
        while self._sends and now >= self._sends[0][0]:
            self._effects.append(self._sends.pop(0)[1])
        if self.mapping is not None and now >= self.mapping.good_until:
            self._drop_mapping("the mapping expired")
        if now >= self._begin_at:
            self._begin_at = math.inf
            self._begin(now)
        if now >= self._probe_ends_at:
            self._probe_ends_at = math.inf
            self._was_probed = True
            self._choose_protocols(now)
        if now >= self._give_up_at:
            self._fail(now)

    # ---- command

    def set_network(
        self,
        gateway: ipaddress.IPv4Address | None,
        own_ip: ipaddress.IPv4Address | None,
        local_port: int,
        now: float,
    ) -> None:
        """The default route's private next hop (None: no such), our address on it, our UDP port.

        Any change releases what is held and begins anew; a port of 0 stops the machine.
        """
        if (gateway, own_ip, local_port) == (self._gateway, self._own_ip, self._local_port):
            return
        self.release("the gateway or our own address or port changed")
        self._forget_gateway()
        self._gateway, self._own_ip, self._local_port = gateway, own_ip, local_port
        if gateway is not None and own_ip is not None and local_port:
            self._begin_at = now

    def ask_now(self, now: float) -> None:
        """Begin again before the pause after a failure is over."""
        if self.mapping is None and now < self._begin_at < math.inf:
            self._begin_at = now

    def release(self, reason: str) -> None:
        """Give the mapping back, as well as it goes."""
        mapping, gateway, own_ip = self.mapping, self._gateway, self._own_ip
        if mapping is None or gateway is None or own_ip is None:
            return
        to = Address(str(gateway), nat_pmp.GATEWAY_PORT)
        if mapping.protocol is Protocol.NAT_PMP:
            data = nat_pmp.encode_delete(mapping.internal_port)
            self._effects.append(SendDatagram(data, to))
        elif mapping.protocol is Protocol.PCP:
            data = pcp.encode_map_request(own_ip, self._nonce, mapping.internal_port, 0, None, 0)
            self._effects.append(SendDatagram(data, to))
        elif mapping.service is not None:
            self._effects.append(ReleaseUpnp(mapping.service, mapping.external.port))
        self._drop_mapping(reason)

    # ---- feed

    def handle_datagram(self, data: bytes, source: Address, now: float) -> None:
        """A datagram for the port mapper's socket. Anything that does not match is ignored."""
        if self._gateway is None:
            return
        if source == (str(self._gateway), nat_pmp.GATEWAY_PORT):
            # Which protocol answers is told by the version, not by what we asked.
            for handle in (self._handle_pcp, self._handle_nat_pmp):
                try:
                    handle(data, now)
                except (pcp.PcpError, nat_pmp.NatPmpError):
                    continue
            return
        try:
            reply = upnp.parse_ssdp_reply(data)
        except upnp.UpnpError:
            return
        if len(self._replies) < 4 * upnp.MAX_REPLIES and reply not in self._replies:
            self._replies.append(reply)
        self._seen[Protocol.UPNP] = now
        is_waiting = self.mapping is None and now < self._begin_at < math.inf
        if is_waiting and now < self._late_until:
            self._begin_at = now

    def handle_upnp_mapped(
        self,
        attempt: int,
        service: upnp.Service,
        external: Address,
        lease_seconds: int,
        now: float,
    ) -> None:
        """RunUpnp succeeded; a lease of 0 is permanent and renewed like one of two hours."""
        if attempt == self._attempt and self._trying is Protocol.UPNP:
            self._hold(Protocol.UPNP, external, lease_seconds or LIFETIME_SECONDS, service, now)

    def handle_upnp_failed(self, attempt: int, now: float) -> None:
        """RunUpnp failed."""
        if attempt == self._attempt and self._trying is Protocol.UPNP:
            self._fail(now)

    # ---- probing

    def _begin(self, now: float) -> None:
        """Renew by the protocol that holds the mapping, else probe for one."""
        if self.mapping is not None:
            self._to_try = [self.mapping.protocol]
            self._to_try += [p for p in self._order(now) if p is not self.mapping.protocol]
            self._try_next(now)
            return
        if self._order(now):
            self._choose_protocols(now)
            return
        assert self._gateway is not None  # _begin_at is only set with a gateway
        assert self._own_ip is not None
        gateway, group = str(self._gateway), upnp.SSDP_GROUP
        requests = [
            SendDatagram(nat_pmp.EXTERNAL_ADDRESS_REQUEST, Address(gateway, 5351)),
            SendDatagram(pcp.encode_announce(self._own_ip), Address(gateway, 5351)),
            # Unicast first: it teaches a host firewall to let the reply in.
            SendDatagram(upnp.encode_search(upnp.SEARCH_ALL), Address(gateway, upnp.SSDP_PORT)),
            SendDatagram(upnp.encode_search(upnp.SEARCH_ALL), Address(group, upnp.SSDP_PORT)),
            SendDatagram(upnp.encode_search(upnp.SEARCH_GATEWAY), Address(group, upnp.SSDP_PORT)),
        ]
        self._schedule(requests, now)
        self._probe_ends_at = now + PROBE_SECONDS
        self._late_until = now + SSDP_SECONDS

    def _schedule(self, requests: list[SendDatagram], now: float) -> None:
        self._sends = [(now + delay, request) for delay in TRIES_AT for request in requests]
        while self._sends and self._sends[0][0] <= now:
            self._effects.append(self._sends.pop(0)[1])

    def _order(self, now: float) -> list[Protocol]:
        return [protocol for protocol in Protocol if self.is_seen(protocol, now)]

    def _choose_protocols(self, now: float) -> None:
        self._to_try = self._order(now)
        self._try_next(now)

    # ---- mapping

    def _try_next(self, now: float) -> None:
        self._sends = []
        self._give_up_at = math.inf
        self._trying = self._to_try.pop(0) if self._to_try else None
        gateway, own_ip = self._gateway, self._own_ip
        if self._trying is None or gateway is None or own_ip is None:
            self._wait(now)
            return
        hint = self._external_hint
        to = Address(str(gateway), 5351)
        if self._trying is Protocol.NAT_PMP:
            self._pmp_mapped = None
            request = nat_pmp.encode_map_request(self._local_port, hint, LIFETIME_SECONDS)
            ask = SendDatagram(nat_pmp.EXTERNAL_ADDRESS_REQUEST, to)
            self._schedule([ask, SendDatagram(request, to)], now)
            self._give_up_at = now + MAP_SECONDS
        elif self._trying is Protocol.PCP:
            self._nonce = self._nonce or self._entropy(pcp.NONCE_LENGTH)
            request = pcp.encode_map_request(
                own_ip, self._nonce, self._local_port, hint, None, LIFETIME_SECONDS
            )
            self._schedule([SendDatagram(request, to)], now)
            self._give_up_at = now + MAP_SECONDS
        else:
            self._attempt += 1
            self._late_until = -math.inf
            held = self.mapping.service if self.mapping is not None else None
            internal = Address(str(own_ip), self._local_port)
            replies = tuple(upnp.sort_replies(self._replies))
            self._effects.append(
                RunUpnp(self._attempt, replies, held, internal, self._upnp_port(), LIFETIME_SECONDS)
            )
            self._give_up_at = now + UPNP_SECONDS

    def _upnp_port(self) -> int:
        # Port 0 would forward everything, those below 1024 are often refused.
        port = self._external_hint or self._local_port
        if port >= 1024:
            return port
        return 1024 + int.from_bytes(self._entropy(4), "big") % (65534 - 1024 + 1)

    def _fail(self, now: float) -> None:
        """The protocol being tried does not work: the next one."""
        if self._trying is not None and self.mapping is None:
            self._seen.pop(self._trying, None)
        self._try_next(now)

    def _wait(self, now: float) -> None:
        """Nothing left to try: again later, sooner while a mapping is about to expire."""
        if self.mapping is not None:
            left = self.mapping.good_until - now
            self._begin_at = now + max(left / 2, MIN_RENEWAL_SECONDS)
            return
        self._begin_at = now + self._retry_seconds
        self._retry_seconds = min(2 * self._retry_seconds, MAX_RETRY_SECONDS)

    def _hold(
        self,
        protocol: Protocol,
        external: Address,
        lifetime_seconds: float,
        service: upnp.Service | None,
        now: float,
    ) -> None:
        lifetime = min(lifetime_seconds, LIFETIME_SECONDS)
        old = self.mapping
        if old is not None and old.protocol is not protocol:
            # Replaced by another protocol: the old one runs out by itself.
            old = None
        ip = ipaddress.IPv4Address(external.host)
        self.mapping = Mapping(
            protocol,
            external,
            self._local_port,
            now + lifetime,
            is_behind_another_nat(ip),
            service,
        )
        self._seen[protocol] = now
        self._external_hint = external.port
        self._retry_seconds = FIRST_RETRY_SECONDS
        self._trying, self._to_try, self._sends = None, [], []
        self._give_up_at = self._probe_ends_at = math.inf
        # RFC 6887 section 11.2.1: between 1/2 and 5/8 of the lifetime, so that the clients of a
        # gateway that restarted do not come all at once.
        spread = self._entropy(1)[0] / 256 / 8
        self._begin_at = now + max(lifetime * (0.5 + spread), MIN_RENEWAL_SECONDS)
        if old is None or old.external != external:
            self._effects.append(MappingChanged(self.mapping, f"mapped by {protocol.value}"))

    def _drop_mapping(self, reason: str) -> None:
        if self.mapping is not None:
            self.mapping = None
            self._effects.append(MappingChanged(None, reason))

    # ---- answers

    def _check_epoch(self, protocol: Protocol, epoch_seconds: int, now: float) -> None:
        is_intact = self._epochs[protocol].handle_epoch(protocol, epoch_seconds, now)
        held = self.mapping
        if is_intact or held is None or held.protocol is not protocol:
            return
        # The gateway lost it: no need to release, but it must be made again at once.
        self._drop_mapping("the gateway restarted and forgot the mapping")
        if self._trying is None:
            self._begin_at = now

    def _handle_nat_pmp(self, data: bytes, now: float) -> None:
        response = nat_pmp.parse_response(data)
        if response.result is nat_pmp.Result.UNSUPPORTED_VERSION:
            self._reject(Protocol.NAT_PMP, now)
            return
        self._check_epoch(Protocol.NAT_PMP, response.epoch_seconds, now)
        if response.result is not nat_pmp.Result.OK:
            self._reject(Protocol.NAT_PMP, now)
            return
        if isinstance(response, nat_pmp.ExternalAddressResponse):
            self._seen[Protocol.NAT_PMP] = now
            self._pmp_external = response.address
            if response.address is None:
                self._reject(Protocol.NAT_PMP, now)
                return
        elif response.internal_port == self._local_port and response.lifetime_seconds:
            self._pmp_mapped = response
        mapped, external = self._pmp_mapped, self._pmp_external
        if self._trying is Protocol.NAT_PMP and mapped is not None and external is not None:
            address = Address(str(external), mapped.external_port)
            self._hold(Protocol.NAT_PMP, address, mapped.lifetime_seconds, None, now)

    def _handle_pcp(self, data: bytes, now: float) -> None:
        response = pcp.parse_response(data)
        if response.result is pcp.Result.UNSUPP_VERSION:
            self._reject(Protocol.PCP, now)
            return
        if isinstance(response, pcp.MapResponse) and (
            response.nonce != self._nonce
            or response.protocol != pcp.PROTOCOL_UDP
            or response.internal_port != self._local_port
        ):
            return
        self._check_epoch(Protocol.PCP, response.epoch_seconds, now)
        if response.result is not pcp.Result.SUCCESS:
            self._reject(Protocol.PCP, now)
            return
        self._seen[Protocol.PCP] = now
        if isinstance(response, pcp.MapResponse) and self._trying is Protocol.PCP:
            external = response.external_ip
            if external.version != 4 or external.is_unspecified or not response.lifetime_seconds:
                self._reject(Protocol.PCP, now)
                return
            address = Address(str(external), response.external_port)
            self._hold(Protocol.PCP, address, response.lifetime_seconds, None, now)

    def _reject(self, protocol: Protocol, now: float) -> None:
        """The gateway says no by this protocol."""
        self._seen.pop(protocol, None)
        if self._trying is protocol:
            self._try_next(now)
