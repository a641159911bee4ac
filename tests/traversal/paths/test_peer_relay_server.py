"""The peer relay's server in virtual time: whom it serves, whom it ignores, when it forgets."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from traversal.keys import Box, DiscoPrivate, DiscoPublic, NodePublic
from traversal.paths.peer_relay_server import (
    AllocationError,
    PeerRelayLimits,
    PeerRelayServer,
    make_mac,
)
from traversal.wire.address import Address
from traversal.wire.disco import (
    AllocateRequest,
    Answer,
    Bind,
    Challenge,
    open_envelope,
    seal_envelope,
    sorted_pair,
)
from traversal.wire.geneve import PROTOCOL_DISCO, PROTOCOL_WIREGUARD, Header

RNG = random.Random(1)
A, B, C, OWN = (DiscoPrivate.generate(RNG.randbytes) for _ in range(4))
NODE, OTHER_NODE = NodePublic(b"\x07" * 32), NodePublic(b"\x08" * 32)
AT = Address("198.51.100.1", 40000)
A_AT, B_AT, C_AT = (Address(f"203.0.113.{n}", 41641) for n in (1, 2, 3))
A6_AT = Address("2001:db8::1", 41641)
PAIR = sorted_pair(A.public(), B.public())


def make(limits: PeerRelayLimits | None = None) -> PeerRelayServer:
    server = PeerRelayServer(OWN, random.Random(2).randbytes, limits)
    server.addresses = (AT,)
    return server


def control(server, sender, message) -> bytes:
    header = Header(message.vni, PROTOCOL_DISCO, control=True).encode()
    box = Box(sender, server.public_key)
    return header + seal_envelope(message, sender.public(), box, RNG.randbytes(24))


def challenge_of(server, sender, other, vni, source, now, generation=1) -> Challenge:
    bind = Bind(vni, generation, other.public(), bytes(32))
    datagram, target = server.handle_datagram(control(server, sender, bind), source, now)
    assert target == source
    message = open_envelope(datagram[8:], Box(sender, server.public_key))
    assert isinstance(message, Challenge)
    return message


def answer(server, sender, other, challenge, source, now) -> None:
    message = Answer(challenge.vni, challenge.generation, other.public(), challenge.challenge)
    assert server.handle_datagram(control(server, sender, message), source, now) is None


def bind(server, sender, other, vni, source, now=0.0, generation=1) -> None:
    challenge = challenge_of(server, sender, other, vni, source, now, generation)
    answer(server, sender, other, challenge, source, now)


def data(vni: int, text: bytes = b"data") -> bytes:
    return Header(vni, PROTOCOL_WIREGUARD).encode() + text


def joined(server: PeerRelayServer, now: float = 0.0, a_at: Address = A_AT) -> int:
    """Both clients allocated and bound."""
    vni = server.allocate(NODE, AllocateRequest(PAIR, 1), now).endpoint.vni
    bind(server, A, B, vni, a_at, now)
    bind(server, B, A, vni, B_AT, now)
    return vni


@pytest.mark.parametrize(
    ("source", "mac"),
    [
        ("198.51.100.9:41641", "befd9a1a6a447396c3346348be2ae667a5268ecfb5d0316c677dc7048d86921f"),
        ("[2001:db8::9]:41641", "8837d8c25fcbf3372019d35bf4a6abf1fe5fab35b9fbe4337b85ffe3d2b7c7af"),
    ],
)
def test_mac_vectors(source: str, mac: str) -> None:
    """The specification's challenges; the key is that of its client B."""
    remote = DiscoPublic(
        bytes.fromhex("675dd574ed7789310b3d2e7681f3790b466c773b1521fecf36577958371ea52f")
    )
    message = Bind(0xABC, 1, remote, bytes(32))
    assert make_mac(bytes(range(32)), message, Address.parse(source)).hex() == mac


