"""Packets of the kernel back end: read from raw bytes, and joined with drops."""

from __future__ import annotations

import socket

from hypothesis import given
from hypothesis import strategies as st

from netlab.drops import DropReason
from netlab.host_names import hosts_text
from netlab.packet_watch import join_drops, parse_packet
from netlab.pcap import encode_packet
from netlab.timeline import MappingBorn, PacketDropped, PacketSent


def packet(source: str, destination: str, payload: bytes = b"PING 1") -> bytes:
    """Return a UDP packet."""
    header = encode_packet("udp", source, destination, 28 + len(payload))
    assert header is not None
    return header + payload


def test_both_ends_of_a_translated_packet_have_one_key() -> None:
    """A NAT changes addresses, ports and checksums, and nothing that the key is made of."""
    data = packet("192.168.1.2:4000", "2.0.0.5:3478")
    before = parse_packet(data, len(data))
    data = packet("2.1.0.9:61000", "2.0.0.5:3478")
    after = parse_packet(data, len(data))
    assert before is not None
    assert after is not None
    assert (before.protocol, before.source) == ("udp", "192.168.1.2:4000")
    assert before.key == after.key
    data = packet("2.1.0.9:61000", "2.0.0.5:3478", b"PING 2")
    other = parse_packet(data, len(data))
    assert other is not None
    assert other.key != before.key


@given(st.binary(max_size=80))
def test_any_bytes_are_read_or_passed_over(data: bytes) -> None:
    """Whatever is on a wire, reading it raises nothing."""
    parse_packet(data, len(data))


def test_drops_get_the_number_of_their_packet() -> None:
    """The source of a drop is followed back through two NATs, whatever order events came in."""
    sent = PacketSent(
        at=1.0,
        packet=7,
        host="a",
        protocol="udp",
        source="192.168.1.2:4000",
        destination="2.1.0.7:5000",
        size_bytes=40,
    )
    born = [
        MappingBorn(
            at=at, nat=nat, protocol="udp", inside=inside, external=external, remote="2.1.0.7:5000"
        )
        for at, nat, inside, external in (
            (1.001, "home", "192.168.1.2:4000", "100.64.0.2:4000"),
            (1.002, "cgn", "100.64.0.2:4000", "2.1.0.9:1024"),
        )
    ]
    drops = [
        PacketDropped(
            at=1.01,
            packet=0,
            where="office",
            reason=DropReason.FILTERED,
            text="filtered",
            protocol="udp",
            source=source,
            destination="2.1.0.7:5000",
        )
        for source in ("2.1.0.9:1024", "2.1.0.9:9999")
    ]
    joined = join_drops([*drops, *born, sent])
    assert [event.at for event in joined] == sorted(event.at for event in joined)
    found = [(e.packet, e.sender) for e in joined if isinstance(e, PacketDropped)]
    assert found == [(7, "a"), (0, "")]


def test_hosts_file() -> None:
    """One line for each address, loopback first."""
    text = hosts_text({"relay": ["2.0.0.5", "2a0f:1::5"]})
    assert text.splitlines()[-2:] == ["2.0.0.5 relay", "2a0f:1::5 relay"]
    assert text.startswith("127.0.0.1 localhost\n")


def test_hosts_file_has_the_own_name() -> None:
    """Programs that look their machine's name up must not wait for a name server."""
    assert socket.gethostname() in hosts_text({}).split()
