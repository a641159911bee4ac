"""The relay map: DERPMap JSON in and out, headscale's YAML out, errors that name the place."""

from __future__ import annotations

import json
from ipaddress import IPv4Address, IPv6Address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from traversal.relay_map import (
    CertificateName,
    CertificatePin,
    CertificateUnchecked,
    Dial,
    Region,
    RelayMap,
    RelayMapError,
    RelayNode,
)

# The example of DERP specification 14.
EXAMPLE = """{
  "HomeParams": {"RegionScore": {"900": 1.0}},
  "Regions": {
    "900": {
      "RegionID": 900,
      "RegionCode": "lab",
      "RegionName": "Laboratory",
      "Nodes": [
        {"Name":"900a","RegionID":900,"HostName":"relay.example.com",
         "IPv4":"198.51.100.7","IPv6":"2001:db8::7","CanPort80":true}
      ]
    }
  },
  "omitDefaultRegions": true
}"""


def one_node(**fields: object) -> str:
    """A map of one region with one node, with `fields` of the node changed or added."""
    node = {"Name": "900a", "RegionID": 900, "HostName": "relay.example.com", **fields}
    return json.dumps({"Regions": {"900": {"RegionID": 900, "Nodes": [node]}}})


def parse_node(**fields: object) -> RelayNode:
    return RelayMap.parse(one_node(**fields)).regions[900].nodes[0]


class TestParse:
    def test_example(self) -> None:
        """The specification's example is read field by field."""
        relay_map = RelayMap.parse(EXAMPLE)
        node = RelayNode(
            name="900a",
            region_id=900,
            host_name="relay.example.com",
            ipv4=IPv4Address("198.51.100.7"),
            ipv6=IPv6Address("2001:db8::7"),
            can_port_80=True,
        )
        region = Region(region_id=900, code="lab", name="Laboratory", nodes=(node,))
        assert relay_map == RelayMap(
            regions={900: region}, home_scores={900: 1.0}, omit_default_regions=True
        )
        assert RelayMap.parse(EXAMPLE.encode()) == relay_map

    def test_field_names_match_in_any_case(self) -> None:
        """Field names match case-insensitively and unknown fields are ignored."""
        text = """{"REGIONS": {"900": {"regionid": 900, "nodes": [
            {"name": "900a", "regionId": 900, "hostname": "r.example", "future": 1}]}},
            "OmitDefaultRegions": true}"""
        relay_map = RelayMap.parse(text)
        assert relay_map.regions[900].nodes[0].host_name == "r.example"
        assert relay_map.omit_default_regions

    def test_null_region_is_removed(self) -> None:
        """A null region is kept as "remove this default", also when the map is written."""
        relay_map = RelayMap.parse('{"Regions": {"1": null, "2": null}, "HomeParams": null}')
        assert relay_map.removed_region_ids == {1, 2}
        assert RelayMap.parse(relay_map.to_json()) == relay_map

    def test_empty_map(self) -> None:
        """A map may be empty."""
        assert RelayMap.parse("{}") == RelayMap() == RelayMap.parse(RelayMap().to_json())

    def test_scores_of_zero_and_below_are_ignored(self) -> None:
        """Only scores above zero count; every other region has the score 1."""
        text = '{"HomeParams": {"RegionScore": {"1": 0.5, "2": 0, "3": -1}}}'
        relay_map = RelayMap.parse(text)
        assert [relay_map.home_score(region_id) for region_id in (1, 2, 3)] == [0.5, 1.0, 1.0]

    def test_map_is_read_only(self) -> None:
        """A checked map cannot be changed behind its back."""
        regions: dict[int, Region] = {}
        relay_map = RelayMap(regions=regions)
        regions[7] = RelayMap.parse(EXAMPLE).regions[900]
        assert not relay_map.regions
        with pytest.raises(TypeError):
            relay_map.regions[7] = regions[7]  # type: ignore[index]  # the point of the test


