"""DERP frames against the vectors of the specification (6 and 18), and their leniency."""

from __future__ import annotations

import ipaddress
import json
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from traversal.keys import Box, MeshKey, NodePrivate, NodePublic
from traversal.wire import derp
from traversal.wire.derp import (
    ClientInfo,
    DerpError,
    FrameSplitter,
    FrameType,
    GoneReason,
    Health,
    KeepAlive,
    PeerGone,
    PeerPresent,
    Ping,
    Pong,
    PresentFlags,
    RecvPacket,
    Restarting,
    ServerInfo,
    maybe_parse_server_frame,
)

S = NodePrivate(bytes.fromhex("000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e5f"))
A = NodePrivate(bytes.fromhex("202122232425262728292a2b2c2d2e2f303132333435363738393a3b3c3d3e7f"))
B = NodePrivate(bytes.fromhex("404142434445464748494a4b4c4d4e4f505152535455565758595a5b5c5d5e5f"))
A_HEX = "358072d6365880d1aeea329adf9121383851ed21a28e3b75e965d0d2cd166254"
B_HEX = "79a631eede1bf9c98f12032cdeadd0e7a079398fc786b88cc846ec89af85a51a"
CLIENT_NONCE = bytes(range(0x80, 0x98))
SERVER_NONCE = bytes(range(0xA0, 0xB8))
MESH_KEY = MeshKey.parse("0123456789abcdef" * 4)


def split(data: bytes) -> list[tuple[int, bytes]]:
    splitter = FrameSplitter()
    splitter.receive_data(data)
    return list(splitter.frames())


# --- Vectors -------------------------------------------------------------------------------------

FRAMES: list[tuple[bytes, str]] = [
    (
        derp.encode_server_key(S.public()),
        (
            "01 00000028 44455250f09f9491"
            "8f40c5adb68f25624ae5b214ea767a6ec94d829d3d7b5e1ad1ba6f3e2138285f"
        ),
    ),
    (derp.encode_send_packet(B.public(), b"hello"), f"04 00000025 {B_HEX} 68656c6c6f"),
    (derp.encode_recv_packet(A.public(), b"hello"), f"05 00000025 {A_HEX} 68656c6c6f"),
    (derp.KEEP_ALIVE, "06 00000000"),
    (derp.encode_note_preferred(True), "07 00000001 01"),
    (derp.encode_note_preferred(False), "07 00000001 00"),
    (
        derp.encode_peer_gone(A.public().raw, GoneReason.DISCONNECTED),
        f"08 00000021 {A_HEX} 00",
    ),
    (derp.encode_peer_gone(B.public().raw, GoneReason.NOT_HERE), f"08 00000021 {B_HEX} 01"),
    (
        derp.encode_peer_present(
            A.public().raw, ipaddress.ip_address("203.0.113.5"), 41641, PresentFlags.REGULAR
        ),
        f"09 00000033 {A_HEX} 00000000000000000000ffffcb007105 a2a9 01",
    ),
    (
        derp.encode_peer_present(
            B.public().raw, ipaddress.ip_address("2001:db8::7"), 443, PresentFlags.MESH_PEER
        ),
        f"09 00000033 {B_HEX} 20010db8000000000000000000000007 01bb 02",
    ),
    (
        derp.encode_peer_present(
            A.public().raw, None, 0, PresentFlags.PROBER | PresentFlags.NOT_IDEAL
        ),
        f"09 00000033 {A_HEX} 00000000000000000000000000000000 0000 0c",
    ),
    (
        derp.encode_forward_packet(A.public(), B.public(), b"hello"),
        f"0a 00000045 {A_HEX} {B_HEX} 68656c6c6f",
    ),
    (derp.WATCH_CONNS, "10 00000000"),
    (derp.encode_close_peer(A.public()), f"11 00000020 {A_HEX}"),
    (derp.encode_ping(bytes(range(1, 9))), "12 00000008 0102030405060708"),
    (derp.encode_pong(bytes(range(1, 9))), "13 00000008 0102030405060708"),
    (derp.encode_health("BAD"), "14 00000003 424144"),
    (derp.encode_health(""), "14 00000000"),
    (derp.encode_restarting(1000, 5000), "15 00000008 000003e8 00001388"),
]


