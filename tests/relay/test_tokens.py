"""Tokens: a genuine one opens to its claims; any other says why not."""

from __future__ import annotations

import base64
import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.tokens import (
    Claims,
    Token,
    TokenError,
    TokenKey,
    TokenSigner,
    open_token,
    parse_token_id,
)
from traversal.keys import NodePublic

SIGNER = TokenSigner(bytes(range(32)))
OTHER = TokenSigner(bytes(range(1, 33)))
NODE = NodePublic(bytes([7] * 32))
CLAIMS = Claims("alice-1", NODE, 2_000, 1_000_000, 2_000_000, frozenset({NodePublic(b"x" * 32)}))
TOKEN = SIGNER.issue(CLAIMS)

node_keys = st.binary(min_size=32, max_size=32).filter(any).map(NodePublic)
claims = st.builds(
    Claims,
    id=st.from_regex(r"[A-Za-z0-9._-]{1,64}", fullmatch=True),
    key=node_keys,
    expires_unix=st.integers(1, 2**40),
    rate_bytes_per_second=st.none() | st.integers(1, 2**50),
    burst_bytes=st.none() | st.integers(1, 2**50),
    peers=st.none() | st.frozensets(node_keys, max_size=5),
)


@given(claims)
def test_issue_and_verify_are_inverse(claims: Claims) -> None:
    """What was granted is what is read."""
    token = SIGNER.issue(claims)
    assert open_token(token, [SIGNER.public()]) == Token(claims, SIGNER.public())


def test_form() -> None:
    """Three parts, safe in a header; the same claims give the same text."""
    assert TOKEN.startswith("upt1.")
    assert TOKEN.count(".") == 2
    assert "=" not in TOKEN
    assert SIGNER.issue(CLAIMS) == TOKEN


def test_several_keys_may_sign_while_they_are_changed() -> None:
    """An operator replaces a key without a gap."""
    keys = [OTHER.public(), SIGNER.public()]
    assert open_token(TOKEN, keys).claims == CLAIMS


@pytest.mark.parametrize(
    ("unix_time", "revoked", "keys", "problem"),
    [
        (1_999, {"bob"}, {SIGNER.public()}, None),
        (2_000, set(), {SIGNER.public()}, "token alice-1 has expired"),
        (0, {"alice-1"}, {SIGNER.public()}, "token alice-1 was revoked"),
        (0, set(), {OTHER.public()}, "token alice-1 is signed by a key that no longer counts"),
    ],
)
def test_a_token_can_stop_to_count_in_three_ways(
    unix_time: float, revoked: set[str], keys: set[TokenKey], problem: str | None
) -> None:
    """The holder's operator needs to know which."""
    token = open_token(TOKEN, [SIGNER.public()])
    assert token.problem(keys, unix_time=unix_time, revoked=revoked) == problem


def test_a_foreign_signature_is_refused() -> None:
    """Also when there is no key at all."""
    for keys in ([OTHER.public()], []):
        with pytest.raises(TokenError, match="not signed"):
            open_token(TOKEN, keys)


@given(st.integers(0, len(TOKEN) - 1), st.characters(codec="ascii"))
def test_any_other_text_is_refused(position: int, character: str) -> None:
    """One token, one text: no bit of it may change, not even where base64 has spare bits."""
    changed = TOKEN[:position] + character + TOKEN[position + 1 :]
    if changed != TOKEN:
        with pytest.raises(TokenError):
            open_token(changed, [SIGNER.public()])


@given(st.text(max_size=300) | st.text(max_size=100).map("upt1.{}".format))
def test_any_text_makes_the_one_error(text: str) -> None:
    """Strangers write what they like."""
    with pytest.raises(TokenError):
        open_token(text, [SIGNER.public()])


@pytest.mark.parametrize(
    "payload",
    [
        b"{}",
        b"[",
        b'{"id":"a","key":"nodekey:00","expires":1}',
        b'{"id":"a b","key":"nodekey:' + b"07" * 32 + b'","expires":1}',
        b'{"id":"a","key":"nodekey:' + b"07" * 32 + b'","expires":1,"bandwidth":5}',
        b'{"id":"a","key":"nodekey:' + b"07" * 32 + b'","expires":1,"rate":0}',
        b'{"id":"a","key":"nodekey:' + b"00" * 32 + b'","expires":1}',
    ],
)
def test_signed_nonsense_is_refused(payload: bytes) -> None:
    """A restriction that is not understood must not be ignored."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    def encode(data: bytes) -> str:
        return base64.urlsafe_b64encode(data).rstrip(b"=").decode()

    signed = f"upt1.{encode(payload)}"
    signature = Ed25519PrivateKey.from_private_bytes(SIGNER.raw).sign(signed.encode())
    with pytest.raises(TokenError):
        open_token(f"{signed}.{encode(signature)}", [SIGNER.public()])


def test_claims_are_bounded() -> None:
    """A token has to fit into a request header."""
    many = frozenset(NodePublic(bytes([1, n]) + bytes(30)) for n in range(65))
    with pytest.raises(TokenError, match="64 peers"):
        dataclasses.replace(CLAIMS, peers=many)
    most = dataclasses.replace(CLAIMS, peers=frozenset(list(many)[:64]))
    assert len(SIGNER.issue(most)) < 8192


def test_keys_have_a_text_form_and_hide_the_secret() -> None:
    """Round trips; no repr tells."""
    assert TokenSigner.parse(SIGNER.reveal() + "\n") == SIGNER
    assert TokenKey.parse(str(SIGNER.public())) == SIGNER.public()
    assert SIGNER.raw.hex() not in repr(SIGNER)
    with pytest.raises(TokenError) as caught:
        TokenSigner.parse(SIGNER.reveal()[:-1])
    assert SIGNER.raw.hex()[:8] not in str(caught.value)
    with pytest.raises(TokenError):
        parse_token_id("two words")
