"""RPC, registration, connect, headers and credentials against the specification's vectors."""

from __future__ import annotations

import base64
import json
import struct
from pathlib import Path
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from traversal.wire.tunnel import connect, headers, registration, rpc, sessions
from traversal.wire.tunnel.capnp import Struct, parse_message
from traversal.wire.tunnel.credentials import (
    Credentials,
    parse_credentials_file,
    parse_token,
)
from traversal.wire.tunnel.errors import TunnelError


def read_vectors(name: str) -> dict[str, bytes]:
    vectors = {}
    path = Path(__file__).parent.parent / "vectors" / f"{name}.txt"
    for line in path.read_text().splitlines():
        key, equals, value = line.partition("#")[0].partition("=")
        if equals:
            vectors[key.strip()] = bytes.fromhex(value)
    return vectors


VECTORS = read_vectors("tunnel")
TUNNEL = UUID("11111111-2222-3333-4444-555555555555")
CONNECTOR = UUID("01234567-89ab-4def-8123-456789abcdef")
DETAILS = registration.ConnectionDetails(UUID("95dd153b-16f4-4914-bd80-080ce6a17422"), "LAB01")

RPC_CASES = {
    "bootstrap": rpc.Bootstrap(0),
    "bootstrap.return": rpc.Return(0, rpc.Hosted(0)),
    "register.return": rpc.Return(1, DETAILS.to_struct()),
    "unregister": rpc.Call(
        1,
        rpc.ImportedCapability(0),
        rpc.REGISTRATION_SERVER,
        registration.RegistrationMethod.UNREGISTER_CONNECTION,
        registration.EMPTY_RESULTS,
    ),
    "unregister.return": rpc.Return(1, registration.EMPTY_RESULTS),
    "finish": rpc.Finish(1),
    "release": rpc.Release(0, 1),
}


@pytest.mark.parametrize("name", RPC_CASES)
def test_rpc_vector(name: str) -> None:
    """Every worked RPC message encodes and parses to exactly the specification's bytes."""
    assert RPC_CASES[name].encode() == VECTORS[name]
    assert rpc.parse_rpc(parse_message(VECTORS[name])) == RPC_CASES[name]


def test_success_reply() -> None:
    """The reply's content reads as the connection's details."""
    answer = rpc.parse_rpc(parse_message(VECTORS["register.return"]))
    assert isinstance(answer, rpc.Return)
    assert isinstance(answer.result, Struct)
    assert registration.parse_register_results(answer.result) == DETAILS


def test_register_connection_layout() -> None:
    """The words of the worked registerConnection stand where the specification has them."""
    request = registration.RegisterConnection(
        account_tag="d" + "0" * 30 + "1",
        tunnel_secret=b"S" * 32,
        tunnel_id=TUNNEL,
        connection_index=0,
        options=registration.ConnectionOptions(
            client_id=CONNECTOR,
            features=(
                registration.FEATURE_ALLOW_REMOTE_CONFIG,
                registration.FEATURE_SERIALIZED_HEADERS,
                registration.FEATURE_DATAGRAM_V2,
                registration.FEATURE_QUIC_EOF,
                registration.FEATURE_MANAGEMENT_LOGS,
            ),
            version="2026.8.2",
            arch="linux_amd64",
            origin_local_ip=bytes(10) + b"\xff\xff\x7f\x00\x00\x01",
        ),
    )
    call = rpc.Call(
        1,
        rpc.PromisedAnswer(0),
        rpc.REGISTRATION_SERVER,
        registration.RegistrationMethod.REGISTER_CONNECTION,
        request.to_struct(),
    )
    message = call.encode()
    assert message[:8].hex() == "0000000044000000"
    words = [message[i : i + 8].hex() for i in range(8, len(message), 8)]
    assert words[:22] == [
        "0000000001000100", "0200000000000000", "0000000003000300", "0100000000000000",
        "9754e87fec9516f7", "0000000000000000", "0800000001000100", "1800000000000200",
        "0000000000000000", "0000000001000000", "0000000001000100", "0000000000000000",
        "0100000007000000", "0000000001000000", "0400000001000300", "cd00000007000000",
        "0000000000000000", "0800000000000200", "3100000082000000", "3400000001000200",
        "050000000a010000", "1500000002010000",
    ]  # fmt: skip
    assert words[33:36] == ["0000000000000000", "0400000000000400", "7500000082000000"]
    assert words[37] == "110000002e000000"
    read = rpc.parse_rpc(parse_message(message))
    assert isinstance(read, rpc.Call)
    assert read == call
    assert registration.RegisterConnection.from_struct(read.params) == request
    assert "S" * 32 not in repr(request)


