"""The checker: random sizes and payloads through slow and vanishing receivers.

A relay that writes from shared buffers may deliver the wrong bytes and be fast at it. Here packets
of every size go to receivers that read slowly, stop reading, or vanish and come back, all at once;
each packet that arrives must be one that was sent to that receiver, whole, in order, and from whom
it says.

Payload: 4 bytes number, random bytes, and a keyed digest over number, random bytes and receiver;
the key is the sender's alone.
"""

from __future__ import annotations

import hashlib
import os
import random
from dataclasses import dataclass, field

import trio

from traversal.io.dial import Dialed, DialError, Target, dial
from traversal.io.stream import StreamEndedError
from traversal.keys import NodePrivate, NodePublic
from traversal.wire.derp import DerpError, FrameType, encode_send_packet

DIGEST_BYTES = 16
SENDERS = 4
SIZES = (4, 60, 1400, 9000, 65536 - 4 - DIGEST_BYTES)
MAX_BURST = 40
SEED = 1


class CheckError(Exception):
    """A packet arrived that was not sent so."""


@dataclass
class CheckResult:
    """How many packets were sent, and arrived at each kind of receiver."""

    sent: int = 0
    received: dict[str, int] = field(default_factory=dict)
    bytes_received: int = 0
    reconnects: int = 0

    def __str__(self) -> str:
        arrived = ", ".join(f"{count} by {kind}" for kind, count in self.received.items())
        return (
            f"{self.sent} packets sent; received and found intact: {arrived} receivers "
            f"({self.bytes_received / 1e6:.0f} MB; {self.reconnects} reconnects)"
        )


def _payload(key: bytes, number: int, filling: bytes, receiver: NodePublic) -> bytes:
    head = number.to_bytes(4, "big") + filling
    digest = hashlib.blake2b(head + receiver.raw, key=key, digest_size=DIGEST_BYTES).digest()
    return head + digest


class _Checker:
    def __init__(self, target: Target) -> None:
        self.target = target
        self.result = CheckResult()
        self.random = random.Random(SEED)
        # The digest key of each sender, by its public key.
        self.keys: dict[bytes, bytes] = {}

    async def send(self, sender: Dialed, key: bytes, receivers: list[NodePublic]) -> None:
        number = 0
        while True:
            burst = []
            for _ in range(self.random.randint(1, MAX_BURST)):
                size = self.random.randint(0, self.random.choice(SIZES))
                receiver = self.random.choice(receivers)
                filling = self.random.randbytes(size)
                burst.append(encode_send_packet(receiver, _payload(key, number, filling, receiver)))
                number += 1
            await sender.stream.send_all(b"".join(burst))
            self.result.sent += len(burst)
            await trio.sleep(self.random.uniform(0, 0.01))

    async def receive(self, kind: str, key: NodePrivate) -> None:
        """Receive for ever, in the manner of `kind`."""
        while True:
            try:
                dialed = await dial(self.target, key)
            except DialError as error:
                raise CheckError(f"a {kind} receiver could not come back: {error}") from None
            try:
                await self._receive_until_gone(kind, key.public(), dialed)
            except StreamEndedError:
                if kind == "prompt":
                    raise CheckError("the server closed a receiver that reads promptly") from None
            finally:
                dialed.close()
            self.result.reconnects += 1

    async def _receive_until_gone(self, kind: str, own: NodePublic, dialed: Dialed) -> None:
        numbers: dict[bytes, int] = {}
        for _ in range(self.random.randint(5, 200)) if kind == "vanishing" else iter(int, 1):
            if kind == "slow":
                await trio.sleep(self.random.uniform(0, 0.05))
            for frame_type, body in await dialed.receive_frames():
                if frame_type == FrameType.RECV_PACKET:
                    self._verify(own, body[:32], body[32:], numbers)
                    self.result.received[kind] = self.result.received.get(kind, 0) + 1
                    self.result.bytes_received += len(body)

    def _verify(
        self, own: NodePublic, source: bytes, payload: bytes, numbers: dict[bytes, int]
    ) -> None:
        key = self.keys.get(source)
        if key is None:
            raise CheckError("a packet came from a key that nobody sends with")
        number = int.from_bytes(payload[:4], "big")
        if payload != _payload(key, number, payload[4:-DIGEST_BYTES], own):
            raise CheckError(f"packet {number} of {len(payload)} bytes arrived damaged")
        if number <= numbers.get(source, -1):
            raise CheckError(f"packet {number} arrived twice or out of order")
        numbers[source] = number


async def check(target: Target, seconds: float) -> CheckResult:
    """Run the check. Raises CheckError, DialError."""
    checker = _Checker(target)
    kinds = {NodePrivate.generate(os.urandom): kind for kind in ("prompt", "slow", "vanishing") * 2}
    receivers = [key.public() for key in kinds]
    senders = []
    problems: list[Exception] = []
    for _ in range(SENDERS):
        private = NodePrivate.generate(os.urandom)
        senders.append((await dial(target, private), os.urandom(32)))
        checker.keys[private.public().raw] = senders[-1][1]

    async def guarded(task: object, *arguments: object) -> None:
        try:
            await task(*arguments)  # type: ignore[operator]
        except (CheckError, DerpError, StreamEndedError) as error:
            problems.append(error)
            nursery.cancel_scope.cancel()

    with trio.move_on_after(seconds):
        async with trio.open_nursery() as nursery:
            for key, kind in kinds.items():
                nursery.start_soon(guarded, checker.receive, kind, key)
            for sender, key_bytes in senders:
                nursery.start_soon(guarded, checker.send, sender, key_bytes, receivers)
    for sender, _ in senders:
        sender.close()
    if problems:
        raise CheckError(str(problems[0]))
    if not checker.result.received.get("prompt"):
        raise CheckError("nothing arrived at all")
    return checker.result
