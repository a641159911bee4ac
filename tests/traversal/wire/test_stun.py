"""STUN: the vectors of the specifications, round trips, hostile bytes, and aioice as a referee."""

from __future__ import annotations

import struct
from collections.abc import Callable
from ipaddress import IPv4Address, IPv6Address

import aioice.stun
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from traversal.wire import stun
from traversal.wire.stun import Address, StunError, TransactionId

ID = TransactionId(bytes(range(12)))
ID_1 = TransactionId(bytes(range(1, 13)))
CLASSIC_ID = TransactionId(b"\x01" * 16)

# Netcheck specification 11 and DERP specification 18.5.
REQUEST = bytes.fromhex(
    "000100142112a442000102030405060708090a0b802200087461696c6e6f6465802800048aabad90"
)
REQUEST_1 = bytes.fromhex(
    "000100142112a4420102030405060708090a0b0c802200087461696c6e6f646580280004b32c370f"
)
REQUEST_CAPTURED = bytes.fromhex(
    "000100142112a44269f7379bd176a831d4997789802200087461696c6e6f6465802800044915ac85"
)
RESPONSES: list[tuple[TransactionId, Address, str]] = [
    (
        ID,
        ("203.0.113.7", 41641),
        "0101000c2112a442000102030405060708090a0b00200008000183bbea12d545",
    ),
    (
        ID,
        ("2001:db8::7", 41641),
        "010100182112a442000102030405060708090a0b00200014000283bb0113a9fa000102030405060708090a0c",
    ),
    (
        ID_1,
        ("203.0.113.5", 41641),
        "0101000c2112a4420102030405060708090a0b0c00200008000183bbea12d547",
    ),
    (
        ID_1,
        ("2001:db8::7", 41641),
        "010100182112a4420102030405060708090a0b0c00200014000283bb0113a9fa0102030405060708090a0b0b",
    ),
]
V4_MAPPED_RESPONSE = (
    "010100182112a4420102030405060708090a0b0c00200014000283bb2112a442010203040506f8f7c20a7a09"
)
RESPONSE_5780 = (
    "010100242112a442000102030405060708090a0b00200008000183bbea12d545"
    "802b000800010d96c0000201802c000800010d97c0000202"
)
# Responses of servers in the wild, which a tolerant parser must understand.
CAPTURED_RESPONSES: dict[str, tuple[str, Address]] = {
    "google_1": (
        "0101000c2112a4422360b11e3ec68ffa93e08007002000080001c7866957856f",
        ("72.69.33.45", 59028),
    ),
    "google_2": (
        "0101000c2112a442f9f121cbde7d7c75923ce271002000080001c7876957856f",
        ("72.69.33.45", 59029),
    ),
    "xor_8020": (
        (
            "010100442112a442482eb64715e8b28eaead6444000100080001e4ab4845212d0004000800012710d90a4498"
            "0005000800012711d9747a8a802000080001c5b96957856f80220010566f766964612e6f726720302e393600"
        ),
        ("72.69.33.45", 58539),
    ),
    "mapped_only": (
        (
            "010100242112a4427e57966829f444609d1deaa6000100080001e9d34845212d0004000800010d964d48a9d4"
            "0005000800010d974d48a9d5"
        ),
        ("72.69.33.45", 59859),
    ),
    "trailing_bytes": (
        (
            "010100242112a442ebc2d36ef471217c4f3e308e8022000a656e64706f696e7465720000002000080001ce66"
            "5e12a44380280004b699bb02010100242112a442"
        ),
        ("127.0.0.1", 61300),
    ),
    "stuntman_v6": (
        (
            "010100482112a44206f56685d28af3e69ce341e200010014000290ce260200d1b4cfc10038b231fffeef96f6"
            "802b001400020d962604a880000200d10000000000c57001002000140002b1dc0710a493b23aa785ea38c219"
            "620cd714"
        ),
        ("2602:d1:b4cf:c100:38b2:31ff:feef:96f6", 37070),
    ),
    "software_pad1": (
        "010100142112a442ebc2d36ef471217c4f3e308e8022000161000000002000080001ce665e12a443",
        ("127.0.0.1", 61300),
    ),
    "software_pad3": (
        "010100142112a442ebc2d36ef471217c4f3e308e8022000361626300002000080001ce665e12a443",
        ("127.0.0.1", 61300),
    ),
    "v4_in_v6": (
        "010100182112a4424fd5d202dcb37d31fc773306002000140002cd3d2112a4424fd5d202dcb382ce2dc3fcc7",
        ("209.180.207.193", 60463),
    ),
    "v4_mapped": (V4_MAPPED_RESPONSE, ("203.0.113.5", 41641)),
}