@pytest.mark.parametrize(("frame", "expected"), FRAMES, ids=[hexed[:2] for _, hexed in FRAMES])
def test_encoders_write_the_vectors(frame: bytes, expected: str) -> None:
    """Every frame of section 6, byte for byte."""
    assert frame == bytes.fromhex(expected)


CLIENT_INFOS: list[tuple[ClientInfo, bytes, str, str]] = [
    (
        ClientInfo(version=2, can_ack_pings=True),
        b'{"version":2,"CanAckPings":true}',
        "0200000068",
        (
            "b01c1545d10c85737f21cac2f863a6bf38a15b673d7b2bf55da90ef8f0d0d23f"
            "3a576b73a1f4fbea8919834d882e8df6"
        ),
    ),
    (
        ClientInfo(version=2, is_prober=True),
        b'{"version":2,"CanAckPings":false,"IsProber":true}',
        "0200000079",
        (
            "f7eb35c6dc10be34334d6e70c9d8965d38a15b673d7b2bf55da90ef8f0d0d23f"
            "3a576b73a1f4fbea8919835f9b379bee84adfa476d90544c254b7311ba699115bb"
        ),
    ),
    (
        ClientInfo(mesh_key=MESH_KEY, version=2),
        b'{"meshKey":"' + b"0123456789abcdef" * 4 + b'","version":2,"CanAckPings":false}',
        "02000000b6",
        (
            "04137980d2e8c134aab521ec6c59a53c38a140673c6009ff4aa90ee8ecc3a36d60233e2fc9a4f4ef"
            "995fdc5fca6adab89cba850305db5a4c235d344dfe2ad643f2fe6bcd0b5a135a4bd3b096b2581118"
            "7e9508a1d35868bcdf50489c53661e3306d6598ec5cab73633a240ac30695a2a173a8fbc1825f94f"
            "65c557a82f16"
        ),
    ),
]


@pytest.mark.parametrize(("info", "text", "header", "sealed"), CLIENT_INFOS)
def test_client_info_of_the_vectors(
    info: ClientInfo, text: bytes, header: str, sealed: str
) -> None:
    """JSON, box and frame are the reference client's; the server reads them back."""
    assert info.encode_json() == text
    frame = derp.encode_client_info(info, A, S.public(), CLIENT_NONCE)
    assert frame == bytes.fromhex(header + A_HEX) + CLIENT_NONCE + bytes.fromhex(sealed)
    key, parsed, box = derp.parse_client_info(frame[5:], S)
    assert key == A.public()
    assert parsed == info
    # The box that comes back is the one to answer with.
    answer = derp.encode_server_info(ServerInfo(), box, SERVER_NONCE)
    assert answer == bytes.fromhex(
        "0300000035a0a1a2a3a4a5a6a7a8a9aaabacadaeafb0b1b2b3b4b5b6b7"
        "bf43c9161fa6e7a3aeccd78c17f6e22c7290998345c4f87919ad718ce0"
    )
    assert derp.parse_server_info(answer[5:], Box(A, S.public())) == ServerInfo(version=2)


def test_app_name_comes_last() -> None:
    """The member order of the reference client."""
    info = ClientInfo(MESH_KEY, 2, can_ack_pings=True, is_prober=True, app_name="x")
    assert list(json.loads(info.encode_json())) == [
        "meshKey", "version", "CanAckPings", "IsProber", "AppName",
    ]  # fmt: skip


# --- JSON leniency (5.1, 5.2) --------------------------------------------------------------------

MESH_HEX = b"0123456789abcdef" * 4

ACCEPTED: list[tuple[bytes, ClientInfo]] = [
    (b"{}", ClientInfo()),
    (b"null", ClientInfo()),
    (b' { "version" : 2 } \n', ClientInfo(version=2)),
    (b'{"VERSION":2,"canackpings":true,"ISPROBER":true,"appname":"x"}',
     ClientInfo(version=2, can_ack_pings=True, is_prober=True, app_name="x")),
    (b'{"MeshKey":"' + MESH_HEX + b'"}', ClientInfo(mesh_key=MESH_KEY)),
    (b'{"MESHKEY":"' + MESH_HEX.upper() + b'"}', ClientInfo(mesh_key=MESH_KEY)),
    # A deployed client; underscores make other, unknown names.
    (b'{"can_ack_pings":false,"is_prober":false,"mesh_key":"none","version":2}',
     ClientInfo(version=2)),
    (b'{"can_ack_pings":true,"is_prober":true}', ClientInfo()),
    (b'{"unknown":{"version":[1,2,{}]},"version":3}', ClientInfo(version=3)),
    (b'{"version":null,"CanAckPings":null,"IsProber":null,"AppName":null}', ClientInfo()),
    (b'{"version":-1}', ClientInfo(version=-1)),
    # Zero is how a mesh key is absent.
    (b'{"meshKey":"' + b"0" * 64 + b'"}', ClientInfo()),
]  # fmt: skip

