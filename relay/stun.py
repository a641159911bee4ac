"""The STUN service of a relay (DERP specification 13; RFC 8489; RFC 5780).

It answers Tailscale's clients with exactly the bytes that Tailscale's own servers send, every
other client of RFC 8489 or RFC 5389 with XOR-MAPPED-ADDRESS, and clients of RFC 3489 with
MAPPED-ADDRESS. IPv4 senders are told an IPv4 address on dual-stack sockets too. A FINGERPRINT may
be missing but not wrong. With a second IP address and port it does RFC 5780: four sockets per
address family, each of which can answer for any other.

No amplifier. The source of a datagram can be forged, so what goes back must not be worth forging
it for. An answer is sent only if one of these holds:

* it is not longer than its request;
* the request is Tailscale's, 40 bytes, and its answer of 44 bytes goes to an IPv6 address: 92
  bytes on the wire for 88, which nobody would want to forge and drop-in service needs;
* the excess, answer minus request in bytes, is paid from the budget of the source's network (a
  /24 of IPv4, a /48 of IPv6): EXCESS_BYTES_PER_SECOND with a burst of EXCESS_BURST_BYTES. A plain
  request of 20 bytes costs 12 for IPv4 and 24 for IPv6.

So whoever forges a victim's address gains, after the burst, 600 bytes a second and those 4 bytes
in 88, whatever he sends and wherever in its network the victim is. Optional attributes
(RESPONSE-ORIGIN, OTHER-ADDRESS) are left out when the rule allows only the bare answer, PADDING
never makes an answer longer than its request, and error responses carry no reason text. A network
whose budget somebody else has spent still gets answers to requests that are long enough; any
SOFTWARE of 20 bytes makes them so.
"""

from __future__ import annotations

import hashlib
import logging
import os
import socket
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from ipaddress import IPv6Address, ip_address
from typing import Final, NamedTuple

import trio

from traversal.wire.stun import (
    UNKNOWN_ATTRIBUTE,
    Address,
    BindingRequest,
    StunError,
    TransactionId,
    encode_binding_response,
    encode_error_response,
    is_tailnode_request,
    parse_binding_request,
)

logger = logging.getLogger(__name__)

EXCESS_BYTES_PER_SECOND: Final = 600.0
"""Fifty plain IPv4 requests a second from one network: an office that starts up at nine."""
EXCESS_BURST_BYTES: Final = 6000.0
"""Ten seconds' worth: 500 plain IPv4 requests at once."""

# 64 KiB for both tables. Networks that share a slot share its budget, which errs on the safe
# side, and bounds what forged sources from everywhere gain together: 2.4 MB a second.
_BUDGET_SLOTS: Final = 4096

# A discovery request with 1500 bytes of PADDING is the longest anybody sends. What is longer is
# cut off by the kernel and refused, since its length field then does not match.
_RECEIVE_BYTES: Final = 2048
# About 0.4 ms of work before other tasks get their turn.
_BATCH: Final = 64
# Takes the bursts that arrive while other tasks run; the kernel may allow less.
_RECEIVE_BUFFER_BYTES: Final = 1 << 20
_READ_ERROR_PAUSE_SECONDS: Final = 1.0

_BAD_REQUEST: Final = 400
_CHANGE_REQUEST: Final = 0x0003
_PADDING: Final = 0x0026
_RESPONSE_PORT: Final = 0x0027

SocketAddress = tuple[str, int] | tuple[str, int, int, int]
"""What `recvfrom` gives for IPv4 and IPv6."""

Square = tuple[Address, Address, Address, Address]
"""The four addresses of an RFC 5780 server: (A1, P1), (A1, P2), (A2, P1), (A2, P2).

Bit 1 of a place in the square is the IP address, bit 0 the port, so that a change is an XOR.
"""


class StunServerError(Exception):
    """The STUN service cannot start as told; the text says what to change."""