class TestNode:
    @pytest.mark.parametrize(
        ("fields", "derp_port", "stun_port"),
        [
            ({}, 443, 3478),
            ({"DERPPort": 0, "STUNPort": 0}, 443, 3478),
            ({"DERPPort": 8443, "STUNPort": 3479}, 8443, 3479),
            ({"DERPPort": -1, "STUNPort": -1}, None, None),
        ],
    )
    def test_effective_ports(
        self, fields: dict[str, object], derp_port: int | None, stun_port: int | None
    ) -> None:
        """0 and absent are the default port, -1 is no service."""
        node = parse_node(**fields)
        assert (node.derp_port, node.stun_port) == (derp_port, stun_port)

    def test_is_relay(self) -> None:
        """A STUN-only node and one without DERP port are no relays."""
        assert parse_node().is_relay
        assert not parse_node(STUNOnly=True).is_relay
        assert not parse_node(DERPPort=-1).is_relay

    @pytest.mark.parametrize(
        ("fields", "expected_4", "expected_6"),
        [
            ({}, Dial.BY_NAME, Dial.BY_NAME),
            ({"IPv4": "192.0.2.1"}, IPv4Address("192.0.2.1"), Dial.BY_NAME),
            ({"IPv6": "none"}, Dial.BY_NAME, Dial.NEVER),
            ({"HostName": "192.0.2.1"}, IPv4Address("192.0.2.1"), Dial.NEVER),
            ({"HostName": "2001:db8::1"}, Dial.NEVER, IPv6Address("2001:db8::1")),
            (
                {"HostName": "192.0.2.1", "IPv6": "2001:db8::1"},
                IPv4Address("192.0.2.1"),
                IPv6Address("2001:db8::1"),
            ),
        ],
    )
    def test_dial_address(
        self, fields: dict[str, object], expected_4: object, expected_6: object
    ) -> None:
        """Each family is a literal address, a look-up of the host name, or unused."""
        node = parse_node(**fields)
        assert (node.dial_address(4), node.dial_address(6)) == (expected_4, expected_6)
        assert node.stun_dial_address(4) == expected_4

    def test_stun_dial_address(self) -> None:
        """The test address is for STUN only; without a STUN port there is no STUN address."""
        node = parse_node(STUNTestIP="127.0.0.9")
        assert node.stun_dial_address(4) == IPv4Address("127.0.0.9")
        assert node.stun_dial_address(6) is Dial.NEVER
        assert node.dial_address(4) is Dial.BY_NAME
        assert parse_node(STUNPort=-1).stun_dial_address(4) is Dial.NEVER

    def test_certificate_policy(self) -> None:
        """Host name, certificate name, pin or nothing; a pin wins over "insecure"."""
        pin = "sha256-raw:" + "ab" * 32
        assert parse_node().certificate_policy == CertificateName("relay.example.com")
        assert parse_node(CertName="x.example").certificate_policy == CertificateName("x.example")
        assert parse_node(CertName=pin).certificate_policy == CertificatePin(b"\xab" * 32)
        assert parse_node(InsecureForTests=True).certificate_policy == CertificateUnchecked()
        both = parse_node(InsecureForTests=True, CertName=pin)
        assert both.certificate_policy == CertificatePin(b"\xab" * 32)

    def test_server_name(self) -> None:
        """SNI is the host name even under another certificate name, and never an address."""
        assert parse_node(CertName="x.example").server_name == "relay.example.com"
        assert parse_node(HostName="192.0.2.1").server_name is None


NODE = '{"Name": "900a", "RegionID": 900, "HostName": "r.example"}'
REGION = f'{{"RegionID": 900, "Nodes": [{NODE}]}}'

