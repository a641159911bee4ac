"""What `underpass` prints about a node, for a terminal of 80 columns. Pure.

Takes the values of `traversal.agent.status`, gives text. What other machines say (names of regions,
errors of relays) is printed without its control characters.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Final

from traversal.printable import printable

LABEL_COLUMNS: Final = 12
MIN_COLUMNS, MAX_COLUMNS = 40, 100
MAX_NAME_COLUMNS: Final = 20


def netcheck_screen(found: dict[str, Any], columns: int) -> str:
    """The answer of `underpass netcheck`."""
    hairpins = {True: "yes", False: "no", None: "unknown"}[found["nat"]["hairpins"]]
    services = [name for name in ("nat_pmp", "pcp", "upnp") if found[name]]
    blocked = "no relay answers" if found["nat"]["is_offline"] else "is blocked"
    lines = _field("UDP", "works" if found["udp"] else blocked, columns)
    if found["captive_portal"]:
        portal = "a captive portal answers for the relays: sign in with a browser"
        lines += _field("Portal", portal, columns)
    lines += _field("NAT", found["nat"]["text"], columns)
    lines += _field("Hairpin", hairpins, columns)
    lines += _field("IPv4", ", ".join(found["ipv4"]) or "no answer", columns)
    lines += _field("IPv6", ", ".join(found["ipv6"]) or "no answer", columns)
    mapping = ", ".join(services).replace("_", "-").upper() or "none offered"
    lines += _field("Port maps", mapping, columns)
    advertised = [
        (entry["address"], entry["type"].replace("_", " ").replace("stun", "STUN"))
        for entry in found["addresses"]
    ]
    lines += _list("Advertised", _table(advertised) or ["nothing"])
    relays = [
        (
            str(region["region"]),
            _milliseconds(region["latency_seconds"], "no answer"),
            "home" if region["is_home"] else "",
            region["name"],
        )
        for region in found["regions"]
    ]
    lines += _list("Relays", _table(relays, right=(0, 1)) or ["none in the map"])
    return "\n".join(printable(line.rstrip()) for line in lines)


def status_screen(found: dict[str, Any], columns: int) -> str:
    """The answer of `underpass status`."""
    lines = [
        found["key"],
        *_field("Home", f"region {found['home_region'] or 'none'}", columns),
        *_field("NAT", found["nat"]["text"], columns),
        *_list("Advertised", found["addresses"] or ["nothing"]),
    ]
    relays = [text for relay in found["relays"] for text in _wrap(_relay(relay), columns)]
    lines += _list("Relays", relays or ["none"])
    edge = found["edge"]
    if edge is not None:
        up = f"connected to {edge['server']} by {edge['transport']}"
        lines += _field("Edge", up if edge["transport"] else edge["last_error"], columns)
    peers = found["peers"]
    if not peers:
        lines += _field("Peers", "none in the agent's file", columns)
        return "\n".join(printable(line.rstrip()) for line in lines)
    heading = ("PEER", "PATH", "LATENCY", "LOSS", "MTU", "BY WAY OF")
    rows = [heading, *map(_peer, peers)]
    lines.append("")
    for row, way in zip(_table([row[:-1] for row in rows], right=(2, 3, 4)), rows, strict=True):
        # A long IPv6 address goes below.
        fits = len(row) + 2 + len(way[-1]) <= columns
        lines += [f"{row}  {way[-1]}"] if fits else [row.rstrip(), f"  {way[-1]}"]
    for peer in peers:
        lines += ["", *_hang(peer["text"], "", "  ", columns)]
    return "\n".join(printable(line.rstrip()) for line in lines)


def ping_line(ping: dict[str, Any]) -> str:
    """One ping's answer. Programs read this line, too (those of `underpass-lab matrix`)."""
    way = f" by {ping['way']}" if ping["way"] else ""
    took = _milliseconds(ping["latency_seconds"], "no answer")
    return f"{took}{way} (path: {ping['path']['kind']})"


def ping_screen(found: dict[str, Any], columns: int) -> str:
    """What `underpass ping` says at the end: both NATs, and why this path."""
    verdict = found["verdict"]
    lines = [
        "",
        *_field("This node", verdict["own_nat"]["text"], columns),
        *_field("The peer", verdict["peer_nat"]["text"], columns),
        "",
        *_hang(found["text"], "", "", columns),
    ]
    return "\n".join(printable(line.rstrip()) for line in lines)


def _peer(peer: dict[str, Any]) -> tuple[str, ...]:
    path, name = peer["path"], peer["name"]
    is_relay = path["kind"] == "relay"
    way = path["address"] or (f"region {path['region']}" if is_relay and path["region"] else "")
    return (
        name if len(name) <= MAX_NAME_COLUMNS else name[: MAX_NAME_COLUMNS - 3] + "...",
        path["kind"] if peer["state"] != "idle" else "idle",
        _milliseconds(path["latency_seconds"], ""),
        f"{path['loss_ratio']:.0%}" if path["latency_seconds"] is not None else "",
        str(path["mtu_bytes"] or "") if not is_relay else "",
        way,
    )


def _relay(relay: dict[str, Any]) -> str:
    state = "connected" if relay["is_connected"] else relay["last_error"] or "connecting"
    health = f"; it says: {relay['health']}" if relay["health"] else ""
    return f"{relay['region']} {state}{health}"


def _milliseconds(seconds: float | None, nothing: str) -> str:
    return nothing if seconds is None else f"{seconds * 1000:.1f} ms"


def _field(label: str, text: str, columns: int) -> list[str]:
    return _hang(text, label.ljust(LABEL_COLUMNS), " " * LABEL_COLUMNS, columns)


def _list(label: str, entries: Iterable[str]) -> Iterator[str]:
    for entry in entries:
        yield label.ljust(LABEL_COLUMNS) + entry
        label = ""


def _wrap(text: str, columns: int) -> list[str]:
    return _hang(text, "", "  ", columns - LABEL_COLUMNS)


def _hang(text: str, first: str, later: str, columns: int) -> list[str]:
    width = max(MIN_COLUMNS, min(columns, MAX_COLUMNS))
    return textwrap.wrap(
        text,
        width,
        initial_indent=first,
        subsequent_indent=later,
        break_long_words=False,
        break_on_hyphens=False,
    ) or [first.rstrip()]


def _table(rows: Sequence[tuple[str, ...]], right: tuple[int, ...] = ()) -> list[str]:
    """Aligned columns; those of numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if number in right else cell.ljust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