transaction_ids = st.binary(min_size=12, max_size=12).map(TransactionId)
classic_ids = (
    st.binary(min_size=16, max_size=16)
    .filter(lambda raw: raw[:4] != bytes.fromhex("2112a442"))
    .map(TransactionId)
)
hosts = st.integers(0, 2**32 - 1).map(IPv4Address).map(str) | (
    st.integers(0, 2**128 - 1)
    .map(IPv6Address)
    .filter(lambda ip: ip.ipv4_mapped is None)  # written as IPv4
    .map(str)
)
addresses = st.tuples(hosts, st.integers(0, 65535))


def message(kind: int, *attributes: tuple[int, bytes], transaction_id: bytes = ID) -> bytes:
    """A message put together by hand, so that it may be wrong."""
    body = b"".join(
        struct.pack("!HH", number, len(value)) + value + bytes(-len(value) % 4)
        for number, value in attributes
    )
    return struct.pack("!HHI", kind, len(body), 0x2112A442) + transaction_id + body


class TestVectors:
    def test_request(self) -> None:
        """The request is Tailscale's, byte for byte."""
        assert stun.encode_binding_request(ID) == REQUEST
        assert stun.encode_binding_request(ID_1) == REQUEST_1
        captured = TransactionId(REQUEST_CAPTURED[8:20])
        assert stun.encode_binding_request(captured) == REQUEST_CAPTURED

    @pytest.mark.parametrize("request_bytes", [REQUEST, REQUEST_1, REQUEST_CAPTURED])
    def test_request_is_recognized(self, request_bytes: bytes) -> None:
        """A stock client's request is recognized, and read."""
        assert stun.is_tailnode_request(request_bytes)
        request = stun.parse_binding_request(request_bytes)
        assert request == stun.BindingRequest(TransactionId(request_bytes[8:20]))

    @pytest.mark.parametrize(("transaction_id", "address", "wire"), RESPONSES)
    def test_response(self, transaction_id: TransactionId, address: Address, wire: str) -> None:
        """The response is Tailscale's, byte for byte, and is read back."""
        assert stun.encode_binding_response(transaction_id, address).hex() == wire
        response = stun.parse_binding_response(bytes.fromhex(wire))
        assert response == stun.BindingResponse(transaction_id, address)

    def test_v4_mapped_source_is_answered_as_ipv4(self) -> None:
        """What a dual-stack socket reports as ::ffff:203.0.113.5 is told its IPv4 address."""
        response = stun.encode_binding_response(ID_1, ("::ffff:203.0.113.5", 41641))
        assert response.hex() == RESPONSES[2][2]

    @pytest.mark.parametrize("name", CAPTURED_RESPONSES)
    def test_captured_responses(self, name: str) -> None:
        """Responses of other servers give the address that they mean."""
        wire, address = CAPTURED_RESPONSES[name]
        assert stun.parse_binding_response(bytes.fromhex(wire)).mapped_address == address

    def test_behavior_discovery(self) -> None:
        """RFC 5780 attributes are written and read."""
        both = stun.encode_discovery_request(ID, change_ip=True, change_port=True)
        assert both.hex() == "000100082112a442000102030405060708090a0b0003000400000006"
        port = stun.encode_discovery_request(ID, change_port=True)
        assert port.hex() == "000100082112a442000102030405060708090a0b0003000400000002"
        response = stun.encode_binding_response(
            ID,
            ("203.0.113.7", 41641),
            response_origin=("192.0.2.1", 3478),
            other_address=("192.0.2.2", 3479),
        )
        assert response.hex() == RESPONSE_5780
        assert stun.parse_binding_response(response) == stun.BindingResponse(
            ID, ("203.0.113.7", 41641), ("192.0.2.1", 3478), ("192.0.2.2", 3479)
        )


