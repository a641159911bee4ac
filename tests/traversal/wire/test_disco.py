"""Disco messages and envelopes against the specification's vectors, and as properties."""

from __future__ import annotations

import hashlib
import ipaddress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from traversal.keys import Box, DiscoPrivate, DiscoPublic, NodePrivate, NodePublic
from traversal.wire import disco, geneve
from traversal.wire.address import Address, encode_address, parse_address
from traversal.wire.classify import Kind, classify, is_plain_data


def read_vectors(name: str) -> dict[str, bytes]:
    vectors = {}
    for line in (Path(__file__).parent / "vectors" / f"{name}.txt").read_text().splitlines():
        key, equals, value = line.partition("#")[0].partition("=")
        if equals:
            vectors[key.strip()] = bytes.fromhex(value)
    return vectors


VECTORS = read_vectors("disco")
TXID = bytes(range(12))
A, B, S, R = (DiscoPrivate(VECTORS[f"key.{name}.private"]) for name in "ABSR")
N = NodePrivate(VECTORS["key.N.private"])
V4 = Address("203.0.113.7", 41641)
CHALLENGE = VECTORS["challenge.plain"][42:]
ENDPOINT = disco.RelayEndpoint(
    S.public(),
    (B.public(), A.public()),
    1,
    0xABC,
    30_000_000_000,
    300_000_000_000,
    (Address("198.51.100.20", 40000), Address("2001:db8::20", 40000)),
)

# name: (message, sender, receiver, nonce byte)
CASES = {
    "ping": (disco.Ping(TXID, N.public()), A, B, 1),
    "pong_v4": (disco.Pong(TXID, V4), B, A, 2),
    "pong_v6": (disco.Pong(TXID, Address("2001:db8::7", 41641)), B, A, 0x2B),
    "pong_derp7": (disco.Pong(TXID, Address(disco.RELAY_REGION_HOST, 7)), B, A, 0x2C),
    "cmm": (
        disco.CallMeMaybe((Address("192.0.2.10", 41641), Address("2001:db8::10", 41641))),
        A,
        B,
        3,
    ),
    "bind": (disco.Bind(0xABC, 1, B.public(), bytes(32)), A, S, 4),
    "challenge": (disco.Challenge(0xABC, 1, B.public(), CHALLENGE), S, A, 5),
    "answer": (disco.Answer(0xABC, 1, B.public(), CHALLENGE), A, S, 6),
    "via": (disco.CallMeMaybeVia(ENDPOINT), A, B, 7),
    "allocreq": (disco.AllocateRequest((B.public(), A.public()), 1), A, R, 8),
    "allocresp": (disco.AllocateResponse(1, ENDPOINT), R, A, 9),
}


@pytest.mark.parametrize("name", CASES)
def test_vector(name: str) -> None:
    """Every message encodes, seals, opens and parses to exactly the specification's bytes."""
    message, sender, receiver, nonce = CASES[name]
    assert message.encode() == VECTORS[f"{name}.plain"]
    box = Box(sender, receiver.public())
    datagram = disco.seal_envelope(message, sender.public(), box, bytes([nonce]) * 24)
    assert datagram == VECTORS[f"{name}.envelope"]
    assert disco.parse_sender(datagram) == sender.public()
    assert disco.open_envelope(datagram, Box(receiver, sender.public())) == message
    assert classify(datagram) is Kind.DISCO


@pytest.mark.parametrize("name", "ABSR")
def test_key_vectors(name: str) -> None:
    """The keys of the vectors belong together."""
    assert (
        DiscoPrivate(VECTORS[f"key.{name}.private"]).public().raw == VECTORS[f"key.{name}.public"]
    )


def test_padded_ping_without_key_is_read_but_never_sent() -> None:
    """A foreign key-less Ping with little padding parses; we refuse to make one."""
    datagram = VECTORS["ping_nokey_pad3.envelope"]
    ping = disco.open_envelope(datagram, Box(B, A.public()))
    assert ping == disco.Ping(TXID, None, 3)
    with pytest.raises(disco.DiscoError):
        disco.Ping(TXID, None, 3).encode()


def test_empty_call_me_maybe_is_read_but_never_sent() -> None:
    """An empty list parses; we refuse to send what erases our peer's state."""
    datagram = VECTORS["cmm_empty.envelope"]
    assert disco.open_envelope(datagram, Box(B, A.public())) == disco.CallMeMaybe(())
    with pytest.raises(disco.DiscoError):
        disco.CallMeMaybe(()).encode()


