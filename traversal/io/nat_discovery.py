"""RFC 5780: what the NAT in front of us does, asked of a STUN server with two addresses.

Netcheck specification 10. Filtering is asked before mapping, because the mapping tests send to the
server's other address and so open a filter that depends on addresses. All requests leave by the
peers' socket: it is its mapping that counts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import trio

from traversal.io.udp import Source, UdpSockets
from traversal.keys import Entropy
from traversal.paths.report import classify_filtering, classify_mapping
from traversal.wire.address import Address
from traversal.wire.introduction import FilteringClass, MappingClass
from traversal.wire.stun import (
    TRANSACTION_ID_LENGTH,
    BindingResponse,
    StunError,
    TransactionId,
    encode_discovery_request,
    parse_binding_response,
)

SEND_AT_SECONDS: Final = (0.0, 0.5, 1.5)
WAIT_SECONDS: Final = 2.5
"""A positive answer takes one packet, a negative one all of this."""


@dataclass(frozen=True, slots=True)
class NatBehavior:
    """What was found."""

    mapping: MappingClass
    filtering: FilteringClass


class NatDiscovery:
    """Runs one discovery at a time; feed it the STUN messages that come in."""

    def __init__(self, udp: UdpSockets, entropy: Entropy) -> None:
        self._udp = udp
        self._entropy = entropy
        self._waiting: dict[bytes, trio.Event] = {}
        self._answers: dict[bytes, BindingResponse] = {}

    def handle_stun(self, datagram: bytes) -> bool:
        """Whether a datagram was the answer to a request of ours. Anything may be in it."""
        if datagram[8:20] not in self._waiting:
            return False  # before it is parsed: anybody can send these
        try:
            response = parse_binding_response(datagram)
        except StunError:
            return False
        self._answers[response.transaction_id] = response
        self._waiting[response.transaction_id].set()
        return True

    async def run(self, server: Address, local: Address | None) -> NatBehavior | None:
        """Ask `server`; None if it does not answer or has one address only.

        `local` is our socket's own address, where it is known: seeing it means that there is no
        NAT. Takes up to 8 s, 3 s behind a NAT that filters and a server that answers.
        """
        first = await self._ask(server)
        if first is None or first.other_address is None:
            return None
        reflexive = Address(*first.mapped_address)
        other = Address(*first.other_address)
        is_natted = reflexive != local
        from_elsewhere, from_other_port = await self._try_filter(server)
        second = third = None
        if is_natted:
            second = await self._reflexive(Address(other.host, server.port))
            if second is not None and second != reflexive:
                third = await self._reflexive(other)
        return NatBehavior(
            mapping=classify_mapping(local or Address("0.0.0.0", 0), reflexive, second, third),
            filtering=classify_filtering(
                is_natted=is_natted,
                from_other_ip_and_port=from_elsewhere,
                from_other_port=from_other_port,
            ),
        )

    async def _try_filter(self, server: Address) -> tuple[bool, bool | None]:
        """Who gets in: the server's other address, and if not, its other port. Both are asked at
        once, since neither request opens anything."""
        heard: dict[bool, bool] = {}

        async def listen(change_ip: bool) -> None:
            answer = await self._ask(server, change_ip=change_ip, change_port=True)
            heard[change_ip] = answer is not None
            if change_ip and heard[True]:
                nursery.cancel_scope.cancel()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(listen, True)
            nursery.start_soon(listen, False)
        return heard[True], None if heard[True] else heard[False]

    async def _reflexive(self, server: Address) -> Address | None:
        answer = await self._ask(server)
        return Address(*answer.mapped_address) if answer is not None else None

    async def _ask(
        self, server: Source, *, change_ip: bool = False, change_port: bool = False
    ) -> BindingResponse | None:
        transaction_id = TransactionId(self._entropy(TRANSACTION_ID_LENGTH))
        request = encode_discovery_request(
            transaction_id, change_ip=change_ip, change_port=change_port
        )
        answered = self._waiting[transaction_id] = trio.Event()
        began = trio.current_time()
        try:
            for pause in (*SEND_AT_SECONDS[1:], WAIT_SECONDS):
                self._udp.send(request, server)
                with trio.move_on_at(began + pause):
                    await answered.wait()
                    break
            return self._answers.pop(transaction_id, None)
        finally:
            del self._waiting[transaction_id]
