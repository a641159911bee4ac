"""What a node advertises, and in which order."""

from __future__ import annotations

from ipaddress import ip_address

from traversal.paths.own_addresses import Findings, OwnAddresses, choose_local_ips
from traversal.wire.address import Address
from traversal.wire.introduction import AddressType


def at(text: str) -> Address:
    return Address.parse(text)


def test_order_and_no_doubles() -> None:
    """Mapped first, then reflexive, static and local ones; the first mention gives the type."""
    found = OwnAddresses().handle_findings(
        Findings(
            port_mapped=(at("203.0.113.1:1000"),),
            reflexive=(at("203.0.113.1:2000"), at("10.0.0.2:41641")),
            static=(at("198.51.100.1:5"),),
            local=(at("10.0.0.2:41641"), at("[2001:db8::1]:41641")),
        ),
        0.0,
    )
    assert [str(address) for _, address in found] == [
        "203.0.113.1:1000",
        "203.0.113.1:2000",
        "10.0.0.2:41641",
        "198.51.100.1:5",
        "[2001:db8::1]:41641",
    ]
    assert found[2][0] is AddressType.STUN


def test_guessed_port() -> None:
    """Behind a hard NAT, a configured port is advertised too: it may be forwarded."""
    findings = Findings(reflexive=(at("203.0.113.1:2000"),), guess_port=41641)
    found = OwnAddresses().handle_findings(findings, 0.0)
    assert (AddressType.STUN_LOCAL_PORT, at("203.0.113.1:41641")) in found


def test_remembers_for_five_minutes() -> None:
    """What one check missed stays, at most six addresses per IP, until it is old or forgotten."""
    book = OwnAddresses()
    for second in range(10):
        findings = Findings(reflexive=(at(f"203.0.113.1:{2000 + second}"),))
        found = book.handle_findings(findings, float(second))
    assert [address.port for _, address in found] == [2009, 2008, 2007, 2006, 2005, 2004]
    assert len(book.handle_findings(Findings(), 310.0)) == 6
    assert book.handle_findings(Findings(), 320.0) == ()
    book.handle_findings(Findings(reflexive=(at("203.0.113.1:1"),)), 321.0)
    book.forget()
    assert book.handle_findings(Findings(), 322.0) == ()


def test_at_most_64() -> None:
    """The list never exceeds what an introduction holds."""
    local = tuple(at(f"10.0.0.{n}:1") for n in range(1, 101))
    assert len(OwnAddresses().handle_findings(Findings(local=local), 0.0)) == 64


def test_local_addresses() -> None:
    """Regular addresses hide link-local and loopback ones, which count only where all else lacks;
    two IPv6 addresses per prefix length are enough."""

    def chosen(*texts: str) -> list[str]:
        entries = [(ip_address(text), 64, text in ("127.0.0.1", "::1")) for text in texts]
        return [str(ip) for ip in choose_local_ips(entries)]

    assert chosen("fe80::1", "2001:db8::1", "127.0.0.1", "169.254.1.1", "192.0.2.1") == [
        "192.0.2.1",
        "2001:db8::1",
    ]
    assert chosen("127.0.0.1", "169.254.1.1", "fd00::1") == ["169.254.1.1", "fd00::1"]
    assert chosen("127.0.0.1", "::1", "fe80::1") == ["127.0.0.1", "::1"]
    assert len(chosen("2a00::1", "2a00::2", "2a00::3")) == 2