REJECTED = [
    b"",
    b" ",
    b"[]",
    b"[1]",
    b"2",
    b'"x"',
    b"true",
    b"{",
    b"{}{}",
    b"{} x",
    b"\xff",
    b'{"version":"2"}',
    b'{"version":2.5}',
    b'{"version":true}',
    b'{"version":[2]}',
    b'{"CanAckPings":1}',
    b'{"CanAckPings":"true"}',
    b'{"IsProber":0}',
    b'{"AppName":7}',
    b'{"meshKey":""}',
    b'{"meshKey":null}',
    b'{"meshKey":"none"}',
    b'{"meshKey":7}',
    b'{"meshKey":"' + MESH_HEX[:-1] + b'"}',
    b'{"meshKey":"' + MESH_HEX + b'0"}',
    b'{"meshKey":"' + MESH_HEX[:-1] + b'g"}',
    b'{"meshKey":" ' + MESH_HEX[:-2] + b' "}',
    b'{"MESHKEY":"' + MESH_HEX + b' "}',
    b"[" * 100_000,
    b'{"a":' * 100_000,
]


@pytest.mark.parametrize(("text", "expected"), ACCEPTED)
def test_accepted_client_info_json(text: bytes, expected: ClientInfo) -> None:
    """What the reference server accepts, with what it takes it for."""
    assert ClientInfo.parse_json(text) == expected


@pytest.mark.parametrize("number", ["9" * 400, "-" + "9" * 30, str(1 << 63)])
@pytest.mark.parametrize("name", ["version", "TokenBucketBytesPerSecond", "tokenBucketBytesBurst"])
def test_numbers_beyond_64_bits(name: str, number: str) -> None:
    """What no arithmetic can be done with is refused where it is read."""
    with pytest.raises(DerpError, match="more than 64 bits"):
        ServerInfo.parse_json(f'{{"{name}":{number}}}'.encode())


@pytest.mark.parametrize("text", REJECTED, ids=lambda text: text[:24].decode("latin-1"))
def test_rejected_client_info_json(text: bytes) -> None:
    """What the reference server rejects."""
    with pytest.raises(DerpError):
        ClientInfo.parse_json(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b'{"version":2}', ServerInfo()),
        (b"{}", ServerInfo(version=0)),
        (b"null", ServerInfo(version=0)),
        (
            b'{"version":2,"tokenbucketbytespersecond":10,"TOKENBUCKETBYTESBURST":20,"new":1}',
            ServerInfo(2, 10, 20),
        ),
    ],
)
def test_accepted_server_info_json(text: bytes, expected: ServerInfo) -> None:
    """The same leniency for what a server says."""
    assert ServerInfo.parse_json(text) == expected


def test_server_info_names_rates_only_when_there_are_any() -> None:
    """Without a limit the JSON is the reference server's."""
    assert ServerInfo().encode_json() == b'{"version":2}'
    limited = ServerInfo(2, 1000, 2000)
    assert ServerInfo.parse_json(limited.encode_json()) == limited


CLIENT_INFO_VALUES = st.builds(
    ClientInfo,
    mesh_key=st.none() | st.binary(min_size=32, max_size=32).filter(any).map(MeshKey),
    version=st.integers(0, 2**31),
    can_ack_pings=st.booleans(),
    is_prober=st.booleans(),
    app_name=st.text(st.characters(exclude_categories=("Cs",)), max_size=30),
)


@given(CLIENT_INFO_VALUES, st.binary(min_size=24, max_size=24))
def test_client_info_round_trips(info: ClientInfo, nonce: bytes) -> None:
    """A server reads what any client can say of itself."""
    frame = derp.encode_client_info(info, A, S.public(), nonce)
    assert derp.parse_client_info(frame[5:], S)[:2] == (A.public(), info)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=6,
)
MEMBER_NAMES = st.sampled_from(
    ["meshKey", "version", "CanAckPings", "IsProber", "AppName", "TokenBucketBytesBurst"]
)


