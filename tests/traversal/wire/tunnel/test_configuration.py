"""Configuration documents: the documented example, what is refused, and that noise is."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from traversal.wire.tunnel.configuration import (
    Configuration,
    IngressRule,
    IpRule,
    OriginRequest,
    WarpRouting,
    parse_configuration,
)
from traversal.wire.tunnel.errors import TunnelError

DOCUMENT = {
    "ingress": [
        {
            "hostname": "app.example.com",
            "path": "^/api",
            "service": "https://127.0.0.1:8443",
            "originRequest": {"noTLSVerify": True, "connectTimeout": 5, "matchSNItoHost": True},
        },
        {"hostname": "*.example.com", "service": "unix:/run/app.sock"},
        {"service": "http_status:404"},
    ],
    "originRequest": {"http2Origin": True, "ipRules": [{"prefix": "10.0.0.0/8", "allow": False}]},
    "warp-routing": {"connectTimeout": 5, "maxActiveFlows": 0, "tcpKeepAlive": 30},
}


def test_document() -> None:
    """Every part is read under its documented key, and written again the same."""
    configuration = parse_configuration(json.dumps(DOCUMENT))
    first = configuration.ingress[0]
    assert first.hostname == "app.example.com"
    assert first.origin_request == OriginRequest(
        no_tls_verify=True, connect_timeout=5, match_sni_to_host=True
    )
    assert configuration.ingress[2] == IngressRule("http_status:404")
    assert configuration.origin_request.ip_rules == (IpRule("10.0.0.0/8", False),)
    assert configuration.warp_routing == WarpRouting(5, 0, 30)
    assert parse_configuration(configuration.encode()) == configuration
    report = json.loads(configuration.encode_report({"protocol": "http2"}))
    assert report["__configuration_flags"] == {"protocol": "http2"}
    assert report["ingress"][1] == DOCUMENT["ingress"][1]  # type: ignore[index]


def test_options_are_laid_over_each_other() -> None:
    """A rule's own option counts before the global one, also where it says no."""
    base = OriginRequest(connect_timeout=5, http2_origin=True)
    assert OriginRequest(http2_origin=False).over(base) == OriginRequest(
        connect_timeout=5, http2_origin=False
    )


def test_no_rules() -> None:
    """An empty document is a configuration that serves nothing."""
    assert parse_configuration("{}") == Configuration()


@pytest.mark.parametrize(
    ("rules", "problem"),
    [
        ([{"service": "http://a:1", "hostname": "a"}], "the last rule"),
        ([{"service": "http://a:1"}, {"service": "http_status:404"}], "only the last"),
        ([{"service": "http://a:1", "path": "("}, {"service": "bastion"}], "regular expression"),
        ([{"service": "http://a:1", "hostname": "a.*"}, {"service": "bastion"}], "hostname"),
        ([{"service": "http://a:1/path"}], "no path"),
        ([{"service": "http_status:99"}], "the service is not"),
        ([{"service": "http://a:99999"}], "the service is not"),
        ([{"service": "nonsense"}], "the service is not"),
        ([{"service": "unix:"}], "no path after"),
        ([{"hostname": "a"}], "service"),
        ([{"service": "bastion", "originRequest": {"connectTimeout": "5s"}}], "Expected"),
    ],
)
def test_wrong_documents(rules: list[dict[str, object]], problem: str) -> None:
    """Each mistake is named."""
    with pytest.raises(TunnelError, match=problem):
        parse_configuration(json.dumps({"ingress": rules}))


@pytest.mark.parametrize(
    "service",
    [
        "tcp://h:1",
        "ssh://h",
        "rdp://h:3389",
        "wss://h",
        "http://[::1]:80",
        "hello_world",
        "foo://h",
    ],
)
def test_services(service: str) -> None:
    """What connectors take is let through."""
    parse_configuration(json.dumps({"ingress": [{"service": service}]}))


@given(st.text(max_size=80) | st.binary(max_size=80))
def test_never_crashes(text: str | bytes) -> None:
    """Any text is read or refused."""
    try:
        parse_configuration(text)
    except TunnelError:
        pass