def test_relayed_ping_is_ping_behind_geneve_header() -> None:
    """Header and envelope of the relayed Ping come apart as specified."""
    datagram = VECTORS["relayed_ping.datagram"]
    assert classify(datagram) is Kind.RELAYED_DISCO
    header = geneve.parse_header(datagram)
    assert header == geneve.Header(0xABC, geneve.PROTOCOL_DISCO)
    assert header.encode() == datagram[:8]
    message = disco.open_envelope(datagram[8:], Box(B, A.public()))
    assert message == disco.Ping(TXID, N.public())


@pytest.mark.parametrize("name", ["bind", "challenge", "answer"])
def test_control_header_vectors(name: str) -> None:
    """Relay handshakes have the control bit set."""
    raw = VECTORS[f"{name}.geneve"]
    assert geneve.parse_header(raw) == geneve.Header(0xABC, geneve.PROTOCOL_DISCO, control=True)
    assert geneve.parse_header(raw).encode() == raw


def test_geneve_vectors_of_the_peer_relay() -> None:
    """The three headers of the peer relay specification."""
    vectors = read_vectors("peer_relay")
    for name, header in {
        "geneve.control_disco": geneve.Header(0xABC, geneve.PROTOCOL_DISCO, control=True),
        "geneve.disco": geneve.Header(0xABC, geneve.PROTOCOL_DISCO),
        "geneve.wireguard": geneve.Header(0xABC, geneve.PROTOCOL_WIREGUARD),
    }.items():
        assert header.encode() == vectors[name]


def test_ping_padded_to_1280() -> None:
    """Wire MTU 1280 over IPv4 is a payload of 1252 bytes, 1128 of them padding."""
    message = disco.Ping(TXID, N.public(), 1128)
    datagram = disco.seal_envelope(message, A.public(), Box(A, B.public()), b"\x1c" * 24)
    assert len(datagram) == disco.PING_LENGTH + 1128 == 1252
    assert hashlib.sha256(datagram).digest() == VECTORS["ping_mtu1280.sha256"]
    assert disco.open_envelope(datagram, Box(B, A.public())) == message


UP_TXID = bytes(range(1, 13))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("up.ping", disco.Ping(UP_TXID, None)),
        ("up.ping_padding3", disco.Ping(UP_TXID, None, 3)),
        ("up.pong_2.3.4.5:1234", disco.Pong(UP_TXID, Address("2.3.4.5", 1234))),
        ("up.pong_[fed0::12]:6666", disco.Pong(UP_TXID, Address("fed0::12", 6666))),
        ("up.cmm_empty", disco.CallMeMaybe(())),
        (
            "up.cmm_1.2.3.4:567_[2001::3456]:789",
            disco.CallMeMaybe((Address("1.2.3.4", 567), Address("2001::3456", 789))),
        ),
    ],
)
def test_upstream_plaintexts(name: str, message: disco.Message) -> None:
    """The plaintexts of upstream's own tests read as the same messages."""
    assert disco.parse_message(VECTORS[name]) == message


def test_upstream_messages_with_keys() -> None:
    """Upstream's Ping with key, Bind and AllocateRequest read field by field."""
    ping = disco.parse_message(VECTORS["up.ping_nodekey"])
    assert isinstance(ping, disco.Ping)
    assert ping.node_key is not None
    assert ping.node_key.raw == VECTORS["up.ping_nodekey"][14:]
    bind = disco.parse_message(VECTORS["up.bind_vni1_gen2"])
    assert isinstance(bind, disco.Bind)
    assert (bind.vni, bind.generation, bind.challenge) == (1, 2, bytes(range(32)))
    request = disco.parse_message(VECTORS["up.allocreq_gen1"])
    assert isinstance(request, disco.AllocateRequest)
    assert request.generation == 1
    assert request.clients[0] < request.clients[1]


def test_upstream_via_tail() -> None:
    """The tail of upstream's CallMeMaybeVia, behind three keys of ours."""
    keys = S.public().raw + A.public().raw + B.public().raw
    endpoint = disco.RelayEndpoint.parse(keys + VECTORS["up.via_tail"])
    assert (endpoint.lamport_id, endpoint.vni) == (123, 456)
    assert endpoint.bind_lifetime_nanoseconds == 1_000_000_000
    assert endpoint.steady_state_lifetime_nanoseconds == 60_000_000_000
    assert endpoint.addresses == (Address("1.2.3.4", 567), Address("2001::3456", 789))


