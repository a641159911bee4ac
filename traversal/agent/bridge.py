"""The WireGuard bridge: an external WireGuard's encrypted packets travel over a link.

Each peer has a UDP socket on loopback, which the local WireGuard has as that peer's endpoint. What
it sends there goes over the link, what the link brings goes to WireGuard from there. WireGuard does
all cryptography; the bridge looks at nothing.
"""

from __future__ import annotations

import trio

from traversal.io.udp import Batch, UdpSockets
from traversal.link import Link, LinkError
from traversal.relay_map import Family
from traversal.wire.address import Address
from traversal.wire.classify import WIREGUARD


async def run_bridge(
    link: Link,
    endpoint: Address,
    wireguard: Address,
    *,
    task_status: trio.TaskStatus[Address] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Carry packets between `link` and the WireGuard at `wireguard`, until cancelled; tells the
    endpoint, whose port is the kernel's choice if it was 0.

    Raises UdpError when `endpoint` can't be bound, LinkClosedError when the link is closed.
    """
    family: Family = 6 if endpoint.is_ipv6 else 4
    sockets = UdpSockets({family: endpoint.host})
    await sockets.open(endpoint.port)
    try:
        async with trio.open_nursery() as nursery:

            def handle(batch: Batch) -> None:
                # Anybody on this host can send here; only WireGuard's packets travel.
                packets = [d for d, source in batch if source == wireguard and d[1:4] == WIREGUARD]
                try:
                    link.send_many_nowait(packets)
                except LinkError:
                    pass  # the link has just been closed

            nursery.start_soon(sockets.receive, handle)
            task_status.started(Address(endpoint.host, sockets.port(family) or 0))
            while True:
                sockets.send_many(await link.receive_many(), wireguard)
    finally:
        sockets.close()
