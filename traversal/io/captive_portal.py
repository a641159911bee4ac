"""Ask relays by plain HTTP whether a captive portal answers in their place."""

from __future__ import annotations

from ipaddress import IPv4Address
from typing import Final

import trio

from traversal.io.dial import DialError, Target, connect
from traversal.io.stream import StreamEndedError
from traversal.paths.captive_portal import choose_servers, conclude, encode_check, is_portal
from traversal.paths.report import Report
from traversal.relay_map import RelayMap

HTTP_PORT: Final = 80
START_SECONDS: Final = 0.2
"""STUN mostly answers sooner, and then there is no portal to look for."""
LIMIT_SECONDS: Final = 2.0
MAX_HEAD_BYTES: Final = 8192


async def find_captive_portal(report: Report, relay_map: RelayMap, preferred_region: int) -> None:
    """Note in `report` what was found, unless UDP works; ends within 2.2 s of its start."""
    await trio.sleep(START_SECONDS)
    if report.is_udp_working:
        return
    answers: list[bool | None] = []
    with trio.move_on_after(LIMIT_SECONDS):
        async with trio.open_nursery() as nursery:
            for server in choose_servers(relay_map, preferred_region):
                nursery.start_soon(_ask, server, answers)
    report.captive_portal = conclude(answers)


async def _ask(server: IPv4Address, answers: list[bool | None]) -> None:
    try:
        stream, _ = await connect(Target(str(server), HTTP_PORT, None))
    except DialError:
        return
    try:
        await stream.send_all(encode_check(server))
        head = b""
        while b"\r\n\r\n" not in head and len(head) < MAX_HEAD_BYTES:
            data = await stream.receive()
            if not data:
                break
            head += data
        answers.append(is_portal(head.partition(b"\r\n\r\n")[0], server))
    except StreamEndedError:
        pass
    finally:
        stream.close()