@given(
    st.binary(max_size=60)
    | JSON_VALUES.map(lambda value: json.dumps(value).encode())
    | st.dictionaries(MEMBER_NAMES, JSON_VALUES).map(lambda value: json.dumps(value).encode())
)
def test_json_readers_raise_derp_error_only(text: bytes) -> None:
    """Whatever the plaintext of a box, nothing but DerpError comes out."""
    for parse in (ClientInfo.parse_json, ServerInfo.parse_json):
        try:
            parse(text)
        except DerpError:
            pass


# --- Parsers of bodies ---------------------------------------------------------------------------


def test_all_zero_client_key_is_refused() -> None:
    """No client owns the zero key, so no box opens for it."""
    with pytest.raises(DerpError):
        derp.parse_client_info(bytes(32) + bytes(72), S)


@pytest.mark.parametrize("length", [0, 55, 262145])
def test_client_info_length_bounds(length: int) -> None:
    """56 to 262144 bytes (section 4)."""
    with pytest.raises(DerpError, match="bytes, not 56"):
        derp.parse_client_info(bytes(length), S)


def test_a_client_info_for_another_server_does_not_open() -> None:
    """The box binds the server's key: a recorded CLIENT_INFO is of no use elsewhere."""
    frame = derp.encode_client_info(ClientInfo(), A, B.public(), CLIENT_NONCE)
    with pytest.raises(DerpError):
        derp.parse_client_info(frame[5:], S)


@pytest.mark.parametrize(
    ("body", "is_good"),
    [
        (derp.MAGIC + bytes(32), True),
        (derp.MAGIC + bytes(32 + 984), True),
        (derp.MAGIC + bytes(32 + 985), False),
        (derp.MAGIC + bytes(31), False),
        (b"DERP\xf0\x9f\x94\x92" + bytes(32), False),
        (b"", False),
    ],
)
def test_server_key_bounds(body: bytes, is_good: bool) -> None:
    """40 to 1024 bytes that start with the magic; what follows the key is ignored."""
    if is_good:
        assert derp.parse_server_key(body) == NodePublic(bytes(32))
    else:
        with pytest.raises(DerpError):
            derp.parse_server_key(body)


def test_largest_payload() -> None:
    """65536 bytes pass, with the largest legal header; one more is a local error."""
    assert derp.encode_send_packet(B.public(), bytes(65536))[:5] == bytes.fromhex("0400010020")
    with pytest.raises(DerpError):
        derp.encode_send_packet(B.public(), bytes(65537))


KEY = A.public()
MAPPED = bytes.fromhex("00000000000000000000ffffcb007105a2a9")

SERVER_FRAMES: list[tuple[int, bytes, object]] = [
    (0x05, KEY.raw + b"hello", RecvPacket(KEY, b"hello")),
    (0x05, KEY.raw, RecvPacket(KEY, b"")),
    (0x05, KEY.raw[:31], None),
    (0x06, b"", KeepAlive()),
    (0x06, b"later extension", KeepAlive()),
    (0x08, KEY.raw + b"\x01", PeerGone(KEY, 1)),
    (0x08, KEY.raw + b"\x01more", PeerGone(KEY, 1)),
    (0x08, KEY.raw, PeerGone(KEY, 0)),
    (0x08, KEY.raw + b"\x77", PeerGone(KEY, 0x77)),
    (0x08, KEY.raw[:31], None),
    (0x09, KEY.raw, PeerPresent(KEY)),
    (0x09, KEY.raw + MAPPED[:17], PeerPresent(KEY)),
    (0x09, KEY.raw + MAPPED, PeerPresent(KEY, ipaddress.ip_address("203.0.113.5"), 41641, 0)),
    (
        0x09,
        KEY.raw + MAPPED + b"\x09more",
        PeerPresent(KEY, ipaddress.ip_address("203.0.113.5"), 41641, 9),
    ),
    (0x09, KEY.raw + bytes(18) + b"\x0c", PeerPresent(KEY, None, 0, 12)),
    (0x09, KEY.raw[:31], None),
    (0x12, b"12345678", Ping(b"12345678")),
    (0x12, b"123456789", Ping(b"12345678")),
    (0x12, b"1234567", None),
    (0x13, b"12345678more", Pong(b"12345678")),
    (0x13, b"1234567", None),
    (0x14, b"", Health("")),
    (0x14, "naïve".encode(), Health("naïve")),
    (0x14, b"\xff", Health("�")),
    (0x15, bytes.fromhex("000003e800001388"), Restarting(1000, 5000)),
    (0x15, bytes(9), Restarting(0, 0)),
    (0x15, bytes(7), None),
    (0x01, derp.MAGIC + bytes(32), None),  # fast start: repeated
    (0x02, b"", None),
    (0x0B, b"", None),
    (0xFF, b"x", None),
]


