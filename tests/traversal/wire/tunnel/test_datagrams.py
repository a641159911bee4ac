"""UDP flows' datagrams against the specification's vectors, and against anything at all."""

from __future__ import annotations

from pathlib import Path
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from traversal.wire.tunnel import datagrams
from traversal.wire.tunnel.errors import TunnelError

FLOW3 = UUID("dd59d387-178e-49ba-86cc-df605a8dbd65")
REGISTER = datagrams.RegisterFlow(FLOW3, "127.0.0.1", 9053, 30, payload=b"bundled")
VECTORS = {
    key.strip(): bytes.fromhex(value)
    for key, _, value in (
        line.partition("=")
        for line in (Path(__file__).parent.parent / "vectors" / "tunnel.txt")
        .read_text()
        .splitlines()
        if line.startswith("datagram")
    )
}


def test_version_2() -> None:
    """The worked datagram of version 2 encodes and parses to exactly its bytes."""
    flow = UUID("1878d2fa-a7bc-40d6-9b80-648eccea01ce")
    assert datagrams.encode_payload2(flow, b"ping") == VECTORS["datagram2.udp"]
    parsed = datagrams.maybe_parse_datagram2(VECTORS["datagram2.udp"])
    assert parsed == datagrams.FlowPayload(flow, b"ping")


@pytest.mark.parametrize(
    ("name", "message"),
    [("datagram3.register", REGISTER), ("datagram3.response", datagrams.FlowAnswer(FLOW3, 0))],
)
def test_version_3(name: str, message: datagrams.RegisterFlow | datagrams.FlowAnswer) -> None:
    """The worked registration and its answer encode and parse to exactly their bytes."""
    assert message.encode() == VECTORS[name]
    assert datagrams.parse_datagram3(VECTORS[name]) == message


def test_version_3_payload() -> None:
    """The worked payload encodes and parses to exactly its bytes."""
    assert datagrams.encode_payload3(FLOW3, b"echo:second") == VECTORS["datagram3.payload"]
    parsed = datagrams.parse_datagram3(VECTORS["datagram3.payload"])
    assert parsed == datagrams.FlowPayload(FLOW3, b"echo:second")


@given(
    st.uuids(),
    st.ip_addresses(),
    st.integers(0, 65535),
    st.integers(0, 65535),
    st.binary(max_size=1280),
)
def test_registrations_survive(flow: UUID, host, port: int, idle: int, payload: bytes) -> None:
    """A registration for any destination reads as it was written."""
    message = datagrams.RegisterFlow(flow, str(host), port, idle, payload=payload)
    assert datagrams.parse_datagram3(message.encode()) == message


@given(st.binary(max_size=1500))
def test_icmp(packet: bytes) -> None:
    """ICMP packets up to the limit survive both versions; longer ones are refused."""
    pairs = (
        (datagrams.encode_icmp2, datagrams.maybe_parse_datagram2),
        (datagrams.encode_icmp3, datagrams.parse_datagram3),
    )
    for encode, parse in pairs:
        if len(packet) <= datagrams.MAX_PAYLOAD_BYTES:
            assert parse(encode(packet)) == datagrams.IcmpPacket(packet)
        else:
            with pytest.raises(TunnelError):
                parse(encode(packet))


@given(st.binary(max_size=80) | st.sampled_from(sorted(VECTORS.values())).map(lambda v: v[:-3]))
def test_any_bytes(data: bytes) -> None:
    """Whatever comes is read or refused with TunnelError."""
    for parse in (datagrams.maybe_parse_datagram2, datagrams.parse_datagram3):
        try:
            parse(data)
        except TunnelError:
            pass


@pytest.mark.parametrize(
    "message",
    [
        datagrams.RegisterFlow(FLOW3, "nowhere", 1),
        datagrams.RegisterFlow(FLOW3, "127.0.0.1", 65536),
        datagrams.RegisterFlow(FLOW3, "127.0.0.1", 1, -1),
    ],
)
def test_impossible_registrations(message: datagrams.RegisterFlow) -> None:
    """What has no encoding raises TunnelError."""
    with pytest.raises(TunnelError):
        message.encode()
