"""What the commands print: aligned, within 80 columns, without control codes of others."""

from __future__ import annotations

from typing import Any

from traversal.agent.screens import netcheck_screen, ping_line, ping_screen, status_screen

DIRECT: dict[str, Any] = {
    "kind": "direct",
    "address": "[2001:db8:1234:5678:9abc:def0:1234:5678]:41641",
    "region": 900,
    "latency_seconds": 0.0123,
    "loss_ratio": 0.1,
    "mtu_bytes": 1400,
}
RELAY: dict[str, Any] = {
    **DIRECT,
    "kind": "relay",
    "address": None,
    "latency_seconds": None,
    "loss_ratio": 0.0,
    "mtu_bytes": 65536,
}
NAT = {"text": "a hard NAT (another public port for each destination), with random ports"}
TEXT = "Traffic to attic goes by the relay of region 900. " * 4


def peer(name: str, path: dict[str, Any], state: str) -> dict[str, Any]:
    return {"name": name, "path": path, "state": state, "text": TEXT}


def status(*peers: dict[str, Any], **more: Any) -> dict[str, Any]:
    relay = {"region": 900, "is_connected": True, "health": "", "last_error": ""}
    return {
        "key": "nodekey:" + "a" * 64,
        "home_region": 900,
        "nat": NAT,
        "addresses": ["203.0.113.9:41641"],
        "relays": [relay],
        "edge": None,
        "peers": list(peers),
        **more,
    }


def lines_of(screen: str) -> list[str]:
    lines = screen.splitlines()
    assert max(map(len, lines)) <= 80
    return lines


def test_status() -> None:
    """A table of peers with columns under their headings, and why for each."""
    lines = lines_of(
        status_screen(
            status(
                peer("attic", DIRECT, "direct"),
                peer("x" * 30, RELAY, "relay"),
                peer("cellar", {**DIRECT, "address": "192.0.2.7:41641"}, "direct"),
            ),
            columns=80,
        )
    )
    (heading,) = (line for line in lines if line.startswith("PEER"))
    rows = lines[lines.index(heading) + 1 :][:4]
    way = heading.index("BY WAY OF")
    assert rows[1] == f"  {DIRECT['address']}"
    assert rows[2].startswith("x" * 17 + "...  relay")
    assert [row[way:] for row in rows[2:]] == ["region 900", "192.0.2.7:41641"]
    end = heading.index("LATENCY") + len("LATENCY")
    assert rows[0][:end].endswith(" 12.3 ms")
    assert " ".join(" ".join(lines).split()).count(TEXT.strip()) == 3


def test_status_of_an_empty_agent() -> None:
    """Nothing is left out without a word."""
    found = status(addresses=[], relays=[], home_region=None)
    found["edge"] = {"transport": None, "server": None, "last_error": "no route"}
    lines = lines_of(status_screen(found, columns=80))
    labels = {line[:12].strip(): line[12:] for line in lines}
    assert labels["Home"] == "region none"
    assert labels["Advertised"] == "nothing"
    assert labels["Relays"] == "none"
    assert labels["Edge"] == "no route"
    assert labels["Peers"] == "none in the agent's file"


def test_hostile_texts() -> None:
    """What a relay says can't command the terminal."""
    relay = {"region": 9, "is_connected": False, "health": "", "last_error": "\x1b]0;x\x07 bad"}
    screen = status_screen(status(relays=[relay]), columns=80)
    assert "?]0;x? bad" in screen
    assert "\x1b" not in screen


def test_ping() -> None:
    """A line for each ping, then both NATs and why."""
    assert ping_line({"latency_seconds": None, "way": None, "path": RELAY}) == (
        "no answer (path: relay)"
    )
    answered = ping_line({"latency_seconds": 0.01, "way": "relay 900", "path": DIRECT})
    assert answered == "10.0 ms by relay 900 (path: direct)"
    verdict = {"own_nat": NAT, "peer_nat": {"text": "no NAT"}}
    lines = lines_of(ping_screen({"verdict": verdict, "text": TEXT}, columns=80))
    assert any(line.startswith("This node   a hard NAT") for line in lines)
    assert "The peer    no NAT" in lines


def test_netcheck() -> None:
    """Regions are aligned, the home is marked."""
    regions = [
        {"region": 900, "name": "Near", "latency_seconds": 0.0123, "is_home": True},
        {"region": 1, "name": "Far", "latency_seconds": None, "is_home": False},
    ]
    found: dict[str, Any] = {
        "udp": True,
        "captive_portal": None,
        "nat": {**NAT, "hairpins": None, "is_offline": False},
        "ipv4": ["203.0.113.9:1"],
        "ipv6": [],
        "nat_pmp": True,
        "pcp": None,
        "upnp": False,
        "addresses": [{"type": "stun", "address": "203.0.113.9:1"}],
        "regions": regions,
    }
    lines = lines_of(netcheck_screen(found, columns=80))
    assert lines[-2:] == [
        "Relays      900    12.3 ms  home  Near",
        "              1  no answer        Far",
    ]
    assert "Port maps   NAT-PMP" in lines
    found |= {"udp": False, "nat": {**found["nat"], "is_offline": True}}
    assert lines_of(netcheck_screen(found, columns=80))[0] == "UDP         no relay answers"
