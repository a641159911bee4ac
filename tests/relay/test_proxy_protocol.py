"""PROXY headers and X-Forwarded-For: right ones are read, wrong ones make one error."""

from __future__ import annotations

import ipaddress
import socket
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.proxy_protocol import (
    ProxyHeader,
    ProxyProtocolError,
    TrustedProxies,
    parse_proxy_header,
)

SIGNATURE = b"\r\n\r\n\x00\r\nQUIT\n"


def v2(command: int, family: int, body: bytes) -> bytes:
    return SIGNATURE + struct.pack("!BBH", 0x20 | command, family, len(body)) + body


V2_TCP4 = v2(1, 0x11, bytes([192, 0, 2, 1, 198, 51, 100, 2]) + struct.pack("!HH", 56324, 443))
V2_TCP6 = v2(
    1,
    0x21,
    socket.inet_pton(socket.AF_INET6, "2001:db8::1")
    + socket.inet_pton(socket.AF_INET6, "2001:db8::2")
    + struct.pack("!HH", 4124, 443)
    + b"\x04\x00\x03abc",
)

# The longest and shortest lines that HAProxy's specification gives, section 2.1.
LONGEST_V1 = (
    b"PROXY TCP6 ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff "
    b"ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff 65535 65535\r\n"
)


@pytest.mark.parametrize(
    ("data", "source"),
    [
        (b"PROXY TCP4 192.168.0.1 192.168.0.11 56324 443\r\n", ("192.168.0.1", 56324)),
        (b"PROXY TCP4 255.255.255.255 255.255.255.255 65535 65535\r\n", ("255.255.255.255", 65535)),
        (LONGEST_V1, ("ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff", 65535)),
        (b"PROXY UNKNOWN\r\n", None),
        (b"PROXY UNKNOWN " + b"f" * 91 + b"\r\n", None),
        (V2_TCP4, ("192.0.2.1", 56324)),
        (V2_TCP6, ("2001:db8::1", 4124)),
        (v2(0, 0x00, b""), None),
        (v2(0, 0x11, b"anything"), None),
        (v2(1, 0x00, b""), None),
        (v2(1, 0x31, bytes(216)), None),
    ],
)
class TestHeaders:
    def test_is_read_and_the_rest_is_left(
        self, data: bytes, source: tuple[str, int] | None
    ) -> None:
        """The bytes after the header are the client's first."""
        assert parse_proxy_header(data + b"\x16\x03\x01") == ProxyHeader(source, len(data))

    def test_any_part_of_it_asks_for_more(
        self, data: bytes, source: tuple[str, int] | None
    ) -> None:
        """A header may come byte by byte."""
        assert all(parse_proxy_header(data[:length]) is None for length in range(len(data)))


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x00\x05",
        b"GET /derp HTTP/1.1\r\n",
        b"PROXY TCP4 192.168.0.1 192.168.0.11 56324\r\n",
        b"PROXY TCP4 192.168.0.1 192.168.0.11 56324 0443\r\n",
        b"PROXY TCP4 192.168.0.1 192.168.0.11 56324 65536\r\n",
        b"PROXY TCP4 2001:db8::1 192.168.0.11 56324 443\r\n",
        b"PROXY TCP6 192.168.0.1 192.168.0.11 56324 443\r\n",
        b"PROXY UDP4 192.168.0.1 192.168.0.11 56324 443\r\n",
        b"PROXY TCP4  192.168.0.1 192.168.0.11 56324 443\r\n",
        b"PROXY TCP4 192.168.0.\xb2 192.168.0.11 56324 443\r\n",
        b"PROXY \r\n",
        b"PROXY " + b"x" * 120,
        SIGNATURE + b"\x11\x11\x00\x0c" + bytes(12),
        SIGNATURE + b"\x22\x11\x00\x0c" + bytes(12),
        v2(1, 0x11, bytes(11)),
        v2(1, 0x21, bytes(35)),
        SIGNATURE + b"\x21\x11\xff\xff",
    ],
)
def test_wrong_headers_are_refused(data: bytes) -> None:
    """A trusted proxy that speaks something else is misconfigured; its clients are not guessed."""
    with pytest.raises(ProxyProtocolError):
        parse_proxy_header(data)


@given(st.sampled_from([b"", b"PROXY TCP4 ", SIGNATURE, V2_TCP4[:14]]), st.binary(max_size=200))
def test_any_bytes_parse_or_make_the_one_error(start: bytes, rest: bytes) -> None:
    """Whatever comes, and the header never takes more than there is."""
    try:
        header = parse_proxy_header(start + rest)
    except ProxyProtocolError:
        return
    assert header is None or header.length <= len(start + rest)


class TestForwardedFor:
    proxies = TrustedProxies(
        [ipaddress.ip_network("10.0.0.0/8"), ipaddress.ip_network("2001:db8::/32")]
    )

    @pytest.mark.parametrize(
        ("peer", "values", "client"),
        [
            ("10.0.0.1", ["203.0.113.5"], "203.0.113.5"),
            ("10.0.0.1", ["198.51.100.66, 203.0.113.5"], "203.0.113.5"),
            ("10.0.0.1", ["198.51.100.66", "203.0.113.5, 10.9.9.9"], "203.0.113.5"),
            ("10.0.0.1", ["10.1.1.1, 10.2.2.2"], "10.1.1.1"),
            ("10.0.0.1", [], "10.0.0.1"),
            ("10.0.0.1", ["203.0.113.5, unknown"], "10.0.0.1"),
            ("10.0.0.1", ["203.0.113.5, unknown, 10.2.2.2"], "10.2.2.2"),
            ("10.0.0.1", ["203.0.113.5:51000"], "203.0.113.5"),
            ("2001:db8::1", ["[2600::1]:51000"], "2600::1"),
            ("::ffff:10.0.0.1", ["::ffff:203.0.113.5"], "203.0.113.5"),
            ("192.0.2.1", ["203.0.113.5"], "192.0.2.1"),
        ],
    )
    def test_rightmost_untrusted_address_is_the_client(
        self, peer: str, values: list[str], client: str
    ) -> None:
        """And what the client wrote itself never counts."""
        assert self.proxies.client_of(peer, values) == client

    @given(st.lists(st.text(max_size=30), max_size=5))
    def test_any_header_gives_an_address(self, values: list[str]) -> None:
        """Never an error, never something that is no address."""
        ipaddress.ip_address(self.proxies.client_of("10.0.0.1", values))