class TestRequest:
    @given(
        transaction_ids,
        st.booleans(),
        st.booleans(),
        st.none() | st.integers(1, 65535),
        st.none() | st.integers(0, 1500),
    )
    def test_round_trip(
        self,
        transaction_id: TransactionId,
        change_ip: bool,
        change_port: bool,
        response_port: int | None,
        padding_bytes: int | None,
    ) -> None:
        """What a discovery request asks for is what the server reads."""
        wire = stun.encode_discovery_request(
            transaction_id,
            change_ip=change_ip,
            change_port=change_port,
            response_port=response_port,
            padding_bytes=padding_bytes,
        )
        assert stun.parse_binding_request(wire) == stun.BindingRequest(
            transaction_id, change_ip, change_port, response_port, padding_bytes
        )

    def test_plain_request(self) -> None:
        """Neither SOFTWARE nor FINGERPRINT is needed."""
        plain = stun.encode_discovery_request(ID)
        assert len(plain) == 20
        assert stun.parse_binding_request(plain) == stun.BindingRequest(ID)

    def test_classic_request(self) -> None:
        """A request without cookie is one of RFC 3489, with a transaction id of 16 bytes."""
        request = stun.parse_binding_request(b"\0\x01\0\0" + CLASSIC_ID)
        assert request.is_classic
        assert request.transaction_id == CLASSIC_ID
        assert not stun.parse_binding_request(REQUEST).is_classic

    @pytest.mark.parametrize("offset", [0, 9, 25, 36, 39])
    def test_wrong_fingerprint(self, offset: int) -> None:
        """A FINGERPRINT that is there must be right."""
        broken = bytearray(REQUEST)
        broken[offset] ^= 1
        with pytest.raises(StunError):
            stun.parse_binding_request(bytes(broken))

    def test_fingerprint_must_be_last(self) -> None:
        """An attribute after FINGERPRINT is refused."""
        head = message(1, (0x8022, b"abcd"), (0x8028, bytes(4)), (0x8022, b""))
        with pytest.raises(StunError, match="last"):
            stun.parse_binding_request(head)

    def test_unknown_attributes(self) -> None:
        """Unknown attributes that must be understood are reported, optional ones are skipped."""
        request = stun.parse_binding_request(
            message(1, (0x7777, b"x"), (0x8777, b"y"), (0x0006, b"user"), (0x0002, bytes(8)))
        )
        assert request.unknown_attributes == (0x7777, 0x0002)

    @pytest.mark.parametrize(
        "datagram",
        [
            b"",
            REQUEST[:19],
            REQUEST[:39],
            REQUEST + b"\0",
            bytes.fromhex(RESPONSES[0][2]),
            message(0x0003),
            message(1, (0x0003, b"")),
            message(1, (0x0003, bytes(5))),
            message(1, (0x8028, bytes(3))),
            message(1)[:2] + b"\0\x04" + message(1)[4:] + b"\0\x03\0\x04",
        ],
    )
    def test_refused(self, datagram: bytes) -> None:
        """What is no well-formed Binding request is refused."""
        with pytest.raises(StunError):
            stun.parse_binding_request(datagram)


