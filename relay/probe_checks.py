"""What can be seen of a DERP server from outside; each check is one coroutine.

A check returns what it found, in words and as values, or raises one of `FAILURES`.
"""

from __future__ import annotations

import os
import socket
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Final

import h11
import trio
from cryptography import x509

from traversal.io.dial import Dialed, DialError, Target, connect, dial
from traversal.io.stream import HandshakeStream, StreamEndedError
from traversal.keys import KEY_LENGTH, NodePrivate, NodePublic
from traversal.relay_map import Dial, Family, RelayNode
from traversal.wire.derp import (
    MAX_PACKET_LENGTH,
    ClientInfo,
    DerpError,
    FrameType,
    encode_ping,
    encode_send_packet,
)
from traversal.wire.derp_upgrade import maybe_server_key_from_certificates
from traversal.wire.stun import (
    StunError,
    TransactionId,
    encode_binding_request,
    parse_binding_response,
)

MIN_VALIDITY_DAYS: Final = 7
"""A certificate that ends sooner is a failure, as for Tailscale's prober (specification 20)."""
HANDSHAKES: Final = 4
PINGS: Final = 5
STUN_REQUESTS: Final = 3
STUN_WAIT_SECONDS: Final = 1.0
RESEND_SECONDS: Final = 0.2
"""A packet between two servers is repeated: the mesh learns of a client with some delay."""
IN_FLIGHT: Final = 30
"""Packets of 64 KiB under way, as in Tailscale's prober; a good relay drops none (7.5)."""
BANDWIDTH_PACKETS: Final = 300
DELAY_PACKETS: Final = 100
DELAY_INTERVAL_SECONDS: Final = 0.01
DELAY_PACKET_BYTES: Final = 100
SILENCE_SECONDS: Final = 1.0
MAX_RESPONSE_BYTES: Final = 65536


class ProbeError(Exception):
    """A check failed; the text says what is wrong."""


FAILURES: Final = (
    ProbeError,
    DialError,
    StreamEndedError,
    DerpError,
    StunError,
    h11.RemoteProtocolError,
    OSError,
    trio.TooSlowError,
)
"""What a check may raise when the server is at fault, or the network."""


@dataclass(frozen=True, slots=True)
class Found:
    """What a check found: in words, and as values for programs."""

    text: str
    values: Mapping[str, object] = field(default_factory=dict)


async def check_tls(target: Target) -> Found:
    """Version, validity, and chain. Raises one of FAILURES."""
    stream, tls = await connect(target)
    stream.close()
    if tls is None:
        return Found("none: plain HTTP", {"tls_version": None})
    version = tls.version()
    chain = tls.peer_chain()
    has_meta = maybe_server_key_from_certificates(chain) is not None
    leaf = x509.load_der_x509_certificate(chain[0])
    days = (leaf.not_valid_after_utc - datetime.now(UTC)).days
    values = {
        "tls_version": version,
        "expires": leaf.not_valid_after_utc.isoformat(),
        "certificates": len(chain),
        "meta_certificate": has_meta,
    }
    if days < MIN_VALIDITY_DAYS:
        raise ProbeError(f"the certificate ends in {days} days ({leaf.not_valid_after_utc:%F})")
    meta = "meta certificate" if has_meta else "no meta certificate, so no fast start"
    return Found(f"{version}, certificate valid for {days} more days, {meta}", values)


async def check_handshakes(target: Target, info: ClientInfo) -> Found:
    """Slow and fast starts, in turn: the server's key must be the same every time.

    Raises one of FAILURES.
    """
    keys: set[NodePublic] = set()
    times: dict[bool, list[float]] = {}
    for number in range(HANDSHAKES):
        key = NodePrivate.generate(os.urandom)
        dialed = await dial(target, key, info=info, fast_start=number % 2 == 1)
        dialed.close()
        keys.add(dialed.server_key)
        took = dialed.times.connect_seconds + dialed.times.tls_seconds
        times.setdefault(dialed.fast_start, []).append(took + dialed.times.handshake_seconds)
    if len(keys) > 1:
        raise ProbeError(
            f"{len(keys)} different server keys in {HANDSHAKES} connections: several servers "
            "behind one address, which breaks everything unless they are one mesh region"
        )
    kinds = {
        "fast start" if fast else "slow start": min(seconds) for fast, seconds in times.items()
    }
    text = ", ".join(f"{kind} {1000 * seconds:.1f} ms" for kind, seconds in kinds.items())
    server_key = str(keys.pop())
    return Found(
        f"{text}, key {server_key}",
        {"server_key": server_key, **{f"{kind[:4]}_seconds": t for kind, t in kinds.items()}},
    )


