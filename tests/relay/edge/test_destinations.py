"""Which addresses a connector may be asked to dial."""

from __future__ import annotations

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.edge.destinations import DestinationError, DestinationPolicy

STRICT = DestinationPolicy()


@pytest.mark.parametrize(
    "text",
    [
        "10.0.0.5:22",
        "192.168.1.1:65535",
        "8.8.8.8:53",
        "[2001:db8::5]:443",
        "[fd12:3456::1]:80",
        "[64:ff9b::808:808]:53",
        "[2002:808:808::1]:80",
    ],
)
def test_ordinary_addresses_are_allowed_and_print_as_they_are_dialed(text: str) -> None:
    """Private and public addresses pass, and the result is the same destination in text."""
    assert str(STRICT.authorize(text)) == text


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        "127.255.0.3",
        "169.254.169.254",
        "0.0.0.0",
        "0.1.2.3",
        "224.0.0.1",
        "255.255.255.255",
        "100.100.100.200",
        "168.63.129.16",
        "[::1]",
        "[::]",
        "[fe80::1]",
        "[ff02::1]",
        "[fec0::1]",
        "[fd00:ec2::254]",
        "[::ffff:127.0.0.1]",
        "[::ffff:7f00:1]",
        "[::127.0.0.1]",
        "[::169.254.169.254]",
        "[::ffff:0:127.0.0.1]",
        "[2002:7f00:1::]",
        "[2002:a9fe:a9fe::1]",
        "[64:ff9b::127.0.0.1]",
        "[64:ff9b::a9fe:a9fe]",
        "[64:ff9b:1::127.0.0.1]",
        "[64:ff9b:1:7f00:0:100::]",
        "[2001:0:a9fe:a9fe::]",
        "[fd00::5efe:127.0.0.1]",
        "[fd00::200:5efe:127.0.0.1]",
        "[0:0:0:0:0:0:0:1]",
        "[0000::0001]",
        "[fe80::1%eth0]",
        "[fd00::1%1]",
    ],
)
def test_dangerous_addresses_are_refused_in_every_spelling(host: str) -> None:
    """Loopback, link-local, metadata, multicast and unspecified addresses never pass."""
    with pytest.raises(DestinationError):
        STRICT.authorize(f"{host}:80")


@pytest.mark.parametrize(
    "host",
    [
        "2130706433",
        "0x7f000001",
        "0x7f.1",
        "127.1",
        "127.0.1",
        "0177.0.0.1",
        "127.0.0.01",
        "017700000001",
        "0x7f.0x0.0x0.0x1",
        "127.0.0.1.",
        "127.0.0.1%00",
        "localhost",
        "LOCALHOST",
        "metadata.google.internal",
        "example.com",
        "ex ample",
        "",
        "\uff11\uff12\uff17.0.0.1",
        "127\u30020\u30020\u30021",
        "[127.0.0.1]",
        "user@10.0.0.1",
        "10.0.0.1/8",
    ],
)
def test_odd_spellings_and_names_are_refused(host: str) -> None:
    """What another program could resolve to anything does not pass."""
    with pytest.raises(DestinationError):
        STRICT.authorize(f"{host}:80")


@pytest.mark.parametrize(
    "text", ["10.0.0.1", "10.0.0.1:", "10.0.0.1:0", "10.0.0.1:65536", "10.0.0.1:+1", "10.0.0.1: 1",
             "10.0.0.1:٣", "fd00::1:80", "[fd00::1]80", "10.0.0.1:80:80", "10.0.0.1:80\r\n"],
)  # fmt: skip
def test_a_destination_needs_one_port(text: str) -> None:
    """Ports are decimal, from 1 to 65535, after an address that can't be confused with them."""
    with pytest.raises(DestinationError):
        STRICT.authorize(text)


def test_the_operator_may_allow_what_is_refused_by_default() -> None:
    """A network or a name that is listed passes; what is next to it does not."""
    policy = DestinationPolicy([ipaddress.ip_network("127.0.0.1/32")], {"db.internal"})
    assert str(policy.authorize("127.0.0.1:22")) == "127.0.0.1:22"
    assert str(policy.authorize("DB.internal.:5432")) == "db.internal:5432"
    for text in ("127.0.0.2:22", "[::1]:22", "evil.db.internal:5432", "224.0.0.1:1"):
        with pytest.raises(DestinationError):
            policy.authorize(text)


def test_no_permission_covers_multicast() -> None:
    """Allowing every address still allows no multicast and no unspecified one."""
    everything = DestinationPolicy([ipaddress.ip_network("0.0.0.0/0")])
    assert everything.authorize("169.254.169.254:80")
    for text in ("224.0.0.1:1", "0.0.0.0:1", "255.255.255.255:1"):
        with pytest.raises(DestinationError):
            everything.authorize(text)


@given(st.integers(0, 2**32 - 1), st.sampled_from(["mapped", "6to4", "nat64", "compatible"]))
def test_an_embedded_address_is_never_better_than_the_address_itself(value: int, how: str) -> None:
    """Whatever IPv4 address is refused is refused inside IPv6 too."""
    plain = ipaddress.IPv4Address(value)
    number = {
        "mapped": 0xFFFF << 32 | value,
        "6to4": 0x2002 << 112 | value << 80 | 1,
        "nat64": 0x64FF9B << 96 | value,
        "compatible": value,
    }[how]
    try:
        STRICT.authorize(f"{plain}:80")
    except DestinationError:
        with pytest.raises(DestinationError):
            STRICT.authorize(f"[{ipaddress.IPv6Address(number)}]:80")


@given(st.text())
def test_any_text_is_a_destination_or_refused(text: str) -> None:
    """Nothing but DestinationError comes out, and what passes is canonical."""
    try:
        destination = STRICT.authorize(text)
    except DestinationError:
        return
    assert STRICT.authorize(str(destination)) == destination
