"""Which tunnel serves what visitors ask for."""

from __future__ import annotations

from uuid import UUID

from hypothesis import given
from hypothesis import strategies as st

from relay.edge.destinations import DestinationPolicy
from relay.edge.routes import HttpRoute, NameRoute, RoutingTable

A, B, C, D = (UUID(int=number) for number in range(1, 5))


def tunnel_of(table: RoutingTable, host: str, path: str = "/") -> UUID | None:
    route = table.find_http(host, path)
    return None if route is None else route.tunnel


def test_exact_hosts_beat_suffixes_and_long_suffixes_short_ones() -> None:
    """`*.suffix` is for any depth below, not for the suffix itself."""
    table = RoutingTable(
        http=(
            HttpRoute("*.example.com", A),
            HttpRoute("*.b.example.com", B),
            HttpRoute("x.b.example.com", C),
        )
    )
    assert tunnel_of(table, "a.example.com") == A
    assert tunnel_of(table, "a.a.example.com") == A
    assert tunnel_of(table, "y.b.example.com") == B
    assert tunnel_of(table, "x.b.example.com") == C
    assert tunnel_of(table, "y.x.b.example.com") == B
    assert tunnel_of(table, "b.example.com") == A
    assert tunnel_of(table, "example.com") is None
    assert tunnel_of(table, "badexample.com") is None


def test_the_longest_path_prefix_wins() -> None:
    """Prefixes end at slashes; the query is no part of the path."""
    table = RoutingTable(
        http=(HttpRoute("h", A), HttpRoute("h", B, "/api"), HttpRoute("h", C, "/api/v2/"))
    )
    assert tunnel_of(table, "h", "/") == A
    assert tunnel_of(table, "h", "/apix") == A
    assert tunnel_of(table, "h", "/api") == B
    assert tunnel_of(table, "h", "/api?x=/y") == B
    assert tunnel_of(table, "h", "/api/v2") == C
    assert tunnel_of(table, "h", "/api/v2/x") == C
    assert tunnel_of(table, "h", "/api/v20") == B


def test_a_prefix_can_not_be_left_by_dots() -> None:
    """`/public/../admin` is not below `/public`, however it is written."""
    table = RoutingTable(http=(HttpRoute("h", A, "/public"),))
    assert tunnel_of(table, "h", "/public/x") == A
    for path in ("/public/../admin", "/public/%2e%2e/admin", "/public/..%2fadmin"):
        assert tunnel_of(table, "h", path) is None


def test_an_exact_host_without_the_path_falls_back_to_a_suffix() -> None:
    """A host's own prefixes first, then those of its suffixes."""
    table = RoutingTable(http=(HttpRoute("a.h", A, "/api"), HttpRoute("*.h", B)))
    assert tunnel_of(table, "a.h", "/api/x") == A
    assert tunnel_of(table, "a.h", "/") == B


def test_names_for_pass_through() -> None:
    """The same rules for TLS server names."""
    destination = DestinationPolicy().authorize("10.0.0.1:443")
    table = RoutingTable(
        tls=(NameRoute("*.db.example", A, destination), NameRoute("x.db.example", B, destination))
    )
    found = [table.find_tls(name) for name in ("a.db.example", "x.db.example", "db.example")]
    assert [route and route.tunnel for route in found] == [A, B, None]


@given(st.text(max_size=30), st.text(max_size=30))
def test_any_host_and_path_can_be_asked_for(host: str, path: str) -> None:
    """Looking up never fails, and finds only what was published."""
    table = RoutingTable(http=(HttpRoute("*.h", A, "/p"),))
    route = table.find_http(host, path)
    assert route is None or host.endswith(".h")
