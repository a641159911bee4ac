"""How long the NAT in front of us keeps a mapping that nobody uses.

Each of a few sockets talks with a STUN server for a moment, is silent for a time of its own, and
asks again. A hard NAT that still has the mapping answers with the same port, one that forgot it
with another (in the manner of RFC 5780 section 4.6, without its RESPONSE-PORT, which few servers
speak). A NAT that keeps port numbers gives the same port again and can't be measured so.
"""

from __future__ import annotations

import math
import socket
from typing import Final

import trio

from traversal.io.marking import new_socket
from traversal.keys import Entropy
from traversal.wire.address import Address
from traversal.wire.stun import (
    TRANSACTION_ID_LENGTH,
    StunError,
    TransactionId,
    encode_binding_request,
    parse_binding_response,
)

SILENCES_SECONDS: Final = (8.0, 14.0, 25.0, 40.0, 55.0, 85.0, 115.0, 170.0)
"""Just below the timers that NATs have (NAT behaviours 7: 30, 45, 60, 90, 120 s and more)."""
WARM_UP_SECONDS: Final = (0.0, 1.3, 1.3)
"""Linux gives its long timer only to flows that had packets both ways for more than 2 s."""
ANSWER_SECONDS: Final = 1.0
TRIES: Final = 3


async def measure_lifetime(server: Address, host: str, entropy: Entropy) -> float | None:
    """The longest silence in seconds that mappings survive, 0 (less than 8) to 170; None if it
    can't be told.

    Takes three minutes and about 50 packets. `server` is an IPv4 one, `host` where to bind.
    """
    survived: dict[float, bool] = {}

    async def try_one(silence: float) -> None:
        try:
            with new_socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
                await sock.bind((host, 0))
                has_survived = await _survives(sock, silence, server, entropy)
        except OSError:
            return
        if has_survived is not None:
            survived[silence] = has_survived

    async with trio.open_nursery() as nursery:
        for silence in SILENCES_SECONDS:
            nursery.start_soon(try_one, silence)
    lost = [silence for silence, has_survived in survived.items() if not has_survived]
    kept = [silence for silence in survived if silence < min(lost, default=math.inf)]
    return max(kept, default=0.0) if survived else None


async def _survives(
    sock: trio.socket.SocketType, silence: float, server: Address, entropy: Entropy
) -> bool | None:
    before = None
    for pause in WARM_UP_SECONDS:
        await trio.sleep(pause)
        before = await _ask(sock, server, entropy)
    if before is None or before.port == sock.getsockname()[1]:
        return None
    await trio.sleep(silence)
    after = await _ask(sock, server, entropy)
    return None if after is None else after == before


async def _ask(sock: trio.socket.SocketType, server: Address, entropy: Entropy) -> Address | None:
    transaction_id = TransactionId(entropy(TRANSACTION_ID_LENGTH))
    for _ in range(TRIES):
        await sock.sendto(encode_binding_request(transaction_id), server)
        with trio.move_on_after(ANSWER_SECONDS):
            while True:
                data, _ = await sock.recvfrom(2048)
                try:
                    response = parse_binding_response(data)
                except StunError:
                    continue
                if response.transaction_id == transaction_id:
                    return Address(*response.mapped_address)
    return None