async def check_ping(target: Target, info: ClientInfo) -> Found:
    """Round trips of DERP's Ping. Raises one of FAILURES."""
    dialed = await dial(target, NodePrivate.generate(os.urandom), info=info)
    try:
        times = []
        for _ in range(PINGS):
            data = os.urandom(8)
            began = trio.current_time()
            await dialed.stream.send_all(encode_ping(data))
            while (FrameType.PONG, data) not in await dialed.receive_frames():
                pass
            times.append(trio.current_time() - began)
    finally:
        dialed.close()
    median = statistics.median(times)
    return Found(
        f"{1000 * median:.2f} ms (best {1000 * min(times):.2f})",
        {"median_seconds": median, "best_seconds": min(times)},
    )


async def check_stun(node: RelayNode, family: Family) -> Found | None:
    """A Binding request by IPv4 or IPv6; None where the node has no STUN in this family.

    Raises one of FAILURES.
    """
    address = node.stun_dial_address(family)
    if address is Dial.NEVER or node.stun_port is None:
        return None
    host = node.host_name if address is Dial.BY_NAME else str(address)
    kind = socket.AF_INET if family == 4 else socket.AF_INET6
    try:
        found = await trio.socket.getaddrinfo(host, node.stun_port, kind, socket.SOCK_DGRAM)
    except socket.gaierror:
        return None  # the name has no address of this family
    with trio.socket.socket(kind, socket.SOCK_DGRAM) as sock:
        await sock.connect(found[0][4])
        for _ in range(STUN_REQUESTS):
            transaction_id = TransactionId(os.urandom(12))
            began = trio.current_time()
            await sock.send(encode_binding_request(transaction_id))
            with trio.move_on_after(STUN_WAIT_SECONDS):
                while True:
                    response = parse_binding_response(await sock.recv(2048))
                    if response.transaction_id == transaction_id:
                        took = trio.current_time() - began
                        mapped = f"{response.mapped_address[0]} port {response.mapped_address[1]}"
                        return Found(
                            f"{1000 * took:.2f} ms, we are {mapped}",
                            {"seconds": took, "mapped_address": list(response.mapped_address)},
                        )
    raise ProbeError(f"no answer to {STUN_REQUESTS} requests within {STUN_REQUESTS} s")


async def check_http(target: Target) -> Found:
    """`/derp/probe` and `/generate_204` as clients ask for them. Raises one of FAILURES."""
    status, _, took = await _get(target, "/derp/probe", {})
    if status != 200:
        raise ProbeError(f"/derp/probe answered with status {status}, not 200")
    challenge = "ts_" + os.urandom(8).hex()
    status, headers, _ = await _get(target, "/generate_204", {"X-Tailscale-Challenge": challenge})
    if status != 204 or headers.get("x-tailscale-response") != f"response {challenge}":
        raise ProbeError(
            f"/generate_204 answered with status {status}, not 204 with our challenge: clients "
            "will think they are behind a captive portal"
        )
    return Found(f"/derp/probe {1000 * took:.1f} ms, /generate_204 right", {"seconds": took})


async def _get(
    target: Target, path: str, headers: Mapping[str, str]
) -> tuple[int, dict[str, str], float]:
    """Status, headers with lower-case names, and the seconds from request to response."""
    stream, _ = await connect(target)
    try:
        return await _exchange(stream, target.host_header, path, headers)
    finally:
        stream.close()


async def _exchange(
    stream: HandshakeStream, host: str, path: str, headers: Mapping[str, str]
) -> tuple[int, dict[str, str], float]:
    connection = h11.Connection(h11.CLIENT, max_incomplete_event_size=MAX_RESPONSE_BYTES)
    request = h11.Request(method="GET", target=path, headers=[("Host", host), *headers.items()])
    began = trio.current_time()
    await stream.send_all(
        (connection.send(request) or b"") + (connection.send(h11.EndOfMessage()) or b"")
    )
    while True:
        event = connection.next_event()
        if event is h11.NEED_DATA:
            data = await stream.receive()
            if not data:
                raise ProbeError(f"the server closed the connection instead of answering {path}")
            connection.receive_data(data)
        elif isinstance(event, h11.Response):
            found = {name.decode("latin-1"): text.decode("latin-1") for name, text in event.headers}
            return event.status_code, found, trio.current_time() - began


