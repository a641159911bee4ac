"""The port mapping machine against a fake gateway on a virtual clock."""

from __future__ import annotations

import ipaddress
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from traversal.paths.portmap import (
    EpochTracker,
    MappingChanged,
    PortMapper,
    Protocol,
    ReleaseUpnp,
    RunUpnp,
    SendDatagram,
)
from traversal.wire import nat_pmp, pcp, upnp
from traversal.wire.address import Address

GATEWAY = ipaddress.IPv4Address("192.168.1.1")
OWN = ipaddress.IPv4Address("192.168.1.50")
SERVER = Address("192.168.1.1", 5351)
EXTERNAL = "203.0.113.7"
SERVICE = upnp.Service(upnp.SERVICE_TYPES[1], "http://192.168.1.1:5000/ctl")
SSDP = (
    b"HTTP/1.1 200 OK\r\nUSN: urn:schemas-upnp-org:device:InternetGatewayDevice:1\r\n"
    b"LOCATION: http://192.168.1.1:5000/d.xml\r\n\r\n"
)


class Gateway:
    """A router and the loop that joins it to the machine."""

    def __init__(self, *speaks: Protocol) -> None:
        self.mapper = PortMapper(random.Random(1).randbytes)
        self.speaks = set(speaks)
        self.now = 0.0
        self.booted_at = -1000.0
        self.lifetime = 7200
        self.drops = 0
        self.pcp_result = 0
        self.pmp_result = 0
        self.external = EXTERNAL
        self.requests: list[tuple[float, bytes]] = []
        self.effects: list[tuple[float, object]] = []
        self.owner_nonce = None

    def start(self, until: float = 2.0) -> Gateway:
        self.mapper.set_network(GATEWAY, OWN, 41641, self.now)
        return self.run(until)

    def run(self, until: float) -> Gateway:
        for _ in range(10_000):
            self._carry_out()
            deadline = self.mapper.next_deadline()
            if deadline > until:
                self.now = until
                return self
            self.now = max(self.now, deadline)
            self.mapper.on_time(self.now)
        raise AssertionError("no progress")

    def _carry_out(self) -> None:
        while effects := self.mapper.poll_effects():
            for effect in effects:
                self._do(effect)

    def _do(self, effect) -> None:
        self.effects.append((self.now, effect))
        match effect:
            case SendDatagram(data, to) if to == SERVER:
                self.requests.append((self.now, data))
                if self.drops:
                    self.drops -= 1
                    return
                answer = self._answer(data)
                if answer:
                    self.mapper.handle_datagram(answer, SERVER, self.now)
                    self._carry_out()
            case SendDatagram() if Protocol.UPNP in self.speaks:
                self.mapper.handle_datagram(SSDP, Address("192.168.1.1", 40001), self.now)
            case RunUpnp(attempt):
                if Protocol.UPNP in self.speaks:
                    self.mapper.handle_upnp_mapped(
                        attempt,
                        SERVICE,
                        Address(self.external, effect.external_port),
                        0,
                        self.now,
                    )
                else:
                    self.mapper.handle_upnp_failed(attempt, self.now)

    def _answer(self, data: bytes) -> bytes | None:
        epoch = int(self.now - self.booted_at).to_bytes(4, "big")
        ip = ipaddress.IPv4Address(self.external).packed
        if data[0] == 0 and Protocol.NAT_PMP in self.speaks:
            result = self.pmp_result.to_bytes(2, "big")
            if data[1] == 0:
                return b"\0\x80" + result + epoch + ip
            lifetime = min(self.lifetime, int.from_bytes(data[8:12], "big"))
            return (
                b"\0\x81" + result + epoch + data[4:6] + b"\xc3\x50" + lifetime.to_bytes(4, "big")
            )
        if data[0] == 2 and Protocol.PCP in self.speaks:
            if data[1] == 0:
                return bytes([2, 0x80, 0, self.pcp_result]) + bytes(4) + epoch + bytes(12)
            nonce, result = data[24:36], self.pcp_result
            if self.owner_nonce not in (None, nonce):
                result = 2
            elif not result:
                self.owner_nonce = nonce
            lifetime = min(self.lifetime, int.from_bytes(data[4:8], "big"))
            head = bytes([2, 0x81, 0, result]) + lifetime.to_bytes(4, "big") + epoch + bytes(12)
            return head + data[24:42] + b"\xc3\x50" + bytes(10) + b"\xff\xff" + ip
        return None

    def changes(self) -> list:
        return [e.mapping for _, e in self.effects if isinstance(e, MappingChanged)]


