"""Ingress rules and origin options: what they mean, and how mistakes are told."""

from __future__ import annotations

import ipaddress
import time
import tomllib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from traversal.tunnel.configuration_file import read_configuration
from traversal.tunnel.ingress import Ingress, normalized_host
from traversal.tunnel.services import (
    BastionService,
    HelloService,
    HttpService,
    SocksService,
    StatusService,
    TcpService,
    parse_service,
)
from traversal.wire.tunnel.configuration import Configuration, IngressRule, parse_configuration
from traversal.wire.tunnel.errors import TunnelError


def ingress(text: str) -> Ingress:
    return Ingress.of(read_configuration(tomllib.loads(text)))


def status(rules: Ingress, host: str, path: str = "/") -> int:
    service = rules.match(host, path).service
    assert isinstance(service, StatusService)
    return service.status


RULES = ingress("""
[[ingress]]
hostname = "app.example.com"
path = "^/api/"
service = "http_status:201"
[[ingress]]
hostname = "App.Example.com"
service = "http_status:202"
[[ingress]]
hostname = "*.example.com"
path = "[.]css$"
service = "http_status:203"
[[ingress]]
hostname = "*.bücher.example"
service = "http_status:204"
[[ingress]]
hostname = "xn--bcher-kva.example"
service = "http_status:205"
[[ingress]]
service = "http_status:206"
""")


@pytest.mark.parametrize(
    ("host", "path", "expected"),
    [
        ("app.example.com", "/api/x?y=1", 201),
        ("APP.example.com:8443", "/api/x", 201),
        ("app.example.com.", "/x/api/", 202),
        ("app.example.com", "/?/api/", 202),
        ("app.example.com", "/%61pi/", 201),
        ("a.b.example.com", "/x.css", 203),
        ("a.b.example.com", "/x.css.map", 206),
        ("example.com", "/x.css", 206),
        ("xexample.com", "/x.css", 206),
        ("a.xn--bcher-kva.example", "/", 204),
        ("xn--bcher-kva.example", "/", 205),
        ("[2001:db8::1]:80", "/", 206),
        ("", "/", 206),
    ],
)
def test_first_match_wins(host: str, path: str, expected: int) -> None:
    """Hosts match exactly or by suffix, in any case and spelling, without port; paths anywhere."""
    assert status(RULES, host, path) == expected


@given(st.text(max_size=60), st.text(max_size=60))
def test_any_request_has_a_rule(host: str, path: str) -> None:
    """No request is too odd for the catch-all."""
    assert 201 <= status(RULES, host, path) <= 206
    assert normalized_host(normalized_host(host)) is not None


def test_no_rules_is_503() -> None:
    """A configuration without rules answers 503 to everything."""
    assert status(Ingress(), "a.example", "/") == 503


def test_evil_pattern_is_linear() -> None:
    """An expression that makes backtracking matchers run for ever costs a moment."""
    rules = ingress("""
    [[ingress]]
    path = "^(a+)+(a|a)*(a*)*$"
    service = "http_status:200"
    [[ingress]]
    service = "http_status:404"
    """)
    began = time.perf_counter()
    assert status(rules, "h", "/" + "a" * 16000 + "b") == 404
    assert time.perf_counter() - began < 1.0


@pytest.mark.parametrize(
    ("text", "service"),
    [
        ("http://localhost:8000", HttpService(False, "localhost", 8000)),
        ("http://localhost:8000/", HttpService(False, "localhost", 8000)),
        ("https://[2001:db8::1]", HttpService(True, "2001:db8::1", 443)),
        ("ws://h", HttpService(False, "h", 80)),
        ("wss://h:9", HttpService(True, "h", 9)),
        ("unix:/run/app.sock", HttpService(False, path="/run/app.sock")),
        ("unix+tls:/run/app.sock", HttpService(True, path="/run/app.sock")),
        ("tcp://h", TcpService("h", 7864)),
        ("ssh://10.0.0.1", TcpService("10.0.0.1", 22)),
        ("rdp://h", TcpService("h", 3389)),
        ("smb://h:1445", TcpService("h", 1445)),
        ("http_status:404", StatusService(404)),
        ("hello_world", HelloService()),
        ("hello-world", HelloService()),
        ("bastion", BastionService()),
        ("socks-proxy", SocksService()),
    ],
)
def test_services(text: str, service: object) -> None:
    """Every kind of the specification, with its default port."""
    assert parse_service(text) == service


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("htpp://localhost:8000", "did you mean 'http://'"),
        ("localhost:8000", "no service"),
        ("helloworld", "did you mean 'hello_world'"),
        ("http://localhost:99999", "99999 is no port"),
        ("http://localhost:0", "0 is no port"),
        ("http://localhost:8000/app", "Write http://localhost:8000"),
        ("http:localhost", "write http://host:port"),
        ("http://user@host", "is not host:port"),
        ("http_status:1000", "no status"),
        ("unix:run/app.sock", "unix:/path"),
        ("", "no service"),
    ],
)
def test_wrong_services(text: str, part: str) -> None:
    """A wrong service is told with what to write instead."""
    with pytest.raises(TunnelError, match=part.replace("(", r"\(")):
        parse_service(text)


@given(st.text(max_size=50))
def test_any_service_text(text: str) -> None:
    """Nothing but the one error comes out of a service's text."""
    try:
        parse_service(text)
    except TunnelError:
        pass