class TestResponse:
    @given(
        transaction_ids | classic_ids,
        addresses,
        st.none() | addresses,
        st.none() | addresses,
        st.none() | st.integers(0, 100),
    )
    def test_round_trip(
        self,
        transaction_id: TransactionId,
        address: Address,
        origin: Address | None,
        other: Address | None,
        padding_bytes: int | None,
    ) -> None:
        """What the server writes is what the client reads."""
        wire = stun.encode_binding_response(
            transaction_id,
            address,
            response_origin=origin,
            other_address=other,
            padding_bytes=padding_bytes,
        )
        response = stun.parse_binding_response(wire)
        if len(transaction_id) == 16:  # RFC 3489 has other attributes for these two.
            origin = other = None
        assert response == stun.BindingResponse(transaction_id, address, origin, other)

    @given(st.integers(0, 2**128 - 1).map(IPv6Address), st.sampled_from(["", "%eth0"]))
    @example(IPv6Address("::ffff:192.0.2.1"), "")
    @example(IPv6Address("::"), "")
    def test_ipv6_spellings(self, ip: IPv6Address, scope: str) -> None:
        """Every spelling of an IPv6 address means the same; a scope is dropped."""
        expected = stun.encode_binding_response(ID, (str(ip.ipv4_mapped or ip), 7))
        for text in (str(ip), ip.exploded, str(ip).upper()):
            assert stun.encode_binding_response(ID, (text + scope, 7)) == expected

    def test_classic_response(self) -> None:
        """A classic client gets MAPPED-ADDRESS, SOURCE-ADDRESS and CHANGED-ADDRESS."""
        wire = stun.encode_binding_response(
            CLASSIC_ID,
            ("192.0.2.7", 258),
            response_origin=("192.0.2.1", 1),
            other_address=("192.0.2.2", 2),
        )
        assert wire == b"\x01\x01\0\x24" + CLASSIC_ID + bytes.fromhex(
            "0001000800010102c0000207" + "0004000800010001c0000201" + "0005000800010002c0000202"
        )

    def test_nonsense_in_optional_addresses(self) -> None:
        """A broken OTHER-ADDRESS does not cost the client its mapped address."""
        wire = message(
            0x0101, (0x0001, b"\0\x01\0\x07\x7f\0\0\1"), (0x802C, b"x"), (0x802B, bytes(8))
        )
        assert stun.parse_binding_response(wire) == stun.BindingResponse(ID, ("127.0.0.1", 7))

    @pytest.mark.parametrize(
        "datagram",
        [
            REQUEST,
            message(0x0101),
            message(0x0101, (0x0020, b"\0\1\0\0")),
            message(0x0101, (0x0020, b"\0\2" + bytes(6))),
            message(0x0101, (0x0020, b"\0\3" + bytes(6))),
            message(0x0101, (0x0020, b"\0\1" + bytes(6)))[:31],
            b"\x01\x01\0\x0c" + CLASSIC_ID + bytes.fromhex("0020000800010000c0000201"),
        ],
    )
    def test_refused(self, datagram: bytes) -> None:
        """A response without an address that makes sense is refused."""
        with pytest.raises(StunError):
            stun.parse_binding_response(datagram)

    @pytest.mark.parametrize(
        "address",
        [
            ("1.2.3", 1),
            ("1.2.3.400", 1),
            ("1.2.3.4", 65536),
            ("::1", -1),
            ("x:y", 1),
            ("1::2::3", 1),
        ],
    )
    def test_our_own_mistakes(self, address: Address) -> None:
        """An address that is none is a ValueError, and no StunError, of the caller."""
        with pytest.raises(ValueError) as caught:  # noqa: PT011  # the type is the promise
            stun.encode_binding_response(ID, address)
        assert not isinstance(caught.value, StunError)


class TestErrorResponse:
    @given(
        transaction_ids | classic_ids,
        st.integers(300, 699),
        st.text(max_size=20),
        st.lists(st.integers(0, 0x7FFF), max_size=5).map(tuple),
    )
    def test_round_trip(
        self, transaction_id: TransactionId, code: int, reason: str, unknown: tuple[int, ...]
    ) -> None:
        """Code, reason and the list of unknown attributes survive."""
        wire = stun.encode_error_response(transaction_id, code, reason, unknown_attributes=unknown)
        assert stun.parse_error_response(wire) == stun.ErrorResponse(
            transaction_id, code, reason, unknown
        )

    @pytest.mark.parametrize(
        "datagram",
        [message(0x0111), message(0x0111, (9, b"abc")), message(0x0111, (9, b"\0\0\2\0"))],
    )
    def test_refused(self, datagram: bytes) -> None:
        """An error response needs an ERROR-CODE of 300 to 699."""
        with pytest.raises(StunError):
            stun.parse_error_response(datagram)