@pytest.mark.parametrize("protocol", Protocol)
def test_each_protocol_alone(protocol) -> None:
    """Each is found by the probe and gives a mapping; the change is told exactly once."""
    gateway = Gateway(protocol).start()
    (mapping,) = gateway.changes()
    assert mapping.protocol is protocol
    assert mapping.external.host == EXTERNAL
    assert mapping.internal_port == 41641
    assert not mapping.is_behind_another_nat
    for other in Protocol:
        assert gateway.mapper.is_seen(other, gateway.now) is (other is protocol)


def test_preference() -> None:
    """NAT-PMP before PCP before UPnP."""
    assert Gateway(*Protocol).start().mapper.mapping.protocol is Protocol.NAT_PMP
    gateway = Gateway(Protocol.UPNP, Protocol.PCP).start()
    assert gateway.mapper.mapping.protocol is Protocol.PCP


@pytest.mark.parametrize("result", [2, 3, 4])
def test_any_error_leads_to_the_next_protocol(result) -> None:
    """An error result is no dead end, in the probe or in the mapping."""
    gateway = Gateway(*Protocol)
    gateway.pmp_result = gateway.pcp_result = result
    assert gateway.start().mapper.mapping.protocol is Protocol.UPNP


def test_silence_after_the_probe_leads_on_too() -> None:
    """A gateway that answers the probe and then no map request is given a second, then left."""
    gateway = Gateway(Protocol.NAT_PMP, Protocol.UPNP)
    gateway.start(0.2)
    gateway.speaks.discard(Protocol.NAT_PMP)
    gateway.run(1.0)
    assert gateway.mapper.mapping is None
    gateway.run(1.3)
    assert gateway.mapper.mapping.protocol is Protocol.UPNP


def test_upnp_gateway_that_takes_its_time() -> None:
    """An SSDP reply 1.9 s after the search, within what the search allows, leads to a mapping at
    once, not at the next probe; if the gateway then refuses, its further replies lead to nothing
    before that."""
    gateway = Gateway().start(1.9)
    gateway.speaks.add(Protocol.UPNP)
    gateway.mapper.handle_datagram(SSDP, Address("192.168.1.1", 40001), gateway.now)
    assert gateway.run(1.9).mapper.mapping.protocol is Protocol.UPNP
    refusing = Gateway().start(1.9)
    for _ in range(5):
        refusing.mapper.handle_datagram(SSDP, Address("192.168.1.1", 40001), refusing.now)
        refusing.run(refusing.now + 0.1)
    assert len([e for _, e in refusing.effects if isinstance(e, RunUpnp)]) == 1
    refusing.run(62.0)
    assert len([e for _, e in refusing.effects if isinstance(e, RunUpnp)]) == 1


@pytest.mark.parametrize("drops", [1, 2, 3])
def test_lost_requests_are_repeated(drops) -> None:
    """The gateway loses the first datagrams; the repetitions get through."""
    gateway = Gateway(Protocol.PCP)
    gateway.drops = drops
    assert gateway.start().mapper.mapping is not None


def test_nothing_found_backs_off() -> None:
    """A silent gateway is asked again after 1, 2, 4 ... 10 minutes, not every half minute."""
    gateway = Gateway().start(7200.0)
    bursts = sorted({round(t) for t, _ in gateway.requests})
    assert len(bursts) < 20
    assert gateway.changes() == []