class Reply(NamedTuple):
    """A datagram to send: the bytes, to whom, and the place in the square to send from."""

    datagram: bytes
    destination: SocketAddress
    place: int


class ExcessBudget:
    """Token buckets for bytes sent to a network beyond those received from it.

    The table has a fixed size: unproven senders cost no memory. `secret`, random bytes, keeps an
    attacker from finding networks that share a slot with his victim's.
    """

    def __init__(self, secret: bytes) -> None:
        self._secret = secret
        self._bytes = array("d", [EXCESS_BURST_BYTES]) * _BUDGET_SLOTS
        self._times = array("d", [0.0]) * _BUDGET_SLOTS

    def take(self, host: str, excess_bytes: int, now: float) -> bool:
        """Whether the network of `host` can pay `excess_bytes`; if it can, it has."""
        slot = self._slot(host)
        elapsed = max(0.0, now - self._times[slot])
        left = min(EXCESS_BURST_BYTES, self._bytes[slot] + elapsed * EXCESS_BYTES_PER_SECOND)
        affordable = excess_bytes <= left
        self._times[slot] = now
        self._bytes[slot] = left - excess_bytes if affordable else left
        return affordable

    def _slot(self, host: str) -> int:
        if "." in host:
            network = host.removeprefix("::ffff:").rpartition(".")[0].encode()
        else:
            network = IPv6Address(host.partition("%")[0]).packed[:6]
        digest = hashlib.blake2b(network, key=self._secret, digest_size=4).digest()
        return int.from_bytes(digest, "big") % _BUDGET_SLOTS


def answer(
    datagram: bytes,
    source: SocketAddress,
    now: float,
    budget: ExcessBudget,
    square: Square | None = None,
    place: int = 0,
) -> Reply | None:
    """Decide what to send for one datagram, by the rules at the top of this module.

    `place` is where in `square` it was received; without a square the server has one address
    and does no RFC 5780. Returns None when an answer would cost more than the budget holds.
    Raises StunError for what is no Binding request.
    """
    if is_tailnode_request(datagram):
        response = encode_binding_response(TransactionId(datagram[8:20]), source[:2])
        return Reply(response, source, place)
    request = parse_binding_request(datagram)
    error = _error_response(request, square)
    if error is not None:
        responses: Iterator[bytes] = iter((error,))
        destination, origin = source, place
    else:
        origin = place ^ (request.change_ip << 1 | request.change_port)
        responses = _success_responses(request, source, len(datagram), square, place, origin)
        destination = source
        if request.response_port is not None:
            destination = (source[0], request.response_port, *source[2:])
    for response in responses:
        excess_bytes = len(response) - len(datagram)
        if excess_bytes <= 0 or budget.take(source[0], excess_bytes, now):
            return Reply(response, destination, origin)
    return None


def _error_response(request: BindingRequest, square: Square | None) -> bytes | None:
    unknown = request.unknown_attributes
    if square is None:
        # A server without alternate address must refuse to change it (RFC 5780 6.1).
        if request.change_ip or request.change_port:
            unknown += (_CHANGE_REQUEST,)
        if request.response_port is not None:
            unknown += (_RESPONSE_PORT,)
        if request.padding_bytes is not None:
            unknown += (_PADDING,)
    if unknown:
        return encode_error_response(
            request.transaction_id, UNKNOWN_ATTRIBUTE, unknown_attributes=unknown
        )
    # RFC 5780 6.1: the two must not be combined, since the padding would hit a third party.
    if request.response_port == 0 or (request.response_port and request.padding_bytes is not None):
        return encode_error_response(request.transaction_id, _BAD_REQUEST)
    return None


