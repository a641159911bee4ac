"""NAT-PMP, PCP and UPnP texts against vectors, real-world shapes and random input."""

from __future__ import annotations

import ipaddress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from traversal.wire import nat_pmp, pcp, upnp
from traversal.wire.address import Address

VECTORS = {
    line.partition("=")[0].strip(): bytes.fromhex(line.partition("=")[2])
    for line in (Path(__file__).parent / "vectors/portmap.txt").read_text().splitlines()
    if "=" in line
}
HOST = ipaddress.IPv4Address("192.168.1.50")
EXTERNAL = ipaddress.IPv4Address("203.0.113.7")
NONCE = bytes(range(0xA0, 0xAC))


def test_nat_pmp_vectors() -> None:
    """Every NAT-PMP message of the specification, both directions."""
    assert VECTORS["pmp.extaddr_request"] == nat_pmp.EXTERNAL_ADDRESS_REQUEST
    assert nat_pmp.encode_map_request(41641, 0, 7200) == VECTORS["pmp.map_request"]
    assert nat_pmp.encode_map_request(41641, 41641, 7200) == VECTORS["pmp.map_request_hint"]
    assert nat_pmp.encode_delete(41641) == VECTORS["pmp.delete"]
    assert nat_pmp.parse_response(
        VECTORS["pmp.extaddr_response"]
    ) == nat_pmp.ExternalAddressResponse(nat_pmp.Result.OK, 1000, EXTERNAL)
    assert nat_pmp.parse_response(VECTORS["pmp.map_response"]) == nat_pmp.MapResponse(
        nat_pmp.Result.OK, 1000, 41641, 50000, 7200
    )


def test_nat_pmp_odd_answers() -> None:
    """No address, short errors, codes to come and a PCP-only server are all understood."""
    none = nat_pmp.parse_response(VECTORS["pmp.extaddr_response"][:8] + bytes(4))
    assert none == nat_pmp.ExternalAddressResponse(nat_pmp.Result.OK, 1000, None)
    refused = nat_pmp.parse_response(bytes.fromhex("00810002000003e8"))
    assert refused == nat_pmp.MapResponse(nat_pmp.Result.NOT_AUTHORIZED, 1000, 0, 0, 0)
    assert nat_pmp.parse_response(bytes.fromhex("008000ff000003e8")).result == 3
    pcp_only = nat_pmp.parse_response(bytes.fromhex("0280000100000000"))
    assert pcp_only.result is nat_pmp.Result.UNSUPPORTED_VERSION
    for short in (b"", VECTORS["pmp.map_response"][:15], VECTORS["pmp.extaddr_response"][:11]):
        with pytest.raises(nat_pmp.NatPmpError):
            nat_pmp.parse_response(short)
    with pytest.raises(nat_pmp.NatPmpError):
        nat_pmp.parse_response(VECTORS["pcp.map_response"])


def test_pcp_vectors() -> None:
    """Every PCP message of the specification, both directions."""
    assert pcp.encode_announce(HOST) == VECTORS["pcp.announce_request"]
    assert pcp.encode_map_request(HOST, NONCE, 41641, 0, None, 7200) == VECTORS["pcp.map_request"]
    assert pcp.parse_response(VECTORS["pcp.announce_response"]) == pcp.AnnounceResponse(
        pcp.Result.SUCCESS, 1000
    )
    assert pcp.parse_response(VECTORS["pcp.map_response"]) == pcp.MapResponse(
        pcp.Result.SUCCESS, 1000, 7200, NONCE, 17, 41641, 50000, EXTERNAL
    )


def test_pcp_odd_answers() -> None:
    """Options are skipped, a NAT-PMP-only server is recognised, the rest is refused."""
    with_option = VECTORS["pcp.map_response"] + bytes.fromhex("0100000400000000")
    assert pcp.parse_response(with_option) == pcp.parse_response(VECTORS["pcp.map_response"])
    assert pcp.parse_response(bytes.fromhex("00800001")) == pcp.AnnounceResponse(
        pcp.Result.UNSUPP_VERSION, 0
    )
    bad = (
        VECTORS["pcp.map_request"],
        VECTORS["pcp.map_response"][:59],
        VECTORS["pmp.map_response"],
        b"",
        bytes(1101),
    )
    for datagram in bad:
        with pytest.raises(pcp.PcpError):
            pcp.parse_response(datagram)