def test_renewal_keeps_nonce_and_port() -> None:
    """PCP renewals come between 1/2 and 5/8 of the lifetime, by the same nonce, unnoticed."""
    gateway = Gateway(Protocol.PCP).start()
    gateway.lifetime = 1200
    gateway.run(20_000.0)
    maps = [(t, d) for t, d in gateway.requests if d[1] == 1]
    assert len({d[24:36] for _, d in maps}) == 1
    assert len(gateway.changes()) == 1
    first_renewal = maps[1][0] - maps[0][0]
    assert 3600 <= first_renewal <= 4500
    assert maps[1][1][42:44] == b"\xc3\x50"
    later = maps[3][0] - maps[2][0]
    assert 600 <= later <= 750


def test_short_lifetimes_do_not_make_a_storm() -> None:
    """A lifetime of one second is renewed every four seconds at most."""
    gateway = Gateway(Protocol.NAT_PMP)
    gateway.lifetime = 1
    gateway.start(100.0)
    assert len(gateway.requests) < 100


def test_failed_renewal_keeps_the_mapping_until_it_expires() -> None:
    """A silent gateway is asked again and again; the mapping is withdrawn when it ends."""
    gateway = Gateway(Protocol.PCP).start()
    good_until = gateway.mapper.mapping.good_until
    gateway.speaks.clear()
    gateway.run(good_until - 1)
    assert gateway.mapper.mapping is not None
    gateway.run(good_until + 1)
    assert gateway.changes()[-1] is None


@pytest.mark.parametrize("protocol", [Protocol.NAT_PMP, Protocol.PCP])
def test_reboot_of_the_gateway(protocol) -> None:
    """An announcement with a young epoch means: the mapping is gone, make it again at once."""
    gateway = Gateway(protocol).start(100.0)
    nonce = gateway.owner_nonce
    gateway.booted_at, gateway.owner_nonce = 99.0, None
    probe = pcp.encode_announce(OWN) if protocol is Protocol.PCP else b"\0\0"
    gateway.mapper.handle_datagram(gateway._answer(probe), SERVER, gateway.now)
    gateway.run(102.0)
    kinds = [mapping is not None for mapping in gateway.changes()]
    assert kinds == [True, False, True]
    assert gateway.owner_nonce == nonce


def test_gateway_change_releases_then_forgets() -> None:
    """The old gateway gets a delete with the mapping's nonce; nothing of it is kept."""
    gateway = Gateway(Protocol.PCP).start()
    nonce = gateway.owner_nonce
    gateway.mapper.set_network(None, None, 41641, gateway.now)
    gateway.run(3.0)
    last = gateway.requests[-1][1]
    assert last[4:8] == bytes(4)
    assert last[24:36] == nonce
    assert gateway.changes()[-1] is None
    assert gateway.mapper.next_deadline() == float("inf")


def test_port_change_maps_again() -> None:
    """A rebind releases the old port and maps the new one."""
    gateway = Gateway(Protocol.NAT_PMP).start()
    gateway.mapper.set_network(GATEWAY, OWN, 5555, gateway.now)
    gateway.run(5.0)
    assert nat_pmp.encode_delete(41641) in [d for _, d in gateway.requests]
    assert gateway.mapper.mapping.internal_port == 5555


def test_release_by_upnp() -> None:
    """A UPnP mapping is deleted at the service that made it."""
    gateway = Gateway(Protocol.UPNP).start()
    gateway.mapper.release("closing")
    gateway.run(3.0)
    assert ReleaseUpnp(SERVICE, 41641) in [e for _, e in gateway.effects]


def test_upnp_never_asks_for_port_0() -> None:
    """A low local port is replaced by a random high one."""
    gateway = Gateway(Protocol.UPNP)
    gateway.mapper.set_network(GATEWAY, OWN, 80, 0.0)
    gateway.run(2.0)
    (run,) = [e for _, e in gateway.effects if isinstance(e, RunUpnp)]
    assert 1024 <= run.external_port <= 65534


def test_double_nat_is_flagged() -> None:
    """A private external address is used and flagged."""
    gateway = Gateway(Protocol.PCP)
    gateway.external = "100.64.3.4"
    assert gateway.start().mapper.mapping.is_behind_another_nat