def _success_responses(
    request: BindingRequest,
    source: SocketAddress,
    request_bytes: int,
    square: Square | None,
    place: int,
    origin: int,
) -> Iterator[bytes]:
    """The possible answers, the fullest first."""
    transaction_id, mapped_address = request.transaction_id, source[:2]
    if square is not None:
        from_address, other_address = square[origin], square[place ^ 3]
        full = encode_binding_response(
            transaction_id,
            mapped_address,
            response_origin=from_address,
            other_address=other_address,
        )
        room = request_bytes - len(full) - 4
        if request.padding_bytes is not None and room >= 0:
            yield encode_binding_response(
                transaction_id,
                mapped_address,
                response_origin=from_address,
                other_address=other_address,
                padding_bytes=min(request.padding_bytes, room & ~3),
            )
        yield full
    yield encode_binding_response(transaction_id, mapped_address)


@dataclass(frozen=True, slots=True)
class StunStatistics:
    """Counts since the server was made.

    All but `over_budget` have a namesake among derper's metrics: `stun_requests` by disposition,
    `stun_addrfamily` by family of the source. `success` counts all that was answered, error
    responses included; `over_budget` what the rule against amplification left unanswered.
    """

    success: int = 0
    not_stun: int = 0
    over_budget: int = 0
    read_error: int = 0
    write_error: int = 0
    ipv4: int = 0
    ipv6: int = 0


@dataclass(slots=True)
class _Counters:
    success: int = 0
    not_stun: int = 0
    over_budget: int = 0
    read_error: int = 0
    write_error: int = 0
    ipv4: int = 0
    ipv6: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class _Endpoint:
    """One socket, and the sockets that can answer for it: itself, or the four of a square."""

    sock: socket.socket
    siblings: list[socket.socket]
    square: Square | None = None
    place: int = 0