TEXTS = st.text(st.characters(exclude_characters="\0", codec="utf-8"), max_size=20)
OPTIONS = st.builds(
    registration.ConnectionOptions,
    client_id=st.uuids(),
    features=st.lists(TEXTS, max_size=4).map(tuple),
    version=TEXTS,
    arch=TEXTS,
    origin_local_ip=st.binary(max_size=16),
    replace_existing=st.booleans(),
    compression_quality=st.integers(0, 255),
    previous_attempts=st.integers(0, 255),
)
PARAMS = st.one_of(
    st.builds(
        registration.RegisterConnection,
        account_tag=TEXTS,
        tunnel_secret=st.binary(max_size=40),
        tunnel_id=st.uuids(),
        connection_index=st.integers(0, 255),
        options=OPTIONS,
    ),
    st.builds(registration.UpdateLocalConfiguration, st.binary(max_size=50)),
    st.builds(
        sessions.RegisterUdpSession,
        st.uuids(),
        st.ip_addresses().map(str),
        st.integers(0, 65535),
        st.integers(-(2**63), 2**63 - 1),
        TEXTS,
    ),
    st.builds(sessions.RegisterUdpSessionResponse, TEXTS, st.binary(max_size=9)),
    st.builds(sessions.UnregisterUdpSession, st.uuids(), TEXTS),
    st.builds(sessions.UpdateConfiguration, st.integers(-1, 2**31 - 1), st.binary(max_size=50)),
    st.builds(sessions.UpdateConfigurationResponse, st.integers(-1, 2**31 - 1), TEXTS),
)


@given(PARAMS)
def test_params_round_trip(params) -> None:
    """Every parameter and result struct reads as it was written, through an RPC message."""
    call = rpc.Call(7, rpc.ImportedCapability(3), rpc.SESSION_MANAGER, 1, params.to_struct())
    read = rpc.parse_rpc(parse_message(call.encode()))
    assert isinstance(read, rpc.Call)
    assert type(params).from_struct(read.params) == params


RESULTS = st.one_of(
    st.builds(registration.ConnectionDetails, st.uuids(), TEXTS, st.booleans()),
    st.builds(
        registration.ConnectionRefusal,
        TEXTS,
        st.booleans(),
        st.integers(-(2**63), 2**63 - 1),
    ),
)


@given(RESULTS)
def test_register_results_round_trip(results) -> None:
    """Success and refusal of a registration read as they were written."""
    message = rpc.Return(1, results.to_struct()).encode()
    answer = rpc.parse_rpc(parse_message(message))
    assert isinstance(answer, rpc.Return)
    assert isinstance(answer.result, Struct)
    assert registration.parse_register_results(answer.result) == results


@pytest.mark.parametrize(
    "message",
    [
        rpc.Abort(rpc.SHUTDOWN_REASON),
        rpc.Return(2, rpc.RpcException("no", rpc.ExceptionType.UNIMPLEMENTED)),
        rpc.Return(2, rpc.Canceled()),
        rpc.Finish(3, release_result_caps=True),
        rpc.Unimplemented(parse_message(rpc.Bootstrap(5).encode())),
    ],
)
def test_rpc_round_trip(message) -> None:
    """The messages without a worked example, too."""
    assert rpc.parse_rpc(parse_message(message.encode())) == message


def test_unknown_messages_can_be_echoed() -> None:
    """A message outside the subset is no error; its echo says that it is not implemented."""
    resolve = Struct(struct.pack("<Q", 5), (Struct(struct.pack("<Q", 77)),))
    unknown = rpc.parse_rpc(resolve)
    assert unknown == rpc.Unknown(resolve)
    assert rpc.parse_rpc(parse_message(rpc.Unimplemented(resolve).encode())) == rpc.Unimplemented(
        resolve
    )


def test_connect_vectors() -> None:
    """The worked TCP connect, in both directions."""
    request = connect.ConnectRequest(
        "127.0.0.1:9001", connect.ConnectType.TCP, ((connect.FLOW_ID_KEY, "f1"),)
    )
    assert request.encode() == VECTORS["connect.request"]
    assert connect.data_head_length(VECTORS["connect.request"]) == len(VECTORS["connect.request"])
    root = connect.parse_data_head(VECTORS["connect.request"])
    assert connect.ConnectRequest.from_struct(root) == request
    assert connect.ConnectResponse().encode() == VECTORS["connect.response"]
    root = connect.parse_data_head(VECTORS["connect.response"])
    assert connect.ConnectResponse.from_struct(root) == connect.ConnectResponse()


def test_data_head_is_found_in_a_stream() -> None:
    """A head is known to be whole or not at every byte; what follows it is payload."""
    head = VECTORS["connect.request"]
    for size in range(len(head)):
        assert connect.data_head_length(head[:size]) is None
    assert connect.data_head_length(head + b"payload") == len(head)
    with pytest.raises(TunnelError):
        connect.data_head_length(connect.RPC_SIGNATURE)
    with pytest.raises(TunnelError, match="at most"):
        connect.data_head_length(connect.DATA_PREAMBLE + struct.pack("<II", 0, 1 << 16))


def test_header_metadata() -> None:
    """Headers travel as metadata, one entry a value, and a colon in a name is refused."""
    pairs = ((b"Set-Cookie", b"a=1"), (b"set-cookie", b"b=2:3"), (b"x-name", "\u00fc".encode()))
    metadata = connect.header_metadata(pairs)
    assert metadata[0] == ("HttpHeader:Set-Cookie", "a=1")
    assert connect.metadata_headers(((connect.STATUS_KEY, "200"), *metadata)) == tuple(
        (name.lower(), value) for name, value in pairs
    )
    with pytest.raises(TunnelError):
        connect.header_metadata([(b"a:b", b"c")])