class TestStrictness:
    """Answers that do not match are ignored (M1)."""

    @pytest.mark.parametrize("source", [Address("192.168.1.1", 5350), Address("192.168.1.2", 5351)])
    def test_source(self, source) -> None:
        """Another host or port cannot answer for the gateway."""
        gateway = Gateway(Protocol.PCP)
        gateway.mapper.set_network(GATEWAY, OWN, 41641, 0.0)
        gateway.mapper.on_time(0.0)
        gateway.mapper.handle_datagram(gateway._answer(pcp.encode_announce(OWN)), source, 0.0)
        assert not gateway.mapper.is_seen(Protocol.PCP, 0.0)

    @pytest.mark.parametrize("offset", [24, 36, 41])
    def test_pcp_nonce_protocol_and_port(self, offset) -> None:
        """A MAP answer for another nonce, protocol or port maps nothing."""
        gateway = Gateway(Protocol.PCP)
        honest = gateway._answer

        def tamper(data):
            answer = honest(data)
            if answer and data[1] == 1:
                answer = bytearray(answer)
                answer[offset] ^= 1
                answer = bytes(answer)
            return answer

        gateway._answer = tamper
        assert gateway.start(1.9).mapper.mapping is None

    def test_nat_pmp_internal_port(self) -> None:
        """A map answer for another internal port maps nothing."""
        gateway = Gateway(Protocol.NAT_PMP)
        honest = gateway._answer

        def tamper(data):
            answer = honest(data)
            return answer[:8] + b"\x12\x34" + answer[10:] if data[:2] == b"\0\1" else answer

        gateway._answer = tamper
        assert gateway.start(1.2).mapper.mapping is None


@pytest.mark.parametrize(
    ("protocol", "elapsed", "epoch", "is_intact"),
    [
        (Protocol.PCP, 100, 1100, True),
        (Protocol.PCP, 100, 1091, False),
        (Protocol.PCP, 100, 1092, True),
        (Protocol.PCP, 100, 1108, True),
        (Protocol.PCP, 100, 1109, False),
        (Protocol.PCP, 0, 999, True),
        (Protocol.PCP, 0, 998, False),
        (Protocol.NAT_PMP, 100, 1086, True),
        (Protocol.NAT_PMP, 100, 1085, False),
        (Protocol.NAT_PMP, 100, 5000, True),
    ],
)
def test_epoch_rules(protocol, elapsed, epoch, is_intact) -> None:
    """The rules of RFC 6887 section 8.5 and RFC 6886 section 3.6 at their boundaries."""
    tracker = EpochTracker()
    assert tracker.handle_epoch(protocol, 1000, 0.0)
    assert tracker.handle_epoch(protocol, epoch, float(elapsed)) is is_intact


@settings(max_examples=100, deadline=None)
@given(
    st.sets(st.sampled_from(list(Protocol))),
    st.lists(st.tuples(st.floats(0, 400), st.integers(0, 7), st.binary(max_size=70)), max_size=12),
)
def test_any_gateway_is_survived(speaks, steps) -> None:
    """Whatever the gateway says, the machine makes progress and asks at a bounded rate."""
    gateway = Gateway(*speaks).start(0.1)
    now = 0.1
    for pause, what, noise in steps:
        now += pause
        gateway.run(now)
        if what == 0:
            gateway.speaks = set()
        elif what == 1:
            gateway.speaks = set(Protocol)
        elif what == 2:
            gateway.booted_at = now
        elif what == 3:
            gateway.mapper.set_network(GATEWAY, OWN, 1000 + len(noise), now)
        else:
            source = SERVER if what < 6 else Address("192.168.1.9", 9)
            head = [b"\2\x81\0\0", b"\0\x80\0\0"][what % 2]
            gateway.mapper.handle_datagram(head + noise, source, now)
    gateway.run(now + 50)
    assert len(gateway.requests) <= 40 * (len(steps) + 3)
