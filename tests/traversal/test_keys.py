"""Keys and the box (DERP specification 2 and 18.1)."""

from __future__ import annotations

import nacl.bindings
import pytest
from hypothesis import given
from hypothesis import strategies as st

from traversal.keys import (
    Box,
    BoxError,
    DiscoPrivate,
    DiscoPublic,
    KeyFormatError,
    MeshKey,
    NodePrivate,
    NodePublic,
)

S_PRIVATE = "000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e5f"
S_PUBLIC = "8f40c5adb68f25624ae5b214ea767a6ec94d829d3d7b5e1ad1ba6f3e2138285f"
A_PRIVATE = "202122232425262728292a2b2c2d2e2f303132333435363738393a3b3c3d3e7f"
A_PUBLIC = "358072d6365880d1aeea329adf9121383851ed21a28e3b75e965d0d2cd166254"
B_PRIVATE = "404142434445464748494a4b4c4d4e4f505152535455565758595a5b5c5d5e5f"
B_PUBLIC = "79a631eede1bf9c98f12032cdeadd0e7a079398fc786b88cc846ec89af85a51a"

RAW_KEYS = st.binary(min_size=32, max_size=32)


@pytest.mark.parametrize(
    ("private", "public"),
    [(S_PRIVATE, S_PUBLIC), (A_PRIVATE, A_PUBLIC), (B_PRIVATE, B_PUBLIC)],
)
def test_public_keys_of_the_vectors(private: str, public: str) -> None:
    """The public half is X25519 of the private one and the base point."""
    key = NodePrivate.parse(f"privkey:{private}")
    assert str(key.public()) == f"nodekey:{public}"
    assert key.public().raw.hex() == public


def test_shared_key_of_the_vectors() -> None:
    """The box key is HSalsa20 over X25519."""
    shared = nacl.bindings.crypto_box_beforenm(bytes.fromhex(S_PUBLIC), bytes.fromhex(A_PRIVATE))
    assert shared.hex() == "429b61f5d96e37268dfc5114849d599c9ceabffdb68c1f52cd0499af30f5b377"


def test_private_keys_are_clamped_when_generated() -> None:
    """Whatever the entropy, a generated key has the bits that X25519 wants."""
    counting = NodePrivate.generate(lambda size: bytes(range(size)))
    assert counting.reveal() == f"privkey:{S_PRIVATE}"
    ones = NodePrivate.generate(lambda size: b"\xff" * size)
    assert ones.raw[0] == 0xF8
    assert ones.raw[31] == 0x7F


@given(RAW_KEYS)
def test_text_forms_round_trip(raw: bytes) -> None:
    """What is printed is read back, in either case of hex."""
    assert NodePublic.parse(str(NodePublic(raw))) == NodePublic(raw)
    assert NodePublic.from_hex(raw.hex().upper()) == NodePublic(raw)
    assert DiscoPublic.parse("discokey:" + raw.hex().upper()) == DiscoPublic(raw)
    assert NodePrivate.parse(NodePrivate(raw).reveal()) == NodePrivate(raw)
    assert MeshKey.parse(f" \t{MeshKey(raw).reveal()}\r\n") == MeshKey(raw)


@given(st.text(max_size=80) | st.text(alphabet="0123456789abcdefABCDEF :nodekypriv", max_size=80))
def test_no_text_makes_a_reader_raise_anything_else(text: str) -> None:
    """Text that is no key raises KeyFormatError, and nothing but it."""
    for parse in (
        NodePublic.parse,
        NodePublic.from_hex,
        NodePrivate.parse,
        DiscoPublic.parse,
        MeshKey.parse,
    ):
        for candidate in (text, f"nodekey:{text}", f"privkey:{text}", f"discokey:{text}"):
            try:
                parse(candidate)
            except KeyFormatError:
                pass


@pytest.mark.parametrize(
    "text",
    [
        "",
        S_PUBLIC,  # untyped where the type is due
        f"privkey:{S_PUBLIC}",
        f"NODEKEY:{S_PUBLIC}",
        f"nodekey:{S_PUBLIC[:-1]}",
        f"nodekey:{S_PUBLIC}0",
        f"nodekey:{S_PUBLIC[:-1]}g",
        f"nodekey:{S_PUBLIC[:-2]}  ",  # fromhex would skip white space
        f"nodekey: {S_PUBLIC[:-1]}",
        "nodekey:" + "\u0661" * 64,  # digits, but not ASCII
    ],
)
def test_malformed_node_keys_are_refused(text: str) -> None:
    """A node key is the prefix and exactly 64 ASCII hex digits."""
    with pytest.raises(KeyFormatError):
        NodePublic.parse(text)