class Link:
    """A sender on one server and a receiver on the same or another one of the region."""

    def __init__(self, sender: Dialed, receiver: Dialed, receiver_key: NodePublic) -> None:
        self.sender = sender
        self.receiver = receiver
        self._receiver_key = receiver_key

    @classmethod
    async def open(cls, sender_at: Target, receiver_at: Target, info: ClientInfo) -> Link:
        """Raises DialError."""
        key = NodePrivate.generate(os.urandom)
        receiver = await dial(receiver_at, key, info=info)
        try:
            sender = await dial(sender_at, NodePrivate.generate(os.urandom), info=info)
        except BaseException:
            receiver.close()
            raise
        return cls(sender, receiver, key.public())

    def close(self) -> None:
        """Close both ends."""
        self.sender.close()
        self.receiver.close()

    async def send(self, payload: bytes) -> None:
        """Send one packet. Raises StreamEndedError."""
        await self.sender.stream.send_all(encode_send_packet(self._receiver_key, payload))

    async def receive(self) -> list[bytes]:
        """Payloads that have arrived, at least one. Raises StreamEndedError, DerpError."""
        while True:
            payloads = [
                body[KEY_LENGTH:]
                for frame_type, body in await self.receiver.receive_frames()
                if frame_type == FrameType.RECV_PACKET
            ]
            if payloads:
                return payloads

    async def wait_until_up(self) -> float:
        """Send until a packet arrives; its seconds under way.

        Raises StreamEndedError, DerpError.
        """
        while True:
            payload = os.urandom(64)
            began = trio.current_time()
            await self.send(payload)
            with trio.move_on_after(RESEND_SECONDS):
                while payload not in await self.receive():
                    pass
                return trio.current_time() - began


async def check_path(sender_at: Target, receiver_at: Target, info: ClientInfo) -> Found:
    """One packet from one server of a region to another (or back). Raises one of FAILURES."""
    link = await Link.open(sender_at, receiver_at, info)
    try:
        took = await link.wait_until_up()
    finally:
        link.close()
    return Found(f"{1000 * took:.2f} ms", {"seconds": took})


async def check_bandwidth(target: Target, info: ClientInfo) -> Found:
    """30 packets of 64 KiB in flight; a drop or a swap is a failure. Raises one of FAILURES."""
    link = await Link.open(target, target, info)
    filling = os.urandom(MAX_PACKET_LENGTH - 4)
    tickets = trio.Semaphore(IN_FLIGHT)

    async def send() -> None:
        for number in range(BANDWIDTH_PACKETS):
            await tickets.acquire()
            await link.send(number.to_bytes(4, "big") + filling)

    try:
        await link.wait_until_up()
        began = trio.current_time()
        received = 0
        async with trio.open_nursery() as nursery:
            nursery.start_soon(send)
            while received < BANDWIDTH_PACKETS:
                for payload in await link.receive():
                    if len(payload) != MAX_PACKET_LENGTH:
                        continue  # left over from waiting
                    number = int.from_bytes(payload[:4], "big")
                    if number != received or payload[4:] != filling:
                        raise ProbeError(f"packet {received} was dropped, swapped or damaged")
                    received += 1
                    tickets.release()
        took = trio.current_time() - began
    except BaseExceptionGroup as group:
        raise group.exceptions[0] from None
    finally:
        link.close()
    rate = 8 * BANDWIDTH_PACKETS * MAX_PACKET_LENGTH / took
    return Found(f"{rate / 1e6:,.0f} Mbit/s", {"bits_per_second": rate})


async def check_queue_delay(target: Target, info: ClientInfo) -> Found:
    """Small packets while another pair sends in bulk. Raises one of FAILURES."""
    link = await Link.open(target, target, info)
    bulk = await Link.open(target, target, info)
    delays: list[float] = []
    sent: dict[bytes, float] = {}

    async def load() -> None:
        payload = os.urandom(MAX_PACKET_LENGTH)
        while True:
            await bulk.send(payload)

    async def take_load() -> None:
        while True:
            await bulk.receive()

    async def send() -> None:
        for _ in range(DELAY_PACKETS):
            payload = os.urandom(DELAY_PACKET_BYTES)
            sent[payload] = trio.current_time()
            await link.send(payload)
            await trio.sleep(DELAY_INTERVAL_SECONDS)

    try:
        await link.wait_until_up()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(load)
            nursery.start_soon(take_load)
            nursery.start_soon(send)
            while len(delays) < DELAY_PACKETS:
                with trio.fail_after(SILENCE_SECONDS):
                    payloads = await link.receive()
                now = trio.current_time()
                delays += [now - sent[payload] for payload in payloads if payload in sent]
            nursery.cancel_scope.cancel()
    except BaseExceptionGroup as group:
        raise ProbeError(
            f"{DELAY_PACKETS - len(delays)} of {DELAY_PACKETS} small packets did not arrive: "
            f"{group.exceptions[0] or 'they were dropped'}"
        ) from None
    finally:
        link.close()
        bulk.close()
    delays.sort()
    median, high = delays[len(delays) // 2], delays[int(0.99 * len(delays))]
    return Found(
        f"{1000 * median:.2f} ms median, {1000 * high:.2f} ms at 99 %, under load",
        {"median_seconds": median, "p99_seconds": high},
    )