def test_serialized_headers_example() -> None:
    """The specification's example, in both directions."""
    pairs = [(b"Set-Cookie", b"a=1"), (b"Set-Cookie", b"b=2"), (b"X-Origin", b"yes")]
    text = b"U2V0LUNvb2tpZQ:YT0x;U2V0LUNvb2tpZQ:Yj0y;WC1PcmlnaW4:eWVz"
    assert headers.serialize_headers(pairs) == text
    assert headers.parse_serialized_headers(text) == pairs


@given(st.lists(st.tuples(st.binary(min_size=1), st.binary())))
def test_serialized_headers_round_trip(pairs: list[tuple[bytes, bytes]]) -> None:
    """Any names and values survive, except for reserved names."""
    kept = [pair for pair in pairs if not headers.is_reserved(pair[0])]
    assert headers.parse_serialized_headers(headers.serialize_headers(pairs)) == kept


def test_reserved_headers_are_left_out() -> None:
    """Neither side can smuggle the tunnel's own headers to the other."""
    pairs = [
        (b"Cf-Cloudflared-Proxy-Src", b"x"),
        (b"cf-int-a", b"x"),
        (b":path", b"/"),
        (b"a", b"b"),
    ]
    assert headers.serialize_headers(pairs) == b"YQ:Yg"
    smuggled = b"Y2YtaW50LWE:eA"
    assert headers.parse_serialized_headers(smuggled) == []


@given(st.binary(max_size=100))
def test_header_parsers_never_crash(data: bytes) -> None:
    """Any bytes are read or refused."""
    for parse in (headers.parse_serialized_headers, headers.parse_response_meta):
        try:
            parse(data)
        except TunnelError:
            pass


def test_response_meta() -> None:
    """The documented values, in both directions."""
    for text, meta in {
        b'{"src":"origin"}': headers.ResponseMeta(is_from_origin=True),
        b'{"src":"cloudflared"}': headers.ResponseMeta(is_from_origin=False),
        b'{"src":"cloudflared","flow_rate_limited":true}': headers.ResponseMeta(
            is_from_origin=False, is_rate_limited=True
        ),
    }.items():
        assert headers.parse_response_meta(text) == meta
        assert meta.encode() == text


CREDENTIALS = Credentials(TUNNEL, "d" * 32, b"S" * 32)


def test_credentials_formats() -> None:
    """File and token have the documented keys, and read as they were written."""
    secret = base64.b64encode(b"S" * 32).decode()
    assert json.loads(CREDENTIALS.to_file()) == {
        "AccountTag": "d" * 32,
        "TunnelSecret": secret,
        "TunnelID": str(TUNNEL),
    }
    token = json.loads(base64.b64decode(CREDENTIALS.to_token()))
    assert token == {"a": "d" * 32, "s": secret, "t": str(TUNNEL)}
    for credentials in (CREDENTIALS, Credentials(TUNNEL, "x", b"abc", "us")):
        assert parse_credentials_file(credentials.to_file()) == credentials
        assert parse_token(credentials.to_token() + "\n") == credentials
    assert "SSSS" not in repr(CREDENTIALS)


@pytest.mark.parametrize(
    "change",
    [{"TunnelID": "nonsense"}, {"TunnelSecret": "?"}, {"TunnelSecret": ""}, {"AccountTag": 7}],
)
def test_wrong_credentials(change: dict[str, object]) -> None:
    """A wrong file is refused, and its secret is in no error text."""
    document = json.loads(CREDENTIALS.to_file()) | change
    with pytest.raises(TunnelError) as caught:
        parse_credentials_file(json.dumps(document))
    assert base64.b64encode(b"S" * 32).decode() not in str(caught.value)


@given(st.text(max_size=100))
def test_credential_parsers_never_crash(text: str) -> None:
    """Any text is read or refused."""
    for parse in (parse_credentials_file, parse_token):
        try:
            parse(text)
        except TunnelError:
            pass


@given(st.recursive(st.binary(max_size=9), lambda c: st.lists(c, max_size=4).map(tuple)))
def test_message_readers_never_crash(node) -> None:
    """A tree of the wrong shape is refused by every reader, never more."""
    for data in (bytes(8), struct.pack("<Q", 1), struct.pack("<Q", 2), struct.pack("<Q", 3)):
        root = Struct(data, (node, node, Struct(data, (node,))))
        for read in (
            rpc.parse_rpc,
            registration.RegisterConnection.from_struct,
            registration.UpdateLocalConfiguration.from_struct,
            registration.parse_register_results,
            sessions.RegisterUdpSession.from_struct,
            sessions.UpdateConfigurationResponse.from_struct,
            connect.ConnectRequest.from_struct,
            connect.ConnectResponse.from_struct,
        ):
            try:
                read(root)
            except TunnelError:
                pass