@given(st.sampled_from([b"", b"\0\x80", b"\0\x81", b"\2\x80", b"\2\x81"]), st.binary(max_size=80))
def test_any_gateway_datagram_parses_or_raises_own_error(head: bytes, tail: bytes) -> None:
    """Whatever the gateway sends, one error type per protocol comes out."""
    for parse, error in (
        (nat_pmp.parse_response, nat_pmp.NatPmpError),
        (pcp.parse_response, pcp.PcpError),
        (upnp.parse_ssdp_reply, upnp.UpnpError),
        (upnp.parse_call_response, upnp.UpnpError),
        (lambda text: upnp.parse_description(text, "http://192.168.1.1/"), upnp.UpnpError),
    ):
        try:
            parse(head + tail)
        except error:
            pass


REPLY = (
    b"HTTP/1.1 200 OK\r\nCACHE-CONTROL: max-age=120\r\n"
    b"ST: urn:schemas-upnp-org:device:InternetGatewayDevice:1\r\n"
    b"USN: uuid:1::urn:schemas-upnp-org:device:InternetGatewayDevice:1\r\n"
    b"Server: Linux UPnP/1.1 MiniUPnPd\r\nLOCATION: http://192.168.1.1:5000/rootDesc.xml\r\n\r\n"
)
DESCRIPTION = b"""<?xml version="1.0"?><root xmlns="urn:schemas-upnp-org:device-1-0">
<URLBase>http://10.9.9.9/</URLBase><device><deviceList><device><serviceList>
<service><serviceType>urn:schemas-upnp-org:service:WANIPConnection:1</serviceType>
<controlURL>/ctl/IPConn</controlURL></service>
<service><serviceType>urn:schemas-upnp-org:service:Layer3Forwarding:1</serviceType>
<controlURL>/x</controlURL></service>
<service><serviceType>urn:schemas-upnp-org:service:WANIPConnection:2</serviceType>
<controlURL>http://10.0.0.66:99/ctl/two?x=1</controlURL></service>
</serviceList></device></deviceList></device></root>"""