def test_key_errors_do_not_tell_the_key() -> None:
    """An error about a private or mesh key can be logged."""
    with pytest.raises(KeyFormatError) as error:
        NodePrivate.parse(f"privkey:{S_PRIVATE[:-1]}g")
    assert S_PRIVATE[:20] not in str(error.value)
    with pytest.raises(KeyFormatError) as error:
        MeshKey.parse(S_PRIVATE[:-1] + "g")
    assert S_PRIVATE[:20] not in str(error.value)


@pytest.mark.parametrize("kind", [NodePrivate, DiscoPrivate, MeshKey])
def test_secrets_stay_out_of_repr(kind: type[NodePrivate | DiscoPrivate | MeshKey]) -> None:
    """Neither repr nor str of a secret shows it, in hex or as bytes."""
    key = kind(bytes.fromhex(S_PRIVATE))
    for text in (repr(key), str(key), f"{key}"):
        assert "0102" not in text
        assert "\\x01\\x02" not in text


def test_keys_of_different_kinds_differ() -> None:
    """Equal bytes do not make a node key of a disco key, nor a mesh key of a private key."""
    raw = bytes(range(32))
    assert NodePublic(raw) != DiscoPublic(raw)
    assert NodePrivate(raw) != MeshKey(raw)
    assert MeshKey(raw) == MeshKey(bytes(range(32)))
    assert hash(MeshKey(raw)) == hash(MeshKey(bytes(range(32))))
    assert MeshKey(raw) != MeshKey(bytes(32))


def test_zero_is_no_key() -> None:
    """The all-zero public key counts as absent and makes no box."""
    assert not NodePublic(bytes(32))
    assert NodePublic(bytes(31) + b"\x01")
    with pytest.raises(KeyFormatError):
        Box(NodePrivate(bytes.fromhex(S_PRIVATE)), NodePublic(bytes(32)))


@pytest.mark.parametrize(
    "point",
    [
        "0100000000000000000000000000000000000000000000000000000000000000",
        "ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
        "e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800",
    ],
)
def test_points_of_low_order_make_no_box(point: str) -> None:
    """A public key whose shared secret everybody knows is refused."""
    with pytest.raises(KeyFormatError):
        Box(NodePrivate(bytes.fromhex(S_PRIVATE)), NodePublic.from_hex(point))


def test_short_forms() -> None:
    """Logs show the conventional short forms."""
    assert NodePublic.from_hex(A_PUBLIC).short() == "[NYBy1]"
    assert repr(NodePublic.from_hex(A_PUBLIC)) == "<NodePublic [NYBy1]>"
    assert DiscoPublic.from_hex(A_PUBLIC).short() == "d:358072d6365880d1"


@given(st.binary(max_size=300), st.binary(min_size=24, max_size=24))
def test_what_one_side_seals_the_other_opens(plaintext: bytes, nonce: bytes) -> None:
    """Both directions, with 40 bytes of overhead."""
    a, s = NodePrivate(bytes.fromhex(A_PRIVATE)), NodePrivate(bytes.fromhex(S_PRIVATE))
    sealed = Box(a, s.public()).seal(plaintext, nonce)
    assert sealed[:24] == nonce
    assert len(sealed) == len(plaintext) + 40
    assert Box(s, a.public()).open(sealed) == plaintext


@given(st.binary(max_size=200), st.data())
def test_forged_messages_do_not_open(noise: bytes, data: st.DataObject) -> None:
    """Noise, and a sealed message with any bit changed or cut short, raise BoxError only."""
    a, s = NodePrivate(bytes.fromhex(A_PRIVATE)), NodePrivate(bytes.fromhex(S_PRIVATE))
    box = Box(s, a.public())
    with pytest.raises(BoxError):
        box.open(noise)
    sealed = bytearray(Box(a, s.public()).seal(b"hello", bytes(24)))
    position = data.draw(st.integers(0, len(sealed) - 1))
    with pytest.raises(BoxError):
        box.open(bytes(sealed[:position]))
    sealed[position] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(BoxError):
        box.open(bytes(sealed))