@dataclass(slots=True, eq=False)
class StunServer:
    """A STUN server on one or several UDP addresses.

    `addresses` are IP addresses with ports; port 0 takes a free one. `::` serves IPv4 as well
    unless an IPv4 address with the same port is listed too. On `::` and `0.0.0.0` the kernel
    chooses which address of the machine an answer comes from: a machine with several should list
    those that clients are told. Each of `alternates` makes the one address of its family an RFC
    5780 server and must differ from it in both IP address and port; the server then also listens
    on the two mixed pairs. Raises StunServerError.
    """

    addresses: Sequence[Address]
    alternates: Sequence[Address] = ()
    _counters: _Counters = field(default_factory=_Counters, init=False, repr=False)
    _budget: ExcessBudget = field(
        default_factory=lambda: ExcessBudget(os.urandom(16)), init=False, repr=False
    )

    def __post_init__(self) -> None:
        for address in (*self.addresses, *self.alternates):
            _check_address(address)
        for alternate in self.alternates:
            self._primary_of(alternate)

    def statistics(self) -> StunStatistics:
        """A snapshot of the counts."""
        counters = self._counters
        return StunStatistics(
            success=counters.success,
            not_stun=counters.not_stun,
            over_budget=counters.over_budget,
            read_error=counters.read_error,
            write_error=counters.write_error,
            ipv4=counters.ipv4,
            ipv6=counters.ipv6,
        )

    async def serve(
        self, *, task_status: trio.TaskStatus[list[Address]] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Serve until cancelled.

        Starts with the bound addresses in the order of `addresses`. Raises StunServerError when
        an address cannot be bound. Cancellation closes the sockets; no answer is left half sent.
        """
        endpoints: list[_Endpoint] = []
        try:
            for address in self.addresses:
                self._open(address, endpoints)
            firsts = [endpoint for endpoint in endpoints if endpoint.place == 0]
            async with trio.open_nursery() as nursery:
                for endpoint in endpoints:
                    nursery.start_soon(self._serve_endpoint, endpoint)
                task_status.started([endpoint.sock.getsockname()[:2] for endpoint in firsts])
        finally:
            for endpoint in endpoints:
                endpoint.sock.close()

    async def _serve_endpoint(self, endpoint: _Endpoint) -> None:
        while True:
            await trio.lowlevel.wait_readable(endpoint.sock)
            try:
                self._drain(endpoint, trio.current_time())
            except OSError as error:
                self._counters.read_error += 1
                logger.warning("cannot read STUN requests, trying again in 1 s: %s", error)
                await trio.sleep(_READ_ERROR_PAUSE_SECONDS)

    def _drain(self, endpoint: _Endpoint, now: float) -> None:
        """Answer what has arrived, a batch at most. Raises OSError if reading fails."""
        counters = self._counters
        budget, square, place = self._budget, endpoint.square, endpoint.place
        receive, siblings = endpoint.sock.recvfrom, endpoint.siblings
        for _ in range(_BATCH):
            try:
                datagram, source = receive(_RECEIVE_BYTES)
            except BlockingIOError:
                return
            try:
                reply = answer(datagram, source, now, budget, square, place)
            except StunError:
                counters.not_stun += 1
                continue
            if "." in source[0]:
                counters.ipv4 += 1
            else:
                counters.ipv6 += 1
            if reply is None:
                counters.over_budget += 1
                continue
            try:
                siblings[reply.place].sendto(reply.datagram, reply.destination)
            except OSError:
                # Also when the send buffer is full: a client asks again, waiting would be worse.
                counters.write_error += 1
            else:
                counters.success += 1

    def _open(self, address: Address, endpoints: list[_Endpoint]) -> None:
        """Open the socket of one address, or the four of its square, onto `endpoints`."""
        square = self._square_of(address)
        siblings: list[socket.socket] = []
        for place, member in enumerate(square or (address,)):
            sock = self._bind(member)
            siblings.append(sock)
            endpoints.append(_Endpoint(sock, siblings, square, place))

    def _bind(self, address: Address) -> socket.socket:
        host, port = address
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        sock = socket.socket(family, socket.SOCK_DGRAM)
        try:
            sock.setblocking(False)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BUFFER_BYTES)
            if family == socket.AF_INET6:
                shared = any("." in other and port == its for other, its in self.addresses)
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, host != "::" or shared)
            sock.bind(address)
        except OSError as error:
            sock.close()
            raise StunServerError(
                f"STUN cannot use UDP {_text(address)}: {error.strerror}; choose an address of "
                "this machine and a port that no other STUN server holds"
            ) from error
        return sock

    def _square_of(self, address: Address) -> Square | None:
        for alternate in self.alternates:
            if self._primary_of(alternate) == address:
                (host, port), (other_host, other_port) = address, alternate
                return (
                    address,
                    (host, other_port),
                    (other_host, port),
                    alternate,
                )
        return None

    def _primary_of(self, alternate: Address) -> Address:
        is_v6 = ":" in alternate[0]
        same_family = [address for address in self.addresses if (":" in address[0]) == is_v6]
        if len(same_family) != 1:
            raise StunServerError(
                f"the alternate STUN address {_text(alternate)} needs exactly one address of its "
                f"family beside it, there are {len(same_family)}"
            )
        primary = same_family[0]
        hosts, ports = {primary[0], alternate[0]}, {primary[1], alternate[1]}
        if len(hosts) != 2 or len(ports) != 2:
            raise StunServerError(
                f"the alternate STUN address {_text(alternate)} must differ from "
                f"{_text(primary)} in both IP address and port"
            )
        if 0 in ports or hosts & {"0.0.0.0", "::"}:
            raise StunServerError(
                "STUN with an alternate address tells clients its addresses; "
                f"write IP addresses and ports out instead of {_text(primary)}, {_text(alternate)}"
            )
        return primary


def _check_address(address: Address) -> None:
    host, port = address
    try:
        ip_address(host)
    except ValueError:
        raise StunServerError(
            f"the STUN address {host!r} is no IP address; write one, or :: for all"
        ) from None
    if not 0 <= port <= 65535:
        raise StunServerError(f"the STUN port {port} is no port; write 1 to 65535")


def _text(address: Address) -> str:
    host, port = address
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