class TestUpnp:
    """Discovery, description, calls."""

    def test_search(self) -> None:
        """The search is an HTTP request with CRLF lines and an empty line at its end."""
        text = upnp.encode_search(upnp.SEARCH_ALL)
        assert text.startswith(b"M-SEARCH * HTTP/1.1\r\nHOST: 239.255.255.250:1900\r\n")
        assert b'\r\nMAN: "ssdp:discover"\r\nMX: 2\r\n\r\n' in text

    def test_reply(self) -> None:
        """Header names are found in any case; others than gateways are refused."""
        reply = upnp.parse_ssdp_reply(REPLY)
        assert reply.location == "http://192.168.1.1:5000/rootDesc.xml"
        assert reply.server == "Linux UPnP/1.1 MiniUPnPd"
        for bad in (
            REPLY.replace(b"Gateway", b"Printer"),
            REPLY.replace(b"200", b"404"),
            b"",
            REPLY.replace(b"LOCATION", b"X"),
        ):
            with pytest.raises(upnp.UpnpError):
                upnp.parse_ssdp_reply(bad)

    def test_sorting(self) -> None:
        """IGD:2 comes before IGD:1 and duplicates go."""
        one = upnp.SsdpReply("http://a", "s", "uuid::InternetGatewayDevice:1")
        two = upnp.SsdpReply("http://b", "s", "uuid::InternetGatewayDevice:2")
        assert upnp.sort_replies([one, two, one]) == [two, one]

    def test_location_is_moved_to_the_gateway(self) -> None:
        """LOCATION's host gives way to the gateway's address; a name is refused."""
        gateway = ipaddress.IPv4Address("192.168.1.1")
        assert upnp.description_url("http://10.1.1.1:99/d.xml", gateway) == (
            "http://192.168.1.1:99/d.xml"
        )
        for bad in ("http://evil.example/d", "ftp://192.168.1.1/", "http://1.1.1.1:99999/", "["):
            with pytest.raises(upnp.UpnpError):
                upnp.description_url(bad, gateway)

    def test_description(self) -> None:
        """Mapping services are found in any nesting, best first, on the gateway's own host."""
        services = upnp.parse_description(DESCRIPTION, "http://192.168.1.1:5000/rootDesc.xml")
        assert services == [
            upnp.Service(upnp.SERVICE_TYPES[0], "http://192.168.1.1:5000/ctl/two?x=1"),
            upnp.Service(upnp.SERVICE_TYPES[1], "http://192.168.1.1:5000/ctl/IPConn"),
        ]

    @pytest.mark.parametrize(
        ("services", "expected"),
        [
            (["WANCommonInterfaceConfig:1", "WANPPPConnection:1"], "WANPPPConnection:1"),
            (["WANPPPConnection:1", "WANIPConnection:1"], "WANIPConnection:1"),
            (["WANIPConnection:1", "WANIPConnection:2"], "WANIPConnection:2"),
            (["Layer3Forwarding:1", "WANEthernetLinkConfig:1"], None),
            (["WANIPConnection:3", "ContentDirectory:1"], None),
            ([], None),
        ],
    )
    def test_routers_of_many_makes(self, services: list[str], expected: str | None) -> None:
        """DSL and cable routers, both generations, devices that map no ports: the right service,
        or none; in whatever namespace, order and nesting."""
        for schema in ("urn:schemas-upnp-org:device-1-0", "urn:dslforum-org:device-1-0", ""):
            text = "".join(
                f"<service><serviceType>urn:schemas-upnp-org:service:{name}</serviceType>"
                f"<controlURL>/ctl/{name}</controlURL></service>"
                for name in services
            )
            document = (
                f'<?xml version="1.0"?><root xmlns="{schema}"><device><deviceList><device>'
                f"<serviceList>{text}</serviceList></device></deviceList></device></root>"
            )
            found = upnp.parse_description(document.encode(), "http://192.168.1.1:80/")
            names = [service.type.split(":service:")[1] for service in found]
            assert names[:1] == ([expected] if expected else [])
            if found:
                assert found[0].control_url == f"http://192.168.1.1:80/ctl/{expected}"

    def test_entities_are_refused(self) -> None:
        """A document with a DOCTYPE, in whatever encoding, is not read."""
        bomb = '<!DOCTYPE x [<!ENTITY a "aaaa">]><x>&a;</x>'
        for document in (bomb.encode(), bomb.encode("utf-16")):
            with pytest.raises(upnp.UpnpError, match="DOCTYPE"):
                upnp.parse_description(document, "http://192.168.1.1/")

    def test_service_choice(self) -> None:
        """Up and public, up and private, up, first: in this order."""
        a, b, c = (upnp.Service(upnp.SERVICE_TYPES[1], f"http://{n}") for n in "abc")
        down = upnp.ServiceStatus(False, ipaddress.IPv4Address("198.51.101.1"))
        bare = upnp.ServiceStatus(True, None)
        private = upnp.ServiceStatus(True, ipaddress.IPv4Address("192.168.0.1"))
        public = upnp.ServiceStatus(True, ipaddress.IPv4Address("8.8.8.8"))
        assert upnp.choose_service([(a, down), (b, private), (c, public)]) is c
        assert upnp.choose_service([(a, bare), (b, private)]) is b
        assert upnp.choose_service([(a, down), (b, bare)]) is b
        assert upnp.choose_service([(a, down), (b, down)]) is a
        assert upnp.choose_service([(a, private), (b, private)]) is a
        assert upnp.choose_service([]) is None

    def test_call(self) -> None:
        """A call carries upper-case UDP, escaped text and the action in its header."""
        service = upnp.Service(upnp.SERVICE_TYPES[1], "http://192.168.1.1/")
        arguments = upnp.add_mapping_arguments(Address("192.168.1.50", 41641), 50000, 7200, "a<b")
        header, body = upnp.encode_call(service, "AddPortMapping", arguments)
        assert header == '"urn:schemas-upnp-org:service:WANIPConnection:1#AddPortMapping"'
        assert b"<NewProtocol>UDP</NewProtocol>" in body
        assert b"<NewPortMappingDescription>a&lt;b</NewPortMappingDescription>" in body
        assert upnp.parse_call_response(body)["NewInternalClient"] == "192.168.1.50"
        with pytest.raises(upnp.UpnpError):
            upnp.add_mapping_arguments(Address("192.168.1.50", 41641), 0, 7200, "x")
        assert upnp.mapping_arguments(50000)["NewProtocol"] == "UDP"

    def test_fault(self) -> None:
        """A refusal tells its UPnP code."""
        body = (
            b'<s:Envelope xmlns:s="x"><s:Body><s:Fault><detail><UPnPError><errorCode>725'
            b"</errorCode><errorDescription>OnlyPermanentLeasesSupported</errorDescription>"
            b"</UPnPError></detail></s:Fault></s:Body></s:Envelope>"
        )
        with pytest.raises(upnp.UpnpFaultError, match="OnlyPermanent") as caught:
            upnp.parse_call_response(body)
        assert caught.value.code == upnp.FAULT_ONLY_PERMANENT_LEASES

    def test_external_address(self) -> None:
        """No address, loopback and nonsense are refused; private ones are taken (double NAT)."""
        ip = upnp.external_ip_of({"NewExternalIPAddress": "192.168.100.2"})
        assert ip == ipaddress.IPv4Address("192.168.100.2")
        for bad in ("0.0.0.0", "127.0.0.1", "", "fe80::1"):
            with pytest.raises(upnp.UpnpError):
                upnp.external_ip_of({"NewExternalIPAddress": bad})
        assert upnp.is_up({"NewConnectionStatus": "Connected"})
        assert not upnp.is_up({})