LAST = '\n[[ingress]]\nservice = "http_status:404"\n'


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ('[[ingress]]\nhostnam = "a"', ["rule 1", "'hostnam'", "did you mean 'hostname'"]),
        ('[[ingress]]\nhostname = "a"\nservice = 3', ["rule 1", "service", "Expected `str`"]),
        ('[[ingress]]\nhostname = "a"', ["rule 1", "`service`"]),
        (
            '[[ingress]]\nhostname="a"\nservice = "bastion"\noriginRequest.noTlsVerify = true',
            ["rule 1", "originRequest", "'noTlsVerify'", "did you mean 'noTLSVerify'"],
        ),
        (
            '[[ingress]]\nhostname="a"\nservice = "bastion"\noriginRequest.connectTimeout = "x"',
            ["rule 1", "connectTimeout", "30s"],
        ),
        (
            '[[ingress]]\nhostname="a"\nservice = "bastion"\noriginRequest.ipRules=[{prefx="a"}]',
            ["ipRules, rule 1", "'prefx'", "'prefix'"],
        ),
        (
            (
                '[[ingress]]\nhostname="a"\nservice = "bastion"\n'
                'originRequest.ipRules=[{prefix="10.0.0.0/33", allow=true}]'
            ),
            ["rule 1", "ipRules", "10.0.0.0/8"],
        ),
        (
            (
                '[[ingress]]\nhostname="a"\nservice = "bastion"\n'
                "originRequest.access = {required = true}"
            ),
            ["rule 1", "access", "remove it"],
        ),
        (
            '[[ingress]]\nhostname="a"\nservice = "tcp://h:1"\noriginRequest.proxyType = "sock"',
            ["rule 1", "proxyType", "socks"],
        ),
        ('[[ingress]]\npath="("\nservice = "bastion"', ["rule 1", "RE2"]),
        ('[[ingress]]\nhostname="a.*.b"\nservice = "bastion"', ["rule 1", "a.*.b"]),
        ('[[ingress]]\nservice = "bastion"', ["rule 1", "last rule"]),
        ("[originRequest]\nkeepAliveTimeout = true", ["originRequest, keepAliveTimeout"]),
        ("[warp-routing]\nmaxActiveFlow = 3", ["warp-routing", "'maxActiveFlows'"]),
    ],
)
def test_mistakes_are_named(text: str, parts: list[str]) -> None:
    """An error names the rule, the key and the nearest valid name."""
    with pytest.raises(TunnelError) as caught:
        ingress(text + LAST)
    for part in parts:
        assert part in str(caught.value)


def test_last_rule_takes_all() -> None:
    """Rules must end with one that takes everything."""
    with pytest.raises(TunnelError, match="rule 1"):
        ingress('[[ingress]]\nhostname = "a"\nservice = "bastion"')


def test_options_are_laid_over_defaults() -> None:
    """A rule's options win over those of the whole configuration, which win over the defaults."""
    rules = ingress("""
    [originRequest]
    connectTimeout = "1m30s"
    noTLSVerify = true
    [[ingress]]
    hostname = "a"
    service = "https://h"
    [ingress.originRequest]
    noTLSVerify = false
    httpHostHeader = "inner"
    disableChunkedEncoding = true
    [[ingress]]
    service = "tcp://h"
    originRequest = { proxyType = "socks", tlsTimeout = 3 }
    """)
    first, last = rules.rules
    assert first.options.connect_timeout == 90
    assert first.options.is_verified
    assert not first.options.is_chunked_allowed
    assert first.options.host_header == "inner"
    assert first.options.tls_timeout == 10
    assert last.service == SocksService()
    assert not last.options.is_verified
    assert last.options.tls_timeout == 3


def test_destination_rules() -> None:
    """The first rule that covers a destination decides; without one it is denied."""
    rules = ingress("""
    [[ingress]]
    service = "socks-proxy"
    [[ingress.originRequest.ipRules]]
    prefix = "10.1.0.0/16"
    allow = false
    [[ingress.originRequest.ipRules]]
    prefix = "10.0.0.0/8"
    ports = [22, 443]
    allow = true
    """)
    options = rules.rules[0].options
    address = ipaddress.ip_address
    assert options.allows(address("10.2.0.1"), 22)
    assert options.allows(address("::ffff:10.2.0.1"), 443)
    assert not options.allows(address("10.2.0.1"), 80)
    assert not options.allows(address("10.1.0.1"), 22)
    assert not options.allows(address("192.0.2.1"), 22)
    assert (
        not ingress('[[ingress]]\nservice="bastion"')
        .rules[0]
        .options.allows(address("10.2.0.1"), 22)
    )


def test_pushed_documents() -> None:
    """A document of the specification is understood; one that demands Access is refused."""
    document = parse_configuration(
        b'{"ingress":[{"hostname":"a.example","path":"/x","service":"http://localhost:1",'
        b'"originRequest":{"connectTimeout":7,"http2Origin":true,"fromTheFuture":1}},'
        b'{"service":"http_status:404"}],"originRequest":{"caPool":"/ca.pem"}}'
    )
    options = Ingress.of(document).match("a.example", "/x").options
    assert (options.connect_timeout, options.is_http2, options.ca_pool) == (7, True, "/ca.pem")
    with pytest.raises(TunnelError, match="access"):
        Ingress.of(
            parse_configuration(
                b'{"ingress":[{"service":"http://h","originRequest":{"access":{"required":true}}}]}'
            )
        )


@given(st.lists(st.tuples(st.text(max_size=20), st.text(max_size=20), st.text(max_size=20))))
def test_any_rules(rules: list[tuple[str, str, str]]) -> None:
    """Rules of any text compile or raise the one error."""
    try:
        Ingress.of(Configuration(tuple(IngressRule(s, h, p) for s, h, p in rules)))
    except TunnelError:
        pass