@pytest.mark.parametrize("a_at", [A_AT, A6_AT])
def test_data_passes_unchanged_once_both_are_bound(a_at: Address) -> None:
    """Both ways, also between families; before that nothing passes."""
    server = make()
    vni = server.allocate(NODE, AllocateRequest(PAIR, 1), 0.0).endpoint.vni
    bind(server, A, B, vni, a_at)
    assert server.handle_datagram(data(vni), a_at, 0.1) is None
    bind(server, B, A, vni, B_AT)
    assert server.handle_datagram(data(vni), a_at, 0.2) == (data(vni), B_AT)
    assert server.handle_datagram(data(vni), B_AT, 0.3) == (data(vni), a_at)
    assert server.handle_datagram(data(vni), C_AT, 0.4) is None
    assert server.statistics().forwarded_datagrams == 2


def test_rebinding() -> None:
    """A leg that shakes hands from a new address moves there at once; the old one is a stranger."""
    server = make()
    vni = joined(server)
    bind(server, A, B, vni, C_AT, 1.0, generation=2)
    assert server.handle_datagram(data(vni), A_AT, 1.1) is None
    assert server.handle_datagram(data(vni), C_AT, 1.1) == (data(vni), B_AT)
    assert server.handle_datagram(data(vni), B_AT, 1.1) == (data(vni), C_AT)


def test_allocation_is_idempotent() -> None:
    """The same pair gets the same VNI and Lamport ID; another one the next; the generation is that
    of the request."""
    server = make()
    first = server.allocate(NODE, AllocateRequest(PAIR, 1), 0.0)
    again = server.allocate(OTHER_NODE, AllocateRequest(PAIR, 9), 10.0)
    assert (again.endpoint, again.generation) == (first.endpoint, 9)
    pair = sorted_pair(A.public(), C.public())
    other = server.allocate(NODE, AllocateRequest(pair, 1), 10.0).endpoint
    assert (other.vni, other.lamport_id) == (first.endpoint.vni + 1, first.endpoint.lamport_id + 1)


def test_refusals() -> None:
    """No address yet, our own key, a full house, one node's share: an error, and no state."""
    server = PeerRelayServer(OWN, RNG.randbytes, PeerRelayLimits(3, endpoints_per_node=2))
    with pytest.raises(AllocationError, match="address"):
        server.allocate(NODE, AllocateRequest(PAIR, 1), 0.0)
    server.addresses = (AT,)
    pair = sorted_pair(A.public(), OWN.public())
    with pytest.raises(AllocationError, match="neither"):
        server.allocate(NODE, AllocateRequest(pair, 1), 0.0)
    assert server.statistics().endpoints == 0
    others = [DiscoPrivate.generate(RNG.randbytes).public() for _ in range(4)]
    pairs = [AllocateRequest(sorted_pair(A.public(), other), 1) for other in others]
    for request in pairs[:2]:
        server.allocate(NODE, request, 0.0)
    with pytest.raises(AllocationError, match="no more"):
        server.allocate(NODE, pairs[2], 0.0)
    server.allocate(OTHER_NODE, pairs[2], 0.0)
    with pytest.raises(AllocationError, match="in use"):
        server.allocate(OTHER_NODE, pairs[3], 0.0)
    assert server.statistics().endpoints == 3
    server.on_time(31.0)
    server.allocate(NODE, pairs[3], 31.0)


def test_vni_wraps_and_skips() -> None:
    """After the last number comes the first that is free."""
    server = make()
    joined(server)
    server._last_vni = (1 << 24) - 2
    vnis = []
    for _ in range(2):
        pair = sorted_pair(A.public(), DiscoPrivate.generate(RNG.randbytes).public())
        vnis.append(server.allocate(NODE, AllocateRequest(pair, 1), 0.0).endpoint.vni)
    assert vnis == [(1 << 24) - 1, 2]


