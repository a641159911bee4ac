"""SOCKS 5 messages, with the layouts of RFC 1928."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from traversal.wire.socks import (
    SocksError,
    SocksRequest,
    SocksStatus,
    encode_choice,
    encode_reply,
    parse_greeting,
    parse_request,
)


def test_greeting() -> None:
    """A greeting that offers "no authentication" is taken, one that doesn't is refused."""
    assert parse_greeting(bytes.fromhex("050100")) == 3
    assert parse_greeting(bytes.fromhex("05020200ff")) == 4
    assert parse_greeting(bytes.fromhex("0502")) is None
    with pytest.raises(SocksError):
        parse_greeting(bytes.fromhex("050102"))
    with pytest.raises(SocksError):
        parse_greeting(b"GET / HTTP/1.1")
    assert encode_choice(is_acceptable=True) == bytes.fromhex("0500")
    assert encode_choice(is_acceptable=False) == bytes.fromhex("05ff")


@pytest.mark.parametrize(
    ("hexadecimal", "request_", "length"),
    [
        ("05010001c00002010050", SocksRequest("192.0.2.1", 80), 10),
        ("0501000304686f737401bbff", SocksRequest("host", 443), 11),
        ("0501000420010db80000000000000000000000010016", SocksRequest("2001:db8::1", 22), 22),
    ],
)
def test_request(hexadecimal: str, request_: SocksRequest, length: int) -> None:
    """Each address type is read, and every shorter piece is incomplete."""
    data = bytes.fromhex(hexadecimal)
    assert parse_request(data) == (request_, length)
    for end in range(length):
        assert parse_request(data[:end]) is None


def test_refusals() -> None:
    """BIND and strange address types are refused with the status that says so."""
    with pytest.raises(SocksError) as caught:
        parse_request(bytes.fromhex("05020001c00002010050"))
    assert caught.value.status is SocksStatus.COMMAND_UNSUPPORTED
    with pytest.raises(SocksError) as caught:
        parse_request(bytes.fromhex("05010009c00002010050"))
    assert caught.value.status is SocksStatus.ADDRESS_UNSUPPORTED
    assert encode_reply(SocksStatus.NOT_ALLOWED) == bytes.fromhex("05020001000000000000")


@given(st.binary(max_size=300), st.booleans())
def test_survives_anything(data: bytes, looks_right: bool) -> None:
    """Whatever comes, the answer is a message, None or SocksError."""
    if looks_right:
        data = b"\5\1\0" + data
    for parse in (parse_greeting, parse_request):
        try:
            parse(data)
        except SocksError:
            pass