@pytest.mark.parametrize(("frame_type", "body", "expected"), SERVER_FRAMES)
def test_server_frames(frame_type: int, body: bytes, expected: object) -> None:
    """Known frames with room for extension; short and unknown ones are skipped (section 6)."""
    assert maybe_parse_server_frame(frame_type, body) == expected


@given(st.integers(0, 255), st.binary(max_size=120))
def test_no_server_frame_makes_a_client_raise(frame_type: int, body: bytes) -> None:
    """After the handshake a client reads anything without an error."""
    maybe_parse_server_frame(frame_type, body)


BODY_PARSERS: list[Callable[[bytes], object]] = [
    derp.parse_server_key,
    lambda body: derp.parse_server_info(body, Box(A, S.public())),
    lambda body: derp.parse_client_info(body, S),
]


@given(st.binary(max_size=200))
def test_body_parsers_raise_derp_error_only(body: bytes) -> None:
    """Whatever the bytes, nothing but DerpError comes out of the handshake's parsers."""
    for parse in BODY_PARSERS:
        try:
            parse(body)
        except DerpError:
            pass


@pytest.mark.parametrize(
    ("payload", "expected"),
    [
        (derp.DISCO_MAGIC + bytes(56), True),
        (derp.DISCO_MAGIC + bytes(55), False),
        (b"TS\xf0\x9f\x92\xad" + bytes(56), False),
        (bytes(62), False),
        (b"", False),
    ],
)
def test_looks_like_disco(payload: bytes, expected: bool) -> None:
    """62 bytes and the magic (section 7.3), in whatever kind of buffer."""
    assert derp.looks_like_disco(payload) is expected
    assert derp.looks_like_disco(memoryview(bytearray(payload))) is expected


# --- Splitting -----------------------------------------------------------------------------------


@given(
    st.lists(st.tuples(st.integers(0, 255), st.binary(max_size=40)), max_size=8),
    st.lists(st.integers(1, 30), min_size=1, max_size=20),
)
def test_frames_survive_any_split(frames: list[tuple[int, bytes]], sizes: list[int]) -> None:
    """However the stream is cut, the same frames come out, each as soon as it is complete."""
    stream = b"".join(derp.HEADER.pack(kind, len(body)) + body for kind, body in frames)
    splitter = FrameSplitter()
    got: list[tuple[int, bytes]] = []
    position = turn = 0
    while position < len(stream):
        size = sizes[turn % len(sizes)]
        splitter.receive_data(stream[position : position + size])
        got.extend(splitter.frames())
        position += size
        turn += 1
    assert got == frames


def test_an_abandoned_iteration_loses_nothing() -> None:
    """Who stops in the middle gets the rest with the next call."""
    splitter = FrameSplitter()
    splitter.receive_data(derp.KEEP_ALIVE + derp.encode_health("x") + derp.KEEP_ALIVE[:3])
    for frame_type, _ in splitter.frames():
        assert frame_type == FrameType.KEEP_ALIVE
        break
    splitter.receive_data(derp.KEEP_ALIVE[3:])
    assert [frame_type for frame_type, _ in splitter.frames()] == [0x14, 0x06]


def test_a_frame_that_is_too_long_is_refused_by_its_header() -> None:
    """1 MiB is the bound, and no body has to arrive for it."""
    splitter = FrameSplitter()
    splitter.receive_data(derp.HEADER.pack(0x7F, 1 << 20) + bytes(1 << 20))
    assert [len(body) for _, body in splitter.frames()] == [1 << 20]
    splitter.receive_data(derp.HEADER.pack(0x7F, (1 << 20) + 1))
    with pytest.raises(DerpError):
        list(splitter.frames())


@given(st.binary(max_size=100))
def test_the_splitter_raises_derp_error_only(data: bytes) -> None:
    """Whatever the bytes."""
    try:
        split(data)
    except DerpError:
        pass