BAD_MAPS = [
    ("", ["not valid JSON"]),
    (b"\xff", ["not valid JSON"]),
    ("[" * 100_000, ["not valid JSON"]),
    ('{"HomeParams": {"RegionScore": {"1": NaN}}}', ["not valid JSON"]),
    ("[]", ["relay map", "JSON object", "a list"]),
    ('{"Regions": []}', ["Regions", "a list"]),
    ('{"Regions": {"x": null}}', ["'x'", "900"]),
    ('{"Regions": {"0": null}}', ["0 is no region id"]),
    ('{"Regions": {"0900": null}}', ["'0900'"]),
    ('{"Regions": {"900": 7}}', ["region 900", "a number"]),
    ('{"Regions": {"900": {}}}', ["region 900, RegionID", "missing", "write 900"]),
    ('{"Regions": {"900": {"RegionID": 901}}}', ["region 900, RegionID", "901", "write 900"]),
    ('{"Regions": {"900": {"RegionID": 900}}}', ["region 900, Nodes", "empty"]),
    ('{"Regions": {"900": {"RegionID": 900, "Nodes": 1}}}', ["region 900, Nodes", "a list"]),
    ('{"Regions": {"900": {"RegionID": 900, "Nodes": [3]}}}', ["node 1", "a number"]),
    ('{"Regions": {"900": {"RegionID": true}}}', ["RegionID", "a boolean"]),
    (f'{{"Regions": {{"900": {REGION}, "901": {REGION.replace("900,", "901,")}}}}}', ["'900a'"]),
    (REGION.join(('{"Regions": {"900": ', "}, 1}")), ["not valid JSON"]),
    ('{"HomeParams": {"RegionScore": {"1": 1' + "0" * 400 + "}}}", ["too large"]),
    (one_node(Name=""), ["node", "Name", "900a"]),
    (one_node(Name="a\nb"), ["Name", "printable"]),
    (one_node(RegionID=0), ["node '900a', RegionID", "missing", "write 900"]),
    (one_node(HostName=""), ["node '900a', HostName"]),
    (one_node(HostName="https://r.example"), ["HostName", "without scheme"]),
    (one_node(HostName="r.example:443"), ["HostName", "port"]),
    (one_node(CertName="sha256-raw:" + "AB" * 32), ["CertName", "lower case"]),
    (one_node(CertName="sha256-raw:ab"), ["CertName", "64 hex digits"]),
    (one_node(IPv4="2001:db8::1"), ["node '900a', IPv4", "none"]),
    (one_node(IPv6="1.2.3.4"), ["node '900a', IPv6", "none"]),
    (one_node(IPv4=7), ["IPv4", "a string", "a number"]),
    (one_node(DERPPort=65536), ["DERPPort", "65536"]),
    (one_node(STUNPort=-2), ["STUNPort", "-2", "-1 for none"]),
    (one_node(STUNPort="3478"), ["STUNPort", "whole number", "a string"]),
    (one_node(STUNPort=3478.5), ["STUNPort", "whole number"]),
    (one_node(STUNOnly=1), ["STUNOnly", "true or false"]),
    (one_node(STUNTestIP="x"), ["STUNTestIP", "'x'"]),
]


class TestErrors:
    @pytest.mark.parametrize(("text", "parts"), BAD_MAPS)
    def test_message_names_the_place(self, text: str | bytes, parts: list[str]) -> None:
        """Every mistake is one RelayMapError whose text names place and remedy."""
        with pytest.raises(RelayMapError) as caught:
            RelayMap.parse(text)
        for part in parts:
            assert part in str(caught.value)

    def test_values_built_by_hand_are_checked(self) -> None:
        """A map built in code is checked like one that was read."""
        node = RelayNode("900a", 900, "r.example")
        with pytest.raises(RelayMapError, match=r"region 901.*write 901"):
            Region(901, "", "", (node,))
        region = Region(900, "", "", (node,))
        with pytest.raises(RelayMapError, match="write 7"):
            RelayMap(regions={7: region})
        with pytest.raises(RelayMapError, match="both listed and removed"):
            RelayMap(regions={900: region}, removed_region_ids=frozenset({900}))
        with pytest.raises(RelayMapError, match="above 0"):
            RelayMap(home_scores={900: 0.0})
        with pytest.raises(RelayMapError, match="Latitude"):
            Region(900, "", "", (node,), latitude=91.0)

    @given(st.binary() | st.text())
    def test_any_text(self, text: str | bytes) -> None:
        """Whatever the text, the only error is RelayMapError."""
        try:
            RelayMap.parse(text)
        except RelayMapError:
            pass

    @given(
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
            lambda inner: (
                st.lists(inner, max_size=3)
                | st.dictionaries(
                    st.sampled_from(["RegionID", "Nodes", "Name", "HostName", "IPv4", "STUNPort"]),
                    inner,
                    max_size=6,
                )
            ),
            max_leaves=12,
        )
    )
    def test_any_region(self, region: object) -> None:
        """Whatever JSON value stands for a region, the only error is RelayMapError."""
        try:
            RelayMap.parse(json.dumps({"Regions": {"900": region}}))
        except RelayMapError:
            pass


labels = st.from_regex(r"[a-z]([a-z0-9-]{0,8}[a-z0-9])?", fullmatch=True)
host_names = st.lists(labels, min_size=1, max_size=3).map(".".join) | st.ip_addresses().map(str)
ports = st.none() | st.integers(1, 65535)
names = st.text().filter(str.isprintable)


