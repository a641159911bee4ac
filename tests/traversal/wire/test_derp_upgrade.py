"""Requests, meta certificate and handshake of a client (DERP specification 3, 5 and 18)."""

from __future__ import annotations

import hashlib
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from traversal.keys import Box, NodePrivate, NodePublic
from traversal.wire import derp
from traversal.wire.derp import ClientInfo, DerpError, ServerInfo
from traversal.wire.derp_upgrade import (
    ClientHandshake,
    encode_upgrade_request,
    encode_upgrade_response,
    maybe_server_key_from_certificates,
)

S = NodePrivate(bytes.fromhex("000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e5f"))
A = NodePrivate(bytes.fromhex("202122232425262728292a2b2c2d2e2f303132333435363738393a3b3c3d3e7f"))
INFO = ClientInfo(version=2, can_ack_pings=True)

META_CERTIFICATE = bytes.fromhex(
    "3082016330820115a003020102020102300506032b657030523150304e06035504031347646572706b65793866"
    "3430633561646236386632353632346165356232313465613736376136656339346438323964336437623565316164"
    "31626136663365323133383238356630"
    "1e170d3236303130313030303030305a170d3236303330323030303030305a"
    "30523150304e06035504031347646572706b657938663430633561646236386632353632346165356232313465"
    "613736376136656339346438323964336437623565316164316261366633653231333832383566302a300506032b"
    "6570032100dde3bccec7f3a66a1115f45d720f4dc135c3ae7c4e22dca38fdb1efd6a495ff8a310300e300c0603"
    "551d130101ff04023000300506032b6570034100ea612ffac67f8ed31b4fbc6343125db09a0c0289bff33e0bb8"
    "7f018fd6c96a2c8a9fa6db7c2cbcd68f9456ef8357829d10fea7ba2ed257c7badb6cdb1f918805"
)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


# --- Requests and responses ----------------------------------------------------------------------


def test_upgrade_response_of_the_vector() -> None:
    """172 bytes, as derper writes them."""
    response = encode_upgrade_response(S.public())
    assert len(response) == 172
    assert sha256(response) == "790e593f8974fdf137a27e4b7b16a43f14925c2aa1d04aba37b97e135709e38a"


def test_fast_start_request_of_the_vector() -> None:
    """102 bytes, headers in the reference client's order."""
    request = encode_upgrade_request("derp.example.com", fast_start=True)
    assert len(request) == 102
    assert sha256(request) == "e24a4d49f2311deaa9000e5a5e9595a2b3d54d51c048d578915f74e0af125ce0"


def test_optional_headers() -> None:
    """A slow start says nothing of a fast one; node and token are told when there are any."""
    assert b"Derp-Fast-Start" not in encode_upgrade_request("h")
    request = encode_upgrade_request("h", ideal_node="900a", token="t")
    assert b"\r\nIdeal-Node: 900a\r\n" in request
    assert b"\r\nAuthorization: Bearer t\r\n" in request
    assert request.endswith(b"\r\n\r\n")


@pytest.mark.parametrize("where", ["host", "ideal_node", "token"])
@pytest.mark.parametrize("bad", ["a\r\nX: y", "a\n", "\r"])
def test_no_header_can_be_smuggled_in(where: str, bad: str) -> None:
    """A line break in a value is a local error."""
    values = {"host": "h", "ideal_node": "", "token": ""} | {where: bad}
    with pytest.raises(ValueError, match="line break"):
        encode_upgrade_request(
            values["host"], ideal_node=values["ideal_node"], token=values["token"]
        )


# --- Meta certificate ----------------------------------------------------------------------------


def with_serial(serial: int) -> bytes:
    assert META_CERTIFICATE[13:16] == b"\x02\x01\x02"
    return META_CERTIFICATE[:15] + bytes([serial]) + META_CERTIFICATE[16:]


def test_meta_certificate_of_the_vector() -> None:
    """The key is found wherever the certificate stands in the chain."""
    assert sha256(META_CERTIFICATE) == (
        "94868ca7904db522be0ef47b4ecd85dda53a40e679aa4f38afee112b4f9e59ab"
    )
    for chain in (
        [META_CERTIFICATE],
        [b"", META_CERTIFICATE],
        [b"no DER", META_CERTIFICATE, b"\x30"],
        [META_CERTIFICATE.replace(b"derpkey", b"derpKey"), META_CERTIFICATE],
    ):
        assert maybe_server_key_from_certificates(chain) == S.public()


@pytest.mark.parametrize(
    "chain",
    [
        [],
        [b""],
        [with_serial(0)],  # version 0: slow start
        [META_CERTIFICATE.replace(b"derpkey8", b"derpkeyg")],
        [META_CERTIFICATE.replace(b"derpkey8", b"derpkey ")],
        [META_CERTIFICATE.replace(b"derpkey", b"terpkey")],
        [META_CERTIFICATE[:200]],
    ],
)
def test_chains_without_a_usable_meta_certificate(chain: list[bytes]) -> None:
    """They lead to a slow start, never to an error."""
    assert maybe_server_key_from_certificates(chain) is None


def test_a_serial_above_one_byte_is_no_version() -> None:
    """The serial number must have at most 8 bits."""
    tbs = META_CERTIFICATE[8:13] + b"\x02\x02\x01\x02" + META_CERTIFICATE[16:]
    longer = b"\x30\x82\x01\x64\x30\x82\x01\x16" + tbs
    assert maybe_server_key_from_certificates([longer]) is None
    same = b"\x30\x82\x01\x64\x30\x82\x01\x16" + META_CERTIFICATE[8:13] + b"\x02\x02\x00\x02"
    assert maybe_server_key_from_certificates([same + META_CERTIFICATE[16:]]) == S.public()