class TestRefusals:
    """What must not get through."""

    @given(st.integers(min_value=48, max_value=len(VECTORS["ping.envelope"]) * 8 - 1))
    def test_any_flipped_bit(self, bit: int) -> None:
        """A flip after the magic means an unknown sender or an envelope that does not open."""
        datagram = bytearray(VECTORS["ping.envelope"])
        datagram[bit // 8] ^= 1 << bit % 8
        if disco.parse_sender(bytes(datagram)) == A.public():
            with pytest.raises(disco.DiscoError):
                disco.open_envelope(bytes(datagram), Box(B, A.public()))

    def test_79_bytes(self) -> None:
        """Shorter than 80 bytes cannot hold a message."""
        for read in (disco.parse_sender, lambda d: disco.open_envelope(d, Box(B, A.public()))):
            with pytest.raises(disco.DiscoError):
                read(VECTORS["ping.envelope"][:79])

    @pytest.mark.parametrize(
        "plaintext",
        [
            b"",
            b"\x01",
            b"\x01\x00" + bytes(11),
            b"\x01\x00" + bytes(12 + 32),
            b"\x02\x00" + bytes(29),
            VECTORS["bind.plain"][:-1],
            b"\x00\x00" + bytes(50),
            b"\x0a\x00" + bytes(50),
            b"\x07\x01" + VECTORS["via.plain"][2:],
            b"\x08\x01" + VECTORS["allocreq.plain"][2:],
            b"\x09\x01" + VECTORS["allocresp.plain"][2:],
            VECTORS["via.plain"][: 2 + 141],
            VECTORS["via.plain"][: 2 + 143],
            VECTORS["via.plain"][: 2 + 124],
            VECTORS["allocreq.plain"][:-1],
            VECTORS["allocreq.plain"][:-4] + bytes(4),
            b"\x07\x00" + bytes(32) + VECTORS["via.plain"][34:],
            b"\x07\x00" + VECTORS["via.plain"][2:34] + bytes(32) + VECTORS["via.plain"][66:],
            b"\x08\x00" + bytes(32) + VECTORS["allocreq.plain"][34:],
            b"\x09\x00" + bytes(4) + VECTORS["allocresp.plain"][6:],
            b"\x09\x00\x00",
            VECTORS["bind.plain"][:10] + bytes(32) + bytes(32),
            b"\x04\x00\x01\x00\x00\x00" + VECTORS["bind.plain"][6:],
        ],
    )
    def test_malformed_plaintext(self, plaintext: bytes) -> None:
        """Short bodies, unknown types, zero keys and generations, later versions of 7 to 9."""
        with pytest.raises(disco.DiscoError):
            disco.parse_message(plaintext)

    def test_zero_sender(self) -> None:
        """An all-zero sender is nobody."""
        with pytest.raises(disco.DiscoError):
            disco.parse_sender(disco.MAGIC + bytes(100))

    @pytest.mark.parametrize("length", [17, 19])
    def test_misaligned_call_me_maybe_is_empty(self, length: int) -> None:
        """Misaligned lists read as empty, as they do to stock nodes; so does another version."""
        assert disco.parse_message(b"\x03\x00" + bytes(length)) == disco.CallMeMaybe(())
        assert disco.parse_message(b"\x03\x01" + bytes(18)) == disco.CallMeMaybe(())

    def test_version_is_ignored_for_early_types(self) -> None:
        """A stock node reads Ping, Pong and handshakes of any version; so do we."""
        for name in ("ping", "pong_v4", "bind", "challenge", "answer"):
            plain = bytearray(VECTORS[f"{name}.plain"])
            plain[1] = 7
            assert disco.parse_message(bytes(plain)) == CASES[name][0]

    def test_long_relay_address_list_is_cut(self) -> None:
        """A relay endpoint keeps 32 addresses; each would cost us a Bind."""
        many = ENDPOINT.encode() + encode_address(V4) * 500
        assert len(disco.RelayEndpoint.parse(many).addresses) == disco.MAX_RELAY_ADDRESSES


addresses = st.builds(
    lambda ip, port: Address.from_packed(ip.packed, port),
    st.ip_addresses(),
    st.integers(0, 65535),
)
disco_keys = st.binary(min_size=32, max_size=32).filter(any).map(DiscoPublic)
node_keys = st.binary(min_size=32, max_size=32).filter(any).map(NodePublic)
txids = st.binary(min_size=12, max_size=12)
vnis = st.integers(1, 2**24 - 1)
generations = st.integers(1, 2**32 - 1)
u64 = st.integers(0, 2**64 - 1)
pairs = st.tuples(disco_keys, disco_keys).map(lambda pair: disco.sorted_pair(*pair))
challenges = st.binary(min_size=32, max_size=32)
endpoints = st.builds(
    disco.RelayEndpoint,
    disco_keys,
    pairs,
    u64,
    vnis,
    u64,
    u64,
    st.lists(addresses, min_size=1, max_size=32).map(tuple),
)
messages = st.one_of(
    st.builds(disco.Ping, txids, node_keys, st.integers(0, 9000)),
    st.builds(disco.Ping, txids, st.none()),
    st.builds(disco.Pong, txids, addresses),
    st.builds(disco.CallMeMaybe, st.lists(addresses, min_size=1, max_size=200).map(tuple)),
    st.builds(disco.Bind, vnis, generations, disco_keys, challenges),
    st.builds(disco.Challenge, vnis, generations, disco_keys, challenges),
    st.builds(disco.Answer, vnis, generations, disco_keys, challenges),
    st.builds(disco.CallMeMaybeVia, endpoints),
    st.builds(disco.AllocateRequest, pairs, generations),
    st.builds(disco.AllocateResponse, generations, endpoints),
)


@given(messages)
def test_round_trip(message: disco.Message) -> None:
    """What is encoded parses to the same message of the same class."""
    parsed = disco.parse_message(message.encode())
    assert parsed == message
    assert type(parsed) is type(message)


@given(st.integers(0, 12), st.integers(0, 2), st.binary(max_size=400))
def test_any_plaintext_parses_or_raises_disco_error(kind: int, version: int, body: bytes) -> None:
    """Whatever was sealed, the one error type is all that comes out."""
    try:
        disco.parse_message(bytes([kind, version]) + body)
    except disco.DiscoError:
        pass


@given(st.sampled_from([b"", disco.MAGIC, b"\x00\x80\x7a\x11"]), st.binary(max_size=200))
def test_any_datagram_is_classified_and_opens_or_raises(head: bytes, tail: bytes) -> None:
    """Random datagrams never raise anything but the module's own error."""
    datagram = head + tail
    assert isinstance(classify(datagram), Kind)
    for read in (disco.parse_sender, lambda d: disco.open_envelope(d, Box(B, A.public()))):
        try:
            read(datagram)
        except disco.DiscoError:
            pass
    try:
        geneve.parse_header(datagram)
    except geneve.GeneveError:
        pass


@given(addresses)
def test_addresses_round_trip(address: Address) -> None:
    """Text and wire forms of an address lead back to it, and it equals a plain tuple."""
    assert parse_address(encode_address(address)) == address
    assert Address.parse(str(address)) == address
    assert address == (address.host, address.port)
    assert address.ip == ipaddress.ip_address(address.host)


@pytest.mark.parametrize(
    "text", ["", "1.2.3.4", "1.2.3.4:x", "1.2.3.4:65536", "::1:5", "[1.2.3.4]:5"]
)
def test_bad_address_text(text: str) -> None:
    """Text that is no address is refused."""
    with pytest.raises(ValueError):  # noqa: PT011 - ipaddress has messages of its own
        Address.parse(text)


class TestClassify:
    """The demultiplexer of the shared socket."""

    @pytest.mark.parametrize(
        ("datagram", "kind"),
        [
            (bytes.fromhex("010100002112a442") + bytes(12), Kind.STUN),
            (bytes.fromhex("000100002112a442") + bytes(12), Kind.STUN),
            (bytes.fromhex("000100002112a442") + bytes(11), Kind.DATA),
            (bytes.fromhex("011100002112a442") + bytes(12), Kind.DATA),
            (bytes.fromhex("c10100002112a442") + bytes(12), Kind.DATA),
            (bytes.fromhex("00007a1200000100") + b"x", Kind.RELAYED_DATA),
            (bytes.fromhex("00007a1100000100") + b"no magic", Kind.DATA),
            (bytes.fromhex("00007a1100000100") + disco.MAGIC, Kind.RELAYED_DISCO),
            (bytes.fromhex("00017a1200000100") + b"x", Kind.DATA),
            (bytes.fromhex("00007a1200000101") + b"x", Kind.DATA),
            (disco.MAGIC + bytes(31), Kind.DATA),
            (disco.MAGIC + bytes(32), Kind.DISCO),
            (b"", Kind.DATA),
        ],
    )
    def test_table(self, datagram: bytes, kind: Kind) -> None:
        """The tests of the specification in their order, at their boundaries."""
        assert classify(datagram) is kind

    @given(st.integers(1, 4), st.binary(max_size=100))
    def test_wireguard_is_always_data(self, kind: int, rest: bytes) -> None:
        """Nothing that WireGuard sends is ever taken for a control message."""
        assert is_plain_data(bytes([kind, 0, 0, 0]) + rest)