@st.composite
def regions(draw: st.DrawFn, region_id: int) -> Region:
    nodes = [
        RelayNode(
            name=f"{region_id}{letter}",
            region_id=region_id,
            host_name=draw(host_names),
            certificate_name=draw(st.just("") | host_names | st.just("sha256-raw:" + "0f" * 32)),
            ipv4=draw(st.sampled_from(Dial) | st.integers(0, 2**32 - 1).map(IPv4Address)),
            ipv6=draw(st.sampled_from(Dial) | st.integers(0, 2**128 - 1).map(IPv6Address)),
            stun_port=draw(ports),
            stun_only=draw(st.booleans()),
            derp_port=draw(ports),
            insecure_for_tests=draw(st.booleans()),
            stun_test_ip=draw(st.none() | st.ip_addresses()),
            can_port_80=draw(st.booleans()),
        )
        for letter in "ab"[: draw(st.integers(1, 2))]
    ]
    return Region(
        region_id=region_id,
        code=draw(names),
        name=draw(names),
        nodes=tuple(nodes),
        latitude=draw(st.none() | st.floats(1, 90)),
        avoid=draw(st.booleans()),
        no_measure_no_home=draw(st.booleans()),
    )


relay_maps = st.builds(
    RelayMap,
    regions=st.fixed_dictionaries({}, optional={n: regions(n) for n in (1, 900)}),
    removed_region_ids=st.frozensets(st.integers(2, 800), max_size=2),
    home_scores=st.dictionaries(st.integers(1, 999), st.floats(0.1, 10), max_size=2),
    omit_default_regions=st.booleans(),
)


class TestWrite:
    @given(relay_maps)
    def test_round_trip(self, relay_map: RelayMap) -> None:
        """What is written as JSON is read back equal."""
        assert RelayMap.parse(relay_map.to_json()) == relay_map

    def test_json_is_tailscales(self) -> None:
        """Field names are Tailscale's and fields with their default value are left out."""
        assert json.loads(RelayMap.parse(EXAMPLE).to_json()) == json.loads(EXAMPLE)
        assert json.loads(RelayMap.parse(one_node(STUNPort=3478, IPv4="NONE")).to_json()) == {
            "Regions": {
                "900": {
                    "RegionID": 900,
                    "RegionCode": "",
                    "RegionName": "",
                    "Nodes": [
                        {
                            "Name": "900a",
                            "RegionID": 900,
                            "HostName": "relay.example.com",
                            "IPv4": "none",
                        }
                    ],
                }
            }
        }

    def test_headscale_yaml(self) -> None:
        """headscale's file has the lower-case field names and quoted text."""
        relay_map = RelayMap(
            regions={
                900: Region(
                    900,
                    "no",
                    'Zürich "one"',
                    (
                        RelayNode(
                            "900a",
                            900,
                            "relay.example.com",
                            certificate_name="sha256-raw:" + "ab" * 32,
                            ipv4=IPv4Address("198.51.100.7"),
                            ipv6=Dial.NEVER,
                            stun_port=None,
                            derp_port=8443,
                            can_port_80=True,
                        ),
                        RelayNode("900b", 900, "stun.example.com", stun_only=True),
                    ),
                    avoid=True,
                )
            },
            removed_region_ids=frozenset({1}),
        )
        assert relay_map.to_headscale_yaml() == (
            "regions:\n"
            "  1: null\n"
            "  900:\n"
            "    regionid: 900\n"
            '    regioncode: "no"\n'
            '    regionname: "Zürich \\"one\\""\n'
            "    avoid: true\n"
            "    nodes:\n"
            '      - name: "900a"\n'
            "        regionid: 900\n"
            '        hostname: "relay.example.com"\n'
            f'        certname: "sha256-raw:{"ab" * 32}"\n'
            '        ipv4: "198.51.100.7"\n'
            '        ipv6: "none"\n'
            "        stunport: -1\n"
            "        derpport: 8443\n"
            "        canport80: true\n"
            '      - name: "900b"\n'
            "        regionid: 900\n"
            '        hostname: "stun.example.com"\n'
            "        stunonly: true\n"
        )
        assert RelayMap().to_headscale_yaml() == "regions: {}\n"