def test_only_a_fresh_challenge_for_that_address_binds() -> None:
    """Another address, another generation, an echoed zero: none binds."""
    server = make()
    vni = server.allocate(NODE, AllocateRequest(PAIR, 1), 0.0).endpoint.vni
    bind(server, B, A, vni, B_AT)
    challenge = challenge_of(server, A, B, vni, A_AT, 0.0)
    answer(server, A, B, challenge, C_AT, 0.1)
    answer(server, A, B, Challenge(vni, 2, B.public(), challenge.challenge), A_AT, 0.1)
    answer(server, A, B, Challenge(vni, 1, B.public(), bytes(32)), A_AT, 0.1)
    assert server.statistics().open_endpoints == 0
    answer(server, A, B, challenge, A_AT, 0.2)
    assert server.statistics().open_endpoints == 1
    # It is used up: who recorded it moves nobody.
    bind(server, A, B, vni, C_AT, 0.3, generation=2)
    answer(server, A, B, challenge, A_AT, 0.4)
    assert server.handle_datagram(data(vni), C_AT, 0.5) == (data(vni), B_AT)


@pytest.mark.parametrize(("later", "binds"), [(119.0, True), (230.0, True), (361.0, False)])
def test_secrets_rotate(later: float, binds: bool) -> None:
    """A challenge is good under the current secret and the one before, and no longer."""
    server = make()
    vni = joined(server)
    challenge = challenge_of(server, A, B, vni, C_AT, 0.0)
    for at in (100.0, 200.0, 300.0):
        if at < later:
            # Others shake hands meanwhile, which is when secrets are looked at.
            challenge_of(server, B, A, vni, B_AT, at)
    answer(server, A, B, challenge, C_AT, later)
    is_moved = server.handle_datagram(data(vni), C_AT, later) is not None
    assert is_moved == binds


def test_expiry() -> None:
    """30 s to bind; then five minutes of silence of either leg. A repeated request renews the
    time to bind, as its answer promises."""
    server = make()
    request = AllocateRequest(PAIR, 1)
    server.allocate(NODE, request, 0.0)
    server.allocate(NODE, request, 20.0)
    server.on_time(50.0)
    assert server.statistics().endpoints == 1
    server.on_time(50.1)
    assert server.statistics().endpoints == 0
    assert server.next_deadline() == float("inf")
    vni = joined(server, 100.0)
    server.handle_datagram(data(vni), A_AT, 300.0)
    server.on_time(400.0)
    assert server.statistics().endpoints == 1
    server.on_time(400.1)
    assert server.statistics().endpoints == 0
    assert server.handle_datagram(data(vni), A_AT, 401.0) is None


def test_foreign_control_packets() -> None:
    """A key that is not of the pair, the wrong VNI inside, another peer, a broken box: silence."""
    server = make()
    vni = server.allocate(NODE, AllocateRequest(PAIR, 1), 0.0).endpoint.vni
    good = control(server, A, Bind(vni, 1, B.public(), bytes(32)))
    for bad in (
        control(server, C, Bind(vni, 1, B.public(), bytes(32))),
        control(server, A, Bind(vni, 1, C.public(), bytes(32))),
        good[:4] + (vni + 1).to_bytes(3, "big") + good[7:],
        good[:-1] + bytes([good[-1] ^ 1]),
        good[:2] + b"\x7a\x12" + good[4:],
    ):
        assert server.handle_datagram(bad, A_AT, 0.0) is None
    assert server.statistics().dropped_datagrams == 5
    assert server.handle_datagram(good, A_AT, 0.0) is not None


@given(st.binary(max_size=300))
def test_hostile_datagrams(tail: bytes) -> None:
    """Whatever comes, in front of it a living VNI or not, is no error and never longer on the way
    out than on the way in."""
    server = make()
    vni = joined(server)
    for head in (b"", data(vni, b""), Header(vni, PROTOCOL_DISCO, control=True).encode()):
        for source in (A_AT, C_AT):
            out = server.handle_datagram(head + tail, source, 1.0)
            assert out is None or len(out[0]) <= len(head + tail)
    assert server.statistics().endpoints == 1