class TestClassifier:
    def test_verdicts(self) -> None:
        """Step 1 of disco specification 7."""
        assert stun.is_stun(REQUEST)
        assert stun.is_stun(bytes.fromhex(RESPONSES[0][2]))
        assert stun.is_stun(REQUEST[:20])
        assert not stun.is_stun(REQUEST[:19])
        assert not stun.is_stun(b"\x40" + REQUEST[1:])
        assert not stun.is_stun(REQUEST[:4] + b"\x21\x12\xa4\x43" + REQUEST[8:])
        assert not stun.is_stun(message(0x0111))
        assert not stun.is_stun(b"TS\xf0\x9f\x92\xac" + bytes(40))
        assert not stun.is_stun(b"\x04\0\0\0" + bytes(28))


PARSERS: list[Callable[[bytes], object]] = [
    stun.parse_binding_request,
    stun.parse_binding_response,
    stun.parse_error_response,
    stun.parse_message,
    stun.is_stun,
    stun.is_tailnode_request,
]

# Every attribute type that any parser looks at, with values of all small lengths.
attributes = st.lists(
    st.tuples(
        st.sampled_from([*aioice.stun.ATTRIBUTES_BY_TYPE, 0x0A, 0x26, 0x27, 0x8020, 0x7777]),
        st.binary(max_size=24),
    ),
    max_size=4,
)
plausible = st.builds(
    lambda kind, parts: message(kind, *parts),
    st.sampled_from([0x0001, 0x0101, 0x0111, 0x0003, 0x0113, 0x0016]),
    attributes,
)


class TestHostileBytes:
    @given(st.binary(max_size=120) | plausible)
    @example(b"\x01\x01\0\0" + bytes(16))
    def test_one_error_type(self, datagram: bytes) -> None:
        """Whatever the bytes, a parser returns or raises StunError."""
        for parse in PARSERS:
            try:
                parse(datagram)
            except StunError:
                pass

    @given(plausible, st.data())
    def test_mutations(self, datagram: bytes, data: st.DataObject) -> None:
        """Cut, extended or changed in one byte, a message raises nothing but StunError."""
        at = data.draw(st.integers(0, len(datagram) - 1))
        changed = bytearray(datagram)
        changed[at] ^= data.draw(st.integers(1, 255))
        for variant in (datagram[:at], bytes(changed), datagram + b"\0\0\0\0"):
            for parse in PARSERS:
                try:
                    parse(variant)
                except StunError:
                    pass


