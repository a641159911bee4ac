"""Which ports the NAT in front of us gives to new flows, and whether it hairpins.

Netcheck specification 10.4. A few fresh sockets ask one STUN server one after the other; two of
them then write to each other's public address. What the ports mean is decided by
`traversal.paths.report.classify_ports`.
"""

from __future__ import annotations

import socket
from contextlib import ExitStack
from dataclasses import dataclass
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

SAMPLES: Final = 8
"""Enough to see a step between foreign flows, few enough for the smallest port quota of a CGN."""
SEND_AT_SECONDS: Final = (0.0, 0.4, 1.0)
"""A repeated request keeps its mapping, so that the order stays that of the first ones."""
WAIT_SECONDS: Final = 1.5
HAIRPIN_SEND_AT_SECONDS: Final = (0.0, 0.15)
"""The first may be what opens the filter for the other direction."""
HAIRPIN_WAIT_SECONDS: Final = 0.5


@dataclass(frozen=True, slots=True)
class PortSamples:
    """(local, mapped) ports in the order of their making; None for hairpins: not to be told."""

    ports: tuple[tuple[int, int], ...]
    hairpins: bool | None


async def sample_ports(
    server: Address, host: str, own_hosts: frozenset[str], entropy: Entropy
) -> PortSamples:
    """Ask `server`, an IPv4 one, from sockets bound to `host`; takes up to 2 s, mostly less.

    Who is seen with one of `own_hosts`, our interfaces' addresses, has no NAT that could hairpin.
    """
    probes: list[_Probe] = []
    with ExitStack() as stack:
        try:
            for _ in range(SAMPLES):
                sock = stack.enter_context(new_socket(socket.AF_INET, socket.SOCK_DGRAM))
                await sock.bind((host, 0))
                probes.append(_Probe(sock, entropy))
        except OSError:
            return PortSamples((), None)
        async with trio.open_nursery() as nursery:
            for probe in probes:
                nursery.start_soon(probe.receive)
            await _ask(probes, server)
            answered = [(probe, probe.mapped) for probe in probes if probe.mapped is not None]
            hairpins = None
            if len(answered) > 1 and answered[0][1].host not in own_hosts:
                (one, one_mapped), (two, two_mapped) = answered[:2]
                hairpins = await _try_hairpin(one, one_mapped, two, two_mapped)
            nursery.cancel_scope.cancel()
    return PortSamples(
        tuple((probe.local_port, mapped.port) for probe, mapped in answered), hairpins
    )


class _Probe:
    """One socket and what it heard."""

    def __init__(self, sock: trio.socket.SocketType, entropy: Entropy) -> None:
        self.local_port: int = sock.getsockname()[1]
        self.mapped: Address | None = None
        self.has_answer = trio.Event()
        self.has_request = trio.Event()
        self._sock = sock
        self._transaction_id = TransactionId(entropy(TRANSACTION_ID_LENGTH))
        self.request = encode_binding_request(self._transaction_id)
        self.expected_request = b""
        """What another of our sockets sends to this one."""

    async def send(self, to: Address) -> None:
        try:
            await self._sock.sendto(self.request, to)
        except OSError:
            pass  # no route any more, or a full buffer: nothing will be heard

    async def receive(self) -> None:
        while True:
            try:
                data, _ = await self._sock.recvfrom(2048)
            except OSError:
                continue  # an ICMP error for an earlier request
            if data == self.expected_request:
                self.has_request.set()
                continue
            try:
                response = parse_binding_response(data)
            except StunError:
                continue
            if response.transaction_id == self._transaction_id and self.mapped is None:
                self.mapped = Address(*response.mapped_address)
                self.has_answer.set()


async def _ask(probes: list[_Probe], server: Address) -> None:
    began = trio.current_time()
    for pause in (*SEND_AT_SECONDS[1:], WAIT_SECONDS):
        waiting = [probe for probe in probes if probe.mapped is None]
        for probe in waiting:
            await probe.send(server)
        with trio.move_on_at(began + pause):
            for probe in waiting:
                await probe.has_answer.wait()
            return


async def _try_hairpin(one: _Probe, one_mapped: Address, two: _Probe, two_mapped: Address) -> bool:
    one.expected_request, two.expected_request = two.request, one.request
    began = trio.current_time()
    for pause in (*HAIRPIN_SEND_AT_SECONDS[1:], HAIRPIN_WAIT_SECONDS):
        await one.send(two_mapped)
        await two.send(one_mapped)
        with trio.move_on_at(began + pause):
            await one.has_request.wait()
            break
        if two.has_request.is_set():
            break
    return one.has_request.is_set() or two.has_request.is_set()