@given(st.binary(max_size=100))
def test_noise_is_no_certificate(noise: bytes) -> None:
    """Whatever the bytes, no exception."""
    assert maybe_server_key_from_certificates([noise, b"\x30" + noise]) is None


@given(st.integers(0, len(META_CERTIFICATE) - 1), st.binary(min_size=1, max_size=4), st.booleans())
def test_damaged_certificates_do_not_raise(position: int, noise: bytes, cut: bool) -> None:
    """A meta certificate with some bytes changed, or cut off, gives a key or None."""
    damaged = META_CERTIFICATE[:position] + noise
    if not cut:
        damaged += META_CERTIFICATE[position + len(noise) :]
    maybe_server_key_from_certificates([damaged])


# --- Handshake -----------------------------------------------------------------------------------


def handshake(*, server_key: NodePublic | None = None) -> ClientHandshake:
    return ClientHandshake(
        A, "derp.example.com", info=INFO, nonce=bytes(range(24)), server_key=server_key
    )


def server_answer(info: ServerInfo | None = None) -> bytes:
    return derp.encode_server_info(info or ServerInfo(), Box(S, A.public()), bytes(24))


def feed(client: ClientHandshake, data: bytes, cuts: list[int]) -> bytes:
    """Pass `data` in pieces that end at `cuts`."""
    sent = b""
    for start, end in pairwise([0, *sorted({min(cut, len(data)) for cut in cuts}), len(data)]):
        sent += client.receive_data(data[start:end])
    return sent


CUTS = st.lists(st.integers(0, 300), max_size=12)


@given(CUTS, CUTS)
def test_slow_start_in_any_split(cuts: list[int], more_cuts: list[int]) -> None:
    """Request, 101 and SERVER_KEY, CLIENT_INFO, SERVER_INFO; what follows stays in order."""
    client = handshake()
    assert client.first_flight() == encode_upgrade_request("derp.example.com")
    greeting = encode_upgrade_response(S.public()) + derp.encode_server_key(S.public())
    sent = feed(client, greeting, cuts)
    assert client.server_key == S.public()
    frame_type, length = derp.HEADER.unpack_from(sent)
    assert (frame_type, length) == (0x02, len(sent) - 5)
    assert derp.parse_client_info(sent[5:], S)[:2] == (A.public(), INFO)
    assert client.server_info is None
    tail = derp.encode_recv_packet(S.public(), b"first") + derp.KEEP_ALIVE
    assert feed(client, server_answer(ServerInfo(2, 5, 6)) + tail, more_cuts) == b""
    assert client.server_info == ServerInfo(2, 5, 6)
    assert list(client.splitter.frames()) == [(5, S.public().raw + b"first"), (6, b"")]


@given(CUTS, st.booleans())
def test_fast_start_in_any_split(cuts: list[int], with_server_key: bool) -> None:
    """CLIENT_INFO leaves with the request; SERVER_KEY is skipped when it comes."""
    client = handshake(server_key=S.public())
    request = encode_upgrade_request("derp.example.com", fast_start=True)
    flight = client.first_flight()
    assert flight.startswith(request)
    assert derp.parse_client_info(flight[len(request) + 5 :], S)[0] == A.public()
    greeting = derp.encode_server_key(S.public()) if with_server_key else b""
    assert feed(client, greeting + server_answer(), cuts) == b""
    assert client.server_info == ServerInfo()


BAD_ANSWERS = [
    b"HTTP/1.1 426 Upgrade Required\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n",
    b"HTTP/2 101 x\r\n\r\n",
    b"SSH-2.0-x\r\n\r\n",
    b"\r\n\r\n",
    b"x" * 16385,
    b"HTTP/1.1 101 \r\n\r\n" + derp.KEEP_ALIVE,
    b"HTTP/1.1 101 \r\n\r\n" + server_answer(),
    b"HTTP/1.1 101 \r\n\r\n" + derp.HEADER.pack(1, 2) + b"xx",
    b"HTTP/1.1 101 \r\n\r\n" + derp.encode_server_key(NodePublic(bytes(32))),
    b"HTTP/1.1 101 \r\n\r\n" + derp.encode_server_key(NodePublic(b"\1" + bytes(31))),
    b"HTTP/1.1 101 \r\n\r\n"
    + derp.encode_server_key(S.public())
    + derp.encode_server_info(ServerInfo(), Box(A, A.public()), bytes(24)),
    b"HTTP/1.1 101 \r\n\r\n" + derp.encode_server_key(S.public()) + derp.HEADER.pack(9, 1 << 21),
]


@pytest.mark.parametrize("answer", BAD_ANSWERS, ids=lambda answer: repr(answer[:40]))
def test_wrong_answers_end_the_handshake(answer: bytes) -> None:
    """Each with a DerpError, and never with a handshake that counts as done."""
    client = handshake()
    with pytest.raises(DerpError):
        client.receive_data(answer)
    assert client.server_info is None


def test_a_meta_certificate_with_an_unusable_key_is_a_derp_error() -> None:
    """No honest server has the zero key."""
    with pytest.raises(DerpError):
        handshake(server_key=NodePublic(bytes(32))).first_flight()


GOOD_START = encode_upgrade_response(S.public()) + derp.encode_server_key(S.public())


@given(
    st.sampled_from([b"", b"HTTP/1.1 101 x\r\n\r\n", GOOD_START]),
    st.binary(max_size=200),
    CUTS,
    st.booleans(),
)
def test_the_handshake_raises_derp_error_only(
    start: bytes, noise: bytes, cuts: list[int], fast: bool
) -> None:
    """Whatever a server sends, in whatever pieces."""
    client = handshake(server_key=S.public() if fast else None)
    try:
        feed(client, start + noise, cuts)
    except DerpError:
        pass
    assert client.server_info is None