class TestAgainstAioice:
    """aioice's codec, which nobody here wrote, reads and writes the same messages."""

    def test_request(self) -> None:
        """aioice finds our SOFTWARE and agrees with our FINGERPRINT."""
        theirs = aioice.stun.parse_message(REQUEST)
        assert theirs.attributes["SOFTWARE"] == "tailnode"
        assert theirs.transaction_id == ID

    @given(transaction_ids, addresses, addresses, addresses)
    def test_response(
        self, transaction_id: TransactionId, address: Address, origin: Address, other: Address
    ) -> None:
        """Both codecs write and read a success response alike."""
        theirs = aioice.stun.Message(
            message_method=aioice.stun.Method.BINDING,
            message_class=aioice.stun.Class.RESPONSE,
            transaction_id=transaction_id,
            attributes={
                "XOR-MAPPED-ADDRESS": address,
                "RESPONSE-ORIGIN": origin,
                "OTHER-ADDRESS": other,
            },
        )
        ours = stun.encode_binding_response(
            transaction_id, address, response_origin=origin, other_address=other
        )
        assert bytes(theirs) == ours
        theirs.add_fingerprint()
        response = stun.parse_binding_response(bytes(theirs))
        assert response == stun.BindingResponse(transaction_id, address, origin, other)

    @given(plausible)
    def test_requests_both_understand(self, datagram: bytes) -> None:
        """A Binding request that both read asks both for the same."""
        try:
            ours = stun.parse_binding_request(datagram)
            theirs = aioice.stun.parse_message(datagram)
        except (ValueError, struct.error):
            return
        change = theirs.attributes.get("CHANGE-REQUEST", 0)
        if "MESSAGE-INTEGRITY" not in theirs.attributes:  # aioice ignores what follows it.
            assert (ours.change_ip, ours.change_port) == (bool(change & 4), bool(change & 2))

    @given(plausible)
    def test_responses_both_understand(self, datagram: bytes) -> None:
        """A success response that both read holds the same address for both."""
        try:
            ours = stun.parse_binding_response(datagram)
            theirs = aioice.stun.parse_message(datagram)
        except (ValueError, struct.error):
            return
        kinds = [datagram[at : at + 2] for at in range(20, len(datagram), 4)]
        repeated = kinds.count(b"\0\x20") > 1 or kinds.count(b"\0\x01") > 1
        if not repeated and b"\x80\x20" not in kinds and b"\0\x08" not in kinds:
            found = theirs.attributes.get("XOR-MAPPED-ADDRESS")
            found = found or theirs.attributes["MAPPED-ADDRESS"]
            host, port = found
            assert ours.mapped_address == (host.removeprefix("::ffff:"), port)


class TestMessage:
    """Messages with rarer attributes, by way of aioice's table."""

    def test_authenticated_round_trip(self) -> None:
        """A TURN Allocate request with MESSAGE-INTEGRITY is written, read and checked."""
        allocate = stun.Message(
            method=3,
            message_class=0,
            transaction_id=ID,
            attributes={
                "REQUESTED-TRANSPORT": 17 << 24,
                "USERNAME": "ann",
                "XOR-PEER-ADDRESS": ("2001:db8::1", 7),
            },
        )
        wire = stun.encode_message(allocate, integrity_key=b"secret")
        read = stun.parse_message(wire, integrity_key=b"secret")
        assert (read.method, read.message_class, read.transaction_id) == (3, 0, ID)
        assert allocate.attributes.items() <= read.attributes.items()
        with pytest.raises(StunError, match="MESSAGE-INTEGRITY"):
            stun.parse_message(wire, integrity_key=b"other")
        with pytest.raises(StunError, match="MESSAGE-INTEGRITY"):
            stun.parse_message(stun.encode_message(allocate), integrity_key=b"secret")

    def test_unknown_required_attributes_are_reported(self) -> None:
        """aioice drops what it does not know; whoever must refuse it learns the types."""
        read = stun.parse_message(message(3, (0x7777, b"x"), (0x8777, b"")))
        assert read.unknown_required == (0x7777,)

    def test_cookie_and_lengths_are_checked(self) -> None:
        """What aioice lets pass is refused: another cookie, a cut attribute, trailing bytes."""
        for wire in (
            b"\0\x01\0\0" + CLASSIC_ID,
            REQUEST[:2] + b"\0\x08" + REQUEST[4:20] + b"\x80\x22\0\x08tail",
            REQUEST + bytes(4),
        ):
            with pytest.raises(StunError):
                stun.parse_message(wire)

    @pytest.mark.parametrize(
        "bad",
        [
            stun.Message(0x999, 0, ID),
            stun.Message(1, 7, ID),
            stun.Message(1, 0, ID, {"NO-SUCH": 1}),
            stun.Message(1, 0, ID, {"PRIORITY": "x"}),
            stun.Message(1, 0, CLASSIC_ID),
        ],
    )
    def test_our_own_mistakes(self, bad: stun.Message) -> None:
        """A message that cannot be written is a ValueError of the caller."""
        with pytest.raises(ValueError, match="cannot write"):
            stun.encode_message(bad)
